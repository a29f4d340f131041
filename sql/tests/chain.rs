//! Metrics over metrics against batch SQL: whatever the order of events, their cuts, the restarts in between and the
//! corrections of late events, the rows are those of the same SQL run once over the final rows of the metric they read.

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, TimestampMicrosecondType, UInt64Type};
use engine::checkpoint::{Saved, State};
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::{Rows, Timing};
use engine::program::Program;
use engine::window::Window;
use engine::workspace::{Outputs, Workspace};
use proptest::prelude::*;
use sql::plan::{Planner, Source};
use sql::query::{Bounds, Question, Table};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::schema::built_in;

const SECOND: i64 = 1_000_000;

type Trade = (i64, &'static str, &'static str, f64, f64);

fn name(text: &str) -> ItemName {
    text.parse().unwrap()
}

fn trades() -> StreamName {
    "market.trades".parse().unwrap()
}

/// Trades as one batch: event time in microseconds, symbol, venue, price, quantity.
fn batch(rows: &[Trade]) -> RecordBatch {
    let schema = built_in()[0].arrow().clone();
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "ts" => {
                Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.0)).with_timezone("+00:00"))
            }
            "symbol" => Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1))),
            "venue" => Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.2))),
            "price" => Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.3))),
            "qty" => Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.4))),
            _ => Arc::new(StringArray::new_null(rows.len())),
        }
    });
    RecordBatch::try_new(schema.clone(), columns.collect()).unwrap()
}

/// Metrics by name, each planned over those before it.
struct Chain(Vec<(ItemName, Arc<Program>)>);

impl Chain {
    fn new(metrics: &[(&str, &str)]) -> Result<Chain, sql::SqlError> {
        let planner = Planner::default();
        let mut planned: Vec<(ItemName, Arc<Program>)> = Vec::new();
        for (metric, text) in metrics {
            let source = |stream: &StreamName| match stream.metric() {
                Some(metric) => {
                    planned.iter().find(|(name, _)| *name == metric).map(|(_, p)| Source::Metric(p.clone()))
                }
                None => built_in().iter().find(|s| s.stream == *stream).map(|s| Source::Stream(s.arrow().clone())),
            };
            let program = futures::executor::block_on(planner.program(text, source))?;
            planned.push((name(metric), program));
        }
        Ok(Chain(planned))
    }

    fn workspace(&self, timing: Timing) -> Workspace {
        let mut workspace = Workspace::default();
        for (metric, program) in &self.0 {
            workspace.define(metric.clone(), 1, program.clone(), timing).unwrap();
        }
        workspace
    }

    fn program(&self, metric: &str) -> &Arc<Program> {
        &self.0.iter().find(|(known, _)| known.as_str() == metric).unwrap().1
    }
}

/// Of each metric, by window and key: the last revision and its row, an empty batch where it was withdrawn.
type Finals = BTreeMap<String, BTreeMap<(i64, i64, String), (i64, RecordBatch)>>;

fn collect(into: &mut Finals, chain: &Chain, outputs: Outputs) {
    assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
    for rows in outputs.rows {
        let Some(revisions) = &rows.rows.revisions else { continue };
        let known = into.entry(rows.metric.to_string()).or_default();
        let program = chain.program(rows.metric.as_str());
        let keys = program.key_count();
        if let Some(gone) = &rows.rows.withdrawn {
            let by = gone.column(gone.num_columns() - 1).as_primitive::<Int64Type>();
            for row in 0..gone.num_rows() {
                let before = known.insert(key(gone, row, keys), (by.value(row), rows.rows.batch.slice(0, 0)));
                assert!(before.is_none_or(|(last, _)| last < by.value(row)), "{}: {gone:?}", rows.metric);
            }
        }
        for (row, &revision) in revisions.iter().enumerate() {
            let (key, row) = (key(&rows.rows.batch, row, keys), rows.rows.batch.slice(row, 1));
            let before = known.insert(key.clone(), (revision, row.clone()));
            // the top rows of a window come together, also those that stay as they are
            let is_right = match before {
                Some((last, before)) if last == revision => program.is_top() && before == row,
                Some((last, _)) => revision == last + 1,
                // a session that others are joined to goes on with their revision
                None => revision == 0 || program.may_retract() || matches!(program.window(), Window::Session { .. }),
            };
            assert!(is_right, "{} {key:?}: revision {revision} comes out of turn", rows.metric);
        }
    }
}

fn key(batch: &RecordBatch, row: usize, keys: usize) -> (i64, i64, String) {
    let time = |at: usize| batch.column(at).as_primitive::<TimestampMicrosecondType>().value(row);
    let text = |at| arrow::util::display::array_value_to_string(batch.column(at), row).unwrap();
    (time(0), time(1), (2..2 + keys).map(text).collect::<Vec<_>>().join("|"))
}

