//! The WebSocket and server-sent events at their edges: coming back after the server did, who is there, limits, frames
//! that nobody should send, and a server that drains.

use crate::harness::{Server, Socket};
use futures::{SinkExt, StreamExt};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

const WAIT: Duration = Duration::from_secs(60);

fn chat(n: usize) -> String {
    format!("{}\n", json!({"thread": "t", "sender": "s", "text": format!("message {n}")}))
}

/// The numbers of the messages in a frame of `streams/chat.messages`.
fn numbers(frame: &Value) -> Vec<usize> {
    let events = frame["event"]["value"]["events"].as_array().cloned().unwrap_or_default();
    let number = |event: &Value| event["text"].as_str()?.strip_prefix("message ")?.parse().ok();
    events.iter().filter_map(number).collect()
}

/// Reads until all these numbers came, each once and in order: where the client is then.
async fn read_numbers(socket: &mut Socket, wanted: std::ops::Range<usize>) -> Value {
    let mut found = Vec::new();
    loop {
        let frame = socket.until(|frame| frame["event"]["name"] == "stream.events").await;
        found.extend(numbers(&frame));
        if found.len() >= wanted.len() {
            assert_eq!(found, wanted.collect::<Vec<_>>());
            return json!({"epoch": frame["epoch"], "offset": frame["offset"]});
        }
    }
}

#[tokio::test]
async fn a_follower_of_a_stream_comes_back_after_a_restart_without_gap_or_repeat() {
    const CHANNEL: &str = "streams/chat.messages";
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut socket = server.socket().await;
    socket.subscribe(CHANNEL, Value::Null).await;
    for n in 0..5 {
        server.ingest("chat.messages", &chat(n)).await;
    }
    let since = read_numbers(&mut socket, 0..5).await;
    let mut filtered = server.socket().await;
    let at_start = filtered.subscribe("streams/chat.messages?sender=s", Value::Null).await;
    for n in 5..10 {
        server.ingest("chat.messages", &chat(n)).await;
    }
    read_numbers(&mut socket, 5..10).await;
    drop((socket, filtered));
    server.stop().await;

    let server = Server::start(directory.path()).await;
    // nobody listens: these are in no channel's memory
    server.ingest("chat.messages", &chat(10)).await;
    let mut socket = server.socket().await;
    let answer = socket.subscribe(CHANNEL, since.clone()).await;
    assert_eq!((&answer["recovered"], &answer["epoch"]), (&json!(true), &since["epoch"]), "{answer}");
    server.ingest("chat.messages", &chat(11)).await;
    read_numbers(&mut socket, 5..12).await;
    let since = json!({"epoch": at_start["epoch"], "offset": at_start["offset"]});
    let mut filtered = server.socket().await;
    let answer = filtered.subscribe("streams/chat.messages?sender=s", since).await;
    assert_eq!(answer["recovered"], true, "{answer}");
    read_numbers(&mut filtered, 5..12).await;
    // a place in another log, and one that is not there yet
    for (epoch, offset) in [("another", json!(1)), (answer["epoch"].as_str().unwrap(), json!(1_u64 << 50))] {
        let mut lost = server.socket().await;
        let answer = lost.subscribe(CHANNEL, json!({"epoch": epoch, "offset": offset})).await;
        assert_eq!(answer["recovered"], false, "{answer}");
    }
    server.stop().await;
}

/// Server-sent events as they come.
struct Events {
    answer: reqwest::Response,
    text: String,
}

impl Events {
    /// The next event: its id and data.
    async fn next(&mut self) -> (String, Value) {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
                let (id, data) = (field("id: "), field("data: "));
                self.text = rest.to_owned();
                if let Some(data) = data {
                    return (id.unwrap_or_default(), serde_json::from_str(&data).unwrap());
                }
                continue;
            }
            let part = timeout(WAIT, self.answer.chunk()).await.expect("an event in time").unwrap();
            self.text.push_str(std::str::from_utf8(&part.expect("the stream goes on")).unwrap());
        }
    }
}

