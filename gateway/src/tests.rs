//! The whole router over a real system in a directory of its own.

use crate::auth::testing::SECRET;
use crate::*;
use actors::Parts;
use actors::clock::SystemClock;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use futures::{SinkExt, StreamExt};
use metrics_exporter_prometheus::PrometheusBuilder;
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
    _dir: TempDir,
}

/// An answer, read.
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
        let dir = TempDir::new().unwrap();
        let auth_config = AuthConfig {
            secret: Some(SECRET.into()),
            bootstrap_email: Some("root@example.com".into()),
            bootstrap_password: Some(PASSWORD.into()),
            ..AuthConfig::default()
        };
        let config = Config { auth: auth_config, limits, ..Config::default() };
        let auth = Auth::new(&config.auth).unwrap();
        let store = Store::open(&format!("sqlite:{}/store.db", dir.path().display())).await.unwrap();
        auth.bootstrap(&store, engine::event::Micros(0)).await.unwrap();
        let hub = Hub::new(&config.limits, &config.history);
        let log = EmbeddedLog::open(&dir.path().join("log"), &streams::log::Config::default()).unwrap();
        let parts = Parts {
            store,
            log: Arc::new(log),
            dedup: Arc::new(streams::dedup::Dedup::open(&dir.path().join("ids"), &Default::default()).unwrap()),
            outlet: hub.clone(),
            clock: Arc::new(SystemClock),
            limits: actors::Limits::default(),
            agents: std::collections::BTreeMap::new(),
        };
        let system = System::start(parts).await.unwrap();
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let state = AppState::new(system, Arc::new(auth), hub, Arc::new(config), metrics);
        Server { router: router(state.clone()), state, _dir: dir }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response: Response<Body> = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        assert!(parts.headers.contains_key("x-request-id"));
        if parts.status.is_client_error() || parts.status.is_server_error() {
            assert_eq!(parts.headers["content-type"], "application/problem+json", "{body}");
            assert_eq!(body["status"], parts.status.as_u16());
            assert!(body["code"].is_string() && body["detail"].is_string());
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
        let open = !path.starts_with("/api/") || path.ends_with("/login") || path.ends_with("/refresh");
        match open {
            true => assert!([200, 400].contains(&answer.status), "{method} {path}: {}", answer.status),
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
    let large = Body::from(format!(r#"{{"id":"{}"}}"#, "x".repeat(2 << 20)));
    assert_eq!(code("POST", at, json, large).await, (413, "body_too_large".into()));
    assert_eq!(code("GET", "/api/v1/workspaces?limit=0", json, Body::empty()).await, (400, "bad_parameter".into()));
    assert_eq!(code("GET", "/api/v1/workspaces?limt=1", json, Body::empty()).await, (400, "unknown_parameter".into()));
    assert_eq!(code("GET", "/api/v1/ws", json, Body::empty()).await, (426, "upgrade_required".into()));
    assert_eq!(code("GET", "/api/v1/workspaces/%ff", json, Body::empty()).await, (400, "bad_path".into()));
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
    assert!(server.get("/", "").await.headers.contains_key("content-security-policy"));
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
