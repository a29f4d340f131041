//! One workspace: event time of its streams, its metrics and alert rules, and the prices it has seen.

use crate::alert::{Change, Rule, Standing, Watch};
use crate::event::{ItemName, Micros, Span, StreamName};
use crate::join::{Around, StreamJoin, absorb_with_tables};
use crate::metric::{Metric, RestoreError, Rows, Timing};
use crate::portfolio::Prices;
use crate::program::Program;
use crate::reference::{TableSchema, Tables};
use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::ipc::{reader::StreamReader, writer::StreamWriter};
use datafusion_common::{Result, exec_err};
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where event time stands on one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTime {
    /// Greatest event time seen, or reached by idling; `None` before the first event.
    pub frontier: Option<Micros>,
    /// Events that came so late that a metric could not take them.
    pub late: u64,
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

/// A metric that stopped, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub metric: ItemName,
    pub reason: String,
}

/// What came of a step.
#[derive(Debug, Default)]
pub struct Outputs {
    pub rows: Vec<MetricRows>,
    pub alerts: Vec<Change>,
    pub late: Vec<Late>,
    pub failures: Vec<Failure>,
    /// A trade changed a last price.
    pub prices_changed: bool,
}

struct Entry {
    /// Which definition of the metric this is; state of another one is not restored.
    version: i64,
    metric: Metric,
    /// The waiting events of a metric that joins two streams.
    join: Option<StreamJoin>,
    watches: BTreeMap<ItemName, Watch>,
    failure: Option<String>,
}

impl Entry {
    /// The event time its rows have reached; of joined streams, that of the slower one.
    fn frontier(&self, streams: &BTreeMap<StreamName, StreamTime>) -> Option<Micros> {
        let program = self.metric.program();
        let of = |stream: &StreamName| streams.get(stream)?.frontier;
        let own = of(program.stream());
        match program.joins().and_then(|joins| joins.other()) {
            None => own,
            Some((other, near)) => Some(near.frontier(own?, of(other)?)),
        }
    }

    /// Takes in a batch of one of its streams, which stood at `before`, with the others as in `streams`.
    fn absorb(
        &mut self,
        stream: &StreamName,
        batch: &RecordBatch,
        before: Micros,
        around: (&BTreeMap<StreamName, StreamTime>, &Tables),
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let (streams, tables) = around;
        let program = self.metric.program().clone();
        match (&mut self.join, program.joins()) {
            (Some(join), Some(joins)) => {
                let of = |name: &StreamName| match name == stream {
                    true => before,
                    false => streams.get(name).and_then(|time| time.frontier).unwrap_or(Micros::MIN),
                };
                let frontiers = [of(program.stream()), joins.other().map_or(Micros::MIN, |(other, _)| of(other))];
                let side = usize::from(stream != program.stream());
                join.absorb(&mut self.metric, side, batch, &Around { frontiers, tables }, out, dropped)
            }
            (_, Some(_)) => absorb_with_tables(&mut self.metric, batch, before, tables, out, dropped),
            (_, None) => self.metric.absorb(batch, before, out, dropped),
        }
    }

    /// Closes what is due now that its streams stand where `around` says.
    fn advance(&mut self, around: (&BTreeMap<StreamName, StreamTime>, &Tables), out: &mut Vec<Rows>) -> Result<()> {
        let (streams, tables) = around;
        let Some(frontier) = self.frontier(streams) else { return Ok(()) };
        let watermark = frontier.minus(self.metric.timing().max_delay);
        match &mut self.join {
            Some(join) => join.advance(&mut self.metric, watermark, tables, out),
            None => self.metric.advance(watermark, out),
        }
    }

    /// Versions of tables before this are seen by none of its events: those are in windows past their lateness.
    fn horizon(&self) -> Micros {
        let timing = self.metric.timing();
        self.metric.closed().minus(timing.allowed_lateness).minus(self.metric.program().window().size())
    }

    /// End of the next window that will close.
    fn next_end(&self) -> Option<Micros> {
        let waiting = self.join.as_ref().and_then(StreamJoin::next_end);
        [self.metric.next_end(), waiting].into_iter().flatten().min()
    }

