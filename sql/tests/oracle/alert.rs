//! What alert rules say: by the log alone, whatever the cuts into batches, the looks in between and the restarts.

use crate::{HOP, SESSION, TUMBLE, batch, trades, trades_schema};
use arrow::array::RecordBatch;
use engine::alert::{Phase, Rule};
use engine::checkpoint::{Saved, State};
use engine::event::{ItemName, Span, StreamName};
use engine::metric::Timing;
use engine::program::Program;
use engine::workspace::{Outputs, Workspace};
use sql::plan::{Planner, Source};
use std::collections::BTreeMap;
use std::sync::Arc;

const SECOND: i64 = 1_000_000;
const TIMING: Timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO };
const TEN: &str = "tumble(ts, INTERVAL '10 seconds')";

fn name(name: &str) -> ItemName {
    name.parse().unwrap()
}

fn workspace(metrics: &[(&str, String)], timing: Timing) -> Workspace {
    let mut workspace = Workspace::default();
    let mut programs: BTreeMap<ItemName, Arc<Program>> = BTreeMap::new();
    for (metric, sql) in metrics {
        let source = |stream: &StreamName| match stream.metric() {
            Some(upstream) => programs.get(&upstream).cloned().map(Source::Metric),
            None => (*stream == trades()).then(|| Source::Stream(trades_schema())),
        };
        let program = futures::executor::block_on(Planner::default().program(sql, source)).unwrap();
        workspace.define(name(metric), 1, program.clone(), timing).unwrap();
        programs.insert(name(metric), program);
    }
    workspace
}

/// The highest price by symbol in windows of `window`.
fn highest(window: &str) -> String {
    format!("SELECT symbol, max(price) AS hi, count(*) AS n FROM market.trades GROUP BY {window}, symbol")
}

fn watch(workspace: &mut Workspace, rule: &str, metric: &str, condition: &str, hold: i64) {
    let program = workspace.metrics().find(|(known, _)| known.as_str() == metric).unwrap().1.program().clone();
    let condition = sql::plan::condition(condition, &program).unwrap();
    let (hold, severity) = (Span::seconds(hold), "warning".to_owned());
    workspace.watch(Rule { name: name(rule), metric: name(metric), condition, hold, severity }).unwrap();
}

/// Second, symbol and price of a trade each.
fn prices(rows: &[(i64, &str, f64)]) -> RecordBatch {
    batch(&rows.iter().map(|(at, symbol, price)| (at * SECOND, *symbol, *price, 1.0)).collect::<Vec<_>>())
}

fn told(outputs: &Outputs) -> Vec<String> {
    assert_eq!(outputs.failures, []);
    let change = |change: &engine::alert::Change| {
        let phase = if change.phase == Phase::Firing { "fires" } else { "resolved" };
        let (since, at) = (change.since.0 as f64 / 1e6, change.at.0 as f64 / 1e6);
        format!("{} {} {phase} at {at} since {since}", change.rule, change.labels[0].1)
    };
    outputs.alerts.iter().map(change).collect()
}

#[test]
fn the_same_events_in_one_batch_or_in_many_give_the_same_episodes_over_final_rows() {
    let metrics = [("highs", highest(TEN)), ("finals", "SELECT symbol, hi FROM metrics.highs".to_owned())];
    let events =
        [(31, "B", 160.0), (42, "B", 170.0), (53, "B", 180.0), (64, "B", 190.0), (75, "B", 1.0), (86, "B", 1.0)];
    let expected = ["long B fires at 60 since 40", "long B resolved at 80 since 40"];
    for size in [1, 2, 3, 6] {
        let mut running = workspace(&metrics, TIMING);
        watch(&mut running, "long", "finals", "hi > 100", 15);
        let found = events.chunks(size).flat_map(|part| told(&running.step(&trades(), &prices(part))));
        assert_eq!(found.collect::<Vec<_>>(), expected, "batches of {size}");
    }
}

#[test]
fn a_rule_over_open_windows_fires_within_the_batch_in_which_the_condition_held_long_enough() {
    let mut running = workspace(&[("highs", highest(TEN))], TIMING);
    watch(&mut running, "long", "highs", "hi > 100", 15);
    let all = [(31, "B", 160.0), (42, "B", 170.0), (53, "B", 180.0), (64, "B", 190.0)];
    assert_eq!(told(&running.step(&trades(), &prices(&all))), ["long B fires at 60 since 40"]);
    assert_eq!(told(&running.step(&trades(), &prices(&[(72, "B", 9.0)]))), ["long B resolved at 72 since 40"]);
}

