/**
 * The client against a running server: `TIDEWATCH_URL`, `TIDEWATCH_EMAIL`, `TIDEWATCH_PASSWORD`, `TIDEWATCH_WORKSPACE`.
 * Skipped without them.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { WebSocket as NodeSocket } from 'ws';
import type { Environment } from './environment';
import { newId } from './environment';
import { Tidewatch, workspacePath } from './tidewatch';
import type { AguiEvent } from './types';

const { TIDEWATCH_URL, TIDEWATCH_EMAIL, TIDEWATCH_PASSWORD, TIDEWATCH_WORKSPACE } = process.env;
const url = TIDEWATCH_URL ?? '';
const workspace = TIDEWATCH_WORKSPACE ?? '';
const sockets: NodeSocket[] = [];

/** Node's own clock and network. */
const environment: Environment = {
  now: () => Date.now(),
  random: () => Math.random(),
  fetch: (input, init) => fetch(input, init),
  socket: (address) => {
    const socket = new NodeSocket(address);
    sockets.push(socket);
    return socket as unknown as WebSocket;
  },
  storage: null,
  online: () => true,
  onWake: () => () => {},
};

async function until(what: string, holds: () => boolean): Promise<void> {
  for (let waited = 0; !holds(); waited += 10) {
    if (waited > 20_000) throw new Error(`${what}: not within 20 s`);
    await new Promise((done) => setTimeout(done, 10));
  }
}

async function signedIn(): Promise<Tidewatch> {
  const tidewatch = new Tidewatch(url, environment);
  await tidewatch.login(TIDEWATCH_EMAIL!, TIDEWATCH_PASSWORD!);
  return tidewatch;
}

afterEach(() => sockets.splice(0).forEach((socket) => socket.terminate()));

describe.skipIf(!TIDEWATCH_URL)('against a running server', { timeout: 60_000 }, () => {
  test('events published while the connection was lost come when it is back, each once and in order', async () => {
    const tidewatch = await signedIn();
    const thread = newId();
    const path = `${workspacePath(workspace)}/streams/chat.messages/events`;
    const publish = (n: number) => tidewatch.post(path, [{ thread, sender: 's', text: String(n) }]);
    const seen: number[] = [];
    let state = '';
    const stop = tidewatch.subscribe(workspace, `streams/chat.messages?thread=${thread}`, {
      onEvent: (event: AguiEvent) => {
        const { events } = event['value'] as { events: { text: string }[] };
        seen.push(...events.map(({ text }) => Number(text)));
      },
      onState: ({ phase }) => (state = phase),
    });
    await until('live', () => state === 'live');
    for (let n = 0; n < 3; n += 1) await publish(n);
    await until('the first events', () => seen.length === 3);
    sockets.at(-1)!.terminate();
    for (let n = 3; n < 6; n += 1) await publish(n);
    await until('all events', () => seen.length === 6);
    expect(seen).toEqual([0, 1, 2, 3, 4, 5]);
    stop();
  });

  test('a state is a snapshot, then what changed', async () => {
    const tidewatch = await signedIn();
    let count: unknown;
    const stop = tidewatch.subscribe<{ count: number }>(workspace, 'presence/alerts', {
      onSnapshot: (state) => (count = state.count),
      onDelta: (state) => (count = state.count),
    });
    await until('a snapshot', () => count !== undefined);
    const before = count as number;
    const leave = (await signedIn()).subscribe(workspace, 'alerts', {});
    await until('somebody who came', () => count === before + 1);
    leave();
    await until('somebody who left', () => count === before);
    stop();
  });

  test('what is refused is told by its code', async () => {
    const tidewatch = await signedIn();
    let code = '';
    tidewatch.subscribe(workspace, 'metrics/there-is-none', {
      onState: (state) => state.phase === 'failed' && (code = state.code),
    });
    await until('a refusal', () => code !== '');
    expect(code).toBe('unknown_metric');
    await expect(tidewatch.login(TIDEWATCH_EMAIL!, 'wrong password')).rejects.toMatchObject({ status: 401 });
  });
});
