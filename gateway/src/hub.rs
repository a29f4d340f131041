//! Channels, and who listens to them. Takes what actors push, encodes it once for each channel and filter, and hands
//! it to every subscriber without waiting for any.

mod channel; // one channel: offsets, history, subscribers
mod load; // the state a channel starts from
mod name; // how channels are named
mod outbox; // what waits for one client
mod state; // what the messages of a state channel add up to

pub(crate) use channel::Since;
pub(crate) use name::{ChannelName, Topic};
pub(crate) use outbox::{Outbox, Taken};

use crate::agui::{self, Dialect};
use crate::config::Limits;
use crate::encode::{self, MetricRow};
use crate::problem::Problem;
use actors::agent::RunEvent;
use actors::{AlertPhase, Outlet, System, Update, What};
use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use channel::{Body, Channel, HISTORIES_BYTES_MAX, Wish};
use engine::event::WorkspaceId;
use engine::metric::Rows;
use engine::program::Program;
use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use state::{Op, Place, State};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A channel without listeners goes on for this long, so that a client that lost its connection can resume.
const LINGER: Duration = Duration::from_secs(60);
/// Alerts and conversations go on for this long, listeners or not: they are what people come back for.
const LINGER_KEPT: Duration = Duration::from_secs(3_600);
/// How often channels without listeners are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Events of a stream are sent in messages of about this many bytes.
const EVENTS_BYTES: usize = 64 << 10;
/// Updates kept while a channel's state is read.
const MEANWHILE_MAX: usize = 256;

/// A topic in a workspace; that of the installation is in none.
type Site = (Option<WorkspaceId>, Topic);

/// All channels.
pub struct Hub {
    epoch: Arc<str>,
    limits: Limits,
    channels: RwLock<HashMap<Site, Vec<Arc<Channel>>>>,
    /// Where new channels start to count: above every channel that is gone, so that none is taken for another.
    floor: AtomicU64,
    ids: AtomicU64,
    /// Bytes of the histories of all channels.
    histories: Arc<AtomicUsize>,
    swept: Mutex<Option<Instant>>,
}

/// A subscription of one client.
pub(crate) struct Subscription {
    id: u64,
    channel: Arc<Channel>,
}

impl Hub {
    /// No channels yet. The epoch is this hub's alone: offsets of another process mean nothing here.
    pub fn new(limits: &Limits) -> Arc<Hub> {
        Arc::new(Hub {
            epoch: uuid::Uuid::new_v4().simple().to_string().into(),
            limits: *limits,
            channels: RwLock::default(),
            floor: AtomicU64::new(0),
            ids: AtomicU64::new(1),
            histories: Arc::default(),
            swept: Mutex::default(),
        })
    }

    /// A number that no connection and no subscription had before.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets a client listen: queues the answer, then what the client missed or the state as it is.
    ///
    /// `sql` is the live query of a `query/…` channel. The caller has checked what the client may see.
    pub(crate) async fn subscribe(
        &self,
        system: &System,
        workspace: Option<WorkspaceId>,
        name: ChannelName,
        sql: Option<String>,
        request: Request<'_>,
    ) -> Result<Subscription, Problem> {
        let id = self.next_id();
        let Request { outbox, since, rate, reference } = request;
        let wish = Wish { id, outbox, since, rate, reference };
        self.sweep(Instant::now());
        loop {
            let channel = self.channel(system, workspace.as_ref(), &name).await?;
            let load = || load::load(system, &channel, sql.as_deref(), rate);
            if let Err(problem) = channel.loaded.get_or_try_init(load).await {
                self.close(&channel);
                return Err(problem);
            }
            match channel.subscribe(&wish) {
                Some(done) => return done.map(|()| Subscription { id, channel }),
                None => continue, // it was closed just now: a new one takes its place
            }
        }
    }

    /// Ends a subscription: nothing more is queued for it.
    pub(crate) fn unsubscribe(&self, subscription: &Subscription, outbox: &Outbox) {
        outbox.remove(subscription.id);
        subscription.channel.unsubscribe(subscription.id, Instant::now());
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
            (Topic::Stream(stream), Some(workspace)) => load::json_columns(system, workspace, stream, name).await?,
            _ => Vec::new(),
        };
        let mut channels = self.channels.write();
        let channels = channels.entry(place).or_default();
        if let Some(channel) = find(channels) {
            return Ok(channel);
        }
        let channel = self.make(workspace.cloned(), name.clone(), json_columns);
        channels.push(channel.clone());
        Ok(channel)
    }

    fn make(&self, workspace: Option<WorkspaceId>, name: ChannelName, json_columns: Vec<String>) -> Arc<Channel> {
        let body = match name.topic {
            Topic::Stream(_) | Topic::Alerts | Topic::Thread(_) => Body::Events { start: None },
            Topic::Metric(_) | Topic::Portfolio(_) => Body::Loading(channel::Meanwhile::default()),
            Topic::Query { .. } => Body::State(State::new(Place::Rows)),
            Topic::Throughput | Topic::Actors => Body::State(State::new(Place::Root)),
        };
        let start = (self.epoch.clone(), self.floor.load(Ordering::Acquire));
        let limits = (self.limits, self.histories.clone());
        Arc::new(Channel::new((workspace, name), start, json_columns, body, limits, Instant::now()))
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

    /// Closes a channel that has been idle for so long, and sees to it that its offsets do not come again.
    fn closes(&self, channel: &Channel, linger: Duration, now: Instant) -> bool {
        let end = channel.close_if_idle(linger, now);
        end.is_some_and(|end| {
            self.floor.fetch_max(end, Ordering::AcqRel);
            true
        })
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
            let is_kept = has_room && matches!(topic, Topic::Alerts | Topic::Thread(_));
            channels.retain(|channel| {
                let linger = if is_kept && channel.has_history() { LINGER_KEPT } else { LINGER };
                !self.closes(channel, linger, now)
            });
            !channels.is_empty()
        });
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
            channels.push(self.make(Some(workspace.clone()), name, Vec::new()));
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
}

