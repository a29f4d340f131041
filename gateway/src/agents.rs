//! Agents over HTTP and WebSocket: runs as server-sent events, replays, cancelling, threads, and the sockets of
//! existing chat clients.

use crate::AppState;
use crate::agui::{self, Asker, Dialect, InputError};
use crate::auth::{By, Caller};
use crate::extract::{Listing, Member, Path, Query};
use crate::permission::Permission;
use crate::problem::{Item, Problem};
use actors::agent::{AgentInfo, RunEvent, RunHandle, RunRequest};
use actors::rows::rfc3339;
use axum::Router;
use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, SEC_WEBSOCKET_PROTOCOL};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use engine::event::{ItemName, WorkspaceId};
use futures::stream::{self, SplitSink};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, timeout};

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
        .route("/api/v1/workspaces/{ws}/agents/{agent}/run", post(run).layer(input))
        .route("/api/v1/workspaces/{ws}/agents/{agent}/capabilities", get(capabilities))
        .route("/api/v1/workspaces/{ws}/runs/{run}/events", get(events))
        .route("/api/v1/workspaces/{ws}/runs/{run}/cancel", post(cancel))
        .route("/api/v1/workspaces/{ws}/threads", get(threads))
        .route("/api/v1/workspaces/{ws}/threads/{thread}/messages", get(messages))
        .route("/ai/agents/{agent}/stream", get(agent_socket))
        .route("/api/v1/ai/chat/{session}", get(chat_socket))
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

