//! Who may do what: permissions, roles, and scopes, which are permissions on single resources. One table, served at
//! `/api/v1/permissions`.

use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

macro_rules! permissions {
    ($($variant:ident $name:literal $meaning:literal),* $(,)?) => {
        /// Something that not everybody in a workspace may do.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Permission {
            $(#[doc = $meaning] $variant),*
        }

        /// Every permission, its name, and what it allows.
        pub(crate) const PERMISSIONS: &[(Permission, &str, &str)] = &[$((Permission::$variant, $name, $meaning)),*];
    };
}

permissions! {
    DealCreate "deal:create" "Add deals. The engine keeps none; applications on top of it ask for this.",
    DealRead "deal:read" "See deals.",
    DealUpdate "deal:update" "Change deals.",
    DealDelete "deal:delete" "Delete deals.",
    PortfolioRead "portfolio:read" "See portfolios, their positions and their value.",
    PortfolioUpdate "portfolio:update" "Change portfolios and their positions.",
    FundPerformanceRead "fund:performance:read" "See the value of portfolios and their allocation to sectors, without positions: no symbols.",
    FundSettingsUpdate "fund:settings:update" "Change the workspace's name.",
    AiUse "ai:use" "Talk to agents, and read conversations with them; both take the permissions to read all that agents read, too.",
    AiAdmin "ai:admin" "Cancel runs that others started.",
    MetricRead "metric:read" "See metrics and their rows.",
    MetricDefine "metric:define" "Define and remove metrics.",
    AlertRead "alert:read" "See alert rules, alerts and silences.",
    AlertDefine "alert:define" "Define and remove alert rules and webhooks.",
    AlertRespond "alert:respond" "Acknowledge alerts and silence them.",
    StreamRead "stream:read" "See streams and their events; those of `agent.events` take what running agents takes, too.",
    StreamIngest "stream:ingest" "Send events.",
    StreamDefine "stream:define" "Define streams.",
    QueryRun "query:run" "Ask in SQL, over what else one may read.",
    AuditRead "audit:read" "Read the audit log.",
    WorkspaceManage "workspace:manage" "Members, grants and API keys. All but guests and keys with scopes see the members and the usage without it.",
    WorkspaceDelete "workspace:delete" "Delete the workspace with all that is in it.",
}

use Permission::*;

impl Permission {
    /// The name on the wire.
    pub(crate) fn as_str(self) -> &'static str {
        PERMISSIONS[self as usize].1
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A member's role in a workspace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Owner,
    Admin,
    GeneralPartner,
    Associate,
    Analyst,
    LimitedPartner,
    Member,
    Viewer,
    /// Nothing but what is granted.
    Guest,
}

/// Nothing is held back.
const ALL: &[Permission] = &[
    DealCreate,
    DealRead,
    DealUpdate,
    DealDelete,
    PortfolioRead,
    PortfolioUpdate,
    FundPerformanceRead,
    FundSettingsUpdate,
    AiUse,
    AiAdmin,
    MetricRead,
    MetricDefine,
    AlertRead,
    AlertDefine,
    AlertRespond,
    StreamRead,
    StreamIngest,
    StreamDefine,
    QueryRun,
    AuditRead,
    WorkspaceManage,
    WorkspaceDelete,
];

