//! An OpenAI-compatible model as an agent: streaming chat completions, with the same tools as the analyst.

use super::conversation::text_of;
use super::run::{PACE, Resolution, Run};
use super::{Agent, AgentInfo, Failure, Outcome, Usage, analyst, new_id, tools};
use crate::outward::{client_config, reason};
use crate::rows::rfc3339;
use engine::event::ItemName;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Turns of one run in which the model may call tools.
const TURNS_MAX: usize = 8;
/// How long the model may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of one line of the model's stream.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Bytes of an error's body that are read, and shown.
const ERROR_BYTES_MAX: usize = 2_048;
/// Tools the model may call in one turn.
const CALLS_MAX: usize = 32;

/// A model of the configuration: `agents.<name>`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Where `/chat/completions` is, such as `https://api.openai.com/v1`.
    pub base_url: String,
    pub model: String,
    /// Sent as a bearer token; a local model may need none.
    pub api_key: Option<Secret>,
    /// A file that holds the key, in place of `api_key`.
    pub api_key_file: Option<PathBuf>,
}

/// A text that no log shows.
#[derive(Clone, Deserialize, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

pub(super) struct Model {
    config: AgentConfig,
}

impl Model {
    pub(super) fn new(config: AgentConfig) -> Self {
        Self { config }
    }
}

/// What the model made of one request.
#[derive(Default)]
struct Turn {
    text: String,
    calls: Vec<Call>,
}

#[derive(Clone, Default)]
struct Call {
    name: String,
    arguments: String,
}

#[async_trait::async_trait]
impl Agent for Model {
    async fn answer(&self, run: &mut Run) -> Result<Outcome, Failure> {
        settle(run).await?;
        run.open_state("answering")?;
        let mut messages = prompt(run);
        let client_tools: HashSet<String> =
            run.request.tools.iter().filter_map(|tool| tool["name"].as_str().map(str::to_owned)).collect();
        for _ in 0..TURNS_MAX {
            let id = new_id("msg");
            let turn = self.turn(run, &id, &messages).await?;
            if turn.calls.is_empty() {
                return Ok(Outcome::Success { pending: Vec::new() });
            }
            let (mut shown, mut answers) = (Vec::new(), Vec::new());
            let (mut pending, mut interrupts) = (Vec::new(), Vec::new());
            for Call { name, arguments } in turn.calls {
                let parsed = serde_json::from_str::<Value>(&arguments).ok().filter(Value::is_object);
                let arguments = parsed.clone().unwrap_or_else(|| json!({}));
                let call = run.announce(&id, &name, &arguments)?;
                shown.push(json!({
                    "id": call, "type": "function", "function": {"name": name, "arguments": arguments.to_string()},
                }));
                if parsed.is_none() {
                    let content = json!({"error": "bad_arguments", "detail": "the arguments are not a JSON object"});
                    run.answer(&call, content.to_string())?;
                    answers.push(json!({"role": "tool", "tool_call_id": call, "content": content.to_string()}));
                } else if client_tools.contains(&name) {
                    pending.push(call);
                } else if name == tools::UPDATE_POSITION {
                    let message = format!("Book this change of a position? {arguments}");
                    interrupts.push(analyst::approval(run, &message, call, &name, arguments));
                } else {
                    let content = match run.execute(&call, &name, &arguments).await? {
                        Ok(answer) => answer.to_string(),
                        Err(fault) => json!({"error": fault.code, "detail": fault.detail}).to_string(),
                    };
                    answers.push(json!({"role": "tool", "tool_call_id": call, "content": content}));
                }
            }
            if !interrupts.is_empty() {
                return Ok(Outcome::Interrupt(interrupts));
            }
            if !pending.is_empty() {
                return Ok(Outcome::Success { pending });
            }
            messages.push(json!({"role": "assistant", "content": turn.text, "tool_calls": shown}));
            messages.extend(answers);
        }
        let message = format!("the model called tools {TURNS_MAX} times without an answer; ask for less at once");
        Err(Failure::new("model_failed", message))
    }

    fn info(&self, name: &ItemName) -> AgentInfo {
        AgentInfo {
            name: name.clone(),
            description: format!("Model {} with the tools of this workspace", self.config.model),
            model: Some(self.config.model.clone()),
            tools: tools::specs(),
        }
    }
}

