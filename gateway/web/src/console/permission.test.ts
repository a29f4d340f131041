import { expect, test } from 'vitest';
import type { Workspace } from '../client';
import { grantedOn, lack, may, maySomewhere } from './permission';

function holding(...permissions: string[]): Workspace {
  return { id: 'try', name: 'Try', role: 'guest', tier: 'free', permissions };
}

test('a permission of the workspace holds on all of its resources', () => {
  const workspace = holding('stream:ingest');
  expect(may(workspace, 'stream:ingest')).toBe(true);
  expect(may(workspace, 'stream:ingest', 'streams/market.trades')).toBe(true);
  expect(maySomewhere(workspace, 'stream:ingest')).toBe(true);
});

test('a grant on one resource holds there only', () => {
  const workspace = holding('stream:ingest@streams/market.trades');
  expect(may(workspace, 'stream:ingest')).toBe(false);
  expect(may(workspace, 'stream:ingest', 'streams/market.trades')).toBe(true);
  expect(may(workspace, 'stream:ingest', 'streams/market.quotes')).toBe(false);
  expect(maySomewhere(workspace, 'stream:ingest')).toBe(true);
  expect(grantedOn(workspace, 'stream:ingest')).toEqual(['streams/market.trades']);
});

test('what is held nowhere is named', () => {
  const workspace = holding('metric:read');
  expect(maySomewhere(workspace, 'alert:respond')).toBe(false);
  expect(lack(workspace, 'alert:respond')).toBe('Your role guest lacks the permission alert:respond.');
});
