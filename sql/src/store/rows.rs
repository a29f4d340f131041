//! Final rows of metrics: read in pages, pruned by age. They are written by [`Store::commit`].

use super::db::{Builder, Dialect, FromRow, Row, Tx, query};
use super::page;
use super::record::Columns;
use super::{Step, Store, StoreError, bulk, failed};
use engine::event::{ItemName, Micros, WorkspaceId};
use serde::{Deserialize, Serialize};

/// A metric's row for one window and key, after the window was closed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinalRow {
    pub metric: ItemName,
    pub window_start: Micros,
    pub window_end: Micros,
    /// Key columns as canonical JSON object text: equal keys are equal texts. `{}` for a metric without keys.
    pub key: String,
    /// 0, and one more with each correction by late events.
    pub revision: i64,
    /// Value columns as JSON object text; [`WITHDRAWN`] for a row that a correction took back.
    pub row: String,
}

/// Stands for the values of a row that late events took back, such as that of a session they joined to another one.
/// It is kept, so that a replay does not bring the row again, and never read.
pub const WITHDRAWN: &str = "null";

/// Which final rows to read.
#[derive(Clone, Debug, Default)]
pub struct RowQuery {
    /// Windows that start then or later.
    pub from: Option<Micros>,
    /// Windows that start earlier than this.
    pub to: Option<Micros>,
    /// Rows in a page, at least 1.
    pub limit: usize,
    /// The cursor that came with the page before.
    pub after: Option<String>,
    /// Key columns and the value each must have, as text: `AAPL`, `7`, `true`; `None` is NULL, which a column that a row
    /// does not have is too.
    pub keys: Vec<(String, Option<String>)>,
}

/// Where a row stands among the rows of its metric: pages are in this order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// Window start, or with a step the hour or day it is in.
    start: Micros,
    /// Window end; the same for all with a step.
    end: Micros,
    key: String,
}

impl Place {
    /// The place of `row` among all rows, or among those of each hour or day.
    pub fn of(row: &FinalRow, step: Option<Step>) -> Place {
        let (start, end) = match step {
            None => (row.window_start, row.window_end),
            Some(step) => (step.bucket(row.window_start), Micros::MIN),
        };
        Place { start, end, key: row.key.clone() }
    }

    /// Window start, or the hour or day it is in.
    pub fn start(&self) -> Micros {
        self.start
    }
}

impl RowQuery {
    /// Where the page before ended, in the order of [`Store::rows`], or with a step of [`Store::samples`].
    /// [`StoreError::Cursor`] for an `after` that no page gave.
    pub fn position(&self, step: Option<Step>) -> Result<Option<Place>, StoreError> {
        let after = self.after.as_deref();
        Ok(match step {
            None => page::position::<Position>(after)?.map(|(start, end, key)| Place {
                start: Micros(start),
                end: Micros(end),
                key,
            }),
            Some(_) => page::position::<(i64, String)>(after)?.map(|(bucket, key)| Place {
                start: Micros(bucket),
                end: Micros::MIN,
                key,
            }),
        })
    }
}

/// The first `limit` of rows in the order of [`Store::rows`], and the cursor of the next page where there are more.
pub fn cut_rows(rows: Vec<FinalRow>, limit: usize) -> (Vec<FinalRow>, Option<String>) {
    page::cut(rows, limit, |row| (row.window_start.0, row.window_end.0, row.key.clone()))
}

/// Where a page of rows ended: window start, window end, key.
type Position = (i64, i64, String);

impl FromRow for FinalRow {
    fn from_row(row: &Row) -> Result<FinalRow, sqlx::Error> {
        Ok(FinalRow {
            metric: row.name("metric")?,
            window_start: row.time("window_start")?,
            window_end: row.time("window_end")?,
            key: row.try_get("key_json")?,
            revision: row.try_get("revision")?,
            row: row.try_get("row_json")?,
        })
    }
}

