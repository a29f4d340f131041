//! The whole system from one seed: events with repeats, rest, clock, panics, a log that refuses or fails, and kills in
//! the middle of it; in the end compared with a model that knows only what was sent.
//!
//! Store, log and actors are the real ones. What a seed fixes is what is done and in which order; how far the actors
//! have got when the next thing happens is the machine's.

use super::tests::{Hand, START, World};
use super::*;
use crate::fault_point;
use engine::event::Span;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::Path;
use streams::decode::{Bounds as DecodeBounds, Format, TsUnit, decode};
use streams::log::{AppendError, Pending, ReadError, Record, Scan};
use tempfile::TempDir;
use tokio::sync::oneshot;

/// Seconds of a window of `sums`.
const WINDOW: i64 = 10;
const SYMBOLS: [&str; 3] = ["A", "B", "C"];
/// Over so many events in a window, the rule fires.
const MANY: i64 = 6;

/// What the log does beside its work.
#[derive(Default)]
struct Faults {
    /// So many records are refused.
    refused: u32,
    /// The next record becomes durable, but nobody is told; then the log is stopped, as after a failed sync.
    fails: bool,
    stopped: bool,
}

/// The embedded log with faults.
struct Faulty {
    log: Arc<dyn Log>,
    faults: Arc<Mutex<Faults>>,
}

fn stopped() -> AppendError {
    AppendError::Failed { file: "simulated".into(), cause: Arc::new(io::Error::other("sync failed")) }
}

#[async_trait::async_trait]
impl Log for Faulty {
    fn enqueue(&self, record: Record) -> Result<Pending, AppendError> {
        let mut faults = self.faults.lock();
        if faults.stopped {
            return Err(stopped());
        }
        if faults.refused > 0 {
            faults.refused -= 1;
            return Err(AppendError::Busy { queued: 1, limit: 1 });
        }
        let pending = self.log.enqueue(record)?;
        if !faults.fails {
            return Ok(pending);
        }
        faults.stopped = true;
        let (told, answer) = oneshot::channel();
        tokio::spawn(async move { _ = told.send(pending.await.and(Err(stopped()))) });
        Ok(answer.into())
    }

    async fn barrier(&self) -> Result<(), AppendError> {
        self.log.barrier().await
    }

    fn room(&self) -> Result<(), AppendError> {
        self.log.room()
    }

    fn damage(&self) -> Option<String> {
        self.log.damage()
    }

    fn tail(&self) -> Offset {
        self.log.tail()
    }

    fn head(&self) -> Offset {
        self.log.head()
    }

    fn protect(&self, from: Offset, now: Micros) {
        self.log.protect(from, now);
    }

    fn scan(&self, from: Offset, only: Filter) -> Result<Scan, ReadError> {
        self.log.scan(from, only)
    }

    fn newest(&self) -> Result<HashMap<WorkspaceId, Offset>, ReadError> {
        self.log.newest()
    }
}

#[derive(Clone)]
struct Event {
    id: String,
    /// Since the start of the simulation.
    second: i64,
    symbol: &'static str,
    qty: i64,
}

/// Count and sum by symbol and start of the window.
type Windows = BTreeMap<(String, i64), (i64, i64)>;

/// One workspace and what was sent to it.
struct Sender {
    id: WorkspaceId,
    sent: Vec<Event>,
}

impl Sender {
    fn windows(&self) -> Windows {
        let mut windows = Windows::new();
        for event in &self.sent {
            let key = (event.symbol.to_owned(), event.second.div_euclid(WINDOW) * WINDOW);
            let (count, sum) = windows.entry(key).or_default();
            (*count, *sum) = (*count + 1, *sum + event.qty);
        }
        windows
    }

    /// Starts of the windows at which the rule begins to hold, by symbol.
    fn episodes(&self) -> BTreeSet<(String, i64)> {
        let mut begun = BTreeSet::new();
        let mut before: Option<(String, bool)> = None;
        for ((symbol, start), (count, _)) in self.windows() {
            let held = before.as_ref().is_some_and(|(other, holds)| *other == symbol && *holds);
            if count > MANY && !held {
                begun.insert((symbol.clone(), start));
            }
            before = Some((symbol, count > MANY));
        }
        begun
    }
}

struct Simulation {
    random: StdRng,
    directory: TempDir,
    faults: Arc<Mutex<Faults>>,
    world: Option<World>,
    /// Seconds since the start.
    now: i64,
    senders: Vec<Sender>,
    /// Workspaces whose actor panicked since the last kill: what fails twice is taken for the event's fault.
    panicked: Arc<Mutex<HashSet<WorkspaceId>>>,
    kills: usize,
}

