#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(
    init: tidewatch_fuzz::begin("log_file", &streams::fuzz::files(), &[]),
    |data: &[u8]| tidewatch_fuzz::run(|| streams::fuzz::log_file(data))
);

#[cfg(not(fuzzing))]
fn main() {}
