//! Random programs over random events: windows of all four kinds, keys and values of all types with nulls, ties and
//! NaN, instants before 1970, any order, cut and restart. A program is planned once and meets many sets of events;
//! batch SQL answers all of them in one query, since every program also groups by the number of its set.
//!
//! `TIDEWATCH_ORACLE_CASES` sets how many sets of events there are, `TIDEWATCH_ORACLE_SEED` where they start.

use super::{assigned, query};
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::array::{Decimal128Array, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef, TimestampMicrosecondType};
use arrow::util::display::array_value_to_string;
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::{Rows, Timing};
use engine::program::Program;
use engine::window::Window;
use engine::workspace::{Outputs, Saved, Workspace};
use sql::plan::{MetricSql, Planner};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};
use streams::schema::{Column, StreamSchema, UnknownFields};

/// SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    fn within(&mut self, low: i64, high: i64) -> i64 {
        low + (self.next() % (high - low + 1) as u64) as i64
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[(self.next() % all.len() as u64) as usize]
    }
}

#[derive(Clone, Debug)]
struct Event {
    ts: i64,
    set: i64,
    seq: i64,
    text: Option<&'static str>,
    int: Option<i64>,
    flag: Option<bool>,
    x: Option<f64>,
    n: Option<i64>,
    d: Option<i128>,
}

static SCHEMA: LazyLock<StreamSchema> = LazyLock::new(|| {
    let column = |(name, kind): (&str, &str)| Column { name: name.into(), kind: kind.parse().unwrap(), nullable: true };
    let columns = [
        ("set_no", "int64"),
        ("seq", "int64"),
        ("k_text", "utf8"),
        ("k_int", "int64"),
        ("k_flag", "bool"),
        ("x", "float64"),
        ("n", "int64"),
        ("d", "decimal(12,2)"),
    ];
    StreamSchema::new(stream(), columns.map(column).to_vec(), UnknownFields::Keep).unwrap()
});

fn stream() -> StreamName {
    "test.events".parse().unwrap()
}

fn metric() -> ItemName {
    "under_test".parse().unwrap()
}

fn schema() -> SchemaRef {
    SCHEMA.arrow().clone()
}

fn batch(events: &[Event]) -> RecordBatch {
    let column = |name: &str| -> ArrayRef {
        let ints = |f: fn(&Event) -> Option<i64>| Arc::new(Int64Array::from_iter(events.iter().map(f)));
        match name {
            "ts" => {
                let ts = TimestampMicrosecondArray::from_iter_values(events.iter().map(|e| e.ts));
                Arc::new(ts.with_timezone("+00:00"))
            }
            "set_no" => ints(|e| Some(e.set)),
            "seq" => ints(|e| Some(e.seq)),
            "k_text" => Arc::new(StringArray::from_iter(events.iter().map(|e| e.text))),
            "k_int" => ints(|e| e.int),
            "k_flag" => Arc::new(BooleanArray::from_iter(events.iter().map(|e| e.flag))),
            "x" => Arc::new(Float64Array::from_iter(events.iter().map(|e| e.x))),
            "n" => ints(|e| e.n),
            "d" => {
                let d = Decimal128Array::from_iter(events.iter().map(|e| e.d));
                Arc::new(d.with_precision_and_scale(12, 2).unwrap())
            }
            _ => Arc::new(StringArray::new_null(events.len())),
        }
    };
    let columns = schema().fields().iter().map(|field| column(field.name())).collect();
    RecordBatch::try_new(schema(), columns).unwrap()
}

fn events(dice: &mut Dice, set: i64) -> Vec<Event> {
    let count = dice.within(1, 60);
    // few keys meet in the same windows, many do not; some sets are dense in time and some sparse
    let (keys, spread) = (dice.within(1, 6) as usize, *dice.pick(&[20_000_000i64, 120_000_000, 400_000_000]));
    let texts = ["a", "b", "", "ä", "longer than eight bytes", "c"];
    let mut all = Vec::new();
    for seq in 0..count {
        let at = dice.within(-spread, spread);
        let ts = if dice.chance(50) { at - at.rem_euclid(1_000_000) } else { at };
        let or_null = |dice: &mut Dice, value| (!dice.chance(8)).then_some(value);
        let x = match dice.next() % 30 {
            0 => f64::NAN,
            1 => 0.0,
            _ => dice.within(-4_000, 4_000) as f64 / 8.0,
        };
        let (text, int) = (texts[dice.next() as usize % keys], dice.within(-1, keys as i64));
        let (flag, n, d) = (dice.chance(50), dice.within(-50, 50), i128::from(dice.within(-100_000, 100_000)));
        all.push(Event {
            ts,
            set,
            seq,
            text: or_null(dice, 0).map(|_| text),
            int: or_null(dice, int),
            flag: or_null(dice, 0).map(|_| flag),
            x: or_null(dice, 0).map(|_| x),
            n: or_null(dice, n),
            d: or_null(dice, 0).map(|_| d),
        });
    }
    all
}

