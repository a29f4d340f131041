//! Reference tables: their columns and primary key, and how changes of their rows are decoded.

use crate::decode::{Bounds, DecodeError, Decoded, EventError, Format, TsUnit, decode};
use crate::schema::{Column, ColumnType, MAX_COLUMNS, SchemaError, StreamSchema, UnknownFields};
use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Field, Schema};
use engine::event::{Micros, StreamName};
use engine::reference::{DELETED, TABLES, TableSchema, VALID_FROM};
use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

/// Columns that every change has beside the table's own.
const RESERVED: [&str; 3] = [VALID_FROM, DELETED, "extra"];

/// The definition of one reference table.
#[derive(Clone, Debug)]
pub struct Table {
    pub columns: Vec<Column>,
    pub primary_key: Vec<String>,
    schema: Arc<TableSchema>,
    /// Changes as they come in and as the log has them: all but the primary key may be missing, as in a deletion.
    changes: Arc<StreamSchema>,
}

/// Why a table definition was refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error(transparent)]
    Schema(#[from] SchemaError),
    #[error("table name `{0}` must match [a-z][a-z0-9_]*, as in `companies`, which SQL calls ref.companies")]
    Name(String),
    #[error("column `{0}` is reserved: every change of a table may have it; choose another name")]
    Reserved(String),
    #[error("a primary key names 1 to {max} columns of the table, each once; this one is {found:?}")]
    Key { found: Vec<String>, max: usize },
    #[error("`{0}` of the primary key must not be nullable; add \"nullable\": false")]
    NullableKey(String),
    #[error("the primary key is {old:?} and rows are found by it; it cannot become {new:?}: define another table")]
    KeyChanged { old: Vec<String>, new: Vec<String> },
}

/// The most columns of a primary key.
const MAX_KEY: usize = 8;

/// The table's name in SQL; `text` is `companies` or `ref.companies`.
pub fn table_name(text: &str) -> Result<StreamName, TableError> {
    let bare = text.strip_prefix("ref.").unwrap_or(text);
    format!("{TABLES}.{bare}").parse().map_err(|_| TableError::Name(text.chars().take(80).collect()))
}

impl Table {
    /// Checks the columns and the primary key.
    pub fn new(name: StreamName, columns: Vec<Column>, primary_key: Vec<String>) -> Result<Table, TableError> {
        if let Some(reserved) = columns.iter().find(|column| RESERVED.contains(&column.name.as_str())) {
            return Err(TableError::Reserved(reserved.name.clone()));
        }
        if columns.len() + RESERVED.len() > MAX_COLUMNS {
            return Err(SchemaError::ColumnCount { found: columns.len(), max: MAX_COLUMNS - RESERVED.len() }.into());
        }
        let place = |key: &String| columns.iter().position(|column| column.name == *key);
        let key: Vec<usize> = primary_key.iter().filter_map(place).collect();
        let distinct: HashSet<usize> = key.iter().copied().collect();
        if key.len() != primary_key.len() || distinct.len() != key.len() || !(1..=MAX_KEY).contains(&key.len()) {
            return Err(TableError::Key { found: primary_key, max: MAX_KEY });
        }
        if let Some(nullable) = key.iter().map(|&at| &columns[at]).find(|column| column.nullable) {
            return Err(TableError::NullableKey(nullable.name.clone()));
        }
        let mut changed: Vec<Column> = columns.clone();
        changed.iter_mut().enumerate().for_each(|(at, column)| column.nullable = !key.contains(&at));
        let also = |name: &str, kind| Column { name: name.to_owned(), kind, nullable: true };
        changed.extend([also(VALID_FROM, ColumnType::Timestamp), also(DELETED, ColumnType::Bool)]);
        let changes = StreamSchema::of_table(name.clone(), changed, UnknownFields::Reject)?;
        let fields: Vec<Field> =
            columns.iter().map(|column| Field::new(&column.name, column.kind.arrow(), true)).collect();
        let schema = TableSchema::new(name, Arc::new(Schema::new(fields)), key);
        Ok(Table { columns, primary_key, schema: Arc::new(schema), changes: Arc::new(changes) })
    }

