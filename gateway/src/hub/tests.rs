use super::*;
use crate::config::Kept;
use crate::socket::frame;
use crate::socket::wire::tests::Pair;
use actors::PortfolioSummary;
use bytes::Bytes;
use engine::portfolio::{Position, Prices, summarise};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::atomic::AtomicBool;
use tokio::io::AsyncReadExt;

fn acme() -> WorkspaceId {
    "acme".parse().unwrap()
}

fn hub(limits: Limits) -> Arc<Hub> {
    Hub::new(&limits, &History::default())
}

/// A hub whose channels all keep this much.
fn keeping(kept: Kept, limits: Limits) -> Arc<Hub> {
    Hub::new(&limits, &History { streams: kept, alerts: kept, threads: kept, states: kept })
}

/// The messages in frames of text.
fn texts(frames: &[Bytes]) -> Vec<String> {
    let payloads = frames.iter().flat_map(|frames| frame::payloads(frames));
    payloads.map(|payload| std::str::from_utf8(payload).unwrap().to_owned()).collect()
}

fn make(hub: &Hub, name: ChannelName) -> Arc<Channel> {
    hub.make(Some(acme()), name, vec!["extra".into()], (hub.epoch.clone(), hub.floor.load(Ordering::Relaxed)))
}

/// A channel of this hub that is ready for subscribers.
fn open(hub: &Hub, text: &str) -> Arc<Channel> {
    let name = ChannelName::parse(text, 1).unwrap();
    let site = (Some(acme()), name.topic.clone());
    let channel = make(hub, name);
    channel.with(|inner| {
        if let Body::Loading(_) = inner.body {
            inner.body = Body::State(State::new(Place::Root));
        }
    });
    hub.channels.write().entry(site).or_default().push(channel.clone());
    channel
}

/// A client that checks what it gets as a careful one would.
struct Client {
    id: u64,
    outbox: Arc<Outbox>,
    channel: Arc<Channel>,
    epoch: String,
    offset: Option<u64>,
    recovered: bool,
    document: Option<Value>,
    events: Vec<Value>,
    frames: usize,
}

/// Asks for nothing in particular.
fn none(outbox: &Arc<Outbox>) -> Wish<'_> {
    let (since, rate, reference, run, missed) = Default::default();
    Wish {
        id: 99,
        outbox,
        since,
        rate,
        reference,
        dialect: Dialect::Current,
        run,
        missed,
        instead: None,
        is_node: false,
    }
}

impl Client {
    fn of(hub: &Hub, channel: &Arc<Channel>, rate: Option<Duration>) -> Client {
        let outbox = Outbox::new(hub.limits.queue_bytes, Form::Text);
        let mut client = Client {
            id: 0,
            outbox,
            channel: channel.clone(),
            epoch: String::new(),
            offset: None,
            recovered: false,
            document: None,
            events: Vec::new(),
            frames: 0,
        };
        client.subscribe(hub, None, rate);
        client
    }

    fn subscribe(&mut self, hub: &Hub, since: Option<Since>, rate: Option<Duration>) {
        self.id = hub.next_id();
        let wish = Wish { id: self.id, since, rate, reference: Some("r".into()), ..none(&self.outbox) };
        self.channel.subscribe(&wish).unwrap().unwrap();
    }

    /// Loses the connection and comes back for what it missed.
    fn resume(&mut self, hub: &Hub) {
        self.leave();
        let since = self.offset.map(|offset| Since { epoch: self.epoch.clone(), offset });
        self.outbox = Outbox::new(hub.limits.queue_bytes, Form::Text);
        self.subscribe(hub, since, None);
    }

    fn leave(&self) {
        self.outbox.remove(self.id);
        self.channel.unsubscribe(self.id, Instant::now());
    }

    fn take(&mut self) -> Vec<String> {
        self.take_at(Instant::now())
    }

    fn take_at(&mut self, now: Instant) -> Vec<String> {
        let texts = texts(&self.take_frames(now));
        for text in &texts {
            self.receive(serde_json::from_str(text).unwrap());
        }
        texts
    }

    fn take_frames(&self, now: Instant) -> Vec<Bytes> {
        let mut frames = Vec::new();
        loop {
            match self.outbox.take(None, now, &mut frames) {
                Taken::More => {}
                Taken::Until(_) => return frames,
                Taken::Cut(cut) => panic!("{cut:?}"),
            }
        }
    }

