//! The real binary and what it keeps: over a real PostgreSQL, killed, with the database taken away under it; backed up
//! while it runs and restored.

use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::database::Database;
use crate::harness::BINARY;

const EMAIL: &str = "owner@example.com";
const PASSWORD: &str = "correct horse battery staple";
const VOLUME: &str = "SELECT symbol, count(*) AS trades, sum(qty) AS volume FROM market.trades \
                      GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol";
/// 2024-01-01T00:00:00Z in milliseconds.
const NEW_YEAR: i64 = 1_704_067_200_000;
/// The machine may be busy with builds.
const PATIENCE: Duration = Duration::from_secs(90);

/// `tidewatch serve`, killed when it is dropped.
pub struct Process {
    child: Child,
    url: String,
    client: Client,
    token: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Process {
    async fn start(data: &Path, store: &str) -> Process {
        Process::start_with(data, store, &[]).await
    }

    /// The same with settings of the test's own, by the names of their variables.
    pub async fn start_with(data: &Path, store: &str, settings: &[(&str, &str)]) -> Process {
        let mut process = Process::spawn(data, store, settings);
        process.sign_in().await;
        process
    }

    /// A server that may not be ready yet.
    fn spawn(data: &Path, store: &str, settings: &[(&str, &str)]) -> Process {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(BINARY)
            .arg("serve")
            .env("TIDEWATCH__LISTEN", format!("127.0.0.1:{port}"))
            .env("TIDEWATCH__DATA_DIR", data)
            .env("TIDEWATCH__STORE__URL", store)
            .env("TIDEWATCH__STORE__ACQUIRE_MS", "2000")
            .env("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them")
            .env("TIDEWATCH__AUTH__BOOTSTRAP_EMAIL", EMAIL)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_PASSWORD", PASSWORD)
            .env("RUST_LOG", "warn")
            .envs(settings.iter().copied())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        server::choose_tls();
        let client = Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        Process { child, url: format!("http://127.0.0.1:{port}"), client, token: String::new() }
    }

    async fn sign_in(&mut self) {
        self.until("it is ready", |process| async { process.ready().await.0 == StatusCode::OK }).await;
        let login = json!({"email": EMAIL, "password": PASSWORD}).to_string();
        let (status, body) = self.call(Method::POST, "/api/v1/auth/login", login).await.unwrap();
        assert_eq!(status, StatusCode::OK, "{body}");
        self.token = body["access_token"].as_str().unwrap().to_owned();
    }

    pub async fn call(&self, method: Method, path: &str, body: String) -> Option<(StatusCode, Value)> {
        let kind = if path.ends_with("/events") { "application/x-ndjson" } else { "application/json" };
        let request = self.client.request(method, format!("{}{path}", self.url)).header("content-type", kind);
        let answer = request.bearer_auth(&self.token).body(body).send().await.ok()?;
        let status = answer.status();
        let text = answer.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }

    pub async fn ok(&self, method: Method, path: &str, body: Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = self.call(method, path, body).await.expect("an answer");
        assert!(status.is_success(), "{path}: {status} {answer}");
        answer
    }

    async fn ready(&self) -> (StatusCode, Value) {
        let gone = (StatusCode::SERVICE_UNAVAILABLE, Value::Null);
        self.call(Method::GET, "/ready", String::new()).await.unwrap_or(gone)
    }

    /// Whether a start waits for the store, and says it is because of `why`. It is never ready meanwhile.
    async fn waits_for_store(&self, why: &str) -> bool {
        let (status, answer) = self.ready().await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
        let detail = answer["detail"].as_str().unwrap_or_default();
        detail.starts_with("store: cannot reach store") && detail.contains(why)
    }

    async fn until<'a, F: Future<Output = bool>>(&'a self, what: &str, holds: impl Fn(&'a Process) -> F) {
        let began = Instant::now();
        while !holds(self).await {
            assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A workspace with the metric `volume`.
    async fn with_metric(data: &Path, store: &str) -> Process {
        let process = Process::start(data, store).await;
        process.ok(Method::POST, "/api/v1/workspaces", json!({"id": "acme", "name": "Acme"})).await;
        let metric = json!({"sql": VOLUME, "max_delay": "0s", "allowed_lateness": "1h"});
        process.ok(Method::PUT, "/api/v1/workspaces/acme/metrics/volume", metric).await;
        process
    }

    /// Posts trades 0 to `n` of second `second`, each with an id: what the server answered.
    async fn trades(&self, second: i64, n: i64) -> Option<(StatusCode, Value)> {
        let line = |i: i64| {
            let (id, symbol) = (format!("{second}-{i}"), ["A", "B"][(i % 2) as usize]);
            json!({"id": id, "ts": NEW_YEAR + second * 1000, "symbol": symbol, "price": 1, "qty": i}).to_string() + "\n"
        };
        let body: String = (0..n).map(line).collect();
        self.call(Method::POST, "/api/v1/workspaces/acme/streams/market.trades/events", body).await
    }

    /// All rows of `volume` that are there, those in memory too: trades and volume, and how many rows twice.
    async fn totals(&self) -> Option<(i64, f64, usize)> {
        let path = "/api/v1/workspaces/acme/metrics/volume/rows?limit=10000";
        let (status, answer) = self.call(Method::GET, path, String::new()).await?;
        let rows = answer["rows"].as_array().filter(|_| status.is_success())?.clone();
        let mut keys: Vec<String> =
            rows.iter().map(|row| format!("{} {}", row["window_start"], row["symbol"])).collect();
        keys.sort();
        let before = keys.len();
        keys.dedup();
        let sum = |column: &str| rows.iter().map(|row| row[column].as_f64().unwrap()).sum::<f64>();
        Some((sum("trades") as i64, sum("volume"), before - keys.len()))
    }
}

fn database() -> Option<(Database, String)> {
    match Database::postgres() {
        Ok(database) => {
            let url = database.create("tides");
            Some((database, url))
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

#[tokio::test]
async fn over_postgresql_a_killed_server_comes_back_with_the_same_numbers() {
    let Some((_database, url)) = database() else { return };
    let data = tempfile::tempdir().unwrap();
    let mut process = Process::with_metric(data.path(), &url).await;
    let (_, ready) = process.ready().await;
    assert!(ready["parts"].to_string().contains("postgresql"), "{ready}");
    let (mut events, mut volume) = (0, 0.0);
    for round in 0..3 {
        for second in 0..10 {
            let (status, answer) = process.trades(round * 100 + second * 3, 50).await.unwrap();
            assert_eq!((status, &answer["accepted"]), (StatusCode::OK, &json!(50)), "{answer}");
            events += 50;
            volume += (0..50).sum::<i64>() as f64;
        }
        drop(process); // SIGKILL, with whatever is not committed yet
        process = Process::start(data.path(), &url).await;
        process
            .until("the same numbers", |process| async { process.totals().await == Some((events, volume, 0)) })
            .await;
        // what was taken in before the kill is known as a repeat
        let (_, again) = process.trades(round * 100, 50).await.unwrap();
        assert_eq!(again["duplicates"], 50, "{again}");
    }
}

#[tokio::test]
async fn without_the_database_events_are_taken_in_and_later_all_is_there_once() {
    let Some((mut database, url)) = database() else { return };
    let data = tempfile::tempdir().unwrap();
    let process = Process::with_metric(data.path(), &url).await;
    process.trades(0, 50).await.unwrap();
    process
        .until("the first trades are there", |process| async { process.totals().await == Some((50, 1225.0, 0)) })
        .await;

    database.stop();
    process.until("it is degraded", |process| async { process.ready().await.1["status"] == "degraded" }).await;
    let (status, ready) = process.ready().await;
    assert_eq!(status, StatusCode::OK);
    assert!(ready["detail"].as_str().unwrap().starts_with("store: "), "{ready}");
    for second in 1..40 {
        let began = Instant::now();
        let (status, answer) = process.trades(second * 5, 50).await.unwrap();
        assert_eq!((status, &answer["accepted"]), (StatusCode::OK, &json!(50)), "{answer}");
        assert!(began.elapsed() < Duration::from_secs(20), "ingest waited {:?} for the store", began.elapsed());
    }
    // what is asked of the store has to wait, and who asked is not forgotten
    let refused =
        process.call(Method::PUT, "/api/v1/workspaces/acme/metrics/other", json!({"sql": VOLUME}).to_string());
    assert_eq!(refused.await.unwrap().0, StatusCode::SERVICE_UNAVAILABLE);
    // live results go on: the newest window is open and holds the newest trades
    let live = "/api/v1/workspaces/acme/metrics/volume/rows?final=false&symbol=A";
    process
        .until("a live row of the newest window", |process| async {
            let (_, answer) = process.call(Method::GET, live, String::new()).await.unwrap_or_default();
            answer["rows"][0]["window_start"] == "2024-01-01T00:03:10.000000Z" && answer["rows"][0]["trades"] == 50
        })
        .await;

    database.start();
    process.until("it is ready again", |process| async { process.ready().await.1["status"] == "ready" }).await;
    let all = Some((40 * 50, 40.0 * 1225.0, 0));
    process.until("all is there, once", |process| async { process.totals().await == all }).await;
    // and in the database itself, once its commit has gone through
    let stored = "SELECT COALESCE(SUM((row_json::json ->> 'trades')::int), 0) FROM final_rows";
    process
        .until("final rows are in the database", |_| async {
            // all windows but the open one of the last two posts
            database.sql("postgres", "tides", stored).parse::<i64>().unwrap() >= 38 * 50
        })
        .await;
    process
        .until("the audit log has what was refused meanwhile", |process| async {
            let audit = process.call(Method::GET, "/api/v1/workspaces/acme/audit", String::new()).await;
            audit.is_some_and(|(_, log)| {
                let entries = log["entries"].as_array().into_iter().flatten();
                entries.filter(|entry| entry.to_string().contains("metrics/other")).count() == 1
            })
        })
        .await;
    drop(process);
    let process = Process::start(data.path(), &url).await;
    process.until("a restart finds the same", |process| async { process.totals().await == all }).await;
}

#[tokio::test]
async fn a_server_that_starts_without_its_database_lives_says_so_and_is_ready_once_it_is_there() {
    let Some((mut database, url)) = database() else { return };
    let data = tempfile::tempdir().unwrap();
    let mut process = Process::with_metric(data.path(), &url).await;
    process.trades(0, 10).await.unwrap();
    process.child.kill().unwrap(); // what it acknowledged is in the log alone
    process.child.wait().unwrap();
    database.stop();
    // one that takes connections and says nothing, then none at all
    let address = url.split(['@', '/']).nth(3).unwrap();
    let silent = std::net::TcpListener::bind(address).unwrap();
    let mut process = Process::spawn(data.path(), &url, &[]);
    process.until("its database is silent", |process| process.waits_for_store("no answer within 2s")).await;
    drop(silent);
    process.until("its database is away", |process| process.waits_for_store("refused")).await;
    let (status, health) = process.call(Method::GET, "/health", String::new()).await.unwrap();
    assert_eq!((status, health), (StatusCode::OK, json!({"status": "ok"})));
    let (status, answer) = process.trades(1, 1).await.unwrap();
    assert_eq!((status, &answer["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("not_ready")), "{answer}");
    database.start();
    process.sign_in().await;
    process.trades(1, 10).await.unwrap();
    process.until("all is counted once", |process| async { process.totals().await == Some((20, 90.0, 0)) }).await;
}

/// `tidewatch backup` or `restore`: what it says when it fails.
fn tool(command: &str, dir: &Path, data: &Path, store: Option<&str>) -> Result<String, String> {
    let mut tool = Command::new(BINARY);
    tool.arg(command).arg(dir).env("TIDEWATCH__DATA_DIR", data);
    if let Some(store) = store {
        tool.env("TIDEWATCH__STORE__URL", store);
    }
    let out = tool.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
}

/// Backs up while events come in, restores elsewhere, and compares.
async fn a_backup_holds_what_was_acknowledged_before_it(store: &str, restored_store: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (data, other, copy) = (dir.path().join("data"), dir.path().join("other"), dir.path().join("copy"));
    let process = Process::with_metric(&data, store).await;
    for second in 0..20 {
        assert_eq!(process.trades(second * 3, 50).await.unwrap().0, StatusCode::OK);
    }
    let more = async {
        for second in 20..60 {
            assert_eq!(process.trades(second * 3, 50).await.unwrap().0, StatusCode::OK);
        }
    };
    let backup = {
        let (copy, data, store) = (copy.clone(), data.clone(), store.to_owned());
        tokio::task::spawn_blocking(move || tool("backup", &copy, &data, Some(&store)))
    };
    let (said, ()) = tokio::join!(backup, more);
    said.unwrap().unwrap();
    process.until("all is counted", |process| async { process.totals().await == Some((3000, 73500.0, 0)) }).await;
    drop(process);

    let said = tool("restore", &copy, &data, Some(restored_store)).unwrap_err();
    assert!(said.contains("is not empty"), "{said}");
    tool("restore", &copy, &other, Some(restored_store)).unwrap();
    let restored = Process::start(&other, restored_store).await;
    // whole posts, all that came before the backup among them, none twice
    restored
        .until("the posts of before the backup are counted", |restored| async {
            let Some((trades, volume, twice)) = restored.totals().await else { return false };
            assert_eq!(twice, 0);
            (1000..=3000).contains(&trades) && trades % 50 == 0 && volume == (trades / 50) as f64 * 1225.0
        })
        .await;
    // it goes on from there: the posts it lacks are taken in, the others are repeats
    for second in 0..60 {
        assert_eq!(restored.trades(second * 3, 50).await.unwrap().0, StatusCode::OK);
    }
    restored.until("all is there, once", |process| async { process.totals().await == Some((3000, 73500.0, 0)) }).await;
    drop(restored);

    // a byte that changed is found before anything is written
    let manifest: Value = serde_json::from_slice(&std::fs::read(copy.join("backup.json")).unwrap()).unwrap();
    let file = copy.join(manifest["files"][0]["path"].as_str().unwrap());
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let third = dir.path().join("third");
    let said = tool("restore", &copy, &third, Some(restored_store)).unwrap_err();
    assert!(said.contains("is not as it was written"), "{said}");
    assert!(!third.exists());
}

#[tokio::test]
async fn a_backup_taken_under_load_restores_to_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let url = |name: &str| format!("sqlite:{}", dir.path().join(name).display());
    a_backup_holds_what_was_acknowledged_before_it(&url("a.db"), &url("b.db")).await;
}

#[tokio::test]
async fn over_postgresql_a_backup_taken_under_load_restores_to_the_same_numbers() {
    let Some((database, url)) = database() else { return };
    a_backup_holds_what_was_acknowledged_before_it(&url, &database.create("other_tides")).await;
}
