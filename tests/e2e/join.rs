//! Metrics that join: reference tables as of an event's time, positions of portfolios, and two streams.

use crate::harness::Server;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

const WS: &str = "/api/v1/workspaces/acme";

/// 2024-01-01T00:00:00Z in milliseconds.
const NEW_YEAR: i64 = 1_704_067_200_000;

fn trade(second: i64, symbol: &str, price: f64, qty: f64) -> String {
    format!("{}\n", json!({"ts": NEW_YEAR + second * 1000, "symbol": symbol, "price": price, "qty": qty}))
}

async fn change(server: &Server, table: &str, rows: Value) -> Value {
    server.ok(Method::POST, &format!("{WS}/tables/{table}/rows"), rows).await
}

#[tokio::test]
async fn events_see_the_version_of_a_row_that_was_valid_at_their_time_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let columns = json!([{"name": "symbol", "type": "utf8"}, {"name": "desk", "type": "utf8", "nullable": false}, {"name": "factor", "type": "float64"}]);
    let table = json!({"columns": columns, "primary_key": ["symbol"]});
    let defined = server.ok(Method::PUT, &format!("{WS}/tables/desks"), table).await;
    assert_eq!((&defined["name"], &defined["primary_key"]), (&json!("desks"), &json!(["symbol"])), "{defined}");
    let answer = change(
        &server,
        "desks",
        json!([
            {"symbol": "A", "desk": "tech", "factor": 1},
            {"symbol": "A", "desk": "energy", "factor": 10, "valid_from": "2024-01-01T00:00:30Z"},
            {"symbol": "B", "factor": 1},
            {"symbol": "C", "desk": "tech", "colour": "red"},
        ]),
    )
    .await;
    assert_eq!((answer["accepted"].as_u64(), answer["rejected"].as_u64()), (Some(2), Some(2)), "{answer}");
    assert_eq!((&answer["errors"][0]["code"], &answer["errors"][0]["index"]), (&json!("missing_column"), &json!(2)));

    let sql = "SELECT d.desk, sum(t.qty * d.factor) AS weighted, count(*) AS trades FROM market.trades t \
               JOIN ref.desks d ON t.symbol = d.symbol GROUP BY tumble(t.ts, INTERVAL '1 minute'), d.desk";
    server.metric("by_desk", json!({"sql": sql})).await;
    server
        .ingest("market.trades", &(trade(10, "A", 1.0, 2.0) + &trade(40, "A", 1.0, 3.0) + &trade(41, "Z", 1.0, 1.0)))
        .await;
    server.stop().await;

    let server = Server::start(directory.path()).await;
    server.ingest("market.trades", &(trade(29, "A", 1.0, 4.0) + &trade(100, "A", 1.0, 1.0))).await;
    let rows = server.final_rows("by_desk", 2).await;
    let found: Vec<(&Value, &Value, &Value)> =
        rows.iter().map(|r| (&r["desk"], &r["weighted"], &r["trades"])).collect();
    assert_eq!(
        found,
        [(&json!("energy"), &json!(30.0), &json!(1)), (&json!("tech"), &json!(6.0), &json!(2))],
        "{rows:?}"
    );

    let now = server.get(&format!("{WS}/tables/desks/rows")).await;
    assert_eq!(
        now["rows"],
        json!([{"symbol": "A", "desk": "energy", "factor": 10.0, "valid_from": "2024-01-01T00:00:30.000000Z"}])
    );
    let asked = json!({"sql": "SELECT desk FROM ref.desks"});
    assert_eq!(server.ok(Method::POST, &format!("{WS}/query"), asked).await["rows"].as_array().unwrap().len(), 1);

    // a metric that is defined later computes over the log again, tables as they were
    server.metric("again", json!({"sql": sql, "backfill": "1h"})).await;
    let again = server.final_rows("again", 2).await;
    assert_eq!(again.iter().map(|r| &r["weighted"]).collect::<Vec<_>>(), [&json!(30.0), &json!(6.0)]);

    let (status, problem) = server.call(Method::DELETE, &format!("{WS}/tables/desks"), Value::Null).await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("table_in_use")), "{problem}");
    for metric in ["by_desk", "again"] {
        server.ok(Method::DELETE, &format!("{WS}/metrics/{metric}"), Value::Null).await;
    }
    server.ok(Method::DELETE, &format!("{WS}/tables/desks"), Value::Null).await;
    let (status, problem) = server.call(Method::GET, &format!("{WS}/tables/desks"), Value::Null).await;
    assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("unknown_table")), "{problem}");
    server.stop().await;
}

