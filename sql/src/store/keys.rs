//! API keys: kept hashed, each good for one workspace and role.

use super::db::{FromRow, Row, Scope, query, query_as};
use super::record::Columns;
use super::{Store, StoreError, failed};
use engine::event::{Micros, WorkspaceId};

/// An API key as it is kept; the key itself is not.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiKey {
    pub id: String,
    pub workspace: WorkspaceId,
    pub name: String,
    pub role: String,
    /// What of its role the key may do; `None`: all of it.
    pub scopes: Option<Vec<String>>,
    pub key_hash: String,
    /// First characters of the key, for people to recognise it by.
    pub prefix: String,
    pub created_by: String,
    pub created_at: Micros,
    /// `None`: good until revoked.
    pub expires_at: Option<Micros>,
    pub revoked_at: Option<Micros>,
}

impl FromRow for ApiKey {
    fn from_row(row: &Row) -> Result<ApiKey, sqlx::Error> {
        Ok(ApiKey {
            id: row.try_get("id")?,
            workspace: row.name("workspace")?,
            name: row.try_get("name")?,
            role: row.try_get("role")?,
            scopes: match row.try_get::<Option<String>>("scopes_json")? {
                None => None,
                Some(json) => Some(serde_json::from_str(&json).map_err(|e| sqlx::Error::Decode(e.into()))?),
            },
            key_hash: row.try_get("key_hash")?,
            prefix: row.try_get("prefix")?,
            created_by: row.try_get("created_by")?,
            created_at: row.time("created_at")?,
            expires_at: row.time_if_any("expires_at")?,
            revoked_at: row.time_if_any("revoked_at")?,
        })
    }
}

impl Store {
    /// Adds a key. [`StoreError::Exists`] when its id or hash is taken, [`StoreError::Missing`] without its workspace.
    pub async fn create_api_key(&self, key: &ApiKey) -> Result<(), StoreError> {
        query(
            "INSERT INTO api_keys (workspace, id, name, role, key_hash, prefix, created_by, created_at, expires_at, \
             revoked_at, scopes_json) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(key.workspace.as_str())
        .bind(&key.id)
        .bind(&key.name)
        .bind(&key.role)
        .bind(&key.key_hash)
        .bind(&key.prefix)
        .bind(&key.created_by)
        .bind(key.created_at)
        .bind(key.expires_at)
        .bind(key.revoked_at)
        .bind(key.scopes.as_ref().map(|scopes| serde_json::json!(scopes).to_string()))
        .execute(self.write(&key.workspace))
        .await
        .map_err(failed("create API key"))?;
        Ok(())
    }

    /// The keys of a workspace, oldest first, revoked and expired ones too.
    pub async fn list_api_keys(&self, workspace: &WorkspaceId) -> Result<Vec<ApiKey>, StoreError> {
        query_as("SELECT * FROM api_keys WHERE workspace = $1 ORDER BY created_at, id")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list API keys"))
    }

    /// The key with this hash, of whatever workspace, revoked and expired ones too: the caller looks at both times.
    pub async fn api_key_by_hash(&self, key_hash: &str) -> Result<Option<ApiKey>, StoreError> {
        query_as("SELECT * FROM api_keys WHERE key_hash = $1")
            .bind(key_hash)
            .fetch_optional(self.read(Scope::Installation))
            .await
            .map_err(failed("read API key"))
    }

    /// Revokes a key: whether there is such a key that was not revoked before.
    pub async fn revoke_api_key(&self, workspace: &WorkspaceId, id: &str, at: Micros) -> Result<bool, StoreError> {
        let revoked =
            query("UPDATE api_keys SET revoked_at = $3 WHERE workspace = $1 AND id = $2 AND revoked_at IS NULL")
                .bind(workspace.as_str())
                .bind(id)
                .bind(at)
                .execute(self.write(workspace))
                .await
                .map_err(failed("revoke API key"))?;
        Ok(revoked > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[tokio::test]
    async fn a_key_is_found_by_its_hash_and_keeps_the_first_time_it_was_revoked() {
        let (store, _dir) = store().await;
        let key = ApiKey {
            id: "k".into(),
            workspace: add_workspace(&store, "acme").await,
            name: "ingest".into(),
            role: "writer".into(),
            scopes: Some(vec!["stream:ingest".into()]),
            key_hash: "hash".into(),
            prefix: "tw_ab".into(),
            created_by: "acme".into(),
            created_at: Micros(1),
            expires_at: Some(Micros(9)),
            revoked_at: None,
        };
        store.create_api_key(&key).await.unwrap();
        assert!(matches!(store.create_api_key(&key).await, Err(StoreError::Exists { .. })));
        let lost = ApiKey { workspace: name("none"), key_hash: "other".into(), ..key.clone() };
        assert!(matches!(store.create_api_key(&lost).await, Err(StoreError::Missing { .. })));
        assert_eq!(store.api_key_by_hash("hash").await.unwrap(), Some(key.clone()));
        assert_eq!(store.api_key_by_hash("none").await.unwrap(), None);

        assert!(store.revoke_api_key(&key.workspace, "k", Micros(5)).await.unwrap());
        assert!(!store.revoke_api_key(&key.workspace, "k", Micros(6)).await.unwrap());
        let revoked = ApiKey { revoked_at: Some(Micros(5)), ..key.clone() };
        assert_eq!(store.list_api_keys(&key.workspace).await.unwrap(), [revoked]);
    }
}
