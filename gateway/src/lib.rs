//! Every wire format: HTTP, WebSocket and AG-UI, who may speak them, and the console. Computes nothing itself: what
//! it serves and takes in goes through [`actors::System`].

mod config; // the settings of this crate
mod problem; // errors as clients see them
mod permission; // what a role may do
mod quota; // how much a workspace and a user may ask for
mod oidc; // sign-in by an OpenID Connect issuer
mod throttle; // who guesses passwords has to wait
mod auth; // passwords, tokens, API keys
mod extract; // what handlers take from a request

mod encode; // what is inside as JSON
mod ingest; // bodies with events
mod routes; // the HTTP API by area
mod hub; // channels, and who listens to them
mod socket; // the WebSocket
mod agui; // agent runs as AG-UI events
mod agents; // the routes of agents
mod openapi; // what the API looks like
mod console; // the web console
mod edge; // what happens to every request and answer
mod tls; // certificates
mod serve; // connections, and how they drain
mod relay; // a node without an engine, which serves clients for one that has it

pub use auth::{Auth, AuthError, PASSWORD_CHARS_MIN, SECRET_BYTES_MIN, Tokens, hash_password, key_of};
pub use config::{AuthConfig, Config, DEFAULT_TIER, EdgeConfig, History, Kept, Limits};
pub use hub::Hub;
pub use oidc::OidcConfig;
pub use quota::{Tier, default_tiers};
pub use relay::{EdgeError, serve_edge};
pub use serve::{Starting, listen, serve};
#[cfg(fuzzing)]
pub use socket::frame::fuzz;
pub use tls::TlsConfig;

use actors::System;
use actors::pack::Packs;
use auth::Caller;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::{ACCEPT, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{any, get};
use edge::{Denials, Unaudited};
use engine::event::WorkspaceId;
use hub::{Group, Seats};
use ingest::Intake;
use metrics_exporter_prometheus::PrometheusHandle;
use permission::Access;
use problem::Problem;
use quota::Quotas;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, Predicate, SizeAbove};
use tower_http::cors::CorsLayer;

/// What every handler works with. A clone, of which a request makes several, is another handle to it.
#[derive(Clone)]
pub struct AppState(Arc<Parts>);

impl Deref for AppState {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// What the handlers share.
pub struct Parts {
    pub system: System,
    pub auth: Arc<Auth>,
    pub hub: Arc<Hub>,
    pub config: Arc<Config>,
    pub packs: Arc<Packs>,
    /// Renders what `/metrics` answers.
    pub metrics: PrometheusHandle,
    /// Cancelled when the server drains: long answers end then.
    pub closing: CancellationToken,
    pub(crate) intake: Arc<Intake>,
    pub(crate) quotas: Arc<Quotas>,
    pub(crate) unaudited: Arc<Unaudited>,
    pub(crate) denials: Arc<Denials>,
}

impl AppState {
    /// The state of a server that is not draining. Fails when the machine has no threads to give.
    pub fn new(
        system: System,
        auth: Arc<Auth>,
        hub: Arc<Hub>,
        config: Arc<Config>,
        packs: Arc<Packs>,
        metrics: PrometheusHandle,
    ) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Parts {
            system,
            auth,
            hub,
            config,
            packs,
            metrics,
            closing: CancellationToken::new(),
            intake: Arc::new(Intake::start()?),
            quotas: Arc::default(),
            unaudited: Arc::default(),
            denials: Arc::default(),
        })))
    }

    /// Some rights of a group were taken from it, or its sign-ins ended: nothing that was looked up before counts any
    /// more, not for those who are connected either.
    pub(crate) fn took_from(&self, group: &Group) {
        self.auth.forget();
        self.hub.crowd.look_again(group);
    }

    /// Counts a connection among those of a workspace, of which its tier may allow fewer than the settings do.
    pub(crate) async fn seat(&self, seats: &mut Seats, workspace: &WorkspaceId) -> Result<(), Problem> {
        let by_tier = self.tier(workspace).await?.connections;
        seats.enter(&self.hub.crowd, Group::Workspace(workspace.clone()), by_tier)
    }

    /// What the caller may do in a workspace; the problem is the same for a foreign workspace and a missing one.
    pub(crate) async fn access(&self, caller: &Caller, workspace: &WorkspaceId) -> Result<Access, Problem> {
        let (store, most) = (self.system.store(), self.config.limits.workspaces_per_user);
        self.auth.access(store, caller, workspace, most, self.system.now()).await
    }

    /// Refuses a user who owns as many workspaces as one may.
    pub(crate) async fn may_own_another(&self, user: &str) -> Result<(), Problem> {
        self.auth.may_own_another(self.system.store(), user, self.config.limits.workspaces_per_user).await
    }

    /// What a workspace may ask for.
    pub(crate) async fn tier(&self, workspace: &WorkspaceId) -> Result<Tier, Problem> {
        let name = self.auth.tier(self.system.store(), workspace, self.system.now()).await?;
        Ok(self.config.tier(&name))
    }
}

/// Bytes of a request body, but for those with events.
const BODY_BYTES: usize = 1 << 20;
/// Smaller answers are not worth compressing.
const COMPRESSED_FROM: u16 = 1024;

/// Every route, in its layers.
pub(crate) fn router(state: AppState) -> Router {
    let mut router = Router::new().merge(routes::routes()).merge(agents::routes()).merge(socket::routes());
    router = router.merge(openapi::routes());
    router = match state.config.metrics_listen {
        None => router.route("/metrics", get(routes::prometheus)),
        // no page of the console either
        Some(_) => router.route("/metrics", any(async || StatusCode::NOT_FOUND)),
    };
    let compressed = SizeAbove::new(COMPRESSED_FROM).and(DefaultPredicate::new());
    // one layer for the router, which copies what is in it for each request once for each of its layers; the first is the
    // outermost
    let layers = ServiceBuilder::new()
        .layer(from_fn(edge::identify))
        .layer(cors(&state.config.cors_origins))
        .layer(from_fn(problem::document_errors))
        .layer(CatchPanicLayer::custom(problem::of_panic))
        .layer(CompressionLayer::new().compress_when(compressed))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(from_fn(edge::tell_quota))
        .layer(from_fn_with_state(state.clone(), edge::audit))
        .layer(from_fn(edge::measure));
    router.fallback(console::fallback).layer(layers).with_state(state)
}

/// Lets pages of the listed origins call; without any, pages of this server only.
fn cors(origins: &[String]) -> CorsLayer {
    let origins: Vec<HeaderValue> = origins.iter().filter_map(|origin| origin.parse().ok()).collect();
    let last_event_id = HeaderName::from_static("last-event-id");
    let request_id = HeaderName::from_static("x-request-id");
    let told = ["retry-after", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "ratelimit-policy"];
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers([AUTHORIZATION, CONTENT_TYPE, CONTENT_ENCODING, ACCEPT, last_event_id, request_id.clone()])
        .expose_headers([request_id].into_iter().chain(told.map(HeaderName::from_static)).collect::<Vec<_>>())
        .max_age(Duration::from_secs(3600))
}

#[cfg(test)]
mod tests;
