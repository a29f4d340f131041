//! A workspace's actor: feeds the engine in the order of the log, pushes what comes of it, and commits it.
//!
//! The engine's state, the rows and the offset they stand for are committed together; a restart loads
//! them and replays the log from that offset, and rows it repeats are no-ops in the store.

mod past; // what is computed of the time before now

use self::past::Sifted;
use crate::blocks::{self, Width};
use crate::definition::{EMIT, MAX_DELAY, MetricDefinition, RuleDefinition, SEVERITY};
use crate::fault::{Fault, FaultKind, SOON};
use crate::outlet::{AlertPhase, PortfolioSummary, Update, What};
use crate::portfolio::{self, PortfolioActor, PortfolioMsg};
use crate::query;
use crate::root::Failures;
use crate::rows;
use crate::system::Deps;
use crate::table::{Positions, StoredTable};
use crate::tenant::{Phase as Life, Resting, Tenant};
use crate::webhook::notice;
use arrow::array::RecordBatch;
use cache::Tag;
use engine::alert::{Change, Phase, Rule, Trouble};
use engine::checkpoint::{Changes, Saved, Snapshot};
use engine::cost::Cost;
use engine::event::{ItemName, Micros, Span, StreamName, WorkspaceId};
use engine::metric::{Rows, Timing};
use engine::portfolio::Price;
use engine::program::Program;
use engine::reference::{TableSchema, TableSize};
use engine::window::Window;
use engine::workspace::{Failure, Outputs, Stop, Workspace};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent, async_trait};
use serde_json::{Map, Value, json};
use sql::store::{Alert, Commit, DeadLetter, FinalRow, RuleChange, StoreError};
use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use streams::log::{Body, Filter, Offset, ReadError, Record, Refused, Scan};
use streams::table::{Table, built_in_tables, positions};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use uuid::Uuid;

/// All that reaches a workspace.
pub(crate) enum WorkspaceMsg {
    Events {
        offset: u64,
        stream: StreamName,
        batch: RecordBatch,
        permit: OwnedSemaphorePermit,
    },
    Advance {
        offset: u64,
        stream: StreamName,
        frontier: Micros,
    },
    Refused {
        offset: u64,
        stream: StreamName,
        events: Vec<Refused>,
        _permit: OwnedSemaphorePermit,
    },
    /// Provisional rows are due.
    Tick,
    /// Time to look for streams that idle.
    Idle,
    /// Time to commit.
    Save,
    /// Time to see whether there is nothing to do any more.
    Rest,
    /// A commit has an end; perhaps another one is under way meanwhile.
    Saved,
    Define {
        name: ItemName,
        definition: MetricDefinition,
        program: Arc<Program>,
        reply: Reply<()>,
    },
    Remove {
        name: ItemName,
        reply: Reply<bool>,
    },
    Watch {
        name: ItemName,
        definition: RuleDefinition,
        reply: Reply<()>,
    },
    Unwatch {
        name: ItemName,
        reply: Reply<bool>,
    },
    Metrics(RpcReplyPort<Vec<MetricInfo>>),
    Unplanned(RpcReplyPort<Vec<UnplannedMetric>>),
    /// Rules that cannot look at every row, and why.
    Trouble(RpcReplyPort<BTreeMap<ItemName, Trouble>>),
    Streams(RpcReplyPort<BTreeMap<StreamName, engine::workspace::StreamTime>>),
    Rows {
        metric: ItemName,
        reply: Reply<Recent>,
    },
    DefineTable {
        table: Box<Table>,
        reply: Reply<()>,
    },
    RemoveTable {
        name: StreamName,
        reply: Reply<bool>,
    },
    /// The rows of a reference table that are valid at an instant.
    TableRows {
        name: StreamName,
        at: Micros,
        reply: Reply<Option<RecordBatch>>,
    },
    TableSizes(RpcReplyPort<BTreeMap<StreamName, TableSize>>),
    /// Somebody has seen an alert, and the store knows.
    Ack {
        alert: Box<Alert>,
        reply: Reply<()>,
    },
    /// A portfolio or its positions changed in the store.
    Hold {
        id: ItemName,
        reply: Reply<()>,
    },
    /// A portfolio that could not be valued is to be tried again.
    HoldAgain(ItemName),
    Summary {
        id: ItemName,
        reply: Reply<Arc<PortfolioSummary>>,
    },
    /// Commits what there is, then stops.
    Drain(RpcReplyPort<()>),
}

pub(crate) type Reply<T> = RpcReplyPort<Result<T, Fault>>;

/// A metric, how it is planned and how it is doing.
#[derive(Clone, Debug)]
pub struct MetricInfo {
    pub name: ItemName,
    pub definition: MetricDefinition,
    pub program: Arc<Program>,
    /// Why it stopped.
    pub failure: Option<Stop>,
    pub state_bytes: usize,
    pub keys: usize,
    pub panes: usize,
    /// Events that wait to be joined.
    pub waiting: usize,
    /// Since the process started.
    pub cost: Cost,
    /// Greatest event time of the stream that its rows come from.
    pub frontier: Option<Micros>,
}

/// A metric whose SQL can no longer be planned over what it reads. Its name is taken and its rows can be read.
#[derive(Clone, Debug)]
pub struct UnplannedMetric {
    pub name: ItemName,
    pub definition: MetricDefinition,
    pub reason: String,
}

/// A metric's rows that the store may not have yet.
pub(crate) struct Recent {
    /// Or why it has none.
    pub(crate) program: Result<Arc<Program>, Fault>,
    pub(crate) frontier: Option<Micros>,
    pub(crate) unsaved: Vec<FinalRow>,
    pub(crate) live: Vec<Rows>,
    pub(crate) failure: Option<Stop>,
}

/// What became of a commit.
struct Written {
    /// Up to where the store has the log now, or what has to be committed again and why.
    result: Result<u64, (Unsaved, Arc<StoreError>)>,
    /// How long the state took to encode; `None`: there was none in it.
    encoding: Option<Duration>,
}

/// Why a workspace goes back to the checkpoint that the store has.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Outrun(Arc<StoreError>);

/// Results on their way to the store.
#[derive(Default)]
struct Unsaved {
    rows: Vec<FinalRow>,
    /// Some of the rows may be in the store.
    repeats: bool,
    /// To be told once they are in the store.
    alerts: Vec<(AlertPhase, Alert)>,
    dead_letters: Vec<DeadLetter>,
    rules: Vec<RuleChange>,
}

impl Unsaved {
    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.alerts.is_empty() && self.dead_letters.is_empty() && self.rules.is_empty()
    }

    /// About what it takes in memory.
    fn bytes(&self) -> usize {
        let rows = self.rows.iter().map(|row| size_of::<FinalRow>() + row.key.len() + row.row.len());
        let letters = self.dead_letters.iter().map(|l| size_of::<DeadLetter>() + l.detail.len() + l.payload.len());
        rows.sum::<usize>() + letters.sum::<usize>() + self.alerts.len() * 1024
    }

    fn put_back(&mut self, mut earlier: Unsaved) {
        earlier.rows.append(&mut self.rows);
        earlier.alerts.append(&mut self.alerts);
        earlier.dead_letters.append(&mut self.dead_letters);
        earlier.rules.append(&mut self.rules);
        earlier.repeats |= self.repeats;
        *self = earlier;
    }
}

/// A commit whose state is not encoded yet, and the alerts to tell of afterwards.
struct Due {
    commit: Commit,
    state: Option<Snapshot>,
    alerts: Vec<(AlertPhase, Alert)>,
}

/// The commit with its state, of which it has none yet; or the commit, and why it cannot be.
async fn encoded(mut commit: Commit, state: Option<Snapshot>) -> Result<Commit, (Commit, Result<(), Arc<StoreError>>)> {
    let Some(state) = state else { return Ok(commit) };
    let encoded: Result<Changes, String> = match state.bytes() > ENCODED_AT_ONCE {
        false => state.encode().map_err(|error| error.to_string()),
        true => match tokio::task::spawn_blocking(move || state.encode()).await {
            Ok(encoded) => encoded.map_err(|error| error.to_string()),
            Err(panic) => Err(panic.to_string()),
        },
    };
    match encoded {
        Ok(changes) => {
            commit.state = Some(changes);
            Ok(commit)
        }
        Err(error) => {
            tracing::error!(workspace = %commit.workspace, error, "the state cannot be encoded");
            Err((commit, Err(Arc::new(StoreError::Busy { operation: "encode the state" }))))
        }
    }
}

struct Defined {
    definition: MetricDefinition,
    program: Arc<Program>,
    version: i64,
    since: u64,
    emit: Duration,
    due: Instant,
    changed: bool,
}

struct DefinedRule {
    definition: RuleDefinition,
    /// First log offset of which it sees results.
    since: u64,
}

/// A reference table.
struct DefinedTable {
    schema: Arc<TableSchema>,
    /// First log offset of its changes.
    since: u64,
}

/// A portfolio that failed, or could not be valued.
#[derive(Default)]
struct Unheld {
    /// Why it is not valued now.
    fault: Option<Fault>,
    failures: Failures,
}

struct Held {
    actor: ActorRef<PortfolioMsg>,
    symbols: HashSet<String>,
}

/// What tells firings that are open at the same time from each other: the rule, and the labels as JSON.
type Episode = (ItemName, String);

/// Where a stream stood when its newest event came.
#[derive(Clone, Copy)]
struct Arrival {
    at: Micros,
    frontier: Micros,
}

