//! What happens to every request and answer, whatever the route: an id, figures, headers, a time limit and the audit
//! log.

use crate::AppState;
use crate::extract::Seen;
use crate::problem::{Code, Problem};
use crate::quota::Standing;
use crate::serve::{FromNode, Nodes};
use axum::extract::{ConnectInfo, FromRequestParts, MatchedPath, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use engine::event::{Micros, Span, WorkspaceId};
use parking_lot::Mutex;
use sql::store::AuditEntry;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::Instrument;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id a request goes by in logs and in the audit log.
#[derive(Clone)]
struct RequestId(String);

/// Where a connection came from, as the audit log says it of what is done on it.
#[derive(Clone, Default)]
pub(crate) struct Origin {
    address: Option<IpAddr>,
    request_id: Box<str>,
    is_node: bool,
    nodes: u8,
}

impl Origin {
    /// Of the request that these belong to.
    pub(crate) fn of(extensions: &Extensions) -> Origin {
        let address = extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
        let request_id = extensions.get::<RequestId>().map(|id| id.0.as_str().into()).unwrap_or_default();
        let nodes = extensions.get::<Nodes>().map_or(0, |nodes| nodes.0);
        Origin { address, request_id, is_node: extensions.get::<FromNode>().is_some(), nodes }
    }

    /// What the request goes by in logs.
    pub(crate) fn request_id(&self) -> &str {
        &self.request_id
    }

    /// Whether a node that serves clients for this one passed it on.
    pub(crate) fn is_node(&self) -> bool {
        self.is_node
    }

    /// How many nodes say that they passed it on.
    pub(crate) fn nodes(&self) -> u8 {
        self.nodes
    }

    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.address
    }

    fn shown(&self) -> String {
        self.address.map_or_else(String::new, |address| address.to_string())
    }
}

/// A client's own id, where it is a sensible one.
fn given_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    let sensible = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_' || b == b'.';
    ((1..=64).contains(&id.len()) && id.bytes().all(sensible)).then(|| id.to_owned())
}

/// Gives each request its id, and each answer that id and the headers that browsers need to be careful.
pub(crate) async fn identify(mut request: Request, next: Next) -> Response {
    let id = given_id(request.headers()).unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    request.extensions_mut().insert(RequestId(id.clone()));
    let is_api = request.uri().path().starts_with("/api/");
    let span = tracing::info_span!("request", id, method = %request.method(), path = request.uri().path());
    let mut response = next.run(request).instrument(span).await;
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, HeaderValue::from_str(&id).expect("an id has only visible ASCII"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("x-frame-options", HeaderValue::from_static("DENY"));
    // for answers that are no page: a browser that shows one all the same runs nothing of it
    if !headers.contains_key(CONTENT_SECURITY_POLICY) {
        let nothing = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
        headers.insert(CONTENT_SECURITY_POLICY, nothing);
    }
    if is_api && !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

/// Time a request has until its answer begins. A stream of events may last longer.
pub(crate) const ANSWER_WAIT: Duration = Duration::from_secs(120);

/// Cuts off requests that take too long, and counts and times all of them by route.
pub(crate) async fn measure(request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let started = Instant::now();
    let response = match tokio::time::timeout(ANSWER_WAIT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let detail = format!("no answer within {} s; send less at a time or try again", ANSWER_WAIT.as_secs());
            Problem::new(StatusCode::REQUEST_TIMEOUT, "timeout", detail).into_response()
        }
    };
    let status = response.status().as_u16().to_string();
    let labels = [("route", route), ("method", method.to_string())];
    metrics::histogram!("tidewatch_http_seconds", &labels).record(started.elapsed().as_secs_f64());
    let [route, method] = labels;
    metrics::counter!("tidewatch_http_requests_total", &[route, method, ("status", status)]).increment(1);
    response
}

/// How a request's quota stands, told to the client in the answer's head.
#[derive(Clone, Default)]
pub(crate) struct Told(Arc<Mutex<Option<Standing>>>);

impl Told {
    /// The last one told counts: a workspace's quota over the user's.
    pub(crate) fn tell(&self, standing: Standing) {
        *self.0.lock() = Some(standing);
    }
}

impl<S: Sync> FromRequestParts<S> for Told {
    type Rejection = Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Told>().cloned().unwrap_or_default())
    }
}

