//! The settings of this crate.

use serde::{Deserialize, Serialize};
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
    /// Serves `/metrics` there instead of on `listen`.
    pub metrics_listen: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            auth: AuthConfig::default(),
            limits: Limits::default(),
            history: History::default(),
            cors_origins: Vec::new(),
            metrics_listen: None,
        }
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
    /// The first admin of a new data directory.
    pub bootstrap_email: Option<String>,
    pub bootstrap_password: Option<String>,
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
            bootstrap_email: None,
            bootstrap_password: None,
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
            .field("bootstrap_email", &self.bootstrap_email)
            .field("bootstrap_password", &self.bootstrap_password.as_ref().map(|_| "…"))
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
    /// WebSocket and SSE connections at the same time from one address, of one user and in one workspace.
    pub connections_per_address: usize,
    pub connections_per_user: usize,
    pub connections_per_workspace: usize,
    /// Live queries at the same time in one workspace; they are asked one after the other.
    pub live_queries: usize,
    /// Bytes that a client may be behind in a channel whose messages are not folded; and bytes of answers that may
    /// wait for one.
    pub queue_bytes: usize,
    /// Bytes of messages to one WebSocket client that the kernel may hold: `SO_SNDBUF`, which Linux doubles.
    pub send_buffer_bytes: usize,
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
            connections_per_address: 10_000,
            connections_per_user: 1_000,
            connections_per_workspace: 10_000,
            live_queries: 64,
            queue_bytes: 1 << 20,
            send_buffer_bytes: 64 << 10,
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
