//! Nexmark queries as metrics give the rows of one batch query over all events.

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use arrow::util::display::array_value_to_string;
use bench::nexmark::{ndjson, schemas};
use datafusion::catalog::{MemTable, MemorySchemaProvider, SchemaProvider};
use datafusion::prelude::SessionContext;
use engine::event::{Micros, Span, StreamName};
use engine::metric::Timing;
use engine::workspace::Workspace;
use sql::plan::Planner;
use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};
use streams::decode::{Bounds, Format, TsUnit, decode};

const EVENTS: usize = 1_000_000;
const BASE_TIME: u64 = 1_767_623_400_000;

/// Rows that are taken in at a time.
const BATCH: usize = 10_000;

/// All events, one batch a stream, in order of arrival.
static STREAMS: LazyLock<Vec<RecordBatch>> = LazyLock::new(|| {
    let now = Micros(BASE_TIME as i64 * 1_000 + 86_400_000_000);
    let decoded = schemas().into_iter().zip(ndjson(BASE_TIME, EVENTS)).map(|(schema, lines)| {
        let got = decode(&schema, &lines, Format::Ndjson, TsUnit::Millis, &Bounds::default(), now).unwrap();
        assert!(got.errors.is_empty(), "{:?}", got.errors.first());
        got.batch
    });
    decoded.collect()
});

/// `window_start` and the columns behind `window_end` of every final row, as text.
fn metric_rows(sql: &str) -> BTreeSet<Vec<String>> {
    let mut workspace = Workspace::default();
    let planner = Planner::default();
    let schema = |stream: &StreamName| schemas().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
    let program = futures::executor::block_on(planner.program(sql, schema)).unwrap_or_else(|e| panic!("{sql}: {e}"));
    let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
    workspace.define("query".parse().unwrap(), 1, program, timing).unwrap();
    let mut outputs = Vec::new();
    for (schema, events) in schemas().iter().zip(STREAMS.iter()) {
        for from in (0..events.num_rows()).step_by(BATCH) {
            let batch = events.slice(from, BATCH.min(events.num_rows() - from));
            outputs.push(workspace.step(&schema.stream, &batch));
        }
        outputs.push(workspace.idle(&schema.stream, Micros(i64::MAX / 2)));
    }
    let mut rows = BTreeSet::new();
    for output in outputs {
        assert!(output.failures.is_empty() && output.late.is_empty(), "{:?}", output.failures);
        for batch in output.rows.into_iter().map(|rows| rows.rows.batch) {
            let without_end: Vec<usize> = (0..batch.num_columns()).filter(|column| *column != 1).collect();
            texts(&batch.project(&without_end).unwrap(), &mut rows);
        }
    }
    rows
}

/// The rows of a batch query; `bids` has `t`, its event time in microseconds.
fn batch_rows(sql: &str) -> BTreeSet<Vec<String>> {
    let context = SessionContext::new();
    let tables = Arc::new(MemorySchemaProvider::new());
    for (schema, events) in schemas().iter().zip(STREAMS.iter()) {
        let table = MemTable::try_new(schema.arrow().clone(), vec![vec![events.clone()]]).unwrap();
        tables.register_table(schema.stream.parts().1.to_owned(), Arc::new(table)).unwrap();
    }
    context.catalog("datafusion").unwrap().register_schema("nexmark", tables).unwrap();
    let sql = format!("WITH bids AS (SELECT CAST(ts AS BIGINT) AS t, * FROM nexmark.bids), {sql}");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let batches = runtime.block_on(async { context.sql(&sql).await.unwrap().collect().await.unwrap() });
    let mut rows = BTreeSet::new();
    batches.iter().for_each(|batch| texts(batch, &mut rows));
    rows
}

fn texts(batch: &RecordBatch, into: &mut BTreeSet<Vec<String>>) {
    let start = cast(batch.column(0), &DataType::Int64).unwrap();
    let columns: Vec<_> = std::iter::once(&start).chain(&batch.columns()[1..]).collect();
    for row in 0..batch.num_rows() {
        let texts = columns.iter().map(|column| array_value_to_string(column, row).unwrap()).collect();
        assert!(into.insert(texts), "a row came twice");
    }
}

fn check(sql: &str, truth: &str) {
    let (ours, truth) = (metric_rows(sql), batch_rows(truth));
    assert!(truth.len() > 5, "{} rows are too few to tell", truth.len());
    let (missing, surplus) = (truth.difference(&ours).count(), ours.difference(&truth).count());
    assert_eq!((missing, surplus), (0, 0), "of {} rows: missing, surplus", truth.len());
}

#[test]
fn q5_hot_items_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q5.sql"),
        "w AS (SELECT t - t % 2000000 - back.value * 2000000 AS s, auction, count(*) AS n
            FROM bids CROSS JOIN (SELECT value FROM generate_series(0, 4)) AS back GROUP BY 1, 2),
         r AS (SELECT *, row_number() OVER (PARTITION BY s ORDER BY n DESC, auction) AS place FROM w)
         SELECT s, auction, n FROM r WHERE place = 1",
    );
}

#[test]
fn q7_highest_bids_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q7.sql"),
        "r AS (SELECT t - t % 10000000 AS s, auction, bidder, price, row_number()
            OVER (PARTITION BY t - t % 10000000 ORDER BY price DESC, auction, bidder) AS place FROM bids)
         SELECT s, auction, bidder, price FROM r WHERE place = 1",
    );
}

#[test]
#[ignore = "metrics have no session windows yet"]
fn q11_user_sessions_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q11.sql"),
        "l AS (SELECT bidder, t, CASE WHEN t - lag(t) OVER (PARTITION BY bidder ORDER BY t) <= 10000000 THEN 0 ELSE 1 END
            AS first FROM bids),
         n AS (SELECT bidder, t, sum(first) OVER (PARTITION BY bidder ORDER BY t
            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS session FROM l)
         SELECT min(t) AS s, bidder, count(*) FROM n GROUP BY bidder, session",
    );
}

#[test]
fn q12_bids_a_window_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q12.sql"),
        "n AS (SELECT 1) SELECT t - t % 10000000 AS s, bidder, count(*) FROM bids GROUP BY 1, 2",
    );
}

#[test]
fn events_come_in_the_proportions_of_the_standard() {
    let counts: Vec<usize> = STREAMS.iter().map(RecordBatch::num_rows).collect();
    assert_eq!(counts, [EVENTS / 50, EVENTS / 50 * 3, EVENTS / 50 * 46]);
    assert_eq!(ndjson(BASE_TIME, 1_000), ndjson(BASE_TIME, 1_000));
}
