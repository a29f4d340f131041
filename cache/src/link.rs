//! The connection to Redis, which may be gone at any time. While it is, nobody waits for it: a command that fails or
//! takes too long marks Redis as gone, and a task of its own looks for it until it is back.
//!
//! What changed while it could not be told is remembered, and told before Redis is asked anything again.

use crate::bus::{Heard, Listener};
use crate::tag::{Generations, Tag};
use parking_lot::{Mutex, RwLock};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisResult};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a connection may take to be made. Nobody but the task that looks for Redis waits for it.
pub(crate) const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// How often Redis is looked for while it is gone, and whether it is still there while nobody asks it anything.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);
pub(crate) const PING_EVERY: Duration = Duration::from_secs(2);
/// What other nodes said and nobody has looked at yet.
const NEWS_MAX: usize = 1_024;
/// Tags that are remembered while Redis is gone; with more, all it has is forgotten when it is back.
const UNTOLD_MAX: usize = 10_000;
/// In place of the names of tags: all of them. No tag has this name, since each begins with a workspace.
const EVERYTHING: &str = "*";

/// How Redis stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    NotConfigured,
    Connected,
    /// And why.
    Gone(String),
}

/// Whether what Redis keeps from before can be trusted.
#[derive(Clone, PartialEq, Eq)]
enum Trust {
    Yes,
    /// If its era is still this one: that of the last clean stop.
    Era(String),
    No,
}

/// What Redis has not been told yet.
struct Untold {
    /// With the number of the change, so that one that comes while its predecessor is being told is told as well.
    tags: HashMap<Tag, u64>,
    trust: Trust,
    changes: u64,
}

pub(crate) struct Link {
    pub(crate) inner: Arc<Inner>,
    tasks: [JoinHandle<()>; 2],
}

pub(crate) struct Inner {
    client: Client,
    /// Before every key. The braces keep all keys in one slot of a cluster.
    prefix: String,
    /// This process, which need not hear of its own changes.
    node: String,
    patience: Duration,
    era_file: PathBuf,
    connection: RwLock<Option<MultiplexedConnection>>,
    problem: Mutex<String>,
    untold: Mutex<Untold>,
    wake: Notify,
    generations: Arc<Generations>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Link {
    pub(crate) fn start(
        client: Client,
        installation: &str,
        patience: Duration,
        era_file: PathBuf,
        generations: Arc<Generations>,
    ) -> Link {
        let trust = take_era(&era_file).map_or(Trust::No, Trust::Era);
        let inner = Arc::new(Inner {
            client,
            prefix: format!("{{tidewatch:{installation}}}"),
            node: uuid::Uuid::new_v4().simple().to_string(),
            patience,
            era_file,
            connection: RwLock::new(None),
            problem: Mutex::new("not connected yet".to_owned()),
            untold: Mutex::new(Untold { tags: HashMap::new(), trust, changes: 0 }),
            wake: Notify::new(),
            generations,
        });
        let tasks = [tokio::spawn(keep_connected(inner.clone())), tokio::spawn(hear(inner.clone()))];
        Link { inner, tasks }
    }

    pub(crate) fn standing(&self) -> Standing {
        match self.inner.connection.read().is_some() {
            true => Standing::Connected,
            false => Standing::Gone(self.inner.problem.lock().clone()),
        }
    }

    /// These changed: Redis is told as soon as it can be, and not asked about them before.
    pub(crate) fn changed(&self, tags: &[Tag]) {
        self.inner.untold.lock().add(tags);
        self.inner.wake.notify_one();
    }

    /// See [`crate::Cache::stop`].
    pub(crate) async fn stop(&self) {
        let inner = &self.inner;
        let Some(mut connection) = inner.connection.read().clone() else { return };
        let era = async {
            inner.tell(&mut connection).await?;
            inner.era(&mut connection).await
        };
        match timeout(CONNECT_WITHIN, era).await {
            Ok(Ok(era)) if inner.untold.lock().is_empty() => {
                if let Err(error) = std::fs::write(&inner.era_file, era) {
                    tracing::warn!(%error, "what Redis keeps will be forgotten at the next start");
                }
            }
            _ => tracing::info!("Redis did not hear of all changes; what it keeps will be forgotten at the next start"),
        }
    }
}

impl Untold {
    fn add(&mut self, tags: &[Tag]) {
        self.changes += 1;
        if self.tags.len() + tags.len() > UNTOLD_MAX {
            self.tags.clear();
            self.trust = Trust::No;
        }
        if self.trust != Trust::No {
            self.tags.extend(tags.iter().map(|tag| (tag.clone(), self.changes)));
        }
    }

