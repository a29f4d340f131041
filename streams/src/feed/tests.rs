use super::*;
use serde_json::Value;
use std::collections::HashSet;
use std::io::Read;
use std::path::Path;
use tokio::net::TcpListener;

const SECOND: Duration = Duration::from_secs(1);

/// What the exchange does on one connection after the subscription.
#[derive(Clone)]
enum Act {
    /// Sends these frames and drops the connection.
    SendAndDrop(Vec<String>),
    /// Sends these frames and answers pings from then on.
    SendAndStay(Vec<String>),
    /// Accepts and says nothing, not even pong.
    Silence,
}

/// A local exchange that plays one act for each connection, the last one again and again.
async fn exchange(acts: Vec<Act>) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let (asked, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for i in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            let act = acts[i.min(acts.len() - 1)].clone();
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                let Some(Ok(Message::Text(request))) = socket.next().await else { return };
                asked.send(request.to_string()).unwrap();
                let (frames, stay) = match act {
                    Act::Silence => return std::future::pending().await,
                    Act::SendAndDrop(frames) => (frames, false),
                    Act::SendAndStay(frames) => (frames, true),
                };
                for frame in frames {
                    if socket.feed(Message::text(frame)).await.is_err() {
                        return;
                    }
                }
                _ = socket.flush().await;
                while stay && socket.next().await.is_some() {}
            });
        }
    });
    (url, requests)
}

fn config(feed: Feed, symbols: &[&str], url: String) -> FeedConfig {
    let ms = Duration::from_millis(1);
    FeedConfig {
        url: Some(url),
        backoff: Backoff { first: ms, max: 5 * ms, healthy_after: 60 * SECOND },
        ..FeedConfig::new(feed, symbols.iter().map(|symbol| (*symbol).to_owned()).collect(), 7)
    }
}

/// Runs a feed until `done` says so of its counts, and returns its events and counts.
async fn run_until(config: FeedConfig, done: impl Fn(&FeedCounts) -> bool) -> (Vec<Value>, FeedCounts) {
    let (out, mut events) = mpsc::channel(1000);
    let counters = Arc::new(FeedCounters::default());
    let stop = CancellationToken::new();
    let feed = tokio::spawn(run(config, out, counters.clone(), stop.clone()));
    let mut all = Vec::new();
    let deadline = Instant::now() + 60 * SECOND;
    while !done(&counters.read()) {
        assert!(Instant::now() < deadline, "not done: {:?}", counters.read());
        if let Ok(Some(lines)) = timeout(SECOND / 100, events.recv()).await {
            all.extend(lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()));
        }
    }
    stop.cancel();
    feed.await.unwrap().unwrap();
    while let Ok(lines) = events.try_recv() {
        all.extend(lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()));
    }
    (all, counters.read())
}

/// The frames of a recorded session, or `None` where it is not at hand.
fn recorded(name: &str) -> Option<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/market").join(name);
    let Ok(bytes) = std::fs::read(&path) else {
        println!("skipped: {} is not there", path.display());
        return None;
    };
    let mut text = String::new();
    if name.ends_with(".gz") {
        flate2::read::MultiGzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap();
        return Some(text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect());
    }
    zstd::Decoder::new(&bytes[..]).unwrap().read_to_string(&mut text).unwrap();
    // `time: JSON` is received; `URL <-> time` and `URL <- time: JSON` are ours
    let received = text.lines().filter(|line| !line.starts_with("wss://"));
    Some(received.filter_map(|line| Some(line.split_once(": ")?.1.to_owned())).collect())
}

