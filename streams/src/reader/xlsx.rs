//! Rows of the first worksheet of an Excel workbook. The format cannot be streamed as text can: its strings
//! stand apart from its cells, so the rows are made at once, within [`BYTES_MAX`].

use super::row::{Field, Layout, RowFault, Value};
use super::source::Source;
use super::time::instant_of_text;
use super::{Chunk, Context, Failure, ReadError, Rows};
use crate::foreign::caught;
use calamine::{DataRef, ExcelDateTime, Reader, SheetType, Xlsx};
use engine::event::Micros;
use std::collections::{HashMap, VecDeque};
use std::io::{self, BufReader, Read, Seek};

/// The most that a workbook may unpack to, and the most that its events may take: 256 MiB each. A small file
/// can unpack to thousands of times its size, and one long string can stand in a million cells.
pub(super) const BYTES_MAX: u64 = 256 << 20;

/// Events of a workbook, made when it is opened and handed out one by one.
pub(super) struct XlsxRows {
    source: Source,
    rows: VecDeque<Row>,
    /// All events, one after another; the rows say where each one ends.
    lines: Vec<u8>,
    taken: usize,
    count: usize,
}

enum Row {
    Event(super::Mark),
    Fault(u64, RowFault),
}

impl XlsxRows {
    pub fn open(source: Source, context: &Context) -> Result<XlsxRows, ReadError> {
        // The libraries that read zip and XML meet hostile files here: a panic of theirs is a broken file.
        let made = caught(|| make(&source, context));
        let (chunk, faults) = made.unwrap_or_else(|| Err(broken(&source, "it cannot be read")))?;
        let mut rows: VecDeque<Row> = VecDeque::with_capacity(chunk.events.len() + faults.len());
        let mut faults = faults.into_iter().peekable();
        for (i, mark) in chunk.events.into_iter().enumerate() {
            while let Some((_, number, fault)) = faults.next_if(|(before, ..)| *before <= i) {
                rows.push_back(Row::Fault(number, fault));
            }
            rows.push_back(Row::Event(mark));
        }
        rows.extend(faults.map(|(_, number, fault)| Row::Fault(number, fault)));
        let count = rows.len();
        Ok(XlsxRows { source, rows, lines: chunk.lines, taken: 0, count })
    }
}

impl Rows for XlsxRows {
    fn next(&mut self, chunk: &mut Chunk) -> Result<bool, Failure> {
        let share = 1.0 - self.rows.len() as f64 / self.count.max(1) as f64;
        self.source.set_read((self.source.bytes_total as f64 * share) as u64);
        match self.rows.pop_front() {
            None => {
                self.source.set_read(self.source.bytes_total);
                Ok(false)
            }
            Some(Row::Fault(number, fault)) => Err(Failure::Row(number, fault)),
            Some(Row::Event(mark)) => {
                chunk.lines.extend_from_slice(&self.lines[self.taken..mark.end]);
                self.taken = mark.end;
                chunk.events.push(super::Mark { end: chunk.lines.len(), ts: mark.ts });
                Ok(true)
            }
        }
    }

    fn unit(&self) -> &'static str {
        "row"
    }
}

fn broken(source: &Source, detail: impl ToString) -> ReadError {
    ReadError::Format { file: source.name.clone(), format: "xlsx", detail: detail.to_string() }
}

/// Unpacks every part of the archive once, to nowhere: what the archive says about its sizes may be a lie.
fn check_unpacked_size(source: &Source) -> Result<(), ReadError> {
    let file = source.file.try_clone().map_err(|error| source.failed(error))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|error| broken(source, error))?;
    let mut left = BYTES_MAX;
    for index in 0..archive.len() {
        let part = archive.by_index(index).map_err(|error| broken(source, error))?;
        let size = io::copy(&mut part.take(left + 1), &mut io::sink()).map_err(|error| broken(source, error))?;
        left = left.checked_sub(size).ok_or_else(|| too_large(source))?;
    }
    let mut file = &source.file;
    file.rewind().map_err(|error| source.failed(error))
}

fn too_large(source: &Source) -> ReadError {
    ReadError::TooLarge { file: source.name.clone(), limit: BYTES_MAX }
}

type Faults = Vec<(usize, u64, RowFault)>;

