//! The way of an event, from HTTP to a live page and on after a restart.

use crate::harness::Server;
use flate2::Compression;
use flate2::write::GzEncoder;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::io::Write;

const VWAP: &str = "SELECT symbol, sum(price * qty) / sum(qty) AS vwap, count(*) AS trades, sum(qty) AS volume \
                    FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";

/// 2024-01-01T00:00:00Z in milliseconds.
const NEW_YEAR: i64 = 1_704_067_200_000;

fn trade(second: i64, symbol: &str, price: f64, qty: f64) -> String {
    format!("{}\n", json!({"ts": NEW_YEAR + second * 1000, "symbol": symbol, "price": price, "qty": qty}))
}

#[tokio::test]
async fn a_posted_event_becomes_a_live_row_a_final_row_and_a_row_of_sql() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.metric("vwap_1m", json!({"sql": VWAP, "emit": "20ms"})).await;
    let mut socket = server.socket().await;
    let answer = socket.subscribe("metrics/vwap_1m", Value::Null).await;
    assert!(answer["epoch"].is_string() || answer["epoch"].is_number(), "{answer}");
    let snapshot = socket.until(|frame| frame["event"]["type"] == "STATE_SNAPSHOT").await;
    assert_eq!(snapshot["event"]["snapshot"]["rows"], json!({}));

    let answer = server.ingest("market.trades", &(trade(1, "A", 100.0, 2.0) + &trade(2, "A", 110.0, 2.0))).await;
    assert_eq!((answer["accepted"].as_u64(), answer["rejected"].as_u64()), (Some(2), Some(0)), "{answer}");
    let is_row = |frame: &Value, wanted: &dyn Fn(&Value) -> bool| {
        frame["event"]["delta"]
            .as_array()
            .is_some_and(|ops| ops.iter().any(|op| op["path"] == "/rows/A" && wanted(&op["value"])))
    };
    let live = socket.until(|frame| is_row(frame, &|row| row["trades"] == 2)).await;
    let row = &live["event"]["delta"].as_array().unwrap().last().unwrap()["value"];
    assert_eq!(
        (&row["vwap"], &row["final"], &row["window_start"]),
        (&json!(105.0), &json!(false), &json!("2024-01-01T00:00:00.000000Z"))
    );

    // event time passes the end of the minute and its 5 s of delay
    server.ingest("market.trades", &trade(66, "B", 1.0, 1.0)).await;
    socket.until(|frame| is_row(frame, &|row| row["final"] == true && row["vwap"] == 105.0)).await;
    let rows = server.final_rows("vwap_1m", 1).await;
    assert_eq!(rows[0]["window_end"], "2024-01-01T00:01:00.000000Z");
    assert_eq!((&rows[0]["symbol"], &rows[0]["volume"], &rows[0]["revision"]), (&json!("A"), &json!(4.0), &json!(0)));
    let all = server.get("/api/v1/workspaces/acme/metrics/vwap_1m/rows").await;
    assert_eq!(all["rows"].as_array().unwrap().len(), 2, "one final, one provisional: {all}");

    let asked = json!({"sql": "SELECT symbol, count(*) AS n FROM market.trades WHERE price > $1 GROUP BY symbol ORDER BY symbol", "params": [0]});
    let answer = server.ok(Method::POST, "/api/v1/workspaces/acme/query", asked).await;
    assert_eq!(answer["rows"].as_array().unwrap().len(), 2, "{answer}");
    let over_metric = json!({"sql": "SELECT symbol, vwap FROM vwap_1m WHERE final"});
    let answer = server.ok(Method::POST, "/api/v1/workspaces/acme/query", over_metric).await;
    assert_eq!(answer["rows"].as_array().unwrap().len(), 1, "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn gzip_json_and_repeats_are_taken_and_each_event_counts_once() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let path = "/api/v1/workspaces/acme/streams/market.trades/events";
    let event = |id: &str| json!({"id": id, "symbol": "A", "price": 1, "qty": 1});
    let answer = server.ok(Method::POST, path, json!([event("1"), event("2"), event("1")])).await;
    assert_eq!((answer["accepted"].as_u64(), answer["duplicates"].as_u64()), (Some(2), Some(1)), "{answer}");
    let answer = server.ok(Method::POST, path, event("2")).await;
    assert_eq!((answer["accepted"].as_u64(), answer["duplicates"].as_u64()), (Some(0), Some(1)), "{answer}");

    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(format!("{}\n{}\n", event("3"), event("1")).as_bytes()).unwrap();
    let request = reqwest::Client::new()
        .post(format!("{}{path}", server.url))
        .bearer_auth(&server.token)
        .header("content-type", "application/x-ndjson")
        .header("content-encoding", "gzip")
        .body(gzip.finish().unwrap());
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!((answer["accepted"].as_u64(), answer["duplicates"].as_u64()), (Some(1), Some(1)), "{answer}");

    // also after a restart a repeat is one
    server.stop().await;
    let server = Server::start(directory.path()).await;
    let answer = server.ok(Method::POST, path, json!([event("3"), event("4")])).await;
    assert_eq!((answer["accepted"].as_u64(), answer["duplicates"].as_u64()), (Some(1), Some(1)), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_restart_continues_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.metric("vwap_1m", json!({"sql": VWAP})).await;
    server.ingest("market.trades", &(trade(1, "A", 100.0, 1.0) + &trade(61, "A", 200.0, 1.0))).await;
    server.stop().await;

    let server = Server::start(directory.path()).await;
    server
        .ingest(
            "market.trades",
            &(trade(2, "A", 102.0, 1.0) + &trade(62, "A", 202.0, 1.0) + &trade(200, "A", 1.0, 1.0)),
        )
        .await;
    let rows = server.final_rows("vwap_1m", 2).await;
    let vwaps: Vec<f64> = rows.iter().map(|row| row["vwap"].as_f64().unwrap()).collect();
    assert_eq!(vwaps, [101.0, 201.0]);
    server.stop().await;
}

#[tokio::test]
async fn a_portfolio_is_valued_with_every_trade() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server
        .ok(
            Method::POST,
            "/api/v1/workspaces/acme/portfolios",
            json!({"id": "fund", "name": "Fund", "currency": "USD"}),
        )
        .await;
    let positions = json!([
        {"symbol": "A", "qty": 10, "cost": 90, "sector": "tech"},
        {"symbol": "B", "qty": 5, "cost": 40, "sector": "energy"}
    ]);
    server.ok(Method::PUT, "/api/v1/workspaces/acme/portfolios/fund/positions", positions).await;
    let mut socket = server.socket().await;
    socket.subscribe("portfolio/fund", Value::Null).await;
    socket.until(|frame| frame["event"]["type"] == "STATE_SNAPSHOT").await;
    server.ingest("market.trades", &(trade(1, "A", 100.0, 1.0) + &trade(1, "B", 200.0, 1.0))).await;
    socket.until(|frame| frame["event"]["type"] == "STATE_DELTA").await;
    let summary = server.get("/api/v1/workspaces/acme/portfolios/fund/summary").await;
    assert_eq!(
        (&summary["value"], &summary["cost"], &summary["unrealised"]),
        (&json!(2000.0), &json!(1100.0), &json!(900.0))
    );
    assert_eq!(summary["allocation"]["sector"], json!({"energy": 0.5, "tech": 0.5}));
    server.stop().await;
}

