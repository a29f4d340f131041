//! Tells webhooks what is in the outbox of the store, for all workspaces: tries again for hours, goes on where the last
//! process ended, and lets nobody wait for a webhook of others that is slow or away.
//!
//! A message may arrive more than once, as when the process is killed before it could note the answer; it then bears the
//! same id. One per process, as a workspace that rests has no actor and its webhooks are told all the same.

use crate::endpoint::{Answer, Courier};
use crate::system::{ActorInfo, Deps};
use crate::webhook::{WebhookConfig, sealed_for};
use engine::event::{Micros, Span};
use futures::FutureExt;
use metrics::{counter, gauge, histogram};
use parking_lot::Mutex;
use ractor::concurrency::JoinHandle;
use ractor::{Actor, ActorProcessingErr, ActorRef, MessagingErr, RpcReplyPort, async_trait};
use sql::store::{Attempt, Delivery, Due, StoreError};
use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// The wait before the second attempt; it doubles up to [`WAIT_MOST`].
const WAIT: Duration = Duration::from_secs(1);
const WAIT_MOST: Duration = Duration::from_secs(15 * 60);
/// The store is asked what is due at least this often, whoever forgot to say so.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The wait while the store cannot be asked, or does not take an answer.
const STORE_AGAIN: Duration = Duration::from_secs(1);

/// Webhooks that are remembered to fail; over it all are forgotten, and tried as if they did not.
const FAILING_MAX: usize = 10_000;

/// The status of a receiver that wants nothing any more (RFC 9110, 15.5.11).
const GONE: u16 = 410;

pub(crate) enum NotifierMsg {
    /// Something may be due.
    Wake,
    /// An attempt is over, and the store knows.
    Done { webhook: String, id: String, failed: bool },
    /// Begins nothing more, and answers when nothing is under way.
    Drain(RpcReplyPort<()>),
    #[cfg(test)]
    Fail,
}

/// The notifier as the rest of the process sees it, also while its actor is being started again.
pub(crate) struct Notifier {
    pub(crate) courier: Courier,
    actor: Mutex<Option<ActorRef<NotifierMsg>>>,
    /// A message to look is on its way already.
    woken: AtomicBool,
    under_way: AtomicUsize,
    restarts: AtomicU64,
    last_failure: Mutex<Option<String>>,
}

impl Notifier {
    /// Without an actor yet.
    pub(crate) fn new(config: &WebhookConfig) -> Result<Notifier, String> {
        Ok(Notifier {
            courier: Courier::new(config.allow_private, Duration::from_millis(config.timeout_ms))?,
            actor: Mutex::default(),
            woken: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            restarts: AtomicU64::new(0),
            last_failure: Mutex::default(),
        })
    }

    /// Something new is in the outbox.
    pub(crate) fn wake(&self) {
        if self.woken.swap(true, SeqCst) {
            return; // whoever looks next finds this too
        }
        if let Some(actor) = &*self.actor.lock() {
            _ = actor.send_message(NotifierMsg::Wake); // one that starts looks by itself
        }
    }

    /// Returns once nothing is under way; nothing more begins.
    pub(crate) async fn drain(&self) {
        let actor = self.actor.lock().clone();
        if let Some(actor) = actor {
            _ = ractor::call!(actor, NotifierMsg::Drain); // one that failed has nothing under way
        }
    }

    /// The actor failed.
    pub(crate) fn failed(&self, why: String) {
        *self.actor.lock() = None;
        self.under_way.store(0, Relaxed);
        self.restarts.fetch_add(1, Relaxed);
        *self.last_failure.lock() = Some(why);
    }

    pub(crate) fn info(&self) -> ActorInfo {
        ActorInfo {
            path: "root/webhooks/notifier".to_owned(),
            kind: "notifier".to_owned(),
            state: if self.actor.lock().is_some() { "running" } else { "restarting" }.to_owned(),
            mailbox_batches: self.under_way.load(Relaxed) as u64,
            mailbox_bytes: 0,
            restarts: self.restarts.load(Relaxed),
            last_failure: self.last_failure.lock().clone(),
            state_bytes: 0,
            batches_per_second: 0.0,
        }
    }

