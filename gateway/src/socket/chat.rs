//! The sockets of existing chat clients: one thread unless an input names another, a question or a `RunAgentInput` a
//! message, bare events back.

use super::peer::{Close, Pending, Talk};
use super::{Line, Opening, handshake};
use crate::AppState;
use crate::agents::{asker, cancel_run, unknown_agent};
use crate::agui::{self, Asker, Dialect};
use crate::auth::{By, Caller};
use crate::edge::{Origin, audit_frame};
use crate::extract::{Member, Path, Query};
use crate::hub::{Group, Hub, Outbox, Seats};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::agent::RunRequest;
use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::get;
use engine::event::ItemName;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Runs that may wait on one socket: bare events name no run, so runs go one after the other.
const WAITING_MAX: usize = 16;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/ai/agents/{agent}/stream", get(agent_socket))
        .route("/api/v1/ai/chat/{session}", get(chat_socket))
}

type Parameters = HashMap<String, String>;

async fn agent_socket(
    State(state): State<AppState>,
    Path(agent): Path<String>,
    Query(parameters): Query<Parameters>,
    request: Request,
) -> Result<Response, Problem> {
    open(state, &agent, None, parameters, request).await
}

async fn chat_socket(
    State(state): State<AppState>,
    Path(session): Path<String>,
    Query(parameters): Query<Parameters>,
    request: Request,
) -> Result<Response, Problem> {
    open(state, "analyst", Some(session), parameters, request).await
}

/// Opens a chat. Credentials come in the header, in a subprotocol or in the first message; bad ones are refused where
/// they come.
async fn open(
    state: AppState,
    agent: &str,
    thread: Option<String>,
    mut parameters: Parameters,
    mut request: Request,
) -> Result<Response, Problem> {
    let token = handshake::token_of(request.headers());
    let opening = Opening::of(&state.hub, &state.config, &mut request)?;
    let agent: ItemName = agent.parse().map_err(|_| unknown_agent(agent))?;
    let wanted = parameters.remove("workspace");
    if let Some(token) = &token {
        SignedIn::check(&state, token.clone(), wanted.as_deref(), &agent, &opening.origin).await?;
    }
    let thread = thread.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    Ok(opening.serve(&state.hub, token, |Line { outbox, seats, origin }| Chat {
        state: state.clone(),
        agent,
        thread,
        wanted,
        outbox,
        seats,
        origin,
        signed_in: None,
        runs: None,
    }))
}

/// Whom a socket serves.
struct SignedIn {
    token: String,
    caller: Caller,
    member: Member,
}

impl SignedIn {
    /// Whoever has this token, in the workspace they name or the only one they have, where they may talk to agents. That
    /// somebody known may not goes to the audit log.
    async fn check(
        state: &AppState,
        token: String,
        wanted: Option<&str>,
        agent: &ItemName,
        origin: &Origin,
    ) -> Result<SignedIn, Problem> {
        let caller = state.auth.authenticate(state.system.store(), &token, state.system.now()).await?;
        match member(state, &caller, wanted).await {
            Ok(member) => Ok(SignedIn { token, caller, member }),
            Err(problem) => {
                let on = (wanted, agent.as_str());
                audit_frame(state, &caller.name, "chat", on, &problem, origin).await;
                Err(problem)
            }
        }
    }
}

