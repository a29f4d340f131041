//! SQL asked once, answered as JSON, CSV or Arrow.

use super::metrics::type_name;
use crate::AppState;
use crate::encode;
use crate::extract::{Json, Member, Sent};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::json::AnyValue;
use actors::{QueryAnswer, QueryRequest};
use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::error::ArrowError;
use arrow::ipc::writer::StreamWriter;
use arrow::json::StructMode;
use arrow::json::writer::{EncoderOptions, JsonArray, WriterBuilder};
use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/api/v1/workspaces/{ws}/query", post(query))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    sql: String,
    #[serde(default)]
    params: Vec<Value>,
    timeout_ms: Option<u64>,
}

/// How an answer is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Json,
    Csv,
    Arrow,
}

impl Format {
    fn content_type(self) -> &'static str {
        match self {
            Format::Json => "application/json",
            Format::Csv => "text/csv; charset=utf-8",
            Format::Arrow => "application/vnd.apache.arrow.stream",
        }
    }

    /// The first of ours that the client takes, by its own order; JSON where it does not say.
    fn accepted(headers: &HeaderMap) -> Result<Format, Problem> {
        let Some(accept) = headers.get(ACCEPT).and_then(|value| value.to_str().ok()) else { return Ok(Format::Json) };
        let mut wanted: Vec<(f32, Format)> = accept
            .split(',')
            .filter_map(|part| {
                let mut pieces = part.split(';').map(str::trim);
                let format = match pieces.next()? {
                    "application/json" | "application/*" | "*/*" => Format::Json,
                    "text/csv" | "text/*" => Format::Csv,
                    "application/vnd.apache.arrow.stream" => Format::Arrow,
                    _ => return None,
                };
                let quality = pieces.find_map(|piece| piece.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0);
                (quality > 0.0).then_some((quality, format))
            })
            .collect();
        wanted.sort_by(|a, b| b.0.total_cmp(&a.0)); // stable: of equals the first
        let refused = "accept must allow application/json, text/csv or application/vnd.apache.arrow.stream";
        let refused = || Problem::new(StatusCode::NOT_ACCEPTABLE, "not_acceptable", refused);
        wanted.first().map(|(_, format)| *format).ok_or_else(refused)
    }
}

async fn query(
    State(state): State<AppState>,
    member: Member,
    headers: HeaderMap,
    question: Sent<Question>,
) -> Result<Response, Problem> {
    member.may(Permission::QueryRun)?;
    let format = Format::accepted(&headers)?;
    let Json(question) = question?;
    let Question { sql, params, timeout_ms } = question;
    member.may_read_tables(&sql)?;
    let request = QueryRequest { sql, params, timeout: timeout_ms.map(Duration::from_millis) };
    let answer = state.system.query(&member.workspace, request).await?;
    // an answer may be large: it is written where it holds nobody up
    let written = tokio::task::spawn_blocking(move || write(&answer, format)).await.map_err(Problem::internal)?;
    let body = written.map_err(|error| {
        let detail =
            format!("the answer cannot be written as {}: {error}; cast that column to text", format.content_type());
        Problem::invalid("unwritable_answer", detail)
    })?;
    Ok(([(CONTENT_TYPE, HeaderValue::from_static(format.content_type()))], body).into_response())
}

fn write(answer: &QueryAnswer, format: Format) -> Result<Vec<u8>, ArrowError> {
    let mut out = Vec::new();
    match format {
        Format::Json => {
            let columns: Vec<Value> = (answer.schema.fields().iter())
                .map(|field| json!({"name": field.name(), "type": type_name(field.data_type())}))
                .collect();
            out.extend_from_slice(format!("{{\"columns\":{},\"rows\":", Value::Array(columns)).as_bytes());
            write_rows(&answer.batches, &mut out)?;
            out.push(b'}');
        }
        Format::Csv => {
            let mut writer = arrow::csv::WriterBuilder::new().with_header(true).build(&mut out);
            writer.write(&flat(&RecordBatch::new_empty(answer.schema.clone()))?)?; // the header, also of an empty answer
            answer.batches.iter().try_for_each(|batch| writer.write(&flat(batch)?))?;
        }
        Format::Arrow => {
            let mut writer = StreamWriter::try_new(&mut out, &answer.schema)?;
            answer.batches.iter().try_for_each(|batch| writer.write(batch))?;
            writer.finish()?;
        }
    }
    Ok(out)
}

/// How times are written, and what JSON has no form for.
fn options() -> EncoderOptions {
    EncoderOptions::default()
        .with_explicit_nulls(true)
        .with_timestamp_format(TIMESTAMP.to_owned())
        .with_timestamp_tz_format(format!("{TIMESTAMP}Z"))
        .with_encoder_factory(Arc::new(AnyValue))
}

const TIMESTAMP: &str = "%Y-%m-%dT%H:%M:%S%.6f";

/// The batch as CSV can hold it: lists, maps and structs as JSON, times as text.
fn flat(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let options = options();
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        if field.data_type().is_nested() || field.data_type().is_temporal() {
            fields.push(Arc::new(Field::new(field.name(), DataType::Utf8, true)));
            columns.push(Arc::new(encode::texts(field, column, &options)?) as ArrayRef);
        } else {
            fields.push(field.clone());
            columns.push(column.clone());
        }
    }
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &rows)
}

