//! What clients get that come back, or ask for a run that is over: all of it, once, in order.

use super::*;

const STREAM: &str = "streams/chat.messages";

fn subscribe(channel: &str, since: Value) -> Value {
    json!({
        "type": "subscribe", "workspace": "acme", "channel": channel, "ref": "s", "since": since,
        "protocolVersion": "1.0",
    })
}

async fn signed_in(listening: &Listening, token: &str) -> Socket {
    let mut socket = listening.connect().await;
    assert_eq!(ask(&mut socket, json!({"type": "auth", "token": token})).await["type"], "ok");
    socket
}

/// Sends so many chat messages, numbered on from `first`, in one request.
async fn send(server: &Server, token: &str, first: usize, count: usize, bytes: usize) {
    let text = |n: usize| format!("{n:06} {}", "x".repeat(bytes));
    let events: Vec<Value> =
        (first..first + count).map(|n| json!({"thread": "t", "sender": "s", "text": text(n)})).collect();
    let at = "/api/v1/workspaces/acme/streams/chat.messages/events";
    let sent = server.call("POST", at, token, json!(events)).await;
    assert_eq!((sent.status, &sent.body["accepted"]), (200, &json!(count)), "{}", sent.body);
}

fn numbers(message: &Value) -> impl Iterator<Item = usize> {
    let events = message["event"]["value"]["events"].as_array().cloned().unwrap_or_default();
    events.into_iter().map(|event| event["text"].as_str().unwrap()[..6].parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_far_behind_gets_every_event_from_the_log_and_then_the_live_ones() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, root) = listening.signed_in().await;
    let start = ask(&mut socket, subscribe(STREAM, Value::Null)).await;
    drop(socket);
    // a large record, and many small ones: much more than memory holds for anybody
    send(&listening.server, &root, 0, 4_000, 500).await;
    for n in 0..100 {
        send(&listening.server, &root, 4_000 + n * 10, 10, 5_000).await;
    }
    let mut back = signed_in(&listening, &root).await;
    let since = json!({"epoch": start["epoch"], "offset": start["offset"]});
    let answer = ask(&mut back, subscribe(STREAM, since.clone())).await;
    assert_eq!((&answer["recovered"], &answer["offset"]), (&json!(true), &start["offset"]), "{answer}");
    let reading = async {
        let (mut next, mut offset) = (0, start["offset"].as_u64());
        while next < 5_500 {
            let message = hear(&mut back).await;
            assert!(message["offset"].as_u64() > offset, "{} after {offset:?}", message["offset"]);
            offset = message["offset"].as_u64();
            for n in numbers(&message) {
                assert_eq!(n, next);
                next += 1;
            }
        }
    };
    let sending = async {
        for n in 0..50 {
            send(&listening.server, &root, 5_000 + n * 10, 10, 1_000).await;
        }
    };
    tokio::join!(reading, sending);
    // and once more, by somebody who looks at few of them
    let mut filtered = signed_in(&listening, &root).await;
    let none = ask(&mut filtered, subscribe(&format!("{STREAM}?sender=nobody"), since)).await;
    assert_eq!(none["recovered"], true, "{none}");
    let alone = json!([{"thread": "t", "sender": "nobody", "text": "000001"}]);
    let at = "/api/v1/workspaces/acme/streams/chat.messages/events";
    assert_eq!(listening.server.call("POST", at, &root, alone).await.status, 200);
    assert_eq!(numbers(&hear(&mut filtered).await).collect::<Vec<_>>(), [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ids_of_server_sent_events_hold_the_places_of_silent_channels_too() {
    let listening = Listening::start(Limits::default()).await;
    let (_, root) = listening.signed_in().await;
    let follow = async |last: &str| {
        let path = "/api/v1/workspaces/acme/events?channel=alerts&channel=streams/chat.messages";
        let request = Request::builder().uri(path).header("authorization", format!("Bearer {root}"));
        let request = request.header("last-event-id", last).body(Body::empty()).unwrap();
        listening.server.router.clone().oneshot(request).await.unwrap().into_body().into_data_stream()
    };
    let ids = |text: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.strip_prefix("id: ")).map(str::to_owned).collect()
    };
    let mut events = follow("").await;
    let mut known = Vec::new();
    while known.last().is_none_or(|id: &String| id.ends_with(",-")) {
        known.extend(ids(str::from_utf8(&events.next().await.unwrap().unwrap()).unwrap()));
    }
    drop(events);
    let last = known.pop().unwrap();
    let mut events = follow(&last).await;
    let first = ids(str::from_utf8(&events.next().await.unwrap().unwrap()).unwrap());
    assert_eq!(first[0], last, "nothing was sent since");
}

fn run(thread: &str, id: &str, version: Value) -> Value {
    let input = json!({
        "threadId": thread, "runId": id, "protocolVersion": version,
        "messages": [{"id": format!("m{id}"), "role": "user", "content": "How many alerts are there?"}],
    });
    json!({"type": "run", "workspace": "acme", "agent": "analyst", "input": input, "ref": id})
}

/// The messages of a thread up to the end of a run, in the order of their offsets.
async fn to_the_end(socket: &mut Socket) -> Vec<Value> {
    let mut messages: Vec<Value> = Vec::new();
    loop {
        let message = hear(socket).await;
        if message["type"] != "event" {
            assert_ne!(message["type"], "error", "{message}");
            continue;
        }
        if let Some(before) = messages.last() {
            assert!(message["offset"].as_u64() > before["offset"].as_u64(), "{message} after {before}");
        }
        let is_end = ["RUN_FINISHED", "RUN_ERROR"].iter().any(|end| message["event"]["type"] == *end);
        messages.push(message);
        if is_end {
            return messages;
        }
    }
}

fn events(messages: &[Value]) -> Vec<Value> {
    messages.iter().map(|message| message["event"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_over_is_shown_again_to_whoever_asks_for_it_and_to_nobody_else() {
    let listening = Listening::start(Limits::default()).await;
    let (mut first, root) = listening.signed_in().await;
    tell(&mut first, run("t", "r", json!("1.0"))).await;
    let seen = to_the_end(&mut first).await;
    assert_eq!(seen[0]["event"]["type"], "RUN_STARTED");

    let mut second = signed_in(&listening, &root).await;
    // as somebody new, and as somebody who follows the thread already
    for _ in 0..2 {
        tell(&mut second, run("t", "r", json!("1.0"))).await;
        assert_eq!(events(&to_the_end(&mut second).await), events(&seen));
    }
    // both get the next run, from the start to the end, and the first nothing of what was shown again
    tell(&mut first, run("t", "next", json!("1.0"))).await;
    let next = to_the_end(&mut first).await;
    assert_eq!(next[0]["event"]["runId"], "next");
    assert_eq!(to_the_end(&mut second).await, next);

    // what a thread holds, without a run
    let mut recall = run("t", "recall", json!("1.0"));
    recall["input"]["messages"] = json!([]);
    tell(&mut second, recall).await;
    let held = to_the_end(&mut second).await;
    assert!(held.iter().any(|message| message["event"]["type"] == "MESSAGES_SNAPSHOT"), "{held:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_a_thread_whose_place_is_lost_gets_the_last_run_to_its_end() {
    let listening = Listening::start(Limits::default()).await;
    let (mut first, root) = listening.signed_in().await;
    for id in ["one", "two"] {
        tell(&mut first, run("t", id, json!("1.0"))).await;
        to_the_end(&mut first).await;
    }
    let mut back = signed_in(&listening, &root).await;
    // that of a process before this one
    let since = json!({"epoch": "of-another-process", "offset": 7});
    let answer = ask(&mut back, subscribe("thread/t", since)).await;
    assert_eq!((&answer["type"], &answer["recovered"]), (&json!("ok"), &json!(false)), "{answer}");
    let shown = to_the_end(&mut back).await;
    assert_eq!(shown[0]["event"]["runId"], "two", "{shown:?}");
    // whoever lost the connection within what was shown again gets it again; at its end nothing is missing
    for (at, recovered) in [(0, false), (shown.len() - 1, true)] {
        let since = json!({"epoch": shown[at]["epoch"], "offset": shown[at]["offset"]});
        let mut again = signed_in(&listening, &root).await;
        let answer = ask(&mut again, subscribe("thread/t", since)).await;
        assert_eq!(answer["recovered"], recovered, "{answer}");
        if !recovered {
            assert_eq!(events(&to_the_end(&mut again).await), events(&shown));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_alerts_whose_place_is_lost_gets_what_is_firing_and_then_the_live_ones() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, root) = listening.signed_in().await;
    let at = |path: &str| format!("/api/v1/workspaces/acme/{path}");
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 hour')";
    let rule = json!({"metric": "volume", "condition": "volume > 1"});
    for (path, body) in [("metrics/volume", json!({"sql": sql})), ("alert-rules/busy", rule)] {
        let made = listening.server.call("PUT", &at(path), &root, body).await;
        assert_eq!(made.status, 200, "{path}: {}", made.body);
    }
    assert_eq!(ask(&mut socket, subscribe("alerts", Value::Null)).await["recovered"], false);
    let trade = async |symbol: &str| {
        let trade = json!([{"symbol": symbol, "price": 1, "qty": 2}]);
        assert_eq!(listening.server.call("POST", &at("streams/market.trades/events"), &root, trade).await.status, 200);
    };
    trade("A").await;
    let fired = hear(&mut socket).await;
    assert_eq!(fired["event"]["name"], "alert.firing", "{fired}");
    let listed = async || listening.server.get(&at("alerts?state=firing"), &root).await.body["alerts"].clone();
    while listed().await.as_array().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut back = signed_in(&listening, &root).await;
    // that of a process before this one
    let since = json!({"epoch": "of-another-process", "offset": 7});
    let answer = ask(&mut back, subscribe("alerts", since)).await;
    assert_eq!((&answer["type"], &answer["recovered"]), (&json!("ok"), &json!(false)), "{answer}");
    let snapshot = hear(&mut back).await;
    assert_eq!(snapshot["event"]["type"], "STATE_SNAPSHOT", "{snapshot}");
    assert_eq!(snapshot["event"]["snapshot"]["alerts"], listed().await);
    assert_eq!((&snapshot["epoch"], &snapshot["offset"]), (&answer["epoch"], &answer["offset"]));
    trade("B").await;
    let next = hear(&mut back).await;
    assert_eq!(next["event"]["name"], "alert.firing", "{next}");
    assert_eq!(next["offset"].as_u64(), snapshot["offset"].as_u64().map(|at| at + 1));
    // whoever is where the snapshot was has everything before it
    let mut again = signed_in(&listening, &root).await;
    let since = json!({"epoch": snapshot["epoch"], "offset": snapshot["offset"]});
    assert_eq!(ask(&mut again, subscribe("alerts", since)).await["recovered"], true);
    assert_eq!(hear(&mut again).await["event"], next["event"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_follower_of_a_run_is_told_in_its_own_dialect() {
    let listening = Listening::start(Limits::default()).await;
    let (mut old, root) = listening.signed_in().await;
    let mut new = signed_in(&listening, &root).await;
    assert_eq!(ask(&mut new, subscribe("thread/t", Value::Null)).await["type"], "ok");
    let mut silent = signed_in(&listening, &root).await;
    let plain = json!({"type": "subscribe", "workspace": "acme", "channel": "thread/t", "ref": "s"});
    assert_eq!(ask(&mut silent, plain).await["type"], "ok");
    tell(&mut old, run("t", "r", Value::Null)).await;
    let legacy = to_the_end(&mut old).await;
    assert_eq!(to_the_end(&mut silent).await, legacy, "0.0.59 where no version is named");
    let current = to_the_end(&mut new).await;
    let of = |messages: &[Value]| {
        let (first, last) = (messages[0]["event"].clone(), messages[messages.len() - 1]["event"].clone());
        (first["protocolVersion"].clone(), last["outcome"]["type"].clone())
    };
    assert_eq!(of(&legacy), (Value::Null, Value::Null));
    assert_eq!(of(&current), (json!("1.0"), json!("success")));
    let offsets = |messages: &[Value]| messages.iter().map(|message| message["offset"].clone()).collect::<Vec<_>>();
    assert_eq!(offsets(&legacy), offsets(&current));
    // shown again in the dialect of whoever asks
    tell(&mut new, run("t", "r", Value::Null)).await;
    assert_eq!(events(&to_the_end(&mut new).await), events(&legacy));
    tell(&mut old, run("t", "r", json!("1.0"))).await;
    assert_eq!(events(&to_the_end(&mut old).await), events(&current));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_refused_leaves_nothing_behind() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, _) = listening.signed_in().await;
    let mut refused = run("t", "r", json!("1.0"));
    refused["agent"] = "nobody".into();
    let answer = ask(&mut socket, refused).await;
    assert_eq!((&answer["code"], &answer["ref"]), (&json!("unknown_agent"), &json!("r")), "{answer}");
    let end = json!({"type": "unsubscribe", "workspace": "acme", "channel": "thread/t"});
    assert_eq!(ask(&mut socket, end).await["code"], "not_subscribed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_with_two_filters_is_there_once() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, _) = listening.signed_in().await;
    for filter in ["", "?sender=a", "?sender=b"] {
        let answer = ask(&mut socket, subscribe(&format!("{STREAM}{filter}"), Value::Null)).await;
        assert_eq!(answer["type"], "ok", "{answer}");
    }
    assert_eq!(ask(&mut socket, subscribe(&format!("presence/{STREAM}"), Value::Null)).await["type"], "ok");
    let snapshot = hear(&mut socket).await["event"]["snapshot"].clone();
    assert_eq!(snapshot, json!({"count": 1, "users": {"root@example.com": 1}}));
}
