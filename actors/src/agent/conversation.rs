//! The messages of a thread as a run reads and grows them: AG-UI message objects, in the order a client shows them.

use super::RunEvent;
use serde_json::{Value, json};
use std::collections::HashSet;

/// What a run knows of its thread.
pub(super) struct Conversation {
    messages: Vec<Value>,
    /// Ids of the messages this run made, in order.
    made: Vec<String>,
}

/// What came of bringing together the stored messages and those the client sent.
pub(super) struct Merged {
    pub(super) conversation: Conversation,
    /// Sent and not stored yet.
    pub(super) unseen: Vec<Value>,
    /// The client does not hold all of the conversation.
    pub(super) client_lacks_some: bool,
}

impl Conversation {
    /// A client that sends a message the thread knows sends the whole conversation as it should be; one that sends
    /// only unknown ones adds to what is stored.
    pub(super) fn merge(stored: Vec<Value>, sent: &[Value]) -> Merged {
        let known: HashSet<&str> = stored.iter().map(id_of).collect();
        let unseen: Vec<Value> = sent.iter().filter(|message| !known.contains(id_of(message))).cloned().collect();
        let client_lacks_some = unseen.len() == sent.len() && !stored.is_empty();
        let messages = if client_lacks_some { [stored, unseen.clone()].concat() } else { sent.to_vec() };
        Merged { conversation: Conversation { messages, made: Vec::new() }, unseen, client_lacks_some }
    }

    pub(super) fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// The messages this run made, in the order it began them.
    pub(super) fn made(&self) -> Vec<Value> {
        let find = |id: &String| self.messages.iter().find(|message| id_of(message) == id).cloned();
        self.made.iter().filter_map(find).collect()
    }

    /// What the user said last.
    pub(super) fn question(&self) -> String {
        self.of_user().last().unwrap_or_default()
    }

    /// What the user said, oldest first.
    pub(super) fn of_user(&self) -> impl Iterator<Item = String> {
        self.messages.iter().filter(|message| message["role"] == "user").map(text_of)
    }

    /// Answers of the client to tool calls that came after everything else: name of the tool and answer.
    pub(super) fn tool_answers(&self) -> Vec<(String, String)> {
        let is_answer = |message: &&Value| message["role"] == "tool";
        let mut answers: Vec<(String, String)> = self
            .messages
            .iter()
            .rev()
            .take_while(is_answer)
            .map(|message| {
                let name = self
                    .call(&message["toolCallId"])
                    .map_or("", |call| call["function"]["name"].as_str().unwrap_or(""));
                let answer = match message["error"].as_str() {
                    Some(error) => format!("an error: {error}"),
                    None => text_of(message),
                };
                (name.to_owned(), answer)
            })
            .collect();
        answers.reverse();
        answers
    }

    fn call(&self, id: &Value) -> Option<&Value> {
        let calls = self.messages.iter().filter_map(|message| message["toolCalls"].as_array());
        calls.flatten().find(|call| call["id"] == *id)
    }

