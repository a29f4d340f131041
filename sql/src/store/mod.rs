//! What outlives the process: who may do what, what was defined, what was computed and up to which log offset.
//! Knows SQL and nothing of HTTP, tokens or actors; the caller brings ids and the time.
//!
//! The statements are written for SQLite and PostgreSQL alike (`$1` placeholders, ON CONFLICT, RETURNING). What only
//! SQLite does stands in `open.rs`, in `rows.rs` (a look into a JSON key) and in `migrations/sqlite`.

mod bulk;
mod open; // URLs, connections, migrations
mod page; // cursors, so that a list is read in pages
mod record; // from a database row to a record // many rows in one statement

mod alerts; // firings and acknowledgement
mod audit;
mod checkpoints; // state, results and log offset in one transaction
mod dead_letters; // events that could not be used
mod factors; // second factors, and identities of other issuers
mod grants; // what members may do beyond their role
mod definitions; // streams, metrics, alert rules and silences
mod keys; // API keys
mod portfolios; // portfolios and positions
mod rows; // final rows of metrics
mod threads; // conversations with agents, and their runs
mod users; // users and the refresh tokens of their sign-ins
mod workspaces; // workspaces and their members // who did what

pub use alerts::Alert;
pub use audit::{AuditCheck, AuditEntry};
pub use checkpoints::{Checkpoint, Commit};
pub use dead_letters::DeadLetter;
pub use definitions::{AlertRule, MetricRow, Silence, StreamRow};
pub use factors::Totp;
pub use grants::Grant;
pub use keys::ApiKey;
pub use open::migrate;
pub use portfolios::{Portfolio, Position};
pub use rows::{FinalRow, RowQuery};
pub use threads::{Message, Run, Thread};
pub use users::{RefreshToken, Spent, User};
pub use workspaces::{Member, Workspace};

use engine::event::WorkspaceId;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool, SqliteRow};
use sqlx::{FromRow, Transaction, query, query_scalar};

