//! Connections, migrations and TimescaleDB of a PostgreSQL server.

use super::db::{Db, Dialect, Renewed, Server};
use super::open::{migrator, pool as new_pool, unmigrated};
use super::{Cause, Options, Store, StoreError, cause};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, raw_sql};
use std::io;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// A connection is used for so long, so that one whose server moved is not used for ever.
const CONNECTION_LIFE: Duration = Duration::from_secs(30 * 60);

/// Held while tables are made or changed: of many nodes that start at once one does it and the others wait.
const ADVISORY_LOCK: i64 = i64::from_be_bytes(*b"tidewtch");

/// PostgreSQL 15, the oldest that is tested.
const OLDEST: u32 = 150_000;

const TIMESCALE: &str = "timescaledb";

/// Made and kept up by `migrations/timescale`.
const HYPERTABLES: &str = include_str!("../../../migrations/timescale/hypertables.sql");

/// See [`Store::open_with`].
pub(super) async fn open(url: &str, options: &Options) -> Result<Store, StoreError> {
    let mode = migrate(url, options).await?;
    let (connect, server) = connection(url)?;
    let renewed = Renewed::default();
    let pool = new_pool()
        .max_connections(options.max_connections.max(1))
        .acquire_timeout(Duration::from_millis(options.acquire_ms))
        .before_acquire({
            let renewed = renewed.clone();
            move |_, known| {
                let is_fresh = renewed.is_fresh(known.age) && known.age < CONNECTION_LIFE;
                Box::pin(async move { Ok(is_fresh) })
            }
        })
        .connect_with(connect.options([
            ("statement_timeout", options.statement_ms.to_string()),
            ("lock_timeout", options.lock_ms.to_string()),
        ]))
        .await
        .map_err(|source| StoreError::Connect { server, source })?;
    Ok(Store {
        db: Db::Postgres(Server::new(pool, renewed)),
        rollups: mode.starts_with(TIMESCALE),
        mode: mode.into(),
        outbox: options.outbox(),
        reached: Default::default(),
    })
}

/// Brings the database to the newest schema: what it is, for people. Waits for a server that is starting.
pub(super) async fn migrate(url: &str, options: &Options) -> Result<String, StoreError> {
    let (connect, server) = connection(url)?;
    let patience = Duration::from_millis(options.start_ms);
    let answer = Duration::from_millis(options.acquire_ms);
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {answer:?}")).into();
    let began = Instant::now();
    let mut said = false;
    let mut connection = loop {
        match tokio::time::timeout(answer, connect.connect()).await.unwrap_or_else(|late| Err(silent(late))) {
            Ok(connection) => break connection,
            Err(error) if matches!(cause(&error), Cause::Unreachable | Cause::Busy) && began.elapsed() < patience => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(%server, %error, "store cannot be reached yet; trying for store.start_ms = {}", options.start_ms);
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            Err(source) => return Err(StoreError::Connect { server, source }),
        }
    };
    let mode = match forget_statements(&mut connection).await {
        Ok(()) => prepare(&mut connection, &server, options).await,
        Err(source) => Err(StoreError::Connect { server, source }),
    };
    _ = forget_statements(&mut connection).await;
    // The lock goes with the connection, whatever happened.
    _ = connection.close().await;
    mode
}

/// Behind a pooler a session had other users and will have more: their prepared statements are named as ours are.
async fn forget_statements(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    raw_sql("DEALLOCATE ALL").execute(connection).await.map(|_| ())
}

async fn prepare(connection: &mut PgConnection, server: &str, options: &Options) -> Result<String, StoreError> {
    let unreached = |source| StoreError::Connect { server: server.to_owned(), source };
    let number: String = scalar(connection, "SHOW server_version_num").await.map_err(unreached)?;
    let version: String = scalar(connection, "SHOW server_version").await.map_err(unreached)?;
    let version = version.split(' ').next().unwrap_or_default().to_owned();
    if number.parse::<u32>().is_ok_and(|number| number < OLDEST) {
        return Err(StoreError::TooOld { server: server.to_owned(), found: version });
    }
    sqlx::query("SELECT pg_advisory_lock($1)")
        .bind(ADVISORY_LOCK)
        .execute(&mut *connection)
        .await
        .map_err(unreached)?;
    let mut migrator = migrator(Dialect::Postgres);
    migrator.set_locking(false); // the lock that is held covers the hypertables too
    migrator.run_direct(None, &mut *connection, false).await.map_err(|source| unmigrated(server.to_owned(), source))?;
    let superuser: bool =
        scalar(connection, "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user")
            .await
            .map_err(unreached)?;
    if superuser {
        tracing::warn!(%server, "this user of the store passes through row-level security; use a role without SUPERUSER and BYPASSRLS");
    }
    let extension: Option<String> =
        sqlx::query_scalar("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")
            .fetch_optional(&mut *connection)
            .await
            .map_err(unreached)?;
    let mode = match extension {
        None => format!("postgresql {version}"),
        Some(extension) => {
            make_hypertables(connection, options)
                .await
                .map_err(|source| StoreError::Hypertables { server: server.to_owned(), source })?;
            format!("{TIMESCALE} {extension} on postgresql {version}")
        }
    };
    sqlx::query("SELECT pg_advisory_unlock($1)")
        .bind(ADVISORY_LOCK)
        .execute(&mut *connection)
        .await
        .map_err(unreached)?;
    Ok(mode)
}

async fn make_hypertables(connection: &mut PgConnection, options: &Options) -> Result<(), sqlx::Error> {
    let days = |days: u32| format!("{days} days");
    let settings = [
        ("app.chunk", format!("{} hours", options.chunk_hours.max(1))),
        ("app.compress_after", days(options.compress_after_days)),
        ("app.retain", options.retain_days.map(days).unwrap_or_default()),
    ];
    for (name, value) in settings {
        sqlx::query("SELECT set_config($1, $2, false)").bind(name).bind(value).execute(&mut *connection).await?;
    }
    raw_sql(HYPERTABLES).execute(&mut *connection).await?;
    Ok(())
}

async fn scalar<T>(connection: &mut PgConnection, sql: &'static str) -> Result<T, sqlx::Error>
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
{
    sqlx::query_scalar(sql).fetch_one(connection).await
}

/// How to connect, and the server's name for messages: without the password.
fn connection(url: &str) -> Result<(PgConnectOptions, String), StoreError> {
    let connect = PgConnectOptions::from_str(url)
        .map_err(|error| StoreError::Url { problem: format!("cannot be read ({error})") })?
        .application_name("tidewatch")
        .options([("standard_conforming_strings", "on")]);
    let server = format!(
        "postgres://{}@{}:{}/{}",
        connect.get_username(),
        connect.get_host(),
        connect.get_port(),
        connect.get_database().unwrap_or(connect.get_username())
    );
    Ok((connect, server))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_server_and_no_password() {
        let (_, server) = connection("postgres://me:secret@db.example:5433/tides").unwrap();
        assert_eq!(server, "postgres://me@db.example:5433/tides");
        let error = connection("postgres://me:secret@db:port/tides").unwrap_err().to_string();
        assert!(error.contains("store url cannot be read") && !error.contains("secret"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_after_the_wait_that_was_asked_for() {
        let options = Options { start_ms: 300, ..Options::default() };
        let began = Instant::now();
        let error = migrate("postgres://me:secret@127.0.0.1:1/tides", &options).await.unwrap_err();
        assert!(began.elapsed() >= Duration::from_millis(300));
        let message = error.to_string();
        assert!(message.contains("cannot reach store `postgres://me@127.0.0.1:1/tides`"), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }
}
