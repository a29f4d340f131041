//! More connections and workspaces than there may be.

use super::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// Whether the server closes a connection on which nothing was said.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut [0])).await;
    !matches!(read, Err(_) | Ok(Ok(1..)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_has_so_many_connections_and_those_that_became_websockets_are_none_of_them() {
    let listening = Listening::start(Limits { http_connections_per_address: 2, ..Limits::default() }).await;
    let mut sockets = Vec::new();
    for _ in 0..4 {
        sockets.push(listening.connect().await);
    }
    let address = listening.url.trim_start_matches("ws://").split('/').next().unwrap().to_owned();
    let mut held = Vec::new();
    for _ in 0..100 {
        // the answer to a WebSocket's request is there a moment before its connection is none of them
        let mut stream = TcpStream::connect(&address).await.unwrap();
        if !is_closed(&mut stream).await {
            held.push(stream);
        }
        if held.len() == 2 {
            break;
        }
    }
    assert_eq!(held.len(), 2);
    assert!(is_closed(&mut TcpStream::connect(&address).await.unwrap()).await, "one too many");
    drop(held);
    for _ in 0..100 {
        if !is_closed(&mut TcpStream::connect(&address).await.unwrap()).await {
            return;
        }
    }
    panic!("no place became free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_owns_so_many_workspaces_however_many_are_asked_for_at_once() {
    let server = Server::with(Limits { workspaces_per_user: 3, ..Limits::default() }).await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    let make =
        async |token: &str, id: String| server.call("POST", "/api/v1/workspaces", token, json!({"id": id})).await;
    let all = futures::future::join_all((0..12).map(|n| make(&ann, format!("ann{n}")))).await;
    let (made, refused): (Vec<_>, Vec<_>) = all.iter().partition(|answer| answer.status == 201);
    assert_eq!((made.len(), refused.len()), (3, 9));
    for answer in refused {
        assert_eq!((answer.status, answer.code()), (409, "limit_reached"), "{}", answer.body);
        assert!(answer.body["detail"].as_str().unwrap().contains("limits.workspaces_per_user = 3"), "{}", answer.body);
    }
    // where somebody is only a member they own nothing
    let first = made[0].body["id"].as_str().unwrap();
    let member = json!({"email": "bob@example.com", "role": "admin"});
    assert_eq!(server.call("PUT", &format!("/api/v1/workspaces/{first}/members"), &root, member).await.status, 200);
    for n in 0..3 {
        assert_eq!(make(&bob, format!("bob{n}")).await.status, 201);
    }
    assert_eq!(make(&bob, "bob3".into()).await.code(), "limit_reached");
    for n in 0..5 {
        assert_eq!(make(&root, format!("root{n}")).await.status, 201);
    }
    // nor does anybody come to own one more by what others do
    let members = |id: &str| format!("/api/v1/workspaces/{id}/members");
    let owner = json!({"email": "bob@example.com", "role": "owner"});
    for (member, of) in [(&ann, first), (&root, "root0")] {
        let answer = server.call("PUT", &members(of), member, owner.clone()).await;
        assert_eq!((answer.status, answer.code()), (409, "limit_reached"), "{}", answer.body);
    }
    let second = made[1].body["id"].as_str().unwrap();
    assert_eq!(server.call("PUT", &members(second), &ann, owner).await.status, 200, "asked, who is no member yet");
    let second = format!("/api/v1/workspaces/{second}");
    let refused = server.call("GET", &second, &bob, Value::Null).await;
    assert_eq!((refused.status, refused.code()), (409, "limit_reached"), "{}", refused.body);
    let gone = server.call("DELETE", "/api/v1/workspaces/bob0", &bob, Value::Null).await;
    assert_eq!(gone.status, 204);
    assert_eq!(server.call("GET", &second, &bob, Value::Null).await.status, 200);
    assert_eq!(make(&bob, "bob4".into()).await.code(), "limit_reached");
    let gone = server.call("DELETE", &format!("/api/v1/workspaces/{first}"), &ann, Value::Null).await;
    assert_eq!(gone.status, 204);
    assert_eq!(make(&ann, "another".into()).await.status, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_owners_who_leave_at_once_one_stays() {
    let server = Server::with(Limits::default()).await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    for n in 0..5 {
        let at = format!("/api/v1/workspaces/w{n}");
        server.call("POST", "/api/v1/workspaces", &ann, json!({"id": format!("w{n}")})).await;
        let members = format!("{at}/members");
        let owner = json!({"email": "bob@example.com", "role": "owner"});
        assert_eq!(server.call("PUT", &members, &root, owner).await.status, 200);
        let leave = async |token: &str, email: &str| {
            server.call("DELETE", &format!("{members}/{email}"), token, Value::Null).await.status
        };
        let demote = async |token: &str, email: &str| {
            server.call("PUT", &members, token, json!({"email": email, "role": "viewer"})).await.status
        };
        let mut both = match n % 2 {
            0 => <[_; 2]>::from(tokio::join!(leave(&ann, "ann@example.com"), leave(&bob, "bob@example.com"))),
            _ => <[_; 2]>::from(tokio::join!(demote(&ann, "ann@example.com"), demote(&bob, "bob@example.com"))),
        };
        both.sort_unstable();
        assert!(both[0] < 300 && both[1] == 409, "{both:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_come_at_once_are_counted_before_they_are_taken_in() {
    let tier = Tier { events_per_second: Some(10), ..Tier::default() };
    let config = Config { tiers: [("quick".into(), tier)].into(), default_tier: "quick".into(), ..Config::default() };
    let server = Server::of(config, actors::Limits::default()).await;
    let root = server.token("root@example.com").await;
    assert_eq!(server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await.status, 201);
    let events = json!(vec![json!({"symbol": "A", "price": 1, "qty": 1}); 1_000]);
    let send = || server.call("POST", "/api/v1/workspaces/acme/streams/market.trades/events", &root, events.clone());
    let all = futures::future::join_all((0..20).map(|_| send())).await;
    assert_eq!(all.iter().filter(|answer| answer.status == 200).count(), 1);
    assert!(all.iter().filter(|answer| answer.status != 200).all(|answer| answer.code() == "ingest_rate"));
}
