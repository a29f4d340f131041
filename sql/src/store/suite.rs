//! The tests of this folder are written against any store. They run on SQLite by themselves; each test here runs them
//! all once more, in a process of its own, on a server that it starts: PostgreSQL from the machine's packages, and a
//! real TimescaleDB (WebAssembly) from `../shared/timescale`.

use super::Options;
use super::testing::{store, url as url_of};
use std::process::Command;
use tempfile::TempDir;

#[path = "../../../tests/support/database.rs"]
mod database;
use database::Database;

/// Where the tests of a second run find their server.
const SERVER: &str = "TIDEWATCH_TEST_STORE";

/// The server's URL without a database, and whether each test gets a database of its own. TimescaleDB in WebAssembly
/// has one database and one connection: its tests come one after the other and wipe it first.
fn server() -> Option<(String, bool)> {
    let url = std::env::var(SERVER).ok()?;
    Some(match url.strip_prefix("one:") {
        Some(url) => (url.to_owned(), false),
        None => (url, true),
    })
}

fn name_of(dir: &TempDir) -> String {
    let name = dir.path().file_name().unwrap().to_str().unwrap();
    format!("t{}", name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase())
}

/// URL of the store that belongs to `dir`; `None`: SQLite.
pub(super) fn url(dir: &TempDir) -> Option<String> {
    let (server, own_database) = server()?;
    Some(if own_database { format!("{server}/{}", name_of(dir)) } else { server })
}

/// The options that fit the server.
pub(super) fn options() -> Options {
    match server() {
        Some((_, false)) => Options { max_connections: 1, acquire_ms: 60_000, ..Options::default() },
        Some((_, true)) => Options { max_connections: 3, acquire_ms: 60_000, ..Options::default() },
        None => Options { acquire_ms: 60_000, ..Options::default() },
    }
}

/// An empty database for the store of `dir`.
pub(super) async fn prepare(dir: &TempDir) {
    use sqlx::Connection;
    let Some((server, own_database)) = server() else { return };
    let (at, sql) = match own_database {
        true => (format!("{server}/postgres"), format!("CREATE DATABASE {} TEMPLATE template0", name_of(dir))),
        false => (
            server,
            "ROLLBACK; DO $$ DECLARE t REGCLASS; BEGIN \
               FOR t IN SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') \
               LOOP EXECUTE format('DROP TABLE %s CASCADE', t); END LOOP; \
               PERFORM delete_job(job_id) FROM timescaledb_information.jobs WHERE proc_name = 'refresh_samples'; \
               DROP DOMAIN IF EXISTS finite_numeric; DROP FUNCTION IF EXISTS wall_off, forget_samples, keep_audit; END $$; DEALLOCATE ALL; RESET ALL; SET search_path TO public"
                .to_owned(),
        ),
    };
    let mut connection = sqlx::postgres::PgConnection::connect(&at).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

/// Runs tests of the store in a process that finds `server`; at least `least` of them.
fn run_on(server: Result<Database, String>, url: impl Fn(&Database) -> String, tests: &[&str], least: usize) {
    let server = match server {
        Ok(server) => server,
        Err(why) => return println!("skipped: {why}"),
    };
    let out = Command::new(std::env::current_exe().unwrap())
        .args(tests)
        .args(["--skip", "store::suite::on_", "--skip", "store::pages", "--show-output"])
        .env(SERVER, url(&server))
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    println!("{said}");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let ran = said.lines().find(|line| line.starts_with("test result: ok")).expect("a result");
    let passed: usize = ran.split(' ').nth(3).unwrap().parse().unwrap();
    assert!(passed >= least, "only {passed} tests ran: {ran}");
}

#[test]
fn on_postgresql_every_promise_of_the_store_holds() {
    run_on(Database::postgres(), |server| server.url.clone(), &["store::", "--test-threads=4"], 60);
}

/// Tables that become hypertables: rows and alerts. The server is WebAssembly, which ends after some twenty schemas made
/// anew; so history by the hour has one of its own.
#[test]
fn on_timescaledb_rows_and_alerts_hold() {
    let tests = ["store::rows", "store::alerts", "store::suite::the_store", "--test-threads=1"];
    run_on(Database::timescale(), |server| format!("one:{}", server.url), &tests, 12);
}

/// But for the test that commits thousands of rows at once, which ends this server.
#[test]
fn on_timescaledb_hours_and_days_are_what_the_rows_say() {
    let tests = ["store::samples", "--skip", "in_pages_of_any_size", "--test-threads=1"];
    run_on(Database::timescale(), |server| format!("one:{}", server.url), &tests, 8);
}

#[tokio::test]
async fn the_store_says_which_database_it_is() {
    let (store, _dir) = store().await;
    let expected = match server() {
        None => "sqlite",
        Some((_, true)) => "postgresql 1",
        Some((_, false)) => "timescaledb 2.",
    };
    assert!(store.mode().starts_with(expected), "{}", store.mode());
}

#[tokio::test]
async fn many_that_open_a_new_store_at_once_migrate_it_once() {
    if server().is_none_or(|(_, own_database)| !own_database) {
        return; // one process has SQLite's file; TimescaleDB in WebAssembly has one connection
    }
    let dir = TempDir::new().unwrap();
    prepare(&dir).await;
    let opened = (0..8).map(|_| {
        let url = url_of(&dir);
        tokio::spawn(async move { super::Store::open_with(&url, &options()).await.map(|store| store.mode().len()) })
    });
    for store in futures::future::join_all(opened).await {
        store.unwrap().unwrap();
    }
}
