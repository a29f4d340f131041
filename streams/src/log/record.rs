//! One record as bytes, with its checksum.
//!
//! ```text
//! prefix, the writer:  length u32 | crc32c u32 | offset u64 | schema u32 | group u32
//! rest, the caller:    kind u8 | flags u8 | workspace | stream | least ts i64, greatest ts i64 | payload
//! ```
//! Little-endian. `length` counts all of it, `schema` is the position in the file of the schema record that a
//! batch was written with, `group` is how many bytes before the record those begin that became durable with it,
//! a name is its length in a byte and its text, the two `ts` are there when flagged.
//! The checksum runs over the rest, then the prefix without itself, then the salt of the file: a caller can do
//! the long part before the writer knows the place, and nobody outside can write an event whose bytes pass for
//! a record where a reader looks for the next good one.

use super::batch::{self, EncodedSchema};
use super::{Body, Filter, Record, Refused};
use arrow::array::{Array, AsArray};
use arrow::compute;
use arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use engine::event::{Micros, StreamName, WorkspaceId};
use std::sync::Arc;

/// Bytes in front of the rest of a record.
pub(super) const PREFIX: usize = 24;
/// The shortest rest: kind, flags and two empty names, as a schema record has them.
const REST_MIN: usize = 4;

const SCHEMA: u8 = 0;
const EVENTS: u8 = 1;
const ADVANCE: u8 = 2;
const REFUSED: u8 = 4;
/// No record of a workspace: says that all before it is durable.
const SEAL: u8 = 3;

const HAS_IDS: u8 = 1;
const HAS_TS: u8 = 2;

/// A record ready but for its place.
pub(super) struct Draft {
    bytes: Vec<u8>,
    rest_crc: u32,
    /// What the record's batch is to be read with; the writer sees to it that the file has it.
    pub(super) schema: Option<Arc<EncodedSchema>>,
}

impl Draft {
    /// `schema`: that of the record's batch, made by the caller, who keeps one for many.
    pub(super) fn events(
        workspace: &WorkspaceId,
        stream: &StreamName,
        batch: &RecordBatch,
        schema: Arc<EncodedSchema>,
    ) -> Result<Draft, ArrowError> {
        let has_ids = batch.column_by_name("id").is_some_and(|ids| ids.null_count() < ids.len());
        let mut bytes = head(EVENTS, has_ids, workspace.as_str(), stream.as_str(), ts_range(batch));
        batch::encode(batch, &schema, &mut bytes)?;
        Ok(Self::new(bytes, Some(schema)))
    }

    pub(super) fn advance(workspace: &WorkspaceId, stream: &StreamName, frontier: Micros) -> Draft {
        Self::new(head(ADVANCE, false, workspace.as_str(), stream.as_str(), Some((frontier, frontier))), None)
    }

    pub(super) fn refused(
        workspace: &WorkspaceId,
        stream: &StreamName,
        events: &[Refused],
    ) -> Result<Draft, serde_json::Error> {
        let mut bytes = head(REFUSED, false, workspace.as_str(), stream.as_str(), None);
        serde_json::to_writer(&mut bytes, events)?;
        Ok(Self::new(bytes, None))
    }

    pub(super) fn schema(schema: &EncodedSchema) -> Draft {
        let mut bytes = head(SCHEMA, false, "", "", None);
        bytes.extend_from_slice(&schema.ipc);
        Self::new(bytes, None)
    }

    /// Bears the offset of the record after it, as a schema does. What comes before it was told durable, so a
    /// fault there is no torn write.
    pub(super) fn seal_of_all() -> Draft {
        Self::new(head(SEAL, false, "", "", None), None)
    }

    fn new(bytes: Vec<u8>, schema: Option<Arc<EncodedSchema>>) -> Draft {
        let rest_crc = crc32c::crc32c(&bytes[PREFIX..]);
        Self { bytes, rest_crc, schema }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whose it is.
    pub(super) fn workspace(&self) -> &str {
        workspace_in(&self.bytes)
    }

    /// Appends the record to `out`, at its place. A schema record bears the offset of the record after it.
    /// All of `out` becomes durable together.
    pub(super) fn seal(mut self, offset: u64, schema: u64, salt: u32, out: &mut Vec<u8>) {
        let half = |value: u64| u32::try_from(value).expect("records and files are below 4 GiB");
        let length = half(self.bytes.len() as u64);
        self.bytes[..4].copy_from_slice(&length.to_le_bytes());
        self.bytes[8..16].copy_from_slice(&offset.to_le_bytes());
        self.bytes[16..20].copy_from_slice(&half(schema).to_le_bytes());
        self.bytes[20..24].copy_from_slice(&half(out.len() as u64).to_le_bytes());
        let crc = seal_crc(self.rest_crc, &self.bytes, salt);
        self.bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&self.bytes);
    }
}

