//! Channels, and who listens to them. Takes what actors push, encodes it once for each channel and filter, and hands
//! it to every subscriber without waiting for any.

mod channel; // one channel: offsets, history, subscribers
mod crowd; // how many clients there are
mod fanout; // who writes to them
mod feed; // what other nodes get of channels
mod load; // the state a channel starts from
mod name; // how channels are named
mod outbox; // what waits for one client
mod remote; // channels of another node
mod ring; // the newest messages of a channel, as they go over the wire
mod state; // what the messages of a state channel add up to

pub(crate) use channel::Since;
pub(crate) use crowd::{Crowd, Group, Seats};
pub(crate) use name::{ChannelName, Topic};
pub(crate) use outbox::{Cut, Outbox, Taken, Told};
pub(crate) use remote::{Back, Heard, Offer, Remote};
pub(crate) use ring::Form;

use crate::agui::{self, Dialect};
use crate::config::{History, Limits};
use crate::encode::{self, MetricRow};
use crate::problem::Problem;
use crate::socket::wire::Wire;
use actors::agent::{RunEvent, RunHandle};
use actors::{AlertPhase, Outlet, PortfolioSummary, System, Update, What};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::error::ArrowError;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use axum::http::StatusCode;
use cache::Publisher;
use channel::{Body, Channel, HISTORIES_BYTES_MAX, Wish};
use engine::event::{ItemName, WorkspaceId};
use engine::metric::Rows;
use engine::program::Program;
use engine::workspace::Stop;
use fanout::Fanout;
use feed::Feeds;
use parking_lot::{Mutex, RwLock};
use ring::Bounds;
use serde_json::{Value, json};
use state::{Op, Place, State};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;

/// A channel without listeners goes on for this long, so that a client that lost its connection can resume.
const LINGER: Duration = Duration::from_secs(60);
/// How often channels without listeners are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Events of a stream are sent in messages of about this many bytes.
const EVENTS_BYTES: usize = 64 << 10;
/// Who finds no place for a live query may find one after this.
const LIVE_WAIT: Duration = Duration::from_secs(10);
/// Updates kept while a channel's state is read.
const MEANWHILE_MAX: usize = 256;

/// A topic in a workspace; that of the installation is in none.
type Site = (Option<WorkspaceId>, Topic);

/// All channels.
pub struct Hub {
    epoch: Arc<str>,
    /// The epoch of channels of streams, whose offsets are places in the log.
    log_epoch: OnceCell<Arc<str>>,
    limits: Limits,
    history: History,
    channels: RwLock<HashMap<Site, Vec<Arc<Channel>>>>,
    /// Where new channels start to count: above every channel that is gone, so that none is taken for another.
    floor: AtomicU64,
    ids: AtomicU64,
    /// Clients of WebSockets.
    connections: AtomicU32,
    fanout: Fanout,
    pub(crate) crowd: Arc<Crowd>,
    /// Live queries by workspace: who may ask next.
    live: Mutex<HashMap<WorkspaceId, Weak<Live>>>,
    /// Bytes of the histories of all channels.
    histories: Arc<AtomicUsize>,
    /// Where other nodes get the messages of channels.
    feeds: OnceLock<Arc<Feeds>>,
    swept: Mutex<Option<Instant>>,
}

/// The live queries of a workspace. They are asked one after the other, and all of them rest after each, so that together
/// they take a part of one query worker.
struct Live {
    /// Whoever holds it may ask; of what changes by itself not before this instant.
    turn: tokio::sync::Mutex<Instant>,
    /// How many there are.
    open: AtomicUsize,
}

/// One of them, for as long as its channel is open.
struct LivePlace(Arc<Live>);

impl Drop for LivePlace {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A subscription of one client.
pub(crate) struct Subscription {
    id: u64,
    channel: Arc<Channel>,
}

impl Subscription {
    /// What the client is told of.
    pub(crate) fn topic(&self) -> &Topic {
        &self.channel.name.topic
    }

