//! The whole system as the gateway sees it: every request that reaches a workspace goes through here.

use crate::agent::{AgentInfo, RunHandle, RunRequest, Sessions};
use crate::background::{self, Background};
use crate::blocks::{self, Past};
use crate::clock::Clock;
use crate::commit::Committer;
use crate::definition::{MetricDefinition, RuleDefinition};
use crate::fault::{Fault, FaultKind};
use crate::history;
use crate::holdings::{Listed, of_portfolio, of_portfolios};
use crate::looks::Looks;
use crate::notifier::Notifier;
use crate::outlet::{AlertPhase, Outlet, PortfolioSummary, Update, What};
use crate::query::{self, QueryPool};
use crate::root::{RootActor, RootMsg};
use crate::rows::{self, Row};
use crate::seal::Sealer;
use crate::silence;
use crate::table::{StoredTable, TableInfo};
use crate::tenant::{Held, Phase, Resting, Shared, Tenant};
use crate::webhook::WebhookConfig;
use crate::workspace::{MetricInfo, Reply, UnplannedMetric, WorkspaceMsg};
use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use cache::{Ask, Cache, Class, Standing};
use engine::alert::Trouble;
use engine::event::{ItemName, METRICS, Micros, Span, StreamName, WorkspaceId};
use engine::limit::{StateLimits, StateSize};
use engine::metric::Rows;
use engine::program::Program;
use engine::workspace::{IDLE_TIMEOUT, Stop};
use futures::StreamExt;
use parking_lot::{Mutex, RwLock};
use ractor::{Actor, ActorRef, RpcReplyPort};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sql::plan::{Planner, Source};
use sql::query::{Bounds, Question, Table};
use sql::store::{
    Alert, Portfolio, Position, RowQuery, Silence, Step, Store, StoreError, StreamRow, TableRow, Workspace,
};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, OnceLock, Weak};
use std::time::{Duration, Instant};
use streams::decode::{Decoded, EventError};
use streams::dedup::Dedup;
use streams::log::{Body, Filter, Log, Offset, Refused};
use streams::schema::{Column, StreamSchema, UnknownFields, built_in};
use streams::table::{built_in_tables, positions};
use tokio::sync::{OwnedMutexGuard, watch};

/// The bounds of this crate: `limits.*` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of events of one workspace that may wait to be computed.
    pub mailbox_bytes: usize,
    /// Bytes of results of one workspace that may wait for a store that cannot be reached. Over it, events stay in the
    /// mailbox, and once that is full too, ingest is refused.
    pub unsaved_bytes: usize,
    /// A workspace without work for this long, in milliseconds, rests: its state is in the store and it has no actor.
    pub rest_ms: u64,
    /// A stream without events for this long, in milliseconds, is idle: its event time goes on by processing time.
    pub idle_timeout_ms: u64,
    /// Rows of a query's answer.
    pub query_rows: usize,
    /// Bytes of memory of one query, and of the events it reads.
    pub query_memory: usize,
    /// How long a query may run, in milliseconds, when it does not say so itself; also the most it may ask for.
    pub query_ms: u64,
    /// Metrics in a workspace.
    pub metrics: usize,
    /// Streams in a workspace, beside the built-in ones.
    pub streams: usize,
    /// Alert rules in a workspace.
    pub alert_rules: usize,
    /// Reference tables in a workspace, beside the built-in ones.
    pub tables: usize,
    /// Bytes of memory of the rows of a workspace's reference tables, earlier versions included.
    pub table_bytes: usize,
    /// Bytes of state of one metric: windows, sessions, events that wait to be joined. Over it, or over any of the next
    /// three, a metric stops as `state_limit`, and the others go on.
    pub metric_state_bytes: usize,
    /// Keys of GROUP BY that one metric holds state for.
    pub metric_state_groups: usize,
    /// The same for all metrics of a workspace; the one that holds most stops.
    pub workspace_state_bytes: usize,
    pub workspace_state_groups: usize,
    /// Queries of one workspace that run or wait.
    pub queries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            mailbox_bytes: 64 << 20,
            unsaved_bytes: 256 << 20,
            rest_ms: 60_000,
            idle_timeout_ms: IDLE_TIMEOUT.0 as u64 / 1_000,
            query_rows: 100_000,
            query_memory: 256 << 20,
            query_ms: 10_000,
            metrics: 1_000,
            streams: 200,
            alert_rules: 1_000,
            tables: 100,
            table_bytes: 64 << 20,
            metric_state_bytes: 256 << 20,
            metric_state_groups: 2_000_000,
            workspace_state_bytes: 1 << 30,
            workspace_state_groups: 8_000_000,
            queries: 16,
        }
    }
}

impl Limits {
    /// The most state of metrics.
    pub fn state(&self) -> StateLimits {
        StateLimits {
            metric: StateSize { bytes: self.metric_state_bytes, groups: self.metric_state_groups },
            workspace: StateSize { bytes: self.workspace_state_bytes, groups: self.workspace_state_groups },
        }
    }
}

/// What every workspace's actor works with.
pub(crate) struct Deps {
    pub(crate) store: Store,
    pub(crate) log: Arc<dyn Log>,
    pub(crate) outlet: Arc<dyn Outlet>,
    pub(crate) clock: Arc<dyn Clock>,
    /// See [`Limits::unsaved_bytes`].
    pub(crate) unsaved_bytes: usize,
    state: StateLimits,
    pub(crate) committer: Arc<Committer>,
    pub(crate) cache: Arc<Cache>,
    /// See [`Limits::rest_ms`].
    pub(crate) rest_after: Duration,
    /// See [`Limits::idle_timeout_ms`].
    pub(crate) idle_timeout: Span,
    pub(crate) webhooks: WebhookConfig,
    pub(crate) sealer: Arc<Sealer>,
    pub(crate) notifier: Notifier,
    /// Computes large batches.
    pub(crate) background: Background,
    pub(crate) retention: Retention,
    planner: Planner,
}

impl Deps {
    /// An engine without metrics, bounded as all are.
    pub(crate) fn empty_engine(&self) -> engine::workspace::Workspace {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        engine::workspace::Workspace::new(self.state, || START.elapsed()).pausing(background::pause)
    }

    /// For how long the tier of a workspace keeps final rows, where it bounds that.
    pub(crate) async fn keeps(&self, id: &WorkspaceId) -> Result<Option<Span>, StoreError> {
        if !self.retention.is_bounded() {
            return Ok(None);
        }
        Ok(self.store.workspace(id).await?.and_then(|workspace| self.retention.of(&workspace.tier)))
    }

    /// The program of a metric's SQL; `metrics` gives those it may read.
    pub(crate) async fn program(
        &self,
        tenant: &Tenant,
        sql: &str,
        metrics: impl Fn(&ItemName) -> Option<Arc<Program>>,
    ) -> Result<Arc<Program>, Fault> {
        Ok(self.planner.program(sql, |name: &StreamName| source(tenant, name, &metrics)).await?)
    }
}

/// What a name in FROM stands for in a workspace.
fn source(tenant: &Tenant, name: &StreamName, metrics: impl Fn(&ItemName) -> Option<Arc<Program>>) -> Option<Source> {
    match name.metric() {
        Some(metric) => metrics(&metric).map(Source::Metric),
        None if name.is_table() => {
            tenant.tables.read().get(name).map(|table| Source::Stream(table.schema().relation().clone()))
        }
        None => tenant.schemas.read().get(name).map(|schema| Source::Stream(schema.arrow().clone())),
    }
}

struct Inner {
    deps: Arc<Deps>,
    shared: Arc<Shared>,
    limits: Limits,
    tenants: RwLock<HashMap<WorkspaceId, Arc<Tenant>>>,
    root: ActorRef<RootMsg>,
    /// Whether the root has ended.
    root_ended: watch::Sender<bool>,
    queries: QueryPool,
    sessions: Arc<Sessions>,
    rates: Mutex<Rates>,
    looks: Looks,
    /// Workspaces that have something to compute since before the start.
    behind: AtomicUsize,
}

/// The running system. A clone is another handle to it.
#[derive(Clone)]
pub struct System(Arc<Inner>);

/// A stream and where it stands.
#[derive(Clone, Debug)]
pub struct StreamInfo {
    pub schema: Arc<StreamSchema>,
    /// Greatest event time seen.
    pub frontier: Option<Micros>,
    /// Events too late for a metric.
    pub late: u64,
    /// Events accepted since the process started.
    pub events: u64,
}

/// The answer to an ingest.
#[derive(Clone, Debug)]
pub struct Ingested {
    pub accepted: u64,
    pub duplicates: u64,
    pub rejected: u64,
    pub errors: Vec<EventError>,
    /// Log offset of the batch; `None` when nothing new was in it.
    pub offset: Option<u64>,
}

/// Which rows of a metric to read.
#[derive(Clone, Debug, Default)]
pub struct RowsQuery {
    pub from: Option<Micros>,
    pub to: Option<Micros>,
    pub limit: usize,
    /// The `next` of the page before.
    pub after: Option<String>,
    /// Only final rows, or only provisional ones.
    pub only_final: Option<bool>,
    /// Key columns and the value each must have, as text of the column's type; `None` is NULL.
    pub keys: Vec<(String, Option<String>)>,
    /// Of the final rows only the last of each hour or day and key; the range is then widened to whole ones.
    pub step: Option<Step>,
}