    fn bytes(&self) -> usize {
        self.metric.bytes() + self.join.as_ref().map_or(0, StreamJoin::bytes)
    }
}

/// The running state of one workspace. Deterministic: the same steps give the same outputs.
#[derive(Default)]
pub struct Workspace {
    streams: BTreeMap<StreamName, StreamTime>,
    metrics: BTreeMap<ItemName, Entry>,
    tables: Tables,
    prices: Prices,
}

/// The stream whose trades set last prices.
const TRADES: &str = "market.trades";

impl Workspace {
    /// Starts a metric with empty state, or replaces its definition and state.
    pub fn define(&mut self, name: ItemName, version: i64, program: Arc<Program>, timing: Timing) -> Result<()> {
        let join = StreamJoin::new(&program)?;
        let metric = Metric::new(program, timing)?;
        self.metrics.insert(name, Entry { version, metric, join, watches: BTreeMap::new(), failure: None });
        self.index_tables()
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
        Ok(Workspace { tables: self.tables.before(offset)?, ..Workspace::default() })
    }

    /// Metrics that join `table`.
    pub fn readers_of(&self, table: &StreamName) -> impl Iterator<Item = &ItemName> {
        let reads = move |entry: &Entry| entry.metric.program().tables().any(|read| read == table);
        self.metrics.iter().filter(move |(_, entry)| reads(entry)).map(|(name, _)| name)
    }

    /// Tables forget versions that no metric can see any more. One that no metric reads keeps what the stream
    /// furthest behind may still ask for, should a metric come.
    fn prune_tables(&mut self) {
        if self.tables.bytes() == 0 {
            return;
        }
        let mut horizons: BTreeMap<StreamName, Micros> = BTreeMap::new();
        for entry in self.metrics.values().filter(|entry| entry.failure.is_none()) {
            for table in entry.metric.program().tables() {
                let horizon = horizons.entry(table.clone()).or_insert(Micros::MAX);
                *horizon = (*horizon).min(entry.horizon());
            }
        }
        for (table, horizon) in horizons {
            self.tables.prune(&table, horizon);
        }
    }

    /// Takes over the metrics of `other` with their state, computed elsewhere over the same log.
    pub fn adopt(&mut self, other: Workspace) {
        self.metrics.extend(other.metrics);
        if let Err(error) = self.index_tables() {
            debug_assert!(false, "{error}");
        }
        for (stream, time) in other.streams {
            let mine = self.streams.entry(stream).or_default();
            mine.frontier = mine.frontier.max(time.frontier);
        }
    }

    /// Forgets a metric, its state and its rules.
    pub fn remove(&mut self, name: &ItemName) {
        self.metrics.remove(name);
        _ = self.index_tables(); // only drops indexes: those in use are there
    }

    /// Starts or replaces a rule; its standing starts anew.
    pub fn watch(&mut self, rule: Rule) -> Result<()> {
        self.unwatch(&rule.name);
        let Some(entry) = self.metrics.get_mut(&rule.metric) else {
            return exec_err!("alert rule `{}` reads metric `{}`, which is not defined", rule.name, rule.metric);
        };
        entry.watches.insert(rule.name.clone(), Watch::new(rule));
        Ok(())
    }

    /// Forgets a rule.
    pub fn unwatch(&mut self, rule: &ItemName) {
        self.metrics.values_mut().for_each(|entry| _ = entry.watches.remove(rule));
    }