pub(crate) struct State {
    tenant: Arc<Tenant>,
    deps: Arc<Deps>,
    engine: Workspace,
    applied: u64, // the next log offset
    metrics: BTreeMap<ItemName, Defined>,
    /// What the store has as metrics and cannot be planned, and why.
    unplanned: BTreeMap<ItemName, (MetricDefinition, String)>,
    rules: BTreeMap<ItemName, DefinedRule>,
    /// Why a rule cannot run at all.
    idle_rules: BTreeMap<ItemName, String>,
    tables: BTreeMap<StreamName, DefinedTable>,
    portfolios: BTreeMap<ItemName, Held>,
    unheld: BTreeMap<ItemName, Unheld>,
    /// The positions that `ref.positions` was told of, by portfolio and symbol; read from the table when first needed.
    written: Option<BTreeMap<ItemName, Positions>>,
    firing: HashMap<Episode, Alert>,
    arrivals: BTreeMap<StreamName, Arrival>,
    unsaved: Unsaved,
    in_store: Arc<[FinalRow]>,                  // rows of the commit under way
    dirty: bool,                                // the state differs from the stored one
    saving: Option<oneshot::Receiver<Written>>, // a commit under way
    /// The store does not have the state that this one came of.
    outrun: Option<Arc<StoreError>>,
    save_planned: bool,
    alerts_planned: bool,      // and sooner
    tick_due: Option<Instant>, // the earliest tick that was asked for
    idle_due: Option<Instant>,
    next_state: Instant,  // the state is not written more often than pays
    next_alerts: Instant, // nor for what has to come with it
    state_took: Duration, // the last time
    failed_saves: u32,    // in a row
    overfull: bool,       // more waits for the store than `limits.unsaved_bytes`
    withheld: Vec<OwnedSemaphorePermit>,
    used: Instant, // when it last had something to do
    draining: Option<RpcReplyPort<()>>,
}

/// How often results are committed.
const SAVE_EVERY: Duration = Duration::from_millis(500);

/// How long a commit that failed waits at most before it is tried again.
const SAVE_AGAIN_MOST: Duration = Duration::from_secs(5);

/// State of more bytes is encoded on a thread of its own, since others wait for this one.
const ENCODED_AT_ONCE: usize = 64 << 10;

/// Writing the state may take this share of the time, and is spread accordingly.
const STATE_SHARE: u32 = 20;

/// And this one when alerts or dead letters wait for it: who is alerted waits for the store.
const ALERTS_SHARE: u32 = 4;

/// But a restart shall not have to compute more than this again.
const REPLAY_MOST: Duration = Duration::from_secs(5);

/// A workspace that worked longer than this on one batch lets others have the thread before its next one: a runtime's
/// thread else stays with an actor for as many messages as wait for it.
const SLICE: Duration = Duration::from_micros(200);

/// A batch of more events than this, counted for each metric, takes about as long as that: it is computed elsewhere.
const HEAVY: usize = 1_024;
/// In microseconds.
const HOUR: i64 = Span::seconds(3_600).0;

/// A batch at which the actor failed so often is searched for the events that do it.
const POISON_AFTER: u32 = 2;

/// Rejected events held for the next commit; the ones over it are only counted.
const DEAD_LETTERS_HELD: usize = 1_000;

/// A log that cannot be read is mended by somebody, which takes a while.
const LOG_AGAIN: Duration = Duration::from_secs(30);

pub(crate) struct WorkspaceActor;

#[async_trait]
impl Actor for WorkspaceActor {
    type Msg = WorkspaceMsg;
    type State = State;
    type Arguments = (Arc<Tenant>, Arc<Deps>);

    async fn pre_start(
        &self,
        myself: ActorRef<WorkspaceMsg>,
        (tenant, deps): Self::Arguments,
    ) -> Result<State, ActorProcessingErr> {
        tenant.counters.queued_batches.store(0, Relaxed);
        tenant.set_phase(Life::Restoring(myself));
        Ok(State {
            tenant,
            engine: deps.empty_engine(),
            deps,
            applied: 0,
            metrics: BTreeMap::new(),
            unplanned: BTreeMap::new(),
            rules: BTreeMap::new(),
            idle_rules: BTreeMap::new(),
            tables: BTreeMap::new(),
            portfolios: BTreeMap::new(),
            unheld: BTreeMap::new(),
            written: None,
            firing: HashMap::new(),
            arrivals: BTreeMap::new(),
            unsaved: Unsaved::default(),
            in_store: Arc::new([]),
            dirty: false,
            saving: None,
            outrun: None,
            save_planned: false,
            alerts_planned: false,
            tick_due: None,
            idle_due: None,
            next_state: Instant::now(),
            next_alerts: Instant::now(),
            state_took: Duration::ZERO,
            failed_saves: 0,
            overfull: false,
            withheld: Vec::new(),
            used: Instant::now(),
            draining: None,
        })
    }

    // restoring here and not in `pre_start` leaves the supervisor free meanwhile
    async fn post_start(&self, myself: ActorRef<WorkspaceMsg>, state: &mut State) -> Result<(), ActorProcessingErr> {
        state.restore(&myself).await?;
        state.tenant.set_phase(Life::Running(myself.clone()));
        drop(myself.send_after(state.deps.rest_after, || WorkspaceMsg::Rest));
        Ok(())
    }

    async fn handle(
        &self,
        myself: ActorRef<WorkspaceMsg>,
        message: WorkspaceMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        #[cfg(test)]
        crate::fault_point::handling("workspace", state.tenant.id.as_str());
        if !matches!(
            message,
            WorkspaceMsg::Tick | WorkspaceMsg::Idle | WorkspaceMsg::Save | WorkspaceMsg::Saved | WorkspaceMsg::Rest
        ) {
            state.used = Instant::now();
        }
        match message {
            WorkspaceMsg::Events { offset, stream, batch, permit } => {
                state.tenant.counters.queued_batches.fetch_sub(1, Relaxed);
                let began = Instant::now();
                if offset >= state.applied {
                    state.on_events(&myself, offset, &stream, &batch).await?;
                }
                let is_long = began.elapsed() > SLICE;
                match state.overfull {
                    true => state.withheld.push(permit), // until the store takes what waits for it
                    false => drop(permit),               // the mailbox has room again only now
                }
                if is_long {
                    tokio::task::yield_now().await;
                }
            }
            WorkspaceMsg::Advance { offset, stream, frontier } if offset >= state.applied => {
                let outputs = state.engine.idle(&stream, frontier);
                state.applied = offset + 1;
                state.after(&myself, &stream, outputs);
            }
            WorkspaceMsg::Advance { .. } => {}
            WorkspaceMsg::Rest => state.on_rest(&myself),
            WorkspaceMsg::Refused { offset, stream, events, .. } if offset >= state.applied => {
                state.refused(&stream, events);
                state.applied = offset + 1;
                state.tenant.counters.pushed.fetch_max(state.applied, Relaxed);
                state.plan_save(&myself);
            }
            WorkspaceMsg::Refused { .. } => {}
            WorkspaceMsg::Tick => state.on_tick(&myself),
            WorkspaceMsg::Idle => state.on_idle(&myself),
            WorkspaceMsg::Save => state.on_save(&myself),
            WorkspaceMsg::Saved => {
                if let Some(written) = state.saving.as_mut().and_then(|saving| saving.try_recv().ok()) {
                    state.on_saved(&myself, written);
                }
            }
            WorkspaceMsg::Define { name, definition, program, reply } => {
                _ = reply.send(state.define(&myself, name, definition, program).await); // the caller may have left
            }
            WorkspaceMsg::Remove { name, reply } => _ = reply.send(state.remove(&myself, &name).await),
            WorkspaceMsg::Watch { name, definition, reply } => {
                _ = reply.send(state.watch(&myself, name, definition).await);
            }
            WorkspaceMsg::Unwatch { name, reply } => _ = reply.send(state.unwatch(&myself, name).await),
            WorkspaceMsg::Trouble(reply) => _ = reply.send(state.trouble()),
            WorkspaceMsg::Metrics(reply) => _ = reply.send(state.infos()),
            WorkspaceMsg::Unplanned(reply) => {
                let one = |(name, (definition, reason)): (&ItemName, &(MetricDefinition, String))| UnplannedMetric {
                    name: name.clone(),
                    definition: definition.clone(),
                    reason: reason.clone(),
                };
                _ = reply.send(state.unplanned.iter().map(one).collect());
            }
            WorkspaceMsg::Streams(reply) => {
                _ = reply.send(state.engine.streams().map(|(name, time)| (name.clone(), time)).collect());
            }
            WorkspaceMsg::Rows { metric, reply } => _ = reply.send(state.recent(&metric)),
            WorkspaceMsg::DefineTable { table, reply } => _ = reply.send(state.define_table(*table).await),
            WorkspaceMsg::RemoveTable { name, reply } => _ = reply.send(state.remove_table(&name).await),
            WorkspaceMsg::TableRows { name, at, reply } => {
                _ = reply.send(state.engine.tables().rows(&name, at).map_err(Fault::internal));
            }
            WorkspaceMsg::TableSizes(reply) => {
                let tables = state.engine.tables();
                _ = reply.send(state.tables.keys().map(|name| (name.clone(), tables.size(name))).collect());
            }
            WorkspaceMsg::Ack { alert, reply } => {
                state.ack(&alert);
                _ = reply.send(Ok(())); // the caller may have left
            }
            WorkspaceMsg::Hold { id, reply } => _ = reply.send(state.hold(&myself, id).await),
            WorkspaceMsg::HoldAgain(id) => {
                if state.unheld.get(&id).is_some_and(|unheld| unheld.fault.is_some()) {
                    _ = state.hold(&myself, id).await; // it tells what it cannot, and plans to try again
                }
            }
            WorkspaceMsg::Summary { id, reply } => state.summary(&id, reply),
            WorkspaceMsg::Drain(reply) => state.draining = Some(reply),
        }
        if let Some(error) = state.outrun.take() {
            return Err(Outrun(error).into());
        }
        // a commit under way may fail and give its results back: the last one waits for it
        if state.saving.is_none()
            && let Some(reply) = state.draining.take()
        {
            state.drain().await;
            _ = reply.send(());
            state.tenant.left(myself.get_id(), Life::Resting);
            myself.stop(Some("drained".to_owned()));
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<WorkspaceMsg>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(cell, error) = event {
            state.portfolio_failed(&myself, &cell, &error);
        }
        Ok(())
    }
}

impl State {
    async fn restore(&mut self, myself: &ActorRef<WorkspaceMsg>) -> Result<(), ActorProcessingErr> {
        let (id, store) = (self.tenant.id.clone(), self.deps.store.clone());
        // an actor that failed may have left a commit on its way: the checkpoint is read behind it
        drop(self.tenant.committing.acquire().await?);
        let checkpoint = store.checkpoint(&id).await?;
        self.applied = checkpoint.as_ref().map_or(0, |c| c.offset).max(self.tenant.first).max(self.deps.log.head().0);
        // a commit without the state stands for this offset until the state is saved again
        self.tenant.counters.saved.store(self.applied, Relaxed);
        let mut later = Vec::new();
        for table in built_in_tables() {
            self.begin_table(table, 0)?;
        }
        for row in store.tables(&id).await? {
            let stored: StoredTable = serde_json::from_value(row.definition)?;
            self.begin_table(&stored.table(row.name)?, row.since_offset)?;
        }
        let mut rows = store.metrics(&id).await?;
        // one that reads another can be planned only after it, so what fails may have to wait for the next round
        while !rows.is_empty() {
            let (mut failed, count) = (Vec::new(), rows.len());
            for row in rows {
                let definition: MetricDefinition = serde_json::from_value(row.definition.clone())?;
                let known = |name: &ItemName| {
                    let later = later.iter().find(|(later, _): &&(ItemName, Defined)| later == name).map(|(_, d)| d);
                    self.metrics.get(name).or(later).map(|defined| defined.program.clone())
                };
                match self.deps.program(&self.tenant, &definition.sql, known).await {
                    Ok(program) => {
                        let defined = self.defined(definition, program, row.version, row.since_offset);
                        if row.since_offset <= self.applied {
                            self.begin(row.name, defined)?
                        } else {
                            later.push((row.name, defined))
                        }
                    }
                    Err(error) => failed.push((row, error)),
                }
            }
            if failed.len() == count {
                for (row, error) in failed {
                    tracing::error!(workspace = %id, metric = %row.name, %error, "stored metric can no longer be planned; it stays stopped");
                    self.unplanned.insert(row.name, (serde_json::from_value(row.definition)?, error.detail));
                }
                break;
            }
            rows = failed.into_iter().map(|(row, _)| row).collect();
        }
        for row in store.alert_rules(&id).await? {
            let definition = serde_json::from_value(row.definition)?;
            self.rules.insert(row.name, DefinedRule { definition, since: row.since_offset });
        }
        let known: Vec<ItemName> = self.metrics.keys().cloned().collect();
        known.iter().for_each(|metric| self.start_rules(metric, self.applied));
        let (open, _) = store.alerts(&id, Some("firing"), 10_000, None).await?;
        self.firing = open.into_iter().map(|alert| ((alert.rule.clone(), alert.labels.to_string()), alert)).collect();
        let state = checkpoint.and_then(|c| c.state);
        #[cfg(test)]
        let state = crate::fault_point::spoiled(&id, state);
        let fresh = match state {
            Some(state) => match Saved::read(&state).and_then(|saved| self.engine.restore(saved)) {
                Ok(fresh) => fresh,
                Err(error) => {
                    tracing::warn!(workspace = %id, %error, "saved state cannot be used; computing it again from the log");
                    #[cfg(test)]
                    crate::fault_point::refuse_state(&id);
                    self.compute_all().await?;
                    Vec::new()
                }
            },
            None => known,
        };
        for name in self.engine.in_order(fresh) {
            self.catch_up(&name).await?;
        }
        let now = self.deps.clock.now();
        // a workspace that rested did not stop the time of its idle streams
        let rested = self.tenant.resting.lock().take().filter(|resting| resting.offset >= self.applied);
        let rested = rested.map(|resting| resting.arrivals).unwrap_or_default();
        let before: BTreeMap<StreamName, Option<Micros>> = self.times();
        self.replay(later, myself).await?;
        self.unsaved.repeats = true; // also of what is committed while the log is read
        self.settle_alerts();
        self.count_tables();
        for (name, frontier) in self.times() {
            let Some(frontier) = frontier else { continue };
            let stood = rested.get(&name).filter(|_| before.get(&name) == Some(&Some(frontier)));
            let (at, frontier) = stood.copied().unwrap_or((now, frontier));
            self.arrivals.insert(name, Arrival { at, frontier });
        }
        for portfolio in store.portfolios(&id).await? {
            if let Ok(name) = portfolio.id.parse::<ItemName>() {
                _ = self.hold(myself, name).await; // it tells what it cannot, and plans to try again
            }
        }
        if rested.is_empty() {
            self.plan_idle(myself, self.idle_timeout());
        } else {
            self.plan_idle(myself, Duration::ZERO);
        }
        if self.dirty || !self.unsaved.is_empty() {
            self.plan_save(myself);
        }
        Ok(())
    }