const AGGREGATES: &[&str] = &[
    "count(*)",
    "count(x)",
    "count(DISTINCT n)",
    "sum(x)",
    "avg(x)",
    // DataFusion's grouped min and max over NaN depend on the order of rows; ours are by total order
    "min(x) FILTER (WHERE NOT isnan(x))",
    "max(x) FILTER (WHERE NOT isnan(x))",
    "sum(n)",
    "avg(n)",
    "min(n)",
    "max(n)",
    "sum(d)",
    "min(d)",
    "min(k_text)",
    "max(k_text)",
    "bool_or(k_flag)",
    "sum(n) FILTER (WHERE x > 0)",
    "sum(x) FILTER (WHERE n IS NOT NULL)",
    "count(*) FILTER (WHERE k_flag)",
    "stddev(n)",
    "corr(n, seq)",
    "median(n)",
    "first_value(n ORDER BY ts, seq)",
    "last_value(x ORDER BY ts, seq)",
    "array_agg(n ORDER BY ts, seq)",
    "approx_distinct(seq)",
    "max(n) - min(n)",
    "sum(n * 2) / count(*)",
    "coalesce(sum(n) FILTER (WHERE x > 1e6), 0)",
    "sum(CASE WHEN k_flag THEN n ELSE 0 END)",
    "min(ts)",
];
const FILTERS: &[&str] = &["", "", "x > 0", "n IS NOT NULL", "k_text <> 'a'", "n % 2 = 0", "x > 1e9"];
const HAVINGS: &[&str] = &["", "", "count(*) > 1", "sum(n) > 0"];
/// Expression and name; sessions are told apart by plain columns only, as the batch side cuts them by those.
const KEYS: &[(&str, &str)] = &[("k_text", "k_text"), ("k_int", "k_int"), ("k_flag", "k_flag")];
const KEY_EXPRESSIONS: &[(&str, &str)] = &[("k_int % 3", "third"), ("x > 0", "up"), ("upper(k_text)", "upper_text")];

/// A metric's SQL and what the batch side needs to know of it.
#[derive(Debug)]
struct Query {
    text: String,
    filter: &'static str,
    keys: Vec<&'static str>,
    key_count: usize,
}

fn window(dice: &mut Dice) -> String {
    match dice.next() % 4 {
        0 => format!("tumble(ts, INTERVAL '{} seconds')", dice.within(1, 120)),
        1 => {
            let slide = dice.within(1, 30);
            let size = slide * dice.within(1, 8) + if dice.chance(30) { dice.within(0, slide - 1) } else { 0 };
            format!("hop(ts, INTERVAL '{slide} seconds', INTERVAL '{size} seconds')")
        }
        2 => {
            let step = dice.within(1, 30);
            format!("cumulate(ts, INTERVAL '{step} seconds', INTERVAL '{} seconds')", step * dice.within(1, 8))
        }
        _ => format!("session(ts, INTERVAL '{} seconds')", dice.within(1, 30)),
    }
}

fn query_of(dice: &mut Dice) -> Query {
    let window = window(dice);
    let mut keys: Vec<(&str, &str)> = KEYS.iter().filter(|_| dice.chance(40)).copied().collect();
    let plain: Vec<&str> = keys.iter().map(|(_, name)| *name).collect();
    if !window.starts_with("session") && dice.chance(30) {
        keys.push(*dice.pick(KEY_EXPRESSIONS));
    }
    let filter = *dice.pick(FILTERS);
    let having = *dice.pick(HAVINGS);
    let picked: BTreeSet<&str> = (0..dice.within(1, 6)).map(|_| *dice.pick(AGGREGATES)).collect();
    let mut select = vec!["window_start".to_owned(), "window_end".to_owned(), "set_no".to_owned()];
    select.extend(keys.iter().map(|(expr, name)| format!("{expr} AS {name}")));
    select.extend(picked.iter().enumerate().map(|(at, call)| format!("{call} AS v{at}")));
    let clause = |word: &str, text: &str| if text.is_empty() { String::new() } else { format!(" {word} {text}") };
    let groups: String = keys.iter().map(|(expr, _)| format!(", {expr}")).collect();
    let text = format!(
        "SELECT {} FROM test.events{} GROUP BY {window}, set_no{groups}{}",
        select.join(", "),
        clause("WHERE", filter),
        clause("HAVING", having)
    );
    Query { text, filter, keys: plain, key_count: keys.len() + 1 }
}

