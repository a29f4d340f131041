#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(
    init: tidewatch_fuzz::begin("sql", &sql::fuzz::texts(), sql::fuzz::WORDS),
    |data: &[u8]| tidewatch_fuzz::run(|| sql::fuzz::sql(data))
);

#[cfg(not(fuzzing))]
fn main() {}