/// Every role, its name on the wire and in the store, and what it may do.
pub(crate) const ROLES: [(Role, &str, &[Permission]); 9] = [
    (Role::Owner, "owner", ALL),
    (Role::Admin, "admin", ALL),
    (
        Role::GeneralPartner,
        "general_partner",
        &[
            DealCreate,
            DealRead,
            DealUpdate,
            DealDelete,
            PortfolioRead,
            PortfolioUpdate,
            FundPerformanceRead,
            FundSettingsUpdate,
            AiUse,
            AiAdmin,
            MetricRead,
            MetricDefine,
            AlertRead,
            AlertDefine,
            AlertRespond,
            StreamRead,
            StreamIngest,
            StreamDefine,
            QueryRun,
            AuditRead,
        ],
    ),
    (
        Role::Associate,
        "associate",
        &[
            DealCreate,
            DealRead,
            DealUpdate,
            PortfolioRead,
            PortfolioUpdate,
            FundPerformanceRead,
            AiUse,
            MetricRead,
            MetricDefine,
            AlertRead,
            AlertDefine,
            AlertRespond,
            StreamRead,
            StreamIngest,
            StreamDefine,
            QueryRun,
        ],
    ),
    (
        Role::Analyst,
        "analyst",
        &[
            DealRead,
            PortfolioRead,
            FundPerformanceRead,
            AiUse,
            MetricRead,
            MetricDefine,
            AlertRead,
            AlertDefine,
            AlertRespond,
            StreamRead,
            StreamDefine,
            QueryRun,
        ],
    ),
    (Role::LimitedPartner, "limited_partner", &[PortfolioRead, FundPerformanceRead, MetricRead]),
    (
        Role::Member,
        "member",
        &[
            PortfolioRead,
            PortfolioUpdate,
            FundPerformanceRead,
            AiUse,
            MetricRead,
            MetricDefine,
            AlertRead,
            AlertDefine,
            AlertRespond,
            StreamRead,
            StreamIngest,
            StreamDefine,
            QueryRun,
        ],
    ),
    (
        Role::Viewer,
        "viewer",
        &[DealRead, PortfolioRead, FundPerformanceRead, MetricRead, AlertRead, StreamRead, QueryRun],
    ),
    (Role::Guest, "guest", &[]),
];

impl Role {
    fn row(self) -> &'static (Role, &'static str, &'static [Permission]) {
        ROLES.iter().find(|(role, ..)| *role == self).expect("every role has a row, as a test checks")
    }

    /// The role's name.
    pub(crate) fn as_str(self) -> &'static str {
        self.row().1
    }

    pub(crate) fn may(self, permission: Permission) -> bool {
        self.row().2.contains(&permission)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Role {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// No role has this name.
#[derive(Debug, thiserror::Error)]
#[error(
    "role `{0}` is none of owner, admin, general_partner, associate, analyst, limited_partner, member, viewer, guest"
)]
pub(crate) struct UnknownRole(String);

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Role, UnknownRole> {
        let row = ROLES.iter().find(|(_, name, _)| *name == text);
        row.map(|(role, ..)| *role).ok_or_else(|| UnknownRole(text.chars().take(40).collect()))
    }
}

/// A permission, everywhere in the workspace or on one resource: `metric:read`, `portfolio:read@portfolio/main`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Scope {
    permission: Permission,
    /// As its channel is named: `metrics/NAME`, `portfolio/ID`, `streams/NAME`, `tables/NAME`, `alerts`, `thread/ID`.
    resource: Option<String>,
}

impl Scope {
    /// The first of `scopes` that `role` does not have: a key with it could less than it says.
    pub(crate) fn beyond(role: Role, scopes: &[Scope]) -> Option<&Scope> {
        scopes.iter().find(|scope| !role.may(scope.permission))
    }

    /// Whether it allows `permission` on `resource`; without one, everywhere.
    fn allows(&self, permission: Permission, resource: Option<&str>) -> bool {
        self.permission == permission && (self.resource.is_none() || self.resource.as_deref() == resource)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.resource {
            Some(resource) => write!(f, "{}@{resource}", self.permission),
            None => write!(f, "{}", self.permission),
        }
    }
}

/// The text is no scope.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no scope: write a permission of GET /api/v1/permissions, such as `metric:read`, or one on a single \
     resource, such as `portfolio:read@portfolio/main` or `metric:read@metrics/vwap_1m`"
)]
pub(crate) struct BadScope(String);

/// Which permissions can be held on which single resources.
const ON_RESOURCES: &[(&str, &[Permission])] = &[
    ("portfolio/", &[PortfolioRead, PortfolioUpdate, FundPerformanceRead]),
    ("metrics/", &[MetricRead, MetricDefine]),
    ("streams/", &[StreamRead, StreamIngest]),
    ("tables/", &[StreamRead, StreamIngest]),
    ("thread/", &[AiUse]),
];

