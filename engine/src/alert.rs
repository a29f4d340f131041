//! Alert rules over a metric's rows, and which of them are firing.
//!
//! A rule looks at every final row as it becomes so and, after each batch of the log, at the rows of open windows that
//! the batch changed. So the log alone decides what fires, not how often somebody looked.

use crate::event::{ItemName, Micros, Span};
use crate::metric::Rows;
use crate::program::Program;
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion_common::Result;
use datafusion_physical_expr::PhysicalExpr;
use hashbrown::{HashMap, HashSet};
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
    /// Event time of this step: of a final row the end of its window, of any other how far event time had come.
    pub at: Micros,
    /// The row that decided, of [`Program::output`].
    pub row: RecordBatch,
}

/// Rows over which a rule's condition cannot be computed. They change nothing of where it stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Trouble {
    /// What the newest of them gave.
    pub reason: String,
    pub rows: u64,
}

/// Where one rule stands for one key. A key that never matched has no entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Standing {
    pub since: Micros,
    pub firing: bool,
    /// End of the newest window whose row was looked at: the rows of earlier ones say nothing about where things stand.
    #[serde(default = "long_ago")]
    seen: Micros,
    /// The condition no longer holds. Kept for the rows of the windows up to `seen` that may still come, which belong
    /// to what is over and begin nothing.
    #[serde(default)]
    over: bool,
}

fn long_ago() -> Micros {
    Micros::MIN
}

/// A rule and where it stands for each key.
pub struct Watch {
    pub(crate) rule: Rule,
    pub(crate) standing: HashMap<String, Standing>,
    pub(crate) trouble: Option<Trouble>,
    /// It stands elsewhere than at the last checkpoint.
    pub(crate) changed: bool,
    /// Nothing that is over was seen before this.
    oldest_over: Micros,
}

/// What rules are shown at once.
pub(crate) struct View<'a> {
    pub(crate) program: &'a Program,
    pub(crate) rows: &'a Rows,
    /// How far event time has come.
    pub(crate) frontier: Micros,
}

/// What rules say to it.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) changes: Vec<Change>,
    /// Of this view alone.
    pub(crate) trouble: Vec<(ItemName, Trouble)>,
}

impl Watch {
    pub(crate) fn new(rule: Rule) -> Self {
        Self { rule, standing: HashMap::new(), trouble: None, changed: false, oldest_over: Micros::MIN }
    }

    /// Evaluates the rule over new rows.
    ///
    /// A key without a new row keeps its standing: missing data never resolves an alert. Neither does a row over which
    /// the condition cannot be computed.
    pub(crate) fn observe(&mut self, view: &View, out: &mut Verdict) {
        let mut trouble = None;
        if let Err(error) = self.look(view, &mut trouble, &mut out.changes) {
            trouble = Some(Trouble { reason: error.strip_backtrace(), rows: view.rows.batch.num_rows() as u64 });
        }
        let Some(trouble) = trouble else { return };
        self.changed = true;
        let before = self.trouble.as_ref().map_or(0, |trouble| trouble.rows);
        self.trouble = Some(Trouble { rows: before + trouble.rows, ..trouble.clone() });
        out.trouble.push((self.rule.name.clone(), trouble));
    }

    fn look(&mut self, view: &View, trouble: &mut Option<Trouble>, out: &mut Vec<Change>) -> Result<()> {
        let batch = &view.rows.batch;
        let holds = self.holds(batch, trouble);
        // most rows match no rule, and no text is made for those
        if self.standing.is_empty() && holds.true_count() == 0 {
            return Ok(());
        }
        let labels = Labels::new(view.program, batch)?;
        let ends = batch.column(1).as_primitive::<TimestampMicrosecondType>().values();
        let is_final = view.rows.revisions.is_some();
        for row in (0..batch.num_rows()).filter(|&row| holds.is_valid(row)) {
            let end = Micros(ends[row]);
            let at = if is_final { end } else { end.min(view.frontier) };
            let Some((phase, since, at)) = self.step(labels.key(row), holds.value(row), end, at) else { continue };
            out.push(Change {
                rule: self.rule.name.clone(),
                metric: self.rule.metric.clone(),
                severity: self.rule.severity.clone(),
                labels: labels.pairs(row),
                phase,
                since,
                at,
                row: batch.slice(row, 1),
            });
        }
        Ok(())
    }

    /// Where the rule stands for `key` after a row of the window that ends at `end`: what changed, the episode's
    /// beginning, and the time of the change.
    fn step(&mut self, key: String, holds: bool, end: Micros, at: Micros) -> Option<(Phase, Micros, Micros)> {
        let hold = self.rule.hold;
        let fresh = Standing { since: at, firing: hold <= Span::ZERO, seen: end, over: false };
        let Some(standing) = self.standing.get_mut(&key) else {
            if holds {
                self.changed = true;
                self.standing.insert(key, fresh);
            }
            return (holds && fresh.firing).then_some((Phase::Firing, at, at));
        };
        if standing.over {
            if !holds || end <= standing.seen {
                return None;
            }
            *standing = fresh;
            self.changed = true;
            return fresh.firing.then_some((Phase::Firing, at, at));
        }
        if end < standing.seen {
            return None;
        }
        self.changed = true;
        let (since, at) = (standing.since, at.max(standing.since));
        if holds {
            standing.seen = end;
            let due = !standing.firing && at.since(since) >= hold;
            standing.firing |= due;
            return due.then_some((Phase::Firing, since, at));
        }
        let was_firing = standing.firing;
        // a window that may hold again is not among those that are over
        (standing.over, standing.firing, standing.seen) = (true, false, standing.seen.min(end.minus(Span(1))));
        self.oldest_over = self.oldest_over.min(standing.seen);
        was_firing.then_some((Phase::Resolved, since, at))
    }

