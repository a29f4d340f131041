//! Which run is on which thread. A session is the actor of one thread: it takes one run after the other, goes when it
//! idles, and is restarted when an agent panics in it; runs that waited then go on.

use super::analyst::Analyst;
use super::conversation::{Conversation, Merged, id_of};
use super::guard::Guard;
use super::model::{AgentConfig, Model};
use super::run::{Resolution, Run};
use super::run_log::{RunHandle, RunLog};
use super::{Agent, AgentInfo, Failure, Interrupt, Outcome, RunEvent, RunRequest, recorder};
use crate::fault::{Fault, FaultKind};
use crate::system::{ActorInfo, System};
use engine::event::{ItemName, Micros, WorkspaceId};
use futures::FutureExt;
use parking_lot::Mutex;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent, async_trait};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sql::store::{Run as StoredRun, Thread};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OnceCell, watch};

/// Threads that may have a session at a time.
const SESSIONS_MAX: usize = 10_000;
/// Runs that may wait for their turn on one thread.
const WAITING_MAX: usize = 8;
/// How long one run may take.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// A session without a run for so long stops.
const IDLE_AFTER: Duration = Duration::from_secs(60);
/// Bytes of the logs of runs that are over and still answered from memory.
const OVER_BYTES_MAX: usize = 64 << 20;
/// Bytes of a thread or run id.
const ID_BYTES_MAX: usize = 512;
/// The newest messages of a thread that a run reads.
const MESSAGES_MAX: usize = 2_000;
/// How long [`Sessions::stop`] waits for runs to end.
const STOP_WITHIN: Duration = Duration::from_secs(3);
const TITLE_CHARS: usize = 80;

/// All agent sessions of the process.
pub struct Sessions {
    agents: BTreeMap<ItemName, Arc<dyn Agent>>,
    shared: Arc<Shared>,
    supervisor: OnceCell<ActorRef<SupervisorMsg>>,
    /// Whether the supervisor has ended.
    ended: watch::Sender<bool>,
}

struct Shared {
    table: Mutex<Table>,
    /// Runs whose end is not stored yet.
    recording: watch::Sender<usize>,
    run_limit: Duration,
    idle_after: Duration,
}

type Key = (WorkspaceId, String);

#[derive(Default)]
struct Table {
    /// By thread.
    slots: HashMap<Key, Slot>,
    /// By run.
    runs: HashMap<Key, Arc<RunLog>>,
    /// Runs that are over and stored, oldest first.
    over: VecDeque<Key>,
    over_bytes: usize,
    stopping: bool,
}

/// A thread that has a session.
#[derive(Default)]
struct Slot {
    active: Option<String>,
    waiting: VecDeque<Job>,
    actor: Option<ActorRef<SessionMsg>>,
    restarts: u64,
    last_failure: Option<String>,
}

/// A run that was accepted. Dropped before it ran, its guard ends it as failed.
struct Job {
    system: System,
    workspace: WorkspaceId,
    agent: Arc<dyn Agent>,
    request: RunRequest,
    guard: Guard,
}

/// What the store keeps as the state of a thread.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// AG-UI shared state.
    shared: Value,
    /// What the thread waits for.
    interrupts: Vec<Interrupt>,
}

impl Sessions {
    /// No session yet; the built-in `analyst`, and one agent for each model of the configuration, which may take the
    /// analyst's place.
    pub fn new(agents: BTreeMap<ItemName, AgentConfig>) -> Self {
        let analyst: ItemName = "analyst".parse().expect("a valid name");
        let mut all: BTreeMap<ItemName, Arc<dyn Agent>> = BTreeMap::from([(analyst, Arc::new(Analyst) as _)]);
        all.extend(agents.into_iter().map(|(name, config)| (name, Arc::new(Model::new(config)) as _)));
        Self::of(all, RUN_LIMIT, IDLE_AFTER)
    }

