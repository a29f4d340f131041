//! The audit log: who did what, from where, and what came of it. Entries are added and read, never changed.

use super::db::{Builder, FromRow, Row, Scope, query};
use super::page;
use super::record::Columns;
use super::{Store, StoreError, failed};
use engine::event::{Micros, WorkspaceId};

/// One act, done or refused.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditEntry {
    pub at: Micros,
    /// `None` for what concerns the whole installation. It need not exist: refused attempts are recorded too.
    pub workspace: Option<WorkspaceId>,
    pub actor: String,
    pub action: String,
    pub target: String,
    pub outcome: String,
    /// Network address, or what else the actor came by.
    pub from: String,
    pub request_id: String,
}

impl FromRow for AuditEntry {
    fn from_row(row: &Row) -> Result<AuditEntry, sqlx::Error> {
        let in_workspace = row.try_get::<Option<String>>("workspace")?.is_some();
        Ok(AuditEntry {
            at: row.time("at")?,
            workspace: if in_workspace { Some(row.name("workspace")?) } else { None },
            actor: row.try_get("actor")?,
            action: row.try_get("action")?,
            target: row.try_get("target")?,
            outcome: row.try_get("outcome")?,
            from: row.try_get("came_from")?,
            request_id: row.try_get("request_id")?,
        })
    }
}

/// An entry and its place in the log, which a page ends at.
struct Placed {
    seq: i64,
    entry: AuditEntry,
}

impl FromRow for Placed {
    fn from_row(row: &Row) -> Result<Placed, sqlx::Error> {
        Ok(Placed { seq: row.try_get("seq")?, entry: AuditEntry::from_row(row)? })
    }
}

impl Store {
    /// Adds an entry at the end.
    pub async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        query(
            "INSERT INTO audit (at, workspace, actor, action, target, outcome, came_from, request_id) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(entry.at)
        .bind(entry.workspace.as_ref().map(WorkspaceId::as_str))
        .bind(&entry.actor)
        .bind(&entry.action)
        .bind(&entry.target)
        .bind(&entry.outcome)
        .bind(&entry.from)
        .bind(&entry.request_id)
        .execute(self.write(Scope::Installation))
        .await
        .map_err(failed("write audit entry"))?;
        Ok(())
    }

    /// A page of a workspace's entries, newest first, and the cursor of the next page if there is one. At least one
    /// row a page; [`StoreError::Cursor`] for a `before` that no page gave.
    pub async fn audit_log(
        &self,
        workspace: &WorkspaceId,
        limit: usize,
        before: Option<&str>,
    ) -> Result<(Vec<AuditEntry>, Option<String>), StoreError> {
        let mut sql = Builder::new("SELECT * FROM audit WHERE workspace = ");
        sql.push_bind(workspace.as_str());
        if let Some(seq) = page::position::<i64>(before)? {
            sql.push(" AND seq < ").push_bind(seq);
        }
        sql.push(" ORDER BY seq DESC LIMIT ").push_bind(page::rows_to_read(limit));
        let rows: Vec<Placed> =
            sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("read audit log"))?;
        let (rows, next) = page::cut(rows, limit, |placed| placed.seq);
        Ok((rows.into_iter().map(|placed| placed.entry).collect(), next))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[tokio::test]
    async fn a_workspace_reads_its_own_entries_newest_first_in_pages() {
        let (store, _dir) = store().await;
        let entry = |workspace: Option<&str>, at| AuditEntry {
            at: Micros(at),
            workspace: workspace.map(name),
            actor: "ann".into(),
            action: "login".into(),
            target: "ann".into(),
            outcome: "refused".into(),
            from: "::1".into(),
            request_id: "r".into(),
        };
        for at in 0..5 {
            store.audit(&entry(Some("acme"), at)).await.unwrap();
            store.audit(&entry(Some("other"), at)).await.unwrap();
            store.audit(&entry(None, at)).await.unwrap();
        }
        let (first, next) = store.audit_log(&name("acme"), 3, None).await.unwrap();
        assert_eq!(first, [4, 3, 2].map(|at| entry(Some("acme"), at)));
        let (second, next) = store.audit_log(&name("acme"), 3, next.as_deref()).await.unwrap();
        assert_eq!(second, [1, 0].map(|at| entry(Some("acme"), at)));
        assert_eq!(next, None);
    }
}