    fn receive(&mut self, frame: Value) {
        if frame["type"] == "ok" {
            assert_eq!(frame["ref"], "r");
            self.recovered = frame["recovered"].as_bool().unwrap();
            self.epoch = frame["epoch"].as_str().unwrap().to_owned();
            match self.recovered {
                true => assert_eq!(frame["offset"].as_u64(), self.offset, "recovered from where it was"),
                false => self.offset = frame["offset"].as_u64(),
            }
            return;
        }
        self.frames += 1;
        assert_eq!((&frame["type"], &frame["workspace"]), (&json!("event"), &json!("acme")));
        assert_eq!((&frame["channel"], &frame["epoch"]), (&json!(*self.channel.name.text), &json!(self.epoch)));
        let (offset, before) = (frame["offset"].as_u64().unwrap(), self.offset.unwrap());
        match frame["event"]["type"].as_str().unwrap() {
            "STATE_SNAPSHOT" => {
                assert!(offset >= before, "snapshot {offset} after {before}");
                self.document = Some(frame["event"]["snapshot"].clone());
            }
            "STATE_DELTA" => {
                assert!(offset > before, "delta {offset} after {before}");
                let patch: json_patch::Patch = serde_json::from_value(frame["event"]["delta"].clone()).unwrap();
                json_patch::patch(self.document.as_mut().unwrap(), &patch).unwrap();
            }
            _ => {
                match self.document {
                    None if self.channel.name.text.starts_with("streams/") => assert!(offset > before),
                    None => assert_eq!(offset, before + 1, "no event is lost or doubled"),
                    Some(_) => assert!(offset > before),
                }
                self.events.push(frame["event"].clone());
            }
        }
        self.offset = Some(offset);
    }
}

fn document(channel: &Channel) -> Value {
    channel.with(|inner| match &inner.body {
        Body::State(state) => serde_json::from_str(&state.document()).unwrap(),
        _ => panic!("no state"),
    })
}

fn numbered(n: usize) -> String {
    custom("n", &n.to_string())
}

fn numbers(client: &Client) -> Vec<u64> {
    client.events.iter().map(|event| event["value"].as_u64().unwrap()).collect()
}

#[test]
fn an_event_is_encoded_once_and_every_subscriber_gets_it() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "alerts");
    let mut clients: Vec<Client> = (0..3).map(|_| Client::of(&hub, &channel, None)).collect();
    clients.iter_mut().for_each(|client| drop(client.take()));
    channel.event(&numbered(7));
    let got: Vec<Bytes> = clients.iter().flat_map(|client| client.take_frames(Instant::now())).collect();
    assert_eq!(got.len(), 3);
    assert!(got.iter().all(|bytes| std::ptr::eq(&**bytes, &*got[0])), "the same bytes for all");
    assert!(texts(&got).iter().all(|text| text.ends_with("\"value\":7}}")));
}

#[test]
fn what_a_subscription_is_told_of_comes_once_and_not_when_it_has_ended() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "alerts");
    let mut client = Client::of(&hub, &channel, None);
    client.take();
    let told = Told { id: client.id, channel: &channel };
    let take = || {
        let mut frames = Vec::new();
        assert_eq!(client.outbox.take(Some(told), Instant::now(), &mut frames), Taken::Until(None));
        texts(&frames).len()
    };
    channel.event(&numbered(1)); // the outbox knows of it too
    assert_eq!(take(), 1);
    channel.event(&numbered(2));
    channel.event(&numbered(3));
    assert_eq!(take(), 2);
    channel.event(&numbered(4));
    client.leave();
    assert_eq!(take(), 0);
}

#[tokio::test]
async fn what_the_round_may_not_write_to_a_client_waits_for_it() {
    let (hub, Pair { wire, outbox, mut client, .. }) = (hub(Limits::default()), Pair::new().await);
    let channel = open(&hub, "alerts");
    hub.connect(&outbox, wire);
    channel.subscribe(&none(&outbox)).unwrap().unwrap();
    let mut read = async || {
        let (mut bytes, mut scratch) = (vec![0; 4_096], Vec::new());
        let written = tokio::time::timeout(Duration::from_millis(50), client.read(&mut bytes)).await;
        if let Ok(read) = written {
            bytes.truncate(read.unwrap());
            return texts(&[bytes.into()]).len();
        }
        outbox.is_to_look(); // its task looks, and writes
        outbox.write(None, Instant::now(), &mut scratch);
        0
    };
    assert_eq!((read().await, read().await), (0, 1), "the answer");
    channel.event(&numbered(1));
    assert_eq!(read().await, 1, "by the round");
    outbox.suspect(); // something was taken from it: the round writes nothing before that was looked at
    channel.event(&numbered(2));
    assert_eq!((read().await, read().await), (0, 1));
}