    pub(super) fn of(agents: BTreeMap<ItemName, Arc<dyn Agent>>, run_limit: Duration, idle_after: Duration) -> Self {
        let shared = Shared { table: Mutex::default(), recording: watch::Sender::new(0), run_limit, idle_after };
        Self { agents, shared: Arc::new(shared), supervisor: OnceCell::new(), ended: watch::Sender::new(false) }
    }

    pub fn agents(&self) -> Vec<AgentInfo> {
        self.agents.iter().map(|(name, agent)| agent.info(name)).collect()
    }

    /// Starts a run, or attaches to it when the workspace knows it on this thread. A run on a busy thread waits its
    /// turn; with `forwarded.busy = "reject"` it is refused as `thread_busy`.
    pub async fn start(&self, system: System, ws: &WorkspaceId, request: RunRequest) -> Result<RunHandle, Fault> {
        let agent = self.agents.get(&request.agent).cloned();
        let agent = agent.ok_or_else(|| {
            let detail = format!("there is no agent `{}`; GET agents names those there are", request.agent);
            Fault::not_found("unknown_agent", detail)
        })?;
        check_id("threadId", &request.thread)?;
        check_id("runId", &request.run)?;
        if let Some(handle) = self.known(ws, &request)? {
            return Ok(handle);
        }
        if let Some(run) = system.store().run(ws, &request.run).await? {
            same_thread(&run.run_id, &run.thread, &request.thread)?;
            return Ok(RunHandle::new(recorder::restored(&system, &run).await?, 0, true));
        }
        if request.is_recall() {
            return self.recall(&system, ws, request).await;
        }
        let key = (ws.clone(), request.thread.clone());
        let (handle, actor) = {
            let mut table = self.shared.table.lock();
            // it may have come in between
            if let Some(log) = table.runs.get(&(ws.clone(), request.run.clone())) {
                same_thread(&log.run, &log.thread, &request.thread)?;
                return Ok(RunHandle::new(log.clone(), 0, true));
            }
            if table.stopping {
                let kind = FaultKind::Busy { retry_after: Duration::from_secs(5) };
                return Err(Fault::new(kind, "shutting_down", "the server is stopping; ask again in a moment"));
            }
            if table.slots.len() >= SESSIONS_MAX && !table.slots.contains_key(&key) {
                let kind = FaultKind::Busy { retry_after: Duration::from_secs(5) };
                let detail = format!("{SESSIONS_MAX} threads are busy already; ask again in a moment");
                return Err(Fault::new(kind, "too_many_sessions", detail));
            }
            let slot = table.slots.entry(key.clone()).or_default();
            slot.admit(&request)?;
            let log = new_log(&system, ws, &request, true);
            let handle = RunHandle::new(log.clone(), 0, false);
            let run = request.run.clone();
            let guard = Guard::new(log.clone());
            slot.waiting.push_back(Job { system, workspace: ws.clone(), agent, request, guard });
            let actor = slot.actor.clone();
            table.runs.insert((ws.clone(), run), log);
            (handle, actor)
        };
        match actor {
            // an actor that is going down has a supervisor that looks after the queue
            Some(actor) => _ = actor.send_message(SessionMsg::Work),
            None => self.supervisor().await?.send_message(SupervisorMsg::Ensure(key)).map_err(Fault::internal)?,
        }
        Ok(handle)
    }

    /// A reader of a run from behind its event `after`.
    pub async fn attach(&self, system: &System, ws: &WorkspaceId, run: &str, after: u64) -> Result<RunHandle, Fault> {
        if let Some(log) = self.in_memory(ws, run) {
            return Ok(RunHandle::new(log, after, true));
        }
        let stored = system.store().run(ws, run).await?.ok_or_else(|| unknown_run(run))?;
        // a run that began in between
        let log = match self.in_memory(ws, run) {
            Some(log) => log,
            None => recorder::restored(system, &stored).await?,
        };
        Ok(RunHandle::new(log, after, true))
    }

