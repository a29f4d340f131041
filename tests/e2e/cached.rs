//! What was read before: how often the demo's dashboards find it, and a Redis that comes, goes and survives restarts.

use crate::harness::{BINARY, Server};
use crate::redis::RedisServer;
use reqwest::{Client, Method, Url};
use serde_json::{Value, json};
use server::Config;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The machine may be busy with builds.
const PATIENCE: Duration = Duration::from_secs(90);

/// `tidewatch demo`, ended when it is dropped.
struct Demo {
    child: Child,
    url: String,
    token: String,
    client: Client,
}

impl Drop for Demo {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Demo {
    async fn start(data: &Path) -> Demo {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(BINARY);
        command.args(["demo", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"]).arg(data);
        let child = command.env("RUST_LOG", "warn").stdout(Stdio::null()).spawn().unwrap();
        server::choose_tls();
        let client = Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        let mut demo = Demo { child, url: format!("http://127.0.0.1:{port}"), token: String::new(), client };
        let began = Instant::now();
        let ready = || demo.client.get(format!("{}/ready", demo.url)).send();
        while !ready().await.is_ok_and(|answer| answer.status().is_success()) {
            assert!(began.elapsed() < PATIENCE, "the demo does not start");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let password = std::fs::read_to_string(data.join("demo-password")).unwrap();
        let login = json!({"email": "demo@tidewatch.local", "password": password.trim()}).to_string();
        let request = demo.client.post(format!("{}/api/v1/auth/login", demo.url)).body(login);
        let text = request.header("content-type", "application/json").send().await.unwrap().text().await.unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        demo.token = answer["access_token"].as_str().unwrap().to_owned();
        demo
    }

    async fn get(&self, path: &str) -> Value {
        let request = self.client.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        serde_json::from_str(&answer.text().await.unwrap()).unwrap()
    }

    /// Answers of the cache since the start, by class and where they were found.
    async fn found(&self) -> BTreeMap<(String, String), u64> {
        let text = self.client.get(format!("{}/metrics", self.url)).send().await.unwrap().text().await.unwrap();
        let line = |line: &str| {
            let (labels, count) = line.strip_prefix("tidewatch_cache_requests_total{")?.split_once("} ")?;
            let label = |name| Some(labels.split_once(&format!("{name}=\""))?.1.split_once('"')?.0.to_owned());
            Some(((label("class")?, label("found_in")?), count.parse().ok()?))
        };
        text.lines().filter_map(line).collect()
    }

    /// What the console asks when somebody opens a workspace and looks at one of its metrics.
    async fn open_dashboard(&self, workspace: &str, metric: &Value) {
        let ws = format!("/api/v1/workspaces/{workspace}");
        self.get("/api/v1/me").await;
        self.get("/api/v1/packs").await;
        for list in ["metrics", "alerts", "alert-rules", "portfolios", "agents"] {
            self.get(&format!("{ws}/{list}")).await;
        }
        let rows = format!("{ws}/metrics/{}/rows", metric["name"].as_str().unwrap());
        let live = self.get(&format!("{rows}?final=false&limit=4")).await;
        for row in live["rows"].as_array().unwrap() {
            let keys = metric["keys"].as_array().unwrap().iter().map(|key| {
                let name = key.as_str().unwrap();
                let value = row[name].as_str().map_or_else(|| row[name].to_string(), str::to_owned);
                (name.to_owned(), value)
            });
            let start = chart_start(metric, row["window_end"].as_str().unwrap());
            let asked = [("limit".to_owned(), "500".to_owned()), ("from".to_owned(), start)];
            let path = Url::parse_with_params(&format!("{}{rows}", self.url), asked.into_iter().chain(keys)).unwrap();
            self.get(&path.as_str()[self.url.len()..]).await;
        }
    }
}

/// As the console counts it: 240 windows back.
fn chart_start(metric: &Value, end: &str) -> String {
    let window = &metric["window"];
    let width = ["slide", "step", "size", "gap"].iter().find_map(|name| window[name].as_str()).unwrap();
    let width = chrono::Duration::microseconds(streams::span::parse(width).unwrap().0);
    let end = chrono::DateTime::parse_from_rfc3339(end).unwrap();
    (end - width * 240).to_utc().to_rfc3339_opts(chrono::SecondsFormat::Micros, true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_nine_of_ten_reads_of_the_demos_dashboards_are_from_the_cache() {
    let data = tempfile::tempdir().unwrap();
    let demo = Demo::start(data.path()).await;
    let mut dashboards: Vec<(String, Value)> = Vec::new();
    for workspace in demo.get("/api/v1/workspaces").await["workspaces"].as_array().unwrap() {
        let id = workspace["id"].as_str().unwrap();
        let metrics = demo.get(&format!("/api/v1/workspaces/{id}/metrics")).await;
        dashboards.extend(metrics["metrics"].as_array().unwrap().iter().map(|metric| (id.to_owned(), metric.clone())));
    }
    assert!(dashboards.len() >= 3);
    // twenty minutes of the past come first, as fast as the machine takes them
    let began = Instant::now();
    let mut events = 0;
    loop {
        let now = demo.get("/api/v1/system/throughput").await["events_total"].as_u64().unwrap();
        if now > 0 && now - events < 2_000 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the past does not end");
        events = now;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let before = demo.found().await;
    // somebody opens a dashboard every 100 ms, cold caches included, while events come and windows close
    let began = Instant::now();
    let mut opened = 0;
    while began.elapsed() < Duration::from_secs(20) {
        let (workspace, metric) = &dashboards[opened % dashboards.len()];
        demo.open_dashboard(workspace, metric).await;
        opened += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut sums: BTreeMap<String, [u64; 2]> = BTreeMap::new();
    for ((class, place), count) in demo.found().await {
        let new = count - before.get(&(class.clone(), place.clone())).unwrap_or(&0);
        sums.entry(class).or_default()[usize::from(place == "none")] += new;
    }
    let [hits, loads] = sums.values().fold([0, 0], |sum, one| [sum[0] + one[0], sum[1] + one[1]]);
    let rate = hits as f64 / (hits + loads) as f64;
    println!(
        "{opened} dashboards opened: {:.1} % of {} reads from the cache; hits and loads: {sums:?}",
        rate * 100.0,
        hits + loads
    );
    assert!(rate > 0.9, "{sums:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_redis_a_restart_begins_warm_and_an_outage_is_only_seen_in_ready() {
    let mut redis = match RedisServer::start() {
        Ok(redis) => redis,
        Err(why) => return println!("skipped: {why}"),
    };
    let directory = tempfile::tempdir().unwrap();
    let url = redis.url.clone();
    let settings = |config: &mut Config| config.redis.url = Some(url.clone());
    let server = Server::with_workspace_and(directory.path(), settings).await;
    let sql = "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 second'), symbol";
    server.metric("counts", json!({"sql": sql, "max_delay": "0s"})).await;
    let mut sent = 0;
    let mut send = async |server: &Server, n: i64| {
        let line =
            |i: i64| json!({"ts": 1_704_067_200_000 + i * 1_000, "symbol": "A", "price": 1, "qty": 1}).to_string();
        let lines: Vec<String> = (sent..sent + n).map(line).collect();
        server.ingest("market.trades", &lines.join("\n")).await;
        sent += n;
        sent
    };
    let rows = "/api/v1/workspaces/acme/metrics/counts/rows?from=2024-01-01T00:00:00Z&limit=1000";
    let counted = async |server: &Server| server.get(rows).await["rows"].as_array().unwrap().len() as i64;
    let redis_part = async |server: &Server| {
        let ready = server.get("/ready").await;
        let part = ready["parts"].as_array().unwrap().iter().find(|part| part["name"] == "redis").unwrap().clone();
        (ready["status"].as_str().unwrap().to_owned(), part["ok"].as_bool().unwrap())
    };
    let ready = |ok: bool| ((if ok { "ready" } else { "degraded" }).to_owned(), ok);
    let until = async |server: &Server, wanted: bool| {
        let began = Instant::now();
        while redis_part(server).await != ready(wanted) {
            assert!(began.elapsed() < PATIENCE, "{:?}", redis_part(server).await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    until(&server, true).await;
    for n in [300, 5, 5] {
        let sent = send(&server, n).await;
        assert_eq!(counted(&server).await, sent);
    }
    server.final_rows("counts", 309).await;
    // once they all are in the store the newest block is asked for once more, and kept
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(counted(&server).await, 310);

    // it is gone, or hangs: no error, no wait, nothing missing
    redis.stop();
    until(&server, false).await;
    for _ in 0..10 {
        let began = Instant::now();
        let sent = send(&server, 20).await;
        assert_eq!(counted(&server).await, sent);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
    redis.start_again();
    until(&server, true).await;
    let sent = send(&server, 20).await;
    assert_eq!(counted(&server).await, sent);
    redis.signal("STOP");
    until(&server, false).await;
    let sent = send(&server, 20).await;
    assert_eq!(counted(&server).await, sent);
    redis.signal("CONT");
    until(&server, true).await;
    assert_eq!(counted(&server).await, sent);
    // hours of the history, which nobody has asked for yet: kept by the one server, found by the next
    let hours = "/api/v1/workspaces/acme/metrics/counts/rows?from=2024-01-01T00:00:00Z&resolution=1h";
    tokio::time::sleep(Duration::from_millis(1_200)).await; // until all rows are in the store
    let told = server.get(hours).await;
    server.stop().await;

    let server = Server::start_with(directory.path(), settings).await;
    until(&server, true).await;
    assert_eq!(server.get(hours).await, told);
    assert_eq!(counted(&server).await, sent);
    let figures = server.get("/metrics").await;
    let found = r#"tidewatch_cache_requests_total{class="history",found_in="redis"}"#;
    assert!(figures.as_str().unwrap().lines().any(|line| line.starts_with(found)), "{figures}");
    server.stop().await;
    // without its note of a clean stop a start takes nothing for good
    let server = Server::start_with(directory.path(), settings).await;
    assert!(!directory.path().join("redis-era").exists());
    let sent = send(&server, 20).await;
    assert_eq!(counted(&server).await, sent);
    let listed = server.ok(Method::GET, "/api/v1/workspaces/acme/portfolios", Value::Null).await;
    assert_eq!(listed, json!({"portfolios": []}));
    server.stop().await;
    assert!(directory.path().join("redis-era").exists());
}
