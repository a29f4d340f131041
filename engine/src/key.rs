//! Interned keys: the values of the GROUP BY columns become a small number, once.

use crate::runs::{Grouped, Grouper};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, RecordBatchOptions, StringArray,
    TimestampMicrosecondArray,
};
use arrow::buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow::row::{RowConverter, SortField};
use datafusion_common::Result;
use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Number of a key within one table. Reused after the last metric that held it let it go.
pub(crate) type KeyId = u32;

/// One value of a key in a fixed size. A text of up to 16 bytes is here as a whole, so that looking up a key follows no
/// pointer; of a longer one, its length and two hashes, and the bytes are compared where they are kept.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Part {
    low: u64,
    high: u64,
    /// Length of a text, or one of the constants.
    tag: u32,
}

const NULL: u32 = u32::MAX;
const NUMBER: u32 = u32::MAX - 1;
/// Texts up to this length are kept in a [`Part`].
const SHORT: usize = 16;

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn half(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")))
}

impl Part {
    const NULL: Part = Part { low: 0, high: 0, tag: NULL };

    fn number(value: i64) -> Part {
        Part { low: value as u64, high: 0, tag: NUMBER }
    }

    #[inline]
    fn text(bytes: &[u8], seeds: &Seeds) -> Part {
        let length = bytes.len();
        // first and last word may overlap: with the length they still say every byte
        let (low, high) = match length {
            8..=SHORT => (word(bytes, 0), word(bytes, length - 8)),
            4..8 => (half(bytes, 0), half(bytes, length - 4)),
            1..4 => (u64::from(bytes[0]), u64::from(bytes[length / 2]) | u64::from(bytes[length - 1]) << 8),
            0 => (0, 0),
            _ => (seeds.builder.hash_one(bytes), seeds.builder.hash_one((bytes, 1))),
        };
        Part { low, high, tag: length as u32 }
    }

    fn is_long(&self) -> bool {
        self.tag < NUMBER && self.tag as usize > SHORT
    }

    /// Appends the bytes of a short text.
    fn write(&self, out: &mut Vec<u8>) {
        let (length, start) = (self.tag as usize, out.len());
        out.resize(start + length, 0);
        let bytes = &mut out[start..];
        match length {
            8.. => {
                bytes[..8].copy_from_slice(&self.low.to_le_bytes());
                bytes[length - 8..].copy_from_slice(&self.high.to_le_bytes());
            }
            4..8 => {
                bytes[..4].copy_from_slice(&self.low.to_le_bytes()[..4]);
                bytes[length - 4..].copy_from_slice(&self.high.to_le_bytes()[..4]);
            }
            1..4 => {
                bytes[0] = self.low as u8;
                bytes[length / 2] = self.high as u8;
                bytes[length - 1] = (self.high >> 8) as u8;
            }
            0 => {}
        }
    }
}

/// Secrets of this process, so that nobody can choose keys that collide.
struct Seeds {
    builder: DefaultHashBuilder,
    first: u64,
    second: u64,
}

impl Seeds {
    /// Folded multiply, as in wyhash and foldhash.
    #[inline]
    fn mix(&self, hash: u64, part: &Part) -> u64 {
        let a = hash ^ part.low ^ self.first;
        let b = part.high.rotate_left(32) ^ u64::from(part.tag) ^ self.second;
        let product = u128::from(a) * u128::from(b);
        let folded = (product as u64) ^ ((product >> 64) as u64);
        folded ^ part.low.rotate_left(23) // a product with zero keeps nothing
    }
}

/// How the key columns are told apart.
enum Layout {
    /// A metric without keys.
    None,
    /// A part for each column.
    Parts(Vec<DataType>),
    /// Columns of other types, encoded into one text.
    Rows(RowConverter),
}

/// Keys by number. Memory follows the keys in open panes, not the keys ever seen.
pub(crate) struct KeyTable {
    layout: Layout,
    width: usize, // parts of a key
    index: HashTable<KeyId>,
    parts: Vec<Part>,             // by key, `width` each
    long: Vec<Option<Box<[u8]>>>, // by key and part, where any key has a long text
    hashes: Vec<u64>,             // by key
    panes: Vec<u32>,              // by key: how many panes hold it
    free: Vec<KeyId>,
    pins: u32,         // batches whose keys have to keep their numbers
    loose: Vec<KeyId>, // let go of meanwhile
    seeds: Seeds,
    long_bytes: usize,
    batch: Vec<Part>, // parts of the batch at hand
    grouper: Grouper,
}

