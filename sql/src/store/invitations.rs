//! Who is asked to become a member, by address, known here or not.

use super::db::{FromRow, Row, Scope, query, query_as};
use super::record::Columns;
use super::workspaces::Workspace;
use super::{Store, StoreError, failed};
use engine::event::{Micros, WorkspaceId};
use serde_json::json;

/// What an address is asked to.
#[derive(Clone, Debug, PartialEq)]
pub struct Invitation {
    /// In lower case.
    pub email: String,
    pub role: String,
    /// What is granted beyond the role.
    pub scopes: Vec<String>,
    pub invited_by: String,
    pub invited_at: Micros,
}

impl FromRow for Invitation {
    fn from_row(row: &Row) -> Result<Invitation, sqlx::Error> {
        let scopes = row.json("scopes_json")?;
        let scopes = scopes.as_array().into_iter().flatten().filter_map(|scope| scope.as_str().map(str::to_owned));
        Ok(Invitation {
            email: row.try_get("email")?,
            role: row.try_get("role")?,
            scopes: scopes.collect(),
            invited_by: row.try_get("invited_by")?,
            invited_at: row.time("invited_at")?,
        })
    }
}

impl Store {
    /// Invites an address, or changes what it is invited to. [`StoreError::Missing`] when there is no such workspace.
    pub async fn put_invitation(&self, workspace: &WorkspaceId, invitation: &Invitation) -> Result<(), StoreError> {
        query(
            "INSERT INTO invitations (workspace, email, role, scopes_json, invited_by, invited_at) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (workspace, email) DO UPDATE SET role = excluded.role, \
             scopes_json = excluded.scopes_json, invited_by = excluded.invited_by",
        )
        .bind(workspace.as_str())
        .bind(&invitation.email)
        .bind(&invitation.role)
        .bind(json!(invitation.scopes).to_string())
        .bind(&invitation.invited_by)
        .bind(invitation.invited_at)
        .execute(self.write(workspace))
        .await
        .map_err(failed("invite"))?;
        Ok(())
    }

    pub async fn invitation(&self, workspace: &WorkspaceId, email: &str) -> Result<Option<Invitation>, StoreError> {
        query_as("SELECT * FROM invitations WHERE workspace = $1 AND email = $2")
            .bind(workspace.as_str())
            .bind(email)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read invitation"))
    }

    /// The invitations of a workspace by address.
    pub async fn invitations(&self, workspace: &WorkspaceId) -> Result<Vec<Invitation>, StoreError> {
        query_as("SELECT * FROM invitations WHERE workspace = $1 ORDER BY email")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list invitations"))
    }

    /// The workspaces that an address is invited to, by id, with the role in each.
    pub async fn invited_to(&self, email: &str) -> Result<Vec<(Workspace, String)>, StoreError> {
        let of_address = "SELECT w.*, i.role FROM invitations i JOIN workspaces w ON w.id = i.workspace \
                          WHERE i.email = $1 ORDER BY w.id";
        query_as(of_address)
            .bind(email)
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list invitations of an address"))
    }

    /// Takes an invitation back: whether there was one.
    pub async fn delete_invitation(&self, workspace: &WorkspaceId, email: &str) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM invitations WHERE workspace = $1 AND email = $2")
            .bind(workspace.as_str())
            .bind(email)
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete invitation"))?;
        Ok(deleted > 0)
    }

    /// Makes a user a member as the user's address is invited to: whether it is still invited.
    pub async fn accept_invitation(
        &self,
        workspace: &WorkspaceId,
        email: &str,
        user: &str,
        at: Micros,
    ) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            let accepted: Option<Invitation> =
                query_as("DELETE FROM invitations WHERE workspace = $1 AND email = $2 RETURNING *")
                    .bind(workspace.as_str())
                    .bind(email)
                    .fetch_optional(&mut tx)
                    .await?;
            let Some(invitation) = accepted else { return Ok(false) };
            query(
                "INSERT INTO members (workspace, user_id, role, since) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT DO NOTHING",
            )
            .bind(workspace.as_str())
            .bind(user)
            .bind(&invitation.role)
            .bind(at)
            .execute(&mut tx)
            .await?;
            for scope in &invitation.scopes {
                query(
                    "INSERT INTO grants (workspace, user_id, scope, created_by, created_at) \
                     VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
                )
                .bind(workspace.as_str())
                .bind(user)
                .bind(scope)
                .bind(&invitation.invited_by)
                .bind(invitation.invited_at)
                .execute(&mut tx)
                .await?;
            }
            tx.commit().await?;
            Ok(true)
        }
        .await
        .map_err(failed("accept invitation"))
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    pub fn invitation(email: &str, role: &str, scopes: &[&str]) -> Invitation {
        let scopes = scopes.iter().map(|scope| (*scope).to_owned()).collect();
        Invitation { email: email.into(), role: role.into(), scopes, invited_by: "ann".into(), invited_at: Micros(3) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::testing::invitation;
    use super::*;

    #[tokio::test]
    async fn an_invitation_is_changed_taken_back_and_accepted_once() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        add_user(&store, "bob").await;
        let bob = "bob@example.com";
        store.put_invitation(&acme, &invitation(bob, "guest", &[])).await.unwrap();
        store.put_invitation(&acme, &invitation("new@example.com", "viewer", &[])).await.unwrap();
        let changed = invitation(bob, "viewer", &["portfolio:read"]);
        let later = Invitation { invited_at: Micros(4), ..changed.clone() };
        store.put_invitation(&acme, &later).await.unwrap();
        assert_eq!(store.invitation(&acme, bob).await.unwrap(), Some(changed), "it keeps its date");
        assert_eq!(store.invitation(&other, bob).await.unwrap(), None);
        let to: Vec<String> =
            store.invited_to(bob).await.unwrap().into_iter().map(|(w, role)| format!("{} {role}", w.id)).collect();
        assert_eq!(to, ["acme viewer"]);

        assert!(!store.accept_invitation(&other, bob, "bob", Micros(9)).await.unwrap());
        assert!(store.accept_invitation(&acme, bob, "bob", Micros(9)).await.unwrap());
        assert!(!store.accept_invitation(&acme, bob, "bob", Micros(9)).await.unwrap());
        assert_eq!(store.role(&acme, "bob").await.unwrap().as_deref(), Some("viewer"));
        assert_eq!(store.granted(&acme, "bob").await.unwrap(), ["portfolio:read"]);
        assert_eq!(store.members(&acme).await.unwrap()[1].since, Micros(9));

        let left: Vec<String> = store.invitations(&acme).await.unwrap().into_iter().map(|one| one.email).collect();
        assert_eq!(left, ["new@example.com"]);
        assert!(store.delete_invitation(&acme, "new@example.com").await.unwrap());
        assert!(!store.delete_invitation(&acme, "new@example.com").await.unwrap());
    }
}
