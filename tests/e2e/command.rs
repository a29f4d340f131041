//! The commands of the binary, run as a user runs them against a real server.

use crate::harness::{BINARY, EMAIL, PASSWORD, Server};
use reqwest::Method;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const HEADER: &str = "ts,symbol,price,qty,side\n";

async fn run(server: &Server, args: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(args).env("TIDEWATCH_URL", &server.url).env("TIDEWATCH_EMAIL", EMAIL);
    command.env("TIDEWATCH_PASSWORD", PASSWORD).output().await.unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn csv(from: i64, to: i64) -> String {
    (from..to).map(|i| format!("{},A,{}.5,{},buy\n", 1_704_067_200_000 + i, 100 + i % 7, 1 + i % 3)).collect()
}

fn ndjson(from: i64, to: i64) -> String {
    let line =
        |i: i64| json!({"id": format!("n{i}"), "ts": 1_704_067_200_000 + i, "symbol": "B", "price": 1, "qty": 2});
    (from..to).map(|i| format!("{}\n", line(i))).collect()
}

fn file(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

async fn count(server: &Server, symbol: &str) -> (i64, f64) {
    let sql = "SELECT count(*) AS n, sum(qty) AS qty FROM market.trades WHERE symbol = $1";
    let asked = json!({"sql": sql, "params": [symbol]});
    let answer = server.ok(Method::POST, "/api/v1/workspaces/acme/query", asked).await;
    let row = &answer["rows"][0];
    (row[0].as_i64().unwrap(), row[1].as_f64().unwrap_or(0.0))
}

#[tokio::test]
async fn replay_sends_csv_and_ndjson_plain_and_packed_and_a_repeat_counts_once() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let at = directory.path();
    let plain = file(at, "plain.csv", (HEADER.to_owned() + &csv(0, 3_000)).as_bytes());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all((HEADER.to_owned() + &csv(3_000, 5_000)).as_bytes()).unwrap();
    let gzip = file(at, "packed.csv.gz", &gzip.finish().unwrap());
    let zstd = file(at, "packed.ndjson.zst", &zstd::encode_all(ndjson(0, 4_000).as_bytes(), 1).unwrap());
    let files = [&plain, &gzip, &zstd].map(|path| path.to_str().unwrap().to_owned());

    let args = ["replay", &files[0], &files[1], &files[2], "-w", "acme", "-s", "market.trades"];
    let said = stdout(&run(&server, &args).await);
    assert!(said.starts_with("accepted 9000, duplicates 0, rejected 0, unreadable rows 0 in "), "{said}");
    let quantity: i64 = (0..5_000).map(|i| 1 + i % 3).sum();
    assert_eq!(count(&server, "A").await, (5_000, quantity as f64));
    assert_eq!(count(&server, "B").await, (4_000, 8_000.0));

    // these events carry ids
    let said = stdout(&run(&server, &["replay", &files[2], "-w", "acme", "-s", "market.trades"]).await);
    assert!(said.starts_with("accepted 0, duplicates 4000, "), "{said}");
    assert_eq!(count(&server, "B").await.0, 4_000);
    server.stop().await;
}

#[tokio::test]
async fn what_a_command_keeps_is_for_its_own_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let mut command = Command::new(BINARY);
    command.args(["user", "create", "ada@example.com"]).env("TIDEWATCH__DATA_DIR", &data);
    command.env("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"correct horse battery staple\n").await.unwrap();
    assert!(child.wait().await.unwrap().success());
    let (mut left, mut seen) = (vec![data], 0);
    while let Some(path) = left.pop() {
        let found = std::fs::metadata(&path).unwrap();
        let expected = if found.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(found.permissions().mode() & 0o777, expected, "{}", path.display());
        if found.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        seen += 1;
    }
    assert!(seen > 1, "{seen}");
}

#[tokio::test]
async fn replay_keeps_the_pace_that_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    // 3 s of events at 3 times their pace
    let lines: String = (0..31).map(|i| format!("{},C,1,1,\n", 1_704_067_200_000_i64 + i * 100)).collect();
    let path = file(directory.path(), "paced.csv", (HEADER.to_owned() + &lines).as_bytes());
    let began = std::time::Instant::now();
    let args = ["replay", path.to_str().unwrap(), "-w", "acme", "-s", "market.trades", "--speed", "3x"];
    let said = stdout(&run(&server, &args).await);
    assert!(said.starts_with("accepted 31, "), "{said}");
    assert!(began.elapsed().as_secs_f64() >= 0.9, "{said} {:?}", began.elapsed());
    server.stop().await;
}

