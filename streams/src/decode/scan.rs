//! The usual line, read in one pass: fields in the order of the line before, numbers and strings eight bytes at a time.
//!
//! The scanner only ever says yes. What it takes, the strict reader in the parent module would take
//! with the same result; for everything else it says nothing and that reader decides and explains.

use super::{Bounds, Cell, DEPTH_MAX, TsUnit, check_ts, decimal};
use crate::schema::{Column, ColumnType, StreamSchema, UnknownFields};
use arrow::compute::kernels::cast_utils::string_to_datetime;
use engine::event::Micros;
use std::borrow::Cow;

/// So many names of fields without a column are known to one scanner; lines with others are not usual.
const UNKNOWN_MAX: usize = 64;

/// Reads lines of one stream from one body.
pub(super) struct Scanner<'s, 'de> {
    columns: &'s [Column],
    /// No column is called as a field that every event has: those of reference tables may be.
    is_plain: bool,
    unknown_fields: UnknownFields,
    unit: TsUnit,
    bounds: Bounds,
    now: Micros,
    /// By slot: the columns, `ts`, `id`, and a mark for each known name without a column.
    cells: Vec<Cell<'de>>,
    unknown: Vec<&'de str>,
    /// What came last after the line's start and after each slot: the bytes up to the value, and its slot.
    next: Vec<(&'de [u8], usize)>,
    extra: String,
}

/// An event as the scanner read it; the cells are the columns'.
pub(super) struct Scanned<'a, 'de> {
    pub(super) ts: Micros,
    pub(super) id: Option<&'a str>,
    pub(super) cells: &'a [Cell<'de>],
    pub(super) extra: Option<&'a str>,
}

impl<'s, 'de> Scanner<'s, 'de> {
    pub(super) fn new(schema: &'s StreamSchema, unit: TsUnit, bounds: Bounds, now: Micros) -> Self {
        let slots = schema.columns.len() + 2;
        let mut cells = Vec::new();
        cells.resize_with(slots, || Cell::Missing);
        Scanner {
            columns: &schema.columns,
            is_plain: !schema.columns.iter().any(|column| column.name == "ts" || column.name == "id"),
            unknown_fields: schema.unknown_fields,
            unit,
            bounds,
            now,
            cells,
            unknown: Vec::new(),
            next: vec![(&[], 0); slots + 1],
            extra: String::new(),
        }
    }

