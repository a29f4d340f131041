//! Panes merged into windows: slots of keys, and the running state of windows that overlap.

use crate::accumulate::{Column, Slot};
use crate::event::Micros;
use crate::key::KeyId;
use crate::program::Program;
use datafusion_common::Result;
use hashbrown::HashMap;

/// No slot.
const NONE: Slot = Slot::MAX;

/// The slot of each key. A plain array where a good part of all keys has one: an addition instead of a hash.
pub(crate) enum Index {
    Dense(Vec<Slot>),
    Sparse(HashMap<KeyId, Slot>),
}

impl Index {
    /// For `count` keys out of `bound`.
    pub(crate) fn new(count: usize, bound: usize) -> Index {
        // a hash table takes about nine bytes a key and an array four for every key there is
        if bound <= 64 || count * 4 >= bound {
            Index::Dense(vec![NONE; bound])
        } else {
            Index::Sparse(HashMap::with_capacity(count))
        }
    }

    #[inline]
    pub(crate) fn get(&self, id: KeyId) -> Option<Slot> {
        match self {
            Index::Dense(slots) => slots.get(id as usize).copied().filter(|&slot| slot != NONE),
            Index::Sparse(slots) => slots.get(&id).copied(),
        }
    }

    pub(crate) fn set(&mut self, id: KeyId, slot: Slot) {
        match self {
            Index::Dense(slots) => {
                if slots.len() <= id as usize {
                    slots.resize(id as usize + 1, NONE);
                }
                slots[id as usize] = slot;
            }
            Index::Sparse(slots) => _ = slots.insert(id, slot),
        }
    }

    /// The slots of all keys, in no order.
    fn slots(&self) -> impl Iterator<Item = Slot> {
        let (dense, sparse) = match self {
            Index::Dense(slots) => (Some(slots.iter().copied().filter(|&slot| slot != NONE)), None),
            Index::Sparse(slots) => (None, Some(slots.values().copied())),
        };
        dense.into_iter().flatten().chain(sparse.into_iter().flatten())
    }

    fn remove(&mut self, id: KeyId) {
        match self {
            Index::Dense(slots) => slots[id as usize] = NONE,
            Index::Sparse(slots) => _ = slots.remove(&id),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Index::Dense(slots) => slots.capacity() * size_of::<Slot>(),
            Index::Sparse(slots) => slots.capacity() * 9,
        }
    }
}

/// State of the keys of one pane, or of several merged.
pub(crate) struct Merged {
    pub(crate) index: Index,
    pub(crate) ids: Vec<KeyId>, // by slot
    pub(crate) columns: Vec<Column>,
}

impl Merged {
    pub(crate) fn new(program: &Program, count: usize, bound: usize) -> Self {
        let columns = program.kinds.iter().map(|kind| kind.column()).collect();
        Self { index: Index::new(count, bound), ids: Vec::new(), columns }
    }

    /// The slot of a key, a new one where it has none.
    #[inline]
    pub(crate) fn slot(&mut self, id: KeyId) -> Slot {
        self.index.get(id).unwrap_or_else(|| {
            self.index.set(id, self.ids.len() as Slot);
            self.ids.push(id);
            (self.ids.len() - 1) as Slot
        })
    }

    /// Adds what the columns of others hold in the slots `theirs` for the keys `ids`.
    pub(crate) fn add(&mut self, columns: &mut [Column], ids: &[KeyId], theirs: &[Slot]) -> Result<()> {
        let mine: Vec<Slot> = ids.iter().map(|&id| self.slot(id)).collect();
        for (column, other) in self.columns.iter_mut().zip(columns) {
            column.grow(self.ids.len())?;
            column.merge(&mine, other, theirs)?;
        }
        Ok(())
    }

    pub(crate) fn bytes(&self) -> usize {
        self.columns.iter().map(Column::bytes).sum::<usize>()
            + self.index.bytes()
            + self.ids.capacity() * size_of::<KeyId>()
    }
}

/// The running state of windows that overlap, so that a slide costs a merge or two a key and not one for each pane.
///
/// Event time is cut into blocks as long as a window. A window is the end of one block and the start of the next one:
/// `front` holds, for every pane of the earlier block, what it and the panes behind it come to; `back` the panes of the
/// later block so far. Both follow from the panes alone, so that a restart changes no bit of an answer. Sources: M. van
/// Herk, "A fast algorithm for local minimum and maximum filters", Pattern Recognition Letters 13 (1992); J. Gil and
/// M. Werman, "Computing 2-D min, median, and max filters", IEEE PAMI 15 (1993).
///
/// `front` has one slot a key and pane where the key had events, linked to the next such pane: keys that come seldom
/// take no room in the panes between.
pub(crate) struct Running {
    /// Where the later block starts.
    pub(crate) block: Micros,
    /// Panes of the later block before this instant are in `back`.
    pub(crate) until: Micros,
    front: Merged, // index: the slot of each key in the first pane that the window still holds
    panes: Vec<(Micros, usize)>, // panes of the front, latest first, and where their slots end
    next: Vec<Slot>,
    back: Merged,
}

