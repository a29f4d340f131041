//! Streams: their schemas, and the events sent to them.

use crate::AppState;
use crate::edge::Told;
use crate::extract::{Json, Member, Path, Query, Sent};
use crate::ingest::take_body;
use crate::permission::Permission;
use crate::problem::Problem;
use ::streams::decode::TsUnit;
use ::streams::schema::{Column, StreamSchema, UnknownFields, built_in};
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

/// Whether every workspace has this stream.
pub(super) fn is_built_in(stream: &StreamName) -> bool {
    built_in().iter().any(|known| known.stream == *stream)
}

fn shown(info: &StreamInfo) -> Value {
    json!({
        "name": info.schema.stream, "columns": info.schema.columns, "unknown_fields": info.schema.unknown_fields,
        "frontier": info.frontier.map(rfc3339), "late": info.late, "events": info.events,
    })
}

async fn list(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may_somewhere(Permission::StreamRead)?;
    let streams = state.system.streams(&member.workspace).await?;
    let streams = streams.iter().filter(|info| member.sees(Permission::StreamRead, "streams", &info.schema.stream));
    let streams: Vec<Value> = streams.map(shown).collect();
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
    body: Sent<Definition>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::StreamDefine)?;
    let Json(body) = body?;
    let stream: StreamName = stream.parse()?;
    let _alone = state.system.defining(&member.workspace).await?;
    if let Some(most) = state.tier(&member.workspace).await?.streams {
        let known = state.system.streams(&member.workspace).await?;
        let own = known.iter().filter(|info| !is_built_in(&info.schema.stream)).count();
        if own >= most && !known.iter().any(|info| info.schema.stream == stream) {
            return Err(Problem::conflict(
                "limit_reached",
                format!("this workspace has reached streams = {most} of its tier"),
            ));
        }
    }
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
    told: Told,
    headers: HeaderMap,
    body: Body,
) -> Result<axum::Json<Value>, Problem> {
    let stream: StreamName = stream.parse()?;
    member.may_on(Permission::StreamIngest, &format!("streams/{stream}"))?;
    let unit = parameters.ts_unit.map_or(Ok(TsUnit::default()), |unit| unit.parse());
    let unit = unit.map_err(|error: String| Problem::invalid("bad_parameter", error))?;
    Ok(axum::Json(take_body(&state, &member, &stream, unit, (&headers, body), &told).await?))
}
