//! Webhooks of a workspace, and what was on its way to them. Their addresses often hold a secret, so even looking takes
//! the right to define them.

use crate::AppState;
use crate::extract::{Json, Listing, Member, Path, Sent};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::WebhookChange;
use actors::rows::rfc3339;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use engine::event::Micros;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use sql::store::{Delivery, Webhook};
use streams::span::Text;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/webhooks", get(list).post(create))
        .route("/api/v1/workspaces/{ws}/webhooks/{webhook}", get(one).patch(change).delete(remove))
        .route("/api/v1/workspaces/{ws}/webhooks/{webhook}/deliveries", get(deliveries))
        .route("/api/v1/workspaces/{ws}/webhooks/{webhook}/secret", post(rotate))
        .route("/api/v1/workspaces/{ws}/webhooks/{webhook}/test", post(test))
}

fn shown(webhook: &Webhook, now: Micros) -> Value {
    let previous = webhook.previous.as_ref().map(|(_, until)| *until).filter(|until| *until > now);
    json!({
        "id": webhook.id, "url": webhook.url, "events": webhook.events, "severities": webhook.severities,
        "enabled": webhook.disabled.is_none(), "disabled_reason": webhook.disabled,
        "previous_secret_until": previous.map(rfc3339),
        "created_at": rfc3339(webhook.created_at), "updated_at": rfc3339(webhook.updated_at),
    })
}

fn delivery_json(delivery: &Delivery) -> Value {
    json!({
        "id": delivery.id, "event": delivery.event, "alert": delivery.alert, "state": delivery.state,
        "attempts": delivery.attempts, "created_at": rfc3339(delivery.created_at),
        "last_attempt_at": delivery.last_at.map(rfc3339), "last_status": delivery.last_status,
        "last_error": delivery.last_error, "next_attempt_at": delivery.next_at.map(rfc3339),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct New {
    url: String,
    events: Option<Vec<String>>,
    severities: Option<Vec<String>>,
    secret: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Changes {
    url: Option<String>,
    events: Option<Vec<String>>,
    /// `null` is said, too: alerts of every severity.
    #[serde(default, deserialize_with = "said")]
    severities: Option<Option<Vec<String>>>,
    secret: Option<String>,
    enabled: Option<bool>,
}

fn said<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<Vec<String>>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

async fn list(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertDefine)?;
    let webhooks = state.system.store().webhooks(&member.workspace).await?;
    let now = state.system.now();
    Ok(axum::Json(json!({"webhooks": webhooks.iter().map(|webhook| shown(webhook, now)).collect::<Vec<Value>>()})))
}

async fn create(State(state): State<AppState>, member: Member, new: Sent<New>) -> Result<Response, Problem> {
    member.may(Permission::AlertDefine)?;
    let Json(new) = new?;
    let asked = WebhookChange {
        url: Some(new.url),
        events: new.events,
        severities: new.severities.map(Some),
        secret: new.secret,
        enabled: None,
    };
    let _alone = state.system.defining(&member.workspace).await?;
    let made = state.system.create_webhook(&member.workspace, asked).await?;
    Ok((StatusCode::CREATED, axum::Json(with_secret(made, state.system.now()))).into_response())
}

/// A webhook and, this once, the secret that was made for it.
fn with_secret((webhook, secret): (Webhook, Option<String>), now: Micros) -> Value {
    let mut answer = shown(&webhook, now);
    if let Some(secret) = secret {
        answer["secret"] = secret.into();
    }
    answer
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rotation {
    secret: Option<String>,
    /// How long the secret of before signs, too.
    overlap: Option<Text>,
}

async fn rotate(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
    rotation: Sent<Rotation>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertDefine)?;
    let Json(Rotation { secret, overlap }) = rotation?;
    let overlap = overlap.map(|text| text.0);
    let rotated = state.system.rotate_webhook_secret(&member.workspace, &id, secret.as_deref(), overlap).await?;
    Ok(axum::Json(with_secret(rotated, state.system.now())))
}

async fn one(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertDefine)?;
    Ok(axum::Json(shown(&state.system.webhook(&member.workspace, &id).await?, state.system.now())))
}

async fn change(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
    changes: Sent<Changes>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertDefine)?;
    let Json(Changes { url, events, severities, secret, enabled }) = changes?;
    let change = WebhookChange { url, events, severities, secret, enabled };
    let webhook = state.system.change_webhook(&member.workspace, &id, change, &member.name).await?;
    Ok(axum::Json(shown(&webhook, state.system.now())))
}

async fn remove(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::AlertDefine)?;
    state.system.remove_webhook(&member.workspace, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn deliveries(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
    mut page: Listing,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertDefine)?;
    let (limit, before) = (page.limit, page.take("before"));
    page.done()?;
    state.system.webhook(&member.workspace, &id).await?;
    let store = state.system.store();
    let (deliveries, next) = store.deliveries(&member.workspace, &id, limit, before.as_deref()).await?;
    let mut answer = json!({"deliveries": deliveries.iter().map(delivery_json).collect::<Vec<Value>>()});
    if let Some(next) = next {
        answer["next"] = next.into();
    }
    Ok(axum::Json(answer))
}

async fn test(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
) -> Result<Response, Problem> {
    member.may(Permission::AlertDefine)?;
    let delivery = state.system.test_webhook(&member.workspace, &id).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(delivery_json(&delivery))).into_response())
}
