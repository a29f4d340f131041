//! Random programs over random events: streams of any columns, windows of all four kinds, keys and values of all types
//! with nulls, ties and NaN, instants from the year 1 to 9999, events in any order and late ones, any cut and restart.
//! A program is planned once and meets many sets of events; batch SQL answers all of them in one query, since every
//! program also groups by the number of its set.
//!
//! `TIDEWATCH_ORACLE_CASES` sets how many sets of events there are, `TIDEWATCH_ORACLE_SEED` where they start.

use super::program::{Dice, Event, Query, World, stream};
use super::query;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{DataType, Float64Type, Int64Type, TimestampMicrosecondType};
use arrow::util::display::array_value_to_string;
use engine::checkpoint::{Saved, State};
use engine::event::{ItemName, Micros, Span};
use engine::metric::{Rows, Timing};
use engine::program::Program;
use engine::window::Window;
use engine::workspace::{Outputs, Workspace};
use sql::plan::{MetricSql, Planner, with_bounds};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn metric() -> ItemName {
    "under_test".parse().unwrap()
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
        (Cell::Number(a), Cell::Number(b)) => a == b || (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0),
        (Cell::Text(a), Cell::Text(b)) => a == b,
        _ => false,
    }
}

/// By window and keys; of a corrected row the last version.
type Table = BTreeMap<(i64, i64, String), Vec<Cell>>;

/// Key columns of a row.
fn key_text(columns: &[ArrayRef], row: usize) -> String {
    let text = |column: &ArrayRef| match column.is_null(row) {
        true => "NULL".to_owned(),
        false => format!("`{}`", array_value_to_string(column, row).unwrap()),
    };
    columns.iter().map(text).collect::<Vec<_>>().join("|")
}

fn place(batch: &RecordBatch, row: usize, keys: usize) -> (i64, i64, String) {
    let time = |at: usize| batch.column(at).as_primitive::<TimestampMicrosecondType>().value(row);
    (time(0), time(1), key_text(&batch.columns()[2..2 + keys], row))
}

fn collect(into: &mut Table, batch: &RecordBatch, keys: usize) {
    for row in 0..batch.num_rows() {
        let cell = |column: &ArrayRef| match column.data_type() {
            _ if column.is_null(row) => Cell::Null,
            // a metric's rows have NULL where batch SQL has no finite number, or the largest one as the least of infinities
            DataType::Float64 => match column.as_primitive::<Float64Type>().value(row) {
                number if number.abs() < f64::MAX => Cell::Number(number),
                _ => Cell::Null,
            },
            DataType::Int64 => Cell::Number(column.as_primitive::<Int64Type>().value(row) as f64),
            _ => Cell::Text(array_value_to_string(column, row).unwrap()),
        };
        into.insert(place(batch, row, keys), batch.columns()[2 + keys..].iter().map(cell).collect());
    }
}

/// Final rows as a store keeps them: by their newest revision, and without those that were withdrawn.
#[derive(Default)]
struct Finals {
    rows: Table,
    revisions: BTreeMap<(i64, i64, String), i64>,
}

impl Finals {
    fn take(&mut self, outputs: Outputs, keys: usize) -> Result<(), String> {
        if let Some(failure) = outputs.failures.first() {
            return Err(failure.stop.reason.clone());
        }
        for Rows { batch, withdrawn, revisions, .. } in outputs.rows.into_iter().map(|rows| rows.rows) {
            let Some(revisions) = revisions else { continue };
            if let Some(gone) = withdrawn {
                let by = gone.column(gone.num_columns() - 1).as_primitive::<Int64Type>();
                for row in 0..gone.num_rows() {
                    let place = self.newer(place(&gone, row, keys), by.value(row))?;
                    self.rows.remove(&place);
                }
            }
            for (row, revision) in revisions.into_iter().enumerate() {
                self.newer(place(&batch, row, keys), revision)?;
            }
            collect(&mut self.rows, &batch, keys);
        }
        Ok(())
    }

