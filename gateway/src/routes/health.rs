//! Whether the process lives and can serve. Open to all, so nothing here says more than that.

use crate::AppState;
use crate::problem::{Code, PROBLEM_JSON};
use crate::serve::{FromNode, NODE};
use actors::Part;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Value, json};

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/health", get(health)).route("/ready", get(ready))
}

pub(crate) async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// A node that serves clients for this one is told that it is taken for one.
async fn ready(State(state): State<AppState>, node: Option<Extension<FromNode>>) -> Response {
    let mut response = standing(&state).await;
    if node.is_some() {
        response.headers_mut().insert(NODE, HeaderValue::from_static("core"));
    }
    response
}

async fn standing(state: &AppState) -> Response {
    let parts = state.system.readiness().await;
    let closing = state.closing.is_cancelled();
    let mut reasons: Vec<String> = parts.iter().filter(|part| !part.ok).map(Part::to_string).collect();
    if closing {
        reasons.push("the server is shutting down".to_owned());
    }
    if reasons.is_empty() {
        return Json(json!({"status": "ready", "parts": parts})).into_response();
    }
    if !closing && parts.iter().all(|part| part.ok || part.can_wait) {
        let detail = reasons.join("; ");
        return Json(json!({"status": "degraded", "detail": detail, "parts": parts})).into_response();
    }
    not_ready(&parts, &reasons)
}

/// The parts, of which some are missing, and why.
pub(crate) fn not_ready(parts: &[Part], reasons: &[String]) -> Response {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let document = json!({
        "type": "about:blank", "title": status.canonical_reason(), "status": status.as_u16(), "code": "not_ready",
        "detail": reasons.join("; "), "parts": parts,
    });
    let mut response = (status, Json(document)).into_response();
    response.headers_mut().insert(CONTENT_TYPE, PROBLEM_JSON);
    response.extensions_mut().insert(Code("not_ready"));
    response
}

/// Figures of the process as Prometheus reads them.
pub(crate) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, text)], state.metrics.render())
}
