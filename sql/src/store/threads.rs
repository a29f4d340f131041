//! Conversations with agents: threads and their messages, runs and their events.

use super::db::{Builder, FromRow, Row, Scope, query, query_as, query_scalar};
use super::page;
use super::record::Columns;
use super::{Store, StoreError, bulk, failed, stored};
use engine::event::{Micros, WorkspaceId};
use serde_json::Value;

/// A conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Thread {
    pub workspace: WorkspaceId,
    /// AG-UI `threadId`.
    pub id: String,
    pub agent: String,
    pub title: String,
    pub created_by: String,
    pub created_at: Micros,
    /// Last change or message.
    pub updated_at: Micros,
    /// AG-UI shared state.
    pub state: Value,
}

/// A message of a thread.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The client's: the same id again is the same message.
    pub id: String,
    pub role: String,
    /// The whole AG-UI message object.
    pub content: Value,
    /// The run that wrote it, if one did.
    pub run_id: Option<String>,
    pub created_at: Micros,
}

/// One answer of an agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub workspace: WorkspaceId,
    /// Id of the thread.
    pub thread: String,
    /// AG-UI `runId`.
    pub run_id: String,
    pub agent: String,
    pub status: String,
    pub started_at: Micros,
    /// `None` while it runs.
    pub finished_at: Option<Micros>,
    pub error: Option<String>,
}

/// Where a page of threads ended: last change, id.
type Position = (i64, String);

impl FromRow for Thread {
    fn from_row(row: &Row) -> Result<Thread, sqlx::Error> {
        Ok(Thread {
            workspace: row.name("workspace")?,
            id: row.try_get("id")?,
            agent: row.try_get("agent")?,
            title: row.try_get("title")?,
            created_by: row.try_get("created_by")?,
            created_at: row.time("created_at")?,
            updated_at: row.time("updated_at")?,
            state: row.json("state_json")?,
        })
    }
}

impl FromRow for Message {
    fn from_row(row: &Row) -> Result<Message, sqlx::Error> {
        Ok(Message {
            id: row.try_get("id")?,
            role: row.try_get("role")?,
            content: row.json("content_json")?,
            run_id: row.try_get("run_id")?,
            created_at: row.time("created_at")?,
        })
    }
}

impl FromRow for Run {
    fn from_row(row: &Row) -> Result<Run, sqlx::Error> {
        Ok(Run {
            workspace: row.name("workspace")?,
            thread: row.try_get("thread")?,
            run_id: row.try_get("run_id")?,
            agent: row.try_get("agent")?,
            status: row.try_get("status")?,
            started_at: row.time("started_at")?,
            finished_at: row.time_if_any("finished_at")?,
            error: row.try_get("error")?,
        })
    }
}

impl Store {
    /// Adds a thread, or changes its agent, title, state and time of change; who made it and when stays.
    pub async fn upsert_thread(&self, thread: &Thread) -> Result<(), StoreError> {
        query(
            "INSERT INTO threads (workspace, id, agent, title, created_by, created_at, updated_at, state_json) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (workspace, id) DO UPDATE \
             SET agent = excluded.agent, title = excluded.title, updated_at = excluded.updated_at, \
             state_json = excluded.state_json",
        )
        .bind(thread.workspace.as_str())
        .bind(&thread.id)
        .bind(&thread.agent)
        .bind(&thread.title)
        .bind(&thread.created_by)
        .bind(thread.created_at)
        .bind(thread.updated_at)
        .bind(thread.state.to_string())
        .execute(self.write(&thread.workspace))
        .await
        .map_err(failed("put thread"))?;
        Ok(())
    }

