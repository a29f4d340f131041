//! WebSockets: one task a connection, which reads requests, writes all that waits at once, and holds the client to its
//! credentials for as long as it stays. `/api/v1/ws` speaks of channels, two more paths are chats.

mod chat; // runs of agents as bare events
pub(crate) mod frame; // RFC 6455 on the wire
pub(crate) mod handshake; // how a connection begins
mod io; // its bytes
pub(crate) mod peer; // its task
mod session; // what its client may ask for
pub(crate) mod wire; // what is on its way to it

pub(crate) use session::{admit, may_listen, rate_of, refusal, unknown_type, with_reference, withdrawn};

use crate::AppState;
use crate::config::{Config, Limits};
use crate::edge::Origin;
use crate::hub::{Group, Hub, Outbox, Seats};
use crate::problem::Problem;
use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::get;
use frame::Reader;
use handshake::Agreed;
use hyper::upgrade::OnUpgrade;
use peer::{Peer, Talk};
use session::Session;
use std::sync::Arc;

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/api/v1/ws", get(upgrade)).merge(chat::routes())
}

async fn upgrade(State(state): State<AppState>, mut request: Request) -> Result<Response, Problem> {
    let token = handshake::token_of(request.headers());
    let opening = Opening::of(&state.hub, &state.config, &mut request)?;
    Ok(opening.serve(&state.hub, token, |line| Session::new(state.clone(), line)))
}

/// What a talk has of its connection.
pub(crate) struct Line {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) seats: Seats,
    pub(crate) origin: Origin,
}

/// A request that may become a WebSocket, within the bounds that hold for all of them.
pub(crate) struct Opening {
    agreed: Agreed,
    upgrade: OnUpgrade,
    seats: Seats,
    origin: Origin,
    limits: Limits,
}

impl Opening {
    pub(crate) fn of(hub: &Hub, config: &Config, request: &mut Request) -> Result<Opening, Problem> {
        if !handshake::is_allowed(request.headers(), &config.cors_origins) {
            let detail = "pages of this origin may not connect; an admin can list it in cors_origins";
            return Err(Problem::forbidden(detail).code("origin_not_allowed"));
        }
        Opening::from_anywhere(hub, config, request)
    }

    /// The same for a node that leaves it to another which pages may connect.
    pub(crate) fn from_anywhere(hub: &Hub, config: &Config, request: &mut Request) -> Result<Opening, Problem> {
        let headers = request.headers();
        let (mut seats, origin) = (Seats::default(), Origin::of(request.extensions()));
        if let Some(address) = origin.address() {
            seats.enter(&hub.crowd, Group::Address(address), None)?;
        }
        let agreed = handshake::agree(request.method(), headers)?;
        let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
            let detail = "this connection cannot become a WebSocket; use HTTP/1.1";
            return Err(Problem::invalid("bad_handshake", detail));
        };
        Ok(Opening { agreed, upgrade, seats, origin, limits: config.limits })
    }

    /// Answers the request, and talks on what becomes of its connection. `token`: what it came with.
    pub(crate) fn serve<T: Talk>(
        self,
        hub: &Arc<Hub>,
        token: Option<String>,
        talk: impl FnOnce(Line) -> T,
    ) -> Response {
        let Opening { agreed: Agreed { form, inflates, response }, upgrade, mut seats, origin, limits } = self;
        let hub = hub.clone();
        let outbox = Outbox::new(limits.queue_bytes, form);
        seats.hold(&outbox);
        let talk = talk(Line { outbox: outbox.clone(), seats, origin });
        tokio::spawn(async move {
            let Ok(upgraded) = upgrade.await else { return }; // the client left meanwhile
            let mut reader = Reader::new(limits.frame_bytes, inflates);
            let io = io::split(upgraded, limits.send_buffer_bytes, &mut reader);
            let _connected = Connected::new(hub);
            Peer::serve(io, reader, talk, outbox, token).await;
        });
        response
    }
}

/// A client is connected for as long as this lives.
struct Connected(Arc<Hub>);

