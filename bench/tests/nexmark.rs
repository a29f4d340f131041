//! Nexmark queries as metrics give the rows of one batch query over all events.

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use bench::nexmark::{ndjson, schemas};
use datafusion::catalog::{MemTable, MemorySchemaProvider, SchemaProvider};
use datafusion::prelude::SessionContext;
use engine::event::{ItemName, Micros, Span, StreamName};
use engine::metric::Timing;
use engine::program::Program;
use engine::workspace::{Outputs, Workspace};
use sql::plan::{Planner, Source};
use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};
use streams::decode::{Bounds, Format, TsUnit, decode};

const EVENTS: usize = 1_000_000;
const BASE_TIME: u64 = 1_767_623_400_000;

/// Into so many batches each stream is cut, a second of event time each; they come in turn.
const BATCHES: usize = 100;

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

/// Bounds, keys and values of every final row of a query's last metric, as text.
fn metric_rows(query: &str) -> BTreeSet<String> {
    let mut workspace = Workspace::default();
    let planner = Planner::default();
    let timing = Timing { max_delay: Span::seconds(5), allowed_lateness: Span::ZERO };
    let mut planned: Vec<(ItemName, Arc<Program>)> = Vec::new();
    let texts: Vec<&str> = query.split(';').collect();
    let names = ["winning_bids", "query"].map(|name| name.parse::<ItemName>().unwrap());
    for (text, name) in texts.iter().zip(&names[names.len() - texts.len()..]) {
        let source = |stream: &StreamName| match stream.metric() {
            Some(metric) => planned.iter().find(|(name, _)| *name == metric).map(|(_, p)| Source::Metric(p.clone())),
            None => schemas().iter().find(|s| s.stream == *stream).map(|s| Source::Stream(s.arrow().clone())),
        };
        let program = futures::executor::block_on(planner.program(text, source));
        let program = program.unwrap_or_else(|error| panic!("{text}: {error}"));
        workspace.define(name.clone(), 1, program.clone(), timing).unwrap();
        planned.push((name.clone(), program));
    }
    let mut rows = BTreeSet::new();
    let mut take = |outputs: Outputs| {
        assert!(outputs.failures.is_empty() && outputs.late.is_empty(), "{:?}", outputs.failures);
        for part in outputs.rows.into_iter().filter(|part| part.metric == names[1]) {
            texts_of(&part.rows.batch, &mut rows);
        }
    };
    for number in 0..BATCHES {
        for (schema, events) in schemas().iter().zip(STREAMS.iter()) {
            let size = events.num_rows() / BATCHES;
            take(workspace.step(&schema.stream, &events.slice(number * size, size)));
        }
    }
    for schema in schemas() {
        take(workspace.idle(&schema.stream, Micros(i64::MAX / 2)));
    }
    rows
}

/// The rows of a batch query over `persons`, `auctions` and `bids`, which have `t`, their event time in microseconds.
fn batch_rows(sql: &str) -> BTreeSet<String> {
    let context = SessionContext::new();
    let tables = Arc::new(MemorySchemaProvider::new());
    for (schema, events) in schemas().iter().zip(STREAMS.iter()) {
        let table = MemTable::try_new(schema.arrow().clone(), vec![vec![events.clone()]]).unwrap();
        tables.register_table(schema.stream.parts().1.to_owned(), Arc::new(table)).unwrap();
    }
    context.catalog("datafusion").unwrap().register_schema("nexmark", tables).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let batches = runtime.block_on(async {
        for table in ["persons", "auctions", "bids"] {
            let view = format!("CREATE VIEW {table} AS SELECT CAST(ts AS BIGINT) AS t, * FROM nexmark.{table}");
            context.sql(&view).await.unwrap().collect().await.unwrap();
        }
        context.sql(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}")).collect().await.unwrap()
    });
    let mut rows = BTreeSet::new();
    batches.iter().for_each(|batch| texts_of(batch, &mut rows));
    rows
}

fn texts_of(batch: &RecordBatch, into: &mut BTreeSet<String>) {
    let bounds = [0, 1].map(|at| cast(batch.column(at), &DataType::Int64).unwrap());
    let options = FormatOptions::default();
    let columns = bounds.iter().chain(&batch.columns()[2..]);
    let columns: Vec<_> = columns.map(|column| ArrayFormatter::try_new(column, &options).unwrap()).collect();
    for row in 0..batch.num_rows() {
        let texts: Vec<String> = columns.iter().map(|column| column.value(row).to_string()).collect();
        assert!(into.insert(texts.join("|")), "a row came twice");
    }
}

fn check(sql: &str, truth: &str) {
    let (ours, truth) = (metric_rows(sql), batch_rows(truth));
    assert!(truth.len() > 5, "{} rows are too few to tell", truth.len());
    let (missing, surplus) = (truth.difference(&ours).count(), ours.difference(&truth).count());
    assert_eq!((missing, surplus), (0, 0), "of {} rows: missing, surplus", truth.len());
}