    /// A reader of the newest run on a thread.
    pub async fn last_run(&self, system: &System, ws: &WorkspaceId, thread: &str) -> Result<Option<RunHandle>, Fault> {
        let run = match self.active_run(ws, thread) {
            Some(run) => Some(run),
            None => system.store().last_run(ws, thread).await?.map(|run| run.run_id),
        };
        match run {
            Some(run) => self.attach(system, ws, &run, 0).await.map(Some),
            None => Ok(None),
        }
    }

    /// Asks a run to stop, also while it waits; one that is over stays as it is.
    pub async fn cancel(&self, system: &System, ws: &WorkspaceId, run: &str) -> Result<(), Fault> {
        if let Some(log) = self.in_memory(ws, run) {
            log.cancel();
            return Ok(());
        }
        system.store().run(ws, run).await?.map(|_| ()).ok_or_else(|| unknown_run(run))
    }

    /// Id of the user who asked for a run that goes on, or was over a while ago.
    pub fn run_user(&self, ws: &WorkspaceId, run: &str) -> Option<String> {
        self.in_memory(ws, run)?.user.clone()
    }

    /// The run that a thread is busy with.
    pub fn active_run(&self, ws: &WorkspaceId, thread: &str) -> Option<String> {
        let table = self.shared.table.lock();
        table.slots.get(&(ws.clone(), thread.to_owned()))?.busy_with()
    }

    /// Ends and forgets all runs of a workspace that is being deleted, so that none is shown in another of its name.
    pub fn forget(&self, ws: &WorkspaceId) {
        let mut table = self.shared.table.lock();
        let mut waiting = Vec::new();
        for ((of, _), slot) in &mut table.slots {
            if of == ws {
                waiting.extend(slot.waiting.drain(..));
            }
        }
        table.runs.retain(|(of, _), log| {
            if of == ws {
                log.cancel();
            }
            of != ws
        });
        drop(table);
        drop(waiting); // their guards end them, which may take the way to the outlet
    }

    /// The sessions as actors.
    pub fn info(&self) -> Vec<ActorInfo> {
        let table = self.shared.table.lock();
        let mut all: Vec<ActorInfo> = table
            .slots
            .iter()
            .map(|((ws, thread), slot)| ActorInfo {
                path: format!("root/sessions/{ws}/{thread}"),
                kind: "agent session".to_owned(),
                state: if slot.actor.is_some() { "running" } else { "restarting" }.to_owned(),
                mailbox_batches: slot.waiting.len() as u64,
                mailbox_bytes: 0,
                restarts: slot.restarts,
                last_failure: slot.last_failure.clone(),
                state_bytes: slot
                    .active
                    .as_ref()
                    .and_then(|run| table.runs.get(&(ws.clone(), run.clone())))
                    .map_or(0, |log| log.bytes() as u64),
                batches_per_second: 0.0,
            })
            .collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all
    }

    /// Ends the runs that the last stop of the process cut off. Once, before the first run.
    pub async fn recover(&self, system: &System) -> Result<(), Fault> {
        for run in system.store().unfinished_runs().await? {
            recorder::end_interrupted(system, &run).await?;
        }
        Ok(())
    }

    /// Takes no more runs, cancels those there are, and returns once their ends are stored.
    pub async fn stop(&self) {
        let logs: Vec<Arc<RunLog>> = {
            let mut table = self.shared.table.lock();
            table.stopping = true;
            table.runs.values().cloned().collect()
        };
        logs.iter().for_each(|log| log.cancel());
        let mut recording = self.shared.recording.subscribe();
        let idle = async {
            for log in &logs {
                let mut reader = RunHandle::new(log.clone(), 0, true);
                while reader.next().await.is_some() {}
            }
            _ = recording.wait_for(|count| *count == 0).await; // the sender lives in self
        };
        if tokio::time::timeout(STOP_WITHIN, idle).await.is_err() {
            tracing::warn!("not all agent runs ended in time; the next start ends them as interrupted");
        }
        if let Some(supervisor) = self.supervisor.get() {
            supervisor.stop(None);
        }
    }

