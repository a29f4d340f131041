use super::sent::{BINARY, CLOSE, CONTINUED, Frame, LAST, PING, PONG, TEXT, close, compressed, masked, parts, whole};
use super::*;
use serde_json::Value;
use std::collections::HashMap;

/// What a server that echoes messages would answer, up to the end; and the code it would close with.
#[derive(Default, PartialEq, Debug)]
struct Heard {
    messages: Vec<Vec<u8>>,
    pongs: Vec<Vec<u8>>,
    code: Option<u16>,
}

fn hear(reader: &mut Reader, bytes: &[u8], chop: usize) -> Heard {
    let (messages, code) = fuzz::read(reader, bytes, chop);
    let mut heard = Heard { code, ..Heard::default() };
    for message in messages {
        match message {
            Message::Text(text) => heard.messages.push(text.into_bytes()),
            Message::Binary(bytes) => heard.messages.push(bytes),
            Message::Ping(payload) => heard.pongs.push(payload),
            Message::Pong => {}
            Message::Close(code) => heard.code = Some(code.unwrap_or(1000)),
        }
    }
    heard
}

/// The frames of a case of the Autobahn test suite, what is echoed before its end, and the bytes sent at a time.
fn case(name: &str) -> Option<(Vec<Frame>, Vec<Vec<u8>>, usize)> {
    const ALL: usize = usize::MAX;
    const KAPPA: &str = "\u{3ba}\u{1f79}\u{3c3}\u{3bc}\u{3b5}";
    let number: Vec<usize> = name.split('.').map(|part| part.parse().unwrap()).collect();
    let bytes = |count: usize| vec![b'*'; count];
    let echoed = |frames: Vec<Frame>, message: Vec<u8>, chop: usize| Some((frames, vec![message], chop));
    let nothing = |frames: Vec<Frame>, chop: usize| Some((frames, Vec::new(), chop));
    let hello = b"Hello-\xc2\xb5@\xc3\x9f\xc3\xb6\xc3\xa4".to_vec();
    let split: [&[u8]; 2] = [&hello[..7], &hello[7..]]; // within a character
    let chop = |at: usize| [ALL, 9, 1][at % 3];
    match number[..] {
        [1, kind @ 1..=2, at @ 1..=8] => {
            let message = bytes([0, 125, 126, 127, 128, 65_535, 65_536, 65_536][at - 1]);
            echoed(whole(kind as u8, &message), message, if at == 8 { 997 } else { ALL })
        }
        [2, at @ 1..=4] | [2, at @ 6] => {
            let payload = [vec![], b"Hello, world!".to_vec(), vec![0, 255, 254, 253, 252, 251, 0, 255], vec![254; 125]];
            let payload = payload[at.min(4) - 1].clone();
            nothing(vec![(PING, payload)], if at == 6 { 1 } else { ALL })
        }
        [2, 5] => nothing(vec![(PING, vec![254; 126])], ALL),
        [2, 7] => nothing(vec![(PONG, vec![])], ALL),
        [2, 8] => nothing(vec![(PONG, b"unsolicited".to_vec())], ALL),
        [2, 9] => nothing(vec![(PONG, b"unsolicited".to_vec()), (PING, b"ping".to_vec())], ALL),
        [2, at @ 10..=11] => {
            let pings = (0..10).map(|n| (PING, format!("payload-{n}").into_bytes())).collect();
            nothing(pings, if at == 11 { 1 } else { ALL })
        }
        [3, 1] => nothing(vec![(LAST | 0x10 | TEXT, hello)], ALL),
        [3, at @ 2..=4] => {
            let frames =
                vec![(LAST | TEXT, hello.clone()), (LAST | (at as u8) << 4 | TEXT, hello.clone()), (PING, vec![])];
            echoed(frames, hello, chop(at - 2))
        }
        [3, 5] => nothing(vec![(LAST | 0x50 | BINARY, hello)], ALL),
        [3, 6] => nothing(vec![(PING | 0x60, hello)], ALL),
        [3, 7] => nothing(vec![(CLOSE | 0x70, vec![])], ALL),
        [4, kind @ 1..=2, at @ 1..=5] => {
            let opcode = [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]][kind - 1][at - 1];
            let bad = (LAST | opcode, if at % 2 == 0 || at == 5 { hello.clone() } else { vec![] });
            match at {
                1 | 2 => nothing(vec![bad], ALL),
                _ => echoed(vec![(LAST | TEXT, hello.clone()), bad, (PING, vec![])], hello, ALL),
            }
        }
        [5, at @ 1..=2] => nothing(parts([9, 10][at - 1], &split), ALL),
        [5, at @ 3..=5] => echoed(parts(TEXT, &split), hello.clone(), chop(at - 3)),
        [5, at @ 6..=8] => {
            let mut frames = parts(TEXT, &split);
            frames.insert(1, (PING, b"ping".to_vec()));
            echoed(frames, hello.clone(), chop(at - 6))
        }
        [5, at @ 9..=14] => {
            let first = if at < 12 { LAST } else { CONTINUED };
            nothing(vec![(first, hello.clone()), (LAST | TEXT, hello.clone())], chop(at % 3))
        }
        [5, 15] => {
            let mut frames = parts(TEXT, &split);
            frames.extend([(CONTINUED, hello.clone()), (LAST | TEXT, hello.clone())]);
            echoed(frames, hello.clone(), ALL)
        }
        [5, at @ 16..=17] => {
            let stray = (if at == 17 { LAST } else { CONTINUED }, hello.clone());
            let once = [vec![stray], parts(TEXT, &split)].concat();
            nothing([once.clone(), once].concat(), ALL)
        }
        [5, 18] => nothing(vec![(TEXT, split[0].to_vec()), (LAST | TEXT, split[1].to_vec())], ALL),
        [5, at @ 19..=20] => {
            let mut frames = parts(TEXT, &[b"one", b"two", b"three", b"four", b"five"]);
            frames.insert(2, (PING, b"first".to_vec()));
            frames.insert(5, (PING, b"second".to_vec()));
            echoed(frames, b"onetwothreefourfive".to_vec(), if at == 20 { 1 } else { ALL })
        }
        [6, 1, at] => match at {
            1 => echoed(whole(TEXT, b""), vec![], ALL),
            2 => echoed(parts(TEXT, &[b"", b"", b""]), vec![], ALL),
            _ => echoed(parts(TEXT, &[b"", &hello, b""]), hello.clone(), ALL),
        },
        [6, 2, at] => {
            let single: Vec<&[u8]> = hello.chunks(1).collect();
            let kappa: Vec<&[u8]> = KAPPA.as_bytes().chunks(1).collect();
            match at {
                1 => echoed(whole(TEXT, &hello), hello, ALL),
                2 => echoed(parts(TEXT, &[&hello[..8], &hello[8..]]), hello.clone(), ALL),
                3 => echoed(parts(TEXT, &single), hello.clone(), ALL),
                _ => echoed(parts(TEXT, &kappa), KAPPA.into(), ALL),
            }
        }
        [6, 3, at] => {
            let bad = [KAPPA.as_bytes(), b"\xed\xa0\x80edited"].concat();
            let single: Vec<&[u8]> = bad.chunks(1).collect();
            nothing(if at == 1 { whole(TEXT, &bad) } else { parts(TEXT, &single) }, ALL)
        }
        [6, 4, at] => {
            let rest: &[u8] = if at % 2 == 1 { b"\xf4\x90\x80\x80" } else { b"\xf4\x90" };
            let bad = [KAPPA.as_bytes(), rest, b"edited"].concat();
            match at {
                1 | 2 => nothing(parts(TEXT, &[KAPPA.as_bytes(), rest, b"edited"]), 9),
                _ => nothing(whole(TEXT, &bad), KAPPA.len()),
            }
        }
        [7, 1, at] => {
            let message = if at == 6 { bytes(256 << 10) } else { hello.clone() };
            let (end, sent) = (close(1000, b""), (LAST | TEXT, message.clone()));
            match at {
                1 => echoed(vec![sent, end], message, ALL),
                2 => nothing(vec![end.clone(), end], ALL),
                3 => nothing(vec![end, (PING, vec![])], ALL),
                4 => nothing(vec![end, sent], ALL),
                5 => nothing(vec![(TEXT, message.clone()), end, (LAST, message)], ALL),
                _ => echoed(vec![sent, end, (PING, vec![])], message, ALL),
            }
        }
        [7, 3, at] => {
            let payload = [vec![], vec![b'a'], close(1000, b"").1, close(1000, &hello).1];
            let long = |count| close(1000, &bytes(count)).1;
            nothing(vec![(CLOSE, payload.get(at - 1).cloned().unwrap_or_else(|| long([123, 124][at - 5])))], ALL)
        }
        [7, 5, 1] => nothing(vec![close(1000, b"\xce\xba\xed\xa0\x80")], ALL),
        [7, 13, at] => nothing(vec![close([5000, 65_535][at - 1], b"")], ALL),
        [9, kind @ 1..=2, at] => {
            let message = bytes([64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20][at - 1]);
            echoed(whole(kind as u8, &message), message, 64 << 10)
        }
        [9, kind @ 3..=4, at] => {
            let message = bytes(4 << 20);
            let size = [64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20][at - 1];
            let all: Vec<&[u8]> = message.chunks(size).collect();
            echoed(parts(kind as u8 - 2, &all), message.clone(), 64 << 10)
        }
        [9, kind @ 5..=6, at] => {
            let message = bytes(1 << 20);
            echoed(whole(kind as u8 - 4, &message), message, 64 << (at - 1))
        }
        [10, 1, 1] => {
            let message = bytes(65_536);
            let all: Vec<&[u8]> = message.chunks(1_300).collect();
            echoed(parts(TEXT, &all), message.clone(), ALL)
        }
        _ => None,
    }
}

