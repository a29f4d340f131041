//! When something happened, in which workspace, on which stream.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// An instant in event time: microseconds since the Unix epoch, UTC. Never a duration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Micros(pub i64);

impl Micros {
    pub const ZERO: Micros = Micros(0);
    pub const MIN: Micros = Micros(i64::MIN);
    pub const MAX: Micros = Micros(i64::MAX);

    /// The instant `span` later; stays at the last representable instant rather than wrap.
    pub fn plus(self, span: Span) -> Micros {
        Micros(self.0.saturating_add(span.0))
    }

    /// The instant `span` earlier; stays at the first representable instant rather than wrap.
    pub fn minus(self, span: Span) -> Micros {
        Micros(self.0.saturating_sub(span.0))
    }

    /// Time from `earlier` to this instant, zero when `earlier` is later.
    pub fn since(self, earlier: Micros) -> Span {
        Span(self.0.saturating_sub(earlier.0).max(0))
    }

    /// Start of the epoch-aligned pane of `width` that holds this instant, also before 1970.
    pub fn pane_start(self, width: Span) -> Micros {
        Micros(self.0.saturating_sub(self.0.rem_euclid(width.0)))
    }
}

/// A length of time in microseconds. Windows, delays and lateness are spans; never negative.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Span(pub i64);

impl Span {
    pub const ZERO: Span = Span(0);
    pub const fn millis(n: i64) -> Span {
        Span(n * 1_000)
    }
    pub const fn seconds(n: i64) -> Span {
        Span(n * 1_000_000)
    }
}

/// Why a name was refused; says what a good one looks like.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    #[error("workspace id `{0}` must match [a-z0-9][a-z0-9-]{{0,62}}")]
    Workspace(String),
    #[error("stream name `{0}` must be two parts such as `market.trades`, each [a-z][a-z0-9_]*")]
    Stream(String),
    #[error("name `{0}` must match [a-z][a-z0-9_-]{{0,62}}")]
    Item(String),
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:ident, $error:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                if $check(text) { Ok($name(text.into())) } else { Err(NameError::$error(text.chars().take(80).collect())) }
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.to_string()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// The tenant every event, metric, alert and thread belongs to: `[a-z0-9][a-z0-9-]{0,62}`.
    WorkspaceId, is_workspace_id, Workspace
);
name_type!(
    /// A stream within a workspace, also its table name in SQL: two parts, `market.trades`.
    StreamName, is_stream_name, Stream
);
name_type!(
    /// Name of a metric, alert rule, portfolio or agent: `[a-z][a-z0-9_-]{0,62}`.
    ItemName, is_item_name, Item
);

impl StreamName {
    /// The two parts of the name: schema and table in SQL.
    pub fn parts(&self) -> (&str, &str) {
        self.0.split_once('.').expect("a stream name has two parts: checked when it was made")
    }

    /// The metric whose final rows this stream is: `metrics.bars_1m` is those of `bars_1m`.
    pub fn metric(&self) -> Option<ItemName> {
        match self.parts() {
            (METRICS, name) => name.parse().ok(),
            _ => None,
        }
    }
}

/// First part of the names under which metrics read the final rows of others.
pub const METRICS: &str = "metrics";

fn is_workspace_id(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&text.len()) && ok(text.as_bytes()[0]) && text.bytes().all(|b| ok(b) || b == b'-')
}

fn is_stream_name(text: &str) -> bool {
    let part = |p: &str| {
        p.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
            && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    text.len() <= 128 && text.split_once('.').is_some_and(|(a, b)| part(a) && part(b))
}

fn is_item_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.as_bytes()[0].is_ascii_lowercase()
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panes_are_aligned_to_the_epoch_also_before_it() {
        assert_eq!(Micros(61).pane_start(Span(60)), Micros(60));
        assert_eq!(Micros(-1).pane_start(Span(60)), Micros(-60));
        assert_eq!(Micros(-60).pane_start(Span(60)), Micros(-60));
    }

    #[test]
    fn names_that_could_escape_their_place_are_refused() {
        for bad in ["", "-a", "A", "a/b", "..", "a b", &"a".repeat(64)] {
            assert!(bad.parse::<WorkspaceId>().is_err(), "{bad}");
        }
        for bad in ["", "a", "a.", ".b", "a.b.c", "A.b", "1a.b", "a.b-c"] {
            assert!(bad.parse::<StreamName>().is_err(), "{bad}");
        }
        assert_eq!("market.trades".parse::<StreamName>().unwrap().parts(), ("market", "trades"));
    }
}