#[tokio::test]
async fn an_alert_fires_is_acknowledged_resolves_and_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.metric("vwap_1m", json!({"sql": VWAP, "emit": "20ms"})).await;
    let rule = json!({"metric": "vwap_1m", "condition": "vwap > 100", "severity": "critical"});
    server.ok(Method::PUT, "/api/v1/workspaces/acme/alert-rules/dear", rule).await;
    let mut socket = server.socket().await;
    socket.subscribe("alerts", Value::Null).await;
    server.ingest("market.trades", &trade(1, "A", 150.0, 1.0)).await;
    let fired = socket.until(|frame| frame["event"]["name"] == "alert.firing").await;
    let alert = &fired["event"]["value"]["alert"];
    assert_eq!(
        (&alert["rule"], &alert["severity"], &alert["labels"]),
        (&json!("dear"), &json!("critical"), &json!({"symbol": "A"}))
    );
    let id = alert["id"].as_str().unwrap().to_owned();

    // the store has it within a commit
    let mut acked = Value::Null;
    for _ in 0..100 {
        let (status, answer) =
            server.call(Method::POST, &format!("/api/v1/workspaces/acme/alerts/{id}/ack"), json!({})).await;
        if status.is_success() {
            acked = answer;
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(acked["acked_at"].is_string(), "{acked}");
    server.ingest("market.trades", &trade(2, "A", 10.0, 9.0)).await;
    let resolved = socket.until(|frame| frame["event"]["name"] == "alert.resolved").await;
    let alert = &resolved["event"]["value"]["alert"];
    assert_eq!((&alert["acked_at"], &alert["acked_by"]), (&acked["acked_at"], &acked["acked_by"]));
    server.stop().await;

    let server = Server::start(directory.path()).await;
    let kept = server.get("/api/v1/workspaces/acme/alerts").await;
    let kept = kept["alerts"].as_array().unwrap();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!((&kept[0]["id"], &kept[0]["state"]), (&json!(id), &json!("resolved")));
    assert!(kept[0]["acked_by"].is_string());
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_comes_back_gets_what_it_missed_and_nothing_twice() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut socket = server.socket().await;
    socket.subscribe("streams/market.trades", Value::Null).await;
    server.ingest("market.trades", &trade(1, "A", 1.0, 1.0)).await;
    let seen = socket.until(|frame| frame["event"]["name"] == "stream.events").await;
    drop(socket);
    for second in 2..5 {
        server.ingest("market.trades", &trade(second, "A", second as f64, 1.0)).await;
    }
    let mut socket = server.socket().await;
    let since = json!({"epoch": seen["epoch"], "offset": seen["offset"]});
    let answer = socket.subscribe("streams/market.trades", since).await;
    assert_eq!(answer["recovered"], true, "{answer}");
    let mut prices = Vec::new();
    while prices.len() < 3 {
        let frame = socket.until(|frame| frame["event"]["name"] == "stream.events").await;
        prices.extend(
            frame["event"]["value"]["events"].as_array().unwrap().iter().map(|event| event["price"].as_f64().unwrap()),
        );
    }
    assert_eq!(prices, [2.0, 3.0, 4.0]);
    server.stop().await;
}

#[tokio::test]
async fn a_draining_server_tells_its_clients_to_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut socket = server.socket().await;
    let stopped = tokio::spawn(server.stop());
    let close = socket.until(|frame| frame["close"].is_number()).await;
    assert_eq!(close["close"], 1012, "{close}");
    stopped.await.unwrap();
}

#[tokio::test]
async fn what_is_open_to_all_answers_without_a_token() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    for (path, holds) in [
        ("/health", ""),
        ("/ready", "store"),
        ("/metrics", "tidewatch"),
        ("/openapi.json", "/api/v1/me"),
        ("/docs", "html"),
    ] {
        let (status, body) = server.send(Method::GET, path, "application/json", "", None).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        assert!(body.to_string().contains(holds), "{path}: {body}");
    }
    server.stop().await;
}
