//! What handlers take from a request. Each refuses with a problem.

use crate::auth::{By, Caller};
use crate::edge::Told;
use crate::hub::Topic;
use crate::permission::{Access, Permission, Role};
use crate::problem::Problem;
use crate::quota::{Of, Rate};
use crate::{AppState, BODY_BYTES};
use ::streams::table::positions;
use actors::Fault;
use actors::agent::AGENT_EVENTS;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, MatchedPath, RawPathParams, Request};
use axum::http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method};
use bytes::Bytes;
use engine::event::{METRICS, Micros, StreamName, WorkspaceId};
use engine::reference::TABLES;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A JSON object as the body.
pub(crate) struct Json<T>(pub(crate) T);

/// A body of a request whose sender has to be allowed it first: what is wrong with it is told to nobody else.
pub(crate) type Sent<T> = Result<Json<T>, Problem>;

/// JSON of any kind as the body, where an array has a meaning of its own.
pub(crate) struct AnyJson<T>(pub(crate) T);

/// The JSON of a body, read only once it is known to be JSON.
async fn json<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, Problem> {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence != "application/json" && !(essence.starts_with("application/") && essence.ends_with("+json")) {
        return Err(Problem::unsupported_type("send the body with `content-type: application/json`"));
    }
    let body: Plain = Plain::from_request(request, state).await?;
    Ok(body.0)
}

/// The bytes of a body that are no events: `MOST` at most, which is also what the route's `DefaultBodyLimit` says.
pub(crate) struct Plain<const MOST: usize = BODY_BYTES>(pub(crate) Bytes);

impl<const MOST: usize, S: Send + Sync> FromRequest<S> for Plain<MOST> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let encoding = request.headers().get(CONTENT_ENCODING).map(|encoding| encoding.as_bytes().trim_ascii());
        if encoding.is_some_and(|encoding| !encoding.is_empty() && !encoding.eq_ignore_ascii_case(b"identity")) {
            return Err(Problem::unsupported_type("send the body without content-encoding; events may be compressed"));
        }
        // before it has come: a client that says how much it is may never send it
        if announced(request.headers()).is_some_and(|bytes| bytes > MOST as u64) {
            return Err(Problem::too_large(format!("the body is larger than {MOST} bytes; send less at a time")));
        }
        Ok(Plain(Bytes::from_request(request, state).await?))
    }
}

/// Bytes that a body has by its `Content-Length`.
pub(crate) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for AnyJson<T> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        Ok(AnyJson(axum::Json::<T>::from_bytes(&json(request, state).await?)?.0))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let body = json(request, state).await?;
        match axum::Json::<T>::from_bytes(&body) {
            Err(JsonRejection::JsonSyntaxError(error)) => Err(JsonRejection::JsonSyntaxError(error).into()),
            // an array would be taken for an object's members in their order
            _ if body.trim_ascii_start().first() != Some(&b'{') => {
                Err(Problem::invalid("bad_body", "the body must be a JSON object"))
            }
            read => Ok(Json(read?.0)),
        }
    }
}

/// Parts of the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub(crate) struct Path<T>(pub(crate) T);

/// The query string.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub(crate) struct Query<T>(pub(crate) T);

/// Who a request turned out to come from, and what it was about beyond its path, told to the audit log.
#[derive(Clone, Default)]
pub(crate) struct Seen {
    name: Arc<OnceLock<String>>,
    what: Arc<Mutex<String>>,
    founded: Arc<OnceLock<WorkspaceId>>,
}

impl Seen {
    /// Tells who it is; the first to tell is right.
    pub(crate) fn tell(&self, name: String) {
        _ = self.name.set(name); // somebody told it before
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.name.get().map(String::as_str)
    }

    /// Adds to what the request is about: whom it concerns, and what they get. Never a secret.
    pub(crate) fn note(&self, what: impl Display) {
        let mut all = self.what.lock();
        all.push(' ');
        all.push_str(&what.to_string());
    }

    pub(crate) fn what(&self) -> String {
        self.what.lock().clone()
    }

