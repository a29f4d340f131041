//! What is refused, in which order it is looked at, and what of it the audit log tells whom.

use super::*;

async fn raw(server: &Server, method: &str, path: &str, token: &str, body: &'static str) -> Answer {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    server.send(request.header("authorization", format!("Bearer {token}")).body(Body::from(body)).unwrap()).await
}

#[tokio::test]
async fn whoever_may_not_is_told_so_whatever_they_send() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await;
    let guest = json!({"email": "bob@example.com", "role": "guest"});
    assert_eq!(server.call("PUT", "/api/v1/workspaces/acme/members", &ann, guest).await.status, 200);
    let mut denied = 0;
    for (method, path, needs, body) in openapi::needs().filter(|(_, path, ..)| path.contains("{ws}")) {
        if needs.is_none() || body.is_null() {
            continue;
        }
        for body in ["{", "[]", "{\"no\":1}"] {
            let answer = raw(&server, &method.to_uppercase(), &named(path), &bob, body).await;
            assert_eq!((answer.status, answer.code()), (403, "forbidden"), "{method} {path} {body}: {}", answer.body);
        }
        denied += 1;
    }
    // those of a minute that are alike are one entry
    assert!(denied > 10, "{denied}");
    let log = server.get("/api/v1/workspaces/acme/audit?limit=1000", &ann).await.body;
    let refusals = log["entries"].as_array().unwrap().iter().filter(|entry| entry["outcome"] == "forbidden");
    assert_eq!(refusals.count(), denied);
    assert_eq!(raw(&server, "POST", "/api/v1/users", &bob, "{").await.status, 403);
}

