//! `tidewatch backup` and `tidewatch restore`: a consistent copy of log and store, taken while the server runs.
//!
//! The order makes it consistent. The log is copied, then the store, then what the log got meanwhile: so the copy of
//! the log reaches from before the store's checkpoint to behind it, whatever retention drops at its head and ingest
//! adds at its tail, and a server started on the copy computes the rest as after a crash.

use crate::config::{Config, LogConfig};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sql::store::Kind;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use streams::log::{EmbeddedLog, Filter, Log};

/// What a backup holds, beside its files.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// Of the binary that wrote it.
    version: String,
    created_at: String,
    store: Kind,
    /// Offsets of the log: the first it holds and the first it lacks.
    log: (u64, u64),
    files: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    path: PathBuf,
    bytes: u64,
    sha256: String,
}

const MANIFEST: &str = "backup.json";
/// Folders of the data directory that are copied: the log, and what is kept beside it.
const DATA: &str = "data";
/// Held by the process that has the log open.
const LOCK: &str = "LOCK";
const SQLITE: &str = "store.db";
const POSTGRES: &str = "store.dump";

/// Copies log and store of the configured server, running or not, into `to`, a directory that is empty or not there.
pub async fn backup(config: &Config, to: &Path) -> Result<()> {
    let (url, data) = (config.existing_store_url()?, &config.data_dir);
    ensure!(data.join("log").is_dir(), "{} holds no log; is data_dir right?", data.display());
    let is_new = !to.exists();
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    ensure!(is_empty(to)?, "{} is not empty; name a new directory", to.display());
    let done = write(config, &url, to).await;
    if done.is_err() {
        // half a backup is in the way of the next; what cannot be removed either tells nothing more
        _ = fs::remove_dir_all(to.join(DATA));
        [SQLITE, POSTGRES, MANIFEST].iter().for_each(|file| _ = fs::remove_file(to.join(file)));
        if is_new {
            _ = fs::remove_dir(to);
        }
    }
    done
}

async fn write(config: &Config, url: &str, to: &Path) -> Result<()> {
    let (data, copy) = (config.data_dir.clone(), to.join(DATA));
    say("copying the log");
    copy_new(&data, &copy)?;
    let store = sql::store::kind(url)?;
    say("copying the store");
    match store {
        Kind::Sqlite => sql::store::copy(url, &to.join(SQLITE)).await?,
        Kind::Postgres => dump(url, &to.join(POSTGRES))?,
    }
    say("copying what came meanwhile");
    copy_new(&data, &copy)?;

    say("checking the copy");
    let log = check_log(&copy.join("log"), &config.log)?;
    let mut files = Vec::new();
    for path in files_under(to)? {
        let (bytes, sha256) = digest(&to.join(&path))?;
        files.push(Entry { path, bytes, sha256 });
    }
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    let created_at = chrono::Utc::now().to_rfc3339();
    let manifest = Manifest { version: env!("CARGO_PKG_VERSION").to_owned(), created_at, store, log, files };
    // last and durable: a directory without it is no backup
    let mut file = File::create(to.join(MANIFEST))?;
    file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
    file.sync_all()?;
    File::open(to)?.sync_all()?;
    println!("{} files, {bytes} bytes, log offsets {} to {} in {}", manifest.files.len(), log.0, log.1, to.display());
    Ok(())
}

