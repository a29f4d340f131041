//! The real binary killed at random moments under load: nothing acknowledged is lost, nothing counts twice.
//!
//! `TIDEWATCH_TEST_KILLS`: how often, 50 unless said. `TIDEWATCH_TEST_SEED`: which moments, printed with every run.
//! `TIDEWATCH_TEST_STORE_URL`: a store other than SQLite in the data directory; its database must be empty.

use reqwest::{Client, Method};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::process::{Child, Command};

const WORKSPACES: usize = 5;
const EMAIL: &str = "owner@example.com";
const PASSWORD: &str = "correct horse battery staple";
/// November 2023: event time has nothing to do with the clock, but for the bound on events from the future.
const START_MS: i64 = 1_700_000_000_000;
const WINDOW_MS: i64 = 1_000;
/// A window with more events than this of one symbol is an alert.
const MANY: i64 = 25;

/// The binary that users run, built like this test.
fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let binary = test.parent().unwrap().parent().unwrap().join("tidewatch");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let built = std::process::Command::new(cargo)
            .args(["build", "--quiet", "--package", "tidewatch-server", "--bin", "tidewatch"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status();
        assert!(built.unwrap().success(), "the binary does not build");
    }
    assert!(binary.is_file(), "{} is missing; build tidewatch-server first", binary.display());
    binary
}

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

/// The server as a process, on one port through all its lives.
struct Process {
    binary: PathBuf,
    directory: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Process {
    fn new(directory: &Path) -> Process {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Process { binary: binary(), directory: directory.to_owned(), port, child: None }
    }

    fn start(&mut self) {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.directory.join("stderr.txt")).unwrap();
        let mut command = Command::new(&self.binary);
        command
            .arg("serve")
            .env("TIDEWATCH__LISTEN", format!("127.0.0.1:{}", self.port))
            .env("TIDEWATCH__DATA_DIR", self.directory.join("data"))
            .env("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them")
            .env("TIDEWATCH__AUTH__BOOTSTRAP_EMAIL", EMAIL)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_PASSWORD", PASSWORD)
            // small files, so that the log goes on in a new one every now and then
            .env("TIDEWATCH__LOG__SEGMENT_BYTES", "300000")
            .env("TIDEWATCH__DEDUP__MEMORY_IDS", "2000")
            .env("TIDEWATCH__LIMITS__QUERY_ROWS", "10000000")
            .env("TIDEWATCH__LIMITS__QUERY_MEMORY", "2000000000")
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        if let Ok(url) = std::env::var("TIDEWATCH_TEST_STORE_URL") {
            command.env("TIDEWATCH__STORE__URL", url);
        }
        self.child = Some(command.spawn().unwrap());
    }

