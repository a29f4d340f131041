//! One row of a file written as one event: straight into the chunk's bytes, typed by the stream's schema.

use super::Chunk;
use super::mapping::{From, Mapping, Scale, Target};
use super::time::{instant_of_count, instant_of_float, instant_of_number, instant_of_text};
use crate::decode::{Bounds, TsUnit};
use crate::schema::{ColumnType, StreamSchema};
use chrono::{DateTime, SecondsFormat};
use engine::event::Micros;
use std::borrow::Cow;

/// A cell of a file, before it is known what the stream wants of it.
pub(super) enum Value<'a> {
    Null,
    Text(&'a str),
    Int(i64),
    Float(f64),
    Bool(bool),
    Time(Micros),
    /// Valid JSON.
    Json(&'a str),
}

/// Why one row was refused; the rows after it can still be read.
#[derive(Debug, thiserror::Error)]
pub enum RowFault {
    #[error("column `{column}`: `{text}` is not {wanted}; mend the value or leave it empty")]
    Value { column: String, text: String, wanted: &'static str },
    #[error("column `{column}`: `{text}` is not a time; give RFC 3339 text, or a number and its unit (s, ms, us, ns)")]
    Time { column: String, text: String },
    #[error("column `{column}` is not UTF-8; save the file as UTF-8")]
    NotUtf8 { column: String },
    #[error("{found} fields, but the header has {expected}; a delimiter or a quote is missing or too many")]
    Ragged { found: u64, expected: u64 },
    #[error("not a JSON object: {0}")]
    NotJson(String),
    #[error("longer than {limit} bytes; split the event or raise the limit")]
    TooLong { limit: usize },
}

/// What the stream wants of one column.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    EventTime,
    Column(ColumnType),
    /// No column of the stream: as the file has it.
    AsItIs,
}

/// One column of the stream: where it is in the file and how it is written.
pub(super) struct Field {
    /// Index of the file's column.
    pub source: usize,
    name: String,
    /// `"name":`, so that writing a key is a copy.
    key: Vec<u8>,
    wanted: Wanted,
    scale: Option<Scale>,
}

/// How rows become events: which columns, under which names, of which types.
pub(super) struct Layout {
    pub fields: Vec<Field>,
    /// Members that are the same in every event, each followed by a comma.
    constants: Vec<u8>,
    unit: TsUnit,
}

/// A mapping names a column that the file does not have.
pub(super) struct MissingColumn(pub String);

impl Layout {
    /// The layout of a file whose columns are `sources`, in their order.
    pub fn of_columns(
        mapping: &Mapping,
        schema: &StreamSchema,
        sources: &[impl AsRef<str>],
    ) -> Result<Layout, MissingColumn> {
        let index = |name: &str| sources.iter().position(|source| source.as_ref() == name);
        let mut layout = Layout::constants(mapping);
        match index(mapping.ts_source()) {
            Some(source) => layout.fields.push(Field::new("ts", source, Wanted::EventTime, None)),
            None if mapping.ts.is_some() => return Err(MissingColumn(mapping.ts_source().to_owned())),
            None => {}
        }
        for Target { name, from } in &mapping.columns {
            if let From::Column { source, scale } = from {
                let source = index(source).ok_or_else(|| MissingColumn(source.clone()))?;
                layout.fields.push(Field::new(name, source, wanted(schema, name), *scale));
            }
        }
        for (source, name) in sources.iter().enumerate() {
            let name = name.as_ref();
            if !name.is_empty() && passes(mapping, schema, name) {
                layout.fields.push(Field::new(name, source, wanted(schema, name), None));
            }
        }
        Ok(layout)
    }

    /// A layout of constants only; JSON objects add their fields one by one.
    pub fn constants(mapping: &Mapping) -> Layout {
        let mut constants = Vec::new();
        for Target { name, from } in &mapping.columns {
            if let From::Constant(text) = from {
                constants.extend(key_of(name));
                write_json(&mut constants, text);
                constants.push(b',');
            }
        }
        Layout { fields: Vec::new(), constants, unit: mapping.unit }
    }

    /// Appends one event to `chunk`; `value` gives the cell of a file column. On a fault the chunk is as before.
    pub fn write<'a>(
        &self,
        chunk: &mut Chunk,
        mut value: impl FnMut(&Field) -> Result<Value<'a>, RowFault>,
    ) -> Result<(), RowFault> {
        let mut event = EventWriter::begin(self, chunk);
        for field in &self.fields {
            let written = value(field).and_then(|value| event.member(field, value));
            if let Err(fault) = written {
                event.abandon();
                return Err(fault);
            }
        }
        event.end();
        Ok(())
    }
}

