//! The engine against batch SQL: whatever the order of events, the cuts into batches and the restarts in between,
//! a metric's final rows are those of the same SQL run once over all events.

mod alert; // what alert rules say
mod join; // reference tables and streams joined to a stream
mod limit; // metrics that hold more state than they may
mod program; // random streams and metrics over them
mod random;

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt32Array,
};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{Float64Type, Int64Type, SchemaRef, TimestampMicrosecondType};
use datafusion::catalog::{MemTable, MemorySchemaProvider, SchemaProvider};
use datafusion::prelude::{SessionConfig, SessionContext};
use engine::checkpoint::{Saved, State};
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::Timing;
use engine::program::Program;
use engine::window::Window;
use engine::workspace::{Outputs, Workspace};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sql::plan::{MetricSql, Planner, with_bounds};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use streams::schema::built_in;

const COLUMNS: &str = "count(*) AS trades, sum(qty) AS volume, sum(price * qty) / sum(qty) AS vwap, min(price) AS low, max(price) AS high";
const TUMBLE: &str = "tumble(ts, INTERVAL '1 minute')";
const HOP: &str = "hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes')";
const CUMULATE: &str = "cumulate(ts, INTERVAL '10 minutes', INTERVAL '1 day')";
const SESSION: &str = "session(ts, INTERVAL '2 seconds')";

fn trades_schema() -> SchemaRef {
    built_in()[0].arrow().clone()
}

fn metric() -> ItemName {
    "under_test".parse().unwrap()
}

fn trades() -> StreamName {
    "market.trades".parse().unwrap()
}

fn planned(sql: &str) -> Arc<Program> {
    let schema = |stream: &StreamName| built_in().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
    futures::executor::block_on(Planner::default().program(sql, schema))
        .unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// Trades as one batch: event time in microseconds, symbol, price, quantity.
fn batch(rows: &[(i64, &str, f64, f64)]) -> RecordBatch {
    let column = |f: fn(&(i64, &str, f64, f64)) -> f64| Arc::new(Float64Array::from_iter_values(rows.iter().map(f)));
    let none = || Arc::new(StringArray::new_null(rows.len())) as ArrayRef;
    let ts = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.0)).with_timezone("+00:00");
    let symbols = StringArray::from_iter_values(rows.iter().map(|r| r.1));
    let columns: Vec<ArrayRef> =
        vec![Arc::new(ts), none(), Arc::new(symbols), column(|r| r.2), column(|r| r.3), none(), none(), none()];
    RecordBatch::try_new(trades_schema(), columns).unwrap()
}

/// Rows by window and key; of a corrected row the last version.
type Rows = BTreeMap<(i64, i64, String), Vec<Option<f64>>>;

fn collect(into: &mut Rows, batch: &RecordBatch, keys: usize) {
    let time = |at: usize| batch.column(at).as_primitive::<TimestampMicrosecondType>();
    for row in 0..batch.num_rows() {
        let key: Vec<String> = (2..2 + keys)
            .map(|at| arrow::util::display::array_value_to_string(batch.column(at), row).unwrap())
            .collect();
        let values = batch.columns()[2 + keys..]
            .iter()
            .map(|column| {
                column.is_valid(row).then(|| match column.data_type() {
                    arrow::datatypes::DataType::Int64 => column.as_primitive::<Int64Type>().value(row) as f64,
                    _ => column.as_primitive::<Float64Type>().value(row),
                })
            })
            .collect();
        into.insert((time(0).value(row), time(1).value(row), key.join("|")), values);
    }
}

fn take(into: &mut Rows, outputs: Outputs, keys: usize) {
    assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
    for rows in outputs.rows.iter().filter(|rows| rows.rows.revisions.is_some()) {
        collect(into, &rows.rows.batch, keys);
    }
}

/// The engine over `batches` in their order; saved and restored before each index in `restarts`.
fn engine_rows(program: &Arc<Program>, timing: Timing, batches: &[RecordBatch], restarts: &[usize]) -> Rows {
    let fresh = || {
        let mut workspace = Workspace::default();
        workspace.define(metric(), 1, program.clone(), timing).unwrap();
        workspace
    };
    let (mut workspace, mut state) = (fresh(), State::default());
    let mut rows = Rows::new();
    for (at, batch) in batches.iter().enumerate() {
        if restarts.contains(&at) {
            state.apply(workspace.save().unwrap().encode().unwrap());
            workspace = fresh();
            assert_eq!(workspace.restore(Saved::read(&state).unwrap()).unwrap(), []);
        }
        take(&mut rows, workspace.step(&trades(), batch), program.key_count());
        drop(workspace.tick(&metric())); // provisional rows come and go without a trace
    }
    take(&mut rows, workspace.idle(&trades(), Micros(i64::MAX / 2)), program.key_count());
    assert!(workspace.bytes() < 1024, "{} bytes of state are left behind after the last window", workspace.bytes());
    rows
}

