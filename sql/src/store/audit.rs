//! The audit log: who did what, from where, and what came of it. Entries are added and read, never changed; each is
//! chained to the one before by a hash, so that a change made past this code shows. Of a workspace that is deleted the
//! entries are emptied: what they said goes, their place in the chain stays, and an entry says which they were.

use super::db::{Builder, Dialect, FromRow, Row, Scope, Tx, query, query_as, query_scalar, without_nul};
use super::page;
use super::record::Columns;
use super::{Store, StoreError, failed};
use engine::event::{Micros, WorkspaceId};
use sha2::{Digest, Sha256};
use sqlx::types::chrono::Utc;
use std::ops::RangeInclusive;

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

impl AuditEntry {
    /// SHA-256, in hexadecimal, of this entry as a JSON array, in which NUL stands as PostgreSQL keeps it.
    fn digest(&self) -> String {
        let workspace = self.workspace.as_ref().map(WorkspaceId::as_str);
        let texts = [&self.actor, &self.action, &self.target, &self.outcome, &self.from, &self.request_id];
        let fields = (self.at.0, workspace, texts.map(|text| without_nul(text.into())));
        let text = serde_json::to_string(&fields).expect("numbers and text are JSON");
        hex(Sha256::digest(text))
    }

    /// Whether it is of a workspace that was deleted.
    fn is_emptied(&self) -> bool {
        let Self { at: _, workspace, actor, action, target, outcome, from, request_id } = self;
        workspace.is_none() && [actor, action, target, outcome, from, request_id].iter().all(|text| text.is_empty())
    }
}