    fn is_empty(&self) -> bool {
        self.tags.is_empty() && self.trust == Trust::Yes
    }
}

/// The era noted at the last clean stop. The note is gone before anything can change, also when the machine fails.
fn take_era(file: &Path) -> Option<String> {
    let era = std::fs::read_to_string(file).ok()?;
    std::fs::remove_file(file).ok()?;
    File::open(file.parent()?).and_then(|folder| folder.sync_all()).ok()?;
    Some(era)
}

impl Inner {
    /// The way to Redis, unless it is gone.
    pub(crate) fn connection(&self) -> Option<MultiplexedConnection> {
        self.connection.read().clone()
    }

    pub(crate) fn key(&self, parts: &[&str]) -> String {
        let mut key = self.prefix.clone();
        for part in parts {
            key.push(':');
            key.push_str(part);
        }
        key
    }

    /// A tag's key: another value means that it changed.
    pub(crate) fn tag_key(&self, tag: &Tag) -> String {
        self.key(&["tag", tag.as_str()])
    }

    pub(crate) fn era_key(&self) -> String {
        self.key(&["era"])
    }

    /// Whether Redis knows of all changes of these.
    pub(crate) fn is_told(&self, tags: &[Tag]) -> bool {
        let untold = self.untold.lock();
        untold.trust == Trust::Yes && (untold.tags.is_empty() || tags.iter().all(|tag| !untold.tags.contains_key(tag)))
    }

    /// What `run` answers; nothing where Redis is gone, or is found to be. Waits for the time of `redis.timeout_ms` at
    /// most, and not at all once Redis is known to be gone.
    pub(crate) async fn ask<T, F>(&self, run: impl FnOnce(MultiplexedConnection) -> F) -> Option<T>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let connection = self.connection.read().clone()?;
        let reason = match timeout(self.patience, run(connection)).await {
            Ok(Ok(answer)) => return Some(answer),
            // it is there and does not want to, since its memory is full, say
            Ok(Err(error)) if matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension) => {
                tracing::debug!(%error, "Redis refuses a command");
                return None;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.patience),
        };
        self.lose(&reason);
        None
    }

    fn lose(&self, reason: &str) {
        *self.problem.lock() = reason.to_owned();
        let lost = self.connection.write().take().is_some();
        if lost {
            tracing::warn!(reason, "Redis is gone; caches and limits are this node's own until it is back");
            metrics::gauge!("tidewatch_redis_up").set(0.0);
            self.wake.notify_one();
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, String> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_WITHIN))
            .set_response_timeout(Some(CONNECT_WITHIN));
        let connecting = self.client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = connecting.await.map_err(|error| error.to_string())?;
        self.tell(&mut connection).await.map_err(|error| error.to_string())?;
        Ok(connection)
    }

    /// Tells Redis and the other nodes what changed.
    async fn tell(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let (tags, trust, changes) = {
            let untold = self.untold.lock();
            (untold.tags.clone(), untold.trust.clone(), untold.changes)
        };
        let is_trusted = match &trust {
            Trust::Yes => true,
            Trust::Era(known) => {
                let era: Option<String> = redis::cmd("GET").arg(self.era_key()).query_async(connection).await?;
                era.as_ref() == Some(known)
            }
            Trust::No => false,
        };
        if !is_trusted {
            self.tell_some(connection, &[self.era_key()], EVERYTHING).await?;
        }
        let all: Vec<&Tag> = tags.keys().collect();
        for some in all.chunks(256) {
            let keys: Vec<String> = some.iter().map(|tag| self.tag_key(tag)).collect();
            let names: Vec<&str> = some.iter().map(|tag| tag.as_str()).collect();
            self.tell_some(connection, &keys, &names.join("\n")).await?;
        }
        let mut untold = self.untold.lock();
        untold.tags.retain(|tag, number| tags.get(tag) != Some(number));
        // without trust changes are not remembered one by one, so those of meanwhile need it once more
        if untold.trust == trust && (trust != Trust::No || untold.changes == changes) {
            untold.trust = Trust::Yes;
        }
        Ok(())
    }

    async fn tell_some(&self, connection: &mut MultiplexedConnection, keys: &[String], names: &str) -> RedisResult<()> {
        let (channel, news) = (self.channel(), format!("{}\n{names}", self.node));
        let mut pipe = redis::pipe();
        pipe.atomic().cmd("UNLINK").arg(keys).ignore().cmd("PUBLISH").arg(channel).arg(news).ignore();
        pipe.exec_async(connection).await
    }

    /// Where nodes tell each other what changed.
    fn channel(&self) -> String {
        self.key(&["changed"])
    }

    /// The era of what Redis keeps; a new one where there is none.
    async fn era(&self, connection: &mut MultiplexedConnection) -> RedisResult<String> {
        let new = uuid::Uuid::new_v4().simple().to_string();
        let mut pipe = redis::pipe();
        pipe.cmd("SET").arg(self.era_key()).arg(new).arg("NX").ignore().cmd("GET").arg(self.era_key());
        let (era,): (String,) = pipe.query_async(connection).await?;
        Ok(era)
    }
}

