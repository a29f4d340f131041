//! The whole system as the gateway sees it: every request that reaches a workspace goes through here.

use crate::agent::{AgentInfo, RunHandle, RunRequest, Sessions};
use crate::clock::Clock;
use crate::definition::{MetricDefinition, RuleDefinition};
use crate::fault::{Fault, FaultKind};
use crate::history;
use crate::outlet::{AlertPhase, Outlet, PortfolioSummary, Update, What};
use crate::query::QueryPool;
use crate::root::{RootActor, RootMsg};
use crate::rows;
use crate::silence;
use crate::tenant::Tenant;
use crate::workspace::{MetricInfo, Reply, WorkspaceMsg};
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use engine::event::{ItemName, METRICS, Micros, StreamName, WorkspaceId};
use engine::metric::Rows;
use engine::program::Program;
use parking_lot::{Mutex, RwLock};
use ractor::{Actor, ActorRef};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sql::plan::{Planner, Source};
use sql::query::{Bounds, Question, Table};
use sql::store::{Alert, DeadLetter, Portfolio, Position, RowQuery, Silence, Step, Store, StreamRow, Workspace};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use streams::decode::{Decoded, EventError};
use streams::log::{Body, Filter, Log, Offset};
use streams::schema::{Column, StreamSchema, UnknownFields, built_in};

/// The bounds of this crate: `limits.*` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of events of one workspace that may wait to be computed.
    pub mailbox_bytes: usize,
    /// Bytes of results of one workspace that may wait for a store that cannot be reached. Over it, events stay in the
    /// mailbox, and once that is full too, ingest is refused.
    pub unsaved_bytes: usize,
    /// Event ids remembered for each workspace, to find repeats.
    pub remembered_ids: usize,
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
    /// Queries of one workspace that run or wait.
    pub queries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            mailbox_bytes: 64 << 20,
            unsaved_bytes: 256 << 20,
            remembered_ids: 1_000_000,
            query_rows: 100_000,
            query_memory: 256 << 20,
            query_ms: 10_000,
            metrics: 1_000,
            streams: 200,
            alert_rules: 1_000,
            queries: 16,
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
    planner: Planner,
}

impl Deps {
    /// The program of a metric's SQL; `metrics` gives those it may read.
    pub(crate) async fn program(
        &self,
        tenant: &Tenant,
        sql: &str,
        metrics: impl Fn(&ItemName) -> Option<Arc<Program>>,
    ) -> Result<Arc<Program>, Fault> {
        let source = |stream: &StreamName| match stream.metric() {
            Some(metric) => metrics(&metric).map(Source::Metric),
            None => tenant.schemas.read().get(stream).map(|schema| Source::Stream(schema.arrow().clone())),
        };
        Ok(self.planner.program(sql, source).await?)
    }
}

struct Inner {
    deps: Arc<Deps>,
    limits: Limits,
    tenants: RwLock<HashMap<WorkspaceId, Arc<Tenant>>>,
    root: ActorRef<RootMsg>,
    queries: QueryPool,
    sessions: Arc<Sessions>,
    rates: Mutex<Rates>,
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
    /// Key columns and the value each must have.
    pub keys: Vec<(String, String)>,
    /// Of the final rows only the last of each hour or day and key; the range is then widened to whole ones.
    pub step: Option<Step>,
}

/// A page of a metric's rows, as the contract shows them, in order of window and key.
#[derive(Clone, Debug)]
pub struct RowsPage {
    pub rows: Vec<Map<String, Value>>,
    pub next: Option<String>,
}

/// A metric's program, its provisional rows, and the event time of the stream they come from.
pub type LiveRows = (Arc<Program>, Vec<Rows>, Option<Micros>);

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
    /// `running`, `restoring` or `restarting`.
    pub state: String,
    pub mailbox_batches: u64,
    pub mailbox_bytes: u64,
    pub restarts: u64,
    pub last_failure: Option<String>,
    pub state_bytes: u64,
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
    pub outlet: Arc<dyn Outlet>,
    pub clock: Arc<dyn Clock>,
    pub limits: Limits,
    pub agents: BTreeMap<ItemName, crate::agent::AgentConfig>,
}

