//! Every wire format: HTTP, WebSocket and AG-UI, who may speak them, and the console. Computes nothing itself: what
//! it serves and takes in goes through [`actors::System`].

mod config; // the settings of this crate
mod problem; // errors as clients see them
mod permission; // what a role may do
mod auth; // passwords, tokens, API keys
mod extract; // what handlers take from a request
mod hub; // channels, and who listens to them

pub use auth::{Auth, AuthError};
pub use config::{AuthConfig, Config, Limits};
pub use hub::Hub;

use actors::System;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// What every handler works with. A clone is another handle to it.
#[derive(Clone)]
pub struct AppState {
    pub system: System,
    pub auth: Arc<Auth>,
    pub hub: Arc<Hub>,
    pub config: Arc<Config>,
    /// Cancelled when the server drains: long answers end then.
    pub closing: CancellationToken,
}
