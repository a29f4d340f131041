//! How many final rows a second the store takes: `store [postgres|sqlite] [ROWS]`.

use engine::event::{Micros, WorkspaceId};
use sql::store::{Commit, FinalRow};
use std::time::Instant;

mod measured;
use measured::Measured;

/// Workspaces whose rows one transaction takes, as the committer puts them together.
const TOGETHER: usize = 8;
const ROWS_OF_COMMIT: usize = 1_000;

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let backend = args.next().unwrap_or_else(|| "postgres".into());
    let rows: usize = args.next().map_or(500_000, |text| text.parse().expect("ROWS is a number"));
    let measured = Measured::open(&backend, 4 * TOGETHER).await;
    let writers = measured.store.writers();
    let rounds = rows.div_ceil(writers * TOGETHER * ROWS_OF_COMMIT);
    let began = Instant::now();
    let writing = measured.workspaces.chunks(TOGETHER).take(writers).map(|workspaces| {
        let (store, workspaces) = (measured.store.clone(), workspaces.to_vec());
        tokio::spawn(async move {
            let mut spent = Vec::with_capacity(rounds);
            for round in 0..rounds {
                let commits: Vec<Commit> = workspaces.iter().map(|workspace| commit(workspace, round)).collect();
                let began = Instant::now();
                store.commit(&commits).await.unwrap();
                spent.push(began.elapsed().as_secs_f64());
            }
            spent
        })
    });
    let mut spent = Vec::new();
    for written in futures::future::join_all(writing).await {
        spent.extend(written.unwrap());
    }
    spent.sort_by(f64::total_cmp);
    let written = spent.len() * TOGETHER * ROWS_OF_COMMIT;
    println!(
        "{backend}: {:.0} rows/s; {written} rows in transactions of {}, {writers} at a time, median {:.1} ms",
        written as f64 / began.elapsed().as_secs_f64(),
        TOGETHER * ROWS_OF_COMMIT,
        spent[spent.len() / 2] * 1e3,
    );
}

/// The rows of a thousand symbols, a window later each round.
fn commit(workspace: &WorkspaceId, round: usize) -> Commit {
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
        workspace: workspace.clone(),
        offset: round as u64 + 1,
        state: None,
        rows: (0..ROWS_OF_COMMIT).map(row).collect(),
        alerts: Vec::new(),
        notices: Vec::new(),
        repeats: false,
        dead_letters: Vec::new(),
        rules: Vec::new(),
    }
}