/// A value of a row: numbers as numbers, so that they can be compared within a tolerance.
#[derive(Clone, Debug)]
enum Cell {
    Null,
    Number(f64),
    Text(String),
}

/// Batch SQL adds in another order than events came, and divides later.
fn is_same(a: &Cell, b: &Cell) -> bool {
    match (a, b) {
        (Cell::Null, Cell::Null) => true,
        (Cell::Number(a), Cell::Number(b)) => {
            a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
        }
        (Cell::Text(a), Cell::Text(b)) => a == b,
        _ => false,
    }
}

/// By window and keys; of a corrected row the last version.
type Table = BTreeMap<(i64, i64, String), Vec<Cell>>;

fn place(batch: &RecordBatch, row: usize, keys: usize) -> (i64, i64, String) {
    let time = |at: usize| batch.column(at).as_primitive::<TimestampMicrosecondType>().value(row);
    let text = |at: usize| match batch.column(at).is_null(row) {
        true => "NULL".to_owned(),
        false => format!("`{}`", array_value_to_string(batch.column(at), row).unwrap()),
    };
    (time(0), time(1), (2..2 + keys).map(text).collect::<Vec<_>>().join("|"))
}

fn collect(into: &mut Table, batch: &RecordBatch, keys: usize) {
    for row in 0..batch.num_rows() {
        let cell = |column: &ArrayRef| match column.data_type() {
            _ if column.is_null(row) => Cell::Null,
            DataType::Float64 => Cell::Number(column.as_primitive::<Float64Type>().value(row)),
            DataType::Int64 => Cell::Number(column.as_primitive::<Int64Type>().value(row) as f64),
            _ => Cell::Text(array_value_to_string(column, row).unwrap()),
        };
        into.insert(place(batch, row, keys), batch.columns()[2 + keys..].iter().map(cell).collect());
    }
}

fn take(into: &mut Table, outputs: Outputs, keys: usize) {
    assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
    let finals = outputs.rows.into_iter().map(|rows| rows.rows).filter(|rows| rows.revisions.is_some());
    for Rows { batch, withdrawn, .. } in finals {
        if let Some(gone) = withdrawn {
            for row in 0..gone.num_rows() {
                into.remove(&place(&gone, row, keys));
            }
        }
        collect(into, &batch, keys);
    }
}

/// How a set of events reaches the engine.
#[derive(Clone, Debug)]
struct Way {
    /// Sizes of batches, over and over.
    cuts: Vec<usize>,
    /// Batches before which the state is saved and put under a new engine.
    restarts: Vec<usize>,
}

fn way(dice: &mut Dice) -> Way {
    let cuts = (0..dice.within(1, 4)).map(|_| dice.within(1, 30) as usize).collect();
    let restarts = (0..dice.within(0, 2)).map(|_| dice.within(0, 8) as usize).collect();
    Way { cuts, restarts }
}

fn by_engine(program: &Arc<Program>, timing: Timing, events: &[Event], way: &Way) -> Table {
    let fresh = || {
        let mut workspace = Workspace::default();
        workspace.define(metric(), 1, program.clone(), timing).unwrap();
        workspace
    };
    let (mut workspace, mut table) = (fresh(), Table::new());
    let (mut from, mut sizes, mut number) = (0, way.cuts.iter().cycle(), 0);
    while from < events.len() {
        let size = (*sizes.next().unwrap()).min(events.len() - from);
        if way.restarts.contains(&number) {
            let bytes = workspace.save().unwrap();
            workspace = fresh();
            assert_eq!(workspace.restore(Saved::read(&bytes).unwrap()).unwrap(), []);
        }
        let outputs = workspace.step(&stream(), &batch(&events[from..from + size]));
        take(&mut table, outputs, program.key_count());
        drop(workspace.tick(&metric())); // provisional rows come and go without a trace
        (from, number) = (from + size, number + 1);
    }
    take(&mut table, workspace.idle(&stream(), Micros(i64::MAX / 2)), program.key_count());
    let (_, state) = workspace.metrics().next().unwrap();
    assert_eq!((state.keys(), state.panes()), (0, 0), "state is left behind after the last window");
    table
}