impl FromStr for Scope {
    type Err = BadScope;
    fn from_str(text: &str) -> Result<Scope, BadScope> {
        let bad = || BadScope(text.chars().take(120).collect());
        let (permission, resource) = match text.split_once('@') {
            Some((permission, resource)) => (permission, Some(resource)),
            None => (text, None),
        };
        let known = PERMISSIONS.iter().find(|(_, name, _)| *name == permission);
        let permission = known.map(|(permission, ..)| *permission).ok_or_else(bad)?;
        if let Some(resource) = resource {
            let fits = |(prefix, allowed): &(&str, &[Permission])| {
                let name = resource.strip_prefix(prefix).unwrap_or_default();
                let sensible = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
                !name.is_empty() && name.len() <= 128 && name.chars().all(sensible) && allowed.contains(&permission)
            };
            if !ON_RESOURCES.iter().any(fits) {
                return Err(bad());
            }
        }
        Ok(Scope { permission, resource: resource.map(str::to_owned) })
    }
}

/// Reads scopes; `metric:*` stands for all permissions that begin so.
pub(crate) fn parse_scopes(texts: &[String]) -> Result<Vec<Scope>, BadScope> {
    let mut scopes = Vec::new();
    for text in texts {
        match text.strip_suffix('*').filter(|prefix| prefix.ends_with(':')) {
            Some(prefix) => {
                let under = PERMISSIONS.iter().filter(|(_, name, _)| name.starts_with(prefix));
                let before = scopes.len();
                scopes.extend(under.map(|(permission, ..)| Scope { permission: *permission, resource: None }));
                if scopes.len() == before {
                    return Err(BadScope(text.chars().take(120).collect()));
                }
            }
            None => scopes.push(text.parse()?),
        }
    }
    Ok(scopes)
}

/// What somebody may do in one workspace.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) role: Role,
    /// What of the role counts; `None`: all of it. Keys have these.
    scopes: Option<Vec<Scope>>,
    /// What counts beyond the role. Users have these.
    grants: Vec<Scope>,
}

impl Access {
    /// A user's: the role and what was granted beside it.
    pub(crate) fn of_user(role: Role, grants: Vec<Scope>) -> Access {
        Access { role, scopes: None, grants }
    }

    /// A key's: the role within the scopes.
    pub(crate) fn of_key(role: Role, scopes: Option<Vec<Scope>>) -> Access {
        Access { role, scopes, grants: Vec::new() }
    }

    /// Whether it is cut to some permissions: what no permission stands for is then not in it.
    pub(crate) fn is_scoped(&self) -> bool {
        self.scopes.is_some()
    }

    /// Whether `permission` is held on `resource`; without one, in the whole workspace.
    pub(crate) fn may(&self, permission: Permission, resource: Option<&str>) -> bool {
        let holds = |scopes: &[Scope]| scopes.iter().any(|scope| scope.allows(permission, resource));
        holds(&self.grants) || (self.role.may(permission) && self.scopes.as_deref().is_none_or(holds))
    }

    /// Whether `permission` is held on some resource at least.
    pub(crate) fn may_somewhere(&self, permission: Permission) -> bool {
        let holds = |scopes: &[Scope]| scopes.iter().any(|scope| scope.permission == permission);
        holds(&self.grants) || (self.role.may(permission) && self.scopes.as_deref().is_none_or(holds))
    }

    /// Whether a key or grant with these scopes of `role` gives away no more than is held.
    pub(crate) fn covers(&self, role: Role, scopes: Option<&[Scope]>) -> bool {
        match scopes {
            None => role.row().2.iter().all(|permission| self.may(*permission, None)),
            Some(scopes) => scopes.iter().all(|scope| self.may(scope.permission, scope.resource.as_deref())),
        }
    }

