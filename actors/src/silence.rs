//! Silences: alerts that nobody is to be told of for a time.

use crate::tenant::Tenant;
use engine::event::Micros;
use serde_json::Value;
use sql::store::{Alert, Silence};

/// Whether a silence is in force at `at` and every one of its matchers fits the alert. Beside the alert's labels they
/// may name `rule`, `metric` and `severity`.
pub(crate) fn covers(silence: &Silence, alert: &Alert, at: Micros) -> bool {
    let fits = |(name, wanted): (&String, &Value)| match name.as_str() {
        "rule" => wanted == alert.rule.as_str(),
        "metric" => wanted == alert.metric.as_str(),
        "severity" => wanted == alert.severity.as_str(),
        label => text(&alert.labels[label]) == text(wanted),
    };
    let in_force = silence.starts_at <= at && at < silence.ends_at;
    in_force && silence.matchers.as_object().is_some_and(|matchers| !matchers.is_empty() && matchers.iter().all(fits))
}

/// A label's value as people write it; nothing for a label that is missing.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

impl Tenant {
    /// Whether nobody is told of this alert, of its firing or of its end: a silence was in force when it fired.
    pub(crate) fn is_silenced(&self, alert: &Alert) -> bool {
        self.silences.read().iter().any(|silence| covers(silence, alert, alert.fired_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn alert(labels: Value) -> Alert {
        Alert {
            id: "a".into(),
            workspace: "acme".parse().unwrap(),
            rule: "high".parse().unwrap(),
            metric: "vwap".parse().unwrap(),
            severity: "warning".into(),
            labels,
            state: "firing".into(),
            row: json!({}),
            started_at: Micros(5),
            fired_at: Micros(5),
            resolved_at: None,
            acked_at: None,
            acked_by: None,
        }
    }

    fn silence(matchers: Value) -> Silence {
        Silence {
            id: "s".into(),
            workspace: "acme".parse().unwrap(),
            matchers,
            starts_at: Micros(5),
            ends_at: Micros(10),
            comment: String::new(),
            created_by: "ann".into(),
        }
    }

    #[test]
    fn a_silence_covers_what_fits_all_its_matchers() {
        let aapl = alert(json!({"symbol": "AAPL", "level": 3}));
        for (matchers, covered) in [
            (json!({"symbol": "AAPL"}), true),
            (json!({"symbol": "AAPL", "rule": "high", "metric": "vwap", "severity": "warning"}), true),
            (json!({"level": "3"}), true),
            (json!({"symbol": "MSFT"}), false),
            (json!({"symbol": "AAPL", "rule": "low"}), false),
            (json!({"venue": "X"}), false),
            (json!({}), false),
        ] {
            assert_eq!(covers(&silence(matchers.clone()), &aapl, Micros(5)), covered, "{matchers}");
        }
    }

    #[test]
    fn a_silence_is_in_force_from_its_start_until_before_its_end() {
        let (silence, alert) = (silence(json!({"symbol": "A"})), alert(json!({"symbol": "A"})));
        let at = [4, 5, 9, 10].map(|at| covers(&silence, &alert, Micros(at)));
        assert_eq!(at, [false, true, true, false]);
    }
}