    pub(super) fn in_memory(&self, ws: &WorkspaceId, run: &str) -> Option<Arc<RunLog>> {
        self.shared.table.lock().runs.get(&(ws.clone(), run.to_owned())).cloned()
    }

    fn known(&self, ws: &WorkspaceId, request: &RunRequest) -> Result<Option<RunHandle>, Fault> {
        let Some(log) = self.in_memory(ws, &request.run) else { return Ok(None) };
        same_thread(&log.run, &log.thread, &request.thread)?;
        Ok(Some(RunHandle::new(log, 0, true)))
    }

    /// Shows what a thread holds, beside whatever runs on it.
    async fn recall(&self, system: &System, ws: &WorkspaceId, request: RunRequest) -> Result<RunHandle, Fault> {
        let (kept, messages) = match system.store().thread(ws, &request.thread).await? {
            Some(thread) => (kept(&thread), stored_messages(system, ws, &request.thread).await?),
            None => (Kept { shared: request.state.clone(), interrupts: Vec::new() }, Vec::new()),
        };
        let log = new_log(system, ws, &request, false);
        let handle = RunHandle::new(log.clone(), 0, false);
        let mut guard = Guard::new(log.clone());
        guard.start(request.parent_run.clone());
        guard.emit(RunEvent::MessagesSnapshot(messages));
        guard.emit(RunEvent::StateSnapshot(if kept.shared.is_null() { json!({}) } else { kept.shared }));
        let open = still_open(kept.interrupts, system.now());
        guard.finish(
            if open.is_empty() { Outcome::Success { pending: Vec::new() } } else { Outcome::Interrupt(open) },
            None,
        );
        self.shared.table.lock().runs.insert((ws.clone(), request.run.clone()), log);
        self.shared.retire(ws, &request.run);
        Ok(handle)
    }

    async fn supervisor(&self) -> Result<&ActorRef<SupervisorMsg>, Fault> {
        let spawn = || async {
            let (actor, task) = Actor::spawn(None, Supervisor, self.shared.clone()).await?;
            let ended = self.ended.clone();
            tokio::spawn(async move {
                _ = task.await;
                ended.send_replace(true);
            });
            Ok(actor)
        };
        self.supervisor.get_or_try_init(spawn).await.map_err(|error: SpawnErr| Fault::internal(error))
    }

    #[cfg(test)]
    pub(super) fn fail_supervisor(&self) {
        crate::fault_point::fail("sessions", crate::fault_point::name_of(&self.shared));
    }

    /// Returns once the supervisor of the sessions has ended, which nobody starts again.
    pub(crate) async fn ended(&self) {
        _ = self.ended.subscribe().wait_for(|ended| *ended).await; // the sender lives in self
    }
}

impl Slot {
    fn busy_with(&self) -> Option<String> {
        self.active.clone().or_else(|| self.waiting.front().map(|job| job.request.run.clone()))
    }

    /// Whether one more run may come.
    fn admit(&self, request: &RunRequest) -> Result<(), Fault> {
        let Some(busy_with) = self.busy_with() else { return Ok(()) };
        let thread = &request.thread;
        if request.forwarded["busy"] == "reject" {
            let detail =
                format!("thread `{thread}` is busy with run `{busy_with}`; wait for it, attach to it or cancel it");
            return Err(Fault::new(FaultKind::Conflict, "thread_busy", detail));
        }
        if self.waiting.len() >= WAITING_MAX {
            let detail = format!("{WAITING_MAX} runs wait already on thread `{thread}`; ask again when one has ended");
            let kind = FaultKind::Limit { retry_after: Duration::from_secs(1) };
            return Err(Fault::new(kind, "thread_queue_full", detail));
        }
        Ok(())
    }
}

