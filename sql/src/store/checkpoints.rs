//! The heart: engine state, its results and the log offset they include, in one transaction. What a restart loads is
//! then always one moment of the engine, and a replay from its offset repeats nothing.

use super::db::{Builder, Scope, Tx, query, query_scalar};
use super::record::Columns;
use super::{
    Alert, DeadLetter, FinalRow, Notice, RuleChange, Store, StoreError, alerts, bulk, dead_letters, definitions,
    failed, rows, samples, state, stored, webhooks,
};
use engine::checkpoint::{Changes, State};
use engine::event::WorkspaceId;
use parking_lot::Mutex;
use std::collections::HashMap;

/// What one workspace has computed since its last commit.
#[derive(Clone, Debug)]
pub struct Commit {
    pub workspace: WorkspaceId,
    /// The state includes the log up to here, exclusive.
    pub offset: u64,
    /// What changed since the state that was committed before; `None`: nothing.
    pub state: Option<Changes>,
    pub rows: Vec<FinalRow>,
    /// Some of the rows may be stored already: a log is replayed, or nobody knows what became of a commit before.
    pub repeats: bool,
    pub alerts: Vec<Alert>,
    /// What webhooks are to be told of these alerts.
    pub notices: Vec<Notice>,
    pub dead_letters: Vec<DeadLetter>,
    /// Alert rules that are others from the state on, in their order.
    pub rules: Vec<RuleChange>,
}

/// Where a workspace continues.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// First log offset to replay.
    pub offset: u64,
    /// Number of commits so far.
    pub version: i64,
    /// As the commits so far have made it.
    pub state: Option<State>,
}

/// Dead letters kept for each workspace by a commit.
const DEAD_LETTERS_KEPT: usize = 10_000;

/// The number of the last commit of each workspace that this process has read or made.
#[derive(Default)]
pub(super) struct Reached(Mutex<HashMap<WorkspaceId, i64>>);

impl Reached {
    pub(super) fn read(&self, workspace: &WorkspaceId, version: i64) {
        self.0.lock().insert(workspace.clone(), version);
    }

    pub(super) fn forget(&self, workspace: &WorkspaceId) {
        self.0.lock().remove(workspace);
    }
}

/// Why a transaction of commits cannot stand.
enum Refused {
    Database(sqlx::Error),
    /// The store is not as far as it was.
    Older(StoreError),
    /// The checkpoint of one of them could not move to its offset.
    Behind,
}

impl From<sqlx::Error> for Refused {
    fn from(error: sqlx::Error) -> Refused {
        Refused::Database(error)
    }
}

impl Store {
    /// Commits all of `commits`, of any workspaces, or nothing.
    ///
    /// Repeats do nothing: a final row changes only to a greater revision, a resolved alert not at all, an
    /// acknowledgement is kept, a dead letter and a delivery to a webhook are there once. A commit may repeat the stored offset; one below it is
    /// [`StoreError::Stale`], one on a store that has lost what this process has seen there [`StoreError::Older`], one for
    /// a workspace that was deleted [`StoreError::NoWorkspace`]: all name the workspace, so that the caller can commit the
    /// others without it.
    pub async fn commit(&self, commits: &[Commit]) -> Result<(), StoreError> {
        match self.try_commit(commits).await {
            Ok(()) => Ok(()),
            Err(Refused::Behind) => Err(self.culprit(commits).await),
            Err(Refused::Older(error)) => Err(error),
            Err(Refused::Database(e)) => {
                self.db.heard(&e);
                match failed("commit")(e) {
                    StoreError::Missing { .. } => Err(self.culprit(commits).await),
                    error => Err(error),
                }
            }
        }
    }