#[test]
fn a_client_too_slow_for_events_is_cut_off_alone() {
    let kept = Kept { bytes: 5_000, ..Kept::default() };
    let hub = keeping(kept, Limits { queue_bytes: 10_000, ..Limits::default() });
    let channel = open(&hub, "alerts");
    let (mut quick, slow) = (Client::of(&hub, &channel, None), Client::of(&hub, &channel, None));
    for n in 0..500 {
        channel.event(&numbered(n));
        quick.take();
    }
    let Taken::Cut(Cut::TooSlow(why)) = slow.outbox.take(None, Instant::now(), &mut Vec::new()) else {
        panic!("it still gets events")
    };
    assert!(why.starts_with("too slow for alerts, now at ") && why.len() <= 123, "{why}");
    assert_eq!(numbers(&quick), (0..500).collect::<Vec<_>>());
    // it comes back for the rest
    let mut back = slow;
    back.take_after_cut(&hub);
    assert!(!back.recovered || back.events.len() == 500);
}

impl Client {
    fn take_after_cut(&mut self, hub: &Hub) {
        self.outbox = Outbox::new(hub.limits.queue_bytes, Form::Text);
        self.subscribe(hub, Some(Since { epoch: hub.epoch.to_string(), offset: 0 }), None);
        self.offset = Some(0);
        self.take();
    }
}

#[test]
fn a_client_resumes_exactly_where_it_was_as_far_as_history_goes() {
    let hub = keeping(Kept { events: 10, ..Kept::default() }, Limits::default());
    let channel = open(&hub, "alerts");
    (1..=30).for_each(|n| channel.event(&numbered(n)));
    for since in 0..=31 {
        let mut client = Client::of(&hub, &channel, None);
        client.take();
        client.leave();
        client.offset = Some(since);
        client.resume(&hub);
        client.take();
        let held = (20..=30).contains(&since);
        assert_eq!(client.recovered, held, "since {since}");
        let expected: Vec<u64> = if held { (since + 1..=30).collect() } else { Vec::new() };
        assert_eq!(numbers(&client), expected, "since {since}");
    }
}

#[test]
fn history_is_bounded_in_bytes_too() {
    let hub = keeping(Kept { bytes: 2_000, ..Kept::default() }, Limits::default());
    let channel = open(&hub, "alerts");
    (1..=100).for_each(|n| channel.event(&numbered(n)));
    let mut client = Client::of(&hub, &channel, None);
    client.take();
    client.offset = Some(1);
    client.resume(&hub);
    client.take();
    assert!(!client.recovered);
}

#[test]
fn a_position_of_another_epoch_is_not_recovered() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "alerts");
    channel.event(&numbered(1));
    let mut client = Client::of(&hub, &channel, None);
    client.take();
    client.epoch = "another".into();
    client.resume(&hub);
    client.take();
    assert!(!client.recovered && client.events.is_empty());
}

#[test]
fn a_channel_that_was_forgotten_and_made_again_does_not_take_old_positions_for_its_own() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "alerts");
    let mut client = Client::of(&hub, &channel, None);
    (0..5).for_each(|n| channel.event(&numbered(n)));
    client.take();
    client.leave();
    hub.close(&channel);
    let wish = none(&client.outbox);
    assert!(channel.subscribe(&wish).is_none(), "a closed channel takes no subscriber");
    client.channel = open(&hub, "alerts");
    client.resume(&hub);
    client.take();
    assert!(!client.recovered);
    client.channel.event(&numbered(9));
    client.take();
    assert_eq!(numbers(&client).last(), Some(&9));
}

#[test]
fn channels_without_listeners_are_forgotten_after_a_while() {
    let hub = hub(Limits::default());
    let (idle, used) = (open(&hub, "portfolio/p"), open(&hub, "streams/market.trades"));
    let client = Client::of(&hub, &used, None);
    let now = Instant::now();
    hub.sweep(now);
    assert_eq!(hub.channels.read().len(), 2);
    hub.sweep(now + LINGER + SWEEP_EVERY);
    assert_eq!(hub.channels.read().len(), 1);
    assert!(idle.close_if_idle(Duration::MAX, now).is_some(), "it was closed");
    client.leave();
}

