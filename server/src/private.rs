//! Data that nobody but the server's own user reads: new files by the mask of the process, those of before by their mode.

use rustix::fs::Mode;
use std::fs::{Metadata, Permissions, metadata, set_permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// What others get: of directories and files alike, nothing.
const OTHERS: u32 = 0o077;
/// Where everybody may write, but for one another's files: no directory of the server's own.
const STICKY: u32 = 0o1000;
/// What the server keeps in its data directory.
const PARTS: [&str; 6] = ["log", "ids", "tidewatch.db", "tidewatch.db-wal", "tidewatch.db-shm", "redis-era"];

/// Files and directories that this process makes are its user's alone, 0600 and 0700; to be called before the first.
pub fn by_default() {
    rustix::process::umask(Mode::from_raw_mode(OTHERS));
}

/// Takes the data directory from all but its owner, and what the server keeps there, where that is this process's user.
pub(crate) fn tighten(data_dir: &Path) {
    for path in std::iter::once(data_dir.to_owned()).chain(PARTS.map(|part| data_dir.join(part))) {
        let Ok(found) = metadata(&path) else { continue };
        if !is_open(&found) || found.uid() != rustix::process::geteuid().as_raw() {
            continue;
        }
        let mode = found.mode() & 0o7777 & !OTHERS;
        match set_permissions(&path, Permissions::from_mode(mode)) {
            Ok(()) => tracing::info!(path = %path.display(), "is its owner's alone from now on"),
            Err(error) => tracing::warn!(%error, path = %path.display(), "others may read it"),
        }
    }
}

/// Whether others may do something with it that they need not.
fn is_open(found: &Metadata) -> bool {
    found.mode() & OTHERS != 0 && found.mode() & STICKY == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn what_the_server_keeps_is_tightened_and_nothing_beside_it() {
        let data = tempfile::tempdir().unwrap();
        let of = |name: &str| data.path().join(name);
        for directory in ["log", "other"] {
            std::fs::create_dir(of(directory)).unwrap();
            set_permissions(of(directory), Permissions::from_mode(0o755)).unwrap();
        }
        for file in ["tidewatch.db", "note.txt"] {
            std::fs::write(of(file), "x").unwrap();
            set_permissions(of(file), Permissions::from_mode(0o644)).unwrap();
        }
        set_permissions(data.path(), Permissions::from_mode(0o755)).unwrap();
        tighten(data.path());
        assert_eq!((mode(data.path()), mode(&of("log")), mode(&of("tidewatch.db"))), (0o700, 0o700, 0o600));
        assert_eq!((mode(&of("other")), mode(&of("note.txt"))), (0o755, 0o644));
        // /tmp stays everybody's
        set_permissions(data.path(), Permissions::from_mode(0o1777)).unwrap();
        tighten(data.path());
        assert_eq!(mode(data.path()), 0o1777);
    }
}
