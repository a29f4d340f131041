//! A node without an engine: it serves clients for the one that has it, the core. Every client has a connection of its own
//! to the core, which signs it in and decides what it may have; the messages of channels come over Redis, once for all
//! clients of this node, and are encoded and written here. Whatever else is asked is passed on.

mod pass; // requests that the core answers
mod session; // one client

use crate::config::Config;
use crate::edge::{self, Origin};
use crate::hub::{Heard, Hub};
use crate::problem::{self, Problem};
use crate::routes;
use crate::serve::{NODE, serve_router};
use crate::socket::Opening;
use crate::socket::handshake;
use actors::Part;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use cache::{CacheError, Listener, RedisConfig};
use metrics_exporter_prometheus::PrometheusHandle;
use reqwest::Url;
use serde_json::{Map, Value, json};
use session::Relay;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

/// Messages of Redis that wait here, before it has to.
const HEARD_MAX: usize = 1_024;
/// How long the core may take to be reached.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Why a node cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    #[error("edge.core is missing; name the node with the engine: edge.core = \"http://10.0.0.5:8080\"")]
    NoCore,
    #[error("edge.core = \"{0}\" is no address; write http://HOST:PORT or https://HOST")]
    Core(String),
    #[error(
        "redis.url is missing; name the Redis of the node with the engine, over which the messages of channels come"
    )]
    NoRedis,
    #[error(transparent)]
    Redis(#[from] CacheError),
    #[error(transparent)]
    Client(#[from] reqwest::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What serves clients.
pub(crate) struct Node {
    /// `http://HOST:PORT` of the core.
    core: String,
    http: reqwest::Client,
    hub: Arc<Hub>,
    heard: Arc<Heard>,
    config: Config,
    closing: CancellationToken,
    metrics: PrometheusHandle,
}

/// An address as everybody writes it: small letters, no port where it is the usual one, no path.
fn core_of(text: &str) -> Option<String> {
    let url = Url::parse(text).ok()?;
    let is_plain = url.path() == "/" && url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    (matches!(url.scheme(), "http" | "https") && is_plain).then(|| url.origin().ascii_serialization())
}

impl Node {
    fn new(config: Config, redis: &RedisConfig, metrics: PrometheusHandle) -> Result<Node, EdgeError> {
        let core = config.edge.core.clone().ok_or(EdgeError::NoCore)?;
        let core = core_of(&core).ok_or(EdgeError::Core(core))?;
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let hub = Hub::new(&config.limits, &config.history);
        let (listener, hears) = Listener::start(redis, HEARD_MAX)?.ok_or(EdgeError::NoRedis)?;
        let heard = Heard::start(hub.clone(), listener, hears);
        Ok(Node { core, http, hub, heard, config, closing: CancellationToken::new(), metrics })
    }
}

const STRANGER: &str = "the core does not take this node for one of its own, so that each message comes through it once for \
                        every client; name this node's address in the core's `trusted_proxies`";

impl Node {
    async fn ask_ready(&self, origin: &Origin) -> reqwest::Result<reqwest::Response> {
        let headers = pass::signed(HeaderMap::new(), origin);
        self.http.get(format!("{}/ready", self.core)).headers(headers).timeout(CONNECT_WITHIN).send().await
    }
}

/// Serves clients on `listener` for the core that `config` names, until `shutdown`; then drains as the core does.
pub async fn serve_edge(
    listener: TcpListener,
    config: Config,
    redis: &RedisConfig,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> Result<(), EdgeError> {
    let node = Arc::new(Node::new(config, redis, metrics)?);
    tracing::info!(address = %listener.local_addr()?, core = node.core, "serving clients for another node");
    let first = node.clone();
    tokio::spawn(async move {
        match first.ask_ready(&Origin::default()).await {
            Ok(answer) if answer.headers().contains_key(NODE) => {}
            Ok(_) => tracing::warn!("{STRANGER}"),
            Err(error) => tracing::warn!(%error, "the core does not answer; clients are told to come again"),
        }
    });
    let router = Router::new()
        .route("/api/v1/ws", get(upgrade))
        .route("/health", get(routes::health))
        .route("/metrics", get(|State(node): State<Arc<Node>>| std::future::ready(node.metrics.render())))
        .route_layer(from_fn(problem::document_errors))
        // what the core says goes through as it says it
        .route("/ready", get(ready))
        .fallback(pass::on)
        .layer(CatchPanicLayer::custom(problem::of_panic))
        .layer(from_fn(edge::identify))
        .with_state(node.clone());
    Ok(serve_router(listener, router, &node.config, &node.closing, shutdown).await?)
}

async fn upgrade(State(node): State<Arc<Node>>, mut request: Request) -> Result<Response, Problem> {
    let token = handshake::token_of(request.headers());
    let headers = request.headers();
    let page = [HOST, ORIGIN].into_iter().filter_map(|name| headers.get(&name).cloned().map(|value| (name, value)));
    let page = page.collect();
    let opening = Opening::from_anywhere(&node.hub, &node.config, &mut request)?;
    pass::check_way(&Origin::of(request.extensions()))?;
    let hub = node.hub.clone();
    Ok(opening.serve(&hub, token, |line| Relay::new(node, line, page)))
}

/// What the core says of itself, and whether the messages of channels come over Redis.
async fn ready(State(node): State<Arc<Node>>, request: Request) -> Result<Response, Problem> {
    let origin = Origin::of(request.extensions());
    pass::check_way(&origin)?;
    let part = |ok, detail: &str| Part { name: "feeds", ok, detail: detail.to_owned(), can_wait: true };
    let feeds = match *node.heard.is_there().borrow() {
        true => part(true, "heard over Redis"),
        false => part(false, "nothing is heard over Redis; they come through the core"),
    };
    let said = async {
        let answer = node.ask_ready(&origin).await?;
        let is_known = answer.headers().contains_key(NODE);
        Ok::<_, reqwest::Error>((is_known, answer.status(), answer.json::<Map<String, Value>>().await?))
    };
    let (feeds, status, mut said) = match said.await {
        Ok((true, status, said)) => (feeds, status, said),
        Ok((false, status, said)) => (part(false, STRANGER), status, said),
        Err(error) => {
            tracing::debug!(%error, "the core does not answer");
            let core = Part { name: "core", ok: false, detail: "does not answer".to_owned(), can_wait: false };
            return Ok(routes::not_ready(&[core.clone(), feeds], &[core.to_string()]));
        }
    };
    if status == StatusCode::OK && !feeds.ok {
        let known = said.get("detail").and_then(Value::as_str).map(|detail| format!("{detail}; ")).unwrap_or_default();
        said.insert("detail".to_owned(), format!("{known}{feeds}").into());
        said.insert("status".to_owned(), "degraded".into());
    }
    if let Some(Value::Array(parts)) = said.get_mut("parts") {
        parts.push(json!(feeds));
    }
    Ok((status, axum::Json(said)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_a_core_is_taken_however_it_is_written_and_nothing_else_is() {
        for (text, core) in [
            ("http://10.0.0.5:8080", "http://10.0.0.5:8080"),
            ("http://10.0.0.5:8080/", "http://10.0.0.5:8080"),
            ("HTTP://Core.Example:80", "http://core.example"),
            ("https://core:443/", "https://core"),
            ("http://[::1]:8080", "http://[::1]:8080"),
        ] {
            assert_eq!(core_of(text).as_deref(), Some(core), "{text}");
        }
        for text in [
            "core:8080",
            "ftp://core",
            "http://",
            "http://:8080",
            "http://core:99999",
            "http://core/api",
            "http://core?x=1",
            "http://core/#f",
            "http://me@core",
            "",
        ] {
            assert_eq!(core_of(text), None, "{text}");
        }
    }
}
