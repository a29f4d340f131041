//! Sign-in by an OpenID Connect issuer: authorization code with PKCE (OpenID Connect Core 1.0, RFC 7636).
//!
//! The browser is sent to the issuer and comes back with a code, which is exchanged here for an ID token. Who it names is
//! then a user like any other; the page gets a code of ours, good once and for a minute, for a pair of tokens.
//!
//! What belongs to a sign-in is with the browser, sealed: however many begin, nothing is kept here, and another node can
//! end what one began.

use crate::problem::Problem;
use actors::Sealer;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use engine::event::{Micros, Span};
use jsonwebtoken::jwk::{Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation};
use parking_lot::Mutex;
use reqwest::Url;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
pub(crate) const ABROAD_MAX: Span = Span::seconds(600);
/// How long a page has to fetch its tokens.
const FETCH_MAX: Span = Span::seconds(60);
/// Ways back that are remembered as used. Beyond it the oldest are forgotten: nobody is turned away, and the issuer's own
/// code is good once too.
const SPENT_MAX: usize = 10_000;
/// What an issuer publishes is taken for true this long, but for keys that do not fit: those are fetched anew, at most
/// every few seconds.
const PUBLISHED_FOR: Span = Span::seconds(600);
const KEYS_EVERY: Span = Span::seconds(5);
/// The clocks of an issuer and of this server differ by no more.
const LEEWAY_SECONDS: f64 = 60.0;
/// So much of a sign-in's `state` tells it from the others of its browser.
const LABEL_CHARS: usize = 12;
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

/// The configured issuers.
pub(crate) struct Oidc {
    issuers: BTreeMap<String, Issuer>,
    http: Option<reqwest::Client>,
    sealer: Arc<Sealer>,
    /// Ways back that were used, by when they would have ended: each is good once.
    spent: Mutex<BTreeSet<(Micros, String)>>,
}

struct Issuer {
    config: OidcConfig,
    discovery: Published<Discovery>,
    keys: Published<Vec<Jwk>>,
}

/// A sign-in under way, which its browser carries.
#[derive(Serialize, Deserialize)]
struct Ticket {
    verifier: String,
    nonce: String,
    until: Micros,
}

/// A sign-in that is to be fetched by its page.
#[derive(Serialize, Deserialize)]
struct Arrived {
    refresh_token: String,
    until: Micros,
}

/// What a browser is sent away with.
pub(crate) struct Departure {
    pub(crate) to: String,
    pub(crate) state: String,
    /// For a cookie: ties the way back to the browser that began, so that somebody else's link signs nobody in.
    pub(crate) ticket: String,
    pub(crate) is_secure: bool,
}

