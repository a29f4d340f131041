//! What is computed of the time before now: a metric that is defined with a backfill, or everything when the state of a
//! checkpoint cannot be used.

use super::{Defined, State, Unsaved, compute_batch, engine_with, labels, reason, timing};
use crate::definition::MetricDefinition;
use crate::fault::Fault;
use crate::rows;
use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::{filter_record_batch, max};
use arrow::datatypes::TimestampMicrosecondType;
use engine::alert::{Change, Phase};
use engine::checkpoint::Saved;
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::{Rows, Timing};
use engine::program::Program;
use engine::workspace::{Outputs, Workspace};
use ractor::ActorProcessingErr;
use sql::store::{FinalRow, RowQuery, StoreError, WITHDRAWN};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use streams::log::Body;

/// What a metric takes in of the time before it was defined.
pub(super) enum Past {
    /// Final rows of the metric it reads.
    Rows(History),
    Log(Box<Computed>),
}

/// Final rows in the order of windows, and the time after which the first of their windows ends.
pub(super) type History = (Micros, Vec<Rows>);

/// What one metric makes of the log, of which nothing is kept yet.
pub(super) struct Computed {
    /// Has that metric alone.
    engine: Workspace,
    outputs: Vec<Outputs>,
    /// Events that cannot be computed: the offset and stream they came at, and what the panic said.
    poison: Vec<(u64, StreamName, RecordBatch, String)>,
}

/// The most rows of another metric that one definition reads at once.
const BACKFILL_ROWS: usize = 1_000_000;

/// Where the log begins, for metrics that are older.
struct Cut {
    from: u64,
    /// Of each of them, the windows that end later have all their events in the log.
    whole: BTreeMap<ItemName, Micros>,
    /// Of a metric with a backfill, which begins within its first window, the end of that.
    first: BTreeMap<ItemName, Micros>,
    /// How far the log is read.
    at: u64,
}

impl Cut {
    /// The first events in the log that reach a metric go up to `highest`. What was before them went up to that and the
    /// time an event may be late at most, or all of them were too late.
    fn begins(&mut self, name: &ItemName, defined: &Defined, highest: Micros) {
        let upstream = defined.program.stream().metric().and_then(|upstream| self.whole.get(&upstream).copied());
        let Timing { max_delay, allowed_lateness } = timing(&defined.definition);
        let before = upstream.unwrap_or(highest.plus(max_delay).plus(allowed_lateness));
        self.whole.insert(name.clone(), before.plus(defined.program.window().size()));
    }
}

impl State {
    /// Computes what a metric without state has missed: from the log, or from the final rows of the metric it reads.
    pub(super) async fn catch_up(&mut self, name: &ItemName) -> Result<(), ActorProcessingErr> {
        let defined = &self.metrics[name];
        let (definition, program, since) = (defined.definition.clone(), defined.program.clone(), defined.since);
        // It was defined with no state behind it, and begins behind the rows that were final then: they are known only now.
        if since >= self.applied
            && let Some(closed) = program.stream().metric().and_then(|upstream| self.engine.closed(&upstream))
        {
            self.engine.pass_over(name, closed);
        }
        if let Some(past) = self.past(name, &definition, &program, since).await? {
            self.take_in(name, past);
        }
        Ok(())
    }

    /// What a metric has missed, which need not be there yet; nothing changes by it.
    pub(super) async fn past(
        &mut self,
        name: &ItemName,
        definition: &MetricDefinition,
        program: &Arc<Program>,
        since: u64,
    ) -> Result<Option<Past>, ActorProcessingErr> {
        let has_missed = since < self.applied;
        Ok(match program.stream().metric() {
            None if has_missed => Some(Past::Log(Box::new(self.compute(name, definition, program, since).await?))),
            Some(upstream) if has_missed || definition.backfill.is_some() => {
                Some(Past::Rows(self.history(&upstream, definition.backfill).await?))
            }
            _ => None,
        })
    }

    pub(super) fn take_in(&mut self, name: &ItemName, past: Past) {
        match past {
            Past::Rows((since, rows)) => {
                let outputs = self.engine.backfill(name, since, &rows);
                self.keep(outputs, false);
            }
            Past::Log(computed) => {
                computed.outputs.into_iter().for_each(|outputs| self.keep(outputs, false));
                for (offset, stream, event, panic) in &computed.poison {
                    self.poison(*offset, stream, event, panic);
                }
                self.engine.adopt(computed.engine);
            }
        }
        self.dirty = true;
    }

