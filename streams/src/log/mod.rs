//! The durable log: records of all workspaces in one order, from which everything else can be rebuilt.
//!
//! [`Log`] is the seam and its doc comment the contract; [`EmbeddedLog`] keeps it in files of this machine.

mod begin; // what a log is called and where it begins
mod check; // complete files, read again now and then
mod batch; // Arrow batches as bytes, without what their schema already says
mod embedded; // one writer thread, group commit, retention, scans
mod places; // where each workspace's records are in a file
mod record; // one record as bytes, with its checksum
mod segment; // one file of records: its header, reading it, finding its torn tail

pub use embedded::EmbeddedLog;
#[cfg(any(test, fuzzing))]
pub(crate) use segment::{file_name, reseal};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use engine::event::{Micros, StreamName, WorkspaceId};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::oneshot;

/// Place of a record in the log: dense from 0, never given to two durable records.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Offset(pub u64);

impl Offset {
    /// The place right after this one.
    pub fn next(self) -> Offset {
        Offset(self.0 + 1)
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the log keeps of one workspace at one place.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    pub workspace: WorkspaceId,
    pub body: Body,
}

/// What happened: events came, some that cannot be used, or time went on without them.
#[derive(Clone, PartialEq, Debug)]
pub enum Body {
    /// Accepted events of one stream, in order. The schema is that of the stream when they came.
    Events { stream: StreamName, batch: RecordBatch },
    /// Processing time moved the event time of an idle stream to `frontier`; a replay does the same here.
    Advance { stream: StreamName, frontier: Micros },
    /// Events that were refused when they came.
    Refused { stream: StreamName, events: Vec<Refused> },
}

/// An event that was refused, and why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refused {
    /// When it came.
    pub at: Micros,
    /// A stable word.
    pub code: String,
    pub detail: String,
    /// The event as it came, cut where it is long.
    pub payload: String,
}

/// Which records a scan gives; the default is all of them. The rest is passed over without decoding it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    pub workspace: Option<WorkspaceId>,
    pub stream: Option<StreamName>,
    /// Only records that reach into this event time: the least and greatest `ts` of the events, or the
    /// frontier. A batch without a `ts` column is always given.
    pub ts: Option<RangeInclusive<Micros>>,
    /// Only batches in which some event has an `id`: what an index of duplicates is rebuilt from.
    pub with_ids: bool,
}

/// What a scan gives, oldest first; ends after the first error.
pub type Scan = Box<dyn Iterator<Item = Result<(Offset, Record), ReadError>> + Send>;

/// Records of all workspaces in one order, durable.
///
/// Offsets are dense and never reused. The order is that of the calls of [`enqueue`](Log::enqueue), so a
/// caller that must put two records in order makes the two calls in order. A refused record has no place in
/// the order, and one enqueued after it may still be accepted.
#[async_trait]
pub trait Log: Send + Sync {
    /// Fixes the place of `record` among those of all callers, without waiting for the disk. The future it
    /// gives tells the offset once the record is durable; dropping it does not take the record back.
    fn enqueue(&self, record: Record) -> Result<Pending, AppendError>;

    /// Returns once `record` is durable: survives the process and the machine losing power.
    async fn append(&self, record: Record) -> Result<Offset, AppendError> {
        self.enqueue(record)?.await
    }

    /// Returns once every record enqueued before the call is durable or its refusal has been told.
    async fn barrier(&self) -> Result<(), AppendError>;

    /// Whether there is room again after an append was refused as [`Full`](AppendError::Full); `Ok` where none was.
    fn room(&self) -> Result<(), AppendError>;

    /// What of the records was found not to be as it was written, for people; who reads it is told
    /// [`Corrupt`](ReadError::Corrupt).
    fn damage(&self) -> Option<String>;

    /// The offset after the newest durable record.
    fn tail(&self) -> Offset;

    /// The oldest offset still kept; equals the tail while there is none.
    fn head(&self) -> Offset;

    /// Tells that the owner needs nothing before `from` any more, and drops what retention lets go at `now`
    /// (processing time). Nothing is dropped at other times, so what was never given free is kept. Blocks
    /// while files are removed; what cannot be removed stays for the next call.
    fn protect(&self, from: Offset, now: Micros);

    /// Records from `from` up to the tail at this call that match `only`. Blocks on reading; empty at the tail.
    /// Of one workspace it costs what that workspace wrote, whatever the others did.
    fn scan(&self, from: Offset, only: Filter) -> Result<Scan, ReadError>;

    /// Every workspace that has records, with the offset of its newest. Blocks on reading.
    fn newest(&self) -> Result<HashMap<WorkspaceId, Offset>, ReadError>;
}

/// An enqueued record on its way to the disk: its offset once durable.
pub struct Pending(oneshot::Receiver<Result<Offset, AppendError>>);

/// For other logs than the embedded one.
impl From<oneshot::Receiver<Result<Offset, AppendError>>> for Pending {
    fn from(answer: oneshot::Receiver<Result<Offset, AppendError>>) -> Self {
        Pending(answer)
    }
}

impl Future for Pending {
    type Output = Result<Offset, AppendError>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|answer| answer.unwrap_or(Err(AppendError::Stopped)))
    }
}

