//! Reference tables as they are stored, and positions of portfolios as rows of one.

use crate::fault::Fault;
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    new_null_array,
};
use arrow::datatypes::Float64Type;
use engine::event::{ItemName, Micros, StreamName};
use engine::portfolio::Position;
use engine::reference::{DELETED, TableSize, VALID_FROM};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use streams::schema::Column;
use streams::table::{Table, TableError, positions};

/// What the definition of a table is stored as.
#[derive(Serialize, Deserialize)]
pub(crate) struct StoredTable {
    columns: Vec<Column>,
    primary_key: Vec<String>,
}

impl StoredTable {
    pub(crate) fn of(table: &Table) -> StoredTable {
        StoredTable { columns: table.columns.clone(), primary_key: table.primary_key.clone() }
    }

    pub(crate) fn table(self, name: StreamName) -> Result<Table, TableError> {
        Table::new(name, self.columns, self.primary_key)
    }
}

/// A reference table and how it is doing.
#[derive(Clone, Debug)]
pub struct TableInfo {
    pub table: Arc<Table>,
    pub size: TableSize,
}

/// Positions of one portfolio by symbol.
pub(crate) type Positions = BTreeMap<String, Position>;

/// Rows of `ref.positions`, by portfolio.
pub(crate) fn read_positions(rows: &RecordBatch) -> BTreeMap<ItemName, Positions> {
    let text = |name: &str| rows.column_by_name(name).and_then(|column| column.as_string_opt::<i32>());
    let number = |name: &str| rows.column_by_name(name).and_then(|column| column.as_primitive_opt::<Float64Type>());
    let mut found: BTreeMap<ItemName, Positions> = BTreeMap::new();
    let (Some(portfolio), Some(symbol), Some(sector)) = (text("portfolio"), text("symbol"), text("sector")) else {
        return found;
    };
    let (Some(qty), Some(cost)) = (number("qty"), number("cost")) else { return found };
    for row in 0..rows.num_rows() {
        let Ok(portfolio) = portfolio.value(row).parse() else { continue };
        let position = Position {
            symbol: symbol.value(row).to_owned(),
            qty: qty.value(row),
            cost: cost.value(row),
            sector: sector.is_valid(row).then(|| sector.value(row).to_owned()),
        };
        found.entry(portfolio).or_default().insert(position.symbol.clone(), position);
    }
    found
}

/// What makes `before` the positions `now`, as changes of `ref.positions` that came at `at`; `None` when nothing does.
pub(crate) fn position_changes(
    portfolio: &ItemName,
    before: &Positions,
    now: &Positions,
    at: Micros,
) -> Result<Option<RecordBatch>, Fault> {
    let put = now.values().filter(|position| before.get(&position.symbol) != Some(position)).map(|p| (p, false));
    let gone = before.values().filter(|position| !now.contains_key(&position.symbol)).map(|p| (p, true));
    let rows: Vec<(&Position, bool)> = put.chain(gone).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let schema = positions().changes().arrow().clone();
    let column = |name: &str| -> ArrayRef {
        match name {
            "ts" => Arc::new(TimestampMicrosecondArray::from_value(at.0, rows.len()).with_timezone("+00:00")),
            "portfolio" => Arc::new(StringArray::from(vec![portfolio.as_str(); rows.len()])),
            "symbol" => Arc::new(StringArray::from_iter_values(rows.iter().map(|(p, _)| &p.symbol))),
            "qty" => Arc::new(Float64Array::from_iter_values(rows.iter().map(|(p, _)| p.qty))),
            "cost" => Arc::new(Float64Array::from_iter_values(rows.iter().map(|(p, _)| p.cost))),
            "sector" => Arc::new(rows.iter().map(|(p, _)| p.sector.as_deref()).collect::<StringArray>()),
            DELETED => Arc::new(rows.iter().map(|(_, gone)| Some(*gone)).collect::<BooleanArray>()),
            VALID_FROM => new_null_array(&streams::schema::timestamp_type(), rows.len()),
            _ => Arc::new(StringArray::new_null(rows.len())),
        }
    };
    let columns = schema.fields().iter().map(|field| column(field.name())).collect();
    RecordBatch::try_new(schema, columns).map(Some).map_err(Fault::internal)
}
