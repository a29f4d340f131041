//! Webhooks against a receiver on a port of its own: each alert and its end arrive signed and count once, whoever is
//! away, slow or killed meanwhile.

use crate::database::Database;
use crate::harness::Server;
use crate::kill::lasting_port;
use crate::stores::Process;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use reqwest::Method;
use serde_json::{Value, json};
use sha2::Sha256;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The machine may be busy with builds.
const PATIENCE: Duration = Duration::from_secs(60);
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// A busy machine must not make a stream idle: that would close a window, and end an alert.
const IDLE_MS: u64 = 3_600_000;
const SETTINGS: [(&str, &str); 2] =
    [("TIDEWATCH__WEBHOOKS__ALLOW_PRIVATE", "true"), ("TIDEWATCH__LIMITS__IDLE_TIMEOUT_MS", "3600000")];
const HOOKS: &str = "/api/v1/workspaces/acme/webhooks";

/// What a receiver does with a request.
#[derive(Clone)]
enum Say {
    Status(u16),
    /// 503, and to come again after so many seconds.
    After(u64),
    Redirect(String),
    /// Nothing.
    Hang,
}

/// One request.
#[derive(Clone, Debug)]
struct Heard {
    headers: BTreeMap<String, String>,
    body: String,
    at: Instant,
}

impl Heard {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", self.headers))
    }

    fn id(&self) -> &str {
        self.header("webhook-id")
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn event(&self) -> String {
        self.json()["type"].as_str().unwrap().to_owned()
    }

    /// Checks what a receiver by the specification checks.
    fn verify(&self, secret: &str) {
        let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let seconds: i64 = self.header("webhook-timestamp").parse().unwrap();
        assert!((chrono::Utc::now().timestamp() - seconds).abs() < 300, "{seconds}");
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        mac.update(format!("{}.{seconds}.{}", self.id(), self.body).as_bytes());
        let versions = self.header("webhook-signature").split(' ');
        let mut signatures = versions.map(|signature| signature.strip_prefix("v1,").expect("version 1"));
        let is_good = |signature: &str| mac.clone().verify_slice(&STANDARD.decode(signature).unwrap()).is_ok();
        assert!(signatures.any(is_good), "a valid signature");
        assert_eq!(self.header("idempotency-key"), self.id());
        assert_eq!(self.header("content-type"), "application/json");
    }
}

#[derive(Clone, Default)]
struct Ear {
    heard: Arc<Mutex<Vec<Heard>>>,
    /// What comes next; 204 once it is empty.
    script: Arc<Mutex<VecDeque<Say>>>,
    /// What comes always, in place of the script.
    always: Arc<Mutex<Option<Say>>>,
}

/// A receiver; away once it is dropped.
struct Receiver {
    port: u16,
    ear: Ear,
    serving: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn receive(State(ear): State<Ear>, headers: HeaderMap, body: String) -> Response {
    let headers = headers.iter().map(|(k, v)| (k.to_string(), v.to_str().unwrap().to_owned())).collect();
    ear.heard.lock().unwrap().push(Heard { headers, body, at: Instant::now() });
    let always = ear.always.lock().unwrap().clone();
    let say = always.or_else(|| ear.script.lock().unwrap().pop_front()).unwrap_or(Say::Status(204));
    match say {
        Say::Status(status) => StatusCode::from_u16(status).unwrap().into_response(),
        Say::After(seconds) => {
            (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, seconds.to_string())]).into_response()
        }
        Say::Redirect(to) => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response(),
        Say::Hang => std::future::pending().await,
    }
}

impl Receiver {
    async fn at(port: u16) -> Receiver {
        let ear = Ear::default();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let app = Router::new().route("/hook", post(receive)).with_state(ear.clone());
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Receiver { port, ear, serving }
    }

    async fn start() -> Receiver {
        Receiver::at(0).await
    }

    async fn saying(script: impl IntoIterator<Item = Say>) -> Receiver {
        let receiver = Receiver::start().await;
        receiver.ear.script.lock().unwrap().extend(script);
        receiver
    }

