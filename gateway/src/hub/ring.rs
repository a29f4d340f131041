//! The newest messages of a channel as they go over the wire: encoded once, one behind the other, so that a client that
//! is any number of messages behind gets them all as one slice of shared bytes.

use crate::socket::frame::{self, Opcode};
use bytes::{Bytes, BytesMut};
use flate2::{Compress, Compression, FlushCompress};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A chunk is complete at this many bytes: what a socket takes in one go.
const CHUNK_BYTES: usize = 64 << 10;
/// A chunk smaller than this takes in the next one: who is a few messages behind gets them as one piece.
const SMALL_BYTES: usize = 16 << 10;
/// So many chunks make up a full history, at least: the oldest goes as a whole.
const CHUNKS: usize = 8;
/// A text message is compressed from this many bytes on: a smaller one gains little for the work.
const DEFLATED_FROM: usize = 1 << 10;

/// How a client wants its messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Form {
    /// Text frames of JSON.
    #[default]
    Text,
    /// The same, large ones compressed each by itself (RFC 7692, no context takeover).
    Deflated,
    /// Binary frames of MessagePack: the same document.
    Packed,
}

impl Form {
    /// One JSON message as frames of this form; not worth compressing.
    pub(crate) fn frame(self, json: &str) -> Bytes {
        let mut out = BytesMut::with_capacity(json.len() + frame::HEADER_BYTES_MAX);
        match self {
            Form::Text | Form::Deflated => frame::write(&mut out, Opcode::Text, json.as_bytes()),
            Form::Packed => frame::write(&mut out, Opcode::Binary, &packed(json.as_bytes())),
        }
        out.freeze()
    }

    /// A binary message of a client as the JSON it stands for; nothing where only text is spoken.
    pub(crate) fn read(self, bytes: &[u8]) -> Option<Result<String, String>> {
        (self == Form::Packed).then(|| unpacked(bytes))
    }
}

/// The JSON that MessagePack stands for. Names that stand twice do so there too, for whoever reads it to refuse them.
fn unpacked(mut bytes: &[u8]) -> Result<String, String> {
    let document = Document::deserialize(&mut rmp_serde::Deserializer::new(&mut bytes));
    let document = document.map_err(|error| error.to_string())?;
    match bytes.len() {
        0 => serde_json::to_string(&document).map_err(|error| error.to_string()),
        rest => Err(format!("{rest} bytes follow the document")),
    }
}

