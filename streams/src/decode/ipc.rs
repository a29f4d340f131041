//! Events that come as Arrow columns. Columns are cast whole; what one cell breaks costs its row alone.

use super::{Bounds, DEPTH_MAX, DecodeError, Decoded, EventError, PAYLOAD_BYTES, TsUnit, check_ts, depth_of, short};
use crate::foreign::caught;
use crate::schema::{Column, ColumnType, RESERVED, StreamSchema, UnknownFields, timestamp_type};
use arrow::array::{
    Array, ArrayData, ArrayRef, AsArray, BooleanArray, Float64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray, new_null_array,
};
use arrow::compute::kernels::cmp::neq;
use arrow::compute::{CastOptions, can_cast_types, cast_with_options, concat_batches, filter_record_batch, nullif};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, TimestampMicrosecondType};
use arrow::error::ArrowError;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::{CompressionType, root_as_message};
use arrow::json::writer::{EncoderOptions, NullableEncoder, make_encoder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use engine::event::Micros;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A cell that cannot be cast becomes NULL, and is told from one that was NULL.
const CAST: CastOptions<'static> = CastOptions { safe: true, format_options: FormatOptions::new() };

/// However short a body is, so many values may be in it: compressed ones of a column take next to nothing.
const VALUES_MIN: usize = 1 << 20;

/// Decodes the record batches of an Arrow IPC stream.
pub(super) fn decode(
    schema: &StreamSchema,
    body: &[u8],
    unit: TsUnit,
    bounds: &Bounds,
    now: Micros,
) -> Result<Decoded, DecodeError> {
    // the crate's reader panics on a body that lies about its buffers; a fuzzer found it
    caught(|| decode_whole(schema, body, unit, bounds, now)).unwrap_or_else(|| {
        Err(DecodeError::Unreadable("the lengths in the Arrow stream do not fit its buffers".to_owned()))
    })
}

fn decode_whole(
    schema: &StreamSchema,
    body: &[u8],
    unit: TsUnit,
    bounds: &Bounds,
    now: Micros,
) -> Result<Decoded, DecodeError> {
    let input = read(body, bounds.unpacked_bytes)?;
    let rows = input.num_rows();
    let given = |name: &str| input.column_by_name(name);
    let mut checks = Checks { verdicts: Verdicts::new(rows, bounds.described), bytes: vec![0; rows], bounds, now };
    let ts = checks.times(given("ts"), unit);
    let id = match given("id") {
        Some(id) => checks.ids(id).map_err(unreadable)?,
        None => new_null_array(&DataType::Utf8, rows),
    };
    let mut columns: Vec<ArrayRef> = vec![ts, id];
    for column in &schema.columns {
        let cells = match given(&column.name) {
            Some(cells) => checks.cells(column, cells, unit).map_err(unreadable)?,
            None => new_null_array(&column.kind.arrow(), rows),
        };
        if !column.nullable {
            checks.required(column, &cells);
        }
        columns.push(cells);
    }
    columns.push(checks.extra(schema, &input).map_err(unreadable)?);
    checks.sizes();
    let verdicts = checks.verdicts;
    let errors = verdicts.described(&input);
    let nullable: Vec<Field> =
        schema.arrow().fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
    let loose = RecordBatch::try_new(Arc::new(Schema::new(nullable)), columns).map_err(unreadable)?;
    let rejected = verdicts.good.iter().filter(|good| !**good).count();
    let kept = filter_record_batch(&loose, &BooleanArray::from(verdicts.good)).map_err(unreadable)?;
    let batch = RecordBatch::try_new(schema.arrow().clone(), kept.columns().to_vec()).map_err(unreadable)?;
    Ok(Decoded { batch, rejected, errors })
}

fn unreadable(error: ArrowError) -> DecodeError {
    DecodeError::Unreadable(error.to_string())
}

/// All rows of the stream as one batch whose columns are no larger than the body that brought them.
fn read(body: &[u8], unpacked_most: usize) -> Result<RecordBatch, DecodeError> {
    let refuse = |detail: String| Err(DecodeError::Unreadable(detail));
    check_frames(body, unpacked_most).map_err(DecodeError::Unreadable)?;
    let reader = StreamReader::try_new(body, None).map_err(unreadable)?;
    let schema = reader.schema();
    let mut names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return refuse(format!("column `{}` stands twice", twice[0]));
    }
    let (mut batches, mut rows, most) = (Vec::new(), 0_usize, body.len().max(VALUES_MIN));
    for batch in reader {
        let batch = batch.map_err(unreadable)?;
        rows = rows.saturating_add(batch.num_rows());
        if rows > most {
            return refuse(format!("{rows} or more rows in {} bytes are no events", body.len()));
        }
        for (field, column) in schema.fields().iter().zip(batch.columns()) {
            if let Some(what) = swollen(&column.to_data(), most, true) {
                return refuse(format!("column `{}`: {what}", field.name()));
            }
        }
        batches.push(batch);
    }
    if rows == 0 {
        return Err(DecodeError::Empty);
    }
    let input = concat_batches(&schema, &batches).map_err(unreadable)?;
    for (field, column) in schema.fields().iter().zip(input.columns()) {
        if shared_text(column).map_err(unreadable)? > unpacked_most {
            return refuse(format!(
                "column `{}` is more than {unpacked_most} bytes of text, the limit for what is decompressed; send less at \
                 a time",
                field.name()
            ));
        }
    }
    Ok(input)
}

