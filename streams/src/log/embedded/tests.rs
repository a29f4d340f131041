use super::*;
use crate::log::tests::trades;
use arrow::array::{ArrayRef, Int64Array};
use arrow::record_batch::RecordBatch;
use engine::event::{StreamName, WorkspaceId};
use futures::FutureExt;
use futures::executor::block_on;
use proptest::prelude::*;
use std::io::ErrorKind;
use std::sync::atomic::AtomicUsize;
use tempfile::TempDir;

/// A disk that counts its syncs and does what the test says.
#[derive(Clone, Default)]
struct TestDisk(Arc<Faults>);

#[derive(Default)]
struct Faults {
    syncs: AtomicUsize,
    /// Bytes left, when there is a limit.
    room: Mutex<Option<usize>>,
    /// How the next sync fails.
    sync_error: Mutex<Option<ErrorKind>>,
    /// A sync waits for it.
    gate: Mutex<()>,
}

impl TestDisk {
    fn syncs(&self) -> usize {
        self.0.syncs.load(Ordering::SeqCst)
    }
}

impl Disk for TestDisk {
    fn write(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        let mut room = self.0.room.lock();
        let fits = room.unwrap_or(usize::MAX).min(bytes.len());
        file.write_all(&bytes[..fits])?;
        if let Some(room) = room.as_mut() {
            *room -= fits;
        }
        if fits < bytes.len() { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        let _open = self.0.gate.lock();
        self.0.syncs.fetch_add(1, Ordering::SeqCst);
        match self.0.sync_error.lock().take() {
            Some(kind) => Err(kind.into()),
            None => file.sync_data(),
        }
    }
}

pub(super) fn workspace(id: &str) -> WorkspaceId {
    id.parse().unwrap()
}

fn stream(name: &str) -> StreamName {
    name.parse().unwrap()
}

pub(super) fn trade_record(id: &str, ts: i64, count: usize) -> Record {
    let body = Body::Events { stream: stream("market.trades"), batch: trades(ts, count) };
    Record { workspace: workspace(id), body }
}

pub(super) fn advance(frontier: i64) -> Record {
    let body = Body::Advance { stream: stream("market.quotes"), frontier: Micros(frontier) };
    Record { workspace: workspace("alpha"), body }
}

/// A record as short as one with a batch can be, so that a log of it can be tried byte by byte.
pub(super) fn short(value: i64) -> Record {
    let values = Arc::new(Int64Array::from(vec![value])) as ArrayRef;
    let batch = RecordBatch::try_from_iter([("v", values)]).unwrap();
    Record { workspace: workspace("a"), body: Body::Events { stream: stream("s.s"), batch } }
}

/// Bytes of the seal at the end of a file.
const SEAL: u64 = 28;

/// Each append a file of its own.
fn one_record_files() -> Config {
    Config { segment_bytes: 1, ..Config::default() }
}

fn open(directory: &Path) -> EmbeddedLog {
    EmbeddedLog::open(directory, &Config::default()).unwrap()
}

fn append(log: &EmbeddedLog, record: Record) -> Offset {
    block_on(log.append(record)).unwrap()
}

fn append_all(log: &EmbeddedLog, records: impl IntoIterator<Item = Record>) {
    for record in records {
        append(log, record);
    }
}

fn all(log: &EmbeddedLog) -> Vec<(Offset, Record)> {
    scan(log, log.head(), Filter::default())
}

pub(super) fn scan(log: &EmbeddedLog, from: Offset, only: Filter) -> Vec<(Offset, Record)> {
    log.scan(from, only).unwrap().map(Result::unwrap).collect()
}

pub(super) fn numbered(records: &[Record]) -> Vec<(Offset, Record)> {
    records.iter().cloned().enumerate().map(|(i, record)| (Offset(i as u64), record)).collect()
}

fn newest_file(directory: &Path) -> PathBuf {
    let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|e| e == "log")).max().unwrap()
}

fn copy(from: &Path) -> TempDir {
    let to = TempDir::new().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    to
}

#[test]
fn a_reopened_log_has_its_records_and_continues_their_offsets() {
    let directory = TempDir::new().unwrap();
    let records = [trade_record("alpha", 1, 1), advance(5), trade_record("beta", 9, 1_000), advance(i64::MIN)];
    for (i, record) in records.iter().enumerate() {
        let log = open(directory.path());
        assert_eq!((log.head(), log.tail()), (Offset(0), Offset(i as u64)));
        assert_eq!(append(&log, record.clone()), Offset(i as u64));
    }
    assert_eq!(all(&open(directory.path())), numbered(&records));
}

