/** How values read on the page: numbers by the reader's locale, times local with UTC at hand, durations short. */
import type { Cell, WindowSpec } from '../client';

const MISSING = '–';

/** A decimal may come as a string; whatever is no number gives `null`. */
export function numeric(cell: Cell | undefined): number | null {
  if (typeof cell === 'string' && cell.trim() === '') return null;
  const value = typeof cell === 'number' || typeof cell === 'string' ? Number(cell) : NaN;
  return Number.isFinite(value) ? value : null;
}

const formats = new Map<string, Intl.NumberFormat>();

function format(options: Intl.NumberFormatOptions): Intl.NumberFormat {
  const key = JSON.stringify(options);
  const known = formats.get(key) ?? new Intl.NumberFormat(undefined, options);
  formats.set(key, known);
  return known;
}

/** `1 key`, `2 keys`. */
export function count(n: number, noun: string): string {
  return `${format({}).format(n)} ${noun}${n === 1 ? '' : 's'}`;
}

/** As many decimals as a reader can use: fewer for large numbers, six significant digits for small ones. */
export function number(value: number | null): string {
  if (value === null) return MISSING;
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return format({}).format(value);
  if (size >= 1e15 || (size < 1e-6 && size > 0))
    return format({ notation: 'scientific', maximumFractionDigits: 3 }).format(value);
  if (size < 1) return format({ maximumSignificantDigits: 6 }).format(value);
  const digits = size >= 100 ? 2 : 4;
  return format({ minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** Any cell of a row: numbers formatted, the rest as it is. Only a numeric column reads its strings as numbers. */
export function cell(value: Cell | undefined, type: string): string {
  if (value === null || value === undefined) return MISSING;
  if (type === 'timestamp') return time(String(value));
  if (typeof value === 'boolean') return value ? 'yes' : 'no';
  return isNumeric(type) ? number(numeric(value)) : String(value);
}

/** Whether a column of this stream type holds numbers. */
export function isNumeric(type: string): boolean {
  return /^(u?int|float|decimal)/i.test(type);
}

/** An amount in a currency; a code that is none is written behind the number. */
export function money(value: number | null, currency: string): string {
  if (value === null) return MISSING;
  try {
    return format({ style: 'currency', currency, currencyDisplay: 'narrowSymbol' }).format(value);
  } catch {
    return `${number(value)} ${currency}`;
  }
}

/** A gain or loss, always with its sign. */
export function signedMoney(value: number | null, currency: string): string {
  return value !== null && value > 0 ? `+${money(value, currency)}` : money(value, currency);
}

/** `0.0123` → `+1.23%`. */
export function signedPercent(fraction: number | null): string {
  if (fraction === null || !Number.isFinite(fraction)) return MISSING;
  return format({
    style: 'percent',
    minimumFractionDigits: 2,
    maximumFractionDigits: 2,
    signDisplay: 'exceptZero',
  }).format(fraction);
}

/** `0.345` → `34.5%`. */
export function share(fraction: number): string {
  return format({ style: 'percent', minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(fraction);
}

const clock = new Intl.DateTimeFormat(undefined, {
  hour: '2-digit',
  minute: '2-digit',
  second: '2-digit',
  hour12: false,
});
const dated = new Intl.DateTimeFormat(undefined, {
  day: '2-digit',
  month: 'short',
  year: 'numeric',
  hour: '2-digit',
  minute: '2-digit',
  second: '2-digit',
  hour12: false,
});

/** An RFC 3339 instant in local time; the date only where it is not today's. */
export function time(instant: string | null, now: number = Date.now()): string {
  if (!instant) return MISSING;
  const at = new Date(instant);
  if (Number.isNaN(at.getTime())) return instant;
  return at.toDateString() === new Date(now).toDateString() ? clock.format(at) : dated.format(at);
}

/** The same instant in UTC with all its digits, for hovering over. */
export function utc(instant: string | null): string {
  if (!instant) return '';
  const whole = /^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d(?:\.\d+)?)Z$/.exec(instant);
  if (whole) return `${whole[1]} ${whole[2]} UTC`;
  const at = new Date(instant);
  return Number.isNaN(at.getTime()) ? instant : at.toISOString().replace('T', ' ').replace('Z', ' UTC');
}

const UNITS: [string, number][] = [
  ['d', 86_400_000],
  ['h', 3_600_000],
  ['min', 60_000],
  ['s', 1_000],
];

/** How long ago, in the one largest unit: `12 s`, `3 min`, `2 h`, `5 d`. Never negative. */
export function elapsed(since: string, now: number): string {
  const ms = Math.max(0, now - Date.parse(since));
  const [unit, size] = UNITS.find(([, size]) => ms >= size) ?? ['s', 1_000];
  return `${Math.floor(ms / size)} ${unit}`;
}

const MILLIS: Record<string, number> = {
  us: 0.001,
  ms: 1,
  s: 1_000,
  m: 60_000,
  h: 3_600_000,
  d: 86_400_000,
  w: 604_800_000,
};

/** Milliseconds of a duration such as `250ms`, `1m`, `1h30m`; `null` when it is none. */
export function duration(text: string | undefined): number | null {
  if (!text || !/^(\d+(\.\d+)?(us|ms|[smhdw]))+$/.test(text)) return null;
  return [...text.matchAll(/(\d+(?:\.\d+)?)(us|ms|[smhdw])/g)].reduce(
    (sum, [, n, unit]) => sum + Number(n) * MILLIS[unit!]!,
    0,
  );
}

/** A window in a few words: `1m windows`, `5m windows every 10s`. */
export function windowText({ kind, size, slide, step, gap }: WindowSpec): string {
  if (kind === 'hop') return `${size} windows every ${slide}`;
  if (kind === 'session') return `sessions closed by ${gap} of quiet`;
  if (kind === 'cumulate') return `up to ${size} in steps of ${step}`;
  return `${size} windows`;
}
