//! Crates that panic on bytes that lie.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::path::Path;
use std::sync::Once;

thread_local! {
    static READING: Cell<bool> = const { Cell::new(false) };
}

/// What `read` gives, or none where a crate panicked on what it read, which nobody need see on stderr. A panic of our
/// own code is caught too, and shown.
pub(crate) fn caught<T>(read: impl FnOnce() -> T) -> Option<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let show = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !READING.get() || is_ours(panic) {
                show(panic);
            }
        }));
    });
    let outer = READING.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    READING.set(outer);
    result.ok()
}

/// Whether a panic is of this workspace: Cargo builds its crates from its root, all others by absolute paths.
pub fn is_ours(panic: &PanicHookInfo) -> bool {
    panic.location().is_some_and(|location| Path::new(location.file()).is_relative())
}
