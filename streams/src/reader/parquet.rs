//! Rows of a Parquet file, a batch of columns at a time.

use super::row::{Layout, RowFault, Value};
use super::source::Source;
use super::{Chunk, Context, Failure, ReadError, Rows};
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Float64Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use arrow::error::ArrowError;
use arrow::json::writer::{EncoderOptions, make_encoder};
use engine::event::Micros;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

/// Rows decoded at once: large enough for fast columns, small enough to keep memory at some megabytes.
const BATCH_ROWS: usize = 4096;

pub(super) struct ParquetRows {
    source: Source,
    batches: ParquetRecordBatchReader,
    layout: Layout,
    columns: Vec<Cells>,
    /// Next row of the current batch, and how many it has.
    row: usize,
    rows: usize,
    /// Rows of all batches before, and in the file.
    rows_before: u64,
    rows_total: u64,
}

/// One column of a batch, ready to be read row by row.
enum Cells {
    Int(Int64Array),
    Float(Float64Array),
    Bool(BooleanArray),
    Text(StringArray),
    /// Microseconds, UTC.
    Time(arrow::array::TimestampMicrosecondArray),
    /// Any other type, as JSON; `ends[i]` is where row `i` ends, a null is empty.
    Json {
        text: String,
        ends: Vec<usize>,
    },
}

impl ParquetRows {
    pub fn open(source: Source, context: &Context) -> Result<ParquetRows, ReadError> {
        let format = |detail: String| ReadError::Format { file: source.name.clone(), format: "parquet", detail };
        let file = source.file.try_clone().map_err(|error| source.failed(error))?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| format(error.to_string()))?;
        let names: Vec<String> = builder.schema().fields().iter().map(|field| field.name().clone()).collect();
        let mut layout = context.layout(&source, &names)?;
        // Only the columns that are wanted are decoded; the layout then counts among those.
        let mut wanted: Vec<usize> = layout.fields.iter().map(|field| field.source).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for field in &mut layout.fields {
            field.source = wanted.binary_search(&field.source).expect("every source of the layout is wanted");
        }
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
        let rows_total = builder.metadata().file_metadata().num_rows().max(0) as u64;
        let batches = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build();
        let batches = batches.map_err(|error| format(error.to_string()))?;
        Ok(ParquetRows { source, batches, layout, columns: Vec::new(), row: 0, rows: 0, rows_before: 0, rows_total })
    }

    /// Decodes the next batch; false at the end of the file.
    fn advance(&mut self) -> Result<bool, ReadError> {
        self.rows_before += self.rows as u64;
        let share = self.rows_before as f64 / self.rows_total.max(1) as f64;
        self.source.set_read((self.source.bytes_total as f64 * share) as u64);
        (self.row, self.rows) = (0, 0);
        let Some(batch) = self.batches.next() else {
            self.source.set_read(self.source.bytes_total);
            return Ok(false);
        };
        let columns = batch.and_then(|batch| {
            let fields = batch.schema_ref().fields();
            self.rows = batch.num_rows();
            batch.columns().iter().zip(fields).map(|(column, field)| Cells::new(column, field)).collect()
        });
        self.columns = columns.map_err(|error| ReadError::Format {
            file: self.source.name.clone(),
            format: "parquet",
            detail: format!("after row {}: {error}", self.rows_before),
        })?;
        Ok(true)
    }
}

impl Rows for ParquetRows {
    fn next(&mut self, chunk: &mut Chunk) -> Result<bool, Failure> {
        while self.row == self.rows {
            if !self.advance().map_err(Failure::Fatal)? {
                return Ok(false);
            }
        }
        let row = self.row;
        self.row += 1;
        let columns = &self.columns;
        let written = self.layout.write(chunk, |field| Ok::<_, RowFault>(columns[field.source].value(row)));
        written.map(|()| true).map_err(|fault| Failure::Row(self.rows_before + row as u64 + 1, fault))
    }

    fn unit(&self) -> &'static str {
        "row"
    }
}

