//! What agents can read and do in a workspace. Arguments and answers are JSON, as a model sees them.

use super::Failure;
use crate::fault::Fault;
use crate::rows::{json_lines, rfc3339};
use crate::system::{QueryRequest, RowsQuery, System};
use crate::workspace::MetricInfo;
use engine::event::{ItemName, Micros, Span, WorkspaceId};
use engine::window::Window;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sql::store::Position;
use std::time::Duration;

/// The tool that changes something, and so needs a person's approval.
pub(super) const UPDATE_POSITION: &str = "update_position";

/// How long a query of an agent may take.
const SQL_LIMIT: Duration = Duration::from_secs(10);
/// Rows of one answer; a model reads all of them.
const ROWS_MAX: usize = 500;
/// Rows read to find the newest of them.
const ROWS_READ_MAX: usize = 20_000;

/// A tool as it is shown to a model and in the capabilities.
pub(super) fn specs() -> Vec<Value> {
    let spec = |name: &str, description: &str, properties: Value, required: &[&str]| {
        let parameters = json!({"type": "object", "properties": properties, "required": required});
        json!({"name": name, "description": description, "parameters": parameters})
    };
    vec![
        spec("list_metrics", "The metrics of the workspace: keys, values, window and SQL.", json!({}), &[]),
        spec(
            "query_metric",
            "The newest rows of a metric, newest first. A row that is not final may still change.",
            json!({
                "metric": {"type": "string", "description": "name of the metric"},
                "key": {
                    "type": "object",
                    "description": "key columns and the value each must have",
                    "additionalProperties": {"type": "string"},
                },
                "limit": {"type": "integer", "minimum": 1, "maximum": ROWS_MAX},
            }),
            &["metric"],
        ),
        spec(
            "portfolio_summary",
            "Value, profit, positions and allocation of a portfolio at last prices; of every portfolio without a name.",
            json!({"portfolio": {"type": "string", "description": "id of the portfolio"}}),
            &[],
        ),
        spec(
            "list_alerts",
            "Alert rules, and the alerts that fire or fired last.",
            json!({"state": {"type": "string", "enum": ["firing", "resolved"]}}),
            &[],
        ),
        spec("list_streams", "The streams of the workspace, their columns and how many events came.", json!({}), &[]),
        spec(
            "run_sql",
            "Runs a read-only SQL query over streams and metrics; a stream is a table such as market.trades.",
            json!({"sql": {"type": "string"}}),
            &["sql"],
        ),
        spec(
            UPDATE_POSITION,
            "Books a purchase (positive change) or sale (negative change) into a portfolio. Needs approval.",
            json!({
                "portfolio": {"type": "string", "description": "id of the portfolio"},
                "symbol": {"type": "string"},
                "change": {"type": "number", "description": "units added, negative when sold"},
                "price": {"type": "number", "description": "price of a unit; the last trade's unless said"},
            }),
            &["portfolio", "symbol", "change"],
        ),
    ]
}

/// Carries out a call. Once begun, a change is completed, also when the caller is gone.
pub(super) async fn call(system: &System, ws: &WorkspaceId, name: &str, arguments: &Value) -> Result<Value, Fault> {
    match name {
        "list_metrics" => list_metrics(system, ws).await,
        "query_metric" => query_metric(system, ws, read(name, arguments)?).await,
        "portfolio_summary" => portfolio_summary(system, ws, read(name, arguments)?).await,
        "list_alerts" => list_alerts(system, ws, read(name, arguments)?).await,
        "list_streams" => list_streams(system, ws).await,
        "run_sql" => run_sql(system, ws, read(name, arguments)?).await,
        UPDATE_POSITION => {
            let (system, ws, order) = (system.clone(), ws.clone(), read(name, arguments)?);
            let work = tokio::spawn(async move { update_position(&system, &ws, order).await });
            work.await.map_err(Fault::internal)?
        }
        _ => Err(Fault::invalid("unknown_tool", format!("there is no tool `{name}`"))),
    }
}

fn read<T: for<'de> Deserialize<'de>>(tool: &str, arguments: &Value) -> Result<T, Fault> {
    T::deserialize(arguments).map_err(|e| Fault::invalid("bad_arguments", format!("arguments of `{tool}`: {e}")))
}

fn item(text: &str) -> Result<ItemName, Fault> {
    text.parse().map_err(|e: engine::event::NameError| Fault::invalid("bad_name", e.to_string()))
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Failure::new("tool_failed", format!("{} ({})", fault.detail, fault.code))
    }
}