    /// Follows an event as the client's reducer does.
    pub(super) fn apply(&mut self, event: &RunEvent) {
        match event {
            RunEvent::TextStart { id } => {
                self.assistant(id)["content"] = "".into();
            }
            RunEvent::TextDelta { id, delta } => {
                if let Value::String(content) = &mut self.assistant(id)["content"] {
                    content.push_str(delta);
                }
            }
            RunEvent::ToolStart { id, name, parent } => {
                let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}});
                match &mut self.assistant(parent)["toolCalls"] {
                    Value::Array(calls) => calls.push(call),
                    none => *none = json!([call]),
                }
            }
            RunEvent::ToolArgs { id, delta } => {
                let calls = self.messages.iter_mut().rev().filter_map(|message| message.get_mut("toolCalls"));
                let mut calls = calls.filter_map(Value::as_array_mut).flatten();
                let call = calls.find(|call| call["id"] == id.as_str());
                if let Some(Value::String(arguments)) = call.map(|call| &mut call["function"]["arguments"]) {
                    arguments.push_str(delta);
                }
            }
            RunEvent::ToolResult { message_id, call_id, content } => self.answer(message_id, call_id, content),
            _ => {}
        }
    }

    fn assistant(&mut self, id: &str) -> &mut Value {
        let at = self.messages.iter().rposition(|message| id_of(message) == id).unwrap_or_else(|| {
            self.messages.push(json!({"id": id, "role": "assistant"}));
            self.made.push(id.to_owned());
            self.messages.len() - 1
        });
        &mut self.messages[at]
    }

    /// The answer to a call goes behind the message that made it and its earlier answers.
    fn answer(&mut self, message_id: &str, call_id: &str, content: &str) {
        let made_it = |message: &Value| {
            message["toolCalls"].as_array().is_some_and(|calls| calls.iter().any(|call| call["id"] == call_id))
        };
        let at = match self.messages.iter().rposition(made_it) {
            Some(owner) => {
                let answers = self.messages[owner + 1..].iter().take_while(|message| message["role"] == "tool");
                owner + 1 + answers.count()
            }
            None => self.messages.len(),
        };
        let message = json!({"id": message_id, "role": "tool", "toolCallId": call_id, "content": content});
        self.messages.insert(at, message);
        self.made.push(message_id.to_owned());
    }
}

pub(super) fn id_of(message: &Value) -> &str {
    message["id"].as_str().unwrap_or_default()
}

/// The text of a message; of content in parts, its text parts.
pub(super) fn text_of(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: &str) -> Value {
        json!({"id": id, "role": "user", "content": id})
    }

    fn ids(messages: &[Value]) -> Vec<&str> {
        messages.iter().map(id_of).collect()
    }

    #[test]
    fn a_client_that_sends_what_the_thread_knows_decides_what_the_conversation_is() {
        let merged = Conversation::merge(vec![user("a"), user("b")], &[user("a"), user("c")]);
        assert_eq!(ids(merged.conversation.messages()), ["a", "c"]);
        assert_eq!(ids(&merged.unseen), ["c"]);
        assert!(!merged.client_lacks_some);
    }

    #[test]
    fn a_client_that_sends_only_a_new_message_adds_to_the_thread() {
        let merged = Conversation::merge(vec![user("a")], &[user("b")]);
        assert_eq!(ids(merged.conversation.messages()), ["a", "b"]);
        assert!(merged.client_lacks_some);
        assert!(!Conversation::merge(Vec::new(), &[user("b")]).client_lacks_some);
    }

    #[test]
    fn events_become_the_messages_that_the_client_holds() {
        let mut conversation = Conversation::merge(Vec::new(), &[user("q")]).conversation;
        let (id, call_id) = (String::from("c"), String::from("c"));
        for event in [
            RunEvent::ToolStart { id: id.clone(), name: "run_sql".into(), parent: "a".into() },
            RunEvent::ToolArgs { id: id.clone(), delta: "{\"sql\":".into() },
            RunEvent::ToolArgs { id: id.clone(), delta: "\"x\"}".into() },
            RunEvent::ToolEnd { id },
            RunEvent::TextStart { id: "b".into() },
            RunEvent::TextDelta { id: "b".into(), delta: "one ".into() },
            RunEvent::ToolResult { message_id: "t".into(), call_id, content: "3".into() },
            RunEvent::TextDelta { id: "b".into(), delta: "two".into() },
        ] {
            conversation.apply(&event);
        }
        assert_eq!(ids(conversation.messages()), ["q", "a", "t", "b"]);
        assert_eq!(conversation.messages()[1]["toolCalls"][0]["function"]["arguments"], "{\"sql\":\"x\"}");
        assert_eq!(conversation.messages()[3]["content"], "one two");
        assert_eq!(ids(&conversation.made()), ["a", "b", "t"]);
    }
}