    /// Takes in one batch of a stream. Final rows come out; provisional ones wait for [`Workspace::tick`].
    pub fn step(&mut self, stream: &StreamName, batch: &RecordBatch) -> Outputs {
        let mut out = Outputs::default();
        let Some(ts) = batch.column_by_name("ts").and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>()) else {
            return out;
        };
        let Some(highest) = ts.values().iter().max().map(|&at| Micros(at)) else { return out };
        if stream.as_str() == TRADES {
            out.prices_changed = self.prices.absorb(batch);
        }
        let time = self.streams.entry(stream.clone()).or_default();
        let before = time.frontier.unwrap_or(Micros::MIN);
        let after = before.max(highest);
        time.frontier = Some(after);
        let mut late: BTreeMap<u32, ItemName> = BTreeMap::new();
        self.each(stream, &mut out, |name, entry, around, rows| {
            let mut dropped = Vec::new();
            entry.absorb(stream, batch, before, around, rows, &mut dropped)?;
            dropped.into_iter().for_each(|row| _ = late.entry(row).or_insert_with(|| name.clone()));
            entry.advance(around, rows)
        });
        self.prune_tables();
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
        self.each(stream, &mut out, |_, entry, around, rows| entry.advance(around, rows));
        self.prune_tables();
        out
    }

    /// Provisional rows of `metric` that changed since its last tick.
    pub fn tick(&mut self, metric: &ItemName) -> Outputs {
        let mut out = Outputs::default();
        let Some(entry) = self.metrics.get(metric) else { return out };
        let (stream, Some(frontier)) = (entry.metric.program().stream().clone(), entry.frontier(&self.streams)) else {
            return out;
        };
        self.each(
            &stream,
            &mut out,
            |name, entry, _, rows| {
                if name == metric { entry.metric.tick(frontier, rows) } else { Ok(()) }
            },
        );
        out
    }

    /// Rows of `metric` that are not final yet; empty for an unknown metric.
    pub fn live(&mut self, metric: &ItemName) -> Result<Vec<Rows>> {
        let Some(entry) = self.metrics.get_mut(metric) else { return Ok(Vec::new()) };
        let Some(frontier) = entry.frontier(&self.streams) else { return Ok(Vec::new()) };
        entry.metric.live(frontier)
    }

    /// Event time at which the next window over `stream` would close, if any is open.
    pub fn next_close(&self, stream: &StreamName) -> Option<Micros> {
        let now = self.frontier(stream);
        let closes = self.metrics.values().filter(|e| e.failure.is_none()).filter_map(|entry| {
            let program = entry.metric.program();
            let due = entry.next_end()?.plus(entry.metric.timing().max_delay);
            if program.stream() == stream {
                return Some(due).filter(|due| entry.join.is_none() || now < Some(*due));
            }
            let (other, near) = program.joins()?.other()?;
            (other == stream).then(|| near.right_for(due)).filter(|due| now < Some(*due))
        });
        closes.min()
    }

    /// How far a stream without events may follow those it is joined with, while they wait for it.
    pub fn followed(&self, stream: &StreamName) -> Option<Micros> {
        let reached = self.metrics.values().filter(|e| e.failure.is_none()).filter_map(|entry| {
            entry.next_end()?;
            let program = entry.metric.program();
            let (other, near) = program.joins()?.other()?;
            if program.stream() == stream {
                return self.frontier(other).map(|right| near.frontier(Micros::MAX, right));
            }
            (other == stream).then(|| self.frontier(program.stream()).map(|left| near.right_for(left)))?
        });
        reached.max()
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
    pub fn metrics(&self) -> impl Iterator<Item = (&ItemName, &Metric)> {
        self.metrics.iter().map(|(name, entry)| (name, &entry.metric))
    }

    /// Why a metric stopped; `None` while it runs.
    pub fn failure(&self, metric: &ItemName) -> Option<&str> {
        self.metrics.get(metric)?.failure.as_deref()
    }

    pub fn prices(&self) -> &Prices {
        &self.prices
    }

    /// Bytes of metric state on the heap.
    pub fn bytes(&self) -> usize {
        self.metrics.values().map(Entry::bytes).sum::<usize>() + self.tables.bytes()
    }

    /// Bytes of the state of one metric, with the events that wait to be joined.
    pub fn bytes_of(&self, metric: &ItemName) -> usize {
        self.metrics.get(metric).map_or(0, Entry::bytes)
    }

    /// Events that wait to be joined in one metric.
    pub fn waiting(&self, metric: &ItemName) -> usize {
        self.metrics.get(metric).and_then(|entry| entry.join.as_ref()).map_or(0, StreamJoin::events)
    }

    /// Runs `work` on every healthy metric over `stream` and shows its rules what came of it.
    fn each(
        &mut self,
        stream: &StreamName,
        out: &mut Outputs,
        mut work: impl FnMut(
            &ItemName,
            &mut Entry,
            (&BTreeMap<StreamName, StreamTime>, &Tables),
            &mut Vec<Rows>,
        ) -> Result<()>,
    ) {
        let Self { streams, metrics, tables, .. } = self;
        for (name, entry) in metrics {
            if entry.failure.is_some() || !entry.metric.program().reads(stream) {
                continue;
            }
            let now = entry.frontier(streams).unwrap_or(Micros::MIN);
            let mut rows = Vec::new();
            let mut result = work(name, entry, (streams, tables), &mut rows);
            for rows in &rows {
                for watch in entry.watches.values_mut() {
                    result = result.and_then(|()| watch.observe(entry.metric.program(), rows, now, &mut out.alerts));
                }
            }
            out.rows.extend(rows.into_iter().map(|rows| MetricRows { metric: name.clone(), rows }));
            if let Err(error) = result {
                let reason = error.to_string();
                entry.failure = Some(reason.clone());
                out.failures.push(Failure { metric: name.clone(), reason });
            }
        }
    }

    /// The whole state as bytes that [`Saved::read`] understands.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        let mut blobs = Vec::new();
        let mut metrics = Vec::new();
        for (name, entry) in &mut self.metrics {
            let (closed, panes, revisions) = entry.metric.save()?;
            let (panes, revisions) = (to_ipc(&panes)?, to_ipc(&revisions)?);
            let join = match &entry.join {
                Some(join) => join.save()?.iter().map(to_ipc).collect::<Result<Vec<_>>>()?,
                None => Vec::new(),
            };
            metrics.push(SavedMetric {
                name: name.clone(),
                version: entry.version,
                closed,
                failure: entry.failure.clone(),
                lengths: [panes.len(), revisions.len()],
                join: join.iter().map(Vec::len).collect(),
                standing: entry.watches.iter().map(|(rule, watch)| (rule.clone(), watch.standing.clone())).collect(),
            });
            blobs.extend([panes, revisions]);
            blobs.extend(join);
        }
        let mut tables = Vec::new();
        for (name, rows) in self.tables.save()? {
            let rows = to_ipc(&rows)?;
            tables.push((name, rows.len()));
            blobs.push(rows);
        }
        let header = Header { streams: self.streams.clone(), metrics, tables, prices: self.prices.clone() };
        let header = serde_json::to_vec(&header).expect("plain data becomes JSON");
        let mut bytes = MAGIC.to_vec();
        bytes.extend((header.len() as u32).to_le_bytes());
        bytes.extend(header);
        blobs.iter().for_each(|blob| bytes.extend(blob));
        Ok(bytes)
    }

    /// Puts saved state under the metrics defined now. A metric that was defined again since, or whose
    /// state does not fit, is returned by name: it starts from nothing.
    pub fn restore(&mut self, saved: Saved) -> Result<Vec<ItemName>, RestoreError> {
        self.streams = saved.header.streams;
        self.prices = saved.header.prices;
        for (name, rows) in &saved.tables {
            self.tables.load(name, rows)?;
        }
        let mut fresh: Vec<ItemName> = Vec::new();
        let mut states: HashMap<ItemName, SavedState> =
            saved.states.into_iter().map(|state| (state.0.name.clone(), state)).collect();
        for (name, entry) in &mut self.metrics {
            let Some((state, panes, revisions, waiting)) =
                states.remove(name).filter(|(s, ..)| s.version == entry.version)
            else {
                fresh.push(name.clone());
                continue;
            };
            let (program, timing) = (entry.metric.program().clone(), entry.metric.timing());
            let joined = match (StreamJoin::new(&program)?, waiting.as_slice()) {
                (Some(mut join), [left, right]) => join.load([left, right]).map(|()| Some(join)),
                (None, []) => Ok(None),
                (..) => Err(RestoreError::Mismatch("another kind of join".to_owned())),
            };
            let metric = Metric::restore(program, timing, state.closed, &panes, &revisions);
            match joined.and_then(|join| Ok((join, metric?))) {
                Ok((join, metric)) => (entry.join, entry.metric) = (join, metric),
                Err(RestoreError::Mismatch(_)) => {
                    fresh.push(name.clone());
                    continue;
                }
                Err(error) => return Err(error),
            }
            entry.failure = state.failure;
            for (rule, standing) in state.standing {
                if let Some(watch) = entry.watches.get_mut(&rule) {
                    watch.standing = standing;
                }
            }
        }
        Ok(fresh)
    }
}