async fn list_metrics(system: &System, ws: &WorkspaceId) -> Result<Value, Fault> {
    let metrics = system.metrics(ws).await?;
    Ok(json!({"metrics": metrics.iter().map(describe).collect::<Vec<_>>()}))
}

fn describe(metric: &MetricInfo) -> Value {
    let columns = metric.program.output().fields();
    let names: Vec<&str> = columns.iter().map(|field| field.name().as_str()).collect();
    let (keys, values) = names[2..].split_at(metric.program.key_count());
    let mut shown = json!({
        "name": metric.name.as_str(),
        "stream": metric.program.stream().as_str(),
        "keys": keys,
        "values": values,
        "window": window(metric.program.window()),
        "sql": metric.definition.sql,
    });
    if let Some(stop) = &metric.failure {
        shown["failure"] = stop.reason.as_str().into();
    }
    shown
}

/// A window in words: `1m`, `5m every 10s`.
fn window(window: Window) -> String {
    match window {
        Window::Tumble { size } => span(size),
        Window::Hop { slide, size } => format!("{} every {}", span(size), span(slide)),
        Window::Cumulate { step, size } => format!("{} growing by {}", span(size), span(step)),
        Window::Session { gap } => format!("sessions with gaps up to {}", span(gap)),
    }
}

