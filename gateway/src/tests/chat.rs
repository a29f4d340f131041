//! The sockets of existing chat clients: what they are asked, and what guards them.

use super::*;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

const PATHS: [&str; 2] = ["/ai/agents/analyst/stream?workspace=acme", "/api/v1/ai/chat/SESSION?workspace=acme"];

/// Opens a chat with these headers, or tells with which status and code that is refused.
async fn open(listening: &Listening, path: &str, headers: &[(&'static str, &str)]) -> Result<Socket, (u16, String)> {
    // each chat on a thread of its own: runs of one thread wait for each other
    let url = listening.url.replace("/api/v1/ws", &path.replace("SESSION", &uuid::Uuid::new_v4().to_string()));
    let mut request = url.as_str().into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    match tokio_tungstenite::connect_async(request).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(answer)) => {
            let problem: Value = serde_json::from_slice(answer.body().as_deref().unwrap_or_default()).unwrap();
            Err((answer.status().as_u16(), problem["code"].as_str().unwrap().to_owned()))
        }
        Err(other) => panic!("{other:?}"),
    }
}

async fn chat(listening: &Listening, path: &str, token: &str) -> Socket {
    open(listening, path, &[("authorization", &format!("Bearer {token}"))]).await.unwrap()
}

async fn server(limits: Limits) -> (Listening, String) {
    let listening = Listening::start(limits).await;
    let (_, root) = listening.signed_in().await;
    (listening, root)
}

/// Sends a question and waits until its answer has begun.
async fn begin(socket: &mut Socket) {
    tell(socket, json!({"query": "Write a long and very detailed analysis, at least forty sentences"})).await;
    let begun = hear(socket).await;
    assert_eq!(begun["type"], "RUN_STARTED", "{begun}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_are_answered_with_bare_events_one_run_after_the_other() {
    let (listening, root) = server(Limits::default()).await;
    for path in PATHS {
        let mut socket = open(&listening, path, &[]).await.unwrap();
        tell(&mut socket, json!({"type": "auth", "token": root})).await;
        for _ in 0..2 {
            tell(&mut socket, json!({"query": "How many alerts are there?"})).await;
        }
        let mut types = Vec::new();
        while types.iter().filter(|kind| **kind == "RUN_FINISHED").count() < 2 {
            types.push(hear(&mut socket).await["type"].as_str().unwrap().to_owned());
        }
        let second = types.iter().rposition(|kind| kind == "RUN_STARTED").unwrap();
        assert_eq!(types[second - 1], "RUN_FINISHED", "{types:?}");
        assert_eq!(ask(&mut socket, json!([])).await["code"], "bad_frame");
        assert_eq!(ask(&mut socket, json!({"type": "cancel", "run_id": "none"})).await["code"], "unknown_run");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_ends_with_the_access_that_it_was_opened_with() {
    let (listening, root) = server(Limits::default()).await;
    let bob = listening.server.user(&root, "bob@example.com").await;
    let ws = "/api/v1/workspaces/acme";
    for path in PATHS {
        // a key that is revoked
        let new = json!({"name": "chat", "role": "member"});
        let made = listening.server.call("POST", &format!("{ws}/keys"), &root, new).await.body;
        let key = made["key"].as_str().unwrap();
        let (mut busy, mut idle) = (chat(&listening, path, key).await, chat(&listening, path, key).await);
        begin(&mut busy).await;
        let at = format!("{ws}/keys/{}", made["id"].as_str().unwrap());
        assert_eq!(listening.server.call("DELETE", &at, &root, Value::Null).await.status, 204);
        assert_eq!(closed(&mut busy).await, 4001);
        tell(&mut idle, json!({"query": "How many alerts are there?"})).await;
        assert_eq!(closed(&mut idle).await, 4001);

        // somebody who may not talk to agents any more
        let role = json!({"email": "bob@example.com", "role": "member"});
        assert_eq!(listening.server.call("PUT", &format!("{ws}/members"), &root, role).await.status, 200);
        let mut socket = chat(&listening, path, &bob).await;
        begin(&mut socket).await;
        let role = json!({"email": "bob@example.com", "role": "viewer"});
        assert_eq!(listening.server.call("PUT", &format!("{ws}/members"), &root, role).await.status, 200);
        assert_eq!(closed(&mut socket).await, 4003);
        let refused = open(&listening, path, &[("authorization", &format!("Bearer {bob}"))]).await.err();
        assert_eq!(refused, Some((403, "forbidden".to_owned())));
        let log = listening.server.get(&format!("{ws}/audit"), &root).await.body;
        let denied = |entry: &&Value| entry["action"] == "ws chat" && entry["outcome"] == "forbidden";
        let entry = log["entries"].as_array().unwrap().iter().find(denied).unwrap_or_else(|| panic!("{log}"));
        assert_eq!((&entry["actor"], &entry["from"]), (&json!("bob@example.com"), &json!("127.0.0.1")));
        assert_ne!(entry["request_id"], "");

        // somebody who signs out
        let own = listening.server.token("root@example.com").await;
        let mut socket = chat(&listening, path, &own).await;
        begin(&mut socket).await;
        assert_eq!(listening.server.call("POST", "/api/v1/auth/logout", &own, Value::Null).await.status, 204);
        assert_eq!(closed(&mut socket).await, 4001);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guards_of_the_websocket_are_those_of_chats_too() {
    let limits = Limits { connections_per_user: 2, frame_bytes: 64 << 10, ..Limits::default() };
    let (listening, root) = server(limits).await;
    let bearer = format!("Bearer {root}");
    for path in PATHS {
        let page = [("authorization", bearer.as_str()), ("origin", "http://evil.example")];
        assert_eq!(open(&listening, path, &page).await.err(), Some((403, "origin_not_allowed".to_owned())));

        let mut one = chat(&listening, path, &root).await;
        begin(&mut one).await;
        let mut two = chat(&listening, path, &root).await;
        begin(&mut two).await;
        assert_eq!(closed(&mut chat(&listening, path, &root).await).await, 1013);

        let invalid = Frame::message(&b"\xff\xfe"[..], OpCode::Data(Data::Text), true);
        one.send(Message::Frame(invalid)).await.unwrap();
        assert_eq!(closed(&mut one).await, 1007);
        two.send(Message::text("x".repeat(65 << 10))).await.unwrap();
        assert_eq!(closed(&mut two).await, 1009);
        drop((one, two));

        let mut three = open(&listening, path, &[]).await.unwrap();
        let stray = Frame::message(&b"x"[..], OpCode::Data(Data::Continue), true);
        three.send(Message::Frame(stray)).await.unwrap();
        assert_eq!(closed(&mut three).await, 1002);
        let mut stranger = open(&listening, path, &[]).await.unwrap();
        assert_eq!(ask(&mut stranger, json!({"query": "Who am I?"})).await["code"], "unauthorized");
        assert_eq!(closed(&mut stranger).await, 4001);
    }
    let refused = open(&listening, PATHS[0], &[("authorization", "Bearer nonsense")]).await.err();
    assert_eq!(refused, Some((401, "unauthorized".to_owned())));
}
