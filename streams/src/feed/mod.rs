//! Live public trades of exchanges over WebSocket, as events of `market.trades`. A feed outlives its connections:
//! it reconnects with backoff, knows repeats by the trade's number, and counts what an outage has cost.

mod backoff; // how long to wait before connecting again
mod binance;
mod coinbase;
mod frame; // what exchanges say, in one vocabulary
mod kraken;
mod sequence; // whether trades are missing

pub use backoff::Backoff;
pub use frame::{Feed, Frame, FrameError, Side, Trade, UnknownFeed};

use frame::symbol_key;
use futures::{SinkExt, StreamExt};
use rand::SeedableRng;
use rand::rngs::StdRng;
use sequence::{Seen, Sequence};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{Connector, connect_async_tls_with_config};
use tokio_util::sync::CancellationToken;

/// A connection that is not open after this long is given up.
const CONNECT_MAX: Duration = Duration::from_secs(15);

/// The largest frame that is taken. Trades are some hundred bytes, a snapshot of Kraken some thousand.
const FRAME_BYTES_MAX: usize = 4 << 20;

/// Which trades to take, and how to hold the connection.
#[derive(Clone, Debug)]
pub struct FeedConfig {
    pub feed: Feed,
    /// `BTC-USD`, `BTC/USD` or as the exchange writes it; events carry it as it is written here.
    pub symbols: Vec<String>,
    /// In place of the exchange's own [`Feed::url`].
    pub url: Option<String>,
    /// A connection without any frame for this long is dead. Halfway a ping asks for one.
    pub idle_timeout: Duration,
    pub backoff: Backoff,
    /// Seed of the jitter; different in every process, so that not all come back at once.
    pub seed: u64,
}

impl FeedConfig {
    /// The exchange's own address, 30 s of silence at most, waits from 1 s to 60 s.
    pub fn new(feed: Feed, symbols: Vec<String>, seed: u64) -> FeedConfig {
        let idle_timeout = Duration::from_secs(30);
        FeedConfig { feed, symbols, url: None, idle_timeout, backoff: Backoff::default(), seed }
    }
}

