//! A server for one test, and a client of it.

use futures::{SinkExt, StreamExt};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use server::{App, Config};
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

pub const EMAIL: &str = "owner@example.com";
pub const PASSWORD: &str = "correct horse battery staple";

/// The real binary, of the same build as the tests.
pub const BINARY: &str = env!("CARGO_BIN_EXE_tidewatch");

/// A running server; drained by [`Server::stop`].
pub struct Server {
    pub url: String,
    pub token: String,
    client: reqwest::Client,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Server {
    /// Starts on `directory`, which may hold the data of an earlier server.
    pub async fn start(directory: &Path) -> Server {
        Server::start_with(directory, |_| {}).await
    }

    /// Starts on `directory` with settings of the test's own.
    pub async fn start_with(directory: &Path, settings: impl FnOnce(&mut Config)) -> Server {
        let mut config =
            Config { listen: ([127, 0, 0, 1], 0).into(), data_dir: directory.to_owned(), ..Config::default() };
        config.auth.secret = Some("a secret of the tests, long enough for them".to_owned());
        config.auth.bootstrap_email = Some(EMAIL.to_owned());
        config.auth.bootstrap_password = Some(PASSWORD.to_owned());
        settings(&mut config);
        let app = App::build(config).await.unwrap();
        let url = format!("http://{}", app.address());
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move { app.serve_until(async { _ = stopped.await }).await.unwrap() });
        let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        let mut server = Server { url, token: String::new(), client, stop, served };
        server.token = server.login(EMAIL, PASSWORD).await;
        server
    }

    /// A server with workspace `acme`.
    pub async fn with_workspace(directory: &Path) -> Server {
        Server::with_workspace_and(directory, |_| {}).await
    }

    /// A server with workspace `acme` and settings of the test's own.
    pub async fn with_workspace_and(directory: &Path, settings: impl FnOnce(&mut Config)) -> Server {
        let server = Server::start_with(directory, settings).await;
        server.ok(Method::POST, "/api/v1/workspaces", json!({"id": "acme", "name": "Acme"})).await;
        server
    }