    #[cfg(test)]
    pub(crate) fn fail(&self) {
        if let Some(actor) = &*self.actor.lock() {
            _ = actor.send_message(NotifierMsg::Fail);
        }
    }
}

pub(crate) struct NotifierActor;

type Timer = JoinHandle<Result<(), MessagingErr<NotifierMsg>>>;

pub(crate) struct State {
    deps: Arc<Deps>,
    /// By webhook, the deliveries that are under way.
    under_way: HashMap<String, HashSet<String>>,
    /// Webhooks whose last attempt failed.
    failing: HashSet<String>,
    /// Dropped with the state, so that an actor that is started again is alone.
    attempts: JoinSet<()>,
    timer: Option<Timer>,
    draining: Option<RpcReplyPort<()>>,
}

#[async_trait]
impl Actor for NotifierActor {
    type Msg = NotifierMsg;
    type State = State;
    type Arguments = Arc<Deps>;

    async fn pre_start(&self, myself: ActorRef<NotifierMsg>, deps: Arc<Deps>) -> Result<State, ActorProcessingErr> {
        *deps.notifier.actor.lock() = Some(myself.clone());
        deps.notifier.woken.store(false, SeqCst);
        deps.notifier.wake();
        Ok(State {
            deps,
            under_way: HashMap::new(),
            failing: HashSet::new(),
            attempts: JoinSet::new(),
            timer: None,
            draining: None,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<NotifierMsg>,
        message: NotifierMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NotifierMsg::Wake => state.look(&myself).await,
            NotifierMsg::Done { webhook, id, failed } => state.on_done(webhook, &id, failed),
            NotifierMsg::Drain(reply) => state.draining = Some(reply),
            #[cfg(test)]
            NotifierMsg::Fail => panic!("a test said so"),
        }
        if state.under_way.is_empty()
            && let Some(reply) = state.draining.take()
        {
            _ = reply.send(()); // who asked may have given up
            myself.stop(Some("drained".to_owned()));
        }
        Ok(())
    }
}

impl State {
    /// Begins what is due, as far as there is room.
    async fn look(&mut self, myself: &ActorRef<NotifierMsg>) {
        let deps = self.deps.clone();
        deps.notifier.woken.store(false, SeqCst); // what is stored from here on wakes again
        let under_way: usize = self.under_way.values().map(HashSet::len).sum();
        let room = deps.webhooks.connections.max(1).saturating_sub(under_way);
        if room == 0 || self.draining.is_some() {
            return; // the next to end wakes
        }
        let now = deps.clock.now();
        let full = |(webhook, ids): (&String, &HashSet<String>)| ids.len() >= self.most(webhook);
        let full: Vec<&str> = self.under_way.iter().filter(|entry| full(*entry)).map(|(id, _)| id.as_str()).collect();
        let found = async {
            let due = deps.store.due_deliveries(now, deps.webhooks.concurrency.max(1), room, &full).await?;
            Ok::<_, StoreError>((due, deps.store.next_delivery(now).await?))
        };
        let wait = match found.await {
            Ok((due, next)) => {
                due.into_iter().for_each(|due| self.begin(myself, due));
                next.map_or(LOOK_EVERY, |next| Duration::from_micros(next.since(now).0.unsigned_abs()).min(LOOK_EVERY))
            }
            Err(error) => {
                tracing::warn!(%error, "what webhooks are to be told cannot be read; trying again");
                STORE_AGAIN
            }
        };
        let timer = myself.send_after(wait, || NotifierMsg::Wake);
        if let Some(before) = self.timer.replace(timer) {
            before.abort();
        }
    }

    /// Deliveries to this webhook that may be under way at the same time.
    fn most(&self, webhook: &str) -> usize {
        if self.failing.contains(webhook) { 1 } else { self.deps.webhooks.concurrency.max(1) }
    }

