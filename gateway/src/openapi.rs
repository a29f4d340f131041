//! What the HTTP API looks like: OpenAPI 3.1 from one table, and a page for people made of the same.

use crate::AppState;
use crate::console;
use crate::permission::Permission;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_SECURITY_POLICY, HeaderValue};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::sync::LazyLock;

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/openapi.json", get(async || Json(&*DOCUMENT))).route("/docs", get(docs))
}

/// One operation.
struct Operation {
    method: &'static str,
    path: &'static str,
    tag: &'static str,
    summary: &'static str,
    /// Parameters of the query string: name and meaning.
    query: &'static [(&'static str, &'static str)],
    /// Content types and schema of the body.
    body: Option<(&'static [&'static str], &'static str)>,
    /// What the caller must hold in the workspace.
    needs: Option<Permission>,
    status: u16,
    /// Content types and schema of the answer; none has no body.
    answer: Option<(&'static [&'static str], &'static str)>,
    /// Statuses it refuses with beyond those of its kind.
    refuses: &'static [u16],
}

impl Operation {
    const fn new(method: &'static str, path: &'static str, tag: &'static str, summary: &'static str) -> Self {
        let (query, body, needs, answer, refuses): (&[_], _, _, _, &[_]) = (&[], None, None, None, &[]);
        Self { method, path, tag, summary, query, body, needs, status: 204, answer, refuses }
    }

    const fn query(mut self, query: &'static [(&'static str, &'static str)]) -> Self {
        self.query = query;
        self
    }

    const fn needs(mut self, permission: Permission) -> Self {
        self.needs = Some(permission);
        self
    }

    const fn takes(self, schema: &'static str) -> Self {
        self.takes_as(JSON, schema)
    }

    const fn takes_as(mut self, types: &'static [&'static str], schema: &'static str) -> Self {
        self.body = Some((types, schema));
        self
    }

    const fn refuses(mut self, statuses: &'static [u16]) -> Self {
        self.refuses = statuses;
        self
    }

    const fn gives_nothing(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    const fn gives(self, status: u16, schema: &'static str) -> Self {
        self.gives_as(status, JSON, schema)
    }

    const fn gives_as(mut self, status: u16, types: &'static [&'static str], schema: &'static str) -> Self {
        self.status = status;
        self.answer = Some((types, schema));
        self
    }

    fn is_open(&self) -> bool {
        const OPEN: [&str; 4] = ["/auth/login", "/auth/refresh", "/permissions", "/api/v1/ws"];
        !self.path.starts_with("/api/")
            || self.path.contains("/auth/oidc")
            || OPEN.iter().any(|end| self.path.ends_with(end))
    }
}

const JSON: &[&str] = &["application/json"];
const HTML: &[&str] = &["text/html"];
const TEXT: &[&str] = &["text/plain"];
const EVENTS: &[&str] = &["application/x-ndjson", "application/json", "application/vnd.apache.arrow.stream"];
const ROWS: &[&str] = &["application/x-ndjson", "application/json"];
const TABLES: &[&str] = &["application/json", "text/csv", "application/vnd.apache.arrow.stream"];
const RUNS: &[&str] = &["text/event-stream"];

const LIMIT: (&str, &str) = ("limit", "Rows of the page, 1 to 10000; 100 unless said.");
const BEFORE: (&str, &str) = ("before", "The `next` of the page before.");

