//! Workspaces and their members.

use super::db::{FromRow, Row, Scope, query, query_as, query_scalar};
use super::record::Columns;
use super::{Store, StoreError, audit, failed};
use engine::event::{Micros, WorkspaceId};

/// A tenant.
#[derive(Clone, Debug, PartialEq)]
pub struct Workspace {
    pub id: WorkspaceId,
    pub name: String,
    /// The pack it was made from.
    pub pack: Option<String>,
    pub tier: String,
    pub created_at: Micros,
}

/// A user's place in a workspace.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Id of the user.
    pub user: String,
    pub email: String,
    pub role: String,
    pub since: Micros,
}

impl FromRow for Workspace {
    fn from_row(row: &Row) -> Result<Workspace, sqlx::Error> {
        Ok(Workspace {
            id: row.name("id")?,
            name: row.try_get("name")?,
            pack: row.try_get("pack")?,
            tier: row.try_get("tier")?,
            created_at: row.time("created_at")?,
        })
    }
}

/// With the role that somebody has in it.
impl FromRow for (Workspace, String) {
    fn from_row(row: &Row) -> Result<Self, sqlx::Error> {
        Ok((Workspace::from_row(row)?, row.try_get("role")?))
    }
}

impl FromRow for Member {
    fn from_row(row: &Row) -> Result<Member, sqlx::Error> {
        Ok(Member {
            user: row.try_get("user_id")?,
            email: row.try_get("email")?,
            role: row.try_get("role")?,
            since: row.time("since")?,
        })
    }
}

