//! Who may follow and send what over the WebSocket and over server-sent events, and until when.

use super::*;
use axum::body::BodyDataStream;

fn subscribe(channel: &str) -> Value {
    json!({"type": "subscribe", "workspace": "acme", "channel": channel, "ref": channel})
}

fn trade() -> Value {
    json!([{"symbol": "A", "price": 1, "qty": 2}])
}

fn publish(stream: &str, events: Value) -> Value {
    json!({"type": "publish", "workspace": "acme", "stream": stream, "events": events, "ref": "publish"})
}

/// What the server says first that is no event of a channel.
async fn answer(socket: &mut Socket, message: Value) -> Value {
    tell(socket, message).await;
    loop {
        let heard = hear(socket).await;
        if heard["type"] != "event" {
            return heard;
        }
    }
}

async fn signed_in(listening: &Listening, token: &str) -> Socket {
    let mut socket = listening.connect().await;
    assert_eq!(ask(&mut socket, json!({"type": "auth", "token": token})).await["type"], "ok");
    socket
}

/// A workspace with something of each kind; tokens of its owner and of Bob, who is no member yet.
async fn workspace() -> (Listening, String, String) {
    let listening = Listening::start(Limits::default()).await;
    let (_, root) = listening.signed_in().await;
    let bob = listening.server.user(&root, "bob@example.com").await;
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 minute')";
    for (method, path, body) in [
        ("PUT", "metrics/volume", json!({"sql": sql})),
        ("POST", "portfolios", json!({"id": "main"})),
        ("POST", "portfolios", json!({"id": "secret"})),
    ] {
        let made = listening.server.call(method, &format!("/api/v1/workspaces/acme/{path}"), &root, body).await;
        assert!(made.status < 300, "{path}: {}", made.body);
    }
    (listening, root, bob)
}

async fn give_role(listening: &Listening, root: &str, role: &str) {
    let body = json!({"email": "bob@example.com", "role": role});
    assert_eq!(listening.server.call("PUT", "/api/v1/workspaces/acme/members", root, body).await.status, 200);
}

async fn grant(listening: &Listening, root: &str, scope: &str) {
    let body = json!({"email": "bob@example.com", "scope": scope});
    assert_eq!(listening.server.call("PUT", "/api/v1/workspaces/acme/grants", root, body).await.status, 200);
}

async fn key(listening: &Listening, root: &str, key: Value) -> String {
    let made = listening.server.call("POST", "/api/v1/workspaces/acme/keys", root, key).await;
    made.body["key"].as_str().unwrap_or_else(|| panic!("{}", made.body)).to_owned()
}

/// Server-sent events as they come.
struct Events {
    body: BodyDataStream,
    text: String,
}

impl Events {
    /// Follows a channel, or tells the status and code with which that is refused.
    async fn follow(listening: &Listening, token: &str, channel: &str) -> Result<Events, (u16, String)> {
        let channel = channel.replace(' ', "%20");
        let request = Request::builder().uri(format!("/api/v1/workspaces/acme/events?channel={channel}"));
        let request = request.header("authorization", format!("Bearer {token}")).body(Body::empty()).unwrap();
        let response = listening.server.router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        if status == 200 {
            return Ok(Events { body: response.into_body().into_data_stream(), text: String::new() });
        }
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let problem: Value = serde_json::from_slice(&bytes).unwrap();
        Err((status, problem["code"].as_str().unwrap().to_owned()))
    }

