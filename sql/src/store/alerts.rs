//! Firings of alert rules, and who has seen them. They are written by [`Store::commit`].

use super::db::{Builder, Dialect, FromRow, Row, Tx, query_as};
use super::page;
use super::record::Columns;
use super::{Store, StoreError, bulk, failed};
use engine::event::{ItemName, Micros, WorkspaceId};
use serde_json::Value;

/// One firing of a rule for one set of labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    /// Derived from what fired, so that a replay gives the same.
    pub id: String,
    pub workspace: WorkspaceId,
    pub rule: ItemName,
    pub metric: ItemName,
    pub severity: String,
    pub labels: Value,
    /// `firing` or `resolved`; nothing else is stored.
    pub state: String,
    /// The metric row that made it fire.
    pub row: Value,
    /// Event time.
    pub started_at: Micros,
    pub fired_at: Micros,
    pub resolved_at: Option<Micros>,
    pub acked_at: Option<Micros>,
    pub acked_by: Option<String>,
}

/// Where a page of alerts ended: time of firing, id.
type Position = (i64, String);

impl FromRow for Alert {
    fn from_row(row: &Row) -> Result<Alert, sqlx::Error> {
        Ok(Alert {
            id: row.try_get("id")?,
            workspace: row.name("workspace")?,
            rule: row.name("rule")?,
            metric: row.name("metric")?,
            severity: row.try_get("severity")?,
            labels: row.json("labels_json")?,
            state: row.try_get("state")?,
            row: row.json("row_json")?,
            started_at: row.time("started_at")?,
            fired_at: row.time("fired_at")?,
            resolved_at: row.time_if_any("resolved_at")?,
            acked_at: row.time_if_any("acked_at")?,
            acked_by: row.try_get("acked_by")?,
        })
    }
}

impl Store {
    /// A page of alerts, those that fired last first, in `state` or in any, and the cursor of the next page if there
    /// is one. At least one row a page; [`StoreError::Cursor`] for a `before` that no page gave.
    pub async fn alerts(
        &self,
        workspace: &WorkspaceId,
        state: Option<&str>,
        limit: usize,
        before: Option<&str>,
    ) -> Result<(Vec<Alert>, Option<String>), StoreError> {
        let mut sql = Builder::new("SELECT * FROM alerts WHERE workspace = ");
        sql.push_bind(workspace.as_str());
        if let Some(state) = state {
            sql.push(" AND state = ").push_bind(state);
        }
        if let Some((fired_at, id)) = page::position::<Position>(before)? {
            sql.push(" AND (fired_at, id) < (").push_bind(Micros(fired_at)).push(", ").push_bind(id).push(")");
        }
        sql.push(" ORDER BY fired_at DESC, id DESC LIMIT ").push_bind(page::rows_to_read(limit));
        let rows: Vec<Alert> = sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("list alerts"))?;
        Ok(page::cut(rows, limit, |alert| (alert.fired_at.0, alert.id.clone())))
    }

    pub async fn alert(&self, workspace: &WorkspaceId, id: &str) -> Result<Option<Alert>, StoreError> {
        query_as("SELECT * FROM alerts WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read alert"))
    }

    /// Notes who has seen the alert and when; the first acknowledgement stands. The alert as it is then, `None` when
    /// there is none.
    pub async fn ack_alert(
        &self,
        workspace: &WorkspaceId,
        id: &str,
        by: &str,
        at: Micros,
    ) -> Result<Option<Alert>, StoreError> {
        let ack = query_as(
            "UPDATE alerts SET acked_at = COALESCE(acked_at, $4), acked_by = COALESCE(acked_by, $3) \
             WHERE workspace = $1 AND id = $2 RETURNING *",
        );
        ack.bind(workspace.as_str())
            .bind(id)
            .bind(by)
            .bind(at)
            .fetch_optional(self.write(workspace))
            .await
            .map_err(failed("acknowledge alert"))
    }
}

/// Writes alerts by id. One that is there already changes while it fires, to a newer row or to resolved; resolved it
/// stays as it is. When it fired and who acknowledged it is never overwritten.
pub(super) async fn write(tx: &mut Tx, alerts: &[(&WorkspaceId, &Alert)]) -> Result<(), sqlx::Error> {
    // The key of PostgreSQL's table holds the time too, for TimescaleDB; the id is derived from it.
    let key = match tx.dialect() {
        Dialect::Sqlite => "workspace, id",
        Dialect::Postgres => "workspace, id, started_at",
    };
    let on_conflict = format!(
        " ON CONFLICT ({key}) DO UPDATE SET severity = excluded.severity, state = excluded.state, \
         row_json = excluded.row_json, resolved_at = excluded.resolved_at WHERE alerts.state = 'firing'"
    );
    bulk::insert(
        tx,
        [
            "INSERT INTO alerts (workspace, id, rule, metric, severity, labels_json, state, row_json, started_at, \
             fired_at, resolved_at, acked_at, acked_by) ",
            &on_conflict,
        ],
        alerts,
        |(workspace, alert)| (*workspace, &alert.id),
        |values, (workspace, alert)| {
            values.push_bind(workspace.as_str());
            values.push_bind(alert.id.as_str());
            values.push_bind(alert.rule.as_str());
            values.push_bind(alert.metric.as_str());
            values.push_bind(alert.severity.as_str());
            values.push_bind(alert.labels.to_string());
            values.push_bind(alert.state.as_str());
            values.push_bind(alert.row.to_string());
            values.push_bind(alert.started_at);
            values.push_bind(alert.fired_at);
            values.push_bind(alert.resolved_at);
            values.push_bind(alert.acked_at);
            values.push_bind(alert.acked_by.as_deref());
        },
    )
    .await?;
    Ok(())
}

