//! Sign-in by an OpenID Connect issuer: authorization code with PKCE (OpenID Connect Core 1.0, RFC 7636).
//!
//! The browser is sent to the issuer and comes back with a code, which is exchanged here for an ID token. Who it names is
//! then a user like any other; the page gets a code of ours, good once and for a minute, for a pair of tokens.

use crate::problem::Problem;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use engine::event::{Micros, Span};
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use parking_lot::Mutex;
use reqwest::Url;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// One issuer: `auth.oidc.NAME`.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OidcConfig {
    /// As its discovery document names itself, `https://accounts.example.com`.
    pub issuer: String,
    pub client_id: String,
    pub client_secret: Option<String>,
    /// A file that holds the secret, in place of `client_secret`.
    pub client_secret_file: Option<PathBuf>,
    /// Where browsers come back: `https://HOST/api/v1/auth/oidc/NAME/callback`, as registered with the issuer.
    pub redirect_url: String,
    /// Makes a user of whoever the issuer names and nobody knows yet.
    pub create_users: bool,
}

// the secret stays out of logs
impl fmt::Debug for OidcConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OidcConfig")
            .field("issuer", &self.issuer)
            .field("client_id", &self.client_id)
            .field("client_secret", &self.client_secret.as_ref().map(|_| "…"))
            .field("client_secret_file", &self.client_secret_file)
            .field("redirect_url", &self.redirect_url)
            .field("create_users", &self.create_users)
            .finish()
    }
}

/// How long somebody has at the issuer.
const ABROAD_MAX: Span = Span::seconds(600);
/// How long a page has to fetch its tokens.
const FETCH_MAX: Span = Span::seconds(60);
/// Sign-ins under way at the same time.
const UNDER_WAY_MAX: usize = 10_000;
/// An issuer has this long for an answer, of at most so many bytes.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: usize = 256 << 10;
/// Signatures that are taken: those with a public key. One with the client's secret could be made by whoever holds it.
const ALGORITHMS: [Algorithm; 7] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// The configured issuers and the sign-ins under way.
pub(crate) struct Oidc {
    issuers: BTreeMap<String, OidcConfig>,
    http: Option<reqwest::Client>,
    under_way: Mutex<HashMap<String, UnderWay>>,
    arrived: Mutex<HashMap<String, (String, Micros)>>,
}

/// A browser that was sent to an issuer; the key is the `state` it comes back with.
struct UnderWay {
    issuer: String,
    /// Ties the way back to the browser that began: somebody else's link signs nobody in.
    browser: String,
    verifier: String,
    nonce: String,
    until: Micros,
}

/// What a browser is sent away with.
pub(crate) struct Departure {
    pub(crate) to: String,
    /// For a cookie.
    pub(crate) browser: String,
    pub(crate) is_secure: bool,
}

/// Whom an issuer names.
#[derive(Debug, PartialEq)]
pub(crate) struct Identity {
    pub(crate) issuer: String,
    pub(crate) subject: String,
    /// Only where the issuer has made sure that it is theirs.
    pub(crate) email: Option<String>,
    pub(crate) create: bool,
}

/// What an issuer says of itself (OpenID Connect Discovery 1.0).
#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct TokenAnswer {
    id_token: String,
}

#[derive(Deserialize)]
struct IdToken {
    sub: String,
    nonce: Option<String>,
    azp: Option<String>,
    email: Option<String>,
    #[serde(default)]
    email_verified: bool,
}

fn random() -> String {
    URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())
}

/// Whether an address is encrypted, or on this machine.
fn is_safe(url: &str) -> bool {
    Url::parse(url).is_ok_and(|url| {
        let local = matches!(url.host_str(), Some("127.0.0.1" | "localhost" | "[::1]"));
        url.scheme() == "https" || (url.scheme() == "http" && local)
    })
}

fn abroad(detail: impl fmt::Display) -> Problem {
    tracing::warn!(%detail, "an OpenID Connect issuer did not answer as it should");
    let detail = "the issuer did not answer as it should; try again, or ask an admin to read the log";
    Problem::new(StatusCode::BAD_GATEWAY, "issuer_failed", detail)
}

fn refused(detail: &str) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "sign_in_refused", detail)
}

