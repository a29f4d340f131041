//! Database servers for tests: PostgreSQL from the machine's packages and a real TimescaleDB (WebAssembly) from
//! `../shared/timescale` beside the repository. Each is made empty, and ended and deleted when it is dropped.
//!
//! Used by several crates with `#[path]`; none of them uses all of it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A server on a port of its own.
pub struct Database {
    /// Without a database's name; a role that is no superuser and may create databases.
    pub url: String,
    port: u16,
    bin: PathBuf,
    process: Option<Child>,
    dir: TempDir,
}

impl Drop for Database {
    fn drop(&mut self) {
        self.stop();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The newest PostgreSQL of the machine's packages.
fn postgres_folder() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let version = path.file_name()?.to_str()?.parse().ok()?;
            path.join("bin/postgres").is_file().then(|| (version, path.join("bin")))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, path)| path)
}

/// A command that does not run as root, which PostgreSQL refuses.
fn unprivileged(program: &Path) -> Command {
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout.trim_ascii() == b"0");
    if !is_root {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

impl Database {
    /// PostgreSQL; or why there is none here.
    pub fn postgres() -> Result<Database, String> {
        let bin =
            postgres_folder().ok_or("no PostgreSQL under /usr/lib/postgresql; install the package `postgresql`")?;
        let dir = TempDir::new().unwrap();
        _ = Command::new("chmod").arg("777").arg(dir.path()).status(); // the server runs as another user
        let made = unprivileged(&bin.join("initdb"))
            .args(["--auth=trust", "--username=postgres", "--no-sync", "--locale=C.UTF-8", "-D"])
            .arg(dir.path().join("data"))
            .output()
            .map_err(|error| format!("initdb does not run: {error}"))?;
        if !made.status.success() {
            return Err(format!("initdb failed: {}", String::from_utf8_lossy(&made.stderr)));
        }
        let port = free_port();
        let mut database =
            Database { url: format!("postgres://tidewatch@127.0.0.1:{port}"), port, bin, process: None, dir };
        database.start();
        // no superuser: row-level security is to hold
        database.sql("postgres", "postgres", "CREATE ROLE tidewatch LOGIN CREATEDB");
        Ok(database)
    }

    /// Starts PostgreSQL, for the first time or again, and returns once it answers.
    pub fn start(&mut self) {
        let process = unprivileged(&self.bin.join("postgres"))
            .arg("-D")
            .arg(self.dir.path().join("data"))
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"])
            .arg("-k")
            .arg(self.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("postgres runs, as initdb did");
        self.process = Some(process);
        self.sql("postgres", "postgres", "SELECT 1");
    }

    /// Ends the server at once; clients lose their connections.
    pub fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        // PostgreSQL: SIGQUIT, an immediate shutdown; node: SIGTERM
        let signal = if self.bin.as_os_str().is_empty() { "-TERM" } else { "-QUIT" };
        _ = Command::new("kill").args([signal, &process.id().to_string()]).status();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(20) {
            if matches!(process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        _ = process.kill();
        _ = process.wait();
    }

    /// Runs SQL as `user` in `database` until the server takes it: what it prints.
    pub fn sql(&self, user: &str, database: &str, sql: &str) -> String {
        let began = Instant::now();
        loop {
            let ran = Command::new(self.bin.join("psql"))
                .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", user, "-d", database, "-Atqc", sql])
                .output()
                .expect("psql is beside postgres");
            let error = String::from_utf8_lossy(&ran.stderr);
            if ran.status.success() {
                return String::from_utf8_lossy(&ran.stdout).trim().to_owned();
            }
            let starting = error.contains("could not connect")
                || error.contains("Connection refused")
                || error.contains("starting up")
                || error.contains("not yet accepting connections")
                || error.contains("No such file");
            assert!(starting && began.elapsed() < Duration::from_secs(60), "{sql}: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A new database: its URL.
    pub fn create(&self, name: &str) -> String {
        self.sql("tidewatch", "postgres", &format!("CREATE DATABASE {name}"));
        format!("{}/{name}", self.url)
    }

    /// TimescaleDB; or why there is none here. It has one database and serves one connection at a time.
    pub fn timescale() -> Result<Database, String> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/timescale");
        if !source.join("server.mjs").is_file() {
            return Err("there is no ../shared/timescale beside the repository".into());
        }
        let dir = TempDir::new().unwrap();
        for file in ["server.mjs", "package.json", "package-lock.json"] {
            std::fs::copy(source.join(file), dir.path().join(file)).unwrap();
        }
        match Command::new("npm").args(["ci", "--silent"]).current_dir(dir.path()).output() {
            Ok(out) if out.status.success() => {}
            Ok(out) => return Err(format!("npm ci failed: {}", String::from_utf8_lossy(&out.stderr))),
            Err(error) => return Err(format!("npm does not run: {error}")),
        }
        let port = free_port();
        let mut process = Command::new("node")
            .args(["server.mjs", &port.to_string()])
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("node does not run: {error}"))?;
        let mut output = BufReader::new(process.stdout.take().unwrap());
        // its one session serves all connections, and would know their prepared statements by the same names
        let url = format!(
            "postgres://postgres:password@127.0.0.1:{port}/postgres?sslmode=disable&statement-cache-capacity=0"
        );
        let database = Database { url, port, bin: PathBuf::new(), process: Some(process), dir };
        let mut line = String::new();
        while !line.starts_with("ready ") {
            line.clear();
            if output.read_line(&mut line).unwrap() == 0 {
                return Err("TimescaleDB ended before it was ready".into());
            }
        }
        // what it prints later must not fill the pipe
        std::thread::spawn(move || output.read_to_end(&mut Vec::new()));
        Ok(database)
    }
}
