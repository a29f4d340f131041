import { expect, test } from 'vitest';
import type { Row, WindowSpec } from '../client';
import { History, lookBack, POINTS_MAX } from './history';

const TUMBLE: WindowSpec = { kind: 'tumble', size: '1m' };

/** A row of a window that is written `12:00-12:05`, on one day. */
function row(window: string, final: boolean, value = 0, revision = 0): Row {
  const [start, end] = window.split('-').map((time) => `2026-01-01T${time}:00.000000Z`);
  return { window_start: start!, window_end: end!, final, revision, value };
}

/** Takes in rows in this order and tells the points, as `minute=value`, those of open windows with a `?`. */
function drawn(window: WindowSpec, rows: Row[]): string {
  const history = new History(window);
  for (const row of rows) history.record(row);
  const minute = (x: number) => new Date(x * 1000).toISOString().slice(11, 16);
  return history
    .points('value')
    .map(({ x, y, final }) => `${minute(x)}=${y}${final ? '' : '?'}`)
    .join(' ');
}

test('a window is one point, whatever order its rows come in', () => {
  const live = [row('12:00-12:01', false, 1), row('12:01-12:02', false, 3)];
  const past = [row('12:00-12:01', true, 2), row('12:01-12:02', false, 2.5)];
  expect(drawn(TUMBLE, [...live, ...past])).toBe('12:01=2 12:02=2.5?');
  expect(drawn(TUMBLE, [...past, ...live])).toBe('12:01=2 12:02=3?');
});

test('windows that overlap, or share their start, are a point for each end', () => {
  const hop = [row('12:00-12:10', true, 1), row('12:05-12:15', true, 2), row('12:10-12:20', false, 3)];
  expect(drawn({ kind: 'hop', slide: '5m', size: '10m' }, hop)).toBe('12:10=1 12:15=2 12:20=3?');
  const cumulate = [row('12:00-12:05', true, 1), row('12:00-12:10', true, 2), row('12:10-12:15', false, 1)];
  expect(drawn({ kind: 'cumulate', step: '5m', size: '10m' }, cumulate)).toBe('12:05=1 12:10=2 12:15=1?');
});

test('a session that grows stays one point', () => {
  const rows = [row('12:00-12:01', false, 1), row('12:00-12:03', false, 2), row('12:00-12:04', true, 3)];
  expect(drawn({ kind: 'session', gap: '5m' }, rows)).toBe('12:04=3');
});

test('a correction counts, and an older revision does not undo it', () => {
  expect(drawn(TUMBLE, [row('12:00-12:01', true, 2, 1), row('12:00-12:01', true, 1, 0)])).toBe('12:01=2');
});

test('the oldest windows make room', () => {
  const history = new History(TUMBLE);
  const at = (minute: number) => new Date(Date.UTC(2026, 0, 1, 0, minute)).toISOString();
  for (let i = 0; i < POINTS_MAX + 10; i += 1) {
    history.record({ window_start: at(i), window_end: at(i + 1), final: true, revision: 0, value: i });
  }
  const points = history.points('value');
  expect([points.length, points[0]!.y]).toEqual([POINTS_MAX, 10]);
});

test('windows that were to close are found', () => {
  const history = new History(TUMBLE);
  for (const added of [row('12:00-12:01', true), row('12:01-12:02', false), row('12:02-12:03', false)]) {
    history.record(added);
  }
  const last = history.windowId(row('12:02-12:03', false));
  expect(history.openBefore(last).map(({ window_end }) => window_end)).toEqual(['2026-01-01T12:02:00.000000Z']);
});

test('a full chart reaches as many windows back, and over the size of those that overlap', () => {
  const newest = row('12:00-12:10', false);
  const hours = (window: WindowSpec, row = newest) =>
    lookBack(window, row).map((from) => from && (Date.parse(row.window_end) - Date.parse(from)) / 3_600_000);
  expect(hours({ kind: 'tumble', size: '10m' })).toEqual([40 + 1 / 6]);
  expect(hours({ kind: 'hop', slide: '1m', size: '1d' })).toEqual([4 + 24]);
  expect(hours({ kind: 'cumulate', step: '1m', size: '1d' })).toEqual([4 + 24]);
  expect(hours({ kind: 'tumble' })).toEqual([null]);
});

test('sessions are looked for further and further back', () => {
  const newest = row('12:00-12:10', false);
  const days = lookBack({ kind: 'session', gap: '30s' }, newest).map(
    (from) => (Date.parse(newest.window_start) - Date.parse(from!)) / 86_400_000,
  );
  expect(days.map((day) => Math.round(day * 100) / 100)).toEqual([0.08, 1.33, 21.33, 341.33]);
});
