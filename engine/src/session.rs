//! Session windows: one slot of state for each run of events of a key without a longer gap.
//!
//! A session is final once the watermark has passed its end; an event exactly at the end still belongs. Late events
//! follow Flink's and Beam's rule: an event is dropped only when the session it would be in, joined with those it
//! touches, is past its end and the allowed lateness. Where one extends or joins sessions that were final already,
//! their rows are withdrawn and the new session's row takes the next revision.

use crate::accumulate::{Column, Slot};
use crate::checkpoint::{Content, Draft, Pieces};
use crate::event::{Micros, Span};
use crate::key::{KeyId, batch_of};
use crate::metric::{Frame, Groups, PANES, RestoreError, Rows, check_saved, times};
use crate::panes::{evaluate, load};
use crate::program::{Arguments, Program};
use crate::runs::Grouper;
use crate::shared::Shared;
use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, TimestampMicrosecondArray};
use arrow::compute;
use arrow::datatypes::Int64Type;
use datafusion_common::Result;
use std::collections::BTreeSet;
use std::sync::Arc;

/// No slot.
const NONE: Slot = Slot::MAX;

#[derive(Clone)]
struct Session {
    key: KeyId,
    first: Micros,
    last: Micros,
    /// Where it stands in the queue of closings: at its end or, since events move that on, before it.
    due: Micros,
    /// The session of the same key that starts before this one.
    older: Slot,
    /// Of its next final row.
    revision: i64,
    /// Its final row is out, with these bounds.
    shown: bool,
    /// Events came since the last tick, or since the final row.
    changed: bool,
}

/// The sessions of one metric.
pub(crate) struct Sessions {
    gap: Span,
    all: Vec<Session>, // by slot
    columns: Vec<Column>,
    grouper: Grouper,
    free: Vec<Slot>,
    newest: Vec<Slot>, // by key: the session that starts last
    due: BTreeSet<(Micros, Slot)>,
    changed: Vec<Slot>,
    looked_at: Vec<Slot>, // changed before the last look, and not shown by a tick since
    corrected: Vec<Slot>, // closed sessions that late events changed, until their rows are out
    withdrawn: Vec<(KeyId, Micros, Micros, i64)>, // key, first and last event, revision
    unsaved: bool,        // they are others than at the last checkpoint
}

/// Rows of a batch whose slots are known but whose values are not taken in yet.
#[derive(Default)]
struct Pending {
    rows: Vec<u32>,
    slots: Vec<Slot>,
}

