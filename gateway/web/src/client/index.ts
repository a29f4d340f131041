/**
 * The Tidewatch client for browsers: sign in, call the HTTP API, follow live channels, run agents.
 *
 * ```ts
 * const tidewatch = new Tidewatch(location.origin);
 * await tidewatch.login('me@example.com', 'secret');
 * const stop = tidewatch.subscribe<MetricState>('demo', 'metrics/vwap_1m', {
 *   onSnapshot: ({ rows }) => console.table(rows),
 *   onDelta: ({ rows }, patch) => console.log(changedUnder(patch, 'rows'), rows),
 * });
 * ```
 *
 * Reading order: `types` (wire shapes), `problem` (errors), `session` (tokens), `channel` (what messages add up to),
 * `connection` (the WebSocket), `conversation` (what a chat's events add up to), `tidewatch` (all of it as one object).
 */
export { addedUnder, changedUnder } from './channel';
export type { ConnectionState, Handlers, SubscriptionState } from './connection';
export { Conversation } from './conversation';
export { Problem, SignedOut, Unreachable, type ProblemItem } from './problem';
export { newId } from './environment';
export { Tidewatch, workspacePath, type Run } from './tidewatch';
export type * from './types';
