#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| streams::fuzz::log_file(data));
