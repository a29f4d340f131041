//! Browsers that sign in by an OpenID Connect issuer.

use super::*;
use crate::oidc::testing::Issuer;
use actors::clock::Clock;
use parking_lot::Mutex;
use std::collections::BTreeMap;

const AT: &str = "/api/v1/auth/oidc";

struct Setup {
    server: Server,
    issuer: Issuer,
    root: String,
}

/// A browser keeps cookies.
#[derive(Default)]
struct Browser(Mutex<BTreeMap<String, String>>);

impl Setup {
    async fn start(create_users: bool) -> Setup {
        let issuer = Issuer::start(SystemClock.now()).await;
        let one = OidcConfig {
            issuer: issuer.url.clone(),
            client_id: "tidewatch".into(),
            client_secret: Some("client secret".into()),
            redirect_url: "http://127.0.0.1:1/api/v1/auth/oidc/local/callback".into(),
            create_users,
            ..OidcConfig::default()
        };
        let auth = AuthConfig { oidc: BTreeMap::from([("local".to_owned(), one)]), ..AuthConfig::default() };
        let server = Server::of(Config { auth, ..Config::default() }, actors::Limits::default()).await;
        let root = server.token("root@example.com").await;
        Setup { server, issuer, root }
    }

    async fn call(&self, browser: &Browser, method: &str, path: &str, body: Value) -> Answer {
        let cookies: Vec<String> = browser.0.lock().iter().map(|(name, value)| format!("{name}={value}")).collect();
        let request = Request::builder().method(method).uri(format!("{AT}{path}")).header("cookie", cookies.join("; "));
        let request = request.header("content-type", "application/json").body(Body::from(body.to_string()));
        let answer = self.server.send(request.unwrap()).await;
        for cookie in answer.headers.get_all("set-cookie") {
            let cookie = cookie.to_str().unwrap();
            assert!(cookie.contains("; Path=/api/v1/auth/oidc; HttpOnly; SameSite=Lax; Max-Age="), "{cookie}");
            let (name, value) = cookie.split(';').next().unwrap().split_once('=').unwrap();
            match cookie.ends_with("Max-Age=0") {
                true => browser.0.lock().remove(name),
                false => browser.0.lock().insert(name.to_owned(), value.to_owned()),
            };
        }
        answer
    }

    /// Sends a browser away: the page of the issuer that it comes to.
    async fn depart(&self, browser: &Browser) -> String {
        let away = self.call(browser, "GET", "/local/start", Value::Null).await;
        assert_eq!(away.status, 303, "{}", away.body);
        away.headers["location"].to_str().unwrap().to_owned()
    }

    async fn arrive(&self, browser: &Browser, page: &str) -> Answer {
        let (state, code) = self.issuer.sign_in(page);
        let path = format!("/local/callback?state={state}&code={code}&session_state=more");
        self.call(browser, "GET", &path, Value::Null).await
    }

    /// From the start to the console.
    async fn go(&self, browser: &Browser) -> Answer {
        let page = self.depart(browser).await;
        self.arrive(browser, &page).await
    }

    async fn fetch(&self, browser: &Browser, back: &Answer) -> Answer {
        let location = back.headers.get("location").unwrap_or_else(|| panic!("{}", back.body)).to_str().unwrap();
        let code = location.strip_prefix("/#sign_in=").unwrap();
        self.call(browser, "POST", "/token", json!({"code": code})).await
    }
}

