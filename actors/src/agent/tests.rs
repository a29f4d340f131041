//! Sessions, the analyst and the model on a real system: store, log and workspaces in a folder of the test's own.

use super::guard::verify;
use super::run::Run;
use super::*;
use crate::clock::SystemClock;
use crate::fault::Fault;
use crate::outlet::{Outlet, Update, What};
use crate::system::{Limits, Parts, QueryRequest, System};
use engine::event::WorkspaceId;
use parking_lot::Mutex;
use serde_json::json;
use sql::store::{Portfolio, Position, Store, User, Workspace};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use streams::decode::{Bounds, Format, TsUnit, decode};
use streams::dedup::Dedup;
use streams::log::EmbeddedLog;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Runs(Mutex<Vec<(String, u64)>>);

impl Outlet for Runs {
    fn publish(&self, update: Update) {
        if let What::Run { run, n, .. } = update.what {
            self.0.lock().push((run, n));
        }
    }
}

struct World {
    system: System,
    ws: WorkspaceId,
    published: Arc<Runs>,
    _dir: TempDir,
}

async fn world() -> World {
    let dir = TempDir::new().unwrap();
    let published = Arc::new(Runs::default());
    let store = Store::open(&format!("sqlite:{}/store.db", dir.path().display())).await.unwrap();
    let ann = User {
        id: "ann".into(),
        email: "ann@example.com".into(),
        password_hash: "hash".into(),
        admin: false,
        created_at: Micros(1),
    };
    store.create_user(&ann).await.unwrap();
    let parts = Parts {
        store,
        log: Arc::new(EmbeddedLog::open(&dir.path().join("log"), &streams::log::Config::default()).unwrap()),
        dedup: Arc::new(Dedup::open(&dir.path().join("ids"), &streams::dedup::Config::default()).unwrap()),
        outlet: published.clone(),
        clock: Arc::new(SystemClock),
        limits: Limits::default(),
        agents: BTreeMap::new(),
        cache: cache::Cache::new(&cache::Config::default()),
        webhooks: Default::default(),
        sealer: Arc::new(crate::Sealer::new(["a key of the tests, long enough for them"].into_iter())),
        retention: Default::default(),
    };
    let system = System::start(parts).await.unwrap();
    let ws: WorkspaceId = "acme".parse().unwrap();
    let workspace =
        Workspace { id: ws.clone(), name: "Acme".into(), pack: None, tier: "standard".into(), created_at: Micros(1) };
    system.create_workspace(workspace, "ann").await.unwrap();
    World { system, ws, published, _dir: dir }
}

/// An agent whose behaviour is told by the question.
struct Puppet;

#[async_trait::async_trait]
impl Agent for Puppet {
    async fn answer(&self, run: &mut Run) -> Result<Outcome, Failure> {
        let question = run.conversation.question();
        run.begin_step("playing")?;
        run.emit(RunEvent::TextStart { id: new_id("msg") })?;
        match question.as_str() {
            "panic" => panic!("as asked"),
            "hang" => std::future::pending().await,
            _ => run.say(&new_id("msg"), "one two three").await?,
        }
        Ok(Outcome::Success { pending: Vec::new() })
    }

    fn info(&self, name: &ItemName) -> AgentInfo {
        AgentInfo { name: name.clone(), description: String::new(), model: None, tools: Vec::new() }
    }
}

fn puppets(limit: Duration) -> Sessions {
    Sessions::of(BTreeMap::from([(analyst(), Arc::new(Puppet) as _)]), limit, LONG)
}

fn analyst() -> ItemName {
    "analyst".parse().unwrap()
}

fn ask(thread: &str, run: &str, question: &str) -> RunRequest {
    RunRequest {
        agent: analyst(),
        thread: thread.into(),
        run: run.into(),
        messages: vec![json!({"id": format!("u-{run}"), "role": "user", "content": question})],
        tools: Vec::new(),
        context: Vec::new(),
        state: Value::Null,
        forwarded: Value::Null,
        resume: Vec::new(),
        user: "ann".into(),
        parent_run: None,
        may_hold: true,
        legacy: false,
    }
}

async fn all(mut handle: RunHandle) -> Vec<RunEvent> {
    let mut events = Vec::new();
    while let Some((n, event)) = handle.next().await {
        events.push(event.as_ref().clone());
        assert_eq!(n, events.len() as u64);
    }
    assert_eq!(verify(&events), Ok(()));
    events
}

