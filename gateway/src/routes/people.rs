//! Members, grants and API keys of a workspace. Nobody gives away more than they have, and one owner always stays.

use super::metrics::instant;
use crate::AppState;
use crate::auth::{check_email, new_key};
use crate::extract::{Json, Member, Path, Query, Seen, Sent};
use crate::hub::Group;
use crate::permission::{Access, PERMISSIONS, Permission, ROLES, Role, Scope, parse_scopes};
use crate::problem::Problem;
use actors::rows::rfc3339;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use engine::event::{Span, WorkspaceId};
use serde::Deserialize;
use serde_json::{Value, json};
use sql::store::{ApiKey, Grant, Invitation, User};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/permissions", get(permissions))
        .route("/api/v1/workspaces/{ws}/grants", get(grants).put(put_grant).delete(remove_grant))
        .route("/api/v1/workspaces/{ws}/members", get(members).put(set_member))
        .route("/api/v1/workspaces/{ws}/members/{user}", delete(remove_member))
        .route("/api/v1/workspaces/{ws}/keys", get(keys).post(create_key))
        .route("/api/v1/workspaces/{ws}/keys/{key}", delete(revoke_key))
}

/// The table of roles and permissions; it is no secret.
async fn permissions() -> axum::Json<Value> {
    let permissions: Vec<Value> =
        PERMISSIONS.iter().map(|(_, name, meaning)| json!({"name": name, "allows": meaning})).collect();
    let role = |(_, name, held): &(Role, &str, &[Permission])| json!({"name": name, "permissions": held.iter().map(|held| held.as_str()).collect::<Vec<_>>()});
    axum::Json(json!({"permissions": permissions, "roles": ROLES.iter().map(role).collect::<Vec<_>>()}))
}

fn member_json(member: &sql::store::Member) -> Value {
    json!({
        "user": member.user, "email": member.email, "role": member.role, "since": rfc3339(member.since),
        "invited": false,
    })
}

/// Somebody who is invited goes by the address, whoever has it: nothing here tells whether anybody does.
fn invited_json(one: &Invitation) -> Value {
    json!({
        "user": one.email, "email": one.email, "role": one.role, "since": rfc3339(one.invited_at), "invited": true,
    })
}

/// Both by e-mail address.
fn by_email(mut shown: Vec<Value>) -> Vec<Value> {
    shown.sort_by(|a, b| a["email"].as_str().cmp(&b["email"].as_str()));
    shown
}

async fn members(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may_see_people()?;
    let store = state.system.store();
    let mut members: Vec<Value> = store.members(&member.workspace).await?.iter().map(member_json).collect();
    members.extend(store.invitations(&member.workspace).await?.iter().map(invited_json));
    Ok(axum::Json(json!({"members": by_email(members)})))
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
    seen: Seen,
    new: Sent<Assignment>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::WorkspaceManage)?;
    let Json(new) = new?;
    seen.note(format_args!("{} as {}", new.email, new.role));
    let role: Role = new.role.parse()?;
    covers(&member, role)?;
    check_email(&new.email)?;
    let store = state.system.store();
    let turn = state.auth.turn().await;
    let Some(user) = known(&state, &member, &new.email).await? else {
        let invitation = invite(&state, &member, &new.email, Some(role), &[]).await?;
        return Ok(axum::Json(invited_json(&invitation)));
    };
    let before = store.role(&member.workspace, &user.id).await?.map(|role| role.parse::<Role>()).transpose()?;
    if user.id != member.user
        && let Some(before) = before
    {
        covers(&member, before)?;
    }
    if role != Role::Owner {
        another_owner(&state, &member, &user.id).await?;
    }
    let is_bounded = role == Role::Owner && before != Some(Role::Owner) && !user.admin;
    if is_bounded {
        state.may_own_another(&user.id).await?;
    }
    let now = state.system.now();
    store.accept_invitation(&member.workspace, &user.email, &user.id, now).await?; // none is left behind
    store.set_member(&member.workspace, &user.id, role.as_str(), now).await?;
    drop(turn);
    state.took_from(&Group::User(user.id.as_str().into()));
    let grants = parse_scopes(&store.granted(&member.workspace, &user.id).await?)?;
    end_keys_of(&state, &seen, &member.workspace, &user.id, Some(Access::of_user(role, grants))).await?;
    let members = store.members(&member.workspace).await?;
    let set = members.iter().find(|other| other.user == user.id).map(member_json);
    Ok(axum::Json(set.unwrap_or(Value::Null)))
}

