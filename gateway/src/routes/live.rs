//! Channels as server-sent events: the messages of the WebSocket, with the same offsets, for clients that have none.

use crate::AppState;
use crate::agui::Dialect;
use crate::auth::Caller;
use crate::extract::{Address, Member, Query};
use crate::hub::{ChannelName, Cut, Group, Outbox, Request as Wish, Seats, Since, Subscription, Taken, Topic};
use crate::problem::Problem;
use crate::socket::{admit, frame, handshake, may_listen, rate_of, withdrawn};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use engine::event::WorkspaceId;
use futures::stream;
use serde::Deserialize;
use serde_json::json;
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::sleep_until;

/// A stream that is silent for so long shows that it lives; and its client's rights are looked at again this often, and
/// at once when they have changed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Clients of a server that restarts come back over this long.
const RETURN_SPREAD_MS: u64 = 5_000;
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/api/v1/workspaces/{ws}/events", get(follow))
}

async fn follow(
    State(state): State<AppState>,
    caller: Caller,
    member: Member,
    Address(address): Address,
    Query(parameters): Query<Vec<(String, String)>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (mut channels, mut rate, mut sql, mut version) = (Vec::new(), None, None, None);
    for (name, value) in parameters {
        match name.as_str() {
            "channel" => channels.push(value),
            "rate" => rate = rate_of(&value)?,
            "sql" => sql = Some(value),
            "protocolVersion" => version = Some(value.into()),
            _ => {
                return Err(Problem::invalid("unknown_parameter", format!("there is no parameter `{name}` here")));
            }
        }
    }
    let most = state.config.limits.subscriptions;
    if channels.is_empty() || channels.len() > most {
        let detail = format!("name 1 to limits.subscriptions = {most} channels: ?channel=alerts&channel=…");
        return Err(Problem::invalid("bad_parameter", detail));
    }
    let outbox = Outbox::new(state.config.limits.queue_bytes, Default::default());
    outbox.belongs_to(&caller.name);
    let mut seats = Seats::default();
    seats.hold(&outbox);
    let groups = [address.map(Group::Address), Some(Group::User(caller.id.as_str().into()))];
    groups.into_iter().flatten().try_for_each(|group| seats.enter(&state.hub.crowd, group, None))?;
    state.seat(&mut seats, &member.workspace).await?;
    let last = headers.get(LAST_EVENT_ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
    let id = state.hub.next_id();
    let mut follower = Follower {
        state,
        outbox,
        token: handshake::token_of(&headers).unwrap_or_default(),
        workspace: member.workspace,
        ends: None,
        follows: Vec::new(),
        silent_since: Instant::now(),
        check_at: Instant::now() + KEEP_ALIVE,
        is_over: false,
        _seats: seats,
    };
    follower.ends = caller.ends(&follower.state);
    let mut positions = last.split(',').map(position);
    for channel in channels {
        let since = positions.next().flatten();
        let name = ChannelName::parse(&channel, id)?;
        let wish = Wish {
            outbox: &follower.outbox.clone(),
            since,
            rate,
            reference: None,
            dialect: Dialect::of_version(version.as_ref()),
            run: None,
            is_node: false,
        };
        follower.follow(&caller, name, sql.clone(), wish).await?;
    }
    let body = stream::unfold(follower, |mut follower| async move {
        let text = follower.next().await?;
        Some((Ok::<Bytes, Infallible>(text.into()), follower))
    });
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// `EPOCH.OFFSET` of an id of ours.
fn position(text: &str) -> Option<Since> {
    let (epoch, offset) = text.trim().rsplit_once('.')?;
    Some(Since { epoch: epoch.to_owned(), offset: offset.parse().ok()? })
}

/// What every message of ours begins with.
#[derive(Deserialize)]
struct Head {
    channel: Option<String>,
    epoch: Option<String>,
    offset: Option<u64>,
}

/// A channel that a client follows, and where it is.
struct Follow {
    name: String,
    /// The question of a live query.
    sql: Option<String>,
    subscription: Subscription,
    at: Option<Since>,
}

/// One client and its channels.
struct Follower {
    state: AppState,
    outbox: Arc<Outbox>,
    token: String,
    workspace: WorkspaceId,
    /// When the client's credentials end.
    ends: Option<Instant>,
    follows: Vec<Follow>,
    silent_since: Instant,
    /// When the client's rights are looked at again.
    check_at: Instant,
    is_over: bool,
    _seats: Seats,
}

impl Drop for Follower {
    fn drop(&mut self) {
        for follow in self.follows.drain(..) {
            self.state.hub.unsubscribe(&follow.subscription, &self.outbox);
        }
    }
}

impl Follower {
    async fn follow(
        &mut self,
        caller: &Caller,
        name: ChannelName,
        sql: Option<String>,
        wish: Wish<'_>,
    ) -> Result<(), Problem> {
        let is_system = matches!(name.topic, Topic::Throughput | Topic::Actors);
        let workspace = (!is_system).then(|| self.workspace.clone());
        let name = admit(&self.state, caller, workspace.as_ref(), name, sql.as_deref()).await?;
        if self.follows.iter().any(|follow| *follow.name == *name.text) {
            return Err(Problem::invalid("bad_parameter", format!("channel `{}` is named twice", name.text)));
        }
        if let (Topic::Query { .. }, Some(workspace)) = (&name.topic, &workspace) {
            Member::of(&self.state, caller, workspace.as_str()).await?.count_request(&self.state).await?;
        }
        let text = name.text.to_string();
        // where it is until it is told of another place
        let at = wish.since.clone();
        let subscription = self.state.hub.subscribe(&self.state.system, workspace, name, sql.clone(), wish).await?;
        self.follows.push(Follow { name: text, sql, subscription, at });
        Ok(())
    }

    /// What is sent next; nothing at the end.
    async fn next(&mut self) -> Option<String> {
        if self.is_over {
            return None;
        }
        let closing = self.state.closing.clone();
        loop {
            let now = Instant::now();
            if self.ends.is_some_and(|end| end <= now) {
                self.is_over = true;
                let expired = Problem::unauthorized("the token has expired; come again with a new one");
                return Some(data(&withdrawn(None, None, &expired).to_string()));
            }
            if self.outbox.is_to_look() || self.check_at <= now {
                self.check_at = now + KEEP_ALIVE;
                if let Err((channel, problem)) = self.check().await {
                    self.is_over = true;
                    let workspace = channel.as_ref().map(|_| &self.workspace);
                    return Some(data(&withdrawn(workspace, channel.as_deref(), &problem).to_string()));
                }
            }
            let mut frames = Vec::new();
            let due = match self.outbox.take(None, Instant::now(), &mut frames) {
                Taken::Cut(Cut::TooSlow(why) | Cut::Ended(_, why)) => {
                    self.is_over = true;
                    return Some(data(&json!({"type": "error", "code": "slow_consumer", "detail": why}).to_string()));
                }
                Taken::More => None,
                Taken::Until(due) => due,
            };
            if !frames.is_empty() {
                self.silent_since = Instant::now();
                return Some(self.events(&frames));
            }
            let alive_at = self.silent_since + KEEP_ALIVE;
            let at = [due, self.ends].into_iter().flatten().fold(alive_at.min(self.check_at), Instant::min);
            tokio::select! {
                () = self.outbox.ready() => {}
                () = closing.cancelled() => {
                    self.is_over = true;
                    let after = rand::random_range(0..RETURN_SPREAD_MS);
                    let hint = json!({"type": "reconnect", "after_ms": after}).to_string();
                    return Some(format!("retry: {after}\n{}", data(&hint)));
                }
                () = sleep_until(at.into()) => {
                    if alive_at <= Instant::now() {
                        self.silent_since = Instant::now();
                        return Some(":\n\n".to_owned());
                    }
                }
            }
        }
    }

    /// Looks again at whether the client may have what it gets: why it may not, and of which channel if only of that.
    async fn check(&mut self) -> Result<(), (Option<String>, Problem)> {
        let (store, now) = (self.state.system.store(), self.state.system.now());
        let caller = match self.state.auth.authenticate(store, &self.token, now).await {
            Ok(caller) => caller,
            Err(problem) if problem.is_unauthorized() => return Err((None, problem)),
            Err(_) => return Ok(()), // the store is away: the next round knows more
        };
        for follow in &self.follows {
            let sql = follow.sql.as_deref();
            match may_listen(&self.state, &caller, Some(&self.workspace), follow.subscription.topic(), sql).await {
                Err(problem) if problem.is_final() => return Err((Some(follow.name.clone()), problem)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Messages as events, each with the positions in all channels behind it.
    fn events(&mut self, frames: &[Bytes]) -> String {
        let mut out = String::new();
        for payload in frames.iter().flat_map(|frames| frame::payloads(frames)) {
            let Ok(text) = std::str::from_utf8(payload) else { continue }; // control frames do not come here
            if let Ok(Head { channel: Some(channel), epoch: Some(epoch), offset: Some(offset) }) =
                serde_json::from_str(text)
                && let Some(follow) = self.follows.iter_mut().find(|follow| follow.name == channel)
            {
                follow.at = Some(Since { epoch, offset });
                out.push_str("id: ");
                for (at, follow) in self.follows.iter().enumerate() {
                    let comma = if at > 0 { "," } else { "" };
                    _ = match &follow.at {
                        Some(Since { epoch, offset }) => write!(out, "{comma}{epoch}.{offset}"),
                        None => write!(out, "{comma}-"), // writing to a String cannot fail
                    };
                }
                out.push('\n');
            }
            out.push_str(&data(text));
        }
        out
    }
}

fn data(json: &str) -> String {
    format!("data: {json}\n\n")
}
