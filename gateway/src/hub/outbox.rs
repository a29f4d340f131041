//! What waits for one client: its answers, and which of its channels have something for it. The messages themselves
//! stay in their channels, shared by all clients, so that a client that reads slowly takes no room.

use super::channel::{Channel, Turn};
use super::fanout::Round;
use super::ring::Form;
use crate::socket::wire::{Passed, Wire};
use bytes::Bytes;
use futures::task::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::Notify;

/// A client takes so many bytes at a time, so that what it gets next is as new as can be.
const WRITE_BYTES: usize = 64 << 10;

#[derive(Default)]
struct Waiting {
    replies: VecDeque<Bytes>,
    /// Bytes of `replies`.
    reply_bytes: usize,
    /// Subscriptions in the order of their ids.
    channels: Vec<(u64, Arc<Channel>)>,
    /// Subscriptions that have something, in the order in which they got it.
    ready: VecDeque<u64>,
    /// Subscriptions that have something which is not to be sent before this instant.
    due: Vec<(Instant, u64)>,
    /// Why the client is cut off; there is little room for what is rare.
    over: Option<Box<Cut>>,
}

/// Why a client is sent away without having asked for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Cut {
    /// Too far behind in a channel, which is named, whose messages must not be folded.
    TooSlow(String),
    /// The node that the connection is for ended it, with this code and reason.
    Ended(u16, String),
}

/// What waits for one client.
#[repr(C)] // what a turn of the round needs, which waits for memory more than for anything else, is side by side
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    /// The way to the client, and the round it is in, where messages can be written in passing.
    passing: OnceLock<(Wire, Round)>,
    /// Whether it is in that round.
    is_queued: AtomicBool,
    /// Something was taken from whoever it is for, and nobody has looked at it yet.
    is_suspect: AtomicBool,
    waker: AtomicWaker,
    /// Told when the answers that waited were taken.
    drained: Notify,
    form: Form,
    /// What people know the user by.
    who: OnceLock<String>,
    bytes_max: usize,
}

/// A subscription that has something, and its channel.
#[derive(Clone, Copy)]
pub(crate) struct Told<'a> {
    pub(crate) id: u64,
    pub(super) channel: &'a Arc<Channel>,
}

/// What a client may do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Nothing waits; at this instant something will in any case.
    Until(Option<Instant>),
    /// There is more.
    More,
    Cut(Cut),
}

impl Outbox {
    /// `bytes_max` bounds the answers that wait.
    pub(crate) fn new(bytes_max: usize, form: Form) -> Arc<Outbox> {
        let (waiting, passing, is_queued, is_suspect, waker, drained, who) = Default::default();
        Arc::new(Outbox { waiting, passing, is_queued, is_suspect, waker, drained, form, who, bytes_max })
    }

    /// Sees to it that messages are written in passing from now on.
    pub(super) fn connect(&self, wire: Wire, round: Round) {
        _ = self.passing.set((wire, round)); // a connection has one way
    }

    /// The way to the client, if messages can be written in passing.
    pub(crate) fn wire(&self) -> Option<&Wire> {
        self.passing.get().map(|(wire, _)| wire)
    }

    /// Writes what waits, and what the subscription `told` has, of which nobody knows yet.
    pub(super) fn write(self: &Arc<Self>, told: Option<Told<'_>>, now: Instant, scratch: &mut Vec<Bytes>) {
        let Some(wire) = self.wire() else { return };
        match wire.write(self, told, now, scratch) {
            Passed::All => {}
            Passed::More => self.tell(),
            Passed::Left => self.waker.wake(),
        }
    }

    /// Has the memory of [`Outbox::write`] fetched. Takes no lock, which would wait for it.
    pub(super) fn touch(&self) {
        black_box((self.waiting.is_locked(), self.wire().map(Wire::touch), self.is_suspect()));
    }

    /// Who writes to it in passing, if somebody does.
    pub(super) fn round(&self) -> Option<&Round> {
        self.passing.get().map(|(_, round)| round)
    }

    /// Takes a place in that round; false when it has one.
    pub(super) fn queue(&self) -> bool {
        !self.is_queued.swap(true, Ordering::SeqCst)
    }

    /// Gives the place back, before what waits is taken: for what comes later it gets another.
    pub(super) fn unqueue(&self) {
        self.is_queued.store(false, Ordering::SeqCst);
    }

    /// Sees to it that what waits is written.
    fn tell(self: &Arc<Self>) {
        match self.passing.get() {
            Some((_, round)) => {
                if self.queue() && !round.tell(self.clone()) {
                    self.unqueue();
                    self.waker.wake(); // there is no round any more
                }
            }
            None => self.waker.wake(),
        }
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Says whose it is; the first word counts.
    pub(crate) fn belongs_to(&self, who: &str) {
        self.who.get_or_init(|| who.to_owned());
    }

    /// What people know the user by; empty until there is one.
    pub(super) fn who(&self) -> &str {
        self.who.get().map_or("", String::as_str)
    }

    /// Queues an answer, which goes in front of all messages that come later.
    pub(crate) fn reply(&self, json: &str) {
        self.send(self.form.frame(json));
    }

    /// Queues frames as they are.
    pub(crate) fn send(&self, frames: Bytes) {
        let mut waiting = self.waiting.lock();
        waiting.reply_bytes += frames.len();
        waiting.replies.push_back(frames);
        drop(waiting);
        self.waker.wake();
    }

    /// Whether there is room for more answers: a client that takes none is asked for nothing more.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting.lock().reply_bytes <= self.bytes_max
    }

