//! Appends that are durable when they return, by many threads at a time: our log and three libraries, the same bytes.
//! `log-beside DIR SECONDS` prints appends/s and what one took (p50 / p99).

use arrow::array::{ArrayRef, StringArray};
use arrow::record_batch::RecordBatch;
use futures::executor::block_on;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use streams::log::{Body, Config, EmbeddedLog, Log, Record};

type Append = Box<dyn Fn(&[u8]) + Send + Sync>;

fn ours(directory: &Path) -> Append {
    let log = EmbeddedLog::open(directory, &Config::default()).unwrap();
    let (workspace, stream): (engine::event::WorkspaceId, engine::event::StreamName) =
        ("acme".parse().unwrap(), "own.bytes".parse().unwrap());
    Box::new(move |bytes| {
        let text = Arc::new(StringArray::from(vec![std::str::from_utf8(bytes).unwrap()])) as ArrayRef;
        let batch = RecordBatch::try_from_iter([("text", text)]).unwrap();
        let body = Body::Events { stream: stream.clone(), batch };
        block_on(log.append(Record { workspace: workspace.clone(), body })).unwrap();
    })
}

fn commitlog(directory: &Path) -> Append {
    let mut options = commitlog::LogOptions::new(directory);
    options.segment_max_bytes(128 << 20).message_max_bytes(1 << 20);
    let log = Mutex::new(commitlog::CommitLog::new(options).unwrap());
    Box::new(move |bytes| {
        let mut log = log.lock().unwrap();
        log.append_msg(bytes).unwrap();
        log.flush().unwrap();
    })
}

#[derive(Debug)]
struct Nobody;

impl okaywal::LogManager for Nobody {
    fn recover(&mut self, _: &mut okaywal::Entry<'_>) -> std::io::Result<()> {
        Ok(())
    }

    fn checkpoint_to(
        &mut self,
        _: okaywal::EntryId,
        _: &mut okaywal::SegmentReader,
        _: &okaywal::WriteAheadLog,
    ) -> std::io::Result<()> {
        Ok(())
    }
}

fn okaywal(directory: &Path) -> Append {
    let log = okaywal::WriteAheadLog::recover(directory, Nobody).unwrap();
    Box::new(move |bytes| {
        let mut entry = log.begin_entry().unwrap();
        entry.write_chunk(bytes).unwrap();
        entry.commit().unwrap();
    })
}

fn raft_engine(directory: &Path) -> Append {
    let dir = directory.to_str().unwrap().to_owned();
    let config = raft_engine::Config {
        dir,
        batch_compression_threshold: raft_engine::ReadableSize::kb(0),
        ..Default::default()
    };
    let log = raft_engine::Engine::open(config).unwrap();
    let next = AtomicU64::new(0);
    Box::new(move |bytes| {
        let mut batch = raft_engine::LogBatch::default();
        batch.put(1, next.fetch_add(1, Relaxed).to_be_bytes().to_vec(), bytes.to_vec());
        log.write(&mut batch, true).unwrap();
    })
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().expect("DIR");
    let seconds: u64 = arguments.next().expect("SECONDS").parse().unwrap();
    for (threads, bytes) in [(1, 1 << 10), (64, 1 << 10), (64, 64 << 10)] {
        for (name, open) in [
            ("ours", ours as fn(&Path) -> Append),
            ("raft-engine 0.4.2", raft_engine),
            ("okaywal 0.3.1", okaywal),
            ("commitlog 0.2.0", commitlog),
        ] {
            let place = Path::new(&directory).join(name.split(' ').next().unwrap());
            _ = std::fs::remove_dir_all(&place);
            std::fs::create_dir_all(&place).unwrap();
            let append = open(&place);
            let payload: Vec<u8> = (0..bytes).map(|at| b'a' + (at * 7 % 26) as u8).collect();
            let until = Instant::now() + Duration::from_secs(seconds);
            let mut took: Vec<Duration> = std::thread::scope(|scope| {
                let work = || {
                    let mut took = Vec::new();
                    while Instant::now() < until {
                        let began = Instant::now();
                        append(&payload);
                        took.push(began.elapsed());
                    }
                    took
                };
                let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
                all.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            });
            took.sort();
            let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize];
            let rate = took.len() as f64 / seconds as f64;
            println!(
                "{threads:>2} threads x {bytes:>5} B  {name:<18} {rate:>9.0}/s {:>7.1} MB/s  p50 {:>9.2?} p99 {:>9.2?}",
                rate * bytes as f64 / 1e6,
                at(0.5),
                at(0.99)
            );
            drop(append);
            _ = std::fs::remove_dir_all(&place);
        }
    }
}