impl Sessions {
    pub(crate) fn new(program: &Program, gap: Span) -> Self {
        Self {
            gap,
            all: Vec::new(),
            columns: program.kinds.iter().map(|kind| kind.column()).collect(),
            grouper: Grouper::default(),
            free: Vec::new(),
            newest: Vec::new(),
            due: BTreeSet::new(),
            changed: Vec::new(),
            looked_at: Vec::new(),
            corrected: Vec::new(),
            withdrawn: Vec::new(),
            unsaved: false,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.due.len()
    }

    /// The first event of all sessions.
    pub(crate) fn oldest(&self) -> Option<Micros> {
        self.due.iter().map(|&(_, slot)| self.all[slot as usize].first).min()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.columns.iter().map(Column::bytes).sum::<usize>()
            + self.all.capacity() * size_of::<Session>()
            + (self.free.capacity() + self.newest.capacity()) * size_of::<Slot>()
            + self.due.len() * 24
            + self.grouper.bytes()
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
        let all = times(batch);
        let delay = frame.timing.max_delay;
        let (lowest, highest) = shared.bounds(all);
        // only events behind the watermark can meet a session that is final
        let watermarks: Option<Vec<Micros>> = (lowest < frontier.max(highest).minus(delay)).then(|| {
            let before = |seen: &mut Micros, &at: &i64| {
                let watermark = seen.minus(delay);
                *seen = (*seen).max(Micros(at));
                Some(watermark)
            };
            all.iter().scan(frontier, before).collect()
        });
        let done = shared.done(frame, batch)?;
        let chosen = done.keep.as_ref().map(|keep| keep.values().set_indices().map(|row| row as u32));
        let chosen: Option<Vec<u32>> = chosen.map(Iterator::collect);
        let front = done.front(frame, batch)?;
        if front.rows.num_rows() == 0 {
            return Ok(());
        }
        self.unsaved = true;
        let arguments = front.arguments(&frame.program)?;
        let (part, ids) = (&front.rows, front.ids());
        // a session that is over may be a key's last one: its number must not go to another key meanwhile
        let held: &[KeyId] = if watermarks.is_some() { ids } else { &[] };
        held.iter().for_each(|&id| frame.keys.hold(id));
        let mut pending = Pending::default();
        for (row, (&at, &id)) in times(part).iter().zip(ids).enumerate() {
            let at = Micros(at);
            let original = chosen.as_ref().map_or(row as u32, |chosen| chosen[row]);
            let watermark = watermarks.as_ref().map_or(Micros::MIN, |marks| marks[original as usize]);
            if at < watermark && self.due.first().is_some_and(|(due, _)| *due < watermark) {
                self.take_in(&mut pending, &arguments)?;
                self.advance(frame, watermark, out)?;
            }
            match self.place(frame, id, at, watermark, &mut pending, &arguments)? {
                Some(slot) => {
                    pending.rows.push(row as u32);
                    pending.slots.push(slot);
                }
                None => dropped.push(original),
            }
        }
        self.take_in(&mut pending, &arguments)?;
        self.emit_corrections(frame, out)?;
        held.iter().for_each(|&id| frame.keys.release(id));
        Ok(())
    }

    fn take_in(&mut self, pending: &mut Pending, arguments: &[Arguments]) -> Result<()> {
        let labelled = pending.slots.iter().copied().zip(pending.rows.iter().copied());
        let grouped = self.grouper.group(self.all.len(), labelled);
        for (column, arguments) in self.columns.iter_mut().zip(arguments) {
            column.update(arguments, &grouped.labels, &grouped.runs)?;
        }
        pending.rows.clear();
        pending.slots.clear();
        Ok(())
    }

    fn end(&self, slot: Slot) -> Micros {
        self.all[slot as usize].last.plus(self.gap)
    }

    /// The slot of the session that an event of `id` at `at` belongs to; `None` when it came too late for any.
    #[inline]
    fn place(
        &mut self,
        frame: &mut Frame,
        id: KeyId,
        at: Micros,
        watermark: Micros,
        pending: &mut Pending,
        arguments: &[Arguments],
    ) -> Result<Option<Slot>> {
        if self.newest.len() <= id as usize {
            self.newest.resize(id as usize + 1, NONE);
        }
        let newest = self.newest[id as usize];
        if newest != NONE {
            // nearly always the event goes on with the newest session, and that one is open
            let session = &mut self.all[newest as usize];
            if session.first <= at && at <= session.last.plus(self.gap) && !session.shown && at >= watermark {
                session.last = session.last.max(at);
                if !session.changed {
                    session.changed = true;
                    self.changed.push(newest);
                }
                return Ok(Some(newest));
            }
        }
        // the sessions before and behind the event: the list is short and ordered, latest first
        let (mut behind, mut slot) = (NONE, newest);
        while slot != NONE && self.all[slot as usize].first > at {
            (behind, slot) = (slot, self.all[slot as usize].older);
        }
        let before = slot;
        let touches_before = before != NONE && at <= self.end(before);
        let touches_behind = behind != NONE && self.all[behind as usize].first <= at.plus(self.gap);
        let slot = match (touches_before, touches_behind) {
            (false, false) => {
                if at.plus(self.gap).plus(frame.timing.allowed_lateness) < watermark {
                    return Ok(None);
                }
                frame.keys.hold(id);
                self.open(id, at, before, behind)?
            }
            (true, false) => {
                self.extend(before, at, at, watermark);
                before
            }
            (false, true) => {
                self.extend(behind, at, at, watermark);
                behind
            }
            (true, true) => {
                self.take_in(pending, arguments)?;
                let (first, last) = (self.all[before as usize].first, self.all[before as usize].last);
                self.withdraw(before);
                self.extend(behind, first, last, watermark);
                let revision = self.all[before as usize].revision;
                let older = self.all[before as usize].older;
                let joined = &mut self.all[behind as usize];
                joined.revision = joined.revision.max(revision);
                joined.older = older;
                // the earlier one's sum comes first, as its events did in event time
                for column in &mut self.columns {
                    column.join(&[before], &[behind])?;
                    column.swap(before, behind);
                }
                frame.keys.release(id);
                self.discard(before)?;
                behind
            }
        };
        if self.end(slot) < watermark {
            self.corrected.push(slot);
        } else if !std::mem::replace(&mut self.all[slot as usize].changed, true) {
            self.changed.push(slot);
        }
        Ok(Some(slot))
    }

    /// A new session between `before` and `behind`, those of its key that start before and after it.
    fn open(&mut self, key: KeyId, at: Micros, before: Slot, behind: Slot) -> Result<Slot> {
        let due = at.plus(self.gap);
        let session =
            Session { key, first: at, last: at, due, older: before, revision: 0, shown: false, changed: false };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.all[slot as usize] = session;
                slot
            }
            None => {
                self.all.push(session);
                for column in &mut self.columns {
                    column.grow(self.all.len())?;
                }
                (self.all.len() - 1) as Slot
            }
        };
        match behind {
            NONE => self.newest[key as usize] = slot,
            behind => self.all[behind as usize].older = slot,
        }
        self.due.insert((due, slot));
        Ok(slot)
    }

    /// Lets a session reach from `first` to `last` too; a final row with other bounds is withdrawn.
    fn extend(&mut self, slot: Slot, first: Micros, last: Micros, watermark: Micros) {
        let session = &self.all[slot as usize];
        let (first, last) = (session.first.min(first), session.last.max(last));
        let reopened = last.plus(self.gap) >= watermark;
        if (first, last) != (session.first, session.last) || reopened {
            self.withdraw(slot);
        }
        let end = last.plus(self.gap);
        let session = &mut self.all[slot as usize];
        (session.first, session.last) = (first, last);
        if session.due > end && !session.shown {
            // it waited to be forgotten and is to be closed again
            self.due.remove(&(session.due, slot));
            session.due = end;
            self.due.insert((end, slot));
        }
    }

    fn withdraw(&mut self, slot: Slot) {
        let session = &mut self.all[slot as usize];
        if std::mem::replace(&mut session.shown, false) {
            self.withdrawn.push((session.key, session.first, session.last, session.revision));
        }
    }

    /// Frees a slot whose session is no longer in its key's list.
    fn discard(&mut self, slot: Slot) -> Result<()> {
        let session = &mut self.all[slot as usize];
        self.due.remove(&(session.due, slot));
        session.changed = false;
        session.shown = false;
        session.key = KeyId::MAX; // it may still stand among the changed ones
        for column in &mut self.columns {
            column.clear(slot)?;
        }
        self.free.push(slot);
        Ok(())
    }

    /// Takes a session out of its key's list and frees its slot.
    fn forget(&mut self, frame: &mut Frame, slot: Slot) -> Result<()> {
        let (key, older) = (self.all[slot as usize].key, self.all[slot as usize].older);
        let mut at = self.newest[key as usize];
        if at == slot {
            self.newest[key as usize] = older;
        } else {
            while self.all[at as usize].older != slot {
                at = self.all[at as usize].older;
            }
            self.all[at as usize].older = older;
        }
        self.discard(slot)?;
        frame.keys.release(key);
        Ok(())
    }

    /// As [`crate::metric::Metric::advance`].
    pub(crate) fn advance(&mut self, frame: &mut Frame, watermark: Micros, out: &mut Vec<Rows>) -> Result<()> {
        self.emit_corrections(frame, out)?;
        let lateness = frame.timing.allowed_lateness;
        let (mut closed, mut over) = (Vec::new(), Vec::new());
        while let Some(&(due, slot)) = self.due.first().filter(|(due, _)| *due < watermark) {
            self.due.remove(&(due, slot));
            let end = self.end(slot);
            let is_final = end < watermark;
            if is_final && !self.all[slot as usize].shown {
                closed.push(slot);
            }
            let next = if is_final { end.plus(lateness) } else { end };
            if is_final && next < watermark {
                over.push(slot);
            } else {
                self.all[slot as usize].due = next;
                self.due.insert((next, slot));
            }
        }
        frame.closed = watermark;
        self.unsaved |= !closed.is_empty() || !over.is_empty();
        self.emit_final(frame, closed, out)?;
        for slot in over {
            self.forget(frame, slot)?;
        }
        if self.due.is_empty() {
            // keeps no room for the sessions of busy times
            *self = Sessions { unsaved: self.unsaved, ..Sessions::new(&frame.program, self.gap) };
        }
        Ok(())
    }

    /// Rows of closed sessions that late events changed, and of those they withdrew.
    fn emit_corrections(&mut self, frame: &Frame, out: &mut Vec<Rows>) -> Result<()> {
        let mut slots = std::mem::take(&mut self.corrected);
        slots.sort_unstable();
        slots.dedup();
        // since then another event may have opened it again or joined it to another one
        slots.retain(|&slot| self.all[slot as usize].key != KeyId::MAX && self.end(slot) < frame.closed);
        self.emit_final(frame, slots, out)
    }

    fn emit_final(&mut self, frame: &Frame, slots: Vec<Slot>, out: &mut Vec<Rows>) -> Result<()> {
        let withdrawn = std::mem::take(&mut self.withdrawn);
        let mut rows = self.rows(frame, slots.clone(), true)?;
        for slot in slots {
            let session = &mut self.all[slot as usize];
            (session.shown, session.changed) = (true, false);
            session.revision += 1;
        }
        let ids: Vec<KeyId> = withdrawn.iter().map(|w| w.0).collect();
        let revisions: Vec<i64> = withdrawn.iter().map(|w| w.3).collect();
        let starts = time_column(withdrawn.iter().map(|w| w.1));
        let ends = time_column(withdrawn.iter().map(|w| w.2.plus(self.gap)));
        frame.withdraw(&mut rows, (starts, ends), &ids, &revisions)?;
        out.extend(rows);
        Ok(())
    }

    /// Rows of sessions, the first to end first.
    fn rows(&mut self, frame: &Frame, mut slots: Vec<Slot>, is_final: bool) -> Result<Option<Rows>> {
        if slots.is_empty() {
            return Ok(None);
        }
        slots.sort_by_key(|&slot| (self.all[slot as usize].last, self.all[slot as usize].first));
        let sessions = || slots.iter().map(|&slot| &self.all[slot as usize]);
        let ids: Vec<KeyId> = sessions().map(|s| s.key).collect();
        let starts = time_column(sessions().map(|s| s.first));
        let ends = time_column(sessions().map(|s| s.last.plus(self.gap)));
        let revisions = is_final.then(|| sessions().map(|s| s.revision).collect());
        let results = evaluate(&frame.program, &mut self.columns, &slots)?;
        frame.rows(Groups { starts, ends, ids: &ids, results, revisions })
    }

    /// As [`crate::metric::Metric::next_end`]: just past the end of the open session that ends first.
    pub(crate) fn next_end(&self) -> Option<Micros> {
        let mut first: Option<Micros> = None;
        for &(due, slot) in &self.due {
            if first.is_some_and(|first| first <= due) {
                break;
            }
            if !self.all[slot as usize].shown {
                let end = self.end(slot);
                first = Some(first.map_or(end, |first| first.min(end)));
            }
        }
        first.map(|end| end.plus(Span(1)))
    }

    /// Provisional rows of the open sessions that changed since the last tick.
    pub(crate) fn tick(&mut self, frame: &Frame, out: &mut Vec<Rows>) -> Result<()> {
        let mut slots = self.take_changed();
        slots.append(&mut self.looked_at);
        // one that was looked at may have closed since
        slots.retain(|&slot| self.all[slot as usize].key != KeyId::MAX && !self.all[slot as usize].shown);
        slots.sort_unstable();
        slots.dedup();
        out.extend(self.rows(frame, slots, false)?);
        Ok(())
    }

    /// The same since the last look.
    pub(crate) fn look(&mut self, frame: &Frame, out: &mut Vec<Rows>) -> Result<()> {
        let slots = self.take_changed();
        self.looked_at.extend_from_slice(&slots);
        if self.looked_at.len() > 2 * self.all.len() {
            self.looked_at.sort_unstable();
            self.looked_at.dedup();
        }
        out.extend(self.rows(frame, slots, false)?);
        Ok(())
    }

    fn take_changed(&mut self) -> Vec<Slot> {
        let mut slots = std::mem::take(&mut self.changed);
        slots.retain(|&slot| std::mem::replace(&mut self.all[slot as usize].changed, false));
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// The rows of all open sessions.
    pub(crate) fn live(&mut self, frame: &Frame) -> Result<Vec<Rows>> {
        let open = self.due.iter().map(|(_, slot)| *slot).filter(|&slot| !self.all[slot as usize].shown);
        let open: Vec<Slot> = open.collect();
        Ok(self.rows(frame, open, false)?.into_iter().collect())
    }

    /// The sessions as one part.
    pub(crate) fn save(&mut self, frame: &Frame, draft: &mut Draft) -> Result<()> {
        let changed = std::mem::take(&mut self.unsaved);
        if self.due.is_empty() {
            return Ok(());
        }
        draft.put(PANES, changed, || self.saved(frame).map(Content::Rows))
    }

    fn saved(&mut self, frame: &Frame) -> Result<RecordBatch> {
        let slots: Vec<Slot> = self.due.iter().map(|(_, slot)| *slot).collect();
        let sessions = || slots.iter().map(|&slot| &self.all[slot as usize]);
        let ints = |each: &dyn Fn(&Session) -> i64| -> ArrayRef {
            Arc::new(Int64Array::from_iter_values(sessions().map(each)))
        };
        let ids: Vec<KeyId> = sessions().map(|s| s.key).collect();
        let mut columns =
            vec![ints(&|s| s.first.0), ints(&|s| s.last.0), ints(&|s| s.revision), ints(&|s| i64::from(s.shown))];
        columns.extend(frame.keys.columns(&ids)?);
        let chosen = arrow::array::UInt32Array::from(slots.clone());
        for column in &mut self.columns {
            for state in column.save()? {
                columns.push(compute::take(&state, &chosen, None)?);
            }
        }
        batch_of(frame.saved_schema(SESSION, true)?, columns, slots.len())
    }

    /// Puts back what [`Sessions::save`] gave.
    pub(crate) fn restore(&mut self, frame: &mut Frame, saved: &Pieces) -> Result<(), RestoreError> {
        let Some(saved) = saved.all(PANES).next() else { return Ok(()) };
        check_saved(saved, &frame.saved_schema(SESSION, true)?)?;
        let first = SESSION.len();
        let ids = frame.keys.intern(&saved.columns()[first..first + frame.program.key_count()], saved.num_rows())?;
        let ints = |at: usize| saved.column(at).as_primitive::<Int64Type>().values();
        self.newest = vec![NONE; ids.iter().max().map_or(0, |&id| id as usize + 1)];
        for (row, &key) in ids.iter().enumerate() {
            let (first, last, shown) = (Micros(ints(0)[row]), Micros(ints(1)[row]), ints(3)[row] == 1);
            let end = last.plus(self.gap);
            let due = if shown { end.plus(frame.timing.allowed_lateness) } else { end };
            frame.keys.hold(key);
            self.due.insert((due, row as Slot));
            let (revision, changed) = (ints(2)[row], false);
            self.all.push(Session { key, first, last, due, older: NONE, revision, shown, changed });
        }
        let mut order: Vec<Slot> = (0..ids.len() as Slot).collect();
        order.sort_by_key(|&slot| self.all[slot as usize].first);
        for slot in order {
            let key = self.all[slot as usize].key as usize;
            self.all[slot as usize].older = std::mem::replace(&mut self.newest[key], slot);
        }
        load(&mut self.columns, &frame.program, saved, first + frame.program.key_count())?;
        Ok(())
    }
}

/// Columns of saved sessions in front of the keys.
const SESSION: &[&str] = &["first", "last", "revision", "shown"];

fn time_column(times: impl Iterator<Item = Micros>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_iter_values(times.map(|at| at.0)).with_timezone("+00:00"))
}
