//! `tidewatch bench`: starts this binary as a server of its own and measures it over the loopback, and the engine alone.

use anyhow::{Context, Result, bail};
use engine::event::{Micros, Span, StreamName};
use engine::metric::Timing;
use engine::workspace::Workspace;
use futures::{SinkExt, StreamExt};
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
    /// ingest, latency, engine, startup, or all of them.
    #[arg(default_value = "all")]
    scenario: Scenario,
    /// How long each load lasts.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Where the figures go as JSON.
    #[arg(long, default_value = "bench.json")]
    out: PathBuf,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Debug)]
enum Scenario {
    All,
    Ingest,
    Latency,
    Engine,
    Startup,
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

/// Runs the scenarios, prints a line for each figure and writes them all as JSON.
pub async fn run(args: Bench) -> Result<()> {
    let wanted = |scenario| args.scenario == Scenario::All || args.scenario == scenario;
    let mut figures: Vec<Value> = Vec::new();
    let mut report = |name: &str, value: f64, unit: &str| {
        println!("{name:<58} {value:>14.2} {unit}");
        figures.push(json!({"name": name, "value": value, "unit": unit}));
    };
    if wanted(Scenario::Engine) {
        engine(&mut report).await?;
    }
    if wanted(Scenario::Startup) {
        let began = Instant::now();
        let server = Server::start().await?;
        report("start-up of an empty directory, to ready", began.elapsed().as_secs_f64() * 1e3, "ms");
        report("resident memory, idle", server.resident()?, "MiB");
        server.stop().await?;
    }
    if wanted(Scenario::Ingest) {
        for connections in [1, 4] {
            let server = Server::start().await?;
            server.define(None).await?;
            let rate = load(&server, connections, 4096, None, Duration::from_secs(args.seconds)).await?;
            report(&format!("durable ingest, 3 metrics live, {connections} connection(s)"), rate, "events/s");
            report(&format!("resident memory under that load, {connections} connection(s)"), server.resident()?, "MiB");
            server.stop().await?;
        }
    }
    if wanted(Scenario::Latency) {
        for rate in [1_000, 20_000, 50_000] {
            let server = Server::start().await?;
            server.define(Some("5ms")).await?;
            for (channel, name) in
                [("streams/market.trades?symbol=PROBE", "event"), ("metrics/vwap_1m?symbol=PROBE", "metric row")]
            {
                let (p50, p99) = latency(&server, channel, rate, Duration::from_secs(args.seconds)).await?;
                report(&format!("post to WebSocket ({name}) at {rate} events/s, p50"), p50, "ms");
                report(&format!("post to WebSocket ({name}) at {rate} events/s, p99"), p99, "ms");
            }
            server.stop().await?;
        }
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let json =
        json!({"version": env!("CARGO_PKG_VERSION"), "cores": cores, "seconds": args.seconds, "figures": figures});
    std::fs::write(&args.out, serde_json::to_vec_pretty(&json)?).with_context(|| args.out.display().to_string())?;
    eprintln!("written to {}", args.out.display());
    Ok(())
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
async fn engine(report: &mut impl FnMut(&str, f64, &str)) -> Result<()> {
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
            report(&format!("engine alone, {metrics} metric(s), batch of {events} events"), micros, "µs/batch");
        }
    }
    let lines = Trades::new(9, now.0 - 3_600_000_000).lines(8_192);
    let began = Instant::now();
    for _ in 0..50 {
        drop(decode(schema, &lines, Format::Ndjson, TsUnit::Millis, &Bounds::default(), now)?);
    }
    report("decoding NDJSON, one core", 50.0 * 8_192.0 / began.elapsed().as_secs_f64(), "events/s");
    Ok(())
}

/// This binary as a server on its own data and port.
struct Server {
    child: Child,
    url: String,
    token: String,
    client: reqwest::Client,
    directory: PathBuf,
}

const EMAIL: &str = "bench@tidewatch.local";

impl Server {
    async fn start() -> Result<Server> {
        let directory =
            std::env::temp_dir().join(format!("tidewatch-bench-{}-{}", std::process::id(), rand::random::<u32>()));
        let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?; // free again at once, for the child
        let secret = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        let child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .env("TIDEWATCH__LISTEN", listen.to_string())
            .env("TIDEWATCH__DATA_DIR", &directory)
            .env("TIDEWATCH__AUTH__SECRET", &secret)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_EMAIL", EMAIL)
            .env("TIDEWATCH__AUTH__BOOTSTRAP_PASSWORD", &secret)
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
        let login = client.post(format!("{url}/api/v1/auth/login")).json(&json!({"email": EMAIL, "password": secret}));
        let answer: Value = login.send().await?.json().await?;
        let token = answer["access_token"].as_str().context("no token")?.to_owned();
        Ok(Server { child, url, token, client, directory })
    }