fn by_batch(query_of: &Query, events: &RecordBatch) -> Table {
    let parsed = MetricSql::parse(&query_of.text).unwrap();
    let mut taken = events.clone();
    if matches!(parsed.window, Window::Session { .. }) && !query_of.filter.is_empty() {
        // what WHERE leaves out does not hold a session together
        let filter = format!("SELECT * FROM test.events WHERE {}", query_of.filter);
        let kept = query(&[(("test", "events"), taken)], &filter);
        taken = arrow::compute::concat_batches(&schema(), &kept).unwrap();
    }
    let keys: Vec<&str> = ["set_no"].into_iter().chain(query_of.keys.iter().copied()).collect();
    let rows = assigned(parsed.window, &taken, &keys);
    let mut table = Table::new();
    for answer in query(&[(("test", "events"), rows)], &parsed.statement.to_string()) {
        collect(&mut table, &answer, query_of.key_count);
    }
    table
}

fn difference(ours: &Table, truth: &Table) -> Option<String> {
    let keys: BTreeSet<_> = ours.keys().chain(truth.keys()).collect();
    keys.into_iter().find_map(|key| match (ours.get(key), truth.get(key)) {
        (Some(a), Some(b)) if a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b)) => None,
        (ours, truth) => Some(format!("{key:?}\n  engine {ours:?}\n  batch  {truth:?}")),
    })
}