/// The same SQL over all events at once, in plain DataFusion.
fn batch_rows(sql: &str, events: &RecordBatch) -> Rows {
    let parsed = MetricSql::parse(sql).unwrap();
    let rows = assigned(parsed.window, events, &["symbol"]);
    let mut table = Rows::new();
    for answer in query(&[(("market", "trades"), rows)], &parsed.statement.to_string()) {
        collect(&mut table, &answer, 1);
    }
    table
}

/// Every event once for each window that holds it, with the window's bounds behind; sessions by the columns `keys`.
fn assigned(window: Window, events: &RecordBatch, keys: &[&str]) -> RecordBatch {
    let ts = events.column_by_name("ts").unwrap().as_primitive::<TimestampMicrosecondType>().values();
    let mut held: Vec<(u32, i64, i64)> = Vec::new();
    if let Window::Session { gap } = window {
        let columns: Vec<ArrayRef> = keys.iter().map(|key| events.column_by_name(key).unwrap().clone()).collect();
        let text = |row: usize| -> Vec<String> {
            let value = |column: &ArrayRef| match column.is_null(row) {
                true => "NULL".to_owned(),
                false => format!("`{}`", arrow::util::display::array_value_to_string(column, row).unwrap()),
            };
            columns.iter().map(value).collect()
        };
        let mut order: Vec<(Vec<String>, i64, u32)> =
            (0..ts.len()).map(|row| (text(row), ts[row], row as u32)).collect();
        order.sort();
        for session in order.chunk_by(|a, b| a.0 == b.0 && b.1 - a.1 <= gap.0) {
            let (first, end) = (session[0].1, session[session.len() - 1].1 + gap.0);
            held.extend(session.iter().map(|(_, _, row)| (*row, first, end)));
        }
    } else {
        for (row, &at) in ts.iter().enumerate() {
            let mut end = window.first_end(Micros(at));
            while end <= window.last_end(Micros(at)) {
                let start = window.start(end);
                assert!(start.0 <= at && at < end.0);
                held.push((row as u32, start.0, end.0));
                end = end.plus(window.slide());
            }
        }
    }
    let rows = take_record_batch(events, &UInt32Array::from_iter_values(held.iter().map(|h| h.0))).unwrap();
    let bound = |f: fn(&(u32, i64, i64)) -> i64| -> ArrayRef {
        Arc::new(TimestampMicrosecondArray::from_iter_values(held.iter().map(f)).with_timezone("+00:00"))
    };
    let columns = rows.columns().iter().cloned().chain([bound(|h| h.1), bound(|h| h.2)]).collect();
    RecordBatch::try_new(with_bounds(events.schema_ref()), columns).unwrap()
}

/// Batch SQL over these tables, each of a schema and a name.
fn query(tables: &[((&str, &str), RecordBatch)], sql: &str) -> Vec<RecordBatch> {
    let context = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(1));
    for ((schema, table), rows) in tables {
        let provider = Arc::new(MemorySchemaProvider::new());
        let rows = MemTable::try_new(rows.schema(), vec![vec![rows.clone()]]).unwrap();
        provider.register_table((*table).to_owned(), Arc::new(rows)).unwrap();
        context.catalog("datafusion").unwrap().register_schema(schema, provider).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { context.sql(sql).await.unwrap().collect().await }).unwrap_or_else(|e| panic!("{sql}: {e}"))
}

/// Counts, integer-valued sums, minima and maxima to the bit; quotients to 1e-12 of their size, since a batch engine
/// adds in another order.
fn assert_same(ours: &Rows, truth: &Rows, what: &str) {
    assert_eq!(ours.len(), truth.len(), "{what}: number of rows");
    for ((key, our), (true_key, true_values)) in ours.iter().zip(truth) {
        assert_eq!(key, true_key, "{what}");
        for (at, (a, b)) in our.iter().zip(true_values).enumerate() {
            let same = match (a, b) {
                (Some(a), Some(b)) => a == b || (a - b).abs() <= 1e-12 * a.abs().max(b.abs()),
                (a, b) => a == b,
            };
            assert!(same, "{what}: {key:?} column {at}: {a:?} and {b:?}");
        }
    }
}

fn sql(window: &str) -> String {
    format!("SELECT window_start, window_end, symbol, {COLUMNS} FROM market.trades GROUP BY {window}, symbol")
}

