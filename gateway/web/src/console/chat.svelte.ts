/** The chat with one agent: a thread per workspace and tab, which a reload finds again on the server. */
import { Conversation, newId, type AguiEvent, type Message } from '../client';
import { app, explain, tidewatch } from './app.svelte';

export class Chat {
  messages = $state.raw<Message[]>([]);
  running = $state(false);
  /** Why the last run did not end well. */
  problem = $state<string | null>(null);

  #conversation = new Conversation();
  #key: string;
  #thread: string;
  #run = '';
  #listening = new AbortController();
  #frame = 0;

  constructor(
    readonly workspace: string,
    readonly agent: string,
  ) {
    // By user, so that the next one to sign in on this tab does not open the thread of the last.
    this.#key = `tidewatch.thread.${app.me?.user.id}.${workspace}.${agent}`;
    const known = sessionStorage.getItem(this.#key);
    this.#thread = known ?? newId();
    // No messages asks for those of the thread. A server that does not know it has nothing to show, nor to complain of.
    if (known) void this.#follow([]).then(() => (this.problem = null));
  }

  async ask(question: string): Promise<void> {
    sessionStorage.setItem(this.#key, this.#thread);
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
    sessionStorage.removeItem(this.#key);
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
