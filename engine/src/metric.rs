//! One metric of one workspace: its panes, when its windows close, and the rows that come of it.

use crate::accumulate::{Column, Slot};
use crate::event::{Micros, Span};
use crate::key::{KeyId, KeyTable, batch_of};
use crate::program::{Arguments, Finished, Program};
use crate::window::Window;
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, TimestampMicrosecondArray, UInt32Array,
};
use arrow::compute;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, TimestampMicrosecondType};
use datafusion_common::{DataFusionError, Result, exec_err};
use hashbrown::HashMap;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// How long a metric waits for events that come out of order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// The watermark follows the greatest event time seen at this distance.
    pub max_delay: Span,
    /// How long after its end a final window may still be corrected.
    pub allowed_lateness: Span,
}

/// Rows of [`Program::output`] and what they are.
#[derive(Clone, Debug)]
pub struct Rows {
    pub batch: RecordBatch,
    /// For final rows: 0 for the first, n for the n-th correction, one for each row. `None`: provisional.
    pub revisions: Option<Vec<i64>>,
    /// Keys (the key columns only) whose earlier row of this window no longer satisfies HAVING.
    pub gone: Option<RecordBatch>,
    /// These are all rows of their window: whoever is missing has left it (`ORDER BY … LIMIT`).
    pub complete: bool,
}

