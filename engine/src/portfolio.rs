//! Positions valued at the last traded price.

use crate::event::Micros;
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Float64Type, TimestampMicrosecondType};
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The last trade of a symbol by event time; of two at one instant, the one that came later.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Price {
    pub price: f64,
    pub at: Micros,
}

/// Last prices by symbol.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Prices(HashMap<String, Price>);

/// The most symbols one workspace keeps a last price of.
pub const MAX_SYMBOLS: usize = 200_000;

impl Prices {
    /// Takes in a batch of `market.trades`; true when a price changed.
    pub fn absorb(&mut self, trades: &RecordBatch) -> bool {
        let column = |name| trades.column_by_name(name);
        let (Some(ts), Some(symbol), Some(price)) = (column("ts"), column("symbol"), column("price")) else {
            return false;
        };
        let (Some(ts), Some(symbol), Some(price)) = (
            ts.as_primitive_opt::<TimestampMicrosecondType>(),
            symbol.as_string_opt::<i32>(),
            price.as_primitive_opt::<Float64Type>(),
        ) else {
            return false;
        };
        let mut changed = false;
        let room = MAX_SYMBOLS.saturating_sub(self.0.len());
        let mut added = 0;
        for row in 0..trades.num_rows() {
            if symbol.is_null(row) || price.is_null(row) {
                continue;
            }
            let new = Price { price: price.value(row), at: Micros(ts.value(row)) };
            match self.0.get_mut(symbol.value(row)) {
                Some(old) if new.at >= old.at => {
                    changed |= old.price != new.price;
                    *old = new;
                }
                Some(_) => {}
                None if added < room => {
                    (changed, added) = (true, added + 1);
                    self.0.insert(symbol.value(row).to_owned(), new);
                }
                None => {}
            }
        }
        changed
    }

    /// Sets the last price of one symbol.
    pub fn set(&mut self, symbol: String, price: Price) {
        self.0.insert(symbol, price);
    }

    /// The last price of `symbol`; `None` before its first trade.
    pub fn get(&self, symbol: &str) -> Option<Price> {
        self.0.get(symbol).copied()
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

/// A position at the last price of its symbol; the figures are `None` while no trade was seen.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Valued {
    pub symbol: String,
    pub qty: f64,
    /// Average price paid per unit.
    pub cost_price: f64,
    pub price: Option<f64>,
    /// `qty · price`.
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
    /// `100 · unrealised / Σ|cost|`; `None` when that is zero.
    pub unrealised_pct: Option<f64>,
    /// Event time of the newest price in it; `None` before the first.
    #[serde(skip)]
    pub as_of: Option<Micros>,
    pub positions: Vec<Valued>,
    pub allocation: Allocation,
    /// Symbols without a trade so far.
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
    let value: f64 = priced().filter_map(|row| row.value).sum();
    let cost: f64 = priced().map(|row| row.cost).sum();
    let paid: f64 = priced().map(|row| row.cost.abs()).sum();
    Summary {
        value,
        cost,
        unrealised: value - cost,
        unrealised_pct: (paid > 0.0).then(|| 100.0 * (value - cost) / paid),
        as_of: positions.iter().filter_map(|p| prices.get(&p.symbol)).map(|price| price.at).max(),
        unpriced: rows.iter().filter(|row| row.value.is_none()).map(|row| row.symbol.clone()).collect(),
        allocation,
        positions: rows,
    }
}

fn value(position: &Position, prices: &Prices) -> Valued {
    let price = prices.get(&position.symbol).map(|last| last.price);
    let cost = position.qty * position.cost;
    let value = price.map(|price| position.qty * price);
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

    fn position(symbol: &str, qty: f64, cost: f64, sector: Option<&str>) -> Position {
        Position { symbol: symbol.into(), qty, cost, sector: sector.map(Into::into) }
    }

    fn prices(of: &[(&str, f64)]) -> Prices {
        Prices(of.iter().map(|(s, price)| ((*s).to_owned(), Price { price: *price, at: Micros(7) })).collect())
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
        assert_eq!((summary.value, summary.unrealised), (0.0, 100.0));
        assert_eq!(summary.allocation.symbol["A"], 0.5);
    }

    #[test]
    fn an_empty_portfolio_is_worth_nothing_and_has_no_percentage() {
        let summary = summarise(&[], &Prices::default());
        assert_eq!((summary.value, summary.unrealised_pct, summary.as_of), (0.0, None, None));
    }
}
