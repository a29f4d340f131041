//! Many rows in one statement: the price of a statement is paid once for hundreds of rows.

use super::db::{Arg, Builder, Column, Dialect, Tx, execute_columns};
use std::collections::HashSet;
use std::fmt::Write;
use std::hash::Hash;

/// Rows in one statement of SQLite. At 13 columns, the most any table here has, 256 rows are 3,328 parameters of the
/// 32,766 that SQLite takes; up to 4,000 rows measured alike.
const ROWS_SQLITE: usize = 256;
/// Rows in one statement of PostgreSQL, which takes a column as one array: enough for the round trip to vanish, few
/// enough for the arrays to stay within some megabytes.
const ROWS_POSTGRES: usize = 8_192;

/// The values of one row, in the order of the columns.
#[derive(Default)]
pub(super) struct Values<'q>(Vec<Arg<'q>>);

impl<'q> Values<'q> {
    pub(super) fn push_bind(&mut self, value: impl Into<Arg<'q>>) {
        self.0.push(value.into());
    }
}

/// Runs `INSERT INTO … (…)` (`head`), the rows, `ON CONFLICT …` (`tail`), `bind` giving the values of one row: how many
/// rows it wrote.
///
/// Rows with an equal `key` go into separate statements and so take effect in order: PostgreSQL refuses to touch a row
/// twice in one.
pub(super) async fn insert<'a, R, K: Eq + Hash>(
    tx: &mut Tx,
    [head, tail]: [&str; 2],
    rows: &'a [R],
    key: impl Fn(&'a R) -> K,
    bind: impl Fn(&mut Values<'a>, &'a R),
) -> Result<u64, sqlx::Error> {
    let most = match tx.dialect() {
        Dialect::Sqlite => ROWS_SQLITE,
        Dialect::Postgres => ROWS_POSTGRES,
    };
    let mut written = 0;
    let mut rest = rows;
    while !rest.is_empty() {
        let fit = distinct(rest, most, &key);
        let (chunk, later) = rest.split_at(fit);
        let values = chunk.iter().map(|row| {
            let mut values = Values::default();
            bind(&mut values, row);
            values.0
        });
        written += match tx {
            // Full chunks share one statement that stays prepared; the odd last one would only push others out.
            Tx::Sqlite(_) => as_values(head, tail, values).build().persistent(fit == most).execute(&mut *tx).await?,
            Tx::Postgres(tx) => {
                let columns = as_columns(values, fit);
                execute_columns(tx, unnest(head, tail, &columns), columns).await?
            }
        };
        rest = later;
    }
    Ok(written)
}

/// `head VALUES ($1, …), (…) tail`.
fn as_values<'q>(head: &str, tail: &str, rows: impl Iterator<Item = Vec<Arg<'q>>>) -> Builder<'q> {
    let mut sql = Builder::new(head);
    for (n, row) in rows.enumerate() {
        sql.push(if n == 0 { "VALUES (" } else { ", (" });
        for (n, value) in row.into_iter().enumerate() {
            if n > 0 {
                sql.push(", ");
            }
            sql.push_bind(value);
        }
        sql.push(")");
    }
    sql.push(tail);
    sql
}

fn as_columns<'q>(rows: impl Iterator<Item = Vec<Arg<'q>>>, count: usize) -> Vec<Column<'q>> {
    let mut columns: Vec<Column<'q>> = Vec::new();
    for row in rows {
        if columns.is_empty() {
            columns = row.iter().map(|value| Column::of(value, count)).collect();
        }
        row.into_iter().zip(&mut columns).for_each(|(value, column)| column.push(value));
    }
    columns
}

/// `head SELECT c1, … FROM UNNEST($1::text[], …) AS given (c1, …) tail`: the text is the same for any number of rows, so
/// that it is planned once a connection.
fn unnest(head: &str, tail: &str, columns: &[Column<'_>]) -> String {
    let (mut chosen, mut arrays, mut names) = (String::new(), String::new(), String::new());
    for (n, column) in columns.iter().enumerate() {
        let (array, cast) = column.types();
        let comma = if n == 0 { "" } else { ", " };
        let n = n + 1;
        // writing to a string cannot fail
        _ = write!(chosen, "{comma}c{n}{cast}");
        _ = write!(arrays, "{comma}${n}::{array}");
        _ = write!(names, "{comma}c{n}");
    }
    format!("{head}SELECT {chosen} FROM UNNEST({arrays}) AS given ({names}){tail}")
}

/// How many rows from the first on, `most` at most, have different keys.
fn distinct<'a, R, K: Eq + Hash>(rows: &'a [R], most: usize, key: impl Fn(&'a R) -> K) -> usize {
    let mut seen = HashSet::with_capacity(rows.len().min(most));
    rows.iter().take(most).take_while(|row| seen.insert(key(row))).count()
}
