//! A metric's rows as JSON: what the store keeps and what HTTP answers.

use crate::json::AnyValue;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, TimeUnit, TimestampMicrosecondType};
use arrow::error::ArrowError;
use arrow::json::LineDelimitedWriter;
use arrow::json::writer::{LineDelimited, WriterBuilder};
use chrono::SecondsFormat;
use engine::event::{ItemName, Micros};
use engine::metric::Rows;
use engine::program::Program;
use serde_json::value::{RawValue, to_raw_value};
use sql::store::{FinalRow, WITHDRAWN};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

/// An instant as the contract writes it: RFC 3339, microseconds, UTC.
pub fn rfc3339(at: Micros) -> String {
    match chrono::DateTime::from_timestamp_micros(at.0) {
        Some(time) => time.to_rfc3339_opts(SecondsFormat::Micros, true),
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

/// A row as the contract shows it. Its members stay the JSON text they are: as numbers, decimals would lose digits.
pub type Row = BTreeMap<String, Box<RawValue>>;

/// A row the store kept.
pub fn from_store(row: &FinalRow) -> Result<Row, serde_json::Error> {
    let mut shown: Row = serde_json::from_str(&row.row)?;
    shown.extend(serde_json::from_str::<Row>(&row.key)?);
    shown.insert("window_start".into(), to_raw_value(&rfc3339(row.window_start))?);
    shown.insert("window_end".into(), to_raw_value(&rfc3339(row.window_end))?);
    stand(&mut shown, Some(row.revision))?;
    Ok(shown)
}

/// Says how a row stands: final, with its revision, or provisional.
fn stand(row: &mut Row, revision: Option<i64>) -> Result<(), serde_json::Error> {
    row.insert("final".into(), to_raw_value(&revision.is_some())?);
    row.insert("revision".into(), to_raw_value(&revision.unwrap_or(0))?);
    Ok(())
}

/// Rows the store kept, in the columns of [`Program::output`].
pub fn from_store_columns(program: &Program, rows: &[FinalRow]) -> Result<Rows, ArrowError> {
    let mut decoder =
        arrow::json::ReaderBuilder::new(program.output().clone()).with_batch_size(rows.len().max(1)).build_decoder()?;
    // as text: numbers of JSON values have 53 bits, decimals up to 38 digits
    let mut text = String::new();
    for row in rows {
        let (start, end) = (rfc3339(row.window_start), rfc3339(row.window_end));
        text.push_str(&format!(r#"{{"window_start":"{start}","window_end":"{end}""#));
        for object in [&row.key, &row.row] {
            let members = object.trim().trim_start_matches('{').trim_end();
            if members != "}" {
                text.push(',');
                text.push_str(members.strip_suffix('}').unwrap_or(members));
            }
        }
        text.push_str("}\n");
    }
    if decoder.decode(text.as_bytes())? != text.len() {
        return Err(ArrowError::JsonError("a stored row is no JSON object".to_owned()));
    }
    let batch = decoder.flush()?.unwrap_or_else(|| RecordBatch::new_empty(program.output().clone()));
    let revisions = Some(rows.iter().map(|row| row.revision).collect());
    Ok(Rows { batch, revisions, gone: None, complete: false, withdrawn: None })
}

/// Rows from memory, as the contract shows them.
pub fn to_json(rows: &Rows) -> Result<Vec<Row>, ArrowError> {
    let read = |(at, line): (usize, &String)| {
        let mut row: Row = serde_json::from_str(line)?;
        stand(&mut row, rows.revisions.as_ref().map(|revisions| revisions[at]))?;
        Ok(row)
    };
    let shown: Result<_, serde_json::Error> = json_lines(&rows.batch)?.iter().enumerate().map(read).collect();
    shown.map_err(|error| ArrowError::JsonError(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_is_written_as_its_pattern_says() {
        let ends = [chrono::DateTime::<chrono::Utc>::MIN_UTC, chrono::DateTime::<chrono::Utc>::MAX_UTC];
        let days = (-800_000..4_000_000).step_by(977).map(|day: i64| day * 86_400_000_000 + day * 1_234_567);
        let instants = ends.iter().map(chrono::DateTime::timestamp_micros).chain(days).chain([0, -1, 999_999]);
        for at in instants {
            let time = chrono::DateTime::from_timestamp_micros(at).unwrap();
            assert_eq!(rfc3339(Micros(at)), time.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string());
        }
        assert_eq!(rfc3339(Micros(1_700_000_000_123_456)), "2023-11-14T22:13:20.123456Z");
        assert_eq!(rfc3339(Micros(i64::MAX)), i64::MAX.to_string(), "no calendar goes so far");
    }

    #[test]
    fn a_row_of_the_store_is_shown_to_the_last_digit() {
        let row = FinalRow {
            metric: "m".parse().unwrap(),
            window_start: Micros(0),
            window_end: Micros(1_000_000),
            key: r#"{"amount":12345678901234567.8901234567}"#.into(),
            revision: 2,
            row: r#"{"least":0.10,"x":"y","none":null}"#.into(),
        };
        let shown = serde_json::to_string(&from_store(&row).unwrap()).unwrap();
        let expected = r#"{"amount":12345678901234567.8901234567,"final":true,"least":0.10,"none":null,"revision":2,"window_end":"1970-01-01T00:00:01.000000Z","window_start":"1970-01-01T00:00:00.000000Z","x":"y"}"#;
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_decimal_is_read_from_the_store_to_its_last_digit() {
        let schema = streams::schema::StreamSchema::new(
            "bank.bookings".parse().unwrap(),
            vec![streams::schema::Column {
                name: "amount".into(),
                kind: streams::schema::ColumnType::Decimal(38, 10),
                nullable: false,
            }],
            streams::schema::UnknownFields::Ignore,
        );
        let columns = schema.unwrap().arrow().clone();
        let sql =
            "SELECT amount, min(amount) AS least FROM bank.bookings GROUP BY tumble(ts, INTERVAL '1 second'), amount";
        let planner = sql::plan::Planner::default();
        let program = futures::executor::block_on(planner.program(sql, |_: &_| Some(columns.clone()))).unwrap();
        let row = |digits: &str| FinalRow {
            metric: "m".parse().unwrap(),
            window_start: Micros(0),
            window_end: Micros(1_000_000),
            key: format!(r#"{{"amount":{digits}}}"#),
            revision: 0,
            row: format!(r#"{{"least":{digits}}}"#),
        };
        let (long, longer) = ("12345678901234567.8901234567", "9999999999999999999999999999.9999999999");
        let rows = from_store_columns(&program, &[row(long), row(longer)]).unwrap();
        let shown =
            |at: usize, row: usize| arrow::util::display::array_value_to_string(rows.batch.column(at), row).unwrap();
        assert_eq!([shown(2, 0), shown(3, 0), shown(2, 1), shown(3, 1)], [long, long, longer, longer]);
    }

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