    async fn always(say: Say) -> Receiver {
        let receiver = Receiver::start().await;
        *receiver.ear.always.lock().unwrap() = Some(say);
        receiver
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hook", self.port)
    }

    fn heard(&self) -> Vec<Heard> {
        self.ear.heard.lock().unwrap().clone()
    }

    /// What was heard, once there are so many.
    async fn until(&self, count: usize) -> Vec<Heard> {
        let begun = Instant::now();
        while self.heard().len() < count {
            assert!(begun.elapsed() < PATIENCE, "{count} were never heard: {:?}", self.heard());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.heard()
    }
}

fn trade(second: i64, symbol: &str, price: f64, qty: f64) -> String {
    json!({"ts": 1_767_225_600_000_i64 + second * 1_000, "symbol": symbol, "price": price, "qty": qty}).to_string()
}

/// A server on which the price of `acme` above 100 is an alert.
async fn server(directory: &std::path::Path) -> Server {
    server_with(directory, |_| {}).await
}

async fn server_with(directory: &std::path::Path, settings: impl FnOnce(&mut server::Config)) -> Server {
    let server = Server::with_workspace_and(directory, |config| {
        config.webhooks.allow_private = true;
        config.limits.idle_timeout_ms = IDLE_MS;
        settings(config);
    })
    .await;
    let vwap = "SELECT symbol, sum(price*qty)/sum(qty) AS vwap FROM market.trades \
                GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    server.metric("vwap_1m", json!({"sql": vwap, "emit": "20ms"})).await;
    let rule = json!({"metric": "vwap_1m", "condition": "vwap > 100", "severity": "critical"});
    server.ok(Method::PUT, "/api/v1/workspaces/acme/alert-rules/dear", rule).await;
    server
}

/// Makes a webhook of `acme`: its id.
async fn hook(server: &Server, url: &str) -> String {
    let made = server.ok(Method::POST, HOOKS, json!({"url": url, "secret": SECRET})).await;
    assert_eq!(made.get("secret"), None, "who brings a secret knows it");
    made["id"].as_str().unwrap().to_owned()
}

async fn fire(server: &Server, symbol: &str) {
    server.ingest("market.trades", &trade(1, symbol, 150.0, 1.0)).await;
}

async fn resolve(server: &Server, symbol: &str) {
    server.ingest("market.trades", &trade(2, symbol, 10.0, 9.0)).await;
}

async fn deliveries(server: &Server, hook: &str) -> Vec<Value> {
    server.get(&format!("{HOOKS}/{hook}/deliveries")).await["deliveries"].as_array().unwrap().clone()
}

/// The deliveries of a webhook, the newest first, once they are as wanted.
async fn deliveries_until(server: &Server, hook: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let all = deliveries(server, hook).await;
        if wanted(&all) {
            return all;
        }
        assert!(begun.elapsed() < PATIENCE, "{all:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn all_delivered(count: usize) -> impl Fn(&[Value]) -> bool {
    move |all| all.len() == count && all.iter().all(|delivery| delivery["state"] == "delivered")
}

#[tokio::test]
async fn an_alert_and_its_end_arrive_once_each_and_signed() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let receiver = Receiver::start().await;
    let hook = hook(&server, &receiver.url()).await;
    fire(&server, "A").await;
    receiver.until(1).await;
    resolve(&server, "A").await;
    let heard = receiver.until(2).await;
    heard.iter().for_each(|heard| heard.verify(SECRET));
    assert_eq!(heard.iter().map(Heard::event).collect::<Vec<_>>(), ["alert.firing", "alert.resolved"]);
    assert_ne!(heard[0].id(), heard[1].id());
    let alerts = server.get("/api/v1/workspaces/acme/alerts").await;
    let (fired, ended) = (heard[0].json(), heard[1].json());
    for (told, state) in [(&fired, "firing"), (&ended, "resolved")] {
        let alert = &told["data"]["alert"];
        assert_eq!((&alert["state"], &alert["labels"]), (&json!(state), &json!({"symbol": "A"})));
        assert_eq!(alert["id"], alerts["alerts"][0]["id"]);
    }
    assert_eq!(fired["timestamp"], fired["data"]["alert"]["fired_at"]);
    assert_eq!(ended["timestamp"], ended["data"]["alert"]["resolved_at"]);

    let told = deliveries_until(&server, &hook, all_delivered(2)).await;
    assert_eq!((&told[0]["event"], &told[0]["id"]), (&json!("alert.resolved"), &json!(heard[1].id())));
    assert_eq!((&told[1]["attempts"], &told[1]["last_status"]), (&json!(1), &json!(204)));
    assert_eq!(told[1]["next_attempt_at"], Value::Null);
    server.stop().await;

    // a restart repeats nothing of it
    let server = Server::start_with(directory.path(), |config| config.webhooks.allow_private = true).await;
    let test = server.ok(Method::POST, &format!("{HOOKS}/{hook}/test"), Value::Null).await;
    let heard = receiver.until(3).await;
    heard[2].verify(SECRET);
    assert_eq!((heard[2].event(), json!(heard[2].id())), ("webhook.test".to_owned(), test["id"].clone()));
    let actors = server.get("/api/v1/system/actors").await;
    let notifier = actors["actors"].as_array().unwrap().iter().find(|actor| actor["kind"] == "notifier").unwrap();
    assert_eq!((&notifier["state"], &notifier["restarts"]), (&json!("running"), &json!(0)));
    let figures = server.get("/metrics").await;
    assert!(figures.as_str().unwrap().contains("tidewatch_webhook_attempts_total{outcome=\"delivered\"}"));
    server.stop().await;
}

#[tokio::test]
async fn a_receiver_that_was_away_is_told_when_it_is_back_and_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let port = lasting_port(7);
    let hook = hook(&server, &format!("http://127.0.0.1:{port}/hook")).await;
    fire(&server, "A").await;
    let tried = |all: &[Value]| all.first().is_some_and(|first| first["attempts"].as_u64().unwrap() > 0);
    let waiting = deliveries_until(&server, &hook, tried).await;
    assert_eq!((&waiting[0]["state"], &waiting[0]["last_status"]), (&json!("pending"), &Value::Null));
    assert!(waiting[0]["last_error"].is_string() && waiting[0]["next_attempt_at"].is_string(), "{waiting:?}");
    resolve(&server, "A").await;
    let both = deliveries_until(&server, &hook, |all| all.len() == 2).await;
    assert_eq!((&both[0]["attempts"], &both[0]["state"]), (&json!(0), &json!("pending")), "it waits for its beginning");
    let receiver = Receiver::at(port).await;
    let heard = receiver.until(2).await;
    assert_eq!(heard.iter().map(Heard::event).collect::<Vec<_>>(), ["alert.firing", "alert.resolved"]);
    assert_eq!(json!(heard[0].id()), waiting[0]["id"]);
    deliveries_until(&server, &hook, all_delivered(2)).await;
    assert_eq!(receiver.heard().len(), 2);
    server.stop().await;
}

