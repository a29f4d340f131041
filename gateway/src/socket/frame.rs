//! Frames of RFC 6455 and the compression of RFC 7692: writes those of a server, reads those of a client. Knows no socket.

use bytes::BytesMut;
use flate2::{Decompress, FlushDecompress};
use std::borrow::Cow;

/// A header of a server's frame is no longer.
pub(crate) const HEADER_BYTES_MAX: usize = 10;
/// A control frame carries no more.
const CONTROL_BYTES_MAX: usize = 125;
/// A message comes in no more parts: empty ones would never reach a bound in bytes.
const PARTS_MAX: usize = 128 << 10;

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Opcode {
    fn of(bits: u8) -> Option<Opcode> {
        Some(match bits {
            0 => Opcode::Continuation,
            1 => Opcode::Text,
            2 => Opcode::Binary,
            8 => Opcode::Close,
            9 => Opcode::Ping,
            10 => Opcode::Pong,
            _ => return None,
        })
    }

    fn is_control(self) -> bool {
        self as u8 >= 8
    }
}

const FIN: u8 = 0x80;
const COMPRESSED: u8 = 0x40;
const RESERVED: u8 = 0x30;
const MASKED: u8 = 0x80;

/// Appends the header of a whole message.
pub(crate) fn write_header(out: &mut BytesMut, opcode: Opcode, compressed: bool, bytes: usize) {
    let first = FIN | if compressed { COMPRESSED } else { 0 } | opcode as u8;
    match bytes {
        0..=125 => out.extend_from_slice(&[first, bytes as u8]),
        126..=0xffff => {
            out.extend_from_slice(&[first, 126]);
            out.extend_from_slice(&(bytes as u16).to_be_bytes());
        }
        _ => {
            out.extend_from_slice(&[first, 127]);
            out.extend_from_slice(&(bytes as u64).to_be_bytes());
        }
    }
}

/// Appends a whole message.
pub(crate) fn write(out: &mut BytesMut, opcode: Opcode, payload: &[u8]) {
    write_header(out, opcode, false, payload.len());
    out.extend_from_slice(payload);
}

/// Appends a whole message whose payload is compressed.
pub(crate) fn write_compressed(out: &mut BytesMut, opcode: Opcode, payload: &[u8]) {
    write_header(out, opcode, true, payload.len());
    out.extend_from_slice(payload);
}

/// Bytes of the header of a server's frame.
pub(crate) fn header_bytes(frame: &[u8]) -> usize {
    match frame[1] {
        127 => 10,
        126 => 4,
        _ => 2,
    }
}

/// Bytes of the payload of a server's frame.
pub(crate) fn payload_bytes(frame: &[u8]) -> usize {
    match (frame[1], header_bytes(frame)) {
        (_, 10) => frame[2..10].iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
        (_, 4) => usize::from(frame[2]) << 8 | usize::from(frame[3]),
        (length, _) => usize::from(length),
    }
}

/// The payloads of a server's frames.
pub(crate) fn payloads(mut frames: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let header = (!frames.is_empty()).then(|| header_bytes(frames))?;
        let (frame, rest) = frames.split_at_checked(header + payload_bytes(frames))?;
        frames = rest;
        Some(&frame[header..])
    })
}

/// The payload of a close frame.
pub(crate) fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    let reason = &reason[..reason.floor_char_boundary(CONTROL_BYTES_MAX - 2)];
    [&code.to_be_bytes(), reason.as_bytes()].concat()
}

/// What a client sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Message {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong,
    /// With the code that it gave.
    Close(Option<u16>),
}

/// Why a connection cannot go on, as the close says it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Violation {
    pub(crate) code: u16,
    pub(crate) reason: Cow<'static, str>,
}

fn violation<T>(code: u16, reason: &'static str) -> Result<T, Violation> {
    Err(Violation { code, reason: reason.into() })
}

