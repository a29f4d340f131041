//! Rows of store and memory as one table: what was committed meanwhile is neither missing nor there twice.

use crate::rows::{self, Row};
use crate::system::RowsQuery;
use crate::workspace::Recent;
use engine::event::Micros;
use sql::store::{FinalRow, Place, WITHDRAWN};
use std::collections::{BTreeMap, HashSet};

/// A page of the store with the final rows of memory that belong on it; of rows in one place the one that ends last,
/// and of that the newest revision.
///
/// `after` is where the page before ended, `more` whether the store has rows behind `stored`. Memory is to be read
/// before the store: what moves over meanwhile is then seen twice and counted once, never missed.
pub(crate) fn merge(
    stored: Vec<FinalRow>,
    unsaved: &[FinalRow],
    query: &RowsQuery,
    after: Option<Place>,
    more: bool,
) -> Vec<FinalRow> {
    let place = |row: &FinalRow| Place::of(row, query.step);
    let last = stored.last().filter(|_| more).map(place);
    let mut rows: BTreeMap<Place, FinalRow> = stored.into_iter().map(|row| (place(&row), row)).collect();
    for row in unsaved {
        let at = place(row);
        let on_page = last.as_ref().is_none_or(|last| at <= *last)
            && after.as_ref().is_none_or(|after| at > *after)
            && query.from.is_none_or(|from| row.window_start >= from)
            && query.to.is_none_or(|to| row.window_start < to)
            && has_keys(&row.key, &query.keys);
        let newer = |known: &FinalRow| (known.window_end, known.revision) < (row.window_end, row.revision);
        if on_page && rows.get(&at).is_none_or(newer) {
            rows.insert(at, row.clone());
        }
    }
    rows.into_values().filter(|row| row.row != WITHDRAWN).collect()
}

/// Provisional rows that a query asks for, in order of window, without those that are among `finals` by now.
pub(crate) fn live(recent: &Recent, query: &RowsQuery, finals: &[Row]) -> Result<Vec<Row>, arrow::error::ArrowError> {
    let Ok(program) = &recent.program else { return Ok(Vec::new()) };
    let columns: Vec<&str> =
        program.output().fields().iter().take(2 + program.key_count()).map(|f| f.name().as_str()).collect();
    let identity = |row: &Row| -> Vec<Option<String>> {
        columns.iter().map(|column| row.get(*column).map(|value| value.get().to_owned())).collect()
    };
    let known: HashSet<Vec<Option<String>>> = finals.iter().map(identity).collect();
    let mut all = Vec::new();
    let bound = |at: Option<Micros>| at.map(rows::rfc3339);
    let (from, to) = (bound(query.from), bound(query.to));
    for part in &recent.live {
        all.extend(rows::to_json(part)?.into_iter().filter(|row| {
            let start = row.get("window_start").map_or("", |start| start.get().trim_matches('"'));
            // RFC 3339 of one shape sorts as text
            from.as_deref().is_none_or(|from| start >= from)
                && to.as_deref().is_none_or(|to| start < to)
                && matches(row, &query.keys)
                && !known.contains(&identity(row))
        }));
    }
    Ok(all)
}

/// Whether the key columns, as JSON, have these values.
pub(crate) fn has_keys(key: &str, wanted: &[(String, Option<String>)]) -> bool {
    if wanted.is_empty() {
        return true;
    }
    serde_json::from_str::<Row>(key).is_ok_and(|key| matches(&key, wanted))
}

