//! The events of one run. It is written once, by the run's guard; readers come and go and never slow it.

use super::RunEvent;
use crate::outlet::{Outlet, Update, What};
use engine::event::{Micros, WorkspaceId};
use parking_lot::RwLock;
use std::sync::Arc;
use tokio::sync::watch;

/// The most a run may write; a run beyond it ends with RUN_ERROR code `run_too_large`.
const EVENTS_MAX: usize = 50_000;
const BYTES_MAX: usize = 32 << 20;

pub(super) struct RunLog {
    pub(super) workspace: WorkspaceId,
    pub(super) thread: String,
    pub(super) run: String,
    pub(super) started_at: Micros,
    epoch: String,
    pub(super) legacy: bool,
    /// Id of the user who asked for it; `None` for a run that is over and was read from the store.
    pub(super) user: Option<String>,
    /// `None` for a run that concerns nobody but who asked for it.
    outlet: Option<Arc<dyn Outlet>>,
    written: RwLock<Written>,
    length: watch::Sender<u64>,
    cancelled: watch::Sender<bool>,
}

#[derive(Default)]
struct Written {
    events: Vec<Arc<RunEvent>>,
    bytes: usize,
    ended: bool,
}

/// What a log has for a reader.
enum Next {
    Event(Arc<RunEvent>),
    Later,
    Ended,
}

impl RunLog {
    /// An empty log. The numbers of events start over only when a restart cut the run off: then `was_cut`.
    pub(super) fn new(
        workspace: WorkspaceId,
        [thread, run]: [String; 2],
        started_at: Micros,
        was_cut: bool,
        legacy: bool,
        user: Option<String>,
        outlet: Option<Arc<dyn Outlet>>,
    ) -> Self {
        let epoch = format!("{:x}-{}", started_at.0, u8::from(was_cut));
        let written = RwLock::default();
        let (length, cancelled) = (watch::Sender::new(0), watch::Sender::new(false));
        Self { workspace, thread, run, started_at, epoch, legacy, user, outlet, written, length, cancelled }
    }

    /// Adds an event; after the terminal one nothing is added any more.
    pub(super) fn push(&self, event: RunEvent) {
        let event = Arc::new(event);
        let mut written = self.written.write();
        if written.ended {
            return;
        }
        written.ended = event.is_terminal();
        written.bytes += event.bytes();
        written.events.push(event.clone());
        let n = written.events.len() as u64;
        // within the lock, so that the outlet sees the order of the log
        if let Some(outlet) = &self.outlet {
            let what = What::Run { thread: self.thread.clone(), run: self.run.clone(), n, event };
            outlet.publish(Update { workspace: self.workspace.clone(), what });
        }
        drop(written);
        self.length.send_replace(n);
    }

    /// The log of a run that is over, from what was stored of it.
    pub(super) fn restore(&self, events: Vec<RunEvent>) {
        let mut written = self.written.write();
        written.bytes = events.iter().map(RunEvent::bytes).sum();
        written.events = events.into_iter().map(Arc::new).collect();
        written.ended = true;
        drop(written);
        self.length.send_modify(|_| ());
    }

    pub(super) fn is_full(&self) -> bool {
        let written = self.written.read();
        written.events.len() >= EVENTS_MAX || written.bytes >= BYTES_MAX
    }

    pub(super) fn bytes(&self) -> usize {
        self.written.read().bytes
    }

    /// Asks the run to stop; it does so at its next await.
    pub(super) fn cancel(&self) {
        self.cancelled.send_replace(true);
    }

    /// Returns once the run was asked to stop.
    pub(super) async fn cancelled(&self) {
        // the sender lives as long as the log
        _ = self.cancelled.subscribe().wait_for(|is| *is).await;
    }

    fn after(&self, n: u64) -> Next {
        let written = self.written.read();
        match written.events.get(usize::try_from(n).unwrap_or(usize::MAX)) {
            Some(event) => Next::Event(event.clone()),
            None if written.ended => Next::Ended,
            None => Next::Later,
        }
    }
}

