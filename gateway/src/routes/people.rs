//! Members and API keys of a workspace. Nobody gives away more than they have, and one owner always stays.

use crate::AppState;
use crate::auth::{Caller, new_key};
use crate::extract::{Json, Member, Path};
use crate::permission::{Permission, Role};
use crate::problem::Problem;
use actors::rows::rfc3339;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use serde::Deserialize;
use serde_json::{Value, json};
use sql::store::ApiKey;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/members", get(members).put(set_member))
        .route("/api/v1/workspaces/{ws}/members/{user}", delete(remove_member))
        .route("/api/v1/workspaces/{ws}/keys", get(keys).post(create_key))
        .route("/api/v1/workspaces/{ws}/keys/{key}", delete(revoke_key))
}

fn member_json(member: &sql::store::Member) -> Value {
    json!({"user": member.user, "email": member.email, "role": member.role, "since": rfc3339(member.since)})
}

async fn members(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::Read)?;
    let members: Vec<Value> = state.system.store().members(&member.workspace).await?.iter().map(member_json).collect();
    Ok(axum::Json(json!({"members": members})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Assignment {
    email: String,
    role: String,
}

async fn set_member(
    State(state): State<AppState>,
    member: Member,
    Json(new): Json<Assignment>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::Manage)?;
    let role: Role = new.role.parse()?;
    covers(&member, role)?;
    let store = state.system.store();
    let unknown = || {
        let email: String = new.email.chars().take(80).collect();
        Problem::not_found(
            "unknown_user",
            format!("there is no user `{email}`; an admin makes users by POST /api/v1/users"),
        )
    };
    let user = store.user_by_email(&new.email).await?.ok_or_else(unknown)?;
    if role != Role::Owner {
        another_owner(&state, &member, &user.id).await?;
    }
    store.set_member(&member.workspace, &user.id, role.as_str(), state.system.now()).await?;
    state.auth.forget();
    let members = store.members(&member.workspace).await?;
    let set = members.iter().find(|other| other.user == user.id).map(member_json);
    Ok(axum::Json(set.unwrap_or(Value::Null)))
}

async fn remove_member(
    State(state): State<AppState>,
    member: Member,
    Path((_, user)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    // everybody may leave
    if member.user != user {
        member.may(Permission::Manage)?;
    }
    let store = state.system.store();
    let members = store.members(&member.workspace).await?;
    let found = members.iter().find(|other| other.user == user || other.email == user.to_lowercase());
    let found = found.ok_or_else(|| Problem::not_found("unknown_member", format!("`{user}` is no member here")))?;
    another_owner(&state, &member, &found.user).await?;
    store.remove_member(&member.workspace, &found.user).await?;
    state.auth.forget();
    Ok(StatusCode::NO_CONTENT)
}

fn covers(member: &Member, role: Role) -> Result<(), Problem> {
    if member.role.covers(role) {
        return Ok(());
    }
    Err(Problem::forbidden(format!("your role `{}` may not give the role `{role}`", member.role)))
}

/// Refuses to take the last owner of a workspace away.
async fn another_owner(state: &AppState, member: &Member, leaving: &str) -> Result<(), Problem> {
    let members = state.system.store().members(&member.workspace).await?;
    let mut owners = members.iter().filter(|other| other.role == Role::Owner.as_str()).map(|owner| owner.user.as_str());
    match (owners.next(), owners.next()) {
        (Some(last), None) if last == leaving => {
            Err(Problem::conflict("last_owner", "a workspace keeps one owner; make somebody else owner first"))
        }
        _ => Ok(()),
    }
}

fn key_json(key: &ApiKey) -> Value {
    json!({
        "id": key.id, "name": key.name, "role": key.role, "prefix": key.prefix, "created_by": key.created_by,
        "created_at": rfc3339(key.created_at), "revoked_at": key.revoked_at.map(rfc3339),
    })
}

async fn keys(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::Manage)?;
    let keys: Vec<Value> = state.system.store().list_api_keys(&member.workspace).await?.iter().map(key_json).collect();
    Ok(axum::Json(json!({"keys": keys})))
}

/// The most keys a workspace has that are not revoked.
const KEYS_MAX: usize = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewKey {
    name: String,
    role: String,
}

async fn create_key(
    State(state): State<AppState>,
    caller: Caller,
    member: Member,
    Json(new): Json<NewKey>,
) -> Result<Response, Problem> {
    member.may(Permission::Manage)?;
    let role: Role = new.role.parse()?;
    covers(&member, role)?;
    let name = new.name.trim();
    if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
        return Err(Problem::invalid("bad_body", "`name` must be 1 to 100 characters without control characters"));
    }
    let store = state.system.store();
    let known = store.list_api_keys(&member.workspace).await?;
    if known.iter().filter(|key| key.revoked_at.is_none()).count() >= KEYS_MAX {
        let detail = format!("this workspace has {KEYS_MAX} API keys, the most there can be; delete one first");
        return Err(Problem::conflict("limit_reached", detail));
    }
    let (key, stored) = new_key(&member.workspace, name.to_owned(), role, &caller, state.system.now());
    store.create_api_key(&stored).await?;
    let answer =
        json!({"id": stored.id, "key": key, "name": stored.name, "role": stored.role, "prefix": stored.prefix});
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

async fn revoke_key(
    State(state): State<AppState>,
    member: Member,
    Path((_, key)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::Manage)?;
    if !state.system.store().revoke_api_key(&member.workspace, &key, state.system.now()).await? {
        return Err(Problem::not_found("unknown_key", "there is no such API key, or it is revoked already"));
    }
    state.auth.forget();
    Ok(StatusCode::NO_CONTENT)
}
