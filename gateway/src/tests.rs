//! The whole router over a real system in a directory of its own.

mod again; // what clients get that come back
mod chat; // the sockets of chat clients
mod crowded; // more connections and workspaces than there may be
mod issuer; // browsers that sign in by an OpenID Connect issuer
mod kept; // what is kept of answers, and who gets it
mod refused; // what is refused, and what the audit log tells of it
mod rights; // who may follow and send what
mod shared; // what several nodes share through Redis
#[path = "../../tests/support/redis.rs"]
mod redis;

use crate::auth::testing::SECRET;
use crate::*;
use actors::Parts;
use actors::clock::SystemClock;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use futures::future::join_all;
use futures::{SinkExt, StreamExt};
use metrics_exporter_prometheus::PrometheusBuilder;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use sql::store::Store;
use streams::log::EmbeddedLog;
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tower::ServiceExt;

const PASSWORD: &str = "correct horse";

struct Server {
    router: Router,
    state: AppState,
    _dir: Arc<TempDir>,
}

/// An answer, read.
#[derive(Clone)]
struct Answer {
    status: u16,
    body: Value,
    headers: axum::http::HeaderMap,
}

impl Answer {
    fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }
}

impl Server {
    async fn start() -> Server {
        Server::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Server {
        Server::of(Config { limits, ..Config::default() }, actors::Limits::default()).await
    }

    async fn of(config: Config, system_limits: actors::Limits) -> Server {
        let cache = cache::Cache::new(&cache::Config::default());
        Server::node(Arc::new(TempDir::new().unwrap()), "", config, system_limits, cache).await
    }

    /// One of several servers over the store in `dir`, each with a log of its own.
    async fn node(
        dir: Arc<TempDir>,
        node: &str,
        config: Config,
        system_limits: actors::Limits,
        cache: Arc<cache::Cache>,
    ) -> Server {
        let auth_config = AuthConfig {
            secret: Some(SECRET.into()),
            bootstrap_email: Some("root@example.com".into()),
            bootstrap_password: Some(PASSWORD.into()),
            ..config.auth.clone()
        };
        let config = Config { auth: auth_config, ..config };
        let auth = Auth::new(&config.auth).unwrap();
        let store = Store::open(&format!("sqlite:{}/store.db", dir.path().display())).await.unwrap();
        auth.bootstrap(&store, engine::event::Micros(0)).await.unwrap();
        let hub = Hub::new(&config.limits, &config.history);
        let own = dir.path().join(node);
        let log = EmbeddedLog::open(&own.join("log"), &streams::log::Config::default()).unwrap();
        let parts = Parts {
            store,
            log: Arc::new(log),
            dedup: Arc::new(streams::dedup::Dedup::open(&own.join("ids"), &Default::default()).unwrap()),
            outlet: hub.clone(),
            clock: Arc::new(SystemClock),
            limits: system_limits,
            agents: std::collections::BTreeMap::new(),
            cache,
            webhooks: Default::default(),
            sealer: auth.sealer(),
            retention: Default::default(),
        };
        let system = System::start(parts).await.unwrap();
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let state = AppState::new(system, Arc::new(auth), hub, Arc::new(config), Arc::default(), metrics).unwrap();
        Server { router: router(state.clone()), state, _dir: dir }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
        let response: Response<Body> = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        assert!(parts.headers.contains_key("x-request-id"));
        if parts.status.is_client_error() || parts.status.is_server_error() {
            let kind = parts.headers["content-type"].to_str().unwrap();
            assert_eq!(kind.split(';').next(), Some("application/problem+json"), "{body}");
            assert_eq!(body["status"], parts.status.as_u16());
            let (status, code) = (parts.status.as_u16(), body["code"].as_str().unwrap());
            assert!(body["detail"].is_string());
            assert!(openapi::is_told(&method, &path, status, code), "{method} {path}: {status} {code} is not told");
        }
        Answer { status: parts.status.as_u16(), body, headers: parts.headers }
    }

    async fn call(&self, method: &str, path: &str, token: &str, body: Value) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        self.send(request.body(body).unwrap()).await
    }

    async fn get(&self, path: &str, token: &str) -> Answer {
        self.call("GET", path, token, Value::Null).await
    }

    async fn sign_in(&self, email: &str) -> Answer {
        self.call("POST", "/api/v1/auth/login", "", json!({"email": email, "password": PASSWORD})).await
    }

    async fn token(&self, email: &str) -> String {
        self.sign_in(email).await.body["access_token"].as_str().unwrap().to_owned()
    }

    /// A new user's token.
    async fn user(&self, root: &str, email: &str) -> String {
        let made = self.call("POST", "/api/v1/users", root, json!({"email": email, "password": PASSWORD})).await;
        assert_eq!(made.status, 201, "{}", made.body);
        self.token(email).await
    }
}

#[tokio::test]
async fn every_documented_operation_is_served() {
    let server = Server::start().await;
    for (method, path) in openapi::operations() {
        let path = path.replace("{ws}", "acme").replace("{stream}", "market.trades").replace(['{', '}'], "");
        let answer = server.call(&method.to_uppercase(), &path, "", Value::Null).await;
        let open = ["/login", "/refresh", "/permissions", "/ws"].iter().any(|end| path.ends_with(end));
        match open || !path.starts_with("/api/") || path.contains("/auth/oidc") {
            true => assert!([200, 400, 404, 426].contains(&answer.status), "{method} {path}: {}", answer.status),
            false => assert_eq!((answer.status, answer.code()), (401, "unauthorized"), "{method} {path}"),
        }
    }
}