/// Whether an unmapped column of the file is taken under its own name.
pub(super) fn passes(mapping: &Mapping, schema: &StreamSchema, name: &str) -> bool {
    let taken = name == "ts" || name == mapping.ts_source() || mapping.columns.iter().any(|c| c.name == name);
    !taken && (mapping.columns.is_empty() || name == "id" || schema.columns.iter().any(|c| c.name == name))
}

fn wanted(schema: &StreamSchema, name: &str) -> Wanted {
    match schema.columns.iter().find(|column| column.name == name) {
        Some(column) => Wanted::Column(column.kind),
        None if name == "id" => Wanted::Column(ColumnType::Utf8),
        None => Wanted::AsItIs,
    }
}

impl Field {
    fn new(name: &str, source: usize, wanted: Wanted, scale: Option<Scale>) -> Field {
        Field { source, name: name.to_owned(), key: key_of(name), wanted, scale }
    }

    /// Event time from column `source`.
    pub fn event_time(source: usize) -> Field {
        Field::new("ts", source, Wanted::EventTime, None)
    }

    /// A field of a JSON object, which has types of its own.
    pub fn of_json(name: &str, scale: Option<Scale>) -> Field {
        Field::new(name, 0, Wanted::AsItIs, scale)
    }

    /// Its name in the stream.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn fault(&self, text: &str, wanted: &'static str) -> RowFault {
        RowFault::Value { column: self.name.clone(), text: shown(text), wanted }
    }
}

/// An event under construction at the end of a chunk.
pub(super) struct EventWriter<'a> {
    chunk: &'a mut Chunk,
    unit: TsUnit,
    start: usize,
    ts: Option<Micros>,
}

impl<'a> EventWriter<'a> {
    pub fn begin(layout: &Layout, chunk: &'a mut Chunk) -> EventWriter<'a> {
        let start = chunk.lines.len();
        chunk.lines.push(b'{');
        chunk.lines.extend_from_slice(&layout.constants);
        EventWriter { chunk, unit: layout.unit, start, ts: None }
    }

    /// Writes one member; a null is left out.
    pub fn member(&mut self, field: &Field, value: Value<'_>) -> Result<(), RowFault> {
        let out = &mut self.chunk.lines;
        let before = out.len();
        out.extend_from_slice(&field.key);
        let key_end = out.len();
        match field.wanted {
            Wanted::EventTime => {
                self.ts = instant(field, &value, self.unit)?;
                match self.ts {
                    // ingest would take the count for one in a wrong unit
                    Some(at) if Bounds::default().may_be_wrong_unit(at) && is_date(&value, self.unit) => {
                        write_time(out, at);
                    }
                    Some(Micros(micros)) => write_json(out, &micros),
                    None => {}
                }
            }
            Wanted::Column(ColumnType::Timestamp) => {
                if let Some(time) = instant(field, &value, self.unit)? {
                    write_time(out, time);
                }
            }
            Wanted::Column(kind) => write_typed(out, field, kind, value)?,
            Wanted::AsItIs => write_as_it_is(out, field, value)?,
        }
        if out.len() == key_end {
            out.truncate(before);
        } else {
            out.push(b',');
        }
        Ok(())
    }

    /// Copies one member whose value is JSON and whose key needs no layout.
    pub fn raw_member(&mut self, key: &str, json: &str) {
        if json == "null" {
            return;
        }
        let out = &mut self.chunk.lines;
        write_json(out, key);
        out.push(b':');
        write_one_line(out, json);
        out.push(b',');
    }

    pub fn end(self) {
        let out = &mut self.chunk.lines;
        if out.last() == Some(&b',') {
            out.pop();
        }
        out.extend_from_slice(b"}\n");
        let end = out.len();
        self.chunk.events.push(super::Mark { end, ts: self.ts });
    }

    pub fn abandon(self) {
        self.chunk.lines.truncate(self.start);
    }
}

fn key_of(name: &str) -> Vec<u8> {
    let mut key = Vec::new();
    write_json(&mut key, name);
    key.push(b':');
    key
}

fn write_json<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("text and numbers are written to memory");
}

