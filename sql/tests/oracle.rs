//! The engine against batch SQL: whatever the order of events, the cuts into batches and the restarts in between,
//! a metric's final rows are those of the same SQL run once over all events.

#[path = "oracle/join.rs"]
mod join; // reference tables and streams joined to a stream

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt32Array,
};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{Float64Type, Int64Type, SchemaRef, TimestampMicrosecondType};
use datafusion::catalog::{MemTable, MemorySchemaProvider, SchemaProvider};
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement;
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::Timing;
use engine::program::Program;
use engine::window::Window;
use engine::workspace::{Outputs, Saved, Workspace};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proptest::prelude::*;
use sql::plan::{MetricSql, Planner, with_bounds};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use streams::schema::built_in;

const COLUMNS: &str = "count(*) AS trades, sum(qty) AS volume, sum(price * qty) / sum(qty) AS vwap, min(price) AS low, max(price) AS high";
const TUMBLE: &str = "tumble(ts, INTERVAL '1 minute')";
const HOP: &str = "hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes')";

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
    let mut workspace = fresh();
    let mut rows = Rows::new();
    for (at, batch) in batches.iter().enumerate() {
        if restarts.contains(&at) {
            let bytes = workspace.save().unwrap();
            workspace = fresh();
            assert_eq!(workspace.restore(Saved::read(&bytes).unwrap()).unwrap(), []);
        }
        take(&mut rows, workspace.step(&trades(), batch), program.key_count());
        drop(workspace.tick(&metric())); // provisional rows come and go without a trace
    }
    take(&mut rows, workspace.idle(&trades(), Micros(i64::MAX / 2)), program.key_count());
    assert_eq!(workspace.bytes() / 1024, 0, "state is left behind after the last window");
    rows
}

/// The same SQL over all events at once, in plain DataFusion: every event once for each window that holds it.
fn batch_rows(sql: &str, events: &RecordBatch) -> Rows {
    let parsed = MetricSql::parse(sql).unwrap();
    let ts = events.column(0).as_primitive::<TimestampMicrosecondType>();
    let (slide, size) = (parsed.window.slide().0, parsed.window.size().0);
    let schema = with_bounds(events.schema_ref());
    let mut parts = Vec::new();
    for k in 0..=(size - 1) / slide {
        // the k-th window before the last one that holds the event, where it still holds it
        let start = |at: i64| at - at.rem_euclid(slide) - k * slide;
        let inside: Vec<u32> =
            (0..ts.len() as u32).filter(|&row| start(ts.value(row as usize)) + size > ts.value(row as usize)).collect();
        let part = if inside.len() == ts.len() {
            events.clone()
        } else {
            take_record_batch(events, &UInt32Array::from(inside)).unwrap()
        };
        let ts = part.column(0).as_primitive::<TimestampMicrosecondType>();
        let column = |shift: i64| -> ArrayRef {
            Arc::new(
                TimestampMicrosecondArray::from_iter_values(ts.values().iter().map(|&at| start(at) + shift))
                    .with_timezone("+00:00"),
            )
        };
        let columns = part.columns().iter().cloned().chain([column(0), column(size)]).collect();
        parts.push(RecordBatch::try_new(schema.clone(), columns).unwrap());
    }
    let context = SessionContext::new();
    let tables = Arc::new(MemorySchemaProvider::new());
    tables.register_table("trades".into(), Arc::new(MemTable::try_new(schema, vec![parts]).unwrap())).unwrap();
    context.catalog("datafusion").unwrap().register_schema("market", tables).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let answers = runtime.block_on(async {
        let statement = Statement::Statement(Box::new(parsed.statement));
        let plan = context.state().statement_to_plan(statement).await.unwrap();
        context.execute_logical_plan(plan).await.unwrap().collect().await.unwrap()
    });
    let mut rows = Rows::new();
    for answer in answers {
        collect(&mut rows, &answer, 1);
    }
    rows
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
        for window in [TUMBLE, HOP] {
            let text = sql(window);
            let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
            let ours = engine_rows(&planned(&text), timing, &batches, &[3, 11]);
            assert!(ours.len() > 300, "{} rows", ours.len());
            assert_same(&ours, &batch_rows(&text, &events), &format!("{symbol} 10-0{day} {window}"));
        }
    }
}

