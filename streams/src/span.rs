//! Durations as people write them: `250ms`, `5s`, `1m`, `2h`, `1d`.

use engine::event::Span;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration in a request or an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Text(pub Span);

/// The units, longest first, in microseconds.
const UNITS: [(&str, i64); 6] =
    [("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)];

/// The duration in the longest unit that holds it whole: `90s`, not `1m 30s`.
pub fn format(span: Span) -> String {
    if span.0 == 0 {
        return "0s".to_owned();
    }
    let unit = UNITS.iter().find(|(_, micros)| span.0 % micros == 0);
    let (name, micros) = unit.expect("every span is whole in microseconds");
    format!("{}{name}", span.0 / micros)
}

/// Reads `250ms`, `1h 30m`, `1 minute`.
pub fn parse(text: &str) -> Result<Span, String> {
    let bad = |why: &dyn std::fmt::Display| {
        let text: String = text.chars().take(40).collect();
        format!("duration `{text}` cannot be read ({why}); write it as `250ms`, `5s`, `1m`, `2h` or `1d`")
    };
    let duration = humantime::parse_duration(text).map_err(|error| bad(&error))?;
    i64::try_from(duration.as_micros()).map(Span).map_err(|_| bad(&"it is too long"))
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format(self.0))
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse(&String::deserialize(deserializer)?).map(Text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_reads_back_as_it_is_written() {
        for text in ["0s", "250ms", "5s", "90s", "1m", "2h", "1d", "7us"] {
            assert_eq!(format(parse(text).unwrap()), text);
        }
        assert_eq!(format(parse("1 minute").unwrap()), "1m");
        assert_eq!(format(parse("1h 30m").unwrap()), "90m");
    }

    #[test]
    fn what_is_no_duration_is_refused_and_shown() {
        for bad in ["", "5", "-1s", "1 fortnight", "999999999999d"] {
            assert!(parse(bad).unwrap_err().contains(&format!("`{bad}`")), "{bad}");
        }
    }
}