#[test]
fn records_over_many_files_are_one_sequence_from_any_offset() {
    let directory = TempDir::new().unwrap();
    let records: Vec<Record> = (0..7).map(|i| trade_record("alpha", i * 10, 2)).collect();
    for config in [one_record_files(), Config::default()] {
        let log = EmbeddedLog::open(directory.path(), &config).unwrap();
        while log.tail().0 < if config.segment_bytes == 1 { 4 } else { 7 } {
            append(&log, records[log.tail().0 as usize].clone());
        }
        let expected = numbered(&records[..log.tail().0 as usize]);
        for from in 0..=expected.len() {
            assert_eq!(scan(&log, Offset(from as u64), Filter::default()), expected[from..]);
        }
        let ahead = log.tail().next();
        assert!(matches!(log.scan(ahead, Filter::default()), Err(ReadError::Ahead { from, .. }) if from == ahead));
    }
}

#[test]
fn all_that_waits_while_the_disk_is_busy_becomes_durable_with_one_sync() {
    let directory = TempDir::new().unwrap();
    let disk = TestDisk::default();
    let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &Config::default()).unwrap();
    let gate = disk.0.gate.lock();
    let before = disk.syncs();
    let pending: Vec<Pending> = (0..200).map(|i| log.enqueue(advance(i)).unwrap()).collect();
    assert_eq!(log.tail(), Offset(0), "nothing is durable before the disk says so");
    assert!(scan(&log, Offset(0), Filter::default()).is_empty());
    drop(gate);
    for (i, pending) in pending.into_iter().enumerate() {
        assert_eq!(block_on(pending).unwrap(), Offset(i as u64), "the order is that of the calls");
    }
    // what the writer had taken when the gate was closed, and the rest
    assert!(disk.syncs() - before <= 2, "{} syncs", disk.syncs() - before);
    assert_eq!(all(&log), numbered(&(0..200).map(advance).collect::<Vec<_>>()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_appends_share_syncs_and_each_gets_its_own_offset() {
    let directory = TempDir::new().unwrap();
    let disk = TestDisk::default();
    let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &Config::default()).unwrap();
    let log = Arc::new(log);
    let tasks: Vec<_> = (0..32)
        .map(|task| {
            let log = log.clone();
            tokio::spawn(async move {
                let mut own = Vec::new();
                for i in 0..20 {
                    own.push(log.append(trade_record("alpha", task * 100 + i, 1)).await.unwrap());
                }
                assert!(own.is_sorted());
                own
            })
        })
        .collect();
    let mut offsets = Vec::new();
    for task in tasks {
        offsets.extend(task.await.unwrap());
    }
    offsets.sort_unstable();
    assert_eq!(offsets, (0..640).map(Offset).collect::<Vec<_>>());
    assert!(disk.syncs() < 640, "{} syncs for 640 appends", disk.syncs());
}

#[test]
fn a_barrier_returns_after_what_came_before_it_is_durable() {
    let directory = TempDir::new().unwrap();
    let log = open(directory.path());
    let _left: Vec<Pending> = (0..50).map(|i| log.enqueue(advance(i)).unwrap()).collect();
    block_on(log.barrier()).unwrap();
    assert_eq!(log.tail(), Offset(50));
    block_on(log.barrier()).unwrap();
}

#[test]
fn closing_the_log_keeps_what_was_enqueued() {
    let directory = TempDir::new().unwrap();
    let log = open(directory.path());
    let pending: Vec<Pending> = (0..50).map(|i| log.enqueue(advance(i)).unwrap()).collect();
    drop(log);
    assert!(pending.into_iter().all(|pending| block_on(pending).is_ok()));
    assert_eq!(open(directory.path()).tail(), Offset(50));
}

#[test]
fn a_scan_during_appends_sees_a_prefix_up_to_the_tail_at_its_call() {
    let directory = TempDir::new().unwrap();
    let log = EmbeddedLog::open(directory.path(), &Config { segment_bytes: 4_000, ..Config::default() }).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| append_all(&log, (0..300).map(|i| trade_record("alpha", i, 1))));
        while !writer.is_finished() {
            let (least, scan) = (log.tail(), log.scan(Offset(0), Filter::default()).unwrap());
            let most = log.tail();
            let offsets: Vec<u64> = scan.map(|item| item.unwrap().0.0).collect();
            assert_eq!(offsets, (0..offsets.len() as u64).collect::<Vec<_>>());
            assert!((least.0..=most.0).contains(&(offsets.len() as u64)));
        }
    });
    assert_eq!(log.tail(), Offset(300));
}

