//! Settings: `tidewatch.toml`, overridden by `TIDEWATCH__SECTION__KEY`, overridden by flags.

use actors::agent::AgentConfig;
use engine::event::{ItemName, Span};
use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Which configuration a command takes.
#[derive(Debug, clap::Args)]
pub struct ConfigFile {
    /// Configuration; `tidewatch.toml` here, where there is one, unless said.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigFile {
    pub fn load(&self) -> Result<Config, ConfigError> {
        Config::load(self.config.as_deref())
    }
}

/// The whole configuration. Unknown keys are errors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where HTTP and WebSocket are served.
    pub listen: SocketAddr,
    /// Where HTTPS is served too, with the certificate of `tls`.
    pub listen_tls: Option<SocketAddr>,
    pub tls: gateway::TlsConfig,
    /// Where `/metrics` is served, when it shall not be on `listen`.
    pub metrics_listen: Option<SocketAddr>,
    /// Origins of browsers that may call from elsewhere.
    pub cors_origins: Vec<String>,
    /// Networks of proxies and edge nodes that are believed whose requests they pass on, such as `10.0.0.0/8`.
    pub trusted_proxies: Vec<IpNet>,
    /// Of a node that serves clients for another one: `tidewatch edge`.
    pub edge: gateway::EdgeConfig,
    /// Holds the log and the embedded store.
    pub data_dir: PathBuf,
    /// Holds packs of one's own, a folder each.
    pub packs_dir: Option<PathBuf>,
    pub log: LogConfig,
    /// How repeats of events are found.
    pub dedup: streams::dedup::Config,
    pub store: StoreConfig,
    /// What is remembered of what was read.
    pub cache: cache::Config,
    pub redis: cache::RedisConfig,
    pub auth: gateway::AuthConfig,
    pub limits: Limits,
    /// What channels keep for clients that come back, by class.
    pub history: gateway::History,
    /// Agents answered by an OpenAI-compatible model, by name.
    pub agents: BTreeMap<ItemName, AgentConfig>,
    /// How webhooks are told, and how many there may be.
    pub webhooks: actors::WebhookConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 8080).into(),
            listen_tls: None,
            tls: gateway::TlsConfig::default(),
            metrics_listen: None,
            cors_origins: Vec::new(),
            trusted_proxies: Vec::new(),
            edge: gateway::EdgeConfig::default(),
            data_dir: PathBuf::from("data"),
            packs_dir: None,
            log: LogConfig::default(),
            dedup: streams::dedup::Config::default(),
            store: StoreConfig::default(),
            cache: cache::Config::default(),
            redis: cache::RedisConfig::default(),
            auth: gateway::AuthConfig::default(),
            limits: Limits::default(),
            history: gateway::History::default(),
            agents: BTreeMap::new(),
            webhooks: actors::WebhookConfig::default(),
        }
    }
}

/// Where events are made durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Files under `data_dir`.
    #[default]
    Embedded,
    Kafka,
    Fluvio,
}

/// The section `log`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    pub backend: Backend,
    /// Of a distributed backend.
    pub brokers: Vec<String>,
    pub segment_bytes: u64,
    pub queue_bytes: usize,
    pub max_bytes: Option<u64>,
    pub retain_bytes: Option<u64>,
    pub retain_hours: Option<u64>,
    pub check_hours: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        let log = streams::log::Config::default();
        Self {
            backend: Backend::default(),
            brokers: Vec::new(),
            segment_bytes: log.segment_bytes,
            queue_bytes: log.queue_bytes,
            max_bytes: log.max_bytes,
            retain_bytes: log.retain_bytes,
            retain_hours: log.retain_hours,
            check_hours: log.check_hours,
        }
    }
}

impl LogConfig {
    /// The settings of the embedded log.
    pub fn embedded(&self) -> streams::log::Config {
        streams::log::Config {
            segment_bytes: self.segment_bytes,
            queue_bytes: self.queue_bytes,
            max_bytes: self.max_bytes,
            retain_bytes: self.retain_bytes,
            retain_hours: self.retain_hours,
            check_hours: self.check_hours,
        }
    }
}