impl Store {
    /// Adds a workspace with the user `owner` as its `owner`. [`StoreError::Exists`] when the id is taken,
    /// [`StoreError::Missing`] when there is no such user.
    pub async fn create_workspace(&self, workspace: &Workspace, owner: &str) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin((&workspace.id).into()).await?;
            query("INSERT INTO workspaces (id, name, pack, tier, created_at) VALUES ($1, $2, $3, $4, $5)")
                .bind(workspace.id.as_str())
                .bind(&workspace.name)
                .bind(&workspace.pack)
                .bind(&workspace.tier)
                .bind(workspace.created_at)
                .execute(&mut tx)
                .await?;
            query("INSERT INTO members (workspace, user_id, role, since) VALUES ($1, $2, 'owner', $3)")
                .bind(workspace.id.as_str())
                .bind(owner)
                .bind(workspace.created_at)
                .execute(&mut tx)
                .await?;
            tx.commit().await
        }
        .await
        .map_err(failed("create workspace"))
    }

    pub async fn workspace(&self, id: &WorkspaceId) -> Result<Option<Workspace>, StoreError> {
        query_as("SELECT * FROM workspaces WHERE id = $1")
            .bind(id.as_str())
            .fetch_optional(self.read(id))
            .await
            .map_err(failed("read workspace"))
    }

    /// The workspaces a user is a member of, by id, with the role in each.
    pub async fn workspaces_of(&self, user: &str) -> Result<Vec<(Workspace, String)>, StoreError> {
        let of_user = "SELECT w.*, m.role FROM members m JOIN workspaces w ON w.id = m.workspace \
                       WHERE m.user_id = $1 ORDER BY w.id";
        query_as(of_user)
            .bind(user)
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list workspaces of user"))
    }

    /// All workspaces by id.
    pub async fn all_workspaces(&self) -> Result<Vec<Workspace>, StoreError> {
        query_as("SELECT * FROM workspaces ORDER BY id")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list workspaces"))
    }

    /// Changes what is given and leaves the rest: the workspace as it is then, `None` when there is none.
    pub async fn update_workspace(
        &self,
        id: &WorkspaceId,
        name: Option<&str>,
        tier: Option<&str>,
    ) -> Result<Option<Workspace>, StoreError> {
        let update = query_as(
            "UPDATE workspaces SET name = COALESCE($2, name), tier = COALESCE($3, tier) WHERE id = $1 RETURNING *",
        );
        update
            .bind(id.as_str())
            .bind(name)
            .bind(tier)
            .fetch_optional(self.write(id))
            .await
            .map_err(failed("update workspace"))
    }

    /// Deletes a workspace and everything in it, what its audit log says too: whether there was one. What its engine
    /// has not committed yet is refused from then on ([`StoreError::NoWorkspace`]).
    pub async fn delete_workspace(&self, id: &WorkspaceId) -> Result<bool, StoreError> {
        async {
            // of the whole installation: the emptied entries of the audit log belong to no workspace
            let mut tx = self.db.begin(Scope::Installation).await?;
            // The workspace first: a commit under way holds it, and is waited for or refused. All tables but two
            // follow by cascade.
            let deleted = query("DELETE FROM workspaces WHERE id = $1").bind(id.as_str()).execute(&mut tx).await?;
            audit::empty(&mut tx, id).await?;
            if self.rollups {
                query("SELECT forget_samples($1, NULL, 'infinity')").bind(id.as_str()).execute(&mut tx).await?;
            }
            query("DELETE FROM final_rows WHERE workspace = $1").bind(id.as_str()).execute(&mut tx).await?;
            tx.commit().await?;
            self.reached.forget(id);
            Ok(deleted > 0)
        }
        .await
        .map_err(failed("delete workspace"))
    }

    /// Makes a user a member with this role, or changes the role and leaves `since`. [`StoreError::Missing`] when
    /// there is no such workspace or user.
    pub async fn set_member(
        &self,
        workspace: &WorkspaceId,
        user: &str,
        role: &str,
        at: Micros,
    ) -> Result<(), StoreError> {
        query(
            "INSERT INTO members (workspace, user_id, role, since) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (workspace, user_id) DO UPDATE SET role = excluded.role",
        )
        .bind(workspace.as_str())
        .bind(user)
        .bind(role)
        .bind(at)
        .execute(self.write(workspace))
        .await
        .map_err(failed("set member"))?;
        Ok(())
    }

    /// Ends a membership: whether there was one.
    pub async fn remove_member(&self, workspace: &WorkspaceId, user: &str) -> Result<bool, StoreError> {
        let removed = query("DELETE FROM members WHERE workspace = $1 AND user_id = $2")
            .bind(workspace.as_str())
            .bind(user)
            .execute(self.write(workspace))
            .await
            .map_err(failed("remove member"))?;
        Ok(removed > 0)
    }

    /// The members of a workspace by e-mail address.
    pub async fn members(&self, workspace: &WorkspaceId) -> Result<Vec<Member>, StoreError> {
        query_as(
            "SELECT m.user_id, u.email, m.role, m.since FROM members m JOIN users u ON u.id = m.user_id \
             WHERE m.workspace = $1 ORDER BY u.email",
        )
        .bind(workspace.as_str())
        .fetch_all(self.read(workspace))
        .await
        .map_err(failed("list members"))
    }

    /// A user's role in a workspace, `None` for a user who is no member.
    pub async fn role(&self, workspace: &WorkspaceId, user: &str) -> Result<Option<String>, StoreError> {
        query_scalar("SELECT role FROM members WHERE workspace = $1 AND user_id = $2")
            .bind(workspace.as_str())
            .bind(user)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read role"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::db::Dialect;
    use super::super::invitations::testing::invitation;
    use super::super::testing::*;
    use super::super::*;
    use super::*;
    use engine::checkpoint::Changes;
    use serde_json::json;
    use std::collections::BTreeMap;

    #[tokio::test]
    async fn the_creator_owns_a_workspace_and_the_id_is_taken() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        assert_eq!(store.role(&acme, "acme").await.unwrap().as_deref(), Some("owner"));
        let again = store.workspace(&acme).await.unwrap().unwrap();
        assert!(matches!(store.create_workspace(&again, "acme").await, Err(StoreError::Exists { .. })));
    }

    #[tokio::test]
    async fn a_workspace_whose_creator_does_not_exist_is_not_made() {
        let (store, _dir) = store().await;
        let orphan =
            Workspace { id: name("acme"), name: "Acme".into(), pack: None, tier: "t".into(), created_at: Micros(1) };
        assert!(matches!(store.create_workspace(&orphan, "nobody").await, Err(StoreError::Missing { .. })));
        assert_eq!(store.all_workspaces().await.unwrap(), []);
    }

    #[tokio::test]
    async fn an_update_changes_what_is_given() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let before = store.workspace(&acme).await.unwrap().unwrap();
        let renamed = store.update_workspace(&acme, Some("Acme Inc"), None).await.unwrap().unwrap();
        assert_eq!(renamed, Workspace { name: "Acme Inc".into(), ..before });
        let moved = store.update_workspace(&acme, None, Some("gold")).await.unwrap().unwrap();
        assert_eq!(moved, Workspace { tier: "gold".into(), ..renamed });
        assert_eq!(store.workspace(&acme).await.unwrap(), Some(moved));
        assert_eq!(store.update_workspace(&name("none"), None, None).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_member_keeps_the_date_when_the_role_changes() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        add_workspace(&store, "other").await;
        add_user(&store, "bob").await;
        store.set_member(&acme, "bob", "viewer", Micros(5)).await.unwrap();
        store.set_member(&acme, "bob", "editor", Micros(9)).await.unwrap();
        let bob =
            Member { user: "bob".into(), email: "bob@example.com".into(), role: "editor".into(), since: Micros(5) };
        assert_eq!(store.members(&acme).await.unwrap()[1], bob);
        let of_bob = store.workspaces_of("bob").await.unwrap();
        assert_eq!(
            of_bob.iter().map(|(w, role)| (w.id.as_str(), role.as_str())).collect::<Vec<_>>(),
            [("acme", "editor")]
        );
        assert!(store.remove_member(&acme, "bob").await.unwrap());
        assert!(!store.remove_member(&acme, "bob").await.unwrap());
        assert_eq!(store.role(&acme, "bob").await.unwrap(), None);
        assert!(matches!(
            store.set_member(&acme, "nobody", "viewer", Micros(1)).await,
            Err(StoreError::Missing { .. })
        ));
    }

    /// Something of every kind in the workspace.
    async fn fill(store: &Store, workspace: &WorkspaceId) {
        let (ws, at) = (workspace.clone(), Micros(1));
        let key = ApiKey {
            id: "key".into(),
            workspace: ws.clone(),
            name: "key".into(),
            role: "editor".into(),
            scopes: None,
            key_hash: format!("hash of {ws}"),
            prefix: "tw_".into(),
            created_by: ws.to_string(),
            created_at: at,
            expires_at: None,
            revoked_at: None,
        };
        store.create_api_key(&key).await.unwrap();
        let grant = Grant {
            user: ws.to_string(),
            email: format!("{ws}@example.com"),
            scope: "portfolio:read".into(),
            created_by: ws.to_string(),
            created_at: at,
        };
        store.put_grant(&ws, &grant).await.unwrap();
        store.put_invitation(&ws, &invitation("bob@example.com", "viewer", &[])).await.unwrap();
        let stream = StreamRow {
            workspace: ws.clone(),
            stream: name("shop.orders"),
            schema_json: "{}".into(),
            created_at: at,
            updated_at: at,
        };
        store.put_stream(&stream).await.unwrap();
        store.put_table(&ws, &name("ref.persons"), &json!({}), 0, at).await.unwrap();
        store.put_metric(&ws, &name("vwap"), &json!({"sql": "SELECT 1"}), 0, at).await.unwrap();
        let silence = Silence {
            id: "s".into(),
            workspace: ws.clone(),
            matchers: json!({}),
            starts_at: at,
            ends_at: at,
            comment: "".into(),
            created_by: "ann".into(),
        };
        store.put_silence(&silence).await.unwrap();
        let portfolio = Portfolio {
            workspace: ws.clone(),
            id: "main".into(),
            name: "Main".into(),
            currency: "EUR".into(),
            created_at: at,
        };
        store.put_portfolio(&portfolio).await.unwrap();
        let position = Position { symbol: "AAPL".into(), qty: 1.0, cost: 2.0, sector: None };
        store.put_positions(&ws, "main", &[position]).await.unwrap();
        let thread = Thread {
            workspace: ws.clone(),
            id: "thread".into(),
            agent: "analyst".into(),
            title: "".into(),
            created_by: "ann".into(),
            created_at: at,
            updated_at: at,
            state: json!({}),
        };
        store.upsert_thread(&thread).await.unwrap();
        let message = Message { id: "m".into(), role: "user".into(), content: json!({}), run_id: None, created_at: at };
        store.append_messages(&ws, "thread", &[message]).await.unwrap();
        let run = Run {
            workspace: ws.clone(),
            thread: "thread".into(),
            run_id: "run".into(),
            agent: "analyst".into(),
            status: "running".into(),
            started_at: at,
            finished_at: None,
            error: None,
        };
        store.insert_run(&run).await.unwrap();
        store.append_run_events(&ws, "run", 0, &["{}".into()]).await.unwrap();
        let entry = AuditEntry {
            at,
            workspace: Some(ws.clone()),
            actor: "ann".into(),
            action: "create".into(),
            target: "key".into(),
            outcome: "ok".into(),
            from: "127.0.0.1".into(),
            request_id: "r".into(),
        };
        store.audit(&entry).await.unwrap();
        store.create_webhook(&super::super::webhooks::testing::webhook(&ws, "webhook")).await.unwrap();
        let parts = vec![("part".to_owned(), vec![1])];
        let commit = Commit {
            state: Some(Changes { parts, ..Changes::default() }),
            rows: vec![super::super::rows::testing::row("vwap", 0, "A", 0)],
            alerts: vec![super::super::alerts::testing::alert(&ws, "alert", 1)],
            notices: vec![super::super::webhooks::testing::notice("alert.firing", "alert", 1)],
            dead_letters: vec![super::super::dead_letters::testing::letter("shop.orders", 1)],
            rules: vec![super::super::RuleChange { name: name("drop"), definition: Some((json!({}), 0)), at }],
            ..super::super::checkpoints::testing::commit(&ws, 1)
        };
        store.commit(&[commit]).await.unwrap();
        // tables that only products write so far
        for insert in [
            "INSERT INTO funds (workspace, id, name, currency, committed, created_at, updated_at) \
             VALUES ($1, 'f', 'Fund', 'EUR', '1000000.05', $2, $2)",
            "INSERT INTO companies (workspace, id, name, details_json, created_at, updated_at) \
             VALUES ($1, 'c', 'Company', '{}', $2, $2)",
            "INSERT INTO investments (workspace, id, fund, company, amount, currency, ownership, invested_at) \
             VALUES ($1, 'i', 'f', 'c', '250000.10', 'EUR', '0.125', $2)",
            "INSERT INTO deals (workspace, id, company, stage, currency, owner, opened_at) \
             VALUES ($1, 'd', 'c', 'sourced', 'EUR', 'ann', $2)",
            "INSERT INTO market_snapshots (workspace, symbol, at, source, price, currency) \
             VALUES ($1, 'AAPL', $2, 'close', '189.95', 'USD')",
            "INSERT INTO ai_interactions (workspace, id, agent, model, asked_by, tokens_in, tokens_out, cost, currency, \
             elapsed_ms, outcome, started_at) \
             VALUES ($1, 'a', 'analyst', 'm', 'ann', 10, 20, '0.0031', 'USD', 900, 'finished', $2)",
        ] {
            query(insert).bind(ws.as_str()).bind(at).execute(store.write(&ws)).await.unwrap();
        }
    }

    /// Rows of the workspace in each table of the database.
    async fn rows_of(store: &Store, workspace: &WorkspaceId) -> BTreeMap<String, i64> {
        // Tables that belong to no workspace. A new table is either named here or has a column `workspace`.
        let shared = [
            "users",
            "refresh_families",
            "refresh_tokens",
            "totp",
            "identities",
            "meta",
            "_sqlx_migrations",
            "sqlite_sequence",
        ];
        let tables = match store.db.dialect() {
            Dialect::Sqlite => "SELECT name FROM sqlite_master WHERE type = 'table'",
            Dialect::Postgres => "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'",
        };
        let tables: Vec<String> = query_scalar(tables).fetch_all(store.read(Scope::Installation)).await.unwrap();
        let mut counts = BTreeMap::new();
        for table in tables.into_iter().filter(|table| !shared.contains(&table.as_str())) {
            let column = if table == "workspaces" { "id" } else { "workspace" };
            let count = format!("SELECT COUNT(*) FROM {table} WHERE {column} = $1");
            let count = query_scalar(count).bind(workspace.as_str());
            counts.insert(table, count.fetch_one(store.read(Scope::Installation)).await.unwrap());
        }
        counts
    }

    #[tokio::test]
    async fn a_deleted_workspace_leaves_no_row_in_any_table_and_others_keep_theirs() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        fill(&store, &acme).await;
        fill(&store, &other).await;
        let before = rows_of(&store, &other).await;
        assert!(before.values().all(|n| *n > 0), "fill() leaves a table empty: {before:?}");

        assert!(store.delete_workspace(&acme).await.unwrap());
        let left = rows_of(&store, &acme).await;
        assert!(left.values().all(|n| *n == 0), "{left:?}");
        assert_eq!(rows_of(&store, &other).await, before);
        assert!(!store.delete_workspace(&acme).await.unwrap());
    }

    #[tokio::test]
    async fn a_foreign_workspace_sees_nothing() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        fill(&store, &acme).await;
        let metric = name("vwap");

        assert_eq!(store.role(&other, "acme").await.unwrap(), None);
        assert!(store.members(&other).await.unwrap().iter().all(|m| m.user == "other"));
        assert_eq!(store.invitations(&other).await.unwrap(), []);
        assert!(store.list_api_keys(&other).await.unwrap().is_empty());
        assert!(!store.revoke_api_key(&other, "key", Micros(2)).await.unwrap());
        assert!(store.streams(&other).await.unwrap().is_empty());
        assert!(store.metrics(&other).await.unwrap().is_empty());
        assert!(!store.delete_metric(&other, &metric).await.unwrap());
        assert!(store.rows(&other, &metric, &RowQuery::first(10)).await.unwrap().0.is_empty());
        assert_eq!(store.prune_rows(&other, &metric, Micros::MAX).await.unwrap(), 0);
        assert!(store.alert_rules(&other).await.unwrap().is_empty());
        assert!(store.alerts(&other, None, 10, None).await.unwrap().0.is_empty());
        assert!(store.alert(&other, "alert").await.unwrap().is_none());
        assert!(store.ack_alert(&other, "alert", "eve", Micros(2)).await.unwrap().is_none());
        assert!(store.silences(&other).await.unwrap().is_empty());
        assert!(!store.delete_silence(&other, "s").await.unwrap());
        assert!(store.webhooks(&other).await.unwrap().is_empty());
        assert!(store.webhook(&other, "webhook").await.unwrap().is_none());
        assert!(!store.delete_webhook(&other, "webhook").await.unwrap());
        assert!(!store.disable_webhook(&other, "webhook", "why", Micros(2)).await.unwrap());
        assert!(store.deliveries(&other, "webhook", 10, None).await.unwrap().0.is_empty());
        assert!(store.add_delivery(&other, "webhook", ["msg_x", "webhook.test", "{}"], Micros(2)).await.is_err());
        assert!(store.portfolios(&other).await.unwrap().is_empty());
        assert!(store.portfolio(&other, "main").await.unwrap().is_none());
        assert!(store.positions(&other, "main").await.unwrap().is_empty());
        assert!(!store.delete_position(&other, "main", "AAPL").await.unwrap());
        assert!(!store.delete_portfolio(&other, "main").await.unwrap());
        assert!(store.replace_positions(&other, "main", &[]).await.is_err());
        assert!(store.thread(&other, "thread").await.unwrap().is_none());
        assert!(store.threads(&other, 10, None).await.unwrap().0.is_empty());
        assert!(store.messages(&other, "thread", 0, 10).await.unwrap().is_empty());
        assert!(store.run(&other, "run").await.unwrap().is_none());
        assert!(!store.finish_run(&other, "run", "finished", Micros(2), None).await.unwrap());
        assert!(store.run_events(&other, "run", 0).await.unwrap().is_empty());
        assert!(store.dead_letters(&other, None, 10, None).await.unwrap().0.is_empty());
        assert!(store.audit_log(&other, 10, None).await.unwrap().0.is_empty());
        assert!(store.checkpoint(&other).await.unwrap().is_none());

        let before = rows_of(&store, &acme).await;
        assert!(before.values().all(|n| *n > 0), "{before:?}");
        assert_eq!(store.alert(&acme, "alert").await.unwrap().unwrap().acked_at, None);
        assert_eq!(store.run(&acme, "run").await.unwrap().unwrap().finished_at, None);
        let rules = vec![super::super::RuleChange { name: name("drop"), definition: None, at: Micros(2) }];
        store.commit(&[Commit { rules, ..super::super::checkpoints::testing::commit(&other, 1) }]).await.unwrap();
        assert_eq!(store.alert_rules(&acme).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_row_of_one_workspace_cannot_point_into_another() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        fill(&store, &acme).await;
        let foreign = "INSERT INTO deals (workspace, id, fund, company, stage, currency, owner, opened_at) \
                       VALUES ($1, 'd', 'f', 'c', 'sourced', 'EUR', 'eve', $2)";
        let refused = query(foreign).bind(other.as_str()).bind(Micros(1)).execute(store.write(&other)).await;
        assert!(matches!(refused.map_err(failed("insert deal")), Err(StoreError::Missing { .. })));
    }

    /// The wall that holds when a statement forgets its `workspace = $1`: row-level security of PostgreSQL.
    #[tokio::test]
    async fn a_statement_without_its_workspace_still_sees_and_changes_only_its_own_rows() {
        let (store, _dir) = store().await;
        if store.db.dialect() == Dialect::Sqlite || store.rollups {
            return; // SQLite has no such wall; TimescaleDB compresses no table behind one, and its test is superuser
        }
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        fill(&store, &acme).await;
        fill(&store, &other).await;
        let before = rows_of(&store, &other).await;
        for table in before.keys() {
            let count = format!("SELECT COUNT(*) FROM {table}");
            let seen: i64 = query_scalar(count).fetch_one(store.read(&acme)).await.unwrap();
            assert_eq!(seen, rows_of(&store, &acme).await[table], "{table} shows rows of another workspace");
            let column = if table == "workspaces" { "id" } else { "workspace" };
            let touched = format!("UPDATE {table} SET {column} = {column} WHERE {column} = 'other'");
            assert_eq!(query(touched).execute(store.write(&acme)).await.unwrap(), 0, "{table}");
            let moved = format!("UPDATE {table} SET {column} = 'other'");
            assert!(query(moved).execute(store.write(&acme)).await.is_err(), "{table}: a row changed its workspace");
        }
        let foreign = "INSERT INTO funds (workspace, id, name, currency, created_at, updated_at) \
                       VALUES ('other', 'x', 'x', 'EUR', $1, $1)";
        assert!(query(foreign).bind(Micros(1)).execute(store.write(&acme)).await.is_err());
        query("DELETE FROM final_rows").execute(store.write(&acme)).await.unwrap();
        assert_eq!(rows_of(&store, &other).await, before);
    }
}
