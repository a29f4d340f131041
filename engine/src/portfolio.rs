//! Positions valued at the last price of their symbol: of a trade, the middle of a quote or the close of a bar.

use crate::checkpoint::{Content, Draft, Owner};
use crate::event::{Micros, StreamName};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Float64Type, TimestampMicrosecondType};
use datafusion_common::Result;
use hashbrown::{DefaultHashBuilder, HashMap};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The last price of a symbol by event time, whichever stream told it; of two at one instant, the one that came later.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Price {
    pub price: f64,
    pub at: Micros,
}

/// Last prices by symbol.
#[derive(Clone, Default, Debug)]
pub struct Prices {
    /// In the order in which the symbols came; none ever goes.
    held: IndexMap<String, Price, DefaultHashBuilder>,
    /// Of each [`SHARE`] of them: it was changed since the last checkpoint.
    changed: Vec<bool>,
}

/// Symbols that are saved together: those that came first, which mostly are those that come often.
pub(crate) const SHARE: usize = 4_096;

/// The most symbols one workspace keeps a last price of.
pub const MAX_SYMBOLS: usize = 200_000;

impl Prices {
    /// What [`Prices::save`] gave.
    pub(crate) fn restored(shares: Vec<HashMap<String, Price>>) -> Prices {
        // where a share but the last is not full, the symbols behind it are now in another one than they are stored in
        let moved = shares.split_last().is_some_and(|(_, full)| full.iter().any(|share| share.len() != SHARE));
        let held: IndexMap<_, _, _> = shares.into_iter().flatten().collect();
        Prices { changed: vec![moved; held.len().div_ceil(SHARE)], held }
    }

    /// A part for each share.
    pub(crate) fn save(&mut self, draft: &mut Draft) -> Result<()> {
        draft.begin(Owner::Prices);
        for (share, changed) in self.changed.iter_mut().enumerate() {
            let from = share * SHARE;
            let of_share = || self.held.get_range(from..self.held.len().min(from + SHARE)).into_iter().flatten();
            draft.put(&share.to_string(), std::mem::take(changed), || {
                Ok(Content::json(&of_share().collect::<BTreeMap<_, _>>()))
            })?;
        }
        Ok(())
    }

    /// Takes in a batch of a market stream; true when there is another price or a newer time of one. Other streams tell no prices.
    pub fn absorb(&mut self, stream: &StreamName, batch: &RecordBatch) -> bool {
        let numbers = |name| batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<Float64Type>());
        let (first, second) = match stream.as_str() {
            "market.trades" => (numbers("price"), None),
            "market.quotes" => (numbers("bid"), numbers("ask")),
            "market.bars" => (numbers("close"), None),
            _ => return false,
        };
        let ts = batch.column_by_name("ts").and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>());
        let symbol = batch.column_by_name("symbol").and_then(|symbol| symbol.as_string_opt::<i32>());
        let (Some(ts), Some(symbol), Some(first)) = (ts, symbol, first) else { return false };
        let price = |row: usize| match second {
            None => first.is_valid(row).then(|| first.value(row)),
            // a side that is zero is not there, so there is no middle
            Some(second) => {
                let sides = [first, second].map(|side| if side.is_valid(row) { side.value(row) } else { 0.0 });
                sides.iter().all(|side| *side > 0.0).then(|| sides[0] / 2.0 + sides[1] / 2.0)
            }
        };
        let mut changed = false;
        let room = MAX_SYMBOLS.saturating_sub(self.held.len());
        let mut added = 0;
        for row in 0..batch.num_rows() {
            let Some(price) = price(row).filter(|_| symbol.is_valid(row)) else { continue };
            let new = Price { price, at: Micros(ts.value(row)) };
            match self.held.get_full_mut(symbol.value(row)) {
                Some((at, _, old)) if new.at >= old.at => {
                    changed |= *old != new;
                    self.changed[at / SHARE] |= *old != new;
                    *old = new;
                }
                Some(_) => {}
                None if added < room => {
                    (changed, added) = (true, added + 1);
                    self.set(symbol.value(row).to_owned(), new);
                }
                None => {}
            }
        }
        changed
    }

    /// Sets the last price of one symbol.
    pub fn set(&mut self, symbol: String, price: Price) {
        let (at, _) = self.held.insert_full(symbol, price);
        self.changed.resize(self.held.len().div_ceil(SHARE), false);
        self.changed[at / SHARE] = true;
    }

    /// The last price of `symbol`; `None` before its first one.
    pub fn get(&self, symbol: &str) -> Option<Price> {
        self.held.get(symbol).copied()
    }
}