/// The section `store`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `sqlite:PATH` or `postgres://USER:PASSWORD@HOST/DATABASE`; a file of SQLite under `data_dir` unless said.
    pub url: Option<String>,
    /// A file that holds the URL, for one with a password.
    pub url_file: Option<PathBuf>,
    pub max_connections: u32,
    pub acquire_ms: u64,
    pub statement_ms: u64,
    pub lock_ms: u64,
    pub start_ms: u64,
    pub chunk_hours: u32,
    pub compress_after_days: u32,
    pub retain_days: Option<u32>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        let store = sql::store::Options::default();
        Self {
            url: None,
            url_file: None,
            max_connections: store.max_connections,
            acquire_ms: store.acquire_ms,
            statement_ms: store.statement_ms,
            lock_ms: store.lock_ms,
            start_ms: store.start_ms,
            chunk_hours: store.chunk_hours,
            compress_after_days: store.compress_after_days,
            retain_days: store.retain_days,
        }
    }
}

impl StoreConfig {
    /// How to connect and what to keep.
    pub fn options(&self) -> sql::store::Options {
        sql::store::Options {
            max_connections: self.max_connections,
            acquire_ms: self.acquire_ms,
            statement_ms: self.statement_ms,
            lock_ms: self.lock_ms,
            start_ms: self.start_ms,
            chunk_hours: self.chunk_hours,
            compress_after_days: self.compress_after_days,
            retain_days: self.retain_days,
            ..sql::store::Options::default()
        }
    }
}

/// The section `limits`: every bound under its name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    pub mailbox_bytes: usize,
    pub unsaved_bytes: usize,
    pub rest_ms: u64,
    pub idle_timeout_ms: u64,
    pub query_rows: usize,
    pub query_memory: usize,
    pub query_ms: u64,
    pub metrics: usize,
    pub streams: usize,
    pub alert_rules: usize,
    pub tables: usize,
    pub table_bytes: usize,
    pub metric_state_bytes: usize,
    pub metric_state_groups: usize,
    pub workspace_state_bytes: usize,
    pub workspace_state_groups: usize,
    pub body_bytes: usize,
    pub decompressed_bytes: usize,
    pub event_bytes: usize,
    pub frame_bytes: usize,
    pub subscriptions: usize,
    pub connections: usize,
    pub http_connections_per_address: usize,
    pub connections_per_address: usize,
    pub connections_per_user: usize,
    pub connections_per_workspace: usize,
    pub live_queries: usize,
    pub queue_bytes: usize,
    pub feed_bytes: usize,
    pub send_buffer_bytes: usize,
    pub workspaces_per_user: usize,
    pub user_requests_per_minute: u32,
    pub queries: usize,
    /// What the workspaces of each tier may ask for.
    pub tiers: BTreeMap<String, gateway::Tier>,
    /// The tier of a workspace that names none.
    pub default_tier: String,
}

impl Default for Limits {
    fn default() -> Self {
        let (system, wire) = (actors::Limits::default(), gateway::Limits::default());
        Self {
            mailbox_bytes: system.mailbox_bytes,
            unsaved_bytes: system.unsaved_bytes,
            rest_ms: system.rest_ms,
            idle_timeout_ms: system.idle_timeout_ms,
            query_rows: system.query_rows,
            query_memory: system.query_memory,
            query_ms: system.query_ms,
            metrics: system.metrics,
            streams: system.streams,
            alert_rules: system.alert_rules,
            tables: system.tables,
            table_bytes: system.table_bytes,
            metric_state_bytes: system.metric_state_bytes,
            metric_state_groups: system.metric_state_groups,
            workspace_state_bytes: system.workspace_state_bytes,
            workspace_state_groups: system.workspace_state_groups,
            body_bytes: wire.body_bytes,
            decompressed_bytes: wire.decompressed_bytes,
            event_bytes: wire.event_bytes,
            frame_bytes: wire.frame_bytes,
            subscriptions: wire.subscriptions,
            connections: wire.connections,
            http_connections_per_address: wire.http_connections_per_address,
            connections_per_address: wire.connections_per_address,
            connections_per_user: wire.connections_per_user,
            connections_per_workspace: wire.connections_per_workspace,
            live_queries: wire.live_queries,
            queue_bytes: wire.queue_bytes,
            feed_bytes: wire.feed_bytes,
            send_buffer_bytes: wire.send_buffer_bytes,
            workspaces_per_user: wire.workspaces_per_user,
            user_requests_per_minute: wire.user_requests_per_minute,
            queries: system.queries,
            tiers: gateway::default_tiers().into_iter().map(|(name, tier)| (name.to_owned(), tier)).collect(),
            default_tier: gateway::DEFAULT_TIER.to_owned(),
        }
    }
}