    /// Whether the condition holds in each row; NULL where it cannot be computed.
    fn holds(&self, batch: &RecordBatch, trouble: &mut Option<Trouble>) -> BooleanArray {
        let evaluate = |batch: &RecordBatch| -> Result<BooleanArray> {
            let holds = self.rule.condition.evaluate(batch)?.into_array(batch.num_rows())?;
            let holds = holds.as_boolean();
            Ok((0..holds.len()).map(|row| Some(holds.is_valid(row) && holds.value(row))).collect())
        };
        evaluate(batch).unwrap_or_else(|_| {
            // some rows do it: the others count
            let one = |row| match evaluate(&batch.slice(row, 1)) {
                Ok(holds) => Some(holds.value(0)),
                Err(error) => {
                    let rows = trouble.as_ref().map_or(0, |trouble| trouble.rows) + 1;
                    *trouble = Some(Trouble { reason: error.strip_backtrace(), rows });
                    None
                }
            };
            (0..batch.num_rows()).map(one).collect()
        })
    }

    /// Goes on from where `before`, an earlier definition of this rule, stood. Of another condition only what fires is
    /// taken over, and only where `live`, the rows of open windows, the first to end first, say that it holds.
    pub(crate) fn succeed(&mut self, before: &Watch, program: &Program, live: &[Rows]) -> Result<()> {
        if *before.rule.condition == *self.rule.condition && before.rule.hold == self.rule.hold {
            (self.standing, self.trouble) = (before.standing.clone(), before.trouble.clone());
            self.oldest_over = before.oldest_over;
            return Ok(());
        }
        if before.firing().next().is_none() {
            return Ok(());
        }
        let mut known = HashSet::new();
        for rows in live.iter().rev() {
            let (labels, holds) = (Labels::new(program, &rows.batch)?, self.holds(&rows.batch, &mut None));
            for row in (0..rows.batch.num_rows()).rev() {
                let key = labels.key(row);
                let fires = before.standing.get(&key).filter(|standing| standing.firing);
                let holds = holds.is_valid(row) && holds.value(row);
                if let Some(standing) = fires.filter(|_| known.insert(key.clone()) && holds) {
                    self.standing.insert(key, *standing);
                }
            }
        }
        Ok(())
    }

    /// Forgets what is over where no row of a window up to `settled` comes any more.
    pub(crate) fn forget(&mut self, settled: Micros) {
        if settled <= self.oldest_over {
            return;
        }
        let before = self.standing.len();
        self.standing.retain(|_, standing| !standing.over || standing.seen >= settled);
        self.changed |= self.standing.len() < before;
        let over = self.standing.values().filter(|standing| standing.over).map(|standing| standing.seen);
        self.oldest_over = over.min().unwrap_or(Micros::MAX);
    }

    /// Keys it fires for.
    pub(crate) fn firing(&self) -> impl Iterator<Item = &str> {
        self.standing.iter().filter(|(_, standing)| standing.firing).map(|(key, _)| key.as_str())
    }
}

/// Key columns of rows as text.
pub struct Labels<'a> {
    columns: Vec<(&'a str, &'a ArrayRef, ArrayFormatter<'a>)>,
}

const TEXT: FormatOptions<'static> = FormatOptions::new().with_null("null");

impl<'a> Labels<'a> {
    /// `batch` has the schema of [`Program::output`].
    pub fn new(program: &Program, batch: &'a RecordBatch) -> Result<Self> {
        let columns = (2..2 + program.key_count())
            .map(|at| {
                let name = batch.schema_ref().field(at).name().as_str();
                // the schema lives as long as the batch that is borrowed
                Ok((name, batch.column(at), ArrayFormatter::try_new(batch.column(at), &TEXT)?))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { columns })
    }

    /// The key values joined with `|`, as clients see them; empty without keys. A text has `\` before its `|` and
    /// `\`, and before the whole where it reads `null`, which else stands for NULL: two keys are never one.
    pub fn key(&self, row: usize) -> String {
        let mut key = String::new();
        for (at, (_, values, column)) in self.columns.iter().enumerate() {
            if at > 0 {
                key.push('|');
            }
            let text = column.value(row).to_string();
            if text == "null" && values.is_valid(row) {
                key.push('\\');
            }
            for c in text.chars() {
                if matches!(c, '|' | '\\') {
                    key.push('\\');
                }
                key.push(c);
            }
        }
        key
    }

    /// Names and values of the key columns.
    pub fn pairs(&self, row: usize) -> Vec<(String, String)> {
        self.columns.iter().map(|(name, _, column)| ((*name).to_owned(), column.value(row).to_string())).collect()
    }
}
