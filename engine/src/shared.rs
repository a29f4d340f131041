//! What several metrics do alike with one batch, done once: WHERE, the numbers of keys, arguments, and rows by pane.

use crate::event::{Micros, Span};
use crate::key::{Interned, KeyId, Keys, WeakTable};
use crate::metric::{Frame, bounds, times};
use crate::program::{Arguments, Program};
use crate::runs::Grouped;
use arrow::array::{ArrayRef, BooleanArray, RecordBatch};
use arrow::compute;
use datafusion_common::Result;
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::expressions::Column;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The rows of each pane by key, in order of panes.
pub(crate) type Split = Vec<(Micros, Grouped)>;

/// Rows that a metric takes in, with what was found out about them.
pub(crate) struct Front {
    pub(crate) rows: RecordBatch,
    keys: Interned,
    arguments: Computed,
    splits: Vec<(Span, Arc<Split>)>,
}

impl Front {
    pub(crate) fn new(program: &Program, keys: &Keys, rows: RecordBatch) -> Result<Front> {
        let keys = Interned::new(keys, &program.keys_of(&rows)?, rows.num_rows())?;
        Ok(Front { rows, keys, arguments: Computed::default(), splits: Vec::new() })
    }

    /// The key of each row.
    pub(crate) fn ids(&self) -> &[KeyId] {
        &self.keys.ids
    }

    pub(crate) fn arguments(&mut self, program: &Program) -> Result<Vec<Arguments>> {
        program.arguments(&self.rows, &mut self.arguments)
    }

    /// The rows by panes of this width; `keys` are those it was made with.
    pub(crate) fn split(&mut self, keys: &Keys, width: Span) -> Arc<Split> {
        if let Some((_, split)) = self.splits.iter().find(|(known, _)| *known == width) {
            return split.clone();
        }
        let panes = split_by_pane(times(&self.rows), width);
        let grouped = |(start, rows): (_, Option<Vec<u32>>)| (start, keys.group(self.ids(), rows.as_deref()));
        let split = Arc::new(panes.into_iter().map(grouped).collect::<Split>());
        self.splits.push((width, split.clone()));
        split
    }
}

/// Values of expressions over one batch.
#[derive(Default)]
pub(crate) struct Computed(Vec<(Arc<dyn PhysicalExpr>, ArrayRef)>);

impl Computed {
    pub(crate) fn get(&mut self, expr: &Arc<dyn PhysicalExpr>, batch: &RecordBatch) -> Result<ArrayRef> {
        if expr.is::<Column>() {
            return expr.evaluate(batch)?.into_array(batch.num_rows()); // a reference count
        }
        if let Some((_, values)) = self.0.iter().find(|(known, _)| known == expr) {
            return Ok(values.clone());
        }
        let values = expr.evaluate(batch)?.into_array(batch.num_rows())?;
        self.0.push((expr.clone(), values.clone()));
        Ok(values)
    }
}

/// What was done with one batch so far.
#[derive(Default)]
pub(crate) struct Shared {
    bounds: Option<(Micros, Micros)>,
    done: Vec<Done>,
}

/// The same for metrics with one WHERE and one table of keys, and so over the same columns.
pub(crate) struct Done {
    table: WeakTable,
    filter: Option<Arc<dyn PhysicalExpr>>,
    /// Rows that WHERE keeps; `None` keeps all.
    pub(crate) keep: Option<BooleanArray>,
    front: Option<Front>,
}

impl Shared {
    /// The earliest and latest of the batch's event times.
    pub(crate) fn bounds(&mut self, ts: &[i64]) -> (Micros, Micros) {
        *self.bounds.get_or_insert_with(|| bounds(ts))
    }

    /// What was done with `batch` for metrics like this one.
    pub(crate) fn done(&mut self, frame: &Frame, batch: &RecordBatch) -> Result<&mut Done> {
        let (program, keys) = (&frame.program, &frame.keys);
        let filter = &program.parts.filter;
        let at = match self.done.iter().position(|done| keys.are_of(&done.table) && done.filter == *filter) {
            Some(at) => at,
            None => {
                let (table, filter, keep) = (keys.table(), filter.clone(), program.selected(batch)?);
                self.done.push(Done { table, filter, keep, front: None });
                self.done.len() - 1
            }
        };
        Ok(&mut self.done[at])
    }
}

impl Done {
    /// The rows of `batch` that WHERE keeps.
    pub(crate) fn front(&mut self, frame: &Frame, batch: &RecordBatch) -> Result<&mut Front> {
        if self.front.is_none() {
            let rows = match &self.keep {
                Some(keep) => compute::filter_record_batch(batch, keep)?,
                None => batch.clone(),
            };
            self.front = Some(Front::new(&frame.program, &frame.keys, rows)?);
        }
        Ok(self.front.as_mut().expect("made above"))
    }
}

/// The rows of each pane, in order of panes; `None` stands for all rows, the usual case.
fn split_by_pane(ts: &[i64], width: Span) -> Vec<(Micros, Option<Vec<u32>>)> {
    let (low, high) = bounds(ts);
    let first = low.pane_start(width);
    if high.pane_start(width) == first {
        return vec![(first, None)];
    }
    let mut panes: BTreeMap<Micros, Vec<u32>> = BTreeMap::new();
    let (mut at, mut last) = (first, panes.entry(first).or_default());
    for (row, &instant) in ts.iter().enumerate() {
        // neighbours are mostly in one pane, which a comparison tells where a division would
        if instant.wrapping_sub(at.0) as u64 >= width.0 as u64 {
            at = Micros(instant).pane_start(width);
            last = panes.entry(at).or_default();
        }
        last.push(row as u32);
    }
    panes.into_iter().filter(|(_, rows)| !rows.is_empty()).map(|(start, rows)| (start, Some(rows))).collect()
}
