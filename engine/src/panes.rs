//! Windows cut by time: panes that windows share, merged when a window closes.

use crate::accumulate::{Column, Slot};
use crate::checkpoint::{Content, Draft, Pieces};
use crate::event::{Micros, Span};
use crate::key::{KeyId, Keys, batch_of};
use crate::merged::{Index, Merged, Running};
use crate::metric::{Frame, Groups, PANES, REVISIONS, RestoreError, Rows, check_saved, instant, times};
use crate::program::Program;
use crate::shared::{Front, Shared};
use crate::window::Window;
use arrow::array::{ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch};
use arrow::compute;
use arrow::datatypes::Int64Type;
use datafusion_common::Result;
use hashbrown::{HashMap, HashSet};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// Aggregate state of the keys that had events in one pane of event time.
struct Pane {
    state: Merged,
    changed: Vec<Slot>, // since the last tick or look
    is_changed: Vec<bool>,
    looked_at: Vec<Slot>, // since the last tick, changed before the last look
    saved: Saved,
}

/// What the last checkpoint has of a pane.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Saved {
    Nothing,
    /// As it was then.
    Before,
    AsItIs,
}

impl Pane {
    fn new(program: &Program, count: usize, bound: usize) -> Self {
        let state = Merged::new(program, count, bound);
        Self { state, changed: Vec::new(), is_changed: Vec::new(), looked_at: Vec::new(), saved: Saved::Nothing }
    }

