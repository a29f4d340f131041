/** Who is signed in: the token pair, kept in memory and in session storage, renewed before it runs out. */
import type { Environment } from './environment';
import { Problem, SignedOut, Unreachable } from './problem';

interface Pair {
  access: string;
  refresh: string;
  /** Milliseconds since the Unix epoch, on this machine's clock. */
  expires: number;
}

interface TokenAnswer {
  access_token: string;
  refresh_token: string;
  expires_in: number;
}

const KEY = 'tidewatch.session';
/** A token is renewed this long before it expires, so that no request meets the edge. */
export const RENEW_BEFORE = 60_000;
/** How long a tab waits for a sibling's news of a spent token before it spends the token itself. */
const NEWS_WAIT = 50;

export class Session {
  #pair: Pair | null;
  #renewal: Promise<string> | null = null;
  #news: BroadcastChannel | null = null;
  #listeners = new Set<() => void>();

  constructor(
    private readonly base: string,
    private readonly env: Environment,
  ) {
    this.#pair = this.#load();
    // A duplicated tab copies session storage, and two tabs that spend one refresh token would revoke each other.
    // So a renewal is told to the siblings, and each waits for its turn.
    if (typeof BroadcastChannel !== 'undefined' && env.storage) {
      this.#news = new BroadcastChannel(KEY);
      this.#news.onmessage = ({ data }: MessageEvent<{ spent: string; pair: Pair }>) => {
        if (this.#pair?.refresh === data.spent) this.#keep(data.pair);
      };
    }
  }

  get signedIn(): boolean {
    return this.#pair !== null;
  }

  /** When the access token runs out, in milliseconds since the Unix epoch; `null` when signed out. */
  get expires(): number | null {
    return this.#pair?.expires ?? null;
  }

  /** Calls back when a new token came or the session ended. */
  onChange(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Signs in. Throws a `Problem` when the server refuses. */
  async login(email: string, password: string, otp?: string): Promise<void> {
    this.#keep(await this.#ask('login', { email, password, ...(otp ? { otp } : {}) }));
  }

  /** Signs in with the code that an OpenID Connect sign-in came back with. Throws a `Problem` when it is refused. */
  async loginByCode(code: string): Promise<void> {
    this.#keep(await this.#ask('oidc/token', { code }));
  }

  /** Ends the session here at once, and on the server as soon as it can be told. */
  async logout(): Promise<void> {
    const access = this.#pair?.access;
    const refresh = this.#pair?.refresh;
    this.drop();
    if (!access) return;
    const headers = { authorization: `Bearer ${access}`, 'content-type': 'application/json' };
    const body = JSON.stringify({ refresh_token: refresh });
    // The tokens are gone from here whether or not the server hears of it; they expire there by themselves.
    await this.env.fetch(`${this.base}/api/v1/auth/logout`, { method: 'POST', headers, body }).catch(() => null);
  }

  /** Forgets the session without telling the server. */
  drop(): void {
    this.#keep(null);
  }

  /** An access token that is good for at least half a minute more. Throws `SignedOut` or `Unreachable`. */
  async token(): Promise<string> {
    if (!this.#pair) throw new SignedOut();
    return this.#pair.expires - this.env.now() > RENEW_BEFORE / 2 ? this.#pair.access : this.renew(this.#pair.access);
  }

  /**
   * A new access token in place of `refused`; the current one when `refused` has been replaced already.
   * Any number of callers share one request, since a refresh token can be spent only once.
   */
  renew(refused: string): Promise<string> {
    if (this.#pair && this.#pair.access !== refused) return Promise.resolve(this.#pair.access);
    this.#renewal ??= this.#exclusively(() => this.#spend(refused)).finally(() => (this.#renewal = null));
    return this.#renewal;
  }

  /** The current access token, whatever its age. */
  get access(): string | null {
    return this.#pair?.access ?? null;
  }

  async #spend(refused: string): Promise<string> {
    if (!this.#pair) throw new SignedOut();
    if (this.#pair.access !== refused) return this.#pair.access; // a sibling tab was faster
    const spent = this.#pair.refresh;
    try {
      const pair = await this.#ask('refresh', { refresh_token: spent });
      if (!this.#pair) throw new SignedOut(); // signed out while the answer was on its way
      this.#keep(pair);
      this.#news?.postMessage({ spent, pair });
      return pair.access;
    } catch (error) {
      if (!(error instanceof Problem) || error.status >= 500 || error.status === 429) throw error;
      this.drop();
      throw new SignedOut();
    }
  }

  async #exclusively<T>(work: () => Promise<T>): Promise<T> {
    if (!this.#news || !globalThis.navigator?.locks) return work();
    return navigator.locks.request(KEY, async () => {
      await new Promise((resolve) => setTimeout(resolve, NEWS_WAIT));
      return work();
    }) as Promise<T>;
  }

  async #ask(what: 'login' | 'refresh' | 'oidc/token', body: object): Promise<Pair> {
    const init = { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) };
    const response = await this.env.fetch(`${this.base}/api/v1/auth/${what}`, init).catch((error: unknown) => {
      throw new Unreachable(error);
    });
    if (!response.ok) throw await Problem.from(response);
    const answer = (await response.json()) as TokenAnswer;
    const expires = this.env.now() + answer.expires_in * 1000;
    return { access: answer.access_token, refresh: answer.refresh_token, expires };
  }

  #keep(pair: Pair | null): void {
    this.#pair = pair;
    if (pair) this.env.storage?.setItem(KEY, JSON.stringify(pair));
    else this.env.storage?.removeItem(KEY);
    for (const listener of [...this.#listeners]) listener();
  }

  #load(): Pair | null {
    try {
      return JSON.parse(this.env.storage?.getItem(KEY) ?? 'null') as Pair | null;
    } catch {
      return null; // not ours, or half written: sign in again
    }
  }
}
