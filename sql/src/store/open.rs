//! URLs, connections, migrations: from `store.url` to a store of the newest schema.

use super::{Store, StoreError};
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Acquire, SqlSafeStr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Each reader is a thread and a page cache of its own; reads are short, and the work around them is what takes time.
const READERS: u32 = 4;
/// How long a statement waits for a connection, or for the lock of another process, before the store counts as busy.
/// A commit of a hundred thousand rows holds the writer for about a second.
const PATIENCE: Duration = Duration::from_secs(10);

macro_rules! migrations {
    ($($version:literal $name:literal),* $(,)?) => {
        /// The migrations in this binary, in order: version, name, SQL. Listed one by one, because a macro over the
        /// folder would not see a new file until something else changes.
        const MIGRATIONS: &[(i64, &str, &str)] =
            &[$(($version, $name, include_str!(concat!("../../../migrations/sqlite/", $name, ".sql")))),*];
    };
}
migrations! {
    1 "0001_identity",
    2 "0002_definitions",
    3 "0003_results",
    4 "0004_portfolios",
    5 "0005_agents",
    6 "0006_operations",
    7 "0007_security",
}

impl Store {
    /// Opens the store at `url`, `sqlite:PATH`: makes the file and its folder where they do not exist, and applies the
    /// migrations it lacks. Fails with [`StoreError::Newer`] on a file that a newer build has migrated, and changes
    /// nothing in it.
    pub async fn open(url: &str) -> Result<Store, StoreError> {
        let path = path_of(url)?;
        let writer = open_writer(&path).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(PATIENCE)
            // Not a read-only file handle, which could not make the shared memory of the write-ahead log.
            .connect_with(connection(&path).pragma("query_only", "ON"))
            .await
            .map_err(|source| StoreError::Open { path: path.display().to_string(), source })?;
        Ok(Store { writer, readers })
    }
}

/// Applies the migrations that the store at `url` lacks, making it where it does not exist: the version it has then.
/// Fails as [`Store::open`] does.
pub async fn migrate(url: &str) -> Result<i64, StoreError> {
    open_writer(&path_of(url)?).await?.close().await;
    Ok(newest_migration())
}

/// The file that `url` names. Messages never repeat a URL of another scheme: it may hold a password.
fn path_of(url: &str) -> Result<PathBuf, StoreError> {
    let unfit = |problem| StoreError::Url { url: url.into(), problem };
    let Some(path) = url.strip_prefix("sqlite:") else {
        return match url.split_once(':') {
            Some((scheme, _)) => Err(StoreError::Scheme { scheme: scheme.into() }),
            None => Err(unfit("has no scheme")),
        };
    };
    match path.strip_prefix("//").unwrap_or(path) {
        "" => Err(unfit("names no file")),
        ":memory:" => Err(unfit("names a database in memory, which no restart would survive")),
        path if path.contains('?') => Err(unfit("has parameters, and the store takes none")),
        path => Ok(path.into()),
    }
}

fn connection(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        // An offset is promised to be durable once it is committed; NORMAL may lose commits when power fails.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(PATIENCE)
        // A large commit grows the write-ahead log; give the space back after it.
        .pragma("journal_size_limit", "67108864")
}

/// The one connection that writes, on a database of the newest schema.
async fn open_writer(path: &Path) -> Result<SqlitePool, StoreError> {
    let unopened = |source| StoreError::Open { path: path.display().to_string(), source };
    if let Some(folder) = path.parent() {
        tokio::fs::create_dir_all(folder).await.map_err(|e| unopened(e.into()))?;
    }
    // 32 MiB of cache: bulk inserts touch pages all over a table and would otherwise write them out one by one.
    let options = connection(path).create_if_missing(true).pragma("cache_size", "-32768");
    let writer = SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(PATIENCE)
        .connect_with(options)
        .await
        .map_err(unopened)?;
    apply_migrations(&writer).await.map_err(|source| match source {
        MigrateError::VersionMissing(found) => {
            StoreError::Newer { path: path.display().to_string(), found, known: newest_migration() }
        }
        source => StoreError::Migrate { path: path.display().to_string(), source },
    })?;
    Ok(writer)
}

async fn apply_migrations(writer: &SqlitePool) -> Result<(), MigrateError> {
    let migrations = MIGRATIONS.iter().map(|&(version, name, sql)| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    });
    let mut connection = writer.acquire().await?;
    Migrator::with_migrations(migrations.collect()).run(connection.acquire().await?).await
}

fn newest_migration() -> i64 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    async fn error(url: &str) -> StoreError {
        match Store::open(url).await {
            Ok(_) => panic!("{url} was opened"),
            Err(e) => e,
        }
    }

    #[tokio::test]
    async fn another_scheme_is_refused_with_the_supported_ones_and_without_its_password() {
        let message = error("postgres://me:secret@host/db").await.to_string();
        assert!(message.contains("`postgres` is not supported") && message.contains("sqlite:PATH"), "{message}");
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
        let store = Store::open(&url(&dir)).await.unwrap();
        assert_eq!(store.workspace(&acme).await.unwrap().unwrap().name, "acme");
    }

    #[tokio::test]
    async fn migrating_twice_changes_nothing_more() {
        let dir = tempfile::TempDir::new().unwrap();
        assert_eq!(migrate(&url(&dir)).await.unwrap(), newest_migration());
        assert_eq!(migrate(&url(&dir)).await.unwrap(), newest_migration());
        Store::open(&url(&dir)).await.unwrap();
    }

    #[tokio::test]
    async fn a_store_of_a_newer_build_is_refused_with_both_versions() {
        let (store, dir) = store().await;
        sqlx::query("INSERT INTO _sqlx_migrations VALUES (999, 'later', CURRENT_TIMESTAMP, TRUE, x'00', 0)")
            .execute(&store.writer)
            .await
            .unwrap();
        store.close().await;
        let error = error(&url(&dir)).await;
        assert!(matches!(error, StoreError::Newer { found: 999, known, .. } if known == newest_migration()));
        assert!(error.to_string().contains("use a newer tidewatch"), "{error}");
    }

    #[test]
    fn every_migration_file_is_in_the_binary() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/sqlite");
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        files.sort();
        assert_eq!(files, MIGRATIONS.iter().map(|(_, name, _)| *name).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_commit_is_on_disk_when_it_returns() {
        let (store, _dir) = store().await;
        let pragma = |name: &'static str| sqlx::query_scalar::<_, String>(name).fetch_one(&store.writer);
        assert_eq!(pragma("PRAGMA journal_mode").await.unwrap(), "wal");
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&store.writer).await.unwrap();
        assert_eq!(synchronous, 2, "2 is FULL");
    }
}
