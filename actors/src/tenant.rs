//! A workspace as the rest of the process sees it: the order of its events, duplicates found, and the way to its actor.

use crate::fault::{Fault, FaultKind};
use crate::outlet::{Outlet, Update, What};
use crate::root::RootMsg;
use crate::workspace::WorkspaceMsg;
use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use engine::event::{ItemName, Micros, StreamName, WorkspaceId};
use parking_lot::{Mutex, RwLock};
use ractor::{ActorId, ActorRef};
use serde::{Deserialize, Serialize};
use sql::store::Silence;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, LazyLock, OnceLock, Weak};
use std::time::Duration;
use streams::dedup::{Dedup, DedupError, Key, Keys, Ticket};
use streams::log::{AppendError, Body, Log, Pending, Record, Refused};
use streams::schema::{StreamSchema, built_in};
use streams::table::{Table, built_in_tables};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// Bytes a permit of the mailbox stands for.
const PERMIT_BYTES: usize = 1024;

/// What all workspaces work with.
pub(crate) struct Shared {
    pub(crate) log: Arc<dyn Log>,
    pub(crate) dedup: Arc<Dedup>,
    pub(crate) outlet: Arc<dyn Outlet>,
    /// Starts actors; set once, when it runs itself.
    pub(crate) root: OnceLock<ActorRef<RootMsg>>,
    /// `limits.mailbox_bytes`.
    pub(crate) mailbox_bytes: usize,
}

type Schemas = HashMap<StreamName, Arc<StreamSchema>>;
type Tables = HashMap<StreamName, Arc<Table>>;

/// Where a workspace stands in its life.
#[derive(Clone, Default)]
pub(crate) enum Phase {
    /// Known, and no actor: nothing is on its way to it and no window waits.
    #[default]
    Resting,
    /// Its actor reads state and log.
    Restoring(ActorRef<WorkspaceMsg>),
    Running(ActorRef<WorkspaceMsg>),
    /// Its actor failed and will be started again.
    Failed,
}

impl Phase {
    fn actor(&self) -> Option<&ActorRef<WorkspaceMsg>> {
        match self {
            Phase::Restoring(actor) | Phase::Running(actor) => Some(actor),
            Phase::Resting | Phase::Failed => None,
        }
    }
}

/// What is kept of a workspace while it has no actor.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Resting {
    /// Log offset that its stored state includes; with another one this says nothing.
    pub(crate) offset: u64,
    /// When a window of an idle stream closes: it is woken then.
    pub(crate) wake: Option<Micros>,
    /// When the newest event of each stream came, and where its event time stood.
    pub(crate) arrivals: BTreeMap<StreamName, (Micros, Micros)>,
    /// The store has it.
    #[serde(skip, default = "is_stored")]
    pub(crate) noted: bool,
}

fn is_stored() -> bool {
    true
}

/// One workspace, from request to actor.
pub(crate) struct Tenant {
    pub(crate) id: WorkspaceId,
    /// Where the log begins for it: what an earlier workspace of the same name left is before that.
    pub(crate) first: u64,
    pub(crate) schemas: RwLock<Arc<Schemas>>,
    /// Reference tables, the built-in ones too.
    pub(crate) tables: RwLock<Arc<Tables>>,
    pub(crate) counters: Counters,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) resting: Mutex<Option<Resting>>,
    pub(crate) gone: AtomicBool,
    /// Queries that run or wait.
    pub(crate) queries: AtomicUsize,
    pub(crate) silences: RwLock<Vec<Silence>>,
    /// Up to when old rows of a metric were deleted since the start.
    pub(crate) pruned: Mutex<HashMap<ItemName, Micros>>,
    /// Callers that have the actor or look for it.
    asked: AtomicUsize,
    suspect: Mutex<Suspect>,
    /// One, taken while a commit is on its way to the store: also one that its actor did not live to see there.
    pub(crate) committing: Arc<Semaphore>,
    /// Held by who compares a count with its bound and adds one.
    pub(crate) defining: Arc<tokio::sync::Mutex<()>>,
    order: Mutex<Order>,
    mailbox: Arc<Semaphore>,
    shared: Arc<Shared>,
    myself: Weak<Tenant>,
}

