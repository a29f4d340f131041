//! The bytes of a file: what it is by name and first bytes, decompressed on the way, counted for the progress bar.

use super::ReadError;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What rows look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Csv { delimiter: u8 },
    Ndjson,
    Json,
    Parquet,
    Xlsx,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Codec {
    Plain,
    Gzip,
    Zstd,
}

impl Codec {
    fn name(self) -> &'static str {
        match self {
            Codec::Plain => "plain",
            Codec::Gzip => "gzip",
            Codec::Zstd => "zstd",
        }
    }
}

/// The most memory a zstd window may take: 2^27 = 128 MiB, what `zstd` itself accepts without `--long`.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// An opened file and how far it is read.
pub(super) struct Source {
    /// As the caller named it, for errors.
    pub name: Arc<str>,
    pub format: Format,
    pub codec: Codec,
    pub file: File,
    pub bytes_total: u64,
    pub bytes_read: Arc<AtomicU64>,
}

impl Source {
    pub fn open(path: &Path) -> Result<Source, ReadError> {
        let name: Arc<str> = path.display().to_string().into();
        let open = |source| ReadError::Open { file: name.clone(), source };
        let (format, codec) = kind_by_name(path).ok_or_else(|| ReadError::Extension { file: name.clone() })?;
        let mut file = File::open(path).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        if !metadata.is_file() {
            return Err(open(io::Error::other("not a file")));
        }
        let mut first = Vec::with_capacity(8);
        (&file).take(8).read_to_end(&mut first).map_err(open)?;
        file.rewind().map_err(open)?;
        check_first_bytes(&name, format, codec, &first)?;
        let source = Source { name, format, codec, file, bytes_total: metadata.len(), bytes_read: Arc::default() };
        let needs_seek = matches!(format, Format::Parquet | Format::Xlsx);
        if needs_seek && codec != Codec::Plain { source.unpacked() } else { Ok(source) }
    }

    /// The same file decompressed into a temporary one: what is read from its end cannot be read as it comes.
    fn unpacked(self) -> Result<Source, ReadError> {
        let full = |source| ReadError::Unpack { file: self.name.clone(), source };
        let mut file = tempfile::tempfile().map_err(full)?;
        let mut bytes = self.bytes()?;
        let mut first = Vec::with_capacity(8);
        loop {
            let part = bytes.fill_buf().map_err(|error| self.failed(error))?;
            if part.is_empty() {
                break;
            }
            first.extend_from_slice(&part[..part.len().min(8 - first.len())]);
            file.write_all(part).map_err(full)?;
            let count = part.len();
            bytes.consume(count);
        }
        file.rewind().map_err(full)?;
        check_first_bytes(&self.name, self.format, Codec::Plain, &first)?;
        // progress is told of the file that was named
        Ok(Source { codec: Codec::Plain, file, bytes_read: Arc::default(), ..self })
    }

    /// The decompressed bytes, counted as the file's own bytes are read.
    pub fn bytes(&self) -> Result<Box<dyn BufRead + Send>, ReadError> {
        let file = self.file.try_clone().map_err(|error| self.failed(error))?;
        let counted = BufReader::with_capacity(64 << 10, Counted { file, read: self.bytes_read.clone() });
        Ok(match self.codec {
            Codec::Plain => Box::new(counted),
            Codec::Gzip => Box::new(BufReader::with_capacity(64 << 10, flate2::bufread::MultiGzDecoder::new(counted))),
            Codec::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(counted).map_err(|error| self.failed(error))?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(|error| self.failed(error))?;
                Box::new(BufReader::with_capacity(64 << 10, decoder))
            }
        })
    }

    /// What a failure to read on means for this file.
    pub fn failed(&self, error: io::Error) -> ReadError {
        let (file, at) = (self.name.clone(), self.bytes_read.load(Ordering::Relaxed));
        match (self.codec, error.kind()) {
            (Codec::Plain, _) => ReadError::Io { file, at, source: error },
            (codec, io::ErrorKind::UnexpectedEof) => ReadError::Truncated { file, at, codec: codec.name() },
            (codec, _) => ReadError::Corrupt { file, at, codec: codec.name(), detail: error.to_string() },
        }
    }

    /// For files that are read as a whole: everything is read.
    pub fn set_read(&self, bytes: u64) {
        self.bytes_read.store(bytes.min(self.bytes_total), Ordering::Relaxed);
    }
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

fn kind_by_name(path: &Path) -> Option<(Format, Codec)> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let (stem, codec) = match name.rsplit_once('.')? {
        (stem, "gz") => (stem, Codec::Gzip),
        (stem, "zst") => (stem, Codec::Zstd),
        _ => (name.as_str(), Codec::Plain),
    };
    let format = match stem.rsplit_once('.')?.1 {
        "csv" => Format::Csv { delimiter: b',' },
        "tsv" => Format::Csv { delimiter: b'\t' },
        "ndjson" | "jsonl" => Format::Ndjson,
        "json" => Format::Json,
        "parquet" => Format::Parquet,
        "xlsx" => Format::Xlsx,
        _ => return None,
    };
    Some((format, codec))
}

const MAGICS: [(&[u8], &str); 5] = [
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"),
    (b"PK\x03\x04", "a zip archive such as xlsx"),
    (b"\xd0\xcf\x11\xe0", "an old .xls or a workbook with a password"),
];

/// A wrong name is said at once, and not as a parse error in line 1.
fn check_first_bytes(file: &Arc<str>, format: Format, codec: Codec, first: &[u8]) -> Result<(), ReadError> {
    let found = MAGICS.iter().find(|(magic, _)| first.starts_with(magic)).map(|(_, name)| *name);
    let named = match (codec, format) {
        (Codec::Gzip, _) => Some(MAGICS[0].1),
        (Codec::Zstd, _) => Some(MAGICS[1].1),
        (Codec::Plain, Format::Parquet) => Some(MAGICS[2].1),
        (Codec::Plain, Format::Xlsx) => Some(MAGICS[3].1),
        (Codec::Plain, _) => None,
    };
    if found == named {
        return Ok(());
    }
    Err(ReadError::FirstBytes {
        file: file.clone(),
        named: named.unwrap_or("plain text"),
        found: found.unwrap_or(if first.is_empty() { "nothing: it is empty" } else { "something else" }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_what_a_file_is() {
        let check = |name: &str, expected: Option<(Format, Codec)>| assert_eq!(kind_by_name(Path::new(name)), expected);
        check("a/trades.csv", Some((Format::Csv { delimiter: b',' }, Codec::Plain)));
        check("trades.2024.TSV.GZ", Some((Format::Csv { delimiter: b'\t' }, Codec::Gzip)));
        check("events.jsonl.zst", Some((Format::Ndjson, Codec::Zstd)));
        check("book.xlsx", Some((Format::Xlsx, Codec::Plain)));
        check("book.xlsx.gz", Some((Format::Xlsx, Codec::Gzip)));
        check("x.parquet.zst", Some((Format::Parquet, Codec::Zstd)));
        for unknown in ["notes.txt", "archive.gz", "csv", ""] {
            check(unknown, None);
        }
    }
}