/// The engine over `batches`; saved and restored before each index in `restarts`.
fn run(chain: &Chain, timing: Timing, batches: &[RecordBatch], restarts: &[usize]) -> Finals {
    let mut workspace = chain.workspace(timing);
    let (mut finals, mut state) = (Finals::new(), State::default());
    for (at, batch) in batches.iter().enumerate() {
        if restarts.contains(&at) {
            state.apply(workspace.save().unwrap().encode().unwrap());
            workspace = chain.workspace(timing);
            assert_eq!(workspace.restore(Saved::read(&state).unwrap()).unwrap(), []);
        }
        collect(&mut finals, chain, workspace.step(&trades(), batch));
        chain.0.iter().for_each(|(metric, _)| drop(workspace.tick(metric)));
    }
    collect(&mut finals, chain, workspace.idle(&trades(), Micros(i64::MAX / 2)));
    finals
}

fn table(finals: &Finals, chain: &Chain, metric: &str) -> RecordBatch {
    let program = chain.program(metric);
    let parts: Vec<&RecordBatch> =
        finals.get(metric).into_iter().flat_map(|rows| rows.values().map(|(_, b)| b)).collect();
    let whole = arrow::compute::concat_batches(program.output(), parts).unwrap();
    // as events: with the time of each row
    let ts: TimestampMicrosecondArray = whole.column(1).as_primitive::<TimestampMicrosecondType>().unary(|end| end - 1);
    let fields = std::iter::once(Arc::new(Field::new("ts", ts.data_type().clone(), true)))
        .chain(whole.schema().fields().iter().cloned())
        .collect::<Vec<_>>();
    let columns = std::iter::once(Arc::new(ts) as ArrayRef).chain(whole.columns().iter().cloned()).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

fn numbers(batch: &RecordBatch, row: usize, from: usize) -> Vec<Option<f64>> {
    let number = |column: &ArrayRef| {
        column.is_valid(row).then(|| match column.data_type() {
            DataType::Int64 => column.as_primitive::<Int64Type>().value(row) as f64,
            DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row) as f64,
            _ => column.as_primitive::<Float64Type>().value(row),
        })
    };
    batch.columns()[from..].iter().map(number).collect()
}

