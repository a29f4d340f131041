//! What becomes of metrics that hold more state than they may.

use crate::{TUMBLE, batch, planned, trades};
use arrow::array::RecordBatch;
use engine::checkpoint::Saved;
use engine::event::{ItemName, Micros, Span};
use engine::limit::{StateLimits, StateSize};
use engine::metric::Timing;
use engine::workspace::{Cause, Outputs, Workspace};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const SECOND: i64 = 1_000_000;
const TIMING: Timing = Timing { max_delay: Span::ZERO, allowed_lateness: Span::ZERO };
const ANY: usize = usize::MAX;

fn name(name: &str) -> ItemName {
    name.parse().unwrap()
}

fn limits(metric: (usize, usize), workspace: (usize, usize)) -> StateLimits {
    let size = |(bytes, groups)| StateSize { bytes, groups };
    StateLimits { metric: size(metric), workspace: size(workspace) }
}

fn still() -> Duration {
    Duration::ZERO
}

fn by(key: &str, value: &str) -> String {
    format!("SELECT {key} AS k, {value} AS v FROM market.trades GROUP BY {TUMBLE}, {key}")
}

fn workspace(limits: StateLimits, metrics: &[(&str, &str)]) -> Workspace {
    let mut workspace = Workspace::new(limits, still);
    for (metric, sql) in metrics {
        workspace.define(name(metric), 1, planned(sql), TIMING).unwrap();
    }
    workspace
}

/// `count` trades of the second `at`, each of a symbol of its own from `first` on.
fn symbols(at: i64, first: usize, count: usize) -> RecordBatch {
    let names: Vec<String> = (first..first + count).map(|n| format!("S{n}")).collect();
    batch(&names.iter().map(|symbol| (at * SECOND, symbol.as_str(), 1.0, 1.0)).collect::<Vec<_>>())
}

fn stopped(outputs: &Outputs) -> Vec<(&str, Cause)> {
    outputs.failures.iter().map(|failure| (failure.metric.as_str(), failure.stop.cause)).collect()
}

fn final_rows(outputs: &Outputs, metric: &str) -> usize {
    let of = outputs.rows.iter().filter(|rows| rows.metric.as_str() == metric && rows.rows.revisions.is_some());
    of.map(|rows| rows.rows.batch.num_rows()).sum()
}

#[test]
fn a_metric_with_too_many_groups_stops_lets_its_state_go_and_the_others_go_on() {
    let metrics = [("all", by("side", "count(*)")), ("each", by("symbol", "count(*)"))];
    let metrics = metrics.each_ref().map(|(name, sql)| (*name, sql.as_str()));
    let bounds = limits((ANY, 100), (ANY, ANY));
    let mut running = workspace(bounds, &metrics);
    assert_eq!(stopped(&running.step(&trades(), &symbols(1, 0, 100))), []);
    let outputs = running.step(&trades(), &symbols(2, 100, 1));
    assert_eq!(stopped(&outputs), [("each", Cause::StateLimit)]);
    let reason = &outputs.failures[0].stop.reason;
    assert!(reason.contains("101 groups") && reason.contains("limits.metric_state_groups"), "{reason}");
    let (_, each) = running.metrics().find(|(metric, _)| metric.as_str() == "each").unwrap();
    assert_eq!((each.keys(), each.panes()), (0, 0));
    // also behind a restart
    let saved = running.state().unwrap();
    let mut running = workspace(bounds, &metrics);
    assert_eq!(running.restore(Saved::read(&saved).unwrap()).unwrap(), []);
    assert_eq!(running.failure(&name("each")).unwrap().cause, Cause::StateLimit);
    let outputs = running.step(&trades(), &symbols(61, 0, 3));
    assert_eq!((stopped(&outputs), final_rows(&outputs, "all"), final_rows(&outputs, "each")), (vec![], 1, 0));
    // and defined again it runs
    running.define(name("each"), 2, planned(metrics[1].1), TIMING).unwrap();
    running.step(&trades(), &symbols(62, 0, 3));
    assert_eq!(final_rows(&running.step(&trades(), &symbols(121, 0, 1)), "each"), 3);
}

#[test]
fn bytes_are_bounded_for_every_kind_of_window() {
    for window in [
        TUMBLE,
        "hop(ts, INTERVAL '1 second', INTERVAL '10 minutes')",
        "cumulate(ts, INTERVAL '1 second', INTERVAL '10 minutes')",
        "session(ts, INTERVAL '10 minutes')",
    ] {
        let sql = format!("SELECT symbol, array_agg(price) AS v FROM market.trades GROUP BY {window}, symbol");
        let most = 1 << 20;
        let mut running = workspace(limits((most, ANY), (ANY, ANY)), &[("kept", &sql)]);
        let (mut stopped_at, mut highest) = (None, 0);
        for at in 0..300 {
            let outputs = running.step(&trades(), &symbols(at % 50, 0, 1_000));
            highest = highest.max(running.bytes());
            if stopped(&outputs) == [("kept", Cause::StateLimit)] {
                stopped_at = Some(at);
                break;
            }
        }
        assert!(stopped_at.is_some(), "{window} held {highest} bytes");
        assert!(highest < most * 3 / 2, "{window} held {highest} bytes");
        assert!(running.bytes() < 4096, "{window} still holds {} bytes", running.bytes());
    }
}