    /// Final rows that a metric has had in the last `span`, or in all its time.
    async fn history(&self, upstream: &ItemName, span: Option<Span>) -> Result<History, Fault> {
        let Some(closed) = self.engine.closed(upstream) else { return Ok((Micros::MIN, Vec::new())) };
        let from = span.map_or(Micros::MIN, |span| closed.minus(span));
        let (rows, has_more) = self.final_rows(upstream, from, closed).await?;
        if has_more {
            let detail =
                format!("`{upstream}` has more than {BACKFILL_ROWS} rows in that time; ask for a shorter `backfill`");
            return Err(Fault::invalid("backfill_too_long", detail));
        }
        Ok((from, self.batches(upstream, &rows)?))
    }

    /// Final rows whose windows end behind `from` and not behind `until`, in their order: the newest [`BACKFILL_ROWS`],
    /// and whether there are more.
    async fn final_rows(
        &self,
        metric: &ItemName,
        from: Micros,
        until: Micros,
    ) -> Result<(Vec<FinalRow>, bool), StoreError> {
        let (mut rows, mut has_more) = (BTreeMap::new(), false);
        let mut keep = |row: FinalRow| {
            let place = (row.window_end, row.window_start, row.key.clone());
            if row.window_end > from
                && row.window_end <= until
                && rows.get(&place).is_none_or(|known: &FinalRow| known.revision < row.revision)
            {
                rows.insert(place, row);
            }
            if rows.len() > BACKFILL_ROWS {
                rows.pop_first();
                has_more = true;
            }
        };
        let window = self.metrics[metric].program.window().size();
        let mut page = RowQuery { from: Some(from.minus(window)), limit: 10_000, ..RowQuery::default() };
        loop {
            let (found, next) = self.deps.store.rows(&self.tenant.id, metric, &page).await?;
            let is_past = found.last().is_some_and(|row| row.window_start > until);
            found.into_iter().for_each(&mut keep);
            page.after = next;
            if page.after.is_none() || is_past {
                break;
            }
        }
        let unsaved = self.in_store.iter().chain(&self.unsaved.rows).filter(|row| row.metric == *metric);
        unsaved.cloned().for_each(&mut keep);
        Ok((rows.into_values().collect(), has_more))
    }

    fn batches(&self, metric: &ItemName, rows: &[FinalRow]) -> Result<Vec<Rows>, Fault> {
        let program = &self.metrics[metric].program;
        let batch = |rows| rows::from_store_columns(program, rows).map_err(Fault::internal);
        rows.chunks(10_000).map(batch).collect()
    }

    /// Computes everything again up to the checkpoint, whose state cannot be used.
    ///
    /// It is computed as it was, in the order of the log and each metric from where it was defined, so rows get the
    /// revisions and rules the episodes they had. Nobody is told again, and rows that are in the store stay as they are.
    /// Of what the log does not have any more, metrics that read others take the stored rows.
    pub(super) async fn compute_all(&mut self) -> Result<(), ActorProcessingErr> {
        let lost = std::mem::take(&mut self.engine);
        let mut bad = BTreeSet::new();
        loop {
            match self.compute_all_without(&lost, &bad).await? {
                Ok(records) => {
                    tracing::info!(workspace = %self.tenant.id, records, "computed the state again from the log");
                    self.dirty = true;
                    return Ok(());
                }
                Err(offset) => _ = bad.insert(offset),
            }
        }
    }

