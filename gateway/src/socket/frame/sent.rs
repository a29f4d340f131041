//! Frames as a client sends them, for tests and the fuzzer.

use flate2::{Compress, Compression, FlushCompress};

/// A frame as a client sends it: first byte, payload.
pub(super) type Frame = (u8, Vec<u8>);

pub(super) const CONTINUED: u8 = 0x00;
pub(super) const LAST: u8 = 0x80;
pub(super) const TEXT: u8 = 0x01;
pub(super) const BINARY: u8 = 0x02;
pub(super) const CLOSE: u8 = 0x88;
pub(super) const PING: u8 = 0x89;
pub(super) const PONG: u8 = 0x8a;

pub(super) fn masked((first, payload): &Frame) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut out = vec![*first];
    match payload.len() {
        short @ 0..=125 => out.push(0x80 | short as u8),
        middle @ 126..=0xffff => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(middle as u16).to_be_bytes());
        }
        long => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

pub(super) fn whole(opcode: u8, payload: &[u8]) -> Vec<Frame> {
    vec![(LAST | opcode, payload.to_vec())]
}

/// A message in parts.
pub(super) fn parts(opcode: u8, parts: &[&[u8]]) -> Vec<Frame> {
    let last = parts.len() - 1;
    let first = |at: usize| if at == 0 { opcode } else { 0 } | if at == last { LAST } else { CONTINUED };
    parts.iter().enumerate().map(|(at, part)| (first(at), part.to_vec())).collect()
}

pub(super) fn close(code: u16, reason: &[u8]) -> Frame {
    (CLOSE, [&code.to_be_bytes(), reason].concat())
}

pub(super) fn compressed(text: &[u8]) -> Vec<u8> {
    let mut compress = Compress::new(Compression::default(), false);
    let mut out = Vec::with_capacity(text.len() + 1_000);
    compress.compress_vec(text, &mut out, FlushCompress::Sync).unwrap();
    out.truncate(out.len() - 4);
    out
}