async fn member(state: &AppState, caller: &Caller, wanted: Option<&str>) -> Result<Member, Problem> {
    let workspace = match (wanted, &caller.by) {
        (Some(wanted), _) => wanted.to_owned(),
        (None, By::Key { workspace, .. }) => workspace.to_string(),
        (None, By::Session { .. }) => {
            let store = state.system.store();
            let mut own = store.workspaces_of(&caller.id).await?;
            own.extend(store.invited_to(&caller.name).await?);
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

/// What a client's message asks for.
enum Frame {
    Auth(String),
    Run(Box<RunRequest>),
    Cancel(String),
}

/// A run that waits for its turn, and who asked for it.
struct Job {
    token: String,
    workspace: String,
    request: RunRequest,
}

/// The runs of a socket, one after the other.
struct Runs {
    waiting: mpsc::Sender<Job>,
    /// Follows them; a run goes on when its socket is gone.
    _reader: AbortOnDropHandle<()>,
}

struct Chat {
    state: AppState,
    agent: ItemName,
    thread: String,
    /// The workspace that the client named.
    wanted: Option<String>,
    outbox: Arc<Outbox>,
    seats: Seats,
    origin: Origin,
    signed_in: Option<SignedIn>,
    /// From the first run on.
    runs: Option<Runs>,
}

impl Talk for Chat {
    // a bare message of these clients is an event of a run
    const HINTS: bool = false;

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
        self.runs = None;
    }

    fn refuse(&self, problem: &Problem) {
        refuse(&self.outbox, problem);
    }

    async fn sign_in(&mut self, token: String) -> Result<(), Close> {
        let workspace = self.signed_in.as_ref().map(|signed_in| signed_in.member.workspace.to_string());
        let wanted = workspace.as_deref().or(self.wanted.as_deref());
        let found = SignedIn::check(&self.state, token, wanted, &self.agent, &self.origin).await;
        let found = found.and_then(|new| match &self.signed_in {
            Some(old) if old.caller.id != new.caller.id => {
                Err(Problem::forbidden("this connection is somebody else's; open one of your own"))
            }
            _ => Ok(new),
        });
        let signed_in = found.map_err(|problem| {
            self.refuse(&problem);
            Close::Unauthenticated
        })?;
        let user = Group::User(signed_in.caller.id.as_str().into());
        let seated = match self.seats.enter(&self.state.hub.crowd, user, None) {
            Ok(()) => self.state.seat(&mut self.seats, &signed_in.member.workspace).await,
            refused => refused,
        };
        if let Err(problem) = seated {
            self.refuse(&problem);
            return Err(Close::TooMany(problem.detail));
        }
        self.outbox.belongs_to(&signed_in.caller.name);
        self.signed_in = Some(signed_in);
        Ok(())
    }

    async fn check(&mut self) -> Result<(), Close> {
        let Some(SignedIn { token, caller, member }) = &self.signed_in else { return Ok(()) };
        let has_expired = caller.expires_at.is_some_and(|end| end <= self.state.system.now());
        let workspace = Some(member.workspace.as_str());
        match SignedIn::check(&self.state, token.clone(), workspace, &self.agent, &self.origin).await {
            Ok(again) => {
                self.signed_in = Some(again);
                Ok(())
            }
            Err(_) if has_expired => Err(Close::Expired),
            Err(problem) if problem.is_unauthorized() => Err(Close::Unauthenticated),
            Err(problem) if problem.is_final() => {
                self.refuse(&problem);
                Err(Close::Forbidden)
            }
            Err(_) => Ok(()), // the store is away: the next round knows more
        }
    }

    async fn on_text(&mut self, text: &str) -> Result<Option<Pending>, Close> {
        // what a client may do is looked at for each of its messages
        self.check().await?;
        let Some(signed_in) = &self.signed_in else {
            let Some(token) = token_of(text) else {
                self.refuse(&Problem::unauthorized("send {\"type\":\"auth\",\"token\":…} first"));
                return Err(Close::Unauthenticated);
            };
            self.sign_in(token).await?;
            return Ok(None);
        };
        let done = match self.read(text, &signed_in.member) {
            Ok(Frame::Auth(token)) => {
                self.sign_in(token).await?;
                Ok(())
            }
            Ok(Frame::Run(request)) => {
                let (token, workspace) = (signed_in.token.clone(), signed_in.member.workspace.to_string());
                self.enqueue(Job { token, workspace, request: *request })
            }
            Ok(Frame::Cancel(run)) => self.cancel(&run).await,
            Err(problem) => Err(problem),
        };
        if let Err(problem) = done {
            self.refuse(&problem);
        }
        Ok(None)
    }
}

impl Chat {
    fn enqueue(&mut self, job: Job) -> Result<(), Problem> {
        let runs = self.runs.get_or_insert_with(|| {
            let (waiting, jobs) = mpsc::channel(WAITING_MAX);
            let reader = tokio::spawn(perform(self.state.clone(), self.outbox.clone(), jobs));
            Runs { waiting, _reader: AbortOnDropHandle::new(reader) }
        });
        runs.waiting.try_send(job).map_err(|_| {
            let detail = format!("{WAITING_MAX} runs wait already on this socket; ask again later");
            Problem::conflict("queue_full", detail)
        })
    }

    async fn cancel(&self, run: &str) -> Result<(), Problem> {
        let Some(SignedIn { caller, member, .. }) = &self.signed_in else { return Ok(()) };
        let done = cancel_run(&self.state, member, run).await;
        if let Err(problem) = &done {
            let on = (Some(member.workspace.as_str()), run);
            audit_frame(&self.state, &caller.name, "cancel", on, problem, &self.origin).await;
        }
        done
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

/// Does the runs of a socket and sends their events as fast as the client takes them.
async fn perform(state: AppState, outbox: Arc<Outbox>, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.recv().await {
        if let Err(problem) = follow(&state, &outbox, job).await {
            refuse(&outbox, &problem);
        }
    }
}

async fn follow(state: &AppState, outbox: &Outbox, Job { token, workspace, request }: Job) -> Result<(), Problem> {
    // a run may have waited for long: who asked for it must still be allowed to
    let caller = state.auth.authenticate(state.system.store(), &token, state.system.now()).await?;
    let member = member(state, &caller, Some(&workspace)).await?;
    member.count_request(state).await?;
    member.count_run(state).await?;
    let dialect = Dialect::of(request.legacy);
    let may_hold = member.access.may(Permission::PortfolioUpdate, None);
    let mut run = state.system.start_run(&member.workspace, RunRequest { may_hold, ..request }).await?;
    while let Some((_, event)) = run.next().await {
        outbox.room().await;
        outbox.reply(&agui::encode(&event, dialect));
    }
    Ok(())
}

/// Says what is wrong, as the one kind of event that clients expect outside a run.
fn refuse(outbox: &Outbox, problem: &Problem) {
    outbox.reply(&agui::error(&problem.detail, problem.code).to_string());
}

fn token_of(text: &str) -> Option<String> {
    let frame: Value = serde_json::from_str(text).ok()?;
    (frame["type"] == "auth").then(|| frame["token"].as_str().map(str::to_owned))?
}