fn is_trade(frame: &str) -> bool {
    frame.contains(r#""e":"trade""#)
}

fn sums(events: &[Value]) -> (f64, f64) {
    let number = |event: &Value, field: &str| event[field].as_f64().unwrap();
    let volume: f64 = events.iter().map(|event| number(event, "qty")).sum();
    let turnover: f64 = events.iter().map(|event| number(event, "price") * number(event, "qty")).sum();
    (turnover / volume, volume)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_sessions_of_binance_have_the_published_trades() {
    let sessions = [
        ("spot_btcusdt", "BTC-USDT", "BTCUSDT", 9_757, 3_735_683_259u64, 3_735_693_015u64, 61707.681617, 212.03315),
        ("usdm_btcusdt", "BTC/USDT", "BTCUSDT", 21_313, 5_266_583_935, 5_266_605_247, 61680.982153, 2429.366),
        ("cm_btcusd_perp", "BTCUSD_PERP", "BTCUSD_PERP", 2_286, 849_714_402, 849_716_687, 61685.615703, 83_241.0),
    ];
    for (name, symbol, native, trades, first, last, vwap, volume) in sessions {
        let Some(frames) = recorded(&format!("binance_frames/{name}_20240808.gz")) else { return };
        let sent = frames.len() as u64;
        let (url, mut requests) = exchange(vec![Act::SendAndStay(frames)]).await;
        let (events, counts) = run_until(config(Feed::Binance, &[symbol], url), |counts| counts.frames == sent).await;
        assert!(requests.recv().await.unwrap().contains(&format!("{}@trade", native.to_lowercase())));
        assert_eq!(counts, FeedCounts { frames: sent, trades, ..FeedCounts::default() }, "{name}");
        assert_eq!(events.len() as u64, trades);
        assert_eq!(events[0]["id"], format!("binance-{native}-{first}"));
        assert_eq!(events[events.len() - 1]["id"], format!("binance-{native}-{last}"));
        assert!(events.iter().all(|event| event["symbol"] == symbol && event["venue"] == "binance"));
        let (found_vwap, found_volume) = sums(&events);
        assert!((found_vwap - vwap).abs() < 1e-5, "{name}: {found_vwap}");
        assert!((found_volume - volume).abs() < 1e-6, "{name}: {found_volume}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconnect_that_overlaps_counts_no_trade_twice() {
    let Some(frames) = recorded("binance_frames/spot_btcusdt_20240808.gz") else { return };
    let frames: Vec<String> = frames.into_iter().filter(|frame| is_trade(frame)).collect();
    let (first, second) = (frames[..5_000].to_vec(), frames[4_200..].to_vec());
    let (url, _requests) = exchange(vec![Act::SendAndDrop(first), Act::SendAndStay(second)]).await;
    let (events, counts) = run_until(config(Feed::Binance, &["BTCUSDT"], url), |counts| counts.trades >= 9_757).await;
    let ids: HashSet<&str> = events.iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), events.len()), (9_757, 9_757));
    // the drop may swallow frames that were sent just before it: then there are fewer repeats, and never a gap
    assert!(counts.repeats <= 800 && counts.gaps == 0, "{counts:?}");
    assert_eq!(counts.reconnects, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removed_frames_are_a_gap_of_exactly_that_size() {
    let Some(frames) = recorded("binance_frames/spot_btcusdt_20240808.gz") else { return };
    let mut frames: Vec<String> = frames.into_iter().filter(|frame| is_trade(frame)).take(1_000).collect();
    let late = frames.remove(700);
    frames.drain(300..317);
    frames.push(late);
    let sent = frames.len() as u64;
    let (url, _requests) = exchange(vec![Act::SendAndStay(frames)]).await;
    let (_, counts) = run_until(config(Feed::Binance, &["BTCUSDT"], url), |counts| counts.frames == sent).await;
    let expected = FeedCounts { frames: sent, trades: sent, gaps: 2, missing: 18, filled: 1, ..FeedCounts::default() };
    assert_eq!(counts, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_session_of_coinbase_has_every_match_once() {
    let Some(frames) = recorded("exchange_frames/COINBASE.ws.28.0.zst") else { return };
    let products = [
        "SKL-USD", "SKL-BTC", "BAND-GBP", "NMR-EUR", "BAND-BTC", "YFI-BTC", "DASH-BTC", "NU-GBP", "CRV-EUR", "SKL-GBP",
    ];
    let sent = frames.len() as u64;
    let (url, mut requests) = exchange(vec![Act::SendAndStay(frames)]).await;
    let (events, counts) = run_until(config(Feed::Coinbase, &products, url), |counts| counts.frames == sent).await;
    assert!(requests.recv().await.unwrap().contains(r#""channels":["matches","heartbeat"]"#));
    // 97 matches and the last match of each of the 10 products before them
    let expected = FeedCounts { frames: sent, trades: 107, ..FeedCounts::default() };
    assert_eq!(counts, expected);
    let ids: HashSet<&str> = events.iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 107);
    assert!(ids.contains("coinbase-SKL-BTC-280232"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_session_of_krakens_first_version_has_every_trade() {
    let Some(frames) = recorded("exchange_frames/KRAKEN.ws.48.0.zst") else { return };
    let sent = frames.len() as u64;
    let (url, mut requests) = exchange(vec![Act::SendAndStay(frames)]).await;
    let config = config(Feed::Kraken, &["XMR-USD", "SC-EUR"], url);
    let (events, counts) = run_until(config, |counts| counts.frames == sent).await;
    assert!(requests.recv().await.unwrap().contains(r#""pair":["XMR/USD","SC/EUR"]"#));
    let expected = FeedCounts { frames: sent, trades: 10, ..FeedCounts::default() };
    assert_eq!(counts, expected);
    assert_eq!(events[0]["ts"], 1_618_678_142_557_535i64);
    assert_eq!((&events[0]["symbol"], &events[0]["side"]), (&Value::from("XMR-USD"), &Value::from("sell")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_frames_are_counted_and_skipped() {
    let trade =
        |id: u64| format!(r#"{{"e":"trade","s":"BTCUSDT","t":{id},"p":"1.5","q":"2","T":1723161255342,"m":false}}"#);
    let frames = vec![
        trade(1),
        "{".to_owned(),
        trade(2).replace("1.5", "NaN"),
        trade(2).replace("BTCUSDT", "ETHUSDT"),
        r#"{"error":{"code":2,"msg":"Invalid request"}}"#.to_owned(),
        trade(2),
    ];
    let (url, _requests) = exchange(vec![Act::SendAndStay(frames)]).await;
    let (events, counts) = run_until(config(Feed::Binance, &["BTCUSDT"], url), |counts| counts.frames == 6).await;
    assert_eq!(events.len(), 2);
    let expected = FeedCounts { frames: 6, trades: 2, bad_frames: 3, refusals: 1, ..FeedCounts::default() };
    assert_eq!(counts, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_connection_is_given_up_and_a_quiet_one_that_answers_pings_is_kept() {
    let quiet = Duration::from_millis(200);
    let (url, mut requests) = exchange(vec![Act::Silence, Act::SendAndStay(Vec::new())]).await;
    let config = FeedConfig { idle_timeout: quiet, ..config(Feed::Binance, &["BTCUSDT"], url) };
    let (out, _events) = mpsc::channel(1);
    let (counters, stop) = (Arc::new(FeedCounters::default()), CancellationToken::new());
    let feed = tokio::spawn(run(config, out, counters.clone(), stop.clone()));
    for connection in ["silent", "quiet"] {
        assert!(timeout(30 * SECOND, requests.recv()).await.is_ok(), "no subscription on the {connection} connection");
    }
    // A third subscription would mean that the quiet connection was given up as well.
    assert!(timeout(5 * quiet, requests.recv()).await.is_err());
    assert_eq!(counters.read().reconnects, 1);
    stop.cancel();
    feed.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_feed_that_cannot_start_says_why() {
    let check = async |symbols: &[&str], url: &str, message: &str| {
        let (out, _events) = mpsc::channel(1);
        let config = config(Feed::Kraken, symbols, url.to_owned());
        let error = run(config, out, Arc::default(), CancellationToken::new()).await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check(&[], "ws://localhost", "feed kraken has no symbols").await;
    check(&["BTC-USD"], "http://localhost", "`http://localhost` is no ws:// or wss:// address").await;
    check(&["BTC-USD"], "nowhere", "is no ws:// or wss:// address").await;
}
