//! How long to wait before connecting again.

use rand::Rng;
use std::time::Duration;

/// Exponential backoff with full jitter: a wait drawn evenly from zero to a ceiling that doubles with every
/// attempt. Source: Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog (2015).
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// Ceiling of the first wait.
    pub first: Duration,
    /// Ceiling of every wait.
    pub max: Duration,
    /// A connection that held this long starts the waits over.
    pub healthy_after: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        let second = Duration::from_secs(1);
        Backoff { first: second, max: 60 * second, healthy_after: 60 * second }
    }
}

impl Backoff {
    /// The wait before attempt `attempt`, counted from 0 since the last healthy connection.
    pub(super) fn wait(&self, attempt: u32, rng: &mut impl Rng) -> Duration {
        let ceiling = self.first.saturating_mul(2u32.saturating_pow(attempt)).min(self.max);
        ceiling.mul_f64(rng.random::<f64>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn waits_are_spread_below_a_ceiling_that_doubles_and_is_capped() {
        let mut rng = StdRng::seed_from_u64(7);
        let backoff = Backoff::default();
        for (attempt, ceiling) in [(0, 1.0), (1, 2.0), (5, 32.0), (6, 60.0), (40, 60.0), (u32::MAX, 60.0)] {
            let waits: Vec<f64> = (0..500).map(|_| backoff.wait(attempt, &mut rng).as_secs_f64()).collect();
            let mean = waits.iter().sum::<f64>() / 500.0;
            assert!(waits.iter().all(|wait| (0.0..=ceiling).contains(wait)), "attempt {attempt}");
            assert!((mean / ceiling - 0.5).abs() < 0.1, "attempt {attempt}: mean {mean} of {ceiling}");
        }
    }
}