#[tokio::test]
async fn a_receiver_that_fails_is_asked_again_when_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let receiver = Receiver::saying([Say::Status(500), Say::After(3), Say::Status(200)]).await;
    let hook = hook(&server, &receiver.url()).await;
    fire(&server, "A").await;
    let heard = receiver.until(3).await;
    heard.iter().for_each(|heard| heard.verify(SECRET));
    assert!(heard.iter().all(|again| again.id() == heard[0].id() && again.body == heard[0].body), "{heard:?}");
    let waits = [heard[1].at - heard[0].at, heard[2].at - heard[1].at];
    assert!(waits[0] >= Duration::from_millis(500), "{waits:?}");
    assert!(waits[1] >= Duration::from_secs(3), "{waits:?}");
    let told = deliveries_until(&server, &hook, all_delivered(1)).await;
    assert_eq!((&told[0]["attempts"], &told[0]["last_error"]), (&json!(3), &Value::Null));
    server.stop().await;
}

#[tokio::test]
async fn a_receiver_that_hangs_delays_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let server = server_with(directory.path(), |config| config.webhooks.timeout_ms = 300_000).await;
    let (stuck, well) = (Receiver::always(Say::Hang).await, Receiver::start().await);
    hook(&server, &stuck.url()).await;
    hook(&server, &well.url()).await;
    // more than may be under way to one webhook
    for i in 0..10 {
        fire(&server, &format!("S{i}")).await;
    }
    let told = well.until(10).await;
    assert_eq!(told.iter().map(Heard::id).collect::<BTreeSet<_>>().len(), 10);
    let asked = stuck.heard().len();
    assert!((1..=4).contains(&asked), "{asked} under way at the same time, and webhooks.concurrency is 4");
    server.stop().await;
}