fn span(span: Span) -> String {
    let micros = span.0;
    let units = [(86_400_000_000, "d"), (3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"), (1_000, "ms")];
    match units.iter().find(|(unit, _)| micros >= *unit && micros % unit == 0) {
        Some((unit, name)) => format!("{}{name}", micros / unit),
        None => format!("{micros}us"),
    }
}

#[derive(Deserialize)]
struct MetricArguments {
    metric: String,
    #[serde(default)]
    key: Map<String, Value>,
    limit: Option<usize>,
}

async fn query_metric(system: &System, ws: &WorkspaceId, wanted: MetricArguments) -> Result<Value, Fault> {
    let name = item(&wanted.metric)?;
    let metrics = system.metrics(ws).await?;
    let metric = metrics.iter().find(|metric| metric.name == name).ok_or_else(|| {
        Fault::not_found("unknown_metric", format!("there is no metric `{name}`; list_metrics names those there are"))
    })?;
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let keys: Vec<(String, String)> = wanted.key.iter().map(|(column, value)| (column.clone(), text(value))).collect();
    let limit = wanted.limit.unwrap_or(100).clamp(1, ROWS_MAX);
    let mut rows = newest_rows(system, ws, metric, &keys, metric.frontier).await?;
    rows.reverse();
    rows.truncate(limit);
    let mut answer = describe(metric);
    answer["rows"] = rows.into_iter().map(Value::Object).collect();
    Ok(answer)
}

/// Rows of the newest windows, oldest first. History is read forwards, so the look back widens until it finds some.
async fn newest_rows(
    system: &System,
    ws: &WorkspaceId,
    metric: &MetricInfo,
    keys: &[(String, String)],
    frontier: Option<Micros>,
) -> Result<Vec<Map<String, Value>>, Fault> {
    let Some(frontier) = frontier else { return Ok(Vec::new()) };
    let window = metric.program.window();
    let (slide, size) = (window.slide(), window.size());
    let back = |windows: i64| Some(frontier.minus(size).minus(Span(slide.0.saturating_mul(windows))));
    let wanted: Vec<_> = keys.iter().map(|(name, value)| (name.clone(), Some(value.clone()))).collect();
    for from in [back(40), back(2_000), None] {
        let mut rows = Vec::new();
        let mut after = None;
        loop {
            let page = RowsQuery { from, limit: 1_000, after, keys: wanted.clone(), ..RowsQuery::default() };
            let page = system.metric_rows(ws, &metric.name, page).await?;
            rows.extend(page.values());
            after = page.next;
            if after.is_none() || rows.len() >= ROWS_READ_MAX {
                break;
            }
        }
        if !rows.is_empty() {
            // history and memory may come one behind the other
            let start = |row: &Map<String, Value>| row.get("window_start").map(Value::to_string);
            rows.sort_by_key(start);
            return Ok(rows);
        }
    }
    Ok(Vec::new())
}

#[derive(Deserialize)]
struct PortfolioArguments {
    portfolio: Option<String>,
}

async fn portfolio_summary(system: &System, ws: &WorkspaceId, wanted: PortfolioArguments) -> Result<Value, Fault> {
    let ids = match wanted.portfolio {
        Some(id) => vec![id],
        None => system.portfolios(ws).await?.into_iter().map(|portfolio| portfolio.id).collect(),
    };
    let mut portfolios = Vec::new();
    for id in ids {
        let shown = system.portfolio_summary(ws, &item(&id)?).await?;
        let mut summary = serde_json::to_value(&shown.summary).map_err(Fault::internal)?;
        summary["id"] = id.into();
        summary["name"] = shown.name.as_str().into();
        summary["currency"] = shown.currency.as_str().into();
        summary["as_of"] = shown.summary.as_of.map(rfc3339).into();
        portfolios.push(summary);
    }
    Ok(json!({"portfolios": portfolios}))
}

#[derive(Deserialize)]
struct AlertArguments {
    state: Option<String>,
}

async fn list_alerts(system: &System, ws: &WorkspaceId, wanted: AlertArguments) -> Result<Value, Fault> {
    let (alerts, _) = system.store().alerts(ws, wanted.state.as_deref(), 100, None).await?;
    let alerts: Vec<Value> = alerts
        .into_iter()
        .map(|alert| {
            json!({
                "rule": alert.rule.as_str(), "metric": alert.metric.as_str(), "severity": alert.severity,
                "state": alert.state, "labels": alert.labels, "row": alert.row,
                "since": rfc3339(alert.started_at), "fired_at": rfc3339(alert.fired_at),
                "acked_by": alert.acked_by,
            })
        })
        .collect();
    let rules = system.alert_rules(ws).await?.into_iter().map(|(name, rule)| {
        let mut shown = json!({"name": name.as_str(), "metric": rule.metric.as_str(), "condition": rule.condition});
        if let Some(hold) = rule.hold {
            shown["for"] = span(hold).into();
        }
        shown
    });
    Ok(json!({"rules": rules.collect::<Vec<_>>(), "alerts": alerts}))
}

async fn list_streams(system: &System, ws: &WorkspaceId) -> Result<Value, Fault> {
    let rates = system.throughput().workspaces;
    let rate = rates.iter().find(|(id, _)| id == ws).map_or(0.0, |(_, rate)| *rate);
    let streams = system.streams(ws).await?.into_iter().map(|stream| {
        let columns: Vec<&str> = stream.schema.columns.iter().map(|column| column.name.as_str()).collect();
        json!({
            "name": stream.schema.stream.as_str(), "columns": columns, "events": stream.events,
            "late": stream.late, "newest": stream.frontier.map(rfc3339),
        })
    });
    Ok(json!({"streams": streams.collect::<Vec<_>>(), "events_per_second": rate}))
}

#[derive(Deserialize)]
struct SqlArguments {
    sql: String,
}

async fn run_sql(system: &System, ws: &WorkspaceId, wanted: SqlArguments) -> Result<Value, Fault> {
    let request = QueryRequest { sql: wanted.sql, params: Vec::new(), timeout: Some(SQL_LIMIT) };
    let answer = system.query(ws, request).await?;
    let columns: Vec<&str> = answer.schema.fields().iter().map(|field| field.name().as_str()).collect();
    let total: usize = answer.batches.iter().map(|batch| batch.num_rows()).sum();
    let mut rows: Vec<Value> = Vec::new();
    for batch in &answer.batches {
        let batch = batch.slice(0, batch.num_rows().min(ROWS_MAX - rows.len()));
        for line in json_lines(&batch).map_err(Fault::internal)? {
            rows.push(serde_json::from_str(&line).map_err(Fault::internal)?);
        }
    }
    Ok(json!({"columns": columns, "rows": rows, "row_count": total}))
}

#[derive(Deserialize)]
struct Order {
    portfolio: String,
    symbol: String,
    change: f64,
    price: Option<f64>,
}

async fn update_position(system: &System, ws: &WorkspaceId, order: Order) -> Result<Value, Fault> {
    let id = item(&order.portfolio)?;
    if !order.change.is_finite() || order.change == 0.0 {
        return Err(Fault::invalid("bad_arguments", format!("a change of {} units changes nothing", order.change)));
    }
    if order.symbol.is_empty() || order.symbol.len() > 64 {
        return Err(Fault::invalid("bad_arguments", "a symbol has 1 to 64 bytes"));
    }
    if let Some(price) = order.price.filter(|price| !price.is_finite() || *price < 0.0) {
        return Err(Fault::invalid("bad_arguments", format!("{price} is no price")));
    }
    if system.store().portfolio(ws, id.as_str()).await?.is_none() {
        return Err(Fault::not_found("unknown_portfolio", format!("there is no portfolio `{id}`")));
    }
    let held = system.store().positions(ws, id.as_str()).await?.into_iter().find(|p| p.symbol == order.symbol);
    let price = match order.price {
        Some(price) => price,
        None => last_price(system, ws, &order.symbol).await?.ok_or_else(|| {
            Fault::invalid("no_price", format!("`{}` has not traded yet; say at which price to book it", order.symbol))
        })?,
    };
    let next = booked(held.as_ref(), &order, price);
    if next.qty == 0.0 {
        system.remove_position(ws, &id, &order.symbol).await?;
    } else {
        system.put_positions(ws, &id, vec![next.clone()], false).await?;
    }
    Ok(json!({
        "portfolio": id.as_str(), "symbol": order.symbol, "change": order.change, "price": price,
        "qty_before": held.map_or(0.0, |held| held.qty), "qty": next.qty, "cost_price": next.cost,
    }))
}

/// The position after a purchase or sale of `order.change` units at `price`. The average cost moves when a position
/// grows, stays when it shrinks, and starts anew when it turns from long to short or back.
fn booked(held: Option<&Position>, order: &Order, price: f64) -> Position {
    let (qty, cost) = held.map_or((0.0, price), |held| (held.qty, held.cost));
    let next = qty + order.change;
    let cost = if qty * order.change >= 0.0 {
        if next == 0.0 { cost } else { (qty * cost + order.change * price) / next }
    } else if qty * next < 0.0 {
        price
    } else {
        cost
    };
    Position { symbol: order.symbol.clone(), qty: next, cost, sector: held.and_then(|held| held.sector.clone()) }
}

async fn last_price(system: &System, ws: &WorkspaceId, symbol: &str) -> Result<Option<f64>, Fault> {
    let answer = run_sql(system, ws, SqlArguments { sql: last_trade_sql(symbol) }).await?;
    Ok(answer["rows"][0]["price"].as_f64())
}

/// SQL for the last trade of a symbol.
pub(super) fn last_trade_sql(symbol: &str) -> String {
    let symbol = symbol.replace('\'', "''");
    format!("SELECT symbol, price, qty, ts FROM market.trades WHERE symbol = '{symbol}' ORDER BY ts DESC LIMIT 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(qty: f64, cost: f64, change: f64, price: f64) -> (f64, f64) {
        let held = (qty != 0.0).then(|| Position { symbol: "A".into(), qty, cost, sector: Some("tech".into()) });
        let order = Order { portfolio: "p".into(), symbol: "A".into(), change, price: Some(price) };
        let next = booked(held.as_ref(), &order, price);
        (next.qty, next.cost)
    }

    #[test]
    fn a_purchase_moves_the_average_cost_and_a_sale_leaves_it() {
        assert_eq!(check(0.0, 0.0, 10.0, 5.0), (10.0, 5.0));
        assert_eq!(check(10.0, 5.0, 10.0, 7.0), (20.0, 6.0));
        assert_eq!(check(20.0, 6.0, -5.0, 9.0), (15.0, 6.0));
        assert_eq!(check(-10.0, 5.0, -10.0, 7.0), (-20.0, 6.0));
    }

    #[test]
    fn a_position_that_turns_starts_at_the_price_it_turned_at() {
        assert_eq!(check(10.0, 5.0, -15.0, 8.0), (-5.0, 8.0));
        assert_eq!(check(10.0, 5.0, -10.0, 8.0).0, 0.0);
    }

    #[test]
    fn windows_read_in_the_shortest_exact_unit() {
        assert_eq!(span(Span::seconds(60)), "1m");
        assert_eq!(span(Span::seconds(90)), "90s");
        assert_eq!(span(Span(1)), "1us");
        assert_eq!(window(Window::Hop { slide: Span::seconds(10), size: Span::seconds(300) }), "5m every 10s");
    }

    #[test]
    fn a_quote_in_a_symbol_stays_in_its_string() {
        assert!(last_trade_sql("A' OR '1'='1").contains("'A'' OR ''1''=''1'"));
    }

    #[test]
    fn every_tool_has_a_schema_and_requires_only_what_it_has() {
        for spec in specs() {
            let parameters = &spec["parameters"];
            for required in parameters["required"].as_array().unwrap() {
                assert!(parameters["properties"].get(required.as_str().unwrap()).is_some(), "{spec}");
            }
        }
    }
}