#[tokio::test]
async fn server_sent_events_carry_the_same_frames_and_resume_by_their_id() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let path = "/api/v1/workspaces/acme/events?channel=streams%2Fchat.messages&channel=system%2Fthroughput";
    let answer = server.events(path, "").await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut events = Events { answer, text: String::new() };
    let (id, first) = events.next().await;
    assert_eq!((&first["type"], &first["recovered"]), (&json!("ok"), &json!(false)), "{id} {first}");
    for n in 0..3 {
        server.ingest("chat.messages", &chat(n)).await;
    }
    let (mut last, mut found, mut has_snapshot) = (String::new(), Vec::new(), false);
    while found.len() < 2 || !has_snapshot {
        let (id, frame) = events.next().await;
        has_snapshot |= frame["event"]["type"] == "STATE_SNAPSHOT";
        if found.len() < 2 {
            found.extend(numbers(&frame));
            last = id;
        }
    }
    assert_eq!(found, [0, 1]);
    drop(events);
    let mut events = Events { answer: server.events(path, &last).await, text: String::new() };
    let mut found = Vec::new();
    while found.is_empty() {
        let (_, frame) = events.next().await;
        if frame["type"] == "ok" && frame["channel"] == "streams/chat.messages" {
            assert_eq!(frame["recovered"], true, "{frame}");
        }
        found.extend(numbers(&frame));
    }
    assert_eq!(found, [2]);
    for (path, status, code) in [
        ("/api/v1/workspaces/acme/events", 400, "bad_parameter"),
        ("/api/v1/workspaces/acme/events?channel=alert", 404, "unknown_channel"),
        ("/api/v1/workspaces/acme/events?channel=alerts&channel=alerts", 400, "bad_parameter"),
        ("/api/v1/workspaces/acme/events?channel=alerts&rate=soon", 400, "bad_request"),
        ("/api/v1/workspaces/acme/events?channels=alerts", 400, "unknown_parameter"),
        ("/api/v1/workspaces/other/events?channel=alerts", 404, "workspace_not_found"),
        ("/api/v1/workspaces/acme/events?channel=query/q", 400, "bad_request"),
    ] {
        let (found, problem) = server.call(Method::GET, path, Value::Null).await;
        assert_eq!((found.as_u16(), problem["code"].as_str()), (status, Some(code)), "{path}: {problem}");
    }
    server.stop().await;
}

#[tokio::test]
async fn who_follows_a_channel_is_counted_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut watcher = server.socket().await;
    watcher.subscribe("presence/alerts", Value::Null).await;
    let snapshot = watcher.until(|frame| frame["event"]["type"] == "STATE_SNAPSHOT").await;
    assert_eq!(snapshot["event"]["snapshot"], json!({"count": 0, "users": {}}));
    let mut others = Vec::new();
    for _ in 0..2 {
        let mut other = server.socket().await;
        other.subscribe("alerts", Value::Null).await;
        others.push(other);
    }
    let says = |frame: &Value, path: &str, wanted: Value| {
        frame["event"]["delta"]
            .as_array()
            .is_some_and(|ops| ops.iter().any(|op| op["path"] == path && op["value"] == wanted))
    };
    let there = watcher.until(|frame| says(frame, "/count", json!(2))).await;
    assert!(says(&there, "/users", json!({crate::harness::EMAIL: 2})), "{there}");
    drop(others);
    watcher.until(|frame| says(frame, "/count", json!(0))).await;
    server.stop().await;
}