/// Whom an issuer names.
#[derive(Debug, PartialEq)]
pub(crate) struct Identity {
    pub(crate) issuer: String,
    pub(crate) subject: String,
    /// Only where the issuer has made sure that it is theirs. ASCII in lower case: beyond it, addresses that differ
    /// may be one in lower case.
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
#[serde(untagged)]
enum TokenAnswer {
    Given { id_token: String },
    Refused { error: String },
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct IdToken {
    /// One; the library would take a list that holds the right one.
    #[serde(rename = "iss")]
    _iss: String,
    sub: String,
    aud: Value,
    exp: f64,
    nbf: Option<f64>,
    iat: Option<f64>,
    nonce: Option<String>,
    azp: Option<String>,
    email: Option<String>,
    /// A boolean; some issuers write it as text.
    #[serde(default)]
    email_verified: Value,
}

/// What a fetch gave, and when.
type Fetched<T> = (Result<Arc<T>, Problem>, Micros);

/// What an issuer publishes, as it was last. One fetches it; who waits for that gets the same, also where it failed.
struct Published<T> {
    last: tokio::sync::Mutex<Option<Fetched<T>>>,
    fetches: AtomicU64,
}

impl<T> Default for Published<T> {
    fn default() -> Self {
        Self { last: tokio::sync::Mutex::default(), fetches: AtomicU64::new(0) }
    }
}

impl<T> Published<T> {
    /// The last one where that is `good` at its age, else what `fetch` gives.
    async fn get(
        &self,
        good: impl Fn(&T, Span) -> bool,
        fetch: impl Future<Output = Result<T, Problem>>,
        now: Micros,
    ) -> Result<Arc<T>, Problem> {
        let before = self.fetches.load(Ordering::Acquire);
        let mut last = self.last.lock().await;
        let waited = self.fetches.load(Ordering::Acquire) != before;
        if let Some((found, at)) = &*last
            && (waited || found.as_ref().is_ok_and(|found| good(found, now.since(*at))))
        {
            return found.clone();
        }
        let fetched = fetch.await.map(Arc::new);
        *last = Some((fetched.clone(), now));
        self.fetches.fetch_add(1, Ordering::Release);
        fetched
    }
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

pub(crate) fn refused(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "sign_in_refused", detail)
}

/// An issuer's error code (RFC 6749, sections 4.1.2.1 and 5.2).
pub(crate) fn refused_by_issuer(error: &str) -> Problem {
    let error: String = error.chars().filter(char::is_ascii_graphic).take(60).collect();
    refused(format!("the issuer refused the sign-in: {error}"))
}

pub(crate) fn unknown_code() -> Problem {
    refused("this code is unknown, was used, is too old or is for another browser; begin again")
}

/// What tells a sign-in from the others of its browser; both its `state` and the code for its page begin with it.
pub(crate) fn label(of: &str) -> &str {
    of.get(..LABEL_CHARS).unwrap_or(of)
}

impl Oidc {
    /// Checks the settings; an error names the one that is wrong.
    pub(crate) fn new(config: &BTreeMap<String, OidcConfig>, sealer: Arc<Sealer>) -> Result<Oidc, String> {
        let mut issuers = BTreeMap::new();
        for (name, mut issuer) in config.clone() {
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
            let issuer = Issuer { config: issuer, discovery: Published::default(), keys: Published::default() };
            issuers.insert(name, issuer);
        }
        let http = if issuers.is_empty() { None } else { Some(client()?) };
        Ok(Oidc { issuers, http, sealer, spent: Mutex::default() })
    }

    /// The names of the issuers.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.issuers.keys().map(String::as_str).collect()
    }

    fn issuer(&self, name: &str) -> Result<&Issuer, Problem> {
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
        let discovery = self.discovery(issuer, now).await?;
        let (state, verifier, nonce) = (random(), random(), random());
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(&verifier));
        let parameters = [
            ("response_type", "code"),
            ("client_id", issuer.config.client_id.as_str()),
            ("redirect_uri", issuer.config.redirect_url.as_str()),
            ("scope", "openid email"),
            ("state", state.as_str()),
            ("nonce", nonce.as_str()),
            ("code_challenge", challenge.as_str()),
            ("code_challenge_method", "S256"),
        ];
        let to = Url::parse_with_params(&discovery.authorization_endpoint, parameters).map_err(abroad)?;
        let ticket = self.seal(&away(name, &state), &Ticket { verifier, nonce, until: now.plus(ABROAD_MAX) });
        let is_secure = issuer.config.redirect_url.starts_with("https:");
        Ok(Departure { to: to.into(), state, ticket, is_secure })
    }

    /// Ends a sign-in at the issuer: whom it names. Each way back is good once.
    pub(crate) async fn arrive(
        &self,
        name: &str,
        state: &str,
        code: &str,
        ticket: &str,
        now: Micros,
    ) -> Result<Identity, Problem> {
        let issuer = self.issuer(name)?;
        let unknown = || refused("this sign-in is unknown, took too long or began in another browser; begin again");
        let ticket: Ticket = self.open(&away(name, state), ticket).ok_or_else(unknown)?;
        if ticket.until <= now || !self.spend(ticket.until, state, now) {
            return Err(unknown());
        }
        let discovery = self.discovery(issuer, now).await?;
        let id_token = self.exchange(&issuer.config, &discovery, code, &ticket.verifier).await?;
        let read = |keys: &[Jwk]| check(&id_token, keys, &issuer.config, &ticket.nonce, now);
        let good = |keys: &Vec<Jwk>, age| age < KEYS_EVERY || (age < PUBLISHED_FOR && read(keys).is_ok());
        let keys = issuer.keys.get(good, self.fetch_keys(&discovery.jwks_uri), now).await?;
        let token = read(&keys).map_err(|error| {
            tracing::warn!(%error, issuer = name, "an ID token was refused");
            refused(error)
        })?;
        let checked = token.email_verified == true || token.email_verified == "true";
        Ok(Identity {
            issuer: issuer.config.issuer.clone(),
            subject: token.sub,
            email: token.email.filter(|email| checked && email.is_ascii()).map(|email| email.to_ascii_lowercase()),
            create: issuer.config.create_users,
        })
    }

