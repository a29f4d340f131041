import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { backoff } from './backoff';
import type { SubscriptionState } from './connection';
import type { Environment } from './environment';
import { Problem, SignedOut, Unreachable } from './problem';
import { Tidewatch } from './tidewatch';
import type { AguiEvent } from './types';

type Json = Record<string, unknown>;

/** The server's end of one WebSocket. */
class Socket {
  readyState = 1;
  sent: Json[] = [];
  onopen?: () => void;
  onmessage?: (message: { data: string }) => void;
  onclose?: (event: { code: number; reason: string }) => void;

  send(data: string) {
    this.sent.push(JSON.parse(data) as Json);
  }

  close() {
    this.readyState = 3;
  }

  push(frame: Json) {
    this.onmessage?.({ data: JSON.stringify(frame) });
  }

  drop(code: number) {
    this.readyState = 3;
    this.onclose?.({ code, reason: '' });
  }

  /** Opens, and takes whatever token comes. */
  accept() {
    this.onopen?.();
    this.push({ type: 'ok', ref: 'auth' });
  }

  /** Answers the newest subscription of a channel. */
  subscribed(channel: string, answer: Json) {
    const { ref } = this.last('subscribe', channel)!;
    this.push({ type: 'ok', ref, ...answer });
  }

  last(type: string, channel?: string): Json | undefined {
    return this.sent.findLast((frame) => frame['type'] === type && (!channel || frame['channel'] === channel));
  }

  event(channel: string, offset: number, event: AguiEvent) {
    this.push({ type: 'event', workspace: 'w', channel, epoch: 'e1', offset, event });
  }
}

/** A world in which the test is the server, the network and the clock. */
class World {
  sockets: Socket[] = [];
  stored = new Map<string, string>();
  calls: { path: string; init: RequestInit }[] = [];
  answers: Record<string, () => Response> = {};
  isOnline = true;
  wake = () => {};
  #tokens = 0;

  env: Environment = {
    now: () => Date.now(),
    random: () => 0.5,
    fetch: async (path, init = {}) => {
      this.calls.push({ path, init });
      const answer = this.answers[path];
      if (answer) return answer();
      if (path.includes('/auth/')) return this.tokens();
      throw new TypeError('fetch failed');
    },
    socket: () => {
      const socket = new Socket();
      this.sockets.push(socket);
      return socket as unknown as WebSocket;
    },
    storage: {
      getItem: (key) => this.stored.get(key) ?? null,
      setItem: (key, value) => void this.stored.set(key, value),
      removeItem: (key) => void this.stored.delete(key),
    },
    online: () => this.isOnline,
    onWake: (wake) => {
      this.wake = wake;
      return () => {};
    },
  };

  tokens(): Response {
    const n = ++this.#tokens;
    return Response.json({ access_token: `access-${n}`, refresh_token: `refresh-${n}`, expires_in: 1800 });
  }

  get socket(): Socket {
    return this.sockets.at(-1)!;
  }

  asked(path: string): number {
    return this.calls.filter((call) => call.path === path).length;
  }
}

const settle = () => vi.advanceTimersByTimeAsync(0);
const METRIC = 'metrics/m';
let world: World;
let tidewatch: Tidewatch;

