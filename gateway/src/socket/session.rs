//! What a client may ask for on its connection, and whether it still may have what it was given.

use super::Line;
use super::peer::{Close, Pending, Talk};
use crate::AppState;
use crate::agents::{asker, cancel_run};
use crate::agui::{self, Dialect};
use crate::auth::{By, Caller};
use crate::edge::{Origin, audit_frame};
use crate::extract::Member;
use crate::hub::{ChannelName, Group, Hub, Outbox, Request as Wish, Seats, Since, Subscription, Topic};
use crate::ingest::{decode_frame, take};
use crate::permission::Permission;
use crate::problem::{Problem, plain};
use bytes::Bytes;
use engine::event::{ItemName, StreamName, WorkspaceId};
use serde::Deserialize;
use serde::de::{Error, IgnoredAny};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::span;
use tokio_util::sync::CancellationToken;

/// Live queries of one connection.
const QUERIES_MAX: usize = 8;
/// Runs whose workspace a connection remembers, to cancel them by their id alone.
const RUNS_MAX: usize = 1_000;

/// A message of a client. Members that are not known here are let pass.
#[derive(Deserialize)]
pub(super) struct Incoming<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
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
    #[serde(rename = "protocolVersion")]
    protocol_version: Option<Value>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object with epoch and offset")]
struct Position {
    epoch: Value,
    offset: u64,
}

/// What a client listens to.
struct Followed {
    subscription: Subscription,
    /// The question of a live query.
    sql: Option<String>,
}

/// Who is at the other end.
struct SignedIn {
    token: String,
    caller: Caller,
}

pub(super) struct Session {
    state: AppState,
    id: u64,
    outbox: Arc<Outbox>,
    signed_in: Option<SignedIn>,
    /// By workspace and channel, as the client named them.
    subscriptions: HashMap<(Option<WorkspaceId>, String), Followed>,
    /// The workspaces of runs that were started here.
    runs: HashMap<String, WorkspaceId>,
    /// What this connection counts as.
    seats: Seats,
    origin: Origin,
}

impl Drop for Session {
    /// Also where its task failed.
    fn drop(&mut self) {
        self.unfollow();
    }
}

impl Session {
    /// Ends all subscriptions.
    fn unfollow(&mut self) {
        for (_, followed) in self.subscriptions.drain() {
            self.state.hub.unsubscribe(&followed.subscription, &self.outbox);
        }
    }

    pub(super) fn new(state: AppState, Line { outbox, seats, origin }: Line) -> Session {
        let (id, subscriptions, runs) = (state.hub.next_id(), HashMap::new(), HashMap::new());
        Session { state, id, outbox, signed_in: None, subscriptions, runs, seats, origin }
    }

    fn reject(&self, reference: Option<&Value>, problem: &Problem) {
        self.outbox.reply(&refusal(reference, problem).to_string());
    }

    fn answer(&self, reference: Option<&Value>, answer: Value) {
        self.outbox.reply(&ok(reference, answer).to_string());
    }

    /// Checks a token, the first one or one that takes its place before it expires: what to answer to a good one.
    async fn authenticate(&mut self, token: String, reference: Option<&Value>) -> Result<Option<Value>, Close> {
        let (store, now) = (self.state.system.store(), self.state.system.now());
        let found = self.state.auth.authenticate(store, &token, now).await.and_then(|caller| match &self.signed_in {
            Some(signed_in) if signed_in.caller.id != caller.id => {
                Err(Problem::forbidden("this connection is somebody else's; open one of your own"))
            }
            _ => Ok(caller),
        });
        match found {
            Ok(caller) => {
                let group = Group::User(caller.id.as_str().into());
                if let Err(problem) = self.seats.enter(&self.state.hub.crowd, group, None) {
                    self.reject(reference, &problem);
                    return Err(Close::TooMany(problem.detail));
                }
                let answer = json!({"user": caller.id});
                self.outbox.belongs_to(&caller.name);
                self.signed_in = Some(SignedIn { token, caller });
                Ok(Some(answer))
            }
            Err(problem) => {
                self.reject(reference, &problem);
                // a bad new token leaves the good old one in force until it expires
                if self.signed_in.is_some() { Ok(None) } else { Err(Close::Unauthenticated) }
            }
        }
    }