    /// Tells which workspace there is since the request; its log begins with that.
    pub(crate) fn found(&self, workspace: WorkspaceId) {
        _ = self.founded.set(workspace); // a request makes one at most
    }

    pub(crate) fn founded(&self) -> Option<&WorkspaceId> {
        self.founded.get()
    }
}

impl<S: Sync> FromRequestParts<S> for Seen {
    type Rejection = Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Seen>().cloned().unwrap_or_default())
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(parts: &Parts) -> Option<&str> {
    let (scheme, token) = parts.headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Takes one request from a quota, and tells how it stands then.
async fn count(state: &AppState, told: Option<&Told>, of: Of, rate: Rate, now: Micros) -> Result<(), Problem> {
    let shared = match of.shared() {
        Some(name) => state.system.cache().take(&name, rate.shared(), 1.0).await,
        None => None,
    };
    let (standing, refused) = match state.quotas.request(of, rate, shared, now) {
        Ok(standing) => (standing, None),
        Err(refused) => (refused.standing, Some(refused)),
    };
    if let Some(told) = told {
        told.tell(standing);
    }
    refused.map_or(Ok(()), |refused| Err(refused.into()))
}

/// Whether a request is one of those that a tier counts: all of a key's, and a user's that are more than a look. Events
/// have a rate of their own.
fn is_counted(by: &By, method: &Method, route: &str) -> bool {
    if method == Method::POST && route.ends_with("/events") {
        return false;
    }
    matches!(by, By::Key { .. }) || !matches!(*method, Method::GET | Method::HEAD)
}

/// What ends sign-ins, and so counts for nobody: whoever has stolen one cannot use up what its owner ends it with.
const ENDINGS: [&str; 2] = ["/api/v1/auth/logout", "/api/v1/me/password"];

impl FromRequestParts<AppState> for Caller {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        let missing = || Problem::unauthorized("send `authorization: Bearer TOKEN` with an access token or API key");
        let token = bearer(parts).ok_or_else(missing)?;
        let now = state.system.now();
        let caller = state.auth.authenticate(state.system.store(), token, now).await?;
        let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
        if !ENDINGS.contains(&route) {
            let told = parts.extensions.get::<Told>();
            let rate = Rate::per_minute(state.config.limits.user_requests_per_minute);
            count(state, told, Of::User(caller.id.clone()), rate, now).await?;
        }
        if let Some(seen) = parts.extensions.get::<Seen>() {
            seen.tell(caller.name.clone());
        }
        Ok(caller)
    }
}

impl Caller {
    /// The moment at which the credentials end, if they do.
    pub(crate) fn ends(&self, state: &AppState) -> Option<Instant> {
        let left = self.expires_at?.since(state.system.now()).0;
        Some(Instant::now() + Duration::from_micros(left.max(0).unsigned_abs()))
    }

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

/// What agents read, and so what stands in their conversations.
const READ_BY_AGENTS: [Permission; 5] = [
    Permission::MetricRead,
    Permission::StreamRead,
    Permission::PortfolioRead,
    Permission::AlertRead,
    Permission::QueryRun,
];

/// A caller who belongs to the workspace that the path names.
pub(crate) struct Member {
    /// User id, or `key:ID`.
    pub(crate) user: String,
    /// What people know them by: e-mail address, or `key:NAME`.
    pub(crate) name: String,
    pub(crate) workspace: WorkspaceId,
    pub(crate) access: Access,
    /// May administer the whole installation.
    pub(crate) admin: bool,
}

impl Member {
    /// `caller` in `workspace`; the problem is the same for a foreign workspace and a missing one.
    pub(crate) async fn of(state: &AppState, caller: &Caller, workspace: &str) -> Result<Member, Problem> {
        let id: WorkspaceId = workspace.parse().map_err(|_| Problem::workspace_not_found(workspace))?;
        let access = state.access(caller, &id).await?;
        let (user, name) = (caller.id.clone(), caller.name.clone());
        Ok(Member { user, name, workspace: id, access, admin: caller.admin })
    }

