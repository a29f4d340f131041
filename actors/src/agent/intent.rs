//! What a question asks for, found by its words and by the names the workspace has.

use serde_json::{Map, Value, json};

/// The names a question may use.
#[derive(Default)]
pub(super) struct Vocabulary {
    pub(super) metrics: Vec<MetricWords>,
    pub(super) portfolios: Vec<PortfolioWords>,
    /// What the portfolios hold.
    pub(super) symbols: Vec<String>,
    /// Tools that the client offers.
    pub(super) client_tools: Vec<String>,
}

pub(super) struct MetricWords {
    pub(super) name: String,
    pub(super) keys: Vec<String>,
    pub(super) values: Vec<String>,
}

pub(super) struct PortfolioWords {
    pub(super) id: String,
    pub(super) name: String,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Intent {
    /// Who are you?
    Greeting,
    /// What did I say about …?
    Recall,
    /// Which metrics are there?
    Metrics,
    Metric {
        name: String,
        value: Option<String>,
        symbols: Vec<String>,
        aspect: Aspect,
    },
    /// The last trade of a symbol.
    LastTrade {
        symbol: String,
    },
    /// One portfolio, or all.
    Portfolio {
        id: Option<String>,
    },
    Alerts,
    Streams,
    Sql(String),
    /// A long answer about all there is.
    Everything,
    /// A failure, to see one.
    Failure,
    /// A tool of the client, by name.
    ClientTool(String),
    Order {
        portfolio: Option<String>,
        symbol: Option<String>,
        change: f64,
        price: Option<f64>,
    },
    Unclear,
}

/// What is asked of a metric.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aspect {
    Newest,
    Highest,
    Lowest,
    Trend,
    Comparison,
}

/// Finds what `question` asks for.
pub(super) fn of(question: &str, known: &Vocabulary) -> Intent {
    let words = Words::of(question);
    if let Some(tool) = known.client_tools.iter().find(|tool| words.has(&plain(tool))) {
        return Intent::ClientTool(tool.clone());
    }
    if words.any(&["please fail", "fail this run", "fail the run", "fail now", "fail with"]) {
        return Intent::Failure;
    }
    if let Some(sql) = sql_in(question) {
        return Intent::Sql(sql);
    }
    if let Some(order) = order(question, &words, known) {
        return order;
    }
    if words.any(&["what was", "what is", "what s", "repeat", "remind", "recall", "remember", "did i"])
        && words.any(&["my", "i said", "i say", "i told", "i tell", "did i"])
        && !words.any(&["portfolio", "portfolios", "position", "positions", "alerts", "metrics", "profit"])
    {
        return Intent::Recall;
    }
    if words.any(&["long", "detailed", "thorough", "comprehensive", "complete", "full", "in depth", "everything"])
        && words.any(&["analysis", "report", "review", "overview", "summary", "everything", "walk"])
    {
        return Intent::Everything;
    }
    let symbols = symbols_in(question, known);
    let portfolio = known.portfolios.iter().find(|p| words.has(&plain(&p.id)) || words.has(&plain(&p.name)));
    let holdings = [
        "portfolio",
        "portfolios",
        "position",
        "positions",
        "holding",
        "holdings",
        "allocation",
        "allocated",
        "pnl",
        "p l",
        "profit",
        "unrealised",
        "unrealized",
        "biggest position",
    ];
    if words.any(&holdings) {
        return Intent::Portfolio { id: portfolio.map(|p| p.id.clone()) };
    }
    if words.any(&["alert", "alerts", "alarm", "alarms", "firing", "fires", "fired", "rule", "rules"]) {
        return Intent::Alerts;
    }
    if let Some(metric) = best_metric(&words, known) {
        let value = metric.values.iter().find(|value| words.has(&plain(value))).cloned();
        return Intent::Metric { name: metric.name.clone(), value, symbols, aspect: aspect(&words) };
    }
    let by_symbol = known.metrics.iter().find(|metric| metric.keys.iter().any(|key| key == "symbol"));
    if let (Some(metric), false, true) = (by_symbol, symbols.is_empty(), aspect(&words) != Aspect::Newest) {
        return Intent::Metric { name: metric.name.clone(), value: None, symbols, aspect: aspect(&words) };
    }
    if let Some(portfolio) = portfolio {
        return Intent::Portfolio { id: Some(portfolio.id.clone()) };
    }
    if let ([symbol], true) = (symbols.as_slice(), words.any(&["price", "trade", "traded", "quote", "worth", "cost"])) {
        return Intent::LastTrade { symbol: symbol.clone() };
    }
    if words.any(&["stream", "streams", "rate", "rates", "throughput", "events", "ingest"]) {
        return Intent::Streams;
    }
    if words.any(&["metric", "metrics", "measure", "measured"]) {
        return Intent::Metrics;
    }
    let greetings = ["hello", "hi", "hey", "introduce", "who are you", "what can you", "help", "good morning"];
    if words.any(&greetings) {
        return Intent::Greeting;
    }
    if let [symbol] = symbols.as_slice() {
        return Intent::LastTrade { symbol: symbol.clone() };
    }
    Intent::Unclear
}