    async fn try_commit(&self, commits: &[Commit]) -> Result<(), Refused> {
        // One workspace sees to its own; several at once are the business of the installation.
        let scope = match commits {
            [commit] => Scope::Workspace(&commit.workspace),
            _ => Scope::Installation,
        };
        let mut tx = self.db.begin(scope).await?;
        let mut versions = stored_versions(&mut tx, commits).await?;
        {
            let reached = self.reached.0.lock();
            for Commit { workspace, .. } in commits {
                let found = versions.get(workspace).copied().unwrap_or(0);
                if let Some(&known) = reached.get(workspace).filter(|known| **known > found) {
                    return Err(Refused::Older(StoreError::Older { workspace: workspace.clone(), known, found }));
                }
            }
        }
        // Offsets first: a stale commit is then found before the work of writing its rows.
        let head = |commit: &Commit| {
            let state = commit.state.as_ref()?;
            Some(state::sealed(&commit.workspace, &state.head, commit.offset))
        };
        let sealed: Vec<(&Commit, Option<Vec<u8>>)> = commits.iter().map(|commit| (commit, head(commit))).collect();
        let moved = bulk::insert(
            &mut tx,
            [
                "INSERT INTO checkpoints (workspace, log_offset, version, state) ",
                " ON CONFLICT (workspace) DO UPDATE SET log_offset = excluded.log_offset, \
                 version = checkpoints.version + 1, state = COALESCE(excluded.state, checkpoints.state) \
                 WHERE excluded.log_offset >= checkpoints.log_offset",
            ],
            &sealed,
            |(commit, _)| &commit.workspace,
            |values, (commit, head)| {
                values.push_bind(commit.workspace.as_str());
                values.push_bind(stored(commit.offset));
                values.push_bind(1_i64);
                values.push_bind(head.as_deref());
            },
        )
        .await?;
        if moved < commits.len() as u64 {
            return Err(Refused::Behind);
        }
        state::write(&mut tx, commits).await?;
        for repeats in [false, true] {
            let commits = commits.iter().filter(|commit| commit.repeats == repeats);
            let closed = commits.flat_map(|c| c.rows.iter().map(|row| (&c.workspace, row))).collect();
            rows::write(&mut tx, closed, repeats).await?;
        }
        if self.rollups {
            samples::note_late(&mut tx, commits).await?;
        }
        let raised: Vec<_> = commits.iter().flat_map(|c| c.alerts.iter().map(|alert| (&c.workspace, alert))).collect();
        alerts::write(&mut tx, &raised).await?;
        let told: Vec<_> = commits.iter().flat_map(|c| c.notices.iter().map(|told| (&c.workspace, told))).collect();
        webhooks::enqueue(&mut tx, &told, self.outbox).await?;
        for commit in commits {
            dead_letters::write(&mut tx, &commit.workspace, &commit.dead_letters, DEAD_LETTERS_KEPT).await?;
            definitions::write_rules(&mut tx, &commit.workspace, &commit.rules).await?;
        }
        tx.commit().await?;
        let mut reached = self.reached.0.lock();
        for Commit { workspace, .. } in commits {
            let version = versions.entry(workspace.clone()).or_default();
            *version += 1;
            reached.insert(workspace.clone(), *version);
        }
        Ok(())
    }

    /// Which of the refused commits it was, and why.
    async fn culprit(&self, commits: &[Commit]) -> StoreError {
        // Within one call a commit may also be behind an earlier one of the same workspace.
        let mut reached = HashMap::new();
        for commit in commits {
            let found = query_scalar::<Option<i64>>(
                "SELECT c.log_offset FROM workspaces w LEFT JOIN checkpoints c ON c.workspace = w.id WHERE w.id = $1",
            )
            .bind(commit.workspace.as_str())
            .fetch_optional(self.write(Scope::Installation))
            .await;
            let stored = match found {
                Err(e) => return failed("find what refused the commit")(e),
                Ok(None) => return StoreError::NoWorkspace { workspace: commit.workspace.clone() },
                Ok(Some(offset)) => offset.unwrap_or(0).unsigned_abs(),
            };
            let reached = reached.entry(&commit.workspace).or_insert(stored);
            if commit.offset < *reached {
                return StoreError::Stale {
                    workspace: commit.workspace.clone(),
                    offset: commit.offset,
                    stored: *reached,
                };
            }
            *reached = commit.offset;
        }
        // It was behind a moment ago and is not any more: the workspace was deleted and made again.
        StoreError::Busy { operation: "commit" }
    }

    /// Where the workspace continues, `None` when it never committed. Commits go on from what this finds.
    pub async fn checkpoint(&self, workspace: &WorkspaceId) -> Result<Option<Checkpoint>, StoreError> {
        let found = state::read(self, workspace).await.map_err(failed("read checkpoint"))?;
        self.reached.read(workspace, found.as_ref().map_or(0, |checkpoint| checkpoint.version));
        Ok(found)
    }