impl KeyTable {
    pub(crate) fn new(schema: &SchemaRef) -> Result<Self> {
        let types: Vec<DataType> = schema.fields().iter().map(|f| f.data_type().clone()).collect();
        let has_part = |kind: &DataType| {
            matches!(
                kind,
                DataType::Utf8 | DataType::Int64 | DataType::Boolean | DataType::Timestamp(TimeUnit::Microsecond, _)
            )
        };
        let (layout, width) = if types.is_empty() {
            (Layout::None, 0)
        } else if types.iter().all(has_part) {
            let width = types.len();
            (Layout::Parts(types), width)
        } else {
            (Layout::Rows(RowConverter::new(types.into_iter().map(SortField::new).collect())?), 1)
        };
        let builder = DefaultHashBuilder::default();
        let (first, second) = (builder.hash_one(1), builder.hash_one(2));
        Ok(Self {
            layout,
            width,
            index: HashTable::new(),
            parts: Vec::new(),
            long: Vec::new(),
            hashes: Vec::new(),
            panes: Vec::new(),
            free: Vec::new(),
            pins: 0,
            loose: Vec::new(),
            seeds: Seeds { builder, first, second },
            long_bytes: 0,
            batch: Vec::new(),
            grouper: Grouper::default(),
        })
    }

