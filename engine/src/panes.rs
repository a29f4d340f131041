//! Windows cut by time: panes that windows share, merged when a window closes.

use crate::accumulate::{Column, Slot};
use crate::event::{Micros, Span};
use crate::key::{KeyId, KeyTable, batch_of};
use crate::merged::{Index, Merged, Running};
use crate::metric::{Frame, Groups, RestoreError, Rows, bounds, check_saved, instant, times};
use crate::program::Program;
use crate::window::Window;
use arrow::array::{ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch};
use arrow::compute;
use arrow::datatypes::Int64Type;
use datafusion_common::Result;
use hashbrown::HashMap;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Aggregate state of the keys that had events in one pane of event time.
struct Pane {
    state: Merged,
    changed: Vec<Slot>, // since the last tick or look
    is_changed: Vec<bool>,
    looked_at: Vec<Slot>, // since the last tick, changed before the last look
}

impl Pane {
    fn new(program: &Program, count: usize, bound: usize) -> Self {
        let state = Merged::new(program, count, bound);
        Self { state, changed: Vec::new(), is_changed: Vec::new(), looked_at: Vec::new() }
    }

    /// The slots of keys, which the pane takes in.
    fn slots(&mut self, ids: impl Iterator<Item = KeyId>, keys: &mut KeyTable) -> Vec<Slot> {
        let slots = ids
            .map(|id| {
                let slot = self.state.slot(id);
                if slot as usize == self.is_changed.len() {
                    keys.hold(id);
                    self.is_changed.push(true);
                    self.changed.push(slot);
                } else if !std::mem::replace(&mut self.is_changed[slot as usize], true) {
                    self.changed.push(slot);
                }
                slot
            })
            .collect();
        if let Index::Sparse(_) = self.state.index
            && self.state.ids.len() * 4 >= keys.bound()
        {
            self.state.index = Index::new(self.state.ids.len(), keys.bound());
            self.state.ids.iter().enumerate().for_each(|(slot, &id)| self.state.index.set(id, slot as Slot));
        }
        slots
    }

    fn settle(&mut self) {
        for slot in self.changed.drain(..) {
            self.is_changed[slot as usize] = false;
        }
    }

    /// What changed was looked at, and waits for the next tick.
    fn set_aside(&mut self) {
        self.looked_at.extend_from_slice(&self.changed);
        self.settle();
        if self.looked_at.len() > 2 * self.is_changed.len() {
            self.looked_at.sort_unstable();
            self.looked_at.dedup();
        }
    }

    /// What was looked at has changed for the tick.
    fn bring_back(&mut self) {
        for slot in self.looked_at.drain(..) {
            if !std::mem::replace(&mut self.is_changed[slot as usize], true) {
                self.changed.push(slot);
            }
        }
    }

    fn bytes(&self) -> usize {
        let slots = self.changed.capacity() + self.looked_at.capacity();
        self.state.bytes() + self.is_changed.capacity() + slots * size_of::<Slot>()
    }
}

/// Corrections so far of the rows of windows that are final but still within the allowed lateness.
type Revisions = BTreeMap<Micros, HashMap<KeyId, i64>>;

/// Keys that late rows touched, by pane, and whether each had rows there before.
type Late = BTreeMap<Micros, Vec<(KeyId, bool)>>;

/// Keys that were the rows of a window, by its end.
type Tops = BTreeMap<Micros, Vec<KeyId>>;

/// The panes of one metric, and what became of its windows.
#[derive(Default)]
pub(crate) struct Panes {
    panes: BTreeMap<Micros, Pane>,
    revisions: Revisions,
    running: Option<Running>,             // of windows that overlap
    shown: Option<Micros>,                // end of the window that the last tick showed, of overlapping ones
    pub(crate) looked_at: Option<Micros>, // and the last look
}

impl Panes {
    pub(crate) fn len(&self) -> usize {
        self.panes.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.panes.values().map(Pane::bytes).sum::<usize>()
            + self.running.as_ref().map_or(0, Running::bytes)
            + self.revisions.values().map(|keys| keys.capacity() * 17).sum::<usize>()
    }