/// Refuses a stream that announces more than it brings: its reader makes room first and looks then.
fn check_frames(mut rest: &[u8], unpacked_most: usize) -> Result<(), String> {
    let mut unpacked = 0_usize;
    let cut = || "the Arrow stream ends inside a message".to_owned();
    while let Some(word) = rest.split_off(..4) {
        // since version 0.15 of the format a marker stands in front of the length
        let word = if word == [0xff; 4] { rest.split_off(..4).ok_or_else(cut)? } else { word };
        let length = u32::from_le_bytes(word.try_into().expect("four bytes")) as usize;
        if length == 0 {
            break;
        }
        // copied, since it is read in place and must be aligned
        let metadata = rest.split_off(..length).ok_or_else(cut)?.to_vec();
        let message = root_as_message(&metadata).map_err(|error| error.to_string())?;
        let bytes = usize::try_from(message.bodyLength()).map_err(|_| cut())?;
        let content = rest.split_off(..bytes).ok_or_else(cut)?;
        let batch = message.header_as_record_batch().or_else(|| message.header_as_dictionary_batch()?.data());
        let Some(batch) = batch else { continue };
        let compression = batch.compression().map(|compression| compression.codec());
        if compression.is_some_and(|codec| codec != CompressionType::ZSTD) {
            return Err("its buffers are compressed with LZ4; send them plain or as Zstandard".to_owned());
        }
        for buffer in batch.buffers().iter().flatten() {
            let [at, length] =
                [buffer.offset(), buffer.length()].map(|place| usize::try_from(place).unwrap_or(usize::MAX));
            let bytes = content.get(at..).and_then(|bytes| bytes.get(..length)).ok_or_else(cut)?;
            if let (Some(_), Some(announced)) = (compression, bytes.first_chunk::<8>()) {
                unpacked = unpacked.saturating_add(usize::try_from(i64::from_le_bytes(*announced)).unwrap_or(0));
            }
        }
        if unpacked > unpacked_most {
            return Err(format!(
                "it unpacks to more than {unpacked_most} bytes, the limit for what is decompressed; send less at a time"
            ));
        }
    }
    Ok(())
}

/// Why an array may be many times what came, which sharing and empty values make possible: `most` values may be in it.
fn swollen(array: &ArrayData, most: usize, outermost: bool) -> Option<String> {
    let kind = array.data_type();
    let shared = match kind {
        DataType::RunEndEncoded(..) | DataType::ListView(_) | DataType::LargeListView(_) | DataType::Union(..) => true,
        DataType::Null | DataType::Dictionary(..) | DataType::Utf8View | DataType::BinaryView => !outermost,
        _ => false,
    };
    if shared {
        return Some(format!("{kind} is not taken here; send plain values"));
    }
    if array.len() > most {
        return Some(format!("{} values are more than {most}, one for each byte of the body", array.len()));
    }
    if let DataType::Dictionary(_, values) = kind {
        return values.is_nested().then(|| format!("{kind} is not taken here; send plain values"));
    }
    array.child_data().iter().find_map(|child| swollen(child, most, false))
}

/// Bytes of text of a column whose rows share it.
fn shared_text(column: &ArrayRef) -> Result<usize, ArrowError> {
    Ok(match column.data_type() {
        DataType::Utf8View => column.as_string_view().lengths().map(|bytes| bytes as usize).sum(),
        DataType::BinaryView => column.as_binary_view().lengths().map(|bytes| bytes as usize).sum(),
        DataType::Dictionary(..) if !column.is_empty() => {
            let shared = column.as_any_dictionary();
            let Ok(values) = cast_with_options(shared.values(), &DataType::Utf8, &CAST) else { return Ok(0) };
            let (values, keys) = (values.as_string::<i32>(), shared.normalized_keys());
            if values.is_empty() {
                return Ok(0);
            }
            keys.into_iter().map(|key| values.value_length(key) as usize).sum()
        }
        _ => 0,
    })
}

