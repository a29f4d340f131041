//! What the events of a stream look like: its columns, and what to do with fields it does not know.

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use engine::event::{NameError, StreamName};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, LazyLock};

/// Columns every stream has, in front of its own: event time, idempotency key, unknown fields.
pub const RESERVED: [&str; 3] = ["ts", "id", "extra"];

/// Type of a column in the public contract.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ColumnType {
    Utf8,
    Int64,
    Float64,
    /// Precision 1..=38 and scale 0..=precision.
    Decimal(u8, i8),
    Bool,
    /// Microseconds, UTC.
    Timestamp,
    /// Any JSON value, kept as its text.
    Json,
}

impl ColumnType {
    /// The Arrow type a column of this type has in memory and in SQL.
    pub fn arrow(self) -> DataType {
        match self {
            ColumnType::Utf8 | ColumnType::Json => DataType::Utf8,
            ColumnType::Int64 => DataType::Int64,
            ColumnType::Float64 => DataType::Float64,
            ColumnType::Decimal(precision, scale) => DataType::Decimal128(precision, scale),
            ColumnType::Bool => DataType::Boolean,
            ColumnType::Timestamp => timestamp_type(),
        }
    }
}

/// Event time in Arrow: microseconds with the offset `+00:00`.
pub fn timestamp_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into()))
}

impl std::fmt::Display for ColumnType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ColumnType::Utf8 => f.write_str("utf8"),
            ColumnType::Int64 => f.write_str("int64"),
            ColumnType::Float64 => f.write_str("float64"),
            ColumnType::Decimal(precision, scale) => write!(f, "decimal({precision},{scale})"),
            ColumnType::Bool => f.write_str("bool"),
            ColumnType::Timestamp => f.write_str("timestamp"),
            ColumnType::Json => f.write_str("json"),
        }
    }
}

impl std::str::FromStr for ColumnType {
    type Err = SchemaError;
    fn from_str(text: &str) -> Result<Self, SchemaError> {
        let unknown = || SchemaError::UnknownType(text.to_owned());
        Ok(match text {
            "utf8" => ColumnType::Utf8,
            "int64" => ColumnType::Int64,
            "float64" => ColumnType::Float64,
            "bool" => ColumnType::Bool,
            "timestamp" => ColumnType::Timestamp,
            "json" => ColumnType::Json,
            _ => {
                let inner =
                    text.strip_prefix("decimal(").and_then(|rest| rest.strip_suffix(')')).ok_or_else(unknown)?;
                let (precision, scale) = inner.split_once(',').ok_or_else(unknown)?;
                let precision: u8 = precision.trim().parse().map_err(|_| unknown())?;
                let scale: i8 = scale.trim().parse().map_err(|_| unknown())?;
                if !(1..=38).contains(&precision) || scale < 0 || scale as u8 > precision {
                    return Err(unknown());
                }
                ColumnType::Decimal(precision, scale)
            }
        })
    }
}

impl Serialize for ColumnType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ColumnType {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One column of a stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: ColumnType,
    #[serde(default = "yes")]
    pub nullable: bool,
}

impl Column {
    /// A column of ours, as `name type` with `!` behind the name of a required one.
    pub(crate) fn built_in(text: &str) -> Column {
        let (name, kind) = text.split_once(' ').expect("name and type");
        Column {
            name: name.trim_end_matches('!').to_owned(),
            kind: kind.parse().expect("a built-in type"),
            nullable: !name.ends_with('!'),
        }
    }
}

fn yes() -> bool {
    true
}

/// What happens to a field of an event that the stream has no column for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnknownFields {
    /// Kept in the JSON column `extra`.
    #[default]
    Keep,
    /// The event is refused.
    Reject,
    /// The field is dropped.
    Ignore,
}

/// Why a stream definition was refused.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("type `{0}` is none of utf8, int64, float64, decimal(p,s) with s <= p <= 38, bool, timestamp, json")]
    UnknownType(String),
    #[error("column name `{0}` must match [a-z_][a-z0-9_]{{0,62}}")]
    BadColumnName(String),
    #[error("column `{0}` is reserved: every stream has it already; leave it out")]
    Reserved(String),
    #[error("column `{0}` is listed twice")]
    Duplicate(String),
    #[error("a stream needs 1 to {max} columns, this one has {found}")]
    ColumnCount { found: usize, max: usize },
    #[error("column `{column}` is {old} and holds events; it cannot become {new}: add a column with a new name")]
    Incompatible { column: String, old: String, new: String },
}

/// The most columns a stream may have.
pub const MAX_COLUMNS: usize = 256;

/// The schema of one stream: its own columns and its Arrow form (`ts`, `id`, own columns, `extra`).
#[derive(Clone, Debug)]
pub struct StreamSchema {
    pub stream: StreamName,
    pub columns: Vec<Column>,
    pub unknown_fields: UnknownFields,
    arrow: SchemaRef,
}

