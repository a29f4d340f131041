//! One workspace: event time of its streams, its metrics and alert rules, and the prices it has seen.

use crate::alert::{Change, Rule, Trouble, Verdict, View, Watch};
use crate::checkpoint::{self, Content, Draft, Ledger, Owner, Pieces, Saved, SavedMetric, SavedRules, Snapshot, State};
use crate::cost::{Cost, Stopwatch};
use crate::event::{ItemName, Micros, Span, StreamName};
use crate::join::Joined;
use crate::limit::{Gauge, StateLimits, StateSize};
use crate::metric::{Metric, PANES, REVISIONS, RestoreError, Rows, Timing};
use crate::over::{self, Produced, RowMetric};
use crate::portfolio::Prices;
use crate::program::Program;
use crate::reference::{TableSchema, Tables};
use crate::rollup::Rollup;
use crate::shared::Shared;
use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use datafusion_common::{DataFusionError, Result, exec_err};
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Where event time stands on one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTime {
    /// Greatest event time seen, or reached by idling; `None` before the first event.
    pub frontier: Option<Micros>,
    /// Events that came so late that a metric could not take them.
    pub late: u64,
    /// Events taken in so far.
    #[serde(default)]
    pub events: u64,
}

/// Rows of a metric, in the order in which they became so.
#[derive(Debug)]
pub struct MetricRows {
    pub metric: ItemName,
    pub rows: Rows,
}

/// An event that came too late for a metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Late {
    /// Row in the batch.
    pub row: u32,
    pub metric: ItemName,
}

/// What kind of thing stopped a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Its computation failed, or the metric it reads stopped.
    #[default]
    MetricFailed,
    /// It held more state than it may.
    StateLimit,
}

impl Cause {
    /// As clients know it.
    pub fn code(self) -> &'static str {
        match self {
            Cause::MetricFailed => "metric_failed",
            Cause::StateLimit => "state_limit",
        }
    }
}

/// Why a metric stopped. It stays so, without state, until it is defined again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    pub cause: Cause,
    pub reason: String,
}

/// A metric that stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub metric: ItemName,
    pub stop: Stop,
}

/// What came of a step.
#[derive(Debug, Default)]
pub struct Outputs {
    pub rows: Vec<MetricRows>,
    pub alerts: Vec<Change>,
    /// Rules whose condition could not be computed over some rows of this step.
    pub trouble: Vec<(ItemName, Trouble)>,
    pub late: Vec<Late>,
    pub failures: Vec<Failure>,
    /// A trade changed a last price.
    pub prices_changed: bool,
}

/// A metric's state: by panes of its stream, or row by row over another metric.
pub enum Computation {
    Windows(Metric),
    /// The same over events that reference tables or another stream are joined to.
    Joined(Box<Joined>),
    Rollup(Rollup),
    Rows(RowMetric),
}

impl Computation {
    pub fn program(&self) -> &Arc<Program> {
        match self {
            Computation::Windows(metric) => metric.program(),
            Computation::Joined(joined) => joined.metric().program(),
            Computation::Rollup(rollup) => rollup.metric().program(),
            Computation::Rows(metric) => metric.program(),
        }
    }

    /// Keys that hold state now; of a row-wise metric, partitions.
    pub fn keys(&self) -> usize {
        match self {
            Computation::Rows(metric) => metric.keys(),
            other => other.windows().map_or(0, Metric::keys),
        }
    }

    /// Panes that hold state now.
    pub fn panes(&self) -> usize {
        self.windows().map_or(0, Metric::panes)
    }

    /// Bytes of state on the heap, within a few percent.
    pub fn bytes(&self) -> usize {
        match self {
            Computation::Windows(metric) => metric.bytes(),
            Computation::Joined(joined) => joined.bytes(),
            Computation::Rollup(rollup) => rollup.bytes(),
            Computation::Rows(metric) => metric.bytes(),
        }
    }

    /// The same metric without state.
    fn emptied(&self) -> Result<Computation> {
        Ok(match self {
            Computation::Windows(metric) => Computation::Windows(metric.emptied()),
            Computation::Joined(joined) => Computation::Joined(Box::new(joined.emptied()?)),
            Computation::Rollup(rollup) => Computation::Rollup(rollup.emptied()?),
            Computation::Rows(metric) => {
                Computation::Rows(RowMetric::new(metric.program().clone(), metric.lateness())?)
            }
        })
    }

    fn size(&self) -> StateSize {
        StateSize { bytes: self.bytes(), groups: self.keys() }
    }

    /// The panes, where it has any.
    fn windows(&self) -> Option<&Metric> {
        match self {
            Computation::Windows(metric) => Some(metric),
            Computation::Joined(joined) => Some(joined.metric()),
            Computation::Rollup(rollup) => Some(rollup.metric()),
            Computation::Rows(_) => None,
        }
    }

    fn windows_mut(&mut self) -> Option<&mut Metric> {
        match self {
            Computation::Windows(metric) => Some(metric),
            Computation::Joined(joined) => Some(joined.metric_mut()),
            Computation::Rollup(rollup) => Some(rollup.metric_mut()),
            Computation::Rows(_) => None,
        }
    }

    /// Every window that ends here or before is final.
    fn closed(&self) -> Micros {
        match self {
            Computation::Rows(metric) => metric.closed(),
            other => other.windows().map_or(Micros::MIN, Metric::closed),
        }
    }

    /// How long after its window's end a row may be corrected.
    fn lateness(&self) -> Span {
        match self {
            Computation::Rows(metric) => metric.lateness(),
            other => other.windows().map_or(Span::ZERO, |metric| metric.timing().allowed_lateness),
        }
    }

