//! What waits for one client: every event up to a bound, and of states the newest value of each key.

use super::channel::Channel;
use axum::extract::ws::Utf8Bytes;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A message of a channel, encoded once for all its subscribers.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) offset: u64,
    pub(super) text: Utf8Bytes,
    pub(super) effect: Effect,
}

/// What a message does to a state.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    /// Nothing: it counts by itself.
    Event,
    /// It changes these members.
    Delta(Arc<[Touch]>),
    /// It takes the place of all there was.
    Snapshot,
}

/// A member of a state that changed.
#[derive(Clone, Debug)]
pub(super) struct Touch {
    pub(super) name: Arc<str>,
    /// Its new value, if that is a final row.
    pub(super) last_final: Option<Arc<str>>,
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

/// Messages of a state that the client gets as one.
#[derive(Debug)]
pub(super) struct Folded {
    pub(super) changed: Changed,
    /// How many they are.
    pub(super) messages: u64,
}

/// Members of a state that changed since the client last heard of them.
#[derive(Debug)]
pub(super) enum Changed {
    /// Each with the last final row it had meanwhile.
    Some(HashMap<Arc<str>, Option<Arc<str>>>),
    All,
}

impl Folded {
    fn new() -> Folded {
        Folded { changed: Changed::Some(HashMap::new()), messages: 0 }
    }

    fn add(&mut self, frame: &Frame) {
        self.messages += 1;
        match (&mut self.changed, &frame.effect) {
            (Changed::Some(members), Effect::Delta(touches)) => {
                for Touch { name, last_final } in touches.iter() {
                    let last = members.entry(name.clone()).or_default();
                    if last_final.is_some() {
                        last.clone_from(last_final);
                    }
                }
            }
            _ => self.changed = Changed::All,
        }
    }
}

/// What waits for one subscription.
struct Slot {
    channel: Arc<Channel>,
    frames: VecDeque<Frame>,
    bytes: usize,
    folded: Option<Folded>,
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
    /// Bytes of `replies`.
    reply_bytes: usize,
    /// Why the client is cut off.
    over: Option<String>,
}

/// What waits for one client.
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
    room: Notify,
    bytes_max: usize,
}

/// What a client may do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Wait for more; at this instant there will be some in any case.
    Until(Option<Instant>),
    /// Too much was waiting, and is dropped: the client has to come back. Says where that was.
    TooSlow(String),
}

impl Outbox {
    pub(crate) fn new(bytes_max: usize) -> Arc<Outbox> {
        Arc::new(Outbox { waiting: Mutex::default(), wake: Notify::new(), room: Notify::new(), bytes_max })
    }

    /// Queues an answer, which goes in front of all messages that come later.
    pub(crate) fn reply(&self, text: impl Into<Utf8Bytes>) {
        let text = text.into();
        let mut waiting = self.waiting.lock();
        waiting.reply_bytes += text.len();
        waiting.replies.push_back(text);
        drop(waiting);
        self.wake.notify_one();
    }

    /// Returns when there is room for more answers: a client that takes none is asked for nothing more.
    pub(crate) async fn room(&self) {
        while self.waiting.lock().reply_bytes > self.bytes_max {
            self.room.notified().await;
        }
    }

    /// Returns when something waits; it may return without.
    pub(crate) async fn ready(&self) {
        self.wake.notified().await;
    }

    /// Returns when too much waits.
    pub(crate) async fn too_slow(&self) {
        while self.waiting.lock().over.is_none() {
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
        if waiting.over.is_some() {
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
                    let name = slot.channel.short_name();
                    let over = format!("too slow for {name}, now at {}: resume with `since`", frame.offset);
                    *waiting = Waiting { over: Some(over), ..Waiting::default() };
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
            if let Some(over) = &waiting.over {
                return Taken::TooSlow(over.clone());
            }
            out.extend(waiting.replies.drain(..));
            waiting.reply_bytes = 0;
            self.room.notify_one();
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
    pub(super) fn take_folded(&self, id: u64, now: Instant) -> Option<Folded> {
        let mut waiting = self.waiting.lock();
        let slot = waiting.slots.get_mut(&id)?;
        slot.due = slot.rate.map(|rate| now + rate);
        slot.folded.take()
    }
}

impl Slot {
    fn fold_in(&mut self, frame: &Frame, size: usize) {
        if matches!(frame.effect, Effect::Event) {
            // what is folded comes behind it, as a snapshot: a delta of a lower offset would be taken for a repeat
            if let Some(folded) = &mut self.folded {
                folded.changed = Changed::All;
            }
            return self.frames.push_back(frame.clone());
        }
        let waiting: usize = self.frames.iter().map(|frame| frame.text.len()).sum();
        match &mut self.folded {
            Some(folded) => folded.add(frame),
            None if self.rate.is_some() => self.folded.insert(Folded::new()).add(frame),
            None if !self.frames.is_empty() && waiting + size > FOLD_BYTES => {
                let folded = self.folded.insert(Folded::new());
                let mut events = VecDeque::new();
                for frame in self.frames.drain(..) {
                    match frame.effect {
                        Effect::Event => events.push_back(frame),
                        Effect::Delta(_) | Effect::Snapshot => folded.add(&frame),
                    }
                }
                if !events.is_empty() {
                    folded.changed = Changed::All;
                }
                self.frames = events;
                folded.add(frame);
                metrics::counter!("tidewatch_ws_folded_total").increment(1);
            }
            None => self.frames.push_back(frame.clone()),
        }
    }
}