    /// Counts what is asked for in a message as the request that it would be over HTTP.
    pub(crate) async fn count_request(&self, state: &AppState) -> Result<(), Problem> {
        self.count_requests(state, None).await
    }

    async fn count_requests(&self, state: &AppState, told: Option<&Told>) -> Result<(), Problem> {
        if let Some(most) = state.tier(&self.workspace).await?.requests_per_hour {
            let of = Of::Requests(self.workspace.clone(), self.user.clone());
            count(state, told, of, Rate::per_hour(most), state.system.now()).await?;
        }
        Ok(())
    }

    /// Counts a run of an agent.
    pub(crate) async fn count_run(&self, state: &AppState) -> Result<(), Problem> {
        if let Some(most) = state.tier(&self.workspace).await?.agent_runs_per_hour {
            count(state, None, Of::Runs(self.workspace.clone()), Rate::per_hour(most), state.system.now()).await?;
        }
        Ok(())
    }

    /// Refuses a member who lacks the permission in the whole workspace.
    pub(crate) fn may(&self, permission: Permission) -> Result<(), Problem> {
        if self.access.may(permission, None) { Ok(()) } else { Err(self.lacks(permission, None)) }
    }

    /// Refuses a member who lacks the permission on this resource, named as its channel is: `metrics/vwap_1m`.
    pub(crate) fn may_on(&self, permission: Permission, resource: &str) -> Result<(), Problem> {
        if self.access.may(permission, Some(resource)) { Ok(()) } else { Err(self.lacks(permission, Some(resource))) }
    }

    /// Refuses a member who has the permission nowhere; lists are then cut to what [`Member::sees`].
    pub(crate) fn may_somewhere(&self, permission: Permission) -> Result<(), Problem> {
        if self.access.may_somewhere(permission) { Ok(()) } else { Err(self.lacks(permission, None)) }
    }

    /// Whether one resource of a list is for this member.
    pub(crate) fn sees(&self, permission: Permission, kind: &str, name: impl std::fmt::Display) -> bool {
        self.access.may(permission, Some(&format!("{kind}/{name}")))
    }

    /// Refuses a member who may not listen to what a channel tells. Those of the whole system are for admins and never
    /// for members.
    pub(crate) fn may_listen(&self, topic: &Topic) -> Result<(), Problem> {
        match topic {
            Topic::Metric(name) => self.may_on(Permission::MetricRead, &format!("metrics/{name}")),
            Topic::Portfolio(id) => self.may_on(Permission::PortfolioRead, &format!("portfolio/{id}")),
            Topic::Value(id) => self.may_see_value(id),
            Topic::Stream(name) => self.may_read_stream(name.as_str()),
            Topic::Alerts => self.may(Permission::AlertRead),
            Topic::Thread(id) => self.may_read_thread(id),
            Topic::Query { .. } => self.may(Permission::QueryRun),
            Topic::Presence(watched) => {
                let watched = self.may_listen(&self.shown((**watched).clone()));
                watched.and_then(|()| self.may_see_people())
            }
            Topic::Throughput | Topic::Actors => Err(Problem::forbidden("only admins may listen to this")),
        }
    }

    /// What of a topic this member is told: of a portfolio whose positions they may not see, its value.
    pub(crate) fn shown(&self, topic: Topic) -> Topic {
        match topic {
            Topic::Portfolio(id) if !self.sees(Permission::PortfolioRead, "portfolio", &id) => Topic::Value(id),
            other => other,
        }
    }

    /// Refuses a member who may see neither the portfolio nor its value.
    pub(crate) fn may_see_value(&self, portfolio: impl std::fmt::Display) -> Result<(), Problem> {
        let resource = format!("portfolio/{portfolio}");
        self.may_on(Permission::FundPerformanceRead, &resource)
            .or_else(|problem| self.may_on(Permission::PortfolioRead, &resource).map_err(|_| problem))
    }

