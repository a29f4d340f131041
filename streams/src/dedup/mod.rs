//! Event ids seen of late, so that an event that is sent again is known as a repeat.
//!
//! The log has every id; this is an index over it that fits in bounded memory. The newest ids are a table in memory,
//! older ones sorted files with a Bloom filter each, which answers for nearly every new id. An index covers the log up
//! to an offset: after a restart only what comes behind it is read again.

mod run; // one sorted file of keys, with its filter

use run::Run;

use crate::durable;
use engine::event::{Micros, StreamName, WorkspaceId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher13};
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The `dedup` section of the configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// An id is remembered for this long at least, unless `ids` is reached first.
    pub hours: u64,
    /// So many ids are remembered at least, those of all workspaces together; over it the oldest go.
    pub ids: u64,
    /// Ids held in memory before they go to a file; a restart reads as many again from the log.
    pub memory_ids: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { hours: 24, ids: 50_000_000, memory_ids: 500_000 }
    }
}

/// Why the index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DedupError {
    #[error(
        "index of event ids `{file}` is missing or corrupt at byte {position}; restore the folder `{}` with the log from a \
         backup, or remove it, and the index is made again from the log at the next start: ids of events that retention \
         took from the log are forgotten then, and such an event sent again counts again", folder(.file)
    )]
    Corrupt { file: PathBuf, position: u64 },
    #[error("cannot use `{file}`: {source}")]
    Io { file: PathBuf, source: io::Error },
}

fn folder(file: &Path) -> std::path::Display<'_> {
    file.parent().unwrap_or(file).display()
}

/// An id of a stream of a workspace, as a hash so wide that no two meet, and that nobody outside can aim at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Key(pub(crate) u128);

/// Keys are hashes already.
#[derive(Default)]
pub struct AsIs(u64);

impl Hasher for AsIs {
    fn write(&mut self, bytes: &[u8]) {
        let low = bytes.first_chunk::<8>().expect("a key has 16 bytes");
        self.0 = u64::from_le_bytes(*low);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A set of keys in memory.
pub type Keys = HashSet<Key, BuildHasherDefault<AsIs>>;

/// Where the log stood when an append began: what that append puts there comes at or behind it. Dropped without a
/// [confirmation](Dedup::confirm) it stands for an append that was refused.
pub struct Ticket {
    dedup: Arc<Dedup>,
    tail: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut table = self.dedup.table.lock();
        if let Some(count) = table.under_way.get_mut(&self.tail) {
            *count -= 1;
            if *count == 0 {
                table.under_way.remove(&self.tail);
            }
        }
    }
}

/// The index. All of it may be called from many threads.
///
/// Only ids of durable events are in it: whoever appends holds a [`Ticket`] from before the append until its ids are
/// [confirmed](Dedup::confirm) or the append was refused.
pub struct Dedup {
    directory: PathBuf,
    config: Config,
    secret: [u8; 16],
    table: Mutex<Table>,
    /// One at a time writes and removes files.
    files: Mutex<()>,
}

struct Table {
    fresh: Keys,
    /// On their way into a file.
    frozen: Arc<Keys>,
    /// Oldest first.
    runs: Arc<[Arc<Run>]>,
    /// Log offset up to which there were no ids that no file has.
    covered: u64,
    /// Least offsets of appends under way.
    under_way: BTreeMap<u64, usize>,
}

impl Table {
    fn covered(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.to).max(self.covered)
    }
}

/// Holds the key of the hashes: with another one no file here would mean anything.
const SECRET_FILE: &str = "secret";
/// A file becomes one of these when it is whole.
const UNFINISHED: &str = "next.tmp";
/// So many files at least become one.
const MERGE: usize = 4;

