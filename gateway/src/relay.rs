//! A node without an engine: it serves clients for the one that has it, the core. Every client has a connection of its own
//! to the core, which signs it in and decides what it may have; the messages of channels come over Redis, once for all
//! clients of this node, and are encoded and written here. Whatever else is asked is passed on.

mod pass; // requests that the core answers
mod session; // one client

use crate::config::Config;
use crate::edge;
use crate::hub::{Heard, Hub};
use crate::problem::{self, Problem};
use crate::routes;
use crate::serve::serve_router;
use crate::socket::Opening;
use crate::socket::handshake;
use actors::Part;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, Uri};
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use cache::{CacheError, Listener, RedisConfig};
use metrics_exporter_prometheus::PrometheusHandle;
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

impl Node {
    fn new(config: Config, redis: &RedisConfig, metrics: PrometheusHandle) -> Result<Node, EdgeError> {
        let core = config.edge.core.clone().ok_or(EdgeError::NoCore)?;
        let uri: Uri = core.parse().map_err(|_| EdgeError::Core(core.clone()))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            return Err(EdgeError::Core(core));
        }
        let core = core.trim_end_matches('/').to_owned();
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

/// Serves clients on `listener` for the core that `config` names, until `shutdown`; then drains as the core does.
pub async fn serve_edge(
    listener: TcpListener,
    config: Config,
    redis: &RedisConfig,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> Result<(), EdgeError> {
    let node = Arc::new(Node::new(config, redis, metrics)?);
    let router = Router::new()
        .route("/api/v1/ws", any(upgrade))
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
    let opening = Opening::of(&node.hub, &node.config, &mut request)?;
    let hub = node.hub.clone();
    Ok(opening.serve(&hub, token, |line| Relay::new(node, line)))
}

/// What the core says of itself, and whether the messages of channels come over Redis.
async fn ready(State(node): State<Arc<Node>>) -> Response {
    let is_heard = *node.heard.is_there().borrow();
    let detail = if is_heard { "heard over Redis" } else { "nothing is heard over Redis; they come through the core" };
    let feeds = Part { name: "feeds", ok: is_heard, detail: detail.to_owned(), can_wait: true };
    let asked = node.http.get(format!("{}/ready", node.core)).timeout(CONNECT_WITHIN).send();
    let said = async {
        let answer = asked.await?;
        Ok::<_, reqwest::Error>((answer.status(), answer.json::<Map<String, Value>>().await?))
    };
    let (status, mut said) = match said.await {
        Ok(said) => said,
        Err(error) => {
            tracing::debug!(%error, "the core does not answer");
            let core = Part { name: "core", ok: false, detail: "does not answer".to_owned(), can_wait: false };
            return routes::not_ready(&[core.clone(), feeds], &[core.to_string()]);
        }
    };
    if status == StatusCode::OK && !is_heard {
        let known = said.get("detail").and_then(Value::as_str).map(|detail| format!("{detail}; ")).unwrap_or_default();
        said.insert("detail".to_owned(), format!("{known}{feeds}").into());
        said.insert("status".to_owned(), "degraded".into());
    }
    if let Some(Value::Array(parts)) = said.get_mut("parts") {
        parts.push(json!(feeds));
    }
    (status, axum::Json(said)).into_response()
}
