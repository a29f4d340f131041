//! The settings of this crate.

use crate::oidc::OidcConfig;
use crate::quota::{Tier, default_tiers};
use crate::tls::TlsConfig;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where and how to serve.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// HTTP and WebSocket.
    pub listen: SocketAddr,
    pub auth: AuthConfig,
    pub limits: Limits,
    pub history: History,
    /// Origins of pages on other hosts that may call, `https://app.example.com`. Pages of this server always may.
    pub cors_origins: Vec<String>,
    /// What the workspaces of each tier may ask for.
    pub tiers: BTreeMap<String, Tier>,
    /// The tier of a workspace that names none, or one that is not configured.
    pub default_tier: String,
    /// HTTPS and secure WebSocket, beside `listen`.
    pub listen_tls: Option<SocketAddr>,
    pub tls: TlsConfig,
    /// Serves `/metrics` there instead of on `listen`.
    pub metrics_listen: Option<SocketAddr>,
    /// Networks of proxies and edge nodes, which say in `x-forwarded-for` whose requests they pass on.
    pub trusted_proxies: Vec<IpNet>,
    pub edge: EdgeConfig,
}

/// The section `edge`, of a node that serves clients for another one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeConfig {
    /// Where the node with the engine is: `http://10.0.0.5:8080`.
    pub core: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            auth: AuthConfig::default(),
            limits: Limits::default(),
            history: History::default(),
            cors_origins: Vec::new(),
            tiers: default_tiers().into_iter().map(|(name, tier)| (name.to_owned(), tier)).collect(),
            default_tier: DEFAULT_TIER.to_owned(),
            listen_tls: None,
            tls: TlsConfig::default(),
            metrics_listen: None,
            trusted_proxies: Vec::new(),
            edge: EdgeConfig::default(),
        }
    }
}

/// Without limits of its own, so that a new installation works before anybody thinks of tiers.
pub const DEFAULT_TIER: &str = "enterprise";

impl Config {
    /// The tier of this name, else the default one, else one without limits of its own.
    pub(crate) fn tier(&self, name: &str) -> Tier {
        self.tiers.get(name).or_else(|| self.tiers.get(&self.default_tier)).copied().unwrap_or_default()
    }
}

/// The section `auth`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// Signs access tokens; at least 32 bytes.
    pub secret: Option<String>,
    /// A file that holds the secret, in place of `secret`.
    pub secret_file: Option<PathBuf>,
    /// Secrets of before: what they signed is good until it expires. To change the secret, put the old one here.
    pub previous_secrets: Vec<String>,
    /// Encrypts secrets in the store, such as those of second factors; at least 32 bytes. Derived from `secret` unless
    /// said.
    pub encryption_key: Option<String>,
    /// A file that holds the key, in place of `encryption_key`.
    pub encryption_key_file: Option<PathBuf>,
    /// Keys of before: what they encrypted is encrypted anew when the server starts.
    pub previous_encryption_keys: Vec<String>,
    /// The first admin of a new data directory.
    pub bootstrap_email: Option<String>,
    pub bootstrap_password: Option<String>,
    /// A file that holds the password, in place of `bootstrap_password`.
    pub bootstrap_password_file: Option<PathBuf>,
    /// Issuers of OpenID Connect whose users may sign in, by a name for the address.
    pub oidc: BTreeMap<String, OidcConfig>,
    /// Life of an access token.
    pub access_minutes: u32,
    /// Life of a refresh token.
    pub refresh_days: u32,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            secret: None,
            secret_file: None,
            previous_secrets: Vec::new(),
            encryption_key: None,
            encryption_key_file: None,
            previous_encryption_keys: Vec::new(),
            bootstrap_email: None,
            bootstrap_password: None,
            bootstrap_password_file: None,
            oidc: BTreeMap::new(),
            access_minutes: 30,
            refresh_days: 7,
        }
    }
}

