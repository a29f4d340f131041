//! A workspace's actor: feeds the engine in the order of the log, pushes what comes of it, and commits it.
//!
//! The engine's state, the rows and the offset they stand for are committed together; a restart loads
//! them and replays the log from that offset, and rows it repeats are no-ops in the store.

use crate::definition::{EMIT, MAX_DELAY, MetricDefinition, RuleDefinition, SEVERITY};
use crate::fault::{Fault, FaultKind};
use crate::outlet::{AlertPhase, PortfolioSummary, Update, What};
use crate::portfolio::{self, PortfolioActor, PortfolioMsg};
use crate::rows;
use crate::system::Deps;
use crate::tenant::Tenant;
use arrow::array::RecordBatch;
use engine::alert::{Change, Phase, Rule};
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::{Rows, Timing};
use engine::portfolio::Price;
use engine::program::Program;
use engine::workspace::{IDLE_TIMEOUT, Outputs, Saved, Workspace};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent, async_trait};
use serde_json::{Map, Value, json};
use sql::store::{Alert, Commit, DeadLetter, FinalRow, RowQuery, StoreError};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use streams::log::{Body, Filter, Offset, ReadError, Record, Scan};
use tokio::sync::OwnedSemaphorePermit;
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
    DeadLetters(Vec<DeadLetter>),
    /// Provisional rows are due.
    Tick,
    /// Time to look for streams that idle.
    Idle,
    /// Time to commit.
    Save,
    Saved(Result<u64, Unsaved>),
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
    Streams(RpcReplyPort<BTreeMap<StreamName, engine::workspace::StreamTime>>),
    Rows {
        metric: ItemName,
        reply: Reply<Recent>,
    },
    /// A portfolio or its positions changed in the store.
    Hold {
        id: ItemName,
        reply: Reply<()>,
    },
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
    pub failure: Option<String>,
    pub state_bytes: usize,
    pub keys: usize,
    pub panes: usize,
    /// Greatest event time of the stream that its rows come from.
    pub frontier: Option<Micros>,
}

/// A metric's rows that the store may not have yet.
pub(crate) struct Recent {
    pub(crate) program: Arc<Program>,
    pub(crate) frontier: Option<Micros>,
    pub(crate) unsaved: Vec<FinalRow>,
    pub(crate) live: Vec<Rows>,
}

/// Results on their way to the store.
#[derive(Default)]
pub(crate) struct Unsaved {
    rows: Vec<FinalRow>,
    alerts: Vec<Alert>,
    dead_letters: Vec<DeadLetter>,
}

impl Unsaved {
    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.alerts.is_empty() && self.dead_letters.is_empty()
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
        *self = earlier;
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

struct Held {
    actor: ActorRef<PortfolioMsg>,
    symbols: HashSet<String>,
}

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
    rules: BTreeMap<ItemName, RuleDefinition>,
    portfolios: BTreeMap<ItemName, Held>,
    firing: HashMap<String, Alert>,
    arrivals: BTreeMap<StreamName, Arrival>,
    unsaved: Unsaved,
    in_store: Arc<[FinalRow]>, // rows of the commit under way
    dirty: bool,               // the state differs from the stored one
    saving: bool,
    save_planned: bool,
    tick_planned: bool,
    idle_planned: bool,
    next_state: Instant, // the whole state is not written more often than pays
    failed_saves: u32,   // in a row
    overfull: bool,      // more waits for the store than `limits.unsaved_bytes`
    withheld: Vec<OwnedSemaphorePermit>,
    draining: Option<RpcReplyPort<()>>,
}

/// How often results are committed.
const SAVE_EVERY: Duration = Duration::from_millis(500);

/// How long a commit that failed waits at most before it is tried again.
const SAVE_AGAIN_MOST: Duration = Duration::from_secs(5);

/// Writing the state may take this share of the time, and is spread accordingly.
const STATE_SHARE: u32 = 20;

/// Final rows in the order of windows, and the time after which the first of their windows ends.
type History = (Micros, Vec<Rows>);

/// The most rows of another metric that one definition reads at once.
const BACKFILL_ROWS: usize = 1_000_000;