    /// The next message; nothing at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let data = event.lines().find_map(|line| line.strip_prefix("data: "));
                let message = data.map(|data| serde_json::from_str(data).unwrap());
                self.text = rest.to_owned();
                match message {
                    Some(message) => return Some(message),
                    None => continue,
                }
            }
            let piece = tokio::time::timeout(Duration::from_secs(20), self.body.next()).await.unwrap()?.unwrap();
            self.text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_follows_the_channels_that_it_may_read_and_sends_nothing_that_it_may_not() {
    let (listening, root, bob) = workspace().await;
    let channels = [
        ("streams/market.trades", "viewer"),
        ("alerts", "viewer"),
        ("presence/alerts", "viewer"),
        ("metrics/volume", "viewer limited_partner"),
        ("portfolio/main", "viewer limited_partner"),
        ("presence/metrics/volume", "viewer limited_partner"),
        ("thread/t", ""),
        ("presence/thread/t", ""),
    ];
    for role in ["viewer", "limited_partner", "guest"] {
        give_role(&listening, &root, role).await;
        let mut socket = signed_in(&listening, &bob).await;
        for (channel, roles) in channels {
            let may = roles.split(' ').any(|known| known == role);
            let told = answer(&mut socket, subscribe(channel)).await;
            let code = if may { Value::Null } else { json!("forbidden") };
            assert_eq!((&told["code"], &told["ref"]), (&code, &json!(channel)), "{role}: {told}");
            let followed = Events::follow(&listening, &bob, channel).await.map(drop);
            let expected = if may { Ok(()) } else { Err((403, "forbidden".to_owned())) };
            assert_eq!(followed, expected, "{role} {channel}");
        }
        let query = json!({
            "type": "subscribe", "workspace": "acme", "channel": "query/q", "ref": "q",
            "sql": "SELECT count(*) AS n FROM market.trades",
        });
        let code = if role == "viewer" { Value::Null } else { json!("forbidden") };
        assert_eq!(answer(&mut socket, query).await["code"], code, "{role}");
        let input = json!({"threadId": "t", "runId": "r", "messages": []});
        for refused in [
            publish("market.trades", trade()),
            json!({"type": "run", "workspace": "acme", "agent": "analyst", "input": input}),
            json!({"type": "cancel", "workspace": "acme", "run_id": "r"}),
        ] {
            assert_eq!(answer(&mut socket, refused.clone()).await["code"], "forbidden", "{role}: {refused}");
        }
    }
    let log = listening.server.get("/api/v1/workspaces/acme/audit", &root).await;
    let refusals = log.body["entries"].as_array().unwrap().iter();
    let of_frames = refusals.filter(|entry| entry["action"] == "ws publish" && entry["outcome"] == "forbidden");
    assert_eq!(of_frames.count(), 1, "those of a minute are one: {}", log.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_opens_one_channel_and_a_scope_leaves_one() {
    let (listening, root, bob) = workspace().await;
    for scope in ["portfolio:read@portfolio/main", "metric:read@metrics/volume", "stream:ingest@streams/market.trades"]
    {
        grant(&listening, &root, scope).await;
    }
    let reader = json!({"name": "k", "role": "member", "scopes": [
        "query:run", "stream:read@streams/market.trades", "stream:ingest@streams/market.trades",
    ]});
    let key = key(&listening, &root, reader).await;
    let mut guest = signed_in(&listening, &bob).await;
    for (channel, may) in [
        ("portfolio/main", true),
        ("portfolio/secret", false),
        ("metrics/volume", true),
        ("metrics/volume?symbol=A", true),
        ("metrics/other", false),
        ("streams/market.trades", false),
        ("alerts", false),
        // who else is there is not for guests
        ("presence/metrics/volume", false),
        ("query/q", false),
    ] {
        let told = answer(&mut guest, subscribe(channel)).await;
        assert_eq!(told["type"] == "ok", may, "{channel}: {told}");
        assert_eq!(Events::follow(&listening, &bob, channel).await.is_ok(), may, "{channel}");
    }
    assert_eq!(answer(&mut guest, publish("market.trades", trade())).await["accepted"], 1);
    assert_eq!(answer(&mut guest, publish("chat.messages", json!([]))).await["code"], "forbidden");

    let mut machine = signed_in(&listening, &key).await;
    assert_eq!(answer(&mut machine, subscribe("streams/market.trades")).await["type"], "ok");
    assert_eq!(answer(&mut machine, subscribe("streams/chat.messages")).await["code"], "forbidden");
    for (table, may) in
        [("market.trades", true), ("chat.messages", false), ("volume", false), ("metrics.volume", false)]
    {
        let sql = format!("SELECT count(*) AS n FROM {table}");
        let mut live = subscribe("query/q");
        live["sql"] = sql.as_str().into();
        let told = answer(&mut machine, live).await;
        assert_eq!(told["type"] == "ok", may, "{table}: {told}");
        let channel = format!("query/q&sql={sql}");
        assert_eq!(Events::follow(&listening, &key, &channel).await.is_ok(), may, "{table}");
        let once = listening.server.call("POST", "/api/v1/workspaces/acme/query", &key, json!({"sql": sql})).await;
        assert_eq!(once.status == 200, may, "{table}: {}", once.body);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_may_see_the_value_of_a_portfolio_gets_none_of_its_positions() {
    let (listening, root, bob) = workspace().await;
    grant(&listening, &root, "fund:performance:read@portfolio/main").await;
    let hold = async |qty: u32| {
        let positions = json!([
            {"symbol": "HIDDEN", "qty": qty, "cost": 10, "sector": "tech"}, {"symbol": "UNPRICED", "qty": 1, "cost": 1},
        ]);
        let at = "/api/v1/workspaces/acme/portfolios/main/positions";
        assert_eq!(listening.server.call("PUT", at, &root, positions).await.status, 200);
    };
    hold(2).await;
    let price = json!([{"symbol": "HIDDEN", "price": 30, "qty": 1}]);
    let at = "/api/v1/workspaces/acme/streams/market.trades/events";
    assert_eq!(listening.server.call("POST", at, &root, price).await.status, 200);
    let summary =
        async |token: &str| listening.server.get("/api/v1/workspaces/acme/portfolios/main/summary", token).await.body;
    // the owner first: what is kept of it is the same for all
    while summary(&root).await["value"] != 60.0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(summary(&root).await["positions"].to_string().contains("HIDDEN"));
    let value = summary(&bob).await;
    assert_eq!((&value["value"], &value["unpriced_count"]), (&json!(60.0), &json!(1)), "{value}");
    assert!(value["allocation"]["sector"]["tech"].is_number(), "{value}");
    let names_none =
        |told: &Value| !["HIDDEN", "UNPRICED", "positions"].iter().any(|name| told.to_string().contains(name));
    assert!(names_none(&value), "{value}");

    let (mut mine, mut his) = (signed_in(&listening, &root).await, signed_in(&listening, &bob).await);
    let full = answer(&mut mine, subscribe("portfolio/main")).await;
    let cut = answer(&mut his, subscribe("portfolio/main")).await;
    let mut events = Events::follow(&listening, &bob, "portfolio/main").await.map_err(drop).unwrap();
    assert!(hear(&mut mine).await.to_string().contains("HIDDEN"));
    let snapshot = hear(&mut his).await;
    assert_eq!(snapshot["event"]["snapshot"]["value"], 60.0, "{snapshot}");
    assert!(names_none(&snapshot), "{snapshot}");
    // the changes too, in all ways
    hold(3).await;
    assert!(hear(&mut mine).await.to_string().contains("HIDDEN"));
    let delta = hear(&mut his).await;
    assert_eq!((&delta["event"]["type"], names_none(&delta)), (&json!("STATE_DELTA"), true), "{delta}");
    loop {
        let told = events.next().await.unwrap();
        assert!(names_none(&told), "{told}");
        if told["event"]["type"] == "STATE_DELTA" || told["event"]["snapshot"]["value"] == 90.0 {
            break;
        }
    }
    // a place in the one form is none in the other
    let mut back = subscribe("portfolio/main");
    back["since"] = json!({"epoch": full["epoch"], "offset": full["offset"]});
    let again = answer(&mut his, back).await;
    assert_eq!((&again["recovered"], &again["epoch"]), (&json!(false), &cut["epoch"]), "{again}");

    // whoever loses the positions while they follow them is told so, and gets the value when they come again
    grant(&listening, &root, "portfolio:read@portfolio/main").await;
    let mut reader = signed_in(&listening, &bob).await;
    assert_eq!(answer(&mut reader, subscribe("portfolio/main")).await["epoch"], full["epoch"]);
    assert!(hear(&mut reader).await.to_string().contains("HIDDEN"));
    let at = "/api/v1/workspaces/acme/grants?email=bob@example.com&scope=portfolio:read@portfolio/main";
    assert_eq!(listening.server.call("DELETE", at, &root, Value::Null).await.status, 204);
    hold(4).await;
    assert_eq!(hear(&mut reader).await["code"], "forbidden");
    assert_eq!(answer(&mut reader, subscribe("portfolio/main")).await["epoch"], cut["epoch"]);
    assert!(names_none(&hear(&mut reader).await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metric_shows_nobody_what_they_may_not_read() {
    let (listening, root, bob) = workspace().await;
    for scope in ["metric:define@metrics/mine", "metric:read@metrics/mine", "stream:read@streams/market.trades"] {
        grant(&listening, &root, scope).await;
    }
    let define = async |table: &str| {
        let sql = format!("SELECT count(*) AS n FROM {table} GROUP BY tumble(ts, INTERVAL '1 minute')");
        let at = "/api/v1/workspaces/acme/metrics/mine";
        listening.server.call("PUT", at, &bob, json!({"sql": sql})).await.status
    };
    assert_eq!(define("chat.messages").await, 403);
    assert_eq!(define("metrics.volume").await, 403);
    assert_eq!(define("market.trades").await, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_agents_did_is_read_by_those_alone_who_may_run_them() {
    let (listening, root, _) = workspace().await;
    let all = ["stream:read", "query:run", "metric:read", "metric:define", "portfolio:read", "alert:read"];
    let with = |more: &[&str]| {
        let scopes = [&all[..], more].concat();
        json!({"name": "k", "role": "member", "scopes": scopes})
    };
    let (reader, asker) = (key(&listening, &root, with(&[])).await, key(&listening, &root, with(&["ai:use"])).await);
    let narrow = json!({"name": "k", "role": "member", "scopes": ["query:run", "metric:read"]});
    let narrow = key(&listening, &root, narrow).await;
    let at = |path: &str| format!("/api/v1/workspaces/acme/{path}");
    for (token, may) in [(&root, true), (&asker, true), (&reader, false)] {
        let mut socket = signed_in(&listening, token).await;
        for channel in ["streams/agent.events", "streams/agent.events?run=r"] {
            assert_eq!(answer(&mut socket, subscribe(channel)).await["type"] == "ok", may, "{channel}");
            assert_eq!(Events::follow(&listening, token, channel).await.is_ok(), may, "{channel}");
        }
        for table in ["agent.events", "AGENT.Events", "\"agent\".\"events\"", "\"agent.events\""] {
            let sql = format!("SELECT count(*) AS n FROM market.trades t, {table} e");
            let asked = listening.server.call("POST", &at("query"), token, json!({"sql": sql})).await;
            assert_eq!(asked.status != 403, may, "{table}: {}", asked.body);
            let mut live = subscribe("query/q");
            live["sql"] = sql.into();
            assert_eq!(answer(&mut socket, live).await["code"] != "forbidden", may, "{table}");
        }
        let sql = "SELECT count(*) AS n FROM agent.events GROUP BY tumble(ts, INTERVAL '1 minute')";
        let defined = listening.server.call("PUT", &at("metrics/runs"), token, json!({"sql": sql})).await;
        assert_eq!(defined.status == 200, may, "{}", defined.body);
        let letters = listening.server.get(&at("dead-letters?stream=agent.events"), token).await;
        assert_eq!(letters.status == 200, may, "{}", letters.body);
        // every other stream stays open
        assert_eq!(answer(&mut socket, subscribe("streams/market.trades")).await["type"], "ok");
        assert_eq!(listening.server.get(&at("dead-letters"), token).await.status, 200);
    }
    // a stream is one by whatever way its name is written
    for table in ["\"market.trades\"", "\"ref.positions\""] {
        let sql = format!("SELECT count(*) AS n FROM {table}");
        assert_eq!(
            listening.server.call("POST", &at("query"), &narrow, json!({"sql": sql})).await.status,
            403,
            "{table}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_is_read_by_those_who_may_read_what_agents_read() {
    let (listening, root, _) = workspace().await;
    let mut socket = signed_in(&listening, &root).await;
    let input = json!({
        "threadId": "t", "runId": "r", "protocolVersion": "1.0",
        "messages": [{"id": "m", "role": "user", "content": "How many alerts are there?"}],
    });
    tell(&mut socket, ask_agent(input)).await;
    end_of_run(&mut socket).await;
    let all = ["ai:use", "metric:read", "stream:read", "portfolio:read", "alert:read", "query:run"];
    let narrow = key(&listening, &root, json!({"name": "k", "role": "member", "scopes": ["ai:use"]})).await;
    let wide = key(&listening, &root, json!({"name": "k", "role": "member", "scopes": all})).await;
    for (token, may) in [(&narrow, false), (&wide, true)] {
        for path in ["threads", "threads/t/messages", "runs/r/events"] {
            let read = listening.server.get(&format!("/api/v1/workspaces/acme/{path}"), token).await;
            assert_eq!(read.status, if may { 200 } else { 403 }, "{path}: {}", read.body);
        }
        let mut socket = signed_in(&listening, token).await;
        assert_eq!(answer(&mut socket, subscribe("thread/t")).await["type"] == "ok", may);
        assert_eq!(Events::follow(&listening, token, "thread/t").await.is_ok(), may);
        // which agents there are is told to both
        assert_eq!(listening.server.get("/api/v1/workspaces/acme/agents", token).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_with_scopes_sees_people_and_usage_only_if_it_manages_them() {
    let (listening, root, bob) = workspace().await;
    give_role(&listening, &root, "viewer").await;
    let scoped = |scope: &str| json!({"name": "k", "role": "owner", "scopes": [scope, "stream:read"]});
    let collector = key(&listening, &root, scoped("stream:ingest")).await;
    let manager = key(&listening, &root, scoped("workspace:manage")).await;
    let whole = key(&listening, &root, json!({"name": "k", "role": "viewer"})).await;
    for (token, may) in [(&collector, false), (&manager, true), (&whole, true), (&bob, true)] {
        for path in ["members", "usage"] {
            let read = listening.server.get(&format!("/api/v1/workspaces/acme/{path}"), token).await;
            assert_eq!(read.status, if may { 200 } else { 403 }, "{path}: {}", read.body);
        }
        let followed = Events::follow(&listening, token, "presence/streams/market.trades").await;
        assert_eq!(followed.is_ok(), may);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_withdrawn_ends_before_the_next_message() {
    let (listening, root, bob) = workspace().await;
    let scope = "stream:read@streams/market.trades";
    grant(&listening, &root, scope).await;
    grant(&listening, &root, "metric:read@metrics/volume").await;
    let mut socket = signed_in(&listening, &bob).await;
    for channel in ["metrics/volume", "streams/market.trades"] {
        assert_eq!(answer(&mut socket, subscribe(channel)).await["type"], "ok");
    }
    let mut events = Events::follow(&listening, &bob, "streams/market.trades").await.map_err(drop).unwrap();
    let send = async || {
        let at = "/api/v1/workspaces/acme/streams/market.trades/events";
        assert_eq!(listening.server.call("POST", at, &root, trade()).await.status, 200);
    };
    let is_stream = |message: &Value| message["channel"] == "streams/market.trades";
    send().await;
    while hear(&mut socket).await["event"]["name"] != "stream.events" {}
    while events.next().await.unwrap()["event"]["name"] != "stream.events" {}

    let at = format!("/api/v1/workspaces/acme/grants?email=bob@example.com&scope={scope}");
    assert_eq!(listening.server.call("DELETE", &at, &root, Value::Null).await.status, 204);
    send().await;
    let told = loop {
        let heard = hear(&mut socket).await;
        if is_stream(&heard) {
            break heard;
        }
    };
    assert_eq!((&told["type"], &told["code"]), (&json!("error"), &json!("forbidden")), "{told}");
    // the other channel goes on
    send().await;
    loop {
        let heard = hear(&mut socket).await;
        assert!(!is_stream(&heard), "{heard}");
        if heard["channel"] == "metrics/volume" && heard["type"] == "event" {
            break;
        }
    }
    let told = events.next().await.unwrap();
    assert_eq!((&told["channel"], &told["code"]), (&json!("streams/market.trades"), &json!("forbidden")), "{told}");
    assert_eq!(events.next().await, None);
    assert!(Events::follow(&listening, &bob, "streams/market.trades").await.is_err());

    // somebody who is no member any more, and somebody who has signed out
    let me = listening.server.get("/api/v1/me", &bob).await.body["user"]["id"].as_str().unwrap().to_owned();
    let removed = format!("/api/v1/workspaces/acme/members/{me}");
    assert_eq!(listening.server.call("DELETE", &removed, &root, Value::Null).await.status, 204);
    send().await;
    let told = loop {
        let heard = hear(&mut socket).await;
        if heard["type"] == "error" {
            break heard;
        }
    };
    assert_eq!((&told["channel"], &told["code"]), (&json!("metrics/volume"), &json!("workspace_not_found")), "{told}");
    let mut mine = signed_in(&listening, &root).await;
    assert_eq!(answer(&mut mine, subscribe("streams/market.trades")).await["type"], "ok");
    let other = listening.server.token("root@example.com").await;
    let everywhere = json!({"everywhere": true});
    assert_eq!(listening.server.call("POST", "/api/v1/auth/logout", &root, everywhere).await.status, 204);
    assert_eq!(listening.server.get("/api/v1/me", &other).await.status, 401);
    assert_eq!(closed(&mut mine).await, 4001);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_follows_a_workspace_that_is_deleted_is_told_so_at_once_though_nothing_else_comes() {
    let (listening, root, bob) = workspace().await;
    give_role(&listening, &root, "viewer").await;
    let mut socket = signed_in(&listening, &bob).await;
    assert_eq!(answer(&mut socket, subscribe("alerts")).await["type"], "ok");
    let mut events = Events::follow(&listening, &bob, "alerts").await.map_err(drop).unwrap();
    assert_eq!(events.next().await.unwrap()["type"], "ok");
    assert_eq!(listening.server.call("DELETE", "/api/v1/workspaces/acme", &root, Value::Null).await.status, 204);
    let soon = Duration::from_secs(5); // rights are looked at again after 15 s or 25 s in any case
    for told in [
        tokio::time::timeout(soon, hear(&mut socket)).await.unwrap(),
        tokio::time::timeout(soon, events.next()).await.unwrap().unwrap(),
    ] {
        let named = (&told["type"], &told["workspace"], &told["channel"], &told["code"]);
        assert_eq!(named, (&json!("error"), &json!("acme"), &json!("alerts"), &json!("workspace_not_found")), "{told}");
    }
    assert_eq!(events.next().await, None);
    // the connection is good for other workspaces
    assert_eq!(ask(&mut socket, json!({"type": "ping"})).await["type"], "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_workspace_of_the_same_name_shows_nothing_of_the_one_before() {
    let (listening, root, bob) = workspace().await;
    let server = &listening.server;
    let at = "/api/v1/workspaces/acme";
    let sent = server.call("POST", &format!("{at}/streams/market.trades/events"), &root, trade()).await;
    assert_eq!(sent.body["accepted"], 1);
    let mut before = signed_in(&listening, &root).await;
    for channel in ["alerts", "metrics/volume"] {
        assert_eq!(answer(&mut before, subscribe(channel)).await["type"], "ok");
    }
    while !hear(&mut before).await["event"].to_string().contains("\"symbol\":\"A\"") {}
    assert_eq!(server.call("DELETE", at, &root, Value::Null).await.status, 204);

    assert_eq!(server.call("POST", "/api/v1/workspaces", &bob, json!({"id": "acme"})).await.status, 201);
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 minute')";
    let defined = server.call("PUT", &format!("{at}/metrics/volume"), &bob, json!({"sql": sql})).await;
    assert_eq!(defined.status, 200, "{}", defined.body);
    let mut after = signed_in(&listening, &bob).await;
    assert_eq!(answer(&mut after, subscribe("metrics/volume")).await["type"], "ok");
    let snapshot = hear(&mut after).await;
    assert_eq!(snapshot["event"]["snapshot"], json!({"rows": {}}), "{snapshot}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refresh_token_that_comes_twice_ends_what_is_connected_by_its_sign_in() {
    let (listening, root, _) = workspace().await;
    let tokens = listening.server.sign_in("root@example.com").await.body;
    let access = tokens["access_token"].as_str().unwrap();
    let mut socket = signed_in(&listening, access).await;
    assert_eq!(answer(&mut socket, subscribe("streams/market.trades")).await["type"], "ok");
    let mut events = Events::follow(&listening, access, "streams/market.trades").await.map_err(drop).unwrap();
    let mut other = signed_in(&listening, &root).await;
    let refresh = async || {
        let body = json!({"refresh_token": tokens["refresh_token"]});
        listening.server.call("POST", "/api/v1/auth/refresh", "", body).await.status
    };
    assert_eq!((refresh().await, refresh().await), (200, 401));
    assert_eq!(closed(&mut socket).await, 4001);
    let at = "/api/v1/workspaces/acme/streams/market.trades/events";
    assert_eq!(listening.server.call("POST", at, &root, trade()).await.status, 200);
    assert_eq!(events.next().await.unwrap()["code"], "unauthorized");
    assert_eq!(events.next().await, None, "nothing of what came behind the reuse");
    assert_eq!(ask(&mut other, json!({"type": "ping"})).await["type"], "ok", "the user's other sign-in goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_ends_with_its_credentials_however_busy_it_is() {
    let (listening, root, _) = workspace().await;
    let end = engine::event::Micros(actors::clock::Clock::now(&SystemClock).0 + 2_500_000);
    let body = json!({"name": "k", "role": "member", "expires_at": actors::rows::rfc3339(end)});
    let short = key(&listening, &root, body).await;
    let (mut idle, mut busy) = (signed_in(&listening, &short).await, signed_in(&listening, &short).await);
    assert_eq!(answer(&mut busy, subscribe("streams/market.trades")).await["type"], "ok");
    let mut events = Events::follow(&listening, &short, "streams/market.trades").await.map_err(drop).unwrap();
    let server = listening.server.router.clone();
    let load = tokio::spawn(async move {
        loop {
            let request = Request::builder().method("POST").uri("/api/v1/workspaces/acme/streams/market.trades/events");
            let request = request.header("authorization", format!("Bearer {root}"));
            let request = request.header("content-type", "application/json");
            let request = request.body(Body::from(trade().to_string())).unwrap();
            assert_eq!(server.clone().oneshot(request).await.unwrap().status(), 200);
        }
    });
    let ended = async {
        let mut last = Value::Null;
        while let Some(message) = events.next().await {
            last = message;
        }
        last
    };
    let all = async { tokio::join!(closed(&mut idle), closed(&mut busy), ended) };
    let (idle, busy, last) = tokio::time::timeout(Duration::from_secs(20), all).await.expect("all end");
    assert_eq!((idle, busy), (4002, 4002));
    assert_eq!((&last["type"], &last["code"]), (&json!("error"), &json!("unauthorized")), "{last}");
    assert!(last["detail"].as_str().unwrap().contains("expired"), "{last}");
    load.abort();
    let refused = Events::follow(&listening, &short, "alerts").await.err();
    assert_eq!(refused, Some((401, "unauthorized".to_owned())));
    let mut late = listening.connect().await;
    assert_eq!(ask(&mut late, json!({"type": "auth", "token": short})).await["code"], "unauthorized");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_counts_for_the_tier_as_what_is_posted_does() {
    let (listening, root, bob) = workspace().await;
    give_role(&listening, &root, "member").await;
    let tier = json!({"tier": "free"});
    assert_eq!(listening.server.call("PATCH", "/api/v1/workspaces/acme", &root, tier).await.status, 200);
    let mut socket = signed_in(&listening, &bob).await;
    let many: Vec<Value> = (0..9_000).map(|_| json!({"symbol": "A", "price": 1, "qty": 1})).collect();
    for _ in 0..2 {
        assert_eq!(answer(&mut socket, publish("market.trades", json!(many))).await["accepted"], 9_000);
    }
    assert_eq!(answer(&mut socket, publish("market.trades", trade())).await["code"], "ingest_rate");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_query_counts_for_the_tier_as_one_that_is_asked_once_does() {
    let (listening, root, bob) = workspace().await;
    give_role(&listening, &root, "member").await;
    let tier = json!({"tier": "free"});
    assert_eq!(listening.server.call("PATCH", "/api/v1/workspaces/acme", &root, tier).await.status, 200);
    let sql = "SELECT count(*) AS n FROM market.trades";
    let mut live = subscribe("query/q");
    live["sql"] = sql.into();
    let mut socket = signed_in(&listening, &bob).await;
    for _ in 0..28 {
        assert_eq!(answer(&mut socket, live.clone()).await["type"], "ok");
    }
    let channel = format!("query/q&sql={sql}");
    assert!(Events::follow(&listening, &bob, &channel).await.is_ok());
    let at = "/api/v1/workspaces/acme/query";
    assert_eq!(listening.server.call("POST", at, &bob, json!({"sql": sql})).await.status, 200);
    assert_eq!(answer(&mut socket, live).await["code"], "quota_exceeded");
    let refused = Events::follow(&listening, &bob, &channel).await.err();
    assert_eq!(refused, Some((429, "quota_exceeded".to_owned())));
    assert_eq!(answer(&mut socket, ask_agent(long_run("r"))).await["code"], "quota_exceeded");
    // what only looks is free
    assert_eq!(answer(&mut socket, subscribe("alerts")).await["type"], "ok");
}

/// A run of the analyst that takes some seconds.
fn long_run(id: &str) -> Value {
    let question = "Write a long and very detailed analysis, at least forty sentences";
    json!({
        "threadId": format!("thread-{id}"), "runId": id, "protocolVersion": "1.0",
        "messages": [{"id": "m", "role": "user", "content": question}],
    })
}

fn ask_agent(input: Value) -> Value {
    json!({"type": "run", "workspace": "acme", "agent": "analyst", "input": input, "ref": "run"})
}

/// The event that ends a run.
async fn end_of_run(socket: &mut Socket) -> Value {
    loop {
        let event = hear(socket).await["event"].clone();
        if ["RUN_FINISHED", "RUN_ERROR"].iter().any(|end| event["type"] == *end) {
            return event;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_stopped_by_who_started_it_and_by_an_admin_of_agents() {
    let (listening, root, bob) = workspace().await;
    give_role(&listening, &root, "member").await;
    let (mut mine, mut his) = (signed_in(&listening, &root).await, signed_in(&listening, &bob).await);
    tell(&mut mine, ask_agent(long_run("r"))).await;
    while hear(&mut mine).await["ref"] != "run" {}
    let at = "/api/v1/workspaces/acme/runs/r/cancel";
    let refused = listening.server.call("POST", at, &bob, Value::Null).await;
    assert_eq!((refused.status, refused.code()), (403, "forbidden"));
    assert!(refused.body["detail"].as_str().unwrap().contains("ai:admin"), "{}", refused.body);
    let cancel = |run: &str| json!({"type": "cancel", "workspace": "acme", "run_id": run});
    assert_eq!(answer(&mut his, cancel("r")).await["code"], "forbidden");
    // his own
    tell(&mut his, ask_agent(long_run("own"))).await;
    while hear(&mut his).await["ref"] != "run" {}
    assert_eq!(answer(&mut his, cancel("own")).await["type"], "ok");
    assert_eq!(end_of_run(&mut his).await["outcome"]["type"], "cancelled");
    // an admin's right reaches the runs of others
    tell(&mut his, ask_agent(long_run("other"))).await;
    while hear(&mut his).await["ref"] != "run" {}
    let at = "/api/v1/workspaces/acme/runs/other/cancel";
    assert_eq!(listening.server.call("POST", at, &root, Value::Null).await.status, 202);
    assert_eq!(end_of_run(&mut his).await["outcome"]["type"], "cancelled");
    assert_eq!(listening.server.call("POST", at.replace("other", "r").as_str(), &root, Value::Null).await.status, 202);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_stops_asking_gets_nothing_more_either() {
    let (listening, root, bob) = workspace().await;
    let scope = "stream:read@streams/market.trades";
    grant(&listening, &root, scope).await;
    let mut socket = signed_in(&listening, &bob).await;
    assert_eq!(answer(&mut socket, subscribe("streams/market.trades")).await["type"], "ok");
    let (mut asks, mut hears) = socket.split();
    let elsewhere = json!({"type": "subscribe", "workspace": "elsewhere", "channel": "metrics/volume"}).to_string();
    let asking = tokio::spawn(async move { while asks.send(Message::text(elsewhere.clone())).await.is_ok() {} });
    let mut hear = async || {
        let heard = tokio::time::timeout(Duration::from_secs(20), hears.next()).await.unwrap().unwrap().unwrap();
        serde_json::from_str::<Value>(heard.to_text().unwrap()).unwrap()
    };
    for _ in 0..200 {
        assert_eq!(hear().await["code"], "workspace_not_found", "there is always one to be answered");
    }
    let at = format!("/api/v1/workspaces/acme/grants?email=bob@example.com&scope={scope}");
    assert_eq!(listening.server.call("DELETE", &at, &root, Value::Null).await.status, 204);
    let at = "/api/v1/workspaces/acme/streams/market.trades/events";
    assert_eq!(listening.server.call("POST", at, &root, trade()).await.status, 200);
    let told = loop {
        let heard = hear().await;
        if heard["code"] != "workspace_not_found" || heard["channel"] != Value::Null {
            break heard;
        }
    };
    assert_eq!((&told["type"], &told["channel"]), (&json!("error"), &json!("streams/market.trades")), "{told}");
    asking.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_sent_away_leaves_the_store_to_the_others() {
    let (listening, root, bob) = workspace().await;
    grant(&listening, &root, "stream:read@streams/market.trades").await;
    let at = "/api/v1/workspaces/acme/streams/market.trades/events";
    let long = json!([{"symbol": "A", "price": 1, "qty": 2, "side": "x".repeat(60_000)}]);
    let mut gone = Vec::new();
    for _ in 0..3 {
        let mut socket = signed_in(&listening, &bob).await;
        assert_eq!(answer(&mut socket, subscribe("streams/market.trades")).await["type"], "ok");
        let (mut asks, hears) = socket.split();
        let elsewhere = json!({"type": "subscribe", "workspace": "elsewhere", "channel": "alerts"}).to_string();
        // each is refused, which is written to the audit log; what is answered is not read
        let asking = tokio::spawn(async move { while asks.send(Message::text(elsewhere.clone())).await.is_ok() {} });
        gone.push((asking, hears));
    }
    for _ in 0..100 {
        assert_eq!(listening.server.call("POST", at, &root, long.clone()).await.status, 200);
    }
    for attempt in 0..10 {
        let began = std::time::Instant::now();
        give_role(&listening, &root, if attempt % 2 == 0 { "viewer" } else { "analyst" }).await;
        assert!(began.elapsed() < Duration::from_secs(5), "attempt {attempt} took {:?}", began.elapsed());
    }
    gone.into_iter().for_each(|(asking, _)| asking.abort());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_or_may_do_less_takes_the_keys_along_that_may_do_more() {
    let (listening, root, bob) = workspace().await;
    let (server, ws) = (&listening.server, "/api/v1/workspaces/acme");
    let key = async |token: &str, role: &str| {
        let made = server.call("POST", &format!("{ws}/keys"), token, json!({"name": role, "role": role})).await;
        made.body["key"].as_str().unwrap_or_else(|| panic!("{}", made.body)).to_owned()
    };
    let works = async |key: &str| server.get(ws, key).await.status == 200;
    give_role(&listening, &root, "admin").await;
    let (strong, weak) = (key(&bob, "admin").await, key(&bob, "viewer").await);
    let (child, other) = (key(&strong, "member").await, key(&root, "admin").await);
    give_role(&listening, &root, "viewer").await;
    assert!(!works(&strong).await && !works(&child).await && works(&weak).await && works(&other).await);
    let gone = server.call("DELETE", &format!("{ws}/members/bob@example.com"), &root, Value::Null).await;
    assert_eq!(gone.status, 204);
    assert!(!works(&weak).await && works(&other).await);
}

#[tokio::test]
async fn nobody_takes_a_role_that_may_do_more_than_they_may() {
    let (listening, root, _) = workspace().await;
    give_role(&listening, &root, "owner").await;
    let (server, ws) = (&listening.server, "/api/v1/workspaces/acme");
    let new = json!({"name": "few", "role": "owner", "scopes": ["workspace:manage", "metric:read"]});
    let made = server.call("POST", &format!("{ws}/keys"), &root, new).await.body;
    let key = made["key"].as_str().unwrap();
    let demote = json!({"email": "bob@example.com", "role": "guest"});
    assert_eq!(server.call("PUT", &format!("{ws}/members"), key, demote).await.status, 403);
    let remove = server.call("DELETE", &format!("{ws}/members/bob@example.com"), key, Value::Null).await;
    assert_eq!(remove.status, 403, "{}", remove.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_query_that_ended_leaves_its_place_whatever_its_rate() {
    let listening = Listening::start(Limits { live_queries: 2, ..Limits::default() }).await;
    let (mut socket, _) = listening.signed_in().await;
    for n in 0..6 {
        let mut live = subscribe(&format!("query/{n}"));
        live["sql"] = "SELECT 1 AS one".into();
        live["rate"] = "1d".into();
        let begun = answer(&mut socket, live).await;
        assert_eq!(begun["type"], "ok", "{begun}");
        let mut end = subscribe(&format!("query/{n}"));
        end["type"] = "unsubscribe".into();
        assert_eq!(answer(&mut socket, end).await["type"], "ok");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portfolio_that_was_deleted_is_shown_to_nobody_and_another_of_its_name_is() {
    let (listening, root, _) = workspace().await;
    let mut socket = signed_in(&listening, &root).await;
    let until = async |socket: &mut Socket, wanted: &dyn Fn(&Value) -> bool| loop {
        let heard = hear(socket).await;
        if wanted(&heard["event"]) {
            return;
        }
    };
    assert_eq!(answer(&mut socket, subscribe("portfolio/main")).await["type"], "ok");
    until(&mut socket, &|event| event["snapshot"]["currency"] == "USD").await;
    let at = "/api/v1/workspaces/acme/portfolios";
    let gone = listening.server.call("DELETE", &format!("{at}/main"), &root, Value::Null).await;
    assert_eq!(gone.status, 204);
    until(&mut socket, &|event| event["snapshot"] == json!({})).await;
    let mut other = signed_in(&listening, &root).await;
    assert_eq!(answer(&mut other, subscribe("portfolio/main")).await["code"], "unknown_portfolio");
    let again = json!({"id": "main", "currency": "EUR"});
    assert_eq!(listening.server.call("POST", at, &root, again).await.status, 201);
    until(&mut socket, &|event| event["delta"].to_string().contains("EUR")).await;
    assert_eq!(answer(&mut other, subscribe("portfolio/main")).await["type"], "ok");
    until(&mut other, &|event| event["snapshot"]["currency"] == "EUR").await;
}

/// Subscribes again and again until the rows of the snapshot are these: what was sent is computed a moment later.
async fn snapshot_until(listening: &Listening, token: &str, channel: &str, wanted: &[&str]) {
    for left in (0..100).rev() {
        let mut socket = signed_in(listening, token).await;
        assert_eq!(answer(&mut socket, subscribe(channel)).await["type"], "ok");
        let heard = hear(&mut socket).await;
        let rows = heard["event"]["snapshot"]["rows"].as_object();
        if rows.is_some_and(|rows| rows.keys().eq(wanted)) {
            return;
        }
        assert!(left > 0, "{channel}: {heard}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_the_first_of_a_window_who_comes_late_has_those_of_the_newest_too() {
    let (listening, root, _) = workspace().await;
    let ws = "/api/v1/workspaces/acme";
    let sql = "SELECT symbol, sum(qty) AS volume FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 minute') \
               ORDER BY volume DESC LIMIT 2";
    let definition = json!({"sql": sql, "max_delay": "0s"});
    let made = listening.server.call("PUT", &format!("{ws}/metrics/top"), &root, definition).await;
    assert!(made.status < 300, "{}", made.body);
    let send = async |minute: i64, symbols: [&str; 2]| {
        let ts = 1_790_000_040_000_i64 + minute * 60_000;
        let events = symbols.map(|symbol| json!({"ts": ts, "symbol": symbol, "price": 1, "qty": 1}));
        let at = format!("{ws}/streams/market.trades/events");
        assert_eq!(listening.server.call("POST", &at, &root, json!(events)).await.status, 200);
    };
    send(0, ["A", "B"]).await;
    send(1, ["C", "D"]).await;
    snapshot_until(&listening, &root, "metrics/top", &["C", "D"]).await;
    snapshot_until(&listening, &root, "metrics/top?symbol=C", &["C"]).await;
    snapshot_until(&listening, &root, "metrics/top?symbol=A", &[]).await;
    // of other metrics each key's last row, also one of long before
    for minute in 2..8 {
        send(minute, ["C", "D"]).await;
    }
    snapshot_until(&listening, &root, "metrics/volume", &["A", "B", "C", "D"]).await;
    snapshot_until(&listening, &root, "metrics/volume?symbol=A", &["A"]).await;
}
