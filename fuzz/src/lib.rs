//! What the targets have in common.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::{env, fs, process, thread};
use streams::foreign::is_ours;

thread_local! {
    /// The last panic that was left to whoever called for it.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Begins a target. `TIDEWATCH_FUZZ_CORPUS` is a directory that gets the known inputs to begin with, in `name`, and the
/// words that mean something in them, as libFuzzer's `name.dict`.
///
/// A panic of our code is a failure also where it is caught: that is for what crates do with a body that lies.
pub fn begin(name: &str, known: &[Vec<u8>], words: &[&str]) {
    let (fuzzer, show) = (thread::current().id(), panic::take_hook());
    panic::set_hook(Box::new(move |panic| {
        if is_ours(panic) || thread::current().id() != fuzzer {
            show(panic);
            process::abort();
        }
        PANIC.set(panic.to_string());
    }));
    let Some(corpus) = env::var_os("TIDEWATCH_FUZZ_CORPUS") else { return };
    let directory = Path::new(&corpus).join(name);
    fs::create_dir_all(&directory).unwrap();
    for (at, input) in known.iter().enumerate() {
        fs::write(directory.join(at.to_string()), input).unwrap();
    }
    let escaped = |word: &&str| word.bytes().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
    let lines: String = words.iter().map(|word| format!("\"{}\"\n", escaped(word))).collect();
    // libFuzzer takes an empty file for a missing one
    fs::write(Path::new(&corpus).join(format!("{name}.dict")), format!("# {name}\n{lines}")).unwrap();
}

/// One input; what panics and is not caught ends the process.
pub fn run(target: impl FnOnce()) {
    panic::catch_unwind(AssertUnwindSafe(target)).unwrap_or_else(|_: Box<dyn Any + Send>| {
        eprintln!("{}", PANIC.take());
        process::abort();
    })
}
