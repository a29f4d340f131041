//! The real binary, with more connections on it than it has descriptors for.

use crate::harness::{BINARY, EMAIL, PASSWORD};
use crate::kill::lasting_port;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::process::Command;

/// Descriptors of the server, and connections that say nothing.
const DESCRIPTORS: usize = 160;
const SILENT: usize = 200;
/// A connection that says nothing is closed within 15 s.
const PATIENCE: Duration = Duration::from_secs(50);

async fn is_healthy(url: &str) -> bool {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(2)).build().unwrap();
    client.get(format!("{url}/health")).send().await.is_ok_and(|answer| answer.status() == 200)
}

async fn healthy_within(url: &str, patience: Duration) -> bool {
    let started = Instant::now();
    while started.elapsed() < patience {
        if is_healthy(url).await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    false
}

#[tokio::test]
async fn strangers_who_hold_all_descriptors_and_say_nothing_lose_them() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("stderr.txt");
    let port = lasting_port(77);
    let mut child = Command::new("sh")
        .args(["-c", &format!("ulimit -n {DESCRIPTORS}; exec \"$0\" serve"), BINARY])
        .env("TIDEWATCH__LISTEN", format!("127.0.0.1:{port}"))
        .env("TIDEWATCH__DATA_DIR", directory.path().join("data"))
        .env("TIDEWATCH__AUTH__SECRET", "a secret of the tests, long enough for them")
        .env("TIDEWATCH__AUTH__BOOTSTRAP_EMAIL", EMAIL)
        .env("TIDEWATCH__AUTH__BOOTSTRAP_PASSWORD", PASSWORD)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let url = format!("http://127.0.0.1:{port}");
    assert!(healthy_within(&url, PATIENCE).await, "{}", std::fs::read_to_string(&log).unwrap());
    let mut held = Vec::new();
    for _ in 0..SILENT {
        held.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
    }
    assert!(!is_healthy(&url).await, "no descriptor is left for anybody else");
    assert!(healthy_within(&url, PATIENCE).await, "{}", std::fs::read_to_string(&log).unwrap());
    let said = std::fs::read_to_string(&log).unwrap();
    assert!((1..10).contains(&said.matches("cannot accept a connection").count()), "{said}");
    drop(held);
    child.kill().await.unwrap();
}
