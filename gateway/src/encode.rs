//! What is inside as JSON: rows of metrics, events, alerts and portfolios, each in one place.

pub(crate) use actors::alert_json as alert;
use actors::json::AnyValue;
use actors::rows::{Row, rfc3339};
use actors::{PortfolioSummary, System, Throughput};
use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, FieldRef, Schema, TimeUnit, TimestampMicrosecondType};
use arrow::error::ArrowError;
use arrow::json::ReaderBuilder;
use arrow::json::writer::{Encoder, EncoderFactory, EncoderOptions, NullableEncoder, make_encoder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use engine::alert::Labels;
use engine::event::Micros;
use engine::metric::Rows;
use engine::program::Program;
use serde_json::{Value, json};
use sql::store::Alert;
use std::sync::Arc;

/// A metric's row as clients see it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct MetricRow {
    /// Key values joined with `|`; empty without keys.
    pub(crate) key: Arc<str>,
    /// Key columns and their values as text, for filters.
    pub(crate) pairs: Vec<(String, String)>,
    /// The row as a JSON object.
    pub(crate) json: Arc<str>,
    pub(crate) window_end: Micros,
    pub(crate) is_final: bool,
    pub(crate) revision: i64,
}

/// Times with six fractional digits and `Z`, and columns of JSON text as the JSON they hold.
#[derive(Debug)]
struct Contract {
    json_columns: Vec<String>,
}

struct Times<'a>(&'a arrow::array::PrimitiveArray<TimestampMicrosecondType>);

impl Encoder for Times<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        out.push(b'"');
        out.extend_from_slice(rfc3339(Micros(self.0.value(row))).as_bytes());
        out.push(b'"');
    }
}

struct Embedded<'a>(&'a StringArray);

impl Encoder for Embedded<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        // the decoder stored what it had read as JSON; text from elsewhere is quoted
        match serde_json::from_str::<&serde_json::value::RawValue>(self.0.value(row)) {
            Ok(value) => out.extend_from_slice(value.get().as_bytes()),
            Err(_) => out.extend_from_slice(Value::from(self.0.value(row)).to_string().as_bytes()),
        }
    }
}

impl EncoderFactory for Contract {
    fn make_default_encoder<'a>(
        &self,
        field: &'a FieldRef,
        array: &'a dyn Array,
        options: &'a EncoderOptions,
    ) -> Result<Option<NullableEncoder<'a>>, ArrowError> {
        let nulls = array.nulls().cloned();
        Ok(match array.data_type() {
            DataType::Timestamp(TimeUnit::Microsecond, _) => {
                Some(NullableEncoder::new(Box::new(Times(array.as_primitive())), nulls))
            }
            DataType::Utf8 if self.json_columns.contains(field.name()) => {
                Some(NullableEncoder::new(Box::new(Embedded(array.as_string())), nulls))
            }
            _ => AnyValue.make_default_encoder(field, array, options)?,
        })
    }
}

fn options(json_columns: Vec<String>) -> EncoderOptions {
    EncoderOptions::default().with_explicit_nulls(true).with_encoder_factory(Arc::new(Contract { json_columns }))
}

/// Columns of a batch, ready to be written row by row.
struct Columns<'a> {
    /// `"name":` and the column.
    columns: Vec<(Vec<u8>, NullableEncoder<'a>)>,
}

impl<'a> Columns<'a> {
    fn new(batch: &'a RecordBatch, options: &'a EncoderOptions) -> Result<Self, ArrowError> {
        let columns = batch.schema_ref().fields().iter().zip(batch.columns()).map(|(field, column)| {
            let name = format!("{}:", Value::from(field.name().as_str()));
            Ok((name.into_bytes(), make_encoder(field, column.as_ref(), options)?))
        });
        Ok(Self { columns: columns.collect::<Result<_, ArrowError>>()? })
    }

    /// The members of a row without the braces around them. NULL is `null`, or left out.
    fn write(&mut self, row: usize, nulls: bool, out: &mut Vec<u8>) {
        let start = out.len();
        for (name, column) in &mut self.columns {
            let is_null = column.is_null(row);
            if is_null && !nulls {
                continue;
            }
            if out.len() > start {
                out.push(b',');
            }
            out.extend_from_slice(name);
            match is_null {
                true => out.extend_from_slice(b"null"),
                false => column.encode(row, out),
            }
        }
    }
}

fn text(bytes: Vec<u8>) -> Result<String, ArrowError> {
    String::from_utf8(bytes).map_err(|error| ArrowError::JsonError(error.to_string()))
}

