//! Reference tables: rows by primary key, each with the versions that event time may still ask for.
//!
//! A change is valid from an instant on, until the next one of its key. Which version an event sees is decided by its
//! event time and by the changes before it in the log, so a replay sees the same.

use crate::checkpoint::{Content, Draft, Owner, ROWS};
use crate::event::{Micros, StreamName};
use crate::join::{MATCHES_MOST, ROWS_AT_ONCE};
use crate::key::batch_of;
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, TimestampMicrosecondArray, UInt64Array,
    new_null_array,
};
use arrow::datatypes::{
    DataType, Field, FieldRef, Int64Type, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType, UInt64Type,
};
use arrow::row::{RowConverter, SortField};
use datafusion_common::{Result, exec_err};
use datafusion_physical_expr::PhysicalExpr;
use hashbrown::HashMap;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The schema that all reference tables are in: `ref.companies`.
pub const TABLES: &str = "ref";

/// Columns of a change beside the table's own: when it is valid from (NULL: see [`Tables::change`]) and whether it
/// takes the row away. `ts`, its first column, is when it arrived.
pub const VALID_FROM: &str = "valid_from";
pub const DELETED: &str = "deleted";

impl StreamName {
    /// Whether this names a reference table.
    pub fn is_table(&self) -> bool {
        self.parts().0 == TABLES
    }
}

/// What a reference table looks like.
#[derive(Debug)]
pub struct TableSchema {
    pub name: StreamName,
    /// The table's own columns.
    pub columns: SchemaRef,
    /// Places of the primary key among them.
    pub key: Vec<usize>,
    relation: SchemaRef,
}

fn time_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into()))
}

impl TableSchema {
    /// `key`: places in `columns`.
    pub fn new(name: StreamName, columns: SchemaRef, key: Vec<usize>) -> TableSchema {
        let fields = columns.fields().iter().map(|field| Arc::new(field.as_ref().clone().with_nullable(true)));
        let valid_from = Arc::new(Field::new(VALID_FROM, time_type(), true));
        let relation = Arc::new(Schema::new(fields.chain([valid_from]).collect::<Vec<_>>()));
        TableSchema { name, columns, key, relation }
    }

    /// The table as SQL sees it: its columns, and since when the row is valid (NULL: as far back as there are events).
    pub fn relation(&self) -> &SchemaRef {
        &self.relation
    }
}

/// A state of a row, valid until the next one of its key.
#[derive(Clone)]
struct Version {
    id: u64,
    from: Micros,
    /// Offset of the change in the log.
    seq: u64,
    deleted: bool,
    row: Box<[u8]>,
    /// Its key in each index; NULL matches nothing.
    joined: Vec<Option<u32>>,
}

struct Keyed {
    key: Box<[u8]>,
    versions: Vec<Version>, // by `from`
}

/// Rows by the columns that a join compares.
struct Index {
    name: String,
    exprs: Vec<Arc<dyn PhysicalExpr>>,
    relation: SchemaRef, // that the expressions are written against
    converter: RowConverter,
    ids: HashMap<Box<[u8]>, u32>,
    entries: Vec<Entry>, // by id
    free: Vec<u32>,
    /// Ids that no row had any more at some moment.
    unused: Vec<u32>,
    bytes: usize,
}

/// One value of the compared columns.
#[derive(Default)]
struct Entry {
    value: Box<[u8]>,
    /// Slots of the rows that have it in some version, and in how many.
    slots: BTreeMap<u32, u32>,
}

/// The versions of one table.
struct Table {
    schema: Arc<TableSchema>,
    keys: RowConverter,
    rows: RowConverter,
    by_key: HashMap<Box<[u8]>, u32>,
    slots: Vec<Option<Keyed>>,
    free: Vec<u32>,
    /// Versions that let older ones go once nothing asks for an instant before them.
    successors: BTreeSet<(Micros, u32)>,
    indexes: Vec<Index>,
    next_id: u64,
    versions: usize,
    bytes: usize,
    /// It holds others than at the last checkpoint.
    changed: bool,
}

fn converter<'a>(fields: impl Iterator<Item = &'a FieldRef>) -> Result<RowConverter> {
    Ok(RowConverter::new(fields.map(|field| SortField::new(field.data_type().clone())).collect())?)
}

/// Bytes of a version beside its row.
const VERSION_BYTES: usize = size_of::<Version>() + 24;