/// Rows as JSON arrays, in the order of the columns.
fn write_rows(batches: &[RecordBatch], out: &mut Vec<u8>) -> Result<(), ArrowError> {
    if batches.iter().all(|batch| batch.num_rows() == 0) {
        out.extend_from_slice(b"[]");
        return Ok(());
    }
    let mut writer = WriterBuilder::new()
        .with_explicit_nulls(true)
        .with_struct_mode(StructMode::ListOnly)
        .with_timestamp_format(TIMESTAMP.to_owned())
        .with_timestamp_tz_format(format!("{TIMESTAMP}Z"))
        .with_encoder_factory(Arc::new(AnyValue))
        .build::<_, JsonArray>(out);
    batches.iter().try_for_each(|batch| writer.write(batch))?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
    use arrow::array::{Int64Builder, ListArray, MapBuilder, StringBuilder};
    use arrow::datatypes::{Int64Type, TimeUnit};

    fn answer() -> QueryAnswer {
        let schema = Arc::new(Schema::new(vec![
            Field::new("at", DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())), true),
            Field::new("symbol", DataType::Utf8, true),
            Field::new("price", DataType::Float64, true),
            Field::new("n", DataType::Int64, false),
        ]));
        let columns: Vec<arrow::array::ArrayRef> = vec![
            Arc::new(TimestampMicrosecondArray::from(vec![1_500_000, 2_000_001]).with_timezone("+00:00")),
            Arc::new(StringArray::from(vec![Some("A\"B"), None])),
            Arc::new(Float64Array::from(vec![1.5, f64::NAN])),
            Arc::new(Int64Array::from(vec![1, 2])),
        ];
        let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
        QueryAnswer { schema, batches: vec![batch] }
    }

    #[test]
    fn json_has_columns_and_rows_with_micros_and_no_nan() {
        let written: Value = serde_json::from_slice(&write(&answer(), Format::Json).unwrap()).unwrap();
        let types: Vec<&str> =
            written["columns"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["timestamp", "utf8", "float64", "int64"]);
        assert_eq!(written["rows"][0], json!(["1970-01-01T00:00:01.500000Z", "A\"B", 1.5, 1]));
        assert_eq!(written["rows"][1], json!(["1970-01-01T00:00:02.000001Z", null, null, 2]));
    }

    #[test]
    fn an_empty_answer_still_names_its_columns() {
        let empty = QueryAnswer { batches: Vec::new(), ..answer() };
        let written: Value = serde_json::from_slice(&write(&empty, Format::Json).unwrap()).unwrap();
        assert_eq!((written["columns"].as_array().unwrap().len(), &written["rows"]), (4, &json!([])));
        assert_eq!(write(&empty, Format::Csv).unwrap(), b"at,symbol,price,n\n");
    }

    #[test]
    fn csv_and_arrow_hold_the_same_rows() {
        let csv = String::from_utf8(write(&answer(), Format::Csv).unwrap()).unwrap();
        assert_eq!(csv.lines().nth(1), Some("1970-01-01T00:00:01.500000Z,\"A\"\"B\",1.5,1"));
        let arrow = write(&answer(), Format::Arrow).unwrap();
        let mut reader = arrow::ipc::reader::StreamReader::try_new(arrow.as_slice(), None).unwrap();
        assert_eq!(reader.next().unwrap().unwrap().num_rows(), 2);
    }

    #[test]
    fn lists_maps_and_times_beyond_the_calendar_are_written_in_every_format() {
        let mut map = MapBuilder::new(None, Int64Builder::new(), StringBuilder::new());
        map.keys().append_value(7);
        map.values().append_value("x");
        map.append(true).unwrap();
        map.append(false).unwrap();
        let list = ListArray::from_iter_primitive::<Int64Type, _, _>([Some([Some(1), None]), None]);
        let columns: [(&str, ArrayRef); 3] = [
            ("m", Arc::new(map.finish())),
            ("l", Arc::new(list)),
            ("at", Arc::new(TimestampMicrosecondArray::from(vec![i64::MAX, 0]))),
        ];
        let batch = RecordBatch::try_from_iter_with_nullable(columns.map(|(name, c)| (name, c, true))).unwrap();
        let answer = QueryAnswer { schema: batch.schema(), batches: vec![batch] };
        let written: Value = serde_json::from_slice(&write(&answer, Format::Json).unwrap()).unwrap();
        assert_eq!(written["rows"][0], json!([{"7": "x"}, [1, null], null]));
        assert_eq!(written["rows"][1], json!([null, null, "1970-01-01T00:00:00.000000"]));
        let csv = String::from_utf8(write(&answer, Format::Csv).unwrap()).unwrap();
        assert_eq!(csv, "m,l,at\n\"{\"\"7\"\":\"\"x\"\"}\",\"[1,null]\",\n,,1970-01-01T00:00:00.000000\n");
    }

    #[test]
    fn the_client_chooses_the_format() {
        let accepted = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(text));
            Format::accepted(&headers).ok()
        };
        assert_eq!(Format::accepted(&HeaderMap::new()).ok(), Some(Format::Json));
        assert_eq!(accepted("text/html, */*;q=0.1"), Some(Format::Json));
        assert_eq!(accepted("application/json;q=0.5, text/csv"), Some(Format::Csv));
        assert_eq!(accepted("application/vnd.apache.arrow.stream"), Some(Format::Arrow));
        assert_eq!(accepted("image/png"), None);
    }
}