/// A reader of one run: what is there already, then what comes. Dropping it does not stop the run.
pub struct RunHandle {
    /// Event numbers count within it; a position of another epoch says nothing here.
    pub epoch: String,
    /// The run was there before: this handle did not start it.
    pub attached: bool,
    /// The run was started by a client of AG-UI 0.0.x.
    pub legacy: bool,
    pub thread: String,
    pub run: String,
    log: Arc<RunLog>,
    seen: u64,
    length: watch::Receiver<u64>,
}

impl RunHandle {
    /// A reader of what follows event `after`; 0 is before the first.
    pub(super) fn new(log: Arc<RunLog>, after: u64, attached: bool) -> Self {
        Self {
            epoch: log.epoch.clone(),
            attached,
            legacy: log.legacy,
            thread: log.thread.clone(),
            run: log.run.clone(),
            seen: after,
            length: log.length.subscribe(),
            log,
        }
    }

    /// Goes on behind event `n`. A number that the run has not reached skips nothing.
    pub fn skip(&mut self, n: u64) {
        if n <= self.log.written.read().events.len() as u64 {
            self.seen = n;
        }
    }

    /// Whether the run has written its terminal event, which then all who follow it have been told of.
    pub fn is_over(&self) -> bool {
        self.log.written.read().ended
    }

    /// How many events the run has written.
    pub fn length(&self) -> u64 {
        self.log.written.read().events.len() as u64
    }

    /// Whether the thread's followers are told of the run; else it concerns nobody but who asked for it.
    pub fn is_told(&self) -> bool {
        self.log.outlet.is_some()
    }

    /// The next event and its number, from 1; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<(u64, Arc<RunEvent>)> {
        loop {
            self.length.borrow_and_update();
            match self.log.after(self.seen) {
                Next::Event(event) => return Some(self.step(event)),
                Next::Ended => return None,
                // the sender lives as long as the log
                Next::Later => _ = self.length.changed().await,
            }
        }
    }

    /// The next event if it is there already.
    pub fn ready(&mut self) -> Option<(u64, Arc<RunEvent>)> {
        match self.log.after(self.seen) {
            Next::Event(event) => Some(self.step(event)),
            Next::Later | Next::Ended => None,
        }
    }

    fn step(&mut self, event: Arc<RunEvent>) -> (u64, Arc<RunEvent>) {
        self.seen += 1;
        (self.seen, event)
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    pub(in super::super) fn log() -> Arc<RunLog> {
        let workspace = "acme".parse().unwrap();
        Arc::new(RunLog::new(workspace, ["t".into(), "r".into()], Micros(7), false, false, None, None))
    }

    pub(in super::super) fn events(log: &RunLog) -> Vec<RunEvent> {
        log.written.read().events.iter().map(|event| event.as_ref().clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    fn step(n: usize) -> RunEvent {
        RunEvent::StepStarted(n.to_string())
    }

    fn end() -> RunEvent {
        RunEvent::Error { message: "over".into(), code: "test".into() }
    }

    #[tokio::test]
    async fn a_reader_gets_what_was_written_before_and_after_it_came_then_the_end() {
        let log = log();
        log.push(step(1));
        let mut reader = RunHandle::new(log.clone(), 0, true);
        assert_eq!(reader.next().await.unwrap().0, 1);
        let waiting = tokio::spawn(async move {
            let rest = [reader.next().await, reader.next().await, reader.next().await];
            rest.map(|event| event.map(|(n, _)| n))
        });
        tokio::task::yield_now().await;
        log.push(step(2));
        log.push(end());
        assert_eq!(waiting.await.unwrap(), [Some(2), Some(3), None]);
    }

    #[tokio::test]
    async fn nothing_follows_the_terminal_event() {
        let log = log();
        log.push(end());
        log.push(step(1));
        assert_eq!(events(&log), [end()]);
    }

    #[tokio::test]
    async fn a_reader_from_a_position_sees_only_what_follows_it() {
        let log = log();
        (0..5).for_each(|n| log.push(step(n)));
        let mut reader = RunHandle::new(log, 3, true);
        assert_eq!(reader.ready().unwrap().0, 4);
        assert_eq!(reader.ready().unwrap().0, 5);
        assert!(reader.ready().is_none());
    }
}