    /// End of the next window that will close.
    fn next_end(&self) -> Option<Micros> {
        match self {
            Computation::Joined(joined) => joined.next_end(),
            other => other.windows()?.next_end(),
        }
    }

    /// Events that wait to be joined.
    pub fn waiting(&self) -> usize {
        match self {
            Computation::Joined(joined) => joined.waiting(),
            _ => 0,
        }
    }

    /// Versions of tables before this are seen by none of its events.
    fn horizon(&self) -> Micros {
        self.windows().map_or(Micros::MIN, Metric::horizon)
    }

    fn save(&mut self, draft: &mut Draft) -> Result<()> {
        match self {
            Computation::Windows(metric) => metric.save(draft),
            Computation::Joined(joined) => joined.save(draft),
            Computation::Rollup(rollup) => rollup.save(draft),
            Computation::Rows(metric) => metric.save(draft),
        }
    }

    /// The same metric with the state that [`Computation::save`] gave, which had closed windows up to `closed`.
    fn restored(&self, closed: Micros, state: Pieces) -> Result<Computation, RestoreError> {
        Ok(match self {
            Computation::Windows(metric) => {
                Computation::Windows(metric.emptied().restored(closed, &state.named(&[PANES, REVISIONS])?)?)
            }
            Computation::Joined(joined) => Computation::Joined(Box::new(joined.restored(closed, state)?)),
            Computation::Rollup(rollup) => Computation::Rollup(rollup.restored(closed, state)?),
            Computation::Rows(metric) => {
                Computation::Rows(RowMetric::restore(metric.program().clone(), metric.lateness(), closed, state)?)
            }
        })
    }
}

struct Entry {
    /// Which definition of the metric this is; state of another one is not restored.
    version: i64,
    metric: Computation,
    /// Of the metric it reads, the rows whose windows end later count.
    since: Micros,
    watches: BTreeMap<ItemName, Watch>,
    /// A rule came or went since the last checkpoint.
    rules_changed: bool,
    failure: Option<Stop>,
    gauge: Gauge,
    cost: Cost,
}

/// The running state of one workspace. Deterministic: the same steps give the same outputs.
#[derive(Default)]
pub struct Workspace {
    streams: BTreeMap<StreamName, StreamTime>,
    metrics: BTreeMap<ItemName, Entry>,
    /// Metrics that read another one, and which; each behind the one it reads.
    chain: Vec<(ItemName, ItemName)>,
    tables: Tables,
    prices: Prices,
    limits: StateLimits,
    stopwatch: Option<Stopwatch>,
    pause: Option<fn()>,
    /// The parts of the last checkpoint; none while nothing is stored that may stay.
    ledger: Option<Ledger>,
}

impl Workspace {
    /// A workspace whose metrics stop at these bounds, and by whose stopwatch their costs are told. The default has
    /// neither.
    pub fn new(limits: StateLimits, stopwatch: Stopwatch) -> Workspace {
        Workspace { limits, stopwatch: Some(stopwatch), ..Workspace::default() }
    }

    /// The same, which calls `pause` after each metric that computed a batch: there is a place for others to go on.
    pub fn pausing(self, pause: fn()) -> Workspace {
        Workspace { pause: Some(pause), ..self }
    }

    /// Starts a metric with empty state, or replaces its definition and state.
    ///
    /// A metric that reads another one takes its delay and lateness from there, and its rows from now on.
    pub fn define(&mut self, name: ItemName, version: i64, program: Arc<Program>, timing: Timing) -> Result<()> {
        let mut since = Micros::MIN;
        let metric = match program.stream().metric() {
            None if program.is_joined() => {
                Computation::Joined(Box::new(Joined::new(program, timing, self.limits.metric)?))
            }
            None => Computation::Windows(self.metric_of(program, timing)?),
            Some(upstream) => {
                if let Some(cycle) = self.cycle(&name, &program) {
                    return exec_err!("{}", in_a_circle(&cycle));
                }
                let Some(read) = self.metrics.get(&upstream) else {
                    return exec_err!("metric `{name}` reads metric `{upstream}`, which is not defined");
                };
                since = read.metric.closed();
                let allowed_lateness = read.metric.lateness();
                match program.is_row_wise() {
                    true => Computation::Rows(RowMetric::new(program, allowed_lateness)?),
                    false => {
                        let timing = Timing { max_delay: Span::ZERO, allowed_lateness };
                        Computation::Rollup(Rollup::new(program, timing, read.metric.program().clone())?)
                    }
                }
            }
        };
        self.metrics.insert(name, Entry::new(version, metric, since));
        self.sort_chain();
        self.index_tables()
    }

    /// A metric over a stream, which shares its keys with one that has the same.
    fn metric_of(&self, program: Arc<Program>, timing: Timing) -> Result<Metric> {
        let others = self.metrics.values().filter_map(|entry| match &entry.metric {
            Computation::Windows(metric) => Some(metric),
            _ => None,
        });
        match others.filter_map(|metric| metric.beside(program.clone(), timing)).next() {
            Some(metric) => Ok(metric),
            None => Metric::new(program, timing),
        }
    }

    /// Tables find their rows by what the metrics of now compare, and by nothing else.
    fn index_tables(&mut self) -> Result<()> {
        let mut used = BTreeMap::new();
        for joins in self.metrics.values().filter_map(|entry| entry.metric.program().joins()) {
            joins.used_indexes(&mut used);
            joins.prepare(&mut self.tables)?;
        }
        self.tables.keep_indexes(&used);
        Ok(())
    }

