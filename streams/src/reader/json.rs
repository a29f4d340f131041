//! JSON events: one a line (NDJSON), or the elements of one array, or values one after another.

use super::mapping::{From, Mapping};
use super::row::{EventWriter, Field, Layout, RowFault, Value, passes};
use super::source::Source;
use super::{Chunk, Context, Failure, ReadError, Rows};
use crate::schema::StreamSchema;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::io::{BufRead, Read};

pub(super) struct JsonRows {
    source: Source,
    bytes: Box<dyn BufRead + Send>,
    framing: Framing,
    /// The line or element just read.
    event: Vec<u8>,
    number: u64,
    limit: usize,
    objects: Objects,
}

/// How one event ends and the next begins.
enum Framing {
    Lines,
    Values(Splitter),
}

impl JsonRows {
    pub fn lines(source: Source, context: &Context) -> Result<JsonRows, ReadError> {
        JsonRows::open(source, Framing::Lines, context)
    }

    pub fn values(source: Source, context: &Context) -> Result<JsonRows, ReadError> {
        JsonRows::open(source, Framing::Values(Splitter::default()), context)
    }

    fn open(source: Source, framing: Framing, context: &Context) -> Result<JsonRows, ReadError> {
        let objects = Objects::new(&context.mapping, &context.schema);
        let (bytes, limit) = (source.bytes()?, context.line_bytes_max);
        Ok(JsonRows { source, bytes, framing, event: Vec::new(), number: 0, limit, objects })
    }
}

impl Rows for JsonRows {
    fn next(&mut self, chunk: &mut Chunk) -> Result<bool, Failure> {
        loop {
            self.event.clear();
            let framed = match &mut self.framing {
                Framing::Lines => next_line(&mut self.bytes, &mut self.event, self.limit),
                Framing::Values(splitter) => splitter.next(&mut self.bytes, &mut self.event, self.limit),
            };
            let framed = framed.map_err(|error| Failure::Fatal(self.source.failed(error)))?;
            if framed == Framed::End {
                return Ok(false);
            }
            self.number += 1;
            match framed {
                Framed::TooLong => return Err(Failure::Row(self.number, RowFault::TooLong { limit: self.limit })),
                Framed::Unfinished => {
                    let fault = RowFault::NotJson("the file ends inside it; copy the file again".to_owned());
                    return Err(Failure::Row(self.number, fault));
                }
                Framed::Event | Framed::End => {}
            }
            if self.event.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return match self.objects.write(chunk, &self.event) {
                Ok(()) => Ok(true),
                Err(fault) => Err(Failure::Row(self.number, fault)),
            };
        }
    }

    fn unit(&self) -> &'static str {
        match self.framing {
            Framing::Lines => "line",
            Framing::Values(_) => "element",
        }
    }
}

#[derive(PartialEq, Debug)]
enum Framed {
    Event,
    TooLong,
    Unfinished,
    End,
}

/// Reads one line. A line over `limit` is read past but not kept.
fn next_line(bytes: &mut impl BufRead, line: &mut Vec<u8>, limit: usize) -> std::io::Result<Framed> {
    let length = bytes.take(limit as u64 + 1).read_until(b'\n', line)?;
    if length > limit && line.last() != Some(&b'\n') {
        bytes.skip_until(b'\n')?;
        return Ok(Framed::TooLong);
    }
    Ok(if length == 0 { Framed::End } else { Framed::Event })
}

/// Cuts `[{…}, {…}]` or `{…} {…}` into its values without parsing them: brackets and strings are enough.
#[derive(Default)]
struct Splitter {
    started: bool,
    /// The values stand inside an outer array that has not ended yet.
    in_array: bool,
}

impl Splitter {
    fn next(&mut self, bytes: &mut impl BufRead, event: &mut Vec<u8>, limit: usize) -> std::io::Result<Framed> {
        let (mut depth, mut length) = (0u32, 0usize);
        let (mut in_string, mut escaped) = (false, false);
        loop {
            let buffer = bytes.fill_buf()?;
            if buffer.is_empty() {
                let open = depth > 0 || in_string;
                return Ok(match length {
                    0 if std::mem::take(&mut self.in_array) => Framed::Unfinished,
                    0 => Framed::End,
                    _ if open => Framed::Unfinished,
                    _ if length > limit => Framed::TooLong,
                    _ => Framed::Event,
                });
            }
            let mut used = 0;
            let mut ended = false;
            for &byte in buffer {
                used += 1;
                if length == 0 {
                    // between values
                    match byte {
                        b'[' if !self.started => {
                            self.started = true;
                            self.in_array = true;
                            continue;
                        }
                        b' ' | b'\t' | b'\r' | b'\n' | b',' | 0xef | 0xbb | 0xbf => continue,
                        b']' if self.in_array => {
                            self.in_array = false;
                            continue;
                        }
                        _ => self.started = true,
                    }
                }
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                } else {
                    match byte {
                        b'"' => in_string = true,
                        b'{' | b'[' => depth += 1,
                        b',' | b']' | b'\n' if depth == 0 => {
                            // a bare value such as a number ends here
                            self.in_array &= byte != b']';
                            ended = true;
                            break;
                        }
                        b'}' | b']' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                }
                length += 1;
                if length <= limit {
                    event.push(byte);
                }
                if depth == 0 && !in_string && matches!(byte, b'}' | b']') {
                    ended = true;
                    break;
                }
            }
            bytes.consume(used);
            if ended {
                return Ok(if length > limit { Framed::TooLong } else { Framed::Event });
            }
        }
    }
}

