//! Bad input of every kind: each has its problem and its code, the good events beside it are kept, the process stays up.

use crate::harness::{PASSWORD, Server};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const EVENTS: &str = "/api/v1/workspaces/acme/streams/market.trades/events";

#[tokio::test]
async fn each_bad_event_is_named_with_its_code_and_the_good_ones_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let good = r#"{"symbol":"A","price":1,"qty":1}"#;
    let bad = [
        (r#"{"symbol":"A","price":1,"#, "malformed_json"),
        (r#"{"symbol":"A","price":"one","qty":1}"#, "wrong_type"),
        (r#"{"symbol":"A","qty":1}"#, "missing_column"),
        (r#"{"symbol":"A","price":NaN,"qty":1}"#, "not_finite"),
        (r#"{"symbol":"A","price":1e999,"qty":1}"#, "not_finite"),
        (r#"{"symbol":"A","price":1,"qty":1,"ts":345600000}"#, "ts_out_of_range"),
        (r#"{"symbol":"A","price":1,"qty":1,"ts":"9999-01-01T00:00:00Z"}"#, "ts_out_of_range"),
    ];
    let mut lines = String::new();
    for (line, _) in &bad {
        lines.push_str(&format!("{good}\n{line}\n"));
    }
    lines.push_str(&format!(r#"{{"symbol":"A","price":1,"qty":1,"note":"{}"}}"#, "x".repeat(10 << 20)));
    let answer = server.ingest("market.trades", &lines).await;
    assert_eq!((answer["accepted"].as_u64(), answer["rejected"].as_u64()), (Some(7), Some(8)), "{answer}");
    let errors: Vec<(u64, &str)> = answer["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| (error["index"].as_u64().unwrap(), error["code"].as_str().unwrap()))
        .collect();
    let mut wanted: Vec<(u64, &str)> =
        bad.iter().enumerate().map(|(at, (_, code))| (2 * at as u64 + 1, *code)).collect();
    wanted.push((14, "event_too_large"));
    assert_eq!(errors, wanted);
    let count = server
        .ok(Method::POST, "/api/v1/workspaces/acme/query", json!({"sql": "SELECT count(*) AS n FROM market.trades"}))
        .await;
    assert!(count["rows"].to_string().contains('7'), "{count}");
    server.stop().await;
}

/// The call is refused with this status and code, as a problem.
async fn refused(server: &Server, method: Method, path: &str, body: Value, status: u16, code: &str) -> Value {
    let (found, problem) = server.call(method.clone(), path, body).await;
    assert_eq!((found.as_u16(), problem["code"].as_str()), (status, Some(code)), "{method} {path}: {problem}");
    assert_eq!(problem["status"].as_u64(), Some(u64::from(status)), "{problem}");
    assert!(
        problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()) && problem["title"].is_string(),
        "{problem}"
    );
    problem
}

#[tokio::test]
async fn what_does_not_exist_or_cannot_be_read_is_a_problem_with_a_code() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let ws = "/api/v1/workspaces/acme";
    let event = json!({"symbol": "A", "price": 1, "qty": 1});
    refused(
        &server,
        Method::POST,
        &format!("{ws}/streams/market.nothing/events"),
        event.clone(),
        404,
        "unknown_stream",
    )
    .await;
    refused(&server, Method::GET, &format!("{ws}/metrics/nothing/rows"), Value::Null, 404, "unknown_metric").await;
    refused(&server, Method::GET, &format!("{ws}/portfolios/nothing/summary"), Value::Null, 404, "unknown_portfolio")
        .await;
    let (status, problem) = server.send(Method::POST, EVENTS, "text/plain", "x", Some(&server.token)).await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::UNSUPPORTED_MEDIA_TYPE, &json!("unsupported_media_type")),
        "{problem}"
    );
    let (status, problem) = server.send(Method::POST, EVENTS, "application/json", "{", Some(&server.token)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{problem}");
    let (status, problem) =
        server.send(Method::GET, "/api/v1/nothing", "application/json", "", Some(&server.token)).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{problem}");
    assert!(problem["code"].is_string(), "{problem}");
    server.stop().await;
}

#[tokio::test]
async fn bad_sql_is_refused_with_line_and_column() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let metric = "/api/v1/workspaces/acme/metrics/m";
    let sql = "SELECT symbol,\n  sum(prize) AS x FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let problem = refused(&server, Method::PUT, metric, json!({"sql": sql}), 400, "bad_sql").await;
    assert!(problem["detail"].as_str().unwrap().contains("line 2, column 7"), "{problem}");
    let sql = "SELECT count(*) FROM market.trades GROUP BY symbol";
    let problem = refused(&server, Method::PUT, metric, json!({"sql": sql}), 400, "bad_sql").await;
    assert!(problem["detail"].as_str().unwrap().contains("tumble(ts, INTERVAL '1 minute')"), "{problem}");
    let query = "/api/v1/workspaces/acme/query";
    for sql in [
        "SELEC 1",
        "DROP TABLE market.trades",
        "COPY market.trades TO '/tmp/x'",
        "SELECT 1; SELECT 2",
        "SET x = 1",
        "CREATE EXTERNAL TABLE t STORED AS CSV LOCATION '/etc/passwd'",
    ] {
        refused(&server, Method::POST, query, json!({"sql": sql}), 400, "bad_sql").await;
    }
    refused(
        &server,
        Method::POST,
        query,
        json!({"sql": "SELECT * FROM information_schema.tables"}),
        404,
        "unknown_table",
    )
    .await;
    server.stop().await;
}

#[tokio::test]
async fn a_wrong_token_and_a_foreign_workspace_show_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let (status, problem) = server.send(Method::GET, "/api/v1/me", "application/json", "", None).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "{problem}");
    for token in ["nonsense", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.", &format!("{}x", server.token)] {
        let (status, problem) = server.send(Method::GET, "/api/v1/me", "application/json", "", Some(token)).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{problem}");
    }
    server.ok(Method::POST, "/api/v1/users", json!({"email": "other@example.com", "password": PASSWORD})).await;
    let other = server.login("other@example.com", PASSWORD).await;
    let (foreign, body) =
        server.send(Method::GET, "/api/v1/workspaces/acme/metrics", "application/json", "", Some(&other)).await;
    let (missing, nobody) =
        server.send(Method::GET, "/api/v1/workspaces/nowhere/metrics", "application/json", "", Some(&other)).await;
    assert_eq!((foreign, missing), (StatusCode::NOT_FOUND, StatusCode::NOT_FOUND));
    assert_eq!((&body["code"], &nobody["code"]), (&json!("workspace_not_found"), &json!("workspace_not_found")));
    let (status, _) = server
        .send(Method::POST, EVENTS, "application/json", r#"{"symbol":"A","price":1,"qty":1}"#, Some(&other))
        .await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    server.stop().await;
}

/// What a server answers to a client that sends all of a large body before it reads anything.
pub async fn answer_to_large_body(server: &Server, token: &str) -> String {
    const SIZE: usize = 30_000_000;
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    let head = format!("authorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {SIZE}");
    stream.write_all(format!("POST {EVENTS} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n").as_bytes()).await.unwrap();
    stream.write_all(&vec![b' '; SIZE]).await.unwrap();
    // on the same connection
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).await.unwrap();
    answers
}

#[tokio::test]
async fn who_sends_more_than_is_taken_still_gets_the_answer() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    for (token, status, code) in [("wrong", 401, "unauthorized"), (&server.token, 413, "body_too_large")] {
        let answers = answer_to_large_body(&server, token).await;
        assert!(answers.starts_with(&format!("HTTP/1.1 {status} ")) && answers.contains(code), "{answers}");
        assert!(answers.contains("HTTP/1.1 200 OK"), "{answers}");
    }
}

#[tokio::test]
async fn a_body_that_says_that_it_is_too_large_is_refused_before_it_comes() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let run = "/api/v1/workspaces/acme/agents/analyst/run";
    for (path, size) in [
        ("/api/v1/auth/login", 100_000_000_u64),
        ("/api/v1/auth/login", u64::MAX / 2),
        ("/api/v1/auth/logout", 2_000_000),
        ("/api/v1/workspaces/acme/query", 2_000_000),
        (run, 100_000_000),
        (EVENTS, 100_000_000),
    ] {
        let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
        let head = format!("authorization: Bearer {}\r\ncontent-type: application/json", server.token);
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{head}\r\ncontent-length: {size}\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        let told = tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut answer)).await;
        told.unwrap_or_else(|_| panic!("{path} {size}: no answer in time")).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 413", "{path} {size}");
    }
    server.stop().await;
}

