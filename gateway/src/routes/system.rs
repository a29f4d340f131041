//! What the installation is doing, and who did what in a workspace.

use crate::AppState;
use crate::auth::Caller;
use crate::encode;
use crate::extract::{Listing, Member};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::rows::rfc3339;
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use serde_json::{Value, json};
use sql::store::AuditEntry;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/system/actors", get(actors))
        .route("/api/v1/system/throughput", get(throughput))
        .route("/api/v1/workspaces/{ws}/audit", get(audit))
}

async fn actors(State(state): State<AppState>, caller: Caller) -> Result<axum::Json<Value>, Problem> {
    caller.admin()?;
    Ok(axum::Json(json!({"actors": state.system.actors().await})))
}

async fn throughput(State(state): State<AppState>, caller: Caller) -> Result<axum::Json<Value>, Problem> {
    caller.admin()?;
    Ok(axum::Json(encode::throughput(&state.system.throughput())))
}

fn entry(entry: &AuditEntry) -> Value {
    json!({
        "at": rfc3339(entry.at), "actor": entry.actor, "action": entry.action, "target": entry.target,
        "outcome": entry.outcome, "from": entry.from, "request_id": entry.request_id,
    })
}

async fn audit(State(state): State<AppState>, member: Member, mut page: Listing) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AuditRead)?;
    let (limit, before) = (page.limit, page.take("before"));
    page.done()?;
    let (entries, next) = state.system.store().audit_log(&member.workspace, limit, before.as_deref()).await?;
    let mut answer = json!({"entries": entries.iter().map(entry).collect::<Vec<Value>>()});
    if let Some(next) = next {
        answer["next"] = next.into();
    }
    Ok(axum::Json(answer))
}