#[test]
fn a_filtered_scan_gives_the_matching_records_only() {
    let directory = TempDir::new().unwrap();
    let log = open(directory.path());
    let chat = Body::Advance { stream: stream("chat.messages"), frontier: Micros(7) };
    let chat = Record { workspace: workspace("beta"), body: chat };
    let (alpha, beta) = (trade_record("alpha", 100, 2), trade_record("beta", 200, 2));
    append_all(&log, [alpha, advance(150), beta, chat, short(1)]);
    let check = |only: Filter, expected: &[u64]| {
        let offsets: Vec<u64> = scan(&log, Offset(0), only).into_iter().map(|(offset, _)| offset.0).collect();
        assert_eq!(offsets, expected);
    };
    let alpha = Some(workspace("alpha"));
    check(Filter { workspace: alpha.clone(), ..Filter::default() }, &[0, 1]);
    check(Filter { stream: Some(stream("market.trades")), ..Filter::default() }, &[0, 2]);
    check(Filter { workspace: alpha, stream: Some(stream("market.trades")), ..Filter::default() }, &[0]);
    check(Filter { ts: Some(Micros(150)..=Micros(200)), ..Filter::default() }, &[1, 2, 4]);
    check(Filter { with_ids: true, ..Filter::default() }, &[0, 2]);
}

#[test]
fn a_second_opener_is_refused_until_the_first_is_gone() {
    let directory = TempDir::new().unwrap();
    let first = open(directory.path());
    let refused = EmbeddedLog::open(directory.path(), &Config::default()).err().unwrap();
    assert!(matches!(&refused, OpenError::Locked { directory: d } if d == directory.path()), "{refused}");
    drop(first);
    open(directory.path());
}

#[test]
fn more_than_the_queue_holds_is_refused_at_once_and_nothing_else_suffers() {
    let directory = TempDir::new().unwrap();
    let disk = TestDisk::default();
    let config = Config { queue_bytes: 1_000, ..Config::default() };
    let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &config).unwrap();
    let gate = disk.0.gate.lock();
    let mut pending = Vec::new();
    let refused = loop {
        match log.enqueue(advance(0)) {
            Ok(accepted) => pending.push(accepted),
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, AppendError::Busy { queued, limit: 1_000 } if queued > 900), "{refused}");
    drop(gate);
    assert!(pending.into_iter().all(|pending| block_on(pending).is_ok()));
    append(&log, advance(1));
    let large = block_on(log.append(trade_record("alpha", 0, 100))).unwrap_err();
    assert!(matches!(large, AppendError::TooLarge { limit: 1_000, .. }), "{large}");
}

#[test]
fn a_full_disk_refuses_records_until_there_is_space_again() {
    for config in [Config::default(), one_record_files()] {
        let directory = TempDir::new().unwrap();
        let disk = TestDisk::default();
        let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &config).unwrap();
        append(&log, short(1));
        // the last one lets the schema through and cuts the record
        for room in [0, 1, 40, 800] {
            *disk.0.room.lock() = Some(room);
            let refused = block_on(log.append(trade_record("alpha", 1, 5))).unwrap_err();
            assert!(matches!(refused, AppendError::Full { room: Room::Disk, .. }), "{refused}");
            block_on(log.barrier()).unwrap();
            assert_eq!(all(&log), numbered(&[short(1)]));
            let files = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap());
            let files = files.filter(|file| file.path().extension().is_some_and(|e| e == "log"));
            let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
            assert_eq!(bytes, log.shared.used.load(Ordering::Relaxed), "nothing of a refused record stays");
        }
        *disk.0.room.lock() = None;
        append(&log, trade_record("alpha", 1, 5));
        *disk.0.sync_error.lock() = Some(ErrorKind::StorageFull);
        assert!(matches!(block_on(log.append(short(2))), Err(AppendError::Full { .. })));
        append(&log, short(3));
        let expected = numbered(&[short(1), trade_record("alpha", 1, 5), short(3)]);
        assert_eq!(all(&log), expected);
        drop(log);
        assert_eq!(all(&open(directory.path())), expected);
    }
}