    /// A code for the page of this browser to fetch its tokens with, in place of `refresh_token`.
    pub(crate) fn hand_over(&self, state: &str, ticket: &str, refresh_token: String, now: Micros) -> String {
        let arrived = Arrived { refresh_token, until: now.plus(FETCH_MAX) };
        format!("{}{}", label(state), self.seal(&back(ticket), &arrived))
    }

    /// The refresh token that the code stands for, in the browser that has the ticket.
    pub(crate) fn fetch(&self, code: &str, ticket: &str, now: Micros) -> Result<String, Problem> {
        let arrived: Option<Arrived> = self.open(&back(ticket), &code[label(code).len()..]);
        let arrived = arrived.filter(|arrived| arrived.until > now).ok_or_else(unknown_code)?;
        Ok(arrived.refresh_token)
    }

    fn seal(&self, owner: &str, what: &impl Serialize) -> String {
        self.sealer.seal(owner, &serde_json::to_vec(what).expect("texts and numbers are JSON"))
    }

    fn open<T: DeserializeOwned>(&self, owner: &str, sealed: &str) -> Option<T> {
        serde_json::from_slice(&self.sealer.open(owner, sealed).ok()?).ok()
    }

    /// Whether this way back was not used before.
    fn spend(&self, until: Micros, state: &str, now: Micros) -> bool {
        let mut spent = self.spent.lock();
        while spent.len() >= SPENT_MAX || spent.first().is_some_and(|(until, _)| *until <= now) {
            spent.pop_first();
        }
        spent.insert((until, state.to_owned()))
    }

    fn http(&self) -> Result<&reqwest::Client, Problem> {
        self.http.as_ref().ok_or_else(|| Problem::internal("an issuer without a client"))
    }

    async fn discovery(&self, issuer: &Issuer, now: Micros) -> Result<Arc<Discovery>, Problem> {
        issuer.discovery.get(|_, age| age < PUBLISHED_FOR, self.discover(&issuer.config), now).await
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

    /// The keys that can be read: others may be there for others (RFC 7517, section 5).
    async fn fetch_keys(&self, at: &str) -> Result<Vec<Jwk>, Problem> {
        let set: KeySet = ask(self.http()?.get(at)).await?;
        Ok(set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok()).collect())
    }

    /// The ID token for an authorization code.
    async fn exchange(
        &self,
        issuer: &OidcConfig,
        discovery: &Discovery,
        code: &str,
        verifier: &str,
    ) -> Result<String, Problem> {
        let mut form = vec![
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", issuer.redirect_url.as_str()),
            ("client_id", issuer.client_id.as_str()),
            ("code_verifier", verifier),
        ];
        if let Some(secret) = &issuer.client_secret {
            form.push(("client_secret", secret.as_str()));
        }
        let form = Url::parse_with_params("http://form", form).map_err(abroad)?.query().unwrap_or_default().to_owned();
        let request = self.http()?.post(&discovery.token_endpoint).body(form);
        let (status, body) = send(request.header("content-type", "application/x-www-form-urlencoded")).await?;
        match (status.as_u16(), serde_json::from_slice(&body)) {
            (200..300, Ok(TokenAnswer::Given { id_token })) => Ok(id_token),
            (400 | 401, Ok(TokenAnswer::Refused { error })) => {
                tracing::warn!(error, issuer = issuer.issuer, "an issuer refused a sign-in's code");
                Err(refused_by_issuer(&error))
            }
            _ => Err(abroad(format!("status {status} of the token endpoint, without an ID token or an error"))),
        }
    }
}

/// For whom a ticket is sealed: one sign-in at one issuer.
fn away(name: &str, state: &str) -> String {
    format!("oidc/away/{name}/{state}")
}

/// For whom a code is sealed: the browser that has this ticket.
fn back(ticket: &str) -> String {
    format!("oidc/back/{ticket}")
}