impl Store {
    /// A page of a metric's final rows by window start, window end and key, and the cursor of the next page if there
    /// is one. [`StoreError::Cursor`] for an `after` that no page gave.
    pub async fn rows(
        &self,
        workspace: &WorkspaceId,
        metric: &ItemName,
        wanted: &RowQuery,
    ) -> Result<(Vec<FinalRow>, Option<String>), StoreError> {
        // Below every row that starts at `from`: no window ends that early and no key is empty.
        let start: Position = (wanted.from.unwrap_or(Micros::MIN).0, i64::MIN, String::new());
        let (window_start, window_end, key) = match page::position::<Position>(wanted.after.as_deref())? {
            Some(after) => start.max(after),
            None => start,
        };
        let mut sql = Builder::new("SELECT * FROM final_rows WHERE row_json <> 'null' AND workspace = ");
        sql.push_bind(workspace.as_str()).push(" AND metric = ").push_bind(metric.as_str());
        // what TimescaleDB chooses chunks by
        sql.push(" AND window_start >= ").push_bind(Micros(window_start));
        sql.push(" AND (window_start, window_end, key_json) > (").push_bind(Micros(window_start));
        sql.push(", ").push_bind(Micros(window_end)).push(", ").push_bind(key).push(")");
        if let Some(to) = wanted.to {
            sql.push(" AND window_start < ").push_bind(to);
        }
        for (column, value) in &wanted.keys {
            push_key_equals(&mut sql, self.db.dialect(), column, value.as_deref());
        }
        sql.push(" ORDER BY window_start, window_end, key_json LIMIT ").push_bind(page::rows_to_read(wanted.limit));
        let rows: Vec<FinalRow> =
            sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("read final rows"))?;
        Ok(cut_rows(rows, wanted.limit))
    }

    /// When the newest of a metric's final rows starts.
    pub async fn newest_row(&self, workspace: &WorkspaceId, metric: &ItemName) -> Result<Option<Micros>, StoreError> {
        async {
            let newest = query(
                "SELECT window_start FROM final_rows WHERE row_json <> 'null' AND workspace = $1 AND metric = $2 \
                 ORDER BY window_start DESC LIMIT 1",
            )
            .bind(workspace.as_str())
            .bind(metric.as_str())
            .fetch_optional(self.read(workspace))
            .await?;
            newest.map(|row| row.time("window_start")).transpose()
        }
        .await
        .map_err(failed("find the newest final row"))
    }

    /// Deletes a metric's rows whose windows ended at `before` or earlier: how many. With [`Micros::MAX`], all.
    pub async fn prune_rows(
        &self,
        workspace: &WorkspaceId,
        metric: &ItemName,
        before: Micros,
    ) -> Result<u64, StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            // The start adds nothing to the condition; it is what the primary key can seek.
            const PRUNED: &str =
                "FROM final_rows WHERE workspace = $1 AND metric = $2 AND window_start <= $3 AND window_end <= $3";
            if self.rollups {
                query(format!("SELECT forget_samples($1, $2, $3) WHERE EXISTS (SELECT {PRUNED})"))
                    .bind(workspace.as_str())
                    .bind(metric.as_str())
                    .bind(before)
                    .execute(&mut tx)
                    .await?;
            }
            let pruned = query(format!("DELETE {PRUNED}"))
                .bind(workspace.as_str())
                .bind(metric.as_str())
                .bind(before)
                .execute(&mut tx)
                .await?;
            tx.commit().await?;
            Ok(pruned)
        }
        .await
        .map_err(failed("prune final rows"))
    }
}

/// ` AND` the key column's value is `value` as text, or NULL.
pub(super) fn push_key_equals<'q>(sql: &mut Builder<'q>, dialect: Dialect, column: &'q str, value: Option<&'q str>) {
    let Some(value) = value else { return push_key_is_null(sql, dialect, column) };
    match dialect {
        // `->>` gives a string without its quotes and a number as a number, which equals no text; `->` gives any value
        // as JSON text, which is right for numbers and truth values.
        Dialect::Sqlite => {
            if column.contains(['"', '\\']) {
                // a JSON path cannot name such a column, and a malformed path would be an error
                sql.push(" AND 0 = 1");
                return;
            }
            let path = format!("$.\"{column}\"");
            // NULL is `null` as JSON text, and no value of a key
            sql.push(" AND key_json ->> ").push_bind(path.clone()).push(" IS NOT NULL");
            sql.push(" AND (key_json ->> ").push_bind(path.clone()).push(" = ").push_bind(value);
            sql.push(" OR key_json -> ").push_bind(path).push(" = ").push_bind(value).push(")");
        }
        // `->>` gives every value as text. A key with \u0000 in it is text that PostgreSQL cannot make.
        Dialect::Postgres => {
            sql.push(" AND CASE WHEN strpos(key_json, '\\u0000') = 0 THEN key_json::json ->> ").push_bind(column);
            sql.push(" = ").push_bind(value).push(" ELSE FALSE END");
        }
    }
}