const OPERATIONS: &[Operation] = &[
    Operation::new("get", "/health", "health", "Whether the process lives.").gives(200, "Health"),
    Operation::new("get", "/ready", "health", "Whether the parts can serve; 503 with the reasons where they cannot. Without store or Redis it serves on, `degraded`.")
        .refuses(&[503])
        .gives(200, "Ready"),
    Operation::new("get", "/metrics", "health", "Figures of the process for Prometheus, unless they have their own listener.")
        .refuses(&[404])
        .gives_as(200, TEXT, "Text"),
    Operation::new("get", "/openapi.json", "health", "This document.").gives(200, "Object"),
    Operation::new("get", "/docs", "health", "This document for people.").gives_as(200, HTML, "Text"),
    Operation::new("post", "/api/v1/auth/login", "sign-in", "Signs in; `otp` is the code of a second factor where the account has one. After 5 failures in a row for one account from one address, or 100 from one address, each further try has to wait, from 1 s up to 60 s: 429. Nodes that share a Redis count together.")
        .takes("Login")
        .gives(200, "Tokens"),
    Operation::new("post", "/api/v1/auth/refresh", "sign-in", "A new pair for a refresh token, which is spent; its reuse ends the whole sign-in.")
        .takes("Refresh")
        .gives(200, "Tokens"),
    Operation::new("post", "/api/v1/auth/logout", "sign-in", "Ends the sign-in of the access token, or of the refresh token in the body; with `everywhere` all sign-ins of the user.")
        .takes("Logout"),
    Operation::new("get", "/api/v1/auth/oidc", "sign-in", "The OpenID Connect issuers that somebody may sign in with.").gives(200, "Issuers"),
    Operation::new("get", "/api/v1/auth/oidc/{issuer}/start", "sign-in", "Sends the browser to the issuer: authorization code with PKCE. A cookie carries the sign-in, which has ten minutes; a browser has at most four under way.")
        .refuses(&[404, 502])
        .gives_nothing(303),
    Operation::new("get", "/api/v1/auth/oidc/{issuer}/callback", "sign-in", "Where the issuer sends the browser back; it goes on to the console with `#sign_in=CODE`. 401 `sign_in_refused`: begin again. 403 `unknown_user`: there is no user for whom the issuer names. 502 `issuer_failed`: the issuer is away.")
        .query(&[("state", "Of the sign-in."), ("code", "The authorization code."), ("error", "Why the issuer refused.")])
        .refuses(&[403, 404, 502])
        .gives_nothing(303),
    Operation::new("post", "/api/v1/auth/oidc/token", "sign-in", "The tokens for that code, which is good once, for a minute, and in the browser that signed in.")
        .takes("Fetch")
        .gives(200, "Tokens"),
    Operation::new("put", "/api/v1/me/password", "sign-in", "Another password. Ends every sign-in, this one too.")
        .takes("PasswordChange"),
    Operation::new("post", "/api/v1/me/totp", "sign-in", "Makes the secret of a second factor, in force once it is confirmed. Where one is in force, `code` is a code of it.")
        .takes("Factor")
        .gives(200, "TotpSecret"),
    Operation::new("post", "/api/v1/me/totp/confirm", "sign-in", "Proves a code of the new secret: sign-ins ask for one from now on.")
        .takes("Code"),
    Operation::new("post", "/api/v1/me/totp/disable", "sign-in", "Sign-ins ask for no code any more; `code` is a last one.").refuses(&[404]).takes("Factor"),
    Operation::new("get", "/api/v1/permissions", "sign-in", "Every permission, every role and what it may do.")
        .gives(200, "Permissions"),
    Operation::new("get", "/api/v1/me", "sign-in", "Who am I, and my role in each workspace; where I am only invited (`invited`) my first request to it accepts, and `DELETE …/members/ME` declines.").gives(200, "Me"),
    Operation::new("get", "/api/v1/users", "sign-in", "All users. Admins only.").gives(200, "Users"),
    Operation::new("post", "/api/v1/users", "sign-in", "A new user. Admins only.").takes("NewUser").gives(201, "User"),
    Operation::new("get", "/api/v1/packs", "workspaces", "What a workspace of one domain can start with.").gives(200, "Packs"),
    Operation::new("get", "/api/v1/workspaces", "workspaces", "Mine; admins of the installation see all.")
        .query(&[LIMIT, ("after", "The `next` of the page before.")])
        .gives(200, "Workspaces"),
    Operation::new("post", "/api/v1/workspaces", "workspaces", "A new workspace; its creator is its owner, of `limits.workspaces_per_user` at most (409 `limit_reached`) unless they administer the installation.")
        .takes("NewWorkspace")
        .gives(201, "Workspace"),
    Operation::new("get", "/api/v1/workspaces/{ws}", "workspaces", "One workspace.").gives(200, "Workspace"),
    Operation::new("patch", "/api/v1/workspaces/{ws}", "workspaces", "Changes what is given.").needs(Permission::FundSettingsUpdate)
        .takes("WorkspaceChanges")
        .gives(200, "Workspace"),
    Operation::new("delete", "/api/v1/workspaces/{ws}", "workspaces", "Deletes the workspace with all that is in it.").needs(Permission::WorkspaceDelete),
    Operation::new("get", "/api/v1/workspaces/{ws}/members", "workspaces", "Members and their roles, and who is invited (`invited`), who goes by the address as `user`.").gives(200, "Members"),
    Operation::new("put", "/api/v1/workspaces/{ws}/members", "workspaces", "Gives a member a role here, and so does an admin of the installation any user. Anybody else is invited: the answer is the same whether or not somebody has the address, and whoever has it, now or later, becomes a member with their first request to the workspace. An owner of `limits.workspaces_per_user` workspaces gets no other that way (409 `limit_reached`).").needs(Permission::WorkspaceManage)
        .takes("Assignment")
        .gives(200, "Member"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/members/{user}", "workspaces", "Ends a membership or an invitation, by user id or e-mail address. Everybody may leave.").needs(Permission::WorkspaceManage),
    Operation::new("get", "/api/v1/workspaces/{ws}/usage", "workspaces", "The workspace's tier and how much of it is used; of events, `limit_at_once` is the ten seconds' worth that may come at once. Of a user's requests those that only read are not counted, since consoles poll; a key's are.")
        .gives(200, "Usage"),
    Operation::new("get", "/api/v1/workspaces/{ws}/grants", "workspaces", "What members may do beyond their roles.")
        .needs(Permission::WorkspaceManage)
        .gives(200, "Grants"),
    Operation::new("put", "/api/v1/workspaces/{ws}/grants", "workspaces", "Grants a user a permission, mostly on one resource: `portfolio:read@portfolio/main`. Somebody who is no member is invited as a guest.")
        .needs(Permission::WorkspaceManage)
        .takes("NewGrant")
        .gives(200, "Grants"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/grants", "workspaces", "Takes a grant back. A guest without any is no member any more.")
        .needs(Permission::WorkspaceManage)
        .query(&[("email", "Whose it is."), ("scope", "What was granted.")]),
    Operation::new("get", "/api/v1/workspaces/{ws}/keys", "workspaces", "API keys, without the keys themselves.").needs(Permission::WorkspaceManage).gives(200, "Keys"),
    Operation::new("post", "/api/v1/workspaces/{ws}/keys", "workspaces", "A new API key, shown this once.").needs(Permission::WorkspaceManage)
        .takes("NewKey")
        .gives(201, "Key"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/keys/{key}", "workspaces", "Revokes an API key.").needs(Permission::WorkspaceManage),
    Operation::new("get", "/api/v1/workspaces/{ws}/audit", "workspaces", "Who did what, newest first.").needs(Permission::AuditRead)
        .query(&[LIMIT, BEFORE])
        .gives(200, "Audit"),
    Operation::new("get", "/api/v1/workspaces/{ws}/streams", "streams", "Streams and where they stand: `events` were taken in and `late` came too late for a metric, since the workspace was made.").needs(Permission::StreamRead).gives(200, "Streams"),
    Operation::new("put", "/api/v1/workspaces/{ws}/streams/{stream}", "streams", "Defines a stream, or adds columns to it.").needs(Permission::StreamDefine)
        .takes("StreamDefinition")
        .gives(200, "Stream"),
    Operation::new("post", "/api/v1/workspaces/{ws}/streams/{stream}/events", "streams", "Takes in events; answers once they are durable, with the `offset` of the last in the log that all workspaces share: it only grows, and says nothing else. Good events count although others are bad. `Content-Encoding: gzip` or `zstd`. Where the tier bounds events a second, ten seconds' worth may come at once, a larger request goes through too and the next ones wait for it, and the `RateLimit-*` headers tell of the workspace's events: `RateLimit-Policy: 10000;w=10` is 1,000 a second; over it 429 `ingest_rate`.").needs(Permission::StreamIngest)
        .query(&[("ts_unit", "What an integer `ts` counts: s, ms, us or ns; ms unless said. Within a year of 1970 an integer is refused (`ts_out_of_range`), since a count in the wrong unit lands there; RFC 3339 may name any time from year 1 to a day from now.")])
        .takes_as(EVENTS, "Events")
        .gives(200, "Ingested"),
    Operation::new("get", "/api/v1/workspaces/{ws}/dead-letters", "streams", "Events that could not be used, newest first, a moment after they were refused: `code` and `detail` say why, `payload` is the event as it came (for Arrow its row as JSON), cut at 4096 bytes. The newest 10000 of a workspace are kept. Without `stream` for those who may read every stream.").needs(Permission::StreamRead)
        .query(&[("stream", "Only those of this stream."), LIMIT, ("after", "The `next` of the page before.")])
        .gives(200, "DeadLetters"),
    Operation::new("get", "/api/v1/workspaces/{ws}/tables", "tables", "Reference tables: what metrics join to streams as `ref.NAME`, each row as it was at an event's time. `positions`, `companies` and `fx_rates` are there from the start; `positions` follows the portfolios.").needs(Permission::StreamRead)
        .gives(200, "ReferenceTables"),
    Operation::new("get", "/api/v1/workspaces/{ws}/tables/{table}", "tables", "One reference table.").needs(Permission::StreamRead)
        .gives(200, "ReferenceTable"),
    Operation::new("put", "/api/v1/workspaces/{ws}/tables/{table}", "tables", "Defines a reference table, or adds columns to it; the primary key stays.").needs(Permission::StreamDefine)
        .takes("ReferenceTableDefinition")
        .gives(200, "ReferenceTable"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/tables/{table}", "tables", "Deletes a reference table that no metric joins, with its rows.").needs(Permission::StreamDefine),
    Operation::new("post", "/api/v1/workspaces/{ws}/tables/{table}/rows", "tables", "Changes rows: objects with the table's columns put a row in the place of the one with its primary key; with `deleted: true` and the primary key they take it away. A change is valid from `valid_from` on, or from its arrival; the first of its key without `valid_from` has always been valid. Answers once the changes are durable; good ones count although others are bad.").needs(Permission::StreamIngest)
        .query(&[("ts_unit", "What an integer `valid_from` counts: s, ms (default), us or ns.")])
        .takes_as(ROWS, "ReferenceTableChanges")
        .gives(200, "Ingested"),
    Operation::new("get", "/api/v1/workspaces/{ws}/tables/{table}/rows", "tables", "The rows valid now, in order of the primary key, with `valid_from` (null: always).").needs(Permission::StreamRead)
        .query(&[LIMIT, ("at", "The rows valid at this time instead, RFC 3339, as far back as metrics may still ask."), ("after", "The `next` of the page before.")])
        .gives(200, "ReferenceRows"),
    Operation::new("get", "/api/v1/workspaces/{ws}/metrics", "metrics", "Metrics and their state. `failure` says why one stopped; one that stopped since it can no longer be planned has rows, but no `keys` and `values`.").needs(Permission::MetricRead).gives(200, "Metrics"),
    Operation::new("put", "/api/v1/workspaces/{ws}/metrics/{metric}", "metrics", "Defines a metric, or defines it anew. `FROM metrics.NAME` reads the final rows of another metric: with GROUP BY a longer window over them, without it row by row with OVER clauses (`PARTITION BY` keys `ORDER BY window_start`, bounded `ROWS` frames or running aggregates, `lag`, `ema`, `rsi`, …). Such a metric takes no `max_delay` and no `allowed_lateness`; its `backfill` is that much of the rows it reads. One that others read can be neither defined anew nor removed (409 `metric_in_use`), nor may metrics read each other in a circle (409 `metric_cycle`). Where the log cannot be read for a `backfill`, nothing is defined and what was stays (503 `log_unavailable`).").needs(Permission::MetricDefine)
        .takes("MetricDefinition")
        .gives(200, "Metric"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/metrics/{metric}", "metrics", "Removes a metric and its rows.").needs(Permission::MetricDefine),
    Operation::new("get", "/api/v1/workspaces/{ws}/metrics/{metric}/plan", "metrics", "How a metric runs: its `panes` (how many are held, how wide, how many make a window and how many windows share one; null where it goes row by row), its `state` in bytes and groups beside the bounds `limits.metric_state_*`, over which it stops as `state_limit`, the reference tables it shares with other metrics, all state of the `workspace`, and the `cost` of its batches since the process started, in microseconds.").needs(Permission::MetricRead)
        .gives(200, "MetricPlan"),
    Operation::new("get", "/api/v1/workspaces/{ws}/metrics/{metric}/rows", "metrics", "Rows, history and open windows alike. A decimal has all its digits; NaN and Infinity are null, and stay so in what is stored. Any other parameter filters by the key column of that name, read as a value of its type: `?symbol=AAPL`, `?day=2026-01-01T00:00:00Z`; with `key.` in front also one that is called as a parameter is: `?key.from=EUR`. No parameter may stand twice.").needs(Permission::MetricRead)
        .query(&[
            ("from", "Windows that start then or later, RFC 3339."),
            ("to", "Windows that start earlier, RFC 3339."),
            LIMIT,
            ("after", "The `next` of the page before."),
            ("is_null", "Key columns that must be NULL, separated by commas."),
            ("final", "`true`: only final rows; `false`: only provisional ones."),
            ("resolution", "`raw`, the default: every window; `1h`, `1d`: of the final rows the last of each hour or day and key, the range widened to whole ones; `auto`: `raw` for a range up to 2 days, `1h` up to 90, else `1d`."),
        ])
        .gives(200, "Rows"),
    Operation::new("post", "/api/v1/workspaces/{ws}/query", "query", "Read-only SQL over streams and metrics (`FROM market.trades`, `FROM metrics.NAME` or `FROM NAME`). Rows are arrays in the order of `columns`; what has no form in JSON, such as NaN or a time beyond every calendar, is null, and CSV holds lists, maps and structs as JSON.").needs(Permission::QueryRun)
        .refuses(&[406])
        .takes("Query")
        .gives_as(200, TABLES, "Table"),
    Operation::new("get", "/api/v1/workspaces/{ws}/alert-rules", "alerts", "Alert rules. `failure` says why the condition of one could not be computed over `failed_rows` rows, which are left out; 0 where the rule cannot run at all.").needs(Permission::AlertRead).gives(200, "AlertRules"),
    Operation::new("post", "/api/v1/workspaces/{ws}/alert-rules", "alerts", "A new alert rule. `severity` is a word such as `info`, `warning` (unless said) or `critical`: `[a-z][a-z0-9_]{0,31}`.").needs(Permission::AlertDefine)
        .takes("AlertRule")
        .gives(201, "AlertRule"),
    Operation::new("put", "/api/v1/workspaces/{ws}/alert-rules/{rule}", "alerts", "Defines an alert rule, or defines it anew.").needs(Permission::AlertDefine)
        .takes("AlertRule")
        .gives(200, "AlertRule"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/alert-rules/{rule}", "alerts", "Removes an alert rule.").needs(Permission::AlertDefine),
    Operation::new("post", "/api/v1/workspaces/{ws}/backtest", "alerts", "Which alerts a rule would have raised over the events still kept; nothing changes.")
        .needs(Permission::AlertRead)
        .takes("NewBacktest")
        .gives(200, "Backtest"),
    Operation::new("get", "/api/v1/workspaces/{ws}/alerts", "alerts", "Firings, the last first.").needs(Permission::AlertRead)
        .query(&[("state", "`firing` or `resolved`."), LIMIT, BEFORE])
        .gives(200, "Alerts"),
    Operation::new("post", "/api/v1/workspaces/{ws}/alerts/{alert}/ack", "alerts", "Notes that somebody has seen the alert; the first one stands.").needs(Permission::AlertRespond)
        .gives(200, "Alert"),
    Operation::new("get", "/api/v1/workspaces/{ws}/silences", "alerts", "Silences, past ones too.").needs(Permission::AlertRead).gives(200, "Silences"),
    Operation::new("post", "/api/v1/workspaces/{ws}/silences", "alerts", "Alerts with these labels notify nobody for a time.").needs(Permission::AlertRespond)
        .takes("NewSilence")
        .gives(201, "Silence"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/silences/{silence}", "alerts", "Ends and removes a silence.").needs(Permission::AlertRespond),
    Operation::new("get", "/api/v1/workspaces/{ws}/webhooks", "webhooks", "Webhooks, without their secrets.").needs(Permission::AlertDefine)
        .gives(200, "Webhooks"),
    Operation::new("post", "/api/v1/workspaces/{ws}/webhooks", "webhooks", "A new webhook. It is told of alerts by POST as Standard Webhooks says: headers `webhook-id` (also as `idempotency-key`: the same whenever a message comes again), `webhook-timestamp` and `webhook-signature`; body `{type, timestamp, data: {alert}}`. Any status from 200 to 299 within `webhooks.timeout_ms` is taken as received; else it is tried again for `webhooks.retry_hours`, not sooner than `Retry-After` says; 410 disables the webhook. Redirects are not followed. `secret` is in this answer and nowhere else.")
        .needs(Permission::AlertDefine)
        .takes("NewWebhook")
        .gives(201, "Webhook"),
    Operation::new("get", "/api/v1/workspaces/{ws}/webhooks/{webhook}", "webhooks", "One webhook.").needs(Permission::AlertDefine)
        .gives(200, "Webhook"),
    Operation::new("patch", "/api/v1/workspaces/{ws}/webhooks/{webhook}", "webhooks", "Changes what is given; `secret` without an overlap. What waits for a webhook that is disabled fails.").needs(Permission::AlertDefine)
        .takes("WebhookChanges")
        .gives(200, "Webhook"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/webhooks/{webhook}", "webhooks", "Removes a webhook and its deliveries.").needs(Permission::AlertDefine),
    Operation::new("post", "/api/v1/workspaces/{ws}/webhooks/{webhook}/secret", "webhooks", "Another secret, `secret` or one that is made and shown in this answer and nowhere else. Until `previous_secret_until` the one of before signs too: `webhook-signature` then holds two signatures with a space between, and a receiver by Standard Webhooks takes a message if either is good. `overlap` is 24 hours unless said and 30 days at most; `0s` ends the old secret at once, as for one that leaked. A second rotation within the overlap ends the oldest.").needs(Permission::AlertDefine)
        .takes("SecretRotation")
        .gives(200, "Webhook"),
    Operation::new("get", "/api/v1/workspaces/{ws}/webhooks/{webhook}/deliveries", "webhooks", "What was on its way to a webhook, the newest first; `state` is `pending`, `delivered` or `failed`.").needs(Permission::AlertDefine)
        .query(&[LIMIT, BEFORE])
        .gives(200, "Deliveries"),
    Operation::new("post", "/api/v1/workspaces/{ws}/webhooks/{webhook}/test", "webhooks", "Sends `webhook.test` the same way as alerts are sent.").needs(Permission::AlertDefine)
        .gives(202, "Delivery"),
    Operation::new("get", "/api/v1/workspaces/{ws}/portfolios", "portfolios", "Portfolios.").needs(Permission::PortfolioRead).gives(200, "Portfolios"),
    Operation::new("post", "/api/v1/workspaces/{ws}/portfolios", "portfolios", "A new portfolio.").needs(Permission::PortfolioUpdate)
        .takes("NewPortfolio")
        .gives(201, "Portfolio"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/portfolios/{pf}", "portfolios", "Deletes a portfolio with its positions.").needs(Permission::PortfolioUpdate),
    Operation::new("get", "/api/v1/workspaces/{ws}/portfolios/{pf}/positions", "portfolios", "Positions.").needs(Permission::PortfolioRead).gives(200, "Positions"),
    Operation::new("put", "/api/v1/workspaces/{ws}/portfolios/{pf}/positions", "portfolios", "Replaces all positions.").needs(Permission::PortfolioUpdate)
        .takes("Positions")
        .gives(200, "PositionCount"),
    Operation::new("post", "/api/v1/workspaces/{ws}/portfolios/{pf}/positions", "portfolios", "Adds positions, or replaces those in the same symbols.").needs(Permission::PortfolioUpdate)
        .takes("Positions")
        .gives(200, "PositionCount"),
    Operation::new("delete", "/api/v1/workspaces/{ws}/portfolios/{pf}/positions/{symbol}", "portfolios", "Removes a position.").needs(Permission::PortfolioUpdate),
    Operation::new("get", "/api/v1/workspaces/{ws}/portfolios/{pf}/summary", "portfolios", "Value, profit and allocation of the positions that have a price, at the last one by event time of `market.trades`, `market.quotes` (the middle of bid and ask) and `market.bars` (close). `unrealised_pct` is 100 · (value − cost) / |cost|; `unpriced` are the symbols left out. Without `portfolio:read` for it neither `positions` nor `unpriced` nor the allocation by symbol.").needs(Permission::FundPerformanceRead).gives(200, "Summary"),
    Operation::new("get", "/api/v1/workspaces/{ws}/agents", "agents", "Agents that can be asked.").needs(Permission::AiUse).gives(200, "Object"),
    Operation::new("get", "/api/v1/workspaces/{ws}/agents/{agent}/capabilities", "agents", "What an agent can do, as AG-UI says it.").needs(Permission::AiUse).gives(200, "Object"),
    Operation::new("post", "/api/v1/workspaces/{ws}/agents/{agent}/run", "agents", "Runs an agent: AG-UI `RunAgentInput` in, AG-UI events out. A known run is attached to.").needs(Permission::AiUse)
        .takes("RunAgentInput")
        .gives_as(200, RUNS, "Text"),
    Operation::new("get", "/api/v1/workspaces/{ws}/runs/{run}/events", "agents", "Events of a run from behind `Last-Event-ID`, then live.").needs(Permission::AiUse).gives_as(200, RUNS, "Text"),
    Operation::new("post", "/api/v1/workspaces/{ws}/runs/{run}/cancel", "agents", "Stops a run. One that somebody else started takes the permission `ai:admin`.").needs(Permission::AiUse)
        .gives(202, "Cancelled"),
    Operation::new("get", "/api/v1/workspaces/{ws}/threads", "agents", "Conversations, the last used first.").needs(Permission::AiUse).query(&[LIMIT, BEFORE]).gives(200, "Object"),
    Operation::new("get", "/api/v1/workspaces/{ws}/threads/{thread}/messages", "agents", "Messages of a conversation.").needs(Permission::AiUse).query(&[LIMIT, BEFORE]).gives(200, "Object"),
    Operation::new("get", "/api/v1/workspaces/{ws}/events", "live", "Channels as server-sent events: the messages of the WebSocket, each with an `id` to come back with as `Last-Event-ID`. Each channel needs the permission to read what it tells of; where that is withdrawn, or the workspace deleted, a message `{type: \"error\", workspace, channel, code, detail}` says so and is the last.")
        .query(&[("channel", "A channel, `metrics/vwap_1m?symbol=A`, URL-encoded; once for each. A filter is a value of its column's type: `value=10` keeps 10.0."), ("rate", "Least time between two messages of a state, `250ms`."), ("sql", "The query of a `query/…` channel."), ("protocolVersion", "The AG-UI version in which a `thread/…` channel is written, `1.0`; without one 0.0.59.")])
        .refuses(&[413])
        .gives_as(200, RUNS, "Text"),
    Operation::new("get", "/api/v1/ws", "live", "The WebSocket: a token in the header, as subprotocol `bearer.TOKEN` or in a first message `auth`, then `subscribe`, `unsubscribe`, `publish`, `run`, `cancel` and `ping`. Subprotocols `tidewatch.v1` (JSON) and `tidewatch.v1.msgpack`.")
        .refuses(&[403, 426])
        .gives_nothing(101),
    Operation::new("get", "/api/v1/system/actors", "system", "Supervision tree, mailboxes and restarts. Admins only.").gives(200, "Actors"),
    Operation::new("get", "/api/v1/system/throughput", "system", "Live rates. Admins only.").gives(200, "Throughput"),
];

/// A schema in short: `name` required, `name?` optional, and a type: a word, a schema's name, or either with `[]`.
/// `null` after a type allows null.
const SCHEMAS: &[(&str, &str)] = &[
    ("Health", "status string"),
    ("Ready", "status string, parts Part[]"),
    ("Part", "name string, ok boolean, detail string"),
    ("Login", "email string, password string, otp? string"),
    ("Refresh", "refresh_token string"),
    ("Logout", "refresh_token? string, everywhere? boolean"),
    ("Issuers", "issuers string[]"),
    ("Fetch", "code string"),
    ("PasswordChange", "password string, new_password string"),
    ("Factor", "password string, code? string"),
    ("Code", "otp string"),
    ("TotpSecret", "secret string, url string"),
    ("Permission", "name string, allows string"),
    ("Role", "name string, permissions string[]"),
    ("Permissions", "permissions Permission[], roles Role[]"),
    ("NewGrant", "email string, scope string"),
    ("Grant", "user string, email string, scope string, created_by string, created_at time"),
    ("Grants", "grants Grant[]"),
    (
        "Usage",
        "tier string, requests Quota null, agent_runs Quota null, events Object, metrics Object, streams Object, connections Object, retention Object",
    ),
    ("Quota", "limit integer, remaining integer, reset_seconds integer"),
    ("Tokens", "access_token string, refresh_token string, token_type string, expires_in integer"),
    ("Membership", "id string, name string, role string, tier string, permissions string[], invited boolean"),
    ("Me", "user Object, workspaces Membership[]"),
    ("NewUser", "email string, password string, admin? boolean"),
    ("User", "id string, email string, admin boolean, created_at time"),
    ("Users", "users User[]"),
    (
        "Pack",
        "name string, title string, description string, streams string[], metrics string[], alert_rules string[], dashboard string[]",
    ),
    ("Packs", "packs Pack[]"),
    ("NewWorkspace", "id string, name? string, pack? string, tier? string"),
    ("WorkspaceChanges", "name? string, tier? string"),
    (
        "Workspace",
        "id string, name string, role string, tier string, pack? string null, created_at? time, permissions? string[]",
    ),
    ("Workspaces", "workspaces Workspace[], next? string"),
    ("Assignment", "email string, role string"),
    ("Member", "user string, email string, role string, since time, invited boolean"),
    ("Members", "members Member[]"),
    ("NewKey", "name string, role string, scopes? string[], expires_at? time"),
    (
        "Key",
        "id string, key? string, name string, role string, scopes string[] null, prefix string, created_by string, created_at time, expires_at time null, revoked_at time null",
    ),
    ("Keys", "keys Key[]"),
    (
        "AuditEntry",
        "at time, actor string, action string, target string, outcome string, from string, request_id string",
    ),
    ("Audit", "entries AuditEntry[], next? string"),
    ("Column", "name string, type string, nullable? boolean"),
    ("StreamDefinition", "columns Column[], unknown_fields? string"),
    (
        "Stream",
        "name string, columns Column[], unknown_fields string, frontier time null, late integer, events integer",
    ),
    ("Streams", "streams Stream[]"),
    ("ReferenceTableDefinition", "columns Column[], primary_key string[]"),
    (
        "ReferenceTable",
        "name string, columns Column[], primary_key string[], rows integer, versions integer, bytes integer",
    ),
    ("ReferenceTables", "tables ReferenceTable[]"),
    ("ReferenceRows", "rows array, next? string"),
    ("DeadLetter", "stream string, at time, code string, detail string, payload string"),
    ("DeadLetters", "dead_letters DeadLetter[], next? string"),
    ("IngestError", "index integer, code string, detail string"),
    ("Ingested", "accepted integer, duplicates integer, rejected integer, errors IngestError[], offset integer null"),
    (
        "MetricDefinition",
        "sql string, emit? string, retain? string, max_delay? string, allowed_lateness? string, backfill? string",
    ),
    (
        "Metric",
        "name string, sql string, stream? string, joins? string[], keys string[], values Column[], window Object, emit? string, retain? string, max_delay? string, allowed_lateness? string, backfill? string, state Object, failure? string, failure_code? string",
    ),
    (
        "MetricPlan",
        "metric string, reads string[], read_by string[], window Object, panes Object null, state Object, shared Object, workspace Object, cost Object",
    ),
    ("Metrics", "metrics Metric[]"),
    ("Row", "window_start time, window_end time, final boolean, revision integer"),
    ("Rows", "rows Row[], next? string"),
    ("Query", "sql string, params? array, timeout_ms? integer"),
    ("Table", "columns Column[], rows array"),
    ("AlertRule", "name? string, metric string, condition string, for? string, severity? string"),
    (
        "RunningAlertRule",
        "name string, metric string, condition string, for string, severity string, failure? string, failed_rows? integer",
    ),
    ("AlertRules", "rules RunningAlertRule[]"),
    (
        "Alert",
        "id string, rule string, metric string, severity string, labels Object, state string, row Object, started_at time, fired_at time, resolved_at time null, acked_at time null, acked_by string null, silenced? boolean, silenced_by? string null",
    ),
    ("Alerts", "alerts Alert[], next? string"),
    ("NewBacktest", "rule AlertRule, from time, to time"),
    (
        "BacktestAlert",
        "labels Object, severity string, started_at time, fired_at time, resolved_at time null, row Object",
    ),
    (
        "Backtest",
        "metric string, alerts BacktestAlert[], events integer, first_event time null, last_event time null, failure? string, failed_rows? integer",
    ),
    ("NewSilence", "matchers Object, starts_at? time, ends_at? time, duration? string, comment? string"),
    ("Silence", "id string, matchers Object, starts_at time, ends_at time, comment string, created_by string"),
    ("Silences", "silences Silence[]"),
    ("NewWebhook", "url string, events? string[], severities? string[], secret? string"),
    ("WebhookChanges", "url? string, events? string[], severities? string[] null, secret? string, enabled? boolean"),
    (
        "Webhook",
        "id string, url string, events string[], severities string[] null, enabled boolean, disabled_reason string null, previous_secret_until time null, created_at time, updated_at time, secret? string",
    ),
    ("SecretRotation", "secret? string, overlap? string"),
    ("Webhooks", "webhooks Webhook[]"),
    (
        "Delivery",
        "id string, event string, alert string null, state string, attempts integer, created_at time, last_attempt_at time null, last_status integer null, last_error string null, next_attempt_at time null",
    ),
    ("Deliveries", "deliveries Delivery[], next? string"),
    ("NewPortfolio", "id string, name? string, currency? string"),
    ("Portfolio", "id string, name string, currency string"),
    ("Portfolios", "portfolios Portfolio[]"),
    ("Cancelled", "runId string"),
    ("Position", "symbol string, qty number, cost number, sector? string null"),
    ("Positions", "positions Position[]"),
    ("PositionCount", "positions integer"),
    (
        "Summary",
        "id string, name string, currency string, value number, cost number, unrealised number, unrealised_pct number null, as_of time null, positions? array, allocation Object, unpriced? string[], unpriced_count integer",
    ),
    (
        "RunAgentInput",
        "threadId string, runId string, messages array, tools? array, context? array, state? any, forwardedProps? any",
    ),
    (
        "Actor",
        "path string, kind string, state string, mailbox_batches integer, mailbox_bytes integer, restarts integer, last_failure string null, state_bytes integer, batches_per_second number",
    ),
    ("Actors", "actors Actor[]"),
    (
        "Throughput",
        "events_per_second number, batches_per_second number, bytes_per_second number, events_total integer, workspaces array",
    ),
    ("ProblemItem", "index? integer, pointer? string, code string, detail string"),
    (
        "Problem",
        "type string, title string, status integer, detail string, code string, errors? ProblemItem[], line? integer, column? integer, runId? string",
    ),
];

/// A body of each kind, or an answer that is better seen; a body is good as it stands where what it names exists.
fn example(schema: &str) -> Option<Value> {
    const SQL: &str = "SELECT symbol, sum(price * qty) / sum(qty) AS vwap FROM market.trades \
        GROUP BY symbol, tumble(ts, INTERVAL '1 minute')";
    let position = json!({"symbol": "AAPL", "qty": 10, "cost": 150.5, "sector": "Technology"});
    Some(match schema {
        "Login" => json!({"email": "ada@example.com", "password": "correct horse battery"}),
        "Fetch" => json!({"code": "…"}),
        "Refresh" => json!({"refresh_token": "…"}),
        "Logout" => json!({"everywhere": false}),
        "PasswordChange" => json!({"password": "correct horse", "new_password": "correct horse battery"}),
        "Factor" => json!({"password": "correct horse battery", "code": "123456"}),
        "Code" => json!({"otp": "123456"}),
        "NewUser" => json!({"email": "ada@example.com", "password": "correct horse battery", "admin": false}),
        "NewWorkspace" => json!({"id": "acme", "name": "Acme"}),
        "WorkspaceChanges" => json!({"name": "Acme Capital"}),
        "Assignment" => json!({"email": "ada@example.com", "role": "analyst"}),
        "NewGrant" => json!({"email": "ada@example.com", "scope": "portfolio:read@portfolio/main"}),
        "NewKey" => json!({"name": "collector", "role": "member", "scopes": ["stream:ingest"]}),
        "StreamDefinition" => {
            json!({"columns": [{"name": "order_id", "type": "utf8", "nullable": false}], "unknown_fields": "keep"})
        }
        "ReferenceTableDefinition" => json!({
            "columns": [{"name": "symbol", "type": "utf8"}, {"name": "region", "type": "utf8"}], "primary_key": ["symbol"],
        }),
        "ReferenceTableChanges" => json!([{"symbol": "AAPL", "region": "US"}]),
        "Events" => json!([{"id": "t-1", "symbol": "AAPL", "price": 187.5, "qty": 2}]),
        "DeadLetters" => json!({"dead_letters": [{
            "stream": "market.trades", "at": "2026-01-31T12:00:00.000000Z", "code": "missing_column",
            "detail": "column `qty` (float64) is required", "payload": "{\"symbol\":\"AAPL\",\"price\":187.5}",
        }]}),
        "MetricDefinition" => json!({"sql": SQL, "emit": "250ms"}),
        "Query" => json!({"sql": "SELECT symbol, count(*) AS n FROM market.trades GROUP BY symbol"}),
        "AlertRule" => json!({"name": "dear", "metric": "vwap_1m", "condition": "vwap > 200", "for": "1m"}),
        "NewBacktest" => json!({
            "rule": {"metric": "vwap_1m", "condition": "vwap > 200"},
            "from": "2026-01-01T00:00:00Z", "to": "2026-01-02T00:00:00Z",
        }),
        "NewSilence" => json!({"matchers": {"symbol": "AAPL"}, "duration": "1h", "comment": "split day"}),
        "NewWebhook" => json!({
            "url": "https://hooks.example.com/tidewatch", "events": ["alert.firing", "alert.resolved"],
            "severities": ["critical"],
        }),
        "SecretRotation" => json!({"overlap": "24h"}),
        "WebhookChanges" => json!({"events": ["alert.firing"], "enabled": true}),
        "NewPortfolio" => json!({"id": "main", "name": "Main", "currency": "USD"}),
        "Positions" => json!({"positions": [position]}),
        "RunAgentInput" => json!({
            "threadId": "t-1", "runId": "r-1", "tools": [], "context": [], "state": {}, "forwardedProps": {},
            "messages": [{"id": "m-1", "role": "user", "content": "How does the market stand?"}],
        }),
        _ => return None,
    })
}

static DOCUMENT: LazyLock<Value> = LazyLock::new(document);

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

/// The JSON Schema of a type in [`SCHEMAS`].
fn type_schema(word: &str) -> Value {
    if let Some(items) = word.strip_suffix("[]") {
        return json!({"type": "array", "items": type_schema(items)});
    }
    match word {
        "string" | "integer" | "number" | "boolean" => json!({"type": word}),
        "array" => json!({"type": "array", "items": {}}),
        "time" => json!({"type": "string", "format": "date-time"}),
        "any" => json!({}),
        name => reference(name),
    }
}

fn object_schema(members: &str) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for member in members.split(", ") {
        let mut words = member.split(' ');
        let (name, kind) = (words.next().unwrap_or_default(), words.next().unwrap_or("any"));
        let mut schema = type_schema(kind);
        if words.next() == Some("null") {
            schema = json!({"anyOf": [schema, {"type": "null"}]});
        }
        match name.strip_suffix('?') {
            Some(name) => _ = properties.insert(name.to_owned(), schema),
            None => {
                required.push(name);
                properties.insert(name.to_owned(), schema);
            }
        }
    }
    json!({"type": "object", "properties": properties, "required": required})
}

fn content(types: &[&str], schema: &str) -> Value {
    let of = |kind: &str| if kind.contains("json") { reference(schema) } else { json!({"type": "string"}) };
    let media = |kind: &&str| {
        let mut media = json!({"schema": of(kind)});
        if let Some(example) = example(schema).filter(|_| *kind == "application/json") {
            media["example"] = example;
        }
        ((*kind).to_owned(), media)
    };
    Value::Object(types.iter().map(media).collect())
}

/// What a parameter may be.
fn parameter_schema(name: &str) -> Value {
    match name {
        "ws" => json!({"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$"}),
        "limit" => json!({"type": "integer", "minimum": 1, "maximum": 10_000, "default": 100}),
        "final" => json!({"type": "boolean"}),
        "from" | "to" => json!({"type": "string", "format": "date-time"}),
        "ts_unit" => json!({"type": "string", "enum": ["s", "ms", "us", "ns"]}),
        _ => json!({"type": "string"}),
    }
}

/// An instance of a parameter, for whoever tries the call.
fn parameter_example(name: &str) -> Option<&'static str> {
    Some(match name {
        "ws" => "acme",
        "stream" => "market.trades",
        "metric" => "vwap_1m",
        "pf" => "main",
        "symbol" => "AAPL",
        "rule" => "dear",
        "agent" => "analyst",
        "email" => "ada@example.com",
        "scope" => "portfolio:read@portfolio/main",
        _ => return None,
    })
}

fn parameter(name: &str, place: &str, meaning: Option<&str>, required: bool) -> Value {
    let mut parameter = json!({"name": name, "in": place, "required": required, "schema": parameter_schema(name)});
    if let Some(meaning) = meaning {
        parameter["description"] = meaning.into();
    }
    if let Some(example) = parameter_example(name) {
        parameter["example"] = example.into();
    }
    parameter
}

/// Why calls are refused, and the codes that say which reason it is.
const REFUSALS: &[(u16, &str, &[&str])] = &[
    (
        400,
        "What was sent cannot be read or cannot be meant.",
        &[
            "bad_request",
            "bad_json",
            "bad_body",
            "bad_parameter",
            "bad_name",
            "bad_path",
            "bad_host",
            "bad_cursor",
            "bad_sql",
            "bad_schema",
            "bad_definition",
            "bad_handshake",
            "bad_input",
            "bad_encoding",
            "bad_email",
            "bad_password",
            "bad_otp",
            "bad_position",
            "bad_filter",
            "bad_webhook",
            "bad_id",
            "empty_body",
            "unreadable_body",
            "unknown_parameter",
            "unknown_role",
            "scope_beyond_role",
            "unknown_scope",
            "unknown_tier",
            "unknown_pack",
            "unsupported",
            "unencodable",
            "backfill_too_long",
            "metric_failed",
            "state_limit",
            "too_many_alerts",
            "workspace_missing",
            "query_timeout",
            "query_memory",
            "query_failed",
            "too_many_rows",
            "unwritable_answer",
            "limit_reached",
        ],
    ),
    (401, "Nobody knows who asks.", &["unauthorized", "bad_credentials", "otp_required", "bad_otp", "sign_in_refused"]),
    (
        403,
        "Who asks may not.",
        &[
            "forbidden",
            "tier_not_allowed",
            "origin_not_allowed",
            "bad_credentials",
            "otp_required",
            "bad_otp",
            "unknown_user",
        ],
    ),
    (
        404,
        "It is not there, or it is not yours: the answer is the same.",
        &[
            "not_found",
            "workspace_not_found",
            "unknown_channel",
            "unknown_stream",
            "unknown_metric",
            "unknown_table",
            "unknown_alert",
            "unknown_alert_rule",
            "unknown_silence",
            "unknown_webhook",
            "unknown_portfolio",
            "unknown_position",
            "unknown_agent",
            "unknown_run",
            "unknown_thread",
            "unknown_member",
            "unknown_key",
            "unknown_grant",
            "unknown_issuer",
            "not_enrolled",
        ],
    ),
    (406, "None of the content types that are accepted can be given.", &["not_acceptable"]),
    (408, "It took too long, or its body did.", &["timeout", "body_timeout"]),
    (
        409,
        "It contradicts what is there.",
        &[
            "exists",
            "workspace_exists",
            "user_exists",
            "last_owner",
            "limit_reached",
            "built_in_stream",
            "built_in_table",
            "reserved_stream",
            "engine_stream",
            "incompatible_schema",
            "column_in_use",
            "table_in_use",
            "metric_in_use",
            "metric_cycle",
            "metric_changed",
            "webhook_disabled",
            "run_id_taken",
            "thread_busy",
            "not_enrolled",
        ],
    ),
    (413, "Too much at a time.", &["body_too_large", "batch_too_large", "state_too_large"]),
    (415, "A content type or encoding that is not read.", &["unsupported_media_type"]),
    (426, "This is a WebSocket.", &["upgrade_required"]),
    (
        429,
        "Too often: `Retry-After` says when to come again.",
        &[
            "quota_exceeded",
            "ingest_rate",
            "too_many_sign_ins",
            "too_many_queries",
            "too_many_live_queries",
            "too_many_connections",
            "thread_queue_full",
        ],
    ),
    (502, "Who is asked for it does not answer as it should.", &["issuer_failed", "core_unreachable"]),
    (
        503,
        "Too much is going on: `Retry-After` says when to come again.",
        &[
            "busy",
            "backpressure",
            "queries_busy",
            "too_many_sessions",
            "not_ready",
            "store_damaged",
            "store_unavailable",
            "log_unavailable",
            "log_full",
            "dedup_unavailable",
            "workspace_restarting",
            "shutting_down",
        ],
    ),
];

/// What any path may be refused with: its status and codes.
const ANYWHERE: &[(u16, &[&str])] = &[
    (405, &["method_not_allowed"]),
    (500, &["internal", "store_unavailable", "log_behind_store"]),
    (502, &["core_unreachable"]),
    (504, &["core_unreachable"]),
    (508, &["circle_of_nodes"]),
];

/// Codes of errors on a WebSocket that no call answers with.
const SOCKET_ERRORS: &[(&str, &str)] = &[
    ("bad_frame", "The message is no JSON object, or on a MessagePack connection no MessagePack."),
    ("bad_request", "A member is missing, or cannot be meant so."),
    ("unknown_type", "There is no message of this `type`."),
    ("unknown_channel", "There is no channel of this name."),
    ("bad_filter", "The channel takes no such filter."),
    ("not_subscribed", "There is nothing to `unsubscribe` from."),
    ("too_many_subscriptions", "The connection has `limits.subscriptions`, or 8 live queries; end some."),
    ("queue_full", "Of the sockets of chats: too many runs wait already."),
    ("slow_consumer", "Of server-sent events, in place of 4008."),
];

/// Codes with which the server closes a WebSocket.
const SOCKET_CLOSES: &[(u16, &str)] = &[
    (1000, "The client has closed it."),
    (1002, "The bytes are no WebSocket's."),
    (1007, "A text is not in UTF-8, or cannot be decompressed."),
    (1009, "A message is larger than `limits.frame_bytes`."),
    (1012, "The server restarts: come back."),
    (1013, "There are too many connections, or the node with the engine is away: come back later."),
    (4001, "Nobody has signed in within 5 s, or the sign-in has ended."),
    (4002, "The token has expired."),
    (4003, "The client may have nothing of it, or not any more."),
    (4008, "The client reads too slowly: come back with `since`."),
];

/// What a WebSocket says besides what is asked of it.
fn socket() -> String {
    let mut text =
        "Errors are messages `{type: \"error\", ref, code, detail}` with the codes of the HTTP API and these:\n\n\
        | code | means |\n| --- | --- |\n"
            .to_owned();
    // writing to a String cannot fail
    SOCKET_ERRORS.iter().for_each(|(code, means)| _ = writeln!(text, "| `{code}` | {means} |"));
    text.push_str("\nThe server closes with\n\n| code | since |\n| --- | --- |\n");
    SOCKET_CLOSES.iter().for_each(|(code, since)| _ = writeln!(text, "| {code} | {since} |"));
    text + "\n`metric.failed` and `query.failed` are events (`CUSTOM`, value `{code, …}`): the metric stopped, the live \
            query could not be asked this time and is tried again."
}

/// The statuses an operation may refuse with.
fn refusals(operation: &Operation) -> impl Iterator<Item = u16> {
    let (is_open, in_workspace) = (operation.is_open(), operation.path.contains("{ws}"));
    let (takes, signs_in) = (operation.body.is_some(), operation.path.contains("/auth/"));
    let is_api = operation.path.starts_with("/api/");
    let more = operation.refuses;
    let by_kind = move |status: &u16| match status {
        401 => !is_open || signs_in,
        403 => !is_open,
        404 => in_workspace,
        // an invitation that cannot be accepted, whatever was asked
        409 => takes || in_workspace,
        413 | 415 => takes,
        406 | 426 | 502 => false,
        _ => is_api,
    };
    REFUSALS.iter().map(|(status, ..)| *status).filter(move |status| by_kind(status) || more.contains(status))
}

fn operation(operation: &Operation) -> Value {
    let in_path = operation.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let mut parameters: Vec<Value> = in_path.map(|name| parameter(name, "path", None, true)).collect();
    let is_needed = operation.path.ends_with("/grants");
    parameters
        .extend((operation.query.iter()).map(|(name, meaning)| parameter(name, "query", Some(meaning), is_needed)));
    let mut success = json!({"description": "Done."});
    if let Some((types, schema)) = operation.answer {
        success["content"] = content(types, schema);
    }
    let mut responses = Map::new();
    responses.insert(operation.status.to_string(), success);
    for status in refusals(operation) {
        responses.insert(status.to_string(), json!({"$ref": format!("#/components/responses/{status}")}));
    }
    responses.insert("default".to_owned(), json!({"$ref": "#/components/responses/Problem"}));
    let id: String = format!("{} {}", operation.method, operation.path.trim_start_matches("/api/v1"))
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    let summary = match operation.needs {
        Some(permission) => format!("{} Permission `{permission}`.", operation.summary),
        None => operation.summary.to_owned(),
    };
    let mut shown = json!({
        "tags": [operation.tag], "summary": summary, "operationId": id.replace("__", "_").trim_matches('_'),
        "parameters": parameters, "responses": responses,
    });
    if let Some((types, schema)) = operation.body {
        shown["requestBody"] = json!({"required": schema != "Logout", "content": content(types, schema)});
    }
    if operation.path == "/api/v1/ws" {
        shown["description"] = socket().into();
    }
    if let Some(permission) = operation.needs {
        shown["x-permission"] = permission.as_str().into();
    }
    if operation.is_open() {
        shown["security"] = json!([]);
    }
    shown
}

fn document() -> Value {
    let mut paths = Map::new();
    for described in OPERATIONS {
        let path = paths.entry(described.path).or_insert_with(|| json!({}));
        path[described.method] = operation(described);
    }
    let mut schemas: Map<String, Value> =
        SCHEMAS.iter().map(|(name, members)| ((*name).to_owned(), object_schema(members))).collect();
    schemas.insert("Object".to_owned(), json!({"type": "object"}));
    schemas.insert("Text".to_owned(), json!({"type": "string"}));
    let events = json!({"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]});
    schemas.insert("ReferenceTableChanges".to_owned(), events.clone());
    schemas.insert("Events".to_owned(), events);
    let problem = content(&["application/problem+json"], "Problem");
    let header = |meaning: &str| json!({"description": meaning, "schema": {"type": "integer"}});
    let mut refused: Map<String, Value> = Map::new();
    for (status, meaning, codes) in REFUSALS {
        let list: Vec<String> = codes.iter().map(|code| format!("`{code}`")).collect();
        let mut response = json!({"description": format!("{meaning} Codes: {}.", list.join(", ")), "content": problem});
        response["content"]["application/problem+json"]["example"] = json!({
            "type": "about:blank", "title": StatusCode::from_u16(*status).ok().and_then(|s| s.canonical_reason()),
            "status": status, "detail": "what is wrong, and what to do", "code": codes[0],
        });
        if matches!(status, 429 | 503) {
            response["headers"] = json!({"Retry-After": header("Seconds to wait.")});
        }
        refused.insert(status.to_string(), response);
    }
    let anywhere: Vec<String> =
        ANYWHERE.iter().map(|(status, codes)| format!("{status} `{}`", codes.join("`, `"))).collect();
    let meaning = format!("Refused. Wherever one asks: {}.", anywhere.join("; "));
    refused.insert("Problem".to_owned(), json!({"description": meaning, "content": problem}));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tidewatch", "version": env!("CARGO_PKG_VERSION"),
            "description": "Events in, live metrics, alerts, portfolios and chat out. Errors are RFC 9457 problem documents \
                with a stable `code`; every answer carries `x-request-id`, and one that a quota counts carries \
                `RateLimit-Limit`, `RateLimit-Remaining` and `RateLimit-Reset`. Live updates come over the WebSocket at \
                `/api/v1/ws`, as JSON or (subprotocol `tidewatch.v1.msgpack`) MessagePack, or as server-sent events.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An access token or an API key."},
            },
            "responses": refused,
            "schemas": schemas,
        },
    })
}

/// Swagger UI where this build has it, else a page without scripts. Neither loads anything from elsewhere.
async fn docs() -> impl IntoResponse {
    static PLAIN: LazyLock<String> = LazyLock::new(page);
    let (page, policy) = match console::has("swagger/swagger-ui-bundle.js") {
        true => (
            SWAGGER,
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
             connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
        false => {
            (PLAIN.as_str(), "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'")
        }
    };
    ([(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy))], Html(page))
}

const SWAGGER: &str = "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
    content=\"width=device-width\"><title>Tidewatch API</title><link rel=\"stylesheet\" \
    href=\"/swagger/swagger-ui.css\"><div id=\"docs\"></div><script src=\"/swagger/swagger-ui-bundle.js\"></script>\
    <script src=\"/docs.js\"></script>";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Text with `code` in backticks.
fn rich(text: &str) -> String {
    let parts = text.split('`').enumerate();
    parts
        .map(|(at, part)| if at % 2 == 1 { format!("<code>{}</code>", escaped(part)) } else { escaped(part) })
        .collect()
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
    color-scheme:light dark}code{font-size:.92em}h2{margin-top:2.5rem;text-transform:capitalize}\
    section{border-top:1px solid #8884;padding:.6rem 0}h3{margin:0;font-size:1rem}b{display:inline-block;\
    min-width:4rem}table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}p{margin:.3rem 0}";

fn page() -> String {
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>Tidewatch API</title><style>{STYLE}</style><h1>Tidewatch API</h1>\
         <p>The same for programs: <a href=\"/openapi.json\">openapi.json</a>. Send <code>authorization: Bearer \
         TOKEN</code>, an access token or an API key. Errors are <code>application/problem+json</code> with a stable \
         <code>code</code>. Live updates: WebSocket <code>/api/v1/ws</code>."
    );
    let mut tag = "";
    for operation in OPERATIONS {
        if operation.tag != tag {
            tag = operation.tag;
            _ = write!(page, "<h2>{tag}</h2>"); // writing to a String cannot fail
        }
        let (method, path) = (operation.method.to_uppercase(), escaped(operation.path));
        _ = write!(page, "<section><h3><b>{method}</b> <code>{path}</code></h3><p>{}", rich(operation.summary));
        if let Some(permission) = operation.needs {
            _ = write!(page, " Permission <code>{permission}</code>.");
        }
        page.push_str("</p>");
        let members = |name: &str| SCHEMAS.iter().find(|(known, _)| *known == name).map(|(_, members)| *members);
        let mut rows: Vec<(String, String)> =
            operation.query.iter().map(|(name, meaning)| (format!("?{name}"), rich(meaning))).collect();
        if let Some((types, schema)) = operation.body {
            let shape = members(schema).map_or(schema.to_owned(), |members| format!("{{{members}}}"));
            rows.push((types.join(", "), format!("takes <code>{}</code>", escaped(&shape))));
        }
        if let Some((types, schema)) = operation.answer {
            let shape = members(schema).map_or(schema.to_owned(), |members| format!("{{{members}}}"));
            let answer = format!("gives <code>{}</code>", escaped(&shape));
            rows.push((format!("{} {}", operation.status, types.join(", ")), answer));
        }
        page.push_str("<table>");
        rows.iter().for_each(|(name, text)| _ = write!(page, "<tr><td><code>{name}</code><td>{text}"));
        page.push_str("</table></section>");
    }
    page.push_str("<h2>schemas</h2><table>");
    for (name, members) in SCHEMAS {
        _ = write!(page, "<tr><td><code>{name}</code><td><code>{{{members}}}</code>");
    }
    page + "</table>"
}

#[cfg(test)]
pub(crate) fn operations() -> impl Iterator<Item = (&'static str, &'static str)> {
    OPERATIONS.iter().map(|operation| (operation.method, operation.path))
}

/// What each operation needs, and a body that it would take.
#[cfg(test)]
pub(crate) fn needs() -> impl Iterator<Item = (&'static str, &'static str, Option<Permission>, Value)> {
    OPERATIONS.iter().map(|operation| {
        let body = operation.body.and_then(|(_, schema)| example(schema)).unwrap_or(Value::Null);
        (operation.method, operation.path, operation.needs, body)
    })
}

/// Whether a refusal of what is at this path stands in the document; of a path that is nobody's too.
#[cfg(test)]
pub(crate) fn is_told(method: &str, path: &str, status: u16, code: &str) -> bool {
    let is_here = |operation: &&Operation| {
        let (template, path) = (operation.path.split('/'), path.split('/'));
        operation.method.eq_ignore_ascii_case(method)
            && template.clone().count() == path.clone().count()
            && template.zip(path).all(|(part, given)| part.starts_with('{') || part == given)
    };
    let Some(operation) = OPERATIONS.iter().find(is_here) else { return true };
    let stands = |(of, codes): (u16, &[&str])| of == status && codes.contains(&code);
    let own = |status: u16| refusals(operation).any(|refused| refused == status);
    REFUSALS.iter().any(|(of, _, codes)| own(*of) && stands((*of, codes)))
        || ANYWHERE.iter().any(|(of, codes)| stands((*of, codes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    /// The status that the source in front of a code says; 0 where it is anybody's, nothing where it is no code.
    fn status_before(source: &str) -> Option<u16> {
        let reason = |status: u16| StatusCode::from_u16(status).ok()?.canonical_reason();
        let named = |name: &str| {
            (400..600).find(|status| reason(*status).is_some_and(|of| of.to_uppercase().replace(' ', "_") == name))
        };
        let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        let (_, last) = source.rsplit_once("StatusCode::").unwrap_or_default();
        if let Some(status) = named(&word(last))
            && [",", " => ("].contains(&&last[word(last).len()..])
        {
            return Some(status);
        }
        if source.ends_with("::invalid(") {
            Some(400)
        } else if source.ends_with("::not_found(")
            || source.rsplit_once("unknown(\"").is_some_and(|(_, of)| of.ends_with("\",") && of.len() < 20)
        {
            Some(404)
        } else if source.ends_with("conflict(") {
            Some(409)
        } else if source.ends_with(".code(") || source.ends_with("new(status,") {
            Some(0)
        } else {
            let (_, kind) = source.rsplit_once("FaultKind::")?;
            let (kind, rest) = kind.split_at(word(kind).len());
            let has_wait = rest.starts_with(" { ") && rest.ends_with(" },") && !rest.contains(['"', ';']);
            let status = match kind {
                "Invalid" => 400,
                "NotFound" => 404,
                "Conflict" => 409,
                "Limit" => 429,
                "Internal" => 500,
                _ => 503,
            };
            (rest == "," || has_wait || source.ends_with("new(kind,")).then_some(status)
        }
    }

    /// The codes of refusals in a source, without its tests, and the status of each.
    fn codes(source: &str) -> impl Iterator<Item = (u16, &str)> {
        let source = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        source.match_indices('"').filter_map(|(at, _)| {
            let (code, _) = source[at + 1..].split_once('"')?;
            let is_code = !code.is_empty() && code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            let status = if is_code { status_before(source[..at].trim_end()) } else { None };
            Some((status?, code))
        })
    }

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            match path.is_dir() {
                true if name != "tests" => sources(&path, found),
                // what tools answer goes to a model
                false if name.ends_with(".rs") && !["tests.rs", "tools.rs", "run.rs"].contains(&&*name) => {
                    found.push(path)
                }
                _ => {}
            }
        }
    }

    #[test]
    fn every_code_that_stands_in_the_sources_stands_in_the_document() {
        let gateway = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = Vec::new();
        ["src", "../actors/src"].iter().for_each(|folder| sources(&gateway.join(folder), &mut files));
        let (mut seen, mut missing) = (0, Vec::new());
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let is_socket = file.iter().any(|part| part == "socket");
            for (status, code) in codes(&text) {
                seen += 1;
                let fits = |of: u16, codes: &[&str]| (status == 0 || status == of) && codes.contains(&code);
                let is_told = REFUSALS.iter().any(|(of, _, codes)| fits(*of, codes))
                    || ANYWHERE.iter().any(|(of, codes)| fits(*of, codes))
                    || is_socket && SOCKET_ERRORS.iter().any(|(known, _)| *known == code)
                    // the one whose kind does not say its status
                    || code == "batch_too_large";
                if !is_told {
                    missing.push(format!("{} {status} {code}", file.display()));
                }
            }
        }
        assert!(seen > 190, "{seen} found: is this still how they are written?");
        assert!(missing.is_empty(), "{missing:#?}");
    }

    #[test]
    fn the_readme_tells_what_a_websocket_says() {
        let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
        let codes = SOCKET_ERRORS.iter().map(|(code, _)| format!("`{code}`"));
        let events = ["`metric.failed`", "`query.failed`"].map(str::to_owned);
        codes.chain(events).for_each(|told| assert!(readme.contains(&told), "{told}"));
        let (_, closes) = readme.split_once("| close |").unwrap();
        let (closes, _) = closes.split_once("\n\n").unwrap();
        SOCKET_CLOSES.iter().for_each(|(code, _)| assert!(closes.contains(&code.to_string()), "{code}"));
        let shown = DOCUMENT["paths"]["/api/v1/ws"]["get"]["description"].as_str().unwrap();
        assert!(shown.contains("| `bad_frame` |") && shown.contains("| 4003 |"), "{shown}");
    }

    #[test]
    fn each_operation_names_the_statuses_that_it_gives() {
        let gives = |method: &str, path: &str, status: u16, code: &str| {
            assert!(is_told(method, &format!("/api/v1/{path}"), status, code), "{method} {path} {status} {code}");
        };
        gives("DELETE", "workspaces/a/metrics/m", 409, "metric_in_use");
        gives("DELETE", "workspaces/a/tables/t", 409, "built_in_table");
        gives("DELETE", "workspaces/a/members/u", 409, "last_owner");
        gives("POST", "workspaces/a/webhooks/w/test", 409, "webhook_disabled");
        gives("GET", "auth/oidc/x/start", 404, "unknown_issuer");
        gives("GET", "auth/oidc/x/callback", 404, "unknown_issuer");
        gives("POST", "me/totp/disable", 404, "not_enrolled");
        gives("POST", "me/totp/confirm", 409, "not_enrolled");
        gives("POST", "workspaces/a/query", 406, "not_acceptable");
        gives("GET", "workspaces/a/events", 413, "state_too_large");
        gives("POST", "workspaces/a/streams/s/events", 408, "body_timeout");
        assert!(!is_told("GET", "/api/v1/me", 409, "exists"));
        let cancel = &DOCUMENT["paths"]["/api/v1/workspaces/{ws}/runs/{run}/cancel"]["post"]["responses"];
        assert!(cancel["202"]["content"].is_object() && cancel["204"].is_null(), "{cancel}");
    }

    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => members.iter().for_each(|(name, value)| match value.as_str() {
                Some(target) if name == "$ref" => _ = found.insert(target.to_owned()),
                _ => references(value, found),
            }),
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let mut found = BTreeSet::new();
        references(&DOCUMENT, &mut found);
        assert!(found.len() > 40);
        for target in found {
            assert!(DOCUMENT.pointer(target.trim_start_matches('#')).is_some(), "{target}");
        }
    }

    #[test]
    fn every_operation_has_an_id_of_its_own() {
        let ids: BTreeSet<&str> = (DOCUMENT["paths"].as_object().unwrap().values())
            .flat_map(|path| path.as_object().unwrap().values())
            .map(|operation| operation["operationId"].as_str().unwrap())
            .collect();
        assert_eq!(ids.len(), OPERATIONS.len());
    }

    #[test]
    fn every_body_has_an_example_and_every_route_of_a_workspace_its_permission() {
        for operation in OPERATIONS {
            let json = operation.body.filter(|(types, _)| types.contains(&"application/json"));
            assert!(json.is_none_or(|(_, schema)| example(schema).is_some()), "{}", operation.path);
            // three are for every member but guests; the channels of `events` ask for what each of them needs
            let for_all = ["{ws}", "members", "usage", "events"].contains(&operation.path.rsplit('/').next().unwrap());
            let is_open = operation.method == "get" && for_all;
            let has = operation.needs.is_some() || is_open || !operation.path.contains("{ws}");
            assert!(has, "{} {}", operation.method, operation.path);
        }
    }

    #[test]
    fn the_page_shows_every_operation_and_loads_nothing() {
        let page = page();
        assert!(OPERATIONS.iter().all(|operation| page.contains(&escaped(operation.path))));
        assert!(!page.contains("<script") && !page.contains("http://") && !page.contains("https://"));
    }
}