/// Where the store keeps [`Tenant::first`].
fn first_offset(id: &WorkspaceId) -> String {
    format!("first_offset/{id}")
}

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

/// How long a request waits for an actor's answer.
const ASK: u64 = 30_000;

impl System {
    /// Starts every workspace of the store and returns once all have replayed the log.
    pub async fn start(parts: Parts) -> Result<System, Fault> {
        let Parts { store, log, outlet, clock, limits, agents } = parts;
        let unsaved_bytes = limits.unsaved_bytes;
        let deps = Arc::new(Deps { store, log, outlet, clock, unsaved_bytes, planner: Planner::default() });
        let (root, _) = Actor::spawn(None, RootActor, deps.clone()).await.map_err(Fault::internal)?;
        let inner = Inner {
            sessions: Arc::new(Sessions::new(agents)),
            deps: deps.clone(),
            limits,
            tenants: RwLock::default(),
            root,
            queries: QueryPool::start()?,
            rates: Mutex::default(),
        };
        let system = System(Arc::new(inner));
        let mut schemas: HashMap<WorkspaceId, Vec<StreamRow>> = HashMap::new();
        for row in deps.store.all_streams().await? {
            schemas.entry(row.workspace.clone()).or_default().push(row);
        }
        let mut silences: HashMap<WorkspaceId, Vec<Silence>> = HashMap::new();
        for silence in deps.store.all_silences().await? {
            silences.entry(silence.workspace.clone()).or_default().push(silence);
        }
        for workspace in deps.store.all_workspaces().await? {
            let rows = schemas.remove(&workspace.id).unwrap_or_default();
            let first = deps.store.meta(&first_offset(&workspace.id)).await?.and_then(|text| text.parse().ok());
            let silences = silences.remove(&workspace.id).unwrap_or_default();
            *system.adopt(workspace.id, first.unwrap_or(0), &rows)?.silences.write() = silences;
        }
        system.remember_ids().await?;
        let offsets: HashMap<_, _> = deps.store.checkpoints_offsets().await?.into_iter().collect();
        let tenants = system.tenants();
        for tenant in &tenants {
            tenant.counters.saved.store(offsets.get(&tenant.id).copied().unwrap_or(0), Relaxed);
            system.launch(tenant)?;
        }
        for tenant in &tenants {
            let mut ready = tenant.ready.subscribe();
            _ = ready.wait_for(|ready| *ready).await; // the sender lives in the tenant
        }
        tokio::spawn(retain(Arc::downgrade(&system.0)));
        system.0.sessions.clone().recover(&system).await?;
        Ok(system)
    }

    /// Commits everything and stops the actors. What is not done within `within` is replayed at the next start.
    pub async fn stop(&self, within: Duration) {
        self.0.sessions.stop().await;
        let drains = self.tenants().into_iter().filter_map(|tenant| tenant.actor()).map(|actor| async move {
            _ = ractor::call!(actor, WorkspaceMsg::Drain);
        });
        if tokio::time::timeout(within, futures::future::join_all(drains)).await.is_err() {
            tracing::warn!(?within, "not all workspaces committed in time; their log will be replayed at start");
        }
        self.0.root.stop(None);
        _ = self.0.deps.log.barrier().await; // a log that failed has said so already
    }

    fn adopt(&self, id: WorkspaceId, first: u64, rows: &[StreamRow]) -> Result<Arc<Tenant>, Fault> {
        let Deps { log, outlet, .. } = self.0.deps.as_ref();
        let limits = &self.0.limits;
        let tenant =
            Tenant::new(id.clone(), first, log.clone(), outlet.clone(), limits.mailbox_bytes, limits.remembered_ids);
        {
            let mut schemas = tenant.schemas.write();
            schemas.extend(built_in_schemas());
            for row in rows {
                let stored: StoredSchema = serde_json::from_str(&row.schema_json).map_err(Fault::internal)?;
                let schema = StreamSchema::new(row.stream.clone(), stored.columns, stored.unknown_fields);
                schemas.insert(row.stream.clone(), Arc::new(schema.map_err(Fault::internal)?));
            }
        }
        self.0.tenants.write().insert(id, tenant.clone());
        Ok(tenant)
    }

