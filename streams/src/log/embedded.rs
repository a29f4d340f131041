//! The log in files of this machine, for one process.
//!
//! Callers encode; one thread writes. It takes all that waits, writes it with one call, waits for the disk once
//! and answers everybody: under load the cost of the disk is shared, when idle nothing is delayed.

use super::batch::EncodedSchema;
use super::begin::Begin;
use super::check::Check;
use super::places::Walk;
use super::record::{Draft, workspace_in};
use super::segment::{HEADER, Header, Reader, Segment, VERSION, Verified, file_name};
use super::{AppendError, Body, Config, Filter, Log, Offset, OpenError, Pending, ReadError, Record, Room, Scan};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use engine::event::{Micros, WorkspaceId};
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, UNIX_EPOCH};
use tokio::sync::oneshot;

/// The most bytes written and made durable at once: keeps the wait of the first in a group short.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// Of them, the most of one workspace: what the others write waits for no more than that of one that writes much.
const SHARE_BYTES_MAX: usize = 512 << 10;
/// A record's length is 32 bits in the file.
const RECORD_BYTES_MAX: usize = 1 << 30;
/// Positions are 32 bits too, and the last group comes on top of this.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;
/// Schemas kept encoded; a process with more encodes some of them again.
const SCHEMAS_MAX: usize = 1 << 12;
/// Held locked by the process that has the log open.
const LOCK_FILE: &str = "LOCK";
/// A disk that was full counts as having room again only with so many bytes more than were wanted.
const DISK_SPARE: u64 = 64 << 10;
/// Name of a file of records until its header is durable.
const UNFINISHED: &str = "next.tmp";

/// The durable log in a directory of this machine; a clone of its `Arc` is all that users need.
///
/// After a failed write or sync nobody knows what is on the disk, so the log takes nothing more until the
/// process is restarted and has read the files again. A full disk is different: what was begun is cut off, the
/// records are refused, and appends go on once there is space.
pub struct EmbeddedLog {
    shared: Arc<Shared>,
    queue_limit: usize,
    max_bytes: Option<u64>,
    retention: Retention,
    /// What it is called.
    id: String,
    /// Encoding a schema costs more than encoding a small batch.
    schemas: RwLock<HashMap<SchemaRef, Arc<EncodedSchema>>>,
    writer: Option<JoinHandle<()>>,
    /// Looks through complete files.
    checker: Option<JoinHandle<()>>,
    /// Released with the handle, also when the process is killed.
    _lock: File,
}

struct Retention {
    bytes: Option<u64>,
    age_micros: Option<i64>,
}

/// What callers, scans and the writer have in common.
struct Shared {
    directory: PathBuf,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Oldest first; never empty, the last one is being written.
    segments: RwLock<Vec<Arc<Segment>>>,
    /// Offset after the newest durable record.
    tail: AtomicU64,
    /// Durable bytes of all files.
    used: AtomicU64,
    /// Bytes for which there was no room at the last append; 0 where there was.
    lacking: AtomicU64,
    check: Check,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Entry>,
    /// Bytes that wait or are being written.
    bytes: usize,
    /// Why nothing is taken any more.
    failed: Option<AppendError>,
    closing: bool,
}

/// A record to write, or without one a barrier.
struct Entry {
    draft: Option<Draft>,
    answer: oneshot::Sender<Result<Offset, AppendError>>,
}

impl EmbeddedLog {
    /// Opens the log in `directory`, which is made when absent. Cuts off a record that a crash left incomplete,
    /// with a warning, and changes nothing else. Reads the newest file whole, of the others only the header.
    pub fn open(directory: &Path, config: &Config) -> Result<EmbeddedLog, OpenError> {
        Self::open_on(Box::new(Os), directory, config)
    }

