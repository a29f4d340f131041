/** One WebSocket for all subscriptions: authenticates, keeps itself alive, comes back, and resumes each channel. */
import { backoff } from './backoff';
import { Channel } from './channel';
import type { Environment } from './environment';
import { Problem, SignedOut } from './problem';
import { RENEW_BEFORE, type Session } from './session';
import type { AguiEvent, Cursor, Patch } from './types';

/**
 * What the connection is doing. `waiting` and `offline` try again by themselves at `retryAt` (milliseconds since the
 * Unix epoch); `offline` means that the device itself has no network. `signed-out` waits for a login.
 */
export type ConnectionState =
  | { phase: 'idle' | 'connecting' | 'live' | 'signed-out' }
  | { phase: 'waiting' | 'offline'; retryAt: number; reason: string };

/** What a subscription is doing. While `stale`, the last state stands but does not move. */
export type SubscriptionState =
  | { phase: 'subscribing' | 'stale' }
  | { phase: 'live'; recovered: boolean }
  | { phase: 'failed'; code: string; detail: string };

/** Called as messages come. `State` is what the channel's snapshots hold; it is owned by the channel: read, do not write. */
export interface Handlers<State> {
  /** The whole state, first and after every resubscription that could not be resumed. */
  onSnapshot?(state: State): void;
  /** The state after `patch`, applied in place. */
  onDelta?(state: State, patch: Patch): void;
  /** Any other event of the channel, each one once. */
  onEvent?(event: AguiEvent): void;
  onState?(state: SubscriptionState): void;
}

interface Subscription {
  workspace: string;
  name: string;
  channel: Channel;
  handlers: Set<Handlers<unknown>>;
  state: SubscriptionState;
  ref: string;
  gaps: number;
  lastGap: number;
  timer?: ReturnType<typeof setTimeout>;
}

interface Frame {
  type: string;
  ref?: string;
  workspace?: string;
  channel?: string;
  epoch?: Cursor['epoch'];
  offset?: number;
  recovered?: boolean;
  event?: AguiEvent;
  code?: string;
  detail?: string;
  after_ms?: number;
}

/** Close codes of the contract, and our own for a server that fell silent. */
const RESTARTING = 1012;
const UNAUTHENTICATED = 4001;
const SLOW_READER = 4008;
const SILENT = 4000;

const PING_EVERY = 20_000;
/** A server that says nothing for this long after a ping is gone. */
const PING_WAIT = 10_000;
/** Opening and authenticating together take no longer than this, or the attempt is given up. */
const CONNECT_WAIT = 10_000;
/** A connection that lived this long was good: the next trouble starts with short waits again. */
const GOOD_AFTER = 10_000;
/** Clients of a restarting server spread their return over this long, where it does not say when each should come. */
const RESTART_SPREAD = 2_000;
/** A renewal that failed is tried again after this long. */
const RENEW_RETRY = 5_000;

export class Connection {
  #state: ConnectionState = { phase: 'idle' };
  #received = 0;
  #listeners = new Set<(state: ConnectionState) => void>();
  #subscriptions = new Map<string, Subscription>();
  #socket: WebSocket | null = null;
  #token: string | null = null;
  #attempt = 0;
  #refusals = 0;
  #liveSince = 0;
  #heard = false;
  /** When a server that restarts wants to see us again, in milliseconds from its close on. */
  #returnAfter: number | null = null;
  #refs = 0;
  #retry?: ReturnType<typeof setTimeout>;
  #pings?: ReturnType<typeof setInterval>;
  #pong?: ReturnType<typeof setTimeout>;
  #opening?: ReturnType<typeof setTimeout>;
  #renewal?: ReturnType<typeof setTimeout>;