    fn launch(&self, tenant: &Arc<Tenant>) -> Result<(), Fault> {
        self.0.root.send_message(RootMsg::Start(tenant.clone())).map_err(Fault::internal)
    }

    /// Reads the ids in the log, so that a repeat is known as one also after a restart.
    async fn remember_ids(&self) -> Result<(), Fault> {
        let (log, system) = (self.0.deps.log.clone(), self.clone());
        let read = move || -> Result<(), Fault> {
            let filter = Filter { with_ids: true, ..Filter::default() };
            for record in log.scan(log.head(), filter).map_err(Fault::internal)? {
                let (offset, record) = record.map_err(Fault::internal)?;
                if let Body::Events { stream, batch } = record.body
                    && let Ok(tenant) = system.tenant(&record.workspace)
                    && offset.0 >= tenant.first
                {
                    tenant.remember(&stream, &batch);
                }
            }
            Ok(())
        };
        tokio::task::spawn_blocking(read).await.map_err(Fault::internal)?
    }

    fn tenants(&self) -> Vec<Arc<Tenant>> {
        self.0.tenants.read().values().cloned().collect()
    }

    fn tenant(&self, id: &WorkspaceId) -> Result<Arc<Tenant>, Fault> {
        self.0.tenants.read().get(id).cloned().ok_or_else(|| {
            Fault::not_found("workspace_not_found", format!("there is no workspace `{id}`, or it is not yours"))
        })
    }

