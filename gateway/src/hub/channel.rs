//! One channel: numbers its messages, keeps the last of them, and hands each to every subscriber. A state channel also
//! keeps what its messages add up to.

use super::fanout::{Listener, Listeners};
use super::feed::{Feeds, Parcel, Sent};
use super::load::Asked;
use super::name::{ChannelName, Topic};
use super::outbox::{Cut, Outbox};
use super::place;
use super::remote::Back;
use super::ring::{Bounds, Chunk, Form, Ring};
use super::state::{Op, State};
use crate::agui::{self, Dialect};
use crate::problem::Problem;
use crate::socket::frame;
use actors::What;
use axum::http::StatusCode;
use bytes::Bytes;
use engine::event::WorkspaceId;
use indexmap::IndexMap;
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, mpsc};

/// A larger state is not sent: its client asks for less of it.
const SNAPSHOT_BYTES_MAX: usize = 8 << 20;
/// Changes of a state beyond this are sent in several messages.
const DELTA_BYTES: usize = 256 << 10;

/// A client of a state that is further behind gets the newest values instead of every message: enough that one that
/// keeps up gets the shared messages, little enough that one that does not has no old values in front of the new.
const FOLD_BYTES: usize = 64 << 10;

/// Ranges of offsets of which a channel knows that they are those of a repeat.
const REPEATS_MAX: usize = 64;

/// Bytes of the histories of all channels together; beyond them each keeps its last message only.
pub(super) const HISTORIES_BYTES_MAX: usize = 256 << 20;

/// Where a client was when it left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Since {
    pub(crate) epoch: String,
    pub(crate) offset: u64,
}

/// What a subscription asks for.
pub(super) struct Wish<'a> {
    pub(super) id: u64,
    pub(super) outbox: &'a Arc<Outbox>,
    pub(super) since: Option<Since>,
    pub(super) rate: Option<Duration>,
    /// Echoed in the answer.
    pub(super) reference: Option<Value>,
    /// How events of runs are written for it.
    pub(super) dialect: Dialect,
    /// The run that it is about.
    pub(super) run: Option<String>,
    /// Messages that are not held: those behind `since`, or a run that is shown again.
    pub(super) missed: Option<Missed>,
    /// Asks for what stands in the place of messages that nobody can give it any more.
    pub(super) instead: Option<mpsc::Sender<()>>,
    /// The subscriber is a node that may follow the channel's feed.
    pub(super) is_node: bool,
}

/// The first of the messages that a subscriber gets from elsewhere.
pub(super) struct Missed {
    pub(super) page: Page,
    /// How many there are of a run that is shown again; nothing for messages that have their places in the channel.
    pub(super) repeated: Option<u64>,
    /// Asks for the next page.
    pub(super) asks: mpsc::Sender<()>,
}

/// Messages that a channel does not hold: all up to `until`.
pub(super) struct Page {
    pub(super) until: u64,
    /// Each with its offset; of a run that is shown again, with its number in the run.
    pub(super) messages: Vec<(u64, String)>,
    /// There are more where they came from. Those of a log end where the channel's own begin.
    pub(super) has_more: bool,
}

/// The newest of the runs that a channel tells of.
pub(super) struct Sequence {
    run: String,
    /// Offset of its first message.
    start: u64,
    is_over: bool,
}

/// What a channel's messages are.
pub(super) enum Body {
    /// The state it starts from is being read; what happens meanwhile is kept.
    Loading(Meanwhile),
    /// Each counts by itself.
    Events {
        /// A subscriber that comes while a run goes on gets it from its start.
        last: Option<Sequence>,
    },
    /// They add up to a state.
    State(State),
    /// They come from another node, which knows what they are.
    Remote { is_state: bool },
}

/// What happened while a state was read.
#[derive(Default)]
pub(super) struct Meanwhile {
    pub(super) updates: Vec<What>,
    /// There was more than could be kept: the state has to be read again.
    pub(super) has_missed: bool,
}