/// Rows of a metric, in their order.
pub(crate) fn metric_rows(program: &Program, rows: &Rows) -> Result<Vec<MetricRow>, ArrowError> {
    let batch = &rows.batch;
    let labels = Labels::new(program, batch).map_err(|error| ArrowError::ExternalError(Box::new(error)))?;
    let ends = batch.column(1).as_primitive::<TimestampMicrosecondType>();
    let options = options(Vec::new());
    let mut columns = Columns::new(batch, &options)?;
    (0..batch.num_rows())
        .map(|row| {
            let revision = rows.revisions.as_ref().map(|revisions| revisions[row]);
            let mut out = vec![b'{'];
            columns.write(row, true, &mut out);
            let (is_final, revision) = (revision.is_some(), revision.unwrap_or(0));
            out.extend_from_slice(format!(",\"final\":{is_final},\"revision\":{revision}}}").as_bytes());
            Ok(MetricRow {
                key: labels.key(row).into(),
                pairs: labels.pairs(row),
                json: text(out)?.into(),
                window_end: Micros(ends.value(row)),
                is_final,
                revision,
            })
        })
        .collect()
}

/// A key as in [`MetricRow::key`], and its columns as in [`MetricRow::pairs`].
pub(crate) type Labelled = (String, Vec<(String, String)>);

/// Keys whose rows HAVING took back.
pub(crate) fn gone_keys(gone: &RecordBatch) -> Result<Vec<Labelled>, ArrowError> {
    let options = FormatOptions::new().with_null("null");
    let columns: Vec<_> = (gone.schema_ref().fields().iter().zip(gone.columns()))
        .map(|(field, column)| Ok((field.name(), ArrayFormatter::try_new(column, &options)?)))
        .collect::<Result<_, ArrowError>>()?;
    let keys = (0..gone.num_rows()).map(|row| {
        let pairs: Vec<(String, String)> =
            columns.iter().map(|(name, column)| ((*name).clone(), column.value(row).to_string())).collect();
        let values: Vec<&str> = pairs.iter().map(|(_, value)| value.as_str()).collect();
        (values.join("|"), pairs)
    });
    Ok(keys.collect())
}

/// Rows that came as JSON, as [`metric_rows`] would have given them.
pub(crate) fn stored_rows(program: &Program, rows: &[Row]) -> Result<Vec<MetricRow>, ArrowError> {
    let broken = |error: serde_json::Error| ArrowError::JsonError(error.to_string());
    let schema = Arc::new(Schema::new(program.output().fields()[..2 + program.key_count()].to_vec()));
    let mut decoder = ReaderBuilder::new(schema.clone()).with_batch_size(rows.len().max(1)).build_decoder()?;
    let lines = rows.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>().map_err(broken)?;
    decoder.decode(lines.join("\n").as_bytes())?;
    let batch = decoder.flush()?.unwrap_or_else(|| RecordBatch::new_empty(schema));
    let labels = Labels::new(program, &batch).map_err(|error| ArrowError::ExternalError(Box::new(error)))?;
    let ends = batch.column(1).as_primitive::<TimestampMicrosecondType>();
    let read = |(at, (row, line)): (usize, (&Row, String))| MetricRow {
        key: labels.key(at).into(),
        pairs: labels.pairs(at),
        json: line.into(),
        window_end: Micros(ends.value(at)),
        is_final: row.get("final").is_some_and(|text| text.get() == "true"),
        revision: row.get("revision").and_then(|text| text.get().parse().ok()).unwrap_or_default(),
    };
    Ok(rows.iter().zip(lines).enumerate().map(read).collect())
}

/// The text of a filter as a column of this type shows its values: `10` is `10.0` where they are doubles. `None` for what
/// is no value of the type.
pub(crate) fn shown_in(kind: &DataType, text: &str) -> Option<String> {
    if matches!(kind, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
        return Some(text.to_owned());
    }
    let value = arrow::compute::cast(&StringArray::from(vec![text.trim()]), kind).ok()?;
    let shown = ArrayFormatter::try_new(&value, &FormatOptions::new()).ok()?;
    value.is_valid(0).then(|| shown.value(0).to_string())
}

/// A column with each of its values as JSON text, without the quotes where that is a string; what JSON writes as null
/// is NULL.
pub(crate) fn texts(field: &FieldRef, column: &dyn Array, options: &EncoderOptions) -> Result<StringArray, ArrowError> {
    let mut encoder = make_encoder(field, column, options)?;
    let cell = |row: usize| {
        if encoder.is_null(row) {
            return Ok(None);
        }
        let mut out = Vec::new();
        encoder.encode(row, &mut out);
        let json = text(out)?;
        let unquoted = serde_json::from_str::<String>(&json).ok();
        Ok(unquoted.or_else(|| (json != "null").then_some(json)))
    };
    (0..column.len()).map(cell).collect()
}