#[tokio::test]
async fn what_the_router_itself_refuses_is_a_problem_too() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let code = async |method: &str, path: &str, kind: &str, body: Body| {
        let request = Request::builder().method(method).uri(path).header("content-type", kind);
        let request = request.header("authorization", format!("Bearer {root}"));
        let answer = server.send(request.body(body).unwrap()).await;
        (answer.status, answer.code().to_owned())
    };
    let json = "application/json";
    let at = "/api/v1/workspaces";
    assert_eq!(code("GET", "/api/v1/nothing", json, Body::empty()).await, (404, "not_found".into()));
    assert_eq!(code("DELETE", at, json, Body::empty()).await, (405, "method_not_allowed".into()));
    assert_eq!(code("POST", at, json, Body::from("{")).await, (400, "bad_json".into()));
    assert_eq!(code("POST", at, json, Body::from("{}")).await, (400, "bad_body".into()));
    assert_eq!(code("POST", at, json, Body::from(r#"{"id":"a","owner":"me"}"#)).await, (400, "bad_body".into()));
    assert_eq!(code("POST", at, "text/plain", Body::from("{}")).await, (415, "unsupported_media_type".into()));
    for (encoding, status) in [("gzip", 415), ("br", 415), ("identity", 400), ("", 400)] {
        let request = Request::builder().method("POST").uri(at).header("content-type", json);
        let request = request.header("content-encoding", encoding).header("authorization", format!("Bearer {root}"));
        let answer = server.send(request.body(Body::from("{}")).unwrap()).await;
        let code = if status == 415 { "unsupported_media_type" } else { "bad_body" };
        assert_eq!((answer.status, answer.code()), (status, code), "{encoding}");
    }
    let large = Body::from(format!(r#"{{"id":"{}"}}"#, "x".repeat(2 << 20)));
    assert_eq!(code("POST", at, json, large).await, (413, "body_too_large".into()));
    assert_eq!(code("GET", "/api/v1/workspaces?limit=0", json, Body::empty()).await, (400, "bad_parameter".into()));
    assert_eq!(code("GET", "/api/v1/workspaces?limt=1", json, Body::empty()).await, (400, "unknown_parameter".into()));
    assert_eq!(
        code("GET", "/api/v1/workspaces?limit=1&limit=2", json, Body::empty()).await,
        (400, "bad_parameter".into())
    );
    assert_eq!(code("GET", "/api/v1/ws", json, Body::empty()).await, (426, "upgrade_required".into()));
    assert_eq!(code("POST", "/api/v1/ws", json, Body::empty()).await, (405, "method_not_allowed".into()));
    assert_eq!(code("GET", "/api/v1/workspaces/%ff", json, Body::empty()).await, (400, "bad_path".into()));
}

#[tokio::test]
async fn figures_that_are_served_elsewhere_are_not_here() {
    let elsewhere = Config { metrics_listen: Some(([127, 0, 0, 1], 0).into()), ..Config::default() };
    let answer = Server::of(elsewhere, actors::Limits::default()).await.get("/metrics", "").await;
    assert_eq!((answer.status, answer.code()), (404, "not_found"), "{}", answer.body);
    assert_eq!(Server::start().await.get("/metrics", "").await.status, 200);
}

#[tokio::test]
async fn a_panic_of_a_handler_is_a_problem_without_its_words() {
    let boom = Router::new().route("/", get(async || -> StatusCode { panic!("secret") }));
    let router = boom.layer(CatchPanicLayer::custom(problem::of_panic)).layer(from_fn(problem::document_errors));
    let response = router.oneshot(Request::builder().uri("/").body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    let body = String::from_utf8(body.to_vec()).unwrap();
    assert!(body.contains("\"internal\"") && !body.contains("secret"), "{body}");
}

#[tokio::test]
async fn a_foreign_workspace_answers_as_a_missing_one_on_every_route() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    let made = server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    assert_eq!((made.status, made.body["role"].as_str()), (201, Some("owner")));
    for (method, path) in openapi::operations().filter(|(_, path)| path.contains("{ws}")) {
        let at = |ws: &str| path.replace("{ws}", ws).replace("{stream}", "market.trades").replace(['{', '}'], "");
        let method = method.to_uppercase();
        let foreign = server.call(&method, &at("acme"), &bob, Value::Null).await;
        let missing = server.call(&method, &at("none"), &bob, Value::Null).await;
        assert_eq!((foreign.status, foreign.code()), (404, "workspace_not_found"), "{method} {path}");
        let told = foreign.body["detail"].as_str().unwrap().replace("acme", "none");
        assert_eq!((missing.status, missing.body["detail"].as_str().unwrap()), (404, told.as_str()));
    }
}

#[tokio::test]
async fn what_was_refused_is_read_as_dead_letters_in_pages() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let at = "/api/v1/workspaces/acme";
    for (stream, event) in [("market.trades", json!({"symbol": "A"})), ("chat.messages", json!({"thread": "t"}))] {
        let sent = server.call("POST", &format!("{at}/streams/{stream}/events"), &root, event).await;
        assert_eq!((sent.status, &sent.body["rejected"]), (200, &json!(1)), "{}", sent.body);
        // the letters come with the next commit
        let written = async || server.get(&format!("{at}/dead-letters?stream={stream}"), &root).await.body;
        let mut read = written().await;
        while read["dead_letters"].as_array().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            read = written().await;
        }
    }
    let first = server.get(&format!("{at}/dead-letters?limit=1"), &root).await;
    let letter = &first.body["dead_letters"][0];
    assert_eq!((&letter["stream"], &letter["code"]), (&json!("chat.messages"), &json!("missing_column")));
    assert_eq!(letter["payload"], r#"{"thread":"t"}"#);
    let next = first.body["next"].as_str().unwrap();
    let second = server.get(&format!("{at}/dead-letters?limit=1&after={next}"), &root).await;
    assert_eq!(second.body["dead_letters"][0]["stream"], "market.trades", "{}", second.body);
    assert!(second.body.get("next").is_none());
    // of equal ones each is kept
    let bad = json!(vec![json!({"symbol": "A", "price": "x", "qty": 1}); 5]);
    assert_eq!(server.call("POST", &format!("{at}/streams/market.trades/events"), &root, bad).await.status, 200);
    let kept = async || {
        let read = server.get(&format!("{at}/dead-letters?stream=market.trades"), &root).await.body;
        read["dead_letters"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|letter| letter["payload"].to_string().contains('x'))
            .count()
    };
    for left in (0..100).rev() {
        if kept().await == 5 {
            break;
        }
        assert!(left > 0, "{}", kept().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(server.get(&format!("{at}/dead-letters?after=x"), &root).await.code(), "bad_cursor");
    assert_eq!(server.get(&format!("{at}/dead-letters?stream=nonsense"), &root).await.code(), "bad_name");
    let one = json!({"name": "x", "role": "viewer", "scopes": ["stream:read@streams/chat.messages"]});
    let key = server.call("POST", &format!("{at}/keys"), &root, one).await;
    let key = key.body["key"].as_str().unwrap();
    assert_eq!(server.get(&format!("{at}/dead-letters"), key).await.status, 403);
    assert_eq!(server.get(&format!("{at}/dead-letters?stream=market.trades"), key).await.status, 403);
    assert_eq!(server.get(&format!("{at}/dead-letters?stream=chat.messages"), key).await.status, 200);
}

/// What a path names, where it has to exist.
fn named(path: &str) -> String {
    let names = [("{ws}", "acme"), ("{stream}", "market.trades"), ("{rule}", "dear")];
    names.iter().fold(path.to_owned(), |path, (name, value)| path.replace(name, value)).replace(['{', '}'], "")
}

#[tokio::test]
async fn every_operation_asks_for_its_permission_and_refuses_who_lacks_it() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    let members = "/api/v1/workspaces/acme/members";
    for role in ["viewer", "limited_partner", "guest", "analyst"] {
        let given = server.call("PUT", members, &ann, json!({"email": "bob@example.com", "role": role})).await;
        assert_eq!(given.status, 200, "{}", given.body);
        let known: permission::Role = role.parse().unwrap();
        for (method, path, needs, body) in openapi::needs().filter(|(_, path, ..)| path.contains("{ws}")) {
            let Some(permission) = needs.filter(|permission| !known.may(*permission)) else { continue };
            // a portfolio's value is for those too who may see the whole portfolio
            if path.ends_with("/summary") && known.may(permission::Permission::PortfolioRead) {
                continue;
            }
            let query = if path.ends_with("/grants") { "?email=a@example.com&scope=metric:read" } else { "" };
            let at = format!("{}{query}", named(path));
            let answer = server.call(&method.to_uppercase(), &at, &bob, body).await;
            assert_eq!((answer.status, answer.code()), (403, "forbidden"), "{role} {method} {path}: {}", answer.body);
            let detail = answer.body["detail"].as_str().unwrap();
            assert!(detail.contains(permission.as_str()) || path.contains("members"), "{path}: {detail}");
        }
    }
    let table = server.get("/api/v1/permissions", "").await;
    assert_eq!((table.status, table.body["roles"].as_array().unwrap().len()), (200, 9));
}

#[tokio::test]
async fn a_grant_opens_one_resource_and_nothing_beside_it() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    for id in ["main", "secret"] {
        let made = server.call("POST", "/api/v1/workspaces/acme/portfolios", &ann, json!({"id": id})).await;
        assert_eq!(made.status, 201, "{}", made.body);
    }
    let grants = "/api/v1/workspaces/acme/grants";
    let grant = json!({"email": "bob@example.com", "scope": "portfolio:read@portfolio/main"});
    let refused = server.call("PUT", grants, &bob, grant.clone()).await;
    assert_eq!(refused.code(), "workspace_not_found");
    let wrong = json!({"email": "bob@example.com", "scope": "portfolio:read@metrics/main"});
    assert_eq!(server.call("PUT", grants, &ann, wrong).await.code(), "unknown_scope");
    let given = server.call("PUT", grants, &ann, grant).await;
    assert_eq!(given.body["grants"][0]["scope"], "portfolio:read@portfolio/main", "{}", given.body);
    let read = async |path: &str| server.get(&format!("/api/v1/workspaces/acme/{path}"), &bob).await;
    let listed = read("portfolios").await;
    assert_eq!(listed.body["portfolios"].as_array().unwrap().len(), 1, "{}", listed.body);
    assert_eq!(read("portfolios/main/positions").await.status, 200);
    assert_eq!(read("portfolios/main/summary").await.status, 200);
    for closed in
        ["portfolios/secret/positions", "portfolios/secret/summary", "metrics", "alerts", "streams", "members"]
    {
        assert_eq!(read(closed).await.status, 403, "{closed}");
    }
    let me = server.get("/api/v1/me", &bob).await;
    assert_eq!(me.body["workspaces"][0]["permissions"], json!(["portfolio:read@portfolio/main"]), "{}", me.body);
    let at = format!("{grants}?email=bob@example.com&scope=portfolio:read@portfolio/main");
    assert_eq!(server.call("DELETE", &at, &ann, Value::Null).await.status, 204);
    assert_eq!(server.call("DELETE", &at, &ann, Value::Null).await.code(), "unknown_grant");
    // a guest without any grant is nobody here
    assert_eq!(read("portfolios/main/positions").await.code(), "workspace_not_found");
    assert_eq!(server.get("/api/v1/workspaces/acme", &bob).await.status, 404);
    assert_eq!(server.get("/api/v1/workspaces", &bob).await.body["workspaces"], json!([]));
    assert_eq!(server.get("/api/v1/me", &bob).await.body["workspaces"], json!([]));
}

#[tokio::test]
async fn a_key_may_do_what_its_scopes_leave_of_its_role() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let keys = "/api/v1/workspaces/acme/keys";
    let scopes = json!(["stream:ingest@streams/market.trades", "query:run", "stream:read@streams/market.trades"]);
    let new = json!({"name": "collector", "role": "member", "scopes": scopes});
    let made = server.call("POST", keys, &root, new).await;
    assert_eq!((made.status, &made.body["scopes"]), (201, &scopes), "{}", made.body);
    let key = made.body["key"].as_str().unwrap();
    let ingest = async |stream: &str, event: Value| {
        server.call("POST", &format!("/api/v1/workspaces/acme/streams/{stream}/events"), key, event).await.status
    };
    assert_eq!(ingest("market.trades", json!({"symbol": "A", "price": 1, "qty": 1})).await, 200);
    assert_eq!(ingest("chat.messages", json!({"thread": "t", "sender": "s"})).await, 403);
    let ask =
        async |sql: &str| server.call("POST", "/api/v1/workspaces/acme/query", key, json!({"sql": sql})).await.status;
    assert_eq!(ask("SELECT count(*) FROM market.trades").await, 200);
    assert_eq!(ask("SELECT * FROM market.trades t, chat.messages m").await, 403);
    assert_eq!(server.get("/api/v1/workspaces/acme/metrics", key).await.status, 403);
    for (body, code) in [
        (json!({"name": "x", "role": "member", "scopes": []}), "bad_body"),
        (json!({"name": "x", "role": "member", "scopes": ["all"]}), "unknown_scope"),
        (json!({"name": "x", "role": "member", "scopes": ["metric:read", "audit:read"]}), "scope_beyond_role"),
        (json!({"name": "x", "role": "viewer", "scopes": ["stream:*"]}), "scope_beyond_role"),
        (json!({"name": "x", "role": "member", "expires_at": "2001-01-01T00:00:00Z"}), "bad_body"),
    ] {
        assert_eq!(server.call("POST", keys, &root, body.clone()).await.code(), code, "{body}");
    }
}

/// The code that an authenticator shows for this secret, `steps` of 30 s from now.
fn code(secret: &str, steps: i64) -> String {
    let secret = totp_rs::Secret::try_from_base32(secret).unwrap();
    let totp = totp_rs::Builder::new().with_secret(secret).build_noncompliant();
    let now = actors::clock::Clock::now(&SystemClock).0 / 1_000_000 + steps * 30;
    totp.generate(now.cast_unsigned()).to_string()
}

#[tokio::test]
async fn a_second_factor_is_asked_for_once_it_is_confirmed_and_a_code_is_good_once() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let login = async |otp: Value| {
        let body = json!({"email": "root@example.com", "password": PASSWORD, "otp": otp});
        server.call("POST", "/api/v1/auth/login", "", body).await
    };
    let enrol =
        async |password: &str| server.call("POST", "/api/v1/me/totp", &root, json!({"password": password})).await;
    assert_eq!(enrol("wrong horse").await.code(), "bad_credentials");
    let enrolled = enrol(PASSWORD).await;
    let secret = enrolled.body["secret"].as_str().unwrap();
    assert!(
        enrolled.body["url"].as_str().unwrap().starts_with("otpauth://totp/tidewatch%3Aroot%40example.com?secret=")
    );
    assert_eq!(login(Value::Null).await.status, 200, "not confirmed yet");
    let confirm = async |otp: &str| server.call("POST", "/api/v1/me/totp/confirm", &root, json!({"otp": otp})).await;
    assert_eq!(confirm("000").await.code(), "bad_otp");
    // the step before: the one of now is left for signing in
    assert_eq!(confirm(&code(secret, -1)).await.status, 204);
    assert_eq!(login(Value::Null).await.code(), "otp_required");
    assert_eq!(login(json!("12345")).await.code(), "bad_otp");
    let now = code(secret, 0);
    assert_eq!(login(json!(now)).await.status, 200);
    assert_eq!(login(json!(now)).await.code(), "bad_otp", "a code is spent");
    let store = server.state.system.store();
    let user = store.user_by_email("root@example.com").await.unwrap().unwrap();
    let stored = store.totp(&user.id).await.unwrap().secret.unwrap();
    assert!(stored.starts_with("v1.") && !stored.contains(secret));
    // the password alone neither replaces nor ends it
    for (path, wrong) in [("/api/v1/me/totp", "000"), ("/api/v1/me/totp/disable", now.as_str())] {
        for (code, told) in [(Value::Null, "otp_required"), (json!(wrong), "bad_otp")] {
            let body = json!({"password": PASSWORD, "code": code});
            let refused = server.call("POST", path, &root, body).await;
            assert_eq!((refused.status, refused.code()), (403, told), "{path}: {}", refused.body);
        }
    }
    let off = json!({"password": PASSWORD, "code": code(secret, 1)});
    assert_eq!(server.call("POST", "/api/v1/me/totp/disable", &root, off).await.status, 204);
    assert_eq!(login(Value::Null).await.status, 200);
}

#[tokio::test]
async fn all_sign_ins_end_together_and_a_new_password_ends_them_too() {
    let server = Server::start().await;
    let (one, two) = (server.token("root@example.com").await, server.token("root@example.com").await);
    let everywhere = server.call("POST", "/api/v1/auth/logout", &one, json!({"everywhere": true})).await;
    assert_eq!(everywhere.status, 204);
    for token in [&one, &two] {
        assert_eq!(server.get("/api/v1/me", token).await.status, 401);
    }
    let three = server.token("root@example.com").await;
    let change = async |body: Value| server.call("PUT", "/api/v1/me/password", &three, body).await;
    assert_eq!(change(json!({"password": "wrong", "new_password": "a new horse"})).await.code(), "bad_credentials");
    assert_eq!(change(json!({"password": PASSWORD, "new_password": "short"})).await.code(), "bad_password");
    assert_eq!(change(json!({"password": PASSWORD, "new_password": "a new horse"})).await.status, 204);
    assert_eq!(server.get("/api/v1/me", &three).await.status, 401);
    assert_eq!(server.sign_in("root@example.com").await.code(), "bad_credentials");
}

#[tokio::test]
async fn a_tier_bounds_requests_events_and_metrics_and_says_where_one_stands() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let ann = server.user(&root, "ann@example.com").await;
    let made = server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme", "tier": "free"})).await;
    assert_eq!((made.status, &made.body["tier"]), (201, &json!("free")), "{}", made.body);
    let golden = server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "b", "tier": "golden"})).await;
    assert_eq!(golden.code(), "unknown_tier");
    let up = server.call("PATCH", "/api/v1/workspaces/acme", &ann, json!({"tier": "premium"})).await;
    assert_eq!(up.code(), "tier_not_allowed");
    let ask =
        async || server.call("POST", "/api/v1/workspaces/acme/query", &ann, json!({"sql": "SELECT 1 AS one"})).await;
    let first = ask().await;
    assert_eq!((first.status, &first.headers["ratelimit-limit"]), (200, &HeaderValue::from_static("30")));
    let mut answers = 0;
    let refused = loop {
        let answer = ask().await;
        if answer.status != 200 {
            break answer;
        }
        answers += 1;
        assert!(answers < 30);
    };
    assert_eq!((refused.status, refused.code()), (429, "quota_exceeded"));
    assert!(refused.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() <= 120);
    assert_eq!(refused.headers["ratelimit-remaining"], "0");
    // what a console reads goes on, and so do events until their own rate is used up
    assert_eq!(server.get("/api/v1/workspaces/acme/metrics", &ann).await.status, 200);
    let events: Vec<Value> = (0..9_000).map(|_| json!({"symbol": "A", "price": 1, "qty": 1})).collect();
    let send = async || {
        let at = "/api/v1/workspaces/acme/streams/market.trades/events";
        server.call("POST", at, &ann, json!(events)).await
    };
    let first = send().await;
    assert_eq!((first.status, &first.headers["ratelimit-policy"]), (200, &HeaderValue::from_static("10000;w=10")));
    let remaining = first.headers["ratelimit-remaining"].to_str().unwrap().parse::<u64>().unwrap();
    assert!((1_000..10_000).contains(&remaining), "{remaining}");
    assert_eq!(send().await.status, 200, "the last one may make a debt");
    let refused = send().await;
    assert_eq!((refused.status, refused.code()), (429, "ingest_rate"));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(["limit", "remaining"].map(|of| &refused.headers[format!("ratelimit-{of}")]), ["10000", "0"]);
    let usage = server.get("/api/v1/workspaces/acme/usage", &ann).await.body;
    assert_eq!((&usage["tier"], &usage["requests"]["remaining"]), (&json!("free"), &json!(0)), "{usage}");
    assert_eq!(usage["metrics"], json!({"used": 0, "limit": 20}));
    let events = &usage["events"];
    assert_eq!((&events["limit_per_second"], &events["limit_at_once"]), (&json!(1_000), &json!(10_000)));
    assert_eq!(server.call("PATCH", "/api/v1/workspaces/acme", &root, json!({"tier": "enterprise"})).await.status, 200);
    assert_eq!(ask().await.status, 200);
    // a workspace of the default tier has no quota of its own, only its user's
    let open = server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "open"})).await;
    assert_eq!(
        (open.body["tier"].as_str(), &open.headers["ratelimit-limit"]),
        (Some("enterprise"), &HeaderValue::from_static("600000"))
    );
}

