//! Interned keys: the values of the GROUP BY columns become a small number, once.

use arrow::array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::datatypes::SchemaRef;
use arrow::row::{RowConverter, SortField};
use datafusion_common::Result;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use std::hash::BuildHasher;

/// Number of a key within one metric. Reused after the last pane that held it is gone.
pub(crate) type KeyId = u32;

/// The keys a metric holds state for. Memory follows the keys in open panes, not the keys ever seen.
pub(crate) struct KeyTable {
    converter: Option<RowConverter>, // none for a metric without keys
    index: HashTable<KeyId>,
    rows: Vec<Box<[u8]>>,
    panes: Vec<u32>, // how many panes hold the key
    free: Vec<KeyId>,
    hasher: hashbrown::DefaultHashBuilder,
    bytes: usize,
}

impl KeyTable {
    pub(crate) fn new(schema: &SchemaRef) -> Result<Self> {
        let fields = schema.fields().iter().map(|f| SortField::new(f.data_type().clone())).collect::<Vec<_>>();
        let converter = if fields.is_empty() { None } else { Some(RowConverter::new(fields)?) };
        Ok(Self {
            converter,
            index: HashTable::new(),
            rows: Vec::new(),
            panes: Vec::new(),
            free: Vec::new(),
            hasher: Default::default(),
            bytes: 0,
        })
    }

    /// The key of each of `count` rows of `columns`.
    pub(crate) fn intern(&mut self, columns: &[ArrayRef], count: usize) -> Result<Vec<KeyId>> {
        let Self { converter, index, rows, panes, free, hasher, bytes } = self;
        let Some(converter) = converter else {
            if rows.is_empty() {
                rows.push(Box::default());
                panes.push(0);
            }
            return Ok(vec![0; count]);
        };
        let encoded = converter.convert_columns(columns)?;
        let mut ids = Vec::with_capacity(count);
        let mut last: Option<(usize, KeyId)> = None; // runs of one key are common
        for (at, row) in encoded.iter().enumerate() {
            let row: &[u8] = row.as_ref();
            if let Some((before, id)) = last
                && encoded.row(before).as_ref() == row
            {
                ids.push(id);
                continue;
            }
            let hash = hasher.hash_one(row);
            let id =
                match index.entry(hash, |&id| *rows[id as usize] == *row, |&id| hasher.hash_one(&*rows[id as usize])) {
                    Entry::Occupied(found) => *found.get(),
                    Entry::Vacant(empty) => {
                        *bytes += row.len() + 40;
                        let id = match free.pop() {
                            Some(id) => {
                                rows[id as usize] = row.into();
                                id
                            }
                            None => {
                                rows.push(row.into());
                                panes.push(0);
                                (rows.len() - 1) as KeyId
                            }
                        };
                        empty.insert(id);
                        id
                    }
                };
            last = Some((at, id));
            ids.push(id);
        }
        Ok(ids)
    }

    /// A pane took the key in.
    pub(crate) fn hold(&mut self, id: KeyId) {
        self.panes[id as usize] += 1;
    }

    /// A pane that held the key is gone; with the last one the key is forgotten.
    pub(crate) fn release(&mut self, id: KeyId) {
        self.panes[id as usize] -= 1;
        self.forget_unheld(&[id]);
    }

    /// Forgets those of `ids` that no pane took in.
    pub(crate) fn forget_unheld(&mut self, ids: &[KeyId]) {
        if self.converter.is_none() {
            return;
        }
        for &id in ids {
            let at = id as usize;
            if self.panes[at] == 0 && !self.rows[at].is_empty() {
                let hash = self.hasher.hash_one(&*self.rows[at]);
                if let Ok(found) = self.index.find_entry(hash, |&other| other == id) {
                    found.remove();
                }
                self.bytes -= self.rows[at].len() + 40;
                self.rows[at] = Box::default();
                self.free.push(id);
            }
        }
    }

    /// How many keys hold state.
    pub(crate) fn len(&self) -> usize {
        self.rows.len() - self.free.len()
    }

    /// The key columns of `ids`, in that order.
    pub(crate) fn columns(&self, ids: &[KeyId]) -> Result<Vec<ArrayRef>> {
        let Some(converter) = &self.converter else { return Ok(Vec::new()) };
        let parser = converter.parser();
        Ok(converter.convert_rows(ids.iter().map(|&id| parser.parse(&self.rows[id as usize])))?)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes + self.rows.capacity() * 20 + self.index.capacity() * 5
    }
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
}
