//! The system on a real store and log: restarts, rest and waking, repeats, and events that cannot be computed.

use super::*;
use crate::fault_point;
use crate::webhook::WebhookChange;
use arrow::array::AsArray;
use cache::Warmth;
use engine::event::Span;
use sql::store::User;
use sqlx::{ConnectOptions, Connection};
use std::path::Path;
use streams::decode::{Bounds as DecodeBounds, Format, TsUnit, decode};
use streams::log::EmbeddedLog;
use tempfile::TempDir;

/// A clock that stands where the test puts it.
pub(super) struct Hand(Mutex<Micros>);

impl Hand {
    pub(super) fn at(now: Micros) -> Arc<Hand> {
        Arc::new(Hand(Mutex::new(now)))
    }

    pub(super) fn set(&self, now: Micros) {
        *self.0.lock() = now;
    }
}

impl Clock for Hand {
    fn now(&self) -> Micros {
        *self.0.lock()
    }
}

/// Remembers what was pushed.
#[derive(Default)]
pub(super) struct Pushed(Mutex<Vec<Update>>);

impl Outlet for Pushed {
    fn publish(&self, update: Update) {
        self.0.lock().push(update);
    }
}

impl Pushed {
    /// Alerts that were told, by phase and id.
    fn alerts(&self) -> Vec<(AlertPhase, String)> {
        let updates = self.0.lock();
        let alert = |update: &Update| match &update.what {
            What::Alert { phase, alert } => Some((*phase, alert.id.clone())),
            _ => None,
        };
        updates.iter().filter_map(alert).collect()
    }

    /// Final rows that were pushed.
    fn finals(&self) -> usize {
        let updates = self.0.lock();
        let rows = updates.iter().map(|update| match &update.what {
            What::Rows { rows, .. } if rows.revisions.is_some() => rows.batch.num_rows(),
            _ => 0,
        });
        rows.sum()
    }
}

pub(super) struct World {
    pub(super) system: System,
    pushed: Arc<Pushed>,
    pub(super) clock: Arc<Hand>,
}

pub(super) const START: i64 = 1_800_000_000_000_000;

impl World {
    async fn open(directory: &Path, limits: Limits) -> World {
        World::open_with(directory, limits, Hand::at(Micros(START)), |log| log).await
    }

    pub(super) async fn open_with(
        directory: &Path,
        limits: Limits,
        clock: Arc<Hand>,
        around: impl FnOnce(Arc<dyn Log>) -> Arc<dyn Log>,
    ) -> World {
        let log = open_log(directory, &streams::log::Config::default()).await;
        World::over(directory, limits, clock, around(Arc::new(log))).await
    }

    async fn over(directory: &Path, limits: Limits, clock: Arc<Hand>, log: Arc<dyn Log>) -> World {
        let store = Store::open(&format!("sqlite:{}/store.db", directory.display())).await.unwrap();
        let pushed = Arc::new(Pushed::default());
        let parts = Parts {
            store,
            log,
            dedup: Arc::new(Dedup::open(&directory.join("ids"), &Default::default()).unwrap()),
            outlet: pushed.clone(),
            clock: clock.clone(),
            limits,
            agents: BTreeMap::new(),
            cache: cache::Cache::new(&cache::Config::default()),
            webhooks: WebhookConfig { allow_private: true, ..WebhookConfig::default() },
            sealer: Arc::new(Sealer::new(["a key of the tests, long enough for them"].into_iter())),
            retention: Default::default(),
        };
        let system = System::start(parts).await.unwrap();
        World { system, pushed, clock }
    }

    async fn start(directory: &Path) -> World {
        World::open(directory, Limits::default()).await
    }

    /// A world whose log begins a new file after each append.
    async fn of_small_files(directory: &Path) -> World {
        let config = streams::log::Config { segment_bytes: 1, ..Default::default() };
        let log = open_log(directory, &config).await;
        World::over(directory, Limits::default(), Hand::at(Micros(START)), Arc::new(log)).await
    }

    /// A world with workspaces of these names and a metric `sums` in each.
    async fn with(directory: &Path, limits: Limits, names: &[&str]) -> World {
        let world = World::open(directory, limits).await;
        world.populate(names).await;
        world
    }

    /// Workspaces of these names, with a metric `sums` in each.
    pub(super) async fn populate(&self, names: &[&str]) {
        let ann = User {
            id: "ann".into(),
            email: "ann@example.com".into(),
            password_hash: "hash".into(),
            admin: false,
            created_at: Micros(1),
        };
        self.system.store().create_user(&ann).await.unwrap();
        for name in names {
            self.create(name).await;
            let sql = "SELECT symbol, count(*) AS n, sum(qty) AS total FROM market.trades \
                       GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol";
            self.define(name, "sums", sql).await;
        }
    }

    async fn create(&self, name: &str) {
        let workspace = Workspace {
            id: name.parse().unwrap(),
            name: name.into(),
            pack: None,
            tier: "standard".into(),
            created_at: Micros(1),
        };
        self.system.create_workspace(workspace, "ann").await.unwrap();
    }

    pub(super) async fn define(&self, name: &str, metric: &str, sql: &str) {
        let definition = serde_json::from_value(serde_json::json!({"sql": sql})).unwrap();
        self.system.define_metric(&name.parse().unwrap(), metric.parse().unwrap(), definition).await.unwrap();
    }

    /// A rule over `sums`.
    async fn rule(&self, name: &str, rule: &str, condition: &str) {
        let definition = serde_json::json!({"metric": "sums", "condition": condition});
        let definition = serde_json::from_value(definition).unwrap();
        self.system.define_alert_rule(&name.parse().unwrap(), rule.parse().unwrap(), definition).await.unwrap();
    }