/// Runs `text` once over the final rows of `upstream` and compares with the engine's rows of `metric`.
fn assert_batch(finals: &Finals, chain: &Chain, upstream: &str, metric: &str, text: &str) {
    let rows = table(finals, chain, upstream);
    let tables =
        vec![Table { name: vec!["metrics".into(), upstream.into()], schema: rows.schema(), batches: vec![rows] }];
    let bounds = Bounds { rows: 1_000_000, memory: 256 << 20, until: Instant::now() + Duration::from_secs(60) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(Question::parse(text).unwrap().run(&[], tables, bounds)).unwrap();
    let keys = chain.program(metric).key_count();
    let mut truth = BTreeMap::new();
    for batch in &answer.batches {
        for row in 0..batch.num_rows() {
            truth.insert(key(batch, row, keys), numbers(batch, row, 2 + keys));
        }
    }
    let ours: BTreeMap<_, _> =
        finals.get(metric).into_iter().flatten().filter(|(_, (_, row))| row.num_rows() > 0).collect();
    assert_eq!(ours.keys().copied().collect::<Vec<_>>(), truth.keys().collect::<Vec<_>>(), "rows of {metric}");
    for (key, (_, row)) in ours {
        for (at, (a, b)) in numbers(row, 0, 2 + keys).iter().zip(&truth[key]).enumerate() {
            let same = match (a, b) {
                // a batch engine slides sums along, which leaves rounding errors of the values that were there
                (Some(a), Some(b)) => a == b || (a - b).abs() <= 1e-7 * a.abs().max(b.abs()).max(1.0),
                (a, b) => a == b,
            };
            assert!(same, "{metric} {key:?} column {at}: {a:?} and {b:?}\n{text}");
        }
    }
}

const BARS: &str = "SELECT window_start, window_end, symbol, min(price) AS low, max(price) AS high, sum(price * qty) / sum(qty) AS close, sum(qty) AS volume, count(*) AS trades FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";

const BY_VENUE: &str = "SELECT window_start, window_end, symbol, venue, min(price) AS low, max(price) AS high, sum(price * qty) / sum(qty) AS close, sum(qty) AS volume, count(*) AS trades FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol, venue";

/// Every kind of call, over windows `w` of the given partition and order.
fn calls(keys: &str, filter: &str, partition: &str, order: &str) -> String {
    let rows = |frame: &str| format!("OVER ({partition} ORDER BY {order} ROWS BETWEEN {frame})");
    let (four, back) = (rows("3 PRECEDING AND CURRENT ROW"), rows("4 PRECEDING AND 1 PRECEDING"));
    let all = rows("UNBOUNDED PRECEDING AND CURRENT ROW");
    let w = format!("OVER ({partition} ORDER BY {order})");
    format!(
        "SELECT window_start, window_end, {keys}, close, row_number() {w} AS n, lag(close) {w} AS before, \
         lag(close, 2, -1.0) {w} AS earlier, close / lag(close) {w} - 1 AS change, avg(close) {four} AS sma, \
         sum(trades) {back} AS recent, count(*) {back} AS bars, var_samp(close) {four} AS variance, \
         median(high) {four} AS middle, max(high) {four} AS top, sum(volume) FILTER (WHERE close > 100) {four} AS dear, \
         count(DISTINCT trades) {four} AS sizes, \
         sum(volume) {all} AS turnover, sum(trades) {all} AS total, max(high) {all} AS record, min(low) {all} AS least, avg(close) {all} AS mean, \
         count(*) FILTER (WHERE close > 100) {all} AS above, first_value(close) {all} AS first, last_value(close) {four} AS last, \
         first_value(close) {back} AS start, nth_value(close, 2) {four} AS second, nth_value(close, 3) {back} AS third, \
         ema(close, 3) {w} AS ema, rsi(close, 3) {w} AS rsi, macd(close, 2, 4) {w} AS macd, macd_signal(close, 2, 4, 2) {w} AS signal, \
         macd_histogram(close, 2, 4, 2) {w} AS histogram, bollinger_upper(close, 4, 2) {w} AS upper, bollinger_lower(close, 4, 1.5) {w} AS lower, \
         bollinger_middle(close, 4) {w} AS band, atr(high, low, close, 3) {w} AS atr, realized_volatility(close, 3) {w} AS volatility, \
         zscore(close, 4) {w} AS z, pct_change(close) {w} AS pct, pct_change(close, 3) {w} AS pct3, drawdown(close) {w} AS drawdown, \
         rate(volume) {w} AS rate, coalesce(ema(close + 1, 3) {w}, 0) * 2 AS twice \
         FROM metrics.bars {filter}"
    )
}

fn trade() -> impl Strategy<Value = Trade> {
    (
        -600 * SECOND..600 * SECOND,
        prop::sample::select(vec!["A", "B", "C"]),
        prop::sample::select(vec!["X", "Y"]),
        (1..4000i32).prop_map(|p| f64::from(p) / 8.0),
        (1..100i32).prop_map(f64::from),
    )
}

/// Trades roughly in the order of time, so that windows close and late ones come behind.
fn roughly_sorted(mut rows: Vec<Trade>, disorder: i64) -> Vec<Trade> {
    let mut at = 0i64;
    rows.sort_by_cached_key(|row| {
        at += 1;
        row.0 + (at * 7919 % 101) * disorder * SECOND / 100
    });
    rows
}

fn cut(rows: &[Trade], sizes: &[usize]) -> Vec<RecordBatch> {
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
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// With and without corrections, partitions as fine as the rows or coarser, saved and restored at any place.
    #[test]
    fn rows_of_over_clauses_are_those_of_batch_sql(
        rows in prop::collection::vec(trade(), 1..150),
        sizes in prop::collection::vec(1..30usize, 1..5),
        restarts in prop::collection::vec(0..20usize, 0..3),
        disorder in prop::sample::select(vec![0i64, 60, 400]),
        lateness in prop::sample::select(vec![0i64, 60, 300, 5000]),
        shape in 0..4usize,
    ) {
        let (bars, ours, truth) = match shape {
            0 => (BARS, calls("symbol", "", "PARTITION BY symbol", "window_start"), None),
            1 => (BARS, calls("symbol", "WHERE symbol <> 'B'", "PARTITION BY symbol", "window_end"), None),
            2 => (BY_VENUE, calls("symbol, venue", "", "PARTITION BY symbol", "window_start"), Some("window_start, venue")),
            _ => (BARS, calls("symbol", "", "", "ts"), Some("ts, symbol")),
        };
        let chain = Chain::new(&[("bars", bars), ("over", &ours)]).unwrap();
        let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(lateness) };
        let finals = run(&chain, timing, &cut(&roughly_sorted(rows, disorder), &sizes), &restarts);
        // in a batch query rows of one window have no order of their own; rate measures by the first expression
        let truth = match truth {
            None => ours,
            Some(order) => {
                let by = order.split(',').next().unwrap();
                ours.replace(&format!("ORDER BY {by}"), &format!("ORDER BY {order}"))
            }
        };
        assert_batch(&finals, &chain, "bars", "over", &truth);
    }

    /// A longer window over a metric's rows is the shorter ones put together, also where those are corrected.
    #[test]
    fn a_window_over_a_metric_is_the_longer_window_over_its_stream(
        rows in prop::collection::vec(trade(), 1..150),
        sizes in prop::collection::vec(1..30usize, 1..5),
        restarts in prop::collection::vec(0..20usize, 0..3),
        disorder in prop::sample::select(vec![0i64, 60, 400]),
        lateness in prop::sample::select(vec![0i64, 60, 300, 5000]),
        window in prop::sample::select(vec!["tumble(ts, INTERVAL '5 minutes')", "hop(ts, INTERVAL '1 minute', INTERVAL '3 minutes')"]),
    ) {
        let bars = "SELECT symbol, min(price) AS low, max(price) AS high, sum(qty) AS volume, count(*) AS trades FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
        let long = format!("SELECT symbol, min(low) AS low, max(high) AS high, sum(volume) AS volume, sum(trades) AS trades FROM bars GROUP BY {window}, symbol");
        let again = "SELECT symbol, max(high) AS high, sum(volume) AS volume FROM metrics.long GROUP BY tumble(ts, INTERVAL '10 minutes'), symbol";
        let over = "SELECT symbol, volume, sum(volume) OVER (PARTITION BY symbol ORDER BY window_end) AS total FROM metrics.long";
        let chain = Chain::new(&[("bars", bars), ("long", &long), ("again", again), ("over", over)]).unwrap();
        let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(lateness) };
        let finals = run(&chain, timing, &cut(&roughly_sorted(rows, disorder), &sizes), &restarts);
        let (slide, size) = if window.starts_with("hop") { (60, 180) } else { (300, 300) };
        let mut truth: BTreeMap<(i64, i64, String), Vec<f64>> = BTreeMap::new();
        for ((_, end, symbol), (_, row)) in finals.get("bars").into_iter().flatten() {
            let row: Vec<f64> = numbers(row, 0, 3).into_iter().map(Option::unwrap).collect();
            let mut start = (end - 1) - (end - 1).rem_euclid(slide * SECOND);
            while start + size * SECOND >= *end {
                let whole = truth.entry((start, start + size * SECOND, symbol.clone())).or_insert(vec![f64::MAX, f64::MIN, 0.0, 0.0]);
                *whole = vec![whole[0].min(row[0]), whole[1].max(row[1]), whole[2] + row[2], whole[3] + row[3]];
                start -= slide * SECOND;
            }
        }
        let ours: BTreeMap<_, Vec<f64>> = finals.get("long").into_iter().flatten()
            .map(|(key, (_, row))| (key.clone(), numbers(row, 0, 3).into_iter().map(Option::unwrap).collect()))
            .collect();
        assert_eq!(ours, truth, "{window}");
        assert_batch(&finals, &chain, "long", "over", &over.replace("SELECT", "SELECT window_start, window_end,"));
    }

    /// A restart tells nothing again: rows have the revisions they have without one.
    #[test]
    fn rows_have_the_revisions_they_have_without_a_restart(
        rows in prop::collection::vec(trade(), 1..120),
        sizes in prop::collection::vec(1..30usize, 1..5),
        restarts in prop::collection::vec(1..20usize, 1..4),
        lateness in prop::sample::select(vec![60i64, 300, 5000]),
    ) {
        let by = "OVER (PARTITION BY symbol ORDER BY window_start)";
        let chain = Chain::new(&[
            ("bars", BARS),
            ("high", "SELECT symbol, high FROM metrics.bars"),
            ("kept", "SELECT symbol, high FROM metrics.high WHERE high > 0"),
            ("before", &format!("SELECT symbol, volume, lag(high) {by} AS high FROM metrics.bars")),
            ("sums", &format!("SELECT symbol, volume, sum(high) {by} AS total FROM metrics.before")),
            ("two", "SELECT symbol, max(high) AS high FROM metrics.before GROUP BY tumble(ts, INTERVAL '2 minutes'), symbol"),
        ]).unwrap();
        let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(lateness) };
        let batches = cut(&roughly_sorted(rows, 60), &sizes);
        prop_assert_eq!(run(&chain, timing, &batches, &restarts), run(&chain, timing, &batches, &[]));
    }

    /// Rows that are withdrawn, or that change the group or the filter they fall under, leave no trace further down.
    #[test]
    fn what_a_metric_takes_back_is_taken_back_down_the_chain(
        rows in prop::collection::vec(trade(), 1..120),
        sizes in prop::collection::vec(1..30usize, 1..5),
        restarts in prop::collection::vec(0..20usize, 0..3),
        disorder in prop::sample::select(vec![60i64, 400]),
        lateness in prop::sample::select(vec![60i64, 300, 5000]),
        (window, rest) in prop::sample::select(vec![
            ("tumble(ts, INTERVAL '1 minute')", "HAVING count(*) % 2 = 1"),
            ("tumble(ts, INTERVAL '1 minute')", "ORDER BY volume DESC LIMIT 1"),
            ("hop(ts, INTERVAL '1 minute', INTERVAL '2 minutes')", "ORDER BY trades LIMIT 2"),
            ("session(ts, INTERVAL '20 seconds')", ""),
            ("session(ts, INTERVAL '40 seconds')", "HAVING sum(qty) < 120"),
        ]),
        filter in prop::sample::select(vec!["", "WHERE volume > 60", "WHERE trades < 3"]),
    ) {
        let bars = format!("SELECT symbol, sum(qty) AS volume, max(price) AS high, count(*) AS trades FROM market.trades GROUP BY {window}, symbol {rest}");
        let sizes_of = format!("SELECT trades, count(*) AS bars, sum(volume) AS volume FROM bars {filter} GROUP BY tumble(ts, INTERVAL '5 minutes'), trades");
        let over = format!("SELECT symbol, volume, sum(volume) OVER (PARTITION BY symbol ORDER BY window_end) AS total, lag(high) OVER (PARTITION BY symbol ORDER BY window_end) AS before FROM metrics.bars {filter}");
        let again = "SELECT trades, volume, sum(bars) OVER (PARTITION BY trades ORDER BY window_start) AS bars FROM metrics.sizes";
        let dear = "SELECT count(*) AS n, max(total) AS total FROM metrics.over GROUP BY tumble(ts, INTERVAL '5 minutes')";
        let chain = Chain::new(&[("bars", &bars), ("sizes", &sizes_of), ("over", &over), ("again", again), ("dear", dear)]).unwrap();
        let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(lateness) };
        let finals = run(&chain, timing, &cut(&roughly_sorted(rows, disorder), &sizes), &restarts);
        let micros = |at: &str| format!("arrow_cast({at}, 'Timestamp(Microsecond, Some(\"+00:00\"))')");
        let start = "date_bin(INTERVAL '5 minutes', ts, TIMESTAMP '1970-01-01T00:00:00Z')";
        let bounds = format!("{} AS window_start, {} AS window_end", micros(start), micros(&format!("{start} + INTERVAL '5 minutes'")));
        let batch = |keys: &str, values: &str, from: &str| format!("SELECT {bounds}, {keys}{values} FROM metrics.{from} GROUP BY {keys}{start}");
        assert_batch(&finals, &chain, "bars", "sizes", &batch("trades, ", "count(*) AS bars, sum(volume) AS volume", &format!("bars {filter}")));
        assert_batch(&finals, &chain, "bars", "over", &over.replace("SELECT", "SELECT window_start, window_end,"));
        assert_batch(&finals, &chain, "sizes", "again", &again.replace("SELECT", "SELECT window_start, window_end,"));
        assert_batch(&finals, &chain, "over", "dear", &batch("", "count(*) AS n, max(total) AS total", "over"));
    }
}

