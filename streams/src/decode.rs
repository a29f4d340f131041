//! Events as clients send them become Arrow columns, without a tree in between.
//!
//! A bad event never takes the good ones beside it along: it is reported by its index and left out.
//! Usual lines are read by the scanner in `scan`; whatever it does not take is read, or refused with
//! its reason, by the strict reader here.

mod ipc; // Arrow columns
mod scan; // the usual line, in one pass

use crate::schema::{Column, ColumnType, StreamSchema, UnknownFields, timestamp_type};
use arrow::array::{
    ArrayRef, BooleanBuilder, Decimal128Builder, Float64Builder, Int64Builder, RecordBatch, StringBuilder,
    TimestampMicrosecondBuilder,
};
use arrow::compute::kernels::cast_utils::string_to_datetime;
use engine::event::{Micros, Span};
use scan::{Scanned, Scanner};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// How a request carries its events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// One JSON object a line; blank lines are nothing.
    Ndjson,
    /// One JSON object, or an array of them.
    Json,
    /// Arrow IPC stream; columns by name, cast where that loses nothing; those of other names are unknown fields.
    Arrow,
}

/// What an integer `ts` counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TsUnit {
    Seconds,
    #[default]
    Millis,
    Micros,
    Nanos,
}

impl std::str::FromStr for TsUnit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "s" => Ok(TsUnit::Seconds),
            "ms" => Ok(TsUnit::Millis),
            "us" => Ok(TsUnit::Micros),
            "ns" => Ok(TsUnit::Nanos),
            other => Err(format!("ts_unit `{other}` is none of s, ms, us, ns")),
        }
    }
}

impl TsUnit {
    fn micros(self, count: i64) -> Option<i64> {
        match self {
            TsUnit::Seconds => count.checked_mul(1_000_000),
            TsUnit::Millis => count.checked_mul(1_000),
            TsUnit::Micros => Some(count),
            TsUnit::Nanos => Some(count.div_euclid(1_000)),
        }
    }

    /// The same for a count with a fraction.
    fn micros_of(self, count: f64) -> Option<i64> {
        let scale = match self {
            TsUnit::Seconds => 1e6,
            TsUnit::Millis => 1e3,
            TsUnit::Micros => 1.0,
            TsUnit::Nanos => 1e-3,
        };
        let micros = (count * scale).round();
        (micros.abs() < 9.0e18).then_some(micros as i64)
    }
}

/// The start of year 1: no event is dated before it.
pub(crate) const TS_MIN: Micros = Micros(-62_135_596_800_000_000);

/// The bounds events are held to.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// An event time that is a count is refused within this span of 1970, where a count in the wrong unit lands.
    pub wrong_unit: Span,
    /// How far ahead of the time of arrival an event may be dated.
    pub ts_ahead: Span,
    /// Bytes of one event.
    pub event_bytes: usize,
    /// Bytes of an `id`.
    pub id_bytes: usize,
    /// Bytes that the compressed buffers of an Arrow stream may come to, and the text of a column of shared values (a
    /// dictionary, views) once each row has its own.
    pub unpacked_bytes: usize,
    /// The first so many bad events are described; the others are counted.
    pub described: usize,
    /// Called after every [`PAUSE_EVENTS`] events: a place for others to go on.
    pub pause: fn(),
}

/// Events that are decoded in about a tenth of a millisecond.
pub const PAUSE_EVENTS: usize = 1_024;

impl Default for Bounds {
    fn default() -> Self {
        Self {
            wrong_unit: Span::seconds(365 * 86_400),
            ts_ahead: Span::seconds(86_400),
            event_bytes: 1 << 20,
            id_bytes: 128,
            unpacked_bytes: 64 << 20,
            described: 100,
            pause: || (),
        }
    }
}

impl Bounds {
    /// Whether a count this near to 1970 is taken for one in a wrong unit.
    pub(crate) fn may_be_wrong_unit(&self, at: Micros) -> bool {
        at.0.unsigned_abs() < self.wrong_unit.0.unsigned_abs()
    }
}

/// Bytes of a refused event that are kept.
const PAYLOAD_BYTES: usize = 4096;

/// Why one event was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventError {
    /// Place of the event in its request, from 0.
    pub index: usize,
    pub code: &'static str,
    pub detail: String,
    /// The event's text, cut where long; for Arrow input its row as JSON.
    pub payload: String,
}

/// What came of a request: the good events as one batch, and what was wrong with the others.
#[derive(Debug)]
pub struct Decoded {
    pub batch: RecordBatch,
    /// How many events were refused.
    pub rejected: usize,
    /// The first of them.
    pub errors: Vec<EventError>,
}

/// A request of which nothing could be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("the body is empty: send at least one event")]
    Empty,
    #[error("no event could be read: {0}")]
    Unreadable(String),
}

