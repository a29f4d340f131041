//! Metrics: their definitions and their rows.

use crate::AppState;
use crate::extract::{Json, Listing, Member, Path, Sent};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::rows::Row;
use actors::{MetricDefinition, MetricInfo, RowsPage, RowsQuery, Step, TableInfo, UnplannedMetric};
use arrow::datatypes::{DataType, Field};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, put};
use engine::event::{ItemName, Micros, StreamName};
use engine::limit::{StateLimits, StateSize};
use engine::window::Window;
use engine::workspace::Cause;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sql::plan::MetricSql;
use std::collections::BTreeMap;
use streams::span::{Text, format};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/metrics", get(list))
        .route("/api/v1/workspaces/{ws}/metrics/{metric}", put(define).delete(remove))
        .route("/api/v1/workspaces/{ws}/metrics/{metric}/rows", get(rows))
        .route("/api/v1/workspaces/{ws}/metrics/{metric}/plan", get(plan))
}

/// A column's type in the words of the contract; Arrow's own where it has none.
pub(super) fn type_name(kind: &DataType) -> String {
    match kind {
        kind if kind.is_integer() => "int64".to_owned(),
        kind if kind.is_floating() => "float64".to_owned(),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "utf8".to_owned(),
        DataType::Boolean => "bool".to_owned(),
        DataType::Timestamp(..) => "timestamp".to_owned(),
        DataType::Decimal128(precision, scale) => format!("decimal({precision},{scale})"),
        other => other.to_string().to_lowercase(),
    }
}

fn window(window: Window) -> Value {
    match window {
        Window::Tumble { size } => json!({"kind": "tumble", "size": format(size)}),
        Window::Hop { slide, size } => json!({"kind": "hop", "slide": format(slide), "size": format(size)}),
        Window::Cumulate { step, size } => json!({"kind": "cumulate", "step": format(step), "size": format(size)}),
        Window::Session { gap } => json!({"kind": "session", "gap": format(gap)}),
    }
}

fn shown(info: &MetricInfo) -> Value {
    let (program, definition) = (&info.program, &info.definition);
    let fields = program.output().fields();
    let (keys, values) = fields[2..].split_at(program.key_count());
    let keys: Vec<&str> = keys.iter().map(|key| key.name().as_str()).collect();
    let value = |field: &std::sync::Arc<Field>| json!({"name": field.name(), "type": type_name(field.data_type())});
    let mut shown = json!({
        "name": info.name, "sql": definition.sql, "stream": program.stream(), "keys": keys,
        "values": values.iter().map(value).collect::<Vec<Value>>(), "window": window(program.window()),
        "state": {"bytes": info.state_bytes, "keys": info.keys, "panes": info.panes},
    });
    let joins: Vec<&StreamName> = program.streams().skip(1).chain(program.tables()).collect();
    if !joins.is_empty() {
        shown["joins"] = json!(joins);
    }
    show_spans(&mut shown, definition);
    if let Some(stop) = &info.failure {
        shown["failure"] = stop.reason.as_str().into();
        shown["failure_code"] = stop.cause.code().into();
    }
    shown
}

/// A metric that stays stopped, as far as its SQL tells what it is.
fn unplanned(metric: &UnplannedMetric) -> Value {
    let definition = &metric.definition;
    let mut shown = json!({
        "name": metric.name, "sql": definition.sql, "keys": [], "values": [], "window": {}, "state": {"bytes": 0, "keys": 0, "panes": 0},
        "failure": metric.reason, "failure_code": Cause::MetricFailed.code(),
    });
    if let Ok(parsed) = MetricSql::parse(&definition.sql) {
        (shown["stream"], shown["window"]) = (json!(parsed.stream), window(parsed.window));
    }
    show_spans(&mut shown, definition);
    shown
}

fn show_spans(shown: &mut Value, definition: &MetricDefinition) {
    let spans = [
        ("emit", definition.emit),
        ("retain", definition.retain),
        ("max_delay", definition.max_delay),
        ("allowed_lateness", definition.allowed_lateness),
        ("backfill", definition.backfill),
    ];
    for (name, span) in spans {
        if let Some(span) = span {
            shown[name] = format(span).into();
        }
    }
}

