//! Joins against batch SQL: reference tables as of an event's time, two streams in one window or a band of time.

use crate::{Rows, assigned, collect, metric, query};
use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::concat_batches;
use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::catalog::{MemTable, MemorySchemaProvider, SchemaProvider};
use datafusion::prelude::SessionContext;
use engine::checkpoint::{Saved, State};
use engine::event::{Micros, Span, StreamName};
use engine::metric::{RestoreError, Timing};
use engine::program::Program;
use engine::window::Window;
use engine::workspace::{Outputs, Workspace};
use proptest::prelude::*;
use sql::plan::Planner;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use streams::decode::{Bounds, Format, TsUnit, decode};
use streams::schema::{Column, StreamSchema, UnknownFields};
use streams::table::{Table, table_name};

const SECOND: i64 = 1_000_000;

fn column(text: &str) -> Column {
    serde_json::from_str(text).unwrap()
}

fn stream(name: &str, columns: &[(&str, &str)]) -> StreamSchema {
    let columns = columns.iter().map(|(name, kind)| column(&format!(r#"{{"name":"{name}","type":"{kind}"}}"#)));
    StreamSchema::new(name.parse().unwrap(), columns.collect(), UnknownFields::Ignore).unwrap()
}

/// Two streams of the same columns, and a table by symbol and number of which a symbol has several rows.
struct World {
    streams: [StreamSchema; 2],
    table: Table,
}

impl World {
    fn new() -> World {
        let columns = [("symbol", "utf8"), ("x", "float64")];
        let of_table = [
            column(r#"{"name":"symbol","type":"utf8","nullable":false}"#),
            column(r#"{"name":"part","type":"utf8","nullable":false}"#),
            column(r#"{"name":"factor","type":"float64"}"#),
        ];
        let key = vec!["symbol".to_owned(), "part".to_owned()];
        World {
            streams: [stream("a.events", &columns), stream("b.events", &columns)],
            table: Table::new(table_name("factors").unwrap(), of_table.to_vec(), key).unwrap(),
        }
    }

    fn schema(&self, name: &StreamName) -> Option<SchemaRef> {
        if name == self.table.name() {
            return Some(self.table.schema().relation().clone());
        }
        self.streams.iter().find(|s| s.stream == *name).map(|s| s.arrow().clone())
    }

    fn plan(&self, sql: &str) -> Arc<Program> {
        futures::executor::block_on(Planner::default().program(sql, |name: &StreamName| self.schema(name)))
            .unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    fn batch(&self, side: usize, rows: &[Event]) -> RecordBatch {
        let none = || Arc::new(StringArray::new_null(rows.len())) as ArrayRef;
        let ts = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.0)).with_timezone("+00:00");
        let symbols: StringArray = rows.iter().map(|r| Some(r.1).filter(|s| *s != "NULL")).collect();
        let x = Float64Array::from_iter_values(rows.iter().map(|r| r.2));
        let columns: Vec<ArrayRef> = vec![Arc::new(ts), none(), Arc::new(symbols), Arc::new(x), none()];
        RecordBatch::try_new(self.streams[side].arrow().clone(), columns).unwrap()
    }

    fn changes(&self, lines: &str, now: i64) -> RecordBatch {
        let bounds = Bounds { wrong_unit: Span(0), ..Bounds::default() };
        let decoded =
            self.table.decode(lines.as_bytes(), Format::Ndjson, TsUnit::Micros, &bounds, Micros(now)).unwrap();
        assert_eq!(decoded.rejected, 0, "{:?}", decoded.errors);
        decoded.batch
    }
}

/// Event time, symbol (`NULL` for none) and a value.
type Event = (i64, &'static str, f64);

/// What happens in a workspace, in order: events of one of the streams, or changes of the table.
enum Step {
    Events(usize, RecordBatch),
    Change(RecordBatch),
}

/// The engine over `steps`; saved and restored before each index in `restarts`.
fn engine_rows(world: &World, program: &Arc<Program>, timing: Timing, steps: &[Step], restarts: &[usize]) -> Rows {
    rows_and_late(world, program, timing, steps, restarts).0
}

/// The same, and which events were late, by the step and their place in it.
fn rows_and_late(
    world: &World,
    program: &Arc<Program>,
    timing: Timing,
    steps: &[Step],
    restarts: &[usize],
) -> (Rows, Vec<(usize, u32)>) {
    let fresh = || {
        let mut workspace = Workspace::default();
        workspace.define_table(world.table.schema().clone()).unwrap();
        workspace.define(metric(), 1, program.clone(), timing).unwrap();
        workspace
    };
    let (mut workspace, mut state) = (fresh(), State::default());
    let (mut rows, mut late) = (Rows::new(), Vec::new());
    for (at, step) in steps.iter().enumerate() {
        if restarts.contains(&at) {
            state.apply(workspace.save().unwrap().encode().unwrap());
            workspace = fresh();
            assert_eq!(workspace.restore(Saved::read(&state).unwrap()).unwrap(), []);
        }
        match step {
            Step::Events(side, batch) => {
                let outputs = workspace.step(&world.streams[*side].stream, batch);
                late.extend(outputs.late.iter().map(|event| (at, event.row)));
                keep(&mut rows, outputs, program);
            }
            Step::Change(batch) => workspace.change_table(world.table.name(), batch, at as u64).unwrap(),
        }
        drop(workspace.tick(&metric())); // provisional rows come and go without a trace
    }
    for stream in &world.streams {
        keep(&mut rows, workspace.idle(&stream.stream, Micros(i64::MAX / 2)), program);
    }
    let (_, state) = workspace.metrics().next().unwrap();
    assert_eq!(state.waiting(), 0, "events wait behind the last window");
    assert_eq!(state.bytes() / 2048, 0, "state is left behind after the last window");
    (rows, late)
}

fn keep(rows: &mut Rows, outputs: Outputs, program: &Program) {
    assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
    for part in outputs.rows.iter().filter(|part| part.rows.revisions.is_some()) {
        if let Some(withdrawn) = &part.rows.withdrawn {
            let mut gone = Rows::new();
            collect(&mut gone, withdrawn, program.key_count());
            rows.retain(|place, _| !gone.contains_key(place));
        }
        collect(rows, &part.rows.batch, program.key_count());
    }
}

/// `events` once for each window that holds them, with its bounds behind.
fn windowed(events: &RecordBatch, slide: i64, size: i64) -> RecordBatch {
    use arrow::array::AsArray;
    use arrow::datatypes::TimestampMicrosecondType;
    let schema = sql::plan::with_bounds(events.schema_ref());
    let ts = events.column(0).as_primitive::<TimestampMicrosecondType>();
    let mut parts = vec![RecordBatch::new_empty(schema.clone())];
    for k in 0..=(size - 1) / slide {
        let start = |at: i64| at - at.rem_euclid(slide) - k * slide;
        let inside: Vec<u32> =
            (0..ts.len() as u32).filter(|&r| start(ts.value(r as usize)) + size > ts.value(r as usize)).collect();
        let part = arrow::compute::take_record_batch(events, &UInt32Array::from(inside)).unwrap();
        let ts = part.column(0).as_primitive::<TimestampMicrosecondType>();
        let bound = |by: i64| -> ArrayRef {
            let bounds = ts.values().iter().map(|&at| start(at) + by);
            Arc::new(TimestampMicrosecondArray::from_iter_values(bounds).with_timezone("+00:00"))
        };
        let columns = part.columns().iter().cloned().chain([bound(0), bound(size)]).collect();
        parts.push(RecordBatch::try_new(schema.clone(), columns).unwrap());
    }
    concat_batches(&schema, &parts).unwrap()
}

/// Plain DataFusion over tables in one schema each.
fn batch_rows(sql: &str, tables: Vec<(&str, RecordBatch)>, keys: usize) -> Rows {
    let context = SessionContext::new();
    let catalog = context.catalog("datafusion").unwrap();
    for (name, batch) in tables {
        let (schema, table) = name.split_once('.').unwrap();
        let provider = Arc::new(MemorySchemaProvider::new());
        let batch_schema = batch.schema();
        provider
            .register_table(table.into(), Arc::new(MemTable::try_new(batch_schema, vec![vec![batch]]).unwrap()))
            .unwrap();
        catalog.register_schema(schema, provider).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let answers = runtime.block_on(async { context.sql(sql).await.unwrap().collect().await.unwrap() });
    let mut rows = Rows::new();
    answers.iter().for_each(|answer| collect(&mut rows, answer, keys));
    rows
}

/// Rows that batch SQL joined, cut into windows of the columns `keys` and grouped: sessions follow from what matched.
fn windowed_after(joined: &[RecordBatch], window: Window, keys: &[&str], select: &str) -> Rows {
    let Some(first) = joined.first() else { return Rows::new() };
    let rows = assigned(window, &concat_batches(&first.schema(), joined).unwrap(), keys);
    let by = keys.join(", ");
    let sql = format!(
        "SELECT window_start, window_end, {by}, {select} FROM joined.rows GROUP BY window_start, window_end, {by}"
    );
    let mut found = Rows::new();
    query(&[(("joined", "rows"), rows)], &sql).iter().for_each(|answer| collect(&mut found, answer, keys.len()));
    found
}

/// A window that batch SQL cannot cut by arithmetic, as it is written and as it is.
fn growing_or_session(session: bool) -> (&'static str, Window) {
    match session {
        true => ("session(a.ts, INTERVAL '3 seconds')", Window::session(Span::seconds(3)).unwrap()),
        false => (
            "cumulate(a.ts, INTERVAL '5 seconds', INTERVAL '20 seconds')",
            Window::cumulate(Span::seconds(5), Span::seconds(20)).unwrap(),
        ),
    }
}

fn assert_same(ours: &Rows, truth: &Rows, what: &str) {
    assert_eq!(ours.keys().collect::<Vec<_>>(), truth.keys().collect::<Vec<_>>(), "{what}");
    for ((key, a), b) in ours.iter().zip(truth.values()) {
        let close = |(a, b): (&Option<f64>, &Option<f64>)| match (a, b) {
            (Some(a), Some(b)) => a == b || (a - b).abs() <= 1e-12 * a.abs().max(b.abs()),
            (a, b) => a == b,
        };
        assert!(a.iter().zip(b).all(close), "{what}: {key:?}: {a:?} and {b:?}");
    }
}

const SYMBOLS: [&str; 5] = ["A", "B", "C", "D", "NULL"];

fn event(most: i64) -> impl Strategy<Value = Event> {
    (-most..most, prop::sample::select(SYMBOLS.to_vec()), (1..100i32).prop_map(f64::from))
        .prop_map(|(at, symbol, x)| (at * SECOND / 4, symbol, x))
}

/// A change: symbol, part, factor (none: a deletion), when it is valid from.
type Change = (&'static str, &'static str, Option<i32>, i64);

fn change(most: i64) -> impl Strategy<Value = Change> {
    let symbols = prop::sample::select(SYMBOLS[..4].to_vec());
    let parts = prop::sample::select(vec!["p", "q"]);
    (symbols, parts, prop::option::weighted(0.8, 1..50i32), -most..most)
        .prop_map(|(symbol, part, factor, at)| (symbol, part, factor, at * SECOND / 4))
}

fn line((symbol, part, factor, from): &Change) -> String {
    let what = factor.map_or_else(|| r#""deleted":true"#.to_owned(), |factor| format!(r#""factor":{factor}"#));
    format!(r#"{{"symbol":"{symbol}","part":"{part}",{what},"valid_from":{from}}}"#)
}

/// The versions of the table with the time each is valid for, as batch SQL joins them.
fn versions(changes: &[Change]) -> RecordBatch {
    let mut by_key: BTreeMap<(&str, &str), BTreeMap<i64, Option<i32>>> = BTreeMap::new();
    for (symbol, part, factor, from) in changes {
        by_key.entry((symbol, part)).or_default().insert(*from, *factor); // the last of one instant stays
    }
    let mut rows: Vec<(&str, &str, f64, i64, i64)> = Vec::new();
    for ((symbol, part), versions) in &by_key {
        let ends = versions.keys().skip(1).copied().chain([i64::MAX]);
        for ((from, factor), to) in versions.iter().zip(ends) {
            rows.extend(factor.map(|factor| (*symbol, *part, f64::from(factor), *from, to)));
        }
    }
    let time = |f: fn(&(&str, &str, f64, i64, i64)) -> i64| -> ArrayRef {
        Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(f)).with_timezone("+00:00"))
    };
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("symbol", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.0)))),
        ("part", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1)))),
        ("factor", Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2)))),
        ("lo", time(|r| r.3)),
        ("hi", time(|r| r.4)),
    ];
    let fields: Vec<Field> = columns.iter().map(|(name, c)| Field::new(*name, c.data_type().clone(), true)).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.into_iter().map(|(_, c)| c).collect()).unwrap()
}