    /// Adds a reference table, or gives it other columns.
    pub fn define_table(&mut self, schema: Arc<TableSchema>) -> Result<()> {
        self.tables.define(schema)
    }

    /// Forgets a reference table that no metric reads.
    pub fn remove_table(&mut self, name: &StreamName) {
        self.tables.remove(name);
    }

    /// Takes in changes of a reference table, recorded at `offset` of the log: see [`Tables::change`].
    pub fn change_table(&mut self, name: &StreamName, batch: &RecordBatch, offset: u64) -> Result<()> {
        self.tables.change(name, batch, offset)
    }

    /// The reference tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// A workspace without metrics that has these tables as they were before `offset`.
    pub fn with_tables_before(&self, offset: u64) -> Result<Workspace> {
        let Workspace { limits, stopwatch, pause, .. } = *self;
        Ok(Workspace { tables: self.tables.before(offset)?, limits, stopwatch, pause, ..Workspace::default() })
    }

    /// Metrics that join `table`.
    pub fn readers_of(&self, table: &StreamName) -> impl Iterator<Item = &ItemName> {
        let reads = move |entry: &Entry| entry.metric.program().tables().any(|read| read == table);
        self.metrics.iter().filter(move |(_, entry)| reads(entry)).map(|(name, _)| name)
    }

    /// Tables forget versions that no metric can see any more. One that no metric reads keeps what the stream
    /// furthest behind may still ask for, should a metric come.
    fn prune_tables(&mut self) {
        if self.tables.is_settled() {
            return;
        }
        let mut horizons: BTreeMap<StreamName, Micros> = BTreeMap::new();
        for entry in self.metrics.values().filter(|entry| entry.failure.is_none()) {
            for table in entry.metric.program().tables() {
                let horizon = horizons.entry(table.clone()).or_insert(Micros::MAX);
                *horizon = (*horizon).min(entry.metric.horizon());
            }
        }
        for (table, horizon) in horizons {
            self.tables.prune(&table, horizon);
        }
    }

    /// Takes over the metrics of `other` with their state, computed elsewhere over the same log; versions and rules stay.
    pub fn adopt(&mut self, other: Workspace) {
        for (name, mut entry) in other.metrics {
            if let Some(known) = self.metrics.remove(&name) {
                (entry.version, entry.watches, entry.rules_changed) = (known.version, known.watches, true);
            }
            self.metrics.insert(name, entry);
        }
        self.sort_chain();
        if let Err(error) = self.index_tables() {
            debug_assert!(false, "{error}");
        }
        for (stream, time) in other.streams {
            let mine = self.streams.entry(stream).or_default();
            mine.frontier = mine.frontier.max(time.frontier);
        }
        let watched: Vec<ItemName> =
            self.metrics.iter().filter(|(_, entry)| !entry.watches.is_empty()).map(|(name, _)| name.clone()).collect();
        watched.iter().for_each(|name| self.overlook(name));
    }

    /// Forgets a metric, its state and its rules.
    pub fn remove(&mut self, name: &ItemName) {
        self.metrics.remove(name);
        self.sort_chain();
        _ = self.index_tables(); // only drops indexes: those in use are there
    }

    /// The metrics that read `name`.
    pub fn readers(&self, name: &ItemName) -> Vec<ItemName> {
        self.chain.iter().filter(|(_, upstream)| upstream == name).map(|(reader, _)| reader.clone()).collect()
    }

    /// The circle in which `name` would read its own rows if it were defined as `program`, from `name` to `name`.
    pub fn cycle(&self, name: &ItemName, program: &Program) -> Option<Vec<ItemName>> {
        let mut path = vec![name.clone()];
        let mut next = program.stream().metric();
        while let Some(upstream) = next {
            path.push(upstream.clone());
            if upstream == *name {
                return Some(path);
            }
            next = self.metrics.get(&upstream).and_then(|entry| entry.metric.program().stream().metric());
        }
        None
    }

    /// The stream whose events reach `metric`, through other metrics or at once.
    pub fn root(&self, metric: &ItemName) -> Option<&StreamName> {
        let mut stream = self.metrics.get(metric)?.metric.program().stream();
        while let Some(upstream) = stream.metric() {
            stream = self.metrics.get(&upstream)?.metric.program().stream();
        }
        Some(stream)
    }

    /// Every window of `metric` that ends here or before is final; `None` for an unknown metric.
    pub fn closed(&self, metric: &ItemName) -> Option<Micros> {
        Some(self.metrics.get(metric)?.metric.closed())
    }

    /// The metrics so that each stands behind the one it reads.
    pub fn in_order(&self, mut metrics: Vec<ItemName>) -> Vec<ItemName> {
        let place = |name: &ItemName| self.chain.iter().position(|(reader, _)| reader == name);
        metrics.sort_by_key(place); // those that read a stream have no place and come first
        metrics
    }

    fn sort_chain(&mut self) {
        let depth = |name: &ItemName| {
            let mut depth = 0;
            let mut next = Some(name.clone());
            while let Some(upstream) = next.and_then(|name| self.metrics.get(&name)?.metric.program().stream().metric())
            {
                depth += 1;
                next = Some(upstream);
            }
            depth
        };
        let reads = |(name, entry): (&ItemName, &Entry)| {
            Some((depth(name), name.clone(), entry.metric.program().stream().metric()?))
        };
        let mut chain: Vec<_> = self.metrics.iter().filter_map(reads).collect();
        chain.sort();
        self.chain = chain.into_iter().map(|(_, name, upstream)| (name, upstream)).collect();
    }