#[test]
fn after_a_failed_sync_nothing_is_taken_until_a_restart() {
    let directory = TempDir::new().unwrap();
    let disk = TestDisk::default();
    let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &Config::default()).unwrap();
    append(&log, short(0));
    *disk.0.sync_error.lock() = Some(ErrorKind::Other);
    for _ in 0..3 {
        let failed = block_on(log.append(short(1))).unwrap_err();
        assert!(matches!(&failed, AppendError::Failed { file, .. } if file.ends_with("00000000000000000000.log")));
        assert!(matches!(block_on(log.barrier()), Err(AppendError::Failed { .. })));
    }
    assert_eq!(all(&log), numbered(&[short(0)]));
    drop(log);
    let log = open(directory.path());
    assert_eq!(append(&log, short(2)), Offset(1));
    assert_eq!(all(&log), numbered(&[short(0), short(2)]));
}

#[test]
fn over_max_bytes_a_record_is_refused_until_old_files_may_go() {
    let directory = TempDir::new().unwrap();
    let config = Config { max_bytes: Some(1_000), retain_bytes: Some(500), ..one_record_files() };
    let log = EmbeddedLog::open(directory.path(), &config).unwrap();
    let full = loop {
        if let Err(error) = block_on(log.append(advance(0))) {
            break error;
        }
    };
    assert!(matches!(full, AppendError::Full { room: Room::Configured(1_000), .. }), "{full}");
    assert!(matches!(log.room(), Err(AppendError::Full { room: Room::Configured(1_000), .. })), "whoever asks is told");
    log.protect(log.tail(), Micros::ZERO);
    assert!(log.head() > Offset(0));
    log.room().unwrap();
    append(&log, advance(1));
}

#[test]
fn retention_drops_the_oldest_files_but_none_at_or_after_the_protected_offset() {
    let directory = TempDir::new().unwrap();
    let config = Config { retain_bytes: Some(0), ..one_record_files() };
    let log = EmbeddedLog::open(directory.path(), &config).unwrap();
    let records: Vec<Record> = (0..5).map(|i| trade_record("alpha", i, 1)).collect();
    append_all(&log, records.clone());
    let running = log.scan(Offset(1), Filter::default()).unwrap();
    assert_eq!(log.head(), Offset(0));

    log.protect(Offset(3), Micros::ZERO);
    assert_eq!(log.head(), Offset(3));
    assert_eq!(all(&log), numbered(&records)[3..]);
    let gone = log.scan(Offset(2), Filter::default()).err().unwrap();
    assert!(matches!(gone, ReadError::Gone { from: Offset(2), head: Offset(3) }), "{gone}");
    let items: Vec<_> = running.collect();
    assert!(matches!(items.as_slice(), [Err(ReadError::Gone { from: Offset(1), .. })]), "a scan says so too, once");

    log.protect(Offset(u64::MAX), Micros::ZERO);
    assert_eq!(log.head(), Offset(4), "the file being written stays");
    drop(log);
    let log = open(directory.path());
    assert_eq!((log.head(), log.tail()), (Offset(4), Offset(5)));
}

#[test]
fn retention_by_age_counts_from_the_last_write_to_a_file() {
    let directory = TempDir::new().unwrap();
    let config = Config { retain_hours: Some(1), ..one_record_files() };
    let log = EmbeddedLog::open(directory.path(), &config).unwrap();
    append_all(&log, (0..3).map(advance));
    let written = fs::metadata(directory.path().join(file_name(2))).unwrap().modified().unwrap();
    let written = written.duration_since(UNIX_EPOCH).unwrap().as_micros() as i64;
    log.protect(Offset(3), Micros(written + 3_000_000_000));
    assert_eq!(log.head(), Offset(0));
    log.protect(Offset(1), Micros(written + 3_600_000_001));
    assert_eq!(log.head(), Offset(1));
}

#[test]
fn a_last_record_cut_anywhere_is_dropped_and_its_offset_given_again() {
    let directory = TempDir::new().unwrap();
    let log = open(directory.path());
    let (kept, last) = ([trade_record("alpha", 1, 1), advance(2)], trade_record("beta", 3, 1));
    append_all(&log, kept.clone());
    let file = newest_file(directory.path());
    let start = fs::metadata(&file).unwrap().len();
    append(&log, last.clone());
    let end = fs::metadata(&file).unwrap().len();
    drop(log);
    for cut in start..end {
        let torn = copy(directory.path());
        let file = newest_file(torn.path());
        OpenOptions::new().write(true).open(&file).unwrap().set_len(cut).unwrap();
        let log = open(torn.path());
        assert_eq!(all(&log), numbered(&kept), "cut at {cut}");
        assert_eq!(fs::metadata(&file).unwrap().len(), start + SEAL, "cut at {cut}");
        assert_eq!(append(&log, last.clone()), Offset(2), "cut at {cut}");
        drop(log);
        assert_eq!(all(&open(torn.path())).last(), Some(&(Offset(2), last.clone())), "cut at {cut}");
    }
}

