//! Errors as clients see them: RFC 9457 `application/problem+json`, each with a stable code.

use actors::{Fault, FaultKind};
use axum::Json;
use axum::body::Body;
use axum::extract::Request;
use axum::extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection};
use axum::http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, SEC_WEBSOCKET_VERSION, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use engine::event::NameError;
use serde::Serialize;
use sql::store::StoreError;
use std::any::Any;
use std::time::Duration;
use streams::decode::DecodeError;
use streams::schema::SchemaError;
use streams::table::TableError;

/// A refused request.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    /// Stable, snake_case.
    pub(crate) code: &'static str,
    pub(crate) detail: String,
    errors: Box<[Item]>,
    retry_after: Option<Duration>,
    /// Of a text in the request; small, as all of this is the other half of almost every result here.
    line: Option<u32>,
    column: Option<u32>,
    /// The run that is in the way.
    run: Option<Box<str>>,
}

/// One of several errors in one answer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Item {
    /// JSON Pointer into the request's body.
    pub(crate) pointer: String,
    pub(crate) code: &'static str,
    pub(crate) detail: String,
}

/// The code of the problem a response carries, for the audit log.
#[derive(Clone, Copy)]
pub(crate) struct Code(pub(crate) &'static str);

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { status, code, detail, errors: Box::default(), retry_after: None, line: None, column: None, run: None }
    }

    pub(crate) fn invalid(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }

    pub(crate) fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, detail)
    }

    pub(crate) fn conflict(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, detail)
    }

    pub(crate) fn unauthorized(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    }

    pub(crate) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    pub(crate) fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", detail)
    }

    pub(crate) fn unsupported_type(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
    }

    /// The same answer for a workspace that is missing and for one that is another's.
    pub(crate) fn workspace_not_found(id: &str) -> Self {
        let id: String = id.chars().take(80).collect();
        Self::not_found("workspace_not_found", format!("there is no workspace `{id}`, or it is not yours"))
    }

    /// Something of ours failed. What it was goes to the log, not to the client.
    pub(crate) fn internal(error: impl std::fmt::Display) -> Self {
        tracing::error!(%error, "a request failed");
        let detail = "the server could not do this; the log says why under this answer's x-request-id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
    }

    /// The same under another code.
    pub(crate) fn code(mut self, code: &'static str) -> Self {
        self.code = code;
        self
    }

    pub(crate) fn errors(mut self, errors: Vec<Item>) -> Self {
        self.errors = errors.into();
        self
    }

    /// How many seconds to wait before it is tried again.
    pub(crate) fn wait_seconds(&self) -> Option<u64> {
        self.retry_after.map(|wait| wait.as_secs_f64().ceil().max(1.0) as u64)
    }

    pub(crate) fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Names the run that is in the way.
    pub(crate) fn run(mut self, run: Option<String>) -> Self {
        self.run = run.map(Into::into);
        self
    }

    pub(crate) fn is_unauthorized(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
    }

    /// Whether it was refused for want of a right.
    pub(crate) fn is_denial(&self) -> bool {
        self.status == StatusCode::FORBIDDEN || self.code == "workspace_not_found"
    }

    /// Whether the same request would be refused again: it is not for want of a part of ours.
    pub(crate) fn is_final(&self) -> bool {
        self.status.is_client_error()
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }
}

/// The document on the wire.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
    #[serde(skip_serializing_if = "<[Item]>::is_empty")]
    errors: &'a [Item],
    /// Place in the SQL that was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    column: Option<u32>,
    /// The run that is in the way.
    #[serde(rename = "runId", skip_serializing_if = "Option::is_none")]
    run: Option<&'a str>,
}