    /// The names of what is held in the whole workspace, and all scopes on single resources.
    pub(crate) fn names(&self) -> Vec<String> {
        let whole = PERMISSIONS.iter().filter(|(permission, ..)| self.may(*permission, None));
        let mut names: Vec<String> = whole.map(|(_, name, _)| (*name).to_owned()).collect();
        let scopes = self.grants.iter().chain(self.scopes.iter().flatten());
        names.extend(scopes.filter(|scope| scope.resource.is_some()).map(Scope::to_string));
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scopes(texts: &[&str]) -> Vec<Scope> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_role_reads_back_as_it_is_written() {
        for (role, name, _) in ROLES {
            assert_eq!((role.as_str(), name.parse::<Role>().unwrap()), (name, role));
            assert_eq!(serde_json::to_value(role).unwrap(), name);
        }
        let error = "root".parse::<Role>().unwrap_err().to_string();
        assert!(ROLES.iter().all(|(_, name, _)| error.contains(name)), "{error}");
    }

    #[test]
    fn every_permission_has_its_name_and_the_owner_has_every_permission() {
        for (permission, name, _) in PERMISSIONS {
            assert_eq!(permission.as_str(), *name);
            assert!(Role::Owner.may(*permission) && Role::Admin.may(*permission), "{name}");
        }
    }

    #[test]
    fn who_reads_only_may_change_nothing() {
        let is_change = |name: &str| !name.ends_with(":read") && name != "query:run";
        for reader in [Role::Viewer, Role::LimitedPartner, Role::Guest] {
            for (permission, name, _) in PERMISSIONS.iter().filter(|(_, name, _)| is_change(name)) {
                assert!(!reader.may(*permission), "{reader} {name}");
            }
        }
    }

    #[test]
    fn only_owners_and_admins_manage_and_delete() {
        for (role, ..) in ROLES {
            let trusted = matches!(role, Role::Owner | Role::Admin);
            assert_eq!((role.may(WorkspaceManage), role.may(WorkspaceDelete)), (trusted, trusted), "{role}");
        }
    }

    #[test]
    fn nobody_gives_away_more_than_they_have() {
        let covers = |role, other| Access::of_user(role, Vec::new()).covers(other, None);
        assert!(covers(Role::Owner, Role::Admin) && covers(Role::GeneralPartner, Role::Analyst));
        assert!(!covers(Role::Analyst, Role::Associate) && !covers(Role::GeneralPartner, Role::Owner));
        let key = Access::of_key(Role::Owner, Some(scopes(&["workspace:manage", "metric:read"])));
        assert!(!key.covers(Role::Viewer, None) && !key.covers(Role::Viewer, Some(&scopes(&["stream:read"]))));
        assert!(key.covers(Role::Viewer, Some(&scopes(&["metric:read@metrics/a"]))));
    }

    #[test]
    fn a_grant_adds_to_the_role_and_a_scope_takes_from_it() {
        let guest = Access::of_user(Role::Guest, scopes(&["portfolio:read@portfolio/main"]));
        assert!(guest.may(PortfolioRead, Some("portfolio/main")) && guest.may_somewhere(PortfolioRead));
        assert!(!guest.may(PortfolioRead, Some("portfolio/other")) && !guest.may(PortfolioRead, None));
        assert!(!guest.may_somewhere(MetricRead));
        assert_eq!(guest.names(), ["portfolio:read@portfolio/main"]);
        let key = Access::of_key(Role::Associate, Some(scopes(&["stream:ingest", "audit:read"])));
        assert!(key.may(StreamIngest, Some("streams/market.trades")) && !key.may(StreamRead, None));
        // a scope is never more than the role
        assert!(!key.may(AuditRead, None));
        assert_eq!(key.names(), ["stream:ingest"]);
    }

    #[test]
    fn a_scope_reads_back_as_it_is_written_and_others_are_refused() {
        for good in ["metric:read", "fund:performance:read@portfolio/main", "stream:ingest@streams/market.trades"] {
            assert_eq!(good.parse::<Scope>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "metric",
            "metric:*",
            "metric:read@",
            "metric:read@portfolio/x",
            "portfolio:read@portfolio/",
            "audit:read@alerts",
            "stream:read@streams/a b",
        ] {
            assert!(bad.parse::<Scope>().unwrap_err().to_string().contains("no scope"), "{bad}");
        }
        let metrics = parse_scopes(&["metric:*".into(), "audit:read".into()]).unwrap();
        assert_eq!(metrics, scopes(&["metric:read", "metric:define", "audit:read"]));
        assert!(parse_scopes(&["nothing:*".into()]).is_err() && parse_scopes(&["*".into()]).is_err());
    }
}
