//! Both layers, with a real Redis that comes and goes.

#[path = "../../tests/support/redis.rs"]
mod redis;

use self::redis::RedisServer;
use crate::*;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::Notify;

/// A text with the bytes it is said to have.
#[derive(Debug, PartialEq)]
struct Text(String, usize);

impl Kept for Text {
    fn bytes(&self) -> usize {
        self.1
    }
    fn encode(&self) -> Option<Vec<u8>> {
        Some(self.0.clone().into_bytes())
    }
    fn decode(bytes: &[u8]) -> Option<Text> {
        String::from_utf8(bytes.to_vec()).ok().map(|text| Text(text, 100))
    }
}

fn ask(workspace: &str, tag: &str, question: &str) -> Ask {
    let tags = vec![Tag::from(workspace), Tag::new(&[&workspace, &tag])];
    Ask { class: Class::History, tags, question: question.to_owned() }
}

/// The answer, which is `text` where it has to be loaded.
async fn get(cache: &Cache, ask: &Ask, text: &str) -> String {
    let load = async || Ok::<_, ()>(Text(text.to_owned(), 100));
    cache.get(ask, load).await.unwrap().0.clone()
}

fn loaded(cache: &Cache) -> u64 {
    cache.warmth(Class::History).loaded
}

#[tokio::test]
async fn of_many_who_miss_at_once_one_loads() {
    let cache = Cache::new(&Config::default());
    let (loads, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let askers: Vec<_> = (0..50)
        .map(|_| {
            let (cache, loads, gate) = (cache.clone(), loads.clone(), gate.clone());
            tokio::spawn(async move {
                let load = async || {
                    loads.fetch_add(1, SeqCst);
                    gate.notified().await;
                    Ok::<_, ()>(Text("one".into(), 100))
                };
                cache.get(&ask("acme", "a", "?"), load).await.unwrap().0.clone()
            })
        })
        .collect();
    while loads.load(SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    gate.notify_waiters();
    gate.notify_one();
    for asker in askers {
        assert_eq!(asker.await.unwrap(), "one");
    }
    assert_eq!(loads.load(SeqCst), 1);
    assert_eq!(cache.warmth(Class::History), Warmth { memory: 49, redis: 0, loaded: 1 });
}

#[tokio::test]
async fn an_entry_is_good_until_what_it_was_made_of_changes() {
    let cache = Cache::new(&Config::default());
    let (a, b) = (ask("acme", "a", "?"), ask("acme", "b", "?"));
    assert_eq!((get(&cache, &a, "a1").await, get(&cache, &b, "b1").await), ("a1".into(), "b1".into()));
    cache.changed(&[Tag::from("acme/a")]);
    assert_eq!((get(&cache, &a, "a2").await, get(&cache, &b, "b2").await), ("a2".into(), "b1".into()));
    cache.changed(&[Tag::from("acme")]);
    assert_eq!((get(&cache, &a, "a3").await, get(&cache, &b, "b3").await), ("a3".into(), "b3".into()));
}

#[tokio::test]
async fn what_changes_while_it_is_read_is_read_again_by_the_next() {
    let cache = Cache::new(&Config::default());
    let asked = ask("acme", "a", "?");
    let load = async || {
        cache.changed(&[Tag::from("acme/a")]);
        Ok::<_, ()>(Text("old".into(), 100))
    };
    assert_eq!(cache.get(&asked, load).await.unwrap().0, "old");
    assert_eq!(get(&cache, &asked, "new").await, "new");
}

#[tokio::test]
async fn no_workspace_gets_the_answer_of_another() {
    let cache = Cache::new(&Config::default());
    assert_eq!(get(&cache, &ask("acme", "a", "?"), "acme's").await, "acme's");
    assert_eq!(get(&cache, &ask("other", "a", "?"), "other's").await, "other's");
}

#[tokio::test]
async fn an_error_is_told_and_not_kept() {
    let cache = Cache::new(&Config::default());
    let asked = ask("acme", "a", "?");
    let failed = cache.get::<Text, _>(&asked, async || Err("away")).await;
    assert_eq!(*failed.unwrap_err(), "away");
    assert_eq!(get(&cache, &asked, "there").await, "there");
}

#[tokio::test]
async fn memory_is_bounded_and_an_entry_too_large_is_not_kept() {
    let cache = Cache::new(&Config { bytes: 10_000, ..Config::default() });
    for n in 0..1_000 {
        get(&cache, &ask("acme", "a", &n.to_string()), "x").await;
    }
    cache.memory.run_pending_tasks().await;
    assert!(cache.memory.weighted_size() <= 10_000, "{}", cache.memory.weighted_size());
    assert!(cache.memory.entry_count() > 20, "{}", cache.memory.entry_count());
    let (asked, before) = (ask("acme", "a", "large"), loaded(&cache));
    for _ in 0..2 {
        cache.get(&asked, async || Ok::<_, ()>(Text("large".into(), 1_251))).await.unwrap();
    }
    assert_eq!(loaded(&cache) - before, 2);
}

#[tokio::test]
async fn an_entry_ends_with_its_time() {
    let cache = Cache::new(&Config { history_ms: 50, ..Config::default() });
    let asked = ask("acme", "a", "?");
    assert_eq!(get(&cache, &asked, "first").await, "first");
    eventually("it is loaded again", async || get(&cache, &asked, "second").await == "second").await;
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn redis() -> Option<RedisServer> {
    RedisServer::start().map_err(|why| println!("skipped: {why}")).ok()
}

/// A node of an installation, connected.
async fn node(server: &RedisServer, installation: &str, era_file: &Path) -> Arc<Cache> {
    let settings = RedisConfig { url: Some(server.url.clone()), ..RedisConfig::default() };
    let cache = Cache::start(&Config::default(), &settings, installation, era_file.to_owned()).unwrap();
    eventually("connected", async || cache.redis() == Standing::Connected).await;
    cache
}

/// Until Redis has the answer of `asked`, as another node sees it.
async fn in_redis(cache: &Cache, asked: &Ask) {
    let link = cache.link.as_ref().unwrap();
    eventually("the entry is in Redis", async || link.find(asked).await.is_some_and(|looked| looked.found.is_some()))
        .await;
}

#[tokio::test]
async fn what_one_node_loaded_another_finds_in_redis_until_it_changes() {
    let Some(server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let (a, b) = (node(&server, "i", &dir.path().join("a")).await, node(&server, "i", &dir.path().join("b")).await);
    let stranger = node(&server, "another installation", &dir.path().join("c")).await;
    // each node that comes makes Redis forget, so they all are there before
    let asked = ask("acme", "a", "?");
    assert_eq!(get(&a, &asked, "first").await, "first");
    in_redis(&a, &asked).await;
    assert_eq!(get(&b, &asked, "of b").await, "first");
    assert_eq!(b.warmth(Class::History), Warmth { memory: 0, redis: 1, loaded: 0 });
    assert_eq!(get(&stranger, &asked, "a stranger's").await, "a stranger's");
    assert_eq!(get(&a, &ask("other", "a", "?"), "other's").await, "other's");

    a.changed(&[Tag::from("acme/a")]);
    assert_eq!(get(&a, &asked, "second").await, "second");
    eventually("the other node hears of it", async || get(&b, &asked, "second").await == "second").await;
    assert_eq!(get(&stranger, &asked, "anew").await, "a stranger's");
}

#[tokio::test]
async fn an_answer_that_comes_late_does_not_bring_back_what_has_changed() {
    let Some(server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let (a, b) = (node(&server, "i", &dir.path().join("a")).await, node(&server, "i", &dir.path().join("b")).await);
    let asked = ask("acme", "a", "?");
    let (link, life) = (a.link.as_ref().unwrap(), Duration::from_secs(60));
    let before = link.find(&asked).await.unwrap();
    b.changed(&[Tag::from("acme/a")]);
    eventually("Redis knows", async || b.link.as_ref().unwrap().inner.is_told(&asked.tags)).await;
    link.keep(&asked, before.stamp, b"old".to_vec(), life);
    eventually("it came", async || {
        let keys = ::redis::cmd("KEYS").arg("*entry*").to_owned();
        let ask =
            link.inner.ask(|mut connection| async move { keys.query_async::<Vec<String>>(&mut connection).await });
        ask.await.is_some_and(|keys| !keys.is_empty())
    })
    .await;
    assert_eq!(get(&b, &asked, "new").await, "new");
}

#[tokio::test]
async fn while_redis_is_gone_nobody_waits_and_nothing_stale_is_left_when_it_is_back() {
    let Some(mut server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let cache = node(&server, "i", &dir.path().join("a")).await;
    let asked = ask("acme", "a", "?");
    assert_eq!(get(&cache, &asked, "first").await, "first");
    in_redis(&cache, &asked).await;

    server.stop();
    let began = Instant::now();
    for n in 0..100 {
        assert_eq!(get(&cache, &ask("acme", "a", &n.to_string()), "x").await, "x");
    }
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    assert!(matches!(cache.redis(), Standing::Gone(reason) if !reason.is_empty()));
    cache.changed(&[Tag::from("acme/a")]);
    assert_eq!(get(&cache, &asked, "second").await, "second");

    server.start_again();
    eventually("it is back", async || cache.redis() == Standing::Connected).await;
    let again = ask("acme", "a", "again");
    assert_eq!(get(&cache, &again, "kept").await, "kept");
    in_redis(&cache, &again).await;
}

#[tokio::test]
async fn a_redis_that_hangs_costs_its_timeout_once_and_what_changed_meanwhile_is_told_first() {
    let Some(server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let cache = node(&server, "i", &dir.path().join("a")).await;
    let asked = ask("acme", "a", "?");
    assert_eq!(get(&cache, &asked, "first").await, "first");
    in_redis(&cache, &asked).await;

    server.signal("STOP");
    let began = Instant::now();
    for n in 0..100 {
        assert_eq!(get(&cache, &ask("acme", "a", &n.to_string()), "x").await, "x");
    }
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    let link = cache.link.as_ref().unwrap();
    assert!(matches!(cache.redis(), Standing::Gone(reason) if reason.contains("no answer within 50ms")));
    cache.changed(&[Tag::from("acme/a")]);
    server.signal("CONT");
    // the entry of before is still there, and must not be found
    eventually("it is back", async || cache.redis() == Standing::Connected).await;
    assert!(link.inner.is_told(&asked.tags));
    assert_eq!(get(&cache, &asked, "second").await, "second");
}

#[tokio::test]
async fn a_restart_finds_what_redis_keeps_after_a_clean_stop_and_only_then() {
    let Some(server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let (file, asked) = (dir.path().join("era"), ask("acme", "a", "?"));
    let cache = node(&server, "i", &file).await;
    assert_eq!(get(&cache, &asked, "first").await, "first");
    in_redis(&cache, &asked).await;
    cache.stop().await;
    drop(cache);

    let cache = node(&server, "i", &file).await;
    assert_eq!(get(&cache, &asked, "second").await, "first");
    drop(cache); // as a crash does: a change may not have been told
    let cache = node(&server, "i", &file).await;
    assert_eq!(get(&cache, &asked, "third").await, "third");
}

#[tokio::test]
async fn nodes_take_from_one_bucket_and_redis_fills_it() {
    let Some(mut server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let (a, b) = (node(&server, "i", &dir.path().join("a")).await, node(&server, "i", &dir.path().join("b")).await);
    let slow = Rate { burst: 10.0, per_second: 0.001 };
    let mut open = 0;
    for _ in 0..10 {
        for cache in [&a, &b] {
            open += usize::from(cache.take("ann", slow, 1.0).await.unwrap().is_open);
        }
    }
    assert_eq!(open, 10);
    assert!(a.take("bob", slow, 1.0).await.unwrap().is_open);
    // what was used counts on in a larger one
    let larger = a.take("ann", Rate { burst: 15.0, per_second: 0.001 }, 1.0).await.unwrap();
    assert!(larger.is_open && (3.9..4.2).contains(&larger.tokens), "{larger:?}");
    let quick = Rate { burst: 1.0, per_second: 50.0 };
    assert!(a.take("quick", quick, 1.0).await.unwrap().is_open);
    eventually("it fills", async || b.take("quick", quick, 1.0).await.unwrap().is_open).await;
    server.stop();
    assert_eq!(a.take("ann", slow, 1.0).await, None);
}

#[tokio::test]
async fn nodes_count_tries_together_and_who_failed_too_often_waits_ever_longer() {
    let Some(mut server) = redis() else { return };
    let dir = TempDir::new().unwrap();
    let (a, b) = (node(&server, "i", &dir.path().join("a")).await, node(&server, "i", &dir.path().join("b")).await);
    let patience = Patience { longest: Duration::from_secs(60), forget: Duration::from_secs(900) };
    let count = async |node: &Cache, account: &str| {
        node.count_try(&[(account, 3), ("address", 7)], patience).await.map(|wait| wait.as_secs_f64())
    };
    for node in [&a, &b, &a] {
        assert_eq!(count(node, "ann").await, Some(0.0));
    }
    let wait = count(&b, "ann").await.unwrap();
    assert!((0.5..=1.0).contains(&wait), "{wait}");
    // what was no failure is taken back on whatever node
    b.take_back_try(&["ann", "address"]).await;
    assert_eq!(count(&a, "ann").await, Some(0.0));
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    assert_eq!(count(&a, "ann").await, Some(0.0));
    let wait = count(&b, "ann").await.unwrap();
    assert!((1.0..=2.0).contains(&wait), "{wait}");
    b.forget_tries("ann").await;
    assert_eq!(count(&a, "ann").await, Some(0.0));
    // of all accounts together there were 5, and there may be 7
    assert_eq!((count(&a, "bob").await, count(&b, "eve").await), (Some(0.0), Some(0.0)));
    assert!(count(&a, "joe").await.unwrap() > 0.0);
    server.stop();
    assert_eq!(count(&a, "ann").await, None);
}

#[tokio::test]
async fn an_address_that_cannot_be_is_refused_with_what_to_write() {
    for url in ["localhost:6379", "http://localhost"] {
        let settings = RedisConfig { url: Some(url.into()), ..RedisConfig::default() };
        let refused = Cache::start(&Config::default(), &settings, "i", "era".into()).err().unwrap().to_string();
        assert!(refused.contains("redis://USER:PASSWORD@HOST:PORT/DATABASE"), "{refused}");
    }
    let (url, ca_file) = (Some("rediss://localhost".into()), Some("/nowhere/ca.pem".into()));
    let refused = RedisConfig { url, ca_file, ..RedisConfig::default() }.check().unwrap_err().to_string();
    assert!(refused.starts_with("cannot read redis.ca_file `/nowhere/ca.pem`"), "{refused}");
    let hidden = RedisConfig { url: Some("redis://:hush@localhost".into()), ..RedisConfig::default() };
    assert!(!format!("{hidden:?}").contains("hush"));
}

#[tokio::test]
async fn over_tls_redis_is_who_its_certificate_says_or_is_not_spoken_to() {
    let dir = TempDir::new().unwrap();
    let pem = |name: &str| dir.path().join(name).display().to_string();
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj"]);
    openssl.args(["/CN=redis", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE"]);
    let made = openssl.args(["-keyout", &pem("key.pem"), "-out", &pem("cert.pem")]).output();
    if !made.is_ok_and(|made| made.status.success()) {
        return println!("skipped: openssl does not make certificates here");
    }
    let started = RedisServer::start_with(|port, _| {
        let port = port.to_string();
        let (cert, key) = (pem("cert.pem"), pem("key.pem"));
        let files = ["--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-ca-cert-file", &cert];
        let tls = ["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"];
        tls.iter().chain(&files).map(ToString::to_string).collect()
    });
    let server = match started {
        Ok(server) => server,
        Err(why) => return println!("skipped: {why}"),
    };
    let start = |host: &str, ca_file: Option<&str>| {
        let url = Some(server.url.replace("redis://127.0.0.1", &format!("rediss://{host}")));
        let settings = RedisConfig { url, ca_file: ca_file.map(|name| pem(name).into()), ..RedisConfig::default() };
        Cache::start(&Config::default(), &settings, "i", dir.path().join("era")).unwrap()
    };
    let cache = start("localhost", Some("cert.pem"));
    eventually("connected", async || cache.redis() == Standing::Connected).await;
    let asked = ask("acme", "a", "?");
    get(&cache, &asked, "over TLS").await;
    in_redis(&cache, &asked).await;
    for stranger in [start("127.0.0.1", Some("cert.pem")), start("localhost", None)] {
        let reason = || match stranger.redis() {
            Standing::Gone(reason) => reason,
            other => panic!("{other:?}"),
        };
        eventually("it is refused", async || reason().contains("certificate")).await;
    }
}