    /// From where it stands on, its messages are published: false where they cannot be.
    pub(crate) fn feed(&self) -> bool {
        self.channel.feed(self.id)
    }
}

impl Hub {
    /// No channels yet. The epoch is this hub's alone: offsets of another process mean nothing here.
    pub fn new(limits: &Limits, history: &History) -> Arc<Hub> {
        Arc::new(Hub {
            log_epoch: OnceCell::new(),
            epoch: uuid::Uuid::new_v4().simple().to_string().into(),
            limits: *limits,
            history: *history,
            channels: RwLock::default(),
            floor: AtomicU64::new(0),
            ids: AtomicU64::new(1),
            connections: AtomicU32::new(0),
            fanout: Fanout::new(),
            crowd: Crowd::new(*limits),
            live: Mutex::default(),
            histories: Arc::default(),
            feeds: OnceLock::new(),
            swept: Mutex::default(),
        })
    }

    /// Lets other nodes serve channels, whose messages are published for them. For once, and before any client comes.
    pub fn feed_over(&self, publisher: Publisher) {
        let feeds = Feeds::start(publisher, &self.epoch, self.limits.feed_bytes);
        _ = self.feeds.set(Arc::new(feeds));
    }

    /// A channel of another node, as that one names it; nothing where it has no such name.
    fn remote(&self, workspace: Option<&str>, name: &str, epoch: &str, is_state: bool) -> Option<Arc<Channel>> {
        let workspace = workspace.map(str::parse).transpose().ok()?;
        let name = ChannelName::parse(name, 0).ok()?;
        Some(self.with_body(workspace, name, Vec::new(), (epoch.into(), 0), Body::Remote { is_state }))
    }

    /// A number that no connection and no subscription had before.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Counts a client of a WebSocket, or one that left.
    pub(crate) fn count_connection(&self, is_new: bool) {
        if is_new {
            self.connections.fetch_add(1, Ordering::Relaxed);
        } else {
            self.connections.fetch_sub(1, Ordering::Relaxed);
        }
        metrics::gauge!("tidewatch_ws_connections").set(self.connections());
    }

    /// Writes messages to a client of a WebSocket as they come, past its connection's task.
    pub(crate) fn connect(&self, outbox: &Outbox, wire: Wire) {
        self.fanout.connect(outbox, wire);
    }

    /// Clients of WebSockets.
    pub(crate) fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Lets a client listen: queues the answer, then what the client missed or the state as it is.
    ///
    /// `sql` is the live query of a `query/…` channel. The caller has checked what the client may see.
    pub(crate) async fn subscribe(
        self: &Arc<Self>,
        system: &System,
        workspace: Option<WorkspaceId>,
        name: ChannelName,
        sql: Option<String>,
        request: Request<'_>,
    ) -> Result<Subscription, Problem> {
        let id = self.next_id();
        let Request { outbox, since, rate, reference, dialect, run, is_node } = request;
        // only runs have dialects: all others share their frames
        let dialect = if matches!(name.topic, Topic::Thread(_)) { dialect } else { Dialect::Current };
        let run_id = run.as_ref().map(|run| run.run.clone());
        let (missed, instead) = (None, None);
        let mut wish = Wish { id, outbox, since, rate, reference, dialect, run: run_id, missed, instead, is_node };
        // a run that is over is shown again; one that goes on is in its channel
        let mut rest = None;
        if let Some(run) = run.filter(RunHandle::is_over) {
            (wish.missed, rest) = load::again(run, dialect).unzip();
        }
        // read once it listens: what fires meanwhile comes behind it
        if let (Topic::Alerts, Some(workspace), Some(_)) = (&name.topic, &workspace, &wish.since) {
            let (asks, firing) = load::firing(system, workspace);
            (wish.instead, rest) = (Some(asks), Some(firing));
        }
        self.sweep(Instant::now());
        let mut live = match (&name.topic, &workspace) {
            (Topic::Query { .. }, Some(workspace)) => Some(self.live(workspace)?),
            _ => None,
        };
        loop {
            let channel = self.channel(system, workspace.as_ref(), &name).await?;
            let load = || load::load(self, system, &channel, sql.as_deref().zip(live.take()), rate);
            if let Err(problem) = channel.loaded.get_or_try_init(load).await {
                self.close(&channel);
                return Err(problem);
            }
            // what is there no more, or takes another filter now, is known to be so once its channel says nothing
            if channel.is_empty()
                && let Some(workspace) = &workspace
            {
                load::check(system, workspace, &name).await?;
            }
            if wish.since.as_ref().is_none_or(|since| !channel.recovers(since)) {
                wish.missed = wish.missed.or_else(|| channel.failed.lock().clone().map(load::alone));
            }
            // what is not held any more is in the log or the store; what comes while it is read is held
            if let Some((since, until)) = channel.not_held(wish.since.as_ref()) {
                (wish.missed, rest) = load::missed(system, &channel, since, until).await.unzip();
            } else if wish.missed.is_none()
                && let (Topic::Thread(thread), Some(workspace)) = (&channel.name.topic, &workspace)
                && wish.since.as_ref().is_some_and(|since| !channel.recovers(since))
                && let Some(run) = system.last_run(workspace, thread).await?.filter(RunHandle::is_over)
            {
                (wish.missed, rest) = load::again(run, dialect).unzip();
            }
            match channel.subscribe(&wish) {
                Some(done) => {
                    done?;
                    if let Some(rest) = rest {
                        tokio::spawn(rest.hand_over(channel.clone(), id));
                    }
                    return Ok(Subscription { id, channel });
                }
                None => continue, // it was closed just now: a new one takes its place
            }
        }
    }

