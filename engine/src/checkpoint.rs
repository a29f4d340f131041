//! The state of a workspace as it is stored: in parts, of which a checkpoint writes those that changed.
//!
//! The head holds what moves with every event, how far event time and windows have come, and names every part with the
//! checkpoint that wrote it. A part is of one metric, table or share of the last prices, and is written again only when
//! something in it changed: a metric that no event reached costs a line of the head, however much it holds.

use crate::alert::{Standing, Trouble};
use crate::event::{ItemName, Micros, StreamName};
use crate::metric::RestoreError;
use crate::portfolio::{Price, SHARE};
use crate::workspace::{Cause, StreamTime};
use arrow::array::RecordBatch;
use arrow::ipc::{reader::StreamReader, writer::StreamWriter};
use datafusion_common::Result;
use hashbrown::HashMap;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Format of the head and of each part; a change that cannot read the old one takes a new number. Behind it stand the
/// CRC-32C of all that follows, the length of the header, both of four bytes, little-endian, the header, the content.
const MAGIC: &[u8; 8] = b"TWSTATE3";
/// All in one, the same way.
const MAGIC_2: &[u8; 8] = b"TWSTATE2";
/// All in one, without a checksum.
const MAGIC_1: &[u8; 8] = b"TWSTATE1";

/// Saved state as a store keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub head: Vec<u8>,
    /// By name.
    pub parts: BTreeMap<String, Vec<u8>>,
}

/// What makes the state of now of the one that was saved before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub head: Vec<u8>,
    /// New and changed parts, by name.
    pub parts: Vec<(String, Vec<u8>)>,
    /// Parts that are no more.
    pub gone: Vec<String>,
    /// These parts are all there are: whatever else is stored goes.
    pub whole: bool,
}

impl State {
    /// Goes on to the next checkpoint.
    pub fn apply(&mut self, changes: Changes) {
        if changes.whole {
            self.parts.clear();
        }
        self.head = changes.head;
        changes.gone.iter().for_each(|name| _ = self.parts.remove(name));
        self.parts.extend(changes.parts);
    }
}

impl Changes {
    /// Bytes to be written.
    pub fn bytes(&self) -> usize {
        self.head.len() + self.parts.iter().map(|(name, bytes)| name.len() + bytes.len()).sum::<usize>()
    }
}

/// The parts that are stored, each with the checkpoint that wrote it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    checkpoint: u64,
    parts: BTreeMap<String, u64>,
}

/// What a part holds. Making it needs the state, writing it does not.
pub(crate) enum Content {
    Rows(RecordBatch),
    Json(Vec<u8>),
}

impl Content {
    pub(crate) fn json(value: &impl Serialize) -> Content {
        Content::Json(json(value))
    }

    fn write(&self, to: &mut Vec<u8>) -> Result<()> {
        match self {
            Content::Rows(batch) => {
                let mut writer = StreamWriter::try_new(to, batch.schema_ref())?;
                writer.write(batch)?;
                writer.finish()?;
            }
            Content::Json(text) => to.extend_from_slice(text),
        }
        Ok(())
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data becomes JSON")
}

/// A checkpoint in the making: takes every part there is, and keeps the content of those to be written.
pub(crate) struct Draft {
    before: Option<Ledger>,
    now: Ledger,
    owner: String,
    written: Vec<(String, Content)>,
}

impl Draft {
    /// `before`: the parts that are stored, where it is known.
    pub(crate) fn new(before: Option<Ledger>) -> Draft {
        let checkpoint = before.as_ref().map_or(0, |ledger| ledger.checkpoint) + 1;
        Draft { before, now: Ledger { checkpoint, ..Ledger::default() }, owner: String::new(), written: Vec::new() }
    }

    /// The parts that follow are of this one.
    pub(crate) fn begin(&mut self, owner: Owner<'_>) {
        self.owner = owner.to_string();
    }

    /// A part there is. Its content is asked for only where it `changed` since the last checkpoint or is not stored.
    pub(crate) fn put(&mut self, part: &str, changed: bool, content: impl FnOnce() -> Result<Content>) -> Result<()> {
        let name = format!("{}/{part}", self.owner);
        let stored = self.before.as_ref().and_then(|before| before.parts.get(&name)).filter(|_| !changed);
        let written = match stored {
            Some(&written) => written,
            None => {
                self.written.push((name.clone(), content()?));
                self.now.checkpoint
            }
        };
        self.now.parts.insert(name, written);
        Ok(())
    }