/// Checks the backup in `from` and puts it where the configuration says log and store are, both of which must be empty.
pub async fn restore(config: &Config, from: &Path) -> Result<()> {
    let text = fs::read(from.join(MANIFEST))
        .with_context(|| format!("{} is no finished backup: it has no {MANIFEST}", from.display()))?;
    let manifest: Manifest = serde_json::from_slice(&text).with_context(|| format!("cannot read {MANIFEST}"))?;
    say("checking the backup");
    for file in &manifest.files {
        let path = from.join(&file.path);
        let (bytes, sha256) = digest(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(
            (bytes, &sha256) == (file.bytes, &file.sha256),
            "{} is not as it was written: use another backup",
            path.display()
        );
    }
    if manifest.store == Kind::Sqlite {
        sql::store::check(&from.join(SQLITE))?;
    }
    let url = config.store_url()?;
    let kind = sql::store::kind(&url)?;
    ensure!(
        kind == manifest.store,
        "the backup is of {:?} and store.url is of {kind:?}: set store.url accordingly",
        manifest.store
    );
    fs::create_dir_all(&config.data_dir).with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    ensure!(
        is_empty(&config.data_dir)?,
        "{} is not empty; move it away or set another data_dir",
        config.data_dir.display()
    );
    say("restoring the store");
    match manifest.store {
        Kind::Sqlite => {
            let path = sql::store::sqlite_path(&url)?;
            ensure!(!path.exists(), "{} exists; move it away or set another store.url", path.display());
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            copy_file(&from.join(SQLITE), &path)?;
        }
        Kind::Postgres => restore_dump(&url, &from.join(POSTGRES))?,
    }
    say("restoring the log");
    copy_new(&from.join(DATA), &config.data_dir)?;
    println!("restored what {} held at {}; start it with `tidewatch serve`", from.display(), manifest.created_at);
    Ok(())
}

fn say(what: &str) {
    tracing::info!("{what}");
}

fn is_empty(folder: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(folder)?.next().is_none())
}

/// Files below `folder`, by path from there.
fn files_under(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).with_context(|| format!("cannot read {}", next.display()))? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => folders.push(entry.path()),
                kind if kind.is_file() => files.push(entry.path().strip_prefix(folder)?.to_owned()),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Copies each file in the folders of `from` that `to` lacks or has in another length. The files of SQLite lie in
/// `from` itself and are left out: a database is not copied file by file. What retention removes meanwhile is no loss.
fn copy_new(from: &Path, to: &Path) -> Result<()> {
    for path in files_under(from)? {
        let passing = path.ends_with(LOCK) || path.extension().is_some_and(|extension| extension == "tmp");
        if passing || path.parent().is_none_or(|folder| folder.as_os_str().is_empty()) {
            continue;
        }
        let (source, target) = (from.join(&path), to.join(&path));
        let same = match (fs::metadata(&source), fs::metadata(&target)) {
            (Err(error), _) if error.kind() == io::ErrorKind::NotFound => continue,
            (Ok(source), Ok(target)) => source.len() == target.len(),
            _ => false,
        };
        if same {
            continue;
        }
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        match copy_file(&source, &target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            copied => copied.with_context(|| format!("cannot copy {}", source.display()))?,
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    File::open(to)?.sync_all()
}

/// Opens the copied log, which cuts a record that was being written, and reads all of it: its first offset and its tail.
fn check_log(folder: &Path, config: &LogConfig) -> Result<(u64, u64)> {
    let log = EmbeddedLog::open(folder, &config.embedded()).context("the copy of the log cannot be opened")?;
    let reaches = (log.head().0, log.tail().0);
    for record in log.scan(log.head(), Filter::default())? {
        record.context("the log is not whole, nor would a restored one be")?;
    }
    drop(log);
    fs::remove_file(folder.join(LOCK))?;
    Ok(reaches)
}

fn digest(path: &Path) -> io::Result<(u64, String)> {
    let (mut file, mut hash, mut bytes) = (File::open(path)?, Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            let hex = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            return Ok((bytes, hex));
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
}

/// PostgreSQL's own tools make the dump and read it. All workspaces are in it, as `app.workspace` says; with its rows
/// behind row-level security pg_dump would else refuse.
fn dump(url: &str, to: &Path) -> Result<()> {
    let mut command = tool("pg_dump", url)?;
    command.args(["--enable-row-security", "--format=custom", "--no-owner", "--file"]).arg(to);
    run(command, "pg_dump")
}

fn restore_dump(url: &str, from: &Path) -> Result<()> {
    let mut command = tool("pg_restore", url)?;
    let database = command.get_envs().find(|(name, _)| *name == "PGDATABASE").and_then(|(_, value)| value);
    let database = database.context("store.url names no database")?.to_owned();
    // --dbname is what makes it write to a database and not to its output
    command.args(["--exit-on-error", "--single-transaction", "--no-owner", "--dbname"]).arg(database).arg(from);
    run(command, "pg_restore")
}

fn run(mut command: Command, name: &str) -> Result<()> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => bail!("{name} failed with {status}; what it says is above"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("{name} is not on PATH; install the PostgreSQL client of the server's version")
        }
        Err(error) => Err(error).with_context(|| format!("cannot run {name}")),
    }
}

/// A tool of PostgreSQL with the server in its environment, where other users do not see the password.
fn tool(name: &str, url: &str) -> Result<Command> {
    let parsed = reqwest::Url::parse(url).context("store.url cannot be read")?;
    let mut command = Command::new(name);
    let mut set = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            command.env(name, value);
        }
    };
    set("PGHOST", parsed.host_str().map(|host| host.trim_matches(['[', ']']).to_owned()));
    set("PGPORT", parsed.port().map(|port| port.to_string()));
    set("PGUSER", Some(unescape(parsed.username())));
    set("PGPASSWORD", parsed.password().map(unescape));
    set("PGDATABASE", Some(unescape(parsed.path().trim_start_matches('/'))));
    for (key, value) in parsed.query_pairs() {
        match key.as_ref() {
            "host" => set("PGHOST", Some(value.into_owned())),
            "sslmode" | "ssl-mode" => set("PGSSLMODE", Some(value.into_owned())),
            "sslrootcert" | "ssl-root-cert" | "ssl-ca" => set("PGSSLROOTCERT", Some(value.into_owned())),
            "sslcert" | "ssl-cert" => set("PGSSLCERT", Some(value.into_owned())),
            "sslkey" | "ssl-key" => set("PGSSLKEY", Some(value.into_owned())),
            _ => {}
        }
    }
    set("PGOPTIONS", Some("-c app.workspace=*".to_owned()));
    Ok(command)
}

