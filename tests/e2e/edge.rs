//! Nodes that serve clients for the one with the engine: what their clients get is what those of the core get.

use crate::bad_input::answer_to_large_body;
use crate::harness::{PASSWORD, Server, Socket};
use crate::redis::RedisServer;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

const CHANNELS: [&str; 2] = ["metrics/sums", "streams/market.trades"];

/// A Redis, a core with workspace `acme`, and an edge node; or nothing where there is no Redis.
async fn both(directory: &TempDir) -> Option<(RedisServer, Server, Server)> {
    let redis = RedisServer::start().inspect_err(|why| println!("skipped: {why}")).ok()?;
    let core = Server::with_workspace_and(directory.path(), |config| {
        config.redis.url = Some(redis.url.clone());
        config.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
        config.cors_origins = vec!["https://app.example".to_owned()];
    })
    .await;
    let sql = "SELECT symbol, count(*) AS n, sum(qty) AS total FROM market.trades \
               GROUP BY tumble(ts, INTERVAL '10 seconds'), symbol";
    core.metric("sums", json!({"sql": sql, "emit": "20ms"})).await;
    let edge = Server::edge(&core, &redis.url).await;
    Some((redis, core, edge))
}

async fn trade(server: &Server, second: i64, symbol: &str) {
    let ts = 1_790_000_000_000 + second * 1_000;
    server.ingest("market.trades", &format!(r#"{{"ts":{ts},"symbol":"{symbol}","price":1,"qty":1}}"#)).await;
}

/// Bytes that went out over Redis.
async fn published(server: &Server) -> u64 {
    let (_, figures) = server.send(Method::GET, "/metrics", "", "", None).await;
    let bytes = figures.as_str().unwrap().lines().find_map(|line| line.strip_prefix("tidewatch_feed_bytes_total "));
    bytes.map_or(0, |bytes| bytes.parse().unwrap())
}

/// What the messages of a channel add up to: events by their offset, or the state.
#[derive(Default)]
struct Followed {
    epoch: String,
    offset: u64,
    events: Vec<(u64, Value)>,
    state: Value,
    /// Messages that came.
    count: usize,
}

impl Followed {
    fn take(&mut self, frame: &Value) {
        let offset = frame["offset"].as_u64().unwrap();
        assert_eq!(frame["epoch"], self.epoch.as_str(), "{frame}");
        self.count += 1;
        let event = &frame["event"];
        match event["type"].as_str().unwrap() {
            "STATE_SNAPSHOT" => self.state = event["snapshot"].clone(),
            "STATE_DELTA" => {
                assert!(offset > self.offset, "a change that came before: {frame}");
                let delta: json_patch::Patch = serde_json::from_value(event["delta"].clone()).unwrap();
                json_patch::patch(&mut self.state, &delta).unwrap();
            }
            _ => {
                assert!(offset > self.offset, "an event that came before: {frame}");
                self.events.push((offset, event.clone()));
            }
        }
        self.offset = offset;
    }
}

struct Client {
    socket: Socket,
    channels: BTreeMap<String, Followed>,
}

impl Client {
    async fn of(server: &Server) -> Client {
        let mut client = Client { socket: server.socket().await, channels: BTreeMap::new() };
        for channel in CHANNELS {
            let request = json!({"type": "subscribe", "workspace": "acme", "channel": channel, "ref": channel});
            client.socket.send(request).await;
            let answer = loop {
                let frame = client.socket.next().await;
                if frame["ref"] == channel {
                    break frame;
                }
                client.take(&frame);
            };
            assert_eq!(answer["type"], "ok", "{answer}");
            assert!(answer.get("feed").is_none(), "clients are not told how nodes do it: {answer}");
            let (epoch, offset) = (answer["epoch"].as_str().unwrap().to_owned(), answer["offset"].as_u64().unwrap());
            client.channels.insert(channel.to_owned(), Followed { epoch, offset, ..Followed::default() });
        }
        client
    }

    fn take(&mut self, frame: &Value) {
        assert_eq!(frame["type"], "event", "{frame}");
        self.channels.get_mut(frame["channel"].as_str().unwrap()).unwrap().take(frame);
    }

    /// Reads until an event of this symbol has come in all channels.
    async fn until(&mut self, symbol: &str) {
        let needle = json!(symbol).to_string();
        while !self.channels.values().all(|followed| {
            followed.state.to_string().contains(&needle)
                || followed.events.iter().any(|(_, event)| event.to_string().contains(&needle))
        }) {
            let frame = self.socket.next().await;
            self.take(&frame);
        }
    }
}

fn rows(followed: &Followed) -> BTreeMap<String, Value> {
    let rows = followed.state["rows"].as_object().unwrap();
    rows.iter().map(|(key, row)| (key.clone(), json!([row["n"], row["total"]]))).collect()
}

/// All clients have the same events under the same offsets, and states that say the same.
fn agree(clients: &[Client]) {
    let [first, others @ ..] = clients else { return };
    for other in others {
        for (channel, followed) in &other.channels {
            let known = &first.channels[channel];
            assert_eq!(followed.epoch, known.epoch);
            if channel == CHANNELS[0] {
                assert_eq!(rows(followed), rows(known));
            } else {
                assert_eq!(followed.events, known.events);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn clients_of_an_edge_get_the_messages_of_the_core_once_each_also_while_redis_is_away() {
    let directory = TempDir::new().unwrap();
    let Some((mut redis, core, edge)) = both(&directory).await else { return };
    let mut clients = vec![Client::of(&core).await, Client::of(&edge).await, Client::of(&edge).await];
    let mut second = 0;
    let mut round = async |clients: &mut Vec<Client>, count: i64, last: &str| {
        for n in 0..count {
            second += 1;
            trade(&core, second, ["A", "B", "C"][(n % 3) as usize]).await;
        }
        trade(&core, second, last).await;
        for client in clients.iter_mut() {
            client.until(last).await;
        }
        agree(clients);
    };
    round(&mut clients, 30, "over-redis").await;
    assert!(published(&core).await > 0, "nothing came over Redis");

    redis.stop();
    round(&mut clients, 30, "without-it").await;
    let said = edge.get("/ready").await;
    let feeds = said["parts"].as_array().unwrap().iter().find(|part| part["name"] == "feeds").unwrap();
    assert_eq!((&said["status"], &feeds["ok"]), (&json!("degraded"), &json!(false)), "{said}");
    redis.start_again();
    let mut said = Value::Null;
    for _ in 0..200 {
        said = edge.get("/ready").await;
        if said["status"] == "ready" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(said["status"], "ready", "{said}");
    round(&mut clients, 30, "over-it-again").await;
    redis.signal("STOP");
    round(&mut clients, 30, "it-hangs").await;
    redis.signal("CONT");
    round(&mut clients, 30, "it-goes-on").await;

    // one that comes back to the other node goes on where it was
    let old = clients.pop().unwrap();
    let at = &old.channels[CHANNELS[1]];
    let since = json!({"epoch": at.epoch, "offset": at.offset});
    drop(old.socket);
    trade(&core, second, "meanwhile").await;
    for server in [&core, &edge] {
        let mut socket = server.socket().await;
        let answer = socket.subscribe(CHANNELS[1], since.clone()).await;
        assert_eq!(answer["recovered"], true, "{answer}");
        let frame = socket.next().await;
        assert!(frame["event"].to_string().contains("meanwhile"), "{frame}");
    }
    let listen = core.url.trim_start_matches("http://").parse().unwrap();
    core.stop().await;
    let mut last = clients.pop().unwrap();
    let close = loop {
        let frame = last.socket.next().await;
        if frame.get("close").is_some() {
            break frame;
        }
    };
    assert_eq!(close["close"], 1012, "{close}");
    assert_eq!(edge.send(Method::GET, "/health", "", "", None).await.0, StatusCode::OK);
    let (status, said) = edge.send(Method::GET, "/ready", "", "", None).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{said}");
    let (status, problem) = edge.call(Method::GET, "/api/v1/me", Value::Null).await;
    assert_eq!((status, problem["code"].as_str()), (StatusCode::BAD_GATEWAY, Some("core_unreachable")));

    // another start of the core, which names its feeds anew
    let core = Server::start_with(directory.path(), |config| {
        config.listen = listen;
        config.redis.url = Some(redis.url.clone());
        config.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    let before = published(&core).await;
    let mut clients = [Client::of(&core).await, Client::of(&edge).await];
    for n in 0..20 {
        trade(&core, second, if n == 19 { "after-it" } else { "A" }).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for client in &mut clients {
        client.until("after-it").await;
    }
    agree(&clients);
    assert!(published(&core).await > before, "nothing came over Redis after the core started again");
    core.stop().await;
    edge.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_of_an_edge_that_takes_nothing_for_a_while_gets_the_newest_values_and_the_others_every_message() {
    let directory = TempDir::new().unwrap();
    let Some((_redis, core, edge)) = both(&directory).await else { return };
    let mut clients = vec![Client::of(&edge).await, Client::of(&edge).await];
    let mut slow = edge.socket().await;
    let answer = slow.subscribe(CHANNELS[0], Value::Null).await;
    let (epoch, offset) = (answer["epoch"].as_str().unwrap().to_owned(), answer["offset"].as_u64().unwrap());
    let mut state = Followed { epoch, offset, ..Followed::default() };
    for second in 0..120 {
        let ts = 1_790_000_000_000_i64 + second * 1_000;
        let line = |n| format!(r#"{{"ts":{ts},"symbol":"symbol-{n}","price":1,"qty":1}}"#);
        core.ingest("market.trades", &(0..300).map(line).collect::<Vec<_>>().join("\n")).await;
        let last = if second == 119 { "last".to_owned() } else { format!("round-{second}") };
        trade(&core, second, &last).await;
        for client in &mut clients {
            client.until(&last).await;
        }
    }
    agree(&clients);
    while !state.state.to_string().contains("\"last\"") {
        let frame = slow.next().await;
        state.take(&frame);
    }
    let quick = &clients[0].channels[CHANNELS[0]];
    assert_eq!(rows(&state), rows(quick));
    assert!(state.count < quick.count, "{} messages of {}", state.count, quick.count);
    core.stop().await;
    edge.stop().await;
}

/// A connection from a page of this origin.
async fn of_page(server: &Server, origin: &str) -> Socket {
    let mut request = format!("{}/api/v1/ws", server.url.replacen("http", "ws", 1)).into_client_request().unwrap();
    request.headers_mut().insert("origin", origin.parse().unwrap());
    request.headers_mut().insert("authorization", format!("Bearer {}", server.token).parse().unwrap());
    Socket::of(tokio_tungstenite::connect_async(request).await.unwrap().0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_the_core_refuses_and_says_last_reaches_the_clients_of_an_edge() {
    let directory = TempDir::new().unwrap();
    let Some((_redis, core, edge)) = both(&directory).await else { return };
    // the core says which pages may connect
    let of_edge = edge.url.clone();
    for origin in ["https://app.example", &of_edge] {
        of_page(&edge, origin).await.subscribe("alerts", Value::Null).await;
    }
    let refused = of_page(&edge, "https://evil.example").await.next().await;
    assert_eq!(refused["close"], 4003, "{refused}");
    assert!(refused["reason"].as_str().unwrap().contains("cors_origins"), "{refused}");

    // a body that does not end is the client's fault
    for body in ["content-length: 5000\r\n\r\n[{\"a\"", "transfer-encoding: chunked\r\n\r\nzz\r\n"] {
        let mut raw = TcpStream::connect(edge.url.trim_start_matches("http://")).await.unwrap();
        let path = "/api/v1/workspaces/acme/streams/market.trades/events";
        let head = format!("host: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json", core.token);
        raw.write_all(format!("POST {path} HTTP/1.1\r\n{head}\r\n{body}").as_bytes()).await.unwrap();
        raw.shutdown().await.unwrap();
        let mut answer = String::new();
        raw.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("unreadable_body"), "{body}: {answer}");
    }

    // a second unsubscription, while the answers to what was asked before are on their way
    let mut sockets = Vec::new();
    for _ in 0..10 {
        let mut socket = edge.socket().await;
        let frame =
            |kind: &str, number: u32| json!({"type": kind, "workspace": "acme", "channel": CHANNELS[1], "ref": number});
        socket.send(frame("subscribe", 1)).await;
        socket.send(frame("unsubscribe", 2)).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
        socket.send(frame("unsubscribe", 3)).await;
        socket.send(frame("subscribe", 4)).await;
        for (number, expected) in [(1, "ok"), (2, "ok"), (3, "error"), (4, "ok")] {
            let answer = socket.until(|frame| frame["ref"] == number || frame.get("close").is_some()).await;
            assert_eq!(answer["type"], expected, "{answer}");
        }
        sockets.push(socket);
    }
    trade(&core, 1, "A").await;
    for socket in &mut sockets {
        socket.until(|frame| frame["event"].is_object()).await;
    }

    core.stop().await;
    for socket in &mut sockets {
        let hint = socket.until(|frame| frame["type"] == "reconnect" || frame.get("close").is_some()).await;
        assert!(hint["after_ms"].is_u64(), "when to come back: {hint}");
        assert_eq!(socket.until(|frame| frame.get("close").is_some()).await["close"], 1012);
    }
    edge.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_edge_that_the_core_does_not_believe_says_so_and_serves() {
    let directory = TempDir::new().unwrap();
    let Some(redis) = RedisServer::start().inspect_err(|why| println!("skipped: {why}")).ok() else { return };
    let core = Server::with_workspace_and(directory.path(), |config| config.redis.url = Some(redis.url.clone())).await;
    let edge = Server::edge(&core, &redis.url).await;
    let (status, ready) = edge.send(Method::GET, "/ready", "", "", None).await;
    assert_eq!((status, &ready["status"]), (StatusCode::OK, &json!("degraded")), "{ready}");
    assert!(ready["detail"].as_str().unwrap().contains("`trusted_proxies`"), "{ready}");
    let mut socket = edge.socket().await;
    socket.subscribe("streams/market.trades", Value::Null).await;
    trade(&edge, 1, "A").await;
    socket.until(|frame| frame["event"].is_object()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_edge_passes_on_what_is_asked_and_takes_nothing_that_the_core_would_not_give() {
    let directory = TempDir::new().unwrap();
    let Some((_redis, core, edge)) = both(&directory).await else { return };
    assert!(!edge.login(crate::harness::EMAIL, PASSWORD).await.is_empty());
    trade(&edge, 1, "A").await;
    let rows = edge.get("/api/v1/workspaces/acme/metrics/sums/rows").await;
    assert_eq!(rows["rows"].as_array().unwrap().len(), 1, "{rows}");
    let mut raw = TcpStream::connect(edge.url.trim_start_matches("http://")).await.unwrap();
    let head = format!("host: edge\r\nauthorization: Bearer {}\r\nconnection: close\r\n\r\n", core.token);
    raw.write_all(format!("GET /api/v1/workspaces/%2e%2e/me HTTP/1.1\r\n{head}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    raw.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "a path goes through as it is: {answer}");
    let (status, problem) = edge.send(Method::GET, "/api/v1/me", "", "", Some("wrong")).await;
    assert_eq!((status, problem["code"].as_str()), (StatusCode::UNAUTHORIZED, Some("unauthorized")));
    for (token, expected) in [("wrong", "HTTP/1.1 401 "), (&core.token, "HTTP/1.1 413 ")] {
        let answers = answer_to_large_body(&edge, token).await;
        assert!(answers.starts_with(expected) && answers.contains("HTTP/1.1 200 OK"), "{answers}");
    }
    let mut events = edge.events("/api/v1/workspaces/acme/events?channel=metrics/sums", "").await;
    assert!(events.chunk().await.unwrap().is_some(), "server-sent events come as they happen");

    let mut socket = edge.socket().await;
    for (frame, code) in [
        (json!({"type": "feed", "workspace": "acme", "channel": "alerts", "ref": 1}), "unknown_type"),
        (json!({"type": "subscribe", "workspace": "other", "channel": "alerts", "ref": 1}), "workspace_not_found"),
        (json!({"type": "subscribe", "workspace": "acme", "channel": "nothing", "ref": 1}), "unknown_channel"),
        (json!({"type": "unsubscribe", "workspace": "acme", "channel": "alerts", "ref": 1}), "not_subscribed"),
    ] {
        socket.send(frame.clone()).await;
        let answer = socket.next().await;
        assert_eq!((answer["code"].as_str(), &answer["ref"]), (Some(code), &json!(1)), "{frame}: {answer}");
    }
    let mut direct = core.socket().await;
    direct.send(json!({"type": "feed", "workspace": "acme", "channel": "alerts"})).await;
    assert_eq!(direct.next().await["code"], "unknown_type", "only nodes follow feeds");

    // what is published, asked and run goes to the core and its answers come back
    let publish = json!({"type": "publish", "workspace": "acme", "stream": "market.trades", "ref": "p",
        "events": [{"symbol": "P", "price": 1, "qty": 1}]});
    socket.send(publish).await;
    let answer = socket.until(|frame| frame["ref"] == "p").await;
    assert_eq!((&answer["type"], &answer["accepted"]), (&json!("ok"), &json!(1)), "{answer}");

    let run = json!({"type": "run", "workspace": "acme", "agent": "analyst", "ref": "r",
        "input": {"threadId": "t", "runId": "r", "messages": [{"id": "m", "role": "user", "content": "hello"}],
            "tools": [], "context": [], "state": {}, "forwardedProps": {}}});
    socket.send(run).await;
    let finished = socket.until(|frame| frame["event"]["type"] == "RUN_FINISHED").await;
    assert_eq!(finished["channel"], "thread/t", "{finished}");

    // whose request it is: a proxy is believed, here one of 127.0.0.0/8
    let metric = format!("{}/api/v1/workspaces/acme/metrics/other", core.url);
    let body = json!({"sql": "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')"});
    let put = reqwest::Client::new().put(metric).bearer_auth(&core.token).header("content-type", "application/json");
    let put = put.header("x-forwarded-for", "10.9.9.9, 203.0.113.7").body(body.to_string());
    assert!(put.send().await.unwrap().status().is_success());
    let audit = core.get("/api/v1/workspaces/acme/audit").await;
    assert_eq!(audit["entries"][0]["from"], "203.0.113.7", "{audit}");

    // asked for several times at once, refused or not, a channel comes once; and not at all once it is let go of
    let subscribe = json!({"type": "subscribe", "workspace": "acme", "channel": CHANNELS[1], "ref": "s"});
    for _ in 0..3 {
        socket.send(subscribe.clone()).await;
    }
    for n in 0..20 {
        trade(&core, 2, &format!("n-{n}")).await;
    }
    let mut refused = subscribe.clone();
    refused["since"] = json!(5);
    socket.send(refused).await;
    socket.until(|frame| frame["type"] == "error").await;
    let mut offsets = Vec::new();
    trade(&core, 2, "once").await;
    loop {
        let frame = socket.next().await;
        let text = frame.to_string();
        offsets
            .extend(frame["offset"].as_u64().filter(|_| frame["channel"] == CHANNELS[1] && frame["type"] == "event"));
        if text.contains("once") {
            break;
        }
    }
    assert!(offsets.is_sorted_by(|a, b| a < b), "{offsets:?}");
    socket.send(json!({"type": "unsubscribe", "workspace": "acme", "channel": CHANNELS[1], "ref": "u"})).await;
    socket.until(|frame| frame["ref"] == "u").await;
    trade(&core, 2, "unheard").await;
    socket.send(json!({"type": "ping", "ref": "q"})).await;
    let next = socket.next().await;
    assert_eq!(next["ref"], "q", "{next}");

    // as many questions as it likes, of which it reads no answer for a while
    let long = "x".repeat(4_000);
    for n in 0..1_900 {
        socket.send(json!({"type": "ping", "ref": [n, long]})).await;
    }
    socket.until(|frame| frame["ref"][0] == 1_899).await;

    // a member who is sent away hears nothing more, over Redis neither
    let email = "guest@example.com";
    core.ok(Method::POST, "/api/v1/users", json!({"email": email, "password": PASSWORD})).await;
    let invited = json!({"email": email, "role": "viewer"});
    core.ok(Method::PUT, "/api/v1/workspaces/acme/members", invited).await;
    let mut guest = edge.socket_as(&core.login(email, PASSWORD).await).await;
    guest.subscribe(CHANNELS[1], Value::Null).await;
    trade(&core, 2, "before").await;
    guest.until(|frame| frame.to_string().contains("before")).await;
    core.ok(Method::DELETE, &format!("/api/v1/workspaces/acme/members/{email}"), Value::Null).await;
    let withdrawn = guest.until(|frame| frame["type"] == "error").await;
    assert_eq!((&withdrawn["channel"], &withdrawn["code"]), (&json!(CHANNELS[1]), &json!("workspace_not_found")));
    trade(&core, 3, "after").await;
    guest.send(json!({"type": "ping", "ref": "p"})).await;
    let next = guest.next().await;
    assert_eq!((&next["type"], &next["ref"]), (&json!("ok"), &json!("p")), "{next}");
    core.stop().await;
    edge.stop().await;
}
