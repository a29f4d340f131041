//! Channels of the node with the engine, on one without: their messages are heard over Redis, and held for the clients
//! here.

use super::channel::Channel;
use super::feed::{BEAT_EVERY, Parcel};
use super::{Hub, LINGER, Outbox};
use cache::Listener;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::time::MissedTickBehavior;

/// Without a beat for so long, what was heard last is taken for all that will be heard.
const BEAT_WAIT: Duration = Duration::from_secs(3);

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
pub(crate) struct Remote {
    topic: String,
    channel: Arc<Channel>,
    is_heard: OnceCell<()>,
}

/// How the node with the engine is heard.
struct Beat {
    /// Whether Redis is there.
    is_connected: bool,
    /// Where it says that it is there; another one after each of its starts.
    topic: Option<String>,
    heard_at: Instant,
    /// What it said last.
    said: Option<Vec<u8>>,
}

/// The channels of another node that somebody follows here.
pub(crate) struct Heard {
    hub: Arc<Hub>,
    listener: Listener,
    feeds: Mutex<HashMap<String, Arc<Remote>>>,
    beat: Mutex<Beat>,
    /// Whether what is published is heard.
    is_there: watch::Sender<bool>,
}

impl Heard {
    /// Listens for as long as the process lives.
    pub(crate) fn start(hub: Arc<Hub>, listener: Listener, hears: mpsc::Receiver<cache::Heard>) -> Arc<Heard> {
        let beat = Beat { is_connected: false, topic: None, heard_at: Instant::now(), said: None };
        let (feeds, beat, is_there) = (Mutex::default(), Mutex::new(beat), watch::Sender::new(false));
        let heard = Arc::new(Heard { hub, listener, feeds, beat, is_there });
        tokio::spawn(heard.clone().listen(hears));
        heard
    }

    /// Whether what is published is heard, and when that changes.
    pub(crate) fn is_there(&self) -> watch::Receiver<bool> {
        self.is_there.subscribe()
    }

    /// Listens to a channel: whatever is published from now on is held for who attaches to it. Nothing where nothing can be
    /// heard right now.
    pub(crate) async fn join(
        &self,
        offer: &Offer,
        (workspace, channel): (Option<&str>, &str),
        epoch: &str,
    ) -> Option<Arc<Remote>> {
        self.follow_beat(&offer.beat).await?;
        let remote = {
            let mut feeds = self.feeds.lock();
            match feeds.get(&offer.topic) {
                Some(remote) => remote.clone(),
                None => {
                    let channel = self.hub.remote(workspace, channel, epoch, offer.state)?;
                    let remote = Remote { topic: offer.topic.clone(), channel, is_heard: OnceCell::new() };
                    let remote = Arc::new(remote);
                    feeds.insert(offer.topic.clone(), remote.clone());
                    remote
                }
            }
        };
        let subscribed = async || self.listener.subscribe(&offer.topic).await.then_some(()).ok_or(());
        if remote.is_heard.get_or_try_init(subscribed).await.is_err() {
            self.end(&remote);
            return None;
        }
        Some(remote)
    }

    /// Sees to it that the node is heard that says so at `topic`: nothing where it is not.
    async fn follow_beat(&self, topic: &str) -> Option<()> {
        let old = {
            let mut beat = self.beat.lock();
            if !beat.is_connected {
                return None;
            }
            if beat.topic.as_deref() == Some(topic) {
                return self.is_there.borrow().then_some(());
            }
            (beat.heard_at, beat.said) = (Instant::now(), None);
            beat.topic.replace(topic.to_owned())
        };
        if let Some(old) = old {
            self.listener.unsubscribe(&old);
        }
        if !self.listener.subscribe(topic).await {
            return None;
        }
        self.is_there.send_if_modified(|is_there| !std::mem::replace(is_there, true));
        Some(())
    }

