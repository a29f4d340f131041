//! The WebSocket at `/api/v1/ws`: one task a connection, which reads requests, writes all that waits at once, and
//! holds the client to its credentials for as long as it stays.

use crate::AppState;
use crate::agents::asker;
use crate::agui;
use crate::auth::{By, Caller};
use crate::extract::Member;
use crate::hub::{ChannelName, Outbox, Request as Wish, Since, Subscription, Taken, Topic};
use crate::ingest::take_frame;
use crate::permission::Permission;
use crate::problem::Problem;
use crate::span;
use axum::Router;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use axum::routing::any;
use bytes::Bytes;
use engine::event::{ItemName, Micros, StreamName, WorkspaceId};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{MissedTickBehavior, interval_at, sleep_until, timeout};

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/api/v1/ws", any(upgrade))
}

const PROTOCOL: &str = "tidewatch.v1";
/// A client has this long to say who it is.
const AUTH_WAIT: Duration = Duration::from_secs(5);
/// How often the server asks whether the client is there, and checks that it still may listen.
const PING_EVERY: Duration = Duration::from_secs(25);
/// A client that says nothing for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A client that takes nothing for this long is gone.
const WRITE_WAIT: Duration = Duration::from_secs(60);
/// A client that is sent away has this long to take what is on its way and the reason.
const CLOSE_WAIT: Duration = Duration::from_secs(20);
/// The same while the server shuts down, and for a client that closes by itself.
const SHORT_CLOSE_WAIT: Duration = Duration::from_secs(3);
/// What is being done for a client while the server shuts down has this long to be answered.
const FINISH_WAIT: Duration = Duration::from_secs(1);
/// A client whose message was too large has this long to see why it is closed.
const TOO_LARGE_WAIT: Duration = Duration::from_secs(2);
/// The greatest message is a snapshot, which is bounded by half of this.
const WRITE_BUFFER_MAX: usize = 16 << 20;
/// Live queries of one connection.
const QUERIES_MAX: usize = 8;
/// Runs whose workspace a connection remembers, to cancel them by their id alone.
const RUNS_MAX: usize = 1_000;

/// Why the server closes a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Close {
    Unauthenticated,
    Expired,
    /// Where the client was cut off.
    TooSlow(String),
    TooLarge,
    Restart,
    /// The client asked, or is not there any more.
    Gone,
}

impl Close {
    fn frame(self) -> Option<CloseFrame> {
        let (code, reason) = match self {
            Close::Unauthenticated => (4001, "not authenticated".into()),
            Close::Expired => (4002, "the token has expired".into()),
            Close::TooSlow(why) => (4008, why.into()),
            Close::TooLarge => (1009, "the message is larger than limits.frame_bytes".into()),
            Close::Restart => (1012, "the server restarts".into()),
            Close::Gone => return None,
        };
        Some(CloseFrame { code, reason })
    }

    /// How long the client has to take what is on its way and the reason.
    fn wait(&self) -> Duration {
        match self {
            Close::Restart | Close::Gone => SHORT_CLOSE_WAIT,
            Close::Unauthenticated | Close::Expired | Close::TooSlow(_) | Close::TooLarge => CLOSE_WAIT,
        }
    }
}

/// Whether a message of the client was over the limit. The error's type belongs to a crate that axum keeps to itself.
fn is_too_large(error: &axum::Error) -> bool {
    error.to_string().starts_with("Space limit exceeded")
}

/// The token of `Authorization: Bearer TOKEN`, else of the subprotocol `bearer.TOKEN`.
fn token_of(headers: &HeaderMap, upgrade: &WebSocketUpgrade) -> Option<String> {
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.split_once(' '));
    let header = header.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    let offered = upgrade.requested_protocols().filter_map(|protocol: &HeaderValue| protocol.to_str().ok());
    header.or_else(|| offered.filter_map(|protocol| protocol.strip_prefix("bearer.")).next()).map(str::to_owned)
}

/// Whether a page of this origin may connect: one of this host or of a listed origin. Programs send none.
fn is_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let same_host =
        origin.split_once("://").is_some_and(|(_, of)| host.is_some_and(|host| of.eq_ignore_ascii_case(host)));
    same_host || origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin))
}