    pub(crate) fn finish(
        self,
        streams: BTreeMap<StreamName, StreamTime>,
        metrics: Vec<SavedMetric>,
    ) -> (Snapshot, Ledger) {
        let Draft { before, now, written, .. } = self;
        let whole = before.is_none();
        let gone = before.into_iter().flat_map(|before| before.parts.into_keys());
        let gone = gone.filter(|name| !now.parts.contains_key(name)).collect();
        let head = Head { checkpoint: now.checkpoint, streams, metrics, parts: now.parts.clone() };
        (Snapshot { head, written, gone, whole }, now)
    }
}

/// State taken at one moment, to be encoded wherever there is time for it.
pub struct Snapshot {
    head: Head,
    written: Vec<(String, Content)>,
    gone: Vec<String>,
    whole: bool,
}

impl Snapshot {
    /// About how many bytes there are to encode.
    pub fn bytes(&self) -> usize {
        let content = self.written.iter().map(|(_, content)| match content {
            Content::Rows(batch) => batch.get_array_memory_size(),
            Content::Json(text) => text.len(),
        });
        content.sum()
    }

    /// What is to be written.
    pub fn encode(self) -> Result<Changes> {
        let checkpoint = self.head.checkpoint;
        let part = |(name, content): (String, Content)| {
            let bytes = sealed(&PartHeader { part: &name, checkpoint }, |to| content.write(to))?;
            Ok((name, bytes))
        };
        let parts = self.written.into_iter().map(part).collect::<Result<_>>()?;
        Ok(Changes { head: sealed(&self.head, |_| Ok(()))?, parts, gone: self.gone, whole: self.whole })
    }
}

/// What a part is of.
#[derive(Clone, Copy)]
pub(crate) enum Owner<'a> {
    Metric(&'a ItemName),
    Table(&'a StreamName),
    Prices,
}

impl std::fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Owner::Metric(name) => write!(f, "metric/{name}"),
            Owner::Table(name) => write!(f, "table/{name}"),
            Owner::Prices => f.write_str("prices"),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct PartHeader<'a> {
    part: &'a str,
    checkpoint: u64,
}

#[derive(Serialize, Deserialize)]
struct Head {
    checkpoint: u64,
    streams: BTreeMap<StreamName, StreamTime>,
    metrics: Vec<SavedMetric>,
    /// Every part there is, and the checkpoint that wrote it.
    parts: BTreeMap<String, u64>,
}

/// What the head says of a metric.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedMetric {
    pub(crate) name: ItemName,
    pub(crate) version: i64,
    pub(crate) closed: Micros,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) since: Option<Micros>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) cause: Cause,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) looked_at: Option<Micros>,
}

fn is_default(cause: &Cause) -> bool {
    *cause == Cause::default()
}

/// Where the rules of a metric stand.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct SavedRules {
    #[serde(default)]
    pub(crate) standing: BTreeMap<ItemName, HashMap<String, Standing>>,
    #[serde(default)]
    pub(crate) trouble: BTreeMap<ItemName, Trouble>,
}

/// The saved rows of a metric, each batch with the name of its part; without names where they were saved all in one, in
/// the order of [`Pieces::named`].
#[derive(Default)]
pub(crate) struct Pieces(Vec<(String, RecordBatch)>);

impl Pieces {
    /// These, of which each bears one of `names`.
    pub(crate) fn named(mut self, names: &[&str]) -> Result<Pieces, RestoreError> {
        if self.0.iter().any(|(name, _)| name.is_empty()) {
            if self.0.len() != names.len() {
                return Err(RestoreError::Mismatch(format!("found {} batches, want {}", self.0.len(), names.len())));
            }
            self.0.iter_mut().zip(names).for_each(|((name, _), given)| (*given).clone_into(name));
        }
        match self.0.iter().find(|(name, _)| !names.contains(&kind(name))) {
            Some((name, _)) => Err(RestoreError::Mismatch(format!("it has no part `{name}`"))),
            None => Ok(self),
        }
    }

