//! Prices, quotes and trades. Log prices follow a common market factor and their own way around their level;
//! volatility comes in clusters (its logarithm reverts to its mean), prices jump now and then, and a busy
//! symbol stays busy for a while.

use super::dice::Dice;
use super::{Acts, daily_wave, day_share, seconds, weekday};
use engine::event::Micros;

struct Listing {
    symbol: &'static str,
    venue: &'static str,
    /// USD, about where it stood in early 2026.
    level: f64,
    /// Volatility a year, and how much of the market's move it takes.
    volatility: f64,
    beta: f64,
    /// Share of events.
    weight: f64,
    tick: f64,
    /// Decimals of the price and of the quantity.
    decimals: (usize, usize),
    /// Spread in basis points of the price.
    spread: f64,
    /// Median quantity of a trade.
    qty: f64,
}

#[rustfmt::skip]
const LISTINGS: [Listing; 16] = [
    stock("SPY",   "ARCX", 688.0, 0.16, 1.0, 1.4, 0.2, 120.0),
    stock("QQQ",   "XNAS", 622.0, 0.21, 1.2, 1.2, 0.2, 100.0),
    stock("AAPL",  "XNAS", 262.0, 0.26, 1.1, 1.2, 0.5, 90.0),
    stock("MSFT",  "XNAS", 478.0, 0.24, 1.0, 1.0, 0.5, 60.0),
    stock("NVDA",  "XNAS", 187.0, 0.45, 1.8, 1.8, 0.6, 140.0),
    stock("AMZN",  "XNAS", 236.0, 0.31, 1.3, 1.1, 0.6, 80.0),
    stock("GOOGL", "XNAS", 316.0, 0.29, 1.1, 1.0, 0.6, 70.0),
    stock("META",  "XNAS", 655.0, 0.34, 1.3, 0.9, 0.7, 40.0),
    stock("TSLA",  "XNAS", 438.0, 0.58, 1.9, 1.6, 0.9, 90.0),
    stock("AVGO",  "XNAS", 345.0, 0.46, 1.7, 0.7, 1.1, 50.0),
    stock("JPM",   "XNYS", 325.0, 0.23, 0.9, 0.6, 0.8, 50.0),
    stock("XOM",   "XNYS", 121.0, 0.24, 0.6, 0.6, 0.8, 90.0),
    coin("BTC-USD", 91_200.0, 0.52, 1.4, 2.0, 0.4, 0.01, (2, 6), 0.012),
    coin("ETH-USD",  3_120.0, 0.68, 1.7, 1.5, 0.6, 0.01, (2, 5), 0.35),
    coin("SOL-USD",    138.0, 0.85, 1.9, 1.1, 1.2, 0.01, (2, 4), 8.0),
    coin("XRP-USD",      2.1, 0.80, 1.6, 0.9, 1.8, 0.0001, (4, 2), 420.0),
];

#[rustfmt::skip]
#[expect(clippy::too_many_arguments, reason = "a row of the table above")]
const fn stock(
    symbol: &'static str, venue: &'static str, level: f64, volatility: f64, beta: f64, weight: f64, spread: f64, qty: f64,
) -> Listing {
    Listing { symbol, venue, level, volatility, beta, weight, tick: 0.01, decimals: (2, 0), spread, qty }
}

#[rustfmt::skip]
#[expect(clippy::too_many_arguments, reason = "a row of the table above")]
const fn coin(
    symbol: &'static str, level: f64, volatility: f64, beta: f64, weight: f64, spread: f64, tick: f64,
    decimals: (usize, usize), qty: f64,
) -> Listing {
    Listing { symbol, venue: "COIN", level, volatility, beta, weight, tick, decimals, spread, qty }
}

impl Listing {
    fn is_coin(&self) -> bool {
        self.decimals.1 > 0
    }

    /// The part of its volatility that the market's moves do not explain, a third of it at least.
    fn own_volatility(&self) -> f64 {
        let market = self.beta * MARKET_VOLATILITY;
        (self.volatility.powi(2) - market.powi(2)).max(0.0).sqrt().max(self.volatility / 3.0)
    }
}

