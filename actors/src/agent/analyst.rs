//! The built-in agent. It needs no model: it finds what a question asks for, reads the workspace with the same tools a
//! model would have, and says what it read.

use super::intent::{self, Aspect, Intent, MetricWords, PortfolioWords, Vocabulary};
use super::run::{Resolution, Run};
use super::{Agent, AgentInfo, Failure, Interrupt, Outcome, PendingCall, facts, new_id, tools};
use engine::event::{ItemName, Span};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// How long a question to a person stays open.
const ASKS_FOR: Span = Span::seconds(3_600);
/// Metrics a long answer goes through.
const METRICS_MAX: usize = 20;
/// Rows of a metric that a question is answered from.
const ROWS: usize = 500;

pub(super) struct Analyst;

#[async_trait::async_trait]
impl Agent for Analyst {
    async fn answer(&self, run: &mut Run) -> Result<Outcome, Failure> {
        if !run.resolved.is_empty() {
            return settle(run).await;
        }
        if !run.request.resume.is_empty() {
            return tell(run, "settling", "Nothing here waits for an answer: it was given before, or never asked for.")
                .await;
        }
        let answers = run.conversation.tool_answers();
        if !answers.is_empty() {
            return tell(run, "reading the answer", &acknowledged(&answers)).await;
        }
        let question = run.conversation.question();
        let known = vocabulary(run).await?;
        let intent = intent::of(&question, &known);
        if let Intent::ClientTool(name) = &intent {
            return ask_client(run, name, &question);
        }
        run.open_state(focus(&intent))?;
        run.begin_step("reading")?;
        if let Intent::Order { portfolio, symbol, change, price } = intent {
            let order = Order { portfolio, symbol, change, price };
            return ask_approval(run, order, &known).await;
        }
        let text = read(run, &intent, &question, &known).await?;
        run.end_step("reading")?;
        say(run, &text).await
    }

    fn info(&self, name: &ItemName) -> AgentInfo {
        let description =
            "Answers from the live metrics, portfolios, alerts and streams of the workspace; needs no key";
        AgentInfo { name: name.clone(), description: description.to_owned(), model: None, tools: tools::specs() }
    }
}

fn success() -> Outcome {
    Outcome::Success { pending: Vec::new() }
}

/// What the state shows as the agent's focus while it reads.
fn focus(intent: &Intent) -> &str {
    match intent {
        Intent::Greeting | Intent::Unclear => "the workspace",
        Intent::Recall => "this conversation",
        Intent::Metrics => "metrics",
        Intent::Metric { name, .. } => name,
        Intent::LastTrade { symbol } => symbol,
        Intent::Portfolio { id } => id.as_deref().unwrap_or("portfolios"),
        Intent::Alerts => "alerts",
        Intent::Streams => "streams",
        Intent::Sql(_) | Intent::Failure => "a query",
        Intent::Everything => "the whole workspace",
        Intent::ClientTool(name) => name,
        Intent::Order { .. } => "an order",
    }
}

/// The names of the workspace and of the client's tools.
async fn vocabulary(run: &Run) -> Result<Vocabulary, Failure> {
    let (system, ws) = (&run.system, &run.workspace);
    let metrics = system.metrics(ws).await?.into_iter().map(|metric| {
        let names: Vec<String> = metric.program.output().fields().iter().map(|field| field.name().clone()).collect();
        let (keys, values) = names[2..].split_at(metric.program.key_count());
        MetricWords { name: metric.name.to_string(), keys: keys.to_vec(), values: values.to_vec() }
    });
    let metrics = metrics.collect();
    let portfolios = system.portfolios(ws).await?;
    let mut symbols = BTreeSet::new();
    for portfolio in &portfolios {
        let id: ItemName = portfolio.id.parse().map_err(crate::fault::Fault::internal)?;
        let held = system.positions(ws, &id).await?;
        symbols.extend(held.into_iter().map(|position| position.symbol));
    }
    let tools = run.request.tools.iter().filter_map(|tool| tool["name"].as_str());
    Ok(Vocabulary {
        metrics,
        portfolios: portfolios.into_iter().map(|p| PortfolioWords { id: p.id, name: p.name }).collect(),
        symbols: symbols.into_iter().collect(),
        client_tools: tools.map(str::to_owned).collect(),
    })
}