/// The columns of `schema` by name; those that `batch` lacks are NULL.
fn aligned(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    if batch.schema_ref() == schema {
        return Ok(batch.clone());
    }
    let column = |field: &FieldRef| match batch.column_by_name(field.name()) {
        Some(column) if column.data_type() == field.data_type() => column.clone(),
        _ => new_null_array(field.data_type(), batch.num_rows()),
    };
    batch_of(schema.clone(), schema.fields().iter().map(column).collect(), batch.num_rows())
}

impl Table {
    fn new(schema: Arc<TableSchema>) -> Result<Table> {
        let columns = schema.columns.fields();
        Ok(Table {
            keys: converter(schema.key.iter().map(|&at| &columns[at]))?,
            rows: converter(columns.iter())?,
            schema,
            by_key: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            successors: BTreeSet::new(),
            indexes: Vec::new(),
            next_id: 0,
            versions: 0,
            bytes: 0,
            changed: false,
        })
    }

    /// Takes in rows of the relation; `from[row]` is `None` for a change without a date, which came at `arrived[row]`.
    fn take(
        &mut self,
        batch: &RecordBatch,
        from: &[Option<Micros>],
        arrived: &[i64],
        deleted: &[bool],
        seq: &[u64],
    ) -> Result<()> {
        let own = &batch.columns()[..self.schema.columns.fields().len()];
        let key_columns: Vec<ArrayRef> = self.schema.key.iter().map(|&at| own[at].clone()).collect();
        let keys = self.keys.convert_columns(&key_columns)?;
        let rows = self.rows.convert_columns(own)?;
        let joined = self.indexes.iter_mut().map(|index| index.intern(batch)).collect::<Result<Vec<_>>>()?;
        for row in 0..batch.num_rows() {
            let key = keys.row(row);
            let slot = match self.by_key.get(key.as_ref()) {
                Some(&slot) => slot,
                None if deleted[row] && from[row].is_none() => {
                    // there is nothing to take away
                    self.indexes.iter_mut().zip(&joined).for_each(|(index, ids)| index.unused.extend(ids[row]));
                    continue;
                }
                None => self.add_key(key.as_ref().into()),
            };
            let version = Version {
                id: self.next_id,
                // the first version has none before it, so without a date it is valid all the time
                from: from[row].unwrap_or_else(|| {
                    if self.keyed(slot).versions.is_empty() { Micros::MIN } else { Micros(arrived[row]) }
                }),
                seq: seq[row],
                deleted: deleted[row],
                row: rows.row(row).as_ref().into(),
                joined: joined.iter().map(|ids| ids[row]).collect(),
            };
            self.next_id += 1;
            self.insert(slot, version);
        }
        self.indexes.iter_mut().for_each(Index::sweep);
        Ok(())
    }