/// Final rows of one metric: minutes of the window's start, revision, and the number in the last column.
fn said(outputs: &Outputs, metric: &str) -> Vec<(i64, i64, Option<f64>)> {
    let mut said = Vec::new();
    for Rows { batch, revisions, .. } in
        outputs.rows.iter().filter(|rows| rows.metric.as_str() == metric).map(|r| &r.rows)
    {
        for (row, revision) in revisions.iter().flatten().enumerate() {
            let start = batch.column(0).as_primitive::<TimestampMicrosecondType>().value(row) / (60 * SECOND);
            said.push((start, *revision, numbers(batch, row, batch.num_columns() - 1)[0]));
        }
    }
    said
}

fn at(second: i64, price: f64) -> RecordBatch {
    batch(&[(second * SECOND, "A", "X", price, 1.0)])
}

#[test]
fn a_correction_upstream_corrects_the_rows_whose_frame_holds_it_and_no_other() {
    let bars = "SELECT symbol, max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let sma = "SELECT symbol, avg(high) OVER (PARTITION BY symbol ORDER BY window_start ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) AS sma2 FROM metrics.bars";
    let ema = "SELECT symbol, ema(high, 2) OVER (PARTITION BY symbol ORDER BY window_start) AS ema FROM metrics.bars";
    let chain = Chain::new(&[("bars", bars), ("sma", sma), ("ema", ema)]).unwrap();
    let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(600) };
    let mut workspace = chain.workspace(timing);
    for minute in 0..5 {
        workspace.step(&trades(), &at(minute * 60, 10.0));
    }
    // closed by now: minutes 0 to 3
    let outputs = workspace.step(&trades(), &at(61, 40.0));
    assert_eq!(said(&outputs, "bars"), [(1, 1, Some(40.0))]);
    assert_eq!(said(&outputs, "sma"), [(1, 1, Some(25.0)), (2, 1, Some(25.0))]);
    // a recursive average remembers every row: all rows from the corrected one on
    let changed = said(&outputs, "ema");
    assert_eq!(changed.iter().map(|row| (row.0, row.1)).collect::<Vec<_>>(), [(1, 1), (2, 1), (3, 1)]);
    let outputs = workspace.step(&trades(), &at(62, 1.0));
    assert_eq!(said(&outputs, "bars"), [(1, 2, Some(40.0))]);
    assert_eq!(said(&outputs, "ema"), [], "the row is the same as before");
}

