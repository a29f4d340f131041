/** The rows of one key over time, one for each window, as a chart shows them. Knows no server and no clock. */
import type { Row, WindowSpec } from '../client';
import { duration, numeric } from './format';

/** Windows kept per key. */
export const POINTS_MAX = 240;
/** How many times further back each next look for sessions reaches, and how many looks there are. */
const WIDEN = 16;
const LOOKS_MAX = 4;

export interface Point {
  /** End of the window, seconds since the Unix epoch. */
  x: number;
  y: number;
  final: boolean;
}

export class History {
  #rows = new Map<string, Row>();

  constructor(private readonly window: WindowSpec) {}

  /** Takes in a row, live or past, in any order. Returns whether it begins a window. */
  record(row: Row): boolean {
    const id = this.windowId(row);
    const known = this.#rows.get(id);
    // The past may be told after a newer live row: a final row is never taken back, a revision never undone.
    if (known && (known.final !== row.final ? known.final : known.revision > row.revision)) return false;
    this.#rows.set(id, row);
    if (this.#rows.size > POINTS_MAX) this.#rows.delete([...this.#rows.keys()].sort()[0]!);
    return !known;
  }

  /** The provisional rows of windows before `id`. */
  openBefore(id: string): Row[] {
    return [...this.#rows.values()].filter((row) => !row.final && this.windowId(row) < id);
  }

  /** The points of one value column, oldest first. */
  points(column: string): Point[] {
    const points: Point[] = [];
    for (const row of this.#rows.values()) {
      const y = numeric(row[column]);
      if (y !== null) points.push({ x: Date.parse(row.window_end) / 1000, y, final: row.final });
    }
    return points.sort((a, b) => a.x - b.x);
  }

  /** A session is known by its start, since its end moves; of every other window only the end is its own. */
  windowId(row: Row): string {
    return this.window.kind === 'session' ? row.window_start : row.window_end;
  }
}

/**
 * From where to ask for the rows of a full chart that ends with `row`: the earliest start of a window to ask for, or
 * `null` for all. Counted from the newest row, since a replay of old data has its own now. Windows that overlap start up
 * to their size before the one that ends first on the chart. Nobody knows when sessions began, so those are looked for
 * further and further back until there are enough of them.
 */
export function lookBack({ kind, size, slide, step, gap }: WindowSpec, row: Row): (string | null)[] {
  const before = (instant: string, span: number) => new Date(Date.parse(instant) - span).toISOString();
  const quiet = duration(gap);
  if (kind === 'session' && quiet) {
    const spans = Array.from({ length: LOOKS_MAX }, (_, i) => quiet * POINTS_MAX * WIDEN ** i);
    return spans.map((span) => before(row.window_start, span));
  }
  const width = duration(size);
  const apart = duration(slide ?? step ?? size);
  return [width && apart ? before(row.window_end, apart * POINTS_MAX + width) : null];
}