const YEAR_SECONDS: f64 = 365.0 * 86_400.0;
/// Events a second when nothing special happens.
const PACE: f64 = 65.0;
/// The market factor's volatility a year.
const MARKET_VOLATILITY: f64 = 0.14;
/// Seconds in which a price forgets half of its distance from its level: two days.
const LEVEL_HALF_LIFE: f64 = 2.0 * 86_400.0;
/// The same for the logarithm of volatility: 15 minutes. And how far it swings.
const CLUSTER_HALF_LIFE: f64 = 900.0;
const CLUSTER_SPREAD: f64 = 0.55;
/// Jumps a day of each symbol, and their usual size as a share of the symbol's volatility a year.
const JUMPS_A_DAY: f64 = 3.0;
const JUMP: f64 = 0.02;
/// Bursts a day of each symbol; while one lasts, a symbol has this many times its events.
const BURSTS_A_DAY: f64 = 60.0;
const BURST_SECONDS: f64 = 12.0;
const BURST_FACTOR: f64 = 5.0;

pub(super) struct Market {
    /// The market factor: a log return around 0.
    factor: f64,
    moved: Micros,
    symbols: Vec<Symbol>,
}

struct Symbol {
    listing: &'static Listing,
    /// Log distance from the level, apart from the market's share.
    own: f64,
    /// Logarithm of volatility over its mean.
    heat: f64,
    moved: Micros,
    burst_until: Micros,
}

impl Market {
    pub fn new(dice: &mut Dice, start: Micros) -> Market {
        let symbol = |listing| Symbol {
            listing,
            own: 0.01 * dice.normal(),
            heat: CLUSTER_SPREAD * dice.normal(),
            moved: start,
            burst_until: start,
        };
        let symbols = LISTINGS.iter().map(symbol).collect();
        Market { factor: 0.0, moved: start, symbols }
    }

    /// One trade or quote; returns when the next one comes.
    pub fn act(&mut self, at: Micros, dice: &mut Dice, acts: &mut Acts) -> Micros {
        let dt = elapsed(&mut self.moved, at);
        let shock = MARKET_VOLATILITY * (dt / YEAR_SECONDS).sqrt() * dice.normal();
        self.factor = self.factor * half_life(dt, LEVEL_HALF_LIFE) + shock;

        let hours = Hours::at(at);
        let weights: [f64; LISTINGS.len()] = std::array::from_fn(|i| self.symbols[i].activity(at, &hours));
        let activity: f64 = weights.iter().sum();
        let index = dice.weighted(weights.iter().copied());
        let normal_activity: f64 = LISTINGS.iter().map(|listing| listing.weight).sum();
        let symbol = &mut self.symbols[index];
        symbol.step(at, dice);
        let quote = symbol.quote(self.factor);
        if dice.chance(0.45) {
            acts.push("market.trades", symbol.trade(&quote, dice));
        } else {
            acts.push("market.quotes", symbol.quote_members(&quote, dice));
        }
        at.plus(seconds(dice.exponential(normal_activity / activity / PACE)))
    }
}

/// How busy this time of the week is, 1 being normal.
struct Hours {
    stocks: f64,
    coins: f64,
}

impl Hours {
    /// Stocks trade most between 13:30 and 20:00 UTC on weekdays, coins always.
    fn at(at: Micros) -> Hours {
        let hour = day_share(at) * 24.0;
        let stocks = match (weekday(at) >= 5, (13.5..20.0).contains(&hour)) {
            (true, _) => 0.5,
            (false, false) => 0.7,
            // busiest at the open and at the close
            (false, true) => 0.95 + 0.35 * ((hour - 16.75) / 3.25).powi(2),
        };
        Hours { stocks, coins: daily_wave(at, 15.0, 0.2) }
    }
}

struct Quote {
    bid: f64,
    ask: f64,
}

