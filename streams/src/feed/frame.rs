//! What exchanges say, in one vocabulary.

use super::{binance, coinbase, kraken};
use engine::event::Micros;
use std::io::Write;

/// An exchange whose public trades need no account.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Feed {
    Coinbase,
    Kraken,
    Binance,
}

/// A feed nobody knows.
#[derive(Debug, thiserror::Error)]
#[error("feed `{0}` is none of coinbase, kraken, binance")]
pub struct UnknownFeed(String);

impl std::str::FromStr for Feed {
    type Err = UnknownFeed;
    fn from_str(text: &str) -> Result<Self, UnknownFeed> {
        Ok(match text {
            "coinbase" => Feed::Coinbase,
            "kraken" => Feed::Kraken,
            "binance" => Feed::Binance,
            _ => return Err(UnknownFeed(text.to_owned())),
        })
    }
}

impl Feed {
    /// The name in `venue` and at the front of event ids.
    pub fn name(self) -> &'static str {
        match self {
            Feed::Coinbase => "coinbase",
            Feed::Kraken => "kraken",
            Feed::Binance => "binance",
        }
    }

    /// Where the exchange serves its public trades.
    pub fn url(self) -> &'static str {
        match self {
            Feed::Coinbase => "wss://ws-feed.exchange.coinbase.com",
            Feed::Kraken => "wss://ws.kraken.com/v2",
            Feed::Binance => "wss://stream.binance.com:9443/stream",
        }
    }

    /// The frame that asks for the trades of `symbols`, each written as `BTC-USD`, `BTC/USD` or as the exchange
    /// writes it. Kraken's first version is spoken to a `url` that does not end in `/v2`.
    pub fn subscribe(self, url: &str, symbols: &[String]) -> String {
        match self {
            Feed::Coinbase => coinbase::subscribe(symbols),
            Feed::Kraken if url.trim_end_matches('/').ends_with("/v2") => kraken::subscribe_v2(symbols),
            Feed::Kraken => kraken::subscribe_v1(symbols),
            Feed::Binance => binance::subscribe(symbols),
        }
    }

    /// Understands one text frame. Pure; never panics, whatever the exchange sends.
    pub fn parse(self, text: &str) -> Result<Frame, FrameError> {
        match self {
            Feed::Coinbase => coinbase::parse(text),
            Feed::Kraken => kraken::parse(text),
            Feed::Binance => binance::parse(text),
        }
    }
}

/// One frame of an exchange.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    Trades(Vec<Trade>),
    /// The exchange refuses something, in its words.
    Refused(String),
    /// Heartbeats, acknowledgements and channels that were not asked for.
    Other,
}

/// Who crossed the spread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Buy,
    Sell,
}

/// One public trade.
#[derive(Clone, Debug, PartialEq)]
pub struct Trade {
    /// As the exchange writes it.
    pub symbol: String,
    /// The trade's own part of its id: its number, or what tells it apart where the exchange gives none.
    pub key: String,
    /// Its place in the symbol's unbroken numbering, where there is one.
    pub number: Option<u64>,
    pub price: f64,
    pub qty: f64,
    /// The side of the taker.
    pub side: Side,
    pub ts: Micros,
}

/// Why a frame could not be understood.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("frame is not what this exchange sends: {0}")]
    Shape(#[from] serde_json::Error),
    #[error("frame has `{text}` as its {field}")]
    Value { field: &'static str, text: String },
}

impl FrameError {
    pub(super) fn value(field: &'static str, text: &str) -> FrameError {
        FrameError::Value { field, text: text.chars().take(80).collect() }
    }
}

/// A price or quantity sent as text: a finite number.
pub(super) fn number(field: &'static str, text: &str) -> Result<f64, FrameError> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| FrameError::value(field, text))
}

impl Trade {
    /// The event of `market.trades`, one NDJSON line without its line break; `ts` in microseconds. `symbol` is the
    /// name that the workspace uses. The id is the same whenever the exchange sends the trade again.
    pub fn event(&self, feed: Feed, symbol: &str) -> String {
        let mut line = Vec::with_capacity(160);
        let side = if self.side == Side::Buy { "buy" } else { "sell" };
        let id = format!("{}-{}-{}", feed.name(), self.symbol, self.key);
        let written = write!(
            line,
            r#"{{"ts":{},"id":{},"symbol":{},"price":{},"qty":{},"side":"{side}","venue":"{}"}}"#,
            self.ts.0,
            serde_json::Value::from(id),
            serde_json::Value::from(symbol),
            serde_json::Value::from(self.price),
            serde_json::Value::from(self.qty),
            feed.name(),
        );
        written.expect("text is written to memory");
        String::from_utf8(line).expect("JSON is UTF-8")
    }
}

/// The same for all spellings of a symbol: `BTC-USD`, `btc/usd`, `XBT/USD` and `BTCUSD` are one.
pub(super) fn symbol_key(symbol: &str) -> String {
    let bare: String = symbol.chars().filter(|c| !matches!(c, '-' | '/')).map(|c| c.to_ascii_uppercase()).collect();
    bare.replace("XBT", "BTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trade_is_an_event_of_the_contract() {
        let trade = Trade {
            symbol: "XBT/USD".into(),
            key: "17".into(),
            number: Some(17),
            price: 61837.63,
            qty: 2e-7,
            side: Side::Sell,
            ts: Micros(1_723_161_255_342_000),
        };
        let event = r#"{"ts":1723161255342000,"id":"kraken-XBT/USD-17","symbol":"BTC-USD","price":61837.63,"qty":2e-7,"side":"sell","venue":"kraken"}"#;
        assert_eq!(trade.event(Feed::Kraken, "BTC-USD"), event);
    }

    #[test]
    fn all_spellings_of_a_symbol_are_one() {
        for spelling in ["BTC-USD", "btc/usd", "XBT/USD", "BTCUSD", "btcusd"] {
            assert_eq!(symbol_key(spelling), "BTCUSD");
        }
        assert_eq!(symbol_key("BTCUSD_PERP"), "BTCUSD_PERP");
    }

    #[test]
    fn frames_that_no_exchange_sends_are_errors_and_no_panics() {
        let strange =
            ["", "null", "7", "[]", "{", "[1,2]", "{\"type\":7}", "\u{0}", "[[[[", "{\"data\":{\"e\":\"trade\"}}"];
        for feed in [Feed::Coinbase, Feed::Kraken, Feed::Binance] {
            for text in strange {
                if let Ok(frame) = feed.parse(text) {
                    assert_eq!(frame, Frame::Other, "{} {text}", feed.name());
                }
            }
        }
    }
}
