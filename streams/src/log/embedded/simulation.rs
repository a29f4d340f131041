//! The log on a simulated disk: random appends, reads, full disks, failed syncs, kills and power losses from one seed,
//! compared with a model after each. The code is the real one; only the disk and the threads are not.
//!
//! A power loss keeps, of the 512-byte sectors written since the last sync, any and loses the others, which then hold
//! zeros or what was never written there. What was synced stays.

use super::tests::{advance, numbered, scan, short, trade_record, workspace};
use super::*;
use futures::executor::block_on;
use futures::future::FutureExt;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use tempfile::TempDir;

const SECTOR: u64 = 512;

/// Random numbers from a seed (Vigna, SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: u64) -> u64 {
        self.roll() % most
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What the next operations on the disk do.
#[derive(Default)]
struct Plan {
    /// The process dies in this many operations, and none after it does anything.
    dies_in: Option<u64>,
    /// Bytes that still fit.
    room: Option<usize>,
    sync_fails: bool,
    /// By inode: what was written and not synced.
    unsynced: HashMap<u64, Vec<(u64, u64)>>,
}

#[derive(Clone, Default)]
struct SimDisk(Arc<Mutex<Plan>>);

impl SimDisk {
    /// Counts an operation: an error once the process is dead, true when it dies in the middle of this one.
    fn operate(plan: &mut Plan) -> io::Result<bool> {
        match plan.dies_in.as_mut() {
            Some(0) => Err(io::Error::other("dead")),
            Some(left) => {
                *left -= 1;
                Ok(*left == 0)
            }
            None => Ok(false),
        }
    }
}

impl Disk for SimDisk {
    fn write(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        let mut plan = self.0.lock();
        let dies = Self::operate(&mut plan)?;
        let fits = plan.room.unwrap_or(usize::MAX).min(bytes.len());
        let fits = if dies { fits / 2 } else { fits };
        let metadata = file.metadata()?;
        file.write_all(&bytes[..fits])?;
        plan.unsynced.entry(metadata.ino()).or_default().push((metadata.len(), metadata.len() + fits as u64));
        if let Some(room) = plan.room.as_mut() {
            *room -= fits;
        }
        match fits {
            _ if dies => Err(io::Error::other("dies")),
            fits if fits < bytes.len() => Err(ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        let mut plan = self.0.lock();
        if Self::operate(&mut plan)? {
            return Err(io::Error::other("dies"));
        }
        if std::mem::take(&mut plan.sync_fails) {
            return Err(io::Error::other("the disk is broken"));
        }
        plan.unsynced.remove(&file.metadata()?.ino());
        Ok(())
    }

    fn cut(&mut self, file: &File, length: u64) -> io::Result<()> {
        let mut plan = self.0.lock();
        if Self::operate(&mut plan)? {
            return Err(io::Error::other("dies"));
        }
        file.set_len(length)?;
        if let Some(ranges) = plan.unsynced.get_mut(&file.metadata()?.ino()) {
            ranges.retain_mut(|(from, to)| {
                *to = length.min(*to);
                *from < *to
            });
        }
        Ok(())
    }

    fn publish(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let mut plan = self.0.lock();
        let dies = Self::operate(&mut plan)?;
        if dies && plan.unsynced.len() % 2 == 0 {
            return Err(io::Error::other("dies")); // before the new name is durable, else right after
        }
        fs::rename(from, to)?;
        if dies { Err(io::Error::other("dies")) } else { Ok(()) }
    }
}

/// Does to the files what a power loss does.
fn lose_power(directory: &Path, plan: &mut Plan, dice: &mut Dice) {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let metadata = fs::metadata(&path).unwrap();
        let Some(ranges) = plan.unsynced.get(&metadata.ino()).filter(|ranges| !ranges.is_empty()) else { continue };
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for &(from, to) in ranges {
            let mut at = from;
            while at < to.min(metadata.len()) {
                let end = ((at / SECTOR + 1) * SECTOR).min(to).min(metadata.len());
                let lost = match dice.below(4) {
                    0 => vec![0; (end - at) as usize],
                    1 => (at..end).map(|_| dice.roll() as u8).collect(),
                    _ => Vec::new(),
                };
                file.write_all_at(&lost, at).unwrap();
                at = end;
            }
        }
        // the length of a file is written apart from what is in it
        if dice.one_in(3) {
            let from = ranges[0].0;
            file.set_len(from + dice.below(metadata.len() - from + 1)).unwrap();
        }
    }
}

fn kind(refused: &AppendError) -> &'static str {
    match refused {
        AppendError::Full { .. } => "full",
        AppendError::Failed { .. } => "failed",
        _ => "other",
    }
}

