//! Signing in and out, users, and who am I.

use crate::AppState;
use crate::auth::{By, Caller, Tokens};
use crate::extract::{Address, Json, Seen};
use crate::permission::Role;
use crate::problem::Problem;
use actors::rows::rfc3339;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/auth/login", post(login))
        .route("/api/v1/auth/refresh", post(refresh))
        .route("/api/v1/auth/logout", post(logout))
        .route("/api/v1/me", get(me))
        .route("/api/v1/users", get(users).post(create_user))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Login {
    email: String,
    password: String,
    /// Clients may send the field; no account asks for a one-time password.
    #[serde(default, rename = "otp")]
    _otp: Option<IgnoredAny>,
}

async fn login(
    State(state): State<AppState>,
    Address(from): Address,
    seen: Option<Extension<Seen>>,
    Json(login): Json<Login>,
) -> Result<axum::Json<Tokens>, Problem> {
    if let Some(Extension(seen)) = seen {
        seen.tell(login.email.chars().take(254).collect());
    }
    let (store, now) = (state.system.store(), state.system.now());
    Ok(axum::Json(state.auth.login(store, &login.email, login.password, from, now).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refresh {
    refresh_token: String,
}

async fn refresh(State(state): State<AppState>, Json(body): Json<Refresh>) -> Result<axum::Json<Tokens>, Problem> {
    let (store, now) = (state.system.store(), state.system.now());
    Ok(axum::Json(state.auth.refresh(store, &body.refresh_token, now).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Logout {
    refresh_token: Option<String>,
}

/// Ends the sign-in that the access token or the refresh token in the body belongs to.
async fn logout(
    State(state): State<AppState>,
    caller: Result<Caller, Problem>,
    body: Bytes,
) -> Result<StatusCode, Problem> {
    let logout = match body.as_ref() {
        b"" => Logout { refresh_token: None },
        body => serde_json::from_slice(body).map_err(|error| Problem::invalid("bad_body", error.to_string()))?,
    };
    let (store, now) = (state.system.store(), state.system.now());
    let by_refresh = match &logout.refresh_token {
        Some(token) => state.auth.family_of(store, token, now).await?,
        None => None,
    };
    let by_access = match caller {
        Ok(Caller { by: By::Session { family }, .. }) => Some(family),
        Ok(_) => return Err(Problem::forbidden("an API key has no sign-in to end; delete the key instead")),
        Err(problem) if by_refresh.is_none() => return Err(problem),
        Err(_) => None,
    };
    for family in by_access.iter().chain(&by_refresh) {
        state.auth.revoke(store, family).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn me(State(state): State<AppState>, caller: Caller) -> Result<axum::Json<Value>, Problem> {
    let store = state.system.store();
    let workspaces = match &caller.by {
        By::Session { .. } => store.workspaces_of(&caller.id).await?,
        By::Key { workspace, role } => {
            store.workspace(workspace).await?.map(|found| (found, role.to_string())).into_iter().collect()
        }
    };
    let workspaces: Vec<Value> = workspaces
        .iter()
        .map(|(workspace, role)| json!({"id": workspace.id, "name": workspace.name, "role": role, "tier": workspace.tier}))
        .collect();
    let user = json!({"id": caller.id, "email": caller.name, "admin": caller.admin});
    Ok(axum::Json(json!({"user": user, "workspaces": workspaces})))
}

async fn users(State(state): State<AppState>, caller: Caller) -> Result<axum::Json<Value>, Problem> {
    caller.admin()?;
    let users: Vec<Value> = state.system.store().list_users().await?.iter().map(user).collect();
    Ok(axum::Json(json!({"users": users})))
}

fn user(user: &sql::store::User) -> Value {
    json!({"id": user.id, "email": user.email, "admin": user.admin, "created_at": rfc3339(user.created_at)})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewUser {
    email: String,
    password: String,
    #[serde(default)]
    admin: bool,
}

async fn create_user(
    State(state): State<AppState>,
    caller: Caller,
    Json(new): Json<NewUser>,
) -> Result<Response, Problem> {
    caller.admin()?;
    let (store, now) = (state.system.store(), state.system.now());
    let made = state.auth.create_user(store, &new.email, &new.password, new.admin, now).await?;
    Ok((StatusCode::CREATED, axum::Json(user(&made))).into_response())
}

/// A workspace as its members see it.
pub(super) fn workspace(workspace: &sql::store::Workspace, role: Role) -> Value {
    json!({
        "id": workspace.id, "name": workspace.name, "role": role, "tier": workspace.tier, "pack": workspace.pack,
        "created_at": rfc3339(workspace.created_at),
    })
}