/// Writes the quota's headers.
pub(crate) async fn tell_quota(mut request: Request, next: Next) -> Response {
    let told = Told::default();
    request.extensions_mut().insert(told.clone());
    let mut response = next.run(request).await;
    if let Some(standing) = told.0.lock().take() {
        standing.tell(response.headers_mut());
    }
    response
}

/// Whether what was asked for belongs in the audit log: changes, and what was refused to somebody known. Events, queries
/// and chats are many and change no settings; a refused sign-in is kept, one that came too soon is not.
fn is_notable(method: &Method, route: &str, status: StatusCode, code: Option<&str>, known: bool) -> bool {
    const BUSY: [&str; 5] = ["/events", "/rows", "/query", "/run", "/auth/refresh"];
    if is_sign_in(route) {
        return matches!(
            status,
            StatusCode::OK | StatusCode::SEE_OTHER | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
        );
    }
    let is_change = !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    let is_busy = BUSY.iter().any(|end| route.ends_with(end));
    known && (is_denial(status, code) || (is_change && !is_busy))
}

fn is_sign_in(route: &str) -> bool {
    route.ends_with("/auth/login") || route.ends_with("/callback")
}

/// Whether something was refused for want of a right. A workspace of others answers as one that is missing.
fn is_denial(status: StatusCode, code: Option<&str>) -> bool {
    status == StatusCode::FORBIDDEN || code == Some("workspace_not_found")
}

/// Of what something was done to, so much is kept.
const TARGET_CHARS: usize = 500;

/// Notes who did what, from where, and what came of it, before the answer is sent.
pub(crate) async fn audit(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let Some(route) = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned()) else {
        return next.run(request).await;
    };
    let seen = Seen::default();
    request.extensions_mut().insert(seen.clone());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let origin = Origin::of(request.extensions());
    let response = next.run(request).await;
    let code = response.extensions().get::<Code>().map(|code| code.0);
    if !is_notable(&method, &route, response.status(), code, seen.name().is_some()) {
        return response;
    }
    // a workspace that has ended has no log of its own, nor has a later one of the same name this entry
    let has_ended = method == Method::DELETE && route == "/api/v1/workspaces/{ws}" && code.is_none();
    let workspace = workspace_of(&path).or_else(|| seen.founded().cloned());
    let is_denied = is_denial(response.status(), code) && !is_sign_in(&route);
    let entry = AuditEntry {
        at: state.system.now(),
        workspace: if has_ended { None } else { known(&state, workspace).await },
        actor: seen.name().unwrap_or_default().to_owned(),
        action: format!("{method} {route}"),
        target: (path + &seen.what()).chars().take(TARGET_CHARS).collect(),
        outcome: code.unwrap_or("ok").to_owned(),
        from: origin.shown(),
        request_id: origin.request_id.into(),
    };
    keep(&state, entry, is_denied).await;
    response
}

/// The workspace in whose log something belongs. One that is not there has none: whoever makes it later is not to read
/// who asked for it before.
async fn known(state: &AppState, id: Option<WorkspaceId>) -> Option<WorkspaceId> {
    let id = id?;
    state.system.workspace_exists(&id).await.then_some(id)
}

/// Denials that are many are folded; nothing else is.
async fn keep(state: &AppState, mut entry: AuditEntry, is_denied: bool) {
    if is_denied {
        let Some(left_out) = state.denials.count(&entry) else { return };
        if left_out > 0 {
            entry.target.push_str(&format!(" and {left_out} more since the entry before"));
        }
    }
    let Some(entry) = state.unaudited.behind_others(entry) else { return };
    match state.system.store().audit(&entry).await {
        Ok(()) => {}
        Err(error) if error.is_away() => {
            if state.unaudited.wait(entry) {
                tokio::spawn(catch_up(state.clone()));
            }
        }
        Err(error) => tracing::error!(%error, ?entry, "an audit entry could not be stored"),
    }
}

/// Of the denials that are alike one is kept in so long.
const ALIKE_FOR: Span = Span::seconds(60);
/// Kinds of denials that are told apart in that time; beyond it one of each workspace is kept.
const KINDS_MAX: usize = 10_000;

/// The denials of the last minute: whoever asks for what they may not have as fast as they can fills no log.
#[derive(Default)]
pub(crate) struct Denials(Mutex<HashMap<Kind, Alike>>);

