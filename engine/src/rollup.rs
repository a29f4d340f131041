//! A metric with a window over the final rows of another one: panes as over events, and corrections of rows.
//!
//! An aggregate cannot take a row back. So while rows of a pane may still be corrected they are kept, and a correction
//! computes the pane anew from them. Where nothing is corrected (no allowed lateness) no row is kept.

use crate::checkpoint::{Content, Draft, Pieces};
use crate::event::{Micros, Span};
use crate::key::{batch_of, bytes_of_row};
use crate::metric::{Metric, PANES, REVISIONS, RestoreError, Rows, Timing};
use crate::program::Program;
use arrow::array::{AsArray, RecordBatch, UInt32Array};
use arrow::compute;
use arrow::datatypes::{Schema, TimestampMicrosecondType};
use arrow::row::{RowConverter, SortField};
use datafusion_common::{Result, exec_err};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Which row: end and start of its window, and its key.
type Place = (Micros, Micros, Box<[u8]>);

pub struct Rollup {
    metric: Metric,
    /// The metric it reads.
    upstream: Arc<Program>,
    keys: Option<RowConverter>, // none where it has no keys
    /// By pane, the rows of panes in which a row may still be corrected; one row a batch.
    kept: BTreeMap<Micros, BTreeMap<Place, RecordBatch>>,
    /// Those are others than at the last checkpoint.
    changed: bool,
}

/// The part of saved state that holds rows which may still be corrected.
const KEPT: &str = "kept";

impl Rollup {
    /// `upstream` is the metric it reads.
    pub(crate) fn new(program: Arc<Program>, timing: Timing, upstream: Arc<Program>) -> Result<Self> {
        Self::over(Metric::new(program, timing)?, upstream)
    }

    fn over(metric: Metric, upstream: Arc<Program>) -> Result<Self> {
        let fields = upstream.key_schema.fields().iter().map(|field| SortField::new(field.data_type().clone()));
        let keys = if upstream.key_count() == 0 { None } else { Some(RowConverter::new(fields.collect())?) };
        Ok(Self { metric, upstream, keys, kept: BTreeMap::new(), changed: false })
    }

    /// The same metric without state.
    pub(crate) fn emptied(&self) -> Result<Self> {
        Self::new(self.metric.program().clone(), self.metric.timing(), self.upstream.clone())
    }

    pub(crate) fn metric(&self) -> &Metric {
        &self.metric
    }

    pub(crate) fn metric_mut(&mut self) -> &mut Metric {
        &mut self.metric
    }

    /// Bytes of state on the heap, within a few percent.
    pub(crate) fn bytes(&self) -> usize {
        let kept = self.kept.values().flat_map(BTreeMap::values);
        self.metric.bytes() + kept.map(bytes_of_row).sum::<usize>()
    }

    /// Takes in final rows of the metric it reads, in the columns of [`Program::rows`], and takes those out that were
    /// `withdrawn`.
    pub(crate) fn absorb(
        &mut self,
        batch: &RecordBatch,
        revisions: &[i64],
        withdrawn: Option<&RecordBatch>,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let closed = self.metric.closed();
        if self.metric.timing().allowed_lateness.0 == 0 {
            return self.metric.take(batch);
        }
        let width = self.metric.program().window().pane();
        let pane_of = |place: &Place| place.0.minus(Span(1)).pane_start(width);
        let mut fresh: Vec<(Micros, u32)> = Vec::new();
        let mut corrected: BTreeMap<Micros, Vec<RecordBatch>> = BTreeMap::new(); // as they were, and as they are
        for place in withdrawn.map(|rows| self.places(rows, 0)).transpose()?.into_iter().flatten() {
            let pane = pane_of(&place);
            if let Some(before) = self.kept.get_mut(&pane).and_then(|rows| rows.remove(&place)) {
                self.changed = true;
                corrected.entry(pane).or_default().push(before);
            }
        }
        for (row, place) in self.places(batch, 1)?.into_iter().enumerate() {
            let (pane, is_late) = (pane_of(&place), place.0 <= closed);
            let now = batch.slice(row, 1);
            let before = self.kept.entry(pane).or_default().insert(place, now.clone());
            if before.as_ref() == Some(&now) {
                continue;
            }
            self.changed = true;
            if before.is_some() || is_late || revisions[row] > 0 {
                corrected.entry(pane).or_default().extend(before.into_iter().chain([now]));
            } else {
                fresh.push((pane, row as u32));
            }
        }
        // a pane that is computed anew has all its rows, the fresh ones too
        let fresh = fresh.into_iter().filter(|(pane, _)| !corrected.contains_key(pane)).map(|(_, row)| row);
        let fresh = compute::take_record_batch(batch, &UInt32Array::from_iter_values(fresh))?;
        for (pane, rows) in corrected {
            let corrected = compute::concat_batches(self.upstream.rows(), &rows)?;
            let kept = self.kept.get(&pane).into_iter().flat_map(BTreeMap::values);
            let whole = compute::concat_batches(self.upstream.rows(), kept)?;
            self.metric.replace(pane, &whole, &corrected, out)?;
        }
        self.metric.take(&fresh)
    }