/// A page of a metric's rows, as the contract shows them, in order of window and key.
#[derive(Clone, Debug)]
pub struct RowsPage {
    pub rows: Vec<Row>,
    pub next: Option<String>,
}

impl RowsPage {
    /// The rows to compute with: numbers are doubles where they are no integers.
    pub fn values(&self) -> Vec<Map<String, Value>> {
        let value = |text: &RawValue| serde_json::from_str(text.get()).unwrap_or_default();
        self.rows.iter().map(|row| row.iter().map(|(name, text)| (name.clone(), value(text))).collect()).collect()
    }
}

/// How a metric stands.
pub struct LiveRows {
    pub program: Arc<Program>,
    /// Its provisional rows.
    pub rows: Vec<Rows>,
    /// The event time that the stream they come from has reached.
    pub frontier: Option<Micros>,
    /// When the newest of its final rows ends that is not stored yet.
    pub unsaved_to: Option<Micros>,
    /// Why it stopped.
    pub failure: Option<Stop>,
}

/// A question in SQL.
#[derive(Clone, Debug)]
pub struct QueryRequest {
    pub sql: String,
    /// Values of `$1`, `$2`, ….
    pub params: Vec<Value>,
    pub timeout: Option<Duration>,
}

/// Its answer.
#[derive(Clone, Debug)]
pub struct QueryAnswer {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

/// An actor and how it is doing.
#[derive(Clone, Debug, Serialize)]
pub struct ActorInfo {
    /// From the root on, `/`-separated.
    pub path: String,
    pub kind: String,
    /// `running`, `restoring` or `restarting`. A workspace that rests has no actor.
    pub state: String,
    pub mailbox_batches: u64,
    pub mailbox_bytes: u64,
    pub restarts: u64,
    pub last_failure: Option<String>,
    pub state_bytes: u64,
    /// Over the last second or two.
    pub batches_per_second: f64,
}

/// Rates over the last seconds.
#[derive(Clone, Debug, Default)]
pub struct Throughput {
    pub events_per_second: f64,
    pub batches_per_second: f64,
    pub bytes_per_second: f64,
    /// Since the process started.
    pub events_total: u64,
    /// Events per second of the workspaces that have some, the busiest first.
    pub workspaces: Vec<(WorkspaceId, f64)>,
    /// Batches per second of the workspaces that have some.
    pub batches: HashMap<WorkspaceId, f64>,
}

#[derive(Default)]
struct Rates {
    taken: Option<(Instant, HashMap<WorkspaceId, [u64; 3]>)>,
    current: Throughput,
}

/// A part the system needs, and whether it works.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    pub name: &'static str,
    pub ok: bool,
    pub detail: String,
    /// Without it events are still taken in and live results go on.
    #[serde(skip)]
    pub can_wait: bool,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.detail)
    }
}

/// What the schema of a stream is stored as.
#[derive(Serialize, Deserialize)]
struct StoredSchema {
    columns: Vec<Column>,
    unknown_fields: UnknownFields,
}

/// Everything a system is built from.
pub struct Parts {
    pub store: Store,
    pub log: Arc<dyn Log>,
    pub dedup: Arc<Dedup>,
    pub outlet: Arc<dyn Outlet>,
    pub clock: Arc<dyn Clock>,
    pub limits: Limits,
    pub agents: BTreeMap<ItemName, crate::agent::AgentConfig>,
    pub cache: Arc<Cache>,
    pub webhooks: WebhookConfig,
    /// Seals the secrets of webhooks.
    pub sealer: Arc<Sealer>,
    pub retention: Retention,
}

/// For how long final rows of metrics are kept at most, by the tier of their workspace.
#[derive(Clone, Default)]
pub struct Retention {
    /// Nothing for a tier that keeps them as long as each metric says.
    pub tiers: BTreeMap<String, Option<Span>>,
    /// The tier of workspaces whose own is none of these.
    pub default_tier: String,
}

impl Retention {
    /// Whether there is a tier that bounds it.
    pub(crate) fn is_bounded(&self) -> bool {
        self.tiers.values().any(Option::is_some)
    }

    fn of(&self, tier: &str) -> Option<Span> {
        self.tiers.get(tier).or_else(|| self.tiers.get(&self.default_tier)).copied().flatten()
    }
}

/// Where the store keeps [`Tenant::first`], by workspace.
const FIRST_OFFSET: &str = "first_offset/";
/// Where it keeps what is to be known of a workspace at rest.
const RESTING: &str = "resting/";
/// Where it keeps the metrics whose charts were looked at most.
const LOOKED_AT: &str = "looked_at";
/// Windows of a chart, as the console draws it.
const CHART: i64 = 240;
/// Workspaces that read state and log at the same time after a start.
const CATCHING_UP: usize = 16;

/// A query's place among those of its workspace.
struct Place(Arc<Tenant>);