#[test]
fn a_window_that_closes_behind_a_newer_one_begins_no_episode_again() {
    let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
    let mut running = workspace(&[("highs", highest(TEN))], timing);
    watch(&mut running, "high", "highs", "hi > 100", 0);
    assert_eq!(told(&running.step(&trades(), &prices(&[(8, "A", 120.0)]))), ["high A fires at 8 since 8"]);
    assert_eq!(told(&running.step(&trades(), &prices(&[(11, "A", 1.0)]))), ["high A resolved at 11 since 8"]);
    // [0, 10) is final now
    assert_eq!(told(&running.step(&trades(), &prices(&[(16, "A", 1.0)]))), [""; 0]);
    // a window that was not high before is news also when a newer one is not
    assert_eq!(told(&running.step(&trades(), &prices(&[(23, "A", 1.0)]))), [""; 0]);
    assert_eq!(told(&running.step(&trades(), &prices(&[(19, "A", 130.0)]))), ["high A fires at 20 since 20"]);
    assert_eq!(told(&running.step(&trades(), &prices(&[(24, "A", 1.0)]))), ["high A resolved at 24 since 20"]);
}

#[test]
fn neither_ticks_nor_restarts_change_what_rules_say() {
    let mut state = 7_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let batches: Vec<RecordBatch> = (0..60)
        .map(|at| {
            let mut one = || (at * 2 + random(8) as i64, ["A", "B", "C"][random(3) as usize], random(200) as f64);
            prices(&[one(), one(), one()])
        })
        .collect();
    let timing = Timing { max_delay: Span::seconds(3), allowed_lateness: Span::seconds(4) };
    let (hop, cumulate) = (
        "hop(ts, INTERVAL '5 seconds', INTERVAL '20 seconds')",
        "cumulate(ts, INTERVAL '5 seconds', INTERVAL '20 seconds')",
    );
    for window in [TEN, hop, cumulate, SESSION] {
        let begin = || {
            let mut running = workspace(&[("highs", highest(window))], timing);
            watch(&mut running, "high", "highs", "hi > 150", 0);
            watch(&mut running, "long", "highs", "n > 3", 4);
            running
        };
        let run = |ticks: bool, restarts: bool| -> Vec<String> {
            let (mut running, mut state) = (begin(), State::default());
            let mut all = Vec::new();
            for batch in &batches {
                let mut step = told(&running.step(&trades(), batch));
                step.sort(); // keys have no order
                all.extend(step);
                if ticks {
                    assert_eq!(told(&running.tick(&name("highs"))), [""; 0]);
                }
                if restarts {
                    state.apply(running.save().unwrap().encode().unwrap());
                    running = begin();
                    assert_eq!(running.restore(Saved::read(&state).unwrap()).unwrap(), []);
                }
            }
            all
        };
        let quiet = run(false, false);
        assert!(quiet.iter().any(|line| line.contains("resolved")), "{window}: {quiet:?}");
        assert_eq!(run(true, false), quiet, "{window} with ticks");
        assert_eq!(run(false, true), quiet, "{window} with restarts");
        assert_eq!(run(true, true), quiet, "{window} with both");
    }
}

#[test]
fn what_rules_look_at_is_still_shown_by_the_next_tick() {
    for window in [TEN, SESSION, HOP] {
        let (mut plain, mut watched) =
            (workspace(&[("highs", highest(window))], TIMING), workspace(&[("highs", highest(window))], TIMING));
        watch(&mut watched, "high", "highs", "hi > 150", 0);
        for at in 0..30 {
            let batch = prices(&[(at, "A", 100.0), (at, ["B", "C"][at as usize % 2], 200.0)]);
            plain.step(&trades(), &batch);
            watched.step(&trades(), &batch);
            if at % 3 == 0 {
                let shown = |running: &mut Workspace| {
                    let rows = running.tick(&name("highs")).rows;
                    let lines = rows.iter().flat_map(|rows| {
                        (0..rows.rows.batch.num_rows()).map(|row| format!("{:?}", rows.rows.batch.slice(row, 1)))
                    });
                    let mut lines: Vec<String> = lines.collect();
                    lines.sort();
                    lines
                };
                assert_eq!(shown(&mut plain), shown(&mut watched), "{window} at {at}");
            }
        }
    }
}

#[test]
fn a_rule_that_cannot_be_computed_for_a_row_leaves_it_out_and_stops_nothing() {
    let mut running = workspace(&[("highs", highest(TEN))], TIMING);
    watch(&mut running, "number", "highs", "CAST(symbol AS bigint) > 5", 0);
    watch(&mut running, "high", "highs", "hi > 100", 0);
    let outputs = running.step(&trades(), &prices(&[(1, "A", 120.0), (2, "7", 1.0)]));
    assert_eq!(told(&outputs), ["high A fires at 2 since 2", "number 7 fires at 2 since 2"]);
    let [(rule, trouble)] = outputs.trouble.as_slice() else { panic!("{:?}", outputs.trouble) };
    assert_eq!((rule.as_str(), trouble.rows), ("number", 1));
    assert!(trouble.reason.contains("Cannot cast string 'A'"), "{trouble:?}");
    running.step(&trades(), &prices(&[(3, "A", 121.0)]));
    assert_eq!(running.trouble(&name("number")).unwrap().rows, 2);
    assert_eq!((running.trouble(&name("high")), running.failure(&name("highs"))), (None, None));
    // a zero divisor is NULL, which is not true
    watch(&mut running, "zero", "highs", "10 / (n - n) > 100", 0);
    assert_eq!(told(&running.step(&trades(), &prices(&[(4, "A", 121.0)]))), [""; 0]);
    assert_eq!(running.trouble(&name("zero")), None);
}

