//! Metrics over metrics, from an event to a live row, in history, and on after a restart.

use crate::harness::Server;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

const BARS: &str = "SELECT symbol, max(price) AS high, min(price) AS low, sum(price * qty) / sum(qty) AS close \
                    FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";

const TREND: &str = "SELECT symbol, close, lag(close) OVER w AS before, ema(close, 2) OVER w AS ema, \
                     avg(close) OVER (PARTITION BY symbol ORDER BY window_start ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) AS sma \
                     FROM metrics.bars_1m WINDOW w AS (PARTITION BY symbol ORDER BY window_start)";

const LONG: &str = "SELECT symbol, max(high) AS high, min(low) AS low FROM metrics.bars_1m GROUP BY tumble(ts, INTERVAL '5 minutes'), symbol";

/// 2024-01-01T00:00:00Z in milliseconds.
const NEW_YEAR: i64 = 1_704_067_200_000;

/// One trade a minute, at its price.
fn minutes(from: i64, prices: &[f64]) -> String {
    let trade = |(minute, price): (i64, &f64)| {
        json!({"ts": NEW_YEAR + minute * 60_000, "symbol": "A", "price": price, "qty": 1}).to_string() + "\n"
    };
    (from..).zip(prices).map(trade).collect()
}

fn column(rows: &[Value], name: &str) -> Vec<Value> {
    rows.iter().map(|row| row[name].clone()).collect()
}

const METRICS: &str = "/api/v1/workspaces/acme/metrics";

#[tokio::test]
async fn a_chain_of_metrics_is_live_in_history_and_goes_on_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.metric("bars_1m", json!({"sql": BARS, "max_delay": "0s"})).await;
    server.metric("trend", json!({"sql": TREND})).await;
    server.metric("long", json!({"sql": LONG})).await;
    let rule = json!({"metric": "trend", "condition": "close > before * 2"});
    server.ok(Method::PUT, "/api/v1/workspaces/acme/alert-rules/jump", rule).await;
    let mut socket = server.socket().await;
    socket.subscribe("metrics/trend", Value::Null).await;
    server.ingest("market.trades", &minutes(0, &[10.0, 20.0, 60.0, 60.0])).await;
    let is_row = |frame: &Value, wanted: f64| {
        let ops = frame["event"]["delta"].as_array();
        ops.is_some_and(|ops| ops.iter().any(|op| op["path"] == "/rows/A" && op["value"]["close"] == wanted))
    };
    socket.until(|frame| is_row(frame, 60.0)).await;
    let rows = server.final_rows("trend", 3).await;
    assert_eq!(column(&rows, "close"), [10.0, 20.0, 60.0]);
    assert_eq!(column(&rows, "before"), [Value::Null, json!(10.0), json!(20.0)]);
    assert_eq!(column(&rows, "sma"), [10.0, 15.0, 40.0]);
    assert_eq!(column(&rows, "ema"), [Value::Null, json!(15.0), json!(45.0)]);
    // an alert is listed once it is stored
    for attempt in 0.. {
        let alerts = server.get("/api/v1/workspaces/acme/alerts").await;
        if alerts["alerts"].as_array().unwrap().len() == 1 {
            break;
        }
        assert!(attempt < 200, "{alerts}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // the open window of the longer metric is there too
    let open = server.get(&format!("{METRICS}/long/rows?final=false")).await;
    assert_eq!(open["rows"][0]["high"], 60.0, "{open}");
    server.stop().await;

    let server = Server::start(directory.path()).await;
    server.ingest("market.trades", &minutes(4, &[20.0, 20.0, 20.0])).await;
    let rows = server.final_rows("trend", 6).await;
    assert_eq!(column(&rows, "close"), [10.0, 20.0, 60.0, 60.0, 20.0, 20.0]);
    assert_eq!(column(&rows, "sma"), [10.0, 15.0, 40.0, 60.0, 40.0, 20.0]);
    let rows = server.final_rows("long", 1).await;
    assert_eq!((&rows[0]["high"], &rows[0]["low"]), (&json!(60.0), &json!(10.0)));
    assert_eq!(rows[0]["window_start"], "2024-01-01T00:00:00.000000Z");

    // the same functions in a question asked once, over the rows of history
    let asked = json!({"sql": "SELECT ema(close, 2) OVER (PARTITION BY symbol ORDER BY window_start) AS ema FROM metrics.bars_1m WHERE final ORDER BY window_start"});
    let answer = server.ok(Method::POST, "/api/v1/workspaces/acme/query", asked).await;
    let live = column(&server.final_rows("trend", 6).await, "ema");
    let once: Vec<Value> = answer["rows"].as_array().unwrap().iter().map(|row| row[0].clone()).collect();
    assert_eq!(once, live);
    server.stop().await;
}

#[tokio::test]
async fn a_metric_over_another_takes_in_its_history_when_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.metric("bars_1m", json!({"sql": BARS, "max_delay": "0s"})).await;
    server.ingest("market.trades", &minutes(0, &[10.0, 20.0, 60.0, 60.0])).await;
    server.final_rows("bars_1m", 3).await;
    server.metric("whole", json!({"sql": TREND, "backfill": "1d"})).await;
    server.metric("part", json!({"sql": TREND, "backfill": "2m"})).await;
    server.metric("none", json!({"sql": TREND})).await;
    assert_eq!(column(&server.final_rows("whole", 3).await, "sma"), [10.0, 15.0, 40.0]);
    assert_eq!(column(&server.final_rows("part", 2).await, "sma"), [20.0, 40.0]);
    server.ingest("market.trades", &minutes(4, &[20.0])).await;
    assert_eq!(column(&server.final_rows("whole", 4).await, "sma"), [10.0, 15.0, 40.0, 60.0]);
    assert_eq!(column(&server.final_rows("none", 1).await, "sma"), [60.0]);
    server.stop().await;
    let server = Server::start(directory.path()).await;
    server.ingest("market.trades", &minutes(5, &[20.0])).await;
    assert_eq!(column(&server.final_rows("whole", 5).await, "sma"), [10.0, 15.0, 40.0, 60.0, 40.0]);
    assert_eq!(column(&server.final_rows("none", 2).await, "sma"), [60.0, 40.0]);
    server.stop().await;
}