    /// What the log is called: itself and its copies, and no other.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn open_on(disk: Box<dyn Disk>, directory: &Path, config: &Config) -> Result<EmbeddedLog, OpenError> {
        let (mut log, writer) = Self::prepare(disk, directory, config)?;
        let writer = thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|e| open_io(directory, e))?;
        log.writer = Some(writer);
        if config.check_hours > 0 {
            let (shared, every) = (log.shared.clone(), Duration::from_secs(config.check_hours.saturating_mul(3_600)));
            let look = move || _ = shared.check.run(every, || shared.segments.read().clone());
            let checker = thread::Builder::new().name("log-check".to_owned()).spawn(look);
            log.checker = Some(checker.map_err(|e| open_io(directory, e))?);
        }
        Ok(log)
    }

    /// An open log and what is to write it: on a thread, or step by step.
    fn prepare(mut disk: Box<dyn Disk>, directory: &Path, config: &Config) -> Result<(EmbeddedLog, Writer), OpenError> {
        if config.segment_bytes > SEGMENT_BYTES_MAX {
            return Err(OpenError::Segment { asked: config.segment_bytes, limit: SEGMENT_BYTES_MAX });
        }
        fs::create_dir_all(directory).and_then(|()| sync_parent(directory)).map_err(|e| open_io(directory, e))?;
        let lock = lock(directory)?;
        let mut segments = list(directory)?;
        let head = segments.first().map(|segment| Offset(segment.header.first));
        let begin = match (Begin::read(directory)?, head) {
            (Some(begin), head) if head.map_or(begin.first.0 > 0, |head| head > begin.first) => {
                let file = directory.join(file_name(begin.first.0));
                let reason = "the file is missing, and retention did not remove it".to_owned();
                return Err(OpenError::Corrupt { file, position: 0, reason });
            }
            (Some(begin), _) => begin,
            (None, head) => {
                let begin = Begin::at(head.unwrap_or_default());
                begin.write(directory).map_err(|error| open_io(directory, error))?;
                begin
            }
        };
        let (active, next, sealed) = match segments.last() {
            Some(newest) => reopen(disk.as_mut(), newest)?,
            None => {
                let (segment, file) = create(disk.as_mut(), directory, 0, Header::NO_FILE_BEFORE)
                    .map_err(|e| open_io(&directory.join(UNFINISHED), e))?;
                segments.push(segment);
                (file, 0, true)
            }
        };
        let segment = segments.last().expect("there is a file by now").clone();
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            queue: Mutex::default(),
            wake: Condvar::new(),
            tail: AtomicU64::new(next),
            used: AtomicU64::new(segments.iter().map(|segment| segment.length.load(Ordering::Relaxed)).sum()),
            lacking: AtomicU64::new(0),
            check: Check::default(),
            segments: RwLock::new(segments),
        });
        let mut writer = Writer {
            shared: shared.clone(),
            disk,
            sealed,
            segment_bytes: config.segment_bytes,
            max_bytes: config.max_bytes,
            position: segment.length.load(Ordering::Relaxed),
            segment,
            file: active,
            next,
            schemas: HashMap::new(),
            buffer: Vec::new(),
        };
        writer.seal();
        let hours = config.retain_hours.map(|hours| i64::try_from(hours).unwrap_or(i64::MAX));
        let log = EmbeddedLog {
            shared,
            queue_limit: config.queue_bytes,
            max_bytes: config.max_bytes,
            id: begin.log,
            retention: Retention {
                bytes: config.retain_bytes,
                age_micros: hours.map(|hours| hours.saturating_mul(3_600_000_000)),
            },
            schemas: RwLock::default(),
            writer: None,
            checker: None,
            _lock: lock,
        };
        Ok((log, writer))
    }

    fn draft(&self, record: &Record) -> Result<Draft, AppendError> {
        match &record.body {
            Body::Advance { stream, frontier } => Ok(Draft::advance(&record.workspace, stream, *frontier)),
            Body::Events { stream, batch } => {
                let schema = self.encoded(batch.schema_ref());
                Draft::events(&record.workspace, stream, batch, schema)
                    .map_err(|cause| AppendError::Unencodable { stream: stream.clone(), cause: cause.to_string() })
            }
            Body::Refused { stream, events } => Draft::refused(&record.workspace, stream, events)
                .map_err(|cause| AppendError::Unencodable { stream: stream.clone(), cause: cause.to_string() }),
        }
    }

    fn encoded(&self, schema: &SchemaRef) -> Arc<EncodedSchema> {
        if let Some(encoded) = self.schemas.read().get(schema) {
            return encoded.clone();
        }
        let encoded = Arc::new(EncodedSchema::new(schema));
        let mut schemas = self.schemas.write();
        if schemas.len() >= SCHEMAS_MAX {
            schemas.clear();
        }
        schemas.entry(schema.clone()).or_insert(encoded).clone()
    }

    /// Whether `bytes` more may wait.
    fn admit(&self, queue: &Queue, bytes: usize) -> Result<(), AppendError> {
        let limit = self.queue_limit;
        if let Some(failed) = &queue.failed {
            return Err(failed.clone());
        }
        if queue.bytes.saturating_add(bytes) > limit {
            return Err(AppendError::Busy { queued: queue.bytes, limit });
        }
        Ok(())
    }

    fn push(&self, draft: Option<Draft>) -> Result<Pending, AppendError> {
        let bytes = draft.as_ref().map_or(0, Draft::len);
        let limit = self.queue_limit.min(RECORD_BYTES_MAX);
        if bytes > limit {
            return Err(AppendError::TooLarge { bytes, limit });
        }
        let (answer, pending) = oneshot::channel();
        let mut queue = self.shared.queue.lock();
        self.admit(&queue, bytes)?;
        queue.bytes += bytes;
        queue.waiting.push_back(Entry { draft, answer });
        drop(queue);
        self.shared.wake.notify_one();
        Ok(pending.into())
    }
}