impl Place {
    /// Nothing where `most` are taken.
    fn take(tenant: &Arc<Tenant>, most: usize) -> Option<Place> {
        let grow = |taken: usize| (taken < most).then_some(taken + 1);
        tenant.queries.fetch_update(Relaxed, Relaxed, grow).ok().map(|_| Place(tenant.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.queries.fetch_sub(1, Relaxed);
    }
}

/// How long a request waits for an actor's answer, in milliseconds.
const ASK: u64 = 30_000;
/// How long it waits for an actor that failed: longer than the first few restarts take, which are what a bad event costs.
const RESTART: Duration = Duration::from_secs(5);

impl System {
    /// Makes every workspace of the store known and returns at once: those that were at work when the last process
    /// ended are woken one after the other, every other when it is needed.
    pub async fn start(parts: Parts) -> Result<System, Fault> {
        let Parts { store, log, dedup, outlet, clock, limits, agents, cache, webhooks, sealer, retention } = parts;
        let committer = Committer::start(store.clone());
        let mailbox_bytes = limits.mailbox_bytes;
        let shared = Shared { log: log.clone(), dedup, outlet: outlet.clone(), root: OnceLock::new(), mailbox_bytes };
        let deps = Arc::new(Deps {
            store,
            log,
            outlet,
            clock,
            unsaved_bytes: limits.unsaved_bytes,
            state: limits.state(),
            committer,
            cache,
            rest_after: Duration::from_millis(limits.rest_ms),
            idle_timeout: Span::millis(i64::try_from(limits.idle_timeout_ms).unwrap_or(i64::MAX / 1_000)),
            notifier: Notifier::new(&webhooks).map_err(Fault::internal)?,
            webhooks,
            sealer,
            background: Background::start("compute", std::thread::available_parallelism().map_or(1, usize::from))
                .map_err(Fault::internal)?,
            retention,
            planner: Planner::default(),
        });
        let (root, task) = Actor::spawn(None, RootActor, deps.clone()).await.map_err(Fault::internal)?;
        let root_ended = watch::Sender::new(false);
        let ended = root_ended.clone();
        tokio::spawn(async move {
            _ = task.await;
            ended.send_replace(true);
        });
        _ = shared.root.set(root.clone());
        let inner = Inner {
            sessions: Arc::new(Sessions::new(agents)),
            deps: deps.clone(),
            shared: Arc::new(shared),
            limits,
            tenants: RwLock::default(),
            root,
            root_ended,
            queries: QueryPool::start()?,
            rates: Mutex::default(),
            looks: Looks::default(),
            behind: AtomicUsize::new(0),
        };
        let system = System(Arc::new(inner));
        let behind = system.know_all().await?;
        system.remember_ids().await?;
        system.0.behind.store(behind.len(), Relaxed);
        tokio::spawn(catch_up(Arc::downgrade(&system.0), behind));
        tokio::spawn(retain(Arc::downgrade(&system.0)));
        tokio::spawn(rouse(Arc::downgrade(&system.0)));
        tokio::spawn(warm(Arc::downgrade(&system.0)));
        system.0.sessions.clone().recover(&system).await?;
        Ok(system)
    }

    /// Commits everything and stops the actors. What is not done within `within` is replayed at the next start.
    pub async fn stop(&self, within: Duration) {
        self.0.sessions.stop().await;
        let drains = self.tenants().into_iter().filter_map(|tenant| tenant.actor()).map(|actor| async move {
            _ = ractor::call!(actor, WorkspaceMsg::Drain);
        });
        // what the last commits put into the outbox is delivered after the next start
        let deliveries = async {
            if tokio::time::timeout(within, self.0.deps.notifier.drain()).await.is_err() {
                tracing::warn!(?within, "not all webhooks answered in time; they will be told again, with the same id");
            }
        };
        let drains = async {
            if tokio::time::timeout(within, futures::future::join_all(drains)).await.is_err() {
                tracing::warn!(?within, "not all workspaces committed in time; their log will be replayed at start");
            }
        };
        tokio::join!(deliveries, drains);
        if let Err(error) = self.note_resting().await {
            tracing::warn!(%error, "who rests could not be noted; those workspaces are woken at the next start");
        }
        if let Err(error) = self.note_looks().await {
            tracing::warn!(%error, "which charts are looked at could not be noted; the next start does not read them first");
        }
        let (dedup, log, now) = (self.0.shared.dedup.clone(), self.0.deps.log.clone(), self.now());
        let flushed = tokio::task::spawn_blocking(move || dedup.flush(log.tail().0, now)).await;
        if let Ok(Err(error)) = flushed {
            tracing::warn!(%error, "event ids were not written; they will be read from the log at the next start");
        }
        self.0.root.stop(None);
        _ = self.0.deps.log.barrier().await; // a log that failed has said so already
    }

    fn adopt(
        &self,
        id: WorkspaceId,
        first: u64,
        rows: &[StreamRow],
        tables: Vec<TableRow>,
    ) -> Result<Arc<Tenant>, Fault> {
        let tenant = Tenant::new(id.clone(), first, self.0.shared.clone());
        if !rows.is_empty() {
            let mut schemas = tenant.schemas.write();
            let schemas = Arc::make_mut(&mut schemas);
            for row in rows {
                let stored: StoredSchema = serde_json::from_str(&row.schema_json).map_err(Fault::internal)?;
                let schema = StreamSchema::new(row.stream.clone(), stored.columns, stored.unknown_fields);
                schemas.insert(row.stream.clone(), Arc::new(schema.map_err(Fault::internal)?));
            }
        }
        if !tables.is_empty() {
            let mut known = tenant.tables.write();
            let known = Arc::make_mut(&mut known);
            for row in tables {
                let stored: StoredTable = serde_json::from_value(row.definition).map_err(Fault::internal)?;
                known.insert(row.name.clone(), Arc::new(stored.table(row.name).map_err(Fault::internal)?));
            }
        }
        self.0.tenants.write().insert(id, tenant.clone());
        Ok(tenant)
    }

    /// Makes every workspace of the store known: those that have something to compute.
    async fn know_all(&self) -> Result<Vec<Arc<Tenant>>, Fault> {
        let deps = self.0.deps.clone();
        let store = &deps.store;
        let log = deps.log.clone();
        let newest = tokio::task::spawn_blocking(move || log.newest());
        let mut schemas: HashMap<WorkspaceId, Vec<StreamRow>> = HashMap::new();
        for row in store.all_streams().await? {
            schemas.entry(row.workspace.clone()).or_default().push(row);
        }
        let mut tables: HashMap<WorkspaceId, Vec<TableRow>> = HashMap::new();
        for row in store.all_tables().await? {
            tables.entry(row.workspace.clone()).or_default().push(row);
        }
        let mut silences: HashMap<WorkspaceId, Vec<Silence>> = HashMap::new();
        for silence in store.all_silences().await? {
            silences.entry(silence.workspace.clone()).or_default().push(silence);
        }
        let firsts: HashMap<String, String> = store.metas(FIRST_OFFSET).await?.into_iter().collect();
        let mut restings: HashMap<String, String> = store.metas(RESTING).await?.into_iter().collect();
        let saved: HashMap<_, _> = store.checkpoints_offsets().await?.into_iter().collect();
        let newest = newest.await.map_err(Fault::internal)?.map_err(Fault::internal)?;
        let tail = deps.log.tail().0;
        let mut behind = Vec::new();
        for workspace in store.all_workspaces().await? {
            let id = workspace.id;
            let rows = schemas.remove(&id).unwrap_or_default();
            let first = firsts.get(id.as_str()).and_then(|text| text.parse().ok()).unwrap_or(0);
            let resting: Option<Resting> =
                restings.remove(id.as_str()).and_then(|text| serde_json::from_str(&text).ok());
            let saved_at = saved.get(&id).copied();
            let appended = newest.get(&id).map_or(0, |offset| offset.next().0);
            if let Some(offset) = saved_at.filter(|offset| *offset > tail) {
                let detail = format!(
                    "the store has workspace `{id}` up to log offset {offset}, and the log ends at {tail}: it is not \
                     the log that belongs to this store, or it lost data; restore the log from a copy"
                );
                return Err(Fault::new(FaultKind::Internal, "log_behind_store", detail));
            }
            let silences = silences.remove(&id).unwrap_or_default();
            let tables = tables.remove(&id).unwrap_or_default();
            let tenant = self.adopt(id, first, &rows, tables)?;
            *tenant.silences.write() = silences;
            let from = saved_at.unwrap_or(0).max(first);
            tenant.counters.saved.store(from, Relaxed);
            tenant.counters.appended.store(appended, Relaxed);
            let resting = resting.filter(|resting| resting.offset >= from);
            let was_at_rest = resting.is_some() || saved_at.is_none();
            let done = resting.as_ref().map_or(from, |resting| resting.offset.max(from));
            *tenant.resting.lock() = resting;
            if appended > done || !was_at_rest {
                behind.push(tenant);
            }
        }
        Ok(behind)
    }

    /// Reads the ids that only the log has, so that a repeat is known as one also after a restart.
    async fn remember_ids(&self) -> Result<(), Fault> {
        let (log, dedup, system) = (self.0.deps.log.clone(), self.0.shared.dedup.clone(), self.clone());
        let (covered, head) = (dedup.covered(), log.head().0);
        if covered < head {
            tracing::warn!(
                "the index of event ids reaches up to log offset {covered} and the log begins at {head}: a repeat of an \
                 event from before that counts as new; restore the folder `ids` with the log from a backup"
            );
        }
        let read = move || -> Result<(), Fault> {
            let filter = Filter { with_ids: true, ..Filter::default() };
            let from = Offset(covered.max(head));
            let now = system.now();
            for record in log.scan(from, filter).map_err(Fault::internal)? {
                let (offset, record) = record.map_err(Fault::internal)?;
                if let Body::Events { stream, batch } = record.body
                    && let Ok(tenant) = system.tenant(&record.workspace)
                    && offset.0 >= tenant.first
                {
                    let ids: Vec<_> = tenant.ids(&stream, &batch).into_iter().flatten().collect();
                    dedup.confirm(dedup.begin(offset.0), &ids);
                    if dedup.is_full() {
                        dedup.flush(offset.next().0, now)?;
                    }
                }
            }
            Ok(())
        };
        tokio::task::spawn_blocking(read).await.map_err(Fault::internal)?
    }

    /// Returns once a supervisor has failed that has none itself: whoever runs this has to begin anew.
    pub async fn failed(&self) {
        let mut root_ended = self.0.root_ended.subscribe();
        tokio::select! {
            _ = root_ended.wait_for(|ended| *ended) => {}
            () = self.0.sessions.ended() => {}
        }
    }

    /// Puts into the store who went to rest since the last call.
    async fn note_resting(&self) -> Result<(), Fault> {
        let mut values = Vec::new();
        for tenant in self.tenants() {
            let mut resting = tenant.resting.lock();
            if let Some(resting) = resting.as_mut().filter(|resting| !resting.noted) {
                resting.noted = true;
                values.push((
                    format!("{RESTING}{}", tenant.id),
                    serde_json::to_string(resting).map_err(Fault::internal)?,
                ));
            }
        }
        if values.is_empty() {
            return Ok(());
        }
        Ok(self.store().put_metas(&values).await?)
    }

    /// Puts into the store which charts people look at.
    async fn note_looks(&self) -> Result<(), Fault> {
        let most = self.0.looks.most();
        if most.is_empty() {
            return Ok(());
        }
        let most = serde_json::to_string(&most).map_err(Fault::internal)?;
        Ok(self.store().put_meta(LOOKED_AT, &most).await?)
    }

    fn tenants(&self) -> Vec<Arc<Tenant>> {
        self.0.tenants.read().values().cloned().collect()
    }

    fn tenant(&self, id: &WorkspaceId) -> Result<Arc<Tenant>, Fault> {
        self.0.tenants.read().get(id).cloned().ok_or_else(|| {
            Fault::not_found("workspace_not_found", format!("there is no workspace `{id}`, or it is not yours"))
        })
    }

    /// Has the actor of a workspace change something.
    async fn ask<T: Send + 'static>(
        &self,
        id: &WorkspaceId,
        message: impl FnOnce(Reply<T>) -> WorkspaceMsg,
    ) -> Result<T, Fault> {
        let (actor, _awake) = self.actor(id).await?;
        ractor::call_t!(actor, message, ASK).map_err(|error| restarting(id, error))?
    }

    /// Asks the actor of a workspace; again when it failed over what was in its mailbox before the question.
    async fn read<T: Send + 'static>(
        &self,
        id: &WorkspaceId,
        message: impl Fn(RpcReplyPort<T>) -> WorkspaceMsg,
    ) -> Result<T, Fault> {
        let (tenant, begun) = (self.tenant(id)?, Instant::now());
        loop {
            let (actor, _awake) = self.actor(id).await?;
            let error = match ractor::call_t!(actor, message, ASK) {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let left = RESTART.saturating_sub(begun.elapsed());
            if left.is_zero() || !tenant.lost(actor.get_id(), left).await {
                return Err(restarting(id, error));
            }
        }
    }

    /// The actor of a workspace, woken where it rested. It stays while the second value is held.
    async fn actor(&self, id: &WorkspaceId) -> Result<(ActorRef<WorkspaceMsg>, Held), Fault> {
        let tenant = self.tenant(id)?;
        let held = tenant.hold();
        let patience = match tenant.phase() {
            Phase::Failed => RESTART,
            _ => Duration::from_millis(ASK),
        };
        let actor = tenant.awake(patience).await;
        Ok((actor.ok_or_else(|| restarting(id, "it failed and is being started again"))?, held))
    }

    /// Users, members, tokens, keys, listings and the audit log.
    pub fn store(&self) -> &Store {
        &self.0.deps.store
    }

    /// What was read before.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.0.deps.cache
    }