/// A holding: `qty` units (negative: short) bought at `cost` each on average, in the portfolio's currency.
#[derive(Clone, PartialEq, Debug)]
pub struct Position {
    pub symbol: String,
    pub qty: f64,
    pub cost: f64,
    pub sector: Option<String>,
}

/// A position at the last price of its symbol; the figures are `None` while none was seen.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Valued {
    pub symbol: String,
    pub qty: f64,
    /// Average price paid per unit.
    pub cost_price: f64,
    pub price: Option<f64>,
    /// `qty · price`; `None` also where that is more than a double holds.
    pub value: Option<f64>,
    /// `qty · cost_price`.
    pub cost: f64,
    /// `value − cost`.
    pub unrealised: Option<f64>,
    /// `100 · unrealised / |cost|`; `None` when the cost is zero.
    pub unrealised_pct: Option<f64>,
    /// Share of the gross value, 0 to 1.
    pub weight: Option<f64>,
    pub sector: Option<String>,
}

/// Shares of the gross value, 0 to 1, that add up to 1.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Allocation {
    pub symbol: BTreeMap<String, f64>,
    pub sector: BTreeMap<String, f64>,
}

/// A portfolio at last prices. Totals cover the priced positions; the others are in `unpriced`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Summary {
    /// Net market value: Σ qty · price.
    pub value: f64,
    /// Σ qty · cost of the priced positions.
    pub cost: f64,
    /// `value − cost`.
    pub unrealised: f64,
    /// `100 · (value − cost) / |cost|`, as of each position: the return on the net amount paid. `None` when that is zero,
    /// as it is for as much sold short as bought.
    pub unrealised_pct: Option<f64>,
    /// Event time of the newest price in it; `None` before the first.
    #[serde(skip)]
    pub as_of: Option<Micros>,
    pub positions: Vec<Valued>,
    pub allocation: Allocation,
    /// Symbols without a price so far.
    pub unpriced: Vec<String>,
}

/// Sector of positions that name none.
const NO_SECTOR: &str = "unclassified";

/// Values `positions` at `prices`. Weights are shares of Σ|value|, so that shorts count too.
pub fn summarise(positions: &[Position], prices: &Prices) -> Summary {
    let mut rows: Vec<Valued> = positions.iter().map(|position| value(position, prices)).collect();
    let gross: f64 = rows.iter().filter_map(|row| row.value).map(f64::abs).sum();
    let mut allocation = Allocation::default();
    for row in &mut rows {
        let Some(value) = row.value else { continue };
        let weight = if gross > 0.0 { value.abs() / gross } else { 0.0 };
        row.weight = Some(weight);
        *allocation.symbol.entry(row.symbol.clone()).or_default() += weight;
        let sector = row.sector.clone().unwrap_or_else(|| NO_SECTOR.to_owned());
        *allocation.sector.entry(sector).or_default() += weight;
    }
    let priced = || rows.iter().filter(|row| row.value.is_some());
    // of no position at all the sum is negative zero
    let value = priced().filter_map(|row| row.value).sum::<f64>() + 0.0;
    let cost = priced().map(|row| row.cost).sum::<f64>() + 0.0;
    Summary {
        value,
        cost,
        unrealised: value - cost,
        unrealised_pct: (cost != 0.0).then(|| 100.0 * (value - cost) / cost.abs()),
        as_of: positions.iter().filter_map(|p| prices.get(&p.symbol)).map(|price| price.at).max(),
        unpriced: rows.iter().filter(|row| row.value.is_none()).map(|row| row.symbol.clone()).collect(),
        allocation,
        positions: rows,
    }
}