    /// The slots of keys, which the pane takes in.
    fn slots(&mut self, ids: &[KeyId], keys: &mut Keys) -> Vec<Slot> {
        if self.saved == Saved::AsItIs {
            self.saved = Saved::Before;
        }
        let slots = ids
            .iter()
            .map(|&id| {
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

/// The keys of all rows of windows that are final, by their end, where `ORDER BY … LIMIT` chooses them.
pub(crate) type Tops = BTreeMap<Micros, Vec<KeyId>>;

/// A pane that is computed anew, as it was, and what [`Panes::tops`] was of it.
pub(crate) type Before = (Option<Merged>, Tops);

/// The panes of one metric, and what became of its windows.
#[derive(Default)]
pub(crate) struct Panes {
    panes: BTreeMap<Micros, Pane>,
    revisions: Revisions,
    running: Option<Running>,             // of windows that overlap
    shown: Option<Micros>,                // end of the window that the last tick showed, of overlapping ones
    pub(crate) looked_at: Option<Micros>, // and the last look
    /// Panes of the last checkpoint that are no more.
    lost: Vec<Micros>,
    /// The revisions are others than at the last checkpoint.
    revised: bool,
    /// The last checkpoint has panes in several parts.
    is_split: bool,
}

/// Panes are saved in several parts once they have so many rows, and in one again when they have a quarter of it: small
/// parts cost more than what they hold.
const SPLIT_ROWS: usize = 2_048;

/// About how many parts the panes of a metric then make. While one of them is written the others stay as they are.
const PARTS: i64 = 32;

impl Panes {
    pub(crate) fn len(&self) -> usize {
        self.panes.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.panes.values().map(Pane::bytes).sum::<usize>()
            + self.running.as_ref().map_or(0, Running::bytes)
            + self.revisions.values().map(|keys| keys.capacity() * 17).sum::<usize>()
    }

    /// As [`crate::metric::Metric::absorb`].
    pub(crate) fn absorb(
        &mut self,
        frame: &mut Frame,
        batch: &RecordBatch,
        shared: &mut Shared,
        frontier: Micros,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let ts = times(batch);
        let mut cuts: Vec<(usize, Micros)> = Vec::new(); // close windows up to here before this row
        let (window, delay, lateness) = (frame.program.window(), frame.timing.max_delay, frame.timing.allowed_lateness);
        let (lowest, highest) = shared.bounds(ts);
        let done = shared.done(frame, batch)?;
        let mut mask = None; // of rows that no window takes any more
        if window.first_end(lowest) <= frontier.max(highest).minus(delay) {
            let (mut seen, mut cut_at) = (frontier, frame.closed);
            for (row, &at) in ts.iter().enumerate() {
                let (at, watermark) = (Micros(at), seen.minus(delay));
                if at < watermark && window.first_end(at) <= watermark {
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
        }
        if cuts.is_empty() && mask.is_none() {
            let front = done.front(frame, batch)?;
            return self.absorb_front(frame, front, out);
        }
        let keep = match (mask.map(BooleanArray::from), &done.keep) {
            (Some(mask), Some(keep)) => Some(compute::and(&mask, keep)?),
            (mask, keep) => mask.or_else(|| keep.clone()),
        };
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
        let mut front = Front::new(&frame.program, &frame.keys, part)?;
        self.absorb_front(frame, &mut front, out)
    }

    fn absorb_front(&mut self, frame: &mut Frame, front: &mut Front, out: &mut Vec<Rows>) -> Result<()> {
        let tops = match frame.program.is_top() {
            true => self
                .tops(frame, front.split(&frame.keys, frame.program.window().pane()).iter().map(|(start, _)| *start))?,
            false => Tops::new(),
        };
        let late = self.fill(frame, front)?;
        self.emit_corrections(frame, late, tops, out)
    }

    /// The rows that the final windows over these panes have now and that may still be corrected.
    pub(crate) fn tops(&mut self, frame: &Frame, panes: impl Iterator<Item = Micros>) -> Result<Tops> {
        let (window, lateness, closed) = (frame.program.window(), frame.timing.allowed_lateness, frame.closed);
        let mut tops = Tops::new();
        for pane in panes {
            let mut end = window.first_end(pane);
            while end <= closed.min(window.last_end(pane)) {
                if end.plus(lateness) > closed && !tops.contains_key(&end) {
                    tops.insert(end, self.top(frame, end)?);
                }
                end = end.plus(window.slide());
            }
        }
        Ok(tops)
    }

    /// The keys of a window's top rows.
    fn top(&mut self, frame: &Frame, end: Micros) -> Result<Vec<KeyId>> {
        let mut whole = self.whole(frame, end, None)?;
        if whole.ids.is_empty() {
            return Ok(Vec::new());
        }
        let results = evaluate_all(&frame.program, &mut whole)?;
        frame.chosen(self.groups((frame.program.window().start(end), end), &whole.ids, results, false))
    }

    /// Adds rows to their panes: in panes of windows that are final, which keys they touched and whether those had
    /// rows there before.
    pub(crate) fn fill(&mut self, frame: &mut Frame, front: &mut Front) -> Result<Late> {
        let mut late = Late::new();
        if front.rows.num_rows() == 0 {
            return Ok(late);
        }
        let arguments = front.arguments(&frame.program)?;
        let split = front.split(&frame.keys, frame.program.window().pane());
        for (start, grouped) in split.iter() {
            let (start, ids) = (*start, &grouped.labels);
            let pane = match self.panes.entry(start) {
                Entry::Occupied(pane) => pane.into_mut(),
                Entry::Vacant(empty) => empty.insert(Pane::new(&frame.program, ids.len(), frame.keys.bound())),
            };
            if self.running.as_ref().is_some_and(|running| start < running.until) {
                self.running = None; // what it was put together from has changed
            }
            let known = pane.state.ids.len();
            let mut slots = pane.slots(ids, &mut frame.keys);
            for (column, arguments) in pane.state.columns.iter_mut().zip(&arguments) {
                column.grow(pane.state.ids.len())?;
                column.update(arguments, &slots, &grouped.runs)?;
            }
            if frame.program.window().first_end(start) <= frame.closed {
                slots.sort_unstable();
                late.insert(start, slots.iter().map(|&s| (pane.state.ids[s as usize], (s as usize) < known)).collect());
            }
        }
        Ok(late)
    }

    /// Takes a pane out; its keys stay held.
    pub(crate) fn remove(&mut self, start: Micros) -> Option<Merged> {
        self.running = None;
        let pane = self.panes.remove(&start)?;
        if pane.saved != Saved::Nothing {
            self.lost.push(start);
        }
        Some(pane.state)
    }

    /// Corrects the final rows of keys in `corrected` after the pane at `start`, which was `before`, was computed anew.
    pub(crate) fn correct(
        &mut self,
        frame: &mut Frame,
        start: Micros,
        (before, tops): Before,
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

    /// Corrects the windows that were final before an event came within the allowed lateness. `tops`: what
    /// [`Panes::tops`] was then.
    fn emit_corrections(&mut self, frame: &mut Frame, late: Late, mut tops: Tops, out: &mut Vec<Rows>) -> Result<()> {
        let window = frame.program.window();
        let mut touched: BTreeMap<Micros, HashMap<KeyId, bool>> = BTreeMap::new();
        for (pane, keys) in late {
            let mut end = window.first_end(pane);
            while end <= frame.closed.min(window.last_end(pane)) {
                if end.plus(frame.timing.allowed_lateness) > frame.closed {
                    let start = window.start(end);
                    for &(id, known) in &keys {
                        let had = known
                            || self
                                .panes
                                .range(start..end)
                                .any(|(at, p)| *at != pane && p.state.index.get(id).is_some());
                        touched.entry(end).or_default().entry(id).and_modify(|h| *h |= had).or_insert(had);
                    }
                }
                end = end.plus(window.slide());
            }
        }
        for (end, keys) in touched {
            if frame.program.is_top() {
                self.correct_top(frame, end, tops.remove(&end).unwrap_or_default(), &keys, out)?;
                continue;
            }
            for (&id, &had) in &keys {
                self.revise(frame, end, id, had);
            }
            let only: Vec<KeyId> = keys.into_keys().collect();
            let mut whole = self.whole(frame, end, Some(&only))?;
            let mut rows = self.rows_of(frame, end, &mut whole, true)?;
            let gone: Vec<KeyId> = only.into_iter().filter(|&id| whole.index.get(id).is_none()).collect();
            self.withdraw(frame, end, &gone, &mut rows)?;
            out.extend(rows);
        }
        Ok(())
    }

    /// The row of a key in a final window changes, which `had` a row there so far.
    fn revise(&mut self, frame: &mut Frame, end: Micros, id: KeyId, had: bool) {
        self.revised = true;
        match self.revisions.entry(end).or_default().entry(id) {
            hashbrown::hash_map::Entry::Occupied(mut revision) => *revision.get_mut() += 1,
            hashbrown::hash_map::Entry::Vacant(empty) => {
                empty.insert(i64::from(had));
                frame.keys.hold(id); // its number stays, also when its last row is taken back
            }
        }
    }

    /// Takes back the final rows of these keys in a window.
    fn withdraw(&self, frame: &Frame, end: Micros, ids: &[KeyId], rows: &mut Option<Rows>) -> Result<()> {
        let start = frame.program.window().start(end);
        let revisions: Vec<i64> = ids.iter().map(|&id| self.revision(end, id)).collect();
        frame.withdraw(rows, (instant(start, ids.len()), instant(end, ids.len())), ids, &revisions)
    }

    fn revision(&self, end: Micros, id: KeyId) -> i64 {
        self.revisions.get(&end).and_then(|revisions| revisions.get(&id)).copied().unwrap_or(0)
    }

    /// Corrects the top rows of a window, which were those of the keys `before`, after late rows `touched` some keys:
    /// the rows of others may come in for them or go.
    fn correct_top(
        &mut self,
        frame: &mut Frame,
        end: Micros,
        before: Vec<KeyId>,
        touched: &HashMap<KeyId, bool>,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let after = self.top(frame, end)?;
        for &id in before.iter().chain(after.iter().filter(|id| !before.contains(id))) {
            let was = before.contains(&id);
            if was != after.contains(&id) || touched.contains_key(&id) {
                self.revise(frame, end, id, was);
            }
        }
        let mut rows = self.rows_of_panes(frame, end, None, true)?;
        let gone: Vec<KeyId> = before.into_iter().filter(|id| !after.contains(id)).collect();
        self.withdraw(frame, end, &gone, &mut rows)?;
        out.extend(rows);
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

    fn rows_of_panes(
        &mut self,
        frame: &Frame,
        end: Micros,
        only: Option<&[KeyId]>,
        is_final: bool,
    ) -> Result<Option<Rows>> {
        let mut whole = self.whole(frame, end, only)?;
        self.rows_of(frame, end, &mut whole, is_final)
    }

    fn rows_of(&self, frame: &Frame, end: Micros, whole: &mut Merged, is_final: bool) -> Result<Option<Rows>> {
        if whole.ids.is_empty() {
            return Ok(None);
        }
        let results = evaluate_all(&frame.program, whole)?;
        self.rows(frame, (frame.program.window().start(end), end), &whole.ids, results, is_final)
    }

    /// The window's panes merged, for `only` these keys or for all.
    fn whole(&mut self, frame: &Frame, end: Micros, only: Option<&[KeyId]>) -> Result<Merged> {
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
        Ok(whole)
    }

    fn rows(
        &self,
        frame: &Frame,
        bounds: (Micros, Micros),
        ids: &[KeyId],
        results: Vec<ArrayRef>,
        is_final: bool,
    ) -> Result<Option<Rows>> {
        frame.rows(self.groups(bounds, ids, results, is_final))
    }

    fn groups<'a>(
        &self,
        (start, end): (Micros, Micros),
        ids: &'a [KeyId],
        results: Vec<ArrayRef>,
        is_final: bool,
    ) -> Groups<'a> {
        let revisions = is_final.then(|| ids.iter().map(|&id| self.revision(end, id)).collect());
        let (starts, ends) = (instant(start, ids.len()), instant(end, ids.len()));
        Groups { starts, ends, ids, results, revisions }
    }

    fn expire(&mut self, frame: &mut Frame) {
        let (window, lateness, closed) = (frame.program.window(), frame.timing.allowed_lateness, frame.closed);
        while let Some(first) = self.panes.first_entry() {
            if window.last_end(*first.key()).plus(lateness) > closed {
                break;
            }
            let (start, pane) = first.remove_entry();
            if pane.saved != Saved::Nothing {
                self.lost.push(start);
            }
            pane.state.ids.iter().for_each(|&id| frame.keys.release(id));
        }
        while let Some(first) = self.revisions.first_entry() {
            if first.key().plus(lateness) > closed {
                break;
            }
            self.revised = true;
            first.remove().into_keys().for_each(|id| frame.keys.release(id));
        }
        if self.panes.is_empty() {
            self.running = None;
        }
    }

    /// The parts of the state: panes, those of many rows in parts of neighbours, and revisions.
    pub(crate) fn save(&mut self, frame: &Frame, draft: &mut Draft) -> Result<()> {
        let rows: usize = self.panes.values().map(|pane| pane.state.ids.len()).sum();
        let is_split = rows >= if self.is_split { SPLIT_ROWS / 4 } else { SPLIT_ROWS };
        let regrouped = std::mem::replace(&mut self.is_split, is_split) != is_split;
        let width = width_of_part(frame);
        let part = |start: Micros| is_split.then(|| start.pane_start(width));
        let lost: HashSet<Option<Micros>> = std::mem::take(&mut self.lost).into_iter().map(part).collect();
        let mut panes: Vec<(Micros, &mut Pane)> = self.panes.iter_mut().map(|(start, pane)| (*start, pane)).collect();
        for panes in panes.chunk_by_mut(|(a, _), (b, _)| part(*a) == part(*b)) {
            let at = part(panes[0].0);
            let changed = panes.iter().any(|(_, pane)| pane.saved != Saved::AsItIs);
            panes.iter_mut().for_each(|(_, pane)| pane.saved = Saved::AsItIs);
            let name = at.map_or_else(|| PANES.to_owned(), |start| format!("{PANES}/{}", start.0));
            draft.put(&name, changed || regrouped || lost.contains(&at), || saved_panes(frame, panes))?;
        }
        let revised = std::mem::take(&mut self.revised);
        if self.revisions.is_empty() {
            return Ok(());
        }
        draft.put(REVISIONS, revised, || self.saved_revisions(frame))
    }

    fn saved_revisions(&self, frame: &Frame) -> Result<Content> {
        let flat: Vec<(i64, KeyId, i64)> =
            self.revisions.iter().flat_map(|(end, keys)| keys.iter().map(|(id, n)| (end.0, *id, *n))).collect();
        let ids: Vec<KeyId> = flat.iter().map(|(_, id, _)| *id).collect();
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(flat.iter().map(|(end, ..)| *end))),
            Arc::new(Int64Array::from_iter_values(flat.iter().map(|(.., n)| *n))),
        ];
        columns.extend(frame.keys.columns(&ids)?);
        Ok(Content::Rows(batch_of(frame.saved_schema(REVISION, false)?, columns, flat.len())?))
    }

    /// Puts back what [`Panes::save`] gave.
    pub(crate) fn restore(&mut self, frame: &mut Frame, saved: &Pieces) -> Result<(), RestoreError> {
        self.is_split = saved.is_split(PANES);
        for panes in saved.all(PANES) {
            self.restore_panes(frame, panes)?;
        }
        saved.all(REVISIONS).try_for_each(|revisions| self.restore_revisions(frame, revisions))
    }

    fn restore_panes(&mut self, frame: &mut Frame, panes: &RecordBatch) -> Result<(), RestoreError> {
        check_saved(panes, &frame.saved_schema(PANE, true)?)?;
        let count = frame.program.key_count();
        let ids = frame.keys.intern(&panes.columns()[1..1 + count], panes.num_rows())?;
        let starts = panes.column(0).as_primitive::<Int64Type>().values();
        let mut row = 0;
        for run in starts.chunk_by(|a, b| a == b) {
            let mut pane = Pane::new(&frame.program, run.len(), frame.keys.bound());
            pane.slots(&ids[row..row + run.len()], &mut frame.keys);
            pane.settle();
            pane.saved = Saved::AsItIs;
            load(&mut pane.state.columns, &frame.program, &panes.slice(row, run.len()), 1 + count)?;
            self.panes.insert(Micros(run[0]), pane);
            row += run.len();
        }
        Ok(())
    }

    fn restore_revisions(&mut self, frame: &mut Frame, revisions: &RecordBatch) -> Result<(), RestoreError> {
        check_saved(revisions, &frame.saved_schema(REVISION, false)?)?;
        let count = frame.program.key_count();
        let ids = frame.keys.intern(&revisions.columns()[2..2 + count], revisions.num_rows())?;
        let (ends, counts) =
            (revisions.column(0).as_primitive::<Int64Type>(), revisions.column(1).as_primitive::<Int64Type>());
        for (at, id) in ids.into_iter().enumerate() {
            frame.keys.hold(id);
            self.revisions.entry(Micros(ends.value(at))).or_default().insert(id, counts.value(at));
        }
        Ok(())
    }
}

/// How much event time one of several parts holds.
fn width_of_part(frame: &Frame) -> Span {
    let (window, lateness) = (frame.program.window(), frame.timing.allowed_lateness);
    let panes = window.size().0.saturating_add(lateness.0) / window.pane().0;
    Span(window.pane().0 * panes.div_euclid(PARTS).max(1))
}

fn saved_panes(frame: &Frame, panes: &mut [(Micros, &mut Pane)]) -> Result<Content> {
    let schema = frame.saved_schema(PANE, true)?;
    let mut batches = Vec::with_capacity(panes.len());
    for (start, pane) in panes {
        let rows = pane.state.ids.len();
        let mut columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from_value(start.0, rows))];
        columns.extend(frame.keys.columns(&pane.state.ids)?);
        for column in &mut pane.state.columns {
            columns.extend(column.save()?);
        }
        batches.push(batch_of(schema.clone(), columns, rows)?);
    }
    Ok(Content::Rows(match batches.pop() {
        Some(only) if batches.is_empty() => only,
        last => compute::concat_batches(&schema, batches.iter().chain(&last))?,
    }))
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

fn evaluate_all(program: &Program, state: &mut Merged) -> Result<Vec<ArrayRef>> {
    let slots: Vec<Slot> = (0..state.ids.len() as Slot).collect();
    evaluate(program, &mut state.columns, &slots)
}