#[tokio::test]
async fn of_many_who_define_at_once_none_gets_past_a_bound() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let ann = server.user(&root, "ann@example.com").await;
    // one each: a free workspace has 30 requests an hour
    for name in ["metrics", "streams", "webhooks"] {
        server.call("POST", "/api/v1/workspaces", &ann, json!({"id": name, "tier": "free"})).await;
    }
    let call = async |method, path: String, body| {
        server.call(method, &format!("/api/v1/workspaces/{path}"), &ann, body).await.status
    };
    let sql = "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    let (metric, webhook) = (json!({"sql": sql}), json!({"url": "https://example.com/hook"}));
    let stream = json!({"columns": [{"name": "x", "type": "int64"}]});
    let metrics = (0..29).map(|n| call("PUT", format!("metrics/metrics/m{n}"), metric.clone()));
    let streams = (0..29).map(|n| call("PUT", format!("streams/streams/own.s{n}"), stream.clone()));
    let webhooks = (0..29).map(|_| call("POST", "webhooks/webhooks".to_owned(), webhook.clone()));
    let (metrics, streams, webhooks) = (join_all(metrics).await, join_all(streams).await, join_all(webhooks).await);
    let taken = |answers: &[u16]| answers.iter().filter(|status| **status < 300).count();
    let usage = async |name: &str| server.get(&format!("/api/v1/workspaces/{name}/usage"), &ann).await.body;
    assert_eq!((taken(&metrics), usage("metrics").await["metrics"].clone()), (20, json!({"used": 20, "limit": 20})));
    assert_eq!((taken(&streams), usage("streams").await["streams"].clone()), (10, json!({"used": 10, "limit": 10})));
    assert_eq!(taken(&webhooks), 20);
    assert!(metrics.iter().chain(&streams).chain(&webhooks).all(|status| *status < 300 || *status == 409));
}

