//! Binance, streams `<symbol>@trade`: spot, and the same shape for its futures.
//! Source: developers.binance.com/docs/binance-spot-api-docs/web-socket-streams.

use super::frame::{Frame, FrameError, Side, Trade, number};
use crate::decode::TsUnit;
use crate::reader::time::instant_of_count;
use serde::Deserialize;
use serde_json::value::RawValue;

/// A frame of the combined stream, or a bare event, or the answer to a request.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    e: Option<&'a RawValue>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    code: i64,
    msg: String,
}

#[derive(Deserialize)]
struct TradeEvent {
    s: String,
    t: u64,
    p: String,
    q: String,
    #[serde(rename = "T")]
    time: i64,
    /// The buyer was the maker.
    m: bool,
}

pub(super) fn subscribe(symbols: &[String]) -> String {
    let stream = |symbol: &String| format!("{}@trade", symbol.to_ascii_lowercase().replace(['-', '/'], ""));
    let streams: Vec<String> = symbols.iter().map(stream).collect();
    serde_json::json!({ "method": "SUBSCRIBE", "params": streams, "id": 1 }).to_string()
}

pub(super) fn parse(text: &str) -> Result<Frame, FrameError> {
    let message: Message = serde_json::from_str(text)?;
    if let Some(Refusal { code, msg }) = message.error {
        return Ok(Frame::Refused(format!("{msg} (code {code})")));
    }
    let (event, kind) = match message.data {
        Some(data) => (data.get(), serde_json::from_str::<Message>(data.get())?.e),
        None => (text, message.e),
    };
    if kind.is_none_or(|kind| kind.get() != r#""trade""#) {
        return Ok(Frame::Other);
    }
    let trade: TradeEvent = serde_json::from_str(event)?;
    Ok(Frame::Trades(vec![Trade {
        key: trade.t.to_string(),
        number: Some(trade.t),
        price: number("p", &trade.p)?,
        qty: number("q", &trade.q)?,
        side: if trade.m { Side::Sell } else { Side::Buy },
        ts: instant_of_count(trade.time, TsUnit::Millis)
            .ok_or_else(|| FrameError::value("T", &trade.time.to_string()))?,
        symbol: trade.s,
    }]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::event::Micros;

    #[test]
    fn a_trade_reads_the_same_bare_and_in_the_combined_stream() {
        let bare = r#"{"e":"trade","E":1723161255343,"s":"BTCUSDT","t":3735683259,"p":"61837.63000000","q":"0.02000000","T":1723161255342,"m":true,"M":true}"#;
        let trade = Trade {
            symbol: "BTCUSDT".into(),
            key: "3735683259".into(),
            number: Some(3_735_683_259),
            price: 61837.63,
            qty: 0.02,
            side: Side::Sell,
            ts: Micros(1_723_161_255_342_000),
        };
        assert_eq!(parse(bare).unwrap(), Frame::Trades(vec![trade.clone()]));
        let combined = format!(r#"{{"stream":"btcusdt@trade","data":{bare}}}"#);
        assert_eq!(parse(&combined).unwrap(), Frame::Trades(vec![trade]));
    }

    #[test]
    fn answers_and_other_streams_are_no_trades() {
        assert_eq!(parse(r#"{"result":null,"id":1}"#).unwrap(), Frame::Other);
        let book = r#"{"stream":"btcusdt@bookTicker","data":{"u":1,"s":"BTCUSDT","b":"1","B":"1","a":"2","A":"1"}}"#;
        assert_eq!(parse(book).unwrap(), Frame::Other);
        let refusal = r#"{"error":{"code":2,"msg":"Invalid request"},"id":1}"#;
        assert_eq!(parse(refusal).unwrap(), Frame::Refused("Invalid request (code 2)".into()));
    }

    #[test]
    fn a_subscription_names_streams_as_binance_does() {
        assert!(
            subscribe(&["BTC-USDT".into(), "btcusd_perp".into()]).contains(r#"["btcusdt@trade","btcusd_perp@trade"]"#)
        );
    }
}