    /// All batches of a kind, by name: those of `panes` are called `panes` or `panes/…`.
    pub(crate) fn all(&self, of: &str) -> impl Iterator<Item = &RecordBatch> {
        self.0.iter().filter(move |(name, _)| kind(name) == of).map(|(_, batch)| batch)
    }

    /// Whether a kind was saved in several parts.
    pub(crate) fn is_split(&self, of: &str) -> bool {
        self.0.iter().any(|(name, _)| kind(name) == of && name != of)
    }
}

fn kind(name: &str) -> &str {
    name.split('/').next().unwrap_or_default()
}

/// Saved state of a workspace, read but not yet put under its metrics.
pub struct Saved {
    pub(crate) streams: BTreeMap<StreamName, StreamTime>,
    pub(crate) metrics: Vec<(SavedMetric, Pieces, SavedRules)>,
    pub(crate) tables: Vec<(StreamName, RecordBatch)>,
    /// The shares in which they were saved, by their order.
    pub(crate) prices: Vec<HashMap<String, Price>>,
    /// None of what was saved all in one: everything is written again.
    pub(crate) ledger: Option<Ledger>,
}

impl Saved {
    /// Reads what checkpoints have made of a state; an error means another version or damage, also where a part is missing
    /// or of another moment, and never a guess.
    pub fn read(state: &State) -> Result<Saved, RestoreError> {
        let versions = [(MAGIC_2, true), (MAGIC_1, false)];
        if let Some((magic, summed)) = versions.into_iter().find(|(magic, _)| state.head.starts_with(*magic)) {
            return read_whole(&state.head[magic.len()..], summed); // parts beside it are of a later version that was left again
        }
        let (head, _) = opened::<Head>(&state.head)?;
        if let Some(name) = state.parts.keys().find(|name| !head.parts.contains_key(*name)) {
            return Err(damaged(&format!("part `{name}` is one too many")));
        }
        let metrics = head.metrics.into_iter();
        let mut metrics: BTreeMap<ItemName, _> =
            metrics.map(|metric| (metric.name.clone(), (metric, Pieces::default(), SavedRules::default()))).collect();
        let (mut tables, mut prices) = (Vec::new(), BTreeMap::new());
        for (name, checkpoint) in &head.parts {
            let bytes = state.parts.get(name).ok_or_else(|| damaged(&format!("part `{name}` is missing")))?;
            let (header, content) = opened::<PartHeader<'_>>(bytes)?;
            if header.part != name || header.checkpoint != *checkpoint {
                let PartHeader { part, checkpoint: found } = header;
                return Err(damaged(&format!("`{part}` of {found} is in place of `{name}` of {checkpoint}")));
            }
            let unknown = || damaged(&format!("part `{name}` is of nothing"));
            match name.splitn(3, '/').collect::<Vec<_>>()[..] {
                ["metric", metric, part] => {
                    let metric = metric.parse().ok().and_then(|metric: ItemName| metrics.get_mut(&metric));
                    let (_, pieces, rules) = metric.ok_or_else(unknown)?;
                    match part {
                        RULES => *rules = from_json(content)?,
                        part => pieces.0.push((part.to_owned(), from_ipc(content)?)),
                    }
                }
                ["table", table, ROWS] => {
                    tables.push((table.parse().map_err(|_| unknown())?, from_ipc(content)?));
                }
                ["prices", at] => _ = prices.insert(at.parse::<usize>().map_err(|_| unknown())?, from_json(content)?),
                _ => return Err(unknown()),
            }
        }
        Ok(Saved {
            streams: head.streams,
            metrics: metrics.into_values().collect(),
            tables,
            prices: prices.into_values().collect(),
            ledger: Some(Ledger { checkpoint: head.checkpoint, parts: head.parts }),
        })
    }
}

/// The part in which a metric's rules stand.
pub(crate) const RULES: &str = "rules";
/// The part that holds a table.
pub(crate) const ROWS: &str = "rows";

