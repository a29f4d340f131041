//! The one place where the time comes from.

use engine::event::Micros;
use std::time::{SystemTime, UNIX_EPOCH};

/// Processing time. Only the edge of the process holds a real one.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> Micros;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Micros {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Micros(since.as_micros() as i64)
    }
}