/// How a metric runs: its panes, the state it holds and shares, and what its batches cost. Of the metrics that read it
/// those are named that the member sees.
fn planned(
    member: &Member,
    info: &MetricInfo,
    all: &[MetricInfo],
    tables: &[TableInfo],
    limits: &StateLimits,
) -> Value {
    let (program, window_of_it) = (&info.program, info.program.window());
    let panes = match window_of_it {
        _ if program.is_row_wise() => Value::Null,
        Window::Session { .. } => json!({"kind": "sessions", "held": info.panes}),
        cut => {
            let per_window = cut.size().0 / cut.pane().0;
            json!({"kind": "panes", "held": info.panes, "width": format(cut.pane()), "per_window": per_window, "windows_per_pane": cut.overlap()})
        }
    };
    let read_by = all.iter().filter(|other| {
        other.program.stream().metric().as_ref() == Some(&info.name)
            && member.sees(Permission::MetricRead, "metrics", &other.name)
    });
    let size = |table: &StreamName| {
        let bytes = tables.iter().find(|known| known.table.name() == table).map_or(0, |known| known.size.bytes);
        let readers = all.iter().filter(|other| other.program.tables().any(|read| read == table)).count();
        json!({"name": table, "bytes": bytes, "metrics": readers})
    };
    let bound = |size: StateSize| json!({"bytes": size.bytes, "groups": size.groups});
    let sum = |of: fn(&MetricInfo) -> usize| all.iter().map(of).sum::<usize>();
    json!({
        "metric": info.name,
        "reads": program.streams().collect::<Vec<_>>(),
        "read_by": read_by.map(|other| &other.name).collect::<Vec<_>>(),
        "window": window(window_of_it),
        "panes": panes,
        "state": {"bytes": info.state_bytes, "groups": info.keys, "waiting_events": info.waiting, "limit": bound(limits.metric)},
        "shared": {"tables": program.tables().map(size).collect::<Vec<Value>>()},
        "workspace": {"bytes": sum(|m| m.state_bytes), "groups": sum(|m| m.keys), "limit": bound(limits.workspace)},
        "cost": {"batches": info.cost.batches, "rows": info.cost.rows, "micros_per_batch": info.cost.micros_per_batch()},
    })
}

async fn plan(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
) -> Result<axum::Json<Value>, Problem> {
    let name: ItemName = name.parse()?;
    member.may_on(Permission::MetricRead, &format!("metrics/{name}"))?;
    let all = state.system.metrics(&member.workspace).await?;
    let Some(info) = all.iter().find(|info| info.name == name) else {
        return Err(Problem::not_found("unknown_metric", format!("there is no metric `{name}`")));
    };
    let tables = state.system.tables(&member.workspace).await?;
    Ok(axum::Json(planned(&member, info, &all, &tables, &state.system.limits().state())))
}

