use super::*;
use crate::decode::{Bounds, Format, TsUnit, decode};
use crate::schema::{ColumnType, StreamSchema, built_in};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{HashMap, HashSet};

const KINDS: [Kind; 3] = [Kind::Venture, Kind::Founder, Kind::Creator];

/// Tuesday, 2026-02-03 00:00 UTC.
const START: Micros = Micros(1_770_076_800_000_000);

const HOUR: Span = Span::seconds(3_600);

fn all(kind: Kind, seed: u64, span: Span) -> Vec<SimEvent> {
    let mut out = Vec::new();
    Simulator::new(kind, seed, START).next_until(START.plus(span), &mut out);
    out
}

fn schema(stream: &str) -> &'static StreamSchema {
    built_in().iter().find(|schema| schema.stream.as_str() == stream).expect("a built-in stream")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_same_seed_gives_the_same_bytes_whatever_the_steps(
        seed in any::<u64>(),
        kind in 0..3usize,
        steps in prop::collection::vec(prop_oneof![Just(0), 1..5_000i64, 1..90_000_000i64], 1..40),
    ) {
        let total = steps.iter().sum();
        let at_once = all(KINDS[kind], seed, Span(total));
        let (mut simulator, mut stepwise, mut now) = (Simulator::new(KINDS[kind], seed, START), Vec::new(), START);
        for step in steps {
            now = now.plus(Span(step));
            simulator.next_until(now, &mut stepwise);
        }
        prop_assert_eq!(at_once, stepwise);
    }
}

#[test]
fn another_seed_or_start_gives_other_events_and_ids() {
    for kind in KINDS {
        let ids = |seed, start: Micros| -> HashSet<String> {
            let mut out = Vec::new();
            Simulator::new(kind, seed, start).next_until(start.plus(Span::seconds(60)), &mut out);
            out.iter().map(|event| parse(event)["id"].as_str().unwrap().to_owned()).collect()
        };
        let first = ids(1, START);
        assert!(first.len() > 150, "{kind:?}");
        assert!(first.is_disjoint(&ids(2, START)) && first.is_disjoint(&ids(1, START.plus(Span(1)))), "{kind:?}");
    }
}

fn parse(event: &SimEvent) -> Value {
    serde_json::from_str(&event.line).unwrap_or_else(|error| panic!("{error}: {}", event.line))
}

#[test]
fn every_event_has_the_columns_of_its_stream() {
    for kind in KINDS {
        for event in all(kind, 3, HOUR) {
            let (value, schema) = (parse(&event), schema(event.stream));
            assert!(!event.line.contains('\n'));
            let members = value.as_object().unwrap();
            assert!(members["ts"].is_i64() && members["id"].as_str().is_some_and(|id| id.len() <= 128));
            for column in &schema.columns {
                let fits = match (members.get(&column.name), column.kind) {
                    (None, _) => column.nullable,
                    (Some(value), ColumnType::Float64) => value.is_number(),
                    (Some(value), ColumnType::Json) => value.is_object(),
                    (Some(value), _) => value.is_string(),
                };
                assert!(fits, "column {}: {}", column.name, event.line);
            }
            let own = |name: &String| name == "ts" || name == "id" || schema.columns.iter().any(|c| c.name == *name);
            assert!(members.keys().all(own), "{}", event.line);
        }
    }
}

#[test]
fn ingest_accepts_every_event() {
    for kind in KINDS {
        let events = all(kind, 4, Span::seconds(600));
        for schema in built_in() {
            let of_stream = events.iter().filter(|event| event.stream == schema.stream.as_str());
            let lines: Vec<&str> = of_stream.map(|event| event.line.as_str()).collect();
            if !lines.is_empty() {
                let (body, now) = (lines.join("\n"), START.plus(HOUR));
                let decoded =
                    decode(schema, body.as_bytes(), Format::Ndjson, TsUnit::Micros, &Bounds::default(), now).unwrap();
                assert_eq!((decoded.batch.num_rows(), decoded.errors), (lines.len(), Vec::new()), "{}", schema.stream);
            }
        }
    }
}

#[test]
fn a_few_events_come_out_of_order_late_or_twice() {
    for kind in KINDS {
        let events = all(kind, 5, Span(4 * HOUR.0));
        let (mut newest, mut behind, mut late, mut twice) = (Micros::MIN, 0.0, 0.0, 0.0);
        let mut lines: HashSet<&str> = HashSet::new();
        for event in &events {
            if !lines.insert(&event.line) {
                twice += 1.0;
                continue;
            }
            let ts = Micros(parse(event)["ts"].as_i64().unwrap());
            let lag = newest.since(ts);
            behind += f64::from(u8::from(lag > Span::millis(200)));
            late += f64::from(u8::from(lag > Span::seconds(9)));
            assert!(lag <= Span::seconds(61));
            newest = newest.max(ts);
        }
        let share = |count: f64| count / events.len() as f64;
        assert!((0.01..0.06).contains(&share(behind)), "{kind:?}: out of order {}", share(behind));
        assert!((0.0005..0.002).contains(&share(late)), "{kind:?}: late {}", share(late));
        assert!((0.001..0.004).contains(&share(twice)), "{kind:?}: twice {}", share(twice));
    }
}

