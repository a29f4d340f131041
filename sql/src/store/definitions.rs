//! What a workspace has defined: streams, metrics, alert rules and silences.

use super::db::{FromRow, On, Row, Scope, Tx, query, query_as};
use super::record::Columns;
use super::{Store, StoreError, failed, stored};
use engine::event::{ItemName, Micros, StreamName, WorkspaceId};
use serde_json::Value;

/// A stream's schema.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamRow {
    pub workspace: WorkspaceId,
    pub stream: StreamName,
    /// The schema as JSON text, kept as it is.
    pub schema_json: String,
    pub created_at: Micros,
    pub updated_at: Micros,
}

/// A reference table's definition.
#[derive(Clone, Debug, PartialEq)]
pub struct TableRow {
    pub workspace: WorkspaceId,
    /// As in SQL: `ref.companies`.
    pub name: StreamName,
    pub definition: Value,
    /// First log offset of its changes.
    pub since_offset: u64,
    pub created_at: Micros,
    pub updated_at: Micros,
}

/// A metric's definition.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricRow {
    pub workspace: WorkspaceId,
    pub name: ItemName,
    pub definition: Value,
    /// First log offset the metric counts.
    pub since_offset: u64,
    /// 1 when new, one more with every change.
    pub version: i64,
    pub created_at: Micros,
    pub updated_at: Micros,
}

/// An alert rule's definition.
#[derive(Clone, Debug, PartialEq)]
pub struct AlertRule {
    pub workspace: WorkspaceId,
    pub name: ItemName,
    pub definition: Value,
    /// First log offset of which it sees results.
    pub since_offset: u64,
    pub created_at: Micros,
    pub updated_at: Micros,
}

/// What becomes of an alert rule by a [`super::Commit`], whose state is the first that knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleChange {
    pub name: ItemName,
    /// The definition, and the first log offset of which the rule sees results; `None`: it is deleted, and the alerts it
    /// raised stay.
    pub definition: Option<(Value, u64)>,
    pub at: Micros,
}

/// A time in which alerts with certain labels notify nobody.
#[derive(Clone, Debug, PartialEq)]
pub struct Silence {
    pub id: String,
    pub workspace: WorkspaceId,
    pub matchers: Value,
    pub starts_at: Micros,
    pub ends_at: Micros,
    pub comment: String,
    pub created_by: String,
}

impl FromRow for StreamRow {
    fn from_row(row: &Row) -> Result<StreamRow, sqlx::Error> {
        Ok(StreamRow {
            workspace: row.name("workspace")?,
            stream: row.name("stream")?,
            schema_json: row.try_get("schema_json")?,
            created_at: row.time("created_at")?,
            updated_at: row.time("updated_at")?,
        })
    }
}

impl FromRow for TableRow {
    fn from_row(row: &Row) -> Result<TableRow, sqlx::Error> {
        Ok(TableRow {
            workspace: row.name("workspace")?,
            name: row.name("name")?,
            definition: row.json("definition_json")?,
            since_offset: row.count("since_offset")?,
            created_at: row.time("created_at")?,
            updated_at: row.time("updated_at")?,
        })
    }
}

impl FromRow for MetricRow {
    fn from_row(row: &Row) -> Result<MetricRow, sqlx::Error> {
        Ok(MetricRow {
            workspace: row.name("workspace")?,
            name: row.name("name")?,
            definition: row.json("definition_json")?,
            since_offset: row.count("since_offset")?,
            version: row.try_get("version")?,
            created_at: row.time("created_at")?,
            updated_at: row.time("updated_at")?,
        })
    }
}

impl FromRow for AlertRule {
    fn from_row(row: &Row) -> Result<AlertRule, sqlx::Error> {
        Ok(AlertRule {
            workspace: row.name("workspace")?,
            name: row.name("name")?,
            definition: row.json("definition_json")?,
            since_offset: row.count("since_offset")?,
            created_at: row.time("created_at")?,
            updated_at: row.time("updated_at")?,
        })
    }
}