    /// The event in `line`, if it is a usual one.
    pub(super) fn scan<'a>(&'a mut self, line: &'de str) -> Option<Scanned<'a, 'de>> {
        if line.len() > self.bounds.event_bytes || !self.is_plain {
            return None;
        }
        self.cells.iter_mut().for_each(|cell| *cell = Cell::Missing);
        self.extra.clear();
        self.fields(line)?;
        let columns = self.columns.len();
        let ts = match self.cells[columns] {
            // as if it were a count: of a text so near to 1970 the strict reader knows that it is none
            Cell::Int(at) => check_ts(at, true, &self.bounds, self.now).ok()?,
            _ => self.now,
        };
        let id = match &self.cells[columns + 1] {
            Cell::Text(id) => Some(&**id),
            _ => None,
        };
        for (cell, column) in self.cells.iter().zip(self.columns) {
            if !column.nullable && matches!(cell, Cell::Missing | Cell::Null) {
                return None;
            }
        }
        if !self.extra.is_empty() {
            self.extra.push('}');
        }
        let extra = Some(self.extra.as_str()).filter(|extra| !extra.is_empty());
        Some(Scanned { ts, id, cells: &self.cells[..columns], extra })
    }

    fn fields(&mut self, line: &'de str) -> Option<()> {
        let bytes = line.as_bytes();
        let mut at = blanks(bytes, 0);
        if *bytes.get(at)? != b'{' {
            return None;
        }
        let mut before = 0;
        loop {
            let (guess, guessed) = self.next[before];
            let slot = if !guess.is_empty() && bytes.get(at..)?.starts_with(guess) {
                at += guess.len();
                guessed
            } else {
                let (slot, to) = self.name(line, at)?;
                self.next[before] = (&bytes[at..to], slot);
                at = to;
                slot
            };
            if !matches!(self.cells[slot], Cell::Missing) {
                return None; // a field that stands twice
            }
            at = self.value(line, at, slot)?;
            before = slot + 1;
            match bytes.get(at)? {
                b',' => {}
                b'}' => break,
                _ => {
                    let after = blanks(bytes, at);
                    match bytes.get(after)? {
                        b',' => {} // the blanks are part of what stands before the next value
                        b'}' => {
                            at = after;
                            break;
                        }
                        _ => return None,
                    }
                }
            }
        }
        (blanks(bytes, at + 1) == bytes.len()).then_some(())
    }

    /// Slot of the field whose comma or brace comes next, and where its value starts.
    fn name(&mut self, line: &'de str, at: usize) -> Option<(usize, usize)> {
        let bytes = line.as_bytes();
        let at = blanks(bytes, blanks(bytes, at) + 1);
        if *bytes.get(at)? != b'"' {
            return None;
        }
        let (from, to) = (at + 1, plain_end(bytes, at + 1));
        let name = line.get(from..to)?;
        let at = blanks(bytes, to + 1);
        if *bytes.get(to)? != b'"' || *bytes.get(at)? != b':' {
            return None;
        }
        let columns = self.columns.len();
        let slot = match name {
            "ts" => columns,
            "id" => columns + 1,
            _ => match self.columns.iter().position(|column| column.name == name) {
                Some(column) => column,
                None => columns + 2 + self.unknown(name)?,
            },
        };
        Some((slot, blanks(bytes, at + 1)))
    }

    /// Number of a name that no column has.
    fn unknown(&mut self, name: &'de str) -> Option<usize> {
        if let Some(known) = self.unknown.iter().position(|known| *known == name) {
            return Some(known);
        }
        if self.unknown_fields == UnknownFields::Reject || self.unknown.len() == UNKNOWN_MAX {
            return None;
        }
        self.unknown.push(name);
        self.cells.push(Cell::Missing);
        self.next.push((&[], 0));
        Some(self.unknown.len() - 1)
    }

    /// Reads the value at `at` into its slot; where it ends.
    fn value(&mut self, line: &'de str, at: usize, slot: usize) -> Option<usize> {
        let columns = self.columns.len();
        let (cell, end) = match self.columns.get(slot).map(|column| column.kind) {
            Some(ColumnType::Float64) => match number(line.as_bytes(), at) {
                Some(number) => (Cell::Float(number.float(line, at)?), number.end),
                None => null(line, at)?,
            },
            Some(ColumnType::Utf8) => text(line, at).or_else(|| null(line, at))?,
            Some(ColumnType::Int64) => match number(line.as_bytes(), at) {
                Some(number) => (Cell::Int(number.integer()?), number.end),
                None => null(line, at)?,
            },
            Some(ColumnType::Bool) => literal(line, at, "true", Cell::Bool(true))
                .or_else(|| literal(line, at, "false", Cell::Bool(false)))
                .or_else(|| null(line, at))?,
            Some(ColumnType::Timestamp) => self.time(line, at)?,
            Some(ColumnType::Decimal(precision, scale)) => {
                let end = skip(line.as_bytes(), at, 0)?;
                (decimal(line.get(at..end)?, precision, scale).ok()?, end)
            }
            Some(ColumnType::Json) => {
                let end = skip(line.as_bytes(), at, 0)?;
                let raw = line.get(at..end)?;
                (if raw == "null" { Cell::Null } else { Cell::Text(Cow::Borrowed(raw)) }, end)
            }
            None if slot == columns => self.time(line, at)?,
            None if slot == columns + 1 => self.id(line, at)?,
            None => {
                let end = skip(line.as_bytes(), at, 0)?;
                if self.unknown_fields == UnknownFields::Keep {
                    self.extra.push(if self.extra.is_empty() { '{' } else { ',' });
                    self.extra.push('"');
                    self.extra.push_str(self.unknown[slot - columns - 2]);
                    self.extra.push_str("\":");
                    self.extra.push_str(line.get(at..end)?);
                }
                (Cell::Null, end)
            }
        };
        self.cells[slot] = cell;
        Some(end)
    }

    fn time(&self, line: &'de str, at: usize) -> Option<(Cell<'de>, usize)> {
        if let Some(number) = number(line.as_bytes(), at) {
            return Some((Cell::Int(self.unit.micros(number.integer()?)?), number.end));
        }
        match text(line, at) {
            Some((Cell::Text(text), end)) => {
                let at = string_to_datetime(&chrono::Utc, &text).ok()?;
                Some((Cell::Int(at.timestamp_micros()), end))
            }
            _ => null(line, at),
        }
    }

    fn id(&self, line: &'de str, at: usize) -> Option<(Cell<'de>, usize)> {
        if let Some(number) = number(line.as_bytes(), at) {
            number.integer()?;
            return Some((Cell::Text(Cow::Borrowed(line.get(at..number.end)?)), number.end));
        }
        match text(line, at) {
            Some((Cell::Text(id), end)) => {
                let fits = !id.is_empty() && id.len() <= self.bounds.id_bytes;
                fits.then_some((Cell::Text(id), end))
            }
            _ => null(line, at),
        }
    }
}

