//! What an agent has at hand while it answers: the thread, the tools, and the way to its readers.

use super::conversation::Conversation;
use super::guard::Guard;
use super::{Failure, Interrupt, Outcome, RunEvent, RunRequest, Usage, new_id, tools};
use crate::fault::Fault;
use crate::system::System;
use engine::event::WorkspaceId;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Time between two pieces of a text: a reader sees it grow, and no client is flooded.
pub(super) const PACE: Duration = Duration::from_millis(15);
/// How long a text may take to appear, however long it is.
const SAYING_MAX: Duration = Duration::from_secs(4);
/// A longer word, or text without spaces, is cut.
const WORD_CHARS_MAX: usize = 48;
/// A greater snapshot would not fit into one frame of the official client (10 MiB).
const SNAPSHOT_BYTES_MAX: usize = 8 << 20;

/// What a person said to an interrupt that was open.
pub(super) struct Resolution {
    pub(super) interrupt: Interrupt,
    pub(super) approved: bool,
    pub(super) payload: Value,
}

pub(super) struct Run {
    pub(super) system: System,
    pub(super) workspace: WorkspaceId,
    pub(super) request: RunRequest,
    pub(super) conversation: Conversation,
    pub(super) resolved: Vec<Resolution>,
    pub(super) usage: Option<Usage>,
    state: Value,
    /// State events were written since the last snapshot.
    state_moved: bool,
    guard: Guard,
}

impl Run {
    pub(super) fn new(
        system: System,
        workspace: WorkspaceId,
        request: RunRequest,
        conversation: Conversation,
        state: Value,
        guard: Guard,
    ) -> Self {
        Self {
            system,
            workspace,
            request,
            conversation,
            resolved: Vec::new(),
            usage: None,
            state,
            state_moved: false,
            guard,
        }
    }

    pub(super) fn state(&self) -> &Value {
        &self.state
    }

    pub(super) fn emit(&mut self, event: RunEvent) -> Result<(), Failure> {
        if self.guard.log().is_full() {
            return Err(Failure::new("run_too_large", "the run wrote more than a run may; ask for less at once"));
        }
        if self.guard.emit(event.clone()) {
            self.conversation.apply(&event);
        }
        Ok(())
    }

    /// Announces that the agent is at `focus`, with no findings yet. What else the state holds stays.
    pub(super) fn open_state(&mut self, focus: &str) -> Result<(), Failure> {
        if !self.state.is_object() {
            self.state = Value::Object(Map::new());
        }
        self.state["focus"] = focus.into();
        self.state["findings"] = json!([]);
        self.emit(RunEvent::StateSnapshot(self.state.clone()))
    }

    pub(super) fn focus(&mut self, focus: &str) -> Result<(), Failure> {
        self.state["focus"] = focus.into();
        self.state_moved = true;
        self.emit(RunEvent::StateDelta(json!([{"op": "replace", "path": "/focus", "value": focus}])))
    }

    fn find(&mut self, finding: Value) -> Result<(), Failure> {
        if let Some(findings) = self.state["findings"].as_array_mut() {
            findings.push(finding.clone());
            self.state_moved = true;
            self.emit(RunEvent::StateDelta(json!([{"op": "add", "path": "/findings/-", "value": finding}])))?;
        }
        Ok(())
    }

    /// What a client needs to go on from here: the state and the messages as they are now.
    pub(super) fn show_all(&mut self) -> Result<(), Failure> {
        self.guard.close_all();
        if std::mem::take(&mut self.state_moved) {
            self.emit(RunEvent::StateSnapshot(self.state.clone()))?;
        }
        self.show_messages()
    }

    pub(super) fn show_messages(&mut self) -> Result<(), Failure> {
        let messages = self.conversation.messages().to_vec();
        if messages.iter().map(super::weight).sum::<usize>() > SNAPSHOT_BYTES_MAX {
            return Ok(());
        }
        self.emit(RunEvent::MessagesSnapshot(messages))
    }

    pub(super) fn begin_step(&mut self, name: &str) -> Result<(), Failure> {
        self.emit(RunEvent::StepStarted(name.to_owned()))
    }

    pub(super) fn end_step(&mut self, name: &str) -> Result<(), Failure> {
        self.emit(RunEvent::StepFinished(name.to_owned()))
    }

