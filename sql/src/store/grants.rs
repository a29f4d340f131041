//! Grants: what a member may do beyond the role, mostly with one resource.

use super::db::{FromRow, Row, query, query_as, query_scalar};
use super::record::Columns;
use super::{Store, StoreError, failed};
use engine::event::{Micros, WorkspaceId};

/// One scope given to one member.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// Id of the user.
    pub user: String,
    pub email: String,
    pub scope: String,
    pub created_by: String,
    pub created_at: Micros,
}

impl FromRow for Grant {
    fn from_row(row: &Row) -> Result<Grant, sqlx::Error> {
        Ok(Grant {
            user: row.try_get("user_id")?,
            email: row.try_get("email")?,
            scope: row.try_get("scope")?,
            created_by: row.try_get("created_by")?,
            created_at: row.time("created_at")?,
        })
    }
}

impl Store {
    /// Gives a member a scope; the first time stands. [`StoreError::Missing`] for somebody who is no member.
    pub async fn put_grant(&self, workspace: &WorkspaceId, grant: &Grant) -> Result<(), StoreError> {
        query(
            "INSERT INTO grants (workspace, user_id, scope, created_by, created_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (workspace, user_id, scope) DO NOTHING",
        )
        .bind(workspace.as_str())
        .bind(&grant.user)
        .bind(&grant.scope)
        .bind(&grant.created_by)
        .bind(grant.created_at)
        .execute(self.write(workspace))
        .await
        .map_err(failed("put grant"))?;
        Ok(())
    }

    /// Takes a scope back: whether it was given.
    pub async fn delete_grant(&self, workspace: &WorkspaceId, user: &str, scope: &str) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM grants WHERE workspace = $1 AND user_id = $2 AND scope = $3")
            .bind(workspace.as_str())
            .bind(user)
            .bind(scope)
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete grant"))?;
        Ok(deleted > 0)
    }

    /// All grants of a workspace by e-mail address and scope.
    pub async fn grants(&self, workspace: &WorkspaceId) -> Result<Vec<Grant>, StoreError> {
        query_as(
            "SELECT g.*, u.email FROM grants g JOIN users u ON u.id = g.user_id WHERE g.workspace = $1 \
             ORDER BY u.email, g.scope",
        )
        .bind(workspace.as_str())
        .fetch_all(self.read(workspace))
        .await
        .map_err(failed("list grants"))
    }

    /// The scopes a member was given.
    pub async fn granted(&self, workspace: &WorkspaceId, user: &str) -> Result<Vec<String>, StoreError> {
        query_scalar("SELECT scope FROM grants WHERE workspace = $1 AND user_id = $2 ORDER BY scope")
            .bind(workspace.as_str())
            .bind(user)
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("read grants"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[tokio::test]
    async fn a_grant_lasts_until_it_is_taken_back_or_its_member_leaves() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        add_user(&store, "bob").await;
        let grant = |scope: &str| Grant {
            user: "bob".into(),
            email: "bob@example.com".into(),
            scope: scope.into(),
            created_by: "acme".into(),
            created_at: Micros(2),
        };
        assert!(matches!(store.put_grant(&acme, &grant("a")).await, Err(StoreError::Missing { .. })));
        store.set_member(&acme, "bob", "guest", Micros(1)).await.unwrap();
        for scope in ["b", "a", "a"] {
            store.put_grant(&acme, &grant(scope)).await.unwrap();
        }
        assert_eq!(store.grants(&acme).await.unwrap(), [grant("a"), grant("b")]);
        assert!(store.delete_grant(&acme, "bob", "a").await.unwrap());
        assert!(!store.delete_grant(&acme, "bob", "a").await.unwrap());
        assert_eq!(store.granted(&acme, "bob").await.unwrap(), ["b"]);
        store.remove_member(&acme, "bob").await.unwrap();
        assert!(store.grants(&acme).await.unwrap().is_empty());
    }
}
