//! How much a workspace and a user may ask for: token buckets, filled as time goes by. What each tier has is
//! configured; what a tier does not name is bounded by `limits` alone. What a tier gives an hour is one bucket for all
//! nodes where there is Redis; each node keeps its own beside it, which counts on while Redis is gone.

use crate::problem::Problem;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use cache::Level;
use engine::event::{Micros, WorkspaceId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Duration;

/// What the workspaces of one tier may ask for; nothing: as much as the server can.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tier {
    /// Requests an hour of one user or key: all of a key, and those of a signed-in user that change something, ask in
    /// SQL or run an agent; each live query and each run over the WebSocket too. What a console reads and events are not
    /// counted.
    pub requests_per_hour: Option<u32>,
    /// Agent runs an hour of the whole workspace.
    pub agent_runs_per_hour: Option<u32>,
    /// Events a second of the whole workspace; ten seconds' worth may come at once.
    pub events_per_second: Option<u32>,
    /// Metrics, beside `limits.metrics`.
    pub metrics: Option<usize>,
    /// Streams of its own, beside `limits.streams`.
    pub streams: Option<usize>,
    /// Live connections that follow its channels at once, beside `limits.connections_per_workspace`.
    pub connections: Option<usize>,
    /// Days of event time for which final rows of its metrics are kept, beside what each metric's `retain` says.
    pub retain_days: Option<u32>,
}

impl Tier {
    /// Whether it allows no more than `other` in anything.
    pub(crate) fn is_within(&self, other: &Tier) -> bool {
        fn least<T: PartialOrd>(a: Option<T>, b: Option<T>) -> bool {
            b.is_none_or(|b| a.is_some_and(|a| a <= b))
        }
        least(self.requests_per_hour, other.requests_per_hour)
            && least(self.agent_runs_per_hour, other.agent_runs_per_hour)
            && least(self.events_per_second, other.events_per_second)
            && least(self.metrics, other.metrics)
            && least(self.streams, other.streams)
            && least(self.connections, other.connections)
            && least(self.retain_days, other.retain_days)
    }
}

/// The tiers there are unless others are configured, the smallest first.
pub fn default_tiers() -> Vec<(&'static str, Tier)> {
    let free = Tier {
        requests_per_hour: Some(30),
        agent_runs_per_hour: Some(10),
        events_per_second: Some(1_000),
        metrics: Some(20),
        streams: Some(10),
        connections: Some(100),
        retain_days: None,
    };
    let premium = Tier {
        requests_per_hour: Some(100),
        agent_runs_per_hour: Some(50),
        events_per_second: Some(20_000),
        metrics: Some(200),
        streams: Some(50),
        connections: Some(1_000),
        retain_days: None,
    };
    vec![("free", free), ("premium", premium), ("enterprise", Tier::default())]
}

/// A bucket that holds `burst` tokens when full and gains `rate` a second.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Micros,
}

/// Events of so many seconds may come at once.
const EVENTS_WINDOW: u64 = 10;

/// A bucket's size and speed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Rate {
    burst: f64,
    per_second: f64,
    /// Seconds in which as many tokens come as the bucket holds.
    window: u64,
}

impl Rate {
    pub(crate) fn per_hour(most: u32) -> Rate {
        Rate { burst: f64::from(most), per_second: f64::from(most) / 3600.0, window: 3600 }
    }

    pub(crate) fn per_minute(most: u32) -> Rate {
        Rate { burst: f64::from(most), per_second: f64::from(most) / 60.0, window: 60 }
    }

    /// As all nodes share it.
    pub(crate) fn shared(self) -> cache::Rate {
        cache::Rate { burst: self.burst, per_second: self.per_second }
    }

    pub(crate) fn of_events(per_second: u32) -> Rate {
        let per_second = f64::from(per_second);
        Rate { burst: per_second * EVENTS_WINDOW as f64, per_second, window: EVENTS_WINDOW }
    }

    /// What a full bucket holds.
    pub(crate) fn burst(self) -> u64 {
        self.burst as u64
    }
}

/// How a bucket stands after it was asked.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Standing {
    pub(crate) limit: u64,
    pub(crate) remaining: u64,
    pub(crate) window: u64,
    /// Until one token is there; zero while there are some.
    pub(crate) wait: Duration,
    /// Until the bucket is full.
    pub(crate) reset: Duration,
}