async fn upgrade(
    State(state): State<AppState>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Problem> {
    if !is_allowed(&headers, &state.config.cors_origins) {
        let detail = "pages of this origin may not connect; an admin can list it in cors_origins";
        return Err(Problem::forbidden(detail).code("origin_not_allowed"));
    }
    let token = token_of(&headers, &upgrade);
    let frame_bytes = state.config.limits.frame_bytes;
    let upgrade = upgrade
        .protocols([PROTOCOL])
        .read_buffer_size(4096)
        .write_buffer_size(4096)
        .max_write_buffer_size(WRITE_BUFFER_MAX)
        .max_frame_size(frame_bytes)
        .max_message_size(frame_bytes);
    Ok(upgrade.on_upgrade(move |socket| async move {
        metrics::gauge!("tidewatch_ws_connections").increment(1.0);
        Connection::new(state).serve(socket, token).await;
        metrics::gauge!("tidewatch_ws_connections").decrement(1.0);
    }))
}

/// A message of a client. Members that are not known here are let pass.
#[derive(Deserialize)]
struct Incoming<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(rename = "ref")]
    reference: Option<Value>,
    token: Option<String>,
    workspace: Option<String>,
    channel: Option<String>,
    since: Option<Position>,
    rate: Option<String>,
    sql: Option<String>,
    stream: Option<String>,
    #[serde(borrow)]
    events: Option<&'a RawValue>,
    agent: Option<String>,
    input: Option<Value>,
    run_id: Option<String>,
}

#[derive(Deserialize)]
struct Position {
    epoch: Value,
    offset: u64,
}

/// Who is at the other end.
struct SignedIn {
    token: String,
    caller: Caller,
}

struct Connection {
    state: AppState,
    id: u64,
    outbox: Arc<Outbox>,
    signed_in: Option<SignedIn>,
    /// By workspace and channel, as the client named them.
    subscriptions: HashMap<(Option<WorkspaceId>, String), Subscription>,
    /// The workspaces of runs that were started here.
    runs: HashMap<String, WorkspaceId>,
}

impl Connection {
    fn new(state: AppState) -> Connection {
        let outbox = Outbox::new(state.config.limits.queue_bytes);
        let id = state.hub.next_id();
        Connection { state, id, outbox, signed_in: None, subscriptions: HashMap::new(), runs: HashMap::new() }
    }

    async fn serve(mut self, mut socket: WebSocket, token: Option<String>) {
        let close = match token {
            Some(token) => self.sign_in(token, None).await.err(),
            None => None,
        };
        let mut frames = VecDeque::new();
        let close = match close {
            Some(close) => close,
            None => self.talk(&mut socket, &mut frames).await,
        };
        for (_, subscription) in self.subscriptions.drain() {
            self.state.hub.unsubscribe(&subscription, &self.outbox);
        }
        let wait = close.wait();
        let goodbye = async {
            // what was answered last says more than the code: it goes first
            if !matches!(close, Close::TooSlow(_)) {
                let mut last = Vec::new();
                self.outbox.take(Instant::now(), &mut last);
                for text in frames.into_iter().chain(last) {
                    socket.feed(Message::Text(text)).await?;
                }
            }
            let is_too_large = close == Close::TooLarge;
            if let Some(frame) = close.frame() {
                tracing::debug!(code = frame.code, reason = frame.reason.as_str(), "closing a WebSocket");
                socket.send(Message::Close(Some(frame))).await?;
            }
            if is_too_large {
                // the rest of the message is never read: ended at once, the connection would be reset and the reason lost
                tokio::time::sleep(TOO_LARGE_WAIT).await;
            }
            while let Some(Ok(_)) = socket.next().await {} // until the client has closed too
            Ok::<(), axum::Error>(())
        };
        _ = timeout(wait, goodbye).await; // the client may be gone already
    }

    /// Reads and writes, neither waiting for the other, until there is a reason to close. What was not written by then
    /// stays in `frames`.
    async fn talk(&mut self, socket: &mut WebSocket, frames: &mut VecDeque<Utf8Bytes>) -> Close {
        let (closing, outbox) = (self.state.closing.clone(), self.outbox.clone());
        let (mut sink, mut stream) = (&mut *socket).split();
        tokio::select! {
            close = self.read(&mut stream) => close,
            close = write(&mut sink, &outbox, frames) => close,
            // what is being done for the client has this long to be answered
            () = async { closing.cancelled().await; tokio::time::sleep(FINISH_WAIT).await } => Close::Restart,
        }
    }