#[tokio::test]
async fn a_chain_cannot_be_broken_or_closed_to_a_circle() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let bars = json!({"sql": BARS, "max_delay": "0s"});
    server.metric("bars_1m", bars.clone()).await;
    server.metric("trend", json!({"sql": TREND})).await;
    let refused = async |method: Method, path: &str, body: Value, status: StatusCode, code: &str, word: &str| {
        let (found, problem) = server.call(method, path, body).await;
        assert_eq!((found, problem["code"].as_str()), (status, Some(code)), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(word), "{problem}");
    };
    let bars_at = format!("{METRICS}/bars_1m");
    refused(Method::DELETE, &bars_at, Value::Null, StatusCode::CONFLICT, "metric_in_use", "`trend`").await;
    let other = json!({"sql": BARS.replace("1 minute", "2 minutes")});
    refused(Method::PUT, &bars_at, other, StatusCode::CONFLICT, "metric_in_use", "`trend`").await;
    let circle = json!({"sql": "SELECT symbol, close AS high, sma AS low, ema AS close FROM metrics.trend"});
    refused(
        Method::PUT,
        &bars_at,
        circle,
        StatusCode::CONFLICT,
        "metric_cycle",
        "`bars_1m` reads `trend` reads `bars_1m`",
    )
    .await;
    let late = json!({"sql": TREND, "allowed_lateness": "1m"});
    refused(
        Method::PUT,
        &format!("{METRICS}/late"),
        late,
        StatusCode::BAD_REQUEST,
        "bad_definition",
        "allowed_lateness",
    )
    .await;
    let unknown = json!({"sql": "SELECT symbol FROM metrics.nothing"});
    refused(Method::PUT, &format!("{METRICS}/x"), unknown, StatusCode::BAD_REQUEST, "bad_sql", "`nothing`").await;
    let stream = json!({"columns": [{"name": "x", "type": "int64"}]});
    let path = "/api/v1/workspaces/acme/streams/metrics.bars";
    refused(Method::PUT, path, stream, StatusCode::CONFLICT, "reserved_stream", "metric `bars`").await;
    // the same definition again changes nothing; what nobody reads can go
    server.metric("bars_1m", bars).await;
    server.ok(Method::DELETE, &format!("{METRICS}/trend"), Value::Null).await;
    server.ok(Method::DELETE, &bars_at, Value::Null).await;
    server.stop().await;
}