#[test]
fn a_changed_byte_anywhere_is_told_with_its_file_or_costs_nothing() {
    let directory = TempDir::new().unwrap();
    append_all(&open(directory.path()), [short(1), short(2)]);
    // begins the second file
    append(&EmbeddedLog::open(directory.path(), &one_record_files()).unwrap(), advance(3));
    append(&open(directory.path()), short(4));
    let original = all(&open(directory.path()));
    let files: Vec<PathBuf> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    for path in files.iter().filter(|path| path.extension().is_some_and(|e| e == "log")) {
        let bytes = fs::read(path).unwrap();
        for at in 0..bytes.len() {
            let changed = copy(directory.path());
            let file = changed.path().join(path.file_name().unwrap());
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&file, &bytes).unwrap();
            let log = match EmbeddedLog::open(changed.path(), &Config::default()) {
                Ok(log) => log,
                Err(OpenError::Corrupt { file: told, position, .. }) => {
                    assert!(told == file && position <= at as u64, "{at} in {file:?}, told {position} in {told:?}");
                    continue;
                }
                Err(OpenError::Newer { file: told, .. }) if told == file && (8..12).contains(&at) => continue,
                Err(other) => panic!("{at} in {file:?}: {other}"),
            };
            let mut good = Vec::new();
            let mut error = None;
            for item in log.scan(log.head(), Filter::default()).unwrap() {
                match item {
                    Ok(record) => good.push(record),
                    Err(found) => error = Some(found),
                }
            }
            assert_eq!(good, original[..good.len()], "{at} in {file:?}");
            match error {
                Some(ReadError::Corrupt { file: told, position, .. }) => assert!(told == file && position <= at as u64),
                Some(other) => panic!("{at} in {file:?}: {other}"),
                None => assert_eq!(good.len(), original.len(), "{at} in {file:?}"), // in the seal at the end
            }
        }
    }
}

#[test]
fn a_missing_or_shortened_earlier_file_is_refused_when_the_log_is_opened() {
    let directory = TempDir::new().unwrap();
    let log = EmbeddedLog::open(directory.path(), &one_record_files()).unwrap();
    append_all(&log, (0..4).map(advance));
    drop(log);
    let check = |harm: &dyn Fn(&Path), expected: &str| {
        let harmed = copy(directory.path());
        harm(harmed.path());
        let refused = EmbeddedLog::open(harmed.path(), &Config::default()).err().unwrap().to_string();
        assert!(refused.contains(expected), "{refused}");
    };
    check(&|d| fs::remove_file(d.join(file_name(1))).unwrap(), "`00000000000000000001.log`, is missing");
    let shorten = |d: &Path| OpenOptions::new().write(true).open(d.join(file_name(1))).unwrap().set_len(60).unwrap();
    check(&shorten, "00000000000000000001.log` is corrupt at byte 60");
    check(&|d| fs::write(d.join(file_name(3)), "").unwrap(), "shorter than its header");
    check(&|d| fs::rename(d.join(file_name(3)), d.join(file_name(9))).unwrap(), "the file's name says another");
}

