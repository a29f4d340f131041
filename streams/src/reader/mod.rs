//! Files as events: CSV, NDJSON, JSON, Parquet and Excel, plain or compressed, become the NDJSON that ingest takes.
//! Memory stays bounded whatever the file: a chunk, a batch or a row at a time, and for Excel a stated maximum.
//! Event time is written as integer microseconds since the epoch (`ts_unit=us`), a date near 1970 as RFC 3339.

mod csv;
mod json;
mod mapping; // which columns are taken, under which names
mod parquet;
mod row; // one row as one event, typed by the stream
mod source; // what a file is, decompressed and counted
pub(crate) mod time; // instants as files and exchanges write them
mod xlsx;

pub use mapping::{Mapping, MappingError};
pub use row::RowFault;

use crate::schema::StreamSchema;
use engine::event::Micros;
use row::Layout;
use source::{Format, Source};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The longest event that is usually accepted, in bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// A chunk is full at this many events or bytes: large enough that its costs vanish in its events,
/// small enough for one request.
const CHUNK_EVENTS: usize = 8192;
const CHUNK_BYTES: usize = 1 << 20;

/// Some events of a file, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// NDJSON: one event a line, every line ended.
    pub lines: Vec<u8>,
    /// Where each event ends in `lines` and when it happened; as many as there are events.
    pub events: Vec<Mark>,
}

/// One event of a [`Chunk`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mark {
    /// Byte after its line break.
    pub end: usize,
    /// Event time; `None` when the row has none, so that it is the time of arrival.
    pub ts: Option<Micros>,
}

/// Why a file, or a row of it, cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot open `{file}`: {source}; check the path and its permissions")]
    Open { file: Arc<str>, source: std::io::Error },
    #[error(
        "`{file}` has no known extension; known are .csv, .tsv, .ndjson, .jsonl, .json, .parquet and .xlsx, each also \
         with .gz or .zst"
    )]
    Extension { file: Arc<str> },
    #[error("cannot decompress `{file}` into a temporary file: {source}; make room there or set TMPDIR")]
    Unpack { file: Arc<str>, source: std::io::Error },
    #[error("`{file}` is named as {named}, but its first bytes are {found}; rename it")]
    FirstBytes { file: Arc<str>, named: &'static str, found: &'static str },
    #[error("reading `{file}` failed at byte {at}: {source}; read it again from a healthy disk")]
    Io { file: Arc<str>, at: u64, source: std::io::Error },
    #[error("`{file}` ends at byte {at} in the middle of its {codec} data; copy or download it again")]
    Truncated { file: Arc<str>, at: u64, codec: &'static str },
    #[error("`{file}` has broken {codec} data near byte {at} ({detail}); copy or download it again")]
    Corrupt { file: Arc<str>, at: u64, codec: &'static str, detail: String },
    #[error("`{file}` is no readable {format} file: {detail}; write it anew or export it as CSV")]
    Format { file: Arc<str>, format: &'static str, detail: String },
    #[error("`{file}` unpacks to more than {limit} bytes; export it as CSV, which is read piece by piece")]
    TooLarge { file: Arc<str>, limit: u64 },
    #[error("`{file}` has no column `{column}`; it has {found}")]
    MissingColumn { file: Arc<str>, column: String, found: String },
    #[error("`{file}` line {line}: the row is longer than {limit} bytes; a quote is probably not closed")]
    OpenQuote { file: Arc<str>, line: u64, limit: usize },
    #[error("`{file}` {unit} {number}: {fault}")]
    Row { file: Arc<str>, unit: &'static str, number: u64, fault: RowFault },
}

impl ReadError {
    /// Whether only one row is lost and the reader goes on with the next.
    pub fn is_row(&self) -> bool {
        matches!(self, ReadError::Row { .. })
    }
}

/// What stopped a [`Rows`]: one row (its number, counted from 1), or the file.
enum Failure {
    Row(u64, RowFault),
    Fatal(ReadError),
}

/// The rows of one format, written as events one after another.
trait Rows: Send {
    /// Appends the next event to `chunk`; false at the end of the file. On a failure `chunk` is as before.
    fn next(&mut self, chunk: &mut Chunk) -> Result<bool, Failure>;
    /// What a row is called in this format.
    fn unit(&self) -> &'static str;
}

/// What the caller wants of a file.
struct Context {
    mapping: Mapping,
    schema: StreamSchema,
    line_bytes_max: usize,
}

impl Context {
    fn layout(&self, source: &Source, columns: &[String]) -> Result<Layout, ReadError> {
        Layout::of_columns(&self.mapping, &self.schema, columns).map_err(|missing| ReadError::MissingColumn {
            file: source.name.clone(),
            column: missing.0,
            found: columns.iter().map(|column| format!("`{column}`")).collect::<Vec<_>>().join(", "),
        })
    }
}

/// A file as chunks of events. Iterates to the end of the file or its first fatal error; a bad row
/// ([`ReadError::is_row`]) is an item of its own, and the next item goes on behind it.
pub struct Reader {
    file: Arc<str>,
    rows: Box<dyn Rows>,
    bytes_read: Arc<AtomicU64>,
    bytes_total: u64,
    /// Met after the events of the chunk that was handed out last.
    pending: Option<ReadError>,
    ended: bool,
}

impl Reader {
    /// Opens `path` for a stream of `schema`. The format and its compression are those of the file's name,
    /// checked against its first bytes. A row longer than `line_bytes_max` is a bad row.
    pub fn open(
        path: &Path,
        schema: &StreamSchema,
        mapping: Mapping,
        line_bytes_max: usize,
    ) -> Result<Reader, ReadError> {
        let source = Source::open(path)?;
        let context = Context { mapping, schema: schema.clone(), line_bytes_max };
        let (file, bytes_read, bytes_total) = (source.name.clone(), source.bytes_read.clone(), source.bytes_total);
        let rows: Box<dyn Rows> = match source.format {
            Format::Csv { delimiter } => Box::new(csv::CsvRows::open(source, delimiter, &context)?),
            Format::Ndjson => Box::new(json::JsonRows::lines(source, &context)?),
            Format::Json => Box::new(json::JsonRows::values(source, &context)?),
            Format::Parquet => Box::new(parquet::ParquetRows::open(source, &context)?),
            Format::Xlsx => Box::new(xlsx::XlsxRows::open(source, &context)?),
        };
        Ok(Reader { file, rows, bytes_read, bytes_total, pending: None, ended: false })
    }

    /// Bytes of the file that are read so far, compressed ones where it is compressed; for Parquet and Excel
    /// the share of its rows.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Bytes of the file.
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total
    }
}

impl Iterator for Reader {
    type Item = Result<Chunk, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.pending.take() {
            return Some(Err(error));
        }
        let mut chunk = Chunk::default();
        while !self.ended && chunk.events.len() < CHUNK_EVENTS && chunk.lines.len() < CHUNK_BYTES {
            let error = match self.rows.next(&mut chunk) {
                Ok(true) => continue,
                Ok(false) => {
                    self.ended = true;
                    break;
                }
                Err(Failure::Row(number, fault)) => {
                    ReadError::Row { file: self.file.clone(), unit: self.rows.unit(), number, fault }
                }
                Err(Failure::Fatal(error)) => {
                    self.ended = true;
                    error
                }
            };
            if chunk.events.is_empty() {
                return Some(Err(error));
            }
            self.pending = Some(error);
            break;
        }
        (!chunk.events.is_empty()).then_some(Ok(chunk))
    }
}

#[cfg(test)]
mod tests;