/// Which rows are good, and what is wrong with the first ones that are not.
struct Verdicts {
    good: Vec<bool>,
    bad: BTreeMap<usize, (&'static str, String)>,
    /// The most that are described.
    most: usize,
}

impl Verdicts {
    fn new(rows: usize, most: usize) -> Verdicts {
        Verdicts { good: vec![true; rows], bad: BTreeMap::new(), most }
    }

    /// A row's first refusal counts.
    fn refuse(&mut self, row: usize, code: &'static str, detail: impl FnOnce() -> String) {
        if !std::mem::replace(&mut self.good[row], false) {
            return;
        }
        if self.bad.len() < self.most || self.bad.last_key_value().is_some_and(|(last, _)| row < *last) {
            self.bad.insert(row, (code, detail()));
        }
        if self.bad.len() > self.most {
            self.bad.pop_last();
        }
    }

    fn described(&self, input: &RecordBatch) -> Vec<EventError> {
        let options = EncoderOptions::default();
        let mut texts = Texts::default();
        if !self.bad.is_empty() {
            // a column that JSON has no form for is missing from the payload, as its cells are from the event
            texts.columns = (input.schema_ref().fields().iter().zip(input.columns()))
                .filter_map(|(field, column)| Some((field.name(), make_encoder(field, column, &options).ok()?)))
                .collect();
        }
        let error = |(row, (code, detail)): (&usize, &(&'static str, String))| {
            let payload = texts.object(*row).unwrap_or_else(|| "{}".to_owned());
            let payload = payload[..payload.floor_char_boundary(PAYLOAD_BYTES)].to_owned();
            EventError { index: *row, code, detail: detail.clone(), payload }
        };
        self.bad.iter().map(error).collect()
    }
}

/// Columns that are written as members of a JSON object; a NULL is no member.
#[derive(Default)]
struct Texts<'a> {
    columns: Vec<(&'a String, NullableEncoder<'a>)>,
}

impl Texts<'_> {
    fn object(&mut self, row: usize) -> Option<String> {
        let mut out = Vec::new();
        for (name, column) in &mut self.columns {
            if !column.is_null(row) {
                out.push(if out.is_empty() { b'{' } else { b',' });
                out.extend_from_slice(serde_json::to_string(name).expect("a string becomes JSON").as_bytes());
                out.push(b':');
                column.encode(row, &mut out);
            }
        }
        if out.is_empty() {
            return None;
        }
        out.push(b'}');
        Some(String::from_utf8_lossy(&out).into_owned())
    }
}

/// The columns of a request as they are checked.
struct Checks<'a> {
    verdicts: Verdicts,
    /// Bytes of text in each row.
    bytes: Vec<usize>,
    bounds: &'a Bounds,
    now: Micros,
}