    /// Where event time stands on each stream.
    fn times(&self) -> BTreeMap<StreamName, Option<Micros>> {
        self.engine.streams().map(|(name, time)| (name.clone(), time.frontier)).collect()
    }

    /// Applies what the log holds behind the checkpoint, and pushes what was not pushed before.
    async fn replay(
        &mut self,
        mut later: Vec<(ItemName, Defined)>,
        myself: &ActorRef<WorkspaceMsg>,
    ) -> Result<(), ActorProcessingErr> {
        later.reverse(); // of one offset the first one planned, which others may read, is taken first
        later.sort_by_key(|(_, defined)| std::cmp::Reverse(defined.since));
        let mut rules = self.rules_since(self.applied + 1);
        let mut records = self.scan(self.applied);
        let mut count = 0u64;
        while let Some(record) = records.recv().await {
            let (offset, record) = record?;
            while later.last().is_some_and(|(_, defined)| defined.since <= offset.0) {
                if let Some((name, defined)) = later.pop() {
                    self.begin_late(name, defined, offset.0).await?;
                }
            }
            self.start_due(&mut rules, offset.0);
            let push = offset.0 >= self.tenant.counters.pushed.load(Relaxed);
            let outputs = match record.body {
                Body::Events { stream, batch } => self.step(offset.0, &stream, &batch).await?,
                Body::Advance { stream, frontier } => vec![self.engine.idle(&stream, frontier)],
                Body::Refused { stream, events } => {
                    self.refused(&stream, events);
                    Vec::new()
                }
            };
            for outputs in outputs {
                self.recall(&outputs.alerts).await?;
                self.keep(outputs, push);
            }
            self.tenant.end();
            self.applied = offset.0 + 1;
            self.tenant.counters.pushed.fetch_max(self.applied, Relaxed);
            count += 1;
            if count.is_multiple_of(64) {
                tokio::task::yield_now().await;
            }
        }
        for (name, defined) in later.into_iter().rev() {
            self.begin_late(name, defined, u64::MAX).await?;
        }
        self.start_due(&mut rules, u64::MAX);
        if count > 0 {
            self.dirty = true;
            self.metrics.values_mut().for_each(|metric| metric.changed = true);
            self.plan_tick(myself, Instant::now());
            tracing::info!(workspace = %self.tenant.id, records = count, "replayed the log");
        }
        Ok(())
    }

    /// Records of this workspace from `from` on, read on a thread of their own.
    fn scan(&self, from: u64) -> tokio::sync::mpsc::Receiver<Result<(Offset, Record), ReadError>> {
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        let (log, workspace) = (self.deps.log.clone(), self.tenant.id.clone());
        tokio::task::spawn_blocking(move || {
            let filter = Filter { workspace: Some(workspace), ..Filter::default() };
            let from = Offset(from).max(log.head());
            let records: Scan = match log.scan(from, filter) {
                Ok(records) => records,
                Err(error) => Box::new(std::iter::once(Err(error))),
            };
            for record in records {
                if sender.blocking_send(record).is_err() {
                    return; // the actor is gone
                }
            }
        });
        receiver
    }

    fn defined(&self, definition: MetricDefinition, program: Arc<Program>, version: i64, since: u64) -> Defined {
        let emit = Duration::from_micros(definition.emit.unwrap_or(EMIT).0 as u64);
        Defined { definition, program, version, since, emit, due: Instant::now(), changed: false }
    }

    fn begin(&mut self, name: ItemName, defined: Defined) -> Result<(), ActorProcessingErr> {
        let timing = timing(&defined.definition);
        self.engine.define(name.clone(), defined.version, defined.program.clone(), timing)?;
        self.metrics.insert(name, defined);
        Ok(())
    }

    /// Starts a metric that was defined after the checkpoint, in the place of the log where it was.
    async fn begin_late(&mut self, name: ItemName, defined: Defined, at: u64) -> Result<(), ActorProcessingErr> {
        self.begin(name.clone(), defined)?;
        if self.metrics[&name].program.stream().metric().is_some() {
            self.catch_up(&name).await?;
        }
        self.start_rules(&name, at);
        Ok(())
    }

    /// Starts the rules of a metric that were there at this place of the log.
    fn start_rules(&mut self, metric: &ItemName, at: u64) {
        let of_metric = |rule: &DefinedRule| rule.definition.metric == *metric && rule.since <= at;
        let rules: Vec<ItemName> =
            self.rules.iter().filter(|(_, rule)| of_metric(rule)).map(|(name, _)| name.clone()).collect();
        rules.into_iter().for_each(|name| self.start_rule(name));
    }

    fn start_rule(&mut self, name: ItemName) {
        let rule = self.rule(&name, &self.rules[&name].definition);
        let started = rule.and_then(|rule| self.engine.watch(rule).map_err(Fault::internal));
        match started {
            Ok(_) => _ = self.idle_rules.remove(&name),
            Err(fault) => {
                tracing::error!(workspace = %self.tenant.id, rule = %name, %fault, "stored alert rule cannot run; it stays stopped");
                self.idle_rules.insert(name, fault.detail);
            }
        }
    }

    /// Rules that were defined at `from` or later in the log, the first of them last.
    fn rules_since(&self, from: u64) -> Vec<(u64, ItemName)> {
        let mut rules: Vec<_> = self
            .rules
            .iter()
            .map(|(name, rule)| (rule.since, name.clone()))
            .filter(|(since, _)| *since >= from)
            .collect();
        rules.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        rules
    }

