//! History at a coarser step: of each hour or day, and for each key, the final row that ended last. TimescaleDB keeps
//! these rows in continuous aggregates, one made of the other (windows → 1 h → 1 day); elsewhere they are computed.

use super::db::{Builder, Dialect, FromRow, Row, Tx};
use super::record::Columns;
use super::rows::{FinalRow, RowQuery, WITHDRAWN, push_key_equals};
use super::{Commit, Store, StoreError, bulk, failed, page};
use engine::event::{ItemName, Micros, Span, WorkspaceId};
use sqlx::types::chrono::Utc;
use std::collections::BTreeSet;

/// How far apart the rows of a history are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Hour,
    Day,
}

/// A range this long has at most 2,880 windows of a minute: they are asked for themselves.
const WINDOWS_UP_TO: Span = Span::seconds(2 * 24 * 60 * 60);
/// A range this long has at most 2,160 hours.
const HOURS_UP_TO: Span = Span::seconds(90 * 24 * 60 * 60);

impl Step {
    /// The step that fits a range: `None`, every window, up to 2 days; hours up to 90 days; beyond that days.
    pub fn of_range(from: Micros, to: Micros) -> Option<Step> {
        match to.since(from) {
            range if range <= WINDOWS_UP_TO => None,
            range if range <= HOURS_UP_TO => Some(Step::Hour),
            _ => Some(Step::Day),
        }
    }

    fn micros(self) -> i64 {
        match self {
            Step::Hour => 3_600_000_000,
            Step::Day => 86_400_000_000,
        }
    }

    /// Start of the hour or day that holds the time in `column`, in SQL.
    fn bucket_of(self, column: &str, dialect: Dialect) -> String {
        let micros = self.micros();
        match dialect {
            // `%` has the sign of the dividend: before 1970 the remainder is brought above zero
            Dialect::Sqlite => format!("{column} - (({column} % {micros}) + {micros}) % {micros}"),
            Dialect::Postgres => {
                format!("date_bin(INTERVAL '{micros} microseconds', {column}, TIMESTAMPTZ '1970-01-01T00:00:00Z')")
            }
        }
    }

    /// Start of the hour or day, in UTC, that holds `at`.
    pub fn bucket(self, at: Micros) -> Micros {
        Micros(at.0.saturating_sub(at.0.rem_euclid(self.micros())))
    }

    /// Start of the first hour or day that starts at `at` or later.
    pub fn bucket_after(self, at: Micros) -> Micros {
        let start = self.bucket(at);
        if start == at { at } else { Micros(start.0.saturating_add(self.micros())) }
    }
}

/// A row and the hour or day it stands for.
struct Sample {
    bucket: Micros,
    row: FinalRow,
}

impl FromRow for Sample {
    fn from_row(row: &Row) -> Result<Sample, sqlx::Error> {
        Ok(Sample { bucket: row.time("bucket")?, row: FinalRow::from_row(row)? })
    }
}

/// Where a page ended: bucket, key.
type Position = (i64, String);

impl Store {
    /// Whether [`Store::samples`] reads continuous aggregates.
    pub fn has_rollups(&self) -> bool {
        self.rollups
    }

    /// A page of the last rows of each hour or day by bucket and key, and the cursor of the next page if there is one.
    /// The range is widened to whole buckets. [`StoreError::Cursor`] for an `after` that no page gave.
    ///
    /// With TimescaleDB too this is what the final rows say now: hours and days that got rows since they were kept, which
    /// are in `late_hours`, are computed, and only the others read as they were kept.
    pub async fn samples(
        &self,
        workspace: &WorkspaceId,
        metric: &ItemName,
        wanted: &RowQuery,
        step: Step,
    ) -> Result<(Vec<FinalRow>, Option<String>), StoreError> {
        let after = page::position::<Position>(wanted.after.as_deref())?;
        let page = Page {
            workspace,
            metric,
            step,
            // what follows the cursor is in its bucket or a later one
            from: wanted.from.map(|from| step.bucket(from)).max(after.as_ref().map(|(bucket, _)| Micros(*bucket))),
            to: wanted.to.map(|to| step.bucket_after(to)),
            keys: &wanted.keys,
            after,
            rows: page::rows_to_read(wanted.limit),
        };
        let sql = match self.rollups {
            true => page.kept_and_late(),
            false => page.computed(self.db.dialect()),
        };
        let samples: Vec<Sample> =
            sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("read history"))?;
        let (samples, next) = page::cut(samples, wanted.limit, |sample| (sample.bucket.0, sample.row.key.clone()));
        Ok((samples.into_iter().map(|sample| sample.row).collect(), next))
    }
}

