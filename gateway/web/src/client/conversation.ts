/** What the AG-UI events of a thread's runs add up to: the messages, as every AG-UI client holds them. */
import type { AguiEvent, Message, ToolCall } from './types';

type Assistant = Extract<Message, { role: 'assistant' }>;

export class Conversation {
  /** In order of appearance; a tool's answer stands behind the message that called it. */
  messages: Message[] = [];
  /** Where chunk events without an id belong. */
  #chunk: { message: string; call: string } = { message: '', call: '' };

  /** Takes in one event. Events that say nothing about messages are ignored. */
  receive(event: AguiEvent): void {
    const text = (field: string) => (typeof event[field] === 'string' ? (event[field] as string) : '');
    switch (event.type) {
      case 'TEXT_MESSAGE_START':
        if (text('role') !== 'user') this.#assistant(text('messageId'));
        break;
      case 'TEXT_MESSAGE_CONTENT':
        this.#write(text('messageId'), text('delta'));
        break;
      case 'TEXT_MESSAGE_CHUNK':
        this.#chunk.message = text('messageId') || this.#chunk.message;
        this.#write(this.#chunk.message, text('delta'));
        break;
      case 'TOOL_CALL_START':
        this.#call(text('toolCallId'), text('toolCallName'), text('parentMessageId'));
        break;
      case 'TOOL_CALL_ARGS':
        this.#args(text('toolCallId'), text('delta'));
        break;
      case 'TOOL_CALL_CHUNK':
        this.#chunk.call = text('toolCallId') || this.#chunk.call;
        if (text('toolCallName')) this.#call(this.#chunk.call, text('toolCallName'), text('parentMessageId'));
        this.#args(this.#chunk.call, text('delta'));
        break;
      case 'TOOL_CALL_RESULT':
        this.#result(text('messageId'), text('toolCallId'), plain(event['content']));
        break;
      case 'MESSAGES_SNAPSHOT':
        this.messages = (event['messages'] as Message[]).filter(({ role }) => SHOWN.has(role)).map(withPlainText);
        break;
    }
  }

  #assistant(id: string): Assistant {
    const known = this.messages.find((message) => message.id === id && message.role === 'assistant');
    if (known) return known as Assistant;
    this.messages.push({ id, role: 'assistant' });
    return this.messages.at(-1) as Assistant;
  }

  #write(id: string, delta: string): void {
    if (this.messages.some((message) => message.id === id && message.role === 'user')) return; // our own, echoed
    const message = this.#assistant(id);
    message.content = (message.content ?? '') + delta;
  }

  #find(callId: string): ToolCall | undefined {
    return this.messages
      .flatMap((message) => (message.role === 'assistant' ? (message.toolCalls ?? []) : []))
      .find(({ id }) => id === callId);
  }

  #call(id: string, name: string, parent: string): void {
    if (this.#find(id)) return;
    const message = this.#assistant(parent || id);
    message.toolCalls = [...(message.toolCalls ?? []), { id, type: 'function', function: { name, arguments: '' } }];
  }

  #args(id: string, delta: string): void {
    const call = this.#find(id);
    if (call) call.function.arguments += delta;
  }

  #result(id: string, toolCallId: string, content: string): void {
    if (this.messages.some((message) => message.id === id)) return;
    const owner = this.messages.findIndex(
      (m) => m.role === 'assistant' && m.toolCalls?.some((c) => c.id === toolCallId),
    );
    let at = owner < 0 ? this.messages.length : owner + 1;
    while (this.messages[at]?.role === 'tool') at += 1;
    this.messages.splice(at, 0, { id, role: 'tool', toolCallId, content });
  }
}

const SHOWN = new Set(['user', 'assistant', 'tool']);

function withPlainText(message: Message): Message {
  return message.content === undefined ? message : { ...message, content: plain(message.content) };
}

/** Content is a string, or parts of which only the text can be shown here. */
function plain(content: unknown): string {
  if (typeof content === 'string') return content;
  if (!Array.isArray(content)) return '';
  return content
    .map((part: { type?: string; text?: string }) => (part.type === 'text' ? (part.text ?? '') : ''))
    .join('');
}
