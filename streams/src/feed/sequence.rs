//! Whether trades are missing: exchanges number the trades of a symbol without holes.

use std::collections::VecDeque;

/// Holes remembered for each symbol; a trade from an older one is taken as new, since ingest knows it by its id.
const HOLES_MAX: usize = 64;

/// A number this far back is no repeat: the exchange has started to count anew.
const RESTART_BEHIND: u64 = 1_000_000;

/// The numbers seen of one symbol.
#[derive(Debug, Default)]
pub(super) struct Sequence {
    newest: Option<u64>,
    /// Inclusive ranges that are missing so far, in ascending order.
    holes: VecDeque<(u64, u64)>,
    /// Up to here holes have been forgotten.
    forgotten: u64,
}

/// What a number means after those before it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The first, or the one after the newest.
    Next,
    /// So many are missing between the newest and this one.
    After { missing: u64 },
    /// It was missing until now.
    Filled,
    /// It was seen before.
    Repeat,
    /// The exchange counts anew from here.
    Restart,
}

impl Sequence {
    /// The newest number seen.
    pub fn newest(&self) -> Option<u64> {
        self.newest
    }

    pub fn see(&mut self, number: u64) -> Seen {
        let Some(newest) = self.newest else {
            self.newest = Some(number);
            return Seen::Next;
        };
        if number > newest {
            self.newest = Some(number);
            let missing = number - newest - 1;
            if missing == 0 {
                return Seen::Next;
            }
            if self.holes.len() == HOLES_MAX {
                self.forgotten = self.holes.pop_front().map_or(self.forgotten, |(_, last)| last);
            }
            self.holes.push_back((newest + 1, number - 1));
            return Seen::After { missing };
        }
        if newest - number > RESTART_BEHIND {
            *self = Sequence { newest: Some(number), ..Sequence::default() };
            return Seen::Restart;
        }
        let Some(hole) = self.holes.iter().position(|(first, last)| (*first..=*last).contains(&number)) else {
            return if number <= self.forgotten { Seen::Filled } else { Seen::Repeat };
        };
        let (first, last) = self.holes[hole];
        match (number == first, number == last) {
            (true, true) => _ = self.holes.remove(hole),
            (true, false) => self.holes[hole].0 = number + 1,
            (false, true) => self.holes[hole].1 = number - 1,
            (false, false) => {
                self.holes[hole].1 = number - 1;
                self.holes.insert(hole + 1, (number + 1, last));
            }
        }
        Seen::Filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_counted_once_and_filled_number_by_number() {
        let mut sequence = Sequence::default();
        let mut check = |number, expected| assert_eq!(sequence.see(number), expected, "{number}");
        check(100, Seen::Next);
        check(101, Seen::Next);
        check(101, Seen::Repeat);
        check(107, Seen::After { missing: 5 });
        check(104, Seen::Filled);
        check(104, Seen::Repeat);
        check(102, Seen::Filled);
        check(106, Seen::Filled);
        check(103, Seen::Filled);
        check(105, Seen::Filled);
        check(105, Seen::Repeat);
        check(108, Seen::Next);
        check(50, Seen::Repeat);
    }

    #[test]
    fn numbers_of_a_forgotten_hole_count_as_new() {
        let mut sequence = Sequence::default();
        for i in 0..=HOLES_MAX as u64 + 1 {
            sequence.see(i * 2);
        }
        assert_eq!(sequence.see(1), Seen::Filled);
        assert_eq!(sequence.see(5), Seen::Filled);
        assert_eq!(sequence.see(6), Seen::Repeat);
    }

    #[test]
    fn an_exchange_that_counts_anew_is_followed() {
        let mut sequence = Sequence::default();
        sequence.see(5_000_000_000);
        assert_eq!(sequence.see(1), Seen::Restart);
        assert_eq!(sequence.see(2), Seen::Next);
    }
}
