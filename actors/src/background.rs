//! Threads for what takes long. They have a lower priority than those that serve, so that who asks for much, or sends much,
//! does not make the others wait.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinError;

/// What the priority is lowered by: of two threads that want one core such a one gets a tenth of it.
const NICE: i32 = 10;

/// Who gave way for longer than this has to see that it comes to an end,
const WAITED: Duration = Duration::from_millis(1);
/// and goes on over so many pauses.
const KEPT: u32 = 8;

thread_local! {
    /// Pauses until this thread gives way; none where it does not.
    static PAUSES: Cell<Option<u32>> = const { Cell::new(None) };
}

/// From here on this thread gives way to those that serve.
pub(crate) fn give_way() {
    PAUSES.set(Some(0));
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::warn!(%error, "what takes long runs at normal priority");
    }
}

/// Where long work may be interrupted: a thread of a pool gives way here. The kernel lets a thread go on for some
/// milliseconds, whatever its priority, before it looks who else is there (EEVDF, `RUN_TO_PARITY`).
pub fn pause() {
    match PAUSES.get() {
        None => {}
        Some(0) => {
            let began = Instant::now();
            std::thread::yield_now();
            if began.elapsed() > WAITED {
                PAUSES.set(Some(KEPT));
            }
        }
        Some(more) => PAUSES.set(Some(more - 1)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_threads_of_a_pool_give_way_and_a_panic_is_told() {
        let pool = Background::start("test", 1).unwrap();
        pause();
        assert_eq!(PAUSES.get(), None, "this thread serves");
        let there = pool.run(|| (PAUSES.get(), rustix::process::getpriority_process(None).unwrap())).await.unwrap();
        assert_eq!(there, (Some(0), NICE));
        let waited = pool.run(|| {
            PAUSES.set(Some(KEPT));
            (0..=KEPT).for_each(|_| pause());
            PAUSES.get()
        });
        assert!(
            waited.await.unwrap().is_some_and(|more| [0, KEPT].contains(&more)),
            "it gives way again after so many"
        );
        assert!(pool.run(|| panic!("as asked")).await.unwrap_err().is_panic());
        assert_eq!(pool.run(|| 7).await.unwrap(), 7, "the pool goes on");
    }
}
