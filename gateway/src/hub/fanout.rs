//! Who writes to clients what has come for them: a few tasks that go from client to client, so that a message to a
//! thousand of them wakes no thousand tasks, each client has its turn, and what comes during a round goes out in the next
//! as one.

use super::channel::Channel;
use super::outbox::{Outbox, Told};
use crate::socket::wire::Wire;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::yield_now;

/// So many clients are taken up at once.
const TURN_MAX: usize = 1_024;
/// Of so many clients what a turn needs is fetched from memory at once: one after the other each would wait for it by
/// itself, which is most of what a turn takes but for the kernel's part.
const AHEAD: usize = 8;
/// After so long, others have their turn on the thread.
const SLICE: Duration = Duration::from_micros(500);

/// The tasks, each with clients of its own.
pub(super) struct Fanout {
    rounds: Box<[OnceLock<Round>]>,
    next: AtomicUsize,
}

/// The way to one of them.
#[derive(Clone)]
pub(super) struct Round {
    number: usize,
    told: UnboundedSender<News>,
}

/// Who has something.
enum News {
    /// Who is in the round already.
    One(Arc<Outbox>),
    /// Clients who are told by this of a subscription of theirs to this channel.
    Many(Arc<Channel>, Vec<Listener>),
}

/// A subscription, and whose it is.
pub(super) type Listener = (u64, Arc<Outbox>);

/// Subscriptions whose clients are to be told when there is something for them, each once.
#[derive(Default)]
pub(super) struct Listeners {
    /// By the number of their round: told as one, so that the first of them has the message before the last is looked at.
    by_round: Vec<Vec<Listener>>,
    /// To be told one by one.
    others: Vec<Listener>,
}

impl Fanout {
    pub(super) fn new() -> Fanout {
        let tasks = available_parallelism().map_or(1, usize::from);
        Fanout { rounds: (0..tasks).map(|_| OnceLock::new()).collect(), next: AtomicUsize::new(0) }
    }

    /// Writes to this client in passing from now on. To be called within a runtime.
    pub(super) fn connect(&self, outbox: &Outbox, wire: Wire) {
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.rounds.len();
        let round = self.rounds[number].get_or_init(|| {
            // each client is in it once at most, and once for each of its subscriptions
            let (told, clients) = mpsc::unbounded_channel();
            tokio::spawn(go_round(clients));
            Round { number, told }
        });
        outbox.connect(wire, round.clone());
    }
}

impl Round {
    /// Whether the client has its turn; it has none where there is no round any more.
    pub(super) fn tell(&self, outbox: Arc<Outbox>) -> bool {
        self.told.send(News::One(outbox)).is_ok()
    }
}

impl Listeners {
    pub(super) fn add(&mut self, id: u64, outbox: Arc<Outbox>) {
        let Some(number) = outbox.round().map(|round| round.number) else { return self.others.push((id, outbox)) };
        if self.by_round.len() <= number {
            self.by_round.resize_with(number + 1, Vec::new);
        }
        self.by_round[number].push((id, outbox));
    }

    /// Whether the subscription was among them.
    pub(super) fn remove(&mut self, id: u64) -> bool {
        self.by_round.iter_mut().chain([&mut self.others]).any(|listeners| {
            let at = listeners.iter().position(|(other, _)| *other == id);
            at.map(|at| listeners.swap_remove(at)).is_some()
        })
    }

    pub(super) fn append(&mut self, others: &mut Listeners) {
        if self.by_round.len() < others.by_round.len() {
            self.by_round.resize_with(others.by_round.len(), Vec::new);
        }
        for (ours, theirs) in self.by_round.iter_mut().zip(&mut others.by_round) {
            ours.append(theirs);
        }
        self.others.append(&mut others.others);
    }

    /// Tells all of them, who are subscribers of `channel`.
    pub(super) fn tell(self, channel: &Arc<Channel>) {
        for listeners in self.by_round {
            let Some(round) = listeners.first().and_then(|(_, outbox)| outbox.round()).cloned() else { continue };
            if let Err(unsent) = round.told.send(News::Many(channel.clone(), listeners))
                && let News::Many(_, listeners) = unsent.0
            {
                listeners.iter().for_each(|(id, outbox)| outbox.has_something(*id));
            }
        }
        self.others.iter().for_each(|(id, outbox)| outbox.has_something(*id));
    }
}

async fn go_round(mut clients: UnboundedReceiver<News>) {
    let (mut news, mut turn, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
    while clients.recv_many(&mut news, TURN_MAX).await > 0 {
        let mut slice = Slice(Instant::now());
        let is_alone = news.len() == 1;
        for told in news.drain(..) {
            match told {
                News::One(outbox) => turn.push(outbox),
                News::Many(channel, listeners) if is_alone => {
                    for some in listeners.chunks(AHEAD) {
                        channel.touch(some);
                        some.iter().for_each(|(_, outbox)| outbox.touch());
                        for (id, outbox) in some {
                            outbox.write(Some(Told { id: *id, channel: &channel }), slice.turn().await, &mut scratch);
                        }
                    }
                }
                // who is told of several subscriptions gets them as one
                News::Many(_, listeners) => turn.extend(listeners.into_iter().filter_map(|(id, outbox)| {
                    outbox.note(id);
                    outbox.queue().then_some(outbox)
                })),
            }
        }
        for outbox in turn.drain(..) {
            outbox.unqueue();
            outbox.write(None, slice.turn().await, &mut scratch);
        }
    }
}

/// Since when the task is at it.
struct Slice(Instant);

impl Slice {
    /// The time of the next client's turn.
    async fn turn(&mut self) -> Instant {
        let now = Instant::now();
        if now.duration_since(self.0) <= SLICE {
            return now;
        }
        yield_now().await;
        self.0 = Instant::now();
        self.0
    }
}