#[derive(Deserialize)]
struct WholeHead {
    streams: BTreeMap<StreamName, StreamTime>,
    metrics: Vec<WholeMetric>,
    /// Name and length.
    #[serde(default)]
    tables: Vec<(StreamName, usize)>,
    prices: HashMap<String, Price>,
}

#[derive(Deserialize)]
struct WholeMetric {
    #[serde(flatten)]
    metric: SavedMetric,
    lengths: Vec<usize>,
    #[serde(flatten)]
    rules: SavedRules,
}

/// Reads state saved all in one.
fn read_whole(bytes: &[u8], summed: bool) -> Result<Saved, RestoreError> {
    let rest = if summed { checked(bytes)? } else { bytes };
    let (head, mut rest) = split(rest)?;
    let head: WholeHead = from_json(head)?;
    let mut blob = |length| {
        let (blob, after) = rest.split_at_checked(length).ok_or_else(|| damaged("cut short in its batches"))?;
        rest = after;
        from_ipc(blob)
    };
    let mut metrics = Vec::new();
    for WholeMetric { metric, lengths, rules } in head.metrics {
        let pieces = lengths.into_iter().map(|length| Ok((String::new(), blob(length)?)));
        metrics.push((metric, Pieces(pieces.collect::<Result<_, RestoreError>>()?), rules));
    }
    let tables = head.tables.into_iter().map(|(name, length)| Ok((name, blob(length)?)));
    let tables = tables.collect::<Result<_, RestoreError>>()?;
    let prices: Vec<(String, Price)> = head.prices.into_iter().collect();
    let prices = prices.chunks(SHARE).map(|share| share.iter().cloned().collect()).collect();
    Ok(Saved { streams: head.streams, metrics, tables, prices, ledger: None })
}

fn sealed(header: &impl Serialize, content: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Vec<u8>> {
    let header = json(header);
    let mut bytes = [MAGIC.as_slice(), &[0; 4], &(header.len() as u32).to_le_bytes(), &header].concat();
    content(&mut bytes)?;
    let (front, rest) = bytes.split_at_mut(MAGIC.len() + 4);
    front[MAGIC.len()..].copy_from_slice(&crc32c::crc32c(rest).to_le_bytes());
    Ok(bytes)
}

/// The header and the content of what [`sealed`] gave.
pub(crate) fn opened<'a, H: Deserialize<'a>>(bytes: &'a [u8]) -> Result<(H, &'a [u8]), RestoreError> {
    let bytes = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("another format version"))?;
    let (header, content) = split(checked(bytes)?)?;
    Ok((serde_json::from_slice(header).map_err(|e| damaged(&format!("header: {e}")))?, content))
}

fn checked(bytes: &[u8]) -> Result<&[u8], RestoreError> {
    match bytes.split_first_chunk() {
        Some((sum, rest)) if *sum == crc32c::crc32c(rest).to_le_bytes() => Ok(rest),
        _ => Err(damaged("its checksum does not fit")),
    }
}

fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), RestoreError> {
    let cut = || damaged("cut short in its header");
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut)?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(cut)
}

fn damaged(what: &str) -> RestoreError {
    RestoreError::Mismatch(what.to_owned())
}

fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RestoreError> {
    serde_json::from_slice(bytes).map_err(|e| damaged(&format!("JSON: {e}")))
}

