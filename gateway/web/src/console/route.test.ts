import { expect, test } from 'vitest';
import { readRoute, routeHash } from './route';

test('an address opens what it was made from', () => {
  for (const route of [
    { workspace: '', metric: '' },
    { workspace: 'try', metric: '' },
    { workspace: 'try', metric: 'vwap 1m/%' },
  ]) {
    expect(readRoute(routeHash(route.workspace, route.metric))).toEqual(route);
  }
});

test('what is no address of ours names something that does not exist', () => {
  expect(readRoute('#/nonsense')).toEqual({ workspace: 'nonsense', metric: '' });
  expect(readRoute('#/try/vwap_1m/more')).toEqual({ workspace: 'try', metric: 'vwap_1m/more' });
  expect(readRoute('#/%E0%A4%A')).toEqual({ workspace: '%E0%A4%A', metric: '' });
});

test('the way back from an issuer is no address', () => {
  expect(readRoute('#sign_in=abc')).toEqual({ workspace: '', metric: '' });
});
