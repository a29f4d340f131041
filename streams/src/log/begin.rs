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
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Begin {
    /// Of this log alone, and of its copies.
    pub(super) log: String,
    /// No file that holds this offset or a later one was ever removed.
    pub(super) first: Offset,
}

impl Begin {
    /// That of a log which has none yet: a new one, or one written before there were any.
    pub(super) fn at(first: Offset) -> Begin {
        Begin { log: format!("{:032x}", rand::random::<u128>()), first }
    }

    pub(super) fn read(directory: &Path) -> Result<Option<Begin>, OpenError> {
        let file = directory.join(FILE);
        match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| OpenError::Corrupt {
                position: 0,
                reason: error.to_string(),
                file,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(OpenError::Io { file, source }),
        }
    }

    /// Durable once it returns.
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        durable::replace(&directory.join(FILE), &serde_json::to_vec(self)?)
    }
}