/// Room for the prefix, then the rest up to the payload.
fn head(kind: u8, has_ids: bool, workspace: &str, stream: &str, ts: Option<(Micros, Micros)>) -> Vec<u8> {
    let mut bytes = vec![0; PREFIX];
    bytes.push(kind);
    bytes.push(if has_ids { HAS_IDS } else { 0 } | if ts.is_some() { HAS_TS } else { 0 });
    for name in [workspace, stream] {
        bytes.push(u8::try_from(name.len()).expect("names are at most 128 bytes: checked when they were made"));
        bytes.extend_from_slice(name.as_bytes());
    }
    if let Some((least, greatest)) = ts {
        bytes.extend_from_slice(&least.0.to_le_bytes());
        bytes.extend_from_slice(&greatest.0.to_le_bytes());
    }
    bytes
}

/// Least and greatest event time of a batch; `None` without rows or without a `ts` column in microseconds.
fn ts_range(batch: &RecordBatch) -> Option<(Micros, Micros)> {
    let ts = batch.column_by_name("ts")?.as_primitive_opt::<TimestampMicrosecondType>()?;
    Some((Micros(compute::min(ts)?), Micros(compute::max(ts)?)))
}

fn seal_crc(rest_crc: u32, prefix: &[u8], salt: u32) -> u32 {
    let crc = crc32c::crc32c_append(rest_crc, &prefix[..4]);
    let crc = crc32c::crc32c_append(crc, &prefix[8..PREFIX]);
    crc32c::crc32c_append(crc, &salt.to_le_bytes())
}

