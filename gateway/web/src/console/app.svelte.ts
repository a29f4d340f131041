/** What the whole page shares: the client, who is signed in, where we are, the theme and the time. */
import { Problem, Tidewatch, workspacePath, type ConnectionState, type Me, type Workspace } from '../client';
import { Fetched } from './fetched.svelte';
import { readRoute, routeHash } from './route';

export const tidewatch = new Tidewatch(location.origin);

/** While the page is seen, its lists are asked for again this often. */
const REFRESH_EVERY = 60_000;
/** What asks for a refresh often comes in twos: the page is shown, and focused. */
const REFRESH_AFTER = 100;

class App {
  signedIn = $state(tidewatch.signedIn);
  /** True when the server ended the session, not the user. */
  expired = $state(false);
  route = $state.raw(readRoute(location.hash));
  connection = $state.raw<ConnectionState>(tidewatch.connection);
  /** WebSocket event messages in the last second. */
  rate = $state(0);
  /** Milliseconds since the Unix epoch, moved once a second. */
  now = $state(Date.now());
  dark = $state(false);
  /** The form for an event is open, for this stream; empty: for any. */
  sending = $state<string | null>(null);
  /** The form for a new workspace is open. */
  creating = $state(false);
  /**
   * Moves when lists may have changed elsewhere without our being told: the page was shown or focused again, the
   * connection came back, some time went by. An effect that reads it asks again.
   */
  refreshed = $state(0);

  #me = new Fetched(() => tidewatch.get<Me>('/api/v1/me'));
  me: Me | null = $derived(this.#me.value);
  /** Why `me` is missing. */
  problem: unknown = $derived(this.#me.value ? null : this.#me.problem);
  joined: Workspace[] = $derived(this.me?.workspaces.filter(({ invited }) => !invited) ?? []);
  /** Nothing is asked of these: that would accept. */
  invitations: Workspace[] = $derived(this.me?.workspaces.filter(({ invited }) => invited) ?? []);
  /** The one of the address, or the first if it names none. */
  workspace: Workspace | null = $derived(
    (this.route.workspace ? this.joined.find(({ id }) => id === this.route.workspace) : this.joined[0]) ?? null,
  );

  #leaving = false;
  #wasLive = false;
  #refresh: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    const system = matchMedia('(prefers-color-scheme: dark)');
    this.#readTheme(system);
    system.addEventListener('change', () => this.#readTheme(system));
    addEventListener('hashchange', () => {
      this.creating = false;
      this.sending = null;
      this.route = readRoute(location.hash);
    });
    tidewatch.onConnection((state) => {
      this.connection = state;
      if (state.phase !== 'live') return;
      if (this.#wasLive) this.refresh();
      this.#wasLive = true;
    });
    const shown = () => document.visibilityState === 'visible' && this.refresh();
    document.addEventListener('visibilitychange', shown);
    addEventListener('focus', shown);
    setInterval(shown, REFRESH_EVERY);
    tidewatch.onSession(() => {
      this.expired = this.signedIn && !tidewatch.signedIn && !this.#leaving;
      this.signedIn = tidewatch.signedIn;
      if (!this.signedIn) this.#me.clear();
    });
    let received = tidewatch.received;
    let then = performance.now();
    setInterval(() => {
      const instant = performance.now();
      this.rate = Math.round(((tidewatch.received - received) * 1000) / (instant - then));
      received = tidewatch.received;
      then = instant;
      this.now = Date.now();
    }, 1000);
  }

  load(): Promise<void> {
    return this.#me.load();
  }

  /** Asks for the lists on the page again. */
  refresh(): void {
    clearTimeout(this.#refresh);
    this.#refresh = setTimeout(() => (this.refreshed += 1), REFRESH_AFTER);
  }

  open(workspace: string, metric = ''): void {
    this.creating = false;
    location.hash = routeHash(workspace, metric);
  }

  /** Writes into the address what was opened without being named, so that it stays when the lists change. */
  settle(workspace: string, metric: string): void {
    history.replaceState(null, '', routeHash(workspace, metric));
    this.route = { workspace, metric };
  }

  async join(workspace: string): Promise<void> {
    await tidewatch.get(workspacePath(workspace));
    await this.load();
    this.open(workspace);
  }

  async decline(workspace: string): Promise<void> {
    if (!this.me) return;
    await tidewatch.delete(workspacePath(workspace, 'members', this.me.user.id));
    await this.load();
  }

  toggleTheme(): void {
    this.dark = !this.dark;
    localStorage.setItem('tidewatch.theme', this.dark ? 'dark' : 'light');
    document.documentElement.dataset['theme'] = this.dark ? 'dark' : 'light';
  }

  async signOut(): Promise<void> {
    this.#leaving = true;
    const left = tidewatch.logout();
    this.settle('', ''); // whoever signs in next has workspaces of their own
    await left;
    this.#leaving = false;
  }

  #readTheme(system: MediaQueryList): void {
    const chosen = document.documentElement.dataset['theme'];
    this.dark = chosen ? chosen === 'dark' : system.matches;
  }
}

export const app = new App();

/** What to show of an error: the problem's own sentence where the server gave one. */
export function explain(error: unknown): string {
  if (error instanceof Problem) return error.detail;
  return error instanceof Error ? error.message : String(error);
}
