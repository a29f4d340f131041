//! AI agent sessions: one actor a thread, one run at a time on it, and every run in a log that any number of readers
//! follow. A run belongs to the server: whoever started it may leave, and it ends with exactly one terminal event.

mod conversation; // the messages of a thread as a run reads and grows them
mod guard; // the order of events, and the one terminal event, whatever happens
mod recorder; // what of a run outlives the process
mod run; // what an agent has at hand while it answers
mod run_log; // the events of one run, and its readers
mod session; // which run is on which thread, who waits, and what happens after a panic
mod tools; // what agents can read and do in a workspace

mod analyst; // the built-in agent: needs no key
mod facts; // what the tools answered, in sentences
mod intent; // what a question asks for
mod model; // an OpenAI-compatible model in its place

#[cfg(test)]
mod tests;

pub use model::AgentConfig;
pub use run_log::RunHandle;
pub use session::Sessions;

use engine::event::{ItemName, Micros};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The stream of what agents did. Only the engine writes it.
pub const AGENT_EVENTS: &str = "agent.events";

/// One run as it was asked for.
#[derive(Clone, Debug)]
pub struct RunRequest {
    pub agent: ItemName,
    /// AG-UI `threadId`.
    pub thread: String,
    /// AG-UI `runId`; unique in its workspace.
    pub run: String,
    /// AG-UI messages, reduced to what the protocol knows. None asks for those of the thread, without an answer.
    pub messages: Vec<Value>,
    /// Tools of the client: called by the agent, answered by the client in a later run.
    pub tools: Vec<Value>,
    /// What the client tells the model about where it is asked from: objects of `description` and `value`.
    pub context: Vec<Value>,
    /// The client's copy of the shared state; null when it has none.
    pub state: Value,
    pub forwarded: Value,
    /// Answers to interrupts.
    pub resume: Vec<Value>,
    /// Id of the user who asks.
    pub user: String,
    pub parent_run: Option<String>,
    /// Whether the user may change positions; otherwise no tool does so in this run.
    pub may_hold: bool,
    /// The client speaks AG-UI 0.0.x.
    pub legacy: bool,
}

impl RunRequest {
    /// Whether the run only shows what the thread holds.
    fn is_recall(&self) -> bool {
        self.messages.is_empty() && self.resume.is_empty()
    }
}

/// What happens in a run, in the order of AG-UI; the gateway writes it in the dialect of each client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunEvent {
    Started {
        thread: String,
        run: String,
        parent: Option<String>,
        legacy: bool,
    },
    Finished {
        thread: String,
        run: String,
        outcome: Outcome,
        usage: Option<Usage>,
    },
    Error {
        message: String,
        code: String,
    },
    StepStarted(String),
    StepFinished(String),
    TextStart {
        id: String,
    },
    TextDelta {
        id: String,
        delta: String,
    },
    TextEnd {
        id: String,
    },
    ToolStart {
        id: String,
        name: String,
        parent: String,
    },
    ToolArgs {
        id: String,
        delta: String,
    },
    ToolEnd {
        id: String,
    },
    ToolResult {
        message_id: String,
        call_id: String,
        content: String,
    },
    StateSnapshot(Value),
    /// JSON Patch operations.
    StateDelta(Value),
    MessagesSnapshot(Vec<Value>),
    Custom {
        name: String,
        value: Value,
    },
}

impl RunEvent {
    /// Whether nothing follows this event in its run.
    pub fn is_terminal(&self) -> bool {
        matches!(self, RunEvent::Finished { .. } | RunEvent::Error { .. })
    }

    /// Bytes on the heap, about.
    fn bytes(&self) -> usize {
        let text = match self {
            RunEvent::TextDelta { id, delta } | RunEvent::ToolArgs { id, delta } => id.len() + delta.len(),
            RunEvent::ToolResult { content, .. } => content.len(),
            RunEvent::StateSnapshot(value) | RunEvent::StateDelta(value) | RunEvent::Custom { value, .. } => {
                weight(value)
            }
            RunEvent::MessagesSnapshot(messages) => messages.iter().map(weight).sum(),
            _ => 0,
        };
        text + size_of::<RunEvent>() + 64
    }
}

/// Bytes of a JSON value on the heap, about.
fn weight(value: &Value) -> usize {
    size_of::<Value>()
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(weight).sum(),
            Value::Object(members) => members.iter().map(|(name, value)| name.len() + 32 + weight(value)).sum(),
            _ => 0,
        }
}

/// How a run ended that did not fail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// `pending`: calls of client tools that wait for the client's answer, in order.
    Success {
        pending: Vec<String>,
    },
    /// Waits for answers of a person; a later run carries them in `resume`.
    Interrupt(Vec<Interrupt>),
    Cancelled,
}

/// A question to a person that the thread waits on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interrupt {
    pub id: String,
    /// `tool_call` or `input_required`.
    pub reason: String,
    pub message: String,
    /// The call that is carried out on approval.
    pub call: Option<PendingCall>,
    /// JSON Schema of the answer's payload.
    pub schema: Value,
    /// From then on the thread goes on without an answer.
    pub expires_at: Micros,
}

/// A tool call that was announced and not yet carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PendingCall {
    pub id: String,
    pub name: String,
    pub arguments: Value,
}

/// Tokens a model counted for one run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub model: String,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

/// An agent that can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentInfo {
    pub name: ItemName,
    pub description: String,
    /// The model behind it; `None` for the built-in analyst.
    pub model: Option<String>,
    /// The agent's own tools: name, description and parameters as JSON Schema.
    pub tools: Vec<Value>,
}

/// Why a run ends with RUN_ERROR.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
struct Failure {
    code: &'static str,
    message: String,
}

impl Failure {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Answers on a thread. The future may be dropped at any await: the run was cancelled or took too long.
#[async_trait::async_trait]
trait Agent: Send + Sync + 'static {
    async fn answer(&self, run: &mut run::Run) -> Result<Outcome, Failure>;
    fn info(&self, name: &ItemName) -> AgentInfo;
}

/// A new id for a message, a call or an interrupt; short enough for models that bound it (40 characters).
fn new_id(kind: &str) -> String {
    format!("{kind}-{}", uuid::Uuid::new_v4().simple())
}
