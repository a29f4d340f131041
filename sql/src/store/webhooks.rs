//! Webhooks of a workspace, and the outbox of what is on its way to them, which [`Store::commit`] fills in the
//! transaction that stores the alerts. Secrets come sealed and stay so.

use super::db::{Builder, FromRow, Row, Scope, Tx, query, query_as};
use super::page;
use super::record::Columns;
use super::{Store, StoreError, bulk, failed, stored};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use engine::event::{Micros, WorkspaceId};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

/// Somebody outside who is told of alerts.
#[derive(Clone, Debug, PartialEq)]
pub struct Webhook {
    pub id: String,
    pub workspace: WorkspaceId,
    pub url: String,
    /// What it is told of.
    pub events: Vec<String>,
    /// Only alerts of these; `None`: of every severity.
    pub severities: Option<Vec<String>>,
    /// Sealed.
    pub secret: String,
    /// The one before it, sealed, which signs too until then.
    pub previous: Option<(String, Micros)>,
    /// Why nothing is sent any more; `None`: it is.
    pub disabled: Option<String>,
    pub created_at: Micros,
    pub updated_at: Micros,
}

/// What the webhooks that asked for it are to be told of one alert.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// `alert.firing` or `alert.resolved`.
    pub event: String,
    /// Id of the alert.
    pub alert: String,
    pub severity: String,
    pub at: Micros,
    /// As it is sent.
    pub body: String,
}

/// One notice on its way to one webhook.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivery {
    /// The same for the same alert, event and webhook, whoever writes it and how often.
    pub id: String,
    pub workspace: WorkspaceId,
    pub webhook: String,
    pub event: String,
    pub alert: Option<String>,
    /// `pending`, `delivered` or `failed`.
    pub state: String,
    pub attempts: u64,
    pub created_at: Micros,
    /// `None` unless it is pending.
    pub next_at: Option<Micros>,
    pub last_at: Option<Micros>,
    pub last_status: Option<i64>,
    pub last_error: Option<String>,
    /// Order of arrival.
    seq: i64,
}

/// A delivery to be tried now, and all it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    pub delivery: Delivery,
    pub body: String,
    pub url: String,
    /// Sealed.
    pub secret: String,
    /// The one before it, sealed, which signs too until then.
    pub previous: Option<(String, Micros)>,
}

/// What came of trying a delivery once.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub at: Micros,
    /// Of the answer, if there was one.
    pub status: Option<u16>,
    /// `None`: it is delivered.
    pub error: Option<String>,
    /// When it is tried again; `None`: it is delivered, or has failed for good.
    pub next_at: Option<Micros>,
}

/// How many deliveries of one webhook the store holds: `webhooks.*` of the configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct OutboxBounds {
    pub(super) pending: usize,
    pub(super) kept: usize,
}

impl FromRow for Webhook {
    fn from_row(row: &Row) -> Result<Webhook, sqlx::Error> {
        let severities: Option<String> = row.try_get("severities_json")?;
        Ok(Webhook {
            id: row.try_get("id")?,
            workspace: row.name("workspace")?,
            url: row.try_get("url")?,
            events: words(&row.json("events_json")?),
            severities: severities.is_some().then(|| row.json("severities_json")).transpose()?.as_ref().map(words),
            secret: row.try_get("secret")?,
            previous: previous(row)?,
            disabled: row.try_get("disabled")?,
            created_at: row.time("created_at")?,
            updated_at: row.time("updated_at")?,
        })
    }
}

impl FromRow for Delivery {
    fn from_row(row: &Row) -> Result<Delivery, sqlx::Error> {
        Ok(Delivery {
            id: row.try_get("id")?,
            workspace: row.name("workspace")?,
            webhook: row.try_get("webhook")?,
            event: row.try_get("event")?,
            alert: row.try_get("alert")?,
            state: row.try_get("state")?,
            attempts: row.count("attempts")?,
            created_at: row.time("created_at")?,
            next_at: row.time_if_any("next_at")?,
            last_at: row.time_if_any("last_at")?,
            last_status: row.try_get("last_status")?,
            last_error: row.try_get("last_error")?,
            seq: row.try_get("seq")?,
        })
    }
}

impl FromRow for Due {
    fn from_row(row: &Row) -> Result<Due, sqlx::Error> {
        Ok(Due {
            delivery: Delivery::from_row(row)?,
            body: row.try_get("body")?,
            url: row.try_get("url")?,
            secret: row.try_get("secret")?,
            previous: previous(row)?,
        })
    }
}

fn previous(row: &Row) -> Result<Option<(String, Micros)>, sqlx::Error> {
    Ok(row.try_get::<Option<String>>("previous_secret")?.zip(row.time_if_any("previous_until")?))
}

fn words(array: &Value) -> Vec<String> {
    array.as_array().into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)).collect()
}