fn write_time(out: &mut Vec<u8>, Micros(micros): Micros) {
    match DateTime::from_timestamp_micros(micros) {
        Some(time) => write_json(out, &time.to_rfc3339_opts(SecondsFormat::Micros, true)),
        None => write_json(out, &micros),
    }
}

/// JSON on one line: a line break inside valid JSON is blank space, never part of a string.
fn write_one_line(out: &mut Vec<u8>, json: &str) {
    let start = out.len();
    out.extend_from_slice(json.as_bytes());
    for byte in &mut out[start..] {
        if matches!(*byte, b'\n' | b'\r') {
            *byte = b' ';
        }
    }
}

/// A whole number is written without a fraction: what a spreadsheet shows as 2014 is not 2014.0.
fn write_float(out: &mut Vec<u8>, value: f64) {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        write_json(out, &(value as i64));
    } else if value.is_finite() {
        write_json(out, &value);
    }
}

/// Whether a time is written out, not counted.
fn is_date(value: &Value<'_>, unit: TsUnit) -> bool {
    match value {
        Value::Time(_) => true,
        Value::Text(text) => instant_of_number(text.trim(), unit).is_none(),
        Value::Json(json) => instant_of_number(json_text(json).trim(), unit).is_none(),
        Value::Null | Value::Int(_) | Value::Float(_) | Value::Bool(_) => false,
    }
}

fn instant(field: &Field, value: &Value<'_>, unit: TsUnit) -> Result<Option<Micros>, RowFault> {
    let of_text = |text: &str| instant_of_number(text, unit).or_else(|| instant_of_text(text));
    let (instant, shown_as) = match value {
        Value::Null => return Ok(None),
        Value::Json("null") => return Ok(None),
        Value::Text(text) if text.trim().is_empty() => return Ok(None),
        Value::Time(time) => (Some(*time), Cow::Borrowed("")),
        Value::Int(count) => (instant_of_count(*count, unit), Cow::Owned(count.to_string())),
        Value::Float(count) if count.is_nan() => return Ok(None),
        Value::Float(count) => (instant_of_float(*count, unit), Cow::Owned(count.to_string())),
        Value::Bool(yes) => (None, Cow::Owned(yes.to_string())),
        Value::Text(text) => (of_text(text.trim()), Cow::Borrowed(*text)),
        Value::Json(json) => {
            let text = json_text(json);
            (of_text(text.trim()), text)
        }
    };
    let fault = || RowFault::Time { column: field.name.clone(), text: shown(&shown_as) };
    instant.map(Some).ok_or_else(fault)
}

