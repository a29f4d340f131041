/**
 * The state of one subscribed channel: which messages are new, which are repeats, where one is missing,
 * and what the STATE_SNAPSHOT and STATE_DELTA events add up to. Knows no socket and no clock.
 */
import jsonpatch from 'fast-json-patch';
import type { AguiEvent, Cursor, Patch } from './types';

/** What a message meant for the channel. */
export type Effect =
  | { kind: 'snapshot'; state: unknown }
  | { kind: 'delta'; state: unknown; patch: Patch }
  | { kind: 'event'; event: AguiEvent }
  /** Seen before: nothing to do. */
  | { kind: 'repeat' }
  /** Something is missing: subscribe again, from `Channel.since`. */
  | { kind: 'gap'; detail: string };

/**
 * Channels whose offsets jump without anything being lost: the messages of states are folded for a slow reader, and
 * those of streams are places in a log that other streams share.
 */
const SPARSE = /^(metrics|portfolio|query|system|presence|streams)\//;

export class Channel {
  #state: unknown = undefined;
  #epoch: Cursor['epoch'] | null = null;
  /** Offset of the newest message taken in; `null` before the first of this epoch. */
  #seen: number | null = null;
  /** Offset that the server named when we subscribed: where to resume if nothing has come since. */
  #base: number | null = null;
  /** True while the next message follows the resume point by the server's own word. */
  #bridged = false;
  /** False where the server was seen to leave out offsets on purpose. */
  #dense: boolean;
  /** True once a snapshot has come for the subscription asked for last. */
  #fresh = false;

  constructor(name: string) {
    this.#dense = !SPARSE.test(name);
  }

  /** Where to resume; absent when a fresh start is needed. */
  get since(): Cursor | undefined {
    const offset = this.#seen ?? this.#base;
    return this.#epoch === null || offset === null ? undefined : { epoch: this.#epoch, offset };
  }

  /** What the messages so far add up to; `undefined` before the first snapshot. */
  get state(): unknown {
    return this.#state;
  }

  /** A `subscribe` with `since` goes out now. */
  subscribing(): void {
    this.#fresh = false;
  }

  /** The server's answer to `subscribe`. Unless it recovered our position, what we held is void. */
  subscribed(answer: { epoch?: Cursor['epoch']; offset?: number; recovered?: boolean }): void {
    this.#bridged = answer.recovered === true;
    if (this.#bridged || this.#fresh) return;
    this.#state = undefined;
    this.#seen = null;
    this.#epoch = answer.epoch ?? null;
    this.#base = answer.offset ?? null;
  }

  /** Takes in one pushed message. */
  receive(message: Cursor & { event: AguiEvent }): Effect {
    const { epoch, offset, event } = message;
    const snapshot = event.type === 'STATE_SNAPSHOT';
    const missing = snapshot ? null : this.#missing(epoch, offset);
    if (missing) return this.#lost(missing);
    if (epoch === this.#epoch && this.#seen !== null) {
      // A snapshot is the state at its offset, deltas up to there included: the same offset is no repeat.
      if (snapshot ? offset < this.#seen : offset <= this.#seen) return { kind: 'repeat' };
    }
    this.#epoch = epoch;
    this.#seen = offset;
    this.#bridged = false;
    if (snapshot) {
      this.#fresh = true;
      this.#state = event['snapshot'];
      return { kind: 'snapshot', state: this.#state };
    }
    return event.type === 'STATE_DELTA' ? this.#apply(event['delta'] as Patch) : { kind: 'event', event };
  }

  #missing(epoch: Cursor['epoch'], offset: number): string | null {
    const seen = this.#seen;
    if (seen === null) return null;
    if (epoch !== this.#epoch) {
      return this.#dense ? null : `epoch ${epoch} began without a snapshot; epoch ${this.#epoch} was at ${seen}`;
    }
    if (!this.#dense || offset <= seen + 1) return null;
    if (!this.#bridged) return `offset ${offset} came after ${seen}`;
    // The server just resumed us here and said that nothing is missing: it numbers with holes, so a hole tells nothing.
    this.#dense = false;
    return null;
  }

  #apply(patch: Patch): Effect {
    if (this.#state === undefined) return this.#lost('a delta came before any snapshot');
    try {
      this.#state = jsonpatch.applyPatch(this.#state, patch, true).newDocument;
    } catch (error) {
      this.#restart(); // the patch may have been applied in part: only a new snapshot mends that
      return { kind: 'gap', detail: `a delta does not fit the state: ${(error as Error).message.split('\n')[0]}` };
    }
    return { kind: 'delta', state: this.#state, patch };
  }

  #lost(detail: string): Effect {
    if (!this.#dense) this.#restart();
    return { kind: 'gap', detail };
  }

  #restart(): void {
    this.#state = undefined;
    this.#epoch = this.#seen = this.#base = null;
  }
}

/** The members of `root` that a patch touches: `changedUnder(patch, 'rows')` names the row keys. `null`: any of them. */
export function changedUnder(patch: Patch, root: string): Set<string> | null {
  const keys = new Set<string>();
  for (const { path } of patch) {
    const [, first, second] = path.split('/');
    if (first === undefined || (first === root && second === undefined)) return null;
    if (first === root) keys.add(jsonpatch.unescapePathComponent(second!));
  }
  return keys;
}

/** The members that a patch sets under `root`, with their keys, in its order; also those that it sets again further on. */
export function addedUnder<T>(patch: Patch, root: string): [string, T][] {
  return patch.flatMap((operation): [string, T][] => {
    const [, first, key, ...deeper] = operation.path.split('/');
    const sets = operation.op === 'add' || operation.op === 'replace';
    if (!sets || first !== root || key === undefined || deeper.length > 0) return [];
    return [[jsonpatch.unescapePathComponent(key), operation.value as T]];
  });
}