    /// The log, and the first offset in it that belongs to this workspace.
    pub fn log_of(&self, id: &WorkspaceId) -> Result<(Arc<dyn Log>, Offset), Fault> {
        Ok((self.0.deps.log.clone(), Offset(self.tenant(id)?.first)))
    }

    /// The bounds of this system.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub(crate) fn deps(&self) -> &Deps {
        &self.0.deps
    }

    pub(crate) fn empty_engine(&self) -> engine::workspace::Workspace {
        self.0.deps.empty_engine()
    }

    /// Processing time.
    pub fn now(&self) -> Micros {
        self.0.deps.clock.now()
    }

    pub(crate) fn outlet(&self) -> &Arc<dyn Outlet> {
        &self.0.deps.outlet
    }

    pub async fn create_workspace(&self, workspace: Workspace, owner: &str) -> Result<(), Fault> {
        let id = workspace.id.clone();
        self.store().create_workspace(&workspace, owner).await?;
        // what the log holds of an earlier workspace of this name is not this one's
        let first = self.0.deps.log.tail().0;
        self.store().put_meta(&format!("{FIRST_OFFSET}{id}"), &first.to_string()).await?;
        let tenant = self.adopt(id, first, &[], Vec::new())?;
        tenant.counters.saved.store(first, Relaxed);
        Ok(())
    }

    /// Deletes a workspace with everything the store has of it. Its events leave the log by retention.
    pub async fn delete_workspace(&self, id: &WorkspaceId) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        tenant.gone.store(true, Relaxed);
        if let Some(actor) = tenant.actor() {
            actor.stop_and_wait(None, Some(Duration::from_secs(5))).await.map_err(Fault::internal)?;
        }
        tenant.set_phase(Phase::Failed); // who still looks for the actor is told at once
        self.0.sessions.forget(id);
        self.store().delete_workspace(id).await?;
        self.cache().changed(&[blocks::of_workspace(id)]);
        self.0.tenants.write().remove(id);
        Ok(())
    }

    pub async fn workspace_exists(&self, id: &WorkspaceId) -> bool {
        self.0.tenants.read().contains_key(id)
    }

    pub async fn streams(&self, id: &WorkspaceId) -> Result<Vec<StreamInfo>, Fault> {
        let tenant = self.tenant(id)?;
        let times = self.read(id, WorkspaceMsg::Streams).await?;
        let mut schemas: Vec<_> = tenant.schemas.read().values().cloned().collect();
        schemas.sort_by(|a, b| a.stream.cmp(&b.stream));
        let info = |schema: Arc<StreamSchema>| {
            let time = times.get(&schema.stream).copied().unwrap_or_default();
            StreamInfo { frontier: time.frontier, late: time.late, events: time.events, schema }
        };
        Ok(schemas.into_iter().map(info).collect())
    }

    /// For as long as it is held nobody else who asks for it defines anything in this workspace: of many who do so at
    /// the same time none gets past a bound.
    pub async fn defining(&self, id: &WorkspaceId) -> Result<OwnedMutexGuard<()>, Fault> {
        let defining = self.tenant(id)?.defining.clone();
        Ok(defining.lock_owned().await)
    }

    /// Adds a stream, or changes the columns of one as far as its events allow.
    pub async fn define_stream(&self, id: &WorkspaceId, schema: StreamSchema) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        let stream = schema.stream.clone();
        own_name(&stream)?;
        let (known, count) = {
            let schemas = tenant.schemas.read();
            (schemas.get(&stream).cloned(), schemas.len())
        };
        match known {
            Some(known) => {
                known
                    .check_evolution(&schema)
                    .map_err(|error| Fault::new(FaultKind::Conflict, "incompatible_schema", error.to_string()))?;
                self.check_readers(id, &stream, schema.arrow()).await?;
            }
            None if count >= self.0.limits.streams + built_in().len() => {
                return Err(over_limit("limits.streams", self.0.limits.streams));
            }
            None => {}
        }
        let now = self.now();
        let stored = StoredSchema { columns: schema.columns.clone(), unknown_fields: schema.unknown_fields };
        let row = StreamRow {
            workspace: id.clone(),
            stream: stream.clone(),
            schema_json: serde_json::to_string(&stored).map_err(Fault::internal)?,
            created_at: now,
            updated_at: now,
        };
        self.store().put_stream(&row).await?;
        Arc::make_mut(&mut tenant.schemas.write()).insert(stream, Arc::new(schema));
        self.cache().changed(&[query::of_definitions(id)]);
        Ok(())
    }

    /// An error where a metric could no longer be planned with `columns` as those of `changed`.
    async fn check_readers(&self, id: &WorkspaceId, changed: &StreamName, columns: &SchemaRef) -> Result<(), Fault> {
        let (tenant, known) = (self.tenant(id)?, self.metrics(id).await?);
        let metric = |name: &ItemName| known.iter().find(|metric| metric.name == *name).map(|m| m.program.clone());
        let reads =
            |info: &&MetricInfo| info.program.streams().chain(info.program.tables()).any(|read| read == changed);
        for info in known.iter().filter(reads) {
            let of = |name: &StreamName| match name == changed {
                true => Some(Source::Stream(columns.clone())),
                false => source(&tenant, name, metric),
            };
            if let Err(error) = self.0.deps.planner.program(&info.definition.sql, of).await {
                let name = &info.name;
                let detail = format!(
                    "metric `{name}` reads `{changed}` and could not be planned over these columns: {error}; delete or \
                     change the metric first"
                );
                return Err(Fault::new(FaultKind::Conflict, "column_in_use", detail));
            }
        }
        Ok(())
    }

    pub async fn schema(&self, id: &WorkspaceId, stream: &StreamName) -> Result<Arc<StreamSchema>, Fault> {
        self.tenant(id)?.schemas.read().get(stream).cloned().ok_or_else(|| {
            let detail = format!("there is no stream `{stream}`; define it with PUT …/streams/{stream}");
            Fault::not_found("unknown_stream", detail)
        })
    }

    /// Takes in decoded events; returns once the good ones are durable. The bad ones go to the dead letters.
    pub async fn ingest(&self, id: &WorkspaceId, stream: &StreamName, decoded: Decoded) -> Result<Ingested, Fault> {
        let tenant = self.tenant(id)?;
        let Decoded { batch, rejected, errors } = decoded;
        let at = self.now();
        let refused = |error: &EventError| Refused {
            at,
            code: error.code.to_owned(),
            detail: error.detail.clone(),
            payload: error.payload.clone(),
        };
        // before the good ones: where there is no room for these, nothing was taken in
        if !errors.is_empty() {
            tenant.refuse(stream, errors.iter().map(refused).collect()).await?;
        }
        let appended = tenant.append(stream, batch).await?;
        metrics::counter!("tidewatch_events_accepted_total").increment(appended.accepted);
        metrics::counter!("tidewatch_events_rejected_total").increment(rejected as u64);
        metrics::counter!("tidewatch_events_duplicate_total").increment(appended.duplicates);
        Ok(Ingested {
            accepted: appended.accepted,
            duplicates: appended.duplicates,
            rejected: rejected as u64,
            errors,
            offset: appended.offset,
        })
    }

    /// The reference tables of a workspace by name.
    pub async fn tables(&self, id: &WorkspaceId) -> Result<Vec<TableInfo>, Fault> {
        let tenant = self.tenant(id)?;
        let sizes = self.read(id, WorkspaceMsg::TableSizes).await?;
        let mut tables: Vec<Arc<streams::table::Table>> = tenant.tables.read().values().cloned().collect();
        tables.sort_by(|a, b| a.name().cmp(b.name()));
        let info = |table: Arc<streams::table::Table>| TableInfo {
            size: sizes.get(table.name()).copied().unwrap_or_default(),
            table,
        };
        Ok(tables.into_iter().map(info).collect())
    }

    /// The definition of a reference table.
    pub fn table_definition(&self, id: &WorkspaceId, name: &StreamName) -> Result<Arc<streams::table::Table>, Fault> {
        let found = self.tenant(id)?.tables.read().get(name).cloned();
        found.ok_or_else(|| {
            let bare = name.parts().1;
            Fault::not_found("unknown_table", format!("there is no table `{bare}`; define it with PUT …/tables/{bare}"))
        })
    }

    /// Adds a reference table, or changes its columns as far as its rows allow.
    pub async fn define_table(&self, id: &WorkspaceId, table: streams::table::Table) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        let name = table.name();
        not_built_in(name)?;
        let (known, count) = {
            let tables = tenant.tables.read();
            (tables.get(name).cloned(), tables.len())
        };
        match known {
            Some(known) => {
                known
                    .check_evolution(&table)
                    .map_err(|error| Fault::new(FaultKind::Conflict, "incompatible_schema", error.to_string()))?;
                self.check_readers(id, name, table.schema().relation()).await?;
            }
            None if count >= self.0.limits.tables + built_in_tables().len() => {
                return Err(over_limit("limits.tables", self.0.limits.tables));
            }
            None => {}
        }
        self.ask(id, |reply| WorkspaceMsg::DefineTable { table: Box::new(table), reply }).await
    }

    /// Deletes a reference table that no metric joins, with its rows.
    pub async fn remove_table(&self, id: &WorkspaceId, name: &StreamName) -> Result<(), Fault> {
        not_built_in(name)?;
        let existed = self.ask(id, |reply| WorkspaceMsg::RemoveTable { name: name.clone(), reply }).await?;
        if existed { Ok(()) } else { Err(unknown("table", "unknown_table", name.parts().1)) }
    }

    /// Takes in decoded changes of a reference table's rows; returns once the good ones are durable.
    pub async fn change_rows(&self, id: &WorkspaceId, name: &StreamName, decoded: Decoded) -> Result<Ingested, Fault> {
        if name == positions().name() {
            let detail = "positions are changed with their portfolio: PUT …/portfolios/{pf}/positions";
            return Err(Fault::new(FaultKind::Conflict, "built_in_table", detail));
        }
        let tenant = self.tenant(id)?;
        let Decoded { batch, rejected, errors } = decoded;
        let (held, most) = (tenant.counters.table_bytes.load(Relaxed) as usize, self.0.limits.table_bytes);
        if held.saturating_add(batch.get_array_memory_size()) > most {
            let detail = format!(
                "the reference tables of this workspace hold {held} of the {most} bytes of limits.table_bytes; delete rows, or raise the limit"
            );
            return Err(Fault::new(FaultKind::Conflict, "limit_reached", detail));
        }
        let appended = tenant.append(name, batch).await?;
        Ok(Ingested {
            accepted: appended.accepted,
            duplicates: appended.duplicates,
            rejected: rejected as u64,
            errors,
            offset: appended.offset,
        })
    }

    /// The rows of a reference table that are valid at `at`, in order of the primary key, with `valid_from` behind
    /// the table's columns.
    pub async fn table_rows(&self, id: &WorkspaceId, name: &StreamName, at: Micros) -> Result<RecordBatch, Fault> {
        self.table_definition(id, name)?;
        let rows = self.read(id, |reply| WorkspaceMsg::TableRows { name: name.clone(), at, reply }).await??;
        rows.ok_or_else(|| unknown("table", "unknown_table", name.parts().1))
    }

    pub async fn define_metric(
        &self,
        id: &WorkspaceId,
        name: ItemName,
        definition: MetricDefinition,
    ) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        let known = self.metrics(id).await?;
        let metric = |name: &ItemName| known.iter().find(|metric| metric.name == *name).map(|m| m.program.clone());
        let program = self.0.deps.program(&tenant, &definition.sql, metric).await?;
        if known.len() >= self.0.limits.metrics && !known.iter().any(|metric| metric.name == name) {
            return Err(over_limit("limits.metrics", self.0.limits.metrics));
        }
        let defined = self.ask(id, |reply| WorkspaceMsg::Define { name, definition, program, reply }).await;
        self.cache().changed(&[query::of_definitions(id)]);
        defined
    }

    pub async fn remove_metric(&self, id: &WorkspaceId, name: &ItemName) -> Result<(), Fault> {
        let removed = self.ask(id, |reply| WorkspaceMsg::Remove { name: name.clone(), reply }).await;
        self.cache().changed(&[query::of_definitions(id)]);
        let existed = removed?;
        if existed { Ok(()) } else { Err(unknown("metric", "unknown_metric", name)) }
    }

    /// Metrics of the store that stay stopped since they cannot be planned.
    pub async fn unplanned_metrics(&self, id: &WorkspaceId) -> Result<Vec<UnplannedMetric>, Fault> {
        self.read(id, WorkspaceMsg::Unplanned).await
    }

    pub async fn metrics(&self, id: &WorkspaceId) -> Result<Vec<MetricInfo>, Fault> {
        self.read(id, WorkspaceMsg::Metrics).await
    }

    /// A page of rows, the store's and memory's as one table.
    pub async fn metric_rows(&self, id: &WorkspaceId, name: &ItemName, query: RowsQuery) -> Result<RowsPage, Fault> {
        // who draws a chart says where it begins
        let is_chart = query.from.is_some() && query.after.is_none();
        let page = self.read_rows(id, name, query).await?;
        if is_chart {
            self.0.looks.count(id, name);
        }
        Ok(page)
    }

    async fn read_rows(&self, id: &WorkspaceId, name: &ItemName, mut query: RowsQuery) -> Result<RowsPage, Fault> {
        if let Some(step) = query.step {
            query.from = query.from.map(|from| step.bucket(from));
            query.to = query.to.map(|to| step.bucket_after(to));
        }
        // memory first: what moves to the store meanwhile is then seen twice and counted once, never missed
        let recent = self.read(id, |reply| WorkspaceMsg::Rows { metric: name.clone(), reply }).await??;
        if let Ok(program) = &recent.program {
            query.keys = key_values(program, std::mem::take(&mut query.keys))?;
        }
        let (after, live_done) = match query.after.as_deref().map(|after| after.split_once('~')) {
            None => (None, None),
            Some(Some(("s", cursor))) => (Some(cursor.to_owned()), None),
            Some(Some(("m", skip))) => (None, skip.parse::<usize>().ok()),
            Some(_) => return Err(Fault::invalid("bad_cursor", "`after` is the `next` of an earlier page")),
        };
        let mut rows = Vec::new();
        let limit = query.limit.max(1);
        if query.only_final != Some(false) && live_done.is_none() {
            let cursor = RowQuery { from: query.from, to: query.to, limit, after, keys: query.keys.clone() };
            let past = Past {
                cache: self.cache(),
                store: self.store(),
                workspace: id,
                metric: name,
                window: recent.program.as_ref().ok().map(|program| program.window()),
                frontier: recent.frontier,
            };
            let (stored, next) = past.page(&cursor, query.step).await?;
            let after = cursor.position(query.step)?;
            for row in history::merge(stored, &recent.unsaved, &query, after, next.is_some()) {
                rows.push(rows::from_store(&row).map_err(Fault::internal)?);
            }
            if let Some(next) = next {
                return Ok(RowsPage { rows, next: Some(format!("s~{next}")) });
            }
        }
        let mut next = None;
        if query.only_final != Some(true) {
            let skip = live_done.unwrap_or(0);
            let live = history::live(&recent, &query, &rows).map_err(Fault::internal)?;
            let room = limit.saturating_sub(rows.len());
            next = (live.len() > skip + room).then(|| format!("m~{}", skip + room));
            rows.extend(live.into_iter().skip(skip).take(room));
        }
        Ok(RowsPage { rows, next })
    }

    /// How a metric stands now.
    pub async fn live_rows(&self, id: &WorkspaceId, name: &ItemName) -> Result<LiveRows, Fault> {
        let recent = self.read(id, |reply| WorkspaceMsg::Rows { metric: name.clone(), reply }).await??;
        Ok(LiveRows {
            program: recent.program?,
            rows: recent.live,
            frontier: recent.frontier,
            unsaved_to: recent.unsaved.iter().map(|row| row.window_end).max(),
            failure: recent.failure,
        })
    }

    /// Answers read-only SQL over the workspace's streams and metrics, within its time: waiting, reading and computing
    /// together. As long as the workspace stands still, the answer is that of the last time.
    pub async fn query(&self, id: &WorkspaceId, request: QueryRequest) -> Result<QueryAnswer, Fault> {
        let most = Duration::from_millis(self.0.limits.query_ms);
        let timeout = request.timeout.map_or(most, |asked| asked.min(most));
        let deadline = tokio::time::Instant::now() + timeout;
        let tenant = self.tenant(id)?;
        let question = Question::parse(&request.sql)?;
        let Some(offset) = tenant.settled().filter(|_| question.is_repeatable()) else {
            return self.compute(tenant, question, request.params, timeout, deadline).await;
        };
        // events that are too old to be kept go without a record of it
        let first = self.0.deps.log.head().0.max(tenant.first);
        let params = serde_json::to_string(&request.params).map_err(Fault::internal)?;
        let ask = Ask {
            class: Class::Queries,
            tags: vec![blocks::of_workspace(id), query::of_definitions(id)],
            // who may wait longer does not get the failure of who may not
            question: format!("from {first} to {offset} within {timeout:?} of {params} {}", request.sql),
        };
        let load = async || self.compute(tenant, question, request.params, timeout, deadline).await;
        let answer = self.cache().get(&ask, load).await;
        answer.map(|answer| answer.as_ref().clone()).map_err(Arc::unwrap_or_clone)
    }

    async fn compute(
        &self,
        tenant: Arc<Tenant>,
        question: Question,
        params: Vec<Value>,
        timeout: Duration,
        deadline: tokio::time::Instant,
    ) -> Result<QueryAnswer, Fault> {
        let limits = &self.0.limits;
        let Some(place) = Place::take(&tenant, limits.queries) else {
            let detail = format!(
                "{} queries of this workspace run or wait already, the most of limits.queries; wait for one of them",
                limits.queries
            );
            let kind = FaultKind::Limit { retry_after: Duration::from_secs(1) };
            return Err(Fault::new(kind, "too_many_queries", detail));
        };
        let tables = tokio::time::timeout_at(deadline, self.tables_of(&tenant.id, &question));
        let tables = tables.await.map_err(|_| crate::query::too_late(timeout))??;
        let bounds = Bounds { rows: limits.query_rows, memory: limits.query_memory, until: deadline.into_std() };
        let answer = self.0.queries.run(question, params, tables, bounds, timeout, place).await?;
        Ok(QueryAnswer { schema: answer.schema, batches: answer.batches })
    }

    /// The tables a question reads, within `limits.query_memory`.
    async fn tables_of(&self, id: &WorkspaceId, question: &Question) -> Result<Vec<Table>, Fault> {
        let mut tables = Vec::new();
        let mut bytes = 0;
        for name in question.tables()? {
            let table = self.table(id, name).await?;
            bytes += table.batches.iter().map(held).sum::<usize>();
            if bytes > self.0.limits.query_memory {
                let most = self.0.limits.query_memory;
                let detail = format!("the query reads more than the {most} bytes of limits.query_memory");
                return Err(Fault::invalid("query_memory", detail));
            }
            tables.push(table);
        }
        Ok(tables)
    }

    async fn table(&self, id: &WorkspaceId, name: Vec<String>) -> Result<Table, Fault> {
        let tenant = self.tenant(id)?;
        let text = name.join(".");
        let stream = text.parse::<StreamName>().ok();
        let known = stream.and_then(|stream| Some((tenant.schemas.read().get(&stream).cloned()?, stream)));
        if let Some((schema, stream)) = known {
            let schema = loose(schema.arrow());
            let batches = self.events(id, stream, schema.clone()).await?;
            return Ok(Table { name, schema, batches });
        }
        if let Some(table) = text.parse::<StreamName>().ok().filter(StreamName::is_table) {
            let rows = self.table_rows(id, &table, self.now()).await?;
            return Ok(Table { name, schema: rows.schema(), batches: vec![rows] });
        }
        let metric: Option<ItemName> = match name.as_slice() {
            [metric] => metric.parse().ok(),
            [schema, metric] if schema == METRICS => metric.parse().ok(),
            _ => None,
        };
        let Some(metric) = metric else { return Err(unknown("table", "unknown_table", &text)) };
        let recent = match self.read(id, |reply| WorkspaceMsg::Rows { metric: metric.clone(), reply }).await? {
            Ok(recent) => recent,
            Err(fault) if fault.code == "unknown_metric" => return Err(unknown("table", "unknown_table", &text)),
            Err(fault) => return Err(fault),
        };
        let query = RowsQuery { limit: usize::MAX, ..RowsQuery::default() };
        let stored = RowQuery { limit: self.0.limits.query_rows * 10, ..RowQuery::default() };
        let (stored, more) = self.store().rows(id, &metric, &stored).await?;
        if more.is_some() {
            let detail =
                format!("metric `{metric}` has too many rows for one query; read …/metrics/{metric}/rows in pages");
            return Err(Fault::invalid("query_memory", detail));
        }
        let finals = history::merge(stored, &recent.unsaved, &query, None, false);
        let mut all = finals.iter().map(rows::from_store).collect::<Result<Vec<_>, _>>().map_err(Fault::internal)?;
        let live = history::live(&recent, &query, &all).map_err(Fault::internal)?;
        all.extend(live);
        let schema = with_state(recent.program?.output());
        let mut decoder = arrow::json::ReaderBuilder::new(schema.clone()).build_decoder().map_err(Fault::internal)?;
        let mut batches = Vec::new();
        for rows in all.chunks(1024) {
            let lines =
                rows.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>().map_err(Fault::internal)?;
            // as text: numbers of JSON values have 53 bits, decimals up to 38 digits
            decoder.decode(lines.join("\n").as_bytes()).map_err(Fault::internal)?;
            batches.extend(decoder.flush().map_err(Fault::internal)?);
        }
        Ok(Table { name, schema, batches })
    }

    /// The retained events of a stream in the columns of `schema`.
    async fn events(&self, id: &WorkspaceId, stream: StreamName, schema: SchemaRef) -> Result<Vec<RecordBatch>, Fault> {
        let (log, most) = (self.0.deps.log.clone(), self.0.limits.query_memory);
        let first = Offset(self.tenant(id)?.first);
        let filter = Filter { workspace: Some(id.clone()), stream: Some(stream.clone()), ..Filter::default() };
        let read = move || -> Result<Vec<RecordBatch>, Fault> {
            let (mut batches, mut bytes) = (Vec::new(), 0);
            for record in log.scan(log.head().max(first), filter)? {
                let Body::Events { batch, .. } = record?.1.body else { continue };
                bytes += held(&batch);
                if bytes > most {
                    let detail = format!(
                        "stream `{stream}` holds more than the {most} bytes of limits.query_memory; define a metric over it instead"
                    );
                    return Err(Fault::invalid("query_memory", detail));
                }
                batches.push(conform(&batch, &schema)?);
            }
            Ok(batches)
        };
        tokio::task::spawn_blocking(read).await.map_err(Fault::internal)?
    }

    pub async fn define_alert_rule(
        &self,
        id: &WorkspaceId,
        name: ItemName,
        definition: RuleDefinition,
    ) -> Result<(), Fault> {
        let known = self.store().alert_rules(id).await?;
        if known.len() >= self.0.limits.alert_rules && !known.iter().any(|rule| rule.name == name) {
            return Err(over_limit("limits.alert_rules", self.0.limits.alert_rules));
        }
        self.ask(id, |reply| WorkspaceMsg::Watch { name, definition, reply }).await
    }

    pub async fn remove_alert_rule(&self, id: &WorkspaceId, name: &ItemName) -> Result<(), Fault> {
        let existed = self.ask(id, |reply| WorkspaceMsg::Unwatch { name: name.clone(), reply }).await?;
        if existed { Ok(()) } else { Err(unknown("alert rule", "unknown_alert_rule", name)) }
    }

    /// Rules of a workspace that cannot look at every row, or at none (`rows` is 0 then), and why.
    pub async fn rule_trouble(&self, id: &WorkspaceId) -> Result<BTreeMap<ItemName, Trouble>, Fault> {
        self.read(id, WorkspaceMsg::Trouble).await
    }

    pub async fn alert_rules(&self, id: &WorkspaceId) -> Result<Vec<(ItemName, RuleDefinition)>, Fault> {
        let rows = self.store().alert_rules(id).await?;
        rows.into_iter()
            .map(|row| Ok((row.name, serde_json::from_value(row.definition).map_err(Fault::internal)?)))
            .collect()
    }

    /// Alerts that match are not told from its start to its end.
    pub async fn put_silence(&self, silence: Silence) -> Result<(), Fault> {
        let tenant = self.tenant(&silence.workspace)?;
        self.store().put_silence(&silence).await?;
        let mut silences = tenant.silences.write();
        silences.retain(|known| known.id != silence.id);
        silences.push(silence);
        Ok(())
    }

    pub async fn remove_silence(&self, id: &WorkspaceId, silence: &str) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        let existed = self.store().delete_silence(id, silence).await?;
        tenant.silences.write().retain(|known| known.id != silence);
        if existed { Ok(()) } else { Err(unknown("silence", "unknown_silence", silence)) }
    }

    /// The silence that keeps this alert from being told, if any: one in force when it fired, or now.
    pub fn silenced_by(&self, alert: &Alert) -> Option<String> {
        let tenant = self.tenant(&alert.workspace).ok()?;
        let found = tenant
            .silences
            .read()
            .iter()
            .find(|silence| {
                silence::covers(silence, alert, alert.fired_at) || silence::covers(silence, alert, self.now())
            })?
            .id
            .clone();
        Some(found)
    }

    pub async fn ack_alert(&self, id: &WorkspaceId, alert: &str, by: &str) -> Result<Alert, Fault> {
        let now = self.now();
        let acked = self.store().ack_alert(id, alert, by, now).await?;
        let alert = acked.ok_or_else(|| unknown("alert", "unknown_alert", alert))?;
        if alert.acked_at != Some(now) {
            return Ok(alert); // it was before, and is told already
        }
        self.ask(id, |reply| WorkspaceMsg::Ack { alert: Box::new(alert.clone()), reply }).await?;
        if !self.tenant(id)?.is_silenced(&alert) {
            let what = What::Alert { phase: AlertPhase::Acked, alert: alert.clone() };
            self.outlet().publish(Update { workspace: id.clone(), what });
        }
        Ok(alert)
    }

    /// The portfolios of a workspace.
    pub async fn portfolios(&self, id: &WorkspaceId) -> Result<Vec<Portfolio>, Fault> {
        let tags = vec![blocks::of_workspace(id), of_portfolios(id)];
        let ask = Ask { class: Class::Portfolios, tags, question: "portfolios".to_owned() };
        let load = async || Ok::<_, Fault>(Listed(self.store().portfolios(id).await?));
        let listed = self.cache().get(&ask, load).await;
        listed.map(|listed| listed.0.clone()).map_err(Arc::unwrap_or_clone)
    }

    /// The positions of a portfolio.
    pub async fn positions(&self, id: &WorkspaceId, portfolio: &ItemName) -> Result<Vec<Position>, Fault> {
        let tags = vec![blocks::of_workspace(id), of_portfolio(id, portfolio)];
        let ask = Ask { class: Class::Portfolios, tags, question: format!("positions {portfolio}") };
        let load = async || {
            if self.store().portfolio(id, portfolio.as_str()).await?.is_none() {
                return Err(unknown("portfolio", "unknown_portfolio", portfolio));
            }
            Ok(Listed(self.store().positions(id, portfolio.as_str()).await?))
        };
        let listed = self.cache().get(&ask, load).await;
        listed.map(|listed| listed.0.clone()).map_err(Arc::unwrap_or_clone)
    }

    pub async fn put_portfolio(&self, id: &WorkspaceId, portfolio: Portfolio) -> Result<(), Fault> {
        let name: ItemName = portfolio.id.parse().map_err(|e| Fault::invalid("bad_name", format!("{e}")))?;
        let done = self.store().put_portfolio(&portfolio).await;
        self.cache().changed(&[of_portfolios(id), of_portfolio(id, &name)]);
        done?;
        self.ask(id, |reply| WorkspaceMsg::Hold { id: name, reply }).await
    }

    pub async fn remove_portfolio(&self, id: &WorkspaceId, portfolio: &ItemName) -> Result<(), Fault> {
        let done = self.store().delete_portfolio(id, portfolio.as_str()).await;
        self.cache().changed(&[of_portfolios(id), of_portfolio(id, portfolio)]);
        let existed = done?;
        self.ask(id, |reply| WorkspaceMsg::Hold { id: portfolio.clone(), reply }).await?;
        if existed { Ok(()) } else { Err(unknown("portfolio", "unknown_portfolio", portfolio)) }
    }

    pub async fn put_positions(
        &self,
        id: &WorkspaceId,
        portfolio: &ItemName,
        positions: Vec<Position>,
        replace: bool,
    ) -> Result<(), Fault> {
        if self.store().portfolio(id, portfolio.as_str()).await?.is_none() {
            return Err(unknown("portfolio", "unknown_portfolio", portfolio));
        }
        let done = match replace {
            true => self.store().replace_positions(id, portfolio.as_str(), &positions).await,
            false => self.store().put_positions(id, portfolio.as_str(), &positions).await,
        };
        // also after a failure, which may be that only the answer was lost
        self.cache().changed(&[of_portfolio(id, portfolio)]);
        done?;
        self.ask(id, |reply| WorkspaceMsg::Hold { id: portfolio.clone(), reply }).await
    }

    pub async fn remove_position(&self, id: &WorkspaceId, portfolio: &ItemName, symbol: &str) -> Result<(), Fault> {
        let done = self.store().delete_position(id, portfolio.as_str(), symbol).await;
        self.cache().changed(&[of_portfolio(id, portfolio)]);
        let existed = done?;
        self.ask(id, |reply| WorkspaceMsg::Hold { id: portfolio.clone(), reply }).await?;
        if existed { Ok(()) } else { Err(unknown("position", "unknown_position", symbol)) }
    }

    pub async fn portfolio_summary(
        &self,
        id: &WorkspaceId,
        portfolio: &ItemName,
    ) -> Result<Arc<PortfolioSummary>, Fault> {
        self.read(id, |reply| WorkspaceMsg::Summary { id: portfolio.clone(), reply }).await?
    }

    /// Starts an agent run, or attaches to it where thread and run are known.
    pub async fn start_run(&self, id: &WorkspaceId, run: RunRequest) -> Result<RunHandle, Fault> {
        self.tenant(id)?;
        self.0.sessions.start(self.clone(), id, run).await
    }

    /// Follows a run from behind its event `after`, 0 for all of it.
    pub async fn attach_run(&self, id: &WorkspaceId, run: &str, after: u64) -> Result<RunHandle, Fault> {
        self.0.sessions.attach(self, id, run, after).await
    }

    /// A reader of the newest run on a thread, if there is one.
    pub async fn last_run(&self, id: &WorkspaceId, thread: &str) -> Result<Option<RunHandle>, Fault> {
        self.0.sessions.last_run(self, id, thread).await
    }

    /// The run that a thread is busy with.
    pub fn active_run(&self, id: &WorkspaceId, thread: &str) -> Option<String> {
        self.0.sessions.active_run(id, thread)
    }

    /// Id of the user who asked for a run; `None` once it is over and only stored.
    pub fn run_user(&self, id: &WorkspaceId, run: &str) -> Option<String> {
        self.0.sessions.run_user(id, run)
    }

    /// Stops a run's model and tools; it ends as cancelled.
    pub async fn cancel_run(&self, id: &WorkspaceId, run: &str) -> Result<(), Fault> {
        self.0.sessions.cancel(self, id, run).await
    }

    pub async fn agents(&self, id: &WorkspaceId) -> Result<Vec<AgentInfo>, Fault> {
        self.tenant(id)?;
        Ok(self.0.sessions.agents())
    }

    /// The supervision tree, workspaces first, the notifier last.
    pub async fn actors(&self) -> Vec<ActorInfo> {
        let mut all: Vec<ActorInfo> = Vec::new();
        let batches = self.throughput().batches;
        for tenant in self.tenants() {
            let counters = &tenant.counters;
            let state = match tenant.phase() {
                Phase::Running(_) => "running",
                Phase::Restoring(_) => "restoring",
                Phase::Failed => "restarting",
                Phase::Resting => continue,
            };
            all.push(ActorInfo {
                path: format!("root/{}", tenant.id),
                kind: "workspace".to_owned(),
                state: state.to_owned(),
                mailbox_batches: counters.queued_batches.load(Relaxed),
                mailbox_bytes: tenant.mailbox_used(),
                restarts: counters.restarts.load(Relaxed),
                last_failure: counters.last_failure.lock().clone(),
                state_bytes: counters.state_bytes.load(Relaxed),
                batches_per_second: batches.get(&tenant.id).copied().unwrap_or(0.0),
            });
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all.extend(self.0.sessions.info());
        all.push(self.0.deps.notifier.info());
        all
    }

    /// Rates since the call before the last second, or the last answer within that second.
    pub fn throughput(&self) -> Throughput {
        let mut rates = self.0.rates.lock();
        let now = Instant::now();
        let counts: HashMap<WorkspaceId, [u64; 3]> = self
            .tenants()
            .iter()
            .map(|t| {
                let c = &t.counters;
                (t.id.clone(), [c.events.load(Relaxed), c.batches.load(Relaxed), c.bytes.load(Relaxed)])
            })
            .collect();
        let total = counts.values().map(|[events, ..]| events).sum();
        let (then, before) = match rates.taken.take() {
            Some(taken) if now.duration_since(taken.0) < Duration::from_secs(1) => {
                rates.taken = Some(taken);
                rates.current.events_total = total;
                return rates.current.clone();
            }
            Some(taken) => taken,
            None => (now, counts.clone()),
        };
        let seconds = now.duration_since(then).as_secs_f64().max(1e-3);
        let mut sums = [0.0; 3];
        let (mut workspaces, mut batches) = (Vec::new(), HashMap::new());
        for (id, count) in &counts {
            let before = before.get(id).copied().unwrap_or_default();
            let rate: [f64; 3] = std::array::from_fn(|i| count[i].saturating_sub(before[i]) as f64 / seconds);
            (0..3).for_each(|i| sums[i] += rate[i]);
            if rate[0] > 0.0 {
                workspaces.push((id.clone(), rate[0]));
            }
            if rate[1] > 0.0 {
                batches.insert(id.clone(), rate[1]);
            }
        }
        workspaces.sort_by(|a, b| b.1.total_cmp(&a.1));
        rates.taken = Some((now, counts));
        let [events_per_second, batches_per_second, bytes_per_second] = sums;
        rates.current = Throughput {
            events_per_second,
            batches_per_second,
            bytes_per_second,
            events_total: total,
            workspaces,
            batches,
        };
        rates.current.clone()
    }

    /// Whether the parts can serve; each answers within a second.
    pub async fn readiness(&self) -> Vec<Part> {
        const PATIENCE: Duration = Duration::from_millis(800);
        let part = |name, can_wait, result: Result<String, String>| match result {
            Ok(detail) => Part { name, ok: true, detail, can_wait },
            Err(detail) => Part { name, ok: false, detail, can_wait },
        };
        let Deps { store, log, .. } = self.0.deps.as_ref();
        let store = async {
            match tokio::time::timeout(PATIENCE, store.ping()).await {
                Ok(Ok(())) => match self.0.deps.committer.failing() {
                    Some(error) => Err(format!("results wait to be stored: {error}")),
                    None => store.damage().map_or_else(|| Ok(store.mode().to_owned()), Err),
                },
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            }
        };
        let disk = async {
            match tokio::time::timeout(PATIENCE, log.barrier()).await {
                Ok(Ok(())) => match log.room() {
                    Ok(()) => Ok(format!("embedded, tail {}", log.tail())),
                    Err(error) => Err(error.to_string()),
                },
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            }
        };
        let (store, disk) = tokio::join!(store, disk);
        // what is damaged was written before: only its replay, or a look at it, needs it
        let damage = log.damage().filter(|_| disk.is_ok());
        let tenants = self.tenants();
        let down = tenants.iter().filter(|t| matches!(t.phase(), Phase::Failed)).count();
        let behind = self.0.behind.load(Relaxed);
        let actors = match down {
            0 if behind > 0 => Ok(format!("{} workspaces, {behind} of them still read the log", tenants.len())),
            0 => Ok(format!("{} workspaces", tenants.len())),
            // one workspace that restarts is no reason to take the others away
            n if n < tenants.len() => Ok(format!("{n} of {} workspaces are restarting", tenants.len())),
            n => Err(format!("all {n} workspaces are restarting")),
        };
        let redis = match self.cache().redis() {
            Standing::NotConfigured => Ok("not configured".to_owned()),
            Standing::Connected => Ok("connected".to_owned()),
            Standing::Gone(reason) => Err(reason),
        };
        let log = part("log", damage.is_some(), damage.map_or(disk, Err));
        // what is to be stored waits in the log, and without Redis this node does for itself
        vec![log, part("store", true, store), part("redis", true, redis), part("actors", false, actors)]
    }
}