impl Shared {
    /// The next run of a thread, from now on the active one.
    fn next(&self, key: &Key) -> Option<Job> {
        let mut table = self.table.lock();
        let slot = table.slots.get_mut(key)?;
        let job = slot.waiting.pop_front()?;
        slot.active = Some(job.request.run.clone());
        Some(job)
    }

    /// The thread is free for its next run.
    fn release(&self, key: &Key) {
        if let Some(slot) = self.table.lock().slots.get_mut(key) {
            slot.active = None;
        }
    }

    /// The session is gone unless a run waits: whether it is.
    fn close(&self, key: &Key) -> bool {
        let mut table = self.table.lock();
        let is_idle = table.slots.get(key).is_none_or(|slot| slot.waiting.is_empty() && slot.active.is_none());
        if is_idle {
            table.slots.remove(key);
        }
        is_idle
    }

    /// A run is over and stored: of those, the newest stay in memory.
    fn retire(&self, ws: &WorkspaceId, run: &str) {
        let mut table = self.table.lock();
        let key = (ws.clone(), run.to_owned());
        let bytes = |table: &Table, key: &Key| table.runs.get(key).map_or(0, |log| log.bytes());
        table.over_bytes += bytes(&table, &key);
        table.over.push_back(key);
        while table.over_bytes > OVER_BYTES_MAX
            && let Some(oldest) = table.over.pop_front()
        {
            table.over_bytes = table.over_bytes.saturating_sub(bytes(&table, &oldest));
            table.runs.remove(&oldest);
        }
    }

    /// Stores a run to its end, whatever becomes of its session.
    fn record(self: &Arc<Self>, system: System, log: Arc<RunLog>) {
        let shared = self.clone();
        shared.recording.send_modify(|count| *count += 1);
        tokio::spawn(async move {
            recorder::record(system, log.clone()).await;
            shared.retire(&log.workspace, &log.run);
            shared.recording.send_modify(|count| *count -= 1);
        });
    }
}

fn new_log(system: &System, ws: &WorkspaceId, request: &RunRequest, is_public: bool) -> Arc<RunLog> {
    let ids = [request.thread.clone(), request.run.clone()];
    let outlet = is_public.then(|| system.outlet().clone());
    let user = Some(request.user.clone());
    Arc::new(RunLog::new(ws.clone(), ids, system.now(), false, request.legacy, user, outlet))
}

fn check_id(name: &str, id: &str) -> Result<(), Fault> {
    match id.len() {
        1..=ID_BYTES_MAX => Ok(()),
        bytes => Err(Fault::invalid("bad_id", format!("{name} has {bytes} bytes; send 1 to {ID_BYTES_MAX}"))),
    }
}

fn same_thread(run: &str, thread: &str, wanted: &str) -> Result<(), Fault> {
    if thread == wanted {
        return Ok(());
    }
    let detail = format!("run `{run}` belongs to another thread; send a new runId");
    Err(Fault::new(FaultKind::Conflict, "run_id_taken", detail))
}

fn unknown_run(run: &str) -> Fault {
    Fault::not_found("unknown_run", format!("there is no run `{run}`"))
}

fn kept(thread: &Thread) -> Kept {
    Kept::deserialize(&thread.state).unwrap_or_default()
}

fn still_open(interrupts: Vec<Interrupt>, now: Micros) -> Vec<Interrupt> {
    interrupts.into_iter().filter(|interrupt| interrupt.expires_at > now).collect()
}

/// The newest messages of a thread, in order.
async fn stored_messages(system: &System, ws: &WorkspaceId, thread: &str) -> Result<Vec<Value>, Fault> {
    let mut all = VecDeque::new();
    let mut after = 0;
    loop {
        let page = system.store().messages(ws, thread, after, MESSAGES_MAX).await?;
        let is_last = page.len() < MESSAGES_MAX;
        for (seq, message) in page {
            after = seq;
            all.push_back(message.content);
            if all.len() > MESSAGES_MAX {
                all.pop_front();
            }
        }
        if is_last {
            return Ok(all.into());
        }
    }
}