fn value(position: &Position, prices: &Prices) -> Valued {
    let price = prices.get(&position.symbol).map(|last| last.price);
    let cost = position.qty * position.cost;
    let value = price.map(|price| position.qty * price).filter(|value| value.is_finite());
    let unrealised = value.map(|value| value - cost);
    Valued {
        symbol: position.symbol.clone(),
        qty: position.qty,
        cost_price: position.cost,
        price,
        value,
        cost,
        unrealised,
        unrealised_pct: unrealised.filter(|_| cost != 0.0).map(|profit| 100.0 * profit / cost.abs()),
        weight: None,
        sector: position.sector.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Ledger, State, opened};
    use arrow::array::{ArrayRef, Float64Array, StringArray, TimestampMicrosecondArray};
    use std::sync::Arc;

    fn position(symbol: &str, qty: f64, cost: f64, sector: Option<&str>) -> Position {
        Position { symbol: symbol.into(), qty, cost, sector: sector.map(Into::into) }
    }

    fn prices(of: &[(&str, f64)]) -> Prices {
        let mut prices = Prices::default();
        of.iter().for_each(|(s, price)| prices.set((*s).to_owned(), Price { price: *price, at: Micros(7) }));
        prices
    }

    #[test]
    fn value_cost_profit_and_allocation_of_a_mixed_portfolio() {
        let held = [
            position("A", 10.0, 90.0, Some("tech")),
            position("B", 5.0, 40.0, Some("energy")),
            position("C", 1.0, 1.0, None),
        ];
        let summary = summarise(&held, &prices(&[("A", 100.0), ("B", 200.0)]));
        assert_eq!((summary.value, summary.cost, summary.unrealised), (2000.0, 1100.0, 900.0));
        assert_eq!(summary.unrealised_pct, Some(100.0 * 900.0 / 1100.0));
        assert_eq!(summary.allocation.symbol["A"], 0.5);
        assert_eq!(summary.allocation.sector["energy"], 0.5);
        assert_eq!(summary.unpriced, ["C"]);
        assert_eq!(summary.as_of, Some(Micros(7)));
    }

    #[test]
    fn a_short_position_gains_when_the_price_falls_and_weighs_by_its_size() {
        let held = [position("A", -10.0, 100.0, None), position("B", 10.0, 90.0, None)];
        let summary = summarise(&held, &prices(&[("A", 90.0), ("B", 90.0)]));
        assert_eq!((summary.value, summary.cost, summary.unrealised), (0.0, -100.0, 100.0));
        assert_eq!(summary.unrealised_pct, Some(100.0), "(0 - -100) / 100");
        assert_eq!(summary.allocation.symbol["A"], 0.5);
    }

    #[test]
    fn an_empty_portfolio_is_worth_nothing_and_has_no_percentage() {
        let summary = summarise(&[], &Prices::default());
        assert_eq!((summary.value, summary.unrealised_pct, summary.as_of), (0.0, None, None));
        let unpriced = summarise(&[position("A", 1.0, 2.0, None)], &Prices::default());
        for zero in [summary.value, summary.cost, unpriced.value, unpriced.cost, unpriced.unrealised] {
            assert!(zero == 0.0 && zero.is_sign_positive());
        }
        assert_eq!(unpriced.unpriced, ["A"]);
        let beyond = summarise(&[position("A", 1e300, 1.0, None)], &prices(&[("A", 1e300)]));
        assert_eq!((beyond.value, beyond.unpriced.len()), (0.0, 1));
    }

    #[test]
    fn trades_quotes_and_bars_tell_prices_and_the_newest_event_time_wins() {
        let mut prices = Prices::default();
        let mut told = |stream: &str, at: i64, columns: &[(&str, f64)]| {
            let ts: ArrayRef = Arc::new(TimestampMicrosecondArray::from(vec![at]).with_timezone("+00:00"));
            let symbol: ArrayRef = Arc::new(StringArray::from(vec!["A"]));
            let values = columns.iter().map(|(name, value)| {
                let value: ArrayRef = Arc::new(Float64Array::from(vec![*value]));
                (*name, value)
            });
            let columns = [("ts", ts), ("symbol", symbol)].into_iter().chain(values);
            let changed = prices.absorb(&stream.parse().unwrap(), &RecordBatch::try_from_iter(columns).unwrap());
            (changed, prices.get("A").map(|price| price.price))
        };
        assert_eq!(told("market.bars", 10, &[("close", 7.0), ("open", 1.0)]), (true, Some(7.0)));
        assert_eq!(told("market.quotes", 20, &[("bid", 8.0), ("ask", 9.0)]), (true, Some(8.5)));
        assert_eq!(told("market.trades", 15, &[("price", 1.0)]), (false, Some(8.5)), "an older one");
        assert_eq!(told("market.quotes", 30, &[("bid", 0.0), ("ask", 9.0)]), (false, Some(8.5)), "one side only");
        assert_eq!(told("market.trades", 20, &[("price", 8.0)]), (true, Some(8.0)), "the same time, later");
        assert_eq!(told("shop.trades", 40, &[("price", 1.0)]), (false, Some(8.0)));
    }

    /// By name.
    type Parts = Vec<(String, BTreeMap<String, Price>)>;

    /// The parts that a checkpoint writes, and what is stored then.
    fn saved(prices: &mut Prices, before: Option<Ledger>) -> (Parts, Ledger) {
        let mut draft = Draft::new(before);
        prices.save(&mut draft).unwrap();
        let (snapshot, ledger) = draft.finish(BTreeMap::new(), Vec::new());
        let mut state = State::default();
        state.apply(snapshot.encode().unwrap());
        let share = |bytes: &[u8]| serde_json::from_slice(opened::<serde::de::IgnoredAny>(bytes).unwrap().1).unwrap();
        (state.parts.iter().map(|(name, bytes)| (name.clone(), share(bytes))).collect(), ledger)
    }

    #[test]
    fn a_checkpoint_has_the_shares_of_the_symbols_that_changed_and_a_restored_one_goes_on_so() {
        let last = |at| Price { price: 1.5, at: Micros(at) };
        let symbol = |at: usize| format!("S{at:05}");
        let mut prices = Prices::default();
        (0..2 * SHARE + 10).for_each(|at| prices.set(symbol(at), last(1)));
        let (whole, ledger) = saved(&mut prices, None);
        assert_eq!(whole.iter().map(|(_, share)| share.len()).collect::<Vec<_>>(), [SHARE, SHARE, 10]);
        prices.set(symbol(SHARE), last(2));
        let (changed, ledger) = saved(&mut prices, Some(ledger));
        assert_eq!(changed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["prices/1"]);
        assert_eq!(changed[0].1[&symbol(SHARE)], last(2));

        let shares = whole.into_iter().map(|(_, share)| share.into_iter().collect());
        let mut restored = Prices::restored(shares.collect());
        restored.set(symbol(2 * SHARE + 10), last(3));
        let (changed, ledger) = saved(&mut restored, Some(ledger));
        assert_eq!(
            changed.iter().map(|(name, share)| (name.as_str(), share.len())).collect::<Vec<_>>(),
            [("prices/2", 11)]
        );
        // shares that are not full are put together anew, and all of them are written
        let few = || HashMap::from([(symbol(0), last(1))]);
        let mut moved = Prices::restored(vec![few(), HashMap::from([(symbol(1), last(1))])]);
        assert_eq!(saved(&mut moved, Some(ledger)).0[0].1.len(), 2);
    }
}
