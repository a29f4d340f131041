//! A fuzz target run for a while without a fuzzer: inputs are known ones, changed at random.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Runs `target` on `seeds` and then on changed ones, some glued from two. `TIDEWATCH_TEST_SEED` repeats a run,
/// `TIDEWATCH_FUZZ_RUNS` is how many there are.
pub fn smoke(name: &str, seeds: &[Vec<u8>], words: &[&str], runs: usize, target: impl Fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = number("TIDEWATCH_TEST_SEED").unwrap_or_else(rand::random);
    let runs = number("TIDEWATCH_FUZZ_RUNS").map_or(runs, |runs| runs as usize);
    println!("{name}: {runs} inputs from TIDEWATCH_TEST_SEED={seed}");
    seeds.iter().for_each(|seed| target(seed));
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..runs {
        let mut input = seeds.choose(&mut random).unwrap().clone();
        for _ in 0..random.random_range(1..6) {
            change(&mut input, seeds, words, &mut random);
        }
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target(&input)));
        if let Err(panic) = failed {
            println!("{name}: fails on {:?}", String::from_utf8_lossy(&input));
            println!("{name}: its bytes are {input:02x?}");
            std::panic::resume_unwind(panic);
        }
    }
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str], random: &mut StdRng) {
    let at = random.random_range(0..=input.len());
    let to = (at + random.random_range(0..9)).min(input.len());
    match random.random_range(0..7) {
        0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
        1 if at < input.len() => input[at] = *[0, 0x7f, 0x80, 0xff].choose(random).unwrap(),
        2 => _ = input.splice(at..to, []),
        3 => _ = input.splice(at..at, random.random_iter().take(to - at).collect::<Vec<u8>>()),
        4 => {
            // twice the same
            let part = input[at..to].to_vec();
            _ = input.splice(at..at, part);
        }
        5 => {
            let other = seeds.choose(random).unwrap();
            let from = random.random_range(0..=other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        _ => {
            if let Some(word) = words.choose(random) {
                _ = input.splice(at..to, word.bytes());
            }
        }
    }
}
