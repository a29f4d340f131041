//! State in parts: whatever happens between two checkpoints, the parts that changed make the whole state of the ones
//! before.

use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray, new_null_array};
use arrow::util::display::array_value_to_string;
use engine::alert::Rule;
use engine::checkpoint::{Changes, Saved, State};
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::Timing;
use engine::program::Program;
use engine::workspace::{MetricRows, Outputs, Workspace};
use proptest::prelude::*;
use sql::plan::{Planner, Source, condition};
use std::collections::BTreeMap;
use std::sync::Arc;
use streams::decode::{Bounds, Format, TsUnit};
use streams::schema::built_in;
use streams::table::{Table, built_in_tables};

const TIMING: Timing = Timing { max_delay: Span::seconds(1), allowed_lateness: Span::seconds(6) };

fn name(text: &str) -> ItemName {
    text.parse().unwrap()
}

fn stream(text: &str) -> StreamName {
    text.parse().unwrap()
}

/// One of each kind of state there is.
const METRICS: &[(&str, &str)] = &[
    (
        "hops",
        "SELECT symbol, count(*) AS n, sum(price) AS total, median(price) AS middle FROM market.trades \
         GROUP BY hop(ts, INTERVAL '2 seconds', INTERVAL '20 seconds'), symbol",
    ),
    (
        "visits",
        "SELECT symbol, count(*) AS n, max(price) AS high FROM market.trades GROUP BY session(ts, INTERVAL '3 seconds'), symbol",
    ),
    (
        "best",
        "SELECT symbol, max(price) AS high FROM market.trades GROUP BY tumble(ts, INTERVAL '5 seconds'), symbol \
         ORDER BY max(price) DESC, symbol LIMIT 2",
    ),
    (
        "spreads",
        "SELECT q.symbol, count(*) AS n, avg(t.price) AS price FROM market.quotes q LEFT JOIN market.trades t \
         ON q.symbol = t.symbol AND t.ts BETWEEN q.ts AND q.ts + INTERVAL '4 seconds' \
         GROUP BY tumble(q.ts, INTERVAL '5 seconds'), q.symbol",
    ),
    (
        "sectors",
        "SELECT c.sector, sum(t.price) AS total FROM market.trades t JOIN ref.companies c ON t.symbol = c.symbol \
         GROUP BY tumble(t.ts, INTERVAL '5 seconds'), c.sector",
    ),
    ("halves", "SELECT symbol, sum(n) AS n FROM metrics.best_n GROUP BY tumble(ts, INTERVAL '15 seconds'), symbol"),
    ("steps", "SELECT symbol, n - lag(n) OVER (PARTITION BY symbol ORDER BY ts) AS more FROM metrics.best_n"),
    (
        "others",
        "SELECT symbol, avg(bid) AS bid FROM market.quotes GROUP BY cumulate(ts, INTERVAL '5 seconds', INTERVAL '1 minute'), symbol",
    ),
];

const BEST_N: &str =
    "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '5 seconds'), symbol";

/// What the workspace has defined.
struct World {
    programs: Vec<(ItemName, Arc<Program>)>,
    tables: Vec<Table>,
}

impl World {
    fn new() -> World {
        let tables: Vec<Table> = built_in_tables().to_vec();
        let planner = Planner::default();
        let mut programs: Vec<(ItemName, Arc<Program>)> = Vec::new();
        for (metric, sql) in [("best_n", BEST_N)].iter().chain(METRICS) {
            let source = |stream: &StreamName| match stream.metric() {
                Some(metric) => programs.iter().find(|(n, _)| *n == metric).map(|(_, p)| Source::Metric(p.clone())),
                None => {
                    let table = tables.iter().find(|t| t.name() == stream).map(|t| t.schema().relation().clone());
                    let events = built_in().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
                    table.or(events).map(Source::Stream)
                }
            };
            let program = futures::executor::block_on(planner.program(sql, source));
            programs.push((name(metric), program.unwrap_or_else(|error| panic!("{sql}: {error}"))));
        }
        World { programs, tables }
    }

    fn workspace(&self) -> Workspace {
        let mut workspace = Workspace::default();
        self.tables.iter().for_each(|table| workspace.define_table(table.schema().clone()).unwrap());
        for (metric, program) in &self.programs {
            workspace.define(metric.clone(), 1, program.clone(), TIMING).unwrap();
        }
        workspace.watch(self.rule("busy", "n > 1")).unwrap();
        workspace
    }

    fn rule(&self, rule: &str, text: &str) -> Rule {
        let program = &self.programs.iter().find(|(metric, _)| metric.as_str() == "hops").unwrap().1;
        let condition = condition(text, program).unwrap();
        Rule { name: name(rule), metric: name("hops"), condition, hold: Span::seconds(2), severity: "info".into() }
    }

