import { backoff } from './backoff';
import { Connection, type ConnectionState, type Handlers } from './connection';
import { browser, type Environment } from './environment';
import { Problem, Unreachable } from './problem';
import { Session } from './session';
import { frames } from './sse';
import type { AguiEvent, Message } from './types';

/** One question to an agent. `messages` is the whole conversation so far; empty asks for that of a known thread. */
export interface Run {
  workspace: string;
  agent: string;
  threadId: string;
  runId: string;
  messages: Message[];
}

/** A cut run is resumed this often in a row without news before it is given up. */
const RESUMES_MAX = 6;

/**
 * A signed-in user of one Tidewatch server: HTTP calls, live channels and agent runs.
 *
 * Tokens are renewed in time and by one request for all; the WebSocket opens with the first subscription, reconnects by
 * itself and resumes every channel where it stood.
 */
export class Tidewatch {
  readonly #env: Environment;
  readonly #session: Session;
  readonly #connection: Connection;

  /** `base`: the server's origin, without a slash at the end. */
  constructor(
    readonly base: string,
    env: Environment = browser(),
  ) {
    this.#env = env;
    this.#session = new Session(base, env);
    this.#connection = new Connection(`${base.replace(/^http/, 'ws')}/api/v1/ws`, this.#session, env);
  }

  /** True after a login, and after a reload of the page in the same tab. */
  get signedIn(): boolean {
    return this.#session.signedIn;
  }

  /** Calls back when the session began, was renewed or ended. */
  onSession(listener: () => void): () => void {
    return this.#session.onChange(listener);
  }

  /** Signs in. Throws a `Problem` with the server's reason when refused. */
  login(email: string, password: string, otp?: string): Promise<void> {
    return this.#session.login(email, password, otp);
  }

  /** The names of the OpenID Connect issuers that `/api/v1/auth/oidc/{name}/start` leads to. */
  async issuers(): Promise<string[]> {
    const response = await this.#env.fetch(`${this.base}/api/v1/auth/oidc`);
    return response.ok ? ((await response.json()) as { issuers: string[] }).issuers : [];
  }

  /** Signs in with the code behind `#sign_in=`, where an issuer sent the browser back. Throws like `login`. */
  loginByCode(code: string): Promise<void> {
    return this.#session.loginByCode(code);
  }

  logout(): Promise<void> {
    return this.#session.logout();
  }

  get connection(): ConnectionState {
    return this.#connection.state;
  }

  /** Event messages received over the WebSocket since the start. */
  get received(): number {
    return this.#connection.received;
  }

  /** Calls back with the connection's state now and at every change. */
  onConnection(listener: (state: ConnectionState) => void): () => void {
    return this.#connection.onState(listener);
  }

  /** Reconnects at once instead of waiting out the countdown. */
  retryNow(): void {
    this.#connection.retryNow();
  }

  /** Follows a channel until the returned function is called. `State` is the shape of the channel's snapshots. */
  subscribe<State>(workspace: string, channel: string, handlers: Handlers<State>): () => void {
    return this.#connection.subscribe(workspace, channel, handlers);
  }

  /** `GET` of `path`, which begins with `/`. Throws `Problem`, `Unreachable` or `SignedOut`. */
  async get<T>(path: string, signal?: AbortSignal): Promise<T> {
    return (await this.#fetch(path, { method: 'GET', signal: signal ?? null })).json() as Promise<T>;
  }

  /** `POST` of a JSON body; an answer without a body gives `undefined`. Throws like `get`. */
  async post<T>(path: string, body: unknown = {}): Promise<T> {
    const headers = { 'content-type': 'application/json' };
    const response = await this.#fetch(path, { method: 'POST', headers, body: JSON.stringify(body) });
    const text = await response.text();
    return (text ? JSON.parse(text) : undefined) as T;
  }

  /** `DELETE` of `path`. Throws like `get`. */
  async delete(path: string): Promise<void> {
    await this.#fetch(path, { method: 'DELETE' });
  }

  /**
   * Runs an agent and hands over its AG-UI events, each once, until the terminal one. The run belongs to the server: a
   * cut stream is resumed by `Last-Event-ID`; aborting `signal` stops listening, and only `cancel` stops the run.
   */
  async run(run: Run, onEvent: (event: AguiEvent) => void, signal: AbortSignal): Promise<void> {
    const { workspace, agent, threadId, runId, messages } = run;
    const input = {
      threadId,
      runId,
      protocolVersion: '1.0',
      messages,
      tools: [],
      context: [],
      state: {},
      forwardedProps: {},
    };
    const headers = { 'content-type': 'application/json', accept: 'text/event-stream' };
    const start = { method: 'POST', headers, body: JSON.stringify(input), signal };
    let response = await this.#fetch(`${workspacePath(workspace)}/agents/${encodeURIComponent(agent)}/run`, start);
    let cursor = '';
    for (let failures = 0; ; failures += 1) {
      try {
        for await (const { id, data } of frames(response.body!)) {
          const event = JSON.parse(data) as AguiEvent;
          onEvent(event);
          if (event.type === 'RUN_FINISHED' || event.type === 'RUN_ERROR') return;
          if (id !== cursor) failures = 0;
          cursor = id;
        }
      } catch (error) {
        if (signal.aborted || error instanceof SyntaxError) throw error;
      }
      if (failures >= RESUMES_MAX || !cursor) throw new Unreachable(`run ${runId} was cut off`);
      response = await this.#resume(workspace, runId, cursor, failures, signal);
    }
  }

  /** Stops a run on the server: its model and its tools. */
  cancel(workspace: string, runId: string): Promise<void> {
    return this.post(`${workspacePath(workspace)}/runs/${encodeURIComponent(runId)}/cancel`);
  }

  async #resume(
    workspace: string,
    runId: string,
    cursor: string,
    failures: number,
    signal: AbortSignal,
  ): Promise<Response> {
    const headers = { accept: 'text/event-stream', 'last-event-id': cursor };
    for (let attempt = failures; ; attempt += 1) {
      await new Promise((resolve) => setTimeout(resolve, backoff(attempt, this.#env.random)));
      signal.throwIfAborted();
      try {
        return await this.#fetch(`${workspacePath(workspace)}/runs/${encodeURIComponent(runId)}/events`, {
          headers,
          signal,
        });
      } catch (error) {
        if (!(error instanceof Unreachable) || attempt >= RESUMES_MAX) throw error;
      }
    }
  }

  /** A call with the session's token; a refused token is renewed and the call made once more. */
  async #fetch(path: string, init: RequestInit): Promise<Response> {
    const token = await this.#session.token();
    const response = await this.#send(path, init, token);
    const last = response.status === 401 ? await this.#send(path, init, await this.#session.renew(token)) : response;
    if (last.status === 401) this.#session.drop();
    if (!last.ok) throw await Problem.from(last);
    return last;
  }

  async #send(path: string, init: RequestInit, token: string): Promise<Response> {
    try {
      const headers = { accept: 'application/json', ...init.headers, authorization: `Bearer ${token}` };
      return await this.#env.fetch(this.base + path, { ...init, headers });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new Unreachable(error);
    }
  }
}

/** `/api/v1/workspaces/{workspace}`, with whatever follows as path segments, each escaped. */
export function workspacePath(workspace: string, ...segments: string[]): string {
  return ['/api/v1/workspaces', workspace, ...segments]
    .map((part, i) => (i === 0 ? part : encodeURIComponent(part)))
    .join('/');
}
