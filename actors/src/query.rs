//! The pool of query workers: CPU-bound questions run on a few threads of lower priority, never beside the live side.

use crate::fault::{Fault, FaultKind};
use actix::{Actor, Addr, Handler, Message, SyncArbiter, SyncContext};
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
        // actix does not bring a worker back that panicked, so no panic gets that far
        let work = std::panic::AssertUnwindSafe(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(Fault::internal)?;
            runtime.block_on(async {
                let late = || {
                    let detail =
                        format!("the query ran longer than its {timeout:?}; ask for less, or raise timeout_ms");
                    Fault::invalid("query_timeout", detail)
                };
                tokio::time::timeout(timeout, question.run(&params, tables, bounds))
                    .await
                    .map_err(|_| late())?
                    .map_err(fault)
            })
        });
        let answer = std::panic::catch_unwind(work).unwrap_or_else(|_| {
            Err(Fault::new(FaultKind::Invalid, "query_failed", "the query failed in its evaluation"))
        });
        _ = reply.send(answer); // the caller may have left
    }
}

fn fault(error: QueryError) -> Fault {
    match error {
        QueryError::Sql(error) => error.into(),
        QueryError::TooManyRows(_) => Fault::invalid("too_many_rows", error.to_string()),
        QueryError::Memory(_) => Fault::invalid("query_memory", error.to_string()),
        QueryError::Failed(_) => Fault::invalid("query_failed", error.to_string()),
    }
}

/// Handle to the pool.
pub(crate) struct QueryPool {
    workers: Addr<Worker>,
    waiting: Arc<Semaphore>,
}

/// Threads of the pool.
const WORKERS: usize = 2;

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
    ) -> Result<Answer, Fault> {
        let Ok(_place) = self.waiting.try_acquire() else {
            let detail = format!("{WAITING} queries run or wait already; try again in a moment");
            return Err(Fault::new(FaultKind::Busy { retry_after: Duration::from_secs(1) }, "queries_busy", detail));
        };
        let (reply, answer) = oneshot::channel();
        self.workers.do_send(Job { question, params, tables, bounds, timeout, reply });
        answer.await.map_err(Fault::internal)?
    }
}
