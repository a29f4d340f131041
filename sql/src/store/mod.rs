//! What outlives the process: who may do what, what was defined, what was computed and up to which log offset.
//! Knows SQL and nothing of HTTP, tokens or actors; the caller brings ids and the time.
//!
//! The statements are written once for SQLite and PostgreSQL (`$1` placeholders, ON CONFLICT, RETURNING); `db.rs` runs
//! them on either. What only one of them does stands in `open.rs`, `postgres.rs`, in `rows.rs` (a look into a JSON key)
//! and in `migrations/`.

mod db; // SQLite and PostgreSQL behind one face; whose rows a statement may touch

mod bulk; // many rows in one statement
mod open; // URLs, connections, migrations
mod page; // cursors, so that a list is read in pages
mod pages; // checksums in SQLite's file
mod postgres; // connections, migrations and TimescaleDB of a PostgreSQL server
mod record; // from a database row to a record

mod alerts; // firings and acknowledgement
mod audit; // who did what
mod checkpoints; // state, results and log offset in one transaction
mod dead_letters; // events that could not be used
mod definitions; // streams, metrics, alert rules and silences
mod factors; // second factors, and identities of other issuers
mod grants; // what members may do beyond their role
mod invitations; // who is asked to become a member
mod keys; // API keys
mod portfolios; // portfolios and positions
mod rows; // final rows of metrics
mod samples; // history at a coarser step
mod state; // the parts of a checkpoint's state
mod threads; // conversations with agents, and their runs
mod users; // users and the refresh tokens of their sign-ins
mod webhooks; // webhooks, and what is on its way to them
mod workspaces; // workspaces and their members

#[cfg(test)]
mod suite; // this folder's tests again, on PostgreSQL and TimescaleDB

pub use alerts::Alert;
pub use audit::{AuditCheck, AuditEntry};
pub use checkpoints::{Checkpoint, Commit};
pub use dead_letters::DeadLetter;
pub use definitions::{AlertRule, MetricRow, RuleChange, Silence, StreamRow, TableRow};
pub use factors::Totp;
pub use grants::Grant;
pub use invitations::Invitation;
pub use keys::ApiKey;
pub use open::{Kind, Options, check, copy, kind, migrate, sqlite_path};
pub use portfolios::{Portfolio, Position};
pub use rows::{FinalRow, Place, RowQuery, WITHDRAWN, cut_rows};
pub use samples::Step;
pub use threads::{Message, Run, Thread};
pub use users::{RefreshToken, Spent, User};
pub use webhooks::{Attempt, Delivery, Due, Notice, Webhook};
pub use workspaces::{Member, Workspace};

use db::{Db, On, Scope, query, query_scalar};
use engine::event::WorkspaceId;
use libsqlite3_sys::{
    SQLITE_BUSY, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_IOERR, SQLITE_IOERR_DATA, SQLITE_LOCKED, SQLITE_NOTADB,
};