#[test]
fn a_row_that_moves_to_another_group_leaves_the_one_it_was_in() {
    let bars = "SELECT symbol, max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let highs = "SELECT high, count(*) AS bars FROM bars GROUP BY tumble(ts, INTERVAL '2 minutes'), high";
    let chain = Chain::new(&[("bars", bars), ("highs", highs)]).unwrap();
    let mut workspace = chain.workspace(Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(600) });
    for minute in 0..2 {
        workspace.step(&trades(), &at(minute * 60, 10.0));
    }
    let mut step = |second, price| {
        let outputs = workspace.step(&trades(), &at(second, price));
        let mut rows = said(&outputs, "highs");
        rows.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let gone = outputs.rows.iter().filter(|rows| rows.metric.as_str() == "highs");
        (rows, gone.filter_map(|rows| Some(rows.rows.withdrawn.as_ref()?.num_rows())).sum::<usize>())
    };
    assert_eq!(step(120, 10.0), (vec![(0, 0, Some(2.0))], 0));
    assert_eq!(step(1, 40.0), (vec![(0, 0, Some(1.0)), (0, 1, Some(1.0))], 0));
    assert_eq!(step(61, 40.0), (vec![(0, 1, Some(2.0))], 1), "no bar is at 10 any more");
}

#[test]
fn a_metric_defined_later_begins_with_the_rows_that_become_final_then_or_with_its_backfill() {
    let bars = "SELECT symbol, max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let over = "SELECT symbol, count(*) OVER (PARTITION BY symbol ORDER BY window_start) AS n FROM metrics.bars";
    let chain = Chain::new(&[("bars", bars), ("over", over)]).unwrap();
    let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO };
    let mut workspace = Workspace::default();
    workspace.define(name("bars"), 1, chain.program("bars").clone(), timing).unwrap();
    let mut bars = Vec::new();
    for minute in 0..4 {
        let outputs = workspace.step(&trades(), &at(minute * 60, 10.0));
        bars.extend(outputs.rows.into_iter().filter(|rows| rows.rows.revisions.is_some()).map(|rows| rows.rows));
    }
    workspace.define(name("over"), 1, chain.program("over").clone(), timing).unwrap();
    assert_eq!(said(&workspace.step(&trades(), &at(240, 10.0)), "over"), [(3, 0, Some(1.0))]);
    workspace.define(name("over"), 2, chain.program("over").clone(), timing).unwrap();
    let outputs = workspace.backfill(&name("over"), Micros(60 * SECOND), &bars);
    assert_eq!(said(&outputs, "over"), [(1, 0, Some(1.0)), (2, 0, Some(2.0))], "minute 0 ended before");
    assert_eq!(said(&workspace.step(&trades(), &at(300, 10.0)), "over"), [(4, 0, Some(3.0))]);
}

