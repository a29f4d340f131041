//! Memory first, then Redis, then whoever can load it: of many who miss the same at the same time one asks, and all get
//! its answer.

use crate::bus::Publisher;
use crate::config::{CacheError, Config, RedisConfig};
use crate::link::{Link, Standing};
use crate::shared::Looked;
use crate::tag::{Generations, Tag};
use moka::Expiry;
use moka::future::Cache as Memory;
use moka::policy::EvictionPolicy;
use sha2::{Digest, Sha256};
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What kind of thing an entry is; each has its own time to live.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    History,
    Queries,
    Portfolios,
}

/// All classes, in the order of [`Class`].
const CLASSES: [Class; 3] = [Class::History, Class::Queries, Class::Portfolios];

impl Class {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Class::History => "history",
            Class::Queries => "queries",
            Class::Portfolios => "portfolios",
        }
    }

    /// Whether other nodes, and the next process, can use it: an answer to a question is that of one log and its offset.
    fn is_shared(self) -> bool {
        self != Class::Queries
    }

    fn ttl(self, config: &Config) -> Duration {
        Duration::from_millis(match self {
            Class::History => config.history_ms,
            Class::Queries => config.queries_ms,
            Class::Portfolios => config.portfolios_ms,
        })
    }
}

/// Something that can be kept. What is asked by one question is always of one type.
pub trait Kept: Send + Sync + Sized + 'static {
    /// Bytes of memory, about.
    fn bytes(&self) -> usize;
    /// As Redis keeps it; nothing for what only memory keeps.
    fn encode(&self) -> Option<Vec<u8>> {
        None
    }
    /// What `encode` wrote; nothing where another version wrote it.
    fn decode(_: &[u8]) -> Option<Self> {
        None
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    pub class: Class,
    /// What the answer is made of: it is good until one of these changes. The first is the workspace.
    pub tags: Vec<Tag>,
    /// The question in full. Who may see the answer is checked before, or is part of it.
    pub question: String,
}

/// A larger entry than this part of `cache.bytes` is not kept: it would push out too many others.
const LARGEST: u64 = 8;
/// What an entry costs beside its value: key, links, counters.
const ENTRY_BYTES: usize = 256;

#[derive(PartialEq, Eq, Hash)]
pub(crate) struct Key {
    class: Class,
    generations: Box<[u64]>,
    question: [u8; 32],
}

#[derive(Clone)]
pub(crate) struct Entry {
    value: Arc<dyn Any + Send + Sync>,
    bytes: u32,
    life: Duration,
}

impl Entry {
    fn new<T: Kept>(value: T, life: Duration) -> Entry {
        let bytes = u32::try_from(value.bytes() + ENTRY_BYTES).unwrap_or(u32::MAX);
        Entry { value: Arc::new(value), bytes, life }
    }

    fn answer<T: Kept>(self) -> Arc<T> {
        self.value.downcast::<T>().expect("a question has one type of answer")
    }
}

/// Entries live as long as they say.
struct Lives;

impl Expiry<Key, Entry> for Lives {
    fn expire_after_create(&self, _: &Key, entry: &Entry, _: Instant) -> Option<Duration> {
        Some(entry.life)
    }
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug)]
enum Layer {
    Memory,
    Redis,
    Load,
}

/// How often each layer had the answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Warmth {
    /// From memory, or shared with somebody who was loading it.
    pub memory: u64,
    pub redis: u64,
    pub loaded: u64,
}

impl Warmth {
    /// Share of answers that nobody had to load; 1 where nobody asked.
    pub fn hit_rate(&self) -> f64 {
        let hits = self.memory + self.redis;
        match hits + self.loaded {
            0 => 1.0,
            all => hits as f64 / all as f64,
        }
    }
}

/// Both layers, and what else is shared through Redis.
pub struct Cache {
    pub(crate) memory: Memory<Key, Entry>,
    lives: [Duration; CLASSES.len()],
    largest: u64,
    generations: Arc<Generations>,
    pub(crate) link: Option<Link>,
    counts: [[AtomicU64; 3]; CLASSES.len()],
}

impl Cache {
    /// In memory only.
    pub fn new(config: &Config) -> Arc<Cache> {
        Arc::new(Cache::with(config, Arc::default(), None))
    }