impl Oidc {
    /// Checks the settings; an error names the one that is wrong.
    pub(crate) fn new(config: &BTreeMap<String, OidcConfig>) -> Result<Oidc, String> {
        let mut issuers = config.clone();
        for (name, issuer) in &mut issuers {
            if let (None, Some(path)) = (&issuer.client_secret, &issuer.client_secret_file) {
                let read = std::fs::read_to_string(path);
                let key = format!("auth.oidc.{name}.client_secret_file");
                let text = read.map_err(|error| format!("cannot read {key} `{}`: {error}", path.display()))?;
                issuer.client_secret = Some(text.trim().to_owned());
            }
            let named = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            if !named {
                return Err(format!("auth.oidc: `{name}` must be letters, digits, `-` and `_`"));
            }
            for (key, url) in [("issuer", &issuer.issuer), ("redirect_url", &issuer.redirect_url)] {
                if !is_safe(url) {
                    return Err(format!("auth.oidc.{name}.{key} = `{url}` must be an https URL"));
                }
            }
            if issuer.client_id.is_empty() {
                return Err(format!("auth.oidc.{name}.client_id is missing: register this server with the issuer"));
            }
        }
        let http = if issuers.is_empty() { None } else { Some(client()?) };
        Ok(Oidc { issuers, http, under_way: Mutex::default(), arrived: Mutex::default() })
    }

    /// The names of the issuers.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.issuers.keys().map(String::as_str).collect()
    }

    fn issuer(&self, name: &str) -> Result<&OidcConfig, Problem> {
        let unknown = || {
            let name: String = name.chars().take(40).collect();
            Problem::not_found(
                "unknown_issuer",
                format!("there is no issuer `{name}`; an admin adds it as auth.oidc.{name}"),
            )
        };
        self.issuers.get(name).ok_or_else(unknown)
    }

    /// Begins a sign-in.
    pub(crate) async fn depart(&self, name: &str, now: Micros) -> Result<Departure, Problem> {
        let issuer = self.issuer(name)?;
        let discovery = self.discover(issuer).await?;
        let (state, browser, verifier, nonce) = (random(), random(), random(), random());
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(&verifier));
        let parameters = [
            ("response_type", "code"),
            ("client_id", issuer.client_id.as_str()),
            ("redirect_uri", issuer.redirect_url.as_str()),
            ("scope", "openid email"),
            ("state", state.as_str()),
            ("nonce", nonce.as_str()),
            ("code_challenge", challenge.as_str()),
            ("code_challenge_method", "S256"),
        ];
        let to = Url::parse_with_params(&discovery.authorization_endpoint, parameters).map_err(abroad)?;
        let mut under_way = self.under_way.lock();
        if under_way.len() >= UNDER_WAY_MAX {
            under_way.retain(|_, one| one.until > now);
        }
        if under_way.len() >= UNDER_WAY_MAX {
            let detail = format!("{UNDER_WAY_MAX} sign-ins are under way; try again in a moment");
            let busy = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", detail);
            return Err(busy.retry_after(Duration::from_secs(10)));
        }
        let until = now.plus(ABROAD_MAX);
        let one = UnderWay { issuer: name.to_owned(), browser: browser.clone(), verifier, nonce, until };
        under_way.insert(state, one);
        Ok(Departure { to: to.into(), browser, is_secure: issuer.redirect_url.starts_with("https:") })
    }

    /// Ends a sign-in at the issuer: whom it names. Each way back is good once.
    pub(crate) async fn arrive(
        &self,
        name: &str,
        state: &str,
        code: &str,
        browser: Option<&str>,
        now: Micros,
    ) -> Result<Identity, Problem> {
        let issuer = self.issuer(name)?;
        let found = self.under_way.lock().remove(state);
        let good = |one: &UnderWay| {
            one.issuer == name && one.until > now && browser.is_some_and(|browser| equal(browser, &one.browser))
        };
        let unknown = || refused("this sign-in is unknown, took too long or began in another browser; begin again");
        let one = found.filter(good).ok_or_else(unknown)?;
        let discovery = self.discover(issuer).await?;
        let mut form = vec![
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", issuer.redirect_url.as_str()),
            ("client_id", issuer.client_id.as_str()),
            ("code_verifier", one.verifier.as_str()),
        ];
        if let Some(secret) = &issuer.client_secret {
            form.push(("client_secret", secret.as_str()));
        }
        let form = Url::parse_with_params("http://form", form).map_err(abroad)?.query().unwrap_or_default().to_owned();
        let request = self.http()?.post(&discovery.token_endpoint).body(form);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let answer: TokenAnswer = ask(request).await?;
        let keys: JwkSet = ask(self.http()?.get(&discovery.jwks_uri)).await?;
        let token = check(&answer.id_token, &keys, issuer, &one.nonce).map_err(abroad)?;
        Ok(Identity {
            issuer: issuer.issuer.clone(),
            subject: token.sub,
            email: token.email.filter(|_| token.email_verified),
            create: issuer.create_users,
        })
    }

    /// A code for the page to fetch this user's tokens with.
    pub(crate) fn hand_over(&self, user: String, now: Micros) -> String {
        let code = random();
        let mut arrived = self.arrived.lock();
        arrived.retain(|_, (_, until)| *until > now);
        arrived.insert(code.clone(), (user, now.plus(FETCH_MAX)));
        code
    }

    /// The user whose tokens the code is for; good once.
    pub(crate) fn fetch(&self, code: &str, now: Micros) -> Result<String, Problem> {
        let found = self.arrived.lock().remove(code).filter(|(_, until)| *until > now);
        found.map(|(user, _)| user).ok_or_else(|| refused("this code is unknown, was used or is too old; begin again"))
    }

    fn http(&self) -> Result<&reqwest::Client, Problem> {
        self.http.as_ref().ok_or_else(|| Problem::internal("an issuer without a client"))
    }

    async fn discover(&self, issuer: &OidcConfig) -> Result<Discovery, Problem> {
        let at = format!("{}/.well-known/openid-configuration", issuer.issuer.trim_end_matches('/'));
        let found: Discovery = ask(self.http()?.get(at)).await?;
        if found.issuer != issuer.issuer {
            return Err(abroad(format!("the issuer `{}` calls itself `{}`", issuer.issuer, found.issuer)));
        }
        let addresses = [&found.authorization_endpoint, &found.token_endpoint, &found.jwks_uri];
        let wrong = addresses.into_iter().find(|address| !is_safe(address)).cloned();
        match wrong {
            Some(address) => Err(abroad(format!("`{address}` is no https URL"))),
            None => Ok(found),
        }
    }
}

