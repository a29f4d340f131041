//! What metrics cost, by a stopwatch that is handed in: no answer depends on it.

use std::time::Duration;

/// Tells how long ago anything was, always the same thing.
pub type Stopwatch = fn() -> Duration;

/// What a metric's batches took so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// Batches of events, or final rows of the metric it reads that came at once.
    pub batches: u64,
    pub rows: u64,
    pub time: Duration,
}

impl Cost {
    /// Mean time of a batch in microseconds; `None` before the first.
    pub fn micros_per_batch(&self) -> Option<f64> {
        (self.batches > 0).then(|| self.time.as_secs_f64() * 1e6 / self.batches as f64)
    }

    pub(crate) fn add(&mut self, rows: usize, time: Duration) {
        self.batches += 1;
        self.rows += rows as u64;
        self.time += time;
    }
}