    async fn subscribe(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<(), Problem> {
        let channel = required(incoming.channel, "channel")?;
        let name = ChannelName::parse(&channel, self.id)?;
        let rate = incoming.rate.map_or(Ok(None), |text| rate_of(&text))?;
        let epoch = |epoch: Value| epoch.as_str().map_or_else(|| epoch.to_string(), str::to_owned);
        let since = incoming.since.map(|since| Since { epoch: epoch(since.epoch), offset: since.offset });
        let outbox = self.outbox.clone();
        let wish = Wish {
            outbox: &outbox,
            since,
            rate,
            reference: incoming.reference,
            dialect: Dialect::of_version(incoming.protocol_version.as_ref()),
            run: None,
            is_node: self.origin.is_node(),
        };
        self.listen(caller, incoming.workspace, name, incoming.sql, wish).await
    }

    async fn listen(
        &mut self,
        caller: &Caller,
        workspace: Option<String>,
        name: ChannelName,
        sql: Option<String>,
        wish: Wish<'_>,
    ) -> Result<(), Problem> {
        let is_system = matches!(name.topic, Topic::Throughput | Topic::Actors);
        let workspace = match workspace.filter(|_| !is_system) {
            Some(id) => Some(id.parse::<WorkspaceId>().map_err(|_| Problem::workspace_not_found(&id))?),
            None => None,
        };
        let name = admit(&self.state, caller, workspace.as_ref(), name, sql.as_deref()).await?;
        if let Some(workspace) = &workspace {
            self.state.seat(&mut self.seats, workspace).await?;
        }
        let is_query = matches!(name.topic, Topic::Query { .. });
        if let (true, Some(workspace)) = (is_query, &workspace) {
            Member::of(&self.state, caller, workspace.as_str()).await?.count_request(&self.state).await?;
        }
        let key = (workspace.clone(), name.text.to_string());
        // a second subscription takes the place of the first
        if let Some(old) = self.subscriptions.remove(&key) {
            self.state.hub.unsubscribe(&old.subscription, &self.outbox);
        }
        self.has_room()?;
        let queries = self.subscriptions.keys().filter(|(_, channel)| channel.starts_with("query/")).count();
        if is_query && queries >= QUERIES_MAX {
            let detail = format!("this connection has {QUERIES_MAX} live queries, the most there can be; end some");
            return Err(Problem::conflict("too_many_subscriptions", detail));
        }
        let subscription = self.state.hub.subscribe(&self.state.system, workspace, name, sql.clone(), wish).await?;
        self.subscriptions.insert(key, Followed { subscription, sql });
        Ok(())
    }

    fn has_room(&self) -> Result<(), Problem> {
        let most = self.state.config.limits.subscriptions;
        if self.subscriptions.len() < most {
            return Ok(());
        }
        let detail = format!("this connection has {most} subscriptions, the most of limits.subscriptions; end some");
        Err(Problem::conflict("too_many_subscriptions", detail))
    }

    fn unsubscribe(&mut self, incoming: Incoming<'_>) -> Result<(), Problem> {
        let key = followed_by(incoming.workspace, required(incoming.channel, "channel")?);
        let Some(followed) = self.subscriptions.remove(&key) else {
            return Err(Problem::not_found("not_subscribed", "this connection has no such subscription"));
        };
        self.state.hub.unsubscribe(&followed.subscription, &self.outbox);
        self.answer(incoming.reference.as_ref(), json!({}));
        Ok(())
    }

    /// Hands a channel over to its feed, which the node at the other end listens to.
    fn feed(&mut self, incoming: Incoming<'_>) -> Result<(), Problem> {
        let key = followed_by(incoming.workspace, required(incoming.channel, "channel")?);
        match self.subscriptions.get(&key) {
            Some(followed) if followed.subscription.feed() => {
                self.answer(incoming.reference.as_ref(), json!({}));
                Ok(())
            }
            _ => Err(Problem::not_found("not_subscribed", "this connection has no subscription with such a feed")),
        }
    }

    /// Takes events in; the answer comes once they are durable. Until then the client may go on: what it publishes is
    /// in the order in which it came.
    async fn publish(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<Pending, Problem> {
        let member = Member::of(&self.state, caller, &required(incoming.workspace, "workspace")?).await?;
        let stream: StreamName = required(incoming.stream, "stream")?.parse()?;
        member.may_on(Permission::StreamIngest, &format!("streams/{stream}"))?;
        let events = required(incoming.events, "events")?;
        let events = Bytes::copy_from_slice(events.get().as_bytes());
        let tier = self.state.tier(&member.workspace).await?;
        let decoded = decode_frame(&self.state, &member, &stream, &tier, events).await?;
        let (state, reference) = (self.state.clone(), incoming.reference);
        Ok(Box::pin(async move {
            match take(&state, &member.workspace, &stream, &tier, decoded).await {
                Ok(answer) => ok(reference.as_ref(), answer),
                Err(problem) => refusal(reference.as_ref(), &problem),
            }
        }))
    }

    /// Starts a run; its events come in the channel of its thread, which this connection listens to from then on.
    async fn run(&mut self, caller: &Caller, incoming: Incoming<'_>) -> Result<(), Problem> {
        let workspace = required(incoming.workspace, "workspace")?;
        let member = Member::of(&self.state, caller, &workspace).await?;
        member.may_run_agents()?;
        let agent: ItemName = required(incoming.agent, "agent")?.parse()?;
        let request = agui::read_input(asker(&member, agent), required(incoming.input, "input")?)?;
        let dialect = Dialect::of(request.legacy);
        let channel = format!("thread/{}", request.thread);
        let name = ChannelName::parse(&channel, self.id)?;
        let key = (Some(member.workspace.clone()), channel.clone());
        // whatever may stand against listening stands against the run: it is not begun where nobody would hear of it
        if !self.subscriptions.contains_key(&key) {
            self.has_room()?;
            self.state.seat(&mut self.seats, &member.workspace).await?;
        }
        member.count_request(&self.state).await?;
        member.count_run(&self.state).await?;
        let run = self.state.system.start_run(&member.workspace, request).await?;
        if self.runs.len() >= RUNS_MAX {
            self.runs.clear();
        }
        self.runs.insert(run.run.clone(), member.workspace.clone());
        let answer = json!({
            "channel": channel, "thread_id": run.thread, "run_id": run.run, "attached": run.attached,
        });
        match self.subscriptions.get(&key) {
            Some(followed) => {
                // its events came here as they happened, unless it was over before or is nobody else's business
                let over = Some(run).filter(|run| run.is_over() && (run.attached || !run.is_told()));
                self.state.hub.follow_run(&followed.subscription, dialect, over);
            }
            None => {
                let outbox = self.outbox.clone();
                let (since, rate, reference) = (None, None, None);
                let wish = Wish { outbox: &outbox, since, rate, reference, dialect, run: Some(run), is_node: false };
                self.listen(caller, Some(workspace), name, None, wish).await?;
            }
        }
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
        cancel_run(&self.state, &member, &run).await?;
        self.answer(incoming.reference.as_ref(), json!({"run_id": run}));
        Ok(())
    }
}

impl Talk for Session {
    const HINTS: bool = true;

    fn hub(&self) -> &Arc<Hub> {
        &self.state.hub
    }

    fn closing(&self) -> &CancellationToken {
        &self.state.closing
    }

    fn end(&self) -> Option<Option<Instant>> {
        self.signed_in.as_ref().map(|signed_in| signed_in.caller.ends(&self.state))
    }

    fn leave(&mut self) {
        self.unfollow();
    }

    fn refuse(&self, problem: &Problem) {
        self.reject(None, problem);
    }

    async fn sign_in(&mut self, token: String) -> Result<(), Close> {
        self.authenticate(token, None).await.map(drop)
    }

    /// A sign-in may have been ended, a membership too.
    async fn check(&mut self) -> Result<(), Close> {
        let Some(signed_in) = &self.signed_in else { return Ok(()) };
        let (store, now) = (self.state.system.store(), self.state.system.now());
        let has_expired = signed_in.caller.expires_at.is_some_and(|end| end <= now);
        let caller = match self.state.auth.authenticate(store, &signed_in.token, now).await {
            Ok(caller) => caller,
            Err(_) if has_expired => return Err(Close::Expired),
            Err(problem) if problem.is_unauthorized() => return Err(Close::Unauthenticated),
            Err(_) => return Ok(()), // the store is away: the next round knows more
        };
        let mut lost = Vec::new();
        for ((workspace, channel), Followed { subscription, sql }) in &self.subscriptions {
            // as it was made: whoever lost the positions of a portfolio may get its value by another one
            let topic = subscription.topic();
            let allowed = may_listen(&self.state, &caller, workspace.as_ref(), topic, sql.as_deref()).await;
            if let Err(problem) = allowed
                && problem.is_final()
            {
                lost.push(((workspace.clone(), channel.clone()), problem));
            }
        }
        for (key, problem) in lost {
            if let Some(followed) = self.subscriptions.remove(&key) {
                self.state.hub.unsubscribe(&followed.subscription, &self.outbox);
                let (workspace, channel) = &key;
                self.outbox.reply(&withdrawn(workspace.as_ref(), Some(channel), &problem).to_string());
            }
        }
        if let Some(signed_in) = &mut self.signed_in {
            signed_in.caller = caller;
        }
        Ok(())
    }

    async fn on_text(&mut self, text: &str) -> Result<Option<Pending>, Close> {
        let incoming: Incoming<'_> = match read(text) {
            Ok(incoming) => incoming,
            Err(error) => {
                let reference = serde_json::from_str::<Value>(text).ok().and_then(|value| value.get("ref").cloned());
                let detail = format!("this is no message: {}", plain(&error.to_string()));
                self.reject(reference.as_ref(), &Problem::invalid("bad_frame", detail));
                return if self.signed_in.is_some() { Ok(None) } else { Err(Close::Unauthenticated) };
            }
        };
        let reference = incoming.reference.clone();
        let reference = reference.as_ref();
        if incoming.kind == "auth" {
            if let Some(answer) = self.authenticate(incoming.token.unwrap_or_default(), reference).await? {
                self.answer(reference, answer);
            }
            return Ok(None);
        }
        let Some(signed_in) = &self.signed_in else {
            let problem = Problem::unauthorized("the first message must be {\"type\":\"auth\",\"token\":…}");
            self.reject(reference, &problem);
            return Err(Close::Unauthenticated);
        };
        let caller = signed_in.caller.clone();
        let (kind, workspace) = (incoming.kind.clone(), incoming.workspace.clone());
        let target = incoming.channel.clone().or_else(|| incoming.stream.clone()).or_else(|| incoming.agent.clone());
        let done = match &*kind {
            "subscribe" => self.subscribe(&caller, incoming).await,
            "unsubscribe" => self.unsubscribe(incoming),
            "feed" if self.origin.is_node() => self.feed(incoming),
            "publish" => match self.publish(&caller, incoming).await {
                Ok(pending) => return Ok(Some(pending)),
                Err(problem) => Err(problem),
            },
            "run" => self.run(&caller, incoming).await,
            "cancel" => self.cancel(&caller, incoming).await,
            "ping" => {
                self.answer(reference, json!({}));
                Ok(())
            }
            other => Err(unknown_type(other)),
        };
        if let Err(problem) = done {
            let on = (workspace.as_deref(), target.as_deref().unwrap_or_default());
            audit_frame(&self.state, &caller.name, &kind, on, &problem, &self.origin).await;
            self.reject(reference, &problem);
        }
        Ok(None)
    }
}

/// Cuts a channel to what of it somebody may see, and refuses those who may see nothing of it.
pub(crate) async fn admit(
    state: &AppState,
    caller: &Caller,
    workspace: Option<&WorkspaceId>,
    mut name: ChannelName,
    sql: Option<&str>,
) -> Result<ChannelName, Problem> {
    if let (Topic::Portfolio(_), Some(workspace)) = (&name.topic, workspace) {
        name.topic = Member::of(state, caller, workspace.as_str()).await?.shown(name.topic);
    }
    may_listen(state, caller, workspace, &name.topic, sql).await?;
    Ok(name)
}

/// Whether somebody may follow a channel; of a live query with what it asks.
pub(crate) async fn may_listen(
    state: &AppState,
    caller: &Caller,
    workspace: Option<&WorkspaceId>,
    topic: &Topic,
    sql: Option<&str>,
) -> Result<(), Problem> {
    match (topic, workspace) {
        (Topic::Throughput | Topic::Actors, _) => caller.clone().admin().map(drop),
        (_, None) => Err(Problem::invalid("bad_request", "`workspace` is missing")),
        (topic, Some(workspace)) => {
            let member = Member::of(state, caller, workspace.as_str()).await?;
            member.may_listen(topic)?;
            match (topic, sql) {
                (Topic::Query { .. }, Some(sql)) => member.may_ask(sql),
                _ => Ok(()),
            }
        }
    }
}

/// The least time between two messages, as clients write it.
pub(crate) fn rate_of(text: &str) -> Result<Option<Duration>, Problem> {
    let rate = span::parse(text).map_err(|error| Problem::invalid("bad_request", error))?;
    Ok(Some(Duration::from_micros(rate.0.unsigned_abs())).filter(|rate| !rate.is_zero()))
}

/// A message is an object: an array would be taken for its members in their order.
fn read(text: &str) -> Result<Incoming<'_>, serde_json::Error> {
    match text.trim_ascii_start().starts_with('{') {
        true => serde_json::from_str(text),
        false => serde_json::from_str::<IgnoredAny>(text).and_then(|_| Err(Error::custom("it is not a JSON object"))),
    }
}

