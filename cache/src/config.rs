//! The settings of this crate.

use redis::{Client, TlsCertificates};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// The section `cache`: how much is kept in memory, and how long an entry of each class may live when nothing changes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes of memory of all entries. With 0 nothing is kept, and only requests at the same time share an answer.
    pub bytes: u64,
    /// Final rows of metrics, as the store has them.
    pub history_ms: u64,
    /// Answers to questions in SQL.
    pub queries_ms: u64,
    /// Portfolios and their positions.
    pub portfolios_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { bytes: 64 << 20, history_ms: 7_200_000, queries_ms: 7_200_000, portfolios_ms: 1_800_000 }
    }
}

/// The section `redis`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// `redis://USER:PASSWORD@HOST:PORT/DATABASE`, or `rediss://` over TLS; without it there is no Redis.
    pub url: Option<String>,
    /// A file that holds the URL, for one with a password.
    pub url_file: Option<PathBuf>,
    /// Certificates, as PEM, of who may vouch for a Redis over TLS; without it those that the system trusts.
    pub ca_file: Option<PathBuf>,
    /// How long an answer of Redis is waited for. Over it Redis counts as gone and is not asked until it is back.
    pub timeout_ms: u64,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self { url: None, url_file: None, ca_file: None, timeout_ms: 50 }
    }
}

// A password in the URL stays out of logs.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("url", &self.url.as_ref().map(|_| "…"))
            .field("url_file", &self.url_file)
            .field("ca_file", &self.ca_file)
            .field("timeout_ms", &self.timeout_ms)
            .finish()
    }
}

/// Why the cache cannot be set up. A Redis that does not answer is no reason.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("redis.url cannot be used: {0}; write redis://USER:PASSWORD@HOST:PORT/DATABASE, or rediss:// for TLS")]
    Url(String),
    #[error("cannot read {key} `{path}`: {source}")]
    File { key: &'static str, path: PathBuf, source: std::io::Error },
}

impl RedisConfig {
    /// Refuses what [`Cache::start`](crate::Cache::start) would refuse.
    pub fn check(&self) -> Result<(), CacheError> {
        self.client().map(drop)
    }

    /// What connects to Redis, if there is one. Nothing is connected yet.
    pub(crate) fn client(&self) -> Result<Option<Client>, CacheError> {
        let Some(url) = self.address()? else { return Ok(None) };
        let client = match &self.ca_file {
            Some(path) => {
                let root_cert = Some(read("redis.ca_file", path)?);
                Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert })
            }
            None => Client::open(url),
        };
        client.map(Some).map_err(|error| CacheError::Url(error.to_string()))
    }

    fn address(&self) -> Result<Option<String>, CacheError> {
        match (&self.url, &self.url_file) {
            (Some(url), _) => Ok(Some(url.clone())),
            (None, Some(path)) => {
                let text = String::from_utf8_lossy(&read("redis.url_file", path)?).into_owned();
                Ok(Some(text.trim().to_owned()))
            }
            (None, None) => Ok(None),
        }
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, CacheError> {
    std::fs::read(path).map_err(|source| CacheError::File { key, path: path.to_owned(), source })
}
