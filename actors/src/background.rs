//! Threads for what takes long. They have a lower priority than those that serve, so that who asks for much, or sends much,
//! does not make the others wait.

use std::io;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinError;

/// What the priority is lowered by: of two threads that want one core such a one gets a tenth of it, and it gives way at
/// once to one that was asleep.
const NICE: i32 = 10;

/// From here on this thread gives way to those that serve.
pub(crate) fn give_way() {
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::warn!(%error, "what takes long runs at normal priority");
    }
}

/// A pool of such threads.
pub struct Background(Option<Runtime>);

impl Background {
    /// A pool of `threads`, called `name`, which are started when they are wanted. Fails when the machine has none to give.
    pub fn start(name: &str, threads: usize) -> io::Result<Background> {
        // only its threads for blocking work run
        let mut builder = Builder::new_current_thread();
        builder.thread_name(name).on_thread_start(give_way).max_blocking_threads(threads);
        Ok(Background(Some(builder.build()?)))
    }

    /// What comes of `work` once it was its turn; an error where it panics.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        let runtime = self.0.as_ref().expect("it is there until it is dropped");
        runtime.spawn_blocking(work).await
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // this may be a thread that must not wait
        _ = self.0.take().map(Runtime::shutdown_background);
    }
}
