//! Token buckets that several nodes share: one that Redis keeps and fills by its own clock.

use crate::layers::Cache;
use redis::Script;
use std::sync::LazyLock;

/// A bucket's size and speed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rate {
    /// Tokens of a full bucket.
    pub burst: f64,
    pub per_second: f64,
}

/// How a bucket stands after it was asked.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Level {
    /// There was at least one token before.
    pub is_open: bool,
    /// Less than zero where more was taken than there was.
    pub tokens: f64,
}

/// KEYS: the bucket. ARGV: burst, tokens a second, tokens to take. With another burst than before, what was used counts
/// on. A bucket is forgotten when it is full again.
static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local burst, per_second, n = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
        local time = redis.call('TIME')
        local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
        local known = redis.call('HMGET', KEYS[1], 'tokens', 'at', 'burst')
        local tokens, at = burst, now
        if known[1] then
            at = tonumber(known[2])
            tokens = tonumber(known[1]) + burst - tonumber(known[3])
            tokens = math.min(burst, tokens + math.max(0, now - at) * per_second)
        end
        local open = tokens >= 1
        if open then tokens = tokens - n end
        redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', tostring(math.max(at, now)), 'burst', tostring(burst))
        local full = 86400
        if per_second > 0 then full = math.min(full, (burst - tokens) / per_second) end
        redis.call('PEXPIRE', KEYS[1], math.ceil(full * 1000) + 1000)
        return {open and 1 or 0, tostring(tokens)}
        ",
    )
});

impl Cache {
    /// Takes `n` tokens from the bucket `name` that all nodes share, where it has at least one. Nothing where there is
    /// no Redis, or it is gone.
    pub async fn take(&self, name: &str, rate: Rate, n: f64) -> Option<Level> {
        let inner = &self.link.as_ref()?.inner;
        let mut script = TAKE.key(inner.key(&["bucket", name]));
        script.arg(rate.burst).arg(rate.per_second).arg(n);
        let taken = inner.ask(|mut connection| async move { script.invoke_async(&mut connection).await });
        let (open, tokens): (i64, String) = taken.await?;
        Some(Level { is_open: open == 1, tokens: tokens.parse().ok()? })
    }
}