fn unknown_agent(name: &str) -> Problem {
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
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    member.may_run_agents()?;
    let name: ItemName = name.parse().map_err(|_| unknown_agent(&name))?;
    let request = agui::parse_input(asker(&member, name), &body?)?;
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

async fn events(
    State(state): State<AppState>,
    member: Member,
    Path((_, run)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    member.may(Permission::AiUse)?;
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
    member.may_somewhere(Permission::AiUse)?;
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
    member.may_on(Permission::AiUse, &format!("thread/{thread}"))?;
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

/// How long a socket may stay without credentials.
const AUTH_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of one frame of a client.
const FRAME_BYTES_MAX: usize = 4 << 20;
/// Runs that may wait on one socket: bare events name no run, so runs go one after the other.
const WAITING_MAX: usize = 16;
const PING_EVERY: Duration = Duration::from_secs(25);
/// A client that says nothing for so long, not even a pong, is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A client that takes no frame for so long is gone.
const SEND_WITHIN: Duration = Duration::from_secs(30);

const PROTOCOL: &str = "tidewatch.v1";

/// Close codes, as on `/api/v1/ws`.
const NOT_SIGNED_IN: u16 = 4001;
const SIGN_IN_OVER: u16 = 4002;
const FORBIDDEN: u16 = 4003;
const RESTARTING: u16 = 1012;

async fn agent_socket(
    State(state): State<AppState>,
    Path(agent): Path<String>,
    Query(parameters): Query<HashMap<String, String>>,
    headers: HeaderMap,
    caller: Result<Caller, Problem>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Problem> {
    open(state, agent, None, parameters, &headers, caller, upgrade).await
}

async fn chat_socket(
    State(state): State<AppState>,
    Path(session): Path<String>,
    Query(parameters): Query<HashMap<String, String>>,
    headers: HeaderMap,
    caller: Result<Caller, Problem>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Problem> {
    open(state, "analyst".to_owned(), Some(session), parameters, &headers, caller, upgrade).await
}

/// Opens a chat. Credentials come in the header, in a subprotocol or in the first frame; bad ones are refused where
/// they come.
async fn open(
    state: AppState,
    agent: String,
    thread: Option<String>,
    parameters: HashMap<String, String>,
    headers: &HeaderMap,
    caller: Result<Caller, Problem>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Problem> {
    let agent: ItemName = agent.parse().map_err(|_| unknown_agent(&agent))?;
    let caller = match (headers.contains_key(AUTHORIZATION), bearer_protocol(headers)) {
        (true, _) => Some(caller?),
        (false, Some(token)) => Some(authenticate(&state, &token).await?),
        (false, None) => None,
    };
    let wanted = parameters.get("workspace").cloned();
    let signed_in = match caller {
        Some(caller) => Some(SignedIn { member: member(&state, &caller, wanted.as_deref()).await?, caller }),
        None => None,
    };
    let upgrade = upgrade.protocols([PROTOCOL]).max_message_size(FRAME_BYTES_MAX).max_frame_size(FRAME_BYTES_MAX);
    Ok(upgrade.read_buffer_size(4096).on_upgrade(move |socket| async move {
        let chat = Chat { state, agent, thread: thread.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()) };
        chat.serve(socket, signed_in, wanted).await;
    }))
}

/// The token of the subprotocol `bearer.TOKEN`.
fn bearer_protocol(headers: &HeaderMap) -> Option<String> {
    let offered = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter().filter_map(|value| value.to_str().ok());
    let mut offered = offered.flat_map(|value| value.split(',')).map(str::trim);
    offered.find_map(|protocol| protocol.strip_prefix("bearer.")).map(str::to_owned)
}

async fn authenticate(state: &AppState, token: &str) -> Result<Caller, Problem> {
    state.auth.authenticate(state.system.store(), token, state.system.now()).await
}

/// The caller in the workspace they name, or in the only one they have.
async fn member(state: &AppState, caller: &Caller, wanted: Option<&str>) -> Result<Member, Problem> {
    let workspace = match (wanted, &caller.by) {
        (Some(wanted), _) => wanted.to_owned(),
        (None, By::Key { workspace, .. }) => workspace.to_string(),
        (None, By::Session { .. }) => {
            let own = state.system.store().workspaces_of(&caller.id).await?;
            let [(workspace, _)] = own.as_slice() else {
                let detail = format!("you belong to {} workspaces; name one with ?workspace=", own.len());
                return Err(Problem::invalid("workspace_missing", detail));
            };
            workspace.id.to_string()
        }
    };
    let member = Member::of(state, caller, &workspace).await?;
    member.may_run_agents()?;
    Ok(member)
}

type Sink = SplitSink<WebSocket, Message>;

/// The client is gone.
struct Gone;

/// Whom a socket serves.
struct SignedIn {
    caller: Caller,
    member: Member,
}

/// A socket of an existing chat client: one thread unless an input names another, bare events back.
struct Chat {
    state: AppState,
    agent: ItemName,
    thread: String,
}

/// What a client's frame asks for.
#[derive(Debug)]
enum Frame {
    Auth(String),
    Run(Box<RunRequest>),
    Cancel(String),
}

/// What a socket does from now on.
enum Then {
    GoOn,
    Close(u16, &'static str),
}

impl Chat {
    async fn serve(self, socket: WebSocket, signed_in: Option<SignedIn>, wanted: Option<String>) {
        let (mut sink, mut source) = socket.split();
        let signed_in = match signed_in {
            Some(signed_in) => signed_in,
            None => {
                let first = timeout(AUTH_WITHIN, source.next()).await;
                let token = match first {
                    Ok(Some(Ok(Message::Text(text)))) => token_of(&text),
                    _ => None,
                };
                let answer = match token {
                    Some(token) => self.sign_in(&token, wanted.as_deref()).await,
                    None => Err(Problem::unauthorized("send {\"type\":\"auth\",\"token\":…} first")),
                };
                match answer {
                    Ok(signed_in) => signed_in,
                    Err(problem) => {
                        _ = tell(&mut sink, &problem.detail, problem.code).await;
                        close(&mut sink, NOT_SIGNED_IN, "unauthorized").await;
                        return;
                    }
                }
            }
        };
        // an error means that the client has left: its runs go on
        _ = self.converse(&mut sink, &mut source, signed_in).await;
    }

    async fn sign_in(&self, token: &str, wanted: Option<&str>) -> Result<SignedIn, Problem> {
        let caller = authenticate(&self.state, token).await?;
        let member = member(&self.state, &caller, wanted).await?;
        Ok(SignedIn { caller, member })
    }

    async fn converse(
        &self,
        sink: &mut Sink,
        source: &mut futures::stream::SplitStream<WebSocket>,
        mut signed_in: SignedIn,
    ) -> Result<(), Gone> {
        let mut waiting: VecDeque<RunRequest> = VecDeque::new();
        let mut active: Option<(RunHandle, Dialect)> = None;
        let mut ping = tokio::time::interval(PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            while active.is_none()
                && let Some(request) = waiting.pop_front()
            {
                let dialect = Dialect::of(request.legacy);
                if let Err(problem) = signed_in.member.count_run(&self.state).await {
                    tell(sink, &problem.detail, problem.code).await?;
                    continue;
                }
                match self.state.system.start_run(&signed_in.member.workspace, request).await {
                    Ok(reader) => active = Some((reader, dialect)),
                    Err(fault) => {
                        let problem = Problem::from(fault);
                        tell(sink, &problem.detail, problem.code).await?;
                    }
                }
            }
            tokio::select! {
                event = next_of(&mut active) => {
                    let Some((first, dialect)) = event else { active = None; continue };
                    let mut is_over = first.is_terminal();
                    feed(sink, agui::encode(&first, dialect)).await?;
                    while let Some((_, event)) = active.as_mut().and_then(|(reader, _)| reader.ready()) {
                        is_over = event.is_terminal();
                        feed(sink, agui::encode(&event, dialect)).await?;
                    }
                    in_time(sink.flush()).await?;
                    if is_over {
                        active = None;
                    }
                }
                message = source.next() => {
                    heard = Instant::now();
                    let text = match message {
                        Some(Ok(Message::Text(text))) => text,
                        Some(Ok(Message::Binary(_))) => {
                            tell(sink, "send frames of JSON text", "bad_frame").await?;
                            continue;
                        }
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                        Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
                    };
                    if let Then::Close(code, reason) = self.take(&text, &mut signed_in, &mut waiting, sink).await? {
                        close(sink, code, reason).await;
                        return Ok(());
                    }
                }
                _ = ping.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err(Gone);
                    }
                    in_time(sink.send(Message::Ping(Bytes::new()))).await?;
                }
                () = until(&self.state, &signed_in.member) => {
                    close(sink, SIGN_IN_OVER, "the token has expired").await;
                    return Ok(());
                }
                () = self.state.closing.cancelled() => {
                    close(sink, RESTARTING, "the server restarts; connect again").await;
                    return Ok(());
                }
            }
        }
    }

    /// Does what a frame asks for.
    async fn take(
        &self,
        text: &str,
        signed_in: &mut SignedIn,
        waiting: &mut VecDeque<RunRequest>,
        sink: &mut Sink,
    ) -> Result<Then, Gone> {
        let frame = match self.read(text, &signed_in.member) {
            Ok(frame) => frame,
            Err(problem) => {
                tell(sink, &problem.detail, problem.code).await?;
                return Ok(Then::GoOn);
            }
        };
        match frame {
            Frame::Auth(token) => match self.sign_in(&token, Some(signed_in.member.workspace.as_str())).await {
                Ok(again) => *signed_in = again,
                Err(problem) => {
                    tell(sink, &problem.detail, problem.code).await?;
                    return Ok(Then::Close(NOT_SIGNED_IN, "unauthorized"));
                }
            },
            Frame::Run(request) => {
                // the role may have changed since the socket was opened
                match member(&self.state, &signed_in.caller, Some(signed_in.member.workspace.as_str())).await {
                    Ok(again) => signed_in.member = again,
                    Err(problem) => {
                        tell(sink, &problem.detail, problem.code).await?;
                        return Ok(Then::Close(FORBIDDEN, "forbidden"));
                    }
                }
                if waiting.len() < WAITING_MAX {
                    let may_hold = signed_in.member.access.may(Permission::PortfolioUpdate, None);
                    waiting.push_back(RunRequest { may_hold, ..*request });
                } else {
                    let detail = format!("{WAITING_MAX} runs wait already on this socket; ask again later");
                    tell(sink, &detail, "queue_full").await?;
                }
            }
            Frame::Cancel(run) => {
                if let Err(problem) = cancel_run(&self.state, &signed_in.member, &run).await {
                    tell(sink, &problem.detail, problem.code).await?;
                }
            }
        }
        Ok(Then::GoOn)
    }

    fn read(&self, text: &str, member: &Member) -> Result<Frame, Problem> {
        let bad = |what: &str| Problem::invalid("bad_frame", what);
        let frame: Value = serde_json::from_str(text).map_err(|error| bad(&format!("not JSON: {error}")))?;
        let asker = asker(member, self.agent.clone());
        let word = |name: &str| frame[name].as_str().map(str::to_owned);
        let run = |input: Value| Ok(Frame::Run(Box::new(agui::read_input(asker.clone(), input)?)));
        match frame["type"].as_str() {
            Some("auth") => word("token").map(Frame::Auth).ok_or_else(|| bad("auth needs a token")),
            Some("cancel") => {
                let run = word("run_id").or_else(|| word("runId"));
                run.map(Frame::Cancel).ok_or_else(|| bad("cancel needs a run_id"))
            }
            Some("run") => match frame.get("input") {
                Some(input) => run(input.clone()),
                None => Err(bad("run needs an input")),
            },
            None if frame.get("query").is_some() => self.question(&frame, asker),
            None if frame.get("threadId").is_some() => run(frame),
            _ => Err(bad("send {\"query\":…}, a RunAgentInput, or {\"type\":\"run\",\"input\":…}")),
        }
    }

    /// `{"query":…,"context":{…}}` as a run on the socket's thread.
    fn question(&self, frame: &Value, asker: Asker) -> Result<Frame, Problem> {
        let Some(query) = frame["query"].as_str().filter(|query| !query.trim().is_empty()) else {
            return Err(Problem::invalid("bad_frame", "query must be a text that is not empty"));
        };
        let context = frame["context"].as_object().into_iter().flatten().map(|(name, value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            json!({"description": name, "value": value})
        });
        let id = || uuid::Uuid::new_v4().to_string();
        let input = json!({
            "threadId": self.thread, "runId": id(), "protocolVersion": "1.0",
            "messages": [{"id": id(), "role": "user", "content": query}],
            "context": context.collect::<Vec<_>>(),
        });
        Ok(Frame::Run(Box::new(agui::read_input(asker, input)?)))
    }
}

/// The next event of the active run; waits for ever without one.
async fn next_of(active: &mut Option<(RunHandle, Dialect)>) -> Option<(Arc<RunEvent>, Dialect)> {
    match active {
        Some((reader, dialect)) => reader.next().await.map(|(_, event)| (event, *dialect)),
        None => std::future::pending().await,
    }
}

/// Returns when the member's credentials end.
async fn until(state: &AppState, member: &Member) {
    match member.expires_at {
        Some(end) => {
            let left = end.since(state.system.now());
            tokio::time::sleep(Duration::from_micros(left.0.max(0) as u64)).await;
        }
        None => std::future::pending().await,
    }
}

fn token_of(text: &str) -> Option<String> {
    let frame: Value = serde_json::from_str(text).ok()?;
    (frame["type"] == "auth").then(|| frame["token"].as_str().map(str::to_owned))?
}

async fn in_time<E>(send: impl Future<Output = Result<(), E>>) -> Result<(), Gone> {
    match timeout(SEND_WITHIN, send).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Gone),
    }
}

async fn feed(sink: &mut Sink, text: String) -> Result<(), Gone> {
    in_time(sink.feed(Message::text(text))).await
}

/// Says what is wrong with a frame, as the one kind of event that clients expect outside a run.
async fn tell(sink: &mut Sink, message: &str, code: &str) -> Result<(), Gone> {
    in_time(sink.send(Message::text(agui::error(message, code).to_string()))).await
}

async fn close(sink: &mut Sink, code: u16, reason: &'static str) {
    let frame = CloseFrame { code, reason: reason.into() };
    _ = in_time(sink.send(Message::Close(Some(frame)))).await; // the client may have left
    _ = in_time(sink.close()).await;
}
