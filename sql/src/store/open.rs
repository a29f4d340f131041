//! From `store.url` to a store of the newest schema: which database, where, and the migrations it lacks.

use super::db::{Db, Dialect};
use super::pages::{self, Damage, Form};
use super::webhooks::OutboxBounds;
use super::{Cause, Store, StoreError, cause, postgres};
use serde::{Deserialize, Serialize};
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::pool::PoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Database, SqlSafeStr};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A pool without sqlx's task that looks for idle and old connections: how many there are it reads while they are taken,
/// and between two steps of that there are 2^64 to look at, without an end and without a pause for anybody (0.9.0).
pub(super) fn pool<DB: Database>() -> PoolOptions<DB> {
    PoolOptions::new().idle_timeout(None).max_lifetime(None)
}

/// How the store connects and what it keeps: `store.*` of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Connections to PostgreSQL, at least 1.
    pub max_connections: u32,
    /// How long a statement waits for a connection, or on SQLite for the lock of another process, before the store
    /// counts as busy, in milliseconds. A commit of a hundred thousand rows holds a connection for about a second.
    pub acquire_ms: u64,
    /// How long PostgreSQL may work on one statement, in milliseconds.
    pub statement_ms: u64,
    /// How long a statement of PostgreSQL waits for a lock that another session holds, in milliseconds.
    pub lock_ms: u64,
    /// How long to try to reach a PostgreSQL that is not there yet, in milliseconds.
    pub start_ms: u64,
    /// Event time in one chunk of a hypertable, in hours.
    pub chunk_hours: u32,
    /// Chunks are compressed when they are this old, in days.
    pub compress_after_days: u32,
    /// Chunks are dropped when they are this old, in days; never unless said.
    pub retain_days: Option<u32>,
    /// Deliveries of one webhook that may wait: `webhooks.pending`. Over it the oldest fails.
    pub webhook_pending: usize,
    /// Deliveries of one webhook that are kept once they are done: `webhooks.kept`.
    pub webhook_kept: usize,
    /// A file of SQLite without checksums is written anew, with them: by who has it alone.
    #[serde(skip)]
    pub rewrite: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_connections: 10,
            acquire_ms: 10_000,
            statement_ms: 60_000,
            lock_ms: 5_000,
            start_ms: 30_000,
            chunk_hours: 24 * 7,
            compress_after_days: 7,
            retain_days: None,
            webhook_pending: 1_000,
            webhook_kept: 1_000,
            rewrite: false,
        }
    }
}

impl Options {
    pub(super) fn outbox(&self) -> OutboxBounds {
        OutboxBounds { pending: self.webhook_pending, kept: self.webhook_kept }
    }
}

/// Each reader of SQLite is a thread and a page cache of its own; reads are short, and the work around them is what
/// takes time.
const READERS: u32 = 4;

macro_rules! migrations {
    ($($version:literal $name:literal),* $(,)?) => {
        /// The migrations in this binary, in order: version, name, SQL for each database. Listed one by one, because a
        /// macro over the folders would not see a new file until something else changes.
        const MIGRATIONS: &[(i64, &str, &str, &str)] = &[$((
            $version,
            $name,
            include_str!(concat!("../../../migrations/sqlite/", $name, ".sql")),
            include_str!(concat!("../../../migrations/postgres/", $name, ".sql")),
        )),*];
    };
}
migrations! {
    1 "0001_identity",
    2 "0002_definitions",
    3 "0003_results",
    4 "0004_portfolios",
    5 "0005_agents",
    6 "0006_operations",
    7 "0007_products",
    8 "0008_security",
    9 "0009_tables",
    10 "0010_webhooks",
    11 "0011_webhook_rotation",
    12 "0012_state_parts",
    13 "0013_invitations",
    14 "0014_rule_offsets",
}

/// Which database a store is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Sqlite,
    Postgres,
}

/// The database that `url` names.
pub fn kind(url: &str) -> Result<Kind, StoreError> {
    Ok(match place(url)? {
        Place::Sqlite(_) => Kind::Sqlite,
        Place::Postgres => Kind::Postgres,
    })
}