  constructor(
    private readonly url: string,
    private readonly session: Session,
    private readonly env: Environment,
  ) {
    session.onChange(() => this.#onSession());
    env.onWake(() => this.#onWake());
  }

  get state(): ConnectionState {
    return this.#state;
  }

  /** Event messages received since the start; the difference over a second is the rate. */
  get received(): number {
    return this.#received;
  }

  /** Calls back with the state now and at every change. Returns the way to stop. */
  onState(listener: (state: ConnectionState) => void): () => void {
    this.#listeners.add(listener);
    listener(this.#state);
    return () => this.#listeners.delete(listener);
  }

  /** Connects now instead of at `retryAt`. */
  retryNow(): void {
    if (this.#state.phase === 'waiting' || this.#state.phase === 'offline') void this.#connect();
  }

  /**
   * Follows a channel of a workspace until the returned function is called. Subscribers of one channel share it on the
   * wire; a later one gets the state so far at once.
   */
  subscribe<State>(workspace: string, name: string, handlers: Handlers<State>): () => void {
    const key = `${workspace} ${name}`;
    const shared = handlers as Handlers<unknown>;
    const subscription = this.#subscriptions.get(key) ?? this.#add(key, workspace, name);
    subscription.handlers.add(shared);
    shared.onState?.(subscription.state);
    if (subscription.channel.state !== undefined) shared.onSnapshot?.(subscription.channel.state);
    if (this.#state.phase === 'idle') void this.#connect();
    return () => {
      if (!subscription.handlers.delete(shared) || subscription.handlers.size > 0) return;
      clearTimeout(subscription.timer);
      if (this.#subscriptions.get(key) === subscription) this.#subscriptions.delete(key);
      if (this.#state.phase === 'live') this.#send({ type: 'unsubscribe', workspace, channel: name });
    };
  }

  #add(key: string, workspace: string, name: string): Subscription {
    const channel = new Channel(name);
    const state: SubscriptionState = { phase: 'subscribing' };
    const added = { workspace, name, channel, handlers: new Set<never>(), state, ref: '', gaps: 0, lastGap: 0 };
    this.#subscriptions.set(key, added);
    if (this.#state.phase === 'live') this.#ask(added);
    return added;
  }

  async #connect(): Promise<void> {
    this.#stop();
    this.#enter({ phase: 'connecting' });
    let token: string;
    try {
      token = await this.session.token();
    } catch (error) {
      if (this.#state.phase !== 'connecting' || this.#socket) return;
      if (error instanceof SignedOut) return this.#enter({ phase: 'signed-out' });
      return this.#wait(backoff(this.#attempt++, this.env.random), (error as Error).message);
    }
    if (this.#state.phase !== 'connecting' || this.#socket) return; // signed out or connected anew meanwhile
    this.#token = token;
    const socket = this.env.socket(this.url);
    this.#socket = socket;
    this.#opening = setTimeout(() => this.#abandon(socket, 'no answer in time'), CONNECT_WAIT);
    socket.onopen = () => this.#send({ type: 'auth', token, ref: 'auth' });
    socket.onmessage = ({ data }: MessageEvent<string>) => this.#socket === socket && this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#socket === socket && this.#closed(code, reason);
  }

  #receive(data: string): void {
    this.#heard = true;
    const frame = JSON.parse(data) as Frame;
    if (frame.type === 'event') return this.#push(frame);
    if (frame.type === 'reconnect') return void (this.#returnAfter = frame.after_ms ?? null);
    if (frame.ref === 'auth') return this.#authenticated(frame);
    if (frame.ref === undefined && frame.channel !== undefined) return this.#withdrawn(frame);
    const subscription = [...this.#subscriptions.values()].find(({ ref }) => ref === frame.ref);
    if (!subscription) return; // an answer to a ping, or to what was given up meanwhile
    if (frame.type === 'ok') {
      subscription.channel.subscribed(frame);
      this.#tell(subscription, { phase: 'live', recovered: frame.recovered === true });
    } else if (frame.type === 'error') {
      this.#fail(subscription, frame);
    }
  }

  /** The server tells no more of a channel: it was taken from us, or is there no more. */
  #withdrawn(frame: Frame): void {
    for (const subscription of this.#subscriptions.values()) {
      const { workspace, name } = subscription;
      if (name === frame.channel && (frame.workspace ?? workspace) === workspace) this.#fail(subscription, frame);
    }
  }

  #fail(subscription: Subscription, frame: Frame): void {
    const { code = 'error', detail = 'the server refused the subscription' } = frame;
    this.#tell(subscription, { phase: 'failed', code, detail });
  }

  #authenticated(frame: Frame): void {
    if (frame.type === 'error') return this.#closed(UNAUTHENTICATED, frame.detail ?? 'token refused');
    this.#refusals = 0;
    if (this.#state.phase === 'live') return; // this was a renewal on the open socket
    clearTimeout(this.#opening);
    this.#liveSince = this.env.now();
    this.#enter({ phase: 'live' });
    this.#pings = setInterval(() => this.#ping(), PING_EVERY);
    this.#planRenewal();
    for (const subscription of this.#subscriptions.values()) this.#ask(subscription);
  }

  #push(frame: Frame): void {
    this.#received += 1;
    const subscription = this.#subscriptions.get(`${frame.workspace} ${frame.channel}`);
    const { epoch, offset, event } = frame;
    if (!subscription || epoch === undefined || offset === undefined || !event) return;
    // Until the server has answered, deltas may still be those of an earlier subscription to the same channel.
    if (subscription.state.phase !== 'live' && event.type !== 'STATE_SNAPSHOT') return;
    const effect = subscription.channel.receive({ epoch, offset, event });
    if (effect.kind === 'gap') return this.#onGap(subscription);
    for (const handlers of [...subscription.handlers]) {
      if (effect.kind === 'snapshot') handlers.onSnapshot?.(effect.state);
      else if (effect.kind === 'delta') handlers.onDelta?.(effect.state, effect.patch);
      else if (effect.kind === 'event') handlers.onEvent?.(effect.event);
    }
  }

  /** Subscribes again; more and more slowly where the gaps do not end, so that no bug on either side makes a storm. */
  #onGap(subscription: Subscription): void {
    const now = this.env.now();
    subscription.gaps = now - subscription.lastGap > GOOD_AFTER ? 0 : subscription.gaps + 1;
    subscription.lastGap = now;
    this.#tell(subscription, { phase: 'stale' });
    this.#send({ type: 'unsubscribe', workspace: subscription.workspace, channel: subscription.name });
    const wait = subscription.gaps === 0 ? 0 : backoff(subscription.gaps, this.env.random);
    clearTimeout(subscription.timer);
    subscription.timer = setTimeout(() => this.#state.phase === 'live' && this.#ask(subscription), wait);
  }

  #ask(subscription: Subscription): void {
    clearTimeout(subscription.timer);
    subscription.ref = `s${++this.#refs}`;
    const { workspace, name, ref, channel } = subscription;
    this.#tell(subscription, { phase: 'subscribing' });
    channel.subscribing();
    this.#send({ type: 'subscribe', workspace, channel: name, ref, since: channel.since });
  }

  #closed(code: number, reason: string): void {
    const lived = this.#state.phase === 'live' && this.env.now() - this.#liveSince >= GOOD_AFTER;
    this.#stop();
    if (lived) this.#attempt = 0;
    for (const subscription of this.#subscriptions.values()) this.#tell(subscription, { phase: 'stale' });
    if (code === UNAUTHENTICATED) return void this.#onRefused();
    const returnAfter = this.#returnAfter ?? this.env.random() * RESTART_SPREAD;
    this.#returnAfter = null;
    if (code === RESTARTING) return this.#wait(returnAfter, 'the server is restarting');
    if (code === SLOW_READER) return this.#wait(backoff(0, this.env.random), 'this page read too slowly');
    const why = reason || (code === SILENT ? 'the server fell silent' : 'the connection was lost');
    this.#wait(backoff(this.#attempt++, this.env.random), why);
  }

  /** The server does not take the token: a new one may help, once. */
  async #onRefused(): Promise<void> {
    this.#enter({ phase: 'connecting' });
    if (++this.#refusals > 1) return this.session.drop();
    try {
      if (this.#token) await this.session.renew(this.#token);
    } catch (error) {
      if (error instanceof SignedOut || this.#state.phase !== 'connecting') return; // the session's end told us already
      const why = error instanceof Problem ? error.detail : (error as Error).message;
      return this.#wait(backoff(this.#attempt++, this.env.random), why);
    }
    if (this.#state.phase === 'connecting' && !this.#socket) this.#wait(backoff(0, this.env.random), 'token renewed');
  }

  #wait(delay: number, reason: string): void {
    const phase = this.env.online() ? 'waiting' : 'offline';
    this.#enter({ phase, retryAt: this.env.now() + delay, reason });
    this.#retry = setTimeout(() => void this.#connect(), delay);
  }

  #ping(): void {
    this.#heard = false;
    this.#send({ type: 'ping' });
    const socket = this.#socket;
    clearTimeout(this.#pong);
    this.#pong = setTimeout(() => !this.#heard && socket && this.#abandon(socket, ''), PING_WAIT);
  }

  /** Gives up on a socket at once: closing a dead one properly can take a minute. */
  #abandon(socket: WebSocket, reason: string): void {
    if (this.#socket !== socket) return;
    socket.close(SILENT, 'silent');
    this.#closed(SILENT, reason);
  }

  #planRenewal(): void {
    clearTimeout(this.#renewal);
    if (this.session.expires === null) return;
    const wait = Math.max(RENEW_RETRY, this.session.expires - RENEW_BEFORE - this.env.now());
    this.#renewal = setTimeout(() => {
      // Success comes back through `#onSession`, which sends the new token; on failure the old one may still serve.
      if (this.#token) this.session.renew(this.#token).catch(() => this.#planRenewal());
    }, wait);
  }

  #onSession(): void {
    const token = this.session.access;
    if (token === null) {
      this.#stop();
      this.#attempt = this.#refusals = 0;
      return this.#enter({ phase: this.#state.phase === 'idle' ? 'idle' : 'signed-out' });
    }
    if (this.#state.phase === 'signed-out') {
      if (this.#subscriptions.size > 0) void this.#connect();
      else this.#enter({ phase: 'idle' });
    } else if (this.#state.phase === 'live' && token !== this.#token) {
      this.#token = token;
      this.#send({ type: 'auth', token, ref: 'auth' });
      this.#planRenewal();
    }
  }

  #onWake(): void {
    if (this.#state.phase === 'live') return this.#ping(); // a sleeping device does not notice that its socket died
    if (this.env.online()) this.retryNow();
    else if (this.#state.phase === 'waiting') this.#enter({ ...this.#state, phase: 'offline' });
  }

  #send(frame: object): void {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(frame));
  }

  #tell(subscription: Subscription, state: SubscriptionState): void {
    subscription.state = state;
    for (const handlers of [...subscription.handlers]) handlers.onState?.(state);
  }

  #enter(state: ConnectionState): void {
    this.#state = state;
    for (const listener of [...this.#listeners]) listener(state);
  }

  /** Lets go of the socket and all timers of the connection. */
  #stop(): void {
    for (const timer of [this.#retry, this.#pong, this.#opening, this.#renewal]) clearTimeout(timer);
    clearInterval(this.#pings);
    const socket = this.#socket;
    this.#socket = null;
    if (socket && socket.readyState <= 1) socket.close(1000);
  }
}