async fn list(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may_somewhere(Permission::MetricRead)?;
    let metrics = state.system.metrics(&member.workspace).await?;
    let metrics = metrics.iter().filter(|info| member.sees(Permission::MetricRead, "metrics", &info.name));
    let stopped = state.system.unplanned_metrics(&member.workspace).await?;
    let stopped = stopped.iter().filter(|metric| member.sees(Permission::MetricRead, "metrics", &metric.name));
    let metrics: Vec<Value> = metrics.map(shown).chain(stopped.map(unplanned)).collect();
    Ok(axum::Json(json!({"metrics": metrics})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Definition {
    sql: String,
    emit: Option<Text>,
    retain: Option<Text>,
    max_delay: Option<Text>,
    allowed_lateness: Option<Text>,
    backfill: Option<Text>,
}

async fn define(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
    body: Sent<Definition>,
) -> Result<axum::Json<Value>, Problem> {
    member.may_on(Permission::MetricDefine, &format!("metrics/{name}"))?;
    let Json(body) = body?;
    let name: ItemName = name.parse()?;
    // whoever defines a metric sees its rows: they must not show what is hidden otherwise
    member.may_read_tables(&body.sql)?;
    let _alone = state.system.defining(&member.workspace).await?;
    if let Some(most) = state.tier(&member.workspace).await?.metrics {
        let known = state.system.metrics(&member.workspace).await?;
        if known.len() >= most && !known.iter().any(|info| info.name == name) {
            return Err(Problem::conflict(
                "limit_reached",
                format!("this workspace has reached metrics = {most} of its tier"),
            ));
        }
    }
    let span = |text: Option<Text>| text.map(|text| text.0);
    let definition = MetricDefinition {
        sql: body.sql,
        emit: span(body.emit),
        retain: span(body.retain),
        max_delay: span(body.max_delay),
        allowed_lateness: span(body.allowed_lateness),
        backfill: span(body.backfill),
    };
    state.system.define_metric(&member.workspace, name.clone(), definition).await?;
    let metrics = state.system.metrics(&member.workspace).await?;
    let defined = metrics.iter().find(|info| info.name == name).map(shown);
    Ok(axum::Json(defined.unwrap_or(Value::Null)))
}

async fn remove(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may_on(Permission::MetricDefine, &format!("metrics/{name}"))?;
    state.system.remove_metric(&member.workspace, &name.parse()?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// An instant in a query string: RFC 3339.
pub(super) fn instant(name: &str, text: &str) -> Result<Micros, Problem> {
    // a `+` that was not escaped arrives as a space
    let found = chrono::DateTime::parse_from_rfc3339(&text.replace(' ', "+"));
    found.map(|at| Micros(at.timestamp_micros())).map_err(|error| {
        let text: String = text.chars().take(40).collect();
        Problem::invalid(
            "bad_parameter",
            format!("{name} `{text}` is no RFC 3339 time such as 2026-01-31T12:00:00Z: {error}"),
        )
    })
}

/// In front of a key column that is called as a parameter is.
const KEY: &str = "key.";

/// A page of rows as a query string asks for it; what is no parameter is a key column.
fn rows_query(mut page: Listing, now: Micros) -> Result<RowsQuery, Problem> {
    let only_final = match page.take("final").as_deref() {
        None => None,
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(_) => return Err(Problem::invalid("bad_parameter", "final must be true or false")),
    };
    let from = page.take("from").map(|text| instant("from", &text)).transpose()?;
    let to = page.take("to").map(|text| instant("to", &text)).transpose()?;
    let nulls = page.take("is_null");
    let nulls = nulls.iter().flat_map(|names| names.split(',')).map(|name| (name.to_owned(), None));
    let step = match page.take("resolution").as_deref() {
        None | Some("raw") => None,
        Some("1h") => Some(Step::Hour),
        Some("1d") => Some(Step::Day),
        // without a start the range is all there is
        Some("auto") => Step::of_range(from.unwrap_or(Micros::MIN), to.unwrap_or(now)),
        Some(_) => return Err(Problem::invalid("bad_parameter", "resolution must be raw, 1h, 1d or auto")),
    };
    let (limit, after) = (page.limit, page.take("after"));
    let mut keys: BTreeMap<String, Option<String>> = BTreeMap::new();
    for (name, value) in page.rest {
        let name = name.strip_prefix(KEY).map(str::to_owned).unwrap_or(name);
        if keys.insert(name.clone(), Some(value)).is_some() {
            return Err(Problem::invalid("bad_parameter", format!("the key column `{name}` is asked for twice")));
        }
    }
    Ok(RowsQuery { from, to, limit, after, only_final, keys: nulls.chain(keys).collect(), step })
}

async fn rows(
    State(state): State<AppState>,
    member: Member,
    Path((_, name)): Path<(String, String)>,
    page: Listing,
) -> Result<axum::Json<Page>, Problem> {
    member.may_on(Permission::MetricRead, &format!("metrics/{name}"))?;
    let query = rows_query(page, state.system.now())?;
    let RowsPage { rows, next } = state.system.metric_rows(&member.workspace, &name.parse()?, query).await?;
    Ok(axum::Json(Page { rows, next }))
}

#[derive(Serialize)]
struct Page {
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn query(parameters: &[(&str, &str)]) -> Result<RowsQuery, Problem> {
        let rest: HashMap<String, String> =
            parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        rows_query(Listing { limit: 7, rest }, Micros(1_767_225_600_000_000))
    }

    #[test]
    fn what_is_no_parameter_filters_by_a_key() {
        let wanted = query(&[("symbol", "AAPL"), ("final", "true"), ("from", "2026-01-01T00:00:00Z")]).unwrap();
        assert_eq!(wanted.keys, [("symbol".to_owned(), Some("AAPL".to_owned()))]);
        let named = query(&[("key.from", "EUR"), ("from", "2026-01-01T00:00:00Z")]).unwrap();
        assert_eq!((named.keys, named.from), (vec![("from".to_owned(), Some("EUR".to_owned()))], wanted.from));
        assert_eq!(query(&[("key.symbol", "A"), ("symbol", "B")]).unwrap_err().code, "bad_parameter");
        let nulls = query(&[("is_null", "side,venue")]).unwrap().keys;
        assert_eq!(nulls, [("side".to_owned(), None), ("venue".to_owned(), None)]);
        assert_eq!((wanted.only_final, wanted.limit), (Some(true), 7));
        assert_eq!(wanted.from, Some(Micros(1_767_225_600_000_000)));
    }

    #[test]
    fn the_resolution_is_as_asked_or_follows_from_the_range() {
        let step = |parameters: &[(&str, &str)]| query(parameters).unwrap().step;
        assert_eq!((step(&[]), step(&[("resolution", "1h")])), (None, Some(Step::Hour)));
        let auto = ("resolution", "auto");
        assert_eq!(step(&[auto, ("from", "2025-12-31T00:00:00Z")]), None); // up to now, which is a day later
        assert_eq!(step(&[auto, ("from", "2025-11-01T00:00:00Z")]), Some(Step::Hour));
        assert_eq!(step(&[auto]), Some(Step::Day));
        assert_eq!(query(&[("resolution", "1m")]).unwrap_err().code, "bad_parameter");
    }

    #[test]
    fn a_plus_that_was_not_escaped_is_still_an_offset() {
        assert_eq!(instant("to", "1970-01-01T01:00:00 01:00").unwrap(), Micros(0));
        assert_eq!(instant("to", "1970-01-01T00:00:00.000001Z").unwrap(), Micros(1));
        assert_eq!(query(&[("to", "yesterday")]).unwrap_err().code, "bad_parameter");
        assert_eq!(query(&[("final", "maybe")]).unwrap_err().code, "bad_parameter");
    }
}