    /// Starts a rule, which looks at the rows that change from now on, or replaces it: what fires goes on firing as long
    /// as the rows of open windows satisfy the new condition too. Ask [`Workspace::firing`] for what is left.
    ///
    /// Returns the one that it replaces, which [`Workspace::rewatch`] takes back.
    pub fn watch(&mut self, rule: Rule) -> Result<Option<Watch>> {
        let (name, metric) = (rule.name.clone(), rule.metric.clone());
        let succeeds = self.metrics.get(&metric).is_some_and(|entry| entry.watches.contains_key(&name));
        let live = if succeeds { self.live(&metric)? } else { Vec::new() };
        let Some(entry) = self.metrics.get(&metric) else {
            return exec_err!("alert rule `{name}` reads metric `{metric}`, which is not defined");
        };
        let is_first = entry.watches.keys().all(|other| *other == name);
        let mut watch = Watch::new(rule);
        if let Some(before) = entry.watches.get(&name) {
            watch.succeed(before, entry.metric.program(), &live)?;
        }
        let before = self.unwatch(&name);
        self.rewatch(watch);
        if is_first {
            self.overlook(&metric);
        }
        Ok(before)
    }

    /// Goes on with a rule where it stood, if its metric is still there.
    pub fn rewatch(&mut self, watch: Watch) {
        self.unwatch(&watch.rule.name);
        if let Some(entry) = self.metrics.get_mut(&watch.rule.metric) {
            entry.watches.insert(watch.rule.name.clone(), watch);
            entry.rules_changed = true;
        }
    }

    /// Forgets a rule, and returns it with where it stood.
    pub fn unwatch(&mut self, rule: &ItemName) -> Option<Watch> {
        let (entry, watch) = self.metrics.values_mut().find_map(|e| e.watches.remove(rule).map(|watch| (e, watch)))?;
        entry.rules_changed = true;
        Some(watch)
    }

    fn find_watch(&self, rule: &ItemName) -> Option<&Watch> {
        self.metrics.values().find_map(|entry| entry.watches.get(rule))
    }

    /// Whether there is such a rule.
    pub fn is_watched(&self, rule: &ItemName) -> bool {
        self.find_watch(rule).is_some()
    }

    /// The keys that a rule fires for, as [`crate::alert::Labels::key`] writes them; none for an unknown rule.
    pub fn firing(&self, rule: &ItemName) -> impl Iterator<Item = &str> {
        self.find_watch(rule).into_iter().flat_map(Watch::firing)
    }

    /// Rows over which a rule's condition could not be computed so far.
    pub fn trouble(&self, rule: &ItemName) -> Option<&Trouble> {
        self.find_watch(rule)?.trouble.as_ref()
    }

    /// Rules look at nothing that changed in the open windows of `metric` up to now.
    fn overlook(&mut self, metric: &ItemName) {
        let Some(frontier) = self.frontier_of(metric) else { return };
        if let Some(entry) = self.metrics.get_mut(metric)
            && let Some(state) = entry.metric.windows_mut()
            && entry.failure.is_none()
        {
            _ = state.look(frontier, &mut Vec::new()); // what cannot be computed stops the metric at the next step
        }
    }