/// The order of a workspace's records.
#[derive(Default)]
struct Order {
    /// Ids of events on their way to the disk.
    pending: Keys,
    /// Records put into the lane and not forwarded yet.
    in_flight: usize,
    lane: Option<mpsc::UnboundedSender<Ordered>>,
}

/// Which records make the actor fail.
#[derive(Default)]
struct Suspect {
    under_way: Option<u64>,
    /// By offset, those that a replay from the checkpoint meets again.
    failures: BTreeMap<u64, u32>,
}

/// What is new among the events of a request.
struct Checked {
    /// `None`: all.
    keep: Option<BooleanArray>,
    new: Vec<Key>,
    /// Repeats of events that are not durable yet.
    doubtful: Vec<Key>,
}

/// What is counted of a workspace; read without asking its actor.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) events: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) queued_batches: AtomicU64,
    pub(crate) restarts: AtomicU64,
    pub(crate) state_bytes: AtomicU64,
    /// Rows of reference tables in memory.
    pub(crate) table_bytes: AtomicU64,
    /// Log offset after the newest record of this workspace.
    pub(crate) appended: AtomicU64,
    /// Log offset after the newest record whose results were pushed.
    pub(crate) pushed: AtomicU64,
    /// Log offset that the stored state includes.
    pub(crate) saved: AtomicU64,
    pub(crate) last_failure: Mutex<Option<String>>,
}

/// A record whose place is fixed, on its way to the disk and then to the actor.
struct Ordered {
    /// `None`: nothing to write, only to wait for what came before.
    pending: Option<Pending>,
    what: Sent,
    done: oneshot::Sender<Result<u64, AppendError>>,
}

enum Sent {
    Events {
        stream: StreamName,
        batch: RecordBatch,
        ids: Vec<Key>,
        ticket: Option<Ticket>,
        permit: OwnedSemaphorePermit,
    },
    Advance {
        stream: StreamName,
        frontier: Micros,
    },
    Refused {
        stream: StreamName,
        events: Vec<Refused>,
        permit: OwnedSemaphorePermit,
    },
    Nothing,
}

/// What became of the good events of a request.
pub(crate) struct Appended {
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) offset: Option<u64>,
}

impl Tenant {
    pub(crate) fn new(id: WorkspaceId, first: u64, shared: Arc<Shared>) -> Arc<Tenant> {
        Arc::new_cyclic(|myself| Tenant {
            id,
            first,
            schemas: RwLock::new(built_in_schemas()),
            tables: RwLock::new(every_workspaces_tables()),
            counters: Counters::default(),
            phase: watch::Sender::new(Phase::Resting),
            resting: Mutex::new(None),
            gone: AtomicBool::new(false),
            queries: AtomicUsize::new(0),
            silences: RwLock::default(),
            pruned: Mutex::default(),
            asked: AtomicUsize::new(0),
            suspect: Mutex::default(),
            committing: Arc::new(Semaphore::new(1)),
            defining: Arc::default(),
            order: Mutex::default(),
            mailbox: Arc::new(Semaphore::new(shared.mailbox_bytes.div_ceil(PERMIT_BYTES))),
            shared,
            myself: myself.clone(),
        })
    }

