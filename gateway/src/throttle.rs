//! Who guesses passwords has to wait, ever longer. Each node counts by itself; with Redis all nodes count together too,
//! and the longer wait holds, so that guesses spread over nodes, or over the restarts of one, gain nothing.

use crate::problem::Problem;
use axum::http::StatusCode;
use cache::{Cache, Patience};
use engine::event::{Micros, Span};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Wrong passwords in a row for one account from one address before each further try has to wait.
const FREE_TRIES: u32 = 5;
/// The same for all accounts together, from one address.
const FREE_TRIES_OF_ADDRESS: u32 = 100;
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

/// What failed tries are counted of, and how many are free in a row.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Guessed {
    /// The password of this address, known or not, from there.
    Password(String, Option<IpAddr>),
    /// Any password from there.
    Any(Option<IpAddr>),
    /// The second factor of this user, from wherever: whoever comes to it knows the password, so nobody else has to wait.
    Code(String),
}

impl Guessed {
    fn free(&self) -> u32 {
        match self {
            Guessed::Password(..) | Guessed::Code(_) => FREE_TRIES,
            Guessed::Any(_) => FREE_TRIES_OF_ADDRESS,
        }
    }

    /// What all nodes count it under: a digest, since Redis need not know who signs in.
    fn name(&self) -> String {
        let digest = Sha256::digest(format!("{self:?}"));
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What a try of a password counts as.
fn of_password(email: &str, from: Option<IpAddr>) -> [Guessed; 2] {
    let from = from.map(network);
    [Guessed::Password(email.to_owned(), from), Guessed::Any(from)]
}

/// Whom an address belongs to: of IPv6 everybody has 2^64 of them.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => Ipv6Addr::from_bits(six.to_bits() >> 64 << 64).into(),
        four => four,
    }
}

/// Failed tries.
#[derive(Default)]
pub(crate) struct Throttle {
    tries: Mutex<HashMap<Guessed, Tries>>,
}

/// Failed tries of one kind.
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
        self.count_of(&of_password(email, at.from), at).await
    }

    /// The same for a code of a user's second factor.
    pub(crate) async fn count_code(&self, user: &str, at: Try<'_>) -> Result<(), Problem> {
        self.count_of(&[Guessed::Code(user.to_owned())], at).await
    }

    /// A try that was counted was no wrong guess.
    pub(crate) async fn take_back(&self, email: &str, at: Try<'_>) {
        self.take_back_of(&of_password(email, at.from), at).await;
    }

    /// The same for a code.
    pub(crate) async fn take_back_code(&self, user: &str, at: Try<'_>) {
        self.take_back_of(&[Guessed::Code(user.to_owned())], at).await;
    }

    /// Somebody who was counted signed in: the account's failures from there are forgotten.
    pub(crate) async fn succeeded(&self, email: &str, at: Try<'_>) {
        self.take_back(email, at).await;
        let [account, _] = of_password(email, at.from);
        self.tries.lock().remove(&account);
        at.cache.forget_tries(&account.name()).await;
    }

    async fn count_of(&self, of: &[Guessed], at: Try<'_>) -> Result<(), Problem> {
        self.count_here(of, at.now)?;
        let patience = Patience { longest: duration(TRY_WAIT_MAX), forget: duration(FORGET_TRIES) };
        let named: Vec<(String, u32)> = of.iter().map(|guessed| (guessed.name(), guessed.free())).collect();
        let named: Vec<(&str, u32)> = named.iter().map(|(name, free)| (name.as_str(), *free)).collect();
        match at.cache.count_try(&named, patience).await.filter(|wait| !wait.is_zero()) {
            Some(wait) => {
                self.take_back_here(of);
                Err(refused(wait))
            }
            None => Ok(()),
        }
    }

    async fn take_back_of(&self, of: &[Guessed], at: Try<'_>) {
        self.take_back_here(of);
        let names: Vec<String> = of.iter().map(Guessed::name).collect();
        at.cache.take_back_try(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }

    fn count_here(&self, of: &[Guessed], now: Micros) -> Result<(), Problem> {
        let mut all = self.tries.lock();
        let until = of.iter().filter_map(|guessed| Some(all.get(guessed)?.until(guessed.free()))).max();
        if let Some(until) = until.filter(|until| *until > now) {
            return Err(refused(duration(until.since(now))));
        }
        if all.len() >= REMEMBER_MAX {
            all.retain(|_, tries| tries.until(FREE_TRIES) > now);
        }
        for guessed in of {
            let tries = all.entry(guessed.clone()).or_insert(Tries { failed: 0, last: now });
            if tries.last.plus(FORGET_TRIES) < now {
                tries.failed = 0;
            }
            tries.failed = tries.failed.saturating_add(1);
            tries.last = now;
        }
        Ok(())
    }

    fn take_back_here(&self, of: &[Guessed]) {
        let mut all = self.tries.lock();
        for guessed in of {
            if let Some(tries) = all.get_mut(guessed) {
                tries.failed = tries.failed.saturating_sub(1);
            }
        }
    }
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

    const NOW: Micros = Micros(1_700_000_000_000_000);

    #[test]
    fn after_five_wrong_passwords_each_try_waits_longer_up_to_a_minute() {
        let throttle = Throttle::default();
        let address = Some(IpAddr::from([10, 0, 0, 1]));
        let ann = of_password("ann@example.com", address);
        let mut now = NOW;
        for _ in 0..5 {
            assert!(throttle.count_here(&ann, now).is_ok());
        }
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            let almost = now.plus(Span(Span::seconds(wait).0 - 1));
            let refused = throttle.count_here(&ann, almost).unwrap_err();
            assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS, "{wait}");
            for (email, from) in [("ann@example.com", Some(IpAddr::from([10, 0, 0, 2]))), ("bob@example.com", address)]
            {
                let other = of_password(email, from);
                assert!(throttle.count_here(&other, almost).is_ok(), "{email} {from:?}");
                throttle.take_back_here(&other);
            }
            now = now.plus(Span::seconds(wait));
            assert!(throttle.count_here(&ann, now).is_ok());
        }
    }

    #[test]
    fn whoever_has_many_addresses_of_one_network_has_no_more_tries() {
        let throttle = Throttle::default();
        let tries = |host: u16, net: u16| {
            let from = IpAddr::from([0x2001, 0xdb8, 0, net, 0, 0, 0, host]);
            throttle.count_here(&of_password("ann@example.com", Some(from)), NOW).is_ok()
        };
        assert!((0..5).all(|host| tries(host, 1)));
        assert!(!tries(5, 1) && tries(5, 2));
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(network(mapped), IpAddr::from([10, 0, 0, 1]));
    }
}
