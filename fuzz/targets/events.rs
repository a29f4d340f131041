#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(
    init: tidewatch_fuzz::begin("events", &streams::fuzz::bodies(), streams::fuzz::WORDS),
    |data: &[u8]| tidewatch_fuzz::run(|| streams::fuzz::events(data))
);

#[cfg(not(fuzzing))]
fn main() {}