    fn begin(&mut self, myself: &ActorRef<NotifierMsg>, due: Due) {
        let (webhook, id) = (due.delivery.webhook.clone(), due.delivery.id.clone());
        let most = self.most(&webhook);
        let ids = self.under_way.entry(webhook.clone()).or_default();
        if ids.len() >= most || !ids.insert(id.clone()) {
            return;
        }
        self.count();
        let (deps, myself) = (self.deps.clone(), myself.clone());
        self.attempts.spawn(async move {
            // a panic must not take the place for good
            let tried = AssertUnwindSafe(attempt(&deps, &due)).catch_unwind().await;
            let attempt = tried.unwrap_or_else(|_| {
                let failed = Err("sending it panicked; the log says more".to_owned());
                judge(due.delivery.attempts, deadline(&deps, &due.delivery), failed, deps.clock.now(), 1.0)
            });
            record(&deps, &due.delivery, &attempt).await;
            _ = myself.send_message(NotifierMsg::Done { webhook, id, failed: attempt.error.is_some() });
        });
    }

    fn on_done(&mut self, webhook: String, id: &str, failed: bool) {
        while self.attempts.try_join_next().is_some() {}
        if let Some(ids) = self.under_way.get_mut(&webhook) {
            ids.remove(id);
            if ids.is_empty() {
                self.under_way.remove(&webhook);
            }
        }
        self.count();
        if self.failing.len() >= FAILING_MAX {
            self.failing.clear();
        }
        match failed {
            true => _ = self.failing.insert(webhook),
            false => _ = self.failing.remove(&webhook),
        }
        self.deps.notifier.wake(); // behind all that are done by now
    }

