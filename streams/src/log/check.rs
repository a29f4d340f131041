//! Looks through the complete files now and then. A disk can change what nobody reads for months; while a copy is still
//! somewhere, somebody should hear of it.

use super::ReadError;
use super::segment::Segment;
use parking_lot::{Condvar, Mutex};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// Before the first look: a start has enough to read.
const FIRST_AFTER: Duration = Duration::from_secs(60);
/// Read at once; then the disk is left to others, so that no more than this is read in a [`PACE`].
const STEP_BYTES: u64 = 1 << 20;
const PACE: Duration = Duration::from_millis(30);
/// So many places are told.
const TOLD_MAX: usize = 20;

/// What was found, and how the one who looks is told to end.
#[derive(Default)]
pub(super) struct Check {
    damage: Mutex<Vec<String>>,
    has_ended: Mutex<bool>,
    ended: Condvar,
}

impl Check {
    /// What of the complete files is not as it was written, for people.
    pub(super) fn damage(&self) -> Option<String> {
        Some(self.damage.lock().join("; ")).filter(|told| !told.is_empty())
    }

    /// Somebody who read met this.
    pub(super) fn found(&self, error: &ReadError) {
        if matches!(error, ReadError::Gone { .. } | ReadError::Ahead { .. }) {
            return;
        }
        let (mut damage, told) = (self.damage.lock(), error.to_string());
        if damage.len() < TOLD_MAX && !damage.contains(&told) {
            damage.push(told);
        }
    }

    pub(super) fn end(&self) {
        *self.has_ended.lock() = true;
        self.ended.notify_all();
    }

    /// Breaks off when the log is closed.
    fn rest(&self, time: Duration) -> ControlFlow<()> {
        let mut has_ended = self.has_ended.lock();
        self.ended.wait_while_for(&mut has_ended, |has_ended| !*has_ended, time);
        if *has_ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Looks through `files` and rests for `every`, again and again until the end.
    pub(super) fn run(&self, every: Duration, files: impl Fn() -> Vec<Arc<Segment>>) -> ControlFlow<()> {
        self.rest(FIRST_AFTER)?;
        loop {
            self.look(&files)?;
            self.rest(every)?;
        }
    }

    /// Looks through all of `files` but the last, which is being written and was read when the log was opened.
    pub(super) fn look(&self, files: &impl Fn() -> Vec<Arc<Segment>>) -> ControlFlow<()> {
        let mut found = Vec::new();
        for pair in files().windows(2) {
            let mut read = 0;
            let checked = pair[0].check(pair[1].header.first, |bytes| {
                read += bytes;
                if read < STEP_BYTES {
                    return ControlFlow::Continue(());
                }
                read = 0;
                self.rest(PACE)
            });
            let Err(error) = checked? else { continue };
            let is_kept = files().iter().any(|file| file.header.first == pair[0].header.first);
            if !is_kept {
                continue; // it was let go meanwhile
            }
            tracing::error!(%error, "a log file is damaged");
            found.push(error);
        }
        metrics::gauge!("tidewatch_log_damaged_files").set(found.len() as f64);
        self.damage.lock().clear();
        found.iter().for_each(|error| self.found(error));
        ControlFlow::Continue(())
    }
}

impl Segment {
    /// Reads the whole file, which is complete and followed by one that begins at `next`. `goes_on` is told the bytes of
    /// each record that was read.
    fn check(
        &self,
        next: u64,
        mut goes_on: impl FnMut(u64) -> ControlFlow<()>,
    ) -> ControlFlow<(), Result<(), ReadError>> {
        let mut read = || -> Result<ControlFlow<()>, ReadError> {
            let mut reader = self.read_from(self.header.first)?;
            loop {
                let position = reader.position;
                if reader.read().map_err(|fault| self.fault(fault))?.is_none() {
                    let is_whole = reader.expected == next;
                    let whole = is_whole.then_some(ControlFlow::Continue(()));
                    return whole.ok_or_else(|| self.ends_before(reader.expected, position));
                }
                if goes_on(reader.position - position).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        };
        match read() {
            Ok(flow) => flow.map_continue(Ok),
            Err(error) => ControlFlow::Continue(Err(error)),
        }
    }
}