/// What is alike: who was denied what where, and why; or, where there is too much of it, only where.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    workspace: Option<WorkspaceId>,
    who_and_what: Option<[String; 3]>,
}

/// When one of a kind was kept last, and how many were not since.
struct Alike {
    kept: Micros,
    left_out: u64,
}

impl Denials {
    /// How many were left out before this one; nothing where it is left out too.
    fn count(&self, entry: &AuditEntry) -> Option<u64> {
        let who_and_what = [&entry.actor, &entry.action, &entry.outcome].map(String::clone);
        let mut kind = Kind { workspace: entry.workspace.clone(), who_and_what: Some(who_and_what) };
        let mut all = self.0.lock();
        if all.len() >= KINDS_MAX && !all.contains_key(&kind) {
            all.retain(|_, alike| entry.at.since(alike.kept) < ALIKE_FOR);
            if all.len() >= KINDS_MAX {
                kind.who_and_what = None;
            }
        }
        match all.entry(kind) {
            Entry::Vacant(none) => {
                none.insert(Alike { kept: entry.at, left_out: 0 });
                Some(0)
            }
            Entry::Occupied(mut alike) if entry.at.since(alike.get().kept) >= ALIKE_FOR => {
                Some(alike.insert(Alike { kept: entry.at, left_out: 0 }).left_out)
            }
            Entry::Occupied(mut alike) => {
                alike.get_mut().left_out += 1;
                None
            }
        }
    }
}

/// Entries that wait for the store, at most; what comes on top is told in the process's own log.
const UNAUDITED_MAX: usize = 10_000;
/// How often it is tried then.
const CATCH_UP_EVERY: Duration = Duration::from_secs(1);

/// Entries of the audit log that wait for a store that is away, oldest first.
#[derive(Default)]
pub(crate) struct Unaudited(Mutex<VecDeque<AuditEntry>>);

impl Unaudited {
    /// The entry again, where none waits before it.
    fn behind_others(&self, entry: AuditEntry) -> Option<AuditEntry> {
        let mut waiting = self.0.lock();
        if waiting.is_empty() {
            return Some(entry);
        }
        Self::push(&mut waiting, entry);
        None
    }

    /// Whether it is the first that waits: somebody has to see that they come to the store.
    fn wait(&self, entry: AuditEntry) -> bool {
        let mut waiting = self.0.lock();
        Self::push(&mut waiting, entry);
        waiting.len() == 1
    }

    fn push(waiting: &mut VecDeque<AuditEntry>, entry: AuditEntry) {
        match waiting.len() < UNAUDITED_MAX {
            true => waiting.push_back(entry),
            false => tracing::error!(?entry, "an audit entry is lost: {UNAUDITED_MAX} wait for the store already"),
        }
    }
}

/// Stores the entries that wait, in their order, once the store is back. Those that wait when the server drains are told
/// in the process's own log.
async fn catch_up(state: AppState) {
    loop {
        let Some(entry) = state.unaudited.0.lock().front().cloned() else { return };
        match state.system.store().audit(&entry).await {
            Err(error) if error.is_away() && !state.closing.is_cancelled() => {
                _ = tokio::time::timeout(CATCH_UP_EVERY, state.closing.cancelled()).await;
                continue;
            }
            Err(error) => tracing::error!(%error, ?entry, "an audit entry could not be stored"),
            Ok(()) => {}
        }
        let mut waiting = state.unaudited.0.lock();
        waiting.pop_front();
        if waiting.is_empty() {
            return; // under the lock: the next one that waits finds that it is the first
        }
    }
}

/// Notes what was refused to somebody known in a frame of a WebSocket. Other refusals are no matter of rights.
pub(crate) async fn audit_frame(
    state: &AppState,
    actor: &str,
    kind: &str,
    on: (Option<&str>, &str),
    problem: &Problem,
    origin: &Origin,
) {
    if !problem.is_denial() {
        return;
    }
    let (workspace, target) = on;
    // the id of the handshake: all that is done on a connection goes by it
    let entry = AuditEntry {
        at: state.system.now(),
        workspace: known(state, workspace.and_then(|id| id.parse().ok())).await,
        actor: actor.to_owned(),
        action: format!("ws {}", kind.chars().take(40).collect::<String>()),
        target: target.chars().take(TARGET_CHARS).collect(),
        outcome: problem.code.to_owned(),
        from: origin.shown(),
        request_id: origin.request_id.to_string(),
    };
    keep(state, entry, true).await;
}

