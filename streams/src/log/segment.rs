//! One file of records: a header, then records back to back.
//!
//! ```text
//! magic 8 | version u32 | salt u32 | first offset u64 | of the file before: first offset u64, length u64 | crc32c u32
//! ```
//! A file is written under another name and renamed when its header is durable, so a header is never torn. It
//! names the file before it, so that a file gone or cut short is noticed when the log is opened.

use super::places::{self, Places, Stored, Walk};
use super::record::{Frame, PREFIX, claims};
use super::{OpenError, ReadError};
use arrow::datatypes::SchemaRef;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: [u8; 8] = *b"tidelog\n";
/// Version 1 had no groups: there each record counts as one of its own, as its bytes say.
pub(super) const VERSION: u32 = 2;
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
    /// Where each workspace's records are; `None` once they are in the file beside this one.
    places: Mutex<Option<Places>>,
    /// Schemas by their position, shared by the batches of all scans.
    schemas: Mutex<HashMap<u64, SchemaRef>>,
}

impl Segment {
    pub(super) fn new(path: PathBuf, header: Header, length: u64) -> Self {
        let length = AtomicU64::new(length);
        Self { path, header, length, index: Mutex::default(), places: Mutex::default(), schemas: Mutex::default() }
    }

    /// The file is empty or read from its beginning, and what is in it will be noted.
    pub(super) fn begin(&self) {
        *self.places.lock() = Some(Places::default());
        self.index.lock().clear();
    }

    /// Notes that the record of `workspace` with `offset` begins at `position`; later ones come later.
    pub(super) fn note(&self, workspace: &str, offset: u64, position: u64) {
        if let Some(places) = self.places.lock().as_mut() {
            places.note(workspace, offset, position);
        }
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

    /// Offset and position of the records of `workspace`, oldest first.
    pub(super) fn places_of(&self, workspace: &str) -> Result<Walk, ReadError> {
        self.with_places(|places| places.of(workspace), |stored| stored.of(workspace))
    }

    /// Puts into `newest` each workspace that has records here, with the offset of its newest.
    pub(super) fn newest(&self, newest: &mut HashMap<String, u64>) -> Result<(), ReadError> {
        fn put<'a>(newest: &mut HashMap<String, u64>, here: impl Iterator<Item = (&'a str, u64)>) {
            for (workspace, offset) in here {
                match newest.get_mut(workspace) {
                    Some(known) => *known = offset.max(*known),
                    None => _ = newest.insert(workspace.to_owned(), offset),
                }
            }
        }
        let newest = Mutex::new(newest); // only one of the two is called
        self.with_places(
            |places| put(&mut newest.lock(), places.newest()),
            |stored| put(&mut newest.lock(), stored.newest()),
        )
    }

    /// Asks memory while the file grows, the file beside it afterwards. When that one is of no use it is made again.
    fn with_places<T>(
        &self,
        memory: impl FnOnce(&Places) -> T,
        file: impl FnOnce(&Stored) -> T,
    ) -> Result<T, ReadError> {
        let mut places = self.places.lock();
        if let Some(places) = places.as_ref() {
            return Ok(memory(places));
        }
        let length = self.length.load(Ordering::Acquire);
        let stored = fs::read(places::path_of(&self.path)).ok();
        if let Some(stored) = stored.and_then(|bytes| Stored::read(bytes, self.header.salt, length)) {
            return Ok(file(&stored));
        }
        let mut found = Places::default();
        let mut reader = self.read_from(self.header.first)?;
        loop {
            let (offset, position) = (reader.expected, reader.position);
            match reader.read() {
                Ok(Some(frame)) if frame.is_internal() => {}
                Ok(Some(frame)) => found.note(frame.workspace, offset, position),
                Ok(None) => break,
                Err(fault) => return Err(self.fault(fault)),
            }
        }
        let answer = memory(&found);
        *places = Some(found);
        drop(places);
        self.complete();
        Ok(answer)
    }

    /// The file grows no more: writes the places beside it and forgets them. What cannot be written stays in memory.
    pub(super) fn complete(&self) {
        let mut places = self.places.lock();
        let Some(complete) = places.as_ref() else { return };
        let path = places::path_of(&self.path);
        match fs::write(&path, complete.encode(self.header.salt, self.length.load(Ordering::Acquire))) {
            Ok(()) => *places = None,
            Err(error) => tracing::warn!(file = %path.display(), %error, "an index of the log stays in memory"),
        }
    }

    /// Removes the file and what is beside it.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(places::path_of(&self.path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::remove_file(&self.path),
        }
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

    /// The file ends at `position`, in front of the record with this offset.
    pub(super) fn ends_before(&self, offset: u64, position: u64) -> ReadError {
        self.fault(Fault::Bad { position, reason: format!("the file ends before offset {offset}") })
    }

    fn io(&self, source: io::Error) -> ReadError {
        ReadError::Io { file: self.path.clone(), source }
    }
}

/// The beginning of a file of records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// Format of the file.
    pub(super) version: u32,
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
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
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
        Ok(Header { version: found, salt: half(12), first: number(16), before: (number(24), number(32)) })
    }
}