    fn add_key(&mut self, key: Box<[u8]>) -> u32 {
        let keyed = Some(Keyed { key: key.clone(), versions: Vec::new() });
        self.bytes += 2 * key.len() + 64;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = keyed;
                slot
            }
            None => {
                self.slots.push(keyed);
                (self.slots.len() - 1) as u32
            }
        };
        self.by_key.insert(key, slot);
        slot
    }

    fn keyed(&mut self, slot: u32) -> &mut Keyed {
        self.slots[slot as usize].as_mut().expect("a slot in use holds a key")
    }

    fn insert(&mut self, slot: u32, version: Version) {
        for (index, id) in self.indexes.iter_mut().zip(&version.joined) {
            index.hold(*id, slot);
        }
        self.bytes += version.row.len() + VERSION_BYTES;
        self.versions += 1;
        self.changed = true;
        let from = version.from;
        let versions = &mut self.keyed(slot).versions;
        let at = versions.partition_point(|other| other.from < from);
        if versions.get(at).is_some_and(|other| other.from == from) {
            let old = std::mem::replace(&mut versions[at], version);
            self.dropped(slot, &old);
        } else {
            versions.insert(at, version);
        }
        // whoever stands behind another one, and a deletion, lets something go later
        let versions = &self.keyed(slot).versions;
        let first = (at > 0 || versions[at].deleted).then_some(from);
        let second = versions.get(1).filter(|_| at == 0).map(|next| next.from);
        self.successors.extend(first.into_iter().chain(second).map(|from| (from, slot)));
    }

    fn dropped(&mut self, slot: u32, version: &Version) {
        self.changed = true;
        self.versions -= 1;
        self.bytes -= version.row.len() + VERSION_BYTES;
        for (index, id) in self.indexes.iter_mut().zip(&version.joined) {
            index.release(*id, slot);
        }
    }

    /// Forgets what no instant from `horizon` on sees.
    fn prune(&mut self, horizon: Micros) {
        while let Some(&(from, slot)) = self.successors.first().filter(|(from, _)| *from <= horizon) {
            self.successors.remove(&(from, slot));
            let Some(keyed) = self.slots[slot as usize].as_mut() else { continue };
            let current = keyed.versions.partition_point(|version| version.from <= horizon);
            let Some(current) = current.checked_sub(1) else { continue };
            // a deletion stays too: a change dated before it may still come
            let gone: Vec<Version> = keyed.versions.drain(..current).collect();
            let empty = keyed.versions.is_empty();
            gone.iter().for_each(|version| self.dropped(slot, version));
            if empty && let Some(keyed) = self.slots[slot as usize].take() {
                self.bytes -= 2 * keyed.key.len() + 64;
                self.by_key.remove(&keyed.key);
                self.free.push(slot);
            }
        }
        self.indexes.iter_mut().for_each(Index::sweep);
    }

    fn version_at(&self, slot: u32, at: Micros) -> Option<&Version> {
        let versions = &self.slots[slot as usize].as_ref()?.versions;
        let current = versions.partition_point(|version| version.from <= at).checked_sub(1)?;
        Some(&versions[current]).filter(|version| !version.deleted)
    }

    /// Rows of `versions` as the relation has them.
    fn decode<'a>(&self, versions: impl Iterator<Item = &'a Version> + Clone) -> Result<RecordBatch> {
        let parser = self.rows.parser();
        let mut columns = self.rows.convert_rows(versions.clone().map(|version| parser.parse(&version.row)))?;
        let from = versions.map(|version| Some(version.from.0).filter(|&from| from != i64::MIN));
        let from: TimestampMicrosecondArray = from.collect();
        let rows = from.len();
        columns.push(Arc::new(from.with_timezone("+00:00")));
        batch_of(self.schema.relation.clone(), columns, rows)
    }

    fn all(&self) -> impl Iterator<Item = &Version> + Clone {
        self.slots.iter().flatten().flat_map(|keyed| &keyed.versions)
    }

    /// All versions for which `keep` holds: the relation, and beside it `from`, `seq` and `deleted`.
    fn save(&self, keep: impl Fn(&Version) -> bool + Clone) -> Result<RecordBatch> {
        let versions = self.all().filter(|version| keep(version));
        let relation = self.decode(versions.clone())?;
        let own = self.schema.columns.fields().iter().map(|field| Arc::new(field.as_ref().clone().with_nullable(true)));
        let beside = [
            Field::new("from", DataType::Int64, false),
            Field::new("seq", DataType::UInt64, false),
            Field::new(DELETED, DataType::Boolean, false),
        ];
        let fields: Vec<FieldRef> = beside.into_iter().map(Arc::new).chain(own).collect();
        let rows = relation.num_rows();
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(versions.clone().map(|version| version.from.0))),
            Arc::new(UInt64Array::from_iter_values(versions.clone().map(|version| version.seq))),
            Arc::new(versions.map(|version| Some(version.deleted)).collect::<BooleanArray>()),
        ];
        columns.extend_from_slice(&relation.columns()[..relation.num_columns() - 1]);
        batch_of(Arc::new(Schema::new(fields)), columns, rows)
    }

    /// Takes in what [`Table::save`] gave, also under a schema that has other columns since.
    fn load(&mut self, saved: &RecordBatch) -> Result<()> {
        if saved.num_columns() < 3 {
            return exec_err!("saved rows of `{}` lack their versions", self.schema.name);
        }
        let from: Vec<_> =
            saved.column(0).as_primitive::<Int64Type>().values().iter().map(|&from| Some(Micros(from))).collect();
        let seq = saved.column(1).as_primitive::<UInt64Type>().values().to_vec();
        let deleted: Vec<bool> = saved.column(2).as_boolean().values().iter().collect();
        let own = saved.project(&(3..saved.num_columns()).collect::<Vec<_>>())?;
        let relation = aligned(&own, &self.schema.relation)?;
        self.take(&relation, &from, &[], &deleted, &seq)
    }

    /// Makes sure that rows are found by `exprs`, written against `relation`; `name` stands for both.
    fn ensure_index(&mut self, name: &str, exprs: Vec<Arc<dyn PhysicalExpr>>, relation: &SchemaRef) -> Result<()> {
        if self.indexes.iter().any(|index| index.name == name) {
            return Ok(());
        }
        let fields = exprs.iter().map(|expr| Ok(SortField::new(expr.data_type(relation)?))).collect::<Result<_>>()?;
        let mut index = Index {
            name: name.to_owned(),
            exprs,
            relation: relation.clone(),
            converter: RowConverter::new(fields)?,
            ids: HashMap::new(),
            entries: Vec::new(),
            free: Vec::new(),
            unused: Vec::new(),
            bytes: 0,
        };
        let relation = self.decode(self.all())?;
        let mut ids = index.intern(&relation)?.into_iter();
        for (slot, keyed) in self.slots.iter_mut().enumerate() {
            for version in keyed.iter_mut().flat_map(|keyed| &mut keyed.versions) {
                let id = ids.next().expect("one for each version");
                index.hold(id, slot as u32);
                version.joined.push(id);
            }
        }
        self.indexes.push(index);
        Ok(())
    }

    fn keep_indexes(&mut self, used: &BTreeSet<String>) {
        for at in (0..self.indexes.len()).rev() {
            if !used.contains(&self.indexes[at].name) {
                self.indexes.remove(at);
                let versions = self.slots.iter_mut().flatten().flat_map(|keyed| &mut keyed.versions);
                versions.for_each(|version| _ = version.joined.remove(at));
            }
        }
    }

    fn bytes(&self) -> usize {
        self.bytes + self.indexes.iter().map(|index| index.bytes).sum::<usize>()
    }
}