/// The user with this address, where `member` may know of them: a member of the workspace, or anybody for who
/// administers the installation.
async fn known(state: &AppState, member: &Member, email: &str) -> Result<Option<User>, Problem> {
    let store = state.system.store();
    let Some(user) = store.user_by_email(email).await? else { return Ok(None) };
    let is_known = store.role(&member.workspace, &user.id).await?.is_some() || member.admin;
    Ok(is_known.then_some(user))
}

/// The most invitations of a workspace that nobody has accepted yet.
const INVITATIONS_MAX: usize = 1_000;

/// Asks whoever has this address to become a member, or adds to what they are asked to. The answer is the same whether or
/// not anybody has it, and nobody is a member of what they have not come to.
async fn invite(
    state: &AppState,
    member: &Member,
    email: &str,
    role: Option<Role>,
    scopes: &[Scope],
) -> Result<Invitation, Problem> {
    let (store, email) = (state.system.store(), email.to_lowercase());
    let all = store.invitations(&member.workspace).await?;
    let mut invitation = match all.iter().find(|other| other.email == email) {
        Some(found) => found.clone(),
        None if all.len() >= INVITATIONS_MAX => {
            let detail =
                format!("this workspace has {INVITATIONS_MAX} open invitations, the most there can be; end some");
            return Err(Problem::conflict("limit_reached", detail));
        }
        None => Invitation {
            email,
            role: Role::Guest.to_string(),
            scopes: Vec::new(),
            invited_by: member.name.clone(),
            invited_at: state.system.now(),
        },
    };
    if let Some(role) = role {
        invitation.role = role.to_string();
    }
    add(&mut invitation.scopes, scopes)?;
    store.put_invitation(&member.workspace, &invitation).await?;
    state.auth.forget();
    Ok(invitation)
}