struct World {
    dice: Dice,
    directory: TempDir,
    config: Config,
    disk: SimDisk,
    log: Option<(EmbeddedLog, Writer)>,
    /// What was acknowledged, or found after a restart.
    model: Vec<Record>,
    /// Enqueued, in order, and not answered.
    waiting: Vec<(Record, Pending)>,
    trace: Vec<String>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut dice = Dice(seed);
        let config = Config { segment_bytes: 500 + dice.below(6_000), ..Config::default() };
        let directory = TempDir::new().unwrap();
        let disk = SimDisk::default();
        let mut world = World {
            dice,
            directory,
            config,
            disk,
            log: None,
            model: Vec::new(),
            waiting: Vec::new(),
            trace: Vec::new(),
        };
        world.open();
        world
    }

    fn open(&mut self) {
        *self.disk.0.lock() = Plan::default();
        let opened = EmbeddedLog::prepare(Box::new(self.disk.clone()), self.directory.path(), &self.config);
        self.log = Some(opened.unwrap_or_else(|refused| panic!("the log does not open: {refused}")));
        self.waiting.clear();
    }

    fn record(&mut self) -> Record {
        let value = self.dice.below(1_000) as i64;
        match self.dice.below(4) {
            0 => advance(value),
            1 => short(value),
            _ => {
                let name = ["alpha", "beta", "gamma"][self.dice.below(3) as usize];
                trade_record(name, value, self.dice.below(12) as usize)
            }
        }
    }

    fn enqueue(&mut self) {
        let record = self.record();
        let (log, _) = self.log.as_ref().unwrap();
        match log.enqueue(record.clone()) {
            Ok(pending) => self.waiting.push((record, pending)),
            Err(refused) => self.trace.push(format!("refused: {}", kind(&refused))),
        }
    }

    /// The writer takes what waits. Answers come in order: accepted ones are part of the model from here on.
    fn write(&mut self) {
        let (log, writer) = self.log.as_mut().unwrap();
        if log.shared.queue.lock().waiting.is_empty() {
            return;
        }
        let group = writer.wait_for_group().unwrap();
        let count = group.len();
        writer.answer(group);
        for (record, pending) in self.waiting.drain(..count) {
            match pending.now_or_never().expect("the writer has answered") {
                Ok(offset) => {
                    assert_eq!(offset.0, self.model.len() as u64);
                    self.model.push(record);
                    self.trace.push(format!("accepted {offset}"));
                }
                Err(refused) => self.trace.push(format!("refused: {}", kind(&refused))),
            }
        }
    }

    fn compare(&mut self) {
        let (log, _) = self.log.as_ref().unwrap();
        let expected = numbered(&self.model);
        let from = self.dice.below(expected.len() as u64 + 1);
        assert_eq!(log.tail().0, expected.len() as u64);
        assert_eq!(scan(log, Offset(from), Filter::default()), expected[from as usize..]);
        let name = workspace(["alpha", "beta", "gamma"][self.dice.below(3) as usize]);
        let only = Filter { workspace: Some(name.clone()), ..Filter::default() };
        let own: Vec<_> = expected[from as usize..].iter().filter(|(_, r)| r.workspace == name).cloned().collect();
        assert_eq!(scan(log, Offset(from), only), own);
        let newest = expected.iter().rev().find(|(_, r)| r.workspace == name).map(|(offset, _)| *offset);
        assert_eq!(log.newest().unwrap().get(&name).copied(), newest);
    }

    /// The process ends without a word; what it had not answered may or may not be there, but in order and whole.
    fn die(&mut self, power: bool) {
        let sent: Vec<Record> = self.waiting.drain(..).map(|(record, _)| record).collect();
        self.die_with(power, sent);
    }

    fn die_with(&mut self, power: bool, unanswered: Vec<Record>) {
        drop(self.log.take());
        if power {
            lose_power(self.directory.path(), &mut self.disk.0.lock(), &mut self.dice);
        }
        self.open();
        let (log, _) = self.log.as_ref().unwrap();
        let found: Vec<Record> =
            scan(log, Offset(0), Filter::default()).into_iter().map(|(_, record)| record).collect();
        assert!(found.len() >= self.model.len(), "{} of {} acknowledged are there", found.len(), self.model.len());
        assert_eq!(found[..self.model.len()], self.model, "what was acknowledged");
        let more = &found[self.model.len()..];
        assert!(unanswered.starts_with(more), "what was never sent is in the log");
        self.trace.push(format!("{} after a {}", found.len(), if power { "power loss" } else { "kill" }));
        self.model = found;
    }

    fn step(&mut self) {
        match self.dice.below(20) {
            0..=7 => (0..=self.dice.below(4)).for_each(|_| self.enqueue()),
            8..=12 => self.write(),
            13..=14 => self.compare(),
            15 => {
                // a full disk for one group
                self.disk.0.lock().room = Some(self.dice.below(1_500) as usize);
                self.write();
                self.disk.0.lock().room = None;
            }
            16 => {
                self.disk.0.lock().sync_fails = true;
                let sent: Vec<Record> = self.waiting.iter().map(|(record, _)| record.clone()).collect();
                self.write();
                let (log, _) = self.log.as_ref().unwrap();
                let failed = log.shared.queue.lock().failed.is_some();
                if failed {
                    let power = self.dice.one_in(2);
                    self.waiting.clear();
                    self.die_with(power, sent);
                } else {
                    self.disk.0.lock().sync_fails = false;
                }
            }
            17..=18 => {
                // dies in the middle of writing, or before
                self.disk.0.lock().dies_in = Some(1 + self.dice.below(8));
                let sent: Vec<Record> = self.waiting.iter().map(|(record, _)| record.clone()).collect();
                let known = self.model.len();
                self.write();
                let answered = self.model.len() - known;
                self.waiting.clear();
                let power = self.dice.below(4) > 0;
                self.die_with(power, sent[answered..].to_vec());
            }
            _ => {
                let power = self.dice.one_in(2);
                self.die(power);
            }
        }
    }
}

fn run(seed: u64) -> Vec<String> {
    let mut world = World::new(seed);
    for _ in 0..120 {
        world.step();
    }
    world.write();
    world.compare();
    // a clean end seals the log
    let (log, mut writer) = world.log.take().unwrap();
    writer.seal();
    drop((log, writer));
    let log = EmbeddedLog::open(world.directory.path(), &world.config).unwrap();
    assert_eq!(scan(&log, Offset(0), Filter::default()), numbered(&world.model));
    block_on(log.append(short(1))).unwrap();
    world.trace
}

/// Seeds of this run: 300 from 0 on, or `TIDEWATCH_TEST_SEEDS` of them, or the one that `TIDEWATCH_TEST_SEED` names.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    match number("TIDEWATCH_TEST_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("TIDEWATCH_TEST_SEEDS").unwrap_or(300),
    }
}

#[test]
fn through_any_faults_the_log_holds_what_was_acknowledged_in_order() {
    for seed in seeds() {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            println!("repeat with TIDEWATCH_TEST_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_seed_repeats_its_run_exactly() {
    for seed in [1, 7, 42] {
        let trace = run(seed);
        assert!(trace.len() > 50, "{} events", trace.len());
        assert_eq!(trace, run(seed));
    }
}