// Secrets stay out of logs: only whether they are set is shown.
impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("secret", &self.secret.as_ref().map(|_| "…"))
            .field("secret_file", &self.secret_file)
            .field("previous_secrets", &self.previous_secrets.len())
            .field("encryption_key", &self.encryption_key.as_ref().map(|_| "…"))
            .field("encryption_key_file", &self.encryption_key_file)
            .field("previous_encryption_keys", &self.previous_encryption_keys.len())
            .field("bootstrap_email", &self.bootstrap_email)
            .field("bootstrap_password", &self.bootstrap_password.as_ref().map(|_| "…"))
            .field("bootstrap_password_file", &self.bootstrap_password_file)
            .field("oidc", &self.oidc)
            .field("access_minutes", &self.access_minutes)
            .field("refresh_days", &self.refresh_days)
            .finish()
    }
}

/// The bounds of this crate: `limits.*` of the configuration.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a request body as it is sent.
    pub body_bytes: usize,
    /// Bytes of a request body once decompressed.
    pub decompressed_bytes: usize,
    /// Bytes of one event.
    pub event_bytes: usize,
    /// Bytes of one WebSocket frame from a client.
    pub frame_bytes: usize,
    /// Subscriptions of one WebSocket connection.
    pub subscriptions: usize,
    /// Connections at the same time, of any kind.
    pub connections: usize,
    /// Connections at the same time from one address that are no WebSocket; those of `trusted_proxies` do not count.
    pub http_connections_per_address: usize,
    /// WebSocket and SSE connections at the same time from one address, of one user and in one workspace.
    pub connections_per_address: usize,
    pub connections_per_user: usize,
    pub connections_per_workspace: usize,
    /// Live queries at the same time in one workspace; they are asked one after the other.
    pub live_queries: usize,
    /// Bytes that a client may be behind in a channel whose messages are not folded; and bytes of answers that may
    /// wait for one.
    pub queue_bytes: usize,
    /// Bytes of channels' messages that may wait to be published for other nodes.
    pub feed_bytes: usize,
    /// Bytes of messages to one WebSocket client that the kernel may hold: `SO_SNDBUF`, which Linux doubles.
    pub send_buffer_bytes: usize,
    /// Workspaces that one user owns; an admin of the installation may have any number.
    pub workspaces_per_user: usize,
    /// HTTP requests a minute of one user or API key, whatever the workspace; a minute's worth may come at once.
    pub user_requests_per_minute: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 16 << 20,
            decompressed_bytes: 64 << 20,
            event_bytes: 1 << 20,
            frame_bytes: 1 << 20,
            subscriptions: 256,
            connections: 50_000,
            http_connections_per_address: 12_000,
            connections_per_address: 10_000,
            connections_per_user: 1_000,
            connections_per_workspace: 10_000,
            live_queries: 64,
            queue_bytes: 1 << 20,
            feed_bytes: 64 << 20,
            send_buffer_bytes: 64 << 10,
            workspaces_per_user: 100,
            user_requests_per_minute: 600_000,
        }
    }
}

/// What channels keep for clients that come back: `history.*` of the configuration, by class of channel.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct History {
    /// `streams/…`. What is older comes from the log.
    pub streams: Kept,
    /// `alerts`; also kept while nobody listens.
    pub alerts: Kept,
    /// `thread/…`; also kept while nobody listens.
    pub threads: Kept,
    /// `metrics/…`, `portfolio/…`, `query/…` and `system/…`: what is older is made good by a snapshot.
    pub states: Kept,
}

/// Bounds of one channel's history. Whatever is reached first counts.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kept {
    pub events: usize,
    pub bytes: usize,
    pub seconds: u64,
}

impl Default for Kept {
    fn default() -> Self {
        Self { events: 4_096, bytes: 1 << 20, seconds: 3_600 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let auth = AuthConfig {
            secret: Some("hush-hush".into()),
            bootstrap_password: Some("open sesame".into()),
            previous_secrets: vec!["hush before".into()],
            encryption_key: Some("hush as well".into()),
            previous_encryption_keys: vec!["hush of old".into()],
            ..AuthConfig::default()
        };
        let shown = format!("{:?}", Config { auth, ..Config::default() });
        assert!(!shown.contains("hush") && !shown.contains("sesame"), "{shown}");
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = serde_json::from_str::<Config>(r#"{"limits":{"body_byte":1}}"#).unwrap_err();
        assert!(error.to_string().contains("body_byte"), "{error}");
    }
}
