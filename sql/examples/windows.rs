//! Measures the window engine alone, on one thread, with Arrow batches ready in memory.
//!
//! `cargo build --release -p tidewatch-sql --example windows`, then
//! `target/release/examples/windows [EVENTS] [ROWS A BATCH] [WORKLOAD]`. The last workload is `tenants`: 10,000
//! workspaces with the ten metrics each, an event a second and a look at what changed.
//!
//! The trades are those of the usual streaming comparison: 5,000 a second of event time, 1,000 workspaces and 500
//! symbols by Zipf's law with exponent 1.2, 99 % up to 2 s out of order and 1 % up to 10 s. CPU time is that of the
//! thread and only within the engine; resident memory includes the batch at hand.

use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::Timing;
use engine::workspace::{Outputs, Workspace};
use sql::plan::Planner;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::schema::{Column, StreamSchema, UnknownFields};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const W1: &str = "SELECT workspace, symbol, count(*) AS n, sum(qty) AS volume, sum(price * qty) / sum(qty) AS vwap, \
    min(price) AS low, max(price) AS high FROM peers.trades \
    GROUP BY tumble(ts, INTERVAL '1 minute'), workspace, symbol";
const W2: &str = "SELECT symbol, count(*) AS n, avg(price) AS mean FROM peers.trades \
    GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), symbol";
const W3: &str =
    "SELECT workspace, count(*) AS n FROM peers.trades GROUP BY session(ts, INTERVAL '30 seconds'), workspace";

struct Workload {
    name: &'static str,
    sql: Vec<String>,
    batch: Option<usize>,
}

fn workloads() -> Vec<Workload> {
    let one = |name, sql: &str| Workload { name, sql: vec![sql.to_owned()], batch: None };
    let by_symbol = |window: &str| {
        format!(
            "SELECT symbol, count(*) AS n, sum(qty) AS volume, sum(price * qty) / sum(qty) AS vwap, min(price) AS low, \
             max(price) AS high FROM peers.trades GROUP BY {window}, symbol"
        )
    };
    let minute = "tumble(ts, INTERVAL '1 minute')";
    let ten = pack();
    vec![
        one("W1 tumble 1 min, 2 keys", W1),
        one("W2 hop 10 s / 5 min", W2),
        one("W3 session 30 s", W3),
        Workload { name: "all three", sql: vec![W1.to_owned(), W2.to_owned(), W3.to_owned()], batch: None },
        one("tumble 1 min by symbol", &by_symbol(minute)),
        one("hop 10 s / 5 min by symbol", &by_symbol("hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes')")),
        one("hop 1 s / 1 h by symbol", &by_symbol("hop(ts, INTERVAL '1 second', INTERVAL '1 hour')")),
        one("cumulate 1 min / 1 day", &by_symbol("cumulate(ts, INTERVAL '1 minute', INTERVAL '1 day')")),
        one("one metric by symbol", &ten[0]),
        Workload { name: "ten metrics by symbol", sql: ten.clone(), batch: None },
        Workload { name: "ten metrics, 10 rows", sql: ten, batch: Some(10) },
    ]
}

/// Ten metrics by symbol in one-minute windows.
fn pack() -> Vec<String> {
    [
        "count(*) AS n, sum(qty) AS volume",
        "sum(price * qty) / sum(qty) AS vwap",
        "min(price) AS low, max(price) AS high",
        "avg(price) AS mean",
        "sum(price * qty) AS turnover",
        "count(*) FILTER (WHERE side = 'buy') AS buys",
        "max(qty) AS largest",
        "avg(qty) AS size",
        "sum(qty) FILTER (WHERE side = 'sell') AS sold",
        "count(*) AS trades, max(price) - min(price) AS spread",
    ]
    .iter()
    .map(|values| format!("SELECT symbol, {values} FROM peers.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol"))
    .collect()
}

struct Trades {
    at: u64,
    state: u64,
    workspaces: Vec<f64>,
    symbols: Vec<f64>,
    names: (Vec<String>, Vec<String>),
    prices: Vec<f64>,
    schema: StreamSchema,
}