#[tokio::test]
async fn a_receiver_that_says_nothing_in_time_is_asked_again() {
    let directory = tempfile::tempdir().unwrap();
    let server = server_with(directory.path(), |config| config.webhooks.timeout_ms = 300).await;
    let receiver = Receiver::saying([Say::Hang, Say::Hang, Say::Hang]).await;
    let hook = hook(&server, &receiver.url()).await;
    fire(&server, "A").await;
    let tried = |all: &[Value]| all.first().is_some_and(|first| first["last_error"].is_string());
    let told = deliveries_until(&server, &hook, tried).await;
    assert!(told[0]["last_error"].as_str().unwrap().contains("timed out"), "{told:?}");
    receiver.until(2).await;
    deliveries_until(&server, &hook, all_delivered(1)).await;
    server.stop().await;
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_told_nothing_any_more() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let receiver = Receiver::saying([Say::Status(410)]).await;
    let hook = hook(&server, &receiver.url()).await;
    fire(&server, "A").await;
    receiver.until(1).await;
    let at = format!("{HOOKS}/{hook}");
    let begun = Instant::now();
    while server.get(&at).await["enabled"] == true {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let reason = server.get(&at).await["disabled_reason"].clone();
    assert_eq!(reason, "it answered 410 Gone");
    assert_eq!(deliveries(&server, &hook).await[0]["state"], "failed");
    let (status, refused) = server.call(Method::POST, &format!("{at}/test"), Value::Null).await;
    assert_eq!((status.as_u16(), &refused["code"]), (409, &json!("webhook_disabled")));
    fire(&server, "B").await;
    // by the time another one is told, this one would have been
    let other = Receiver::start().await;
    self::hook(&server, &other.url()).await;
    fire(&server, "C").await;
    other.until(1).await;
    assert_eq!((receiver.heard().len(), deliveries(&server, &hook).await.len()), (1, 1));

    let enabled = server.ok(Method::PATCH, &at, json!({"enabled": true})).await;
    assert_eq!((&enabled["enabled"], &enabled["disabled_reason"]), (&json!(true), &Value::Null));
    fire(&server, "D").await;
    assert_eq!(receiver.until(2).await[1].json()["data"]["alert"]["labels"], json!({"symbol": "D"}));
    server.stop().await;
}

#[tokio::test]
async fn a_new_key_of_the_store_leaves_signatures_as_they_were() {
    let (old, new) = ("an old key of more than thirty-two bytes", "a new key of more than thirty-two bytes");
    let directory = tempfile::tempdir().unwrap();
    let receiver = Receiver::start().await;
    let keyed = |config: &mut server::Config| config.auth.encryption_key = Some(old.to_owned());
    let server = server_with(directory.path(), keyed).await;
    hook(&server, &receiver.url()).await;
    server.stop().await;
    for previous in [vec![old.to_owned()], Vec::new()] {
        let server = Server::start_with(directory.path(), |config| {
            config.webhooks.allow_private = true;
            config.auth.encryption_key = Some(new.to_owned());
            config.auth.previous_encryption_keys = previous;
        })
        .await;
        let before = receiver.heard().len();
        fire(&server, &format!("S{before}")).await;
        receiver.until(before + 1).await[before].verify(SECRET);
        server.stop().await;
    }
}

#[tokio::test]
async fn a_secret_that_was_rotated_signs_beside_the_new_one_for_as_long_as_was_asked() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let receiver = Receiver::start().await;
    let made = server.ok(Method::POST, HOOKS, json!({"url": receiver.url()})).await;
    assert_eq!(made["previous_secret_until"], Value::Null);
    let at = format!("{HOOKS}/{}", made["id"].as_str().unwrap());
    let secret = |answer: &Value| answer["secret"].as_str().unwrap().to_owned();
    let send = async |count: usize| {
        server.ok(Method::POST, &format!("{at}/test"), Value::Null).await;
        receiver.until(count).await.pop().unwrap()
    };
    let signatures = |heard: &Heard| heard.header("webhook-signature").split(' ').count();
    let first = send(1).await;
    first.verify(&secret(&made));
    assert_eq!(signatures(&first), 1);

    let rotated = server.ok(Method::POST, &format!("{at}/secret"), json!({"overlap": "1h"})).await;
    assert_ne!(secret(&rotated), secret(&made));
    assert!(rotated["previous_secret_until"].is_string(), "{rotated}");
    assert!(server.get(&at).await.get("secret").is_none(), "shown once");
    let second = send(2).await;
    second.verify(&secret(&made));
    second.verify(&secret(&rotated));
    assert_eq!(signatures(&second), 2);

    // a leaked one ends at once
    let last = server.ok(Method::POST, &format!("{at}/secret"), json!({"overlap": "0s"})).await;
    assert_eq!(last["previous_secret_until"], Value::Null);
    let third = send(3).await;
    third.verify(&secret(&last));
    assert_eq!(signatures(&third), 1);
    // an overlap that has passed counts for nothing
    let short = server.ok(Method::POST, &format!("{at}/secret"), json!({"overlap": "1ms"})).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    let fourth = send(4).await;
    fourth.verify(&secret(&short));
    assert_eq!(signatures(&fourth), 1);

    for (body, code) in [
        (json!({"overlap": "31d"}), "bad_webhook"),
        (json!({"secret": "whsec_c2hvcnQ="}), "bad_webhook"),
        (json!({"overlap": "soon"}), "bad_body"),
    ] {
        let (status, refused) = server.call(Method::POST, &format!("{at}/secret"), body.clone()).await;
        assert_eq!((status.as_u16(), &refused["code"]), (400, &json!(code)), "{body}: {refused}");
    }
    let (_, missing) = server.call(Method::POST, &format!("{HOOKS}/none/secret"), json!({})).await;
    assert_eq!(missing["code"], "unknown_webhook");
    server.stop().await;
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let inside = Receiver::start().await;
    let receiver = Receiver::always(Say::Redirect(inside.url())).await;
    let hook = hook(&server, &receiver.url()).await;
    fire(&server, "A").await;
    let told = deliveries_until(&server, &hook, |all| all.first().is_some_and(|d| d["last_status"] == 307)).await;
    assert_eq!(told[0]["state"], "pending");
    assert_eq!(inside.heard().len(), 0);
    server.stop().await;
}

