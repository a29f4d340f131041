//! Keeps a run legal for every AG-UI client: what is open is closed before the end, and there is one end.

use super::run_log::RunLog;
use super::{Outcome, RunEvent, Usage};
use std::collections::HashSet;
use std::sync::Arc;

/// What a run has opened and not closed.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Open {
    Step(String),
    Text(String),
    Call(String),
}

/// The only writer of a run's log. Dropped before the end, by a panic or a shutdown, it ends the run as failed.
pub(super) struct Guard {
    log: Arc<RunLog>,
    started: bool,
    ended: bool,
    /// In the order of opening.
    open: Vec<Open>,
    /// Ids of texts and calls so far: one that came is not opened again.
    used: HashSet<String>,
}

impl Guard {
    pub(super) fn new(log: Arc<RunLog>) -> Self {
        Self { log, started: false, ended: false, open: Vec::new(), used: HashSet::new() }
    }

    pub(super) fn log(&self) -> &Arc<RunLog> {
        &self.log
    }

    pub(super) fn start(&mut self, parent: Option<String>) {
        let (thread, run) = (self.log.thread.clone(), self.log.run.clone());
        let legacy = self.log.legacy;
        self.emit(RunEvent::Started { thread, run, parent, legacy });
    }

    /// Writes an event; one that would break the order is left out, and so are an empty delta and a terminal event,
    /// which [`Guard::finish`] and [`Guard::fail`] write. Says whether it was written.
    pub(super) fn emit(&mut self, event: RunEvent) -> bool {
        if !self.admit(&event) {
            if !matches!(&event, RunEvent::TextDelta { delta, .. } | RunEvent::ToolArgs { delta, .. } if delta.is_empty())
            {
                tracing::error!(run = %self.log.run, ?event, "an event out of order was left out of its run");
            }
            return false;
        }
        self.log.push(event);
        true
    }

    fn admit(&mut self, event: &RunEvent) -> bool {
        if self.ended || self.started == matches!(event, RunEvent::Started { .. }) {
            return false;
        }
        match event {
            RunEvent::Started { .. } => {
                self.started = true;
                true
            }
            RunEvent::Finished { .. } | RunEvent::Error { .. } => false,
            RunEvent::StepStarted(name) => self.open(Open::Step(name.clone())),
            RunEvent::StepFinished(name) => self.close(&Open::Step(name.clone())),
            RunEvent::TextStart { id } => self.used.insert(format!("text {id}")) && self.open(Open::Text(id.clone())),
            RunEvent::TextDelta { id, delta } => !delta.is_empty() && self.open.contains(&Open::Text(id.clone())),
            RunEvent::TextEnd { id } => self.close(&Open::Text(id.clone())),
            RunEvent::ToolStart { id, .. } => {
                self.used.insert(format!("call {id}")) && self.open(Open::Call(id.clone()))
            }
            RunEvent::ToolArgs { id, delta } => !delta.is_empty() && self.open.contains(&Open::Call(id.clone())),
            RunEvent::ToolEnd { id } => self.close(&Open::Call(id.clone())),
            // of this run and ended, or of an earlier one
            RunEvent::ToolResult { call_id, .. } => {
                !self.open.contains(&Open::Call(call_id.clone())) && self.used.insert(format!("result {call_id}"))
            }
            RunEvent::StateSnapshot(_)
            | RunEvent::StateDelta(_)
            | RunEvent::MessagesSnapshot(_)
            | RunEvent::Custom { .. } => true,
        }
    }

    fn open(&mut self, item: Open) -> bool {
        let is_new = !self.open.contains(&item);
        if is_new {
            self.open.push(item);
        }
        is_new
    }

    fn close(&mut self, item: &Open) -> bool {
        let at = self.open.iter().position(|open| open == item);
        at.map(|at| self.open.remove(at)).is_some()
    }

    /// Closes what is open, the last opened first. Texts and calls of an end that was not planned stay as they are.
    pub(super) fn close_all(&mut self) {
        while let Some(open) = self.open.pop() {
            self.log.push(match open {
                Open::Step(name) => RunEvent::StepFinished(name),
                Open::Text(id) => RunEvent::TextEnd { id },
                Open::Call(id) => RunEvent::ToolEnd { id },
            });
        }
    }

    /// Ends the run, once.
    pub(super) fn finish(&mut self, outcome: Outcome, usage: Option<Usage>) {
        let (thread, run) = (self.log.thread.clone(), self.log.run.clone());
        if !self.started {
            self.start(None);
        }
        self.end(RunEvent::Finished { thread, run, outcome, usage });
    }

    /// Ends the run as failed, once.
    pub(super) fn fail(&mut self, code: &str, message: &str) {
        self.end(RunEvent::Error { message: message.to_owned(), code: code.to_owned() });
    }

    fn end(&mut self, terminal: RunEvent) {
        if self.ended {
            return;
        }
        self.close_all();
        self.ended = true;
        self.log.push(terminal);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.fail("internal", "the run stopped before its end; ask again");
    }
}

