//! A workspace as the rest of the process sees it: the order of its events, duplicates found, and the way to its actor.

use crate::fault::{Fault, FaultKind};
use crate::outlet::{Outlet, Update, What};
use crate::workspace::WorkspaceMsg;
use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use engine::event::{Micros, StreamName, WorkspaceId};
use parking_lot::{Mutex, RwLock};
use ractor::ActorRef;
use sql::store::Silence;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use streams::log::{AppendError, Body, Log, Pending, Record};
use streams::schema::StreamSchema;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// Bytes a permit of the mailbox stands for.
const PERMIT_BYTES: usize = 1024;

/// One workspace, from request to actor.
pub(crate) struct Tenant {
    pub(crate) id: WorkspaceId,
    /// Where the log begins for it: what an earlier workspace of the same name left is before that.
    pub(crate) first: u64,
    pub(crate) schemas: RwLock<HashMap<StreamName, Arc<StreamSchema>>>,
    pub(crate) counters: Counters,
    /// Becomes true once the state is restored and the log replayed.
    pub(crate) ready: watch::Sender<bool>,
    pub(crate) gone: AtomicBool,
    /// Queries that run or wait.
    pub(crate) queries: AtomicUsize,
    pub(crate) silences: RwLock<Vec<Silence>>,
    actor: RwLock<Option<ActorRef<WorkspaceMsg>>>,
    order: Mutex<Seen>,
    lane: mpsc::UnboundedSender<Ordered>, // as long as the mailbox has permits
    mailbox: Arc<Semaphore>,
    mailbox_bytes: usize,
    log: Arc<dyn Log>,
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
    /// Log offset after the newest record of this workspace.
    pub(crate) appended: AtomicU64,
    /// Log offset that the stored state includes.
    pub(crate) saved: AtomicU64,
    pub(crate) by_stream: Mutex<HashMap<StreamName, u64>>,
    pub(crate) last_failure: Mutex<Option<String>>,
}

/// A record whose place is fixed, on its way to the disk and then to the actor.
struct Ordered {
    pending: Pending,
    what: Sent,
    done: oneshot::Sender<Result<u64, AppendError>>,
}

enum Sent {
    Events { stream: StreamName, batch: RecordBatch, ids: Vec<Id>, permit: OwnedSemaphorePermit },
    Advance { stream: StreamName, frontier: Micros },
}

/// A hash of stream and id, wide enough that two ids do not meet in it.
type Id = u128;

/// Ids seen of late, oldest first, bounded.
pub(crate) struct Seen {
    hashers: [RandomState; 2],
    ids: HashSet<Id>,
    order: VecDeque<Id>,
    most: usize,
}

impl Seen {
    fn new(most: usize) -> Self {
        Self { hashers: [RandomState::new(), RandomState::new()], ids: HashSet::new(), order: VecDeque::new(), most }
    }

    fn hash(&self, stream: &StreamName, id: &str) -> Id {
        let [a, b] = self.hashers.each_ref().map(|hasher| hasher.hash_one((stream.as_str(), id)));
        (u128::from(a) << 64) | u128::from(b)
    }

    fn insert(&mut self, id: Id) -> bool {
        if !self.ids.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }

    fn forget(&mut self, ids: &[Id]) {
        for id in ids {
            self.ids.remove(id);
        }
        let gone: HashSet<&Id> = ids.iter().collect();
        self.order.retain(|id| !gone.contains(id));
    }

    /// The events not seen before, and their ids. An event without an id is always new.
    fn fresh(&mut self, stream: &StreamName, batch: &RecordBatch) -> (Option<BooleanArray>, Vec<Id>) {
        let Some(column) = batch.column_by_name("id").and_then(|c| c.as_string_opt::<i32>()) else {
            return (None, Vec::new());
        };
        if column.null_count() == column.len() {
            return (None, Vec::new());
        }
        let mut added = Vec::new();
        let mut repeats = false;
        let keep: BooleanArray = column
            .iter()
            .map(|id| {
                let new = id.is_none_or(|id| {
                    let id = self.hash(stream, id);
                    let new = self.insert(id);
                    if new {
                        added.push(id);
                    }
                    new
                });
                repeats |= !new;
                Some(new)
            })
            .collect();
        (repeats.then_some(keep), added)
    }
}

/// What became of the good events of a request.
pub(crate) struct Appended {
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) offset: Option<u64>,
}

impl Tenant {
    pub(crate) fn new(
        id: WorkspaceId,
        first: u64,
        log: Arc<dyn Log>,
        outlet: Arc<dyn Outlet>,
        mailbox_bytes: usize,
        remembered_ids: usize,
    ) -> Arc<Tenant> {
        let (lane, ordered) = mpsc::unbounded_channel();
        let tenant = Arc::new(Tenant {
            id,
            first,
            schemas: RwLock::default(),
            counters: Counters::default(),
            ready: watch::Sender::new(false),
            gone: AtomicBool::new(false),
            queries: AtomicUsize::new(0),
            silences: RwLock::default(),
            actor: RwLock::new(None),
            order: Mutex::new(Seen::new(remembered_ids)),
            lane,
            mailbox: Arc::new(Semaphore::new(mailbox_bytes.div_ceil(PERMIT_BYTES))),
            mailbox_bytes,
            log,
        });
        tokio::spawn(deliver(Arc::downgrade(&tenant), ordered, outlet));
        tenant
    }