#[tokio::test]
async fn only_what_was_asked_for_is_told_and_nothing_that_is_silenced() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let rule = json!({"metric": "vwap_1m", "condition": "vwap > 120", "severity": "info"});
    server.ok(Method::PUT, "/api/v1/workspaces/acme/alert-rules/mild", rule).await;
    let (ends, mild) = (Receiver::start().await, Receiver::start().await);
    let made = server.ok(Method::POST, HOOKS, json!({"url": ends.url(), "events": ["alert.resolved"]})).await;
    let secret = made["secret"].as_str().expect("made here, and shown once").to_owned();
    server.ok(Method::POST, HOOKS, json!({"url": mild.url(), "severities": ["info"]})).await;
    let silence = json!({"matchers": {"symbol": "QUIET"}, "duration": "1h"});
    server.ok(Method::POST, "/api/v1/workspaces/acme/silences", silence).await;
    for symbol in ["QUIET", "LOUD"] {
        fire(&server, symbol).await;
    }
    let both = mild.until(1).await;
    assert_eq!(both[0].json()["data"]["alert"]["rule"], "mild");
    for symbol in ["QUIET", "LOUD"] {
        resolve(&server, symbol).await;
    }
    let told = ends.until(2).await;
    told.iter().for_each(|heard| heard.verify(&secret));
    let rules: BTreeSet<String> = told.iter().map(|heard| heard.json()["data"]["alert"]["rule"].to_string()).collect();
    assert_eq!(rules.len(), 2, "{told:?}");
    mild.until(2).await;
    for heard in ends.heard().iter().chain(&mild.heard()) {
        assert_eq!(heard.json()["data"]["alert"]["labels"], json!({"symbol": "LOUD"}));
    }
    assert_eq!((ends.heard().len(), mild.heard().len()), (2, 2));
    let listed = server.get(HOOKS).await;
    assert_eq!(listed["webhooks"].as_array().unwrap().len(), 2);
    assert!(!listed.to_string().contains("whsec_"), "{listed}");
    let stored = std::fs::read(directory.path().join("tidewatch.db")).unwrap();
    let journal = std::fs::read(directory.path().join("tidewatch.db-wal")).unwrap_or_default();
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    for needle in [secret.as_bytes(), &key] {
        let is_there = |file: &[u8]| file.windows(needle.len()).any(|window| window == needle);
        assert!(!is_there(&stored) && !is_there(&journal), "the store holds the secret as it is");
    }
    server.stop().await;
}

