//! Alert rules, firings, acknowledgement and silences.

use super::metrics::instant;
use crate::AppState;
use crate::encode;
use crate::extract::{Json, Listing, Member, Path, Seen, Sent};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::RuleDefinition;
use actors::rows::rfc3339;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use engine::alert::Trouble;
use engine::event::ItemName;
use serde::Deserialize;
use serde_json::{Value, json};
use sql::store::{Alert, Silence};
use std::collections::BTreeMap;
use streams::span::{Text, format};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/alert-rules", get(rules).post(create_rule))
        .route("/api/v1/workspaces/{ws}/backtest", post(backtest))
        .route("/api/v1/workspaces/{ws}/alert-rules/{rule}", put(put_rule).delete(remove_rule))
        .route("/api/v1/workspaces/{ws}/alerts", get(alerts))
        .route("/api/v1/workspaces/{ws}/alerts/{alert}/ack", post(ack))
        .route("/api/v1/workspaces/{ws}/silences", get(silences).post(create_silence))
        .route("/api/v1/workspaces/{ws}/silences/{silence}", delete(remove_silence))
}

/// The severity of a rule that names none.
const SEVERITY: &str = "warning";

fn rule_json(name: &ItemName, rule: &RuleDefinition) -> Value {
    json!({
        "name": name, "metric": rule.metric, "condition": rule.condition,
        "for": format(rule.hold.unwrap_or_default()), "severity": rule.severity.as_deref().unwrap_or(SEVERITY),
    })
}

async fn rules(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertRead)?;
    let rules = state.system.alert_rules(&member.workspace).await?;
    let trouble = state.system.rule_trouble(&member.workspace).await?;
    let shown = |(name, rule): &(ItemName, RuleDefinition)| {
        let mut shown = rule_json(name, rule);
        fail(&mut shown, trouble.get(name));
        shown
    };
    Ok(axum::Json(json!({"rules": rules.iter().map(shown).collect::<Vec<Value>>()})))
}

/// Says why, and how many rows, a rule could not look at.
fn fail(shown: &mut Value, trouble: Option<&Trouble>) {
    if let Some(trouble) = trouble {
        shown["failure"] = trouble.reason.as_str().into();
        shown["failed_rows"] = trouble.rows.into();
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// In the body of POST; in a PUT it may repeat the path.
    name: Option<String>,
    metric: String,
    condition: String,
    #[serde(rename = "for")]
    hold: Option<Text>,
    severity: Option<String>,
}

/// Any word, since what alerts are routed by is each installation's own.
fn is_severity(text: &str) -> bool {
    let word = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    word && text.len() <= 32 && text.starts_with(|first: char| first.is_ascii_lowercase())
}

impl Rule {
    fn definition(self) -> Result<RuleDefinition, Problem> {
        if let Some(severity) = self.severity.as_ref().filter(|text| !is_severity(text)) {
            let severity: String = severity.chars().take(40).collect();
            let detail = format!(
                "`severity` is a word such as info, warning or critical, [a-z][a-z0-9_]{{0,31}}; this is `{severity}`"
            );
            return Err(Problem::invalid("bad_body", detail));
        }
        Ok(RuleDefinition {
            metric: self.metric.parse()?,
            condition: self.condition,
            hold: self.hold.map(|text| text.0),
            severity: self.severity,
        })
    }
}

async fn create_rule(
    State(state): State<AppState>,
    member: Member,
    seen: Seen,
    rule: Sent<Rule>,
) -> Result<Response, Problem> {
    member.may(Permission::AlertDefine)?;
    let Json(mut rule) = rule?;
    let name = rule.name.take().ok_or_else(|| Problem::invalid("bad_body", "`name` is missing"))?;
    let name: ItemName = name.parse()?;
    if state.system.alert_rules(&member.workspace).await?.iter().any(|(known, _)| *known == name) {
        let detail = format!("there is an alert rule `{name}` already; change it with PUT …/alert-rules/{name}");
        return Err(Problem::conflict("exists", detail));
    }
    seen.note(format_args!("`{name}`"));
    let defined = define_rule(&state, &member, &seen, name, rule).await?;
    Ok((StatusCode::CREATED, axum::Json(defined)).into_response())
}

async fn put_rule(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
    seen: Seen,
    rule: Sent<Rule>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertDefine)?;
    let Json(rule) = rule?;
    if rule.name.as_ref().is_some_and(|other| *other != name) {
        return Err(Problem::invalid("bad_body", "`name` in the body is not the one in the path"));
    }
    Ok(axum::Json(define_rule(&state, &member, &seen, name.parse()?, rule).await?))
}

/// Defines a rule, and tells the audit log what it says.
async fn define_rule(
    state: &AppState,
    member: &Member,
    seen: &Seen,
    name: ItemName,
    rule: Rule,
) -> Result<Value, Problem> {
    let definition = rule.definition()?;
    let shown = rule_json(&name, &definition);
    let said = ["severity", "for", "condition"].map(|member| shown[member].as_str().unwrap_or_default());
    seen.note(format_args!("over {}: {}", definition.metric, said.join(" ")));
    let _alone = state.system.defining(&member.workspace).await?;
    state.system.define_alert_rule(&member.workspace, name, definition).await?;
    Ok(shown)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BacktestBody {
    rule: Rule,
    /// First event time.
    from: String,
    /// Event time before which it ends.
    to: String,
}

async fn backtest(
    State(state): State<AppState>,
    member: Member,
    body: Sent<BacktestBody>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertRead)?;
    let Json(body) = body?;
    let (from, to) = (instant("from", &body.from)?, instant("to", &body.to)?);
    if to <= from {
        return Err(Problem::invalid("bad_parameter", "`to` must be after `from`"));
    }
    let metric = body.rule.metric.clone();
    // what it would have told are rows of the metric
    member.may_on(Permission::MetricRead, &format!("metrics/{metric}"))?;
    let tested = state.system.backtest(&member.workspace, body.rule.definition()?, from..to).await?;
    let alerts = tested.episodes.iter().map(|episode| {
        json!({
            "labels": episode.labels, "severity": tested.severity, "started_at": rfc3339(episode.started_at),
            "fired_at": rfc3339(episode.fired_at), "resolved_at": episode.resolved_at.map(rfc3339), "row": episode.row,
        })
    });
    let alerts: Vec<Value> = alerts.collect();
    let (first, last) = tested.seen.unzip();
    let mut shown = json!({
        "metric": metric, "alerts": alerts, "events": tested.events,
        "first_event": first.map(rfc3339), "last_event": last.map(rfc3339),
    });
    fail(&mut shown, tested.trouble.as_ref());
    Ok(axum::Json(shown))
}