/// The id of what a webhook is told of one alert: follows from the cause alone.
fn delivery_id(workspace: &WorkspaceId, webhook: &str, event: &str, alert: &str) -> String {
    let mut hash = Sha256::new();
    for part in [workspace.as_str(), webhook, event, alert] {
        hash.update(part.len().to_le_bytes()); // so that text cannot move from one part into the next
        hash.update(part);
    }
    format!("msg_{}", URL_SAFE_NO_PAD.encode(&hash.finalize()[..18]))
}

const COLUMNS: &str = "seq, workspace, id, webhook, event, alert, state, attempts, created_at, next_at, last_at, \
                       last_status, last_error";

impl Store {
    pub async fn create_webhook(&self, webhook: &Webhook) -> Result<(), StoreError> {
        query(
            "INSERT INTO webhooks (workspace, id, url, events_json, severities_json, secret, disabled, created_at, \
             updated_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(webhook.workspace.as_str())
        .bind(&webhook.id)
        .bind(&webhook.url)
        .bind(json!(webhook.events).to_string())
        .bind(webhook.severities.as_ref().map(|severities| json!(severities).to_string()))
        .bind(&webhook.secret)
        .bind(&webhook.disabled)
        .bind(webhook.created_at)
        .bind(webhook.updated_at)
        .execute(self.write(&webhook.workspace))
        .await
        .map_err(failed("create webhook"))?;
        Ok(())
    }

    /// The webhooks of a workspace, those made first before the others.
    pub async fn webhooks(&self, workspace: &WorkspaceId) -> Result<Vec<Webhook>, StoreError> {
        query_as("SELECT * FROM webhooks WHERE workspace = $1 ORDER BY created_at, id")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list webhooks"))
    }

    pub async fn webhook(&self, workspace: &WorkspaceId, id: &str) -> Result<Option<Webhook>, StoreError> {
        query_as("SELECT * FROM webhooks WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read webhook"))
    }

    /// Replaces all of a webhook but its secrets and when it was made: whether there is one.
    pub async fn update_webhook(&self, webhook: &Webhook) -> Result<bool, StoreError> {
        let changed = query(
            "UPDATE webhooks SET url = $3, events_json = $4, severities_json = $5, disabled = $6, updated_at = $7 \
             WHERE workspace = $1 AND id = $2",
        )
        .bind(webhook.workspace.as_str())
        .bind(&webhook.id)
        .bind(&webhook.url)
        .bind(json!(webhook.events).to_string())
        .bind(webhook.severities.as_ref().map(|severities| json!(severities).to_string()))
        .bind(&webhook.disabled)
        .bind(webhook.updated_at)
        .execute(self.write(&webhook.workspace))
        .await
        .map_err(failed("change webhook"))?;
        Ok(changed > 0)
    }

    /// Gives a webhook another secret, sealed: whether there is one. The one in force becomes the previous one where it
    /// is to sign `until` then, too; else there is none.
    pub async fn rotate_webhook_secret(
        &self,
        workspace: &WorkspaceId,
        id: &str,
        secret: &str,
        until: Option<Micros>,
        at: Micros,
    ) -> Result<bool, StoreError> {
        let previous = if until.is_some() { "secret" } else { "NULL" };
        let sql = format!(
            "UPDATE webhooks SET previous_secret = {previous}, previous_until = $4, secret = $3, updated_at = $5 \
             WHERE workspace = $1 AND id = $2"
        );
        let changed = query(sql)
            .bind(workspace.as_str())
            .bind(id)
            .bind(secret)
            .bind(until)
            .bind(at)
            .execute(self.write(workspace))
            .await
            .map_err(failed("change the secret of a webhook"))?;
        Ok(changed > 0)
    }