pub(super) struct Channel {
    pub(super) workspace: Option<WorkspaceId>,
    pub(super) name: ChannelName,
    /// Columns of a stream that hold JSON.
    pub(super) json_columns: Vec<String>,
    /// Set once the state it starts from is there.
    pub(super) loaded: OnceCell<()>,
    /// That its metric failed, for who comes later.
    pub(super) failed: Mutex<Option<String>>,
    /// The live query that it shows, while it is open.
    pub(super) asked: Mutex<Option<Asked>>,
    epoch: Arc<str>,
    /// All of a message up to its offset.
    head: String,
    /// Bytes that a client of events may be behind before it is cut off.
    queue_bytes: usize,
    /// Bytes of the histories of all channels.
    histories: Arc<AtomicUsize>,
    /// Where other nodes get its messages, if they may.
    feed: Option<(Arc<Feeds>, Arc<str>)>,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    /// Of the last message.
    offset: u64,
    /// Offsets of runs that were shown again to one subscriber: nobody else has them, and who has some has not all.
    repeats: VecDeque<Range<u64>>,
    ring: Ring,
    /// In the order in which they came, as far as none has gone: who goes through all of them goes through memory.
    subscribers: IndexMap<u64, Subscriber>,
    /// Subscribers that have everything: who is told when there is more.
    waiting: Listeners,
    /// Subscribers of a state that do not get its changes before their time: who is told of an event only.
    delayed: Listeners,
    pub(super) body: Body,
    /// Of the last message that counts by itself.
    last_event: u64,
    /// The state as one message, at its offset.
    snapshot: Option<Arc<Chunk>>,
    /// Subscribers that have asked for the feed: while there is one, messages are published.
    fed: HashSet<u64>,
    /// Up to which offset.
    published: u64,
    /// Since when nobody listens.
    idle_since: Option<Instant>,
    /// Taken out of the hub: a new one takes its place.
    is_closed: bool,
}

struct Subscriber {
    outbox: Arc<Outbox>,
    at: At,
    /// What it gets from elsewhere before it goes on from there.
    behind: VecDeque<Behind>,
    dialect: Dialect,
    /// Least time between two messages of a state.
    rate: Option<Duration>,
    due: Option<Instant>,
    /// Events of a state channel up to this offset were given before their turn; then only the whole state is behind
    /// them.
    ahead: Option<u64>,
    /// Where it is sent back to when its messages come this way no more, on a node that has them from another one.
    back: Option<mpsc::UnboundedSender<Back>>,
}

/// Messages that a channel does not hold, on their way to a subscriber a page at a time.
struct Behind {
    frames: VecDeque<Bytes>,
    has_more: bool,
    /// Of what is no message of the channel, a run that is shown again or a snapshot, the offset before it.
    base: Option<u64>,
    asks: mpsc::Sender<()>,
}

/// What a subscriber has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// Nothing: it gets the state as it is.
    Start,
    /// Every message up to this offset, or what they add up to.
    After(u64),
    /// It gets them from the feed.
    Fed,
}

/// What comes next for a subscriber that was given something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// It has everything, and is told when there is more.
    Done,
    More,
    /// There is more, not to be sent before this instant.
    Due(Instant),
}

impl Channel {
    /// A channel nobody listens to yet; its first message follows `offset`.
    pub(super) fn new(
        (workspace, name): (Option<WorkspaceId>, ChannelName),
        (epoch, offset): (Arc<str>, u64),
        json_columns: Vec<String>,
        body: Body,
        (bounds, queue_bytes, histories): (Bounds, usize, Arc<AtomicUsize>),
        feed: Option<(Arc<Feeds>, Arc<str>)>,
        now: Instant,
    ) -> Channel {
        let head = format!(
            "{{\"type\":\"event\",\"workspace\":{},\"channel\":{},\"epoch\":{},\"offset\":",
            json!(workspace),
            json!(*name.text),
            json!(*epoch)
        );
        let inner = Inner {
            offset,
            repeats: VecDeque::new(),
            ring: Ring::new(bounds, offset, now),
            subscribers: IndexMap::new(),
            waiting: Listeners::default(),
            delayed: Listeners::default(),
            body,
            last_event: 0,
            snapshot: None,
            fed: HashSet::new(),
            published: 0,
            idle_since: Some(now),
            is_closed: false,
        };
        let (loaded, failed, asked, inner) = (OnceCell::new(), Mutex::default(), Mutex::default(), Mutex::new(inner));
        Channel {
            workspace,
            name,
            json_columns,
            loaded,
            failed,
            asked,
            epoch,
            head,
            queue_bytes,
            histories,
            feed,
            inner,
        }
    }

    /// The channel's name in a few bytes, for the reason of a close.
    pub(super) fn short_name(&self) -> &str {
        let text = &*self.name.text;
        &text[..text.floor_char_boundary(40)]
    }

    /// Sends an event, of whatever kind, to all subscribers.
    pub(super) fn event(self: &Arc<Self>, event: &str) {
        let mut inner = self.inner.lock();
        self.push(&mut inner, event, true);
        self.tell(inner);
    }