async fn send(system: System, id: WorkspaceId, events: Vec<Event>) -> Result<Ingested, Fault> {
    let line = |event: &Event| {
        let Event { id, second, symbol, qty } = event;
        let ts = START / 1_000 + second * 1_000;
        format!(r#"{{"id":"{id}","ts":{ts},"symbol":"{symbol}","price":1,"qty":{qty}}}"#)
    };
    let body = events.iter().map(line).collect::<Vec<_>>().join("\n");
    let stream: StreamName = "market.trades".parse().unwrap();
    let schema = system.schema(&id, &stream).await?;
    let bounds = DecodeBounds { ts_ahead: Span::seconds(1_000_000), ..DecodeBounds::default() };
    let decoded = decode(&schema, body.as_bytes(), Format::Ndjson, TsUnit::Millis, &bounds, system.now()).unwrap();
    system.ingest(&id, &stream, decoded).await
}

impl Simulation {
    async fn new(seed: u64) -> Simulation {
        let directory = TempDir::new().unwrap();
        let faults = Arc::default();
        let names = [format!("sim{seed}-a"), format!("sim{seed}-b")];
        let world = Simulation::open(directory.path(), &faults, 0).await;
        world.populate(&names.each_ref().map(String::as_str)).await;
        for name in &names {
            let finals =
                "SELECT symbol, n, lag(n) OVER (PARTITION BY symbol ORDER BY window_start) AS before FROM metrics.sums";
            world.define(name, "finals", finals).await;
            let rule = serde_json::json!({"metric": "finals", "condition": format!("n > {MANY}")});
            let rule = serde_json::from_value(rule).unwrap();
            world.system.define_alert_rule(&name.parse().unwrap(), "many".parse().unwrap(), rule).await.unwrap();
        }
        let senders = names.map(|name| Sender { id: name.parse().unwrap(), sent: Vec::new() }).into();
        let random = StdRng::seed_from_u64(seed);
        Simulation {
            random,
            directory,
            faults,
            world: Some(world),
            now: 0,
            senders,
            panicked: Arc::default(),
            kills: 0,
        }
    }

    async fn open(directory: &Path, faults: &Arc<Mutex<Faults>>, now: i64) -> World {
        let faulty = |log| Arc::new(Faulty { log, faults: faults.clone() }) as Arc<dyn Log>;
        let clock = Hand::at(Micros(START + now * 1_000_000));
        World::open_with(directory, Limits::default(), clock, faulty).await
    }

    fn system(&self) -> System {
        self.world.as_ref().unwrap().system.clone()
    }

    async fn kill(&mut self) {
        self.kills += 1;
        self.world.take().unwrap().kill().await;
        *self.faults.lock() = Faults::default();
        self.panicked.lock().clear();
        self.world = Some(Simulation::open(self.directory.path(), &self.faults, self.now).await);
    }

    /// New events for one workspace; within the delay that the watermark allows.
    fn events(&mut self, to: usize) -> Vec<Event> {
        let count = self.random.random_range(1..12);
        let first = self.senders[to].sent.len();
        (first..first + count)
            .map(|number| Event {
                id: format!("e{number}"),
                second: (self.now - self.random.random_range(0..4)).max(0),
                symbol: SYMBOLS[self.random.random_range(0..SYMBOLS.len())],
                qty: self.random.random_range(1..9),
            })
            .collect()
    }

    /// Sends until it is acknowledged, whatever happens meanwhile.
    async fn deliver(&mut self, to: usize, events: Vec<Event>) {
        let id = self.senders[to].id.clone();
        if self.random.random_range(0..6) == 0 {
            // killed while the request is under way: nobody knows what became of it
            let under_way = tokio::spawn(send(self.system(), id.clone(), events.clone()));
            tokio::time::sleep(Duration::from_micros(self.random.random_range(0..3_000))).await;
            under_way.abort();
            _ = under_way.await;
            self.kill().await;
        }
        loop {
            match send(self.system(), id.clone(), events.clone()).await {
                Ok(answer) => {
                    assert_eq!(answer.accepted + answer.duplicates, events.len() as u64, "{answer:?}");
                    return;
                }
                Err(_) if self.faults.lock().stopped => self.kill().await,
                Err(fault) => assert!(matches!(fault.kind, FaultKind::Busy { .. }), "{fault:?}"),
            }
        }
    }

    async fn step(&mut self) {
        let to = self.random.random_range(0..self.senders.len());
        match self.random.random_range(0..20) {
            0..10 => {
                let events = self.events(to);
                self.deliver(to, events.clone()).await;
                self.senders[to].sent.extend(events);
            }
            10..12 => {
                let sent = &self.senders[to].sent;
                if let Some(event) = sent.get(self.random.random_range(0..sent.len().max(1))) {
                    let again = vec![event.clone()];
                    self.deliver(to, again).await;
                }
            }
            12..16 => {
                self.now += self.random.random_range(1..9);
                self.world.as_ref().unwrap().clock.set(Micros(START + self.now * 1_000_000));
            }
            16 => self.faults.lock().refused = self.random.random_range(1..4),
            17 => self.faults.lock().fails = true,
            18 => {
                let mut left = self.random.random_range(1..3);
                let (id, panicked) = (self.senders[to].id.clone(), self.panicked.clone());
                fault_point::on_step(&self.senders[to].id, move |_| {
                    left -= 1;
                    let first = left == 0 && panicked.lock().insert(id.clone());
                    assert!(!first, "a panic of the simulation");
                });
            }
            19 if self.random.random_range(0..4) == 0 => {
                fault_point::spoil_state(&self.senders[to].id);
                self.kill().await;
            }
            _ => self.kill().await,
        }
    }

    /// Every window is closed, and holds each event once.
    async fn check(mut self, seed: u64) -> (usize, i64) {
        // far enough that no window waits any more
        self.now += 100;
        for to in 0..self.senders.len() {
            let last = Event { id: "last".to_owned(), second: self.now, symbol: "Z", qty: 1 };
            self.deliver(to, vec![last]).await;
        }
        let system = self.system();
        for sender in &self.senders {
            let (id, expected, episodes) = (&sender.id, sender.windows(), sender.episodes());
            let begun = std::time::Instant::now();
            let (mut found, mut fired) = (Windows::new(), Vec::new());
            while (found != expected || fired.len() < episodes.len()) && begun.elapsed() < Duration::from_secs(30) {
                tokio::time::sleep(Duration::from_millis(5)).await;
                found = finals(&system, id, seed).await;
                fired = alerts(&system, id).await;
            }
            assert_eq!(found, expected, "seed {seed}: final rows of {id}");
            let once: BTreeSet<_> = fired.iter().cloned().collect();
            assert_eq!((once, fired.len()), (episodes.clone(), episodes.len()), "seed {seed}: alerts of {id}");
        }
        let (kills, mut commits) = (self.kills, 0);
        for Sender { id, .. } in &self.senders {
            assert!(!fault_point::refused_state(id), "seed {seed}: saved state of {id} was not whole");
            commits += system.store().checkpoint(id).await.unwrap().map_or(0, |checkpoint| checkpoint.version);
        }
        drop(system);
        self.world.take().unwrap().kill().await;
        (kills, commits)
    }
}

async fn finals(system: &System, id: &WorkspaceId, seed: u64) -> Windows {
    let query = RowsQuery { limit: 100_000, only_final: Some(true), ..RowsQuery::default() };
    let Ok(page) = system.metric_rows(id, &"sums".parse().unwrap(), query).await else { return Windows::new() };
    let mut windows = Windows::new();
    for row in page.values() {
        let start = chrono::DateTime::parse_from_rfc3339(row["window_start"].as_str().unwrap()).unwrap();
        let key = (row["symbol"].as_str().unwrap().to_owned(), start.timestamp() - START / 1_000_000);
        let sums = (row["n"].as_i64().unwrap(), row["total"].as_f64().unwrap() as i64);
        assert_eq!(windows.insert(key, sums), None, "seed {seed}: a final row is there twice: {row:?}");
    }
    windows
}

async fn alerts(system: &System, id: &WorkspaceId) -> Vec<(String, i64)> {
    let Ok((alerts, _)) = system.store().alerts(id, None, 10_000, None).await else { return Vec::new() };
    let begun = |alert: &Alert| {
        let start = chrono::DateTime::parse_from_rfc3339(alert.row["window_start"].as_str().unwrap()).unwrap();
        (alert.labels["symbol"].as_str().unwrap().to_owned(), start.timestamp() - START / 1_000_000)
    };
    alerts.iter().map(begun).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_with_kills_panics_and_a_failing_log_ends_as_one_without() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seeds: Vec<u64> = match number("TIDEWATCH_TEST_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("TIDEWATCH_TEST_SEEDS").unwrap_or(200)).collect(),
    };
    let run = async |seed: u64| {
        let mut simulation = Simulation::new(seed).await;
        for _ in 0..40 {
            simulation.step().await;
        }
        simulation.check(seed).await
    };
    let runs: Vec<(usize, i64)> =
        futures::stream::iter(&seeds).map(|seed| run(*seed)).buffer_unordered(4).collect().await;
    let (kills, commits) = runs.iter().fold((0, 0), |(kills, commits), run| (kills + run.0, commits + run.1));
    println!("{} seeds, {kills} kills, {commits} commits", seeds.len());
}