    /// Takes in one batch of a stream. Final rows come out; provisional ones wait for [`Workspace::tick`].
    pub fn step(&mut self, stream: &StreamName, batch: &RecordBatch) -> Outputs {
        let mut out = Outputs::default();
        let Some(ts) = batch.column_by_name("ts").and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>()) else {
            return out;
        };
        let Some(highest) = ts.values().iter().max().map(|&at| Micros(at)) else { return out };
        out.prices_changed = self.prices.absorb(stream, batch);
        let time = self.streams.entry(stream.clone()).or_default();
        time.events += batch.num_rows() as u64;
        let before = time.frontier.unwrap_or(Micros::MIN);
        let after = before.max(highest);
        time.frontier = Some(after);
        let mut late: BTreeMap<u32, ItemName> = BTreeMap::new();
        let came = Came { rows: batch.num_rows(), bytes: batch.get_array_memory_size() };
        let mut shared = Shared::default();
        self.each(stream, Some(came), &mut out, |name, metric, (streams, tables), rows| {
            let mut dropped = Vec::new();
            match metric {
                Computation::Windows(metric) => {
                    metric.absorb(batch, before, &mut shared, rows, &mut dropped)?;
                    metric.advance(after.minus(metric.timing().max_delay), rows)?;
                }
                Computation::Joined(joined) => {
                    let at = |name: &StreamName| match name == stream {
                        true => before,
                        false => streams.get(name).and_then(|time| time.frontier).unwrap_or(Micros::MIN),
                    };
                    joined.absorb(stream, batch, at, tables, rows, &mut dropped)?;
                }
                Computation::Rollup(_) | Computation::Rows(_) => {}
            }
            dropped.into_iter().for_each(|row| _ = late.entry(row).or_insert_with(|| name.clone()));
            Ok(())
        });
        self.prune_tables();
        self.hold_to_limits(&mut out);
        if let Some(time) = self.streams.get_mut(stream) {
            time.late += late.len() as u64;
        }
        out.late = late.into_iter().map(|(row, metric)| Late { row, metric }).collect();
        out
    }

    /// Event time of an idle stream moves to `frontier`, as recorded in the log.
    pub fn idle(&mut self, stream: &StreamName, frontier: Micros) -> Outputs {
        let mut out = Outputs::default();
        let time = self.streams.entry(stream.clone()).or_default();
        let after = time.frontier.map_or(frontier, |before| before.max(frontier));
        time.frontier = Some(after);
        self.each(stream, None, &mut out, |_, metric, (streams, tables), rows| match metric {
            Computation::Windows(metric) => metric.advance(after.minus(metric.timing().max_delay), rows),
            Computation::Joined(joined) => {
                joined.advance(|name| streams.get(name).and_then(|time| time.frontier), tables, rows)
            }
            Computation::Rollup(_) | Computation::Rows(_) => Ok(()),
        });
        self.prune_tables();
        self.hold_to_limits(&mut out);
        out
    }

    /// Provisional rows of `metric` that changed since its last tick: for who reads them, rules have seen them.
    pub fn tick(&mut self, metric: &ItemName) -> Outputs {
        let mut out = Outputs::default();
        let Some(frontier) = self.frontier_of(metric) else { return out };
        if let Some(entry) = self.metrics.get_mut(metric)
            && let Some(state) = entry.metric.windows_mut()
            && entry.failure.is_none()
        {
            let mut rows = Vec::new();
            let result = state.tick(frontier, &mut rows);
            entry.take(metric, rows.into_iter().map(|rows| Produced { rows, is_newest: true }), result, &mut out);
        }
        out
    }

    /// Rows of `metric` that are not final yet; empty for an unknown metric.
    pub fn live(&mut self, metric: &ItemName) -> Result<Vec<Rows>> {
        let Some(frontier) = self.frontier_of(metric) else { return Ok(Vec::new()) };
        match self.metrics.get_mut(metric).and_then(|entry| entry.metric.windows_mut()) {
            Some(state) => state.live(frontier),
            None => Ok(Vec::new()),
        }
    }

    /// Where event time stands for `metric`: on its stream, or by the windows that the metric it reads has closed.
    fn frontier_of(&self, metric: &ItemName) -> Option<Micros> {
        let program = self.metrics.get(metric)?.metric.program();
        match program.stream().metric() {
            None => program.frontier(|stream| self.frontier(stream)),
            Some(upstream) => Some(self.metrics.get(&upstream)?.metric.closed()).filter(|closed| *closed > Micros::MIN),
        }
    }

    /// The metric at the root of `metric`, which reads events; `metric` itself where it does.
    fn root_program(&self, metric: &ItemName) -> Option<&Arc<Program>> {
        let mut program = self.metrics.get(metric)?.metric.program();
        while let Some(upstream) = program.stream().metric() {
            program = self.metrics.get(&upstream)?.metric.program();
        }
        Some(program)
    }

    /// The event time that `metric` has reached on the stream at its root; of joined streams, that of the slower one.
    pub fn reached(&self, metric: &ItemName) -> Option<Micros> {
        self.root_program(metric)?.frontier(|stream| self.frontier(stream))
    }

    /// Whether events of `stream` reach `metric`, through other metrics or at once.
    pub fn feeds(&self, stream: &StreamName, metric: &ItemName) -> bool {
        self.root_program(metric).is_some_and(|root| root.reads(stream))
    }

    /// Event time at which the next window over `stream` would close, if any is open: also of metrics that read others.
    pub fn next_close(&self, stream: &StreamName) -> Option<Micros> {
        let now = self.frontier(stream);
        let closes = self.metrics.iter().filter(|(_, entry)| entry.failure.is_none()).filter_map(|(name, entry)| {
            let root = self.root_program(name)?;
            let due = entry.metric.next_end()?.plus(self.delay(name));
            match root.joins().and_then(|joins| joins.other()) {
                None => (root.stream() == stream).then_some(due),
                // a joined stream that is past it waits for the other one
                Some(_) if root.stream() == stream => Some(due).filter(|due| now < Some(*due)),
                Some((other, near)) => (other == stream).then(|| near.right_for(due)).filter(|due| now < Some(*due)),
            }
        });
        closes.min()
    }

    /// How far a stream without events may follow those it is joined with, while they wait for it.
    pub fn followed(&self, stream: &StreamName) -> Option<Micros> {
        let reached = self.metrics.values().filter(|e| e.failure.is_none()).filter_map(|entry| {
            entry.metric.next_end()?;
            let program = entry.metric.program();
            let (other, near) = program.joins()?.other()?;
            if program.stream() == stream {
                return self.frontier(other).map(|right| near.frontier(Micros::MAX, right));
            }
            (other == stream).then(|| self.frontier(program.stream()).map(|left| near.right_for(left)))?
        });
        reached.max()
    }

    /// How far the watermark of `metric` stays behind its root stream.
    fn delay(&self, metric: &ItemName) -> Span {
        let Some(Entry { metric, .. }) = self.metrics.get(metric) else { return Span::ZERO };
        match metric.program().stream().metric() {
            Some(upstream) => self.delay(&upstream),
            None => metric.windows().map_or(Span::ZERO, |metric| metric.timing().max_delay),
        }
    }

    /// Greatest event time of `stream`.
    pub fn frontier(&self, stream: &StreamName) -> Option<Micros> {
        self.streams.get(stream)?.frontier
    }

    /// Streams that had events, and where their event time stands.
    pub fn streams(&self) -> impl Iterator<Item = (&StreamName, StreamTime)> {
        self.streams.iter().map(|(name, time)| (name, *time))
    }

    /// The metrics defined here.
    pub fn metrics(&self) -> impl Iterator<Item = (&ItemName, &Computation)> {
        self.metrics.iter().map(|(name, entry)| (name, &entry.metric))
    }

    /// Why a metric stopped; `None` while it runs.
    pub fn failure(&self, metric: &ItemName) -> Option<&Stop> {
        self.metrics.get(metric)?.failure.as_ref()
    }

    /// What a metric's batches took since the process started or the metric was defined.
    pub fn cost(&self, metric: &ItemName) -> Option<Cost> {
        Some(self.metrics.get(metric)?.cost)
    }

    /// The most state there may be.
    pub fn limits(&self) -> StateLimits {
        self.limits
    }

    /// Stops metrics that hold too much: each that is over its own bound, and where all together are over theirs, the
    /// one that holds most.
    fn hold_to_limits(&mut self, out: &mut Outputs) {
        let StateLimits { metric: most, workspace: most_of_all } = self.limits;
        let near = most.bytes.min(most_of_all.bytes);
        for (name, entry) in self.metrics.iter_mut().filter(|(_, entry)| entry.failure.is_none()) {
            let Entry { gauge, metric, .. } = entry;
            gauge.measure(near, metric.keys(), || metric.bytes());
            if let Some(excess) = gauge.size().excess(most) {
                entry.stop(name, Cause::StateLimit, excess.of_metric(), out);
            }
        }
        let all = |metrics: &BTreeMap<ItemName, Entry>| {
            metrics.values().fold(StateSize::default(), |sum, entry| sum.plus(entry.gauge.size()))
        };
        if all(&self.metrics).excess(most_of_all).is_none() {
            return;
        }
        // what was measured a while ago may be less by now
        self.metrics.values_mut().for_each(|entry| entry.gauge.set(entry.metric.size()));
        while let Some(excess) = all(&self.metrics).excess(most_of_all) {
            let running = self.metrics.iter_mut().filter(|(_, entry)| entry.failure.is_none());
            let Some((name, entry)) = running.max_by_key(|(_, entry)| excess.share(entry.gauge.size())) else { return };
            let reason = excess.of_workspace(excess.share(entry.gauge.size()));
            entry.stop(name, Cause::StateLimit, reason, out);
        }
    }

    pub fn prices(&self) -> &Prices {
        &self.prices
    }

    /// Bytes of metric state on the heap.
    pub fn bytes(&self) -> usize {
        self.metrics.values().map(|entry| entry.metric.bytes()).sum::<usize>() + self.tables.bytes()
    }

    /// Runs `work` on every healthy metric over `stream`, shows its rules what came of it, and passes final rows on.
    fn each(
        &mut self,
        stream: &StreamName,
        came: Option<Came>,
        out: &mut Outputs,
        mut work: impl FnMut(
            &ItemName,
            &mut Computation,
            (&BTreeMap<StreamName, StreamTime>, &Tables),
            &mut Vec<Rows>,
        ) -> Result<()>,
    ) {
        let Self { streams, metrics, tables, stopwatch, pause, .. } = self;
        let of = |stream: &StreamName| streams.get(stream).and_then(|time| time.frontier);
        for (name, entry) in metrics {
            if entry.failure.is_some() || !entry.metric.program().reads(stream) {
                continue;
            }
            let frontier = entry.metric.program().frontier(of);
            let mut rows = Vec::new();
            let began = stopwatch.map(|now| now());
            let result = work(name, &mut entry.metric, (streams, tables), &mut rows);
            if let Some(came) = came {
                entry.took(came, since(*stopwatch, began));
            }
            entry.take(name, rows.into_iter().map(|rows| Produced { rows, is_newest: true }), result, out);
            entry.look(name, frontier, out);
            pause.iter().for_each(|pause| pause());
        }
        self.pass_on(stream, out);
    }

    /// Gives the final rows in `out` to the metrics that read them, and theirs to the next ones.
    fn pass_on(&mut self, stream: &StreamName, out: &mut Outputs) {
        for at in 0..self.chain.len() {
            let (name, upstream) = self.chain[at].clone();
            if !self.feeds(stream, &name) {
                continue;
            }
            let fresh = out.rows.iter().filter(|rows| rows.metric == upstream && rows.rows.revisions.is_some());
            let fresh: Vec<Rows> = fresh.map(|rows| rows.rows.clone()).collect();
            self.give(&name, &upstream, &fresh, out);
        }
    }

    /// Takes final rows of the metric that `name` reads, from before it was defined: those whose windows end after
    /// `since`, in the order of windows, and none that its upstream has not given yet.
    pub fn backfill(&mut self, name: &ItemName, since: Micros, rows: &[Rows]) -> Outputs {
        let mut out = Outputs::default();
        let upstream = self.chain.iter().find(|(reader, _)| reader == name).map(|(_, upstream)| upstream.clone());
        let Some(upstream) = upstream else { return out };
        let Some(entry) = self.metrics.get_mut(name) else { return out };
        entry.since = since;
        let watches = std::mem::take(&mut entry.watches); // what was then raises no alert now
        self.give(name, &upstream, rows, &mut out);
        if let Some(entry) = self.metrics.get_mut(name) {
            entry.watches = watches;
        }
        self.overlook(name);
        self.hold_to_limits(&mut out);
        out
    }

    /// From now on `name` takes of the metric it reads only rows whose windows end after `since`.
    pub fn pass_over(&mut self, name: &ItemName, since: Micros) {
        if let Some(entry) = self.metrics.get_mut(name) {
            entry.since = since;
        }
    }

    fn give(&mut self, name: &ItemName, upstream: &ItemName, rows: &[Rows], out: &mut Outputs) {
        let Some(read) = self.metrics.get(upstream) else { return };
        let (closed, program, failure) = (read.metric.closed(), read.metric.program().clone(), read.failure.is_some());
        let stopwatch = self.stopwatch;
        let Some(entry) = self.metrics.get_mut(name).filter(|entry| entry.failure.is_none()) else { return };
        let mut produced = Vec::new();
        let began = stopwatch.map(|now| now());
        let mut result = entry.absorb(&program, closed, rows, &mut produced);
        if !rows.is_empty() {
            entry.took(Came::of(rows), since(stopwatch, began));
        }
        if failure {
            result = result.and_then(|()| exec_err!("metric `{upstream}`, which it reads, stopped"));
        }
        entry.take(name, produced.into_iter(), result, out);
        entry.look(name, Some(closed).filter(|closed| *closed > Micros::MIN), out);
    }

    /// What changed since the last checkpoint, to be stored in place of it: everything, where it is not known what is
    /// stored. Call [`Workspace::forget_saved`] where it did not get there.
    pub fn save(&mut self) -> Result<Snapshot> {
        let mut draft = Draft::new(self.ledger.take()); // an error leaves none, so that the next one is whole
        let mut metrics = Vec::new();
        for (name, entry) in &mut self.metrics {
            draft.begin(Owner::Metric(name));
            entry.metric.save(&mut draft)?;
            entry.save_rules(&mut draft)?;
            metrics.push(SavedMetric {
                name: name.clone(),
                version: entry.version,
                closed: entry.metric.closed(),
                since: Some(entry.since).filter(|since| *since > Micros::MIN),
                failure: entry.failure.as_ref().map(|stop| stop.reason.clone()),
                cause: entry.failure.as_ref().map(|stop| stop.cause).unwrap_or_default(),
                looked_at: entry.metric.windows().and_then(Metric::looked_at),
            });
        }
        self.tables.save(&mut draft)?;
        self.prices.save(&mut draft)?;
        let (snapshot, ledger) = draft.finish(self.streams.clone(), metrics);
        self.ledger = Some(ledger);
        Ok(snapshot)
    }

    /// What the last [`Workspace::save`] gave may not be stored: the next one has everything.
    pub fn forget_saved(&mut self) {
        self.ledger = None;
    }

    /// The whole state, which has nothing to do with what is stored.
    pub fn state(&mut self) -> Result<State> {
        self.forget_saved();
        let mut state = State::default();
        state.apply(self.save()?.encode()?);
        self.forget_saved();
        Ok(state)
    }

    /// Puts saved state under the metrics defined now. A metric that was defined again since is returned by name: it
    /// starts from nothing. An error leaves a part of it here: what is computed then begins in an engine of its own.
    pub fn restore(&mut self, saved: Saved) -> Result<Vec<ItemName>, RestoreError> {
        self.streams = saved.streams;
        self.prices = Prices::restored(saved.prices);
        for (name, rows) in &saved.tables {
            self.tables.load(name, rows)?;
        }
        let mut fresh: Vec<ItemName> = Vec::new();
        let mut states: HashMap<ItemName, _> = saved
            .metrics
            .into_iter()
            .map(|(state, pieces, rules)| (state.name.clone(), (state, pieces, rules)))
            .collect();
        for (name, entry) in &mut self.metrics {
            let Some((state, pieces, rules)) = states.remove(name).filter(|(s, ..)| s.version == entry.version) else {
                fresh.push(name.clone());
                continue;
            };
            entry.metric = entry.metric.restored(state.closed, pieces)?;
            entry.gauge.set(entry.metric.size());
            entry.failure = state.failure.map(|reason| Stop { cause: state.cause, reason });
            entry.since = state.since.unwrap_or(Micros::MIN);
            if let Some(metric) = entry.metric.windows_mut() {
                metric.look_from(state.looked_at);
            }
            entry.restore_rules(rules);
        }
        self.ledger = saved.ledger;
        Ok(fresh)
    }
}

