/** An answer of the server that is asked for again from time to time, and stays on the page until a newer one is there. */
export class Fetched<T> {
  value = $state.raw<T | null>(null);
  /** Why the last attempt gave none. */
  problem = $state.raw<unknown>(null);

  #asked = 0;
  #answered = 0;

  constructor(private readonly ask: () => Promise<T>) {}

  async load(): Promise<void> {
    const turn = ++this.#asked;
    try {
      const value = await this.ask();
      if (!this.#isNews(turn)) return;
      this.problem = null;
      // The same again keeps its identity, so that nothing on the page is made anew.
      if (JSON.stringify(value) !== JSON.stringify(this.value)) this.value = value;
    } catch (error) {
      if (this.#isNews(turn)) this.problem = error;
    }
  }

  clear(): void {
    this.#answered = this.#asked;
    this.value = this.problem = null;
  }

  /** False of an answer that was overtaken by that to a later question. */
  #isNews(turn: number): boolean {
    if (turn <= this.#answered) return false;
    this.#answered = turn;
    return true;
  }
}