#[test]
fn a_look_at_the_complete_files_tells_which_are_not_as_they_were_written() {
    let directory = TempDir::new().unwrap();
    let log = EmbeddedLog::open(directory.path(), &one_record_files()).unwrap();
    append_all(&log, (0..5).map(advance));
    let look = || {
        assert!(log.shared.check.look(&|| log.shared.segments.read().clone()).is_continue());
        log.damage()
    };
    assert_eq!(look(), None);
    let harm = |first: u64, harm: &dyn Fn(&mut Vec<u8>)| {
        let path = directory.path().join(file_name(first));
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        harm(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let told = look();
        fs::write(&path, whole).unwrap();
        told
    };
    let flipped = harm(1, &|bytes| *bytes.last_mut().unwrap() ^= 1).unwrap();
    let expected = "00000000000000000001.log` is corrupt at byte 44: the checksum of a record is wrong";
    assert!(flipped.contains(expected), "{flipped}");
    let cut = harm(2, &|bytes| bytes.truncate(HEADER)).unwrap();
    assert!(cut.contains("00000000000000000002.log` is corrupt at byte 44: the file ends before offset 2"), "{cut}");
    assert_eq!(harm(4, &|bytes| bytes.truncate(HEADER)), None, "what is being written is read when the log is opened");
    // one that retention took while it was looked at is not missed
    let files = log.shared.segments.read().clone();
    fs::remove_file(&files[0].path).unwrap();
    let first = std::cell::Cell::new(true);
    let then = || if first.replace(false) { files.clone() } else { files[1..].to_vec() };
    assert!(log.shared.check.look(&then).is_continue());
    assert_eq!(log.damage(), None);
    // and the end is not waited for
    log.shared.check.end();
    assert!(log.shared.check.run(Duration::from_secs(3_600), Vec::new).is_break());
}

#[test]
fn a_first_file_that_retention_did_not_take_is_missed() {
    let directory = TempDir::new().unwrap();
    let config = Config { retain_bytes: Some(0), ..one_record_files() };
    let log = EmbeddedLog::open(directory.path(), &config).unwrap();
    append_all(&log, (0..4).map(advance));
    log.protect(Offset(1), Micros::ZERO);
    let id = log.id().to_owned();
    drop(log);
    let log = open(directory.path());
    assert_eq!((log.head(), log.id()), (Offset(1), id.as_str()), "what was let go is not missed");
    drop(log);
    fs::remove_file(directory.path().join(file_name(1))).unwrap();
    let refused = EmbeddedLog::open(directory.path(), &Config::default()).err().unwrap().to_string();
    assert!(refused.contains("00000000000000000001.log") && refused.contains("missing"), "{refused}");
}

#[test]
fn a_later_format_is_refused_with_both_versions() {
    let directory = TempDir::new().unwrap();
    drop(open(directory.path()));
    let file = newest_file(directory.path());
    let mut bytes = fs::read(&file).unwrap();
    bytes[8] = 9;
    fs::write(&file, bytes).unwrap();
    let refused = EmbeddedLog::open(directory.path(), &Config::default()).err().unwrap();
    assert!(matches!(refused, OpenError::Newer { found: 9, supported: 2, .. }), "{refused}");
}

#[test]
fn an_event_whose_bytes_look_like_a_record_does_not_pass_for_one() {
    let directory = TempDir::new().unwrap();
    let log = open(directory.path());
    append(&log, advance(1));
    drop(log);
    let file = newest_file(directory.path());
    let mut forged = Vec::new();
    Draft::advance(&workspace("evil"), &stream("a.b"), Micros(1)).seal(1, 0, 12_345, &mut forged);
    // a record torn by a crash, in front of bytes that would be a good record under another salt
    let mut tail = vec![200, 0, 0, 0, 1, 2, 3, 4];
    tail.extend_from_slice(&forged);
    OpenOptions::new().append(true).open(&file).unwrap().write_all(&tail).unwrap();
    assert_eq!(all(&open(directory.path())), numbered(&[advance(1)]));
}

/// Three records of which the last two were on their way to the disk together, and where these begin.
fn with_a_group(directory: &Path) -> (Vec<Record>, u64, u64) {
    let disk = TestDisk::default();
    let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory, &Config::default()).unwrap();
    let length = || fs::metadata(newest_file(directory)).unwrap().len();
    let records = vec![short(1), trade_record("alpha", 2, 1), advance(3)];
    let gate = disk.0.gate.lock();
    let first = log.enqueue(records[0].clone()).unwrap();
    while length() == HEADER as u64 {
        thread::yield_now();
    }
    let start = length(); // the writer waits for the disk, and what comes now is its next group
    let rest: Vec<Pending> = records[1..].iter().map(|record| log.enqueue(record.clone()).unwrap()).collect();
    drop(gate);
    block_on(first).unwrap();
    rest.into_iter().for_each(|pending| _ = block_on(pending).unwrap());
    let end = length();
    drop(log);
    (records, start, end)
}