impl Entry {
    fn new(version: i64, metric: Computation, since: Micros) -> Entry {
        let (gauge, cost) = (Gauge::default(), Cost::default());
        Entry { version, metric, since, watches: BTreeMap::new(), rules_changed: true, failure: None, gauge, cost }
    }

    /// Where the rules stand, as a part of its own.
    fn save_rules(&mut self, draft: &mut Draft) -> Result<()> {
        let mut changed = std::mem::take(&mut self.rules_changed);
        self.watches.values_mut().for_each(|watch| changed |= std::mem::take(&mut watch.changed));
        if self.watches.values().all(|watch| watch.standing.is_empty() && watch.trouble.is_none()) {
            return Ok(());
        }
        let standing = self.watches.iter().map(|(rule, watch)| (rule.clone(), watch.standing.clone()));
        let trouble = self.watches.iter().filter_map(|(rule, watch)| Some((rule.clone(), watch.trouble.clone()?)));
        let rules = || SavedRules { standing: standing.collect(), trouble: trouble.collect() };
        draft.put(checkpoint::RULES, changed, || Ok(Content::json(&rules())))
    }

    fn restore_rules(&mut self, saved: SavedRules) {
        // of a rule that is gone nothing may be there when another one of its name comes
        self.rules_changed = saved.standing.keys().chain(saved.trouble.keys()).any(|n| !self.watches.contains_key(n));
        for (rule, standing) in saved.standing {
            if let Some(watch) = self.watches.get_mut(&rule) {
                watch.standing = standing;
            }
        }
        for (rule, trouble) in saved.trouble {
            if let Some(watch) = self.watches.get_mut(&rule) {
                watch.trouble = Some(trouble);
            }
        }
        self.watches.values_mut().for_each(|watch| watch.changed = false);
    }