/// Cuts events into batches of the given sizes, over and over.
fn cut(world: &World, side: usize, rows: &[Event], sizes: &[usize]) -> Vec<Step> {
    let (mut steps, mut from, mut sizes) = (Vec::new(), 0, sizes.iter().cycle());
    while from < rows.len() {
        let size = (*sizes.next().unwrap()).min(rows.len() - from);
        steps.push(Step::Events(side, world.batch(side, &rows[from..from + size])));
        from += size;
    }
    steps
}

/// Events of both streams, those of one stream that follow each other in batches of at most `most`.
fn interleaved(world: &World, events: &[(bool, Event)], most: usize) -> Vec<Step> {
    let runs = events.chunk_by(|a, b| a.0 == b.0);
    runs.flat_map(|run| {
        let rows: Vec<Event> = run.iter().map(|(_, event)| *event).collect();
        cut(world, usize::from(run[0].0), &rows, &[most])
    })
    .collect()
}

fn patient() -> Timing {
    Timing { max_delay: Span::seconds(1_000_000), allowed_lateness: Span::ZERO }
}

/// Events are late often, but never too late.
fn forgiving(delay: i64) -> Timing {
    Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::seconds(1_000_000) }
}

fn sides(world: &World, events: &[(bool, Event)]) -> [RecordBatch; 2] {
    [false, true].map(|side| {
        let rows: Vec<Event> = events.iter().filter(|(s, _)| *s == side).map(|(_, event)| *event).collect();
        world.batch(usize::from(side), &rows)
    })
}

