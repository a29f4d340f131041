import { expect, test } from 'vitest';
import { Conversation } from './conversation';
import { frames } from './sse';
import type { AguiEvent } from './types';

function check(...events: AguiEvent[]) {
  const conversation = new Conversation();
  for (const event of events) conversation.receive(event);
  return conversation.messages;
}

test('text grows by its deltas', () => {
  const messages = check(
    { type: 'TEXT_MESSAGE_START', messageId: 'm', role: 'assistant' },
    { type: 'TEXT_MESSAGE_CONTENT', messageId: 'm', delta: 'Hel' },
    { type: 'TEXT_MESSAGE_CONTENT', messageId: 'm', delta: 'lo' },
    { type: 'TEXT_MESSAGE_END', messageId: 'm' },
  );
  expect(messages).toEqual([{ id: 'm', role: 'assistant', content: 'Hello' }]);
});

test('a tool call belongs to its parent message, and its result stands behind it', () => {
  const messages = check(
    { type: 'TOOL_CALL_START', toolCallId: 'c', toolCallName: 'query', parentMessageId: 'm' },
    { type: 'TOOL_CALL_ARGS', toolCallId: 'c', delta: '{"a":' },
    { type: 'TEXT_MESSAGE_START', messageId: 'n' },
    { type: 'TOOL_CALL_ARGS', toolCallId: 'c', delta: '1}' },
    { type: 'TOOL_CALL_RESULT', messageId: 't', toolCallId: 'c', content: [{ type: 'text', text: 'one' }] },
  );
  const call = { id: 'c', type: 'function', function: { name: 'query', arguments: '{"a":1}' } };
  expect(messages).toEqual([
    { id: 'm', role: 'assistant', toolCalls: [call] },
    { id: 't', role: 'tool', toolCallId: 'c', content: 'one' },
    { id: 'n', role: 'assistant' },
  ]);
});

test('chunks without an id go on with the last one', () => {
  const messages = check(
    { type: 'TEXT_MESSAGE_CHUNK', messageId: 'm', delta: 'a' },
    { type: 'TEXT_MESSAGE_CHUNK', delta: 'b' },
    { type: 'TOOL_CALL_CHUNK', toolCallId: 'c', toolCallName: 'query', parentMessageId: 'm', delta: '{' },
    { type: 'TOOL_CALL_CHUNK', delta: '}' },
  );
  expect(messages).toMatchObject([{ id: 'm', content: 'ab', toolCalls: [{ function: { arguments: '{}' } }] }]);
});

test('a snapshot replaces what was there, without what no reader is shown', () => {
  const messages = check(
    { type: 'TEXT_MESSAGE_CHUNK', messageId: 'old', delta: 'a' },
    {
      type: 'MESSAGES_SNAPSHOT',
      messages: [
        { id: 's', role: 'system', content: 'be brief' },
        { id: 'u', role: 'user', content: [{ type: 'text', text: 'hi' }] },
      ],
    },
  );
  expect(messages).toEqual([{ id: 'u', role: 'user', content: 'hi' }]);
});

test('frames survive any cut of the bytes, also within a character', async () => {
  const bytes = new TextEncoder().encode(': hello\n\nid: e.1\ndata: {"t":"–"}\n\ndata: a\ndata: b\n\ndata: cut');
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
      controller.close();
    },
  });
  const seen = [];
  for await (const frame of frames(body)) seen.push(frame);
  expect(seen).toEqual([
    { id: 'e.1', data: '{"t":"–"}' },
    { id: 'e.1', data: 'a\nb' },
  ]);
});