fn set(name: &str, value: usize) -> Vec<(String, String)> {
    vec![(name.to_owned(), value.to_string())]
}

fn put(state: &State, name: &str, value: Option<usize>) -> Vec<Op> {
    let current: Value = serde_json::from_str(&state.document()).unwrap();
    let mut all: Vec<(String, String)> = members(current);
    all.retain(|(known, _)| known != name);
    all.extend(value.into_iter().flat_map(|value| set(name, value)));
    state.replace(all)
}

#[test]
fn a_slow_client_of_a_state_gets_the_newest_values_only() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "portfolio/p");
    let (mut quick, mut slow) = (Client::of(&hub, &channel, None), Client::of(&hub, &channel, None));
    slow.take();
    for n in 0..5_000 {
        channel.update(|state| put(state, ["a", "b", "c"][n % 3], Some(n)));
        quick.take();
    }
    let texts = slow.take();
    let bytes: usize = texts.iter().map(|text| text.len()).sum();
    assert!(texts.len() <= 2 && bytes < 1_000, "{} messages, {bytes} bytes", texts.len());
    assert_eq!(slow.document, Some(json!({"a": 4998, "b": 4999, "c": 4997})));
    assert_eq!(quick.document, slow.document);
    assert_eq!(quick.offset, slow.offset);
}

#[test]
fn a_rate_is_the_least_time_between_two_messages() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "portfolio/p");
    let start = Instant::now();
    let mut client = Client::of(&hub, &channel, Some(Duration::from_secs(1)));
    client.take_at(start);
    for n in 0..100 {
        channel.update(|state| put(state, "a", Some(n)));
        client.take_at(start + Duration::from_millis(25 * n as u64));
    }
    assert_eq!(client.frames, 4, "the snapshot, then a delta at 0 s, 1 s and 2 s");
    client.take_at(start + Duration::from_secs(10));
    assert_eq!(client.document, Some(json!({"a": 99})));
}

#[test]
fn whatever_clients_do_each_ends_with_the_state_of_the_channel() {
    for seed in 0..400 {
        let mut rng = StdRng::seed_from_u64(seed);
        let history = if rng.random() { 3 } else { 1_000 };
        let hub = keeping(Kept { events: history, ..Kept::default() }, Limits::default());
        let channel = open(&hub, "portfolio/p");
        let mut clients: Vec<Client> = (0..3).map(|_| Client::of(&hub, &channel, None)).collect();
        for step in 0..60 {
            let client = &mut clients[rng.random_range(0..3)];
            match rng.random_range(0..10) {
                0 => drop(client.take()),
                1 => {
                    client.take();
                    client.resume(&hub);
                }
                2 => client.resume(&hub),
                3 => channel.reset(),
                _ => {
                    // long values, so that queues fold
                    let name = format!("{}/{}", rng.random_range(0..4), "x".repeat(8_000));
                    let value = rng.random_bool(0.7).then_some(step);
                    channel.update(|state| put(state, &name, value));
                }
            }
        }
        for (n, client) in clients.iter_mut().enumerate() {
            client.take();
            assert_eq!(client.document, Some(document(&channel)), "seed {seed}, client {n}");
        }
    }
}

#[test]
fn nothing_is_lost_or_doubled_while_clients_come_and_go_as_events_are_published() {
    const EVENTS: usize = 20_000;
    let kept = Kept { events: EVENTS, bytes: 64 << 20, ..Kept::default() };
    let hub = keeping(kept, Limits { queue_bytes: 64 << 20, ..Limits::default() });
    let channel = open(&hub, "alerts");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (hub, channel, done) = (&hub, &channel, &done);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed);
                let mut client = Client::of(hub, channel, None);
                client.take();
                // what was published between subscribing and the first look has come already
                let first = numbers(&client).first().copied().unwrap_or(client.offset.unwrap() + 1);
                loop {
                    let over = done.load(Ordering::Acquire);
                    client.take(); // asserts that each offset follows the one before
                    if over {
                        break;
                    }
                    if rng.random_bool(0.3) {
                        client.resume(hub);
                        client.take();
                        assert!(client.recovered);
                    }
                }
                assert_eq!(numbers(&client), (first..=EVENTS as u64).collect::<Vec<_>>());
            });
        }
        (1..=EVENTS).for_each(|n| channel.event(&numbered(n)));
        done.store(true, Ordering::Release);
    });
}

