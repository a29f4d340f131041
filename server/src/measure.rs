//! `tidewatch bench`: starts this binary as a server of its own and measures it over the loopback, and the engine alone.

use crate::report::Report;
use anyhow::{Context, Result, bail};
use engine::event::{Micros, Span, StreamName};
use engine::metric::Timing;
use engine::workspace::Workspace;
use futures::{SinkExt, StreamExt, TryStreamExt};
use serde_json::{Value, json};
use sql::plan::Planner;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::decode::{Bounds, Format, TsUnit, decode};
use streams::schema::built_in;
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::Message;

/// What to measure.
#[derive(clap::Args)]
pub struct Bench {
    /// ingest, latency, neighbour, api, engine, startup, all of them, or restart, which fills the disk first.
    #[arg(default_value = "all")]
    scenario: Scenario,
    /// How long each load lasts.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Of `restart`: how many workspaces there are.
    #[arg(long, default_value_t = 10_000)]
    workspaces: usize,
    /// Of `restart`: how long the log is.
    #[arg(long, default_value_t = 1_000)]
    log_megabytes: u64,
    /// Where the figures go as JSON; the page with plots goes beside it.
    #[arg(long, default_value = "bench.json")]
    out: PathBuf,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Debug)]
enum Scenario {
    All,
    Ingest,
    Latency,
    Neighbour,
    Api,
    Engine,
    Startup,
    Restart,
}

/// Three metrics over one stream: tumbling and hopping, several aggregates.
const METRICS: [(&str, &str); 3] = [
    (
        "vwap_1m",
        "SELECT symbol, count(*) AS trades, sum(qty) AS volume, sum(price * qty) / sum(qty) AS vwap, min(price) AS low, \
         max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol",
    ),
    (
        "rolling_5m",
        "SELECT symbol, count(*) AS trades, avg(price) AS mean FROM market.trades \
         GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), symbol",
    ),
    (
        "sides_10s",
        "SELECT side, sum(price * qty) AS turnover FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), side",
    ),
];

/// Runs the scenarios, prints a line for each figure and writes them all as JSON and as a page with plots.
pub async fn run(args: Bench) -> Result<()> {
    if args.out.extension().is_some_and(|ending| ending == "html") {
        bail!("--out names the JSON; the page goes beside it: pass a name with another ending");
    }
    let wanted = |scenario| args.scenario == Scenario::All || args.scenario == scenario;
    let mut report = Report::default();
    if wanted(Scenario::Engine) {
        engine(&mut report).await?;
    }
    if wanted(Scenario::Startup) {
        let began = Instant::now();
        let server = Server::start().await?;
        report.figure("start-up of an empty directory, to ready", began.elapsed().as_secs_f64() * 1e3, "ms");
        report.figure("resident memory, idle", server.resident()?, "MiB");
        server.stop().await?;
    }
    if wanted(Scenario::Ingest) {
        for connections in [1, 4] {
            let server = Server::start().await?;
            server.define(QUIET, None).await?;
            let (rate, by_second) =
                load(&server.target, QUIET, connections, 4096, None, Duration::from_secs(args.seconds)).await?;
            report.rate(&format!("durable ingest, 3 metrics live, {connections} connection(s)"), rate, by_second);
            report.figure(
                &format!("resident memory under that load, {connections} connection(s)"),
                server.resident()?,
                "MiB",
            );
            server.stop().await?;
        }
    }
    if wanted(Scenario::Latency) {
        for rate in [1_000, 20_000, 50_000] {
            let server = Server::start().await?;
            server.define(QUIET, Some("5ms")).await?;
            for (channel, name) in
                [("streams/market.trades?symbol=PROBE", "event"), ("metrics/vwap_1m?symbol=PROBE", "metric row")]
            {
                let waits = latency(&server.target, channel, rate, Duration::from_secs(args.seconds)).await?;
                report.latency(&format!("post to WebSocket ({name}) at {rate} events/s"), &waits);
            }
            server.stop().await?;
        }
    }
    if wanted(Scenario::Neighbour) {
        neighbour(&mut report, Duration::from_secs(args.seconds)).await?;
    }
    if wanted(Scenario::Api) {
        api(&mut report, Duration::from_secs(args.seconds)).await?;
    }
    if args.scenario == Scenario::Restart {
        restart(&mut report, args.workspaces, args.log_megabytes << 20).await?;
    }
    report.write(&args.out, args.seconds)
}

/// Trades of 200 symbols, 5,000 a second of event time, as NDJSON: ~105 bytes an event.
struct Trades {
    state: u64,
    at: i64,
}

