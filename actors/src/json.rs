//! Arrow values as JSON where Arrow's own writer stops, or writes an error into the text.

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, FieldRef};
use arrow::error::ArrowError;
use arrow::json::writer::{Encoder, EncoderFactory, EncoderOptions, NullableEncoder, make_encoder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde_json::Value;
use std::fmt::Display;

/// Takes any map, its keys as text, and writes a time that no calendar has as null, as NaN is.
#[derive(Debug)]
pub struct AnyValue;

impl EncoderFactory for AnyValue {
    fn make_default_encoder<'a>(
        &self,
        _: &'a FieldRef,
        array: &'a dyn Array,
        options: &'a EncoderOptions,
    ) -> Result<Option<NullableEncoder<'a>>, ArrowError> {
        let formats = FormatOptions::new()
            .with_date_format(options.date_format())
            .with_datetime_format(options.datetime_format())
            .with_timestamp_format(options.timestamp_format())
            .with_timestamp_tz_format(options.timestamp_tz_format())
            .with_time_format(options.time_format());
        let encoder: Box<dyn Encoder + 'a> = match array.data_type() {
            kind if kind.is_temporal() => Box::new(Times(ArrayFormatter::try_new(array, &formats)?)),
            DataType::Map(entry, _) if !has_text_keys(entry.data_type()) => {
                let (map, DataType::Struct(fields)) = (array.as_map(), entry.data_type()) else { return Ok(None) };
                Box::new(Keyed {
                    offsets: map.value_offsets(),
                    keys: ArrayFormatter::try_new(map.keys(), &formats)?,
                    values: make_encoder(&fields[1], map.values(), options)?,
                })
            }
            _ => return Ok(None),
        };
        Ok(Some(NullableEncoder::new(encoder, array.nulls().cloned())))
    }
}

fn has_text_keys(entry: &DataType) -> bool {
    let DataType::Struct(fields) = entry else { return false };
    matches!(fields[0].data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

struct Times<'a>(ArrayFormatter<'a>);

impl Encoder for Times<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        match self.0.value(row).try_to_string() {
            Ok(text) => push_text(text, out),
            Err(_) => out.extend_from_slice(b"null"),
        }
    }
}

struct Keyed<'a> {
    offsets: &'a [i32],
    keys: ArrayFormatter<'a>,
    values: NullableEncoder<'a>,
}

impl Encoder for Keyed<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        let entries = self.offsets[row] as usize..self.offsets[row + 1] as usize;
        out.push(b'{');
        for entry in entries.clone() {
            if entry > entries.start {
                out.push(b',');
            }
            push_text(self.keys.value(entry), out);
            out.push(b':');
            match self.values.is_null(entry) {
                true => out.extend_from_slice(b"null"),
                false => self.values.encode(entry, out),
            }
        }
        out.push(b'}');
    }
}

fn push_text(text: impl Display, out: &mut Vec<u8>) {
    out.extend_from_slice(Value::from(text.to_string()).to_string().as_bytes());
}

#[cfg(test)]
mod tests {
    use crate::rows::json_lines;
    use arrow::array::{
        ArrayRef, Date32Array, Int64Array, MapBuilder, RecordBatch, StringBuilder, TimestampSecondArray,
    };
    use arrow::array::{Int64Builder, StructArray};
    use arrow::datatypes::{DataType, Field, TimeUnit};
    use std::sync::Arc;

    #[test]
    fn a_map_has_its_keys_as_text_whatever_their_type() {
        let mut map = MapBuilder::new(None, Int64Builder::new(), StringBuilder::new());
        map.keys().append_slice(&[7, -8]);
        map.values().append_value("a\"");
        map.values().append_null();
        map.append(true).unwrap();
        map.append(true).unwrap();
        map.append(false).unwrap();
        let batch = RecordBatch::try_from_iter([("m", Arc::new(map.finish()) as ArrayRef)]).unwrap();
        assert_eq!(json_lines(&batch).unwrap(), [r#"{"m":{"7":"a\"","-8":null}}"#, r#"{"m":{}}"#, r#"{"m":null}"#]);
    }

    #[test]
    fn a_time_that_no_calendar_has_is_null() {
        let at: ArrayRef = Arc::new(TimestampSecondArray::from(vec![0, i64::MAX]));
        let nested = StructArray::from(vec![(
            Arc::new(Field::new("at", DataType::Timestamp(TimeUnit::Second, None), true)),
            at,
        )]);
        let days: ArrayRef = Arc::new(Date32Array::from(vec![0, i32::MAX]));
        let n: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let batch = RecordBatch::try_from_iter([("s", Arc::new(nested) as ArrayRef), ("d", days), ("n", n)]).unwrap();
        let lines = json_lines(&batch).unwrap();
        assert!(lines[0].contains("1970-01-01T00:00:00"), "{lines:?}");
        assert_eq!(lines[1], r#"{"s":{"at":null},"d":null,"n":2}"#);
    }
}