    /// The offset of every workspace that ever committed: the log is needed from the lowest on.
    pub async fn checkpoints_offsets(&self) -> Result<Vec<(WorkspaceId, u64)>, StoreError> {
        async {
            let rows = query("SELECT workspace, log_offset FROM checkpoints ORDER BY workspace")
                .fetch_all(self.read(Scope::Installation))
                .await?;
            rows.iter()
                .map(|row| Ok((row.name("workspace")?, row.count("log_offset")?)))
                .collect::<Result<Vec<_>, sqlx::Error>>()
        }
        .await
        .map_err(failed("list checkpoints"))
    }
}

/// The number of the last commit of these workspaces.
async fn stored_versions(tx: &mut Tx, commits: &[Commit]) -> Result<HashMap<WorkspaceId, i64>, sqlx::Error> {
    let mut sql = Builder::new("SELECT workspace, version FROM checkpoints WHERE workspace IN (");
    for (n, commit) in commits.iter().enumerate() {
        sql.push(if n == 0 { "" } else { ", " }).push_bind(commit.workspace.as_str());
    }
    sql.push(")");
    let rows = sql.build().persistent(commits.len() == 1).fetch_all(tx).await?;
    rows.iter().map(|row| Ok((row.name("workspace")?, row.try_get("version")?))).collect()
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A commit of nothing but an offset.
    pub fn commit(workspace: &WorkspaceId, offset: u64) -> Commit {
        Commit {
            workspace: workspace.clone(),
            offset,
            state: None,
            rows: vec![],
            repeats: false,
            alerts: vec![],
            notices: vec![],
            dead_letters: vec![],
            rules: vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::RowQuery;
    use super::super::alerts::testing::alert;
    use super::super::dead_letters::testing::letter;
    use super::super::rows::testing::row;
    use super::super::testing::*;
    use super::testing::commit;
    use super::*;

    async fn rows(store: &Store, workspace: &WorkspaceId) -> Vec<FinalRow> {
        store.rows(workspace, &name("vwap"), &RowQuery::first(1000)).await.unwrap().0
    }

    fn full(workspace: &WorkspaceId, offset: u64) -> Commit {
        Commit {
            state: Some(changes(true, 1, &[("a", 1), ("b", 1)], &[])),
            rows: vec![row("vwap", 0, "A", 0), row("vwap", 0, "B", 0)],
            alerts: vec![alert(workspace, "a", 1)],
            dead_letters: vec![letter("shop.orders", 1)],
            ..commit(workspace, offset)
        }
    }

    #[tokio::test]
    async fn state_results_and_offset_are_there_together() {
        let (store, dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let full = full(&acme, 7);
        store.commit(std::slice::from_ref(&full)).await.unwrap();
        drop(store); // as after a crash: nobody closed it
        let store = Store::open_with(&url(&dir), &super::super::suite::options()).await.unwrap();
        let expected = Checkpoint { offset: 7, version: 1, state: Some(state(1, &[("a", 1), ("b", 1)])) };
        assert_eq!(store.checkpoint(&acme).await.unwrap(), Some(expected));
        assert_eq!(store.checkpoints_offsets().await.unwrap(), [(acme.clone(), 7)]);
        assert_eq!(rows(&store, &acme).await, full.rows);
        assert_eq!(store.alert(&acme, "a").await.unwrap().as_ref(), full.alerts.first());
        assert_eq!(store.dead_letters(&acme, None, 10, None).await.unwrap().0, full.dead_letters);
    }

    #[tokio::test]
    async fn a_disk_that_was_full_is_written_again_once_it_has_room() {
        let (store, _dir) = store().await;
        let crate::store::db::Db::Sqlite { writer, .. } = &store.db else { return };
        let acme = add_workspace(&store, "acme").await;
        // no page more than there are; for this connection, which the failure costs
        sqlx::query("PRAGMA max_page_count = 1").execute(writer).await.unwrap();
        let large = Commit { state: Some(Changes { head: vec![7; 1 << 20], ..Changes::default() }), ..full(&acme, 3) };
        let refused = store.commit(std::slice::from_ref(&large)).await.unwrap_err();
        assert!(matches!(refused, StoreError::Unreachable { .. }), "{refused}");
        store.commit(std::slice::from_ref(&large)).await.unwrap();
        assert_eq!(rows(&store, &acme).await, large.rows);
    }

    #[tokio::test]
    async fn a_commit_that_fails_in_the_middle_leaves_nothing() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        let unknown_state = alerts_with(&other, "half-resolved");
        let error = store.commit(&[full(&acme, 1), unknown_state]).await.unwrap_err();
        assert!(matches!(error, StoreError::Database { operation: "commit", .. }), "{error}");
        assert_eq!(store.checkpoints_offsets().await.unwrap(), []);
        assert_eq!(rows(&store, &acme).await, []);
        assert!(store.alerts(&acme, None, 10, None).await.unwrap().0.is_empty());
        assert!(store.dead_letters(&acme, None, 10, None).await.unwrap().0.is_empty());
        store.commit(&[full(&acme, 1)]).await.unwrap();
    }

    fn alerts_with(workspace: &WorkspaceId, state: &str) -> Commit {
        let alerts = vec![Alert { state: state.into(), ..alert(workspace, "a", 1) }];
        Commit { alerts, ..full(workspace, 1) }
    }

    #[tokio::test]
    async fn a_repeated_commit_changes_nothing() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let full = full(&acme, 7);
        for _ in 0..3 {
            store.commit(std::slice::from_ref(&full)).await.unwrap();
        }
        assert_eq!(rows(&store, &acme).await, full.rows);
        assert_eq!(store.alerts(&acme, None, 10, None).await.unwrap().0, full.alerts);
        assert_eq!(store.dead_letters(&acme, None, 10, None).await.unwrap().0, full.dead_letters);
        assert_eq!(store.checkpoint(&acme).await.unwrap().unwrap().offset, 7);
    }

    #[tokio::test]
    async fn only_a_greater_revision_replaces_a_row() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        // The revisions of one row, as they come in one commit after the other, and the one that stands then.
        for (revisions, stands) in [(&[1][..], 1), (&[0], 1), (&[1], 1), (&[2, 4, 3], 4), (&[5, 6], 6)] {
            let rows_now = revisions.iter().map(|revision| row("vwap", 0, "A", *revision)).collect();
            store.commit(&[Commit { rows: rows_now, ..commit(&acme, 1) }]).await.unwrap();
            assert_eq!(rows(&store, &acme).await, [row("vwap", 0, "A", stands)], "after {revisions:?}");
        }
        let same_revision = FinalRow { row: "{}".into(), ..row("vwap", 0, "A", 6) };
        store.commit(&[Commit { rows: vec![same_revision], ..commit(&acme, 1) }]).await.unwrap();
        assert_eq!(rows(&store, &acme).await, [row("vwap", 0, "A", 6)]);
    }

    #[tokio::test]
    async fn a_commit_behind_the_stored_offset_is_stale_and_stops_those_beside_it() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        store.commit(&[commit(&acme, 7)]).await.unwrap();
        let error = store.commit(&[full(&other, 1), full(&acme, 6)]).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Stale { workspace, offset: 6, stored: 7 } if *workspace == acme),
            "{error}"
        );
        assert_eq!(store.checkpoints_offsets().await.unwrap(), [(acme.clone(), 7)]);
        assert_eq!(rows(&store, &other).await, []);

        let error = store.commit(&[commit(&other, 5), commit(&other, 4)]).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Stale { workspace, offset: 4, stored: 5 } if *workspace == other),
            "{error}"
        );
        store.commit(&[commit(&other, 4), commit(&other, 5), commit(&acme, 7)]).await.unwrap();
        assert_eq!(store.checkpoints_offsets().await.unwrap(), [(acme, 7), (other, 5)]);
    }

    #[tokio::test]
    async fn a_store_that_an_older_copy_took_the_place_of_takes_no_commit_that_goes_on_from_what_it_lost() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        for offset in 1..=3 {
            store.commit(&[commit(&acme, offset), commit(&other, offset)]).await.unwrap();
        }
        let older = |sql: &'static str| query(sql).execute(store.write(Scope::Installation));
        for (lost, found) in [
            ("UPDATE checkpoints SET version = 2, log_offset = 2 WHERE workspace = 'acme'", 2),
            ("DELETE FROM checkpoints WHERE workspace = 'acme'", 0),
        ] {
            older(lost).await.unwrap();
            let refused = store.commit(&[full(&other, 9), full(&acme, 9)]).await.unwrap_err();
            assert!(
                matches!(&refused, StoreError::Older { workspace, found: has, .. } if *workspace == acme && *has == found),
                "{refused}"
            );
            assert_eq!(rows(&store, &other).await, []);
            // who loads what there is goes on from there
            assert_eq!(store.checkpoint(&acme).await.unwrap().map_or(0, |checkpoint| checkpoint.version), found);
            store.commit(&[commit(&acme, 4), commit(&acme, 5)]).await.unwrap();
        }
        // a workspace of the same name is another one
        let again = store.workspace(&acme).await.unwrap().unwrap();
        store.delete_workspace(&acme).await.unwrap();
        store.create_workspace(&again, "acme").await.unwrap();
        store.commit(&[commit(&acme, 1)]).await.unwrap();
    }

    #[tokio::test]
    async fn a_commit_for_a_deleted_workspace_names_it() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        store.delete_workspace(&other).await.unwrap();
        let error = store.commit(&[full(&acme, 1), full(&other, 1)]).await.unwrap_err();
        assert!(matches!(&error, StoreError::NoWorkspace { workspace } if *workspace == other), "{error}");
        assert_eq!(store.checkpoint(&acme).await.unwrap(), None);
    }

    #[tokio::test]
    async fn without_a_state_the_stored_one_stays() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.commit(&[commit(&acme, 1)]).await.unwrap();
        let checkpoint = store.checkpoint(&acme).await.unwrap();
        assert_eq!(checkpoint, Some(Checkpoint { offset: 1, version: 1, state: None }));
        store.commit(&[Commit { state: Some(changes(true, 9, &[], &[])), ..commit(&acme, 2) }]).await.unwrap();
        store.commit(&[commit(&acme, 2)]).await.unwrap();
        let checkpoint = store.checkpoint(&acme).await.unwrap();
        assert_eq!(checkpoint, Some(Checkpoint { offset: 2, version: 3, state: Some(state(9, &[])) }));
    }

    #[tokio::test]
    async fn an_offset_or_a_head_that_is_not_as_it_was_does_not_pass() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        let of = |workspace: &WorkspaceId, offset, head| {
            [Commit { state: Some(changes(true, head, &[], &[])), ..commit(workspace, offset) }]
        };
        store.commit(&of(&acme, 7, 1)).await.unwrap();
        store.commit(&of(&other, 9, 2)).await.unwrap();
        let run = async |sql: &'static str| query(sql).execute(store.write(Scope::Installation)).await.unwrap();
        run("UPDATE checkpoints SET log_offset = 1000 WHERE workspace = 'acme'").await;
        let known = Some(Checkpoint { offset: 7, version: 1, state: Some(state(1, &[])) });
        assert_eq!(store.checkpoint(&acme).await.unwrap(), known);
        store.commit(&of(&acme, 8, 1)).await.unwrap(); // which is not behind any more
        run("UPDATE checkpoints SET state = (SELECT state FROM checkpoints WHERE workspace = 'other') WHERE workspace = 'acme'")
            .await;
        let found = store.checkpoint(&acme).await.unwrap().unwrap();
        assert!(found.offset == 8 && found.state.unwrap().head != state(2, &[]).head, "it is another workspace's");
    }

    /// A head of `head`, and parts by name of which each holds one number.
    fn state(head: u8, parts: &[(&str, u8)]) -> State {
        let parts = parts.iter().map(|(name, byte)| ((*name).to_owned(), vec![*byte]));
        State { head: vec![head], parts: parts.collect() }
    }

    fn changes(whole: bool, head: u8, parts: &[(&str, u8)], gone: &[&str]) -> Changes {
        let State { head, parts } = state(head, parts);
        let gone = gone.iter().map(|name| (*name).to_owned()).collect();
        Changes { head, parts: parts.into_iter().collect(), gone, whole }
    }

    #[tokio::test]
    async fn a_state_is_what_the_changes_of_its_commits_make_of_it() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        let of =
            |workspace: &WorkspaceId, offset, changes| Commit { state: Some(changes), ..commit(workspace, offset) };
        store.commit(&[of(&other, 1, changes(true, 7, &[("a", 7), ("b", 7)], &[]))]).await.unwrap();
        let mut expected = State::default();
        let steps = [
            changes(true, 1, &[("a", 1), ("b", 1), ("c", 1)], &[]),
            changes(false, 2, &[("b", 2), ("d", 2)], &["a"]),
            changes(false, 3, &[], &["d", "unknown"]),
            changes(false, 4, &[("a", 4)], &["b", "c"]),
            changes(true, 5, &[("c", 5)], &[]),
            changes(true, 6, &[], &[]),
        ];
        for (step, changes) in steps.iter().enumerate() {
            let commit = of(&acme, step as u64, changes.clone());
            for _ in 0..2 {
                store.commit(std::slice::from_ref(&commit)).await.unwrap(); // a repeat changes nothing
            }
            expected.apply(changes.clone());
            assert_eq!(store.checkpoint(&acme).await.unwrap().unwrap().state.as_ref(), Some(&expected), "step {step}");
        }
        // all of them at once, beside another workspace
        let mut all: Vec<Commit> =
            steps.iter().enumerate().map(|(at, changes)| of(&acme, 10 + at as u64, changes.clone())).collect();
        all.push(of(&other, 2, changes(false, 8, &[("b", 8)], &[])));
        store.commit(&all).await.unwrap();
        assert_eq!(store.checkpoint(&acme).await.unwrap().unwrap().state, Some(expected));
        let beside = store.checkpoint(&other).await.unwrap().unwrap().state;
        assert_eq!(beside, Some(state(8, &[("a", 7), ("b", 8)])));
        store.delete_workspace(&other).await.unwrap();
        let left: i64 =
            query_scalar("SELECT COUNT(*) FROM state_parts").fetch_one(store.read(Scope::Installation)).await.unwrap();
        assert_eq!(left, 0, "parts go with their checkpoint");
    }

    #[tokio::test]
    async fn parts_beyond_the_size_of_one_statement_are_all_written() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let parts: Vec<(String, Vec<u8>)> = (0..5).map(|n| (format!("p{n}"), vec![n; 5 << 20])).collect();
        let changes = Changes { head: vec![1], parts, gone: vec![], whole: true };
        store.commit(&[Commit { state: Some(changes.clone()), ..commit(&acme, 1) }]).await.unwrap();
        let mut expected = State::default();
        expected.apply(changes);
        assert!(store.checkpoint(&acme).await.unwrap().unwrap().state == Some(expected));
    }

    #[tokio::test]
    async fn rows_of_many_workspaces_commit_together_beyond_the_size_of_one_statement() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        let many = |workspace: &WorkspaceId, n: i64| Commit {
            rows: (0..n).rev().map(|start| row("vwap", start, "A", 0)).collect(),
            ..commit(workspace, 1)
        };
        store.commit(&[many(&acme, 600), many(&other, 1)]).await.unwrap();
        let read = rows(&store, &acme).await;
        assert_eq!(read, (0..600).map(|start| row("vwap", start, "A", 0)).collect::<Vec<_>>());
        assert_eq!(rows(&store, &other).await.len(), 1);
    }

    /// Prints what a commit of many rows costs: `cargo test -p tidewatch-sql hundred_thousand -- --nocapture`.
    #[tokio::test]
    async fn a_hundred_thousand_rows_commit_at_once() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let rows: Vec<FinalRow> = (0..100_000_i64)
            .map(|i| FinalRow {
                row: format!(r#"{{"vwap":{}.25,"volume":{i},"trades":17}}"#, i % 977),
                ..row("vwap", (i % 10) * 60_000_000, &format!("SYM{:05}", i / 10), 0)
            })
            .collect();
        for offset in [1, 2] {
            let full = [Commit { rows: rows.clone(), ..commit(&acme, offset) }];
            let started = std::time::Instant::now();
            store.commit(&full).await.unwrap();
            let seconds = started.elapsed().as_secs_f64();
            println!("commit {offset} of {} rows: {seconds:.2} s, {:.0} rows/s", rows.len(), 1e5 / seconds);
        }
        let count: i64 =
            query_scalar("SELECT COUNT(*) FROM final_rows").fetch_one(store.read(Scope::Installation)).await.unwrap();
        assert_eq!(count, 100_000);
    }
}