impl Dedup {
    /// Opens the index in `directory`, which is made when absent. Blocks.
    pub fn open(directory: &Path, config: &Config) -> Result<Dedup, DedupError> {
        let io = |source| DedupError::Io { file: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(io)?;
        let secret = secret(directory)?;
        let mut runs: Vec<Arc<Run>> = Vec::new();
        for entry in fs::read_dir(directory).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.extension().is_some_and(|extension| extension == "ids") {
                runs.push(Arc::new(Run::open(path)?));
            }
        }
        runs.sort_by_key(|run| (run.from, std::cmp::Reverse(run.to)));
        let mut kept: Vec<Arc<Run>> = Vec::new();
        for run in runs {
            match kept.last() {
                // a crash can come between a merged file and the removal of those it was made from
                Some(last) if run.to <= last.to => run.remove(),
                // a copy of the folder, taken while files changed, can lack one: the log has what comes behind it
                Some(last) if run.from > last.to => run.remove(),
                _ => kept.push(run),
            }
        }
        let table = Table {
            fresh: Keys::default(),
            frozen: Arc::default(),
            runs: kept.into(),
            covered: 0,
            under_way: BTreeMap::new(),
        };
        let (directory, config) = (directory.to_owned(), config.clone());
        Ok(Dedup { directory, config, secret, table: Mutex::new(table), files: Mutex::new(()) })
    }

    /// The key of an event's id. `first`: where the log begins for the workspace, which tells it from an earlier one of
    /// the same name.
    pub fn key(&self, workspace: &WorkspaceId, first: u64, stream: &StreamName, id: &str) -> Key {
        let mut hasher = SipHasher13::new_with_key(&self.secret);
        hasher.write_u64(first);
        for part in [workspace.as_str(), stream.as_str()] {
            hasher.write_u8(part.len() as u8); // names are at most 128 bytes
            hasher.write(part.as_bytes());
        }
        hasher.write(id.as_bytes());
        Key(hasher.finish128().as_u128())
    }

    /// Log offset up to which the files have all ids: what comes behind it is to be read again after a restart.
    pub fn covered(&self) -> u64 {
        self.table.lock().covered()
    }

    /// Ids in the index.
    pub fn len(&self) -> u64 {
        let table = self.table.lock();
        (table.fresh.len() + table.frozen.len()) as u64 + table.runs.iter().map(|run| run.len()).sum::<u64>()
    }

    /// Whether no id is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An append begins while the log's tail is `tail`.
    pub fn begin(self: &Arc<Self>, tail: u64) -> Ticket {
        *self.table.lock().under_way.entry(tail).or_default() += 1;
        Ticket { dedup: self.clone(), tail }
    }

    /// Which of `keys` are known, one answer each. Blocks on reading when a filter says that one may be.
    pub fn known(&self, keys: &[Key]) -> Result<Vec<bool>, DedupError> {
        let (mut known, runs) = {
            let table = self.table.lock();
            let in_memory = |key: &Key| table.fresh.contains(key) || table.frozen.contains(key);
            (keys.iter().map(in_memory).collect::<Vec<bool>>(), table.runs.clone())
        };
        for (key, known) in keys.iter().zip(&mut known).filter(|(_, known)| !**known) {
            // newest first: what is sent again is mostly sent again soon
            for run in runs.iter().rev() {
                if run.contains(*key)? {
                    *known = true;
                    break;
                }
            }
        }
        Ok(known)
    }

    /// The events of an append are durable: their ids are known from now on.
    pub fn confirm(&self, ticket: Ticket, keys: &[Key]) {
        self.table.lock().fresh.extend(keys);
        drop(ticket);
    }

    /// Whether [`flush`](Dedup::flush) has something to do.
    pub fn is_full(&self) -> bool {
        self.table.lock().fresh.len() >= self.config.memory_ids
    }

    /// Writes what is in memory to a file, joins files, and drops what is over the bounds at `now`. `tail`: the log's,
    /// read before this call. Blocks. After an error all is as before, and the next call tries again.
    pub fn flush(&self, tail: u64, now: Micros) -> Result<(), DedupError> {
        let _one = self.files.lock();
        let (keys, from, to) = {
            let mut table = self.table.lock();
            // an append under way can still land anywhere behind the tail that it saw
            let to = table.under_way.keys().next().map_or(tail, |least| tail.min(*least));
            let from = table.runs.last().map_or(0, |run| run.to);
            if to > table.covered() {
                table.frozen = Arc::new(std::mem::take(&mut table.fresh));
                if table.frozen.is_empty() {
                    table.covered = to;
                }
            }
            (table.frozen.clone(), from, to)
        };
        if !keys.is_empty() {
            let mut sorted: Vec<Key> = keys.iter().copied().collect();
            sorted.sort_unstable();
            let run = self.write(from, to, now, sorted.len() as u64, sorted.iter().map(|key| Ok(*key)));
            let mut table = self.table.lock();
            table.frozen = Arc::default();
            match run {
                Ok(run) => table.runs = table.runs.iter().cloned().chain([run]).collect(),
                Err(error) => {
                    table.fresh.extend(keys.iter());
                    return Err(error);
                }
            }
        }
        self.drop_old(now);
        self.merge()
    }