/// Refuses names that a stream of the user's own cannot have.
pub(crate) fn own_name(stream: &StreamName) -> Result<(), Fault> {
    if let (METRICS, name) = stream.parts() {
        let detail = format!("`{stream}` names the final rows of metric `{name}`; give the stream another first part");
        return Err(Fault::new(FaultKind::Conflict, "reserved_stream", detail));
    }
    if built_in().iter().any(|known| known.stream == *stream) {
        let detail = format!("stream `{stream}` is built in; choose another name for your own columns");
        return Err(Fault::new(FaultKind::Conflict, "built_in_stream", detail));
    }
    if stream.is_table() {
        let detail = format!("`{stream}` names a reference table; define it with PUT …/tables/{}", stream.parts().1);
        return Err(Fault::invalid("bad_name", detail));
    }
    Ok(())
}

fn not_built_in(name: &StreamName) -> Result<(), Fault> {
    if built_in_tables().iter().any(|known| known.name() == name) {
        let detail = format!("table `{name}` is built in; choose another name for your own columns");
        return Err(Fault::new(FaultKind::Conflict, "built_in_table", detail));
    }
    Ok(())
}

fn restarting(id: &WorkspaceId, error: impl std::fmt::Display) -> Fault {
    let detail = format!("workspace `{id}` cannot answer now ({error}); try again in a moment");
    Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "workspace_restarting", detail)
}