#[tokio::test]
async fn positions_of_portfolios_are_a_table_that_trades_can_be_joined_with() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.ok(Method::POST, &format!("{WS}/portfolios"), json!({"id": "main"})).await;
    let positions = |held: Value| server.ok(Method::PUT, "/api/v1/workspaces/acme/portfolios/main/positions", held);
    positions(json!([{"symbol": "A", "qty": 10, "cost": 5}, {"symbol": "B", "qty": 1, "cost": 1}])).await;
    let sql = "SELECT p.portfolio, sum(t.price * p.qty) AS value, count(*) AS n FROM market.trades t \
               JOIN ref.positions p ON t.symbol = p.symbol GROUP BY tumble(t.ts, INTERVAL '1 minute'), p.portfolio";
    server.metric("held", json!({"sql": sql})).await;
    server
        .ingest("market.trades", &(trade(1, "A", 7.0, 1.0) + &trade(2, "Z", 7.0, 1.0) + &trade(70, "A", 1.0, 1.0)))
        .await;
    let rows = server.final_rows("held", 1).await;
    assert_eq!((&rows[0]["portfolio"], &rows[0]["value"], &rows[0]["n"]), (&json!("main"), &json!(70.0), &json!(1)));

    positions(json!([{"symbol": "A", "qty": 20, "cost": 5}])).await;
    let mut rows = Value::Null;
    for _ in 0..100 {
        rows = server.get(&format!("{WS}/tables/positions/rows")).await["rows"].clone();
        if rows.as_array().unwrap().len() == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!((rows[0]["qty"].as_f64(), rows.as_array().unwrap().len()), (Some(20.0), 1), "{rows}");
    let own = json!([{"portfolio": "main", "symbol": "X", "qty": 1, "cost": 1}]);
    let (status, problem) = server.call(Method::POST, &format!("{WS}/tables/positions/rows"), own).await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("built_in_table")), "{problem}");
    server.stop().await;
}

#[tokio::test]
async fn two_streams_are_joined_and_go_on_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let sql = "SELECT t.symbol, count(*) AS n, avg(t.price - q.bid) AS above FROM market.trades t JOIN market.quotes q \
               ON t.symbol = q.symbol AND q.ts BETWEEN t.ts - INTERVAL '5 seconds' AND t.ts \
               GROUP BY tumble(t.ts, INTERVAL '1 minute'), t.symbol";
    server.metric("above_bid", json!({"sql": sql})).await;
    let quote = |second: i64, bid: f64| {
        format!("{}\n", json!({"ts": NEW_YEAR + second * 1000, "symbol": "A", "bid": bid, "ask": bid + 1.0}))
    };
    server.ingest("market.quotes", &(quote(10, 100.0) + &quote(20, 110.0))).await;
    server.ingest("market.trades", &trade(12, "A", 101.0, 1.0)).await;
    server.stop().await;
    let server = Server::start(directory.path()).await;
    server.ingest("market.trades", &(trade(21, "A", 113.0, 1.0) + &trade(30, "A", 1.0, 1.0))).await;
    server.ingest("market.trades", &trade(90, "A", 1.0, 1.0)).await;
    server.ingest("market.quotes", &quote(80, 1.0)).await;
    let rows = server.final_rows("above_bid", 1).await;
    assert_eq!((&rows[0]["n"], &rows[0]["above"]), (&json!(2), &json!(2.0)), "{rows:?}");
    server.stop().await;
}