/// Makes the checksums of the records in `bytes` right, whatever they say: what is behind them is then read too.
#[cfg(any(test, fuzzing))]
pub(super) fn reseal(mut bytes: &mut [u8], salt: u32) {
    while let Some((length, _)) = bytes.get(..PREFIX).and_then(claims) {
        let Some(record) = bytes.split_off_mut(..length) else { break };
        let crc = seal_crc(crc32c::crc32c(&record[PREFIX..]), &record[..PREFIX], salt);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Length and offset that a prefix claims, before its checksum is known to be right; `None` when no record can
/// begin so. `bytes`: at least [`PREFIX`] of them.
pub(super) fn claims(bytes: &[u8]) -> Option<(usize, u64)> {
    let length = u32_at(bytes, 0) as usize;
    (length >= PREFIX + REST_MIN).then(|| (length, u64_at(bytes, 8)))
}

/// The workspace of a record that a draft was sealed into.
pub(super) fn workspace_in(record: &[u8]) -> &str {
    name(&mut &record[PREFIX + 2..]).expect("a draft's name is whole")
}

/// One intact record in a buffer.
pub(super) struct Frame<'a> {
    pub(super) offset: u64,
    /// Position in the file of the schema of a batch.
    pub(super) schema: u64,
    /// How many bytes before it those begin that became durable together with it.
    pub(super) group: u64,
    kind: u8,
    has_ids: bool,
    pub(super) workspace: &'a str,
    stream: &'a str,
    ts: Option<(Micros, Micros)>,
    payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Reads the record that `bytes` are: `None` when its checksum or its form is wrong.
    pub(super) fn read(bytes: &'a [u8], salt: u32) -> Option<Frame<'a>> {
        if bytes.len() < PREFIX + REST_MIN || u32_at(bytes, 0) as usize != bytes.len() {
            return None;
        }
        let (prefix, mut rest) = bytes.split_at(PREFIX);
        if seal_crc(crc32c::crc32c(rest), prefix, salt) != u32_at(prefix, 4) {
            return None;
        }
        let kind = *rest.split_off_first()?;
        let flags = *rest.split_off_first()?;
        let workspace = name(&mut rest)?;
        let stream = name(&mut rest)?;
        let mut ts = None;
        if flags & HAS_TS != 0 {
            let range = rest.split_off(..16)?;
            ts = Some((Micros(u64_at(range, 0) as i64), Micros(u64_at(range, 8) as i64)));
        }
        Some(Frame {
            offset: u64_at(prefix, 8),
            schema: u64::from(u32_at(prefix, 16)),
            group: u64::from(u32_at(prefix, 20)),
            kind,
            has_ids: flags & HAS_IDS != 0,
            workspace,
            stream,
            ts,
            payload: rest,
        })
    }

    pub(super) fn is_seal(&self) -> bool {
        self.kind == SEAL
    }

    /// Whether this is the log's own and no workspace's: a schema or a seal.
    pub(super) fn is_internal(&self) -> bool {
        matches!(self.kind, SCHEMA | SEAL)
    }

    /// Whether the record is a batch, which takes a schema to decode.
    pub(super) fn is_events(&self) -> bool {
        self.kind == EVENTS
    }

    pub(super) fn matches(&self, only: &Filter) -> bool {
        only.workspace.as_ref().is_none_or(|workspace| workspace.as_str() == self.workspace)
            && only.stream.as_ref().is_none_or(|stream| stream.as_str() == self.stream)
            && (self.has_ids || !only.with_ids)
            && match (&only.ts, self.ts) {
                (Some(wanted), Some((least, greatest))) => least <= *wanted.end() && greatest >= *wanted.start(),
                _ => true,
            }
    }

    /// The schema that this schema record holds.
    pub(super) fn decode_schema(&self) -> Result<SchemaRef, String> {
        if self.kind == SCHEMA {
            batch::decode_schema(self.payload).map_err(text)
        } else {
            Err("no schema here".to_owned())
        }
    }

    /// The record; `schema` is that of its batch, `None` for a record without one. The error is a reason.
    pub(super) fn decode(&self, schema: Option<SchemaRef>) -> Result<Record, String> {
        let workspace = self.workspace.parse().map_err(text)?;
        let stream = self.stream.parse().map_err(text)?;
        let body = match (self.kind, schema, self.ts) {
            (EVENTS, Some(schema), _) => {
                Body::Events { stream, batch: batch::decode(self.payload, schema).map_err(text)? }
            }
            (ADVANCE, None, Some((frontier, _))) => Body::Advance { stream, frontier },
            (REFUSED, None, _) => Body::Refused { stream, events: serde_json::from_slice(self.payload).map_err(text)? },
            (kind, ..) => return Err(format!("record of kind {kind}, unknown to this version")),
        };
        Ok(Record { workspace, body })
    }
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn name<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::from(*rest.split_off_first()?);
    std::str::from_utf8(rest.split_off(..length)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::tests::trades;
    use crate::schema::built_in;

    const SALT: u32 = 7;

    fn sealed(draft: Draft) -> Vec<u8> {
        let mut bytes = Vec::new();
        draft.seal(3, 48, SALT, &mut bytes);
        bytes
    }

    fn one_trade() -> Vec<u8> {
        let schema = Arc::new(EncodedSchema::new(built_in()[0].arrow()));
        let (workspace, stream) = ("alpha".parse().unwrap(), "market.trades".parse().unwrap());
        sealed(Draft::events(&workspace, &stream, &trades(1, 1), schema).unwrap())
    }

    #[test]
    fn a_record_reads_back_with_what_it_is_found_by() {
        let bytes = one_trade();
        let frame = Frame::read(&bytes, SALT).unwrap();
        assert_eq!((frame.offset, frame.schema), (3, 48));
        let record = frame.decode(Some(built_in()[0].arrow().clone())).unwrap();
        let stream = "market.trades".parse().unwrap();
        assert_eq!(record.body, Body::Events { stream, batch: trades(1, 1) });

        let at = |from, to| Filter { ts: Some(Micros(from)..=Micros(to)), ..Filter::default() };
        let (ts, _) = ts_range(&trades(1, 1)).unwrap();
        assert!(frame.matches(&at(ts.0, ts.0)) && frame.matches(&at(i64::MIN, i64::MAX)));
        assert!(!frame.matches(&at(ts.0 + 1, i64::MAX)) && !frame.matches(&at(0, ts.0 - 1)));
        assert!(frame.matches(&Filter { with_ids: true, ..Filter::default() }));
    }

    #[test]
    fn refused_events_read_back_as_they_came() {
        let (workspace, stream): (_, StreamName) = ("alpha".parse().unwrap(), "market.trades".parse().unwrap());
        let (code, detail, payload) =
            ("bad_type".to_owned(), "price is no number".to_owned(), "{\"price\": \"\u{1}é\"}".to_owned());
        let events = vec![Refused { at: Micros(-7), code, detail, payload }];
        let bytes = sealed(Draft::refused(&workspace, &stream, &events).unwrap());
        let record = Frame::read(&bytes, SALT).unwrap().decode(None).unwrap();
        assert_eq!(record, Record { workspace, body: Body::Refused { stream, events } });
    }

    #[test]
    fn one_trade_costs_less_than_256_bytes() {
        let length = one_trade().len();
        assert!(length < 256, "{length} bytes");
    }

    #[test]
    fn a_change_of_any_bit_is_noticed_and_so_is_the_wrong_salt() {
        let bytes = one_trade();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::read(&changed, SALT).is_none(), "bit {bit}");
        }
        assert!(Frame::read(&bytes, SALT + 1).is_none());
    }
}