/// Lowercase words with one space between, before and after.
struct Words(String);

impl Words {
    fn of(text: &str) -> Self {
        Words(format!(" {} ", plain(text)))
    }

    fn has(&self, phrase: &str) -> bool {
        !phrase.is_empty() && self.0.contains(&format!(" {phrase} "))
    }

    fn any(&self, phrases: &[&str]) -> bool {
        phrases.iter().any(|phrase| self.has(phrase))
    }
}

/// Lowercase letters and digits, all else as single spaces.
fn plain(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sql_in(question: &str) -> Option<String> {
    let lower = question.to_ascii_lowercase();
    let start = lower.find("select ").filter(|at| !lower[..*at].ends_with(char::is_alphanumeric))?;
    lower[start..].contains(" from ").then_some(())?;
    let sql = question[start..].split("```").next().unwrap_or_default().split(';').next().unwrap_or_default();
    Some(sql.trim().trim_matches('`').to_owned())
}

/// Symbols that a text names: those held, in any case, and words that look like one.
fn symbols_in(text: &str, known: &Vocabulary) -> Vec<String> {
    const NO_SYMBOLS: [&str; 22] = [
        "I", "A", "SQL", "UTC", "USD", "EUR", "GBP", "AI", "API", "OK", "PNL", "VWAP", "OHLC", "KPI", "MRR", "ARPU",
        "EMA", "SMA", "RSI", "CSV", "JSON", "ID",
    ];
    let mut found: Vec<String> = Vec::new();
    for word in
        text.split(|c: char| !(c.is_alphanumeric() || "-./".contains(c))).map(|w| w.trim_matches(['-', '.', '/']))
    {
        let held = known.symbols.iter().find(|symbol| symbol.eq_ignore_ascii_case(word));
        let looks_like_one = word.len() >= 2
            && word.starts_with(|c: char| c.is_ascii_uppercase())
            && !word.contains(|c: char| c.is_lowercase())
            && !NO_SYMBOLS.contains(&word);
        let symbol = held.cloned().or_else(|| looks_like_one.then(|| word.to_owned()));
        found.extend(symbol.filter(|symbol| !found.contains(symbol)));
    }
    found
}

fn best_metric<'a>(words: &Words, known: &'a Vocabulary) -> Option<&'a MetricWords> {
    let score = |metric: &MetricWords| {
        let name = plain(&metric.name);
        let whole = if words.has(&name) { 100 } else { 0 };
        let parts = name.split(' ').filter(|part| part.len() > 2 && words.has(part)).count();
        let values = metric.values.iter().filter(|value| words.has(&plain(value))).count();
        whole + 10 * parts + values
    };
    // of equal ones the first by name
    let best = known.metrics.iter().rev().max_by_key(|metric| score(metric))?;
    (score(best) > 0).then_some(best)
}

