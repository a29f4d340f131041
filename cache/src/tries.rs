//! Tries of a password that several nodes count together: Redis keeps them, by its own clock.

use crate::layers::Cache;
use redis::Script;
use std::sync::LazyLock;
use std::time::Duration;

/// How failures in a row make one wait.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Patience {
    /// The longest wait: the first is a second, each further one twice as long.
    pub longest: Duration,
    /// Failures are forgotten after this long without another.
    pub forget: Duration,
}

/// KEYS: what failures are counted of. ARGV: of each key `free`, then `longest` and `forget` in seconds. Counts a failure
/// of each and answers 0, or counts none and answers the seconds to wait.
static COUNT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local longest, forget = tonumber(ARGV[#KEYS + 1]), tonumber(ARGV[#KEYS + 2])
        local time = redis.call('TIME')
        local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
        local wait = 0
        for i, key in ipairs(KEYS) do
            local known = redis.call('HMGET', key, 'failed', 'at')
            local over = tonumber(known[1] or 0) - tonumber(ARGV[i])
            if known[1] and over >= 0 then
                wait = math.max(wait, tonumber(known[2]) + math.min(2 ^ math.min(over, 10), longest) - now)
            end
        end
        if wait > 0 then return tostring(wait) end
        for _, key in ipairs(KEYS) do
            redis.call('HINCRBY', key, 'failed', 1)
            redis.call('HSET', key, 'at', string.format('%.6f', now))
            redis.call('PEXPIRE', key, math.ceil(forget * 1000))
        end
        return '0'
        ",
    )
});

/// KEYS: what one failure less is counted of.
static TAKE_BACK: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        for _, key in ipairs(KEYS) do
            if tonumber(redis.call('HGET', key, 'failed') or 0) > 0 then redis.call('HINCRBY', key, 'failed', -1) end
        end
        ",
    )
});

impl Cache {
    /// Counts a try as failed in each of `of`, unless one of them must wait since it has failed as often as the number
    /// beside it, or more: for how long, zero if it was counted. Nothing where there is no Redis, or it is gone.
    pub async fn count_try(&self, of: &[(&str, u32)], patience: Patience) -> Option<Duration> {
        let inner = &self.link.as_ref()?.inner;
        let mut script = COUNT.prepare_invoke();
        for (name, free) in of {
            script.key(inner.key(&["tries", name])).arg(*free);
        }
        script.arg(patience.longest.as_secs_f64()).arg(patience.forget.as_secs_f64());
        let asked = inner.ask(|mut connection| async move { script.invoke_async(&mut connection).await });
        let wait: String = asked.await?;
        Duration::try_from_secs_f64(wait.parse().ok()?).ok()
    }

    /// A try that was counted in each of `of` was no failure.
    pub async fn take_back_try(&self, of: &[&str]) {
        let Some(link) = &self.link else { return };
        let mut script = TAKE_BACK.prepare_invoke();
        for name in of {
            script.key(link.inner.key(&["tries", name]));
        }
        link.inner.ask(|mut connection| async move { script.invoke_async::<()>(&mut connection).await }).await;
    }

    /// Forgets the failures of one.
    pub async fn forget_tries(&self, name: &str) {
        let Some(link) = &self.link else { return };
        let mut command = redis::cmd("DEL");
        command.arg(link.inner.key(&["tries", name]));
        link.inner.ask(|mut connection| async move { command.exec_async(&mut connection).await }).await;
    }
}
