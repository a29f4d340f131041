//! What handlers take from a request. Each refuses with a problem.

use crate::AppState;
use crate::auth::{By, Caller};
use crate::permission::{Permission, Role};
use crate::problem::Problem;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, RawPathParams};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use engine::event::{Micros, WorkspaceId};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};

/// A JSON body.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(Problem))]
pub(crate) struct Json<T>(pub(crate) T);

/// Parts of the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub(crate) struct Path<T>(pub(crate) T);

/// The query string.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub(crate) struct Query<T>(pub(crate) T);

/// Who a request turned out to come from, told to the audit log.
#[derive(Clone, Default)]
pub(crate) struct Seen(Arc<OnceLock<String>>);

impl Seen {
    /// Tells who it is; the first to tell is right.
    pub(crate) fn tell(&self, name: String) {
        _ = self.0.set(name); // somebody told it before
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(parts: &Parts) -> Option<&str> {
    let (scheme, token) = parts.headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        let missing = || Problem::unauthorized("send `authorization: Bearer TOKEN` with an access token or API key");
        let token = bearer(parts).ok_or_else(missing)?;
        let caller = state.auth.authenticate(state.system.store(), token, state.system.now()).await?;
        if let Some(seen) = parts.extensions.get::<Seen>() {
            seen.tell(caller.name.clone());
        }
        Ok(caller)
    }
}

impl Caller {
    /// A user, not an API key.
    pub(crate) fn user(self) -> Result<Caller, Problem> {
        match self.by {
            By::Session { .. } => Ok(self),
            By::Key { .. } => Err(Problem::forbidden("an API key cannot do this; sign in as a user")),
        }
    }

    /// Somebody who administers the installation.
    pub(crate) fn admin(self) -> Result<Caller, Problem> {
        if self.admin { Ok(self) } else { Err(Problem::forbidden("only admins of this installation may do this")) }
    }
}

/// A caller who belongs to the workspace that the path names.
pub(crate) struct Member {
    /// User id, or `key:ID`.
    pub(crate) user: String,
    /// What people know them by: e-mail address, or `key:NAME`.
    pub(crate) name: String,
    pub(crate) workspace: WorkspaceId,
    pub(crate) role: Role,
    /// When the credentials end.
    pub(crate) expires_at: Option<Micros>,
}

impl Member {
    /// `caller` in `workspace`; the problem is the same for a foreign workspace and a missing one.
    pub(crate) async fn of(state: &AppState, caller: &Caller, workspace: &str) -> Result<Member, Problem> {
        let id: WorkspaceId = workspace.parse().map_err(|_| Problem::workspace_not_found(workspace))?;
        let role = state.auth.role(state.system.store(), caller, &id, state.system.now()).await?;
        let (user, name) = (caller.id.clone(), caller.name.clone());
        Ok(Member { user, name, workspace: id, role, expires_at: caller.expires_at })
    }

    /// Refuses a member whose role lacks the permission.
    pub(crate) fn may(&self, permission: Permission) -> Result<(), Problem> {
        if self.role.may(permission) {
            return Ok(());
        }
        let what = format!("{permission:?}").to_lowercase();
        Err(Problem::forbidden(format!("your role `{}` in this workspace lacks the permission `{what}`", self.role)))
    }
}

impl FromRequestParts<AppState> for Member {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        let caller = Caller::from_request_parts(parts, state).await?;
        let path = RawPathParams::from_request_parts(parts, state).await;
        let path = path.map_err(|_| Problem::invalid("bad_path", "the path is no UTF-8 once it is decoded"))?;
        let workspace = path.iter().find(|(name, _)| *name == "ws").map(|(_, value)| value);
        let workspace = workspace.ok_or_else(|| Problem::internal("a route for members has no {ws}"))?;
        Member::of(state, &caller, workspace).await
    }
}

/// Where a request comes from; nothing where it did not come over a socket.
pub(crate) struct Address(pub(crate) Option<IpAddr>);

impl<S: Sync> FromRequestParts<S> for Address {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(Address(parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip())))
    }
}

/// The parameters of a list: how many, from where on, and whatever the list filters by.
pub(crate) struct Listing {
    /// At least 1.
    pub(crate) limit: usize,
    pub(crate) rest: HashMap<String, String>,
}

/// Rows of a page unless the client says so, and the most it may ask for.
const PAGE: usize = 100;
const PAGE_MAX: usize = 10_000;

impl<S: Send + Sync> FromRequestParts<S> for Listing {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(mut rest) = Query::<HashMap<String, String>>::from_request_parts(parts, state).await?;
        let limit = match rest.remove("limit").map(|text| text.parse::<usize>()) {
            None => PAGE,
            Some(Ok(limit @ 1..=PAGE_MAX)) => limit,
            Some(_) => return Err(Problem::invalid("bad_parameter", format!("limit must be 1 to {PAGE_MAX}"))),
        };
        Ok(Listing { limit, rest })
    }
}

impl Listing {
    /// Takes a parameter out; what is left at the end is unknown.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        self.rest.remove(name)
    }

    /// Refuses parameters that nobody took.
    pub(crate) fn done(self) -> Result<(), Problem> {
        match self.rest.keys().next() {
            None => Ok(()),
            Some(name) => Err(Problem::invalid("unknown_parameter", format!("there is no parameter `{name}` here"))),
        }
    }
}
