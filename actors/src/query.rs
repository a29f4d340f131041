//! The pool of query workers: CPU-bound questions run on a few threads of lower priority, never beside the live side.

use crate::fault::{Fault, FaultKind};
use crate::system::QueryAnswer;
use actix::{Actor, Addr, Handler, Message, SyncArbiter, SyncContext};
use arrow::array::RecordBatch;
use cache::{Kept, Tag};
use engine::event::WorkspaceId;
use serde_json::Value;
use sql::query::{Answer, Bounds, QueryError, Question, Table};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

/// One question with all it may read.
struct Job {
    question: Question,
    params: Vec<Value>,
    tables: Vec<Table>,
    bounds: Bounds,
    timeout: Duration,
    deadline: Instant,
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
        let Job { question, params, tables, bounds, timeout, deadline, reply } = job;
        if reply.is_closed() {
            return; // its time was over before its turn came
        }
        // actix does not bring a worker back that panicked, so no panic gets that far
        let work = std::panic::AssertUnwindSafe(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(Fault::internal)?;
            runtime.block_on(async {
                tokio::time::timeout_at(deadline, question.run(&params, tables, bounds))
                    .await
                    .map_err(|_| too_late(timeout))?
                    .map_err(fault)
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

fn fault(error: QueryError) -> Fault {
    match error {
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

/// Handle to the pool.
pub(crate) struct QueryPool {
    workers: Addr<Worker>,
    waiting: Arc<Semaphore>,
}

/// Threads of the pool.
const WORKERS: usize = 2;

/// How long after its time a query may still answer for itself.
const GRACE: Duration = Duration::from_millis(50);

/// Questions that run or wait; over it new ones are refused.
const WAITING: usize = 64;

impl QueryPool {
    /// Starts the pool on threads of its own.
    pub(crate) fn start() -> Result<QueryPool, Fault> {
        let (sender, receiver) = std::sync::mpsc::channel();
        // SyncArbiter wants an actix system around it
        let run = move || {
            actix::System::new().block_on(async move {
                let workers = SyncArbiter::start(WORKERS, || {
                    if let Err(error) = rustix::process::nice(10) {
                        tracing::warn!(%error, "query workers run at normal priority");
                    }
                    Worker
                });
                _ = sender.send(workers);
                std::future::pending::<()>().await;
            });
        };
        std::thread::Builder::new().name("query".to_owned()).spawn(run).map_err(Fault::internal)?;
        let workers = receiver.recv().map_err(Fault::internal)?;
        Ok(QueryPool { workers, waiting: Arc::new(Semaphore::new(WAITING)) })
    }

    pub(crate) async fn run(
        &self,
        question: Question,
        params: Vec<Value>,
        tables: Vec<Table>,
        bounds: Bounds,
        timeout: Duration,
        deadline: Instant,
    ) -> Result<Answer, Fault> {
        let Ok(_place) = self.waiting.try_acquire() else {
            let detail = format!("{WAITING} queries run or wait already; try again in a moment");
            return Err(Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "queries_busy", detail));
        };
        let (reply, answer) = oneshot::channel();
        self.workers.do_send(Job { question, params, tables, bounds, timeout, deadline, reply });
        // a worker in the middle of one long step cannot look at the clock: whoever asked is told in time all the same
        match tokio::time::timeout_at(deadline + GRACE, answer).await {
            Ok(answer) => answer.map_err(Fault::internal)?,
            Err(_) => {
                metrics::counter!("tidewatch_queries_abandoned_total").increment(1);
                Err(too_late(timeout))
            }
        }
    }
}