    fn change(&self, workspace: &mut Workspace, lines: &str, offset: u64) {
        let table = self.tables.iter().find(|table| table.name().as_str() == "ref.companies").unwrap();
        let bounds = Bounds::default();
        let changes = table.decode(lines.as_bytes(), Format::Ndjson, TsUnit::Micros, &bounds, Micros(0)).unwrap();
        assert_eq!(changes.rejected, 0, "{:?}", changes.errors);
        workspace.change_table(table.name(), &changes.batch, offset).unwrap();
    }
}

/// Events of a stream: event time in milliseconds, symbol, and all its numbers.
fn batch(name: &str, rows: &[(i64, &str, f64)]) -> RecordBatch {
    let schema = built_in().iter().find(|s| s.stream.as_str() == name).unwrap().arrow().clone();
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "ts" => Arc::new(
                TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.0 * 1_000)).with_timezone("+00:00"),
            ),
            "symbol" => Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1))),
            "price" | "qty" | "bid" | "ask" => Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2))),
            _ => new_null_array(field.data_type(), rows.len()),
        }
    });
    RecordBatch::try_new(schema.clone(), columns.collect()).unwrap()
}

fn ahead(world: &World) -> Workspace {
    let mut workspace = world.workspace();
    world.change(&mut workspace, r#"{"symbol":"A","name":"Ay","sector":"tech"}"#, 1);
    (0..40).for_each(|at| drop(go_on(&mut workspace, at)));
    workspace
}

/// A step of a history in which all metrics have state.
fn go_on(workspace: &mut Workspace, at: i64) -> Vec<String> {
    let symbols = ["A", "B", "C"];
    let of = |k: usize| (at * 700 + k as i64 * 10, symbols[(at as usize + k) % 3], at as f64 * 1.25 + k as f64);
    let trades = workspace.step(&stream("market.trades"), &batch("market.trades", &[of(0), of(1)]));
    let quotes = workspace.step(&stream("market.quotes"), &batch("market.quotes", &[of(0), of(2)]));
    [told(&trades), told(&quotes)].concat()
}

/// What came of a step, in no order and not as it was put together: how rows are cut into batches hangs on how
/// sessions wait for their end.
fn told(outputs: &Outputs) -> Vec<String> {
    assert!(outputs.failures.is_empty(), "{:?}", outputs.failures);
    let mut told = Vec::new();
    for MetricRows { metric, rows } in &outputs.rows {
        for row in 0..rows.batch.num_rows() {
            let values = rows.batch.columns().iter().map(|column| array_value_to_string(column, row).unwrap());
            let revision = rows.revisions.as_ref().map(|revisions| revisions[row]);
            told.push(format!("{metric} {} {revision:?}", values.collect::<Vec<_>>().join("|")));
        }
        for gone in rows.withdrawn.iter().flat_map(|gone| (0..gone.num_rows()).map(move |row| gone.slice(row, 1))) {
            let values = gone.columns().iter().map(|column| array_value_to_string(column, 0).unwrap());
            told.push(format!("{metric} withdraws {}", values.collect::<Vec<_>>().join("|")));
        }
    }
    told.extend(outputs.alerts.iter().map(|c| format!("{} {:?} {:?} {:?}", c.rule, c.labels, c.phase, c.since)));
    told.extend(outputs.late.iter().map(|late| format!("{} is late for {}", late.row, late.metric)));
    told.sort();
    told
}

/// State that the build before parts came has written: `ahead`, which is what [`ahead`] makes.
const ALL_IN_ONE: &[u8] = include_bytes!("state2.bin");

#[test]
fn state_of_the_version_before_goes_on_as_if_it_had_been_saved_in_parts() {
    let world = World::new();
    let mut old = State { head: ALL_IN_ONE.to_vec(), parts: BTreeMap::from([("prices/9".into(), vec![1])]) };
    let (mut restored, mut never) = (world.workspace(), ahead(&world));
    assert_eq!(restored.restore(Saved::read(&old).unwrap()).unwrap(), []);
    for at in 40..60 {
        assert_eq!(go_on(&mut restored, at), go_on(&mut never, at), "step {at}");
        let changes = restored.save().unwrap().encode().unwrap();
        assert_eq!(changes.whole, at == 40, "the first checkpoint writes all of it, and whatever was there goes");
        old.apply(changes);
    }
    let mut again = world.workspace();
    assert_eq!(again.restore(Saved::read(&old).unwrap()).unwrap(), []);
    assert_eq!(go_on(&mut again, 60), go_on(&mut never, 60));
}

#[test]
fn where_only_event_time_goes_on_the_head_alone_is_written() {
    let world = World::new();
    let mut workspace = world.workspace();
    drop(workspace.step(&stream("market.quotes"), &batch("market.quotes", &[(1_000, "A", 1.0), (2_000, "B", 2.0)])));
    let first = workspace.save().unwrap().encode().unwrap();
    assert!(first.whole && !first.parts.is_empty());
    drop(workspace.idle(&stream("market.quotes"), Micros(2_100_000)));
    let next = workspace.save().unwrap().encode().unwrap();
    assert!(!next.whole && next.parts.is_empty() && next.gone.is_empty(), "{:?}", names(&next));
    assert_ne!(first.head, next.head);
}

#[test]
fn an_event_writes_the_parts_of_the_metrics_it_reached() {
    let world = World::new();
    let mut workspace = ahead(&world);
    drop(workspace.save().unwrap());
    drop(workspace.step(&stream("market.quotes"), &batch("market.quotes", &[(28_500, "A", 1.0)])));
    let changes = workspace.save().unwrap().encode().unwrap();
    let mut owners: Vec<&str> = names(&changes).iter().map(|name| name.rsplit_once('/').unwrap().0).collect();
    owners.dedup();
    assert_eq!(owners, ["metric/others", "metric/spreads", "prices"]);
}

#[test]
fn of_many_panes_those_are_written_that_changed() {
    let sql = "SELECT symbol, count(*) AS n FROM market.trades \
               GROUP BY hop(ts, INTERVAL '1 second', INTERVAL '1 minute'), symbol";
    let program = |stream: &StreamName| built_in().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
    let program = futures::executor::block_on(Planner::default().program(sql, program)).unwrap();
    let fresh = || {
        let mut workspace = Workspace::default();
        let timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO };
        workspace.define(name("bars"), 1, program.clone(), timing).unwrap();
        workspace
    };
    let symbols: Vec<String> = (0..100).map(|n| format!("S{n}")).collect();
    let second = |at: i64| {
        let rows: Vec<_> = symbols.iter().map(|symbol| (at * 1_000, symbol.as_str(), 1.0)).collect();
        batch("market.trades", &rows)
    };
    let (mut workspace, mut state) = (fresh(), State::default());
    for at in 0..200 {
        drop(workspace.step(&stream("market.trades"), &second(at)));
        let changes = workspace.save().unwrap().encode().unwrap();
        let panes = names(&changes).iter().filter(|name| name.contains("panes")).count();
        match at {
            0..20 => assert_eq!(names(&changes), ["metric/bars/panes", "prices/0"]),
            20..30 => {}
            _ => assert!(panes <= 2, "{:?}", names(&changes)),
        }
        state.apply(changes);
        if at % 50 == 49 {
            let before = workspace.bytes();
            workspace = fresh();
            assert_eq!(workspace.restore(Saved::read(&state).unwrap()).unwrap(), []);
            assert!(workspace.bytes() * 2 > before);
        }
    }
    // few keys are left, and their panes are one part again
    for at in 200..300 {
        drop(workspace.step(&stream("market.trades"), &batch("market.trades", &[(at * 1_000, "S1", 1.0)])));
        state.apply(workspace.save().unwrap().encode().unwrap());
    }
    assert_eq!(state.parts.keys().collect::<Vec<_>>(), ["metric/bars/panes", "prices/0"]);
    let mut restored = fresh();
    assert_eq!(restored.restore(Saved::read(&state).unwrap()).unwrap(), []);
    let next = second(400);
    assert_eq!(
        told(&restored.step(&stream("market.trades"), &next)),
        told(&workspace.step(&stream("market.trades"), &next))
    );
}

