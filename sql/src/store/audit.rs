//! The audit log: who did what, from where, and what came of it. Entries are added and read, never changed; each is
//! chained to the one before by a hash, so that a change made past this code shows.

use super::page;
use super::record::Columns;
use super::{Store, StoreError, failed};
use engine::event::{Micros, WorkspaceId};
use futures::TryStreamExt;
use sha2::{Digest, Sha256};
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{FromRow, QueryBuilder, Row, query, query_scalar};

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

impl FromRow<'_, SqliteRow> for AuditEntry {
    fn from_row(row: &SqliteRow) -> Result<AuditEntry, sqlx::Error> {
        let in_workspace = row.try_get::<Option<&str>, _>("workspace")?.is_some();
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

impl AuditEntry {
    /// SHA-256, in hexadecimal, of the hash before and this entry as a JSON array: h(n) = H(h(n-1) ‖ entry(n)).
    fn hash(&self, before: &str) -> String {
        let workspace = self.workspace.as_ref().map(WorkspaceId::as_str);
        let fields = (
            self.at.0,
            workspace,
            &self.actor,
            &self.action,
            &self.target,
            &self.outcome,
            &self.from,
            &self.request_id,
        );
        let text = serde_json::to_string(&fields).expect("numbers and text are JSON");
        let digest = Sha256::new().chain_update(before).chain_update(text).finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What the first hashed entry is chained to.
const GENESIS: &str = "";
/// Where `meta` keeps the hash of the last entry.
const HEAD: &str = "audit_head";

/// What a check of the whole audit log found.
#[derive(Clone, Debug, PartialEq)]
pub enum AuditCheck {
    /// Every entry is as it was written. `head` is the hash of the last one, empty without entries: whoever noted it
    /// elsewhere can tell later that nothing before it was changed.
    Intact { entries: u64, head: String },
    /// The entry with this number, or one before it, is not what was written: changed, added or removed.
    Broken { seq: i64 },
    /// Entries at the end are missing: the last one is not the one that was written last.
    Truncated { last: i64 },
}

/// An entry and its place in the log, which a page ends at.
struct Placed {
    seq: i64,
    entry: AuditEntry,
}

impl FromRow<'_, SqliteRow> for Placed {
    fn from_row(row: &SqliteRow) -> Result<Placed, sqlx::Error> {
        Ok(Placed { seq: row.try_get("seq")?, entry: AuditEntry::from_row(row)? })
    }
}

impl Store {
    /// Adds an entry at the end, chained to the one before.
    pub async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        async {
            let mut tx = self.begin().await?;
            let before: Option<String> =
                query_scalar("SELECT value FROM meta WHERE key = $1").bind(HEAD).fetch_optional(&mut *tx).await?;
            let hash = entry.hash(before.as_deref().unwrap_or(GENESIS));
            query(
                "INSERT INTO audit (at, workspace, actor, action, target, outcome, came_from, request_id, hash) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            )
            .bind(entry.at.0)
            .bind(entry.workspace.as_ref().map(WorkspaceId::as_str))
            .bind(&entry.actor)
            .bind(&entry.action)
            .bind(&entry.target)
            .bind(&entry.outcome)
            .bind(&entry.from)
            .bind(&entry.request_id)
            .bind(&hash)
            .execute(&mut *tx)
            .await?;
            query(
                "INSERT INTO meta (key, value) VALUES ($1, $2) \
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            )
            .bind(HEAD)
            .bind(&hash)
            .execute(&mut *tx)
            .await?;
            tx.commit().await
        }
        .await
        .map_err(failed("write audit entry"))
    }

    /// Computes the whole chain again. Entries from before the chain began are not covered.
    pub async fn check_audit(&self) -> Result<AuditCheck, StoreError> {
        async {
            let expected: Option<String> =
                query_scalar("SELECT value FROM meta WHERE key = $1").bind(HEAD).fetch_optional(&self.readers).await?;
            let (mut head, mut entries, mut last) = (GENESIS.to_owned(), 0, 0);
            let mut rows = query("SELECT * FROM audit ORDER BY seq").fetch(&self.readers);
            while let Some(row) = rows.try_next().await? {
                let placed = Placed::from_row(&row)?;
                let Some(hash) = row.try_get::<Option<String>, _>("hash")? else {
                    if head != GENESIS {
                        return Ok(AuditCheck::Broken { seq: placed.seq });
                    }
                    continue;
                };
                if placed.entry.hash(&head) != hash {
                    return Ok(AuditCheck::Broken { seq: placed.seq });
                }
                (head, entries, last) = (hash, entries + 1, placed.seq);
            }
            Ok(match expected {
                Some(expected) if expected != head => AuditCheck::Truncated { last },
                _ => AuditCheck::Intact { entries, head },
            })
        }
        .await
        .map_err(failed("check the audit log"))
    }

    /// A page of a workspace's entries, newest first, and the cursor of the next page if there is one. At least one
    /// row a page; [`StoreError::Cursor`] for a `before` that no page gave.
    pub async fn audit_log(
        &self,
        workspace: &WorkspaceId,
        limit: usize,
        before: Option<&str>,
    ) -> Result<(Vec<AuditEntry>, Option<String>), StoreError> {
        let mut sql = QueryBuilder::<Sqlite>::new("SELECT * FROM audit WHERE workspace = ");
        sql.push_bind(workspace.as_str());
        if let Some(seq) = page::position::<i64>(before)? {
            sql.push(" AND seq < ").push_bind(seq);
        }
        sql.push(" ORDER BY seq DESC LIMIT ").push_bind(page::rows_to_read(limit));
        let rows: Vec<Placed> =
            sql.build_query_as().fetch_all(&self.readers).await.map_err(failed("read audit log"))?;
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

    fn entry(at: i64) -> AuditEntry {
        AuditEntry {
            at: Micros(at),
            workspace: None,
            actor: "ann".into(),
            action: "login".into(),
            target: format!("target {at}"),
            outcome: "ok".into(),
            from: "::1".into(),
            request_id: "r".into(),
        }
    }

    /// Does what no code of ours does: changes the file past the triggers.
    async fn tamper(store: &Store, sql: &'static str) {
        for sql in ["DROP TRIGGER IF EXISTS audit_is_not_changed", "DROP TRIGGER IF EXISTS audit_is_not_shortened", sql]
        {
            query(sql).execute(&store.writer).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_log_refuses_to_be_changed() {
        let (store, _dir) = store().await;
        store.audit(&entry(1)).await.unwrap();
        for sql in ["UPDATE audit SET actor = 'bob'", "DELETE FROM audit"] {
            let error = query(sql).execute(&store.writer).await.unwrap_err().to_string();
            assert!(error.contains("append-only"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_change_past_the_triggers_is_found_where_it_was_made() {
        let cases = [
            ("UPDATE audit SET outcome = 'refused' WHERE seq = 2", AuditCheck::Broken { seq: 2 }),
            ("DELETE FROM audit WHERE seq = 2", AuditCheck::Broken { seq: 3 }),
            ("UPDATE audit SET hash = NULL WHERE seq = 3", AuditCheck::Broken { seq: 3 }),
            ("DELETE FROM audit WHERE seq = 4", AuditCheck::Truncated { last: 3 }),
            ("DELETE FROM audit", AuditCheck::Truncated { last: 0 }),
        ];
        for (sql, found) in cases {
            let (store, _dir) = store().await;
            assert_eq!(store.check_audit().await.unwrap(), AuditCheck::Intact { entries: 0, head: String::new() });
            for at in 1..=4 {
                store.audit(&entry(at)).await.unwrap();
            }
            let AuditCheck::Intact { entries: 4, head } = store.check_audit().await.unwrap() else { panic!() };
            assert_eq!(head.len(), 64);
            tamper(&store, sql).await;
            assert_eq!(store.check_audit().await.unwrap(), found, "{sql}");
        }
        let (store, _dir) = store().await;
        for at in 1..=4 {
            store.audit(&entry(at)).await.unwrap();
        }
        tamper(&store, "DELETE FROM audit WHERE seq = 4").await;
        store.audit(&entry(5)).await.unwrap();
        // what comes after a gap does not close it
        assert_eq!(store.check_audit().await.unwrap(), AuditCheck::Broken { seq: 5 });
    }
}