#[async_trait]
impl Log for EmbeddedLog {
    fn enqueue(&self, record: Record) -> Result<Pending, AppendError> {
        // overload must be cheap: refused before the work of encoding
        self.admit(&self.shared.queue.lock(), 1)?;
        let draft = self.draft(&record)?;
        self.push(Some(draft))
    }

    async fn barrier(&self) -> Result<(), AppendError> {
        self.push(None)?.await.map(drop)
    }

    fn room(&self) -> Result<(), AppendError> {
        let Shared { directory, used, lacking, .. } = self.shared.as_ref();
        let (used, lacking) = (used.load(Ordering::Relaxed), lacking.load(Ordering::Relaxed));
        if lacking == 0 {
            return Ok(());
        }
        let room = match self.max_bytes.filter(|most| used + lacking > *most) {
            Some(most) => Room::Configured(most),
            None => match rustix::fs::statvfs(directory) {
                // where the file system does not say, the next append will
                Ok(disk) if disk.f_bavail.saturating_mul(disk.f_frsize) < lacking + DISK_SPARE => Room::Disk,
                _ => return Ok(()),
            },
        };
        Err(AppendError::Full { directory: directory.clone(), used, room })
    }

    fn damage(&self) -> Option<String> {
        self.shared.check.damage()
    }

    fn tail(&self) -> Offset {
        Offset(self.shared.tail.load(Ordering::Acquire))
    }

    fn head(&self) -> Offset {
        Offset(self.shared.segments.read()[0].header.first)
    }

    fn protect(&self, from: Offset, now: Micros) {
        let mut segments = self.shared.segments.write();
        // oldest first and each removal durable before the next: no crash leaves a gap
        while let [oldest, next, ..] = segments.as_slice() {
            let used = self.shared.used.load(Ordering::Relaxed);
            if next.header.first > from.0 || !self.retention.lets_go(oldest, used, now) {
                return;
            }
            let begin = Begin { log: self.id.clone(), first: Offset(next.header.first) };
            if let Err(error) = begin.write(&self.shared.directory) {
                let directory = self.shared.directory.display();
                tracing::warn!(%directory, %error, "a log file that is no longer needed stays");
                return;
            }
            if let Err(error) = oldest.remove() {
                tracing::warn!(file = %oldest.path.display(), %error, "a log file that is no longer needed stays");
                return;
            }
            self.shared.used.fetch_sub(oldest.length.load(Ordering::Relaxed), Ordering::Relaxed);
            segments.remove(0);
            if let Err(error) = sync_directory(&self.shared.directory) {
                let directory = self.shared.directory.display();
                tracing::warn!(%directory, %error, "a removed log file may come back");
                return;
            }
        }
    }