impl Limits {
    pub(crate) fn system(&self) -> actors::Limits {
        actors::Limits {
            mailbox_bytes: self.mailbox_bytes,
            unsaved_bytes: self.unsaved_bytes,
            rest_ms: self.rest_ms,
            idle_timeout_ms: self.idle_timeout_ms,
            query_rows: self.query_rows,
            query_memory: self.query_memory,
            query_ms: self.query_ms,
            metrics: self.metrics,
            streams: self.streams,
            alert_rules: self.alert_rules,
            tables: self.tables,
            table_bytes: self.table_bytes,
            metric_state_bytes: self.metric_state_bytes,
            metric_state_groups: self.metric_state_groups,
            workspace_state_bytes: self.workspace_state_bytes,
            workspace_state_groups: self.workspace_state_groups,
            queries: self.queries,
        }
    }

    pub(crate) fn retention(&self) -> actors::Retention {
        let days = |days: u32| Span::seconds(i64::from(days) * 86_400);
        let tiers = self.tiers.iter().map(|(name, tier)| (name.clone(), tier.retain_days.map(days)));
        actors::Retention { tiers: tiers.collect(), default_tier: self.default_tier.clone() }
    }

    fn wire(&self) -> gateway::Limits {
        gateway::Limits {
            body_bytes: self.body_bytes,
            decompressed_bytes: self.decompressed_bytes,
            event_bytes: self.event_bytes,
            frame_bytes: self.frame_bytes,
            subscriptions: self.subscriptions,
            connections: self.connections,
            http_connections_per_address: self.http_connections_per_address,
            connections_per_address: self.connections_per_address,
            connections_per_user: self.connections_per_user,
            connections_per_workspace: self.connections_per_workspace,
            live_queries: self.live_queries,
            queue_bytes: self.queue_bytes,
            feed_bytes: self.feed_bytes,
            send_buffer_bytes: self.send_buffer_bytes,
            workspaces_per_user: self.workspaces_per_user,
            user_requests_per_minute: self.user_requests_per_minute,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration file `{0}` does not exist; name another with --config or leave it out")]
    NoFile(PathBuf),
    #[error("cannot read store.url_file `{path}`: {source}")]
    StoreUrl { path: PathBuf, source: std::io::Error },
    #[error("`{file}` line {line}, column {column}: {message}")]
    Place { file: PathBuf, line: usize, column: usize, message: String },
    #[error("configuration: {0}")]
    Invalid(Box<figment::Error>),
    #[error("{0} = 0 lets nothing through; leave it out for its default, or write how much there may be")]
    Zero(&'static str),
    #[error(
        "there is no store at `{path}`: is data_dir (or store.url) right? `tidewatch serve` and `tidewatch user create` \
         make a new one"
    )]
    NoStore { path: PathBuf },
}

impl Config {
    /// Reads `file`, or `tidewatch.toml` where there is one, and the environment over it.
    pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(Config::default()));
        match file {
            Some(file) if !file.is_file() => return Err(ConfigError::NoFile(file.to_owned())),
            Some(file) => figment = figment.merge(Toml::file_exact(file)),
            None => figment = figment.merge(Toml::file("tidewatch.toml")),
        }
        let environment = Env::prefixed("TIDEWATCH__").split("__");
        let file = file.unwrap_or(Path::new("tidewatch.toml"));
        figment.merge(environment).extract().map_err(|error| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            wrong_place(file, &text).unwrap_or_else(|| ConfigError::Invalid(Box::new(error)))
        })
    }

    /// Address of the store.
    pub fn store_url(&self) -> Result<String, ConfigError> {
        match (&self.store.url, &self.store.url_file) {
            (Some(url), _) => Ok(url.clone()),
            (None, Some(path)) => {
                let read = std::fs::read_to_string(path);
                Ok(read.map_err(|source| ConfigError::StoreUrl { path: path.clone(), source })?.trim().to_owned())
            }
            (None, None) => Ok(format!("sqlite:{}", self.data_dir.join("tidewatch.db").display())),
        }
    }

    /// The store's address, where there is a store: one that is made by looking for it would tell that all is well.
    pub fn existing_store_url(&self) -> anyhow::Result<String> {
        let url = self.store_url()?;
        if sql::store::kind(&url)? == sql::store::Kind::Sqlite {
            let path = sql::store::sqlite_path(&url)?;
            anyhow::ensure!(path.is_file(), ConfigError::NoStore { path });
        }
        Ok(url)
    }

    /// Refuses bounds with which a server serves nobody.
    pub(crate) fn check_bounds(&self) -> Result<(), ConfigError> {
        let limits = &self.limits;
        let bounds = [
            ("limits.mailbox_bytes", limits.mailbox_bytes),
            ("limits.unsaved_bytes", limits.unsaved_bytes),
            ("limits.query_rows", limits.query_rows),
            ("limits.query_memory", limits.query_memory),
            ("limits.query_ms", limits.query_ms as usize),
            ("limits.queries", limits.queries),
            ("limits.metric_state_bytes", limits.metric_state_bytes),
            ("limits.metric_state_groups", limits.metric_state_groups),
            ("limits.workspace_state_bytes", limits.workspace_state_bytes),
            ("limits.workspace_state_groups", limits.workspace_state_groups),
            ("limits.body_bytes", limits.body_bytes),
            ("limits.decompressed_bytes", limits.decompressed_bytes),
            ("limits.event_bytes", limits.event_bytes),
            ("limits.frame_bytes", limits.frame_bytes),
            ("limits.connections", limits.connections),
            ("limits.http_connections_per_address", limits.http_connections_per_address),
            ("limits.connections_per_address", limits.connections_per_address),
            ("limits.connections_per_user", limits.connections_per_user),
            ("limits.connections_per_workspace", limits.connections_per_workspace),
            ("limits.queue_bytes", limits.queue_bytes),
            ("limits.user_requests_per_minute", limits.user_requests_per_minute as usize),
            ("log.segment_bytes", self.log.segment_bytes as usize),
            ("log.queue_bytes", self.log.queue_bytes),
            ("store.max_connections", self.store.max_connections as usize),
            ("auth.access_minutes", self.auth.access_minutes as usize),
            ("auth.refresh_days", self.auth.refresh_days as usize),
        ];
        let zero = bounds.into_iter().find(|(_, most)| *most == 0);
        zero.map_or(Ok(()), |(name, _)| Err(ConfigError::Zero(name)))
    }

    /// What is set and has no effect, and why.
    pub(crate) fn unused(&self) -> Vec<String> {
        let (auth, store, redis) = (&self.auth, &self.store, &self.redis);
        let pairs = [
            ("auth.secret", auth.secret.is_some() && auth.secret_file.is_some()),
            ("auth.encryption_key", auth.encryption_key.is_some() && auth.encryption_key_file.is_some()),
            ("auth.bootstrap_password", auth.bootstrap_password.is_some() && auth.bootstrap_password_file.is_some()),
            ("store.url", store.url.is_some() && store.url_file.is_some()),
            ("redis.url", redis.url.is_some() && redis.url_file.is_some()),
        ];
        let pairs = pairs.into_iter().filter(|(_, both)| *both);
        let mut unused: Vec<String> =
            pairs.map(|(name, _)| format!("{name}_file is not read, since {name} is set too: leave one out")).collect();
        if self.listen_tls.is_none() {
            let files = [("tls.cert_file", &self.tls.cert_file), ("tls.key_file", &self.tls.key_file)];
            let names: Vec<&str> = files.iter().filter(|(_, file)| file.is_some()).map(|(name, _)| *name).collect();
            if !names.is_empty() {
                let names = names.join(" and ");
                unused.push(format!("{names} has no effect without listen_tls: say there where HTTPS is served"));
            }
        }
        unused
    }

    /// How to connect to the store and what to keep there.
    pub(crate) fn store_options(&self) -> sql::store::Options {
        let webhooks = &self.webhooks;
        sql::store::Options { webhook_pending: webhooks.pending, webhook_kept: webhooks.kept, ..self.store.options() }
    }

    pub(crate) fn gateway(&self) -> gateway::Config {
        gateway::Config {
            listen: self.listen,
            auth: self.auth.clone(),
            limits: self.limits.wire(),
            history: self.history,
            trusted_proxies: self.trusted_proxies.clone(),
            edge: self.edge.clone(),
            cors_origins: self.cors_origins.clone(),
            tiers: self.limits.tiers.clone(),
            default_tier: self.limits.default_tier.clone(),
            listen_tls: self.listen_tls,
            tls: self.tls.clone(),
            metrics_listen: self.metrics_listen,
        }
    }
}