fn event() -> impl Strategy<Value = (i64, &'static str, f64, f64)> {
    // around the epoch, so that windows before it are met too; prices and sizes whose sums are exact
    let price = prop_oneof![4 => (1..4000i32).prop_map(|p| f64::from(p) / 8.0), 1 => (-8..8i32).prop_map(f64::from)];
    (
        -400_000_000..400_000_000i64,
        prop::sample::select(vec!["A", "B", "C", ""]),
        price,
        (1..100i32).prop_map(f64::from),
    )
}

fn windows() -> impl Strategy<Value = String> {
    prop_oneof![
        (1..120i64).prop_map(|s| format!("tumble(ts, INTERVAL '{s} seconds')")),
        (1..40i64, 0..80i64).prop_map(|(slide, more)| {
            format!("hop(ts, INTERVAL '{slide} seconds', INTERVAL '{} seconds')", slide + more)
        }),
    ]
}

fn clauses() -> impl Strategy<Value = (&'static str, &'static str)> {
    let filters = prop::sample::select(vec!["", "WHERE price > 100", "WHERE symbol <> 'A'", "WHERE price > 1e9"]);
    let having = prop::sample::select(vec!["", "HAVING count(*) > 1", "HAVING sum(qty) < 100"]);
    (filters, having)
}

/// Cuts events into batches of the given sizes, over and over.
fn cut(rows: &[(i64, &'static str, f64, f64)], sizes: &[usize]) -> Vec<RecordBatch> {
    let mut batches = Vec::new();
    let (mut from, mut sizes) = (0, sizes.iter().cycle());
    while from < rows.len() {
        let size = (*sizes.next().unwrap()).min(rows.len() - from);
        batches.push(batch(&rows[from..from + size]));
        from += size;
    }
    batches
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// With a watermark that waits for all, no order, cut or restart changes an answer.
    #[test]
    fn any_order_any_cut_and_any_restart_give_the_rows_of_batch_sql(
        rows in prop::collection::vec(event(), 1..120),
        sizes in prop::collection::vec(1..40usize, 1..5),
        restarts in prop::collection::vec(0..20usize, 0..3),
        window in windows(),
        (filter, having) in clauses(),
    ) {
        let text = format!(
            "SELECT window_start, window_end, symbol, {COLUMNS}, count(DISTINCT qty) AS sizes, avg(price) AS mean, \
             sum(qty) FILTER (WHERE price > 50) AS dear, max(price) - min(price) AS spread, coalesce(sum(qty) FILTER (WHERE price > 1e6), 0) AS none \
             FROM market.trades {filter} GROUP BY {window}, symbol {having}"
        );
        let timing = Timing { max_delay: Span::seconds(100_000), allowed_lateness: Span::ZERO };
        let ours = engine_rows(&planned(&text), timing, &cut(&rows, &sizes), &restarts);
        assert_same(&ours, &batch_rows(&text, &batch(&rows)), &text);
    }

    /// Lateness is judged by the events before, so the cut into batches changes nothing even when events are dropped.
    #[test]
    fn the_cut_into_batches_never_decides_which_event_is_late(
        rows in prop::collection::vec(event(), 1..120),
        sizes in prop::collection::vec(1..40usize, 1..5),
        delay in 0..200i64,
        lateness in prop::sample::select(vec![0i64, 0, 60, 300]),
        window in windows(),
    ) {
        let program = planned(&sql(&window));
        let timing = Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::seconds(lateness) };
        let one_by_one = engine_rows(&program, timing, &cut(&rows, &[1]), &[]);
        let cut_up = engine_rows(&program, timing, &cut(&rows, &sizes), &[1, 4]);
        assert_same(&cut_up, &one_by_one, &format!("{window} delay {delay} lateness {lateness}"));
    }
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
    refused("SELECT nosuch(price) FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')", 1, 8, "nosuch");
    refused("SELECT sum(venue) FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')", 1, 8, "sum");
    refused(
        "SELECT a.price FROM market.trades a, market.quotes b GROUP BY tumble(ts, INTERVAL '1 minute')",
        1,
        38,
        "a comma in FROM is not supported",
    );
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
    assert_eq!(window("tumble(ts, INTERVAL '1 hour 30 minutes')"), Window::tumble(Span::seconds(5_400)).unwrap());
}