/// Rows as JSON objects, those that `keep` wants, with JSON columns embedded. NULL is `null`, or left out.
pub(crate) fn objects(
    batch: &RecordBatch,
    json_columns: Vec<String>,
    nulls: bool,
    keep: impl Fn(usize) -> bool,
) -> Result<Vec<String>, ArrowError> {
    let options = options(json_columns);
    let mut columns = Columns::new(batch, &options)?;
    (0..batch.num_rows())
        .filter(|row| keep(*row))
        .map(|row| {
            let mut out = vec![b'{'];
            columns.write(row, nulls, &mut out);
            out.push(b'}');
            text(out)
        })
        .collect()
}

/// An alert among others, with whether it is silenced.
pub(crate) fn listed_alert(system: &System, one: &Alert) -> Value {
    let mut shown = alert(one);
    // resolved alerts are told no more, silenced or not
    let by = system.silenced_by(one).filter(|_| one.resolved_at.is_none());
    shown["silenced"] = by.is_some().into();
    shown["silenced_by"] = by.into();
    shown
}

/// A portfolio's value, over HTTP and in its channel.
pub(crate) fn portfolio(portfolio: &PortfolioSummary) -> Value {
    let summary = &portfolio.summary;
    json!({
        "id": portfolio.id, "name": portfolio.name, "currency": portfolio.currency,
        "value": summary.value, "cost": summary.cost, "unrealised": summary.unrealised,
        "unrealised_pct": summary.unrealised_pct, "as_of": summary.as_of.map(rfc3339),
        "positions": summary.positions, "allocation": summary.allocation, "unpriced": summary.unpriced,
        "unpriced_count": summary.unpriced.len(),
    })
}

/// A portfolio's value for those who may not see its positions: nothing that names one of them.
pub(crate) fn portfolio_value(portfolio: &PortfolioSummary) -> Value {
    let mut shown = self::portfolio(portfolio);
    if let Value::Object(members) = &mut shown {
        members.retain(|name, _| !matches!(name.as_str(), "positions" | "unpriced"));
    }
    if let Some(Value::Object(allocation)) = shown.get_mut("allocation") {
        allocation.remove("symbol");
    }
    shown
}

/// Live rates, over HTTP and in their channel.
pub(crate) fn throughput(rates: &Throughput) -> Value {
    let workspaces: Vec<Value> =
        rates.workspaces.iter().map(|(id, rate)| json!({"id": id, "events_per_second": rate})).collect();
    json!({
        "events_per_second": rates.events_per_second, "batches_per_second": rates.batches_per_second,
        "bytes_per_second": rates.bytes_per_second, "events_total": rates.events_total, "workspaces": workspaces,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Float64Array, TimestampMicrosecondArray};
    use arrow::datatypes::Field;

    #[test]
    fn an_event_has_micros_embedded_json_and_no_nulls() {
        let schema = Schema::new(vec![
            Field::new("ts", DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())), false),
            Field::new("id", DataType::Utf8, true),
            Field::new("price", DataType::Float64, true),
            Field::new("extra", DataType::Utf8, true),
        ]);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(TimestampMicrosecondArray::from(vec![1, 2_000_000]).with_timezone("+00:00")),
            Arc::new(StringArray::from(vec![Some("a\n\"b\""), None])),
            Arc::new(Float64Array::from(vec![f64::INFINITY, 1.0])),
            Arc::new(StringArray::from(vec![Some(r#"{"x":[1,null]}"#), Some("no json")])),
        ];
        let batch = RecordBatch::try_new(Arc::new(schema), columns).unwrap();
        let written = objects(&batch, vec!["extra".into()], false, |_| true).unwrap();
        let read: Vec<Value> = written.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let first =
            json!({"ts": "1970-01-01T00:00:00.000001Z", "id": "a\n\"b\"", "price": null, "extra": {"x": [1, null]}});
        assert_eq!(read[0], first);
        assert_eq!(read[1], json!({"ts": "1970-01-01T00:00:02.000000Z", "price": 1.0, "extra": "no json"}));
        assert_eq!(objects(&batch, Vec::new(), false, |row| row == 1).unwrap().len(), 1);
    }

    #[test]
    fn a_filter_means_a_value_however_it_is_written() {
        let time = DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into()));
        for (kind, texts, shown) in [
            (&DataType::Float64, &["10", "10.0", "1e1", " 10"][..], Some("10.0")),
            (&DataType::Int64, &["7", "007", "+7"], Some("7")),
            (&DataType::Int64, &["7.5", "seven", ""], None),
            (&DataType::Decimal128(10, 2), &["1.1", "1.10"], Some("1.10")),
            (&DataType::Boolean, &["true"], Some("true")),
            (&time, &["2026-01-01T01:00:00+01:00", "2026-01-01T00:00:00.000000Z"], Some("2026-01-01T00:00:00Z")),
            (&DataType::Utf8, &["10"], Some("10")),
            (&DataType::Utf8, &[" 10.0"], Some(" 10.0")),
        ] {
            for text in texts {
                assert_eq!(shown_in(kind, text).as_deref(), shown, "{text} as {kind}");
            }
        }
    }
}