    /// Final rows of `upstream`, the metric this one reads, which has closed all windows up to `closed`.
    fn absorb(&mut self, upstream: &Program, closed: Micros, rows: &[Rows], out: &mut Vec<Produced>) -> Result<()> {
        for rows in rows {
            let (batch, revisions, withdrawn) = over::rows_after(rows, self.since)?;
            if batch.num_rows() == 0 && withdrawn.is_none() {
                continue;
            }
            let events = upstream.as_events(&batch)?;
            match &mut self.metric {
                Computation::Rows(metric) => metric.absorb(&events, &revisions, withdrawn.as_ref(), out)?,
                Computation::Rollup(rollup) => {
                    let mut rows = Vec::new();
                    rollup.absorb(&events, &revisions, withdrawn.as_ref(), &mut rows)?;
                    out.extend(rows.into_iter().map(|rows| Produced { rows, is_newest: true }));
                }
                Computation::Windows(_) | Computation::Joined(_) => {
                    return exec_err!("a metric over events takes no rows");
                }
            }
        }
        match &mut self.metric {
            Computation::Rows(metric) => metric.advance(closed),
            Computation::Rollup(rollup) => {
                let mut rows = Vec::new();
                let result = rollup.advance(closed, &mut rows);
                out.extend(rows.into_iter().map(|rows| Produced { rows, is_newest: true }));
                result
            }
            Computation::Windows(_) | Computation::Joined(_) => Ok(()),
        }
    }