    /// The key of each of `count` rows of `columns`.
    pub(crate) fn intern(&mut self, columns: &[ArrayRef], count: usize) -> Result<Vec<KeyId>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let encoded;
        let mut texts: Vec<Option<&dyn Bytes>> = Vec::new();
        let width = self.width;
        let mut batch = std::mem::take(&mut self.batch);
        batch.clear();
        batch.resize(count * width, Part::NULL);
        match &mut self.layout {
            Layout::None => {
                if self.panes.is_empty() {
                    self.panes.push(0);
                    self.hashes.push(0);
                }
                return Ok(vec![0; count]);
            }
            Layout::Parts(_) => {
                for (at, column) in columns.iter().enumerate() {
                    let out = batch[at..].iter_mut().step_by(width);
                    let nulls = column.nulls().filter(|nulls| nulls.null_count() > 0);
                    let text = write_parts(column, out, &self.seeds);
                    for row in nulls.iter().flat_map(|nulls| (0..count).filter(|&row| nulls.is_null(row))) {
                        batch[row * width + at] = Part::NULL;
                    }
                    texts.push(text);
                }
            }
            Layout::Rows(converter) => {
                let columns: Vec<ArrayRef> = columns.iter().map(one_zero).collect();
                encoded = converter.convert_columns(&columns)?;
                for (row, part) in batch.iter_mut().enumerate() {
                    *part = Part::text(encoded.row(row).as_ref(), &self.seeds);
                }
                texts.push(Some(&encoded));
            }
        }
        let mut ids = Vec::with_capacity(count);
        let mut last: Option<(&[Part], KeyId)> = None; // runs of one key are common
        for (row, parts) in batch.chunks_exact(width).enumerate() {
            let is_long = parts.iter().any(Part::is_long);
            if let Some((before, id)) = last.filter(|_| !is_long)
                && before == parts
            {
                ids.push(id);
                continue;
            }
            let id = if is_long {
                let long: Vec<Option<&[u8]>> =
                    (0..width).map(|at| texts[at].filter(|_| parts[at].is_long()).map(|text| text.at(row))).collect();
                self.find(parts, Some(&long))
            } else {
                self.find(parts, None)
            };
            last = Some((parts, id));
            ids.push(id);
        }
        self.batch = batch;
        Ok(ids)
    }

    #[inline]
    fn find(&mut self, parts: &[Part], long: Option<&[Option<&[u8]>]>) -> KeyId {
        let width = self.width;
        let hash = parts.iter().fold(0, |hash, part| self.seeds.mix(hash, part));
        let (stored, hashes, kept) = (&self.parts, &self.hashes, &self.long);
        let is_same = |&id: &KeyId| {
            let at = id as usize * width;
            stored[at..at + width] == *parts
                && long.is_none_or(|long| long.iter().zip(&kept[at..at + width]).all(|(a, b)| *a == b.as_deref()))
        };
        match self.index.entry(hash, is_same, |&id| hashes[id as usize]) {
            Entry::Occupied(found) => *found.get(),
            Entry::Vacant(empty) => {
                let id = match self.free.pop() {
                    Some(id) => {
                        let at = id as usize * width;
                        self.parts[at..at + width].copy_from_slice(parts);
                        self.hashes[id as usize] = hash;
                        id
                    }
                    None => {
                        self.parts.extend_from_slice(parts);
                        self.hashes.push(hash);
                        self.panes.push(0);
                        (self.panes.len() - 1) as KeyId
                    }
                };
                empty.insert(id);
                if !self.long.is_empty() || long.is_some() {
                    self.long.resize(self.parts.len(), None);
                }
                for (at, text) in long.into_iter().flatten().enumerate() {
                    self.long_bytes += text.map_or(0, |text| text.len());
                    self.long[id as usize * width + at] = text.map(Into::into);
                }
                id
            }
        }
    }

    /// A pane took the key in.
    pub(crate) fn hold(&mut self, id: KeyId) {
        self.panes[id as usize] += 1;
    }

    /// A pane that held the key is gone; with the last one the key is forgotten.
    pub(crate) fn release(&mut self, id: KeyId) {
        let at = id as usize;
        self.panes[at] -= 1;
        match self.pins {
            _ if self.panes[at] > 0 => {}
            0 => self.forget(id),
            _ => self.loose.push(id),
        }
    }

    fn unpin(&mut self) {
        self.pins -= 1;
        if self.pins == 0 {
            let loose = std::mem::take(&mut self.loose);
            self.forget_unheld(&loose);
        }
    }

    /// Forgets those of `ids` that nothing took in.
    pub(crate) fn forget_unheld(&mut self, ids: &[KeyId]) {
        for &id in ids {
            // one that stands here twice is gone already, and maybe the whole table with it
            if self.panes.get(id as usize) == Some(&0) {
                self.forget(id);
            }
        }
    }

    fn forget(&mut self, id: KeyId) {
        if let Layout::None = self.layout {
            return;
        }
        let Ok(found) = self.index.find_entry(self.hashes[id as usize], |&other| other == id) else { return };
        found.remove();
        if !self.long.is_empty() {
            for text in &mut self.long[id as usize * self.width..][..self.width] {
                self.long_bytes -= text.take().map_or(0, |text| text.len());
            }
        }
        self.free.push(id);
        if self.free.len() == self.panes.len() {
            // quiet metrics keep no room for the keys of busy times
            self.index = HashTable::new();
            (self.parts, self.long, self.hashes) = (Vec::new(), Vec::new(), Vec::new());
            (self.panes, self.free, self.batch) = (Vec::new(), Vec::new(), Vec::new());
            self.grouper = Grouper::default();
        }
    }

    /// How many keys hold state.
    pub(crate) fn len(&self) -> usize {
        match self.layout {
            Layout::None => self.panes.iter().filter(|&&panes| panes > 0).count(),
            _ => self.panes.len() - self.free.len(),
        }
    }

    /// One more than the greatest number of a key.
    pub(crate) fn bound(&self) -> usize {
        self.panes.len()
    }

    /// The key columns of `ids`, in that order.
    pub(crate) fn columns(&self, ids: &[KeyId]) -> Result<Vec<ArrayRef>> {
        match &self.layout {
            Layout::None => Ok(Vec::new()),
            Layout::Parts(types) => types.iter().enumerate().map(|(at, kind)| self.column(ids, at, kind)).collect(),
            Layout::Rows(converter) => {
                let parser = converter.parser();
                let mut bytes = Vec::new();
                let mut ends = Vec::with_capacity(ids.len());
                for &id in ids {
                    self.write(id, 0, &mut bytes);
                    ends.push(bytes.len());
                }
                let starts = std::iter::once(0).chain(ends.iter().copied());
                let rows = starts.zip(&ends).map(|(start, &end)| parser.parse(&bytes[start..end]));
                Ok(converter.convert_rows(rows)?)
            }
        }
    }

    fn write(&self, id: KeyId, at: usize, out: &mut Vec<u8>) {
        let place = id as usize * self.width + at;
        let part = &self.parts[place];
        if part.is_long() {
            out.extend_from_slice(self.long[place].as_deref().unwrap_or_default());
        } else if part.tag < NUMBER {
            part.write(out);
        }
    }

    fn column(&self, ids: &[KeyId], at: usize, kind: &DataType) -> Result<ArrayRef> {
        let parts = || ids.iter().map(|&id| &self.parts[id as usize * self.width + at]);
        let nulls = NullBuffer::from_iter(parts().map(|part| part.tag != NULL));
        let nulls = Some(nulls).filter(|nulls| nulls.null_count() > 0);
        let numbers = || parts().map(|part| part.low as i64);
        Ok(match kind {
            DataType::Int64 => Arc::new(Int64Array::new(numbers().collect(), nulls)),
            DataType::Boolean => Arc::new(BooleanArray::new(numbers().map(|n| n != 0).collect(), nulls)),
            DataType::Timestamp(_, zone) => {
                Arc::new(TimestampMicrosecondArray::new(numbers().collect(), nulls).with_timezone_opt(zone.clone()))
            }
            _ => {
                let length = |part: &Part| if part.tag < NUMBER { part.tag as usize } else { 0 };
                let mut bytes = Vec::with_capacity(parts().map(length).sum());
                let mut offsets = Vec::with_capacity(ids.len() + 1);
                offsets.push(0i32);
                for &id in ids {
                    self.write(id, at, &mut bytes);
                    offsets.push(bytes.len() as i32);
                }
                Arc::new(StringArray::try_new(OffsetBuffer::new(offsets.into()), Buffer::from_vec(bytes), nulls)?)
            }
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.capacity() * size_of::<Part>()
            + self.long.capacity() * size_of::<Option<Box<[u8]>>>()
            + self.long_bytes
            + self.panes.capacity() * 12
            + (self.index.capacity() + self.free.capacity()) * 5
            + self.grouper.bytes()
    }
}

/// The keys that one metric holds, in a table that metrics with the same keys share: they number a key alike.
pub(crate) struct Keys {
    table: SharedTable,
    held: Vec<u32>, // by key: how many panes of this metric hold it
    count: usize,
}

type SharedTable = Arc<Mutex<KeyTable>>;

/// Which table it is.
pub(crate) type WeakTable = Weak<Mutex<KeyTable>>;

fn lock(table: &SharedTable) -> MutexGuard<'_, KeyTable> {
    table.lock().unwrap_or_else(PoisonError::into_inner) // a metric whose step panicked is made anew
}