    /// Sends the messages of one record of the log, unless the channel is behind it already.
    pub(super) fn events_at(self: &Arc<Self>, record: u64, messages: &[String]) {
        let mut inner = self.inner.lock();
        for (at, message) in messages.iter().enumerate() {
            let offset = place::of(record, at);
            if offset > inner.offset {
                inner.offset = offset - 1;
                self.push(&mut inner, message, true);
            }
        }
        self.tell(inner);
    }

    /// As [`Channel::event`], for one that is kept although nobody listens.
    pub(super) fn event_to_keep(self: &Arc<Self>, event: &str, now: Instant) {
        self.keep(self.inner.lock(), event, now);
    }

    /// As [`Channel::event_to_keep`], for one of a run: a subscriber that comes within it gets it from its start.
    pub(super) fn event_of_run(self: &Arc<Self>, run: &str, event: &str, is_first: bool, is_last: bool, now: Instant) {
        let mut inner = self.inner.lock();
        let start = inner.offset + 1;
        if let Body::Events { last } = &mut inner.body {
            if is_first {
                *last = Some(Sequence { run: run.to_owned(), start, is_over: false });
            }
            if let Some(last) = last.as_mut().filter(|last| last.run == run) {
                last.is_over = is_last;
            }
        }
        self.keep(inner, event, now);
    }

    fn keep(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, event: &str, now: Instant) {
        if inner.subscribers.is_empty() {
            inner.idle_since = Some(now); // what goes on is not idle
        }
        self.push(&mut inner, event, true);
        self.tell(inner);
    }

