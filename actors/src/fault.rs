//! Why a request could not be served: a stable code, what to do, and what kind of answer it is.

use sql::SqlError;
use sql::store::StoreError;
use std::time::Duration;
use streams::dedup::DedupError;
use streams::log::{AppendError, ReadError};

/// What kind of answer a fault is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// What was named does not exist.
    NotFound,
    /// The request can never work as it stands.
    Invalid,
    /// It contradicts what is there.
    Conflict,
    /// Over a rate or quota of the caller's.
    Limit { retry_after: Duration },
    /// The system is overloaded; the same request may work later.
    Busy { retry_after: Duration },
    /// Not the caller's doing.
    Internal,
}

/// A refused request.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Fault {
    pub kind: FaultKind,
    /// Stable, snake_case.
    pub code: &'static str,
    pub detail: String,
    /// Place in the SQL that was sent.
    pub line: Option<u64>,
    pub column: Option<u64>,
}

impl Fault {
    pub fn new(kind: FaultKind, code: &'static str, detail: impl Into<String>) -> Self {
        Self { kind, code, detail: detail.into(), line: None, column: None }
    }

    pub fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(FaultKind::NotFound, code, detail)
    }

    pub fn invalid(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(FaultKind::Invalid, code, detail)
    }

    /// Something of ours failed; the caller may try again, the log says more.
    pub fn internal(error: impl std::fmt::Display) -> Self {
        Self::new(FaultKind::Internal, "internal", error.to_string())
    }
}

pub(crate) const SOON: Duration = Duration::from_secs(1);

impl From<SqlError> for Fault {
    fn from(error: SqlError) -> Self {
        let (line, column) = (error.line, error.column);
        Self { line, column, ..Self::invalid("bad_sql", error.to_string()) }
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::from(&error)
    }
}

impl From<&StoreError> for Fault {
    fn from(error: &StoreError) -> Self {
        let kind = match error {
            StoreError::Exists { .. } => return Self::new(FaultKind::Conflict, "exists", error.to_string()),
            StoreError::Missing { .. } | StoreError::NoWorkspace { .. } => {
                return Self::not_found("not_found", error.to_string());
            }
            StoreError::Cursor { .. } => return Self::invalid("bad_cursor", error.to_string()),
            StoreError::Busy { .. } | StoreError::Unreachable { .. } => FaultKind::Busy { retry_after: SOON },
            StoreError::Damaged { .. } => {
                tracing::error!(%error, "a part of the store cannot be read");
                let detail = "what this asks for stands in a damaged part of the store; the server's log says where it is \
                              and what to do; try again then, or ask for less";
                let kind = FaultKind::Busy { retry_after: Duration::from_secs(30) };
                return Self::new(kind, "store_damaged", detail);
            }
            _ => FaultKind::Internal,
        };
        Self::new(kind, "store_unavailable", error.to_string())
    }
}

/// Which file of the log it is goes to the operator and not to clients.
impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        tracing::error!(%error, "a part of the log cannot be read");
        let detail = "a part of the log that this asks for could not be read; the server's log says which file it is and \
                      what to do; try again then, or ask for less";
        Self::new(FaultKind::Busy { retry_after: Duration::from_secs(30) }, "log_unavailable", detail)
    }
}

impl From<DedupError> for Fault {
    fn from(error: DedupError) -> Self {
        Self::new(FaultKind::Busy { retry_after: Duration::from_secs(30) }, "dedup_unavailable", error.to_string())
    }
}

impl From<AppendError> for Fault {
    fn from(error: AppendError) -> Self {
        let (kind, code) = match &error {
            AppendError::Busy { .. } => (FaultKind::Busy { retry_after: SOON }, "backpressure"),
            AppendError::Full { .. } => (FaultKind::Busy { retry_after: Duration::from_secs(30) }, "log_full"),
            AppendError::TooLarge { .. } => (FaultKind::Invalid, "batch_too_large"),
            AppendError::Unencodable { .. } => (FaultKind::Invalid, "unencodable"),
            AppendError::Failed { .. } | AppendError::Stopped => {
                (FaultKind::Busy { retry_after: Duration::from_secs(30) }, "log_unavailable")
            }
        };
        Self::new(kind, code, error.to_string())
    }
}
