//! One file of records: a header, then records back to back.
//!
//! ```text
//! magic 8 | version u32 | salt u32 | first offset u64 | of the file before: first offset u64, length u64 | crc32c u32
//! ```
//! A file is written under another name and renamed when its header is durable, so a header is never torn. It
//! names the file before it, so that a file gone or cut short is noticed when the log is opened.

use super::record::{Frame, PREFIX, claims};
use super::{OpenError, ReadError};
use arrow::datatypes::SchemaRef;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

const MAGIC: [u8; 8] = *b"tidelog\n";
const VERSION: u32 = 1;
/// Bytes in front of the first record.
pub(super) const HEADER: usize = 44;
/// Bytes between two entries of an index: what a scan that begins anywhere reads in vain at most.
const INDEX_STEP: u64 = 64 << 10;
const READ_BUFFER: usize = 256 << 10;

/// What the log knows of one of its files.
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) header: Header,
    /// Durable bytes.
    pub(super) length: AtomicU64,
    /// (offset, position) of some records, in order; empty for a file that was complete when the log was opened.
    index: Mutex<Vec<(u64, u64)>>,
    /// Schemas by their position, shared by the batches of all scans.
    schemas: Mutex<HashMap<u64, SchemaRef>>,
}

impl Segment {
    pub(super) fn new(path: PathBuf, header: Header, length: u64) -> Self {
        let length = AtomicU64::new(length);
        Self { path, header, length, index: Mutex::default(), schemas: Mutex::default() }
    }

    /// Notes that the record with `offset` begins at `position`; later ones come later.
    pub(super) fn note(&self, offset: u64, position: u64) {
        let mut index = self.index.lock();
        if index.last().is_none_or(|(_, last)| position >= last + INDEX_STEP) {
            index.push((offset, position));
        }
    }

    /// A reader that begins at a known record, `from` or one before it.
    pub(super) fn read_from(&self, from: u64) -> Result<Reader, ReadError> {
        let (offset, position) = {
            let index = self.index.lock();
            let known = index.partition_point(|(offset, _)| *offset <= from);
            known.checked_sub(1).map_or((self.header.first, HEADER as u64), |i| index[i])
        };
        Reader::open(&self.path, self.header.salt, offset, position).map_err(|source| self.io(source))
    }

    /// The schema whose record is at `position`.
    pub(super) fn schema(&self, position: u64) -> Result<SchemaRef, ReadError> {
        let mut schemas = self.schemas.lock();
        if let Some(schema) = schemas.get(&position) {
            return Ok(schema.clone());
        }
        let corrupt = |reason| ReadError::Corrupt { file: self.path.clone(), position, reason };
        let mut reader = Reader::open(&self.path, self.header.salt, 0, position).map_err(|source| self.io(source))?;
        let schema = match reader.read_intact() {
            Ok(Some(frame)) => frame.decode_schema().map_err(corrupt)?,
            Ok(None) => return Err(corrupt("a schema was expected, the file ends".to_owned())),
            Err(fault) => return Err(self.fault(fault)),
        };
        schemas.insert(position, schema.clone());
        Ok(schema)
    }

    /// `fault` as what a scan says of it.
    pub(super) fn fault(&self, fault: Fault) -> ReadError {
        match fault {
            Fault::Io(source) => self.io(source),
            Fault::Bad { position, reason } => ReadError::Corrupt { file: self.path.clone(), position, reason },
        }
    }

    fn io(&self, source: io::Error) -> ReadError {
        ReadError::Io { file: self.path.clone(), source }
    }
}

/// The beginning of a file of records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// Part of every checksum of the file; random.
    pub(super) salt: u32,
    /// Offset of the first record, also the file's name.
    pub(super) first: u64,
    /// First offset and length of the file before, `u64::MAX` and 0 for the first file of a log.
    pub(super) before: (u64, u64),
}

impl Header {
    pub(super) const NO_FILE_BEFORE: (u64, u64) = (u64::MAX, 0);

    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.salt.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.before.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.before.1.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..40]);
        bytes[40..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn read(path: &Path) -> Result<Header, OpenError> {
        let corrupt =
            |position, reason: &str| OpenError::Corrupt { file: path.to_owned(), position, reason: reason.to_owned() };
        let mut bytes = [0; HEADER];
        match File::open(path).and_then(|mut file| file.read_exact(&mut bytes)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(corrupt(0, "the file is shorter than its header"));
            }
            result => result.map_err(|source| OpenError::Io { file: path.to_owned(), source })?,
        }
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if bytes[..8] != MAGIC {
            return Err(corrupt(0, "this is not a log file"));
        }
        // before the checksum: a later version may have another header
        let found = half(8);
        if found > VERSION {
            return Err(OpenError::Newer { file: path.to_owned(), found, supported: VERSION });
        }
        if crc32c::crc32c(&bytes[..40]) != half(40) {
            return Err(corrupt(8, "the checksum of the header is wrong"));
        }
        if path.file_name() != file_name(number(16)).file_name() {
            return Err(corrupt(16, &format!("the first offset is {}, the file's name says another", number(16))));
        }
        Ok(Header { salt: half(12), first: number(16), before: (number(24), number(32)) })
    }
}