fn aspect(words: &Words) -> Aspect {
    if words.any(&["compare", "compared", "comparison", "versus", "vs", "difference", "between"]) {
        Aspect::Comparison
    } else if words.any(&[
        "trend",
        "trending",
        "rising",
        "falling",
        "moving",
        "change",
        "changed",
        "changing",
        "over time",
        "history",
    ]) {
        Aspect::Trend
    } else if words.any(&["highest", "max", "maximum", "top", "biggest", "largest", "greatest", "most", "best", "peak"])
    {
        Aspect::Highest
    } else if words.any(&["lowest", "min", "minimum", "smallest", "least", "worst"]) {
        Aspect::Lowest
    } else {
        Aspect::Newest
    }
}

fn order(question: &str, words: &Words, known: &Vocabulary) -> Option<Intent> {
    let buys = words.any(&["buy", "purchase", "place an order", "place order", "order for", "book"]);
    let sells = words.any(&["sell", "reduce"]);
    if !buys && !sells {
        return None;
    }
    let tokens: Vec<&str> = question.split_whitespace().collect();
    let number = |token: &str| {
        let digits: String = token.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect();
        let digits = digits.trim_end_matches('.');
        (token.starts_with(|c: char| c.is_ascii_digit() || "$€".contains(c)))
            .then(|| digits.parse::<f64>().ok())
            .flatten()
    };
    let is_price = |at: usize| {
        at > 0 && ["at", "@", "for"].contains(&tokens[at - 1]) && tokens[at].starts_with(['$', '€'])
            || at > 0 && ["at", "@"].contains(&tokens[at - 1])
    };
    let numbers: Vec<(usize, f64)> = tokens.iter().enumerate().filter_map(|(at, t)| Some((at, number(t)?))).collect();
    let qty = numbers.iter().find(|(at, _)| !is_price(*at)).map(|(_, n)| *n).filter(|n| *n > 0.0)?;
    let price = numbers.iter().find(|(at, _)| is_price(*at)).map(|(_, n)| *n);
    let portfolio = known.portfolios.iter().find(|p| words.has(&plain(&p.id)) || words.has(&plain(&p.name)));
    Some(Intent::Order {
        portfolio: portfolio.map(|p| p.id.clone()),
        symbol: symbols_in(question, known).into_iter().next(),
        change: if sells { -qty } else { qty },
        price,
    })
}

/// Arguments for a client's tool, taken from the text by the tool's JSON Schema. A required string that the text does
/// not name is the text itself.
pub(super) fn arguments(text: &str, tool: &Value) -> Value {
    let schema = &tool["parameters"];
    let none = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&none);
    let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|r| r == name));
    let strings = properties.values().filter(|property| property["type"] == "string").count();
    let mut found = Map::new();
    for (name, property) in properties {
        let named = after_name(text, name);
        let value = match property["type"].as_str().unwrap_or_default() {
            _ if property["enum"].is_array() => {
                let options = property["enum"].as_array().into_iter().flatten();
                let words = Words::of(text);
                let mut options = options.filter(|option| option.as_str().is_some_and(|o| words.has(&plain(o))));
                options.next().or_else(|| property["enum"].get(0).filter(|_| required(name))).cloned()
            }
            "string" => {
                let quoted = || (strings == 1).then(|| quoted(text)).flatten();
                let whole = || required(name).then(|| text.to_owned());
                named.or_else(quoted).or_else(whole).map(Value::String)
            }
            "number" | "integer" => {
                let parse =
                    |token: &str| token.trim_matches(|c: char| !c.is_ascii_digit() && c != '-').parse::<f64>().ok();
                let any = || text.split_whitespace().find_map(parse);
                let number = named.as_deref().and_then(parse).or_else(any).or(required(name).then_some(0.0));
                number.map(|n| if property["type"] == "integer" { json!(n as i64) } else { json!(n) })
            }
            "boolean" => {
                let is_no = named.as_deref().is_some_and(|word| ["false", "no", "off"].contains(&plain(word).as_str()));
                (named.is_some() || required(name)).then_some(json!(!is_no))
            }
            "array" => required(name).then(|| json!([])),
            "object" => required(name).then(|| json!({})),
            _ => named.map(Value::String).or_else(|| required(name).then(|| text.into())),
        };
        if let Some(value) = value {
            found.insert(name.clone(), value);
        }
    }
    Value::Object(found)
}