#[tokio::test]
async fn private_addresses_and_other_nonsense_are_refused_unless_settings_allow_them() {
    let directory = tempfile::tempdir().unwrap();
    let allow = |config: &mut server::Config| config.webhooks.per_workspace = 2;
    let server = Server::with_workspace_and(directory.path(), allow).await;
    for url in [
        "http://example.com/", // not encrypted
        "https://127.0.0.1/",
        "https://127.1/",
        "https://0x7f000001/",
        "https://2130706433/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://localhost/",
        "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/",
        "https://ann:secret@1.1.1.1/",
        "ftp://1.1.1.1/",
        "1.1.1.1",
    ] {
        let (status, refused) = server.call(Method::POST, HOOKS, json!({"url": url})).await;
        assert_eq!((status.as_u16(), &refused["code"]), (400, &json!("bad_webhook")), "{url}: {refused}");
    }
    let good = "https://1.1.1.1/hook";
    for (body, code) in [
        (json!({"url": good, "events": []}), "bad_webhook"),
        (json!({"url": good, "events": ["alert.acked"]}), "bad_webhook"),
        (json!({"url": good, "severities": []}), "bad_webhook"),
        (json!({"url": good, "secret": "whsec_c2hvcnQ="}), "bad_webhook"),
        (json!({"url": good, "scope": "all"}), "bad_body"),
        (json!({}), "bad_body"),
    ] {
        let (status, refused) = server.call(Method::POST, HOOKS, body.clone()).await;
        assert_eq!((status.as_u16(), &refused["code"]), (400, &json!(code)), "{body}: {refused}");
    }
    let made = server.ok(Method::POST, HOOKS, json!({"url": good})).await;
    let at = format!("{HOOKS}/{}", made["id"].as_str().unwrap());
    let (_, refused) = server.call(Method::PATCH, &at, json!({"url": "https://127.0.0.1/"})).await;
    assert_eq!(refused["code"], "bad_webhook");
    assert_eq!(server.get(&at).await["url"], good);
    let changes = json!({"severities": ["critical"], "events": ["alert.firing"], "enabled": false});
    let changed = server.ok(Method::PATCH, &at, changes).await;
    assert_eq!((&changed["severities"], &changed["enabled"]), (&json!(["critical"]), &json!(false)));
    assert!(changed["disabled_reason"].as_str().unwrap().contains("disabled by"), "{changed}");
    let changed = server.ok(Method::PATCH, &at, json!({"severities": null})).await;
    assert_eq!((&changed["severities"], &changed["events"]), (&Value::Null, &json!(["alert.firing"])));

    server.ok(Method::POST, HOOKS, json!({"url": good})).await;
    let (status, full) = server.call(Method::POST, HOOKS, json!({"url": good})).await;
    assert_eq!((status.as_u16(), &full["code"]), (409, &json!("limit_reached")));
    assert!(full["detail"].as_str().unwrap().contains("webhooks.per_workspace = 2"), "{full}");
    server.ok(Method::DELETE, &at, Value::Null).await;
    for (method, path) in [(Method::GET, at.clone()), (Method::DELETE, at.clone()), (Method::GET, at + "/deliveries")] {
        let (status, missing) = server.call(method, &path, Value::Null).await;
        assert_eq!((status.as_u16(), &missing["code"]), (404, &json!("unknown_webhook")), "{path}");
    }
    let audit = server.get("/api/v1/workspaces/acme/audit").await.to_string();
    assert!(audit.contains("POST /api/v1/workspaces/{ws}/webhooks") && !audit.contains("whsec_"), "{audit}");
    server.stop().await;
}

