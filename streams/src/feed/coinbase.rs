//! Coinbase Exchange, channels `matches` and `heartbeat`.
//! Source: docs.cdp.coinbase.com/exchange/websocket-feed/channels.

use super::frame::{Frame, FrameError, Side, Trade, number};
use crate::reader::time::instant_of_text;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Message {
    Match(Match),
    /// The newest trade before the subscription: after a reconnect it shows at once whether trades are missing.
    LastMatch(Match),
    Error {
        message: String,
        reason: Option<String>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Match {
    trade_id: u64,
    product_id: String,
    price: String,
    size: String,
    side: String,
    time: String,
}

pub(super) fn subscribe(symbols: &[String]) -> String {
    let products: Vec<String> = symbols.iter().map(|s| s.to_ascii_uppercase().replace('/', "-")).collect();
    serde_json::json!({ "type": "subscribe", "product_ids": products, "channels": ["matches", "heartbeat"] })
        .to_string()
}

pub(super) fn parse(text: &str) -> Result<Frame, FrameError> {
    Ok(match serde_json::from_str(text)? {
        Message::Match(trade) | Message::LastMatch(trade) => Frame::Trades(vec![trade.into_trade()?]),
        Message::Error { message, reason } => Frame::Refused(format!("{message} {}", reason.unwrap_or_default())),
        Message::Other => Frame::Other,
    })
}

impl Match {
    fn into_trade(self) -> Result<Trade, FrameError> {
        // Coinbase tells the side of the maker; the taker is on the other one.
        let side = match self.side.as_str() {
            "buy" => Side::Sell,
            "sell" => Side::Buy,
            other => return Err(FrameError::value("side", other)),
        };
        Ok(Trade {
            key: self.trade_id.to_string(),
            number: Some(self.trade_id),
            price: number("price", &self.price)?,
            qty: number("size", &self.size)?,
            side,
            ts: instant_of_text(&self.time).ok_or_else(|| FrameError::value("time", &self.time))?,
            symbol: self.product_id,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::event::Micros;

    #[test]
    fn a_match_is_a_trade_on_the_side_of_the_taker() {
        let text = r#"{"type":"match","trade_id":280232,"maker_order_id":"2a0d","taker_order_id":"3c82","side":"sell","size":"985","price":"0.00001305","product_id":"SKL-BTC","sequence":177100030,"time":"2021-04-17T16:43:37.089723Z"}"#;
        let trade = Trade {
            symbol: "SKL-BTC".into(),
            key: "280232".into(),
            number: Some(280_232),
            price: 0.00001305,
            qty: 985.0,
            side: Side::Buy,
            ts: Micros(1_618_677_817_089_723),
        };
        assert_eq!(parse(text).unwrap(), Frame::Trades(vec![trade.clone()]));
        assert_eq!(parse(&text.replace("match\"", "last_match\"")).unwrap(), Frame::Trades(vec![trade]));
        assert!(parse(&text.replace("985", "many")).unwrap_err().to_string().contains("`many` as its size"));
    }

    #[test]
    fn a_refusal_is_told_in_the_words_of_the_exchange() {
        let text = r#"{"type":"error","message":"Failed to subscribe","reason":"FOO-USD is not a valid product"}"#;
        let refused = Frame::Refused("Failed to subscribe FOO-USD is not a valid product".into());
        assert_eq!(parse(text).unwrap(), refused);
        assert_eq!(parse(r#"{"type":"heartbeat","sequence":90,"last_trade_id":20}"#).unwrap(), Frame::Other);
    }

    #[test]
    fn a_subscription_names_products_as_coinbase_does() {
        let expected = r#"{"channels":["matches","heartbeat"],"product_ids":["BTC-USD"],"type":"subscribe"}"#;
        assert_eq!(subscribe(&["btc/usd".into()]), expected);
    }
}