    /// As [`crate::metric::Metric::absorb`]; `keep`: the rows that WHERE takes.
    pub(crate) fn absorb(
        &mut self,
        frame: &mut Frame,
        batch: &RecordBatch,
        mut keep: Option<BooleanArray>,
        frontier: Micros,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let ts = times(batch);
        let mut cuts: Vec<(usize, Micros)> = Vec::new(); // close windows up to here before this row
        let (window, delay, lateness) = (frame.program.window(), frame.timing.max_delay, frame.timing.allowed_lateness);
        let (lowest, highest) = bounds(ts);
        if window.first_end(lowest) <= frontier.max(highest).minus(delay) {
            let mut mask = None;
            let (mut seen, mut cut_at) = (frontier, frame.closed);
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
            self.absorb_part(frame, batch, keep.as_ref(), from, row, out)?;
            self.advance(frame, watermark, out)?;
            from = row;
        }
        self.absorb_part(frame, batch, keep.as_ref(), from, batch.num_rows(), out)
    }

    pub(crate) fn advance(&mut self, frame: &mut Frame, watermark: Micros, out: &mut Vec<Rows>) -> Result<()> {
        while let Some(end) = self.next_end(frame).filter(|&end| end <= watermark) {
            out.extend(self.rows_of_window(frame, end, true)?);
            frame.closed = end;
        }
        frame.closed = watermark;
        self.expire(frame);
        Ok(())
    }

    /// End of the next window that will close, if any holds an event.
    pub(crate) fn next_end(&self, frame: &Frame) -> Option<Micros> {
        let window = frame.program.window();
        let open = |pane: &Micros| window.last_end(*pane) > frame.closed;
        // panes kept for late events only stand in front of the open ones
        let pane = *self.panes.range(frame.closed.minus(window.size())..).map(|(start, _)| start).find(|p| open(p))?;
        let next = if frame.closed == Micros::MIN { Micros::MIN } else { window.first_end(frame.closed) };
        Some(window.first_end(pane).max(next))
    }

    /// Provisional rows that changed since the last tick, while event time stands at `frontier`.
    ///
    /// Tumbling: the changed keys of each open window. Hopping: the window that ends next, as the
    /// newest complete view; when it moves on, all its keys.
    pub(crate) fn tick(&mut self, frame: &mut Frame, frontier: Micros, out: &mut Vec<Rows>) -> Result<()> {
        self.panes.values_mut().for_each(Pane::bring_back);
        self.shown = self.show(frame, frontier, self.shown, out)?;
        self.panes.values_mut().for_each(Pane::settle);
        Ok(())
    }

    /// The same since the last look.
    pub(crate) fn look(&mut self, frame: &mut Frame, frontier: Micros, out: &mut Vec<Rows>) -> Result<()> {
        self.looked_at = self.show(frame, frontier, self.looked_at, out)?;
        self.panes.values_mut().filter(|pane| !pane.changed.is_empty()).for_each(Pane::set_aside);
        Ok(())
    }

    /// Rows that changed, and which window they are of where windows overlap; before, they were of the one that ends at
    /// `shown`.
    fn show(
        &mut self,
        frame: &mut Frame,
        frontier: Micros,
        shown: Option<Micros>,
        out: &mut Vec<Rows>,
    ) -> Result<Option<Micros>> {
        let top = frame.program.is_top();
        match frame.program.window() {
            Window::Tumble { size } => {
                let open: Vec<Micros> = self
                    .panes
                    .iter()
                    .filter(|(start, pane)| start.plus(size) > frame.closed && !pane.changed.is_empty())
                    .map(|(start, _)| *start)
                    .collect();
                for start in open {
                    let pane = &self.panes[&start];
                    let slots = if top { (0..pane.state.ids.len() as Slot).collect() } else { pane.changed.clone() };
                    out.extend(self.rows_of_pane(frame, start, start.plus(size), slots, false)?);
                }
                Ok(None)
            }
            window => {
                let end = window.first_end(frontier).max(window.first_end(frame.closed));
                let moved = shown != Some(end);
                let all = moved || top;
                let mut only: Vec<KeyId> = Vec::new();
                for pane in self.panes.range(window.start(end)..end).map(|(_, pane)| pane) {
                    only.extend(pane.changed.iter().map(|&slot| pane.state.ids[slot as usize]));
                }
                only.sort_unstable();
                only.dedup();
                if all || !only.is_empty() {
                    out.extend(self.rows_of_panes(frame, end, (!all).then_some(only.as_slice()), false)?);
                }
                Ok(Some(end))
            }
        }
    }