    fn count(&self) {
        let under_way = self.under_way.values().map(HashSet::len).sum();
        self.deps.notifier.under_way.store(under_way, Relaxed);
        gauge!("tidewatch_webhook_deliveries_under_way").set(under_way as f64);
    }
}

/// Tells the webhook once.
async fn attempt(deps: &Deps, due: &Due) -> Attempt {
    let delivery = &due.delivery;
    let began = Instant::now();
    let (owner, now) = (sealed_for(&delivery.workspace, &delivery.webhook), deps.clock.now());
    let previous = due.previous.iter().filter(|(_, until)| *until > now).map(|(secret, _)| secret);
    let secrets: Result<Vec<Vec<u8>>, _> =
        [&due.secret].into_iter().chain(previous).map(|sealed| deps.sealer.open(&owner, sealed)).collect();
    let answer = match secrets {
        Ok(secrets) => deps.notifier.courier.post(&due.url, &secrets, [&delivery.id, &due.body], now).await,
        Err(error) => Err(error.to_string()),
    };
    histogram!("tidewatch_webhook_seconds").record(began.elapsed().as_secs_f64());
    judge(delivery.attempts, deadline(deps, delivery), answer, deps.clock.now(), rand::random())
}

/// Nothing is tried again after it.
fn deadline(deps: &Deps, delivery: &Delivery) -> Micros {
    delivery.created_at.plus(deps.webhooks.retry_for())
}

/// What is to become of a delivery that was tried `before` times before, after an attempt that ended at `at`.
fn judge(before: u64, deadline: Micros, answer: Result<Answer, String>, at: Micros, dice: f64) -> Attempt {
    let (status, asked, error) = match answer {
        Ok(Answer { status: status @ 200..300, .. }) => {
            return Attempt { at, status: Some(status), error: None, next_at: None };
        }
        Ok(Answer { status: GONE, .. }) => {
            let error = Some("the answer was 410 Gone".to_owned());
            return Attempt { at, status: Some(GONE), error, next_at: None };
        }
        Ok(Answer { status: status @ 300..400, .. }) => {
            (Some(status), None, format!("the answer was {status}; redirects are not followed"))
        }
        Ok(Answer { status, retry_after }) => (Some(status), retry_after, format!("the answer was {status}")),
        Err(error) => (None, None, error),
    };
    let wait = backoff(before, dice).max(asked.unwrap_or_default());
    let next_at = at.plus(Span(i64::try_from(wait.as_micros()).unwrap_or(i64::MAX)));
    let next_at = (next_at <= deadline).then_some(next_at);
    Attempt { at, status, error: Some(error), next_at }
}

/// How long to wait after `before` attempts and one more: twice as long each time up to [`WAIT_MOST`], and between half
/// of that and all of it as `dice`, 0 to 1, says, so that many do not come back together.
fn backoff(before: u64, dice: f64) -> Duration {
    let doubled = WAIT.saturating_mul(1 << before.min(16));
    doubled.min(WAIT_MOST).mul_f64(0.5 + dice / 2.0)
}

/// Notes what came of an attempt, however long the store is away: without it the webhook would be told again.
async fn record(deps: &Deps, delivery: &Delivery, attempt: &Attempt) {
    let outcome = match (&attempt.error, attempt.next_at) {
        (None, _) => "delivered",
        (Some(_), Some(_)) => "retried",
        (Some(_), None) => "failed",
    };
    counter!("tidewatch_webhook_attempts_total", "outcome" => outcome).increment(1);
    if let Some(error) = &attempt.error {
        let Delivery { workspace, webhook, id, .. } = delivery;
        tracing::info!(%workspace, webhook, id, error, outcome, "a webhook could not be told");
    }
    while let Err(error) = store(deps, delivery, attempt).await {
        tracing::warn!(%error, id = delivery.id, "what came of a delivery could not be stored; trying again");
        tokio::time::sleep(STORE_AGAIN).await;
    }
}

async fn store(deps: &Deps, delivery: &Delivery, attempt: &Attempt) -> Result<(), StoreError> {
    deps.store.record_attempt(delivery, attempt).await?;
    if attempt.status == Some(GONE) {
        let why = "it answered 410 Gone";
        deps.store.disable_webhook(&delivery.workspace, &delivery.webhook, why, attempt.at).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: i64 = 3_600_000_000;

    fn answer(status: u16, retry_after: Option<u64>) -> Result<Answer, String> {
        Ok(Answer { status, retry_after: retry_after.map(Duration::from_secs) })
    }

    fn at(seconds: f64) -> Option<Micros> {
        Some(Micros((seconds * 1e6) as i64))
    }

    #[test]
    fn what_a_receiver_answers_decides_what_becomes_of_a_delivery() {
        let judged = |before, answer| {
            let attempt = judge(before, Micros(HOUR), answer, Micros(0), 1.0);
            (attempt.error, attempt.next_at)
        };
        for good in [200, 204, 299] {
            assert_eq!(judged(0, answer(good, Some(9))), (None, None), "{good}");
        }
        let said = |text: &str| Some(text.to_owned());
        for (before, answer, error, next) in [
            (0, answer(500, None), "the answer was 500", at(1.0)),
            (3, answer(404, None), "the answer was 404", at(8.0)),
            (0, answer(100, None), "the answer was 100", at(1.0)),
            (0, answer(429, Some(30)), "the answer was 429", at(30.0)),
            (9, answer(503, Some(30)), "the answer was 503", at(512.0)),
            (0, answer(503, Some(3_601)), "the answer was 503", None),
            (0, answer(302, Some(30)), "the answer was 302; redirects are not followed", at(1.0)),
            (0, answer(410, Some(30)), "the answer was 410 Gone", None),
            (0, Err("connection refused".to_owned()), "connection refused", at(1.0)),
        ] {
            assert_eq!(judged(before, answer), (said(error), next), "{error} {next:?}");
        }
        let last = judge(5, Micros(HOUR), answer(500, None), Micros(HOUR), 0.0);
        assert_eq!((last.status, last.next_at), (Some(500), None), "the time is over");
    }

    proptest! {
        #[test]
        fn the_wait_grows_to_its_bound_and_jitter_takes_at_most_half(before in 0_u64..1_000, dice in 0.0..=1.0) {
            let wait = backoff(before, dice);
            let most = backoff(before, 1.0);
            prop_assert!(most / 2 <= wait && wait <= most);
            prop_assert!(most <= WAIT_MOST && backoff(before + 1, 1.0) >= most);
            prop_assert_eq!(backoff(0, 1.0), WAIT);
            prop_assert_eq!(backoff(before + 10, 1.0), WAIT_MOST);
        }
    }
}