#[tokio::test]
async fn replay_takes_real_trades_from_parquet_with_a_mapping_of_columns() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/data/market/us_equity_ticks/aig_20131007_trades.parquet");
    if !file.exists() {
        println!("skipped: {} is not there", file.display());
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut args = vec!["replay", file.to_str().unwrap(), "-w", "acme", "-s", "market.trades"];
    args.extend(["--ts", "ts_ns", "--ts-unit", "ns", "--map", "symbol='AIG'"]);
    args.extend(["--map", "price=price_e4*0.0001", "--map", "qty=size"]);
    let said = stdout(&run(&server, &args).await);
    assert!(said.starts_with("accepted 25351, duplicates 0, rejected 0, "), "{said}");
    // the published facts of this file
    assert_eq!(count(&server, "AIG").await, (25_351, 5_300_449.0));
    let asked = json!({"sql": "SELECT sum(price * qty) / sum(qty) AS vwap FROM market.trades"});
    let answer = server.ok(Method::POST, "/api/v1/workspaces/acme/query", asked).await;
    assert!((answer["rows"][0][0].as_f64().unwrap() - 48.925055).abs() < 1e-6, "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn query_prints_a_table_json_or_csv() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.ingest("market.trades", &ndjson(0, 3)).await;
    let sql = "SELECT symbol, count(*) AS n FROM market.trades GROUP BY symbol";
    let said = stdout(&run(&server, &["query", sql, "-w", "acme", "--format", "csv"]).await);
    assert_eq!(said.trim(), "symbol,n\nB,3");
    let said = stdout(&run(&server, &["query", sql, "-w", "acme", "--format", "json"]).await);
    let json: Value = serde_json::from_str(&said).unwrap();
    assert!(json.to_string().contains('3'), "{json}");
    let said = stdout(&run(&server, &["query", sql, "-w", "acme"]).await);
    assert!(said.contains("symbol") && said.contains('B'), "{said}");
    server.stop().await;
}

#[tokio::test]
async fn backtest_tells_which_alerts_a_rule_would_have_raised() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let sql = "SELECT symbol, max(price) AS top FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    server.metric("top_1m", json!({"sql": sql})).await;
    let trade = |second: i64, price: i64| {
        let ts = 1_704_067_200_000 + second * 1000;
        format!("{}\n", json!({"ts": ts, "symbol": "A", "price": price, "qty": 1}))
    };
    // over 100 from second 70 on, for one minute's row; and again at second 190, which stays
    for (second, price) in [(1, 50), (70, 150), (130, 60), (190, 170), (200, 171)] {
        server.ingest("market.trades", &trade(second, price)).await;
    }
    let rule = "metric = \"top_1m\"\ncondition = \"top > 100\"\nseverity = \"critical\"\n";
    let rule = file(directory.path(), "dear.toml", rule.as_bytes());
    let rule = rule.to_str().unwrap();
    assert!(stdout(&run(&server, &["check", rule]).await).contains("a valid rule over metric top_1m"));
    let asked = ["backtest", rule, "-w", "acme", "--from", "2024-01-01T00:00:00Z", "--to", "2024-01-02T00:00:00Z"];
    let said = stdout(&run(&server, &[&asked[..], &["--format", "json"]].concat()).await);
    let answer: Value = serde_json::from_str(&said).unwrap();
    let alerts = answer["alerts"].as_array().unwrap();
    assert_eq!((alerts.len(), &answer["events"]), (2, &json!(5)), "{answer}");
    assert_eq!(alerts[0]["labels"], json!({"symbol": "A"}));
    assert_eq!(alerts[0]["fired_at"], "2024-01-01T00:01:10.000000Z");
    assert_eq!(alerts[0]["resolved_at"], "2024-01-01T00:02:10.000000Z");
    assert_eq!((&alerts[1]["row"]["top"], &alerts[1]["resolved_at"]), (&json!(170.0), &Value::Null));
    assert!(stdout(&run(&server, &asked).await).contains("(2 rows)"));
    // only the asked time counts, and nothing of the workspace has changed
    let asked = ["backtest", rule, "-w", "acme", "--from", "2024-01-01T00:03:00Z", "--to", "2024-01-02T00:00:00Z"];
    assert!(stdout(&run(&server, &asked).await).contains("(1 rows)"));
    let kept = server.get("/api/v1/workspaces/acme/alerts").await;
    assert_eq!(kept["alerts"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn a_command_that_cannot_do_its_work_says_why_and_ends_with_1_and_bad_usage_with_2() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let path = file(directory.path(), "some.csv", (HEADER.to_owned() + &csv(0, 3)).as_bytes());
    let path = path.to_str().unwrap();
    let fails = |output: &Output, says: &str| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(says), "{:?} {said}", output.status);
    };
    fails(&run(&server, &["replay", path, "-w", "nobody", "-s", "market.trades"]).await, "nobody");
    fails(&run(&server, &["replay", path, "-w", "acme", "-s", "market.nothing"]).await, "market.nothing");
    fails(&run(&server, &["replay", "missing.csv", "-w", "acme", "-s", "market.trades"]).await, "missing.csv");
    fails(&run(&server, &["query", "SELECT nothing FROM market.trades", "-w", "acme"]).await, "nothing");
    let output = run(&server, &["replay", path]).await;
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let output = run(&server, &["replay", path, "-w", "acme", "-s", "market.trades", "--speed", "fast"]).await;
    assert_eq!(output.status.code(), Some(2));
    server.stop().await;
}

