/** How long to wait before the next attempt: exponential, with full jitter, so that a crowd does not come back at once. */
const FIRST = 500;
const LONGEST = 30_000;

/**
 * Milliseconds to wait before attempt `attempt` (from 0), drawn by `random` from [0, min(30 s, 0.5 s · 2^attempt)).
 * Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
 */
export function backoff(attempt: number, random: () => number): number {
  return random() * Math.min(LONGEST, FIRST * 2 ** Math.min(attempt, 10));
}
