//! Which alerts a rule would have raised over the events the log still holds.

use crate::definition::{RuleDefinition, SEVERITY};
use crate::fault::{Fault, FaultKind};
use crate::rows;
use crate::system::System;
use crate::workspace::{MetricInfo, timing};
use arrow::array::{AsArray, BooleanArray, PrimitiveArray, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::error::ArrowError;
use engine::alert::{Change, Phase, Rule, Trouble};
use engine::event::{ItemName, Micros, WorkspaceId};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::ops::Range;
use streams::log::{Body, Filter};

/// An alert that would have been raised. Times are event time.
#[derive(Clone, Debug, PartialEq)]
pub struct Episode {
    pub labels: Map<String, Value>,
    /// When the condition became true.
    pub started_at: Micros,
    /// When it had held as long as the rule asks.
    pub fired_at: Micros,
    /// `None`: still firing at the end of the asked time.
    pub resolved_at: Option<Micros>,
    /// The row that decided.
    pub row: Value,
}

/// What came of a backtest.
#[derive(Clone, Debug)]
pub struct Backtest {
    pub severity: String,
    /// In the order in which they fired.
    pub episodes: Vec<Episode>,
    /// Events that were looked at.
    pub events: u64,
    /// Event time of the first and the last of them.
    pub seen: Option<(Micros, Micros)>,
    /// Rows over which the rule's condition could not be computed.
    pub trouble: Option<Trouble>,
}

/// The most alerts a backtest lists: a rule that raises more is not one to keep.
const EPISODES_MAX: usize = 10_000;

impl System {
    /// Runs `definition` over the retained events whose time is in `asked`.
    ///
    /// The rule's metric starts empty at the first of them and takes in the batches of the log as they are, so a rule
    /// that was there from its first event on raised the same alerts. Nothing of the workspace changes.
    pub async fn backtest(
        &self,
        id: &WorkspaceId,
        definition: RuleDefinition,
        asked: Range<Micros>,
    ) -> Result<Backtest, Fault> {
        let known = self.metrics(id).await?;
        let find = |name: &ItemName| known.iter().find(|metric| metric.name == *name);
        let Some(metric) = find(&definition.metric) else {
            let detail = format!("there is no metric `{}` for the rule to read", definition.metric);
            return Err(Fault::new(FaultKind::NotFound, "unknown_metric", detail));
        };
        // the metric and those it reads, from the rule down to the stream
        let read = |metric: &&MetricInfo| find(&metric.program.stream().metric()?);
        let chain: Vec<&MetricInfo> = std::iter::successors(Some(metric), read).collect();
        if let Some(joined) = chain.iter().find(|metric| metric.program.is_joined()) {
            let detail = format!(
                "metric `{}` joins, and a backtest reads one stream alone; define the rule to try it",
                joined.name
            );
            return Err(Fault::invalid("unsupported", detail));
        }
        let severity = definition.severity.clone().unwrap_or_else(|| SEVERITY.to_owned());
        let rule = Rule {
            name: RULE.parse::<ItemName>().map_err(Fault::internal)?,
            metric: definition.metric.clone(),
            condition: sql::plan::condition(&definition.condition, &metric.program)?,
            hold: definition.hold.unwrap_or_default(),
            severity: severity.clone(),
        };
        let mut alone = self.empty_engine();
        let mut stream = metric.program.stream().clone();
        for MetricInfo { name, program, definition, .. } in chain.into_iter().rev() {
            alone.define(name.clone(), 0, program.clone(), timing(definition)).map_err(Fault::internal)?;
            stream = alone.root(name).unwrap_or(&stream).clone();
        }
        let name = rule.name.clone();
        alone.watch(rule).map_err(Fault::internal)?;
        let (log, from) = self.log_of(id)?;
        let filter = Filter {
            workspace: Some(id.clone()),
            stream: Some(stream.clone()),
            ts: Some(asked.start..=asked.end),
            ..Filter::default()
        };
        let work = move || -> Result<Backtest, Fault> {
            let mut found = Found::default();
            for record in log.scan(log.head().max(from), filter)? {
                let (_, record) = record?;
                let outputs = match record.body {
                    Body::Events { batch, .. } => {
                        let batch = between(&batch, &asked).map_err(Fault::internal)?;
                        found.look(&batch);
                        alone.step(&stream, &batch)
                    }
                    Body::Advance { frontier, .. } if asked.contains(&frontier) => alone.idle(&stream, frontier),
                    _ => continue,
                };
                for change in &outputs.alerts {
                    found.take(change)?;
                }
                if let Some(failure) = outputs.failures.first() {
                    return Err(Fault::invalid(failure.stop.cause.code(), failure.stop.reason.clone()));
                }
            }
            let Found { episodes, events, seen, .. } = found;
            Ok(Backtest { severity, episodes, events, seen, trouble: alone.trouble(&name).cloned() })
        };
        tokio::task::spawn_blocking(work).await.map_err(Fault::internal)?
    }
}

const RULE: &str = "backtest";

#[derive(Default)]
struct Found {
    episodes: Vec<Episode>,
    firing: HashMap<String, usize>, // by labels, its place in `episodes`
    events: u64,
    seen: Option<(Micros, Micros)>,
}

impl Found {
    fn look(&mut self, batch: &RecordBatch) {
        self.events += batch.num_rows() as u64;
        for &at in times(batch).into_iter().flat_map(|ts| ts.values()) {
            let (first, last) = self.seen.unwrap_or((Micros(at), Micros(at)));
            self.seen = Some((first.min(Micros(at)), last.max(Micros(at))));
        }
    }

    fn take(&mut self, change: &Change) -> Result<(), Fault> {
        let labels: Map<String, Value> = change.labels.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        let key = Value::Object(labels.clone()).to_string();
        match change.phase {
            Phase::Firing if self.episodes.len() >= EPISODES_MAX => {
                let detail = format!("the rule raises more than {EPISODES_MAX} alerts; ask for less time or mend it");
                Err(Fault::invalid("too_many_alerts", detail))
            }
            Phase::Firing => {
                let row = rows::json_lines(&change.row).ok().and_then(|mut lines| lines.pop());
                let row = row.and_then(|line| serde_json::from_str(&line).ok()).unwrap_or(Value::Null);
                self.firing.insert(key, self.episodes.len());
                let (started_at, fired_at) = (change.since, change.at);
                self.episodes.push(Episode { labels, started_at, fired_at, resolved_at: None, row });
                Ok(())
            }
            Phase::Resolved => {
                if let Some(at) = self.firing.remove(&key) {
                    self.episodes[at].resolved_at = Some(change.at);
                }
                Ok(())
            }
        }
    }
}

fn times(batch: &RecordBatch) -> Option<&PrimitiveArray<TimestampMicrosecondType>> {
    batch.column_by_name("ts")?.as_primitive_opt()
}

/// The events whose time is in `asked`.
fn between(batch: &RecordBatch, asked: &Range<Micros>) -> Result<RecordBatch, ArrowError> {
    let Some(ts) = times(batch) else { return Ok(batch.clone()) };
    let keep: BooleanArray = ts.values().iter().map(|&at| Some(asked.contains(&Micros(at)))).collect();
    arrow::compute::filter_record_batch(batch, &keep)
}
