/** Where the page is. The address is `#/{workspace}/{metric}`, so a reload or a shared link opens the same page. */
export interface Route {
  /** Empty: the first there is. The same goes for the metric. */
  workspace: string;
  metric: string;
}

/** Reads `location.hash`. What is no address of ours names something that does not exist. */
export function readRoute(hash: string): Route {
  if (hash.startsWith('#sign_in=')) return { workspace: '', metric: '' }; // the way back from an issuer
  const [workspace = '', ...rest] = hash.replace(/^#\/?/, '').split('/').map(decoded);
  return { workspace, metric: rest.join('/') };
}

/** The `location.hash` that opens this page. */
export function routeHash(workspace: string, metric = ''): string {
  return `#/${[workspace, metric].filter(Boolean).map(encodeURIComponent).join('/')}`;
}

function decoded(segment: string): string {
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment; // a `%` that escapes nothing
  }
}