    /// The same: of how many records, or the offset of a batch that is none of `bad` and cannot be computed as it is.
    async fn compute_all_without(
        &mut self,
        lost: &Workspace,
        bad: &BTreeSet<u64>,
    ) -> Result<Result<u64, u64>, ActorProcessingErr> {
        let from = self.tenant.first.max(self.deps.log.head().0);
        self.engine = lost.with_tables_before(from)?;
        self.unsaved = Unsaved::default();
        let mut waiting = lost.in_order(self.metrics.keys().cloned().collect());
        waiting.sort_by_key(|name| self.metrics[name].since.max(from)); // of one offset in the order of the chain
        let mut cut = Cut { from, whole: BTreeMap::new(), first: BTreeMap::new(), at: from };
        let mut rules = self.rules_since(from + 1);
        let mut firing: BTreeMap<(ItemName, String), Change> = BTreeMap::new();
        let mut count = 0u64;
        let mut records = self.scan(from);
        while let Some(record) = records.recv().await {
            let (offset, record) = record?;
            if offset.0 >= self.applied {
                break;
            }
            cut.at = offset.0;
            let first = match &record.body {
                Body::Events { stream, batch } => highest(batch).map(|at| (stream, at)),
                _ => None,
            };
            for name in std::mem::take(&mut waiting) {
                let defined = &self.metrics[&name];
                let root = lost.root(&name);
                let has_begun = match (defined.since < from, first) {
                    (true, Some((stream, at))) if root == Some(stream) => {
                        cut.begins(&name, defined, at);
                        true
                    }
                    (true, _) => false,
                    (false, _) => defined.since <= offset.0,
                };
                match has_begun {
                    true => self.begin_again(&name, &mut cut).await?,
                    false => waiting.push(name),
                }
            }
            self.start_due(&mut rules, offset.0);
            let outputs = match record.body {
                Body::Events { stream, batch } if stream.is_table() => {
                    self.apply_change(&stream, &batch, offset.0);
                    Vec::new()
                }
                Body::Events { stream, batch } if bad.contains(&offset.0) => {
                    let Sifted { computed, poison } = self.sifted(&stream, &batch)?;
                    for (event, panic) in &poison {
                        self.poison(offset.0, &stream, event, panic);
                    }
                    computed.into_iter().map(|(_, outputs)| outputs).collect()
                }
                Body::Events { stream, batch } => {
                    let (id, engine) = (&self.tenant.id, &mut self.engine);
                    match catch_unwind(AssertUnwindSafe(|| compute_batch(id, engine, &stream, &batch))) {
                        Ok(outputs) => vec![outputs],
                        Err(_) => return Ok(Err(offset.0)),
                    }
                }
                Body::Advance { stream, frontier } => vec![self.engine.idle(&stream, frontier)],
                Body::Refused { .. } => Vec::new(),
            };
            for Outputs { rows, failures, alerts, .. } in outputs {
                self.keep(Outputs { rows, failures, ..Outputs::default() }, false);
                for change in alerts {
                    let episode = (change.rule.clone(), labels(&change).to_string());
                    match change.phase {
                        Phase::Firing => _ = firing.insert(episode, change),
                        Phase::Resolved => _ = firing.remove(&episode),
                    }
                }
            }
            count += 1;
            if count.is_multiple_of(64) {
                tokio::task::yield_now().await;
            }
        }
        cut.at = self.applied;
        for name in waiting {
            self.begin_again(&name, &mut cut).await?;
        }
        self.start_due(&mut rules, self.applied);
        // nothing that is still to come may count as one of the rows that were stored before
        for name in self.engine.in_order(cut.whole.keys().cloned().collect()) {
            let upstream = self.metrics[&name].program.stream().metric();
            if let Some((upstream, closed)) = upstream.and_then(|name| self.engine.closed(&name).map(|at| (name, at)))
                && cut.whole.get(&upstream).is_some_and(|until| *until > closed)
            {
                cut.whole.insert(upstream, closed);
                self.begin_again(&name, &mut cut).await?;
            }
        }
        // the store has what a part of its events would make another row of
        let is_new = |row: &FinalRow| {
            let known = cut.whole.get(&row.metric).into_iter().chain(cut.first.get(&row.metric)).max();
            known.is_none_or(|from| row.window_end > *from)
        };
        self.unsaved.rows.retain(is_new);
        // a rule that was defined anew, or before rules had an offset, may not have fired then for what it fires for now
        for change in firing.into_values() {
            let id = self.alert_id(&change, &labels(&change).to_string());
            if self.deps.store.alert(&self.tenant.id, &id).await?.is_none() {
                self.on_alert(&change);
            }
        }
        Ok(Ok(count))
    }

    /// Computes a batch without the events that cannot be computed.
    pub(super) fn sifted(&mut self, stream: &StreamName, batch: &RecordBatch) -> Result<Sifted, ActorProcessingErr> {
        let metrics = self.engine.in_order(self.engine.metrics().map(|(name, _)| name.clone()).collect());
        let rules: Vec<_> = self.rules.keys().filter(|name| self.engine.is_watched(name)).cloned().collect();
        let mut engine = std::mem::take(&mut self.engine);
        let step = |engine: &mut Workspace, part: &RecordBatch| compute_batch(&self.tenant.id, engine, stream, part);
        let sifted = sift(&mut engine, batch, step, || self.empty_engine(&metrics, &rules))?;
        self.engine = engine;
        Ok(sifted)
    }

