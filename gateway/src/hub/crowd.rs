//! How many clients are connected, by address, user and workspace, within bounds; and whose rights have changed since
//! they were looked at.

use super::outbox::Outbox;
use crate::config::Limits;
use crate::problem::Problem;
use axum::http::StatusCode;
use engine::event::WorkspaceId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
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
    present: Mutex<HashMap<Group, Present>>,
}

/// Those of a group.
#[derive(Default)]
struct Present {
    /// What waits for each of them, by the number of its seat.
    connections: HashMap<u64, Weak<Outbox>>,
    /// The number of the next seat.
    next: u64,
}

/// A connection that counts for as long as this lives.
struct Seat {
    crowd: Arc<Crowd>,
    group: Group,
    number: u64,
}

/// All that one connection counts as.
#[derive(Default)]
pub(crate) struct Seats {
    groups: HashMap<Group, Seat>,
    outbox: Weak<Outbox>,
}

impl Seats {
    /// Says what waits for the connection: nothing of it goes out unlooked at when something is taken from a group that it
    /// enters from now on.
    pub(crate) fn hold(&mut self, outbox: &Arc<Outbox>) {
        self.outbox = Arc::downgrade(outbox);
    }

    /// Counts the connection among those of a group, once. It then looks again at its rights: something may have been
    /// taken between the first look, for which it enters, and its entry.
    /// `by_tier` is how many a tier allows, where that may be fewer than the settings do.
    pub(crate) fn enter(&mut self, crowd: &Arc<Crowd>, group: Group, by_tier: Option<usize>) -> Result<(), Problem> {
        if let Entry::Vacant(vacant) = self.groups.entry(group) {
            let seat = crowd.enter(vacant.key().clone(), by_tier, self.outbox.clone())?;
            vacant.insert(seat);
            self.outbox.upgrade().iter().for_each(|outbox| outbox.suspect());
        }
        Ok(())
    }
}

impl Crowd {
    pub(super) fn new(limits: Limits) -> Arc<Crowd> {
        Arc::new(Crowd { limits, present: Mutex::default() })
    }

    /// Counts a connection, if the group may have another one.
    fn enter(self: &Arc<Self>, group: Group, by_tier: Option<usize>, outbox: Weak<Outbox>) -> Result<Seat, Problem> {
        let (most, key, who) = match group {
            Group::Address(_) => (self.limits.connections_per_address, "connections_per_address", "this address"),
            Group::User(_) => (self.limits.connections_per_user, "connections_per_user", "you"),
            Group::Workspace(_) => {
                (self.limits.connections_per_workspace, "connections_per_workspace", "the workspace")
            }
        };
        let (most, key, bound) = match by_tier.filter(|by_tier| *by_tier < most) {
            Some(most) => (most, "connections", format!("connections = {most} of its tier: so many")),
            None => (most, key, format!("limits.{key} = {most}")),
        };
        let mut all = self.present.lock();
        let present = all.entry(group.clone()).or_default();
        if present.connections.len() >= most {
            metrics::counter!("tidewatch_ws_refused_total", "limit" => key).increment(1);
            let detail =
                format!("{bound} live connections of {who} are open; close some or ask an admin to raise the limit");
            let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_connections", detail);
            return Err(problem.retry_after(Duration::from_secs(10)));
        }
        let number = present.next;
        present.next += 1;
        present.connections.insert(number, outbox);
        Ok(Seat { crowd: self.clone(), group, number })
    }

    /// Connections of a group.
    pub(crate) fn count(&self, group: &Group) -> usize {
        self.present.lock().get(group).map_or(0, |present| present.connections.len())
    }

    /// Something was taken from a group: each of its connections looks again at its rights, now and before it gets
    /// anything more.
    pub(crate) fn look_again(&self, group: &Group) {
        if let Some(present) = self.present.lock().get(group) {
            present.connections.values().filter_map(Weak::upgrade).for_each(|outbox| outbox.suspect());
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut all = self.crowd.present.lock();
        if let Some(present) = all.get_mut(&self.group) {
            present.connections.remove(&self.number);
            if present.connections.is_empty() {
                all.remove(&self.group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::Form;

    #[test]
    fn a_group_has_so_many_connections_and_another_one_when_one_leaves() {
        let limits = Limits { connections_per_user: 2, ..Limits::default() };
        let crowd = Crowd::new(limits);
        let ann = || crowd.enter(Group::User("ann".into()), None, Weak::new());
        let (one, _two) = (ann().unwrap(), ann().unwrap());
        let refused = ann().err().unwrap();
        assert_eq!((refused.status().as_u16(), refused.code), (429, "too_many_connections"));
        assert!(refused.detail.contains("limits.connections_per_user = 2"), "{}", refused.detail);
        assert!(crowd.enter(Group::User("bob".into()), None, Weak::new()).is_ok());
        drop(one);
        assert!(ann().is_ok());
        drop(_two);
        assert!(crowd.present.lock().is_empty(), "nobody is remembered who left");
    }

    #[test]
    fn who_enters_a_group_looks_at_its_rights_once_more() {
        let (crowd, outbox) = (Crowd::new(Limits::default()), Outbox::new(1 << 10, Form::Text));
        let mut seats = Seats::default();
        seats.hold(&outbox);
        for is_new in [true, false] {
            seats.enter(&crowd, Group::User("ann".into()), None).unwrap();
            assert_eq!(outbox.is_to_look(), is_new);
        }
    }

    #[test]
    fn a_change_is_seen_once_by_each_connection_of_its_group_and_by_no_other() {
        let crowd = Crowd::new(Limits::default());
        let outboxes = [(); 3].map(|()| Outbox::new(1 << 10, Form::Text));
        let enter = |user: &str, outbox| crowd.enter(Group::User(user.into()), None, Arc::downgrade(outbox)).unwrap();
        let _seats = [enter("ann", &outboxes[0]), enter("ann", &outboxes[1]), enter("bob", &outboxes[2])];
        crowd.look_again(&Group::User("ann".into()));
        crowd.look_again(&Group::User("eve".into()));
        assert_eq!(outboxes.each_ref().map(|outbox| outbox.is_to_look()), [true, true, false]);
        assert_eq!(outboxes.each_ref().map(|outbox| outbox.is_to_look()), [false; 3]);
    }
}
