//! What holds for any bytes of a client: a target of `fuzz/`, run for a while by the test below.

use super::sent::{BINARY, Frame, LAST, PING, PONG, TEXT, close, compressed, masked, parts, whole};
use super::*;

/// What a client sends after the handshake; the first byte says how it is cut and whether compression was agreed on.
pub fn frames(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else { return };
    let (cut, inflates) = (usize::from(how >> 1).max(1), how & 1 == 1);
    let read = |cut| read(&mut Reader::new(BYTES_MAX, inflates), bytes, cut);
    let whole = read(bytes.len().max(1));
    let (messages, code) = &whole;
    assert!(messages.iter().all(|message| size(message) <= BYTES_MAX), "none is larger than the bound");
    assert!(matches!(code, None | Some(1002 | 1007 | 1009)), "{code:?} is no code for what a client does wrong");
    assert_eq!(read(cut), whole, "how the network cuts it makes no difference");
}

const BYTES_MAX: usize = 2048;

fn size(message: &Message) -> usize {
    match message {
        Message::Text(text) => text.len(),
        Message::Binary(bytes) | Message::Ping(bytes) => bytes.len(),
        Message::Pong | Message::Close(_) => 0,
    }
}

/// The messages up to what ends the connection, and the code of what was wrong.
pub(super) fn read(reader: &mut Reader, bytes: &[u8], cut: usize) -> (Vec<Message>, Option<u16>) {
    let mut messages = Vec::new();
    for part in bytes.chunks(cut) {
        reader.feed(part);
        loop {
            match reader.next() {
                Ok(None) => break,
                Ok(Some(message)) => {
                    let ends = matches!(message, Message::Close(_));
                    messages.push(message);
                    if ends {
                        return (messages, None);
                    }
                }
                Err(violation) => return (messages, Some(violation.code)),
            }
        }
    }
    (messages, None)
}

/// What clients send, to begin with.
pub fn clients() -> Vec<Vec<u8>> {
    let sent = |how: u8, frames: &[Frame]| [vec![how], frames.iter().flat_map(masked).collect()].concat();
    let long = "long, ".repeat(60);
    vec![
        sent(
            3 << 1,
            &[
                whole(TEXT, b"{\"op\":\"ping\"}"),
                vec![(PING, b"p".to_vec())],
                parts(TEXT, &["ä".as_bytes(), b"b", b"c"]),
            ]
            .concat(),
        ),
        sent(1, &[vec![(LAST | COMPRESSED | TEXT, compressed(long.as_bytes()))], whole(BINARY, &[0; 130])].concat()),
        sent(5 << 1, &[parts(BINARY, &[b"1", b"2"]), vec![(PONG, Vec::new()), close(1000, "bye".as_bytes())]].concat()),
    ]
}