#[tokio::test]
async fn a_body_is_an_object_and_what_is_wrong_with_it_names_nothing_of_ours() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    for (path, body, code) in [
        ("/api/v1/auth/login", r#"["root@example.com","correct horse",null]"#, "bad_body"),
        ("/api/v1/auth/login", "7", "bad_body"),
        ("/api/v1/auth/login", "[", "bad_json"),
        ("/api/v1/auth/login", "", "bad_json"),
        ("/api/v1/workspaces", r#"["acme"]"#, "bad_body"),
        ("/api/v1/workspaces", r#"{"id":{"a":1}}"#, "bad_body"),
    ] {
        let answer = raw(&server, "POST", path, &root, body).await;
        assert_eq!((answer.status, answer.code()), (400, code), "{body}: {}", answer.body);
        assert!(!answer.body.to_string().contains("struct"), "{body}: {}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_writes_into_the_stream_of_what_agents_did() {
    let listening = Listening::start(Limits::default()).await;
    let (mut socket, root) = listening.signed_in().await;
    let forged = json!([{"thread": "t", "run": "r", "type": "RUN_FINISHED"}]);
    let at = "/api/v1/workspaces/acme/streams/agent.events/events";
    let refused = listening.server.call("POST", at, &root, forged.clone()).await;
    assert_eq!((refused.status, refused.code()), (409, "engine_stream"), "{}", refused.body);
    let publish = json!({"type": "publish", "workspace": "acme", "stream": "agent.events", "events": forged});
    assert_eq!(ask(&mut socket, publish).await["code"], "engine_stream");
    let question = json!({"sql": "SELECT count(*) FROM agent.events"});
    let asked = listening.server.call("POST", "/api/v1/workspaces/acme/query", &root, question).await;
    assert_eq!(asked.body["rows"], json!([[0]]), "{}", asked.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_log_says_whom_and_what() {
    let listening = Listening::start(Limits::default()).await;
    let (_, root) = listening.signed_in().await;
    let server = &listening.server;
    let bob = server.user(&root, "bob@example.com").await;
    let at = |path: &str| format!("/api/v1/workspaces/acme/{path}");
    let member = json!({"email": "bob@example.com", "role": "viewer"});
    server.call("PUT", &at("members"), &root, member).await;
    let grant = json!({"email": "bob@example.com", "scope": "portfolio:read@portfolio/main"});
    server.call("PUT", &at("grants"), &root, grant).await;
    let gone = at("grants?email=bob@example.com&scope=portfolio:read@portfolio/main");
    assert_eq!(server.call("DELETE", &gone, &root, Value::Null).await.status, 204);
    let key = json!({"name": "ci", "role": "member", "scopes": ["metric:read"]});
    let key = server.call("POST", &at("keys"), &root, key).await.body;
    let mut socket = listening.connect().await;
    ask(&mut socket, json!({"type": "auth", "token": bob})).await;
    let publish = json!({"type": "publish", "workspace": "acme", "stream": "market.trades", "events": []});
    assert_eq!(ask(&mut socket, publish).await["code"], "forbidden");

    let log = server.get(&at("audit"), &root).await.body;
    let targets: Vec<&str> =
        log["entries"].as_array().unwrap().iter().map(|entry| entry["target"].as_str().unwrap()).collect();
    let expected = [
        "market.trades".to_owned(),
        at(&format!("keys `ci` as member with metric:read id {}", key["id"].as_str().unwrap())),
        at("grants bob@example.com portfolio:read@portfolio/main"),
        at("grants bob@example.com portfolio:read@portfolio/main"),
        at("members bob@example.com as viewer"),
    ];
    assert_eq!(targets[..5], expected);
    assert!(!log.to_string().contains(key["key"].as_str().unwrap()), "no secret is in it");
    let denied = &log["entries"][0];
    assert_eq!((&denied["action"], &denied["from"]), (&json!("ws publish"), &json!("127.0.0.1")));
    assert_eq!(denied["request_id"].as_str().unwrap().len(), 32, "that of the handshake");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_log_says_what_an_alert_rule_became_before_the_answer() {
    let listening = Listening::start(Limits::default()).await;
    let (_, root) = listening.signed_in().await;
    let server = &listening.server;
    let at = |path: &str| format!("/api/v1/workspaces/acme/{path}");
    let sql = "SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')";
    assert_eq!(server.call("PUT", &at("metrics/m"), &root, json!({"sql": sql})).await.status, 200);
    let rule = |condition: &str| json!({"name": "many", "metric": "m", "condition": condition, "for": "1m"});
    for (method, path, body, status, action, target) in [
        ("POST", "alert-rules", rule("n > 1"), 201, "", "alert-rules `many` over m: warning 1m n > 1"),
        ("PUT", "alert-rules/many", rule("n > 2"), 200, "/{rule}", "alert-rules/many over m: warning 1m n > 2"),
        ("DELETE", "alert-rules/many", Value::Null, 204, "/{rule}", "alert-rules/many"),
    ] {
        assert_eq!(server.call(method, &at(path), &root, body).await.status, status);
        // as another process would find it in the store, whatever becomes of this one
        let (entries, _) = server.state.system.store().audit_log(&"acme".parse().unwrap(), 1, None).await.unwrap();
        let found = (entries[0].action.clone(), entries[0].target.clone(), entries[0].outcome.clone());
        let action = format!("{method} /api/v1/workspaces/{{ws}}/alert-rules{action}");
        assert_eq!(found, (action, at(target), "ok".to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_workspace_begins_with_who_made_it() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    assert_eq!(server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "acme"})).await.status, 201);
    assert_eq!(server.call("POST", "/api/v1/workspaces", &bob, json!({"id": "acme"})).await.status, 409);
    let log = server.get("/api/v1/workspaces/acme/audit", &ann).await.body;
    let [made] = log["entries"].as_array().unwrap().as_slice() else { panic!("{log}") };
    let said = ["actor", "action", "target", "outcome"].map(|field| made[field].as_str().unwrap());
    assert_eq!(said, ["ann@example.com", "POST /api/v1/workspaces", "/api/v1/workspaces `acme`", "ok"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_makes_a_workspace_does_not_read_who_looked_for_it_before() {
    let listening = Listening::start(Limits::default()).await;
    let (_, root) = listening.signed_in().await;
    let server = &listening.server;
    let (ann, bob) = (server.user(&root, "ann@example.com").await, server.user(&root, "bob@example.com").await);
    assert_eq!(server.get("/api/v1/workspaces/later/metrics", &bob).await.status, 404);
    let mut socket = listening.connect().await;
    ask(&mut socket, json!({"type": "auth", "token": bob})).await;
    let subscribe = json!({"type": "subscribe", "workspace": "later", "channel": "alerts"});
    assert_eq!(ask(&mut socket, subscribe).await["code"], "workspace_not_found");
    assert_eq!(server.call("POST", "/api/v1/workspaces", &ann, json!({"id": "later"})).await.status, 201);
    let log = server.get("/api/v1/workspaces/later/audit", &ann).await.body;
    assert!(!log.to_string().contains("bob@example.com"), "{log}");
    // from now on it has an owner, who is told
    assert_eq!(server.get("/api/v1/workspaces/later/metrics", &bob).await.status, 404);
    let log = server.get("/api/v1/workspaces/later/audit", &ann).await.body;
    assert!(log.to_string().contains("bob@example.com"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_agui_can_read_why_it_was_refused() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    server.call("POST", "/api/v1/workspaces", &root, json!({"id": "acme"})).await;
    let at = "/api/v1/workspaces/acme/agents/analyst/run";
    let question = "Write a long and very detailed analysis, at least forty sentences";
    let input = |run: &str| {
        json!({
            "threadId": "t", "runId": run, "messages": [{"id": "m", "role": "user", "content": question}],
            "forwardedProps": {"busy": "reject"},
        })
    };
    let request = Request::builder().method("POST").uri(at).header("authorization", format!("Bearer {root}"));
    let first = server.router.clone().oneshot(request.body(Body::from(input("one").to_string())).unwrap()).await;
    assert_eq!(first.unwrap().status(), 200);
    let refused = server.call("POST", at, &root, input("two")).await;
    assert_eq!((refused.status, refused.code(), &refused.body["runId"]), (409, "thread_busy", &json!("one")));
    for refused in
        [refused, server.call("POST", at, &root, json!([])).await, server.call("POST", at, "", json!({})).await]
    {
        // as the official client looks for it
        let kind = refused.headers["content-type"].to_str().unwrap();
        assert!(kind.starts_with("application/problem+json") && kind.contains("application/json"), "{kind}");
    }
}