    /// Drops repeats, fixes the place of the rest, and returns once all of it is durable.
    pub(crate) async fn append(&self, stream: &StreamName, batch: RecordBatch) -> Result<Appended, Fault> {
        if batch.num_rows() == 0 {
            return Ok(Appended { accepted: 0, duplicates: 0, offset: None });
        }
        let all = batch.num_rows() as u64;
        let bytes = batch.get_array_memory_size();
        let permit = self.room_for(bytes)?;
        let ids = self.ids(stream, &batch);
        let Shared { log, dedup, .. } = self.shared.as_ref();
        let (count, done, doubtful) = {
            let mut order = self.order.lock();
            let Checked { keep, new, doubtful } = order.check(dedup, &ids)?;
            let batch = match &keep {
                Some(keep) => filter_record_batch(&batch, keep).map_err(Fault::internal)?,
                None => batch,
            };
            let count = batch.num_rows() as u64;
            if count > 0 {
                let ticket = (!new.is_empty()).then(|| dedup.begin(log.tail().0));
                let body = Body::Events { stream: stream.clone(), batch: batch.clone() };
                match log.enqueue(Record { workspace: self.id.clone(), body }) {
                    Ok(pending) => {
                        order.pending.extend(&new);
                        let what = Sent::Events { stream: stream.clone(), batch, ids: new, ticket, permit };
                        (count, Some(self.put(&mut order, Some(pending), what)), doubtful)
                    }
                    Err(error) => return Err(error.into()),
                }
            } else if doubtful.is_empty() {
                (0, None, doubtful) // all are durable
            } else {
                // the first of each pair may still be on its way to the disk
                (0, Some(self.put(&mut order, None, Sent::Nothing)), doubtful)
            }
        };
        let offset = match done {
            Some(done) => Some(done.await.map_err(|_| AppendError::Stopped)??).filter(|_| count > 0),
            None => None,
        };
        // what counted as a repeat is only one when the first came through
        if !doubtful.is_empty() && dedup.known(&doubtful)?.contains(&false) {
            let detail =
                "an earlier request with the same event ids failed while this one waited for it; send it again";
            return Err(Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "backpressure", detail));
        }
        let counters = &self.counters;
        counters.events.fetch_add(count, Relaxed);
        counters.batches.fetch_add(1, Relaxed);
        counters.bytes.fetch_add(bytes as u64, Relaxed);
        Ok(Appended { accepted: count, duplicates: all - count, offset })
    }

    /// Notes events that were refused; returns once that is durable.
    pub(crate) async fn refuse(&self, stream: &StreamName, events: Vec<Refused>) -> Result<(), Fault> {
        let permit = self.room_for(events.iter().map(|event| event.detail.len() + event.payload.len()).sum())?;
        let body = Body::Refused { stream: stream.clone(), events: events.clone() };
        let done = {
            let mut order = self.order.lock();
            let pending = self.shared.log.enqueue(Record { workspace: self.id.clone(), body })?;
            self.put(&mut order, Some(pending), Sent::Refused { stream: stream.clone(), events, permit })
        };
        done.await.map_err(|_| AppendError::Stopped)??;
        Ok(())
    }

    /// Room in the mailbox for what has so many bytes.
    fn room_for(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Fault> {
        let most = self.shared.mailbox_bytes;
        let permits = bytes.div_ceil(PERMIT_BYTES).min(most.div_ceil(PERMIT_BYTES)) as u32;
        self.mailbox.clone().try_acquire_many_owned(permits).map_err(|_| {
            let detail = format!(
                "workspace `{}` has its {most} bytes of limits.mailbox_bytes waiting to be computed; try again in a moment",
                self.id
            );
            Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "backpressure", detail)
        })
    }

    /// The key of each event's id, `None` for an event without one; empty when none has one.
    pub(crate) fn ids(&self, stream: &StreamName, batch: &RecordBatch) -> Vec<Option<Key>> {
        match batch.column_by_name("id").and_then(|column| column.as_string_opt::<i32>()) {
            Some(ids) if ids.null_count() < ids.len() => {
                ids.iter().map(|id| Some(self.shared.dedup.key(&self.id, self.first, stream, id?))).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Records that an idle stream's event time moved on.
    pub(crate) fn advance(&self, stream: &StreamName, frontier: Micros) -> Result<(), AppendError> {
        let body = Body::Advance { stream: stream.clone(), frontier };
        let mut order = self.order.lock();
        let pending = self.shared.log.enqueue(Record { workspace: self.id.clone(), body })?;
        // nobody waits for it
        drop(self.put(&mut order, Some(pending), Sent::Advance { stream: stream.clone(), frontier }));
        Ok(())
    }

    fn put(
        &self,
        order: &mut Order,
        pending: Option<Pending>,
        what: Sent,
    ) -> oneshot::Receiver<Result<u64, AppendError>> {
        let (done, answer) = oneshot::channel();
        order.in_flight += 1;
        let lane = order.lane.get_or_insert_with(|| {
            let (lane, ordered) = mpsc::unbounded_channel(); // bounded by the permits of the mailbox
            tokio::spawn(deliver(self.myself.clone(), ordered));
            lane
        });
        // the other end lives as long as the lane; without it the answer is `Stopped`
        let _ = lane.send(Ordered { pending, what, done });
        answer
    }

    /// The actor to talk to; none while it rests or restarts.
    pub(crate) fn actor(&self) -> Option<ActorRef<WorkspaceMsg>> {
        self.phase.borrow().actor().cloned()
    }

    /// Where the workspace stands in its life.
    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// The actor `id` is no more.
    pub(crate) fn left(&self, id: ActorId, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let is_it = current.actor().is_some_and(|actor| actor.get_id() == id);
            if is_it {
                *current = phase;
            }
            is_it
        });
    }

    /// As long as the answer is held, the actor does not go to rest.
    pub(crate) fn hold(self: &Arc<Self>) -> Held {
        self.asked.fetch_add(1, SeqCst);
        Held(self.clone())
    }

    /// Starts the actor if none is there or on its way.
    pub(crate) fn wake(self: &Arc<Self>) {
        if matches!(*self.phase.borrow(), Phase::Resting) {
            _ = self.shared.root.get().map(|root| root.send_message(RootMsg::Start(self.clone())));
        }
    }

    /// The actor, woken if it rests and waited for while it is started again, `patience` at most. `None`: it is not
    /// there by then, or the workspace is gone.
    pub(crate) async fn awake(self: &Arc<Self>, patience: Duration) -> Option<ActorRef<WorkspaceMsg>> {
        let mut phase = self.phase.subscribe();
        self.wake();
        let there = phase.wait_for(|phase| phase.actor().is_some() || self.gone.load(Relaxed));
        tokio::time::timeout(patience, there).await.ok()?.ok()?.actor().cloned()
    }

    /// Returns once the actor `id` is not the one to talk to any more: false if it still is after `patience`.
    pub(crate) async fn lost(&self, id: ActorId, patience: Duration) -> bool {
        let mut phase = self.phase.subscribe();
        let lost = phase.wait_for(|phase| phase.actor().is_none_or(|actor| actor.get_id() != id));
        tokio::time::timeout(patience, lost).await.is_ok()
    }

    /// Lets the actor, which has applied the log up to `applied`, go to rest: false when something is on its way to it.
    pub(crate) fn rest(&self, applied: u64, resting: Resting) -> bool {
        let mut order = self.order.lock();
        if order.in_flight > 0 || self.counters.appended.load(SeqCst) > applied {
            return false;
        }
        let before = self.phase.send_replace(Phase::Resting);
        // whoever asks counts first and looks for the actor then: one of us sees the other
        if self.asked.load(SeqCst) > 0 {
            self.phase.send_replace(before);
            return false;
        }
        order.lane = None;
        *self.resting.lock() = Some(resting);
        true
    }

    /// Where the log ends for this workspace, if all of it has been computed: what it shows is then the same until the
    /// next record.
    pub(crate) fn settled(&self) -> Option<u64> {
        let appended = self.counters.appended.load(SeqCst);
        let done = self.counters.pushed.load(SeqCst).max(self.counters.saved.load(SeqCst));
        (done >= appended).then_some(appended)
    }

    pub(crate) fn mailbox_used(&self) -> u64 {
        let free = self.mailbox.available_permits();
        ((self.shared.mailbox_bytes.div_ceil(PERMIT_BYTES) - free) * PERMIT_BYTES) as u64
    }

    /// A record begins to be computed.
    pub(crate) fn begin(&self, offset: u64) {
        self.suspect.lock().under_way = Some(offset);
    }

    /// It was computed.
    pub(crate) fn end(&self) {
        self.suspect.lock().under_way = None;
    }

    /// The actor failed: counts against the record it was at.
    pub(crate) fn accuse(&self) {
        let mut suspect = self.suspect.lock();
        let needed = suspect.failures.split_off(&self.counters.saved.load(Relaxed));
        suspect.failures = needed;
        if let Some(offset) = suspect.under_way.take() {
            *suspect.failures.entry(offset).or_default() += 1;
        }
    }

    /// How often the actor failed at this record.
    pub(crate) fn failures_at(&self, offset: u64) -> u32 {
        self.suspect.lock().failures.get(&offset).copied().unwrap_or(0)
    }
}