    fn write(
        &self,
        from: u64,
        to: u64,
        newest: Micros,
        most: u64,
        keys: impl Iterator<Item = Result<Key, DedupError>>,
    ) -> Result<Arc<Run>, DedupError> {
        let unfinished = self.directory.join(UNFINISHED);
        let path = self.directory.join(format!("{from:020}-{to:020}.ids"));
        Run::write(&unfinished, from, to, newest, most, keys)?;
        let io = |source| DedupError::Io { file: path.clone(), source };
        fs::rename(&unfinished, &path).map_err(io)?;
        File::open(&self.directory).and_then(|directory| directory.sync_all()).map_err(io)?;
        Ok(Arc::new(Run::open(path)?))
    }

    /// Drops the oldest files while what is left is enough.
    fn drop_old(&self, now: Micros) {
        let hours = i64::try_from(self.config.hours).unwrap_or(i64::MAX);
        let oldest = now.0.saturating_sub(hours.saturating_mul(3_600_000_000));
        let mut table = self.table.lock();
        let mut runs = table.runs.to_vec();
        let mut total: u64 = runs.iter().map(|run| run.len()).sum();
        // the newest stays whatever its age: it says how far the log is covered
        while runs.len() > 1 && (total - runs[0].len() >= self.config.ids || runs[0].newest.0 < oldest) {
            let gone = runs.remove(0);
            total -= gone.len();
            gone.remove();
        }
        table.runs = runs.into();
    }

    /// Joins neighbours of about one size, so that few filters are asked.
    fn merge(&self) -> Result<(), DedupError> {
        loop {
            let runs = self.table.lock().runs.clone();
            // the newest, and each older one that is not much larger than all behind it
            let (mut at, mut most) = (runs.len(), 0);
            while let Some(run) = at.checked_sub(1).map(|older| &runs[older]) {
                // a file is dropped as a whole, so none holds more than a quarter
                if (most > 0 && run.len() > 2 * most) || most + run.len() > self.config.ids / 4 {
                    break;
                }
                (at, most) = (at - 1, most + run.len());
            }
            let parts = &runs[at..];
            if parts.len() < MERGE {
                return Ok(());
            }
            let (first, last) = (&parts[0], &parts[parts.len() - 1]);
            let merged = self.write(first.from, last.to, last.newest, most, run::merged(parts)?)?;
            self.table.lock().runs = runs[..at].iter().cloned().chain([merged]).collect();
            parts.iter().for_each(|run| run.remove());
        }
    }
}

/// The key of the hashes and behind it its checksum, which the first version did not write.
fn secret(directory: &Path) -> Result<[u8; 16], DedupError> {
    let path = directory.join(SECRET_FILE);
    let io = |source| DedupError::Io { file: path.clone(), source };
    match fs::read(&path) {
        Ok(bytes) => match bytes.split_first_chunk() {
            Some((secret, sum)) if sum.is_empty() || sum == crc32c::crc32c(secret).to_le_bytes() => Ok(*secret),
            _ => Err(DedupError::Corrupt { file: path.clone(), position: 0 }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            for entry in fs::read_dir(directory).map_err(io)? {
                if entry.map_err(io)?.path().extension().is_some_and(|extension| extension == "ids") {
                    return Err(DedupError::Corrupt { file: path.clone(), position: 0 }); // what is there, it was made with
                }
            }
            let secret: [u8; 16] = rand::random();
            let bytes = [secret.as_slice(), &crc32c::crc32c(&secret).to_le_bytes()].concat();
            durable::replace(&path, &bytes).map_err(io)?;
            Ok(secret)
        }
        Err(error) => Err(io(error)),
    }
}

#[cfg(test)]
mod tests;