    pub async fn thread(&self, workspace: &WorkspaceId, id: &str) -> Result<Option<Thread>, StoreError> {
        query_as("SELECT * FROM threads WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read thread"))
    }

    /// A page of threads, those changed last first, and the cursor of the next page if there is one. At least one row
    /// a page; [`StoreError::Cursor`] for a `before` that no page gave.
    pub async fn threads(
        &self,
        workspace: &WorkspaceId,
        limit: usize,
        before: Option<&str>,
    ) -> Result<(Vec<Thread>, Option<String>), StoreError> {
        let mut sql = Builder::new("SELECT * FROM threads WHERE workspace = ");
        sql.push_bind(workspace.as_str());
        if let Some((updated_at, id)) = page::position::<Position>(before)? {
            sql.push(" AND (updated_at, id) < (").push_bind(Micros(updated_at)).push(", ").push_bind(id).push(")");
        }
        sql.push(" ORDER BY updated_at DESC, id DESC LIMIT ").push_bind(page::rows_to_read(limit));
        let rows: Vec<Thread> = sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("list threads"))?;
        Ok(page::cut(rows, limit, |thread| (thread.updated_at.0, thread.id.clone())))
    }

    /// Adds messages at the end of a thread, in order; one whose id the thread has already is left out. The thread
    /// counts as changed at the latest of them. [`StoreError::Missing`] when there is no such thread.
    pub async fn append_messages(
        &self,
        workspace: &WorkspaceId,
        thread: &str,
        messages: &[Message],
    ) -> Result<(), StoreError> {
        let Some(latest) = messages.iter().map(|message| message.created_at).max() else { return Ok(()) };
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            // Also what keeps two writers from giving out the same numbers, where more than one can write at a time.
            query(
                "UPDATE threads SET updated_at = CASE WHEN updated_at < $3 THEN $3 ELSE updated_at END \
                 WHERE workspace = $1 AND id = $2",
            )
            .bind(workspace.as_str())
            .bind(thread)
            .bind(latest)
            .execute(&mut tx)
            .await?;
            let last: i64 =
                query_scalar("SELECT COALESCE(MAX(seq), 0) FROM messages WHERE workspace = $1 AND thread = $2")
                    .bind(workspace.as_str())
                    .bind(thread)
                    .fetch_one(&mut tx)
                    .await?;
            bulk::insert(
                &mut tx,
                [
                    "INSERT INTO messages (workspace, thread, seq, id, role, content_json, run_id, created_at) ",
                    " ON CONFLICT (workspace, thread, id) DO NOTHING",
                ],
                &(last + 1..).zip(messages).collect::<Vec<_>>(),
                |(_, message)| &message.id,
                |values, (seq, message)| {
                    values.push_bind(workspace.as_str());
                    values.push_bind(thread);
                    values.push_bind(*seq);
                    values.push_bind(message.id.as_str());
                    values.push_bind(message.role.as_str());
                    values.push_bind(message.content.to_string());
                    values.push_bind(message.run_id.as_deref());
                    values.push_bind(message.created_at);
                },
            )
            .await?;
            tx.commit().await
        }
        .await
        .map_err(failed("append messages"))
    }

    /// At most `limit` messages of a thread that follow number `after_seq` (0: from the first), each with its number.
    /// Numbers grow and may have gaps.
    pub async fn messages(
        &self,
        workspace: &WorkspaceId,
        thread: &str,
        after_seq: i64,
        limit: usize,
    ) -> Result<Vec<(i64, Message)>, StoreError> {
        async {
            let rows =
                query("SELECT * FROM messages WHERE workspace = $1 AND thread = $2 AND seq > $3 ORDER BY seq LIMIT $4")
                    .bind(workspace.as_str())
                    .bind(thread)
                    .bind(after_seq)
                    .bind(stored(limit as u64))
                    .fetch_all(self.read(workspace))
                    .await?;
            rows.iter()
                .map(|row| Ok((row.try_get("seq")?, Message::from_row(row)?)))
                .collect::<Result<Vec<_>, sqlx::Error>>()
        }
        .await
        .map_err(failed("read messages"))
    }

    /// Adds a run: `false`, and nothing changes, when the workspace has a run of this id, in whatever thread.
    /// [`StoreError::Missing`] when there is no such thread.
    pub async fn insert_run(&self, run: &Run) -> Result<bool, StoreError> {
        let inserted = query(
            "INSERT INTO runs (workspace, thread, run_id, agent, status, started_at, finished_at, error) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (workspace, run_id) DO NOTHING",
        )
        .bind(run.workspace.as_str())
        .bind(&run.thread)
        .bind(&run.run_id)
        .bind(&run.agent)
        .bind(&run.status)
        .bind(run.started_at)
        .bind(run.finished_at)
        .bind(&run.error)
        .execute(self.write(&run.workspace))
        .await
        .map_err(failed("insert run"))?;
        Ok(inserted > 0)
    }

    /// Ends a run, once: `false`, and nothing changes, when it has ended already or there is none.
    pub async fn finish_run(
        &self,
        workspace: &WorkspaceId,
        run_id: &str,
        status: &str,
        at: Micros,
        error: Option<&str>,
    ) -> Result<bool, StoreError> {
        let finished = query(
            "UPDATE runs SET status = $3, finished_at = $4, error = $5 \
             WHERE workspace = $1 AND run_id = $2 AND finished_at IS NULL",
        )
        .bind(workspace.as_str())
        .bind(run_id)
        .bind(status)
        .bind(at)
        .bind(error)
        .execute(self.write(workspace))
        .await
        .map_err(failed("finish run"))?;
        Ok(finished > 0)
    }

    pub async fn run(&self, workspace: &WorkspaceId, run_id: &str) -> Result<Option<Run>, StoreError> {
        query_as("SELECT * FROM runs WHERE workspace = $1 AND run_id = $2")
            .bind(workspace.as_str())
            .bind(run_id)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read run"))
    }

    /// The run of a thread that began last.
    pub async fn last_run(&self, workspace: &WorkspaceId, thread: &str) -> Result<Option<Run>, StoreError> {
        query_as(
            "SELECT * FROM runs WHERE workspace = $1 AND thread = $2 ORDER BY started_at DESC, run_id DESC LIMIT 1",
        )
        .bind(workspace.as_str())
        .bind(thread)
        .fetch_optional(self.read(workspace))
        .await
        .map_err(failed("read the last run of a thread"))
    }

    /// The runs of all workspaces that have not ended, oldest first: after a restart, those it cut off.
    pub async fn unfinished_runs(&self) -> Result<Vec<Run>, StoreError> {
        query_as("SELECT * FROM runs WHERE finished_at IS NULL ORDER BY started_at, workspace, run_id")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list unfinished runs"))
    }

    /// Keeps events of a run, numbered from `first_n` on; a number that is there already keeps its event.
    /// [`StoreError::Missing`] when there is no such run.
    pub async fn append_run_events(
        &self,
        workspace: &WorkspaceId,
        run_id: &str,
        first_n: u64,
        events: &[String],
    ) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            bulk::insert(
                &mut tx,
                [
                    "INSERT INTO run_events (workspace, run_id, n, event) ",
                    " ON CONFLICT (workspace, run_id, n) DO NOTHING",
                ],
                &(stored(first_n)..).zip(events).collect::<Vec<_>>(),
                |(n, _)| *n,
                |values, (n, event)| {
                    values.push_bind(workspace.as_str());
                    values.push_bind(run_id);
                    values.push_bind(*n);
                    values.push_bind(event.as_str());
                },
            )
            .await?;
            tx.commit().await
        }
        .await
        .map_err(failed("append run events"))
    }

    /// The events of a run from number `from_n` on, each with its number.
    pub async fn run_events(
        &self,
        workspace: &WorkspaceId,
        run_id: &str,
        from_n: u64,
    ) -> Result<Vec<(u64, String)>, StoreError> {
        async {
            let rows =
                query("SELECT n, event FROM run_events WHERE workspace = $1 AND run_id = $2 AND n >= $3 ORDER BY n")
                    .bind(workspace.as_str())
                    .bind(run_id)
                    .bind(stored(from_n))
                    .fetch_all(self.read(workspace))
                    .await?;
            rows.iter().map(|row| Ok((row.count("n")?, row.try_get("event")?))).collect::<Result<Vec<_>, sqlx::Error>>()
        }
        .await
        .map_err(failed("read run events"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use serde_json::json;

    fn thread(workspace: &WorkspaceId, id: &str, at: i64) -> Thread {
        Thread {
            workspace: workspace.clone(),
            id: id.into(),
            agent: "analyst".into(),
            title: "Prices".into(),
            created_by: "ann".into(),
            created_at: Micros(at),
            updated_at: Micros(at),
            state: json!({"step": 1}),
        }
    }

    fn message(id: &str, at: i64) -> Message {
        Message {
            id: id.into(),
            role: "user".into(),
            content: json!({"id": id, "content": [{"type": "text", "text": "Grüße \u{1F30A}"}]}),
            run_id: Some("run".into()),
            created_at: Micros(at),
        }
    }

    fn run(workspace: &WorkspaceId, run_id: &str) -> Run {
        Run {
            workspace: workspace.clone(),
            thread: "t".into(),
            run_id: run_id.into(),
            agent: "analyst".into(),
            status: "running".into(),
            started_at: Micros(1),
            finished_at: None,
            error: None,
        }
    }

    async fn store_with_thread() -> (Store, WorkspaceId, tempfile::TempDir) {
        let (store, dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.upsert_thread(&thread(&acme, "t", 1)).await.unwrap();
        (store, acme, dir)
    }

    #[tokio::test]
    async fn a_thread_changes_and_keeps_who_made_it() {
        let (store, acme, _dir) = store_with_thread().await;
        let changed = Thread { title: "FX".into(), created_by: "bob".into(), ..thread(&acme, "t", 9) };
        store.upsert_thread(&changed).await.unwrap();
        let expected = Thread { created_by: "ann".into(), created_at: Micros(1), ..changed };
        assert_eq!(store.thread(&acme, "t").await.unwrap(), Some(expected));
    }

    #[tokio::test]
    async fn a_message_that_comes_again_is_not_repeated_and_the_order_stays() {
        let (store, acme, _dir) = store_with_thread().await;
        store.append_messages(&acme, "t", &[message("a", 5), message("b", 6)]).await.unwrap();
        let other_text = Message { content: json!({}), ..message("b", 9) };
        store.append_messages(&acme, "t", &[other_text, message("c", 7), message("c", 7)]).await.unwrap();
        store.append_messages(&acme, "t", &[]).await.unwrap();

        let read = store.messages(&acme, "t", 0, 10).await.unwrap();
        let expected = [message("a", 5), message("b", 6), message("c", 7)];
        assert_eq!(read.iter().map(|(_, message)| message).collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
        assert_eq!(store.messages(&acme, "t", read[0].0, 1).await.unwrap(), read[1..2]);
        assert_eq!(store.thread(&acme, "t").await.unwrap().unwrap().updated_at, Micros(9));
        let lost = store.append_messages(&acme, "none", &[message("a", 1)]).await;
        assert!(matches!(lost, Err(StoreError::Missing { .. })));
    }

    #[tokio::test]
    async fn paging_brings_every_thread_once_last_changed_first_also_where_times_tie() {
        let (store, acme, _dir) = store_with_thread().await;
        let mut all = vec![thread(&acme, "t", 1)];
        for i in 0..7 {
            all.push(thread(&acme, &format!("t{i}"), i / 3));
            store.upsert_thread(all.last().unwrap()).await.unwrap();
        }
        all.sort_by_key(|t| std::cmp::Reverse((t.updated_at, t.id.clone())));
        let (mut read, mut before) = (Vec::new(), None);
        loop {
            let (page, next) = store.threads(&acme, 3, before.as_deref()).await.unwrap();
            read.extend(page);
            before = next;
            if before.is_none() {
                break;
            }
        }
        assert_eq!(read, all);
    }

    #[tokio::test]
    async fn a_run_starts_once_and_ends_once() {
        let (store, acme, _dir) = store_with_thread().await;
        assert!(store.insert_run(&run(&acme, "r")).await.unwrap());
        assert!(!store.insert_run(&Run { agent: "other".into(), ..run(&acme, "r") }).await.unwrap());
        assert_eq!(store.unfinished_runs().await.unwrap(), [run(&acme, "r")]);

        assert!(store.finish_run(&acme, "r", "failed", Micros(5), Some("model gone")).await.unwrap());
        assert!(!store.finish_run(&acme, "r", "finished", Micros(6), None).await.unwrap());
        let ended = Run {
            status: "failed".into(),
            finished_at: Some(Micros(5)),
            error: Some("model gone".into()),
            ..run(&acme, "r")
        };
        assert_eq!(store.run(&acme, "r").await.unwrap(), Some(ended));
        assert_eq!(store.unfinished_runs().await.unwrap(), []);
        let lost = store.insert_run(&Run { thread: "none".into(), ..run(&acme, "s") }).await;
        assert!(matches!(lost, Err(StoreError::Missing { .. })));
    }

    #[tokio::test]
    async fn the_last_run_of_a_thread_is_the_one_that_began_last() {
        let (store, acme, _dir) = store_with_thread().await;
        let last = async || store.last_run(&acme, &run(&acme, "a").thread).await.unwrap();
        assert_eq!(last().await, None);
        let later = Run { started_at: Micros(9), ..run(&acme, "a") };
        for run in [later.clone(), Run { started_at: Micros(8), ..run(&acme, "b") }] {
            assert!(store.insert_run(&run).await.unwrap());
        }
        assert_eq!(last().await, Some(later));
        assert_eq!(store.last_run(&acme, "another").await.unwrap(), None);
    }

    #[tokio::test]
    async fn run_events_come_back_from_any_number_and_repeats_keep_the_first() {
        let (store, acme, _dir) = store_with_thread().await;
        store.insert_run(&run(&acme, "r")).await.unwrap();
        let events: Vec<String> = (0..300).map(|n| format!(r#"{{"n":{n}}}"#)).collect();
        store.append_run_events(&acme, "r", 0, &events[..200]).await.unwrap();
        store.append_run_events(&acme, "r", 199, &["{}".to_string()]).await.unwrap();
        store.append_run_events(&acme, "r", 200, &events[200..]).await.unwrap();
        let expected: Vec<(u64, String)> = (0..).zip(events).collect();
        assert_eq!(store.run_events(&acme, "r", 0).await.unwrap(), expected);
        assert_eq!(store.run_events(&acme, "r", 298).await.unwrap(), expected[298..]);
        assert_eq!(store.run_events(&acme, "r", u64::MAX).await.unwrap(), []);
        let lost = store.append_run_events(&acme, "none", 0, &["{}".to_string()]).await;
        assert!(matches!(lost, Err(StoreError::Missing { .. })));
    }
}