fn too_large<T>(bytes_max: usize) -> Result<T, Violation> {
    let reason = format!("the message is larger than limits.frame_bytes = {bytes_max}");
    Err(Violation { code: 1009, reason: reason.into() })
}

const NOT_UTF8: &str = "a text message is not UTF-8";

/// A message that came in parts, so far.
#[derive(Debug)]
struct Parts {
    opcode: Opcode,
    compressed: bool,
    payload: Vec<u8>,
    count: usize,
    /// Up to here a text is known to be UTF-8.
    checked: usize,
}

/// What a frame is, whether it is the last of its message, and whether that is compressed.
type Kind = (Opcode, bool, bool);

/// Takes apart what a client sends. Holds memory only while a message is incomplete.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Bytes that came and are not read yet.
    buffer: Vec<u8>,
    at: usize,
    parts: Option<Box<Parts>>,
    bytes_max: usize,
    /// Whether compression was agreed on.
    inflates: bool,
}

impl Reader {
    /// `bytes_max` bounds a message, compressed or not.
    pub(crate) fn new(bytes_max: usize, inflates: bool) -> Reader {
        Reader { buffer: Vec::new(), at: 0, parts: None, bytes_max, inflates }
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, if all of it is there.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, Violation> {
        loop {
            let Some((frame, payload)) = self.frame()? else {
                self.forget_read();
                return Ok(None);
            };
            if let Some(message) = self.take(frame, payload)? {
                return Ok(Some(message));
            }
        }
    }

    /// Gives back the memory of what was read.
    fn forget_read(&mut self) {
        if self.at == self.buffer.len() {
            self.buffer = Vec::new();
        } else {
            self.buffer.drain(..self.at);
        }
        self.at = 0;
    }

    /// The next frame: what it is, whether it is the last of its message and compressed, and its payload unmasked.
    fn frame(&mut self) -> Result<Option<(Kind, Vec<u8>)>, Violation> {
        let bytes = &self.buffer[self.at..];
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        let Some(opcode) = Opcode::of(first & 15) else { return violation(1002, "the frame has an unknown opcode") };
        let (is_last, compressed) = (first & FIN != 0, first & COMPRESSED != 0);
        if first & RESERVED != 0 || (compressed && !self.may_be_compressed(opcode)) {
            return violation(1002, "the frame has a reserved bit set");
        }
        if second & MASKED == 0 {
            return violation(1002, "frames of a client are masked");
        }
        if opcode.is_control() && !is_last {
            return violation(1002, "a control frame comes in one part");
        }
        match (opcode, &self.parts) {
            (Opcode::Continuation, None) => return violation(1002, "there is no message to continue"),
            (Opcode::Text | Opcode::Binary, Some(_)) => {
                return violation(1002, "the message before this one is not complete");
            }
            _ => {}
        }
        let (length, rest) = match second & !MASKED {
            126 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from(u16::from_be_bytes(*length)), rest)
            }
            127 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from_be_bytes(*length), rest)
            }
            short => (u64::from(short), rest),
        };
        if opcode.is_control() && length > CONTROL_BYTES_MAX as u64 {
            return violation(1002, "a control frame has at most 125 bytes");
        }
        let before = self.parts.as_ref().map_or(0, |parts| parts.payload.len());
        if !opcode.is_control() && length > (self.bytes_max - before) as u64 {
            return too_large(self.bytes_max);
        }
        let Some((mask, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let header = bytes.len() - rest.len();
        let Some(payload) = rest.get(..length as usize) else { return Ok(None) };
        let payload = payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
        self.at += header + length as usize;
        Ok(Some(((opcode, is_last, compressed), payload)))
    }

    fn may_be_compressed(&self, opcode: Opcode) -> bool {
        self.inflates && matches!(opcode, Opcode::Text | Opcode::Binary)
    }

    /// What a frame completes.
    fn take(&mut self, (opcode, is_last, compressed): Kind, payload: Vec<u8>) -> Result<Option<Message>, Violation> {
        match opcode {
            Opcode::Ping => return Ok(Some(Message::Ping(payload))),
            Opcode::Pong => return Ok(Some(Message::Pong)),
            Opcode::Close => return close(&payload).map(|code| Some(Message::Close(code))),
            Opcode::Text | Opcode::Binary if is_last => {
                return self.message(opcode, compressed, payload).map(Some);
            }
            Opcode::Text | Opcode::Binary => {
                self.parts = Some(Box::new(Parts { opcode, compressed, payload, count: 1, checked: 0 }));
            }
            Opcode::Continuation => {
                let Some(parts) = &mut self.parts else { return violation(1002, "there is no message to continue") };
                parts.payload.extend_from_slice(&payload);
                parts.count += 1;
                if parts.count > PARTS_MAX {
                    return violation(1009, "the message has too many parts");
                }
            }
        }
        if is_last && let Some(parts) = self.parts.take() {
            return self.message(parts.opcode, parts.compressed, parts.payload).map(Some);
        }
        if let Some(parts) = &mut self.parts
            && parts.opcode == Opcode::Text
            && !parts.compressed
        {
            parts.checked += may_become_utf8(&parts.payload[parts.checked..])?;
        }
        Ok(None)
    }

    fn message(&self, opcode: Opcode, compressed: bool, payload: Vec<u8>) -> Result<Message, Violation> {
        let payload = if compressed { inflate(payload, self.bytes_max)? } else { payload };
        match opcode {
            Opcode::Text => match String::from_utf8(payload) {
                Ok(text) => Ok(Message::Text(text)),
                Err(_) => violation(1007, NOT_UTF8),
            },
            _ => Ok(Message::Binary(payload)),
        }
    }
}

