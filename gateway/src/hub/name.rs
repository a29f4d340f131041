//! Names of channels: `metrics/vwap_1m?symbol=AAPL`.

use crate::problem::Problem;
use engine::event::{ItemName, StreamName};
use std::sync::Arc;

/// What a channel tells of.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Topic {
    Metric(ItemName),
    Portfolio(ItemName),
    /// A portfolio without its positions, which goes by the same name: for those who may see no more of it.
    Value(ItemName),
    Stream(StreamName),
    Alerts,
    /// A conversation with agents.
    Thread(String),
    /// A live query of one connection.
    Query {
        connection: u64,
        name: String,
    },
    /// Who follows another channel of the workspace.
    Presence(Box<Topic>),
    Throughput,
    Actors,
}

/// A channel as a client names it.
#[derive(Clone, Debug)]
pub(crate) struct ChannelName {
    /// As the client wrote it, which is how it comes back.
    pub(crate) text: Arc<str>,
    pub(crate) topic: Topic,
    /// Columns and the value each must have: as the client wrote it, of a channel that is open as the column shows it.
    pub(crate) filter: Vec<(String, String)>,
}

const NAME_BYTES_MAX: usize = 512;

impl ChannelName {
    /// `connection` is whose live queries `query/…` are.
    pub(crate) fn parse(text: &str, connection: u64) -> Result<ChannelName, Problem> {
        let shown: String = text.chars().take(80).collect();
        let unknown = || {
            let known = "metrics/NAME, portfolio/ID, streams/NAME, alerts, thread/ID, query/NAME, presence/CHANNEL, \
                system/throughput, system/actors";
            Problem::not_found("unknown_channel", format!("there is no channel `{shown}`; there are {known}"))
        };
        if text.len() > NAME_BYTES_MAX {
            return Err(unknown());
        }
        let (path, query) = text.split_once('?').unwrap_or((text, ""));
        let topic = match path.split_once('/') {
            None if path == "alerts" => Topic::Alerts,
            Some(("metrics", name)) => Topic::Metric(name.parse()?),
            Some(("portfolio", id)) => Topic::Portfolio(id.parse()?),
            Some(("streams", name)) => Topic::Stream(name.parse()?),
            Some(("thread", id)) if !id.is_empty() => Topic::Thread(id.to_owned()),
            Some(("query", name)) if !name.is_empty() => Topic::Query { connection, name: name.to_owned() },
            Some(("presence", watched)) if is_watchable(watched) => {
                Topic::Presence(Box::new(ChannelName::parse(watched, connection)?.topic))
            }
            Some(("system", "throughput")) => Topic::Throughput,
            Some(("system", "actors")) => Topic::Actors,
            _ => return Err(unknown()),
        };
        let filter = filter(query).ok_or_else(|| {
            Problem::invalid("bad_filter", format!("the filter of `{shown}` cannot be read; write ?column=value&…"))
        })?;
        let twice =
            filter.iter().enumerate().find(|(at, (name, _))| filter[..*at].iter().any(|(other, _)| other == name));
        if let Some((_, (name, _))) = twice {
            let name: String = name.chars().take(40).collect();
            let detail =
                format!("`{name}` stands twice in the filter of `{shown}`; subscribe once for each of its values");
            return Err(Problem::invalid("bad_filter", detail));
        }
        if !filter.is_empty() && !matches!(topic, Topic::Metric(_) | Topic::Stream(_)) {
            return Err(Problem::invalid("bad_filter", "only channels of metrics and streams can be filtered"));
        }
        Ok(ChannelName { text: text.into(), topic, filter })
    }

    /// Whether values of these names satisfy the filter.
    pub(crate) fn keeps(&self, pairs: &[(String, String)]) -> bool {
        self.filter.iter().all(|wanted| pairs.contains(wanted))
    }
}

/// Whether one may ask who follows this channel: those of one connection or of the installation are nobody's business.
fn is_watchable(path: &str) -> bool {
    !["query/", "presence/", "system/"].iter().any(|prefix| path.starts_with(prefix))
}

fn filter(query: &str) -> Option<Vec<(String, String)>> {
    let parts = query.split('&').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (name, value) = part.split_once('=')?;
            Some((decoded(name)?, decoded(value)?)).filter(|(name, _)| !name.is_empty())
        })
        .collect()
}

/// Text of a query string: `%41` is A, `+` a space.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let (digits, tail) = rest.split_at_checked(2)?;
                rest = tail;
                u8::from_str_radix(std::str::from_utf8(digits).ok().filter(|d| !d.starts_with('+'))?, 16).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_it_tells_of_and_what_it_keeps() {
        let name = ChannelName::parse("metrics/vwap?symbol=BRK%20B&venue=a+b", 1).unwrap();
        assert_eq!(name.topic, Topic::Metric("vwap".parse().unwrap()));
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(name.filter, [pair("symbol", "BRK B"), pair("venue", "a b")]);
        assert!(name.keeps(&[pair("venue", "a b"), pair("symbol", "BRK B")]));
        assert!(!name.keeps(&[pair("symbol", "BRK B")]));
        assert_eq!(ChannelName::parse("thread/a/b c", 1).unwrap().topic, Topic::Thread("a/b c".into()));
    }

    #[test]
    fn what_is_no_channel_is_refused() {
        let long = format!("thread/{}", "x".repeat(600));
        let presence = ["presence/", "presence/query/q", "presence/presence/alerts", "presence/system/actors"];
        for bad in ["", "metrics", "metric/x", "thread/", "system/all", "alerts/x", &long].into_iter().chain(presence) {
            assert_eq!(ChannelName::parse(bad, 1).unwrap_err().code, "unknown_channel", "{bad}");
        }
        for bad in ["metrics/", "metrics/A b", "streams/trades", "portfolio/../x"] {
            assert_eq!(ChannelName::parse(bad, 1).unwrap_err().code, "bad_name", "{bad}");
        }
        for bad in [
            "metrics/x?symbol",
            "metrics/x?=1",
            "metrics/x?a=%4",
            "metrics/x?a=%zz",
            "metrics/x?a=%+1",
            "metrics/x?a=1&b=2&a=3",
            "streams/market.trades?symbol=A&s%79mbol=A",
            "alerts?a=b",
        ] {
            assert_eq!(ChannelName::parse(bad, 1).unwrap_err().code, "bad_filter", "{bad}");
        }
    }
}
