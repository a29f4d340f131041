//! The HTTP API by area: what each path reads, which permission it needs, what it answers.

mod alerts; // rules, firings, acknowledgement, silences
mod dead_letters; // events that could not be used
mod health; // whether the process lives and can serve
mod live; // channels as server-sent events
mod metrics; // definitions and rows
mod people; // members and API keys of a workspace
mod portfolios; // positions and their live valuation
mod query; // SQL asked once
mod session; // signing in and out, and who am I
mod streams; // schemas and ingest
mod system; // what the installation is doing, and the audit log
mod tables; // reference tables and changes of their rows
mod webhooks; // webhooks and deliveries
mod workspaces; // tenants

use crate::AppState;
use axum::Router;

pub(crate) use health::{health, metrics as prometheus, not_ready};

/// Every route of the HTTP API but those of agents and the WebSocket.
pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .merge(health::routes())
        .merge(session::routes())
        .merge(workspaces::routes())
        .merge(people::routes())
        .merge(streams::routes())
        .merge(dead_letters::routes())
        .merge(tables::routes())
        .merge(metrics::routes())
        .merge(query::routes())
        .merge(alerts::routes())
        .merge(webhooks::routes())
        .merge(portfolios::routes())
        .merge(system::routes())
        .merge(live::routes())
}