impl Trades {
    fn new(seed: u64, start: i64) -> Trades {
        Trades { state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1, at: start }
    }

    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn lines(&mut self, count: usize) -> Vec<u8> {
        use std::io::Write;
        let mut body = Vec::with_capacity(count * 112);
        for _ in 0..count {
            let r = self.random();
            self.at += 200;
            let ts = self.at / 1000 - (r >> 52) as i64 % 1500;
            let (symbol, price, qty) = (r % 200, 100.0 + (r >> 16) as f64 % 10_000.0 / 100.0, (r >> 32) % 500 + 1);
            let side = if r & 1 == 0 { "buy" } else { "sell" };
            let result = writeln!(
                body,
                r#"{{"ts":{ts},"symbol":"SYM{symbol:03}","price":{price:.2},"qty":{qty},"side":"{side}","venue":"BENCH"}}"#
            );
            result.expect("memory takes every write");
        }
        body
    }
}

/// Gives every line of `body` the time `now` (milliseconds), less up to 1.5 s: as live events come.
fn retime(body: &mut [u8], now: i64) {
    const DIGITS: usize = 13;
    let mut from = 0;
    let mut spread = 0;
    while from < body.len() {
        spread = (spread * 31 + 7) % 1_500;
        let mut rest = now - spread;
        for digit in body[from + 6..from + 6 + DIGITS].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        from += body[from..].iter().position(|&byte| byte == b'\n').map_or(body.len(), |end| end + 1);
    }
}

/// The engine without network, disk and actors: batches of 10 and of 8,192 events through the metrics.
async fn engine(report: &mut Report) -> Result<()> {
    let stream: StreamName = "market.trades".parse()?;
    let schema = &built_in()[0];
    let now = Micros(1_800_000_000_000_000);
    let mut trades = Trades::new(7, now.0 - 3_600_000_000);
    let mut batches = |events: usize, count: usize| -> Result<Vec<_>> {
        (0..count)
            .map(|_| {
                let lines = trades.lines(events);
                Ok(decode(schema, &lines, Format::Ndjson, TsUnit::Millis, &Bounds::default(), now)?.batch)
            })
            .collect()
    };
    for (events, count) in [(10, 20_000), (8_192, 200)] {
        let input = batches(events, count)?;
        for metrics in [1, 3] {
            let mut workspace = Workspace::default();
            for (name, sql) in METRICS.iter().take(metrics) {
                let program = Planner::default().program(sql, |_| Some(schema.arrow().clone())).await?;
                let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
                workspace.define(name.parse()?, 1, program, timing)?;
            }
            let began = Instant::now();
            for batch in &input {
                drop(workspace.step(&stream, batch));
            }
            let micros = began.elapsed().as_secs_f64() * 1e6 / count as f64;
            report.figure(&format!("engine alone, {metrics} metric(s), batch of {events} events"), micros, "µs/batch");
        }
    }
    let lines = Trades::new(9, now.0 - 3_600_000_000).lines(8_192);
    let began = Instant::now();
    for _ in 0..50 {
        drop(decode(schema, &lines, Format::Ndjson, TsUnit::Millis, &Bounds::default(), now)?);
    }
    report.figure("decoding NDJSON, one core", 50.0 * 8_192.0 / began.elapsed().as_secs_f64(), "events/s");
    Ok(())
}

/// The workspace that is measured, and the one that floods beside it.
const QUIET: &str = "quiet";
const FLOODED: &str = "flooded";

/// How long one workspace's events take to its clients, alone and while another workspace is sent all it takes.
async fn neighbour(report: &mut Report, lasting: Duration) -> Result<()> {
    const CHANNEL: &str = "streams/market.trades?symbol=PROBE";
    let server = Server::start().await?;
    for workspace in [QUIET, FLOODED] {
        server.define(workspace, Some("5ms")).await?;
    }
    let alone = latency(&server.target, CHANNEL, 1_000, lasting).await?;
    report.latency("post to WebSocket (event) at 1000 events/s, alone", &alone);
    let target = server.target.clone();
    // the sender of the flood gives way to the server and to the probes, as one on another machine would
    let flood = std::thread::spawn(move || -> Result<f64> {
        rustix::process::nice(10)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (rate, _) = runtime.block_on(load(&target, FLOODED, 4, 4_096, None, lasting))?;
        Ok(rate)
    });
    let beside = latency(&server.target, CHANNEL, 1_000, lasting).await?;
    let rate = flood.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
    report.figure("flood of another workspace, 4 connections", rate, "events/s");
    report.latency("post to WebSocket (event) at 1000 events/s, beside it", &beside);
    server.stop().await
}