    fn scan(&self, from: Offset, only: Filter) -> Result<Scan, ReadError> {
        // the tail first: a record before it is in the files listed after
        let tail = self.tail();
        let segments = self.shared.segments.read();
        let head = Offset(segments[0].header.first);
        if from < head {
            return Err(ReadError::Gone { from, head });
        }
        if from > tail {
            return Err(ReadError::Ahead { from, tail });
        }
        let begin = segments.partition_point(|segment| segment.header.first <= from.0) - 1;
        let segments = segments[begin..].iter().cloned().collect();
        let shared = self.shared.clone();
        Ok(Box::new(Cursor { shared, segments, open: None, walk: None, next: from.0, end: tail.0, only }))
    }

    fn newest(&self) -> Result<HashMap<WorkspaceId, Offset>, ReadError> {
        let segments = self.shared.segments.read().clone();
        let mut newest = HashMap::new();
        for segment in segments {
            let at = segment.header.first;
            segment.newest(&mut newest).map_err(|error| self.shared.gone_or(error, at))?;
        }
        let known = |(workspace, offset): (String, u64)| Some((workspace.parse().ok()?, Offset(offset)));
        Ok(newest.into_iter().filter_map(known).collect())
    }
}

impl Drop for EmbeddedLog {
    fn drop(&mut self) {
        self.shared.queue.lock().closing = true;
        self.shared.wake.notify_one();
        self.shared.check.end();
        // a panic of the writer has been told to all who waited
        [self.writer.take(), self.checker.take()].into_iter().flatten().for_each(|thread| _ = thread.join());
    }
}

impl Retention {
    /// Whether `segment`, the oldest of files of `used` bytes, need not be kept any more.
    fn lets_go(&self, segment: &Segment, used: u64, now: Micros) -> bool {
        let age = || {
            let written = fs::metadata(&segment.path).and_then(|metadata| metadata.modified()).ok()?;
            let written = written.duration_since(UNIX_EPOCH).ok()?.as_micros();
            now.0.checked_sub(i64::try_from(written).ok()?)
        };
        self.bytes.is_some_and(|bytes| used > bytes)
            || self.age_micros.is_some_and(|limit| age().is_some_and(|age| age > limit))
    }
}

/// What the writer asks of the disk, so that a test can make the disk fail.
trait Disk: Send {
    fn write(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn cut(&mut self, file: &File, length: u64) -> io::Result<()> {
        file.set_len(length)
    }

    /// Gives a file its name, which is durable then.
    fn publish(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        sync_directory(to.parent().unwrap_or(to))
    }
}

/// The disk as it is.
struct Os;
impl Disk for Os {}

/// Takes what waits and makes it durable, on a thread of its own.
struct Writer {
    shared: Arc<Shared>,
    disk: Box<dyn Disk>,
    segment_bytes: u64,
    max_bytes: Option<u64>,
    segment: Arc<Segment>,
    file: File,
    /// Durable bytes of the file.
    position: u64,
    /// Offset of the next record.
    next: u64,
    /// A seal is the last in the file, or the file is empty.
    sealed: bool,
    /// Where in the file each schema is that its records use.
    schemas: HashMap<Arc<[u8]>, u64>,
    buffer: Vec<u8>,
}

/// How much of a group is whose.
#[derive(Default)]
struct Shares {
    all: usize,
    /// By workspace.
    each: HashMap<Box<str>, usize>,
}

impl Shares {
    /// Takes a record in where it fits into its workspace's share. Once one does not, none after it does, so that those of
    /// a workspace stay in their order.
    fn take(&mut self, draft: &Draft) -> bool {
        let fits = match self.each.get_mut(draft.workspace()) {
            Some(share) if *share + draft.len() > SHARE_BYTES_MAX => {
                *share = SHARE_BYTES_MAX;
                false
            }
            Some(share) => {
                *share += draft.len();
                true
            }
            None => self.each.insert(draft.workspace().into(), draft.len()).is_none(),
        };
        if fits {
            self.all += draft.len();
        }
        fits
    }
}

impl Writer {
    fn run(mut self) {
        let shared = self.shared.clone();
        let _told = TellWhenGone(&shared);
        while let Some(group) = self.wait_for_group() {
            self.answer(group);
        }
        self.seal();
    }

