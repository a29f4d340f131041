//! The root supervisor: starts a workspace's actor and the notifier, and starts them again when they failed.

use crate::notifier::NotifierActor;
use crate::system::Deps;
use crate::tenant::{Phase, Tenant};
use crate::workspace::{Outrun, WorkspaceActor};
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent, async_trait};
use sql::store::StoreError;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

pub(crate) enum RootMsg {
    /// Starts the actor of a workspace.
    Start(Arc<Tenant>),
    StartNotifier,
}

pub(crate) struct RootActor;

/// Failures of one actor of late.
#[derive(Default)]
pub(crate) struct Failures {
    count: u32,
    last: Option<Instant>,
}

pub(crate) struct State {
    deps: Arc<Deps>,
    children: HashMap<ActorId, Arc<Tenant>>,
    failures: HashMap<engine::event::WorkspaceId, Failures>,
    notifier: Option<ActorId>,
    notifier_failures: Failures,
}

/// The wait before the second restart in a row; it doubles up to [`BACKOFF_MAX`].
const BACKOFF: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The wait while the store that has the state cannot be reached.
const STORE_AGAIN: Duration = Duration::from_secs(1);

/// An actor that ran this long without failing starts over at the shortest wait.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

#[async_trait]
impl Actor for RootActor {
    type Msg = RootMsg;
    type State = State;
    type Arguments = Arc<Deps>;

    async fn pre_start(&self, myself: ActorRef<RootMsg>, deps: Arc<Deps>) -> Result<State, ActorProcessingErr> {
        myself.send_message(RootMsg::StartNotifier)?;
        let (children, failures) = (HashMap::new(), HashMap::new());
        Ok(State { deps, children, failures, notifier: None, notifier_failures: Failures::default() })
    }

    async fn handle(
        &self,
        myself: ActorRef<RootMsg>,
        message: RootMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        #[cfg(test)]
        crate::fault_point::handling("root", &crate::fault_point::name_of(&state.deps));
        let tenant = match message {
            RootMsg::Start(tenant) => tenant,
            RootMsg::StartNotifier => return state.start_notifier(&myself).await,
        };
        if tenant.gone.load(Relaxed) || tenant.actor().is_some() {
            return Ok(());
        }
        let start = (tenant.clone(), state.deps.clone());
        match Actor::spawn_linked(None, WorkspaceActor, start, myself.get_cell()).await {
            Ok((actor, _)) => _ = state.children.insert(actor.get_id(), tenant),
            Err(error) => {
                tenant.set_phase(Phase::Failed);
                tracing::error!(workspace = %tenant.id, %error, "workspace could not be started; trying again");
                drop(myself.send_after(BACKOFF_MAX, || RootMsg::Start(tenant)));
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RootMsg>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(cell, error) if state.notifier == Some(cell.get_id()) => {
                state.deps.notifier.failed(error.to_string());
                let wait = state.notifier_failures.backoff();
                tracing::error!(%error, ?wait, "the notifier failed; starting it again");
                drop(myself.send_after(wait, || RootMsg::StartNotifier));
            }
            SupervisionEvent::ActorFailed(cell, error) => {
                let Some(tenant) = state.children.remove(&cell.get_id()) else { return Ok(()) };
                tenant.left(cell.get_id(), Phase::Failed);
                tenant.counters.restarts.fetch_add(1, Relaxed);
                *tenant.counters.last_failure.lock() = Some(error.to_string());
                let wait = match error.downcast_ref::<StoreError>() {
                    // nothing of its own is to blame
                    Some(StoreError::Unreachable { .. } | StoreError::Busy { .. } | StoreError::Damaged { .. }) => {
                        STORE_AGAIN
                    }
                    None if error.is::<Outrun>() => STORE_AGAIN,
                    _ => {
                        tenant.accuse();
                        state.failures.entry(tenant.id.clone()).or_default().backoff()
                    }
                };
                tracing::error!(workspace = %tenant.id, %error, ?wait, "workspace failed; starting it again from its checkpoint");
                drop(myself.send_after(wait, || RootMsg::Start(tenant)));
            }
            SupervisionEvent::ActorTerminated(cell, ..) => {
                if let Some(tenant) = state.children.remove(&cell.get_id()) {
                    tenant.left(cell.get_id(), Phase::Resting);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl State {
    async fn start_notifier(&mut self, myself: &ActorRef<RootMsg>) -> Result<(), ActorProcessingErr> {
        let started = Actor::spawn_linked(None, NotifierActor, self.deps.clone(), myself.get_cell()).await;
        let (notifier, _) = started?;
        self.notifier = Some(notifier.get_id());
        Ok(())
    }
}

impl Failures {
    /// At once the first time, then ever later, with jitter so that many do not start together.
    pub(crate) fn backoff(&mut self) -> Duration {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) > HEALTHY_AFTER) {
            self.count = 0;
        }
        self.last = Some(now);
        self.count += 1;
        if self.count == 1 {
            return Duration::ZERO;
        }
        let most = BACKOFF.saturating_mul(1 << (self.count - 2).min(16)).min(BACKOFF_MAX);
        most.mul_f64(rand::random_range(0.5..=1.0))
    }
}