/// Reads what the question asks for and puts it into words.
async fn read(run: &mut Run, intent: &Intent, question: &str, known: &Vocabulary) -> Result<String, Failure> {
    let turn = new_id("msg");
    let turn = turn.as_str();
    Ok(match intent {
        Intent::Greeting => greeting(run, known),
        Intent::Recall => {
            let mut said: Vec<String> = run.conversation.of_user().collect();
            said.pop();
            match intent::recall(question, &said) {
                Some(sentence) => format!("Earlier in this thread you said: “{sentence}”"),
                None => "I find nothing about that among your earlier messages in this thread.".to_owned(),
            }
        }
        Intent::Metrics => facts::metrics(&run.call(turn, "list_metrics", json!({})).await?),
        Intent::Metric { name, value, symbols, aspect } => {
            let mut wanted = json!({"metric": name, "limit": ROWS});
            let has_symbols = known.metrics.iter().any(|m| m.name == *name && m.keys.iter().any(|key| key == "symbol"));
            if let ([symbol], true, false) = (symbols.as_slice(), has_symbols, *aspect == Aspect::Comparison) {
                wanted["key"] = json!({"symbol": symbol});
            }
            let answer = run.call(turn, "query_metric", wanted).await?;
            let lower = question.to_lowercase();
            facts::metric_answer(&answer, value.as_deref(), *aspect, |label| {
                !label.is_empty() && is_word_of(&label.to_lowercase(), &lower)
            })
        }
        Intent::LastTrade { symbol } => {
            let answer = run.call(turn, "run_sql", json!({"sql": tools::last_trade_sql(symbol)})).await?;
            facts::last_trade(symbol, &answer)
        }
        Intent::Portfolio { id } => {
            let wanted = id.as_ref().map_or_else(|| json!({}), |id| json!({"portfolio": id}));
            facts::portfolios(&run.call(turn, "portfolio_summary", wanted).await?)
        }
        Intent::Alerts => facts::alerts(&run.call(turn, "list_alerts", json!({})).await?),
        Intent::Streams => facts::streams(&run.call(turn, "list_streams", json!({})).await?),
        Intent::Sql(sql) => facts::rows(&run.call(turn, "run_sql", json!({"sql": sql})).await?),
        // a real failure: no workspace has such a table
        Intent::Failure => {
            let answer =
                run.call(turn, "run_sql", json!({"sql": "SELECT * FROM no_such_schema.no_such_table"})).await?;
            facts::rows(&answer)
        }
        Intent::Everything => everything(run, turn).await?,
        Intent::Unclear => {
            format!("I did not find in your question what to look up. {}", greeting(run, known))
        }
        Intent::ClientTool(_) | Intent::Order { .. } => unreachable!("answered before reading"),
    })
}

/// Whether `word` stands in `text` with nothing of a word around it.
fn is_word_of(word: &str, text: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let mut places = text.match_indices(word);
    places.any(|(at, _)| !is_part(text[..at].chars().next_back()) && !is_part(text[at + word.len()..].chars().next()))
}

fn greeting(run: &Run, known: &Vocabulary) -> String {
    let count = |n: usize, what: &str| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
    let example = match known.metrics.first() {
        Some(metric) => format!("what is the highest value of {}", metric.name),
        None => "which streams take in events".to_owned(),
    };
    format!(
        "I am the analyst of workspace {}, which has {} and {} now. I read its live metrics, portfolios, alerts and \
         streams with my own tools, and answer with the numbers I find there. Ask me, for example: {example}?",
        run.workspace,
        count(known.metrics.len(), "metric"),
        count(known.portfolios.len(), "portfolio"),
    )
}