impl Keys {
    pub(crate) fn new(schema: &SchemaRef) -> Result<Keys> {
        Ok(Keys::of(Arc::new(Mutex::new(KeyTable::new(schema)?))))
    }

    fn of(table: SharedTable) -> Keys {
        Keys { table, held: Vec::new(), count: 0 }
    }

    /// Keys of another metric in the same table.
    pub(crate) fn beside(&self) -> Keys {
        Keys::of(self.table.clone())
    }

    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.table) > 1
    }

    pub(crate) fn table(&self) -> WeakTable {
        Arc::downgrade(&self.table)
    }

    /// Whether they are in this table.
    pub(crate) fn are_of(&self, table: &WeakTable) -> bool {
        table.as_ptr() == Arc::as_ptr(&self.table)
    }

    /// The key of each of `count` rows of `columns`.
    pub(crate) fn intern(&self, columns: &[ArrayRef], count: usize) -> Result<Vec<KeyId>> {
        lock(&self.table).intern(columns, count)
    }

    /// The rows of a batch by key, all or only `rows`; `ids` has the key of every row.
    pub(crate) fn group(&self, ids: &[KeyId], rows: Option<&[u32]>) -> Grouped {
        let KeyTable { grouper, panes, .. } = &mut *lock(&self.table);
        match rows {
            None => grouper.group(panes.len(), ids.iter().copied().zip(0..)),
            Some(rows) => grouper.group(panes.len(), rows.iter().map(|&row| (ids[row as usize], row))),
        }
    }

    /// A pane took the key in.
    #[inline]
    pub(crate) fn hold(&mut self, id: KeyId) {
        let at = id as usize;
        if self.held.len() <= at {
            self.held.resize(at + 1, 0);
        }
        self.held[at] += 1;
        if self.held[at] == 1 {
            self.count += 1;
            lock(&self.table).hold(id);
        }
    }

    /// A pane that held the key is gone.
    pub(crate) fn release(&mut self, id: KeyId) {
        let at = id as usize;
        self.held[at] -= 1;
        if self.held[at] == 0 {
            self.count -= 1;
            lock(&self.table).release(id);
        }
        if self.count == 0 {
            self.held = Vec::new(); // quiet metrics keep no room for the keys of busy times
        }
    }

    /// Forgets those of `ids` that nothing took in.
    pub(crate) fn forget_unheld(&self, ids: &[KeyId]) {
        lock(&self.table).forget_unheld(ids);
    }

    /// How many keys hold state.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// One more than the greatest number of a key.
    pub(crate) fn bound(&self) -> usize {
        lock(&self.table).bound()
    }

    /// The key columns of `ids`, in that order.
    pub(crate) fn columns(&self, ids: &[KeyId]) -> Result<Vec<ArrayRef>> {
        lock(&self.table).columns(ids)
    }

    /// Bytes on the heap; of the table, this metric's share.
    pub(crate) fn bytes(&self) -> usize {
        self.held.capacity() * size_of::<u32>() + lock(&self.table).bytes() / Arc::strong_count(&self.table)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if self.count > 0 && self.is_shared() {
            let mut table = lock(&self.table);
            let held = self.held.iter().enumerate().filter(|(_, panes)| **panes > 0);
            held.for_each(|(id, _)| table.release(id as KeyId));
        }
    }
}