    /// Starts those of `rules` that were there at this place of the log, and whose metric was.
    fn start_due(&mut self, rules: &mut Vec<(u64, ItemName)>, at: u64) {
        while let Some((_, name)) = rules.pop_if(|(since, _)| *since <= at) {
            let metric = &self.rules[&name].definition.metric;
            if self.engine.metrics().any(|(known, _)| known == metric) {
                self.start_rule(name);
            }
        }
    }

    /// Rules that cannot look at every row, and why.
    fn trouble(&self) -> BTreeMap<ItemName, Trouble> {
        let trouble = |name: &ItemName, DefinedRule { definition: rule, .. }: &DefinedRule| {
            let unplanned = self.unplanned.get(&rule.metric).map(|(_, reason)| cannot_be_planned(&rule.metric, reason));
            match self.idle_rules.get(name).cloned().or(unplanned) {
                Some(reason) => Some(Trouble { reason, rows: 0 }),
                None => self.engine.trouble(name).cloned(),
            }
        };
        self.rules.iter().filter_map(|(name, rule)| Some((name.clone(), trouble(name, rule)?))).collect()
    }

    fn rule(&self, name: &ItemName, definition: &RuleDefinition) -> Result<Rule, Fault> {
        let Some(metric) = self.metrics.get(&definition.metric) else {
            let detail = format!("there is no metric `{}`; define it first", definition.metric);
            return Err(Fault::not_found("unknown_metric", detail));
        };
        Ok(Rule {
            name: name.clone(),
            metric: definition.metric.clone(),
            condition: sql::plan::condition(&definition.condition, &metric.program)?,
            hold: definition.hold.unwrap_or(Span::ZERO),
            severity: definition.severity.clone().unwrap_or_else(|| SEVERITY.to_owned()),
        })
    }

    async fn on_events(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        offset: u64,
        stream: &StreamName,
        batch: &RecordBatch,
    ) -> Result<(), ActorProcessingErr> {
        let outputs = self.step(offset, stream, batch).await?;
        self.applied = offset + 1;
        if let Some(frontier) = self.engine.frontier(stream) {
            self.arrivals.insert(stream.clone(), Arrival { at: self.deps.clock.now(), frontier });
        }
        for outputs in outputs {
            self.after(myself, stream, outputs);
        }
        self.tenant.end();
        if !self.unsaved.is_empty() {
            self.plan_save(myself); // also of what could not be computed
        }
        self.plan_idle(myself, self.idle_timeout());
        Ok(())
    }

    /// Takes in changes of a reference table.
    fn apply_change(&mut self, table: &StreamName, batch: &RecordBatch, offset: u64) {
        let mut engine = std::mem::take(&mut self.engine);
        self.change_table(&mut engine, table, batch, offset);
        self.engine = engine;
        self.count_tables();
    }

    /// What an earlier table of the same name was told is not this one's.
    fn change_table(&self, engine: &mut Workspace, table: &StreamName, batch: &RecordBatch, offset: u64) {
        let since = self.tables.get(table).map_or(0, |defined| defined.since);
        if offset < since {
            return;
        }
        if let Err(error) = engine.change_table(table, batch, offset) {
            tracing::error!(workspace = %self.tenant.id, %table, %error, "a change of a reference table cannot be read");
        }
    }

    fn count_tables(&self) {
        self.tenant.counters.table_bytes.store(self.engine.tables().bytes() as u64, Relaxed);
    }

    async fn define_table(&mut self, table: Table) -> Result<(), Fault> {
        let name = table.name().clone();
        let stored = serde_json::to_value(StoredTable::of(&table)).map_err(Fault::internal)?;
        let since = self.tables.get(&name).map_or(self.applied, |known| known.since);
        self.deps.store.put_table(&self.tenant.id, &name, &stored, since, self.deps.clock.now()).await?;
        self.begin_table(&table, since).map_err(Fault::internal)?;
        Arc::make_mut(&mut self.tenant.tables.write()).insert(name, Arc::new(table));
        self.dirty = true;
        Ok(())
    }

    fn begin_table(&mut self, table: &Table, since: u64) -> Result<(), ActorProcessingErr> {
        self.engine.define_table(table.schema().clone())?;
        let schema = table.schema().clone();
        self.tables.insert(table.name().clone(), DefinedTable { schema, since });
        Ok(())
    }

    async fn remove_table(&mut self, name: &StreamName) -> Result<bool, Fault> {
        if let Some(metric) = self.engine.readers_of(name).next() {
            let detail = format!("metric `{metric}` joins table `{name}`; delete the metric first");
            return Err(Fault::new(crate::fault::FaultKind::Conflict, "table_in_use", detail));
        }
        let existed = self.deps.store.delete_table(&self.tenant.id, name).await?;
        self.engine.remove_table(name);
        self.tables.remove(name);
        Arc::make_mut(&mut self.tenant.tables.write()).remove(name);
        self.count_tables();
        self.dirty = true;
        Ok(existed)
    }

    /// The positions of a portfolio as changes of `ref.positions`: what differs from what was written there before.
    async fn write_positions(
        &mut self,
        portfolio: &ItemName,
        now: &[engine::portfolio::Position],
    ) -> Result<(), Fault> {
        let before = match &mut self.written {
            Some(written) => written,
            empty => {
                let table = self.engine.tables().rows(positions().name(), Micros::MAX).map_err(Fault::internal)?;
                empty.insert(table.map(|rows| crate::table::read_positions(&rows)).unwrap_or_default())
            }
        };
        let before = before.get(portfolio).cloned().unwrap_or_default();
        let now: BTreeMap<String, engine::portfolio::Position> =
            now.iter().map(|position| (position.symbol.clone(), position.clone())).collect();
        let changes = crate::table::position_changes(portfolio, &before, &now, self.deps.clock.now())?;
        if let Some(changes) = changes {
            self.tenant.append(positions().name(), changes).await?;
        }
        if let Some(written) = &mut self.written {
            written.insert(portfolio.clone(), now);
        }
        Ok(())
    }

    /// Computes a batch: what comes of it, in several parts when some of its events cannot be computed.
    ///
    /// A batch that made the actor fail before is cut in halves until the events that do it are found. They go to the
    /// dead letters and the rest is computed, so that one event does not stop a workspace for good.
    async fn step(
        &mut self,
        offset: u64,
        stream: &StreamName,
        batch: &RecordBatch,
    ) -> Result<Vec<Outputs>, ActorProcessingErr> {
        self.tenant.begin(offset);
        let is_fine = self.tenant.failures_at(offset) < POISON_AFTER;
        if stream.is_table() {
            match is_fine {
                true => self.apply_change(stream, batch, offset),
                false => (0..batch.num_rows()).for_each(|row| {
                    self.poison(offset, stream, &batch.slice(row, 1), "the changes it came with cannot be applied");
                }),
            }
            return Ok(vec![Outputs::default()]);
        }
        if is_fine {
            let outputs = if self.is_heavy(stream, batch) {
                self.step_aside(stream, batch).await
            } else {
                compute_batch(&self.tenant.id, &mut self.engine, stream, batch)
            };
            self.late(stream, batch, &outputs);
            return Ok(vec![outputs]);
        }
        let Sifted { computed, poison } = self.sifted(stream, batch)?;
        for (part, outputs) in &computed {
            self.late(stream, part, outputs);
        }
        for (event, panic) in &poison {
            self.poison(offset, stream, event, panic);
        }
        self.metrics.values_mut().for_each(|metric| metric.changed = true);
        Ok(computed.into_iter().map(|(_, outputs)| outputs).collect())
    }

    /// Whether a batch takes long.
    fn is_heavy(&self, stream: &StreamName, batch: &RecordBatch) -> bool {
        let rows = batch.num_rows();
        rows * self.metrics.len() > HEAVY
            && rows * self.metrics.keys().filter(|metric| self.engine.feeds(stream, metric)).count() > HEAVY
    }

    /// Computes a batch that takes long, while those who serve go on. A panic is one of the actor all the same.
    async fn step_aside(&mut self, stream: &StreamName, batch: &RecordBatch) -> Outputs {
        let mut engine = std::mem::take(&mut self.engine);
        let (workspace, stream, batch) = (self.tenant.id.clone(), stream.clone(), batch.clone());
        let computed = self.deps.background.run(move || {
            let outputs = compute_batch(&workspace, &mut engine, &stream, &batch);
            (engine, outputs)
        });
        let (engine, outputs) = computed.await.unwrap_or_else(|error| resume_unwind(error.into_panic()));
        self.engine = engine;
        outputs
    }

    fn table_schemas(&self) -> Vec<Arc<TableSchema>> {
        self.tables.values().map(|table| table.schema.clone()).collect()
    }

    /// An engine with these metrics, each behind the one it reads, and these rules, without state.
    fn empty_engine(&self, metrics: &[ItemName], rules: &[ItemName]) -> Result<Workspace, ActorProcessingErr> {
        let mut engine = engine_with(&self.deps, &self.table_schemas())?;
        for name in metrics {
            let defined = &self.metrics[name];
            let timing = timing(&defined.definition);
            engine.define(name.clone(), defined.version, defined.program.clone(), timing)?;
        }
        // a rule that cannot run was told of when it was started
        for rule in rules.iter().filter_map(|name| self.rule(name, &self.rules[name].definition).ok()) {
            engine.watch(rule)?;
        }
        Ok(engine)
    }

    /// An event that cannot be computed goes to the dead letters.
    fn poison(&mut self, offset: u64, stream: &StreamName, event: &RecordBatch, panic: &str) {
        tracing::error!(workspace = %self.tenant.id, %stream, offset, panic, "an event cannot be computed; it is left out");
        self.dirty = true;
        if self.unsaved.dead_letters.len() >= DEAD_LETTERS_HELD {
            return;
        }
        self.unsaved.dead_letters.push(DeadLetter {
            stream: stream.clone(),
            at: self.deps.clock.now(),
            code: "poison".to_owned(),
            detail: format!("the computation of this event failed with: {panic}"),
            payload: rows::json_lines(event).ok().and_then(|mut lines| lines.pop()).unwrap_or_default(),
        });
    }