/// Every metric, portfolio, alert and stream, one after the other.
async fn everything(run: &mut Run, turn: &str) -> Result<String, Failure> {
    let metrics = run.call(turn, "list_metrics", json!({})).await?;
    let names: Vec<String> = metrics["metrics"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|metric| Some(metric["name"].as_str()?.to_owned()))
        .take(METRICS_MAX)
        .collect();
    let mut parts = vec![
        format!("This is everything that workspace {} shows me right now, step by step.", run.workspace),
        "First, the metrics, which are windowed queries that run all the time.".to_owned(),
        facts::metrics(&metrics),
    ];
    for name in names {
        run.focus(&name)?;
        let answer = run.call(turn, "query_metric", json!({"metric": name, "limit": ROWS})).await?;
        let aspects = [Aspect::Newest, Aspect::Highest, Aspect::Lowest, Aspect::Trend];
        let values: Vec<String> =
            answer["values"].as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect();
        if answer["rows"].as_array().is_none_or(Vec::is_empty) {
            parts.push(facts::metric_answer(&answer, None, Aspect::Newest, |_| false));
        }
        for value in values.iter().filter(|value| answer["rows"][0][value.as_str()].is_number()) {
            parts.push(aspects.map(|aspect| facts::metric_answer(&answer, Some(value), aspect, |_| false)).join(" "));
        }
    }
    run.focus("portfolios")?;
    let summary = run.call(turn, "portfolio_summary", json!({})).await?;
    parts.push("Second, the portfolios, valued at the last prices.".to_owned());
    match summary["portfolios"].as_array().map(Vec::as_slice) {
        None | Some([]) => parts.push(facts::portfolios(&summary)),
        Some(all) => parts.extend(all.iter().map(|one| facts::portfolio(one, ROWS))),
    }
    run.focus("alerts")?;
    parts.push("Third, the alerts, which are conditions over the rows of a metric.".to_owned());
    parts.push(facts::alerts(&run.call(turn, "list_alerts", json!({})).await?));
    run.focus("streams")?;
    let streams = run.call(turn, "list_streams", json!({})).await?;
    parts.push("Fourth, the streams, which everything above is computed from.".to_owned());
    parts.push(facts::streams(&streams));
    parts.push(facts::stream_columns(&streams));
    parts.push(
        "A value of an open window may still change, and a closed one changes only when late events correct it. All \
         times are event times in UTC. Ask about any of these by its name and I look it up again."
            .to_owned(),
    );
    Ok(parts.join("\n\n"))
}

async fn say(run: &mut Run, text: &str) -> Result<Outcome, Failure> {
    run.focus("answering")?;
    run.begin_step("answering")?;
    run.say(&new_id("msg"), text).await?;
    run.end_step("answering")?;
    Ok(success())
}

/// An answer that needs no reading.
async fn tell(run: &mut Run, focus: &str, text: &str) -> Result<Outcome, Failure> {
    run.open_state(focus)?;
    say(run, text).await
}

fn acknowledged(answers: &[(String, String)]) -> String {
    let each = answers.iter().map(|(tool, answer)| match serde_json::from_str::<Value>(answer) {
        Ok(Value::Object(members)) if !members.is_empty() => {
            let members = members.iter().map(|(name, value)| match value {
                Value::String(text) => format!("{name} is {text}"),
                other => format!("{name} is {other}"),
            });
            format!("{tool} answered that {}.", members.collect::<Vec<_>>().join(" and "))
        }
        _ if answer.is_empty() => format!("{tool} answered without a word."),
        _ => format!("{tool} answered: {answer}"),
    });
    format!("Thank you. {}", each.collect::<Vec<_>>().join(" "))
}

/// Calls a tool of the client; a later run brings its answer.
fn ask_client(run: &mut Run, name: &str, question: &str) -> Result<Outcome, Failure> {
    run.open_state(name)?;
    let tool = run.request.tools.iter().find(|tool| tool["name"] == name);
    let arguments = tool.map_or_else(|| json!({}), |tool| intent::arguments(question, tool));
    let id = run.announce(&new_id("msg"), name, &arguments)?;
    Ok(Outcome::Success { pending: vec![id] })
}

struct Order {
    portfolio: Option<String>,
    symbol: Option<String>,
    change: f64,
    price: Option<f64>,
}