fn from_ipc(bytes: &[u8]) -> Result<RecordBatch, RestoreError> {
    let mut reader = StreamReader::try_new(bytes, None)?;
    reader.next().ok_or_else(|| damaged("a batch is missing"))?.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Workspace;

    /// State of a workspace that has two shares of prices, saved thrice; only the last one wrote the second share.
    fn state() -> State {
        let mut draft = Draft::new(None);
        draft.begin(Owner::Prices);
        let prices = |at: i64| BTreeMap::from([(format!("S{at}"), Price { price: 1.5, at: Micros(at) })]);
        draft.put("0", true, || Ok(Content::json(&prices(1)))).unwrap();
        let (snapshot, ledger) = draft.finish(BTreeMap::new(), Vec::new());
        let mut state = State::default();
        state.apply(snapshot.encode().unwrap());
        let mut draft = Draft::new(Some(ledger));
        draft.begin(Owner::Prices);
        draft.put("0", false, || panic!("it did not change")).unwrap();
        draft.put("1", true, || Ok(Content::json(&prices(2)))).unwrap();
        state.apply(draft.finish(BTreeMap::new(), Vec::new()).0.encode().unwrap());
        state
    }

    #[test]
    fn a_changed_byte_of_saved_state_is_never_taken_for_state() {
        let state = state();
        assert_eq!(Saved::read(&state).unwrap().prices.len(), 2);
        for at in 0..state.head.len() {
            let mut changed = state.clone();
            changed.head[at] ^= 1;
            assert!(Saved::read(&changed).is_err(), "byte {at} of the head");
        }
        for (name, bytes) in &state.parts {
            for at in 0..bytes.len() {
                let mut changed = state.clone();
                changed.parts.get_mut(name).unwrap()[at] ^= 1;
                assert!(Saved::read(&changed).is_err(), "byte {at} of {name}");
            }
        }
    }

    #[test]
    fn a_part_that_is_missing_or_left_over_or_of_another_moment_is_noticed() {
        let whole = state();
        let refused = |change: &dyn Fn(&mut State)| {
            let mut state = whole.clone();
            change(&mut state);
            Saved::read(&state).err().expect("it is refused").to_string()
        };
        assert!(refused(&|state| _ = state.parts.remove("prices/1")).contains("part `prices/1` is missing"));
        let copied = refused(&|state| _ = state.parts.insert("prices/1".into(), state.parts["prices/0"].clone()));
        assert!(copied.contains("`prices/0` of 1 is in place of `prices/1` of 2"), "{copied}");
        let extra = refused(&|state| _ = state.parts.insert("prices/2".into(), state.parts["prices/1"].clone()));
        assert!(extra.contains("part `prices/2` is one too many"), "{extra}");
        let older = refused(&|state| {
            let mut draft = Draft::new(None);
            draft.begin(Owner::Prices);
            draft.put("1", true, || Ok(Content::Json(b"{}".to_vec()))).unwrap();
            state.parts.extend(draft.finish(BTreeMap::new(), Vec::new()).0.encode().unwrap().parts);
        });
        assert!(older.contains("`prices/1` of 1 is in place of `prices/1` of 2"), "{older}");
    }

    #[test]
    fn a_part_goes_with_the_first_checkpoint_that_does_not_have_it() {
        let mut state = state();
        let ledger = Saved::read(&state).unwrap().ledger;
        let mut draft = Draft::new(ledger);
        draft.begin(Owner::Prices);
        draft.put("0", false, || panic!("it did not change")).unwrap();
        let changes = draft.finish(BTreeMap::new(), Vec::new()).0.encode().unwrap();
        assert_eq!((changes.gone.as_slice(), changes.whole), (&["prices/1".to_owned()][..], false));
        state.apply(changes);
        assert_eq!(Saved::read(&state).unwrap().prices.len(), 1);
    }

    #[test]
    fn what_was_saved_before_there_were_parts_is_read_whatever_is_beside_it() {
        let head = br#"{"streams":{},"metrics":[],"prices":{"A":{"price":1.5,"at":7}}}"#;
        let rest = [&(head.len() as u32).to_le_bytes(), head.as_slice()].concat();
        let sum = crc32c::crc32c(&rest).to_le_bytes();
        for bytes in [[MAGIC_1.as_slice(), &rest].concat(), [MAGIC_2.as_slice(), &sum, &rest].concat()] {
            let mut old = State { head: bytes, ..state() };
            let mut workspace = Workspace::default();
            assert!(workspace.restore(Saved::read(&old).unwrap()).unwrap().is_empty());
            let next = workspace.save().unwrap().encode().unwrap();
            assert!(next.whole, "nothing of the old ones is left");
            old.apply(next);
            assert_eq!(old.parts.keys().collect::<Vec<_>>(), ["prices/0"]);
            assert_eq!(Saved::read(&old).unwrap().prices[0]["A"], Price { price: 1.5, at: Micros(7) });
        }
        let changed = [MAGIC_2.as_slice(), &[sum[0] ^ 1, sum[1], sum[2], sum[3]], &rest].concat();
        assert!(Saved::read(&State { head: changed, ..State::default() }).is_err());
    }
}
