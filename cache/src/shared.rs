//! The second layer, as Redis keeps it: an entry beside a stamp, the values that its tags had before it was read. A tag
//! that changed is deleted, and gets a value it never had when somebody asks for it next; so an entry with an older
//! stamp is never taken for good, not even one that a slow node writes late, or one whose tags Redis pushed out.

use crate::layers::Ask;
use crate::link::{Inner, Link};
use redis::Script;
use sha2::{Digest, Sha256};
use std::sync::LazyLock;
use std::time::Duration;

/// A larger entry is not worth its way.
const ENTRY_BYTES_MAX: usize = 1 << 20;
/// A tag that nobody asks for is forgotten after this long, and its entries with it.
const TAG_SECONDS: u64 = 86_400;

/// KEYS: the entry, the era, the tags. ARGV: a value for tags that have none, and how long they keep it.
static FIND: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local values = {}
        for i = 2, #KEYS do
            local value = redis.call('GET', KEYS[i])
            if not value then
                value = ARGV[1]
                if i == 2 then redis.call('SET', KEYS[i], value) else redis.call('SET', KEYS[i], value, 'EX', ARGV[2]) end
            end
            values[#values + 1] = value
        end
        local stamp = table.concat(values, ' ')
        local entry = redis.call('HMGET', KEYS[1], 'stamp', 'value')
        if entry[1] ~= stamp then return {stamp, false, 0} end
        return {stamp, entry[2], redis.call('PTTL', KEYS[1])}
        ",
    )
});

/// What Redis said.
pub(crate) struct Looked {
    /// Of the tags as they are now; an entry that is read from here on bears it.
    pub(crate) stamp: String,
    pub(crate) found: Option<Found>,
}

pub(crate) struct Found {
    pub(crate) value: Vec<u8>,
    /// Until it is to be forgotten.
    pub(crate) left: Duration,
}

impl Inner {
    fn entry_key(&self, ask: &Ask) -> String {
        let workspace = ask.tags.first().map_or("", |tag| tag.as_str());
        // its length in front, so that no other workspace and question make the same text
        let text = format!("{} {workspace} {}", workspace.len(), ask.question);
        let digest: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        self.key(&["entry", ask.class.name(), &digest])
    }
}

impl Link {
    /// What Redis has; nothing where it is gone, or does not know of all changes yet.
    pub(crate) async fn find(&self, ask: &Ask) -> Option<Looked> {
        if !self.inner.is_told(&ask.tags) {
            return None;
        }
        let new = uuid::Uuid::new_v4().simple().to_string();
        let mut script = FIND.key(self.inner.entry_key(ask));
        script.key(self.inner.era_key());
        for tag in &ask.tags {
            script.key(self.inner.tag_key(tag));
        }
        script.arg(new).arg(TAG_SECONDS);
        let ask = self.inner.ask(|mut connection| async move { script.invoke_async(&mut connection).await });
        let (stamp, value, left): (String, Option<Vec<u8>>, i64) = ask.await?;
        let found = value.zip(u64::try_from(left).ok());
        Some(Looked { stamp, found: found.map(|(value, left)| Found { value, left: Duration::from_millis(left) }) })
    }

    /// Keeps an entry that was read after [`Link::find`] gave `stamp`. Nobody waits for it.
    pub(crate) fn keep(&self, ask: &Ask, stamp: String, value: Vec<u8>, life: Duration) {
        if value.len() > ENTRY_BYTES_MAX {
            return;
        }
        let (inner, key) = (self.inner.clone(), self.inner.entry_key(ask));
        tokio::spawn(async move {
            let mut pipe = redis::pipe();
            pipe.atomic();
            pipe.cmd("HSET").arg(&key).arg("stamp").arg(stamp).arg("value").arg(value).ignore();
            pipe.cmd("PEXPIRE").arg(&key).arg(life.as_millis() as u64).ignore();
            inner.ask(|mut connection| async move { pipe.exec_async(&mut connection).await }).await
        });
    }
}
