//! A metric's rows as JSON: what the store keeps and what HTTP answers.

use crate::json::AnyValue;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, TimeUnit, TimestampMicrosecondType};
use arrow::error::ArrowError;
use arrow::json::LineDelimitedWriter;
use arrow::json::writer::{LineDelimited, WriterBuilder};
use engine::event::{ItemName, Micros};
use engine::metric::Rows;
use engine::program::Program;
use serde_json::{Map, Value};
use sql::store::{FinalRow, WITHDRAWN};
use std::io::Write;
use std::sync::Arc;

/// An instant as the contract writes it: RFC 3339, microseconds, UTC.
pub fn rfc3339(at: Micros) -> String {
    match chrono::DateTime::from_timestamp_micros(at.0) {
        Some(time) => time.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string(),
        None => at.0.to_string(),
    }
}

/// One JSON object a row, NULL written out, times as the contract writes them.
pub fn json_lines(batch: &RecordBatch) -> Result<Vec<String>, ArrowError> {
    if batch.num_columns() == 0 {
        return Ok(vec!["{}".to_owned(); batch.num_rows()]);
    }
    let batch = with_times_as_text(batch)?;
    let mut writer: LineDelimitedWriter<_> = WriterBuilder::new()
        .with_explicit_nulls(true)
        .with_encoder_factory(Arc::new(AnyValue))
        .build::<_, LineDelimited>(Vec::new());
    writer.write(&batch)?;
    writer.finish()?;
    let mut bytes = writer.into_inner();
    bytes.flush()?;
    let text = String::from_utf8(bytes).map_err(|error| ArrowError::JsonError(error.to_string()))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// A value of this type, read from text, as rows show it; `None` for what is no such value.
pub(crate) fn shown_as(kind: &DataType, text: &str) -> Option<String> {
    if matches!(kind, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
        return Some(text.to_owned());
    }
    let text: ArrayRef = Arc::new(StringArray::from(vec![text]));
    let value = arrow::compute::cast(&text, kind).ok().filter(|value| value.is_valid(0))?;
    let line = json_lines(&RecordBatch::try_from_iter([("v", value)]).ok()?).ok()?.pop()?;
    let shown = line.strip_prefix("{\"v\":")?.strip_suffix('}')?;
    Some(serde_json::from_str::<String>(shown).unwrap_or_else(|_| shown.to_owned()))
}

fn with_times_as_text(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let mut fields = Vec::new();
    let mut columns: Vec<ArrayRef> = Vec::new();
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        if let DataType::Timestamp(unit, _) = field.data_type() {
            let micros = arrow::compute::cast(column, &DataType::Timestamp(TimeUnit::Microsecond, None))?;
            debug_assert!(matches!(
                unit,
                TimeUnit::Second | TimeUnit::Millisecond | TimeUnit::Microsecond | TimeUnit::Nanosecond
            ));
            let text: StringArray = micros
                .as_primitive::<TimestampMicrosecondType>()
                .iter()
                .map(|at| at.map(|at| rfc3339(Micros(at))))
                .collect();
            fields.push(Field::new(field.name(), DataType::Utf8, true));
            columns.push(Arc::new(text));
        } else {
            fields.push(field.as_ref().clone().with_nullable(true));
            columns.push(column.clone());
        }
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
}

/// The first `count` columns behind the two bounds, and the columns after them.
fn split(batch: &RecordBatch, keys: usize) -> Result<(RecordBatch, RecordBatch), ArrowError> {
    let all = batch.num_columns();
    let keys_at: Vec<usize> = (2..2 + keys).collect();
    let values_at: Vec<usize> = (2 + keys..all).collect();
    Ok((batch.project(&keys_at)?, batch.project(&values_at)?))
}

fn time(batch: &RecordBatch, column: usize, row: usize) -> Micros {
    Micros(batch.column(column).as_primitive::<TimestampMicrosecondType>().value(row))
}

/// Final rows as the store keeps them, the ones taken back first.
pub fn to_store(metric: &ItemName, program: &Program, rows: &Rows) -> Result<Vec<FinalRow>, ArrowError> {
    let mut kept = Vec::new();
    if let Some(batch) = &rows.withdrawn {
        let (keys, revisions) = split(batch, program.key_count())?;
        let revisions = revisions.column(0).as_primitive::<Int64Type>();
        kept.extend(json_lines(&keys)?.into_iter().enumerate().map(|(row, key)| FinalRow {
            metric: metric.clone(),
            window_start: time(batch, 0, row),
            window_end: time(batch, 1, row),
            key,
            revision: revisions.value(row),
            row: WITHDRAWN.to_owned(),
        }));
    }
    let Some(revisions) = &rows.revisions else { return Ok(kept) };
    let batch = &rows.batch;
    let (keys, values) = split(batch, program.key_count())?;
    let (keys, values) = (json_lines(&keys)?, json_lines(&values)?);
    kept.extend(keys.into_iter().zip(values).enumerate().map(|(row, (key, values))| FinalRow {
        metric: metric.clone(),
        window_start: time(batch, 0, row),
        window_end: time(batch, 1, row),
        key,
        revision: revisions[row],
        row: values,
    }));
    Ok(kept)
}

/// A row the store kept, as the contract shows it.
pub fn from_store(row: &FinalRow) -> Result<Map<String, Value>, serde_json::Error> {
    let mut map = bounds(row.window_start, row.window_end);
    map.extend(serde_json::from_str::<Map<String, Value>>(&row.key)?);
    map.extend(serde_json::from_str::<Map<String, Value>>(&row.row)?);
    map.insert("final".into(), true.into());
    map.insert("revision".into(), row.revision.into());
    Ok(map)
}

/// Rows the store kept, in the columns of [`Program::output`].
pub fn from_store_columns(program: &Program, rows: &[FinalRow]) -> Result<Rows, ArrowError> {
    let broken = |error: serde_json::Error| ArrowError::JsonError(error.to_string());
    let objects = rows.iter().map(from_store).collect::<Result<Vec<_>, _>>().map_err(broken)?;
    let mut decoder =
        arrow::json::ReaderBuilder::new(program.output().clone()).with_batch_size(rows.len().max(1)).build_decoder()?;
    decoder.serialize(&objects)?;
    let batch = decoder.flush()?.unwrap_or_else(|| RecordBatch::new_empty(program.output().clone()));
    let revisions = Some(rows.iter().map(|row| row.revision).collect());
    Ok(Rows { batch, revisions, gone: None, complete: false, withdrawn: None })
}

/// Rows from memory, as the contract shows them.
pub fn to_json(rows: &Rows) -> Result<Vec<Map<String, Value>>, ArrowError> {
    let broken = |error: serde_json::Error| ArrowError::JsonError(error.to_string());
    let lines = json_lines(&rows.batch)?;
    lines
        .iter()
        .enumerate()
        .map(|(row, line)| {
            let mut map: Map<String, Value> = serde_json::from_str(line).map_err(broken)?;
            let revision = rows.revisions.as_ref().map(|revisions| revisions[row]);
            map.insert("final".into(), revision.is_some().into());
            map.insert("revision".into(), revision.unwrap_or(0).into());
            Ok(map)
        })
        .collect()
}

fn bounds(start: Micros, end: Micros) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("window_start".into(), rfc3339(start).into());
    map.insert("window_end".into(), rfc3339(end).into());
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_its_type_and_shown_as_rows_show_it() {
        let time = DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into()));
        for (kind, text, shown) in [
            (&time, "2026-01-01T01:00:00+01:00", Some("2026-01-01T00:00:00.000000Z")),
            (&time, "2026-01-01T00:00:00.5Z", Some("2026-01-01T00:00:00.500000Z")),
            (&time, "yesterday", None),
            (&DataType::Decimal128(10, 2), "1.1", Some("1.10")),
            (&DataType::Int64, "007", Some("7")),
            (&DataType::Int64, "1.5", None),
            (&DataType::Float64, "1", Some("1.0")),
            (&DataType::Boolean, "true", Some("true")),
            (&DataType::Utf8, "1.10", Some("1.10")),
            (&DataType::Utf8, "", Some("")),
        ] {
            assert_eq!(shown_as(kind, text).as_deref(), shown, "{text} as {kind}");
        }
    }
}