impl Trades {
    fn new() -> Self {
        let zipf = |n: usize| -> Vec<f64> {
            let weights: Vec<f64> = (1..=n).map(|k| (k as f64).powf(-1.2)).collect();
            let total: f64 = weights.iter().sum();
            weights
                .iter()
                .scan(0.0, |sum, w| {
                    *sum += w / total;
                    Some(*sum)
                })
                .collect()
        };
        let column = |(name, kind): (&str, &str)| Column {
            name: name.into(),
            kind: kind.parse().expect("a type"),
            nullable: false,
        };
        let columns =
            [("workspace", "utf8"), ("symbol", "utf8"), ("price", "float64"), ("qty", "float64"), ("side", "utf8")];
        let stream = "peers.trades".parse().expect("a stream name");
        Self {
            at: 0,
            state: 7,
            workspaces: zipf(1000),
            symbols: zipf(500),
            names: (
                (1..=1000).map(|k| format!("ws{k:04}")).collect(),
                (1..=500).map(|k| format!("SYM{k:03}")).collect(),
            ),
            prices: (0..500).map(|k| 5.0 + f64::from(k)).collect(),
            schema: StreamSchema::new(stream, columns.map(column).to_vec(), UnknownFields::Ignore).expect("a schema"),
        }
    }

    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.state ^ (self.state >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }

    fn batch(&mut self, rows: usize) -> RecordBatch {
        let (mut ts, mut ws, mut symbols, mut prices, mut qtys, mut sides) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rows {
            let arrival = 1_767_623_400_000 + (self.at * 1000 / 5000) as i64;
            self.at += 1;
            let delay = if self.uniform() < 0.01 { 2001.0 + self.uniform() * 7999.0 } else { self.uniform() * 2001.0 };
            let millis = arrival - delay as i64;
            ts.push(millis * 1000);
            let (u, v) = (self.uniform(), self.uniform());
            let mut workspace = self.workspaces.partition_point(|&p| p < u).min(999);
            let hash = ((workspace as i64 * 2_654_435_761) ^ (millis / 120_000 * 3_928_291)) as u64;
            if workspace >= 20 && (hash ^ (hash >> 15)).is_multiple_of(4) {
                workspace %= 20; // small workspaces are silent for a while
            }
            let symbol = self.symbols.partition_point(|&p| p < v).min(499);
            ws.push(self.names.0[workspace].clone());
            symbols.push(self.names.1[symbol].clone());
            let step = (self.uniform() - 0.5) * 4e-5;
            self.prices[symbol] *= 1.0 + step;
            prices.push((self.prices[symbol] * 1e4).round() / 1e4);
            qtys.push((self.uniform() * 2e4).round() / 1e3 + 0.001);
            sides.push(if self.uniform() < 0.5 { "buy" } else { "sell" });
        }
        let column = |name: &str| -> ArrayRef {
            match name {
                "ts" => Arc::new(TimestampMicrosecondArray::from(ts.clone()).with_timezone("+00:00")),
                "workspace" => Arc::new(StringArray::from(ws.clone())),
                "symbol" => Arc::new(StringArray::from(symbols.clone())),
                "price" => Arc::new(Float64Array::from(prices.clone())),
                "qty" => Arc::new(Float64Array::from(qtys.clone())),
                "side" => Arc::new(StringArray::from(sides.clone())),
                _ => Arc::new(StringArray::new_null(rows)),
            }
        };
        let columns = self.schema.arrow().fields().iter().map(|field| column(field.name())).collect();
        RecordBatch::try_new(self.schema.arrow().clone(), columns).expect("the columns of the schema")
    }
}

/// Time this thread was on a processor.
fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0))
}