async fn remove_rule(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::AlertDefine)?;
    state.system.remove_alert_rule(&member.workspace, &name.parse()?).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn alerts(
    State(state): State<AppState>,
    member: Member,
    mut page: Listing,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertRead)?;
    let (limit, wanted, before) = (page.limit, page.take("state"), page.take("before"));
    page.done()?;
    if wanted.as_deref().is_some_and(|state| !matches!(state, "firing" | "resolved")) {
        return Err(Problem::invalid("bad_parameter", "state must be firing or resolved"));
    }
    let store = state.system.store();
    let (alerts, next) = store.alerts(&member.workspace, wanted.as_deref(), limit, before.as_deref()).await?;
    let shown = |alert: &Alert| encode::listed_alert(&state.system, alert);
    let mut answer = json!({"alerts": alerts.iter().map(shown).collect::<Vec<Value>>()});
    if let Some(next) = next {
        answer["next"] = next.into();
    }
    Ok(axum::Json(answer))
}

async fn ack(
    State(state): State<AppState>,
    member: Member,
    Path((_, alert)): Path<(String, String)>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertRespond)?;
    let acked = state.system.ack_alert(&member.workspace, &alert, &member.name).await?;
    Ok(axum::Json(encode::alert(&acked)))
}

fn silence_json(silence: &Silence) -> Value {
    json!({
        "id": silence.id, "matchers": silence.matchers, "starts_at": rfc3339(silence.starts_at),
        "ends_at": rfc3339(silence.ends_at), "comment": silence.comment, "created_by": silence.created_by,
    })
}

async fn silences(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::AlertRead)?;
    let silences = state.system.store().silences(&member.workspace).await?;
    Ok(axum::Json(json!({"silences": silences.iter().map(silence_json).collect::<Vec<Value>>()})))
}

/// The most silences a workspace has; those that ended long ago make room.
const SILENCES_MAX: usize = 1_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewSilence {
    /// Labels and the value each must have.
    matchers: BTreeMap<String, String>,
    starts_at: Option<String>,
    ends_at: Option<String>,
    /// In place of `ends_at`.
    duration: Option<Text>,
    #[serde(default)]
    comment: String,
}

async fn create_silence(
    State(state): State<AppState>,
    member: Member,
    new: Sent<NewSilence>,
) -> Result<Response, Problem> {
    member.may(Permission::AlertRespond)?;
    let Json(new) = new?;
    let starts_at = match &new.starts_at {
        Some(text) => instant("starts_at", text)?,
        None => state.system.now(),
    };
    let ends_at = match (&new.ends_at, new.duration) {
        (Some(text), None) => instant("ends_at", text)?,
        (None, Some(duration)) => starts_at.plus(duration.0),
        _ => return Err(Problem::invalid("bad_body", "say when the silence ends: either `ends_at` or `duration`")),
    };
    if ends_at <= starts_at {
        return Err(Problem::invalid("bad_body", "a silence must end after it starts"));
    }
    if new.matchers.is_empty() || new.matchers.len() > 20 || new.comment.chars().count() > 1_000 {
        let detail =
            "`matchers` needs 1 to 20 labels such as {\"symbol\":\"AAPL\"}; `comment` has up to 1000 characters";
        return Err(Problem::invalid("bad_body", detail));
    }
    let store = state.system.store();
    if store.silences(&member.workspace).await?.len() >= SILENCES_MAX {
        let detail = format!("this workspace has {SILENCES_MAX} silences, the most there can be; delete old ones");
        return Err(Problem::conflict("limit_reached", detail));
    }
    let silence = Silence {
        id: uuid::Uuid::now_v7().to_string(),
        workspace: member.workspace,
        matchers: json!(new.matchers),
        starts_at,
        ends_at,
        comment: new.comment,
        created_by: member.name,
    };
    state.system.put_silence(silence.clone()).await?;
    Ok((StatusCode::CREATED, axum::Json(silence_json(&silence))).into_response())
}

async fn remove_silence(
    State(state): State<AppState>,
    member: Member,
    Path((_, silence)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::AlertRespond)?;
    state.system.remove_silence(&member.workspace, &silence).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_severity_is_one_short_word() {
        let rule = |severity: &str| {
            let rule = json!({"metric": "vwap_1m", "condition": "vwap > 1", "severity": severity});
            serde_json::from_value::<Rule>(rule).unwrap().definition()
        };
        for good in ["info", "warning", "critical", "sev_1", &"x".repeat(32)] {
            assert_eq!(rule(good).unwrap().severity.as_deref(), Some(good));
        }
        for bad in ["", "Critical", "very bad", "1st", &"x".repeat(33), &"x".repeat(500)] {
            assert_eq!(rule(bad).unwrap_err().code, "bad_body", "{bad}");
        }
    }
}