/// Why a record was not appended. One cause can answer many records, hence `Clone`.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AppendError {
    #[error("{queued} of `log.queue_bytes` = {limit} bytes wait for the disk; try again in a moment")]
    Busy { queued: usize, limit: usize },
    #[error("record of {bytes} bytes is over the limit of {limit}; send smaller batches or raise `log.queue_bytes`")]
    TooLarge { bytes: usize, limit: usize },
    #[error("log `{directory}` holds {used} bytes and {room}; nothing was written")]
    Full { directory: PathBuf, used: u64, room: Room },
    #[error("log stopped: `{file}` failed with: {cause}; check the disk, then restart")]
    Failed { file: PathBuf, cause: Arc<io::Error> },
    #[error("the log's writer stopped before this record was durable; restart the process")]
    Stopped,
    #[error("batch of stream `{stream}` has no log encoding: {cause}")]
    Unencodable { stream: StreamName, cause: String },
}

/// What keeps a full log from growing, and the way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// The file system is full.
    Disk,
    /// `log.max_bytes`, this many.
    Configured(u64),
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Room::Disk => f.write_str("its disk is full: free space, appends then go on"),
            Room::Configured(bytes) => {
                write!(f, "`log.max_bytes` is {bytes}: raise it, or lower `log.retain_bytes` or `log.retain_hours`")
            }
        }
    }
}

/// Why a scan could not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("offset {from} is no longer kept: the log begins at {head}; start from a checkpoint at or after it")]
    Gone { from: Offset, head: Offset },
    #[error(
        "offset {from} is past the tail {tail}: the state that names it belongs to another log, or this log lost data"
    )]
    Ahead { from: Offset, tail: Offset },
    #[error("log file `{file}` is corrupt at byte {position}: {reason}; restore the file from a copy")]
    Corrupt { file: PathBuf, position: u64, reason: String },
    #[error("cannot read log file `{file}`: {source}")]
    Io { file: PathBuf, source: io::Error },
}

/// Why a log directory could not be opened. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("log `{directory}` is in use by another process; stop that one or set another `data_dir`")]
    Locked { directory: PathBuf },
    #[error(
        "log file `{file}` has format {found}, this version reads up to {supported}; run the version that wrote it, or \
         restore the file from a copy if none did"
    )]
    Newer { file: PathBuf, found: u32, supported: u32 },
    #[error(
        "log file `{file}` is corrupt at byte {position}: {reason}; restore the file from a copy, or log and store \
         together from a backup (`tidewatch restore`)"
    )]
    Corrupt { file: PathBuf, position: u64, reason: String },
    #[error("`log.segment_bytes` is {asked} and can be {limit} at most; lower it")]
    Segment { asked: u64, limit: u64 },
    #[error("cannot use `{file}`: {source}")]
    Io { file: PathBuf, source: io::Error },
}

/// The `log` section of the configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// A file of records is followed by a new one at this size, 2 GiB at most; retention drops whole files.
    pub segment_bytes: u64,
    /// The most bytes that wait for the disk; over it appends are refused as busy.
    pub queue_bytes: usize,
    /// The most bytes the log may hold; over it appends are refused as full. `None`: what the disk holds.
    pub max_bytes: Option<u64>,
    /// Files that the owner no longer needs go, oldest first, while the log holds more than this.
    pub retain_bytes: Option<u64>,
    /// Files that the owner no longer needs go when nothing was written to them for this long.
    pub retain_hours: Option<u64>,
    /// How often all complete files are read to see whether they are as they were written; 0: never.
    pub check_hours: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            segment_bytes: 128 << 20,
            queue_bytes: 64 << 20,
            max_bytes: None,
            retain_bytes: None,
            retain_hours: None,
            check_hours: 24,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::built_in;
    use arrow::array::{ArrayRef, Float64Array, StringArray, TimestampMicrosecondArray};

    /// `count` trades of the stream `market.trades`, one a microsecond from `ts` on.
    pub(super) fn trades(ts: i64, count: usize) -> RecordBatch {
        let times = ts..ts + count as i64;
        let text = |value: &str| Arc::new(StringArray::from(vec![value; count])) as ArrayRef;
        let numbers = |from: f64| Arc::new(Float64Array::from_iter_values(times.clone().map(|t| from + t as f64)));
        let ids = StringArray::from_iter_values(times.clone().map(|t| format!("trade-{t:08}")));
        let ts = TimestampMicrosecondArray::from_iter_values(times.clone()).with_timezone("+00:00");
        let extra = Arc::new(StringArray::new_null(count));
        let (price, qty) = (numbers(60_000.0), numbers(0.25));
        RecordBatch::try_new(
            built_in()[0].arrow().clone(),
            vec![Arc::new(ts), Arc::new(ids), text("BTC-USD"), price, qty, text("buy"), text("coinbase"), extra],
        )
        .unwrap()
    }

    #[test]
    fn an_unknown_key_in_the_configuration_is_an_error() {
        let config: Config = serde_json::from_str(r#"{"segment_bytes":1024}"#).unwrap();
        assert_eq!(config, Config { segment_bytes: 1024, ..Config::default() });
        assert!(serde_json::from_str::<Config>(r#"{"segment_byte":1024}"#).is_err());
    }
}