#[test]
fn who_writes_little_does_not_wait_for_all_of_who_writes_much() {
    let directory = TempDir::new().unwrap();
    let disk = TestDisk::default();
    let log = EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &Config::default()).unwrap();
    let gate = disk.0.gate.lock();
    let first = log.enqueue(short(1)).unwrap();
    while fs::metadata(newest_file(directory.path())).unwrap().len() == HEADER as u64 {
        thread::yield_now();
    }
    // more than a share each, but for the last, which must not overtake those of its workspace
    let much = [20_000, 20_000, 20_000, 1].map(|rows| trade_record("much", 1, rows));
    let much = much.map(|record| log.enqueue(record).unwrap());
    let mut barrier = Box::pin(log.barrier());
    assert!((&mut barrier).now_or_never().is_none());
    let little = log.enqueue(trade_record("little", 1, 1)).unwrap();
    drop(gate);
    assert_eq!(block_on(first).unwrap(), Offset(0));
    assert_eq!(block_on(little).unwrap(), Offset(2), "with the first of the others");
    block_on(barrier).unwrap();
    assert_eq!(log.tail(), Offset(6), "all before it is durable");
    assert_eq!(much.map(|pending| block_on(pending).unwrap().0), [1, 3, 4, 5]);
    let rows = |record: &Record| match &record.body {
        Body::Events { batch, .. } => batch.num_rows(),
        Body::Advance { .. } | Body::Refused { .. } => 0,
    };
    let kept: Vec<usize> = all(&log).iter().map(|(_, record)| rows(record)).collect();
    assert_eq!(kept, [1, 20_000, 1, 20_000, 20_000, 1]);
}

#[test]
fn a_group_torn_anywhere_is_cut_where_it_is_torn_and_what_was_durable_before_stays() {
    let directory = TempDir::new().unwrap();
    let (records, start, end) = with_a_group(directory.path());
    for torn_at in start..end {
        let torn = copy(directory.path());
        let file = newest_file(torn.path());
        let mut bytes = fs::read(&file).unwrap();
        bytes.truncate(end as usize); // as before the seal
        bytes[torn_at as usize] ^= 0x55;
        fs::write(&file, bytes).unwrap();
        let log = open(torn.path());
        let kept = log.tail().0 as usize;
        assert!((1..records.len()).contains(&kept), "torn at {torn_at}: {kept} records");
        assert_eq!(all(&log), numbered(&records[..kept]), "torn at {torn_at}");
        append(&log, short(9));
        drop(log);
        assert_eq!(open(torn.path()).tail(), Offset(kept as u64 + 1), "torn at {torn_at}");
    }
}

#[test]
fn a_fault_in_a_group_is_corruption_once_a_later_one_is_there() {
    let directory = TempDir::new().unwrap();
    let (_, start, end) = with_a_group(directory.path());
    let log = open(directory.path());
    append(&log, short(4));
    let file = newest_file(directory.path());
    let bytes = fs::read(&file).unwrap();
    drop(log);
    for at in HEADER as u64..end {
        let changed = copy(directory.path());
        let mut bytes = bytes.clone();
        bytes[at as usize] ^= 0x55;
        fs::write(newest_file(changed.path()), bytes).unwrap();
        let refused = EmbeddedLog::open(changed.path(), &Config::default()).err().unwrap();
        assert!(
            matches!(refused, OpenError::Corrupt { position, .. } if position <= at && (at < start || position >= start)),
            "{at}: {refused}"
        );
    }
}

#[test]
fn a_file_of_the_version_before_is_read_and_not_written_to() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join(file_name(0));
    let header = Header { version: 1, salt: 7, first: 0, before: Header::NO_FILE_BEFORE };
    let mut bytes = header.to_bytes().to_vec();
    for offset in 0..2 {
        let mut record = Vec::new();
        Draft::advance(&workspace("alpha"), &stream("market.quotes"), Micros(offset)).seal(
            offset as u64,
            0,
            7,
            &mut record,
        );
        bytes.extend(record);
    }
    fs::write(&file, &bytes).unwrap();
    let log = open(directory.path());
    append(&log, advance(2));
    assert_eq!(all(&log), numbered(&[advance(0), advance(1), advance(2)]));
    drop(log);
    assert_eq!(fs::read(&file).unwrap(), bytes);
    assert_eq!(open(directory.path()).tail(), Offset(3));
}