fn valued(qty: f64) -> What {
    let positions = [Position { symbol: "A".into(), qty, cost: 1.0, sector: None }];
    let summary = summarise(&positions, &Prices::default());
    let (id, name, currency) = ("p".parse().unwrap(), "P".into(), "USD".into());
    What::Portfolio { id: "p".parse().unwrap(), summary: Arc::new(PortfolioSummary { id, name, currency, summary }) }
}

#[test]
fn a_state_that_changes_while_it_is_read_is_complete_whenever_the_changes_come() {
    // the changes 1..=n; `registered` came before the channel was there, `read` before the state was read
    const LAST: usize = 6;
    for registered in 0..=LAST {
        for read in registered..=LAST {
            let hub = hub(Limits::default());
            let name = ChannelName::parse("portfolio/p", 1).unwrap();
            let channel = make(&hub, name.clone());
            hub.channels.write().insert((Some(acme()), name.topic), vec![channel.clone()]);
            let publish = |n: usize| hub.publish(Update { workspace: acme(), what: valued(n as f64) });
            (registered..read).for_each(publish);
            let mut state = State::new(Place::Root);
            if let What::Portfolio { summary, .. } = valued(read as f64) {
                state.replace(members(encode::portfolio(&summary))).into_iter().for_each(|op| state.apply(op, 0));
            }
            (read..LAST).for_each(publish);
            assert!(load::begin(&channel, state));
            let mut client = Client::of(&hub, &channel, None);
            publish(LAST);
            client.take();
            assert_eq!(client.document.unwrap()["positions"][0]["qty"], LAST as f64, "{registered} {read}");
        }
    }
}

#[test]
fn a_state_that_changes_too_often_while_it_is_read_is_read_again() {
    let hub = hub(Limits::default());
    let name = ChannelName::parse("portfolio/p", 1).unwrap();
    let channel = make(&hub, name.clone());
    hub.channels.write().insert((Some(acme()), name.topic), vec![channel.clone()]);
    for n in 0..=MEANWHILE_MAX {
        hub.publish(Update { workspace: acme(), what: valued(n as f64) });
    }
    assert!(!load::begin(&channel, State::new(Place::Root)));
}

fn run(hub: &Hub, n: u64, event: RunEvent) {
    let what = What::Run { thread: "t".into(), run: "r".into(), n, event: Arc::new(event) };
    hub.publish(Update { workspace: acme(), what });
}