impl Cells {
    fn new(column: &ArrayRef, field: &FieldRef) -> Result<Cells, ArrowError> {
        use DataType as T;
        let micros = || T::Timestamp(TimeUnit::Microsecond, None);
        Ok(match column.data_type() {
            T::Int8 | T::Int16 | T::Int32 | T::Int64 | T::UInt8 | T::UInt16 | T::UInt32 => {
                Cells::Int(cast(column, &T::Int64)?.as_primitive::<Int64Type>().clone())
            }
            T::Float64 => Cells::Float(column.as_primitive::<Float64Type>().clone()),
            T::Boolean => Cells::Bool(column.as_boolean().clone()),
            T::Utf8 | T::LargeUtf8 | T::Utf8View => Cells::Text(cast(column, &T::Utf8)?.as_string().clone()),
            T::Dictionary(_, values) if matches!(**values, T::Utf8 | T::LargeUtf8 | T::Utf8View) => {
                Cells::Text(cast(column, &T::Utf8)?.as_string().clone())
            }
            // an offset only says how to show the instant
            T::Timestamp(_, _) | T::Date32 | T::Date64 => {
                Cells::Time(cast(column, &micros())?.as_primitive::<TimestampMicrosecondType>().clone())
            }
            _ => Cells::json(column, field)?,
        })
    }

    fn json(column: &ArrayRef, field: &FieldRef) -> Result<Cells, ArrowError> {
        let options = EncoderOptions::default();
        let mut encoder = make_encoder(field, column, &options)?;
        let (mut text, mut ends) = (Vec::new(), Vec::with_capacity(column.len()));
        for row in 0..column.len() {
            if !encoder.is_null(row) {
                encoder.encode(row, &mut text);
            }
            ends.push(text.len());
        }
        let text = String::from_utf8(text).map_err(|error| ArrowError::JsonError(error.to_string()))?;
        Ok(Cells::Json { text, ends })
    }

    fn value(&self, row: usize) -> Value<'_> {
        match self {
            Cells::Int(cells) if cells.is_valid(row) => Value::Int(cells.value(row)),
            Cells::Float(cells) if cells.is_valid(row) => Value::Float(cells.value(row)),
            Cells::Bool(cells) if cells.is_valid(row) => Value::Bool(cells.value(row)),
            Cells::Text(cells) if cells.is_valid(row) => Value::Text(cells.value(row)),
            Cells::Time(cells) if cells.is_valid(row) => Value::Time(Micros(cells.value(row))),
            Cells::Json { text, ends } => {
                let start = if row == 0 { 0 } else { ends[row - 1] };
                if start == ends[row] { Value::Null } else { Value::Json(&text[start..ends[row]]) }
            }
            _ => Value::Null,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Decimal128Array, Float32Array, ListArray, TimestampNanosecondArray, UInt64Array};
    use arrow::datatypes::Int32Type;
    use std::sync::Arc;

    #[test]
    fn cells_of_every_type_keep_their_value() {
        let check = |array: ArrayRef, expected: &str| {
            let field = Arc::new(arrow::datatypes::Field::new("x", array.data_type().clone(), true));
            let cells = Cells::new(&array, &field).unwrap();
            let shown = match cells.value(0) {
                Value::Null => "null".to_owned(),
                Value::Int(n) => format!("int {n}"),
                Value::Float(x) => format!("float {x}"),
                Value::Bool(b) => format!("bool {b}"),
                Value::Text(t) => format!("text {t}"),
                Value::Time(t) => format!("time {}", t.0),
                Value::Json(json) => format!("json {json}"),
            };
            assert_eq!(shown, expected);
            assert!(matches!(cells.value(1), Value::Null));
        };
        check(Arc::new(arrow::array::Int16Array::from(vec![Some(-3), None])), "int -3");
        check(Arc::new(UInt64Array::from(vec![Some(u64::MAX), None])), "json 18446744073709551615");
        check(Arc::new(Float32Array::from(vec![Some(0.1), None])), "json 0.1");
        check(Arc::new(TimestampNanosecondArray::from(vec![Some(1_999), None])), "time 1");
        check(Arc::new(arrow::array::Date32Array::from(vec![Some(1), None])), "time 86400000000");
        let decimal = Decimal128Array::from(vec![Some(12345), None]).with_precision_and_scale(9, 2).unwrap();
        check(Arc::new(decimal), "json 123.45");
        let list = ListArray::from_iter_primitive::<Int32Type, _, _>(vec![Some(vec![Some(1), None]), None]);
        check(Arc::new(list), "json [1,null]");
    }
}