    /// Looks up which of the alerts that a replay shows were told before the restart, so that none is told twice.
    async fn recall(&mut self, changes: &[Change]) -> Result<(), ActorProcessingErr> {
        for change in changes.iter().filter(|change| change.phase == Phase::Firing) {
            let labels = labels(change).to_string();
            let id = self.alert_id(change, &labels);
            let episode = (change.rule.clone(), labels);
            if !self.firing.contains_key(&episode)
                && let Some(known) = self.deps.store.alert(&self.tenant.id, &id).await?
            {
                self.firing.insert(episode, known);
            }
        }
        Ok(())
    }

    fn alert_id(&self, change: &Change, labels: &str) -> String {
        // the same episode has the same id in every replay
        let cause = format!("{}\n{}\n{labels}\n{}", self.tenant.id, change.rule, change.since.0);
        Uuid::new_v5(&Uuid::NAMESPACE_OID, cause.as_bytes()).to_string()
    }

    fn after(&mut self, myself: &ActorRef<WorkspaceMsg>, stream: &StreamName, outputs: Outputs) {
        let prices_changed = outputs.prices_changed;
        self.keep(outputs, true);
        self.tenant.counters.pushed.fetch_max(self.applied, Relaxed);
        self.dirty = true;
        self.plan_save(myself);
        if prices_changed {
            self.mark_portfolios();
        }
        let mut next: Option<Instant> = None;
        for (_, metric) in self.metrics.iter_mut().filter(|(name, _)| self.engine.feeds(stream, name)) {
            metric.changed = true;
            next = Some(next.map_or(metric.due, |next| next.min(metric.due)));
        }
        if let Some(next) = next {
            self.plan_tick(myself, next);
        }
    }

    /// Keeps results for the next commit and, unless they are a replay's, pushes them.
    fn keep(&mut self, outputs: Outputs, push: bool) {
        for rows in outputs.rows {
            let Some(metric) = self.metrics.get(&rows.metric) else { continue };
            let program = metric.program.clone();
            if rows.rows.revisions.is_some() {
                match rows::to_store(&rows.metric, &program, &rows.rows) {
                    Ok(finals) => self.unsaved.rows.extend(finals),
                    Err(error) => tracing::error!(metric = %rows.metric, %error, "final rows have no JSON form"),
                }
            }
            if push {
                self.publish(What::Rows { metric: rows.metric, program, rows: Arc::new(rows.rows) });
            }
        }
        for change in outputs.alerts {
            self.on_alert(&change);
        }
        for (rule, trouble) in outputs.trouble {
            metrics::counter!("tidewatch_alert_rule_failures_total").increment(trouble.rows);
            // once: it may be so for every row that comes
            if self.engine.trouble(&rule).is_some_and(|all| all.rows == trouble.rows) {
                tracing::warn!(workspace = %self.tenant.id, %rule, reason = trouble.reason, "the condition of an alert rule cannot be computed for some rows; they are left out");
            }
        }
        for failure in outputs.failures {
            let Failure { metric, stop } = failure;
            tracing::warn!(workspace = %self.tenant.id, %metric, code = stop.cause.code(), reason = stop.reason, "metric stopped");
            if push {
                self.publish(What::MetricFailed { metric, stop });
            }
        }
    }

    /// A firing counts once it is in the store, and is told then: a crash before leaves no trace of it, and a replay
    /// after it finds the firing there.
    fn on_alert(&mut self, change: &Change) {
        let labels = labels(change);
        let episode = (change.rule.clone(), labels.to_string());
        let id = self.alert_id(change, &episode.1);
        let (alert, phase) = match change.phase {
            Phase::Firing => {
                let row = rows::json_lines(&change.row).ok().and_then(|mut lines| lines.pop());
                let row = row.and_then(|line| serde_json::from_str(&line).ok()).unwrap_or_else(|| json!({}));
                let alert = Alert {
                    id: id.clone(),
                    workspace: self.tenant.id.clone(),
                    rule: change.rule.clone(),
                    metric: change.metric.clone(),
                    severity: change.severity.clone(),
                    labels,
                    state: "firing".to_owned(),
                    row,
                    started_at: change.since,
                    fired_at: self.deps.clock.now(),
                    resolved_at: None,
                    acked_at: None,
                    acked_by: None,
                };
                if self.firing.contains_key(&episode) {
                    return; // fired before the restart, and told then
                }
                self.firing.insert(episode, alert.clone());
                (alert, AlertPhase::Firing)
            }
            Phase::Resolved => {
                self.resolve(&episode);
                return;
            }
        };
        self.unsaved.alerts.push((phase, alert));
        self.dirty = true; // the state knows where the rule stands
    }

    fn resolve(&mut self, episode: &Episode) {
        let Some(mut alert) = self.firing.remove(episode) else { return };
        if alert.state == "resolved" {
            return; // before the restart, and told then
        }
        alert.state = "resolved".to_owned();
        alert.resolved_at = Some(self.deps.clock.now());
        self.unsaved.alerts.push((AlertPhase::Resolved, alert));
        self.dirty = true; // the state knows where the rule stands
    }

    /// Somebody has seen an alert; whoever is told that it ends is told so too.
    fn ack(&mut self, acked: &Alert) {
        let unsaved = self.unsaved.alerts.iter_mut().map(|(_, alert)| alert);
        for alert in self.firing.values_mut().chain(unsaved).filter(|alert| alert.id == acked.id) {
            alert.acked_at = acked.acked_at;
            alert.acked_by.clone_from(&acked.acked_by);
        }
    }

    /// Resolves the alerts for which no rule fires any more, since the rule or its metric is gone or another one now.
    fn settle_alerts(&mut self) {
        let mut keys: HashMap<&ItemName, HashSet<&str>> = HashMap::new();
        for (name, rule) in &self.rules {
            if self.metrics.contains_key(&rule.definition.metric) {
                keys.insert(name, self.engine.firing(name).collect());
            }
        }
        let fires = |alert: &Alert| {
            let program = &self.metrics.get(&alert.metric)?.program;
            let names = program.output().fields().iter().skip(2).take(program.key_count());
            let values = names.map(|name| alert.labels.get(name.name()).and_then(Value::as_str));
            let key = values.collect::<Option<Vec<&str>>>()?.join("|");
            let is_same = self.rules.get(&alert.rule)?.definition.metric == alert.metric;
            (is_same && keys.get(&alert.rule)?.contains(key.as_str())).then_some(())
        };
        let stale = self.firing.iter().filter(|(_, alert)| fires(alert).is_none()).map(|(episode, _)| episode.clone());
        let mut stale: Vec<Episode> = stale.collect();
        stale.sort();
        stale.iter().for_each(|episode| self.resolve(episode));
    }

    /// Events that were refused when they came are dead letters.
    fn refused(&mut self, stream: &StreamName, events: Vec<Refused>) {
        let room = DEAD_LETTERS_HELD.saturating_sub(self.unsaved.dead_letters.len());
        let letter = |(place, Refused { at, code, detail, payload })| DeadLetter {
            stream: stream.clone(),
            at: one_of_many(at, place),
            code,
            detail,
            payload,
        };
        self.unsaved.dead_letters.extend(events.into_iter().take(room).enumerate().map(letter));
        self.dirty = true; // the state has them behind it
    }

    /// Events too late for a metric go to the dead letters.
    fn late(&mut self, stream: &StreamName, batch: &RecordBatch, outputs: &Outputs) {
        let room = DEAD_LETTERS_HELD.saturating_sub(self.unsaved.dead_letters.len());
        let at = self.deps.clock.now();
        for (place, late) in outputs.late.iter().take(room).enumerate() {
            let line = rows::json_lines(&batch.slice(late.row as usize, 1)).ok().and_then(|mut lines| lines.pop());
            self.unsaved.dead_letters.push(DeadLetter {
                stream: stream.clone(),
                at: one_of_many(at, place),
                code: "late".to_owned(),
                detail: format!(
                    "came after the window of metric `{}` was final and its allowed lateness over",
                    late.metric
                ),
                payload: line.unwrap_or_default(),
            });
        }
    }

    fn publish(&self, what: What) {
        self.deps.outlet.publish(Update { workspace: self.tenant.id.clone(), what });
    }

    fn plan_tick(&mut self, myself: &ActorRef<WorkspaceMsg>, due: Instant) {
        if self.tick_due.is_some_and(|planned| planned <= due) {
            return;
        }
        self.tick_due = Some(due);
        match due.checked_duration_since(Instant::now()) {
            // behind what waits in the mailbox, so that a burst is shown once
            None => _ = myself.send_message(WorkspaceMsg::Tick),
            Some(wait) => drop(myself.send_after(wait, || WorkspaceMsg::Tick)),
        }
    }

    fn on_tick(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        let now = Instant::now();
        if self.tick_due.is_none_or(|due| due > now) {
            return; // an earlier one came in its place
        }
        self.tick_due = None;
        let mut next: Option<Instant> = None;
        let mut due = Vec::new();
        for (name, metric) in self.metrics.iter_mut().filter(|(_, metric)| metric.changed) {
            if metric.due <= now {
                metric.due = now + metric.emit;
                metric.changed = false;
                due.push(name.clone());
            } else {
                next = Some(next.map_or(metric.due, |next| next.min(metric.due)));
            }
        }
        due.retain(|name| self.deps.outlet.is_followed(&self.tenant.id, name));
        for name in due {
            let outputs = self.engine.tick(&name);
            self.keep(outputs, true);
        }
        if !self.unsaved.is_empty() {
            self.plan_save(myself);
        }
        if let Some(next) = next {
            self.plan_tick(myself, next);
        }
    }

    fn idle_timeout(&self) -> Duration {
        Duration::from_micros(self.deps.idle_timeout.0 as u64)
    }