    /// Makes a group durable and tells all in it.
    fn answer(&mut self, group: Vec<Entry>) {
        let bytes: usize = group.iter().filter_map(|entry| entry.draft.as_ref()).map(Draft::len).sum();
        let first = self.next;
        let (drafts, answers): (Vec<_>, Vec<_>) = group.into_iter().map(|entry| (entry.draft, entry.answer)).unzip();
        let is_record: Vec<bool> = drafts.iter().map(Option::is_some).collect();
        let result = self.commit(drafts.into_iter().flatten().collect());
        if bytes > 0 {
            let lacking = if matches!(result, Err(AppendError::Full { .. })) { bytes as u64 } else { 0 };
            self.shared.lacking.store(lacking, Ordering::Relaxed);
        }
        let mut queue = self.shared.queue.lock();
        queue.bytes -= bytes;
        if let Err(error @ AppendError::Failed { .. }) = &result {
            queue.failed = Some(error.clone());
        }
        drop(queue);
        let mut offset = first;
        for (answer, is_record) in answers.into_iter().zip(is_record) {
            // a caller may have left
            _ = match (&result, is_record) {
                (Err(AppendError::Full { .. }), false) | (Ok(()), false) => answer.send(Ok(Offset(offset))),
                (Err(error), _) => answer.send(Err(error.clone())),
                (Ok(()), true) => {
                    offset += 1;
                    answer.send(Ok(Offset(offset - 1)))
                }
            };
        }
    }

    /// All that waits, up to a bound for each workspace and one for all; `None` when the log is closed and nothing waits.
    fn wait_for_group(&self) -> Option<Vec<Entry>> {
        let mut queue = self.shared.queue.lock();
        while queue.waiting.is_empty() {
            if queue.closing {
                return None;
            }
            self.shared.wake.wait(&mut queue);
        }
        let limit = GROUP_BYTES_MAX.min(usize::try_from(self.segment_bytes).unwrap_or(usize::MAX));
        let mut shares = Shares::default();
        let (mut group, mut left) = (Vec::with_capacity(queue.waiting.len()), VecDeque::new());
        while let Some(entry) = queue.waiting.pop_front() {
            let bytes = entry.draft.as_ref().map_or(0, Draft::len);
            if shares.all + bytes > limit && !group.is_empty() {
                left.push_back(entry);
                break;
            }
            let takes = match &entry.draft {
                Some(draft) => shares.take(draft),
                None => left.is_empty(), // it says that all before it is durable
            };
            match takes {
                true => group.push(entry),
                false => left.push_back(entry),
            }
        }
        left.append(&mut queue.waiting);
        queue.waiting = left;
        Some(group)
    }

    /// Makes all of `drafts` durable, or none of them part of the log.
    fn commit(&mut self, drafts: Vec<Draft>) -> Result<(), AppendError> {
        if let Some(failed) = &self.shared.queue.lock().failed {
            return Err(failed.clone());
        }
        if drafts.is_empty() {
            return Ok(());
        }
        let grown = self.position >= self.segment_bytes && self.position > HEADER as u64;
        // what this version writes has no place in a file that an earlier one may read
        if grown || self.segment.header.version != VERSION {
            self.roll()?;
        }
        let count = drafts.len() as u64;
        let places = self.fill(drafts);
        let result = self.write();
        if result.is_err() {
            self.schemas.retain(|_, position| *position < self.position);
            return result;
        }
        for (offset, position) in places {
            let workspace = workspace_in(&self.buffer[(position - self.position) as usize..]);
            self.segment.note(workspace, offset, position);
        }
        self.grow(false);
        self.next += count;
        // whoever sees this tail finds all before it in the files
        self.shared.tail.store(self.next, Ordering::Release);
        metrics::counter!("tidewatch_log_appends_total").increment(count);
        metrics::counter!("tidewatch_log_appended_bytes_total").increment(self.buffer.len() as u64);
        metrics::histogram!("tidewatch_log_group_records").record(count as f64);
        Ok(())
    }

