//! From a database row to a record: the types of the engine out of the types of the database.

use super::db::Row;
use engine::event::{Micros, NameError};
use serde_json::Value;

/// Columns by name, as what they mean. All fail with the name of the column.
pub(super) trait Columns {
    fn time(&self, column: &str) -> Result<Micros, sqlx::Error>;
    fn time_if_any(&self, column: &str) -> Result<Option<Micros>, sqlx::Error>;
    /// A workspace, stream or item name.
    fn name<N: TryFrom<String, Error = NameError>>(&self, column: &str) -> Result<N, sqlx::Error>;
    /// An offset or a count, kept as a signed integer.
    fn count(&self, column: &str) -> Result<u64, sqlx::Error>;
    fn json(&self, column: &str) -> Result<Value, sqlx::Error>;
}

impl Columns for Row {
    fn time(&self, column: &str) -> Result<Micros, sqlx::Error> {
        self.instant(column)?.ok_or_else(|| unreadable(column, sqlx::error::UnexpectedNullError))
    }

    fn time_if_any(&self, column: &str) -> Result<Option<Micros>, sqlx::Error> {
        self.instant(column)
    }

    fn name<N: TryFrom<String, Error = NameError>>(&self, column: &str) -> Result<N, sqlx::Error> {
        let text: String = self.try_get(column)?;
        text.try_into().map_err(|e| unreadable(column, e))
    }

    fn count(&self, column: &str) -> Result<u64, sqlx::Error> {
        let n: i64 = self.try_get(column)?;
        n.try_into().map_err(|e| unreadable(column, e))
    }

    fn json(&self, column: &str) -> Result<Value, sqlx::Error> {
        let text: String = self.try_get(column)?;
        serde_json::from_str(&text).map_err(|e| unreadable(column, e))
    }
}

fn unreadable(column: &str, source: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.into(), source: source.into() }
}