#[test]
fn q0_bids_pass_through() {
    check(
        include_str!("../nexmark/q0.sql"),
        "SELECT t - t % 1000000 AS s, t - t % 1000000 + 1000000 AS e, auction, bidder, price, ts, count(*) FROM bids
         GROUP BY t, auction, bidder, price, ts",
    );
}

#[test]
fn q1_prices_are_converted() {
    check(
        include_str!("../nexmark/q1.sql"),
        "SELECT t - t % 1000000 AS s, t - t % 1000000 + 1000000 AS e, auction, bidder, 0.908 * price, ts, count(*)
         FROM bids GROUP BY t, auction, bidder, price, ts",
    );
}

#[test]
fn q2_bids_on_some_auctions_are_selected() {
    check(
        include_str!("../nexmark/q2.sql"),
        "SELECT t - t % 1000000 AS s, t - t % 1000000 + 1000000 AS e, auction, price, count(*) FROM bids
         WHERE auction % 123 = 0 GROUP BY 1, 2, 3, 4",
    );
}

#[test]
fn q3_local_sellers_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q3.sql"),
        "SELECT a.t - a.t % 10000000 AS s, a.t - a.t % 10000000 + 10000000 AS e, p.name, p.city, p.state, a.auction, count(*)
         FROM auctions a JOIN persons p ON a.seller = p.person
         WHERE a.category = 10 AND p.state IN ('or', 'id', 'ca') GROUP BY 1, 2, 3, 4, 5, 6",
    );
}

#[test]
fn q4_average_prices_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q4.sql"),
        "WITH w AS (SELECT a.t - a.t % 60000000 AS s, a.auction, a.category, max(b.price) AS price
            FROM auctions a JOIN bids b ON a.auction = b.auction AND b.ts BETWEEN a.ts AND a.expires GROUP BY 1, 2, 3)
         SELECT s, s + 60000000 AS e, category, avg(price) FROM w GROUP BY s, category",
    );
}

#[test]
fn q5_hot_items_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q5.sql"),
        "WITH w AS (SELECT t - t % 2000000 - back.value * 2000000 AS s, auction, count(*) AS n
            FROM bids CROSS JOIN (SELECT value FROM generate_series(0, 4)) AS back GROUP BY 1, 2),
         r AS (SELECT *, row_number() OVER (PARTITION BY s ORDER BY n DESC, auction) AS place FROM w)
         SELECT s, s + 10000000 AS e, auction, n FROM r WHERE place = 1",
    );
}

#[test]
fn q7_highest_bids_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q7.sql"),
        "WITH r AS (SELECT t - t % 10000000 AS s, auction, bidder, price, row_number()
            OVER (PARTITION BY t - t % 10000000 ORDER BY price DESC, auction, bidder) AS place FROM bids)
         SELECT s, s + 10000000 AS e, auction, bidder, price FROM r WHERE place = 1",
    );
}

#[test]
fn q8_new_users_with_auctions_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q8.sql"),
        "SELECT p.t - p.t % 10000000 AS s, p.t - p.t % 10000000 + 10000000 AS e, p.person, p.name, count(*)
         FROM persons p JOIN auctions a ON p.person = a.seller AND p.t - p.t % 10000000 = a.t - a.t % 10000000
         GROUP BY 1, 2, 3, 4",
    );
}

#[test]
fn q11_user_sessions_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q11.sql"),
        "WITH l AS (SELECT bidder, t, CASE WHEN t - lag(t) OVER (PARTITION BY bidder ORDER BY t) <= 10000000 THEN 0 ELSE 1 END
            AS first FROM bids),
         n AS (SELECT bidder, t, sum(first) OVER (PARTITION BY bidder ORDER BY t
            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS session FROM l)
         SELECT min(t) AS s, max(t) + 10000000 AS e, bidder, count(*) FROM n GROUP BY bidder, session",
    );
}

#[test]
fn q12_bids_a_window_are_those_of_a_batch_query() {
    check(
        include_str!("../nexmark/q12.sql"),
        "SELECT t - t % 10000000 AS s, t - t % 10000000 + 10000000 AS e, bidder, count(*) FROM bids
         GROUP BY 1, 2, 3",
    );
}

#[test]
fn events_come_in_the_proportions_of_the_standard() {
    let counts: Vec<usize> = STREAMS.iter().map(RecordBatch::num_rows).collect();
    assert_eq!(counts, [EVENTS / 50, EVENTS / 50 * 3, EVENTS / 50 * 46]);
    assert_eq!(ndjson(BASE_TIME, 1_000), ndjson(BASE_TIME, 1_000));
}