/// Looks for Redis while it is gone, and tells it what changed while it is there.
async fn keep_connected(inner: Arc<Inner>) {
    loop {
        match inner.connect().await {
            Ok(connection) => {
                tracing::info!("Redis is there");
                metrics::gauge!("tidewatch_redis_up").set(1.0);
                *inner.connection.write() = Some(connection);
                stay(&inner).await;
            }
            Err(reason) => {
                metrics::gauge!("tidewatch_redis_up").set(0.0);
                let mut problem = inner.problem.lock();
                if *problem != reason {
                    tracing::warn!(reason, "Redis cannot be reached; trying again and again");
                    *problem = reason;
                }
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Returns once Redis is gone.
async fn stay(inner: &Inner) {
    loop {
        _ = timeout(PING_EVERY, inner.wake.notified()).await;
        let Some(mut connection) = inner.connection.read().clone() else { return };
        let untold = !inner.untold.lock().is_empty();
        let told = async {
            match untold {
                true => inner.tell(&mut connection).await,
                false => redis::cmd("PING").exec_async(&mut connection).await,
            }
        };
        if let Err(error) = told.await {
            inner.lose(&error.to_string());
            return;
        }
    }
}

/// Hears from other nodes what changed there. What was said while nobody listened is not known, so all is forgotten then.
async fn hear(inner: Arc<Inner>) {
    let (listener, mut hears) = Listener::of(inner.client.clone(), NEWS_MAX);
    while let Some(heard) = hears.recv().await {
        match heard {
            Heard::Connected => {
                if listener.subscribe(&inner.channel()).await {
                    inner.generations.change_all();
                }
            }
            Heard::Message { payload, .. } => {
                let Some((node, names)) = str::from_utf8(&payload).ok().and_then(|text| text.split_once('\n')) else {
                    continue;
                };
                if node == inner.node {
                    continue;
                }
                tracing::trace!(node, "another node changed something");
                match names {
                    EVERYTHING => inner.generations.change_all(),
                    names => inner.generations.change(&names.split('\n').map(Tag::from).collect::<Vec<_>>()),
                }
            }
            Heard::Lost => {}
        }
    }
}