/// Decodes all events of `body`. `now` is the time of arrival, which an event without `ts` gets.
pub fn decode(
    schema: &StreamSchema,
    body: &[u8],
    format: Format,
    unit: TsUnit,
    bounds: &Bounds,
    now: Micros,
) -> Result<Decoded, DecodeError> {
    if format == Format::Arrow {
        return ipc::decode(schema, body, unit, bounds, now);
    }
    let mut rows = Rows::new(schema, unit, *bounds, now, body.len());
    let mut scanner = Scanner::new(schema, unit, *bounds, now);
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    if format == Format::Ndjson {
        let text = std::str::from_utf8(body).ok();
        let mut from = 0;
        for to in memchr::memchr_iter(b'\n', body).chain([body.len()]) {
            let line = match text {
                Some(text) => text.get(from..to),
                None => std::str::from_utf8(&body[from..to]).ok(),
            };
            match line.and_then(|line| scanner.scan(line)) {
                Some(row) => rows.scanned(row),
                None if body[from..to].trim_ascii().is_empty() => {}
                None => rows.event(&body[from..to]),
            }
            from = to + 1;
        }
    } else {
        let mut input = serde_json::Deserializer::from_slice(body);
        let result = Elements(&mut rows, &mut scanner).deserialize(&mut input).and_then(|()| input.end());
        if let Err(error) = result {
            // the body is no JSON as a whole: its elements may still be, each for itself
            let told_apart = rows.index == 0 && each_element(body, |_| {});
            if told_apart {
                each_element(body, |element| rows.event(element));
            } else if rows.index == 0 && !body.trim_ascii().is_empty() {
                return Err(DecodeError::Unreadable(error.to_string()));
            } else {
                rows.malformed(&[], &error);
            }
        }
    }
    if rows.index == 0 {
        return Err(DecodeError::Empty);
    }
    rows.finish()
}

/// The elements of a JSON array, or the one object that is no array.
struct Elements<'a, 's, 'de>(&'a mut Rows<'s>, &'a mut Scanner<'s, 'de>);

impl<'de> Elements<'_, '_, 'de> {
    fn event(&mut self, text: &'de str) {
        match self.1.scan(text) {
            Some(row) => self.0.scanned(row),
            None => self.0.event(text.as_bytes()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Elements<'_, '_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(mut self, input: D) -> Result<(), D::Error> {
        let raw = <&RawValue as serde::Deserialize>::deserialize(input)?.get();
        if !raw.starts_with('[') {
            self.event(raw);
            return Ok(());
        }
        let mut elements = serde_json::Deserializer::from_str(raw);
        elements.deserialize_seq(self).map_err(D::Error::custom)
    }
}

impl<'de> Visitor<'de> for Elements<'_, '_, 'de> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event or an array of events")
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut elements: A) -> Result<(), A::Error> {
        while let Some(element) = elements.next_element::<&RawValue>()? {
            self.event(element.get());
        }
        Ok(())
    }
}

/// Hands over the elements of an array, told apart by brackets, quotes and commas alone; false where those do not match
/// up, which shows only once the elements before have been handed over.
fn each_element<'a>(body: &'a [u8], mut take: impl FnMut(&'a [u8])) -> bool {
    let inner = body.trim_ascii().strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]"));
    let Some(inner) = inner else { return false };
    let (mut from, mut closing) = (0, Vec::new());
    let (mut in_string, mut escaped) = (false, false);
    for (at, byte) in inner.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' => closing.push(b'}'),
            b'[' => closing.push(b']'),
            b'}' | b']' if closing.pop() != Some(*byte) => return false,
            b',' if closing.is_empty() => {
                take(inner[from..at].trim_ascii());
                from = at + 1;
            }
            _ => {}
        }
    }
    take(inner[from..].trim_ascii());
    closing.is_empty() && !in_string
}

/// A value of an event on its way into a column.
enum Cell<'de> {
    Missing,
    Null,
    Text(Cow<'de, str>),
    Int(i64),
    Float(f64),
    Decimal(i128),
    Bool(bool),
}

/// The columns as they grow, and the event being read.
struct Rows<'s> {
    schema: &'s StreamSchema,
    unit: TsUnit,
    bounds: Bounds,
    now: Micros,
    ts: TimestampMicrosecondBuilder,
    id: StringBuilder,
    columns: Vec<Growing>,
    extra: StringBuilder,
    index: usize,
    rejected: usize,
    errors: Vec<EventError>,
}

enum Growing {
    Text(StringBuilder),
    Int(Int64Builder),
    Float(Float64Builder),
    Decimal(Decimal128Builder),
    Bool(BooleanBuilder),
    Time(TimestampMicrosecondBuilder),
}

impl Growing {
    fn new(kind: ColumnType, rows: usize) -> Growing {
        match kind {
            ColumnType::Utf8 | ColumnType::Json => Growing::Text(StringBuilder::with_capacity(rows, rows * 8)),
            ColumnType::Int64 => Growing::Int(Int64Builder::with_capacity(rows)),
            ColumnType::Float64 => Growing::Float(Float64Builder::with_capacity(rows)),
            ColumnType::Decimal(..) => {
                Growing::Decimal(Decimal128Builder::with_capacity(rows).with_data_type(kind.arrow()))
            }
            ColumnType::Bool => Growing::Bool(BooleanBuilder::with_capacity(rows)),
            ColumnType::Timestamp => {
                Growing::Time(TimestampMicrosecondBuilder::with_capacity(rows).with_data_type(timestamp_type()))
            }
        }
    }

