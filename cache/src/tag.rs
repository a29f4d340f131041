//! What entries are made of, and that it changed. Nothing is searched for and deleted: an entry bears the generation of
//! each of its tags, so once a tag has another generation the entry is never found again and makes room when it is the
//! one that was used longest ago.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Something that entries are made of, by name: `acme/metrics/vwap_1m`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tag(Arc<str>);

impl Tag {
    /// The first part is the workspace, so that no two workspaces share a tag.
    pub fn new(parts: &[&dyn fmt::Display]) -> Tag {
        let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
        Tag(parts.join("/").into())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Tag {
    fn from(name: &str) -> Tag {
        Tag(name.into())
    }
}

/// Tags with a generation. With more, all entries are forgotten.
const TAGS_MAX: usize = 200_000;

/// The generation of each tag that an entry bears.
#[derive(Default)]
pub(crate) struct Generations {
    next: AtomicU64,
    of: RwLock<HashMap<Tag, u64>>,
}

impl Generations {
    /// The generations of `tags` now. To be taken before what bears them is read.
    pub(crate) fn of(&self, tags: &[Tag]) -> Box<[u64]> {
        {
            let known = self.of.read();
            if let Some(all) = tags.iter().map(|tag| known.get(tag).copied()).collect() {
                return all;
            }
        }
        let mut known = self.of.write();
        if known.len() + tags.len() > TAGS_MAX {
            known.clear();
        }
        tags.iter().map(|tag| *known.entry(tag.clone()).or_insert_with(|| self.next.fetch_add(1, Relaxed))).collect()
    }

    /// These changed: what was read before is not found any more.
    pub(crate) fn change(&self, tags: &[Tag]) {
        let mut known = self.of.write();
        for tag in tags {
            known.remove(tag);
        }
    }

    /// Anything may have changed.
    pub(crate) fn change_all(&self) {
        self.of.write().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_that_changed_has_a_generation_it_never_had() {
        let generations = Generations::default();
        let (a, b) = (Tag::new(&[&"acme", &"a"]), Tag::new(&[&"acme", &"b"]));
        let both = [a.clone(), b.clone()];
        let first = generations.of(&both);
        assert_eq!(generations.of(&both), first);
        generations.change(std::slice::from_ref(&a));
        let second = generations.of(&both);
        assert!(second[0] != first[0] && second[1] == first[1]);
        generations.change_all();
        let third = generations.of(&both);
        assert!(third.iter().all(|n| !first.contains(n) && !second.contains(n)));
    }
}