#[test]
fn whoever_comes_during_a_run_gets_it_from_its_start_and_whoever_comes_later_does_not() {
    let hub = hub(Limits::default());
    let started = || RunEvent::Started { thread: "t".into(), run: "r".into(), parent: None, legacy: false };
    run(&hub, 1, started());
    run(&hub, 2, RunEvent::TextDelta { id: "m".into(), delta: "hel".into() });
    let channel = hub.listening(&acme(), Topic::Thread("t".into())).remove(0);
    let mut during = Client::of(&hub, &channel, None);
    run(&hub, 3, RunEvent::TextDelta { id: "m".into(), delta: "lo".into() });
    run(&hub, 4, RunEvent::Error { message: "over".into(), code: "test".into() });
    during.take();
    let types: Vec<&str> = during.events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["RUN_STARTED", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_CONTENT", "RUN_ERROR"]);
    let mut later = Client::of(&hub, &channel, None);
    later.take();
    assert!(later.events.is_empty());
}

#[test]
fn events_of_a_stream_are_filtered_by_column_and_keep_their_json() {
    use arrow::array::{Int64Array, StringArray};
    let hub = hub(Limits::default());
    let filters = ["", "?symbol=A", "?qty=2", "?symbol=A&qty=2", "?qty=02", "?other=A"];
    let channels = filters.map(|filter| open(&hub, &format!("streams/market.trades{filter}")));
    let mut clients = channels.each_ref().map(|channel| Client::of(&hub, channel, None));
    let symbols: ArrayRef = Arc::new(StringArray::from(vec![Some("A"), Some("B"), Some("A"), None]));
    let quantities: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), Some(2), Some(2), None]));
    let extra: ArrayRef = Arc::new(StringArray::from(vec![Some(r#"{"k":1}"#), None, None, None]));
    let columns = [("symbol", symbols, true), ("qty", quantities, true), ("extra", extra, true)];
    let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
    let what = What::Events { stream: "market.trades".parse().unwrap(), batch, offset: 1 };
    hub.publish(Update { workspace: acme(), what: what.clone() });
    hub.publish(Update { workspace: "other".parse().unwrap(), what });
    clients.iter_mut().for_each(|client| drop(client.take()));
    let a = json!({"symbol": "A", "qty": 1, "extra": {"k": 1}});
    let (b, c) = (json!({"symbol": "B", "qty": 2}), json!({"symbol": "A", "qty": 2}));
    let event = |events: Value| vec![json!({"type": "CUSTOM", "name": "stream.events", "value": {"events": events}})];
    let got = clients.map(|client| client.events);
    let expected =
        [event(json!([a, b, c, {}])), event(json!([a, c])), event(json!([b, c])), event(json!([c])), vec![], vec![]];
    assert_eq!(got, expected);
}

fn row(key: &str, end: i64, is_final: bool) -> MetricRow {
    let json = json!({"end": end, "final": is_final}).to_string().into();
    let window_end = engine::event::Micros(end);
    MetricRow { key: key.into(), pairs: Vec::new(), json, window_end, is_final, revision: 0 }
}

#[test]
fn a_folded_message_shows_the_last_final_row_of_a_key_before_its_newest_and_says_how_many_it_stands_for() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "metrics/m");
    channel.with(|inner| inner.body = Body::State(State::new(Place::Rows)));
    let start = Instant::now();
    let mut client = Client::of(&hub, &channel, Some(Duration::from_secs(1)));
    channel.update(|state| state.rows(&[row("a", 10, false)], &[], false, false));
    client.take_at(start);
    for (end, is_final) in [(10, false), (10, true), (20, false)] {
        channel.update(|state| state.rows(&[row("a", end, is_final)], &[], false, is_final));
    }
    let texts = client.take_at(start + Duration::from_secs(2));
    let frame: Value = serde_json::from_str(&texts[0]).unwrap();
    let value =
        |end: i64, is_final: bool| json!({"op": "add", "path": "/rows/a", "value": {"end": end, "final": is_final}});
    assert_eq!(frame["event"]["delta"], json!([value(10, true), value(20, false)]));
    assert_eq!((texts.len(), &frame["merged"]), (1, &json!(2)), "the row that did not change was no message");
}

#[test]
fn a_client_with_a_rate_is_told_that_its_metric_failed_and_loses_no_change_by_it() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "portfolio/p");
    let start = Instant::now();
    let mut client = Client::of(&hub, &channel, Some(Duration::from_secs(1)));
    for n in 0..4 {
        channel.update(|state| put(state, "a", Some(n)));
        client.take_at(start);
    }
    channel.event(&custom("metric.failed", "{}"));
    client.take_at(start);
    assert_eq!(client.events.len(), 1);
    client.take_at(start + Duration::from_secs(2));
    assert_eq!(client.document, Some(json!({"a": 3})));
}

#[test]
fn an_alert_is_kept_for_who_comes_back_although_nobody_listened_when_it_fired() {
    let hub = hub(Limits::default());
    let fire = |id: &str| {
        let alert = sql::store::Alert {
            id: id.into(),
            workspace: acme(),
            rule: "r".parse().unwrap(),
            metric: "m".parse().unwrap(),
            severity: "high".into(),
            labels: json!({"symbol": "A"}),
            state: "firing".into(),
            row: json!({}),
            started_at: engine::event::Micros(0),
            fired_at: engine::event::Micros(1),
            resolved_at: None,
            acked_at: None,
            acked_by: None,
        };
        hub.publish(Update { workspace: acme(), what: What::Alert { phase: AlertPhase::Firing, alert } });
    };
    fire("one");
    let channel = hub.listening(&acme(), Topic::Alerts).remove(0);
    let mut client = Client::of(&hub, &channel, None);
    client.take();
    assert!(client.events.is_empty(), "a newcomer gets what comes from now on");
    client.leave();
    fire("two");
    hub.sweep(Instant::now() + LINGER + SWEEP_EVERY);
    client.resume(&hub);
    client.take();
    assert!(client.recovered);
    let ids: Vec<&Value> = client.events.iter().map(|event| &event["value"]["alert"]["id"]).collect();
    assert_eq!(ids, ["two"]);
}

