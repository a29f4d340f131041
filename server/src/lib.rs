//! Wiring: configuration, and the whole system built from what it is handed. The binary, the end-to-end
//! tests and the benches build it the same way.

pub mod admin; // users and workspaces of a data directory
mod app; // the parts put together, served and drained
pub mod backup; // consistent copies of log and store
pub mod check; // is this file fit for use
pub mod client; // the commands that talk to a running server
mod config; // where settings come from, and what they may be
pub mod demo; // sample workspaces fed by simulators or by an exchange
pub mod measure; // how fast is this machine
pub mod private; // data that nobody else reads
mod report; // what was measured, as a table, JSON and plots

pub use app::{App, serve_edge, shutdown_signal};
pub use config::{Config, ConfigError, ConfigFile, Limits};

/// Chooses ring for all TLS of the process; to be called before the first HTTP client is made. Again is harmless.
pub fn choose_tls() {
    // an error means that it was chosen before
    _ = rustls::crypto::ring::default_provider().install_default();
}