/// Carries out what was approved; the model sees the answers as those of its own calls.
async fn settle(run: &mut Run) -> Result<(), Failure> {
    for Resolution { interrupt, approved, .. } in std::mem::take(&mut run.resolved) {
        let Some(call) = interrupt.call else { continue };
        if approved {
            // the model reads whether it worked
            _ = run.execute(&call.id, &call.name, &call.arguments).await?;
        } else {
            run.answer(&call.id, json!({"rejected": true, "detail": "the user did not approve"}).to_string())?;
        }
    }
    Ok(())
}

/// The thread as the model sees it.
fn prompt(run: &Run) -> Vec<Value> {
    let mut system = format!(
        "You are the analyst of the Tidewatch workspace `{}`. Answer from its live metrics, portfolios, alerts and \
         streams; read them with your tools rather than guess, and give numbers with their units and times. It is {}.",
        run.workspace,
        rfc3339(run.system.now()),
    );
    for entry in &run.request.context {
        let (what, value) = (entry["description"].as_str().unwrap_or(""), entry["value"].as_str().unwrap_or(""));
        system.push_str(&format!("\n{what}: {value}"));
    }
    let mut messages = vec![json!({"role": "system", "content": system})];
    messages.extend(history(run.conversation.messages()));
    messages
}

/// AG-UI messages as chat messages. A call without an answer gets one, since the model insists on it.
fn history(messages: &[Value]) -> Vec<Value> {
    let mut out = Vec::new();
    for message in messages {
        match message["role"].as_str().unwrap_or_default() {
            "user" => out.push(json!({"role": "user", "content": text_of(message)})),
            "system" | "developer" => out.push(json!({"role": "system", "content": text_of(message)})),
            "assistant" => {
                let calls: Vec<Value> = message["toolCalls"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|call| json!({"id": call["id"], "type": "function", "function": call["function"]}))
                    .collect();
                let mut shown = json!({"role": "assistant", "content": text_of(message)});
                if !calls.is_empty() {
                    shown["tool_calls"] = json!(calls);
                }
                out.push(shown);
                for call in calls {
                    let answer = messages.iter().find(|m| m["role"] == "tool" && m["toolCallId"] == call["id"]);
                    let content = answer.map_or_else(|| "(no answer)".to_owned(), text_of);
                    out.push(json!({"role": "tool", "tool_call_id": call["id"], "content": content}));
                }
            }
            _ => {} // answers stand behind their calls; the model knows no other role
        }
    }
    out
}

