//! What of a run outlives the process: its events, how it ended, and a trace of it in the stream `agent.events`.

use super::conversation::Conversation;
use super::guard::Guard;
use super::run_log::{RunHandle, RunLog};
use super::{AGENT_EVENTS, Outcome, RunEvent};
use crate::fault::Fault;
use crate::system::System;
use engine::event::{Micros, StreamName, WorkspaceId};
use serde_json::{Value, json};
use sql::store::{Message, Run as StoredRun, StoreError};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use streams::decode::{Bounds, Format, TsUnit, decode};
use tokio::time::{Instant, timeout_at};

/// Events wait that long for others, to be written together.
const BATCH_WAIT: Duration = Duration::from_millis(200);
const BATCH_EVENTS: usize = 256;
/// How often a failed write is tried again, one second apart.
const RETRIES: usize = 3;

/// Status of a run that a restart cut off.
const INTERRUPTED: &str = "interrupted";

/// Follows a run to its end and stores what comes.
pub(super) async fn record(system: System, log: Arc<RunLog>) {
    let began = Instant::now();
    let mut reader = RunHandle::new(log.clone(), 0, false);
    let mut trace = Trace { run: log.run.clone(), thread: log.thread.clone(), began, parts: HashMap::new() };
    while let Some(first) = reader.next().await {
        let mut batch = vec![first];
        let deadline = Instant::now() + BATCH_WAIT;
        while batch.len() < BATCH_EVENTS
            && !batch.last().is_some_and(|(_, event)| event.is_terminal())
            && let Ok(Some(next)) = timeout_at(deadline, reader.next()).await
        {
            batch.push(next);
        }
        if let Err(error) = store(&system, &log, &batch).await {
            tracing::error!(workspace = %log.workspace, run = %log.run, %error, "events of a run were not stored");
        }
        let lines: Vec<Value> = batch.iter().filter_map(|(n, event)| trace.line(*n, event, system.now())).collect();
        if let Err(error) = ingest(&system, &log.workspace, &lines).await {
            tracing::warn!(workspace = %log.workspace, run = %log.run, %error, "a run was not traced in agent.events");
        }
    }
}