/// The file that `url` names; an error for PostgreSQL, which has none.
pub fn sqlite_path(url: &str) -> Result<PathBuf, StoreError> {
    match place(url)? {
        Place::Sqlite(path) => Ok(path),
        Place::Postgres => Err(StoreError::Url { problem: "names no file of SQLite".into() }),
    }
}

/// Copies the SQLite store at `url` into the new file `to`: one moment of it, also while another process writes.
pub async fn copy(url: &str, to: &Path) -> Result<(), StoreError> {
    let path = sqlite_path(url)?;
    async {
        // no migrations: the process that has it open may be an older build
        let mut connection = connection(&path, &Options::default())?.connect().await?;
        pages::reserve(&mut connection).await?;
        let copied = sqlx::query("VACUUM INTO $1").bind(to.to_string_lossy()).execute(&mut connection).await;
        copied?;
        connection.close().await?;
        Ok(pages::check(to)?)
    }
    .await
    .map_err(|source| unopened(&path, source))
}

fn unopened(path: &Path, source: sqlx::Error) -> StoreError {
    let is_damage = match &source {
        sqlx::Error::Io(error) => error.get_ref().is_some_and(|error| error.is::<Damage>()),
        // of a file that is none of ours SQLite says that it is no database
        error => matches!(cause(error), Cause::Damaged) && matches!(pages::form(path), Ok(Form::Sealed)),
    };
    match is_damage {
        true => StoreError::Damaged { operation: "open the store", source },
        false => StoreError::Open { path: path.display().to_string(), source },
    }
}

/// An error where the file of SQLite at `path`, which no process has open, has a page that is not as it was written.
pub fn check(path: &Path) -> Result<(), StoreError> {
    pages::check(path).map_err(|source| unopened(path, source.into()))
}

/// What a store URL names.
enum Place {
    Sqlite(PathBuf),
    Postgres,
}

impl Store {
    /// [`Store::open_with`] the default options.
    pub async fn open(url: &str) -> Result<Store, StoreError> {
        Store::open_with(url, &Options::default()).await
    }

    /// Opens the store at `url`, and applies the migrations it lacks.
    ///
    /// `sqlite:PATH` is a file, made with its folder where it does not exist. `postgres://USER:PASSWORD@HOST/DATABASE`
    /// is a database that exists, PostgreSQL 15 or newer; where the extension `timescaledb` is in it, its tables of rows
    /// and alerts are hypertables. Fails with [`StoreError::Newer`] on a database that a newer build has migrated, and
    /// changes nothing in it.
    pub async fn open_with(url: &str, options: &Options) -> Result<Store, StoreError> {
        let path = match place(url)? {
            Place::Sqlite(path) => path,
            Place::Postgres => return postgres::open(url, options).await,
        };
        let writer = open_writer(&path, options).await?;
        let readers = pool()
            .max_connections(READERS)
            .acquire_timeout(Duration::from_millis(options.acquire_ms))
            // Not a read-only file handle, which could not make the shared memory of the write-ahead log.
            .connect_with(connection(&path, options).map_err(|e| unopened(&path, e.into()))?.pragma("query_only", "ON"))
            .await
            .map_err(|source| unopened(&path, source))?;
        let file: Arc<Path> = path.into();
        scan(file.clone());
        let outbox = options.outbox();
        let (db, mode, reached) = (Db::Sqlite { writer, readers, file }, "sqlite".into(), Arc::default());
        Ok(Store { db, mode, rollups: false, outbox, reached })
    }
}

/// Applies the migrations that the store at `url` lacks, and makes a file of SQLite that does not exist: the version it
/// has then. Fails as [`Store::open_with`] does.
pub async fn migrate(url: &str, options: &Options) -> Result<i64, StoreError> {
    match place(url)? {
        Place::Sqlite(path) => open_writer(&path, options).await?.close().await,
        Place::Postgres => _ = postgres::migrate(url, options).await?,
    }
    Ok(newest_migration())
}