/// The keys of a batch's rows, which keep their numbers until this is dropped.
pub(crate) struct Interned {
    pub(crate) ids: Vec<KeyId>,
    table: Option<SharedTable>, // where another metric might let go of them meanwhile
}

impl Interned {
    /// The key of each of `count` rows of `columns`.
    pub(crate) fn new(keys: &Keys, columns: &[ArrayRef], count: usize) -> Result<Interned> {
        let mut table = lock(&keys.table);
        let ids = table.intern(columns, count)?;
        let shared = keys.is_shared().then(|| keys.table.clone());
        table.pins += u32::from(shared.is_some());
        Ok(Interned { ids, table: shared })
    }
}

impl Drop for Interned {
    fn drop(&mut self) {
        if let Some(table) = &self.table {
            lock(table).unpin();
        }
    }
}

/// Rows as bytes.
trait Bytes {
    fn at(&self, row: usize) -> &[u8];
}

impl Bytes for StringArray {
    fn at(&self, row: usize) -> &[u8] {
        self.value(row).as_bytes()
    }
}

impl Bytes for arrow::row::Rows {
    fn at(&self, row: usize) -> &[u8] {
        self.row(row).data()
    }
}

/// Writes the parts of a column, whatever stands at its nulls; the column where it holds texts.
fn write_parts<'a, 'b>(
    column: &'a ArrayRef,
    out: impl Iterator<Item = &'b mut Part>,
    seeds: &Seeds,
) -> Option<&'a dyn Bytes> {
    match column.data_type() {
        DataType::Utf8 => {
            let texts = column.as_string::<i32>();
            let bytes = texts.value_data();
            for (part, ends) in out.zip(texts.value_offsets().windows(2)) {
                *part = Part::text(&bytes[ends[0] as usize..ends[1] as usize], seeds);
            }
            return Some(texts);
        }
        DataType::Boolean => {
            let values = column.as_boolean().values();
            out.zip(values.iter()).for_each(|(part, value)| *part = Part::number(i64::from(value)));
        }
        DataType::Int64 => {
            let values = column.as_primitive::<Int64Type>().values();
            out.zip(values).for_each(|(part, &value)| *part = Part::number(value));
        }
        _ => {
            let values = column.as_primitive::<TimestampMicrosecondType>().values();
            out.zip(values).for_each(|(part, &value)| *part = Part::number(value));
        }
    }
    None
}

