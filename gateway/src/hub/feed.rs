//! What a node with an engine gives others: each message of a channel is published once over Redis, whatever number of
//! clients they have.

use cache::Publisher;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// How often nodes are told that all that was published until then went out.
pub(super) const BEAT_EVERY: Duration = Duration::from_secs(1);
/// About so many bytes are published at once.
const PARCEL_BYTES: usize = 256 << 10;

/// A message of a channel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sent {
    pub(super) offset: u64,
    pub(super) is_event: bool,
    pub(super) event: String,
}

/// Messages of a channel one behind the other.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Parcel {
    /// The offset before the first.
    pub(super) before: u64,
    pub(super) messages: Vec<Sent>,
}

impl Parcel {
    /// As it is published: the offset before it, then of each message offset, kind, length and text, little-endian.
    fn encode(&self) -> Vec<u8> {
        let mut out = self.before.to_le_bytes().to_vec();
        for Sent { offset, is_event, event } in &self.messages {
            out.extend(offset.to_le_bytes());
            out.push(u8::from(*is_event));
            out.extend((event.len() as u32).to_le_bytes());
            out.extend(event.as_bytes());
        }
        out
    }

    /// Nothing where it is no parcel.
    pub(super) fn decode(bytes: &[u8]) -> Option<Parcel> {
        let (before, mut rest) = bytes.split_first_chunk()?;
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let (offset, after) = rest.split_first_chunk()?;
            let (kind, after) = after.split_first()?;
            let (bytes, after) = after.split_first_chunk()?;
            let (event, after) = after.split_at_checked(u32::from_le_bytes(*bytes) as usize)?;
            let event = str::from_utf8(event).ok()?.to_owned();
            messages.push(Sent { offset: u64::from_le_bytes(*offset), is_event: *kind == 1, event });
            rest = after;
        }
        Some(Parcel { before: u64::from_le_bytes(*before), messages })
    }
}

struct Leaving {
    topic: Arc<str>,
    before: u64,
    sent: Sent,
}

/// The way to the other nodes.
pub(super) struct Feeds {
    publisher: Publisher,
    epoch: Arc<str>,
    /// Where nodes hear that this one is there.
    beat: Arc<str>,
    leaving: mpsc::UnboundedSender<Leaving>,
    queued: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
    /// Bytes that wait for Redis, at most: what comes on top is lost, and the nodes are told so.
    most: usize,
}

impl Feeds {
    pub(super) fn start(publisher: Publisher, epoch: &Arc<str>, most: usize) -> Feeds {
        let (leaving, leaves) = mpsc::unbounded_channel();
        let (queued, lost) = (Arc::<AtomicUsize>::default(), Arc::<AtomicU64>::default());
        let beat: Arc<str> = publisher.topic(&["feed", epoch]).into();
        tokio::spawn(publish(publisher.clone(), leaves, beat.clone(), queued.clone(), lost.clone()));
        Feeds { publisher, epoch: epoch.clone(), beat, leaving, queued, lost, most }
    }

    /// The topic of a channel with this number.
    pub(super) fn topic(&self, number: u64) -> Arc<str> {
        self.publisher.topic(&["feed", &self.epoch, &number.to_string()]).into()
    }

    pub(super) fn beat(&self) -> &str {
        &self.beat
    }

    pub(super) fn publish(&self, topic: &Arc<str>, before: u64, sent: Sent) {
        let bytes = sent.event.len();
        if self.queued.fetch_add(bytes, Ordering::Relaxed) + bytes > self.most {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        _ = self.leaving.send(Leaving { topic: topic.clone(), before, sent }); // the task ends with the process
    }
}

/// Adds a message that follows the offset `before`. What was lost between two messages is between two parcels, where it
/// is seen.
fn pack(parcels: &mut Vec<Parcel>, before: u64, sent: Sent) {
    match parcels.last_mut().filter(|parcel| parcel.messages.last().is_some_and(|last| last.offset == before)) {
        Some(parcel) => parcel.messages.push(sent),
        None => parcels.push(Parcel { before, messages: vec![sent] }),
    }
}

async fn publish(
    publisher: Publisher,
    mut leaves: mpsc::UnboundedReceiver<Leaving>,
    beat: Arc<str>,
    queued: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
) {
    let mut beats = tokio::time::interval(BEAT_EVERY);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut parcels: BTreeMap<Arc<str>, Vec<Parcel>> = BTreeMap::new();
        let mut bytes = 0;
        let mut is_beat = false;
        let mut next = tokio::select! {
            next = leaves.recv() => match next {
                Some(next) => Some(next),
                None => return,
            },
            _ = beats.tick() => {
                is_beat = true;
                leaves.try_recv().ok()
            }
        };
        while let Some(Leaving { topic, before, sent }) = next {
            bytes += sent.event.len();
            pack(parcels.entry(topic).or_default(), before, sent);
            next = if bytes < PARCEL_BYTES { leaves.try_recv().ok() } else { None };
        }
        queued.fetch_sub(bytes, Ordering::Relaxed);
        let encoded = |(topic, parcels): (&Arc<str>, &Vec<Parcel>)| -> Vec<(String, Vec<u8>)> {
            parcels.iter().map(|parcel| (topic.to_string(), parcel.encode())).collect()
        };
        let mut messages: Vec<(String, Vec<u8>)> = parcels.iter().flat_map(encoded).collect();
        if is_beat {
            messages.push((beat.to_string(), lost.load(Ordering::Relaxed).to_le_bytes().to_vec()));
        }
        metrics::counter!("tidewatch_feed_bytes_total").increment(bytes as u64);
        if !publisher.publish(&messages).await {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_was_lost_is_between_two_parcels() {
        let mut parcels = Vec::new();
        for (before, offset) in [(7, 9), (9, 10), (12, 13), (13, 14)] {
            pack(&mut parcels, before, Sent { offset, is_event: false, event: String::new() });
        }
        let shown: Vec<(u64, Vec<u64>)> = parcels
            .iter()
            .map(|parcel| (parcel.before, parcel.messages.iter().map(|sent| sent.offset).collect()))
            .collect();
        assert_eq!(shown, [(7, vec![9, 10]), (12, vec![13, 14])]);
    }

    #[test]
    fn a_parcel_is_read_as_it_was_written_and_nothing_else_passes_for_one() {
        let sent = |offset, is_event, event: &str| Sent { offset, is_event, event: event.to_owned() };
        let parcel = Parcel { before: 7, messages: vec![sent(9, false, "{}"), sent(10, true, "{\"é\":1}")] };
        let bytes = parcel.encode();
        assert_eq!(Parcel::decode(&bytes), Some(parcel));
        let whole = [8, 8 + 13 + 2, bytes.len()];
        for end in 0..bytes.len() {
            assert_eq!(Parcel::decode(&bytes[..end]).is_some(), whole.contains(&end), "{end}");
        }
        let mut broken = bytes;
        broken[16 + 1 + 3] = 0xff; // a length beyond its end
        assert_eq!(Parcel::decode(&broken), None);
    }
}