impl Index {
    /// The id of each row's key; `None` where a part of it is NULL.
    fn intern(&mut self, relation: &RecordBatch) -> Result<Vec<Option<u32>>> {
        let batch = aligned(relation, &self.relation)?;
        let columns = evaluate(&self.exprs, &batch)?;
        let rows = self.converter.convert_columns(&columns)?;
        let mut ids = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            if columns.iter().any(|column| column.is_null(row)) {
                ids.push(None);
                continue;
            }
            let value = rows.row(row);
            let id = match self.ids.get(value.as_ref()) {
                Some(&id) => id,
                None => {
                    let value: Box<[u8]> = value.as_ref().into();
                    self.bytes += 2 * value.len() + ENTRY_BYTES;
                    let id = self.free.pop().unwrap_or_else(|| {
                        self.entries.push(Entry::default());
                        (self.entries.len() - 1) as u32
                    });
                    self.entries[id as usize].value = value.clone();
                    self.ids.insert(value, id);
                    id
                }
            };
            ids.push(Some(id));
        }
        Ok(ids)
    }

    fn hold(&mut self, id: Option<u32>, slot: u32) {
        let Some(id) = id else { return };
        let count = self.entries[id as usize].slots.entry(slot).or_insert(0);
        *count += 1;
        if *count == 1 {
            self.bytes += SLOT_BYTES;
        }
    }

    fn release(&mut self, id: Option<u32>, slot: u32) {
        let Some(entry) = id.map(|id| &mut self.entries[id as usize]) else { return };
        if let Some(count) = entry.slots.get_mut(&slot) {
            *count -= 1;
            if *count == 0 {
                entry.slots.remove(&slot);
                self.bytes -= SLOT_BYTES;
                self.unused.extend(id);
            }
        }
    }

    /// Forgets values that no row has; only between batches, whose ids would be gone otherwise.
    fn sweep(&mut self) {
        for id in std::mem::take(&mut self.unused) {
            if self.entries[id as usize].slots.is_empty() {
                let value = std::mem::take(&mut self.entries[id as usize].value);
                if self.ids.remove(&value).is_some() {
                    self.bytes -= 2 * value.len() + ENTRY_BYTES;
                    self.free.push(id);
                }
            }
        }
    }
}

/// Bytes of an entry beside its value, and of a slot in it.
const ENTRY_BYTES: usize = size_of::<Entry>() + 24;
const SLOT_BYTES: usize = 16;

pub(crate) fn evaluate(exprs: &[Arc<dyn PhysicalExpr>], batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
    exprs.iter().map(|expr| expr.evaluate(batch)?.into_array(batch.num_rows())).collect()
}

/// Pairs of a row of events and a row of a table.
pub(crate) struct Matches {
    /// Rows of the events, ascending.
    pub(crate) left: Vec<u32>,
    /// Rows of `rows`, one for each of `left`.
    pub(crate) right: Vec<u32>,
    /// The rows of the table that matched, each once, as the asker's relation has them.
    pub(crate) rows: RecordBatch,
}