fn status(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

fn run(workload: &Workload, events: usize, rows: usize) {
    let rows = workload.batch.unwrap_or(rows);
    let events = if workload.batch.is_some() { events.min(200_000) } else { events };
    let mut trades = Trades::new();
    let stream: StreamName = "peers.trades".parse().expect("a stream name");
    let input = trades.schema.arrow().clone();
    let began = Instant::now();
    let mut workspace = Workspace::default();
    let planner = Planner::default();
    let timing = Timing { max_delay: Span::seconds(10), allowed_lateness: Span::ZERO };
    let mut names: Vec<ItemName> = Vec::new();
    for (at, sql) in workload.sql.iter().enumerate() {
        let program = futures::executor::block_on(planner.program(sql, |_| Some(input.clone()))).expect("it plans");
        let name: ItemName = format!("m{at}").parse().expect("a name");
        workspace.define(name.clone(), 1, program, timing).expect("it starts");
        names.push(name);
    }
    let planned = began.elapsed();
    let (mut spent, mut out, mut late, mut slowest, mut first) = (Duration::ZERO, 0, 0, Duration::ZERO, None);
    let mut state = 0;
    let mut count = |outputs: Outputs| {
        assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
        late += outputs.late.len();
        outputs.rows.iter().map(|rows| rows.rows.batch.num_rows()).sum::<usize>()
    };
    let mut done = 0;
    while done < events {
        let batch = trades.batch(rows.min(events - done));
        done += batch.num_rows();
        let before = cpu();
        let outputs = workspace.step(&stream, &batch);
        let took = cpu() - before;
        let produced = count(outputs);
        out += produced;
        (spent, slowest) = (spent + took, slowest.max(took));
        if produced > 0 && first.is_none() {
            first = Some(planned + spent);
        }
        if done.is_multiple_of(rows * 16) {
            state = state.max(workspace.bytes());
        }
    }
    let before = cpu();
    let outputs = workspace.idle(&stream, Micros(i64::MAX / 2));
    let closing = cpu() - before;
    let closed = count(outputs);
    let per_event = spent.as_secs_f64() * 1e9 / events as f64;
    println!(
        "{:28} {:>7.1} ns/event {:>7.2} M/s {:>9} rows {:>9.1} us/batch (worst {:>7.1}) plan {:>6.2} ms first row {:>6.2} ms state {:>6.1} MiB rss {:>6.1} late {late}; the windows open at the end: {closed} rows in {:.1} ms",
        workload.name,
        per_event,
        1e3 / per_event,
        out,
        spent.as_secs_f64() * 1e6 / events.div_ceil(rows) as f64,
        slowest.as_secs_f64() * 1e6,
        planned.as_secs_f64() * 1e3,
        first.unwrap_or_default().as_secs_f64() * 1e3,
        state as f64 / 1048576.0,
        status("VmHWM"),
        closing.as_secs_f64() * 1e3,
    );
}

/// Workspaces with the same ten metrics, an event a second each for two minutes, and what changed asked for each time.
fn tenants(count: usize) {
    const SECONDS: usize = 120;
    let mut trades = Trades::new();
    let stream: StreamName = "peers.trades".parse().expect("a stream name");
    let input = trades.schema.arrow().clone();
    let planner = Planner::default();
    let timing = Timing { max_delay: Span::seconds(10), allowed_lateness: Span::ZERO };
    let names: Vec<ItemName> = (0..10).map(|at| format!("m{at}").parse().expect("a name")).collect();
    let before = status("VmRSS");
    let (began, mut kept) = (Instant::now(), Vec::new());
    let mut workspaces: Vec<Workspace> = (0..count)
        .map(|_| {
            let mut workspace = Workspace::default();
            for (name, sql) in names.iter().zip(pack()) {
                let program = futures::executor::block_on(planner.program(&sql, |_| Some(input.clone())));
                let program = program.expect("it plans");
                workspace.define(name.clone(), 1, program.clone(), timing).expect("it starts");
                kept.push(program);
            }
            workspace
        })
        .collect();
    let defined = began.elapsed();
    let (mut stepping, mut ticking, mut rows) = (Duration::ZERO, Duration::ZERO, 0);
    for _ in 0..SECONDS {
        let second = trades.batch(5_000);
        let events: Vec<RecordBatch> = (0..count).map(|at| second.slice(at % second.num_rows(), 1)).collect();
        let before = cpu();
        for (workspace, event) in workspaces.iter_mut().zip(&events) {
            rows += workspace.step(&stream, event).rows.len();
        }
        let between = cpu();
        for workspace in &mut workspaces {
            rows += names.iter().map(|name| workspace.tick(name).rows.len()).sum::<usize>();
        }
        (stepping, ticking) = (stepping + between - before, ticking + cpu() - between);
    }
    let state = workspaces.iter().map(Workspace::bytes).sum::<usize>();
    println!(
        "tenants: {count} workspaces x 10 metrics, defined in {:.2} us each; {:.1} % of a core at an event a second each, {:.1} % more with a look at every metric a second; {:.1} KiB resident each, {:.1} KiB of state, {rows} batches of rows",
        defined.as_secs_f64() * 1e6 / (count * 10) as f64,
        stepping.as_secs_f64() * 100.0 / SECONDS as f64,
        ticking.as_secs_f64() * 100.0 / SECONDS as f64,
        (status("VmRSS") - before) * 1024.0 / count as f64,
        state as f64 / 1024.0 / count as f64,
    );
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default| args.get(at).and_then(|text| text.parse().ok()).unwrap_or(default);
    let (events, rows) = (number(0, 5_000_000), number(1, 16_384));
    for workload in workloads().iter().filter(|w| args.get(2).is_none_or(|name| w.name.starts_with(name.as_str()))) {
        run(workload, events, rows);
    }
    if args.get(2).is_none_or(|name| name == "tenants") {
        tenants(10_000);
    }
}