/// The store. A clone is another handle to the same connections.
///
/// Every function that takes a workspace sees and changes that workspace only: what belongs to another is as absent
/// as what does not exist. An offset or a number of events above `i64::MAX` is taken as `i64::MAX`, since the database
/// has no greater integer.
#[derive(Clone)]
pub struct Store {
    // SQLite has one writer at a time: with one connection writers queue here, in order, instead of meeting in
    // SQLITE_BUSY. Readers see the last committed state and never wait for it.
    writer: SqlitePool,
    readers: SqlitePool,
}

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("store url scheme `{scheme}` is not supported in this build; use `sqlite:PATH`")]
    Scheme { scheme: String },
    #[error("store url `{url}` {problem}; use `sqlite:PATH`, for example `sqlite:data/tidewatch.db`")]
    Url { url: String, problem: &'static str },
    #[error("cannot open store `{path}`: {source}; check that the path is writable and holds a Tidewatch database")]
    Open { path: String, source: sqlx::Error },
    #[error("cannot apply migrations to store `{path}`: {source}")]
    Migrate { path: String, source: sqlx::migrate::MigrateError },
    /// The file was last opened by a newer build, whose tables this one does not know.
    #[error("store `{path}` has migration {found} but this build knows only up to {known}; use a newer tidewatch")]
    Newer { path: String, found: i64, known: i64 },
    /// Something with the same id, name, e-mail or hash is there already.
    #[error("cannot {operation}: it exists already")]
    Exists { operation: &'static str },
    /// The record refers to a workspace, user, portfolio, thread or run that is not there.
    #[error("cannot {operation}: what it belongs to does not exist")]
    Missing { operation: &'static str },
    /// A commit for a workspace that was deleted meanwhile: leave it out and commit the others again.
    #[error("cannot commit workspace `{workspace}`: it does not exist; stop its engine")]
    NoWorkspace { workspace: WorkspaceId },
    /// A commit behind what is stored: another owner of the workspace has gone further.
    #[error("cannot commit workspace `{workspace}` at offset {offset}: the store is at {stored}; load that checkpoint")]
    Stale { workspace: WorkspaceId, offset: u64, stored: u64 },
    #[error("cursor `{cursor}` is none that this list gave; start without one")]
    Cursor { cursor: String },
    #[error("cannot {operation}: the store is busy; try again")]
    Busy { operation: &'static str },
    #[error("cannot {operation}: {source}")]
    Database { operation: &'static str, source: sqlx::Error },
}

/// Turns what the database says about `operation` into what the caller can act on.
fn failed(operation: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    // SQLITE_BUSY and SQLITE_LOCKED; the low byte of an extended code is its primary code.
    let is_busy = |code: &str| code.parse::<i32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6));
    move |source| match &source {
        sqlx::Error::PoolTimedOut => StoreError::Busy { operation },
        sqlx::Error::Database(e) if e.is_unique_violation() => StoreError::Exists { operation },
        sqlx::Error::Database(e) if e.is_foreign_key_violation() => StoreError::Missing { operation },
        sqlx::Error::Database(e) if e.code().is_some_and(|code| is_busy(&code)) => StoreError::Busy { operation },
        _ => StoreError::Database { operation, source },
    }
}

/// An unsigned number as the database keeps it.
fn stored(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Store {
    /// Ready to answer: one read of the database file.
    pub async fn ping(&self) -> Result<(), StoreError> {
        query("SELECT value FROM meta LIMIT 1")
            .fetch_optional(&self.readers)
            .await
            .map_err(failed("reach the store"))?;
        Ok(())
    }

    /// Waits for running statements and closes all connections, which also folds the write-ahead log into the file.
    /// Later calls fail.
    pub async fn close(&self) {
        // The writer last: the last connection to close folds, and a reader may not write.
        self.readers.close().await;
        self.writer.close().await;
    }

    /// Keeps a small value of the whole process under `key`, in place of the one before.
    pub async fn put_meta(&self, key: &str, value: &str) -> Result<(), StoreError> {
        query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value")
            .bind(key)
            .bind(value)
            .execute(&self.writer)
            .await
            .map_err(failed("put meta value"))?;
        Ok(())
    }

    /// The value under `key`, if one was put.
    pub async fn meta(&self, key: &str) -> Result<Option<String>, StoreError> {
        query_scalar("SELECT value FROM meta WHERE key = $1")
            .bind(key)
            .fetch_optional(&self.readers)
            .await
            .map_err(failed("read meta value"))
    }

    /// A transaction that may write. Takes the write lock at once: one that reads first and locks later would fail
    /// when another process wrote in between.
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, sqlx::Error> {
        self.writer.begin_with("BEGIN IMMEDIATE").await
    }

    /// Runs a write with RETURNING that changes at most one row: that row, `None` when nothing matched.
    async fn change<R>(
        &self,
        write: sqlx::query::QueryAs<'_, Sqlite, R, SqliteArguments>,
    ) -> Result<Option<R>, sqlx::Error>
    where
        R: for<'r> FromRow<'r, SqliteRow> + Send + Unpin,
    {
        // Not `fetch_optional`: it leaves the statement at its first row and never hears whether the commit that
        // follows succeeded.
        Ok(write.fetch_all(&self.writer).await?.pop())
    }
}

#[cfg(test)]
mod testing {
    use super::*;
    use engine::event::Micros;
    use tempfile::TempDir;

    pub(super) fn name<N: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> N {
        text.parse().unwrap()
    }

    /// A new store in a directory of its own, which goes when the second value is dropped.
    pub(super) async fn store() -> (Store, TempDir) {
        let dir = TempDir::new().unwrap();
        (Store::open(&url(&dir)).await.unwrap(), dir)
    }

    pub(super) fn url(dir: &TempDir) -> String {
        format!("sqlite:{}/new/folder/store.db", dir.path().display())
    }

    pub(super) async fn add_user(store: &Store, id: &str) {
        let user = User {
            id: id.into(),
            email: format!("{id}@example.com"),
            password_hash: "hash".into(),
            admin: false,
            created_at: Micros(1),
        };
        store.create_user(&user).await.unwrap();
    }

    /// A workspace `id` whose owner is the user `id`.
    pub(super) async fn add_workspace(store: &Store, id: &str) -> WorkspaceId {
        add_user(store, id).await;
        let workspace =
            Workspace { id: name(id), name: id.into(), pack: None, tier: "standard".into(), created_at: Micros(1) };
        store.create_workspace(&workspace, id).await.unwrap();
        workspace.id
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;

    #[tokio::test]
    async fn a_meta_value_is_replaced_and_an_unknown_one_is_absent() {
        let (store, _dir) = store().await;
        assert_eq!(store.meta("epoch").await.unwrap(), None);
        store.put_meta("epoch", "1").await.unwrap();
        store.put_meta("epoch", "2").await.unwrap();
        assert_eq!(store.meta("epoch").await.unwrap().as_deref(), Some("2"));
    }

    #[tokio::test]
    async fn a_closed_store_does_not_answer_a_ping() {
        let (store, _dir) = store().await;
        store.ping().await.unwrap();
        store.close().await;
        assert!(store.ping().await.is_err());
    }
}
