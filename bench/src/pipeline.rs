//! A file of events as decoded batches: read and decoded ahead of whoever takes them, in the file's order.

use anyhow::{Context, Result, anyhow, bail};
use arrow::array::RecordBatch;
use engine::event::Micros;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::UNIX_EPOCH;
use streams::decode::{Bounds, Format, TsUnit, decode};
use streams::schema::StreamSchema;

/// Bytes that are read and decoded at a time: about 10,000 events, one batch. Larger ones leave the
/// cache, smaller ones cost more calls.
const CHUNK_BYTES: usize = 1 << 20;

/// Batches that each decoding thread may be ahead of the caller.
const AHEAD: usize = 2;

/// Calls `each` with all events of the NDJSON file at `path`, in order, while `decoders` threads decode what follows.
///
/// `ts` counts microseconds. Memory holds a few chunks for each thread, whatever the size of the file.
/// Fails with the first event that the schema refuses, and with the first error of `each`.
pub fn each_batch(
    path: &Path,
    schema: &StreamSchema,
    decoders: usize,
    mut each: impl FnMut(RecordBatch) -> Result<()>,
) -> Result<()> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    std::thread::scope(|scope| {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for _ in 0..decoders.max(1) {
            let (input, chunks) = sync_channel::<Vec<u8>>(1);
            let (decoded, output) = sync_channel::<Result<RecordBatch>>(AHEAD);
            inputs.push(input);
            outputs.push(output);
            scope.spawn(move || {
                // a failed send means that the caller has left with an error
                chunks.iter().map(|chunk| decode_all(schema, &chunk)).try_for_each(|batch| decoded.send(batch))
            });
        }
        let reader = scope.spawn(move || -> Result<()> {
            let mut rest = Vec::new();
            for input in inputs.iter().cycle() {
                let Some(chunk) = next_chunk(&mut file, &mut rest)? else { break };
                if input.send(chunk).is_err() {
                    break;
                }
            }
            Ok(())
        });
        for output in outputs.iter().cycle() {
            let Ok(batch) = output.recv() else { break };
            each(batch?)?;
        }
        drop(outputs);
        reader.join().map_err(|_| anyhow!("the reading thread panicked"))?
    })
}

/// Whole lines, about [`CHUNK_BYTES`] of them; `rest` keeps what was read of the line after. `None` at the end.
fn next_chunk(input: &mut impl Read, rest: &mut Vec<u8>) -> Result<Option<Vec<u8>>> {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES + rest.len());
    chunk.append(rest);
    loop {
        let read = input.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
        if read == 0 {
            return Ok(Some(chunk).filter(|chunk| !chunk.is_empty()));
        }
        if let Some(end) = memchr::memrchr(b'\n', &chunk) {
            rest.extend_from_slice(&chunk[end + 1..]);
            chunk.truncate(end + 1);
            return Ok(Some(chunk));
        }
    }
}

fn decode_all(schema: &StreamSchema, lines: &[u8]) -> Result<RecordBatch> {
    let now = Micros(i64::try_from(UNIX_EPOCH.elapsed()?.as_micros())?);
    let decoded = decode(schema, lines, Format::Ndjson, TsUnit::Micros, &Bounds::default(), now)?;
    if let Some(error) = decoded.errors.first() {
        bail!(
            "{} events were refused, the first as {}: {}: {}",
            decoded.rejected,
            error.code,
            error.detail,
            error.payload
        );
    }
    Ok(decoded.batch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::trades;
    use arrow::array::AsArray;
    use arrow::datatypes::Float64Type;
    use std::io::Write;

    fn file(lines: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for n in 0..lines {
            let line = r#""workspace":"w","symbol":"s","qty":1,"side":"buy"}"#;
            writeln!(file, r#"{{"ts":1767623390775000,"price":{n},{line}"#).unwrap();
        }
        file
    }

    #[test]
    fn batches_come_in_the_order_of_the_file_whatever_the_number_of_threads() {
        let file = file(40_000);
        for decoders in [1, 2, 5] {
            let mut prices: Vec<f64> = Vec::new();
            each_batch(file.path(), &trades(), decoders, |batch| {
                prices.extend(batch.column_by_name("price").unwrap().as_primitive::<Float64Type>().values());
                Ok(())
            })
            .unwrap();
            assert!(prices.len() == 40_000 && prices.is_sorted(), "{decoders} threads, {} events", prices.len());
        }
    }

    #[test]
    fn a_bad_line_and_an_error_of_the_caller_end_it() {
        let mut file = file(40_000);
        let stopped = each_batch(file.path(), &trades(), 2, |_| bail!("enough"));
        assert_eq!(stopped.unwrap_err().to_string(), "enough");
        writeln!(file, "{{").unwrap();
        let refused = each_batch(file.path(), &trades(), 2, |_| Ok(())).unwrap_err();
        assert!(refused.to_string().contains("malformed_json"), "{refused}");
    }
}