/// Keeps an actor from going to rest.
pub(crate) struct Held(Arc<Tenant>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.asked.fetch_sub(1, SeqCst);
    }
}

/// The schemas that every workspace has; one map for all that have no others.
fn built_in_schemas() -> Arc<Schemas> {
    static SCHEMAS: LazyLock<Arc<Schemas>> = LazyLock::new(|| {
        Arc::new(built_in().iter().map(|schema| (schema.stream.clone(), Arc::new(schema.clone()))).collect())
    });
    SCHEMAS.clone()
}

/// The same of reference tables.
fn every_workspaces_tables() -> Arc<Tables> {
    static TABLES: LazyLock<Arc<Tables>> = LazyLock::new(|| {
        Arc::new(built_in_tables().iter().map(|table| (table.name().clone(), Arc::new(table.clone()))).collect())
    });
    TABLES.clone()
}

/// Answers requests and feeds the actor in the order of the log.
async fn deliver(tenant: Weak<Tenant>, mut ordered: mpsc::UnboundedReceiver<Ordered>) {
    while let Some(Ordered { pending, what, done }) = ordered.recv().await {
        let result = match pending {
            Some(pending) => pending.await.map(|offset| offset.0),
            None => Ok(0),
        };
        let Some(tenant) = tenant.upgrade() else { return };
        let what = tenant.settle(&result, what);
        if let Ok(offset) = result {
            tenant.forward(offset, what);
        }
        tenant.order.lock().in_flight -= 1;
        _ = done.send(result); // the caller may have left
    }
}