/// The store. A clone is another handle to the same connections.
///
/// Every function that takes a workspace sees and changes that workspace only: what belongs to another is as absent
/// as what does not exist. An offset or a number of events above `i64::MAX` is taken as `i64::MAX`, since the database
/// has no greater integer.
#[derive(Clone)]
pub struct Store {
    db: Db,
    mode: std::sync::Arc<str>,
    /// TimescaleDB keeps hours and days of final rows.
    rollups: bool,
    outbox: webhooks::OutboxBounds,
    reached: std::sync::Arc<checkpoints::Reached>,
}

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("store url scheme `{scheme}` is not supported; use `sqlite:PATH` or `postgres://USER@HOST/DATABASE`")]
    Scheme { scheme: String },
    /// The URL is not repeated: it may hold a password.
    #[error("store url {problem}; use `sqlite:data/tidewatch.db` or `postgres://USER:PASSWORD@HOST:5432/DATABASE`")]
    Url { problem: String },
    #[error("cannot open store `{path}`: {source}; check that the path is writable and holds a Tidewatch database")]
    Open { path: String, source: sqlx::Error },
    #[error("cannot reach store `{server}`: {source}; check that PostgreSQL runs there and lets this user in")]
    Connect { server: String, source: sqlx::Error },
    #[error("store `{server}` is PostgreSQL {found}; use 15 or newer")]
    TooOld { server: String, found: String },
    #[error("cannot apply migrations to store `{path}`: {source}")]
    Migrate { path: String, source: sqlx::migrate::MigrateError },
    #[error("cannot make hypertables in store `{server}`: {source}; check that this user owns its tables")]
    Hypertables { server: String, source: sqlx::Error },
    /// The database was last opened by a newer build, whose tables this one does not know.
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
    /// The database is not as far as it was: an older copy took its place, such as a replica that lagged.
    #[error(
        "cannot commit workspace `{workspace}`: the store has commit {found} of it, and had {known}: an older copy of the \
         database took its place; load that checkpoint"
    )]
    Older { workspace: WorkspaceId, known: i64, found: i64 },
    #[error("cursor `{cursor}` is none that this list gave; start without one")]
    Cursor { cursor: String },
    #[error("cannot {operation}: the store is busy; try again")]
    Busy { operation: &'static str },
    /// The database cannot be reached, is starting or is shutting down, or its disk is full or fails. What was asked may
    /// have been done.
    #[error("cannot {operation}: the store cannot be reached or written ({source}); try again")]
    Unreachable { operation: &'static str, source: sqlx::Error },
    /// What was written is not what stands there: in SQLite's file, or as PostgreSQL says of its own.
    #[error("cannot {operation}: the store is damaged ({source}); restore a backup")]
    Damaged { operation: &'static str, source: sqlx::Error },
    #[error("cannot {operation}: {source}")]
    Database { operation: &'static str, source: sqlx::Error },
}

impl StoreError {
    /// Whether the same may come through later, with nothing done but waiting: the database cannot be reached now.
    pub fn is_away(&self) -> bool {
        use sqlx::migrate::MigrateError;
        match self {
            StoreError::Busy { .. } | StoreError::Unreachable { .. } => true,
            StoreError::Connect { source, .. }
            | StoreError::Hypertables { source, .. }
            | StoreError::Migrate {
                source: MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _),
                ..
            } => matches!(cause(source), Cause::Busy | Cause::Unreachable),
            _ => false,
        }
    }
}

/// What an error of the database asks of the caller.
enum Cause {
    Busy,
    Unreachable,
    /// As one that cannot be reached once the store is open; a start on it is a mistake.
    Refused,
    Damaged,
    Other,
}

/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>: read_only_sql_transaction.
const READ_ONLY: &str = "25006";

fn cause(error: &sqlx::Error) -> Cause {
    let error = match error {
        sqlx::Error::PoolTimedOut => return Cause::Busy,
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolClosed => return Cause::Unreachable,
        // a server that ends in the middle of a message, such as a handshake: seen by the kill test
        sqlx::Error::Protocol(_) => return Cause::Unreachable,
        sqlx::Error::Database(error) => error,
        _ => return Cause::Other,
    };
    let Some(code) = error.code() else { return Cause::Other };
    if error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>().is_some() {
        // https://www.postgresql.org/docs/current/errcodes-appendix.html
        return match code.as_ref() {
            // serialization failure, deadlock, lock not available, statement cancelled by its time limit, disk full,
            // out of memory, too many connections
            "40001" | "40P01" | "55P03" | "57014" | "53100" | "53200" | "53300" => Cause::Busy,
            // connection exceptions, administrator's shutdown, crash, starting up, session time limits
            "57P01" | "57P02" | "57P03" | "25P03" | "57P05" => Cause::Unreachable,
            code if code.starts_with("08") => Cause::Unreachable,
            // a database that is gone, renamed or closed, a user that is not let in or no longer allowed, tables that are
            // not there, only for reading: what an operator does and undoes, while everything waits in the log
            "3D000" | "55000" | "42501" | "42P01" | READ_ONLY => Cause::Refused,
            code if code.starts_with("28") => Cause::Refused,
            // data or index corrupted
            "XX001" | "XX002" => Cause::Damaged,
            _ => Cause::Other,
        };
    }
    let Ok(code) = code.parse::<i32>() else { return Cause::Other };
    // the low byte of an extended code is its primary code
    match code & 0xff {
        _ if code == SQLITE_IOERR_DATA => Cause::Damaged,
        SQLITE_CORRUPT | SQLITE_NOTADB => Cause::Damaged,
        SQLITE_BUSY | SQLITE_LOCKED => Cause::Busy,
        SQLITE_IOERR | SQLITE_FULL => Cause::Unreachable,
        _ => Cause::Other,
    }
}

/// Turns what the database says about `operation` into what the caller can act on.
fn failed(operation: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| match &source {
        sqlx::Error::Database(e) if e.is_unique_violation() => StoreError::Exists { operation },
        sqlx::Error::Database(e) if e.is_foreign_key_violation() => StoreError::Missing { operation },
        _ => match cause(&source) {
            Cause::Busy => StoreError::Busy { operation },
            Cause::Unreachable | Cause::Refused => StoreError::Unreachable { operation, source },
            Cause::Damaged => StoreError::Damaged { operation, source },
            Cause::Other => StoreError::Database { operation, source },
        },
    }
}

/// An unsigned number as the database keeps it.
fn stored(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Store {
    /// Ready to answer: one read.
    pub async fn ping(&self) -> Result<(), StoreError> {
        query("SELECT value FROM meta LIMIT 1")
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("reach the store"))?;
        Ok(())
    }

    /// What of the file was found not to be as it was written, for people.
    pub fn damage(&self) -> Option<String> {
        let Db::Sqlite { file, .. } = &self.db else { return None };
        let found = pages::found(file);
        let first = found.first()?;
        Some(match found.len() {
            1 => format!("{first}; restore a backup"),
            n => format!("{first}, nor are {} other pages; restore a backup", n - 1),
        })
    }

    /// Which database it is, for people: `sqlite`, `postgresql 17.2`, `timescaledb 2.23.0 on postgresql 17.2`.
    pub fn mode(&self) -> &str {
        &self.mode
    }

    /// How many commits of different workspaces it pays to write at a time. SQLite writes one after the other; PostgreSQL
    /// writes with a core for each, and most connections are left to those who read.
    pub fn writers(&self) -> usize {
        match &self.db {
            Db::Sqlite { .. } => 1,
            Db::Postgres(server) => (server.connections_max() as usize / 3).clamp(1, 4),
        }
    }

    /// Waits for running statements and closes all connections; with SQLite this also folds the write-ahead log into
    /// the file. Later calls fail.
    pub async fn close(&self) {
        self.db.close().await;
    }

    fn read<'t>(&'t self, scope: impl Into<Scope<'t>>) -> On<'t> {
        On::Read(&self.db, scope.into())
    }

    fn write<'t>(&'t self, scope: impl Into<Scope<'t>>) -> On<'t> {
        On::Write(&self.db, scope.into())
    }

    /// Keeps a small value of the whole process under `key`, in place of the one before.
    pub async fn put_meta(&self, key: &str, value: &str) -> Result<(), StoreError> {
        query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value")
            .bind(key)
            .bind(value)
            .execute(self.write(Scope::Installation))
            .await
            .map_err(failed("put meta value"))?;
        Ok(())
    }

    /// Keeps a small value unless there is one: the one that there is now.
    pub async fn claim_meta(&self, key: &str, value: &str) -> Result<String, StoreError> {
        if let Some(known) = self.meta(key).await? {
            return Ok(known);
        }
        query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING")
            .bind(key)
            .bind(value)
            .execute(self.write(Scope::Installation))
            .await
            .map_err(failed("claim meta value"))?;
        Ok(self.meta(key).await?.unwrap_or_default())
    }

    /// Keeps many small values at once.
    pub async fn put_metas(&self, values: &[(String, String)]) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            bulk::insert(
                &mut tx,
                ["INSERT INTO meta (key, value) ", " ON CONFLICT (key) DO UPDATE SET value = excluded.value"],
                values,
                |(key, _)| key,
                |row, (key, value)| {
                    row.push_bind(key.as_str());
                    row.push_bind(value.as_str());
                },
            )
            .await?;
            tx.commit().await
        }
        .await
        .map_err(failed("put meta values"))
    }

    /// All values whose key begins with `prefix`: what follows it there, and the value.
    pub async fn metas(&self, prefix: &str) -> Result<Vec<(String, String)>, StoreError> {
        async {
            let rows = query("SELECT key, value FROM meta WHERE substr(key, 1, CAST($1 AS INTEGER)) = $2 ORDER BY key")
                .bind(stored(prefix.chars().count() as u64))
                .bind(prefix)
                .fetch_all(self.read(Scope::Installation))
                .await?;
            let rest = |row: &db::Row| -> Result<(String, String), sqlx::Error> {
                let key: String = row.try_get("key")?;
                Ok((key[prefix.len()..].to_owned(), row.try_get("value")?))
            };
            rows.iter().map(rest).collect::<Result<Vec<_>, sqlx::Error>>()
        }
        .await
        .map_err(failed("read meta values"))
    }

    /// The value under `key`, if one was put.
    pub async fn meta(&self, key: &str) -> Result<Option<String>, StoreError> {
        query_scalar("SELECT value FROM meta WHERE key = $1")
            .bind(key)
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read meta value"))
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

    /// A new store of its own, which goes when the second value is dropped: SQLite, or what [`suite`] names.
    pub(super) async fn store() -> (Store, TempDir) {
        let dir = TempDir::new().unwrap();
        suite::prepare(&dir).await;
        (Store::open_with(&url(&dir), &suite::options()).await.unwrap(), dir)
    }

    pub(super) fn url(dir: &TempDir) -> String {
        suite::url(dir).unwrap_or_else(|| format!("sqlite:{}/new/folder/store.db", dir.path().display()))
    }

    impl Store {
        /// What TimescaleDB's background workers would do.
        pub(super) async fn roll_up(&self) {
            if !self.rollups {
                return;
            }
            let job: i64 = query_scalar(
                "SELECT job_id::bigint FROM timescaledb_information.jobs WHERE proc_name = 'refresh_samples'",
            )
            .fetch_one(self.read(Scope::Installation))
            .await
            .unwrap();
            self.run_sql(&format!("CALL run_job({job})")).await;
        }

        /// SQL of PostgreSQL alone.
        pub(super) async fn run_sql(&self, sql: &str) {
            let Db::Postgres(server) = &self.db else { panic!("this is {}", self.mode) };
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(server.pool()).await.unwrap();
        }
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
        let values = [("rest/a", "3"), ("rest/b", "4")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        store.put_metas(&values).await.unwrap();
        store.put_metas(&values).await.unwrap();
        let expected = [("a", "3"), ("b", "4")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(store.metas("rest/").await.unwrap(), expected);
    }

    #[tokio::test]
    async fn a_closed_store_does_not_answer_a_ping() {
        let (store, _dir) = store().await;
        store.ping().await.unwrap();
        store.close().await;
        assert!(store.ping().await.is_err());
    }
}
