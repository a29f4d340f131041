//! The parts of the state of workspaces: a commit writes those that changed.

use super::bulk;
use super::checkpoints::Commit;
use super::db::{Column, Row, Tx, execute_columns, query};
use super::record::Columns;
use super::{Checkpoint, Store};
use engine::checkpoint::State;
use engine::event::WorkspaceId;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of parts in one statement, where one of them is not more: PostgreSQL takes no message of a gigabyte.
const STATEMENT_BYTES: usize = 16 << 20;

/// A part, and its bytes unless it goes.
type Part<'c> = ((&'c str, &'c str), Option<&'c [u8]>);

/// Writes the parts that changed, behind the checkpoints they belong to.
pub(super) async fn write(tx: &mut Tx, commits: &[Commit]) -> Result<(), sqlx::Error> {
    let (mut seen, mut whole) = (BTreeSet::new(), BTreeSet::new());
    let mut parts: BTreeMap<(&str, &str), Option<&[u8]>> = BTreeMap::new();
    for commit in commits {
        let Some(state) = &commit.state else { continue };
        let workspace = commit.workspace.as_str();
        let is_first = seen.insert(workspace);
        if state.whole {
            whole.insert(workspace);
        }
        if state.whole && !is_first {
            parts.retain(|(of, _), _| *of != workspace);
        }
        parts.extend(state.gone.iter().map(|name| ((workspace, name.as_str()), None)));
        parts.extend(state.parts.iter().map(|(name, bytes)| ((workspace, name.as_str()), Some(bytes.as_slice()))));
    }
    delete(tx, &["workspace"], whole.into_iter().map(|workspace| vec![workspace]).collect()).await?;
    let (changed, gone): (Vec<Part<'_>>, Vec<Part<'_>>) = parts.into_iter().partition(|(_, bytes)| bytes.is_some());
    let gone = gone.into_iter().map(|((workspace, name), _)| vec![workspace, name]);
    delete(tx, &["workspace", "name"], gone.collect()).await?;
    let mut rest = changed.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fit = rest.iter().take_while(|(_, part)| {
            bytes += part.map_or(0, <[u8]>::len);
            bytes <= STATEMENT_BYTES
        });
        let (now, later) = rest.split_at(fit.count().max(1));
        bulk::insert(
            tx,
            [
                "INSERT INTO state_parts (workspace, name, state) ",
                " ON CONFLICT (workspace, name) DO UPDATE SET state = excluded.state",
            ],
            now,
            |(place, _)| *place,
            |values, ((workspace, name), bytes)| {
                values.push_bind(*workspace);
                values.push_bind(*name);
                values.push_bind(*bytes);
            },
        )
        .await?;
        rest = later;
    }
    Ok(())
}

/// Deletes the parts whose `columns` have one of `values`.
async fn delete(tx: &mut Tx, columns: &[&str], values: Vec<Vec<&str>>) -> Result<(), sqlx::Error> {
    if values.is_empty() {
        return Ok(());
    }
    let equal = |right: &str| {
        let each = columns.iter().enumerate().map(|(n, column)| format!("state_parts.{column} = {right}{}", n + 1));
        each.collect::<Vec<_>>().join(" AND ")
    };
    match tx {
        Tx::Sqlite(_) => {
            let sql = format!("DELETE FROM state_parts WHERE {}", equal("$"));
            for row in values {
                let statement = row.into_iter().fold(query(sql.clone()), |statement, value| statement.bind(value));
                statement.execute(&mut *tx).await?;
            }
        }
        Tx::Postgres(tx) => {
            let names: Vec<String> = (1..=columns.len()).map(|n| format!("c{n}")).collect();
            let arrays: Vec<String> = (1..=columns.len()).map(|n| format!("${n}::text[]")).collect();
            let sql = format!(
                "DELETE FROM state_parts USING UNNEST({}) AS given ({}) WHERE {}",
                arrays.join(", "),
                names.join(", "),
                equal("c")
            );
            let column = |at: usize| Column::Text(values.iter().map(|row| Some(row[at].into())).collect());
            execute_columns(tx, sql, (0..columns.len()).map(column).collect()).await?;
        }
    }
    Ok(())
}

/// What a head ends with that says up to where its state includes the log.
const SEAL: &[u8] = b"tw.upto1";

/// A head with the offset that it belongs to and a checksum of both, in which the workspace counts too.
pub(super) fn sealed(workspace: &WorkspaceId, head: &[u8], offset: u64) -> Vec<u8> {
    let offset = offset.to_le_bytes();
    [head, &offset, &checksum(workspace, head, &offset), SEAL].concat()
}

fn checksum(workspace: &WorkspaceId, head: &[u8], offset: &[u8]) -> [u8; 4] {
    let sum = crc32c::crc32c_append(crc32c::crc32c(head), offset);
    crc32c::crc32c_append(sum, workspace.as_str().as_bytes()).to_le_bytes()
}

/// The head that [`sealed`] was given, and its offset. One that is not as it was stays as it is: no state is read from it.
fn unsealed(workspace: &WorkspaceId, bytes: Vec<u8>) -> (Vec<u8>, Option<u64>) {
    let parts = bytes.strip_suffix(SEAL).and_then(|rest| {
        let (rest, sum) = rest.split_last_chunk::<4>()?;
        let (head, offset) = rest.split_last_chunk::<8>()?;
        (*sum == checksum(workspace, head, offset)).then(|| (head.to_vec(), u64::from_le_bytes(*offset)))
    });
    match parts {
        Some((head, offset)) => (head, Some(offset)),
        None => (bytes, None),
    }
}

/// The checkpoint of a workspace with the whole of its state; in one statement, so that no commit comes in between.
pub(super) async fn read(store: &Store, workspace: &WorkspaceId) -> Result<Option<Checkpoint>, sqlx::Error> {
    let rows = query(
        "SELECT log_offset, version, NULL AS name, state FROM checkpoints WHERE workspace = $1 \
         UNION ALL SELECT 0, 0, name, state FROM state_parts WHERE workspace = $1",
    )
    .bind(workspace.as_str())
    .fetch_all(store.read(workspace))
    .await?;
    let (mut checkpoint, mut parts) = (None, BTreeMap::new());
    for row in &rows {
        match row.try_get::<Option<String>>("name")? {
            Some(name) => _ = parts.insert(name, row.try_get("state")?),
            None => checkpoint = Some((row.count("log_offset")?, row.try_get("version")?, head(row)?)),
        }
    }
    let Some((stored, version, head)) = checkpoint else { return Ok(None) };
    let (head, sealed) = head.map(|head| unsealed(workspace, head)).unzip();
    let offset = sealed.flatten().unwrap_or(stored);
    if offset != stored {
        // the next commits are measured by it
        tracing::error!(%workspace, stored, offset, "the offset of a checkpoint is not that of its state, which counts");
        query("UPDATE checkpoints SET log_offset = $2 WHERE workspace = $1")
            .bind(workspace.as_str())
            .bind(super::stored(offset))
            .execute(store.write(workspace))
            .await?;
    }
    Ok(Some(Checkpoint { offset, version, state: head.map(|head| State { head, parts }) }))
}

fn head(row: &Row) -> Result<Option<Vec<u8>>, sqlx::Error> {
    row.try_get("state")
}