fn write_typed(out: &mut Vec<u8>, field: &Field, kind: ColumnType, value: Value<'_>) -> Result<(), RowFault> {
    match (kind, value) {
        (_, Value::Null) => {}
        (ColumnType::Float64 | ColumnType::Decimal(..) | ColumnType::Int64, value) => {
            write_number(out, field, value, kind == ColumnType::Int64)?;
        }
        (ColumnType::Bool, Value::Text(text)) => match text.trim() {
            "" => {}
            "true" | "TRUE" | "True" | "t" | "1" => write_json(out, &true),
            "false" | "FALSE" | "False" | "f" | "0" => write_json(out, &false),
            text => return Err(field.fault(text, "true or false")),
        },
        (ColumnType::Bool, Value::Int(n @ (0 | 1))) => write_json(out, &(n == 1)),
        (ColumnType::Json, Value::Text("")) => {}
        (ColumnType::Json, Value::Text(text)) => match serde_json::from_str::<&serde_json::value::RawValue>(text) {
            Ok(json) => write_one_line(out, json.get()),
            Err(_) => write_json(out, text),
        },
        (ColumnType::Utf8, Value::Int(n)) => write_json(out, &n.to_string()),
        (ColumnType::Utf8, Value::Bool(yes)) => write_json(out, if yes { "true" } else { "false" }),
        (ColumnType::Utf8, Value::Float(x)) if x.is_finite() => {
            out.push(b'"');
            write_float(out, x);
            out.push(b'"');
        }
        (_, value) => write_as_it_is(out, field, value)?,
    }
    Ok(())
}

fn write_as_it_is(out: &mut Vec<u8>, field: &Field, value: Value<'_>) -> Result<(), RowFault> {
    match value {
        value if field.scale.is_some() => write_number(out, field, value, false)?,
        Value::Null | Value::Text("") | Value::Json("null") => {}
        Value::Text(text) => write_json(out, text),
        Value::Int(n) => write_json(out, &n),
        Value::Float(x) => write_float(out, x),
        Value::Bool(yes) => write_json(out, &yes),
        Value::Time(time) => write_time(out, time),
        Value::Json(json) => write_one_line(out, json),
    }
    Ok(())
}

/// Writes a number, scaled if the field says so. NaN and infinity have no JSON form and count as null.
fn write_number(out: &mut Vec<u8>, field: &Field, value: Value<'_>, whole: bool) -> Result<(), RowFault> {
    let wanted = if whole { "a whole number" } else { "a number" };
    let text: Cow<'_, str> = match value {
        Value::Null | Value::Json("null") => return Ok(()),
        Value::Int(n) if field.scale.is_none() => {
            write_json(out, &n);
            return Ok(());
        }
        Value::Int(n) => return write_scaled(out, field, n as f64, whole),
        Value::Float(x) => return write_scaled(out, field, x, whole),
        Value::Text(text) => Cow::Borrowed(text.trim()),
        Value::Json(json) => json_text(json),
        Value::Bool(yes) => return Err(field.fault(if yes { "true" } else { "false" }, wanted)),
        Value::Time(Micros(micros)) => return Err(field.fault(&micros.to_string(), wanted)),
    };
    if text.is_empty() {
        return Ok(());
    }
    // Written as the file has it, to the last digit, whenever it is JSON already.
    if field.scale.is_none() && is_json_number(text.as_bytes(), whole) {
        out.extend_from_slice(text.as_bytes());
        return Ok(());
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() || text.eq_ignore_ascii_case("nan") => write_scaled(out, field, number, whole),
        _ => Err(field.fault(&text, wanted)),
    }
}

fn write_scaled(out: &mut Vec<u8>, field: &Field, number: f64, whole: bool) -> Result<(), RowFault> {
    let number = field.scale.map_or(number, |scale| scale.apply(number));
    if whole && number.is_finite() && (number.fract() != 0.0 || number.abs() >= 9e15) {
        return Err(field.fault(&number.to_string(), "a whole number"));
    }
    write_float(out, number);
    Ok(())
}

/// The inside of a JSON string, or the JSON itself.
fn json_text(json: &str) -> Cow<'_, str> {
    if !json.starts_with('"') {
        return Cow::Borrowed(json);
    }
    serde_json::from_str::<String>(json).map_or(Cow::Borrowed(json), Cow::Owned)
}