/// The fewest events, by leaving out parts, with which `is_wrong` still holds.
fn shrunk(mut events: Vec<Event>, is_wrong: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let mut part = events.len() / 2;
    while part > 0 {
        let mut at = 0;
        while at < events.len() {
            let mut fewer = events.clone();
            fewer.drain(at..(at + part).min(events.len()));
            if !fewer.is_empty() && is_wrong(&fewer) {
                events = fewer;
            } else {
                at += part;
            }
        }
        part /= 2;
    }
    events
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn planned(text: &str) -> Arc<Program> {
    // one schema for all, as the planner knows a text by its address
    futures::executor::block_on(Planner::default().program(text, |name| (*name == stream()).then(schema)))
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Sets of events that meet one program.
const SETS: u64 = 200;

#[test]
fn random_programs_over_random_events_give_the_rows_of_batch_sql() {
    let (cases, seed) = (setting("TIDEWATCH_ORACLE_CASES", 20_000), setting("TIDEWATCH_ORACLE_SEED", 1));
    println!("{cases} cases from TIDEWATCH_ORACLE_SEED={seed}");
    let timing = Timing { max_delay: Span::seconds(100_000), allowed_lateness: Span::ZERO };
    for number in 0..cases.div_ceil(SETS) {
        let dice = &mut Dice(seed.wrapping_mul(1_000_003).wrapping_add(number));
        let query = query_of(dice);
        let program = planned(&query.text);
        let sets: Vec<(Vec<Event>, Way)> = (0..SETS).map(|set| (events(dice, set as i64), way(dice))).collect();
        let mut ours = Table::new();
        for (events, way) in &sets {
            ours.extend(by_engine(&program, timing, events, way));
        }
        let all: Vec<Event> = sets.iter().flat_map(|(events, _)| events.clone()).collect();
        if let Some(what) = difference(&ours, &by_batch(&query, &batch(&all))) {
            let wrong = |events: &[Event], way: &Way| {
                difference(&by_engine(&program, timing, events, way), &by_batch(&query, &batch(events)))
            };
            if let Some((events, way)) = sets.iter().find(|(events, way)| wrong(events, way).is_some()) {
                let few = shrunk(events.clone(), |events| wrong(events, way).is_some());
                panic!("{}\n{way:?}\n{few:#?}\n{}", query.text, wrong(&few, way).unwrap());
            }
            panic!("{}\nonly with all sets together: {what}", query.text);
        }
    }
}

/// What the windows of `text` hold of events that come in this order: an event counts for a window that is not past
/// its end and the allowed lateness when it comes. The count and the sum of `n`, by window and `k_text`.
fn by_rule(window: Window, timing: Timing, events: &[Event]) -> BTreeMap<(i64, i64, String), (i64, i64)> {
    let lateness = timing.allowed_lateness;
    let mut table: BTreeMap<(i64, i64, String), (i64, i64)> = BTreeMap::new();
    let mut sessions: BTreeMap<String, Vec<(i64, i64, i64, i64)>> = BTreeMap::new(); // first, last, count, sum
    let mut seen = Micros::MIN;
    for event in events {
        let watermark = seen.minus(timing.max_delay);
        let at = Micros(event.ts);
        let key = event.text.map_or("NULL".to_owned(), |text| format!("`{text}`"));
        let n = event.n.unwrap_or(0);
        if let Window::Session { gap } = window {
            let known = sessions.entry(key.clone()).or_default();
            // sessions past their lateness are out of reach
            let (over, reach): (Vec<_>, Vec<_>) =
                known.drain(..).partition(|s| Micros(s.1).plus(gap).plus(lateness) < watermark);
            for (first, last, count, sum) in over {
                table.insert((first, Micros(last).plus(gap).0, key.clone()), (count, sum));
            }
            let (touched, mut apart): (Vec<_>, Vec<_>) =
                reach.into_iter().partition(|s| s.0 <= at.plus(gap).0 && at.0 <= Micros(s.1).plus(gap).0);
            let whole = touched.iter().fold((at.0, at.0, 1, n), |whole, s| {
                (whole.0.min(s.0), whole.1.max(s.1), whole.2 + s.2, whole.3 + s.3)
            });
            if Micros(whole.1).plus(gap).plus(lateness) >= watermark {
                apart.push(whole);
            }
            *known = apart;
        } else {
            let mut end = window.first_end(at);
            while end <= window.last_end(at) {
                if end.plus(lateness) > watermark {
                    let held = table.entry((window.start(end).0, end.0, key.clone())).or_default();
                    *held = (held.0 + 1, held.1 + n);
                }
                end = end.plus(window.slide());
            }
        }
        seen = seen.max(at);
    }
    if let Window::Session { gap } = window {
        for (key, known) in sessions {
            for (first, last, count, sum) in known {
                table.insert((first, Micros(last).plus(gap).0, key.clone()), (count, sum));
            }
        }
    }
    table
}

#[test]
fn a_late_event_counts_for_the_windows_that_still_wait_for_it_whatever_the_cut() {
    let (cases, seed) = (setting("TIDEWATCH_ORACLE_CASES", 20_000) / 4, setting("TIDEWATCH_ORACLE_SEED", 1));
    println!("{cases} cases from TIDEWATCH_ORACLE_SEED={seed}");
    for number in 0..cases.div_ceil(100) {
        let dice = &mut Dice(seed.wrapping_mul(7_000_003).wrapping_add(number));
        let window = window(dice);
        let text = format!(
            "SELECT k_text, count(*) AS events, coalesce(sum(n), 0) AS total FROM test.events GROUP BY {window}, k_text"
        );
        let program = planned(&text);
        for set in 0..100 {
            let (delay, lateness) = (dice.within(0, 60), *dice.pick(&[0i64, 0, 20, 100]));
            let timing = Timing { max_delay: Span::seconds(delay), allowed_lateness: Span::seconds(lateness) };
            let (events, way) = (events(dice, set), way(dice));
            let wrong = |events: &[Event]| {
                let ours = by_engine(&program, timing, events, &way);
                let ours: BTreeMap<_, _> = ours
                    .into_iter()
                    .map(|(key, cells)| match cells.as_slice() {
                        [Cell::Number(count), Cell::Number(sum)] => (key, (*count as i64, *sum as i64)),
                        other => panic!("{other:?}"),
                    })
                    .collect();
                let truth = by_rule(program.window(), timing, events);
                let keys: BTreeSet<_> = ours.keys().chain(truth.keys()).cloned().collect();
                keys.into_iter()
                    .find(|key| ours.get(key) != truth.get(key))
                    .map(|key| format!("{key:?}\n  engine {:?}\n  rule   {:?}", ours.get(&key), truth.get(&key)))
            };
            if wrong(&events).is_some() {
                let few = shrunk(events, |events| wrong(events).is_some());
                let times: Vec<(i64, Option<&str>, Option<i64>)> = few.iter().map(|e| (e.ts, e.text, e.n)).collect();
                panic!("{text}\n{timing:?} {way:?}\n{times:?}\n{}", wrong(&few).unwrap());
            }
        }
    }
}