#[test]
fn a_join_whose_other_stream_never_comes_stops_at_its_bound() {
    let sql = "SELECT t.symbol, count(*) AS n FROM market.trades t JOIN market.quotes q ON t.symbol = q.symbol \
               AND q.ts BETWEEN t.ts - INTERVAL '1 second' AND t.ts GROUP BY tumble(t.ts, INTERVAL '1 minute'), t.symbol";
    let most = 1 << 20;
    let all = by("side", "count(*)");
    let mut running = workspace(limits((most, ANY), (ANY, ANY)), &[("all", &all), ("pairs", sql)]);
    let mut highest = 0;
    let step = (0..200).find(|&at| {
        let outputs = running.step(&trades(), &symbols(at, 0, 500));
        highest = highest.max(running.bytes());
        stopped(&outputs) == [("pairs", Cause::StateLimit)]
    });
    assert!(step.is_some_and(|at| at > 5) && highest < most * 3 / 2, "{step:?}, {highest} bytes");
    assert_eq!(running.failure(&name("all")), None);
}

#[test]
fn a_batch_whose_pairs_fill_the_metric_stops_it_in_the_middle() {
    let sql = "SELECT array_agg(t.price) AS v FROM market.trades t JOIN market.quotes q ON t.symbol = q.symbol \
               GROUP BY tumble(t.ts, INTERVAL '1 hour')";
    let mut running = workspace(limits((4 << 20, ANY), (ANY, ANY)), &[("pairs", sql)]);
    let quotes: engine::event::StreamName = "market.quotes".parse().unwrap();
    let at = |seconds: std::ops::Range<i64>| {
        batch(&seconds.map(|second| (second * SECOND, "A", 1.0, 1.0)).collect::<Vec<_>>())
    };
    // of quotes the metric needs time and symbol, which trades have too
    running.step(&quotes, &at(0..1_000));
    let outputs = running.step(&trades(), &at(0..1_500));
    assert_eq!(stopped(&outputs), [("pairs", Cause::StateLimit)]); // 1.5 million prices are 12 MB
    assert!(running.bytes() < 4096, "{} bytes", running.bytes());
}

#[test]
fn over_the_bound_of_the_workspace_the_metric_that_holds_most_stops() {
    let metrics = [("few", by("side", "count(*)")), ("many", by("symbol", "count(*)")), ("most", "SELECT symbol, price, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol, price".to_owned())];
    let metrics = metrics.each_ref().map(|(name, sql)| (*name, sql.as_str()));
    let mut running = workspace(limits((ANY, ANY), (ANY, 1_000)), &metrics);
    let twice = |first: usize, price: f64| {
        let names: Vec<String> = (first..first + 100).map(|n| format!("S{n}")).collect();
        let rows =
            names.iter().flat_map(|s| [(SECOND, s.as_str(), price, 1.0), (SECOND, s.as_str(), price + 1.0, 1.0)]);
        batch(&rows.collect::<Vec<_>>())
    };
    for n in 0..3 {
        assert_eq!(stopped(&running.step(&trades(), &twice(n * 100, 1.0))), []);
    }
    let outputs = running.step(&trades(), &twice(300, 1.0)); // 1 + 400 + 800 groups
    assert_eq!(stopped(&outputs), [("most", Cause::StateLimit)]);
    let reason = &outputs.failures[0].stop.reason;
    assert!(reason.contains("limits.workspace_state_groups") && reason.contains("(800)"), "{reason}");
    assert_eq!(stopped(&running.step(&trades(), &twice(400, 1.0))), []);
}

#[test]
fn state_that_is_gone_since_it_was_measured_stops_nobody() {
    let quotes = by("symbol", "count(*)").replace("market.trades", "market.quotes");
    let mut running =
        workspace(limits((ANY, ANY), (500_000, ANY)), &[("a", &by("symbol", "count(*)")), ("b", &quotes)]);
    let of_quotes = "market.quotes".parse().unwrap();
    running.step(&of_quotes, &symbols(1, 0, 4_000));
    let held = running.bytes();
    assert!((250_001..500_000).contains(&held), "{held} bytes");
    running.idle(&of_quotes, Micros(3_600 * SECOND));
    let outputs = running.step(&trades(), &symbols(1, 0, 4_000));
    assert_eq!((stopped(&outputs), running.bytes()), (vec![], held));
}

#[test]
fn the_cost_of_a_metric_is_what_its_batches_took_by_the_stopwatch() {
    static TICKS: AtomicU64 = AtomicU64::new(0);
    let mut running = Workspace::new(StateLimits::NONE, || Duration::from_micros(TICKS.fetch_add(5, Relaxed)));
    running.define(name("all"), 1, planned(&by("side", "count(*)")), TIMING).unwrap();
    assert_eq!(running.cost(&name("all")).unwrap().micros_per_batch(), None);
    for at in 0..4 {
        running.step(&trades(), &symbols(at, 0, 10));
    }
    let cost = running.cost(&name("all")).unwrap();
    assert_eq!((cost.batches, cost.rows, cost.micros_per_batch()), (4, 40, Some(5.0)));
}
