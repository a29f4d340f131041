//! Webhooks as users define them, and what they are told.

use crate::endpoint::{new_secret, secret_of, secret_text};
use crate::fault::{Fault, FaultKind};
use crate::outlet::AlertPhase;
use crate::rows::rfc3339;
use crate::system::{System, over_limit, unknown};
use engine::event::{Micros, Span, WorkspaceId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sql::store::{Alert, Delivery, Notice, Webhook};
use uuid::Uuid;

/// How webhooks are told, and how many there may be: `webhooks.*` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebhookConfig {
    /// Lets webhooks be at addresses that are not public, and be called over plain HTTP.
    pub allow_private: bool,
    /// Webhooks of a workspace.
    pub per_workspace: usize,
    /// Deliveries to one webhook under way at the same time; to one that failed last, a single one.
    pub concurrency: usize,
    /// Deliveries under way at the same time in all.
    pub connections: usize,
    /// How long one attempt may take, in milliseconds.
    pub timeout_ms: u64,
    /// For how long a delivery is tried again.
    pub retry_hours: u32,
    /// Deliveries of one webhook that may wait. Over it the oldest fails.
    pub pending: usize,
    /// Deliveries of one webhook that are kept once they are done.
    pub kept: usize,
}

impl Default for WebhookConfig {
    fn default() -> Self {
        let store = sql::store::Options::default();
        Self {
            allow_private: false,
            per_workspace: 20,
            concurrency: 4,
            connections: 256,
            timeout_ms: 10_000,
            retry_hours: 24,
            pending: store.webhook_pending,
            kept: store.webhook_kept,
        }
    }
}

impl WebhookConfig {
    pub(crate) fn retry_for(&self) -> Span {
        Span::seconds(i64::from(self.retry_hours) * 3_600)
    }
}

/// What a webhook can be told of.
const EVENTS: [&str; 2] = [FIRING, RESOLVED];
const FIRING: &str = "alert.firing";
const RESOLVED: &str = "alert.resolved";
const TEST: &str = "webhook.test";

/// A webhook as it is asked for, or what is to be different about one.
#[derive(Clone, Debug, Default)]
pub struct WebhookChange {
    /// Not left out of a new one.
    pub url: Option<String>,
    pub events: Option<Vec<String>>,
    /// `Some(None)`: alerts of every severity.
    pub severities: Option<Option<Vec<String>>>,
    /// `whsec_…`.
    pub secret: Option<String>,
    pub enabled: Option<bool>,
}

/// For whom a webhook's secret is sealed.
pub fn sealed_for(workspace: &WorkspaceId, webhook: &str) -> String {
    format!("webhook/{workspace}/{webhook}")
}

/// An alert as clients and webhooks see it.
pub fn alert_json(alert: &Alert) -> Value {
    json!({
        "id": alert.id, "rule": alert.rule, "metric": alert.metric, "severity": alert.severity,
        "labels": alert.labels, "state": alert.state, "row": alert.row,
        "started_at": rfc3339(alert.started_at), "fired_at": rfc3339(alert.fired_at),
        "resolved_at": alert.resolved_at.map(rfc3339), "acked_at": alert.acked_at.map(rfc3339),
        "acked_by": alert.acked_by,
    })
}

fn body(event: &str, at: Micros, data: &Value) -> String {
    json!({"type": event, "timestamp": rfc3339(at), "data": data}).to_string()
}

/// What webhooks are told of an alert; nothing of its acknowledgement.
pub(crate) fn notice(phase: AlertPhase, alert: &Alert) -> Option<Notice> {
    let (event, at) = match phase {
        AlertPhase::Firing => (FIRING, alert.fired_at),
        AlertPhase::Resolved => (RESOLVED, alert.resolved_at.unwrap_or(alert.fired_at)),
        AlertPhase::Acked => return None,
    };
    Some(Notice {
        event: event.to_owned(),
        alert: alert.id.clone(),
        severity: alert.severity.clone(),
        at,
        body: body(event, at, &json!({"alert": alert_json(alert)})),
    })
}