#[tokio::test]
async fn a_live_query_sends_what_changed_and_its_errors_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    server.ingest("chat.messages", &(chat(1) + &chat(2))).await;
    let mut socket = server.socket().await;
    let sql = "SELECT sender, count(*) AS n FROM chat.messages GROUP BY sender";
    let subscribe = |name: &str, sql: &str| json!({"type": "subscribe", "workspace": "acme", "channel": name, "sql": sql, "rate": "250ms", "ref": name});
    socket.send(subscribe("query/q", sql)).await;
    let snapshot = socket.until(|frame| frame["event"]["type"] == "STATE_SNAPSHOT").await;
    assert_eq!(snapshot["event"]["snapshot"]["rows"]["0"], json!({"sender": "s", "n": 2}), "{snapshot}");
    server.ingest("chat.messages", &chat(3)).await;
    let delta = socket.until(|frame| frame["event"]["type"] == "STATE_DELTA").await;
    assert_eq!(
        delta["event"]["delta"],
        json!([{"op": "add", "path": "/rows/0", "value": {"sender": "s", "n": 3}}]),
        "{delta}"
    );
    for sql in ["SELEC 1", "SELECT * FROM nothing", "DROP TABLE chat.messages"] {
        socket.send(subscribe("query/bad", sql)).await;
        let refused = socket.until(|frame| frame["ref"] == "query/bad").await;
        assert_eq!(refused["type"], "error", "{sql}: {refused}");
    }
    server.stop().await;
}

#[tokio::test]
async fn connections_are_bounded_by_user_workspace_and_address() {
    for (key, expected) in [("user", 4), ("workspace", 4), ("address", 4)] {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::with_workspace_and(directory.path(), |config| match key {
            "user" => config.limits.connections_per_user = expected,
            "workspace" => config.limits.connections_per_workspace = expected,
            _ => config.limits.connections_per_address = expected,
        })
        .await;
        let mut open = Vec::new();
        for _ in 0..expected {
            let mut socket = server.socket().await;
            socket.subscribe("alerts", Value::Null).await;
            open.push(socket);
        }
        let url = format!("{}/api/v1/ws", server.url.replace("http", "ws"));
        let limit = format!("limits.connections_per_{key} = {expected}");
        match connect_async(&url).await {
            Err(error) => {
                let text = format!("{error:?}");
                assert!(key == "address" && text.contains("429"), "{key}: {text}");
            }
            Ok((socket, _)) => {
                let mut socket = Socket::of(socket);
                socket.send(json!({"type": "auth", "token": server.token, "ref": "a"})).await;
                let frame = json!({"type": "subscribe", "workspace": "acme", "channel": "alerts", "ref": "s"});
                if key == "workspace" {
                    socket.send(frame).await;
                }
                let refused = socket.until(|frame| frame["type"] == "error").await;
                assert_eq!(refused["code"], "too_many_connections", "{key}: {refused}");
                assert!(refused["detail"].as_str().unwrap().contains(&limit), "{refused}");
                if key == "user" {
                    assert_eq!(socket.next().await["close"], 1013);
                }
            }
        }
        // the place of one that left is free again
        drop(open.pop());
        let mut waited = 0;
        loop {
            let Ok((socket, _)) = connect_async(&url).await else {
                waited += 1;
                assert!(waited < 200, "{key}: no place became free");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let mut socket = Socket::of(socket);
            socket.send(json!({"type": "auth", "token": server.token, "ref": "a"})).await;
            let answer = socket.until(|frame| frame["ref"] == "a").await;
            if answer["type"] == "ok" {
                socket.subscribe("system/throughput", Value::Null).await;
                break;
            }
            waited += 1;
            assert!(waited < 200, "{key}: no place became free");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server.stop().await;
    }
}

/// What is sent, as first bytes and payloads, and the code that the server closes with.
type Case<'a> = (&'a str, &'a [(u8, &'a [u8])], u16);

/// A connection on which any bytes can be sent.
struct Raw(TcpStream);