/// Proposes a change of a position and waits for a person's approval.
async fn ask_approval(run: &mut Run, order: Order, known: &Vocabulary) -> Result<Outcome, Failure> {
    let portfolio = order.portfolio.or_else(|| known.portfolios.first().map(|portfolio| portfolio.id.clone()));
    let summary = match &portfolio {
        Some(id) => {
            run.call(&new_id("msg"), "portfolio_summary", json!({"portfolio": id})).await?["portfolios"][0].take()
        }
        None => Value::Null,
    };
    run.end_step("reading")?;
    let positions = summary["positions"].as_array().map_or(&[][..], Vec::as_slice);
    let size = |position: &Value| position["value"].as_f64().unwrap_or(0.0).abs();
    let biggest = positions.iter().max_by(|a, b| size(a).total_cmp(&size(b)));
    let is_guess = order.symbol.is_none();
    let symbol = order.symbol.or_else(|| biggest.and_then(|position| position["symbol"].as_str().map(str::to_owned)));
    let (Some(portfolio), Some(symbol)) = (portfolio, symbol) else { return ask_details(run, order.change).await };
    let position = positions.iter().find(|position| position["symbol"] == symbol.as_str());
    let price = order.price.or_else(|| position.and_then(|position| position["price"].as_f64()));
    let mut arguments = json!({"portfolio": portfolio, "symbol": symbol, "change": order.change});
    let mut at = "the last traded price".to_owned();
    if let Some(price) = price {
        arguments["price"] = price.into();
        at = facts::number(price);
    }
    let verb = if order.change < 0.0 { "sale" } else { "purchase" };
    let units = facts::number(order.change.abs());
    let guess = if is_guess { " You named no symbol, so I propose the biggest position." } else { "" };
    let message = format!("Book a {verb} of {units} {symbol} at {at} into portfolio {portfolio}?");
    let explained =
        format!("{message}{guess} Nothing changes before you approve; I book it here, no broker is involved.");
    let id = new_id("msg");
    run.focus("waiting for approval")?;
    run.begin_step("answering")?;
    run.say(&id, &explained).await?;
    let call = run.announce(&id, tools::UPDATE_POSITION, &arguments)?;
    run.end_step("answering")?;
    Ok(Outcome::Interrupt(vec![approval(run, &message, call, tools::UPDATE_POSITION, arguments)]))
}

/// The question whether a call that changes something may be carried out.
pub(super) fn approval(run: &Run, message: &str, call: String, name: &str, arguments: Value) -> Interrupt {
    Interrupt {
        id: new_id("int"),
        reason: "tool_call".to_owned(),
        message: message.to_owned(),
        call: Some(PendingCall { id: call, name: name.to_owned(), arguments }),
        schema: json!({"type": "object", "properties": {"approved": {"type": "boolean"}}, "required": ["approved"]}),
        expires_at: run.system.now().plus(ASKS_FOR),
    }
}

/// Asks for what an order lacks.
async fn ask_details(run: &mut Run, change: f64) -> Result<Outcome, Failure> {
    let message =
        "Which symbol, in which portfolio? This workspace holds no position I could take as the one you mean.";
    say(run, message).await?;
    let interrupt = Interrupt {
        id: new_id("int"),
        reason: "input_required".to_owned(),
        message: message.to_owned(),
        call: None,
        schema: json!({
            "type": "object",
            "properties": {
                "approved": {"type": "boolean"}, "portfolio": {"type": "string"}, "symbol": {"type": "string"},
                "change": {"type": "number", "default": change}, "price": {"type": "number"},
            },
            "required": ["approved", "portfolio", "symbol"],
        }),
        expires_at: run.system.now().plus(ASKS_FOR),
    };
    Ok(Outcome::Interrupt(vec![interrupt]))
}

/// Does what was approved, and says what came of each question.
async fn settle(run: &mut Run) -> Result<Outcome, Failure> {
    run.open_state("settling")?;
    let mut texts = Vec::new();
    for Resolution { interrupt, approved, payload } in std::mem::take(&mut run.resolved) {
        let call = match interrupt.call {
            Some(call) if !approved => {
                run.answer(&call.id, json!({"rejected": true}).to_string())?;
                None
            }
            Some(call) => Some(call),
            None if !approved => None,
            None => {
                let mut arguments = payload;
                let default = &interrupt.schema["properties"]["change"]["default"];
                if let Value::Object(members) = &mut arguments {
                    members.remove("approved");
                    members.entry("change").or_insert_with(|| default.clone());
                }
                if arguments["portfolio"].is_string() && arguments["symbol"].is_string() {
                    let id = run.announce(&new_id("msg"), tools::UPDATE_POSITION, &arguments)?;
                    Some(PendingCall { id, name: tools::UPDATE_POSITION.to_owned(), arguments })
                } else {
                    texts.push("The answer names no portfolio and symbol, so I cannot book the order.".to_owned());
                    None
                }
            }
        };
        let Some(call) = call else {
            texts.push("Nothing was changed.".to_owned());
            continue;
        };
        texts.push(match run.execute(&call.id, &call.name, &call.arguments).await? {
            Ok(answer) => facts::booked(&answer),
            Err(fault) => format!("It could not be booked: {}. Nothing was changed.", fault.detail),
        });
    }
    say(run, &texts.join(" ")).await
}