/// The workspace that a path names.
fn workspace_of(path: &str) -> Option<WorkspaceId> {
    path.strip_prefix("/api/v1/workspaces/")?.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_and_refusals_are_notable_reads_and_events_are_not() {
        let (ok, no) = (StatusCode::OK, StatusCode::FORBIDDEN);
        let metric = "/api/v1/workspaces/{ws}/metrics/{metric}";
        assert!(is_notable(&Method::PUT, metric, ok, None, true));
        assert!(is_notable(&Method::DELETE, metric, no, None, true));
        assert!(is_notable(&Method::GET, "/api/v1/workspaces/{ws}/audit", no, None, true));
        assert!(!is_notable(&Method::GET, metric, ok, None, true));
        assert!(!is_notable(&Method::PUT, metric, StatusCode::UNAUTHORIZED, None, false));
        assert!(!is_notable(&Method::POST, "/api/v1/workspaces/{ws}/streams/{stream}/events", ok, None, true));
        assert!(is_notable(&Method::POST, "/api/v1/workspaces/{ws}/streams/{stream}/events", no, None, true));
        let foreign = Some("workspace_not_found");
        assert!(is_notable(&Method::GET, metric, StatusCode::NOT_FOUND, foreign, true));
    }

    fn denial(workspace: &str, actor: &str, action: &str, at: i64) -> AuditEntry {
        AuditEntry {
            at: Micros(at * 1_000_000),
            workspace: Some(workspace.parse().unwrap()),
            actor: actor.into(),
            action: action.into(),
            target: "/x".into(),
            outcome: "forbidden".into(),
            from: String::new(),
            request_id: String::new(),
        }
    }

    #[test]
    fn of_denials_that_are_alike_one_a_minute_is_kept_and_tells_of_the_others() {
        let denials = Denials::default();
        let count = |actor: &str, action: &str, at| denials.count(&denial("acme", actor, action, at));
        assert_eq!(count("ann", "GET /a", 0), Some(0));
        for second in 1..60 {
            assert_eq!(count("ann", "GET /a", second), None);
        }
        assert_eq!((count("bob", "GET /a", 30), count("ann", "GET /b", 30)), (Some(0), Some(0)));
        assert_eq!(denials.count(&denial("other", "ann", "GET /a", 30)), Some(0));
        assert_eq!((count("ann", "GET /a", 60), count("ann", "GET /a", 61)), (Some(59), None));
        assert_eq!(count("ann", "GET /a", 300), Some(1));
    }

    #[test]
    fn denials_of_too_many_kinds_are_alike_where_they_are_of_one_workspace() {
        let denials = Denials::default();
        let count = |n: usize, at| denials.count(&denial("acme", &format!("user{n}"), "GET /a", at));
        assert!((0..KINDS_MAX).all(|n| count(n, 0) == Some(0)));
        assert_eq!((count(KINDS_MAX, 1), count(KINDS_MAX + 1, 1), count(KINDS_MAX + 2, 1)), (Some(0), None, None));
        assert_eq!(denials.0.lock().len(), KINDS_MAX + 1);
        assert_eq!((count(KINDS_MAX + 3, 100), denials.0.lock().len()), (Some(0), 1), "those of before are forgotten");
    }

    #[test]
    fn a_sign_in_is_notable_unless_it_was_throttled() {
        let login = |status| is_notable(&Method::POST, "/api/v1/auth/login", status, None, true);
        assert!(login(StatusCode::OK) && login(StatusCode::UNAUTHORIZED));
        assert!(!login(StatusCode::TOO_MANY_REQUESTS) && !login(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn the_workspace_is_the_one_in_the_path() {
        assert_eq!(workspace_of("/api/v1/workspaces/acme/metrics").unwrap().as_str(), "acme");
        assert_eq!(workspace_of("/api/v1/workspaces/No%20Name"), None);
        assert_eq!(workspace_of("/api/v1/me"), None);
    }

    #[test]
    fn only_a_sensible_id_of_the_client_is_taken() {
        let given = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(id).unwrap());
            given_id(&headers)
        };
        assert_eq!(given("abc-1.2_3").as_deref(), Some("abc-1.2_3"));
        assert!(given("").is_none() && given("a b").is_none() && given(&"a".repeat(65)).is_none());
    }
}