/// What `url` names. Messages never repeat a URL of PostgreSQL: it may hold a password.
fn place(url: &str) -> Result<Place, StoreError> {
    let unfit = |problem: &str| StoreError::Url { problem: format!("`{url}` {problem}") };
    let Some(path) = url.strip_prefix("sqlite:") else {
        return match url.split_once(':') {
            Some(("postgres" | "postgresql", _)) => Ok(Place::Postgres),
            Some((scheme, _)) => Err(StoreError::Scheme { scheme: scheme.into() }),
            None => Err(unfit("has no scheme")),
        };
    };
    match path.strip_prefix("//").unwrap_or(path) {
        "" => Err(unfit("names no file")),
        ":memory:" => Err(unfit("names a database in memory, which no restart would survive")),
        path if path.contains('?') => Err(unfit("has parameters, and SQLite's takes none")),
        path => Ok(Place::Sqlite(path.into())),
    }
}

/// Reads the whole file once, so that damage is known before somebody asks for what stands there. A thread of its own: the
/// process does not wait for it when it ends.
fn scan(file: Arc<Path>) {
    let scanned = std::thread::Builder::new().name("scan".into()).spawn(move || {
        if let Err(error) = pages::scan(&file) {
            tracing::warn!(file = %file.display(), %error, "cannot look for damage in the store");
        }
    });
    if let Err(error) = scanned {
        tracing::warn!(%error, "cannot look for damage in the store");
    }
}

fn connection(path: &Path, options: &Options) -> io::Result<SqliteConnectOptions> {
    Ok(file(path, options)?
        .journal_mode(SqliteJournalMode::Wal)
        // An offset is promised to be durable once it is committed; NORMAL may lose commits when power fails.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        // A large commit grows the write-ahead log; give the space back after it.
        .pragma("journal_size_limit", "67108864"))
}

fn file(path: &Path, options: &Options) -> io::Result<SqliteConnectOptions> {
    let patience = Duration::from_millis(options.acquire_ms);
    Ok(SqliteConnectOptions::new().vfs(pages::vfs()?).filename(path).busy_timeout(patience))
}

/// Sees to it that the pages of the file at `path` have checksums.
async fn seal(path: &Path, options: &Options) -> Result<(), sqlx::Error> {
    let form = pages::form(path)?;
    // not beside a process that writes to it: an older build would write pages without checksums
    if !(form == Form::New || form == Form::Plain && options.rewrite) {
        return Ok(());
    }
    // Anew it is written through the write-ahead log, from where its first page goes to the file first: without one, the
    // first that is known of its new form would be its last.
    let open = if form == Form::Plain { connection(path, options)? } else { file(path, options)? };
    let mut connection = open.create_if_missing(true).connect().await?;
    pages::reserve(&mut connection).await?;
    if form == Form::Plain {
        tracing::info!(file = %path.display(), "writing the store anew, with a checksum for each page");
        if let Err(error) = sqlx::query("VACUUM").execute(&mut connection).await {
            tracing::warn!(%error, "the store stays without checksums until the next start");
            return connection.close().await;
        }
    }
    sqlx::query(AssertSqlSafe(format!("PRAGMA application_id = {}", pages::APPLICATION)))
        .execute(&mut connection)
        .await?;
    connection.close().await
}

/// The one connection that writes, on a database of the newest schema.
async fn open_writer(path: &Path, options: &Options) -> Result<SqlitePool, StoreError> {
    let connection = async {
        if let Some(folder) = path.parent() {
            tokio::fs::create_dir_all(folder).await?;
        }
        pages::check_wal(path)?;
        seal(path, options).await?;
        // 32 MiB of cache: bulk inserts touch pages all over a table and would otherwise write them out one by one.
        Ok(connection(path, options)?.pragma("cache_size", "-32768"))
    };
    let connection = connection.await.map_err(|source| unopened(path, source))?;
    let writer = pool::<sqlx::Sqlite>()
        .max_connections(1)
        .acquire_timeout(Duration::from_millis(options.acquire_ms))
        .before_acquire(|connection, _| {
            // SQLite ends a transaction by itself when the disk is full, which sqlx counts as still open
            let is_open = connection.is_in_transaction();
            Box::pin(async move { Ok(!is_open) })
        })
        .connect_with(connection)
        .await
        .map_err(|source| unopened(path, source))?;
    let migrated = async {
        let mut connection = writer.acquire().await?;
        // a page that a loss of power left half written is whole in the write-ahead log
        sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").execute(&mut *connection).await?;
        // not `run`, whose bounds no spawned task can prove
        migrator(Dialect::Sqlite).run_direct(None, &mut *connection, false).await
    };
    migrated.await.map_err(|source| unmigrated(path.display().to_string(), source))?;
    Ok(writer)
}

