//! The root supervisor: starts a workspace's actor, and starts it again when it failed.

use crate::system::Deps;
use crate::tenant::{Phase, Tenant};
use crate::workspace::WorkspaceActor;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent, async_trait};
use sql::store::StoreError;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

pub(crate) enum RootMsg {
    /// Starts the actor of a workspace.
    Start(Arc<Tenant>),
}

pub(crate) struct RootActor;

/// Failures of one workspace of late.
struct Failures {
    count: u32,
    last: Instant,
}

pub(crate) struct State {
    deps: Arc<Deps>,
    children: HashMap<ActorId, Arc<Tenant>>,
    failures: HashMap<engine::event::WorkspaceId, Failures>,
}

/// The wait before the second restart in a row; it doubles up to [`BACKOFF_MAX`].
const BACKOFF: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The wait while the store that has the state cannot be reached.
const STORE_AGAIN: Duration = Duration::from_secs(1);

/// A workspace that ran this long without failing starts over at the shortest wait.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

#[async_trait]
impl Actor for RootActor {
    type Msg = RootMsg;
    type State = State;
    type Arguments = Arc<Deps>;

    async fn pre_start(&self, _: ActorRef<RootMsg>, deps: Arc<Deps>) -> Result<State, ActorProcessingErr> {
        Ok(State { deps, children: HashMap::new(), failures: HashMap::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<RootMsg>,
        message: RootMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let RootMsg::Start(tenant) = message;
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
            SupervisionEvent::ActorFailed(cell, error) => {
                let Some(tenant) = state.children.remove(&cell.get_id()) else { return Ok(()) };
                tenant.left(cell.get_id(), Phase::Failed);
                tenant.counters.restarts.fetch_add(1, Relaxed);
                *tenant.counters.last_failure.lock() = Some(error.to_string());
                let wait = match error.downcast_ref::<StoreError>() {
                    // its state is there, and nothing of its own is to blame
                    Some(StoreError::Unreachable { .. } | StoreError::Busy { .. }) => STORE_AGAIN,
                    _ => {
                        tenant.accuse();
                        state.backoff(&tenant)
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
    /// At once the first time, then ever later, with jitter so that many do not start together.
    fn backoff(&mut self, tenant: &Tenant) -> Duration {
        let now = Instant::now();
        let failures = self.failures.entry(tenant.id.clone()).or_insert(Failures { count: 0, last: now });
        if now.duration_since(failures.last) > HEALTHY_AFTER {
            failures.count = 0;
        }
        failures.last = now;
        failures.count += 1;
        if failures.count == 1 {
            return Duration::ZERO;
        }
        let most = BACKOFF.saturating_mul(1 << (failures.count - 2).min(16)).min(BACKOFF_MAX);
        most.mul_f64(rand::random_range(0.5..=1.0))
    }
}