/// A table and how it is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableSize {
    /// Primary keys that have a row, or had one not long ago.
    pub keys: usize,
    pub versions: usize,
    pub bytes: usize,
}

/// The reference tables of one workspace.
#[derive(Default)]
pub struct Tables {
    schemas: BTreeMap<StreamName, Arc<TableSchema>>,
    /// Those that had a change, or that a metric reads.
    tables: BTreeMap<StreamName, Table>,
}

impl Tables {
    /// Whether no version waits for event time to pass it.
    pub(crate) fn is_settled(&self) -> bool {
        self.tables.values().all(|table| table.successors.is_empty())
    }

    /// Adds a table, or gives it other columns; the columns of the primary key stay.
    pub fn define(&mut self, schema: Arc<TableSchema>) -> Result<()> {
        let name = schema.name.clone();
        self.schemas.insert(name.clone(), schema.clone());
        if let Some(old) = self.tables.remove(&name) {
            let mut table = Table::new(schema)?;
            for index in &old.indexes {
                table.ensure_index(&index.name, index.exprs.clone(), &index.relation)?;
            }
            table.load(&old.save(|_| true)?)?;
            self.tables.insert(name, table);
        }
        Ok(())
    }

    /// Forgets a table and its rows.
    pub fn remove(&mut self, name: &StreamName) {
        self.schemas.remove(name);
        self.tables.remove(name);
    }

    fn table(&mut self, name: &StreamName) -> Result<Option<&mut Table>> {
        if !self.tables.contains_key(name) {
            let Some(schema) = self.schemas.get(name) else { return Ok(None) };
            self.tables.insert(name.clone(), Table::new(schema.clone())?);
        }
        Ok(self.tables.get_mut(name))
    }