    /// Starts a metric in its place of the log, as when it was defined.
    async fn begin_again(&mut self, name: &ItemName, cut: &mut Cut) -> Result<(), ActorProcessingErr> {
        let Defined { definition, program, version, since, .. } = &self.metrics[name];
        let (program, backfill, is_cut) = (program.clone(), definition.backfill, *since < cut.from);
        let is_kept = definition.retain.is_none() && self.deps.keeps(&self.tenant.id).await?.is_none();
        self.engine.define(name.clone(), *version, program.clone(), timing(definition))?;
        let mut first = None;
        if is_kept && (is_cut || backfill.is_some()) {
            let query = RowQuery { limit: 1, ..RowQuery::default() };
            first = self.deps.store.rows(&self.tenant.id, name, &query).await?.0.pop();
        }
        let Some(upstream) = program.stream().metric() else {
            if let Some(first) = first.filter(|_| backfill.is_some()) {
                cut.first.insert(name.clone(), first.window_end);
            }
            self.start_rules(name, cut.at);
            return Ok(());
        };
        let known = cut.whole.get(&upstream).copied();
        let (from, rows) = match (is_cut, backfill) {
            // it began with the row that its own first one comes of
            (true, _) => {
                let from = first.map_or(Micros::MIN, |row| row.window_start);
                (from, self.final_rows(&upstream, from, known.unwrap_or(Micros::MAX)).await?.0)
            }
            (false, Some(span)) => {
                let closed = self.engine.closed(&upstream).unwrap_or(Micros::MIN);
                let from = closed.minus(span);
                let rows = match known {
                    // as they were then: those in the store are as they are now
                    None => self.computed_rows(&upstream, from, closed),
                    Some(whole) => {
                        let (mut rows, _) = self.final_rows(&upstream, from, whole.min(closed)).await?;
                        rows.extend(self.computed_rows(&upstream, from.max(whole), closed));
                        rows
                    }
                };
                (from, rows)
            }
            (false, None) => (Micros::MIN, Vec::new()),
        };
        if !rows.is_empty() {
            let batches = self.batches(&upstream, &rows)?;
            let Outputs { rows, failures, .. } = self.engine.backfill(name, from, &batches);
            self.keep(Outputs { rows, failures, ..Outputs::default() }, false);
        }
        if is_cut {
            let newest = rows.last().map_or(Micros::MIN, |row| row.window_end);
            self.engine.pass_over(name, known.unwrap_or(newest));
        }
        self.start_rules(name, cut.at);
        Ok(())
    }

    /// Final rows that were computed and are not in the store yet, whose windows end behind `from` and not behind `until`.
    fn computed_rows(&self, metric: &ItemName, from: Micros, until: Micros) -> Vec<FinalRow> {
        let mut rows: BTreeMap<_, &FinalRow> = BTreeMap::new();
        for row in &self.unsaved.rows {
            if row.metric == *metric && row.window_end > from && row.window_end <= until {
                rows.insert((row.window_end, row.window_start, row.key.as_str()), row); // in their order: the last counts
            }
        }
        rows.into_values().filter(|row| row.row != WITHDRAWN).cloned().collect()
    }

    /// Computes one metric alone over the log from `since` to where the others stand.
    async fn compute(
        &mut self,
        name: &ItemName,
        definition: &MetricDefinition,
        program: &Arc<Program>,
        since: u64,
    ) -> Result<Computed, ActorProcessingErr> {
        // batches with events that cannot be computed: once one is found, all begins anew and it is sifted
        let mut bad = BTreeSet::new();
        loop {
            match self.compute_without(name, definition, program, since, &bad).await? {
                Ok(computed) => return Ok(computed),
                Err(offset) => _ = bad.insert(offset),
            }
        }
    }