/// State of a metric that no version of this engine can read.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("saved state of this metric does not fit its program: {0}; it must be computed again from the log")]
    Mismatch(String),
    #[error(transparent)]
    DataFusion(#[from] DataFusionError),
    #[error(transparent)]
    Arrow(#[from] arrow::error::ArrowError),
}

/// Aggregate state of the keys that had events in one pane of event time.
struct Pane {
    slots: HashMap<KeyId, Slot>,
    ids: Vec<KeyId>, // by slot
    columns: Vec<Column>,
    changed: Vec<Slot>, // since the last tick
    is_changed: Vec<bool>,
}

impl Pane {
    fn new(program: &Program) -> Self {
        let columns = program.kinds.iter().map(|kind| kind.column()).collect();
        Self { slots: HashMap::new(), ids: Vec::new(), columns, changed: Vec::new(), is_changed: Vec::new() }
    }

    fn slot(&mut self, id: KeyId, keys: &mut KeyTable) -> Slot {
        *self.slots.entry(id).or_insert_with(|| {
            keys.hold(id);
            self.ids.push(id);
            self.is_changed.push(false);
            (self.ids.len() - 1) as Slot
        })
    }

    fn touch(&mut self, slot: Slot) {
        if !std::mem::replace(&mut self.is_changed[slot as usize], true) {
            self.changed.push(slot);
        }
    }

    fn settle(&mut self) {
        for slot in self.changed.drain(..) {
            self.is_changed[slot as usize] = false;
        }
    }

    fn bytes(&self) -> usize {
        self.columns.iter().map(Column::bytes).sum::<usize>() + self.slots.capacity() * 9 + self.ids.capacity() * 9
    }
}

/// Corrections so far of the rows of windows that are final but still within the allowed lateness.
type Revisions = BTreeMap<Micros, HashMap<KeyId, i64>>;

/// The running state of one metric in one workspace.
pub struct Metric {
    program: Arc<Program>,
    timing: Timing,
    keys: KeyTable,
    panes: BTreeMap<Micros, Pane>,
    closed: Micros, // every window that ends here or before is final
    revisions: Revisions,
    shown: Option<Micros>, // end of the hopping window that the last tick showed
}

impl Metric {
    pub fn new(program: Arc<Program>, timing: Timing) -> Result<Self> {
        let keys = KeyTable::new(&program.key_schema)?;
        let panes = BTreeMap::new();
        Ok(Self { program, timing, keys, panes, closed: Micros::MIN, revisions: Revisions::new(), shown: None })
    }

    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Every window that ends here or before is final.
    pub(crate) fn closed(&self) -> Micros {
        self.closed
    }

    /// Takes in a batch whose first event came when the stream's event time stood at `frontier`.
    ///
    /// Whether an event is late is decided by the events before it, never by how they were cut into
    /// batches. Final rows and corrections go to `out` in the order in which they became final; rows
    /// of `batch` that no window takes any more are listed in `dropped`.
    pub fn absorb(
        &mut self,
        batch: &RecordBatch,
        frontier: Micros,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let Some(ts) = batch.column_by_name("ts").map(|c| c.as_primitive::<TimestampMicrosecondType>().values()) else {
            return exec_err!("a batch of `{}` has no column `ts`", self.program.stream());
        };
        let batch = self.program.align(batch)?;
        let mut keep = self.program.selected(&batch)?;
        let mut cuts: Vec<(usize, Micros)> = Vec::new(); // close windows up to here before this row
        let (window, delay, lateness) = (self.program.window(), self.timing.max_delay, self.timing.allowed_lateness);
        let (lowest, highest) = bounds(ts);
        if window.first_end(lowest) <= frontier.max(highest).minus(delay) {
            let mut mask = None;
            let (mut seen, mut cut_at) = (frontier, self.closed);
            for (row, &at) in ts.iter().enumerate() {
                let (at, watermark) = (Micros(at), seen.minus(delay));
                if window.first_end(at) <= watermark {
                    if window.last_end(at).plus(lateness) <= watermark {
                        dropped.push(row as u32);
                        mask.get_or_insert_with(|| vec![true; ts.len()])[row] = false;
                    } else if watermark > cut_at {
                        cuts.push((row, watermark));
                        cut_at = watermark;
                    }
                }
                seen = seen.max(at);
            }
            if let Some(mask) = mask.map(BooleanArray::from) {
                keep = Some(match keep {
                    Some(other) => compute::and(&mask, &other)?,
                    None => mask,
                });
            }
        }
        let mut from = 0;
        for (row, watermark) in cuts {
            self.absorb_part(&batch, keep.as_ref(), from, row, out)?;
            self.advance(watermark, out)?;
            from = row;
        }
        self.absorb_part(&batch, keep.as_ref(), from, batch.num_rows(), out)
    }

    /// Closes every window that ends at `watermark` or before and forgets panes nothing needs any more.
    pub fn advance(&mut self, watermark: Micros, out: &mut Vec<Rows>) -> Result<()> {
        if watermark <= self.closed {
            return Ok(());
        }
        while let Some(end) = self.next_end().filter(|&end| end <= watermark) {
            self.emit_final(end, out)?;
            self.closed = end;
        }
        self.closed = watermark;
        self.expire();
        Ok(())
    }

    /// End of the next window that will close, if any holds an event.
    pub fn next_end(&self) -> Option<Micros> {
        let window = self.program.window();
        let open = |pane: &Micros| window.last_end(*pane) > self.closed;
        // panes kept for late events only stand in front of the open ones
        let pane = *self.panes.range(self.closed.minus(window.size())..).map(|(start, _)| start).find(|p| open(p))?;
        let next = if self.closed == Micros::MIN { Micros::MIN } else { window.first_end(self.closed) };
        Some(window.first_end(pane).max(next))
    }

    /// Provisional rows that changed since the last tick, while event time stands at `frontier`.
    ///
    /// Tumbling: the changed keys of each open window. Hopping: the window that ends next, as the
    /// newest complete view; when it moves on, all its keys.
    pub fn tick(&mut self, frontier: Micros, out: &mut Vec<Rows>) -> Result<()> {
        let top = self.program.is_top();
        match self.program.window() {
            Window::Tumble { size } => {
                let open: Vec<Micros> = self
                    .panes
                    .iter()
                    .filter(|(start, pane)| start.plus(size) > self.closed && !pane.changed.is_empty())
                    .map(|(start, _)| *start)
                    .collect();
                for start in open {
                    let pane = &self.panes[&start];
                    let slots = if top { (0..pane.ids.len() as Slot).collect() } else { pane.changed.clone() };
                    out.extend(self.rows_of_pane(start, start.plus(size), slots, false)?);
                }
            }
            window @ Window::Hop { .. } => {
                let end = window.first_end(frontier).max(window.first_end(self.closed));
                let moved = self.shown != Some(end);
                let all = moved || top;
                let mut only: Vec<KeyId> = Vec::new();
                for pane in self.panes.range(end.minus(window.size())..end).map(|(_, pane)| pane) {
                    only.extend(pane.changed.iter().map(|&slot| pane.ids[slot as usize]));
                }
                only.sort_unstable();
                only.dedup();
                if all || !only.is_empty() {
                    out.extend(self.rows_of_panes(end, (!all).then_some(only.as_slice()), false)?);
                }
                self.shown = Some(end);
            }
        }
        self.panes.values_mut().for_each(Pane::settle);
        Ok(())
    }

    /// All rows of windows that are not final yet, up to the one that holds `frontier`.
    pub fn live(&mut self, frontier: Micros) -> Result<Vec<Rows>> {
        let window = self.program.window();
        let mut out = Vec::new();
        let mut next = self.next_end();
        let last = match window {
            Window::Tumble { .. } => Micros::MAX,
            Window::Hop { .. } => window.first_end(frontier),
        };
        while let Some(end) = next.filter(|&end| end <= last) {
            out.extend(self.rows_of_window(end, false)?);
            let after = window.first_end(end);
            next = self
                .panes
                .range(end.minus(window.size())..)
                .map(|(start, _)| *start)
                .find(|p| window.last_end(*p) > end);
            next = next.map(|pane| window.first_end(pane).max(after));
        }
        Ok(out)
    }

    /// Keys that hold state now.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Panes that hold state now.
    pub fn panes(&self) -> usize {
        self.panes.len()
    }

    /// Bytes of state on the heap, within a few percent.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.panes.values().map(Pane::bytes).sum::<usize>()
    }

    fn absorb_part(
        &mut self,
        batch: &RecordBatch,
        keep: Option<&BooleanArray>,
        from: usize,
        to: usize,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let mut part = batch.slice(from, to - from);
        if let Some(keep) = keep {
            part = compute::filter_record_batch(&part, &keep.slice(from, to - from))?;
        }
        if part.num_rows() == 0 {
            return Ok(());
        }
        let late = self.fill(&part)?;
        self.emit_corrections(late, out)
    }

    /// Takes in rows none of which is late: the windows that hold them are open.
    pub(crate) fn take(&mut self, batch: &RecordBatch) -> Result<()> {
        let batch = self.program.align(batch)?;
        let batch = match self.program.selected(&batch)? {
            Some(keep) => compute::filter_record_batch(&batch, &keep)?,
            None => batch,
        };
        if batch.num_rows() > 0 {
            self.fill(&batch)?;
        }
        Ok(())
    }

    /// Computes the pane at `start` anew from `whole`, all its rows, and corrects the final rows whose keys are in
    /// `corrected`.
    pub(crate) fn replace(
        &mut self,
        start: Micros,
        whole: &RecordBatch,
        corrected: &RecordBatch,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let before = self.panes.remove(&start);
        self.take(whole)?;
        let corrected = self.program.align(corrected)?;
        let mut touched = self.keys.intern(&self.program.keys_of(&corrected)?, corrected.num_rows())?;
        touched.sort_unstable();
        touched.dedup();
        let had = |id: KeyId| before.as_ref().is_some_and(|pane| pane.slots.contains_key(&id));
        let has = |id: KeyId| self.panes.get(&start).is_some_and(|pane| pane.slots.contains_key(&id));
        let changed: Vec<(KeyId, bool)> =
            touched.iter().filter(|&&id| had(id) || has(id)).map(|&id| (id, had(id))).collect();
        touched.iter().filter(|&&id| !had(id) && !has(id)).for_each(|&id| {
            self.keys.hold(id); // nobody holds what was only looked up: let it go again
            self.keys.release(id);
        });
        if self.program.window().first_end(start) <= self.closed {
            self.emit_corrections(BTreeMap::from([(start, changed)]), out)?;
        }
        before.into_iter().flat_map(|pane| pane.ids).for_each(|id| self.keys.release(id));
        Ok(())
    }

    /// Adds rows to their panes: in panes of windows that are final, which keys they touched and whether those had
    /// rows there before.
    fn fill(&mut self, part: &RecordBatch) -> Result<BTreeMap<Micros, Vec<(KeyId, bool)>>> {
        let ids = self.keys.intern(&self.program.keys_of(part)?, part.num_rows())?;
        let arguments = self.program.arguments(part)?;
        let ts = part.column_by_name("ts").expect("checked by the caller").as_primitive::<TimestampMicrosecondType>();
        let width = self.program.window().pane();
        let mut late: BTreeMap<Micros, Vec<(KeyId, bool)>> = BTreeMap::new();
        for (start, rows) in split_by_pane(ts.values(), width) {
            let pane = match self.panes.entry(start) {
                Entry::Occupied(pane) => pane.into_mut(),
                Entry::Vacant(empty) => empty.insert(Pane::new(&self.program)),
            };
            let known = pane.ids.len();
            let mut slots = Vec::with_capacity(rows.as_ref().map_or(ids.len(), UInt32Array::len));
            match &rows {
                None => slots.extend(ids.iter().map(|&id| pane.slot(id, &mut self.keys))),
                Some(rows) => {
                    slots.extend(rows.values().iter().map(|&row| pane.slot(ids[row as usize], &mut self.keys)));
                }
            }
            slots.iter().for_each(|&slot| pane.touch(slot));
            for (column, whole) in pane.columns.iter_mut().zip(&arguments) {
                let taken;
                let part: &Arguments = match &rows {
                    None => whole,
                    Some(rows) => {
                        taken = whole.take(rows)?;
                        &taken
                    }
                };
                column.grow(pane.ids.len())?;
                column.update(&part.values, &slots, part.keep.as_ref())?;
            }
            if self.program.window().first_end(start) <= self.closed {
                slots.sort_unstable();
                slots.dedup();
                late.insert(start, slots.iter().map(|&s| (pane.ids[s as usize], (s as usize) < known)).collect());
            }
        }
        Ok(late)
    }

    /// Corrects the windows that were final before an event came within the allowed lateness.
    fn emit_corrections(&mut self, late: BTreeMap<Micros, Vec<(KeyId, bool)>>, out: &mut Vec<Rows>) -> Result<()> {
        let window = self.program.window();
        let mut touched: BTreeMap<Micros, HashMap<KeyId, bool>> = BTreeMap::new();
        for (pane, keys) in late {
            let mut end = window.first_end(pane);
            while end <= self.closed.min(window.last_end(pane)) {
                if end.plus(self.timing.allowed_lateness) > self.closed {
                    let start = end.minus(window.size());
                    for &(id, known) in &keys {
                        let had = known
                            || self.panes.range(start..end).any(|(at, p)| *at != pane && p.slots.contains_key(&id));
                        touched.entry(end).or_default().entry(id).and_modify(|h| *h |= had).or_insert(had);
                    }
                }
                end = end.plus(window.slide());
            }
        }
        for (end, keys) in touched {
            let revisions = self.revisions.entry(end).or_default();
            for (&id, &had) in &keys {
                match revisions.get_mut(&id) {
                    Some(revision) => *revision += 1,
                    None if had => _ = revisions.insert(id, 1),
                    None => _ = revisions.insert(id, 0),
                }
            }
            let only: Vec<KeyId> = keys.into_keys().collect();
            // which of the top rows changed place is not known from the changed keys alone
            let only = (!self.program.is_top()).then_some(only.as_slice());
            out.extend(self.rows_of_panes(end, only, true)?);
        }
        Ok(())
    }

    fn emit_final(&mut self, end: Micros, out: &mut Vec<Rows>) -> Result<()> {
        out.extend(self.rows_of_window(end, true)?);
        Ok(())
    }

    fn rows_of_window(&mut self, end: Micros, is_final: bool) -> Result<Option<Rows>> {
        match self.program.window() {
            Window::Tumble { size } => {
                let start = end.minus(size);
                let slots = (0..self.panes[&start].ids.len() as Slot).collect();
                self.rows_of_pane(start, end, slots, is_final)
            }
            Window::Hop { .. } => self.rows_of_panes(end, None, is_final),
        }
    }

    fn rows_of_pane(&mut self, start: Micros, end: Micros, slots: Vec<Slot>, is_final: bool) -> Result<Option<Rows>> {
        let pane = self.panes.get_mut(&start).expect("a window with events has its pane");
        let ids: Vec<KeyId> = slots.iter().map(|&slot| pane.ids[slot as usize]).collect();
        let results = evaluate(&self.program, &mut pane.columns, &slots)?;
        self.rows(start, end, &ids, results, is_final)
    }

    /// The window's panes merged, for `only` these keys or for all.
    fn rows_of_panes(&mut self, end: Micros, only: Option<&[KeyId]>, is_final: bool) -> Result<Option<Rows>> {
        let start = end.minus(self.program.window().size());
        let mut whole = Pane::new(&self.program);
        for pane in self.panes.range_mut(start..end).map(|(_, pane)| pane) {
            let (mut mine, mut theirs) = (Vec::new(), Vec::new());
            let mut add = |id: KeyId, slot: Slot| {
                mine.push(*whole.slots.entry(id).or_insert_with(|| {
                    whole.ids.push(id);
                    (whole.ids.len() - 1) as Slot
                }));
                theirs.push(slot);
            };
            match only {
                None => pane.ids.iter().enumerate().for_each(|(slot, &id)| add(id, slot as Slot)),
                Some(only) => {
                    only.iter().for_each(|&id| {
                        if let Some(&slot) = pane.slots.get(&id) {
                            add(id, slot)
                        }
                    });
                }
            }
            for (column, other) in whole.columns.iter_mut().zip(&mut pane.columns) {
                column.grow(whole.ids.len())?;
                column.merge(&mine, other, &theirs)?;
            }
        }
        if whole.ids.is_empty() {
            return Ok(None);
        }
        let slots: Vec<Slot> = (0..whole.ids.len() as Slot).collect();
        let results = evaluate(&self.program, &mut whole.columns, &slots)?;
        self.rows(start, end, &whole.ids, results, is_final)
    }

    fn rows(
        &self,
        start: Micros,
        end: Micros,
        ids: &[KeyId],
        results: Vec<ArrayRef>,
        is_final: bool,
    ) -> Result<Option<Rows>> {
        let count = ids.len();
        let bound = |at: Micros| -> ArrayRef {
            Arc::new(TimestampMicrosecondArray::from_value(at.0, count).with_timezone("+00:00"))
        };
        let mut columns = vec![bound(start), bound(end)];
        columns.extend(self.keys.columns(ids)?);
        columns.extend(results);
        let keys = columns[2..2 + self.program.key_count()].to_vec();
        let (batch, kept) = self.program.finish(columns, count)?;
        let complete = self.program.is_top();
        let gone = match &kept {
            Finished::Some(rows) if self.program.may_retract() && !complete => {
                let mut left = vec![true; count];
                rows.iter().for_each(|&row| left[row as usize] = false);
                let left = BooleanArray::from(left);
                let keys = batch_of(self.program.key_schema.clone(), keys, count)?;
                Some(compute::filter_record_batch(&keys, &left)?).filter(|gone| gone.num_rows() > 0)
            }
            _ => None,
        };
        if batch.num_rows() == 0 && gone.is_none() && !complete {
            return Ok(None);
        }
        let revisions = is_final.then(|| {
            let known = self.revisions.get(&end);
            let revision = |row| known.and_then(|r| r.get(&ids[kept.group(row) as usize])).copied().unwrap_or(0);
            (0..batch.num_rows() as u32).map(revision).collect()
        });
        Ok(Some(Rows { batch, revisions, gone, complete }))
    }

    fn expire(&mut self) {
        let (window, lateness, closed) = (self.program.window(), self.timing.allowed_lateness, self.closed);
        while let Some(first) = self.panes.first_entry() {
            if window.last_end(*first.key()).plus(lateness) > closed {
                break;
            }
            first.remove().ids.iter().for_each(|&id| self.keys.release(id));
        }
        self.revisions.retain(|end, _| end.plus(lateness) > closed);
    }

    /// The state as two batches, panes and revisions, and the watermark they stand at.
    pub(crate) fn save(&mut self) -> Result<(Micros, RecordBatch, RecordBatch)> {
        let (pane_schema, revision_schema) = self.saved_schemas()?;
        let mut parts = Vec::new();
        for (start, pane) in &mut self.panes {
            let rows = pane.ids.len();
            let mut columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from_value(start.0, rows))];
            columns.extend(self.keys.columns(&pane.ids)?);
            for column in &mut pane.columns {
                columns.extend(column.save()?);
            }
            parts.push(batch_of(pane_schema.clone(), columns, rows)?);
        }
        let panes = compute::concat_batches(&pane_schema, &parts)?;
        let flat: Vec<(i64, KeyId, i64)> =
            self.revisions.iter().flat_map(|(end, keys)| keys.iter().map(|(id, n)| (end.0, *id, *n))).collect();
        let ids: Vec<KeyId> = flat.iter().map(|(_, id, _)| *id).collect();
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(flat.iter().map(|(end, ..)| *end))),
            Arc::new(Int64Array::from_iter_values(flat.iter().map(|(.., n)| *n))),
        ];
        columns.extend(self.keys.columns(&ids)?);
        Ok((self.closed, panes, batch_of(revision_schema, columns, flat.len())?))
    }

    /// A metric with the state that [`Metric::save`] gave.
    pub(crate) fn restore(
        program: Arc<Program>,
        timing: Timing,
        closed: Micros,
        panes: &RecordBatch,
        revisions: &RecordBatch,
    ) -> Result<Self, RestoreError> {
        let mut metric = Metric::new(program, timing)?;
        metric.closed = closed;
        let (pane_schema, revision_schema) = metric.saved_schemas()?;
        for (found, wanted) in [(panes, &pane_schema), (revisions, &revision_schema)] {
            let types = |s: &SchemaRef| s.fields().iter().map(|f| f.data_type().clone()).collect::<Vec<_>>();
            if types(found.schema_ref()) != types(wanted) {
                return Err(RestoreError::Mismatch(format!("found {:?}, want {wanted:?}", found.schema_ref())));
            }
        }
        let key_columns =
            |batch: &RecordBatch, first: usize| batch.columns()[first..first + metric.program.key_count()].to_vec();
        let ids = metric.keys.intern(&key_columns(panes, 1), panes.num_rows())?;
        let starts = panes.column(0).as_primitive::<Int64Type>().values();
        let mut row = 0;
        for run in starts.chunk_by(|a, b| a == b) {
            let mut pane = Pane::new(&metric.program);
            for &id in &ids[row..row + run.len()] {
                pane.slot(id, &mut metric.keys);
            }
            let mut first = 1 + metric.program.key_count();
            for (column, kind) in pane.columns.iter_mut().zip(&metric.program.kinds) {
                let width = kind.state_fields("")?.len();
                let state: Vec<ArrayRef> =
                    panes.columns()[first..first + width].iter().map(|c| c.slice(row, run.len())).collect();
                column.load(&state)?;
                first += width;
            }
            metric.panes.insert(Micros(run[0]), pane);
            row += run.len();
        }
        let ids = metric.keys.intern(&key_columns(revisions, 2), revisions.num_rows())?;
        let (ends, counts) =
            (revisions.column(0).as_primitive::<Int64Type>(), revisions.column(1).as_primitive::<Int64Type>());
        for (at, id) in ids.into_iter().enumerate() {
            metric.revisions.entry(Micros(ends.value(at))).or_default().insert(id, counts.value(at));
        }
        Ok(metric)
    }

    fn saved_schemas(&self) -> Result<(SchemaRef, SchemaRef)> {
        let int = |name: &str| Arc::new(Field::new(name, DataType::Int64, false));
        let keys = || self.program.key_schema.fields().iter().cloned();
        let mut panes = vec![int("pane")];
        panes.extend(keys());
        for (at, kind) in self.program.kinds.iter().enumerate() {
            panes.extend(kind.state_fields(&format!("aggregate{at}"))?);
        }
        let mut revisions = vec![int("window_end"), int("revision")];
        revisions.extend(keys());
        Ok((Arc::new(Schema::new(panes)), Arc::new(Schema::new(revisions))))
    }
}

