//! How many clients are connected, by address, user and workspace, within bounds.

use crate::config::Limits;
use crate::problem::Problem;
use axum::http::StatusCode;
use engine::event::WorkspaceId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Of whom there are only so many connections.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Group {
    Address(IpAddr),
    User(Arc<str>),
    Workspace(WorkspaceId),
}

/// Connections that follow channels, WebSocket or not.
pub(crate) struct Crowd {
    limits: Limits,
    counts: Mutex<HashMap<Group, usize>>,
}

/// A connection that counts for as long as this lives.
pub(crate) struct Seat {
    crowd: Arc<Crowd>,
    group: Group,
}

impl Crowd {
    pub(super) fn new(limits: Limits) -> Arc<Crowd> {
        Arc::new(Crowd { limits, counts: Mutex::default() })
    }

    /// Counts a connection, if the group may have another one.
    pub(crate) fn enter(self: &Arc<Self>, group: Group) -> Result<Seat, Problem> {
        let (most, key, who) = match group {
            Group::Address(_) => (self.limits.connections_per_address, "connections_per_address", "this address"),
            Group::User(_) => (self.limits.connections_per_user, "connections_per_user", "you"),
            Group::Workspace(_) => {
                (self.limits.connections_per_workspace, "connections_per_workspace", "the workspace")
            }
        };
        let mut counts = self.counts.lock();
        let count = counts.entry(group.clone()).or_default();
        if *count >= most {
            metrics::counter!("tidewatch_ws_refused_total", "limit" => key).increment(1);
            let detail = format!(
                "limits.{key} = {most} live connections of {who} are open; close some or ask an admin to raise the limit"
            );
            let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_connections", detail);
            return Err(problem.retry_after(Duration::from_secs(10)));
        }
        *count += 1;
        Ok(Seat { crowd: self.clone(), group })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.crowd.counts.lock();
        if let Some(count) = counts.get_mut(&self.group) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_so_many_connections_and_another_one_when_one_leaves() {
        let limits = Limits { connections_per_user: 2, ..Limits::default() };
        let crowd = Crowd::new(limits);
        let ann = || crowd.enter(Group::User("ann".into()));
        let (one, _two) = (ann().unwrap(), ann().unwrap());
        let refused = ann().err().unwrap();
        assert_eq!((refused.status().as_u16(), refused.code), (429, "too_many_connections"));
        assert!(refused.detail.contains("limits.connections_per_user = 2"), "{}", refused.detail);
        assert!(crowd.enter(Group::User("bob".into())).is_ok());
        drop(one);
        assert!(ann().is_ok());
        drop(_two);
        assert!(crowd.counts.lock().is_empty(), "nobody is remembered who left");
    }
}