/// The order of events as the official client enforces it (`verifyEvents`), and exactly one terminal event.
#[cfg(test)]
pub(super) fn verify(events: &[RunEvent]) -> Result<(), String> {
    let mut open: Vec<Open> = Vec::new();
    let (last, body) = events.split_last().ok_or("no event")?;
    let opens = |open: &mut Vec<Open>, item: Open| {
        (!open.contains(&item)).then(|| open.push(item.clone())).ok_or(format!("{item:?} is open already"))
    };
    let closes = |open: &mut Vec<Open>, item: Open| {
        let at = open.iter().position(|o| *o == item).ok_or(format!("{item:?} is not open"))?;
        open.remove(at);
        Ok::<(), String>(())
    };
    for (at, event) in body.iter().enumerate() {
        match event {
            RunEvent::Started { .. } if at == 0 => {}
            RunEvent::Started { .. } => return Err("started twice".into()),
            _ if at == 0 => return Err(format!("{event:?} before the start")),
            RunEvent::Finished { .. } | RunEvent::Error { .. } => return Err(format!("{event:?} is not the last")),
            RunEvent::StepStarted(name) => opens(&mut open, Open::Step(name.clone()))?,
            RunEvent::StepFinished(name) => closes(&mut open, Open::Step(name.clone()))?,
            RunEvent::TextStart { id } => opens(&mut open, Open::Text(id.clone()))?,
            RunEvent::TextEnd { id } => closes(&mut open, Open::Text(id.clone()))?,
            RunEvent::ToolStart { id, .. } => opens(&mut open, Open::Call(id.clone()))?,
            RunEvent::ToolEnd { id } => closes(&mut open, Open::Call(id.clone()))?,
            RunEvent::TextDelta { id, delta } if delta.is_empty() || !open.contains(&Open::Text(id.clone())) => {
                return Err(format!("delta {delta:?} of text {id}"));
            }
            RunEvent::ToolArgs { id, delta } if delta.is_empty() || !open.contains(&Open::Call(id.clone())) => {
                return Err(format!("delta {delta:?} of call {id}"));
            }
            _ => {}
        }
    }
    match last {
        RunEvent::Finished { .. } if body.is_empty() => Err("finished before the start".into()),
        RunEvent::Finished { .. } if !open.is_empty() => Err(format!("finished while {open:?}")),
        last if last.is_terminal() => Ok(()),
        last => Err(format!("{last:?} is the last")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::run_log::testing::{events, log};
    use super::*;
    use proptest::prelude::*;

    fn any_event() -> impl Strategy<Value = RunEvent> {
        let id = prop::sample::select(vec!["a", "b"]).prop_map(str::to_owned);
        let delta = prop::sample::select(vec!["", "x", "\u{1F30A}"]).prop_map(str::to_owned);
        let pair = (id.clone(), delta);
        prop_oneof![
            Just(RunEvent::Started { thread: "t".into(), run: "r".into(), parent: None, legacy: false }),
            Just(RunEvent::Error { message: "m".into(), code: "c".into() }),
            id.clone().prop_map(RunEvent::StepStarted),
            id.clone().prop_map(RunEvent::StepFinished),
            id.clone().prop_map(|id| RunEvent::TextStart { id }),
            pair.clone().prop_map(|(id, delta)| RunEvent::TextDelta { id, delta }),
            id.clone().prop_map(|id| RunEvent::TextEnd { id }),
            id.clone().prop_map(|id| RunEvent::ToolStart { id, name: "n".into(), parent: "p".into() }),
            pair.prop_map(|(id, delta)| RunEvent::ToolArgs { id, delta }),
            id.clone().prop_map(|id| RunEvent::ToolEnd { id }),
            id.prop_map(|call_id| RunEvent::ToolResult { message_id: "m".into(), call_id, content: String::new() }),
            Just(RunEvent::StateSnapshot(serde_json::json!({}))),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_written_and_however_it_ends_the_order_is_legal(
            written in prop::collection::vec(any_event(), 0..60),
            starts in any::<bool>(),
            ending in 0..4,
        ) {
            let log = log();
            let mut guard = Guard::new(log.clone());
            if starts {
                guard.start(None);
            }
            written.into_iter().for_each(|event| _ = guard.emit(event));
            match ending {
                0 => guard.finish(Outcome::Success { pending: Vec::new() }, None),
                1 => guard.finish(Outcome::Cancelled, None),
                2 => guard.fail("test", "failed"),
                _ => {}
            }
            drop(guard);
            prop_assert_eq!(verify(&events(&log)), Ok(()));
        }
    }

    #[test]
    fn a_run_that_is_dropped_in_the_middle_of_a_text_is_closed_and_failed() {
        let log = log();
        let mut guard = Guard::new(log.clone());
        guard.start(None);
        guard.emit(RunEvent::StepStarted("answering".into()));
        guard.emit(RunEvent::TextStart { id: "m".into() });
        drop(guard);
        let events = events(&log);
        assert_eq!(events[3], RunEvent::TextEnd { id: "m".into() });
        assert_eq!(events[4], RunEvent::StepFinished("answering".into()));
        assert!(matches!(&events[5], RunEvent::Error { code, .. } if code == "internal"));
        assert_eq!(events.len(), 6);
    }

    #[test]
    fn the_first_end_stands() {
        let log = log();
        let mut guard = Guard::new(log.clone());
        guard.start(None);
        guard.finish(Outcome::Cancelled, None);
        guard.fail("late", "too late");
        drop(guard);
        assert!(matches!(events(&log).as_slice(), [_, RunEvent::Finished { outcome: Outcome::Cancelled, .. }]));
    }
}