    /// Shows the rules the final rows that came, keeps all, and stops the metric where `result` is an error.
    fn take(
        &mut self,
        name: &ItemName,
        produced: impl Iterator<Item = Produced>,
        result: Result<()>,
        out: &mut Outputs,
    ) {
        for Produced { rows, is_newest } in produced {
            // a correction far back says nothing about where things stand now
            if is_newest && rows.revisions.is_some() {
                self.show(&rows, Micros::MAX, out);
            }
            out.rows.push(MetricRows { metric: name.clone(), rows });
        }
        self.stop_at(name, result, out);
    }

    /// Shows the rules the rows of open windows that changed since they last looked, now that event time has come to
    /// `frontier`.
    fn look(&mut self, name: &ItemName, frontier: Option<Micros>, out: &mut Outputs) {
        if self.watches.is_empty() || self.failure.is_some() {
            return;
        }
        if let Some(frontier) = frontier
            && let Some(state) = self.metric.windows_mut()
        {
            let mut changed = Vec::new();
            let result = state.look(frontier, &mut changed);
            changed.iter().for_each(|rows| self.show(rows, frontier, out));
            self.stop_at(name, result, out);
        }
        let settled = self.metric.closed().minus(self.metric.lateness());
        self.watches.values_mut().for_each(|watch| watch.forget(settled));
    }

    fn show(&mut self, rows: &Rows, frontier: Micros, out: &mut Outputs) {
        if self.watches.is_empty() {
            return;
        }
        let mut verdict = Verdict::default();
        let view = View { program: self.metric.program(), rows, frontier };
        self.watches.values_mut().for_each(|watch| watch.observe(&view, &mut verdict));
        out.alerts.extend(verdict.changes);
        out.trouble.extend(verdict.trouble);
    }

    fn stop_at(&mut self, name: &ItemName, result: Result<()>, out: &mut Outputs) {
        match result {
            Ok(()) => {}
            Err(DataFusionError::ResourcesExhausted(reason)) => self.stop(name, Cause::StateLimit, reason, out),
            Err(error) => self.stop(name, Cause::MetricFailed, error.to_string(), out),
        }
    }

    /// Takes note of what a batch cost and may have added.
    fn took(&mut self, came: Came, time: Duration) {
        self.cost.add(came.rows, time);
        let joined = match &mut self.metric {
            Computation::Joined(joined) => joined.take_rows(),
            _ => 0,
        };
        self.gauge.took(came.rows.max(joined), came.bytes);
    }

    fn stop(&mut self, name: &ItemName, cause: Cause, reason: String, out: &mut Outputs) {
        match self.metric.emptied() {
            Ok(metric) => (self.metric, self.gauge) = (metric, Gauge::default()),
            Err(error) => debug_assert!(false, "{error}"), // it was made of the same parts before
        }
        let stop = Stop { cause, reason };
        self.failure = Some(stop.clone());
        out.failures.push(Failure { metric: name.clone(), stop });
    }
}

/// The size of what a metric takes in at once.
#[derive(Clone, Copy)]
struct Came {
    rows: usize,
    bytes: usize,
}

impl Came {
    fn of(rows: &[Rows]) -> Came {
        let bytes = rows.iter().map(|rows| rows.batch.get_array_memory_size());
        Came { rows: rows.iter().map(|rows| rows.batch.num_rows()).sum(), bytes: bytes.sum() }
    }
}

fn since(stopwatch: Option<Stopwatch>, began: Option<Duration>) -> Duration {
    stopwatch.zip(began).map_or(Duration::ZERO, |(now, began)| now().saturating_sub(began))
}

/// What is wrong with a circle of metrics that [`Workspace::cycle`] found.
pub fn in_a_circle(cycle: &[ItemName]) -> String {
    let path: Vec<String> = cycle.iter().map(|name| format!("`{name}`")).collect();
    format!("metrics would read their own rows: {}", path.join(" reads "))
}

/// How long event time may run ahead when a stream idles: the default of `idle_timeout`.
pub const IDLE_TIMEOUT: Span = Span::seconds(30);