/// Rejected events held for the next commit; the ones over it are only counted.
const DEAD_LETTERS_HELD: usize = 1_000;

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
        tenant.set_actor(Some(myself));
        Ok(State {
            tenant,
            deps,
            engine: Workspace::default(),
            applied: 0,
            metrics: BTreeMap::new(),
            rules: BTreeMap::new(),
            portfolios: BTreeMap::new(),
            firing: HashMap::new(),
            arrivals: BTreeMap::new(),
            unsaved: Unsaved::default(),
            in_store: Arc::new([]),
            dirty: false,
            saving: false,
            save_planned: false,
            tick_planned: false,
            idle_planned: false,
            next_state: Instant::now(),
            failed_saves: 0,
            overfull: false,
            withheld: Vec::new(),
            draining: None,
        })
    }

    // restoring here and not in `pre_start` leaves the supervisor free meanwhile
    async fn post_start(&self, myself: ActorRef<WorkspaceMsg>, state: &mut State) -> Result<(), ActorProcessingErr> {
        state.restore(&myself).await?;
        state.tenant.ready.send_replace(true);
        Ok(())
    }

    async fn handle(
        &self,
        myself: ActorRef<WorkspaceMsg>,
        message: WorkspaceMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkspaceMsg::Events { offset, stream, batch, permit } => {
                state.tenant.counters.queued_batches.fetch_sub(1, Relaxed);
                if offset >= state.applied {
                    state.on_events(&myself, offset, &stream, &batch);
                }
                match state.overfull {
                    true => state.withheld.push(permit), // until the store takes what waits for it
                    false => drop(permit),               // the mailbox has room again only now
                }
            }
            WorkspaceMsg::Advance { offset, stream, frontier } if offset >= state.applied => {
                let outputs = state.engine.idle(&stream, frontier);
                state.applied = offset + 1;
                state.after(&myself, &stream, outputs, None);
            }
            WorkspaceMsg::Advance { .. } => {}
            WorkspaceMsg::DeadLetters(letters) => {
                let room = DEAD_LETTERS_HELD.saturating_sub(state.unsaved.dead_letters.len());
                state.unsaved.dead_letters.extend(letters.into_iter().take(room));
                state.plan_save(&myself);
            }
            WorkspaceMsg::Tick => state.on_tick(&myself),
            WorkspaceMsg::Idle => state.on_idle(&myself),
            WorkspaceMsg::Save => state.on_save(&myself),
            WorkspaceMsg::Saved(result) => state.on_saved(&myself, result),
            WorkspaceMsg::Define { name, definition, program, reply } => {
                _ = reply.send(state.define(&myself, name, definition, program).await); // the caller may have left
            }
            WorkspaceMsg::Remove { name, reply } => _ = reply.send(state.remove(&name).await),
            WorkspaceMsg::Watch { name, definition, reply } => _ = reply.send(state.watch(name, definition).await),
            WorkspaceMsg::Unwatch { name, reply } => _ = reply.send(state.unwatch(&name).await),
            WorkspaceMsg::Metrics(reply) => _ = reply.send(state.infos()),
            WorkspaceMsg::Streams(reply) => {
                _ = reply.send(state.engine.streams().map(|(name, time)| (name.clone(), time)).collect());
            }
            WorkspaceMsg::Rows { metric, reply } => _ = reply.send(state.recent(&metric)),
            WorkspaceMsg::Hold { id, reply } => _ = reply.send(state.hold(&myself, id).await),
            WorkspaceMsg::Summary { id, reply } => state.summary(&id, reply),
            WorkspaceMsg::Drain(reply) => state.draining = Some(reply),
        }
        // a commit under way may fail and give its results back: the last one waits for it
        if !state.saving
            && let Some(reply) = state.draining.take()
        {
            state.drain().await;
            _ = reply.send(());
            state.tenant.set_actor(None);
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
            state.portfolio_failed(&myself, &cell, &error).await;
        }
        Ok(())
    }
}

