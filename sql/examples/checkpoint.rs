//! What a checkpoint takes of a workspace of many metrics of which one changes: `checkpoint [postgres|sqlite]`.
//!
//! A big metric that idles (200,000 groups), 48 small ones that idle too, and one over the stream that goes on.

use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray, new_null_array};
use engine::event::{Span, StreamName};
use engine::metric::Timing;
use engine::workspace::Workspace as Engine;
use sql::plan::Planner;
use sql::store::Commit;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::schema::built_in;

mod measured;
use measured::Measured;

const GROUPS: usize = 200_000;
const GROUPS_OF_SMALL: usize = 500;
const SMALL: usize = 48;
const CHECKPOINTS: usize = 50;

fn stream(name: &str) -> StreamName {
    name.parse().unwrap()
}

/// One event of each of `keys` symbols.
fn events(name: &str, at: i64, keys: std::ops::Range<usize>) -> RecordBatch {
    let schema = built_in().iter().find(|s| s.stream.as_str() == name).unwrap().arrow().clone();
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "ts" => Arc::new(TimestampMicrosecondArray::from_value(at, keys.len()).with_timezone("+00:00")),
            "symbol" => Arc::new(StringArray::from_iter_values(keys.clone().map(|key| format!("SYM{key:06}")))),
            "price" | "qty" | "bid" | "ask" => Arc::new(Float64Array::from_value(1.25 * at as f64, keys.len())),
            _ => new_null_array(field.data_type(), keys.len()),
        }
    });
    RecordBatch::try_new(schema.clone(), columns.collect()).unwrap()
}

fn define(engine: &mut Engine, name: &str, sql: &str) {
    let schema = |stream: &StreamName| built_in().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
    let program = futures::executor::block_on(Planner::default().program(sql, schema)).unwrap();
    let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
    engine.define(name.parse().unwrap(), 1, program, timing).unwrap();
}

#[tokio::main]
async fn main() {
    let backend = std::env::args().nth(1).unwrap_or_else(|| "sqlite".into());
    let Measured { store, workspaces, .. } = &Measured::open(&backend, 1).await;

    let mut engine = Engine::default();
    let day = "SELECT symbol, count(*) AS n, avg(bid) AS bid, max(ask) AS ask FROM market.quotes \
               GROUP BY tumble(ts, INTERVAL '1 day'), symbol";
    define(&mut engine, "big", day);
    for at in 0..SMALL {
        let small = day.replace(
            " GROUP",
            &format!(" WHERE bid_qty IS NULL AND symbol < 'SYM{GROUPS_OF_SMALL:06}' AND ask <> {at} GROUP"),
        );
        define(&mut engine, &format!("small{at}"), &small);
    }
    let minute = "SELECT symbol, count(*) AS n, avg(price) AS price FROM market.trades \
                  GROUP BY hop(ts, INTERVAL '1 minute', INTERVAL '1 hour'), symbol";
    define(&mut engine, "busy", minute);
    let second = 1_000_000;
    let start = 1_800_000_000 * second;
    for from in (0..GROUPS).step_by(10_000) {
        drop(engine.step(&stream("market.quotes"), &events("market.quotes", start, from..from + 10_000)));
    }
    for at in 0..3_600 {
        let batch = events("market.trades", start + at * second, 0..GROUPS_OF_SMALL);
        drop(engine.step(&stream("market.trades"), &batch));
    }
    let (mut taking, mut saving, mut storing, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for at in 0..CHECKPOINTS {
        let batch = events("market.trades", start + (3_600 + at as i64) * second, 0..GROUPS_OF_SMALL);
        drop(engine.step(&stream("market.trades"), &batch));
        let began = Instant::now();
        let taken = engine.save().unwrap();
        taking.push(began.elapsed());
        let state = taken.encode().unwrap();
        saving.push(began.elapsed());
        bytes.push(state.bytes());
        let commit = Commit {
            workspace: workspaces[0].clone(),
            offset: at as u64 + 1,
            state: Some(state),
            rows: Vec::new(),
            alerts: Vec::new(),
            notices: Vec::new(),
            repeats: false,
            dead_letters: Vec::new(),
            rules: Vec::new(),
        };
        let began = Instant::now();
        store.commit(std::slice::from_ref(&commit)).await.unwrap();
        storing.push(began.elapsed());
    }
    println!("first: {} bytes, {:?} to save, {:?} to store", bytes[0], saving[0], storing[0]);
    let median = |times: &mut [Duration]| {
        times.sort();
        times[times.len() / 2]
    };
    bytes.sort_unstable();
    let (taking, saving, storing) = (median(&mut taking), median(&mut saving), median(&mut storing));
    println!(
        "{backend}, median: {} bytes, {taking:?} to take, {saving:?} to take and encode, {storing:?} to store",
        bytes[bytes.len() / 2]
    );
}