pub(crate) fn unknown(what: &str, code: &'static str, name: impl std::fmt::Display) -> Fault {
    Fault::not_found(code, format!("there is no {what} `{name}`"))
}

pub(crate) fn over_limit(name: &str, most: usize) -> Fault {
    let detail = format!("this workspace has reached {name} = {most}; delete one or raise the limit");
    Fault::new(FaultKind::Conflict, "limit_reached", detail)
}

/// Bytes of the batch's values: its columns may share one buffer, which each of them would count whole.
fn held(batch: &RecordBatch) -> usize {
    let bytes = |column: &ArrayRef| match column.to_data().get_slice_memory_size() {
        Ok(bytes) => bytes,
        Err(_) => column.get_array_memory_size(),
    };
    batch.columns().iter().map(bytes).sum()
}

/// The columns, each of which may be NULL: events that are older than a column have none in it.
fn loose(schema: &SchemaRef) -> SchemaRef {
    let fields: Vec<Field> = schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
    Arc::new(Schema::new(fields))
}

/// The batch in the columns of `schema`: those it lacks are NULL, those it has too many are left out.
fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, Fault> {
    let column = |field: &Arc<Field>| match batch.column_by_name(field.name()) {
        Some(column) if column.data_type() == field.data_type() => column.clone(),
        _ => arrow::array::new_null_array(field.data_type(), batch.num_rows()),
    };
    let columns = schema.fields().iter().map(column).collect();
    RecordBatch::try_new(schema.clone(), columns).map_err(Fault::internal)
}

