//! Agents over HTTP: runs as server-sent events, replays, cancelling, threads.

use crate::AppState;
use crate::agui::{self, Asker, Dialect, InputError};
use crate::extract::{Listing, Member, Path, Plain};
use crate::permission::Permission;
use crate::problem::{Item, PROBLEM_JSON, Problem};
use actors::agent::{AgentInfo, RunHandle};
use actors::rows::rfc3339;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use engine::event::{ItemName, WorkspaceId};
use futures::StreamExt;
use futures::stream;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::timeout;

/// Bytes of a RunAgentInput: a whole conversation travels in it.
const INPUT_BYTES_MAX: usize = 16 << 20;
/// A run that is silent for so long shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Bytes of events that are sent in one piece when they wait.
const PIECE_BYTES: usize = 64 << 10;

/// All routes of this file.
pub(crate) fn routes() -> Router<AppState> {
    let input = DefaultBodyLimit::max(INPUT_BYTES_MAX);
    Router::new()
        .route("/api/v1/workspaces/{ws}/agents", get(list))
        .route("/api/v1/workspaces/{ws}/agents/{agent}/run", post(run).layer(input).layer(map_response(readable)))
        .route("/api/v1/workspaces/{ws}/agents/{agent}/capabilities", get(capabilities))
        .route("/api/v1/workspaces/{ws}/runs/{run}/events", get(events))
        .route("/api/v1/workspaces/{ws}/runs/{run}/cancel", post(cancel))
        .route("/api/v1/workspaces/{ws}/threads", get(threads))
        .route("/api/v1/workspaces/{ws}/threads/{thread}/messages", get(messages))
}

impl From<InputError> for Problem {
    fn from(error: InputError) -> Self {
        let detail = error.to_string();
        let problem = Problem::invalid("bad_input", format!("this is no RunAgentInput: {detail}"));
        match error {
            InputError::NotAnObject(_) => problem,
            InputError::Missing { pointer, .. } | InputError::Malformed { pointer, .. } => {
                problem.errors(vec![Item { pointer, code: "bad_input", detail }])
            }
        }
    }
}

/// The agent of this name.
async fn agent(state: &AppState, ws: &WorkspaceId, name: &str) -> Result<AgentInfo, Problem> {
    let agents = state.system.agents(ws).await?;
    agents.into_iter().find(|agent| agent.name.as_str() == name).ok_or_else(|| unknown_agent(name))
}

pub(crate) fn unknown_agent(name: &str) -> Problem {
    let name: String = name.chars().take(80).collect();
    Problem::not_found("unknown_agent", format!("there is no agent `{name}`; GET agents names those there are"))
}

/// A member as one who asks `agent`.
pub(crate) fn asker(member: &Member, agent: ItemName) -> Asker {
    Asker { agent, user: member.user.clone(), may_hold: member.access.may(Permission::PortfolioUpdate, None) }
}

async fn run(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Result<Plain<INPUT_BYTES_MAX>, Problem>,
) -> Result<Response, Problem> {
    member.may_run_agents()?;
    let name: ItemName = name.parse().map_err(|_| unknown_agent(&name))?;
    let request = agui::parse_input(asker(&member, name), &body?.0)?;
    let dialect = Dialect::of(request.legacy);
    member.count_run(&state).await?;
    let thread = request.thread.clone();
    let started = state.system.start_run(&member.workspace, request).await;
    let mut reader = started.map_err(|fault| {
        let active = state.system.active_run(&member.workspace, &thread).filter(|_| fault.code == "thread_busy");
        Problem::from(fault).run(active)
    })?;
    if reader.attached {
        resume(&mut reader, &headers);
    }
    Ok(events_of(state, member.workspace, reader, dialect))
}

/// Clients of AG-UI read the body of a refusal, with the run that is in the way, where the type of its content names
/// `application/json`; a parameter is no matter to anybody else (RFC 6838, section 4.3).
async fn readable(mut response: Response) -> Response {
    const READABLE: HeaderValue = HeaderValue::from_static("application/problem+json; alt=\"application/json\"");
    if let Some(kind) = response.headers_mut().get_mut(CONTENT_TYPE)
        && *kind == PROBLEM_JSON
    {
        *kind = READABLE;
    }
    response
}

