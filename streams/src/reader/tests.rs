use super::*;
use crate::decode::{Bounds, Format, TsUnit, decode};
use crate::schema::built_in;
use serde_json::Value as Json;
use std::io::Write;
use std::path::PathBuf;

fn schema(stream: &str) -> &'static StreamSchema {
    built_in().iter().find(|schema| schema.stream.as_str() == stream).expect("a built-in stream")
}

/// A file of the recorded data, or `None` where it is not at hand.
fn recorded(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Reads a file of `market.trades` to its end: its events and its errors in their order.
fn read(path: &Path, mapping: Mapping, line_bytes_max: usize) -> Vec<String> {
    let reader = match Reader::open(path, schema("market.trades"), mapping, line_bytes_max) {
        Ok(reader) => reader,
        Err(error) => return vec![format!("! {error}")],
    };
    let mut all = Vec::new();
    for chunk in reader {
        match chunk {
            Err(error) => all.push(format!("! {error}")),
            Ok(chunk) => {
                assert_eq!(chunk.events.last().map(|mark| mark.end), Some(chunk.lines.len()));
                all.extend(String::from_utf8(chunk.lines).unwrap().lines().map(str::to_owned));
            }
        }
    }
    all
}

/// What each line of `expected` says stands in what is read: an event as a whole, an error in part.
fn check(name: &str, bytes: &[u8], mapping: Mapping, expected: &[&str]) {
    let (_folder, path) = file(name, bytes);
    let found = read(&path, mapping, 200);
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        match expected.strip_prefix("! ") {
            Some(part) => assert!(found.starts_with("! ") && found.contains(part), "`{found}` lacks `{part}`"),
            None => assert_eq!(found, expected),
        }
    }
}

const CSV: &str = "ts,symbol,price,qty,note\n\
    2013-10-07T08:00:00Z,SPY,167.90,100,\n\
    1381132800001,\"B,\"\"AC\",13.86,2e2,007\n";

const EVENTS: [&str; 2] = [
    r#"{"ts":1381132800000000,"symbol":"SPY","price":167.90,"qty":100}"#,
    r#"{"ts":1381132800001000,"symbol":"B,\"AC","price":13.86,"qty":200,"note":"007"}"#,
];

#[test]
fn csv_is_typed_by_the_stream_and_the_rest_stays_text() {
    check("a.csv", CSV.as_bytes(), Mapping::default(), &EVENTS);
    check("a.tsv", CSV.replace(',', "\t").replace("B\t", "B,").as_bytes(), Mapping::default(), &EVENTS);
    check("bom.csv", format!("\u{feff}{CSV}").as_bytes(), Mapping::default(), &EVENTS);
}

#[test]
fn ingest_accepts_what_is_read() {
    let (body, now) = (EVENTS.join("\n"), Micros(1_400_000_000_000_000));
    let (schema, bounds) = (schema("market.trades"), Bounds::default());
    let decoded = decode(schema, body.as_bytes(), Format::Ndjson, TsUnit::Micros, &bounds, now).unwrap();
    assert_eq!((decoded.batch.num_rows(), decoded.errors), (2, Vec::new()));
}

