//! Signing in and out, users, and who am I.

use crate::AppState;
use crate::auth::{By, Caller, Refreshed, Tokens};
use crate::extract::{Address, Json, Path, Plain, Query, Seen, Sent};
use crate::hub::Group;
use crate::oidc;
use crate::permission::{Access, Role};
use crate::problem::Problem;
use crate::throttle::Try;
use actors::rows::rfc3339;
use axum::extract::State;
use axum::http::header::{COOKIE as COOKIE_HEADER, LOCATION, SET_COOKIE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{AppendHeaders, IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::IpAddr;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/auth/login", post(login))
        .route("/api/v1/auth/refresh", post(refresh))
        .route("/api/v1/auth/logout", post(logout))
        .route("/api/v1/auth/oidc", get(issuers))
        .route("/api/v1/auth/oidc/token", post(fetch))
        .route("/api/v1/auth/oidc/{issuer}/start", get(depart))
        .route("/api/v1/auth/oidc/{issuer}/callback", get(arrive))
        .route("/api/v1/me", get(me))
        .route("/api/v1/me/password", put(change_password))
        .route("/api/v1/me/totp", post(enrol))
        .route("/api/v1/me/totp/confirm", post(confirm))
        .route("/api/v1/me/totp/disable", post(disable))
        .route("/api/v1/users", get(users).post(create_user))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Login {
    email: String,
    password: String,
    /// The code of the second factor, where the account has one.
    otp: Option<String>,
}

/// A password or code that is tried now.
fn tried(state: &AppState, from: Option<IpAddr>) -> Try<'_> {
    Try { from, now: state.system.now(), cache: state.system.cache() }
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
    let (store, at) = (state.system.store(), tried(&state, from));
    Ok(axum::Json(state.auth.login(store, &login.email, login.password, login.otp.as_deref(), at).await?))
}

/// The issuers that somebody may sign in with.
async fn issuers(State(state): State<AppState>) -> axum::Json<Value> {
    axum::Json(json!({"issuers": state.auth.oidc.names()}))
}

/// The cookie of a sign-in elsewhere: this and the sign-in's label, since other tabs may have theirs.
const COOKIE: &str = "tidewatch_oidc_";
/// Sign-ins that a browser has under way at a time; the oldest are given up.
const TABS_MAX: usize = 4;

/// The sign-ins elsewhere that this browser has under way: label and ticket, the oldest first (RFC 6265, section 5.4).
fn under_way(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let cookies = headers.get_all(COOKIE_HEADER).into_iter().filter_map(|value| value.to_str().ok());
    let pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.filter_map(|(name, ticket)| Some((name.strip_prefix(COOKIE)?, ticket)))
}

/// The ticket of the sign-in whose state, or code of ours, this is; empty where this browser has none.
fn ticket<'a>(headers: &'a HeaderMap, of: &str) -> &'a str {
    under_way(headers).find(|(label, _)| *label == oidc::label(of)).map_or("", |(_, ticket)| ticket)
}

/// Lax: the way back is a navigation that begins at the issuer.
fn cookie(label: &str, ticket: &str, seconds: i64) -> String {
    format!("{COOKIE}{label}={ticket}; Path=/api/v1/auth/oidc; HttpOnly; SameSite=Lax; Max-Age={seconds}")
}

/// Sends the browser to the issuer.
async fn depart(
    State(state): State<AppState>,
    Path(issuer): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let departure = state.auth.oidc.depart(&issuer, state.system.now()).await?;
    let secure = if departure.is_secure { "; Secure" } else { "" };
    let seconds = oidc::ABROAD_MAX.0 / 1_000_000;
    let set = cookie(oidc::label(&departure.state), &departure.ticket, seconds) + secure;
    let surplus = (under_way(&headers).count() + 1).saturating_sub(TABS_MAX);
    let given_up = under_way(&headers).take(surplus).map(|(label, _)| cookie(label, "", 0));
    let cookies: Vec<_> = given_up.chain([set]).map(|cookie| (SET_COOKIE, cookie)).collect();
    Ok((StatusCode::SEE_OTHER, [(LOCATION, departure.to)], AppendHeaders(cookies)).into_response())
}