    fn push(&mut self, cell: &Cell<'_>) {
        match (self, cell) {
            (Growing::Text(b), Cell::Text(text)) => b.append_value(text),
            (Growing::Text(b), _) => b.append_null(),
            (Growing::Int(b), Cell::Int(value)) => b.append_value(*value),
            (Growing::Int(b), _) => b.append_null(),
            (Growing::Float(b), Cell::Float(value)) => b.append_value(*value),
            (Growing::Float(b), _) => b.append_null(),
            (Growing::Decimal(b), Cell::Decimal(value)) => b.append_value(*value),
            (Growing::Decimal(b), _) => b.append_null(),
            (Growing::Bool(b), Cell::Bool(value)) => b.append_value(*value),
            (Growing::Bool(b), _) => b.append_null(),
            (Growing::Time(b), Cell::Int(value)) => b.append_value(*value),
            (Growing::Time(b), _) => b.append_null(),
        }
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Growing::Text(b) => Arc::new(b.finish()),
            Growing::Int(b) => Arc::new(b.finish()),
            Growing::Float(b) => Arc::new(b.finish()),
            Growing::Decimal(b) => Arc::new(b.finish()),
            Growing::Bool(b) => Arc::new(b.finish()),
            Growing::Time(b) => Arc::new(b.finish()),
        }
    }
}

/// A refusal on its way out of serde: code and detail joined, since serde errors are text.
const MARK: char = '\u{1}';

fn refuse<E: serde::de::Error>(code: &'static str, detail: impl fmt::Display) -> E {
    E::custom(format_args!("{MARK}{code}{MARK}{detail}"))
}

/// The codes of refused events, as clients see them.
const CODES: [&str; 10] = [
    "malformed_json",
    "not_an_object",
    "missing_column",
    "wrong_type",
    "not_finite",
    "ts_out_of_range",
    "bad_id",
    "unknown_field",
    "duplicate_field",
    "event_too_large",
];

impl<'s> Rows<'s> {
    fn new(schema: &'s StreamSchema, unit: TsUnit, bounds: Bounds, now: Micros, bytes: usize) -> Self {
        let rows = bytes / 96 + 1; // a guess that saves most growth
        Self {
            schema,
            unit,
            bounds,
            now,
            ts: TimestampMicrosecondBuilder::with_capacity(rows).with_data_type(timestamp_type()),
            id: StringBuilder::new(),
            columns: schema.columns.iter().map(|column| Growing::new(column.kind, rows)).collect(),
            extra: StringBuilder::new(),
            index: 0,
            rejected: 0,
            errors: Vec::new(),
        }
    }

    /// Takes in an event that the scanner read.
    fn scanned(&mut self, row: Scanned<'_, '_>) {
        self.append(row.ts, row.id, row.cells, row.extra);
        self.next();
    }

    /// An event is done.
    fn next(&mut self) {
        self.index += 1;
        if self.index.is_multiple_of(PAUSE_EVENTS) {
            (self.bounds.pause)();
        }
    }