impl Model {
    /// One request: the text is said as message `id` while it comes, the calls are gathered.
    async fn turn(&self, run: &mut Run, id: &str, messages: &[Value]) -> Result<Turn, Failure> {
        let response = self.request(run, messages).await?;
        let mut chunks = response.bytes_stream();
        let mut speech = Speech { id, started: false, waiting: String::new(), said: Instant::now() };
        let mut turn = Turn::default();
        let mut lines = Lines::default();
        'stream: loop {
            let next = if speech.waiting.is_empty() {
                timeout(SILENCE_MAX, chunks.next()).await.map_err(|_| silent())?
            } else {
                match timeout_at(speech.said + PACE, chunks.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        speech.flush(run)?;
                        continue;
                    }
                }
            };
            let Some(chunk) = next else { break };
            let chunk = chunk.map_err(|error| failed(&format!("its stream broke: {}", reason(&error))))?;
            for data in lines.feed(&chunk)? {
                if data == "[DONE]" {
                    break 'stream;
                }
                let text = turn.take(&data, &mut run.usage, &self.config.model)?;
                turn.text.push_str(&text);
                speech.waiting.push_str(&text);
            }
            if speech.said.elapsed() >= PACE {
                speech.flush(run)?;
            }
        }
        speech.end(run)?;
        Ok(turn)
    }

    async fn request(&self, run: &Run, messages: &[Value]) -> Result<reqwest::Response, Failure> {
        let mut offered = tools::specs();
        offered.extend(run.request.tools.iter().map(|tool| {
            let parameters = match &tool["parameters"] {
                Value::Object(schema) => Value::Object(schema.clone()),
                _ => json!({"type": "object", "properties": {}}),
            };
            json!({"name": tool["name"], "description": tool["description"], "parameters": parameters})
        }));
        let offered: Vec<Value> =
            offered.into_iter().map(|tool| json!({"type": "function", "function": tool})).collect();
        let body = json!({
            "model": self.config.model, "messages": messages, "tools": offered, "stream": true,
            "stream_options": {"include_usage": true},
        });
        let url = format!("{}/chat/completions", self.config.base_url.trim_end_matches('/'));
        let mut request = client()?.post(&url).header("accept", "text/event-stream").json(&body);
        if let Some(key) = self.key().await? {
            request = request.bearer_auth(key);
        }
        let response = timeout(SILENCE_MAX, request.send()).await.map_err(|_| silent())?;
        let response = response.map_err(|error| failed(&format!("it cannot be reached: {}", reason(&error))))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let mut body = Vec::new();
        let mut chunks = response.bytes_stream();
        while body.len() < ERROR_BYTES_MAX
            && let Ok(Some(Ok(chunk))) = timeout(CONNECT_WITHIN, chunks.next()).await
        {
            body.extend(chunk);
        }
        body.truncate(ERROR_BYTES_MAX);
        let said = match serde_json::from_slice::<Value>(&body) {
            Ok(error) if error["error"]["message"].is_string() => {
                error["error"]["message"].as_str().unwrap_or("").to_owned()
            }
            _ => String::from_utf8_lossy(&body).into_owned(),
        };
        Err(failed(&format!("it answered HTTP {status}: {said}")))
    }

    async fn key(&self) -> Result<Option<String>, Failure> {
        let Some(path) = &self.config.api_key_file else {
            return Ok(self.config.api_key.as_ref().map(|key| key.0.clone()));
        };
        match tokio::fs::read_to_string(path).await {
            Ok(key) => Ok(Some(key.trim().to_owned())),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the key of a model cannot be read");
                Err(failed("its api_key_file cannot be read"))
            }
        }
    }
}

fn failed(what: &str) -> Failure {
    Failure::new("model_failed", format!("the model failed: {what}"))
}

fn silent() -> Failure {
    failed(&format!("it said nothing for {} s", SILENCE_MAX.as_secs()))
}

/// One client for all models: it keeps connections open.
fn client() -> Result<&'static reqwest::Client, Failure> {
    static CLIENT: OnceLock<Result<reqwest::Client, String>> = OnceLock::new();
    let build = || {
        let tls = client_config()?;
        let client = reqwest::Client::builder().tls_backend_preconfigured(tls).connect_timeout(CONNECT_WITHIN);
        client.build().map_err(|error| error.to_string())
    };
    CLIENT.get_or_init(build).as_ref().map_err(|error| failed(error))
}

/// A text on its way to the readers: at most one piece in [`PACE`], however many the model sends.
struct Speech<'a> {
    id: &'a str,
    started: bool,
    waiting: String,
    said: Instant,
}

impl Speech<'_> {
    fn flush(&mut self, run: &mut Run) -> Result<(), Failure> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let id = self.id.to_owned();
        if !std::mem::replace(&mut self.started, true) {
            run.emit(super::RunEvent::TextStart { id: id.clone() })?;
        }
        self.said = Instant::now();
        run.emit(super::RunEvent::TextDelta { id, delta: std::mem::take(&mut self.waiting) })
    }

    fn end(mut self, run: &mut Run) -> Result<(), Failure> {
        self.flush(run)?;
        if self.started { run.emit(super::RunEvent::TextEnd { id: self.id.to_owned() }) } else { Ok(()) }
    }
}

/// The `data:` lines of a stream of server-sent events, whatever the chunks they come in.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn feed(&mut self, chunk: &[u8]) -> Result<Vec<String>, Failure> {
        self.rest.extend_from_slice(chunk);
        let mut found = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            if let Some(data) = line.strip_prefix(b"data:") {
                let text = std::str::from_utf8(data).map_err(|_| failed("its stream is not UTF-8"))?;
                found.push(text.trim().to_owned());
            }
        }
        if self.rest.len() > LINE_BYTES_MAX {
            return Err(failed(&format!("a line of its stream is longer than {LINE_BYTES_MAX} bytes")));
        }
        Ok(found)
    }
}