fn names(changes: &Changes) -> Vec<&str> {
    changes.parts.iter().map(|(name, _)| name.as_str()).collect()
}

/// What happens in a workspace.
#[derive(Clone, Debug)]
enum Event {
    /// Of trades or of quotes: how far event time goes on, and symbol, lag behind it and value.
    Events(bool, i64, Vec<(usize, i64, i64)>),
    Idle(bool, i64),
    Change(usize, u8),
    Watch(bool),
    /// A metric is taken out and defined again.
    Again(usize),
    Checkpoint,
    /// The last checkpoint may not have got there.
    Lost,
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    let rows = prop::collection::vec((0..6_usize, 0..9_000_i64, 0..50_i64), 1..8);
    prop_oneof![
        8 => (any::<bool>(), 0..4_000_i64, rows).prop_map(|(trades, on, rows)| Event::Events(trades, on, rows)),
        1 => (any::<bool>(), 0..30_000_i64).prop_map(|(trades, on)| Event::Idle(trades, on)),
        1 => (0..6_usize, any::<u8>()).prop_map(|(symbol, sector)| Event::Change(symbol, sector)),
        1 => any::<bool>().prop_map(Event::Watch),
        1 => (0..METRICS.len()).prop_map(Event::Again),
        4 => Just(Event::Checkpoint),
        1 => Just(Event::Lost),
        2 => Just(Event::Restart),
    ]
}

