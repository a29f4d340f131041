//! One workspace: event time of its streams, its metrics and alert rules, and the prices it has seen.

use crate::alert::{Change, Rule, Standing, Watch};
use crate::event::{ItemName, Micros, Span, StreamName};
use crate::metric::{Metric, RestoreError, Rows, Timing};
use crate::portfolio::Prices;
use crate::program::Program;
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
    watches: BTreeMap<ItemName, Watch>,
    failure: Option<String>,
}

/// The running state of one workspace. Deterministic: the same steps give the same outputs.
#[derive(Default)]
pub struct Workspace {
    streams: BTreeMap<StreamName, StreamTime>,
    metrics: BTreeMap<ItemName, Entry>,
    prices: Prices,
}

/// The stream whose trades set last prices.
const TRADES: &str = "market.trades";

impl Workspace {
    /// Starts a metric with empty state, or replaces its definition and state.
    pub fn define(&mut self, name: ItemName, version: i64, program: Arc<Program>, timing: Timing) -> Result<()> {
        let metric = Metric::new(program, timing)?;
        self.metrics.insert(name, Entry { version, metric, watches: BTreeMap::new(), failure: None });
        Ok(())
    }

    /// Takes over the metrics of `other` with their state, computed elsewhere over the same log.
    pub fn adopt(&mut self, other: Workspace) {
        self.metrics.extend(other.metrics);
        for (stream, time) in other.streams {
            let mine = self.streams.entry(stream).or_default();
            mine.frontier = mine.frontier.max(time.frontier);
        }
    }

    /// Forgets a metric, its state and its rules.
    pub fn remove(&mut self, name: &ItemName) {
        self.metrics.remove(name);
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
        self.each(stream, &mut out, |name, metric, rows| {
            let mut dropped = Vec::new();
            metric.absorb(batch, before, rows, &mut dropped)?;
            dropped.into_iter().for_each(|row| _ = late.entry(row).or_insert_with(|| name.clone()));
            metric.advance(after.minus(metric.timing().max_delay), rows)
        });
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
        self.each(stream, &mut out, |_, metric, rows| metric.advance(after.minus(metric.timing().max_delay), rows));
        out
    }

    /// Provisional rows of `metric` that changed since its last tick.
    pub fn tick(&mut self, metric: &ItemName) -> Outputs {
        let mut out = Outputs::default();
        let Some(stream) = self.metrics.get(metric).map(|entry| entry.metric.program().stream().clone()) else {
            return out;
        };
        let Some(frontier) = self.frontier(&stream) else { return out };
        self.each(
            &stream,
            &mut out,
            |name, state, rows| if name == metric { state.tick(frontier, rows) } else { Ok(()) },
        );
        out
    }

    /// Rows of `metric` that are not final yet; empty for an unknown metric.
    pub fn live(&mut self, metric: &ItemName) -> Result<Vec<Rows>> {
        let Some(entry) = self.metrics.get_mut(metric) else { return Ok(Vec::new()) };
        let stream = entry.metric.program().stream();
        let Some(frontier) = self.streams.get(stream).and_then(|time| time.frontier) else { return Ok(Vec::new()) };
        entry.metric.live(frontier)
    }

    /// Event time at which the next window over `stream` would close, if any is open.
    pub fn next_close(&self, stream: &StreamName) -> Option<Micros> {
        let over = self.metrics.values().filter(|e| e.failure.is_none() && e.metric.program().stream() == stream);
        over.filter_map(|e| Some(e.metric.next_end()?.plus(e.metric.timing().max_delay))).min()
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
        self.metrics.values().map(|entry| entry.metric.bytes()).sum()
    }

    /// Runs `work` on every healthy metric over `stream` and shows its rules what came of it.
    fn each(
        &mut self,
        stream: &StreamName,
        out: &mut Outputs,
        mut work: impl FnMut(&ItemName, &mut Metric, &mut Vec<Rows>) -> Result<()>,
    ) {
        let now = self.streams.get(stream).and_then(|time| time.frontier).unwrap_or(Micros::MIN);
        for (name, entry) in &mut self.metrics {
            if entry.failure.is_some() || entry.metric.program().stream() != stream {
                continue;
            }
            let mut rows = Vec::new();
            let mut result = work(name, &mut entry.metric, &mut rows);
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
            metrics.push(SavedMetric {
                name: name.clone(),
                version: entry.version,
                closed,
                failure: entry.failure.clone(),
                lengths: [panes.len(), revisions.len()],
                standing: entry.watches.iter().map(|(rule, watch)| (rule.clone(), watch.standing.clone())).collect(),
            });
            blobs.extend([panes, revisions]);
        }
        let header = Header { streams: self.streams.clone(), metrics, prices: self.prices.clone() };
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
        let mut fresh: Vec<ItemName> = Vec::new();
        let mut states: HashMap<ItemName, (SavedMetric, RecordBatch, RecordBatch)> =
            saved.states.into_iter().map(|state| (state.0.name.clone(), state)).collect();
        for (name, entry) in &mut self.metrics {
            let Some((state, panes, revisions)) = states.remove(name).filter(|(s, ..)| s.version == entry.version)
            else {
                fresh.push(name.clone());
                continue;
            };
            let (program, timing) = (entry.metric.program().clone(), entry.metric.timing());
            match Metric::restore(program, timing, state.closed, &panes, &revisions) {
                Ok(metric) => entry.metric = metric,
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
    prices: Prices,
}

#[derive(Serialize, Deserialize)]
struct SavedMetric {
    name: ItemName,
    version: i64,
    closed: Micros,
    failure: Option<String>,
    lengths: [usize; 2],
    standing: BTreeMap<ItemName, HashMap<String, Standing>>,
}

/// Saved state of a workspace, read but not yet put under its metrics.
pub struct Saved {
    header: Header,
    states: Vec<(SavedMetric, RecordBatch, RecordBatch)>,
}

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
        for metric in std::mem::take(&mut header.metrics) {
            let mut blob = |length| {
                let (blob, after) = rest.split_at_checked(length).ok_or_else(|| damaged("cut short in its batches"))?;
                rest = after;
                from_ipc(blob)
            };
            let (panes, revisions) = (blob(metric.lengths[0])?, blob(metric.lengths[1])?);
            states.push((metric, panes, revisions));
        }
        Ok(Saved { header, states })
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