    async fn read(&mut self, stream: &mut SplitStream<&mut WebSocket>) -> Close {
        let closing = self.state.closing.clone();
        let mut heard = Instant::now();
        let auth_end = heard + AUTH_WAIT;
        let mut checks = interval_at((heard + PING_EVERY).into(), PING_EVERY);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (end, close) = match &self.signed_in {
                None => (Some(auth_end), Close::Unauthenticated),
                Some(signed_in) => (signed_in.caller.expires_at.map(|end| self.instant(end)), Close::Expired),
            };
            tokio::select! {
                message = stream.next() => {
                    match message {
                        Some(Ok(Message::Text(text))) => {
                            if let Err(close) = self.on_text(text.as_str()).await {
                                return close;
                            }
                        }
                        Some(Ok(Message::Binary(_))) => {
                            self.refuse(None, &Problem::invalid("bad_frame", "send text frames of JSON"));
                        }
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                        Some(Err(error)) if is_too_large(&error) => return Close::TooLarge,
                        Some(Ok(Message::Close(_)) | Err(_)) | None => return Close::Gone,
                    }
                    self.outbox.room().await;
                    heard = Instant::now();
                }
                () = wait_until(end) => return close,
                () = sleep_until((heard + SILENCE_MAX).into()) => return Close::Gone,
                _ = checks.tick() => {
                    if let Err(close) = self.check().await {
                        return close;
                    }
                }
                () = closing.cancelled() => return Close::Restart,
            }
        }
    }

    /// The moment at which the clock will show `at`.
    fn instant(&self, at: Micros) -> Instant {
        Instant::now() + Duration::from_micros(at.since(self.state.system.now()).0.unsigned_abs())
    }

    fn refuse(&self, reference: Option<&Value>, problem: &Problem) {
        let mut error = json!({"type": "error", "code": problem.code, "detail": problem.detail});
        if let Some(reference) = reference {
            error["ref"] = reference.clone();
        }
        self.outbox.reply(error.to_string());
    }

    fn answer(&self, reference: Option<&Value>, mut answer: Value) {
        answer["type"] = "ok".into();
        if let Some(reference) = reference {
            answer["ref"] = reference.clone();
        }
        self.outbox.reply(answer.to_string());
    }

    /// Checks a token, the first one or one that takes its place before it expires: what to answer to a good one.
    async fn sign_in(&mut self, token: String, reference: Option<&Value>) -> Result<Option<Value>, Close> {
        let (store, now) = (self.state.system.store(), self.state.system.now());
        let found = self.state.auth.authenticate(store, &token, now).await.and_then(|caller| match &self.signed_in {
            Some(signed_in) if signed_in.caller.id != caller.id => {
                Err(Problem::forbidden("this connection is somebody else's; open one of your own"))
            }
            _ => Ok(caller),
        });
        match found {
            Ok(caller) => {
                let answer = json!({"user": caller.id});
                self.signed_in = Some(SignedIn { token, caller });
                Ok(Some(answer))
            }
            Err(problem) => {
                self.refuse(reference, &problem);
                // a bad new token leaves the good old one in force until it expires
                if self.signed_in.is_some() { Ok(None) } else { Err(Close::Unauthenticated) }
            }
        }
    }

    /// Looks again at what the client may see: a sign-in may have been ended, a membership too.
    async fn check(&mut self) -> Result<(), Close> {
        let Some(signed_in) = &self.signed_in else { return Ok(()) };
        let (store, now) = (self.state.system.store(), self.state.system.now());
        let caller = match self.state.auth.authenticate(store, &signed_in.token, now).await {
            Ok(caller) => caller,
            Err(problem) if problem.is_unauthorized() => return Err(Close::Unauthenticated),
            Err(_) => return Ok(()), // the store is away: the next round knows more
        };
        let mut lost = Vec::new();
        for (workspace, channel) in self.subscriptions.keys() {
            let allowed = self.may_listen(&caller, workspace.as_ref(), channel).await;
            if let Err(problem) = allowed
                && problem.is_final()
            {
                lost.push(((workspace.clone(), channel.clone()), problem));
            }
        }
        for (key, problem) in lost {
            if let Some(subscription) = self.subscriptions.remove(&key) {
                self.state.hub.unsubscribe(&subscription, &self.outbox);
                let (workspace, channel) = &key;
                let error = json!({
                    "type": "error", "workspace": workspace, "channel": channel, "code": problem.code,
                    "detail": problem.detail,
                });
                self.outbox.reply(error.to_string());
            }
        }
        if let Some(signed_in) = &mut self.signed_in {
            signed_in.caller = caller;
        }
        Ok(())
    }

    async fn may_listen(&self, caller: &Caller, workspace: Option<&WorkspaceId>, channel: &str) -> Result<(), Problem> {
        let name = ChannelName::parse(channel, self.id)?;
        match (&name.topic, workspace) {
            (Topic::Throughput | Topic::Actors, _) => caller.clone().admin().map(drop),
            (_, None) => Err(Problem::invalid("bad_request", "`workspace` is missing")),
            (topic, Some(workspace)) => {
                let member = Member::of(&self.state, caller, workspace.as_str()).await?;
                member.may_listen(topic)
            }
        }
    }

    async fn on_text(&mut self, text: &str) -> Result<(), Close> {
        let incoming: Incoming<'_> = match serde_json::from_str(text) {
            Ok(incoming) => incoming,
            Err(error) => {
                let reference = serde_json::from_str::<Value>(text).ok().and_then(|value| value.get("ref").cloned());
                self.refuse(reference.as_ref(), &Problem::invalid("bad_frame", format!("this is no message: {error}")));
                return if self.signed_in.is_some() { Ok(()) } else { Err(Close::Unauthenticated) };
            }
        };
        let reference = incoming.reference.clone();
        let reference = reference.as_ref();
        if incoming.kind == "auth" {
            if let Some(answer) = self.sign_in(incoming.token.unwrap_or_default(), reference).await? {
                self.answer(reference, answer);
            }
            return Ok(());
        }
        let Some(signed_in) = &self.signed_in else {
            let problem = Problem::unauthorized("the first message must be {\"type\":\"auth\",\"token\":…}");
            self.refuse(reference, &problem);
            return Err(Close::Unauthenticated);
        };
        let caller = signed_in.caller.clone();
        let (kind, workspace) = (incoming.kind, incoming.workspace.clone());
        let target = incoming.channel.clone().or_else(|| incoming.stream.clone()).or_else(|| incoming.agent.clone());
        let done = match incoming.kind {
            "subscribe" => self.subscribe(&caller, incoming).await,
            "unsubscribe" => self.unsubscribe(incoming),
            "publish" => self.publish(&caller, incoming).await,
            "run" => self.run(&caller, incoming).await,
            "cancel" => self.cancel(&caller, incoming).await,
            "ping" => {
                self.answer(reference, json!({}));
                Ok(())
            }
            other => {
                let kind: String = other.chars().take(40).collect();
                let known = "auth, subscribe, unsubscribe, publish, run, cancel, ping";
                Err(Problem::invalid("unknown_type", format!("`{kind}` is none of {known}")))
            }
        };
        if let Err(problem) = done {
            let on = (workspace.as_deref(), target.as_deref().unwrap_or_default());
            crate::edge::audit_frame(&self.state, &caller.name, kind, on, &problem).await;
            self.refuse(reference, &problem);
        }
        Ok(())
    }

    async fn subscribe(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<(), Problem> {
        let channel = required(incoming.channel, "channel")?;
        let name = ChannelName::parse(&channel, self.id)?;
        let rate = incoming.rate.map(|text| span::parse(&text)).transpose();
        let rate = rate.map_err(|error| Problem::invalid("bad_request", error))?;
        let rate = rate.map(|span| Duration::from_micros(span.0.unsigned_abs())).filter(|rate| !rate.is_zero());
        let epoch = |epoch: Value| epoch.as_str().map_or_else(|| epoch.to_string(), str::to_owned);
        let since = incoming.since.map(|since| Since { epoch: epoch(since.epoch), offset: since.offset });
        self.listen(caller, incoming.workspace, channel, name, incoming.sql, since, rate, incoming.reference).await
    }

    #[expect(clippy::too_many_arguments, reason = "a subscription is asked for with all of these")]
    async fn listen(
        &mut self,
        caller: &Caller,
        workspace: Option<String>,
        channel: String,
        name: ChannelName,
        sql: Option<String>,
        since: Option<Since>,
        rate: Option<Duration>,
        reference: Option<Value>,
    ) -> Result<(), Problem> {
        let is_system = matches!(name.topic, Topic::Throughput | Topic::Actors);
        let workspace = match workspace.filter(|_| !is_system) {
            Some(id) => Some(id.parse::<WorkspaceId>().map_err(|_| Problem::workspace_not_found(&id))?),
            None => None,
        };
        self.may_listen(caller, workspace.as_ref(), &channel).await?;
        if let (Some(sql), Some(workspace)) = (&sql, &workspace) {
            Member::of(&self.state, caller, workspace.as_str()).await?.may_ask(sql)?;
        }
        let key = (workspace.clone(), channel);
        // a second subscription takes the place of the first
        if let Some(old) = self.subscriptions.remove(&key) {
            self.state.hub.unsubscribe(&old, &self.outbox);
        }
        let most = self.state.config.limits.subscriptions;
        if self.subscriptions.len() >= most {
            let detail =
                format!("this connection has {most} subscriptions, the most of limits.subscriptions; end some");
            return Err(Problem::conflict("too_many_subscriptions", detail));
        }
        let is_query = matches!(name.topic, Topic::Query { .. });
        let queries = self.subscriptions.keys().filter(|(_, channel)| channel.starts_with("query/")).count();
        if is_query && queries >= QUERIES_MAX {
            let detail = format!("this connection has {QUERIES_MAX} live queries, the most there can be; end some");
            return Err(Problem::conflict("too_many_subscriptions", detail));
        }
        let wish = Wish { outbox: &self.outbox, since, rate, reference };
        let subscription = self.state.hub.subscribe(&self.state.system, workspace, name, sql, wish).await?;
        self.subscriptions.insert(key, subscription);
        Ok(())
    }

    fn unsubscribe(&mut self, incoming: Incoming<'_>) -> Result<(), Problem> {
        let channel = required(incoming.channel, "channel")?;
        let is_system = channel.starts_with("system/");
        let workspace = incoming.workspace.filter(|_| !is_system).and_then(|id| id.parse().ok());
        let Some(subscription) = self.subscriptions.remove(&(workspace, channel)) else {
            return Err(Problem::not_found("not_subscribed", "this connection has no such subscription"));
        };
        self.state.hub.unsubscribe(&subscription, &self.outbox);
        self.answer(incoming.reference.as_ref(), json!({}));
        Ok(())
    }

    async fn publish(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<(), Problem> {
        let member = Member::of(&self.state, caller, &required(incoming.workspace, "workspace")?).await?;
        let stream: StreamName = required(incoming.stream, "stream")?.parse()?;
        member.may_on(Permission::StreamIngest, &format!("streams/{stream}"))?;
        let events = required(incoming.events, "events")?;
        let events = Bytes::copy_from_slice(events.get().as_bytes());
        let answer = take_frame(&self.state, &member, &stream, events).await?;
        self.answer(incoming.reference.as_ref(), answer);
        Ok(())
    }

    /// Starts a run; its events come in the channel of its thread, which this connection listens to from then on.
    async fn run(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<(), Problem> {
        let workspace = required(incoming.workspace, "workspace")?;
        let member = Member::of(&self.state, caller, &workspace).await?;
        member.may(Permission::AiUse)?;
        let agent: ItemName = required(incoming.agent, "agent")?.parse()?;
        let asker = asker(&member, agent);
        let request = agui::read_input(asker, required(incoming.input, "input")?)?;
        let channel = format!("thread/{}", request.thread);
        if !self.subscriptions.contains_key(&(Some(member.workspace.clone()), channel.clone())) {
            let name = ChannelName::parse(&channel, self.id)?;
            self.listen(caller, Some(workspace), channel.clone(), name, None, None, None, None).await?;
        }
        member.count_run(&self.state).await?;
        let run = self.state.system.start_run(&member.workspace, request).await?;
        if self.runs.len() >= RUNS_MAX {
            self.runs.clear();
        }
        self.runs.insert(run.run.clone(), member.workspace.clone());
        let answer = json!({
            "channel": channel, "thread_id": run.thread, "run_id": run.run, "attached": run.attached,
        });
        self.answer(incoming.reference.as_ref(), answer);
        Ok(())
    }

    async fn cancel(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<(), Problem> {
        let run = required(incoming.run_id, "run_id")?;
        let workspace = match (incoming.workspace, self.runs.entry(run.clone()), &caller.by) {
            (Some(workspace), ..) => workspace,
            (None, Entry::Occupied(known), _) => known.get().to_string(),
            (None, Entry::Vacant(_), By::Key { workspace, .. }) => workspace.to_string(),
            (None, Entry::Vacant(_), By::Session { .. }) => {
                let detail = "this run was not started on this connection: name its `workspace` too";
                return Err(Problem::invalid("bad_request", detail));
            }
        };
        let member = Member::of(&self.state, caller, &workspace).await?;
        member.may(Permission::AiUse)?;
        self.state.system.cancel_run(&member.workspace, &run).await?;
        self.answer(incoming.reference.as_ref(), json!({"run_id": run}));
        Ok(())
    }
}

fn required<T>(member: Option<T>, name: &str) -> Result<T, Problem> {
    member.ok_or_else(|| Problem::invalid("bad_request", format!("`{name}` is missing")))
}

/// Writes what waits, all of it before each flush, and asks from time to time whether the client is there.
async fn write(
    sink: &mut SplitSink<&mut WebSocket, Message>,
    outbox: &Outbox,
    frames: &mut VecDeque<Utf8Bytes>,
) -> Close {
    let mut ping_at = Instant::now() + PING_EVERY;
    let mut taken = Vec::new();
    loop {
        let now = Instant::now();
        let until = match outbox.take(now, &mut taken) {
            Taken::TooSlow(why) => return Close::TooSlow(why),
            Taken::Until(until) => until,
        };
        metrics::counter!("tidewatch_ws_frames_total").increment(taken.len() as u64);
        frames.extend(taken.drain(..));
        let with_ping = now >= ping_at;
        if with_ping {
            ping_at = now + PING_EVERY;
        }
        if with_ping || !frames.is_empty() {
            tokio::select! {
                sent = timeout(WRITE_WAIT, send(sink, with_ping, frames)) => match sent {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Close::Gone,
                },
                () = outbox.too_slow() => {}
            }
            continue; // more may have come meanwhile
        }
        tokio::select! {
            () = outbox.ready() => {}
            () = wait_until(Some(until.map_or(ping_at, |until| until.min(ping_at)))) => {}
        }
    }
}

/// Where it is cancelled, what was not given to the socket is still in `frames`.
async fn send(
    sink: &mut SplitSink<&mut WebSocket, Message>,
    with_ping: bool,
    frames: &mut VecDeque<Utf8Bytes>,
) -> Result<(), axum::Error> {
    if with_ping {
        sink.feed(Message::Ping(Bytes::new())).await?;
    }
    loop {
        poll_fn(|context| sink.poll_ready_unpin(context)).await?;
        match frames.pop_front() {
            Some(text) => sink.start_send_unpin(Message::Text(text))?,
            None => return sink.flush().await,
        }
    }
}

/// Never without an instant.
async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(origin: Option<&'static str>) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, HeaderValue::from_static("Tide.example:8080"));
        if let Some(origin) = origin {
            headers.insert(ORIGIN, HeaderValue::from_static(origin));
        }
        is_allowed(&headers, &["https://app.example.com".to_owned()])
    }

    #[test]
    fn pages_of_this_host_and_of_listed_origins_may_connect_others_not() {
        assert!(allowed(None) && allowed(Some("http://tide.example:8080")) && allowed(Some("https://app.example.com")));
        for foreign in
            ["null", "http://tide.example", "https://evil.example", "https://app.example.com.evil.example", ""]
        {
            assert!(!allowed(Some(foreign)), "{foreign}");
        }
    }

    #[test]
    fn a_message_may_hold_what_is_not_known_here() {
        let text = r#"{"type":"subscribe","channel":"alerts","workspace":"acme","later":{"x":1},"since":{"epoch":"e","offset":3}}"#;
        let read: Incoming<'_> = serde_json::from_str(text).unwrap();
        assert_eq!((read.kind, read.channel.as_deref(), read.since.unwrap().offset), ("subscribe", Some("alerts"), 3));
    }

    #[test]
    fn each_reason_to_close_has_its_code() {
        let slow = Close::TooSlow("too slow for alerts".into());
        let codes = [Close::Unauthenticated, Close::Expired, slow, Close::TooLarge, Close::Restart, Close::Gone]
            .map(|close| close.frame().map(|frame| frame.code));
        assert_eq!(codes, [Some(4001), Some(4002), Some(4008), Some(1009), Some(1012), None]);
    }
    struct Server {
        state: AppState,
        url: String,
        token: String,
        _dir: tempfile::TempDir,
    }

    type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;
    use tokio_tungstenite::tungstenite::client::IntoClientRequest;
    use tokio_tungstenite::tungstenite::{Message as Sent, Utf8Bytes as Text};

    impl Server {
        async fn start() -> Server {
            let dir = tempfile::TempDir::new().unwrap();
            let config = crate::Config {
                auth: crate::AuthConfig {
                    secret: Some(crate::auth::testing::SECRET.into()),
                    bootstrap_email: Some("root@example.com".into()),
                    bootstrap_password: Some("correct horse".into()),
                    ..crate::AuthConfig::default()
                },
                limits: crate::Limits { subscriptions: 2, frame_bytes: 64 << 10, ..crate::Limits::default() },
                ..crate::Config::default()
            };
            let auth = crate::Auth::new(&config.auth).unwrap();
            let url = format!("sqlite:{}/store.db", dir.path().display());
            let store = sql::store::Store::open(&url).await.unwrap();
            let now = Micros(1);
            auth.bootstrap(&store, now).await.unwrap();
            let hub = crate::Hub::new(&config.limits);
            let log = streams::log::EmbeddedLog::open(&dir.path().join("log"), &Default::default()).unwrap();
            let parts = actors::Parts {
                store,
                log: Arc::new(log),
                outlet: hub.clone(),
                clock: Arc::new(actors::clock::SystemClock),
                limits: actors::Limits::default(),
                agents: Default::default(),
            };
            let system = actors::System::start(parts).await.unwrap();
            let password = "correct horse".to_owned();
            let tokens =
                auth.login(system.store(), "root@example.com", password, None, None, system.now()).await.unwrap();
            let token = json!(tokens)["access_token"].as_str().unwrap().to_owned();
            let metrics = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder().handle();
            let state = AppState::new(system, Arc::new(auth), hub, Arc::new(config), metrics);
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("ws://{}/api/v1/ws", listener.local_addr().unwrap());
            tokio::spawn(axum::serve(listener, routes().with_state(state.clone())).into_future());
            Server { state, url, token, _dir: dir }
        }

        /// A connection with this header.
        async fn connect(&self, name: &'static str, value: &str) -> Socket {
            let mut request = self.url.as_str().into_client_request().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
            tokio_tungstenite::connect_async(request).await.unwrap().0
        }

        async fn signed_in(&self) -> Socket {
            self.connect("authorization", &format!("Bearer {}", self.token)).await
        }
    }

    async fn ask(socket: &mut Socket, frame: Value) -> Value {
        socket.send(Sent::Text(frame.to_string().into())).await.unwrap();
        next(socket).await
    }

    /// The next frame; of a close, its code.
    async fn next(socket: &mut Socket) -> Value {
        loop {
            match socket.next().await {
                Some(Ok(Sent::Text(text))) => return serde_json::from_str::<Value>(Text::as_str(&text)).unwrap(),
                Some(Ok(Sent::Close(frame))) => return json!(frame.map(|frame| u16::from(frame.code))),
                Some(Ok(_)) => {}
                other => panic!("the socket ended: {other:?}"),
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn credentials_come_in_a_header_in_a_subprotocol_or_in_the_first_message() {
        let server = Server::start().await;
        let ping = json!({"type": "ping", "ref": 7});
        let pong = json!({"type": "ok", "ref": 7});
        let protocols = format!("tidewatch.v1, bearer.{}", server.token);
        for mut socket in [server.signed_in().await, server.connect("sec-websocket-protocol", &protocols).await] {
            assert_eq!(ask(&mut socket, ping.clone()).await, pong, "nothing unasked comes first");
        }
        let mut socket = server.connect("x-none", "").await;
        let answer = ask(&mut socket, json!({"type": "auth", "token": server.token, "ref": "a"})).await;
        assert_eq!((&answer["type"], &answer["ref"]), (&json!("ok"), &json!("a")));
        let mut socket = server.connect("authorization", "Bearer wrong").await;
        assert_eq!(next(&mut socket).await["code"], "unauthorized");
        assert_eq!(next(&mut socket).await, 4001);
        let mut socket = server.connect("x-none", "").await;
        assert_eq!(ask(&mut socket, ping).await["code"], "unauthorized");
        assert_eq!(next(&mut socket).await, 4001);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refused_message_leaves_the_connection_open_and_one_that_is_too_large_closes_it() {
        let server = Server::start().await;
        let mut socket = server.signed_in().await;
        for (frame, code) in [
            (json!({"type": "dance"}), "unknown_type"),
            (json!([]), "bad_frame"),
            (json!({"type": "subscribe", "workspace": "acme", "channel": "alert"}), "unknown_channel"),
            (json!({"type": "subscribe", "workspace": "acme", "channel": "alerts"}), "workspace_not_found"),
            (json!({"type": "unsubscribe", "workspace": "acme", "channel": "alerts"}), "not_subscribed"),
        ] {
            assert_eq!(ask(&mut socket, frame.clone()).await["code"], code, "{frame}");
        }
        socket.send(Sent::Binary(Bytes::from_static(b"{}"))).await.unwrap();
        assert_eq!(next(&mut socket).await["code"], "bad_frame");
        let (mut sink, mut stream) = socket.split();
        // most of the message is never taken: a client reads while it writes
        let writing = tokio::spawn(async move { sink.send(Sent::Text("x".repeat(4 << 20).into())).await });
        let Some(Ok(Sent::Close(Some(frame)))) = stream.next().await else { panic!("no close") };
        assert_eq!(u16::from(frame.code), 1009);
        writing.abort();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn subscriptions_are_bounded_and_a_second_one_to_a_channel_takes_the_place_of_the_first() {
        let server = Server::start().await;
        let mut socket = server.signed_in().await;
        let subscribe = |channel: &str| json!({"type": "subscribe", "channel": channel, "ref": channel});
        for channel in ["system/throughput", "system/throughput", "system/actors"] {
            let answer = ask(&mut socket, subscribe(channel)).await;
            assert_eq!((&answer["type"], &answer["recovered"]), (&json!("ok"), &json!(false)), "{answer}");
            let snapshot = next(&mut socket).await;
            assert_eq!((&snapshot["channel"], &snapshot["offset"]), (&json!(channel), &answer["offset"]));
            assert_eq!(snapshot["event"]["type"], "STATE_SNAPSHOT");
        }
        socket.send(Sent::Text(subscribe("system/throughput?x=1").to_string().into())).await.unwrap();
        let mut refused = next(&mut socket).await;
        while refused["type"] == "event" {
            refused = next(&mut socket).await;
        }
        assert_eq!(refused["code"], "bad_filter");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_closes_gets_its_close_back_and_a_server_that_drains_says_so() {
        let server = Server::start().await;
        let mut socket = server.signed_in().await;
        socket.close(None).await.unwrap();
        loop {
            match socket.next().await {
                Some(Ok(_)) => {}
                None => break, // the handshake was completed
                Some(Err(error)) => panic!("cut off: {error}"),
            }
        }
        let mut socket = server.signed_in().await;
        ask(&mut socket, json!({"type": "ping"})).await;
        server.state.closing.cancel();
        assert_eq!(next(&mut socket).await, 1012);
    }
}