    /// Waits until little waits to be answered: for who has much to say.
    pub(crate) async fn room(&self) {
        loop {
            let drained = self.drained.notified();
            if self.waiting.lock().reply_bytes < WRITE_BYTES {
                return;
            }
            drained.await;
        }
    }

    /// Sees to it that the task is woken when something waits. To be called before [`Outbox::take`].
    pub(crate) fn register(&self, context: &Context<'_>) {
        self.waker.register(context.waker());
    }

    /// Something was taken from whoever it is for: it is to be looked at what they may still have before anything goes out.
    pub(crate) fn suspect(&self) {
        self.is_suspect.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Whether that is so.
    pub(crate) fn is_suspect(&self) -> bool {
        self.is_suspect.load(Ordering::SeqCst)
    }

    /// The same, from who looks now.
    pub(crate) fn is_to_look(&self) -> bool {
        self.is_suspect.swap(false, Ordering::SeqCst)
    }

    /// Waits until something may wait.
    pub(crate) async fn ready(&self) {
        let mut registered = false;
        std::future::poll_fn(|context| {
            if std::mem::replace(&mut registered, true) {
                return Poll::Ready(());
            }
            self.register(context);
            let is_ready = self.is_suspect() || self.waiting.lock().has_something();
            if is_ready { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Adds a subscription, which has something from the start on.
    pub(super) fn add(&self, id: u64, channel: Arc<Channel>) {
        let mut waiting = self.waiting.lock();
        waiting.channels.push((id, channel));
        waiting.ready.push_back(id);
        drop(waiting);
        self.waker.wake();
    }

    /// Takes a subscription away.
    pub(crate) fn remove(&self, id: u64) {
        let mut waiting = self.waiting.lock();
        waiting.channels.retain(|(other, _)| *other != id);
        waiting.ready.retain(|other| *other != id);
        waiting.due.retain(|(_, other)| *other != id);
    }

    /// Tells that a subscription has something.
    pub(super) fn has_something(self: &Arc<Self>, id: u64) {
        self.note(id);
        self.tell();
    }

    /// The same, from who sees to it that it is written.
    pub(crate) fn note(&self, id: u64) {
        self.waiting.lock().ready.push_back(id);
    }

    /// Cuts the client off, and drops what waits for it.
    pub(crate) fn cut(&self, cut: Cut) {
        let mut waiting = self.waiting.lock();
        if waiting.over.is_none() {
            waiting.over = Some(Box::new(cut));
            drop(waiting);
            self.waker.wake();
        }
    }

    /// Why the client is cut off, if it is.
    pub(crate) fn over(&self) -> Option<Cut> {
        self.waiting.lock().over.as_deref().cloned()
    }

    /// Moves what waits to `out`, answers first, about as much as is written at once. The subscription `told` has
    /// something too.
    pub(crate) fn take(&self, mut told: Option<Told<'_>>, now: Instant, out: &mut Vec<Bytes>) -> Taken {
        let mut room = WRITE_BYTES;
        let mut waiting = self.waiting.lock();
        if let Some(cut @ Cut::TooSlow(_)) = waiting.over.as_deref() {
            return Taken::Cut(cut.clone());
        }
        if !waiting.replies.is_empty() {
            out.extend(waiting.replies.drain(..));
            waiting.reply_bytes = 0;
            self.drained.notify_waiters();
            if waiting.replies.capacity() > 16 {
                waiting.replies = VecDeque::new();
            }
        }
        match waiting.over.as_deref() {
            // what it was told last says more than the reason of the end
            Some(_) if !out.is_empty() => return Taken::More,
            Some(cut) => return Taken::Cut(cut.clone()),
            None => {}
        }
        waiting.list_due(now);
        let mut turns = waiting.ready.len() + usize::from(told.is_some());
        while room > 0 && turns > 0 {
            turns -= 1;
            let known;
            let (id, channel) = match waiting.next() {
                Some(next) => {
                    known = next;
                    (known.0, &known.1)
                }
                None => match told.take() {
                    Some(told) => (told.id, told.channel),
                    None => break,
                },
            };
            // a channel's lock is taken before an outbox's, never the other way round
            let turn = MutexGuard::unlocked(&mut waiting, || channel.take(id, self.form, now, &mut room, out));
            waiting.due.retain(|(_, other)| *other != id);
            match turn {
                Turn::Done => {}
                Turn::More => waiting.ready.push_back(id),
                Turn::Due(at) => waiting.due.push((at, id)),
            }
        }
        waiting.ready.extend(told.map(|told| told.id));
        match waiting.over.as_deref() {
            Some(cut) => Taken::Cut(cut.clone()),
            None if waiting.has_something() => Taken::More,
            None => {
                if waiting.ready.capacity() > 16 {
                    waiting.ready = VecDeque::new();
                }
                Taken::Until(waiting.due.iter().map(|(at, _)| *at).min())
            }
        }
    }
}

impl Waiting {
    fn has_something(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty() || self.over.is_some()
    }

    fn list_due(&mut self, now: Instant) {
        let Waiting { due, ready, .. } = self;
        due.retain(|(at, id)| {
            let waits = *at > now;
            if !waits {
                ready.push_back(*id);
            }
            waits
        });
    }

    /// The next subscription that has something.
    fn next(&mut self) -> Option<(u64, Arc<Channel>)> {
        loop {
            let id = self.ready.pop_front()?;
            // one that ended meanwhile has nothing any more
            if let Ok(at) = self.channels.binary_search_by_key(&id, |(id, _)| *id) {
                return Some((id, self.channels[at].1.clone()));
            }
        }
    }
}