impl Checks<'_> {
    /// Refuses the cells that were something and could not be cast.
    fn uncast(&mut self, name: &str, kind: &str, input: &ArrayRef, output: &dyn Array) -> Result<(), ArrowError> {
        let (nulls, options) = (input.logical_nulls(), FormatOptions::new());
        let formatter = ArrayFormatter::try_new(input, &options)?;
        for row in 0..input.len() {
            if output.is_null(row) && nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row)) {
                let found = || formatter.value(row).try_to_string().unwrap_or_default();
                let detail = || format!("column `{name}` takes {kind}, this is `{}`", short(&found()));
                self.verdicts.refuse(row, "wrong_type", detail);
            }
        }
        Ok(())
    }

    fn texts(&mut self, name: &str, column: &StringArray) {
        for (row, text) in column.iter().enumerate() {
            let Some(text) = text else { continue };
            self.bytes[row] += text.len();
            if text.contains('\0') {
                let detail = || format!("column `{name}` holds a NUL character");
                self.verdicts.refuse(row, "wrong_type", detail);
            }
        }
    }

    /// Event times; a row without one came now.
    fn times(&mut self, input: Option<&ArrayRef>, unit: TsUnit) -> ArrayRef {
        let (rows, now) = (self.verdicts.good.len(), self.now);
        let times = match input {
            Some(input) => {
                let times = instants(input, unit);
                let nulls = input.logical_nulls();
                for row in (0..rows).filter(|row| times.is_null(*row)) {
                    if nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row)) {
                        let detail = || "ts: this is no time of any calendar; is ts_unit right?".to_owned();
                        self.verdicts.refuse(row, "ts_out_of_range", detail);
                    }
                }
                TimestampMicrosecondArray::from_iter_values(times.iter().map(|at| at.unwrap_or(now.0)))
            }
            None => TimestampMicrosecondArray::from_value(now.0, rows),
        };
        let is_count = input.is_some_and(|input| input.data_type().is_numeric());
        for (row, at) in times.values().iter().enumerate() {
            if let Err(detail) = check_ts(*at, is_count, self.bounds, now) {
                self.verdicts.refuse(row, "ts_out_of_range", || format!("ts: {detail}"));
            }
        }
        Arc::new(times.with_data_type(timestamp_type()))
    }

    fn ids(&mut self, input: &ArrayRef) -> Result<ArrayRef, ArrowError> {
        let ids = lossless(input, &DataType::Utf8);
        self.uncast("id", "utf8", input, &ids)?;
        let most = self.bounds.id_bytes;
        for (row, id) in ids.as_string::<i32>().iter().enumerate() {
            let Some(id) = id else { continue };
            if id.is_empty() || id.len() > most || id.contains('\0') {
                let detail = || format!("id has {} bytes; it takes 1 to {most} and no NUL", id.len());
                self.verdicts.refuse(row, "bad_id", detail);
            }
        }
        Ok(ids)
    }

    /// A column of the stream's own in the type it has there.
    fn cells(&mut self, column: &Column, input: &ArrayRef, unit: TsUnit) -> Result<ArrayRef, ArrowError> {
        let name = &column.name;
        let output: ArrayRef = match column.kind {
            ColumnType::Json => self.json(name, input)?,
            ColumnType::Timestamp => Arc::new(instants(input, unit).with_data_type(timestamp_type())),
            kind => lossless(input, &kind.arrow()),
        };
        if column.kind != ColumnType::Json {
            self.uncast(name, &column.kind.to_string(), input, &output)?;
        }
        if let Some(numbers) = output.as_primitive_opt::<Float64Type>() {
            for (row, number) in numbers.iter().enumerate() {
                if number.is_some_and(|number| !number.is_finite()) {
                    let detail = || format!("column `{name}` takes finite numbers");
                    self.verdicts.refuse(row, "not_finite", detail);
                }
            }
        }
        if let Some(texts) = output.as_string_opt::<i32>() {
            self.texts(name, texts);
        }
        Ok(output)
    }

    fn required(&mut self, column: &Column, output: &ArrayRef) {
        for row in (0..output.len()).filter(|row| output.is_null(*row)) {
            let detail = || format!("column `{}` ({}) is required", column.name, column.kind);
            self.verdicts.refuse(row, "missing_column", detail);
        }
    }

    /// JSON text is checked and taken as it is; a value of any other type is written as JSON.
    fn json(&mut self, name: &str, input: &ArrayRef) -> Result<ArrayRef, ArrowError> {
        let Some(texts) = as_text(input) else {
            let (field, options) =
                (Arc::new(Field::new(name, input.data_type().clone(), true)), EncoderOptions::default());
            let mut encoder = make_encoder(&field, input, &options)?;
            let cell = |row: usize| {
                let mut out = Vec::new();
                (!encoder.is_null(row)).then(|| encoder.encode(row, &mut out))?;
                Some(String::from_utf8_lossy(&out).into_owned()).filter(|text| text != "null")
            };
            return Ok(Arc::new((0..input.len()).map(cell).collect::<StringArray>()));
        };
        let mut cell = |(row, text): (usize, Option<&'_ str>)| -> Option<String> {
            let text = text?;
            match serde_json::from_str::<&RawValue>(text) {
                Ok(value) if depth_of(value.get()) <= DEPTH_MAX => {
                    return Some(value.get().to_owned()).filter(|text| text != "null");
                }
                Ok(_) => self.verdicts.refuse(row, "malformed_json", || {
                    format!("column `{name}`: a value is nested more than {DEPTH_MAX} deep")
                }),
                Err(error) => self.verdicts.refuse(row, "wrong_type", || {
                    format!("column `{name}` takes json, this is `{}`: {error}", short(text))
                }),
            }
            None
        };
        Ok(Arc::new(texts.as_string::<i32>().iter().enumerate().map(&mut cell).collect::<StringArray>()))
    }

    /// What the stream has no column for, as one JSON object a row; beside it what was an event's `extra` before.
    fn extra(&mut self, schema: &StreamSchema, input: &RecordBatch) -> Result<ArrayRef, ArrowError> {
        let rows = input.num_rows();
        let known = |name: &str| RESERVED.contains(&name) || schema.columns.iter().any(|column| column.name == name);
        let fields = input.schema_ref().fields().iter().zip(input.columns());
        let unknown: Vec<_> = fields.filter(|(field, _)| !known(field.name())).collect();
        let before = input.column_by_name("extra").map(|extra| self.json("extra", extra)).transpose()?;
        let before = before.as_ref().map(|extra| extra.as_string::<i32>());
        match schema.unknown_fields {
            UnknownFields::Ignore => return Ok(new_null_array(&DataType::Utf8, rows)),
            UnknownFields::Reject => {
                let before = before.map(|extra| ("extra", extra.nulls().cloned()));
                let unknown = unknown.iter().map(|(field, column)| (field.name().as_str(), column.logical_nulls()));
                for (name, nulls) in unknown.chain(before) {
                    for row in (0..rows).filter(|row| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(*row))) {
                        let detail = || format!("`{}` has no column `{name}`", schema.stream);
                        self.verdicts.refuse(row, "unknown_field", detail);
                    }
                }
                return Ok(new_null_array(&DataType::Utf8, rows));
            }
            UnknownFields::Keep => {}
        }
        let options = EncoderOptions::default();
        let mut texts = Texts::default();
        for (field, column) in &unknown {
            texts.columns.push((field.name(), make_encoder(field, column, &options)?));
        }
        let mut extra = Vec::with_capacity(rows);
        for row in 0..rows {
            let new = texts.object(row);
            let old = before.filter(|extra| extra.is_valid(row)).map(|extra| extra.value(row));
            extra.push(match old.map(|old| join(old, new.as_deref())) {
                None => new,
                Some(Ok(both)) => Some(both),
                Some(Err((code, detail))) => {
                    self.verdicts.refuse(row, code, || detail);
                    None
                }
            });
        }
        let extra = StringArray::from(extra);
        self.texts("extra", &extra);
        Ok(Arc::new(extra))
    }

    fn sizes(&mut self) {
        let most = self.bounds.event_bytes;
        for (row, bytes) in self.bytes.iter().enumerate().filter(|(_, bytes)| **bytes > most) {
            let detail = || format!("the event has {bytes} bytes, more than limits.event_bytes = {most}");
            self.verdicts.refuse(row, "event_too_large", detail);
        }
    }
}

