//! Who writes to clients what has come for them: a few tasks that go from client to client, so that a message to a
//! thousand of them wakes no thousand tasks, each client has its turn, and what comes during a round goes out in the next
//! as one.

use super::outbox::{Outbox, Round};
use crate::socket::wire::Wire;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::yield_now;

/// So many clients are taken up at once.
const TURN_MAX: usize = 1_024;
/// After so long, others have their turn on the thread.
const SLICE: Duration = Duration::from_micros(500);

/// The tasks, each with clients of its own.
pub(super) struct Fanout {
    rounds: Box<[OnceLock<Round>]>,
    next: AtomicUsize,
}

impl Fanout {
    pub(super) fn new() -> Fanout {
        let tasks = available_parallelism().map_or(1, usize::from);
        Fanout { rounds: (0..tasks).map(|_| OnceLock::new()).collect(), next: AtomicUsize::new(0) }
    }

    /// Writes to this client in passing from now on. To be called within a runtime.
    pub(super) fn connect(&self, outbox: &Outbox, wire: &Arc<Wire>) {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % self.rounds.len();
        let round = self.rounds[at].get_or_init(|| {
            // each client is in it once at most
            let (round, clients) = mpsc::unbounded_channel();
            tokio::spawn(go_round(clients));
            round
        });
        outbox.connect(Arc::downgrade(wire), round.clone());
    }
}

async fn go_round(mut clients: UnboundedReceiver<Arc<Outbox>>) {
    let mut turn = Vec::new();
    while clients.recv_many(&mut turn, TURN_MAX).await > 0 {
        let mut since = Instant::now();
        for outbox in turn.drain(..) {
            let mut now = Instant::now();
            if now.duration_since(since) > SLICE {
                yield_now().await;
                now = Instant::now();
                since = now;
            }
            outbox.write(now);
        }
    }
}