/// Severities a webhook may name, and bytes of one.
const SEVERITIES_MAX: usize = 20;
const SEVERITY_BYTES_MAX: usize = 64;

fn bad(detail: impl Into<String>) -> Fault {
    Fault::invalid("bad_webhook", detail)
}

impl WebhookChange {
    /// Takes the changes over, but for secret and state, once they are found to be sensible.
    async fn apply(&self, system: &System, webhook: &mut Webhook) -> Result<(), Fault> {
        if let Some(url) = &self.url {
            let checked = system.deps().notifier.courier.check(url).await;
            checked.map_err(|error| bad(format!("`url` cannot be used: {error}")))?;
            webhook.url.clone_from(url);
        }
        if let Some(events) = &self.events {
            let stranger = events.iter().find(|event| !EVENTS.contains(&event.as_str()));
            if let Some(event) = stranger {
                let event: String = event.chars().take(40).collect();
                return Err(bad(format!("`{event}` is no event; there are {}", EVENTS.join(" and "))));
            }
            if events.is_empty() || events.len() > EVENTS.len() {
                return Err(bad("`events` needs one or two of them; leave it out for both"));
            }
            webhook.events.clone_from(events);
        }
        if let Some(severities) = &self.severities {
            let fits = |all: &Vec<String>| {
                let sensible = |severity: &String| (1..=SEVERITY_BYTES_MAX).contains(&severity.len());
                (1..=SEVERITIES_MAX).contains(&all.len()) && all.iter().all(sensible)
            };
            if severities.as_ref().is_some_and(|all| !fits(all)) {
                let detail = format!(
                    "`severities` needs 1 to {SEVERITIES_MAX} of up to {SEVERITY_BYTES_MAX} bytes each; leave it out \
                     for alerts of every severity"
                );
                return Err(bad(detail));
            }
            webhook.severities.clone_from(severities);
        }
        Ok(())
    }
}

/// A secret that somebody brought; `None` where they brought none.
fn brought(text: Option<&str>) -> Result<Option<Vec<u8>>, Fault> {
    let Some(text) = text else { return Ok(None) };
    let fits = secret_of(text);
    fits.map(Some).ok_or_else(|| bad("`secret` must be `whsec_` and 24 to 64 bytes in base64; leave it out to get one"))
}

/// The secret that was brought, or a new one beside its text: nobody sees that again.
fn or_made(text: Option<&str>) -> Result<(Vec<u8>, Option<String>), Fault> {
    Ok(match brought(text)? {
        Some(secret) => (secret, None),
        None => {
            let secret = new_secret();
            let text = secret_text(&secret);
            (secret, Some(text))
        }
    })
}

/// How long the secret before a rotation signs too, unless said, and at most.
const OVERLAP: Span = Span::seconds(24 * 3_600);
const OVERLAP_MAX: Span = Span::seconds(30 * 24 * 3_600);

impl System {
    /// A new webhook, and its secret as text where it was made here: nobody sees it again.
    pub async fn create_webhook(
        &self,
        workspace: &WorkspaceId,
        new: WebhookChange,
    ) -> Result<(Webhook, Option<String>), Fault> {
        let deps = self.deps();
        let most = deps.webhooks.per_workspace;
        if self.store().webhooks(workspace).await?.len() >= most {
            return Err(over_limit("webhooks.per_workspace", most));
        }
        if new.url.is_none() {
            return Err(bad("`url` is missing"));
        }
        let (secret, shown) = or_made(new.secret.as_deref())?;
        let (id, now) = (Uuid::now_v7().to_string(), self.now());
        let mut webhook = Webhook {
            secret: deps.sealer.seal(&sealed_for(workspace, &id), &secret),
            id,
            workspace: workspace.clone(),
            url: String::new(),
            previous: None,
            events: EVENTS.map(str::to_owned).to_vec(),
            severities: None,
            disabled: None,
            created_at: now,
            updated_at: now,
        };
        new.apply(self, &mut webhook).await?;
        self.store().create_webhook(&webhook).await?;
        Ok((webhook, shown))
    }

