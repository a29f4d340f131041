//! Alert rules over a metric's rows, and which of them are firing.

use crate::event::{ItemName, Micros, Span};
use crate::metric::Rows;
use crate::program::Program;
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion_common::Result;
use datafusion_physical_expr::PhysicalExpr;
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A condition over the rows of a metric.
#[derive(Clone, Debug)]
pub struct Rule {
    pub name: ItemName,
    pub metric: ItemName,
    /// Boolean, over [`Program::output`]; NULL counts as false.
    pub condition: Arc<dyn PhysicalExpr>,
    /// How long, in event time, the condition must hold before the alert fires.
    pub hold: Span,
    pub severity: String,
}

/// Whether an alert began or ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Firing,
    Resolved,
}

/// One step in the life of an alert: it fired, or it was resolved.
#[derive(Clone, Debug)]
pub struct Change {
    pub rule: ItemName,
    pub metric: ItemName,
    pub severity: String,
    /// Key columns and their values: what the alert is about.
    pub labels: Vec<(String, String)>,
    pub phase: Phase,
    /// Event time at which the condition became true: with rule and labels it names the episode.
    pub since: Micros,
    /// Event time of this step.
    pub at: Micros,
    /// The row that decided, of [`Program::output`].
    pub row: RecordBatch,
}

/// Where one rule stands for one key. A key that never matched has no entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Standing {
    pub since: Micros,
    pub firing: bool,
}

/// A rule and where it stands for each key.
pub(crate) struct Watch {
    pub(crate) rule: Rule,
    pub(crate) standing: HashMap<String, Standing>,
}

impl Watch {
    pub(crate) fn new(rule: Rule) -> Self {
        Self { rule, standing: HashMap::new() }
    }

    /// Evaluates the rule over new rows, while event time stands at `now`.
    ///
    /// A key without a new row keeps its standing: missing data never resolves an alert.
    pub(crate) fn observe(&mut self, program: &Program, rows: &Rows, now: Micros, out: &mut Vec<Change>) -> Result<()> {
        let batch = &rows.batch;
        let holds = self.rule.condition.evaluate(batch)?.into_array(batch.num_rows())?;
        let holds = holds.as_boolean();
        // most rows match no rule, and no text is made for those
        if self.standing.is_empty() && holds.true_count() == 0 {
            return Ok(());
        }
        let labels = Labels::new(program, batch)?;
        for row in 0..batch.num_rows() {
            let key = labels.key(row);
            let holds = holds.is_valid(row) && holds.value(row);
            let change = match (self.standing.get_mut(&key), holds) {
                (None, false) => None,
                (None, true) => {
                    let firing = self.rule.hold <= Span::ZERO;
                    self.standing.insert(key, Standing { since: now, firing });
                    firing.then_some((Phase::Firing, now))
                }
                (Some(standing), true) => {
                    let due = !standing.firing && now.since(standing.since) >= self.rule.hold;
                    standing.firing |= due;
                    due.then_some((Phase::Firing, standing.since))
                }
                (Some(standing), false) => {
                    let ended = standing.firing.then_some((Phase::Resolved, standing.since));
                    self.standing.remove(&key);
                    ended
                }
            };
            if let Some((phase, since)) = change {
                out.push(Change {
                    rule: self.rule.name.clone(),
                    metric: self.rule.metric.clone(),
                    severity: self.rule.severity.clone(),
                    labels: labels.pairs(row),
                    phase,
                    since,
                    at: now,
                    row: batch.slice(row, 1),
                });
            }
        }
        Ok(())
    }
}

/// Key columns of rows as text.
pub struct Labels<'a> {
    columns: Vec<(&'a str, ArrayFormatter<'a>)>,
}

const TEXT: FormatOptions<'static> = FormatOptions::new().with_null("null");

impl<'a> Labels<'a> {
    /// `batch` has the schema of [`Program::output`].
    pub fn new(program: &Program, batch: &'a RecordBatch) -> Result<Self> {
        let columns = (2..2 + program.key_count())
            .map(|at| {
                let name = batch.schema_ref().field(at).name().as_str();
                // the schema lives as long as the batch that is borrowed
                Ok((name, ArrayFormatter::try_new(batch.column(at), &TEXT)?))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { columns })
    }

    /// The key values joined with `|`, as clients see them; empty without keys.
    pub fn key(&self, row: usize) -> String {
        let mut key = String::new();
        for (at, (_, column)) in self.columns.iter().enumerate() {
            if at > 0 {
                key.push('|');
            }
            key.push_str(&column.value(row).to_string());
        }
        key
    }

    /// Names and values of the key columns.
    pub fn pairs(&self, row: usize) -> Vec<(String, String)> {
        self.columns.iter().map(|(name, column)| ((*name).to_owned(), column.value(row).to_string())).collect()
    }
}