/// An earlier `extra` with the members of `new` behind its own.
fn join(old: &str, new: Option<&str>) -> Result<String, (&'static str, String)> {
    let Ok(members) = serde_json::from_str::<HashMap<String, IgnoredAny>>(old) else {
        return Err(("wrong_type", format!("column `extra` takes a JSON object, this is `{}`", short(old))));
    };
    let Some(new) = new.filter(|_| !members.is_empty()) else { return Ok(new.unwrap_or(old).to_owned()) };
    let added: HashMap<String, IgnoredAny> = serde_json::from_str(new).unwrap_or_default();
    match added.keys().find(|name| members.contains_key(*name)) {
        Some(twice) => Err(("duplicate_field", format!("field `{twice}` stands twice"))),
        None => Ok(format!("{},{}", &old[..old.len() - 1], &new[1..])),
    }
}

/// The column as plain text, if it is text.
fn as_text(input: &ArrayRef) -> Option<ArrayRef> {
    let is_text = |kind: &DataType| matches!(kind, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    let text = match input.data_type() {
        DataType::Dictionary(_, values) => is_text(values),
        kind => is_text(kind),
    };
    text.then(|| lossless(input, &DataType::Utf8))
}

/// Instants in microseconds: integers and numbers count `unit`, text is RFC 3339.
fn instants(input: &ArrayRef, unit: TsUnit) -> TimestampMicrosecondArray {
    let kind = input.data_type();
    let of = |kind: &DataType| lossless(input, kind);
    if kind.is_integer() {
        of(&DataType::Int64).as_primitive::<Int64Type>().unary_opt(|count| unit.micros(count))
    } else if kind.is_floating() {
        of(&DataType::Float64).as_primitive::<Float64Type>().unary_opt(|count| unit.micros_of(count))
    } else {
        of(&timestamp_type()).as_primitive::<TimestampMicrosecondType>().clone()
    }
}

/// The column in another type; NULL where a cell is none of that type, or would not be the same number in it.
fn lossless(input: &ArrayRef, kind: &DataType) -> ArrayRef {
    let from = input.data_type();
    if from == kind {
        return input.clone();
    }
    let none = || new_null_array(kind, input.len());
    if !can_cast_types(from, kind) || from.is_nested() {
        return none();
    }
    let Ok(output) = cast_with_options(input, kind, &CAST) else { return none() };
    let exact = matches!(kind, DataType::Int64 | DataType::Decimal128(..) | DataType::Boolean);
    if !from.is_numeric() || !exact {
        return output;
    }
    let changed = || {
        let back = cast_with_options(&output, from, &CAST)?;
        if from.is_floating() {
            // zero has two signs here and one there
            let plain = |array: &ArrayRef| -> Result<Float64Array, ArrowError> {
                Ok(cast_with_options(array, &DataType::Float64, &CAST)?
                    .as_primitive::<Float64Type>()
                    .unary(|x| x + 0.0))
            };
            return neq(&plain(&back)?, &plain(input)?);
        }
        neq(&back, input)
    };
    changed().and_then(|changed| nullif(&output, &changed)).unwrap_or_else(|_| none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::built_in;
    use arrow::array::{DictionaryArray, Int64Array, MapArray, NullArray, StringViewArray, StructArray};
    use arrow::datatypes::Int32Type;
    use arrow::ipc::writer::{IpcWriteOptions, StreamWriter};

    const NOW: Micros = Micros(1_800_000_000_000_000);

    fn sent(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
        let batch =
            RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, c)| (name, c, true))).unwrap();
        let mut ipc = StreamWriter::try_new(Vec::new(), batch.schema_ref()).unwrap();
        ipc.write(&batch).unwrap();
        ipc.into_inner().unwrap()
    }

    fn read_into(schema: &StreamSchema, columns: Vec<(&str, ArrayRef)>, unit: TsUnit) -> Decoded {
        decode(schema, &sent(columns), unit, &Bounds::default(), NOW).unwrap()
    }

    fn docs(unknown: UnknownFields) -> StreamSchema {
        let columns = r#"[{"name":"n","type":"int64"},{"name":"doc","type":"json"}]"#;
        StreamSchema::new("fin.docs".parse().unwrap(), serde_json::from_str(columns).unwrap(), unknown).unwrap()
    }

    fn texts<'a>(batch: &'a RecordBatch, column: &str) -> Vec<Option<&'a str>> {
        batch.column_by_name(column).unwrap().as_string::<i32>().iter().collect()
    }

    fn text(values: &[Option<&str>]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }

    fn int(values: &[Option<i64>]) -> ArrayRef {
        Arc::new(Int64Array::from(values.to_vec()))
    }

    #[test]
    fn an_integer_ts_counts_the_unit_and_a_null_one_is_the_arrival() {
        let n = int(&[Some(1), Some(2)]);
        let at = |ts: ArrayRef, unit| {
            let got = read_into(&docs(UnknownFields::Keep), vec![("ts", ts), ("n", n.clone())], unit);
            assert_eq!(got.errors, []);
            got.batch.column(0).as_primitive::<TimestampMicrosecondType>().values().to_vec()
        };
        let expected = [1_700_000_000_000_000, NOW.0];
        for (count, unit) in [
            (1_700_000_000, TsUnit::Seconds),
            (1_700_000_000_000, TsUnit::Millis),
            (1_700_000_000_000_000, TsUnit::Micros),
            (1_700_000_000_000_000_000, TsUnit::Nanos),
        ] {
            assert_eq!(at(int(&[Some(count), None]), unit), expected, "{unit:?}");
        }
        assert_eq!(at(text(&[Some("2023-11-14T22:13:20Z"), None]), TsUnit::Seconds), expected);
        let early = read_into(
            &docs(UnknownFields::Keep),
            vec![("ts", int(&[Some(1_700_000_000), Some(i64::MAX)])), ("n", n.clone())],
            TsUnit::Millis,
        );
        let codes: Vec<_> = early.errors.iter().map(|error| (error.index, error.code)).collect();
        assert_eq!(codes, [(0, "ts_out_of_range"), (1, "ts_out_of_range")]);
        // a time that is typed or written out is in no wrong unit
        let epoch = Arc::new(TimestampMicrosecondArray::from(vec![0, -1])) as ArrayRef;
        assert_eq!(at(epoch, TsUnit::Seconds), [0, -1]);
        let early = ["1969-12-31T23:59:59Z", "1931-05-06T00:00:00Z"];
        assert_eq!(at(text(&early.map(Some)), TsUnit::Millis), [-1_000_000, -1_219_968_000_000_000]);
        assert_eq!(at(int(&[Some(-1_219_968_000), Some(-40_000_000)]), TsUnit::Seconds)[0], -1_219_968_000_000_000);
    }

    #[test]
    fn columns_the_stream_lacks_are_kept_refused_or_ignored_as_it_says() {
        let columns = || {
            let nested = StructArray::from(vec![(
                Arc::new(Field::new("y", DataType::Int64, true)),
                int(&[Some(1), Some(2), None]),
            )]);
            vec![
                ("n", int(&[Some(1), Some(2), Some(3)])),
                ("note", text(&[Some("a\"b"), None, None])),
                ("x", Arc::new(nested) as ArrayRef),
                ("extra", text(&[None, Some(r#"{"old":1}"#), Some("[1]")])),
            ]
        };
        let kept = read_into(&docs(UnknownFields::Keep), columns(), TsUnit::Millis);
        assert_eq!(
            texts(&kept.batch, "extra"),
            [Some(r#"{"note":"a\"b","x":{"y":1}}"#), Some(r#"{"old":1,"x":{"y":2}}"#)]
        );
        assert_eq!((kept.errors[0].index, kept.errors[0].code), (2, "wrong_type"));
        let refused = read_into(&docs(UnknownFields::Reject), columns(), TsUnit::Millis);
        assert_eq!((refused.batch.num_rows(), refused.rejected, refused.errors[0].code), (0, 3, "unknown_field"));
        let none = vec![("n", int(&[Some(1)])), ("note", text(&[None]))];
        assert_eq!(read_into(&docs(UnknownFields::Reject), none, TsUnit::Millis).rejected, 0);
        let mut ignored = columns();
        ignored.truncate(3);
        let ignored = read_into(&docs(UnknownFields::Ignore), ignored, TsUnit::Millis);
        assert_eq!(texts(&ignored.batch, "extra"), [None, None, None]);
        assert_eq!(join(r#"{"a":1}"#, Some(r#"{"a":2}"#)).unwrap_err().0, "duplicate_field");
        assert_eq!(join("{}", Some(r#"{"a":2}"#)).unwrap(), r#"{"a":2}"#);
    }

    #[test]
    fn a_cell_that_does_not_fit_costs_its_row_alone_and_is_kept_in_the_payload() {
        let columns = vec![
            ("symbol", text(&[Some("A"), Some("B"), Some("C"), None])),
            ("price", text(&[Some("1.5"), Some("dear"), Some("NaN"), Some("4")])),
            ("qty", int(&[Some(1), Some(2), Some(3), Some(4)])),
        ];
        let got = read_into(&built_in()[0], columns, TsUnit::Millis);
        assert_eq!((got.batch.num_rows(), got.rejected), (1, 3));
        let codes: Vec<_> = got.errors.iter().map(|error| (error.index, error.code)).collect();
        assert_eq!(codes, [(1, "wrong_type"), (2, "not_finite"), (3, "missing_column")]);
        assert_eq!(got.errors[0].detail, "column `price` takes float64, this is `dear`");
        assert_eq!(got.errors[0].payload, r#"{"symbol":"B","price":"dear","qty":2}"#);
        let floats: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 1.5, -0.0, 1e300]));
        let got = read_into(&docs(UnknownFields::Keep), vec![("n", floats)], TsUnit::Millis);
        let refused: Vec<usize> = got.errors.iter().map(|error| error.index).collect();
        assert_eq!((refused, got.batch.num_rows()), (vec![1, 3], 2));
    }

    #[test]
    fn a_json_column_takes_json_and_nested_values() {
        let docs = docs(UnknownFields::Keep);
        let deep = format!("{}1{}", "[".repeat(65), "]".repeat(65));
        let given = text(&[Some(r#" {"a":1} "#), Some(r#"{"a":"#), Some("null"), None, Some(&deep)]);
        let got = read_into(&docs, vec![("doc", given)], TsUnit::Millis);
        assert_eq!(texts(&got.batch, "doc"), [Some(r#"{"a":1}"#), None, None]);
        let codes: Vec<_> = got.errors.iter().map(|error| (error.index, error.code)).collect();
        assert_eq!(codes, [(1, "wrong_type"), (4, "malformed_json")]);
        let nested = StructArray::from(vec![(Arc::new(Field::new("y", DataType::Int64, true)), int(&[Some(1)]))]);
        let got = read_into(&docs, vec![("doc", Arc::new(nested))], TsUnit::Millis);
        assert_eq!(texts(&got.batch, "doc"), [Some(r#"{"y":1}"#)]);
    }

    #[test]
    fn a_stream_that_announces_more_than_it_brings_is_refused_before_room_is_made() {
        let docs = docs(UnknownFields::Keep);
        let refused = |body: &[u8]| {
            decode(&docs, body, TsUnit::Millis, &Bounds::default(), NOW)
                .map(|decoded| decoded.rejected)
                .map_err(|e| e.to_string())
        };
        let body = sent(vec![("n", int(&[Some(1); 64]))]);
        assert_eq!(refused(&body), Ok(0));
        let long_head = [&[0xff; 4], &i32::MAX.to_le_bytes(), &[0; 64][..]].concat();
        assert!(refused(&long_head).unwrap_err().contains("ends inside a message"));
        // the 512 bytes of the one column are announced as 2^40
        let length = body.windows(8).rposition(|bytes| *bytes == 512_i64.to_le_bytes()).unwrap();
        let many = body.windows(8).enumerate().filter(|(_, bytes)| **bytes == 512_i64.to_le_bytes());
        for (at, _) in many.filter(|(at, _)| *at <= length) {
            let mut body = body.clone();
            body[at..at + 8].copy_from_slice(&(1_i64 << 40).to_le_bytes());
            assert!(refused(&body).is_err());
        }
        let packed = |codec| {
            let batch = RecordBatch::try_from_iter([("n", int(&[Some(1); 1 << 10]))]).unwrap();
            let options = IpcWriteOptions::default().try_with_compression(Some(codec)).unwrap();
            let mut ipc = StreamWriter::try_new_with_options(Vec::new(), batch.schema_ref(), options).unwrap();
            // without the workspace's features this build has no codecs to write with
            ipc.write(&batch).ok().map(|()| ipc.into_inner().unwrap())
        };
        let Some(zstd) = packed(CompressionType::ZSTD) else { return };
        assert_eq!(refused(&zstd), Ok(0));
        assert!(refused(&packed(CompressionType::LZ4_FRAME).unwrap()).unwrap_err().contains("LZ4"));
        let announced = zstd.windows(8).rposition(|bytes| *bytes == 8192_i64.to_le_bytes()).unwrap();
        let mut bomb = zstd;
        bomb[announced..announced + 8].copy_from_slice(&(1_i64 << 40).to_le_bytes());
        assert!(refused(&bomb).unwrap_err().contains("unpacks to more than 67108864 bytes"));
    }

    #[test]
    fn shared_values_are_taken_as_long_as_they_are_no_more_than_their_text() {
        let symbols: ArrayRef = Arc::new(vec!["A", "B", "A"].into_iter().collect::<DictionaryArray<Int32Type>>());
        let venues: ArrayRef = Arc::new(StringViewArray::from(vec!["x", "y", "a longer name than fits"]));
        let one = || Arc::new(Float64Array::from(vec![1.0; 3])) as ArrayRef;
        let columns = vec![("symbol", symbols), ("price", one()), ("qty", one()), ("venue", venues)];
        let got = read_into(&built_in()[0], columns, TsUnit::Millis);
        assert_eq!(texts(&got.batch, "symbol"), [Some("A"), Some("B"), Some("A")]);
        assert_eq!(texts(&got.batch, "venue")[2], Some("a longer name than fits"));
        let refused = |columns| {
            decode(&docs(UnknownFields::Keep), &sent(columns), TsUnit::Millis, &Bounds::default(), NOW)
                .unwrap_err()
                .to_string()
        };
        let text = refused(vec![("n", Arc::new(NullArray::new(1 << 40)) as ArrayRef)]);
        assert!(text.contains("are no events"), "{text}");
        let long = "x".repeat(1 << 20);
        let shared: ArrayRef = Arc::new(std::iter::repeat_n(&*long, 300).collect::<DictionaryArray<Int32Type>>());
        let text = refused(vec![("note", shared)]);
        assert!(text.contains("67108864 bytes of text"), "{text}");
        let map = MapArray::new_from_strings(["k"].into_iter(), &int(&[Some(1)]), &[0, 1]).unwrap();
        assert_eq!(read_into(&docs(UnknownFields::Keep), vec![("m", Arc::new(map))], TsUnit::Millis).rejected, 0);
    }
}
