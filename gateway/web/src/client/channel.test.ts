import { describe, expect, test } from 'vitest';
import { addedUnder, Channel, changedUnder } from './channel';
import type { Patch } from './types';

/** A channel driven by a script of messages; gives the kinds of effect, with the state where there is one. */
function check(name: string, script: (channel: Channel) => unknown[]): unknown[] {
  return script(new Channel(name));
}

const snapshot = (offset: number, rows: object, epoch = 'e1') => ({
  epoch,
  offset,
  event: { type: 'STATE_SNAPSHOT', snapshot: { rows: structuredClone(rows) } },
});
const delta = (offset: number, delta: Patch, epoch = 'e1') => ({
  epoch,
  offset,
  event: { type: 'STATE_DELTA', delta },
});
const custom = (offset: number, epoch = 'e1') => ({
  epoch,
  offset,
  event: { type: 'CUSTOM', name: 'n', value: offset },
});
const rise: Patch = [{ op: 'replace', path: '/rows/A/vwap', value: 2 }];

describe('state channels', () => {
  test('a delta changes the snapshot before it', () => {
    const effects = check('metrics/m', (channel) => [
      channel.receive(snapshot(1, { A: { vwap: 1 } })),
      channel.receive(delta(2, [...rise, { op: 'add', path: '/rows/B~1C', value: { vwap: 9 } }])),
    ]);
    expect(effects[1]).toMatchObject({ kind: 'delta', state: { rows: { A: { vwap: 2 }, 'B/C': { vwap: 9 } } } });
  });

  test('a repeated offset changes nothing', () => {
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(1, { A: { vwap: 1 } }));
    channel.receive(delta(2, rise));
    expect(channel.receive(delta(2, [{ op: 'replace', path: '/rows/A/vwap', value: 7 }]))).toEqual({ kind: 'repeat' });
    expect(channel.receive(delta(1, [{ op: 'remove', path: '/rows/A' }]))).toEqual({ kind: 'repeat' });
    expect(channel.state).toEqual({ rows: { A: { vwap: 2 } } });
  });

  test('a snapshot at the offset already seen is the state at that offset, and an older one is a repeat', () => {
    const channel = new Channel('portfolio/p');
    channel.receive(snapshot(5, { A: { vwap: 1 } }));
    expect(channel.receive(snapshot(5, { A: { vwap: 3 } }))).toMatchObject({ kind: 'snapshot' });
    expect(channel.receive(snapshot(4, {}))).toEqual({ kind: 'repeat' });
    expect(channel.state).toEqual({ rows: { A: { vwap: 3 } } });
  });

  test('offsets may jump, since a slow reader gets them folded', () => {
    const channel = new Channel('metrics/m?symbol=A');
    channel.receive(snapshot(1, { A: { vwap: 1 } }));
    expect(channel.receive(delta(9, rise)).kind).toBe('delta');
    expect(channel.since).toEqual({ epoch: 'e1', offset: 9 });
  });

  test('a delta that does not fit asks for a fresh start', () => {
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(1, {}));
    expect(channel.receive(delta(2, rise))).toMatchObject({ kind: 'gap' });
    expect(channel.since).toBeUndefined();
    expect(channel.receive(snapshot(3, { A: { vwap: 1 } })).kind).toBe('snapshot');
  });

  test('a delta before any snapshot, and a delta of a new epoch, ask for a fresh start', () => {
    expect(new Channel('metrics/m').receive(delta(2, rise)).kind).toBe('gap');
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(7, { A: { vwap: 1 } }));
    expect(channel.receive(delta(8, rise, 'e2')).kind).toBe('gap');
    expect(channel.since).toBeUndefined();
  });

  test('a snapshot of a new epoch is taken although its offset is lower', () => {
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(70, {}));
    expect(channel.receive(snapshot(1, { A: { vwap: 1 } }, 'e2')).kind).toBe('snapshot');
    expect(channel.since).toEqual({ epoch: 'e2', offset: 1 });
  });

  test('a patch cannot reach the prototype of all objects', () => {
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(1, {}));
    expect(channel.receive(delta(2, [{ op: 'add', path: '/__proto__/evil', value: 1 }])).kind).toBe('gap');
    expect(({} as Record<string, unknown>)['evil']).toBeUndefined();
  });
});