impl World {
    /// Runs a request to its end.
    async fn run(&self, sessions: &Sessions, request: RunRequest) -> Vec<RunEvent> {
        all(sessions.start(self.system.clone(), &self.ws, request).await.unwrap()).await
    }

    async fn ask(&self, sessions: &Sessions, thread: &str, question: &str) -> Vec<RunEvent> {
        self.run(sessions, ask(thread, &new_id("run"), question)).await
    }

    async fn start(&self, sessions: &Sessions, request: RunRequest) -> Result<RunHandle, Fault> {
        sessions.start(self.system.clone(), &self.ws, request).await
    }

    async fn hold(&self, positions: &[(&str, f64, f64)]) {
        let portfolio = Portfolio {
            workspace: self.ws.clone(),
            id: "fund".into(),
            name: "Growth".into(),
            currency: "USD".into(),
            created_at: Micros(1),
        };
        self.system.put_portfolio(&self.ws, portfolio).await.unwrap();
        let positions = positions
            .iter()
            .map(|(symbol, qty, cost)| Position { symbol: (*symbol).into(), qty: *qty, cost: *cost, sector: None })
            .collect();
        self.system.put_positions(&self.ws, &"fund".parse().unwrap(), positions, true).await.unwrap();
    }

    async fn trade(&self, symbol: &str, price: f64) {
        let stream = "market.trades".parse().unwrap();
        let schema = self.system.schema(&self.ws, &stream).await.unwrap();
        let body = json!({"symbol": symbol, "price": price, "qty": 1.0}).to_string();
        let bounds = Bounds::default();
        let now = self.system.now();
        let decoded = decode(&schema, body.as_bytes(), Format::Ndjson, TsUnit::Millis, &bounds, now).unwrap();
        self.system.ingest(&self.ws, &stream, decoded).await.unwrap();
        // the price reaches the portfolio behind the durable log
        let fund = "fund".parse().unwrap();
        while self.system.portfolio_summary(&self.ws, &fund).await.unwrap().summary.as_of.is_none() {
            tokio::task::yield_now().await;
        }
    }

    async fn held(&self, symbol: &str) -> f64 {
        let held = self.system.store().positions(&self.ws, "fund").await.unwrap();
        held.into_iter().find(|position| position.symbol == symbol).map_or(0.0, |position| position.qty)
    }
}

fn text(events: &[RunEvent]) -> String {
    let delta = |event: &RunEvent| match event {
        RunEvent::TextDelta { delta, .. } => Some(delta.clone()),
        _ => None,
    };
    events.iter().filter_map(delta).collect()
}

fn outcome(events: &[RunEvent]) -> &Outcome {
    match events.last() {
        Some(RunEvent::Finished { outcome, .. }) => outcome,
        other => panic!("{other:?}"),
    }
}