/// How many worlds each property is tried in: as many as `TIDEWATCH_ORACLE_CASES` says.
fn cases() -> u32 {
    std::env::var("TIDEWATCH_ORACLE_CASES").map_or(200, |count| count.parse().expect("a number of cases"))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    /// Every event sees the version of its time, whatever the order of events, the cuts and the restarts.
    #[test]
    fn a_table_is_joined_as_of_each_events_time(
        events in prop::collection::vec(event(400), 1..60),
        changes in prop::collection::vec(change(400), 0..40),
        sizes in prop::collection::vec(1..20usize, 1..4),
        restarts in prop::collection::vec(0..40usize, 0..3),
        left in any::<bool>(),
        hop in any::<bool>(),
        residual in prop::sample::select(vec!["", "AND p.factor > 20", "AND p.factor > t.x"]),
        filter in prop::sample::select(vec!["", "WHERE t.x > 30", "WHERE p.part = 'p'"]),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let select = "t.symbol, p.part, count(*) AS n, count(p.factor) AS matched, sum(t.x * p.factor) AS total, max(p.factor) AS most";
        let (window, slide, size) = match hop {
            true => ("hop(t.ts, INTERVAL '7 seconds', INTERVAL '20 seconds')", 7, 20),
            false => ("tumble(t.ts, INTERVAL '10 seconds')", 10, 10),
        };
        let ours = format!(
            "SELECT window_start, window_end, {select} FROM a.events t {kind} ref.factors p ON t.symbol = p.symbol {residual} {filter} \
             GROUP BY {window}, t.symbol, p.part"
        );
        let truth = format!(
            "SELECT window_start, window_end, {select} FROM a.events t {kind} ref.factors p ON t.symbol = p.symbol AND t.ts >= p.lo AND t.ts < p.hi \
             {residual} {filter} GROUP BY window_start, window_end, t.symbol, p.part"
        );
        let lines: Vec<String> = changes.iter().map(line).collect();
        let mut steps: Vec<Step> = lines.chunks(7).map(|lines| Step::Change(world.changes(&lines.join("\n"), 0))).collect();
        steps.extend(cut(&world, 0, &events, &sizes));
        let ours_rows = engine_rows(&world, &world.plan(&ours), patient(), &steps, &restarts);
        let all = windowed(&world.batch(0, &events), slide * SECOND, size * SECOND);
        let truth_rows = batch_rows(&truth, vec![("a.events", all), ("ref.factors", versions(&changes))], 2);
        assert_same(&ours_rows, &truth_rows, &ours);
    }

    /// Sessions and windows that grow are cut from the rows that matched.
    #[test]
    fn sessions_follow_from_the_rows_that_a_table_has_a_match_for(
        events in prop::collection::vec(event(100), 1..60),
        changes in prop::collection::vec(change(100), 0..20),
        sizes in prop::collection::vec(1..20usize, 1..4),
        restarts in prop::collection::vec(0..40usize, 0..3),
        (left, session) in (any::<bool>(), any::<bool>()),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let (call, window) = growing_or_session(session);
        let select = "count(*) AS n, count(factor) AS matched, sum(x * factor) AS total";
        let from = format!("a.events a {kind} ref.factors p ON a.symbol = p.symbol");
        let ours = format!("SELECT a.symbol, p.part, {select} FROM {from} GROUP BY {call}, a.symbol, p.part");
        let truth = format!("SELECT a.ts, a.symbol, p.part, a.x, p.factor FROM {from} AND a.ts >= p.lo AND a.ts < p.hi");
        let lines: Vec<String> = changes.iter().map(line).collect();
        let mut steps: Vec<Step> = lines.chunks(7).map(|lines| Step::Change(world.changes(&lines.join("\n"), 0))).collect();
        steps.extend(cut(&world, 0, &events, &sizes));
        let ours_rows = engine_rows(&world, &world.plan(&ours), patient(), &steps, &restarts);
        let tables = [(("a", "events"), world.batch(0, &events)), (("ref", "factors"), versions(&changes))];
        assert_same(&ours_rows, &windowed_after(&query(&tables, &truth), window, &["symbol", "part"], select), &ours);
    }

    /// The same of pairs of two streams.
    #[test]
    fn sessions_follow_from_the_pairs_of_two_streams(
        events in prop::collection::vec((any::<bool>(), event(100)), 1..80),
        most in 1..20usize,
        restarts in prop::collection::vec(0..40usize, 0..3),
        (left, session) in (any::<bool>(), any::<bool>()),
        (before, after) in (0..8i64, 0..8i64),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let (call, window) = growing_or_session(session);
        let from = format!(
            "a.events a {kind} b.events b ON a.symbol = b.symbol AND b.ts BETWEEN a.ts - INTERVAL '{before} seconds' AND a.ts + INTERVAL '{after} seconds'"
        );
        let ours = format!("SELECT a.symbol, count(*) AS n, count(b.x) AS matched, sum(a.x * b.x) AS total FROM {from} GROUP BY {call}, a.symbol");
        let truth = format!("SELECT a.ts, a.symbol, a.x, b.x AS y FROM {from}");
        let ours_rows = engine_rows(&world, &world.plan(&ours), patient(), &interleaved(&world, &events, most), &restarts);
        let [a, b] = sides(&world, &events);
        let joined = query(&[(("a", "events"), a), (("b", "events"), b)], &truth);
        let select = "count(*) AS n, count(y) AS matched, sum(x * y) AS total";
        assert_same(&ours_rows, &windowed_after(&joined, window, &["symbol"], select), &ours);
    }

    /// Two streams in the same window give what batch SQL gives that compares the windows.
    #[test]
    fn two_streams_are_joined_within_a_window(
        events in prop::collection::vec((any::<bool>(), event(200)), 1..80),
        most in 1..20usize,
        restarts in prop::collection::vec(0..40usize, 0..3),
        left in any::<bool>(),
        seconds in 1..40i64,
        filter in prop::sample::select(vec!["", "WHERE a.x > 30", "WHERE b.x > 30 AND a.x < 90"]),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let select = "a.symbol, count(*) AS n, count(b.x) AS matched, sum(a.x - b.x) AS total, count(DISTINCT a.x) AS different";
        let ours = format!(
            "SELECT window_start, window_end, {select} FROM a.events a {kind} b.events b ON a.symbol = b.symbol {filter} \
             GROUP BY tumble(a.ts, INTERVAL '{seconds} seconds'), a.symbol"
        );
        let truth = format!(
            "SELECT a.window_start, a.window_end, {select} FROM a.events a {kind} b.events b ON a.symbol = b.symbol AND a.window_start = b.window_start \
             {filter} GROUP BY a.window_start, a.window_end, a.symbol"
        );
        let ours_rows = engine_rows(&world, &world.plan(&ours), patient(), &interleaved(&world, &events, most), &restarts);
        let [a, b] = sides(&world, &events).map(|side| windowed(&side, seconds * SECOND, seconds * SECOND));
        assert_same(&ours_rows, &batch_rows(&truth, vec![("a.events", a), ("b.events", b)], 1), &ours);
    }

    /// Two streams within a band of time give what the same SQL gives in batch.
    #[test]
    fn two_streams_are_joined_within_a_band_of_time(
        events in prop::collection::vec((any::<bool>(), event(200)), 1..80),
        most in 1..20usize,
        restarts in prop::collection::vec(0..40usize, 0..3),
        left in any::<bool>(),
        hop in any::<bool>(),
        (before, after) in (-10..30i64, 0..30i64),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let after = after.max(-before);
        let select = "a.symbol, count(*) AS n, count(b.x) AS matched, sum(a.x * b.x) AS total";
        let from = format!(
            "FROM a.events a {kind} b.events b ON a.symbol = b.symbol AND b.ts BETWEEN a.ts - INTERVAL '{before} seconds' AND a.ts + INTERVAL '{after} seconds'"
        );
        let (window, slide, size) = match hop {
            true => ("hop(a.ts, INTERVAL '7 seconds', INTERVAL '20 seconds')", 7, 20),
            false => ("tumble(a.ts, INTERVAL '10 seconds')", 10, 10),
        };
        let ours = format!("SELECT window_start, window_end, {select} {from} GROUP BY {window}, a.symbol");
        let truth = format!("SELECT window_start, window_end, {select} {from} GROUP BY window_start, window_end, a.symbol");
        let ours_rows = engine_rows(&world, &world.plan(&ours), patient(), &interleaved(&world, &events, most), &restarts);
        let [a, b] = sides(&world, &events);
        let a = windowed(&a, slide * SECOND, size * SECOND);
        assert_same(&ours_rows, &batch_rows(&truth, vec![("a.events", a), ("b.events", b)], 1), &ours);
    }

    /// What is late, and what stays without a match, depends on the order of events and not on their cut.
    #[test]
    fn the_cut_into_batches_never_decides_what_two_streams_give(
        events in prop::collection::vec((any::<bool>(), event(120)), 1..100),
        most in 2..30usize,
        restarts in prop::collection::vec(0..20usize, 0..3),
        left in any::<bool>(),
        (band, session) in (any::<bool>(), any::<bool>()),
        (before, after) in (0..20i64, 0..20i64),
        delay in 0..40i64,
        lateness in prop::sample::select(vec![0i64, 0, 5, 30]),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let near = match band {
            true => format!("AND b.ts BETWEEN a.ts - INTERVAL '{before} seconds' AND a.ts + INTERVAL '{after} seconds'"),
            false => String::new(),
        };
        let sql = format!(
            "SELECT a.symbol, count(*) AS n, count(b.x) AS matched, sum(a.x * b.x) AS total FROM a.events a {kind} b.events b \
             ON a.symbol = b.symbol {near} GROUP BY {}, a.symbol",
            if session && band { "session(a.ts, INTERVAL '4 seconds')" } else { "tumble(a.ts, INTERVAL '10 seconds')" }
        );
        let program = world.plan(&sql);
        let timing = Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::seconds(lateness) };
        let one_by_one = engine_rows(&world, &program, timing, &interleaved(&world, &events, 1), &[]);
        let cut_up = engine_rows(&world, &program, timing, &interleaved(&world, &events, most), &restarts);
        assert_same(&cut_up, &one_by_one, &format!("{sql} delay {delay} lateness {lateness}"));
    }

    /// Whatever comes late but within the lateness: in the end the rows are those of batch SQL, also where a left row had
    /// gone out without the match that came later.
    #[test]
    fn late_events_of_two_streams_correct_the_rows_to_those_of_batch_sql(
        events in prop::collection::vec((any::<bool>(), event(120)), 1..100),
        most in 1..20usize,
        restarts in prop::collection::vec(0..40usize, 0..3),
        (left, delay) in (prop::bool::weighted(0.8), 0..20i64),
        kind_of_window in prop::sample::select(vec!["same", "tumble", "hop", "cumulate"]),
        (before, after) in (-4..12i64, 0..12i64),
        key in prop::sample::select(vec!["a.symbol", "b.symbol", "b.x"]),
        filter in prop::sample::select(vec!["", "WHERE a.x > 30", "WHERE b.x IS NULL OR b.x < 60"]),
        having in prop::sample::select(vec!["", "HAVING count(b.x) <> 1"]),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let after = after.max(-before);
        let (window, slide, size) = match kind_of_window {
            "hop" => ("hop(a.ts, INTERVAL '7 seconds', INTERVAL '20 seconds')", 7, 20),
            "cumulate" => ("cumulate(a.ts, INTERVAL '5 seconds', INTERVAL '20 seconds')", 0, 0),
            _ => ("tumble(a.ts, INTERVAL '10 seconds')", 10, 10),
        };
        let band = format!("AND a.ts - b.ts BETWEEN INTERVAL '{} seconds' AND INTERVAL '{before} seconds'", -after);
        let near = if kind_of_window == "same" { "" } else { &band };
        let select = format!("{key} AS k, count(*) AS n, count(b.x) AS matched, sum(a.x * b.x) AS total");
        let from = format!("FROM a.events a {kind} b.events b ON a.symbol = b.symbol");
        let ours = format!("SELECT {select} {from} {near} {filter} GROUP BY {window}, {key} {having}");
        let rows = engine_rows(&world, &world.plan(&ours), forgiving(delay), &interleaved(&world, &events, most), &restarts);
        let [a, b] = sides(&world, &events);
        let truth = match kind_of_window {
            "cumulate" => {
                let joined = format!("SELECT a.ts, a.symbol, {key} AS k, a.x, b.x AS y {from} {near} {filter}");
                let joined = query(&[(("a", "events"), a), (("b", "events"), b)], &joined);
                let select = "count(*) AS n, count(y) AS matched, sum(x * y) AS total";
                let mut truth = windowed_after(&joined, growing_or_session(false).1, &["k"], select);
                truth.retain(|_, values| having.is_empty() || values[1] != Some(1.0));
                truth
            }
            _ => {
                let same = if kind_of_window == "same" { "AND a.window_start = b.window_start" } else { near };
                let truth = format!(
                    "SELECT a.window_start, a.window_end, {select} {from} {same} {filter} \
                     GROUP BY a.window_start, a.window_end, {key} {having}"
                );
                let a = windowed(&a, slide * SECOND, size * SECOND);
                let b = if kind_of_window == "same" { windowed(&b, slide * SECOND, size * SECOND) } else { b };
                batch_rows(&truth, vec![("a.events", a), ("b.events", b)], 1)
            }
        };
        assert_same(&rows, &truth, &format!("{ours} delay {delay}"));
    }

    /// Sessions cannot be computed anew: a match that comes too late for a left row is a dead letter, and the rows are
    /// those of batch SQL over all other events.
    #[test]
    fn sessions_of_a_left_join_are_those_of_the_events_that_were_not_late(
        events in prop::collection::vec((any::<bool>(), event(120)), 1..100),
        most in 1..20usize,
        restarts in prop::collection::vec(0..40usize, 0..3),
        (left, delay) in (prop::bool::weighted(0.8), 0..20i64),
        (before, after) in (0..8i64, 0..8i64),
    ) {
        let world = World::new();
        let kind = if left { "LEFT JOIN" } else { "JOIN" };
        let (call, window) = growing_or_session(true);
        let from = format!(
            "a.events a {kind} b.events b ON a.symbol = b.symbol AND b.ts BETWEEN a.ts - INTERVAL '{before} seconds' AND a.ts + INTERVAL '{after} seconds'"
        );
        let ours = format!("SELECT a.symbol, count(*) AS n, count(b.x) AS matched, sum(a.x * b.x) AS total FROM {from} GROUP BY {call}, a.symbol");
        let steps = interleaved(&world, &events, most);
        let (rows, late) = rows_and_late(&world, &world.plan(&ours), forgiving(delay), &steps, &restarts);
        assert!(left || late.is_empty());
        let starts = steps.iter().scan(0, |next, step| {
            let Step::Events(_, batch) = step else { unreachable!("there are only events") };
            Some(std::mem::replace(next, *next + batch.num_rows()))
        });
        let starts: Vec<usize> = starts.collect();
        let late: Vec<usize> = late.into_iter().map(|(step, row)| starts[step] + row as usize).collect();
        let counted: Vec<(bool, Event)> =
            events.iter().enumerate().filter(|(at, _)| !late.contains(at)).map(|(_, event)| *event).collect();
        let [a, b] = sides(&world, &counted);
        let truth = format!("SELECT a.ts, a.symbol, a.x, b.x AS y FROM {from}");
        let joined = query(&[(("a", "events"), a), (("b", "events"), b)], &truth);
        let select = "count(*) AS n, count(y) AS matched, sum(x * y) AS total";
        assert_same(&rows, &windowed_after(&joined, window, &["symbol"], select), &format!("{ours} delay {delay}"));
    }

    /// Versions that are forgotten are those that nobody sees: tables that forget early give the same rows.
    #[test]
    fn forgotten_versions_are_seen_by_no_event(
        events in prop::collection::vec(event(200), 1..60),
        changes in prop::collection::vec(change(200), 1..30),
        delay in 0..60i64,
        lateness in prop::sample::select(vec![0i64, 10, 60]),
    ) {
        let world = World::new();
        let sql = "SELECT t.symbol, count(*) AS n, sum(t.x * p.factor) AS total FROM a.events t JOIN ref.factors p ON t.symbol = p.symbol \
                   GROUP BY tumble(t.ts, INTERVAL '10 seconds'), t.symbol";
        // event and change in turn, so that versions go while others come
        let mut steps: Vec<Step> = Vec::new();
        for at in 0..events.len().max(changes.len()) {
            steps.extend(changes.get(at).map(|change| Step::Change(world.changes(&line(change), 0))));
            steps.extend(events.get(at).map(|event| Step::Events(0, world.batch(0, &[*event]))));
        }
        let timing = Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::seconds(lateness) };
        let program = world.plan(sql);
        let forgetting = engine_rows(&world, &program, timing, &steps, &[]);
        // a second metric that never gets on keeps every version
        let mut workspace = Workspace::default();
        workspace.define_table(world.table.schema().clone()).unwrap();
        workspace.define(metric(), 1, program.clone(), timing).unwrap();
        let held = world.plan(&sql.replace("a.events", "b.events"));
        workspace.define("held".parse().unwrap(), 1, held, timing).unwrap();
        let mut keeping = Rows::new();
        let of_metric = |mut outputs: Outputs| {
            outputs.rows.retain(|rows| rows.metric == metric());
            outputs
        };
        for (at, step) in steps.iter().enumerate() {
            match step {
                Step::Events(side, batch) => {
                    keep(&mut keeping, of_metric(workspace.step(&world.streams[*side].stream, batch)), &program);
                }
                Step::Change(batch) => workspace.change_table(world.table.name(), batch, at as u64).unwrap(),
            }
        }
        keep(&mut keeping, of_metric(workspace.idle(&world.streams[0].stream, Micros(i64::MAX / 2))), &program);
        assert_same(&forgetting, &keeping, &format!("delay {delay} lateness {lateness}"));
    }
}