describe('channels that keep every event', () => {
  test('a missing offset is a gap, and we resume behind the last one seen', () => {
    const channel = new Channel('alerts');
    channel.subscribed({ epoch: 'e1', offset: 4, recovered: false });
    expect(channel.receive(custom(5)).kind).toBe('event');
    expect(channel.receive(custom(7))).toEqual({ kind: 'gap', detail: 'offset 7 came after 5' });
    expect(channel.since).toEqual({ epoch: 'e1', offset: 5 });
  });

  test('a hole that the server resumes us over is how it numbers, and is no gap again', () => {
    const channel = new Channel('alerts');
    channel.receive(custom(5));
    channel.receive(custom(7));
    channel.subscribed({ epoch: 'e1', offset: 7, recovered: true });
    expect(channel.receive(custom(7)).kind).toBe('event');
    expect(channel.receive(custom(11)).kind).toBe('event');
  });

  test('the position that the server named is where to resume before any event has come', () => {
    const channel = new Channel('alerts');
    channel.subscribed({ epoch: 'e1', offset: 4, recovered: false });
    expect(channel.since).toEqual({ epoch: 'e1', offset: 4 });
  });
});

describe('subscribing again', () => {
  test('a recovered position goes on with the state that we hold', () => {
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(1, { A: { vwap: 1 } }));
    channel.subscribing();
    channel.subscribed({ epoch: 'e1', offset: 2, recovered: true });
    expect(channel.receive(delta(2, rise)).kind).toBe('delta');
  });

  test('an unrecovered one voids what we hold until the fresh snapshot', () => {
    const channel = new Channel('metrics/m');
    channel.receive(snapshot(8, { A: { vwap: 1 } }));
    channel.subscribing();
    channel.subscribed({ epoch: 'e1', offset: 3, recovered: false });
    expect(channel.state).toBeUndefined();
    expect(channel.receive(snapshot(3, {})).kind).toBe('snapshot');
  });

  test('a snapshot that overtook the answer stays', () => {
    const channel = new Channel('metrics/m');
    channel.subscribing();
    channel.receive(snapshot(3, { A: { vwap: 1 } }));
    channel.subscribed({ epoch: 'e1', offset: 3, recovered: false });
    expect(channel.receive(delta(4, rise)).kind).toBe('delta');
  });
});

test('the touched keys of a patch are unescaped, and a patch of the whole names none', () => {
  const patch: Patch = [
    { op: 'replace', path: '/rows/A~1B/vwap', value: 1 },
    { op: 'remove', path: '/rows/C' },
    { op: 'add', path: '/other', value: 1 },
  ];
  expect(changedUnder(patch, 'rows')).toEqual(new Set(['A/B', 'C']));
  expect(changedUnder([{ op: 'replace', path: '', value: {} }], 'rows')).toBeNull();
  expect(changedUnder([{ op: 'replace', path: '/rows', value: {} }], 'rows')).toBeNull();
  expect(changedUnder([{ op: 'add', path: '/rows/', value: {} }], 'rows')).toEqual(new Set(['']));
});

test('what a patch sets comes in its order, also where it sets the same key again', () => {
  const patch: Patch = [
    { op: 'add', path: '/rows/A~1B', value: 1 },
    { op: 'add', path: '/rows/A~1B', value: 2 },
    { op: 'replace', path: '/rows/C/vwap', value: 3 },
    { op: 'remove', path: '/rows/C' },
    { op: 'replace', path: '/rows', value: {} },
    { op: 'replace', path: '', value: {} },
  ];
  expect(addedUnder(patch, 'rows')).toEqual([
    ['A/B', 1],
    ['A/B', 2],
  ]);
});
