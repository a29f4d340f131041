//! Supervision: workspaces, portfolios and agent sessions as actors that fail and restart alone.
//! Knows no HTTP and no wire format.

pub mod agent; // AI agent sessions and the built-in analyst
pub mod background; // threads for what takes long
mod backtest; // which alerts a rule would have raised
mod blocks; // history as it is kept at hand
pub mod clock; // where the time comes from
mod commit; // results of many workspaces in one transaction
mod definition; // what users define in a workspace
mod endpoint; // one attempt to tell a webhook
mod fault; // why a request could not be served
#[cfg(test)]
mod fault_point; // where a test makes this crate fail
mod history; // rows of store and memory as one table
mod holdings; // portfolios and positions as the store has them
pub mod json; // Arrow values as JSON, whatever they are
mod looks; // which charts people look at
mod notifier; // tells webhooks, for hours if it must
pub mod outlet; // what actors push
mod outward; // what connections to others are made with
pub mod pack; // what a workspace of one domain starts with
mod portfolio; // a portfolio's actor
mod query; // the pool of query workers
mod root; // starts workspaces, and starts them again
pub mod rows; // a metric's rows as JSON
mod seal; // secrets at rest
mod silence; // alerts that nobody is told of
mod system; // the whole system as the gateway sees it
mod table; // reference tables as they are stored, and positions as rows of one
mod tenant; // the order of a workspace's events
mod webhook; // webhooks as users define them, and what they are told
mod workspace; // a workspace's actor

pub use backtest::{Backtest, Episode};
pub use definition::{MetricDefinition, RuleDefinition};
pub use fault::{Fault, FaultKind};
pub use outlet::{AlertPhase, Outlet, PortfolioSummary, Update, What};
pub use outward::reason as transport_reason;
pub use seal::{SealError, Sealer};
pub use sql::store::Step;
pub use system::{
    ActorInfo, Ingested, Limits, LiveRows, Part, Parts, QueryAnswer, QueryRequest, Retention, RowsPage, RowsQuery,
    StreamInfo, System, Throughput,
};
pub use table::TableInfo;
pub use webhook::{WebhookChange, WebhookConfig, alert_json, sealed_for};
pub use workspace::{MetricInfo, UnplannedMetric};