    /// A node that serves clients for `core`, over the Redis of both.
    pub async fn edge(core: &Server, redis: &str) -> Server {
        let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = Config { listen, ..Config::default() };
        config.edge.core = Some(core.url.clone());
        config.redis.url = Some(redis.to_owned());
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async { _ = stopped.await };
        let served = tokio::spawn(async move { server::serve_edge(config, stopped).await.unwrap() });
        let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        let edge = Server { url: format!("http://{listen}"), token: core.token.clone(), client, stop, served };
        for _ in 0..200 {
            let ready = edge.client.get(format!("{}/ready", edge.url)).send().await;
            if let Ok(answer) = ready
                && let Ok(said) = answer.json::<Value>().await
                // or ready but for what the test is about
                && (said["status"] == "ready" || said["detail"].to_string().contains("trusted_proxies"))
            {
                return edge;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the edge node is not ready within 10 s");
    }

    pub async fn stop(self) {
        _ = self.stop.send(());
        self.served.await.unwrap();
    }

    pub async fn login(&self, email: &str, password: &str) -> String {
        let (status, body) = self
            .send(
                Method::POST,
                "/api/v1/auth/login",
                "application/json",
                json!({"email": email, "password": password}).to_string(),
                None,
            )
            .await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["access_token"].as_str().unwrap().to_owned()
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: impl Into<reqwest::Body>,
        token: Option<&str>,
    ) -> (StatusCode, Value) {
        let mut request =
            self.client.request(method, format!("{}{path}", self.url)).header("content-type", content_type);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = request.body(body).send().await.unwrap();
        assert!(answer.headers().contains_key("x-request-id"), "{path} has no x-request-id");
        let status = answer.status();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// A call with a JSON body as the owner.
    pub async fn call(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, "application/json", body, Some(&self.token)).await
    }

    /// A call that succeeds.
    pub async fn ok(&self, method: Method, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method.clone(), path, body).await;
        assert!(status.is_success(), "{method} {path}: {status} {answer}");
        answer
    }

    pub async fn get(&self, path: &str) -> Value {
        self.ok(Method::GET, path, Value::Null).await
    }

    /// NDJSON into a stream of `acme`.
    pub async fn ingest(&self, stream: &str, lines: &str) -> Value {
        let path = format!("/api/v1/workspaces/acme/streams/{stream}/events");
        let (status, answer) =
            self.send(Method::POST, &path, "application/x-ndjson", lines.to_owned(), Some(&self.token)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    /// A metric of `acme`.
    pub async fn metric(&self, name: &str, definition: Value) {
        self.ok(Method::PUT, &format!("/api/v1/workspaces/acme/metrics/{name}"), definition).await;
    }

    /// Final rows of a metric of `acme`, once there are `count`.
    pub async fn final_rows(&self, metric: &str, count: usize) -> Vec<Value> {
        let path = format!("/api/v1/workspaces/acme/metrics/{metric}/rows?final=true&limit=10000");
        for _ in 0..100 {
            let rows = self.get(&path).await["rows"].as_array().unwrap().clone();
            if rows.len() >= count {
                return rows;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{metric} never had {count} final rows: {}", self.get(&path).await);
    }

    /// A stream of server-sent events.
    pub async fn events(&self, path: &str, last_event_id: &str) -> reqwest::Response {
        let request = self.client.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        request.header("last-event-id", last_event_id).timeout(Duration::from_secs(300)).send().await.unwrap()
    }

    pub async fn socket(&self) -> Socket {
        self.socket_as(&self.token).await
    }

    /// A WebSocket of whoever has this token.
    pub async fn socket_as(&self, token: &str) -> Socket {
        let (mut socket, _) = connect_async(format!("{}/api/v1/ws", self.url.replace("http", "ws"))).await.unwrap();
        let auth = json!({"type": "auth", "token": token, "ref": "auth"});
        socket.send(Message::text(auth.to_string())).await.unwrap();
        let mut socket = Socket(socket);
        socket.until(|frame| frame["ref"] == "auth" && frame["type"] == "ok").await;
        socket
    }
}

/// A signed-in WebSocket.
pub struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    pub fn of(socket: WebSocketStream<MaybeTlsStream<TcpStream>>) -> Socket {
        Socket(socket)
    }

    pub async fn send(&mut self, frame: Value) {
        self.0.send(Message::text(frame.to_string())).await.unwrap();
    }

    /// The next JSON frame; a close is an object of its code and reason.
    pub async fn next(&mut self) -> Value {
        loop {
            let message =
                tokio::time::timeout(Duration::from_secs(20), self.0.next()).await.expect("a frame within 20 s");
            match message {
                Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                Some(Ok(Message::Close(frame))) => {
                    let frame = frame.expect("a close with a code");
                    return json!({"close": u16::from(frame.code), "reason": frame.reason.as_str()});
                }
                Some(Ok(_)) => {}
                other => panic!("the socket ended: {other:?}"),
            }
        }
    }

    /// Reads on until a frame is as wanted.
    pub async fn until(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut seen = Vec::new();
        for _ in 0..2_000 {
            let frame = self.next().await;
            if wanted(&frame) {
                return frame;
            }
            seen.push(frame);
        }
        panic!("not among {} frames, the last of which is {:?}", seen.len(), seen.last());
    }

    pub async fn subscribe(&mut self, channel: &str, since: Value) -> Value {
        let mut frame = json!({"type": "subscribe", "workspace": "acme", "channel": channel, "ref": channel});
        if !since.is_null() {
            frame["since"] = since;
        }
        self.send(frame).await;
        let answer = self.until(|frame| frame["ref"] == channel).await;
        assert_eq!(answer["type"], "ok", "{answer}");
        answer
    }
}
