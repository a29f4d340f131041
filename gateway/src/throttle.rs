//! Who guesses passwords has to wait, ever longer. Each node counts by itself; with Redis all nodes count together too,
//! and the longer wait holds, so that guesses spread over nodes, or over the restarts of one, gain nothing.

use crate::problem::Problem;
use axum::http::StatusCode;
use cache::{Cache, Patience};
use engine::event::{Micros, Span};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// Wrong passwords in a row for one account from one address before each further try has to wait.
const FREE_TRIES: u32 = 5;
/// The same for all accounts together, from one address.
const FREE_TRIES_OF_ADDRESS: u32 = 100;
/// No e-mail address: where the failures of an address are counted.
const ANY_ACCOUNT: &str = "";
const TRY_WAIT_MAX: Span = Span::seconds(60);
/// Failures are forgotten after this long without another.
const FORGET_TRIES: Span = Span::seconds(15 * 60);
/// Accounts and addresses that are remembered; those that need not wait are forgotten beyond that.
const REMEMBER_MAX: usize = 10_000;

/// From where somebody tries a password or a code, when, and where all nodes count such tries.
#[derive(Clone, Copy)]
pub(crate) struct Try<'a> {
    pub(crate) from: Option<IpAddr>,
    pub(crate) now: Micros,
    pub(crate) cache: &'a Cache,
}

/// Failed tries of all accounts.
#[derive(Default)]
pub(crate) struct Throttle {
    tries: Mutex<HashMap<(String, Option<IpAddr>), Tries>>,
}

/// Failed tries for one account from one address.
struct Tries {
    failed: u32,
    last: Micros,
}

impl Tries {
    /// No try before this instant.
    fn until(&self, free: u32) -> Micros {
        let Some(over) = self.failed.checked_sub(free) else { return Micros::MIN };
        self.last.plus(Span::seconds(1 << over.min(10)).min(TRY_WAIT_MAX))
    }
}

impl Throttle {
    /// Counts a try as failed before it is known whether it is, so that tries at the same time count as those one after
    /// the other do; refuses it where there were too many.
    pub(crate) async fn count(&self, email: &str, at: Try<'_>) -> Result<(), Problem> {
        self.count_here(email, at.from, at.now)?;
        let patience = Patience { longest: duration(TRY_WAIT_MAX), forget: duration(FORGET_TRIES) };
        let [account, address] = names(email, at.from);
        let of = [(account.as_str(), FREE_TRIES), (address.as_str(), FREE_TRIES_OF_ADDRESS)];
        match at.cache.count_try(of, patience).await.filter(|wait| !wait.is_zero()) {
            Some(wait) => {
                self.take_back_here(email, at.from);
                Err(refused(wait))
            }
            None => Ok(()),
        }
    }

    /// A try that was counted was no wrong guess.
    pub(crate) async fn take_back(&self, email: &str, at: Try<'_>) {
        self.take_back_here(email, at.from);
        let names = names(email, at.from);
        at.cache.take_back_try(names.each_ref().map(String::as_str)).await;
    }

    /// Somebody who was counted signed in: the account's failures from there are forgotten.
    pub(crate) async fn succeeded(&self, email: &str, at: Try<'_>) {
        self.take_back(email, at).await;
        self.tries.lock().remove(&(email.to_owned(), at.from));
        let [account, _] = names(email, at.from);
        at.cache.forget_tries(&account).await;
    }

    fn count_here(&self, email: &str, from: Option<IpAddr>, now: Micros) -> Result<(), Problem> {
        let mut all = self.tries.lock();
        let until = |email: &str, free| all.get(&(email.to_owned(), from)).map_or(Micros::MIN, |t| t.until(free));
        let until = until(email, FREE_TRIES).max(until(ANY_ACCOUNT, FREE_TRIES_OF_ADDRESS));
        if until > now {
            return Err(refused(duration(until.since(now))));
        }
        if all.len() >= REMEMBER_MAX {
            all.retain(|_, tries| tries.until(FREE_TRIES) > now);
        }
        for email in [email, ANY_ACCOUNT] {
            let tries = all.entry((email.to_owned(), from)).or_insert(Tries { failed: 0, last: now });
            if tries.last.plus(FORGET_TRIES) < now {
                tries.failed = 0;
            }
            tries.failed = tries.failed.saturating_add(1);
            tries.last = now;
        }
        Ok(())
    }

    fn take_back_here(&self, email: &str, from: Option<IpAddr>) {
        let mut all = self.tries.lock();
        for email in [email, ANY_ACCOUNT] {
            if let Some(tries) = all.get_mut(&(email.to_owned(), from)) {
                tries.failed = tries.failed.saturating_sub(1);
            }
        }
    }
}

/// What the failures of an account and of an address are counted under by all nodes: digests, since Redis need not know
/// who signs in.
fn names(email: &str, from: Option<IpAddr>) -> [String; 2] {
    let from = from.map_or_else(String::new, |from| from.to_string());
    [email, ANY_ACCOUNT].map(|email| {
        let digest = Sha256::digest(format!("{from} {email}"));
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    })
}

fn duration(span: Span) -> Duration {
    Duration::from_micros(span.0.unsigned_abs())
}

fn refused(wait: Duration) -> Problem {
    let detail = format!("too many failed sign-ins; try again in {} s", wait.as_secs() + 1);
    Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_sign_ins", detail).retry_after(wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_five_wrong_passwords_each_try_waits_longer_up_to_a_minute() {
        let throttle = Throttle::default();
        let address = Some(IpAddr::from([10, 0, 0, 1]));
        let mut now = Micros(1_700_000_000_000_000);
        for _ in 0..5 {
            assert!(throttle.count_here("ann@example.com", address, now).is_ok());
        }
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            let almost = now.plus(Span(Span::seconds(wait).0 - 1));
            let refused = throttle.count_here("ann@example.com", address, almost).unwrap_err();
            assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS, "{wait}");
            for (email, from) in [("ann@example.com", Some(IpAddr::from([10, 0, 0, 2]))), ("bob@example.com", address)]
            {
                assert!(throttle.count_here(email, from, almost).is_ok(), "{email} {from:?}");
                throttle.take_back_here(email, from);
            }
            now = now.plus(Span::seconds(wait));
            assert!(throttle.count_here("ann@example.com", address, now).is_ok());
        }
    }
}
