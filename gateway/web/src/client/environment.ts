/** The world outside the client. Time, randomness and sockets come in from here, so a test owns all of them. */
export interface Environment {
  /** Milliseconds since the Unix epoch. */
  now(): number;
  /** Uniform in [0, 1). */
  random(): number;
  fetch(input: string, init?: RequestInit): Promise<Response>;
  /** Opens a WebSocket. */
  socket(url: string): WebSocket;
  /** Where a session survives a reload of the page. `null` keeps it in memory only. */
  storage: Pick<Storage, 'getItem' | 'setItem' | 'removeItem'> | null;
  /** False when the device knows that it has no network. */
  online(): boolean;
  /** Calls back when trying to connect at once makes sense: the network came back, the page was shown again. */
  onWake(wake: () => void): () => void;
}

/** The browser's own clock, network and session storage. */
export function browser(): Environment {
  return {
    now: () => Date.now(),
    random: () => Math.random(),
    fetch: (input, init) => fetch(input, init),
    socket: (url) => new WebSocket(url),
    storage: sessionStorage,
    online: () => navigator.onLine,
    onWake(wake) {
      const shown = () => document.visibilityState === 'visible' && wake();
      addEventListener('online', wake);
      addEventListener('offline', wake);
      document.addEventListener('visibilitychange', shown);
      return () => {
        removeEventListener('online', wake);
        removeEventListener('offline', wake);
        document.removeEventListener('visibilitychange', shown);
      };
    },
  };
}

/** A random id, also where `crypto.randomUUID` is missing: a page served over plain HTTP in a local network. */
export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}