/// The claims of an ID token that is good, or what is wrong with it (OpenID Connect Core 1.0, section 3.1.3.7).
fn check(token: &str, keys: &[Jwk], issuer: &OidcConfig, nonce: &str, now: Micros) -> Result<IdToken, String> {
    let header = jsonwebtoken::decode_header(token).map_err(|error| format!("no ID token: {error}"))?;
    if !ALGORITHMS.contains(&header.alg) {
        return Err(format!("the ID token is signed with {:?}, which is not taken", header.alg));
    }
    let mut fitting = keys.iter().filter(|key| fits(key, &header));
    let key = fitting.next().filter(|_| header.kid.is_some() || fitting.next().is_none());
    let key = key.ok_or("the ID token names no key of the issuer")?;
    let key = DecodingKey::from_jwk(key).map_err(|error| format!("a key of the issuer: {error}"))?;
    let mut validation = Validation::new(header.alg);
    validation.set_required_spec_claims(&["iss", "aud", "sub"]);
    validation.set_issuer(&[&issuer.issuer]);
    validation.set_audience(&[&issuer.client_id]);
    validation.validate_exp = false; // checked against the time that is handed in
    let claims = jsonwebtoken::decode::<IdToken>(token, &key, &validation);
    let claims = claims.map_err(|error| format!("the ID token is refused: {error}"))?.claims;
    let seconds = now.0 as f64 / 1e6;
    if claims.exp <= seconds - LEEWAY_SECONDS {
        return Err("the ID token has expired".to_owned());
    }
    if [claims.nbf, claims.iat].into_iter().flatten().any(|from| from > seconds + LEEWAY_SECONDS) {
        return Err("the ID token is from the future; check the clocks of the issuer and of this server".to_owned());
    }
    if claims.nonce.as_deref() != Some(nonce) {
        return Err("the ID token is for another sign-in".to_owned());
    }
    let for_others = claims.aud.as_array().is_some_and(|all| all.iter().any(|one| *one != issuer.client_id));
    if claims.azp.as_ref().map_or(for_others, |azp| *azp != issuer.client_id) {
        return Err("the ID token is for another client".to_owned());
    }
    Ok(claims)
}

/// Whether a key may have signed what has this header (RFC 7517, sections 4.2, 4.4 and 4.5).
fn fits(key: &Jwk, header: &Header) -> bool {
    let common = &key.common;
    let signs = matches!(common.public_key_use, None | Some(PublicKeyUse::Signature));
    let so = |alg: &str| Algorithm::from_str(alg).is_ok_and(|alg| alg == header.alg);
    let named = header.kid.is_none() || header.kid == common.key_id;
    signs && named && common.key_algorithm.is_none_or(|alg| so(&alg.to_string()))
}

async fn ask<T: DeserializeOwned>(request: reqwest::RequestBuilder) -> Result<T, Problem> {
    let (status, body) = send(request).await?;
    if !status.is_success() {
        return Err(abroad(format!("status {status}")));
    }
    serde_json::from_slice(&body).map_err(|error| abroad(format!("an answer that is not as expected: {error}")))
}