impl Turn {
    /// Takes in one chunk: the text it adds.
    fn take(&mut self, data: &str, usage: &mut Option<Usage>, model: &str) -> Result<String, Failure> {
        let chunk: Value = serde_json::from_str(data)
            .map_err(|error| failed(&format!("a chunk of its stream is unreadable: {error}")))?;
        if let Some(message) = chunk["error"]["message"].as_str() {
            return Err(failed(message));
        }
        if chunk["usage"].is_object() {
            let count = |name: &str| chunk["usage"][name].as_u64().unwrap_or(0);
            let usage = usage.get_or_insert_with(|| Usage { model: model.to_owned(), ..Usage::default() });
            usage.input_tokens += count("prompt_tokens");
            usage.output_tokens += count("completion_tokens");
        }
        let delta = &chunk["choices"][0]["delta"];
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let at = part["index"].as_u64().map_or(self.calls.len(), |at| at as usize);
            if at >= CALLS_MAX {
                return Err(failed(&format!("it called more than {CALLS_MAX} tools at once")));
            }
            if self.calls.len() <= at {
                self.calls.resize(at + 1, Call::default());
            }
            let text = |member: &str| part["function"][member].as_str().unwrap_or_default();
            self.calls[at].name.push_str(text("name"));
            self.calls[at].arguments.push_str(text("arguments"));
        }
        let text = delta["content"].as_str().or_else(|| delta["refusal"].as_str());
        Ok(text.unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_the_stream_is_cut() {
        let stream = "data: {\"a\":\"\u{1F30A}\"}\r\n\r\n: comment\n\ndata:[DONE]\n\n".as_bytes();
        for size in 1..stream.len() {
            let mut lines = Lines::default();
            let found: Vec<String> = stream.chunks(size).flat_map(|chunk| lines.feed(chunk).unwrap()).collect();
            assert_eq!(found, ["{\"a\":\"\u{1F30A}\"}", "[DONE]"]);
        }
    }

    #[test]
    fn a_call_comes_together_from_its_parts() {
        let mut turn = Turn::default();
        let mut usage = None;
        for part in [
            json!({"index": 0, "id": "c", "function": {"name": "run_sql", "arguments": ""}}),
            json!({"index": 0, "function": {"arguments": "{\"sql\":"}}),
            json!({"index": 1, "id": "d", "function": {"name": "list_streams", "arguments": "{}"}}),
            json!({"index": 0, "function": {"arguments": "\"SELECT 1\"}"}}),
        ] {
            let chunk = json!({"choices": [{"delta": {"tool_calls": [part]}}]}).to_string();
            assert_eq!(turn.take(&chunk, &mut usage, "m").unwrap(), "");
        }
        let calls: Vec<_> = turn.calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
        assert_eq!(calls, [("run_sql", "{\"sql\":\"SELECT 1\"}"), ("list_streams", "{}")]);
    }

    #[test]
    fn an_error_in_the_stream_fails_the_turn() {
        let error = Turn::default().take(r#"{"error":{"message":"overloaded"}}"#, &mut None, "m").unwrap_err();
        assert_eq!(error.message, "the model failed: overloaded");
    }

    #[test]
    fn a_call_without_an_answer_gets_one_and_answers_stand_behind_their_calls() {
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "n", "arguments": "{}"}});
        let messages = [
            json!({"id": "u", "role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}),
            json!({"id": "a", "role": "assistant", "toolCalls": [call("1"), call("2")]}),
            json!({"id": "t", "role": "tool", "toolCallId": "2", "content": "two"}),
            json!({"id": "r", "role": "reasoning", "content": "hm"}),
        ];
        let history = history(&messages);
        assert_eq!(history[0], json!({"role": "user", "content": "hi"}));
        let answers: Vec<_> = history[2..].iter().map(|m| (m["tool_call_id"].clone(), m["content"].clone())).collect();
        assert_eq!(answers, [(json!("1"), json!("(no answer)")), (json!("2"), json!("two"))]);
    }

    #[test]
    fn the_key_is_never_printed() {
        let config = AgentConfig {
            base_url: "http://model".into(),
            model: "m".into(),
            api_key: Some(Secret("sk-123".into())),
            api_key_file: None,
        };
        assert!(!format!("{config:?}").contains("sk-123"));
    }
}