/// One recorded file as `market.trades`.
fn recorded(path: &Path, symbol: &str) -> RecordBatch {
    let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(path).unwrap()).unwrap().build().unwrap();
    let batches: Vec<RecordBatch> = reader.map(|batch| batch.unwrap()).collect();
    let all = concat_batches(batches[0].schema_ref(), &batches).unwrap();
    let ints = |name: &str| {
        let column =
            arrow::compute::cast(all.column_by_name(name).unwrap(), &arrow::datatypes::DataType::Int64).unwrap();
        column.as_primitive::<Int64Type>().values().to_vec()
    };
    let (ts, price, size) = (ints("ts_ns"), ints("price_e4"), ints("size"));
    let rows: Vec<_> = (0..ts.len()).map(|i| (ts[i] / 1000, symbol, price[i] as f64 / 1e4, size[i] as f64)).collect();
    batch(&rows)
}

#[test]
fn real_trades_give_the_rows_of_one_batch_query_over_the_whole_file() {
    let folder = Path::new("../../shared/data/market/us_equity_ticks");
    if !folder.is_dir() {
        println!("skipped: the shared data folder is not beside the project");
        return;
    }
    for (symbol, day) in [("spy", 7), ("spy", 8), ("bac", 7), ("bac", 8), ("aig", 7), ("aig", 8)] {
        let events = recorded(&folder.join(format!("{symbol}_2013100{day}_trades.parquet")), symbol);
        let batches: Vec<RecordBatch> = (0..events.num_rows())
            .step_by(4096)
            .map(|from| events.slice(from, 4096.min(events.num_rows() - from)))
            .collect();
        for window in [TUMBLE, HOP, CUMULATE, SESSION] {
            let text = sql(window);
            let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
            let ours = engine_rows(&planned(&text), timing, &batches, &[3, 11]);
            assert!(ours.len() > 30, "{} rows", ours.len());
            assert_same(&ours, &batch_rows(&text, &events), &format!("{symbol} 10-0{day} {window}"));
        }
    }
}

/// Rows as they come out of steps that each bring events at these seconds: symbol, start and end of the window, their
/// count and revision; `-` before a row that is taken back.
fn told(window: &str, timing: Timing, steps: &[&[(i64, &str)]]) -> Vec<Vec<String>> {
    told_of_some(window, "", timing, steps)
}

/// The same of the groups that `rest`, which stands behind GROUP BY, chooses.
fn told_of_some(window: &str, rest: &str, timing: Timing, steps: &[&[(i64, &str)]]) -> Vec<Vec<String>> {
    let second = 1_000_000;
    let text = format!("SELECT symbol, count(*) AS trades FROM market.trades GROUP BY {window}, symbol {rest}");
    let mut workspace = Workspace::default();
    workspace.define(metric(), 1, planned(&text), timing).unwrap();
    let mut all = Vec::new();
    for events in steps {
        let rows: Vec<_> = events.iter().map(|&(at, symbol)| (at * second, symbol, 1.0, 1.0)).collect();
        let outputs = workspace.step(&trades(), &batch(&rows));
        assert_eq!(outputs.failures, []);
        let mut lines = Vec::new();
        for rows in outputs.rows.into_iter().map(|rows| rows.rows) {
            let line = |batch: &RecordBatch, row: usize| {
                let time = |at: usize| batch.column(at).as_primitive::<TimestampMicrosecondType>().value(row) / second;
                let number = batch.column(3).as_primitive::<Int64Type>().value(row);
                format!("{} {}-{} {number}", batch.column(2).as_string::<i32>().value(row), time(0), time(1))
            };
            if let Some(gone) = &rows.withdrawn {
                lines.extend((0..gone.num_rows()).map(|row| format!("- {}", line(gone, row))));
            }
            let revisions = rows.revisions.unwrap();
            lines.extend(
                (0..rows.batch.num_rows()).map(|row| format!("{} r{}", line(&rows.batch, row), revisions[row])),
            );
        }
        all.push(lines);
    }
    all
}

fn timing(delay: i64, lateness: i64) -> Timing {
    Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::seconds(lateness) }
}

#[test]
fn a_session_ends_a_gap_after_its_last_event_and_an_event_exactly_then_still_belongs() {
    let rows = told(
        "session(ts, INTERVAL '10 seconds')",
        timing(0, 0),
        &[&[(0, "A")], &[(5, "A"), (15, "A")], &[(25, "B")], &[(26, "B")], &[(37, "C")]],
    );
    assert_eq!(rows, [vec![], vec![], vec![], vec!["A 0-25 3 r0"], vec!["B 25-36 2 r0"]]);
}

#[test]
fn an_event_out_of_order_joins_two_open_sessions() {
    let rows = told(
        "session(ts, INTERVAL '10 seconds')",
        timing(20, 0),
        &[&[(0, "A"), (15, "A"), (15, "B")], &[(8, "A")], &[(100, "C")]],
    );
    assert_eq!(rows, [vec![], vec![], vec!["A 0-25 3 r0", "B 15-25 1 r0"]]);
}

