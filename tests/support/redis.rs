//! A Redis of its own for a test: empty, on a port of its own, ended when it is dropped. Used by several crates with
//! `#[path]`.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub struct RedisServer {
    pub url: String,
    port: u16,
    arguments: Vec<String>,
    process: Child,
    dir: TempDir,
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl RedisServer {
    /// Redis; or why there is none here.
    pub fn start() -> Result<RedisServer, String> {
        RedisServer::start_with(|port, _| vec!["--port".to_owned(), port.to_string()])
    }

    /// The same with arguments for its port and directory.
    pub fn start_with(arguments: impl FnOnce(u16, &Path) -> Vec<String>) -> Result<RedisServer, String> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = TempDir::new().unwrap();
        let arguments = arguments(port, dir.path());
        let process = spawn(&arguments, &dir)
            .map_err(|error| format!("redis-server does not run: {error}; install the package `redis-server`"))?;
        let server = RedisServer { url: format!("redis://127.0.0.1:{port}/0"), port, arguments, process, dir };
        server.wait();
        Ok(server)
    }

    /// Ends it at once, with all that it holds.
    pub fn stop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }

    /// Starts it anew on the same port, with nothing in it.
    pub fn start_again(&mut self) {
        self.process = spawn(&self.arguments, &self.dir).expect("it ran before");
        self.wait();
    }

    /// Sends it a signal: `STOP` makes it hang, `CONT` makes it go on.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn wait(&self) {
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(30), "redis-server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn spawn(arguments: &[String], dir: &TempDir) -> std::io::Result<Child> {
    let mut server = Command::new("redis-server");
    server.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]).arg(dir.path());
    server.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}