#[test]
fn rows_that_may_be_corrected_count_for_what_they_take() {
    const SYMBOLS: usize = 2_000;
    let chain = Chain::new(&[
        ("bars", "SELECT symbol, sum(qty) AS v FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol"),
        ("moves", "SELECT symbol, lag(v) OVER (PARTITION BY symbol ORDER BY window_start) AS before FROM metrics.bars"),
        ("all", "SELECT count(*) AS n FROM metrics.bars GROUP BY tumble(ts, INTERVAL '5 minutes')"),
    ])
    .unwrap();
    let mut workspace = chain.workspace(Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(600) });
    let symbols: Vec<&'static str> = (0..SYMBOLS).map(|at| &*format!("SYM{at:05}").leak()).collect();
    let minute = |at: i64| symbols.iter().map(move |symbol| (at * 60 * SECOND, *symbol, "X", 1.0, 1.0));
    for at in 0..3 {
        let outputs = workspace.step(&trades(), &batch(&minute(at).collect::<Vec<_>>()));
        assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
    }
    // two minutes of rows, each of a few columns
    for (name, metric) in workspace.metrics().filter(|(name, _)| name.as_str() != "bars") {
        let bytes = metric.bytes() / (2 * SYMBOLS);
        assert!((100..2_000).contains(&bytes), "{name}: {bytes} bytes a row");
    }
}

#[test]
fn a_number_that_is_none_is_null_to_the_metrics_over_it_as_it_is_in_the_store() {
    let chain = Chain::new(&[
        ("vwap", "SELECT sum(price * qty) / sum(qty) AS v FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')"),
        ("seen", "SELECT count(v) OVER (ORDER BY window_start) AS n FROM metrics.vwap"),
        ("mean", "SELECT avg(v) AS mean FROM metrics.vwap GROUP BY tumble(ts, INTERVAL '3 minutes')"),
    ])
    .unwrap();
    let mut workspace = chain.workspace(Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO });
    let (mut seen, mut mean) = (Vec::new(), Vec::new());
    for (minute, qty) in [1.0, 0.0, 1.0, 1.0, 1.0].into_iter().enumerate() {
        let outputs = workspace.step(&trades(), &batch(&[(minute as i64 * 60 * SECOND, "A", "X", 10.0, qty)]));
        seen.extend(said(&outputs, "seen").into_iter().map(|(_, _, n)| n));
        mean.extend(said(&outputs, "mean").into_iter().map(|(_, _, v)| v));
    }
    assert_eq!(seen, [Some(1.0), Some(1.0), Some(2.0), Some(3.0)]);
    assert_eq!(mean, [Some(10.0)]);
}

#[test]
fn a_rate_may_go_over_a_window_that_is_named() {
    let bars = "SELECT symbol, sum(qty) AS v FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let over = "PARTITION BY symbol ORDER BY window_start";
    let inline = format!("SELECT symbol, rate(v) OVER ({over}) AS r FROM metrics.bars");
    let named = format!("SELECT symbol, rate(v) OVER w AS r FROM metrics.bars WINDOW w AS ({over})");
    let chain = Chain::new(&[("bars", bars), ("inline", &inline), ("named", &named)]).unwrap();
    let mut workspace = chain.workspace(Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO });
    let outputs: Vec<Outputs> = (0..4).map(|minute| workspace.step(&trades(), &at(minute * 60, 10.0))).collect();
    let rates = |metric: &str| outputs.iter().flat_map(|outputs| said(outputs, metric)).collect::<Vec<_>>();
    assert_eq!((rates("named"), rates("named").len()), (rates("inline"), 3));
}