/// What follows a name in a text: the quoted text or the word.
fn after_name(text: &str, name: &str) -> Option<String> {
    let spaced = name.replace('_', " ").to_lowercase();
    // lowercase may change lengths: then positions do not fit and the name is not looked for
    let lower = Some(text.to_lowercase()).filter(|lower| lower.len() == text.len())?;
    let starts_word = |at: usize| !lower[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
    let ends_word = |at: usize| !lower[at..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let places = [name.to_lowercase(), spaced];
    let end = places.iter().find_map(|name| {
        let found = lower.match_indices(name.as_str()).find(|(at, _)| starts_word(*at) && ends_word(at + name.len()));
        found.map(|(at, _)| at + name.len())
    })?;
    let rest = text.get(end..)?.trim_start_matches(|c: char| c.is_whitespace() || ":=".contains(c));
    let rest = ["is ", "of ", "to ", "as "].iter().find_map(|word| rest.strip_prefix(word)).unwrap_or(rest);
    let word = || rest.split_whitespace().next().map(|word| word.trim_matches(['.', ',', '!', '?', ';']).to_owned());
    let starts_quoted = rest.starts_with(['"', '\'', '“', '`']);
    if starts_quoted { quoted(rest) } else { word() }.filter(|found| !found.is_empty())
}

/// The first quoted text.
fn quoted(text: &str) -> Option<String> {
    let (at, open) = text.char_indices().find(|(_, c)| ['"', '“', '`', '\''].contains(c))?;
    let close = if open == '“' { '”' } else { open };
    let rest = &text[at + open.len_utf8()..];
    Some(rest[..rest.find(close)?].to_owned())
}

/// The sentence among `earlier` ones that shares most with the question, as it was said; the newest of equal ones.
pub(super) fn recall(question: &str, earlier: &[String]) -> Option<String> {
    const COMMON: [&str; 34] = [
        "what", "was", "is", "my", "the", "a", "an", "please", "repeat", "it", "me", "i", "you", "of", "to", "did",
        "say", "said", "tell", "told", "about", "remind", "recall", "remember", "do", "s", "again", "and", "in", "can",
        "could", "that", "for", "your",
    ];
    let asked = plain(question);
    let asked: Vec<&str> = asked.split(' ').filter(|word| !COMMON.contains(word)).collect();
    let sentences = earlier.iter().flat_map(|text| text.split_inclusive(['.', '!', '?', '\n']));
    let mut best: Option<(usize, &str)> = None;
    for sentence in sentences {
        let words = Words::of(sentence);
        let shared = asked.iter().filter(|word| words.has(word)).count();
        if shared > 0 && best.is_none_or(|(most, _)| shared >= most) {
            best = Some((shared, sentence.trim()));
        }
    }
    best.map(|(_, sentence)| sentence.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vocabulary {
        let metric = |name: &str, keys: &[&str], values: &[&str]| MetricWords {
            name: name.into(),
            keys: keys.iter().map(|k| (*k).into()).collect(),
            values: values.iter().map(|v| (*v).into()).collect(),
        };
        Vocabulary {
            metrics: vec![
                metric("message_rate", &["thread"], &["messages"]),
                metric("vwap_1m", &["symbol"], &["vwap", "volume"]),
                metric("vwap_5m", &["symbol"], &["vwap"]),
            ],
            portfolios: vec![PortfolioWords { id: "growth-fund".into(), name: "Growth Fund".into() }],
            symbols: vec!["AAPL".into(), "btc-usd".into()],
            client_tools: vec!["conformance_confirm".into()],
        }
    }

    #[test]
    fn questions_are_understood_by_their_words_and_the_names_of_the_workspace() {
        let metric = |name: &str, value: Option<&str>, symbols: &[&str], aspect| Intent::Metric {
            name: name.into(),
            value: value.map(Into::into),
            symbols: symbols.iter().map(|s| (*s).into()).collect(),
            aspect,
        };
        let order = |symbol: Option<&str>, change, price| Intent::Order {
            portfolio: None,
            symbol: symbol.map(Into::into),
            change,
            price,
        };
        for (question, expected) in [
            ("Hello! Please introduce yourself in two or three sentences. My reference code is 1f.", Intent::Greeting),
            ("Show the portfolio summary and use your tools", Intent::Portfolio { id: None }),
            ("What is the allocation of the growth fund?", Intent::Portfolio { id: Some("growth-fund".into()) }),
            ("Write a long and very detailed analysis, at least forty sentences", Intent::Everything),
            ("Conformance test: please fail this run now with an error.", Intent::Failure),
            (
                "Please call the tool conformance_confirm with the action \"x\"",
                Intent::ClientTool("conformance_confirm".into()),
            ),
            ("Place an order for 10 shares, but ask me for approval first.", order(None, 10.0, None)),
            ("Sell 2.5 aapl at $190.50", order(Some("AAPL"), -2.5, Some(190.5))),
            ("What was my reference code? Please repeat it.", Intent::Recall),
            ("what's the highest vwap 5m of AAPL?", metric("vwap_5m", Some("vwap"), &["AAPL"], Aspect::Highest)),
            (
                "Compare the volume of AAPL and MSFT",
                metric("vwap_1m", Some("volume"), &["AAPL", "MSFT"], Aspect::Comparison),
            ),
            ("What's the trend of AAPL?", metric("vwap_1m", None, &["AAPL"], Aspect::Trend)),
            ("is the message rate rising?", metric("message_rate", None, &[], Aspect::Trend)),
            ("What is the price of MSFT?", Intent::LastTrade { symbol: "MSFT".into() }),
            ("Which alerts are firing and why?", Intent::Alerts),
            ("How many events per second come in?", Intent::Streams),
            ("Which metrics are there?", Intent::Metrics),
            (
                "run ```SELECT count(*) FROM market.trades;``` please",
                Intent::Sql("SELECT count(*) FROM market.trades".into()),
            ),
            ("And now?", Intent::Unclear),
        ] {
            assert_eq!(of(question, &known()), expected, "{question}");
        }
    }

    #[test]
    fn a_clients_tool_gets_arguments_by_its_schema() {
        let tool = |properties: Value, required: Value| json!({"parameters": {"properties": properties, "required": required}});
        let check = |text: &str, properties: Value, required: Value, expected: Value| {
            assert_eq!(arguments(text, &tool(properties, required)), expected, "{text}");
        };
        let action = json!({"action": {"type": "string"}});
        check(
            "call it with the action \"rebalance\" and wait",
            action.clone(),
            json!(["action"]),
            json!({"action": "rebalance"}),
        );
        check("call it with 'this'", action.clone(), json!(["action"]), json!({"action": "this"}));
        check("call it", action.clone(), json!(["action"]), json!({"action": "call it"}));
        check("call it", action, json!([]), json!({}));
        let chart =
            json!({"kind": {"enum": ["bar", "line"]}, "points": {"type": "integer"}, "log": {"type": "boolean"}});
        check(
            "draw a line with 20 points, log: no",
            chart,
            json!(["kind"]),
            json!({"kind": "line", "points": 20, "log": false}),
        );
        check("anything", Value::Null, Value::Null, json!({}));
    }

    #[test]
    fn what_was_said_is_quoted_and_what_was_not_is_not_invented() {
        let said = ["Hello! My reference code is 7f3a.".to_owned(), "Show the portfolio.".to_owned()];
        assert_eq!(recall("What was my reference code?", &said).unwrap(), "My reference code is 7f3a.");
        assert_eq!(recall("What is my shoe size?", &said), None);
    }
}