    /// Says `text` as the message `id`, piece by piece.
    pub(super) async fn say(&mut self, id: &str, text: &str) -> Result<(), Failure> {
        if text.is_empty() {
            return Ok(());
        }
        self.emit(RunEvent::TextStart { id: id.to_owned() })?;
        for (at, delta) in pieces(text).into_iter().enumerate() {
            if at > 0 {
                tokio::time::sleep(PACE).await;
            }
            self.emit(RunEvent::TextDelta { id: id.to_owned(), delta })?;
        }
        self.emit(RunEvent::TextEnd { id: id.to_owned() })
    }

    /// Shows a call, whole: a run cut off in the middle never leaves half its arguments. Its id.
    pub(super) fn announce(&mut self, parent: &str, name: &str, arguments: &Value) -> Result<String, Failure> {
        let id = new_id("call");
        self.emit(RunEvent::ToolStart { id: id.clone(), name: name.to_owned(), parent: parent.to_owned() })?;
        self.emit(RunEvent::ToolArgs { id: id.clone(), delta: arguments.to_string() })?;
        self.emit(RunEvent::ToolEnd { id: id.clone() })?;
        Ok(id)
    }

    /// Carries out an announced call and shows its answer, also when it failed.
    pub(super) async fn execute(
        &mut self,
        call_id: &str,
        name: &str,
        arguments: &Value,
    ) -> Result<Result<Value, Fault>, Failure> {
        let answer = if name == tools::UPDATE_POSITION && !self.request.may_hold {
            Err(Fault::invalid("forbidden", "your role in this workspace may not change positions"))
        } else {
            tools::call(&self.system, &self.workspace, name, arguments).await
        };
        let content = match &answer {
            Ok(answer) => answer.to_string(),
            Err(fault) => json!({"error": fault.code, "detail": fault.detail}).to_string(),
        };
        self.answer(call_id, content)?;
        if answer.is_ok() {
            self.find(json!({"tool": name, "arguments": arguments}))?;
        }
        Ok(answer)
    }

    /// Answers a call.
    pub(super) fn answer(&mut self, call_id: &str, content: String) -> Result<(), Failure> {
        self.emit(RunEvent::ToolResult { message_id: new_id("tool"), call_id: call_id.to_owned(), content })
    }

    /// Calls a tool whose answer the agent cannot do without.
    pub(super) async fn call(&mut self, parent: &str, name: &str, arguments: Value) -> Result<Value, Failure> {
        let id = self.announce(parent, name, &arguments)?;
        let answer = self.execute(&id, name, &arguments).await?;
        answer.map_err(|fault| Failure::new("tool_failed", format!("{name}: {} ({})", fault.detail, fault.code)))
    }

    pub(super) fn finish(&mut self, outcome: Outcome) {
        self.guard.finish(outcome, self.usage.clone());
    }

    pub(super) fn fail(&mut self, code: &str, message: &str) {
        self.guard.fail(code, message);
    }

    pub(super) fn close_all(&mut self) {
        self.guard.close_all();
    }
}

/// A text in pieces of whole words, few enough to say them all in time.
fn pieces(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in text.split_inclusive(char::is_whitespace) {
        let chars: Vec<char> = word.chars().collect();
        words.extend(chars.chunks(WORD_CHARS_MAX).map(|part| part.iter().collect::<String>()));
    }
    let pieces_max = (SAYING_MAX.as_millis() / PACE.as_millis()) as usize;
    words.chunks(words.len().div_ceil(pieces_max).max(1)).map(|words| words.concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_words_that_add_up_to_the_text() {
        let text = "Der Kurs stieg\num 3 %, \u{1F30A} sehr schön.";
        let pieces = pieces(text);
        assert_eq!(pieces.concat(), text);
        assert_eq!(pieces[0], "Der ");
        assert_eq!(pieces.len(), 9);
    }

    #[test]
    fn a_long_text_takes_no_longer_than_its_bound_and_one_without_spaces_is_cut() {
        assert!(pieces(&"word ".repeat(10_000)).len() <= 267);
        let cut = pieces(&"\u{1F30A}".repeat(100));
        assert_eq!(cut.len(), 3);
        assert!(cut.iter().all(|piece| piece.chars().count() <= WORD_CHARS_MAX));
    }
}