/// Reads as consoles make them: at a fixed rate, whether answers come or not, and then very many at the same time.
async fn api(report: &mut Report, lasting: Duration) -> Result<()> {
    const RATE: u32 = 2_000;
    const AT_ONCE: usize = 10_000;
    let server = Server::start().await?;
    server.define(QUIET, None).await?;
    server.send(reqwest::Method::POST, &format!("/{QUIET}/portfolios"), json!({"id": "main"})).await?;
    let positions = json!([{"symbol": "SYM001", "qty": 10, "cost": 100}, {"symbol": "SYM002", "qty": 5, "cost": 90}]);
    server.send(reqwest::Method::PUT, &format!("/{QUIET}/portfolios/main/positions"), positions).await?;
    load(&server.target, QUIET, 1, 1_000, Some(10_000), Duration::from_secs(2)).await?;
    let paths = [
        "/metrics",
        "/metrics/vwap_1m/rows?limit=50",
        "/metrics/sides_10s/rows?final=true&limit=20",
        "/portfolios/main/summary",
        "/alerts",
        "/streams",
    ];
    let read = |at: usize| {
        let url = format!("{}/api/v1/workspaces/{QUIET}{}", server.target.url, paths[at % paths.len()]);
        let request = server.client.get(url).bearer_auth(&server.target.token);
        async move {
            let began = Instant::now();
            let answer = request.send().await?;
            let status = answer.status();
            answer.bytes().await?;
            if !status.is_success() {
                bail!("a read was answered with {status}");
            }
            Ok(began.elapsed().as_secs_f64() * 1e3)
        }
    };
    let mut clock = tokio::time::interval(Duration::from_secs(1) / RATE);
    let mut answers = tokio::task::JoinSet::new();
    for at in 0..RATE as usize * lasting.as_secs() as usize {
        clock.tick().await;
        answers.spawn(read(at));
    }
    let waits: Result<Vec<f64>> = answers.join_all().await.into_iter().collect();
    let mut waits = waits?;
    waits.sort_by(f64::total_cmp);
    report.figure(&format!("mixed reads at {RATE}/s, p95"), waits[waits.len() * 95 / 100], "ms");
    report.latency(&format!("mixed reads at {RATE}/s"), &waits);
    let began = Instant::now();
    let all: Result<Vec<f64>> = futures::future::join_all((0..AT_ONCE).map(read)).await.into_iter().collect();
    all?;
    report.figure(&format!("{AT_ONCE} reads at once, all answered"), began.elapsed().as_secs_f64(), "s");
    server.stop().await
}

/// A start after a crash, with many workspaces and a long log; then, what it takes to wake one that rested.
async fn restart(report: &mut Report, workspaces: usize, log_bytes: u64) -> Result<()> {
    const ACTIVE: usize = 1_000;
    const BATCH: usize = 2_048;
    let name = |at: usize| format!("w{at:06}");
    let server = Server::start().await?;
    let define = |at: usize| {
        let workspace = json!({"id": name(at), "pack": "venture"});
        let server = &server;
        async move { server.send(reqwest::Method::POST, "", workspace).await }
    };
    let began = Instant::now();
    futures::stream::iter((0..workspaces).map(Ok)).try_for_each_concurrent(16, define).await?;
    report.figure("workspaces made from a pack of 4 metrics", workspaces as f64 / began.elapsed().as_secs_f64(), "/s");
    let client = reqwest::Client::new();
    let mut trades = Trades::new(11, millis() * 1_000);
    let mut at = 0;
    while bytes_in(&server.directory.join("log"))? < log_bytes {
        for _ in 0..64 {
            let mut body = trades.lines(BATCH);
            retime(&mut body, millis());
            server.target.post(&client, &name(at % workspaces.min(ACTIVE)), body).await?;
            at += 1;
        }
    }
    report.figure("resident memory before the crash", server.resident()?, "MiB");
    let directory = server.crash().await?;
    let began = Instant::now();
    let server = Server::start_in(directory).await?;
    report.figure("start-up after a crash, to ready", began.elapsed().as_secs_f64() * 1e3, "ms");
    while server.client.get(format!("{}/ready", server.target.url)).send().await?.text().await?.contains("still read") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    report.figure("start-up after a crash, until all is caught up", began.elapsed().as_secs_f64() * 1e3, "ms");
    report.figure("resident memory after the start", server.resident()?, "MiB");
    let mut waits = Vec::new();
    for at in (ACTIVE..workspaces).take(500) {
        let began = Instant::now();
        let url = format!("{}/api/v1/workspaces/{}/metrics/price_1m/rows", server.target.url, name(at));
        server.client.get(url).bearer_auth(&server.target.token).send().await?.error_for_status()?;
        waits.push(began.elapsed().as_secs_f64() * 1e3);
    }
    if !waits.is_empty() {
        waits.sort_by(f64::total_cmp);
        report.latency("rows of a workspace that rested", &waits);
    }
    server.stop().await
}