/// ` AND` the key column's value is NULL.
fn push_key_is_null<'q>(sql: &mut Builder<'q>, dialect: Dialect, column: &'q str) {
    match dialect {
        Dialect::Sqlite => {
            if column.contains(['"', '\\']) {
                sql.push(" AND 0 = 1");
                return;
            }
            sql.push(" AND key_json ->> ").push_bind(format!("$.\"{column}\"")).push(" IS NULL");
        }
        Dialect::Postgres => {
            sql.push(" AND CASE WHEN strpos(key_json, '\\u0000') = 0 THEN key_json::json ->> ").push_bind(column);
            sql.push(" IS NULL ELSE FALSE END");
        }
    }
}

/// A final row and the workspace it belongs to.
type Placed<'a> = (&'a WorkspaceId, &'a FinalRow);

/// The primary key.
fn identity<'a>((workspace, row): &Placed<'a>) -> (&'a WorkspaceId, &'a ItemName, Micros, Micros, &'a str) {
    (workspace, &row.metric, row.window_start, row.window_end, &row.key)
}

const INSERT: &str =
    "INSERT INTO final_rows (workspace, metric, window_start, window_end, key_json, revision, row_json) ";
const KEEP_GREATER: &str = " ON CONFLICT (workspace, metric, window_start, window_end, key_json) DO UPDATE \
                            SET revision = excluded.revision, row_json = excluded.row_json \
                            WHERE excluded.revision > final_rows.revision";

/// From so many new rows on the savepoint costs less than it spares.
const AS_NEW_FROM: usize = 256;

/// Writes rows of any workspaces; one that is there already, as is likely of those that `repeat`, changes only to a
/// greater revision.
pub(super) async fn write(tx: &mut Tx, mut rows: Vec<Placed<'_>>, repeat: bool) -> Result<(), sqlx::Error> {
    // In the order of the primary key each page of the table is touched once.
    rows.sort_by_key(identity);
    let (new, rest): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(_, row)| row.revision == 0 && !repeat);
    if new.len() < AS_NEW_FROM || !write_as_new(tx, &new).await? {
        insert(tx, KEEP_GREATER, &new).await?;
    }
    insert(tx, KEEP_GREATER, &rest).await
}