/// What the issuer sends the browser back with (RFC 6749, section 4.1.2); it may say more.
#[derive(Deserialize)]
struct Arrival {
    state: Option<String>,
    code: Option<String>,
    error: Option<String>,
}

/// Takes the browser back, and sends it on to the console with a code for its tokens.
async fn arrive(
    State(state): State<AppState>,
    Path(issuer): Path<String>,
    Query(arrival): Query<Arrival>,
    seen: Option<Extension<Seen>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if let Some(error) = arrival.error {
        return Err(oidc::refused_by_issuer(&error));
    }
    let (Some(from), Some(code)) = (arrival.state, arrival.code) else {
        return Err(Problem::invalid("bad_parameter", "`state` and `code` are missing; begin at …/start"));
    };
    let (ticket, store, now) = (ticket(&headers, &from), state.system.store(), state.system.now());
    let identity = state.auth.oidc.arrive(&issuer, &from, &code, ticket, now).await?;
    if let Some(Extension(seen)) = seen {
        seen.tell(identity.email.clone().unwrap_or_else(|| format!("{issuer}:{}", identity.subject)));
    }
    let user = state.auth.user_of(store, identity, now).await?;
    let code = state.auth.hand_over(store, &user, &from, ticket, now).await?;
    // behind `#`, so that no log of a server or proxy gets it
    Ok((StatusCode::SEE_OTHER, [(LOCATION, format!("/#sign_in={code}"))]).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fetch {
    code: String,
}

/// The tokens for the code, in the browser that signed in: it brings the ticket, which is of no use any more.
async fn fetch(
    State(state): State<AppState>,
    headers: HeaderMap,
    Json(body): Json<Fetch>,
) -> Result<impl IntoResponse, Problem> {
    let (store, now) = (state.system.store(), state.system.now());
    let tokens = state.auth.fetch(store, &body.code, ticket(&headers, &body.code), now).await?;
    Ok(([(SET_COOKIE, cookie(oidc::label(&body.code), "", 0))], axum::Json(tokens)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refresh {
    refresh_token: String,
}

async fn refresh(State(state): State<AppState>, Json(body): Json<Refresh>) -> Result<axum::Json<Tokens>, Problem> {
    let (store, now) = (state.system.store(), state.system.now());
    match state.auth.refresh(store, &body.refresh_token, now).await? {
        Refreshed::Tokens(tokens) => Ok(axum::Json(tokens)),
        Refreshed::Ended { user } => {
            state.took_from(&Group::User(user.into()));
            Err(Problem::unauthorized("this refresh token was used before; sign in again"))
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Logout {
    refresh_token: Option<String>,
    /// Ends all sign-ins of the user, not only this one.
    #[serde(default)]
    everywhere: bool,
}

/// Ends the sign-in that the access token or the refresh token in the body belongs to, or all of that user.
async fn logout(
    State(state): State<AppState>,
    caller: Result<Caller, Problem>,
    Plain(body): Plain,
) -> Result<StatusCode, Problem> {
    let logout = match body.as_ref() {
        b"" => Logout { refresh_token: None, everywhere: false },
        body => serde_json::from_slice(body).map_err(|error| Problem::invalid("bad_body", error.to_string()))?,
    };
    let (store, now) = (state.system.store(), state.system.now());
    if logout.everywhere {
        let caller = caller?.user()?;
        state.auth.revoke_all(store, &caller.id).await?;
        state.took_from(&Group::User(caller.id.into()));
        return Ok(StatusCode::NO_CONTENT);
    }
    let by_refresh = match &logout.refresh_token {
        Some(token) => state.auth.family_of(store, token, now).await?,
        None => None,
    };
    let by_access = match caller {
        Ok(Caller { id, by: By::Session { family }, .. }) => Some((family, id)),
        Ok(_) => return Err(Problem::forbidden("an API key has no sign-in to end; delete the key instead")),
        Err(problem) if by_refresh.is_none() => return Err(problem),
        Err(_) => None,
    };
    for (family, user) in by_access.into_iter().chain(by_refresh) {
        state.auth.revoke(store, &family).await?;
        state.took_from(&Group::User(user.into()));
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn me(State(state): State<AppState>, caller: Caller) -> Result<axum::Json<Value>, Problem> {
    let store = state.system.store();
    let workspaces = match &caller.by {
        By::Session { .. } => store.workspaces_of(&caller.id).await?,
        By::Key { workspace, access } => {
            store.workspace(workspace).await?.map(|found| (found, access.role.to_string())).into_iter().collect()
        }
    };
    let mut shown = Vec::new();
    for (workspace, role) in &workspaces {
        let access = state.access(&caller, &workspace.id).await?;
        shown.push(json!({
            "id": workspace.id, "name": workspace.name, "role": role, "tier": workspace.tier,
            "permissions": access.names(), "invited": false,
        }));
    }
    if let By::Session { .. } = &caller.by {
        for (workspace, role) in store.invited_to(&caller.name).await? {
            let access = Access::of_user(role.parse()?, Vec::new());
            shown.push(json!({
                "id": workspace.id, "name": workspace.name, "role": role, "tier": workspace.tier,
                "permissions": access.names(), "invited": true,
            }));
        }
    }
    let user = json!({"id": caller.id, "email": caller.name, "admin": caller.admin});
    Ok(axum::Json(json!({"user": user, "workspaces": shown})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PasswordChange {
    password: String,
    new_password: String,
}

/// Another password, which ends every sign-in.
async fn change_password(
    State(state): State<AppState>,
    caller: Caller,
    Address(from): Address,
    Json(change): Json<PasswordChange>,
) -> Result<StatusCode, Problem> {
    let (caller, store) = (caller.user()?, state.system.store());
    let user = state.auth.confirm_password(store, &caller, change.password, tried(&state, from)).await?;
    state.auth.change_password(store, &user, change.new_password).await?;
    state.took_from(&Group::User(user.id.into()));
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Factor {
    password: String,
    /// Of the second factor, where one is in force.
    code: Option<String>,
}

/// Makes a secret for an authenticator. Sign-ins ask for its codes once one was confirmed.
async fn enrol(
    State(state): State<AppState>,
    caller: Caller,
    Address(from): Address,
    Json(body): Json<Factor>,
) -> Result<axum::Json<Value>, Problem> {
    let (caller, store, at) = (caller.user()?, state.system.store(), tried(&state, from));
    let user = state.auth.confirm_password(store, &caller, body.password, at).await?;
    state.auth.confirm_code(store, &user, body.code.as_deref(), at).await?;
    let (secret, url) = state.auth.enrol(store, &user).await?;
    Ok(axum::Json(json!({"secret": secret, "url": url})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Code {
    otp: String,
}

async fn confirm(State(state): State<AppState>, caller: Caller, body: Sent<Code>) -> Result<StatusCode, Problem> {
    let caller = caller.user()?;
    let Json(body) = body?;
    state.auth.confirm_enrolment(state.system.store(), &caller.id, &body.otp, state.system.now()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sign-ins ask for no code any more.
async fn disable(
    State(state): State<AppState>,
    caller: Caller,
    Address(from): Address,
    Json(body): Json<Factor>,
) -> Result<StatusCode, Problem> {
    let (caller, store, at) = (caller.user()?, state.system.store(), tried(&state, from));
    let user = state.auth.confirm_password(store, &caller, body.password, at).await?;
    state.auth.confirm_code(store, &user, body.code.as_deref(), at).await?;
    if !store.delete_totp(&user.id).await? {
        return Err(Problem::not_found("not_enrolled", "this account has no second factor"));
    }
    Ok(StatusCode::NO_CONTENT)
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

async fn create_user(State(state): State<AppState>, caller: Caller, new: Sent<NewUser>) -> Result<Response, Problem> {
    caller.admin()?;
    let Json(new) = new?;
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
