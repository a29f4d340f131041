/** Wire shapes of the public contract, v1: what the HTTP API and the channels carry. */
import type { Operation } from 'fast-json-patch';

export interface Workspace {
  id: string;
  name: string;
  role: string;
  tier: string;
  pack?: string | null;
  /** Of the list in `Me`: what one may do there; with `@` and a resource behind it, on that one only. */
  permissions?: string[];
  /** Of the list in `Me`: not a member yet; the first request to the workspace accepts. */
  invited?: boolean;
}

/** What a workspace of one domain can start with. */
export interface Pack {
  name: string;
  title: string;
  description: string;
  streams: string[];
  metrics: string[];
  alert_rules: string[];
  /** Metrics in the order in which they are shown. */
  dashboard: string[];
}

/** How much of its tier a workspace uses; `null` where the tier sets no limit. */
export interface Usage {
  tier: string;
  requests: Quota | null;
  agent_runs: Quota | null;
  events: { accepted: number; limit_per_second: number | null; limit_at_once: number | null };
  metrics: { used: number; limit: number | null };
  streams: { used: number; limit: number | null };
  connections: { used: number; limit: number | null };
  /** Days of event time for which final rows are kept. */
  retention: { limit_days: number | null };
}

export interface Quota {
  limit: number;
  remaining: number;
  reset_seconds: number;
}

export interface Me {
  user: { id: string; email: string; admin: boolean };
  workspaces: Workspace[];
}

/** A column of a metric's rows: its name and its stream type (`utf8`, `float64`, …). */
export interface ValueColumn {
  name: string;
  type: string;
}

/** A metric's window; durations are written `250ms`, `10s`, `1m`, `2h`, `1d`. */
export interface WindowSpec {
  kind: 'tumble' | 'hop' | 'session' | 'cumulate';
  size?: string;
  slide?: string;
  step?: string;
  gap?: string;
}

export interface Metric {
  name: string;
  sql: string;
  stream: string;
  keys: string[];
  values: ValueColumn[];
  window: WindowSpec;
  emit?: string;
  max_delay?: string;
  allowed_lateness?: string;
  /** Why it stopped, where it did. */
  failure?: string;
}

/** What a column may hold. Decimals may come as strings so that no digit is lost. */
export type Cell = string | number | boolean | null;

/** One row of a metric: window bounds (RFC 3339, UTC), keys, values, and whether it can still change. */
export interface Row {
  window_start: string;
  window_end: string;
  final: boolean;
  revision: number;
  [column: string]: Cell;
}

/** State of a `metrics/{metric}` channel. The row key is the key values joined with `|`; without keys it is `""`. */
export interface MetricState {
  rows: Record<string, Row>;
}

export interface Position {
  symbol: string;
  qty: number;
  cost_price: number;
  price: number | null;
  value: number | null;
  cost: number;
  unrealised: number | null;
  unrealised_pct: number | null;
  weight: number | null;
  sector: string | null;
}

/** State of a `portfolio/{id}` channel. */
export interface PortfolioSummary {
  id: string;
  name: string;
  currency: string;
  value: number;
  cost: number;
  unrealised: number;
  unrealised_pct: number | null;
  as_of: string | null;
  /** Only for those with `portfolio:read`, as are the allocation by symbol and `unpriced`. */
  positions?: Position[];
  allocation: { symbol?: Record<string, number>; sector: Record<string, number> };
  /** Symbols that have no price yet and so count for nothing in `value`. */
  unpriced?: string[];
  /** How many those are. */
  unpriced_count: number;
}

export interface Alert {
  id: string;
  rule: string;
  metric: string;
  severity: string;
  labels: Record<string, string>;
  state: string;
  row: Record<string, Cell>;
  started_at: string;
  fired_at: string | null;
  resolved_at: string | null;
  acked_at: string | null;
  acked_by: string | null;
  /** Of the list only: a silence keeps it from being told. */
  silenced?: boolean;
}

export interface AlertRule {
  name: string;
  metric: string;
  condition: string;
  for: string;
  severity: string;
}

/** The answer to an ingest: what is durable now, and what was refused and why. */
export interface IngestAnswer {
  accepted: number;
  duplicates: number;
  rejected: number;
  errors: { index: number; code: string; detail: string }[];
  offset: number | null;
}

/** An AG-UI event. Only the fields that this client reads are named. */
export interface AguiEvent {
  type: string;
  [field: string]: unknown;
}

/** A message of an AG-UI conversation, as sent in `RunAgentInput.messages` and in `MESSAGES_SNAPSHOT`. */
export type Message =
  | { id: string; role: 'user'; content: string }
  | { id: string; role: 'assistant'; content?: string; toolCalls?: ToolCall[] }
  | { id: string; role: 'tool'; toolCallId: string; content: string };

export interface ToolCall {
  id: string;
  type: 'function';
  function: { name: string; arguments: string };
}

/** Position in a channel. Offsets are compared only within one epoch. */
export interface Cursor {
  epoch: string | number;
  offset: number;
}

/** An RFC 6902 patch. */
export type Patch = Operation[];