    /// The place of a row, of which this revision is the newest so far; the same one may come again unchanged.
    fn newer(&mut self, place: (i64, i64, String), revision: i64) -> Result<(i64, i64, String), String> {
        match self.revisions.insert(place.clone(), revision) {
            Some(before) if before > revision => Err(format!("{place:?}: revision {revision} after {before}")),
            Some(before) if before == revision && !self.rows.contains_key(&place) => {
                Err(format!("{place:?} was withdrawn at revision {before} and comes again with it"))
            }
            _ => Ok(place),
        }
    }
}

/// How a set of events reaches the engine.
#[derive(Clone, Debug)]
struct Way {
    /// Sizes of batches, over and over.
    cuts: Vec<usize>,
    /// Batches before which the state is saved and put under a new engine.
    restarts: Vec<usize>,
    timing: Timing,
}

/// Waits for every event.
const PATIENT: Span = Span::seconds(100_000);

impl Way {
    fn new(dice: &mut Dice) -> Way {
        let cuts = (0..dice.within(1, 4)).map(|_| dice.within(1, 30) as usize).collect();
        let restarts = (0..dice.within(0, 2)).map(|_| dice.within(0, 8) as usize).collect();
        let max_delay = if dice.chance(50) { PATIENT } else { Span::seconds(dice.within(0, 60)) };
        let allowed_lateness = Span::seconds(*dice.pick(&[0, 0, 20, 100]));
        Way { cuts, restarts, timing: Timing { max_delay, allowed_lateness } }
    }
}

/// The engine's final rows, or why there are none.
fn by_engine(world: &World, program: &Arc<Program>, events: &[Event], way: &Way) -> Result<Table, String> {
    let fresh = || {
        let mut workspace = Workspace::default();
        workspace.define(metric(), 1, program.clone(), way.timing).unwrap();
        workspace
    };
    let (mut workspace, mut finals, keys) = (fresh(), Finals::default(), program.key_count());
    let (mut from, mut sizes, mut number) = (0, way.cuts.iter().cycle(), 0);
    let mut state = State::default();
    while from < events.len() {
        let size = (*sizes.next().unwrap()).min(events.len() - from);
        if way.restarts.contains(&number) {
            state.apply(workspace.save().unwrap().encode().unwrap());
            workspace = fresh();
            assert_eq!(workspace.restore(Saved::read(&state).unwrap()).unwrap(), []);
        }
        finals.take(workspace.step(&stream(), &world.batch(events[from..from + size].iter())), keys)?;
        drop(workspace.tick(&metric())); // provisional rows come and go without a trace
        (from, number) = (from + size, number + 1);
    }
    let mut live = Table::new();
    for rows in workspace.live(&metric()).map_err(|error| error.to_string())? {
        collect(&mut live, &rows.batch, keys);
    }
    finals.take(workspace.idle(&stream(), Micros(i64::MAX / 2)), keys)?;
    if let Some(what) = live.keys().find_map(|place| difference_at(place, &live, &finals.rows)) {
        return Err(format!("live and then final rows of the same events differ: {what}"));
    }
    let (_, state) = workspace.metrics().next().unwrap();
    match (state.keys(), state.panes()) {
        (0, 0) => Ok(finals.rows),
        (keys, panes) => Err(format!("{keys} keys in {panes} panes are left behind after the last window")),
    }
}

/// One set of events, in their order of arrival, and how they come.
type Set = (Vec<Event>, Way);

