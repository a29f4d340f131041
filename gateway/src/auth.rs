//! Who is asking: passwords, access and refresh tokens, API keys.

use crate::config::AuthConfig;
use crate::oidc::{self, Identity, Oidc};
use crate::permission::{Access, Role, Scope, parse_scopes};
use crate::problem::Problem;
use crate::throttle::{Throttle, Try};
use actors::{SealError, Sealer, sealed_for};
use argon2::password_hash::{PasswordHasher, SaltString};
use argon2::{Argon2, PasswordHash, PasswordVerifier};
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use engine::event::{Micros, Span, WorkspaceId};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sql::store::{ApiKey, AuditEntry, RefreshToken, Spent, Store, StoreError, Totp, User};
use std::collections::HashMap;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{MutexGuard, Semaphore};

const ISSUER: &str = "tidewatch";
const AUDIENCE: &str = "tidewatch-api";
/// The `typ` of access tokens (RFC 9068): no other token of ours passes for one.
const ACCESS_TYPE: &str = "at+jwt";
/// A longer token is none of ours.
const TOKEN_BYTES_MAX: usize = 8 << 10;
/// Bytes that a secret needs at least.
pub const SECRET_BYTES_MIN: usize = 32;

/// A password has at least so many characters.
pub const PASSWORD_CHARS_MIN: usize = 8;
const PASSWORD_BYTES_MAX: usize = 1 << 10;
/// How long a sign-in waits for its turn to be checked: each check takes 19 MiB, so few run at once.
const HASH_WAIT: Duration = Duration::from_secs(5);

/// Who somebody is and what they may do is looked up again after this long, so that a change made by another process
/// takes effect; a change made by this one does at once.
const REMEMBER: Span = Span::seconds(1);
const REMEMBER_MAX: usize = 10_000;
/// While the store cannot be reached the last answer stands for this long, so that those at work can go on: ingest and
/// live results do without the store.
const REMEMBER_IN_OUTAGE: Span = Span::seconds(15 * 60);

