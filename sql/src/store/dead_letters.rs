//! Events that could not be used, kept for their sender to look at.

use super::db::{Builder, FromRow, Row, Tx, query};
use super::page;
use super::record::Columns;
use super::{Store, StoreError, bulk, failed, stored};
use engine::event::{Micros, StreamName, WorkspaceId};
use sha2::{Digest, Sha256};

/// An event that could not be used, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    pub stream: StreamName,
    pub at: Micros,
    /// A stable word.
    pub code: String,
    pub detail: String,
    /// The event as it came.
    pub payload: String,
}

impl FromRow for DeadLetter {
    fn from_row(row: &Row) -> Result<DeadLetter, sqlx::Error> {
        Ok(DeadLetter {
            stream: row.name("stream")?,
            at: row.time("at")?,
            code: row.try_get("code")?,
            detail: row.try_get("detail")?,
            payload: row.try_get("payload")?,
        })
    }
}

/// A dead letter and its place among them, which a page ends at.
struct Placed {
    seq: i64,
    letter: DeadLetter,
}

impl FromRow for Placed {
    fn from_row(row: &Row) -> Result<Placed, sqlx::Error> {
        Ok(Placed { seq: row.try_get("seq")?, letter: DeadLetter::from_row(row)? })
    }
}

impl DeadLetter {
    /// What tells this letter from others. Equal only for letters equal in everything, the time to the microsecond.
    fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for part in [self.stream.as_str(), &self.code, &self.detail, &self.payload] {
            hash.update(part.len().to_le_bytes()); // so that text cannot move from one part into the next
            hash.update(part);
        }
        hash.update(self.at.0.to_le_bytes());
        hash.finalize().into()
    }
}

impl Store {
    /// Adds dead letters and then drops the workspace's oldest until `keep` are left. A letter equal in everything to
    /// one that is there is the same letter.
    pub async fn add_dead_letters(
        &self,
        workspace: &WorkspaceId,
        letters: &[DeadLetter],
        keep: usize,
    ) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            write(&mut tx, workspace, letters, keep).await?;
            tx.commit().await
        }
        .await
        .map_err(failed("add dead letters"))
    }

    /// A page of the dead letters of a workspace, of one stream or of all, newest first, and the cursor of the next.
    pub async fn dead_letters(
        &self,
        workspace: &WorkspaceId,
        stream: Option<&StreamName>,
        limit: usize,
        after: Option<&str>,
    ) -> Result<(Vec<DeadLetter>, Option<String>), StoreError> {
        let mut sql = Builder::new("SELECT * FROM dead_letters WHERE workspace = ");
        sql.push_bind(workspace.as_str());
        if let Some(stream) = stream {
            sql.push(" AND stream = ").push_bind(stream.as_str());
        }
        if let Some(seq) = page::position::<i64>(after)? {
            sql.push(" AND seq < ").push_bind(seq);
        }
        sql.push(" ORDER BY seq DESC LIMIT ").push_bind(page::rows_to_read(limit));
        let rows: Vec<Placed> =
            sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("list dead letters"))?;
        let (rows, next) = page::cut(rows, limit, |placed| placed.seq);
        Ok((rows.into_iter().map(|placed| placed.letter).collect(), next))
    }
}

pub(super) async fn write(
    tx: &mut Tx,
    workspace: &WorkspaceId,
    letters: &[DeadLetter],
    keep: usize,
) -> Result<(), sqlx::Error> {
    if letters.is_empty() {
        return Ok(());
    }
    let digested: Vec<_> = letters.iter().map(|letter| (letter.digest(), letter)).collect();
    bulk::insert(
        tx,
        [
            "INSERT INTO dead_letters (workspace, digest, stream, at, code, detail, payload) ",
            " ON CONFLICT (workspace, digest) DO NOTHING",
        ],
        &digested,
        |(digest, _)| digest,
        |values, (digest, letter)| {
            values.push_bind(workspace.as_str());
            values.push_bind(digest.as_slice());
            values.push_bind(letter.stream.as_str());
            values.push_bind(letter.at);
            values.push_bind(letter.code.as_str());
            values.push_bind(letter.detail.as_str());
            values.push_bind(letter.payload.as_str());
        },
    )
    .await?;
    query(
        "DELETE FROM dead_letters WHERE workspace = $1 AND seq <= \
         (SELECT seq FROM dead_letters WHERE workspace = $1 ORDER BY seq DESC LIMIT 1 OFFSET $2)",
    )
    .bind(workspace.as_str())
    .bind(stored(keep as u64))
    .execute(tx)
    .await?;
    Ok(())
}

