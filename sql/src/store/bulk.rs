//! Many rows in one statement: the price of a statement is paid once for hundreds of rows.

use sqlx::QueryBuilder;
use sqlx::query_builder::Separated;
use sqlx::sqlite::{Sqlite, SqliteConnection};
use std::collections::HashSet;
use std::hash::Hash;

/// Rows in one statement. At 13 columns, the most any table here has, 256 rows are 3,328 parameters of the 32,766 that
/// SQLite takes (PostgreSQL: 65,535); up to 4,000 rows measured alike.
const ROWS: usize = 256;

/// Runs `INSERT …` (`head`) `VALUES (…), (…)` `ON CONFLICT …` (`tail`) over `rows`, `bind` giving the values of one:
/// how many rows it wrote.
///
/// Rows with an equal `key` go into separate statements and so take effect in order: PostgreSQL refuses to touch a row
/// twice in one.
pub(super) async fn insert<'a, R, K: Eq + Hash>(
    connection: &mut SqliteConnection,
    [head, tail]: [&'static str; 2],
    rows: &'a [R],
    key: impl Fn(&'a R) -> K,
    bind: impl Fn(Separated<'_, Sqlite, &'static str>, &R),
) -> Result<u64, sqlx::Error> {
    let mut written = 0;
    let mut rest = rows;
    while !rest.is_empty() {
        let fit = distinct(rest, &key);
        let (chunk, later) = rest.split_at(fit);
        let mut sql = QueryBuilder::new(head);
        sql.push_values(chunk, &bind).push(tail);
        // Full chunks share one statement that stays prepared; the odd last one would only push others out.
        written += sql.build().persistent(fit == ROWS).execute(&mut *connection).await?.rows_affected();
        rest = later;
    }
    Ok(written)
}

/// How many rows from the first on, [`ROWS`] at most, have different keys.
fn distinct<'a, R, K: Eq + Hash>(rows: &'a [R], key: impl Fn(&'a R) -> K) -> usize {
    let mut seen = HashSet::with_capacity(rows.len().min(ROWS));
    rows.iter().take(ROWS).take_while(|row| seen.insert(key(row))).count()
}