#[test]
fn histories_together_are_bounded() {
    let hub = keeping(Kept { bytes: usize::MAX, ..Kept::default() }, Limits::default());
    let channel = open(&hub, "alerts");
    hub.histories.store(HISTORIES_BYTES_MAX, Ordering::Relaxed);
    (0..10).for_each(|n| channel.event(&numbered(n)));
    let mut client = Client::of(&hub, &channel, None);
    client.take();
    (client.offset, client.epoch) = (Some(8), hub.epoch.to_string());
    client.resume(&hub);
    client.take();
    assert!(!client.recovered, "only the last message is held");
    client.leave();
    drop(client);
    drop(channel);
    hub.channels.write().clear();
    assert_eq!(hub.histories.load(Ordering::Relaxed), HISTORIES_BYTES_MAX, "a channel that is gone takes no room");
}

#[test]
fn a_client_that_takes_no_answers_is_asked_for_nothing_more_until_it_does() {
    let outbox = Outbox::new(100, Form::Text);
    (0..10).for_each(|_| outbox.reply(&"x".repeat(20)));
    assert!(!outbox.has_room());
    outbox.take(None, Instant::now(), &mut Vec::new());
    assert!(outbox.has_room());
}

#[test]
fn a_history_is_bounded_in_age() {
    let hub = keeping(Kept { seconds: 60, ..Kept::default() }, Limits::default());
    let channel = open(&hub, "alerts");
    (1..=3).for_each(|n| channel.event(&numbered(n)));
    assert!(channel.has_history());
    channel.sweep(Instant::now() + Duration::from_secs(59));
    assert!(channel.has_history());
    channel.sweep(Instant::now() + Duration::from_secs(61));
    assert!(!channel.has_history());
    assert_eq!(hub.histories.load(Ordering::Relaxed), 0);
}

#[test]
fn clients_that_stand_still_take_no_room_of_their_own() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "streams/market.trades");
    let mut quick = Client::of(&hub, &channel, None);
    quick.take();
    let stalled: Vec<Client> = (0..50).map(|_| Client::of(&hub, &channel, None)).collect();
    let event = custom("n", &format!("\"{}\"", "x".repeat(4 << 10)));
    for _ in 0..2_000 {
        channel.event(&event);
        quick.take();
    }
    assert_eq!(quick.events.len(), 2_000);
    assert!(stalled.iter().all(|client| matches!(client.outbox.over(), Some(Cut::TooSlow(_)))));
    let held = hub.histories.load(Ordering::Relaxed);
    assert!(held <= (1 << 20) + (64 << 10), "{held} bytes for all of them");
}

#[test]
fn each_form_holds_the_same_messages_encoded_once_for_all() {
    let hub = hub(Limits::default());
    let channel = open(&hub, "alerts");
    let forms = [Form::Text, Form::Deflated, Form::Packed];
    let of = |form| {
        let mut client = Client::of(&hub, &channel, None);
        client.leave();
        client.outbox = Outbox::new(1 << 20, form);
        client.subscribe(&hub, None, None);
        client.take_frames(Instant::now());
        client
    };
    let clients = forms.map(|form| [of(form), of(form)]);
    let large = custom("large", &json!(vec!["as in many rows"; 500]).to_string());
    for event in [&custom("small", "1"), &large] {
        channel.event(event);
    }
    let taken = clients.each_ref().map(|pair| {
        let [one, two] = pair.each_ref().map(|client| client.take_frames(Instant::now()));
        assert!(one.len() == 1 && std::ptr::eq(&*one[0], &*two[0]), "shared");
        one[0].clone()
    });
    let whole = texts(&taken[..1]);
    let first = &taken[1][..frame::header_bytes(&taken[1]) + frame::payload_bytes(&taken[1])];
    assert_eq!(first[0], 0x81, "a small one is left as it is");
    let second = &taken[1][first.len()..];
    assert_eq!(second[0], 0xc1, "a large one is compressed");
    assert!(second.len() < whole[1].len() / 2);
    let mut packed = taken[2].clone();
    for text in &whole {
        let header = frame::header_bytes(&packed);
        let message = packed.split_to(header + frame::payload_bytes(&packed));
        assert_eq!(message[0], 0x82);
        let document: Value = rmp_serde::from_slice(&message[header..]).unwrap();
        assert_eq!(document, serde_json::from_str::<Value>(text).unwrap());
    }
}
