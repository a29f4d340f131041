//! The file that names a log and says where it begins, so that a first file that is gone is told from one that retention
//! let go, and a log from that of another installation.

use super::{Offset, OpenError};
use crate::durable;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::Path;

const FILE: &str = "BEGIN";

/// Name and beginning of a log.
#[derive(Clone, Debug)]
pub(super) struct Begin {
    /// Of this log alone, and of its copies.
    pub(super) log: String,
    /// No file that holds this offset or a later one was ever removed.
    pub(super) first: Offset,
}

/// The file, in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    log: String,
    first: Offset,
    /// Of both, `LOG FIRST`; an earlier version wrote none.
    crc32c: Option<u32>,
}

impl Begin {
    fn checksum(&self) -> u32 {
        crc32c::crc32c(format!("{} {}", self.log, self.first.0).as_bytes())
    }

    /// That of a log which has none yet: a new one, or one written before there were any.
    pub(super) fn at(first: Offset) -> Begin {
        Begin { log: format!("{:032x}", rand::random::<u128>()), first }
    }

    pub(super) fn read(directory: &Path) -> Result<Option<Begin>, OpenError> {
        let file = directory.join(FILE);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(OpenError::Io { file, source }),
        };
        let stored = serde_json::from_slice(&bytes).map_err(|error| error.to_string());
        let whole = stored.and_then(|Stored { log, first, crc32c }| {
            let begin = Begin { log, first };
            match crc32c.is_none_or(|sum| sum == begin.checksum()) {
                true => Ok(Some(begin)),
                false => Err("it is not as it was written".to_owned()),
            }
        });
        whole.map_err(|reason| OpenError::Corrupt { position: 0, reason, file })
    }

    /// Durable once it returns.
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        let stored = Stored { log: self.log.clone(), first: self.first, crc32c: Some(self.checksum()) };
        durable::replace(&directory.join(FILE), &serde_json::to_vec(&stored)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_byte_is_refused_and_a_file_without_a_checksum_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let (begin, file) = (Begin::at(Offset(1_234)), directory.path().join(FILE));
        begin.write(directory.path()).unwrap();
        let read = || Begin::read(directory.path()).map(|begin| begin.map(|begin| (begin.log, begin.first)));
        assert_eq!(read().unwrap(), Some((begin.log.clone(), begin.first)));
        let whole = fs::read(&file).unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                fs::write(&file, bytes).unwrap();
                assert!(matches!(read(), Err(OpenError::Corrupt { .. })), "bit {bit} of byte {at}");
            }
        }
        fs::write(&file, format!(r#"{{"log":"{}","first":7}}"#, begin.log)).unwrap();
        assert_eq!(read().unwrap(), Some((begin.log, Offset(7))));
    }
}
