//! One channel: numbers its messages, keeps the last of them, and hands each to every subscriber. A state channel also
//! keeps what its messages add up to.

use super::name::ChannelName;
use super::outbox::{Changed, Effect, Frame, Outbox, Touch, WhenSlow};
use super::state::{Op, State};
use crate::config::Limits;
use crate::problem::Problem;
use actors::What;
use axum::extract::ws::Utf8Bytes;
use axum::http::StatusCode;
use engine::event::WorkspaceId;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;

/// A larger state is not sent: its client asks for less of it.
const SNAPSHOT_BYTES_MAX: usize = 8 << 20;
/// Changes of a state beyond this are sent in several messages.
const DELTA_BYTES: usize = 256 << 10;

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
}

/// What a channel's messages are.
pub(super) enum Body {
    /// The state it starts from is being read; what happens meanwhile is kept.
    Loading(Meanwhile),
    /// Each counts by itself.
    Events {
        /// Offset of the first message of what is going on; a subscriber that comes meanwhile gets it from there.
        start: Option<u64>,
    },
    /// They add up to a state.
    State(State),
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
    epoch: Arc<str>,
    /// All of a message up to its offset.
    head: String,
    limits: Limits,
    /// Bytes of the histories of all channels.
    histories: Arc<AtomicUsize>,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    /// Of the last message.
    offset: u64,
    history: VecDeque<Frame>,
    history_bytes: usize,
    subscribers: Vec<(u64, Arc<Outbox>)>,
    pub(super) body: Body,
    /// Since when nobody listens.
    idle_since: Option<Instant>,
    /// Taken out of the hub: a new one takes its place.
    is_closed: bool,
}