    /// Lays out `drafts` in the buffer, each schema before its first use: offset and position of each record.
    fn fill(&mut self, drafts: Vec<Draft>) -> Vec<(u64, u64)> {
        self.buffer.clear();
        self.buffer.shrink_to(GROUP_BYTES_MAX);
        let salt = self.segment.header.salt;
        let mut places = Vec::with_capacity(drafts.len());
        for (draft, offset) in drafts.into_iter().zip(self.next..) {
            let schema = draft.schema.as_ref().map_or(0, |schema| {
                *self.schemas.entry(schema.ipc.clone()).or_insert_with(|| {
                    let place = self.position + self.buffer.len() as u64;
                    Draft::schema(schema).seal(offset, 0, salt, &mut self.buffer);
                    place
                })
            });
            places.push((offset, self.position + self.buffer.len() as u64));
            draft.seal(offset, schema, salt, &mut self.buffer);
        }
        places
    }

    /// Writes the buffer and waits for the disk.
    fn write(&mut self) -> Result<(), AppendError> {
        let used = self.shared.used.load(Ordering::Relaxed);
        if let Some(limit) = self.max_bytes.filter(|limit| used + self.buffer.len() as u64 > *limit) {
            return Err(self.full(Room::Configured(limit)));
        }
        let written = self.disk.write(&self.file, &self.buffer).and_then(|()| {
            let begun = Instant::now();
            let synced = self.disk.sync(&self.file);
            metrics::histogram!("tidewatch_log_fsync_seconds").record(begun.elapsed().as_secs_f64());
            synced
        });
        let Err(cause) = written else { return Ok(()) };
        // What was begun goes, so that no restart takes it for durable. After a full disk that is all there is
        // to do; this syncs a shorter file and does not try the failed sync again.
        let cut = self.disk.cut(&self.file, self.position).and_then(|()| self.disk.sync(&self.file));
        match cut {
            Ok(()) if is_disk_full(&cause) => Err(self.full(Room::Disk)),
            _ => Err(self.failed(self.segment.path.clone(), cause)),
        }
    }

    /// Says that all before is durable: a fault in it is no torn write then. When the disk is full, the log only
    /// cannot tell the two apart in its last group.
    fn seal(&mut self) {
        let failed = self.shared.queue.lock().failed.is_some();
        if failed || self.sealed || self.segment.header.version != VERSION {
            return;
        }
        self.buffer.clear();
        Draft::seal_of_all().seal(self.next, 0, self.segment.header.salt, &mut self.buffer);
        match self.write() {
            Ok(()) => self.grow(true),
            Err(AppendError::Full { .. }) => {}
            Err(error) => self.shared.queue.lock().failed = Some(error),
        }
    }