    /// Writes the runs of a thread for this client in a dialect from now on, and shows it one that is over once more.
    pub(crate) fn follow_run(&self, subscription: &Subscription, dialect: Dialect, over: Option<RunHandle>) {
        let Subscription { id, channel } = subscription;
        channel.speak(*id, dialect);
        if let Some((missed, rest)) = over.and_then(|run| load::again(run, dialect)) {
            channel.repeat(*id, &missed);
            tokio::spawn(rest.hand_over(channel.clone(), *id));
        }
    }

    /// A place among the live queries of a workspace.
    fn live(&self, workspace: &WorkspaceId) -> Result<LivePlace, Problem> {
        let mut all = self.live.lock();
        all.retain(|_, live| live.strong_count() > 0);
        let live = match all.get(workspace).and_then(Weak::upgrade) {
            Some(live) => live,
            None => {
                let live = Arc::new(Live::new());
                all.insert(workspace.clone(), Arc::downgrade(&live));
                live
            }
        };
        let most = self.limits.live_queries;
        // `all` is locked: nobody else counts meanwhile
        if live.open.load(Ordering::Acquire) >= most {
            let detail = format!("the workspace has limits.live_queries = {most} live queries; end some of them");
            let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_live_queries", detail);
            return Err(problem.retry_after(LIVE_WAIT));
        }
        live.open.fetch_add(1, Ordering::AcqRel);
        Ok(LivePlace(live))
    }

    /// Ends a subscription: nothing more is queued for it.
    pub(crate) fn unsubscribe(&self, subscription: &Subscription, outbox: &Outbox) {
        subscription.channel.unsubscribe(subscription.id, Instant::now()); // from then on it has nothing for it
        outbox.remove(subscription.id);
        if matches!(subscription.channel.name.topic, Topic::Query { .. }) {
            self.close(&subscription.channel); // nobody else can ask for it
        }
    }

    /// The channel of this name, made if there is none.
    async fn channel(
        &self,
        system: &System,
        workspace: Option<&WorkspaceId>,
        name: &ChannelName,
    ) -> Result<Arc<Channel>, Problem> {
        let place = (workspace.cloned(), name.topic.clone());
        let find = |channels: &[Arc<Channel>]| channels.iter().find(|channel| channel.name.text == name.text).cloned();
        if let Some(channel) = self.channels.read().get(&place).and_then(|channels| find(channels)) {
            return Ok(channel);
        }
        let json_columns = match (&name.topic, workspace) {
            (Topic::Stream(stream), Some(workspace)) => load::json_columns(system, workspace, stream).await?,
            _ => Vec::new(),
        };
        let mut name = name.clone();
        if let Some(workspace) = workspace {
            name.filter = load::typed_filter(system, workspace, &name).await?;
        }
        let log = match (&name.topic, workspace) {
            (Topic::Stream(_), Some(workspace)) => {
                let epoch = self.log_epoch.get_or_try_init(|| load::log_epoch(system)).await?;
                Some((epoch.clone(), system.log_of(workspace)?.0))
            }
            _ => None,
        };
        let mut channels = self.channels.write();
        let channels = channels.entry(place).or_default();
        if let Some(channel) = find(channels) {
            return Ok(channel);
        }
        // read while nobody can publish: what is durable from here on comes to the channel
        let start = match log {
            Some((epoch, log)) => (epoch, place::before(log.tail().0)),
            None => (self.epoch_of(&name.topic), self.floor.load(Ordering::Acquire)),
        };
        let channel = self.make(workspace.cloned(), name, json_columns, start);
        channels.push(channel.clone());
        Ok(channel)
    }