/// Name of the file whose first record has this offset.
pub(super) fn file_name(first: u64) -> PathBuf {
    format!("{first:020}.log").into()
}

/// Why a reader cannot go on.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    Bad { position: u64, reason: String },
}

/// Reads the records of one file in order and checks that they are intact and without gap.
pub(super) struct Reader {
    file: BufReader<File>,
    salt: u32,
    /// Offset of the next record.
    pub(super) expected: u64,
    /// Where the next record begins; where the bad one began after a fault.
    pub(super) position: u64,
    /// Bytes of the file when it was opened. A record that claims more is not believed, nor memory spent on it.
    end: u64,
    record: Vec<u8>,
}

impl Reader {
    pub(super) fn open(path: &Path, salt: u32, expected: u64, position: u64) -> io::Result<Reader> {
        let mut file = File::open(path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(position))?;
        let file = BufReader::with_capacity(READ_BUFFER.min(end.saturating_sub(position) as usize), file);
        Ok(Reader { file, salt, expected, position, end, record: Vec::new() })
    }

    /// The next record, `None` at the end of the file. Schema records come too, with the offset of the next.
    pub(super) fn read(&mut self) -> Result<Option<Frame<'_>>, Fault> {
        let (position, expected) = (self.position, self.expected);
        let frame = self.read_intact()?;
        match &frame {
            Some(frame) if frame.offset != expected => {
                let reason = format!("a record has offset {}, {expected} comes here", frame.offset);
                Err(Fault::Bad { position, reason })
            }
            _ => Ok(frame),
        }
    }

    /// As [`read`](Reader::read), whatever the offset.
    fn read_intact(&mut self) -> Result<Option<Frame<'_>>, Fault> {
        let position = self.position;
        let bad = |reason| Fault::Bad { position, reason };
        let left = self.end.saturating_sub(position);
        if left == 0 {
            return Ok(None);
        }
        if left < PREFIX as u64 {
            return Err(bad(format!("the file ends {left} bytes into a record")));
        }
        self.record.resize(PREFIX, 0);
        self.file.read_exact(&mut self.record).map_err(Fault::Io)?;
        let (length, _) = claims(&self.record).ok_or_else(|| bad("no record begins like this".to_owned()))?;
        if length as u64 > left {
            return Err(bad(format!("a record claims {length} bytes, the file has {left} more")));
        }
        self.record.resize(length, 0);
        self.file.read_exact(&mut self.record[PREFIX..]).map_err(Fault::Io)?;
        let frame =
            Frame::read(&self.record, self.salt).ok_or_else(|| bad("the checksum of a record is wrong".to_owned()))?;
        self.position += length as u64;
        self.expected = if frame.is_schema() { frame.offset } else { frame.offset + 1 };
        Ok(Some(frame))
    }
}

/// A record at the end of a file that a crash left incomplete, and with it the end of the file.
#[derive(Debug)]
pub(super) struct TornTail {
    pub(super) position: u64,
    pub(super) bytes: u64,
    pub(super) reason: String,
}

impl Segment {
    /// Reads the whole file: the offset after its last intact record, and what is torn behind it. A bad record
    /// with a good one behind it was not torn by a crash but changed later: that is corruption.
    pub(super) fn verify(&self) -> Result<(u64, Option<TornTail>), OpenError> {
        let io = |source| OpenError::Io { file: self.path.clone(), source };
        let Header { salt, first, .. } = self.header;
        let mut reader = Reader::open(&self.path, salt, first, HEADER as u64).map_err(io)?;
        loop {
            let (expected, position) = (reader.expected, reader.position);
            let (position, reason) = match reader.read() {
                Ok(Some(_)) => {
                    self.note(expected, position);
                    continue;
                }
                Ok(None) => return Ok((expected, None)),
                Err(Fault::Io(source)) => return Err(io(source)),
                Err(Fault::Bad { position, reason }) => (position, reason),
            };
            let mut rest = Vec::new();
            let mut file = File::open(&self.path).map_err(io)?;
            file.seek(SeekFrom::Start(position)).and_then(|_| file.read_to_end(&mut rest)).map_err(io)?;
            return match good_record_in(&rest[1..], expected, salt) {
                Some(after) => {
                    let good = position + 1 + after as u64;
                    let reason = format!("{reason}, and a good record follows at byte {good}");
                    Err(OpenError::Corrupt { file: self.path.clone(), position, reason })
                }
                None => Ok((expected, Some(TornTail { position, bytes: rest.len() as u64, reason }))),
            };
        }
    }
}

/// Where in `bytes` the first intact record begins whose offset is `expected` or one that could follow it here.
fn good_record_in(bytes: &[u8], expected: u64, salt: u32) -> Option<usize> {
    let offsets = expected..=expected.saturating_add((bytes.len() / PREFIX) as u64 + 1);
    (0..bytes.len().saturating_sub(PREFIX)).find(|&at| {
        // the offset sorts out nearly all places, so a checksum is hardly ever computed in vain
        claims(&bytes[at..]).is_some_and(|(length, offset)| {
            offsets.contains(&offset)
                && bytes.get(at..at + length).is_some_and(|record| Frame::read(record, salt).is_some())
        })
    })
}