    fn append(&mut self, ts: Micros, id: Option<&str>, cells: &[Cell<'_>], extra: Option<&str>) {
        self.ts.append_value(ts.0);
        self.id.append_option(id);
        for (column, cell) in self.columns.iter_mut().zip(cells) {
            column.push(cell);
        }
        self.extra.append_option(extra);
    }

    /// Reads one event strictly; a bad one leaves the columns as they were.
    fn event(&mut self, text: &[u8]) {
        if text.len() > self.bounds.event_bytes {
            let detail = format!(
                "the event has {} bytes, more than limits.event_bytes = {}",
                text.len(),
                self.bounds.event_bytes
            );
            self.reject("event_too_large", detail, text);
            self.next();
            return;
        }
        let mut input = serde_json::Deserializer::from_slice(text);
        let row = Event { rows: self }.deserialize(&mut input).and_then(|row| input.end().map(|()| row));
        match row {
            Ok(row) => self.append(row.ts, row.id.as_deref(), &row.cells, row.extra.as_deref()),
            Err(error) => self.malformed(text, &error),
        }
        self.next();
    }

    fn malformed(&mut self, text: &[u8], error: &serde_json::Error) {
        let message = error.to_string();
        let mut parts = message.splitn(3, MARK);
        if let (Some(_), Some(code), Some(detail)) = (parts.next(), parts.next(), parts.next())
            && let Some(code) = CODES.iter().find(|known| **known == code)
        {
            // serde_json adds the place behind its own and custom messages alike
            let detail = detail.rsplit_once(" at line ").map_or(detail, |(detail, _)| detail);
            return self.reject(code, detail.to_owned(), text);
        }
        if message.starts_with("number out of range") {
            return self.reject("not_finite", "a number is too large for a double".to_owned(), text);
        }
        if error.is_data() && message.contains("expected an event") {
            return self.reject("not_an_object", "an event is a JSON object".to_owned(), text);
        }
        let at = text.get(error.column().saturating_sub(1)..).unwrap_or_default();
        let at = at.strip_prefix(b"-").unwrap_or(at);
        if [&b"NaN"[..], b"Infinity", b"inf", b"nan"].iter().any(|word| at.starts_with(word)) {
            return self.reject(
                "not_finite",
                format!("NaN and Infinity are no JSON numbers (column {})", error.column()),
                text,
            );
        }
        let message = message.replace("line 1 column", "column");
        self.reject("malformed_json", message, text);
    }

    fn reject(&mut self, code: &'static str, detail: String, text: &[u8]) {
        self.rejected += 1;
        if self.errors.len() < self.bounds.described {
            let payload = String::from_utf8_lossy(&text[..text.len().min(PAYLOAD_BYTES)]).into_owned();
            self.errors.push(EventError { index: self.index, code, detail, payload });
        }
    }

    fn check_ts<E: serde::de::Error>(&self, at: Instant, what: &str) -> Result<Micros, E> {
        check_ts(at.micros, at.is_count, &self.bounds, self.now)
            .map_err(|detail| refuse("ts_out_of_range", format_args!("{what}: {detail}")))
    }

    fn finish(mut self) -> Result<Decoded, DecodeError> {
        let mut columns: Vec<ArrayRef> = vec![Arc::new(self.ts.finish()), Arc::new(self.id.finish())];
        columns.extend(self.columns.iter_mut().map(Growing::finish));
        columns.push(Arc::new(self.extra.finish()));
        let batch = RecordBatch::try_new(self.schema.arrow().clone(), columns)
            .map_err(|error| DecodeError::Unreadable(error.to_string()))?;
        Ok(Decoded { batch, rejected: self.rejected, errors: self.errors })
    }
}

/// The event time, where it is within bounds; `is_count`: it came as a number, not as text with a date.
fn check_ts(at: i64, is_count: bool, bounds: &Bounds, now: Micros) -> Result<Micros, String> {
    let at = Micros(at);
    let say = |at: Micros| {
        chrono::DateTime::from_timestamp_micros(at.0).map_or_else(|| format!("{} µs", at.0), |t| t.to_rfc3339())
    };
    if at < TS_MIN {
        return Err(format!("{} is before {}; is ts_unit right?", say(at), say(TS_MIN)));
    }
    if is_count && bounds.may_be_wrong_unit(at) {
        return Err(format!("{} is within a year of 1970; is ts_unit right? If so, write it as RFC 3339", say(at)));
    }
    if at > now.plus(bounds.ts_ahead) {
        let hours = bounds.ts_ahead.0 / 3_600_000_000;
        return Err(format!("{} is more than {hours} h ahead of the server's clock; is ts_unit right?", say(at)));
    }
    Ok(at)
}

/// A good event.
struct Row<'de> {
    ts: Micros,
    id: Option<Cow<'de, str>>,
    cells: Vec<Cell<'de>>,
    extra: Option<String>,
}

struct Event<'a, 's> {
    rows: &'a Rows<'s>,
}

impl<'de> DeserializeSeed<'de> for Event<'_, '_> {
    type Value = Row<'de>;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Row<'de>, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Event<'_, '_> {
    type Value = Row<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Row<'de>, A::Error> {
        let rows = self.rows;
        let columns = &rows.schema.columns;
        let mut cells: Vec<Cell<'de>> = Vec::with_capacity(columns.len());
        cells.resize_with(columns.len(), || Cell::Missing);
        let (mut ts, mut id, mut extra) = (None, None, Vec::<(Cow<'de, str>, &'de RawValue)>::new());
        let mut guess = 0; // producers repeat the order of fields
        while let Some(name) = fields.next_key_seed(Name)? {
            let at = match columns.get(guess) {
                Some(column) if *column.name == *name => Some(guess),
                _ => columns.iter().position(|column| *column.name == *name),
            };
            if let Some(at) = at {
                if !matches!(cells[at], Cell::Missing) {
                    return Err(refuse("duplicate_field", format_args!("field `{name}` stands twice")));
                }
                cells[at] = fields.next_value_seed(Typed { rows, column: &columns[at] })?;
                guess = at + 1;
            } else if &*name == "ts" && ts.is_none() {
                ts = Some(fields.next_value_seed(Time { rows, name: "ts" })?);
            } else if &*name == "id" && id.is_none() {
                id = Some(fields.next_value_seed(Id { most: rows.bounds.id_bytes })?);
            } else if &*name == "ts" || &*name == "id" || extra.iter().any(|(known, _)| *known == name) {
                return Err(refuse("duplicate_field", format_args!("field `{name}` stands twice")));
            } else {
                match rows.schema.unknown_fields {
                    UnknownFields::Keep => {
                        let value: &RawValue = fields.next_value()?;
                        check_depth(value)?;
                        extra.push((name, value));
                    }
                    UnknownFields::Ignore => _ = fields.next_value::<IgnoredAny>()?,
                    UnknownFields::Reject => {
                        let stream = &rows.schema.stream;
                        return Err(refuse("unknown_field", format_args!("`{stream}` has no column `{name}`")));
                    }
                }
            }
        }
        for (cell, column) in cells.iter().zip(columns) {
            if !column.nullable && matches!(cell, Cell::Missing | Cell::Null) {
                let name = &column.name;
                let detail = format_args!("column `{name}` ({}) is required", column.kind);
                return Err(refuse("missing_column", detail));
            }
        }
        let ts = match ts.flatten() {
            Some(at) => rows.check_ts(at, "ts")?,
            None => rows.now,
        };
        Ok(Row { ts, id: id.flatten(), cells, extra: join(&extra) })
    }
}

