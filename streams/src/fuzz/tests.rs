use super::*;
use arrow::ipc::writer::StreamWriter;

#[path = "../../../tests/support/smoke.rs"]
mod smoke;

/// Two trades as an Arrow stream, with the byte in front that says so.
fn arrow() -> Vec<u8> {
    let batch = trades(1);
    let mut body = vec![2 + 3 * 2];
    let mut writer = StreamWriter::try_new(&mut body, batch.schema_ref()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    body
}

#[test]
fn an_arrow_body_that_lies_about_its_lengths_is_refused() {
    let body = arrow();
    for at in 1..body.len() {
        for wrong in [0, 0x7f, 0xff] {
            let mut body = body.clone();
            body[at] = wrong;
            events(&body); // it panicked at a count of rows beyond the buffers
        }
    }
}

#[test]
fn any_body_gives_events_or_errors() {
    let text = |how: u8, text: &str| [&[how], text.as_bytes()].concat();
    let seeds = [
        text(
            3,
            "{\"id\":\"a\",\"ts\":1800000000000,\"symbol\":\"A\",\"price\":1.5,\"qty\":2e0,\"side\":\"buy\"}\n\n{\"symbol\":\"\\ud83d\\ude00\",\"price\":-0.0,\"qty\":1,\"extra\":{\"a\":[1,null]}}\n",
        ),
        text(4, r#"[{"ts":"2027-01-15T08:00:00.5+01:00","symbol":"B","price":1,"qty":1},{"symbol":null},[],7]"#),
        text(4, r#"{"ts":1800000000000.5,"symbol":"\u00e9\n","price":"1","qty":1}"#),
        text(12 * 3 + 3, "{\"ts\":1800000000000,\"user\":\"u\",\"amount\":\"12.34\",\"ok\":true}"),
        arrow(),
    ];
    let words = [
        "null",
        "true",
        "NaN",
        "1e308",
        "-1",
        "9223372036854775808",
        "0.1",
        "\"",
        "\\u0000",
        "\\ud800",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\n",
        "\"ts\":",
        "\"id\":",
        "\"price\":",
        "\"symbol\":",
        "1970-01-01T00:00:00Z",
        "\u{feff}",
    ];
    smoke::smoke("events", &seeds, &words, 100_000, events);
}

#[test]
fn any_file_is_read_as_far_as_it_is_a_log_and_what_is_wrong_with_it_is_told() {
    let file = |records: i64| {
        let directory = TempDir::new().unwrap();
        let log = EmbeddedLog::open(directory.path(), &Config::default()).unwrap();
        for at in 0..records {
            futures::executor::block_on(log.append(record(at))).unwrap();
        }
        drop(log);
        fs::read(directory.path().join(file_name(0))).unwrap()
    };
    smoke::smoke("log_file", &[file(0), file(1), file(6)], &[], 1_500, log_file);
}