    fn plan_idle(&mut self, myself: &ActorRef<WorkspaceMsg>, wait: Duration) {
        let due = Instant::now() + wait;
        if self.idle_due.is_none_or(|planned| due < planned) {
            self.idle_due = Some(due);
            drop(myself.send_after(wait, || WorkspaceMsg::Idle));
        }
    }

    /// Event time of a stream without events goes on by processing time, but only to close a window
    /// that waits for it: an idle workspace costs nothing.
    fn on_idle(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        if self.idle_due.is_none_or(|due| due > Instant::now()) {
            return; // an earlier one came in its place
        }
        self.idle_due = None;
        let (now, timeout) = (self.deps.clock.now(), self.deps.idle_timeout);
        let mut wait: Option<Span> = None;
        for (stream, arrival) in &self.arrivals {
            let Some(close) = self.engine.next_close(stream) else { continue };
            let quiet = now.since(arrival.at);
            // what waits to be joined follows the stream that goes on
            let followed = self.engine.followed(stream).unwrap_or(Micros::MIN);
            let reached = arrival.frontier.plus(quiet).max(followed);
            if quiet >= timeout && close <= reached {
                if let Err(error) = self.tenant.advance(stream, reached) {
                    tracing::warn!(workspace = %self.tenant.id, %stream, %error, "idle stream could not advance; trying again");
                }
                wait = Some(Span::seconds(1)); // the next window, once this one is closed
            } else {
                let left = close.since(reached).max(Span(timeout.0.saturating_sub(quiet.0))).max(Span::millis(50));
                wait = Some(wait.map_or(left, |wait| wait.min(left)));
            }
        }
        if let Some(wait) = wait {
            self.plan_idle(myself, Duration::from_micros(wait.0 as u64));
        }
    }

    /// When the next window closes that waits for time alone, if any.
    fn next_wake(&self) -> Option<Micros> {
        let closes = self.arrivals.iter().filter_map(|(stream, arrival)| {
            let close = self.engine.next_close(stream)?;
            // what waits to be joined follows the stream that went on
            let stands = arrival.frontier.max(self.engine.followed(stream).unwrap_or(Micros::MIN));
            Some(arrival.at.plus(close.since(stands).max(self.deps.idle_timeout)))
        });
        closes.min()
    }

    /// What to keep of a workspace that needs no actor until something comes or the time is there.
    fn resting(&self) -> Resting {
        let arrivals = self.arrivals.iter().map(|(stream, a)| (stream.clone(), (a.at, a.frontier))).collect();
        Resting { offset: self.applied, wake: self.next_wake(), arrivals, noted: false }
    }

    /// Stops the actor when it had nothing to do for long and will have nothing for long.
    fn on_rest(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        let after = self.deps.rest_after;
        let left = after.saturating_sub(self.used.elapsed());
        let resting = self.resting();
        let soon = self.deps.clock.now().plus(Span(2 * after.as_micros() as i64));
        let settled = self.saving.is_none() && !self.dirty && self.unsaved.is_empty() && self.draining.is_none();
        let may = left.is_zero() && settled && resting.wake.is_none_or(|wake| wake > soon);
        if may && self.tenant.rest(self.applied, resting) {
            tracing::debug!(workspace = %self.tenant.id, "goes to rest");
            myself.stop(Some("nothing to do".to_owned())); // all that can be in the mailbox are timers
        } else {
            drop(myself.send_after(left.max(after / 4), || WorkspaceMsg::Rest));
        }
    }

    fn plan_save(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        let (planned, wait) = match !self.unsaved.alerts.is_empty() && self.failed_saves == 0 {
            // somebody waits to be told
            true => (&mut self.alerts_planned, self.next_alerts.saturating_duration_since(Instant::now())),
            false => {
                let wait = SAVE_EVERY * 2_u32.pow(self.failed_saves.min(4));
                (&mut self.save_planned, wait.min(SAVE_AGAIN_MOST))
            }
        };
        if self.saving.is_none() && !std::mem::replace(planned, true) {
            drop(myself.send_after(wait, || WorkspaceMsg::Save));
        }
    }

    fn on_save(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        (self.save_planned, self.alerts_planned) = (false, false);
        if self.saving.is_some() {
            return;
        }
        let Some(due) = self.commit() else {
            if !self.unsaved.is_empty() {
                self.plan_save(myself); // it waits for the state
            }
            return;
        };
        let (done, saving) = oneshot::channel();
        self.saving = Some(saving);
        let (writing, myself) = (self.write(due), myself.clone());
        tokio::spawn(async move {
            // the actor may have stopped
            if let Some(written) = writing.await
                && done.send(written).is_ok()
            {
                _ = myself.send_message(WorkspaceMsg::Saved);
            }
        });
    }

    /// Brings a commit to the store; `None`: the process ends.
    fn write(&self, Due { commit, state, alerts }: Due) -> impl Future<Output = Option<Written>> + use<> {
        let one = self.tenant.committing.clone().try_acquire_owned();
        let one = one.expect("one commit at a time, and none of the actor before this one");
        let (deps, tenant) = (self.deps.clone(), self.tenant.clone());
        let changed = self.changed_by(&commit);
        async move {
            let began = state.is_some().then(Instant::now);
            let encoded = encoded(commit, state).await;
            let encoding = began.map(|began| began.elapsed());
            let (commit, result) = match encoded {
                Ok(commit) => deps.committer.commit(commit).await?,
                Err(unencoded) => unencoded,
            };
            // before the actor lets the rows go, and also after a failure, which may be that only the answer was lost
            deps.cache.changed(&changed);
            drop(one);
            let result = match result {
                Ok(()) => {
                    tell(&deps, &tenant, alerts); // also when the actor has failed meanwhile
                    Ok(commit.offset)
                }
                Err(error) if matches!(*error, StoreError::NoWorkspace { .. }) => Ok(commit.offset), // deleted meanwhile
                Err(error) => {
                    tracing::warn!(workspace = %commit.workspace, %error, "commit failed; results wait for the next one, or are computed again at the next start");
                    let Commit { rows, dead_letters, rules, .. } = commit;
                    Err((Unsaved { rows, repeats: true, alerts, dead_letters, rules }, error))
                }
            };
            Some(Written { result, encoding })
        }
    }

    /// Commits what there is, the state with it, and waits until it is in the store.
    async fn save_now(&mut self, myself: &ActorRef<WorkspaceMsg>) -> Result<(), Fault> {
        (self.dirty, self.next_state, self.next_alerts) = (true, Instant::now(), Instant::now());
        let Some(due) = self.commit() else { return Ok(()) };
        let Some(written) = self.write(due).await else { return Err(ending()) };
        let result = written.result.as_ref().map(|_| ()).map_err(|(_, error)| Fault::from(&**error));
        self.on_saved(myself, written);
        result
    }

    /// Waits for the commit under way.
    async fn saved(&mut self, myself: &ActorRef<WorkspaceMsg>) -> Result<(), Fault> {
        if let Some(saving) = &mut self.saving {
            let written = saving.await.map_err(|_| ending())?;
            self.on_saved(myself, written);
        }
        Ok(())
    }

    /// What is to be committed now. The state only when it is due.
    ///
    /// Final rows that a replay repeats are known by what they are; alerts and dead letters come with the state that
    /// has them behind it, so that no replay repeats them.
    fn commit(&mut self) -> Option<Due> {
        let began = Instant::now();
        let mut offset = self.tenant.counters.saved.load(Relaxed);
        let mut state = None;
        let alone = self.unsaved.alerts.is_empty() && self.unsaved.dead_letters.is_empty();
        let due = if alone { self.next_state } else { self.next_alerts };
        let rows_only = self.dirty && began < due;
        if self.dirty && began >= due {
            match self.engine.save() {
                Ok(taken) => {
                    self.tenant.counters.state_bytes.store(self.engine.bytes() as u64, Relaxed);
                    (state, offset, self.dirty) = (Some(taken), self.applied, false);
                }
                Err(error) => tracing::error!(workspace = %self.tenant.id, %error, "the state cannot be saved"),
            }
            self.state_took = began.elapsed();
            self.plan_next_state();
        }
        let (rows, repeats) = (std::mem::take(&mut self.unsaved.rows), std::mem::take(&mut self.unsaved.repeats));
        let Unsaved { alerts, dead_letters, rules, .. } =
            if rows_only { Unsaved::default() } else { std::mem::take(&mut self.unsaved) };
        if state.is_none() && rows.is_empty() && alerts.is_empty() && dead_letters.is_empty() && rules.is_empty() {
            return None;
        }
        self.in_store = rows.as_slice().into();
        let stored = alerts.iter().map(|(_, alert)| alert.clone()).collect();
        let loud = alerts.iter().filter(|(_, alert)| !self.tenant.is_silenced(alert));
        let notices = loud.filter_map(|(phase, alert)| notice(*phase, alert)).collect();
        let workspace = self.tenant.id.clone();
        let commit =
            Commit { workspace, offset, state: None, rows, repeats, alerts: stored, notices, dead_letters, rules };
        Some(Due { commit, state, alerts })
    }

    /// The more the last one took, the later the next one is.
    fn plan_next_state(&mut self) {
        let now = Instant::now();
        self.next_state = now + (self.state_took * STATE_SHARE).min(REPLAY_MOST);
        self.next_alerts = now + (self.state_took * ALERTS_SHARE).min(REPLAY_MOST);
    }

    /// What of the cached history is not as it was once this is in the store.
    fn changed_by(&self, commit: &Commit) -> Vec<Tag> {
        let width = |metric: &ItemName| self.metrics.get(metric).map(|defined| Width::of(defined.program.window()));
        blocks::changed_by(&self.tenant.id, &commit.rows, width)
    }