    pub fn name(&self) -> &StreamName {
        &self.schema.name
    }

    /// As the engine needs it.
    pub fn schema(&self) -> &Arc<TableSchema> {
        &self.schema
    }

    /// The columns of a batch of changes.
    pub fn changes(&self) -> &Arc<StreamSchema> {
        &self.changes
    }

    /// Whether `next` may replace this definition while there are rows: columns may be added and dropped, not retyped,
    /// and the primary key stays.
    pub fn check_evolution(&self, next: &Table) -> Result<(), TableError> {
        if self.primary_key != next.primary_key {
            return Err(TableError::KeyChanged { old: self.primary_key.clone(), new: next.primary_key.clone() });
        }
        Ok(self.changes.check_evolution(&next.changes)?)
    }

    /// Decodes changes: upserts with the table's columns, deletions with the primary key and `deleted: true`, both with
    /// an optional `valid_from`. A bad one is left out and described.
    pub fn decode(
        &self,
        body: &[u8],
        format: Format,
        unit: TsUnit,
        bounds: &Bounds,
        now: Micros,
    ) -> Result<Decoded, DecodeError> {
        let described = bounds.described;
        // all refusals, to know the index of those that were read
        let decoded = decode(&self.changes, body, format, unit, &Bounds { described: usize::MAX, ..*bounds }, now)?;
        let Decoded { batch, rejected, mut errors } = decoded;
        let refused: HashSet<usize> = errors.iter().map(|error| error.index).collect();
        let indexes = (0..).filter(|index| !refused.contains(index));
        let own = &batch.columns()[2..2 + self.columns.len()];
        let deleted = batch.column(2 + self.columns.len() + 1).as_boolean();
        let mut keep = Vec::with_capacity(batch.num_rows());
        for (row, index) in (0..batch.num_rows()).zip(indexes) {
            let is_deleted = deleted.is_valid(row) && deleted.value(row);
            let missing = self.columns.iter().zip(own).find(|(column, values)| !column.nullable && values.is_null(row));
            let fine = is_deleted || missing.is_none();
            if let Some((column, _)) = missing.filter(|_| !is_deleted) {
                errors.push(EventError {
                    index,
                    code: "missing_column",
                    detail: format!("column `{}` ({}) is required", column.name, column.kind),
                    payload: String::new(),
                });
            }
            keep.push(fine);
        }
        let kept = keep.iter().filter(|keep| **keep).count();
        let rejected = rejected + keep.len() - kept;
        let batch = if kept == keep.len() { batch } else { filtered(&batch, keep)? };
        errors.sort_by_key(|error| error.index);
        errors.truncate(described);
        Ok(Decoded { batch, rejected, errors })
    }
}

fn filtered(batch: &RecordBatch, keep: Vec<bool>) -> Result<RecordBatch, DecodeError> {
    filter_record_batch(batch, &BooleanArray::from(keep)).map_err(|error| DecodeError::Unreadable(error.to_string()))
}

/// The table of all positions of the workspace's portfolios; written with them, not by itself.
pub fn positions() -> &'static Table {
    &BUILT_IN[0]
}

/// The tables every workspace has from the start.
pub fn built_in_tables() -> &'static [Table] {
    &BUILT_IN
}