/// Which samples to read.
struct Page<'q> {
    workspace: &'q WorkspaceId,
    metric: &'q ItemName,
    step: Step,
    /// Start of the first bucket.
    from: Option<Micros>,
    /// Start of the first bucket that is too late.
    to: Option<Micros>,
    keys: &'q [(String, Option<String>)],
    after: Option<Position>,
    rows: i64,
}

impl<'q> Page<'q> {
    /// The last rows of all buckets, in one look at the final rows.
    fn computed(&self, dialect: Dialect) -> Builder<'q> {
        let bucket = self.step.bucket_of("window_start", dialect);
        let mut sql = Builder::new(&format!(
            "SELECT * FROM (SELECT final_rows.*, {bucket} AS bucket, ROW_NUMBER() OVER (PARTITION BY {bucket}, key_json \
             ORDER BY window_end DESC, window_start DESC) AS place FROM final_rows WHERE "
        ));
        self.push_range(&mut sql, "window_start");
        self.push_keys(&mut sql, dialect);
        push_is_not_withdrawn(&mut sql);
        sql.push(") AS placed WHERE place = 1");
        self.push_rest(&mut sql);
        sql
    }

    /// What TimescaleDB keeps, and what is late computed bucket by bucket, so that a page reads no more of them than it
    /// shows. One statement, which sees one state of the store: a note goes when what it is about was kept.
    fn kept_and_late(&self) -> Builder<'q> {
        const COLUMNS: &str = "metric, window_start, window_end, key_json, revision, row_json";
        let (micros, dialect) = (self.step.micros(), Dialect::Postgres);
        let bucket = self.step.bucket_of("bucket", dialect);
        let mut sql = Builder::new(&format!("WITH late AS (SELECT DISTINCT {bucket} AS bucket FROM late_hours WHERE "));
        self.push_range(&mut sql, "bucket");
        sql.push(&format!(
            ") SELECT * FROM ((SELECT bucket, {COLUMNS} FROM final_rows_1{} AS kept \
             WHERE NOT EXISTS (SELECT FROM late WHERE late.bucket = kept.bucket) AND ",
            match self.step {
                Step::Hour => "h",
                Step::Day => "d",
            }
        ));
        self.push_range(&mut sql, "bucket");
        self.push_keys(&mut sql, dialect);
        self.push_rest(&mut sql);
        sql.push(&format!(
            ") UNION ALL (SELECT bucket, {COLUMNS} FROM late CROSS JOIN LATERAL (SELECT DISTINCT ON (key_json) {COLUMNS} \
             FROM final_rows WHERE window_start >= late.bucket \
             AND window_start < late.bucket + INTERVAL '{micros} microseconds' AND "
        ));
        self.push_range(&mut sql, "window_start");
        self.push_keys(&mut sql, dialect);
        push_is_not_withdrawn(&mut sql);
        sql.push(" ORDER BY key_json, window_end DESC, window_start DESC) AS ended_last WHERE TRUE");
        self.push_rest(&mut sql);
        sql.push(")) AS samples WHERE TRUE");
        self.push_rest(&mut sql);
        sql
    }

    /// The metric, and its buckets by `start`.
    fn push_range(&self, sql: &mut Builder<'q>, start: &str) {
        sql.push("workspace = ").push_bind(self.workspace.as_str());
        sql.push(" AND metric = ").push_bind(self.metric.as_str());
        if let Some(from) = self.from {
            sql.push(&format!(" AND {start} >= ")).push_bind(from);
        }
        if let Some(to) = self.to {
            sql.push(&format!(" AND {start} < ")).push_bind(to);
        }
    }

    fn push_keys(&self, sql: &mut Builder<'q>, dialect: Dialect) {
        for (column, value) in self.keys {
            push_key_equals(sql, dialect, column, value.as_deref());
        }
    }

    /// What is behind the cursor, in order, as many rows as a page has.
    fn push_rest(&self, sql: &mut Builder<'q>) {
        if let Some((bucket, key)) = &self.after {
            sql.push(" AND (bucket, key_json) > (").push_bind(Micros(*bucket));
            sql.push(", ").push_bind(key.clone()).push(")");
        }
        sql.push(" ORDER BY bucket, key_json LIMIT ").push_bind(self.rows);
    }
}