#[test]
fn a_circle_of_metrics_is_refused_by_name() {
    let bars = "SELECT symbol, max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let over = "SELECT symbol, lag(high) OVER (PARTITION BY symbol ORDER BY window_start) AS high FROM metrics.bars";
    let back = "SELECT symbol, high FROM metrics.over";
    let chain = Chain::new(&[("bars", bars), ("over", over), ("bars_again", back)]).unwrap();
    let mut workspace = chain.workspace(Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO });
    assert_eq!(workspace.readers(&name("bars")), [name("over")]);
    let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO };
    let error = workspace.define(name("bars"), 2, chain.program("bars_again").clone(), timing).unwrap_err().to_string();
    assert!(error.contains("`bars` reads `over` reads `bars`"), "{error}");
}

#[test]
fn what_cannot_be_computed_as_rows_become_final_is_refused_with_its_place_and_the_way_out() {
    let refused = |text: &str| {
        let Err(error) = Chain::new(&[("bars", BARS), ("over", text)]) else { panic!("{text} was planned") };
        error.to_string()
    };
    let over = |call: &str| refused(&format!("SELECT symbol, {call} AS x FROM metrics.bars"));
    for (call, expected) in [
        ("avg(close) OVER (PARTITION BY symbol)", "without ORDER BY"),
        (
            "avg(close) OVER (PARTITION BY symbol ORDER BY window_start RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)",
            "a RANGE frame is not supported in a metric; write ROWS",
        ),
        (
            "avg(close) OVER (PARTITION BY symbol ORDER BY window_start GROUPS BETWEEN 2 PRECEDING AND CURRENT ROW)",
            "a GROUPS frame",
        ),
        (
            "avg(close) OVER (PARTITION BY symbol ORDER BY window_start ROWS BETWEEN 2 PRECEDING AND 1 FOLLOWING)",
            "the rows after it are not known; use lag",
        ),
        ("lead(close) OVER (PARTITION BY symbol ORDER BY window_start)", "the rows after it are not known"),
        (
            "avg(close) OVER (PARTITION BY symbol ORDER BY close ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)",
            "write ORDER BY window_start, ascending",
        ),
        (
            "avg(close) OVER (PARTITION BY symbol ORDER BY window_start DESC ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)",
            "write ORDER BY window_start, ascending",
        ),
        (
            "avg(close) OVER (PARTITION BY close ORDER BY window_start ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)",
            "its keys are: symbol",
        ),
        ("median(close) OVER (PARTITION BY symbol ORDER BY window_start)", "would keep all of them; write ROWS"),
        ("avg(close) OVER (ORDER BY window_start)", "the frame must say which come first"),
        (
            "avg(close) OVER (PARTITION BY symbol ORDER BY window_start ROWS BETWEEN 20000 PRECEDING AND CURRENT ROW)",
            "longer than 10000",
        ),
        ("ntile(4) OVER (PARTITION BY symbol ORDER BY window_start)", "the window function `ntile` is not supported"),
        ("ema(close, 0) OVER (PARTITION BY symbol ORDER BY window_start)", "in ema(x, n), 0 is no number of rows"),
        ("ema(close) OVER (PARTITION BY symbol ORDER BY window_start)", "write ema(x, n) OVER"),
        ("ema(symbol, 3) OVER (PARTITION BY symbol ORDER BY window_start)", "argument 1 is Utf8, not a number"),
        ("ema(close, trades) OVER (PARTITION BY symbol ORDER BY window_start)", "must be constant"),
        (
            "lag(close) OVER (PARTITION BY symbol ORDER BY window_start) + sum(close) OVER (ORDER BY window_start ROWS 2 PRECEDING)",
            "partition alike",
        ),
        ("avg(clos) OVER (PARTITION BY symbol ORDER BY window_start)", "clos"),
    ] {
        let error = over(call);
        assert!(error.contains(expected), "{call}: {error}");
        assert!(error.starts_with("line 1, column "), "{call}: {error}");
    }
    assert!(over("lead(close) OVER (ORDER BY window_start)").starts_with("line 1, column 16: "));
    let stream = refused("SELECT symbol, lag(price) OVER (PARTITION BY symbol ORDER BY ts) AS p FROM market.trades");
    assert!(stream.contains("OVER goes through the final rows of a metric"), "{stream}");
    assert!(refused("SELECT symbol FROM metrics.nothing").contains("there is no metric `nothing`"));
    assert!(refused("SELECT close AS ts FROM bars").contains("`ts` already"));
    assert!(refused("SELECT avg(close) AS mean FROM bars").contains("this shape of query"));
    assert!(refused("SELECT close FROM bars ORDER BY close LIMIT 1").contains("ORDER BY and LIMIT without GROUP BY"));
    let bound = refused(
        "SELECT symbol, first_value(close ORDER BY window_start) AS open FROM bars GROUP BY tumble(ts, INTERVAL '5 minutes'), symbol",
    );
    assert!(bound.contains("window_start"), "{bound}");
}