#[tokio::test]
async fn a_browser_signs_in_by_an_issuer_and_the_page_fetches_its_tokens_once() {
    let (setup, browser) = (Setup::start(false).await, Browser::default());
    assert_eq!(setup.call(&browser, "GET", "", Value::Null).await.body, json!({"issuers": ["local"]}));
    let stranger = setup.go(&browser).await;
    assert_eq!((stranger.status, stranger.code()), (403, "unknown_user"), "users are not made unless settings say so");
    setup.server.user(&setup.root, "ann@example.com").await;
    let browser = Browser::default();
    let back = setup.go(&browser).await;
    let cookies = browser.0.lock().clone();
    let tokens = setup.fetch(&browser, &back).await;
    let me = setup.server.get("/api/v1/me", tokens.body["access_token"].as_str().unwrap()).await;
    assert_eq!(me.body["user"]["email"], "ann@example.com");
    assert!(browser.0.lock().is_empty(), "nothing is left of it");
    *browser.0.lock() = cookies;
    assert_eq!(setup.fetch(&browser, &back).await.code(), "sign_in_refused");
}

#[tokio::test]
async fn a_code_is_good_in_the_browser_that_signed_in_and_in_no_other() {
    let (setup, browser) = (Setup::start(true).await, Browser::default());
    let back = setup.go(&browser).await;
    let other = Browser::default();
    setup.go(&other).await;
    for other in [Browser::default(), other] {
        let refused = setup.fetch(&other, &back).await;
        assert_eq!((refused.status, refused.code()), (401, "sign_in_refused"));
    }
    assert_eq!(setup.fetch(&browser, &back).await.status, 200);
}

#[tokio::test]
async fn tabs_sign_in_side_by_side_up_to_a_few() {
    let (setup, browser) = (Setup::start(true).await, Browser::default());
    let (first, second) = (setup.depart(&browser).await, setup.depart(&browser).await);
    for page in [first, second] {
        let back = setup.arrive(&browser, &page).await;
        assert_eq!(setup.fetch(&browser, &back).await.status, 200);
    }
    for _ in 0..9 {
        setup.depart(&browser).await;
    }
    assert_eq!(browser.0.lock().len(), 4);
}

#[tokio::test]
async fn nobody_comes_in_as_another_whose_address_looks_like_theirs() {
    let setup = Setup::start(true).await;
    setup.server.user(&setup.root, "mark@example.com").await;
    *setup.issuer.claims.lock() = json!({"email": "mar\u{212a}@example.com"});
    let refused = setup.go(&Browser::default()).await;
    assert_eq!((refused.status, refused.code()), (403, "unknown_user"));
}

#[tokio::test]
async fn a_second_subject_of_an_issuer_with_the_address_of_the_first_is_refused() {
    let setup = Setup::start(true).await;
    assert_eq!(setup.go(&Browser::default()).await.status, 303);
    *setup.issuer.claims.lock() = json!({"sub": "43"});
    let refused = setup.go(&Browser::default()).await;
    assert_eq!((refused.status, refused.code()), (403, "unknown_user"));
    assert!(refused.body["detail"].as_str().unwrap().contains("an admin"), "{}", refused.body);
    *setup.issuer.claims.lock() = json!({"sub": "42"});
    assert_eq!(setup.go(&Browser::default()).await.status, 303);
}

#[tokio::test]
async fn the_first_sign_ins_of_a_new_user_may_come_at_once() {
    let setup = Setup::start(true).await;
    let browsers: Vec<Browser> = (0..8).map(|_| Browser::default()).collect();
    for back in join_all(browsers.iter().map(|browser| setup.go(browser))).await {
        assert_eq!(back.status, 303, "{}", back.body);
    }
}

#[tokio::test]
async fn the_end_of_all_sign_ins_ends_one_whose_tokens_were_not_fetched_yet() {
    let (setup, browser) = (Setup::start(true).await, Browser::default());
    let back = setup.go(&browser).await;
    let tokens = setup.fetch(&browser, &back).await;
    let waiting = setup.go(&browser).await;
    let token = tokens.body["access_token"].as_str().unwrap();
    let ended = setup.server.call("POST", "/api/v1/auth/logout", token, json!({"everywhere": true})).await;
    assert_eq!(ended.status, 204);
    let refused = setup.fetch(&browser, &waiting).await;
    assert_eq!((refused.status, refused.code()), (401, "sign_in_refused"));
}
