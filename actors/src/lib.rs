//! Supervision: workspaces, portfolios and agent sessions as actors that fail and restart alone.
//! Knows no HTTP and no wire format.

pub mod agent; // AI agent sessions and the built-in analyst
mod backtest; // which alerts a rule would have raised
mod blocks; // history as it is kept at hand
pub mod clock; // where the time comes from
mod commit; // results of many workspaces in one transaction
mod definition; // what users define in a workspace
mod fault; // why a request could not be served
#[cfg(test)]
mod fault_point; // where a test makes this crate fail
mod history; // rows of store and memory as one table
mod holdings; // portfolios and positions as the store has them
mod looks; // which charts people look at
pub mod outlet; // what actors push
mod portfolio; // a portfolio's actor
mod query; // the pool of query workers
mod root; // starts workspaces, and starts them again
pub mod rows; // a metric's rows as JSON
mod silence; // alerts that nobody is told of
mod system; // the whole system as the gateway sees it
mod table; // reference tables as they are stored, and positions as rows of one
mod tenant; // the order of a workspace's events
mod workspace; // a workspace's actor

pub use backtest::{Backtest, Episode};
pub use definition::{MetricDefinition, RuleDefinition};
pub use fault::{Fault, FaultKind};
pub use outlet::{AlertPhase, Outlet, PortfolioSummary, Update, What};
pub use sql::store::Step;
pub use system::{
    ActorInfo, Ingested, Limits, Part, Parts, QueryAnswer, QueryRequest, RowsPage, RowsQuery, StreamInfo, System,
    Throughput,
};
pub use table::TableInfo;
pub use workspace::MetricInfo;