#[test]
fn an_event_meets_the_sessions_that_are_open_when_its_turn_in_the_batch_comes() {
    let world = World::new();
    let at = |right: bool, quarters: i64, symbol: &'static str| (right, (quarters * SECOND / 4, symbol, 1.0));
    // the fourth ends the session of the first pair, and the last one's would have been joined to it
    let ended = [at(false, 0, "C"), at(true, 0, "C"), at(true, 109, "A"), at(false, 61, "A"), at(false, 2, "C")];
    // of the last two, each with two matches, the first opens a session that the second one's late match belongs to
    let opened =
        [(false, 31, "B"), (false, 18, "B"), (true, 87, "A"), (false, 87, "A"), (true, 0, "B"), (true, 0, "B")]
            .map(|(right, quarters, symbol)| at(right, quarters, symbol));
    for (events, before, delay, rows) in [(&ended[..], 1, 11, 2), (&opened[..], 8, 10, 2)] {
        let program = world.plan(&format!(
            "SELECT a.symbol, count(*) AS n FROM a.events a JOIN b.events b ON a.symbol = b.symbol \
             AND b.ts BETWEEN a.ts - INTERVAL '{before} seconds' AND a.ts \
             GROUP BY session(a.ts, INTERVAL '4 seconds'), a.symbol"
        ));
        let timing = Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::ZERO };
        let cut = |most| engine_rows(&world, &program, timing, &interleaved(&world, events, most), &[]);
        assert_eq!(cut(1).len(), rows);
        assert_same(&cut(2), &cut(1), "two at a time");
    }
}