    /// Runs `change` on the state and tells all subscribers the changes it finds, in their order.
    pub(super) fn update(self: &Arc<Self>, change: impl FnOnce(&State) -> Vec<Op>) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let Body::State(state) = &mut inner.body else { return };
        let mut deltas = Vec::new();
        let mut delta = String::new();
        for op in change(state) {
            state.write(&op, &mut delta);
            state.apply(op, inner.offset + deltas.len() as u64 + 1);
            if delta.len() >= DELTA_BYTES {
                deltas.push(std::mem::take(&mut delta));
            }
        }
        if !delta.is_empty() {
            deltas.push(delta);
        }
        for delta in deltas {
            self.push(inner, &delta_event(&delta), false);
        }
        self.tell(guard);
    }

    /// Whether it is a state, and an empty one.
    pub(super) fn is_empty(&self) -> bool {
        matches!(&self.inner.lock().body, Body::State(state) if state.is_empty())
    }

    /// Empties the state: what it said is void.
    pub(super) fn reset(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        let offset = inner.offset + 1;
        let Body::State(state) = &mut inner.body else { return };
        state.clear(offset);
        let event = snapshot_event(state);
        self.push(&mut inner, &event, false);
        self.tell(inner);
    }

    /// Appends a message, and lets go of what is over the bounds, together with clients that still needed it.
    fn push(&self, inner: &mut Inner, event: &str, is_event: bool) {
        let now = Instant::now();
        let scarce = self.histories.load(Ordering::Relaxed) > HISTORIES_BYTES_MAX;
        if scarce {
            inner.ring.seal();
        }
        inner.offset += 1;
        inner.snapshot = None;
        if is_event {
            inner.last_event = inner.offset;
            inner.waiting.append(&mut inner.delayed);
        }
        let bytes = inner.ring.push(&self.head, inner.offset, event, is_event, now);
        self.histories.fetch_add(bytes, Ordering::Relaxed);
        if let (Some((feeds, topic)), false) = (&self.feed, inner.fed.is_empty()) {
            let sent = Sent { offset: inner.offset, is_event, event: event.to_owned() };
            feeds.publish(topic, inner.published, sent);
            inner.published = inner.offset;
        }
        if inner.ring.is_untrimmed() {
            self.trim(inner, scarce, now);
        }
    }

    fn trim(&self, inner: &mut Inner, scarce: bool, now: Instant) {
        let keeps_all = matches!(inner.body, Body::Events { .. } | Body::Remote { is_state: false });
        let positions = inner.subscribers.values().filter_map(Subscriber::needs_from);
        let slowest = if keeps_all && (scarce || inner.ring.is_over(now)) { positions.min() } else { None };
        let slack = if scarce { 0 } else { self.queue_bytes };
        let dropped = inner.ring.trim(slowest, slack, scarce, now);
        if dropped == 0 {
            return;
        }
        self.histories.fetch_sub(dropped, Ordering::Relaxed);
        if slowest.is_some_and(|at| !inner.ring.holds(at)) {
            let Inner { subscribers, ring, offset, idle_since, .. } = inner;
            subscribers.retain(|_, subscriber| {
                let holds = subscriber.needs_from().is_none_or(|at| ring.holds(at));
                if !holds {
                    self.cut(subscriber, *offset);
                }
                holds
            });
            if subscribers.is_empty() && idle_since.is_none() {
                *idle_since = Some(now);
            }
        }
    }

    /// Sends a subscriber away that needs what is not held any more.
    fn cut(&self, subscriber: &Subscriber, offset: u64) {
        metrics::counter!("tidewatch_ws_slow_closed_total").increment(1);
        let why = format!("too slow for {}, now at {offset}: resume with `since`", self.short_name());
        subscriber.outbox.cut(Cut::TooSlow(why));
    }

    /// Drops what is too old, and tells the histories' bytes. For the hub's sweep.
    pub(super) fn sweep(&self, now: Instant) {
        let mut inner = self.inner.lock();
        self.trim(&mut inner, false, now);
    }

    /// Wakes the subscribers that had everything so far.
    fn tell(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        waiting.tell(self);
    }

    /// Adds a subscriber and queues what it gets first: the answer, then what it missed or a snapshot. `None` when the
    /// channel was taken out of the hub meanwhile.
    pub(super) fn subscribe(self: &Arc<Self>, wish: &Wish<'_>) -> Option<Result<(), Problem>> {
        let inner = &mut *self.inner.lock();
        if inner.is_closed {
            return None;
        }
        let is_repeat = wish.missed.as_ref().is_some_and(|missed| missed.repeated.is_some());
        let since = wish.since.as_ref().filter(|since| !is_repeat && self.knows(inner, since));
        let since = since.filter(|since| wish.missed.is_some() || inner.ring.holds(since.offset));
        let since = since.map(|since| since.offset);
        let (mut at, offset) = match (since, &inner.body) {
            (Some(since), _) => (wish.missed.as_ref().map_or(since, |missed| missed.page.until), since),
            (None, Body::State(state)) => {
                if let Err(problem) = self.check_size(state) {
                    return Some(Err(problem));
                }
                (inner.offset, inner.offset)
            }
            (None, Body::Events { last: Some(last) })
                if !is_repeat
                    && (!last.is_over || wish.run.as_ref() == Some(&last.run))
                    && inner.ring.holds(last.start - 1) =>
            {
                (last.start - 1, last.start - 1)
            }
            (None, Body::Events { .. } | Body::Loading(_) | Body::Remote { .. }) => (inner.offset, inner.offset),
        };
        let mut answer = json!({
            "type": "ok", "channel": *self.name.text, "epoch": *self.epoch, "offset": offset,
            "recovered": since.is_some(),
        });
        if let Some(reference) = &wish.reference {
            answer["ref"] = reference.clone();
        }
        if let (true, None, Some((feeds, topic))) = (wish.is_node, wish.rate, &self.feed) {
            let state = matches!(inner.body, Body::State(_));
            answer["feed"] = json!({"topic": **topic, "beat": feeds.beat(), "state": state});
        }
        wish.outbox.reply(&answer.to_string());
        wish.outbox.add(wish.id, self.clone());
        let mut behind = VecDeque::new();
        if let Some(missed) = wish.missed.as_ref().filter(|_| is_repeat || since.is_some()) {
            let base = missed.repeated.map(|messages| inner.reserve(messages));
            if base.is_some() {
                at = inner.offset;
            }
            let (frames, has_more) = (self.frames(&missed.page, base, wish.outbox.form()), missed.page.has_more);
            behind.push_back(Behind { frames, has_more, base, asks: missed.asks.clone() });
        }
        if since.is_none()
            && let Some(asks) = wish.instead.clone()
        {
            // at the offset behind which it goes on, as the snapshot of a state is
            behind.push_back(Behind { frames: VecDeque::new(), has_more: true, base: Some(at), asks });
        }
        let is_whole = since.is_none() && matches!(inner.body, Body::State(_));
        let subscriber = Subscriber {
            outbox: wish.outbox.clone(),
            at: if is_whole { At::Start } else { At::After(at) },
            behind,
            dialect: wish.dialect,
            rate: wish.rate,
            due: None,
            ahead: None,
            back: None,
        };
        inner.subscribers.insert(wish.id, subscriber);
        inner.idle_since = None;
        Some(Ok(()))
    }

    /// Whether a position is one of this channel, of which its client has everything.
    fn knows(&self, inner: &Inner, since: &Since) -> bool {
        let is_within = |repeat: &Range<u64>| repeat.contains(&since.offset);
        *since.epoch == *self.epoch && since.offset <= inner.offset && !inner.repeats.iter().any(is_within)
    }

    /// Whether a client that was there gets all that it missed.
    pub(super) fn recovers(&self, since: &Since) -> bool {
        let inner = self.inner.lock();
        self.knows(&inner, since) && inner.ring.holds(since.offset)
    }

    fn frames(&self, page: &Page, base: Option<u64>, form: Form) -> VecDeque<Bytes> {
        let (now, base) = (Instant::now(), base.unwrap_or(0));
        let one = |(at, event): &(u64, String)| Chunk::single(&self.head, base + at, 1, event, now).whole(form);
        page.messages.iter().map(one).collect()
    }

    /// Shows a run again to a subscriber, behind what it has not taken yet.
    pub(super) fn repeat(&self, id: u64, missed: &Missed) {
        let Some(messages) = missed.repeated else { return };
        let mut inner = self.inner.lock();
        let base = inner.reserve(messages);
        let Inner { subscribers, ring, offset, waiting, .. } = &mut *inner;
        let Some(subscriber) = subscribers.get_mut(&id) else { return };
        let form = subscriber.outbox.form();
        let mut frames = VecDeque::new();
        if let At::After(at) = subscriber.at {
            let (mut room, mut first) = (usize::MAX, Vec::new()); // all of it: it is bounded already
            take_events(ring, at, subscriber.dialect, form, &mut room, &mut first);
            frames.extend(first);
        }
        frames.extend(self.frames(&missed.page, Some(base), form));
        let (has_more, asks) = (missed.page.has_more, missed.asks.clone());
        subscriber.behind.push_back(Behind { frames, has_more, base: Some(base), asks });
        subscriber.at = At::After(*offset);
        // whoever does not wait is being given something already, and comes to this
        if waiting.remove(id) {
            subscriber.outbox.has_something(id);
        }
    }

    /// Writes events of runs for a subscriber in this dialect from now on.
    pub(super) fn speak(&self, id: u64, dialect: Dialect) {
        if let Some(subscriber) = self.inner.lock().subscribers.get_mut(&id) {
            subscriber.dialect = dialect;
        }
    }

    /// Where a subscriber is that gets messages from the log, and up to which offset they are not held here.
    pub(super) fn position(&self, id: u64) -> Option<(u64, u64)> {
        let inner = self.inner.lock();
        match inner.subscribers.get(&id)?.at {
            At::After(at) => Some((at, inner.ring.from())),
            At::Start | At::Fed => None,
        }
    }

    /// Hands a subscriber the next page of what it asked for.
    pub(super) fn give(&self, id: u64, page: &Page) {
        let mut inner = self.inner.lock();
        let Some(subscriber) = inner.subscribers.get_mut(&id) else { return };
        let form = subscriber.outbox.form();
        let Some(behind) = subscriber.behind.front_mut() else { return };
        behind.frames = self.frames(page, behind.base, form);
        behind.has_more = page.has_more;
        if behind.base.is_none() {
            subscriber.at = At::After(page.until);
        }
        subscriber.outbox.has_something(id);
    }

    /// What a subscriber needs is not in the log any more.
    pub(super) fn lose(&self, id: u64) {
        let mut inner = self.inner.lock();
        inner.fed.remove(&id);
        if let Some(subscriber) = inner.subscribers.swap_remove(&id) {
            self.cut(&subscriber, inner.offset);
        }
    }

    /// Where the position of a client of a stream is in the log and not held here any more: the messages behind it, up
    /// to and with the second offset, are missing.
    pub(super) fn not_held(&self, since: Option<&Since>) -> Option<(u64, u64)> {
        let is_stream = matches!(self.name.topic, Topic::Stream(_));
        let since = since.filter(|since| is_stream && *since.epoch == *self.epoch)?.offset;
        let from = self.inner.lock().ring.from();
        (since < from).then_some((since, from))
    }

    /// Lists connections that follow it, each with the name of its user.
    pub(super) fn list_connections(&self, connections: &mut HashMap<*const Outbox, String>) {
        for Subscriber { outbox, .. } in self.inner.lock().subscribers.values() {
            connections.entry(Arc::as_ptr(outbox)).or_insert_with(|| outbox.who().to_owned());
        }
    }

    /// Hands a subscriber over to the channel's feed: once it has everything it is told up to where, and what comes behind
    /// that is published.
    pub(super) fn feed(&self, id: u64) -> bool {
        let mut inner = self.inner.lock();
        let Inner { subscribers, waiting, fed, published, offset, .. } = &mut *inner;
        let Some(subscriber) = subscribers.get(&id).filter(|_| self.feed.is_some()) else { return false };
        if fed.is_empty() {
            *published = *offset;
        }
        fed.insert(id);
        if waiting.remove(id) {
            subscriber.outbox.has_something(id);
        }
        true
    }

    /// Hands a client all messages behind `offset` that come from another node. False where some of them are not known.
    pub(super) fn attach(
        self: &Arc<Self>,
        id: u64,
        outbox: &Arc<Outbox>,
        offset: u64,
        back: mpsc::UnboundedSender<Back>,
    ) -> bool {
        let inner = &mut *self.inner.lock();
        if inner.subscribers.is_empty() && (offset > inner.offset || !inner.ring.holds(offset)) {
            self.restart(inner, offset);
        }
        if inner.is_closed || !inner.ring.holds(offset) {
            return false;
        }
        let subscriber = Subscriber {
            outbox: outbox.clone(),
            at: At::After(offset),
            behind: VecDeque::new(),
            dialect: Dialect::Current,
            rate: None,
            due: None,
            ahead: None,
            back: Some(back),
        };
        outbox.add(id, self.clone());
        inner.subscribers.insert(id, subscriber);
        inner.idle_since = None;
        true
    }

    /// Goes on behind `offset`: what was before it is not held.
    fn restart(&self, inner: &mut Inner, offset: u64) {
        self.histories.fetch_sub(inner.ring.bytes(), Ordering::Relaxed);
        inner.ring.restart(offset, Instant::now());
        inner.offset = offset;
    }

    /// Takes messages of another node. False where some are missing before them.
    pub(super) fn receive(self: &Arc<Self>, parcel: &Parcel) -> bool {
        let mut inner = self.inner.lock();
        if parcel.before > inner.offset {
            if !inner.subscribers.is_empty() {
                return false;
            }
            self.restart(&mut inner, parcel.before);
        }
        for Sent { offset, is_event, event } in &parcel.messages {
            if *offset > inner.offset {
                inner.offset = offset - 1;
                self.push(&mut inner, event, *is_event);
            }
        }
        self.tell(inner);
        true
    }

    /// Its messages come this way no more: sends all back to where they came from.
    pub(super) fn send_back(&self) {
        let inner = &mut *self.inner.lock();
        inner.is_closed = true;
        inner.waiting = Listeners::default();
        for (id, Subscriber { at, back, .. }) in inner.subscribers.drain(..) {
            if let (At::After(offset), Some(back)) = (at, back) {
                _ = back.send(Back { id, offset }); // whoever is gone needs nothing
            }
        }
    }

    pub(super) fn unsubscribe(&self, id: u64, now: Instant) {
        let mut inner = self.inner.lock();
        inner.fed.remove(&id);
        inner.subscribers.swap_remove(&id);
        inner.waiting.remove(id);
        inner.delayed.remove(id);
        if inner.subscribers.is_empty() && inner.idle_since.is_none() {
            inner.idle_since = Some(now);
        }
    }

    fn check_size(&self, state: &State) -> Result<(), Problem> {
        if state.bytes() <= SNAPSHOT_BYTES_MAX {
            return Ok(());
        }
        let detail = format!(
            "the state of `{}` is {} bytes, more than the {SNAPSHOT_BYTES_MAX} that are sent; subscribe with a filter",
            self.name.text,
            state.bytes()
        );
        Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "state_too_large", detail))
    }

    /// Has the memory of [`Channel::take`] fetched for these.
    pub(super) fn touch(&self, listeners: &[Listener]) {
        let inner = self.inner.lock();
        for (id, _) in listeners {
            black_box(
                inner.subscribers.get(id).map(|subscriber| (subscriber.at, subscriber.due, subscriber.behind.len())),
            );
        }
    }

    /// Gives a subscriber what it does not have yet, until `room` bytes are full.
    pub(super) fn take(&self, id: u64, form: Form, now: Instant, room: &mut usize, out: &mut Vec<Bytes>) -> Turn {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let Some(subscriber) = inner.subscribers.get_mut(&id) else { return Turn::Done };
        if subscriber.due.is_some() {
            inner.delayed.remove(id);
        }
        if let Some(turn) = subscriber.catch_up(&inner.ring, room, out) {
            return turn;
        }
        let at = match (subscriber.at, &inner.body) {
            (At::Fed, _) => return Turn::Done,
            // its node folds what it is behind
            (At::After(at), Body::Remote { is_state: true })
                if !inner.ring.holds(at) || inner.ring.bytes_behind(at) > FOLD_BYTES =>
            {
                if let Some(back) = &subscriber.back {
                    _ = back.send(Back { id, offset: at }); // whoever is gone needs nothing
                }
                inner.subscribers.swap_remove(&id);
                return Turn::Done;
            }
            (At::After(at), Body::Remote { .. }) if at >= inner.offset => at,
            (At::After(at), Body::Events { .. } | Body::Remote { .. }) if !inner.ring.holds(at) => {
                // while it was shown a run again, more came than can be kept for it
                self.cut(subscriber, inner.offset);
                inner.subscribers.swap_remove(&id);
                return Turn::Done;
            }
            (At::After(at), Body::Events { .. } | Body::Loading(_) | Body::Remote { .. }) => {
                let reached = take_events(&mut inner.ring, at, subscriber.dialect, form, room, out);
                // offsets that nobody else was given lie behind the last message
                if reached >= inner.ring.last() { inner.offset } else { reached }
            }
            (At::Start, Body::Events { .. } | Body::Loading(_) | Body::Remote { .. }) => inner.offset,
            (At::After(at), Body::State(_)) if at == inner.offset => at,
            (at, Body::State(state)) => {
                let before = out.len();
                let ahead = subscriber.ahead;
                if let (At::After(at), Some(due)) = (at, subscriber.due.filter(|due| *due > now)) {
                    let from = ahead.unwrap_or(at);
                    if inner.last_event > from && inner.ring.take_events(from, form, out) > 0 {
                        subscriber.ahead = Some(inner.offset);
                        *room = room.saturating_sub(out[before..].iter().map(Bytes::len).sum());
                    }
                    inner.delayed.add(id, subscriber.outbox.clone());
                    return Turn::Due(due);
                }
                let missed = match at {
                    At::Start | At::Fed => Changes::Unknown,
                    At::After(at) => {
                        subscriber.due = subscriber.rate.map(|rate| now + rate);
                        let to = inner.offset;
                        changes(&mut inner.ring, state, at..to, ahead, subscriber.rate.is_some(), form, out)
                    }
                };
                subscriber.ahead = None;
                let given = match missed {
                    Changes::All => Ok(()),
                    Changes::Folded { delta, messages } => {
                        let event = delta_event(&delta);
                        out.push(Chunk::single(&self.head, inner.offset, messages, &event, now).whole(form));
                        Ok(())
                    }
                    Changes::Unknown => self.snapshot(state, &mut inner.snapshot, inner.offset, form, out),
                };
                if let Err(problem) = given {
                    let (code, detail) = (problem.code, &problem.detail);
                    let channel = &*self.name.text;
                    let error = json!({"type": "error", "channel": channel, "code": code, "detail": detail});
                    subscriber.outbox.reply(&error.to_string());
                    inner.subscribers.swap_remove(&id);
                    return Turn::Done;
                }
                *room = room.saturating_sub(out[before..].iter().map(Bytes::len).sum());
                inner.offset
            }
        };
        subscriber.at = At::After(at);
        if at < inner.offset {
            return Turn::More;
        }
        if inner.fed.contains(&id) {
            subscriber.at = At::Fed;
            let (workspace, channel) = (&self.workspace, &*self.name.text);
            let fed = json!({"type": "fed", "workspace": workspace, "channel": channel, "offset": at});
            out.push(form.frame(&fed.to_string()));
            return Turn::Done;
        }
        let outbox = subscriber.outbox.clone();
        inner.waiting.add(id, outbox);
        Turn::Done
    }

    /// The state as it is, encoded once for all that get it at this offset.
    fn snapshot(
        &self,
        state: &State,
        known: &mut Option<Arc<Chunk>>,
        offset: u64,
        form: Form,
        out: &mut Vec<Bytes>,
    ) -> Result<(), Problem> {
        self.check_size(state)?;
        if known.is_none() {
            let event = snapshot_event(state);
            *known = Some(Arc::new(Chunk::single(&self.head, offset, 1, &event, Instant::now())));
        }
        out.extend(known.as_ref().map(|known| known.whole(form)));
        Ok(())
    }

    /// Looks at the channel's state under its lock.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Inner) -> T) -> T {
        look(&mut self.inner.lock())
    }

    pub(super) fn has_history(&self) -> bool {
        !self.inner.lock().ring.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.inner.lock().idle_since.is_some()
    }

    /// Takes no subscriber any more, unless somebody has listened within `linger`: the offset behind its last.
    pub(super) fn close_if_idle(&self, linger: Duration, now: Instant) -> Option<u64> {
        let mut inner = self.inner.lock();
        let is_idle = inner.idle_since.is_some_and(|since| now.duration_since(since) >= linger);
        inner.is_closed |= is_idle;
        inner.is_closed.then_some(inner.offset + 1)
    }

    /// Takes no subscriber any more: the offset behind its last.
    pub(super) fn close(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.is_closed = true;
        inner.offset + 1
    }
}