impl FromRow for Silence {
    fn from_row(row: &Row) -> Result<Silence, sqlx::Error> {
        Ok(Silence {
            id: row.try_get("id")?,
            workspace: row.name("workspace")?,
            matchers: row.json("matchers_json")?,
            starts_at: row.time("starts_at")?,
            ends_at: row.time("ends_at")?,
            comment: row.try_get("comment")?,
            created_by: row.try_get("created_by")?,
        })
    }
}

impl Store {
    /// Adds a stream, or gives it a new schema and leaves `created_at`.
    pub async fn put_stream(&self, stream: &StreamRow) -> Result<(), StoreError> {
        query(
            "INSERT INTO streams (workspace, stream, schema_json, created_at, updated_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (workspace, stream) DO UPDATE \
             SET schema_json = excluded.schema_json, updated_at = excluded.updated_at",
        )
        .bind(stream.workspace.as_str())
        .bind(stream.stream.as_str())
        .bind(&stream.schema_json)
        .bind(stream.created_at)
        .bind(stream.updated_at)
        .execute(self.write(&stream.workspace))
        .await
        .map_err(failed("put stream"))?;
        Ok(())
    }

    /// The streams of a workspace by name.
    pub async fn streams(&self, workspace: &WorkspaceId) -> Result<Vec<StreamRow>, StoreError> {
        query_as("SELECT * FROM streams WHERE workspace = $1 ORDER BY stream")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list streams"))
    }

    /// The streams of all workspaces.
    pub async fn all_streams(&self) -> Result<Vec<StreamRow>, StoreError> {
        query_as("SELECT * FROM streams ORDER BY workspace, stream")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list streams"))
    }

    /// Adds a reference table, or gives it a new definition and leaves `since_offset` and `created_at`.
    pub async fn put_table(
        &self,
        workspace: &WorkspaceId,
        name: &StreamName,
        definition: &Value,
        since_offset: u64,
        at: Micros,
    ) -> Result<(), StoreError> {
        query(
            "INSERT INTO tables (workspace, name, definition_json, since_offset, created_at, updated_at) \
             VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT (workspace, name) DO UPDATE \
             SET definition_json = excluded.definition_json, updated_at = excluded.updated_at",
        )
        .bind(workspace.as_str())
        .bind(name.as_str())
        .bind(definition.to_string())
        .bind(stored(since_offset))
        .bind(at)
        .execute(self.write(workspace))
        .await
        .map_err(failed("put table"))?;
        Ok(())
    }

