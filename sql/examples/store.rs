//! How many final rows a second the store takes: `store [postgres|sqlite] [ROWS]`. PostgreSQL is started from the
//! machine's packages, as the tests start it, but with `fsync` on unless `FSYNC=off` is set.

use engine::event::Micros;
use sql::store::{Commit, FinalRow, Store, User, Workspace};
use std::time::Instant;
use tempfile::TempDir;

#[path = "../../tests/support/database.rs"]
mod database;
use database::Database;

/// Workspaces whose rows one transaction takes, as the committer puts them together.
const TOGETHER: usize = 8;
const ROWS_OF_COMMIT: usize = 1_000;

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let backend = args.next().unwrap_or_else(|| "postgres".into());
    let rows: usize = args.next().map_or(500_000, |text| text.parse().expect("ROWS is a number"));
    let directory = TempDir::new().unwrap();
    let server = (backend == "postgres").then(|| Database::postgres().expect("PostgreSQL is installed"));
    if let Some(server) = &server
        && std::env::var("FSYNC").as_deref() != Ok("off")
    {
        server.sql("postgres", "postgres", "ALTER SYSTEM SET fsync = on");
        server.sql("postgres", "postgres", "SELECT pg_reload_conf()");
    }
    let url = match &server {
        Some(server) => server.create("measured"),
        None => format!("sqlite:{}/store.db", directory.path().display()),
    };
    let store = Store::open(&url).await.unwrap();
    let ann = User {
        id: "ann".into(),
        email: "ann@example.com".into(),
        password_hash: "none".into(),
        admin: false,
        created_at: Micros(1),
    };
    store.create_user(&ann).await.unwrap();
    for at in 0..TOGETHER {
        let (id, tier) = (format!("w{at}").parse().unwrap(), "enterprise".into());
        let workspace = Workspace { id, name: format!("w{at}"), pack: None, tier, created_at: Micros(1) };
        store.create_workspace(&workspace, &ann.id).await.unwrap();
    }
    let (mut written, mut spent, mut round) = (0, Vec::new(), 0);
    while written < rows {
        let commits: Vec<Commit> = (0..TOGETHER).map(|at| commit(at, round)).collect();
        let began = Instant::now();
        store.commit(&commits).await.unwrap();
        spent.push(began.elapsed().as_secs_f64());
        written += TOGETHER * ROWS_OF_COMMIT;
        round += 1;
    }
    let total: f64 = spent.iter().sum();
    spent.sort_by(f64::total_cmp);
    println!(
        "{backend}: {:.0} rows/s; {written} rows in transactions of {}, median {:.1} ms",
        written as f64 / total,
        TOGETHER * ROWS_OF_COMMIT,
        spent[spent.len() / 2] * 1e3,
    );
}

/// The rows of a thousand symbols, a window later each round.
fn commit(at: usize, round: usize) -> Commit {
    let start = 1_800_000_000_000_000 + round as i64 * 60_000_000;
    let row = |symbol: usize| FinalRow {
        metric: "bars".parse().unwrap(),
        window_start: Micros(start),
        window_end: Micros(start + 60_000_000),
        key: format!(r#"{{"symbol":"SYM{symbol:04}"}}"#),
        revision: 0,
        row: format!(r#"{{"n":{symbol},"open":1.25,"high":2.5,"low":0.5,"close":{round}.125,"vwap":1.0625}}"#),
    };
    Commit {
        workspace: format!("w{at}").parse().unwrap(),
        offset: round as u64 + 1,
        state: None,
        rows: (0..ROWS_OF_COMMIT).map(row).collect(),
        alerts: Vec::new(),
        notices: Vec::new(),
        dead_letters: Vec::new(),
    }
}