#[test]
fn the_cases_of_the_autobahn_suite_end_as_they_should() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/truth/websocket/autobahn_cases.json");
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("skipped: the cases of the Autobahn suite are not beside the project");
        return;
    };
    let known: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut done = 0;
    for known in &known {
        let name = known["case"].as_str().unwrap();
        if name == "9.9.1" {
            continue; // a message without an end: a test of its own, below
        }
        let (frames, echoed, chop) = case(name).unwrap_or_else(|| panic!("case {name} is not known here"));
        let mut bytes = frames.iter().flat_map(masked).collect::<Vec<u8>>();
        bytes.extend(masked(&close(1000, b"")));
        let heard = hear(&mut Reader::new(16 << 20, false), &bytes, chop.min(bytes.len()));
        let codes: Vec<u64> = known["close_codes"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
        let code = u64::from(heard.code.unwrap_or_else(|| panic!("{name}: no end")));
        assert!(codes.contains(&code) || (codes.is_empty() && code == 1000), "{name}: {code} instead of {codes:?}");
        assert!(heard.messages == echoed, "{name}: {} messages", heard.messages.len());
        if code == 1000 {
            let pings = frames.iter().take_while(|frame| frame.0 != CLOSE).filter(|frame| frame.0 == PING);
            let pings: Vec<Vec<u8>> = pings.map(|frame| frame.1.clone()).collect();
            assert_eq!(heard.pongs, pings, "{name}");
        }
        done += 1;
    }
    assert_eq!(done, 135);
}