impl State {
    async fn restore(&mut self, myself: &ActorRef<WorkspaceMsg>) -> Result<(), ActorProcessingErr> {
        let (id, store) = (self.tenant.id.clone(), self.deps.store.clone());
        let checkpoint = store.checkpoint(&id).await?;
        self.applied = checkpoint.as_ref().map_or(0, |c| c.offset).max(self.tenant.first).max(self.deps.log.head().0);
        // a commit without the state stands for this offset until the state is saved again
        self.tenant.counters.saved.store(self.applied, Relaxed);
        let mut later = Vec::new();
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
                for (row, error) in &failed {
                    tracing::error!(workspace = %id, metric = %row.name, %error, "stored metric can no longer be planned; it stays stopped");
                }
                break;
            }
            rows = failed.into_iter().map(|(row, _)| row).collect();
        }
        for row in store.alert_rules(&id).await? {
            self.rules.insert(row.name, serde_json::from_value(row.definition)?);
        }
        let known: Vec<ItemName> = self.metrics.keys().cloned().collect();
        known.iter().for_each(|metric| self.start_rules(metric));
        let (open, _) = store.alerts(&id, Some("firing"), 10_000, None).await?;
        self.firing = open.into_iter().map(|alert| (alert.id.clone(), alert)).collect();
        let fresh = match checkpoint.and_then(|c| c.state) {
            Some(bytes) => match Saved::read(&bytes).and_then(|saved| self.engine.restore(saved)) {
                Ok(fresh) => fresh,
                Err(error) => {
                    tracing::warn!(workspace = %id, %error, "saved state cannot be used; computing it again from the log");
                    known
                }
            },
            None => known,
        };
        for name in self.engine.in_order(fresh) {
            self.catch_up(&name).await?;
        }
        self.replay(later).await?;
        let now = self.deps.clock.now();
        let stood = self.engine.streams().filter_map(|(name, time)| Some((name.clone(), time.frontier?)));
        self.arrivals = stood.map(|(name, frontier)| (name, Arrival { at: now, frontier })).collect();
        for portfolio in store.portfolios(&id).await? {
            if let Ok(name) = portfolio.id.parse() {
                self.hold(myself, name).await?;
            }
        }
        self.plan_idle(myself, Duration::from_micros(IDLE_TIMEOUT.0 as u64));
        if self.dirty || !self.unsaved.is_empty() {
            self.plan_save(myself);
        }
        Ok(())
    }

    /// Applies what the log holds behind the checkpoint. Nothing is pushed: clients that resume ask for a snapshot.
    async fn replay(&mut self, mut later: Vec<(ItemName, Defined)>) -> Result<(), ActorProcessingErr> {
        later.reverse(); // of one offset the first one planned, which others may read, is taken first
        later.sort_by_key(|(_, defined)| std::cmp::Reverse(defined.since));
        let mut records = self.scan(self.applied);
        let mut count = 0u64;
        while let Some(record) = records.recv().await {
            let (offset, record) = record?;
            while later.last().is_some_and(|(_, defined)| defined.since <= offset.0) {
                if let Some((name, defined)) = later.pop() {
                    self.begin_late(name, defined).await?;
                }
            }
            let outputs = match record.body {
                Body::Events { stream, batch } => {
                    let outputs = self.engine.step(&stream, &batch);
                    self.late(&stream, &batch, &outputs);
                    outputs
                }
                Body::Advance { stream, frontier } => self.engine.idle(&stream, frontier),
            };
            self.keep(outputs, false);
            self.applied = offset.0 + 1;
            count += 1;
            if count.is_multiple_of(64) {
                tokio::task::yield_now().await;
            }
        }
        for (name, defined) in later.into_iter().rev() {
            self.begin_late(name, defined).await?;
        }
        if count > 0 {
            self.dirty = true;
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
    async fn begin_late(&mut self, name: ItemName, defined: Defined) -> Result<(), ActorProcessingErr> {
        self.begin(name.clone(), defined)?;
        if self.metrics[&name].program.stream().metric().is_some() {
            self.catch_up(&name).await?;
        }
        self.start_rules(&name);
        Ok(())
    }

    /// Computes what a metric without state has missed: from the log, or from the final rows of the metric it reads.
    async fn catch_up(&mut self, name: &ItemName) -> Result<(), ActorProcessingErr> {
        let defined = &self.metrics[name];
        let has_missed = defined.since < self.applied;
        match defined.program.stream().metric() {
            None if has_missed => self.compute(name, defined.since).await,
            Some(upstream) if has_missed || defined.definition.backfill.is_some() => {
                let span = defined.definition.backfill;
                let history = self.history(&upstream, span).await.map_err(|fault| fault.to_string())?;
                self.take_history(name, &history);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn take_history(&mut self, name: &ItemName, (since, rows): &History) {
        let outputs = self.engine.backfill(name, *since, rows);
        self.keep(outputs, false);
        self.dirty = true;
    }

    /// Final rows that a metric has had in the last `span`, or in all its time.
    async fn history(&mut self, upstream: &ItemName, span: Option<Span>) -> Result<History, Fault> {
        let Some(closed) = self.engine.closed(upstream) else { return Ok((Micros::MIN, Vec::new())) };
        let from = span.map_or(Micros::MIN, |span| closed.minus(span));
        let mut rows = BTreeMap::new();
        let mut keep = |row: FinalRow| {
            let place = (row.window_end, row.window_start, row.key.clone());
            if row.window_end > from
                && row.window_end <= closed
                && rows.get(&place).is_none_or(|known: &FinalRow| known.revision < row.revision)
            {
                rows.insert(place, row);
            }
        };
        let window = self.metrics[upstream].program.window().size();
        let mut page = RowQuery { from: Some(from.minus(window)), limit: 10_000, ..RowQuery::default() };
        loop {
            let (found, next) = self.deps.store.rows(&self.tenant.id, upstream, &page).await?;
            found.into_iter().for_each(&mut keep);
            page.after = next;
            if page.after.is_none() {
                break;
            }
        }
        let unsaved = self.in_store.iter().chain(&self.unsaved.rows).filter(|row| row.metric == *upstream);
        unsaved.cloned().for_each(&mut keep);
        let rows: Vec<FinalRow> = rows.into_values().take(BACKFILL_ROWS + 1).collect();
        if rows.len() > BACKFILL_ROWS {
            let detail =
                format!("`{upstream}` has more than {BACKFILL_ROWS} rows in that time; ask for a shorter `backfill`");
            return Err(Fault::invalid("backfill_too_long", detail));
        }
        let mut batches = Vec::new();
        for rows in rows.chunks(10_000) {
            let program = &self.metrics[upstream].program;
            batches.push(rows::from_store_columns(program, rows).map_err(Fault::internal)?);
        }
        Ok((from, batches))
    }

    fn start_rules(&mut self, metric: &ItemName) {
        let rules: Vec<(ItemName, RuleDefinition)> =
            self.rules.iter().filter(|(_, r)| r.metric == *metric).map(|(n, r)| (n.clone(), r.clone())).collect();
        for (name, rule) in rules {
            if let Err(fault) = self.start_rule(&name, &rule) {
                tracing::error!(workspace = %self.tenant.id, rule = %name, %fault, "stored alert rule cannot run; it stays stopped");
            }
        }
    }

    fn start_rule(&mut self, name: &ItemName, definition: &RuleDefinition) -> Result<(), Fault> {
        let Some(metric) = self.metrics.get(&definition.metric) else {
            let detail = format!("there is no metric `{}`; define it first", definition.metric);
            return Err(Fault::not_found("unknown_metric", detail));
        };
        let rule = Rule {
            name: name.clone(),
            metric: definition.metric.clone(),
            condition: sql::plan::condition(&definition.condition, &metric.program)?,
            hold: definition.hold.unwrap_or(Span::ZERO),
            severity: definition.severity.clone().unwrap_or_else(|| SEVERITY.to_owned()),
        };
        self.engine.watch(rule).map_err(Fault::internal)
    }

    fn on_events(&mut self, myself: &ActorRef<WorkspaceMsg>, offset: u64, stream: &StreamName, batch: &RecordBatch) {
        let outputs = self.engine.step(stream, batch);
        self.applied = offset + 1;
        if let Some(frontier) = self.engine.frontier(stream) {
            self.arrivals.insert(stream.clone(), Arrival { at: self.deps.clock.now(), frontier });
        }
        self.after(myself, stream, outputs, Some(batch));
        self.plan_idle(myself, Duration::from_micros(IDLE_TIMEOUT.0 as u64));
    }

    fn after(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        stream: &StreamName,
        outputs: Outputs,
        batch: Option<&RecordBatch>,
    ) {
        if let Some(batch) = batch {
            self.late(stream, batch, &outputs);
        }
        let prices_changed = outputs.prices_changed;
        self.keep(outputs, true);
        self.dirty = true;
        self.plan_save(myself);
        if prices_changed {
            self.mark_portfolios();
        }
        let mut next: Option<Instant> = None;
        for (_, metric) in self.metrics.iter_mut().filter(|(name, _)| self.engine.root(name) == Some(stream)) {
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
            self.on_alert(&change, push);
        }
        for failure in outputs.failures {
            tracing::warn!(workspace = %self.tenant.id, metric = %failure.metric, reason = failure.reason, "metric stopped");
            if push {
                self.publish(What::MetricFailed { metric: failure.metric, reason: failure.reason });
            }
        }
    }

    fn on_alert(&mut self, change: &Change, push: bool) {
        let labels: Map<String, Value> = change.labels.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        let labels = Value::Object(labels);
        // the same episode has the same id in every replay
        let cause = format!("{}\n{}\n{labels}\n{}", self.tenant.id, change.rule, change.since.0);
        let id = Uuid::new_v5(&Uuid::NAMESPACE_OID, cause.as_bytes()).to_string();
        let now = self.deps.clock.now();
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
                    fired_at: now,
                    resolved_at: None,
                    acked_at: None,
                    acked_by: None,
                };
                if self.firing.contains_key(&id) {
                    return; // fired before the restart, and told then
                }
                self.firing.insert(id, alert.clone());
                (alert, AlertPhase::Firing)
            }
            Phase::Resolved => {
                let Some(mut alert) = self.firing.remove(&id) else { return };
                alert.state = "resolved".to_owned();
                alert.resolved_at = Some(now);
                (alert, AlertPhase::Resolved)
            }
        };
        self.unsaved.alerts.push(alert.clone());
        if push && !self.tenant.is_silenced(&alert) {
            self.publish(What::Alert { phase, alert });
        }
    }

    /// Events too late for a metric go to the dead letters.
    fn late(&mut self, stream: &StreamName, batch: &RecordBatch, outputs: &Outputs) {
        let room = DEAD_LETTERS_HELD.saturating_sub(self.unsaved.dead_letters.len());
        let at = self.deps.clock.now();
        for late in outputs.late.iter().take(room) {
            let line = rows::json_lines(&batch.slice(late.row as usize, 1)).ok().and_then(|mut lines| lines.pop());
            self.unsaved.dead_letters.push(DeadLetter {
                stream: stream.clone(),
                at,
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
        if std::mem::replace(&mut self.tick_planned, true) {
            return;
        }
        match due.checked_duration_since(Instant::now()) {
            // behind what waits in the mailbox, so that a burst is shown once
            None => _ = myself.send_message(WorkspaceMsg::Tick),
            Some(wait) => drop(myself.send_after(wait, || WorkspaceMsg::Tick)),
        }
    }

    fn on_tick(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        self.tick_planned = false;
        let now = Instant::now();
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

    fn plan_idle(&mut self, myself: &ActorRef<WorkspaceMsg>, wait: Duration) {
        if !std::mem::replace(&mut self.idle_planned, true) {
            drop(myself.send_after(wait, || WorkspaceMsg::Idle));
        }
    }

    /// Event time of a stream without events goes on by processing time, but only to close a window
    /// that waits for it: an idle workspace costs nothing.
    fn on_idle(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        self.idle_planned = false;
        let now = self.deps.clock.now();
        let mut wait: Option<Span> = None;
        for (stream, arrival) in &self.arrivals {
            let Some(close) = self.engine.next_close(stream) else { continue };
            let quiet = now.since(arrival.at);
            let reached = arrival.frontier.plus(quiet);
            if quiet >= IDLE_TIMEOUT && close <= reached {
                if let Err(error) = self.tenant.advance(stream, reached) {
                    tracing::warn!(workspace = %self.tenant.id, %stream, %error, "idle stream could not advance; trying again");
                }
                wait = Some(Span::seconds(1)); // the next window, once this one is closed
            } else {
                let left = close.since(reached).max(Span(IDLE_TIMEOUT.0 - quiet.0)).max(Span::millis(50));
                wait = Some(wait.map_or(left, |wait| wait.min(left)));
            }
        }
        if let Some(wait) = wait {
            self.plan_idle(myself, Duration::from_micros(wait.0 as u64));
        }
    }

    fn plan_save(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        if !self.saving && !std::mem::replace(&mut self.save_planned, true) {
            let wait = (SAVE_EVERY * 2_u32.pow(self.failed_saves.min(4))).min(SAVE_AGAIN_MOST);
            drop(myself.send_after(wait, || WorkspaceMsg::Save));
        }
    }

    fn on_save(&mut self, myself: &ActorRef<WorkspaceMsg>) {
        self.save_planned = false;
        if self.saving {
            return;
        }
        let Some(commit) = self.commit() else { return };
        self.saving = true;
        let (store, myself) = (self.deps.store.clone(), myself.clone());
        tokio::spawn(async move {
            let mut commits = [commit];
            let result = store.commit(&commits).await;
            let [commit] = &mut commits;
            let result = match result {
                Ok(()) => Ok(commit.offset),
                Err(StoreError::NoWorkspace { .. }) => Ok(commit.offset), // deleted meanwhile
                Err(error) => {
                    tracing::warn!(workspace = %commit.workspace, %error, "commit failed; results wait for the next one");
                    Err(Unsaved {
                        rows: std::mem::take(&mut commit.rows),
                        alerts: std::mem::take(&mut commit.alerts),
                        dead_letters: std::mem::take(&mut commit.dead_letters),
                    })
                }
            };
            _ = myself.send_message(WorkspaceMsg::Saved(result)); // the actor may have stopped
        });
    }

    /// What is to be committed now; the whole state only when it is due.
    fn commit(&mut self) -> Option<Commit> {
        let began = Instant::now();
        let mut offset = self.tenant.counters.saved.load(Relaxed);
        let mut state = None;
        if self.dirty && began >= self.next_state {
            match self.engine.save() {
                Ok(bytes) => {
                    self.tenant.counters.state_bytes.store(bytes.len() as u64, Relaxed);
                    (state, offset, self.dirty) = (Some(bytes), self.applied, false);
                }
                Err(error) => tracing::error!(workspace = %self.tenant.id, %error, "the state cannot be saved"),
            }
            self.next_state = Instant::now() + began.elapsed() * STATE_SHARE;
        }
        if state.is_none() && self.unsaved.is_empty() {
            return None;
        }
        let Unsaved { rows, alerts, dead_letters } = std::mem::take(&mut self.unsaved);
        self.in_store = rows.as_slice().into();
        Some(Commit { workspace: self.tenant.id.clone(), offset, state, rows, alerts, dead_letters })
    }

    fn on_saved(&mut self, myself: &ActorRef<WorkspaceMsg>, result: Result<u64, Unsaved>) {
        self.saving = false;
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
            Err(unsaved) => {
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

    /// Deletes rows that are older than their metric keeps them.
    fn expired(&self) -> Option<impl Future<Output = ()> + use<>> {
        let limits: Vec<(ItemName, Micros)> = self
            .metrics
            .iter()
            .filter_map(|(name, metric)| {
                let frontier = self.engine.frontier(self.engine.root(name)?)?;
                Some((name.clone(), frontier.minus(metric.definition.retain?)))
            })
            .collect();
        if limits.is_empty() {
            return None;
        }
        let (store, workspace) = (self.deps.store.clone(), self.tenant.id.clone());
        Some(async move {
            for (metric, before) in limits {
                if let Err(error) = store.prune_rows(&workspace, &metric, before).await {
                    tracing::warn!(%workspace, %metric, %error, "old rows could not be deleted; trying again later");
                }
            }
        })
    }

    async fn drain(&mut self) {
        self.next_state = Instant::now();
        let Some(commit) = self.commit() else { return };
        let offset = commit.offset;
        match self.deps.store.commit(&[commit]).await {
            Ok(()) => _ = self.tenant.counters.saved.fetch_max(offset, Relaxed),
            Err(error) => {
                tracing::warn!(workspace = %self.tenant.id, %error, "last commit failed; the log will be replayed at start");
            }
        }
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
        if let Some(known) = self.metrics.get(&name)
            && known.definition == definition
        {
            return Ok(()); // the same again changes nothing
        }
        self.check_chain(&name, &definition, &program)?;
        let since = match (&definition.backfill, program.stream().metric()) {
            (Some(_), None) => self.deps.log.head().0.max(self.tenant.first),
            _ => self.applied, // rows of another metric are not read from the log
        };
        let history = match (definition.backfill, program.stream().metric()) {
            (Some(span), Some(upstream)) => Some(self.history(&upstream, Some(span)).await?),
            _ => None,
        };
        if self.metrics.contains_key(&name) {
            self.unsaved.rows.retain(|row| row.metric != name);
            store.prune_rows(&workspace, &name, Micros::MAX).await?;
        }
        let row = store.put_metric(&workspace, &name, &stored, since, now).await?;
        let defined = self.defined(definition, program, row.version, since);
        self.begin(name.clone(), defined).map_err(Fault::internal)?;
        match history {
            Some(history) => self.take_history(&name, &history),
            None => self.catch_up(&name).await.map_err(Fault::internal)?,
        }
        self.start_rules(&name);
        self.publish(What::MetricRemoved { metric: name.clone() });
        if let Some(metric) = self.metrics.get_mut(&name) {
            metric.changed = true;
        }
        self.dirty = true;
        self.plan_save(myself);
        self.plan_tick(myself, Instant::now());
        Ok(())
    }

    /// Whether a metric may be defined so among the others.
    fn check_chain(&self, name: &ItemName, definition: &MetricDefinition, program: &Program) -> Result<(), Fault> {
        let conflict = |code, detail| Err(Fault::new(FaultKind::Conflict, code, detail));
        if let Some(cycle) = self.engine.cycle(name, program) {
            return conflict("metric_cycle", engine::workspace::in_a_circle(&cycle));
        }
        self.check_unread(name, "define this one under another name, or delete them first")?;
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

    /// Computes one metric over the log from `since` to where the others stand.
    async fn compute(&mut self, name: &ItemName, since: u64) -> Result<(), ActorProcessingErr> {
        let defined = &self.metrics[name];
        let (program, version) = (defined.program.clone(), defined.version);
        let oldest =
            defined.definition.backfill.and_then(|span| Some(self.engine.frontier(program.stream())?.minus(span)));
        let mut alone = Workspace::default();
        alone.define(name.clone(), version, program.clone(), timing(&defined.definition))?;
        let until = self.applied;
        let mut records = self.scan(since);
        while let Some(record) = records.recv().await {
            let (offset, record) = record?;
            if offset.0 >= until {
                break;
            }
            let outputs = match record.body {
                Body::Events { stream, batch } if stream == *program.stream() => {
                    let batch = match oldest {
                        Some(oldest) => since_time(&batch, oldest)?,
                        None => batch,
                    };
                    alone.step(&stream, &batch)
                }
                Body::Advance { stream, frontier } if stream == *program.stream() => alone.idle(&stream, frontier),
                _ => continue,
            };
            self.keep(outputs, false);
        }
        self.engine.adopt(alone);
        self.dirty = true;
        Ok(())
    }

    async fn remove(&mut self, name: &ItemName) -> Result<bool, Fault> {
        if let Some(rule) = self.rules.iter().find(|(_, rule)| rule.metric == *name) {
            let detail = format!("alert rule `{}` reads metric `{name}`; delete the rule first", rule.0);
            return Err(Fault::new(FaultKind::Conflict, "metric_in_use", detail));
        }
        self.check_unread(name, "delete them first")?;
        self.engine.remove(name);
        self.metrics.remove(name);
        self.unsaved.rows.retain(|row| row.metric != *name);
        let existed = self.deps.store.delete_metric(&self.tenant.id, name).await?;
        self.publish(What::MetricRemoved { metric: name.clone() });
        self.dirty = true;
        Ok(existed)
    }

    async fn watch(&mut self, name: ItemName, definition: RuleDefinition) -> Result<(), Fault> {
        self.start_rule(&name, &definition)?;
        let stored = serde_json::to_value(&definition).map_err(Fault::internal)?;
        self.deps.store.put_alert_rule(&self.tenant.id, &name, &stored, self.deps.clock.now()).await?;
        let metric = definition.metric.clone();
        self.rules.insert(name, definition);
        if let Some(metric) = self.metrics.get_mut(&metric) {
            metric.changed = true;
        }
        Ok(())
    }

    async fn unwatch(&mut self, name: &ItemName) -> Result<bool, Fault> {
        self.engine.unwatch(name);
        self.rules.remove(name);
        Ok(self.deps.store.delete_alert_rule(&self.tenant.id, name).await?)
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
                    failure: self.engine.failure(name).map(str::to_owned),
                    state_bytes: metric.bytes(),
                    keys: metric.keys(),
                    panes: metric.panes(),
                    frontier: self.engine.root(name).and_then(|stream| self.engine.frontier(stream)),
                })
            })
            .collect()
    }

    fn recent(&mut self, metric: &ItemName) -> Result<Recent, Fault> {
        let Some(defined) = self.metrics.get(metric) else {
            return Err(Fault::not_found("unknown_metric", format!("there is no metric `{metric}`")));
        };
        let program = defined.program.clone();
        let live = self.engine.live(metric).map_err(|error| Fault::invalid("metric_failed", error.to_string()))?;
        let unsaved =
            self.in_store.iter().chain(&self.unsaved.rows).filter(|row| row.metric == *metric).cloned().collect();
        let frontier = self.engine.root(metric).and_then(|stream| self.engine.frontier(stream));
        Ok(Recent { program, frontier, unsaved, live })
    }

    async fn hold(&mut self, myself: &ActorRef<WorkspaceMsg>, id: ItemName) -> Result<(), Fault> {
        let (workspace, store) = (&self.tenant.id, &self.deps.store);
        let Some(portfolio) = store.portfolio(workspace, id.as_str()).await? else {
            if let Some(held) = self.portfolios.remove(&id) {
                held.actor.stop(Some("deleted".to_owned()));
            }
            return Ok(());
        };
        let positions: Vec<engine::portfolio::Position> = store
            .positions(workspace, id.as_str())
            .await?
            .into_iter()
            .map(|p| engine::portfolio::Position { symbol: p.symbol, qty: p.qty, cost: p.cost, sector: p.sector })
            .collect();
        let symbols: HashSet<String> = positions.iter().map(|position| position.symbol.clone()).collect();
        let prices = self.prices(&symbols);
        if let Some(held) = self.portfolios.get_mut(&id) {
            held.symbols = symbols;
            return held.actor.send_message(PortfolioMsg::Hold { positions, prices }).map_err(Fault::internal);
        }
        let start = portfolio::Start {
            workspace: workspace.clone(),
            id: id.clone(),
            name: portfolio.name,
            currency: portfolio.currency,
            positions,
            prices,
            outlet: self.deps.outlet.clone(),
        };
        let (actor, _) =
            Actor::spawn_linked(None, PortfolioActor, start, myself.get_cell()).await.map_err(Fault::internal)?;
        self.portfolios.insert(id, Held { actor, symbols });
        Ok(())
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
            let detail = format!("there is no portfolio `{id}`");
            _ = reply.send(Err(Fault::not_found("unknown_portfolio", detail)));
            return;
        };
        let actor = held.actor.clone();
        tokio::spawn(async move {
            let answer = ractor::call_t!(actor, PortfolioMsg::Summary, 5_000).map_err(Fault::internal);
            _ = reply.send(answer);
        });
    }

    async fn portfolio_failed(
        &mut self,
        myself: &ActorRef<WorkspaceMsg>,
        cell: &ActorCell,
        error: &ActorProcessingErr,
    ) {
        let failed = self.portfolios.iter().find(|(_, held)| held.actor.get_id() == cell.get_id());
        let Some(id) = failed.map(|(id, _)| id.clone()) else { return };
        tracing::error!(workspace = %self.tenant.id, portfolio = %id, %error, "portfolio actor failed; starting it again");
        self.tenant.counters.restarts.fetch_add(1, Relaxed);
        *self.tenant.counters.last_failure.lock() = Some(format!("portfolio {id}: {error}"));
        self.portfolios.remove(&id);
        if let Err(fault) = self.hold(myself, id).await {
            tracing::error!(workspace = %self.tenant.id, %fault, "portfolio could not be started again");
        }
    }
}

pub(crate) fn timing(definition: &MetricDefinition) -> Timing {
    Timing {
        max_delay: definition.max_delay.unwrap_or(MAX_DELAY),
        allowed_lateness: definition.allowed_lateness.unwrap_or(Span::ZERO),
    }
}

/// The events at `oldest` or later.
fn since_time(batch: &RecordBatch, oldest: Micros) -> Result<RecordBatch, ActorProcessingErr> {
    use arrow::array::AsArray;
    let Some(ts) = batch.column_by_name("ts") else { return Ok(batch.clone()) };
    let ts = ts.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
    let keep: arrow::array::BooleanArray = ts.iter().map(|at| Some(at.is_some_and(|at| at >= oldest.0))).collect();
    Ok(arrow::compute::filter_record_batch(batch, &keep)?)
}
