/** One open metric: its current rows, and the history of the keys that the chart shows. */
import {
  addedUnder,
  changedUnder,
  workspacePath,
  type Metric,
  type MetricState,
  type Row,
  type SubscriptionState,
} from '../client';
import { app, tidewatch } from './app.svelte';
import { duration } from './format';
import { History, lookBack, POINTS_MAX, type Point } from './history';

/** A chart holds this many keys: as many lines as a reader can tell apart. */
export const KEYS_MAX = 8;
const KEYS_AT_FIRST = 4;
/** Rows of a page of history, and pages read: a cumulated day in steps of a second has nine of them. */
const PAGE_ROWS = 10_000;
const PAGES_MAX = 20;
/** A window that was to close without its final row being seen is looked up after this long. */
const MEND_AFTER = 5_000;
/** How long a metric waits for late events, unless it says so. */
const MAX_DELAY = 5_000;

export interface Entry {
  key: string;
  row: Row;
}

/** A key on the chart and its place in the palette. */
export interface Chosen {
  key: string;
  slot: number;
}

export class MetricView {
  rows = $state.raw<Entry[]>([]);
  chosen = $state.raw<Chosen[]>([]);
  subscription = $state.raw<SubscriptionState>({ phase: 'subscribing' });
  /** True once the first snapshot is here. */
  loaded = $state(false);
  /** Why the metric stopped, where it did: its rows stand still. */
  failure = $state<string | null>(null);
  /** Why history is missing, where it is. */
  problem = $state.raw<unknown>(null);
  /** Moves when a point on the chart changed. */
  version = $state(0);

  #entries = new Map<string, Entry>();
  #history = new Map<string, History>();
  #changed = new Set<string>();
  #state: MetricState = { rows: {} };
  #frame = 0;
  #mending: ReturnType<typeof setTimeout> | undefined;
  #closed = false;
  #untouched = true;

  constructor(
    readonly workspace: string,
    readonly metric: Metric,
  ) {
    this.failure = metric.failure ?? null;
  }

  /** Follows the metric until the returned function is called. */
  open(): () => void {
    const stop = tidewatch.subscribe<MetricState>(this.workspace, `metrics/${this.metric.name}`, {
      onSnapshot: (state) => this.#onSnapshot(state),
      onDelta: (state, patch) => {
        const changed = changedUnder(patch, 'rows');
        if (!changed) return this.#onSnapshot(state);
        this.#state = state;
        for (const key of changed) this.#changed.add(key);
        // The final row of a window and the first of the next can come in one patch; the state holds the last only.
        for (const [key, row] of addedUnder<Row>(patch, 'rows')) if (row.final) this.#record(key, { ...row });
        this.#draw();
      },
      onEvent: (event) => {
        if (event['name'] === 'metric.failed') this.failure = (event['value'] as { reason: string }).reason;
      },
      onState: (state) => (this.subscription = state),
    });
    return () => {
      this.#closed = true;
      stop();
      cancelAnimationFrame(this.#frame);
      clearTimeout(this.#mending);
    };
  }

  /** Puts a key on the chart or takes it off. A full chart gives up its oldest key. */
  toggle(key: string): void {
    this.#untouched = false;
    if (this.chosen.some((chosen) => chosen.key === key)) {
      this.chosen = this.chosen.filter((chosen) => chosen.key !== key);
    } else {
      this.#choose(key);
    }
  }

  /** The points of a key for one value column, oldest first: one for each window. */
  points(key: string, column: string): Point[] {
    return this.#history.get(key)?.points(column) ?? [];
  }

  #onSnapshot(state: MetricState): void {
    this.#state = state;
    for (const key of [...this.#entries.keys(), ...Object.keys(state.rows)]) this.#changed.add(key);
    if (this.loaded && Object.keys(state.rows).length === 0) this.#onRemoved();
    this.loaded = true;
    this.#draw();
    // What came and went while we were away is in the history only.
    for (const { key } of this.chosen) void this.#load(key);
  }

  /** The metric was removed or defined anew, or has no rows still. */
  #onRemoved(): void {
    this.chosen = [];
    this.#untouched = true;
    this.#history.clear();
    app.refresh();
  }

  /** Gathers changes until the next frame, so that a burst of deltas is one repaint. */
  #draw(): void {
    if (this.#frame || this.#closed) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#apply();
    });
  }