/// What the binary keeps its data in, one after the other.
fn stores() -> (Vec<Option<String>>, Result<Database, String>) {
    let database = Database::postgres();
    let mut stores = vec![None];
    match &database {
        Ok(database) => stores.push(Some(database.create("tides"))),
        Err(why) => println!("over SQLite alone, since {why}"),
    }
    (stores, database)
}

/// The binary with an alert on many trades in a second, and a webhook at `port`: the webhook's id.
async fn define(process: &Process, port: u16) -> String {
    process.ok(Method::POST, "/api/v1/workspaces", json!({"id": "acme", "name": "Acme"})).await;
    let sums = "SELECT symbol, count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 second'), symbol";
    let metrics = "/api/v1/workspaces/acme/metrics";
    process.ok(Method::PUT, &format!("{metrics}/sums"), json!({"sql": sums, "max_delay": "0s", "emit": "20ms"})).await;
    // over final rows: which alerts there are does not depend on when somebody looked
    let finals =
        "SELECT symbol, n, lag(n) OVER (PARTITION BY symbol ORDER BY window_start) AS before FROM metrics.sums";
    process.ok(Method::PUT, &format!("{metrics}/finals"), json!({"sql": finals})).await;
    let rule = json!({"metric": "finals", "condition": "n > 2"});
    process.ok(Method::PUT, "/api/v1/workspaces/acme/alert-rules/many", rule).await;
    let hook = json!({"url": format!("http://127.0.0.1:{port}/hook"), "secret": SECRET});
    process.ok(Method::POST, HOOKS, hook).await["id"].as_str().unwrap().to_owned()
}