fn evaluate(program: &Program, columns: &mut [Column], slots: &[Slot]) -> Result<Vec<ArrayRef>> {
    let types = program.parts.aggregates.iter().map(|a| a.call.field());
    columns.iter_mut().zip(types).map(|(column, field)| column.evaluate(slots, field.data_type())).collect()
}

fn bounds(ts: &[i64]) -> (Micros, Micros) {
    let (low, high) = ts.iter().fold((i64::MAX, i64::MIN), |(low, high), &at| (low.min(at), high.max(at)));
    (Micros(low), Micros(high))
}

/// The rows of each pane, in order of panes; `None` stands for all rows, the usual case.
fn split_by_pane(ts: &[i64], width: Span) -> Vec<(Micros, Option<UInt32Array>)> {
    let (low, high) = bounds(ts);
    let first = low.pane_start(width);
    if high.pane_start(width) == first {
        return vec![(first, None)];
    }
    let mut panes: BTreeMap<Micros, Vec<u32>> = BTreeMap::new();
    let (mut at, mut last) = (first, panes.entry(first).or_default());
    for (row, &instant) in ts.iter().enumerate() {
        let start = Micros(instant).pane_start(width);
        if start != at {
            at = start;
            last = panes.entry(start).or_default();
        }
        last.push(row as u32);
    }
    panes.into_iter().filter(|(_, rows)| !rows.is_empty()).map(|(start, rows)| (start, Some(rows.into()))).collect()
}