/// How a subscription is found that a client names: those of the installation are in no workspace, whatever is said.
fn followed_by(workspace: Option<String>, channel: String) -> (Option<WorkspaceId>, String) {
    let workspace = workspace.filter(|_| !channel.starts_with("system/")).and_then(|id| id.parse().ok());
    (workspace, channel)
}

/// Refuses a message of a type that clients do not send.
pub(crate) fn unknown_type(kind: &str) -> Problem {
    let kind: String = kind.chars().take(40).collect();
    let known = "auth, subscribe, unsubscribe, publish, run, cancel, ping";
    Problem::invalid("unknown_type", format!("`{kind}` is none of {known}"))
}

fn required<T>(member: Option<T>, name: &str) -> Result<T, Problem> {
    member.ok_or_else(|| Problem::invalid("bad_request", format!("`{name}` is missing")))
}

/// Says that a client is told no more of a channel, or of any, since it may not have it now.
pub(crate) fn withdrawn(workspace: Option<&WorkspaceId>, channel: Option<&str>, problem: &Problem) -> Value {
    let mut error = json!({"type": "error", "code": problem.code, "detail": problem.detail});
    if let Some(channel) = channel {
        error["workspace"] = json!(workspace);
        error["channel"] = channel.into();
    }
    error
}

pub(crate) fn refusal(reference: Option<&Value>, problem: &Problem) -> Value {
    let mut error = json!({"type": "error", "code": problem.code, "detail": problem.detail});
    if let Some(wait) = problem.wait_seconds() {
        error["retry_after"] = wait.into();
    }
    with_reference(reference, error)
}