/// Posts `n` trades of one symbol in second `second`, until they are taken.
async fn post_trades(process: &Process, second: i64, n: i64) {
    let line = |i: i64| {
        let ts = 1_767_225_600_000_i64 + second * 1_000;
        json!({"id": format!("{second}-{i}"), "ts": ts, "symbol": "A", "price": 1, "qty": 1}).to_string() + "\n"
    };
    let body: String = (0..n).map(line).collect();
    let path = "/api/v1/workspaces/acme/streams/market.trades/events";
    let begun = Instant::now();
    loop {
        let answer = process.call(Method::POST, path, body.clone()).await;
        if answer.is_some_and(|(status, _)| status.is_success()) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "trades are not taken");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn listed(process: &Process, hook: &str) -> Vec<Value> {
    let path = format!("{HOOKS}/{hook}/deliveries?limit=1000");
    process.ok(Method::GET, &path, Value::Null).await["deliveries"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_killed_server_tells_what_it_had_stored_and_under_the_same_id() {
    let (stores, _database) = stores();
    for (i, store) in stores.into_iter().enumerate() {
        let data = tempfile::tempdir().unwrap();
        let store = store.unwrap_or_else(|| format!("sqlite:{}/store.db", data.path().display()));
        let port = lasting_port(100 + i as u64);
        // nobody is there: the delivery is stored, and that is all
        let process = Process::start_with(data.path(), &store, &SETTINGS).await;
        let hook = define(&process, port).await;
        post_trades(&process, 0, 5).await;
        post_trades(&process, 5, 1).await; // closes the window before
        let begun = Instant::now();
        let stored = loop {
            if let [delivery] = listed(&process, &hook).await.as_slice() {
                break delivery.clone();
            }
            assert!(begun.elapsed() < PATIENCE, "no delivery was stored");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(stored["state"], "pending");
        drop(process); // SIGKILL

        // it is heard, and the server killed before there is an answer
        let receiver = Receiver::at(port).await;
        *receiver.ear.always.lock().unwrap() = Some(Say::Hang);
        let process = Process::start_with(data.path(), &store, &SETTINGS).await;
        receiver.until(1).await;
        drop(process);
        *receiver.ear.always.lock().unwrap() = None;
        let before = receiver.heard().len();
        let process = Process::start_with(data.path(), &store, &SETTINGS).await;
        let heard = receiver.until(before + 1).await;
        for heard in &heard {
            heard.verify(SECRET);
            assert_eq!((json!(heard.id()), &heard.body), (stored["id"].clone(), &receiver.heard()[0].body));
        }
        let begun = Instant::now();
        while listed(&process, &hook).await[0]["state"] != "delivered" {
            assert!(begun.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(process);

        // and not again
        let heard = receiver.heard().len();
        let process = Process::start_with(data.path(), &store, &SETTINGS).await;
        let test = process.ok(Method::POST, &format!("{HOOKS}/{hook}/test"), Value::Null).await;
        let last = receiver.until(heard + 1).await;
        assert_eq!((last.len(), json!(last[heard].id())), (heard + 1, test["id"].clone()));
    }
}

#[tokio::test]
async fn whatever_is_killed_each_alert_and_each_end_has_one_message() {
    let number = |name: &str, otherwise: u64| std::env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    let kills = number("TIDEWATCH_TEST_WEBHOOK_KILLS", 12);
    let (stores, _database) = stores();
    let (each, mut second) = (kills / stores.len() as u64, 0);
    for store in stores {
        let kind = if store.is_some() { "PostgreSQL" } else { "SQLite" };
        let data = tempfile::tempdir().unwrap();
        let store = store.unwrap_or_else(|| format!("sqlite:{}/store.db", data.path().display()));
        let receiver = Receiver::start().await;
        let mut process = Process::start_with(data.path(), &store, &SETTINGS).await;
        let hook = define(&process, receiver.port).await;
        for kill in 0..each {
            // fires and ends again and again
            for _ in 0..8 {
                post_trades(&process, second, 4).await;
                post_trades(&process, second + 2, 1).await;
                second += 4;
            }
            tokio::time::sleep(Duration::from_millis(kill * 67 % 400)).await;
            drop(process);
            process = Process::start_with(data.path(), &store, &SETTINGS).await;
        }
        post_trades(&process, second, 1).await;
        let expected = each as usize * 8;
        let (mut alerts, begun) = (Vec::new(), Instant::now());
        // as stored, and as told
        loop {
            let listed = process.ok(Method::GET, "/api/v1/workspaces/acme/alerts?limit=1000", Value::Null).await;
            alerts.clone_from(listed["alerts"].as_array().unwrap());
            let ended = alerts.iter().filter(|alert| alert["state"] == "resolved").count();
            let told: BTreeSet<String> = receiver.heard().iter().map(|heard| heard.id().to_owned()).collect();
            if ended == expected && told.len() >= 2 * expected {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{ended} ended of {}, {} told", alerts.len(), told.len());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(alerts.len(), expected);
        let mut ids: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        for heard in receiver.heard() {
            heard.verify(SECRET);
            let alert = heard.json()["data"]["alert"]["id"].as_str().unwrap().to_owned();
            ids.entry((alert, heard.event())).or_default().insert(heard.id().to_owned());
        }
        let stored = alerts.iter().flat_map(|alert| {
            let id = alert["id"].as_str().unwrap();
            ["alert.firing", "alert.resolved"].map(|event| (id.to_owned(), event.to_owned()))
        });
        assert_eq!(ids.keys().cloned().collect::<BTreeSet<_>>(), stored.collect::<BTreeSet<_>>());
        assert!(ids.values().all(|ids| ids.len() == 1), "one cause, two ids: {ids:?}");
        let total = receiver.heard().len();
        println!("{kind}: {each} kills, {} messages, heard {total} times", ids.len());
        let states = listed(&process, &hook).await;
        assert!(states.len() == 2 * expected || states.len() == 1_000);
    }
}