async fn store(system: &System, log: &RunLog, batch: &[(u64, Arc<RunEvent>)]) -> Result<(), StoreError> {
    let Some(((first, _), (_, last))) = batch.first().zip(batch.last()) else { return Ok(()) };
    let texts: Vec<String> = batch.iter().map(|(_, event)| text(event)).collect();
    let mut left = RETRIES;
    while let Err(error) = system.store().append_run_events(&log.workspace, &log.run, *first, &texts).await {
        // the workspace was deleted, and the run with it
        if left == 0 || matches!(error, StoreError::Missing { .. }) {
            return Err(error);
        }
        left -= 1;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    if let Some((status, error)) = ending(last) {
        system.store().finish_run(&log.workspace, &log.run, status, system.now(), error).await?;
    }
    Ok(())
}

fn text(event: &RunEvent) -> String {
    serde_json::to_string(event).expect("names, texts and JSON values become JSON")
}

fn ending(event: &RunEvent) -> Option<(&'static str, Option<&str>)> {
    match event {
        RunEvent::Finished { outcome: Outcome::Success { .. }, .. } => Some(("finished", None)),
        RunEvent::Finished { outcome: Outcome::Interrupt(_), .. } => Some(("waiting", None)),
        RunEvent::Finished { outcome: Outcome::Cancelled, .. } => Some(("cancelled", None)),
        RunEvent::Error { message, .. } => Some(("failed", Some(message))),
        _ => None,
    }
}

/// Turns the events of a run into those of `agent.events`: a text and a call are one event each, whole.
struct Trace {
    run: String,
    thread: String,
    began: Instant,
    /// Texts and calls that have begun: their name, if any, and what came of them so far.
    parts: HashMap<String, (String, String)>,
}

impl Trace {
    fn line(&mut self, n: u64, event: &RunEvent, now: Micros) -> Option<Value> {
        let mut tokens = Value::Null;
        let (kind, payload) = match event {
            RunEvent::Started { parent, .. } => ("RUN_STARTED", json!({"parentRunId": parent})),
            RunEvent::StepStarted(name) => ("STEP_STARTED", json!({"stepName": name})),
            RunEvent::StepFinished(name) => ("STEP_FINISHED", json!({"stepName": name})),
            RunEvent::TextStart { id } => {
                self.parts.insert(id.clone(), Default::default());
                return None;
            }
            RunEvent::ToolStart { id, name, .. } => {
                self.parts.insert(id.clone(), (name.clone(), String::new()));
                return None;
            }
            RunEvent::TextDelta { id, delta } | RunEvent::ToolArgs { id, delta } => {
                self.parts.entry(id.clone()).or_default().1.push_str(delta);
                return None;
            }
            RunEvent::TextEnd { id } => {
                let (_, text) = self.parts.remove(id)?;
                ("TEXT_MESSAGE_END", json!({"messageId": id, "text": text}))
            }
            RunEvent::ToolEnd { id } => {
                let (name, arguments) = self.parts.remove(id)?;
                ("TOOL_CALL_END", json!({"toolCallId": id, "toolCallName": name, "arguments": arguments}))
            }
            RunEvent::ToolResult { call_id, content, .. } => {
                ("TOOL_CALL_RESULT", json!({"toolCallId": call_id, "bytes": content.len()}))
            }
            RunEvent::Finished { usage, .. } => {
                tokens = usage.as_ref().map(|usage| usage.input_tokens + usage.output_tokens).into();
                ("RUN_FINISHED", json!({"outcome": ending(event).map(|(status, _)| status)}))
            }
            RunEvent::Error { message, code } => ("RUN_ERROR", json!({"message": message, "code": code})),
            RunEvent::StateSnapshot(_)
            | RunEvent::StateDelta(_)
            | RunEvent::MessagesSnapshot(_)
            | RunEvent::Custom { .. } => return None,
        };
        let elapsed = self.began.elapsed().as_secs_f64() * 1e3;
        let mut line = json!({
            "ts": now.0, "thread": self.thread, "run": self.run, "type": kind, "payload": payload, "tokens": tokens,
            "elapsed_ms": elapsed,
        });
        let id = format!("{}.{n}", self.run);
        if id.len() <= Bounds::default().id_bytes {
            line["id"] = id.into();
        }
        Some(line)
    }
}

async fn ingest(system: &System, ws: &WorkspaceId, lines: &[Value]) -> Result<(), Fault> {
    if lines.is_empty() {
        return Ok(());
    }
    let stream: StreamName = AGENT_EVENTS.parse().map_err(Fault::internal)?;
    let schema = system.schema(ws, &stream).await?;
    let body = lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    let bounds = Bounds::default();
    let decoded = decode(&schema, body.as_bytes(), Format::Ndjson, TsUnit::Micros, &bounds, system.now());
    system.ingest(ws, &stream, decoded.map_err(Fault::internal)?).await?;
    Ok(())
}

/// The log of a run that is over, from the store.
pub(super) async fn restored(system: &System, run: &StoredRun) -> Result<Arc<RunLog>, Fault> {
    let events = stored_events(system, run).await?;
    let legacy = matches!(events.first(), Some(RunEvent::Started { legacy: true, .. }));
    let log = new_log(run, run.status == INTERRUPTED, legacy);
    log.restore(events);
    Ok(Arc::new(log))
}

async fn stored_events(system: &System, run: &StoredRun) -> Result<Vec<RunEvent>, Fault> {
    let texts = system.store().run_events(&run.workspace, &run.run_id, 0).await?;
    texts.iter().map(|(_, text)| serde_json::from_str(text).map_err(Fault::internal)).collect()
}

fn new_log(run: &StoredRun, was_cut: bool, legacy: bool) -> RunLog {
    let ids = [run.thread.clone(), run.run_id.clone()];
    RunLog::new(run.workspace.clone(), ids, run.started_at, was_cut, legacy, None, None)
}

/// Ends a run that the last stop of the process cut off: what was open is closed, and it failed as `interrupted`.
pub(super) async fn end_interrupted(system: &System, run: &StoredRun) -> Result<(), Fault> {
    let events = stored_events(system, run).await?;
    let stored = events.len() as u64;
    let legacy = matches!(events.first(), Some(RunEvent::Started { legacy: true, .. }));
    let log = Arc::new(new_log(run, true, legacy));
    let mut conversation = Conversation::merge(Vec::new(), &[]).conversation;
    let mut guard = Guard::new(log.clone());
    if events.is_empty() {
        guard.start(None);
    }
    for event in events {
        conversation.apply(&event);
        match event {
            RunEvent::Finished { outcome, usage, .. } => guard.finish(outcome, usage),
            RunEvent::Error { message, code } => guard.fail(&code, &message),
            event => _ = guard.emit(event),
        }
    }
    guard.fail(INTERRUPTED, "the server was restarted during the run; ask again");
    let mut rest = RunHandle::new(log, stored, true);
    let added: Vec<String> = std::iter::from_fn(|| rest.ready()).map(|(_, event)| text(&event)).collect();
    let now = system.now();
    let made = conversation.made().into_iter().map(|content| message(content, Some(&run.run_id), now));
    let store = system.store();
    store.append_messages(&run.workspace, &run.thread, &made.collect::<Vec<_>>()).await?;
    store.append_run_events(&run.workspace, &run.run_id, stored + 1, &added).await?;
    store.finish_run(&run.workspace, &run.run_id, INTERRUPTED, now, Some("the server was restarted")).await?;
    Ok(())
}

/// A message as it is stored.
pub(super) fn message(content: Value, run: Option<&str>, now: Micros) -> Message {
    Message {
        id: content["id"].as_str().unwrap_or_default().to_owned(),
        role: content["role"].as_str().unwrap_or_default().to_owned(),
        content,
        run_id: run.map(str::to_owned),
        created_at: now,
    }
}