    /// Refuses a member who may not run agents. They read the whole workspace: so must whoever asks them be able to.
    pub(crate) fn may_run_agents(&self) -> Result<(), Problem> {
        self.may(Permission::AiUse)?;
        self.may_read_all()
    }

    /// Refuses a member who may not read a conversation. It holds what agents have read.
    pub(crate) fn may_read_thread(&self, thread: &str) -> Result<(), Problem> {
        self.may_on(Permission::AiUse, &format!("thread/{thread}"))?;
        self.may_read_all()
    }

    /// Refuses a member who may read no conversation; a list of them is then cut to those of [`Member::sees`].
    pub(crate) fn may_read_threads(&self) -> Result<(), Problem> {
        self.may_somewhere(Permission::AiUse)?;
        self.may_read_all()
    }

    fn may_read_all(&self) -> Result<(), Problem> {
        READ_BY_AGENTS.into_iter().try_for_each(|permission| self.may(permission))
    }

    /// Refuses a member who may not read a stream. That of what agents did holds all conversations.
    pub(crate) fn may_read_stream(&self, stream: &str) -> Result<(), Problem> {
        self.may_on(Permission::StreamRead, &format!("streams/{stream}"))?;
        if stream == AGENT_EVENTS { self.may_run_agents() } else { Ok(()) }
    }

    /// Everybody sees with whom they share a workspace, but for guests, and for keys that are there for something else.
    pub(crate) fn may_see_people(&self) -> Result<(), Problem> {
        match self.access.role == Role::Guest || self.access.is_scoped() {
            true => self.may(Permission::WorkspaceManage),
            false => Ok(()),
        }
    }

    /// Refuses a question that reads a table the member may not see.
    pub(crate) fn may_ask(&self, sql: &str) -> Result<(), Problem> {
        self.may(Permission::QueryRun)?;
        self.may_read_tables(sql)
    }

    /// Refuses SQL that reads a table the member may not see. What is no table of the workspace is left to whoever runs
    /// the SQL, who says so.
    pub(crate) fn may_read_tables(&self, sql: &str) -> Result<(), Problem> {
        // whoever may run agents may read all that there is
        if self.may_run_agents().is_ok() {
            return Ok(());
        }
        for table in sql::query::Question::parse(sql).and_then(|question| question.tables()).map_err(Fault::from)? {
            // as it is looked up: `"agent.events"` is the stream, too
            let name = table.join(".");
            let parts: Vec<&str> = name.split('.').collect();
            match parts.as_slice() {
                [metric] | [METRICS, metric] => self.may_on(Permission::MetricRead, &format!("metrics/{metric}"))?,
                [TABLES, table] => self.may_read_table(&format!("{TABLES}.{table}").parse::<StreamName>()?)?,
                _ => self.may_read_stream(&name)?,
            }
        }
        Ok(())
    }

    /// `ref.positions` tells what portfolios hold; every other reference table is read like a stream.
    pub(crate) fn may_read_table(&self, table: &StreamName) -> Result<(), Problem> {
        match table == positions().name() {
            true => self.may(Permission::PortfolioRead),
            false => self.may_on(Permission::StreamRead, &format!("tables/{}", table.parts().1)),
        }
    }

    fn lacks(&self, permission: Permission, resource: Option<&str>) -> Problem {
        let on = resource.map(|resource| format!(" on `{resource}`")).unwrap_or_default();
        Problem::forbidden(format!(
            "your role `{}` in this workspace lacks the permission `{permission}`{on}, and nothing grants it to you",
            self.access.role
        ))
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
        let member = Member::of(state, &caller, workspace).await?;
        let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
        if is_counted(&caller.by, &parts.method, route) {
            member.count_requests(state, parts.extensions.get::<Told>()).await?;
        }
        Ok(member)
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
        let Query(given) = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await?;
        let mut rest = HashMap::new();
        for (name, value) in given {
            if rest.contains_key(&name) {
                let detail = format!("parameter `{name}` stands twice; ask once for each of its values");
                return Err(Problem::invalid("bad_parameter", detail));
            }
            rest.insert(name, value);
        }
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
