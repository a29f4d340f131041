//! Kraken, channel `trade`, in both versions of its protocol: objects with trade ids (v2), and arrays without (v1).
//! Source: docs.kraken.com/api/docs/websocket-v2/trade and /websocket-v1/trade.

use super::frame::{Frame, FrameError, Side, Trade, number};
use crate::decode::TsUnit;
use crate::reader::time::{instant_of_number, instant_of_text};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
struct Message<'a> {
    channel: Option<String>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    success: Option<bool>,
    error: Option<String>,
    /// v1
    #[serde(rename = "errorMessage")]
    error_message: Option<String>,
}

#[derive(Deserialize)]
struct TradeV2 {
    symbol: String,
    side: String,
    price: f64,
    qty: f64,
    trade_id: u64,
    timestamp: String,
}

/// After a reconnect the snapshot of the newest trades fills what a short gap has missed.
pub(super) fn subscribe_v2(symbols: &[String]) -> String {
    let pairs: Vec<String> = symbols.iter().map(|symbol| pair(symbol).replace("XBT", "BTC")).collect();
    let params = serde_json::json!({ "channel": "trade", "symbol": pairs, "snapshot": true });
    serde_json::json!({ "method": "subscribe", "params": params }).to_string()
}

pub(super) fn subscribe_v1(symbols: &[String]) -> String {
    let pairs: Vec<String> = symbols.iter().map(|symbol| pair(symbol).replace("BTC", "XBT")).collect();
    serde_json::json!({ "event": "subscribe", "pair": pairs, "subscription": { "name": "trade" } }).to_string()
}

fn pair(symbol: &str) -> String {
    symbol.to_ascii_uppercase().replace('-', "/")
}

pub(super) fn parse(text: &str) -> Result<Frame, FrameError> {
    if text.trim_start().starts_with('[') {
        return parse_v1(text);
    }
    let message: Message = serde_json::from_str(text)?;
    if let Some(error) = message.error_message.or(message.error.filter(|_| message.success == Some(false))) {
        return Ok(Frame::Refused(error));
    }
    match (message.channel.as_deref(), message.data) {
        (Some("trade"), Some(data)) => {
            let trades: Vec<TradeV2> = serde_json::from_str(data.get())?;
            Ok(Frame::Trades(trades.into_iter().map(TradeV2::into_trade).collect::<Result<_, _>>()?))
        }
        _ => Ok(Frame::Other),
    }
}

impl TradeV2 {
    fn into_trade(self) -> Result<Trade, FrameError> {
        Ok(Trade {
            key: self.trade_id.to_string(),
            number: Some(self.trade_id),
            price: self.price,
            qty: self.qty,
            side: side(&self.side)?,
            ts: instant_of_text(&self.timestamp).ok_or_else(|| FrameError::value("timestamp", &self.timestamp))?,
            symbol: self.symbol,
        })
    }
}

/// `[channel, [[price, volume, time, side, type, misc], …], "trade", pair]`
fn parse_v1(text: &str) -> Result<Frame, FrameError> {
    let parts: Vec<&RawValue> = serde_json::from_str(text)?;
    let [_, trades, channel, pair] = parts[..] else { return Ok(Frame::Other) };
    if channel.get() != r#""trade""# {
        return Ok(Frame::Other);
    }
    let symbol: String = serde_json::from_str(pair.get())?;
    let rows: Vec<Vec<String>> = serde_json::from_str(trades.get())?;
    let mut trades: Vec<Trade> = Vec::with_capacity(rows.len());
    for row in rows {
        let [price, volume, time, taker, ..] = &row[..] else {
            return Err(FrameError::value("trade", &row.join(",")));
        };
        // v1 numbers no trades: what it says about one tells it apart, and in one frame the count of equal ones.
        let mut key = format!("{time}-{price}-{volume}-{taker}");
        let equal = trades.iter().filter(|trade| trade.key.starts_with(&key)).count();
        if equal > 0 {
            key = format!("{key}-{}", equal + 1);
        }
        trades.push(Trade {
            symbol: symbol.clone(),
            key,
            number: None,
            price: number("price", price)?,
            qty: number("volume", volume)?,
            side: side(taker)?,
            ts: instant_of_number(time, TsUnit::Seconds).ok_or_else(|| FrameError::value("time", time))?,
        });
    }
    Ok(Frame::Trades(trades))
}

fn side(text: &str) -> Result<Side, FrameError> {
    match text {
        "b" | "buy" => Ok(Side::Buy),
        "s" | "sell" => Ok(Side::Sell),
        other => Err(FrameError::value("side", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::event::Micros;

    #[test]
    fn an_object_of_v2_holds_numbered_trades() {
        let text = r#"{"channel":"trade","type":"update","data":[{"symbol":"MATIC/USD","side":"sell","price":0.5117,"qty":40.0,"ord_type":"market","trade_id":4665906,"timestamp":"2023-09-25T07:49:37.708706Z"}]}"#;
        let trade = Trade {
            symbol: "MATIC/USD".into(),
            key: "4665906".into(),
            number: Some(4_665_906),
            price: 0.5117,
            qty: 40.0,
            side: Side::Sell,
            ts: Micros(1_695_628_177_708_706),
        };
        assert_eq!(parse(text).unwrap(), Frame::Trades(vec![trade]));
        assert_eq!(parse(r#"{"channel":"heartbeat"}"#).unwrap(), Frame::Other);
    }

    #[test]
    fn equal_trades_in_an_array_of_v1_have_different_ids() {
        let text = r#"[993,[["354.04","0.28","1618678150.826417","s","m",""],["354.04","0.28","1618678150.826417","s","m",""],["353.81","1.7","1618678150.827816","b","m",""]],"trade","XMR/USD"]"#;
        let Frame::Trades(trades) = parse(text).unwrap() else { panic!("these are trades") };
        let keys: Vec<&str> = trades.iter().map(|trade| trade.key.as_str()).collect();
        let first = "1618678150.826417-354.04-0.28-s";
        assert_eq!(keys, [first, &format!("{first}-2"), "1618678150.827816-353.81-1.7-b"]);
        assert_eq!(trades[0].ts, Micros(1_618_678_150_826_417));
        assert_eq!((trades[1].side, trades[2].side), (Side::Sell, Side::Buy));
    }

    #[test]
    fn a_refusal_is_told_in_the_words_of_the_exchange() {
        let v2 = r#"{"error":"Currency pair not supported FOO/USD","method":"subscribe","success":false}"#;
        assert_eq!(parse(v2).unwrap(), Frame::Refused("Currency pair not supported FOO/USD".into()));
        let v1 = r#"{"errorMessage":"Currency pair not supported","event":"subscriptionStatus","status":"error"}"#;
        assert_eq!(parse(v1).unwrap(), Frame::Refused("Currency pair not supported".into()));
    }

    #[test]
    fn each_version_names_bitcoin_its_own_way() {
        assert!(subscribe_v2(&["xbt-usd".into()]).contains(r#""symbol":["BTC/USD"]"#));
        assert!(subscribe_v1(&["BTC-USD".into()]).contains(r#""pair":["XBT/USD"]"#));
    }
}
