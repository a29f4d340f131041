//! Rows of a batch by what they belong to: those of one key, or of one session, stand together.

use arrow::buffer::BooleanBuffer;

/// Rows of a batch in runs, each in the order in which its rows came.
///
/// Aggregates go from run to run, so that a key's state is fetched once for all its rows in the batch, not for each.
#[derive(Clone, Default)]
pub(crate) struct Runs {
    /// Where each run ends in `rows`.
    ends: Vec<u32>,
    pub(crate) rows: Vec<u32>,
}

impl Runs {
    /// The first `count` rows as one run.
    pub(crate) fn one(count: usize) -> Runs {
        Runs { ends: vec![count as u32], rows: (0..count as u32).collect() }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let run = &self.rows[start..end as usize];
            start = end as usize;
            run
        })
    }

    /// The same runs with only the rows that `mask` keeps; some may be left without any.
    pub(crate) fn kept(&self, mask: &BooleanBuffer) -> Runs {
        let mut rows = vec![0; self.rows.len()];
        let mut kept = 0;
        let ends = self.iter().map(|run| {
            for &row in run {
                rows[kept] = row; // without a branch, which a mixed mask would make expensive
                kept += usize::from(mask.value(row as usize));
            }
            kept as u32
        });
        let ends = ends.collect();
        rows.truncate(kept);
        Runs { ends, rows }
    }
}

/// Rows by label.
pub(crate) struct Grouped {
    /// The label of each run, in the order in which they came first.
    pub(crate) labels: Vec<u32>,
    pub(crate) runs: Runs,
}

/// Groups rows by counting; keeps the room for it, a number for each label.
#[derive(Default)]
pub(crate) struct Grouper {
    counts: Vec<u32>, // zero between calls
}

impl Grouper {
    /// Groups rows, each with its label before it; labels are less than `bound`.
    pub(crate) fn group(&mut self, bound: usize, labelled: impl Iterator<Item = (u32, u32)> + Clone) -> Grouped {
        if self.counts.len() < bound {
            self.counts.resize(bound, 0);
        }
        let counts = &mut self.counts;
        let mut labels = Vec::new();
        for (label, _) in labelled.clone() {
            let count = &mut counts[label as usize];
            if *count == 0 {
                labels.push(label);
            }
            *count += 1;
        }
        let mut all = 0;
        for &label in &labels {
            let start = all;
            all += std::mem::replace(&mut counts[label as usize], start);
        }
        let mut rows = vec![0; all as usize];
        for (label, row) in labelled {
            let at = &mut counts[label as usize];
            rows[*at as usize] = row;
            *at += 1;
        }
        let ends = labels.iter().map(|&label| std::mem::take(&mut counts[label as usize])).collect();
        Grouped { labels, runs: Runs { ends, rows } }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.counts.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_label_stand_together_in_their_order() {
        let mut grouper = Grouper::default();
        for _ in 0..2 {
            let grouped = grouper.group(5, [(3, 10), (1, 11), (3, 12), (4, 13), (1, 14)].into_iter());
            assert_eq!(grouped.labels, [3, 1, 4]);
            assert_eq!(grouped.runs.iter().collect::<Vec<_>>(), [&[10, 12][..], &[11, 14], &[13]]);
        }
        assert!(grouper.group(5, std::iter::empty()).labels.is_empty());
    }

    #[test]
    fn a_mask_leaves_every_run_in_its_place() {
        let runs = Runs { ends: vec![2, 3, 5], rows: vec![0, 2, 1, 3, 4] };
        let kept = runs.kept(&BooleanBuffer::from(vec![false, false, true, true, true]));
        assert_eq!(kept.iter().collect::<Vec<_>>(), [&[2][..], &[], &[3, 4]]);
        assert_eq!(Runs::one(3).iter().collect::<Vec<_>>(), [&[0, 1, 2][..]]);
    }
}