/// The supervisor of all sessions: it starts them, and starts them again.
struct Supervisor;

enum SupervisorMsg {
    /// A run waits on this thread.
    Ensure(Key),
}

struct Supervised {
    shared: Arc<Shared>,
    keys: HashMap<ActorId, Key>,
}

impl Supervised {
    /// Starts the session of a thread that has runs and no session.
    async fn ensure(&mut self, myself: &ActorRef<SupervisorMsg>, key: Key) -> Result<(), ActorProcessingErr> {
        if self.shared.table.lock().slots.get(&key).is_none_or(|slot| slot.actor.is_some()) {
            return Ok(());
        }
        let start = SessionState { shared: self.shared.clone(), key: key.clone(), rested: 0 };
        let (actor, _) = Actor::spawn_linked(None, Session, start, myself.get_cell()).await?;
        self.keys.insert(actor.get_id(), key.clone());
        if let Some(slot) = self.shared.table.lock().slots.get_mut(&key) {
            slot.actor = Some(actor.clone());
        }
        _ = actor.send_message(SessionMsg::Work); // if it is gone already, its end is on the way to us
        Ok(())
    }
}

#[async_trait]
impl Actor for Supervisor {
    type Msg = SupervisorMsg;
    type State = Supervised;
    type Arguments = Arc<Shared>;