impl Inner {
    /// Takes offsets for messages of which only one subscriber is told: the offset before the first.
    fn reserve(&mut self, messages: u64) -> u64 {
        let base = self.offset;
        self.offset += messages;
        self.repeats.push_back(base + 1..self.offset);
        let from = self.ring.from();
        while self.repeats.len() > REPEATS_MAX || self.repeats.front().is_some_and(|oldest| oldest.end <= from) {
            self.repeats.pop_front();
        }
        base
    }
}

impl Subscriber {
    /// The offset behind which it needs every message, unless it gets them from elsewhere.
    fn needs_from(&self) -> Option<u64> {
        match self.at {
            At::After(at) if self.behind.is_empty() => Some(at),
            At::After(_) | At::Start | At::Fed => None,
        }
    }

    /// Gives it what comes from elsewhere: nothing more, or what is next for it if it has not all of that yet.
    fn catch_up(&mut self, ring: &Ring, room: &mut usize, out: &mut Vec<Bytes>) -> Option<Turn> {
        while let Some(behind) = self.behind.front_mut() {
            while let Some(frame) = behind.frames.pop_front() {
                *room = room.saturating_sub(frame.len());
                out.push(frame);
                if *room == 0 {
                    return Some(Turn::More);
                }
            }
            let is_in_ring = behind.base.is_some() || matches!(self.at, At::After(at) if ring.holds(at));
            if behind.has_more || !is_in_ring {
                _ = behind.asks.try_send(()); // full: it was asked already
                return Some(Turn::Done); // the next page wakes it
            }
            self.behind.pop_front();
        }
        None
    }
}