/// Why sign-in cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("auth.secret is not set: put the output of `openssl rand -base64 48` there or into auth.secret_file")]
    NoSecret,
    #[error("{key} has {found} bytes and needs {SECRET_BYTES_MIN} or more: make one with `openssl rand -base64 48`")]
    ShortSecret { key: &'static str, found: usize },
    #[error("cannot read {key}_file `{path}`: {source}")]
    SecretFile { key: &'static str, path: PathBuf, source: std::io::Error },
    #[error("auth.access_minutes and auth.refresh_days must be 1 or more")]
    Lifetime,
    #[error("auth.bootstrap_email is set without auth.bootstrap_password: set both or none")]
    NoBootstrapPassword,
    #[error("the first admin cannot be made: {0}")]
    Bootstrap(String),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Checks and issues credentials.
pub struct Auth {
    signing: EncodingKey,
    signing_id: String,
    /// The secret in use and those of before, by id.
    checking: Vec<(String, DecodingKey)>,
    validation: Validation,
    sealer: Arc<Sealer>,
    pub(crate) oidc: Oidc,
    access: Span,
    refresh: Span,
    bootstrap: Option<(String, String)>,
    hashing: Arc<Semaphore>,
    /// Checked for users that do not exist, so that they take as long as those that do.
    dummy_hash: Arc<str>,
    throttle: Throttle,
    callers: Remembered<[u8; 32], Caller>,
    accesses: Remembered<(WorkspaceId, String), Option<Access>>,
    tiers: Remembered<WorkspaceId, String>,
    /// Held by whoever changes who may do what.
    turn: tokio::sync::Mutex<()>,
}

/// Somebody with good credentials.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// User id, or `key:ID`.
    pub(crate) id: String,
    /// What people know them by: e-mail address, or `key:NAME`.
    pub(crate) name: String,
    /// May administer the whole installation.
    pub(crate) admin: bool,
    /// When the credentials end.
    pub(crate) expires_at: Option<Micros>,
    pub(crate) by: By,
}

/// What a caller came with.
#[derive(Clone, Debug)]
pub(crate) enum By {
    /// An access token of this family of refresh tokens.
    Session { family: String },
    /// An API key: good for one workspace, with a role and what of it the key's scopes leave.
    Key { workspace: WorkspaceId, access: Access },
}

/// Access and refresh token of a sign-in.
#[derive(Serialize)]
pub struct Tokens {
    /// For the header `authorization`.
    pub access_token: String,
    refresh_token: String,
    token_type: &'static str,
    /// Seconds until the access token ends.
    expires_in: i64,
}

/// What became of a sign-in whose refresh token was sent.
pub(crate) enum Refreshed {
    Tokens(Tokens),
    /// The token was spent before: whoever sends it again may have stolen it, so all of the sign-in is over.
    Ended {
        user: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    /// User id.
    sub: String,
    /// Family of refresh tokens.
    sid: String,
    iat: i64,
    exp: i64,
    /// We write none; one that somebody wrote with our secret holds too.
    #[serde(skip_serializing_if = "Option::is_none")]
    nbf: Option<i64>,
}

/// A secret as it is configured: itself, or a file that holds it.
fn configured(value: &Option<String>, file: &Option<PathBuf>, key: &'static str) -> Result<Option<String>, AuthError> {
    match (value, file) {
        (Some(value), _) => Ok(Some(value.clone())),
        (None, Some(path)) => {
            let read = std::fs::read_to_string(path);
            let text = read.map_err(|source| AuthError::SecretFile { key, path: path.clone(), source })?;
            Ok(Some(text.trim().to_owned()))
        }
        (None, None) => Ok(None),
    }
}

fn long_enough(key: &'static str, secret: &str) -> Result<(), AuthError> {
    match secret.len() {
        found if found < SECRET_BYTES_MIN => Err(AuthError::ShortSecret { key, found }),
        _ => Ok(()),
    }
}

/// The code where an address is taken.
const USER_EXISTS: &str = "user_exists";

/// The name of a signing secret: the `kid` of what it signed. Says nothing about the secret.
fn key_id(secret: &str) -> String {
    let digest = Sha256::new().chain_update(b"tidewatch kid\0").chain_update(secret).finalize();
    digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

impl Auth {
    /// Reads the secrets and checks that they are long enough.
    pub fn new(config: &AuthConfig) -> Result<Auth, AuthError> {
        let secret = configured(&config.secret, &config.secret_file, "auth.secret")?.ok_or(AuthError::NoSecret)?;
        long_enough("auth.secret", &secret)?;
        config.previous_secrets.iter().try_for_each(|secret| long_enough("auth.previous_secrets", secret))?;
        let encryption = configured(&config.encryption_key, &config.encryption_key_file, "auth.encryption_key")?;
        let sealing: Vec<&str> = (encryption.iter().chain(&config.previous_encryption_keys))
            .map(String::as_str)
            .chain([secret.as_str()])
            .chain(config.previous_secrets.iter().map(String::as_str))
            .collect();
        sealing.iter().try_for_each(|key| long_enough("auth.encryption_key", key))?;
        if config.access_minutes == 0 || config.refresh_days == 0 {
            return Err(AuthError::Lifetime);
        }
        let password =
            configured(&config.bootstrap_password, &config.bootstrap_password_file, "auth.bootstrap_password")?;
        let bootstrap = match (&config.bootstrap_email, password) {
            (Some(email), Some(password)) => Some((email.clone(), password)),
            (Some(_), None) => return Err(AuthError::NoBootstrapPassword),
            (None, _) => None,
        };
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(&[AUDIENCE]);
        validation.validate_exp = false; // checked against the time that is handed in
        let dummy_hash = hash_password("nobody has this password").map_err(|e| AuthError::Bootstrap(e.to_string()))?;
        let secrets = [&secret].into_iter().chain(&config.previous_secrets);
        let sealer = Arc::new(Sealer::new(sealing.into_iter()));
        Ok(Auth {
            signing: EncodingKey::from_secret(secret.as_bytes()),
            signing_id: key_id(&secret),
            checking: secrets.map(|key| (key_id(key), DecodingKey::from_secret(key.as_bytes()))).collect(),
            validation,
            oidc: Oidc::new(&config.oidc, sealer.clone()).map_err(AuthError::Refused)?,
            sealer,
            access: Span::seconds(i64::from(config.access_minutes) * 60),
            refresh: Span::seconds(i64::from(config.refresh_days) * 86_400),
            bootstrap,
            hashing: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from))),
            dummy_hash: dummy_hash.into(),
            throttle: Throttle::default(),
            callers: Remembered::default(),
            accesses: Remembered::default(),
            tiers: Remembered::default(),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// Makes the configured first admin where there is no user yet: whether one was made.
    pub async fn bootstrap(&self, store: &Store, now: Micros) -> Result<bool, AuthError> {
        let Some((email, password)) = &self.bootstrap else { return Ok(false) };
        let count = store.user_count().await?;
        if count > 0 {
            return Ok(false);
        }
        let made = self.create_user(store, email, password, true, now).await;
        made.map_err(|problem| AuthError::Bootstrap(problem.detail))?;
        Ok(true)
    }

    /// Adds a user who signs in with this address and password.
    pub(crate) async fn create_user(
        &self,
        store: &Store,
        email: &str,
        password: &str,
        admin: bool,
        now: Micros,
    ) -> Result<User, Problem> {
        check_email(email)?;
        check_password(password)?;
        let password = password.to_owned();
        let password_hash = self.hashing(move || hash_password(&password)).await?.map_err(Problem::internal)?;
        let id = uuid::Uuid::now_v7().to_string();
        let user = User { id, email: email.to_lowercase(), password_hash, admin, created_at: now };
        match store.create_user(&user).await {
            Ok(()) => Ok(user),
            Err(StoreError::Exists { .. }) => {
                Err(Problem::conflict(USER_EXISTS, format!("there is a user `{}` already", user.email)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Signs in. An unknown user takes as long, and gets the same answer, as a wrong password.
    pub(crate) async fn login(
        &self,
        store: &Store,
        email: &str,
        password: String,
        otp: Option<&str>,
        at: Try<'_>,
    ) -> Result<Tokens, Problem> {
        let email: String = email.to_lowercase().chars().take(320).collect();
        self.throttle.count(&email, at).await?;
        let user = match self.check_sign_in(store, &email, password, otp, at).await {
            Ok(user) => user,
            Err(problem) => {
                if !is_wrong_guess(&problem) {
                    self.throttle.take_back(&email, at).await;
                }
                return Err(problem);
            }
        };
        self.throttle.succeeded(&email, at).await;
        let (tokens, kept) = self.tokens(&user.id, uuid::Uuid::new_v4().to_string(), at.now)?;
        match store.begin_sign_in(&kept, &user.password_hash).await? {
            true => Ok(tokens),
            false => Err(wrong_password()),
        }
    }

    async fn check_sign_in(
        &self,
        store: &Store,
        email: &str,
        password: String,
        otp: Option<&str>,
        at: Try<'_>,
    ) -> Result<User, Problem> {
        let user = store.user_by_email(email).await?;
        let known: Arc<str> =
            user.as_ref().map_or_else(|| self.dummy_hash.clone(), |u| u.password_hash.as_str().into());
        let too_long = password.len() > PASSWORD_BYTES_MAX;
        let good = self.hashing(move || !too_long && verify(&password, &known)).await?;
        let user = user.filter(|_| good).ok_or_else(wrong_password)?;
        let totp = store.totp(&user.id).await?;
        if let Some(sealed) = &totp.secret {
            let Some(otp) = otp else {
                let detail = "this account has a second factor: send the code of your authenticator as `otp`";
                return Err(Problem::unauthorized(detail).code("otp_required"));
            };
            if !self.try_code(store, &user, sealed, otp, at).await? {
                let detail = "the code is wrong or was used before; wait for the next one";
                return Err(Problem::unauthorized(detail).code(WRONG_CODE));
            }
        }
        Ok(user)
    }

    /// The user whom an issuer names: known by the identity, else by an address that the issuer has checked, else made
    /// where the issuer's settings say so.
    pub(crate) async fn user_of(&self, store: &Store, identity: Identity, now: Micros) -> Result<User, Problem> {
        let Identity { issuer, subject, email, create } = identity;
        if let Some(user) = store.user_by_identity(&issuer, &subject).await? {
            return Ok(user);
        }
        let nobody = |detail: &str| Problem::forbidden(detail).code("unknown_user");
        let unchecked = "the issuer gives no e-mail address, of ASCII characters, that it has checked";
        let email = email.ok_or_else(|| nobody(unchecked))?;
        let user = match store.user_by_email(&email).await? {
            Some(user) => user,
            // a password that nobody knows
            None if create => match self.create_user(store, &email, &random_token(""), false, now).await {
                // by another sign-in at the same time
                Err(made) if made.code == USER_EXISTS => store.user_by_email(&email).await?.ok_or(made)?,
                made => made?,
            },
            None => return Err(nobody("there is no user with this e-mail address; ask an admin to add one")),
        };
        if !store.put_identity(&issuer, &subject, &user.id, now).await? {
            let detail = "the issuer knows the user with this e-mail address as somebody else; an admin gives one of the \
                          two another address at the issuer, or lets the user begin anew: `tidewatch user reset-oidc`";
            return Err(nobody(detail));
        }
        Ok(user)
    }

    /// Begins the sign-in of a user whom an issuer has named: a code for the page to fetch its tokens with. What ends the
    /// user's sign-ins ends this one too, fetched or not.
    pub(crate) async fn hand_over(
        &self,
        store: &Store,
        user: &User,
        state: &str,
        ticket: &str,
        now: Micros,
    ) -> Result<String, Problem> {
        let tokens = self.issue(store, &user.id, uuid::Uuid::new_v4().to_string(), now).await?;
        Ok(self.oidc.hand_over(state, ticket, tokens.refresh_token, now))
    }

    /// The tokens for a code, once, in the browser that has the ticket.
    pub(crate) async fn fetch(&self, store: &Store, code: &str, ticket: &str, now: Micros) -> Result<Tokens, Problem> {
        let refresh_token = self.oidc.fetch(code, ticket, now)?;
        match store.spend_refresh(&digest_text(&refresh_token), now).await? {
            Spent::Ok(token) => self.issue(store, &token.user, token.family, now).await,
            Spent::Reused { .. } | Spent::Expired | Spent::Unknown => Err(oidc::unknown_code()),
        }
    }

    /// Whether `password` is the caller's. Wrong ones count and wait as those of sign-ins do.
    pub(crate) async fn confirm_password(
        &self,
        store: &Store,
        caller: &Caller,
        password: String,
        at: Try<'_>,
    ) -> Result<User, Problem> {
        let user = store.user_by_id(&caller.id).await?.ok_or_else(unauthenticated)?;
        self.throttle.count(&user.email, at).await?;
        let known = user.password_hash.clone();
        let too_long = password.len() > PASSWORD_BYTES_MAX;
        let checked = self.hashing(move || !too_long && verify(&password, &known)).await;
        if !matches!(checked, Ok(false)) {
            self.throttle.take_back(&user.email, at).await;
        }
        match checked? {
            true => Ok(user),
            false => Err(not_your_password()),
        }
    }

    /// Whether `code` is one of the user's second factor, where there is one: their password alone changes nothing about
    /// it. Wrong ones count and wait as those of sign-ins do.
    pub(crate) async fn confirm_code(
        &self,
        store: &Store,
        user: &User,
        code: Option<&str>,
        at: Try<'_>,
    ) -> Result<(), Problem> {
        let Some(sealed) = store.totp(&user.id).await?.secret else { return Ok(()) };
        let missing = "this account has a second factor: send a code of your authenticator as `code`";
        let code = code.ok_or_else(|| Problem::forbidden(missing).code("otp_required"))?;
        match self.try_code(store, user, &sealed, code, at).await? {
            true => Ok(()),
            false => {
                let detail = "`code` is wrong or was used before; wait for the next one";
                Err(Problem::forbidden(detail).code(WRONG_CODE))
            }
        }
    }

    /// Gives a user another password in place of the one they were asked for, and ends every sign-in.
    pub(crate) async fn change_password(&self, store: &Store, user: &User, password: String) -> Result<(), Problem> {
        check_password(&password)?;
        let hash = self.hashing(move || hash_password(&password)).await?.map_err(Problem::internal)?;
        let is_changed = store.set_password(&user.id, Some(&user.password_hash), &hash).await?;
        self.forget();
        if is_changed { Ok(()) } else { Err(not_your_password()) }
    }

    /// Ends every sign-in of a user.
    pub(crate) async fn revoke_all(&self, store: &Store, user: &str) -> Result<(), Problem> {
        store.revoke_families_of(user).await?;
        self.forget();
        Ok(())
    }

    /// Makes a secret for a user's authenticator, to be confirmed by a code of it: as base32, and as a URL for a QR
    /// code.
    pub(crate) async fn enrol(&self, store: &Store, user: &User) -> Result<(String, String), Problem> {
        let secret: [u8; TOTP_SECRET_BYTES] = rand::random();
        let totp = totp_of(&secret);
        store.put_totp(&user.id, &self.sealer.seal(&totp_owner(&user.id), &secret)).await?;
        let base32 = totp.secret().to_base32();
        // "Key Uri Format" of Google Authenticator, which all authenticators read
        let label: String = format!("{ISSUER}:{}", user.email).bytes().map(percent).collect();
        let url = format!("otpauth://totp/{label}?secret={base32}&issuer={ISSUER}&algorithm=SHA1&digits=6&period=30");
        Ok((base32, url))
    }

    /// Puts the enrolled secret in force.
    pub(crate) async fn confirm_enrolment(
        &self,
        store: &Store,
        user: &str,
        otp: &str,
        now: Micros,
    ) -> Result<(), Problem> {
        let nothing = || Problem::conflict("not_enrolled", "there is nothing to confirm; POST /api/v1/me/totp first");
        let pending = store.totp(user).await?.pending.ok_or_else(nothing)?;
        let secret = self.sealer.open(&totp_owner(user), &pending).map_err(Problem::internal)?;
        let wrong = || Problem::invalid("bad_otp", "the code is wrong; check the clock of your device");
        let step = totp_of(&secret).check(otp, seconds(now)).ok_or_else(wrong)?;
        if !store.confirm_totp(user, &pending, step.cast_signed()).await? {
            return Err(nothing());
        }
        Ok(())
    }

    /// Whether `otp` is a good code, which it is once. Wrong ones count wherever they come from: whoever tries one knows
    /// the password.
    async fn try_code(
        &self,
        store: &Store,
        user: &User,
        sealed: &str,
        otp: &str,
        at: Try<'_>,
    ) -> Result<bool, Problem> {
        self.throttle.count_code(&user.id, at).await?;
        let spent = self.spend_code(store, user, sealed, otp, at.now).await;
        if !matches!(spent, Ok(false)) {
            self.throttle.take_back_code(&user.id, at).await;
        }
        spent
    }

    /// Whether `otp` is a good code, which it is once.
    async fn spend_code(
        &self,
        store: &Store,
        user: &User,
        sealed: &str,
        otp: &str,
        now: Micros,
    ) -> Result<bool, Problem> {
        let secret = self.sealer.open(&totp_owner(&user.id), sealed).map_err(Problem::internal)?;
        match totp_of(&secret).check(otp, seconds(now)) {
            Some(step) => Ok(store.spend_totp(&user.id, step.cast_signed()).await?),
            None => Ok(false),
        }
    }

    /// Encrypts anew what is stored under a key of before: how many secrets that were.
    pub async fn reseal(&self, store: &Store) -> Result<usize, AuthError> {
        let mut resealed = 0;
        for (user, old) in store.all_totp().await? {
            let owner = totp_owner(&user);
            let again = |sealed: &Option<String>| match sealed {
                Some(sealed) if !self.sealer.is_current(sealed) => {
                    Ok(Some(self.sealer.seal(&owner, &self.sealer.open(&owner, sealed)?)))
                }
                other => Ok::<_, SealError>(other.clone()),
            };
            let new = Totp { secret: again(&old.secret)?, pending: again(&old.pending)? };
            if new != old && store.reseal_totp(&user, &old, &new).await? {
                resealed += 1;
            }
        }
        for (workspace, id, old) in store.all_webhook_secrets().await? {
            if self.sealer.is_current(&old) {
                continue;
            }
            let owner = sealed_for(&workspace, &id);
            let new = self.sealer.seal(&owner, &self.sealer.open(&owner, &old)?);
            if store.reseal_webhook(&workspace, &id, &old, &new).await? {
                resealed += 1;
            }
        }
        Ok(resealed)
    }

    /// What encrypts secrets in the store.
    pub fn sealer(&self) -> Arc<Sealer> {
        self.sealer.clone()
    }

    /// A sign-in for `user` without a password, for administration beside the server.
    pub async fn tokens_of(&self, store: &Store, user: &User, now: Micros) -> Result<Tokens, AuthError> {
        let issued = self.issue(store, &user.id, uuid::Uuid::new_v4().to_string(), now).await;
        issued.map_err(|problem| AuthError::Refused(problem.detail))
    }

    /// Spends a refresh token for a new pair. Reuse of a spent one revokes the family.
    pub(crate) async fn refresh(&self, store: &Store, refresh_token: &str, now: Micros) -> Result<Refreshed, Problem> {
        match store.spend_refresh(&digest_text(refresh_token), now).await? {
            Spent::Ok(token) => self.issue(store, &token.user, token.family, now).await.map(Refreshed::Tokens),
            Spent::Reused { family, user } => {
                tracing::warn!(user, "a spent refresh token came again; its family is revoked");
                self.revoke(store, &family).await?;
                Ok(Refreshed::Ended { user })
            }
            Spent::Expired => Err(Problem::unauthorized("this refresh token has expired; sign in again")),
            Spent::Unknown => Err(Problem::unauthorized("this refresh token is not valid; sign in again")),
        }
    }

    /// Ends a sign-in: its refresh and access tokens are useless from now on.
    pub(crate) async fn revoke(&self, store: &Store, family: &str) -> Result<(), Problem> {
        store.revoke_family(family).await?;
        self.forget();
        Ok(())
    }

    /// The family a refresh token belongs to and its user, spending it.
    pub(crate) async fn family_of(
        &self,
        store: &Store,
        refresh_token: &str,
        now: Micros,
    ) -> Result<Option<(String, String)>, Problem> {
        Ok(match store.spend_refresh(&digest_text(refresh_token), now).await? {
            Spent::Ok(RefreshToken { family, user, .. }) | Spent::Reused { family, user } => Some((family, user)),
            Spent::Expired | Spent::Unknown => None,
        })
    }

    async fn issue(&self, store: &Store, user: &str, family: String, now: Micros) -> Result<Tokens, Problem> {
        let (tokens, kept) = self.tokens(user, family, now)?;
        store.insert_refresh(&kept).await?;
        Ok(tokens)
    }

    /// A pair of tokens, and what is to be kept of it.
    fn tokens(&self, user: &str, family: String, now: Micros) -> Result<(Tokens, RefreshToken), Problem> {
        let refresh_token = random_token("");
        let access_token = self.sign(user, &family, now)?;
        let token = RefreshToken {
            token_hash: digest_text(&refresh_token),
            family,
            user: user.to_owned(),
            issued_at: now,
            expires_at: now.plus(self.refresh),
        };
        let expires_in = self.access.0 / 1_000_000;
        Ok((Tokens { access_token, refresh_token, token_type: "Bearer", expires_in }, token))
    }

    fn sign(&self, user: &str, family: &str, now: Micros) -> Result<String, Problem> {
        let seconds = now.0.div_euclid(1_000_000);
        let claims = Claims {
            iss: ISSUER.into(),
            aud: AUDIENCE.into(),
            sub: user.into(),
            sid: family.into(),
            iat: seconds,
            exp: seconds + self.access.0 / 1_000_000,
            nbf: None,
        };
        let kid = Some(self.signing_id.clone());
        let header = Header { typ: Some(ACCESS_TYPE.into()), kid, ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(&header, &claims, &self.signing).map_err(Problem::internal)
    }

    /// The claims of a good access token; `None` for any other text.
    fn claims(&self, token: &str, now: Micros) -> Option<Claims> {
        let kid = jsonwebtoken::decode_header(token).ok()?.kid;
        // `kid` only chooses among our own keys; a token without one is from before keys had ids
        let mut keys = self.checking.iter();
        let (_, key) = keys.find(|(id, _)| kid.as_ref().is_none_or(|kid| kid == id))?;
        let data = jsonwebtoken::decode::<Claims>(token, key, &self.validation).ok()?;
        let at = |seconds: i64| Micros(seconds.saturating_mul(1_000_000));
        let in_time = at(data.claims.exp) > now && data.claims.nbf.is_none_or(|from| at(from) <= now);
        (data.header.typ.as_deref() == Some(ACCESS_TYPE) && in_time).then_some(data.claims)
    }

    /// Whoever an access token or API key belongs to.
    pub(crate) async fn authenticate(&self, store: &Store, token: &str, now: Micros) -> Result<Caller, Problem> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(unauthenticated());
        }
        let key: [u8; 32] = Sha256::digest(token).into();
        let found = match self.callers.get(&key, now) {
            Some(caller) => caller,
            None => {
                let since = self.callers.changes();
                let asked = match token.starts_with(KEY_PREFIX) {
                    true => self.by_key(store, token).await,
                    false => self.by_token(store, token, now).await,
                };
                match asked {
                    Ok(caller) => {
                        self.callers.put(key, caller.clone(), since, now);
                        caller
                    }
                    Err(problem) => self.callers.last(&key, now, problem)?,
                }
            }
        };
        match found.expires_at {
            Some(end) if end <= now => Err(unauthenticated()),
            _ => Ok(found),
        }
    }

    async fn by_token(&self, store: &Store, token: &str, now: Micros) -> Result<Caller, Problem> {
        let claims = self.claims(token, now).ok_or_else(unauthenticated)?;
        if store.family_revoked(&claims.sid).await? {
            return Err(unauthenticated());
        }
        let user = store.user_by_id(&claims.sub).await?.ok_or_else(unauthenticated)?;
        Ok(Caller {
            id: user.id,
            name: user.email,
            admin: user.admin,
            expires_at: Some(Micros(claims.exp.saturating_mul(1_000_000))),
            by: By::Session { family: claims.sid },
        })
    }

    async fn by_key(&self, store: &Store, key: &str) -> Result<Caller, Problem> {
        let found = store.api_key_by_hash(&digest_text(key)).await?.filter(|key| key.revoked_at.is_none());
        let key = found.ok_or_else(unauthenticated)?;
        Ok(Caller {
            id: format!("key:{}", key.id),
            name: format!("key:{}", key.name),
            admin: false,
            expires_at: key.expires_at,
            by: By::Key {
                access: Access::of_key(key.role.parse()?, key.scopes.as_deref().map(parse_scopes).transpose()?),
                workspace: key.workspace,
            },
        })
    }

    /// What the caller may do in a workspace; the problem is the same for a foreign workspace and a missing one.
    pub(crate) async fn access(
        &self,
        store: &Store,
        caller: &Caller,
        workspace: &WorkspaceId,
        own_most: usize,
        now: Micros,
    ) -> Result<Access, Problem> {
        let access = match &caller.by {
            By::Key { workspace: own, access } => (own == workspace).then(|| access.clone()),
            By::Session { .. } => {
                let key = (workspace.clone(), caller.id.clone());
                match self.accesses.get(&key, now) {
                    Some(access) => access,
                    None => {
                        let since = self.accesses.changes();
                        match self.stored_access(store, caller, workspace, own_most, now).await {
                            Ok(access) => {
                                self.accesses.put(key, access.clone(), since, now);
                                access
                            }
                            Err(problem) => self.accesses.last(&key, now, problem)?,
                        }
                    }
                }
            }
        };
        access.ok_or_else(|| Problem::workspace_not_found(workspace.as_str()))
    }

    /// The name of a workspace's tier.
    pub(crate) async fn tier(&self, store: &Store, id: &WorkspaceId, now: Micros) -> Result<String, Problem> {
        if let Some(tier) = self.tiers.get(id, now) {
            return Ok(tier);
        }
        let since = self.tiers.changes();
        match store.workspace(id).await {
            Ok(found) => {
                let tier = found.ok_or_else(|| Problem::workspace_not_found(id.as_str()))?.tier;
                self.tiers.put(id.clone(), tier.clone(), since, now);
                Ok(tier)
            }
            Err(error) => self.tiers.last(id, now, error.into()),
        }
    }

    async fn stored_access(
        &self,
        store: &Store,
        caller: &Caller,
        workspace: &WorkspaceId,
        own_most: usize,
        now: Micros,
    ) -> Result<Option<Access>, Problem> {
        let mut role = store.role(workspace, &caller.id).await?;
        if role.is_none()
            && let Some(invitation) = store.invitation(workspace, &caller.name).await?
        {
            let _turn = self.turn().await;
            if invitation.role == Role::Owner.as_str() && !caller.admin {
                self.may_own_another(store, &caller.id, own_most).await?;
            }
            self.accept(store, caller, workspace, now).await?;
            role = store.role(workspace, &caller.id).await?;
        }
        if let Some(role) = role {
            let grants = parse_scopes(&store.granted(workspace, &caller.id).await?)?;
            return Ok(Some(Access::of_user(role.parse()?, grants)));
        }
        let exists = caller.admin && store.workspace(workspace).await?.is_some();
        Ok(exists.then(|| Access::of_user(Role::Admin, Vec::new())))
    }

    /// Until it is dropped nobody else changes who may do what: what was looked at before a change holds.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Refuses a user who owns as many workspaces as one may: what a tier allows, it allows each of them.
    pub(crate) async fn may_own_another(&self, store: &Store, user: &str, most: usize) -> Result<(), Problem> {
        let all = store.workspaces_of(user).await?;
        let owned = all.iter().filter(|(_, role)| role == Role::Owner.as_str()).count();
        if owned < most {
            return Ok(());
        }
        let detail = format!(
            "{owned} workspaces of one owner are as many as limits.workspaces_per_user = {most} allows; delete one, take \
             another role, or ask an admin of this installation"
        );
        Err(Problem::conflict("limit_reached", detail))
    }

    /// Whoever comes to a workspace that they are invited to accepts.
    async fn accept(
        &self,
        store: &Store,
        caller: &Caller,
        workspace: &WorkspaceId,
        now: Micros,
    ) -> Result<(), Problem> {
        if store.accept_invitation(workspace, &caller.name, &caller.id, now).await? {
            let entry = AuditEntry {
                at: now,
                workspace: Some(workspace.clone()),
                actor: caller.name.clone(),
                action: "accept invitation".into(),
                target: format!("workspaces/{workspace}"),
                outcome: "ok".into(),
                from: String::new(),
                request_id: String::new(),
            };
            store.audit(&entry).await?;
        }
        Ok(())
    }

    /// Who may do what has changed: nothing that was looked up before counts any more.
    pub(crate) fn forget(&self) {
        self.callers.forget();
        self.accesses.forget();
        self.tiers.forget();
    }

    /// Runs work that takes much memory and time, little of it at once.
    async fn hashing<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
        let busy = |_| {
            let detail = "too many sign-ins at once; try again in a moment";
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", detail).retry_after(Duration::from_secs(1))
        };
        let permit = self.hashing.clone().acquire_owned();
        let permit = tokio::time::timeout(HASH_WAIT, permit).await.map_err(busy)?.map_err(Problem::internal)?;
        let work = move || {
            let done = work();
            drop(permit);
            done
        };
        tokio::task::spawn_blocking(work).await.map_err(Problem::internal)
    }
}

/// Bytes of a second factor's secret, as RFC 4226 recommends.
const TOTP_SECRET_BYTES: usize = 20;

/// RFC 6238 with what every authenticator takes for granted: SHA-1, 6 digits, 30 s, one step of drift either way.
fn totp_of(secret: &[u8]) -> totp_rs::Totp {
    totp_rs::Builder::new().with_secret(secret).build_noncompliant()
}

fn totp_owner(user: &str) -> String {
    format!("totp/{user}")
}

fn seconds(now: Micros) -> u64 {
    now.0.div_euclid(1_000_000).max(0).cast_unsigned()
}

/// A byte in a URL.
fn percent(byte: u8) -> String {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    }
}

/// Codes of what somebody who guesses is told.
const WRONG_PASSWORD: &str = "bad_credentials";
const WRONG_CODE: &str = "bad_otp";

fn is_wrong_guess(problem: &Problem) -> bool {
    [WRONG_PASSWORD, WRONG_CODE].contains(&problem.code)
}

/// A password as it is stored: a PHC string, different each time.
///
/// Argon2id with the parameters OWASP asks for as a minimum (19 MiB, 2 passes, 1 lane), which are the crate's defaults.
pub fn hash_password(password: &str) -> Result<String, argon2::password_hash::Error> {
    let salt = SaltString::encode_b64(&rand::random::<[u8; 16]>())?;
    Ok(Argon2::default().hash_password(password.as_bytes(), &salt)?.to_string())
}

fn verify(password: &str, known: &str) -> bool {
    PasswordHash::new(known).is_ok_and(|known| Argon2::default().verify_password(password.as_bytes(), &known).is_ok())
}

pub(crate) fn check_email(email: &str) -> Result<(), Problem> {
    let good = email.len() <= 254
        && !email.contains(|c: char| c.is_whitespace() || c.is_control())
        && email
            .split_once('@')
            .is_some_and(|(name, host)| !name.is_empty() && !host.is_empty() && !host.contains('@'));
    let shown: String = email.chars().take(80).collect();
    if good { Ok(()) } else { Err(Problem::invalid("bad_email", format!("`{shown}` is no e-mail address"))) }
}

fn check_password(password: &str) -> Result<(), Problem> {
    if password.chars().count() >= PASSWORD_CHARS_MIN && password.len() <= PASSWORD_BYTES_MAX {
        return Ok(());
    }
    let detail =
        format!("a password has at least {PASSWORD_CHARS_MIN} characters and at most {PASSWORD_BYTES_MAX} bytes");
    Err(Problem::invalid("bad_password", detail))
}

fn wrong_password() -> Problem {
    Problem::unauthorized("e-mail address or password is wrong").code(WRONG_PASSWORD)
}

fn not_your_password() -> Problem {
    Problem::forbidden("`password` is not your password").code(WRONG_PASSWORD)
}

fn unauthenticated() -> Problem {
    Problem::unauthorized("send `authorization: Bearer TOKEN` with a valid access token or API key")
}

/// What every API key starts with, so that leaked ones can be found by search.
const KEY_PREFIX: &str = "tw_";

/// 256 random bits as text.
fn random_token(prefix: &str) -> String {
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// What is stored in place of a token. A fast hash is enough: nobody guesses 256 random bits.
fn digest_text(token: &str) -> String {
    Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new API key: the key itself, shown once, and what is stored of it.
pub(crate) fn new_key(
    workspace: &WorkspaceId,
    name: String,
    role: Role,
    scopes: Option<Vec<String>>,
    expires_at: Option<Micros>,
    by: &str,
    now: Micros,
) -> (String, ApiKey) {
    let key = random_token(KEY_PREFIX);
    let stored = ApiKey {
        id: uuid::Uuid::now_v7().to_string(),
        workspace: workspace.clone(),
        name,
        role: role.as_str().to_owned(),
        scopes,
        key_hash: digest_text(&key),
        prefix: key.chars().take(KEY_PREFIX.len() + 6).collect(),
        created_by: by.to_owned(),
        created_at: now,
        expires_at,
        revoked_at: None,
    };
    (key, stored)
}

/// A new API key for administration beside the server, as [`new_key`]; says what is wrong with role or scopes.
pub fn key_of(
    workspace: &WorkspaceId,
    name: &str,
    role: &str,
    scopes: Option<&[String]>,
    now: Micros,
) -> Result<(String, ApiKey), AuthError> {
    let refused = |error: &dyn std::error::Error| AuthError::Refused(error.to_string());
    let role: Role = role.parse().map_err(|error| refused(&error))?;
    let scopes = scopes.map(parse_scopes).transpose().map_err(|error| refused(&error))?;
    if let Some(scope) = Scope::beyond(role, scopes.as_deref().unwrap_or_default()) {
        return Err(AuthError::Refused(format!("the role `{role}` does not have `{scope}`")));
    }
    let scopes = scopes.map(|scopes| scopes.iter().map(ToString::to_string).collect());
    Ok(new_key(workspace, name.to_owned(), role, scopes, None, "cli", now))
}

/// Answers of the store that are good for [`REMEMBER`], at most [`REMEMBER_MAX`] of them.
struct Remembered<K, V> {
    entries: RwLock<HashMap<K, (V, Micros)>>,
    changes: AtomicU64,
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self { entries: RwLock::default(), changes: AtomicU64::new(0) }
    }
}

impl<K: Hash + Eq, V: Clone> Remembered<K, V> {
    fn get(&self, key: &K, now: Micros) -> Option<V> {
        let entries = self.entries.read();
        entries.get(key).filter(|(_, until)| *until > now).map(|(value, _)| value.clone())
    }

    /// The last answer where `problem` is that the store cannot be asked, and else that problem.
    fn last(&self, key: &K, now: Micros, problem: Problem) -> Result<V, Problem> {
        if problem.status != StatusCode::SERVICE_UNAVAILABLE {
            return Err(problem);
        }
        let entries = self.entries.read();
        let known = entries.get(key).filter(|(_, until)| until.plus(REMEMBER_IN_OUTAGE) > now);
        known.map(|(value, _)| value.clone()).ok_or(problem)
    }

    /// To be read before the store is asked, and handed to [`Remembered::put`].
    fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Keeps an answer, unless it may be older than a change.
    fn put(&self, key: K, value: V, since: u64, now: Micros) {
        let mut entries = self.entries.write();
        if self.changes.load(Ordering::Acquire) != since {
            return;
        }
        if entries.len() >= REMEMBER_MAX {
            entries.retain(|_, (_, until)| *until > now);
        }
        if entries.len() < REMEMBER_MAX {
            entries.insert(key, (value, now.plus(REMEMBER)));
        }
    }

    fn forget(&self) {
        let mut entries = self.entries.write();
        self.changes.fetch_add(1, Ordering::AcqRel);
        entries.clear();
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef";

    pub(crate) fn auth() -> Auth {
        Auth::new(&AuthConfig { secret: Some(SECRET.into()), ..AuthConfig::default() }).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use serde_json::{Value, json};

    const NOW: Micros = Micros(1_700_000_000_000_000);

    fn good() -> Value {
        let now = NOW.0 / 1_000_000;
        json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "sid": "f", "iat": now, "exp": now + 1800})
    }

    fn forge(claims: &Value, header: Header, secret: &str) -> String {
        jsonwebtoken::encode(&header, claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
    }

    fn access_header() -> Header {
        Header { typ: Some(ACCESS_TYPE.into()), ..Header::new(Algorithm::HS256) }
    }

    #[test]
    fn a_token_of_ours_is_good_until_it_expires() {
        let auth = auth();
        let token = auth.sign("ann", "family", NOW).unwrap();
        assert_eq!(auth.claims(&token, NOW).unwrap().sub, "ann");
        let end = NOW.plus(Span::seconds(30 * 60));
        assert!(auth.claims(&token, end.minus(Span::seconds(1))).is_some());
        assert!(auth.claims(&token, end).is_none());
    }

    #[test]
    fn a_token_that_lacks_a_claim_or_has_a_wrong_one_is_refused() {
        let auth = auth();
        assert!(auth.claims(&forge(&good(), access_header(), SECRET), NOW).is_some());
        for claim in ["iss", "aud", "sub", "exp", "sid"] {
            let mut claims = good();
            claims.as_object_mut().unwrap().remove(claim);
            assert!(auth.claims(&forge(&claims, access_header(), SECRET), NOW).is_none(), "without {claim}");
        }
        let second = NOW.0 / 1_000_000 + 1;
        for (claim, wrong) in [
            ("iss", json!("somebody")),
            ("iss", json!([ISSUER])),
            ("aud", json!("another-api")),
            ("exp", json!("never")),
            ("nbf", json!(second)),
        ] {
            let mut claims = good();
            claims[claim] = wrong.clone();
            assert!(auth.claims(&forge(&claims, access_header(), SECRET), NOW).is_none(), "{claim} {wrong}");
        }
    }

    #[test]
    fn a_token_of_another_type_algorithm_or_secret_is_refused() {
        let auth = auth();
        for typ in [None, Some("JWT"), Some("rt+jwt")] {
            let header = Header { typ: typ.map(Into::into), ..access_header() };
            assert!(auth.claims(&forge(&good(), header, SECRET), NOW).is_none(), "{typ:?}");
        }
        let hs512 = Header { typ: Some(ACCESS_TYPE.into()), ..Header::new(Algorithm::HS512) };
        assert!(auth.claims(&forge(&good(), hs512, SECRET), NOW).is_none());
        assert!(auth.claims(&forge(&good(), access_header(), &"x".repeat(32)), NOW).is_none());
    }

    #[test]
    fn a_token_without_a_signature_is_refused() {
        let auth = auth();
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        for alg in ["none", "None", "NONE", "HS256"] {
            let header = part(&json!({"alg": alg, "typ": ACCESS_TYPE}));
            let token = format!("{header}.{}.", part(&good()));
            assert!(auth.claims(&token, NOW).is_none(), "{alg}");
        }
        for junk in ["", ".", "..", "a.b.c", "tw_"] {
            assert!(auth.claims(junk, NOW).is_none(), "{junk}");
        }
    }

    #[test]
    fn a_short_or_missing_secret_is_refused_and_says_how_to_make_one() {
        for secret in [None, Some("x".repeat(31))] {
            let config = AuthConfig { secret, ..AuthConfig::default() };
            let error = Auth::new(&config).err().unwrap().to_string();
            assert!(error.contains("openssl rand -base64 48"), "{error}");
        }
    }

    #[test]
    fn a_password_is_verified_by_its_hash_and_two_hashes_differ() {
        let (one, two) = (hash_password("correct horse").unwrap(), hash_password("correct horse").unwrap());
        assert!(one.starts_with("$argon2id$v=19$m=19456,t=2,p=1$") && one != two);
        assert!(verify("correct horse", &one) && !verify("wrong horse", &one) && !verify("", "no hash"));
    }

    #[test]
    fn an_answer_older_than_a_change_is_not_remembered() {
        let remembered = Remembered::<u8, u8>::default();
        let before = remembered.changes();
        remembered.forget();
        remembered.put(1, 1, before, NOW);
        assert_eq!(remembered.get(&1, NOW), None);
        remembered.put(1, 2, remembered.changes(), NOW);
        assert_eq!(remembered.get(&1, NOW), Some(2));
        assert_eq!(remembered.get(&1, NOW.plus(REMEMBER)), None);
    }

    #[test]
    fn addresses_and_passwords_are_checked() {
        for bad in ["", "ann", "@x", "ann@", "a b@x", "a@b@c"] {
            assert!(check_email(bad).is_err(), "{bad}");
        }
        assert!(check_email("ann@example.com").is_ok());
        for bad in ["short", &"x".repeat(1025)] {
            assert!(check_password(bad).is_err());
        }
        assert!(check_password(&"x".repeat(64)).is_ok());
    }
}
