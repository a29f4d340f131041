//! AG-UI on the wire: events of a run as JSON in the dialect of each client, and what clients send to start one.
//!
//! Two dialects are alive: 1.0, whose clients name their `protocolVersion`, and 0.0.59, whose clients do not and refuse
//! some of what 1.0 says. What a client sends is read with tolerance: what the protocol does not know is left out, what
//! it knows and is malformed is refused before the run.

use actors::agent::{AgentInfo, Interrupt, Outcome, RunEvent, RunRequest, Usage};
use actors::rows::rfc3339;
use engine::event::ItemName;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// The version of AG-UI that this server speaks.
const VERSION: &str = "1.0";

/// What a client understands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Dialect {
    /// AG-UI 1.0.
    Current,
    /// AG-UI 0.0.x, as CopilotKit and assistant-ui pin it.
    Legacy,
}

impl Dialect {
    pub(crate) fn of(legacy: bool) -> Self {
        if legacy { Dialect::Legacy } else { Dialect::Current }
    }

    /// That of a client that names this `protocolVersion`; one that makes no sense is served as the current one.
    pub(crate) fn of_version(version: Option<&Value>) -> Self {
        let major = |version: &str| version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        match version {
            None | Some(Value::Null) => Dialect::Legacy,
            Some(version) => Dialect::of(version.as_str().and_then(major) == Some(0)),
        }
    }
}

/// An event as one JSON object. What is absent is left out, never null.
pub(crate) fn encode(event: &RunEvent, dialect: Dialect) -> String {
    to_value(event, dialect).to_string()
}

/// An event as a frame of server-sent events, its position in front.
pub(crate) fn frame(epoch: &str, n: u64, event: &RunEvent, dialect: Dialect) -> String {
    // JSON has no bare line feed, so one data line holds it; the epoch is hexadecimal
    format!("id: {epoch}.{n}\ndata: {}\n\n", to_value(event, dialect))
}

fn to_value(event: &RunEvent, dialect: Dialect) -> Value {
    match dialect {
        Dialect::Current => current(event),
        Dialect::Legacy => to_legacy(current(event)),
    }
}

/// An event of the current dialect as clients of 0.0.59 take it.
pub(crate) fn to_legacy(mut event: Value) -> Value {
    let Some(members) = event.as_object_mut() else { return event };
    match members.get("type").and_then(Value::as_str) {
        Some("RUN_STARTED") => _ = members.remove("protocolVersion"),
        Some("RUN_FINISHED") => match members.get("outcome").and_then(|outcome| outcome["type"].as_str()) {
            Some("cancelled") => return error("the run was cancelled", "cancelled"),
            outcome => {
                if outcome != Some("interrupt") {
                    members.remove("outcome");
                }
                members.remove("usage");
            }
        },
        Some("MESSAGES_SNAPSHOT") => {
            let messages = members.get("messages").and_then(Value::as_array).into_iter().flatten();
            let messages: Vec<Value> = messages.filter_map(legacy_message).collect();
            members.insert("messages".to_owned(), messages.into());
        }
        _ => {}
    }
    event
}