    /// Takes in events that a replay of the log shows: their ids are known from now on.
    pub(crate) fn remember(&self, stream: &StreamName, batch: &RecordBatch) {
        self.order.lock().fresh(stream, batch);
    }

    /// Drops repeats, fixes the place of the rest, and returns once all of it is durable.
    pub(crate) async fn append(&self, stream: &StreamName, batch: RecordBatch) -> Result<Appended, Fault> {
        let all = batch.num_rows() as u64;
        let bytes = batch.get_array_memory_size();
        let permits = bytes.div_ceil(PERMIT_BYTES).min(self.mailbox_bytes.div_ceil(PERMIT_BYTES)) as u32;
        let Ok(permit) = self.mailbox.clone().try_acquire_many_owned(permits) else {
            let detail = format!(
                "workspace `{}` has its {} bytes of limits.mailbox_bytes waiting to be computed; try again in a moment",
                self.id, self.mailbox_bytes
            );
            return Err(Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "backpressure", detail));
        };
        let (count, done) = {
            let mut seen = self.order.lock();
            let (keep, ids) = seen.fresh(stream, &batch);
            let batch = match &keep {
                Some(keep) => filter_record_batch(&batch, keep).map_err(Fault::internal)?,
                None => batch,
            };
            let count = batch.num_rows() as u64;
            if count == 0 {
                (0, None)
            } else {
                let body = Body::Events { stream: stream.clone(), batch: batch.clone() };
                let pending = match self.log.enqueue(Record { workspace: self.id.clone(), body }) {
                    Ok(pending) => pending,
                    Err(error) => {
                        seen.forget(&ids);
                        return Err(error.into());
                    }
                };
                let what = Sent::Events { stream: stream.clone(), batch, ids, permit };
                (count, Some(self.put(pending, what)))
            }
        };
        let offset = match done {
            Some(done) => Some(done.await.map_err(|_| AppendError::Stopped)??),
            // the first of each pair may still be on its way to the disk
            None => {
                self.log.barrier().await?;
                None
            }
        };
        let counters = &self.counters;
        counters.events.fetch_add(count, Relaxed);
        counters.batches.fetch_add(1, Relaxed);
        counters.bytes.fetch_add(bytes as u64, Relaxed);
        *counters.by_stream.lock().entry(stream.clone()).or_default() += count;
        Ok(Appended { accepted: count, duplicates: all - count, offset })
    }

    /// Records that an idle stream's event time moved on.
    pub(crate) fn advance(&self, stream: &StreamName, frontier: Micros) -> Result<(), AppendError> {
        let body = Body::Advance { stream: stream.clone(), frontier };
        let _order = self.order.lock();
        let pending = self.log.enqueue(Record { workspace: self.id.clone(), body })?;
        drop(self.put(pending, Sent::Advance { stream: stream.clone(), frontier })); // nobody waits for it
        Ok(())
    }

    fn put(&self, pending: Pending, what: Sent) -> oneshot::Receiver<Result<u64, AppendError>> {
        let (done, answer) = oneshot::channel();
        // the other end lives as long as the tenant; without it the answer is `Stopped`
        let _ = self.lane.send(Ordered { pending, what, done });
        answer
    }

    /// The actor to talk to; none while it restarts.
    pub(crate) fn actor(&self) -> Option<ActorRef<WorkspaceMsg>> {
        self.actor.read().clone()
    }

    /// From here on records go to `actor`, before it reads the log's tail: so it misses none.
    pub(crate) fn set_actor(&self, actor: Option<ActorRef<WorkspaceMsg>>) {
        *self.actor.write() = actor;
    }

    pub(crate) fn mailbox_used(&self) -> u64 {
        let free = self.mailbox.available_permits();
        ((self.mailbox_bytes.div_ceil(PERMIT_BYTES) - free) * PERMIT_BYTES) as u64
    }
}

/// Answers requests and feeds the actor in the order of the log.
async fn deliver(
    tenant: std::sync::Weak<Tenant>,
    mut ordered: mpsc::UnboundedReceiver<Ordered>,
    outlet: Arc<dyn Outlet>,
) {
    while let Some(Ordered { pending, what, done }) = ordered.recv().await {
        let result = pending.await;
        let Some(tenant) = tenant.upgrade() else { return };
        let offset = match result {
            Ok(offset) => offset.0,
            Err(error) => {
                if let Sent::Events { ids, .. } = &what {
                    tenant.order.lock().forget(ids);
                }
                _ = done.send(Err(error)); // the caller may have left
                continue;
            }
        };
        tenant.counters.appended.store(offset + 1, Relaxed);
        _ = done.send(Ok(offset));
        let message = match what {
            Sent::Events { stream, batch, permit, .. } => {
                let what = What::Events { stream: stream.clone(), batch: batch.clone(), offset };
                outlet.publish(Update { workspace: tenant.id.clone(), what });
                tenant.counters.queued_batches.fetch_add(1, Relaxed);
                WorkspaceMsg::Events { offset, stream, batch, permit }
            }
            Sent::Advance { stream, frontier } => WorkspaceMsg::Advance { offset, stream, frontier },
        };
        // an actor that restarts finds the record in the log
        if let Some(actor) = tenant.actor() {
            let events = matches!(message, WorkspaceMsg::Events { .. });
            if actor.send_message(message).is_err() && events {
                tenant.counters.queued_batches.fetch_sub(1, Relaxed);
            }
        }
    }
}