impl StreamSchema {
    /// Checks the columns and lays out the Arrow schema.
    pub fn new(stream: StreamName, columns: Vec<Column>, unknown_fields: UnknownFields) -> Result<Self, SchemaError> {
        match columns.iter().find(|column| RESERVED.contains(&column.name.as_str())) {
            Some(reserved) => Err(SchemaError::Reserved(reserved.name.clone())),
            None => StreamSchema::of_table(stream, columns, unknown_fields),
        }
    }

    /// The same for changes of a reference table, whose columns may be called as the reserved ones: those stand first.
    pub(crate) fn of_table(
        stream: StreamName,
        columns: Vec<Column>,
        unknown_fields: UnknownFields,
    ) -> Result<Self, SchemaError> {
        if columns.is_empty() || columns.len() > MAX_COLUMNS {
            return Err(SchemaError::ColumnCount { found: columns.len(), max: MAX_COLUMNS });
        }
        for (i, column) in columns.iter().enumerate() {
            let name = &column.name;
            let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
            let rest = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            if !first || !rest || name.len() > 63 {
                return Err(SchemaError::BadColumnName(name.clone()));
            }
            if name == "window_start" || name == "window_end" {
                return Err(SchemaError::Reserved(name.clone()));
            }
            if columns[..i].iter().any(|other| other.name == *name) {
                return Err(SchemaError::Duplicate(name.clone()));
            }
        }
        let mut fields = vec![Field::new("ts", timestamp_type(), false), Field::new("id", DataType::Utf8, true)];
        fields.extend(columns.iter().map(|c| Field::new(&c.name, c.kind.arrow(), c.nullable)));
        fields.push(Field::new("extra", DataType::Utf8, true));
        Ok(Self { stream, columns, unknown_fields, arrow: Arc::new(Schema::new(fields)) })
    }

    /// The Arrow schema of this stream's batches: `ts`, `id`, the stream's columns, `extra`.
    pub fn arrow(&self) -> &SchemaRef {
        &self.arrow
    }

    /// Whether `next` may replace this schema while events of this one are kept: columns may be
    /// added (nullable) and dropped, not retyped.
    pub fn check_evolution(&self, next: &StreamSchema) -> Result<(), SchemaError> {
        for column in &next.columns {
            if let Some(old) = self.columns.iter().find(|old| old.name == column.name)
                && old.kind != column.kind
            {
                return Err(SchemaError::Incompatible {
                    column: column.name.clone(),
                    old: old.kind.to_string(),
                    new: column.kind.to_string(),
                });
            }
        }
        Ok(())
    }
}

/// The streams every workspace has from the start.
pub fn built_in() -> &'static [StreamSchema] {
    static BUILT_IN: LazyLock<Vec<StreamSchema>> = LazyLock::new(|| {
        // `!` marks a required column
        let table: [(&str, &str); 6] = [
            ("market.trades", "symbol! utf8, price! float64, qty! float64, side utf8, venue utf8"),
            ("market.quotes", "symbol! utf8, bid! float64, ask! float64, bid_qty float64, ask_qty float64, venue utf8"),
            (
                "market.bars",
                "symbol! utf8, open! float64, high! float64, low! float64, close! float64, volume float64, interval utf8",
            ),
            (
                "analytics.events",
                "event! utf8, user_id utf8, session_id utf8, value float64, currency utf8, properties json",
            ),
            (
                "chat.messages",
                "thread! utf8, sender! utf8, role utf8, text utf8, amount float64, currency utf8, reply_to utf8",
            ),
            ("agent.events", "thread! utf8, run! utf8, type! utf8, payload json, tokens int64, elapsed_ms float64"),
        ];
        table
            .iter()
            .map(|(stream, columns)| {
                let columns = columns.split(", ").map(Column::built_in).collect();
                StreamSchema::new(stream.parse().expect("a built-in name"), columns, UnknownFields::Keep)
                    .expect("a built-in schema")
            })
            .collect()
    });
    &BUILT_IN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_streams_are_those_of_the_contract() {
        let names: Vec<&str> = built_in().iter().map(|s| s.stream.as_str()).collect();
        let all =
            ["market.trades", "market.quotes", "market.bars", "analytics.events", "chat.messages", "agent.events"];
        assert_eq!(names, all);
        let trades = &built_in()[0];
        assert!(!trades.arrow().field_with_name("price").unwrap().is_nullable());
        assert!(trades.arrow().field_with_name("venue").unwrap().is_nullable());
    }

    #[test]
    fn a_type_reads_back_as_it_prints() {
        for text in ["utf8", "int64", "float64", "bool", "timestamp", "json", "decimal(18,4)"] {
            assert_eq!(text.parse::<ColumnType>().unwrap().to_string(), text);
        }
        for bad in ["decimal(39,1)", "decimal(2,3)", "int32", "decimal(,)"] {
            assert!(bad.parse::<ColumnType>().is_err(), "{bad}");
        }
    }
}