async fn events(
    State(state): State<AppState>,
    member: Member,
    Path((_, run)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    member.may_run_agents()?;
    let mut reader = state.system.attach_run(&member.workspace, &run, 0).await?;
    resume(&mut reader, &headers);
    let dialect = Dialect::of(reader.legacy);
    Ok(events_of(state, member.workspace, reader, dialect))
}

/// Skips what the client has, as its `Last-Event-ID` says. A position that means nothing here skips nothing: the
/// client gets the whole run again rather than a gap.
fn resume(reader: &mut RunHandle, headers: &HeaderMap) {
    let id = headers.get("last-event-id").and_then(|id| id.to_str().ok()).and_then(|id| id.rsplit_once('.'));
    if let Some((epoch, n)) = id
        && epoch == reader.epoch
        && let Ok(n) = n.parse()
    {
        reader.skip(n);
    }
}

/// The rest of a run as server-sent events. While the server drains, the run is ended rather than cut off.
fn events_of(state: AppState, ws: WorkspaceId, reader: RunHandle, dialect: Dialect) -> Response {
    let epoch = reader.epoch.clone();
    let pieces = stream::unfold((Some(reader), false), move |(reader, is_closing)| {
        let (state, ws, epoch) = (state.clone(), ws.clone(), epoch.clone());
        async move {
            let mut reader = reader?;
            let next = tokio::select! {
                next = timeout(KEEP_ALIVE, reader.next()) => next,
                () = state.closing.cancelled(), if !is_closing => {
                    _ = state.system.cancel_run(&ws, &reader.run).await; // it may be over
                    timeout(KEEP_ALIVE, reader.next()).await
                }
            };
            let is_closing = state.closing.is_cancelled();
            let Ok(next) = next else {
                return Some((Bytes::from_static(b": keep-alive\n\n"), (Some(reader), is_closing)));
            };
            let (n, event) = next?;
            let mut is_over = event.is_terminal();
            let mut piece = agui::frame(&epoch, n, &event, dialect);
            while piece.len() < PIECE_BYTES
                && let Some((n, event)) = reader.ready()
            {
                is_over = event.is_terminal();
                piece.push_str(&agui::frame(&epoch, n, &event, dialect));
            }
            Some((Bytes::from(piece), ((!is_over).then_some(reader), is_closing)))
        }
    });
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-cache"),
        (axum::http::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(pieces.map(Ok::<_, Infallible>))).into_response()
}

async fn cancel(
    State(state): State<AppState>,
    member: Member,
    Path((_, run)): Path<(String, String)>,
) -> Result<Response, Problem> {
    cancel_run(&state, &member, &run).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({"runId": run}))).into_response())
}

/// Stops a run: whoever talks to agents their own, an admin of agents those of others too.
pub(crate) async fn cancel_run(state: &AppState, member: &Member, run: &str) -> Result<(), Problem> {
    member.may(Permission::AiUse)?;
    if state.system.run_user(&member.workspace, run).is_some_and(|user| user != member.user) {
        member.may(Permission::AiAdmin)?;
    }
    Ok(state.system.cancel_run(&member.workspace, run).await?)
}

async fn list(State(state): State<AppState>, member: Member) -> Result<Json<Value>, Problem> {
    member.may(Permission::AiUse)?;
    let agents = state.system.agents(&member.workspace).await?.into_iter().map(|agent| {
        let mut shown = json!({"name": agent.name.as_str(), "description": agent.description});
        if let Some(model) = agent.model {
            shown["model"] = model.into();
        }
        shown
    });
    Ok(Json(json!({"agents": agents.collect::<Vec<_>>()})))
}

async fn capabilities(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
) -> Result<Json<Value>, Problem> {
    member.may(Permission::AiUse)?;
    Ok(Json(agui::capabilities(&agent(&state, &member.workspace, &name).await?)))
}

async fn threads(State(state): State<AppState>, member: Member, mut listing: Listing) -> Result<Json<Value>, Problem> {
    member.may_read_threads()?;
    let (limit, before) = (listing.limit, listing.take("before"));
    listing.done()?;
    let (threads, next) = state.system.store().threads(&member.workspace, limit, before.as_deref()).await?;
    let threads = threads.into_iter().filter(|thread| member.sees(Permission::AiUse, "thread", &thread.id));
    let threads = threads.map(|thread| {
        json!({
            "id": thread.id, "agent": thread.agent, "title": thread.title, "created_by": thread.created_by,
            "created_at": rfc3339(thread.created_at), "updated_at": rfc3339(thread.updated_at),
        })
    });
    let mut page = json!({"threads": threads.collect::<Vec<_>>()});
    if let Some(next) = next {
        page["next"] = next.into();
    }
    Ok(Json(page))
}

async fn messages(
    State(state): State<AppState>,
    member: Member,
    Path((_, thread)): Path<(String, String)>,
    mut listing: Listing,
) -> Result<Json<Value>, Problem> {
    member.may_read_thread(&thread)?;
    let (limit, after) = (listing.limit, listing.take("after"));
    listing.done()?;
    let after = after.map_or(Ok(0), |after| after.parse::<i64>());
    let after =
        after.map_err(|_| Problem::invalid("bad_cursor", "after is none that this list gave; start without"))?;
    let store = state.system.store();
    if store.thread(&member.workspace, &thread).await?.is_none() {
        let thread: String = thread.chars().take(80).collect();
        return Err(Problem::not_found("unknown_thread", format!("there is no thread `{thread}`")));
    }
    let mut messages = store.messages(&member.workspace, &thread, after, limit + 1).await?;
    let has_more = messages.len() > limit;
    messages.truncate(limit);
    let next = messages.last().map(|(seq, _)| seq.to_string()).filter(|_| has_more);
    let mut page = json!({"messages": messages.into_iter().map(|(_, message)| message.content).collect::<Vec<_>>()});
    if let Some(next) = next {
        page["next"] = next.into();
    }
    Ok(Json(page))
}
