//! Metrics that hold more state than they may: what clients are told, and what goes on.

use crate::harness::Server;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

const WS: &str = "/api/v1/workspaces/acme";

/// 2024-01-01T00:00:00Z in milliseconds.
const NEW_YEAR: i64 = 1_704_067_200_000;

fn trades(second: i64, symbols: std::ops::Range<usize>) -> String {
    let line = |n| json!({"ts": NEW_YEAR + second * 1000, "symbol": format!("S{n}"), "price": 1.0, "qty": 1.0});
    symbols.map(|n| format!("{}\n", line(n))).collect()
}

async fn stopped(server: &Server, metric: &str) -> Value {
    let metrics = server.get(&format!("{WS}/metrics")).await;
    let all = metrics["metrics"].as_array().unwrap();
    all.iter().find(|shown| shown["name"] == metric).unwrap()["failure_code"].clone()
}

#[tokio::test]
async fn a_metric_over_its_bound_says_so_on_its_channel_and_runs_again_when_it_is_defined_again() {
    let directory = tempfile::tempdir().unwrap();
    let bounded = |groups| move |config: &mut server::Config| config.limits.metric_state_groups = groups;
    let server = Server::with_workspace_and(directory.path(), bounded(10)).await;
    let each = json!({"sql": "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol"});
    let all = json!({"sql": "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')"});
    server.metric("each", each.clone()).await;
    server.metric("all", all).await;
    let mut socket = server.socket().await;
    socket.subscribe("metrics/each", Value::Null).await;
    server.ingest("market.trades", &trades(1, 0..11)).await;
    let told = socket.until(|frame| frame["event"]["name"] == "metric.failed").await;
    let value = &told["event"]["value"];
    assert_eq!((&value["metric"], &value["code"]), (&json!("each"), &json!("state_limit")), "{told}");
    assert!(value["reason"].as_str().unwrap().contains("limits.metric_state_groups"), "{told}");
    assert_eq!(stopped(&server, "each").await, "state_limit");
    // and to whoever comes later
    let mut late = server.socket().await;
    late.subscribe("metrics/each", Value::Null).await;
    late.until(|frame| frame["event"]["name"] == "metric.failed").await;

    server.ingest("market.trades", &trades(90, 0..1)).await;
    assert_eq!(server.final_rows("all", 1).await[0]["n"], 11);
    assert_eq!(stopped(&server, "all").await, Value::Null);
    server.stop().await;

    // a restart changes nothing; room and the same definition do
    let server = Server::start_with(directory.path(), bounded(20)).await;
    assert_eq!(stopped(&server, "each").await, "state_limit");
    let mut late = server.socket().await;
    late.subscribe("metrics/each", Value::Null).await;
    late.until(|frame| frame["event"]["name"] == "metric.failed").await;
    server.metric("each", each).await;
    assert_eq!(stopped(&server, "each").await, Value::Null);
    server.ingest("market.trades", &(trades(100, 0..12) + &trades(200, 0..1))).await;
    assert_eq!(server.final_rows("each", 12).await.len(), 12);
    server.stop().await;
}

