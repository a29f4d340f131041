//! Streams: their schemas, and the events sent to them.

use crate::AppState;
use crate::extract::{Json, Member, Path, Query};
use crate::ingest::take_body;
use crate::permission::Permission;
use crate::problem::Problem;
use ::streams::decode::TsUnit;
use ::streams::schema::{Column, StreamSchema, UnknownFields};
use actors::StreamInfo;
use actors::rows::rfc3339;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::HeaderMap;
use axum::routing::{get, post, put};
use engine::event::StreamName;
use serde::Deserialize;
use serde_json::{Value, json};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/workspaces/{ws}/streams", get(list))
        .route("/api/v1/workspaces/{ws}/streams/{stream}", put(define))
        .route(
            "/api/v1/workspaces/{ws}/streams/{stream}/events",
            // bounded while it is read, by `limits.body_bytes`
            post(ingest).layer(DefaultBodyLimit::disable()),
        )
}

fn shown(info: &StreamInfo) -> Value {
    json!({
        "name": info.schema.stream, "columns": info.schema.columns, "unknown_fields": info.schema.unknown_fields,
        "frontier": info.frontier.map(rfc3339), "late": info.late, "events": info.events,
    })
}

async fn list(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::Read)?;
    let streams: Vec<Value> = state.system.streams(&member.workspace).await?.iter().map(shown).collect();
    Ok(axum::Json(json!({"streams": streams})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Definition {
    columns: Vec<Column>,
    #[serde(default)]
    unknown_fields: UnknownFields,
}

async fn define(
    State(state): State<AppState>,
    member: Member,
    Path((_, stream)): Path<(String, String)>,
    Json(body): Json<Definition>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::Define)?;
    let stream: StreamName = stream.parse()?;
    let schema = StreamSchema::new(stream.clone(), body.columns, body.unknown_fields)?;
    state.system.define_stream(&member.workspace, schema).await?;
    let streams = state.system.streams(&member.workspace).await?;
    let defined = streams.iter().find(|info| info.schema.stream == stream).map(shown);
    Ok(axum::Json(defined.unwrap_or(Value::Null)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    ts_unit: Option<String>,
}

async fn ingest(
    State(state): State<AppState>,
    member: Member,
    Path((_, stream)): Path<(String, String)>,
    Query(parameters): Query<Parameters>,
    headers: HeaderMap,
    body: Body,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::Ingest)?;
    let stream: StreamName = stream.parse()?;
    let unit = parameters.ts_unit.map_or(Ok(TsUnit::default()), |unit| unit.parse());
    let unit = unit.map_err(|error: String| Problem::invalid("bad_parameter", error))?;
    Ok(axum::Json(take_body(&state, &member, &stream, unit, &headers, body).await?))
}