/// How deeply a JSON value may be nested: no reader of it may overflow its stack.
const DEPTH_MAX: usize = 64;

fn check_depth<E: serde::de::Error>(value: &RawValue) -> Result<(), E> {
    let depth = depth_of(value.get());
    if depth > DEPTH_MAX {
        let detail = format_args!("a value is nested {depth} deep; {DEPTH_MAX} is the limit");
        return Err(refuse("malformed_json", detail));
    }
    Ok(())
}

/// How deeply a JSON value is nested.
fn depth_of(json: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth -= 1,
            _ => {}
        }
    }
    deepest
}

/// Fields without a column, as one JSON object.
fn join(fields: &[(Cow<'_, str>, &RawValue)]) -> Option<String> {
    if fields.is_empty() {
        return None;
    }
    let mut text = String::from("{");
    for (at, (name, value)) in fields.iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        text.push_str(&serde_json::to_string(name).expect("a string becomes JSON"));
        text.push(':');
        text.push_str(value.get());
    }
    text.push('}');
    Some(text)
}

/// A field's name, borrowed unless it is escaped.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Cow<'de, str>;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Name {
    type Value = Cow<'de, str>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }
    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }
    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

/// The idempotency key; null is none.
struct Id {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Id {
    type Value = Option<Cow<'de, str>>;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl Id {
    fn check<E: serde::de::Error>(&self, text: &str) -> Result<(), E> {
        if text.is_empty() || text.len() > self.most || text.contains('\0') {
            return Err(refuse(
                "bad_id",
                format_args!("id has {} bytes; it takes 1 to {} and no NUL", text.len(), self.most),
            ));
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for Id {
    type Value = Option<Cow<'de, str>>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string as id")
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        self.check(text).map(|()| Some(Cow::Borrowed(text)))
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        self.check(text).map(|()| Some(Cow::Owned(text.to_owned())))
    }
    // exchanges number their trades: an integer is an id as good as its text
    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(Cow::Owned(value.to_string())))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(Cow::Owned(value.to_string())))
    }
}

/// A time, and whether it came as a number.
struct Instant {
    micros: i64,
    is_count: bool,
}

/// An instant: an integer in the request's unit, or RFC 3339. Null is none.
struct Time<'a, 's> {
    rows: &'a Rows<'s>,
    name: &'a str,
}

impl<'de> DeserializeSeed<'de> for Time<'_, '_> {
    type Value = Option<Instant>;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Time<'_, '_> {
    type Value = Option<Instant>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an integer or an RFC 3339 time in `{}`", self.name)
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<Self::Value, E> {
        let micros = self.rows.unit.micros(count);
        let detail = || format!("{}: {count} is beyond every calendar; is ts_unit right?", self.name);
        micros.map(counted).ok_or_else(|| refuse("ts_out_of_range", detail()))
    }
    fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<Self::Value, E> {
        self.visit_i64(i64::try_from(count).unwrap_or(i64::MAX))
    }
    fn visit_f64<E: serde::de::Error>(self, count: f64) -> Result<Self::Value, E> {
        let detail = || format!("{}: {count} is beyond every calendar", self.name);
        self.rows.unit.micros_of(count).map(counted).ok_or_else(|| refuse("ts_out_of_range", detail()))
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        match string_to_datetime(&chrono::Utc, text) {
            Ok(at) => Ok(Some(Instant { micros: at.timestamp_micros(), is_count: false })),
            Err(_) => {
                let detail = format_args!("{}: `{}` is neither RFC 3339 nor an integer", self.name, short(text));
                Err(refuse("wrong_type", detail))
            }
        }
    }
}

fn counted(micros: i64) -> Option<Instant> {
    Some(Instant { micros, is_count: true })
}

fn short(text: &str) -> String {
    text.chars().take(60).collect()
}

/// A value of the type its column has.
struct Typed<'a, 's> {
    rows: &'a Rows<'s>,
    column: &'a Column,
}

impl<'de> DeserializeSeed<'de> for Typed<'_, '_> {
    type Value = Cell<'de>;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        match self.column.kind {
            ColumnType::Json => {
                let raw = <&RawValue as serde::Deserialize>::deserialize(input)?;
                check_depth(raw)?;
                Ok(if raw.get() == "null" { Cell::Null } else { Cell::Text(Cow::Borrowed(raw.get())) })
            }
            ColumnType::Timestamp => {
                let name = &self.column.name;
                Ok(Time { rows: self.rows, name }.deserialize(input)?.map_or(Cell::Null, |at| Cell::Int(at.micros)))
            }
            ColumnType::Decimal(precision, scale) => {
                let raw = <&RawValue as serde::Deserialize>::deserialize(input)?.get();
                decimal(raw, precision, scale)
                    .map_err(|detail| refuse("wrong_type", format_args!("column `{}`: {detail}", self.column.name)))
            }
            _ => input.deserialize_any(self),
        }
    }
}

