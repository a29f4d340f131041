//! Rows of delimited text with a header line.

use super::row::{Layout, RowFault, Value};
use super::source::Source;
use super::{Chunk, Context, Failure, ReadError, Rows};
use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(super) struct CsvRows {
    source: Source,
    reader: csv::Reader<Budgeted>,
    record: csv::ByteRecord,
    layout: Layout,
    row_bytes_max: usize,
    budget: Arc<AtomicUsize>,
}

/// Refuses to read on when one row is too long: a quote that is never closed would else take the whole file
/// into memory.
struct Budgeted {
    bytes: Box<dyn BufRead + Send>,
    budget: Arc<AtomicUsize>,
}

/// Says that the budget is used up; known by its type when it comes back out of the CSV parser.
#[derive(Debug, thiserror::Error)]
#[error("row too long")]
struct OverBudget;

impl Read for Budgeted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let budget = self.budget.load(Ordering::Relaxed);
        if budget == 0 {
            return Err(io::Error::other(OverBudget));
        }
        let count = self.bytes.read(buffer)?;
        self.budget.store(budget.saturating_sub(count), Ordering::Relaxed);
        Ok(count)
    }
}

const BUFFER_BYTES: usize = 64 << 10;

impl CsvRows {
    pub fn open(source: Source, delimiter: u8, context: &Context) -> Result<CsvRows, ReadError> {
        let row_bytes_max = context.line_bytes_max;
        let budget = Arc::new(AtomicUsize::new(row_bytes_max + BUFFER_BYTES));
        let bytes = Budgeted { bytes: source.bytes()?, budget: budget.clone() };
        let mut reader =
            csv::ReaderBuilder::new().delimiter(delimiter).buffer_capacity(BUFFER_BYTES).from_reader(bytes);
        let header = match reader.byte_headers() {
            Ok(header) => header.clone(),
            Err(error) => return Err(fatal(&source, error, 1, row_bytes_max)),
        };
        let mut columns = Vec::with_capacity(header.len());
        for (i, name) in header.iter().enumerate() {
            let name = std::str::from_utf8(name).map_err(|_| ReadError::Row {
                file: source.name.clone(),
                unit: "line",
                number: 1,
                fault: RowFault::NotUtf8 { column: (i + 1).to_string() },
            })?;
            columns.push(name.trim().to_owned());
        }
        let layout = context.layout(&source, &columns)?;
        Ok(CsvRows { source, reader, record: csv::ByteRecord::new(), layout, row_bytes_max, budget })
    }
}

fn fatal(source: &Source, error: csv::Error, line: u64, row_bytes_max: usize) -> ReadError {
    match error.into_kind() {
        csv::ErrorKind::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<OverBudget>()) => {
            ReadError::OpenQuote { file: source.name.clone(), line, limit: row_bytes_max }
        }
        csv::ErrorKind::Io(error) => source.failed(error),
        other => source.failed(io::Error::other(format!("{other:?}"))),
    }
}

impl Rows for CsvRows {
    fn next(&mut self, chunk: &mut Chunk) -> Result<bool, Failure> {
        // What the parser has buffered already was read on an earlier row's budget.
        self.budget.store(self.row_bytes_max + BUFFER_BYTES, Ordering::Relaxed);
        let line = self.reader.position().line();
        match self.reader.read_byte_record(&mut self.record) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                if let csv::ErrorKind::UnequalLengths { pos, expected_len, len } = error.kind() {
                    let line = pos.as_ref().map_or(line, csv::Position::line);
                    return Err(Failure::Row(line, RowFault::Ragged { found: *len, expected: *expected_len }));
                }
                return Err(Failure::Fatal(fatal(&self.source, error, line, self.row_bytes_max)));
            }
        }
        let line = self.record.position().map_or(line, csv::Position::line);
        if self.record.as_slice().len() > self.row_bytes_max {
            return Err(Failure::Row(line, RowFault::TooLong { limit: self.row_bytes_max }));
        }
        let record = &self.record;
        let written = self.layout.write(chunk, |field| match std::str::from_utf8(&record[field.source]) {
            Ok(text) => Ok(Value::Text(text)),
            Err(_) => Err(RowFault::NotUtf8 { column: field.name().to_owned() }),
        });
        written.map(|()| true).map_err(|fault| Failure::Row(line, fault))
    }

    fn unit(&self) -> &'static str {
        "line"
    }
}