    /// What offsets of a topic that is in no log go by. The two forms of a portfolio have the same name: a place in one
    /// must not pass for one in the other.
    fn epoch_of(&self, topic: &Topic) -> Arc<str> {
        match topic {
            Topic::Value(_) => format!("{}-value", self.epoch).into(),
            _ => self.epoch.clone(),
        }
    }

    fn make(
        &self,
        workspace: Option<WorkspaceId>,
        name: ChannelName,
        json_columns: Vec<String>,
        start: (Arc<str>, u64),
    ) -> Arc<Channel> {
        let body = match name.topic {
            Topic::Stream(_) | Topic::Alerts | Topic::Thread(_) => Body::Events { last: None },
            Topic::Metric(_) | Topic::Portfolio(_) | Topic::Value(_) => Body::Loading(channel::Meanwhile::default()),
            Topic::Query { .. } => Body::State(State::new(Place::Rows)),
            Topic::Presence(_) | Topic::Throughput | Topic::Actors => Body::State(State::new(Place::Root)),
        };
        self.with_body(workspace, name, json_columns, start, body)
    }

    fn with_body(
        &self,
        workspace: Option<WorkspaceId>,
        name: ChannelName,
        json_columns: Vec<String>,
        start: (Arc<str>, u64),
        body: Body,
    ) -> Arc<Channel> {
        let kept = match name.topic {
            Topic::Stream(_) => &self.history.streams,
            Topic::Alerts => &self.history.alerts,
            Topic::Thread(_) => &self.history.threads,
            _ => &self.history.states,
        };
        let bounds = Bounds { events: kept.events, bytes: kept.bytes, age: Duration::from_secs(kept.seconds) };
        let limits = (bounds, self.limits.queue_bytes, self.histories.clone());
        // of one that only one client follows, or each in a way of its own, there is nothing to share
        let is_shared = !matches!(name.topic, Topic::Query { .. } | Topic::Thread(_) | Topic::Presence(_));
        let feed = self.feeds.get().filter(|_| is_shared).map(|feeds| (feeds.clone(), feeds.topic(self.next_id())));
        Arc::new(Channel::new((workspace, name), start, json_columns, body, limits, feed, Instant::now()))
    }

    fn close(&self, channel: &Arc<Channel>) {
        let place = (channel.workspace.clone(), channel.name.topic.clone());
        let mut all = self.channels.write();
        let Some(channels) = all.get_mut(&place) else { return };
        channels.retain(|other| !(Arc::ptr_eq(other, channel) && self.closes(other, Duration::ZERO, Instant::now())));
        if channels.is_empty() {
            all.remove(&place);
        }
    }

    /// Closes a channel that has been idle for so long.
    fn closes(&self, channel: &Channel, linger: Duration, now: Instant) -> bool {
        channel.close_if_idle(linger, now).is_some_and(|end| {
            self.ended(channel, end);
            true
        })
    }

