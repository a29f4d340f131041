//! Channels that several nodes serve: the node with the engine publishes each message once over Redis, whatever number
//! of clients the others have.

use super::channel::Channel;
use cache::Publisher;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// How often nodes are told that all that was published until then went out.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Without a beat for so long, a node takes what it heard last for all that it will hear.
pub(super) const BEAT_WAIT: Duration = Duration::from_secs(3);
/// About so many bytes are published at once.
const PARCEL_BYTES: usize = 256 << 10;

/// A message of a channel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sent {
    pub(super) offset: u64,
    pub(super) is_event: bool,
    pub(super) event: String,
}

/// Messages of a channel one behind the other.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Parcel {
    /// The offset before the first.
    pub(super) before: u64,
    pub(super) messages: Vec<Sent>,
}

impl Parcel {
    /// As it is published: the offset before it, then of each message offset, kind, length and text, little-endian.
    fn encode(&self) -> Vec<u8> {
        let mut out = self.before.to_le_bytes().to_vec();
        for Sent { offset, is_event, event } in &self.messages {
            out.extend(offset.to_le_bytes());
            out.push(u8::from(*is_event));
            out.extend((event.len() as u32).to_le_bytes());
            out.extend(event.as_bytes());
        }
        out
    }

    /// Nothing where it is no parcel.
    pub(super) fn decode(bytes: &[u8]) -> Option<Parcel> {
        let (before, mut rest) = bytes.split_first_chunk()?;
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let (offset, after) = rest.split_first_chunk()?;
            let (kind, after) = after.split_first()?;
            let (bytes, after) = after.split_first_chunk()?;
            let (event, after) = after.split_at_checked(u32::from_le_bytes(*bytes) as usize)?;
            let event = str::from_utf8(event).ok()?.to_owned();
            messages.push(Sent { offset: u64::from_le_bytes(*offset), is_event: *kind == 1, event });
            rest = after;
        }
        Some(Parcel { before: u64::from_le_bytes(*before), messages })
    }
}

struct Leaving {
    topic: Arc<str>,
    before: u64,
    sent: Sent,
}

/// The way to the other nodes.
pub(super) struct Feeds {
    publisher: Publisher,
    epoch: Arc<str>,
    /// Where nodes hear that this one is there.
    beat: Arc<str>,
    leaving: mpsc::UnboundedSender<Leaving>,
    queued: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
    /// Bytes that wait for Redis, at most: what comes on top is lost, and the nodes are told so.
    most: usize,
}

impl Feeds {
    pub(super) fn start(publisher: Publisher, epoch: &Arc<str>, most: usize) -> Feeds {
        let (leaving, leaves) = mpsc::unbounded_channel();
        let (queued, lost) = (Arc::<AtomicUsize>::default(), Arc::<AtomicU64>::default());
        let beat: Arc<str> = publisher.topic(&["feed", epoch]).into();
        tokio::spawn(publish(publisher.clone(), leaves, beat.clone(), queued.clone(), lost.clone()));
        Feeds { publisher, epoch: epoch.clone(), beat, leaving, queued, lost, most }
    }

    /// The topic of a channel with this number.
    pub(super) fn topic(&self, number: u64) -> Arc<str> {
        self.publisher.topic(&["feed", &self.epoch, &number.to_string()]).into()
    }

    pub(super) fn beat(&self) -> &str {
        &self.beat
    }