#[tokio::test]
async fn bad_frames_on_the_socket_are_answered_and_the_socket_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut socket = server.socket().await;
    for (frame, code) in [
        (json!({"type": "subscribe", "workspace": "acme", "channel": "metrics/nothing", "ref": 1}), "unknown_metric"),
        (json!({"type": "subscribe", "workspace": "acme", "channel": "no/such", "ref": 2}), "unknown_channel"),
        (json!({"type": "subscribe", "workspace": "nowhere", "channel": "alerts", "ref": 3}), "workspace_not_found"),
    ] {
        let wanted = frame["ref"].clone();
        socket.send(frame).await;
        let answer = socket.until(|answer| answer["ref"] == wanted).await;
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!(code)), "{answer}");
    }
    socket.send(json!({"type": "dance", "ref": 4})).await;
    assert_eq!(socket.until(|answer| answer["ref"] == 4).await["type"], "error");
    socket.send(json!({"type": "publish", "workspace": "acme", "stream": "market.trades", "events": [{"symbol": "A", "price": 1, "qty": 1}, {}], "ref": 5})).await;
    let answer = socket.until(|answer| answer["ref"] == 5).await;
    assert_eq!(
        (&answer["type"], &answer["accepted"], &answer["rejected"]),
        (&json!("ok"), &json!(1), &json!(1)),
        "{answer}"
    );
    server.stop().await;
}