    /// Sees to it that the offsets of a closed channel do not come again.
    fn ended(&self, channel: &Channel, end: u64) {
        channel.asked.lock().take();
        if !matches!(channel.name.topic, Topic::Stream(_)) {
            self.floor.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Takes away the channels of a workspace that has ended: a later one of its name begins anew.
    pub(crate) fn forget(&self, workspace: &WorkspaceId) {
        self.channels.write().retain(|(of, _), channels| {
            let stays = of.as_ref() != Some(workspace);
            if !stays {
                channels.iter().for_each(|channel| self.ended(channel, channel.close()));
            }
            stays
        });
    }

    /// Takes away the channels that nobody has listened to for a while.
    fn sweep(&self, now: Instant) {
        {
            let mut swept = self.swept.lock();
            if swept.is_some_and(|at| now.duration_since(at) < SWEEP_EVERY) {
                return;
            }
            *swept = Some(now);
        }
        // where room for histories is short, what nobody listens to gives way
        let has_room = self.histories.load(Ordering::Relaxed) < HISTORIES_BYTES_MAX / 2;
        self.channels.write().retain(|(_, topic), channels| {
            let kept = match topic {
                Topic::Alerts => self.history.alerts.seconds,
                Topic::Thread(_) => self.history.threads.seconds,
                _ => 0,
            };
            channels.retain(|channel| {
                channel.sweep(now);
                let is_kept = has_room && channel.has_history();
                let linger = if is_kept { LINGER.max(Duration::from_secs(kept)) } else { LINGER };
                !self.closes(channel, linger, now)
            });
            !channels.is_empty()
        });
    }

    /// Who follows a topic of a workspace, whatever their filters, and over how many connections.
    fn presence(&self, workspace: &WorkspaceId, topic: &Topic) -> BTreeMap<String, usize> {
        let mut connections = HashMap::new();
        let value = match topic {
            Topic::Portfolio(id) => Some(Topic::Value(id.clone())),
            _ => None,
        };
        let topics = [topic.clone()].into_iter().chain(value);
        for channel in topics.flat_map(|topic| self.listening(workspace, topic)) {
            channel.list_connections(&mut connections);
        }
        let mut users = BTreeMap::new();
        connections.into_values().for_each(|user| *users.entry(user).or_default() += 1);
        users
    }

    fn listening(&self, workspace: &WorkspaceId, topic: Topic) -> Vec<Arc<Channel>> {
        self.channels.read().get(&(Some(workspace.clone()), topic)).cloned().unwrap_or_default()
    }

    /// The channel of a topic without filters, made if nobody has listened yet: who comes later finds its history.
    fn kept(&self, workspace: &WorkspaceId, topic: Topic, text: &str) -> Vec<Arc<Channel>> {
        let found = self.listening(workspace, topic.clone());
        if !found.is_empty() {
            return found;
        }
        let mut all = self.channels.write();
        let channels = all.entry((Some(workspace.clone()), topic.clone())).or_default();
        if channels.is_empty() {
            let name = ChannelName { text: text.into(), topic, filter: Vec::new() };
            let start = (self.epoch.clone(), self.floor.load(Ordering::Acquire));
            channels.push(self.make(Some(workspace.clone()), name, Vec::new(), start));
        }
        channels.clone()
    }

    /// The channel of a conversation, which is there from the start of a run on: whoever comes while the run goes on
    /// gets it from its start.
    fn conversation(&self, workspace: &WorkspaceId, thread: &str, is_first: bool) -> Vec<Arc<Channel>> {
        let topic = Topic::Thread(thread.to_owned());
        match is_first {
            true => self.kept(workspace, topic, &format!("thread/{thread}")),
            false => self.listening(workspace, topic),
        }
    }
}

/// What a client asks for with a subscription.
pub(crate) struct Request<'a> {
    pub(crate) outbox: &'a Arc<Outbox>,
    /// Where it was when it left.
    pub(crate) since: Option<Since>,
    /// Least time between two messages of a state.
    pub(crate) rate: Option<Duration>,
    /// Echoed in the answer.
    pub(crate) reference: Option<Value>,
    /// How events of runs are written.
    pub(crate) dialect: Dialect,
    /// The run of the thread that the client has asked for.
    pub(crate) run: Option<RunHandle>,
    /// The client is a node that serves others, and may follow a channel's feed.
    pub(crate) is_node: bool,
}

fn custom(name: &str, value: &str) -> String {
    format!("{{\"type\":\"CUSTOM\",\"name\":\"{name}\",\"value\":{value}}}")
}

impl Outlet for Hub {
    fn is_followed(&self, workspace: &WorkspaceId, metric: &ItemName) -> bool {
        !self.listening(workspace, Topic::Metric(metric.clone())).is_empty()
    }

