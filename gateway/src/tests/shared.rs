//! What several nodes share through Redis, and what each does for itself while it is gone.

use super::redis::RedisServer;
use super::*;
use cache::{Cache, RedisConfig, Standing};
use std::time::Instant;

/// A busy machine must not make a Redis that is there one that is gone.
const PATIENT_MS: u64 = 10_000;

/// Two servers over one store and one Redis, which they wait for so long.
async fn two(redis: &RedisServer, timeout_ms: u64, config: &Config) -> [Server; 2] {
    let dir = Arc::new(TempDir::new().unwrap());
    let settings = RedisConfig { url: Some(redis.url.clone()), timeout_ms, ..RedisConfig::default() };
    let mut nodes = Vec::new();
    for name in ["a", "b"] {
        let era = dir.path().join(format!("era-{name}"));
        let cache = Cache::start(&cache::Config::default(), &settings, "test", era).unwrap();
        eventually("Redis is there", async || cache.redis() == Standing::Connected).await;
        if nodes.is_empty() {
            // the second node knows the workspaces that are there when it starts
            let first = Server::node(dir.clone(), name, config.clone(), actors::Limits::default(), cache).await;
            let root = first.token("root@example.com").await;
            let body = json!({"id": "acme", "tier": "small"});
            assert_eq!(first.call("POST", "/api/v1/workspaces", &root, body).await.status, 201);
            nodes.push(first);
        } else {
            nodes.push(Server::node(dir.clone(), name, config.clone(), actors::Limits::default(), cache).await);
        }
    }
    nodes.try_into().ok().unwrap()
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A key that may read.
async fn viewer(node: &Server) -> String {
    let root = node.token("root@example.com").await;
    let made = node.call("POST", "/api/v1/workspaces/acme/keys", &root, json!({"name": "k", "role": "viewer"})).await;
    assert_eq!(made.status, 201, "{}", made.body);
    made.body["key"].as_str().unwrap().to_owned()
}

fn config() -> Config {
    let small = Tier { requests_per_hour: Some(20), ..Tier::default() };
    Config { tiers: [("small".to_owned(), small)].into(), ..Config::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tier_gives_an_hour_is_one_quota_for_all_nodes() {
    let redis = match RedisServer::start() {
        Ok(redis) => redis,
        Err(why) => return println!("skipped: {why}"),
    };
    let nodes = two(&redis, PATIENT_MS, &config()).await;
    let key = &viewer(&nodes[0]).await;
    let mut answers = Vec::new();
    for n in 0..30 {
        answers.push(nodes[n % 2].get("/api/v1/workspaces/acme/metrics", key).await);
    }
    let passed = answers.iter().filter(|answer| answer.status == 200).count();
    assert_eq!(passed, 20);
    assert_eq!(answers[19].headers["ratelimit-remaining"], "0");
    assert_eq!((answers[29].status, answers[29].code()), (429, "quota_exceeded"));
    assert!(answers[29].headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() <= 180);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_guesses_passwords_has_to_wait_at_all_nodes() {
    let redis = match RedisServer::start() {
        Ok(redis) => redis,
        Err(why) => return println!("skipped: {why}"),
    };
    let nodes = two(&redis, PATIENT_MS, &config()).await;
    let sign_in = async |node: usize, password: &str| {
        let body = json!({"email": "root@example.com", "password": password});
        nodes[node].call("POST", "/api/v1/auth/login", "", body).await
    };
    // a right password leaves no trace
    for n in 0..10 {
        assert_eq!(sign_in(n % 2, PASSWORD).await.status, 200);
    }
    for n in 0..5 {
        assert_eq!(sign_in(n % 2, "wrong horse").await.status, 401);
    }
    for node in [0, 1] {
        let refused = sign_in(node, PASSWORD).await;
        assert_eq!((refused.status, refused.code()), (429, "too_many_sign_ins"));
        assert!(refused.headers.contains_key("retry-after"));
    }
    eventually("it may try again", async || sign_in(0, PASSWORD).await.status == 200).await;
    assert_eq!(sign_in(1, "wrong horse").await.status, 401, "it begins anew at both");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_each_node_counts_on_and_serves_and_says_so() {
    let mut redis = match RedisServer::start() {
        Ok(redis) => redis,
        Err(why) => return println!("skipped: {why}"),
    };
    let nodes = two(&redis, RedisConfig::default().timeout_ms, &config()).await;
    let root = nodes[0].token("root@example.com").await;
    let key = &viewer(&nodes[0]).await;
    let part = |answer: &Answer| {
        let parts = answer.body["parts"].as_array().unwrap();
        parts.iter().find(|part| part["name"] == "redis").unwrap().clone()
    };
    let ready = nodes[0].get("/ready", "").await;
    assert_eq!(part(&ready), json!({"name": "redis", "ok": true, "detail": "connected"}));
    for _ in 0..5 {
        assert_eq!(nodes[0].get("/api/v1/workspaces/acme/metrics", key).await.status, 200);
    }
    redis.stop();
    let began = Instant::now();
    for left in (0..15).rev() {
        let answer = nodes[0].get("/api/v1/workspaces/acme/metrics", key).await;
        assert_eq!((answer.status, answer.headers["ratelimit-remaining"].to_str().unwrap()), (200, &*left.to_string()));
    }
    assert_eq!(nodes[0].get("/api/v1/workspaces/acme/metrics", key).await.status, 429);
    assert_eq!(nodes[1].get("/api/v1/workspaces/acme/metrics", key).await.status, 200);
    assert_eq!(nodes[0].get("/api/v1/workspaces/acme/portfolios", &root).await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let ready = nodes[0].get("/ready", "").await;
    assert_eq!((ready.status, &ready.body["status"], &part(&ready)["ok"]), (200, &json!("degraded"), &json!(false)));

    redis.start_again();
    eventually("ready", async || nodes[0].get("/ready", "").await.body["status"] == "ready").await;
    // one that hangs is not waited for either
    redis.signal("STOP");
    let began = Instant::now();
    assert_eq!(nodes[1].get("/api/v1/workspaces/acme/metrics", key).await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    redis.signal("CONT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portfolio_changed_at_one_node_is_told_by_the_other() {
    let redis = match RedisServer::start() {
        Ok(redis) => redis,
        Err(why) => return println!("skipped: {why}"),
    };
    let config = Config { tiers: [("small".to_owned(), Tier::default())].into(), ..Config::default() };
    let nodes = two(&redis, PATIENT_MS, &config).await;
    let root = nodes[0].token("root@example.com").await;
    let portfolios = "/api/v1/workspaces/acme/portfolios";
    let names = async |node: &Server| node.get(portfolios, &root).await.body["portfolios"].clone();
    assert_eq!((names(&nodes[0]).await, names(&nodes[1]).await), (json!([]), json!([])));
    assert_eq!(nodes[0].call("POST", portfolios, &root, json!({"id": "main"})).await.status, 201);
    assert_eq!(names(&nodes[0]).await[0]["id"], "main");
    eventually("the other node tells of it", async || names(&nodes[1]).await[0]["id"] == "main").await;
}

#[tokio::test]
async fn without_redis_in_the_configuration_ready_says_so() {
    let ready = Server::start().await.get("/ready", "").await;
    let part = ready.body["parts"].as_array().unwrap().iter().find(|part| part["name"] == "redis").unwrap().clone();
    assert_eq!(part, json!({"name": "redis", "ok": true, "detail": "not configured"}));
}