    /// The webhook as it is then. What waits for one that is disabled fails.
    pub async fn change_webhook(
        &self,
        workspace: &WorkspaceId,
        id: &str,
        change: WebhookChange,
        by: &str,
    ) -> Result<Webhook, Fault> {
        let (store, now) = (self.store(), self.now());
        let mut webhook = self.webhook(workspace, id).await?;
        change.apply(self, &mut webhook).await?;
        let secret = brought(change.secret.as_deref())?;
        if change.enabled == Some(true) {
            webhook.disabled = None;
        }
        webhook.updated_at = now;
        let mut found = store.update_webhook(&webhook).await?;
        if let Some(secret) = secret {
            let sealed = self.deps().sealer.seal(&sealed_for(workspace, id), &secret);
            found = store.rotate_webhook_secret(workspace, id, &sealed, None, now).await?;
        }
        if change.enabled == Some(false) && webhook.disabled.is_none() {
            found = store.disable_webhook(workspace, id, &format!("disabled by {by}"), now).await?;
        }
        // it may have been deleted meanwhile
        if found { self.webhook(workspace, id).await } else { Err(unknown("webhook", "unknown_webhook", id)) }
    }

    /// Gives a webhook another secret, while the one in force signs too for as long as `overlap`: the webhook, and the
    /// secret as text where it was made here.
    pub async fn rotate_webhook_secret(
        &self,
        workspace: &WorkspaceId,
        id: &str,
        secret: Option<&str>,
        overlap: Option<Span>,
    ) -> Result<(Webhook, Option<String>), Fault> {
        let (secret, shown) = or_made(secret)?;
        let (overlap, now) = (overlap.unwrap_or(OVERLAP), self.now());
        if overlap > OVERLAP_MAX {
            return Err(bad(format!("`overlap` may be {} days at most", OVERLAP_MAX.0 / 86_400_000_000)));
        }
        let until = Some(now.plus(overlap)).filter(|until| *until > now);
        let sealed = self.deps().sealer.seal(&sealed_for(workspace, id), &secret);
        match self.store().rotate_webhook_secret(workspace, id, &sealed, until, now).await? {
            true => Ok((self.webhook(workspace, id).await?, shown)),
            false => Err(unknown("webhook", "unknown_webhook", id)),
        }
    }

    pub async fn remove_webhook(&self, workspace: &WorkspaceId, id: &str) -> Result<(), Fault> {
        let existed = self.store().delete_webhook(workspace, id).await?;
        if existed { Ok(()) } else { Err(unknown("webhook", "unknown_webhook", id)) }
    }

    pub async fn webhook(&self, workspace: &WorkspaceId, id: &str) -> Result<Webhook, Fault> {
        let found = self.store().webhook(workspace, id).await?;
        found.ok_or_else(|| unknown("webhook", "unknown_webhook", id))
    }

    /// Sends something that comes from no alert, the same way as what does.
    pub async fn test_webhook(&self, workspace: &WorkspaceId, id: &str) -> Result<Delivery, Fault> {
        let webhook = self.webhook(workspace, id).await?;
        if let Some(why) = webhook.disabled {
            let detail = format!("this webhook is disabled ({why}); enable it first");
            return Err(Fault::new(FaultKind::Conflict, "webhook_disabled", detail));
        }
        let (message, now) = (format!("msg_{}", Uuid::now_v7().simple()), self.now());
        let body = body(TEST, now, &json!({"webhook": id}));
        let delivery = self.store().add_delivery(workspace, id, [&message, TEST, &body], now).await?;
        self.deps().notifier.wake();
        Ok(delivery)
    }
}
