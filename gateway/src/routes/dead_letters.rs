//! Events that could not be used, for their sender to look at.

use crate::AppState;
use crate::extract::{Listing, Member};
use crate::permission::Permission;
use crate::problem::Problem;
use actors::rows::rfc3339;
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use engine::event::StreamName;
use serde_json::{Value, json};
use sql::store::DeadLetter;

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/api/v1/workspaces/{ws}/dead-letters", get(list))
}

fn shown(letter: &DeadLetter) -> Value {
    json!({
        "stream": letter.stream, "at": rfc3339(letter.at), "code": letter.code, "detail": letter.detail,
        "payload": letter.payload,
    })
}

async fn list(State(state): State<AppState>, member: Member, mut page: Listing) -> Result<axum::Json<Value>, Problem> {
    let (limit, stream, after) = (page.limit, page.take("stream"), page.take("after"));
    page.done()?;
    // a page holds letters of all streams, so without a stream one must see them all
    match &stream {
        Some(stream) => member.may_read_stream(stream)?,
        None => member.may(Permission::StreamRead)?,
    }
    let stream = stream.map(|stream| stream.parse::<StreamName>()).transpose()?;
    let store = state.system.store();
    let (mut letters, next) = store.dead_letters(&member.workspace, stream.as_ref(), limit, after.as_deref()).await?;
    letters.retain(|letter| member.may_read_stream(letter.stream.as_str()).is_ok());
    let mut answer = json!({"dead_letters": letters.iter().map(shown).collect::<Vec<Value>>()});
    if let Some(next) = next {
        answer["next"] = next.into();
    }
    Ok(axum::Json(answer))
}