impl Tenant {
    /// The ids of a record are known once it is durable; those of a refused one are new again.
    fn settle(&self, result: &Result<u64, AppendError>, mut what: Sent) -> Sent {
        if let Ok(offset) = result
            && !matches!(what, Sent::Nothing)
        {
            self.counters.appended.store(offset + 1, SeqCst);
        }
        if let Sent::Events { ids, ticket, .. } = &mut what
            && let Some(ticket) = ticket.take()
        {
            let mut order = self.order.lock();
            if result.is_ok() {
                self.shared.dedup.confirm(ticket, ids);
            }
            for id in ids {
                order.pending.remove(id);
            }
        }
        what
    }

    fn forward(self: &Arc<Self>, offset: u64, what: Sent) {
        let message = match what {
            Sent::Nothing => return,
            Sent::Events { stream, batch, permit, .. } => {
                let what = What::Events { stream: stream.clone(), batch: batch.clone(), offset };
                self.shared.outlet.publish(Update { workspace: self.id.clone(), what });
                self.counters.queued_batches.fetch_add(1, Relaxed);
                WorkspaceMsg::Events { offset, stream, batch, permit }
            }
            Sent::Advance { stream, frontier } => WorkspaceMsg::Advance { offset, stream, frontier },
            Sent::Refused { stream, events, permit } => {
                WorkspaceMsg::Refused { offset, stream, events, _permit: permit }
            }
        };
        let events = matches!(message, WorkspaceMsg::Events { .. });
        let sent = self.actor().is_some_and(|actor| actor.send_message(message).is_ok());
        if !sent {
            if events {
                self.counters.queued_batches.fetch_sub(1, Relaxed);
            }
            self.wake(); // it finds the record in the log
        }
    }
}

impl Order {
    /// Which events were not seen before. An event without an id is always new.
    fn check(&self, dedup: &Dedup, ids: &[Option<Key>]) -> Result<Checked, DedupError> {
        let mut checked = Checked { keep: None, new: Vec::new(), doubtful: Vec::new() };
        if ids.is_empty() {
            return Ok(checked);
        }
        let some: Vec<Key> = ids.iter().flatten().copied().collect();
        let mut known = dedup.known(&some)?.into_iter();
        let mut own = Keys::default();
        let keep: Vec<bool> = ids
            .iter()
            .map(|id| {
                let Some(id) = id else { return true };
                if known.next().unwrap_or(false) {
                    return false;
                }
                if self.pending.contains(id) {
                    checked.doubtful.push(*id);
                    return false;
                }
                own.insert(*id)
            })
            .collect();
        checked.new = own.into_iter().collect();
        checked.keep = keep.contains(&false).then(|| keep.into());
        Ok(checked)
    }
}
