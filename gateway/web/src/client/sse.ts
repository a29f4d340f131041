/** Server-sent events over `fetch`, since `EventSource` can neither POST nor carry a bearer token. */

/** One frame of an event stream. `id` is the stream's cursor so far, to be sent as `Last-Event-ID`. */
export interface SseFrame {
  id: string;
  data: string;
}

/** Yields the frames of a `text/event-stream` body as they come. Comments and frames without data are left out. */
export async function* frames(body: ReadableStream<Uint8Array>): AsyncGenerator<SseFrame> {
  const reader = body.pipeThrough(new TextDecoderStream() as TransformStream<Uint8Array, string>).getReader();
  let rest = '';
  let id = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll('\r\n', '\n').split('\n\n');
      rest = blocks.pop()!;
      for (const block of blocks) {
        const data: string[] = [];
        for (const line of block.split('\n')) {
          if (line.startsWith('id:')) id = line.slice(3).trimStart();
          else if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
        }
        if (data.length > 0) yield { id, data: data.join('\n') };
      }
    }
  } finally {
    await reader.cancel().catch(() => null);
  }
}
