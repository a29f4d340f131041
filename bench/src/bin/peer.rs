//! `tidewatch-peer`: one benchmark query over a file of trades, as the runner of all engines starts it.

use anyhow::{Context, Result, bail};
use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch};
use arrow::datatypes::Float64Type;
use bench::pipeline::each_batch;
use bench::workload::{Query, Run, trades};
use clap::Parser;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs a windowed query over trades and prints what it took as `RESULT {json}`.
#[derive(Parser)]
#[command(version, after_help = "Example: tidewatch-peer data/5000000 w1 w1.parquet 2 0 ndjson")]
struct Args {
    /// Folder with trades.ndjson and meta.json.
    data: PathBuf,
    workload: Workload,
    /// Where the rows go: Parquet, or CSV by extension. With `all` each query's name goes in front of the extension.
    out: PathBuf,
    /// Cores to use.
    #[arg(default_value_t = 2)]
    threads: usize,
    /// Taken and ignored: other engines are told their batch size here.
    #[arg(default_value_t = 0)]
    batch: usize,
    /// Decode inside the clock, or have decoded batches in memory first.
    #[arg(default_value = "ndjson")]
    source: Source,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq)]
enum Workload {
    /// Decode only.
    W0,
    /// Tumbling windows.
    W1,
    /// Hopping windows.
    W2,
    /// Sessions.
    W3,
    /// The three queries at once over one decode.
    All,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq)]
enum Source {
    Ndjson,
    Mem,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let meta = std::fs::read(args.data.join("meta.json")).context("meta.json beside the trades")?;
    let meta: serde_json::Value = serde_json::from_slice(&meta)?;
    let events = meta["events"].as_u64().context("`events` in meta.json")?;
    let schema = trades();
    let file = args.data.join("trades.ndjson");
    let queries = match args.workload {
        Workload::W0 => &[][..],
        Workload::W1 => &[Query::Tumbling],
        Workload::W2 => &[Query::Hopping],
        Workload::W3 => &[Query::Sessions],
        Workload::All => &Query::ALL,
    };
    let mut run = Run::new(queries, &schema)?;
    let (mut seen, mut volume) = (0, 0.0);
    let mut step = |batch: &RecordBatch| {
        seen += batch.num_rows() as u64;
        if queries.is_empty() {
            let qty = batch.column_by_name("qty").context("the trades have a quantity")?;
            volume += arrow::compute::sum(qty.as_primitive::<Float64Type>()).unwrap_or_default();
        }
        run.step(batch)
    };
    let mut memory = Vec::new();
    if args.source == Source::Mem {
        each_batch(&file, &schema, args.threads, |batch| {
            memory.push(batch);
            Ok(())
        })?;
    }
    let began = Instant::now();
    match args.source {
        Source::Mem => memory.iter().try_for_each(&mut step)?,
        Source::Ndjson => each_batch(&file, &schema, args.threads, |batch| step(&batch))?,
    }
    let first_window = run.first_window;
    let results = run.finish()?;
    let elapsed = began.elapsed().as_secs_f64();
    if seen != events {
        bail!("{} holds {seen} events, meta.json says {events}", file.display());
    }
    let mut rows = 0;
    for (query, result) in results {
        rows += result.iter().map(RecordBatch::num_rows).sum::<usize>();
        let out = match queries {
            [_] => args.out.clone(),
            _ => beside(&args.out, query.name()),
        };
        write(&out, result)?;
    }
    if queries.is_empty() {
        rows = 1;
        let count = Arc::new(Int64Array::from(vec![i64::try_from(seen)?])) as ArrayRef;
        let volume = Arc::new(Float64Array::from(vec![volume])) as ArrayRef;
        write(&args.out, vec![RecordBatch::try_from_iter([("n", count), ("sum_qty", volume)])?])?;
    }
    let result = serde_json::json!({
        "peer": "tidewatch",
        "version": env!("CARGO_PKG_VERSION"),
        "workload": name(args.workload),
        "source": name(args.source),
        "events": events,
        "rows": rows,
        "elapsed_s": (elapsed * 1e3).round() / 1e3,
        "events_per_s": (events as f64 / elapsed).round(),
        "first_window_ms": first_window.map(|at| at.duration_since(began).as_secs_f64() * 1e3),
    });
    println!("\nRESULT {result}");
    Ok(())
}

fn name(value: impl clap::ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// `path` with `name` in front of its extension.
fn beside(path: &Path, name: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{name}.{extension}"))
}

/// Rows of one row group: what the writer keeps in memory.
const ROW_GROUP: usize = 1 << 14;

fn write(path: &Path, rows: Vec<RecordBatch>) -> Result<()> {
    let schema = rows.first().with_context(|| format!("no row for {}", path.display()))?.schema();
    let file = File::create(path).with_context(|| path.display().to_string())?;
    if path.extension().is_some_and(|extension| extension == "csv") {
        let mut writer = arrow::csv::Writer::new(std::io::BufWriter::new(file));
        return Ok(rows.iter().try_for_each(|batch| writer.write(batch))?);
    }
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(ROW_GROUP)).build();
    let mut writer = ArrowWriter::try_new(file, schema, Some(properties))?;
    for batch in rows {
        writer.write(&batch)?;
    }
    writer.close()?;
    Ok(())
}