#[tokio::test]
async fn every_refusal_is_in_the_audit_log_and_the_log_proves_itself() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    let foreign = server.get("/api/v1/workspaces/acme/metrics", &bob).await;
    let log = server.get("/api/v1/workspaces/acme/audit", &ann).await;
    let entry = &log.body["entries"][0];
    assert_eq!((&entry["actor"], &entry["outcome"]), (&json!("bob@example.com"), &json!("workspace_not_found")));
    assert_eq!(entry["request_id"], foreign.headers["x-request-id"].to_str().unwrap());
    let check = server.state.system.store().check_audit(None).await.unwrap();
    assert!(matches!(check, sql::store::AuditCheck::Intact { entries, .. } if entries >= 6), "{check:?}");
}

#[tokio::test]
async fn the_sandbox_of_sql_reads_the_tables_of_the_workspace_and_nothing_else() {
    let limits = actors::Limits { query_rows: 1000, query_memory: 8 << 20, ..actors::Limits::default() };
    let server = Server::of(Config::default(), limits).await;
    let root = server.token("root@example.com").await;
    for id in ["acme", "other"] {
        server.call("POST", "/api/v1/workspaces", &root, json!({"id": id})).await;
    }
    let events: Vec<Value> = (0..3_000).map(|n| json!({"symbol": format!("S{n}"), "price": n, "qty": 1})).collect();
    let at = "/api/v1/workspaces/acme/streams/market.trades/events";
    assert_eq!(server.call("POST", at, &root, json!(events)).await.status, 200);
    let ask = async |body: Value| server.call("POST", "/api/v1/workspaces/acme/query", &root, body).await;
    for sql in [
        "INSERT INTO market.trades VALUES (1)",
        "UPDATE market.trades SET price = 0",
        "DELETE FROM market.trades",
        "DROP TABLE market.trades",
        "CREATE TABLE t AS SELECT 1",
        "CREATE EXTERNAL TABLE t STORED AS CSV LOCATION '/etc/passwd'",
        "COPY market.trades TO '/tmp/x.csv'",
        "COPY (SELECT 1) TO '/tmp/x.parquet'",
        "SET datafusion.execution.target_partitions = 64",
        "SHOW ALL",
        "SHOW TABLES",
        "DESCRIBE market.trades",
        "EXPLAIN ANALYZE SELECT 1",
        "PREPARE p AS SELECT 1",
        "SELECT * INTO stolen FROM market.trades",
        "SELECT 1; SELECT 2",
        "SELECT * FROM information_schema.tables",
        "SELECT * FROM datafusion.information_schema.df_settings",
        "SELECT * FROM pg_catalog.pg_tables",
        "SELECT * FROM sqlite_master",
        "SELECT * FROM users",
        "SELECT * FROM other.market.trades",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM 'file:///etc/passwd'",
        "SELECT * FROM \"s3://bucket/x.parquet\"",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT repeat('x', 2000000000)",
        "SELECT lpad('x', 2000000000)",
        "SELECT range(1, 2000000000)",
        "SELECT array_repeat(1, 2000000000)",
        "SELECT * FROM generate_series(1, 2000000000)",
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT * FROM r",
    ] {
        let answer = ask(json!({"sql": sql})).await;
        assert!((400..500).contains(&answer.status), "{sql}: {} {}", answer.status, answer.body);
        assert!(!answer.body.to_string().contains("root:"), "{sql}: {}", answer.body);
    }
    let answer = ask(json!({"sql": "SELECT a.symbol FROM market.trades a, market.trades b"})).await;
    assert_eq!((answer.status, answer.code()), (400, "too_many_rows"));
    let sorted =
        "SELECT a.symbol, b.symbol AS other, a.price * b.price AS p FROM market.trades a, market.trades b ORDER BY p";
    let answer = ask(json!({"sql": sorted, "timeout_ms": 9_000})).await;
    assert_eq!((answer.status, answer.code()), (400, "query_memory"), "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_that_cannot_be_stopped_keep_nobody_from_an_answer() {
    let limits = actors::Limits { queries: 2, ..actors::Limits::default() };
    let server = Arc::new(Server::of(Config::default(), limits).await);
    let root = server.token("root@example.com").await;
    for id in ["acme", "other"] {
        server.call("POST", "/api/v1/workspaces", &root, json!({"id": id})).await;
    }
    // one call of one function that takes many seconds: nothing looks at the clock in the middle of it
    let long = "a".repeat(60_000);
    let asked = ["b", "c"].map(|other| {
        // the same question at the same time would be asked once
        let params = json!([long, other.repeat(60_000)]);
        let body = json!({"sql": "SELECT levenshtein($1, $2)", "params": params, "timeout_ms": 200});
        let (server, root) = (server.clone(), root.clone());
        tokio::spawn(async move { server.call("POST", "/api/v1/workspaces/acme/query", &root, body).await })
    });
    for answer in futures::future::join_all(asked).await {
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.code()), (400, "query_timeout"), "{}", answer.body);
    }
    let quick = json!({"sql": "SELECT 1 AS one", "timeout_ms": 5_000});
    let answer = server.call("POST", "/api/v1/workspaces/other/query", &root, quick.clone()).await;
    assert_eq!((answer.status, &answer.body["rows"]), (200, &json!([[1]])), "{}", answer.body);
    // who has as many of them as it may ask waits for the end of one
    let answer = server.call("POST", "/api/v1/workspaces/acme/query", &root, quick).await;
    assert_eq!((answer.status, answer.code()), (429, "too_many_queries"), "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_that_runs_away_is_stopped_at_its_limit_and_a_workspace_runs_few_at_once() {
    let limits = actors::Limits { queries: 2, ..actors::Limits::default() };
    let server = Arc::new(Server::of(Config::default(), limits).await);
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let events: Vec<Value> = (0..20_000).map(|n| json!({"symbol": format!("S{n}"), "price": n, "qty": 1})).collect();
    let at = "/api/v1/workspaces/acme/streams/market.trades/events";
    assert_eq!(server.call("POST", at, &root, json!(events)).await.status, 200);
    let endless =
        "SELECT count(*) FROM market.trades a, market.trades b, market.trades c WHERE a.price + b.price > c.price";
    let asked = |n: u32| {
        // the same question at the same time would be asked once
        let body = json!({"sql": format!("{endless} + {n}"), "timeout_ms": 500});
        let (server, root) = (server.clone(), root.clone());
        tokio::spawn(async move {
            let started = std::time::Instant::now();
            let answer = server.call("POST", "/api/v1/workspaces/acme/query", &root, body).await;
            (n, answer, started.elapsed())
        })
    };
    let mut slowest = Duration::ZERO;
    for asked in [asked(1), asked(2)] {
        let (_, answer, took) = asked.await.unwrap();
        assert_eq!((answer.status, answer.code()), (400, "query_timeout"), "{}", answer.body);
        slowest = slowest.max(took);
    }
    // 100 ms on an idle machine; tests share theirs
    println!("a query with 500 ms was stopped after {slowest:?}");
    assert!(slowest < Duration::from_millis(1_500), "{slowest:?}");
    let mut refused = 0;
    for _ in 0..20 {
        let answers = join_all([asked(1), asked(2), asked(3)]).await;
        refused = answers.iter().filter(|answer| answer.as_ref().unwrap().1.code() == "too_many_queries").count();
        if refused == 1 {
            break;
        }
        // one that was answered as stopped counts until its thread has seen that
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(refused, 1);
}

#[tokio::test]
async fn a_silenced_alert_is_listed_as_such() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let ws = "/api/v1/workspaces/acme";
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 hour')";
    assert_eq!(server.call("PUT", &format!("{ws}/metrics/volume"), &root, json!({"sql": sql})).await.status, 200);
    let rule = json!({"name": "much", "metric": "volume", "condition": "volume > 10"});
    assert_eq!(server.call("POST", &format!("{ws}/alert-rules"), &root, rule).await.status, 201);
    let silence = json!({"matchers": {"symbol": "A"}, "duration": "1h"});
    let made = server.call("POST", &format!("{ws}/silences"), &root, silence).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let at = format!("{ws}/streams/market.trades/events");
    let trades = json!([{"symbol": "A", "price": 1, "qty": 50}, {"symbol": "B", "price": 1, "qty": 50}]);
    let sent = server.call("POST", &at, &root, trades).await;
    assert_eq!((sent.status, &sent.body["accepted"]), (200, &json!(2)), "{}", sent.body);
    let alerts = async || server.get(&format!("{ws}/alerts"), &root).await.body["alerts"].as_array().unwrap().clone();
    let started = std::time::Instant::now();
    let listed = loop {
        let listed = alerts().await;
        if listed.len() == 2 {
            break listed;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{listed:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for alert in &listed {
        let silenced = alert["labels"]["symbol"] == "A" && alert["state"] == "firing";
        assert_eq!(alert["silenced"], silenced, "{alert}");
    }
}

/// Takes out what is different about two answers by nature.
fn mask(value: &mut Value, name: &str) {
    match value {
        Value::Object(members) => members.iter_mut().for_each(|(key, value)| match key.as_str() {
            "since" | "created_at" => *value = Value::Null,
            _ => mask(value, name),
        }),
        Value::Array(values) => values.iter_mut().for_each(|value| mask(value, name)),
        Value::String(text) => *text = text.replace(name, "NAME"),
        _ => {}
    }
}

#[tokio::test]
async fn an_address_is_invited_alike_whether_or_not_somebody_has_it_and_accepts_by_coming() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    let at = |path: &str| format!("/api/v1/workspaces/acme/{path}");
    let (mut answers, scope) = (Vec::new(), "portfolio:read@portfolio/main");
    for name in ["bob", "nobody"] {
        let email = format!("{name}@example.com");
        let invited = server.call("PUT", &at("members"), &ann, json!({"email": email, "role": "viewer"})).await;
        let granted = server.call("PUT", &at("grants"), &ann, json!({"email": email, "scope": scope})).await;
        let none =
            server.call("DELETE", &at(&format!("grants?email={email}&scope=metric:read")), &ann, Value::Null).await;
        let listed = [server.get(&at("members"), &ann).await, server.get(&at("grants"), &ann).await];
        let all = [[invited, granted, none].as_slice(), &listed].concat();
        // with the address and the time of each taken out
        let alike = |answer: &Answer| {
            let mut body = answer.body.clone();
            mask(&mut body, name);
            (answer.status, body)
        };
        answers.push(all.iter().map(alike).collect::<Vec<_>>());
        assert_eq!((all[0].body["user"].as_str(), &all[0].body["invited"]), (Some(&*email), &json!(true)));
        assert_eq!(all[1].body["grants"][0]["user"], json!(email));
        assert_eq!((all[2].status, all[2].code()), (404, "unknown_grant"));
        let gone = server.call("DELETE", &at(&format!("members/{email}")), &ann, Value::Null).await;
        assert_eq!(gone.status, 204, "{}", gone.body);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(server.get(&at("metrics"), &bob).await.status, 404, "the invitation was taken back");

    let invite = json!({"email": "Bob@example.com", "role": "viewer"});
    server.call("PUT", &at("members"), &ann, invite).await;
    server.call("PUT", &at("grants"), &ann, json!({"email": "bob@example.com", "scope": scope})).await;
    let mine = async || server.get("/api/v1/me", &bob).await.body["workspaces"][0].clone();
    assert_eq!(
        (&mine().await["id"], &mine().await["invited"]),
        (&json!("acme"), &json!(true)),
        "looking accepts nothing"
    );
    let members = async || server.get(&at("members"), &ann).await.body["members"][1].clone();
    assert_eq!(members().await["invited"], true);
    assert_eq!(server.get(&at("metrics"), &bob).await.status, 200);
    assert_eq!(mine().await["invited"], false);
    let bob_there = members().await;
    assert_eq!((&bob_there["invited"], &bob_there["role"]), (&json!(false), &json!("viewer")));
    assert_ne!(bob_there["user"], "bob@example.com");
    assert_eq!(server.get(&at("grants"), &ann).await.body["grants"][0]["user"], bob_there["user"]);
    let log = server.get(&at("audit"), &ann).await.body.to_string();
    assert!(log.contains("accept invitation"), "{log}");
    // of a member it is told who they are, and of anybody to who administers the installation
    let changed =
        server.call("PUT", &at("members"), &ann, json!({"email": "bob@example.com", "role": "analyst"})).await;
    assert_eq!((&changed.body["user"], &changed.body["role"]), (&bob_there["user"], &json!("analyst")));
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "other"})).await;
    let given = json!({"email": "bob@example.com", "role": "viewer"});
    let given = server.call("PUT", "/api/v1/workspaces/other/members", &root, given).await;
    assert_eq!((&given.body["user"], &given.body["invited"]), (&bob_there["user"], &json!(false)));
    assert_eq!(
        server.call("PUT", &at("members"), &ann, json!({"email": "x", "role": "viewer"})).await.code(),
        "bad_email"
    );
}