    async fn send(&self, method: reqwest::Method, path: &str, body: Value) -> Result<()> {
        let request =
            self.client.request(method, format!("{}/api/v1/workspaces{path}", self.url)).bearer_auth(&self.token);
        let answer = request.json(&body).send().await?;
        if !answer.status().is_success() {
            bail!("{path}: {}", answer.text().await?);
        }
        Ok(())
    }

    /// Workspace `bench` with the three metrics.
    async fn define(&self, emit: Option<&str>) -> Result<()> {
        self.send(reqwest::Method::POST, "", json!({"id": "bench", "name": "Bench"})).await?;
        for (name, sql) in METRICS {
            let mut metric = json!({"sql": sql});
            if let Some(emit) = emit {
                metric["emit"] = emit.into();
            }
            self.send(reqwest::Method::PUT, &format!("/bench/metrics/{name}"), metric).await?;
        }
        Ok(())
    }

    /// Posts NDJSON; how many events were accepted.
    async fn post(&self, client: &reqwest::Client, body: Vec<u8>) -> Result<u64> {
        let url = format!("{}/api/v1/workspaces/bench/streams/market.trades/events", self.url);
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

    fn resident(&self) -> Result<f64> {
        let id = self.child.id().context("the server has ended")?;
        let status = std::fs::read_to_string(Path::new("/proc").join(id.to_string()).join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib / 1024.0)
    }

    async fn stop(mut self) -> Result<()> {
        self.child.start_kill()?;
        self.child.wait().await?;
        std::fs::remove_dir_all(&self.directory)?;
        Ok(())
    }
}

/// Accepted events a second over `lasting`, each request waiting for its durable answer; at most `rate` a second.
async fn load(server: &Server, connections: usize, batch: usize, rate: Option<u64>, lasting: Duration) -> Result<f64> {
    let now = || i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_micros()).unwrap_or(i64::MAX);
    let began = Instant::now();
    let senders = (0..connections).map(|at| async move {
        let client = reqwest::Client::new();
        // bodies are made before, so that making them is not measured
        let mut trades = Trades::new(at as u64 + 1, now());
        let bodies: Vec<Vec<u8>> = (0..64).map(|_| trades.lines(batch)).collect();
        let (mut accepted, mut sent) = (0u64, 0u64);
        for body in bodies.iter().cycle() {
            let mut body = body.clone();
            retime(&mut body, now() / 1_000);
            if began.elapsed() >= lasting {
                break;
            }
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64(sent as f64 * connections as f64 / rate as f64);
                tokio::time::sleep_until((began + due).into()).await;
            }
            accepted += server.post(&client, body).await?;
            sent += batch as u64;
        }
        Ok::<u64, anyhow::Error>(accepted)
    });
    let accepted: u64 = futures::future::try_join_all(senders).await?.iter().sum();
    Ok(accepted as f64 / began.elapsed().as_secs_f64())
}

/// Milliseconds from posting a probe to its arrival on the channel, p50 and p99, beside a load of `rate`.
async fn latency(server: &Server, channel: &str, rate: u64, lasting: Duration) -> Result<(f64, f64)> {
    let address = format!("{}/api/v1/ws", server.url.replace("http", "ws"));
    let (mut socket, _) = tokio_tungstenite::connect_async(address).await?;
    for frame in [
        json!({"type": "auth", "token": server.token}),
        json!({"type": "subscribe", "workspace": "bench", "channel": channel, "ref": "s"}),
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
    let load = load(server, 2, (rate / 40).clamp(10, 2_000) as usize, Some(rate), lasting);
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
            server.post(&client, line.into_bytes()).await?;
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
    Ok((waits[waits.len() / 2], waits[waits.len() * 99 / 100]))
}