fn current(event: &RunEvent) -> Value {
    match event {
        RunEvent::Started { thread, run, parent, .. } => {
            let mut event =
                json!({"type": "RUN_STARTED", "threadId": thread, "runId": run, "protocolVersion": VERSION});
            if let Some(parent) = parent {
                event["parentRunId"] = parent.as_str().into();
            }
            event
        }
        RunEvent::Finished { thread, run, outcome, usage } => {
            let outcome = match outcome {
                Outcome::Interrupt(open) => {
                    let interrupts: Vec<Value> = open.iter().map(interrupt).collect();
                    json!({"type": "interrupt", "interrupts": interrupts})
                }
                Outcome::Cancelled => json!({"type": "cancelled"}),
                Outcome::Success { pending } if pending.is_empty() => json!({"type": "success"}),
                Outcome::Success { pending } => json!({"type": "success", "pendingToolCallIds": pending}),
            };
            let mut event = json!({"type": "RUN_FINISHED", "threadId": thread, "runId": run, "outcome": outcome});
            if let Some(usage) = usage {
                event["usage"] = json!([tokens(usage)]);
            }
            event
        }
        RunEvent::Error { message, code } => error(message, code),
        RunEvent::StepStarted(name) => json!({"type": "STEP_STARTED", "stepName": name}),
        RunEvent::StepFinished(name) => json!({"type": "STEP_FINISHED", "stepName": name}),
        RunEvent::TextStart { id } => json!({"type": "TEXT_MESSAGE_START", "messageId": id, "role": "assistant"}),
        RunEvent::TextDelta { id, delta } => json!({"type": "TEXT_MESSAGE_CONTENT", "messageId": id, "delta": delta}),
        RunEvent::TextEnd { id } => json!({"type": "TEXT_MESSAGE_END", "messageId": id}),
        RunEvent::ToolStart { id, name, parent } => {
            json!({"type": "TOOL_CALL_START", "toolCallId": id, "toolCallName": name, "parentMessageId": parent})
        }
        RunEvent::ToolArgs { id, delta } => json!({"type": "TOOL_CALL_ARGS", "toolCallId": id, "delta": delta}),
        RunEvent::ToolEnd { id } => json!({"type": "TOOL_CALL_END", "toolCallId": id}),
        RunEvent::ToolResult { message_id, call_id, content } => json!({
            "type": "TOOL_CALL_RESULT", "messageId": message_id, "toolCallId": call_id, "content": content, "role": "tool",
        }),
        RunEvent::StateSnapshot(snapshot) => json!({"type": "STATE_SNAPSHOT", "snapshot": snapshot}),
        RunEvent::StateDelta(delta) => json!({"type": "STATE_DELTA", "delta": delta}),
        RunEvent::MessagesSnapshot(messages) => json!({"type": "MESSAGES_SNAPSHOT", "messages": messages}),
        RunEvent::Custom { name, value } => json!({"type": "CUSTOM", "name": name, "value": value}),
    }
}

/// A RUN_ERROR event, also for what is refused before a run where only events can say so.
pub(crate) fn error(message: &str, code: &str) -> Value {
    json!({"type": "RUN_ERROR", "message": message, "code": code})
}

fn interrupt(open: &Interrupt) -> Value {
    let mut shown = json!({
        "id": open.id, "reason": open.reason, "message": open.message, "responseSchema": open.schema,
        "expiresAt": rfc3339(open.expires_at),
    });
    if let Some(call) = &open.call {
        shown["toolCallId"] = call.id.as_str().into();
    }
    shown
}

fn tokens(usage: &Usage) -> Value {
    json!({
        "model": usage.model, "inputTokens": usage.input_tokens, "outputTokens": usage.output_tokens,
        "totalTokens": usage.input_tokens + usage.output_tokens,
    })
}

/// A message as 0.0.59 accepts it: answers of tools as text.
fn legacy_message(message: &Value) -> Option<Value> {
    let mut message = message.clone();
    if message["role"] == "tool" && message["content"].is_array() {
        let parts = message["content"].as_array().into_iter().flatten();
        let texts: Vec<&str> = parts.filter_map(|part| part["text"].as_str()).collect();
        message["content"] = texts.join("\n").into();
    }
    Some(message).filter(|message| message["role"] != "reasoning")
}