/// A day of `kind`: about so many events a second, in every hour and on the whole.
fn a_day(kind: Kind, a_second: f64) -> Levels {
    let mut simulator = Simulator::new(kind, 11, START);
    let (mut count, mut out, mut levels) = (0, Vec::new(), Levels::default());
    for hour in 1..=24 {
        simulator.next_until(START.plus(Span(hour * HOUR.0)), &mut out);
        let rate = out.len() as f64 / 3_600.0;
        assert!((0.5 * a_second..1.8 * a_second).contains(&rate), "{rate}/s in hour {hour}");
        count += out.len();
        out.iter().for_each(|event| levels.see(event));
        out.clear();
    }
    let rate = count as f64 / 86_400.0;
    assert!((0.8 * a_second..1.25 * a_second).contains(&rate), "{rate}/s");
    levels
}

#[test]
fn a_day_of_the_market_has_plausible_prices() {
    let levels = a_day(Kind::Venture, 60.0);
    assert_eq!(levels.prices.len(), 16);
    for (symbol, (low, high)) in &levels.prices {
        let moved = high / low - 1.0;
        assert!((0.003..0.35).contains(&moved), "{symbol} went from {low} to {high}");
    }
    let (low, high) = levels.prices["BTC-USD"];
    assert!(60_000.0 < low && high < 130_000.0, "BTC-USD went from {low} to {high}");
}

#[test]
fn a_day_of_the_business_is_a_funnel() {
    let sums = a_day(Kind::Founder, 15.0).sums;
    let count = |event: &str| sums[event].0;
    let (views, signups, trials) = (count("page_view"), count("signup"), count("trial_started"));
    let (created, cancelled) = (count("subscription_created"), count("subscription_cancelled"));
    assert!(views > 100 * signups && signups > trials && trials > created, "{sums:?}");
    assert!((100..800).contains(&created) && (40..300).contains(&cancelled), "{sums:?}");
    let (paid, spent) = (sums["invoice_paid"].1, sums["expense"].1);
    assert!((40_000.0..200_000.0).contains(&paid) && (8_000.0..60_000.0).contains(&spent), "{sums:?}");
}

#[test]
fn a_day_of_chat_is_varied_and_pays() {
    let Levels { sums, texts, .. } = a_day(Kind::Creator, 20.0);
    let (fans, chatters, creators) = (sums["fan"], sums["chatter"], sums["creator"]);
    assert!(fans.0 > chatters.0 && chatters.0 > creators.0 && creators.0 > 1_000, "{sums:?}");
    let a_message = fans.1 / fans.0 as f64;
    assert!((0.1..2.0).contains(&a_message), "fans pay {a_message} USD a message");
    assert!(texts.len() > 5_000, "{} different texts", texts.len());
}

/// The columns that levels are made of.
#[derive(Deserialize)]
struct Line<'a> {
    symbol: Option<&'a str>,
    price: Option<f64>,
    qty: Option<f64>,
    bid: Option<f64>,
    ask: Option<f64>,
    bid_qty: Option<f64>,
    ask_qty: Option<f64>,
    event: Option<&'a str>,
    value: Option<f64>,
    role: Option<&'a str>,
    text: Option<&'a str>,
    amount: Option<f64>,
}

/// What a day comes to.
#[derive(Default)]
struct Levels {
    /// Lowest and highest price of each symbol.
    prices: HashMap<String, (f64, f64)>,
    /// Count and sum of `value` or `amount` of each kind of event or sender.
    sums: HashMap<String, (usize, f64)>,
    texts: HashSet<String>,
}

impl Levels {
    fn see(&mut self, event: &SimEvent) {
        let line: Line = serde_json::from_str(&event.line).unwrap();
        if let Some(symbol) = line.symbol {
            let price = line.price.unwrap_or_else(|| {
                let (bid, ask) = (line.bid.unwrap(), line.ask.unwrap());
                assert!(0.0 < bid && bid < ask && ask / bid < 1.02, "{}", event.line);
                bid
            });
            assert!([line.qty, line.bid_qty, line.ask_qty].into_iter().flatten().all(|qty| qty > 0.0));
            let range = self.prices.entry(symbol.to_owned()).or_insert((f64::MAX, f64::MIN));
            *range = (range.0.min(price), range.1.max(price));
        }
        if let Some(kind) = line.event.or(line.role) {
            let sum = self.sums.entry(kind.to_owned()).or_default();
            let amount = line.value.or(line.amount);
            assert!(amount.is_none_or(|amount| amount > 0.0 && amount < 10_000.0), "{}", event.line);
            *sum = (sum.0 + 1, sum.1 + amount.unwrap_or(0.0));
        }
        if let Some(text) = line.text {
            assert!(!text.is_empty() && !text.contains('{') && !text.contains('}'), "{text}");
            self.texts.insert(text.to_owned());
        }
    }
}

#[test]
fn a_creator_who_goes_live_fills_the_room() {
    let mut a_minute: HashMap<(String, i64), usize> = HashMap::new();
    for event in all(Kind::Creator, 17, Span(6 * HOUR.0)) {
        let value = parse(&event);
        let thread = value["thread"].as_str().unwrap();
        if thread.ends_with("-live") {
            *a_minute.entry((thread.to_owned(), value["ts"].as_i64().unwrap() / 60_000_000)).or_default() += 1;
        }
    }
    let mut counts: Vec<usize> = a_minute.into_values().collect();
    counts.sort_unstable();
    let (median, most) = (counts[counts.len() / 2], counts[counts.len() - 1]);
    assert!(most > 4 * median, "{most} messages in the busiest minute, {median} in the usual one");
}