/// What is wrong in the file, where it is the file that is wrong and not the environment.
fn wrong_place(file: &Path, text: &str) -> Option<ConfigError> {
    let error = toml::from_str::<Config>(text).err()?;
    let before = &text[..error.span()?.start.min(text.len())];
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    let (line, column) = (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1);
    Some(ConfigError::Place { file: file.to_owned(), line, column, message: error.message().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(toml: &str) -> Result<Config, String> {
        let figment = Figment::from(Serialized::defaults(Config::default())).merge(Toml::string(toml));
        figment.extract().map_err(|error| error.to_string())
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = read("[limits]\nbody_byte = 1").unwrap_err();
        assert!(error.contains("body_byte"), "{error}");
        let error = read("listn = \"127.0.0.1:1\"").unwrap_err();
        assert!(error.contains("listn"), "{error}");
    }

    #[test]
    fn a_fault_in_the_file_is_told_once_with_line_and_column() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.toml");
        for (text, place, part) in [
            ("data_dir = \"x\"\n[limits]\n  body_byte = 1\n", "line 3, column 3", "unknown field `body_byte`"),
            ("listn = \"127.0.0.1:1\"", "line 1, column 1", "unknown field `listn`"),
            ("[limits]\nmetrics = \"many\"", "line 2, column 11", "invalid type"),
            ("[limits\nmetrics = 1", "line 1, column 8", "unclosed"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = format!("{:#}", anyhow::Error::from(Config::load(Some(&file)).unwrap_err()));
            assert!(error.contains(place) && error.matches(part).count() == 1, "{text}: {error}");
        }
    }

    #[test]
    fn a_check_refuses_what_a_server_would_not_start_with() {
        let check = |toml: &str| crate::app::check(&read(toml).unwrap()).map_err(|error| format!("{error:#}"));
        let secret = format!("auth.secret = \"{}\"\n", "x".repeat(32));
        assert_eq!((check(&secret), check("")), (Ok(false), Ok(true)));
        for (toml, part) in [
            ("auth.secret = \"short\"", "32"),
            ("auth.secret_file = \"/none/secret\"", "/none/secret"),
            ("store.url = \"mysql://a:b@c/d\"", "`mysql` is not supported"),
            ("store.url_file = \"/none/url\"", "/none/url"),
            ("log.backend = \"kafka\"", "embedded"),
            ("listen_tls = \"127.0.0.1:1\"", "tls.cert_file"),
            ("limits.body_bytes = 0", "limits.body_bytes = 0"),
            ("auth.access_minutes = 0", "auth.access_minutes = 0"),
        ] {
            let error = check(toml).unwrap_err();
            assert!(error.contains(part), "{toml}: {error}");
        }
    }

    #[test]
    fn what_is_set_in_vain_is_named() {
        let unused = |toml: &str| read(toml).unwrap().unused();
        assert_eq!(unused("auth.secret_file = \"a\"\nstore.url = \"sqlite:x\""), Vec::<String>::new());
        assert_eq!(unused("listen_tls = \"127.0.0.1:1\"\ntls.cert_file = \"a\""), Vec::<String>::new());
        for (toml, part) in [
            ("auth.secret = \"s\"\nauth.secret_file = \"none\"", "auth.secret_file is not read"),
            ("store.url = \"sqlite:x\"\nstore.url_file = \"none\"", "store.url_file is not read"),
            ("tls.cert_file = \"none\"\ntls.key_file = \"none\"", "tls.cert_file and tls.key_file has no effect"),
        ] {
            let told = unused(toml);
            assert!(told.len() == 1 && told[0].contains(part), "{toml}: {told:?}");
        }
    }

    #[test]
    fn what_is_not_said_keeps_its_default() {
        let config = read("data_dir = \"/tmp/x\"\n[limits]\nmetrics = 7").unwrap();
        assert_eq!((config.limits.metrics, config.limits.streams), (7, Limits::default().streams));
        assert_eq!(config.store_url().unwrap(), "sqlite:/tmp/x/tidewatch.db");
        assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
    }
}