impl Running {
    /// From the panes of the earlier block that are still there, latest first.
    pub(crate) fn new<'a>(
        program: &Program,
        block: Micros,
        panes: impl Iterator<Item = (Micros, &'a mut Merged)>,
        bound: usize,
    ) -> Result<Self> {
        let mut running = Self {
            block,
            until: block,
            front: Merged::new(program, bound, bound),
            panes: Vec::new(),
            next: Vec::new(),
            back: Merged::new(program, bound, bound),
        };
        for (start, pane) in panes {
            let front = &mut running.front;
            let first = front.ids.len();
            let mine: Vec<Slot> = (first..first + pane.ids.len()).map(|slot| slot as Slot).collect();
            let theirs: Vec<Slot> = (0..pane.ids.len() as Slot).collect();
            front.ids.extend_from_slice(&pane.ids);
            let (mut linked, mut behind) = (Vec::new(), Vec::new());
            for (&id, &slot) in pane.ids.iter().zip(&mine) {
                let next = front.index.get(id);
                running.next.push(next.unwrap_or(NONE));
                if let Some(next) = next {
                    linked.push(slot);
                    behind.push(next);
                }
                front.index.set(id, slot);
            }
            for (column, other) in front.columns.iter_mut().zip(&mut pane.columns) {
                column.grow(front.ids.len())?;
                column.merge(&mine, other, &theirs)?;
                column.join(&linked, &behind)?;
            }
            running.panes.push((start, front.ids.len()));
        }
        Ok(running)
    }

    /// Lets go of the panes before `start`.
    pub(crate) fn leave(&mut self, start: Micros) {
        while let Some(&(pane, end)) = self.panes.last().filter(|(pane, _)| *pane < start) {
            self.panes.pop();
            let first = self.panes.last().map_or(0, |(_, end)| *end);
            debug_assert!(pane < self.block);
            for slot in first..end {
                let id = self.front.ids[slot];
                match self.next[slot] {
                    NONE => self.front.index.remove(id),
                    next => self.front.index.set(id, next),
                }
            }
        }
    }

    /// Takes in the next pane of the later block.
    pub(crate) fn enter(&mut self, pane: &mut Merged) -> Result<()> {
        let theirs: Vec<Slot> = (0..pane.ids.len() as Slot).collect();
        self.back.add(&mut pane.columns, &pane.ids, &theirs)
    }

    /// Adds the state of the window that starts at `start`, for `only` these keys or for all.
    pub(crate) fn write(&mut self, start: Micros, only: Option<&[KeyId]>, whole: &mut Merged) -> Result<()> {
        let within = self.panes.partition_point(|(pane, _)| *pane >= start);
        let limit = within.checked_sub(1).map_or(0, |last| self.panes[last].1);
        // the key's first pane that the window holds: links lead to later panes, whose slots are smaller
        let behind = |mut slot: Slot| {
            while slot != NONE && slot as usize >= limit {
                slot = self.next[slot as usize];
            }
            Some(slot).filter(|&slot| slot != NONE)
        };
        let (ids, slots): (Vec<KeyId>, Vec<Slot>) = match only {
            Some(only) => only.iter().filter_map(|&id| Some((id, behind(self.front.index.get(id)?)?))).unzip(),
            None => {
                // in the order of slots, so that a restart, which makes another index, changes no order of rows
                let mut slots: Vec<Slot> = self.front.index.slots().filter_map(behind).collect();
                slots.sort_unstable();
                (slots.iter().map(|&slot| self.front.ids[slot as usize]).collect(), slots)
            }
        };
        whole.add(&mut self.front.columns, &ids, &slots)?;
        match only {
            Some(only) => {
                let held = only.iter().filter_map(|&id| Some((id, self.back.index.get(id)?)));
                let (ids, slots): (Vec<KeyId>, Vec<Slot>) = held.unzip();
                whole.add(&mut self.back.columns, &ids, &slots)
            }
            None => {
                let slots: Vec<Slot> = (0..self.back.ids.len() as Slot).collect();
                whole.add(&mut self.back.columns, &self.back.ids, &slots)
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.front.bytes() + self.back.bytes() + self.next.capacity() * size_of::<Slot>() + self.panes.capacity() * 16
    }
}