impl Raw {
    async fn open(server: &Server) -> Raw {
        let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
        let request = format!(
            "GET /api/v1/ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             authorization: Bearer {}\r\n\r\n",
            server.token
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(WAIT, stream.read_u8()).await.unwrap().unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.starts_with("http/1.1 101 ") && head.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
        Raw(stream)
    }

    /// A masked frame; a client may be cut off while it still sends.
    async fn send(&mut self, first: u8, payload: &[u8]) -> bool {
        let mask = [1, 2, 3, 4];
        let mut frame = vec![first];
        match payload.len() {
            short @ 0..=125 => frame.push(0x80 | short as u8),
            middle @ 126..=0xffff => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&(middle as u16).to_be_bytes());
            }
            long => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&(long as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(&mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.0.write_all(&frame).await.is_ok()
    }

    /// The next frame: its first byte and its payload.
    async fn next(&mut self) -> (u8, Vec<u8>) {
        let read = async {
            let (first, length) = (self.0.read_u8().await?, self.0.read_u8().await?);
            let length = match length {
                126 => u64::from(self.0.read_u16().await?),
                127 => self.0.read_u64().await?,
                short => u64::from(short),
            };
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await?;
            Ok::<_, std::io::Error>((first, payload))
        };
        timeout(WAIT, read).await.expect("a frame in time").expect("a frame")
    }

    /// The code and reason with which the server closes.
    async fn closed(&mut self) -> (u16, String) {
        loop {
            let (first, payload) = self.next().await;
            if first == 0x88 {
                let reason = String::from_utf8(payload[2..].to_vec()).unwrap();
                return (u16::from_be_bytes([payload[0], payload[1]]), reason);
            }
        }
    }
}

#[tokio::test]
async fn frames_that_no_client_sends_end_their_connection_with_the_code_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace_and(directory.path(), |config| config.limits.frame_bytes = 64 << 10).await;
    let cases: [Case<'_>; 9] = [
        ("a reserved bit", &[(0xc1, b"{}")], 1002),
        ("an unknown opcode", &[(0x83, b"")], 1002),
        ("a control frame in parts", &[(0x09, b"")], 1002),
        ("a long control frame", &[(0x89, &[0; 126])], 1002),
        ("nothing to continue", &[(0x80, b"x")], 1002),
        ("a message within a message", &[(0x01, b"x"), (0x81, b"x")], 1002),
        ("no UTF-8", &[(0x81, b"\xff\xfe")], 1007),
        ("a bad code", &[(0x88, &[0, 1])], 1002),
        ("too large", &[(0x82, &[0; 65 << 10])], 1009),
    ];
    for (what, frames, code) in cases {
        let mut raw = Raw::open(&server).await;
        for (first, payload) in frames {
            raw.send(*first, payload).await;
        }
        let (found, reason) = raw.closed().await;
        assert_eq!(found, code, "{what}: {reason}");
        if code == 1009 {
            assert!(reason.contains("limits.frame_bytes = 65536"), "{reason}");
        }
    }
    let mut raw = Raw::open(&server).await;
    raw.0.write_all(&[0x81, 2, b'{', b'}']).await.unwrap();
    assert_eq!(raw.closed().await.0, 1002, "unmasked");
    // a flood of parts is ended at the limit, whatever each of them carries
    let mut raw = Raw::open(&server).await;
    raw.send(0x01, b"x").await;
    let mut sent = 0;
    while sent < 70_000 && raw.send(0x00, b"x").await {
        sent += 1;
    }
    assert_eq!(raw.closed().await.0, 1009);
    // pings are answered with what they carry, within a message too, and others are not disturbed
    let mut raw = Raw::open(&server).await;
    raw.send(0x01, b"{\"type\":").await;
    raw.send(0x89, b"are you there").await;
    assert_eq!(raw.next().await, (0x8a, b"are you there".to_vec()));
    raw.send(0x80, b"\"ping\",\"ref\":1}").await;
    let (first, payload) = raw.next().await;
    assert_eq!((first, serde_json::from_slice::<Value>(&payload).unwrap()), (0x81, json!({"type": "ok", "ref": 1})));
    raw.send(0x88, &[3, 232]).await;
    assert_eq!(raw.closed().await.0, 1000);
    server.stop().await;
}

#[tokio::test]
async fn messages_that_cannot_be_served_are_refused_by_name_and_the_connection_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace_and(directory.path(), |config| config.limits.subscriptions = 2).await;
    // a workspace of somebody else
    server.ok(Method::POST, "/api/v1/workspaces", json!({"id": "foreign", "name": "Foreign"})).await;
    let keys = "/api/v1/workspaces/acme/keys";
    let key = server.ok(Method::POST, keys, json!({"name": "reader", "role": "viewer"})).await;
    let key = key["key"].as_str().unwrap();
    let url = format!("{}/api/v1/ws", server.url.replace("http", "ws"));
    let mut request = url.as_str().into_client_request().unwrap();
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    let mut socket = Socket::of(connect_async(request).await.unwrap().0);
    let trade = json!([{"symbol": "A", "price": 1, "qty": 1}]);
    for (frame, code) in [
        (json!("no object"), "bad_frame"),
        (json!({"type": 7}), "bad_frame"),
        (json!({"type": "dance"}), "unknown_type"),
        (json!({"type": "subscribe", "workspace": "acme"}), "bad_request"),
        (json!({"type": "subscribe", "workspace": "acme", "channel": "metrics/nothing"}), "unknown_metric"),
        (json!({"type": "subscribe", "workspace": "acme", "channel": "nothing"}), "unknown_channel"),
        (
            json!({"type": "subscribe", "workspace": "acme", "channel": "streams/chat.messages?color=red"}),
            "unknown_parameter",
        ),
        (json!({"type": "subscribe", "workspace": "acme", "channel": "alerts", "rate": "fast"}), "bad_request"),
        (json!({"type": "subscribe", "workspace": "foreign", "channel": "alerts"}), "workspace_not_found"),
        (json!({"type": "subscribe", "workspace": "missing", "channel": "alerts"}), "workspace_not_found"),
        (json!({"type": "subscribe", "channel": "system/actors"}), "forbidden"),
        (json!({"type": "publish", "workspace": "acme", "stream": "market.trades", "events": trade}), "forbidden"),
        (
            json!({"type": "publish", "workspace": "foreign", "stream": "market.trades", "events": trade}),
            "workspace_not_found",
        ),
        (json!({"type": "run", "workspace": "acme", "agent": "analyst", "input": {}}), "forbidden"),
    ] {
        let mut frame = frame;
        if frame.is_object() {
            frame["ref"] = json!("r");
        }
        socket.send(frame.clone()).await;
        let refused = socket.until(|frame| frame["type"] == "error").await;
        assert_eq!(refused["code"], code, "{frame}: {refused}");
        assert!(refused["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{refused}");
        assert_eq!(refused.get("ref").is_some(), frame.is_object(), "{refused}");
    }
    for channel in ["alerts", "streams/chat.messages"] {
        socket.subscribe(channel, Value::Null).await;
    }
    socket
        .send(json!({"type": "subscribe", "workspace": "acme", "channel": "streams/market.trades", "ref": "u"}))
        .await;
    let refused = socket.until(|frame| frame["ref"] == "u").await;
    assert_eq!(refused["code"], "too_many_subscriptions");
    assert!(refused["detail"].as_str().unwrap().contains("limits.subscriptions"), "{refused}");
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_say_who_it_is_in_time_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let url = format!("{}/api/v1/ws", server.url.replace("http", "ws"));
    let mut silent = Socket::of(connect_async(&url).await.unwrap().0);
    let mut forged = Socket::of(connect_async(&url).await.unwrap().0);
    forged.send(json!({"type": "auth", "token": "forged"})).await;
    assert_eq!(forged.next().await["code"], "unauthorized");
    assert_eq!(forged.next().await["close"], 4001);
    assert_eq!(silent.next().await["close"], 4001);
    server.stop().await;
}

#[tokio::test]
async fn the_same_messages_come_as_messagepack_where_that_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let url = format!("{}/api/v1/ws", server.url.replace("http", "ws"));
    let mut request = url.as_str().into_client_request().unwrap();
    let protocols = format!("tidewatch.v1.msgpack, bearer.{}", server.token);
    request.headers_mut().insert("sec-websocket-protocol", protocols.parse().unwrap());
    let (mut socket, answer) = connect_async(request).await.unwrap();
    assert_eq!(answer.headers()["sec-websocket-protocol"], "tidewatch.v1.msgpack");
    let subscribe = json!({"type": "subscribe", "workspace": "acme", "channel": "streams/chat.messages", "ref": 1});
    socket.send(Message::Binary(rmp_serde::to_vec(&subscribe).unwrap().into())).await.unwrap();
    let mut next = async || loop {
        match timeout(WAIT, socket.next()).await.unwrap().unwrap().unwrap() {
            Message::Binary(bytes) => break rmp_serde::from_slice::<Value>(&bytes).unwrap(),
            Message::Text(text) => panic!("text: {text}"),
            _ => {}
        }
    };
    let answer = next().await;
    assert_eq!((&answer["type"], &answer["ref"]), (&json!("ok"), &json!(1)));
    server.ingest("chat.messages", &chat(7)).await;
    assert_eq!(numbers(&next().await), [7]);
    // what JSON would not pass is refused under the same code: a name that stands twice, and what follows the message
    let (ping, mut twice) = (rmp_serde::to_vec(&json!({"type": "ping"})).unwrap(), vec![0x82]);
    let pair = &ping[1..];
    twice.extend([pair, pair].concat());
    for (bad, why) in [(twice, "duplicate field `type`"), ([ping.as_slice(), &[0xc0]].concat(), "1 bytes follow")] {
        socket.send(Message::Binary(bad.into())).await.unwrap();
        let refused = loop {
            match socket.next().await.unwrap().unwrap() {
                Message::Binary(bytes) => {
                    let message = rmp_serde::from_slice::<Value>(&bytes).unwrap();
                    if message["type"] == "error" {
                        break message;
                    }
                }
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused["code"], "bad_frame", "{refused}");
        assert!(refused["detail"].as_str().unwrap().contains(why), "{refused}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_drains_says_when_to_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut socket = server.socket().await;
    socket.subscribe("alerts", Value::Null).await;
    let stopping = tokio::spawn(server.stop());
    let hint = socket.until(|frame| frame["type"] == "reconnect").await;
    assert!(hint["after_ms"].as_u64().is_some_and(|ms| ms < 10_000), "{hint}");
    assert_eq!(socket.next().await["close"], 1012);
    drop(socket);
    stopping.await.unwrap();
}

#[tokio::test]
async fn many_publications_without_waiting_for_answers_keep_their_order() {
    const COUNT: usize = 2_000;
    let directory = tempfile::tempdir().unwrap();
    let server = Server::with_workspace(directory.path()).await;
    let mut follower = server.socket().await;
    follower.subscribe("streams/chat.messages", Value::Null).await;
    let mut publisher = server.socket().await;
    for n in 0..COUNT {
        let event: Value = serde_json::from_str(&chat(n)).unwrap();
        let frame =
            json!({"type": "publish", "workspace": "acme", "stream": "chat.messages", "events": [event], "ref": n});
        publisher.send(frame).await;
    }
    read_numbers(&mut follower, 0..COUNT).await;
    let mut answered = vec![false; COUNT];
    for _ in 0..COUNT {
        let answer = publisher.next().await;
        assert_eq!((&answer["type"], &answer["accepted"]), (&json!("ok"), &json!(1)), "{answer}");
        answered[answer["ref"].as_u64().unwrap() as usize] = true;
    }
    assert!(answered.iter().all(|answered| *answered));
    server.stop().await;
}