    fn publish(&self, update: Update) {
        let Update { workspace, what } = update;
        self.sweep(Instant::now());
        match &what {
            What::Rows { metric, program, rows } => {
                self.rows(&self.listening(&workspace, Topic::Metric(metric.clone())), program, rows, &what);
            }
            What::MetricFailed { metric, stop } => {
                let event = metric_failed(metric, stop);
                for channel in self.listening(&workspace, Topic::Metric(metric.clone())) {
                    *channel.failed.lock() = Some(event.clone());
                    channel.event(&event);
                }
            }
            What::MetricRemoved { metric } => {
                self.void(&self.listening(&workspace, Topic::Metric(metric.clone())), &what);
            }
            What::PortfolioRemoved { id } => {
                for topic in [Topic::Portfolio(id.clone()), Topic::Value(id.clone())] {
                    self.void(&self.listening(&workspace, topic), &what);
                }
            }
            What::Alert { phase, alert } => {
                let name = match phase {
                    AlertPhase::Firing => "alert.firing",
                    AlertPhase::Resolved => "alert.resolved",
                    AlertPhase::Acked => "alert.acked",
                };
                let event = custom(name, &json!({"alert": encode::alert(alert)}).to_string());
                let now = Instant::now();
                for channel in self.kept(&workspace, Topic::Alerts, "alerts") {
                    channel.event_to_keep(&event, now);
                }
            }
            What::Portfolio { id, summary } => {
                for topic in [Topic::Portfolio(id.clone()), Topic::Value(id.clone())] {
                    let channels = self.listening(&workspace, topic.clone());
                    if channels.is_empty() {
                        continue;
                    }
                    let members = portfolio_members(&topic, summary);
                    for channel in channels {
                        if !set_aside(&channel, &what) {
                            channel.update(|state| state.replace(members.clone()));
                        }
                    }
                }
            }
            What::Events { stream, batch, offset } => {
                for channel in self.listening(&workspace, Topic::Stream(stream.clone())) {
                    match stream_events(&channel.name, &channel.json_columns, batch) {
                        Ok(messages) => channel.events_at(*offset, &messages),
                        Err(error) => tracing::error!(%workspace, %stream, %error, "events have no JSON form"),
                    }
                }
            }
            What::Run { thread, run, event, .. } => {
                let is_first = matches!(**event, RunEvent::Started { .. });
                let channels = self.conversation(&workspace, thread, is_first);
                if !channels.is_empty() {
                    let text = agui::encode(event, Dialect::Current);
                    let now = Instant::now();
                    for channel in channels {
                        channel.event_of_run(run, &text, is_first, event.is_terminal(), now);
                    }
                }
            }
        }
    }
}

impl Hub {
    /// What these channels showed is there no more.
    fn void(&self, channels: &[Arc<Channel>], what: &What) {
        for channel in channels {
            channel.failed.lock().take();
            if !set_aside(channel, what) {
                channel.reset();
                self.close(channel); // without listeners: the next one reads what there is by then
            }
        }
    }

    fn rows(&self, channels: &[Arc<Channel>], program: &Program, rows: &Rows, what: &What) {
        let channels: Vec<&Arc<Channel>> = channels.iter().filter(|channel| !set_aside(channel, what)).collect();
        if channels.is_empty() {
            return;
        }
        match RowChange::of(program, rows) {
            Ok(change) => channels.iter().for_each(|channel| channel.update(|state| change.ops(&channel.name, state))),
            Err(error) => tracing::error!(%error, "rows of a metric have no JSON form"),
        }
    }
}

/// Keeps an update for later where the channel's state is still being read: whether it did.
fn set_aside(channel: &Channel, what: &What) -> bool {
    channel.with(|inner| match &mut inner.body {
        Body::Loading(meanwhile) if meanwhile.updates.len() < MEANWHILE_MAX => {
            meanwhile.updates.push(what.clone());
            true
        }
        Body::Loading(meanwhile) => {
            meanwhile.has_missed = true;
            true
        }
        Body::Events { .. } | Body::State(_) | Body::Remote { .. } => false,
    })
}

/// New rows of a metric, encoded once for all its channels.
struct RowChange {
    rows: Vec<MetricRow>,
    gone: Vec<(String, Vec<(String, String)>)>,
    is_complete: bool,
    is_final: bool,
}

impl RowChange {
    fn of(program: &Program, rows: &Rows) -> Result<RowChange, ArrowError> {
        Ok(RowChange {
            rows: encode::metric_rows(program, rows)?,
            gone: rows.gone.as_ref().map_or(Ok(Vec::new()), encode::gone_keys)?,
            is_complete: rows.complete,
            is_final: rows.revisions.is_some(),
        })
    }