/// How much of a text's beginning is UTF-8, where what is behind may be the start of a character.
fn may_become_utf8(text: &[u8]) -> Result<usize, Violation> {
    match std::str::from_utf8(text) {
        Ok(text) => Ok(text.len()),
        Err(error) if error.error_len().is_none() => Ok(error.valid_up_to()),
        Err(_) => violation(1007, NOT_UTF8),
    }
}

/// The code of a close frame.
fn close(payload: &[u8]) -> Result<Option<u16>, Violation> {
    let (code, reason) = match payload {
        [] => return Ok(None),
        [_] => return violation(1002, "a close frame has no code or two bytes of it"),
        [high, low, reason @ ..] => (u16::from_be_bytes([*high, *low]), reason),
    };
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return violation(1002, "the code of the close frame is not to be sent");
    }
    if std::str::from_utf8(reason).is_err() {
        return violation(1007, "the reason of the close frame is not UTF-8");
    }
    Ok(Some(code))
}

/// A message as it was before it was compressed, up to `bytes_max` bytes.
fn inflate(mut payload: Vec<u8>, bytes_max: usize) -> Result<Vec<u8>, Violation> {
    payload.extend_from_slice(&[0, 0, 0xff, 0xff]); // what the sender left out, RFC 7692 section 7.2.2
    let mut inflate = Decompress::new(false);
    let mut out = Vec::with_capacity((payload.len() * 2).min(bytes_max + 1));
    loop {
        let (read, had) = (inflate.total_in() as usize, out.len());
        if inflate.decompress_vec(&payload[read..], &mut out, FlushDecompress::Sync).is_err() {
            return violation(1007, "the compressed message cannot be read");
        }
        if out.len() > bytes_max {
            return too_large(bytes_max);
        }
        let stands = inflate.total_in() as usize == read && out.len() == had;
        if out.len() < out.capacity() && (inflate.total_in() as usize == payload.len() || stands) {
            return Ok(out);
        }
        out.reserve(out.capacity().min(bytes_max + 1 - out.len()).max(1));
    }
}

#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
mod sent;
#[cfg(test)]
mod tests;