#[test]
fn a_scan_of_one_workspace_reads_its_records_from_any_offset_over_files_and_restarts() {
    let directory = TempDir::new().unwrap();
    let config = Config { segment_bytes: 2_000, ..Config::default() };
    let names = ["alpha", "beta", "gamma"];
    let mut expected: Vec<(Offset, Record)> = Vec::new();
    for round in 0..4 {
        let log = EmbeddedLog::open(directory.path(), &config).unwrap();
        for i in 0..15 {
            let name = names[(i * i + round) % 3];
            let record = trade_record(name, i as i64, 1 + i % 4);
            expected.push((append(&log, record.clone()), record));
        }
        if round == 2 {
            // an index is only a help: one that is gone or damaged is made again
            let indexes: Vec<PathBuf> = fs::read_dir(directory.path())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.extension().is_some_and(|e| e == "index"))
                .collect();
            assert!(indexes.len() > 2);
            fs::remove_file(&indexes[0]).unwrap();
            fs::write(&indexes[1], "no index").unwrap();
        }
        for name in names.map(workspace) {
            let own: Vec<_> = expected.iter().filter(|(_, record)| record.workspace == name).cloned().collect();
            for from in 0..=expected.len() as u64 {
                let only = Filter { workspace: Some(name.clone()), ..Filter::default() };
                let later: Vec<_> = own.iter().filter(|(offset, _)| offset.0 >= from).cloned().collect();
                assert_eq!(scan(&log, Offset(from), only), later, "{name} from {from}");
            }
            assert_eq!(log.newest().unwrap().get(&name), own.last().map(|(offset, _)| offset));
        }
    }
}

#[test]
fn files_that_cannot_be_addressed_are_refused_with_the_limit() {
    let config = Config { segment_bytes: (2 << 30) + 1, ..Config::default() };
    let refused = EmbeddedLog::open(TempDir::new().unwrap().path(), &config).err().unwrap();
    assert!(matches!(refused, OpenError::Segment { limit: SEGMENT_BYTES_MAX, .. }), "{refused}");
}

#[derive(Clone, Debug)]
enum Step {
    Append(Record),
    /// The disk is full after this many bytes.
    Full(Record, usize),
    SyncFails(Record),
    /// A crash leaves this many bytes of a record behind.
    Crash(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let record = || {
        prop_oneof![
            any::<i64>().prop_map(advance),
            any::<i64>().prop_map(short),
            (0..1_000_i64, 0..20_usize).prop_map(|(ts, count)| trade_record("alpha", ts, count)),
        ]
    };
    prop_oneof![
        6 => record().prop_map(Step::Append),
        1 => (record(), 0..40_usize).prop_map(|(record, room)| Step::Full(record, room)),
        1 => record().prop_map(Step::SyncFails),
        2 => (0..60_usize).prop_map(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]
    #[test]
    fn whatever_happens_the_log_holds_exactly_what_was_acknowledged(
        steps in proptest::collection::vec(step(), 1..24),
        segment_bytes in 1..3_000_u64,
    ) {
        let directory = TempDir::new().unwrap();
        let config = Config { segment_bytes, ..Config::default() };
        let disk = TestDisk::default();
        let reopen = || EmbeddedLog::open_on(Box::new(disk.clone()), directory.path(), &config).unwrap();
        let mut log = reopen();
        let mut acknowledged = Vec::new();
        for step in steps {
            match step {
                Step::Append(record) => {
                    prop_assert_eq!(append(&log, record.clone()), Offset(acknowledged.len() as u64));
                    acknowledged.push(record);
                }
                Step::Full(record, room) => {
                    *disk.0.room.lock() = Some(room);
                    let refused = matches!(block_on(log.append(record)), Err(AppendError::Full { .. }));
                    prop_assert!(refused);
                    *disk.0.room.lock() = None;
                }
                Step::SyncFails(record) => {
                    *disk.0.sync_error.lock() = Some(ErrorKind::Other);
                    let refused = matches!(block_on(log.append(record)), Err(AppendError::Failed { .. }));
                    prop_assert!(refused);
                    drop(log);
                    log = reopen();
                }
                Step::Crash(bytes) => {
                    drop(log);
                    let mut torn = Vec::new();
                    Draft::advance(&workspace("alpha"), &stream("market.quotes"), Micros(1))
                        .seal(acknowledged.len() as u64, 0, 0, &mut torn);
                    torn.truncate(bytes);
                    let mut file = OpenOptions::new().append(true).open(newest_file(directory.path())).unwrap();
                    file.write_all(&torn).unwrap();
                    log = reopen();
                }
            }
            prop_assert_eq!(log.tail(), Offset(acknowledged.len() as u64));
        }
        prop_assert_eq!(all(&log), numbered(&acknowledged));
        drop(log);
        prop_assert_eq!(all(&reopen()), numbered(&acknowledged));
    }
}