impl Bucket {
    /// Takes `n` tokens where at least one is there. More than there are makes a debt, which later requests wait for:
    /// so a batch larger than the bucket still goes through, and the rate holds.
    fn take(&mut self, rate: Rate, n: f64, now: Micros) -> Result<Standing, Standing> {
        let seconds = now.since(self.at).0.max(0) as f64 / 1e6;
        self.tokens = (self.tokens + seconds * rate.per_second).min(rate.burst);
        self.at = self.at.max(now);
        let is_open = self.tokens >= 1.0;
        if is_open {
            self.tokens -= n;
        }
        let standing = Standing::of(self.tokens, rate);
        if is_open { Ok(standing) } else { Err(standing) }
    }
}

impl Standing {
    /// Of a bucket with so many tokens.
    fn of(tokens: f64, rate: Rate) -> Standing {
        // a rate of zero never fills: one window is as good an answer as any
        let until = |wanted: f64| match (wanted - tokens).max(0.0) / rate.per_second {
            seconds if seconds.is_finite() => Duration::from_secs_f64(seconds.min(86_400.0)),
            _ => Duration::from_secs(rate.window),
        };
        Standing {
            limit: rate.burst as u64,
            remaining: tokens.max(0.0) as u64,
            window: rate.window,
            wait: if tokens >= 1.0 { Duration::ZERO } else { until(1.0) },
            reset: until(rate.burst),
        }
    }

    /// The one of this bucket and the shared one that has less left.
    fn or_stricter(self, shared: Option<Level>, rate: Rate) -> Standing {
        match shared.map(|level| Standing::of(level.tokens, rate)) {
            Some(shared) if shared.reset > self.reset => shared,
            _ => self,
        }
    }
}

/// What a bucket is for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Of {
    /// All requests of a user or key.
    User(String),
    /// Counted requests of a user or key in a workspace.
    Requests(WorkspaceId, String),
    Runs(WorkspaceId),
    Events(WorkspaceId),
}

impl Of {
    /// What the bucket is called that all nodes share. A user's requests a minute protect each node by itself, and the
    /// events of a workspace all go through one.
    pub(crate) fn shared(&self) -> Option<String> {
        match self {
            Of::Requests(workspace, user) => Some(format!("requests/{workspace}/{user}")),
            Of::Runs(workspace) => Some(format!("runs/{workspace}")),
            Of::User(_) | Of::Events(_) => None,
        }
    }
}

/// Buckets kept; full ones are forgotten beyond that.
const BUCKETS_MAX: usize = 100_000;

/// All buckets of the process.
#[derive(Default)]
pub(crate) struct Quotas {
    buckets: Mutex<HashMap<Of, (Bucket, Rate)>>,
}

impl Quotas {
    fn take(&self, of: Of, rate: Rate, n: f64, now: Micros) -> Result<Standing, Standing> {
        let mut buckets = self.buckets.lock();
        if buckets.len() >= BUCKETS_MAX && !buckets.contains_key(&of) {
            buckets.retain(|_, (bucket, rate)| {
                bucket.tokens + now.since(bucket.at).0 as f64 / 1e6 * rate.per_second < rate.burst
            });
        }
        let (bucket, known) = buckets.entry(of).or_insert((Bucket { tokens: rate.burst, at: now }, rate));
        if *known != rate {
            // another tier: what was used counts on
            bucket.tokens += rate.burst - known.burst;
            *known = rate;
        }
        bucket.take(rate, n, now)
    }

    /// How a bucket stands, without taking from it. `shared` is how the one of all nodes does.
    pub(crate) fn standing(&self, of: Of, rate: Rate, shared: Option<Level>, now: Micros) -> Standing {
        let own = self.take(of, rate, 0.0, now).unwrap_or_else(|standing| standing);
        own.or_stricter(shared, rate)
    }