/// A JSON document in which a name may stand more than once.
enum Document {
    Object(Vec<(String, Document)>),
    Array(Vec<Document>),
    Plain(Value),
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Document::Object(members) => serializer.collect_map(members.iter().map(|(name, value)| (name, value))),
            Document::Array(values) => serializer.collect_seq(values),
            Document::Plain(value) => value.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Document, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Document;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("what JSON can hold")
    }

    fn visit_unit<E>(self) -> Result<Document, E> {
        Ok(Document::Plain(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Document, E> {
        Ok(Document::Plain(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Document, E> {
        Ok(Document::Plain(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Document, E> {
        Ok(Document::Plain(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Document, E> {
        Ok(Document::Plain(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Document, E> {
        Ok(Document::Plain(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Document, E> {
        Ok(Document::Plain(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Document, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = values.next_element()? {
            all.push(value);
        }
        Ok(Document::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Document, A::Error> {
        let mut all = Vec::new();
        while let Some(member) = members.next_entry()? {
            all.push(member);
        }
        Ok(Document::Object(all))
    }
}

/// A JSON document as MessagePack. What we wrote ourselves is JSON.
fn packed(json: &[u8]) -> Vec<u8> {
    let document: Value = serde_json::from_slice(json).expect("a message of ours is JSON");
    rmp_serde::to_vec(&document).expect("a JSON document has a MessagePack form")
}

thread_local! {
    // a compressor takes some hundred KiB to set up
    static COMPRESS: RefCell<Compress> = RefCell::new(Compress::new(Compression::fast(), false));
}

/// A text as DEFLATE blocks without the four bytes that RFC 7692 leaves out.
fn deflated(text: &[u8]) -> Vec<u8> {
    COMPRESS.with_borrow_mut(|compress| {
        compress.reset();
        let mut out = Vec::with_capacity(text.len() / 2 + 64);
        loop {
            let read = compress.total_in() as usize;
            compress
                .compress_vec(&text[read..], &mut out, FlushCompress::Sync)
                .expect("memory is the only thing a compressor needs");
            if compress.total_in() as usize == text.len() && out.len() < out.capacity() {
                break;
            }
            out.reserve(out.capacity());
        }
        out.truncate(out.len() - 4);
        out
    })
}

/// Where a message ends in its chunk.
#[derive(Clone, Copy, Debug)]
struct Mark {
    offset: u64,
    end: u32,
    /// It counts by itself: it does not change a state.
    is_event: bool,
}

/// Messages one behind the other, as frames of each form that somebody wanted.
#[derive(Debug)]
pub(super) struct Chunk {
    marks: Box<[Mark]>,
    text: Bytes,
    deflated: OnceLock<Encoded>,
    packed: OnceLock<Encoded>,
    /// Bytes of the channel's text before this chunk.
    start: u64,
    /// When its first message came.
    since: Instant,
}

#[derive(Debug)]
struct Encoded {
    bytes: Bytes,
    ends: Box<[u32]>,
}

impl Chunk {
    /// One message that is in no channel's history.
    pub(super) fn single(head: &str, offset: u64, merged: u64, event: &str, since: Instant) -> Chunk {
        let mut text = BytesMut::new();
        write(&mut text, head, offset, merged, event);
        let marks = Box::new([Mark { offset, end: text.len() as u32, is_event: false }]);
        let (deflated, packed) = (OnceLock::new(), OnceLock::new());
        Chunk { marks, text: text.freeze(), deflated, packed, start: 0, since }
    }

    /// Offset of its last message.
    fn last(&self) -> u64 {
        self.marks.last().map_or(0, |mark| mark.offset)
    }

    /// All of its messages.
    pub(super) fn whole(&self, form: Form) -> Bytes {
        self.range(0, self.marks.len(), form)
    }

    /// The messages behind `offset`.
    fn after(&self, offset: u64, form: Form) -> Bytes {
        self.range(self.index(offset), self.marks.len(), form)
    }

    fn index(&self, offset: u64) -> usize {
        self.marks.partition_point(|mark| mark.offset <= offset)
    }

    /// It and what came behind it; nothing where somebody has asked for another form of it, which would be made again.
    fn with(&self, text: &[u8], marks: &[Mark]) -> Option<Chunk> {
        if self.deflated.get().is_some() || self.packed.get().is_some() {
            return None;
        }
        let before = self.text.len() as u32;
        let shifted = marks.iter().map(|mark| Mark { end: before + mark.end, ..*mark });
        let marks = self.marks.iter().copied().chain(shifted).collect();
        let text = [&self.text[..], text].concat().into();
        let (deflated, packed) = (OnceLock::new(), OnceLock::new());
        Some(Chunk { marks, text, deflated, packed, start: self.start, since: self.since })
    }

    fn range(&self, from: usize, to: usize, form: Form) -> Bytes {
        let bounds = |end: &dyn Fn(usize) -> u32| {
            let before = |at: usize| at.checked_sub(1).map_or(0, |at| end(at) as usize);
            before(from)..before(to)
        };
        let encoded = match form {
            Form::Text => return self.text.slice(bounds(&|at| self.marks[at].end)),
            Form::Deflated => self.deflated.get_or_init(|| self.encode(deflate)),
            Form::Packed => self.packed.get_or_init(|| self.encode(pack)),
        };
        encoded.bytes.slice(bounds(&|at| encoded.ends[at]))
    }

    fn encode(&self, one: impl Fn(&mut BytesMut, &[u8])) -> Encoded {
        let mut bytes = BytesMut::with_capacity(self.text.len());
        let mut ends = Vec::with_capacity(self.marks.len());
        let mut from = 0;
        for mark in &self.marks {
            let whole = &self.text[from..mark.end as usize];
            one(&mut bytes, &whole[frame::header_bytes(whole)..]);
            ends.push(bytes.len() as u32);
            from = mark.end as usize;
        }
        Encoded { bytes: bytes.freeze(), ends: ends.into() }
    }
}

fn pack(out: &mut BytesMut, text: &[u8]) {
    frame::write(out, Opcode::Binary, &packed(text));
}

fn deflate(out: &mut BytesMut, text: &[u8]) {
    if text.len() < DEFLATED_FROM {
        return frame::write(out, Opcode::Text, text);
    }
    let small = deflated(text);
    if small.len() < text.len() {
        frame::write_compressed(out, Opcode::Text, &small);
    } else {
        frame::write(out, Opcode::Text, text);
    }
}

/// Decimal digits of a number.
fn digits(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// Appends one message as a text frame. `head` is all of it up to its offset.
fn write(out: &mut BytesMut, head: &str, offset: u64, merged: u64, event: &str) {
    const EVENT: &str = ",\"event\":";
    const MERGED: &str = ",\"merged\":";
    let merged_bytes = if merged > 1 { MERGED.len() + digits(merged) } else { 0 };
    let bytes = head.len() + digits(offset) + merged_bytes + EVENT.len() + event.len() + 1;
    out.reserve(bytes + frame::HEADER_BYTES_MAX);
    frame::write_header(out, Opcode::Text, false, bytes);
    out.extend_from_slice(head.as_bytes());
    _ = write!(out, "{offset}"); // there is room for all of it
    if merged > 1 {
        _ = write!(out, "{MERGED}{merged}");
    }
    out.extend_from_slice(EVENT.as_bytes());
    out.extend_from_slice(event.as_bytes());
    out.extend_from_slice(b"}");
}

/// How much of the past is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) events: usize,
    pub(super) bytes: usize,
    pub(super) age: Duration,
}

impl Bounds {
    /// Whether a chunk of this size and age is complete: the oldest goes as a whole.
    fn is_chunk_full(&self, bytes: usize, events: usize, age: Duration) -> bool {
        bytes >= CHUNK_BYTES.min(self.bytes / CHUNKS)
            || events >= self.events / CHUNKS
            || age >= self.age / CHUNKS as u32
    }
}

/// The newest messages of a channel.
pub(super) struct Ring {
    chunks: VecDeque<Arc<Chunk>>,
    tail: BytesMut,
    marks: Vec<Mark>,
    /// When the first message of the tail came.
    since: Instant,
    /// Messages that are held.
    events: usize,
    /// Bytes of text that came ever, and of those that are gone.
    end: u64,
    gone: u64,
    /// Everything behind this offset is held.
    from: u64,
    bounds: Bounds,
    /// Whether a chunk was made since the last look at the bounds.
    is_untrimmed: bool,
}

impl Ring {
    /// Holds nothing; the first message comes behind `from`.
    pub(super) fn new(bounds: Bounds, from: u64, now: Instant) -> Ring {
        let (chunks, tail, marks) = (VecDeque::new(), BytesMut::new(), Vec::new());
        Ring { chunks, tail, marks, since: now, events: 0, end: 0, gone: 0, from, bounds, is_untrimmed: false }
    }

    /// Holds nothing any more; the next message comes behind `from`.
    pub(super) fn restart(&mut self, from: u64, now: Instant) {
        *self = Ring::new(self.bounds, from, now);
    }

    /// Bytes that are held.
    pub(super) fn bytes(&self) -> usize {
        (self.end - self.gone) as usize
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events == 0
    }

    /// Everything behind this offset is held.
    pub(super) fn from(&self) -> u64 {
        self.from
    }

    /// Offset of the last message that came.
    pub(super) fn last(&self) -> u64 {
        let newest = self.marks.last().map(|mark| mark.offset).or_else(|| self.chunks.back().map(|chunk| chunk.last()));
        newest.unwrap_or(self.from)
    }

    /// Whether all messages behind `offset` are held.
    pub(super) fn holds(&self, offset: u64) -> bool {
        offset >= self.from
    }

    /// Appends a message: its bytes.
    pub(super) fn push(&mut self, head: &str, offset: u64, event: &str, is_event: bool, now: Instant) -> usize {
        if self.marks.is_empty() {
            self.since = now;
        }
        let before = self.tail.len();
        write(&mut self.tail, head, offset, 1, event);
        let bytes = self.tail.len() - before;
        self.marks.push(Mark { offset, end: self.tail.len() as u32, is_event });
        self.events += 1;
        self.end += bytes as u64;
        if self.bounds.is_chunk_full(self.tail.len(), self.marks.len(), now.saturating_duration_since(self.since)) {
            self.seal();
        }
        bytes
    }

    /// Makes a chunk of what came since the last one.
    pub(super) fn seal(&mut self) {
        if self.marks.is_empty() {
            return;
        }
        self.is_untrimmed = true;
        let fits = |last: &Chunk| {
            let (bytes, events) = (last.text.len() + self.tail.len(), last.marks.len() + self.marks.len());
            let age = self.since.saturating_duration_since(last.since);
            last.text.len() < SMALL_BYTES && !self.bounds.is_chunk_full(bytes, events, age)
        };
        if let Some(last) = self.chunks.back_mut().filter(|last| fits(last))
            && let Some(both) = last.with(&self.tail, &self.marks)
        {
            *last = Arc::new(both);
            self.tail.clear();
            self.marks.clear();
            return;
        }
        let text = self.tail.split().freeze();
        let start = self.end - text.len() as u64;
        let marks = std::mem::take(&mut self.marks).into_boxed_slice();
        let (deflated, packed) = (OnceLock::new(), OnceLock::new());
        self.chunks.push_back(Arc::new(Chunk { marks, text, deflated, packed, start, since: self.since }));
    }

    /// The chunks with messages behind `offset`.
    fn behind(&mut self, offset: u64) -> impl Iterator<Item = &Arc<Chunk>> {
        self.seal();
        // who keeps up is in the last chunk
        let from = self.chunks.iter().rposition(|chunk| chunk.last() <= offset).map_or(0, |at| at + 1);
        self.chunks.range(from..)
    }

    /// Bytes of text behind `offset`, as far as they are held.
    pub(super) fn bytes_behind(&mut self, offset: u64) -> usize {
        let end = self.end;
        let start = self.behind(offset).next().map(|chunk| {
            let at = chunk.index(offset).checked_sub(1).map_or(0, |at| chunk.marks[at].end);
            chunk.start + u64::from(at)
        });
        start.map_or(0, |start| (end - start) as usize)
    }

    /// Messages behind `offset`, whole chunks until `room` bytes are full: up to which offset.
    pub(super) fn take(&mut self, offset: u64, form: Form, room: &mut usize, out: &mut Vec<Bytes>) -> u64 {
        let mut reached = offset;
        for chunk in self.behind(offset) {
            if *room == 0 {
                break;
            }
            let part = chunk.after(reached, form);
            *room = room.saturating_sub(part.len());
            reached = chunk.last();
            out.push(part);
        }
        reached
    }

    /// Of the messages behind `offset`, those that do not change a state: how many there are.
    pub(super) fn take_events(&mut self, offset: u64, form: Form, out: &mut Vec<Bytes>) -> usize {
        let before = out.len();
        for chunk in self.behind(offset) {
            let events = (chunk.index(offset)..chunk.marks.len()).filter(|at| chunk.marks[*at].is_event);
            out.extend(events.map(|at| chunk.range(at, at + 1, form)));
        }
        out.len() - before
    }

    /// Whether there may be something to drop.
    pub(super) fn is_untrimmed(&self) -> bool {
        self.is_untrimmed
    }

    /// Whether the oldest messages are over the bounds, but for what is `scarce`.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let too_old = |since: Instant| now.saturating_duration_since(since) > self.bounds.age;
        self.events > self.bounds.events
            || self.bytes() > self.bounds.bytes
            || self.chunks.front().map_or(!self.marks.is_empty() && too_old(self.since), |oldest| too_old(oldest.since))
    }

    /// Drops what is over the bounds, oldest first. `slowest`: a client is still at this offset; what it needs stays up
    /// to `slack` bytes. Where memory is `scarce`, only the newest message stays. Returns the bytes that were dropped.
    pub(super) fn trim(&mut self, slowest: Option<u64>, slack: usize, scarce: bool, now: Instant) -> usize {
        self.is_untrimmed = false;
        let before = self.gone;
        if !self.marks.is_empty() && now.saturating_duration_since(self.since) > self.bounds.age {
            self.seal();
        }
        while let Some(oldest) = self.chunks.front() {
            let over = self.is_over(now) || (scarce && (self.chunks.len() > 1 || !self.marks.is_empty()));
            let end = oldest.start + oldest.text.len() as u64;
            let is_needed = (self.end - end) as usize <= slack && slowest.is_some_and(|at| at < oldest.last());
            if !over || is_needed {
                break;
            }
            self.events -= oldest.marks.len();
            self.gone = end;
            self.from = oldest.last();
            self.chunks.pop_front();
        }
        (self.gone - before) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { events: 1_000, bytes: 1 << 20, age: Duration::from_secs(80) };

    /// Pushes messages with a reader that has each at once: the pieces that another one gets of all of them.
    fn pieces(ring: &mut Ring, messages: u64, every: Duration) -> Vec<Bytes> {
        let mut now = Instant::now();
        for offset in 1..=messages {
            ring.push("{\"offset\":", offset, "{\"text\":\"hello\"}", true, now);
            let (mut room, mut out) = (1 << 20, Vec::new());
            assert_eq!(ring.take(offset - 1, Form::Text, &mut room, &mut out), offset);
            assert_eq!(frame::payloads(&out.concat()).count(), 1, "the one that is new");
            now += every;
        }
        let (mut room, mut out) = (1 << 20, Vec::new());
        assert_eq!(ring.take(0, Form::Text, &mut room, &mut out), messages);
        let all = out.concat();
        let offsets: Vec<u64> = frame::payloads(&all)
            .map(|payload| serde_json::from_slice::<Value>(payload).unwrap()["offset"].as_u64().unwrap())
            .collect();
        assert!(offsets.into_iter().eq(1..=messages));
        out
    }

    #[test]
    fn who_is_a_few_messages_behind_gets_them_in_one_piece() {
        let start = Instant::now();
        let mut ring = Ring::new(BOUNDS, 0, start);
        assert_eq!(pieces(&mut ring, 100, Duration::ZERO).len(), 1);
        // but chunks stay as many as the history needs, so that little of it goes at a time
        let mut ring = Ring::new(BOUNDS, 0, start);
        assert!(pieces(&mut ring, 990, Duration::ZERO).len() >= CHUNKS);
        let mut ring = Ring::new(BOUNDS, 0, start);
        assert!(pieces(&mut ring, 79, Duration::from_secs(1)).len() >= CHUNKS - 1, "none spans an eighth of the age");
    }

    #[test]
    fn what_somebody_has_in_another_form_is_not_encoded_again() {
        let now = Instant::now();
        let mut ring = Ring::new(BOUNDS, 0, now);
        for offset in 1..=10 {
            ring.push("{\"offset\":", offset, "1", true, now);
            for form in [Form::Packed, Form::Text] {
                let (mut room, mut out) = (1 << 20, Vec::new());
                ring.take(offset - 1, form, &mut room, &mut out);
                assert_eq!(frame::payloads(&out.concat()).count(), 1);
            }
        }
        assert_eq!(ring.chunks.len(), 10);
    }
}