/// `%40` back to `@`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, later @ ..] = rest {
        let escaped = (*first == b'%').then(|| later.get(..2)).flatten();
        let escaped = escaped.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &later[2..] } else { later };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_goes_by_the_environment_and_is_unescaped() {
        let command = tool("pg_dump", "postgres://me:p%40ss%25@db.example:5433/tides?sslmode=require").unwrap();
        let get = |wanted: &str| {
            let found = command.get_envs().find(|(name, _)| *name == wanted).and_then(|(_, value)| value);
            found.map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(get("PGPASSWORD").as_deref(), Some("p@ss%"));
        assert_eq!((get("PGHOST").as_deref(), get("PGPORT").as_deref()), (Some("db.example"), Some("5433")));
        assert_eq!((get("PGDATABASE").as_deref(), get("PGSSLMODE").as_deref()), (Some("tides"), Some("require")));
        assert!(command.get_args().next().is_none());
    }

    #[test]
    fn a_copy_leaves_out_databases_and_locks_and_takes_what_grew() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("log")).unwrap();
        for (path, text) in
            [("tidewatch.db", "x"), ("log/LOCK", ""), ("log/next.tmp", ""), ("log/1.seg", "one"), ("log/2.seg", "two")]
        {
            fs::write(from.join(path), text).unwrap();
        }
        copy_new(&from, &to).unwrap();
        assert_eq!(files_under(&to).unwrap(), [Path::new("log/1.seg"), Path::new("log/2.seg")]);
        fs::remove_file(from.join("log/1.seg")).unwrap();
        fs::write(from.join("log/2.seg"), "two and more").unwrap();
        fs::write(from.join("log/3.seg"), "three").unwrap();
        copy_new(&from, &to).unwrap();
        let kept: Vec<String> =
            files_under(&to).unwrap().iter().map(|path| fs::read_to_string(to.join(path)).unwrap()).collect();
        assert_eq!(kept, ["one", "two and more", "three"]);
    }
}
