//! Workspaces made from packs: those that come with Tidewatch, and one of one's own.

use crate::harness::{BINARY, Server};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

fn write(folder: &Path, files: &[(&str, &str)]) {
    for (file, text) in files {
        let path = folder.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_workspace_starts_with_all_that_its_pack_holds_and_computes_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let packs = server.get("/api/v1/packs").await;
    assert_eq!(names(&packs["packs"]), ["analytics", "creator", "documents", "founder", "venture"]);

    let made = server.ok(Method::POST, "/api/v1/workspaces", json!({"id": "acme", "pack": "documents"})).await;
    assert_eq!(made["pack"], "documents");
    let metrics = server.get("/api/v1/workspaces/acme/metrics").await;
    assert_eq!(names(&metrics["metrics"]), ["confidence_10m", "pages_today", "tasks_1m"]);
    let rules = server.get("/api/v1/workspaces/acme/alert-rules").await;
    assert_eq!(names(&rules["rules"]), ["failures", "page-quota"]);
    let task = |id: u32, status: &str, minute: i64| {
        json!({"ts": 1_767_225_600_000i64 + minute * 60_000, "task": format!("t{id}"), "status": status,
            "customer": "c", "kind": "invoice", "pages": 3, "elapsed_ms": 1200.0, "cost": "0.25"})
        .to_string()
    };
    let lines = [task(1, "done", 0), task(2, "done", 0), task(3, "failed", 0), task(4, "queued", 9)].join("\n");
    assert_eq!(server.ingest("documents.tasks", &lines).await["accepted"], 4);
    let row = &server.final_rows("tasks_1m", 1).await[0];
    assert_eq!((&row["done"], &row["failed"], &row["pages"]), (&json!(2), &json!(1), &json!(6)), "{row}");
    server.stop().await;

    // all of it is the workspace's own from now on, also after a restart
    let server = Server::start(directory.path()).await;
    let metrics = server.get("/api/v1/workspaces/acme/metrics").await;
    assert_eq!(metrics["metrics"].as_array().unwrap().len(), 3);
    server.stop().await;
}

#[tokio::test]
async fn a_pack_of_ones_own_is_used_and_one_that_does_not_exist_or_does_not_fit_leaves_no_workspace() {
    let (directory, packs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(
        &packs.path().join("shop"),
        &[
            ("pack.toml", "title = \"Shop\"\ndescription = \"Orders.\"\ndashboard = [\"total\", \"orders\"]"),
            ("streams/shop.orders.toml", "columns = [{ name = \"sku\", type = \"utf8\" }]"),
            (
                "metrics/orders.sql",
                "SELECT sku, count(*) AS n FROM shop.orders GROUP BY tumble(ts, INTERVAL '1 minute'), sku;\n",
            ),
            ("metrics/total.sql", "SELECT sum(n) AS n FROM metrics.orders GROUP BY tumble(ts, INTERVAL '1 hour')"),
        ],
    );
    let folder = packs.path().to_owned();
    let server = Server::start_with(directory.path(), |config| {
        config.packs_dir = Some(folder);
        config.limits.metrics = 3;
    })
    .await;
    server.ok(Method::POST, "/api/v1/workspaces", json!({"id": "acme", "pack": "shop"})).await;
    assert_eq!(names(&server.get("/api/v1/workspaces/acme/metrics").await["metrics"]), ["orders", "total"]);

    let (status, problem) =
        server.call(Method::POST, "/api/v1/workspaces", json!({"id": "other", "pack": "shoe"})).await;
    assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("unknown_pack")), "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("shop"), "{problem}");
    // venture has four metrics
    let (status, problem) =
        server.call(Method::POST, "/api/v1/workspaces", json!({"id": "other", "pack": "venture"})).await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("limit_reached")), "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("limits.metrics"), "{problem}");
    let (status, _) = server.call(Method::GET, "/api/v1/workspaces/other", Value::Null).await;
    assert_ne!(status, StatusCode::OK);
    server.stop().await;
}

#[test]
fn check_says_what_is_wrong_with_a_pack() {
    let packs = tempfile::tempdir().unwrap();
    let folder = packs.path().join("shop");
    write(
        &folder,
        &[
            ("pack.toml", "title = \"Shop\"\ndescription = \"Orders.\""),
            ("metrics/n.sql", "SELECT count(*) AS n\nFROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')"),
        ],
    );
    let check = || Command::new(BINARY).arg("check").arg(&folder).output().unwrap();
    let good = check();
    assert!(good.status.success(), "{good:?}");
    assert!(String::from_utf8_lossy(&good.stdout).contains("a valid pack `shop`"), "{good:?}");
    write(
        &folder,
        &[("metrics/n.sql", "SELECT count(*) AS n\nFROM market.trade GROUP BY tumble(ts, INTERVAL '1 minute')")],
    );
    let bad = check();
    assert_eq!(bad.status.code(), Some(1));
    let told = String::from_utf8_lossy(&bad.stderr);
    assert!(told.contains("metrics/n.sql: line 2, column 6"), "{told}");
    let good = "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')";
    for (condition, place) in [("n >", "line 2, column 17: condition: "), ("n > 0 OR zz > 1", "line 2, column 23: ")] {
        let rule = format!("metric = \"n\"\ncondition = \"{condition}\"\n");
        write(&folder, &[("metrics/n.sql", good), ("rules/r.toml", &rule)]);
        let bad = check();
        let told = String::from_utf8_lossy(&bad.stderr);
        assert!(bad.status.code() == Some(1) && told.contains(&format!("rules/r.toml: {place}")), "{told}");
    }
    let rule = Command::new(BINARY).arg("check").arg(folder.join("rules/r.toml")).output().unwrap();
    assert!(rule.status.success(), "what its columns are is not known there: {rule:?}");
}