/// Each event, by its row among those of all sets, for each window that takes it: a window is open to an event that
/// comes before the watermark has passed the window's end and the allowed lateness. Of sessions, only events of `keys`
/// (by row, those that WHERE keeps), and the session is the one that the event would be in.
fn taken(window: Window, sets: &[Set], keys: &HashMap<u32, String>) -> Vec<(u32, i64, i64)> {
    let mut held = Vec::new();
    let mut row = 0;
    for (events, way) in sets {
        let Timing { max_delay, allowed_lateness } = way.timing;
        let mut seen = Micros::MIN;
        let mut sessions: BTreeMap<&str, Vec<Session>> = BTreeMap::new();
        for event in events {
            let (at, watermark) = (Micros(event.ts), seen.minus(max_delay));
            if let Window::Session { gap } = window {
                if let Some(key) = keys.get(&row) {
                    let over = |session: &Session| session.last.plus(gap).plus(allowed_lateness) < watermark;
                    Session::join(sessions.entry(key.as_str()).or_default(), (row, at), gap, over);
                }
            } else {
                let mut end = window.first_end(at);
                while end <= window.last_end(at) {
                    if end.plus(allowed_lateness) > watermark {
                        held.push((row, window.start(end).0, end.0));
                    }
                    end = end.plus(window.slide());
                }
            }
            seen = seen.max(at);
            row += 1;
        }
        for session in sessions.into_values().flatten() {
            let end = session.last.plus(window.size());
            held.extend(session.rows.into_iter().map(|row| (row, session.first.0, end.0)));
        }
    }
    held
}

struct Session {
    first: Micros,
    last: Micros,
    rows: Vec<u32>,
}

impl Session {
    /// Puts an event among the sessions of its key, where it joins those within the gap; not if that is `over`.
    fn join(known: &mut Vec<Session>, (row, at): (u32, Micros), gap: Span, over: impl Fn(&Session) -> bool) {
        let mut whole = Session { first: at, last: at, rows: vec![row] };
        let (touched, apart) = known.drain(..).partition::<Vec<_>, _>(|session| {
            !over(session) && session.first <= at.plus(gap) && at <= session.last.plus(gap)
        });
        *known = apart;
        for session in touched {
            whole = Session {
                first: whole.first.min(session.first),
                last: whole.last.max(session.last),
                rows: [session.rows, whole.rows].concat(),
            };
        }
        if !over(&whole) {
            known.push(whole);
        }
    }
}

fn by_batch(world: &World, query_of: &Query, sets: &[Set]) -> Table {
    let events = world.batch(sets.iter().flat_map(|(events, _)| events));
    let parsed = MetricSql::parse(&query_of.text).unwrap();
    let name = stream();
    let mut keys = HashMap::new();
    if let Window::Session { .. } = parsed.window {
        // what WHERE leaves out does not hold a session together
        let rows: HashMap<(i64, i64), u32> = sets
            .iter()
            .flat_map(|(events, _)| events)
            .enumerate()
            .map(|(row, event)| ((event.set, event.seq), row as u32))
            .collect();
        let select: String = query_of.keys.iter().map(|key| format!(", {key}")).collect();
        let filter = query_of.filter.as_deref().unwrap_or("true");
        let select = format!("SELECT set_no, seq{select} FROM test.events WHERE {filter}");
        for kept in query(&[(name.parts(), events.clone())], &select) {
            let number = |at: usize, row| kept.column(at).as_primitive::<Int64Type>().value(row);
            for row in 0..kept.num_rows() {
                let place = rows[&(number(0, row), number(1, row))];
                keys.insert(place, key_text(&kept.columns()[2..], row));
            }
        }
    }
    let held = taken(parsed.window, sets, &keys);
    let rows = take_record_batch(&events, &UInt32Array::from_iter_values(held.iter().map(|h| h.0))).unwrap();
    let bound = |of: fn(&(u32, i64, i64)) -> i64| -> ArrayRef {
        Arc::new(TimestampMicrosecondArray::from_iter_values(held.iter().map(of)).with_timezone("+00:00"))
    };
    let columns = rows.columns().iter().cloned().chain([bound(|h| h.1), bound(|h| h.2)]).collect();
    let rows = RecordBatch::try_new(with_bounds(events.schema_ref()), columns).unwrap();
    let mut sql = parsed.statement.to_string();
    if let Some(top) = &query_of.top {
        let place = format!("row_number() OVER (PARTITION BY window_start, window_end, set_no ORDER BY {})", top.order);
        let (first, last, columns) = (top.offset + 1, top.offset + top.limit, query_of.columns.join(", "));
        sql = format!(
            "SELECT window_start, window_end, {columns} FROM (SELECT *, {place} AS place FROM ({sql})) \
             WHERE place BETWEEN {first} AND {last}"
        );
    }
    let mut table = Table::new();
    for answer in query(&[(name.parts(), rows)], &sql) {
        collect(&mut table, &answer, query_of.key_count());
    }
    table
}