#[test]
fn columns_that_are_not_selected_are_kept_as_keys_and_a_row_wise_metric_may_do_without_over() {
    let chain = Chain::new(&[
        ("bars", BY_VENUE),
        ("body", "SELECT venue AS exchange, high - low AS spread FROM bars WHERE trades > 0"),
        ("all", "SELECT * FROM metrics.body"),
    ])
    .unwrap();
    let names =
        |metric: &str| chain.program(metric).output().fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>();
    assert_eq!(names("body"), ["window_start", "window_end", "symbol", "exchange", "spread"]);
    assert_eq!(names("all"), names("body"));
    assert_eq!(chain.program("all").key_count(), 2);
}

/// Purchases of customers as events, in the order of time; `None` where the shared data is missing.
fn purchases() -> Option<RecordBatch> {
    let path = std::path::Path::new("../../shared/data/analytics/online_retail_ii_2009_2010.parquet");
    let Ok(file) = std::fs::File::open(path) else {
        println!("skipped: {} is not beside the project", path.display());
        return None;
    };
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
    let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
    let all = arrow::compute::concat_batches(batches[0].schema_ref(), &batches).unwrap();
    let column = |name: &str, kind: DataType| arrow::compute::cast(all.column_by_name(name).unwrap(), &kind).unwrap();
    let micros = DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, None);
    let ts = column("InvoiceDate", micros).as_primitive::<TimestampMicrosecondType>().clone().with_timezone("+00:00");
    let customers = column("Customer ID", DataType::Int64);
    let customers = arrow::compute::cast(&customers, &DataType::Utf8).unwrap();
    let schema = built_in().iter().find(|s| s.stream.as_str() == "analytics.events").unwrap().arrow().clone();
    let rows = all.num_rows();
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "ts" => Arc::new(ts.clone()),
            "event" => Arc::new(StringArray::from_iter_values(std::iter::repeat_n("purchase", rows))),
            "user_id" => customers.clone(),
            _ => arrow::array::new_null_array(field.data_type(), rows),
        }
    });
    let batch = RecordBatch::try_new(schema.clone(), columns.collect()).unwrap();
    let order = arrow::compute::sort_to_indices(batch.column(0), None, None).unwrap();
    Some(arrow::compute::take_record_batch(&batch, &order).unwrap())
}

#[test]
fn retention_as_a_chain_of_metrics_gives_the_published_cohort_table() {
    let Some(events) = purchases() else { return };
    let chain = Chain::new(&[
        (
            "active_days",
            "SELECT user_id, count(*) AS events FROM analytics.events WHERE user_id IS NOT NULL \
             GROUP BY tumble(ts, INTERVAL '1 day'), user_id",
        ),
        (
            "active_months",
            "SELECT user_id, date_trunc('month', window_start) AS month, \
             date_trunc('month', first_value(window_start) OVER w) AS cohort, \
             lag(date_trunc('month', window_start)) OVER w IS DISTINCT FROM date_trunc('month', window_start) AS is_first \
             FROM metrics.active_days WINDOW w AS (PARTITION BY user_id ORDER BY window_start)",
        ),
        (
            "cohort_days",
            "SELECT cohort, month, count(*) AS users FROM metrics.active_months WHERE is_first \
             GROUP BY tumble(ts, INTERVAL '1 day'), cohort, month",
        ),
        (
            "retention",
            "SELECT cohort, month, sum(users) OVER (PARTITION BY cohort, month ORDER BY window_start) AS users \
             FROM metrics.cohort_days",
        ),
    ])
    .unwrap();
    let stream: StreamName = "analytics.events".parse().unwrap();
    let mut workspace = chain.workspace(Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO });
    let mut finals = Finals::new();
    for from in (0..events.num_rows()).step_by(8192) {
        let batch = events.slice(from, 8192.min(events.num_rows() - from));
        collect(&mut finals, &chain, workspace.step(&stream, &batch));
    }
    collect(&mut finals, &chain, workspace.idle(&stream, Micros(i64::MAX / 2)));
    // of each cohort and month the newest row, as a live view has it
    let mut table: BTreeMap<String, f64> = BTreeMap::new();
    for ((_, _, key), (_, row)) in &finals["retention"] {
        table.insert(key.clone(), numbers(row, 0, 4)[0].unwrap());
    }
    let month = |text: &str| text[..4].parse::<i64>().unwrap() * 12 + text[5..7].parse::<i64>().unwrap();
    let ours: BTreeMap<(String, i64), f64> = table
        .iter()
        .map(|(key, users)| {
            let (cohort, at) = key.split_once('|').unwrap();
            ((cohort[..10].to_owned(), month(at) - month(cohort)), *users)
        })
        .collect();
    let expected =
        std::fs::read_to_string("../../shared/data/analytics/online_retail_ii_cohorts_expected.csv").unwrap();
    let expected: BTreeMap<(String, i64), f64> = expected
        .lines()
        .skip(1)
        .map(|line| {
            let fields: Vec<&str> = line.split(',').collect();
            ((fields[0].to_owned(), fields[1].parse().unwrap()), fields[2].parse().unwrap())
        })
        .collect();
    assert_eq!(expected.len(), 91);
    assert_eq!(ours, expected);
}