    /// Deletes a webhook with its deliveries: whether there was one.
    pub async fn delete_webhook(&self, workspace: &WorkspaceId, id: &str) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM webhooks WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete webhook"))?;
        Ok(deleted > 0)
    }

    /// Ends what is sent to a webhook, and with it what waits for it: whether there is one that was not disabled yet.
    pub async fn disable_webhook(
        &self,
        workspace: &WorkspaceId,
        id: &str,
        why: &str,
        at: Micros,
    ) -> Result<bool, StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            let changed = query(
                "UPDATE webhooks SET disabled = $3, updated_at = $4 \
                 WHERE workspace = $1 AND id = $2 AND disabled IS NULL",
            )
            .bind(workspace.as_str())
            .bind(id)
            .bind(why)
            .bind(at)
            .execute(&mut tx)
            .await?;
            query(
                "UPDATE webhook_deliveries SET state = 'failed', next_at = NULL, last_error = $3 \
                 WHERE workspace = $1 AND webhook = $2 AND state = 'pending'",
            )
            .bind(workspace.as_str())
            .bind(id)
            .bind(why)
            .execute(&mut tx)
            .await?;
            prune(&mut tx, workspace, id, self.outbox.kept).await?;
            tx.commit().await?;
            Ok(changed > 0)
        }
        .await
        .map_err(failed("disable webhook"))
    }

    /// All sealed secrets, for a new key to seal them again: workspace, webhook, secret.
    pub async fn all_webhook_secrets(&self) -> Result<Vec<(WorkspaceId, String, String)>, StoreError> {
        let sql = "SELECT workspace, id, secret FROM webhooks UNION ALL \
                   SELECT workspace, id, previous_secret FROM webhooks WHERE previous_secret IS NOT NULL";
        let rows = query(sql).fetch_all(self.read(Scope::Installation)).await;
        let rows = rows.map_err(failed("list webhook secrets"))?;
        let read = |row: &Row| Ok((row.name("workspace")?, row.try_get("id")?, row.try_get("secret")?));
        rows.iter().map(read).collect::<Result<_, _>>().map_err(failed("list webhook secrets"))
    }

    /// Replaces a sealed secret by the same one sealed anew: whether `old` is still what there is.
    pub async fn reseal_webhook(
        &self,
        workspace: &WorkspaceId,
        id: &str,
        old: &str,
        new: &str,
    ) -> Result<bool, StoreError> {
        let sql = "UPDATE webhooks SET secret = CASE WHEN secret = $3 THEN $4 ELSE secret END, \
                   previous_secret = CASE WHEN previous_secret = $3 THEN $4 ELSE previous_secret END \
                   WHERE workspace = $1 AND id = $2 AND $3 IN (secret, previous_secret)";
        let changed = query(sql)
            .bind(workspace.as_str())
            .bind(id)
            .bind(old)
            .bind(new)
            .execute(self.write(workspace))
            .await
            .map_err(failed("reseal webhook secret"))?;
        Ok(changed > 0)
    }

    /// Puts something into the outbox of one webhook that comes from no alert: the delivery. [`StoreError::Missing`]
    /// when there is no such webhook.
    pub async fn add_delivery(
        &self,
        workspace: &WorkspaceId,
        webhook: &str,
        [id, event, body]: [&str; 3],
        at: Micros,
    ) -> Result<Delivery, StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            let rows = [NewDelivery { workspace, id: id.to_owned(), webhook, event, alert: None, body, at }];
            insert(&mut tx, &rows).await?;
            bound(&mut tx, workspace, webhook, self.outbox).await?;
            let sql = format!("SELECT {COLUMNS} FROM webhook_deliveries WHERE workspace = $1 AND id = $2");
            let delivery = query_as(sql).bind(workspace.as_str()).bind(id).fetch_optional(&mut tx).await?;
            tx.commit().await?;
            delivery.ok_or(sqlx::Error::RowNotFound)
        }
        .await
        .map_err(failed("add delivery"))
    }

    /// A page of what was on its way to a webhook, the newest first, and the cursor of the next page if there is one.
    pub async fn deliveries(
        &self,
        workspace: &WorkspaceId,
        webhook: &str,
        limit: usize,
        before: Option<&str>,
    ) -> Result<(Vec<Delivery>, Option<String>), StoreError> {
        let mut sql = Builder::new(&format!("SELECT {COLUMNS} FROM webhook_deliveries WHERE workspace = "));
        sql.push_bind(workspace.as_str()).push(" AND webhook = ").push_bind(webhook);
        if let Some(seq) = page::position::<i64>(before)? {
            sql.push(" AND seq < ").push_bind(seq);
        }
        sql.push(" ORDER BY seq DESC LIMIT ").push_bind(page::rows_to_read(limit));
        let rows: Vec<Delivery> =
            sql.build_as().fetch_all(self.read(workspace)).await.map_err(failed("list deliveries"))?;
        Ok(page::cut(rows, limit, |delivery| delivery.seq))
    }

    /// Deliveries to be tried at `now`, of any workspace: at most `each` of a webhook and `limit` in all, none of the
    /// webhooks `without`. First comes one of each webhook, so that many for one push nobody else out; and of one alert
    /// what comes later waits until the earlier is delivered or has failed for good.
    pub async fn due_deliveries(
        &self,
        now: Micros,
        each: usize,
        limit: usize,
        without: &[&str],
    ) -> Result<Vec<Due>, StoreError> {
        let mut sql = Builder::new(
            "SELECT d.*, w.url, w.secret, w.previous_secret, w.previous_until FROM (SELECT p.seq, \
             row_number() OVER (PARTITION BY p.workspace, p.webhook ORDER BY p.next_at, p.seq) AS place \
             FROM webhook_deliveries p WHERE p.state = 'pending' AND p.next_at <= ",
        );
        sql.push_bind(now);
        for (i, webhook) in without.iter().enumerate() {
            sql.push(if i == 0 { " AND p.webhook NOT IN (" } else { ", " }).push_bind(*webhook);
        }
        sql.push(if without.is_empty() { "" } else { ")" });
        sql.push(
            " AND NOT EXISTS (SELECT 1 FROM webhook_deliveries e WHERE e.workspace = p.workspace \
             AND e.webhook = p.webhook AND e.alert = p.alert AND e.state = 'pending' AND e.seq < p.seq)) n \
             JOIN webhook_deliveries d ON d.seq = n.seq \
             JOIN webhooks w ON w.workspace = d.workspace AND w.id = d.webhook WHERE n.place <= ",
        );
        sql.push_bind(stored(each as u64)).push(" ORDER BY n.place, d.next_at, d.seq LIMIT ");
        sql.push_bind(stored(limit as u64));
        sql.build_as().fetch_all(self.read(Scope::Installation)).await.map_err(failed("list due deliveries"))
    }

    /// When the first delivery after `now` is to be tried, of any workspace.
    pub async fn next_delivery(&self, now: Micros) -> Result<Option<Micros>, StoreError> {
        async {
            let row = query(
                "SELECT min(next_at) AS next_at FROM webhook_deliveries WHERE state = 'pending' AND next_at > $1",
            )
            .bind(now)
            .fetch_optional(self.read(Scope::Installation))
            .await?;
            row.map_or(Ok(None), |row| row.time_if_any("next_at"))
        }
        .await
        .map_err(failed("find the next delivery"))
    }

    /// Notes what came of trying a delivery. One that has failed for good meanwhile, as its webhook was disabled, is
    /// still delivered if it is.
    pub async fn record_attempt(&self, delivery: &Delivery, attempt: &Attempt) -> Result<(), StoreError> {
        let state = match (&attempt.error, attempt.next_at) {
            (None, _) => "delivered",
            (Some(_), Some(_)) => "pending",
            (Some(_), None) => "failed",
        };
        let next_at = attempt.next_at.filter(|_| state == "pending");
        async {
            let mut tx = self.db.begin((&delivery.workspace).into()).await?;
            let mut sql = Builder::new("UPDATE webhook_deliveries SET attempts = attempts + 1, state = ");
            sql.push_bind(state).push(", next_at = ").push_bind(next_at);
            sql.push(", last_at = ").push_bind(attempt.at);
            match attempt.status {
                Some(status) => _ = sql.push(", last_status = ").push_bind(i64::from(status)),
                None => _ = sql.push(", last_status = NULL"),
            }
            sql.push(", last_error = ").push_bind(&attempt.error);
            sql.push(" WHERE workspace = ").push_bind(delivery.workspace.as_str());
            sql.push(" AND id = ").push_bind(&delivery.id);
            sql.push(if state == "delivered" { " AND state <> 'delivered'" } else { " AND state = 'pending'" });
            sql.build().execute(&mut tx).await?;
            if state != "pending" {
                prune(&mut tx, &delivery.workspace, &delivery.webhook, self.outbox.kept).await?;
            }
            tx.commit().await
        }
        .await
        .map_err(failed("record delivery"))
    }
}