/// Writes rows that are likely not there, unless one is; PostgreSQL takes nearly twice as long for those of which it is told
/// what to do if they are. `false`: nothing was written.
async fn write_as_new(tx: &mut Tx, rows: &[Placed<'_>]) -> Result<bool, sqlx::Error> {
    if tx.dialect() == Dialect::Sqlite {
        return Ok(false); // costs it nothing
    }
    query("SAVEPOINT as_new").execute(&mut *tx).await?;
    let end = match insert(tx, "", rows).await {
        Ok(()) => "RELEASE SAVEPOINT as_new",
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => "ROLLBACK TO SAVEPOINT as_new",
        Err(error) => return Err(error),
    };
    query(end).execute(&mut *tx).await?;
    Ok(end.starts_with("RELEASE"))
}

async fn insert<'a>(tx: &mut Tx, tail: &str, rows: &'a [Placed<'a>]) -> Result<(), sqlx::Error> {
    let written = bulk::insert(tx, [INSERT, tail], rows, identity, |values, (workspace, row)| {
        values.push_bind(workspace.as_str());
        values.push_bind(row.metric.as_str());
        values.push_bind(row.window_start);
        values.push_bind(row.window_end);
        values.push_bind(row.key.as_str());
        values.push_bind(row.revision);
        values.push_bind(row.row.as_str());
    });
    written.await.map(|_| ())
}

#[cfg(test)]
pub(super) mod testing {
    use super::super::testing::name;
    use super::*;

    /// The row of `symbol` in the window of 10 that starts at `start`; it tells its revision.
    pub fn row(metric: &str, start: i64, symbol: &str, revision: i64) -> FinalRow {
        FinalRow {
            metric: name(metric),
            window_start: Micros(start),
            window_end: Micros(start + 10),
            key: serde_json::json!({ "symbol": symbol }).to_string(),
            revision,
            row: format!(r#"{{"of_revision":{revision}}}"#),
        }
    }

    impl RowQuery {
        pub fn first(limit: usize) -> RowQuery {
            RowQuery { limit, ..RowQuery::default() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Commit;
    use super::super::checkpoints::testing::commit;
    use super::super::db::Scope;
    use super::super::testing::*;
    use super::testing::row;
    use super::*;

    /// A store with these rows of the metric `vwap` in the workspace `acme`.
    async fn store_with(rows: Vec<FinalRow>) -> (Store, WorkspaceId, tempfile::TempDir) {
        let (store, dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.commit(&[Commit { rows, ..commit(&acme, 1) }]).await.unwrap();
        (store, acme, dir)
    }

    #[tokio::test]
    async fn paging_brings_every_row_once_in_order_also_where_windows_tie() {
        let mut rows = Vec::new();
        for start in [-20, -10, 0, 10] {
            rows.extend(["A", "B", "C", "Ä", "x\"y"].map(|symbol| row("vwap", start, symbol, 0)));
            rows.push(FinalRow { window_end: Micros(start + 15), ..row("vwap", start, "A", 0) });
        }
        let (store, acme, _dir) = store_with(rows.iter().rev().cloned().collect()).await;
        rows.sort_by_key(|r| (r.window_start, r.window_end, r.key.clone()));

        for limit in [0, 1, 3, rows.len() - 1, rows.len(), 100] {
            let mut wanted = RowQuery::first(limit);
            let mut read = Vec::new();
            loop {
                let (page, next) = store.rows(&acme, &name("vwap"), &wanted).await.unwrap();
                assert!(!page.is_empty() && page.len() <= limit.max(1));
                read.extend(page);
                match next {
                    Some(next) => wanted.after = Some(next),
                    None => break,
                }
            }
            assert_eq!(read, rows, "pages of {limit}");
        }
    }

    #[tokio::test]
    async fn of_many_rows_those_that_are_there_are_kept_or_corrected_and_the_others_added() {
        let symbols = |revision: i64, from: usize, to: usize| -> Vec<FinalRow> {
            (from..to).map(|at| row("vwap", 0, &format!("S{at:04}"), revision)).collect()
        };
        let (store, acme, _dir) = store_with(symbols(0, 0, AS_NEW_FROM)).await;
        // of the same commit as the new ones: some that were stored, some corrected, one of them new at once
        let again = AS_NEW_FROM / 2..2 * AS_NEW_FROM;
        let corrected = [symbols(2, 0, 3), symbols(1, 2 * AS_NEW_FROM - 1, 2 * AS_NEW_FROM)].concat();
        let rows = [symbols(0, again.start, again.end), corrected].concat();
        for repeats in [false, true] {
            store.commit(&[Commit { rows: rows.clone(), repeats, ..commit(&acme, 2) }]).await.unwrap();
        }
        let (read, _) = store.rows(&acme, &name("vwap"), &RowQuery::first(10_000)).await.unwrap();
        let expected = [symbols(2, 0, 3), symbols(0, 3, again.end - 1), symbols(1, again.end - 1, again.end)].concat();
        assert_eq!(read, expected);
    }

    #[tokio::test]
    async fn the_newest_row_is_the_last_that_was_not_withdrawn() {
        let withdrawn = FinalRow { row: WITHDRAWN.into(), ..row("vwap", 30, "A", 1) };
        let rows = vec![row("vwap", 10, "A", 0), row("vwap", 20, "B", 0), withdrawn, row("other", 40, "A", 0)];
        let (store, acme, _dir) = store_with(rows).await;
        assert_eq!(store.newest_row(&acme, &name("vwap")).await.unwrap(), Some(Micros(20)));
        assert_eq!(store.newest_row(&acme, &name("none")).await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_range_is_half_open_on_the_start_of_the_window() {
        let (store, acme, _dir) = store_with([0, 10, 20, 30].map(|start| row("vwap", start, "A", 0)).into()).await;
        let wanted = RowQuery { from: Some(Micros(10)), to: Some(Micros(30)), ..RowQuery::first(10) };
        let (rows, _) = store.rows(&acme, &name("vwap"), &wanted).await.unwrap();
        assert_eq!(rows.iter().map(|r| r.window_start.0).collect::<Vec<_>>(), [10, 20]);
    }

    #[tokio::test]
    async fn keys_are_compared_as_text_whatever_their_type() {
        let keys = [
            r#"{"desk":1,"live":true,"symbol":"A"}"#,
            r#"{"desk":"1","live":false,"symbol":"true"}"#,
            r#"{"desk":1.5,"live":null,"symbol":"é\"\\n"}"#,
        ];
        let rows = keys.map(|key| FinalRow { key: key.into(), ..row("vwap", 0, "", 0) });
        let (store, acme, _dir) = store_with(rows.into()).await;
        let cases: [(&str, &[usize]); 14] = [
            ("symbol=A", &[0]),
            ("symbol=a", &[]),
            ("symbol=true", &[1]),
            ("symbol=é\"\\n", &[2]),
            ("desk=1", &[0, 1]),
            ("desk=1.5", &[2]),
            ("live=true", &[0]),
            ("desk=1&live=false", &[1]),
            ("region=EU", &[]),
            ("live", &[2]),
            ("live=null", &[]),
            ("live&desk=1.5", &[2]),
            ("bad\"name=A", &[]),
            ("$[=A&=A", &[]),
        ];
        for (wanted, expected) in cases {
            let wanted = RowQuery { keys: wanted.split('&').map(wanted_key).collect(), ..RowQuery::first(10) };
            let (rows, _) = store.rows(&acme, &name("vwap"), &wanted).await.unwrap();
            let mut found: Vec<_> = rows.iter().map(|r| keys.iter().position(|key| *key == r.key).unwrap()).collect();
            found.sort();
            assert_eq!(found, expected, "{:?}", wanted.keys);
        }
    }

    /// `column=value`, or `column` for NULL.
    fn wanted_key(text: &str) -> (String, Option<String>) {
        text.split_once('=').map_or((text.into(), None), |(column, value)| (column.into(), Some(value.into())))
    }

    #[tokio::test]
    async fn a_cursor_that_no_page_gave_is_refused() {
        let (store, acme, _dir) = store_with(vec![]).await;
        for cursor in ["", "x", "e30", "bm90IGpzb24"] {
            let wanted = RowQuery { after: Some(cursor.into()), ..RowQuery::first(10) };
            let refused = store.rows(&acme, &name("vwap"), &wanted).await;
            assert!(matches!(refused, Err(StoreError::Cursor { .. })), "{cursor}");
        }
    }

    #[tokio::test]
    async fn pruning_takes_windows_that_ended_and_leaves_those_that_reach_further() {
        let (store, acme, _dir) = store_with([0, 10, 20].map(|start| row("vwap", start, "A", 0)).into()).await;
        assert_eq!(store.prune_rows(&acme, &name("vwap"), Micros(20)).await.unwrap(), 2);
        let (rows, _) = store.rows(&acme, &name("vwap"), &RowQuery::first(10)).await.unwrap();
        assert_eq!(rows, [row("vwap", 20, "A", 0)]);
        assert_eq!(store.prune_rows(&acme, &name("vwap"), Micros::MAX).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn a_page_is_a_seek_in_the_primary_key() {
        let (store, _dir) = store().await;
        if store.db.dialect() == Dialect::Postgres {
            return; // its planner goes by the sizes of tables, and these are empty
        }
        let plan: Vec<String> = query(
            "EXPLAIN QUERY PLAN SELECT * FROM final_rows WHERE workspace = 'a' AND metric = 'b' \
             AND (window_start, window_end, key_json) > (1, 2, 'c') ORDER BY window_start, window_end, key_json",
        )
        .fetch_all(store.read(Scope::Installation))
        .await
        .unwrap()
        .iter()
        .map(|row| row.try_get("detail").unwrap())
        .collect();
        let seek = "SEARCH final_rows USING PRIMARY KEY (workspace=? AND metric=? AND ";
        assert!(plan.len() == 1 && plan[0].starts_with(seek), "{plan:?}");
    }

    #[tokio::test]
    async fn times_and_keys_at_the_edges_come_back_as_they_were() {
        let first = FinalRow { window_start: Micros(-62_135_596_800_000_000), ..row("vwap", 0, "0001-01-01", 0) };
        let odd = FinalRow { key: r#"{"symbol":"a\u0000b"}"#.into(), ..row("vwap", 1, "", 0) };
        let exact = FinalRow { window_start: Micros(1_767_225_600_123_457), ..row("vwap", 0, "micros", 0) };
        let last =
            FinalRow { window_end: Micros(253_402_300_799_999_999), ..row("vwap", 253_402_300_000_000_000, "9999", 0) };
        let all = vec![first, odd, exact, last];
        let (store, acme, _dir) = store_with(all.clone()).await;
        let (rows, _) = store.rows(&acme, &name("vwap"), &RowQuery::first(10)).await.unwrap();
        assert_eq!(rows, all);
        // a key that PostgreSQL cannot unescape is no reason to fail
        let wanted = RowQuery { keys: vec![("symbol".into(), Some("micros".into()))], ..RowQuery::first(10) };
        assert_eq!(store.rows(&acme, &name("vwap"), &wanted).await.unwrap().0, all[2..3]);
    }
}
