/** What the whole page shares: the client, who is signed in, where we are, the theme and the time. */
import { Problem, Tidewatch, workspacePath, type ConnectionState, type Me, type Workspace } from '../client';

export const tidewatch = new Tidewatch(location.origin);

/** The address is `#/{workspace}/{metric}`, so a reload or a shared link opens the same page. */
function readRoute(): { workspace: string; metric: string } {
  const [workspace = '', metric = ''] = location.hash.replace(/^#\/?/, '').split('/').map(decodeURIComponent);
  return { workspace, metric };
}

class App {
  signedIn = $state(tidewatch.signedIn);
  /** True when the server ended the session, not the user. */
  expired = $state(false);
  me = $state.raw<Me | null>(null);
  problem = $state.raw<unknown>(null);
  route = $state.raw(readRoute());
  connection = $state.raw<ConnectionState>(tidewatch.connection);
  /** WebSocket event messages in the last second. */
  rate = $state(0);
  /** Milliseconds since the Unix epoch, moved once a second. */
  now = $state(Date.now());
  dark = $state(false);
  sending = $state(false);
  /** The form for a new workspace is open. */
  creating = $state(false);

  joined: Workspace[] = $derived(this.me?.workspaces.filter(({ invited }) => !invited) ?? []);
  /** Nothing is asked of these: that would accept. */
  invitations: Workspace[] = $derived(this.me?.workspaces.filter(({ invited }) => invited) ?? []);
  workspace: Workspace | null = $derived(
    this.joined.find(({ id }) => id === this.route.workspace) ?? this.joined[0] ?? null,
  );

  #leaving = false;

  constructor() {
    const system = matchMedia('(prefers-color-scheme: dark)');
    this.#readTheme(system);
    system.addEventListener('change', () => this.#readTheme(system));
    addEventListener('hashchange', () => (this.route = readRoute()));
    tidewatch.onConnection((state) => (this.connection = state));
    tidewatch.onSession(() => {
      this.expired = this.signedIn && !tidewatch.signedIn && !this.#leaving;
      this.signedIn = tidewatch.signedIn;
      if (!this.signedIn) this.me = null;
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

  async load(): Promise<void> {
    this.problem = null;
    try {
      this.me = await tidewatch.get<Me>('/api/v1/me');
    } catch (error) {
      this.problem = error;
    }
  }

  open(workspace: string, metric = ''): void {
    this.creating = false;
    location.hash = `#/${[workspace, metric].filter(Boolean).map(encodeURIComponent).join('/')}`;
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
    await tidewatch.logout();
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
