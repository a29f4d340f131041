//! How much state metrics may hold, and when it is worth measuring.
//!
//! A metric over its bound stops and lets its state go; the others go on. Groups are counted after every step. Bytes
//! are measured again only when what came since may have added a good part to them, since measuring goes through all
//! the state: a metric may be over its bound by about a tenth before it stops.

use std::fmt::{Display, Formatter};

/// How much state there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StateSize {
    /// On the heap, within a few percent.
    pub bytes: usize,
    /// Keys of GROUP BY that hold state; of a metric that goes row by row, partitions.
    pub groups: usize,
}

/// The most state of each metric and of all metrics of a workspace.
#[derive(Clone, Copy, Debug)]
pub struct StateLimits {
    pub metric: StateSize,
    pub workspace: StateSize,
}

impl StateLimits {
    /// What a computation with nobody beside it has, such as a measurement.
    pub const NONE: StateLimits = StateLimits { metric: StateSize::UNBOUNDED, workspace: StateSize::UNBOUNDED };
}

impl Default for StateLimits {
    fn default() -> Self {
        StateLimits::NONE
    }
}

impl StateSize {
    const UNBOUNDED: StateSize = StateSize { bytes: usize::MAX, groups: usize::MAX };

    pub(crate) fn plus(self, other: StateSize) -> StateSize {
        StateSize { bytes: self.bytes + other.bytes, groups: self.groups + other.groups }
    }

    /// In which way this is more than `most`.
    pub(crate) fn excess(self, most: StateSize) -> Option<Excess> {
        if self.bytes > most.bytes {
            return Some(Excess { what: "bytes", held: self.bytes, most: most.bytes });
        }
        (self.groups > most.groups).then_some(Excess { what: "groups", held: self.groups, most: most.groups })
    }
}

/// A bound and what is over it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Excess {
    what: &'static str,
    held: usize,
    most: usize,
}

impl Excess {
    /// The share of `size` in what there is too much of.
    pub(crate) fn share(&self, size: StateSize) -> usize {
        if self.what == "bytes" { size.bytes } else { size.groups }
    }

    /// What to say of a metric that is over its own bound.
    pub(crate) fn of_metric(&self) -> String {
        format!("its state is {self} of limits.metric_state_{}; {INSTEAD}", self.what)
    }

    /// What to say of the metric that holds most in a workspace that is over its bound.
    pub(crate) fn of_workspace(&self, share: usize) -> String {
        let (what, limit) = (self.what, "limits.workspace_state_");
        format!("the metrics of this workspace hold {self} of {limit}{what}, this one the most ({share}); {INSTEAD}")
    }
}

const INSTEAD: &str =
    "group by fewer keys, shorten the window or the band of a join, or raise the limit, and define it again";

impl Display for Excess {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}, more than the {}", self.held, self.what, self.most)
    }
}

/// The size of one metric's state when it was last measured, and what came since.
#[derive(Default)]
pub(crate) struct Gauge {
    size: StateSize,
    rows: usize,
    bytes: usize,
}

/// What may come before a small state is measured again.
const ROWS: usize = 1024;
/// A state is measured again when this part of its bound, or of its groups, may have been added.
const PART: usize = 16;

impl Gauge {
    pub(crate) fn size(&self) -> StateSize {
        self.size
    }

    /// Takes note of input.
    pub(crate) fn took(&mut self, rows: usize, bytes: usize) {
        self.rows += rows;
        self.bytes += bytes;
    }

    /// Counts `groups`, and measures `bytes` where a bound of `most` bytes may have come near since.
    pub(crate) fn measure(&mut self, most: usize, groups: usize, bytes: impl FnOnce() -> usize) {
        self.size.groups = groups;
        let due = self.rows >= ROWS.max(groups / PART) || self.bytes >= most / PART;
        if self.rows > 0 && due && most < usize::MAX {
            self.set(StateSize { bytes: bytes(), groups });
        }
    }

    /// Takes note of what was measured.
    pub(crate) fn set(&mut self, size: StateSize) {
        *self = Gauge { size, rows: 0, bytes: 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_measured_again_when_they_may_have_grown_by_a_good_part() {
        let mut gauge = Gauge::default();
        gauge.took(10, 99);
        gauge.measure(1_600, 7, || panic!("a sixteenth of the bound is 100 bytes"));
        assert_eq!(gauge.size(), StateSize { bytes: 0, groups: 7 });
        gauge.took(1, 1);
        gauge.measure(1_600, 8, || 500);
        assert_eq!(gauge.size(), StateSize { bytes: 500, groups: 8 });
        gauge.measure(1_600, 6, || panic!("nothing came since"));
        gauge.took(2_000, 0);
        gauge.measure(1_600, 100_000, || panic!("few rows beside so many groups"));
        gauge.took(5_000, 0);
        gauge.measure(1_600, 100_000, || 600);
        assert_eq!(gauge.size().bytes, 600);
    }

    #[test]
    fn what_is_over_a_bound_says_the_numbers_and_the_key_of_the_bound() {
        let most = StateSize { bytes: 100, groups: 10 };
        assert_eq!(StateSize { bytes: 100, groups: 10 }.excess(most), None);
        let excess = StateSize { bytes: 5, groups: 11 }.excess(most).unwrap();
        assert!(
            excess.of_metric().starts_with("its state is 11 groups, more than the 10 of limits.metric_state_groups;")
        );
        let excess = StateSize { bytes: 101, groups: 11 }.excess(most).unwrap();
        assert!(
            excess
                .of_workspace(60)
                .contains("101 bytes, more than the 100 of limits.workspace_state_bytes, this one the most (60)")
        );
    }
}