async fn remove_member(
    State(state): State<AppState>,
    member: Member,
    seen: Seen,
    Path((_, user)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    // everybody may leave
    if member.user != user {
        member.may(Permission::WorkspaceManage)?;
    }
    let store = state.system.store();
    let turn = state.auth.turn().await;
    let members = store.members(&member.workspace).await?;
    let found = members.iter().find(|other| other.user == user || other.email == user.to_lowercase());
    if found.is_none() && store.delete_invitation(&member.workspace, &user.to_lowercase()).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let found = found.ok_or_else(|| Problem::not_found("unknown_member", format!("`{user}` is no member here")))?;
    if member.user != found.user {
        covers(&member, found.role.parse()?)?;
    }
    another_owner(&state, &member, &found.user).await?;
    store.remove_member(&member.workspace, &found.user).await?;
    drop(turn);
    state.took_from(&Group::User(found.user.as_str().into()));
    end_keys_of(&state, &seen, &member.workspace, &found.user, None).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn covers(member: &Member, role: Role) -> Result<(), Problem> {
    if member.access.covers(role, None) {
        return Ok(());
    }
    Err(Problem::forbidden(format!("you may not give or take the role `{role}`, which may do more than you may")))
}

/// Revokes the API keys that somebody made, and those that were made with these, which may do more than is `left` to
/// whoever made them.
async fn end_keys_of(
    state: &AppState,
    seen: &Seen,
    workspace: &WorkspaceId,
    user: &str,
    left: Option<Access>,
) -> Result<(), Problem> {
    let (store, now) = (state.system.store(), state.system.now());
    let all = store.list_api_keys(workspace).await?;
    let mut makers = vec![user.to_owned()];
    while let Some(maker) = makers.pop() {
        for key in all.iter().filter(|key| key.created_by == maker) {
            let name = format!("key:{}", key.id);
            let scopes = key.scopes.as_deref().map(parse_scopes).transpose()?;
            let role = key.role.parse()?;
            let is_covered = left.as_ref().is_some_and(|left| left.covers(role, scopes.as_deref()));
            if !is_covered && store.revoke_api_key(workspace, &key.id, now).await? {
                state.took_from(&Group::User(name.as_str().into()));
                seen.note(format_args!("and its API key {}", key.id));
            }
            makers.push(name);
        }
    }
    Ok(())
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewGrant {
    email: String,
    /// A permission, mostly on one resource: `portfolio:read@portfolio/main`.
    scope: String,
}

fn grant_json(grant: &Grant) -> Value {
    json!({
        "user": grant.user, "email": grant.email, "scope": grant.scope, "created_by": grant.created_by,
        "created_at": rfc3339(grant.created_at),
    })
}

async fn grants(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::WorkspaceManage)?;
    let store = state.system.store();
    let mut grants: Vec<Value> = store.grants(&member.workspace).await?.iter().map(grant_json).collect();
    grants.extend(store.invitations(&member.workspace).await?.iter().flat_map(invited_grants));
    Ok(axum::Json(json!({"grants": by_email(grants)})))
}

/// What will be granted to somebody who is invited.
fn invited_grants(one: &Invitation) -> Vec<Value> {
    let grant = |scope: &String| Grant {
        user: one.email.clone(),
        email: one.email.clone(),
        scope: scope.clone(),
        created_by: one.invited_by.clone(),
        created_at: one.invited_at,
    };
    one.scopes.iter().map(|scope| grant_json(&grant(scope))).collect()
}

/// The most grants of one member.
const GRANTS_MAX: usize = 200;

/// Adds those of `scopes` that are not among what one member holds, unless that is too much.
fn add(held: &mut Vec<String>, scopes: &[Scope]) -> Result<(), Problem> {
    for scope in scopes.iter().map(ToString::to_string) {
        if !held.contains(&scope) {
            held.push(scope);
        }
    }
    if held.len() <= GRANTS_MAX {
        return Ok(());
    }
    let detail = format!("a member has {GRANTS_MAX} grants at most; a role may serve better");
    Err(Problem::conflict("limit_reached", detail))
}

/// Grants a scope. Somebody who is no member is invited as a guest, who may do nothing else.
async fn put_grant(
    State(state): State<AppState>,
    member: Member,
    seen: Seen,
    new: Sent<NewGrant>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::WorkspaceManage)?;
    let Json(new) = new?;
    seen.note(format_args!("{} {}", new.email, new.scope));
    let scopes = parse_scopes(std::slice::from_ref(&new.scope))?;
    if !member.access.covers(Role::Guest, Some(&scopes)) {
        return Err(Problem::forbidden(format!("you may not grant `{}`, which you do not hold yourself", new.scope)));
    }
    check_email(&new.email)?;
    let (store, now) = (state.system.store(), state.system.now());
    let _turn = state.auth.turn().await;
    let Some(user) = known(&state, &member, &new.email).await? else {
        let invitation = invite(&state, &member, &new.email, None, &scopes).await?;
        return Ok(axum::Json(json!({"grants": invited_grants(&invitation)})));
    };
    store.accept_invitation(&member.workspace, &user.email, &user.id, now).await?; // none is left behind
    if store.role(&member.workspace, &user.id).await?.is_none() {
        store.set_member(&member.workspace, &user.id, Role::Guest.as_str(), now).await?;
    }
    add(&mut store.granted(&member.workspace, &user.id).await?, &scopes)?;
    for scope in scopes {
        let grant = Grant {
            user: user.id.clone(),
            email: user.email.clone(),
            scope: scope.to_string(),
            created_by: member.name.clone(),
            created_at: now,
        };
        store.put_grant(&member.workspace, &grant).await?;
    }
    state.auth.forget();
    let grants = store.grants(&member.workspace).await?;
    let grants: Vec<Value> = grants.iter().filter(|grant| grant.user == user.id).map(grant_json).collect();
    Ok(axum::Json(json!({"grants": grants})))
}

async fn remove_grant(
    State(state): State<AppState>,
    member: Member,
    seen: Seen,
    old: Result<Query<NewGrant>, Problem>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::WorkspaceManage)?;
    let Query(old) = old?;
    seen.note(format_args!("{} {}", old.email, old.scope));
    let store = state.system.store();
    let Some(user) = known(&state, &member, &old.email).await? else {
        uninvite(&state, &member, &old).await?;
        return Ok(StatusCode::NO_CONTENT);
    };
    if !store.delete_grant(&member.workspace, &user.id, &old.scope).await? {
        return Err(no_grant(&old));
    }
    let group = Group::User(user.id.as_str().into());
    state.took_from(&group); // at once, whatever becomes of the rest
    // a guest is a member by what is granted: without any of it the workspace is one of others again
    let is_guest = store.role(&member.workspace, &user.id).await?.as_deref() == Some(Role::Guest.as_str());
    if is_guest && store.granted(&member.workspace, &user.id).await?.is_empty() {
        store.remove_member(&member.workspace, &user.id).await?;
        state.took_from(&group);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a scope out of an invitation; one that asks to nothing any more ends.
async fn uninvite(state: &AppState, member: &Member, old: &NewGrant) -> Result<(), Problem> {
    let (store, email) = (state.system.store(), old.email.to_lowercase());
    let invitation = store.invitation(&member.workspace, &email).await?;
    let Some(mut invitation) = invitation.filter(|one| one.scopes.contains(&old.scope)) else {
        return Err(no_grant(old));
    };
    invitation.scopes.retain(|scope| *scope != old.scope);
    match invitation.scopes.is_empty() && invitation.role == Role::Guest.as_str() {
        true => _ = store.delete_invitation(&member.workspace, &email).await?,
        false => store.put_invitation(&member.workspace, &invitation).await?,
    }
    Ok(())
}

fn no_grant(old: &NewGrant) -> Problem {
    let email: String = old.email.chars().take(80).collect();
    Problem::not_found("unknown_grant", format!("`{email}` holds no grant of this scope"))
}

fn key_json(key: &ApiKey) -> Value {
    json!({
        "id": key.id, "name": key.name, "role": key.role, "scopes": key.scopes,
        "expires_at": key.expires_at.map(rfc3339), "prefix": key.prefix, "created_by": key.created_by,
        "created_at": rfc3339(key.created_at), "revoked_at": key.revoked_at.map(rfc3339),
    })
}

async fn keys(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::WorkspaceManage)?;
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
    /// What of the role the key may do; all of it unless said.
    scopes: Option<Vec<String>>,
    /// RFC 3339; good until revoked unless said.
    expires_at: Option<String>,
}

/// The most scopes of a key.
const SCOPES_MAX: usize = 100;

async fn create_key(
    State(state): State<AppState>,
    member: Member,
    seen: Seen,
    new: Sent<NewKey>,
) -> Result<Response, Problem> {
    member.may(Permission::WorkspaceManage)?;
    let Json(new) = new?;
    let scopes = new.scopes.as_deref().map(|scopes| format!(" with {}", scopes.join(" "))).unwrap_or_default();
    seen.note(format_args!("`{}` as {}{scopes}", new.name, new.role));
    let role: Role = new.role.parse()?;
    let scopes = new.scopes.as_deref().map(parse_scopes).transpose()?;
    if let Some(scopes) = &scopes
        && (scopes.is_empty() || scopes.len() > SCOPES_MAX)
    {
        return Err(Problem::invalid("bad_body", format!("`scopes` must be 1 to {SCOPES_MAX}, or be left out")));
    }
    if !member.access.covers(role, scopes.as_deref()) {
        return Err(Problem::forbidden("a key may not do more than you may yourself; give it less"));
    }
    if let Some(scope) = Scope::beyond(role, scopes.as_deref().unwrap_or_default()) {
        let detail =
            format!("the role `{role}` does not have `{scope}`; leave it out, or give the key a role that does");
        return Err(Problem::invalid("scope_beyond_role", detail));
    }
    let scopes = scopes.map(|scopes| scopes.iter().map(ToString::to_string).collect());
    let expires_at = new.expires_at.as_deref().map(|text| instant("expires_at", text)).transpose()?;
    if expires_at.is_some_and(|end| end <= state.system.now()) {
        return Err(Problem::invalid("bad_body", "`expires_at` must be in the future"));
    }
    let name = new.name.trim();
    if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
        return Err(Problem::invalid("bad_body", "`name` must be 1 to 100 characters without control characters"));
    }
    let (store, now) = (state.system.store(), state.system.now());
    let _turn = state.auth.turn().await;
    let known = store.list_api_keys(&member.workspace).await?;
    // each has a quota of its own for an hour
    let counts = |key: &&ApiKey| key.revoked_at.is_none_or(|at| at.plus(Span::seconds(3600)) > now);
    if known.iter().filter(counts).count() >= KEYS_MAX {
        let detail = format!(
            "this workspace has {KEYS_MAX} API keys, those revoked within the last hour among them, the most there can \
             be; revoke one and come again"
        );
        return Err(Problem::conflict("limit_reached", detail));
    }
    let (key, stored) = new_key(&member.workspace, name.to_owned(), role, scopes, expires_at, &member.user, now);
    store.create_api_key(&stored).await?;
    seen.note(format_args!("id {}", stored.id));
    let mut answer = key_json(&stored);
    answer["key"] = key.into();
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

async fn revoke_key(
    State(state): State<AppState>,
    member: Member,
    Path((_, key)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::WorkspaceManage)?;
    if !state.system.store().revoke_api_key(&member.workspace, &key, state.system.now()).await? {
        return Err(Problem::not_found("unknown_key", "there is no such API key, or it is revoked already"));
    }
    state.took_from(&Group::User(format!("key:{key}").into()));
    Ok(StatusCode::NO_CONTENT)
}
