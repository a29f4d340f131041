//! `tidewatch demo`: three sample workspaces, each from its pack and with portfolios, fed by simulators or by an exchange.

use crate::app::App;
use crate::config::Config;
use actors::System;
use actors::pack::Packs;
use anyhow::{Context, Result};
use engine::event::{Micros, Span, WorkspaceId};
use sql::store::{Portfolio, Position, Workspace};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use streams::decode::{Bounds, Format, TsUnit, decode};
use streams::feed::{self, Feed, FeedConfig, FeedCounters};
use streams::simulate::{Kind, SimEvent, Simulator};
use tokio_util::sync::CancellationToken;

/// How fast simulated time goes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Speed {
    /// So many times as fast as real time, until it reaches the present.
    Times(f64),
    /// As fast as the machine takes it, until it reaches the present.
    Max,
}

impl std::str::FromStr for Speed {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Speed::Max);
        }
        match text.trim_end_matches('x').parse::<f64>() {
            Ok(times) if times.is_finite() && times >= 1.0 => Ok(Speed::Times(times)),
            _ => Err(format!("speed `{text}` is neither a number from 1 on, such as 60x, nor max")),
        }
    }
}

/// How much simulated past a new demo starts with, so that charts are not empty.
const PAST: Span = Span::seconds(20 * 60);

/// What one sample workspace holds.
struct Sample {
    id: &'static str,
    name: &'static str,
    kind: Kind,
    pack: &'static str,
    portfolios: &'static [SamplePortfolio],
}

struct SamplePortfolio {
    id: &'static str,
    name: &'static str,
    /// Symbol, quantity, average cost, sector.
    positions: &'static [(&'static str, f64, f64, &'static str)],
}

const SAMPLES: [Sample; 3] = [
    Sample {
        id: "tidal-ventures",
        name: "Tidal Ventures (venture fund)",
        kind: Kind::Venture,
        pack: "venture",
        portfolios: &[
            SamplePortfolio {
                id: "growth",
                name: "Growth fund",
                positions: &[
                    ("AAPL", 12_000.0, 201.5, "Technology"),
                    ("NVDA", 9_500.0, 138.2, "Semiconductors"),
                    ("MSFT", 4_200.0, 431.0, "Technology"),
                    ("AMZN", 6_000.0, 188.4, "Consumer"),
                    ("GOOGL", 5_500.0, 176.9, "Technology"),
                ],
            },
            SamplePortfolio {
                id: "treasury",
                name: "Treasury",
                positions: &[
                    ("SPY", 8_000.0, 560.0, "Index"),
                    ("BTC-USD", 45.0, 71_000.0, "Digital assets"),
                    ("ETH-USD", 600.0, 2_900.0, "Digital assets"),
                    ("JPM", 3_000.0, 214.0, "Financials"),
                ],
            },
        ],
    },
    Sample {
        id: "lighthouse",
        name: "Lighthouse (founder's company)",
        kind: Kind::Founder,
        pack: "founder",
        portfolios: &[],
    },
    Sample {
        id: "starlight",
        name: "Starlight (creator agency)",
        kind: Kind::Creator,
        pack: "creator",
        portfolios: &[],
    },
];

/// Creates what is missing of the sample workspaces; `owner` owns them. True when they are new.
pub async fn prepare(system: &System, packs: &Packs, owner: &str) -> Result<bool> {
    let mut new = false;
    for sample in &SAMPLES {
        let id: WorkspaceId = sample.id.parse()?;
        if system.workspace_exists(&id).await {
            continue;
        }
        new = true;
        let pack = packs.get(sample.pack).with_context(|| format!("there is no pack `{}`", sample.pack))?;
        let workspace = Workspace {
            id: id.clone(),
            name: sample.name.to_owned(),
            pack: Some(sample.pack.to_owned()),
            tier: "enterprise".to_owned(),
            created_at: system.now(),
        };
        system.create_workspace(workspace, owner).await?;
        pack.apply(system, &id).await.with_context(|| format!("pack {}", sample.pack))?;
        for portfolio in sample.portfolios {
            let row = Portfolio {
                workspace: id.clone(),
                id: portfolio.id.to_owned(),
                name: portfolio.name.to_owned(),
                currency: "USD".to_owned(),
                created_at: system.now(),
            };
            system.put_portfolio(&id, row).await?;
            let position = |&(symbol, qty, cost, sector): &(&str, f64, f64, &str)| Position {
                symbol: symbol.to_owned(),
                qty,
                cost,
                sector: Some(sector.to_owned()),
            };
            let positions = portfolio.positions.iter().map(position).collect();
            system.put_positions(&id, &portfolio.id.parse()?, positions, true).await?;
        }
    }
    Ok(new)
}

/// Feeds the sample workspaces until `stop`. With `live` the fund's market comes from that exchange.
pub async fn feed(system: System, fresh: bool, speed: Speed, live: Option<Feed>, seed: u64, stop: CancellationToken) {
    let mut tasks = Vec::new();
    for (at, sample) in SAMPLES.iter().enumerate() {
        let Ok(id) = sample.id.parse::<WorkspaceId>() else { continue };
        let (system, stop) = (system.clone(), stop.clone());
        if let (Kind::Venture, Some(exchange)) = (sample.kind, live) {
            tasks.push(tokio::spawn(exchange_feed(system, id, exchange, seed, stop)));
        } else {
            let start = if fresh { system.now().minus(PAST) } else { system.now() };
            let simulator = Simulator::new(sample.kind, seed.wrapping_add(at as u64), start);
            tasks.push(tokio::spawn(simulate(system, id, simulator, start, speed, stop)));
        }
    }
    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a simulator stopped");
        }
    }
}