    /// Closes windows up to `closed` and lets go of rows that can no longer be corrected.
    pub(crate) fn advance(&mut self, closed: Micros, out: &mut Vec<Rows>) -> Result<()> {
        self.metric.advance(closed, out)?;
        let (width, lateness) = (self.metric.program().window().pane(), self.metric.timing().allowed_lateness);
        let before = self.kept.len();
        self.kept.retain(|start, _| start.plus(width).plus(lateness) > closed);
        self.changed |= self.kept.len() < before;
        Ok(())
    }

    /// The places of rows that have their bounds and keys from the column `first` on.
    fn places(&self, batch: &RecordBatch, first: usize) -> Result<Vec<Place>> {
        let time = |name: &str| match batch
            .column_by_name(name)
            .and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>())
        {
            Some(column) => Ok(column.values().clone()),
            None => exec_err!("rows of `{}` have no column `{name}`", self.metric.program().stream()),
        };
        let (starts, ends) = (time("window_start")?, time("window_end")?);
        let columns = &batch.columns()[first + 2..first + 2 + self.upstream.key_count()];
        let keys = self.keys.as_ref().map(|keys| keys.convert_columns(columns)).transpose()?;
        let place = |row: usize| {
            let key = keys.as_ref().map_or_else(Box::default, |keys| keys.row(row).as_ref().into());
            (Micros(ends[row]), Micros(starts[row]), key)
        };
        Ok((0..batch.num_rows()).map(place).collect())
    }

    /// As [`Metric::save`], and the rows that are kept.
    pub(crate) fn save(&mut self, draft: &mut Draft) -> Result<()> {
        self.metric.save(draft)?;
        let changed = std::mem::take(&mut self.changed);
        if self.kept.is_empty() {
            return Ok(());
        }
        let kept = self.kept.values().flat_map(BTreeMap::values);
        draft.put(KEPT, changed, || Ok(Content::Rows(compute::concat_batches(self.upstream.rows(), kept)?)))
    }

    /// The state that [`Rollup::save`] gave, under the program and the timing there is.
    pub(crate) fn restored(&self, closed: Micros, state: Pieces) -> Result<Self, RestoreError> {
        let state = state.named(&[PANES, REVISIONS, KEPT])?;
        let metric = self.metric.emptied().restored(closed, &state)?;
        let mut rollup = Rollup::over(metric, self.upstream.clone())?;
        let Some(kept) = state.all(KEPT).next() else { return Ok(rollup) };
        let types = |s: &Schema| s.fields().iter().map(|f| f.data_type().clone()).collect::<Vec<_>>();
        if types(kept.schema_ref()) != types(self.upstream.rows()) {
            return Err(RestoreError::Mismatch(format!(
                "found {:?}, want {:?}",
                kept.schema_ref(),
                self.upstream.rows()
            )));
        }
        let width = rollup.metric.program().window().pane();
        let kept = batch_of(self.upstream.rows().clone(), kept.columns().to_vec(), kept.num_rows())?;
        for (row, place) in rollup.places(&kept, 1)?.into_iter().enumerate() {
            let pane = place.0.minus(Span(1)).pane_start(width);
            rollup.kept.entry(pane).or_default().insert(place, kept.slice(row, 1));
        }
        Ok(rollup)
    }
}