/// Compares without telling by the time it takes where two texts differ.
fn equal(a: &str, b: &str) -> bool {
    Sha256::digest(a) == Sha256::digest(b)
}

/// The claims of an ID token that is good, or what is wrong with it (OpenID Connect Core 1.0, section 3.1.3.7).
fn check(token: &str, keys: &JwkSet, issuer: &OidcConfig, nonce: &str) -> Result<IdToken, String> {
    let header = jsonwebtoken::decode_header(token).map_err(|error| format!("no ID token: {error}"))?;
    if !ALGORITHMS.contains(&header.alg) {
        return Err(format!("the ID token is signed with {:?}, which is not taken", header.alg));
    }
    let key = match &header.kid {
        Some(kid) => keys.find(kid),
        None => Some(&keys.keys).filter(|keys| keys.len() == 1).and_then(|keys| keys.first()),
    };
    let key = key.ok_or("the ID token names no key of the issuer")?;
    let key = DecodingKey::from_jwk(key).map_err(|error| format!("a key of the issuer: {error}"))?;
    let mut validation = Validation::new(header.alg);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    validation.set_issuer(&[&issuer.issuer]);
    validation.set_audience(&[&issuer.client_id]);
    let claims = jsonwebtoken::decode::<IdToken>(token, &key, &validation);
    let claims = claims.map_err(|error| format!("the ID token is refused: {error}"))?.claims;
    if claims.nonce.as_deref() != Some(nonce) {
        return Err("the ID token is for another sign-in".to_owned());
    }
    if claims.azp.as_ref().is_some_and(|azp| *azp != issuer.client_id) {
        return Err("the ID token is for another client".to_owned());
    }
    Ok(claims)
}

async fn ask<T: DeserializeOwned>(request: reqwest::RequestBuilder) -> Result<T, Problem> {
    let answered = request.timeout(ANSWER_WAIT).header("accept", "application/json").send().await;
    let mut answer = answered.map_err(|error| abroad(error.without_url()))?;
    if !answer.status().is_success() {
        return Err(abroad(format!("status {}", answer.status())));
    }
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(|error| abroad(error.without_url()))? {
        if body.len() + part.len() > ANSWER_BYTES_MAX {
            return Err(abroad(format!("an answer of more than {ANSWER_BYTES_MAX} bytes")));
        }
        body.extend_from_slice(&part);
    }
    serde_json::from_slice(&body).map_err(|error| abroad(format!("an answer that is not as expected: {error}")))
}

/// A client that follows nobody elsewhere.
fn client() -> Result<reqwest::Client, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = reqwest::Client::builder().tls_backend_preconfigured(tls).redirect(reqwest::redirect::Policy::none());
    client.build().map_err(|error| error.to_string())
}

