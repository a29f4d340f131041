import { expect, test } from 'vitest';
import {
  count,
  cell,
  duration,
  elapsed,
  money,
  number,
  numeric,
  signedMoney,
  signedPercent,
  time,
  utc,
  windowText,
} from './format';

/** Reads in the test machine's locale as it would in English. */
const plain = (text: string) => text.replaceAll(/[\u202f\u00a0]/g, ' ');

test('a number keeps the digits that a reader can use', () => {
  expect([187.2345, 61707.681617, 27.5718, 0.0123456789, 42, 0, 1.5e-9].map(number)).toEqual([
    '187.23',
    '61,707.68',
    '27.5718',
    '0.0123457',
    '42',
    '0',
    '1.5E-9',
  ]);
});

test('a count agrees with its noun', () => {
  expect([0, 1, 2000].map((n) => count(n, 'key'))).toEqual(['0 keys', '1 key', '2,000 keys']);
});

test('what is no number is missing, and a decimal may be a string', () => {
  expect([null, 'x', '', true, undefined].map(numeric)).toEqual([null, null, null, null, null]);
  expect(numeric('12.50')).toBe(12.5);
  expect(number(null)).toBe('–');
});

test('only a numeric column reads its strings as numbers', () => {
  expect(cell('007', 'utf8')).toBe('007');
  expect(cell('12.5', 'decimal(10,2)')).toBe('12.5000');
  expect(cell(true, 'bool')).toBe('yes');
});

test('money follows its currency, and an unknown one is written behind', () => {
  expect(plain(money(1234.5, 'USD'))).toBe('$1,234.50');
  expect(plain(money(1234, 'points'))).toBe('1,234 points');
  expect(signedMoney(5, 'USD')).toBe('+$5.00');
  expect(signedMoney(-5, 'USD')).toBe('-$5.00');
});

test('a gain carries its sign, and a division by nothing is missing', () => {
  expect([0.0123, -0.5, 0, null, Infinity].map(signedPercent)).toEqual(['+1.23%', '-50.00%', '0.00%', '–', '–']);
});

test('the date stands only where it is not today’s', () => {
  const now = new Date(2026, 10, 21, 12, 0, 0).getTime();
  const local = (day: number) => new Date(2026, 10, day, 9, 5, 7).toISOString();
  expect(time(local(21), now)).toBe('09:05:07');
  expect(time(local(20), now)).toContain('20');
  expect(time('never', now)).toBe('never');
});

test('UTC keeps all digits of the instant', () => {
  expect(utc('2026-11-21T04:00:00.123456Z')).toBe('2026-11-21 04:00:00.123456 UTC');
  expect(utc('2026-11-21T04:00:00+01:00')).toBe('2026-11-21 03:00:00.000 UTC');
  expect(utc(null)).toBe('');
});

test('elapsed time is told in its largest unit and is never negative', () => {
  const since = '2026-11-21T00:00:00Z';
  const after = (ms: number) => elapsed(since, Date.parse(since) + ms);
  expect([0, 59_000, 61_000, 7_200_000, 90_000_000, -5_000].map(after)).toEqual([
    '0 s',
    '59 s',
    '1 min',
    '2 h',
    '1 d',
    '0 s',
  ]);
});

test('durations are read in every unit of the contract', () => {
  expect(['250ms', '10s', '1m', '1h30m', '1d'].map(duration)).toEqual([250, 10_000, 60_000, 5_400_000, 86_400_000]);
  expect(['', 'soon', '5', undefined].map(duration)).toEqual([null, null, null, null]);
});

test('a window is told in a few words', () => {
  expect(windowText({ kind: 'hop', size: '5m', slide: '10s' })).toBe('5m windows every 10s');
  expect(windowText({ kind: 'tumble', size: '1m' })).toBe('1m windows');
});