    fn ops(&self, name: &ChannelName, state: &State) -> Vec<Op> {
        let gone: Vec<String> =
            self.gone.iter().filter(|(_, pairs)| name.keeps(pairs)).map(|(key, _)| key.clone()).collect();
        if name.filter.is_empty() {
            return state.rows(&self.rows, &gone, self.is_complete, self.is_final);
        }
        let rows: Vec<MetricRow> = self.rows.iter().filter(|row| name.keeps(&row.pairs)).cloned().collect();
        state.rows(&rows, &gone, self.is_complete, self.is_final)
    }
}

fn metric_failed(metric: &ItemName, stop: &Stop) -> String {
    let said = json!({"metric": metric, "code": stop.cause.code(), "reason": stop.reason});
    custom("metric.failed", &said.to_string())
}

/// What a portfolio's channel shows: all of it, or its value alone.
fn portfolio_members(topic: &Topic, summary: &PortfolioSummary) -> Vec<(String, String)> {
    members(match topic {
        Topic::Value(_) => encode::portfolio_value(summary),
        _ => encode::portfolio(summary),
    })
}

/// The members of a JSON object, each as JSON text.
fn members(object: Value) -> Vec<(String, String)> {
    match object {
        Value::Object(members) => members.into_iter().map(|(name, value)| (name, value.to_string())).collect(),
        _ => Vec::new(),
    }
}

/// The events of a batch that the filter keeps, as the messages of a channel: one, unless they are very large.
fn stream_events(name: &ChannelName, json_columns: &[String], batch: &RecordBatch) -> Result<Vec<String>, ArrowError> {
    let options = FormatOptions::new();
    let columns = (name.filter.iter())
        .map(|(name, value)| {
            let column = batch.column_by_name(name);
            Ok((column.map(|column| Shown::new(column, &options)).transpose()?, value))
        })
        .collect::<Result<Vec<_>, ArrowError>>()?;
    let keep = |row| columns.iter().all(|(column, value)| column.as_ref().is_some_and(|column| column.is(row, value)));
    let (mut messages, mut part) = (Vec::new(), String::new());
    for event in encode::objects(batch, json_columns.to_vec(), false, keep)? {
        if !part.is_empty() && part.len() + event.len() > EVENTS_BYTES {
            messages.push(std::mem::take(&mut part));
        }
        if !part.is_empty() {
            part.push(',');
        }
        part.push_str(&event);
    }
    messages.extend(Some(part).filter(|part| !part.is_empty()));
    let event = |events: String| custom("stream.events", &format!("{{\"events\":[{events}]}}"));
    Ok(messages.into_iter().map(event).collect())
}

/// A column whose values are compared with the text of a filter.
enum Shown<'a> {
    Text(&'a StringArray),
    Other(ArrayFormatter<'a>),
}

impl<'a> Shown<'a> {
    fn new(column: &'a ArrayRef, options: &FormatOptions<'a>) -> Result<Shown<'a>, ArrowError> {
        Ok(match column.as_string_opt::<i32>() {
            Some(texts) => Shown::Text(texts),
            None => Shown::Other(ArrayFormatter::try_new(column, options)?),
        })
    }

    /// Whether the value is shown as this text; NULL is as the empty one.
    fn is(&self, row: usize, text: &str) -> bool {
        match self {
            Shown::Text(texts) if texts.is_null(row) => text.is_empty(),
            Shown::Text(texts) => texts.value(row) == text,
            Shown::Other(column) => column.value(row).to_string() == text,
        }
    }
}

/// Where the messages of a record of the log are in a channel of its stream: the record's offset in the upper bits, the
/// number of the message among those of the record, from 1 on, in the lower. So what a client has seen stands for a
/// place in the log, and holds when the server starts again.
mod place {
    const PART_BITS: u32 = 12;

    /// Everything before this record.
    pub(super) fn before(record: u64) -> u64 {
        record << PART_BITS
    }

    /// Message `at`, from 0 on, of the record; the last place holds all that would be behind it.
    pub(super) fn of(record: u64, at: usize) -> u64 {
        before(record) + (at as u64 + 1).min((1 << PART_BITS) - 1)
    }

    /// The record with the message at this place.
    pub(super) fn record(offset: u64) -> u64 {
        offset >> PART_BITS
    }
}

#[cfg(test)]
mod tests;
