//! The pool of query workers: CPU-bound questions run on a few threads of lower priority, never beside the live side.

use crate::fault::{Fault, FaultKind};
use crate::system::QueryAnswer;
use actix::{Actor, Addr, Arbiter, ArbiterHandle, Handler, Message, SyncArbiter, SyncContext};
use arrow::array::RecordBatch;
use cache::{Kept, Tag};
use engine::event::WorkspaceId;
use parking_lot::Mutex;
use serde_json::Value;
use sql::query::{Answer, Bounds, QueryError, Question, Table};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};

/// One question with all it may read.
struct Job {
    question: Question,
    params: Vec<Value>,
    tables: Vec<Table>,
    bounds: Bounds,
    timeout: Duration,
    reply: oneshot::Sender<Result<Answer, Fault>>,
}

impl Message for Job {
    type Result = ();
}

struct Worker;

impl Actor for Worker {
    type Context = SyncContext<Self>;
}

impl Handler<Job> for Worker {
    type Result = ();

    fn handle(&mut self, job: Job, _: &mut SyncContext<Self>) {
        let Job { question, params, tables, bounds, timeout, reply } = job;
        if reply.is_closed() {
            return; // its time was over before its turn came
        }
        // actix does not bring a worker back that panicked, so no panic gets that far
        let work = std::panic::AssertUnwindSafe(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(Fault::internal)?;
            runtime.block_on(async {
                tokio::time::timeout_at(bounds.until.into(), question.run(&params, tables, bounds))
                    .await
                    .map_err(|_| too_late(timeout))?
                    .map_err(|error| fault(error, timeout))
            })
        });
        let answer = std::panic::catch_unwind(work).unwrap_or_else(|_| {
            Err(Fault::new(FaultKind::Invalid, "query_failed", "the query failed in its evaluation"))
        });
        _ = reply.send(answer); // the caller may have left
    }
}

pub(crate) fn too_late(timeout: Duration) -> Fault {
    let detail = format!("the query took longer than its {timeout:?}; ask for less, or raise timeout_ms");
    Fault::invalid("query_timeout", detail)
}

fn fault(error: QueryError, timeout: Duration) -> Fault {
    match error {
        QueryError::Late => too_late(timeout),
        QueryError::Sql(error) => error.into(),
        QueryError::TooManyRows(_) => Fault::invalid("too_many_rows", error.to_string()),
        QueryError::Memory(_) => Fault::invalid("query_memory", error.to_string()),
        QueryError::Failed(_) => Fault::invalid("query_failed", error.to_string()),
    }
}

/// What there is to ask in a workspace, and what of it was deleted: everything but what the log brings.
pub(crate) fn of_definitions(ws: &WorkspaceId) -> Tag {
    Tag::new(&[ws, &"definitions"])
}

impl Kept for QueryAnswer {
    fn bytes(&self) -> usize {
        self.batches.iter().map(RecordBatch::get_array_memory_size).sum::<usize>() + size_of::<QueryAnswer>()
    }
}

/// Workers that answer at the same time.
const WORKERS: usize = 2;

/// How long after its time a query may still answer for itself.
const GRACE: Duration = Duration::from_millis(50);

/// Questions that run or wait; over it new ones are refused.
const WAITING: usize = 64;

/// Workers that others stand in for, since they are in the middle of a step that looks at no clock. With more of them,
/// one must come to its end before another question is begun.
const STUCK: usize = 8;

/// Handle to the pool.
pub(crate) struct QueryPool(Arc<Pool>);

struct Pool {
    arbiter: ArbiterHandle,
    /// Its end is the end of the arbiter's thread.
    _open: oneshot::Sender<()>,
    idle: Mutex<Vec<Addr<Worker>>>,
    waiting: Semaphore,
    turns: Arc<Semaphore>,
    stuck: Arc<Semaphore>,
}

impl QueryPool {
    /// Starts the thread that starts the workers, when they are wanted.
    pub(crate) fn start() -> Result<QueryPool, Fault> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (open, closed) = oneshot::channel();
        // SyncArbiter wants an actix system around it
        let run = move || {
            actix::System::new().block_on(async move {
                _ = sender.send(Arbiter::current());
                _ = closed.await; // the sender only ever goes
            });
        };
        std::thread::Builder::new().name("query".to_owned()).spawn(run).map_err(Fault::internal)?;
        Ok(QueryPool(Arc::new(Pool {
            arbiter: receiver.recv().map_err(Fault::internal)?,
            _open: open,
            idle: Mutex::default(),
            waiting: Semaphore::new(WAITING),
            turns: Arc::new(Semaphore::new(WORKERS)),
            stuck: Arc::new(Semaphore::new(STUCK)),
        })))
    }

    /// Answers in time, whatever the question is; `held` is kept until nothing of it runs any more.
    pub(crate) async fn run(
        &self,
        question: Question,
        params: Vec<Value>,
        tables: Vec<Table>,
        bounds: Bounds,
        timeout: Duration,
        held: impl Send + 'static,
    ) -> Result<Answer, Fault> {
        let Ok(_place) = self.0.waiting.try_acquire() else {
            let detail = format!("{WAITING} queries run or wait already; try again in a moment");
            return Err(Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "queries_busy", detail));
        };
        let turn = tokio::time::timeout_at(bounds.until.into(), self.0.turns.clone().acquire_owned()).await;
        let turn = turn.map_err(|_| too_late(timeout))?.map_err(Fault::internal)?;
        let worker = self.0.worker().await?;
        let (reply, mut answer) = oneshot::channel();
        worker.do_send(Job { question, params, tables, bounds, timeout, reply });
        let (tell, told) = oneshot::channel();
        let pool = self.0.clone();
        // goes on when the caller leaves: the worker is another's afterwards
        let follow = async move {
            let _held = held;
            match tokio::time::timeout_at((bounds.until + GRACE).into(), &mut answer).await {
                Ok(Ok(answer)) => {
                    pool.idle.lock().push(worker);
                    _ = tell.send(answer);
                }
                Ok(Err(died)) => _ = tell.send(Err(Fault::internal(died))),
                Err(_) => {
                    metrics::counter!("tidewatch_queries_abandoned_total").increment(1);
                    _ = tell.send(Err(too_late(timeout)));
                    let stands_in = pool.stuck.clone().try_acquire_owned();
                    let _turn = stands_in.is_err().then_some(turn);
                    _ = answer.await; // its thread ends with it: nobody else has the worker's address
                }
            }
        };
        tokio::spawn(follow);
        told.await.map_err(Fault::internal)?
    }
}

impl Pool {
    /// A worker with nothing to do.
    async fn worker(&self) -> Result<Addr<Worker>, Fault> {
        if let Some(worker) = self.idle.lock().pop() {
            return Ok(worker);
        }
        let (sender, started) = oneshot::channel();
        self.arbiter.spawn_fn(move || {
            let worker = SyncArbiter::start(1, || {
                crate::background::give_way();
                Worker
            });
            _ = sender.send(worker); // the caller may have left
        });
        started.await.map_err(Fault::internal)
    }
}