const SYMBOLS: [&str; 6] = ["A", "B", "C", "D", "E", "F"];

/// A workspace, and what else its history is made of.
struct Run<'w> {
    world: &'w World,
    workspace: Workspace,
    /// By metric, the version of its definition.
    versions: BTreeMap<ItemName, i64>,
    at: i64,
    changes: u64,
    is_watched: bool,
}

impl<'w> Run<'w> {
    fn new(world: &'w World) -> Run<'w> {
        let versions = world.programs.iter().map(|(name, _)| (name.clone(), 1)).collect();
        let workspace = world.workspace();
        Run { world, workspace, versions, at: 0, changes: 0, is_watched: true }
    }

    fn go_on(&mut self, event: &Event) -> Vec<String> {
        let name_of = |trades: bool| if trades { "market.trades" } else { "market.quotes" };
        match event {
            Event::Events(trades, on, rows) => {
                self.at += on;
                let rows = rows.iter().map(|(symbol, lag, value)| (self.at - lag, SYMBOLS[*symbol], *value as f64));
                let batch = batch(name_of(*trades), &rows.collect::<Vec<_>>());
                told(&self.workspace.step(&stream(name_of(*trades)), &batch))
            }
            Event::Idle(trades, on) => {
                self.at += on;
                told(&self.workspace.idle(&stream(name_of(*trades)), Micros(self.at * 1_000)))
            }
            Event::Change(symbol, sector) => {
                self.changes += 1;
                let line = format!(r#"{{"symbol":"{}","name":"x","sector":"s{sector}"}}"#, SYMBOLS[*symbol]);
                self.world.change(&mut self.workspace, &line, self.changes);
                Vec::new()
            }
            Event::Watch(on) => {
                match on {
                    true => _ = self.workspace.watch(self.world.rule("busy", "n > 1")).unwrap(),
                    false => _ = self.workspace.unwatch(&name("busy")),
                }
                self.is_watched = *on;
                Vec::new()
            }
            Event::Again(at) => {
                let (metric, program) = &self.world.programs[at + 1]; // the first one is read by others
                *self.versions.get_mut(metric).unwrap() += 1;
                self.workspace.define(metric.clone(), self.versions[metric], program.clone(), TIMING).unwrap();
                if metric.as_str() == "hops" {
                    self.is_watched = false;
                }
                Vec::new()
            }
            Event::Checkpoint | Event::Lost | Event::Restart => Vec::new(),
        }
    }

    /// As a new process finds it.
    fn restart(&mut self, state: &State) {
        let mut workspace = Workspace::default();
        self.world.tables.iter().for_each(|table| workspace.define_table(table.schema().clone()).unwrap());
        for (metric, program) in &self.world.programs {
            workspace.define(metric.clone(), self.versions[metric], program.clone(), TIMING).unwrap();
        }
        if self.is_watched {
            workspace.watch(self.world.rule("busy", "n > 1")).unwrap();
        }
        assert_eq!(workspace.restore(Saved::read(state).unwrap()).unwrap(), []);
        self.workspace = workspace;
    }
}

/// What only one of two steps told.
fn difference(stored: Vec<String>, never: Vec<String>) -> Vec<String> {
    let missing = never.iter().filter(|line| !stored.contains(line)).map(|line| format!("misses {line}"));
    let extra = stored.iter().filter(|line| !never.contains(line)).map(|line| format!("tells {line}"));
    let count = (stored.len() != never.len()).then(|| format!("tells {} lines of {}", stored.len(), never.len()));
    missing.chain(extra).chain(count).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// One workspace is checkpointed part by part and restarted from that, the other one never: nobody can tell them
    /// apart, by what they give or by the whole of what they hold.
    #[test]
    fn parts_that_changed_make_the_whole_state(events in prop::collection::vec(event(), 1..60)) {
        let world = World::new();
        let (mut stored, mut never) = (Run::new(&world), Run::new(&world));
        let mut state = State::default();
        for event in &events {
            prop_assert_eq!(difference(stored.go_on(event), never.go_on(event)), [""; 0]);
            match event {
                Event::Checkpoint => state.apply(stored.workspace.save().unwrap().encode().unwrap()),
                Event::Lost => {
                    drop(stored.workspace.save().unwrap());
                    stored.workspace.forget_saved();
                }
                Event::Restart => {
                    state.apply(stored.workspace.save().unwrap().encode().unwrap());
                    stored.restart(&state);
                }
                _ => {}
            }
        }
        state.apply(stored.workspace.save().unwrap().encode().unwrap());
        stored.restart(&state);
        for far in [Event::Idle(true, 3_600_000), Event::Idle(false, 3_600_000)] {
            prop_assert_eq!(difference(stored.go_on(&far), never.go_on(&far)), [""; 0]);
        }
    }
}