fn null<'de>(line: &str, at: usize) -> Option<(Cell<'de>, usize)> {
    literal(line, at, "null", Cell::Null)
}

fn literal<'de>(line: &str, at: usize, word: &str, cell: Cell<'de>) -> Option<(Cell<'de>, usize)> {
    line.as_bytes().get(at..)?.starts_with(word.as_bytes()).then_some((cell, at + word.len()))
}

/// A string without NUL.
fn text(line: &str, at: usize) -> Option<(Cell<'_>, usize)> {
    let bytes = line.as_bytes();
    if *bytes.get(at)? != b'"' {
        return None;
    }
    let end = plain_end(bytes, at + 1);
    if *bytes.get(end)? == b'"' {
        return Some((Cell::Text(Cow::Borrowed(line.get(at + 1..end)?)), end + 1));
    }
    let end = string_end(bytes, at)?;
    let text: String = serde_json::from_str(line.get(at..end)?).ok()?;
    (!text.contains('\0')).then_some((Cell::Text(Cow::Owned(text)), end))
}

/// First byte at `at` or after that is no blank of JSON.
fn blanks(bytes: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\t' | b'\r' | b'\n') = bytes.get(at) {
        at += 1;
    }
    at
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

/// The eight bytes at `at`, the first one lowest; zeros behind the end.
fn word(bytes: &[u8], at: usize) -> u64 {
    let rest = bytes.get(at..).unwrap_or_default();
    match rest.first_chunk::<8>() {
        Some(chunk) => u64::from_le_bytes(*chunk),
        None => rest.iter().rev().fold(0, |word, &byte| (word << 8) | u64::from(byte)),
    }
}

