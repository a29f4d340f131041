//! The real binary killed (SIGKILL) at random moments under load, over each store there is, and PostgreSQL with it:
//! nothing acknowledged is lost, nothing counts twice.
//!
//! `TIDEWATCH_TEST_KILLS`: how often in all, 50 unless said. `TIDEWATCH_TEST_SEED`: which load, and how long after a
//! start it is killed; printed with every run.

use crate::database::Database;
use crate::harness::{BINARY, EMAIL, PASSWORD};
use chrono::{DateTime, Utc};
use futures::future::join_all;
use reqwest::{Client, Method};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::process::{Child, Command};

const WORKSPACES: u64 = 5;
/// November 2023: event time has nothing to do with the clock, but for the bound on events from the future.
const START_MS: i64 = 1_700_000_000_000;
const WINDOW_MS: i64 = 1_000;
/// A window with more events than this of one symbol is an alert.
const MANY: i64 = 22;
const PATIENCE: Duration = Duration::from_secs(60);

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
}

/// A port that is free, and that no outgoing connection gets while the server is down: not one of the ephemeral ones.
pub fn lasting_port(seed: u64) -> u16 {
    let mut dice = Dice(u64::from(std::process::id()) << 32 | seed);
    let mut ports = std::iter::repeat_with(|| 12_000 + dice.below(18_000) as u16);
    ports.find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("it goes on until one is free")
}

/// The server as a process, on one port through all its lives.
struct Process {
    directory: PathBuf,
    store: Option<String>,
    port: u16,
    child: Option<Child>,
}

impl Process {
    fn new(directory: &Path, store: Option<String>, seed: u64) -> Process {
        Process { directory: directory.to_owned(), store, port: lasting_port(seed), child: None }
    }