fn ok(reference: Option<&Value>, mut answer: Value) -> Value {
    answer["type"] = "ok".into();
    with_reference(reference, answer)
}

pub(crate) fn with_reference(reference: Option<&Value>, mut answer: Value) -> Value {
    if let Some(reference) = reference {
        answer["ref"] = reference.clone();
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_may_hold_what_is_not_known_here() {
        let text = r#"{"type":"subscribe","channel":"alerts","workspace":"acme","later":{"x":1},"since":{"epoch":"e","offset":3}}"#;
        let read = super::read(text).unwrap();
        assert_eq!(
            (&*read.kind, read.channel.as_deref(), read.since.unwrap().offset),
            ("subscribe", Some("alerts"), 3)
        );
    }

    #[test]
    fn a_message_is_an_object_whatever_way_its_type_is_written() {
        assert_eq!(read(r#" {"type":"p\u0069ng"}"#).unwrap().kind, "ping");
        for (text, told) in [
            (r#"["auth",1,"token"]"#, "not a JSON object"),
            ("7", "not a JSON object"),
            ("[", "EOF"),
            (r#"{"type":"subscribe","since":7}"#, "expected an object"),
        ] {
            let error = plain(&read(text).err().unwrap().to_string());
            assert!(error.contains(told) && !error.contains("struct"), "{text}: {error}");
        }
    }
}