pub(crate) const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let document = Document {
            kind: "about:blank",
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: &self.detail,
            code: self.code,
            errors: &self.errors,
            line: self.line,
            column: self.column,
            run: self.run.as_deref(),
        };
        let mut response = (self.status, Json(document)).into_response();
        response.headers_mut().insert(CONTENT_TYPE, PROBLEM_JSON);
        if let Some(wait) = self.wait_seconds() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(wait));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert("www-authenticate", HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::UPGRADE_REQUIRED {
            let told = [(UPGRADE, "websocket"), (CONNECTION, "upgrade"), (SEC_WEBSOCKET_VERSION, "13")];
            response.headers_mut().extend(told.map(|(name, value)| (name, HeaderValue::from_static(value))));
        }
        response.extensions_mut().insert(Code(self.code));
        response
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        let (status, retry_after) = match fault.kind {
            FaultKind::NotFound => (StatusCode::NOT_FOUND, None),
            FaultKind::Invalid if fault.code == "batch_too_large" => (StatusCode::PAYLOAD_TOO_LARGE, None),
            FaultKind::Invalid => (StatusCode::BAD_REQUEST, None),
            FaultKind::Conflict => (StatusCode::CONFLICT, None),
            FaultKind::Limit { retry_after } => (StatusCode::TOO_MANY_REQUESTS, Some(retry_after)),
            FaultKind::Busy { retry_after } => (StatusCode::SERVICE_UNAVAILABLE, Some(retry_after)),
            FaultKind::Internal => return Problem { code: fault.code, ..Problem::internal(fault.detail) },
        };
        let Fault { code, detail, line, column, .. } = fault;
        let [line, column] = [line, column].map(|place| place.and_then(|place| place.try_into().ok()));
        Problem { retry_after, line, column, ..Problem::new(status, code, detail) }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Fault::from(error).into()
    }
}

impl From<NameError> for Problem {
    fn from(error: NameError) -> Self {
        Self::invalid("bad_name", error.to_string())
    }
}

impl From<SchemaError> for Problem {
    fn from(error: SchemaError) -> Self {
        Self::invalid("bad_schema", error.to_string())
    }
}

impl From<TableError> for Problem {
    fn from(error: TableError) -> Self {
        let code = match error {
            TableError::Name(_) => "bad_name",
            _ => "bad_schema",
        };
        Self::invalid(code, error.to_string())
    }
}

impl From<DecodeError> for Problem {
    fn from(error: DecodeError) -> Self {
        let code = match error {
            DecodeError::Empty => "empty_body",
            DecodeError::Unreadable(_) => "unreadable_body",
        };
        Self::invalid(code, error.to_string())
    }
}

impl From<crate::permission::BadScope> for Problem {
    fn from(error: crate::permission::BadScope) -> Self {
        Self::invalid("unknown_scope", error.to_string())
    }
}

impl From<crate::permission::UnknownRole> for Problem {
    fn from(error: crate::permission::UnknownRole) -> Self {
        Self::invalid("unknown_role", error.to_string())
    }
}

/// What a length-limited body says when it is over its limit.
fn over_the_limit(status: StatusCode) -> Option<Problem> {
    (status == StatusCode::PAYLOAD_TOO_LARGE)
        .then(|| Problem::too_large("the body is larger than this server takes; send less at a time"))
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        over_the_limit(rejection.status()).unwrap_or_else(|| match rejection {
            JsonRejection::MissingJsonContentType(_) => {
                Self::unsupported_type("send the body with `content-type: application/json`")
            }
            JsonRejection::JsonSyntaxError(error) => Self::invalid("bad_json", tail(&error.body_text())),
            JsonRejection::JsonDataError(error) => Self::invalid("bad_body", tail(&error.body_text())),
            other => Self::invalid("unreadable_body", other.body_text()),
        })
    }
}

/// What is wrong, without axum's introduction.
fn tail(text: &str) -> String {
    plain(text.split_once(": ").map_or(text, |(_, tail)| tail))
}

