//! What holds for any text of a stranger: a target of `fuzz/`, run for a while by the test below.

use crate::plan::Planner;
use crate::query::Question;
use engine::event::StreamName;
use streams::schema::built_in;

/// The SQL of a metric, and of a question asked once.
pub fn sql(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let source = |name: &StreamName| {
        built_in().iter().find(|schema| schema.stream == *name).map(|schema| schema.arrow().clone())
    };
    let planner = Planner::default();
    match futures::executor::block_on(planner.program(text, source)) {
        Ok(program) => {
            let output = program.output();
            assert_eq!(
                (output.field(0).name().as_str(), output.field(1).name().as_str()),
                ("window_start", "window_end")
            );
            let again = futures::executor::block_on(planner.program(text, source)).unwrap();
            assert!(std::sync::Arc::ptr_eq(&program, &again), "planned once");
        }
        Err(error) => {
            let shown = error.to_string();
            assert!(!shown.is_empty() && shown.len() < 4096 + 2 * text.len(), "{} bytes of error", shown.len());
        }
    }
    if let Ok(question) = Question::parse(text) {
        _ = question.tables();
        _ = question.is_repeatable();
    }
}

/// Texts to begin with.
pub fn texts() -> Vec<Vec<u8>> {
    [
        "SELECT symbol, count(*) AS n, sum(price * qty) / sum(qty) AS vwap FROM market.trades \
         GROUP BY tumble(ts, INTERVAL '1 minute'), symbol HAVING count(*) > 1 ORDER BY n DESC LIMIT 3",
        "SELECT side, avg(price) FILTER (WHERE qty > 1) AS a, first_value(price ORDER BY ts) AS o FROM market.trades \
         WHERE symbol LIKE 'B%' GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), side",
        "SELECT count(DISTINCT symbol) AS n, approx_percentile_cont(price, 0.5) AS m FROM market.trades \
         GROUP BY session(ts, INTERVAL '30 seconds')",
        "SELECT a.symbol, count(*) AS n FROM market.trades a JOIN market.quotes b ON a.symbol = b.symbol AND \
         ABS(a.ts - b.ts) <= INTERVAL '5 seconds' GROUP BY tumble(a.ts, INTERVAL '1 minute'), a.symbol",
        "SELECT CASE WHEN price > 1e3 THEN 'x' ELSE NULL END AS c, max(CAST(qty AS INT)) AS q FROM market.trades \
         GROUP BY cumulate(ts, INTERVAL '1 minute', INTERVAL '1 hour'), c",
        "WITH t AS (SELECT * FROM market.trades) SELECT lag(price) OVER (PARTITION BY symbol ORDER BY ts ROWS BETWEEN \
         3 PRECEDING AND CURRENT ROW) FROM t UNION ALL SELECT 1; -- the end",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// What means something in a text.
pub const WORDS: &[&str] = &[
    " AND ",
    " OR ",
    " NOT ",
    "(",
    ")",
    ",",
    "'",
    "\"",
    "--",
    "/*",
    "*",
    "-",
    "NULL",
    " INTERVAL '0 seconds'",
    " INTERVAL '-1 day'",
    " INTERVAL '1 month'",
    "9223372036854775807",
    "1e400",
    "0",
    " OVER ()",
    " DISTINCT ",
    "::text",
    "ts",
    "window_start",
    "market.trades",
    "metrics.m",
    "count(*)",
    "sum(",
    " JOIN ",
    " GROUP BY ",
    " LIMIT 0",
    "$1",
    "\u{0}",
    "date_trunc('second', ts)",
    " BETWEEN 1 AND 2",
    " IN (1, 2)",
    "ARRAY[1]",
    "(SELECT 1)",
    " COLLATE ",
    "TABLESAMPLE",
    "é",
];

#[cfg(test)]
mod tests;
