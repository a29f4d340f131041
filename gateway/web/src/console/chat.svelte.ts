/** The chat with one agent: a thread per workspace and tab, which a reload finds again on the server. */
import { Conversation, newId, type AguiEvent, type Message } from '../client';
import { explain, tidewatch } from './app.svelte';

export class Chat {
  messages = $state.raw<Message[]>([]);
  running = $state(false);
  /** Why the last run did not end well. */
  problem = $state<string | null>(null);

  #conversation = new Conversation();
  #thread: string;
  #run = '';
  #listening = new AbortController();
  #frame = 0;

  constructor(
    readonly workspace: string,
    readonly agent: string,
  ) {
    const key = `tidewatch.thread.${workspace}.${agent}`;
    const known = sessionStorage.getItem(key);
    this.#thread = known ?? newId();
    sessionStorage.setItem(key, this.#thread);
    // No messages asks for those of the thread. A server that does not know it has nothing to show, nor to complain of.
    if (known) void this.#follow([]).then(() => (this.problem = null));
  }

  async ask(question: string): Promise<void> {
    this.#conversation.messages.push({ id: newId(), role: 'user', content: question });
    await this.#follow(this.#conversation.messages);
  }

  /** Stops the run on the server; its terminal event then ends the listening. */
  async cancel(): Promise<void> {
    try {
      await tidewatch.cancel(this.workspace, this.#run);
    } catch (error) {
      this.problem = explain(error);
    }
  }

  /** Begins a new thread. */
  clear(): void {
    this.close();
    this.#listening = new AbortController();
    this.#conversation = new Conversation();
    this.#thread = newId();
    sessionStorage.setItem(`tidewatch.thread.${this.workspace}.${this.agent}`, this.#thread);
    this.messages = [];
    this.problem = null;
    this.running = false;
  }

  /** Stops listening; a run goes on at the server. */
  close(): void {
    this.#listening.abort();
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
  }

  async #follow(messages: Message[]): Promise<void> {
    const { workspace, agent } = this;
    const { signal } = this.#listening;
    this.#run = newId();
    this.running = true;
    this.problem = null;
    this.#show();
    try {
      const run = { workspace, agent, threadId: this.#thread, runId: this.#run, messages };
      await tidewatch.run(run, (event) => !signal.aborted && this.#receive(event), signal);
    } catch (error) {
      if (!signal.aborted) this.problem = explain(error);
    }
    if (!signal.aborted) this.running = false;
  }

  #receive(event: AguiEvent): void {
    if (event.type === 'RUN_ERROR') this.problem = String(event['message']);
    if (event.type === 'RUN_FINISHED' && (event['outcome'] as { type?: string } | undefined)?.type === 'cancelled') {
      this.problem = 'Stopped.';
    }
    this.#conversation.receive(event);
    this.#frame ||= requestAnimationFrame(() => this.#show());
  }

  #show(): void {
    this.#frame = 0;
    // Copies, since the conversation grows its messages in place and the page compares by identity.
    this.messages = this.#conversation.messages.map((message) => ({ ...message }));
  }
}