/// Messages of events behind `offset` in a dialect, until `room` bytes are full: up to which offset.
fn take_events(
    ring: &mut Ring,
    offset: u64,
    dialect: Dialect,
    form: Form,
    room: &mut usize,
    out: &mut Vec<Bytes>,
) -> u64 {
    if dialect == Dialect::Current {
        return ring.take(offset, form, room, out);
    }
    let mut frames = Vec::new();
    let reached = ring.take(offset, Form::Text, room, &mut frames);
    let texts = frames.iter().flat_map(|frames| frame::payloads(frames)).filter_map(|text| str::from_utf8(text).ok());
    out.extend(texts.map(|text| form.frame(&in_legacy(text))));
    reached
}

/// A message whose event is written as clients of AG-UI 0.0.59 take it.
fn in_legacy(message: &str) -> Cow<'_, str> {
    const DIFFERENT: [&str; 3] = ["RUN_STARTED", "RUN_FINISHED", "MESSAGES_SNAPSHOT"];
    if !DIFFERENT.iter().any(|kind| message.contains(kind)) {
        return message.into();
    }
    let Ok(mut read) = serde_json::from_str::<Value>(message) else { return message.into() };
    read["event"] = agui::to_legacy(read["event"].take());
    read.to_string().into()
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.histories.fetch_sub(self.inner.get_mut().ring.bytes(), Ordering::Relaxed);
    }
}