#[cfg(test)]
pub(super) mod testing {
    use super::super::testing::name;
    use super::*;

    pub fn letter(stream: &str, at: i64) -> DeadLetter {
        DeadLetter {
            stream: name(stream),
            at: Micros(at),
            code: "too_late".into(),
            detail: "past the allowed lateness".into(),
            payload: r#"{"symbol":"A"}"#.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::db::Dialect;
    use super::super::testing::*;
    use super::testing::letter;
    use super::*;

    #[tokio::test]
    async fn the_newest_are_kept_and_other_workspaces_are_not_counted() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        store.add_dead_letters(&other, &[letter("a.b", 1)], 3).await.unwrap();
        store.add_dead_letters(&acme, &[letter("a.b", 1), letter("a.c", 2)], 3).await.unwrap();
        store.add_dead_letters(&acme, &[letter("a.b", 3), letter("a.c", 4)], 3).await.unwrap();
        let kept = [letter("a.c", 4), letter("a.b", 3), letter("a.c", 2)];
        assert_eq!(store.dead_letters(&acme, None, 10, None).await.unwrap().0, kept);
        assert_eq!(store.dead_letters(&acme, None, 1, None).await.unwrap().0, kept[..1]);
        assert_eq!(store.dead_letters(&acme, Some(&name("a.b")), 10, None).await.unwrap().0, kept[1..2]);
        assert_eq!(store.dead_letters(&other, None, 10, None).await.unwrap().0, [letter("a.b", 1)]);
    }

    #[tokio::test]
    async fn pages_follow_one_another_although_letters_come_meanwhile() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let letters = [letter("a.b", 1), letter("a.c", 2), letter("a.b", 3)];
        store.add_dead_letters(&acme, &letters, 10).await.unwrap();
        let (first, next) = store.dead_letters(&acme, None, 2, None).await.unwrap();
        assert_eq!(first, [letters[2].clone(), letters[1].clone()]);
        store.add_dead_letters(&acme, &[letter("a.b", 4)], 10).await.unwrap();
        let (second, end) = store.dead_letters(&acme, None, 2, next.as_deref()).await.unwrap();
        assert_eq!((second, end), (vec![letters[0].clone()], None));
        let (only, next) = store.dead_letters(&acme, Some(&name("a.b")), 2, None).await.unwrap();
        assert_eq!(only, [letter("a.b", 4), letter("a.b", 3)]);
        let (rest, end) = store.dead_letters(&acme, Some(&name("a.b")), 2, next.as_deref()).await.unwrap();
        assert_eq!((rest, end), (vec![letter("a.b", 1)], None));
        assert!(store.dead_letters(&acme, None, 2, Some("?")).await.is_err());
    }

    #[tokio::test]
    async fn letters_are_the_same_only_when_equal_in_everything() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let first = letter("a.b", 1);
        let moved = DeadLetter { code: "too_latepast".into(), detail: " the allowed lateness".into(), ..first.clone() };
        let letters = [first.clone(), first.clone(), moved.clone(), first.clone()];
        store.add_dead_letters(&acme, &letters, 10).await.unwrap();
        store.add_dead_letters(&acme, &letters, 10).await.unwrap();
        assert_eq!(store.dead_letters(&acme, None, 10, None).await.unwrap().0, [moved, first]);
    }

    #[tokio::test]
    async fn a_payload_with_a_nul_is_kept_readable_and_stops_no_commit() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let broken = DeadLetter { payload: "{\"symbol\":\"A\0B\"}".into(), ..letter("a.b", 1) };
        store.add_dead_letters(&acme, std::slice::from_ref(&broken), 10).await.unwrap();
        let read = store.dead_letters(&acme, None, 10, None).await.unwrap().0;
        let expected = match store.db.dialect() {
            Dialect::Sqlite => broken.payload.clone(),
            Dialect::Postgres => broken.payload.replace('\0', "\u{2400}"),
        };
        assert_eq!(read, [DeadLetter { payload: expected, ..broken }]);
    }
}
