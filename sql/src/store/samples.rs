//! History at a coarser step: of each hour or day, and for each key, the final row that ended last. TimescaleDB keeps
//! these rows in continuous aggregates, one made of the other (windows → 1 h → 1 day); elsewhere they are computed.

use super::db::{Builder, Dialect, FromRow, Row};
use super::record::Columns;
use super::rows::{FinalRow, RowQuery, push_key_equals};
use super::{Store, StoreError, failed, page};
use engine::event::{ItemName, Micros, Span, WorkspaceId};

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
    /// With TimescaleDB, corrections of hours that were rolled up already show when their policy runs again, within
    /// the hour.
    pub async fn samples(
        &self,
        workspace: &WorkspaceId,
        metric: &ItemName,
        wanted: &RowQuery,
        step: Step,
    ) -> Result<(Vec<FinalRow>, Option<String>), StoreError> {
        let from = wanted.from.map(|from| step.bucket(from));
        let to = wanted.to.map(|to| step.bucket_after(to));
        let after = page::position::<Position>(wanted.after.as_deref())?;
        let mut sql = match (self.rollups, step) {
            (true, Step::Hour) => Builder::new("SELECT * FROM final_rows_1h WHERE workspace = "),
            (true, Step::Day) => Builder::new("SELECT * FROM final_rows_1d WHERE workspace = "),
            (false, _) => Builder::new(&computed(self.db.dialect(), step)),
        };
        let start = if self.rollups { "bucket" } else { "window_start" };
        sql.push_bind(workspace.as_str()).push(" AND metric = ").push_bind(metric.as_str());
        // what follows the cursor is in its bucket or a later one
        if let Some(from) = from.max(after.as_ref().map(|(bucket, _)| Micros(*bucket))) {
            sql.push(&format!(" AND {start} >= ")).push_bind(from);
        }
        if let Some(to) = to {
            sql.push(&format!(" AND {start} < ")).push_bind(to);
        }
        for (column, value) in &wanted.keys {
            push_key_equals(&mut sql, self.db.dialect(), column, value.as_deref());
        }
        if !self.rollups {
            sql.push(") AS placed WHERE place = 1");
        }
        if let Some((bucket, key)) = after {
            sql.push(" AND (bucket, key_json) > (").push_bind(Micros(bucket)).push(", ").push_bind(key).push(")");
        }
        sql.push(" ORDER BY bucket, key_json LIMIT ").push_bind(page::rows_to_read(wanted.limit));
        let samples: Vec<Sample> =
            sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("read history"))?;
        let (samples, next) = page::cut(samples, wanted.limit, |sample| (sample.bucket.0, sample.row.key.clone()));
        Ok((samples.into_iter().map(|sample| sample.row).collect(), next))
    }
}

/// The beginning of the statement that does without continuous aggregates, up to the workspace.
fn computed(dialect: Dialect, step: Step) -> String {
    let micros = step.micros();
    let bucket = match dialect {
        // `%` has the sign of the dividend: before 1970 the remainder is brought above zero
        Dialect::Sqlite => format!("window_start - ((window_start % {micros}) + {micros}) % {micros}"),
        Dialect::Postgres => {
            format!("date_bin(INTERVAL '{micros} microseconds', window_start, TIMESTAMPTZ '1970-01-01T00:00:00Z')")
        }
    };
    format!(
        "SELECT * FROM (SELECT final_rows.*, {bucket} AS bucket, ROW_NUMBER() OVER (PARTITION BY {bucket}, key_json \
         ORDER BY window_end DESC, window_start DESC) AS place FROM final_rows WHERE workspace = "
    )
}

#[cfg(test)]
mod tests {
    use super::super::Commit;
    use super::super::checkpoints::testing::commit;
    use super::super::rows::testing::row;
    use super::super::testing::*;
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