/// Why a feed cannot start. Once started it does not fail: it reconnects.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error("feed {feed} has no symbols; name some such as BTC-USD")]
    NoSymbols { feed: &'static str },
    #[error("feed {feed}: `{url}` is no ws:// or wss:// address: {detail}")]
    Url { feed: &'static str, url: String, detail: String },
    #[error("feed {feed}: no TLS: {detail}")]
    Tls { feed: &'static str, detail: String },
}

/// What a feed has done so far, readable while it runs.
#[derive(Debug, Default)]
pub struct FeedCounters {
    frames: AtomicU64,
    trades: AtomicU64,
    repeats: AtomicU64,
    gaps: AtomicU64,
    missing: AtomicU64,
    filled: AtomicU64,
    bad_frames: AtomicU64,
    refusals: AtomicU64,
    reconnects: AtomicU64,
}

/// [`FeedCounters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeedCounts {
    /// Text frames received.
    pub frames: u64,
    /// Trades passed on.
    pub trades: u64,
    /// Trades that had been passed on before, and were not again.
    pub repeats: u64,
    /// Times that trades were missing, and how many trades that were.
    pub gaps: u64,
    pub missing: u64,
    /// Missing trades that came after all.
    pub filled: u64,
    /// Frames that were not understood, or held trades that nobody asked for.
    pub bad_frames: u64,
    /// Requests that the exchange refused.
    pub refusals: u64,
    /// Connections that were lost or did not open.
    pub reconnects: u64,
}

impl FeedCounters {
    pub fn read(&self) -> FeedCounts {
        FeedCounts {
            frames: self.frames.load(Relaxed),
            trades: self.trades.load(Relaxed),
            repeats: self.repeats.load(Relaxed),
            gaps: self.gaps.load(Relaxed),
            missing: self.missing.load(Relaxed),
            filled: self.filled.load(Relaxed),
            bad_frames: self.bad_frames.load(Relaxed),
            refusals: self.refusals.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
        }
    }
}

/// Runs a feed until `stop` or until nobody reads `out`. Each message is the events of one frame: NDJSON lines of
/// `market.trades` without line breaks, `ts` in microseconds. A slow reader slows the feed down, so that at
/// worst the exchange cuts it off and the gap is counted.
pub async fn run(
    config: FeedConfig,
    out: mpsc::Sender<Vec<String>>,
    counters: Arc<FeedCounters>,
    stop: CancellationToken,
) -> Result<(), FeedError> {
    let mut session = Session::new(config, out, counters)?;
    let mut rng = StdRng::seed_from_u64(session.config.seed);
    let mut attempt = 0;
    loop {
        let began = Instant::now();
        let lost = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            lost = session.connection() => lost,
        };
        if matches!(lost, Lost::Reader) {
            return Ok(());
        }
        if began.elapsed() >= session.config.backoff.healthy_after {
            attempt = 0;
        }
        let wait = session.config.backoff.wait(attempt, &mut rng);
        attempt += 1;
        session.counters.reconnects.fetch_add(1, Relaxed);
        tracing::warn!(feed = session.name(), url = session.url, %lost, ?wait, attempt, "feed lost, connecting again");
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = sleep(wait) => {}
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("nobody reads the events any more")]
    Reader,
    #[error("no connection within {0:?}")]
    Connect(Duration),
    #[error("no frame for {0:?}")]
    Idle(Duration),
    #[error("closed by the exchange")]
    Closed,
    #[error("{0}")]
    Socket(#[from] tungstenite::Error),
}

/// What outlives the connections of a feed.
struct Session {
    config: FeedConfig,
    url: String,
    tls: Connector,
    out: mpsc::Sender<Vec<String>>,
    counters: Arc<FeedCounters>,
    /// By [`symbol_key`]: the name in events, and the trade numbers seen.
    symbols: HashMap<String, (String, Sequence)>,
}

impl Session {
    fn new(
        config: FeedConfig,
        out: mpsc::Sender<Vec<String>>,
        counters: Arc<FeedCounters>,
    ) -> Result<Session, FeedError> {
        let feed = config.feed.name();
        if config.symbols.is_empty() {
            return Err(FeedError::NoSymbols { feed });
        }
        let url = config.url.clone().unwrap_or_else(|| config.feed.url().to_owned());
        let bad_url = |detail: String| FeedError::Url { feed, url: url.clone(), detail };
        let request = url.as_str().into_client_request().map_err(|error| bad_url(error.to_string()))?;
        if !matches!(request.uri().scheme_str(), Some("ws" | "wss")) {
            return Err(bad_url("unknown scheme".to_owned()));
        }
        let symbols = config.symbols.iter().map(|s| (symbol_key(s), (s.clone(), Sequence::default()))).collect();
        let tls = tls(feed)?;
        Ok(Session { url, tls, out, counters, symbols, config })
    }

    fn name(&self) -> &'static str {
        self.config.feed.name()
    }

    /// One connection from its first to its last frame.
    async fn connection(&mut self) -> Lost {
        match self.connect_and_read().await {
            Ok(never) => match never {},
            Err(lost) => lost,
        }
    }

    async fn connect_and_read(&mut self) -> Result<std::convert::Infallible, Lost> {
        let limits =
            WebSocketConfig::default().max_message_size(Some(FRAME_BYTES_MAX)).max_frame_size(Some(FRAME_BYTES_MAX));
        let connecting = connect_async_tls_with_config(self.url.as_str(), Some(limits), true, Some(self.tls.clone()));
        let (mut socket, _) = timeout(CONNECT_MAX, connecting).await.map_err(|_| Lost::Connect(CONNECT_MAX))??;
        let subscribe = self.config.feed.subscribe(&self.url, &self.config.symbols);
        let idle = self.config.idle_timeout;
        timeout(idle, socket.send(Message::text(subscribe))).await.map_err(|_| Lost::Idle(idle))??;
        tracing::info!(feed = self.name(), url = self.url, symbols = ?self.config.symbols, "feed connected");

        let mut pinged = false;
        loop {
            let message = match timeout(idle / 2, socket.next()).await {
                Err(_) if pinged => return Err(Lost::Idle(idle)),
                Err(_) => {
                    pinged = true;
                    let ping = socket.send(Message::Ping(tungstenite::Bytes::new()));
                    timeout(idle / 2, ping).await.map_err(|_| Lost::Idle(idle))??;
                    continue;
                }
                Ok(None) => return Err(Lost::Closed),
                Ok(Some(message)) => message?,
            };
            pinged = false;
            match message {
                Message::Text(text) => self.frame(&text).await?,
                Message::Close(_) => return Err(Lost::Closed),
                Message::Binary(_) => self.bad_frame(&"a binary frame", ""),
                // the library answers pings itself
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }

    async fn frame(&mut self, text: &str) -> Result<(), Lost> {
        self.counters.frames.fetch_add(1, Relaxed);
        let trades = match self.config.feed.parse(text) {
            Ok(Frame::Trades(trades)) => trades,
            Ok(Frame::Other) => return Ok(()),
            Ok(Frame::Refused(reason)) => {
                self.counters.refusals.fetch_add(1, Relaxed);
                tracing::warn!(feed = self.name(), reason, "the exchange refuses a request");
                return Ok(());
            }
            Err(error) => {
                self.bad_frame(&error, text);
                return Ok(());
            }
        };
        let mut events = Vec::with_capacity(trades.len());
        for trade in &trades {
            match self.place(trade) {
                Some(true) => events.push(trade.event(self.config.feed, &self.symbols[&symbol_key(&trade.symbol)].0)),
                Some(false) => {}
                None => self.bad_frame(&"a symbol that was not asked for", text),
            }
        }
        if events.is_empty() {
            return Ok(());
        }
        let count = events.len() as u64;
        self.out.send(events).await.map_err(|_| Lost::Reader)?;
        self.counters.trades.fetch_add(count, Relaxed);
        Ok(())
    }

    /// Whether a trade is new; `None` when its symbol was not asked for.
    fn place(&mut self, trade: &Trade) -> Option<bool> {
        let (_, sequence) = self.symbols.get_mut(&symbol_key(&trade.symbol))?;
        let Some(number) = trade.number else { return Some(true) };
        let (feed, symbol, newest) = (self.config.feed.name(), &trade.symbol, sequence.newest());
        match sequence.see(number) {
            Seen::Next => {}
            Seen::After { missing } => {
                self.counters.gaps.fetch_add(1, Relaxed);
                self.counters.missing.fetch_add(missing, Relaxed);
                tracing::warn!(feed, symbol, newest, number, missing, "trades are missing");
            }
            Seen::Filled => _ = self.counters.filled.fetch_add(1, Relaxed),
            Seen::Restart => tracing::warn!(feed, symbol, newest, number, "the exchange numbers its trades anew"),
            Seen::Repeat => {
                self.counters.repeats.fetch_add(1, Relaxed);
                return Some(false);
            }
        }
        Some(true)
    }

    fn bad_frame(&self, reason: &dyn std::fmt::Display, text: &str) {
        self.counters.bad_frames.fetch_add(1, Relaxed);
        let frame: String = text.chars().take(200).collect();
        tracing::debug!(feed = self.name(), %reason, frame, "bad frame skipped");
    }
}

/// Mozilla's roots and ring, whatever provider the rest of the process has chosen.
fn tls(feed: &'static str) -> Result<Connector, FeedError> {
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| FeedError::Tls { feed, detail: error.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Connector::Rustls(Arc::new(config)))
}

#[cfg(test)]
mod tests;
