//! Where the records of each workspace are in one file of the log, so that waking one reads what it must and no more.
//!
//! ```text
//! magic 8 | version u32 | salt of the log file u32 | its length u64 | workspaces u32
//! for each: name length u8, name | newest offset u64 | bytes u32 | for each record: offset and position, LEB128,
//! as distances from the record before
//! crc32c u32
//! ```
//! The file beside a log file is written when that one is complete. It can always be made again from it, so it is
//! not synced, and one that is absent, damaged or of another version is made again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"tideidx\n";
const VERSION: u32 = 1;
/// Bytes in front of the first workspace.
const HEADER: usize = 28;

/// The records of each workspace in one file.
#[derive(Default)]
pub(super) struct Places {
    of: HashMap<Box<str>, List>,
}

/// Offsets and positions of records in order, as distances.
#[derive(Default)]
struct List {
    newest: (u64, u64),
    bytes: Vec<u8>,
}

impl Places {
    /// Notes a record; later ones come later.
    pub(super) fn note(&mut self, workspace: &str, offset: u64, position: u64) {
        let list = match self.of.get_mut(workspace) {
            Some(list) => list,
            None => self.of.entry(workspace.into()).or_default(),
        };
        put(&mut list.bytes, offset - list.newest.0);
        put(&mut list.bytes, position - list.newest.1);
        list.newest = (offset, position);
    }

    /// The records of `workspace`, oldest first.
    pub(super) fn of(&self, workspace: &str) -> Walk {
        Walk::new(self.of.get(workspace).map_or_else(Vec::new, |list| list.bytes.clone()))
    }

    /// Each workspace and the offset of its newest record.
    pub(super) fn newest(&self) -> impl Iterator<Item = (&str, u64)> {
        self.of.iter().map(|(workspace, list)| (&**workspace, list.newest.0))
    }

    /// The bytes of the file beside a log file of this salt and length.
    pub(super) fn encode(&self, salt: u32, length: u64) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend(salt.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend((self.of.len() as u32).to_le_bytes());
        for (workspace, list) in &self.of {
            out.push(workspace.len() as u8);
            out.extend(workspace.as_bytes());
            out.extend(list.newest.0.to_le_bytes());
            out.extend((list.bytes.len() as u32).to_le_bytes());
            out.extend(&list.bytes);
        }
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }
}

/// Name of the file beside a log file.
pub(super) fn path_of(log_file: &Path) -> PathBuf {
    log_file.with_extension("index")
}

/// What [`Places::encode`] wrote, not taken apart: asked for one workspace, it decodes that one's list only.
pub(super) struct Stored {
    bytes: Vec<u8>,
}

impl Stored {
    /// `None` for anything that is not the whole, intact index of the log file of this salt and length.
    pub(super) fn read(bytes: Vec<u8>, salt: u32, length: u64) -> Option<Stored> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        let fits = body.len() >= HEADER
            && body[..8] == MAGIC
            && body[8..12] == VERSION.to_le_bytes()
            && body[12..16] == salt.to_le_bytes()
            && body[16..24] == length.to_le_bytes()
            && crc32c::crc32c(body) == u32::from_le_bytes(*crc);
        fits.then_some(Stored { bytes })
    }

    /// The records of `workspace`, oldest first.
    pub(super) fn of(&self, workspace: &str) -> Walk {
        let list = self.lists().find(|(name, ..)| *name == workspace).map_or(&[][..], |(_, _, list)| list);
        Walk::new(list.to_vec())
    }

    /// Each workspace and the offset of its newest record.
    pub(super) fn newest(&self) -> impl Iterator<Item = (&str, u64)> {
        self.lists().map(|(workspace, newest, _)| (workspace, newest))
    }

    fn lists(&self) -> impl Iterator<Item = (&str, u64, &[u8])> {
        let mut rest = &self.bytes[HEADER..self.bytes.len() - 4];
        std::iter::from_fn(move || {
            let length = usize::from(*rest.split_off_first()?);
            let workspace = std::str::from_utf8(rest.split_off(..length)?).ok()?;
            let newest = u64::from_le_bytes(rest.split_off(..8)?.try_into().ok()?);
            let length = u32::from_le_bytes(rest.split_off(..4)?.try_into().ok()?);
            Some((workspace, newest, rest.split_off(..length as usize)?))
        })
    }
}

/// Gives (offset, position) of one record after the other.
pub(super) struct Walk {
    bytes: Vec<u8>,
    at: usize,
    last: (u64, u64),
}

impl Walk {
    fn new(bytes: Vec<u8>) -> Walk {
        Walk { bytes, at: 0, last: (0, 0) }
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        Some(value)
    }
}

impl Iterator for Walk {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        self.last = (self.last.0 + self.number()?, self.last.1 + self.number()?);
        Some(self.last)
    }
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        #[test]
        fn what_was_noted_reads_back_from_memory_and_from_a_file(
            steps in proptest::collection::vec((0..5_usize, 1..1_u64 << 40, 1..1_u64 << 30), 0..200),
            flipped in any::<proptest::sample::Index>(),
        ) {
            let names = ["a", "b", "workspace-with-a-long-name", "d", "e"];
            let (mut places, mut model) = (Places::default(), vec![Vec::new(); names.len()]);
            let (mut offset, mut position) = (0, 0);
            for (who, more, length) in steps {
                (offset, position) = (offset + more, position + length);
                places.note(names[who], offset, position);
                model[who].push((offset, position));
            }
            let bytes = places.encode(7, position);
            let stored = Stored::read(bytes.clone(), 7, position).unwrap();
            for (name, expected) in names.iter().zip(&model) {
                prop_assert_eq!(&places.of(name).collect::<Vec<_>>(), expected);
                prop_assert_eq!(&stored.of(name).collect::<Vec<_>>(), expected);
            }
            let mut newest: Vec<(&str, u64)> = stored.newest().collect();
            newest.sort_unstable();
            let mut in_memory: Vec<(&str, u64)> = places.newest().collect();
            in_memory.sort_unstable();
            prop_assert_eq!(&newest, &in_memory);
            for (name, list) in names.iter().zip(&model) {
                let known = newest.iter().find(|(n, _)| n == name).map(|(_, offset)| *offset);
                prop_assert_eq!(known, list.last().map(|(offset, _)| *offset));
            }

            prop_assert!(Stored::read(bytes.clone(), 8, position).is_none());
            prop_assert!(Stored::read(bytes.clone(), 7, position + 1).is_none());
            let mut damaged = bytes;
            let at = flipped.index(damaged.len());
            damaged[at] ^= 1;
            prop_assert!(Stored::read(damaged, 7, position).is_none());
        }
    }
}