#[cfg(test)]
pub(crate) mod testing {
    use axum::extract::{Form, State};
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use base64::Engine;
    use jsonwebtoken::{Algorithm, EncodingKey, Header};
    use parking_lot::Mutex;
    use serde_json::{Value, json};
    use sha2::Digest;
    use std::collections::HashMap;
    use std::sync::Arc;

    /// A key made for these tests and used nowhere else: PKCS #8 in base64.
    const KEY: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLsnwDNYm8FLltwxgpOW0ycUqEiS2G3OSw5DZ7gf7bwShRANCAARm\
        1hKflLjh/vC4AqVv2F3Of1JwHsO2D153hvmUjnHFOuoGrZJpegJ3N5vAuoLB4Pwy/YTAZXX0wQB4UI1+j9HK";
    const X: &str = "ZtYSn5S44f7wuAKlb9hdzn9ScB7Dtg9ed4b5lI5xxTo";
    const Y: &str = "6gatkml6Anc3m8C6gsHg_DL9hMBldfTBAHhQjX6P0co";

    /// An issuer on this machine: gives a code to everybody, and an ID token to whoever proves to have asked for it.
    #[derive(Clone)]
    pub(crate) struct Issuer {
        pub(crate) url: String,
        /// Parameters of the authorization request by code.
        codes: Arc<Mutex<HashMap<String, HashMap<String, String>>>>,
        /// What the next ID token says beside what it must.
        pub(crate) claims: Arc<Mutex<Value>>,
    }

    impl Issuer {
        pub(crate) async fn start() -> Issuer {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let issuer = Issuer { url, codes: Arc::default(), claims: Arc::default() };
            let router = Router::new()
                .route("/.well-known/openid-configuration", get(Self::discovery))
                .route("/keys", get(Self::keys))
                .route("/token", post(Self::token))
                .with_state(issuer.clone());
            tokio::spawn(axum::serve(listener, router).into_future());
            issuer
        }

        /// What the browser brings back from the page it was sent to: `state` and `code`.
        pub(crate) fn sign_in(&self, page: &str) -> (String, String) {
            let url = reqwest::Url::parse(page).unwrap();
            assert!(page.starts_with(&format!("{}/authorize?", self.url)));
            let asked: HashMap<String, String> = url.query_pairs().into_owned().collect();
            assert_eq!((asked["response_type"].as_str(), asked["code_challenge_method"].as_str()), ("code", "S256"));
            let code = super::random();
            let state = asked["state"].clone();
            self.codes.lock().insert(code.clone(), asked);
            (state, code)
        }

        async fn discovery(State(issuer): State<Issuer>) -> Json<Value> {
            let at = |path: &str| format!("{}{path}", issuer.url);
            Json(json!({
                "issuer": issuer.url, "authorization_endpoint": at("/authorize"), "token_endpoint": at("/token"),
                "jwks_uri": at("/keys"),
            }))
        }

        async fn keys() -> Json<Value> {
            Json(
                json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": "k1", "alg": "ES256", "use": "sig", "x": X, "y": Y}]}),
            )
        }

