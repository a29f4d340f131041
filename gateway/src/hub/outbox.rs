//! What waits for one client: every event up to a bound, and of states the newest value of each key.

use super::channel::Channel;
use axum::extract::ws::Utf8Bytes;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A message of a channel, encoded once for all its subscribers.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) offset: u64,
    pub(super) text: Utf8Bytes,
    /// Names of the members of a state that it changes; `None` for a snapshot, which changes all.
    pub(super) names: Option<Arc<[Arc<str>]>>,
}

/// What a subscription does when its client reads more slowly than updates come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WhenSlow {
    /// Keep the newest value of each member.
    Fold,
    /// Keep every message up to the client's bound, then close.
    Close,
}

/// Bytes of a state's messages that wait for one subscription before they are folded: enough that a client that
/// keeps up gets the shared messages, little enough that one that does not has no old values in front of the new.
const FOLD_BYTES: usize = 64 << 10;

/// Members of a state that changed since the client last heard of them.
#[derive(Debug)]
pub(super) enum Changed {
    Some(HashSet<Arc<str>>),
    All,
}

impl Changed {
    fn add(&mut self, frame: &Frame) {
        match (&mut *self, &frame.names) {
            (Changed::Some(names), Some(more)) => names.extend(more.iter().cloned()),
            _ => *self = Changed::All,
        }
    }
}

/// What waits for one subscription.
struct Slot {
    channel: Arc<Channel>,
    frames: VecDeque<Frame>,
    bytes: usize,
    folded: Option<Changed>,
    /// Least time between two messages of a state.
    rate: Option<Duration>,
    due: Option<Instant>,
    /// In [`Waiting::order`].
    listed: bool,
}

#[derive(Default)]
struct Waiting {
    replies: VecDeque<Utf8Bytes>,
    slots: HashMap<u64, Slot>,
    /// Subscriptions that have something, in the order in which they got it.
    order: VecDeque<u64>,
    /// Of the messages that must not be folded.
    bytes: usize,
    is_over: bool,
}

/// What waits for one client.
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
    bytes_max: usize,
}

/// What a client may do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Wait for more; at this instant there will be some in any case.
    Until(Option<Instant>),
    /// Too much was waiting, and is dropped: the client has to come back.
    TooSlow,
}

impl Outbox {
    pub(crate) fn new(bytes_max: usize) -> Arc<Outbox> {
        Arc::new(Outbox { waiting: Mutex::default(), wake: Notify::new(), bytes_max })
    }

    /// Queues an answer, which goes in front of all messages that come later.
    pub(crate) fn reply(&self, text: impl Into<Utf8Bytes>) {
        self.waiting.lock().replies.push_back(text.into());
        self.wake.notify_one();
    }

    /// Returns when something waits; it may return without.
    pub(crate) async fn ready(&self) {
        self.wake.notified().await;
    }

    /// Returns when too much waits.
    pub(crate) async fn too_slow(&self) {
        while !self.waiting.lock().is_over {
            self.wake.notified().await;
        }
    }

    /// Makes room for a subscription, with what it gets first.
    pub(super) fn add(&self, id: u64, channel: Arc<Channel>, rate: Option<Duration>, first: Vec<Frame>) {
        let mut waiting = self.waiting.lock();
        let listed = !first.is_empty();
        let slot = Slot { channel, frames: first.into(), bytes: 0, folded: None, rate, due: None, listed };
        waiting.slots.insert(id, slot);
        if listed {
            waiting.order.push_back(id);
        }
        drop(waiting);
        self.wake.notify_one();
    }

    pub(super) fn remove(&self, id: u64) {
        let mut waiting = self.waiting.lock();
        if let Some(slot) = waiting.slots.remove(&id) {
            waiting.bytes = waiting.bytes.saturating_sub(slot.bytes);
            waiting.order.retain(|other| *other != id);
        }
    }

    /// Queues a message: whether the subscription still stands.
    pub(super) fn push(&self, id: u64, frame: &Frame, when_slow: WhenSlow) -> bool {
        let mut guard = self.waiting.lock();
        let waiting = &mut *guard;
        if waiting.is_over {
            return false;
        }
        let Some(slot) = waiting.slots.get_mut(&id) else { return false };
        let size = frame.text.len();
        match when_slow {
            WhenSlow::Close => {
                waiting.bytes += size;
                slot.bytes += size;
                slot.frames.push_back(frame.clone());
                if waiting.bytes > self.bytes_max {
                    *waiting = Waiting { is_over: true, ..Waiting::default() };
                    metrics::counter!("tidewatch_ws_slow_closed_total").increment(1);
                    drop(guard);
                    self.wake.notify_one();
                    return false;
                }
            }
            WhenSlow::Fold => slot.fold_in(frame, size),
        }
        if !slot.listed {
            slot.listed = true;
            waiting.order.push_back(id);
        }
        drop(guard);
        self.wake.notify_one();
        true
    }

    /// Moves all that waits to `out`, answers first.
    pub(crate) fn take(&self, now: Instant, out: &mut Vec<Utf8Bytes>) -> Taken {
        let mut folded = Vec::new();
        let mut until: Option<Instant> = None;
        {
            let mut guard = self.waiting.lock();
            let waiting = &mut *guard;
            if waiting.is_over {
                return Taken::TooSlow;
            }
            out.extend(waiting.replies.drain(..));
            for id in std::mem::take(&mut waiting.order) {
                let Some(slot) = waiting.slots.get_mut(&id) else { continue };
                out.extend(slot.frames.drain(..).map(|frame| frame.text));
                waiting.bytes = waiting.bytes.saturating_sub(std::mem::take(&mut slot.bytes));
                slot.listed = false;
                match (&slot.folded, slot.due) {
                    (None, _) => {}
                    (Some(_), Some(due)) if due > now => {
                        until = Some(until.map_or(due, |until| until.min(due)));
                        slot.listed = true;
                        waiting.order.push_back(id);
                    }
                    (Some(_), _) => folded.push((slot.channel.clone(), id)),
                }
            }
        }
        // a channel's lock is taken before an outbox's, never the other way round
        folded.into_iter().for_each(|(channel, id)| channel.unfold(id, self, now, out));
        Taken::Until(until)
    }

    /// What changed for a folded subscription, which starts over. For [`Channel::unfold`], under the channel's lock.
    pub(super) fn take_folded(&self, id: u64, now: Instant) -> Option<Changed> {
        let mut waiting = self.waiting.lock();
        let slot = waiting.slots.get_mut(&id)?;
        slot.due = slot.rate.map(|rate| now + rate);
        slot.folded.take()
    }
}

impl Slot {
    fn fold_in(&mut self, frame: &Frame, size: usize) {
        let waiting: usize = self.frames.iter().map(|frame| frame.text.len()).sum();
        match &mut self.folded {
            Some(changed) => changed.add(frame),
            None if self.rate.is_some() => {
                let mut changed = Changed::Some(HashSet::new());
                changed.add(frame);
                self.folded = Some(changed);
            }
            None if !self.frames.is_empty() && waiting + size > FOLD_BYTES => {
                let mut changed = Changed::Some(HashSet::new());
                self.frames.drain(..).for_each(|frame| changed.add(&frame));
                changed.add(frame);
                self.folded = Some(changed);
                metrics::counter!("tidewatch_ws_folded_total").increment(1);
            }
            None => self.frames.push_back(frame.clone()),
        }
    }
}