async fn send(request: reqwest::RequestBuilder) -> Result<(StatusCode, Vec<u8>), Problem> {
    let answered = request.timeout(ANSWER_WAIT).header("accept", "application/json").send().await;
    let mut answer = answered.map_err(|error| abroad(error.without_url()))?;
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(|error| abroad(error.without_url()))? {
        if body.len() + part.len() > ANSWER_BYTES_MAX {
            return Err(abroad(format!("an answer of more than {ANSWER_BYTES_MAX} bytes")));
        }
        body.extend_from_slice(&part);
    }
    Ok((answer.status(), body))
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
    use axum::http::StatusCode;
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use base64::Engine;
    use engine::event::Micros;
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
        /// When its tokens are from.
        at: Micros,
        /// Parameters of the authorization request by code.
        codes: Arc<Mutex<HashMap<String, HashMap<String, String>>>>,
        /// What the next ID token says beside what it must.
        pub(crate) claims: Arc<Mutex<Value>>,
        /// The keys that it publishes.
        pub(crate) keys: Arc<Mutex<Vec<Value>>>,
        /// Whether it answers, and how often its discovery and its keys were fetched.
        pub(crate) is_away: Arc<Mutex<bool>>,
        pub(crate) fetched: Arc<Mutex<(usize, usize)>>,
    }

    /// The key that it signs with, as it is published.
    pub(crate) fn key() -> Value {
        json!({"kty": "EC", "crv": "P-256", "kid": "k1", "alg": "ES256", "use": "sig", "x": X, "y": Y})
    }

    impl Issuer {
        pub(crate) async fn start(at: Micros) -> Issuer {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let issuer = Issuer {
                url,
                at,
                codes: Arc::default(),
                claims: Arc::default(),
                keys: Arc::new(Mutex::new(vec![key()])),
                is_away: Arc::default(),
                fetched: Arc::default(),
            };
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

        async fn discovery(State(issuer): State<Issuer>) -> Result<Json<Value>, StatusCode> {
            issuer.fetched.lock().0 += 1;
            if *issuer.is_away.lock() {
                return Err(StatusCode::SERVICE_UNAVAILABLE);
            }
            let at = |path: &str| format!("{}{path}", issuer.url);
            Ok(Json(json!({
                "issuer": issuer.url, "authorization_endpoint": at("/authorize"), "token_endpoint": at("/token"),
                "jwks_uri": at("/keys"),
            })))
        }

        async fn keys(State(issuer): State<Issuer>) -> Json<Value> {
            issuer.fetched.lock().1 += 1;
            Json(json!({"keys": *issuer.keys.lock()}))
        }

        async fn token(
            State(issuer): State<Issuer>,
            Form(form): Form<HashMap<String, String>>,
        ) -> Result<Json<Value>, (StatusCode, Json<Value>)> {
            if *issuer.is_away.lock() {
                return Err((StatusCode::SERVICE_UNAVAILABLE, Json(json!("later"))));
            }
            let wrong = || (StatusCode::BAD_REQUEST, Json(json!({"error": "invalid_grant"})));
            let asked = issuer.codes.lock().remove(&form["code"]).ok_or_else(wrong)?;
            let challenge = super::URL_SAFE_NO_PAD.encode(sha2::Sha256::digest(&form["code_verifier"]));
            if challenge != asked["code_challenge"] || form["client_secret"] != "client secret" {
                return Err(wrong());
            }
            let now = issuer.at.0 / 1_000_000;
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
    use super::testing::{Issuer, key};
    use super::*;
    use futures::future::join_all;
    use serde_json::json;

    const NOW: Micros = Micros(1_700_000_000_000_000);

    fn sealer() -> Arc<Sealer> {
        Arc::new(Sealer::new(["0123456789abcdef0123456789abcdef"].into_iter()))
    }

    async fn start() -> (Issuer, Oidc) {
        let issuer = Issuer::start(NOW).await;
        let oidc = node(&issuer);
        (issuer, oidc)
    }

    fn node(issuer: &Issuer) -> Oidc {
        let one = OidcConfig {
            issuer: issuer.url.clone(),
            client_id: "tidewatch".into(),
            client_secret: Some("client secret".into()),
            redirect_url: "http://127.0.0.1:1/api/v1/auth/oidc/local/callback".into(),
            ..OidcConfig::default()
        };
        Oidc::new(&BTreeMap::from([("local".to_owned(), one)]), sealer()).unwrap()
    }

    /// A whole sign-in at the issuer, or the code of what refused it.
    async fn sign_in(issuer: &Issuer, oidc: &Oidc, now: Micros) -> Result<Identity, &'static str> {
        let departure = oidc.depart("local", now).await.map_err(|problem| problem.code)?;
        let (state, code) = issuer.sign_in(&departure.to);
        oidc.arrive("local", &state, &code, &departure.ticket, now).await.map_err(|problem| problem.code)
    }

    #[tokio::test]
    async fn a_browser_comes_back_as_whom_the_issuer_names_and_only_once() {
        let (issuer, oidc) = start().await;
        let departure = oidc.depart("local", NOW).await.unwrap();
        let (state, code) = issuer.sign_in(&departure.to);
        let identity = oidc.arrive("local", &state, &code, &departure.ticket, NOW).await.unwrap();
        assert_eq!((identity.subject.as_str(), identity.email.as_deref()), ("42", Some("ann@example.com")));
        let again = oidc.arrive("local", &state, &code, &departure.ticket, NOW).await.unwrap_err();
        assert!(again.code == "sign_in_refused" && again.detail.contains("this sign-in is unknown"));
        let code = oidc.hand_over(&state, &departure.ticket, "token".into(), NOW);
        assert_eq!(oidc.fetch(&code, &departure.ticket, NOW).unwrap(), "token");
        assert!(oidc.fetch(&code, &departure.ticket, NOW.plus(FETCH_MAX)).is_err());
        for other in ["", "another"] {
            assert!(oidc.fetch(&code, other, NOW).is_err(), "the code is for the browser with the ticket");
        }
        assert_eq!(oidc.depart("other", NOW).await.err().unwrap().code, "unknown_issuer");
    }

    #[tokio::test]
    async fn another_browser_and_a_late_one_are_refused() {
        let (issuer, oidc) = start().await;
        let other = oidc.depart("local", NOW).await.unwrap().ticket;
        for (ticket, at) in [("", NOW), (other.as_str(), NOW), ("own", NOW.plus(ABROAD_MAX))] {
            let departure = oidc.depart("local", NOW).await.unwrap();
            let (state, code) = issuer.sign_in(&departure.to);
            let ticket = if ticket == "own" { departure.ticket.as_str() } else { ticket };
            let refused = oidc.arrive("local", &state, &code, ticket, at).await.unwrap_err();
            assert_eq!(refused.code, "sign_in_refused");
        }
    }

    #[tokio::test]
    async fn however_many_begin_to_sign_in_nothing_is_kept_and_any_node_ends_it() {
        let (issuer, oidc) = start().await;
        let departure = oidc.depart("local", NOW).await.unwrap();
        for departed in join_all((0..10_000).map(|_| oidc.depart("local", NOW))).await {
            assert!(departed.is_ok());
        }
        assert_eq!(*issuer.fetched.lock(), (1, 0), "what the issuer says of itself is fetched once");
        let (state, code) = issuer.sign_in(&departure.to);
        let ended = node(&issuer).arrive("local", &state, &code, &departure.ticket, NOW).await;
        assert_eq!(ended.unwrap().subject, "42");
    }

    #[tokio::test]
    async fn used_ways_back_are_remembered_up_to_a_bound_and_until_they_end() {
        let (_, oidc) = start().await;
        let until = |n: usize| NOW.plus(Span::seconds(1 + n as i64));
        assert!((0..SPENT_MAX).all(|n| oidc.spend(until(n), "state", NOW)));
        assert!(!oidc.spend(until(7), "state", NOW), "it was used");
        assert!(oidc.spend(until(SPENT_MAX), "state", NOW));
        assert_eq!(oidc.spent.lock().len(), SPENT_MAX);
        assert!(oidc.spend(until(SPENT_MAX + 1), "state", until(SPENT_MAX - 1)));
        assert_eq!(oidc.spent.lock().len(), 2);
    }

    #[tokio::test]
    async fn what_an_issuer_publishes_is_fetched_anew_when_it_is_old_or_failed() {
        let (issuer, oidc) = start().await;
        *issuer.is_away.lock() = true;
        let departed = join_all((0..5).map(|_| oidc.depart("local", NOW))).await;
        assert!(departed.iter().all(|departed| departed.as_ref().err().unwrap().code == "issuer_failed"));
        assert_eq!(*issuer.fetched.lock(), (1, 0), "who waited gets the same answer");
        *issuer.is_away.lock() = false;
        for (at, fetched) in [(NOW, (2, 1)), (NOW.plus(KEYS_EVERY), (2, 1)), (NOW.plus(PUBLISHED_FOR), (3, 2))] {
            *issuer.claims.lock() = json!({"exp": at.0 / 1_000_000});
            assert!(sign_in(&issuer, &oidc, at).await.is_ok());
            assert_eq!(*issuer.fetched.lock(), fetched);
        }
    }

    #[tokio::test]
    async fn a_key_that_is_not_known_yet_is_looked_for_every_few_seconds() {
        let (issuer, oidc) = start().await;
        let mut before = key();
        before["kid"] = json!("k0");
        *issuer.keys.lock() = vec![before];
        assert_eq!(sign_in(&issuer, &oidc, NOW).await, Err("sign_in_refused"));
        *issuer.keys.lock() = vec![key()];
        assert_eq!(sign_in(&issuer, &oidc, NOW.plus(Span::seconds(1))).await, Err("sign_in_refused"));
        assert_eq!(*issuer.fetched.lock(), (1, 1));
        assert!(sign_in(&issuer, &oidc, NOW.plus(KEYS_EVERY)).await.is_ok());
    }

    #[tokio::test]
    async fn a_wrong_code_is_refused_and_an_issuer_that_is_away_has_failed() {
        let (issuer, oidc) = start().await;
        for (is_away, expected) in [(false, "sign_in_refused"), (true, "issuer_failed")] {
            let departure = oidc.depart("local", NOW).await.unwrap();
            *issuer.is_away.lock() = is_away;
            let (state, _) = issuer.sign_in(&departure.to);
            let refused = oidc.arrive("local", &state, "made up", &departure.ticket, NOW).await.unwrap_err();
            assert_eq!(refused.code, expected, "{}", refused.detail);
        }
    }

    #[tokio::test]
    async fn an_id_token_for_somebody_or_something_else_is_refused() {
        let (issuer, oidc) = start().await;
        let now = NOW.0 / 1_000_000;
        let wrong = [
            json!({"iss": "https://elsewhere.example"}),
            json!({"iss": [issuer.url, "https://elsewhere.example"]}),
            json!({"aud": "another client"}),
            json!({"aud": ["tidewatch", "another client"]}),
            json!({"nonce": "another"}),
            json!({"azp": "another client"}),
            json!({"exp": now - 60}),
            json!({"exp": null}),
            json!({"nbf": now + 61}),
            json!({"iat": now + 86_400}),
            json!({"sub": null}),
        ];
        for claims in wrong {
            *issuer.claims.lock() = claims.clone();
            assert_eq!(sign_in(&issuer, &oidc, NOW).await, Err("sign_in_refused"), "{claims}");
        }
        let good = [
            json!({"aud": ["tidewatch"]}),
            json!({"aud": ["tidewatch", "another client"], "azp": "tidewatch"}),
            json!({"exp": now - 59, "nbf": now + 60, "iat": now + 60}),
        ];
        for claims in good {
            *issuer.claims.lock() = claims.clone();
            assert!(sign_in(&issuer, &oidc, NOW).await.is_ok(), "{claims}");
        }
    }

    #[tokio::test]
    async fn an_address_is_one_that_the_issuer_has_checked_and_ascii() {
        let (issuer, oidc) = start().await;
        for (claims, expected) in [
            (json!({"email_verified": "true"}), Some("ann@example.com")),
            (json!({"email": "Ann@Example.COM"}), Some("ann@example.com")),
            (json!({"email_verified": false}), None),
            (json!({"email_verified": "false"}), None),
            (json!({"email_verified": null}), None),
            (json!({"email": "mar\u{212a}@example.com"}), None),
        ] {
            *issuer.claims.lock() = claims.clone();
            assert_eq!(sign_in(&issuer, &oidc, NOW).await.unwrap().email.as_deref(), expected, "{claims}");
        }
    }

    #[tokio::test]
    async fn only_keys_for_signatures_of_the_kind_sign_and_those_that_cannot_be_read_are_ignored() {
        let with = |name: &str, value: &str| {
            let mut key = key();
            key[name] = json!(value);
            key
        };
        let unread = json!({"kty": "AKP", "alg": "ML-DSA-65", "kid": "k2", "pub": "AAAA"});
        for (keys, is_good) in [
            (vec![unread, key()], true),
            (vec![with("use", "enc"), key()], true),
            (vec![with("use", "enc")], false),
            (vec![with("alg", "ES384")], false),
            (vec![with("alg", "ECDH-ES")], false),
        ] {
            let (issuer, oidc) = start().await;
            issuer.keys.lock().clone_from(&keys);
            assert_eq!(sign_in(&issuer, &oidc, NOW).await.is_ok(), is_good, "{keys:?}");
        }
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
            Oidc::new(&BTreeMap::from([("x".to_owned(), one)]), sealer()).err()
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