    /// One request, which `shared`, the bucket of all nodes, has counted where there is one.
    pub(crate) fn request(
        &self,
        of: Of,
        rate: Rate,
        shared: Option<Level>,
        now: Micros,
    ) -> Result<Standing, Box<Refused>> {
        let name = match &of {
            Of::User(_) => "limits.user_requests_per_minute",
            Of::Runs(_) => "agent_runs_per_hour of its tier",
            Of::Requests(..) | Of::Events(_) => "requests_per_hour of its tier",
        };
        if let Some(level) = shared.filter(|level| !level.is_open) {
            let standing = Standing::of(level.tokens, rate);
            return Err(Box::new(Refused { name, standing }));
        }
        let own = self.take(of, rate, 1.0, now).map_err(|standing| Box::new(Refused { name, standing }))?;
        Ok(own.or_stricter(shared, rate))
    }

    /// How the events of a workspace stand, where its tier bounds them.
    pub(crate) fn events(&self, id: &WorkspaceId, tier: &Tier, now: Micros) -> Option<Standing> {
        let rate = Rate::of_events(tier.events_per_second?);
        Some(self.standing(Of::Events(id.clone()), rate, None, now))
    }

    /// Whether events may come now; asked before they are read.
    pub(crate) fn may_ingest(&self, id: &WorkspaceId, tier: &Tier, now: Micros) -> Result<(), Problem> {
        let Some((most, standing)) = tier.events_per_second.zip(self.events(id, tier, now)) else { return Ok(()) };
        if standing.wait.is_zero() { Ok(()) } else { Err(too_fast(most, standing)) }
    }

    /// Counts events before they are taken in: of many that come at once those are refused that come when others have
    /// used up what there was.
    pub(crate) fn ingest(&self, id: &WorkspaceId, tier: &Tier, events: usize, now: Micros) -> Result<(), Problem> {
        let Some(most) = tier.events_per_second else { return Ok(()) };
        let taken = self.take(Of::Events(id.clone()), Rate::of_events(most), events as f64, now);
        taken.map(drop).map_err(|standing| too_fast(most, standing))
    }

    /// Events that were counted were not taken in.
    pub(crate) fn give_back(&self, id: &WorkspaceId, tier: &Tier, events: usize) {
        let mut buckets = self.buckets.lock();
        if let (Some(_), Some((bucket, rate))) = (tier.events_per_second, buckets.get_mut(&Of::Events(id.clone()))) {
            bucket.tokens = (bucket.tokens + events as f64).min(rate.burst);
        }
    }
}

fn too_fast(most: u32, standing: Standing) -> Problem {
    let detail = format!(
        "this workspace sends more than events_per_second = {most} of its tier, and {EVENTS_WINDOW} s of that at once; \
         wait, or ask for another tier"
    );
    Problem::new(StatusCode::TOO_MANY_REQUESTS, "ingest_rate", detail).retry_after(standing.wait)
}

/// A request over its quota.
pub(crate) struct Refused {
    name: &'static str,
    pub(crate) standing: Standing,
}

impl From<Box<Refused>> for Problem {
    fn from(refused: Box<Refused>) -> Self {
        let Refused { name, standing } = *refused;
        let detail = format!("{name} = {} is used up; the answer says when to come again", standing.limit);
        Problem::new(StatusCode::TOO_MANY_REQUESTS, "quota_exceeded", detail).retry_after(standing.wait)
    }
}

