//! The windowed queries over trades that other engines are measured with, and their canonical results.

use anyhow::{Result, ensure};
use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema};
use engine::event::{Micros, Span, StreamName};
use engine::metric::Timing;
use engine::workspace::{Outputs, Workspace};
use sql::plan::Planner;
use std::sync::Arc;
use std::time::Instant;
use streams::schema::{Column, ColumnType, StreamSchema, UnknownFields};

/// The watermark stands this far behind the greatest event time: the data's greatest disorder.
const MAX_DELAY: Span = Span::seconds(10);

/// One of the queries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Query {
    /// Per workspace and symbol, a minute: count, volume, VWAP, lowest and highest price.
    Tumbling,
    /// Per symbol, five minutes every ten seconds: count and average price.
    Hopping,
    /// Per workspace, until 30 s without a trade: count.
    Sessions,
}

impl Query {
    pub const ALL: [Query; 3] = [Query::Tumbling, Query::Hopping, Query::Sessions];

    /// Its short name in result files.
    pub fn name(self) -> &'static str {
        match self {
            Query::Tumbling => "w1",
            Query::Hopping => "w2",
            Query::Sessions => "w3",
        }
    }

    /// As a metric over [`trades`].
    pub fn sql(self) -> &'static str {
        match self {
            Query::Tumbling => {
                "SELECT workspace, symbol, count(*) AS cnt, sum(qty) AS sum_qty, sum(price * qty) / sum(qty) AS vwap, \
                 min(price) AS min_price, max(price) AS max_price \
                 FROM bench.trades GROUP BY tumble(ts, INTERVAL '1 minute'), workspace, symbol"
            }
            Query::Hopping => {
                "SELECT symbol, count(*) AS cnt, avg(price) AS avg_price \
                 FROM bench.trades GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), symbol"
            }
            Query::Sessions => {
                "SELECT workspace, count(*) AS cnt FROM bench.trades GROUP BY session(ts, INTERVAL '30 seconds'), workspace"
            }
        }
    }

    /// Names of the result's columns that the metric's rows call `window_start` and `window_end`, where they are wanted.
    fn bounds(self) -> [Option<&'static str>; 2] {
        match self {
            Query::Tumbling | Query::Hopping => [Some("window_start"), None],
            Query::Sessions => [Some("session_start"), Some("session_end")],
        }
    }

    /// Rows of the metric as every engine reports them: instants as microseconds.
    fn canonical(self, rows: &RecordBatch) -> Result<RecordBatch> {
        let mut fields = Vec::new();
        let mut columns: Vec<ArrayRef> = Vec::new();
        for (name, column) in self.bounds().into_iter().zip(rows.columns()) {
            if let Some(name) = name {
                fields.push(Arc::new(Field::new(name, DataType::Int64, false)));
                columns.push(cast(column, &DataType::Int64)?);
            }
        }
        fields.extend(rows.schema().fields().iter().skip(2).cloned());
        columns.extend(rows.columns().iter().skip(2).cloned());
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
    }
}

/// Trades of many workspaces, with the workspace as a column.
pub fn trades() -> StreamSchema {
    let columns = ["workspace", "symbol", "price", "qty", "side"].map(|name| Column {
        name: name.to_owned(),
        kind: if matches!(name, "price" | "qty") { ColumnType::Float64 } else { ColumnType::Utf8 },
        nullable: false,
    });
    StreamSchema::new(stream(), columns.into(), UnknownFields::Reject).expect("the columns are well named")
}

fn stream() -> StreamName {
    "bench.trades".parse().expect("a stream name")
}

/// Queries that run over the same trades, and the final rows they have given.
pub struct Run {
    workspace: Workspace,
    stream: StreamName,
    results: Vec<(Query, Vec<RecordBatch>)>,
    /// When the first window was final.
    pub first_window: Option<Instant>,
}

impl Run {
    /// Plans `queries`; `schema` is the schema of the batches to come.
    pub fn new(queries: &[Query], schema: &StreamSchema) -> Result<Run> {
        let mut workspace = Workspace::default();
        let planner = Planner::default();
        let timing = Timing { max_delay: MAX_DELAY, allowed_lateness: Span::ZERO };
        for query in queries {
            let program = planner.program(query.sql(), |_: &StreamName| Some(schema.arrow().clone()));
            workspace.define(query.name().parse()?, 1, futures::executor::block_on(program)?, timing)?;
        }
        let results = queries.iter().map(|query| (*query, Vec::new())).collect();
        Ok(Run { workspace, stream: stream(), results, first_window: None })
    }

    /// Takes in the next trades.
    pub fn step(&mut self, trades: &RecordBatch) -> Result<()> {
        let outputs = self.workspace.step(&self.stream, trades);
        self.take(outputs)
    }

    /// Closes every window and gives each query's final rows, as they came.
    pub fn finish(mut self) -> Result<Vec<(Query, Vec<RecordBatch>)>> {
        let outputs = self.workspace.idle(&self.stream, Micros(i64::MAX / 2));
        self.take(outputs)?;
        Ok(self.results)
    }

    fn take(&mut self, outputs: Outputs) -> Result<()> {
        ensure!(outputs.failures.is_empty(), "{:?}", outputs.failures);
        ensure!(outputs.late.is_empty(), "{} events came too late for the watermark", outputs.late.len());
        for rows in outputs.rows {
            let Some((query, results)) =
                self.results.iter_mut().find(|(query, _)| query.name() == rows.metric.as_str())
            else {
                continue;
            };
            results.push(query.canonical(&rows.rows.batch)?);
            self.first_window.get_or_insert_with(Instant::now);
        }
        Ok(())
    }
}