impl Connected {
    fn new(hub: Arc<Hub>) -> Connected {
        hub.count_connection(true);
        Connected(hub)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.count_connection(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use engine::event::Micros;
    use futures::{SinkExt, StreamExt};
    use serde_json::{Value, json};
    use std::sync::Arc;

    struct Server {
        state: AppState,
        url: String,
        token: String,
        _dir: tempfile::TempDir,
    }

    type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;
    use tokio_tungstenite::tungstenite::client::IntoClientRequest;
    use tokio_tungstenite::tungstenite::{Message as Sent, Utf8Bytes as Text};

    impl Server {
        async fn start() -> Server {
            let dir = tempfile::TempDir::new().unwrap();
            let config = crate::Config {
                auth: crate::AuthConfig {
                    secret: Some(crate::auth::testing::SECRET.into()),
                    bootstrap_email: Some("root@example.com".into()),
                    bootstrap_password: Some("correct horse".into()),
                    ..crate::AuthConfig::default()
                },
                limits: crate::Limits { subscriptions: 2, frame_bytes: 64 << 10, ..crate::Limits::default() },
                ..crate::Config::default()
            };
            let auth = crate::Auth::new(&config.auth).unwrap();
            let url = format!("sqlite:{}/store.db", dir.path().display());
            let store = sql::store::Store::open(&url).await.unwrap();
            let now = Micros(1);
            auth.bootstrap(&store, now).await.unwrap();
            let hub = crate::Hub::new(&config.limits, &config.history);
            let log = streams::log::EmbeddedLog::open(&dir.path().join("log"), &Default::default()).unwrap();
            let parts = actors::Parts {
                store,
                log: Arc::new(log),
                dedup: Arc::new(streams::dedup::Dedup::open(&dir.path().join("ids"), &Default::default()).unwrap()),
                outlet: hub.clone(),
                clock: Arc::new(actors::clock::SystemClock),
                limits: actors::Limits::default(),
                agents: Default::default(),
                cache: cache::Cache::new(&cache::Config::default()),
                webhooks: Default::default(),
                sealer: auth.sealer(),
                retention: Default::default(),
            };
            let system = actors::System::start(parts).await.unwrap();
            let password = "correct horse".to_owned();
            let at = crate::throttle::Try { from: None, now: system.now(), cache: system.cache() };
            let tokens = auth.login(system.store(), "root@example.com", password, None, at).await.unwrap();
            let token = json!(tokens)["access_token"].as_str().unwrap().to_owned();
            let metrics = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder().handle();
            let state = AppState::new(system, Arc::new(auth), hub, Arc::new(config), Arc::default(), metrics).unwrap();
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("ws://{}/api/v1/ws", listener.local_addr().unwrap());
            let serving = state.clone();
            tokio::spawn(async move {
                let config = serving.config.clone();
                crate::serve(listener, serving, &config, std::future::pending()).await
            });
            Server { state, url, token, _dir: dir }
        }

        /// A connection with this header.
        async fn connect(&self, name: &'static str, value: &str) -> Socket {
            let mut request = self.url.as_str().into_client_request().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
            tokio_tungstenite::connect_async(request).await.unwrap().0
        }

        async fn signed_in(&self) -> Socket {
            self.connect("authorization", &format!("Bearer {}", self.token)).await
        }
    }

    async fn ask(socket: &mut Socket, frame: Value) -> Value {
        socket.send(Sent::Text(frame.to_string().into())).await.unwrap();
        next(socket).await
    }

    /// The next frame; of a close, its code.
    async fn next(socket: &mut Socket) -> Value {
        loop {
            match socket.next().await {
                Some(Ok(Sent::Text(text))) => return serde_json::from_str::<Value>(Text::as_str(&text)).unwrap(),
                Some(Ok(Sent::Close(frame))) => return json!(frame.map(|frame| u16::from(frame.code))),
                Some(Ok(_)) => {}
                other => panic!("the socket ended: {other:?}"),
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn credentials_come_in_a_header_in_a_subprotocol_or_in_the_first_message() {
        let server = Server::start().await;
        let ping = json!({"type": "ping", "ref": 7});
        let pong = json!({"type": "ok", "ref": 7});
        let protocols = format!("tidewatch.v1, bearer.{}", server.token);
        for mut socket in [server.signed_in().await, server.connect("sec-websocket-protocol", &protocols).await] {
            assert_eq!(ask(&mut socket, ping.clone()).await, pong, "nothing unasked comes first");
        }
        let mut socket = server.connect("x-none", "").await;
        let answer = ask(&mut socket, json!({"type": "auth", "token": server.token, "ref": "a"})).await;
        assert_eq!((&answer["type"], &answer["ref"]), (&json!("ok"), &json!("a")));
        let mut socket = server.connect("authorization", "Bearer wrong").await;
        assert_eq!(next(&mut socket).await["code"], "unauthorized");
        assert_eq!(next(&mut socket).await, 4001);
        let mut socket = server.connect("x-none", "").await;
        assert_eq!(ask(&mut socket, ping).await["code"], "unauthorized");
        assert_eq!(next(&mut socket).await, 4001);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refused_message_leaves_the_connection_open_and_one_that_is_too_large_closes_it() {
        let server = Server::start().await;
        let mut socket = server.signed_in().await;
        for (frame, code) in [
            (json!({"type": "dance"}), "unknown_type"),
            (json!([]), "bad_frame"),
            (json!({"type": "subscribe", "workspace": "acme", "channel": "alert"}), "unknown_channel"),
            (json!({"type": "subscribe", "workspace": "acme", "channel": "alerts"}), "workspace_not_found"),
            (json!({"type": "unsubscribe", "workspace": "acme", "channel": "alerts"}), "not_subscribed"),
        ] {
            assert_eq!(ask(&mut socket, frame.clone()).await["code"], code, "{frame}");
        }
        socket.send(Sent::Binary(Bytes::from_static(b"{}"))).await.unwrap();
        assert_eq!(next(&mut socket).await["code"], "bad_frame");
        let (mut sink, mut stream) = socket.split();
        // most of the message is never taken: a client reads while it writes
        let writing = tokio::spawn(async move { sink.send(Sent::Text("x".repeat(4 << 20).into())).await });
        let Some(Ok(Sent::Close(Some(frame)))) = stream.next().await else { panic!("no close") };
        assert_eq!(u16::from(frame.code), 1009);
        writing.abort();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn subscriptions_are_bounded_and_a_second_one_to_a_channel_takes_the_place_of_the_first() {
        let server = Server::start().await;
        let mut socket = server.signed_in().await;
        let subscribe = |channel: &str| json!({"type": "subscribe", "channel": channel, "ref": channel});
        for channel in ["system/throughput", "system/throughput", "system/actors"] {
            let answer = ask(&mut socket, subscribe(channel)).await;
            assert_eq!((&answer["type"], &answer["recovered"]), (&json!("ok"), &json!(false)), "{answer}");
            let snapshot = next(&mut socket).await;
            assert_eq!((&snapshot["channel"], &snapshot["offset"]), (&json!(channel), &answer["offset"]));
            assert_eq!(snapshot["event"]["type"], "STATE_SNAPSHOT");
        }
        socket.send(Sent::Text(subscribe("system/throughput?x=1").to_string().into())).await.unwrap();
        let mut refused = next(&mut socket).await;
        while refused["type"] == "event" {
            refused = next(&mut socket).await;
        }
        assert_eq!(refused["code"], "bad_filter");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_closes_gets_its_close_back_and_a_server_that_drains_says_so() {
        let server = Server::start().await;
        let mut socket = server.signed_in().await;
        socket.close(None).await.unwrap();
        loop {
            match socket.next().await {
                Some(Ok(_)) => {}
                None => break, // the handshake was completed
                Some(Err(error)) => panic!("cut off: {error}"),
            }
        }
        let mut socket = server.signed_in().await;
        ask(&mut socket, json!({"type": "ping"})).await;
        server.state.closing.cancel();
        assert_eq!(next(&mut socket).await["type"], "reconnect");
        assert_eq!(next(&mut socket).await, 1012);
    }
}