/// Runs the binary in `directory` without a server, with nothing from outside.
async fn alone(directory: &Path, args: &[&str], settings: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(BINARY);
    command.args(args).current_dir(directory).envs(settings.iter().copied()).env_remove("RUST_LOG").kill_on_drop(true);
    let wait = std::time::Duration::from_secs(60);
    let output = tokio::time::timeout(wait, command.output()).await.unwrap().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn a_command_on_a_data_directory_that_is_not_there_makes_none() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let settings =
        [("TIDEWATCH__DATA_DIR", "typo"), ("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them")];
    for args in [
        &["audit", "verify"][..],
        &["key", "list", "-w", "acme"],
        &["user", "list"],
        &["token", "create", "ada@example.com"],
        &["workspace", "list"],
        &["workspace", "create", "acme", "--owner", "ada@example.com"],
        &["migrate"],
        &["backup", "copy"],
    ] {
        let (status, said) = alone(at, args, &settings).await;
        assert!(status == Some(1) && said.contains("there is no store at `typo/tidewatch.db`"), "{args:?}: {said}");
        assert_eq!(std::fs::read_dir(at).unwrap().count(), 0, "{args:?} left something");
    }
}

#[tokio::test]
async fn a_command_names_what_there_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let data = directory.path().to_str().unwrap();
    let fails = async |args: &[&str], part: &str| {
        let (status, said) = alone(directory.path(), args, &[("TIDEWATCH__DATA_DIR", data)]).await;
        assert!(status == Some(1) && said.contains(part), "{args:?}: {said}");
    };
    fails(&["key", "list", "-w", "none"], "there is no workspace `none`").await;
    fails(&["token", "revoke", "nobody@example.com"], "there is no user `nobody@example.com`; `tidewatch user list`")
        .await;
    fails(&["user", "reset-oidc", EMAIL], "no issuer knows `owner@example.com`").await;
    fails(&["check", "none"], "there is no file and no folder `none`").await;
    server.stop().await;
    // a backup that fails leaves nothing: here of a store that cannot be read
    std::fs::write(directory.path().join("none.db"), "no database").unwrap();
    let store = [("TIDEWATCH__DATA_DIR", data), ("TIDEWATCH__STORE__URL", "sqlite:none.db")];
    let (status, said) = alone(directory.path(), &["backup", "copy"], &store).await;
    assert!(status == Some(1) && said.contains("copying the store"), "{said}");
    assert!(!directory.path().join("copy").exists());
}

#[tokio::test]
async fn a_start_that_is_refused_names_the_setting_and_its_log_has_no_colours() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let secret = ("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them");
    let listen = ("TIDEWATCH__LISTEN", "127.0.0.1:0");
    let refused = async |command: &str, key: (&str, &str), part: &str| {
        let (status, said) = alone(at, &[command], &[secret, listen, key]).await;
        assert!(status == Some(1) && said.contains(part) && !said.contains('\u{1b}'), "{key:?}: {said}");
        assert!(!said.contains("serving"), "{said}");
        said
    };
    refused("serve", ("TIDEWATCH__PACKS_DIR", "none"), "packs_dir `none`").await;
    refused("serve", ("TIDEWATCH__LIMITS__BODY_BYTES", "0"), "limits.body_bytes = 0").await;
    refused("edge", ("TIDEWATCH__EDGE__CORE", "nonsense"), "edge.core = \"nonsense\" is no address").await;
    std::fs::write(at.join("t.toml"), "packs_dir = \"none\"\nauth.secret_file = \"gone\"\ntls.key_file = \"gone\"")
        .unwrap();
    let (status, said) = alone(at, &["serve", "--config", "t.toml"], &[secret, listen]).await;
    assert_eq!(status, Some(1), "{said}");
    for part in ["WARN", "auth.secret_file is not read", "tls.key_file has no effect without listen_tls"] {
        assert!(said.contains(part) && !said.contains('\u{1b}'), "{part}: {said}");
    }
}