/// Simulated time runs at `speed` up to the present, then with the clock.
async fn simulate(
    system: System,
    id: WorkspaceId,
    mut simulator: Simulator,
    start: Micros,
    speed: Speed,
    stop: CancellationToken,
) {
    const STEP: Duration = Duration::from_millis(50);
    // the past comes in pieces of this length
    const PIECE: Span = Span::seconds(5);
    let began = system.now();
    let mut at = start;
    while !stop.is_cancelled() {
        let now = system.now();
        at = match speed {
            Speed::Max => at.plus(PIECE).min(now),
            Speed::Times(times) => {
                let simulated = (now.since(began).0 as f64 * times) as i64;
                start.plus(Span(simulated)).min(now)
            }
        };
        let mut events = Vec::new();
        simulator.next_until(at, &mut events);
        if let Err(error) = ingest(&system, &id, events).await {
            tracing::warn!(workspace = %id, %error, "simulated events were refused; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        if at >= now || speed != Speed::Max {
            tokio::time::sleep(STEP).await;
        }
    }
}

async fn exchange_feed(system: System, id: WorkspaceId, exchange: Feed, seed: u64, stop: CancellationToken) {
    let symbols = ["BTC-USD", "ETH-USD", "SOL-USD", "XRP-USD"].map(str::to_owned).to_vec();
    let (sender, mut events) = tokio::sync::mpsc::channel(256);
    let counters = Arc::new(FeedCounters::default());
    let run = feed::run(FeedConfig::new(exchange, symbols, seed), sender, counters, stop);
    let take = async {
        while let Some(lines) = events.recv().await {
            let events = lines.into_iter().map(|line| SimEvent { stream: "market.trades", line }).collect();
            if let Err(error) = ingest(&system, &id, events).await {
                tracing::warn!(%error, "trades were refused");
            }
        }
    };
    let (result, ()) = tokio::join!(run, take);
    if let Err(error) = result {
        tracing::error!(%error, "the live feed could not start");
    }
}

/// Events enter as if they had come over HTTP: decoded, checked, made durable.
async fn ingest(system: &System, id: &WorkspaceId, events: Vec<SimEvent>) -> Result<()> {
    let mut bodies: HashMap<&'static str, String> = HashMap::new();
    for event in events {
        let body = bodies.entry(event.stream).or_default();
        body.push_str(&event.line);
        body.push('\n');
    }
    for (stream, body) in bodies {
        let stream = stream.parse()?;
        let schema = system.schema(id, &stream).await?;
        let decoded =
            decode(&schema, body.as_bytes(), Format::Ndjson, TsUnit::Micros, &Bounds::default(), system.now())?;
        system.ingest(id, &stream, decoded).await?;
    }
    Ok(())
}

/// What `tidewatch demo` was asked for.
pub struct Demo {
    pub live: Option<Feed>,
    pub speed: Speed,
    pub data_dir: PathBuf,
    pub listen: SocketAddr,
    pub seed: u64,
}

/// The demo's user. The password is made for each data directory and kept in it.
pub const EMAIL: &str = "demo@tidewatch.local";

/// Starts everything, prints address and login, and runs until stopped.
pub async fn run(demo: Demo) -> Result<()> {
    let Demo { live, speed, data_dir, listen, seed } = demo;
    std::fs::create_dir_all(&data_dir).with_context(|| format!("cannot make {}", data_dir.display()))?;
    let password = kept(&data_dir.join("demo-password"), 12)?;
    let secret = kept(&data_dir.join("demo-secret"), 48)?;
    let mut config = Config { listen, data_dir: data_dir.clone(), ..Config::default() };
    config.auth.secret = Some(secret);
    config.auth.bootstrap_email = Some(EMAIL.to_owned());
    config.auth.bootstrap_password = Some(password.clone());
    let app = App::build(config).await?;
    let system = app.system().clone();
    let user =
        system.store().user_by_email(EMAIL).await?.context("the demo's user is missing; delete the data directory")?;
    let fresh = prepare(&system, app.packs(), &user.id).await?;
    let stop = CancellationToken::new();
    let feeding = tokio::spawn(feed(system, fresh, speed, live, seed, stop.clone()));
    println!("Tidewatch demo: http://{}", app.address());
    println!("  sign in as  {EMAIL}");
    println!("  password    {password}");
    println!("  data in     {} (start again with it to continue, delete it to begin anew)", data_dir.display());
    println!("  workspaces  {}", SAMPLES.each_ref().map(|sample| sample.id).join(", "));
    let feeders = stop.clone();
    let result = app
        .serve_until(async move {
            crate::shutdown_signal().await;
            feeders.cancel();
        })
        .await;
    stop.cancel();
    if tokio::time::timeout(Duration::from_secs(2), feeding).await.is_err() {
        tracing::warn!("the simulators did not stop in time");
    }
    result
}

/// A random word that stays the same for this file; readable by its owner alone.
fn kept(file: &Path, bytes: usize) -> Result<String> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Ok(word) = std::fs::read_to_string(file) {
        return Ok(word.trim().to_owned());
    }
    let mut random = vec![0u8; bytes];
    rand::fill(&mut random[..]);
    let word: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut options = std::fs::OpenOptions::new();
    let mut handle = options.write(true).create_new(true).mode(0o600).open(file)?;
    std::io::Write::write_all(&mut handle, word.as_bytes())?;
    Ok(word)
}