/// What an agent can do, as AG-UI's `AgentCapabilities`.
pub(crate) fn capabilities(agent: &AgentInfo) -> Value {
    json!({
        "identity": {
            "name": agent.name.as_str(), "type": "tidewatch", "description": agent.description,
            "version": env!("CARGO_PKG_VERSION"), "provider": "Tidewatch",
        },
        "transport": {"streaming": true, "websocket": true, "httpBinary": false, "resumable": true},
        "tools": {
            "supported": true, "items": agent.tools, "parallelCalls": agent.model.is_some(), "clientProvided": true,
        },
        "output": {"structuredOutput": false, "supportedMimeTypes": ["text/plain"]},
        "state": {"snapshots": true, "deltas": true, "memory": true, "persistentState": true},
        "multiAgent": {"supported": false},
        "reasoning": {"supported": false},
        "multimodal": {
            "input": {"image": false, "audio": false, "video": false, "pdf": false, "file": false},
            "output": {"image": false, "audio": false},
        },
        "execution": {"codeExecution": false},
        "humanInTheLoop": {"supported": true, "approvals": true, "interrupts": true, "approveWithEdits": false},
    })
}

/// Why an input was refused, and where.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InputError {
    #[error("the input is not a JSON object: {0}")]
    NotAnObject(String),
    #[error("{pointer} is missing; it must be {expected}")]
    Missing { pointer: String, expected: &'static str },
    #[error("{pointer} is {found}; it must be {expected}")]
    Malformed { pointer: String, found: &'static str, expected: &'static str },
}

/// Who asks, and whom.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) agent: ItemName,
    /// Id of the user.
    pub(crate) user: String,
    /// Whether the user may change positions.
    pub(crate) may_hold: bool,
}

/// Reads a `RunAgentInput`.
pub(crate) fn parse_input(asker: Asker, body: &[u8]) -> Result<RunRequest, InputError> {
    let input: Value = serde_json::from_slice(body).map_err(|error| InputError::NotAnObject(error.to_string()))?;
    read_input(asker, input)
}

/// As [`parse_input`], from JSON that was read already.
pub(crate) fn read_input(asker: Asker, input: Value) -> Result<RunRequest, InputError> {
    let Value::Object(mut input) = input else {
        return Err(InputError::NotAnObject(format!("it is {}", kind(&input))));
    };
    let at = Place(String::new());
    let thread = at.text(&input, "threadId")?;
    let run = at.text(&input, "runId")?;
    for (name, value) in [("/threadId", &thread), ("/runId", &run)] {
        if value.is_empty() {
            let (found, expected) = ("an empty string", "a string of at least one character");
            return Err(InputError::Malformed { pointer: name.to_owned(), found, expected });
        }
    }
    let mut ids = HashSet::new();
    let mut messages = at.each(&input, "messages", message)?.ok_or_else(|| at.missing("messages", "an array"))?;
    messages.retain(|message| ids.insert(message["id"].clone()));
    let legacy = Dialect::of_version(input.get("protocolVersion")) == Dialect::Legacy;
    Ok(RunRequest {
        agent: asker.agent,
        thread,
        run,
        messages,
        tools: at.each(&input, "tools", tool)?.unwrap_or_default(),
        context: at.each(&input, "context", context)?.unwrap_or_default(),
        resume: at.each(&input, "resume", resume)?.unwrap_or_default(),
        parent_run: at.text_if_any(&input, "parentRunId")?,
        state: input.remove("state").unwrap_or(Value::Null),
        forwarded: input.remove("forwardedProps").unwrap_or(Value::Null),
        user: asker.user,
        may_hold: asker.may_hold,
        legacy,
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

type Object = Map<String, Value>;

/// Where in the input something stands, as a JSON Pointer.
struct Place(String);

impl Place {
    fn below(&self, name: impl std::fmt::Display) -> Place {
        Place(format!("{}/{name}", self.0))
    }

    fn missing(&self, name: &str, expected: &'static str) -> InputError {
        InputError::Missing { pointer: self.below(name).0, expected }
    }

    fn malformed(self, found: &Value, expected: &'static str) -> InputError {
        InputError::Malformed { pointer: self.0, found: kind(found), expected }
    }

    fn text(&self, object: &Object, name: &str) -> Result<String, InputError> {
        self.text_if_any(object, name)?.ok_or_else(|| self.missing(name, "a string"))
    }

    fn text_if_any(&self, object: &Object, name: &str) -> Result<Option<String>, InputError> {
        match object.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.below(name).malformed(other, "a string")),
        }
    }

    /// The elements of an array as `read` leaves them; what it does not know is left out. `None` without an array.
    fn each(
        &self,
        object: &Object,
        name: &str,
        read: fn(&Place, &Object) -> Result<Option<Value>, InputError>,
    ) -> Result<Option<Vec<Value>>, InputError> {
        let items = match object.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(items)) => items,
            Some(other) => return Err(self.below(name).malformed(other, "an array")),
        };
        let mut found = Vec::new();
        for (at, item) in items.iter().enumerate() {
            let place = self.below(name).below(at);
            let Value::Object(item) = item else { return Err(place.malformed(item, "an object")) };
            found.extend(read(&place, item)?);
        }
        Ok(Some(found))
    }

    /// Copies members that must be strings where they are.
    fn copy_texts(&self, from: &Object, names: &[&str], to: &mut Value) -> Result<(), InputError> {
        for name in names {
            if let Some(text) = self.text_if_any(from, name)? {
                to[*name] = text.into();
            }
        }
        Ok(())
    }

    fn copy_object(&self, from: &Object, name: &str, to: &mut Value) -> Result<(), InputError> {
        match from.get(name) {
            None | Some(Value::Null) => {}
            Some(object @ Value::Object(_)) => to[name] = object.clone(),
            Some(other) => return Err(self.below(name).malformed(other, "an object")),
        }
        Ok(())
    }
}