#[tokio::test]
async fn a_role_does_what_the_table_says_and_a_change_takes_effect_at_once() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    let give = async |role: &str| {
        let at = "/api/v1/workspaces/acme/members";
        server.call("PUT", at, &ann, json!({"email": "bob@example.com", "role": role})).await
    };
    let portfolio = json!({"id": "p"});
    let hold = async || server.call("POST", "/api/v1/workspaces/acme/portfolios", &bob, portfolio.clone()).await.status;
    assert_eq!(hold().await, 404);
    assert_eq!(give("viewer").await.status, 200);
    assert_eq!(hold().await, 403);
    assert_eq!(give("emperor").await.code(), "unknown_role");
    assert_eq!(give("associate").await.status, 200);
    assert_eq!(hold().await, 201);
    assert_eq!(
        server.call("DELETE", "/api/v1/workspaces/acme/members/bob@example.com", &ann, Value::Null).await.status,
        204
    );
    assert_eq!(hold().await, 404);
    let leave = server.call("DELETE", "/api/v1/workspaces/acme/members/ann@example.com", &ann, Value::Null).await;
    assert_eq!((leave.status, leave.code()), (409, "last_owner"));
    let log = server.get("/api/v1/workspaces/acme/audit", &ann).await;
    let actions = log.body["entries"].as_array().unwrap();
    let refused = actions.iter().filter(|entry| entry["actor"] == "bob@example.com" && entry["outcome"] == "forbidden");
    assert_eq!(refused.count(), 1, "{}", log.body);
}

#[tokio::test]
async fn a_refresh_token_is_good_once_and_its_reuse_ends_the_sign_in() {
    let server = Server::start().await;
    let signed_in = server.sign_in("root@example.com").await;
    assert_eq!(
        (signed_in.body["token_type"].as_str(), signed_in.body["expires_in"].as_i64()),
        (Some("Bearer"), Some(1800))
    );
    let refresh =
        async |token: &Value| server.call("POST", "/api/v1/auth/refresh", "", json!({"refresh_token": token})).await;
    let second = refresh(&signed_in.body["refresh_token"]).await;
    assert_eq!(second.status, 200);
    let access = second.body["access_token"].as_str().unwrap();
    assert_eq!(server.get("/api/v1/me", access).await.status, 200);
    assert_eq!(refresh(&signed_in.body["refresh_token"]).await.status, 401);
    assert_eq!(refresh(&second.body["refresh_token"]).await.status, 401);
    assert_eq!(server.get("/api/v1/me", access).await.status, 401);
}