    /// With Redis where it is configured. Returns at once, also when it does not answer.
    ///
    /// `installation` is what nodes with the same store have in common: others may use the same Redis. `era_file` is
    /// where this node notes at a clean stop that Redis missed no change.
    pub fn start(
        config: &Config,
        redis: &RedisConfig,
        installation: &str,
        era_file: PathBuf,
    ) -> Result<Arc<Cache>, CacheError> {
        let generations: Arc<Generations> = Arc::default();
        let patience = Duration::from_millis(redis.timeout_ms);
        let link = redis.client()?;
        let link = link.map(|client| Link::start(client, installation, patience, era_file, generations.clone()));
        Ok(Arc::new(Cache::with(config, generations, link)))
    }

    fn with(config: &Config, generations: Arc<Generations>, link: Option<Link>) -> Cache {
        let memory = Memory::builder()
            .max_capacity(config.bytes)
            .weigher(|_, entry: &Entry| entry.bytes)
            // what was invalidated is never asked for again: least recently used is the right order to forget
            .eviction_policy(EvictionPolicy::lru())
            .expire_after(Lives)
            .build();
        let lives = CLASSES.map(|class| class.ttl(config));
        Cache { memory, lives, largest: config.bytes / LARGEST, generations, link, counts: Default::default() }
    }

    /// The answer, from the first layer that has it. `load` reads it where it is; it runs at most once for all who ask
    /// the same at the same time, and those get its error too.
    pub async fn get<T: Kept, E: Send + Sync + 'static>(
        &self,
        ask: &Ask,
        load: impl AsyncFnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, Arc<E>> {
        // before anything is read: what changes meanwhile makes another key
        let generations = self.generations.of(&ask.tags);
        let question: [u8; 32] = Sha256::digest(&ask.question).into();
        let key = Key { class: ask.class, generations, question };
        let life = self.lives[ask.class as usize];
        let link = self.link.as_ref().filter(|_| ask.class.is_shared());
        if let Some(entry) = self.memory.get(&key).await {
            self.count(ask.class, Layer::Memory);
            return Ok(entry.answer());
        }
        let mut from = Layer::Memory;
        let found = self.memory.try_get_with(key, async {
            let looked = match link {
                Some(link) => link.find(ask).await,
                None => None,
            };
            if let Some(Looked { found: Some(found), .. }) = &looked
                && let Some(value) = T::decode(&found.value)
            {
                from = Layer::Redis;
                return Ok(Entry::new(value, found.left.min(life)));
            }
            from = Layer::Load;
            let value = load().await?;
            if let (Some(link), Some(looked)) = (link, looked)
                && let Some(bytes) = value.encode()
            {
                link.keep(ask, looked.stamp, bytes, life);
            }
            Ok(Entry::new(value, life))
        });
        let found = Box::pin(found).await; // it is large, and whoever asks should not be
        self.count(ask.class, from);
        let entry = found?;
        if u64::from(entry.bytes) > self.largest {
            let key = Key { class: ask.class, generations: self.generations.of(&ask.tags), question };
            self.memory.invalidate(&key).await;
        }
        Ok(entry.answer())
    }

    /// What these name has changed, and is in the store: nobody gets what was read before.
    pub fn changed(&self, tags: &[Tag]) {
        // Redis is not asked about them from here on: whoever sees the new generation must not find the old entry there
        if let Some(link) = &self.link {
            link.changed(tags);
        }
        self.generations.change(tags);
    }

    /// How often each layer had the answer since the start, of one class.
    pub fn warmth(&self, class: Class) -> Warmth {
        let [memory, redis, loaded] = &self.counts[class as usize];
        Warmth { memory: memory.load(Relaxed), redis: redis.load(Relaxed), loaded: loaded.load(Relaxed) }
    }

    /// What publishes messages for other nodes, where Redis is configured.
    pub fn publisher(&self) -> Option<Publisher> {
        self.link.as_ref().map(|link| Publisher(link.inner.clone()))
    }

    /// How Redis stands.
    pub fn redis(&self) -> Standing {
        self.link.as_ref().map_or(Standing::NotConfigured, Link::standing)
    }

    /// Tells Redis what it has not heard yet, and notes that it has heard all. To be called once nothing changes any
    /// more.
    pub async fn stop(&self) {
        if let Some(link) = &self.link {
            link.stop().await;
        }
    }

    fn count(&self, class: Class, from: Layer) {
        self.counts[class as usize][from as usize].fetch_add(1, Relaxed);
        let layer = match from {
            Layer::Memory => "memory",
            Layer::Redis => "redis",
            Layer::Load => "none",
        };
        metrics::counter!("tidewatch_cache_requests_total", "class" => class.name(), "found_in" => layer).increment(1);
    }
}