/// The hash of an entry: h(n) = SHA-256(h(n-1) ‖ SHA-256(entry n)), all of it in hexadecimal.
fn chained(before: &str, digest: &str) -> String {
    hex(Sha256::new().chain_update(before).chain_update(digest).finalize())
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the first entry is chained to.
const GENESIS: &str = "";
/// Where `meta` keeps the hash of the last entry. The migration has put it there.
const HEAD: &str = "audit_head";
/// Entries that are read at a time when the chain is checked.
const CHECKED_AT_ONCE: i64 = 1_000;

/// What a check of the whole audit log found.
#[derive(Clone, Debug, PartialEq)]
pub enum AuditCheck {
    /// Every entry is as it was written, but for those of deleted workspaces, which were emptied. `head` is the hash of
    /// the last one, empty without entries: whoever noted it elsewhere can tell later that nothing before it was
    /// changed.
    Intact { entries: u64, emptied: u64, head: String },
    /// The entry with this number, or one before it, is not what was written: changed, added or removed.
    Broken { seq: i64 },
    /// Entries at the end are missing: the one that was written last is not there.
    Truncated { last: i64 },
    /// The chain holds, and is another one than that of which somebody noted a hash.
    Rewritten,
}

/// An entry and its place in the log, which a page ends at.
struct Placed {
    seq: i64,
    entry: AuditEntry,
    /// Digest and hash, which each entry is written with.
    link: Option<(String, String)>,
}

impl FromRow for Placed {
    fn from_row(row: &Row) -> Result<Placed, sqlx::Error> {
        let link: (Option<String>, Option<String>) = (row.try_get("digest")?, row.try_get("hash")?);
        Ok(Placed { seq: row.try_get("seq")?, entry: AuditEntry::from_row(row)?, link: link.0.zip(link.1) })
    }
}

/// The action of an entry whose target is which entries were emptied: `3-7 9`.
const EMPTIED: &str = "audit empty";
/// Such an entry names so many runs of others.
const RUNS_MAX: usize = 1_000;

/// Numbers in a row.
type Run = RangeInclusive<i64>;

/// Ascending numbers as runs.
fn runs(numbers: impl IntoIterator<Item = i64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for number in numbers {
        match runs.last_mut().filter(|run| run.end() + 1 == number) {
            Some(run) => *run = *run.start()..=number,
            None => runs.push(number..=number),
        }
    }
    runs
}

fn shown(runs: &[Run]) -> String {
    let one = |run: &Run| match run.start() == run.end() {
        true => run.start().to_string(),
        false => format!("{}-{}", run.start(), run.end()),
    };
    runs.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// What [`shown`] made, as far as it was that.
fn read_runs(text: &str) -> impl Iterator<Item = Run> {
    text.split(' ').filter_map(|run| {
        let (start, end) = run.split_once('-').unwrap_or((run, run));
        Some(start.parse().ok()?..=end.parse().ok()?)
    })
}

/// Empties the entries of a workspace that is deleted in the same transaction, which sees the whole installation, and adds
/// which they are.
pub(super) async fn empty(tx: &mut Tx, workspace: &WorkspaceId) -> Result<(), sqlx::Error> {
    let emptied: Vec<i64> = query_scalar("SELECT seq FROM audit WHERE workspace = $1 ORDER BY seq")
        .bind(workspace.as_str())
        .fetch_all(&mut *tx)
        .await?;
    query(
        "UPDATE audit SET workspace = NULL, actor = '', action = '', target = '', outcome = '', came_from = '', \
         request_id = '' WHERE workspace = $1",
    )
    .bind(workspace.as_str())
    .execute(&mut *tx)
    .await?;
    for part in runs(emptied).chunks(RUNS_MAX) {
        let entry = AuditEntry {
            at: Micros(Utc::now().timestamp_micros()),
            workspace: None,
            actor: "tidewatch".into(),
            action: EMPTIED.into(),
            target: shown(part),
            outcome: "ok".into(),
            from: String::new(),
            request_id: String::new(),
        };
        append(tx, &entry).await?;
    }
    Ok(())
}

/// Adds an entry at the end, chained to the one before.
async fn append(tx: &mut Tx, entry: &AuditEntry) -> Result<(), sqlx::Error> {
    // one writer at a time from here on: SQLite has no other, PostgreSQL locks the head
    let head = match tx.dialect() {
        Dialect::Sqlite => "SELECT value FROM meta WHERE key = $1",
        Dialect::Postgres => "SELECT value FROM meta WHERE key = $1 FOR UPDATE",
    };
    let before: String = query_scalar(head).bind(HEAD).fetch_one(&mut *tx).await?;
    let digest = entry.digest();
    let hash = chained(&before, &digest);
    query(
        "INSERT INTO audit (at, workspace, actor, action, target, outcome, came_from, request_id, digest, hash) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(entry.at)
    .bind(entry.workspace.as_ref().map(WorkspaceId::as_str))
    .bind(&entry.actor)
    .bind(&entry.action)
    .bind(&entry.target)
    .bind(&entry.outcome)
    .bind(&entry.from)
    .bind(&entry.request_id)
    .bind(&digest)
    .bind(&hash)
    .execute(&mut *tx)
    .await?;
    query("UPDATE meta SET value = $2 WHERE key = $1").bind(HEAD).bind(&hash).execute(&mut *tx).await?;
    Ok(())
}

impl Store {
    /// Adds an entry at the end, chained to the one before.
    pub async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin(Scope::Installation).await?;
            append(&mut tx, entry).await?;
            tx.commit().await
        }
        .await
        .map_err(failed("write audit entry"))
    }

    /// Computes the whole chain again, in which the hash `noted` must be where somebody kept one elsewhere: who can write
    /// to the database can make another chain. Entries that are written meanwhile may be covered.
    pub async fn check_audit(&self, noted: Option<&str>) -> Result<AuditCheck, StoreError> {
        async {
            let written: String = query_scalar("SELECT value FROM meta WHERE key = $1")
                .bind(HEAD)
                .fetch_one(self.read(Scope::Installation))
                .await?;
            let (mut head, mut entries, mut last) = (GENESIS.to_owned(), 0, None::<i64>);
            let (mut emptied, mut told) = (Vec::new(), Vec::new());
            let (mut is_complete, mut is_same) = (written == GENESIS, noted.is_none_or(|noted| noted == GENESIS));
            loop {
                let page: Vec<Placed> = query_as("SELECT * FROM audit WHERE seq >= $1 ORDER BY seq LIMIT $2")
                    .bind(last.map_or(i64::MIN, |last| last.saturating_add(1)))
                    .bind(CHECKED_AT_ONCE)
                    .fetch_all(self.read(Scope::Installation))
                    .await?;
                let Some(end) = page.last().map(|placed| placed.seq) else { break };
                for Placed { seq, entry, link } in page {
                    let Some((digest, hash)) = link else { return Ok(AuditCheck::Broken { seq }) };
                    let is_emptied = entry.is_emptied();
                    if (!is_emptied && entry.digest() != digest) || chained(&head, &digest) != hash {
                        return Ok(AuditCheck::Broken { seq });
                    }
                    is_complete |= hash == written;
                    is_same |= noted == Some(hash.as_str());
                    entries += 1;
                    if is_emptied {
                        emptied.push(seq);
                    }
                    if entry.action == EMPTIED && entry.workspace.is_none() {
                        told.extend(read_runs(&entry.target).filter(|run| *run.end() < seq));
                    }
                    head = hash;
                }
                last = Some(end);
            }
            // of a deletion there is an entry; without it somebody else emptied these
            told.sort_by_key(|run| *run.start());
            let is_told = |seq: i64| {
                let behind = told.partition_point(|run| *run.start() <= seq);
                behind.checked_sub(1).is_some_and(|at| told[at].contains(&seq))
            };
            if let Some(seq) = emptied.iter().copied().find(|seq| !is_told(*seq)) {
                return Ok(AuditCheck::Broken { seq });
            }
            let (last, emptied) = (last.unwrap_or(0), emptied.len() as u64);
            Ok(match (is_complete, is_same) {
                (false, _) => AuditCheck::Truncated { last },
                (true, false) => AuditCheck::Rewritten,
                (true, true) => AuditCheck::Intact { entries, emptied, head },
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

    /// Does what no code of ours does: changes the table past the triggers.
    async fn tamper(store: &Store, sql: &'static str) {
        let on = match store.db.dialect() {
            Dialect::Sqlite => "",
            Dialect::Postgres => " ON audit",
        };
        for trigger in ["audit_is_not_changed", "audit_is_not_shortened"] {
            let drop = format!("DROP TRIGGER IF EXISTS {trigger}{on}");
            query(drop).execute(store.write(Scope::Installation)).await.unwrap();
        }
        query(sql).execute(store.write(Scope::Installation)).await.unwrap();
    }

    #[tokio::test]
    async fn the_log_refuses_to_be_changed() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.audit(&AuditEntry { workspace: Some(acme), ..entry(1) }).await.unwrap();
        for sql in [
            "UPDATE audit SET actor = 'bob'",
            "UPDATE audit SET workspace = NULL, actor = '', action = '', target = '', outcome = '', came_from = '', \
             request_id = ''",
            "DELETE FROM audit",
        ] {
            let error = query(sql).execute(store.write(Scope::Installation)).await.unwrap_err().to_string();
            assert!(error.contains("append-only"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_change_past_the_triggers_is_found_where_it_was_made() {
        let cases = [
            ("UPDATE audit SET outcome = 'refused' WHERE seq = 2", AuditCheck::Broken { seq: 2 }),
            ("UPDATE audit SET digest = hash WHERE seq = 2", AuditCheck::Broken { seq: 2 }),
            ("DELETE FROM audit WHERE seq = 2", AuditCheck::Broken { seq: 3 }),
            ("UPDATE audit SET hash = NULL WHERE seq = 3", AuditCheck::Broken { seq: 3 }),
            ("UPDATE audit SET digest = NULL, hash = NULL WHERE seq = 1", AuditCheck::Broken { seq: 1 }),
            (
                "UPDATE audit SET workspace = NULL, actor = '', action = '', target = '', outcome = '', came_from = '', \
                 request_id = '' WHERE seq = 2",
                AuditCheck::Broken { seq: 2 },
            ),
            ("DELETE FROM audit WHERE seq = 4", AuditCheck::Truncated { last: 3 }),
            ("DELETE FROM audit", AuditCheck::Truncated { last: 0 }),
        ];
        for (sql, found) in cases {
            let (store, _dir) = store().await;
            let nothing = AuditCheck::Intact { entries: 0, emptied: 0, head: String::new() };
            assert_eq!(store.check_audit(None).await.unwrap(), nothing);
            for at in 1..=4 {
                store.audit(&entry(at)).await.unwrap();
            }
            let AuditCheck::Intact { entries: 4, emptied: 0, head } = store.check_audit(None).await.unwrap() else {
                panic!()
            };
            assert_eq!(head.len(), 64);
            tamper(&store, sql).await;
            assert_eq!(store.check_audit(None).await.unwrap(), found, "{sql}");
        }
        let (store, _dir) = store().await;
        for at in 1..=4 {
            store.audit(&entry(at)).await.unwrap();
        }
        tamper(&store, "DELETE FROM audit WHERE seq = 4").await;
        store.audit(&entry(5)).await.unwrap();
        // what comes after a gap does not close it
        assert_eq!(store.check_audit(None).await.unwrap(), AuditCheck::Broken { seq: 5 });
    }

    #[tokio::test]
    async fn a_chain_that_was_made_anew_is_told_by_who_noted_a_hash_of_the_one_before() {
        let head = async |store: &Store| match store.check_audit(None).await.unwrap() {
            AuditCheck::Intact { head, .. } => head,
            other => panic!("{other:?}"),
        };
        let (store, _dir) = store().await;
        store.audit(&entry(1)).await.unwrap();
        let noted = head(&store).await;
        store.audit(&entry(2)).await.unwrap();
        assert!(matches!(store.check_audit(Some(&noted)).await.unwrap(), AuditCheck::Intact { entries: 2, .. }));
        tamper(&store, "DELETE FROM audit").await;
        store.put_meta(HEAD, GENESIS).await.unwrap();
        for at in [3, 2] {
            store.audit(&entry(at)).await.unwrap();
        }
        head(&store).await;
        assert_eq!(store.check_audit(Some(&noted)).await.unwrap(), AuditCheck::Rewritten);
    }

    #[tokio::test]
    async fn the_entries_of_a_deleted_workspace_are_emptied_and_the_chain_holds() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        for workspace in [None, Some(acme.clone()), Some(name("none")), Some(acme.clone())] {
            store.audit(&AuditEntry { workspace, ..entry(1) }).await.unwrap();
        }
        store.delete_workspace(&acme).await.unwrap();
        assert_eq!(store.audit_log(&acme, 10, None).await.unwrap().0, []);
        store.audit(&entry(2)).await.unwrap();
        let check = store.check_audit(None).await.unwrap();
        assert!(matches!(check, AuditCheck::Intact { entries: 6, emptied: 2, .. }), "{check:?}");
    }

    #[test]
    fn which_entries_were_emptied_is_said_in_runs() {
        let (numbers, text) = ([1, 2, 3, 7, 9, 10], "1-3 7 9-10");
        assert_eq!(shown(&runs(numbers)), text);
        assert_eq!(read_runs(text).flatten().collect::<Vec<_>>(), numbers);
        assert_eq!(read_runs("").chain(read_runs("x 4- -5 6-x")).count(), 0);
    }

    #[tokio::test]
    async fn an_entry_with_any_text_is_chained_as_it_will_be_read() {
        let (store, _dir) = store().await;
        let odd = "\0 \u{1f30a} \\u0000 \" \n";
        store.audit(&AuditEntry { target: odd.into(), actor: odd.into(), ..entry(1) }).await.unwrap();
        let check = store.check_audit(None).await.unwrap();
        assert!(matches!(check, AuditCheck::Intact { entries: 1, .. }), "{check:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn entries_that_are_written_at_once_make_one_chain() {
        let (store, _dir) = store().await;
        let writers = (0..8).map(|at| {
            let store = store.clone();
            tokio::spawn(async move { store.audit(&entry(at)).await })
        });
        for written in futures::future::join_all(writers).await {
            written.unwrap().unwrap();
        }
        let check = store.check_audit(None).await.unwrap();
        assert!(matches!(check, AuditCheck::Intact { entries: 8, .. }), "{check:?}");
    }
}
