//! What holds for any input of a stranger: the targets of `fuzz/`, run for a while by the tests below.

use crate::decode::{Bounds, Format, TS_MIN, TsUnit, decode};
use crate::log::{Body, Config, EmbeddedLog, Filter, Log, Offset, Record, file_name, reseal};
use crate::schema::built_in;
use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, TimeUnit, TimestampMicrosecondType};
use arrow::ipc::writer::StreamWriter;
use engine::event::Micros;
use std::fs;
use std::sync::Arc;
use tempfile::TempDir;

const NOW: Micros = Micros(1_800_000_000_000_000);

/// A body with events: its first byte says how it is sent.
pub fn events(data: &[u8]) {
    let Some((how, body)) = data.split_first() else { return };
    let how = usize::from(*how);
    let format = [Format::Ndjson, Format::Json, Format::Arrow][how % 3];
    let unit = [TsUnit::Seconds, TsUnit::Millis, TsUnit::Micros, TsUnit::Nanos][how / 3 % 4];
    let schema = &built_in()[how / 12 % built_in().len()];
    let bounds = Bounds { event_bytes: 4096, described: 3, ..Bounds::default() };
    let Ok(decoded) = decode(schema, body, format, unit, &bounds, NOW) else { return };
    assert_eq!(decoded.batch.schema_ref(), schema.arrow());
    assert!(decoded.errors.len() == decoded.rejected.min(bounds.described), "each is told, up to the bound");
    if format == Format::Ndjson {
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count();
        assert_eq!(decoded.batch.num_rows() + decoded.rejected, lines, "no line is lost");
    }
    let ts = decoded.batch.column_by_name("ts").unwrap().as_primitive::<TimestampMicrosecondType>();
    let latest = NOW.0 + 86_400_000_000;
    assert!(ts.values().iter().all(|ts| (TS_MIN.0..=latest).contains(ts)), "{ts:?}");
}

/// A file of the log, as it may be found after anything happened to it; then as its records say, which checksums hide.
pub fn log_file(data: &[u8]) {
    check_file(data);
    let mut sealed = data.to_vec();
    reseal(&mut sealed);
    if sealed != data {
        check_file(&sealed);
    }
}

fn check_file(data: &[u8]) {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join(file_name(0)), data).unwrap();
    let read = || -> Option<(Vec<Record>, bool)> {
        let log = EmbeddedLog::open(directory.path(), &Config::default()).ok()?;
        let (mut records, mut whole) = (Vec::new(), true);
        for (at, item) in log.scan(log.head(), Filter::default()).ok()?.enumerate() {
            match item {
                Ok((offset, record)) => {
                    assert_eq!(offset, Offset(log.head().0 + at as u64), "none is left out in silence");
                    records.push(record);
                }
                Err(_) => whole = false,
            }
        }
        assert!(!whole || records.len() as u64 == log.tail().0 - log.head().0, "an end before the tail is told");
        Some((records, whole))
    };
    let Some((before, whole)) = read() else { return };
    assert_eq!(read().map(|(records, whole)| (records.len(), whole)), Some((before.len(), whole)));
    if whole {
        let log = EmbeddedLog::open(directory.path(), &Config::default()).unwrap();
        futures::executor::block_on(log.append(record(7))).unwrap();
        drop(log);
        let (after, whole) = read().unwrap();
        assert!(whole && after.len() == before.len() + 1 && after.last() == Some(&record(7)), "it goes on as a log");
    }
}

/// Two trades.
fn trades(at: i64) -> RecordBatch {
    let line = |id: i64| format!(r#"{{"id":"t{id}","ts":{},"symbol":"A","price":{id}.5,"qty":1}}"#, NOW.0 / 1_000 + id);
    let body = format!("{}\n{}", line(at), line(at + 1));
    let schema = &built_in()[0];
    decode(schema, body.as_bytes(), Format::Ndjson, TsUnit::Millis, &Bounds::default(), NOW).unwrap().batch
}

fn record(at: i64) -> Record {
    let body = Body::Events { stream: built_in()[0].stream.clone(), batch: trades(at) };
    Record { workspace: format!("w{}", at % 3).parse().unwrap(), body }
}

/// Bodies to begin with.
pub fn bodies() -> Vec<Vec<u8>> {
    let text = |how: u8, text: &str| [&[how], text.as_bytes()].concat();
    vec![
        text(
            3,
            "{\"id\":\"a\",\"ts\":1800000000000,\"symbol\":\"A\",\"price\":1.5,\"qty\":2e0,\"side\":\"buy\"}\n\n{\"symbol\":\"\\ud83d\\ude00\",\"price\":-0.0,\"qty\":1,\"extra\":{\"a\":[1,null]}}\n",
        ),
        text(4, r#"[{"ts":"2027-01-15T08:00:00.5+01:00","symbol":"B","price":1,"qty":1},{"symbol":null},[],7]"#),
        text(4, r#"{"ts":1800000000000.5,"symbol":"\u00e9\n","price":"1","qty":1}"#),
        text(12 * 3 + 3, "{\"ts\":1800000000000,\"user\":\"u\",\"amount\":\"12.34\",\"ok\":true}"),
        arrow(&trades(1)),
        arrow(&unlike()),
    ]
}

/// What means something in a body.
pub const WORDS: &[&str] = &[
    "null",
    "true",
    "NaN",
    "1e308",
    "-1",
    "9223372036854775808",
    "0.1",
    "\"",
    "\\u0000",
    "\\ud800",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\n",
    "\"ts\":",
    "\"id\":",
    "\"price\":",
    "\"symbol\":",
    "1970-01-01T00:00:00Z",
    "\u{feff}",
];

/// An Arrow stream, with the byte in front that says so.
fn arrow(batch: &RecordBatch) -> Vec<u8> {
    let mut body = vec![2 + 3 * 2];
    let mut writer = StreamWriter::try_new(&mut body, batch.schema_ref()).unwrap();
    writer.write(batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    body
}

/// Two trades in columns of other types than theirs, and one that the stream does not know.
fn unlike() -> RecordBatch {
    let batch = trades(1);
    let column = |name, kind| (name, cast(batch.column_by_name(name).unwrap(), &kind).unwrap());
    let ids: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
    let columns = [
        column("ts", DataType::Timestamp(TimeUnit::Second, Some("+01:00".into()))),
        column("id", DataType::Utf8View),
        column("symbol", DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8))),
        column("price", DataType::Decimal128(10, 2)),
        column("qty", DataType::Float32),
        ("more", Arc::new(StructArray::from(vec![(Arc::new(Field::new("a", DataType::Int64, true)), ids)]))),
    ];
    RecordBatch::try_from_iter(columns).unwrap()
}

/// Files to begin with.
pub fn files() -> Vec<Vec<u8>> {
    let file = |records: i64| {
        let directory = TempDir::new().unwrap();
        let log = EmbeddedLog::open(directory.path(), &Config::default()).unwrap();
        for at in 0..records {
            futures::executor::block_on(log.append(record(at))).unwrap();
        }
        drop(log);
        fs::read(directory.path().join(file_name(0))).unwrap()
    };
    vec![file(0), file(1), file(6)]
}

#[cfg(test)]
mod tests;