/// RFC 8259 `number`; with `whole`, one that has neither fraction nor exponent and fits an i64.
fn is_json_number(text: &[u8], whole: bool) -> bool {
    let digits = |text: &[u8]| text.iter().take_while(|b| b.is_ascii_digit()).count();
    let mut rest = text.strip_prefix(b"-").unwrap_or(text);
    let int = digits(rest);
    if int == 0 || (int > 1 && rest[0] == b'0') {
        return false;
    }
    rest = &rest[int..];
    if whole {
        return rest.is_empty()
            && (int < 19 || std::str::from_utf8(text).is_ok_and(|text| text.parse::<i64>().is_ok()));
    }
    if let Some(fraction) = rest.strip_prefix(b".") {
        let length = digits(fraction);
        if length == 0 {
            return false;
        }
        rest = &fraction[length..];
    }
    // exponents are rare and may overflow: they take the way through f64
    rest.is_empty()
}

/// A value as it is shown in an error: its first 80 characters.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{Column, UnknownFields};

    fn check(kind: &str, value: Value<'_>, expected: &str) {
        let column = Column { name: "x".into(), kind: kind.parse().unwrap(), nullable: true };
        let schema = StreamSchema::new("a.b".parse().unwrap(), vec![column], UnknownFields::Keep).unwrap();
        let Ok(layout) = Layout::of_columns(&Mapping::default(), &schema, &["x"]) else { panic!("x is there") };
        let mut chunk = Chunk::default();
        let mut value = Some(value);
        let written = layout.write(&mut chunk, |_| Ok(value.take().unwrap_or(Value::Null)));
        let line = String::from_utf8(chunk.lines).unwrap();
        match written {
            Ok(()) => assert_eq!(line, format!("{expected}\n")),
            Err(fault) => {
                assert!(fault.to_string().contains(expected), "{fault}");
                assert_eq!(line, "", "a refused row leaves nothing behind");
            }
        }
    }

    #[test]
    fn a_cell_becomes_what_its_column_wants() {
        check("float64", Value::Text(" 1.50 "), r#"{"x":1.50}"#);
        check("float64", Value::Text("+.5e1"), r#"{"x":5}"#);
        check("float64", Value::Text(""), "{}");
        check("float64", Value::Text("NaN"), "{}");
        check("float64", Value::Float(f64::NEG_INFINITY), "{}");
        check("float64", Value::Float(0.1), r#"{"x":0.1}"#);
        check("int64", Value::Text("-12"), r#"{"x":-12}"#);
        check("int64", Value::Float(2014.0), r#"{"x":2014}"#);
        check("utf8", Value::Float(2014.0), r#"{"x":"2014"}"#);
        check("utf8", Value::Text("00\"1\n"), r#"{"x":"00\"1\n"}"#);
        check("bool", Value::Text("TRUE"), r#"{"x":true}"#);
        check("json", Value::Text("[1,\n2]"), r#"{"x":[1, 2]}"#);
        check("json", Value::Text("a word"), r#"{"x":"a word"}"#);
        check("timestamp", Value::Text("1000"), r#"{"x":"1970-01-01T00:00:01.000000Z"}"#);
        check("decimal(18,4)", Value::Text("12345678901234.5678"), r#"{"x":12345678901234.5678}"#);
    }

    #[test]
    fn a_cell_that_does_not_fit_names_column_value_and_type() {
        check("float64", Value::Text("12,5"), "column `x`: `12,5` is not a number");
        check("float64", Value::Text("inf"), "column `x`: `inf` is not a number");
        check("float64", Value::Bool(true), "column `x`: `true` is not a number");
        check("int64", Value::Text("1.5"), "column `x`: `1.5` is not a whole number");
        check("int64", Value::Text("9223372036854775808"), "is not a whole number");
        check("bool", Value::Text("maybe"), "column `x`: `maybe` is not true or false");
        check("timestamp", Value::Text("soon"), "column `x`: `soon` is not a time");
    }
}