/// Writes JSON objects under the names that a mapping gives; values keep the types they have.
struct Objects {
    mapping: Mapping,
    schema: StreamSchema,
    constants: Layout,
    ts: Field,
    mapped: Vec<(String, Field)>,
}

impl Objects {
    fn new(mapping: &Mapping, schema: &StreamSchema) -> Objects {
        let mapped = mapping.columns.iter().filter_map(|target| match &target.from {
            From::Column { source, scale } => Some((source.clone(), Field::of_json(&target.name, *scale))),
            From::Constant(_) => None,
        });
        Objects {
            mapped: mapped.collect(),
            mapping: mapping.clone(),
            schema: schema.clone(),
            constants: Layout::constants(mapping),
            ts: Field::event_time(0),
        }
    }

    fn write(&self, chunk: &mut Chunk, event: &[u8]) -> Result<(), RowFault> {
        let not_json = |error: &dyn std::fmt::Display| RowFault::NotJson(error.to_string());
        let text = std::str::from_utf8(event).map_err(|error| not_json(&error))?;
        let Members(members) = serde_json::from_str(text.trim_start_matches('\u{feff}')).map_err(|e| not_json(&e))?;
        let mut writer = EventWriter::begin(&self.constants, chunk);
        for (name, value) in &members {
            let json = value.get();
            let mut written = Ok(());
            if name == self.mapping.ts_source() {
                written = writer.member(&self.ts, Value::Json(json));
            }
            for (_, field) in self.mapped.iter().filter(|(source, _)| source == name) {
                written = written.and_then(|()| writer.member(field, Value::Json(json)));
            }
            if let Err(fault) = written {
                writer.abandon();
                return Err(fault);
            }
            if passes(&self.mapping, &self.schema, name) {
                writer.raw_member(name, json);
            }
        }
        writer.end();
        Ok(())
    }
}

/// The members of an object in their order, values unparsed.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::with_capacity(8);
                while let Some((Key(name), value)) = map.next_entry()? {
                    members.push((name, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str, buffer: usize, limit: usize) -> Vec<String> {
        let mut bytes = std::io::BufReader::with_capacity(buffer, text.as_bytes());
        let mut splitter = Splitter::default();
        let mut all = Vec::new();
        loop {
            let mut event = Vec::new();
            match splitter.next(&mut bytes, &mut event, limit).unwrap() {
                Framed::End => return all,
                Framed::Event => all.push(String::from_utf8(event).unwrap()),
                other => all.push(format!("{other:?}")),
            }
        }
    }

    #[test]
    fn an_array_is_cut_into_its_elements_whatever_the_buffer() {
        for buffer in [1, 2, 3, 7, 100] {
            let nested = r#" [ {"a":"]}\"\\"} , {"b":[1,[2]]},{"c":{}} ] "#;
            let expected = [r#"{"a":"]}\"\\"}"#, r#"{"b":[1,[2]]}"#, r#"{"c":{}}"#];
            assert_eq!(split(nested, buffer, 100), expected, "buffer {buffer}");
            assert_eq!(split("{\"a\":1}\n{\"b\":\n2}", buffer, 100), ["{\"a\":1}", "{\"b\":\n2}"]);
            assert_eq!(split("[1,\"x\",{}]", buffer, 100), ["1", "\"x\"", "{}"]);
            assert_eq!(split("", buffer, 100), [""; 0]);
            assert_eq!(split("[]", buffer, 100), [""; 0]);
        }
    }

    #[test]
    fn an_element_that_is_too_long_or_cut_off_is_named_and_the_rest_goes_on() {
        assert_eq!(split(r#"[{"a":"0123456789"},{"b":1}]"#, 4, 12), ["TooLong", r#"{"b":1}"#]);
        assert_eq!(split(r#"[{"a":1},{"b""#, 4, 100), [r#"{"a":1}"#, "Unfinished", "Unfinished"]);
    }
}