impl Standing {
    /// Tells a client where it stands: draft-ietf-httpapi-ratelimit-headers-07, the fields of which most clients read.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        let fields = [
            ("ratelimit-limit", self.limit),
            ("ratelimit-remaining", self.remaining),
            ("ratelimit-reset", self.reset.as_secs_f64().ceil() as u64),
        ];
        for (name, value) in fields {
            headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
        }
        let policy = format!("{};w={}", self.limit, self.window);
        if let Ok(policy) = HeaderValue::from_str(&policy) {
            headers.insert(HeaderName::from_static("ratelimit-policy"), policy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::event::Span;

    const NOW: Micros = Micros(1_700_000_000_000_000);

    fn ws() -> WorkspaceId {
        "acme".parse().unwrap()
    }

    #[test]
    fn after_thirty_requests_the_next_one_waits_two_minutes() {
        let (quotas, rate) = (Quotas::default(), Rate::per_hour(30));
        let ask = |now| quotas.request(Of::Requests(ws(), "ann".into()), rate, None, now);
        for left in (0..30).rev() {
            assert_eq!(ask(NOW).map_err(drop).unwrap().remaining, left);
        }
        let refused = ask(NOW).err().unwrap();
        assert_eq!((refused.standing.wait.as_secs_f64().round(), refused.standing.limit), (120.0, 30));
        assert!(ask(NOW.plus(Span::seconds(119))).is_err() && ask(NOW.plus(Span::seconds(121))).is_ok());
        // others have quotas of their own
        assert!(quotas.request(Of::Requests(ws(), "bob".into()), rate, None, NOW).is_ok());
    }

    #[test]
    fn of_this_nodes_bucket_and_the_shared_one_the_stricter_counts() {
        let (quotas, rate) = (Quotas::default(), Rate::per_hour(30));
        let ask = |shared| quotas.request(Of::Runs(ws()), rate, shared, NOW);
        let level = |tokens| Some(Level { is_open: tokens >= 1.0, tokens });
        assert_eq!(ask(level(7.0)).map_err(drop).unwrap().remaining, 7); // others took from it too
        assert_eq!(ask(level(30.0)).map_err(drop).unwrap().remaining, 28); // Redis had forgotten
        for _ in 0..50 {
            let refused = ask(level(0.5)).err().unwrap();
            assert_eq!((refused.standing.remaining, refused.standing.wait), (0, Duration::from_secs(60)));
        }
        // what was refused cost nothing here, so that this node goes on where Redis left off
        assert_eq!(ask(None).map_err(drop).unwrap().remaining, 27);
    }

    #[test]
    fn a_batch_larger_than_the_bucket_goes_through_and_those_after_it_wait() {
        let quotas = Quotas::default();
        let tier = Tier { events_per_second: Some(100), ..Tier::default() };
        assert!(quotas.may_ingest(&ws(), &tier, NOW).is_ok());
        quotas.ingest(&ws(), &tier, 3_000, NOW).unwrap();
        for refused in [quotas.may_ingest(&ws(), &tier, NOW), quotas.ingest(&ws(), &tier, 3_000, NOW)] {
            let refused = refused.unwrap_err();
            assert_eq!((refused.status(), refused.code), (StatusCode::TOO_MANY_REQUESTS, "ingest_rate"));
        }
        assert!(quotas.may_ingest(&ws(), &tier, NOW.plus(Span::seconds(20))).is_err());
        assert!(quotas.may_ingest(&ws(), &tier, NOW.plus(Span::seconds(21))).is_ok());
        assert!(quotas.may_ingest(&ws(), &Tier::default(), NOW).is_ok());
        quotas.give_back(&ws(), &tier, 3_000);
        assert!(quotas.may_ingest(&ws(), &tier, NOW).is_ok());
    }

    #[test]
    fn a_larger_tier_counts_what_was_used() {
        let quotas = Quotas::default();
        let of = || Of::Requests(ws(), "ann".into());
        for _ in 0..30 {
            assert!(quotas.request(of(), Rate::per_hour(30), None, NOW).is_ok());
        }
        let standing = quotas.request(of(), Rate::per_hour(100), None, NOW).map_err(drop).unwrap();
        assert_eq!(standing.remaining, 69);
        let mut headers = HeaderMap::new();
        standing.tell(&mut headers);
        assert_eq!(headers["ratelimit-limit"], "100");
        assert_eq!(headers["ratelimit-policy"], "100;w=3600");
    }

    #[test]
    fn a_smaller_tier_is_within_a_larger_one() {
        let tiers: Vec<Tier> = default_tiers().into_iter().map(|(_, tier)| tier).collect();
        for pair in tiers.windows(2) {
            assert!(pair[0].is_within(&pair[1]) && !pair[1].is_within(&pair[0]));
        }
        assert!(tiers[0].is_within(&tiers[0]));
    }

    #[test]
    fn time_that_goes_back_gives_nothing() {
        let quotas = Quotas::default();
        let ask = |now| quotas.request(Of::User("ann".into()), Rate::per_minute(1), None, now).is_ok();
        assert!(ask(NOW) && !ask(NOW.minus(Span::seconds(600))) && !ask(NOW.plus(Span::seconds(1))));
        assert!(ask(NOW.plus(Span::seconds(61))));
    }
}