/// What is wrong, without the names that types have in here.
pub(crate) fn plain(text: &str) -> String {
    const STRUCT: &str = "expected struct ";
    let mut plain = text.to_owned();
    while let Some(at) = plain.find(STRUCT) {
        let name = plain[at + STRUCT.len()..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').count();
        plain.replace_range(at..at + STRUCT.len() + name, "expected an object");
    }
    plain
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        over_the_limit(rejection.status())
            .unwrap_or_else(|| Self::invalid("unreadable_body", "the body ended before it was complete"))
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::invalid("bad_path", tail(&rejection.body_text()))
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::invalid("bad_parameter", tail(&rejection.body_text()))
    }
}

/// Makes a problem document of every error that has none yet: those of axum itself.
pub(crate) async fn document_errors(request: Request, next: Next) -> Response {
    let target = format!("{} {}", request.method(), request.uri().path());
    let response = next.run(request).await;
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    if !is_error || response.extensions().get::<Code>().is_some() {
        return response;
    }
    let (code, detail) = match status {
        StatusCode::NOT_FOUND => ("not_found", format!("nothing is served at {target}; see /docs")),
        StatusCode::METHOD_NOT_ALLOWED => ("method_not_allowed", format!("{target} is not served; see /docs")),
        StatusCode::PAYLOAD_TOO_LARGE => return Problem::too_large("send less at a time").into_response(),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => ("unsupported_media_type", "this content type is not read".to_owned()),
        StatusCode::UPGRADE_REQUIRED => ("upgrade_required", "this is a WebSocket endpoint".to_owned()),
        status if status.is_client_error() => ("bad_request", format!("{target} cannot be served as it was sent")),
        _ => return Problem::internal(format!("{target} answered {status}")).into_response(),
    };
    let allow = response.headers().get(ALLOW).cloned();
    let mut answer = Problem::new(status, code, detail).into_response();
    if let Some(allow) = allow {
        answer.headers_mut().insert(ALLOW, allow);
    }
    answer
}

/// What a panic of a handler becomes.
pub(crate) fn of_panic(panic: Box<dyn Any + Send>) -> Response<Body> {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Problem::internal(format!("a handler panicked: {text}")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn document(problem: Problem) -> (StatusCode, Option<HeaderValue>, serde_json::Value) {
        let response = problem.into_response();
        assert_eq!(response.headers()[CONTENT_TYPE], PROBLEM_JSON);
        let (status, wait) = (response.status(), response.headers().get(RETRY_AFTER).cloned());
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, wait, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn each_kind_of_fault_has_its_status() {
        let soon = Duration::from_millis(1500);
        let table = [
            (FaultKind::NotFound, 404, None),
            (FaultKind::Invalid, 400, None),
            (FaultKind::Conflict, 409, None),
            (FaultKind::Limit { retry_after: soon }, 429, Some("2")),
            (FaultKind::Busy { retry_after: soon }, 503, Some("2")),
            (FaultKind::Internal, 500, None),
        ];
        for (kind, status, wait) in table {
            let (found, header, body) = document(Fault::new(kind, "some_code", "what happened").into()).await;
            assert_eq!((found.as_u16(), body["status"].as_u64()), (status, Some(u64::from(status))));
            assert_eq!(header.as_ref().map(|value| value.to_str().unwrap()), wait);
            assert_eq!((body["code"].as_str(), body["type"].as_str()), (Some("some_code"), Some("about:blank")));
        }
    }

    #[tokio::test]
    async fn what_failed_inside_is_not_told_to_clients() {
        let (_, _, body) = document(Fault::internal("disk /srv/secret is gone").into()).await;
        assert!(!body.to_string().contains("secret"), "{body}");
    }

    #[tokio::test]
    async fn the_place_in_the_sql_is_shown() {
        let fault = Fault { line: Some(2), column: Some(5), ..Fault::invalid("bad_sql", "no such column") };
        let (_, _, body) = document(fault.into()).await;
        assert_eq!((body["line"].as_u64(), body["column"].as_u64()), (Some(2), Some(5)));
    }
}