  #apply(): void {
    for (const key of this.#changed) {
      const row = this.#state.rows[key];
      if (row) this.#entries.set(key, { key, row: { ...row } });
      else this.#entries.delete(key);
      if (row) this.#record(key, { ...row });
    }
    this.#changed.clear();
    this.rows = [...this.#entries.values()];
    this.version += 1;
    if (this.#untouched && this.chosen.length === 0) {
      const first = [...this.#entries.keys()].sort().slice(0, KEYS_AT_FIRST);
      for (const key of first) this.#choose(key);
    }
  }

  #choose(key: string): void {
    const kept = this.chosen.length >= KEYS_MAX ? this.chosen.slice(1) : this.chosen;
    const used = new Set(kept.map(({ slot }) => slot));
    const slot = Array.from({ length: KEYS_MAX }, (_, i) => i).find((i) => !used.has(i))!;
    this.chosen = [...kept, { key, slot }];
    const row = this.#entries.get(key)?.row;
    this.#history.set(key, new History(this.metric.window));
    if (row) this.#record(key, row);
    void this.#load(key);
  }

  #record(key: string, row: Row): void {
    const history = this.#history.get(key);
    if (!history?.record(row) || this.#mending) return;
    const id = history.windowId(row);
    if (history.openBefore(id).length === 0) return;
    const wait = (duration(this.metric.max_delay) ?? MAX_DELAY) + MEND_AFTER;
    this.#mending = setTimeout(() => this.#mend(id), wait);
  }

  /** The channel keeps the newest row of a key, so the final row of a closed window may have been folded away. */
  #mend(before: string): void {
    this.#mending = undefined;
    for (const { key } of this.chosen) {
      const open = this.#history.get(key)?.openBefore(before) ?? [];
      const starts = open.map((row) => row.window_start).sort();
      if (starts[0]) void this.#load(key, [starts[0]]);
    }
  }

  /** Adds the past of a key to its chart; `froms` are tried in turn until the chart is full. */
  async #load(key: string, froms?: (string | null)[]): Promise<void> {
    const row = this.#entries.get(key)?.row;
    if (!row) return; // gone with a new snapshot, and with it the values to ask by
    try {
      for (const from of froms ?? lookBack(this.metric.window, row)) {
        const rows = await this.#past(row, from);
        if (this.#closed) return;
        for (const past of rows) this.#record(key, past);
        this.problem = null;
        this.version += 1;
        if (rows.length >= POINTS_MAX) return;
      }
    } catch (error) {
      if (!this.#closed) this.problem = error;
    }
  }

  /** The newest rows of the key that `row` is of, among the windows that start at `from` or later. */
  async #past(row: Row, from: string | null): Promise<Row[]> {
    const query = new URLSearchParams({ limit: String(PAGE_ROWS) });
    const nulls = this.metric.keys.filter((name) => row[name] === null);
    if (nulls.length > 0) query.set('is_null', nulls.join(','));
    // the prefix tells a column from a parameter of the same name
    for (const name of this.metric.keys) if (row[name] !== null) query.set(`key.${name}`, String(row[name]));
    if (from) query.set('from', from);
    const path = workspacePath(this.workspace, 'metrics', this.metric.name, 'rows');
    let newest: Row[] = [];
    for (let page = 0; page < PAGES_MAX && !this.#closed; page += 1) {
      const { rows, next } = await tidewatch.get<{ rows: Row[]; next?: string }>(`${path}?${query}`);
      newest = [...newest, ...rows].slice(-POINTS_MAX);
      if (!next) break;
      query.set('after', next);
    }
    return newest;
  }
}