#[test]
fn what_a_client_must_not_send_ends_the_connection_with_the_code_for_it() {
    let unmasked = vec![LAST | TEXT, 2, b'h', b'i'];
    let huge = [&[LAST | BINARY, 0x80 | 127][..], &u64::MAX.to_be_bytes(), &[0; 4]].concat();
    let large = masked(&(LAST | TEXT, vec![b'x'; 1_001]));
    let in_parts: Vec<u8> = parts(TEXT, &[&[b'x'; 600], &[b'x'; 600]]).iter().flat_map(masked).collect();
    let compressed = masked(&(LAST | COMPRESSED | TEXT, vec![0xf2, 0x48, 0]));
    for (bytes, code) in [(unmasked, 1002), (huge, 1009), (large, 1009), (in_parts, 1009), (compressed, 1002)] {
        assert_eq!(hear(&mut Reader::new(1_000, false), &bytes, 1_000).code, Some(code), "{bytes:?}");
    }
}

#[test]
fn a_message_without_an_end_is_ended_at_the_limit_however_small_its_parts_are() {
    for part in [0, 1, 4_096] {
        let mut reader = Reader::new(1 << 20, false);
        reader.feed(&masked(&(TEXT, vec![b'x'; part])));
        let next = masked(&(CONTINUED, vec![b'x'; part]));
        let ended = (0..2_000_000).find_map(|_| {
            reader.feed(&next);
            reader.next().err()
        });
        assert_eq!(ended.unwrap().code, 1009, "{part}");
    }
}