/// Place of the first quote, backslash or control character at `from` or after; at most the length.
///
/// Bit tricks on words: <https://graphics.stanford.edu/~seander/bithacks.html#HasLessInWord>; a byte
/// marked wrongly always stands behind one marked rightly.
fn plain_end(bytes: &[u8], from: usize) -> usize {
    let mut at = from;
    loop {
        let word = word(bytes, at);
        let zero = |word: u64| word.wrapping_sub(ONES) & !word;
        let quote = zero(word ^ (ONES * b'"' as u64));
        let backslash = zero(word ^ (ONES * b'\\' as u64));
        let control = word.wrapping_sub(ONES * 0x20) & !word;
        let found = (quote | backslash | control) & HIGH;
        if found != 0 {
            return at + found.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
}

/// A JSON number: sign, digits, and how many of the digits stand behind the point.
struct Number {
    negative: bool,
    digits: u64,
    scale: u32,
    /// The digits are all there are: no exponent, and none beyond what 64 bits hold.
    exact: bool,
    end: usize,
}

impl Number {
    fn float(&self, line: &str, from: usize) -> Option<f64> {
        // a double holds both exactly, so that the quotient is rounded once: Clinger, "How to Read
        // Floating Point Numbers Accurately", PLDI 1990
        const TENS: [f64; 23] = [
            1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18,
            1e19, 1e20, 1e21, 1e22,
        ];
        if self.exact
            && self.digits <= 1 << 53
            && let Some(ten) = TENS.get(self.scale as usize)
        {
            let value = self.digits as f64 / ten;
            return Some(if self.negative { -value } else { value });
        }
        line.get(from..self.end)?.parse().ok().filter(|value: &f64| value.is_finite())
    }

    /// The integer it is; `-0` and integers with a point are not usual.
    fn integer(&self) -> Option<i64> {
        if !self.exact || self.scale > 0 || (self.negative && self.digits == 0) {
            return None;
        }
        let value = i64::try_from(self.digits).ok()?;
        Some(if self.negative { -value } else { value })
    }
}

fn number(bytes: &[u8], from: usize) -> Option<Number> {
    let negative = *bytes.get(from)? == b'-';
    let first = from + usize::from(negative);
    let (mut value, mut at) = digits(bytes, first, 0);
    let whole = at - first;
    if whole == 0 || (whole > 1 && bytes[first] == b'0') {
        return None;
    }
    let (mut scale, mut exact) = (0, true);
    if bytes.get(at) == Some(&b'.') {
        let point = at;
        (value, at) = digits(bytes, at + 1, value);
        scale = at - point - 1;
        if scale == 0 {
            return None;
        }
    }
    if whole + scale > 19 {
        exact = false; // `value` has wrapped, or might have
    }
    if let Some(b'e' | b'E') = bytes.get(at) {
        exact = false;
        at += 1 + usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        let (_, end) = digits(bytes, at, 0);
        if end == at {
            return None;
        }
        at = end;
    }
    Some(Number { negative, digits: value, scale: scale as u32, exact, end: at })
}

/// `value` followed by the digits at `at`, and where they end. Wraps beyond 19 digits.
///
/// Eight digits at a time, as in Lemire, "Number Parsing at a Gigabyte per Second", 2021, section 3.
fn digits(bytes: &[u8], mut at: usize, mut value: u64) -> (u64, usize) {
    const TENS: [u64; 9] = [1, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000];
    loop {
        let word = word(bytes, at) ^ (ONES * b'0' as u64);
        let other = (word.wrapping_add(ONES * 0x76) | word) & HIGH;
        let count = (other.trailing_zeros() / 8) as usize;
        if count == 0 {
            return (value, at);
        }
        let word = word << (64 - 8 * count); // zeros in front
        let pairs = (word * 10 + (word >> 8)) & 0x00FF_00FF_00FF_00FF;
        let fours = (pairs * 100 + (pairs >> 16)) & 0x0000_FFFF_0000_FFFF;
        let eight = (fours * 10_000 + (fours >> 32)) & 0xFFFF_FFFF;
        value = value.wrapping_mul(TENS[count]).wrapping_add(eight);
        at += count;
        if count < 8 {
            return (value, at);
        }
    }
}

/// End of the string that starts at `at`, escapes allowed.
fn string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut at = plain_end(bytes, at + 1);
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => match bytes.get(at + 1)? {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => at += 2,
                b'u' if bytes.get(at + 2..at + 6)?.iter().all(u8::is_ascii_hexdigit) => at += 6,
                _ => return None,
            },
            _ => return None,
        }
        at = plain_end(bytes, at);
    }
}