    /// Trades of one symbol, a second apart from `second` on; `ids` names them.
    async fn trades(&self, name: &str, symbol: &str, second: i64, count: i64, ids: &str) -> Result<Ingested, Fault> {
        let line = |i: i64| {
            let ts = (START + (second + i) * 1_000_000) / 1_000;
            format!(r#"{{"id":"{ids}-{i}","ts":{ts},"symbol":"{symbol}","price":1,"qty":1}}"#)
        };
        self.post(name, (0..count).map(line).collect::<Vec<_>>().join("\n")).await
    }

    async fn post(&self, name: &str, body: String) -> Result<Ingested, Fault> {
        let (id, stream) = (name.parse().unwrap(), "market.trades".parse().unwrap());
        let schema = self.system.schema(&id, &stream).await.unwrap();
        let bounds = DecodeBounds { ts_ahead: Span::seconds(1_000_000), ..DecodeBounds::default() };
        let decoded = decode(&schema, body.as_bytes(), Format::Ndjson, TsUnit::Millis, &bounds, self.system.now());
        self.system.ingest(&id, &stream, decoded.unwrap()).await
    }

    async fn rows(&self, name: &str) -> Vec<(String, i64, bool)> {
        let query = RowsQuery { limit: 10_000, ..RowsQuery::default() };
        let page = self.system.metric_rows(&name.parse().unwrap(), &"sums".parse().unwrap(), query).await.unwrap();
        let row = |row: &Map<String, Value>| {
            let text = row["symbol"].as_str().unwrap().to_owned();
            (text, row["n"].as_i64().unwrap(), row["final"].as_bool().unwrap())
        };
        page.values().iter().map(row).collect()
    }

    /// Events counted by `sums`, in windows open and closed.
    async fn counted(&self, name: &str) -> i64 {
        self.rows(name).await.iter().map(|(_, n, _)| n).sum()
    }

    fn phase(&self, name: &str) -> Phase {
        self.system.tenant(&name.parse().unwrap()).unwrap().phase()
    }

    /// Ends as a killed process does: nothing is committed any more.
    pub(super) async fn kill(self) {
        for tenant in self.system.tenants() {
            tenant.gone.store(true, Relaxed); // its supervisor must not start it again
            if let Some(actor) = tenant.actor() {
                actor.kill();
            }
            tenant.set_phase(Phase::Failed); // nobody waits for it
        }
        self.system.0.root.stop(None);
        self.system.store().close().await;
        let tenants: Vec<_> = self.system.tenants().iter().map(Arc::downgrade).collect();
        let (system, weak) = (self.system.clone(), Arc::downgrade(&self.system.0.deps.log));
        drop((self, system));
        eventually("the log is closed", async || {
            // one that was just being started has its actor only now, and nobody is left to say that it ended
            for tenant in tenants.iter().filter_map(Weak::upgrade) {
                if let Some(actor) = tenant.actor() {
                    actor.kill();
                    tenant.set_phase(Phase::Failed);
                }
            }
            weak.strong_count() == 0
        })
        .await;
    }
}

/// The log of a world; the one before it, dropped already, may still be ending its writer.
async fn open_log(directory: &Path, config: &streams::log::Config) -> EmbeddedLog {
    for _ in 0..1_000 {
        match EmbeddedLog::open(&directory.join("log"), config) {
            Err(streams::log::OpenError::Locked { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
            log => return log.unwrap(),
        }
    }
    panic!("the log before is not closed within 5 s");
}

pub(super) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..3_000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within a minute: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_wakes_only_the_workspaces_that_have_something_to_compute() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["busy", "calm", "empty"]).await;
    world.trades("calm", "A", 0, 5, "a").await.unwrap();
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;

    let world = World::start(directory.path()).await;
    assert!(["busy", "calm", "empty"].iter().all(|name| matches!(world.phase(name), Phase::Resting)));
    world.trades("busy", "A", 0, 7, "a").await.unwrap();
    world.kill().await;

    let world = World::start(directory.path()).await;
    eventually("the busy one is awake", async || matches!(world.phase("busy"), Phase::Running(_))).await;
    assert!(matches!(world.phase("calm"), Phase::Resting) && matches!(world.phase("empty"), Phase::Resting));
    assert_eq!((world.counted("busy").await, world.counted("calm").await), (7, 5));
    assert!(matches!(world.phase("calm"), Phase::Running(_)), "a question wakes it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_events_of_a_stream_are_counted_on_after_a_stop_and_after_a_kill() {
    let directory = TempDir::new().unwrap();
    let events = async |world: &World| {
        let streams = world.system.streams(&"acme".parse().unwrap()).await.unwrap();
        streams.iter().find(|info| info.schema.stream.as_str() == "market.trades").unwrap().events
    };
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    world.trades("acme", "A", 0, 5, "a").await.unwrap();
    assert_eq!(events(&world).await, 5);
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;
    let world = World::start(directory.path()).await;
    assert_eq!(events(&world).await, 5);
    world.trades("acme", "A", 10, 2, "b").await.unwrap();
    world.trades("acme", "A", 10, 2, "b").await.unwrap(); // repeats are no events
    world.kill().await;
    assert_eq!(events(&World::start(directory.path()).await).await, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_at_rest_wakes_for_an_event_and_pushes_what_comes_of_it() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits { rest_ms: 200, ..Limits::default() }, &["acme"]).await;
    world.trades("acme", "A", 0, 3, "a").await.unwrap();
    eventually("it rests", async || matches!(world.phase("acme"), Phase::Resting)).await;
    *world.clock.0.lock() = Micros(START + 3_600_000_000);
    eventually("it wakes to close its window", async || world.pushed.finals() == 1).await;
    eventually("it rests again", async || matches!(world.phase("acme"), Phase::Resting)).await;
    world.trades("acme", "A", 7_200, 1, "b").await.unwrap();
    world.trades("acme", "A", 7_300, 1, "c").await.unwrap();
    eventually("the window closes and is pushed", async || world.pushed.finals() == 2).await;
    eventually("what is provisional is pushed too", async || {
        let updates = world.pushed.0.lock();
        matches!(updates.last().map(|u| &u.what), Some(What::Rows { rows, .. }) if rows.revisions.is_none())
    })
    .await;
    assert_eq!(world.counted("acme").await, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_closes_in_time_though_its_workspace_rests_and_the_process_was_away() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    world.trades("acme", "A", 0, 3, "a").await.unwrap();
    assert_eq!(world.counted("acme").await, 3);
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;
    let world = World::start(directory.path()).await;
    assert!(matches!(world.phase("acme"), Phase::Resting));
    *world.clock.0.lock() = Micros(START + 60_000_000);
    eventually("the window is final", async || world.pushed.finals() == 1).await;
    assert_eq!(world.rows("acme").await, [("A".to_owned(), 3, true)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeats_are_known_after_kills_and_counted_once() {
    let directory = TempDir::new().unwrap();
    let mut world = World::with(directory.path(), Limits::default(), &["acme", "other"]).await;
    for round in 0..4 {
        let first = world.trades("acme", "A", 0, 20, "same").await.unwrap();
        assert_eq!((first.accepted, first.duplicates), if round == 0 { (20, 0) } else { (0, 20) });
        let fresh = world.trades("acme", "A", 20, 10, &format!("round-{round}")).await.unwrap();
        assert_eq!((fresh.accepted, fresh.duplicates), (10, 0));
        if round == 2 {
            let (dedup, tail) = (world.system.0.shared.dedup.clone(), world.system.0.deps.log.tail());
            dedup.flush(tail.0, Micros(START)).unwrap();
        }
        world.kill().await;
        world = World::start(directory.path()).await;
    }
    let other = world.trades("other", "A", 0, 20, "same").await.unwrap();
    assert_eq!(other.accepted, 20, "another workspace has ids of its own");
    assert_eq!(world.counted("acme").await, 60);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_made_again_knows_no_ids_of_the_one_before() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    assert_eq!(world.trades("acme", "A", 0, 5, "same").await.unwrap().accepted, 5);
    world.system.delete_workspace(&"acme".parse().unwrap()).await.unwrap();
    world.create("acme").await;
    assert_eq!(world.trades("acme", "A", 0, 5, "same").await.unwrap().accepted, 5);
    world.kill().await;
    let world = World::start(directory.path()).await;
    assert_eq!(world.trades("acme", "A", 0, 5, "same").await.unwrap().duplicates, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_bad_events_in_one_replay_are_all_found_and_metrics_over_metrics_go_on() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["chained"]).await;
    let id: WorkspaceId = "chained".parse().unwrap();
    world.define("chained", "finals", "SELECT symbol, n FROM metrics.sums").await;
    fault_point::on_step(&id, |batch| {
        let ids = batch.column_by_name("id").unwrap().as_string::<i32>();
        assert!(!ids.iter().flatten().any(|id| id.starts_with("bad") && id.ends_with('7')), "a seven");
    });
    for round in 0..3 {
        world.trades("chained", "A", round * 10, 10, &format!("bad{round}")).await.unwrap();
    }
    world.trades("chained", "A", 60, 1, "good").await.unwrap();
    assert_eq!(world.counted("chained").await, 3 * 9 + 1, "a question waits for the restarts");
    let query = RowsQuery { limit: 100, ..RowsQuery::default() };
    let finals = world.system.metric_rows(&id, &"finals".parse().unwrap(), query).await.unwrap().values();
    assert_eq!(finals.iter().map(|row| row["n"].as_i64().unwrap()).collect::<Vec<_>>(), [9, 9, 9]);
    eventually("the letters are stored", async || {
        world.system.store().dead_letters(&id, None, 10, None).await.unwrap().0.len() == 3
    })
    .await;

    // a metric that is defined later reads past them too
    let restarts = world.system.actors().await[0].restarts;
    let definition = serde_json::json!({
        "sql": "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 hour')", "backfill": Span::seconds(86_400),
    });
    let definition = serde_json::from_value(definition).unwrap();
    world.system.define_metric(&id, "all".parse().unwrap(), definition).await.unwrap();
    let query = RowsQuery { limit: 100, ..RowsQuery::default() };
    let all = world.system.metric_rows(&id, &"all".parse().unwrap(), query).await.unwrap().values();
    assert_eq!(all[0]["n"], 3 * 9 + 1);
    assert_eq!(world.system.actors().await[0].restarts, restarts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_events_are_dead_letters_once_whatever_is_killed() {
    const ROUNDS: usize = 6;
    let directory = TempDir::new().unwrap();
    let id: WorkspaceId = "refusing".parse().unwrap();
    World::with(directory.path(), Limits::default(), &["refusing"]).await.kill().await;
    let letters = async |world: &World| {
        let letters = world.system.store().dead_letters(&id, None, 100, None).await.unwrap().0;
        let mut payloads: Vec<String> = letters.into_iter().map(|letter| letter.payload).collect();
        payloads.sort();
        payloads
    };
    let line = |price: &str, ts: usize| format!(r#"{{"ts":{ts},"symbol":"A","price":{price},"qty":1}}"#);
    let ts = |round: usize| START as usize / 1_000 + round;
    let mut expected: Vec<String> = Vec::new();
    for round in 0..ROUNDS {
        let world = World::open(directory.path(), Limits::default()).await;
        let bad = line("\"x\"", ts(round));
        let body = if round % 2 == 0 { format!("{bad}\n{}", line("1", ts(round))) } else { bad.clone() };
        let done = world.post("refusing", body).await.unwrap();
        assert_eq!((done.rejected, done.accepted), (1, (round % 2 == 0) as u64), "round {round}");
        expected.push(bad);
        if round % 3 == 2 {
            eventually("they are stored", async || letters(&world).await == expected).await;
        }
        world.kill().await;
    }
    let world = World::open(directory.path(), Limits::default()).await;
    eventually("all are there once", async || letters(&world).await == expected).await;
    assert_eq!(world.counted("refusing").await, ROUNDS as i64 / 2);
}

/// Damages the file in the middle of the log, in its middle.
fn damage(log: &Path) {
    let files = std::fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect();
    files.sort();
    let file = &files[files.len() / 2];
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 16].iter_mut().for_each(|byte| *byte ^= 0xff);
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metric_whose_backfill_cannot_be_read_is_not_defined_and_one_of_before_stays() {
    let directory = TempDir::new().unwrap();
    let (id, bf): (WorkspaceId, ItemName) = ("acme".parse().unwrap(), "bf".parse().unwrap());
    let sql = "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol";
    let definition = |backfill: Option<Span>| -> MetricDefinition {
        serde_json::from_value(serde_json::json!({"sql": sql, "backfill": backfill})).unwrap()
    };
    let refused = async |world: &World, metric: &str| {
        let fault = world.system.define_metric(&id, metric.parse().unwrap(), definition(Some(Span::seconds(86_400))));
        let fault = fault.await.unwrap_err();
        assert_eq!((fault.code, matches!(fault.kind, FaultKind::Busy { .. })), ("log_unavailable", true), "{fault}");
        assert!(fault.detail.contains("could not be read") && !fault.detail.contains(".log"), "{fault}");
    };
    let is_nowhere = async |world: &World| {
        let known: Vec<ItemName> =
            world.system.metrics(&id).await.unwrap().into_iter().map(|metric| metric.name).collect();
        assert_eq!(known, ["sums".parse().unwrap()]);
        let asked = world.system.metric_rows(&id, &bf, RowsQuery { limit: 100, ..RowsQuery::default() }).await;
        assert_eq!(asked.err().unwrap().code, "unknown_metric");
        let query = RowQuery { limit: 100, ..RowQuery::default() };
        assert!(world.system.store().rows(&id, &bf, &query).await.unwrap().0.is_empty());
        let is_of_it = |update: &Update| match &update.what {
            What::Rows { metric, .. } | What::MetricRemoved { metric } => *metric == bf,
            _ => false,
        };
        assert!(!world.pushed.0.lock().iter().any(is_of_it));
        assert_eq!(world.counted("acme").await, 12);
    };
    let world = World::of_small_files(directory.path()).await;
    world.populate(&["acme"]).await;
    for window in 0..6 {
        world.trades("acme", "A", window * 10, 2, &format!("a{window}")).await.unwrap();
    }
    assert_eq!(world.counted("acme").await, 12);
    damage(&directory.path().join("log"));
    for _ in 0..2 {
        refused(&world, "bf").await;
        refused(&world, "sums").await;
        is_nowhere(&world).await;
    }
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;

    let world = World::of_small_files(directory.path()).await;
    is_nowhere(&world).await;
    refused(&world, "bf").await;
    is_nowhere(&world).await;
    world.system.define_metric(&id, bf.clone(), definition(None)).await.unwrap();
    world.trades("acme", "A", 100, 1, "b").await.unwrap();
    assert_eq!(world.counted_by("acme", "bf", "A").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_cannot_be_computed_goes_to_the_dead_letters_and_the_rest_counts() {
    poison_among(10).await;
}

/// Where the batch is so large that it is computed aside.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_batch_with_an_event_that_cannot_be_computed_is_told_apart_as_a_small_one_is() {
    poison_among(1_500).await;
}

async fn poison_among(events: i64) {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["poisoned", "neighbour"]).await;
    let poisoned: WorkspaceId = "poisoned".parse().unwrap();
    fault_point::panic_at(&poisoned, "id", "bad-5");
    world.trades("poisoned", "A", 0, 10, "good").await.unwrap();
    world.trades("poisoned", "B", 0, events, "bad").await.unwrap();
    world.trades("poisoned", "A", events, 10, "more").await.unwrap();
    world.trades("neighbour", "A", 0, 10, "good").await.unwrap();
    assert_eq!(world.counted("neighbour").await, 10);
    eventually("it is over the event", async || {
        let (metric, query) = ("sums".parse().unwrap(), RowsQuery { limit: 10_000, ..RowsQuery::default() });
        let rows = world.system.metric_rows(&poisoned, &metric, query);
        rows.await
            .is_ok_and(|page| page.values().iter().filter_map(|row| row["n"].as_i64()).sum::<i64>() == events + 19)
    })
    .await;
    eventually("the letter is stored", async || {
        let letters = world.system.store().dead_letters(&poisoned, None, 10, None).await.unwrap().0;
        letters.len() == 1
            && letters[0].code == "poison"
            && letters[0].detail.contains("no computation for id = bad-5")
            && letters[0].payload.contains("bad-5")
    })
    .await;
    let actors = world.system.actors().await;
    let actor = actors.iter().find(|actor| actor.path == "root/poisoned").unwrap();
    assert_eq!((actor.restarts, actor.state.as_str()), (2, "running"));
    assert!(actor.last_failure.as_ref().is_some_and(|failure| failure.contains("bad-5")), "{:?}", actor.last_failure);
    let neighbour = actors.iter().find(|actor| actor.path == "root/neighbour").unwrap();
    assert_eq!(neighbour.restarts, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alert_fires_once_through_panics_and_kills() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["alerting"]).await;
    let id: WorkspaceId = "alerting".parse().unwrap();
    let rule = serde_json::from_value(serde_json::json!({"metric": "sums", "condition": "total > 5"})).unwrap();
    world.system.define_alert_rule(&id, "large".parse().unwrap(), rule).await.unwrap();
    world.trades("alerting", "A", 0, 10, "a").await.unwrap();
    eventually("it fires", async || !world.pushed.alerts().is_empty()).await;
    let fired = world.pushed.alerts();
    let stored = world.system.store().alerts(&id, None, 10, None).await.unwrap().0;
    assert_eq!(fired, [(AlertPhase::Firing, stored[0].id.clone())], "it is stored when it is told");
    fault_point::panic_at(&id, "id", "bad-0");
    world.trades("alerting", "B", 5, 1, "bad").await.unwrap();
    world.trades("alerting", "B", 5, 1, "good").await.unwrap();
    eventually("it is over the panics", async || {
        world.system.actors().await.iter().any(|actor| actor.restarts == 2 && actor.state == "running")
    })
    .await;
    assert_eq!(world.counted("alerting").await, 11);
    assert_eq!(world.pushed.alerts(), fired);
    world.kill().await;
    let world = World::start(directory.path()).await;
    assert!(world.counted("alerting").await > 0);
    assert_eq!(world.pushed.alerts(), []);
    assert_eq!(world.system.store().alerts(&id, None, 10, None).await.unwrap().0, stored);
}

/// Of a metric over another one, defined when nothing waits to be saved: what is corrected later and was final before is none
/// of its rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metric_over_another_begins_where_it_was_defined_though_a_kill_comes_before_its_first_checkpoint() {
    let mut ends = Vec::new();
    for is_killed in [false, true] {
        let directory = TempDir::new().unwrap();
        let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
        let (id, late, run) =
            ("acme".parse::<WorkspaceId>().unwrap(), "late".parse::<ItemName>().unwrap(), "run".parse().unwrap());
        let definition = serde_json::json!({"max_delay": 5_000_000, "allowed_lateness": 30_000_000,
            "sql": "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol"});
        world.system.define_metric(&id, late, serde_json::from_value(definition).unwrap()).await.unwrap();
        for second in [1_000, 1_010, 1_020] {
            world.trades("acme", "A", second, 10, &format!("e{second}")).await.unwrap();
        }
        world.trades("acme", "A", 1_045, 1, "on").await.unwrap();
        world.system.stop(Duration::from_secs(60)).await;
        world.kill().await;

        let mut world = World::start(directory.path()).await;
        let sums =
            "SELECT symbol, n, sum(n) OVER (PARTITION BY symbol ORDER BY window_start) AS so_far FROM metrics.late";
        world.define("acme", "run", sums).await;
        if is_killed {
            world.kill().await;
            world = World::start(directory.path()).await;
        }
        world.trades("acme", "A", 1_025, 1, "late").await.unwrap();
        world.trades("acme", "A", 1_075, 1, "end").await.unwrap();
        let mut rows = Vec::new();
        eventually("its first row is stored", async || {
            let query = RowQuery { limit: 100, ..RowQuery::default() };
            rows = world.system.store().rows(&id, &run, &query).await.unwrap().0;
            !rows.is_empty()
        })
        .await;
        ends.push(rows.into_iter().map(|row| (row.window_start, row.revision, row.row)).collect::<Vec<_>>());
    }
    assert_eq!(ends[1], ends[0]);
    assert!(ends[0].len() == 1 && ends[0][0].2.contains("\"so_far\":1"), "{ends:?}");
}

/// A state that cannot be used, while the log still has all events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_is_lost_is_computed_again_as_it_was() {
    lost_state(false).await;
}

/// The same where the log has let the oldest of them go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_is_lost_is_computed_again_behind_what_retention_has_dropped() {
    lost_state(true).await;
}

async fn lost_state(is_cut: bool) {
    let names = [format!("kept-{is_cut}"), format!("lost-{is_cut}")];
    let directory = TempDir::new().unwrap();
    let world = World::of_small_files(directory.path()).await;
    world.populate(&names.each_ref().map(String::as_str)).await;
    for name in &names {
        let id: WorkspaceId = name.parse().unwrap();
        let late = serde_json::json!({"max_delay": 5_000_000, "allowed_lateness": 30_000_000,
            "sql": "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol"});
        let late = serde_json::from_value(late).unwrap();
        world.system.define_metric(&id, "late".parse().unwrap(), late).await.unwrap();
        let sums =
            "SELECT symbol, n, sum(n) OVER (PARTITION BY symbol ORDER BY window_start) AS so_far FROM metrics.late";
        world.define(name, "run", sums).await;
        let rule = serde_json::json!({"metric": "run", "condition": "so_far > 15"});
        let rule = serde_json::from_value(rule).unwrap();
        world.system.define_alert_rule(&id, "many".parse().unwrap(), rule).await.unwrap();
        world.trades(name, "A", 0, 10, "old").await.unwrap();
    }
    let kept_from = world.system.0.deps.log.tail();
    for name in &names {
        for second in [100, 1_000, 1_010, 1_020] {
            world.trades(name, "A", second, 10, &format!("e{second}")).await.unwrap();
        }
        world.trades(name, "A", 1_045, 1, "on").await.unwrap();
        world.trades(name, "A", 1_025, 1, "late-1").await.unwrap();
        // younger than what they are about
        let id: WorkspaceId = name.parse().unwrap();
        eventually("the correction is there", async || {
            let query = RowsQuery { limit: 100, only_final: Some(true), ..RowsQuery::default() };
            let page = world.system.metric_rows(&id, &"late".parse().unwrap(), query).await.unwrap();
            page.values().iter().any(|row| row["n"] == 11)
        })
        .await;
        let sql =
            "SELECT symbol, n, sum(n) OVER (PARTITION BY symbol ORDER BY window_start) AS so_far FROM metrics.late";
        let filled = serde_json::from_value(serde_json::json!({"sql": sql, "backfill": 60_000_000_i64})).unwrap();
        world.system.define_metric(&id, "filled".parse().unwrap(), filled).await.unwrap();
        let rule = serde_json::json!({"metric": "run", "condition": "so_far > 16"});
        let rule = serde_json::from_value(rule).unwrap();
        world.system.define_alert_rule(&id, "young".parse().unwrap(), rule).await.unwrap();
    }
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;
    if is_cut {
        let config = streams::log::Config { segment_bytes: 1, retain_bytes: Some(1), ..Default::default() };
        let log = open_log(directory.path(), &config).await;
        log.protect(kept_from, Micros(START));
        assert_eq!(log.head(), kept_from);
    }
    fault_point::spoil_state(&names[1].parse().unwrap());

    let world = World::of_small_files(directory.path()).await;
    for name in &names {
        world.trades(name, "A", 1_026, 1, "late-2").await.unwrap();
        world.trades(name, "A", 1_055, 1, "end").await.unwrap();
    }
    let mut found = Vec::new();
    for name in &names {
        let id: WorkspaceId = name.parse().unwrap();
        let mut all = Vec::new();
        for metric in ["late", "run", "filled"] {
            let query = sql::store::RowQuery { limit: 100, ..Default::default() };
            let mut rows = Vec::new();
            let corrections = if metric == "filled" { 1 } else { 2 };
            eventually("the corrections and the last window are stored", async || {
                rows = world.system.store().rows(&id, &metric.parse().unwrap(), &query).await.unwrap().0;
                rows.iter().any(|row| row.revision == corrections)
                    && rows.iter().any(|row| row.window_start == Micros(START + 1_040_000_000))
            })
            .await;
            all.extend(rows.into_iter().map(|row| (row.metric, row.window_start, row.revision, row.row)));
        }
        let mut alerts = Vec::new();
        eventually("both rules have fired", async || {
            alerts = world.system.store().alerts(&id, None, 10, None).await.unwrap().0;
            alerts.len() >= 2
        })
        .await;
        alerts.sort_by(|a, b| a.rule.cmp(&b.rule));
        let alerts: Vec<_> =
            alerts.into_iter().map(|alert| (alert.rule, alert.state, alert.started_at, alert.row)).collect();
        assert_eq!(alerts.len(), 2, "{alerts:?}");
        found.push((all, alerts));
    }
    assert!(!fault_point::refused_state(&names[1].parse().unwrap()));
    assert_eq!(found[1], found[0]);
    assert!(found[0].0.iter().any(|row| row.3.contains("\"so_far\":52")), "{:?}", found[0].0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_from_before_a_column_was_added_are_read_in_the_columns_of_now_and_count_once_in_memory() {
    let directory = TempDir::new().unwrap();
    let world =
        World::with(directory.path(), Limits { query_memory: 4 << 20, ..Limits::default() }, &["evolving"]).await;
    let (id, stream): (WorkspaceId, StreamName) = ("evolving".parse().unwrap(), "my.events".parse().unwrap());
    let columns = |names: &[&str]| -> Vec<Column> {
        names.iter().map(|n| serde_json::from_value(serde_json::json!({"name": n, "type": "utf8"})).unwrap()).collect()
    };
    for (round, names) in [&["a"][..], &["a", "b"]].into_iter().enumerate() {
        let schema = StreamSchema::new(stream.clone(), columns(names), UnknownFields::Keep).unwrap();
        world.system.define_stream(&id, schema).await.unwrap();
        let schema = world.system.schema(&id, &stream).await.unwrap();
        let lines: Vec<String> = (0..10_000).map(|n| format!(r#"{{"a":"{round}-{n}","b":"b"}}"#)).collect();
        let bounds = DecodeBounds::default();
        let now = world.system.now();
        let decoded = decode(&schema, lines.join("\n").as_bytes(), Format::Ndjson, TsUnit::Millis, &bounds, now);
        world.system.ingest(&id, &stream, decoded.unwrap()).await.unwrap();
    }
    let sql = "SELECT count(a), count(b) FROM my.events".to_owned();
    let answer = world.system.query(&id, QueryRequest { sql, params: Vec::new(), timeout: None }).await.unwrap();
    let counted = |at: usize| answer.batches[0].column(at).as_primitive::<arrow::datatypes::Int64Type>().value(0);
    assert_eq!((counted(0), counted(1)), (20_000, 10_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alert_of_a_rule_that_changed_or_is_gone_is_resolved_once() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let id: WorkspaceId = "acme".parse().unwrap();
    world.rule("acme", "large", "total > 5").await;
    world.trades("acme", "A", 0, 7, "a").await.unwrap();
    eventually("it fires", async || world.pushed.alerts().len() == 1).await;
    world.rule("acme", "large", "total > 6").await; // which holds too
    world.rule("acme", "large", "total > 1000").await;
    eventually("it is resolved", async || world.pushed.alerts().len() == 2).await;
    world.rule("acme", "large", "total > 5").await;
    world.trades("acme", "A", 7, 1, "b").await.unwrap();
    eventually("it fires again", async || world.pushed.alerts().len() == 3).await;
    world.system.remove_alert_rule(&id, &"large".parse().unwrap()).await.unwrap();
    eventually("it is resolved again", async || world.pushed.alerts().len() == 4).await;
    let phases: Vec<AlertPhase> = world.pushed.alerts().into_iter().map(|(phase, _)| phase).collect();
    assert_eq!(phases, [AlertPhase::Firing, AlertPhase::Resolved, AlertPhase::Firing, AlertPhase::Resolved]);
    let stored = world.system.store().alerts(&id, None, 10, None).await.unwrap().0;
    assert_eq!(stored.iter().map(|alert| alert.state.as_str()).collect::<Vec<_>>(), ["resolved", "resolved"]);

    // a metric that is defined anew takes what fires over its rows with it, and a start finds what a kill left behind
    world.rule("acme", "large", "total > 5").await;
    world.trades("acme", "A", 8, 1, "c").await.unwrap();
    eventually("it fires once more", async || world.pushed.alerts().len() == 5).await;
    let offset = world.system.store().checkpoint(&id).await.unwrap().unwrap().offset;
    let gone = sql::store::RuleChange { name: "large".parse().unwrap(), definition: None, at: Micros(START) };
    let commit = sql::store::Commit {
        workspace: id.clone(),
        offset,
        state: None,
        rows: Vec::new(),
        repeats: false,
        alerts: Vec::new(),
        notices: Vec::new(),
        dead_letters: Vec::new(),
        rules: vec![gone],
    };
    world.system.store().commit(&[commit]).await.unwrap();
    world.kill().await;
    let world = World::start(directory.path()).await;
    assert_eq!(world.counted("acme").await, 9);
    eventually("it is resolved at the start", async || world.pushed.alerts().len() == 1).await;
    world.rule("acme", "large", "total > 5").await;
    world.trades("acme", "A", 9, 1, "d").await.unwrap();
    eventually("it fires", async || world.pushed.alerts().len() == 2).await;
    let hourly = "SELECT symbol, sum(qty) AS total FROM market.trades GROUP BY tumble(ts, INTERVAL '1 hour'), symbol";
    world.define("acme", "sums", hourly).await;
    eventually("it is resolved with the metric", async || world.pushed.alerts().len() == 3).await;
    assert_eq!(world.system.store().alerts(&id, Some("firing"), 10, None).await.unwrap().0, []);
}

/// What a kill leaves to be replayed is judged by the rule that was there then, and not by the one of now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_that_was_changed_just_before_a_kill_begins_in_its_place_of_the_replay() {
    for (before, after, alerts) in [("total > 1000", "total > 5", 0), ("total > 5", "total > 1000", 1)] {
        let directory = TempDir::new().unwrap();
        let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
        let id: WorkspaceId = "acme".parse().unwrap();
        world.rule("acme", "large", before).await;
        world.trades("acme", "A", 0, 7, "a").await.unwrap();
        eventually("the state is stored", async || {
            world.system.store().checkpoint(&id).await.unwrap().is_some_and(|checkpoint| checkpoint.offset > 0)
        })
        .await;
        world.trades("acme", "A", 5, 1, "b").await.unwrap();
        world.trades("acme", "A", 30, 1, "c").await.unwrap();
        eventually("the window closes", async || world.pushed.finals() == 1).await;
        world.rule("acme", "large", after).await;
        world.kill().await;
        let world = World::start(directory.path()).await;
        assert_eq!(world.counted("acme").await, 9);
        world.trades("acme", "A", 60, 1, "d").await.unwrap();
        eventually("the next window closes", async || world.pushed.finals() >= 1).await;
        let of_rule = async || world.system.store().alerts(&id, None, 10, None).await.unwrap().0;
        eventually("what fires no more is resolved", async || {
            of_rule().await.iter().all(|alert| alert.state == "resolved")
        })
        .await;
        assert_eq!(of_rule().await.len(), alerts, "{before} -> {after}: {:?}", of_rule().await);
        world.rule("acme", "large", "total > 6").await;
        world.trades("acme", "A", 61, 7, "e").await.unwrap();
        eventually("the rule of now fires", async || of_rule().await.iter().any(|alert| alert.state == "firing")).await;
        // what cannot be stored changes nothing
        world.system.store().close().await;
        let refused =
            serde_json::from_value(serde_json::json!({"metric": "sums", "condition": "total > 1000"})).unwrap();
        let refused = world.system.define_alert_rule(&id, "large".parse().unwrap(), refused).await.unwrap_err();
        assert_eq!(refused.code, "store_unavailable");
        world.kill().await;
        let world = World::start(directory.path()).await;
        let rules = world.system.store().alert_rules(&id).await.unwrap();
        assert_eq!(rules[0].definition["condition"], "total > 6");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backtest_raises_the_alerts_that_were_raised() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let id: WorkspaceId = "acme".parse().unwrap();
    world.rule("acme", "busy", "n > 3").await;
    for (round, (symbol, second, count)) in
        [("A", 0, 3), ("B", 2, 9), ("A", 5, 3), ("B", 11, 2), ("A", 9, 4), ("A", 17, 1), ("B", 14, 30), ("A", 40, 2)]
            .into_iter()
            .enumerate()
    {
        world.trades("acme", symbol, second, count, &format!("r{round}")).await.unwrap();
    }
    let definition = serde_json::from_value(serde_json::json!({"metric": "sums", "condition": "n > 3"})).unwrap();
    let asked = Micros(START)..Micros(START + 3_600_000_000);
    let tested = world.system.backtest(&id, definition, asked).await.unwrap();
    let mut expected: Vec<(String, Micros, bool)> = (tested.episodes.iter())
        .map(|e| (Value::Object(e.labels.clone()).to_string(), e.started_at, e.resolved_at.is_some()))
        .collect();
    expected.sort();
    assert!(expected.len() > 3, "{expected:?}");
    let told: usize = expected.iter().map(|(.., resolved)| 1 + usize::from(*resolved)).sum();
    eventually("all are told", async || world.pushed.alerts().len() == told).await;
    let stored = world.system.store().alerts(&id, None, 100, None).await.unwrap().0;
    let mut found: Vec<_> =
        stored.iter().map(|a| (a.labels.to_string(), a.started_at, a.state == "resolved")).collect();
    found.sort();
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_stream_closes_its_windows_though_a_longer_one_is_open() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits { idle_timeout_ms: 300, ..Limits::default() }, &["acme"]).await;
    let long = "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '10 hours')";
    world.define("acme", "long", long).await;
    for round in 0..2 {
        world.trades("acme", "A", round * 60, 1, &format!("r{round}")).await.unwrap();
        assert_eq!(world.counted("acme").await, round + 1);
        *world.clock.0.lock() = Micros(START + (round * 60 + 30) * 1_000_000);
        eventually("the window is final", async || world.pushed.finals() as i64 == round + 1).await;
        tokio::time::sleep(Duration::from_millis(1_500)).await; // it looks once more, and then waits for the long one
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_a_metric_reads_stays_and_a_metric_that_cannot_be_planned_keeps_its_name_and_rows() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let id: WorkspaceId = "acme".parse().unwrap();
    let stream: StreamName = "shop.sales".parse().unwrap();
    let schema = |columns: &[&str]| {
        let column = |name: &&str| Column { name: (*name).into(), kind: "int64".parse().unwrap(), nullable: true };
        StreamSchema::new(stream.clone(), columns.iter().map(column).collect(), UnknownFields::Keep).unwrap()
    };
    world.system.define_stream(&id, schema(&["x", "y", "z"])).await.unwrap();
    let sql = "SELECT sum(x) AS s FROM shop.sales GROUP BY tumble(ts, INTERVAL '1 minute')";
    world.define("acme", "sales", sql).await;
    world.define("acme", "doubled", "SELECT 2 * s AS d FROM metrics.sales").await;
    world.rule("acme", "many", "total > 5").await;
    let fault = world.system.define_stream(&id, schema(&["y", "z"])).await.unwrap_err();
    assert_eq!((fault.kind, fault.code), (FaultKind::Conflict, "column_in_use"));
    assert!(fault.detail.contains("metric `sales`"), "{fault}");
    world.system.define_stream(&id, schema(&["x", "y"])).await.unwrap();

    let now = world.system.schema(&id, &stream).await.unwrap();
    let lines = ["{\"ts\": 1800000000000, \"x\": 4}", "{\"ts\": 1800000120000, \"x\": 1}"].join("\n");
    let bounds = DecodeBounds { ts_ahead: Span::seconds(1_000_000), ..DecodeBounds::default() };
    let decoded = decode(&now, lines.as_bytes(), Format::Ndjson, TsUnit::Millis, &bounds, world.system.now());
    world.system.ingest(&id, &stream, decoded.unwrap()).await.unwrap();
    eventually("the window is final", async || world.pushed.finals() == 2).await;
    world.system.stop(Duration::from_secs(60)).await;

    // as a process that allowed it left it
    let stored = StoredSchema { columns: schema(&["y"]).columns, unknown_fields: UnknownFields::Keep };
    let schema_json = serde_json::to_string(&stored).unwrap();
    let row = StreamRow { workspace: id.clone(), stream, schema_json, created_at: Micros(1), updated_at: Micros(2) };
    world.system.store().put_stream(&row).await.unwrap();
    world.kill().await;
    let world = World::start(directory.path()).await;
    let stopped = world.system.unplanned_metrics(&id).await.unwrap();
    assert_eq!(stopped.iter().map(|metric| metric.name.as_str()).collect::<Vec<_>>(), ["doubled", "sales"]);
    assert!(stopped[1].reason.contains('x'), "{}", stopped[1].reason);
    let query = RowsQuery { limit: 10, ..RowsQuery::default() };
    let rows = world.system.metric_rows(&id, &"sales".parse().unwrap(), query).await.unwrap().values();
    assert_eq!((rows.len(), &rows[0]["s"], &rows[0]["final"]), (1, &4.into(), &true.into()));
    // defined anew it runs
    world.define("acme", "sales", &sql.replace("sum(x)", "sum(y)")).await;
    let stopped = world.system.unplanned_metrics(&id).await.unwrap();
    assert_eq!(stopped.len(), 1);
    world.system.remove_metric(&id, &"doubled".parse().unwrap()).await.unwrap();
    assert!(world.system.unplanned_metrics(&id).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_ahead_of_its_log_is_refused_with_what_to_do() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    world.trades("acme", "A", 0, 3, "a").await.unwrap();
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;
    std::fs::remove_dir_all(directory.path().join("log")).unwrap();
    let parts = Parts {
        store: Store::open(&format!("sqlite:{}/store.db", directory.path().display())).await.unwrap(),
        log: Arc::new(EmbeddedLog::open(&directory.path().join("log"), &Default::default()).unwrap()),
        dedup: Arc::new(Dedup::open(&directory.path().join("ids"), &Default::default()).unwrap()),
        outlet: Arc::new(Pushed::default()),
        clock: Arc::new(crate::clock::SystemClock),
        limits: Limits::default(),
        agents: BTreeMap::new(),
        cache: cache::Cache::new(&cache::Config::default()),
        webhooks: WebhookConfig::default(),
        sealer: Arc::new(Sealer::new(["a key of the tests, long enough for them"].into_iter())),
        retention: Default::default(),
    };
    let refused = System::start(parts).await.err().unwrap();
    assert_eq!(refused.code, "log_behind_store");
    assert!(refused.detail.contains("restore the log from a copy"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notifier_that_fails_is_started_again_and_tells_what_is_left() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let told = Arc::new(AtomicUsize::new(0));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = Some(format!("http://{}/", listener.local_addr().unwrap()));
    let counted = told.clone();
    let app = axum::Router::new().fallback(async move || {
        counted.fetch_add(1, Relaxed);
    });
    tokio::spawn(async { axum::serve(listener, app).await });
    let acme: WorkspaceId = "acme".parse().unwrap();
    world.system.create_webhook(&acme, WebhookChange { url, ..WebhookChange::default() }).await.unwrap();
    let notifier = || world.system.deps().notifier.info();
    for failures in 1..=3 {
        world.system.deps().notifier.fail();
        eventually("it runs again", async || notifier().restarts == failures && notifier().state == "running").await;
    }
    assert!(notifier().last_failure.unwrap().contains("a test said so"));
    let rule = serde_json::from_value(serde_json::json!({"metric": "sums", "condition": "total > 2"})).unwrap();
    world.system.define_alert_rule(&acme, "much".parse().unwrap(), rule).await.unwrap();
    world.trades("acme", "A", 0, 5, "a").await.unwrap();
    eventually("the webhook is told", async || told.load(Relaxed) == 1).await;
    assert!(world.system.actors().await.iter().all(|actor| actor.kind == "notifier" || actor.restarts == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_actor_panics_its_workspace_ends_as_one_without_and_others_are_not_touched() {
    let names = ["quiet", "panicking"];
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &names).await;
    let main: ItemName = "main".parse().unwrap();
    for name in names {
        world.rule(name, "large", "total > 3").await;
        let workspace: WorkspaceId = name.parse().unwrap();
        let portfolio = Portfolio {
            workspace: workspace.clone(),
            id: "main".to_owned(),
            name: "Main".to_owned(),
            currency: "USD".into(),
            created_at: Micros(1),
        };
        world.system.put_portfolio(&workspace, portfolio).await.unwrap();
        let position = Position { symbol: "A".into(), qty: 2.0, cost: 1.0, sector: None };
        world.system.put_positions(&workspace, &main, vec![position], true).await.unwrap();
    }
    for round in 0..6 {
        fault_point::fail("workspace", "panicking");
        fault_point::fail("portfolio", "panicking/main");
        for name in names {
            world.trades(name, "A", round * 10, 4, &format!("e{round}")).await.unwrap();
        }
        eventually("both have panicked", async || {
            // what asks for something meets the panic, where nothing else does
            drop(world.system.portfolio_summary(&"panicking".parse().unwrap(), &main).await);
            !fault_point::is_to_fail("workspace", "panicking")
                && !fault_point::is_to_fail("portfolio", "panicking/main")
        })
        .await;
    }
    let mut ends = Vec::new();
    for name in names {
        let id: WorkspaceId = name.parse().unwrap();
        let mut alerts = Vec::new();
        // it fires by the first window, and goes on in each one after it
        eventually("its alert is stored", async || {
            alerts = world.system.store().alerts(&id, None, 100, None).await.unwrap().0;
            !alerts.is_empty()
        })
        .await;
        let alerts: Vec<_> = alerts.into_iter().map(|alert| (alert.started_at, alert.row)).collect();
        let mut summary = None;
        eventually("its portfolio is valued", async || {
            summary = world.system.portfolio_summary(&id, &main).await.ok().map(|it| it.summary.clone());
            summary.is_some()
        })
        .await;
        ends.push((world.rows(name).await, alerts, summary));
    }
    assert_eq!(ends[1], ends[0]);
    assert_eq!(ends[0].0.iter().map(|(_, n, _)| n).sum::<i64>(), 24);
    let actors = world.system.actors().await;
    let restarts = |path: &str| actors.iter().find(|actor| actor.path == path).unwrap().restarts;
    assert!(restarts("root/panicking") >= 12, "{}", restarts("root/panicking"));
    assert_eq!(restarts("root/quiet"), 0);

    fault_point::fail("root", fault_point::name_of(&world.system.0.deps));
    world.create("third").await;
    let system = world.system.clone();
    tokio::spawn(async move { drop(system.portfolio_summary(&"third".parse().unwrap(), &main).await) });
    tokio::time::timeout(Duration::from_secs(30), world.system.failed()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_fails_in_its_middle_leaves_nothing_and_all_of_it_is_there_once_later() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let (id, sums): (WorkspaceId, ItemName) = ("acme".parse().unwrap(), "sums".parse().unwrap());
    world.rule("acme", "large", "total > 5").await;
    let options =
        sqlx::sqlite::SqliteConnectOptions::new().filename(directory.path().join("store.db")).vfs("tidewatch");
    let mut connection = options.connect().await.unwrap();
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON alerts BEGIN SELECT RAISE(FAIL, 'a test said so'); END";
    sqlx::query(refuse).execute(&mut connection).await.unwrap();
    let stored = async || world.system.store().rows(&id, &sums, &RowQuery { limit: 100, ..RowQuery::default() }).await;
    for window in 0..3 {
        world.trades("acme", "A", window * 10, 10, &format!("w{window}")).await.unwrap();
    }
    eventually("the store is said to refuse", async || {
        let parts = world.system.readiness().await;
        parts.iter().any(|part| part.name == "store" && !part.ok && part.detail.contains("a test said so"))
    })
    .await;
    assert_eq!(world.counted("acme").await, 30, "what is live goes on");
    assert_eq!(
        (stored().await.unwrap().0, world.pushed.alerts()),
        (Vec::new(), Vec::new()),
        "nothing of it is kept or told"
    );

    sqlx::query("DROP TRIGGER refuse").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    eventually("all is stored", async || stored().await.unwrap().0.len() == 2 && !world.pushed.alerts().is_empty())
        .await;
    world.trades("acme", "A", 45, 1, "end").await.unwrap();
    eventually("the last one too", async || stored().await.unwrap().0.len() == 3).await;
    let told = world.pushed.alerts();
    let alerts = world.system.store().alerts(&id, None, 100, None).await.unwrap().0;
    assert_eq!(told.iter().filter(|(phase, _)| *phase == AlertPhase::Firing).count(), alerts.len(), "{told:?}");
    world.kill().await;
    let world = World::start(directory.path()).await;
    assert_eq!(world.counted("acme").await, 31);
    assert_eq!(world.system.store().alerts(&id, None, 100, None).await.unwrap().0, alerts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portfolio_whose_positions_cannot_be_read_says_so_and_is_valued_once_they_can() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let (id, main): (WorkspaceId, ItemName) = ("acme".parse().unwrap(), "main".parse().unwrap());
    let portfolio = Portfolio {
        workspace: id.clone(),
        id: "main".to_owned(),
        name: "Main".to_owned(),
        currency: "USD".to_owned(),
        created_at: Micros(1),
    };
    world.system.put_portfolio(&id, portfolio).await.unwrap();
    world.kill().await;
    let change = async |sql: &'static str| {
        let file = directory.path().join("store.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file).vfs("tidewatch");
        let mut connection = options.connect().await.unwrap();
        sqlx::query(sql).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    };
    change("ALTER TABLE positions RENAME TO away").await;
    let world = World::start(directory.path()).await;
    world.trades("acme", "A", 0, 3, "a").await.unwrap();
    assert_eq!(world.counted("acme").await, 3, "what is not its own goes on");
    assert_eq!(world.system.portfolio_summary(&id, &main).await.unwrap_err().code, "store_unavailable");
    change("ALTER TABLE away RENAME TO positions").await;
    eventually("it is valued", async || world.system.portfolio_summary(&id, &main).await.is_ok()).await;
}

/// Prints what a restart costs: `TIDEWATCH_TEST_WORKSPACES=10000 TIDEWATCH_TEST_LOG_MB=1000 cargo test --release -p
/// tidewatch-actors restart_of_many -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures; takes minutes"]
async fn a_restart_of_many_workspaces_is_ready_soon() {
    let number = |name: &str, otherwise: usize| std::env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    let (count, megabytes) = (number("TIDEWATCH_TEST_WORKSPACES", 1_000), number("TIDEWATCH_TEST_LOG_MB", 50));
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
    };
    let directory = TempDir::new().unwrap();
    let names: Vec<String> = (0..count).map(|i| format!("ws-{i}")).collect();
    let refs: Vec<&str> = names.iter().map(String::as_str).collect();
    let begun = Instant::now();
    let world = World::with(directory.path(), Limits { rest_ms: 1_000, ..Limits::default() }, &refs).await;
    println!("{count} workspaces with a metric each made in {:?}; {} MiB resident", begun.elapsed(), resident());
    let log_bytes = || -> u64 {
        let files = std::fs::read_dir(directory.path().join("log")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
    };
    let (begun, mut events, mut round) = (Instant::now(), 0, 0);
    while log_bytes() < (megabytes as u64) << 20 {
        let one = |name: String| {
            let (world, ids) = (&world, format!("r{round}"));
            async move {
                loop {
                    match world.trades(&name, "A", round * 5, 200, &ids).await {
                        Ok(answer) => return answer.accepted,
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await, // busy
                    }
                }
            }
        };
        events += futures::stream::iter(names.clone()).map(one).buffer_unordered(64).fold(0, async |a, b| a + b).await;
        round += 1;
    }
    println!("{events} events, {} MiB of log in {:?}; {} MiB resident", log_bytes() >> 20, begun.elapsed(), resident());
    world.kill().await;
    let begun = Instant::now();
    let world = World::start(directory.path()).await;
    let ready = begun.elapsed();
    let behind = world.system.0.behind.load(Relaxed);
    eventually("all have caught up", async || world.system.0.behind.load(Relaxed) == 0).await;
    println!("ready in {ready:?}, {behind} behind, caught up in {:?}; {} MiB", begun.elapsed(), resident());
    world.system.stop(Duration::from_secs(600)).await;
    world.kill().await;
    let begun = Instant::now();
    let world = World::start(directory.path()).await;
    println!("after a clean stop ready in {:?}; {} MiB resident", begun.elapsed(), resident());
    let mut waits = Vec::new();
    for name in names.iter().take(200) {
        let begun = Instant::now();
        world.counted(name).await;
        waits.push(begun.elapsed());
    }
    waits.sort_unstable();
    println!("waking and asking one: median {:?}, p99 {:?}", waits[waits.len() / 2], waits[waits.len() * 99 / 100]);
}

impl World {
    /// Events that `metric` has counted of a symbol, from the beginning on.
    async fn counted_by(&self, name: &str, metric: &str, symbol: &str) -> i64 {
        let mut query = RowsQuery {
            from: Some(Micros(START)),
            limit: 100,
            keys: vec![("symbol".to_owned(), Some(symbol.to_owned()))],
            ..RowsQuery::default()
        };
        let mut sum = 0;
        loop {
            let page = self.system.metric_rows(&name.parse().unwrap(), &metric.parse().unwrap(), query.clone()).await;
            let page = page.unwrap();
            sum += page.values().iter().map(|row| row["n"].as_i64().unwrap()).sum::<i64>();
            match page.next {
                Some(next) => query.after = Some(next),
                None => return sum,
            }
        }
    }

    async fn ask(&self, name: &str, sql: &str) -> Value {
        let request = QueryRequest { sql: sql.to_owned(), params: Vec::new(), timeout: None };
        let answer = self.system.query(&name.parse().unwrap(), request).await.unwrap();
        let rows: usize = answer.batches.iter().map(RecordBatch::num_rows).sum();
        match answer.batches.iter().find(|batch| batch.num_rows() > 0) {
            Some(batch) => serde_json::from_str(&rows::json_lines(batch).unwrap()[0]).unwrap(),
            None => rows.into(),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_from_the_cache_has_every_event_that_was_acknowledged_late_ones_too() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let definition = serde_json::json!({
        "sql": "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol",
        "max_delay": Span::ZERO, "allowed_lateness": Span::seconds(100_000),
    });
    let definition = serde_json::from_value(definition).unwrap();
    world.system.define_metric(&"acme".parse().unwrap(), "late".parse().unwrap(), definition).await.unwrap();
    let mut sent = 0;
    for round in 0..80 {
        world.trades("acme", "A", round * 40, 5, &format!("a{round}")).await.unwrap();
        world.trades("acme", "B", round * 40, 1, &format!("b{round}")).await.unwrap();
        sent += 5;
        if round % 10 == 9 {
            world.trades("acme", "A", round * 17, 1, &format!("late{round}")).await.unwrap();
            sent += 1;
        }
        assert_eq!(world.counted_by("acme", "late", "A").await, sent, "round {round}");
        assert_eq!(world.counted_by("acme", "late", "B").await, round + 1);
        // some commits come while this goes on
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    eventually("all is in the store", async || {
        let (metric, query) = ("late".parse().unwrap(), RowQuery { limit: 1_000, ..RowQuery::default() });
        world.system.store().rows(&"acme".parse().unwrap(), &metric, &query).await.unwrap().0.len() >= 158
    })
    .await;
    assert_eq!(world.counted_by("acme", "late", "A").await, sent);
    let warmth = world.system.cache().warmth(Class::History);
    println!("history while rows come: {warmth:?}, {:.1} % hits", warmth.hit_rate() * 100.0);
    assert!(warmth.hit_rate() > 0.7, "{warmth:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metric_or_workspace_that_is_made_anew_has_nothing_of_the_one_before() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let acme: WorkspaceId = "acme".parse().unwrap();
    let stored = async || {
        let query = RowQuery { limit: 100, ..RowQuery::default() };
        world.system.store().rows(&acme, &"sums".parse().unwrap(), &query).await.unwrap().0.len()
    };
    world.trades("acme", "A", 0, 30, "a").await.unwrap();
    eventually("final rows are stored", async || stored().await == 2).await;
    assert_eq!(world.counted_by("acme", "sums", "A").await, 30);
    let sql = "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '20 seconds'), symbol";
    world.define("acme", "sums", sql).await;
    assert_eq!(world.counted_by("acme", "sums", "A").await, 0);

    world.trades("acme", "A", 100, 60, "b").await.unwrap();
    eventually("final rows are stored", async || stored().await >= 2).await;
    assert_eq!(world.counted_by("acme", "sums", "A").await, 60);
    world.system.delete_workspace(&acme).await.unwrap();
    world.create("acme").await;
    world.define("acme", "sums", sql).await;
    world.trades("acme", "A", 100, 1, "c").await.unwrap();
    assert_eq!(world.counted_by("acme", "sums", "A").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_is_answered_once_until_something_happens_in_its_workspace() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme", "other"]).await;
    let sql = "SELECT count(*) AS n FROM market.trades";
    let computed = || world.system.cache().warmth(Class::Queries).loaded;
    let settled = async || {
        let tenant = world.system.tenant(&"acme".parse().unwrap()).unwrap();
        eventually("all is computed", async || tenant.settled().is_some()).await;
    };
    for round in 1..=3 {
        world.trades("acme", "A", 0, 1, &format!("a{round}")).await.unwrap();
        settled().await;
        for _ in 0..5 {
            assert_eq!(world.ask("acme", sql).await["n"], round);
            assert_eq!(world.ask("other", sql).await["n"], 0);
        }
        // once after each event, and once in the other workspace
        assert_eq!(computed(), round + 1);
    }
    // what is defined counts as well
    world
        .define(
            "acme",
            "more",
            "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 hour'), symbol",
        )
        .await;
    assert_eq!(world.ask("acme", "SELECT count(*) AS n FROM sums").await["n"], 1);
    // and time does not stand still
    let before = computed();
    for _ in 0..2 {
        world.ask("acme", "SELECT now() AS n").await;
        world.ask("acme", "SELECT count(*) AS n FROM ref.companies").await;
    }
    assert_eq!(computed(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_are_those_that_were_set_last_and_read_from_the_store_once() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let (acme, main): (WorkspaceId, ItemName) = ("acme".parse().unwrap(), "main".parse().unwrap());
    let portfolio = |id: &str| Portfolio {
        workspace: acme.clone(),
        id: id.to_owned(),
        name: id.to_owned(),
        currency: "USD".into(),
        created_at: Micros(1),
    };
    let position = |qty| Position { symbol: "A".into(), qty, cost: 1.0, sector: None };
    let system = &world.system;
    assert_eq!(system.portfolios(&acme).await.unwrap(), []);
    assert_eq!(system.positions(&acme, &main).await.unwrap_err().code, "unknown_portfolio");
    system.put_portfolio(&acme, portfolio("main")).await.unwrap();
    assert_eq!(system.portfolios(&acme).await.unwrap(), [portfolio("main")]);
    for qty in [1.0, 2.0, 3.0] {
        system.put_positions(&acme, &main, vec![position(qty)], qty == 2.0).await.unwrap();
        for _ in 0..10 {
            assert_eq!(system.positions(&acme, &main).await.unwrap(), [position(qty)]);
        }
    }
    assert_eq!(system.cache().warmth(Class::Portfolios), Warmth { memory: 27, redis: 0, loaded: 6 });
    system.remove_position(&acme, &main, "A").await.unwrap();
    assert_eq!(system.positions(&acme, &main).await.unwrap(), []);
    system.remove_portfolio(&acme, &main).await.unwrap();
    assert_eq!(system.portfolios(&acme).await.unwrap(), []);
    assert_eq!(system.positions(&acme, &main).await.unwrap_err().code, "unknown_portfolio");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_reads_the_charts_that_were_looked_at_before_somebody_asks() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["seen", "unseen"]).await;
    for name in ["seen", "unseen"] {
        world.trades(name, "A", 0, 100, "a").await.unwrap();
    }
    assert_eq!(world.counted_by("seen", "sums", "A").await, 100);
    world.system.stop(Duration::from_secs(60)).await;
    world.kill().await;

    let world = World::start(directory.path()).await;
    let loaded = || world.system.cache().warmth(Class::History).loaded;
    eventually("the chart is read", async || loaded() > 0).await;
    eventually("nothing more is read", async || {
        let before = loaded();
        tokio::time::sleep(Duration::from_millis(100)).await;
        loaded() == before
    })
    .await;
    let before = loaded();
    assert_eq!(world.counted_by("seen", "sums", "A").await, 100);
    assert_eq!(loaded(), before);
    assert!(matches!(world.phase("unseen"), Phase::Resting));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_corrected_or_withdrawn_is_so_in_kept_history_and_answers_down_the_chain() {
    let directory = TempDir::new().unwrap();
    let world = World::with(directory.path(), Limits::default(), &["acme"]).await;
    let acme: WorkspaceId = "acme".parse().unwrap();
    let calm = serde_json::json!({
        "sql": "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol HAVING count(*) < 4",
        "max_delay": Span::ZERO, "allowed_lateness": Span::seconds(100_000),
    });
    let calm = serde_json::from_value(calm).unwrap();
    world.system.define_metric(&acme, "calm".parse().unwrap(), calm).await.unwrap();
    let minutes = "SELECT symbol, sum(n) AS n FROM metrics.calm GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    world.define("acme", "minutes", minutes).await;
    // what the history tells of both metrics, then what SQL does, each twice: read, and kept
    let told = async |late: &str| {
        let mut told = Vec::new();
        for _ in 0..2 {
            let history = [world.counted_by("acme", "calm", "A").await, world.counted_by("acme", "minutes", "A").await];
            let mut asked = Vec::new();
            for table in ["calm", "minutes"] {
                asked.push(world.ask("acme", &format!("SELECT count(*) AS rows, sum(n) AS n FROM {table}")).await);
            }
            told.push((history, asked));
        }
        assert_eq!(told[0], told[1], "{late}");
        told.remove(0)
    };
    // two a window of ten seconds, twelve windows, and one that closes them
    for window in 0..12 {
        world.trades("acme", "A", window * 10, 2, &format!("a{window}")).await.unwrap();
    }
    world.trades("acme", "B", 1_000, 1, "b").await.unwrap();
    let stored = async || {
        let query = RowQuery { limit: 100, ..RowQuery::default() };
        world.system.store().rows(&acme, &"calm".parse().unwrap(), &query).await.unwrap().0.len()
    };
    let sums = |rows: [i64; 2], n: i64, open: i64| {
        let row = |rows: i64, n: i64| serde_json::json!({"rows": rows, "n": n});
        ([n, n], vec![row(rows[0] + open, n + open), row(rows[1], n)])
    };
    assert_eq!(told("before").await, sums([12, 2], 24, 1));
    eventually("all is in the store", async || stored().await == 12).await;
    assert_eq!(told("stored").await, sums([12, 2], 24, 1));
    world.trades("acme", "A", 30, 1, "corrected").await.unwrap();
    assert_eq!(told("corrected").await, sums([12, 2], 25, 1));
    world.trades("acme", "A", 30, 1, "withdrawn").await.unwrap();
    assert_eq!(told("withdrawn").await, sums([11, 2], 22, 1));
    // every row of the second minute goes, and the minute with it
    for window in 6..12 {
        world.trades("acme", "A", window * 10, 2, &format!("more{window}")).await.unwrap();
    }
    assert_eq!(told("the minute").await, sums([5, 1], 10, 1));
    world.kill().await;
}