fn custom(name: &str, value: &str) -> String {
    format!("{{\"type\":\"CUSTOM\",\"name\":\"{name}\",\"value\":{value}}}")
}

impl Outlet for Hub {
    fn publish(&self, update: Update) {
        let Update { workspace, what } = update;
        self.sweep(Instant::now());
        match &what {
            What::Rows { metric, program, rows } => {
                self.rows(&self.listening(&workspace, Topic::Metric(metric.clone())), program, rows, &what);
            }
            What::MetricFailed { metric, reason } => {
                let event = custom("metric.failed", &json!({"metric": metric, "reason": reason}).to_string());
                let channels = self.listening(&workspace, Topic::Metric(metric.clone()));
                channels.iter().for_each(|channel| channel.event(&event));
            }
            What::MetricRemoved { metric } => {
                for channel in self.listening(&workspace, Topic::Metric(metric.clone())) {
                    if !set_aside(&channel, &what) {
                        channel.reset();
                        self.close(&channel); // without listeners: the next one reads what there is by then
                    }
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
                    channel.event_of_sequence(&event, false, false, now);
                }
            }
            What::Portfolio { id, summary } => {
                let channels = self.listening(&workspace, Topic::Portfolio(id.clone()));
                if !channels.is_empty() {
                    let members = members(encode::portfolio(summary));
                    for channel in channels {
                        if !set_aside(&channel, &what) {
                            channel.update(|state| state.replace(members.clone()));
                        }
                    }
                }
            }
            What::Events { stream, batch, .. } => {
                for channel in self.listening(&workspace, Topic::Stream(stream.clone())) {
                    if let Err(error) = send_events(&channel, batch) {
                        tracing::error!(%workspace, %stream, %error, "events have no JSON form");
                    }
                }
            }
            What::Run { thread, event, .. } => {
                let is_first = matches!(**event, RunEvent::Started { .. });
                let channels = self.conversation(&workspace, thread, is_first);
                if !channels.is_empty() {
                    let text = agui::encode(event, Dialect::Current);
                    let now = Instant::now();
                    for channel in channels {
                        channel.event_of_sequence(&text, is_first, event.is_terminal(), now);
                    }
                }
            }
        }
    }
}

impl Hub {
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
        Body::Events { .. } | Body::State(_) => false,
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
    fn of(program: &Program, rows: &Rows) -> Result<RowChange, arrow::error::ArrowError> {
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

/// The members of a JSON object, each as JSON text.
fn members(object: Value) -> Vec<(String, String)> {
    match object {
        Value::Object(members) => members.into_iter().map(|(name, value)| (name, value.to_string())).collect(),
        _ => Vec::new(),
    }
}

/// Sends the events that the channel's filter keeps, some at a time.
fn send_events(channel: &Channel, batch: &RecordBatch) -> Result<(), arrow::error::ArrowError> {
    let options = FormatOptions::new();
    let columns = (channel.name.filter.iter())
        .map(|(name, value)| {
            let column = batch.column_by_name(name);
            Ok((column.map(|column| ArrayFormatter::try_new(column, &options)).transpose()?, value))
        })
        .collect::<Result<Vec<_>, arrow::error::ArrowError>>()?;
    let keep = |row| {
        columns
            .iter()
            .all(|(column, value)| column.as_ref().is_some_and(|column| column.value(row).to_string() == **value))
    };
    let events = encode::objects(batch, channel.json_columns.clone(), false, keep)?;
    let mut part = String::new();
    let send = |part: &mut String| {
        if !part.is_empty() {
            channel.event(&custom("stream.events", &format!("{{\"events\":[{part}]}}")));
            part.clear();
        }
    };
    for event in events {
        if part.len() + event.len() > EVENTS_BYTES {
            send(&mut part);
        }
        if !part.is_empty() {
            part.push(',');
        }
        part.push_str(&event);
    }
    send(&mut part);
    Ok(())
}

#[cfg(test)]
mod tests;
