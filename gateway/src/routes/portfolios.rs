//! Portfolios, their positions, and their value at last prices.

use crate::AppState;
use crate::encode;
use crate::extract::{AnyJson, Json, Member, Path, Sent};
use crate::permission::Permission;
use crate::problem::{Item, Problem};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use engine::event::ItemName;
use serde::Deserialize;
use serde_json::{Value, json};
use sql::store::{Portfolio, Position};
use std::collections::HashSet;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/portfolios", get(list).post(create))
        .route("/api/v1/workspaces/{ws}/portfolios/{pf}", delete(remove))
        .route("/api/v1/workspaces/{ws}/portfolios/{pf}/positions", get(positions).put(replace).post(upsert))
        .route("/api/v1/workspaces/{ws}/portfolios/{pf}/positions/{symbol}", delete(remove_position))
        .route("/api/v1/workspaces/{ws}/portfolios/{pf}/summary", get(summary))
}

fn shown(portfolio: &Portfolio) -> Value {
    json!({"id": portfolio.id, "name": portfolio.name, "currency": portfolio.currency})
}

async fn list(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    let see = [Permission::PortfolioRead, Permission::FundPerformanceRead];
    let seen = |id: &str| see.iter().any(|permission| member.sees(*permission, "portfolio", id));
    member.may_somewhere(see[0]).or_else(|problem| member.may_somewhere(see[1]).map_err(|_| problem))?;
    let portfolios = state.system.portfolios(&member.workspace).await?;
    let portfolios = portfolios.iter().filter(|portfolio| seen(&portfolio.id));
    Ok(axum::Json(json!({"portfolios": portfolios.map(shown).collect::<Vec<Value>>()})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct New {
    id: String,
    name: Option<String>,
    currency: Option<String>,
}

/// The most portfolios of a workspace, and the most positions of a portfolio.
const PORTFOLIOS_MAX: usize = 1_000;
const POSITIONS_MAX: usize = 10_000;
/// Units of a position and price of one: what they come to can then be added up and multiplied with prices.
const AMOUNT_MAX: f64 = 1e18;

async fn create(State(state): State<AppState>, member: Member, new: Sent<New>) -> Result<Response, Problem> {
    member.may(Permission::PortfolioUpdate)?;
    let Json(new) = new?;
    let id: ItemName = new.id.parse()?;
    let currency = new.currency.unwrap_or_else(|| "USD".to_owned());
    if !(3..=8).contains(&currency.len()) || !currency.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()) {
        return Err(Problem::invalid("bad_body", "`currency` must be a code such as USD, EUR or BTC"));
    }
    let name = new.name.unwrap_or_else(|| id.to_string());
    if name.trim().is_empty() || name.chars().count() > 200 {
        return Err(Problem::invalid("bad_body", "`name` must be 1 to 200 characters"));
    }
    let store = state.system.store();
    let _turn = state.system.defining(&member.workspace).await?;
    let known = store.portfolios(&member.workspace).await?;
    if known.iter().any(|other| other.id == id.as_str()) {
        return Err(Problem::conflict("exists", format!("there is a portfolio `{id}` already")));
    }
    if known.len() >= PORTFOLIOS_MAX {
        let detail = format!("this workspace has {PORTFOLIOS_MAX} portfolios, the most there can be; delete one first");
        return Err(Problem::conflict("limit_reached", detail));
    }
    let created_at = state.system.now();
    let portfolio = Portfolio { workspace: member.workspace.clone(), id: id.to_string(), name, currency, created_at };
    let answer = shown(&portfolio);
    state.system.put_portfolio(&member.workspace, portfolio).await?;
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

async fn remove(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::PortfolioUpdate)?;
    state.system.remove_portfolio(&member.workspace, &id.parse()?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A position in a request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    symbol: String,
    qty: f64,
    cost: f64,
    sector: Option<String>,
}

/// Positions as clients send them: `{"positions":[…]}`, an array, or one object.
#[derive(Deserialize)]
#[serde(untagged, expecting = "send {\"positions\":[{symbol, qty, cost, sector?}]}, such an array, or one position")]
enum Positions {
    Named(Named),
    Many(Vec<Held>),
    One(Held),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    positions: Vec<Held>,
}

impl Positions {
    fn checked(self) -> Result<Vec<Position>, Problem> {
        let held = match self {
            Positions::Named(Named { positions }) | Positions::Many(positions) => positions,
            Positions::One(position) => vec![position],
        };
        if held.len() > POSITIONS_MAX {
            let detail = format!("{} positions are more than the {POSITIONS_MAX} a portfolio can have", held.len());
            return Err(Problem::invalid("limit_reached", detail));
        }
        let mut seen = HashSet::new();
        let wrong = |(index, position): (usize, &Held)| {
            let name = |text: &str, most| !text.is_empty() && text.len() <= most && !text.contains(char::is_control);
            let detail = if !name(&position.symbol, 64) {
                "`symbol` must be 1 to 64 bytes without control characters"
            } else if position.sector.as_ref().is_some_and(|sector| !name(sector, 100)) {
                "`sector` must be 1 to 100 bytes without control characters"
            } else if !(position.qty.abs() <= AMOUNT_MAX && (0.0..=AMOUNT_MAX).contains(&position.cost)) {
                "`qty` must be a number of at most 1e18 units, `cost` one that is not negative nor above 1e18"
            } else if !seen.insert(position.symbol.clone()) {
                "`symbol` stands twice in this request; send one position for each symbol"
            } else {
                return None;
            };
            Some(Item { pointer: format!("/positions/{index}"), code: "bad_position", detail: detail.to_owned() })
        };
        let errors: Vec<Item> = held.iter().enumerate().filter_map(wrong).take(100).collect();
        if !errors.is_empty() {
            return Err(Problem::invalid("bad_position", errors[0].detail.clone()).errors(errors));
        }
        let position = |Held { symbol, qty, cost, sector }| Position { symbol, qty, cost, sector };
        Ok(held.into_iter().map(position).collect())
    }
}

async fn positions(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
) -> Result<axum::Json<Value>, Problem> {
    member.may_on(Permission::PortfolioRead, &format!("portfolio/{id}"))?;
    let positions = state.system.positions(&member.workspace, &id.parse()?).await?;
    let position =
        |held: &Position| json!({"symbol": held.symbol, "qty": held.qty, "cost": held.cost, "sector": held.sector});
    Ok(axum::Json(json!({"positions": positions.iter().map(position).collect::<Vec<Value>>()})))
}

async fn replace(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
    body: Result<AnyJson<Positions>, Problem>,
) -> Result<axum::Json<Value>, Problem> {
    hold(&state, &member, &id, body, true).await
}

async fn upsert(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
    body: Result<AnyJson<Positions>, Problem>,
) -> Result<axum::Json<Value>, Problem> {
    hold(&state, &member, &id, body, false).await
}

async fn hold(
    state: &AppState,
    member: &Member,
    id: &str,
    body: Result<AnyJson<Positions>, Problem>,
    replace: bool,
) -> Result<axum::Json<Value>, Problem> {
    member.may_on(Permission::PortfolioUpdate, &format!("portfolio/{id}"))?;
    let AnyJson(body) = body?;
    let (id, positions): (ItemName, _) = (id.parse()?, body.checked()?);
    let count = positions.len();
    if !replace {
        let known = state.system.store().positions(&member.workspace, id.as_str()).await?;
        let new = positions.iter().filter(|new| !known.iter().any(|old| old.symbol == new.symbol)).count();
        if known.len() + new > POSITIONS_MAX {
            let detail =
                format!("this portfolio would have more than {POSITIONS_MAX} positions, the most there can be");
            return Err(Problem::conflict("limit_reached", detail));
        }
    }
    state.system.put_positions(&member.workspace, &id, positions, replace).await?;
    Ok(axum::Json(json!({"positions": count})))
}

async fn remove_position(
    State(state): State<AppState>,
    member: Member,
    Path((_, id, symbol)): Path<(String, String, String)>,
) -> Result<StatusCode, Problem> {
    member.may_on(Permission::PortfolioUpdate, &format!("portfolio/{id}"))?;
    state.system.remove_position(&member.workspace, &id.parse()?, &symbol).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn summary(
    State(state): State<AppState>,
    member: Member,
    Path((_, id)): Path<(String, String)>,
) -> Result<axum::Json<Value>, Problem> {
    member.may_see_value(&id)?;
    let summary = state.system.portfolio_summary(&member.workspace, &id.parse()?).await?;
    // cut here: what is kept is the same for all
    Ok(axum::Json(match member.sees(Permission::PortfolioRead, "portfolio", &id) {
        true => encode::portfolio(&summary),
        false => encode::portfolio_value(&summary),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<usize, &'static str> {
        let body: Positions = serde_json::from_value(json).map_err(|_| "unreadable")?;
        body.checked().map(|positions| positions.len()).map_err(|problem| problem.code)
    }

    #[test]
    fn positions_come_named_bare_or_alone() {
        let one = json!({"symbol": "AAPL", "qty": 1, "cost": 2.5});
        assert_eq!(read(json!({"positions": [one]})), Ok(1));
        assert_eq!(read(json!([one, {"symbol": "MSFT", "qty": 1, "cost": 2.5}])), Ok(2));
        assert_eq!(read(one), Ok(1));
        assert_eq!(read(json!({"positions": []})), Ok(0));
    }

    #[test]
    fn what_is_no_position_is_refused() {
        assert_eq!(read(json!({"symbol": "", "qty": 1, "cost": 1})), Err("bad_position"));
        assert_eq!(read(json!({"symbol": "A", "qty": 1, "cost": -1})), Err("bad_position"));
        assert_eq!(read(json!({"symbol": "A", "qty": 1e300, "cost": 1e300})), Err("bad_position"));
        assert_eq!(read(json!({"symbol": "A", "qty": -1e19, "cost": 1})), Err("bad_position"));
        let one = json!({"symbol": "A", "qty": 1, "cost": 1});
        assert_eq!(read(json!([one, one])), Err("bad_position"), "a symbol twice");
        assert_eq!(read(json!({"symbol": "A", "qty": "1", "cost": 1})), Err("unreadable"));
        assert_eq!(read(json!({"symbol": "A", "qty": 1, "cost": 1, "price": 3})), Err("unreadable"));
    }
}