/// All events of the first worksheet; a fault knows how many events stand before it.
fn make(source: &Source, context: &Context) -> Result<(Chunk, Faults), ReadError> {
    check_unpacked_size(source)?;
    let file = source.file.try_clone().map_err(|error| source.failed(error))?;
    let mut workbook = Xlsx::new(BufReader::new(file)).map_err(|error| broken(source, error))?;
    let sheet = workbook.sheets_metadata().iter().find(|sheet| sheet.typ == SheetType::WorkSheet);
    let sheet = sheet.ok_or_else(|| broken(source, "it has no worksheet"))?.name.clone();
    let mut cells = workbook.worksheet_cells_reader(&sheet).map_err(|error| broken(source, error))?;

    let mut sheet = Sheet { source, context, table: None, chunk: Chunk::default(), faults: Vec::new() };
    let mut row: Vec<(u32, DataRef<'_>)> = Vec::new();
    let mut number = 0;
    while let Some(cell) = cells.next_cell().map_err(|error| broken(source, error))? {
        let (at, column) = cell.get_position();
        if at != number {
            sheet.row(number, &row)?;
            row.clear();
            number = at;
        }
        if !matches!(cell.get_value(), DataRef::Empty) {
            row.push((column, cell.get_value().clone()));
        }
    }
    sheet.row(number, &row)?;
    Ok((sheet.chunk, sheet.faults))
}

struct Sheet<'a> {
    source: &'a Source,
    context: &'a Context,
    /// Known after the first row that has cells: the header.
    table: Option<Table>,
    chunk: Chunk,
    faults: Faults,
}

struct Table {
    layout: Layout,
    /// Index among the header's columns of a column of the sheet.
    columns: HashMap<u32, usize>,
}

impl Sheet<'_> {
    fn row(&mut self, number: u32, cells: &[(u32, DataRef<'_>)]) -> Result<(), ReadError> {
        if cells.is_empty() {
            return Ok(());
        }
        let Some(table) = &self.table else {
            let names: Vec<String> = cells.iter().map(|(_, cell)| header_name(cell)).collect();
            let columns = cells.iter().enumerate().map(|(i, (column, _))| (*column, i)).collect();
            let layout = self.context.layout(self.source, &names)?;
            self.table = Some(Table { layout, columns });
            return Ok(());
        };
        let mut values: Vec<Option<&DataRef<'_>>> = vec![None; table.columns.len()];
        for (column, cell) in cells {
            if let Some(index) = table.columns.get(column) {
                values[*index] = Some(cell);
            }
        }
        // One long shared string may stand in every cell of a row: measured before it is written.
        let limit = self.context.line_bytes_max;
        let wanted = table.layout.fields.iter().filter_map(|field| values[field.source]);
        let written = match wanted.map(text_bytes).sum::<usize>() > limit {
            true => Err(RowFault::TooLong { limit }),
            false => table.layout.write(&mut self.chunk, |field| {
                values[field.source].map_or(Ok(Value::Null), |cell| value(field, cell))
            }),
        };
        if let Err(fault) = written {
            self.faults.push((self.chunk.events.len(), u64::from(number) + 1, fault));
        }
        let bytes = self.chunk.lines.len() + (self.faults.len() + self.chunk.events.len()) * size_of::<Row>();
        if bytes as u64 > BYTES_MAX { Err(too_large(self.source)) } else { Ok(()) }
    }
}

fn header_name(cell: &DataRef<'_>) -> String {
    match cell {
        DataRef::String(text) => text.trim().to_owned(),
        DataRef::SharedString(text) => text.trim().to_owned(),
        DataRef::Int(n) => n.to_string(),
        DataRef::Float(x) => x.to_string(),
        _ => String::new(),
    }
}

fn text_bytes(cell: &DataRef<'_>) -> usize {
    match cell {
        DataRef::String(text) => text.len(),
        DataRef::SharedString(text) => text.len(),
        _ => 0,
    }
}

fn value<'a>(field: &Field, cell: &'a DataRef<'_>) -> Result<Value<'a>, RowFault> {
    Ok(match cell {
        DataRef::Int(n) => Value::Int(*n),
        DataRef::Float(x) => Value::Float(*x),
        DataRef::Bool(yes) => Value::Bool(*yes),
        DataRef::String(text) | DataRef::DurationIso(text) => Value::Text(text),
        DataRef::SharedString(text) => Value::Text(text),
        DataRef::DateTimeIso(text) => instant_of_text(text).map_or(Value::Text(text), Value::Time),
        DataRef::DateTime(time) if time.is_duration() => Value::Float(time.as_f64()),
        DataRef::DateTime(time) => instant(time).map_or(Value::Null, Value::Time),
        DataRef::Empty => Value::Null,
        DataRef::Error(error) => {
            let (column, text) = (field.name().to_owned(), error.to_string());
            return Err(RowFault::Value { column, text, wanted: "a value: its formula failed" });
        }
    })
}

/// Excel's local date and time, taken as UTC.
fn instant(time: &ExcelDateTime) -> Option<Micros> {
    let (year, month, day, hour, minute, second, milli) = time.to_ymd_hms_milli();
    let date = chrono::NaiveDate::from_ymd_opt(year.into(), month.into(), day.into())?;
    let time = date.and_hms_milli_opt(hour.into(), minute.into(), second.into(), milli.into())?;
    Some(Micros(time.and_utc().timestamp_micros()))
}
