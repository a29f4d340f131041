//! Reference tables: their columns, and changes of their rows.

use super::metrics::instant;
use crate::AppState;
use crate::extract::{Json, Listing, Member, Path, Query, Sent};
use crate::ingest::take_rows;
use crate::permission::Permission;
use crate::problem::Problem;
use ::streams::decode::TsUnit;
use ::streams::schema::Column;
use ::streams::table::{Table, table_name};
use actors::TableInfo;
use actors::rows::json_lines;
use arrow::array::RecordBatch;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::get;
use serde::Deserialize;
use serde_json::{Value, json};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/tables", get(list))
        .route("/api/v1/workspaces/{ws}/tables/{table}", get(show).put(define).delete(remove))
        .route(
            "/api/v1/workspaces/{ws}/tables/{table}/rows",
            // bounded while it is read, by `limits.body_bytes`
            get(rows).post(change).layer(DefaultBodyLimit::disable()),
        )
}

fn shown(info: &TableInfo) -> Value {
    let table = &info.table;
    json!({
        "name": table.name().parts().1, "columns": table.columns, "primary_key": table.primary_key,
        "rows": info.size.keys, "versions": info.size.versions, "bytes": info.size.bytes,
    })
}

async fn list(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may_somewhere(Permission::StreamRead)?;
    let tables = state.system.tables(&member.workspace).await?;
    let seen = |info: &&TableInfo| member.may_read_table(info.table.name()).is_ok();
    Ok(axum::Json(json!({"tables": tables.iter().filter(seen).map(shown).collect::<Vec<Value>>()})))
}

async fn one(state: &AppState, member: &Member, table: &str) -> Result<axum::Json<Value>, Problem> {
    let name = table_name(table)?;
    state.system.table_definition(&member.workspace, &name)?;
    let tables = state.system.tables(&member.workspace).await?;
    let found = tables.iter().find(|info| *info.table.name() == name).map(shown);
    Ok(axum::Json(found.unwrap_or(Value::Null)))
}

async fn show(
    State(state): State<AppState>,
    member: Member,
    Path((_, table)): Path<(String, String)>,
) -> Result<axum::Json<Value>, Problem> {
    member.may_read_table(&table_name(&table)?)?;
    one(&state, &member, &table).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Definition {
    columns: Vec<Column>,
    primary_key: Vec<String>,
}

async fn define(
    State(state): State<AppState>,
    member: Member,
    Path((_, table)): Path<(String, String)>,
    body: Sent<Definition>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::StreamDefine)?;
    let Json(body) = body?;
    // a primary key is never NULL: nobody needs to say so
    let key = |column: &Column| body.primary_key.contains(&column.name);
    let columns =
        body.columns.iter().map(|column| Column { nullable: column.nullable && !key(column), ..column.clone() });
    let defined = Table::new(table_name(&table)?, columns.collect(), body.primary_key.clone())?;
    let _alone = state.system.defining(&member.workspace).await?;
    state.system.define_table(&member.workspace, defined).await?;
    one(&state, &member, &table).await
}

async fn remove(
    State(state): State<AppState>,
    member: Member,
    Path((_, table)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    member.may(Permission::StreamDefine)?;
    state.system.remove_table(&member.workspace, &table_name(&table)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    ts_unit: Option<String>,
}

async fn change(
    State(state): State<AppState>,
    member: Member,
    Path((_, table)): Path<(String, String)>,
    Query(parameters): Query<Parameters>,
    headers: HeaderMap,
    body: Body,
) -> Result<axum::Json<Value>, Problem> {
    member.may_on(Permission::StreamIngest, &format!("tables/{table}"))?;
    let unit = parameters.ts_unit.map_or(Ok(TsUnit::default()), |unit| unit.parse());
    let unit = unit.map_err(|error: String| Problem::invalid("bad_parameter", error))?;
    let table = state.system.table_definition(&member.workspace, &table_name(&table)?)?;
    Ok(axum::Json(take_rows(&state, &member, &table, unit, &headers, body).await?))
}

async fn rows(
    State(state): State<AppState>,
    member: Member,
    Path((_, table)): Path<(String, String)>,
    mut page: Listing,
) -> Result<axum::Json<Value>, Problem> {
    let table = table_name(&table)?;
    member.may_read_table(&table)?;
    let at = page.take("at").map(|text| instant("at", &text)).transpose()?;
    let after = page.take("after").map(|text| text.parse::<usize>()).transpose();
    let after = after.map_err(|_| Problem::invalid("bad_cursor", "`after` is the `next` of an earlier page"))?;
    let (limit, from) = (page.limit, after.unwrap_or(0));
    page.done()?;
    let at = at.unwrap_or_else(|| state.system.now());
    let rows = state.system.table_rows(&member.workspace, &table, at).await?;
    let count = rows.num_rows();
    let from = from.min(count);
    let part = rows.slice(from, limit.min(count - from));
    let mut answer = json!({"rows": objects(&part)?});
    if from + part.num_rows() < count {
        answer["next"] = (from + part.num_rows()).to_string().into();
    }
    Ok(axum::Json(answer))
}

fn objects(rows: &RecordBatch) -> Result<Vec<Value>, Problem> {
    let lines = json_lines(rows).map_err(Problem::internal)?;
    lines.iter().map(|line| serde_json::from_str(line).map_err(Problem::internal)).collect()
}
