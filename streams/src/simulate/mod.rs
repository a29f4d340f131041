//! Streams that look like life, from a seed: a market, a subscription business, creators and their fans.
//! Time comes in, so that a simulation runs at any speed; the same seed and start give the same bytes,
//! whatever the steps. Some events come out of order, late or twice, as they do in life.

mod chat; // creators, fans and those who answer for creators
mod dice; // chance from a seed
mod market; // prices, quotes and trades
mod product; // visits, sign-ups, subscriptions, money

use dice::Dice;
use engine::event::{Micros, Span};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Write;

/// Which world is simulated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Trades and quotes of 12 US stocks and funds and 4 crypto pairs; about 60 events a second.
    Venture,
    /// Visits, sign-ups, subscriptions, invoices and expenses of a subscription business; about 15 a second.
    Founder,
    /// Messages, tips and unlocks between fans, chatters and creators; about 20 a second.
    Creator,
}

/// One event, at the moment when it would arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimEvent {
    pub stream: &'static str,
    /// One NDJSON line without its line break; `ts` in microseconds.
    pub line: String,
}

/// A world that goes on as far as it is asked to.
pub struct Simulator {
    world: World,
    dice: Dice,
    /// When the world acts next.
    next: Micros,
    acts: Acts,
    /// Arrivals so far: some events arrive twice.
    arrivals: u64,
    /// What happened but has not arrived.
    on_the_way: BinaryHeap<Reverse<Arrival>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Arrival {
    at: Micros,
    /// Breaks ties, so that the order never depends on the heap.
    order: u64,
    stream: &'static str,
    line: String,
}

enum World {
    Venture(market::Market),
    Founder(product::Product),
    Creator(chat::Chat),
}

/// What a world does in one act: events that happen now, each with the id it gets.
struct Acts {
    /// In front of every event id; different for every seed, kind and start.
    run: String,
    /// Events so far.
    count: u64,
    events: Vec<Act>,
}

struct Act {
    number: u64,
    stream: &'static str,
    /// The inside of the event's JSON object after `ts` and `id`.
    members: String,
}

impl Acts {
    /// Adds an event; returns its number, from which [`Acts::id`] makes its id.
    fn push(&mut self, stream: &'static str, members: String) -> u64 {
        let number = self.count;
        self.count += 1;
        self.events.push(Act { number, stream, members });
        number
    }

    fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.run)
    }
}

const OUT_OF_ORDER: f64 = 0.03;
const OUT_OF_ORDER_MAX: f64 = 3.0;
const LATE: f64 = 0.001;
const LATE_SECONDS: (f64, f64) = (10.0, 60.0);
const TWICE: f64 = 0.002;

impl Simulator {
    /// The world of `seed` as it begins at `start`.
    pub fn new(kind: Kind, seed: u64, start: Micros) -> Simulator {
        let mut dice = Dice::new(seed ^ (kind as u64 + 1).wrapping_mul(0xd6e8_feb8_6659_fd93));
        let run = format!("sim-{:016x}", Dice::new(dice.bits() ^ start.0 as u64).bits());
        let world = match kind {
            Kind::Venture => World::Venture(market::Market::new(&mut dice, start)),
            Kind::Founder => World::Founder(product::Product::new(&mut dice, start)),
            Kind::Creator => World::Creator(chat::Chat::new(&mut dice, start)),
        };
        let acts = Acts { run, count: 0, events: Vec::new() };
        Simulator { world, dice, next: start, acts, arrivals: 0, on_the_way: BinaryHeap::new() }
    }

    /// Appends to `out` all events that have arrived up to and including `now`, in the order of their arrival.
    pub fn next_until(&mut self, now: Micros, out: &mut Vec<SimEvent>) {
        while self.next <= now {
            self.deliver(self.next, out);
            let at = self.next;
            self.next = match &mut self.world {
                World::Venture(market) => market.act(at, &mut self.dice, &mut self.acts),
                World::Founder(product) => product.act(at, &mut self.dice, &mut self.acts),
                World::Creator(chat) => chat.act(at, &mut self.dice, &mut self.acts),
            };
            assert!(self.next > at, "a world acts in ascending time");
            let mut events = std::mem::take(&mut self.acts.events);
            for act in events.drain(..) {
                self.send(at, &act);
            }
            self.acts.events = events; // keeps its allocation
        }
        self.deliver(now.plus(Span(1)), out);
    }

    /// Puts an event on its way: most arrive as they happen, some after a while, a few twice.
    fn send(&mut self, at: Micros, act: &Act) {
        let Act { number, stream, members } = act;
        let mut line = String::with_capacity(members.len() + 64);
        let written = write!(line, r#"{{"ts":{},"id":"{}-{number}",{members}}}"#, at.0, self.acts.run);
        written.expect("text is written to memory");
        let chance = self.dice.unit();
        let delay = if chance < LATE {
            self.dice.between(LATE_SECONDS.0, LATE_SECONDS.1)
        } else if chance < LATE + OUT_OF_ORDER {
            self.dice.between(0.0, OUT_OF_ORDER_MAX)
        } else {
            0.0
        };
        let arrives = at.plus(seconds(delay));
        if self.dice.chance(TWICE) {
            let again = arrives.plus(seconds(self.dice.between(0.05, 5.0)));
            self.arrive(again, stream, line.clone());
        }
        self.arrive(arrives, stream, line);
    }

    fn arrive(&mut self, at: Micros, stream: &'static str, line: String) {
        let order = self.arrivals;
        self.arrivals += 1;
        self.on_the_way.push(Reverse(Arrival { at, order, stream, line }));
    }

    /// Hands out what arrives before `end`.
    fn deliver(&mut self, end: Micros, out: &mut Vec<SimEvent>) {
        while self.on_the_way.peek().is_some_and(|Reverse(arrival)| arrival.at < end) {
            let Some(Reverse(Arrival { stream, line, .. })) = self.on_the_way.pop() else { return };
            out.push(SimEvent { stream, line });
        }
    }
}

/// A span of so many seconds, at least a microsecond.
fn seconds(seconds: f64) -> Span {
    Span(((seconds * 1e6) as i64).max(1))
}

/// Share of the day that has passed, UTC, in [0, 1).
fn day_share(at: Micros) -> f64 {
    at.0.rem_euclid(86_400_000_000) as f64 / 86_400e6
}

/// 0 is Monday.
fn weekday(at: Micros) -> i64 {
    (at.0.div_euclid(86_400_000_000) + 3).rem_euclid(7)
}

/// A daily wave around 1: highest `1 + height` at hour `peak` UTC, lowest 12 hours later.
fn daily_wave(at: Micros, peak: f64, height: f64) -> f64 {
    1.0 + height * (std::f64::consts::TAU * (day_share(at) - peak / 24.0)).cos()
}

/// Text as a JSON string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