/// A message with the members the protocol knows; `None` for an unknown role.
fn message(at: &Place, from: &Object) -> Result<Option<Value>, InputError> {
    let role = at.text(from, "role")?;
    if !["developer", "system", "assistant", "user", "tool", "reasoning", "activity"].contains(&role.as_str()) {
        return Ok(None);
    }
    let mut message = json!({"id": at.text(from, "id")?, "role": role});
    match role.as_str() {
        "developer" | "system" | "reasoning" => message["content"] = at.text(from, "content")?.into(),
        "user" => message["content"] = content(at, from)?,
        "tool" => {
            message["content"] = content(at, from)?;
            message["toolCallId"] = at.text(from, "toolCallId")?.into();
            at.copy_texts(from, &["error"], &mut message)?;
        }
        "assistant" => {
            at.copy_texts(from, &["content"], &mut message)?;
            if let Some(calls) = at.each(from, "toolCalls", tool_call)? {
                message["toolCalls"] = calls.into();
            }
        }
        _ => {
            message["activityType"] = at.text(from, "activityType")?.into();
            at.copy_object(from, "content", &mut message)?;
            if message.get("content").is_none() {
                return Err(at.missing("content", "an object"));
            }
        }
    }
    at.copy_texts(from, &["name", "subagentRunId"], &mut message)?;
    if role != "activity" {
        at.copy_texts(from, &["encryptedValue"], &mut message)?;
    }
    at.copy_object(from, "metadata", &mut message)?;
    Ok(Some(message))
}

/// Text, or the parts that the protocol knows.
fn content(at: &Place, from: &Object) -> Result<Value, InputError> {
    match from.get("content") {
        None | Some(Value::Null) => Err(at.missing("content", "a string or an array of parts")),
        Some(text @ Value::String(_)) => Ok(text.clone()),
        Some(Value::Array(_)) => Ok(at.each(from, "content", part)?.unwrap_or_default().into()),
        Some(other) => Err(at.below("content").malformed(other, "a string or an array of parts")),
    }
}

