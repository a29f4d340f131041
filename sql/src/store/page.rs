//! Cursors, so that a list is read in pages. A cursor is the sort key of the last row seen, so rows that come or go
//! meanwhile neither repeat others nor hide them. Clients hand it back unread: base64 of JSON.

use super::StoreError;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What to ask the database for: one row more than wanted shows whether there is a next page. A page has at least one
/// row, or nobody would get further.
pub(super) fn rows_to_read(limit: usize) -> i64 {
    i64::try_from(limit.max(1)).unwrap_or(i64::MAX).saturating_add(1)
}

/// The sort key a cursor stands for.
pub(super) fn position<K: DeserializeOwned>(cursor: Option<&str>) -> Result<Option<K>, StoreError> {
    let Some(cursor) = cursor else { return Ok(None) };
    let key = URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|json| serde_json::from_slice(&json).ok());
    // The message is for a client that sent it: enough to recognise, not all of what may be long.
    key.map(Some).ok_or_else(|| StoreError::Cursor { cursor: cursor.chars().take(80).collect() })
}

/// Cuts what [`rows_to_read`] brought to the page asked for, and makes the cursor of the next one, if there is one.
pub(super) fn cut<R, K: Serialize>(mut rows: Vec<R>, limit: usize, key: impl Fn(&R) -> K) -> (Vec<R>, Option<String>) {
    let limit = limit.max(1);
    if rows.len() <= limit {
        return (rows, None);
    }
    rows.truncate(limit);
    let json = serde_json::to_vec(&key(&rows[limit - 1])).expect("a sort key is numbers and text, which JSON holds");
    (rows, Some(URL_SAFE_NO_PAD.encode(json)))
}