#[cfg(test)]
pub(super) mod testing {
    use super::super::testing::name;
    use super::*;

    pub fn alert(workspace: &WorkspaceId, id: &str, fired_at: i64) -> Alert {
        Alert {
            id: id.into(),
            workspace: workspace.clone(),
            rule: name("drop"),
            metric: name("vwap"),
            severity: "warning".into(),
            labels: serde_json::json!({"symbol": "AAPL"}),
            state: "firing".into(),
            row: serde_json::json!({"vwap": 1.5}),
            started_at: Micros(fired_at),
            fired_at: Micros(fired_at),
            resolved_at: None,
            acked_at: None,
            acked_by: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Commit;
    use super::super::checkpoints::testing::commit;
    use super::super::testing::*;
    use super::testing::alert;
    use super::*;

    async fn raise(store: &Store, alerts: Vec<Alert>) {
        let workspace = alerts[0].workspace.clone();
        store.commit(&[Commit { alerts, ..commit(&workspace, 1) }]).await.unwrap();
    }

    fn resolved(alert: &Alert, at: i64) -> Alert {
        Alert { state: "resolved".into(), resolved_at: Some(Micros(at)), ..alert.clone() }
    }

    #[tokio::test]
    async fn a_resolved_alert_never_fires_again() {
        let (store, _dir) = store().await;
        let firing = alert(&add_workspace(&store, "acme").await, "a", 1);
        raise(&store, vec![firing.clone()]).await;
        raise(&store, vec![resolved(&firing, 5)]).await;
        raise(&store, vec![firing.clone()]).await;
        raise(&store, vec![resolved(&firing, 9)]).await;
        assert_eq!(store.alert(&firing.workspace, "a").await.unwrap(), Some(resolved(&firing, 5)));
    }

    #[tokio::test]
    async fn an_alert_that_fires_and_resolves_in_one_commit_is_resolved() {
        let (store, _dir) = store().await;
        let firing = alert(&add_workspace(&store, "acme").await, "a", 1);
        raise(&store, vec![firing.clone(), resolved(&firing, 5)]).await;
        assert_eq!(store.alert(&firing.workspace, "a").await.unwrap(), Some(resolved(&firing, 5)));
    }

    #[tokio::test]
    async fn the_first_acknowledgement_stands_and_outlives_what_the_engine_writes() {
        let (store, _dir) = store().await;
        let firing = alert(&add_workspace(&store, "acme").await, "a", 1);
        let acme = &firing.workspace;
        raise(&store, vec![firing.clone()]).await;
        let acked = Alert { acked_at: Some(Micros(3)), acked_by: Some("ann".into()), ..firing.clone() };
        assert_eq!(store.ack_alert(acme, "a", "ann", Micros(3)).await.unwrap(), Some(acked.clone()));
        assert_eq!(store.ack_alert(acme, "a", "bob", Micros(4)).await.unwrap(), Some(acked.clone()));
        assert_eq!(store.ack_alert(acme, "none", "bob", Micros(4)).await.unwrap(), None);
        raise(&store, vec![resolved(&firing, 5)]).await;
        assert_eq!(store.alert(acme, "a").await.unwrap(), Some(resolved(&acked, 5)));
    }

    #[tokio::test]
    async fn paging_brings_every_alert_once_newest_first_also_where_times_tie() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let mut alerts: Vec<Alert> = (0..11).map(|i| alert(&acme, &format!("{:02}", (i * 7) % 11), i / 4)).collect();
        alerts[3] = resolved(&alerts[3], 5);
        raise(&store, alerts.clone()).await;
        alerts.sort_by_key(|a| std::cmp::Reverse((a.fired_at, a.id.clone())));

        for state in [None, Some("firing"), Some("resolved")] {
            let (mut read, mut before) = (Vec::new(), None);
            loop {
                let (page, next) = store.alerts(&acme, state, 3, before.as_deref()).await.unwrap();
                read.extend(page);
                before = next;
                if before.is_none() {
                    break;
                }
            }
            let expected: Vec<_> = alerts.iter().filter(|a| state.is_none_or(|s| a.state == s)).cloned().collect();
            assert_eq!(read, expected);
        }
        assert!(matches!(store.alerts(&acme, None, 3, Some("?")).await, Err(StoreError::Cursor { .. })));
    }
}
