//! The state a channel starts from. What happens while it is read is kept and applied behind it, so that nothing is
//! lost in between.

use super::channel::{Body, Channel, Meanwhile, Missed, Page};
use super::name::{ChannelName, Topic};
use super::state::{Place, State};
use super::{Hub, Live, LivePlace, RowChange, members, place, portfolio_members, stream_events};
use crate::agui::{self, Dialect};
use crate::encode::{self, MetricRow};
use crate::problem::Problem;
use actors::agent::RunHandle;
use actors::{LiveRows, QueryRequest, RowsQuery, System, What};
use axum::http::StatusCode;
use engine::event::{ItemName, Micros, StreamName, WorkspaceId};
use engine::workspace::Stop;
use serde_json::json;
use sql::store::StoreError;
use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use streams::log::{self, Body as Logged, Offset, ReadError};
use streams::schema::ColumnType;
use tokio::sync::{MutexGuard, mpsc};
use tokio_util::task::AbortOnDropHandle;

/// Times a state is read before the channel gives up because too much happens meanwhile.
const ATTEMPTS: usize = 5;
/// Rows of a page of history, and the most pages that are read for a channel's first state.
const PAGE: usize = 1_000;
const PAGES_MAX: usize = 10;
/// How far back history is looked at for keys without a row in an open window, in windows; less where there is too much.
const WINDOWS_BACK: [i64; 2] = [100, 2];

/// How often the system's own figures are taken.
const SYSTEM_EVERY: Duration = Duration::from_secs(1);
/// How often a live query is asked, unless and at most.
const QUERY_EVERY: Duration = Duration::from_secs(1);
const QUERY_EVERY_MIN: Duration = Duration::from_millis(250);
/// After a live query all of the workspace rest for so many times as long as it took.
const QUERY_REST: u32 = 4;

/// What a client that comes back is given at a time: about so many bytes of messages, from no more records than these.
const PAGE_BYTES: usize = 256 << 10;
const PAGE_RECORDS: usize = 100_000;
/// How long until a store that was away is asked again for the alerts that are firing.
const FIRING_AGAIN: Duration = Duration::from_secs(1);
/// Where the store keeps the epoch of the log.
const LOG_EPOCH: &str = "log_epoch";