fn part(at: &Place, from: &Object) -> Result<Option<Value>, InputError> {
    let kind = at.text(from, "type")?;
    let mut part = json!({"type": kind});
    match kind.as_str() {
        "text" => part["text"] = at.text(from, "text")?.into(),
        "image" | "audio" | "video" | "document" => {
            let Some(Value::Object(source)) = from.get("source") else {
                return Err(at.missing("source", "an object"));
            };
            let within = at.below("source");
            let source_kind = within.text(source, "type")?;
            let mut shown = json!({"type": source_kind, "value": ""});
            match source_kind.as_str() {
                "data" => shown["mimeType"] = within.text(source, "mimeType")?.into(),
                "url" => within.copy_texts(source, &["mimeType"], &mut shown)?,
                "file" => within.copy_texts(source, &["mimeType", "provider"], &mut shown)?,
                _ => return Ok(None),
            }
            shown["value"] = within.text(source, "value")?.into();
            part["source"] = shown;
        }
        _ => return Ok(None),
    }
    at.copy_texts(from, &["id"], &mut part)?;
    at.copy_object(from, "metadata", &mut part)?;
    Ok(Some(part))
}

fn tool_call(at: &Place, from: &Object) -> Result<Option<Value>, InputError> {
    if at.text(from, "type")? != "function" {
        return Ok(None);
    }
    let Some(Value::Object(function)) = from.get("function") else {
        return Err(at.missing("function", "an object"));
    };
    let within = at.below("function");
    let function = json!({"name": within.text(function, "name")?, "arguments": within.text(function, "arguments")?});
    let mut call = json!({"id": at.text(from, "id")?, "type": "function", "function": function});
    at.copy_texts(from, &["encryptedValue"], &mut call)?;
    at.copy_object(from, "metadata", &mut call)?;
    Ok(Some(call))
}

fn tool(at: &Place, from: &Object) -> Result<Option<Value>, InputError> {
    let description = at.text_if_any(from, "description")?.unwrap_or_default();
    let mut tool = json!({"name": at.text(from, "name")?, "description": description});
    at.copy_object(from, "parameters", &mut tool)?;
    Ok(Some(tool))
}

fn context(at: &Place, from: &Object) -> Result<Option<Value>, InputError> {
    Ok(Some(json!({"description": at.text(from, "description")?, "value": at.text(from, "value")?})))
}

