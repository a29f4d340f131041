/** One open metric: its current rows, and the history of the keys that the chart shows. */
import {
  changedUnder,
  workspacePath,
  type Metric,
  type MetricState,
  type Row,
  type SubscriptionState,
} from '../client';
import { tidewatch } from './app.svelte';
import { duration, numeric } from './format';

/** A chart holds this many keys: as many lines as a reader can tell apart. */
export const KEYS_MAX = 8;
const KEYS_AT_FIRST = 4;
/** Windows kept per key. */
const POINTS_MAX = 240;
const HISTORY_LIMIT = 500;
/** A window that closed without its final row being seen is looked up after this long. */
const MEND_AFTER = 5_000;

export interface Entry {
  key: string;
  row: Row;
}

export interface Point {
  /** End of the window, seconds since the Unix epoch. */
  x: number;
  y: number;
  final: boolean;
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
  #history = new Map<string, Map<string, Row>>();
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
    const rows = this.#history.get(key)?.values() ?? [];
    const points: Point[] = [];
    for (const row of rows) {
      const y = numeric(row[column]);
      if (y !== null) points.push({ x: Date.parse(row.window_end) / 1000, y, final: row.final });
    }
    return points.sort((a, b) => a.x - b.x);
  }

  #onSnapshot(state: MetricState): void {
    this.#state = state;
    for (const key of [...this.#entries.keys(), ...Object.keys(state.rows)]) this.#changed.add(key);
    this.loaded = true;
    this.#draw();
    // What came and went while we were away is in the history only.
    for (const { key } of this.chosen) void this.#load(key);
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
      if (row && this.#history.has(key)) this.#record(key, { ...row });
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
    this.#history.set(key, new Map());
    if (row) this.#record(key, row);
    void this.#load(key);
  }

  /** A session is known by its start, since its end moves; of every other window only the end is its own. */
  #windowId(row: Row): string {
    return this.metric.window.kind === 'session' ? row.window_start : row.window_end;
  }

  #record(key: string, row: Row): void {
    const rows = this.#history.get(key);
    if (!rows) return;
    const id = this.#windowId(row);
    const known = rows.get(id);
    // History may answer after a newer live row: a final row is never taken back, a revision never undone.
    if (known && (known.final !== row.final ? known.final : known.revision > row.revision)) return;
    rows.set(id, row);
    if (!known && !this.#mending && [...rows.values()].some((other) => !other.final && this.#windowId(other) < id)) {
      this.#mending = setTimeout(() => this.#mend(), MEND_AFTER);
    }
    if (rows.size > POINTS_MAX) rows.delete([...rows.keys()].sort()[0]!);
  }

  /** The channel keeps the newest row of a key, so the final row of a closed window may have been folded away. */
  #mend(): void {
    this.#mending = undefined;
    for (const { key } of this.chosen) {
      const open = [...(this.#history.get(key)?.values() ?? [])]
        .filter((row) => !row.final)
        .map((row) => row.window_start);
      if (open.length > 1) void this.#load(key, open.sort()[0]);
    }
  }

  async #load(key: string, since?: string): Promise<void> {
    const query = new URLSearchParams({ limit: String(HISTORY_LIMIT) });
    const row = this.#entries.get(key)?.row;
    if (!row) return; // gone with a new snapshot, and with it the values to ask by
    const nulls = this.metric.keys.filter((name) => row[name] === null);
    if (nulls.length > 0) query.set('is_null', nulls.join(','));
    // the prefix tells a column from a parameter of the same name
    for (const name of this.metric.keys) if (row[name] !== null) query.set(`key.${name}`, String(row[name]));
    const from = since ?? this.#from(row);
    if (from) query.set('from', from);
    const path = workspacePath(this.workspace, 'metrics', this.metric.name, 'rows');
    try {
      const { rows } = await tidewatch.get<{ rows: Row[] }>(`${path}?${query}`);
      if (this.#closed) return;
      for (const past of rows) this.#record(key, past);
      this.problem = null;
      this.version += 1;
    } catch (error) {
      if (!this.#closed) this.problem = error;
    }
  }

  /** Far enough back for a full chart. Counted from the newest row: a replay of old data has its own now. */
  #from(row: Row): string | null {
    const { slide, step, size } = this.metric.window;
    const width = duration(slide ?? step ?? size);
    return width ? new Date(Date.parse(row.window_end) - width * POINTS_MAX).toISOString() : null;
  }
}