/// Whether a row has these values, written as rows show them.
fn matches(row: &Row, wanted: &[(String, Option<String>)]) -> bool {
    wanted.iter().all(|(name, wanted)| match (row.get(name).map_or("null", |value| value.get()), wanted) {
        ("null", wanted) => wanted.is_none(),
        (_, None) => false,
        (value, Some(wanted)) if value.starts_with('"') => {
            serde_json::from_str::<String>(value).is_ok_and(|text| text == *wanted)
        }
        (value, Some(wanted)) => value == wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sql::store::Step;
    use std::slice::from_ref;

    fn row(start: i64, symbol: &str, revision: i64) -> FinalRow {
        FinalRow {
            metric: "vwap".parse().unwrap(),
            window_start: Micros(start),
            window_end: Micros(start + 10),
            key: format!(r#"{{"symbol":"{symbol}"}}"#),
            revision,
            row: format!(r#"{{"revision":{revision}}}"#),
        }
    }

    /// All rows in pages of `limit`, as a store that holds `stored` gives them.
    fn read(stored: &[FinalRow], unsaved: &[FinalRow], query: &RowsQuery, limit: usize) -> Vec<FinalRow> {
        let (mut all, mut after): (Vec<FinalRow>, Option<Place>) = (Vec::new(), None);
        loop {
            let behind = |row: &&FinalRow| after.as_ref().is_none_or(|after| Place::of(row, query.step) > *after);
            let mut page: Vec<FinalRow> = stored.iter().filter(behind).take(limit + 1).cloned().collect();
            let more = page.len() > limit;
            page.truncate(limit);
            let end = page.last().map(|row| Place::of(row, query.step));
            all.extend(merge(page, unsaved, query, after.clone(), more));
            match end.filter(|_| more) {
                Some(end) => after = Some(end),
                None => return all,
            }
        }
    }

    #[test]
    fn however_rows_lie_in_store_and_memory_each_is_read_once_in_pages_of_any_size() {
        let all: Vec<FinalRow> = (0..6).flat_map(|n| ["A", "B"].map(|symbol| row(n * 10, symbol, 0))).collect();
        // every way in which 12 rows can be in the store, in memory, or in both while they are being committed
        for ways in 0..3_u32.pow(8) {
            let mut rest = ways;
            let (mut stored, mut unsaved) = (Vec::new(), Vec::new());
            for (n, row) in all.iter().enumerate() {
                let way = if n < 8 { rest % 3 } else { n as u32 % 3 };
                rest /= 3;
                stored.extend((way != 1).then(|| row.clone()));
                unsaved.extend((way != 0).then(|| row.clone()));
            }
            for limit in [1, 3, 100] {
                let read = read(&stored, &unsaved, &RowsQuery::default(), limit);
                assert_eq!(read, all, "way {ways}, pages of {limit}");
            }
        }
    }

    #[test]
    fn of_two_revisions_the_newer_one_counts_wherever_it_is() {
        let (old, new) = (row(0, "A", 1), row(0, "A", 2));
        let query = RowsQuery::default();
        assert_eq!(read(from_ref(&old), from_ref(&new), &query, 10), from_ref(&new));
        assert_eq!(read(from_ref(&new), from_ref(&old), &query, 10), from_ref(&new));
    }

    #[test]
    fn keys_of_any_type_are_compared_by_value() {
        let key = r#"{"d":1.10,"n":7,"live":true,"side":null,"symbol":"7"}"#;
        let has = |name: &str, value: Option<&str>| has_keys(key, &[(name.to_owned(), value.map(str::to_owned))]);
        assert!(has("d", Some("1.10")) && has("n", Some("7")) && has("live", Some("true")) && has("symbol", Some("7")));
        assert!(has("side", None) && !has("side", Some("null")) && !has("n", None) && !has("n", Some("8")));
    }

    #[test]
    fn memory_obeys_range_and_keys_and_the_last_row_of_an_hour_wins() {
        let unsaved = [row(0, "A", 0), row(10, "B", 0), row(20, "A", 0), row(30, "A", 0)];
        let query = RowsQuery {
            from: Some(Micros(10)),
            to: Some(Micros(30)),
            keys: vec![("symbol".into(), Some("A".into()))],
            ..RowsQuery::default()
        };
        assert_eq!(read(&[], &unsaved, &query, 10), [row(20, "A", 0)]);
        let hours = RowsQuery { step: Some(Step::Hour), ..RowsQuery::default() };
        assert_eq!(read(&[row(25, "A", 0)], &unsaved, &hours, 10), [row(30, "A", 0), row(10, "B", 0)]);
    }
}