/// What a subscriber of a state has missed.
enum Changes {
    /// Every message of it was given.
    All,
    /// Its sum, which stands for so many messages.
    Folded { delta: String, messages: u64 },
    /// Nobody knows: only the whole state mends that.
    Unknown,
}

/// Gives a subscriber of a state every message in these offsets, if it keeps up; else their sum. Events up to `ahead` it
/// has already.
fn changes(
    ring: &mut Ring,
    state: &State,
    Range { start, end }: Range<u64>,
    ahead: Option<u64>,
    has_rate: bool,
    form: Form,
    out: &mut Vec<Bytes>,
) -> Changes {
    let messages = end - start;
    let keeps_up = messages == 1 || (!has_rate && ring.bytes_behind(start) <= FOLD_BYTES);
    if keeps_up && ahead.is_none() && ring.holds(start) {
        let mut room = usize::MAX; // all of it: it is bounded already
        ring.take(start, form, &mut room, out);
        return Changes::All;
    }
    metrics::counter!("tidewatch_ws_folded_total").increment(messages);
    if ring.take_events(ahead.unwrap_or(start), form, out) > 0 || ahead.is_some() {
        return Changes::Unknown; // a delta of the offset of what was just given would be taken for a repeat
    }
    match state.delta_since(start) {
        Some(delta) => Changes::Folded { delta, messages },
        None => Changes::Unknown,
    }
}

fn delta_event(ops: &str) -> String {
    format!("{{\"type\":\"STATE_DELTA\",\"delta\":[{ops}]}}")
}

fn snapshot_event(state: &State) -> String {
    format!("{{\"type\":\"STATE_SNAPSHOT\",\"snapshot\":{}}}", state.document())
}