struct NewDelivery<'a> {
    workspace: &'a WorkspaceId,
    id: String,
    webhook: &'a str,
    event: &'a str,
    alert: Option<&'a str>,
    body: &'a str,
    at: Micros,
}

/// Adds deliveries; what is there already stays as it is, done or not.
async fn insert(tx: &mut Tx, rows: &[NewDelivery<'_>]) -> Result<(), sqlx::Error> {
    bulk::insert(
        tx,
        [
            "INSERT INTO webhook_deliveries (workspace, id, webhook, event, alert, body, state, attempts, created_at, \
             next_at) ",
            " ON CONFLICT (workspace, id) DO NOTHING",
        ],
        rows,
        |row| (row.workspace, &row.id),
        |values, row| {
            values.push_bind(row.workspace.as_str());
            values.push_bind(row.id.as_str());
            values.push_bind(row.webhook);
            values.push_bind(row.event);
            values.push_bind(row.alert);
            values.push_bind(row.body);
            values.push_bind("pending");
            values.push_bind(0_i64);
            values.push_bind(row.at);
            values.push_bind(row.at);
        },
    )
    .await?;
    Ok(())
}

/// Puts each notice into the outbox of every webhook of its workspace that asked for it.
pub(super) async fn enqueue(
    tx: &mut Tx,
    notices: &[(&WorkspaceId, &Notice)],
    bounds: OutboxBounds,
) -> Result<(), sqlx::Error> {
    if notices.is_empty() {
        return Ok(());
    }
    let mut sql = Builder::new("SELECT * FROM webhooks WHERE disabled IS NULL AND workspace IN (");
    for (i, workspace) in notices.iter().map(|(workspace, _)| *workspace).collect::<BTreeSet<_>>().iter().enumerate() {
        sql.push(if i == 0 { "" } else { ", " }).push_bind(workspace.as_str());
    }
    sql.push(")");
    let webhooks: Vec<Webhook> = sql.build_as().fetch_all(&mut *tx).await?;
    let asked = |webhook: &Webhook, notice: &Notice| {
        let severities = webhook.severities.as_ref();
        webhook.events.contains(&notice.event) && severities.is_none_or(|all| all.contains(&notice.severity))
    };
    let mut rows = Vec::new();
    for (workspace, notice) in notices {
        let theirs = webhooks.iter().filter(|webhook| webhook.workspace == **workspace && asked(webhook, notice));
        rows.extend(theirs.map(|webhook| NewDelivery {
            workspace,
            id: delivery_id(workspace, &webhook.id, &notice.event, &notice.alert),
            webhook: &webhook.id,
            event: &notice.event,
            alert: Some(&notice.alert),
            body: &notice.body,
            at: notice.at,
        }));
    }
    insert(tx, &rows).await?;
    for (workspace, webhook) in rows.iter().map(|row| (row.workspace, row.webhook)).collect::<BTreeSet<_>>() {
        bound(tx, workspace, webhook, bounds).await?;
    }
    Ok(())
}

/// Of what waits for one webhook the oldest gives way.
async fn bound(tx: &mut Tx, workspace: &WorkspaceId, webhook: &str, bounds: OutboxBounds) -> Result<(), sqlx::Error> {
    let why = format!("gave way to newer ones: webhooks.pending = {} were waiting", bounds.pending);
    let given_up = query(
        "UPDATE webhook_deliveries SET state = 'failed', next_at = NULL, last_error = $4 \
         WHERE workspace = $1 AND webhook = $2 AND state = 'pending' AND seq <= (SELECT seq FROM webhook_deliveries \
         WHERE workspace = $1 AND webhook = $2 AND state = 'pending' ORDER BY seq DESC LIMIT 1 OFFSET $3)",
    )
    .bind(workspace.as_str())
    .bind(webhook)
    .bind(stored(bounds.pending as u64))
    .bind(&why)
    .execute(&mut *tx)
    .await?;
    if given_up > 0 {
        tracing::warn!(%workspace, webhook, given_up, "deliveries {why}");
        prune(tx, workspace, webhook, bounds.kept).await?;
    }
    Ok(())
}

/// Of what is done for one webhook the newest stay.
async fn prune(tx: &mut Tx, workspace: &WorkspaceId, webhook: &str, kept: usize) -> Result<(), sqlx::Error> {
    query(
        "DELETE FROM webhook_deliveries WHERE workspace = $1 AND webhook = $2 AND state <> 'pending' AND seq <= \
         (SELECT seq FROM webhook_deliveries WHERE workspace = $1 AND webhook = $2 AND state <> 'pending' \
         ORDER BY seq DESC LIMIT 1 OFFSET $3)",
    )
    .bind(workspace.as_str())
    .bind(webhook)
    .bind(stored(kept as u64))
    .execute(tx)
    .await?;
    Ok(())
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    pub fn webhook(workspace: &WorkspaceId, id: &str) -> Webhook {
        Webhook {
            id: id.into(),
            workspace: workspace.clone(),
            url: "https://example.com/hook".into(),
            events: vec!["alert.firing".into(), "alert.resolved".into()],
            severities: None,
            secret: "sealed".into(),
            previous: None,
            disabled: None,
            created_at: Micros(1),
            updated_at: Micros(1),
        }
    }

    pub fn notice(event: &str, alert: &str, at: i64) -> Notice {
        Notice {
            event: event.into(),
            alert: alert.into(),
            severity: "warning".into(),
            at: Micros(at),
            body: format!("{{\"type\":\"{event}\"}}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::alerts::testing::alert;
    use super::super::checkpoints::testing::commit;
    use super::super::testing::*;
    use super::super::{Commit, Options, suite};
    use super::testing::{notice, webhook};
    use super::*;

    /// Commits an alert `id` and what is told of it.
    async fn tell(store: &Store, workspace: &WorkspaceId, notices: &[Notice]) {
        let alerts = notices.iter().map(|notice| alert(workspace, &notice.alert, notice.at.0)).collect();
        store.commit(&[Commit { alerts, notices: notices.to_vec(), ..commit(workspace, 1) }]).await.unwrap();
    }

    async fn due(store: &Store, now: i64) -> Vec<Due> {
        store.due_deliveries(Micros(now), 10, 100, &[]).await.unwrap()
    }

    async fn listed(store: &Store, workspace: &WorkspaceId, webhook: &str) -> Vec<(String, String, String)> {
        let (all, _) = store.deliveries(workspace, webhook, 100, None).await.unwrap();
        all.into_iter().map(|d| (d.event, d.alert.unwrap_or_default(), d.state)).collect()
    }

    fn ok(at: i64) -> Attempt {
        Attempt { at: Micros(at), status: Some(204), error: None, next_at: None }
    }

    fn again(at: i64, next_at: i64) -> Attempt {
        let error = Some("the answer was 500".into());
        Attempt { at: Micros(at), status: Some(500), error, next_at: Some(Micros(next_at)) }
    }

    #[tokio::test]
    async fn a_webhook_reads_back_as_it_was_written_changed_and_deleted() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let one = webhook(&acme, "1");
        store.create_webhook(&one).await.unwrap();
        assert!(matches!(store.create_webhook(&one).await, Err(StoreError::Exists { .. })));
        let two = Webhook { severities: Some(vec!["critical".into()]), created_at: Micros(2), ..webhook(&acme, "2") };
        store.create_webhook(&two).await.unwrap();
        assert_eq!(store.webhooks(&acme).await.unwrap(), [one.clone(), two.clone()]);
        let changed = Webhook {
            url: "https://example.com/other".into(),
            events: vec!["alert.firing".into()],
            disabled: Some("for now".into()),
            updated_at: Micros(9),
            ..one
        };
        assert!(store.update_webhook(&changed).await.unwrap());
        assert_eq!(store.webhook(&acme, "1").await.unwrap(), Some(changed));
        assert!(store.delete_webhook(&acme, "1").await.unwrap() && !store.delete_webhook(&acme, "1").await.unwrap());
        assert_eq!(store.webhook(&acme, "1").await.unwrap(), None);
        assert!(!store.update_webhook(&webhook(&acme, "1")).await.unwrap());
    }

    #[tokio::test]
    async fn a_secret_is_sealed_again_only_over_what_was_read() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.create_webhook(&webhook(&acme, "1")).await.unwrap();
        assert_eq!(store.all_webhook_secrets().await.unwrap(), [(acme.clone(), "1".into(), "sealed".into())]);
        assert!(!store.reseal_webhook(&acme, "1", "other", "new").await.unwrap());
        assert!(store.reseal_webhook(&acme, "1", "sealed", "new").await.unwrap());
        assert_eq!(store.webhook(&acme, "1").await.unwrap().unwrap().secret, "new");
    }

    #[tokio::test]
    async fn a_secret_that_is_rotated_stays_beside_the_new_one_or_goes() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.create_webhook(&webhook(&acme, "1")).await.unwrap();
        tell(&store, &acme, &[notice("alert.firing", "a", 5)]).await;
        assert!(!store.rotate_webhook_secret(&acme, "2", "second", None, Micros(3)).await.unwrap());
        assert!(store.rotate_webhook_secret(&acme, "1", "second", Some(Micros(9)), Micros(3)).await.unwrap());
        let both = Some(("sealed".to_owned(), Micros(9)));
        assert_eq!((&due(&store, 5).await[0].secret, &due(&store, 5).await[0].previous), (&"second".into(), &both));
        // what is changed otherwise at the same time takes no secret back
        let other = Webhook { url: "https://example.com/other".into(), ..webhook(&acme, "1") };
        assert!(store.update_webhook(&other).await.unwrap());
        let found = store.webhook(&acme, "1").await.unwrap().unwrap();
        assert_eq!((found.secret.as_str(), &found.previous, &found.url), ("second", &both, &other.url));
        // a new key seals both
        let sealed: Vec<String> = store.all_webhook_secrets().await.unwrap().into_iter().map(|one| one.2).collect();
        assert_eq!(sealed, ["second", "sealed"]);
        assert!(store.reseal_webhook(&acme, "1", "sealed", "again").await.unwrap());
        let found = store.webhook(&acme, "1").await.unwrap().unwrap();
        assert_eq!((found.secret.as_str(), found.previous), ("second", Some(("again".to_owned(), Micros(9)))));
        assert!(store.rotate_webhook_secret(&acme, "1", "third", None, Micros(4)).await.unwrap());
        let found = store.webhook(&acme, "1").await.unwrap().unwrap();
        assert_eq!((found.secret.as_str(), found.previous, found.updated_at), ("third", None, Micros(4)));
    }

    #[tokio::test]
    async fn an_alert_and_its_deliveries_are_there_together_and_a_repeat_adds_nothing() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        for (workspace, id) in [(&acme, "1"), (&acme, "2"), (&other, "3")] {
            store.create_webhook(&webhook(workspace, id)).await.unwrap();
        }
        let notices = [notice("alert.firing", "a", 5)];
        tell(&store, &acme, &notices).await;
        let first = due(&store, 5).await;
        assert_eq!(first.iter().map(|due| due.delivery.webhook.as_str()).collect::<Vec<_>>(), ["1", "2"]);
        assert!(first[0].delivery.id.starts_with("msg_") && first[0].delivery.id != first[1].delivery.id);
        assert_eq!((first[0].body.as_str(), first[0].secret.as_str()), ("{\"type\":\"alert.firing\"}", "sealed"));
        store.record_attempt(&first[0].delivery, &ok(6)).await.unwrap();
        for _ in 0..2 {
            tell(&store, &acme, &notices).await; // as after an answer that was lost
        }
        assert_eq!(due(&store, 9).await, first[1..]);
        let delivered = [("alert.firing".to_owned(), "a".to_owned(), "delivered".to_owned())];
        assert_eq!(listed(&store, &acme, "1").await, delivered);

        // a commit that fails leaves neither the alert nor a delivery
        let bad = super::super::Alert { state: "half-resolved".into(), ..alert(&acme, "b", 1) };
        let notices = vec![notice("alert.firing", "b", 5)];
        store.commit(&[Commit { alerts: vec![bad], notices, ..commit(&acme, 2) }]).await.unwrap_err();
        assert_eq!(listed(&store, &acme, "1").await, delivered);
    }

    #[tokio::test]
    async fn a_webhook_is_told_of_what_it_asked_for_unless_it_is_disabled() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        let only = |id: &str, event: &str| Webhook { events: vec![event.into()], ..webhook(&acme, id) };
        let severe = Webhook { severities: Some(vec!["critical".into()]), ..webhook(&acme, "severe") };
        let off = Webhook { disabled: Some("it is".into()), ..webhook(&acme, "off") };
        for webhook in [only("firing", "alert.firing"), only("resolved", "alert.resolved"), severe, off] {
            store.create_webhook(&webhook).await.unwrap();
        }
        let critical = Notice { severity: "critical".into(), ..notice("alert.firing", "b", 6) };
        tell(&store, &acme, &[notice("alert.firing", "a", 5), notice("alert.resolved", "a", 6), critical]).await;
        let pending = |event: &str, alert: &str| (event.to_owned(), alert.to_owned(), "pending".to_owned());
        let (fired, ended) = (pending("alert.firing", "a"), pending("alert.resolved", "a"));
        assert_eq!(listed(&store, &acme, "firing").await, [pending("alert.firing", "b"), fired]);
        assert_eq!(listed(&store, &acme, "resolved").await, [ended]);
        assert_eq!(listed(&store, &acme, "severe").await, [pending("alert.firing", "b")]);
        assert_eq!(listed(&store, &acme, "off").await, []);
    }

    #[tokio::test]
    async fn the_end_of_an_alert_waits_for_its_beginning() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.create_webhook(&webhook(&acme, "1")).await.unwrap();
        tell(&store, &acme, &[notice("alert.firing", "a", 5), notice("alert.resolved", "a", 5)]).await;
        tell(&store, &acme, &[notice("alert.firing", "b", 5)]).await;
        let events = |due: &[Due]| -> Vec<(String, String)> {
            due.iter().map(|d| (d.delivery.event.clone(), d.delivery.alert.clone().unwrap())).collect()
        };
        let (firing, of_b) = (("alert.firing".into(), "a".into()), ("alert.firing".into(), "b".into()));
        let first = due(&store, 5).await;
        assert_eq!(events(&first), [firing, of_b]);
        store.record_attempt(&first[0].delivery, &again(6, 20)).await.unwrap();
        store.record_attempt(&first[1].delivery, &ok(6)).await.unwrap();
        assert_eq!(due(&store, 19).await, [], "it waits, since the beginning will be tried again");
        assert_eq!(store.next_delivery(Micros(6)).await.unwrap(), Some(Micros(20)));
        assert_eq!(store.next_delivery(Micros(20)).await.unwrap(), None);
        let second = due(&store, 20).await;
        assert_eq!((second[0].delivery.attempts, second[0].delivery.last_status), (1, Some(500)));
        store.record_attempt(&second[0].delivery, &ok(21)).await.unwrap();
        assert_eq!(events(&due(&store, 21).await), [("alert.resolved".into(), "a".into())]);
    }

    #[tokio::test]
    async fn many_for_one_webhook_push_no_other_out() {
        let (store, _dir) = store().await;
        let (acme, other) = (add_workspace(&store, "acme").await, add_workspace(&store, "other").await);
        for (workspace, id) in [(&acme, "1"), (&other, "2")] {
            store.create_webhook(&webhook(workspace, id)).await.unwrap();
        }
        let many: Vec<Notice> = (0..50).map(|i| notice("alert.firing", &format!("{i:02}"), i)).collect();
        tell(&store, &acme, &many).await;
        tell(&store, &other, &[notice("alert.firing", "late", 60)]).await;
        let webhooks = async |each, limit, without: &[&str]| -> Vec<String> {
            let due = store.due_deliveries(Micros(100), each, limit, without).await.unwrap();
            due.into_iter().map(|due| due.delivery.webhook).collect()
        };
        assert_eq!(webhooks(3, 100, &[]).await, ["1", "2", "1", "1"]);
        assert_eq!(webhooks(100, 2, &[]).await, ["1", "2"]);
        assert_eq!(webhooks(2, 100, &["2"]).await, ["1", "1"]);
        assert!(webhooks(2, 100, &["1", "2"]).await.is_empty());
    }

    #[tokio::test]
    async fn a_disabled_webhook_has_nothing_that_waits() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.create_webhook(&webhook(&acme, "1")).await.unwrap();
        tell(&store, &acme, &[notice("alert.firing", "a", 5), notice("alert.firing", "b", 5)]).await;
        let under_way = due(&store, 5).await;
        assert!(store.disable_webhook(&acme, "1", "it answered 410 Gone", Micros(7)).await.unwrap());
        assert!(!store.disable_webhook(&acme, "1", "again", Micros(8)).await.unwrap());
        let why = store.webhook(&acme, "1").await.unwrap().unwrap();
        assert_eq!((why.disabled.as_deref(), why.updated_at), (Some("it answered 410 Gone"), Micros(7)));
        assert_eq!(due(&store, 100).await, []);
        // one that was under way neither comes back nor is told wrong
        store.record_attempt(&under_way[0].delivery, &again(8, 20)).await.unwrap();
        store.record_attempt(&under_way[1].delivery, &ok(8)).await.unwrap();
        let (all, _) = store.deliveries(&acme, "1", 10, None).await.unwrap();
        assert_eq!(all.iter().map(|d| d.state.as_str()).collect::<Vec<_>>(), ["delivered", "failed"]);
        assert_eq!(all[1].last_error.as_deref(), Some("it answered 410 Gone"));
    }

    #[tokio::test]
    async fn what_waits_and_what_is_kept_are_bounded_and_the_bound_says_its_name() {
        let (whole, dir) = store().await;
        let acme = add_workspace(&whole, "acme").await;
        drop(whole);
        let options = Options { webhook_pending: 3, webhook_kept: 2, ..suite::options() };
        let store = Store::open_with(&url(&dir), &options).await.unwrap();
        store.create_webhook(&webhook(&acme, "1")).await.unwrap();
        let notices: Vec<Notice> = (0..4).map(|i| notice("alert.firing", &i.to_string(), i)).collect();
        tell(&store, &acme, &notices).await;
        let (all, _) = store.deliveries(&acme, "1", 10, None).await.unwrap();
        assert_eq!(all.iter().filter(|d| d.state == "pending").count(), 3);
        let given_up = all.last().unwrap();
        assert_eq!((given_up.alert.as_deref(), given_up.state.as_str()), (Some("0"), "failed"));
        assert!(given_up.last_error.as_ref().unwrap().contains("webhooks.pending = 3"), "{given_up:?}");
        for due in due(&store, 100).await {
            store.record_attempt(&due.delivery, &ok(100)).await.unwrap();
        }
        let delivered = |alert: &str| ("alert.firing".to_owned(), alert.to_owned(), "delivered".to_owned());
        assert_eq!(listed(&store, &acme, "1").await, [delivered("3"), delivered("2")]);
    }

    #[tokio::test]
    async fn deliveries_come_in_pages_newest_first_and_a_test_is_one_of_them() {
        let (store, _dir) = store().await;
        let acme = add_workspace(&store, "acme").await;
        store.create_webhook(&webhook(&acme, "1")).await.unwrap();
        let notices: Vec<Notice> = (0..5).map(|i| notice("alert.firing", &i.to_string(), 7)).collect();
        tell(&store, &acme, &notices).await;
        let test = store.add_delivery(&acme, "1", ["msg_test", "webhook.test", "{}"], Micros(8)).await.unwrap();
        assert_eq!((test.alert.as_deref(), test.state.as_str(), test.next_at), (None, "pending", Some(Micros(8))));
        let (mut read, mut before) = (Vec::new(), None);
        loop {
            let (page, next) = store.deliveries(&acme, "1", 4, before.as_deref()).await.unwrap();
            read.extend(page.into_iter().map(|d| d.alert.unwrap_or(d.event)));
            before = next;
            if before.is_none() {
                break;
            }
        }
        assert_eq!(read, ["webhook.test", "4", "3", "2", "1", "0"]);
        let missing = store.add_delivery(&acme, "none", ["msg_x", "webhook.test", "{}"], Micros(8)).await;
        assert!(matches!(missing, Err(StoreError::Missing { .. })), "{missing:?}");
    }

    #[test]
    fn the_id_of_a_delivery_follows_from_its_cause_alone() {
        let (acme, other) = (name("acme"), name("other"));
        let id = delivery_id(&acme, "1", "alert.firing", "a");
        assert_eq!(id, delivery_id(&acme, "1", "alert.firing", "a"));
        assert_eq!(id.len(), 28);
        for differs in [
            delivery_id(&other, "1", "alert.firing", "a"),
            delivery_id(&acme, "2", "alert.firing", "a"),
            delivery_id(&acme, "1", "alert.resolved", "a"),
            delivery_id(&acme, "1", "alert.firinga", ""),
        ] {
            assert_ne!(id, differs);
        }
    }
}