/// End of the JSON value at `at`, which stands in `depth` others.
fn skip(bytes: &[u8], at: usize, depth: usize) -> Option<usize> {
    match bytes.get(at)? {
        b'"' => string_end(bytes, at),
        b'-' | b'0'..=b'9' => Some(number(bytes, at)?.end),
        b'{' | b'[' if depth < DEPTH_MAX => {
            let object = bytes[at] == b'{';
            let close = if object { b'}' } else { b']' };
            let mut at = blanks(bytes, at + 1);
            if *bytes.get(at)? == close {
                return Some(at + 1);
            }
            loop {
                if object {
                    if *bytes.get(at)? != b'"' {
                        return None;
                    }
                    at = blanks(bytes, string_end(bytes, at)?);
                    if *bytes.get(at)? != b':' {
                        return None;
                    }
                    at = blanks(bytes, at + 1);
                }
                at = blanks(bytes, skip(bytes, at, depth + 1)?);
                match bytes.get(at)? {
                    b',' => at = blanks(bytes, at + 1),
                    end if *end == close => return Some(at + 1),
                    _ => return None,
                }
            }
        }
        _ => ["true", "false", "null"]
            .into_iter()
            .find(|word| bytes[at..].starts_with(word.as_bytes()))
            .map(|word| at + word.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Decoded, Format, Rows, decode};
    use super::*;
    use crate::schema::built_in;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    const NOW: Micros = Micros(1_800_000_000_000_000);

    fn schema(unknown_fields: UnknownFields) -> StreamSchema {
        let columns = r#"[{"name":"symbol","type":"utf8","nullable":false},{"name":"price","type":"float64","nullable":false},
            {"name":"n","type":"int64"},{"name":"flag","type":"bool"},{"name":"amount","type":"decimal(10,2)"},
            {"name":"at","type":"timestamp"},{"name":"props","type":"json"}]"#;
        StreamSchema::new("test.events".parse().unwrap(), serde_json::from_str(columns).unwrap(), unknown_fields)
            .unwrap()
    }

    /// What the strict reader alone makes of the lines.
    fn strict(schema: &StreamSchema, body: &[u8], unit: TsUnit) -> Decoded {
        let mut rows = Rows::new(schema, unit, Bounds::default(), NOW, body.len());
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        body.split(|&byte| byte == b'\n')
            .filter(|line| !line.trim_ascii().is_empty())
            .for_each(|line| rows.event(line));
        rows.finish().unwrap()
    }

    fn check(schema: &StreamSchema, body: &[u8], unit: TsUnit) {
        let strict = strict(schema, body, unit);
        if strict.batch.num_rows() + strict.rejected == 0 {
            return;
        }
        let got = decode(schema, body, Format::Ndjson, unit, &Bounds::default(), NOW).unwrap();
        let text = String::from_utf8_lossy(body);
        assert_eq!(got.batch, strict.batch, "{text}");
        assert_eq!((got.rejected, &got.errors), (strict.rejected, &strict.errors), "{text}");
    }

    fn number() -> impl Strategy<Value = String> {
        const ODD: &[&str] = &[
            "0",
            "-0",
            "01",
            "-01",
            "1.",
            ".5",
            "-",
            "+1",
            "1.50",
            "1e5",
            "1E-3",
            "1e+2",
            "1e",
            "1e999",
            "-1e999",
            "1e-999",
            "-0.0",
            "9007199254740993",
            "9007199254740992.5",
            "9223372036854775807",
            "9223372036854775808",
            "-9223372036854775808",
            "-9223372036854775809",
            "18446744073709551615",
            "18446744073709551616",
            "9999999999999999999",
            "99999999999999999999",
            "0.1234567890123456789",
            "123456789012345678901234567890.5",
            "2.2250738585072011e-308",
            "5e-324",
            "1.7976931348623157e308",
            "0.00000000000000000000001",
            "8.41e21",
            "1234567.8",
            "12345678.25",
            "123456789.125",
            "0x10",
            "1_000",
            "NaN",
            "-Infinity",
        ];
        prop_oneof![
            select(ODD).prop_map(str::to_owned),
            any::<i64>().prop_map(|n| n.to_string()),
            (any::<u64>(), 0..64u32).prop_map(|(n, shift)| (n >> shift).to_string()),
            any::<f64>().prop_filter("finite", |x| x.is_finite()).prop_map(|x| format!("{x:?}")),
            (any::<i32>(), 0..12usize).prop_map(|(n, places)| format!("{:.places$}", f64::from(n) / 1e4)),
            (1_000_000_000_000..1_800_000_000_000_i64).prop_map(|n| n.to_string()),
        ]
    }

    fn value() -> impl Strategy<Value = String> {
        const ODD: &[&str] = &[
            "true",
            "false",
            "null",
            "nul",
            "truefalse",
            "\"\"",
            "\"A\"",
            "\"a longer text than a word\"",
            "\"ü€😀\"",
            r#""a\nb""#,
            r#""\ud83d\ude00""#,
            r#""\ud800""#,
            r#""\u0000""#,
            r#""\q""#,
            r#""\u12""#,
            "\"\t\"",
            "\"\u{7f}\"",
            "\"open",
            "\"2024-01-01T00:00:00Z\"",
            "\"2024-02-30T00:00:00Z\"",
            "\"2024-01-01 12:00:00.123456+02:00\"",
            "\"12.34\"",
            "\"-0.5\"",
            "[]",
            "{}",
            "[1,2]",
            "[1,]",
            "[1 2]",
            r#"{"a":{"b":[null, 1e999]}}"#,
            r#"{"a":1,"a":2}"#,
            r#"{"a" : "\n"}"#,
            "{1:2}",
            "[\"\\x\"]",
            "[01]",
            "",
        ];
        let deep = (60..70usize).prop_map(|n| "[".repeat(n) + &"]".repeat(n));
        let long = (100..140usize).prop_map(|n| format!("\"{}\"", "x".repeat(n)));
        prop_oneof![4 => number(), 4 => select(ODD).prop_map(str::to_owned), 1 => deep, 1 => long]
    }

    /// A field with a value that its column takes.
    fn good() -> impl Strategy<Value = (String, String)> {
        prop_oneof![
            Just(("symbol".to_owned(), "\"ETH\"".to_owned())),
            (0..1_000_000i32).prop_map(|n| ("price".to_owned(), format!("{}", f64::from(n) / 1e3))),
            any::<i32>().prop_map(|n| ("n".to_owned(), n.to_string())),
            (1_600_000_000_000..1_700_000_000_000_i64).prop_map(|n| ("ts".to_owned(), n.to_string())),
            any::<bool>().prop_map(|flag| ("flag".to_owned(), flag.to_string())),
            Just(("id".to_owned(), "\"a-1\"".to_owned())),
        ]
    }

    fn field() -> impl Strategy<Value = (String, String)> {
        const NAMES: &[&str] = &[
            "symbol",
            "price",
            "n",
            "flag",
            "amount",
            "at",
            "props",
            "ts",
            "id",
            "extra",
            "x",
            "y",
            "symbols",
            "",
            "ü",
            r"pr\u0069ce",
            r"a\q",
        ];
        prop_oneof![3 => good(), 1 => (select(NAMES).prop_map(str::to_owned), value())]
    }

    fn line() -> impl Strategy<Value = Vec<u8>> {
        let blank = || prop_oneof![6 => Just(""), 1 => Just(" "), 1 => Just("\t "), 1 => Just("\r")];
        let required = [("symbol".to_owned(), "\"BTC\"".to_owned()), ("price".to_owned(), "101.25".to_owned())];
        let fields = (vec(field(), 0..7), any::<bool>()).prop_map(move |(mut fields, complete)| {
            if complete {
                fields.retain(|(name, _)| name != "symbol" && name != "price");
                fields.extend(required.clone());
            }
            fields
        });
        let text = (fields, vec(blank(), 4)).prop_map(|(fields, blanks)| {
            let [a, b, c, d] = [blanks[0], blanks[1], blanks[2], blanks[3]];
            let fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("{a}\"{name}\"{b}:{c}{value}{d}")).collect();
            format!("{a}{{{}{b}}}{c}", fields.join(","))
        });
        // and now and then a byte lost, doubled or changed
        let harm = proptest::option::weighted(0.15, (any::<prop::sample::Index>(), 0..3, any::<u8>()));
        (text, harm).prop_map(|(text, harm)| {
            let mut bytes = text.into_bytes();
            if let Some((at, how, byte)) = harm {
                let at = at.index(bytes.len());
                match how {
                    0 => _ = bytes.remove(at),
                    1 => bytes.insert(at, bytes[at]),
                    _ => bytes[at] = byte,
                }
            }
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn what_the_scanner_takes_is_what_the_strict_reader_takes(
            lines in vec(line(), 1..12),
            unknown in select(vec![UnknownFields::Keep, UnknownFields::Ignore, UnknownFields::Reject]),
            unit in select(vec![TsUnit::Seconds, TsUnit::Millis, TsUnit::Micros, TsUnit::Nanos]),
        ) {
            check(&schema(unknown), &lines.join(&b'\n'), unit);
        }

        #[test]
        fn a_number_is_read_as_the_strict_reader_reads_it(numbers in vec(number(), 1..40)) {
            let lines = numbers.iter().map(|n| format!(r#"{{"symbol":"A","price":{n},"n":{n},"ts":{n},"id":{n}}}"#));
            let prices = numbers.iter().map(|n| format!(r#"{{"symbol":"A","price":{n}}}"#));
            let body: Vec<String> = lines.chain(prices).collect();
            check(&schema(UnknownFields::Keep), body.join("\n").as_bytes(), TsUnit::Micros);
        }
    }

    /// The published JSON parsing cases as values of a column, of a field without one, and as lines.
    #[test]
    fn the_json_parsing_suite_reads_as_the_strict_reader_reads_it() {
        let Ok(file) = std::fs::File::open("../../shared/data/truth/json_parsing/cases.ndjson.zst") else {
            println!("skipped: the shared data folder is not beside the project");
            return;
        };
        let text = std::io::read_to_string(zstd::Decoder::new(file).unwrap()).unwrap();
        for line in text.lines() {
            let case: serde_json::Value = serde_json::from_str(line).unwrap();
            let bytes = super::super::tests::base64_decode(case["base64"].as_str().unwrap());
            let wrapped = ["props", "x", "symbol", "n"].map(|name| {
                let head = format!(r#"{{"symbol":"A","price":1,"{name}":"#)
                    .replace(r#""symbol":"A","price":1,"symbol""#, r#""price":1,"symbol""#);
                [head.as_bytes(), &bytes[..], b"}"].concat()
            });
            for body in wrapped.iter().chain([&bytes]) {
                for unknown in [UnknownFields::Keep, UnknownFields::Ignore] {
                    check(&schema(unknown), body, TsUnit::Millis);
                }
            }
        }
    }

    #[test]
    fn usual_lines_are_scanned() {
        let trades = &built_in()[0];
        let mut scanner = Scanner::new(trades, TsUnit::Millis, Bounds::default(), NOW);
        for line in [
            r#"{"ts":1700000000123,"symbol":"BTC-USD","price":64123.45,"qty":0.25,"side":"buy","venue":"X"}"#,
            r#"{"ts":1700000000123,"symbol":"BTC-USD","price":64123.45,"qty":0.25}"#,
            r#"{"price":1,"qty":2,"symbol":"A","side":null}"#,
            r#"{"ts": "2024-01-01T00:00:00.5Z", "id": "t-1", "symbol": "A", "price": 0.1234567890123456789, "qty": 1e-05}"#,
            r#"{"id":17,"symbol":"a \"quoted\" name","price":1,"qty":2,"workspace":"w","tags":["a",{"b":null}]}  "#,
            " {\"symbol\":\"ü\",\t\"price\" : -0.0,\"qty\":9007199254740993}\r",
        ] {
            assert!(scanner.scan(line).is_some(), "{line}");
        }
    }
}