/// A metric's columns with `final` and `revision` behind, as a table of SQL.
fn with_state(output: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = output.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect();
    fields.push(Field::new("final", DataType::Boolean, false));
    fields.push(Field::new("revision", DataType::Int64, false));
    Arc::new(Schema::new(fields))
}

/// Tells the log from time to time what no restart needs any more, and sees to it that ids do not fill the memory.
async fn retain(system: Weak<Inner>) {
    for second in 1_u64.. {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let Some(inner) = system.upgrade() else { return };
        let system = System(inner);
        let (log, dedup) = (system.0.deps.log.clone(), system.0.shared.dedup.clone());
        let tail = log.tail(); // before the look at the tenants: what comes later is kept
        let tidy = second.is_multiple_of(10);
        if !tidy && !dedup.is_full() {
            continue;
        }
        let needed = system.tenants().into_iter().filter_map(|tenant| {
            let (appended, saved) = (tenant.counters.appended.load(Relaxed), tenant.counters.saved.load(Relaxed));
            (appended > saved).then_some(saved)
        });
        let low = needed.min().map_or(tail, |low| Offset(low).min(tail));
        if let Err(error) = system.note_resting().await {
            tracing::warn!(%error, "who rests could not be noted; trying again");
        }
        if second.is_multiple_of(600) && system.note_looks().await.is_err() {
            tracing::debug!("which charts are looked at could not be noted; trying again later");
        }
        let now = system.now();
        drop(system);
        let work = move || {
            if let Err(error) = dedup.flush(tail.0, now) {
                tracing::warn!(%error, "event ids could not be written; trying again");
            }
            // nor is dropped what a repeat is known by before the index has it
            log.protect(low.min(Offset(dedup.covered())), now);
        };
        _ = tokio::task::spawn_blocking(work).await;
    }
}