/// Format of saved state; a change that cannot read the old one takes a new number.
const MAGIC: &[u8; 8] = b"TWSTATE1";

#[derive(Serialize, Deserialize)]
struct Header {
    streams: BTreeMap<StreamName, StreamTime>,
    metrics: Vec<SavedMetric>,
    /// Name and length.
    #[serde(default)]
    tables: Vec<(StreamName, usize)>,
    prices: Prices,
}

#[derive(Serialize, Deserialize)]
struct SavedMetric {
    name: ItemName,
    version: i64,
    closed: Micros,
    failure: Option<String>,
    lengths: [usize; 2],
    /// Of the waiting events of a join.
    #[serde(default)]
    join: Vec<usize>,
    standing: BTreeMap<ItemName, HashMap<String, Standing>>,
}

/// Saved state of a workspace, read but not yet put under its metrics.
pub struct Saved {
    header: Header,
    states: Vec<SavedState>,
    tables: Vec<(StreamName, RecordBatch)>,
}

/// A metric, its panes, its revisions and the waiting events of its join.
type SavedState = (SavedMetric, RecordBatch, RecordBatch, Vec<RecordBatch>);

impl Saved {
    /// Reads what [`Workspace::save`] wrote; an error means another version or damage, never a guess.
    pub fn read(bytes: &[u8]) -> Result<Saved, RestoreError> {
        let damaged = |what: &str| RestoreError::Mismatch(what.to_owned());
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("another format version"))?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("cut short in its header"))?;
        let (header, mut rest) = rest
            .split_at_checked(u32::from_le_bytes(*length) as usize)
            .ok_or_else(|| damaged("cut short in its header"))?;
        let mut header: Header = serde_json::from_slice(header).map_err(|e| damaged(&format!("header: {e}")))?;
        let mut states = Vec::new();
        let mut blob = |length| {
            let (blob, after) = rest.split_at_checked(length).ok_or_else(|| damaged("cut short in its batches"))?;
            rest = after;
            from_ipc(blob)
        };
        for metric in std::mem::take(&mut header.metrics) {
            let (panes, revisions) = (blob(metric.lengths[0])?, blob(metric.lengths[1])?);
            let waiting = metric.join.iter().map(|length| blob(*length)).collect::<Result<_, _>>()?;
            states.push((metric, panes, revisions, waiting));
        }
        let tables = std::mem::take(&mut header.tables);
        let tables = tables.into_iter().map(|(name, length)| Ok((name, blob(length)?)));
        let tables = tables.collect::<Result<_, RestoreError>>()?;
        Ok(Saved { header, states, tables })
    }
}

fn to_ipc(batch: &RecordBatch) -> Result<Vec<u8>> {
    let mut writer = StreamWriter::try_new(Vec::new(), batch.schema_ref())?;
    writer.write(batch)?;
    Ok(writer.into_inner()?)
}

fn from_ipc(bytes: &[u8]) -> Result<RecordBatch, RestoreError> {
    let mut reader = StreamReader::try_new(bytes, None)?;
    reader.next().ok_or_else(|| RestoreError::Mismatch("a batch is missing".to_owned()))?.map_err(Into::into)
}

/// How long event time may run ahead when a stream idles: the default of `idle_timeout`.
pub const IDLE_TIMEOUT: Span = Span::seconds(30);