/// The column with one zero and one NaN: as keys and for DISTINCT, what is equal is one value.
pub(crate) fn one_zero(column: &ArrayRef) -> ArrayRef {
    match column.as_primitive_opt::<Float64Type>() {
        Some(floats) => Arc::new(floats.unary::<_, Float64Type>(|x| if x.is_nan() { f64::NAN } else { x + 0.0 })),
        None => column.clone(),
    }
}

/// Bytes of a batch of one row that is a slice of a larger one, which many such slices share.
pub(crate) fn bytes_of_row(row: &RecordBatch) -> usize {
    const COLUMN: usize = 128; // an array without its values
    let values = |column: &ArrayRef| column.to_data().get_slice_memory_size().unwrap_or(0);
    size_of::<RecordBatch>() + row.columns().iter().map(|column| COLUMN + values(column)).sum::<usize>()
}

/// A batch of `columns` that keeps its row count also without a column.
pub(crate) fn batch_of(schema: SchemaRef, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch> {
    debug_assert!(columns.iter().all(|c| c.len() == rows));
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, StringArray};
    use arrow::datatypes::{DataType, Field, Schema};
    use std::sync::Arc;

    #[test]
    fn a_key_is_forgotten_with_the_last_pane_that_held_it_and_its_number_is_used_again() {
        let schema = Arc::new(Schema::new(vec![
            Field::new("symbol", DataType::Utf8, true),
            Field::new("n", DataType::Int64, true),
        ]));
        let mut keys = KeyTable::new(&schema).unwrap();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![Some("A"), None, Some("A"), Some("")])),
            Arc::new(Int64Array::from(vec![1, 1, 1, 1])),
        ];
        let ids = keys.intern(&columns, 4).unwrap();
        assert_eq!(ids, [0, 1, 0, 2]);
        for id in [0, 1, 2] {
            keys.hold(id);
        }
        keys.release(1);
        assert_eq!(keys.len(), 2);
        let other: Vec<ArrayRef> =
            vec![Arc::new(StringArray::from(vec!["B", "A"])), Arc::new(Int64Array::from(vec![1, 1]))];
        assert_eq!(keys.intern(&other, 2).unwrap(), [1, 0]);
        let back = keys.columns(&[1, 2]).unwrap();
        assert_eq!(back[0].as_ref(), &StringArray::from(vec!["B", ""]) as &dyn Array);
    }

    #[test]
    fn texts_of_every_length_come_back_as_they_were_and_none_is_taken_for_another() {
        let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, true)]));
        let mut keys = KeyTable::new(&schema).unwrap();
        let all: Vec<String> = (0..40)
            .flat_map(|length: usize| {
                (0..=length).map(move |at| (0..length).map(|i| if i == at { 'x' } else { 'a' }).collect())
            })
            .collect();
        let texts = StringArray::from(all.clone());
        let column: Vec<ArrayRef> = vec![Arc::new(texts.clone())];
        let ids = keys.intern(&column, all.len()).unwrap();
        assert_eq!(ids, (0..all.len() as KeyId).collect::<Vec<_>>());
        assert_eq!(keys.intern(&column, all.len()).unwrap(), ids);
        assert_eq!(keys.columns(&ids).unwrap()[0].as_ref(), &texts as &dyn Array);
        ids.iter().for_each(|&id| keys.hold(id));
        ids.iter().for_each(|&id| keys.release(id));
        assert_eq!((keys.len(), keys.long_bytes), (0, 0));
    }

    #[test]
    fn keys_of_other_types_work_too() {
        let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Float64, true)]));
        let mut keys = KeyTable::new(&schema).unwrap();
        let column: Vec<ArrayRef> = vec![Arc::new(arrow::array::Float64Array::from(vec![
            Some(1.5),
            None,
            Some(f64::NAN),
            Some(1.5),
            Some(f64::NAN),
        ]))];
        assert_eq!(keys.intern(&column, 5).unwrap(), [0, 1, 2, 0, 2]);
        assert!(keys.columns(&[1]).unwrap()[0].is_null(0));
    }
}