static BUILT_IN: LazyLock<Vec<Table>> = LazyLock::new(|| {
    // `!` marks a required column, the first ones are the primary key
    let table: [(&str, usize, &str); 3] = [
        ("positions", 2, "portfolio! utf8, symbol! utf8, qty! float64, cost! float64, sector utf8"),
        (
            "companies",
            1,
            "symbol! utf8, name utf8, sector utf8, industry utf8, country utf8, currency utf8, shares float64",
        ),
        ("fx_rates", 2, "base! utf8, quote! utf8, rate! float64"),
    ];
    let built = table.iter().map(|(name, keys, columns)| {
        let columns: Vec<Column> = columns.split(", ").map(Column::built_in).collect();
        let key = columns[..*keys].iter().map(|column| column.name.clone()).collect();
        let name = table_name(name).expect("a built-in name");
        Table::new(name, columns, key).expect("a built-in table")
    });
    built.collect()
});

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::datatypes::{Float64Type, TimestampMicrosecondType};

    fn persons() -> Table {
        let columns = ["id! utf8", "name! utf8", "score float64"].map(Column::built_in).to_vec();
        Table::new(table_name("persons").unwrap(), columns, vec!["id".into()]).unwrap()
    }

    fn decoded(lines: &str) -> Decoded {
        let now = Micros(1_800_000_000_000_000);
        persons().decode(lines.as_bytes(), Format::Ndjson, TsUnit::Millis, &Bounds::default(), now).unwrap()
    }

    #[test]
    fn upserts_have_their_columns_and_deletions_only_the_key() {
        let changes = decoded(
            r#"{"id":"a","name":"Ada","score":1.5,"valid_from":"2026-01-01T00:00:00Z"}
{"id":"a","deleted":true}
{"id":"b"}
{"name":"Bob"}
{"id":"c","name":"Cy","age":3}"#,
        );
        let codes: Vec<(usize, &str)> = changes.errors.iter().map(|error| (error.index, error.code)).collect();
        assert_eq!(codes, [(2, "missing_column"), (3, "missing_column"), (4, "unknown_field")]);
        assert_eq!((changes.batch.num_rows(), changes.rejected), (2, 3));
        let column =
            |name: &str| changes.batch.columns()[2..][persons().changes().arrow().index_of(name).unwrap() - 2].clone();
        assert_eq!(column("score").as_primitive::<Float64Type>().value(0), 1.5);
        assert_eq!(column(VALID_FROM).as_primitive::<TimestampMicrosecondType>().value(0), 1_767_225_600_000_000);
        assert!(column(VALID_FROM).is_null(1) && column(DELETED).as_boolean().value(1));
    }

    #[test]
    fn a_table_may_call_its_columns_as_those_of_streams_but_not_as_those_of_changes() {
        let columns = || ["id! utf8", "ts timestamp"].map(Column::built_in).to_vec();
        assert!(Table::new(table_name("t").unwrap(), columns(), vec!["id".into()]).is_ok());
        let mut with = columns();
        with.push(Column::built_in("deleted bool"));
        let refused = Table::new(table_name("t").unwrap(), with, vec!["id".into()]);
        assert!(matches!(refused, Err(TableError::Reserved(_))), "{refused:?}");
    }

    #[test]
    fn a_column_that_is_called_as_a_field_of_events_holds_what_was_sent() {
        let columns = ["name! utf8", "ts timestamp", "id utf8"].map(Column::built_in).to_vec();
        let table = Table::new(table_name("t").unwrap(), columns, vec!["name".into()]).unwrap();
        let now = Micros(1_800_000_000_000_000);
        let line = br#"{"name":"a","ts":"2026-01-01T00:00:00Z","id":"x"}"#;
        let batch = table.decode(line, Format::Ndjson, TsUnit::Millis, &Bounds::default(), now).unwrap().batch;
        let time = |at: usize| batch.column(at).as_primitive::<TimestampMicrosecondType>().value(0);
        assert_eq!((time(0), time(3)), (now.0, 1_767_225_600_000_000));
        assert!(batch.column(1).is_null(0), "no id of the change itself, which would make later ones repeats");
        assert_eq!(batch.column(4).as_string::<i32>().value(0), "x");
    }

    #[test]
    fn a_primary_key_is_some_columns_that_are_never_null() {
        let table = |key: &[&str]| {
            let columns = ["id! utf8", "name utf8"].map(Column::built_in).to_vec();
            Table::new(table_name("t").unwrap(), columns, key.iter().map(|name| (*name).into()).collect())
        };
        assert!(matches!(table(&[]), Err(TableError::Key { .. })));
        assert!(matches!(table(&["id", "id"]), Err(TableError::Key { .. })));
        assert!(matches!(table(&["nothing"]), Err(TableError::Key { .. })));
        assert!(matches!(table(&["name"]), Err(TableError::NullableKey(_))));
        assert!(matches!(table(&["id"]).unwrap().check_evolution(&persons()), Ok(())));
        for bad in ["", "a.b", "A", "ref.", "a-b"] {
            assert!(table_name(bad).is_err(), "{bad}");
        }
    }
}