    async fn pre_start(
        &self,
        _: ActorRef<SupervisorMsg>,
        shared: Arc<Shared>,
    ) -> Result<Supervised, ActorProcessingErr> {
        Ok(Supervised { shared, keys: HashMap::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<SupervisorMsg>,
        message: SupervisorMsg,
        state: &mut Supervised,
    ) -> Result<(), ActorProcessingErr> {
        #[cfg(test)]
        crate::fault_point::handling("sessions", &crate::fault_point::name_of(&state.shared));
        match message {
            SupervisorMsg::Ensure(key) => state.ensure(&myself, key).await,
        }
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<SupervisorMsg>,
        event: SupervisionEvent,
        state: &mut Supervised,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(who, error) => {
                let Some(key) = state.keys.remove(&who.get_id()) else { return Ok(()) };
                tracing::error!(workspace = %key.0, thread = %key.1, %error, "an agent session failed and is restarted");
                if let Some(slot) = state.shared.table.lock().slots.get_mut(&key) {
                    (slot.actor, slot.active) = (None, None);
                    slot.restarts += 1;
                    slot.last_failure = Some(error.to_string());
                }
                state.ensure(&myself, key).await
            }
            SupervisionEvent::ActorTerminated(who, ..) => {
                state.keys.remove(&who.get_id());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The actor of one thread.
struct Session;

enum SessionMsg {
    /// A run may wait.
    Work,
    /// Nothing may have come since the so-and-so-manieth rest began.
    Rested(u64),
}

struct SessionState {
    shared: Arc<Shared>,
    key: Key,
    /// How often it began to rest.
    rested: u64,
}

#[async_trait]
impl Actor for Session {
    type Msg = SessionMsg;
    type State = SessionState;
    type Arguments = SessionState;

    async fn pre_start(
        &self,
        _: ActorRef<SessionMsg>,
        start: SessionState,
    ) -> Result<SessionState, ActorProcessingErr> {
        Ok(start)
    }

    async fn handle(
        &self,
        myself: ActorRef<SessionMsg>,
        message: SessionMsg,
        state: &mut SessionState,
    ) -> Result<(), ActorProcessingErr> {
        #[cfg(test)]
        crate::fault_point::handling("session", &format!("{}/{}", state.key.0, state.key.1));
        match message {
            SessionMsg::Work => {
                while let Some(job) = state.shared.next(&state.key) {
                    perform(&state.shared, &state.key, job).await?;
                }
                state.rested += 1;
                let rested = state.rested;
                myself.send_after(state.shared.idle_after, move || SessionMsg::Rested(rested));
            }
            SessionMsg::Rested(since) if since == state.rested && state.shared.close(&state.key) => myself.stop(None),
            SessionMsg::Rested(_) => {}
        }
        Ok(())
    }
}

/// How the work on a run ended, before its readers know.
enum End {
    Outcome(Outcome),
    Failed(Failure),
    Panicked(String),
}

/// Does one run from its start to its terminal event. An error means that the agent panicked.
async fn perform(shared: &Arc<Shared>, key: &Key, job: Job) -> Result<(), ActorProcessingErr> {
    let Job { system, workspace, agent, request, mut guard } = job;
    let log = guard.log().clone();
    // before anything that takes time: the client knows at once that it is heard
    guard.start(request.parent_run.clone());
    let (mut run, thread) = match prepare(&system, &workspace, request, guard).await {
        Ok(prepared) => prepared,
        Err((mut guard, fault)) => {
            shared.release(key);
            guard.fail(fault.code, &fault.detail);
            shared.retire(&workspace, &log.run);
            return Ok(());
        }
    };
    shared.record(system.clone(), log.clone());
    let work = AssertUnwindSafe(answer(&mut run, agent.as_ref(), &thread)).catch_unwind();
    let end = tokio::select! {
        biased;
        () = log.cancelled() => End::Outcome(Outcome::Cancelled),
        () = tokio::time::sleep(shared.run_limit) => {
            let message = format!("the run took longer than {} s; ask for less at once", shared.run_limit.as_secs());
            End::Failed(Failure::new("timeout", message))
        }
        done = work => match done {
            Ok(Ok(outcome)) => End::Outcome(outcome),
            Ok(Err(failure)) => End::Failed(failure),
            Err(panic) => End::Panicked(message_of(panic.as_ref())),
        },
    };
    run.close_all();
    let interrupts = match &end {
        End::Outcome(Outcome::Interrupt(open)) => open.clone(),
        _ => Vec::new(),
    };
    // before the terminal event: whoever reads the thread behind it finds all of it, and its next run may come
    let stored = keep(&run, &thread, interrupts).await;
    shared.release(key);
    match (end, stored) {
        (End::Outcome(Outcome::Interrupt(_)), Err(fault)) => run.fail("store_unavailable", &fault.detail),
        (End::Outcome(outcome), _) => run.finish(outcome),
        (End::Failed(failure), _) => run.fail(failure.code, &failure.message),
        (End::Panicked(message), _) => {
            run.fail("internal", "the agent broke down; the run was ended, ask again");
            return Err(message.into());
        }
    }
    Ok(())
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a message"))
}

/// A thread as a run found it.
struct Found {
    thread: Thread,
    open: Vec<Interrupt>,
    client_lacks_some: bool,
}

/// Reads the thread, and notes the run and what the user said.
async fn prepare(
    system: &System,
    ws: &WorkspaceId,
    request: RunRequest,
    guard: Guard,
) -> Result<(Run, Found), (Guard, Fault)> {
    match note(system, ws, &request, guard.log().started_at).await {
        Ok((thread, merged)) => {
            let Kept { shared, interrupts } = kept(&thread);
            let has_own = !request.state.is_null() && request.state.as_object().is_none_or(|state| !state.is_empty());
            let state = if has_own { request.state.clone() } else { shared };
            let found = Found {
                open: still_open(interrupts, system.now()),
                thread,
                client_lacks_some: merged.client_lacks_some,
            };
            let run = Run::new(system.clone(), ws.clone(), request, merged.conversation, state, guard);
            Ok((run, found))
        }
        Err(fault) => Err((guard, fault)),
    }
}

async fn note(system: &System, ws: &WorkspaceId, request: &RunRequest, now: Micros) -> Result<(Thread, Merged), Fault> {
    let store = system.store();
    let stored = stored_messages(system, ws, &request.thread).await?;
    let merged = Conversation::merge(stored, &request.messages);
    let thread = match store.thread(ws, &request.thread).await? {
        Some(thread) => thread,
        None => {
            let first = merged.conversation.of_user().next().unwrap_or_default();
            let thread = Thread {
                workspace: ws.clone(),
                id: request.thread.clone(),
                agent: request.agent.to_string(),
                title: first.chars().take(TITLE_CHARS).collect(),
                created_by: request.user.clone(),
                created_at: now,
                updated_at: now,
                state: json!(Kept::default()),
            };
            store.upsert_thread(&thread).await?;
            thread
        }
    };
    let run = StoredRun {
        workspace: ws.clone(),
        thread: request.thread.clone(),
        run_id: request.run.clone(),
        agent: request.agent.to_string(),
        status: "running".to_owned(),
        started_at: now,
        finished_at: None,
        error: None,
    };
    if !store.insert_run(&run).await? {
        return Err(Fault::new(FaultKind::Conflict, "run_id_taken", format!("run `{}` exists already", run.run_id)));
    }
    let unseen: Vec<_> = merged.unseen.iter().map(|content| recorder::message(content.clone(), None, now)).collect();
    store.append_messages(ws, &request.thread, &unseen).await?;
    Ok((thread, merged))
}

/// What the agent makes of the run, after what the thread waited for is settled.
async fn answer(run: &mut Run, agent: &dyn Agent, found: &Found) -> Result<Outcome, Failure> {
    if found.client_lacks_some {
        run.show_messages()?;
    }
    let mut resolved = Vec::new();
    for interrupt in &found.open {
        match run.request.resume.iter().find(|entry| entry["interruptId"] == interrupt.id.as_str()) {
            Some(entry) => resolved.push(resolution(interrupt.clone(), entry)),
            // never act without an answer to everything that was asked
            None => {
                run.show_all()?;
                return Ok(Outcome::Interrupt(found.open.clone()));
            }
        }
    }
    let is_open = |entry: &&Value| found.open.iter().any(|interrupt| entry["interruptId"] == interrupt.id.as_str());
    let unknown: Vec<Value> =
        run.request.resume.iter().filter(|entry| !is_open(entry)).map(|entry| entry["interruptId"].clone()).collect();
    if !unknown.is_empty() {
        run.emit(RunEvent::Custom { name: "resume.unknown".to_owned(), value: json!({"interruptIds": unknown}) })?;
    }
    if !resolved.is_empty() {
        // before acting: after a crash in between the same answer does not act twice
        keep(run, found, Vec::new()).await?;
    }
    run.resolved = resolved;
    let outcome = agent.answer(run).await?;
    run.show_all()?;
    Ok(outcome)
}

fn resolution(interrupt: Interrupt, entry: &Value) -> Resolution {
    let payload = entry["payload"].clone();
    let approved = entry["status"] == "resolved" && payload["approved"] == true;
    Resolution { interrupt, approved, payload }
}

/// Stores the messages the run made, the state, and what the thread waits for from now on.
async fn keep(run: &Run, found: &Found, interrupts: Vec<Interrupt>) -> Result<(), Fault> {
    let (store, now) = (run.system.store(), run.system.now());
    let (ws, thread) = (&run.workspace, &found.thread);
    let made = run.conversation.made().into_iter().filter(|message| !id_of(message).is_empty());
    let made: Vec<_> = made.map(|content| recorder::message(content, Some(&run.request.run), now)).collect();
    let state = json!(Kept { shared: run.state().clone(), interrupts });
    let work = async {
        store.append_messages(ws, &thread.id, &made).await?;
        store.upsert_thread(&Thread { updated_at: now, state, ..thread.clone() }).await
    };
    work.await.map_err(|error| {
        tracing::error!(workspace = %ws, thread = %thread.id, %error, "messages of a run were not stored");
        error.into()
    })
}