    /// All rows of windows that are not final yet, up to the one that holds `frontier`.
    pub(crate) fn live(&mut self, frame: &Frame, frontier: Micros) -> Result<Vec<Rows>> {
        let window = frame.program.window();
        let mut out = Vec::new();
        let mut next = self.next_end(frame);
        let last = match window {
            Window::Tumble { .. } => Micros::MAX,
            _ => window.first_end(frontier),
        };
        while let Some(end) = next.filter(|&end| end <= last) {
            out.extend(self.rows_of_window(frame, end, false)?);
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

    fn absorb_part(
        &mut self,
        frame: &mut Frame,
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
        let tops = self.tops(frame, times(&part))?;
        let late = self.fill(frame, &part)?;
        self.emit_corrections(frame, late, tops, out)
    }

    /// Adds rows to their panes: in panes of windows that are final, which keys they touched and whether those had
    /// rows there before.
    pub(crate) fn fill(&mut self, frame: &mut Frame, part: &RecordBatch) -> Result<Late> {
        let mut late = Late::new();
        if part.num_rows() == 0 {
            return Ok(late);
        }
        let ids = frame.keys.intern(&frame.program.keys_of(part)?, part.num_rows())?;
        let arguments = frame.program.arguments(part)?;
        let width = frame.program.window().pane();
        for (start, rows) in split_by_pane(times(part), width) {
            let count = rows.as_ref().map_or(ids.len(), Vec::len);
            let pane = match self.panes.entry(start) {
                Entry::Occupied(pane) => pane.into_mut(),
                Entry::Vacant(empty) => empty.insert(Pane::new(&frame.program, count, frame.keys.bound())),
            };
            if self.running.as_ref().is_some_and(|running| start < running.until) {
                self.running = None; // what it was put together from has changed
            }
            let known = pane.state.ids.len();
            let mut slots = match &rows {
                None => pane.slots(ids.iter().copied(), &mut frame.keys),
                Some(rows) => pane.slots(rows.iter().map(|&row| ids[row as usize]), &mut frame.keys),
            };
            for (column, arguments) in pane.state.columns.iter_mut().zip(&arguments) {
                column.grow(pane.state.ids.len())?;
                column.update(arguments, rows.as_deref(), &slots)?;
            }
            if frame.program.window().first_end(start) <= frame.closed {
                slots.sort_unstable();
                slots.dedup();
                late.insert(start, slots.iter().map(|&s| (pane.state.ids[s as usize], (s as usize) < known)).collect());
            }
        }
        Ok(late)
    }

    /// Takes a pane out; its keys stay held.
    pub(crate) fn remove(&mut self, start: Micros) -> Option<Merged> {
        self.running = None;
        self.panes.remove(&start).map(|pane| pane.state)
    }

    /// Corrects the final rows of keys in `corrected` after the pane at `start` was computed anew, and what it was before,
    /// with the [`Panes::tops`] of then.
    pub(crate) fn correct(
        &mut self,
        frame: &mut Frame,
        start: Micros,
        (before, tops): (Option<Merged>, Tops),
        corrected: &RecordBatch,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let mut touched = frame.keys.intern(&frame.program.keys_of(corrected)?, corrected.num_rows())?;
        touched.sort_unstable();
        touched.dedup();
        let had = |id: KeyId| before.as_ref().is_some_and(|pane| pane.index.get(id).is_some());
        let has = |id: KeyId| self.panes.get(&start).is_some_and(|pane| pane.state.index.get(id).is_some());
        let changed: Vec<(KeyId, bool)> =
            touched.iter().filter(|&&id| had(id) || has(id)).map(|&id| (id, had(id))).collect();
        let idle: Vec<KeyId> = touched.iter().copied().filter(|&id| !had(id) && !has(id)).collect();
        frame.keys.forget_unheld(&idle); // nobody holds what was only looked up
        if frame.program.window().first_end(start) <= frame.closed {
            self.emit_corrections(frame, BTreeMap::from([(start, changed)]), tops, out)?;
        }
        before.into_iter().flat_map(|pane| pane.ids).for_each(|id| frame.keys.release(id));
        Ok(())
    }

    /// Ends of the final windows over the pane at `pane` that may still be corrected.
    fn correctable(frame: &Frame, pane: Micros) -> impl Iterator<Item = Micros> + use<> {
        let (window, closed, lateness) = (frame.program.window(), frame.closed, frame.timing.allowed_lateness);
        let next = move |end: &Micros| Some(end.plus(window.slide()));
        std::iter::successors(Some(window.first_end(pane)), next)
            .take_while(move |end| *end <= closed.min(window.last_end(pane)))
            .filter(move |end| end.plus(lateness) > closed)
    }

    /// Which keys are the rows of the final windows that events at `ts` will correct, where a correction of one key may
    /// put others out: with ORDER BY … LIMIT.
    pub(crate) fn tops(&mut self, frame: &Frame, ts: &[i64]) -> Result<Tops> {
        let mut tops = Tops::new();
        if !frame.program.is_top() || frame.timing.allowed_lateness == Span::ZERO {
            return Ok(tops);
        }
        let width = frame.program.window().pane();
        let panes: BTreeSet<Micros> = ts.iter().map(|&at| Micros(at).pane_start(width)).collect();
        for end in panes.into_iter().flat_map(|pane| Self::correctable(frame, pane)) {
            if !tops.contains_key(&end) {
                tops.insert(end, self.top_of(frame, end)?);
            }
        }
        Ok(tops)
    }

    /// Which keys are the rows of the window that ends at `end`.
    fn top_of(&mut self, frame: &Frame, end: Micros) -> Result<Vec<KeyId>> {
        let Some(mut whole) = self.whole(frame, end, None)? else { return Ok(Vec::new()) };
        let slots: Vec<Slot> = (0..whole.ids.len() as Slot).collect();
        let results = evaluate(&frame.program, &mut whole.columns, &slots)?;
        let (starts, ends) = (instant(frame.program.window().start(end), slots.len()), instant(end, slots.len()));
        frame.chosen(Groups { starts, ends, ids: &whole.ids, results, revisions: None })
    }

    /// Takes back the rows of those in `before` that are none of the window's top any more, and gives who is there again
    /// a revision behind the one that took it back. `touched` have a new one already.
    fn withdraw(
        &mut self,
        frame: &Frame,
        end: Micros,
        before: &[KeyId],
        touched: &HashMap<KeyId, bool>,
    ) -> Result<Option<RecordBatch>> {
        let after = self.top_of(frame, end)?;
        let left: Vec<KeyId> = before.iter().copied().filter(|id| !after.contains(id)).collect();
        let revisions = self.revisions.entry(end).or_default();
        let again = after.iter().filter(|id| !before.contains(id) && revisions.contains_key(*id));
        let again: Vec<KeyId> = again.copied().collect();
        for id in left.iter().chain(&again).filter(|id| !touched.contains_key(*id)) {
            *revisions.entry(*id).or_insert(0) += 1;
        }
        if left.is_empty() {
            return Ok(None);
        }
        let taken: Vec<i64> = left.iter().map(|id| revisions.get(id).copied().unwrap_or(0)).collect();
        let mut columns = vec![instant(frame.program.window().start(end), left.len()), instant(end, left.len())];
        columns.extend(frame.keys.columns(&left)?);
        frame.withdrawal(columns, &taken).map(Some)
    }

    /// Corrects the windows that were final before an event came within the allowed lateness.
    fn emit_corrections(&mut self, frame: &Frame, late: Late, tops: Tops, out: &mut Vec<Rows>) -> Result<()> {
        let window = frame.program.window();
        let mut touched: BTreeMap<Micros, HashMap<KeyId, bool>> = BTreeMap::new();
        for (pane, keys) in late {
            for end in Self::correctable(frame, pane) {
                for &(id, known) in &keys {
                    let others = || self.panes.range(window.start(end)..end).filter(|(at, _)| **at != pane);
                    let had = known || others().any(|(_, pane)| pane.state.index.get(id).is_some());
                    touched.entry(end).or_default().entry(id).and_modify(|h| *h |= had).or_insert(had);
                }
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
            if !frame.program.is_top() {
                let only: Vec<KeyId> = keys.into_keys().collect();
                out.extend(self.rows_of_panes(frame, end, Some(&only), true)?);
                continue;
            }
            // which of the top rows changed place is not known from the changed keys alone
            let before = tops.get(&end).map_or(&[] as &[KeyId], Vec::as_slice);
            let withdrawn = self.withdraw(frame, end, before, &keys)?;
            let mut rows = self.rows_of_panes(frame, end, None, true)?;
            if withdrawn.is_some() {
                let empty = || Rows {
                    batch: RecordBatch::new_empty(frame.program.output().clone()),
                    revisions: Some(Vec::new()),
                    gone: None,
                    complete: true,
                    withdrawn: None,
                };
                rows.get_or_insert_with(empty).withdrawn = withdrawn;
            }
            out.extend(rows);
        }
        Ok(())
    }

    /// All rows of one window.
    fn rows_of_window(&mut self, frame: &Frame, end: Micros, is_final: bool) -> Result<Option<Rows>> {
        match frame.program.window() {
            window if window.size() == window.pane() => {
                let start = window.start(end);
                let slots = (0..self.panes[&start].state.ids.len() as Slot).collect();
                self.rows_of_pane(frame, start, end, slots, is_final)
            }
            _ if is_final && frame.program.is_lean() => {
                self.run(frame, end)?;
                self.rows_of_panes(frame, end, None, is_final)
            }
            _ => self.rows_of_panes(frame, end, None, is_final),
        }
    }

    /// Brings the running state to the window that ends at `end`.
    fn run(&mut self, frame: &Frame, end: Micros) -> Result<()> {
        let window = frame.program.window();
        let (start, block) = (window.start(end), end.minus(Span(1)).pane_start(window.size()));
        if self.running.as_ref().is_none_or(|running| running.block != block || running.until > end) {
            let earlier = self.panes.range_mut(start..block).rev().map(|(start, pane)| (*start, &mut pane.state));
            self.running = Some(Running::new(&frame.program, block, earlier, frame.keys.bound())?);
        }
        if let Some(running) = &mut self.running {
            running.leave(start);
            for (_, pane) in self.panes.range_mut(running.until..end) {
                running.enter(&mut pane.state)?;
            }
            running.until = end;
        }
        Ok(())
    }

    fn rows_of_pane(
        &mut self,
        frame: &Frame,
        start: Micros,
        end: Micros,
        slots: Vec<Slot>,
        is_final: bool,
    ) -> Result<Option<Rows>> {
        let pane = self.panes.get_mut(&start).expect("a window with events has its pane");
        let ids: Vec<KeyId> = slots.iter().map(|&slot| pane.state.ids[slot as usize]).collect();
        let results = evaluate(&frame.program, &mut pane.state.columns, &slots)?;
        self.rows(frame, (start, end), &ids, results, is_final)
    }

    /// The window's rows, for `only` these keys or for all.
    fn rows_of_panes(
        &mut self,
        frame: &Frame,
        end: Micros,
        only: Option<&[KeyId]>,
        is_final: bool,
    ) -> Result<Option<Rows>> {
        let Some(mut whole) = self.whole(frame, end, only)? else { return Ok(None) };
        let slots: Vec<Slot> = (0..whole.ids.len() as Slot).collect();
        let results = evaluate(&frame.program, &mut whole.columns, &slots)?;
        self.rows(frame, (frame.program.window().start(end), end), &whole.ids, results, is_final)
    }

    /// The window's panes merged, for `only` these keys or for all; `None` where they hold none.
    fn whole(&mut self, frame: &Frame, end: Micros, only: Option<&[KeyId]>) -> Result<Option<Merged>> {
        let window = frame.program.window();
        let start = window.start(end);
        let count = only.map_or(frame.keys.bound(), <[KeyId]>::len);
        let mut whole = Merged::new(&frame.program, count, frame.keys.bound());
        let mut from = start;
        if let Some(running) = &mut self.running
            && running.block == end.minus(Span(1)).pane_start(window.size())
            && running.until <= end
        {
            running.write(start, only, &mut whole)?;
            from = running.until;
        }
        for pane in self.panes.range_mut(from..end).map(|(_, pane)| &mut pane.state) {
            match only {
                None => {
                    let slots: Vec<Slot> = (0..pane.ids.len() as Slot).collect();
                    whole.add(&mut pane.columns, &pane.ids, &slots)?;
                }
                Some(only) => {
                    let held = only.iter().filter_map(|&id| Some((id, pane.index.get(id)?)));
                    let (ids, slots): (Vec<KeyId>, Vec<Slot>) = held.unzip();
                    whole.add(&mut pane.columns, &ids, &slots)?;
                }
            }
        }
        Ok((!whole.ids.is_empty()).then_some(whole))
    }

    fn rows(
        &self,
        frame: &Frame,
        (start, end): (Micros, Micros),
        ids: &[KeyId],
        results: Vec<ArrayRef>,
        is_final: bool,
    ) -> Result<Option<Rows>> {
        let known = self.revisions.get(&end);
        let revision = |id| known.and_then(|revisions| revisions.get(id)).copied().unwrap_or(0);
        let revisions = is_final.then(|| ids.iter().map(revision).collect());
        let (starts, ends) = (instant(start, ids.len()), instant(end, ids.len()));
        frame.rows(Groups { starts, ends, ids, results, revisions })
    }

    fn expire(&mut self, frame: &mut Frame) {
        let (window, lateness, closed) = (frame.program.window(), frame.timing.allowed_lateness, frame.closed);
        while let Some(first) = self.panes.first_entry() {
            if window.last_end(*first.key()).plus(lateness) > closed {
                break;
            }
            first.remove().state.ids.iter().for_each(|&id| frame.keys.release(id));
        }
        self.revisions.retain(|end, _| end.plus(lateness) > closed);
        if self.panes.is_empty() {
            self.running = None;
        }
    }

    /// The state as two batches: panes and revisions.
    pub(crate) fn save(&mut self, frame: &Frame) -> Result<(RecordBatch, RecordBatch)> {
        let pane_schema = frame.saved_schema(PANE, true)?;
        let mut parts = Vec::new();
        for (start, pane) in &mut self.panes {
            let rows = pane.state.ids.len();
            let mut columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from_value(start.0, rows))];
            columns.extend(frame.keys.columns(&pane.state.ids)?);
            for column in &mut pane.state.columns {
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
        columns.extend(frame.keys.columns(&ids)?);
        Ok((panes, batch_of(frame.saved_schema(REVISION, false)?, columns, flat.len())?))
    }

    /// Puts back what [`Panes::save`] gave.
    pub(crate) fn restore(
        &mut self,
        frame: &mut Frame,
        panes: &RecordBatch,
        revisions: &RecordBatch,
    ) -> Result<(), RestoreError> {
        check_saved(panes, &frame.saved_schema(PANE, true)?)?;
        check_saved(revisions, &frame.saved_schema(REVISION, false)?)?;
        let count = frame.program.key_count();
        let ids = frame.keys.intern(&panes.columns()[1..1 + count], panes.num_rows())?;
        let starts = panes.column(0).as_primitive::<Int64Type>().values();
        let mut row = 0;
        for run in starts.chunk_by(|a, b| a == b) {
            let mut pane = Pane::new(&frame.program, run.len(), frame.keys.bound());
            pane.slots(ids[row..row + run.len()].iter().copied(), &mut frame.keys);
            pane.settle();
            load(&mut pane.state.columns, &frame.program, &panes.slice(row, run.len()), 1 + count)?;
            self.panes.insert(Micros(run[0]), pane);
            row += run.len();
        }
        let ids = frame.keys.intern(&revisions.columns()[2..2 + count], revisions.num_rows())?;
        let (ends, counts) =
            (revisions.column(0).as_primitive::<Int64Type>(), revisions.column(1).as_primitive::<Int64Type>());
        for (at, id) in ids.into_iter().enumerate() {
            self.revisions.entry(Micros(ends.value(at))).or_default().insert(id, counts.value(at));
        }
        Ok(())
    }
}

/// Columns of saved panes and of saved revisions in front of the keys.
const PANE: &[&str] = &["pane"];
const REVISION: &[&str] = &["window_end", "revision"];

/// Puts back the saved state of every aggregate, whose columns begin at `first`.
pub(crate) fn load(columns: &mut [Column], program: &Program, saved: &RecordBatch, mut first: usize) -> Result<()> {
    for (column, kind) in columns.iter_mut().zip(&program.kinds) {
        let width = kind.state_fields("")?.len();
        column.load(&saved.columns()[first..first + width])?;
        first += width;
    }
    Ok(())
}

/// The results of every aggregate for `slots`.
pub(crate) fn evaluate(program: &Program, columns: &mut [Column], slots: &[Slot]) -> Result<Vec<ArrayRef>> {
    let types = program.parts.aggregates.iter().map(|a| a.call.field());
    columns.iter_mut().zip(types).map(|(column, field)| column.evaluate(slots, field.data_type())).collect()
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
        let start = Micros(instant).pane_start(width);
        if start != at {
            at = start;
            last = panes.entry(start).or_default();
        }
        last.push(row as u32);
    }
    panes.into_iter().filter(|(_, rows)| !rows.is_empty()).map(|(start, rows)| (start, Some(rows))).collect()
}