/// Makes the checksums of a file right.
#[cfg(any(test, fuzzing))]
pub(crate) fn reseal(file: &mut [u8]) {
    let Some((header, records)) = file.split_at_mut_checked(HEADER) else { return };
    let crc = crc32c::crc32c(&header[..40]);
    header[40..].copy_from_slice(&crc.to_le_bytes());
    super::record::reseal(records, u32::from_le_bytes(header[12..16].try_into().expect("four bytes")));
}

/// Name of the file whose first record has this offset.
pub(crate) fn file_name(first: u64) -> PathBuf {
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
        let next = frame.offset.checked_add(u64::from(!frame.is_internal()));
        self.expected = next.ok_or_else(|| bad("a record has the last offset there is".to_owned()))?;
        self.position += length as u64;
        Ok(Some(frame))
    }

    /// Goes on at the record with this offset, which begins at this position.
    pub(super) fn jump(&mut self, offset: u64, position: u64) -> Result<(), Fault> {
        // within what is buffered this costs nothing
        self.file.seek_relative(position as i64 - self.position as i64).map_err(Fault::Io)?;
        (self.expected, self.position) = (offset, position);
        Ok(())
    }
}

/// Records at the end of a file that a crash left incomplete, and with them the end of the file.
#[derive(Debug)]
pub(super) struct TornTail {
    pub(super) position: u64,
    pub(super) bytes: u64,
    pub(super) reason: String,
}

/// What a whole file turned out to hold.
pub(super) struct Verified {
    /// Offset after the last record before any fault.
    pub(super) next: u64,
    /// A seal is the last, or there is no record.
    pub(super) sealed: bool,
    pub(super) torn: Option<TornTail>,
}

impl Segment {
    /// Reads the whole file.
    ///
    /// A disk that loses power keeps any of the blocks that it was given since the last sync, so that good records
    /// can stand behind a torn one. All of these belong to the group that was on its way then. A good record of a
    /// later group means that the bad one was durable and changed afterwards: that is corruption.
    pub(super) fn verify(&self) -> Result<Verified, OpenError> {
        let io = |source| OpenError::Io { file: self.path.clone(), source };
        let Header { salt, first, .. } = self.header;
        self.begin();
        let mut reader = Reader::open(&self.path, salt, first, HEADER as u64).map_err(io)?;
        let mut sealed = true;
        loop {
            let (expected, position) = (reader.expected, reader.position);
            let (position, reason) = match reader.read() {
                Ok(Some(frame)) => {
                    sealed = frame.is_seal();
                    if !frame.is_internal() {
                        self.note(frame.workspace, expected, position);
                    }
                    continue;
                }
                Ok(None) => return Ok(Verified { next: expected, sealed, torn: None }),
                Err(Fault::Io(source)) => return Err(io(source)),
                Err(Fault::Bad { position, reason }) => (position, reason),
            };
            let mut rest = Vec::new();
            let mut file = File::open(&self.path).map_err(io)?;
            file.seek(SeekFrom::Start(position)).and_then(|_| file.read_to_end(&mut rest)).map_err(io)?;
            return match later_group_in(&rest, expected, salt) {
                Some(after) => {
                    let good = position + after as u64;
                    let reason = format!("{reason}, and what was written after it is intact at byte {good}");
                    Err(OpenError::Corrupt { file: self.path.clone(), position, reason })
                }
                None => {
                    let torn = Some(TornTail { position, bytes: rest.len() as u64, reason });
                    Ok(Verified { next: expected, sealed, torn })
                }
            };
        }
    }
}

/// Where in `bytes`, which begin with a bad record, the first intact one begins that was written after the bad one
/// was durable. Its offset is `expected` or one that could follow it here.
fn later_group_in(bytes: &[u8], expected: u64, salt: u32) -> Option<usize> {
    let offsets = expected..=expected.saturating_add((bytes.len() / PREFIX) as u64 + 1);
    let mut at = 1;
    while at + PREFIX < bytes.len() {
        // the offset sorts out nearly all places, so a checksum is hardly ever computed in vain
        let frame = claims(&bytes[at..])
            .filter(|(_, offset)| offsets.contains(offset))
            .and_then(|(length, _)| bytes.get(at..at + length))
            .and_then(|record| Some((record.len(), Frame::read(record, salt)?.group)));
        match frame {
            Some((_, group)) if group < at as u64 => return Some(at),
            Some((length, _)) => at += length,
            None => at += 1,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::record::Draft;
    use engine::event::Micros;

    #[test]
    fn a_record_with_the_last_offset_there_is_is_no_record() {
        let mut records = Vec::new();
        let draft = Draft::advance(&"w".parse().unwrap(), &"market.trades".parse().unwrap(), Micros(0));
        draft.seal(u64::MAX, 0, 7, &mut records);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("records");
        fs::write(&path, records).unwrap();
        let mut reader = Reader::open(&path, 7, u64::MAX, 0).unwrap();
        assert!(matches!(reader.read(), Err(Fault::Bad { position: 0, .. })));
    }
}