/// A session that became a part of a longer one, which began before it, ended when that did.
fn push_is_not_withdrawn(sql: &mut Builder<'_>) {
    sql.push(&format!(" AND row_json <> '{WITHDRAWN}'"));
}

/// An hour is late when this much has passed since its end. It is kept two hours after that at the earliest, and a commit
/// that found it not late has ended by then, also where the clocks of store and server differ somewhat.
const LATE_AFTER: i64 = 3_600_000_000;

/// Notes the hours that get rows after they may have been kept. The clock is not that of the store, which would have to
/// be asked for each commit.
pub(super) async fn note_late(tx: &mut Tx, commits: &[Commit]) -> Result<(), sqlx::Error> {
    let over = Utc::now().timestamp_micros() - LATE_AFTER;
    let late: BTreeSet<(&WorkspaceId, &ItemName, Micros)> = commits
        .iter()
        .flat_map(|commit| commit.rows.iter().map(|row| (&commit.workspace, row)))
        .map(|(workspace, row)| (workspace, &row.metric, Step::Hour.bucket(row.window_start)))
        .filter(|(_, _, hour)| hour.0.saturating_add(Step::Hour.micros()) <= over)
        .collect();
    let late: Vec<_> = late.into_iter().collect();
    let noted = bulk::insert(
        tx,
        [
            "INSERT INTO late_hours (workspace, metric, bucket) ",
            " ON CONFLICT (workspace, metric, bucket) DO UPDATE SET written = excluded.written",
        ],
        &late,
        |hour| *hour,
        |values, (workspace, metric, hour)| {
            values.push_bind(workspace.as_str());
            values.push_bind(metric.as_str());
            values.push_bind(*hour);
        },
    );
    noted.await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::super::checkpoints::testing::commit;
    use super::super::db::query_scalar;
    use super::super::rows::testing::row;
    use super::super::testing::*;
    use super::super::{Options, suite};
    use super::*;

    const MINUTE: i64 = 60_000_000;

    fn minute_row(minute: i64, symbol: &str) -> FinalRow {
        FinalRow {
            window_start: Micros(minute * MINUTE),
            window_end: Micros((minute + 1) * MINUTE),
            row: format!(r#"{{"minute":{minute}}}"#),
            ..row("vwap", 0, symbol, 0)
        }
    }

    /// A store with a row a minute from 90 minutes before 1970 on, in two symbols.
    async fn store_with_minutes(count: i64) -> (Store, WorkspaceId, tempfile::TempDir) {
        let (store, dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let rows = (-90..count - 90).flat_map(|minute| ["A", "B"].map(|symbol| minute_row(minute, symbol))).collect();
        store.commit(&[Commit { rows, ..commit(&acme, 1) }]).await.unwrap();
        (store, acme, dir)
    }

    async fn minutes(store: &Store, acme: &WorkspaceId, wanted: &RowQuery, step: Step) -> Vec<(i64, String)> {
        let (mut read, mut wanted) = (Vec::new(), wanted.clone());
        loop {
            let (page, next) = store.samples(acme, &name("vwap"), &wanted, step).await.unwrap();
            read.extend(page.into_iter().map(|row| (row.window_start.0 / MINUTE, row.key)));
            match next {
                Some(next) => wanted.after = Some(next),
                None => return read,
            }
        }
    }

    fn both(minutes: &[i64]) -> Vec<(i64, String)> {
        let key = |symbol: &str| row("vwap", 0, symbol, 0).key;
        minutes.iter().flat_map(|minute| [(*minute, key("A")), (*minute, key("B"))]).collect()
    }

    #[tokio::test]
    async fn each_hour_and_each_day_shows_its_last_row_of_each_key_in_pages_of_any_size() {
        let (store, acme, _dir) = store_with_minutes(90 + 25 * 60).await;
        let mut hours = vec![-61, -1];
        hours.extend((1..=25).map(|hour| hour * 60 - 1));
        for limit in [1, 3, 100] {
            let wanted = RowQuery::first(limit);
            assert_eq!(minutes(&store, &acme, &wanted, Step::Hour).await, both(&hours), "pages of {limit}");
            assert_eq!(minutes(&store, &acme, &wanted, Step::Day).await, both(&[-1, 24 * 60 - 1, 25 * 60 - 1]));
        }
    }

    #[tokio::test]
    async fn the_range_is_widened_to_whole_hours_and_keys_are_compared() {
        let (store, acme, _dir) = store_with_minutes(90 + 200).await;
        let wanted = RowQuery {
            from: Some(Micros(70 * MINUTE)),
            to: Some(Micros(121 * MINUTE)),
            keys: vec![("symbol".into(), Some("B".into()))],
            ..RowQuery::first(10)
        };
        let expected: Vec<_> = both(&[119, 179]).into_iter().filter(|(_, key)| key.contains('B')).collect();
        assert_eq!(minutes(&store, &acme, &wanted, Step::Hour).await, expected);
    }

    #[tokio::test]
    async fn what_is_deleted_is_gone_from_the_history_of_hours_and_days_too() {
        let (store, acme, _dir) = store_with_minutes(300).await;
        store.roll_up().await;
        store.prune_rows(&acme, &name("vwap"), Micros(60 * MINUTE)).await.unwrap();
        assert_eq!(minutes(&store, &acme, &RowQuery::first(100), Step::Hour).await, both(&[119, 179, 209]));
        store.delete_workspace(&acme).await.unwrap();
        assert_eq!(minutes(&store, &acme, &RowQuery::first(100), Step::Hour).await, []);
        assert_eq!(minutes(&store, &acme, &RowQuery::first(100), Step::Day).await, []);
    }

    /// Rows of `vwap` every half hour, `count` of them from so many hours before now on; they tell their revision.
    fn half_hours(hours_ago: i64, count: i64, revision: i64) -> Vec<FinalRow> {
        let first = Utc::now().timestamp_micros() / MINUTE - hours_ago * 60;
        (0..count)
            .map(|n| FinalRow {
                revision,
                row: format!(r#"{{"of_revision":{revision}}}"#),
                ..minute_row(first + n * 30, "A")
            })
            .collect()
    }

    /// Hours and days of each workspace are what its rows say, in pages of any size.
    async fn check(store: &Store, workspaces: &[&WorkspaceId], when: &str) {
        for workspace in workspaces {
            let (rows, _) = store.rows(workspace, &name("vwap"), &RowQuery::first(10_000)).await.unwrap();
            for (step, limit) in [(Step::Hour, 7), (Step::Hour, 10_000), (Step::Day, 3), (Step::Day, 10_000)] {
                let last: std::collections::BTreeMap<_, _> =
                    rows.iter().map(|row| ((step.bucket(row.window_start), &row.key), row)).collect();
                let (mut read, mut wanted) = (Vec::new(), RowQuery::first(limit));
                loop {
                    let (page, next) = store.samples(workspace, &name("vwap"), &wanted, step).await.unwrap();
                    read.extend(page);
                    wanted.after = next;
                    if wanted.after.is_none() {
                        break;
                    }
                }
                assert_eq!(read.iter().collect::<Vec<_>>(), last.into_values().collect::<Vec<_>>(), "{step:?} {when}");
            }
        }
    }

    /// How many hours of a workspace are late.
    async fn late(store: &Store, workspace: &WorkspaceId) -> i64 {
        let late = query_scalar("SELECT COUNT(*) FROM late_hours WHERE workspace = $1").bind(workspace.as_str());
        late.fetch_one(store.read(workspace)).await.unwrap()
    }

    #[tokio::test]
    async fn what_comes_late_shows_at_once_and_when_it_was_kept() {
        let (store, _dir) = store().await;
        let (live, old) = (add_workspace(&store, "live").await, add_workspace(&store, "old").await);
        let both = [&live, &old];
        let steps = [
            (&live, half_hours(60, 120, 0)),
            (&old, half_hours(40 * 24, 60, 0)), // an import, all below what is kept of another
            (&live, half_hours(30, 20, 1)),     // corrections and new rows within the last days
            (&old, half_hours(11 * 24, 6, 0)),  // new, and far behind what is kept
            (&old, half_hours(40 * 24 - 9, 3, 1)), // what was kept is corrected
        ];
        for (offset, (workspace, rows)) in (1..).zip(steps) {
            store.commit(&[Commit { rows, ..commit(workspace, offset) }]).await.unwrap();
            check(&store, &both, &format!("with commit {offset}")).await;
            if store.rollups {
                assert!(late(&store, workspace).await > 0);
            }
            store.roll_up().await;
            check(&store, &both, &format!("kept with commit {offset}")).await;
            if store.rollups {
                // the hour that is over and not kept yet
                assert!(late(&store, &live).await <= 2);
                assert_eq!(late(&store, &old).await, 0);
            }
        }
        let before = half_hours(39 * 24, 1, 0)[0].window_end;
        assert!(store.prune_rows(&old, &name("vwap"), before).await.unwrap() > 0);
        check(&store, &both, "pruned").await;
        store.roll_up().await;
        check(&store, &both, "kept as pruned").await;
        store.delete_metric(&old, &name("vwap")).await.unwrap();
        check(&store, &both, "deleted").await;
        assert_eq!(minutes(&store, &old, &RowQuery::first(9), Step::Hour).await, []);
        store.roll_up().await;
        check(&store, &both, "deleted").await;
    }

    #[tokio::test]
    async fn a_row_that_was_withdrawn_is_no_sample() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let longer = minute_row(0, "A");
        let withdrawn = FinalRow {
            window_start: Micros(longer.window_start.0 + MINUTE / 2),
            row: WITHDRAWN.into(),
            revision: 1,
            ..longer.clone()
        };
        let alone = FinalRow { row: WITHDRAWN.into(), ..minute_row(90, "A") };
        let rows = vec![withdrawn, longer.clone(), alone];
        store.commit(&[Commit { rows, ..commit(&acme, 1) }]).await.unwrap();
        for step in [Step::Hour, Step::Day] {
            let (samples, _) = store.samples(&acme, &name("vwap"), &RowQuery::first(9), step).await.unwrap();
            assert_eq!(samples, std::slice::from_ref(&longer));
            store.roll_up().await;
        }
    }

    #[tokio::test]
    async fn live_rows_are_not_noted() {
        let (store, _dir) = store().await;
        if !store.rollups {
            return;
        }
        let acme = add_workspace(&store, "acme").await;
        store.commit(&[Commit { rows: half_hours(1, 3, 0), ..commit(&acme, 1) }]).await.unwrap();
        assert_eq!(late(&store, &acme).await, 0);
        check(&store, &[&acme], "live").await;
    }

    #[tokio::test]
    async fn aggregates_of_an_earlier_version_miss_nothing_after_the_start() {
        let (store, dir) = store().await;
        if !store.rollups {
            return;
        }
        let (live, old) = (add_workspace(&store, "live").await, add_workspace(&store, "old").await);
        store.commit(&[Commit { rows: half_hours(60, 120, 0), ..commit(&live, 1) }]).await.unwrap();
        store.roll_up().await;
        store.commit(&[Commit { rows: half_hours(40 * 24, 60, 0), ..commit(&old, 1) }]).await.unwrap();
        store
            .run_sql(
                "DROP TABLE late_hours; SELECT add_continuous_aggregate_policy('final_rows_1h', INTERVAL '7 days', \
                 INTERVAL '1 hour', INTERVAL '30 minutes')",
            )
            .await;
        store.close().await;
        let store = Store::open_with(&url(&dir), &suite::options()).await.unwrap();
        check(&store, &[&live, &old], "late").await;
        store.roll_up().await;
        check(&store, &[&live, &old], "kept").await;
        let policies = "SELECT COUNT(*) FROM timescaledb_information.jobs \
                        WHERE proc_name = 'policy_refresh_continuous_aggregate'";
        assert_eq!(query_scalar::<i64>(policies).fetch_one(store.read(&live)).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn hours_and_days_outlive_the_rows_that_retention_drops() {
        let (store, dir) = store().await;
        if !store.rollups {
            return;
        }
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        store.commit(&[Commit { rows: half_hours(40 * 24, 60, 0), ..commit(&acme, 1) }]).await.unwrap();
        store.roll_up().await;
        let all = RowQuery::first(100);
        let kept = minutes(&store, &acme, &all, Step::Hour).await;
        let drop = "SELECT drop_chunks('final_rows', INTERVAL '20 days')";
        store.run_sql(drop).await;
        // Once with a setting that drops them, and once where it does not any more.
        let mut store = store;
        for retain_days in [Some(20), None] {
            store.close().await;
            let options = Options { retain_days, ..suite::options() };
            store = Store::open_with(&url(&dir), &options).await.unwrap();
            store.commit(&[Commit { rows: half_hours(40 * 24 - 9, 3, 0), ..commit(&other, 1) }]).await.unwrap();
            assert_eq!(minutes(&store, &other, &all, Step::Hour).await.len(), 2);
            store.roll_up().await;
            assert_eq!(minutes(&store, &other, &all, Step::Hour).await.len(), 2);
            assert_eq!(minutes(&store, &acme, &all, Step::Hour).await, kept);
            store.run_sql(drop).await;
            store.roll_up().await;
            assert_eq!(late(&store, &other).await, 0);
            assert_eq!(minutes(&store, &acme, &all, Step::Hour).await, kept);
        }
    }

    #[test]
    fn the_step_follows_from_the_range() {
        let day = 86_400_000_000;
        let of_days = |days: i64| Step::of_range(Micros(0), Micros(days * day));
        assert_eq!([1, 2, 3, 90, 91, 400].map(of_days), {
            let (hour, day) = (Some(Step::Hour), Some(Step::Day));
            [None, None, hour, hour, day, day]
        });
        assert_eq!(Step::of_range(Micros::MIN, Micros::MAX), Some(Step::Day));
    }

    #[test]
    fn buckets_are_half_open_also_before_1970() {
        let hour = 3_600_000_000;
        let bucket = |at| Step::Hour.bucket(Micros(at)).0;
        assert_eq!([-1, 0, hour - 1, hour].map(bucket), [-hour, 0, 0, hour]);
        let after = |at| Step::Hour.bucket_after(Micros(at)).0;
        assert_eq!([-1, 0, 1, hour].map(after), [0, 0, hour, hour]);
        assert_eq!(Step::Day.bucket_after(Micros::MAX), Micros::MAX);
    }
}
