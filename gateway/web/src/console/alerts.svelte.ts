/** The alerts of a workspace: those that are firing, and the last that ended. */
import { workspacePath, type Alert, type AlertRule } from '../client';
import { tidewatch } from './app.svelte';

const RESOLVED_SHOWN = 20;
const SEVERITIES = ['critical', 'error', 'warning', 'info'];

export class Alerts {
  list = $state.raw<Alert[]>([]);
  rules = $state.raw<AlertRule[]>([]);
  loaded = $state(false);
  problem = $state.raw<unknown>(null);

  #known = new Map<string, Alert>();

  constructor(readonly workspace: string) {}

  /** Follows the alerts until the returned function is called. */
  open(): () => void {
    return tidewatch.subscribe(this.workspace, 'alerts', {
      onEvent: (event) => {
        const value = event['value'] as Alert & { alert?: Alert };
        this.#take([value.alert ?? value]);
      },
      // Listening first, then reading the list: the other order loses what happens in between.
      onState: (state) => {
        if (state.phase === 'live' && !(state.recovered && this.loaded)) void this.load();
      },
    });
  }

  async acknowledge(alert: Alert): Promise<void> {
    try {
      await tidewatch.post(workspacePath(this.workspace, 'alerts', alert.id, 'ack'));
      this.problem = null;
      if (!alert.acked_at) this.#take([{ ...this.#known.get(alert.id)!, acked_at: new Date().toISOString() }]);
    } catch (error) {
      this.problem = error;
    }
  }

  /** Reads the lists: rules have no channel. */
  async load(): Promise<void> {
    try {
      const [{ alerts }, { rules }] = await Promise.all([
        tidewatch.get<{ alerts: Alert[] }>(workspacePath(this.workspace, 'alerts')),
        tidewatch.get<{ rules: AlertRule[] }>(workspacePath(this.workspace, 'alert-rules')),
      ]);
      this.#take(alerts);
      this.rules = rules;
      this.problem = null;
      this.loaded = true;
    } catch (error) {
      if (!this.loaded) this.problem = error;
    }
  }

  #take(alerts: Alert[]): void {
    for (const alert of alerts) {
      const known = this.#known.get(alert.id);
      // The list may have been read before an event that came first: what has ended does not begin again.
      if (known?.resolved_at && !alert.resolved_at) continue;
      const acked_at = alert.acked_at ?? known?.acked_at ?? null;
      const silenced = alert.silenced ?? known?.silenced ?? false; // events do not tell
      this.#known.set(alert.id, { ...alert, acked_at, silenced });
    }
    const ordered = [...this.#known.values()].sort(byUrgency);
    const resolved = ordered.filter((alert) => alert.resolved_at).slice(0, RESOLVED_SHOWN);
    this.list = [...ordered.filter((alert) => !alert.resolved_at), ...resolved];
    this.#known = new Map(this.list.map((alert) => [alert.id, alert]));
  }
}

/** Open before resolved, then by severity, then the newest first. */
function byUrgency(a: Alert, b: Alert): number {
  const open = Number(Boolean(a.resolved_at)) - Number(Boolean(b.resolved_at));
  if (open) return open;
  const newest = (b.resolved_at ?? b.started_at).localeCompare(a.resolved_at ?? a.started_at);
  return a.resolved_at ? newest : rank(a) - rank(b) || newest;
}

function rank({ severity }: Alert): number {
  const place = SEVERITIES.indexOf(severity);
  return place < 0 ? SEVERITIES.length : place;
}