/// The size of the files in a directory.
fn bytes_in(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

/// Milliseconds since the Unix epoch.
fn millis() -> i64 {
    i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
}

/// Where a load goes.
#[derive(Clone)]
struct Target {
    url: String,
    token: String,
}

impl Target {
    /// Posts NDJSON; how many events were accepted.
    async fn post(&self, client: &reqwest::Client, workspace: &str, body: Vec<u8>) -> Result<u64> {
        let url = format!("{}/api/v1/workspaces/{workspace}/streams/market.trades/events", self.url);
        loop {
            let request = client.post(&url).bearer_auth(&self.token).header("content-type", "application/x-ndjson");
            let answer = request.body(body.clone()).send().await?;
            if answer.status() == reqwest::StatusCode::SERVICE_UNAVAILABLE {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            let answer: Value = answer.json().await?;
            return answer["accepted"].as_u64().with_context(|| answer.to_string());
        }
    }
}

/// This binary as a server on its own data and port.
struct Server {
    child: Child,
    target: Target,
    client: reqwest::Client,
    directory: PathBuf,
}

const EMAIL: &str = "bench@tidewatch.local";
/// Of servers that listen on the loopback and end with the measurement.
const SECRET: &str = "a secret of the benchmark, which guards nothing";

impl Server {
    async fn start() -> Result<Server> {
        let name = format!("tidewatch-bench-{}-{}", std::process::id(), rand::random::<u32>());
        Server::start_in(std::env::temp_dir().join(name)).await
    }

    /// Starts on a directory, which may hold the data of an earlier server.
    async fn start_in(directory: PathBuf) -> Result<Server> {
        let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?; // free again at once, for the child
        let child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .env("TIDEWATCH__LISTEN", listen.to_string())
            .env("TIDEWATCH__DATA_DIR", &directory)
            .env("TIDEWATCH__AUTH__SECRET", SECRET)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_EMAIL", EMAIL)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_PASSWORD", SECRET)
            .env("RUST_LOG", "warn")
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let client = reqwest::Client::builder().timeout(Duration::from_secs(60)).build()?;
        let url = format!("http://{listen}");
        let began = Instant::now();
        while !client.get(format!("{url}/ready")).send().await.is_ok_and(|answer| answer.status().is_success()) {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("the server was not ready within 20 s");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let login = client.post(format!("{url}/api/v1/auth/login")).json(&json!({"email": EMAIL, "password": SECRET}));
        let answer: Value = login.send().await?.json().await?;
        let token = answer["access_token"].as_str().context("no token")?.to_owned();
        Ok(Server { child, target: Target { url, token }, client, directory })
    }

    async fn send(&self, method: reqwest::Method, path: &str, body: Value) -> Result<()> {
        let request = self
            .client
            .request(method, format!("{}/api/v1/workspaces{path}", self.target.url))
            .bearer_auth(&self.target.token);
        let answer = request.json(&body).send().await?;
        if !answer.status().is_success() {
            bail!("{path}: {}", answer.text().await?);
        }
        Ok(())
    }

    /// A workspace with the three metrics.
    async fn define(&self, workspace: &str, emit: Option<&str>) -> Result<()> {
        self.send(reqwest::Method::POST, "", json!({"id": workspace})).await?;
        for (name, sql) in METRICS {
            let mut metric = json!({"sql": sql});
            if let Some(emit) = emit {
                metric["emit"] = emit.into();
            }
            self.send(reqwest::Method::PUT, &format!("/{workspace}/metrics/{name}"), metric).await?;
        }
        Ok(())
    }

    fn resident(&self) -> Result<f64> {
        let id = self.child.id().context("the server has ended")?;
        let status = std::fs::read_to_string(Path::new("/proc").join(id.to_string()).join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib / 1024.0)
    }

    /// Kills it; where its data is.
    async fn crash(mut self) -> Result<PathBuf> {
        self.child.start_kill()?;
        self.child.wait().await?;
        Ok(self.directory)
    }

    async fn stop(self) -> Result<()> {
        std::fs::remove_dir_all(self.crash().await?)?;
        Ok(())
    }
}

/// Accepted events a second over `lasting`, as a whole and second by second, each request waiting for its durable
/// answer; at most `rate` a second.
async fn load(
    target: &Target,
    workspace: &str,
    connections: usize,
    batch: usize,
    rate: Option<u64>,
    lasting: Duration,
) -> Result<(f64, Vec<(f64, f64)>)> {
    let began = Instant::now();
    let senders = (0..connections).map(|at| async move {
        let client = reqwest::Client::new();
        // bodies are made before, so that making them is not measured
        let mut trades = Trades::new(at as u64 + 1, millis() * 1_000);
        let bodies: Vec<Vec<u8>> = (0..64).map(|_| trades.lines(batch)).collect();
        let (mut answers, mut sent) = (Vec::new(), 0u64);
        for body in bodies.iter().cycle() {
            let mut body = body.clone();
            retime(&mut body, millis());
            if began.elapsed() >= lasting {
                break;
            }
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64(sent as f64 * connections as f64 / rate as f64);
                tokio::time::sleep_until((began + due).into()).await;
            }
            let accepted = target.post(&client, workspace, body).await?;
            answers.push((began.elapsed(), accepted));
            sent += batch as u64;
        }
        Ok::<_, anyhow::Error>(answers)
    });
    let answers = futures::future::try_join_all(senders).await?.concat();
    let took = began.elapsed().as_secs_f64();
    let mut by_second = vec![0.0; lasting.as_secs() as usize];
    for (at, accepted) in &answers {
        // what is answered after the last whole second would make a second of its own look slow
        if let Some(second) = by_second.get_mut(at.as_secs() as usize) {
            *second += *accepted as f64;
        }
    }
    let accepted: u64 = answers.iter().map(|(_, accepted)| accepted).sum();
    let by_second = by_second.into_iter().enumerate().map(|(second, events)| (second as f64, events)).collect();
    Ok((accepted as f64 / took, by_second))
}

/// Milliseconds from posting a probe to its arrival on the channel, sorted, beside a load of `rate`.
async fn latency(target: &Target, channel: &str, rate: u64, lasting: Duration) -> Result<Vec<f64>> {
    let address = format!("{}/api/v1/ws", target.url.replace("http", "ws"));
    let (mut socket, _) = tokio_tungstenite::connect_async(address).await?;
    for frame in [
        json!({"type": "auth", "token": target.token}),
        json!({"type": "subscribe", "workspace": QUIET, "channel": channel, "ref": "s"}),
    ] {
        socket.send(Message::text(frame.to_string())).await?;
    }
    let seen: Arc<parking_lot::Mutex<Vec<(u64, Instant)>>> = Arc::default();
    let heard = seen.clone();
    let listener = tokio::spawn(async move {
        while let Some(Ok(message)) = socket.next().await {
            let (Message::Text(text), at) = (message, Instant::now()) else { continue };
            let Ok(frame) = serde_json::from_str::<Value>(&text) else { continue };
            // a probe's number is its price, and the highest price of its metric row
            let events = frame["event"]["value"]["events"].as_array().into_iter().flatten().map(|e| &e["price"]);
            let rows = frame["event"]["delta"].as_array().into_iter().flatten().map(|op| &op["value"]["high"]);
            let newest = events.chain(rows).filter_map(Value::as_f64).fold(0.0, f64::max);
            if newest > 0.0 {
                heard.lock().push((newest as u64, at));
            }
        }
    });
    let load = load(target, QUIET, 2, (rate / 40).clamp(10, 2_000) as usize, Some(rate), lasting);
    let probes = async {
        let client = reqwest::Client::new();
        let mut sent = Vec::new();
        let base = 1_000_000 * (1 + rand::random::<u8>() as u64);
        let began = Instant::now();
        for number in base.. {
            if began.elapsed() >= lasting {
                break;
            }
            let line = format!("{{\"symbol\":\"PROBE\",\"price\":{number},\"qty\":1}}\n");
            sent.push((number, Instant::now()));
            target.post(&client, QUIET, line.into_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(17)).await;
        }
        Ok::<_, anyhow::Error>(sent)
    };
    let (load, sent) = tokio::join!(load, probes);
    let (_, sent) = (load?, sent?);
    tokio::time::sleep(Duration::from_millis(500)).await;
    listener.abort();
    let seen = seen.lock();
    let mut waits: Vec<f64> = sent
        .iter()
        .filter_map(|(number, at)| {
            let (_, heard) = seen.iter().find(|(newest, heard)| newest >= number && heard > at)?;
            Some(heard.duration_since(*at).as_secs_f64() * 1e3)
        })
        .collect();
    if waits.len() * 10 < sent.len() * 9 {
        bail!("{} of {} probes were never heard on {channel}", sent.len() - waits.len(), sent.len());
    }
    waits.sort_by(f64::total_cmp);
    Ok(waits)
}