/// Wakes those that have something to compute since before the start, a few at a time.
async fn catch_up(system: Weak<Inner>, behind: Vec<Arc<Tenant>>) {
    let one = |tenant: Arc<Tenant>| {
        let system = system.clone();
        async move {
            let _awake = tenant.hold();
            if tenant.awake(Duration::from_millis(ASK)).await.is_some() {
                let mut phase = tenant.phase.subscribe();
                _ = phase.wait_for(|phase| !matches!(phase, Phase::Restoring(_))).await; // the sender lives in the tenant
            }
            if let Some(inner) = system.upgrade() {
                inner.behind.fetch_sub(1, Relaxed);
            }
        }
    };
    futures::stream::iter(behind).for_each_concurrent(CATCHING_UP, one).await;
}

/// Reads the charts that were looked at most when the last process ended.
async fn warm(system: Weak<Inner>) {
    // not the system itself, which may end meanwhile
    let Some(store) = system.upgrade().map(|inner| inner.deps.store.clone()) else { return };
    let looked_at = store.meta(LOOKED_AT).await.ok().flatten();
    let looked_at: Option<Vec<(WorkspaceId, ItemName)>> = looked_at.and_then(|text| serde_json::from_str(&text).ok());
    for (id, metric) in looked_at.into_iter().flatten() {
        let Some(system) = system.upgrade().map(System) else { return };
        // what is not there any more needs no reading
        let Ok(LiveRows { program, frontier: Some(frontier), .. }) = system.live_rows(&id, &metric).await else {
            continue;
        };
        let back = Span(program.window().slide().0.saturating_mul(CHART));
        let query = RowsQuery { from: Some(frontier.minus(back)), limit: CHART as usize, ..RowsQuery::default() };
        if let Err(error) = system.read_rows(&id, &metric, query).await {
            tracing::debug!(workspace = %id, %metric, %error, "a chart could not be read beforehand");
        }
    }
}

/// Wakes workspaces at rest whose time has come to close a window.
async fn rouse(system: Weak<Inner>) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let Some(inner) = system.upgrade() else { return };
        let now = inner.deps.clock.now();
        let tenants: Vec<Arc<Tenant>> = inner.tenants.read().values().cloned().collect();
        for tenant in tenants {
            let due = tenant.resting.lock().as_ref().and_then(|resting| resting.wake).is_some_and(|at| at <= now);
            if due {
                tenant.wake();
            }
        }
    }
}

/// Wanted values of key columns as rows show them: `2026-01-01T01:00:00+01:00` and `1.1` of a decimal with two digits are
/// `2026-01-01T00:00:00.000000Z` and `1.10` there.
fn key_values(
    program: &Program,
    wanted: Vec<(String, Option<String>)>,
) -> Result<Vec<(String, Option<String>)>, Fault> {
    let keys = &program.output().fields()[2..2 + program.key_count()];
    let as_shown = |(name, value): (String, Option<String>)| {
        let Some(field) = keys.iter().find(|field| *field.name() == name) else {
            let known: Vec<&str> = keys.iter().map(|field| field.name().as_str()).collect();
            let detail = format!("`{name}` is no key of this metric; its keys are {}", known.join(", "));
            return Err(Fault::invalid("unknown_parameter", detail));
        };
        let Some(text) = value else { return Ok((name, None)) };
        let Some(shown) = crate::rows::shown_as(field.data_type(), &text) else {
            let text: String = text.chars().take(40).collect();
            let detail = format!("`{text}` is no value of `{name}`, whose type is {}", field.data_type());
            return Err(Fault::invalid("bad_filter", detail));
        };
        Ok((name, Some(shown)))
    };
    wanted.into_iter().map(as_shown).collect()
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