    /// What is in the buffer is durable now.
    fn grow(&mut self, sealed: bool) {
        let bytes = self.buffer.len() as u64;
        self.position += bytes;
        self.sealed = sealed;
        self.segment.length.store(self.position, Ordering::Release);
        self.shared.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Goes on in a new file.
    fn roll(&mut self) -> Result<(), AppendError> {
        let before = (self.segment.header.first, self.position);
        match create(self.disk.as_mut(), &self.shared.directory, self.next, before) {
            Ok((segment, file)) => {
                self.segment.complete();
                (self.segment, self.file, self.position) = (segment.clone(), file, HEADER as u64);
                self.schemas.clear();
                self.sealed = true;
                self.shared.used.fetch_add(HEADER as u64, Ordering::Relaxed);
                self.shared.segments.write().push(segment);
                Ok(())
            }
            Err(cause) if is_disk_full(&cause) => Err(self.full(Room::Disk)),
            Err(cause) => Err(self.failed(self.shared.directory.join(UNFINISHED), cause)),
        }
    }

    fn full(&self, room: Room) -> AppendError {
        let used = self.shared.used.load(Ordering::Relaxed);
        AppendError::Full { directory: self.shared.directory.clone(), used, room }
    }

    fn failed(&self, file: PathBuf, cause: io::Error) -> AppendError {
        tracing::error!(file = %file.display(), %cause, "the log takes no more records until a restart");
        AppendError::Failed { file, cause: Arc::new(cause) }
    }
}

/// Leaves nobody waiting for a writer that is gone, whether it was closed or panicked.
struct TellWhenGone<'a>(&'a Shared);

impl Drop for TellWhenGone<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock();
        queue.failed.get_or_insert(AppendError::Stopped);
        queue.waiting.clear(); // dropping the sender answers
    }
}

fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Walks the records of one scan.
struct Cursor {
    shared: Arc<Shared>,
    /// Those not read to their end yet.
    segments: VecDeque<Arc<Segment>>,
    /// Reads the first of them.
    open: Option<Reader>,
    /// Where in it the records of the one workspace that is wanted are.
    walk: Option<Walk>,
    /// Offset of the next record.
    next: u64,
    /// Where the scan ends.
    end: u64,
    only: Filter,
}

impl Iterator for Cursor {
    type Item = Result<(Offset, Record), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.advance().transpose();
        if let Some(Err(error)) = &item {
            self.end = self.next; // nothing after an error
            self.shared.check.found(error);
        }
        item
    }
}

impl Cursor {
    fn advance(&mut self) -> Result<Option<(Offset, Record)>, ReadError> {
        while self.next < self.end {
            let Some(segment) = self.segments.front() else { break };
            if let Some(workspace) = &self.only.workspace {
                let walk = match &mut self.walk {
                    Some(walk) => walk,
                    closed => {
                        let walk = segment.places_of(workspace.as_str());
                        closed.insert(walk.map_err(|error| self.shared.gone_or(error, self.next))?)
                    }
                };
                let Some((offset, position)) = walk.find(|(offset, _)| *offset >= self.next) else {
                    self.segments.pop_front();
                    (self.open, self.walk) = (None, None);
                    continue;
                };
                if offset >= self.end {
                    break;
                }
                self.next = offset;
                let reader = match &mut self.open {
                    Some(reader) => reader,
                    closed => {
                        let reader = segment.read_from(offset);
                        closed.insert(reader.map_err(|error| self.shared.gone_or(error, offset))?)
                    }
                };
                reader.jump(offset, position).map_err(|fault| segment.fault(fault))?;
            }
            let reader = match &mut self.open {
                Some(reader) => reader,
                closed => {
                    let reader = segment.read_from(self.next);
                    closed.insert(reader.map_err(|error| self.shared.gone_or(error, self.next))?)
                }
            };
            let position = reader.position;
            let corrupt = |reason| ReadError::Corrupt { file: segment.path.clone(), position, reason };
            let Some(frame) = reader.read().map_err(|fault| segment.fault(fault))? else {
                let follower = self.segments.get(1).map(|segment| segment.header.first);
                if follower != Some(reader.expected) {
                    return Err(segment.ends_before(reader.expected, position));
                }
                self.segments.pop_front();
                self.open = None;
                continue;
            };
            // an index leads to some record before the first one wanted
            if frame.is_internal() || frame.offset < self.next {
                continue;
            }
            let offset = frame.offset;
            self.next = offset + 1;
            if frame.matches(&self.only) {
                let schema = frame.is_events().then(|| segment.schema(frame.schema)).transpose();
                let schema = schema.map_err(|error| self.shared.gone_or(error, offset))?;
                return Ok(Some((Offset(offset), frame.decode(schema).map_err(corrupt)?)));
            }
        }
        Ok(None)
    }
}

