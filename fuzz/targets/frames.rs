#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(
    init: tidewatch_fuzz::begin("frames", &gateway::fuzz::clients(), &[]),
    |data: &[u8]| tidewatch_fuzz::run(|| gateway::fuzz::frames(data))
);

#[cfg(not(fuzzing))]
fn main() {}