#[tokio::test]
async fn signing_out_ends_access_and_refresh() {
    let server = Server::start().await;
    let tokens = server.sign_in("root@example.com").await.body;
    let access = tokens["access_token"].as_str().unwrap();
    assert_eq!(server.call("POST", "/api/v1/auth/logout", access, Value::Null).await.status, 204);
    assert_eq!(server.get("/api/v1/me", access).await.status, 401);
    let body = json!({"refresh_token": tokens["refresh_token"]});
    assert_eq!(server.call("POST", "/api/v1/auth/refresh", "", body).await.status, 401);
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_get_the_same_answer() {
    let server = Server::start().await;
    let answer = async |email: &str| {
        let body = json!({"email": email, "password": "wrong horse"});
        let answer = server.call("POST", "/api/v1/auth/login", "", body).await;
        (answer.status, answer.body)
    };
    let known = answer("root@example.com").await;
    assert_eq!(known.0, 401);
    assert_eq!(known, answer("nobody@example.com").await);
}

#[tokio::test]
async fn tries_at_the_same_time_are_throttled_as_those_one_after_the_other_are() {
    let server = Server::start().await;
    let login = |password: &str| {
        let body = json!({"email": "root@example.com", "password": password});
        server.call("POST", "/api/v1/auth/login", "", body)
    };
    // a right password leaves no trace
    for _ in 0..10 {
        assert_eq!(login(PASSWORD).await.status, 200);
    }
    let answers = futures::future::join_all((0..100).map(|_| login("wrong horse"))).await;
    let with = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((with(401), with(429)), (5, 95));
    let refused = answers.iter().find(|answer| answer.status == 429).unwrap();
    assert_eq!(refused.code(), "too_many_sign_ins");
    assert!(refused.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn an_api_key_works_in_its_workspace_with_its_role_until_it_is_revoked() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    for id in ["acme", "other"] {
        server.call("POST", "/api/v1/workspaces", &root, json!({"id": id})).await;
    }
    let made =
        server.call("POST", "/api/v1/workspaces/acme/keys", &root, json!({"name": "ci", "role": "viewer"})).await;
    let key = made.body["key"].as_str().unwrap();
    assert!(key.starts_with("tw_"));
    assert_eq!(server.get("/api/v1/workspaces/acme/metrics", key).await.status, 200);
    assert_eq!(server.get("/api/v1/workspaces/acme/keys", key).await.status, 403);
    assert_eq!(server.get("/api/v1/workspaces/other/metrics", key).await.status, 404);
    assert_eq!(server.call("POST", "/api/v1/workspaces", key, json!({"id": "mine"})).await.status, 403);
    let listed = server.get("/api/v1/workspaces/acme/keys", &root).await;
    assert!(!listed.body.to_string().contains(key) && listed.body["keys"][0]["key"].is_null());
    let at = format!("/api/v1/workspaces/acme/keys/{}", made.body["id"].as_str().unwrap());
    assert_eq!(server.call("DELETE", &at, &root, Value::Null).await.status, 204);
    assert_eq!(server.get("/api/v1/workspaces/acme/metrics", key).await.status, 401);
}

#[tokio::test]
async fn events_go_in_compressed_or_not_and_come_out_of_a_query() {
    let server = Server::with(Limits { body_bytes: 1000, decompressed_bytes: 2000, ..Limits::default() }).await;
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let trades = "{\"symbol\":\"A\",\"price\":2,\"qty\":3}\n{\"symbol\":\"B\"}\n";
    let send = async |kind: &str, encoding: &str, body: Vec<u8>| {
        let request = Request::builder().method("POST").uri("/api/v1/workspaces/acme/streams/market.trades/events");
        let request = request.header("authorization", format!("Bearer {root}"));
        let request = request.header("content-type", kind).header("content-encoding", encoding);
        server.send(request.body(Body::from(body)).unwrap()).await
    };
    let ndjson = "application/x-ndjson";
    let plain = send(ndjson, "identity", trades.into()).await;
    assert_eq!((plain.status, &plain.body["accepted"], &plain.body["rejected"]), (200, &json!(1), &json!(1)));
    assert_eq!(plain.body["errors"][0]["index"], 1);
    let packed = send(ndjson, "zstd", zstd::encode_all(trades.as_bytes(), 3).unwrap()).await;
    assert_eq!((packed.status, &packed.body["accepted"]), (200, &json!(1)));
    assert_eq!(send("text/csv", "identity", trades.into()).await.status, 415);
    assert_eq!(send(ndjson, "br", trades.into()).await.status, 415);
    assert_eq!(send(ndjson, "identity", vec![b' '; 1001]).await.code(), "body_too_large");
    let bomb = zstd::encode_all(vec![b' '; 100_000].as_slice(), 3).unwrap();
    assert_eq!(send(ndjson, "zstd", bomb).await.code(), "body_too_large");
    assert_eq!(send(ndjson, "identity", Vec::new()).await.code(), "empty_body");
    let sql = json!({"sql": "SELECT symbol, price FROM market.trades"});
    let rows = server.call("POST", "/api/v1/workspaces/acme/query", &root, sql).await;
    assert_eq!(rows.body["rows"], json!([["A", 2.0], ["A", 2.0]]), "{}", rows.body);
    let wrong = json!({"sql": "SELECT\n nothing FROM market.trades"});
    let refused = server.call("POST", "/api/v1/workspaces/acme/query", &root, wrong).await;
    assert_eq!((refused.status, &refused.body["line"]), (400, &json!(2)), "{}", refused.body);
}

#[tokio::test]
async fn a_metric_is_defined_with_durations_as_people_write_them() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 minute')";
    let body = json!({"sql": sql, "emit": "250ms", "allowed_lateness": "1 minute"});
    let at = "/api/v1/workspaces/acme/metrics/volume";
    let defined = server.call("PUT", at, &root, body).await;
    assert_eq!(defined.status, 200, "{}", defined.body);
    assert_eq!((&defined.body["emit"], &defined.body["allowed_lateness"]), (&json!("250ms"), &json!("1m")));
    assert_eq!(
        (&defined.body["keys"], &defined.body["window"]),
        (&json!(["symbol"]), &json!({"kind": "tumble", "size": "1m"}))
    );
    assert_eq!(defined.body["values"], json!([{"name": "volume", "type": "float64"}]));
    let wrong = server.call("PUT", at, &root, json!({"sql": sql, "emit": "soon"})).await;
    assert!(wrong.status == 400 && wrong.body["detail"].as_str().unwrap().contains("`soon`"), "{}", wrong.body);
    assert_eq!(server.get(&format!("{at}/rows?symbol=A"), &root).await.body, json!({"rows": []}));
    assert_eq!(server.get(&format!("{at}/rows?color=A"), &root).await.code(), "unknown_parameter");
    assert_eq!(server.call("DELETE", at, &root, Value::Null).await.status, 204);
    assert_eq!(server.call("DELETE", at, &root, Value::Null).await.code(), "unknown_metric");
}

#[tokio::test]
async fn answers_tell_browsers_to_be_careful() {
    let server = Server::start().await;
    let answer = server.get("/health", "").await;
    assert_eq!(answer.headers["x-content-type-options"], "nosniff");
    let answer = server.get("/api/v1/me", "nonsense").await;
    assert_eq!(
        (answer.status, &answer.headers["cache-control"]),
        (401, &axum::http::HeaderValue::from_static("no-store"))
    );
    let page = server.get("/docs", "").await;
    assert!(page.headers["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
    let nothing = axum::http::HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    assert_eq!(answer.headers["content-security-policy"], nothing);
    assert!(server.get("/", "").await.headers.contains_key("content-security-policy"));
}

/// Where a log goes in this test.
#[derive(Clone, Default)]
struct Written(Arc<parking_lot::Mutex<Vec<u8>>>);

impl std::io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_secret_is_in_the_log_whatever_its_level() {
    let written = Written::default();
    let writer = written.clone();
    let log = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone());
    let _guard = tracing::subscriber::set_default(log.finish());
    let server = Server::start().await;
    let tokens = server.sign_in("root@example.com").await.body;
    let root = tokens["access_token"].as_str().unwrap();
    server.call("POST", "/api/v1/workspaces", root, json!({"id": "acme"})).await;
    let key = json!({"name": "k", "role": "viewer"});
    let key = server.call("POST", "/api/v1/workspaces/acme/keys", root, key).await.body["key"].clone();
    server.get("/api/v1/workspaces/acme/metrics", key.as_str().unwrap()).await;
    let totp = server.call("POST", "/api/v1/me/totp", root, json!({"password": PASSWORD})).await.body["secret"].clone();
    let refreshed = json!({"refresh_token": tokens["refresh_token"]});
    let again = server.call("POST", "/api/v1/auth/refresh", "", refreshed.clone()).await.body["access_token"].clone();
    // a reuse is logged as a warning
    server.call("POST", "/api/v1/auth/refresh", "", refreshed).await;
    server
        .call("POST", "/api/v1/auth/login", "", json!({"email": "root@example.com", "password": "wrong horse"}))
        .await;
    let log = String::from_utf8(written.0.lock().clone()).unwrap();
    assert!(log.contains("came again"), "the log is taken");
    let secrets = [&tokens["access_token"], &tokens["refresh_token"], &key, &totp, &again];
    let secrets = secrets.map(|secret| secret.as_str().unwrap());
    for secret in secrets.into_iter().chain([PASSWORD, "wrong horse", SECRET]) {
        assert!(!log.contains(secret), "{secret}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_is_served_beside_http_with_the_certificate_of_the_settings() {
    let dir = TempDir::new().unwrap();
    let Some(files) = tls::tests::certificate(dir.path(), "localhost") else { return };
    let server = Server::start().await;
    let free = async || tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (plain, taken) = (free().await, free().await);
    let (http, https) = (plain.local_addr().unwrap(), taken.local_addr().unwrap());
    drop(taken);
    let config = Config { listen_tls: Some(https), tls: files.clone(), ..Config::default() };
    let (state, stop) = (server.state.clone(), CancellationToken::new());
    let stopped = stop.clone().cancelled_owned();
    let serving = tokio::spawn(async move { serve(plain, state, &config, stopped).await });
    let pem = std::fs::read(files.cert_file.unwrap()).unwrap();
    let certificate = reqwest::Certificate::from_pem(&pem).unwrap();
    _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().tls_certs_only([certificate]).build().unwrap();
    let url = format!("https://localhost:{}/health", https.port());
    let began = std::time::Instant::now();
    let answer = loop {
        match client.get(&url).send().await {
            Ok(answer) => break answer,
            // it does not listen yet
            Err(error) => assert!(error.is_connect() && began.elapsed() < Duration::from_secs(20), "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(answer.status().as_u16(), 200);
    assert_eq!(answer.headers()["strict-transport-security"], "max-age=31536000");
    assert_eq!(client.get(format!("http://{http}/health")).send().await.unwrap().status().as_u16(), 200);

    // the WebSocket too, and all of a message that is larger than what is encrypted at once
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let mut trusted = rustls::RootCertStore::empty();
    trusted.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(trusted).with_no_client_auth();
    let connector = tokio_tungstenite::Connector::Rustls(Arc::new(config));
    let url = format!("wss://localhost:{}/api/v1/ws", https.port());
    let connecting = tokio_tungstenite::connect_async_tls_with_config(url, None, false, Some(connector));
    let mut socket = connecting.await.unwrap().0;
    assert_eq!(ask(&mut socket, json!({"type": "auth", "token": root})).await["type"], "ok");
    let subscribe = json!({"type": "subscribe", "workspace": "acme", "channel": "streams/chat.messages"});
    assert_eq!(ask(&mut socket, subscribe).await["type"], "ok");
    let text = "x".repeat(40_000);
    let events: Vec<Value> = (0..20).map(|_| json!({"thread": "t", "sender": "s", "text": text})).collect();
    let at = "/api/v1/workspaces/acme/streams/chat.messages/events";
    assert_eq!(server.call("POST", at, &root, json!(events)).await.status, 200);
    let mut come = 0;
    while come < events.len() {
        let message = hear(&mut socket).await;
        come += message["event"]["value"]["events"].as_array().unwrap().len();
    }
    drop(socket);
    stop.cancel();
    serving.await.unwrap().unwrap();
}

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

/// A server that listens, until it is told to stop.
struct Listening {
    server: Server,
    url: String,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Listening {
    async fn start(limits: Limits) -> Listening {
        let server = Server::with(limits).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}/api/v1/ws", listener.local_addr().unwrap());
        let (state, stop) = (server.state.clone(), CancellationToken::new());
        let stopped = stop.clone().cancelled_owned();
        let serving = tokio::spawn(async move {
            let config = state.config.clone();
            serve(listener, state, &config, stopped).await
        });
        Listening { server, url, stop, serving }
    }

    async fn connect(&self) -> Socket {
        tokio_tungstenite::connect_async(&self.url).await.unwrap().0
    }

    /// A connection of the admin, who owns the workspace `acme`.
    async fn signed_in(&self) -> (Socket, String) {
        let root = self.server.token("root@example.com").await;
        self.server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
        let mut socket = self.connect().await;
        assert_eq!(ask(&mut socket, json!({"type": "auth", "token": root, "ref": 1})).await["type"], "ok");
        (socket, root)
    }
}

async fn tell(socket: &mut Socket, message: Value) {
    socket.send(Message::text(message.to_string())).await.unwrap();
}

async fn ask(socket: &mut Socket, message: Value) -> Value {
    tell(socket, message).await;
    hear(socket).await
}

async fn hear(socket: &mut Socket) -> Value {
    match tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap().unwrap().unwrap() {
        Message::Text(text) => serde_json::from_str(&text).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// The code the server closes with, whatever it says before.
async fn closed(socket: &mut Socket) -> u16 {
    loop {
        match tokio::time::timeout(Duration::from_secs(20), socket.next()).await.unwrap() {
            Some(Ok(Message::Close(Some(frame)))) => return frame.code.into(),
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_signs_in_first_and_by_message_or_subprotocol() {
    let listening = Listening::start(Limits::default()).await;
    let mut stranger = listening.connect().await;
    let refused = ask(&mut stranger, json!({"type": "ping", "ref": "p"})).await;
    assert_eq!(
        (&refused["type"], &refused["ref"], &refused["code"]),
        (&json!("error"), &json!("p"), &json!("unauthorized"))
    );
    assert_eq!(closed(&mut stranger).await, 4001);
    let mut silent = listening.connect().await;
    assert_eq!(closed(&mut silent).await, 4001);
    let (mut socket, root) = listening.signed_in().await;
    assert_eq!(ask(&mut socket, json!({"type": "ping", "ref": 7, "more": 1})).await, json!({"type": "ok", "ref": 7}));
    assert_eq!(ask(&mut socket, json!({"type": "dance"})).await["code"], "unknown_type");
    assert_eq!(ask(&mut socket, json!(["type"])).await["code"], "bad_frame");
    let mut request = listening.url.as_str().into_client_request().unwrap();
    let protocols = format!("tidewatch.v1, bearer.{root}");
    request.headers_mut().insert("sec-websocket-protocol", protocols.parse().unwrap());
    let (mut socket, response) = tokio_tungstenite::connect_async(request).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "tidewatch.v1");
    assert_eq!(ask(&mut socket, json!({"type": "ping", "ref": 8})).await, json!({"type": "ok", "ref": 8}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_keeps_what_has_its_value_however_that_is_written() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, root) = listening.signed_in().await;
    let sql = "SELECT value, date_trunc('year', ts) AS year, count(*) AS n FROM analytics.events \
               GROUP BY value, date_trunc('year', ts), tumble(ts, INTERVAL '1 second')";
    let at = "/api/v1/workspaces/acme/metrics/m";
    let definition = json!({"sql": sql, "emit": "10ms", "max_delay": "0s"});
    assert_eq!(listening.server.call("PUT", at, &root, definition).await.status, 200);
    let send = async |second: u32| {
        let ts = format!("2026-01-01T00:00:{second:02}Z");
        let events = json!([{"event": "x", "value": 10, "ts": ts}, {"event": "y", "value": 11.5, "ts": ts}]);
        let at = "/api/v1/workspaces/acme/streams/analytics.events/events";
        assert_eq!(listening.server.call("POST", at, &root, events).await.body["accepted"], 2);
    };
    send(0).await;
    send(5).await; // the first window is final
    let rows = format!("{at}/rows?final=true");
    while listening.server.get(&rows, &root).await.body["rows"].as_array().unwrap().len() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let subscribe = |channel: &str| json!({"type": "subscribe", "workspace": "acme", "channel": channel});
    for (channel, detail) in [
        ("streams/analytics.events?value=ten", "`ten` is no value of `value`, whose type is Float64"),
        ("metrics/m?year=soon", "`soon` is no value of `year`"),
    ] {
        let refused = ask(&mut socket, subscribe(channel)).await;
        assert_eq!(refused["code"], "bad_filter");
        assert!(refused["detail"].as_str().unwrap().contains(detail), "{refused}");
    }
    for channel in ["metrics/m?colour=red", "streams/analytics.events?colour=red"] {
        assert_eq!(ask(&mut socket, subscribe(channel)).await["code"], "unknown_parameter");
    }
    let key = "10.0|2026-01-01T00:00:00Z";
    for filter in ["value=10", "value=10.0", "value=1e1&year=2026-01-01T01:00:00%2B01:00"] {
        let mut socket = listening.connect().await;
        ask(&mut socket, json!({"type": "auth", "token": root})).await;
        assert_eq!(ask(&mut socket, subscribe(&format!("metrics/m?{filter}"))).await["type"], "ok");
        let snapshot = hear(&mut socket).await["event"]["snapshot"]["rows"].clone();
        let keys: Vec<&String> = snapshot.as_object().unwrap().keys().collect();
        assert_eq!(keys, [key], "{filter}: the final row and the open window are of one key");
    }
    for filter in ["value=10", "value=10.0", "value=1e1"] {
        assert_eq!(ask(&mut socket, subscribe(&format!("streams/analytics.events?{filter}"))).await["type"], "ok");
    }
    send(6).await;
    for _ in 0..3 {
        let heard = hear(&mut socket).await;
        let events = heard["event"]["value"]["events"].as_array().unwrap();
        assert_eq!((events.len(), &events[0]["value"]), (1, &json!(10.0)), "{heard}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decimal_of_a_final_row_has_all_its_digits_over_http_and_in_sql() {
    let listening = Listening::start(Limits::default()).await;
    let (_, root) = listening.signed_in().await;
    let server = &listening.server;
    let at = |path: &str| format!("/api/v1/workspaces/acme/{path}");
    let columns = json!({"columns": [{"name": "amount", "type": "decimal(38,10)", "nullable": false}]});
    assert_eq!(server.call("PUT", &at("streams/bank.bookings"), &root, columns).await.status, 200);
    let sql = "SELECT max(amount) AS most FROM bank.bookings GROUP BY tumble(ts, INTERVAL '1 second')";
    let definition = json!({"sql": sql, "max_delay": "0s"});
    assert_eq!(server.call("PUT", &at("metrics/m"), &root, definition).await.status, 200);
    let amount = "12345678901234567.8901234567";
    for second in [0, 5] {
        let events = json!([{"amount": amount, "ts": format!("2026-01-01T00:00:{second:02}Z")}]);
        let sent = server.call("POST", &at("streams/bank.bookings/events"), &root, events).await;
        assert_eq!(sent.body["accepted"], 1, "{}", sent.body);
    }
    let rows = async || {
        let request = Request::builder().uri(at("metrics/m/rows?final=true"));
        let request = request.header("authorization", format!("Bearer {root}")).body(Body::empty()).unwrap();
        let answer = server.router.clone().oneshot(request).await.unwrap().into_body();
        String::from_utf8(axum::body::to_bytes(answer, 1 << 20).await.unwrap().to_vec()).unwrap()
    };
    let mut text = rows().await;
    while !text.contains("\"final\":true") {
        tokio::time::sleep(Duration::from_millis(10)).await;
        text = rows().await;
    }
    assert!(text.contains(&format!("\"most\":{amount},")), "{text}");
    let sql = "SELECT CAST(most AS VARCHAR) AS most FROM metrics.m WHERE final";
    let asked = server.call("POST", &at("query"), &root, json!({"sql": sql})).await;
    assert_eq!(asked.body["rows"], json!([[amount]]), "{}", asked.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_comes_to_subscribers_as_events_and_as_rows() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, root) = listening.signed_in().await;
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 minute')";
    let at = "/api/v1/workspaces/acme/metrics/volume";
    assert_eq!(listening.server.call("PUT", at, &root, json!({"sql": sql, "emit": "10ms"})).await.status, 200);
    let subscribe =
        |channel: &str| json!({"type": "subscribe", "workspace": "acme", "channel": channel, "ref": channel});
    let mut stream = listening.connect().await;
    ask(&mut stream, json!({"type": "auth", "token": root})).await;
    assert_eq!(ask(&mut stream, subscribe("streams/market.trades?symbol=A")).await["recovered"], false);
    assert_eq!(ask(&mut socket, subscribe("metrics/volume")).await["ref"], "metrics/volume");
    let snapshot = hear(&mut socket).await;
    assert_eq!(snapshot["event"], json!({"type": "STATE_SNAPSHOT", "snapshot": {"rows": {}}}));
    let events =
        json!([{"symbol": "A", "price": 1, "qty": 2, "note": {"x": 1}}, {"symbol": "B", "price": 1, "qty": 5}]);
    let publish =
        json!({"type": "publish", "workspace": "acme", "stream": "market.trades", "events": events, "ref": "p"});
    let accepted = ask(&mut stream, publish).await;
    // the answer and the event itself may come in either order
    let (accepted, event) = match accepted["type"] == "ok" {
        true => (accepted, hear(&mut stream).await),
        false => (hear(&mut stream).await, accepted),
    };
    assert_eq!((&accepted["accepted"], &accepted["ref"]), (&json!(2), &json!("p")));
    let seen = event["event"]["value"]["events"].as_array().unwrap();
    assert_eq!((seen.len(), &seen[0]["symbol"], &seen[0]["extra"]), (1, &json!("A"), &json!({"note": {"x": 1}})));
    let delta = hear(&mut socket).await;
    assert!(delta["offset"].as_u64() > snapshot["offset"].as_u64());
    let ops = delta["event"]["delta"].as_array().unwrap();
    let paths: Vec<&str> = ops.iter().map(|op| op["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["/rows/A", "/rows/B"]);
    assert_eq!((&ops[1]["value"]["volume"], &ops[1]["value"]["final"]), (&json!(5.0), &json!(false)));
    assert!(ops[1]["value"]["window_start"].as_str().unwrap().ends_with(":00.000000Z"));
    assert_eq!(ask(&mut socket, subscribe("metrics/none")).await["code"], "unknown_metric");
    assert_eq!(ask(&mut socket, subscribe("streams/market.trades?colour=A")).await["code"], "unknown_parameter");
    let live = json!({
        "type": "subscribe", "workspace": "acme", "channel": "query/1", "ref": "q",
        "sql": "SELECT count(*) AS n FROM market.trades", "rate": "250ms",
    });
    assert_eq!(ask(&mut stream, live).await["type"], "ok");
    assert_eq!(hear(&mut stream).await["event"]["snapshot"]["rows"]["0"]["n"], 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_rows_of_a_metric_are_its_state_however_far_event_time_has_gone_on() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, root) = listening.signed_in().await;
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades WHERE qty > 1 \
               GROUP BY symbol, tumble(ts, INTERVAL '1 minute')";
    let at = "/api/v1/workspaces/acme";
    let definition = json!({"sql": sql, "max_delay": "0s"});
    assert_eq!(listening.server.call("PUT", &format!("{at}/metrics/volume"), &root, definition).await.status, 200);
    // the second one is of no row, and hours later
    for (ts, qty) in [("2026-01-01T00:00:00Z", 2), ("2026-01-01T09:00:00Z", 1)] {
        let event = json!({"ts": ts, "symbol": "A", "price": 1, "qty": qty});
        let sent = listening.server.call("POST", &format!("{at}/streams/market.trades/events"), &root, event).await;
        assert_eq!((sent.status, &sent.body["accepted"]), (200, &json!(1)), "{}", sent.body);
    }
    let rows = format!("{at}/metrics/volume/rows?final=true");
    let count =
        async || listening.server.call("GET", &rows, &root, Value::Null).await.body["rows"].as_array().map(Vec::len);
    while count().await != Some(1) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let subscribe = json!({"type": "subscribe", "workspace": "acme", "channel": "metrics/volume", "ref": 1});
    assert_eq!(ask(&mut socket, subscribe).await["type"], "ok");
    let snapshot = hear(&mut socket).await;
    let row = &snapshot["event"]["snapshot"]["rows"]["A"];
    assert_eq!((&row["volume"], &row["final"]), (&json!(2.0), &json!(true)), "{snapshot}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_listens_in_a_workspace_that_is_not_theirs() {
    let listening = Listening::start(Limits { subscriptions: 2, ..Limits::default() }).await;
    let (mut socket, root) = listening.signed_in().await;
    let bob = listening.server.user(&root, "bob@example.com").await;
    let mut foreign = listening.connect().await;
    ask(&mut foreign, json!({"type": "auth", "token": bob})).await;
    for channel in ["alerts", "metrics/x", "streams/market.trades", "thread/t", "portfolio/p", "query/q"] {
        let refused =
            ask(&mut foreign, json!({"type": "subscribe", "workspace": "acme", "channel": channel, "sql": ""})).await;
        assert_eq!(refused["code"], "workspace_not_found", "{channel}");
    }
    let refused = ask(&mut foreign, json!({"type": "subscribe", "channel": "system/actors"})).await;
    assert_eq!(refused["code"], "forbidden");
    let subscribe = |channel: &str| json!({"type": "subscribe", "workspace": "acme", "channel": channel});
    for channel in ["alerts", "thread/t"] {
        assert_eq!(ask(&mut socket, subscribe(channel)).await["type"], "ok");
    }
    assert_eq!(ask(&mut socket, subscribe("thread/u")).await["code"], "too_many_subscriptions");
    let end = json!({"type": "unsubscribe", "workspace": "acme", "channel": "alerts"});
    assert_eq!(ask(&mut socket, end).await["type"], "ok");
    assert_eq!(ask(&mut socket, subscribe("thread/u")).await["type"], "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_closed_as_too_slow() {
    let listening = Listening::start(Limits { queue_bytes: 100_000, ..Limits::default() }).await;
    let (mut slow, root) = listening.signed_in().await;
    let subscribe = json!({"type": "subscribe", "workspace": "acme", "channel": "streams/chat.messages"});
    assert_eq!(ask(&mut slow, subscribe).await["type"], "ok");
    let text = "x".repeat(50_000);
    let events: Vec<Value> = (0..10).map(|_| json!({"thread": "t", "sender": "s", "text": text})).collect();
    // more than the system keeps for a socket that is not read
    for _ in 0..40 {
        let at = "/api/v1/workspaces/acme/streams/chat.messages/events";
        assert_eq!(listening.server.call("POST", at, &root, json!(events)).await.status, 200);
    }
    assert_eq!(closed(&mut slow).await, 4008);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_tells_clients_to_come_back_and_ends_soon() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, _) = listening.signed_in().await;
    let started = std::time::Instant::now();
    listening.stop.cancel();
    assert_eq!(closed(&mut socket).await, 1012);
    drop(socket);
    listening.serving.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let ready = listening.server.get("/ready", "").await;
    assert_eq!((ready.status, ready.code()), (503, "not_ready"));
}