#[test]
fn a_late_event_within_the_allowed_lateness_extends_and_joins_final_sessions() {
    let rows = told(
        "session(ts, INTERVAL '10 seconds')",
        timing(0, 100),
        &[&[(0, "A"), (20, "A")], &[(60, "B")], &[(3, "A")], &[(5, "A")], &[(12, "A")], &[(200, "B")], &[(20, "A")]],
    );
    let expected: [&[&str]; 7] = [
        &["A 0-10 1 r0"],
        &["A 20-30 1 r0"],
        &["- A 0-10 1", "A 0-13 2 r1"],
        &["- A 0-13 2", "A 0-15 3 r2"],
        &["- A 0-15 3", "- A 20-30 1", "A 0-30 5 r3"],
        &["B 60-70 1 r0"],
        &[], // past its lateness
    ];
    assert_eq!(rows, expected);
}

#[test]
fn a_late_event_can_open_a_final_session_again() {
    let rows = told(
        "session(ts, INTERVAL '10 seconds')",
        timing(0, 100),
        &[&[(0, "A"), (11, "B")], &[(9, "A")], &[(20, "B")], &[(31, "C")]],
    );
    let expected: [&[&str]; 4] = [&["A 0-10 1 r0"], &["- A 0-10 1"], &["A 0-19 2 r1"], &["B 11-30 2 r0"]];
    assert_eq!(rows, expected);
}

#[test]
fn a_late_event_that_changes_the_top_rows_of_a_final_window_withdraws_those_that_leave() {
    let rows = told_of_some(
        "tumble(ts, INTERVAL '10 seconds')",
        "ORDER BY trades DESC LIMIT 1",
        timing(0, 100),
        &[&[(0, "A"), (1, "A"), (2, "B"), (10, "C")], &[(3, "B"), (4, "B")], &[(5, "A"), (6, "A")], &[(7, "B")]],
    );
    let expected: [&[&str]; 4] =
        [&["A 0-10 2 r0"], &["- A 0-10 1", "B 0-10 3 r0"], &["- B 0-10 1", "A 0-10 4 r2"], &["A 0-10 4 r2"]];
    assert_eq!(rows, expected);
}

#[test]
fn a_cumulating_window_gives_a_final_row_each_step_and_starts_over() {
    let rows = told(
        "cumulate(ts, INTERVAL '10 seconds', INTERVAL '30 seconds')",
        timing(0, 30),
        &[&[(-5, "A"), (3, "A")], &[(25, "B")], &[(7, "A")], &[(30, "A")]],
    );
    let expected: [&[&str]; 4] = [
        &["A -30-0 1 r0"],
        &["A 0-10 1 r0", "A 0-20 1 r0"],
        &["A 0-10 2 r1", "A 0-20 2 r1"],
        &["A 0-30 2 r0", "B 0-30 1 r0"],
    ];
    assert_eq!(rows, expected);
}