    fn start(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.directory.join("stderr.txt"));
        let mut command = Command::new(BINARY);
        command
            .arg("serve")
            .env("TIDEWATCH__LISTEN", format!("127.0.0.1:{}", self.port))
            .env("TIDEWATCH__DATA_DIR", self.directory.join("data"))
            .env("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them")
            .env("TIDEWATCH__AUTH__BOOTSTRAP_EMAIL", EMAIL)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_PASSWORD", PASSWORD)
            // so small that files are followed by new ones, joined and dropped, and that workspaces rest and wake
            .env("TIDEWATCH__LOG__SEGMENT_BYTES", "300000")
            .env("TIDEWATCH__DEDUP__MEMORY_IDS", "2000")
            .env("TIDEWATCH__LIMITS__REST_MS", "200")
            // a busy machine must not make a stream idle: what it was about to send would be late
            .env("TIDEWATCH__LIMITS__IDLE_TIMEOUT_MS", "3600000")
            .env("TIDEWATCH__LIMITS__QUERY_ROWS", "10000000")
            .env("TIDEWATCH__LIMITS__QUERY_MEMORY", "2000000000")
            .env("TIDEWATCH__LIMITS__QUERY_MS", "60000")
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .kill_on_drop(true);
        if let Some(url) = &self.store {
            command.env("TIDEWATCH__STORE__URL", url);
        }
        self.child = Some(command.spawn().unwrap());
    }

    async fn kill(&mut self) {
        if let Some(status) = self.ended_by_itself() {
            panic!("the server ended with {status}: {}", self.stderr());
        }
        if let Some(mut child) = self.child.take() {
            child.kill().await.unwrap(); // SIGKILL, and waits
        }
    }

    /// How the server ended without being killed. One whose store went away in the middle of the start says so and ends,
    /// and whoever supervises it starts it again: that is none.
    fn ended_by_itself(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().unwrap()?;
        let stderr = self.stderr();
        let last = stderr.lines().last().unwrap_or_default();
        let is_without_store = last.starts_with("error: ")
            && (last.contains("cannot reach store") || last.contains("the store cannot be"));
        if self.store.is_none() || !is_without_store {
            return Some(status);
        }
        self.start();
        None
    }

    /// Returns once the server can serve: how long that took.
    async fn ready(&mut self, client: &Client) -> Duration {
        let begun = Instant::now();
        loop {
            let answer = client.get(format!("http://127.0.0.1:{}/ready", self.port)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return begun.elapsed();
            }
            if let Some(status) = self.ended_by_itself() {
                panic!("the server ended with {status}: {}", self.stderr());
            }
            assert!(begun.elapsed() < PATIENCE, "not ready within {PATIENCE:?}: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn stderr(&self) -> String {
        let text = std::fs::read_to_string(self.directory.join("stderr.txt")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// A client that tries again for as long as the server is away.
struct Api {
    client: Client,
    base: String,
    token: Mutex<String>,
}

impl Api {
    /// One attempt; `None` when the server is not there, or cannot take it now.
    async fn attempt(&self, method: Method, path: &str, kind: &str, body: String) -> Option<Value> {
        let token = self.token.lock().unwrap().clone();
        let request = self.client.request(method, format!("{}{path}", self.base)).header("content-type", kind);
        let answer = request.bearer_auth(token).body(body).send().await.ok()?;
        let status = answer.status();
        let text = answer.text().await.ok()?;
        match status.as_u16() {
            200..300 => Some(serde_json::from_str(&text).unwrap_or(Value::Null)),
            409 if text.contains("exists") => Some(Value::Null), // an attempt before came through
            429 | 503 => None,
            _ => panic!("{path}: {status} {text}"),
        }
    }

    /// Until it comes through.
    async fn call(&self, method: Method, path: &str, body: Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(answer) = self.attempt(method.clone(), path, "application/json", body.clone()).await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{method} {path} never came through");
    }

    async fn login(&self) {
        let body = json!({"email": EMAIL, "password": PASSWORD});
        let answer = self.call(Method::POST, "/api/v1/auth/login", body).await;
        *self.token.lock().unwrap() = answer["access_token"].as_str().expect("a token").to_owned();
    }

    /// What a list holds, over all its pages.
    async fn list(&self, path: &str, name: &str, cursor: &str) -> Vec<Value> {
        let (mut all, mut from) = (Vec::new(), String::new());
        loop {
            let page = self.call(Method::GET, &format!("{path}limit=1000{from}"), Value::Null).await;
            all.extend(page[name].as_array().expect("a list").iter().cloned());
            let Some(next) = page["next"].as_str() else { return all };
            let escaped: String = next.bytes().map(|byte| format!("%{byte:02x}")).collect();
            from = format!("&{cursor}={escaped}");
        }
    }
}

/// An acknowledged event: ts in milliseconds, symbol, qty.
type Trade = (i64, &'static str, i64);

/// Event id → what was acknowledged of one workspace.
#[derive(Default)]
struct Sent {
    acknowledged: BTreeMap<String, Trade>,
    /// Requests that got no answer, and were sent again.
    attempts: u64,
    /// Acknowledged events that were sent again.
    repeats: u64,
}

/// Sends requests one after the other until told to stop, each until it is acknowledged; now and then an acknowledged
/// one again, and now and then nothing for a while.
async fn load(api: Arc<Api>, workspace: String, seed: u64, stop: Arc<AtomicBool>, accepted: Arc<AtomicU64>) -> Sent {
    let path = format!("/api/v1/workspaces/{workspace}/streams/market.trades/events");
    let post = async |body: &str| api.attempt(Method::POST, &path, "application/x-ndjson", body.to_owned()).await;
    let (mut dice, mut sent) = (Dice(seed), Sent::default());
    let (mut number, mut ts) = (0_u64, START_MS);
    while !stop.load(Ordering::Relaxed) {
        let mut trades: BTreeMap<String, Trade> = BTreeMap::new();
        let mut lines = Vec::new();
        for _ in 0..=dice.below(30) {
            ts += dice.below(40) as i64;
            let symbol = ["A", "B", "C"][dice.below(3) as usize];
            let (id, qty) = (format!("{number:08}"), dice.below(100) as i64);
            number += 1;
            lines.push(json!({"id": id, "ts": ts, "symbol": symbol, "price": 1.0, "qty": qty}).to_string());
            trades.insert(id, (ts, symbol, qty));
        }
        let body = lines.join("\n");
        let answer = loop {
            if let Some(answer) = post(&body).await {
                break answer;
            }
            sent.attempts += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let count = |key: &str| answer[key].as_u64().unwrap();
        assert_eq!(count("accepted") + count("duplicates"), trades.len() as u64, "{answer}");
        accepted.fetch_add(count("accepted"), Ordering::Relaxed);
        sent.acknowledged.append(&mut trades);
        if dice.below(10) == 0
            && let Some(again) = post(&body).await
        {
            assert_eq!(again["accepted"], 0, "an acknowledged event was taken twice: {again}");
            sent.repeats += lines.len() as u64;
        }
        let pause = if dice.below(40) == 0 { 500 } else { dice.below(4) };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    sent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_killed_nothing_acknowledged_is_lost_and_nothing_counts_twice() {
    let number = |name: &str, otherwise: u64| std::env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    let (kills, seed) = (number("TIDEWATCH_TEST_KILLS", 50), number("TIDEWATCH_TEST_SEED", 1));
    println!("seed {seed}, {kills} kills in all");
    server::choose_tls();
    let mut stores = vec![None];
    match Database::postgres() {
        Ok(database) => stores.push(Some(database)),
        Err(why) => println!("all kills over SQLite, since {why}"),
    }
    let count = stores.len() as u64;
    let runs = stores.into_iter().zip(0..).map(|(store, i)| {
        let kills = kills / count + u64::from(i < kills % count);
        tokio::spawn(kill_and_count(store, kills, seed * 1_000 + i * 100))
    });
    for run in join_all(runs).await {
        run.unwrap();
    }
}

/// Of so many kills over PostgreSQL one ends PostgreSQL too, or alone: whoever waits for a commit does not learn whether it
/// was one.
const ENDS_STORE: u64 = 4;

/// Kills a server under load `kills` times, and compares what it has in the end with what it acknowledged.
async fn kill_and_count(mut store: Option<Database>, kills: u64, seed: u64) {
    let begun = Instant::now();
    let directory = TempDir::new().unwrap();
    let kind = if store.is_some() { "PostgreSQL" } else { "SQLite" };
    let url = store.as_ref().map(|store| store.create("tides"));
    let mut process = Process::new(directory.path(), url, seed);
    let client = Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    process.start();
    process.ready(&client).await;
    let base = format!("http://127.0.0.1:{}", process.port);
    let api = Arc::new(Api { client: client.clone(), base, token: Default::default() });
    api.login().await;
    let names: Vec<String> = (0..WORKSPACES).map(|i| format!("team-{i}")).collect();
    for name in &names {
        define(&api, name).await;
    }

    let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (1..)
        .zip(&names)
        .map(|(i, name)| tokio::spawn(load(api.clone(), name.clone(), seed + i, stop.clone(), accepted.clone())))
        .collect();
    let mut dice = Dice(seed);
    let (mut slowest, mut store_ends) = (Duration::ZERO, 0);
    for _ in 0..kills {
        // from in the middle of the start to well into the load
        tokio::time::sleep(Duration::from_millis(dice.below(900))).await;
        let ends_store = store.is_some() && dice.below(ENDS_STORE) == 0;
        let goes_on = ends_store && dice.below(2) == 0;
        if ends_store {
            store = restarted(store, Duration::from_millis(dice.below(900))).await;
            store_ends += 1;
        }
        if !goes_on {
            process.kill().await;
            process.start();
        }
        if dice.below(4) > 0 {
            slowest = slowest.max(process.ready(&client).await);
        }
    }
    process.ready(&client).await;
    // after the last kill something is acknowledged again
    let before = accepted.load(Ordering::Relaxed);
    let last = Instant::now();
    while accepted.load(Ordering::Relaxed) == before {
        assert!(last.elapsed() < PATIENCE, "nothing is accepted any more: {}", process.stderr());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::Relaxed);

    let (mut events, mut attempts, mut repeats, mut alerts) = (0, 0, 0, 0);
    for (name, client) in names.iter().zip(clients) {
        let sent = client.await.unwrap();
        let trades = &sent.acknowledged;
        events += trades.len();
        attempts += sent.attempts;
        repeats += sent.repeats;
        the_log_has_what_was_acknowledged(&api, name, trades).await;
        let windows = the_final_rows_count_each_event_once(&api, name, trades).await;
        alerts += each_episode_is_one_alert(&api, name, &windows).await;
    }
    process.kill().await;
    println!(
        "{kind}: {kills} kills, {store_ends} of them of the store, {events} events in {WORKSPACES} workspaces, {attempts} attempts in vain, {repeats} \
         repeats, {alerts} alerts; slowest start {slowest:?}; {:?} in all",
        begun.elapsed(),
    );
}

/// Ends the store at once, and starts it again a while later.
async fn restarted(store: Option<Database>, later: Duration) -> Option<Database> {
    let restart = move || {
        store.map(|mut store| {
            store.stop();
            std::thread::sleep(later);
            store.start();
            store
        })
    };
    tokio::task::spawn_blocking(restart).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alert_rule_is_after_a_kill_what_was_answered_and_the_audit_log_says_who_made_it_so() {
    server::choose_tls();
    let directory = TempDir::new().unwrap();
    let mut process = Process::new(directory.path(), None, 7_000);
    let client = Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    process.start();
    process.ready(&client).await;
    let base = format!("http://127.0.0.1:{}", process.port);
    let api = Api { client: client.clone(), base, token: Default::default() };
    api.login().await;
    define(&api, "team").await;
    let rules = "/api/v1/workspaces/team/alert-rules";
    let (mut expected, mut noted) =
        (BTreeMap::from(["now", "once"].map(|name| (name, format!("n > {MANY}")))), Vec::new());
    for step in 0..4 {
        let (name, condition) = (["now", "once"][step % 2], format!("n > {}", 100 + step));
        if step < 3 {
            let rule = json!({"metric": if name == "now" { "sums" } else { "finals" }, "condition": condition});
            api.call(Method::PUT, &format!("{rules}/{name}"), rule).await;
            noted.push(format!("warning 0s {condition}"));
            expected.insert(name, condition);
        } else {
            api.call(Method::DELETE, &format!("{rules}/{name}"), Value::Null).await;
            expected.remove(name);
        }
        process.kill().await;
        process.start();
        process.ready(&client).await;
        let listed = api.call(Method::GET, rules, Value::Null).await;
        let listed = listed["rules"].as_array().unwrap().iter();
        let listed: BTreeMap<&str, String> = listed
            .map(|rule| (rule["name"].as_str().unwrap(), rule["condition"].as_str().unwrap().to_owned()))
            .collect();
        assert_eq!(listed, expected, "after step {step}");
    }
    let log = api.call(Method::GET, "/api/v1/workspaces/team/audit", Value::Null).await;
    let entries: Vec<String> = log["entries"].as_array().unwrap().iter().rev().map(Value::to_string).collect();
    for target in noted {
        assert!(entries.iter().any(|entry| entry.contains(&target)), "{target}: {entries:#?}");
    }
    assert!(entries.last().unwrap().contains("DELETE /api/v1/workspaces/{ws}/alert-rules/{rule}"), "{entries:#?}");
    process.kill().await;
}

/// A workspace with sums over windows, rules over what changes while a window is open and over what is final.
async fn define(api: &Api, name: &str) {
    api.call(Method::POST, "/api/v1/workspaces", json!({"id": name, "name": name})).await;
    let sums = "SELECT symbol, count(*) AS n, sum(qty) AS total FROM market.trades \
                GROUP BY tumble(ts, INTERVAL '1 second'), symbol";
    // final rows only: which of them follow one another does not depend on when a client looked
    let finals =
        "SELECT symbol, n, lag(n) OVER (PARTITION BY symbol ORDER BY window_start) AS before FROM metrics.sums";
    let metrics = format!("/api/v1/workspaces/{name}/metrics");
    // the windows of the flood of events close soon after one another
    api.call(Method::PUT, &format!("{metrics}/sums"), json!({"sql": sums, "max_delay": "0s"})).await;
    api.call(Method::PUT, &format!("{metrics}/finals"), json!({"sql": finals})).await;
    for (rule, metric) in [("now", "sums"), ("once", "finals")] {
        let rule = format!("/api/v1/workspaces/{name}/alert-rules/{rule}");
        api.call(Method::PUT, &rule, json!({"metric": metric, "condition": format!("n > {MANY}")})).await;
    }
}

async fn the_log_has_what_was_acknowledged(api: &Api, name: &str, trades: &BTreeMap<String, Trade>) {
    let query = format!("/api/v1/workspaces/{name}/query");
    let stored = api.call(Method::POST, &query, json!({"sql": "SELECT id FROM market.trades"})).await;
    let stored: Vec<&str> = stored["rows"].as_array().unwrap().iter().map(|row| row[0].as_str().unwrap()).collect();
    let distinct: BTreeSet<&str> = stored.iter().copied().collect();
    assert_eq!(distinct.len(), stored.len(), "{name}: an id is there twice");
    let lost: Vec<_> = trades.keys().filter(|id| !distinct.contains(id.as_str())).collect();
    assert!(lost.is_empty(), "{name}: {} acknowledged events are lost, the first is {}", lost.len(), lost[0]);
    assert_eq!(distinct.len(), trades.len(), "{name}: an event that nobody sent");
    let sums = api.call(Method::POST, &query, json!({"sql": "SELECT count(*), sum(qty) FROM market.trades"})).await;
    let expected = (trades.len() as u64, trades.values().map(|(_, _, qty)| *qty as f64).sum::<f64>());
    assert_eq!((sums["rows"][0][0].as_u64().unwrap(), sums["rows"][0][1].as_f64().unwrap()), expected, "{name}");
}

/// Symbol and start of a window → count and sum.
type Windows = BTreeMap<(String, i64), (i64, i64)>;

async fn the_final_rows_count_each_event_once(api: &Api, name: &str, trades: &BTreeMap<String, Trade>) -> Windows {
    let mut expected = Windows::new();
    for (ts, symbol, qty) in trades.values() {
        let sums = expected.entry(((*symbol).to_owned(), ts - ts.rem_euclid(WINDOW_MS))).or_default();
        *sums = (sums.0 + 1, sums.1 + qty);
    }
    // closes all windows before it
    let last = json!({"id": "last", "ts": START_MS + 10_000_000_000, "symbol": "END", "price": 1.0, "qty": 0});
    api.call(Method::POST, &format!("/api/v1/workspaces/{name}/streams/market.trades/events"), last).await;
    let (mut rows, begun) = (Windows::new(), Instant::now());
    while rows.len() < expected.len() && begun.elapsed() < PATIENCE {
        rows = final_rows(api, name).await;
    }
    for (window, sums) in &expected {
        assert_eq!(rows.get(window), Some(sums), "{name}: {window:?}");
    }
    assert_eq!(rows.len(), expected.len(), "{name}: rows of nothing");
    expected
}

async fn final_rows(api: &Api, name: &str) -> Windows {
    let mut rows = Windows::new();
    for row in api.list(&format!("/api/v1/workspaces/{name}/metrics/sums/rows?final=true&"), "rows", "after").await {
        let window = (row["symbol"].as_str().unwrap().to_owned(), start_ms(&row));
        let sums = (row["n"].as_i64().unwrap(), row["total"].as_f64().unwrap() as i64);
        assert_eq!(rows.insert(window, sums), None, "{name}: a final row is there twice: {row}");
    }
    rows
}

fn start_ms(row: &Value) -> i64 {
    let start: DateTime<Utc> = row["window_start"].as_str().unwrap().parse().unwrap();
    start.timestamp_millis()
}

/// Of the rule over final rows, the alerts are those of a run without a kill. When the other one fires depends on how
/// events come in batches, but it fires for a symbol once at a time.
async fn each_episode_is_one_alert(api: &Api, name: &str, windows: &Windows) -> usize {
    let mut expected = BTreeSet::new();
    let (mut symbol, mut holds, mut open) = ("", false, 0);
    for ((next, start), (n, _)) in windows {
        open += usize::from(holds && symbol != next);
        (symbol, holds) = match (holds && symbol == next, *n > MANY) {
            (false, true) => {
                expected.insert((next.clone(), *start));
                (next, true)
            }
            (_, holds) => (next, holds),
        };
    }
    open += usize::from(holds);
    let (mut alerts, begun) = (Vec::new(), Instant::now());
    let of = |alerts: &[Value], rule: &str, state: &str| {
        alerts.iter().filter(|alert| alert["rule"] == rule && alert["state"] == state).count()
    };
    // an alert is listed once it is stored
    while (of(&alerts, "once", "firing"), of(&alerts, "once", "resolved")) != (open, expected.len() - open)
        && begun.elapsed() < PATIENCE / 4
    {
        alerts = api.list(&format!("/api/v1/workspaces/{name}/alerts?"), "alerts", "before").await;
    }
    let ids: BTreeSet<&str> = alerts.iter().map(|alert| alert["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), alerts.len(), "{name}: an alert is there twice");
    let symbol_of = |alert: &Value| alert["labels"]["symbol"].as_str().unwrap().to_owned();
    let once: Vec<_> = alerts.iter().filter(|alert| alert["rule"] == "once").collect();
    let fired: BTreeSet<(String, i64)> = once.iter().map(|alert| (symbol_of(alert), start_ms(&alert["row"]))).collect();
    assert_eq!(fired, expected, "{name}: alerts over final rows");
    assert_eq!(once.len(), expected.len(), "{name}: an episode has two alerts");
    assert_eq!(of(&alerts, "once", "firing"), open, "{name}: alerts that are open");
    let now: Vec<String> =
        alerts.iter().filter(|alert| alert["rule"] == "now" && alert["state"] == "firing").map(symbol_of).collect();
    assert_eq!(now.iter().collect::<BTreeSet<_>>().len(), now.len(), "{name}: fires twice at once: {now:?}");
    alerts.len()
}
