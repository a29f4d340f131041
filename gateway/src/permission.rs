//! What a role may do: one table.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Something that not everybody in a workspace may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Permission {
    /// See streams, metrics and their rows, alerts, portfolios, threads and channels.
    Read,
    /// Ask in SQL.
    Query,
    /// Send events.
    Ingest,
    /// Define and remove streams, metrics and alert rules.
    Define,
    /// Acknowledge alerts and silence them.
    Respond,
    /// Change portfolios and their positions.
    Hold,
    /// Talk to agents.
    Chat,
    /// Read the audit log.
    Audit,
    /// Members, API keys and the workspace's own settings.
    Manage,
    /// Delete the workspace.
    Delete,
}

use Permission::{Audit, Chat, Define, Delete, Hold, Ingest, Manage, Query, Read, Respond};

/// A member's role in a workspace.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Owner,
    Admin,
    GeneralPartner,
    Associate,
    Analyst,
    Member,
    Viewer,
    LimitedPartner,
}

/// Every role, its name on the wire and in the store, and what it may do.
const TABLE: [(Role, &str, &[Permission]); 8] = [
    (Role::Owner, "owner", &[Read, Query, Ingest, Define, Respond, Hold, Chat, Audit, Manage, Delete]),
    (Role::Admin, "admin", &[Read, Query, Ingest, Define, Respond, Hold, Chat, Audit, Manage, Delete]),
    (Role::GeneralPartner, "general_partner", &[Read, Query, Ingest, Define, Respond, Hold, Chat, Audit]),
    (Role::Associate, "associate", &[Read, Query, Ingest, Define, Respond, Hold, Chat]),
    (Role::Analyst, "analyst", &[Read, Query, Define, Respond, Chat]),
    (Role::Member, "member", &[Read, Query, Ingest, Define, Respond, Hold, Chat]),
    (Role::Viewer, "viewer", &[Read, Query]),
    (Role::LimitedPartner, "limited_partner", &[Read]),
];

impl Role {
    fn row(self) -> &'static (Role, &'static str, &'static [Permission]) {
        TABLE.iter().find(|(role, ..)| *role == self).expect("every role has a row, as a test checks")
    }

    /// The role's name.
    pub fn as_str(self) -> &'static str {
        self.row().1
    }

    pub fn may(self, permission: Permission) -> bool {
        self.row().2.contains(&permission)
    }

    /// Whether this role may give `other` away: it may do all that `other` may.
    pub fn covers(self, other: Role) -> bool {
        other.row().2.iter().all(|permission| self.may(*permission))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No role has this name.
#[derive(Debug, thiserror::Error)]
#[error("role `{0}` is none of owner, admin, general_partner, associate, analyst, member, viewer, limited_partner")]
pub struct UnknownRole(String);

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Role, UnknownRole> {
        let row = TABLE.iter().find(|(_, name, _)| *name == text);
        row.map(|(role, ..)| *role).ok_or_else(|| UnknownRole(text.chars().take(40).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_reads_back_as_it_is_written() {
        for (role, name, _) in TABLE {
            assert_eq!((role.as_str(), name.parse::<Role>().unwrap()), (name, role));
            assert_eq!(serde_json::to_value(role).unwrap(), name);
        }
        let error = "root".parse::<Role>().unwrap_err().to_string();
        assert!(TABLE.iter().all(|(_, name, _)| error.contains(name)), "{error}");
    }

    #[test]
    fn everybody_may_read_and_who_reads_only_may_change_nothing() {
        let changes = [Ingest, Define, Respond, Hold, Manage, Delete];
        for (role, ..) in TABLE {
            assert!(role.may(Read), "{role}");
        }
        for reader in [Role::Viewer, Role::LimitedPartner] {
            assert!(!changes.iter().any(|change| reader.may(*change)), "{reader}");
        }
    }

    #[test]
    fn only_owners_and_admins_manage_and_delete() {
        for (role, ..) in TABLE {
            let trusted = matches!(role, Role::Owner | Role::Admin);
            assert_eq!((role.may(Manage), role.may(Delete)), (trusted, trusted), "{role}");
        }
    }

    #[test]
    fn nobody_gives_away_more_than_they_have() {
        assert!(Role::Owner.covers(Role::Admin) && Role::GeneralPartner.covers(Role::Analyst));
        assert!(!Role::Analyst.covers(Role::Associate) && !Role::GeneralPartner.covers(Role::Owner));
    }
}