impl Shared {
    /// `error` as what a scan at offset `at` says of it: a file can have been dropped since the scan began.
    fn gone_or(&self, error: ReadError, at: u64) -> ReadError {
        let head = self.segments.read()[0].header.first;
        if at < head { ReadError::Gone { from: Offset(at), head: Offset(head) } } else { error }
    }
}

fn open_io(file: &Path, source: io::Error) -> OpenError {
    OpenError::Io { file: file.to_owned(), source }
}

fn lock(directory: &Path) -> Result<File, OpenError> {
    let path = directory.join(LOCK_FILE);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| open_io(&path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked { directory: directory.to_owned() }),
        Err(TryLockError::Error(error)) => Err(open_io(&path, error)),
    }
}

/// The files of a log, oldest first, each checked against what the next one says of it.
fn list(directory: &Path) -> Result<Vec<Arc<Segment>>, OpenError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(|e| open_io(directory, e))? {
        let path = entry.map_err(|e| open_io(directory, e))?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            paths.push(path);
        }
    }
    paths.sort_unstable();
    let mut segments: Vec<Arc<Segment>> = Vec::with_capacity(paths.len());
    for path in paths {
        let header = Header::read(&path)?;
        let length = fs::metadata(&path).map_err(|e| open_io(&path, e))?.len();
        if let Some(before) = segments.last() {
            let (first, end) = header.before;
            let length = before.length.load(Ordering::Relaxed);
            if first != before.header.first {
                let reason = format!("the file before it, `{}`, is missing", file_name(first).display());
                return Err(OpenError::Corrupt { file: path, position: 0, reason });
            }
            if end != length {
                let reason = format!("the file has {length} bytes and had {end} when it was complete");
                return Err(OpenError::Corrupt { file: before.path.clone(), position: length.min(end), reason });
            }
        }
        segments.push(Arc::new(Segment::new(path, header, length)));
    }
    Ok(segments)
}

/// Checks the newest file whole and cuts its torn tail: the file to append to, the offset of its next record, and
/// whether its end is sealed.
fn reopen(disk: &mut dyn Disk, segment: &Segment) -> Result<(File, u64, bool), OpenError> {
    let Verified { next, sealed, torn } = segment.verify()?;
    let io = |error| open_io(&segment.path, error);
    let file = OpenOptions::new().append(true).open(&segment.path).map_err(io)?;
    if let Some(torn) = torn {
        tracing::warn!(
            file = %segment.path.display(), position = torn.position, bytes = torn.bytes, reason = torn.reason,
            "cut off log records that were never completed",
        );
        disk.cut(&file, torn.position).map_err(io)?;
        segment.length.store(torn.position, Ordering::Release);
    }
    // a killed process can leave intact records that the disk does not have yet, and all will be told of them
    disk.sync(&file).map_err(io)?;
    Ok((file, next, sealed))
}

/// Makes the file whose first record will have offset `first`.
fn create(disk: &mut dyn Disk, directory: &Path, first: u64, before: (u64, u64)) -> io::Result<(Arc<Segment>, File)> {
    let header = Header { version: VERSION, salt: rand::random(), first, before };
    let unfinished = directory.join(UNFINISHED);
    let path = directory.join(file_name(first));
    _ = fs::remove_file(&unfinished); // left by a crash or a full disk
    let file = OpenOptions::new().create_new(true).append(true).open(&unfinished)?;
    disk.write(&file, &header.to_bytes())?;
    disk.sync(&file)?;
    disk.publish(&unfinished, &path)?;
    let segment = Segment::new(path, header, HEADER as u64);
    segment.begin();
    Ok((Arc::new(segment), file))
}

/// Makes the names in `directory` durable.
fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn sync_parent(directory: &Path) -> io::Result<()> {
    match directory.parent() {
        Some(parent) if parent != Path::new("") => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