    /// Takes in changes as the log has them at offset `seq`: `ts` of arrival, anything, the table's columns,
    /// `valid_from`, `deleted`. A change without `valid_from` is valid from its arrival on; the first of its key, which
    /// has nothing before it, all the time. A table that is not defined takes none.
    pub fn change(&mut self, name: &StreamName, batch: &RecordBatch, seq: u64) -> Result<()> {
        let Some(table) = self.table(name)? else { return Ok(()) };
        let wrong = || exec_err!("a change of `{name}` has no arrival, validity or deletion");
        // its own columns may be called as those in front of them
        let own = batch.project(&(2..batch.num_columns()).collect::<Vec<_>>())?;
        let (Some(arrived), Some(from), Some(deleted)) = (
            batch.column(0).as_primitive_opt::<TimestampMicrosecondType>(),
            own.column_by_name(VALID_FROM).and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>()),
            own.column_by_name(DELETED).and_then(|c| c.as_boolean_opt()),
        ) else {
            return wrong();
        };
        let relation = aligned(&own, &table.schema.relation.clone())?;
        let from: Vec<Option<Micros>> = from.iter().map(|from| from.map(Micros)).collect();
        let deleted: Vec<bool> = deleted.iter().map(|deleted| deleted == Some(true)).collect();
        table.take(&relation, &from, arrived.values(), &deleted, &vec![seq; batch.num_rows()])
    }

    /// The rows valid at `at`, in order of the primary key; empty for an unknown table.
    pub fn rows(&self, name: &StreamName, at: Micros) -> Result<Option<RecordBatch>> {
        let Some(schema) = self.schemas.get(name) else { return Ok(None) };
        let Some(table) = self.tables.get(name) else {
            return Ok(Some(RecordBatch::new_empty(schema.relation.clone())));
        };
        let mut keys: Vec<(&[u8], u32)> = table.by_key.iter().map(|(key, &slot)| (&key[..], slot)).collect();
        keys.sort_unstable();
        let versions: Vec<&Version> = keys.iter().filter_map(|(_, slot)| table.version_at(*slot, at)).collect();
        table.decode(versions.into_iter()).map(Some)
    }

    /// The tables defined here.
    pub fn schemas(&self) -> impl Iterator<Item = &Arc<TableSchema>> {
        self.schemas.values()
    }

    pub fn size(&self, name: &StreamName) -> TableSize {
        self.tables.get(name).map_or(TableSize::default(), |table| TableSize {
            keys: table.by_key.len(),
            versions: table.versions,
            bytes: table.bytes(),
        })
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.tables.values().map(Table::bytes).sum()
    }

    /// These tables with what they were told before offset `seq` and still keep.
    pub fn before(&self, seq: u64) -> Result<Tables> {
        let mut earlier = Tables { schemas: self.schemas.clone(), tables: BTreeMap::new() };
        for (name, table) in &self.tables {
            let kept = table.save(|version| version.seq < seq)?;
            earlier.load(name, &kept)?;
        }
        Ok(earlier)
    }

    pub(crate) fn ensure_index(
        &mut self,
        table: &StreamName,
        name: &str,
        exprs: Vec<Arc<dyn PhysicalExpr>>,
        relation: &SchemaRef,
    ) -> Result<()> {
        match self.table(table)? {
            Some(table) => table.ensure_index(name, exprs, relation),
            None => exec_err!("there is no table `{table}`"),
        }
    }

    /// Drops indexes that are not among `used`.
    pub(crate) fn keep_indexes(&mut self, used: &BTreeMap<StreamName, BTreeSet<String>>) {
        let none = BTreeSet::new();
        self.tables.iter_mut().for_each(|(name, table)| table.keep_indexes(used.get(name).unwrap_or(&none)));
    }

    /// Forgets versions of `table` that no event from `horizon` on sees.
    pub(crate) fn prune(&mut self, table: &StreamName, horizon: Micros) {
        if let Some(table) = self.tables.get_mut(table) {
            table.prune(horizon);
        }
    }

    /// For each row of `keys` that is `asked` for: the rows of the table that have the same key in the version valid
    /// at `ts`, as `relation` has them. An error where that is more than [`MATCHES_MOST`] a row.
    pub(crate) fn probe(
        &self,
        table: &StreamName,
        index: &str,
        keys: &[ArrayRef],
        ts: &[i64],
        asked: impl Fn(usize) -> bool,
        relation: &SchemaRef,
    ) -> Result<Matches> {
        let none = || Matches { left: vec![], right: vec![], rows: RecordBatch::new_empty(relation.clone()) };
        let Some(table) = self.tables.get(table) else { return Ok(none()) };
        let Some(at) = table.indexes.iter().position(|known| known.name == index) else {
            return exec_err!("`{}` has no index `{index}`", table.schema.name);
        };
        let index = &table.indexes[at];
        let rows = index.converter.convert_columns(keys)?;
        let (mut left, mut right) = (Vec::with_capacity(ts.len()), Vec::with_capacity(ts.len()));
        let (mut found, mut places): (Vec<&Version>, HashMap<u64, u32>) = (Vec::new(), HashMap::new());
        for row in (0..ts.len()).filter(|&row| asked(row)) {
            if keys.iter().any(|column| column.is_null(row)) {
                continue;
            }
            let Some(&id) = index.ids.get(rows.row(row).as_ref()) else { continue };
            let before = right.len();
            for &slot in index.entries[id as usize].slots.keys() {
                let version = table.version_at(slot, Micros(ts[row])).filter(|v| v.joined[at] == Some(id));
                let Some(version) = version else { continue };
                if left.len() == MATCHES_MOST * ts.len().max(ROWS_AT_ONCE) {
                    return exec_err!(
                        "events have more than {MATCHES_MOST} rows of `{}` each; compare more columns in ON",
                        table.schema.name
                    );
                }
                left.push(row as u32);
                right.push(*places.entry(version.id).or_insert_with(|| {
                    found.push(version);
                    (found.len() - 1) as u32
                }));
            }
            // an order that no restart changes, which numbers the slots anew
            if right.len() > before + 1 {
                right[before..].sort_unstable_by(|a, b| found[*a as usize].row.cmp(&found[*b as usize].row));
            }
        }
        let rows = aligned(&table.decode(found.into_iter())?, relation)?;
        Ok(Matches { left, right, rows })
    }

    /// Each table that has rows as a part, which [`Tables::load`] takes in.
    pub(crate) fn save(&mut self, draft: &mut Draft) -> Result<()> {
        for (name, table) in self.tables.iter_mut().filter(|(_, table)| table.versions > 0) {
            let changed = std::mem::take(&mut table.changed);
            draft.begin(Owner::Table(name));
            draft.put(ROWS, changed, || table.save(|_| true).map(Content::Rows))?;
        }
        Ok(())
    }

    /// Takes in saved rows of a table; of one that is not defined any more, none.
    pub(crate) fn load(&mut self, name: &StreamName, saved: &RecordBatch) -> Result<()> {
        match self.table(name)? {
            Some(table) => {
                table.load(saved)?;
                table.changed = false;
                Ok(())
            }
            None => Ok(()),
        }
    }
}
