//! What actors push: the gateway's hub takes it from here.

use crate::agent::RunEvent;
use arrow::array::RecordBatch;
use engine::event::{ItemName, StreamName, WorkspaceId};
use engine::metric::Rows;
use engine::portfolio::Summary;
use engine::program::Program;
use engine::workspace::Stop;
use sql::store::Alert;
use std::sync::Arc;

/// Takes what actors push. An implementation returns at once: actors never wait for clients.
pub trait Outlet: Send + Sync + 'static {
    fn publish(&self, update: Update);

    /// Whether anybody would get provisional rows of this metric now. Who comes later reads its open windows first, so
    /// that rows for nobody need not be made.
    fn is_followed(&self, _workspace: &WorkspaceId, _metric: &ItemName) -> bool {
        true
    }
}

/// Something that happened in a workspace.
#[derive(Clone, Debug)]
pub struct Update {
    pub workspace: WorkspaceId,
    pub what: What,
}

/// The kinds of things that happen.
#[derive(Clone, Debug)]
pub enum What {
    /// New rows of a metric, final or provisional, in the order in which they became so.
    Rows {
        metric: ItemName,
        program: Arc<Program>,
        rows: Arc<Rows>,
    },
    /// A metric stopped.
    MetricFailed {
        metric: ItemName,
        stop: Stop,
    },
    /// A metric is gone, or was defined anew: its rows so far say nothing about it any more.
    MetricRemoved {
        metric: ItemName,
    },
    Alert {
        phase: AlertPhase,
        alert: Alert,
    },
    Portfolio {
        id: ItemName,
        summary: Arc<PortfolioSummary>,
    },
    /// A portfolio is gone.
    PortfolioRemoved {
        id: ItemName,
    },
    /// Events as they were accepted; durable.
    Events {
        stream: StreamName,
        batch: RecordBatch,
        offset: u64,
    },
    /// One event of an agent run; `n` counts from 1.
    Run {
        thread: String,
        run: String,
        n: u64,
        event: Arc<RunEvent>,
    },
}

/// A step in the life of an alert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AlertPhase {
    Firing,
    Resolved,
    Acked,
}

/// A portfolio valued at last prices.
#[derive(Clone, Debug)]
pub struct PortfolioSummary {
    pub id: ItemName,
    pub name: String,
    pub currency: String,
    pub summary: Summary,
}