beforeEach(async () => {
  vi.useFakeTimers({ now: 1_800_000_000_000 });
  vi.stubGlobal('BroadcastChannel', undefined);
  world = new World();
  tidewatch = new Tidewatch('', world.env);
  await tidewatch.login('a@b.c', 'pw');
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

/** A live subscription and what it was told. */
async function follow(channel: string) {
  const states: SubscriptionState['phase'][] = [];
  const seen: unknown[] = [];
  const stop = tidewatch.subscribe<unknown>('w', channel, {
    onSnapshot: (state) => seen.push(structuredClone(state)),
    onDelta: (state) => seen.push(structuredClone(state)),
    onEvent: (event) => seen.push(event['value']),
    onState: ({ phase }) => states.push(phase),
  });
  await settle();
  world.socket.accept();
  world.socket.subscribed(channel, { epoch: 'e1', offset: 0, recovered: false });
  return { states, seen, stop };
}

const state = (n: number): AguiEvent => ({ type: 'STATE_SNAPSHOT', snapshot: { rows: { A: { n } } } });
const to = (n: number): AguiEvent => ({ type: 'STATE_DELTA', delta: [{ op: 'replace', path: '/rows/A/n', value: n }] });
const alert = (n: number): AguiEvent => ({ type: 'CUSTOM', name: 'alert.firing', value: n });

describe('a connection', () => {
  test('sends the token in the first frame and subscribes when it was taken', async () => {
    const { states, seen } = await follow(METRIC);
    expect(world.socket.sent[0]).toMatchObject({ type: 'auth', token: 'access-1' });
    expect(world.socket.sent[1]).toEqual({ type: 'subscribe', workspace: 'w', channel: METRIC, ref: 's1' });
    world.socket.event(METRIC, 1, state(1));
    world.socket.event(METRIC, 2, to(2));
    expect(seen).toEqual([{ rows: { A: { n: 1 } } }, { rows: { A: { n: 2 } } }]);
    expect(states).toEqual(['subscribing', 'subscribing', 'live']);
    expect(tidewatch.received).toBe(2);
  });

  test('resumes every channel behind the last offset seen, and repeats nothing', async () => {
    const { seen } = await follow('alerts');
    world.socket.event('alerts', 1, alert(1));
    world.socket.event('alerts', 2, alert(2));
    world.socket.drop(1006);
    expect(tidewatch.connection).toMatchObject({ phase: 'waiting', retryAt: Date.now() + 250 });
    await vi.advanceTimersByTimeAsync(250);
    world.socket.accept();
    expect(world.socket.last('subscribe')).toMatchObject({ since: { epoch: 'e1', offset: 2 } });
    world.socket.subscribed('alerts', { epoch: 'e1', offset: 4, recovered: true });
    for (const n of [2, 3, 4]) world.socket.event('alerts', n, alert(n));
    expect(seen).toEqual([1, 2, 3, 4]);
  });

  test('takes a fresh snapshot where the server could not recover', async () => {
    const { seen } = await follow(METRIC);
    world.socket.event(METRIC, 9, state(1));
    world.socket.drop(1006);
    await vi.advanceTimersByTimeAsync(250);
    world.socket.accept();
    world.socket.subscribed(METRIC, { epoch: 'e1', offset: 3, recovered: false });
    world.socket.event(METRIC, 3, state(5));
    world.socket.event(METRIC, 4, to(6));
    expect(seen.at(-1)).toEqual({ rows: { A: { n: 6 } } });
  });

  test('subscribes again after a gap, from where it was', async () => {
    const { seen, states } = await follow('alerts');
    world.socket.event('alerts', 1, alert(1));
    world.socket.event('alerts', 3, alert(3));
    await settle();
    expect(world.socket.last('unsubscribe')).toMatchObject({ channel: 'alerts' });
    expect(world.socket.last('subscribe')).toMatchObject({ since: { epoch: 'e1', offset: 1 } });
    world.socket.subscribed('alerts', { epoch: 'e1', offset: 3, recovered: true });
    for (const n of [2, 3]) world.socket.event('alerts', n, alert(n));
    expect(seen).toEqual([1, 2, 3]);
    expect(states.slice(-3)).toEqual(['stale', 'subscribing', 'live']);
  });

  test('waits longer and longer, and at most half a minute', async () => {
    await follow(METRIC);
    const waits: number[] = [];
    for (let i = 0; i < 9; i += 1) {
      world.socket.drop(1006);
      const { connection } = tidewatch;
      waits.push('retryAt' in connection ? connection.retryAt - Date.now() : NaN);
      await vi.advanceTimersByTimeAsync(waits.at(-1)!);
    }
    expect(waits).toEqual([250, 500, 1000, 2000, 4000, 8000, 15_000, 15_000, 15_000]);
  });

  test('comes back at random within two seconds when the server restarts', async () => {
    await follow(METRIC);
    world.socket.drop(1012);
    expect(tidewatch.connection).toMatchObject({ phase: 'waiting', retryAt: Date.now() + 1000 });
  });

  test('comes back when the server that restarts said', async () => {
    await follow(METRIC);
    world.socket.push({ type: 'reconnect', after_ms: 1234 });
    world.socket.drop(1012);
    expect(tidewatch.connection).toMatchObject({ phase: 'waiting', retryAt: Date.now() + 1234 });
  });

  test('resumes without growing waits when it read too slowly', async () => {
    const { seen } = await follow('alerts');
    for (let n = 1; n <= 3; n += 1) {
      world.socket.event('alerts', n, alert(n));
      world.socket.drop(4008);
      await vi.advanceTimersByTimeAsync(250);
      world.socket.accept();
      world.socket.subscribed('alerts', { epoch: 'e1', offset: n, recovered: true });
    }
    expect(world.sockets.length).toBe(4);
    expect(seen).toEqual([1, 2, 3]);
  });

  test('renews a refused token and comes back with the new one', async () => {
    await follow(METRIC);
    world.socket.drop(4001);
    await vi.advanceTimersByTimeAsync(250);
    world.socket.onopen?.();
    expect(world.socket.sent[0]).toMatchObject({ type: 'auth', token: 'access-2' });
  });

  test('ends the session when the new token is refused too', async () => {
    await follow(METRIC);
    world.socket.drop(4001);
    await vi.advanceTimersByTimeAsync(250);
    world.socket.onopen?.();
    world.socket.drop(4001);
    await settle();
    expect(tidewatch.connection.phase).toBe('signed-out');
    expect(tidewatch.signedIn).toBe(false);
  });

  test('authenticates again on the open socket before the token runs out', async () => {
    await follow(METRIC);
    const { socket } = world;
    for (let s = 0; s < 1750; s += 5) {
      await vi.advanceTimersByTimeAsync(5_000);
      socket.push({ type: 'pong' });
    }
    expect(socket.last('auth')).toMatchObject({ token: 'access-2' });
    expect(world.sockets.length).toBe(1);
  });

  test('gives up on a server that answers no ping', async () => {
    await follow(METRIC);
    await vi.advanceTimersByTimeAsync(20_000);
    expect(world.socket.last('ping')).toBeDefined();
    await vi.advanceTimersByTimeAsync(10_000);
    expect(tidewatch.connection).toMatchObject({ phase: 'waiting', reason: 'the server fell silent' });
  });

  test('says offline without a network, and connects at once when it is back', async () => {
    await follow(METRIC);
    world.isOnline = false;
    world.socket.drop(1006);
    expect(tidewatch.connection.phase).toBe('offline');
    world.isOnline = true;
    world.wake();
    await settle();
    expect(world.sockets.length).toBe(2);
  });

  test('leaves out what is still on its way from a subscription that ended', async () => {
    const { stop } = await follow(METRIC);
    world.socket.event(METRIC, 1, state(1));
    stop();
    const seen: unknown[] = [];
    tidewatch.subscribe('w', METRIC, { onSnapshot: (now) => seen.push(now), onDelta: (now) => seen.push(now) });
    world.socket.event(METRIC, 2, to(2));
    world.socket.subscribed(METRIC, { epoch: 'e1', offset: 2, recovered: false });
    world.socket.event(METRIC, 2, state(2));
    expect(seen).toEqual([{ rows: { A: { n: 2 } } }]);
  });

  test('shares a channel between its subscribers and leaves it with the last', async () => {
    const { stop } = await follow(METRIC);
    world.socket.event(METRIC, 1, state(1));
    const late: unknown[] = [];
    const stopLate = tidewatch.subscribe('w', METRIC, { onSnapshot: (now) => late.push(now) });
    expect(late).toEqual([{ rows: { A: { n: 1 } } }]);
    expect(world.socket.sent.filter(({ type }) => type === 'subscribe').length).toBe(1);
    stop();
    expect(world.socket.last('unsubscribe')).toBeUndefined();
    stopLate();
    expect(world.socket.last('unsubscribe')).toMatchObject({ channel: METRIC });
  });

  test('tells a refused subscription why', async () => {
    const states: SubscriptionState[] = [];
    tidewatch.subscribe('w', 'metrics/none', { onState: (now) => states.push(now) });
    await settle();
    world.socket.accept();
    world.socket.push({ type: 'error', ref: 's1', code: 'metric_not_found', detail: 'no metric `none`' });
    expect(states.at(-1)).toEqual({ phase: 'failed', code: 'metric_not_found', detail: 'no metric `none`' });
  });

  test('tells of a channel that was taken away why, and of no other', async () => {
    const states: Record<string, SubscriptionState> = {};
    for (const [workspace, name] of [
      ['w', METRIC],
      ['w', 'alerts'],
      ['other', METRIC],
    ] as const) {
      tidewatch.subscribe(workspace, name, { onState: (now) => (states[`${workspace} ${name}`] = now) });
    }
    await settle();
    world.socket.accept();
    const withdrawn = { type: 'error', workspace: 'w', channel: METRIC, code: 'forbidden', detail: 'not yours' };
    world.socket.push(withdrawn);
    expect(states[`w ${METRIC}`]).toEqual({ phase: 'failed', code: 'forbidden', detail: 'not yours' });
    expect([states['w alerts']!.phase, states[`other ${METRIC}`]!.phase]).toEqual(['subscribing', 'subscribing']);
  });
});

describe('a call', () => {
  const problem = (status: number, code: string) =>
    new Response(JSON.stringify({ title: 'T', status, code, detail: 'because' }), {
      status,
      headers: { 'x-request-id': 'r1' },
    });

  test('throws the problem that the server names', async () => {
    world.answers['/x'] = () => problem(429, 'rate_limited');
    const error = await tidewatch.get('/x').catch((e: unknown) => e);
    expect(error).toBeInstanceOf(Problem);
    expect(error).toMatchObject({ status: 429, code: 'rate_limited', detail: 'because', requestId: 'r1' });
  });

  test('throws a problem for an answer that is none', async () => {
    world.answers['/x'] = () => new Response('<html>bad gateway</html>', { status: 502 });
    await expect(tidewatch.get('/x')).rejects.toMatchObject({ status: 502, code: 'http_502' });
  });

  test('throws unreachable when no answer comes', async () => {
    await expect(tidewatch.get('/down')).rejects.toBeInstanceOf(Unreachable);
  });

  test('renews a refused token by one request for all, and is made again', async () => {
    let refused = 0;
    world.answers['/x'] = () => (refused++ < 3 ? problem(401, 'token_expired') : Response.json({ fine: true }));
    const answers = await Promise.all([1, 2, 3].map(() => tidewatch.get('/x')));
    expect(answers).toEqual([{ fine: true }, { fine: true }, { fine: true }]);
    expect(world.asked('/api/v1/auth/refresh')).toBe(1);
    expect(new Headers(world.calls.at(-1)!.init.headers).get('authorization')).toBe('Bearer access-2');
  });

  test('ends the session when the refresh token is spent', async () => {
    world.answers['/x'] = () => problem(401, 'token_expired');
    world.answers['/api/v1/auth/refresh'] = () => problem(401, 'refresh_token_spent');
    await expect(tidewatch.get('/x')).rejects.toBeInstanceOf(SignedOut);
    expect(tidewatch.signedIn).toBe(false);
    expect(world.stored.size).toBe(0);
  });

  test('keeps the session when only the server is away', async () => {
    world.answers['/x'] = () => problem(401, 'token_expired');
    world.answers['/api/v1/auth/refresh'] = () => problem(503, 'unavailable');
    await expect(tidewatch.get('/x')).rejects.toMatchObject({ status: 503 });
    expect(tidewatch.signedIn).toBe(true);
  });

  test('finds the session again after a reload', () => {
    expect(new Tidewatch('', world.env).signedIn).toBe(true);
  });
});

describe('a run', () => {
  const body = (...events: [string, Json][]) =>
    new Response(events.map(([id, event]) => `: keep-alive\n\nid: ${id}\ndata: ${JSON.stringify(event)}\n\n`).join(''));
  const run = { workspace: 'w', agent: 'analyst', threadId: 't', runId: 'r', messages: [] };
  const at = '/api/v1/workspaces/w/';

  test('that is cut off goes on from the last event seen', async () => {
    world.answers[`${at}agents/analyst/run`] = () =>
      body(['e.0', { type: 'RUN_STARTED' }], ['e.1', { type: 'STEP_STARTED' }]);
    world.answers[`${at}runs/r/events`] = () => body(['e.2', { type: 'RUN_FINISHED' }]);
    const seen: string[] = [];
    const ended = tidewatch.run(run, ({ type }) => seen.push(type), new AbortController().signal);
    await vi.advanceTimersByTimeAsync(1000);
    await ended;
    expect(seen).toEqual(['RUN_STARTED', 'STEP_STARTED', 'RUN_FINISHED']);
    expect(new Headers(world.calls.at(-1)!.init.headers).get('last-event-id')).toBe('e.1');
  });

  test('that never ends is given up, and never taken for a success', async () => {
    world.answers[`${at}agents/analyst/run`] = () => body(['e.0', { type: 'RUN_STARTED' }]);
    world.answers[`${at}runs/r/events`] = () => new Response('');
    const ended = tidewatch.run(run, () => {}, new AbortController().signal).catch((error: unknown) => error);
    await vi.advanceTimersByTimeAsync(120_000);
    expect(await ended).toBeInstanceOf(Unreachable);
  });
});

test('a wait is drawn from all of its range, and the range doubles up to half a minute', () => {
  expect([0, 1, 2, 6, 60].map((attempt) => backoff(attempt, () => 1))).toEqual([500, 1000, 2000, 30_000, 30_000]);
  expect(backoff(9, () => 0)).toBe(0);
});