/// Makes the channel ready for its first subscriber. `query`: what a live query asks, and its place among those of its
/// workspace.
pub(super) async fn load(
    hub: &Arc<Hub>,
    system: &System,
    channel: &Arc<Channel>,
    query: Option<(&str, LivePlace)>,
    rate: Option<Duration>,
) -> Result<(), Problem> {
    let (name, workspace) = (&channel.name, channel.workspace.as_ref());
    match (&name.topic, workspace) {
        (Topic::Metric(_) | Topic::Portfolio(_) | Topic::Value(_), Some(workspace)) => {
            read_state(system, workspace, channel).await
        }
        (Topic::Presence(watched), Some(workspace)) => {
            take_presence(hub, workspace, watched, channel);
            tokio::spawn(poll_presence(Arc::downgrade(channel), Arc::downgrade(hub)));
            Ok(())
        }
        (Topic::Query { .. }, Some(workspace)) => {
            let missing = || Problem::invalid("bad_request", "a `query/…` channel needs the query in `sql`");
            let (sql, place) = query.ok_or_else(missing)?;
            let live = place.0.clone();
            let turn = live.turn.lock().await; // who has just come waits for no rest
            let found = spend(turn, Box::pin(ask(system, workspace, sql))).await?;
            channel.update(|state| state.replace(found));
            let every = rate.unwrap_or(QUERY_EVERY).max(QUERY_EVERY_MIN);
            let (weak, system) = (Arc::downgrade(channel), system.clone());
            let asks = poll_query(weak, system, workspace.clone(), sql.to_owned(), every, live.clone());
            *channel.asked.lock() = Some(Asked { _place: place, _asks: AbortOnDropHandle::new(tokio::spawn(asks)) });
            Ok(())
        }
        (Topic::Throughput | Topic::Actors, _) => {
            take_figures(system, channel).await;
            tokio::spawn(poll_figures(Arc::downgrade(channel), system.clone()));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// A live query, which is asked again and again until this is dropped.
pub(super) struct Asked {
    _place: LivePlace,
    _asks: AbortOnDropHandle<()>,
}

/// Refuses a channel whose metric or portfolio is not there, or takes no such filter.
pub(super) async fn check(system: &System, workspace: &WorkspaceId, name: &ChannelName) -> Result<(), Problem> {
    match &name.topic {
        Topic::Metric(metric) => {
            system.live_rows(workspace, metric).await?;
        }
        Topic::Portfolio(id) | Topic::Value(id) => {
            system.portfolio_summary(workspace, id).await?;
        }
        _ => return Ok(()),
    }
    typed_filter(system, workspace, name).await.map(drop)
}

/// Reads the state, applies what happened meanwhile, and makes the channel live.
async fn read_state(system: &System, workspace: &WorkspaceId, channel: &Channel) -> Result<(), Problem> {
    for _ in 0..ATTEMPTS {
        channel.with(|inner| inner.body = Body::Loading(Meanwhile::default()));
        let start = match &channel.name.topic {
            Topic::Metric(metric) => {
                // row by row: of several rows of a key the newest stays, whatever their order
                let mut state = State::new(Place::Rows);
                let (rows, failure) = metric_rows(system, workspace, metric, &channel.name).await?;
                if let Some(stop) = failure {
                    *channel.failed.lock() = Some(super::metric_failed(metric, &stop));
                }
                for row in rows {
                    state.rows(&[row], &[], false, false).into_iter().for_each(|op| state.apply(op, 0));
                }
                state
            }
            Topic::Portfolio(id) | Topic::Value(id) => {
                let mut state = State::new(Place::Root);
                let summary = system.portfolio_summary(workspace, id).await?;
                state
                    .replace(portfolio_members(&channel.name.topic, &summary))
                    .into_iter()
                    .for_each(|op| state.apply(op, 0));
                state
            }
            _ => return Ok(()),
        };
        if begin(channel, start) {
            return Ok(());
        }
    }
    let detail = format!("`{}` changes too fast to be read right now; try again", channel.name.text);
    let busy = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", detail);
    Err(busy.retry_after(Duration::from_secs(1)))
}

/// Makes the channel live with this state and what happened while it was read; not when some of that was missed.
pub(super) fn begin(channel: &Channel, mut state: State) -> bool {
    channel.with(|inner| {
        let Body::Loading(meanwhile) = &mut inner.body else { return true };
        if meanwhile.has_missed {
            return false;
        }
        for what in std::mem::take(&mut meanwhile.updates) {
            catch_up(&mut state, &channel.name, &what);
        }
        inner.body = Body::State(state);
        true
    })
}

/// Applies an update without telling anybody: there are no subscribers yet.
fn catch_up(state: &mut State, name: &ChannelName, what: &What) {
    let ops = match what {
        What::Rows { program, rows, .. } => match RowChange::of(program, rows) {
            Ok(change) => change.ops(name, state),
            Err(error) => {
                tracing::error!(%error, "rows of a metric have no JSON form");
                Vec::new()
            }
        },
        What::Portfolio { summary, .. } => state.replace(portfolio_members(&name.topic, summary)),
        What::MetricRemoved { .. } | What::PortfolioRemoved { .. } => {
            state.clear(0);
            Vec::new()
        }
        What::MetricFailed { .. } | What::Alert { .. } | What::Events { .. } | What::Run { .. } => Vec::new(),
    };
    ops.into_iter().for_each(|op| state.apply(op, 0));
}

/// The newest row of each key: of an open window where there is one, else the last final one of late. Why the metric
/// stopped, if it did.
async fn metric_rows(
    system: &System,
    workspace: &WorkspaceId,
    metric: &ItemName,
    name: &ChannelName,
) -> Result<(Vec<MetricRow>, Option<Stop>), Problem> {
    let LiveRows { program, rows: live, unsaved_to, failure, .. } = system.live_rows(workspace, metric).await?;
    let mut rows: Vec<MetricRow> = Vec::new();
    for part in &live {
        rows.extend(encode::metric_rows(&program, part).map_err(Problem::internal)?);
    }
    // not from where event time is: it may have gone on without events for as long as nobody sent any
    let newest = match rows.iter().map(|row| row.window_end).max().or(unsaved_to) {
        None => system.store().newest_row(workspace, metric).await?,
        live => live,
    };
    rows.retain(|row| name.keeps(&row.pairs));
    let mut finals: HashMap<Arc<str>, MetricRow> = HashMap::new();
    for windows in WINDOWS_BACK {
        finals.clear();
        let back = program.window().size().0.saturating_mul(windows);
        let mut query = RowsQuery {
            from: newest.map(|at| Micros(at.0.saturating_sub(back))),
            limit: PAGE,
            only_final: Some(true),
            keys: name.filter.iter().map(|(name, value)| (name.clone(), Some(value.clone()))).collect(),
            ..RowsQuery::default()
        };
        for _ in 0..PAGES_MAX {
            let page = system.metric_rows(workspace, metric, query.clone()).await?;
            // in order of windows: a later row of a key is a newer one
            let read = encode::stored_rows(&program, &page.rows).map_err(Problem::internal)?;
            finals.extend(read.into_iter().map(|row| (row.key.clone(), row)));
            query.after = page.next;
            if query.after.is_none() {
                break;
            }
        }
        if query.after.is_none() {
            break;
        }
    }
    rows.extend(finals.into_values());
    if program.is_top() {
        rows.retain(|row| Some(row.window_end) == newest); // the first of a window are all there is of it
    }
    Ok((rows, failure))
}

/// A filter whose values are written as those are that it is compared with.
pub(super) async fn typed_filter(
    system: &System,
    workspace: &WorkspaceId,
    name: &ChannelName,
) -> Result<Vec<(String, String)>, Problem> {
    if name.filter.is_empty() {
        return Ok(Vec::new());
    }
    let (of, columns) = match &name.topic {
        Topic::Stream(stream) => {
            let schema = system.schema(workspace, stream).await?;
            (format!("stream `{stream}` has no column"), schema.arrow().fields().clone())
        }
        Topic::Metric(metric) => {
            let LiveRows { program, .. } = system.live_rows(workspace, metric).await?;
            let keys = program.output().fields()[2..2 + program.key_count()].to_vec();
            (format!("metric `{metric}` has no key"), keys.into())
        }
        _ => return Ok(name.filter.clone()),
    };
    let typed = |(column, text): &(String, String)| {
        let Some((_, field)) = columns.find(column) else {
            let known: Vec<&str> = columns.iter().map(|field| field.name().as_str()).collect();
            let detail = format!("{of} `{column}`; it has {}", known.join(", "));
            return Err(Problem::invalid("unknown_parameter", detail));
        };
        match encode::shown_in(field.data_type(), text) {
            Some(shown) => Ok((column.clone(), shown)),
            None => {
                let text: String = text.chars().take(40).collect();
                let detail = format!("`{text}` is no value of `{column}`, whose type is {}", field.data_type());
                Err(Problem::invalid("bad_filter", detail))
            }
        }
    };
    name.filter.iter().map(typed).collect()
}

/// The columns of a stream that hold JSON.
pub(super) async fn json_columns(
    system: &System,
    workspace: &WorkspaceId,
    stream: &StreamName,
) -> Result<Vec<String>, Problem> {
    let schema = system.schema(workspace, stream).await?;
    let json = schema.columns.iter().filter(|column| column.kind == ColumnType::Json);
    Ok(json.map(|column| column.name.clone()).chain(["extra".to_owned()]).collect())
}

async fn ask(system: &System, workspace: &WorkspaceId, sql: &str) -> Result<Vec<(String, String)>, Problem> {
    let request = QueryRequest { sql: sql.to_owned(), params: Vec::new(), timeout: None };
    let answer = system.query(workspace, request).await?;
    let mut rows = Vec::new();
    for batch in &answer.batches {
        let objects = encode::objects(batch, Vec::new(), true, |_| true).map_err(Problem::internal)?;
        for object in objects {
            rows.push((rows.len().to_string(), object));
        }
    }
    Ok(rows)
}

impl Live {
    pub(super) fn new() -> Live {
        Live { turn: tokio::sync::Mutex::new(Instant::now()), open: AtomicUsize::new(0) }
    }

    /// A turn, once the workspace has rested.
    async fn rested_turn(&self) -> MutexGuard<'_, Instant> {
        loop {
            let turn = self.turn.lock().await;
            let at = *turn;
            if at <= Instant::now() {
                return turn;
            }
            drop(turn);
            tokio::time::sleep_until(at.into()).await;
        }
    }
}

/// Spends a turn on a live query; then its workspace rests.
async fn spend<T>(mut turn: MutexGuard<'_, Instant>, query: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let answer = query.await;
    *turn = Instant::now() + started.elapsed() * QUERY_REST;
    answer
}

/// Asks a live query again and again, while somebody listens.
async fn poll_query(
    channel: Weak<Channel>,
    system: System,
    workspace: WorkspaceId,
    sql: String,
    every: Duration,
    live: Arc<Live>,
) {
    let mut failed = false;
    loop {
        tokio::time::sleep(every).await;
        let turn = live.rested_turn().await;
        if channel.upgrade().is_none_or(|channel| channel.is_idle()) {
            return; // it is closed as soon as its one subscriber is gone
        }
        let found = spend(turn, Box::pin(ask(&system, &workspace, &sql))).await;
        let Some(channel) = channel.upgrade() else { return };
        match found {
            Ok(rows) => {
                if std::mem::take(&mut failed) {
                    channel.event(&super::custom("query.recovered", "{}"));
                }
                channel.update(|state| state.replace(rows));
            }
            Err(problem) if !failed => {
                failed = true; // told once, tried again
                let value = json!({"code": problem.code, "detail": problem.detail}).to_string();
                channel.event(&super::custom("query.failed", &value));
            }
            Err(_) => {}
        }
    }
}

fn take_presence(hub: &Hub, workspace: &WorkspaceId, watched: &Topic, channel: &Arc<Channel>) {
    let users = hub.presence(workspace, watched);
    let count: usize = users.values().sum();
    channel.update(|state| state.replace(members(json!({"count": count, "users": users}))));
}

/// Looks again and again who follows a channel, until nobody wants to know any more.
async fn poll_presence(channel: Weak<Channel>, hub: Weak<Hub>) {
    loop {
        tokio::time::sleep(SYSTEM_EVERY).await;
        let (Some(channel), Some(hub)) = (channel.upgrade(), hub.upgrade()) else { return };
        if let (Topic::Presence(watched), Some(workspace)) = (&channel.name.topic, &channel.workspace)
            && !channel.is_idle()
        {
            take_presence(&hub, workspace, watched, &channel);
        }
    }
}

/// The name that offsets of this log go by, now and after every restart.
pub(super) async fn log_epoch(system: &System) -> Result<Arc<str>, Problem> {
    if let Some(known) = system.store().meta(LOG_EPOCH).await? {
        return Ok(known.into());
    }
    let new = uuid::Uuid::new_v4().simple().to_string();
    system.store().put_meta(LOG_EPOCH, &new).await?;
    Ok(new.into())
}

/// Where messages come from that a channel does not hold.
enum Source {
    Log(System),
    Run(Box<RunHandle>, Dialect),
    /// What is firing, of a workspace.
    Firing(System, WorkspaceId),
}

/// The rest of what a subscriber gets from elsewhere.
pub(super) struct Rest {
    source: Source,
    /// It has taken all of a page.
    asked: mpsc::Receiver<()>,
}

impl Rest {
    /// Hands a subscriber page after page, each when it has taken the one before, until it needs no more or is gone.
    pub(super) async fn hand_over(mut self, channel: Arc<Channel>, id: u64) {
        while self.asked.recv().await.is_some() {
            let page = match &mut self.source {
                Source::Run(run, dialect) => Some(page_of_run(run, *dialect)),
                Source::Firing(system, workspace) => loop {
                    match firing_alerts(system, workspace).await {
                        Ok(page) => break Some(page),
                        Err(_) if channel.position(id).is_none() => return,
                        // the store is away: what happens meanwhile waits behind this
                        Err(_) => tokio::time::sleep(FIRING_AGAIN).await,
                    }
                },
                Source::Log(system) => match channel.position(id) {
                    Some((since, until)) => page_of_log(system, &channel, since, until).await,
                    None => return,
                },
            };
            match page {
                Some(page) => channel.give(id, &page),
                None => return channel.lose(id),
            }
        }
    }
}

/// A run that is over, from its start; nothing where nothing of it is left.
pub(super) fn again(mut run: RunHandle, dialect: Dialect) -> Option<(Missed, Rest)> {
    let repeated = Some(run.length()).filter(|events| *events > 0)?;
    let page = page_of_run(&mut run, dialect);
    Some(begun(page, Some(repeated), Source::Run(Box::new(run), dialect)))
}

/// The alerts that are firing when they are asked for, as a snapshot.
pub(super) fn firing(system: &System, workspace: &WorkspaceId) -> (mpsc::Sender<()>, Rest) {
    let (asks, asked) = mpsc::channel(1);
    (asks, Rest { source: Source::Firing(system.clone(), workspace.clone()), asked })
}

/// As `GET …/alerts?state=firing` lists them; of very many the newest.
async fn firing_alerts(system: &System, workspace: &WorkspaceId) -> Result<Page, StoreError> {
    let (mut alerts, mut before) = (Vec::new(), None);
    for _ in 0..PAGES_MAX {
        let (page, next) = system.store().alerts(workspace, Some("firing"), PAGE, before.as_deref()).await?;
        alerts.extend(page.iter().map(|alert| encode::listed_alert(system, alert)));
        before = next;
        if before.is_none() {
            break;
        }
    }
    let snapshot = json!({"type": "STATE_SNAPSHOT", "snapshot": {"alerts": alerts}}).to_string();
    Ok(Page { until: 0, messages: vec![(0, snapshot)], has_more: false })
}

/// The messages of a stream's channel behind `since` up to `until`, from the log; nothing where they are not there any
/// more.
pub(super) async fn missed(system: &System, channel: &Arc<Channel>, since: u64, until: u64) -> Option<(Missed, Rest)> {
    let page = page_of_log(system, channel, since, until).await?;
    Some(begun(page, None, Source::Log(system.clone())))
}

/// What one who comes is told alone, in front of the state.
pub(super) fn alone(event: String) -> Missed {
    let (asks, _) = mpsc::channel(1); // there is no more
    Missed { page: Page { until: 0, messages: vec![(1, event)], has_more: false }, repeated: Some(1), asks }
}

fn begun(page: Page, repeated: Option<u64>, source: Source) -> (Missed, Rest) {
    let (asks, asked) = mpsc::channel(1);
    (Missed { page, repeated, asks }, Rest { source, asked })
}

fn page_of_run(run: &mut RunHandle, dialect: Dialect) -> Page {
    let (mut until, mut bytes, mut messages) = (0, 0, Vec::new());
    while bytes < PAGE_BYTES
        && let Some((n, event)) = run.ready()
    {
        let text = agui::encode(&event, dialect);
        bytes += text.len();
        until = n;
        messages.push((n, text));
    }
    Page { until, messages, has_more: until < run.length() && bytes > 0 }
}

async fn page_of_log(system: &System, channel: &Arc<Channel>, since: u64, until: u64) -> Option<Page> {
    let (workspace, Topic::Stream(stream)) = (channel.workspace.as_ref()?, &channel.name.topic) else { return None };
    let (log, first) = system.log_of(workspace).ok()?;
    let filter = log::Filter { workspace: Some(workspace.clone()), stream: Some(stream.clone()), ..Default::default() };
    let channel = channel.clone();
    let read = move || -> Result<Option<Page>, ReadError> {
        let (from, mut messages, mut bytes) = (Offset(place::record(since)), Vec::new(), 0);
        if from < first || from < log.head() {
            return Ok(None);
        }
        let page = |until, messages| Ok(Some(Page { until, messages, has_more: false }));
        for (looked_at, record) in log.scan(from, filter)?.enumerate() {
            let (offset, record) = record?;
            if place::before(offset.0) >= until {
                break;
            }
            let Logged::Events { batch, .. } = record.body else { continue };
            let Ok(events) = stream_events(&channel.name, &channel.json_columns, &batch) else { return Ok(None) };
            for (at, event) in events.into_iter().enumerate() {
                let place = place::of(offset.0, at);
                if place <= since || place > until {
                    continue;
                }
                if bytes >= PAGE_BYTES {
                    return page(place - 1, messages);
                }
                bytes += event.len();
                messages.push((place, event));
            }
            if bytes >= PAGE_BYTES || looked_at >= PAGE_RECORDS {
                return page(until.min(place::before(offset.0 + 1)), messages);
            }
        }
        page(until, messages)
    };
    match tokio::task::spawn_blocking(read).await {
        Ok(Ok(page)) => page,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a client's position is not in the log any more");
            None
        }
        Err(_) => None,
    }
}

async fn take_figures(system: &System, channel: &Arc<Channel>) {
    let figures = match channel.name.topic {
        Topic::Throughput => encode::throughput(&system.throughput()),
        _ => json!({"actors": system.actors().await}),
    };
    let figures = members(figures);
    channel.update(|state| state.replace(figures));
}

/// Takes the system's figures again and again, until the channel is gone.
async fn poll_figures(channel: Weak<Channel>, system: System) {
    loop {
        tokio::time::sleep(SYSTEM_EVERY).await;
        match channel.upgrade() {
            None => return,
            Some(channel) if channel.is_idle() => {}
            Some(channel) => take_figures(&system, &channel).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn after_a_live_query_all_of_the_workspace_rest_but_who_comes_new() {
        let live = Live::new();
        let work = Duration::from_millis(20);
        let asked = spend(live.rested_turn().await, async {
            tokio::time::sleep(work).await;
            Instant::now()
        });
        let ended = asked.await;
        drop(live.turn.lock().await);
        assert!(ended.elapsed() < work * QUERY_REST, "a new one waits for no rest");
        drop(live.rested_turn().await);
        assert!(ended.elapsed() >= work * QUERY_REST);
    }
}