/// The migrations of one database.
pub(super) fn migrator(dialect: Dialect) -> Migrator {
    let migrations = MIGRATIONS.iter().map(|&(version, name, sqlite, postgres)| {
        let sql = match dialect {
            Dialect::Sqlite => sqlite,
            Dialect::Postgres => postgres,
        };
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    });
    Migrator::with_migrations(migrations.collect())
}

pub(super) fn unmigrated(path: String, source: MigrateError) -> StoreError {
    match source {
        MigrateError::VersionMissing(found) => StoreError::Newer { path, found, known: newest_migration() },
        source => StoreError::Migrate { path, source },
    }
}

fn newest_migration() -> i64 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::db::{Scope, query};
    use super::super::suite;
    use super::super::testing::*;
    use super::*;

    async fn error(url: &str) -> StoreError {
        match Store::open_with(url, &suite::options()).await {
            Ok(_) => panic!("{url} was opened"),
            Err(e) => e,
        }
    }

    #[tokio::test]
    async fn another_scheme_is_refused_with_the_supported_ones_and_without_its_password() {
        let message = error("mysql://me:secret@host/db").await.to_string();
        assert!(message.contains("`mysql` is not supported") && message.contains("sqlite:PATH"), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }

    #[tokio::test]
    async fn a_url_that_names_no_file_is_refused() {
        for url in ["sqlite:", "sqlite://", "sqlite::memory:", "sqlite:a.db?mode=ro", "a.db"] {
            assert!(matches!(error(url).await, StoreError::Url { .. }), "{url}");
        }
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_refused_and_left_as_it_was() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("notes.txt");
        let text = "not a database. ".repeat(100);
        std::fs::write(&path, &text).unwrap();
        assert!(matches!(error(&format!("sqlite:{}", path.display())).await, StoreError::Open { .. }));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[tokio::test]
    async fn an_existing_store_opens_again_with_what_it_held() {
        let (store, dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.close().await;
        let store = Store::open_with(&url(&dir), &suite::options()).await.unwrap();
        assert_eq!(store.workspace(&acme).await.unwrap().unwrap().name, "acme");
    }

    #[tokio::test]
    async fn migrating_twice_changes_nothing_more() {
        let dir = tempfile::TempDir::new().unwrap();
        suite::prepare(&dir).await;
        assert_eq!(migrate(&url(&dir), &suite::options()).await.unwrap(), newest_migration());
        assert_eq!(migrate(&url(&dir), &suite::options()).await.unwrap(), newest_migration());
        Store::open_with(&url(&dir), &suite::options()).await.unwrap();
    }

    #[tokio::test]
    async fn a_store_of_a_newer_build_is_refused_with_both_versions() {
        let (store, dir) = store().await;
        query(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             SELECT 999, 'later', TRUE, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
        )
        .execute(store.write(Scope::Installation))
        .await
        .unwrap();
        store.close().await;
        let error = error(&url(&dir)).await;
        assert!(matches!(error, StoreError::Newer { found: 999, known, .. } if known == newest_migration()));
        assert!(error.to_string().contains("use a newer tidewatch"), "{error}");
    }

    #[test]
    fn every_migration_file_is_in_the_binary() {
        for database in ["sqlite", "postgres"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations").join(database);
            let mut files: Vec<_> = std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
                .collect();
            files.sort();
            assert_eq!(files, MIGRATIONS.iter().map(|(_, name, ..)| *name).collect::<Vec<_>>(), "{database}");
        }
    }

    #[tokio::test]
    async fn a_commit_is_on_disk_when_it_returns() {
        let (store, _dir) = store().await;
        let Db::Sqlite { writer, .. } = &store.db else { return }; // PostgreSQL's own default is durable
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(writer).await.unwrap();
        assert_eq!(mode, "wal");
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(writer).await.unwrap();
        assert_eq!(synchronous, 2, "2 is FULL");
    }
}
