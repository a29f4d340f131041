//! Which charts people look at, so that a start reads them before somebody asks.

use engine::event::{ItemName, WorkspaceId};
use parking_lot::Mutex;
use std::collections::HashMap;

/// Metrics that a start reads.
const MOST: usize = 64;
/// Metrics that are counted; with more, those looked at least are forgotten.
const COUNTED_MAX: usize = 4_096;

/// How often the history of each metric was asked for.
#[derive(Default)]
pub(crate) struct Looks(Mutex<HashMap<(WorkspaceId, ItemName), u64>>);

impl Looks {
    pub(crate) fn count(&self, workspace: &WorkspaceId, metric: &ItemName) {
        let mut counts = self.0.lock();
        *counts.entry((workspace.clone(), metric.clone())).or_default() += 1;
        if counts.len() > COUNTED_MAX {
            let mut all: Vec<u64> = counts.values().copied().collect();
            all.sort_unstable();
            let middle = all[COUNTED_MAX / 2];
            counts.retain(|_, count| *count > middle);
        }
    }

    /// Those looked at most, the first of them most often.
    pub(crate) fn most(&self) -> Vec<(WorkspaceId, ItemName)> {
        let mut all: Vec<_> = self.0.lock().iter().map(|(of, count)| (*count, of.clone())).collect();
        all.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        all.into_iter().take(MOST).map(|(_, of)| of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_looked_at_most_are_known_however_many_there_are() {
        let (looks, workspace) = (Looks::default(), "acme".parse().unwrap());
        let metric = |n: usize| format!("m{n}").parse::<ItemName>().unwrap();
        for n in 0..3 * COUNTED_MAX {
            looks.count(&workspace, &metric(n));
            for favourite in [0, 0, 1] {
                looks.count(&workspace, &metric(favourite));
            }
        }
        let most = looks.most();
        assert_eq!((most.len() <= MOST, &most[0].1, &most[1].1), (true, &metric(0), &metric(1)));
        assert!(looks.0.lock().len() <= COUNTED_MAX);
    }
}