fn resume(at: &Place, from: &Object) -> Result<Option<Value>, InputError> {
    let status = at.text(from, "status")?;
    if status != "resolved" && status != "cancelled" {
        let expected = "`resolved` or `cancelled`";
        return Err(InputError::Malformed { pointer: at.below("status").0, found: "another string", expected });
    }
    let mut entry = json!({"interruptId": at.text(from, "interruptId")?, "status": status});
    if let Some(payload) = from.get("payload") {
        entry["payload"] = payload.clone();
    }
    Ok(Some(entry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actors::agent::PendingCall;
    use engine::event::Micros;

    fn finished(outcome: Outcome) -> RunEvent {
        RunEvent::Finished { thread: "t".into(), run: "r".into(), outcome, usage: None }
    }

    fn check(event: RunEvent, current: Value, legacy: Value) {
        assert_eq!(to_value(&event, Dialect::Current), current);
        assert_eq!(to_value(&event, Dialect::Legacy), legacy);
    }

    fn check_both(event: RunEvent, expected: Value) {
        check(event, expected.clone(), expected);
    }

    #[test]
    fn a_run_starts_with_its_ids_and_the_version_of_the_server() {
        let started = |parent: Option<&str>| RunEvent::Started {
            thread: "t".into(),
            run: "r".into(),
            parent: parent.map(Into::into),
            legacy: false,
        };
        check(
            started(None),
            json!({"type": "RUN_STARTED", "threadId": "t", "runId": "r", "protocolVersion": "1.0"}),
            json!({"type": "RUN_STARTED", "threadId": "t", "runId": "r"}),
        );
        assert_eq!(to_value(&started(Some("p")), Dialect::Legacy)["parentRunId"], "p");
    }

    #[test]
    fn the_old_dialect_has_no_cancelled_outcome_and_no_pending_calls() {
        let plain = json!({"type": "RUN_FINISHED", "threadId": "t", "runId": "r"});
        let with = |outcome: Value| {
            let mut event = plain.clone();
            event["outcome"] = outcome;
            event
        };
        check(finished(Outcome::Success { pending: Vec::new() }), with(json!({"type": "success"})), plain.clone());
        check(
            finished(Outcome::Success { pending: vec!["c".into()] }),
            with(json!({"type": "success", "pendingToolCallIds": ["c"]})),
            plain.clone(),
        );
        check(
            finished(Outcome::Cancelled),
            with(json!({"type": "cancelled"})),
            json!({"type": "RUN_ERROR", "message": "the run was cancelled", "code": "cancelled"}),
        );
    }

    #[test]
    fn an_interrupt_names_its_call_its_schema_and_when_it_expires() {
        let open = Interrupt {
            id: "i".into(),
            reason: "tool_call".into(),
            message: "Really?".into(),
            call: Some(PendingCall { id: "c".into(), name: "n".into(), arguments: json!({}) }),
            schema: json!({"type": "object"}),
            expires_at: Micros(0),
        };
        let expected = json!({"type": "RUN_FINISHED", "threadId": "t", "runId": "r", "outcome": {"type": "interrupt",
            "interrupts": [{"id": "i", "reason": "tool_call", "message": "Really?", "toolCallId": "c",
                "responseSchema": {"type": "object"}, "expiresAt": "1970-01-01T00:00:00.000000Z"}]}});
        check_both(finished(Outcome::Interrupt(vec![open])), expected);
    }

    #[test]
    fn texts_calls_steps_and_state_look_the_same_to_all_clients() {
        check_both(
            RunEvent::TextStart { id: "m".into() },
            json!({"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"}),
        );
        check_both(
            RunEvent::TextDelta { id: "m".into(), delta: "é\u{1F30A}".into() },
            json!({"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "é\u{1F30A}"}),
        );
        check_both(
            RunEvent::ToolStart { id: "c".into(), name: "n".into(), parent: "m".into() },
            json!({"type": "TOOL_CALL_START", "toolCallId": "c", "toolCallName": "n", "parentMessageId": "m"}),
        );
        check_both(
            RunEvent::ToolResult { message_id: "t".into(), call_id: "c".into(), content: "3".into() },
            json!({"type": "TOOL_CALL_RESULT", "messageId": "t", "toolCallId": "c", "content": "3", "role": "tool"}),
        );
        check_both(RunEvent::StepStarted("s".into()), json!({"type": "STEP_STARTED", "stepName": "s"}));
        check_both(RunEvent::StateSnapshot(Value::Null), json!({"type": "STATE_SNAPSHOT", "snapshot": null}));
        check_both(
            RunEvent::StateDelta(json!([{"op": "remove", "path": "/a"}])),
            json!({"type": "STATE_DELTA", "delta": [{"op": "remove", "path": "/a"}]}),
        );
        check_both(
            RunEvent::Custom { name: "n".into(), value: Value::Null },
            json!({"type": "CUSTOM", "name": "n", "value": null}),
        );
    }

    #[test]
    fn a_tools_answer_in_parts_is_text_to_the_old_dialect() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]);
        let messages = vec![json!({"id": "t", "role": "tool", "toolCallId": "c", "content": parts})];
        let shown = to_value(&RunEvent::MessagesSnapshot(messages), Dialect::Legacy);
        assert_eq!(shown["messages"][0]["content"], "a\nb");
    }

    #[test]
    fn a_frame_has_its_position_and_ends_with_an_empty_line() {
        let text =
            frame("5f-0", 3, &RunEvent::TextDelta { id: "m\n".into(), delta: "a\r\n\nb".into() }, Dialect::Current);
        let lines: Vec<&str> = text.split('\n').collect();
        assert_eq!(lines[0], "id: 5f-0.3");
        assert!(lines[1].starts_with("data: {"), "{text:?}");
        assert_eq!(lines[2..], ["", ""]);
        assert!(!text.contains('\r'));
    }

    fn read(input: Value) -> Result<RunRequest, InputError> {
        let asker = Asker { agent: "analyst".parse().unwrap(), user: "ann".into(), may_hold: true };
        read_input(asker, input)
    }

    fn with(member: &str, value: Value) -> Value {
        let mut input = json!({"threadId": "t", "runId": "r", "messages": []});
        input[member] = value;
        input
    }

    #[test]
    fn what_the_protocol_does_not_know_is_left_out_and_the_run_goes_on() {
        let messages = json!([
            {"id": "1", "role": "user", "content": "hi", "mood": "good", "name": null},
            {"id": "2", "role": "oracle", "content": 42},
            {"id": "3", "role": "user", "content": [{"type": "text", "text": "a", "x": 1}, {"type": "binary", "data": "x"},
                {"type": "image", "source": {"type": "url", "value": "http://x"}}, {"type": "image", "source": {"type": "beam"}}]},
            {"id": "4", "role": "assistant", "content": null, "toolCalls": [
                {"id": "c", "type": "function", "function": {"name": "n", "arguments": "{}", "x": 1}}, {"type": "magic"}]},
            {"id": "1", "role": "user", "content": "again"},
        ]);
        let mut input = with("messages", messages);
        input["future"] = json!({"a": 1});
        let request = read(input).unwrap();
        let expected = [
            json!({"id": "1", "role": "user", "content": "hi"}),
            json!({"id": "3", "role": "user", "content": [{"type": "text", "text": "a"},
                {"type": "image", "source": {"type": "url", "value": "http://x"}}]}),
            json!({"id": "4", "role": "assistant", "toolCalls": [
                {"id": "c", "type": "function", "function": {"name": "n", "arguments": "{}"}}]}),
        ];
        assert_eq!(request.messages, expected);
        assert!(request.legacy && request.tools.is_empty() && request.state.is_null());
    }

    #[test]
    fn what_the_protocol_knows_and_is_malformed_is_refused_with_its_place() {
        let pointer = |input: Value| match read(input).unwrap_err() {
            InputError::Missing { pointer, .. } | InputError::Malformed { pointer, .. } => pointer,
            InputError::NotAnObject(_) => "not an object".to_owned(),
        };
        for (input, expected) in [
            (json!([]), "not an object"),
            (json!(null), "not an object"),
            (json!({"runId": "r", "messages": []}), "/threadId"),
            (json!({"threadId": "t", "messages": []}), "/runId"),
            (json!({"threadId": "t", "runId": "r"}), "/messages"),
            (with("threadId", json!(7)), "/threadId"),
            (with("runId", json!("")), "/runId"),
            (with("messages", json!({})), "/messages"),
            (with("messages", json!(["x"])), "/messages/0"),
            (with("messages", json!([{"role": "user", "content": "x"}])), "/messages/0/id"),
            (with("messages", json!([{"id": "m", "role": "user", "content": 42}])), "/messages/0/content"),
            (with("messages", json!([{"id": "m", "role": "tool", "content": "x"}])), "/messages/0/toolCallId"),
            (
                with("messages", json!([{"id": "m", "role": "user", "content": [{"type": "text"}]}])),
                "/messages/0/content/0/text",
            ),
            (with("tools", json!("x")), "/tools"),
            (with("tools", json!([{"description": "d"}])), "/tools/0/name"),
            (with("resume", json!([{"interruptId": "i", "status": "maybe"}])), "/resume/0/status"),
        ] {
            assert_eq!(pointer(input), expected);
        }
    }

    #[test]
    fn the_dialect_is_told_by_the_protocol_version() {
        let legacy = |version: Value| read(with("protocolVersion", version)).unwrap().legacy;
        assert!(legacy(Value::Null) && legacy(json!("0.9")));
        assert!(
            !legacy(json!("1.0"))
                && !legacy(json!("1.7"))
                && !legacy(json!("2.0"))
                && !legacy(json!("soon"))
                && !legacy(json!(1))
        );
    }
}