        async fn token(
            State(issuer): State<Issuer>,
            Form(form): Form<HashMap<String, String>>,
        ) -> Result<Json<Value>, axum::http::StatusCode> {
            let asked = issuer.codes.lock().remove(&form["code"]).ok_or(axum::http::StatusCode::BAD_REQUEST)?;
            let challenge = super::URL_SAFE_NO_PAD.encode(sha2::Sha256::digest(&form["code_verifier"]));
            if challenge != asked["code_challenge"] || form["client_secret"] != "client secret" {
                return Err(axum::http::StatusCode::BAD_REQUEST);
            }
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            let mut claims = json!({
                "iss": issuer.url, "aud": asked["client_id"], "sub": "42", "nonce": asked["nonce"], "iat": now,
                "exp": now + 300, "email": "ann@example.com", "email_verified": true,
            });
            if let Value::Object(more) = issuer.claims.lock().clone() {
                more.into_iter().for_each(|(name, value)| claims[name] = value);
            }
            let header = Header { kid: Some("k1".into()), ..Header::new(Algorithm::ES256) };
            let key = EncodingKey::from_ec_der(&base64::engine::general_purpose::STANDARD.decode(KEY).unwrap());
            Ok(Json(json!({"id_token": jsonwebtoken::encode(&header, &claims, &key).unwrap(), "token_type": "Bearer"})))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Issuer;
    use super::*;
    use serde_json::{Value, json};

    const NOW: Micros = Micros(1_700_000_000_000_000);

    fn config(issuer: &Issuer) -> BTreeMap<String, OidcConfig> {
        let one = OidcConfig {
            issuer: issuer.url.clone(),
            client_id: "tidewatch".into(),
            client_secret: Some("client secret".into()),
            redirect_url: "http://127.0.0.1:1/api/v1/auth/oidc/local/callback".into(),
            ..OidcConfig::default()
        };
        BTreeMap::from([("local".to_owned(), one)])
    }

    #[tokio::test]
    async fn a_browser_comes_back_as_whom_the_issuer_names_and_only_once() {
        let issuer = Issuer::start().await;
        let oidc = Oidc::new(&config(&issuer)).unwrap();
        let departure = oidc.depart("local", NOW).await.unwrap();
        let (state, code) = issuer.sign_in(&departure.to);
        let identity = oidc.arrive("local", &state, &code, Some(&departure.browser), NOW).await.unwrap();
        assert_eq!((identity.subject.as_str(), identity.email.as_deref()), ("42", Some("ann@example.com")));
        let again = oidc.arrive("local", &state, &code, Some(&departure.browser), NOW).await.unwrap_err();
        assert_eq!(again.code, "sign_in_refused");
        let code = oidc.hand_over("ann".into(), NOW);
        assert_eq!(oidc.fetch(&code, NOW).unwrap(), "ann");
        assert!(oidc.fetch(&code, NOW).is_err());
        let late = oidc.hand_over("ann".into(), NOW);
        assert!(oidc.fetch(&late, NOW.plus(FETCH_MAX)).is_err());
        assert_eq!(oidc.depart("other", NOW).await.err().unwrap().code, "unknown_issuer");
    }

    #[tokio::test]
    async fn another_browser_and_a_late_one_are_refused() {
        let issuer = Issuer::start().await;
        let oidc = Oidc::new(&config(&issuer)).unwrap();
        for (browser, at) in [(None, NOW), (Some("somebody else"), NOW), (Some("own"), NOW.plus(ABROAD_MAX))] {
            let departure = oidc.depart("local", NOW).await.unwrap();
            let (state, code) = issuer.sign_in(&departure.to);
            let browser = browser.map(|name| if name == "own" { departure.browser.as_str() } else { name });
            let refused = oidc.arrive("local", &state, &code, browser, at).await.unwrap_err();
            assert_eq!(refused.code, "sign_in_refused");
        }
    }

    #[tokio::test]
    async fn an_id_token_for_somebody_or_something_else_is_refused() {
        let issuer = Issuer::start().await;
        let oidc = Oidc::new(&config(&issuer)).unwrap();
        let wrong: [Value; 6] = [
            json!({"iss": "https://elsewhere.example"}),
            json!({"aud": "another client"}),
            json!({"nonce": "another"}),
            json!({"azp": "another client"}),
            json!({"exp": 1_000}),
            json!({"sub": null}),
        ];
        for claims in wrong {
            *issuer.claims.lock() = claims.clone();
            let departure = oidc.depart("local", NOW).await.unwrap();
            let (state, code) = issuer.sign_in(&departure.to);
            let refused = oidc.arrive("local", &state, &code, Some(&departure.browser), NOW).await.unwrap_err();
            assert_eq!(refused.code, "issuer_failed", "{claims}");
        }
        *issuer.claims.lock() = json!({"email_verified": false});
        let departure = oidc.depart("local", NOW).await.unwrap();
        let (state, code) = issuer.sign_in(&departure.to);
        let identity = oidc.arrive("local", &state, &code, Some(&departure.browser), NOW).await.unwrap();
        assert_eq!(identity.email, None, "an address that nobody has checked is none");
    }

    #[test]
    fn settings_that_are_not_safe_are_refused_by_name() {
        let with = |change: fn(&mut OidcConfig)| {
            let mut one = OidcConfig {
                issuer: "https://id.example".into(),
                client_id: "c".into(),
                redirect_url: "https://tide.example/api/v1/auth/oidc/x/callback".into(),
                ..OidcConfig::default()
            };
            change(&mut one);
            Oidc::new(&BTreeMap::from([("x".to_owned(), one)])).err()
        };
        assert_eq!(with(|_| ()), None);
        for (found, key) in [
            (with(|one| one.issuer = "http://id.example".into()), "auth.oidc.x.issuer"),
            (with(|one| one.redirect_url = String::new()), "auth.oidc.x.redirect_url"),
            (with(|one| one.client_id = String::new()), "auth.oidc.x.client_id"),
            (with(|one| one.client_secret_file = Some("/nowhere".into())), "auth.oidc.x.client_secret_file"),
        ] {
            assert!(found.as_ref().is_some_and(|found| found.contains(key)), "{found:?}");
        }
    }
}