    fn on_saved(&mut self, myself: &ActorRef<WorkspaceMsg>, Written { result, encoding }: Written) {
        self.saving = None;
        if let Some(encoding) = encoding {
            self.state_took += encoding;
            self.plan_next_state();
            if result.is_err() {
                self.engine.forget_saved(); // it may be there or not
            }
        }
        self.in_store = Arc::new([]);
        match result {
            Ok(offset) => {
                self.tenant.counters.saved.fetch_max(offset, Relaxed);
                (self.failed_saves, self.overfull) = (0, false);
                self.withheld.clear();
                if let Some(retained) = self.expired() {
                    tokio::spawn(retained);
                }
            }
            Err((unsaved, error)) => {
                if matches!(*error, StoreError::Older { .. } | StoreError::Stale { .. }) {
                    self.outrun = Some(error);
                }
                self.unsaved.put_back(unsaved);
                self.dirty = true;
                self.failed_saves += 1;
                let (waiting, most) = (self.unsaved.bytes(), self.deps.unsaved_bytes);
                if waiting > most && !std::mem::replace(&mut self.overfull, true) {
                    tracing::warn!(workspace = %self.tenant.id, waiting, "results that wait for the store exceed limits.unsaved_bytes = {most}; once the mailbox is full, ingest is refused");
                }
            }
        }
        if self.dirty || !self.unsaved.is_empty() {
            self.plan_save(myself);
        }
    }

    /// Deletes rows that are older than their metric, or the tier of the workspace, keeps them.
    fn expired(&self) -> Option<impl Future<Output = ()> + use<>> {
        let is_bounded = self.deps.retention.is_bounded();
        let reached: Vec<(ItemName, Window, Micros, Option<Span>)> = self
            .metrics
            .iter()
            .filter(|(_, metric)| is_bounded || metric.definition.retain.is_some())
            .filter_map(|(name, metric)| {
                let reached = self.engine.reached(name)?;
                Some((name.clone(), metric.program.window(), reached, metric.definition.retain))
            })
            .collect();
        if reached.is_empty() {
            return None;
        }
        let (deps, tenant) = (self.deps.clone(), self.tenant.clone());
        Some(async move {
            let workspace = &tenant.id;
            let keeps = match deps.keeps(workspace).await {
                Ok(keeps) => keeps,
                Err(error) => return tracing::warn!(%workspace, %error, "old rows stay; trying again later"),
            };
            for (metric, window, reached, retain) in reached {
                // by days: once an hour is often enough
                let by_tier =
                    keeps.map(|keeps| reached.minus(keeps)).map(|until| until.minus(Span(until.0.rem_euclid(HOUR))));
                let is_new = |until: &Micros| retain.is_some() || tenant.pruned.lock().get(&metric) != Some(until);
                let Some(until) = retain.map(|retain| reached.minus(retain)).max(by_tier).filter(is_new) else {
                    continue;
                };
                match deps.store.prune_rows(workspace, &metric, until).await {
                    Ok(count) => {
                        let before = tenant.pruned.lock().insert(metric.clone(), until);
                        if count > 0 {
                            blocks::pruned(&deps.cache, workspace, &metric, window, before, until);
                            deps.cache.changed(&[query::of_definitions(workspace)]);
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%workspace, %metric, %error, "old rows could not be deleted; trying again later");
                    }
                }
            }
        })
    }

    async fn drain(&mut self) {
        (self.next_state, self.next_alerts) = (Instant::now(), Instant::now());
        if let Some(due) = self.commit() {
            let Some(Written { result: Ok(offset), .. }) = self.write(due).await else { return };
            self.tenant.counters.saved.fetch_max(offset, Relaxed);
        }
        *self.tenant.resting.lock() = Some(self.resting());
    }

    async fn define(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        name: ItemName,
        definition: MetricDefinition,
        program: Arc<Program>,
    ) -> Result<(), Fault> {
        let now = self.deps.clock.now();
        let stored = serde_json::to_value(&definition).map_err(Fault::internal)?;
        let (workspace, store) = (self.tenant.id.clone(), self.deps.store.clone());
        // the same again changes nothing, but for a metric that stopped: it begins anew, behind the rows it has given
        let known = self.metrics.get(&name).map(|known| &known.definition);
        let known = known.or(self.unplanned.get(&name).map(|(known, _)| known));
        let (is_known, is_again) = (known.is_some(), known == Some(&definition));
        if is_again && self.metrics.contains_key(&name) && self.engine.failure(&name).is_none() {
            return Ok(());
        }
        self.check_chain(&name, &definition, &program)?;
        if !is_again {
            self.check_unread(&name, "define this one under another name, or delete them first")?;
        }
        let since = match (&definition.backfill, program.stream().metric()) {
            (Some(_), None) => self.deps.log.head().0.max(self.tenant.first),
            _ => self.applied, // rows of another metric are not read from the log
        };
        // before anything changes: a metric whose past cannot be computed is not defined, and one of before stays
        let past = self.past(&name, &definition, &program, since).await;
        let past = past.map_err(|error| self.not_backfilled(&name, error))?;
        let row = match is_known && !is_again {
            true => {
                self.saved(myself).await?;
                let row = store.redefine_metric(&workspace, &name, &stored, since, now).await?;
                self.forget_rows(&name);
                row
            }
            false => store.put_metric(&workspace, &name, &stored, since, now).await?,
        };
        let defined = self.defined(definition, program, row.version, since);
        self.begin(name.clone(), defined).map_err(Fault::internal)?;
        self.unplanned.remove(&name);
        if let Some(past) = past {
            self.take_in(&name, past);
        }
        self.start_rules(&name, self.applied);
        self.settle_alerts();
        self.publish(What::MetricRemoved { metric: name.clone() });
        if let Some(metric) = self.metrics.get_mut(&name) {
            metric.changed = true;
        }
        self.dirty = true;
        self.plan_save(myself);
        self.plan_tick(myself, Instant::now());
        Ok(())
    }

    /// Why a metric is not defined. Which file of the log is damaged is for the operator and not for clients.
    fn not_backfilled(&self, name: &ItemName, error: ActorProcessingErr) -> Fault {
        let error = match error.downcast::<Fault>() {
            Ok(fault) => return *fault,
            Err(error) => error,
        };
        let Some(unread) = error.downcast_ref::<ReadError>() else { return Fault::internal(error) };
        tracing::error!(workspace = %self.tenant.id, metric = %name, error = %unread, "a metric is not defined: its backfill cannot be read from the log");
        let detail = format!(
            "metric `{name}` is not defined: a part of the log that its `backfill` asks for could not be read; the \
             server's log says which file it is and what to do; try again then, or with less or no `backfill`"
        );
        Fault::new(FaultKind::Busy { retry_after: LOG_AGAIN }, "log_unavailable", detail)
    }

    /// Whether a metric may be defined so among the others.
    fn check_chain(&self, name: &ItemName, definition: &MetricDefinition, program: &Program) -> Result<(), Fault> {
        let conflict = |code, detail| Err(Fault::new(FaultKind::Conflict, code, detail));
        if let Some(cycle) = self.engine.cycle(name, program) {
            return conflict("metric_cycle", engine::workspace::in_a_circle(&cycle));
        }
        let Some(upstream) = program.stream().metric() else { return Ok(()) };
        match self.metrics.get(&upstream) {
            Some(known) if program.fits(&known.program) => {}
            _ => {
                return conflict(
                    "metric_changed",
                    format!("metric `{upstream}` was defined anew meanwhile; try again"),
                );
            }
        }
        if definition.max_delay.is_some() || definition.allowed_lateness.is_some() {
            let detail = format!(
                "`max_delay` and `allowed_lateness` belong to the metric that reads the stream: rows of `{upstream}` come in order, and its corrections are passed on"
            );
            return Err(Fault::invalid("bad_definition", detail));
        }
        Ok(())
    }

    /// An error where other metrics read this one.
    fn check_unread(&self, name: &ItemName, instead: &str) -> Result<(), Fault> {
        let readers: Vec<String> = self.engine.readers(name).iter().map(|reader| format!("`{reader}`")).collect();
        if readers.is_empty() {
            return Ok(());
        }
        let detail = format!("metric `{name}` is read by {}; {instead}", readers.join(", "));
        Err(Fault::new(FaultKind::Conflict, "metric_in_use", detail))
    }

    async fn remove(&mut self, myself: &ActorRef<WorkspaceMsg>, name: &ItemName) -> Result<bool, Fault> {
        if let Some(rule) = self.rules.iter().find(|(_, rule)| rule.definition.metric == *name) {
            let detail = format!("alert rule `{}` reads metric `{name}`; delete the rule first", rule.0);
            return Err(Fault::new(FaultKind::Conflict, "metric_in_use", detail));
        }
        self.check_unread(name, "delete them first")?;
        self.saved(myself).await?;
        let existed = self.deps.store.delete_metric(&self.tenant.id, name).await?;
        self.engine.remove(name);
        self.metrics.remove(name);
        self.unplanned.remove(name);
        self.forget_rows(name);
        self.publish(What::MetricRemoved { metric: name.clone() });
        self.dirty = true;
        Ok(existed)
    }

    /// The store has no rows of this metric any more, and gets none of those that there are. None are on their way.
    fn forget_rows(&mut self, name: &ItemName) {
        self.unsaved.rows.retain(|row| row.metric != *name);
        blocks::forget(&self.deps.cache, &self.tenant.id, name);
    }

    async fn watch(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        name: ItemName,
        definition: RuleDefinition,
    ) -> Result<(), Fault> {
        let rule = self.rule(&name, &definition)?;
        // one that goes on with what another has seen has seen it
        let before = self.rules.get(&name).filter(|before| before.definition.metric == definition.metric);
        let since = before.map_or(self.applied, |before| before.since);
        self.change_rule(myself, name, Some((DefinedRule { definition, since }, rule))).await
    }

    async fn unwatch(&mut self, myself: &ActorRef<WorkspaceMsg>, name: ItemName) -> Result<bool, Fault> {
        let existed = self.rules.contains_key(&name);
        if existed {
            self.change_rule(myself, name, None).await?;
        }
        Ok(existed)
    }