    /// The same, or the offset of a batch that is none of `bad` and cannot be computed as it is.
    async fn compute_without(
        &mut self,
        name: &ItemName,
        definition: &MetricDefinition,
        program: &Arc<Program>,
        since: u64,
        bad: &BTreeSet<u64>,
    ) -> Result<Result<Computed, u64>, ActorProcessingErr> {
        let timing = timing(definition);
        let oldest = definition.backfill.and_then(|span| Some(self.engine.frontier(program.stream())?.minus(span)));
        let (deps, tables) = (self.deps.clone(), self.table_schemas());
        // who adopts the metric knows its version
        let begin = |engine: &mut Workspace| engine.define(name.clone(), 0, program.clone(), timing);
        let empty = || -> Result<Workspace, ActorProcessingErr> {
            let mut alone = engine_with(&deps, &tables)?;
            begin(&mut alone)?;
            Ok(alone)
        };
        // tables as they were: what the log still has of their changes comes again as it is read
        let mut alone = self.engine.with_tables_before(since.max(self.deps.log.head().0))?;
        begin(&mut alone)?;
        let (mut all, mut poison) = (Vec::new(), Vec::new());
        let until = self.applied;
        let mut records = self.scan(since);
        while let Some(record) = records.recv().await {
            let (offset, record) = record?;
            if offset.0 >= until {
                break;
            }
            match record.body {
                Body::Events { stream, batch } if stream.is_table() => {
                    self.change_table(&mut alone, &stream, &batch, offset.0);
                }
                Body::Events { stream, batch } if program.reads(&stream) => {
                    let batch = match oldest {
                        Some(oldest) => since_time(&batch, oldest)?,
                        None => batch,
                    };
                    let step = |engine: &mut Workspace, part: &RecordBatch| {
                        // an event that is late now was told of when it came
                        Outputs { late: Vec::new(), ..compute_batch(&self.tenant.id, engine, &stream, part) }
                    };
                    if bad.contains(&offset.0) {
                        let sifted = sift(&mut alone, &batch, step, empty)?;
                        all.extend(sifted.computed.into_iter().map(|(_, outputs)| outputs));
                        let left_out = sifted.poison.into_iter();
                        poison.extend(left_out.map(|(event, panic)| (offset.0, stream.clone(), event, panic)));
                    } else {
                        match catch_unwind(AssertUnwindSafe(|| step(&mut alone, &batch))) {
                            Ok(outputs) => all.push(outputs),
                            Err(_) => return Ok(Err(offset.0)),
                        }
                    }
                }
                Body::Advance { stream, frontier } if program.reads(&stream) => {
                    all.push(alone.idle(&stream, frontier));
                }
                _ => {}
            }
        }
        Ok(Ok(Computed { engine: alone, outputs: all, poison }))
    }
}

/// What came of a batch without the events that cannot be computed.
pub(super) struct Sifted {
    /// In parts, which are the rest of the batch in its order.
    pub(super) computed: Vec<(RecordBatch, Outputs)>,
    /// The events at which `step` panicked, and with what.
    pub(super) poison: Vec<(RecordBatch, String)>,
}

/// Computes `batch`, cut in halves until each event at which `step` panics is alone. `empty` gives an engine with the
/// same metrics and rules as `engine`, which takes its state over from before a panic.
fn sift(
    engine: &mut Workspace,
    batch: &RecordBatch,
    step: impl Fn(&mut Workspace, &RecordBatch) -> Outputs,
    empty: impl Fn() -> Result<Workspace, ActorProcessingErr>,
) -> Result<Sifted, ActorProcessingErr> {
    let (mut computed, mut poison) = (Vec::new(), Vec::new());
    let mut parts = vec![batch.clone()];
    while let Some(part) = parts.pop() {
        let before = engine.state()?;
        match catch_unwind(AssertUnwindSafe(|| step(engine, &part))) {
            Ok(outputs) => computed.push((part, outputs)),
            Err(panic) => {
                *engine = empty()?;
                let fresh = engine.restore(Saved::read(&before)?)?;
                engine.forget_saved(); // the store has another one
                assert!(fresh.is_empty(), "state of {fresh:?} was lost between two batches");
                let half = part.num_rows() / 2;
                if half > 0 {
                    parts.extend([part.slice(half, part.num_rows() - half), part.slice(0, half)]);
                } else {
                    poison.push((part, reason(panic.as_ref())));
                }
            }
        }
    }
    Ok(Sifted { computed, poison })
}

/// The events at `oldest` or later.
fn since_time(batch: &RecordBatch, oldest: Micros) -> Result<RecordBatch, ActorProcessingErr> {
    let Some(ts) = batch.column_by_name("ts") else { return Ok(batch.clone()) };
    let ts = ts.as_primitive::<TimestampMicrosecondType>();
    let keep: BooleanArray = ts.iter().map(|at| Some(at.is_some_and(|at| at >= oldest.0))).collect();
    Ok(filter_record_batch(batch, &keep)?)
}

/// The time of the newest of these events.
fn highest(batch: &RecordBatch) -> Option<Micros> {
    max(batch.column_by_name("ts")?.as_primitive_opt::<TimestampMicrosecondType>()?).map(Micros)
}