/// The exact decimal in a JSON number or in a string.
fn decimal<'de>(raw: &str, precision: u8, scale: i8) -> Result<Cell<'de>, String> {
    if raw == "null" {
        return Ok(Cell::Null);
    }
    let text = raw.trim_matches('"');
    let wrong = || format!("`{}` is no decimal({precision},{scale})", short(raw));
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let fraction = digits.split_once('.').map_or(0, |(_, fraction)| fraction.trim_end_matches('0').len());
    if !plain || fraction > scale as usize {
        return Err(wrong());
    }
    arrow::compute::kernels::cast_utils::parse_decimal::<arrow::datatypes::Decimal128Type>(text, precision, scale)
        .map(Cell::Decimal)
        .map_err(|_| wrong())
}

impl Typed<'_, '_> {
    fn wrong<T, E: serde::de::Error>(&self, found: &str) -> Result<T, E> {
        let Column { name, kind, .. } = self.column;
        Err(refuse("wrong_type", format_args!("column `{name}` takes {kind}, this is {found}")))
    }

    fn takes_text<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.column.kind == ColumnType::Utf8 { Ok(()) } else { self.wrong("a string") }
    }
}

impl<'de> Visitor<'de> for Typed<'_, '_> {
    type Value = Cell<'de>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in column `{}`", self.column.kind, self.column.name)
    }
    fn visit_unit<E>(self) -> Result<Cell<'de>, E> {
        Ok(Cell::Null)
    }
    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Cell<'de>, E> {
        if self.column.kind == ColumnType::Bool { Ok(Cell::Bool(value)) } else { self.wrong("a boolean") }
    }
    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Cell<'de>, E> {
        match self.column.kind {
            ColumnType::Int64 => Ok(Cell::Int(value)),
            ColumnType::Float64 => Ok(Cell::Float(value as f64)),
            _ => self.wrong("a number"),
        }
    }
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Cell<'de>, E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            Err(_) if self.column.kind == ColumnType::Float64 => Ok(Cell::Float(value as f64)),
            Err(_) => self.wrong("a number beyond int64"),
        }
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Cell<'de>, E> {
        match self.column.kind {
            ColumnType::Float64 if value.is_finite() => Ok(Cell::Float(value)),
            ColumnType::Float64 => {
                Err(refuse("not_finite", format_args!("column `{}` takes finite numbers", self.column.name)))
            }
            ColumnType::Int64 if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 => {
                Ok(Cell::Int(value as i64))
            }
            ColumnType::Int64 => self.wrong("a number with a fraction, or one a double cannot hold"),
            _ => self.wrong("a number"),
        }
    }
    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'de str) -> Result<Cell<'de>, E> {
        self.takes_text()?;
        Ok(Cell::Text(Cow::Borrowed(text)))
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Cell<'de>, E> {
        self.takes_text()?;
        // only an escaped string can hold NUL, and no store keeps one
        if text.contains('\0') {
            return self.wrong("a string with a NUL character");
        }
        Ok(Cell::Text(Cow::Owned(text.to_owned())))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Cell<'de>, A::Error> {
        self.wrong("an array")
    }
    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Cell<'de>, A::Error> {
        self.wrong("an object")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::built_in;
    use arrow::array::AsArray;
    use arrow::datatypes::{Int64Type, TimestampMicrosecondType};

    const NOW: Micros = Micros(1_800_000_000_000_000);

    fn trades(body: &str) -> Decoded {
        decode(&built_in()[0], body.as_bytes(), Format::Ndjson, TsUnit::Millis, &Bounds::default(), NOW).unwrap()
    }

    /// The one event's refusal: code, and a part of the detail.
    fn check(event: &str, code: &str, detail: &str) {
        let good = r#"{"symbol":"A","price":1,"qty":2}"#;
        let decoded = trades(&format!("{good}\n{event}\n{good}\n"));
        assert_eq!((decoded.batch.num_rows(), decoded.rejected), (2, 1), "{event}: {:?}", decoded.errors);
        let error = &decoded.errors[0];
        assert_eq!((error.index, error.code), (1, code), "{event}: {}", error.detail);
        assert!(error.detail.contains(detail), "{event}: {}", error.detail);
    }

    #[test]
    fn a_bad_event_is_named_and_the_good_ones_beside_it_are_kept() {
        check(r#"{"symbol":"A","price":1,"#, "malformed_json", "EOF");
        check(r#"[1]"#, "not_an_object", "JSON object");
        check(r#"{"symbol":"A","price":1}"#, "missing_column", "`qty` (float64) is required");
        check(r#"{"symbol":"A","price":null,"qty":1}"#, "missing_column", "`price`");
        check(r#"{"symbol":"A","price":"1","qty":1}"#, "wrong_type", "`price` takes float64, this is a string");
        check(r#"{"symbol":7,"price":1,"qty":1}"#, "wrong_type", "`symbol` takes utf8, this is a number");
        check(r#"{"symbol":"A","price":NaN,"qty":1}"#, "not_finite", "NaN");
        check(r#"{"symbol":"A","price":-Infinity,"qty":1}"#, "not_finite", "Infinity");
        check(r#"{"symbol":"A","price":1e999,"qty":1}"#, "not_finite", "too large");
        check(r#"{"symbol":"A","price":1,"qty":1,"ts":1700000000}"#, "ts_out_of_range", "1970-01-20");
        check(r#"{"symbol":"A","price":1,"qty":1,"ts":-1700000000}"#, "ts_out_of_range", "1969-12-12");
        check(r#"{"symbol":"A","price":1,"qty":1,"ts":"0000-12-31T00:00:00Z"}"#, "ts_out_of_range", "0001-01-01");
        check(r#"{"symbol":"A","price":1,"qty":1,"ts":"9999-12-31T00:00:00Z"}"#, "ts_out_of_range", "ahead");
        check(r#"{"symbol":"A","price":1,"qty":1,"ts":9223372036854775807}"#, "ts_out_of_range", "calendar");
        check(r#"{"symbol":"A","price":1,"qty":1,"ts":"yesterday"}"#, "wrong_type", "RFC 3339");
        check(r#"{"symbol":"A","price":1,"price":2,"qty":1}"#, "duplicate_field", "`price`");
        check(r#"{"symbol":"A","price":1,"qty":1,"x":1,"x":2}"#, "duplicate_field", "`x`");
        check(r#"{"symbol":"A\u0000","price":1,"qty":1}"#, "wrong_type", "NUL");
        check(&format!(r#"{{"symbol":"A","price":1,"qty":1,"id":"{}"}}"#, "x".repeat(129)), "bad_id", "129 bytes");
        let long = format!(r#"{{"symbol":"A","price":1,"qty":1,"note":"{}"}}"#, "x".repeat(1 << 20));
        check(&long, "event_too_large", "limits.event_bytes");
        check(
            &format!(r#"{{"symbol":"A","price":1,"qty":1,"deep":{}1{}}}"#, "[".repeat(500), "]".repeat(500)),
            "malformed_json",
            "nested 500 deep",
        );
        check("{\"symbol\":\"\u{fffd}", "malformed_json", "EOF");
    }

    #[test]
    fn a_bad_element_of_an_array_leaves_the_others() {
        let (good, read) = (r#"{"symbol":"A,]}","price":1,"qty":2}"#, |body: &[u8]| {
            decode(&built_in()[0], body, Format::Json, TsUnit::Millis, &Bounds::default(), NOW)
        });
        for (bad, code) in [
            (&br#"{"symbol":"A","price":NaN,"qty":1}"#[..], "not_finite"),
            (br#"{"symbol":"A","price":-Infinity,"qty":1}"#, "not_finite"),
            (br#"{"symbol":"A" "price":1,"qty":1}"#, "malformed_json"),
            (b"{\"symbol\":\"\xff\",\"price\":1,\"qty\":1}", "malformed_json"),
            (b"", "malformed_json"),
        ] {
            let got = read(&[b" [", good.as_bytes(), b", ", bad, b",", good.as_bytes(), b"]\n"].concat()).unwrap();
            let refused: Vec<_> = got.errors.iter().map(|error| (error.index, error.code)).collect();
            assert_eq!((got.batch.num_rows(), got.rejected), (2, 1), "{:?}", got.errors);
            assert_eq!(refused, [(1, code)]);
            assert_eq!(got.errors[0].payload, String::from_utf8_lossy(bad));
        }
        // where an element ends cannot be said: a repeat of the whole request must not count the first ones twice
        for cut in [format!("[{good},"), format!("[{good},{{\"a\":\"b]"), format!("[{good},{{\"a\":[}}]")] {
            assert!(matches!(read(cut.as_bytes()), Err(DecodeError::Unreadable(_))), "{cut}");
        }
    }

    #[test]
    fn invalid_utf8_is_malformed() {
        let body = b"{\"symbol\":\"\xff\",\"price\":1,\"qty\":1}\n{\"symbol\":\"A\",\"price\":1,\"qty\":1}";
        let got = decode(&built_in()[0], body, Format::Ndjson, TsUnit::Millis, &Bounds::default(), NOW).unwrap();
        assert_eq!((got.batch.num_rows(), got.errors[0].code), (1, "malformed_json"));
    }

    #[test]
    fn columns_are_typed_unknown_fields_kept_and_a_missing_ts_is_the_arrival() {
        let decoded = trades(
            "{\"ts\":1700000000123,\"id\":\"a\",\"symbol\":\"A\",\"price\":1.5,\"qty\":2,\"x\":{\"y\":[1, 2]},\"z\":null}\r\n\n{\"qty\":1,\"price\":2,\"symbol\":\"B\",\"id\":17}",
        );
        let batch = &decoded.batch;
        let ts = batch.column(0).as_primitive::<TimestampMicrosecondType>();
        assert_eq!(ts.values(), &[1_700_000_000_123_000, NOW.0]);
        assert_eq!(
            batch.column_by_name("id").unwrap().as_string::<i32>().iter().collect::<Vec<_>>(),
            [Some("a"), Some("17")]
        );
        let extra = batch.column_by_name("extra").unwrap().as_string::<i32>();
        assert_eq!(extra.iter().collect::<Vec<_>>(), [Some(r#"{"x":{"y":[1, 2]},"z":null}"#), None]);
    }

    #[test]
    fn a_written_date_may_be_before_1970_and_a_count_too_unless_it_looks_like_another_unit() {
        let dated = |ts: &str| format!(r#"{{"symbol":"A","price":1,"qty":1,"ts":{ts}}}"#);
        for (ts, micros) in [
            (r#""1970-01-05T00:00:00Z""#, 345_600_000_000),
            (r#""1970-01-01T00:00:00Z""#, 0),
            (r#""1969-12-31T23:59:59.999999Z""#, -1),
            (r#""1931-05-06T00:00:00Z""#, -1_219_968_000_000_000),
            (r#""0001-01-01T00:00:00Z""#, TS_MIN.0),
            ("-1219968000000", -1_219_968_000_000_000),
        ] {
            let decoded = trades(&dated(ts));
            assert_eq!(decoded.errors, []);
            assert_eq!(decoded.batch.column(0).as_primitive::<TimestampMicrosecondType>().values(), &[micros], "{ts}");
        }
    }

    #[test]
    fn an_array_an_object_and_an_arrow_stream_carry_the_same_events() {
        let schema = &built_in()[0];
        let read = |body: &[u8], format| decode(schema, body, format, TsUnit::Micros, &Bounds::default(), NOW);
        let object = br#" {"ts":1700000000123456,"symbol":"A","price":1.5,"qty":2} "#;
        let one = read(object, Format::Json).unwrap().batch;
        let array = [b"[", object.as_slice(), b",", object, b"]"].concat();
        assert_eq!(read(&array, Format::Json).unwrap().batch.slice(1, 1), one);
        let mut ipc = arrow::ipc::writer::StreamWriter::try_new(Vec::new(), one.schema_ref()).unwrap();
        ipc.write(&one).unwrap();
        assert_eq!(read(&ipc.into_inner().unwrap(), Format::Arrow).unwrap().batch, one);
        assert!(matches!(read(b"[]", Format::Json), Err(DecodeError::Empty)));
        assert!(matches!(read(b"{", Format::Json), Err(DecodeError::Unreadable(_))));
        assert!(matches!(read(b"nonsense", Format::Arrow), Err(DecodeError::Unreadable(_))));
    }

    #[test]
    fn decimals_and_integers_are_exact_or_refused() {
        let columns = r#"[{"name":"amount","type":"decimal(10,2)"},{"name":"n","type":"int64"},{"name":"at","type":"timestamp"}]"#;
        let schema = StreamSchema::new(
            "fin.docs".parse().unwrap(),
            serde_json::from_str(columns).unwrap(),
            UnknownFields::Reject,
        )
        .unwrap();
        let body = concat!(
            "{\"amount\":12.34,\"n\":9007199254740993,\"at\":\"2024-01-01T00:00:00Z\"}\n",
            "{\"amount\":\"-0.5\",\"n\":3.0}\n{\"amount\":1.005}\n{\"amount\":\"x\"}\n{\"n\":1.5}\n{\"other\":1}"
        );
        let got = decode(&schema, body.as_bytes(), Format::Ndjson, TsUnit::Millis, &Bounds::default(), NOW).unwrap();
        assert_eq!(got.batch.column(2).as_primitive::<arrow::datatypes::Decimal128Type>().values(), &[1234, -50]);
        assert_eq!(got.batch.column(3).as_primitive::<Int64Type>().values(), &[9_007_199_254_740_993, 3]);
        let codes: Vec<_> = got.errors.iter().map(|e| (e.index, e.code)).collect();
        assert_eq!(codes, [(2, "wrong_type"), (3, "wrong_type"), (4, "wrong_type"), (5, "unknown_field")]);
    }

    /// The published JSON parsing cases: whatever the bytes, an answer and no panic; what must be
    /// refused as JSON is refused here too.
    #[test]
    fn the_json_parsing_suite_gives_an_error_and_never_a_panic() {
        let path = "../../shared/data/truth/json_parsing/cases.ndjson.zst";
        let Ok(file) = std::fs::File::open(path) else {
            println!("skipped: the shared data folder is not beside the project");
            return;
        };
        let text = std::io::read_to_string(zstd::Decoder::new(file).unwrap()).unwrap();
        let mut seen = 0;
        for line in text.lines() {
            let case: serde_json::Value = serde_json::from_str(line).unwrap();
            let bytes = base64_decode(case["base64"].as_str().unwrap());
            for wrap in [false, true] {
                let body = if wrap {
                    [b"{\"symbol\":\"A\",\"price\":1,\"qty\":1,\"x\":", &bytes[..], b"}"].concat()
                } else {
                    bytes.clone()
                };
                let got = decode(&built_in()[0], &body, Format::Json, TsUnit::Millis, &Bounds::default(), NOW);
                if wrap && case["expect"] == "reject" && !body.contains(&b',') {
                    assert!(!got.is_ok_and(|d| d.batch.num_rows() > 0), "{}", case["name"]);
                }
            }
            seen += 1;
        }
        assert!(seen > 200, "{seen} cases");
    }

    pub(super) fn base64_decode(text: &str) -> Vec<u8> {
        let value =
            |b: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|c| *c == b);
        let mut out = Vec::new();
        let (mut bits, mut count) = (0u32, 0);
        for digit in text.bytes().filter_map(value) {
            bits = (bits << 6) | digit as u32;
            count += 6;
            if count >= 8 {
                count -= 8;
                out.push((bits >> count) as u8);
            }
        }
        out
    }
}