#[tokio::test]
async fn a_tier_bounds_connections_and_how_long_rows_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace_and(directory.path(), |config| {
        let small = gateway::Tier { connections: Some(2), retain_days: Some(2), ..gateway::Tier::default() };
        config.limits.tiers.insert("small".to_owned(), small);
    })
    .await;
    server.ok(Method::PATCH, WS, json!({"tier": "small"})).await;
    let mut sockets = Vec::new();
    for _ in 0..2 {
        let mut socket = server.socket().await;
        socket.subscribe("alerts", Value::Null).await;
        sockets.push(socket);
    }
    let mut third = server.socket().await;
    third.send(json!({"type": "subscribe", "workspace": "acme", "channel": "alerts"})).await;
    let refused = third.until(|frame| frame["type"] == "error").await;
    assert_eq!(refused["code"], "too_many_connections", "{refused}");
    assert!(refused["detail"].as_str().unwrap().contains("connections = 2 of its tier"), "{refused}");
    let usage = server.get(&format!("{WS}/usage")).await;
    assert_eq!(
        (&usage["connections"], &usage["retention"]),
        (&json!({"used": 2, "limit": 2}), &json!({"limit_days": 2}))
    );

    // rows of another workspace stay
    server.ok(Method::POST, "/api/v1/workspaces", json!({"id": "large", "name": "Large"})).await;
    let hourly = json!({"sql": "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 hour')"});
    let events: Vec<Value> =
        (0..5).map(|n| json!({"ts": NEW_YEAR + n * 30 * 3_600_000, "symbol": "A", "price": 1.0, "qty": 1.0})).collect();
    for (workspace, kept) in [("large", 4), ("acme", 1)] {
        let path = format!("/api/v1/workspaces/{workspace}");
        server.ok(Method::PUT, &format!("{path}/metrics/hourly"), hourly.clone()).await;
        server.ok(Method::POST, &format!("{path}/streams/market.trades/events"), json!(events)).await;
        let mut ends = Vec::new();
        for _ in 0..200 {
            let answer = server.get(&format!("{path}/metrics/hourly/rows")).await;
            let rows = answer["rows"].as_array().unwrap();
            let closed = rows.iter().filter(|row| row["final"] == true);
            ends = closed.map(|row| row["window_end"].as_str().unwrap().to_owned()).collect();
            if ends.len() == kept && ends.iter().max().unwrap() == "2024-01-04T19:00:00.000000Z" {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        assert_eq!(ends.len(), kept, "{workspace}: {ends:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_plan_of_a_metric_tells_its_panes_its_state_and_its_cost() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let sql = "SELECT t.symbol, c.sector, count(*) AS n FROM market.trades t LEFT JOIN ref.companies c ON t.symbol = c.symbol \
               GROUP BY hop(t.ts, INTERVAL '10 seconds', INTERVAL '1 minute'), t.symbol, c.sector";
    server.metric("sliding", json!({"sql": sql})).await;
    server.metric("above", json!({"sql": "SELECT symbol, n FROM metrics.sliding WHERE n > 1"})).await;
    server.ok(Method::POST, &format!("{WS}/tables/companies/rows"), json!([{"symbol": "S1", "sector": "tech"}])).await;
    server.ingest("market.trades", &(trades(1, 0..5) + &trades(12, 0..5))).await;
    let mut plan = Value::Null;
    for _ in 0..100 {
        plan = server.get(&format!("{WS}/metrics/sliding/plan")).await;
        if plan["cost"]["batches"] == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!((&plan["metric"], &plan["reads"]), (&json!("sliding"), &json!(["market.trades"])), "{plan}");
    assert_eq!(plan["read_by"], json!(["above"]));
    assert_eq!(
        plan["panes"],
        json!({"kind": "panes", "held": 2, "width": "10s", "per_window": 6, "windows_per_pane": 6})
    );
    assert_eq!((&plan["state"]["groups"], &plan["state"]["waiting_events"]), (&json!(5), &json!(0)), "{plan}");
    assert!(
        plan["state"]["bytes"].as_u64().unwrap() > 100 && plan["state"]["limit"]["bytes"].as_u64().unwrap() > 1 << 20
    );
    assert_eq!(
        (&plan["shared"]["tables"][0]["name"], &plan["shared"]["tables"][0]["metrics"]),
        (&json!("ref.companies"), &json!(1))
    );
    assert!(plan["shared"]["tables"][0]["bytes"].as_u64().unwrap() > 0, "{plan}");
    assert!(plan["cost"]["micros_per_batch"].as_f64().unwrap() > 0.0, "{plan}");
    assert_eq!(server.get(&format!("{WS}/metrics/above/plan")).await["panes"], Value::Null);
    let (status, problem) = server.call(Method::GET, &format!("{WS}/metrics/nothing/plan"), Value::Null).await;
    assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("unknown_metric")), "{problem}");
    server.stop().await;
}
