//! What is kept of answers, and who gets it: nobody but those who may ask, and nobody of another workspace.

use super::*;
use cache::{Class, Warmth};

#[tokio::test]
async fn an_answer_that_is_kept_is_for_those_who_may_ask_and_of_one_workspace() {
    let server = Server::start().await;
    let root = server.token("root@example.com").await;
    let minutes = "SELECT symbol, sum(qty) AS qty FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), symbol";
    for (ws, trades) in [("acme", 3), ("other", 1)] {
        server.call("POST", "/api/v1/workspaces", &root, json!({"id": ws})).await;
        let at = format!("/api/v1/workspaces/{ws}");
        server.call("POST", &format!("{at}/portfolios"), &root, json!({"id": "main", "name": ws})).await;
        let defined = json!({"sql": minutes, "max_delay": "0s"});
        assert_eq!(server.call("PUT", &format!("{at}/metrics/minutes"), &root, defined).await.status, 200);
        // each in a minute of its own, so that all but the last of them are closed
        let trade = |n: i64| json!({"ts": 1_704_067_200_000 + n * 60_000, "symbol": ws, "price": 1, "qty": 1});
        let events = json!((0..=trades).map(trade).collect::<Vec<_>>());
        let taken = server.call("POST", &format!("{at}/streams/market.trades/events"), &root, events).await;
        assert_eq!(taken.body["accepted"], trades + 1, "{}", taken.body);
    }
    let key = async |scopes: Value| {
        let new = json!({"name": "k", "role": "member", "scopes": scopes});
        let made = server.call("POST", "/api/v1/workspaces/acme/keys", &root, new).await;
        made.body["key"].as_str().unwrap().to_owned()
    };
    let reader = key(json!(["query:run", "stream:read", "metric:read", "portfolio:read"])).await;
    let elsewhere = ["query:run", "stream:read@streams/chat.messages", "metric:read@metrics/x"];
    let stranger = key(json!(elsewhere)).await;
    // what each of the same questions is answered with, by status
    let ask = async |ws: &str, token: &str| {
        let at = format!("/api/v1/workspaces/{ws}");
        let mut answers = Vec::new();
        for sql in
            ["SELECT symbol, count(*) FROM market.trades GROUP BY 1", "SELECT symbol, sum(qty) FROM minutes GROUP BY 1"]
        {
            answers.push(server.call("POST", &format!("{at}/query"), token, json!({"sql": sql})).await);
        }
        for path in ["metrics/minutes/rows?from=1970-01-01T00:00:00Z&final=true", "portfolios"] {
            answers.push(server.get(&format!("{at}/{path}"), token).await);
        }
        let text = |answer: Answer| (answer.status, answer.body.to_string());
        answers.into_iter().map(text).collect::<Vec<_>>()
    };
    let own = ask("acme", &root).await;
    assert!(
        own.iter().all(|(status, body)| *status == 200 && body.contains("acme") && !body.contains("other")),
        "{own:?}"
    );
    // the answers, and whether none of them was computed or read from the store
    let kept = async |token: &str| {
        let cache = server.state.system.cache();
        let warmth = || [Class::Queries, Class::Portfolios].map(|class| cache.warmth(class));
        let before = warmth();
        let answers = ask("acme", token).await;
        let is_kept = |(before, after): (Warmth, Warmth)| after.memory > before.memory && after.loaded == before.loaded;
        (answers, before.into_iter().zip(warmth()).all(is_kept))
    };
    // once all events are computed
    while kept(&root).await != (own.clone(), true) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(kept(&reader).await, (own, true));
    for (status, body) in ask("acme", &stranger).await {
        assert!(status == 403 || body == r#"{"portfolios":[]}"#, "{status} {body}");
        assert!(!body.contains("acme"), "{body}");
    }
    for (status, body) in ask("other", &reader).await {
        assert_eq!(status, 404, "{body}");
    }
    let other = ask("other", &root).await;
    assert!(
        other.iter().all(|(status, body)| *status == 200 && body.contains("other") && !body.contains("acme")),
        "{other:?}"
    );
}
