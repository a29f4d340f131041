//! Files that are whole or not there.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Puts `bytes` at `path` in one step, through a file with the extension `tmp` beside it; durable once it returns.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("tmp");
    fs::write(&unfinished, bytes)?;
    File::open(&unfinished)?.sync_all()?;
    fs::rename(&unfinished, path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}