fn code(events: &[RunEvent]) -> &str {
    match events.last() {
        Some(RunEvent::Error { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

fn is_success(events: &[RunEvent]) -> bool {
    *outcome(events) == Outcome::Success { pending: Vec::new() }
}

#[tokio::test]
async fn a_panic_ends_its_run_as_internal_and_the_run_that_waited_goes_on() {
    let (world, sessions) = (world().await, puppets(LONG));
    let first = world.start(&sessions, ask("t", "r1", "panic")).await.unwrap();
    let second = world.start(&sessions, ask("t", "r2", "hi")).await.unwrap();
    assert_eq!(code(&all(first).await), "internal");
    assert!(is_success(&all(second).await));
    let info = sessions.info();
    assert_eq!((info[0].restarts, info[0].last_failure.as_deref()), (1, Some("panic: as asked")));
}

#[tokio::test]
async fn a_session_that_fails_before_its_run_is_started_again_and_a_supervisor_that_fails_is_told() {
    let (world, sessions) = (world().await, puppets(LONG));
    crate::fault_point::fail("session", "acme/t");
    assert!(is_success(&world.ask(&sessions, "t", "hi").await));
    let info = sessions.info();
    assert_eq!((info[0].restarts, info[0].last_failure.as_deref()), (1, Some("a test said so")));
    sessions.fail_supervisor();
    let run = world.start(&sessions, ask("other", "r2", "hi")).await;
    tokio::time::timeout(LONG, sessions.ended()).await.unwrap();
    drop(run);
}

#[tokio::test]
async fn a_run_that_takes_too_long_ends_as_timeout() {
    let (world, sessions) = (world().await, puppets(Duration::from_millis(30)));
    assert_eq!(code(&world.ask(&sessions, "t", "hang").await), "timeout");
}

#[tokio::test]
async fn a_run_cancelled_at_any_event_is_closed_in_order_and_ends_as_cancelled() {
    let world = world().await;
    world.hold(&[("AAPL", 10.0, 90.0)]).await;
    let sessions = Sessions::new(BTreeMap::new());
    let whole = world.ask(&sessions, "t", "Show the portfolio summary").await.len();
    for stop_at in 0..whole {
        let run = new_id("run");
        let request = ask(&run, &run, "Show the portfolio summary");
        let mut handle = world.start(&sessions, request).await.unwrap();
        for _ in 0..stop_at {
            handle.next().await.unwrap();
        }
        let asked = std::time::Instant::now();
        sessions.cancel(&world.system, &world.ws, &run).await.unwrap();
        let events = all(sessions.attach(&world.system, &world.ws, &run, 0).await.unwrap()).await;
        // near its end it may have ended by itself
        assert!(*outcome(&events) == Outcome::Cancelled || stop_at + 6 > whole, "{stop_at} of {whole}: {events:?}");
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    }
}

#[tokio::test]
async fn a_second_run_waits_its_turn_or_is_refused_with_the_active_one_and_a_waiting_one_can_be_cancelled() {
    let (world, sessions) = (world().await, puppets(LONG));
    let first = world.start(&sessions, ask("t", "r1", "hang")).await.unwrap();
    let second = world.start(&sessions, ask("t", "r2", "hi")).await.unwrap();
    let third = world.start(&sessions, ask("t", "r3", "hi")).await.unwrap();
    let refused = RunRequest { forwarded: json!({"busy": "reject"}), ..ask("t", "r4", "hi") };
    let refusal = world.start(&sessions, refused).await.err().unwrap();
    assert_eq!(refusal.code, "thread_busy");
    assert!(refusal.detail.contains("`r1`"), "{}", refusal.detail);
    assert_eq!(sessions.active_run(&world.ws, "t").as_deref(), Some("r1"));
    sessions.cancel(&world.system, &world.ws, "r2").await.unwrap();
    sessions.cancel(&world.system, &world.ws, "r1").await.unwrap();
    assert_eq!(*outcome(&all(first).await), Outcome::Cancelled);
    assert_eq!(*outcome(&all(second).await), Outcome::Cancelled);
    assert!(is_success(&all(third).await));
}

#[tokio::test]
async fn more_runs_than_a_thread_lets_wait_are_refused() {
    let (world, sessions) = (world().await, puppets(LONG));
    for n in 0.. {
        if let Err(fault) = world.start(&sessions, ask("t", &format!("r{n}"), "hang")).await {
            assert_eq!(fault.code, "thread_queue_full");
            assert!((8..=9).contains(&n), "{n}");
            return;
        }
    }
}

#[tokio::test]
async fn a_known_run_is_attached_to_and_its_id_belongs_to_its_thread() {
    let (world, sessions) = (world().await, puppets(LONG));
    let first = world.start(&sessions, ask("t", "r", "hi")).await.unwrap();
    let again = world.start(&sessions, ask("t", "r", "hi")).await.unwrap();
    assert!(!first.attached && again.attached);
    assert_eq!(first.epoch, again.epoch);
    let events = all(first).await;
    assert_eq!(all(again).await, events);
    let taken = world.start(&sessions, ask("other", "r", "hi")).await.err().unwrap();
    assert_eq!(taken.code, "run_id_taken");
    let published = world.published.0.lock().clone();
    assert_eq!(published, (1..=events.len() as u64).map(|n| ("r".to_owned(), n)).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_run_is_replayed_from_the_store_with_the_same_positions() {
    let (world, sessions) = (world().await, puppets(LONG));
    let handle = world.start(&sessions, ask("t", "r", "hi")).await.unwrap();
    let epoch = handle.epoch.clone();
    let events = all(handle).await;
    sessions.stop().await;
    let restarted = puppets(LONG);
    let replay = restarted.attach(&world.system, &world.ws, "r", 0).await.unwrap();
    assert_eq!(replay.epoch, epoch);
    assert_eq!(all(replay).await, events);
    let again = world.start(&restarted, ask("t", "r", "hi")).await.unwrap();
    assert!(again.attached);
    let mut tail = restarted.attach(&world.system, &world.ws, "r", 2).await.unwrap();
    assert_eq!(tail.next().await.unwrap().0, 3);
    assert_eq!(restarted.attach(&world.system, &world.ws, "none", 0).await.err().unwrap().code, "unknown_run");
}

#[tokio::test]
async fn a_run_that_a_restart_cut_off_ends_as_interrupted_and_keeps_what_was_said() {
    let world = world().await;
    let sessions = puppets(LONG);
    let mut handle = world.start(&sessions, ask("t", "r", "hang")).await.unwrap();
    handle.next().await.unwrap();
    let cut = [
        RunEvent::Started { thread: "t".into(), run: "cut".into(), parent: None, legacy: false },
        RunEvent::TextStart { id: "m".into() },
        RunEvent::TextDelta { id: "m".into(), delta: "half a".into() },
    ];
    let run = sql::store::Run {
        workspace: world.ws.clone(),
        thread: "t".into(),
        run_id: "cut".into(),
        agent: "analyst".into(),
        status: "running".into(),
        started_at: Micros(9),
        finished_at: None,
        error: None,
    };
    let store = world.system.store();
    while store.thread(&world.ws, "t").await.unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    store.insert_run(&run).await.unwrap();
    let texts: Vec<String> = cut.iter().map(|event| serde_json::to_string(event).unwrap()).collect();
    store.append_run_events(&world.ws, "cut", 1, &texts).await.unwrap();
    puppets(LONG).recover(&world.system).await.unwrap();
    let replay = sessions.attach(&world.system, &world.ws, "cut", 0).await.unwrap();
    assert_eq!(replay.epoch, "9-1");
    let events = all(replay).await;
    assert_eq!(events[..3], cut);
    assert_eq!(code(&events), "interrupted");
    let kept = store.messages(&world.ws, "t", 0, 10).await.unwrap();
    assert!(kept.iter().any(|(_, message)| message.content["content"] == "half a"));
}

#[tokio::test]
async fn an_idle_session_goes_and_the_next_run_finds_the_thread_as_it_was() {
    let world = world().await;
    let agents = BTreeMap::from([(analyst(), Arc::new(Puppet) as _)]);
    let sessions = Sessions::of(agents, LONG, Duration::from_millis(20));
    assert!(is_success(&world.ask(&sessions, "t", "hi").await));
    while !sessions.info().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let events = world.ask(&sessions, "t", "hi again").await;
    assert!(matches!(&events[1], RunEvent::MessagesSnapshot(messages) if messages[0]["content"] == "hi"));
}

#[tokio::test]
async fn a_run_without_messages_shows_the_thread_and_its_state_without_an_answer() {
    let world = world().await;
    let sessions = Sessions::new(BTreeMap::new());
    world.ask(&sessions, "t", "Which metrics are there?").await;
    let shown = world.run(&sessions, RunRequest { messages: Vec::new(), ..ask("t", "r2", "") }).await;
    let [RunEvent::Started { .. }, RunEvent::MessagesSnapshot(messages), RunEvent::StateSnapshot(state), _] =
        &shown[..]
    else {
        panic!("{shown:?}")
    };
    let roles: Vec<_> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "assistant"]);
    assert_eq!(state["findings"][0]["tool"], "list_metrics");
}

#[tokio::test]
async fn the_analyst_reads_with_its_tools_and_its_state_and_messages_are_those_it_streamed() {
    let world = world().await;
    world.hold(&[("AAPL", 10.0, 90.0), ("MSFT", 1.0, 400.0)]).await;
    world.trade("AAPL", 100.0).await;
    let sessions = Sessions::new(BTreeMap::new());
    let events = world.ask(&sessions, "t", "What is my biggest position and the profit?").await;
    assert!(is_success(&events));
    let said = text(&events);
    assert!(said.contains("Portfolio Growth is worth 1,000 USD"), "{said}");
    assert!(said.contains("unrealised profit is 100 USD (11.1 %)"), "{said}");
    let mut state = Value::Null;
    for event in &events {
        match event {
            RunEvent::StateSnapshot(snapshot) => {
                assert!(state.is_null() || state == *snapshot, "{state} {snapshot}");
                state = snapshot.clone();
            }
            RunEvent::StateDelta(ops) => {
                for op in ops.as_array().unwrap() {
                    match op["path"].as_str().unwrap() {
                        "/focus" => state["focus"] = op["value"].clone(),
                        "/findings/-" => state["findings"].as_array_mut().unwrap().push(op["value"].clone()),
                        other => panic!("{other}"),
                    }
                }
            }
            _ => {}
        }
    }
    assert_eq!(state["findings"][0]["tool"], "portfolio_summary");
    let snapshot = events.iter().rev().find_map(|event| match event {
        RunEvent::MessagesSnapshot(messages) => Some(messages),
        _ => None,
    });
    assert_eq!(snapshot.unwrap().last().unwrap()["content"], said.as_str());
}

#[tokio::test]
async fn a_question_about_a_metric_is_answered_from_its_live_rows() {
    let world = world().await;
    world.hold(&[("AAPL", 10.0, 90.0)]).await;
    let sql = "SELECT symbol, max(price) AS high FROM market.trades GROUP BY symbol, tumble(ts, INTERVAL '1 hour')";
    let definition = crate::definition::MetricDefinition {
        sql: sql.into(),
        emit: None,
        retain: None,
        max_delay: None,
        allowed_lateness: None,
        backfill: None,
    };
    world.system.define_metric(&world.ws, "high_1h".parse().unwrap(), definition).await.unwrap();
    world.trade("AAPL", 101.5).await;
    let sessions = Sessions::new(BTreeMap::new());
    let events = world.ask(&sessions, "t", "What is the latest high of AAPL?").await;
    let said = text(&events);
    assert!(said.starts_with("The newest high of AAPL in high_1h is 101.5, for the window from "), "{said}");
    let call = events.iter().find_map(|event| match event {
        RunEvent::ToolArgs { delta, .. } => Some(delta.as_str()),
        _ => None,
    });
    assert_eq!(call, Some(r#"{"key":{"symbol":"AAPL"},"limit":500,"metric":"high_1h"}"#));
}

#[tokio::test]
async fn runs_of_a_deleted_workspace_are_ended_and_unknown_from_then_on() {
    let (world, sessions) = (world().await, puppets(LONG));
    let first = world.start(&sessions, ask("t", "r1", "hang")).await.unwrap();
    let waiting = world.start(&sessions, ask("t", "r2", "hi")).await.unwrap();
    while sessions.info().iter().any(|actor| actor.mailbox_batches != 1) {
        tokio::time::sleep(Duration::from_millis(1)).await; // until the first is under way and only the second waits
    }
    sessions.forget(&world.ws);
    assert_eq!(*outcome(&all(first).await), Outcome::Cancelled);
    assert_eq!(code(&all(waiting).await), "internal");
    assert!(sessions.in_memory(&world.ws, "r1").is_none());
}

#[tokio::test]
async fn the_analyst_recalls_what_was_said_and_answers_at_length_when_asked() {
    let world = world().await;
    let sessions = Sessions::new(BTreeMap::new());
    world.ask(&sessions, "t", "Hello! My reference code is 7f3a.").await;
    let said = text(&world.ask(&sessions, "t", "What was my reference code?").await);
    assert!(said.contains("My reference code is 7f3a."), "{said}");
    let began = std::time::Instant::now();
    let said = text(&world.ask(&sessions, "t", "Write a long and very detailed analysis").await);
    assert!(said.split(". ").count() > 10 && began.elapsed() > Duration::from_secs(1), "{said}");
}

#[tokio::test]
async fn a_failing_tool_fails_the_run_and_its_call_is_answered() {
    let world = world().await;
    let sessions = Sessions::new(BTreeMap::new());
    let events = world.ask(&sessions, "t", "Please fail this run now with an error.").await;
    assert_eq!(code(&events), "tool_failed");
    assert!(events.iter().any(|event| matches!(event, RunEvent::ToolResult { .. })));
}

#[tokio::test]
async fn a_clients_tool_is_called_left_open_and_its_answer_continues_the_thread() {
    let world = world().await;
    let sessions = Sessions::new(BTreeMap::new());
    let parameters = json!({"type": "object", "properties": {"action": {"type": "string"}}, "required": ["action"]});
    let tools = vec![json!({"name": "confirm_it", "description": "", "parameters": parameters})];
    let question = "Please call the tool confirm_it with the action \"rebalance\".";
    let events = world.run(&sessions, RunRequest { tools: tools.clone(), ..ask("t", "r1", question) }).await;
    let Outcome::Success { pending } = outcome(&events) else { panic!("{events:?}") };
    assert_eq!(pending.len(), 1);
    assert!(
        events.contains(&RunEvent::ToolArgs { id: pending[0].clone(), delta: "{\"action\":\"rebalance\"}".into() })
    );
    let answer = json!({"id": "a", "role": "tool", "toolCallId": pending[0], "content": "{\"confirmed\":true}"});
    let events = world.run(&sessions, RunRequest { messages: vec![answer], tools, ..ask("t", "r2", "") }).await;
    assert!(text(&events).contains("confirm_it answered that confirmed is true."), "{events:?}");
}

fn resume(run: &str, interrupt: &str, approved: bool) -> RunRequest {
    let entry = json!({"interruptId": interrupt, "status": "resolved", "payload": {"approved": approved}});
    RunRequest { messages: Vec::new(), resume: vec![entry], ..ask("t", run, "") }
}

fn interrupt(events: &[RunEvent]) -> &Interrupt {
    match outcome(events) {
        Outcome::Interrupt(open) => &open[0],
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_order_is_booked_once_and_only_when_it_was_approved() {
    let world = world().await;
    world.hold(&[("AAPL", 10.0, 90.0)]).await;
    world.trade("AAPL", 100.0).await;
    let sessions = Sessions::new(BTreeMap::new());
    let question = "Place an order for 10 shares, but ask me for approval first.";
    let events = world.ask(&sessions, "t", question).await;
    let open = interrupt(&events).clone();
    assert_eq!(
        open.call.as_ref().unwrap().arguments,
        json!({"portfolio": "fund", "symbol": "AAPL", "change": 10.0, "price": 100.0})
    );
    assert_eq!(world.held("AAPL").await, 10.0);
    // without an answer nothing happens, and the question stands, also for who opens the thread again
    assert_eq!(interrupt(&world.ask(&sessions, "t", "hello").await).id, open.id);
    let recalled = world.run(&sessions, RunRequest { messages: Vec::new(), ..ask("t", "again", "") }).await;
    assert_eq!(interrupt(&recalled).id, open.id);
    let events = world.run(&sessions, resume("r2", &open.id, true)).await;
    assert!(text(&events).contains("It now holds 20 instead of 10, at an average cost of 95."), "{events:?}");
    let call = &open.call.as_ref().unwrap().id;
    assert!(events.iter().any(|event| matches!(event, RunEvent::ToolResult { call_id, .. } if call_id == call)));
    assert!(!events.iter().any(|event| matches!(event, RunEvent::ToolStart { .. })));
    assert_eq!(world.held("AAPL").await, 20.0);
    let events = world.run(&sessions, resume("r3", &open.id, true)).await;
    assert!(is_success(&events));
    assert_eq!(world.held("AAPL").await, 20.0);
}

#[tokio::test]
async fn a_rejected_order_and_one_of_a_user_who_may_not_change_nothing() {
    let world = world().await;
    world.hold(&[("AAPL", 10.0, 90.0)]).await;
    world.trade("AAPL", 100.0).await;
    let sessions = Sessions::new(BTreeMap::new());
    let open = interrupt(&world.ask(&sessions, "t", "Sell 5 AAPL").await).id.clone();
    let events = world.run(&sessions, resume("r2", &open, false)).await;
    assert!(text(&events).contains("Nothing was changed"), "{events:?}");
    let open = interrupt(&world.ask(&sessions, "t", "Sell 5 AAPL").await).id.clone();
    let events = world.run(&sessions, RunRequest { may_hold: false, ..resume("r4", &open, true) }).await;
    assert!(text(&events).contains("may not change positions"), "{events:?}");
    assert_eq!(world.held("AAPL").await, 10.0);
}

#[tokio::test]
async fn an_order_without_anything_to_go_by_asks_for_what_it_lacks() {
    let world = world().await;
    let sessions = Sessions::new(BTreeMap::new());
    let events = world.ask(&sessions, "t", "Place an order for 10 shares").await;
    let open = interrupt(&events).clone();
    assert_eq!((open.reason.as_str(), open.call), ("input_required", None));
    let events = world.run(&sessions, resume("r2", &open.id, true)).await;
    assert!(is_success(&events) && text(&events).contains("Nothing was changed"), "{events:?}");
}

#[tokio::test]
async fn a_run_is_traced_in_the_stream_agent_events() {
    let (world, sessions) = (world().await, puppets(LONG));
    world.run(&sessions, ask("t", "r", "hi")).await;
    sessions.stop().await;
    let sql = "SELECT type FROM agent.events WHERE run = 'r' AND thread = 't'".to_owned();
    let request = QueryRequest { sql, params: Vec::new(), timeout: None };
    let answer = world.system.query(&world.ws, request).await.unwrap();
    let lines: Vec<String> = answer.batches.iter().flat_map(|batch| crate::rows::json_lines(batch).unwrap()).collect();
    for expected in ["RUN_STARTED", "TEXT_MESSAGE_END", "RUN_FINISHED"] {
        assert!(lines.iter().any(|line| line.contains(expected)), "{expected} in {lines:?}");
    }
}

mod model {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::post;
    use std::collections::VecDeque;

    /// A model that answers each request with the next of `answers`, and keeps what it was asked.
    struct Server {
        url: String,
        asked: Arc<Mutex<Vec<Value>>>,
    }

    async fn serve(answers: Vec<(StatusCode, Body)>) -> Server {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answers, seen) = (Arc::new(Mutex::new(VecDeque::from(answers))), asked.clone());
        let handler = move |headers: axum::http::HeaderMap, axum::Json(mut body): axum::Json<Value>| {
            let (answers, seen) = (answers.clone(), seen.clone());
            async move {
                body["authorization"] = headers["authorization"].to_str().unwrap().into();
                seen.lock().push(body);
                let (status, body) = answers.lock().pop_front().expect("no more requests than answers");
                (status, [("content-type", "text/event-stream")], body).into_response()
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let router = Router::new().route("/v1/chat/completions", post(handler));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Server { url, asked }
    }

    fn sessions(server: &Server) -> Sessions {
        let config = json!({"base_url": server.url, "model": "test-model", "api_key": "sk-secret"});
        Sessions::new(BTreeMap::from([(analyst(), serde_json::from_value(config).unwrap())]))
    }

    fn stream(chunks: &[String]) -> (StatusCode, Body) {
        let text: String = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
        (StatusCode::OK, Body::from(format!("{text}data: [DONE]\n\n")))
    }

    fn chunk(delta: Value) -> String {
        json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]}).to_string()
    }

    fn calls(name: &str, arguments: Value) -> (StatusCode, Body) {
        let function = json!({"name": name, "arguments": arguments.to_string()});
        let call = json!({"index": 0, "id": "call_0", "type": "function", "function": function});
        stream(&[chunk(json!({"role": "assistant", "content": null, "tool_calls": [call]}))])
    }

    /// The recorded chunks of one answer of the shared recordings; `None` where they are not there.
    fn recorded(fixture: &str) -> Option<Vec<String>> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/chat/ai_stream_chunks.ndjson.zst");
        let Ok(file) = std::fs::read(path) else {
            println!("skipped: {path} is not there");
            return None;
        };
        let lines = String::from_utf8(zstd::decode_all(file.as_slice()).unwrap()).unwrap();
        let rows = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let chunks = rows.filter(|row| row["fixture"] == fixture);
        Some(chunks.map(|row| row["data"].as_str().unwrap().to_owned()).collect())
    }

    #[tokio::test]
    async fn recorded_answers_are_streamed_whole_with_their_tokens() {
        for (fixture, tokens) in [("openai-text", [16, 300]), ("azure-model-router.1", [15, 78])] {
            let Some(chunks) = recorded(fixture) else { return };
            let content = |chunk: &String| {
                let chunk: Value = serde_json::from_str(chunk).unwrap();
                chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
            };
            let expected: String = chunks.iter().map(content).collect();
            let world = world().await;
            let server = serve(vec![stream(&chunks)]).await;
            let events = world.ask(&sessions(&server), "t", "Invent a holiday").await;
            assert_eq!(text(&events), expected);
            let Some(RunEvent::Finished { usage: Some(usage), .. }) = events.last() else { panic!("{events:?}") };
            assert_eq!([usage.input_tokens, usage.output_tokens], tokens);
            let asked = server.asked.lock()[0].clone();
            assert_eq!((&asked["model"], &asked["stream"]), (&json!("test-model"), &json!(true)));
            assert_eq!(asked["authorization"], "Bearer sk-secret");
            assert_eq!(asked["messages"][1], json!({"role": "user", "content": "Invent a holiday"}));
            assert!(asked["tools"].as_array().unwrap().iter().any(|tool| tool["function"]["name"] == "run_sql"));
        }
    }

    #[tokio::test]
    async fn a_tool_of_ours_is_called_and_the_model_sees_its_answer() {
        let world = world().await;
        let answers = vec![calls("list_metrics", json!({})), stream(&[chunk(json!({"content": "None yet."}))])];
        let server = serve(answers).await;
        let events = world.ask(&sessions(&server), "t", "Which metrics?").await;
        assert!(is_success(&events));
        assert_eq!(text(&events), "None yet.");
        let second = server.asked.lock()[1]["messages"].clone();
        let [.., call, answer] = second.as_array().unwrap().as_slice() else { panic!("{second}") };
        assert_eq!(call["tool_calls"][0]["function"]["name"], "list_metrics");
        assert_eq!(answer["tool_call_id"], call["tool_calls"][0]["id"]);
        assert_eq!(answer["content"], "{\"metrics\":[]}");
    }

    #[tokio::test]
    async fn a_change_needs_approval_and_the_model_hears_what_became_of_it() {
        let world = world().await;
        world.hold(&[("AAPL", 10.0, 90.0)]).await;
        let order = json!({"portfolio": "fund", "symbol": "AAPL", "change": 5.0, "price": 100.0});
        let server = serve(vec![calls("update_position", order), stream(&[chunk(json!({"content": "Done."}))])]).await;
        let sessions = sessions(&server);
        let open = interrupt(&world.ask(&sessions, "t", "Buy 5").await).id.clone();
        assert_eq!(world.held("AAPL").await, 10.0);
        let events = world.run(&sessions, resume("r2", &open, true)).await;
        assert_eq!(text(&events), "Done.");
        assert_eq!(world.held("AAPL").await, 15.0);
        let asked = server.asked.lock()[1]["messages"].to_string();
        assert!(asked.contains(r#"\"qty\":15.0"#), "{asked}");
    }

    #[tokio::test]
    async fn a_refusal_of_the_model_fails_the_run_without_its_key() {
        let world = world().await;
        let body = json!({"error": {"message": "invalid key"}}).to_string();
        let server = serve(vec![(StatusCode::UNAUTHORIZED, Body::from(body))]).await;
        let events = world.ask(&sessions(&server), "t", "hi").await;
        let Some(RunEvent::Error { message, code }) = events.last() else { panic!("{events:?}") };
        assert_eq!(code, "model_failed");
        assert_eq!(message, "the model failed: it answered HTTP 401 Unauthorized: invalid key");
    }

    #[tokio::test]
    async fn a_cancelled_run_leaves_the_model() {
        let world = world().await;
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel::<Result<String, std::io::Error>>();
        let chunks = futures::stream::unfold(receiver, |mut r| async { r.recv().await.map(|chunk| (chunk, r)) });
        let server = serve(vec![(StatusCode::OK, Body::from_stream(chunks))]).await;
        let sessions = sessions(&server);
        sender.send(Ok(format!("data: {}\n\n", chunk(json!({"content": "Wait"}))))).unwrap();
        let mut handle = world.start(&sessions, ask("t", "r", "hi")).await.unwrap();
        while !matches!(handle.next().await.unwrap().1.as_ref(), RunEvent::TextDelta { .. }) {}
        sessions.cancel(&world.system, &world.ws, "r").await.unwrap();
        let events = all(sessions.attach(&world.system, &world.ws, "r", 0).await.unwrap()).await;
        assert_eq!(*outcome(&events), Outcome::Cancelled);
        tokio::time::timeout(Duration::from_secs(5), sender.closed()).await.expect("the connection is dropped");
    }
}