    async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.unwrap(); // SIGKILL, and waits
        }
    }

    /// Returns once the server can serve.
    async fn ready(&mut self, client: &Client) -> Duration {
        let begun = Instant::now();
        loop {
            let answer = client.get(format!("http://127.0.0.1:{}/ready", self.port)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return begun.elapsed();
            }
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().unwrap()) {
                panic!("the server ended with {status}: {}", self.stderr());
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "not ready within a minute: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn stderr(&self) -> String {
        let text = std::fs::read_to_string(self.directory.join("stderr.txt")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// A client that signs in again whenever it has to.
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
            401 => {
                self.login().await;
                None
            }
            409 if text.contains("exists") => Some(Value::Null), // an attempt before came through
            429 | 503 => None,
            _ => panic!("{path}: {status} {text}"),
        }
    }

    async fn login(&self) {
        let body = json!({"email": EMAIL, "password": PASSWORD}).to_string();
        let request =
            self.client.post(format!("{}/api/v1/auth/login", self.base)).header("content-type", "application/json");
        let Ok(answer) = request.body(body).send().await else { return };
        let Ok(answer) = answer.text().await else { return };
        let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        if let Some(token) = answer["access_token"].as_str() {
            *self.token.lock().unwrap() = token.to_owned();
        }
    }

    /// Until it comes through.
    async fn call(&self, method: Method, path: &str, body: Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        for _ in 0..3_000 {
            if let Some(answer) = self.attempt(method.clone(), path, "application/json", body.clone()).await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{method} {path} never came through");
    }
}

/// What one workspace was sent.
#[derive(Default)]
struct Sent {
    /// Event id → (ts in milliseconds, symbol, qty), of acknowledged requests.
    acknowledged: BTreeMap<String, Trade>,
    /// Of requests that were given up: they may be there or not.
    unknown: BTreeMap<String, Trade>,
    repeats: u64,
}

type Trade = (i64, String, i64);

/// Sends requests one after the other until told to stop: each until it is acknowledged, but now and then one is given
/// up, and now and then an acknowledged one is sent again.
async fn load(api: Arc<Api>, workspace: String, seed: u64, stop: Arc<AtomicBool>, accepted: Arc<AtomicU64>) -> Sent {
    let path = format!("/api/v1/workspaces/{workspace}/streams/market.trades/events");
    let (mut dice, mut sent) = (Dice(seed), Sent::default());
    let (mut number, mut ts) = (0_u64, START_MS);
    while !stop.load(Ordering::Relaxed) {
        let mut trades: BTreeMap<String, Trade> = BTreeMap::new();
        let mut lines = Vec::new();
        for _ in 0..=dice.below(30) {
            ts += dice.below(40) as i64;
            let symbol = ["A", "B", "C"][dice.below(3) as usize].to_owned();
            let (id, qty) = (format!("{number:08}"), dice.below(100) as i64);
            number += 1;
            lines.push(json!({"id": id, "ts": ts, "symbol": symbol, "price": 1.0, "qty": qty}).to_string());
            trades.insert(id, (ts, symbol, qty));
        }
        let body = lines.join("\n");
        let give_up = dice.below(8) == 0;
        let mut answer = None;
        while answer.is_none() {
            answer = api.attempt(Method::POST, &path, "application/x-ndjson", body.clone()).await;
            if answer.is_none() && (give_up || stop.load(Ordering::Relaxed)) {
                break;
            }
            if answer.is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let Some(answer) = answer else {
            sent.unknown.append(&mut trades);
            continue;
        };
        let count = |key: &str| answer[key].as_u64().unwrap();
        assert_eq!(count("accepted") + count("duplicates"), trades.len() as u64, "{answer}");
        accepted.fetch_add(count("accepted"), Ordering::Relaxed);
        sent.acknowledged.append(&mut trades);
        if dice.below(10) == 0
            && let Some(again) = api.attempt(Method::POST, &path, "application/x-ndjson", body).await
        {
            assert_eq!(again["accepted"], 0, "an acknowledged event was taken twice: {again}");
            sent.repeats += lines.len() as u64;
        }
    }
    sent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_killed_nothing_acknowledged_is_lost_and_nothing_counts_twice() {
    let number = |name: &str, otherwise: u64| std::env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    let (kills, seed) = (number("TIDEWATCH_TEST_KILLS", 50), number("TIDEWATCH_TEST_SEED", 1));
    println!("seed {seed}, {kills} kills");
    let directory = TempDir::new().unwrap();
    let mut process = Process::new(directory.path());
    let client = Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    process.start();
    process.ready(&client).await;
    let base = format!("http://127.0.0.1:{}", process.port);
    let api = Arc::new(Api { client: client.clone(), base, token: Default::default() });
    api.login().await;
    let names: Vec<String> = (0..WORKSPACES).map(|i| format!("team-{i}")).collect();
    for name in &names {
        api.call(Method::POST, "/api/v1/workspaces", json!({"id": name, "name": name})).await;
        let sql = "SELECT symbol, count(*) AS n, sum(qty) AS total FROM market.trades \
                   GROUP BY tumble(ts, INTERVAL '1 second'), symbol";
        // the windows of the flood of events close soon after one another
        let metric = json!({"sql": sql, "max_delay": "0s"});
        api.call(Method::PUT, &format!("/api/v1/workspaces/{name}/metrics/sums"), metric).await;
        let rule = json!({"metric": "sums", "condition": format!("n > {MANY}")});
        api.call(Method::PUT, &format!("/api/v1/workspaces/{name}/alert-rules/many"), rule).await;
    }

    let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..)
        .zip(&names)
        .map(|(i, name)| {
            tokio::spawn(load(api.clone(), name.clone(), seed * 1_000 + i, stop.clone(), accepted.clone()))
        })
        .collect();
    let mut dice = Dice(seed);
    let mut slowest = Duration::ZERO;
    for _ in 0..kills {
        // from in the middle of the start to well into the load
        tokio::time::sleep(Duration::from_millis(dice.below(900))).await;
        process.kill().await;
        process.start();
        if dice.below(4) > 0 {
            slowest = slowest.max(process.ready(&client).await);
        }
    }
    process.ready(&client).await;
    // after the last kill something is acknowledged again
    let before = accepted.load(Ordering::Relaxed);
    for _ in 0..3_000 {
        if accepted.load(Ordering::Relaxed) > before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(accepted.load(Ordering::Relaxed) > before, "nothing is accepted any more: {}", process.stderr());
    stop.store(true, Ordering::Relaxed);

    let (mut events, mut repeats, mut alerts_seen) = (0, 0, 0);
    for (name, client) in names.iter().zip(clients) {
        let sent = client.await.unwrap();
        repeats += sent.repeats;
        let ws = format!("/api/v1/workspaces/{name}");

        // what the log has is what was acknowledged, and perhaps requests that were given up
        let question = json!({"sql": "SELECT id, symbol, qty FROM market.trades"});
        let stored = api.call(Method::POST, &format!("{ws}/query"), question).await;
        let stored: Vec<String> = stored["rows"].as_array().unwrap().iter().map(|row| text_of(row, "id", 0)).collect();
        let distinct: BTreeSet<&String> = stored.iter().collect();
        assert_eq!(distinct.len(), stored.len(), "{name}: an id is there twice");
        let lost: Vec<_> = sent.acknowledged.keys().filter(|id| !distinct.contains(id)).collect();
        assert!(lost.is_empty(), "{name}: {} acknowledged events are lost, the first is {}", lost.len(), lost[0]);
        let known = |id: &&String| sent.acknowledged.contains_key(*id) || sent.unknown.contains_key(*id);
        assert!(distinct.iter().all(known), "{name}: an event that nobody sent");
        events += stored.len();

        // final rows are those of a run without a crash
        let mut expected: HashMap<(i64, String), (i64, i64)> = HashMap::new();
        for id in &distinct {
            let (ts, symbol, qty) = sent.acknowledged.get(*id).or_else(|| sent.unknown.get(*id)).unwrap();
            let sums = expected.entry((ts - ts.rem_euclid(WINDOW_MS), symbol.clone())).or_default();
            *sums = (sums.0 + 1, sums.1 + qty);
        }
        let end = START_MS + 10_000_000_000;
        let last = json!({"id": "last", "ts": end, "symbol": "END", "price": 1.0, "qty": 0});
        api.call(Method::POST, &format!("{ws}/streams/market.trades/events"), last).await;
        let mut rows = BTreeMap::new();
        for _ in 0..500 {
            rows = final_rows(&api, &ws).await;
            if rows.len() >= expected.len() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for ((start, symbol), sums) in &expected {
            let row = rows.remove(&(*start, symbol.clone()));
            assert_eq!(row, Some(*sums), "{name}: window {start} of {symbol}");
        }
        assert!(rows.is_empty(), "{name}: rows of nothing: {rows:?}");

        // one firing for each episode
        let alerts = api.call(Method::GET, &format!("{ws}/alerts?limit=1000"), Value::Null).await;
        let alerts = alerts["alerts"].as_array().unwrap().clone();
        let ids: BTreeSet<String> = alerts.iter().map(|alert| alert["id"].to_string()).collect();
        assert_eq!(ids.len(), alerts.len(), "{name}: an alert is there twice");
        let mut firing = BTreeMap::new();
        for alert in alerts.iter().filter(|alert| alert["state"] == "firing") {
            *firing.entry(alert["labels"].to_string()).or_insert(0) += 1;
        }
        assert!(firing.values().all(|count| *count == 1), "{name}: fires twice at once: {firing:?}");
        if expected.values().any(|(n, _)| *n > MANY + 5) {
            assert!(!alerts.is_empty(), "{name}: no alert");
        }
        alerts_seen += alerts.len();
    }
    process.kill().await;
    println!(
        "{events} events, {repeats} repeats, {alerts_seen} alerts in {WORKSPACES} workspaces; slowest start {slowest:?}"
    );
}

/// A cell of an answer to a query, whether rows are objects or arrays.
fn text_of(row: &Value, column: &str, at: usize) -> String {
    let cell = if row.is_array() { &row[at] } else { &row[column] };
    cell.as_str().unwrap_or_else(|| panic!("no {column} in {row}")).to_owned()
}

/// Start of the window and symbol → count and sum, over all pages.
async fn final_rows(api: &Api, ws: &str) -> BTreeMap<(i64, String), (i64, i64)> {
    let mut rows = BTreeMap::new();
    let mut after = String::new();
    loop {
        let path = format!("{ws}/metrics/sums/rows?final=true&limit=1000{after}");
        let page = api.call(Method::GET, &path, Value::Null).await;
        for row in page["rows"].as_array().unwrap() {
            let start = row["window_start"].as_str().unwrap();
            let start = start_ms(start);
            let sums = (row["n"].as_i64().unwrap(), row["total"].as_f64().unwrap() as i64);
            let before = rows.insert((start, row["symbol"].as_str().unwrap().to_owned()), sums);
            assert!(before.is_none(), "a final row is there twice: {row}");
        }
        match page["next"].as_str() {
            Some(next) => {
                after = format!("&after={}", next.replace('%', "%25").replace('+', "%2B").replace('&', "%26"))
            }
            None => return rows,
        }
    }
}

/// Milliseconds of an RFC 3339 instant, UTC: days from civil (Hinnant, "chrono-compatible low-level date algorithms").
fn start_ms(text: &str) -> i64 {
    let number = |from: usize, to: usize| text[from..to].parse::<i64>().unwrap();
    let (year, month, day) = (number(0, 4), number(5, 7), number(8, 10));
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let era = year.div_euclid(400);
    let of_era = year - era * 400;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * month + 2) / 5 + day - 1 - 719_468;
    ((days * 24 + number(11, 13)) * 60 + number(14, 16)) * 60_000 + number(17, 19) * 1_000 + number(20, 23)
}