    /// Stores a rule with the state from which on it is this one: a replay of what came before would judge that by a rule
    /// that was not there yet. What cannot be stored leaves the rule as it was.
    async fn change_rule(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        name: ItemName,
        new: Option<(DefinedRule, Rule)>,
    ) -> Result<(), Fault> {
        let at = self.deps.clock.now();
        let change = |rule: Option<&DefinedRule>| -> Result<RuleChange, Fault> {
            let stored = |rule: &DefinedRule| Ok((serde_json::to_value(&rule.definition)?, rule.since));
            let definition = rule.map(stored).transpose().map_err(|error: serde_json::Error| Fault::internal(error))?;
            Ok(RuleChange { name: name.clone(), definition, at })
        };
        let (there, back) = (change(new.as_ref().map(|(rule, _)| rule))?, change(self.rules.get(&name))?);
        self.saved(myself).await?;
        let (new, before) = match new {
            Some((defined, rule)) => (Some(defined), self.engine.watch(rule).map_err(Fault::internal)?),
            None => (None, self.engine.unwatch(&name)),
        };
        self.unsaved.rules.push(there);
        if let Err(fault) = self.save_now(myself).await {
            // nobody knows whether it is there
            if let Some(last) = self.unsaved.rules.last_mut() {
                *last = back;
            }
            self.engine.unwatch(&name);
            before.into_iter().for_each(|before| self.engine.rewatch(before));
            return Err(fault);
        }
        self.idle_rules.remove(&name);
        match new {
            Some(new) => _ = self.rules.insert(name, new),
            None => _ = self.rules.remove(&name),
        }
        self.settle_alerts();
        self.dirty = true;
        self.plan_save(myself);
        Ok(())
    }

    fn infos(&self) -> Vec<MetricInfo> {
        self.engine
            .metrics()
            .filter_map(|(name, metric)| {
                let defined = self.metrics.get(name)?;
                Some(MetricInfo {
                    name: name.clone(),
                    definition: defined.definition.clone(),
                    program: defined.program.clone(),
                    failure: self.engine.failure(name).cloned(),
                    state_bytes: metric.bytes(),
                    keys: metric.keys(),
                    panes: metric.panes(),
                    waiting: metric.waiting(),
                    cost: self.engine.cost(name).unwrap_or_default(),
                    frontier: self.engine.reached(name),
                })
            })
            .collect()
    }

    fn recent(&mut self, metric: &ItemName) -> Result<Recent, Fault> {
        let program = match (self.metrics.get(metric), self.unplanned.get(metric)) {
            (Some(defined), _) => Ok(defined.program.clone()),
            (None, Some((_, reason))) => Err(Fault::invalid("metric_failed", cannot_be_planned(metric, reason))),
            (None, None) => {
                return Err(Fault::not_found("unknown_metric", format!("there is no metric `{metric}`")));
            }
        };
        let live = self.engine.live(metric).map_err(|error| Fault::invalid("metric_failed", error.to_string()))?;
        let unsaved =
            self.in_store.iter().chain(&self.unsaved.rows).filter(|row| row.metric == *metric).cloned().collect();
        let frontier = self.engine.reached(metric);
        Ok(Recent { program, frontier, unsaved, live, failure: self.engine.failure(metric).cloned() })
    }

    /// Values a portfolio by its positions in the store, and tells `ref.positions` of them. What fails is tried again.
    async fn hold(&mut self, myself: &ActorRef<WorkspaceMsg>, id: ItemName) -> Result<(), Fault> {
        let held = match self.value(myself, &id).await {
            Ok(positions) => self.write_positions(&id, &positions).await,
            Err(fault) => Err(fault),
        };
        match &held {
            Ok(()) => {
                if let Some(unheld) = self.unheld.get_mut(&id) {
                    unheld.fault = None;
                }
            }
            Err(fault) => {
                tracing::error!(workspace = %self.tenant.id, portfolio = %id, %fault, "a portfolio is not valued by its positions; trying again");
                self.unheld.entry(id.clone()).or_default().fault = Some(fault.clone());
                self.hold_again(myself, id);
            }
        }
        held
    }

    /// Plans to value a portfolio that failed, later with each failure.
    fn hold_again(&mut self, myself: &ActorRef<WorkspaceMsg>, id: ItemName) {
        let wait = self.unheld.entry(id.clone()).or_default().failures.backoff();
        drop(myself.send_after(wait, || WorkspaceMsg::HoldAgain(id)));
    }

    /// Values a portfolio from now on by the positions that the store has of it, which are returned.
    async fn value(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        id: &ItemName,
    ) -> Result<Vec<engine::portfolio::Position>, Fault> {
        let (workspace, store) = (&self.tenant.id, &self.deps.store);
        let Some(portfolio) = store.portfolio(workspace, id.as_str()).await? else {
            if let Some(held) = self.portfolios.remove(id) {
                held.actor.stop(Some("deleted".to_owned()));
                self.publish(What::PortfolioRemoved { id: id.clone() });
            }
            self.unheld.remove(id);
            return Ok(Vec::new());
        };
        let positions: Vec<engine::portfolio::Position> = store
            .positions(workspace, id.as_str())
            .await?
            .into_iter()
            .map(|p| engine::portfolio::Position { symbol: p.symbol, qty: p.qty, cost: p.cost, sector: p.sector })
            .collect();
        let symbols: HashSet<String> = positions.iter().map(|position| position.symbol.clone()).collect();
        let prices = self.prices(&symbols);
        if let Some(held) = self.portfolios.get_mut(id) {
            held.symbols = symbols;
            let portfolio = &held.actor;
            let held = PortfolioMsg::Hold { positions: positions.clone(), prices };
            return portfolio.send_message(held).map(|()| positions).map_err(Fault::internal);
        }
        let start = portfolio::Start {
            workspace: workspace.clone(),
            id: id.clone(),
            name: portfolio.name,
            currency: portfolio.currency,
            positions: positions.clone(),
            prices,
            outlet: self.deps.outlet.clone(),
        };
        let (actor, _) =
            Actor::spawn_linked(None, PortfolioActor, start, myself.get_cell()).await.map_err(Fault::internal)?;
        self.portfolios.insert(id.clone(), Held { actor, symbols });
        Ok(positions)
    }

    fn prices(&self, symbols: &HashSet<String>) -> Vec<(String, Price)> {
        symbols.iter().filter_map(|symbol| Some((symbol.clone(), self.engine.prices().get(symbol)?))).collect()
    }

    fn mark_portfolios(&self) {
        for held in self.portfolios.values() {
            let prices = self.prices(&held.symbols);
            if !prices.is_empty() {
                _ = held.actor.send_message(PortfolioMsg::Mark(prices)); // a stopped one is being restarted
            }
        }
    }

    fn summary(&self, id: &ItemName, reply: Reply<Arc<PortfolioSummary>>) {
        let Some(held) = self.portfolios.get(id) else {
            let unheld = self.unheld.get(id).and_then(|unheld| unheld.fault.clone());
            let unknown = || Fault::not_found("unknown_portfolio", format!("there is no portfolio `{id}`"));
            _ = reply.send(Err(unheld.unwrap_or_else(unknown)));
            return;
        };
        let actor = held.actor.clone();
        tokio::spawn(async move {
            let answer = ractor::call_t!(actor, PortfolioMsg::Summary, 5_000).map_err(Fault::internal);
            _ = reply.send(answer);
        });
    }

    fn portfolio_failed(&mut self, myself: &ActorRef<WorkspaceMsg>, cell: &ActorCell, error: &ActorProcessingErr) {
        let failed = self.portfolios.iter().find(|(_, held)| held.actor.get_id() == cell.get_id());
        let Some(id) = failed.map(|(id, _)| id.clone()) else { return };
        tracing::error!(workspace = %self.tenant.id, portfolio = %id, %error, "a portfolio failed; starting it again");
        self.tenant.counters.restarts.fetch_add(1, Relaxed);
        *self.tenant.counters.last_failure.lock() = Some(format!("portfolio {id}: {error}"));
        self.portfolios.remove(&id);
        let fault = Fault::new(
            FaultKind::Busy { retry_after: SOON },
            "busy",
            format!("portfolio `{id}` failed and is being started again"),
        );
        self.unheld.entry(id.clone()).or_default().fault = Some(fault);
        self.hold_again(myself, id);
    }
}

#[cfg_attr(not(test), expect(unused_variables, reason = "only a test makes one of them fail"))]
fn compute_batch(workspace: &WorkspaceId, engine: &mut Workspace, stream: &StreamName, batch: &RecordBatch) -> Outputs {
    #[cfg(test)]
    crate::fault_point::step(workspace, batch);
    engine.step(stream, batch)
}

/// When a letter came, apart from others that came with it: letters equal in everything are one.
fn one_of_many(at: Micros, place: usize) -> Micros {
    Micros(at.0.saturating_add(place as i64))
}

fn cannot_be_planned(metric: &ItemName, reason: &str) -> String {
    format!("metric `{metric}` can no longer be planned and stays stopped; define it anew: {reason}")
}

fn ending() -> Fault {
    Fault::internal("the process ends")
}

/// Tells of alerts that are in the store, but for those that are silenced.
fn tell(deps: &Deps, tenant: &Tenant, alerts: Vec<(AlertPhase, Alert)>) {
    if !alerts.is_empty() {
        deps.notifier.wake();
    }
    for (phase, alert) in alerts {
        if !tenant.is_silenced(&alert) {
            deps.outlet.publish(Update { workspace: tenant.id.clone(), what: What::Alert { phase, alert } });
        }
    }
}

/// The key of the row that made a rule change its mind.
fn labels(change: &Change) -> Value {
    let labels: Map<String, Value> = change.labels.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
    Value::Object(labels)
}

/// What a panic says.
fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".to_owned())
}

pub(crate) fn timing(definition: &MetricDefinition) -> Timing {
    Timing {
        max_delay: definition.max_delay.unwrap_or(MAX_DELAY),
        allowed_lateness: definition.allowed_lateness.unwrap_or(Span::ZERO),
    }
}

/// An engine with these reference tables, without rows.
fn engine_with(deps: &Deps, tables: &[Arc<TableSchema>]) -> Result<Workspace, ActorProcessingErr> {
    let mut engine = deps.empty_engine();
    for table in tables {
        engine.define_table(table.clone())?;
    }
    Ok(engine)
}