#[test]
fn a_final_row_comes_once_and_a_late_event_within_the_allowed_lateness_corrects_it() {
    let program = planned(&sql("tumble(ts, INTERVAL '10 seconds')"));
    let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(20) };
    let mut workspace = Workspace::default();
    workspace.define(metric(), 1, program, timing).unwrap();
    let mut step = |rows: &[(i64, &str, f64, f64)]| -> Vec<(i64, i64, f64)> {
        let second = 1_000_000;
        let rows: Vec<_> = rows.iter().map(|&(at, s, p, q)| (at * second, s, p, q)).collect();
        let outputs = workspace.step(&trades(), &batch(&rows));
        let finals = outputs.rows.iter().filter_map(|r| Some((&r.rows.batch, r.rows.revisions.as_ref()?)));
        finals
            .flat_map(|(batch, revisions)| {
                let start = batch.column(0).as_primitive::<TimestampMicrosecondType>();
                let volume = batch.column(4).as_primitive::<Float64Type>();
                (0..batch.num_rows())
                    .map(|r| (start.value(r) / second, revisions[r], volume.value(r)))
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    assert_eq!(step(&[(3, "A", 100.0, 2.0)]), []);
    assert_eq!(step(&[(10, "A", 101.0, 1.0)]), [(0, 0, 2.0)]);
    assert_eq!(step(&[(7, "A", 110.0, 2.0)]), [(0, 1, 4.0)]);
    assert_eq!(step(&[(9, "A", 110.0, 1.0)]), [(0, 2, 5.0)]);
    assert_eq!(step(&[(29, "A", 1.0, 1.0)]), [(10, 0, 1.0)]);
    assert_eq!(step(&[(30, "A", 1.0, 1.0), (8, "A", 1.0, 50.0)]), [(20, 0, 1.0)], "past its lateness a window stays");
    assert_eq!(workspace.streams().next().unwrap().1.late, 1);
}

#[test]
fn the_top_rows_of_each_window_are_kept_and_ties_go_to_the_smaller_key() {
    let text = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol \
                ORDER BY volume DESC LIMIT 2";
    let rows =
        [(1, "C", 1.0, 5.0), (2, "B", 1.0, 5.0), (3, "A", 1.0, 1.0), (4, "D", 1.0, 9.0), (11_000_000, "A", 1.0, 1.0)];
    let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO };
    let ours = engine_rows(&planned(text), timing, &[batch(&rows)], &[]);
    let keys: Vec<&str> = ours.keys().map(|(_, _, key)| key.as_str()).collect();
    assert_eq!(keys, ["B", "D", "A"]);
}

fn refused(sql: &str, line: u64, column: u64, message: &str) {
    let schema = |stream: &StreamName| built_in().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
    let error = futures::executor::block_on(Planner::default().program(sql, schema)).expect_err(sql);
    assert!(error.to_string().contains(message), "{sql}\n{error}");
    assert_eq!((error.line, error.column), (Some(line), Some(column)), "{sql}\n{error}");
}

#[test]
fn sql_that_cannot_be_a_metric_is_refused_with_its_place_and_what_to_write() {
    refused("SELEC 1", 1, 1, "SELEC");
    refused("SELECT count(*) FROM market.trades\nGROUP BY symbl, tumble(ts, INTERVAL '1 minute')", 2, 10, "symbl");
    refused("SELECT count(*) FROM market.trades GROUP BY symbol", 1, 1, "add a window to GROUP BY");
    refused(
        "SELECT count(*) FROM market.nothing GROUP BY tumble(ts, INTERVAL '1 minute')",
        1,
        22,
        "no stream `market.nothing`",
    );
    refused(
        "SELECT count(*) FROM market.trades GROUP BY tumble(price, INTERVAL '1 minute')",
        1,
        52,
        "first argument is ts",
    );
    refused("SELECT count(*) FROM market.trades GROUP BY tumble(ts, qty)", 1, 56, "constant interval");
    refused("SELECT count(*) FROM market.trades GROUP BY tumble(ts, INTERVAL '0 seconds')", 1, 45, "longer than zero");
    refused(
        "SELECT count(*) FROM market.trades GROUP BY hop(ts, INTERVAL '2 minutes', INTERVAL '1 minute')",
        1,
        45,
        "longer than size",
    );
    refused("SELECT count(*) FROM market.trades GROUP BY tumble(ts, INTERVAL '1 month')", 1, 65, "use days");
    for call in [
        "tumble(ts, INTERVAL '-1 minute')",
        "hop(ts, INTERVAL '0 seconds', INTERVAL '1 minute')",
        "hop(ts, INTERVAL '-1 second', INTERVAL '1 minute')",
        "hop(ts, INTERVAL '1 second', INTERVAL '0 minutes')",
        "cumulate(ts, INTERVAL '0 seconds', INTERVAL '1 minute')",
        "cumulate(ts, INTERVAL '1 second', INTERVAL '-1 minute')",
        "session(ts, INTERVAL '0 seconds')",
    ] {
        refused(&format!("SELECT count(*) FROM market.trades GROUP BY {call}"), 1, 45, "longer than zero");
    }
    refused(
        "SELECT count(*) FROM market.trades GROUP BY session(INTERVAL '1 minute')",
        1,
        45,
        "takes ts and 1 constant",
    );
    refused("SELECT count(*) FROM market.trades GROUP BY session(ts, INTERVAL '-1 second')", 1, 45, "longer than zero");
    refused("SELECT count(*) FROM market.trades GROUP BY session(ts)", 1, 45, "takes ts and 1 constant");
    refused(
        "SELECT count(*) FROM market.trades GROUP BY cumulate(ts, INTERVAL '2 minutes', INTERVAL '5 minutes')",
        1,
        45,
        "no multiple of step",
    );
    refused(
        "SELECT symbol, count(*) AS n FROM market.trades GROUP BY session(ts, INTERVAL '1 minute'), symbol ORDER BY n LIMIT 3",
        1,
        1,
        "every session is one of its own",
    );
    refused("SELECT nosuch(price) FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')", 1, 8, "nosuch");
    refused("SELECT sum(venue) FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')", 1, 8, "sum");
    refused(
        "SELECT a.price FROM market.trades a, market.quotes b GROUP BY tumble(ts, INTERVAL '1 minute')",
        1,
        38,
        "a comma in FROM is not supported",
    );
}

/// Rows of `SELECT symbol, {call} AS v` over trades of prices and quantities in one second, or why the metric stopped.
fn computed(call: &str, trades_of: &[(&str, f64, f64)]) -> Result<Vec<Option<f64>>, String> {
    let text =
        format!("SELECT symbol, {call} AS v FROM market.trades GROUP BY tumble(ts, INTERVAL '1 second'), symbol");
    let rows: Vec<_> = trades_of.iter().map(|&(symbol, price, qty)| (0, symbol, price, qty)).collect();
    let mut workspace = Workspace::default();
    workspace.define(metric(), 1, planned(&text), timing(0, 0)).unwrap();
    let mut found = Rows::new();
    let outputs = [workspace.step(&trades(), &batch(&rows)), workspace.idle(&trades(), Micros(i64::MAX / 2))];
    for outputs in outputs {
        if let Some(failure) = outputs.failures.first() {
            return Err(failure.stop.reason.clone());
        }
        take(&mut found, outputs, 1);
    }
    Ok(found.into_values().map(|values| values[0]).collect())
}

#[test]
fn what_is_divided_by_zero_is_null_and_the_metric_goes_on() {
    let trades = [("A", 1.0, 0.0), ("A", 2.0, 4.0), ("B", 3.0, 0.0)];
    let int = |call: &str| {
        computed(&call.replace("price", "CAST(price AS BIGINT)").replace("qty", "CAST(qty AS BIGINT)"), &trades)
    };
    assert_eq!(int("sum(price) / sum(qty)"), Ok(vec![Some(0.0), None]));
    assert_eq!(int("sum(price % qty)"), Ok(vec![Some(2.0), None]));
    assert_eq!(int("count(*) / (count(*) - 1)"), Ok(vec![Some(2.0), None]));
    assert_eq!(int("count(*) / 0"), Ok(vec![None, None]));
    // doubles have an infinity, and rows do not
    assert_eq!(computed("sum(price) / sum(qty)", &trades), Ok(vec![Some(0.75), None]));
}

#[test]
fn looks_and_checkpoints_change_no_digit() {
    let text = "SELECT symbol, stddev(price) AS s, var_pop(price) AS v, corr(price, qty) AS c, regr_slope(price, qty) AS r \
                FROM market.trades GROUP BY hop(ts, INTERVAL '1 second', INTERVAL '3 seconds'), symbol";
    let run = |looks: bool| {
        let (mut workspace, mut found) = (Workspace::default(), Rows::new());
        workspace.define(metric(), 1, planned(text), timing(0, 0)).unwrap();
        for at in 0..200 {
            let price = f64::from(at * 37 % 101) / 7.0 + 0.1;
            let rows = [(i64::from(at) * 50_000, "A", price, f64::from(at % 13) / 3.0)];
            take(&mut found, workspace.step(&trades(), &batch(&rows)), 1);
            if looks {
                drop((workspace.tick(&metric()), workspace.save().unwrap()));
            }
        }
        found
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn keys_that_are_no_finite_number_are_the_null_key() {
    let text = "SELECT price / qty AS ratio, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 second'), price / qty";
    let mut workspace = Workspace::default();
    workspace.define(metric(), 1, planned(text), timing(0, 0)).unwrap();
    let ratios = [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (4.0, 2.0)];
    let rows: Vec<_> = ratios.iter().map(|&(price, qty)| (0, "A", price, qty)).collect();
    let mut found = Rows::new();
    for outputs in [workspace.step(&trades(), &batch(&rows)), workspace.idle(&trades(), Micros(i64::MAX / 2))] {
        take(&mut found, outputs, 1);
    }
    let mut counts: Vec<_> = found.into_values().map(|values| values[0]).collect();
    counts.sort_by(|a, b| a.partial_cmp(b).unwrap());
    assert_eq!(counts, [Some(1.0), Some(3.0)]);
}

#[test]
fn a_row_that_filter_leaves_out_need_not_have_a_value() {
    let trades = [("17", 9.0e18, -4.0), ("x", 2.0, 9.0)];
    let of = |call: &str| {
        let call = call.replace("price", "CAST(price AS BIGINT)");
        computed(&call, &trades).map(|values| values.into_iter().flatten().collect::<Vec<_>>())
    };
    assert_eq!(of("max(symbol::bigint) FILTER (WHERE symbol ~ '^[0-9]+$')"), Ok(vec![17.0]));
    assert_eq!(of("max(price * 4) FILTER (WHERE price < 1000)"), Ok(vec![8.0]));
    assert_eq!(of("max(sqrt(qty)) FILTER (WHERE qty >= 0)"), Ok(vec![3.0]));
    assert!(of("max(symbol::bigint)").is_err(), "without one the metric stops");
}

#[test]
fn an_integer_that_does_not_fit_stops_the_metric_with_a_clear_error_and_never_wraps() {
    let trades = [("A", 4.0e18, 1.0), ("A", 4.0e18, 2.0), ("A", 4.0e18, 3.0)];
    for call in [
        "sum(CAST(price AS BIGINT))",
        "sum(CAST(price AS BIGINT) * 3)",
        "max(CAST(price AS BIGINT) + CAST(price AS BIGINT) + CAST(price AS BIGINT))",
        "max(CAST(price AS BIGINT)) + max(CAST(price AS BIGINT)) + min(CAST(price AS BIGINT))",
        "-9 - max(CAST(price AS BIGINT)) - max(CAST(price AS BIGINT)) - max(CAST(price AS BIGINT))",
        "count(*) FILTER (WHERE CAST(price AS BIGINT) * 5 > 0)",
        "sum(DISTINCT CAST(price + qty * 1.0e6 AS BIGINT))",
        "max(-(CAST(-price - price AS BIGINT) - CAST(price / 4.0e18 * 1223372036854775808 AS BIGINT)))",
        "max(-(-9223372036854775807 - CAST(price / 4.0e18 AS BIGINT)))",
        "-(min(-9223372036854775807 - CAST(price / 4.0e18 AS BIGINT)))",
        "CAST(sum(CAST(price * 2.0e19 AS DECIMAL(38, 0))) AS DOUBLE)",
        "CAST(sum(DISTINCT CAST(price * 2.0e19 + qty * 1.0e30 AS DECIMAL(38, 0))) AS DOUBLE)",
    ] {
        let error = computed(call, &trades).expect_err(call).to_lowercase();
        assert!(error.contains("overflow"), "{call}: {error}");
    }
}

#[test]
fn of_rows_at_one_instant_the_first_and_last_are_by_arrival_however_they_are_cut() {
    let calls = [
        "first_value(price ORDER BY ts)",
        "last_value(price ORDER BY ts)",
        "first_value(price ORDER BY ts DESC)",
        "last_value(price ORDER BY ts DESC)",
        "last_value(price ORDER BY qty)",
        "nth_value(price, 2 ORDER BY ts, price)",
        "nth_value(price, -1 ORDER BY ts DESC, price)",
        "sum(DISTINCT qty)",
    ];
    let sql = |call: &str| {
        format!(
            "SELECT window_start, window_end, symbol, {call} AS v FROM market.trades \
             GROUP BY tumble(ts, INTERVAL '1 minute'), symbol"
        )
    };
    let events: Vec<(i64, &str, f64, f64)> = (0..60)
        .map(|n| ((n * 7 % 12) * 1_000_000, if n % 3 == 0 { "A" } else { "B" }, n as f64, (n * 5 % 4) as f64))
        .collect();
    for call in calls {
        // batch SQL leaves open which of equals comes first; prices rise with arrival
        let told = ["ts", "ts DESC", "qty"].iter().fold(sql(call), |sql, order| {
            sql.replace(&format!("ORDER BY {order})"), &format!("ORDER BY {order}, price)"))
        });
        let truth = batch_rows(&told, &batch(&events));
        for size in [1, 7, 60] {
            let cut: Vec<RecordBatch> = events.chunks(size).map(batch).collect();
            let ours = engine_rows(&planned(&sql(call)), timing(60, 0), &cut, &[1, 4]);
            assert_same(&ours, &truth, &format!("{call}, requests of {size}"));
        }
    }
}

#[test]
fn zero_is_one_key_and_one_value_whatever_its_sign() {
    let sql = "SELECT symbol, qty AS size, count(*) AS n, count(DISTINCT price) AS prices \
        FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol, qty";
    let events = batch(&[(0, "A", 0.0, -0.0), (1, "A", -0.0, 0.0), (2, "A", 1.0, 0.0)]);
    let ours = engine_rows(&planned(sql), timing(0, 0), &[events], &[]);
    assert_eq!(ours.into_iter().collect::<Vec<_>>(), [((0, 60_000_000, "A|0.0".into()), vec![Some(3.0), Some(2.0)])]);
}

#[test]
fn windows_of_the_planner_are_those_that_were_written() {
    let window =
        |text: &str| MetricSql::parse(&format!("SELECT count(*) FROM market.trades GROUP BY {text}")).unwrap().window;
    assert_eq!(window("tumble(ts, INTERVAL '90' SECOND)"), Window::tumble(Span::seconds(90)).unwrap());
    assert_eq!(
        window("HOP(ts, INTERVAL '1 day', INTERVAL '7 days')"),
        Window::hop(Span::seconds(86_400), Span::seconds(604_800)).unwrap()
    );
    assert_eq!(window("session(ts, INTERVAL '30 seconds')"), Window::session(Span::seconds(30)).unwrap());
    assert_eq!(
        window("cumulate(ts, INTERVAL '1 minute', INTERVAL '1 day')"),
        Window::cumulate(Span::seconds(60), Span::seconds(86_400)).unwrap()
    );
    assert_eq!(window("tumble(ts, INTERVAL '1 hour 30 minutes')"), Window::tumble(Span::seconds(5_400)).unwrap());
}

/// The golden outputs of another engine's own tests over the same inputs.
mod arroyo {
    use super::*;
    use serde_json::Value;
    use streams::schema::{Column, StreamSchema, UnknownFields};

    fn lines(name: &str) -> Option<Vec<Value>> {
        let path = Path::new("../../shared/data/truth/windows_arroyo").join(name);
        let Ok(bytes) = std::fs::read(&path) else {
            println!("skipped: {} is not beside the project", path.display());
            return None;
        };
        let text = String::from_utf8(bytes).unwrap();
        Some(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn micros(value: &Value) -> i64 {
        let text = value.as_str().unwrap();
        let zoned = if text.contains(['+', 'Z']) { text.to_owned() } else { format!("{text}Z") };
        chrono::DateTime::parse_from_rfc3339(&zoned).unwrap().timestamp_micros()
    }

    /// The final rows of `sql` over the 100 impulses.
    fn impulses(sql: &str) -> Option<Rows> {
        let counters: Vec<(i64, i64)> = lines("inputs/impulse.json")?
            .iter()
            .map(|e| (micros(&e["timestamp"]), e["counter"].as_i64().unwrap()))
            .collect();
        let column = Column { name: "counter".into(), kind: "int64".parse().unwrap(), nullable: false };
        let schema = StreamSchema::new("test.impulse".parse().unwrap(), vec![column], UnknownFields::Ignore).unwrap();
        let program =
            futures::executor::block_on(Planner::default().program(sql, |_| Some(schema.arrow().clone()))).unwrap();
        let column = |name: &str| -> ArrayRef {
            match name {
                "ts" => {
                    let ts = TimestampMicrosecondArray::from_iter_values(counters.iter().map(|c| c.0));
                    Arc::new(ts.with_timezone("+00:00"))
                }
                "counter" => Arc::new(arrow::array::Int64Array::from_iter_values(counters.iter().map(|c| c.1))),
                _ => Arc::new(StringArray::new_null(counters.len())),
            }
        };
        let columns = schema.arrow().fields().iter().map(|field| column(field.name())).collect();
        let events = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
        let mut workspace = Workspace::default();
        workspace.define(metric(), 1, program.clone(), timing(1, 0)).unwrap();
        let mut rows = Rows::new();
        take(&mut rows, workspace.step(&schema.stream, &events), program.key_count());
        take(&mut rows, workspace.idle(&schema.stream, Micros(i64::MAX / 2)), program.key_count());
        Some(rows)
    }

    #[test]
    fn sessions_are_those_of_arroyo() {
        let sql = "SELECT CASE WHEN counter % 10 = 0 THEN 0 ELSE counter END AS user_id, count(*) AS n FROM test.impulse \
                   GROUP BY session(ts, INTERVAL '20 seconds'), CASE WHEN counter % 10 = 0 THEN 0 ELSE counter END";
        let (Some(ours), Some(golden)) = (impulses(sql), lines("golden/session_window.json")) else { return };
        let golden: Rows = (golden.iter())
            .map(|row| {
                let key = (micros(&row["start"]), micros(&row["end"]), row["user_id"].to_string());
                (key, vec![row["rows"].as_f64()])
            })
            .collect();
        assert_eq!(ours, golden);
    }

    #[test]
    fn hopping_windows_are_those_of_arroyo() {
        let sql = "SELECT count(*) AS n, min(counter) AS low, max(counter) AS high FROM test.impulse \
                   GROUP BY hop(ts, INTERVAL '2 seconds', INTERVAL '10 seconds')";
        let (Some(ours), Some(golden)) = (impulses(sql), lines("golden/sliding_window_end.json")) else { return };
        let golden: Rows = (golden.iter())
            .map(|row| {
                let values = ["count", "min", "max"].map(|name| row[name].as_f64()).to_vec();
                ((micros(&row["start"]), micros(&row["end"]), String::new()), values)
            })
            .collect();
        assert_eq!(ours, golden);
    }
}

#[test]
fn a_zero_divisor_makes_a_row_null_and_the_metric_goes_on() {
    for value in [
        "1 / (count(*) - count(*))",
        "sum(CAST(price AS bigint) / CAST(qty AS bigint))",
        "7 % (count(*) - count(*))",
        "sum(CAST(price AS decimal(10, 2)) / CAST(qty AS decimal(10, 2)))",
    ] {
        let sql = format!("SELECT count(*) AS n, CAST({value} AS double) AS v FROM market.trades GROUP BY {TUMBLE}");
        let program = planned(&sql);
        let rows = engine_rows(
            &program,
            Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO },
            &[batch(&[(1, "A", 5.0, 0.0)])],
            &[],
        );
        assert_eq!(rows.into_values().collect::<Vec<_>>(), [[Some(1.0), None]], "{value}");
    }
}
