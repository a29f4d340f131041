//! What holds for any bytes of a client: a target of `fuzz/`, run for a while by the test below.

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
