//! Requests that the core answers: heads and bodies go through as they come, upgraded connections too.

use super::Node;
use crate::edge::{ANSWER_WAIT, Origin, REQUEST_ID};
use crate::problem::Problem;
use crate::serve::{FORWARDED_FOR, NODE};
use actors::transport_reason;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use futures::TryStreamExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use reqwest::Url;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::copy_bidirectional;
use tokio::time::timeout;

/// Headers of one connection and not of what goes over it (RFC 9110, 7.6.1), and what a body waits for: it has begun.
const OF_CONNECTION: [HeaderName; 8] = [
    CONNECTION,
    EXPECT,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// Without the headers of its connection.
fn cleaned(mut headers: HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = (headers.get_all(CONNECTION).iter())
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.into_iter().chain(OF_CONNECTION) {
        headers.remove(name);
    }
    headers
}

/// What the core is told of whose request it is, in place of what a client says of that.
pub(super) fn signed(mut headers: HeaderMap, origin: &Origin) -> HeaderMap {
    headers.remove(FORWARDED_FOR);
    headers.insert(NODE, HeaderValue::from(u16::from(origin.nodes()) + 1));
    if let Some(value) = origin.address().and_then(|address| HeaderValue::try_from(address.to_string()).ok()) {
        headers.insert(FORWARDED_FOR, value);
    }
    if let Ok(id) = HeaderValue::try_from(origin.request_id()) {
        headers.insert(REQUEST_ID, id); // one request has one id in the logs of both
    }
    headers
}

/// Nodes that one request goes through at most.
const NODES_MAX: u8 = 8;

/// Refuses a request that goes in a circle.
pub(super) fn check_way(origin: &Origin) -> Result<(), Problem> {
    if origin.nodes() < NODES_MAX {
        return Ok(());
    }
    let detail = format!(
        "this went through {NODES_MAX} nodes: their `edge.core` lead in a circle; name the node with the engine"
    );
    tracing::warn!("{detail}");
    Err(Problem::new(StatusCode::LOOP_DETECTED, "circle_of_nodes", detail))
}

pub(super) async fn on(State(node): State<Arc<Node>>, mut request: Request) -> Result<Response, Problem> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let protocol = request.headers().get(UPGRADE).cloned();
    let origin = Origin::of(request.extensions());
    check_way(&origin)?;
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut headers = signed(cleaned(parts.headers), &origin);
    if let (Some(protocol), Some(_)) = (&protocol, &upgrade) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol.clone());
    }
    if !headers.contains_key(HOST)
        && let Some(host) = parts.uri.authority().and_then(|host| HeaderValue::try_from(host.as_str()).ok())
    {
        headers.insert(HOST, host);
    }
    // as it was asked: nobody's rules about paths are passed by because a client library knows shorter ways
    let url = Url::parse(&format!("{}{path}", node.core))
        .ok()
        .filter(|url| url.as_str().strip_prefix(&*node.core) == Some(path));
    let Some(url) = url else {
        return Err(Problem::not_found("not_found", "there is nothing at this path"));
    };
    let asked = node.http.request(parts.method, url).headers(headers);
    let is_broken = Arc::new(AtomicBool::new(false));
    let asked = match body.size_hint().exact() {
        Some(0) => asked,
        _ => {
            let is_broken = is_broken.clone();
            let body = body.into_data_stream().inspect_err(move |_| is_broken.store(true, Ordering::Relaxed));
            asked.body(reqwest::Body::wrap_stream(body))
        }
    };
    let unreachable = |status, detail| {
        let problem = Problem::new(status, "core_unreachable", format!("the node with the engine {detail}; try again"));
        problem.retry_after(Duration::from_secs(1))
    };
    // a little longer than the core gives itself
    let answer = match timeout(ANSWER_WAIT + Duration::from_secs(5), asked.send()).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) if is_broken.load(Ordering::Relaxed) => {
            return Err(Problem::invalid(
                "unreadable_body",
                "the body ended before its end, or is not framed as its headers say",
            ));
        }
        Ok(Err(error)) => {
            tracing::warn!(error = transport_reason(&error), "the core cannot be reached");
            return Err(unreachable(StatusCode::BAD_GATEWAY, "cannot be reached"));
        }
        Err(_) => return Err(unreachable(StatusCode::GATEWAY_TIMEOUT, "does not answer")),
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = answer.status();
    *response.headers_mut() = cleaned(answer.headers().clone());
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let (Some(upgrade), Some(protocol)) = (upgrade, protocol)
    {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, protocol);
        tokio::spawn(async move {
            let (Ok(client), Ok(mut core)) = tokio::join!(upgrade, answer.upgrade()) else { return };
            _ = copy_bidirectional(&mut TokioIo::new(client), &mut core).await; // either side may leave at any time
        });
        return Ok(response);
    }
    *response.body_mut() = Body::from_stream(answer.bytes_stream());
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_a_connection_stay_on_it_and_nobody_says_for_themselves_who_they_are() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, x-mine"),
            ("x-mine", "1"),
            ("transfer-encoding", "chunked"),
            ("authorization", "Bearer t"),
            ("x-forwarded-for", "203.0.113.1"),
            ("x-forwarded-for", "203.0.113.2"),
        ] {
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static(value));
        }
        let passed = signed(cleaned(headers), &Origin::default());
        let mut names: Vec<&str> = passed.keys().map(HeaderName::as_str).collect();
        names.sort();
        assert_eq!(names, ["authorization", "x-request-id", "x-tidewatch-node"]);
    }
}