#[test]
fn a_rule_that_changes_goes_on_firing_only_where_the_new_condition_holds() {
    let mut running = workspace(&[("highs", highest(TEN))], TIMING);
    watch(&mut running, "high", "highs", "hi > 100", 0);
    running.step(&trades(), &prices(&[(1, "A", 120.0), (2, "B", 150.0)]));
    let firing = |running: &Workspace| {
        let mut keys: Vec<String> = running.firing(&name("high")).map(str::to_owned).collect();
        keys.sort();
        keys
    };
    assert_eq!(firing(&running), ["A", "B"]);
    watch(&mut running, "high", "highs", "hi > 100", 0);
    assert_eq!(firing(&running), ["A", "B"]);
    watch(&mut running, "high", "highs", "hi > 130", 0);
    assert_eq!(firing(&running), ["B"]);
    // and is not told again
    assert_eq!(told(&running.step(&trades(), &prices(&[(3, "B", 160.0)]))), [""; 0]);
    assert_eq!(told(&running.step(&trades(), &prices(&[(13, "B", 1.0)]))), ["high B resolved at 13 since 2"]);
    running.unwatch(&name("high"));
    assert_eq!(firing(&running), [""; 0]);
}

#[test]
fn rows_that_leave_the_top_by_a_late_correction_are_withdrawn_and_come_back_behind_it() {
    let sql =
        format!("SELECT symbol, sum(qty) AS q FROM market.trades GROUP BY {TUMBLE}, symbol ORDER BY q DESC LIMIT 2");
    let mut running =
        workspace(&[("top", sql)], Timing { max_delay: Span::ZERO, allowed_lateness: Span::seconds(3_600) });
    // as the store keeps them: a row changes only to a greater revision
    let mut stored: BTreeMap<(i64, String), (i64, Option<f64>)> = BTreeMap::new();
    let mut top = |rows: &[(i64, &str, f64)]| -> Vec<(String, f64)> {
        let rows: Vec<_> = rows.iter().map(|(at, symbol, qty)| (at * SECOND, *symbol, 1.0, *qty)).collect();
        let outputs = running.step(&trades(), &batch(&rows));
        assert_eq!(outputs.failures, []);
        for rows in outputs.rows {
            use arrow::array::AsArray;
            use arrow::datatypes::{Float64Type, Int64Type, TimestampMicrosecondType};
            let place = |batch: &RecordBatch, row: usize| {
                let start = batch.column(0).as_primitive::<TimestampMicrosecondType>().value(row);
                (start, batch.column(2).as_string::<i32>().value(row).to_owned())
            };
            let mut put = |place, revision, row| match stored.get(&place) {
                Some((known, _)) if *known >= revision => {}
                _ => _ = stored.insert(place, (revision, row)),
            };
            let (batch, revisions) = (&rows.rows.batch, rows.rows.revisions.unwrap());
            if let Some(taken) = &rows.rows.withdrawn {
                let revisions = taken.column(3).as_primitive::<Int64Type>();
                (0..taken.num_rows()).for_each(|row| put(place(taken, row), revisions.value(row), None));
            }
            let qty = batch.column(3).as_primitive::<Float64Type>();
            (0..batch.num_rows()).for_each(|row| put(place(batch, row), revisions[row], Some(qty.value(row))));
        }
        let of_first = stored.iter().filter(|((start, _), _)| *start == 0);
        of_first.filter_map(|((_, symbol), (_, row))| Some((symbol.clone(), (*row)?))).collect()
    };
    let rows = |rows: [(&str, f64); 2]| rows.map(|(symbol, qty)| (symbol.to_owned(), qty));
    assert_eq!(top(&[(1, "A", 100.0), (2, "B", 90.0), (3, "C", 1.0)]), []);
    assert_eq!(top(&[(61, "D", 1.0)]), rows([("A", 100.0), ("B", 90.0)]));
    assert_eq!(top(&[(4, "C", 100.0)]), rows([("A", 100.0), ("C", 101.0)]));
    assert_eq!(top(&[(5, "C", -50.0)]), rows([("A", 100.0), ("B", 90.0)]));
    assert_eq!(top(&[(6, "A", -99.0)]), rows([("B", 90.0), ("C", 51.0)]));
    assert_eq!(top(&[(7, "E", 95.0), (8, "A", 98.0)]), rows([("A", 99.0), ("E", 95.0)]));
    assert_eq!(top(&[(9, "E", -95.0)]), rows([("A", 99.0), ("B", 90.0)]));
}