    async fn ask<T: Send + 'static>(
        &self,
        id: &WorkspaceId,
        message: impl FnOnce(Reply<T>) -> WorkspaceMsg,
    ) -> Result<T, Fault> {
        let actor = self.actor(id).await?;
        ractor::call_t!(actor, message, ASK).map_err(|error| restarting(id, error))?
    }

    async fn actor(&self, id: &WorkspaceId) -> Result<ActorRef<WorkspaceMsg>, Fault> {
        self.tenant(id)?.actor().ok_or_else(|| restarting(id, "it is being started"))
    }

    /// Users, members, tokens, keys, listings and the audit log.
    pub fn store(&self) -> &Store {
        &self.0.deps.store
    }

    /// The log, and the first offset in it that belongs to this workspace.
    pub fn log_of(&self, id: &WorkspaceId) -> Result<(Arc<dyn Log>, Offset), Fault> {
        Ok((self.0.deps.log.clone(), Offset(self.tenant(id)?.first)))
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
        self.store().put_meta(&first_offset(&id), &first.to_string()).await?;
        let tenant = self.adopt(id, first, &[])?;
        tenant.counters.saved.store(first, Relaxed);
        self.launch(&tenant)?;
        _ = tenant.ready.subscribe().wait_for(|ready| *ready).await;
        Ok(())
    }

    /// Deletes a workspace with everything the store has of it. Its events leave the log by retention.
    pub async fn delete_workspace(&self, id: &WorkspaceId) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        tenant.gone.store(true, Relaxed);
        if let Some(actor) = tenant.actor() {
            actor.stop_and_wait(None, Some(Duration::from_secs(5))).await.map_err(Fault::internal)?;
        }
        self.0.sessions.forget(id);
        self.store().delete_workspace(id).await?;
        self.0.tenants.write().remove(id);
        Ok(())
    }

    pub async fn workspace_exists(&self, id: &WorkspaceId) -> bool {
        self.0.tenants.read().contains_key(id)
    }

    pub async fn streams(&self, id: &WorkspaceId) -> Result<Vec<StreamInfo>, Fault> {
        let tenant = self.tenant(id)?;
        let actor = self.actor(id).await?;
        let times = ractor::call_t!(actor, WorkspaceMsg::Streams, ASK).map_err(|error| restarting(id, error))?;
        let events = tenant.counters.by_stream.lock().clone();
        let mut schemas: Vec<_> = tenant.schemas.read().values().cloned().collect();
        schemas.sort_by(|a, b| a.stream.cmp(&b.stream));
        let info = |schema: Arc<StreamSchema>| {
            let time = times.get(&schema.stream).copied().unwrap_or_default();
            let events = events.get(&schema.stream).copied().unwrap_or(0);
            StreamInfo { frontier: time.frontier, late: time.late, events, schema }
        };
        Ok(schemas.into_iter().map(info).collect())
    }

    /// Adds a stream, or changes the columns of one as far as its events allow.
    pub async fn define_stream(&self, id: &WorkspaceId, schema: StreamSchema) -> Result<(), Fault> {
        let tenant = self.tenant(id)?;
        let stream = schema.stream.clone();
        if let (METRICS, name) = stream.parts() {
            let detail =
                format!("`{stream}` names the final rows of metric `{name}`; give the stream another first part");
            return Err(Fault::new(FaultKind::Conflict, "reserved_stream", detail));
        }
        if built_in().iter().any(|known| known.stream == stream) {
            let detail = format!("stream `{stream}` is built in; choose another name for your own columns");
            return Err(Fault::new(FaultKind::Conflict, "built_in_stream", detail));
        }
        {
            let schemas = tenant.schemas.read();
            match schemas.get(&stream) {
                Some(known) => known
                    .check_evolution(&schema)
                    .map_err(|error| Fault::new(FaultKind::Conflict, "incompatible_schema", error.to_string()))?,
                None if schemas.len() >= self.0.limits.streams + built_in().len() => {
                    return Err(over_limit("limits.streams", self.0.limits.streams));
                }
                None => {}
            }
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
        tenant.schemas.write().insert(stream, Arc::new(schema));
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
        let appended = if batch.num_rows() > 0 {
            tenant.append(stream, batch).await?
        } else {
            crate::tenant::Appended { accepted: 0, duplicates: 0, offset: None }
        };
        if !errors.is_empty()
            && let Some(actor) = tenant.actor()
        {
            let at = self.now();
            let letter = |error: &EventError| DeadLetter {
                stream: stream.clone(),
                at,
                code: error.code.to_owned(),
                detail: error.detail.clone(),
                payload: error.payload.clone(),
            };
            _ = actor.send_message(WorkspaceMsg::DeadLetters(errors.iter().map(letter).collect()));
        }
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
        self.ask(id, |reply| WorkspaceMsg::Define { name, definition, program, reply }).await
    }

    pub async fn remove_metric(&self, id: &WorkspaceId, name: &ItemName) -> Result<(), Fault> {
        let existed = self.ask(id, |reply| WorkspaceMsg::Remove { name: name.clone(), reply }).await?;
        if existed { Ok(()) } else { Err(unknown("metric", "unknown_metric", name)) }
    }

    pub async fn metrics(&self, id: &WorkspaceId) -> Result<Vec<MetricInfo>, Fault> {
        let actor = self.actor(id).await?;
        ractor::call_t!(actor, WorkspaceMsg::Metrics, ASK).map_err(|error| restarting(id, error))
    }

    /// A page of rows, the store's and memory's as one table.
    pub async fn metric_rows(
        &self,
        id: &WorkspaceId,
        name: &ItemName,
        mut query: RowsQuery,
    ) -> Result<RowsPage, Fault> {
        if let Some(step) = query.step {
            query.from = query.from.map(|from| step.bucket(from));
            query.to = query.to.map(|to| step.bucket_after(to));
        }
        // memory first: what moves to the store meanwhile is then seen twice and counted once, never missed
        let recent = self.ask(id, |reply| WorkspaceMsg::Rows { metric: name.clone(), reply }).await?;
        self.check_keys(&recent.program, &query.keys)?;
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
            let (stored, next) = match query.step {
                None => self.store().rows(id, name, &cursor).await?,
                Some(step) => self.store().samples(id, name, &cursor, step).await?,
            };
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

    fn check_keys(&self, program: &Program, keys: &[(String, String)]) -> Result<(), Fault> {
        let known: Vec<&str> =
            program.output().fields().iter().skip(2).take(program.key_count()).map(|f| f.name().as_str()).collect();
        match keys.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) => {
                let detail = format!("`{name}` is no key of this metric; its keys are {}", known.join(", "));
                Err(Fault::invalid("unknown_parameter", detail))
            }
        }
    }

    /// Provisional rows as they stand now, and the event time that their metric has reached.
    pub async fn live_rows(&self, id: &WorkspaceId, name: &ItemName) -> Result<LiveRows, Fault> {
        let recent = self.ask(id, |reply| WorkspaceMsg::Rows { metric: name.clone(), reply }).await?;
        Ok((recent.program, recent.live, recent.frontier))
    }

    /// Answers read-only SQL over the workspace's streams and metrics, within its time: waiting, reading and computing
    /// together.
    pub async fn query(&self, id: &WorkspaceId, request: QueryRequest) -> Result<QueryAnswer, Fault> {
        let limits = &self.0.limits;
        let most = Duration::from_millis(limits.query_ms);
        let timeout = request.timeout.map_or(most, |asked| asked.min(most));
        let deadline = tokio::time::Instant::now() + timeout;
        let tenant = self.tenant(id)?;
        let Some(_place) = Place::take(&tenant, limits.queries) else {
            let detail = format!(
                "{} queries of this workspace run or wait already, the most of limits.queries; wait for one of them",
                limits.queries
            );
            let kind = FaultKind::Limit { retry_after: Duration::from_secs(1) };
            return Err(Fault::new(kind, "too_many_queries", detail));
        };
        let question = Question::parse(&request.sql)?;
        let tables = tokio::time::timeout_at(deadline, self.tables(id, &question));
        let tables = tables.await.map_err(|_| crate::query::too_late(timeout))??;
        let bounds = Bounds { rows: limits.query_rows, memory: limits.query_memory };
        let answer = self.0.queries.run(question, request.params, tables, bounds, timeout, deadline).await?;
        Ok(QueryAnswer { schema: answer.schema, batches: answer.batches })
    }

    /// The tables a question reads, within `limits.query_memory`.
    async fn tables(&self, id: &WorkspaceId, question: &Question) -> Result<Vec<Table>, Fault> {
        let mut tables = Vec::new();
        let mut bytes = 0;
        for name in question.tables()? {
            let table = self.table(id, name).await?;
            bytes += table.batches.iter().map(RecordBatch::get_array_memory_size).sum::<usize>();
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
        if let Some(schema) = text.parse::<StreamName>().ok().and_then(|s| tenant.schemas.read().get(&s).cloned()) {
            let batches = self.events(id, &schema).await?;
            return Ok(Table { name, schema: schema.arrow().clone(), batches });
        }
        let metric: Option<ItemName> = match name.as_slice() {
            [metric] => metric.parse().ok(),
            [schema, metric] if schema == METRICS => metric.parse().ok(),
            _ => None,
        };
        let Some(metric) = metric else { return Err(unknown("table", "unknown_table", &text)) };
        let recent = match self.ask(id, |reply| WorkspaceMsg::Rows { metric: metric.clone(), reply }).await {
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
        let schema = with_state(recent.program.output());
        let mut decoder = arrow::json::ReaderBuilder::new(schema.clone()).build_decoder().map_err(Fault::internal)?;
        let mut batches = Vec::new();
        for rows in all.chunks(1024) {
            decoder.serialize(rows).map_err(Fault::internal)?;
            batches.extend(decoder.flush().map_err(Fault::internal)?);
        }
        Ok(Table { name, schema, batches })
    }

    /// The retained events of a stream, in today's columns.
    async fn events(&self, id: &WorkspaceId, schema: &Arc<StreamSchema>) -> Result<Vec<RecordBatch>, Fault> {
        let (log, schema, most) = (self.0.deps.log.clone(), schema.clone(), self.0.limits.query_memory);
        let first = Offset(self.tenant(id)?.first);
        let filter = Filter { workspace: Some(id.clone()), stream: Some(schema.stream.clone()), ..Filter::default() };
        let read = move || -> Result<Vec<RecordBatch>, Fault> {
            let (mut batches, mut bytes) = (Vec::new(), 0);
            for record in log.scan(log.head().max(first), filter).map_err(Fault::internal)? {
                let (_, record) = record.map_err(Fault::internal)?;
                let Body::Events { batch, .. } = record.body else { continue };
                bytes += batch.get_array_memory_size();
                if bytes > most {
                    let stream = &schema.stream;
                    let detail = format!(
                        "stream `{stream}` holds more than the {most} bytes of limits.query_memory; define a metric over it instead"
                    );
                    return Err(Fault::invalid("query_memory", detail));
                }
                batches.push(conform(&batch, schema.arrow())?);
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
        let acked = self.store().ack_alert(id, alert, by, self.now()).await?;
        let alert = acked.ok_or_else(|| unknown("alert", "unknown_alert", alert))?;
        if !self.tenant(id)?.is_silenced(&alert) {
            let what = What::Alert { phase: AlertPhase::Acked, alert: alert.clone() };
            self.outlet().publish(Update { workspace: id.clone(), what });
        }
        Ok(alert)
    }

    pub async fn put_portfolio(&self, id: &WorkspaceId, portfolio: Portfolio) -> Result<(), Fault> {
        let name: ItemName = portfolio.id.parse().map_err(|e| Fault::invalid("bad_name", format!("{e}")))?;
        self.store().put_portfolio(&portfolio).await?;
        self.ask(id, |reply| WorkspaceMsg::Hold { id: name, reply }).await
    }

    pub async fn remove_portfolio(&self, id: &WorkspaceId, portfolio: &ItemName) -> Result<(), Fault> {
        let existed = self.store().delete_portfolio(id, portfolio.as_str()).await?;
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
        if replace {
            self.store().replace_positions(id, portfolio.as_str(), &positions).await?;
        } else {
            self.store().put_positions(id, portfolio.as_str(), &positions).await?;
        }
        self.ask(id, |reply| WorkspaceMsg::Hold { id: portfolio.clone(), reply }).await
    }

    pub async fn remove_position(&self, id: &WorkspaceId, portfolio: &ItemName, symbol: &str) -> Result<(), Fault> {
        let existed = self.store().delete_position(id, portfolio.as_str(), symbol).await?;
        self.ask(id, |reply| WorkspaceMsg::Hold { id: portfolio.clone(), reply }).await?;
        if existed { Ok(()) } else { Err(unknown("position", "unknown_position", symbol)) }
    }

    pub async fn portfolio_summary(
        &self,
        id: &WorkspaceId,
        portfolio: &ItemName,
    ) -> Result<Arc<PortfolioSummary>, Fault> {
        self.ask(id, |reply| WorkspaceMsg::Summary { id: portfolio.clone(), reply }).await
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

    /// The run that a thread is busy with.
    pub fn active_run(&self, id: &WorkspaceId, thread: &str) -> Option<String> {
        self.0.sessions.active_run(id, thread)
    }

    /// Stops a run's model and tools; it ends as cancelled.
    pub async fn cancel_run(&self, id: &WorkspaceId, run: &str) -> Result<(), Fault> {
        self.0.sessions.cancel(self, id, run).await
    }

    pub async fn agents(&self, id: &WorkspaceId) -> Result<Vec<AgentInfo>, Fault> {
        self.tenant(id)?;
        Ok(self.0.sessions.agents())
    }

    /// The supervision tree, workspaces first.
    pub async fn actors(&self) -> Vec<ActorInfo> {
        let mut all: Vec<ActorInfo> = Vec::new();
        for tenant in self.tenants() {
            let counters = &tenant.counters;
            let state = match (tenant.actor(), *tenant.ready.borrow()) {
                (Some(_), true) => "running",
                (Some(_), false) => "restoring",
                (None, _) => "restarting",
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
            });
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all.extend(self.0.sessions.info());
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
        let mut workspaces = Vec::new();
        for (id, count) in &counts {
            let before = before.get(id).copied().unwrap_or_default();
            let rate: [f64; 3] = std::array::from_fn(|i| count[i].saturating_sub(before[i]) as f64 / seconds);
            (0..3).for_each(|i| sums[i] += rate[i]);
            if rate[0] > 0.0 {
                workspaces.push((id.clone(), rate[0]));
            }
        }
        workspaces.sort_by(|a, b| b.1.total_cmp(&a.1));
        rates.taken = Some((now, counts));
        let [events_per_second, batches_per_second, bytes_per_second] = sums;
        rates.current =
            Throughput { events_per_second, batches_per_second, bytes_per_second, events_total: total, workspaces };
        rates.current.clone()
    }

    /// Whether the parts can serve; each answers within a second.
    pub async fn readiness(&self) -> Vec<Part> {
        const PATIENCE: Duration = Duration::from_millis(800);
        let part = |name, result: Result<String, String>| match result {
            Ok(detail) => Part { name, ok: true, detail },
            Err(detail) => Part { name, ok: false, detail },
        };
        let Deps { store, log, .. } = self.0.deps.as_ref();
        let store = async {
            match tokio::time::timeout(PATIENCE, store.ping()).await {
                Ok(Ok(())) => Ok(store.mode().to_owned()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            }
        };
        let disk = async {
            match tokio::time::timeout(PATIENCE, log.barrier()).await {
                Ok(Ok(())) => Ok(format!("embedded, tail {}", log.tail())),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            }
        };
        let (store, disk) = tokio::join!(store, disk);
        let tenants = self.tenants();
        let down: BTreeSet<String> =
            tenants.iter().filter(|t| t.actor().is_none() || !*t.ready.borrow()).map(|t| t.id.to_string()).collect();
        let actors = match down.len() {
            0 => Ok(format!("{} workspaces", tenants.len())),
            // one workspace that restarts is no reason to take the others away
            n if n < tenants.len() => Ok(format!("{n} of {} workspaces are restarting", tenants.len())),
            n => Err(format!("all {n} workspaces are restarting")),
        };
        vec![part("log", disk), part("store", store), part("actors", actors)]
    }
}

fn built_in_schemas() -> impl Iterator<Item = (StreamName, Arc<StreamSchema>)> {
    built_in().iter().map(|schema| (schema.stream.clone(), Arc::new(schema.clone())))
}

fn restarting(id: &WorkspaceId, error: impl std::fmt::Display) -> Fault {
    let detail = format!("workspace `{id}` cannot answer now ({error}); try again in a moment");
    Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "workspace_restarting", detail)
}

fn unknown(what: &str, code: &'static str, name: impl std::fmt::Display) -> Fault {
    Fault::not_found(code, format!("there is no {what} `{name}`"))
}

fn over_limit(name: &str, most: usize) -> Fault {
    let detail = format!("this workspace has reached {name} = {most}; delete one or raise the limit");
    Fault::new(FaultKind::Conflict, "limit_reached", detail)
}

/// The batch in the columns of `schema`: those it lacks are NULL, those it has too many are left out.
fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, Fault> {
    if batch.schema_ref() == schema {
        return Ok(batch.clone());
    }
    let column = |field: &Arc<Field>| match batch.column_by_name(field.name()) {
        Some(column) if column.data_type() == field.data_type() => column.clone(),
        _ => arrow::array::new_null_array(field.data_type(), batch.num_rows()),
    };
    let columns = schema.fields().iter().map(column).collect();
    let loose: Vec<Field> = schema.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect();
    RecordBatch::try_new(Arc::new(Schema::new(loose)), columns).map_err(Fault::internal)
}

/// A metric's columns with `final` and `revision` behind, as a table of SQL.
fn with_state(output: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = output.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect();
    fields.push(Field::new("final", DataType::Boolean, false));
    fields.push(Field::new("revision", DataType::Int64, false));
    Arc::new(Schema::new(fields))
}

/// Tells the log from time to time what no restart needs any more.
async fn retain(system: std::sync::Weak<Inner>) {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let Some(inner) = system.upgrade() else { return };
        let tail = inner.deps.log.tail();
        let tenants: Vec<Arc<Tenant>> = inner.tenants.read().values().cloned().collect();
        let needed = tenants.iter().filter_map(|tenant| {
            let (appended, saved) = (tenant.counters.appended.load(Relaxed), tenant.counters.saved.load(Relaxed));
            (appended > saved).then_some(saved)
        });
        let low = needed.min().map_or(tail, |low| Offset(low).min(tail));
        let (log, now) = (inner.deps.log.clone(), inner.deps.clock.now());
        drop(inner);
        _ = tokio::task::spawn_blocking(move || log.protect(low, now)).await;
    }
}
