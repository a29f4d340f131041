/** What can go wrong in a call to the server, as typed exceptions. */

/** One of several errors in one answer, found by its index in the request or by a JSON pointer into it. */
export interface ProblemItem {
  index?: number;
  pointer?: string;
  code: string;
  detail: string;
}

/**
 * The server refused: an RFC 9457 `application/problem+json` answer.
 *
 * `code` is the stable word to branch on, `detail` the sentence to show, `requestId` what to quote in a bug report.
 */
export class Problem extends Error {
  override readonly name = 'Problem';

  constructor(
    readonly status: number,
    readonly code: string,
    readonly detail: string,
    readonly errors: ProblemItem[] = [],
    readonly requestId: string | null = null,
    /** Seconds to wait before trying again, where the server named them. */
    readonly retryAfter: number | null = null,
  ) {
    super(`${detail} (${code}, status ${status})`);
  }

  /** Reads a refused response. An answer that is no problem document (a proxy's page) keeps its status. */
  static async from(response: Response): Promise<Problem> {
    const requestId = response.headers.get('x-request-id');
    const wait = Number(response.headers.get('retry-after') ?? NaN);
    const retryAfter = Number.isFinite(wait) ? wait : null;
    const body: unknown = await response.json().catch(() => null);
    const document = (body ?? {}) as Partial<{ code: string; detail: string; title: string; errors: ProblemItem[] }>;
    const detail = document.detail ?? document.title ?? `the server answered ${response.status} ${response.statusText}`;
    const code = document.code ?? `http_${response.status}`;
    return new Problem(response.status, code, detail, document.errors ?? [], requestId, retryAfter);
  }
}

/** No answer came: the server is down, the network is gone, or the request was cut. Trying again may help. */
export class Unreachable extends Error {
  override readonly name = 'Unreachable';

  constructor(cause: unknown) {
    super('the server cannot be reached; check the connection and that tidewatch is running', { cause });
  }
}

/** There is no session, or the server no longer accepts it: sign in again. */
export class SignedOut extends Error {
  override readonly name = 'SignedOut';

  constructor() {
    super('you are signed out; sign in again');
  }
}