    /// Deletes a reference table: whether there was one.
    pub async fn delete_table(&self, workspace: &WorkspaceId, name: &StreamName) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM tables WHERE workspace = $1 AND name = $2")
            .bind(workspace.as_str())
            .bind(name.as_str())
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete table"))?;
        Ok(deleted > 0)
    }

    /// The reference tables of a workspace by name.
    pub async fn tables(&self, workspace: &WorkspaceId) -> Result<Vec<TableRow>, StoreError> {
        query_as("SELECT * FROM tables WHERE workspace = $1 ORDER BY name")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list tables"))
    }

    /// The reference tables of all workspaces.
    pub async fn all_tables(&self) -> Result<Vec<TableRow>, StoreError> {
        query_as("SELECT * FROM tables ORDER BY workspace, name")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list tables"))
    }

    /// Adds a metric as version 1, or replaces its definition as the next version: the metric as it is then. Its final
    /// rows stay.
    pub async fn put_metric(
        &self,
        workspace: &WorkspaceId,
        name: &ItemName,
        definition: &Value,
        since_offset: u64,
        at: Micros,
    ) -> Result<MetricRow, StoreError> {
        let put = put_metric(self.write(workspace), workspace, name, definition, since_offset, at);
        put.await.map_err(failed("put metric"))
    }

    /// As [`Store::put_metric`] for a definition that means something else: it takes the metric's final rows away, or
    /// nothing is changed. To be called while no commit of the workspace is under way, which would bring rows back.
    pub async fn redefine_metric(
        &self,
        workspace: &WorkspaceId,
        name: &ItemName,
        definition: &Value,
        since_offset: u64,
        at: Micros,
    ) -> Result<MetricRow, StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            self.forget_rows(&mut tx, workspace, name).await?;
            let row = put_metric((&mut tx).into(), workspace, name, definition, since_offset, at).await?;
            tx.commit().await?;
            Ok(row)
        }
        .await
        .map_err(failed("redefine metric"))
    }

    /// Deletes all final rows of a metric.
    async fn forget_rows(&self, tx: &mut Tx, workspace: &WorkspaceId, name: &ItemName) -> Result<(), sqlx::Error> {
        if self.rollups {
            query("SELECT forget_samples($1, $2, 'infinity')")
                .bind(workspace.as_str())
                .bind(name.as_str())
                .execute(&mut *tx)
                .await?;
        }
        query("DELETE FROM final_rows WHERE workspace = $1 AND metric = $2")
            .bind(workspace.as_str())
            .bind(name.as_str())
            .execute(&mut *tx)
            .await?;
        Ok(())
    }

    /// Deletes a metric and its final rows: whether there was one. To be called while no commit of the workspace is under
    /// way, which would bring rows back.
    pub async fn delete_metric(&self, workspace: &WorkspaceId, name: &ItemName) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            self.forget_rows(&mut tx, workspace, name).await?;
            let deleted = query("DELETE FROM metrics WHERE workspace = $1 AND name = $2")
                .bind(workspace.as_str())
                .bind(name.as_str())
                .execute(&mut tx)
                .await?;
            tx.commit().await?;
            Ok(deleted > 0)
        }
        .await
        .map_err(failed("delete metric"))
    }

    /// The metrics of a workspace by name.
    pub async fn metrics(&self, workspace: &WorkspaceId) -> Result<Vec<MetricRow>, StoreError> {
        query_as("SELECT * FROM metrics WHERE workspace = $1 ORDER BY name")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list metrics"))
    }

    /// The metrics of all workspaces.
    pub async fn all_metrics(&self) -> Result<Vec<MetricRow>, StoreError> {
        query_as("SELECT * FROM metrics ORDER BY workspace, name")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list metrics"))
    }

    /// The alert rules of a workspace by name.
    pub async fn alert_rules(&self, workspace: &WorkspaceId) -> Result<Vec<AlertRule>, StoreError> {
        query_as("SELECT * FROM alert_rules WHERE workspace = $1 ORDER BY name")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list alert rules"))
    }

    /// The alert rules of all workspaces.
    pub async fn all_alert_rules(&self) -> Result<Vec<AlertRule>, StoreError> {
        query_as("SELECT * FROM alert_rules ORDER BY workspace, name")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list alert rules"))
    }

    /// Adds a silence, or replaces the one with its id.
    pub async fn put_silence(&self, silence: &Silence) -> Result<(), StoreError> {
        query(
            "INSERT INTO silences (workspace, id, matchers_json, starts_at, ends_at, comment, created_by) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (workspace, id) DO UPDATE \
             SET matchers_json = excluded.matchers_json, starts_at = excluded.starts_at, ends_at = excluded.ends_at, \
             comment = excluded.comment, created_by = excluded.created_by",
        )
        .bind(silence.workspace.as_str())
        .bind(&silence.id)
        .bind(silence.matchers.to_string())
        .bind(silence.starts_at)
        .bind(silence.ends_at)
        .bind(&silence.comment)
        .bind(&silence.created_by)
        .execute(self.write(&silence.workspace))
        .await
        .map_err(failed("put silence"))?;
        Ok(())
    }

    /// The silences of a workspace by start, past ones too.
    pub async fn silences(&self, workspace: &WorkspaceId) -> Result<Vec<Silence>, StoreError> {
        query_as("SELECT * FROM silences WHERE workspace = $1 ORDER BY starts_at, id")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list silences"))
    }

    /// The silences of all workspaces.
    pub async fn all_silences(&self) -> Result<Vec<Silence>, StoreError> {
        query_as("SELECT * FROM silences ORDER BY workspace, starts_at, id")
            .fetch_all(self.read(Scope::Installation))
            .await
            .map_err(failed("list silences"))
    }

    /// Deletes a silence: whether there was one.
    pub async fn delete_silence(&self, workspace: &WorkspaceId, id: &str) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM silences WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete silence"))?;
        Ok(deleted > 0)
    }
}