    /// A message every so often tells that nothing is lost; without one for a while all is taken for lost.
    async fn listen(self: Arc<Self>, mut hears: mpsc::Receiver<cache::Heard>) {
        let mut ticks = tokio::time::interval(BEAT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let heard = tokio::select! {
                heard = hears.recv() => heard,
                _ = ticks.tick() => {
                    let is_silent = {
                        let beat = self.beat.lock();
                        beat.topic.is_some() && beat.heard_at.elapsed() > BEAT_WAIT
                    };
                    if is_silent && self.is_there.send_replace(false) {
                        tracing::warn!("nothing is heard from the core over Redis; clients get its messages through it");
                        self.end_all();
                    }
                    self.sweep();
                    continue;
                }
            };
            match heard {
                None => return,
                Some(cache::Heard::Connected) => {
                    tracing::info!("Redis is there");
                    let topic = {
                        let mut beat = self.beat.lock();
                        (beat.is_connected, beat.heard_at) = (true, Instant::now());
                        beat.topic.clone()
                    };
                    match topic {
                        None => _ = self.is_there.send_replace(true),
                        // it is there again with the first beat
                        Some(topic) => {
                            let this = self.clone();
                            tokio::spawn(async move { this.listener.subscribe(&topic).await });
                        }
                    }
                }
                Some(cache::Heard::Lost) => {
                    tracing::warn!("Redis cannot be reached; clients get the messages of channels through the core");
                    self.beat.lock().is_connected = false;
                    self.is_there.send_replace(false);
                    self.end_all();
                }
                Some(cache::Heard::Message { topic, payload }) => self.on_message(&topic, payload),
            }
        }
    }

    fn on_message(&self, topic: &str, payload: Vec<u8>) {
        let is_beat = {
            let mut beat = self.beat.lock();
            (beat.topic.as_deref() == Some(topic)).then(|| {
                beat.heard_at = Instant::now();
                let before = beat.said.replace(payload.clone());
                before.is_some_and(|before| before != payload)
            })
        };
        match is_beat {
            Some(has_lost) => {
                if has_lost {
                    self.end_all();
                }
                self.is_there.send_if_modified(|is_there| !std::mem::replace(is_there, true));
            }
            None => {
                let Some(remote) = self.feeds.lock().get(topic).cloned() else { return };
                let is_whole = Parcel::decode(&payload).is_some_and(|parcel| remote.channel.receive(&parcel));
                if !is_whole {
                    self.end(&remote);
                }
            }
        }
    }

    fn sweep(&self) {
        let idle: Vec<Arc<Remote>> = (self.feeds.lock().values())
            .filter(|feed| feed.channel.close_if_idle(LINGER, Instant::now()).is_some())
            .cloned()
            .collect();
        idle.iter().for_each(|feed| self.end(feed));
    }

    fn end_all(&self) {
        let all: Vec<Arc<Remote>> = self.feeds.lock().values().cloned().collect();
        all.iter().for_each(|feed| self.end(feed));
    }

    /// Its followers go back to where they came from.
    fn end(&self, feed: &Arc<Remote>) {
        let mut feeds = self.feeds.lock();
        if feeds.get(&feed.topic).is_some_and(|known| Arc::ptr_eq(known, feed)) {
            feeds.remove(&feed.topic);
            self.listener.unsubscribe(&feed.topic);
        }
        drop(feeds);
        feed.channel.send_back();
    }
}

impl Remote {
    /// Hands a client all that comes behind `offset`, up to which it has everything. False where that is not known here.
    pub(crate) fn attach(&self, id: u64, outbox: &Arc<Outbox>, offset: u64, back: mpsc::UnboundedSender<Back>) -> bool {
        self.channel.attach(id, outbox, offset, back)
    }

    /// Lets go of a client: up to where it has everything, if it was attached still.
    pub(crate) fn detach(&self, id: u64, outbox: &Outbox) -> Option<u64> {
        let at = self.channel.position(id).map(|(at, _)| at);
        outbox.remove(id);
        self.channel.unsubscribe(id, Instant::now());
        at
    }
}