impl Channel {
    /// A channel nobody listens to yet; its first message follows `offset`.
    pub(super) fn new(
        (workspace, name): (Option<WorkspaceId>, ChannelName),
        (epoch, offset): (Arc<str>, u64),
        json_columns: Vec<String>,
        body: Body,
        (limits, histories): (Limits, Arc<AtomicUsize>),
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
            history: VecDeque::new(),
            history_bytes: 0,
            subscribers: Vec::new(),
            body,
            idle_since: Some(now),
            is_closed: false,
        };
        let loaded = OnceCell::new();
        Channel { workspace, name, json_columns, loaded, epoch, head, limits, histories, inner: Mutex::new(inner) }
    }

    /// The channel's name in a few bytes, for the reason of a close.
    pub(super) fn short_name(&self) -> &str {
        let text = &*self.name.text;
        &text[..text.floor_char_boundary(40)]
    }

    fn text(&self, offset: u64, merged: u64, event: &str) -> Utf8Bytes {
        let mut text = String::with_capacity(self.head.len() + event.len() + 48);
        text.push_str(&self.head);
        _ = write!(text, "{offset}"); // writing to a String cannot fail
        if merged > 1 {
            _ = write!(text, ",\"merged\":{merged}");
        }
        text.push_str(",\"event\":");
        text.push_str(event);
        text.push('}');
        Utf8Bytes::from(text)
    }

    /// Sends an event, of whatever kind, to all subscribers.
    pub(super) fn event(&self, event: &str) {
        self.send(&mut self.inner.lock(), event, Effect::Event);
    }

    /// As [`Channel::event`], for one of a sequence: a subscriber that comes within it gets it from its start.
    pub(super) fn event_of_sequence(&self, event: &str, is_first: bool, is_last: bool, now: Instant) {
        let mut inner = self.inner.lock();
        let next = inner.offset + 1;
        if let Body::Events { start } = &mut inner.body {
            match (is_first, is_last) {
                (_, true) => *start = None,
                (true, false) => *start = Some(next),
                (false, false) => {}
            }
        }
        if inner.subscribers.is_empty() {
            inner.idle_since = Some(now); // a conversation that goes on is not idle
        }
        self.send(&mut inner, event, Effect::Event);
    }

    /// Runs `change` on the state and tells all subscribers the changes it finds, in their order.
    pub(super) fn update(&self, change: impl FnOnce(&State) -> Vec<Op>) {
        let inner = &mut *self.inner.lock();
        let Body::State(state) = &mut inner.body else { return };
        let mut deltas = Vec::new();
        let mut touches: Vec<Touch> = Vec::new();
        let mut delta = String::new();
        for op in change(state) {
            state.write(&op, &mut delta);
            let last_final = op.member.as_ref().filter(|member| member.is_final()).map(|member| member.json.clone());
            touches.push(Touch { name: op.name.clone(), last_final });
            state.apply(op);
            if delta.len() >= DELTA_BYTES {
                deltas.push((std::mem::take(&mut delta), std::mem::take(&mut touches)));
            }
        }
        if !touches.is_empty() {
            deltas.push((delta, touches));
        }
        for (delta, touches) in deltas {
            self.send(inner, &delta_event(&delta), Effect::Delta(touches.into()));
        }
    }

    /// Empties the state: what it said is void.
    pub(super) fn reset(&self) {
        let inner = &mut *self.inner.lock();
        let Body::State(state) = &mut inner.body else { return };
        state.clear();
        let event = snapshot_event(state);
        self.send(inner, &event, Effect::Snapshot);
    }

    fn send(&self, inner: &mut Inner, event: &str, effect: Effect) {
        inner.offset += 1;
        let frame = Frame { offset: inner.offset, text: self.text(inner.offset, 1, event), effect };
        let when_slow = match inner.body {
            Body::Events { .. } => WhenSlow::Close,
            Body::State(_) | Body::Loading(_) => WhenSlow::Fold,
        };
        let before = inner.subscribers.len();
        inner.subscribers.retain(|(id, outbox)| outbox.push(*id, &frame, when_slow));
        if before > 0 && inner.subscribers.is_empty() {
            inner.idle_since = Some(Instant::now());
        }
        let size = frame.text.len();
        inner.history_bytes += size;
        inner.history.push_back(frame);
        let mut of_all = self.histories.fetch_add(size, Ordering::Relaxed) + size;
        while inner.history.len() > self.limits.history_events
            || inner.history_bytes > self.limits.history_bytes
            || (of_all > HISTORIES_BYTES_MAX && inner.history.len() > 1)
        {
            let Some(oldest) = inner.history.pop_front() else { break };
            let size = oldest.text.len();
            inner.history_bytes -= size;
            of_all = self.histories.fetch_sub(size, Ordering::Relaxed) - size;
        }
    }

    /// The messages behind `offset`, if all of them are still here.
    fn since(inner: &Inner, offset: u64) -> Option<Vec<Frame>> {
        let first = inner.history.front().map_or(inner.offset + 1, |frame| frame.offset);
        let held = offset <= inner.offset && offset + 1 >= first;
        held.then(|| inner.history.iter().filter(|frame| frame.offset > offset).cloned().collect())
    }

    /// Adds a subscriber and queues what it gets first: the answer, then what it missed or a snapshot. `None` when the
    /// channel was taken out of the hub meanwhile.
    pub(super) fn subscribe(self: &Arc<Self>, wish: &Wish<'_>) -> Option<Result<(), Problem>> {
        let inner = &mut *self.inner.lock();
        if inner.is_closed {
            return None;
        }
        let missed = match &wish.since {
            Some(since) if *since.epoch == *self.epoch => {
                Self::since(inner, since.offset).map(|all| (since.offset, all))
            }
            _ => None,
        };
        let recovered = missed.is_some();
        // where the subscriber is before it gets the first of these
        let (offset, first) = match (missed, &inner.body) {
            (Some(missed), _) => missed,
            (None, Body::State(state)) => match self.snapshot(inner.offset, state) {
                Ok(snapshot) => (inner.offset, vec![snapshot]),
                Err(problem) => return Some(Err(problem)),
            },
            (None, Body::Events { start: Some(start) }) => match Self::since(inner, start - 1) {
                Some(sequence) => (start - 1, sequence),
                None => (inner.offset, Vec::new()),
            },
            (None, Body::Events { start: None } | Body::Loading(_)) => (inner.offset, Vec::new()),
        };
        let mut answer = json!({
            "type": "ok", "channel": *self.name.text, "epoch": *self.epoch, "offset": offset, "recovered": recovered,
        });
        if let Some(reference) = &wish.reference {
            answer["ref"] = reference.clone();
        }
        wish.outbox.reply(answer.to_string());
        wish.outbox.add(wish.id, self.clone(), wish.rate, first);
        inner.subscribers.push((wish.id, wish.outbox.clone()));
        inner.idle_since = None;
        Some(Ok(()))
    }

    pub(super) fn unsubscribe(&self, id: u64, now: Instant) {
        let mut inner = self.inner.lock();
        inner.subscribers.retain(|(other, _)| *other != id);
        if inner.subscribers.is_empty() && inner.idle_since.is_none() {
            inner.idle_since = Some(now);
        }
    }

    fn snapshot(&self, offset: u64, state: &State) -> Result<Frame, Problem> {
        if state.bytes() > SNAPSHOT_BYTES_MAX {
            let detail = format!(
                "the state of `{}` is {} bytes, more than the {SNAPSHOT_BYTES_MAX} that are sent; subscribe with a filter",
                self.name.text,
                state.bytes()
            );
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "state_too_large", detail));
        }
        Ok(Frame { offset, text: self.text(offset, 1, &snapshot_event(state)), effect: Effect::Snapshot })
    }

    /// Writes what changed for a subscription that was folded, up to now.
    pub(super) fn unfold(&self, id: u64, outbox: &Outbox, now: Instant, out: &mut Vec<Utf8Bytes>) {
        let inner = &mut *self.inner.lock();
        let Body::State(state) = &inner.body else { return };
        let Some(folded) = outbox.take_folded(id, now) else { return };
        let delta = match folded.changed {
            Changed::Some(members) => state.delta(&members),
            Changed::All => None,
        };
        match delta {
            Some(delta) => out.push(self.text(inner.offset, folded.messages, &delta_event(&delta))),
            None => match self.snapshot(inner.offset, state) {
                Ok(snapshot) => out.push(snapshot.text),
                Err(problem) => {
                    let (code, detail) = (problem.code, &problem.detail);
                    let channel = &*self.name.text;
                    let error = json!({"type": "error", "channel": channel, "code": code, "detail": detail});
                    out.push(error.to_string().into());
                    outbox.remove(id);
                    inner.subscribers.retain(|(other, _)| *other != id);
                }
            },
        }
    }

    /// Looks at the channel's state under its lock.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Inner) -> T) -> T {
        look(&mut self.inner.lock())
    }

    pub(super) fn has_history(&self) -> bool {
        !self.inner.lock().history.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.inner.lock().idle_since.is_some()
    }

    /// Closes the channel if nobody has listened for `linger`: the offset after its last one.
    pub(super) fn close_if_idle(&self, linger: Duration, now: Instant) -> Option<u64> {
        let mut inner = self.inner.lock();
        let is_idle = inner.idle_since.is_some_and(|since| now.duration_since(since) >= linger);
        inner.is_closed |= is_idle;
        inner.is_closed.then_some(inner.offset + 1)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.histories.fetch_sub(self.inner.get_mut().history_bytes, Ordering::Relaxed);
    }
}

fn delta_event(ops: &str) -> String {
    format!("{{\"type\":\"STATE_DELTA\",\"delta\":[{ops}]}}")
}

fn snapshot_event(state: &State) -> String {
    format!("{{\"type\":\"STATE_SNAPSHOT\",\"snapshot\":{}}}", state.document())
}