#[test]
fn dates_around_1970_are_read_so_that_ingest_accepts_them() {
    let csv = b"ts,symbol,price,qty\n1969-12-31,SPY,1,1\n1970-02-01T00:00:00Z,SPY,1,1\n1950-01-03,SPY,1,1\n";
    let expected = [
        r#"{"ts":"1969-12-31T00:00:00.000000Z","symbol":"SPY","price":1,"qty":1}"#,
        r#"{"ts":"1970-02-01T00:00:00.000000Z","symbol":"SPY","price":1,"qty":1}"#,
        r#"{"ts":-630979200000000,"symbol":"SPY","price":1,"qty":1}"#,
    ];
    check("a.csv", csv, Mapping::default(), &expected);
    let (body, now) = (expected.join("\n"), Micros(1_400_000_000_000_000));
    let (schema, bounds) = (schema("market.trades"), Bounds::default());
    let decoded = decode(schema, body.as_bytes(), Format::Ndjson, TsUnit::Micros, &bounds, now).unwrap();
    assert_eq!((decoded.batch.num_rows(), decoded.errors), (3, Vec::new()));
    // a count stays one: in the wrong unit it is to be refused
    let counted = [r#"{"ts":1700000000000,"symbol":"SPY","price":1,"qty":1}"#];
    check("b.csv", b"ts,symbol,price,qty\n1700000000,SPY,1,1\n", Mapping::default(), &counted);
}

#[test]
fn compressed_files_read_like_plain_ones_also_in_several_frames() {
    let (first, second) = CSV.split_at(60);
    let gz = [gzip(first.as_bytes()), gzip(second.as_bytes())].concat();
    check("a.csv.gz", &gz, Mapping::default(), &EVENTS);
    let frame = |text: &str| zstd::encode_all(text.as_bytes(), 1).unwrap();
    check("a.csv.zst", &[frame(first), frame(second)].concat(), Mapping::default(), &EVENTS);
}

#[test]
fn a_mapping_renames_scales_and_selects() {
    let mapping = Mapping::default()
        .time("time", "s")
        .and_then(|m| m.column("price=p*0.01"))
        .and_then(|m| m.column("qty=n"))
        .and_then(|m| m.column("symbol='SPY'"))
        .unwrap();
    let expected = [r#"{"symbol":"SPY","ts":1381132800500000,"price":167.9,"qty":3,"side":"buy"}"#];
    check("a.csv", b"time,p,n,side,flags\n1381132800.5,16790,3,buy,7\n", mapping.clone(), &expected);
    let json = r#"{"time":1381132800.5,"p":"16790","n":3,"side":"buy","flags":[7]}"#;
    check("a.ndjson", json.as_bytes(), mapping, &expected);
}

#[test]
fn a_mapped_column_that_is_not_there_is_named_with_those_that_are() {
    let mapping = Mapping::default().column("price=close").unwrap();
    check("a.csv", b"symbol,open\nSPY,1\n", mapping, &["! no column `close`; it has `symbol`, `open`"]);
}

#[test]
fn json_lines_elements_and_values_keep_their_types() {
    let events = [r#"{"symbol":"A","price":1.50,"extra":{"a": [1]}}"#, r#"{"ts":5000,"symbol":"B"}"#];
    let lines =
        "{\"symbol\":\"A\",\"price\":1.50,\"qty\":null,\"extra\":{\"a\": [1]}}\r\n\n{\"ts\":5,\"symbol\":\"B\"}";
    check("a.ndjson", lines.as_bytes(), Mapping::default(), &events);
    check("a.json", lines.as_bytes(), Mapping::default(), &events);
    let array = "[{\"symbol\":\"A\",\"price\":1.50,\"extra\":{\"a\":\n[1]}},\n{\"ts\":5,\n\"symbol\":\"B\"}]";
    check("a.json.gz", &gzip(array.as_bytes()), Mapping::default(), &events);
}

#[test]
fn a_bad_row_is_named_and_the_rest_goes_on() {
    let csv = b"symbol,price,qty\nA,1,1\nB,1\nC,x,1\n\"D\nd\",1,1\n\xffE,1,1\nF,1,1,1\nG,,2\n";
    let expected = [
        r#"{"symbol":"A","price":1,"qty":1}"#,
        "! a.csv` line 3: 2 fields, but the header has 3",
        "! line 4: column `price`: `x` is not a number",
        r#"{"symbol":"D\nd","price":1,"qty":1}"#,
        "! line 7: column `symbol` is not UTF-8; save the file as UTF-8",
        "! line 8: 4 fields, but the header has 3",
        r#"{"symbol":"G","qty":2}"#,
    ];
    check("a.csv", csv, Mapping::default(), &expected);

    let long = format!("{{\"symbol\":\"{}\"}}", "x".repeat(300));
    let ndjson = format!("{{\"a\":1}}\n{long}\n[1]\n{{\"a\":\n{{\"ts\":\"noon\"}}\n{{\"b\":2}}\n");
    let expected = [
        r#"{"a":1}"#,
        "! a.ndjson` line 2: longer than 200 bytes",
        "! line 3: not a JSON object",
        "! line 4: not a JSON object",
        "! line 5: column `ts`: `noon` is not a time; give RFC 3339",
        r#"{"b":2}"#,
    ];
    check("a.ndjson", ndjson.as_bytes(), Mapping::default(), &expected);
}

#[test]
fn a_quote_that_is_never_closed_does_not_take_the_file_into_memory() {
    let csv = format!("symbol,price\nA,1\nB,\"{}", "2\n".repeat(200_000));
    let (_folder, path) = file("a.csv", csv.as_bytes());
    let mut reader = Reader::open(&path, schema("market.trades"), Mapping::default(), 200).unwrap();
    assert_eq!(reader.next().unwrap().unwrap().events.len(), 1);
    let error = reader.next().unwrap().unwrap_err();
    assert!(error.to_string().contains("line 3: the row is longer than 200 bytes; a quote"), "{error}");
    assert!(!error.is_row());
    assert!(reader.next().is_none());
    assert!(reader.bytes_read() < reader.bytes_total() / 2);
}

#[test]
fn a_file_that_was_cut_off_says_so_after_the_events_before_the_cut() {
    let text: String = (0..20_000).map(|i| format!("{{\"symbol\":\"A\",\"price\":{}}}\n", i * 7919 % 10_007)).collect();
    for (name, bytes) in
        [("a.ndjson.gz", gzip(text.as_bytes())), ("a.ndjson.zst", zstd::encode_all(text.as_bytes(), 1).unwrap())]
    {
        let (_folder, path) = file(name, &bytes[..bytes.len() - 10]);
        let found = read(&path, Mapping::default(), 200);
        assert!(found.len() > 1, "{name}");
        let last = found.last().unwrap();
        assert!(last.contains("in the middle of its") && last.contains("again"), "{name}: {last}");
        assert_eq!(found.iter().filter(|line| line.starts_with('!')).count(), 1);

        let mut broken = bytes.clone();
        let middle = broken.len() / 2;
        broken[middle..middle + 20].fill(0xff);
        let (_folder, path) = file(name, &broken);
        let found = read(&path, Mapping::default(), 200);
        let last = found.last().unwrap();
        assert!(last.starts_with("! ") && last.contains("broken"), "{name}: {last}");
    }
}

#[test]
fn a_wrong_name_is_said_before_anything_is_read() {
    let none = Mapping::default;
    check("a.txt", b"x", none(), &["! no known extension; known are .csv"]);
    check("a.csv", &gzip(b"x"), none(), &["! named as plain text, but its first bytes are gzip; rename it"]);
    check("a.csv.gz", b"symbol\nA\n", none(), &["! named as gzip, but its first bytes are something else"]);
    check("a.ndjson.gz", b"", none(), &["! first bytes are nothing: it is empty"]);
    check("a.parquet", b"PK\x03\x04", none(), &["! named as parquet, but its first bytes are a zip archive"]);
    check("a.xlsx", b"\xd0\xcf\x11\xe0", none(), &["! a workbook with a password"]);
    check("a.parquet", b"PAR1 and no more", none(), &["! no readable parquet file"]);
    let missing = Reader::open(Path::new("none.csv"), schema("market.trades"), none(), 1);
    assert!(missing.err().unwrap().to_string().contains("cannot open `none.csv`"));
}

#[test]
fn a_parquet_file_is_read_whatever_its_own_and_its_outer_compression() {
    use ::parquet::arrow::ArrowWriter;
    use ::parquet::basic::Compression;
    use ::parquet::file::properties::WriterProperties;
    use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray};
    let one: ArrayRef = std::sync::Arc::new(Float64Array::from(vec![1.5]));
    let symbol: ArrayRef = std::sync::Arc::new(StringArray::from(vec!["A"]));
    let batch = RecordBatch::try_from_iter([("symbol", symbol), ("price", one.clone()), ("qty", one)]).unwrap();
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::LZ4_RAW, Compression::LZ4] {
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        let bytes = writer.into_inner().unwrap();
        let expected = [r#"{"symbol":"A","price":1.5,"qty":1.5}"#];
        check("a.parquet", &bytes, Mapping::default(), &expected);
        check("a.parquet.gz", &gzip(&bytes), Mapping::default(), &expected);
        check("a.parquet.zst", &zstd::encode_all(&*bytes, 1).unwrap(), Mapping::default(), &expected);
    }
    check("a.parquet.gz", &gzip(b"symbol"), Mapping::default(), &["! named as parquet, but its first bytes are some"]);
    let cut = &gzip(&[b"PAR1".as_slice(), &[7; 100]].concat())[..20];
    check("a.xlsx.gz", cut, Mapping::default(), &["! in the middle of its gzip data"]);
}

#[test]
fn an_empty_file_has_no_events() {
    check("a.csv", b"", Mapping::default(), &[]);
    check("a.csv", b"symbol,price\n", Mapping::default(), &[]);
    check("a.ndjson", b"", Mapping::default(), &[]);
    check("a.json", b"[]", Mapping::default(), &[]);
}

#[test]
fn recorded_ticks_have_the_published_counts_volume_and_vwap() {
    let days = [
        ("spy_20131007", 250_601, 97_062_721, 167.906729, 167.01, 168.90),
        ("bac_20131008", 125_872, 92_437_597, 13.775058, 13.67, 14.10),
        ("aig_20131007", 25_351, 5_300_449, 48.925055, 48.69, 49.18),
    ];
    for (day, rows, shares, vwap, low, high) in days {
        let Some(path) = recorded(&format!("market/us_equity_ticks/{day}_trades.parquet")) else { return };
        let mapping = Mapping::default()
            .time("ts_ns", "ns")
            .and_then(|m| m.column("price=price_e4*0.0001"))
            .and_then(|m| m.column("qty=size"))
            .and_then(|m| m.column("venue=exchange"))
            .and_then(|m| m.column("symbol='X'"))
            .unwrap();
        let mut reader = Reader::open(&path, schema("market.trades"), mapping, LINE_BYTES_MAX).unwrap();
        let (mut count, mut volume, mut turnover) = (0, 0.0, 0.0);
        let (mut least, mut most, mut before) = (f64::MAX, f64::MIN, Micros::MIN);
        while let Some(chunk) = reader.next() {
            let chunk = chunk.unwrap();
            assert!(chunk.events.len() <= CHUNK_EVENTS);
            assert!(reader.bytes_read() <= reader.bytes_total());
            let lines = std::str::from_utf8(&chunk.lines).unwrap().lines();
            for (line, mark) in lines.zip(&chunk.events) {
                let event: Json = serde_json::from_str(line).unwrap();
                let (price, qty) = (event["price"].as_f64().unwrap(), event["qty"].as_f64().unwrap());
                assert_eq!(event["ts"].as_i64(), mark.ts.map(|ts| ts.0));
                assert!(mark.ts.unwrap() >= before, "the prints are in the order of time");
                assert!(event["venue"].is_string());
                before = mark.ts.unwrap();
                count += 1;
                volume += qty;
                turnover += price * qty;
                (least, most) = (least.min(price), most.max(price));
            }
        }
        assert_eq!((count, volume as i64), (rows, shares), "{day}");
        assert!((turnover / volume - vwap).abs() < 1e-6, "{day}: {}", turnover / volume);
        assert_eq!((least, most), (low, high), "{day}");
        assert_eq!(reader.bytes_read(), reader.bytes_total());
    }
}

#[test]
fn recorded_bars_read_from_compressed_csv() {
    let Some(path) = recorded("market/bars/btc_perp_1m_20211231_20220201.csv.zst") else { return };
    let mapping = Mapping::default()
        .time("timestamp", "s")
        .and_then(|m| m.column("symbol='BTC-PERP'"))
        .and_then(|m| {
            ["open", "high", "low", "close", "volume"].iter().try_fold(m, |m, c| m.column(&format!("{c}={c}")))
        })
        .unwrap();
    let reader = Reader::open(&path, schema("market.bars"), mapping, LINE_BYTES_MAX).unwrap();
    let events: usize = reader.map(|chunk| chunk.unwrap().events.len()).sum();
    assert_eq!(events, 45_031);
}

#[test]
fn a_recorded_workbook_has_the_published_sums() {
    let Some(path) = recorded("xlsx/business/financial_sample.xlsx") else { return };
    let mapping = Mapping::default().time("Date", "ms").unwrap();
    let mut reader = Reader::open(&path, schema("analytics.events"), mapping, LINE_BYTES_MAX).unwrap();
    let chunk = reader.next().unwrap().unwrap();
    assert!(reader.next().is_none());
    assert_eq!(chunk.events.len(), 700);
    let rows: Vec<Json> = chunk.lines.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).collect();
    let sum = |column: &str| rows.iter().map(|row| row[column].as_f64().unwrap_or(0.0)).sum::<f64>();
    for (column, expected) in [
        ("Units Sold", 1_125_806.0),
        ("Gross Sales", 127_931_598.50),
        ("Discounts", 9_205_248.24),
        ("Sales", 118_726_350.26),
        ("COGS", 101_832_648.0),
        ("Profit", 16_893_702.26),
    ] {
        assert!((sum(column) - expected).abs() < 0.01, "{column}: {}", sum(column));
    }
    assert_eq!(rows[0]["Year"], "2014", "text stays text");
    assert_eq!(rows[0]["ts"], 1_388_534_400_000_000i64, "a date cell is midnight UTC");
}

#[test]
fn hostile_and_odd_workbooks_end_in_events_or_errors() {
    let Some(folder) = recorded("xlsx") else { return };
    for kind in ["poi_malformed", "calamine"] {
        let (mut good, mut bad) = (0, 0);
        for entry in std::fs::read_dir(folder.join(kind)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "xlsx") {
                continue;
            }
            let found = read(&path, Mapping::default(), LINE_BYTES_MAX);
            match found.iter().any(|line| line.starts_with("! ") && !line.contains(" row ")) {
                true => bad += 1,
                false => good += 1,
            }
        }
        println!("{kind}: {good} read, {bad} refused");
        assert!(if kind == "calamine" { good > 40 } else { bad >= 3 }, "{kind}: {good} read, {bad} refused");
    }
}

#[test]
fn every_kind_of_recorded_file_reads() {
    let files = [
        ("analytics/online_retail_ii_2009_2010.parquet", 525_461),
        ("analytics/wikipedia_edits_20150912.ndjson.zst", 39_244),
        ("analytics/stripe_webhooks.ndjson", 88),
        ("analytics/telco_customer_churn.csv", 7_043),
        ("chat/irc_support_channels.ndjson.zst", 9_600),
    ];
    for (name, rows) in files {
        let Some(path) = recorded(name) else { return };
        // Only these events' own fields matter: their times have names and units of their own.
        let mapping = Mapping::default().column("text='x'").unwrap();
        let reader = Reader::open(&path, schema("chat.messages"), mapping, LINE_BYTES_MAX).unwrap();
        let events: usize = reader.map(|chunk| chunk.unwrap().events.len()).sum();
        assert_eq!(events, rows, "{name}");
    }
}