async fn put_metric(
    on: On<'_>,
    workspace: &WorkspaceId,
    name: &ItemName,
    definition: &Value,
    since_offset: u64,
    at: Micros,
) -> Result<MetricRow, sqlx::Error> {
    let put = query_as(
        "INSERT INTO metrics (workspace, name, definition_json, since_offset, version, created_at, updated_at) \
         VALUES ($1, $2, $3, $4, 1, $5, $5) ON CONFLICT (workspace, name) DO UPDATE \
         SET definition_json = excluded.definition_json, since_offset = excluded.since_offset, \
         version = metrics.version + 1, updated_at = excluded.updated_at RETURNING *",
    )
    .bind(workspace.as_str())
    .bind(name.as_str())
    .bind(definition.to_string())
    .bind(stored(since_offset))
    .bind(at);
    let row = put.fetch_optional(on).await?;
    Ok(row.expect("an upsert without a condition returns its row"))
}

/// Adds alert rules, replaces their definitions or deletes them.
pub(super) async fn write_rules(
    tx: &mut Tx,
    workspace: &WorkspaceId,
    changes: &[RuleChange],
) -> Result<(), sqlx::Error> {
    for RuleChange { name, definition, at } in changes {
        let written = match definition {
            Some((definition, since_offset)) => query(
                "INSERT INTO alert_rules (workspace, name, definition_json, since_offset, created_at, updated_at) \
                 VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT (workspace, name) DO UPDATE \
                 SET definition_json = excluded.definition_json, since_offset = excluded.since_offset, \
                     updated_at = excluded.updated_at",
            )
            .bind(workspace.as_str())
            .bind(name.as_str())
            .bind(definition.to_string())
            .bind(stored(*since_offset))
            .bind(*at),
            None => query("DELETE FROM alert_rules WHERE workspace = $1 AND name = $2")
                .bind(workspace.as_str())
                .bind(name.as_str()),
        };
        written.execute(&mut *tx).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::checkpoints::testing::commit;
    use super::super::rows::testing::row;
    use super::super::testing::*;
    use super::super::{Commit, RowQuery};
    use super::*;
    use serde_json::json;

    #[tokio::test]
    async fn a_stream_takes_a_new_schema_and_keeps_its_creation() {
        let (store, _dir) = store().await;
        let first = StreamRow {
            workspace: add_workspace(&store, "acme").await,
            stream: name("shop.orders"),
            schema_json: r#"{"columns": []}"#.into(),
            created_at: Micros(1),
            updated_at: Micros(1),
        };
        store.put_stream(&first).await.unwrap();
        let second =
            StreamRow { schema_json: "{}".into(), created_at: Micros(2), updated_at: Micros(2), ..first.clone() };
        store.put_stream(&second).await.unwrap();
        let expected = [StreamRow { created_at: Micros(1), ..second }];
        assert_eq!(store.streams(&first.workspace).await.unwrap(), expected);
        assert_eq!(store.all_streams().await.unwrap(), expected);
    }

    #[tokio::test]
    async fn a_table_keeps_its_first_offset_when_it_is_defined_again_and_not_when_it_is_new() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let persons = name("ref.persons");
        store.put_table(&acme, &persons, &json!({"a": 1}), 7, Micros(1)).await.unwrap();
        store.put_table(&acme, &persons, &json!({"a": 2}), 9, Micros(2)).await.unwrap();
        let tables = store.tables(&acme).await.unwrap();
        assert_eq!((tables[0].definition.clone(), tables[0].since_offset), (json!({"a": 2}), 7));
        assert_eq!(store.all_tables().await.unwrap(), tables);
        assert!(store.delete_table(&acme, &persons).await.unwrap());
        assert!(!store.delete_table(&acme, &persons).await.unwrap());
        store.put_table(&acme, &persons, &json!({}), 9, Micros(3)).await.unwrap();
        assert_eq!(store.tables(&acme).await.unwrap()[0].since_offset, 9);
    }

    #[tokio::test]
    async fn a_metric_gets_a_new_version_with_every_definition() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let vwap = name("vwap");
        let first = store.put_metric(&acme, &vwap, &json!({"sql": "a"}), 7, Micros(1)).await.unwrap();
        assert_eq!((first.version, first.since_offset), (1, 7));
        let second = store.put_metric(&acme, &vwap, &json!({"sql": "b"}), 9, Micros(2)).await.unwrap();
        let expected =
            MetricRow { definition: json!({"sql": "b"}), since_offset: 9, version: 2, updated_at: Micros(2), ..first };
        assert_eq!(second, expected);
        assert_eq!(store.metrics(&acme).await.unwrap(), std::slice::from_ref(&expected));
        assert_eq!(store.all_metrics().await.unwrap(), [expected]);
        let lost = store.put_metric(&name("none"), &vwap, &json!({}), 0, Micros(1)).await;
        assert!(matches!(lost, Err(StoreError::Missing { .. })));
    }

    #[tokio::test]
    async fn a_deleted_metric_takes_its_rows_along_and_leaves_those_of_others() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        for metric in ["vwap", "volume"] {
            store.put_metric(&acme, &name(metric), &json!({}), 0, Micros(1)).await.unwrap();
        }
        let rows = vec![row("vwap", 0, "A", 0), row("volume", 0, "A", 0)];
        store.commit(&[Commit { rows, ..commit(&acme, 1) }]).await.unwrap();
        assert!(store.delete_metric(&acme, &name("vwap")).await.unwrap());
        assert!(!store.delete_metric(&acme, &name("vwap")).await.unwrap());
        assert!(store.rows(&acme, &name("vwap"), &RowQuery::first(10)).await.unwrap().0.is_empty());
        assert_eq!(store.rows(&acme, &name("volume"), &RowQuery::first(10)).await.unwrap().0.len(), 1);
        assert_eq!(store.metrics(&acme).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn alert_rules_and_silences_are_replaced_and_deleted() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let change =
            |definition: Option<(Value, u64)>, at| RuleChange { name: name("drop"), definition, at: Micros(at) };
        let (first, second) = (change(Some((json!({"above": 1}), 3)), 1), change(Some((json!({"above": 2}), 5)), 2));
        store.commit(&[Commit { rules: vec![first.clone()], ..commit(&acme, 1) }]).await.unwrap();
        // all of a commit, or nothing of it
        let behind = Commit { rules: vec![change(None, 2)], ..commit(&acme, 0) };
        store.commit(&[behind]).await.unwrap_err();
        assert_eq!(store.alert_rules(&acme).await.unwrap()[0].definition, json!({"above": 1}));
        let rules = vec![change(None, 2), first, second]; // in their order
        store.commit(&[Commit { rules, ..commit(&acme, 1) }]).await.unwrap();
        let rule = AlertRule {
            workspace: acme.clone(),
            name: name("drop"),
            definition: json!({"above": 2}),
            since_offset: 5,
            created_at: Micros(1),
            updated_at: Micros(2),
        };
        assert_eq!(store.alert_rules(&acme).await.unwrap(), std::slice::from_ref(&rule));
        assert_eq!(store.all_alert_rules().await.unwrap(), [rule]);
        for _ in 0..2 {
            store.commit(&[Commit { rules: vec![change(None, 3)], ..commit(&acme, 1) }]).await.unwrap();
            assert_eq!(store.alert_rules(&acme).await.unwrap(), []);
        }

        let silence = Silence {
            id: "s".into(),
            workspace: acme.clone(),
            matchers: json!({"symbol": "AAPL"}),
            starts_at: Micros(1),
            ends_at: Micros(2),
            comment: "maintenance".into(),
            created_by: "ann".into(),
        };
        store.put_silence(&silence).await.unwrap();
        let longer = Silence { ends_at: Micros(3), ..silence };
        store.put_silence(&longer).await.unwrap();
        assert_eq!(store.silences(&acme).await.unwrap(), [longer]);
        assert!(store.delete_silence(&acme, "s").await.unwrap());
        assert!(!store.delete_silence(&acme, "s").await.unwrap());
    }
}
