//! One sorted file of keys with its Bloom filter. Written once, never changed.
//!
//! ```text
//! pages of 4096 bytes: up to 255 keys u128, zeros, crc32c u32
//! footer: first key of each page u128 | filter blocks of 64 bytes
//! trailer: magic 8 | version u32 | from u64 | to u64 | newest i64 | keys u64 | pages u64 | blocks u64 |
//!          crc32c of footer and trailer u32
//! ```
//! Little-endian. A filter block is one cache line: a key sets and asks seven of its 512 bits (Putze, Sanders and
//! Singler, "Cache-, Hash- and Space-Efficient Bloom Filters", 2007). At 12 bits a key about one new key in 150 is
//! looked up in vain.

use super::{DedupError, Key};
use engine::event::Micros;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PAGE: usize = 4096;
const KEYS_IN_PAGE: usize = 255;
const MAGIC: [u8; 8] = *b"tideids\n";
const VERSION: u32 = 1;
const TRAILER: usize = 64;
const BITS_PER_KEY: u64 = 12;
const PROBES: u32 = 7;

/// An open file of keys.
#[derive(Debug)]
pub(super) struct Run {
    path: PathBuf,
    file: File,
    /// Log offsets whose ids are in it.
    pub(super) from: u64,
    pub(super) to: u64,
    /// Processing time when the newest id came.
    pub(super) newest: Micros,
    keys: u64,
    fences: Vec<u128>,
    filter: Filter,
}

/// Blocks of 512 bits.
#[derive(Debug)]
struct Filter(Vec<[u64; 8]>);

impl Filter {
    fn new(keys: u64) -> Filter {
        Filter(vec![[0; 8]; (keys * BITS_PER_KEY).div_ceil(512).max(1) as usize])
    }

    /// The block and seven bits of it.
    fn probes(&self, key: u128) -> (usize, impl Iterator<Item = (usize, u64)> + use<>) {
        let (high, low) = ((key >> 64) as u64, key as u64);
        let block = ((u128::from(low) * self.0.len() as u128) >> 64) as usize;
        (
            block,
            (0..PROBES).map(move |probe| high >> (9 * probe) & 511).map(|bit| ((bit / 64) as usize, 1 << (bit % 64))),
        )
    }

    fn insert(&mut self, key: u128) {
        let (block, bits) = self.probes(key);
        bits.for_each(|(word, bit)| self.0[block][word] |= bit);
    }

    fn may_contain(&self, key: u128) -> bool {
        let (block, mut bits) = self.probes(key);
        bits.all(|(word, bit)| self.0[block][word] & bit != 0)
    }
}

impl Run {
    /// Writes `keys`, which come in order, `most` at most, to `path` and waits for the disk.
    pub(super) fn write(
        path: &Path,
        from: u64,
        to: u64,
        newest: Micros,
        most: u64,
        keys: impl Iterator<Item = Result<Key, DedupError>>,
    ) -> Result<(), DedupError> {
        let io = |source| DedupError::Io { file: path.to_owned(), source };
        let file = File::create(path).map_err(io)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut filter = Filter::new(most);
        let mut fences: Vec<u128> = Vec::new();
        let mut page = Vec::with_capacity(PAGE);
        let (mut count, mut last) = (0_u64, None);
        for key in keys {
            let Key(key) = key?;
            if last.replace(key) == Some(key) {
                continue; // in two of the files that become one
            }
            if page.is_empty() {
                fences.push(key);
            }
            page.extend(key.to_le_bytes());
            filter.insert(key);
            count += 1;
            if page.len() == KEYS_IN_PAGE * 16 {
                put_page(&mut page, &mut out).map_err(io)?;
            }
        }
        if !page.is_empty() {
            put_page(&mut page, &mut out).map_err(io)?;
        }
        let mut footer: Vec<u8> = fences.iter().flat_map(|fence| fence.to_le_bytes()).collect();
        footer.extend(filter.0.iter().flatten().flat_map(|word| word.to_le_bytes()));
        footer.extend(MAGIC);
        footer.extend(VERSION.to_le_bytes());
        for number in [from, to, newest.0 as u64, count, fences.len() as u64, filter.0.len() as u64] {
            footer.extend(number.to_le_bytes());
        }
        footer.extend(crc32c::crc32c(&footer).to_le_bytes());
        out.write_all(&footer).map_err(io)?;
        let file = out.into_inner().map_err(|error| io(error.into_error()))?;
        file.sync_all().map_err(io)
    }