fn difference_at(place: &(i64, i64, String), ours: &Table, truth: &Table) -> Option<String> {
    match (ours.get(place), truth.get(place)) {
        (Some(a), Some(b)) if a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b)) => None,
        (ours, truth) => Some(format!("{place:?}\n  engine {ours:?}\n  batch  {truth:?}")),
    }
}

/// What is wrong with the engine's rows of one set.
fn fault(world: &World, query: &Query, program: &Arc<Program>, events: &[Event], way: &Way) -> Option<String> {
    let truth = by_batch(world, query, &[(events.to_vec(), way.clone())]);
    match by_engine(world, program, events, way) {
        Ok(ours) => ours.keys().chain(truth.keys()).find_map(|place| difference_at(place, &ours, &truth)),
        Err(what) => Some(what),
    }
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

fn planned(world: &World, text: &str) -> Arc<Program> {
    let schema = world.schema.arrow();
    futures::executor::block_on(Planner::default().program(text, |name| (*name == stream()).then(|| schema.clone())))
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Sets of events that meet one program.
const SETS: u64 = 50;

/// Plans one random program and compares its rows over [`SETS`] sets of events.
fn try_program(seed: u64) {
    let dice = &mut Dice(seed);
    let world = World::new(dice);
    let query = world.query(dice);
    let program = planned(&world, &query.sql());
    let sets: Vec<Set> = (0..SETS).map(|set| (world.events(dice, set as i64), Way::new(dice))).collect();
    let mut truth: BTreeMap<String, Table> = BTreeMap::new();
    for (place, row) in by_batch(&world, &query, &sets) {
        let set = place.2.split('|').next().unwrap_or_default().to_owned();
        truth.entry(set).or_default().insert(place, row);
    }
    for (number, (events, way)) in sets.iter().enumerate() {
        let truth = truth.remove(&format!("`{number}`")).unwrap_or_default();
        let is_right = by_engine(&world, &program, events, way).is_ok_and(|ours| {
            let places: BTreeSet<_> = ours.keys().chain(truth.keys()).collect();
            places.into_iter().all(|place| difference_at(place, &ours, &truth).is_none())
        });
        if !is_right {
            let few = shrunk(events.clone(), |events| fault(&world, &query, &program, events, way).is_some());
            let what = fault(&world, &query, &program, &few, way);
            let fields =
                world.schema.arrow().fields().iter().map(|field| format!("{} {}", field.name(), field.data_type()));
            let fields = fields.collect::<Vec<_>>().join(", ");
            panic!("{fields}\n{}\n{way:?}\n{few:#?}\n{what:?}", query.sql());
        }
    }
}

#[test]
fn random_programs_over_random_events_give_the_rows_of_batch_sql() {
    let (cases, seed) = (setting("TIDEWATCH_ORACLE_CASES", 30_000), setting("TIDEWATCH_ORACLE_SEED", 1));
    println!("{cases} cases from TIDEWATCH_ORACLE_SEED={seed}");
    let (next, programs) = (AtomicU64::new(0), cases.div_ceil(SETS));
    let work = || -> Result<(), String> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= programs {
                return Ok(());
            }
            let seed = seed.wrapping_mul(1_000_003).wrapping_add(number);
            if let Err(what) = catch_unwind(AssertUnwindSafe(|| try_program(seed))) {
                next.store(programs, Ordering::Relaxed);
                let text = what.downcast_ref::<String>().map(String::as_str).or(what.downcast_ref::<&str>().copied());
                let what = text.unwrap_or("a panic without text");
                return Err(format!("program {number} of these: {what}"));
            }
        }
    };
    let failures: Vec<String> = std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers.into_iter().filter_map(|worker| worker.join().expect("it catches panics").err()).collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
