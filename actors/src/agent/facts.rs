//! What the tools answered, in sentences. Every number in them comes from an answer.

use super::intent::Aspect;
use serde_json::Value;
use std::cmp::Ordering;

/// Keys, positions or alerts that a short answer names.
const NAMED_MAX: usize = 5;

/// A number as a person writes it: thousands apart, no more digits than say something.
pub(super) fn number(n: f64) -> String {
    let digits = match n.abs() {
        a if a >= 100.0 => 2,
        a if a >= 0.01 => 4,
        _ => 8,
    };
    let text = format!("{:.digits$}", n.abs());
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut out = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    let fraction = fraction.trim_end_matches('0');
    if !fraction.is_empty() {
        out = format!("{out}.{fraction}");
    }
    if n < 0.0 && out != "0" { format!("-{out}") } else { out }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// An instant of an answer to the second.
fn instant(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    match text.get(..19) {
        Some(second) => format!("{} UTC", second.replace('T', " ")),
        None => "an unknown time".to_owned(),
    }
}

/// A JSON value as it stands in a sentence.
fn shown(value: &Value) -> String {
    match value {
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), number),
        Value::String(text) => text.clone(),
        Value::Null => "nothing".to_owned(),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn joined(items: &[String]) -> String {
    match items {
        [] => "none".to_owned(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

fn text<'a>(value: &'a Value, member: &str) -> &'a str {
    value[member].as_str().unwrap_or_default()
}

fn plural(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

pub(super) fn metrics(answer: &Value) -> String {
    let metrics = list(&answer["metrics"]);
    if metrics.is_empty() {
        return "This workspace has no metrics yet. A metric is a windowed SQL query over one of its streams."
            .to_owned();
    }
    let described: Vec<String> = metrics.iter().map(metric).collect();
    format!("This workspace has {}. {}", plural(metrics.len(), "metric"), described.join(" "))
}

fn metric(metric: &Value) -> String {
    let names = |member: &str| list(&metric[member]).iter().map(shown).collect::<Vec<_>>();
    let per = match names("keys") {
        keys if keys.is_empty() => String::new(),
        keys => format!(" per {}", joined(&keys)),
    };
    let failure = match metric["failure"].as_str() {
        Some(failure) => format!(" It has stopped: {failure}."),
        None => String::new(),
    };
    format!(
        "{} computes {}{per} over {} in windows of {}.{failure}",
        text(metric, "name"),
        joined(&names("values")),
        text(metric, "stream"),
        text(metric, "window"),
    )
}

/// Rows of one value, the newest first.
struct Series<'a> {
    label: String,
    rows: Vec<(&'a Value, f64)>,
}

/// The rows of an answer by key, in the order in which the keys come; rows without the value are left out.
fn series<'a>(answer: &'a Value, value: &str) -> Vec<Series<'a>> {
    let mut all: Vec<Series<'a>> = Vec::new();
    for row in list(&answer["rows"]) {
        let Some(n) = row[value].as_f64() else { continue };
        let label: Vec<String> = list(&answer["keys"]).iter().map(|key| shown(&row[shown(key).as_str()])).collect();
        let label = label.join(", ");
        match all.iter_mut().find(|series| series.label == label) {
            Some(series) => series.rows.push((row, n)),
            None => all.push(Series { label, rows: vec![(row, n)] }),
        }
    }
    all
}

/// The value column that a question is about: the one it names, else the first with numbers.
fn value_of(answer: &Value, named: Option<&str>) -> Option<String> {
    let has_numbers = |value: &&Value| list(&answer["rows"]).iter().any(|row| row[shown(value).as_str()].is_number());
    named.map(str::to_owned).or_else(|| list(&answer["values"]).iter().find(has_numbers).map(shown))
}

/// What the newest rows of a metric say. `mentions`: whether the question names a key.
pub(super) fn metric_answer(
    answer: &Value,
    named: Option<&str>,
    aspect: Aspect,
    mentions: impl Fn(&str) -> bool,
) -> String {
    let name = text(answer, "name");
    let Some(value) = value_of(answer, named) else {
        let stream = text(answer, "stream");
        return format!(
            "Metric {name} has no rows to show: it reads {stream}, and none of its windows holds what was asked for."
        );
    };
    let all = series(answer, &value);
    let mentioned = |series: &Series| series.label.split(", ").any(&mentions);
    let chosen: Vec<&Series> = match all.iter().filter(|series| mentioned(series)).collect::<Vec<_>>() {
        none if none.is_empty() => all.iter().collect(),
        some => some,
    };
    let Some(first) = chosen.first() else {
        return format!("Metric {name} has no numbers in {value} yet.");
    };
    match aspect {
        Aspect::Newest if chosen.len() == 1 => newest(name, &value, first),
        Aspect::Newest => {
            let named: Vec<String> =
                chosen.iter().take(NAMED_MAX).map(|s| format!("{} {}", s.label, number(s.rows[0].1))).collect();
            let more = chosen.len().saturating_sub(NAMED_MAX);
            let more = if more > 0 { format!(" {} more have rows too.", plural(more, "key")) } else { String::new() };
            let window = text(answer, "window");
            format!("The newest {value} of {name} (windows of {window}): {}.{more}", joined(&named))
        }
        Aspect::Highest | Aspect::Lowest => extreme(name, &value, aspect, &chosen),
        Aspect::Trend => {
            chosen.iter().take(NAMED_MAX).map(|series| trend(name, &value, series)).collect::<Vec<_>>().join(" ")
        }
        Aspect::Comparison => comparison(name, &value, &chosen),
    }
}

fn of_label(label: &str) -> String {
    if label.is_empty() { String::new() } else { format!(" of {label}") }
}

fn newest(name: &str, value: &str, series: &Series) -> String {
    let (row, n) = series.rows[0];
    let state = match row["final"].as_bool() {
        Some(true) => "The window is closed, so this is final",
        _ => "The window is still open, so this may change",
    };
    format!(
        "The newest {value}{} in {name} is {}, for the window from {} to {}. {state}.",
        of_label(&series.label),
        number(n),
        instant(&row["window_start"]),
        instant(&row["window_end"]),
    )
}

fn extreme(name: &str, value: &str, aspect: Aspect, chosen: &[&Series]) -> String {
    let (word, better) = match aspect {
        Aspect::Lowest => ("lowest", Ordering::Less),
        _ => ("highest", Ordering::Greater),
    };
    // one key: over its windows; several: over what is newest of each
    let (candidates, scope): (Vec<(&str, &Value, f64)>, String) = match chosen {
        [one] => {
            let rows = one.rows.iter().map(|(row, n)| (one.label.as_str(), *row, *n)).collect();
            (rows, format!("over its newest {}", plural(one.rows.len(), "window")))
        }
        many => {
            let rows = many.iter().map(|series| (series.label.as_str(), series.rows[0].0, series.rows[0].1)).collect();
            (rows, format!("among the newest values of {} keys", many.len()))
        }
    };
    let best =
        candidates.into_iter().reduce(|best, next| if next.2.total_cmp(&best.2) == better { next } else { best });
    let Some((label, row, n)) = best else { return format!("Metric {name} has no rows yet.") };
    format!(
        "The {word} {value} in {name} {scope} is {}{}, in the window from {} to {}.",
        number(n),
        of_label(label),
        instant(&row["window_start"]),
        instant(&row["window_end"]),
    )
}

fn trend(name: &str, value: &str, series: &Series) -> String {
    let ((last_row, last), (first_row, first)) = (series.rows[0], series.rows[series.rows.len() - 1]);
    let of = of_label(&series.label);
    if series.rows.len() < 2 {
        return format!(
            "There is only one window of {value}{of} in {name}, at {}, so there is no trend yet.",
            number(last)
        );
    }
    let verb = match last.total_cmp(&first) {
        Ordering::Greater => "rose",
        Ordering::Less => "fell",
        Ordering::Equal => "stayed",
    };
    let change =
        if first == 0.0 { String::new() } else { format!(", a change of {}", percent((last - first) / first.abs())) };
    format!(
        "The {value}{of} in {name} {verb} from {} at {} to {} at {}{change}, over {}.",
        number(first),
        instant(&first_row["window_start"]),
        number(last),
        instant(&last_row["window_start"]),
        plural(series.rows.len(), "window"),
    )
}

fn comparison(name: &str, value: &str, chosen: &[&Series]) -> String {
    let [a, b, ..] = chosen else { return chosen.iter().map(|series| newest(name, value, series)).collect() };
    let (first, second) = (a.rows[0].1, b.rows[0].1);
    let relation = match first.total_cmp(&second) {
        Ordering::Greater => "higher than",
        Ordering::Less => "lower than",
        Ordering::Equal => "equal to",
    };
    let by = if first == second { String::new() } else { format!(" by {}", number((first - second).abs())) };
    format!(
        "In {name} the newest {value} of {} is {} (window from {}), and of {} it is {} (window from {}). {} is {relation} {}{by}.",
        a.label,
        number(first),
        instant(&a.rows[0].0["window_start"]),
        b.label,
        number(second),
        instant(&b.rows[0].0["window_start"]),
        a.label,
        b.label,
    )
}

pub(super) fn portfolios(answer: &Value) -> String {
    match list(&answer["portfolios"]) {
        [] => "This workspace has no portfolios yet, so there is nothing to value.".to_owned(),
        all => all.iter().map(|one| portfolio(one, NAMED_MAX)).collect::<Vec<_>>().join("\n\n"),
    }
}

/// A portfolio's value, profit and greatest positions.
pub(super) fn portfolio(summary: &Value, named_max: usize) -> String {
    let (name, currency) = (text(summary, "name"), text(summary, "currency"));
    let amount = |member: &str| format!("{} {currency}", number(summary[member].as_f64().unwrap_or(0.0)));
    let mut positions: Vec<&Value> = list(&summary["positions"]).iter().collect();
    if positions.is_empty() {
        return format!("Portfolio {name} holds nothing.");
    }
    let size = |position: &Value| position["value"].as_f64().unwrap_or(0.0).abs();
    positions.sort_by(|a, b| size(b).total_cmp(&size(a)));
    let mut sentences = Vec::new();
    if summary["as_of"].is_string() {
        let gain = summary["unrealised"].as_f64().unwrap_or(0.0);
        let pct =
            summary["unrealised_pct"].as_f64().map(|pct| format!(" ({})", percent(pct / 100.0))).unwrap_or_default();
        sentences.push(format!(
            "Portfolio {name} is worth {} at prices of {}.",
            amount("value"),
            instant(&summary["as_of"]),
        ));
        let verb = if gain < 0.0 { "loss" } else { "profit" };
        sentences.push(format!(
            "Its unrealised {verb} is {} {currency}{pct}, against a cost of {}.",
            number(gain.abs()),
            amount("cost"),
        ));
    } else {
        sentences.push(format!("Portfolio {name} cannot be valued yet: none of its symbols has traded."));
    }
    for (at, position) in positions.iter().filter(|position| position["value"].is_number()).take(named_max).enumerate()
    {
        sentences.push(held(position, currency, at == 0));
    }
    let sectors: Vec<String> = summary["allocation"]["sector"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(sector, share)| format!("{sector} {}", percent(share.as_f64().unwrap_or(0.0))))
        .collect();
    if !sectors.is_empty() {
        sentences.push(format!("By sector it is allocated as {}.", joined(&sectors)));
    }
    let unpriced: Vec<String> = list(&summary["unpriced"]).iter().map(shown).collect();
    if !unpriced.is_empty() && summary["as_of"].is_string() {
        sentences.push(format!("Without a price so far: {}.", joined(&unpriced)));
    }
    sentences.join(" ")
}

fn held(position: &Value, currency: &str, is_biggest: bool) -> String {
    let n = |member: &str| number(position[member].as_f64().unwrap_or(0.0));
    let lead = if is_biggest { "The biggest position is " } else { "" };
    let weight = percent(position["weight"].as_f64().unwrap_or(0.0));
    format!(
        "{lead}{} with {weight}: {} units at {} {currency}, worth {} {currency}, unrealised {} {currency}.",
        text(position, "symbol"),
        n("qty"),
        n("price"),
        n("value"),
        n("unrealised"),
    )
}

pub(super) fn alerts(answer: &Value) -> String {
    let rules = list(&answer["rules"]);
    let is_firing = |alert: &&Value| alert["state"] == "firing";
    let (firing, resolved): (Vec<&Value>, Vec<&Value>) = list(&answer["alerts"]).iter().partition(is_firing);
    let mut sentences = Vec::new();
    match firing.len() {
        0 => sentences.push("No alert is firing now.".to_owned()),
        1 => sentences.push("1 alert is firing now.".to_owned()),
        n => sentences.push(format!("{n} alerts are firing now.")),
    }
    sentences.extend(firing.iter().take(NAMED_MAX).map(|alert| firing_alert(alert, rules)));
    if firing.len() > NAMED_MAX {
        sentences.push(format!("{} more are firing.", firing.len() - NAMED_MAX));
    }
    if let Some(last) = resolved.first() {
        let labels = labels(last);
        sentences.push(format!(
            "The last one resolved was {}{labels}, fired at {}.",
            text(last, "rule"),
            instant(&last["fired_at"])
        ));
    }
    let rules: Vec<String> = rules.iter().map(rule).collect();
    sentences.push(match rules.len() {
        0 => "No alert rules are defined.".to_owned(),
        n => format!(
            "{} watched: {}.",
            if n == 1 { "1 rule is".to_owned() } else { format!("{n} rules are") },
            joined(&rules)
        ),
    });
    sentences.join(" ")
}

fn rule(rule: &Value) -> String {
    let hold = rule["for"].as_str().map(|hold| format!(" for {hold}")).unwrap_or_default();
    format!("{} (when `{}`{hold} in {})", text(rule, "name"), text(rule, "condition"), text(rule, "metric"))
}

fn labels(alert: &Value) -> String {
    let labels: Vec<String> = alert["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| format!("{name} {}", shown(value)))
        .collect();
    if labels.is_empty() { String::new() } else { format!(" for {}", joined(&labels)) }
}

fn firing_alert(alert: &Value, rules: &[Value]) -> String {
    let name = text(alert, "rule");
    let why = match rules.iter().find(|rule| rule["name"] == alert["rule"]) {
        Some(rule) => format!(" because `{}` holds in {}", text(rule, "condition"), text(rule, "metric")),
        None => String::new(),
    };
    let facts: Vec<String> = alert["row"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, value)| value.is_number())
        .filter(|(column, _)| *column != "revision")
        .map(|(column, value)| format!("{column} {}", shown(value)))
        .collect();
    let facts = if facts.is_empty() { String::new() } else { format!(", with {}", joined(&facts)) };
    let acked = alert["acked_by"].as_str().map(|by| format!(" It was acknowledged by {by}.")).unwrap_or_default();
    let severity = text(alert, "severity");
    format!("{name} ({severity}){} fires since {}{why}{facts}.{acked}", labels(alert), instant(&alert["since"]))
}

pub(super) fn streams(answer: &Value) -> String {
    let streams = list(&answer["streams"]);
    let rate = number(answer["events_per_second"].as_f64().unwrap_or(0.0));
    let (busy, quiet): (Vec<&Value>, Vec<&Value>) = streams.iter().partition(|stream| stream["newest"].is_string());
    let mut sentences = vec![format!(
        "This workspace has {}, and {rate} events a second come in now.",
        plural(streams.len(), "stream"),
    )];
    sentences.extend(busy.iter().map(|one| stream(one)));
    let quiet: Vec<String> = quiet.iter().map(|stream| text(stream, "name").to_owned()).collect();
    if !quiet.is_empty() {
        sentences.push(format!("No events so far: {}.", joined(&quiet)));
    }
    sentences.join(" ")
}

fn stream(stream: &Value) -> String {
    let late = match stream["late"].as_u64() {
        Some(late) if late > 0 => format!(", and {late} were too late for a metric"),
        _ => String::new(),
    };
    let events = number(stream["events"].as_f64().unwrap_or(0.0));
    format!(
        "{} took in {events} events since the server started; its event time stands at {}{late}.",
        text(stream, "name"),
        instant(&stream["newest"]),
    )
}

/// The columns of each stream, for a reader with time.
pub(super) fn stream_columns(answer: &Value) -> String {
    let describe = |stream: &Value| {
        let columns: Vec<String> = list(&stream["columns"]).iter().map(shown).collect();
        format!("An event of {} has {}.", text(stream, "name"), joined(&columns))
    };
    list(&answer["streams"]).iter().map(describe).collect::<Vec<_>>().join(" ")
}

pub(super) fn rows(answer: &Value) -> String {
    let rows = list(&answer["rows"]);
    let total = answer["row_count"].as_u64().unwrap_or(0) as usize;
    let lines: Vec<String> = rows
        .iter()
        .take(20)
        .map(|row| {
            let cells =
                list(&answer["columns"]).iter().map(|c| format!("{} {}", shown(c), shown(&row[shown(c).as_str()])));
            format!("- {}", cells.collect::<Vec<_>>().join(", "))
        })
        .collect();
    match total {
        0 => "The query gave no rows.".to_owned(),
        n if n > lines.len() => {
            format!("The query gave {n} rows; the first {} are:\n{}", lines.len(), lines.join("\n"))
        }
        n => format!("The query gave {}:\n{}", plural(n, "row"), lines.join("\n")),
    }
}

pub(super) fn last_trade(symbol: &str, answer: &Value) -> String {
    let row = &answer["rows"][0];
    match row["price"].as_f64() {
        Some(price) => {
            let qty = row["qty"].as_f64().map(|qty| format!(" for {} units", number(qty))).unwrap_or_default();
            format!("{symbol} last traded at {}{qty}, at {}.", number(price), instant(&row["ts"]))
        }
        None => format!("I know no trade of {symbol} in this workspace."),
    }
}

pub(super) fn booked(answer: &Value) -> String {
    let n = |member: &str| number(answer[member].as_f64().unwrap_or(0.0));
    format!(
        "Booked into portfolio {}: {} units of {} at {}. It now holds {} instead of {}, at an average cost of {}.",
        text(answer, "portfolio"),
        n("change"),
        text(answer, "symbol"),
        n("price"),
        n("qty"),
        n("qty_before"),
        n("cost_price"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vwap() -> Value {
        let row = |symbol: &str, minute: u32, vwap: f64, is_final: bool| {
            json!({
                "window_start": format!("2026-05-04T10:{minute:02}:00.000000Z"),
                "window_end": format!("2026-05-04T10:{:02}:00.000000Z", minute + 1),
                "symbol": symbol, "vwap": vwap, "final": is_final, "revision": 0,
            })
        };
        json!({
            "name": "vwap_1m", "keys": ["symbol"], "values": ["vwap"], "window": "1m", "stream": "market.trades",
            "rows": [row("A", 2, 110.0, false), row("B", 2, 7.5, false), row("A", 1, 120.0, true), row("A", 0, 100.0, true)],
        })
    }

    fn ask(aspect: Aspect, key: &str) -> String {
        metric_answer(&vwap(), None, aspect, |label| label == key)
    }

    #[test]
    fn a_metric_is_answered_with_its_value_its_key_its_window_and_whether_it_may_change() {
        let expected = "The newest vwap of A in vwap_1m is 110, for the window from 2026-05-04 10:02:00 UTC to \
                        2026-05-04 10:03:00 UTC. The window is still open, so this may change.";
        assert_eq!(ask(Aspect::Newest, "A"), expected);
        assert_eq!(ask(Aspect::Newest, ""), "The newest vwap of vwap_1m (windows of 1m): A 110 and B 7.5.");
    }

    #[test]
    fn highest_and_lowest_look_over_windows_of_one_key_or_over_all_keys() {
        assert!(
            ask(Aspect::Highest, "A").starts_with("The highest vwap in vwap_1m over its newest 3 windows is 120 of A")
        );
        assert!(
            ask(Aspect::Lowest, "")
                .starts_with("The lowest vwap in vwap_1m among the newest values of 2 keys is 7.5 of B")
        );
    }

    #[test]
    fn a_trend_goes_from_the_oldest_window_to_the_newest() {
        let expected = "The vwap of A in vwap_1m rose from 100 at 2026-05-04 10:00:00 UTC to 110 at \
                        2026-05-04 10:02:00 UTC, a change of 10.0 %, over 3 windows.";
        assert_eq!(ask(Aspect::Trend, "A"), expected);
        assert!(ask(Aspect::Trend, "B").contains("no trend yet"));
        assert!(ask(Aspect::Comparison, "").ends_with("A is higher than B by 102.5."));
    }

    #[test]
    fn numbers_are_written_for_people() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (1234567.891, "1,234,567.89"),
            (-1000.0, "-1,000"),
            (0.000123, "0.000123"),
            (12.5, "12.5"),
        ];
        for (n, expected) in cases {
            assert_eq!(number(n), expected);
        }
    }

    #[test]
    fn a_firing_alert_says_why() {
        let answer = json!({
            "rules": [{"name": "dear", "metric": "vwap_1m", "condition": "vwap > 100", "for": "1m"}],
            "alerts": [{"rule": "dear", "severity": "warning", "state": "firing", "labels": {"symbol": "A"},
                        "row": {"vwap": 110.0, "revision": 0}, "since": "2026-05-04T10:02:00.000000Z"}],
        });
        let text = alerts(&answer);
        assert!(text.contains("dear (warning) for symbol A fires since 2026-05-04 10:02:00 UTC because `vwap > 100` holds in vwap_1m, with vwap 110."), "{text}");
    }

    #[test]
    fn an_empty_workspace_is_described_as_empty() {
        assert!(metrics(&json!({"metrics": []})).contains("no metrics"));
        assert!(portfolios(&json!({"portfolios": []})).contains("no portfolios"));
        assert!(alerts(&json!({"rules": [], "alerts": []})).contains("No alert is firing"));
    }
}