    pub(super) fn open(path: PathBuf) -> Result<Run, DedupError> {
        let io = |source| DedupError::Io { file: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let corrupt = |position| DedupError::Corrupt { file: path.clone(), position };
        let at = length.checked_sub(TRAILER as u64).ok_or_else(|| corrupt(0))?;
        let mut trailer = [0; TRAILER];
        file.read_exact_at(&mut trailer, at).map_err(io)?;
        let number = |at: usize| u64::from_le_bytes(trailer[at..at + 8].try_into().expect("eight bytes"));
        let version = u32::from_le_bytes(trailer[8..12].try_into().expect("four bytes"));
        if trailer[..8] != MAGIC || version != VERSION {
            return Err(corrupt(at));
        }
        let [from, to, newest, keys, pages, blocks] = [12, 20, 28, 36, 44, 52].map(number);
        let expected = pages
            .checked_mul(PAGE as u64 + 16)
            .and_then(|n| n.checked_add(blocks.checked_mul(64)?)?.checked_add(TRAILER as u64));
        if expected != Some(length) || blocks == 0 {
            return Err(corrupt(at));
        }
        let begin = pages * PAGE as u64;
        let mut footer = vec![0; (length - begin) as usize];
        file.read_exact_at(&mut footer, begin).map_err(io)?;
        let (body, crc) = footer.split_last_chunk::<4>().expect("longer than a trailer");
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(corrupt(begin));
        }
        let (fences, rest) = footer.split_at(pages as usize * 16);
        let fences = fences.chunks_exact(16).map(|b| u128::from_le_bytes(b.try_into().expect("sixteen bytes")));
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let blocks = rest[..blocks as usize * 64]
            .chunks_exact(64)
            .map(|block| std::array::from_fn(|i| word(&block[i * 8..i * 8 + 8])));
        let (fences, filter) = (fences.collect(), Filter(blocks.collect()));
        Ok(Run { file, from, to, newest: Micros(newest as i64), keys, fences, filter, path })
    }

    /// Keys in the file.
    pub(super) fn len(&self) -> u64 {
        self.keys
    }

    pub(super) fn contains(&self, Key(key): Key) -> Result<bool, DedupError> {
        if !self.filter.may_contain(key) {
            return Ok(false);
        }
        let Some(page) = self.fences.partition_point(|fence| *fence <= key).checked_sub(1) else { return Ok(false) };
        let mut bytes = [0; PAGE];
        let position = (page * PAGE) as u64;
        let io = |source| DedupError::Io { file: self.path.clone(), source };
        self.file.read_exact_at(&mut bytes, position).map_err(io)?;
        let keys = keys_of(&bytes).ok_or_else(|| DedupError::Corrupt { file: self.path.clone(), position })?;
        let count = self.keys_in(page);
        Ok(keys.take(count).any(|known| known == key))
    }

    fn keys_in(&self, page: usize) -> usize {
        (self.keys as usize - page * KEYS_IN_PAGE).min(KEYS_IN_PAGE)
    }

    /// Removes the file. Who still reads it can go on; one that stays is removed at the next start.
    pub(super) fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(file = %self.path.display(), %error, "a file of old event ids stays");
        }
    }

    /// All keys in order.
    fn iter(&self) -> Result<impl Iterator<Item = Result<Key, DedupError>> + use<>, DedupError> {
        let path = self.path.clone();
        let io = move |source| DedupError::Io { file: path.clone(), source };
        let mut file = BufReader::with_capacity(256 << 10, File::open(&self.path).map_err(&io)?);
        let path = self.path.clone();
        let counts: Vec<usize> = (0..self.fences.len()).map(|page| self.keys_in(page)).collect();
        Ok(counts.into_iter().enumerate().flat_map(move |(page, count)| {
            let mut bytes = [0; PAGE];
            let keys = match file.read_exact(&mut bytes) {
                Err(source) => vec![Err(io(source))],
                Ok(()) => match keys_of(&bytes) {
                    Some(keys) => keys.take(count).map(|key| Ok(Key(key))).collect(),
                    None => vec![Err(DedupError::Corrupt { file: path.clone(), position: (page * PAGE) as u64 })],
                },
            };
            keys.into_iter()
        }))
    }
}

/// The keys of several files as one sequence in order; a key of two files comes twice.
pub(super) fn merged(runs: &[Arc<Run>]) -> Result<impl Iterator<Item = Result<Key, DedupError>>, DedupError> {
    let mut sources = runs.iter().map(|run| Ok(run.iter()?.peekable())).collect::<Result<Vec<_>, DedupError>>()?;
    Ok(std::iter::from_fn(move || {
        let heads = sources.iter_mut().enumerate().filter_map(|(i, source)| match source.peek() {
            Some(Ok(key)) => Some((Some(*key), i)),
            Some(Err(_)) => Some((None, i)), // sorts first: an error is told at once
            None => None,
        });
        let (_, least) = heads.min()?;
        sources[least].next()
    }))
}

fn put_page(page: &mut Vec<u8>, out: &mut impl Write) -> io::Result<()> {
    page.resize(PAGE - 4, 0);
    let crc = crc32c::crc32c(page);
    page.extend(crc.to_le_bytes());
    out.write_all(page)?;
    page.clear();
    Ok(())
}

/// The keys in a page and the zeros behind them; `None` when its checksum is wrong.
fn keys_of(page: &[u8; PAGE]) -> Option<impl Iterator<Item = u128>> {
    let (body, crc) = page.split_last_chunk::<4>()?;
    let intact = crc32c::crc32c(body) == u32::from_le_bytes(*crc);
    intact.then(|| body.chunks_exact(16).map(|bytes| u128::from_le_bytes(bytes.try_into().expect("sixteen bytes"))))
}
