//! Commits of many workspaces in one transaction: ten thousand that are active share the price of the disk.

use futures::FutureExt;
use parking_lot::Mutex;
use sql::store::{Commit, Store, StoreError};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Rows and alerts in one transaction, after which the others wait for the next: keeps the wait of the first short.
const GROUP_ROWS_MAX: usize = 20_000;
/// Workspaces in one transaction.
const GROUP_MAX: usize = 512;

/// Takes commits of all workspaces and writes all that wait together.
///
/// Each workspace has one commit under way at most, so what waits is bounded by their number.
pub(crate) struct Committer {
    waiting: Mutex<Vec<Waiting>>,
    wake: Notify,
    /// Why nothing of the last group was stored, where the store is to blame.
    failing: Mutex<Option<Arc<StoreError>>>,
}

struct Waiting {
    commit: Commit,
    done: oneshot::Sender<Answer>,
}

type Answer = (Commit, Result<(), Arc<StoreError>>);

impl Committer {
    /// Writes to `store` for as long as somebody holds the answer.
    pub(crate) fn start(store: Store) -> Arc<Committer> {
        let committer =
            Arc::new(Committer { waiting: Mutex::default(), wake: Notify::new(), failing: Mutex::default() });
        for _ in 0..store.writers() {
            tokio::spawn(run(Arc::downgrade(&committer), store.clone()));
        }
        committer
    }

    /// Returns once `commit` is in the store, or why it is not; the commit comes back either way.
    /// `None`: the process ends.
    pub(crate) async fn commit(&self, commit: Commit) -> Option<Answer> {
        let (done, answer) = oneshot::channel();
        self.waiting.lock().push(Waiting { commit, done });
        self.wake.notify_one();
        answer.await.ok()
    }

    /// Why results are not stored at the moment.
    pub(crate) fn failing(&self) -> Option<Arc<StoreError>> {
        self.failing.lock().clone()
    }

    fn take(&self) -> Vec<Waiting> {
        let mut waiting = self.waiting.lock();
        let mut rows = 0;
        let fits = waiting.iter().take(GROUP_MAX).take_while(|w| {
            let before = rows;
            rows += w.commit.rows.len() + w.commit.alerts.len() + w.commit.dead_letters.len();
            before < GROUP_ROWS_MAX
        });
        let count = fits.count();
        waiting.drain(..count).collect()
    }
}

async fn run(committer: Weak<Committer>, store: Store) {
    loop {
        let Some(strong) = committer.upgrade() else { return };
        let group = strong.take();
        if group.is_empty() {
            // a workspace that goes leaves nothing behind, so a while without commits is looked at again
            _ = tokio::time::timeout(Duration::from_secs(1), strong.wake.notified()).await;
            continue;
        }
        drop(strong);
        let (commits, answers): (Vec<Commit>, Vec<_>) = group.into_iter().map(|w| (w.commit, w.done)).unzip();
        let result = write(&store, &commits).await;
        let alone = commits.len() == 1;
        let (mut any_stored, mut failing) = (false, None);
        for (commit, done) in commits.into_iter().zip(answers) {
            let result = match &result {
                Ok(()) => Ok(()),
                // one of them is the culprit: each for itself
                Err(_) if !alone => write(&store, std::slice::from_ref(&commit)).await,
                Err(error) => Err(error.clone()),
            };
            match &result {
                Ok(()) => any_stored = true,
                Err(error) if is_stores(error) => failing = Some(error.clone()),
                Err(_) => {}
            }
            _ = done.send((commit, result)); // the actor may have failed meanwhile
        }
        if let Some(committer) = committer.upgrade() {
            *committer.failing.lock() = failing.filter(|_| !any_stored);
        }
    }
}

/// Whether the store failed, and not what it was given.
fn is_stores(error: &StoreError) -> bool {
    use StoreError::{Busy, Damaged, Database, Unreachable};
    matches!(error, Unreachable { .. } | Busy { .. } | Damaged { .. } | Database { .. })
}

/// A panic below must not take the committer with it.
async fn write(store: &Store, commits: &[Commit]) -> Result<(), Arc<StoreError>> {
    match AssertUnwindSafe(store.commit(commits)).catch_unwind().await {
        Ok(result) => result.map_err(Arc::new),
        Err(_) => Err(Arc::new(StoreError::Busy { operation: "commit" })),
    }
}