    pub(super) fn publish(&self, topic: &Arc<str>, before: u64, sent: Sent) {
        let bytes = sent.event.len();
        if self.queued.fetch_add(bytes, Ordering::Relaxed) + bytes > self.most {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        _ = self.leaving.send(Leaving { topic: topic.clone(), before, sent }); // the task ends with the process
    }
}

async fn publish(
    publisher: Publisher,
    mut leaves: mpsc::UnboundedReceiver<Leaving>,
    beat: Arc<str>,
    queued: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
) {
    let mut beats = tokio::time::interval(BEAT_EVERY);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut parcels: BTreeMap<Arc<str>, Parcel> = BTreeMap::new();
        let mut bytes = 0;
        let mut is_beat = false;
        let mut next = tokio::select! {
            next = leaves.recv() => match next {
                Some(next) => Some(next),
                None => return,
            },
            _ = beats.tick() => {
                is_beat = true;
                leaves.try_recv().ok()
            }
        };
        while let Some(Leaving { topic, before, sent }) = next {
            bytes += sent.event.len();
            parcels.entry(topic).or_insert(Parcel { before, messages: Vec::new() }).messages.push(sent);
            next = if bytes < PARCEL_BYTES { leaves.try_recv().ok() } else { None };
        }
        queued.fetch_sub(bytes, Ordering::Relaxed);
        let mut messages: Vec<(String, Vec<u8>)> =
            parcels.iter().map(|(topic, parcel)| (topic.to_string(), parcel.encode())).collect();
        if is_beat {
            messages.push((beat.to_string(), lost.load(Ordering::Relaxed).to_le_bytes().to_vec()));
        }
        metrics::counter!("tidewatch_feed_bytes_total").increment(bytes as u64);
        if !publisher.publish(&messages).await {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Says where a follower of a channel of another node stood when its messages stopped coming this way.
#[derive(Debug)]
pub(crate) struct Back {
    /// The number it was attached under.
    pub(crate) id: u64,
    /// It has everything up to here.
    pub(crate) offset: u64,
}

/// Where a node without an engine gets the messages of a channel.
#[derive(Clone, Debug, serde::Deserialize)]
pub(crate) struct Offer {
    topic: String,
    beat: String,
    /// They add up to a state.
    state: bool,
}

impl Offer {
    pub(crate) fn is_state(&self) -> bool {
        self.state
    }
}

/// A channel of another node.
pub(crate) struct Feed {
    topic: String,
    channel: Arc<Channel>,
    is_heard: tokio::sync::OnceCell<()>,
}

/// The channels of another node that somebody follows here.
pub(crate) struct Heard {
    hub: Arc<super::Hub>,
    listener: cache::Listener,
    feeds: Mutex<HashMap<String, Arc<Feed>>>,
    beat: tokio::sync::OnceCell<String>,
    /// Whether what is published is heard.
    is_there: tokio::sync::watch::Sender<bool>,
}

impl Heard {
    /// Listens for as long as the process lives.
    pub(crate) fn start(
        hub: Arc<super::Hub>,
        listener: cache::Listener,
        hears: mpsc::Receiver<cache::Heard>,
    ) -> Arc<Heard> {
        let (feeds, beat, is_there) = (Mutex::default(), Default::default(), tokio::sync::watch::Sender::new(false));
        let heard = Arc::new(Heard { hub, listener, feeds, beat, is_there });
        tokio::spawn(heard.clone().listen(hears));
        heard
    }

    /// Whether what is published is heard, and when that changes.
    pub(crate) fn is_there(&self) -> tokio::sync::watch::Receiver<bool> {
        self.is_there.subscribe()
    }

    /// Listens to a channel: whatever is published from now on is held for who attaches to it. Nothing where nothing can be
    /// heard right now.
    pub(crate) async fn join(
        &self,
        offer: &Offer,
        (workspace, channel): (Option<&str>, &str),
        epoch: &str,
    ) -> Option<Arc<Feed>> {
        if !*self.is_there.borrow() {
            return None;
        }
        let subscribe = |topic: String| async move { self.listener.subscribe(&topic).await.then_some(topic).ok_or(()) };
        self.beat.get_or_try_init(|| subscribe(offer.beat.clone())).await.ok()?;
        let feed = {
            let mut feeds = self.feeds.lock();
            let make = || {
                let channel = self.hub.remote(workspace, channel, epoch, offer.state)?;
                Some(Arc::new(Feed { topic: offer.topic.clone(), channel, is_heard: Default::default() }))
            };
            match feeds.get(&offer.topic) {
                Some(feed) => feed.clone(),
                None => feeds.entry(offer.topic.clone()).or_insert(make()?).clone(),
            }
        };
        let heard = feed.is_heard.get_or_try_init(|| async { subscribe(offer.topic.clone()).await.map(drop) }).await;
        if heard.is_err() {
            self.drop_feed(&feed);
            return None;
        }
        Some(feed)
    }

    /// A message every so often tells that nothing is lost; without one for a while all is taken for lost.
    async fn listen(self: Arc<Self>, mut hears: mpsc::Receiver<cache::Heard>) {
        let mut ticks = tokio::time::interval(BEAT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard_at, mut known) = (tokio::time::Instant::now(), None);
        loop {
            let heard = tokio::select! {
                heard = hears.recv() => heard,
                _ = ticks.tick() => {
                    if *self.is_there.borrow() && self.beat.initialized() && heard_at.elapsed() > BEAT_WAIT {
                        tracing::warn!("nothing is heard from the core over Redis; clients get its messages through it");
                        self.is_there.send_replace(false);
                        self.drop_all();
                    }
                    self.sweep();
                    continue;
                }
            };
            match heard {
                None => return,
                Some(cache::Heard::Connected) => {
                    heard_at = tokio::time::Instant::now();
                    match self.beat.get().cloned() {
                        None => _ = self.is_there.send_replace(true),
                        // it is there again with the first beat
                        Some(beat) => {
                            let this = self.clone();
                            tokio::spawn(async move { this.listener.subscribe(&beat).await });
                        }
                    }
                }
                Some(cache::Heard::Lost) => {
                    self.is_there.send_replace(false);
                    self.drop_all();
                }
                Some(cache::Heard::Message { topic, payload }) if self.beat.get() == Some(&topic) => {
                    heard_at = tokio::time::Instant::now();
                    if known.replace(payload.clone()).is_some_and(|before| before != payload) {
                        self.drop_all();
                    }
                    self.is_there.send_if_modified(|is_there| !std::mem::replace(is_there, true));
                }
                Some(cache::Heard::Message { topic, payload }) => {
                    let Some(feed) = self.feeds.lock().get(&topic).cloned() else { continue };
                    let is_whole = Parcel::decode(&payload).is_some_and(|parcel| feed.channel.receive(&parcel));
                    if !is_whole {
                        self.drop_feed(&feed);
                    }
                }
            }
        }
    }

    fn sweep(&self) {
        let idle: Vec<Arc<Feed>> = (self.feeds.lock().values())
            .filter(|feed| feed.channel.close_if_idle(super::LINGER, std::time::Instant::now()).is_some())
            .cloned()
            .collect();
        idle.iter().for_each(|feed| self.drop_feed(feed));
    }

    fn drop_all(&self) {
        let all: Vec<Arc<Feed>> = self.feeds.lock().values().cloned().collect();
        all.iter().for_each(|feed| self.drop_feed(feed));
    }

    /// Its followers go back to where they came from.
    fn drop_feed(&self, feed: &Arc<Feed>) {
        let mut feeds = self.feeds.lock();
        if feeds.get(&feed.topic).is_some_and(|known| Arc::ptr_eq(known, feed)) {
            feeds.remove(&feed.topic);
            self.listener.unsubscribe(&feed.topic);
        }
        drop(feeds);
        feed.channel.send_back();
    }
}

impl Feed {
    /// Hands a client all that comes behind `offset`, up to which it has everything. False where that is not known here.
    pub(crate) fn attach(
        &self,
        id: u64,
        outbox: &Arc<super::Outbox>,
        offset: u64,
        back: mpsc::UnboundedSender<Back>,
    ) -> bool {
        self.channel.attach(id, outbox, offset, back)
    }

    pub(crate) fn detach(&self, id: u64, outbox: &super::Outbox) {
        outbox.remove(id);
        self.channel.unsubscribe(id, std::time::Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parcel_is_read_as_it_was_written_and_nothing_else_passes_for_one() {
        let sent = |offset, is_event, event: &str| Sent { offset, is_event, event: event.to_owned() };
        let parcel = Parcel { before: 7, messages: vec![sent(9, false, "{}"), sent(10, true, "{\"é\":1}")] };
        let bytes = parcel.encode();
        assert_eq!(Parcel::decode(&bytes), Some(parcel));
        let whole = [8, 8 + 13 + 2, bytes.len()];
        for end in 0..bytes.len() {
            assert_eq!(Parcel::decode(&bytes[..end]).is_some(), whole.contains(&end), "{end}");
        }
        let mut broken = bytes;
        broken[16 + 1 + 3] = 0xff; // a length beyond its end
        assert_eq!(Parcel::decode(&broken), None);
    }
}