#[test]
fn a_change_without_a_date_is_valid_from_its_arrival_and_the_first_of_a_key_all_the_time() {
    let world = World::new();
    let sql = "SELECT sum(t.x * p.factor) AS total FROM a.events t JOIN ref.factors p ON t.symbol = p.symbol \
               GROUP BY tumble(t.ts, INTERVAL '1 second')";
    let change = |line: &str, now: i64| Step::Change(world.changes(line, now * SECOND));
    let steps = [
        change(r#"{"symbol":"A","part":"p","factor":2}"#, 100),
        change(r#"{"symbol":"A","part":"p","factor":3}"#, 110),
        change(r#"{"symbol":"A","part":"p","deleted":true}"#, 120),
        change(r#"{"symbol":"B","part":"p","deleted":true}"#, 120),
        Step::Events(0, world.batch(0, &[5, 109, 110, 119, 120].map(|at| (at * SECOND, "A", 1.0)))),
    ];
    let rows = engine_rows(&world, &world.plan(sql), patient(), &steps, &[3]);
    let totals: Vec<(i64, Option<f64>)> = rows.iter().map(|(key, values)| (key.0 / SECOND, values[0])).collect();
    assert_eq!(totals, [(5, Some(2.0)), (109, Some(2.0)), (110, Some(3.0)), (119, Some(3.0))]);
}

#[test]
fn a_table_that_gains_a_column_keeps_its_rows_and_the_metrics_that_read_it() {
    let world = World::new();
    let sql = "SELECT sum(t.x * p.factor) AS total FROM a.events t JOIN ref.factors p ON t.symbol = p.symbol \
               GROUP BY tumble(t.ts, INTERVAL '1 second')";
    let mut workspace = Workspace::default();
    workspace.define_table(world.table.schema().clone()).unwrap();
    workspace.define(metric(), 1, world.plan(sql), patient()).unwrap();
    let change = world.changes(r#"{"symbol":"A","part":"p","factor":2}"#, 0);
    workspace.change_table(world.table.name(), &change, 0).unwrap();
    let mut columns = vec![column(r#"{"name":"note","type":"utf8"}"#)];
    columns.extend(world.table.columns.iter().cloned());
    let wider = Table::new(world.table.name().clone(), columns, world.table.primary_key.clone()).unwrap();
    world.table.check_evolution(&wider).unwrap();
    workspace.define_table(wider.schema().clone()).unwrap();
    drop(workspace.step(&world.streams[0].stream, &world.batch(0, &[(0, "A", 5.0)])));
    let live = workspace.live(&metric()).unwrap();
    let mut rows = Rows::new();
    collect(&mut rows, &live[0].batch, 0);
    assert_eq!(rows.into_values().next().unwrap(), [Some(10.0)]);
    let rows = workspace.tables().rows(wider.name(), Micros(0)).unwrap().unwrap();
    assert_eq!((rows.num_rows(), rows.num_columns()), (1, 5));
}

#[test]
fn a_left_row_without_a_match_comes_when_no_match_can_come_any_more() {
    let world = World::new();
    let sql = "SELECT count(*) AS n, count(b.x) AS matched FROM a.events a LEFT JOIN b.events b \
               ON a.symbol = b.symbol AND ABS(a.ts - b.ts) <= INTERVAL '5 seconds' GROUP BY tumble(a.ts, INTERVAL '10 seconds')";
    let program = world.plan(sql);
    let mut workspace = Workspace::default();
    workspace
        .define(metric(), 1, program.clone(), Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO })
        .unwrap();
    let mut step = |side: usize, at: i64| {
        let mut rows = Rows::new();
        let batch = world.batch(side, &[(at * SECOND, "A", 1.0)]);
        keep(&mut rows, workspace.step(&world.streams[side].stream, &batch), &program);
        rows.into_iter().map(|(key, values)| (key.0 / SECOND, values)).collect::<Vec<_>>()
    };
    assert_eq!(step(0, 1), []);
    assert_eq!(step(0, 8), []);
    assert_eq!(step(1, 3), []); // matches both: 1 and 8 are within 5 s
    assert_eq!(step(0, 9), []); // waits
    assert_eq!(step(0, 30), []);
    assert_eq!(step(1, 14), [], "a match for 9 may still come at 14");
    assert_eq!(
        step(1, 15),
        [(0, vec![Some(3.0), Some(3.0)])],
        "14 was the match for 9; nothing can match before 10 now"
    );
    assert_eq!(step(1, 99), [], "30 waits for its own stream");
    assert_eq!(step(0, 99), [(30, vec![Some(1.0), Some(0.0)])]);
}

const COUNTS: &str = "count(*) AS n, count(b.x) AS matched, sum(b.x) AS total";
const BAND: &str = "AND ABS(a.ts - b.ts) <= INTERVAL '3 seconds'";

/// A left join by the minute, event by event.
struct ByMinute {
    world: World,
    program: Arc<Program>,
    workspace: Workspace,
    timing: Timing,
}

impl ByMinute {
    fn new(near: &str, lateness: i64) -> ByMinute {
        let world = World::new();
        let sql = format!(
            "SELECT a.symbol, {COUNTS} FROM a.events a LEFT JOIN b.events b ON a.symbol = b.symbol {near} \
             GROUP BY tumble(a.ts, INTERVAL '1 minute'), a.symbol"
        );
        let program = world.plan(&sql);
        let timing = Timing { max_delay: Span::seconds(1), allowed_lateness: Span::seconds(lateness) };
        let mut workspace = Workspace::default();
        workspace.define(metric(), 1, program.clone(), timing).unwrap();
        ByMinute { world, program, workspace, timing }
    }

    fn restart(&mut self) {
        let state = self.workspace.state().unwrap();
        self.workspace = Workspace::default();
        self.workspace.define(metric(), 1, self.program.clone(), self.timing).unwrap();
        assert_eq!(self.workspace.restore(Saved::read(&state).unwrap()).unwrap(), []);
    }

    /// The final rows that an event gives: symbol, values and revision.
    fn step(&mut self, side: usize, second: i64, symbol: &'static str, x: f64) -> Vec<(String, Vec<Option<f64>>, i64)> {
        let batch = self.world.batch(side, &[(second * SECOND, symbol, x)]);
        let outputs = self.workspace.step(&self.world.streams[side].stream, &batch);
        assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
        assert!(outputs.late.is_empty());
        let mut found = Vec::new();
        for part in outputs.rows.iter().map(|part| &part.rows) {
            for (row, revision) in part.revisions.iter().flatten().enumerate() {
                let mut rows = Rows::new();
                collect(&mut rows, &part.batch.slice(row, 1), 1);
                found.extend(rows.into_iter().map(|((_, _, symbol), values)| (symbol, values, *revision)));
            }
        }
        found
    }

    /// Both streams go on to a second, with events of another key.
    fn go_on(&mut self, second: i64) -> Vec<(String, Vec<Option<f64>>, i64)> {
        let mut rows = self.step(0, second, "F", 1.0);
        rows.extend(self.step(1, second, "F", 1.0));
        rows
    }
}

fn row(symbol: &str, [n, matched]: [i32; 2], total: Option<f64>, revision: i64) -> (String, Vec<Option<f64>>, i64) {
    (symbol.to_owned(), vec![Some(f64::from(n)), Some(f64::from(matched)), total], revision)
}

#[test]
fn a_late_match_corrects_a_final_row_that_had_none() {
    for near in [BAND, ""] {
        let mut metric = ByMinute::new(near, 3_600);
        assert_eq!(metric.step(0, 30, "B", 1.0), []);
        assert_eq!(metric.go_on(100), [row("B", [1, 0], None, 0)]);
        assert_eq!(metric.go_on(300), [row("F", [1, 1], Some(1.0), 0)]);
        metric.restart();
        assert_eq!(metric.step(1, 31, "B", 9.0), [row("B", [1, 1], Some(9.0), 1)], "{near}");
        metric.restart();
        assert_eq!(metric.step(1, 32, "B", 5.0), [row("B", [2, 2], Some(14.0), 2)], "{near}");
    }
}

#[test]
fn late_matches_and_a_late_left_event_give_every_pair() {
    let mut metric = ByMinute::new(BAND, 3_600);
    assert_eq!(metric.step(0, 20, "B", 1.0), []);
    assert_eq!(metric.step(0, 40, "B", 1.0), []);
    assert_eq!(metric.step(1, 41, "B", 1.0), []);
    assert_eq!(metric.go_on(100), [row("B", [2, 1], Some(1.0), 0)]);
    assert_eq!(metric.step(1, 21, "B", 2.0), [row("B", [2, 2], Some(3.0), 1)]);
    assert_eq!(metric.step(1, 22, "B", 4.0), [row("B", [3, 3], Some(7.0), 2)]);
    assert_eq!(metric.step(0, 21, "B", 1.0), [row("B", [5, 5], Some(13.0), 3)]);
}

/// More pairs than go into the metric at once.
#[test]
fn many_late_matches_at_once_give_every_pair() {
    let mut metric = ByMinute::new(BAND, 3_600);
    let batch = |side: usize, at: i64| metric.world.batch(side, &[(at * SECOND, "B", 1.0); 300]);
    let (left, right) = (batch(0, 30), batch(1, 31));
    drop(metric.workspace.step(&metric.world.streams[0].stream, &left));
    assert_eq!(metric.go_on(100), [row("B", [300, 0], None, 0)]);
    let mut rows = Rows::new();
    keep(&mut rows, metric.workspace.step(&metric.world.streams[1].stream, &right), &metric.program);
    assert_eq!(rows.into_values().collect::<Vec<_>>(), [[Some(90_000.0); 3]]);
}

#[test]
fn a_match_behind_the_watermark_counts_while_the_window_is_open() {
    let mut metric = ByMinute::new(BAND, 0);
    assert_eq!(metric.step(0, 30, "B", 1.0), []);
    assert_eq!(metric.go_on(50), [], "no match for 30 is expected any more");
    assert_eq!(metric.step(1, 31, "B", 9.0), []);
    assert_eq!(metric.go_on(100), [row("B", [1, 1], Some(9.0), 0), row("F", [1, 1], Some(1.0), 0)]);
}

#[test]
fn a_left_event_without_a_key_stays_when_its_pane_is_computed_anew() {
    let world = World::new();
    let sql = format!(
        "SELECT {COUNTS} FROM a.events a LEFT JOIN b.events b ON a.symbol = b.symbol {BAND} \
         GROUP BY tumble(a.ts, INTERVAL '1 minute')"
    );
    let at = |second: i64, symbol: &'static str| vec![(second * SECOND, symbol, 9.0)];
    let steps = [(0, at(30, "B")), (0, at(30, "NULL")), (0, at(100, "F")), (1, at(100, "F")), (1, at(31, "B"))];
    let steps = steps.map(|(side, events)| Step::Events(side, world.batch(side, &events)));
    let rows = engine_rows(&world, &world.plan(&sql), forgiving(1), &steps, &[4]);
    assert_eq!(rows.into_values().next().unwrap(), [Some(2.0), Some(1.0), Some(9.0)]);
}

#[test]
fn a_late_match_of_a_left_join_changes_what_is_on_top_and_finds_its_row_of_a_table() {
    let world = World::new();
    let sql = format!(
        "SELECT a.symbol, count(*) AS n, count(b.x) AS matched, sum(b.x * p.factor) AS total \
         FROM a.events a LEFT JOIN b.events b ON a.symbol = b.symbol {BAND} JOIN ref.factors p ON a.symbol = p.symbol \
         GROUP BY tumble(a.ts, INTERVAL '1 minute'), a.symbol ORDER BY matched DESC LIMIT 1"
    );
    let at = |second: i64, symbol: &'static str| vec![(second * SECOND, symbol, 9.0)];
    let events = [(0, at(30, "A")), (1, at(30, "A")), (0, at(30, "B")), (0, at(30, "C")), (0, at(100, "F"))];
    let late = [(1, at(100, "F")), (1, at(31, "B")), (1, at(32, "B"))];
    let rows = r#"{"symbol":"A","part":"p","factor":2}
                  {"symbol":"B","part":"p","factor":10}"#;
    let steps = events.into_iter().chain(late).map(|(side, events)| Step::Events(side, world.batch(side, &events)));
    let steps: Vec<Step> = std::iter::once(Step::Change(world.changes(rows, 0))).chain(steps).collect();
    let rows = engine_rows(&world, &world.plan(&sql), forgiving(1), &steps, &[7]);
    let rows: Vec<_> = rows.into_iter().map(|((_, _, symbol), values)| (symbol, values)).collect();
    assert_eq!(rows, [("B".to_owned(), vec![Some(2.0), Some(2.0), Some(180.0)])]);
}

#[test]
fn a_match_that_comes_too_late_for_a_session_is_a_dead_letter() {
    let world = World::new();
    let sql = format!(
        "SELECT a.symbol, {COUNTS} FROM a.events a LEFT JOIN b.events b ON a.symbol = b.symbol {BAND} \
         GROUP BY session(a.ts, INTERVAL '10 seconds'), a.symbol"
    );
    let at = |second: i64, symbol: &'static str| vec![(second * SECOND, symbol, 9.0)];
    let steps = [(0, at(30, "B")), (0, at(100, "F")), (1, at(100, "F")), (1, at(31, "B")), (1, at(50, "B"))];
    let steps = steps.map(|(side, events)| Step::Events(side, world.batch(side, &events)));
    let (rows, late) = rows_and_late(&world, &world.plan(&sql), forgiving(1), &steps, &[3]);
    assert_eq!(late, [(3, 0)]);
    let rows: Vec<_> = rows.into_iter().map(|((_, _, symbol), values)| (symbol, values)).collect();
    let wanted = [("B", [1.0, 0.0], None), ("F", [1.0, 1.0], Some(9.0))];
    assert_eq!(rows, wanted.map(|(symbol, [n, m], total)| (symbol.to_owned(), vec![Some(n), Some(m), total])));
}

/// The state of an inner join has the shape that a left join's had before it kept the events without a match.
#[test]
fn older_state_of_a_left_join_is_not_read() {
    let world = World::new();
    let workspace = |kind: &str| {
        let sql = format!(
            "SELECT a.symbol, {COUNTS} FROM a.events a {kind} b.events b ON a.symbol = b.symbol {BAND} \
             GROUP BY tumble(a.ts, INTERVAL '1 minute'), a.symbol"
        );
        let mut workspace = Workspace::default();
        workspace.define(metric(), 1, world.plan(&sql), forgiving(1)).unwrap();
        workspace
    };
    for (older, newer) in [("JOIN", "LEFT JOIN"), ("LEFT JOIN", "JOIN")] {
        let mut before = workspace(older);
        drop(before.step(&world.streams[0].stream, &world.batch(0, &[(SECOND, "A", 1.0)])));
        let saved = before.state().unwrap();
        let read = workspace(newer).restore(Saved::read(&saved).unwrap());
        assert!(matches!(read, Err(RestoreError::Mismatch(_))), "{read:?}");
        assert_eq!(workspace(older).restore(Saved::read(&saved).unwrap()).unwrap(), []);
    }
}

fn refused(sql: &str, line: u64, column: u64, message: &str) {
    let world = World::new();
    let error = futures::executor::block_on(Planner::default().program(sql, |name: &StreamName| world.schema(name)));
    let error = error.expect_err(sql);
    assert!(error.to_string().contains(message), "{sql}\n{error}");
    assert_eq!((error.line, error.column), (Some(line), Some(column)), "{sql}\n{error}");
}

#[test]
fn joins_that_cannot_run_are_refused_with_their_place_and_what_to_write() {
    let minute = "GROUP BY tumble(a.ts, INTERVAL '1 minute')";
    let from = |rest: &str| format!("SELECT count(*) FROM a.events a {rest}");
    refused(&from(&format!("JOIN ref.nothing p ON a.symbol = p.symbol {minute}")), 1, 38, "PUT …/tables/nothing");
    refused(&from(&format!(", b.events b {minute}")), 1, 35, "write JOIN");
    refused(&from(&format!("RIGHT JOIN b.events b ON a.symbol = b.symbol {minute}")), 1, 44, "swap the sides");
    refused(&from(&format!("FULL JOIN b.events b ON a.symbol = b.symbol {minute}")), 1, 43, "write JOIN or LEFT JOIN");
    refused(&from(&format!("CROSS JOIN b.events b {minute}")), 1, 44, "write JOIN or LEFT JOIN");
    refused(&from(&format!("JOIN b.events b {minute}")), 1, 38, "ON a.key = b.key");
    refused(&from(&format!("JOIN b.events b ON a.x > b.x {minute}")), 1, 38, "compares no columns");
    refused(&from(&format!("JOIN a.events b ON a.symbol = b.symbol {minute}")), 1, 38, "with itself");
    refused(
        &from(&format!("JOIN ref.factors p ON a.symbol = p.symbol JOIN b.events b ON a.symbol = b.symbol {minute}")),
        1,
        80,
        "a third stream",
    );
    refused(
        &from("JOIN b.events b ON a.symbol = b.symbol GROUP BY tumble(b.ts, INTERVAL '1 minute')"),
        1,
        88,
        "write a.ts",
    );
    refused(
        &from("JOIN b.events b ON a.symbol = b.symbol GROUP BY tumble(ts, INTERVAL '1 minute')"),
        1,
        88,
        "write a.ts",
    );
    refused(
        &from("JOIN b.events b ON a.symbol = b.symbol GROUP BY hop(a.ts, INTERVAL '1 minute', INTERVAL '2 minutes')"),
        1,
        38,
        "b.ts BETWEEN a.ts - INTERVAL",
    );
    refused(&from(&format!("JOIN b.events b ON a.symbol = b.symbol AND b.ts > a.ts {minute}")), 1, 76, "one end only");
    refused(
        &from(&format!(
            "JOIN b.events b ON a.symbol = b.symbol AND b.ts BETWEEN a.ts AND a.ts - INTERVAL '1 second' {minute}"
        )),
        1,
        38,
        "no two events",
    );
    refused(
        &from(&format!("LEFT JOIN b.events b ON a.symbol = b.symbol AND a.x > b.x {minute}")),
        1,
        43,
        "put the rest in WHERE",
    );
    let on = |condition: &str| from(&format!("JOIN b.events b ON a.symbol = b.symbol AND {condition} {minute}"));
    for (condition, column) in [
        ("abs(extract(epoch from a.ts) - extract(epoch from b.ts)) <= 3", 76),
        ("a.ts - b.ts NOT BETWEEN INTERVAL '-2 seconds' AND INTERVAL '5 seconds'", 76),
        ("ABS(a.ts - b.ts) >= INTERVAL '5 seconds'", 76),
        ("ABS(a.ts - b.ts) BETWEEN INTERVAL '1 second' AND INTERVAL '5 seconds'", 76),
        ("(a.ts = b.ts OR a.x = b.x)", 77),
        ("a.ts <> b.ts", 76),
        ("date_trunc('hour', a.ts) = date_trunc('hour', b.ts)", 76),
        ("CAST(a.ts AS DATE) = CAST(b.ts AS DATE)", 81),
        ("b.ts BETWEEN a.ts AND b.ts + INTERVAL '1 second'", 76),
        ("a.ts - b.ts BETWEEN a.ts - a.ts AND INTERVAL '5 seconds'", 76),
    ] {
        refused(&on(condition), 1, column, "a.ts - b.ts BETWEEN INTERVAL '-5 seconds'");
    }
    let both = "extract(epoch from a.ts) < extract(epoch from b.ts)";
    refused(&from(&format!("LEFT JOIN b.events b ON a.symbol = b.symbol AND {both} {minute}")), 1, 100, "in ON");
    let filtered = |near: &str| from(&format!("JOIN b.events b ON a.symbol = b.symbol {near} WHERE {both} {minute}"));
    refused(&filtered(""), 1, 98, "in WHERE");
    // how near they are is said: the rest is a filter
    World::new().plan(&filtered("AND a.ts = b.ts"));
    World::new().plan(&filtered("AND tumble(a.ts, INTERVAL '1 minute') = tumble(b.ts, INTERVAL '1 minute')"));
    refused(&on("tumble(a.ts, INTERVAL '1 hour') = tumble(b.ts, INTERVAL '1 hour')"), 1, 38, "another window");
    refused(
        &format!("SELECT count(*) FROM ref.factors p JOIN a.events a ON a.symbol = p.symbol {minute}"),
        1,
        22,
        "name the stream first",
    );
}

#[test]
fn a_band_may_be_written_in_every_usual_way() {
    let world = World::new();
    let symbols = "SELECT count(*) AS n FROM a.events a JOIN b.events b ON a.symbol = b.symbol";
    let events: Vec<(bool, Event)> =
        (0..40).map(|at| (at % 3 == 0, (at * SECOND, SYMBOLS[at as usize % 2], 1.0))).collect();
    let steps = interleaved(&world, &events, 7);
    let rows = |band: &str, place: &str| {
        let sql = format!("{symbols} {place} {band} GROUP BY tumble(a.ts, INTERVAL '10 seconds')");
        engine_rows(&world, &world.plan(&sql), patient(), &steps, &[])
    };
    let wanted = rows("b.ts BETWEEN a.ts - INTERVAL '5 seconds' AND a.ts + INTERVAL '5 seconds'", "AND");
    assert!(wanted.len() > 3);
    for band in [
        "ABS(a.ts - b.ts) <= INTERVAL '5 seconds'",
        "abs(b.ts - a.ts) < INTERVAL '5.000001 seconds'",
        "a.ts BETWEEN b.ts - INTERVAL '5 seconds' AND b.ts + INTERVAL '5 seconds'",
        "(a.ts - b.ts <= INTERVAL '5 seconds' AND b.ts - a.ts <= INTERVAL '5 seconds')",
        "b.ts >= a.ts - INTERVAL '5 seconds' AND b.ts <= a.ts + INTERVAL '5 seconds'",
        "a.ts + INTERVAL '5 seconds' >= b.ts AND a.ts < b.ts + INTERVAL '5.000001 seconds'",
        "INTERVAL '5 seconds' >= ABS(a.ts - b.ts)",
        "INTERVAL '5.000001 seconds' > ABS(b.ts - a.ts)",
        "ABS(a.ts - b.ts) BETWEEN INTERVAL '0 seconds' AND INTERVAL '5 seconds'",
        "a.ts - b.ts BETWEEN INTERVAL '-5 seconds' AND INTERVAL '5 seconds'",
    ] {
        assert_same(&rows(band, "AND"), &wanted, band);
        assert_same(&rows(band, "WHERE"), &wanted, band);
    }
    let lopsided = rows("b.ts BETWEEN a.ts - INTERVAL '5 seconds' AND a.ts + INTERVAL '2 seconds'", "AND");
    assert_ne!(lopsided, wanted);
    for band in [
        "a.ts - b.ts BETWEEN INTERVAL '-2 seconds' AND INTERVAL '5 seconds'",
        "(a.ts - b.ts) BETWEEN -INTERVAL '2 seconds' AND INTERVAL '5 seconds'",
        "b.ts - a.ts BETWEEN INTERVAL '-5 seconds' AND INTERVAL '2 seconds'",
        "INTERVAL '-2 seconds' <= a.ts - b.ts AND INTERVAL '5 seconds' >= a.ts - b.ts",
        "INTERVAL '2.000001 seconds' > b.ts - a.ts AND INTERVAL '-5 seconds' <= b.ts - a.ts",
    ] {
        assert_same(&rows(band, "AND"), &lopsided, band);
        assert_same(&rows(band, "WHERE"), &lopsided, band);
    }
}

/// Lines of a shared file as events of a stream; `None` where the folder is missing.
fn shared(
    path: &str,
    schema: &StreamSchema,
    keep: impl Fn(&serde_json::Value) -> bool,
    ts: &str,
) -> Option<RecordBatch> {
    let path = Path::new("../../shared/data/truth").join(path);
    let Ok(file) = std::fs::File::open(&path) else {
        println!("skipped: the shared data folder is not beside the project");
        return None;
    };
    let mut text = String::new();
    let read: Box<dyn std::io::Read> = match path.extension().is_some_and(|end| end == "zst") {
        true => Box::new(zstd::stream::read::Decoder::new(file).unwrap()),
        false => Box::new(file),
    };
    std::io::Read::read_to_string(&mut { read }, &mut text).unwrap();
    let mut lines = String::new();
    for line in text.lines() {
        let mut event: serde_json::Value = serde_json::from_str(line).unwrap();
        if keep(&event) {
            let at = event[ts].as_str().unwrap().replace(' ', "T");
            event["ts"] = (if at.ends_with('Z') { at } else { at + "Z" }).into();
            if let Some(id) = event.as_object_mut().unwrap().remove("id") {
                event["number"] = id;
            }
            lines.push_str(&format!("{event}\n"));
        }
    }
    let now = Micros(1_800_000_000_000_000);
    let decoded = decode(schema, lines.as_bytes(), Format::Ndjson, TsUnit::Micros, &Bounds::default(), now).unwrap();
    assert_eq!(decoded.rejected, 0, "{:?}", decoded.errors.first());
    Some(decoded.batch)
}

fn run(program: Arc<Program>, table: Option<(&Table, RecordBatch)>, inputs: &[(&StreamSchema, RecordBatch)]) -> Rows {
    let mut workspace = Workspace::default();
    if let Some((table, changes)) = table {
        workspace.define_table(table.schema().clone()).unwrap();
        workspace.change_table(table.name(), &changes, 0).unwrap();
    }
    workspace.define(metric(), 1, program.clone(), patient()).unwrap();
    let mut rows = Rows::new();
    for (schema, batch) in inputs {
        for from in (0..batch.num_rows()).step_by(64) {
            let part = batch.slice(from, 64.min(batch.num_rows() - from));
            keep(&mut rows, workspace.step(&schema.stream, &part), &program);
        }
    }
    for (schema, _) in inputs {
        keep(&mut rows, workspace.idle(&schema.stream, Micros(i64::MAX / 2)), &program);
    }
    rows
}

/// Arroyo's `windowed_inner_join`: drivers with a drop-off and drivers with a pick-up, hour by hour. Arroyo joins two
/// aggregates on the hour; here every pair of the hour is counted.
#[test]
fn drivers_of_drop_offs_and_pick_ups_by_the_hour_are_those_of_arroyo() {
    let columns = [("driver_id", "int64"), ("city", "utf8")];
    let (offs, ups) = (stream("cars.dropoffs", &columns), stream("cars.pickups", &columns));
    let path = "windows_arroyo/inputs/cars.json.zst";
    let of = |schema: &StreamSchema, kind: &str| shared(path, schema, |event| event["event_type"] == kind, "timestamp");
    let (Some(dropoffs), Some(pickups)) = (of(&offs, "dropoff"), of(&ups, "pickup")) else { return };
    let sql = "SELECT count(DISTINCT d.driver_id) AS drivers, count(DISTINCT p.driver_id) AS pickups FROM cars.dropoffs d \
               JOIN cars.pickups p ON coalesce(d.city, '') = coalesce(p.city, '') GROUP BY tumble(d.ts, INTERVAL '1 hour')";
    let schemas = |name: &StreamName| [&offs, &ups].into_iter().find(|s| s.stream == *name).map(|s| s.arrow().clone());
    let program = futures::executor::block_on(Planner::default().program(sql, schemas)).unwrap();
    let rows = run(program, None, &[(&offs, dropoffs), (&ups, pickups)]);
    let golden =
        std::fs::read_to_string("../../shared/data/truth/windows_arroyo/golden/windowed_inner_join.json").unwrap();
    let golden: Vec<serde_json::Value> = golden.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), golden.len());
    for ((key, values), truth) in rows.iter().zip(&golden) {
        let hour = chrono::DateTime::from_timestamp_micros(key.0).unwrap().format("%Y-%m-%dT%H:%M:%S").to_string();
        let found = serde_json::json!({"hour": hour, "drivers": values[0].unwrap() as i64, "pickups": values[1].unwrap() as i64});
        assert_eq!(&found, truth);
    }
}

fn expected(query: &str) -> Vec<String> {
    let text = std::fs::read_to_string("../../shared/data/truth/nexmark/expected.json").unwrap();
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    all[query]["rows"].as_array().unwrap().iter().map(|row| row.as_str().unwrap().to_owned()).collect()
}

fn auctions() -> StreamSchema {
    stream("nexmark.auctions", &[("number", "int64"), ("seller", "int64"), ("category", "int64")])
}

/// Nexmark q8: who registered and opened an auction within the same ten seconds.
#[test]
fn new_users_with_auctions_are_those_of_nexmark_q8() {
    let (persons, auctions) = (stream("nexmark.persons", &[("number", "int64"), ("name", "utf8")]), auctions());
    let Some(people) = shared("nexmark/person.ndjson", &persons, |_| true, "date_time") else { return };
    let Some(sales) = shared("nexmark/auction.ndjson", &auctions, |_| true, "date_time") else { return };
    let sql = "SELECT p.number, p.name, count(*) AS auctions FROM nexmark.persons p JOIN nexmark.auctions a ON p.number = a.seller \
               GROUP BY tumble(p.ts, INTERVAL '10 seconds'), p.number, p.name";
    let known = [&persons, &auctions];
    let schemas = |name: &StreamName| known.into_iter().find(|s| s.stream == *name).map(|s| s.arrow().clone());
    let program = futures::executor::block_on(Planner::default().program(sql, schemas)).unwrap();
    let rows = run(program, None, &[(&persons, people), (&auctions, sales)]);
    let found: Vec<String> = rows
        .keys()
        .map(|(start, _, key)| {
            let start = chrono::DateTime::from_timestamp_micros(*start).unwrap().format("%Y-%m-%d %H:%M:%S");
            format!("{}\t{start}", key.replace('|', "\t"))
        })
        .collect();
    let mut truth = expected("q8");
    truth.sort();
    assert_eq!(found, truth);
}

/// Nexmark q3 with the persons as a reference table: who sells in category 10 in Oregon, Idaho or California.
#[test]
fn local_sellers_are_those_of_nexmark_q3() {
    let auctions = auctions();
    let Some(sales) = shared("nexmark/auction.ndjson", &auctions, |_| true, "date_time") else { return };
    let columns = [("id", "int64"), ("name", "utf8"), ("city", "utf8"), ("state", "utf8")];
    let columns = columns
        .map(|(name, kind)| column(&format!(r#"{{"name":"{name}","type":"{kind}","nullable":{}}}"#, name != "id")));
    let persons = Table::new(table_name("persons").unwrap(), columns.to_vec(), vec!["id".into()]).unwrap();
    let people = std::fs::read_to_string("../../shared/data/truth/nexmark/person.ndjson").unwrap();
    let changes: Vec<String> = people
        .lines()
        .map(|line| {
            let person: serde_json::Value = serde_json::from_str(line).unwrap();
            serde_json::json!({"id": person["id"], "name": person["name"], "city": person["city"], "state": person["state"]}).to_string()
        })
        .collect();
    let now = Micros(1_800_000_000_000_000);
    let changes =
        persons.decode(changes.join("\n").as_bytes(), Format::Ndjson, TsUnit::Millis, &Bounds::default(), now).unwrap();
    assert_eq!(changes.rejected, 0);
    let sql = "SELECT p.name, p.city, p.state, a.number, count(*) AS n FROM nexmark.auctions a JOIN ref.persons p ON a.seller = p.id \
               WHERE a.category = 10 AND p.state IN ('or', 'id', 'ca') \
               GROUP BY tumble(a.ts, INTERVAL '1 day'), p.name, p.city, p.state, a.number";
    let schemas = |name: &StreamName| match name.is_table() {
        true => Some(persons.schema().relation().clone()),
        false => Some(auctions.arrow().clone()),
    };
    let program = futures::executor::block_on(Planner::default().program(sql, schemas)).unwrap();
    let rows = run(program, Some((&persons, changes.batch)), &[(&auctions, sales)]);
    let found: Vec<String> = rows.keys().map(|(_, _, key)| key.replace('|', "\t")).collect();
    let mut truth = expected("q3");
    truth.sort();
    assert_eq!(found, truth);
}