#[test]
fn a_reader_holds_memory_only_while_a_message_is_incomplete() {
    let mut reader = Reader::new(1 << 20, false);
    let bytes = masked(&(LAST | TEXT, vec![b'x'; 100_000]));
    let (most, last) = bytes.split_at(bytes.len() - 1);
    reader.feed(most);
    assert!(reader.next().unwrap().is_none() && reader.buffer.capacity() >= most.len());
    reader.feed(last);
    assert!(matches!(reader.next(), Ok(Some(Message::Text(_)))) && reader.next().unwrap().is_none());
    assert_eq!(reader.buffer.capacity(), 0);
    // what is announced takes no memory before it comes
    reader.feed(&bytes[..20]);
    assert!(reader.next().unwrap().is_none() && reader.buffer.capacity() < 1_000);
}

#[test]
fn a_compressed_message_is_read_up_to_the_limit_of_what_it_becomes() {
    let first = LAST | COMPRESSED | TEXT;
    let read = |payload: Vec<u8>| hear(&mut Reader::new(100_000, true), &masked(&(first, payload)), 1_000_000);
    for text in [&b""[..], b"Hello", &[b'a'; 100_000]] {
        assert_eq!(read(compressed(text)).messages, [text], "{} bytes", text.len());
    }
    // the example of RFC 7692 section 7.2.3.1
    assert_eq!(read(vec![0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00]).messages, [b"Hello"]);
    assert_eq!(read(compressed(&[b'a'; 100_001])).code, Some(1009), "a bomb");
    assert_eq!(read(vec![0xff; 20]).code, Some(1007), "garbage");
    let halves = compressed(b"in two parts");
    let (one, two) = halves.split_at(4);
    let frames = [(COMPRESSED | TEXT, one.to_vec()), (LAST, two.to_vec())];
    let bytes: Vec<u8> = frames.iter().flat_map(masked).collect();
    assert_eq!(hear(&mut Reader::new(1_000, true), &bytes, 3).messages, [b"in two parts"]);
}

#[test]
fn headers_are_as_long_as_they_say() {
    let lengths: HashMap<usize, usize> = [(0, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10)].into();
    for (payload, header) in lengths {
        let mut out = BytesMut::new();
        write(&mut out, Opcode::Text, &vec![b'x'; payload]);
        assert_eq!((header_bytes(&out), payload_bytes(&out)), (header, payload));
    }
}

#[path = "../../../../tests/support/smoke.rs"]
mod smoke;

#[test]
fn any_bytes_of_a_client_give_messages_or_the_code_for_what_is_wrong() {
    smoke::smoke("frames", &fuzz::clients(), &["\u{80}", "\u{ff}\u{ff}"], 100_000, fuzz::frames);
}