impl Symbol {
    /// Weight of this symbol among the others now.
    fn activity(&self, at: Micros, hours: &Hours) -> f64 {
        let usual = if self.listing.is_coin() { hours.coins } else { hours.stocks };
        let burst = if at < self.burst_until { BURST_FACTOR } else { 1.0 };
        self.listing.weight * usual * burst
    }

    /// Moves the price on to `at`.
    fn step(&mut self, at: Micros, dice: &mut Dice) {
        let dt = elapsed(&mut self.moved, at);
        let keep = half_life(dt, CLUSTER_HALF_LIFE);
        self.heat = self.heat * keep + CLUSTER_SPREAD * (1.0 - keep * keep).sqrt() * dice.normal();
        let volatility = self.listing.own_volatility() * self.heat.exp();
        self.own = self.own * half_life(dt, LEVEL_HALF_LIFE) + volatility * (dt / YEAR_SECONDS).sqrt() * dice.normal();
        let days = dt / 86_400.0;
        if dice.chance(JUMPS_A_DAY * days) {
            self.own += JUMP * self.listing.volatility * dice.normal();
            self.heat += 1.0;
            self.burst_until = at.plus(seconds(dice.exponential(3.0 * BURST_SECONDS)));
        } else if dice.chance(BURSTS_A_DAY * days) {
            self.burst_until = at.plus(seconds(dice.exponential(BURST_SECONDS)));
        }
    }

    /// Bid and ask around the price, on the tick and never crossed.
    fn quote(&self, factor: f64) -> Quote {
        let listing = self.listing;
        let price = listing.level * (self.own + listing.beta * factor).exp();
        let half = 0.5e-4 * listing.spread * price * (0.5 * self.heat).exp();
        let bid = ((price - half) / listing.tick).floor().max(1.0);
        let ask = ((price + half) / listing.tick).ceil().max(bid + 1.0);
        Quote { bid: bid * listing.tick, ask: ask * listing.tick }
    }

    fn trade(&self, quote: &Quote, dice: &mut Dice) -> String {
        let Listing { symbol, venue, decimals: (price_decimals, _), .. } = *self.listing;
        let (side, price) = if dice.chance(0.5) { ("buy", quote.ask) } else { ("sell", quote.bid) };
        let qty = self.qty(dice, 1.0);
        format!(r#""symbol":"{symbol}","price":{price:.price_decimals$},"qty":{qty},"side":"{side}","venue":"{venue}""#)
    }

    fn quote_members(&self, quote: &Quote, dice: &mut Dice) -> String {
        let Listing { symbol, venue, decimals: (price_decimals, _), .. } = *self.listing;
        let (bid_qty, ask_qty) = (self.qty(dice, 4.0), self.qty(dice, 4.0));
        let Quote { bid, ask } = quote;
        format!(
            r#""symbol":"{symbol}","bid":{bid:.price_decimals$},"ask":{ask:.price_decimals$},"bid_qty":{bid_qty},"ask_qty":{ask_qty},"venue":"{venue}""#
        )
    }

    /// Stocks trade in whole shares, two of three times in round lots.
    fn qty(&self, dice: &mut Dice, factor: f64) -> String {
        let decimals = self.listing.decimals.1;
        let qty = dice.log_normal(self.listing.qty * factor, 1.1);
        if self.listing.is_coin() {
            let smallest = 10f64.powi(-(decimals as i32));
            return format!("{:.decimals$}", qty.max(smallest));
        }
        let shares = if dice.chance(0.66) { (qty / 100.0).ceil() * 100.0 } else { qty.ceil() };
        format!("{shares:.0}")
    }
}

/// Seconds since `moved`, which becomes `at`.
fn elapsed(moved: &mut Micros, at: Micros) -> f64 {
    at.since(std::mem::replace(moved, at)).0 as f64 / 1e6
}

/// What is left after `dt` seconds of something that halves in `half_life` seconds.
fn half_life(dt: f64, half_life: f64) -> f64 {
    (-dt / half_life).exp2()
}
