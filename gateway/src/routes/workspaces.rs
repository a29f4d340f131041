//! Workspaces: the tenants.

use super::session::workspace as shown;
use super::streams::is_built_in;
use crate::AppState;
use crate::auth::Caller;
use crate::extract::{Json, Listing, Member, Seen, Sent};
use crate::hub::Group;
use crate::permission::{Permission, Role};
use crate::problem::Problem;
use crate::quota::{Of, Rate, Tier};
use actors::pack::Pack;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use engine::event::WorkspaceId;
use serde::Deserialize;
use serde_json::{Value, json};
use sql::store::Workspace;

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/api/v1/packs", get(packs))
        .route("/api/v1/workspaces", get(list).post(create))
        .route("/api/v1/workspaces/{ws}", get(read).patch(update).delete(delete))
        .route("/api/v1/workspaces/{ws}/usage", get(usage))
}

/// The caller's own; an admin of the installation sees all.
async fn list(State(state): State<AppState>, caller: Caller, mut page: Listing) -> Result<axum::Json<Value>, Problem> {
    let caller = caller.user()?;
    let (limit, after) = (page.limit, page.take("after"));
    page.done()?;
    let store = state.system.store();
    let mut all: Vec<(Workspace, Role)> = Vec::new();
    let (own, invited) = (store.workspaces_of(&caller.id).await?, store.invited_to(&caller.name).await?);
    for (workspace, role) in own.into_iter().chain(invited) {
        all.push((workspace, role.parse()?));
    }
    all.sort_by(|a, b| a.0.id.cmp(&b.0.id));
    if caller.admin {
        let own: Vec<WorkspaceId> = all.iter().map(|(workspace, _)| workspace.id.clone()).collect();
        let others = store.all_workspaces().await?.into_iter().filter(|other| !own.contains(&other.id));
        all.extend(others.map(|other| (other, Role::Admin)));
        all.sort_by(|a, b| a.0.id.cmp(&b.0.id));
    }
    let mut rest =
        all.iter().filter(|(workspace, _)| after.as_deref().is_none_or(|after| workspace.id.as_str() > after));
    let workspaces: Vec<Value> = rest.by_ref().take(limit).map(|(workspace, role)| shown(workspace, *role)).collect();
    let mut answer = json!({"workspaces": workspaces});
    if rest.next().is_some() {
        answer["next"] = workspaces.last().map_or(Value::Null, |last| last["id"].clone());
    }
    Ok(axum::Json(answer))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct New {
    id: String,
    name: Option<String>,
    pack: Option<String>,
    tier: Option<String>,
}

async fn create(
    State(state): State<AppState>,
    caller: Caller,
    seen: Seen,
    new: Sent<New>,
) -> Result<Response, Problem> {
    let caller = caller.user()?;
    let Json(new) = new?;
    let id: WorkspaceId = new.id.parse()?;
    seen.note(format_args!("`{id}`"));
    let pack = new.pack.as_deref().map(|name| known_pack(&state, name)).transpose()?;
    let workspace = Workspace {
        name: label("name", new.name.as_deref().unwrap_or(id.as_str()))?,
        pack: pack.map(|pack| pack.name.to_string()),
        tier: match new.tier {
            Some(tier) => {
                allowed_tier(&state, caller.admin, &tier, state.config.tier(&state.config.default_tier))?;
                tier
            }
            None => state.config.default_tier.clone(),
        },
        created_at: state.system.now(),
        id,
    };
    if let Some(pack) = pack {
        fits(pack, state.config.tier(&workspace.tier))?;
    }
    let turn = state.auth.turn().await;
    if !caller.admin {
        state.may_own_another(&caller.id).await?;
    }
    let answer = shown(&workspace, Role::Owner);
    let id = workspace.id.clone();
    state.system.create_workspace(workspace, &caller.id).await.map_err(|fault| match fault.code {
        "exists" => Problem::conflict("workspace_exists", format!("the workspace id `{id}` is taken; choose another")),
        _ => fault.into(),
    })?;
    drop(turn);
    if let Some(pack) = pack
        && let Err(fault) = pack.apply(&state.system, &id).await
    {
        // a workspace without what it was made for is none
        state.system.delete_workspace(&id).await?;
        return Err(fault.into());
    }
    state.auth.forget();
    seen.found(id);
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

fn known_pack<'a>(state: &'a AppState, name: &str) -> Result<&'a Pack, Problem> {
    state.packs.get(name).ok_or_else(|| {
        let known: Vec<&str> = state.packs.iter().map(|pack| pack.name.as_str()).collect();
        let shown: String = name.chars().take(40).collect();
        Problem::invalid("unknown_pack", format!("there is no pack `{shown}`; there are {}", known.join(", ")))
    })
}

/// Refuses a pack that holds more than a tier allows.
fn fits(pack: &Pack, tier: Tier) -> Result<(), Problem> {
    let parts = [("metrics", pack.metrics.len(), tier.metrics), ("streams", pack.streams.len(), tier.streams)];
    for (part, held, most) in parts {
        if let Some(most) = most.filter(|most| held > *most) {
            let detail = format!("pack `{}` has {held} {part}, more than {part} = {most} of its tier", pack.name);
            return Err(Problem::conflict("limit_reached", detail));
        }
    }
    Ok(())
}

/// What workspaces can be made from.
async fn packs(State(state): State<AppState>, _: Caller) -> axum::Json<Value> {
    let shown = |pack: &Pack| {
        json!({
            "name": pack.name, "title": pack.title, "description": pack.description,
            "streams": pack.streams.iter().map(|schema| &schema.stream).collect::<Vec<_>>(),
            "metrics": pack.metrics.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "alert_rules": pack.rules.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "dashboard": pack.dashboard,
        })
    };
    axum::Json(json!({"packs": state.packs.iter().map(shown).collect::<Vec<Value>>()}))
}

/// Refuses a tier that is not configured, and to anybody but an admin one that allows more than `most`.
fn allowed_tier(state: &AppState, admin: bool, name: &str, most: Tier) -> Result<(), Problem> {
    let Some(tier) = state.config.tiers.get(name) else {
        let known: Vec<&str> = state.config.tiers.keys().map(String::as_str).collect();
        let shown: String = name.chars().take(40).collect();
        let detail = format!("there is no tier `{shown}`; there are {}", known.join(", "));
        return Err(Problem::invalid("unknown_tier", detail));
    };
    if admin || tier.is_within(&most) {
        return Ok(());
    }
    Err(Problem::forbidden(format!("only admins of this installation may give the tier `{name}`"))
        .code("tier_not_allowed"))
}

/// How much of its tier the workspace uses. Rates are the caller's own, or the workspace's where the tier says so.
async fn usage(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    member.may_see_people()?;
    let (id, now) = (&member.workspace, state.system.now());
    let name = state.auth.tier(state.system.store(), id, now).await?;
    let tier = state.config.tier(&name);
    let rate = async |of: Of, most: Option<u32>| {
        let rate = Rate::per_hour(most?);
        let shared = state.system.cache().take(&of.shared()?, rate.shared(), 0.0).await;
        let standing = state.quotas.standing(of, rate, shared, now);
        let reset = standing.reset.as_secs_f64().ceil() as u64;
        Some(json!({"limit": standing.limit, "remaining": standing.remaining, "reset_seconds": reset}))
    };
    let metrics = state.system.metrics(id).await?.len();
    let streams = state.system.streams(id).await?;
    let events: u64 = streams.iter().map(|stream| stream.events).sum();
    let own = streams.iter().filter(|info| !is_built_in(&info.schema.stream)).count();
    Ok(axum::Json(json!({
        "tier": name,
        "requests": rate(Of::Requests(id.clone(), member.user.clone()), tier.requests_per_hour).await,
        "agent_runs": rate(Of::Runs(id.clone()), tier.agent_runs_per_hour).await,
        "events": {
            "accepted": events, "limit_per_second": tier.events_per_second,
            "limit_at_once": tier.events_per_second.map(|most| Rate::of_events(most).burst()),
        },
        "metrics": {"used": metrics, "limit": tier.metrics},
        "streams": {"used": own, "limit": tier.streams},
        "connections": {"used": state.hub.crowd.count(&Group::Workspace(id.clone())), "limit": tier.connections},
        "retention": {"limit_days": tier.retain_days},
    })))
}

/// A short text for people: what `field` says.
fn label(field: &str, text: &str) -> Result<String, Problem> {
    let text = text.trim();
    if text.is_empty() || text.chars().count() > 200 || text.chars().any(char::is_control) {
        let detail = format!("`{field}` must be 1 to 200 characters without control characters");
        return Err(Problem::invalid("bad_body", detail));
    }
    Ok(text.to_owned())
}

async fn read(State(state): State<AppState>, member: Member) -> Result<axum::Json<Value>, Problem> {
    let found = state.system.store().workspace(&member.workspace).await?;
    let found = found.ok_or_else(|| Problem::workspace_not_found(member.workspace.as_str()))?;
    Ok(axum::Json(shown(&found, member.access.role)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Changes {
    name: Option<String>,
    tier: Option<String>,
}

async fn update(
    State(state): State<AppState>,
    member: Member,
    changes: Sent<Changes>,
) -> Result<axum::Json<Value>, Problem> {
    member.may(Permission::FundSettingsUpdate)?;
    let Json(changes) = changes?;
    let name = changes.name.map(|name| label("name", &name)).transpose()?;
    let tier = changes.tier;
    if let Some(tier) = &tier {
        allowed_tier(&state, member.admin, tier, state.tier(&member.workspace).await?)?;
    }
    let store = state.system.store();
    let changed = store.update_workspace(&member.workspace, name.as_deref(), tier.as_deref()).await?;
    let changed = changed.ok_or_else(|| Problem::workspace_not_found(member.workspace.as_str()))?;
    state.auth.forget();
    Ok(axum::Json(shown(&changed, member.access.role)))
}

async fn delete(State(state): State<AppState>, member: Member) -> Result<StatusCode, Problem> {
    member.may(Permission::WorkspaceDelete)?;
    state.system.delete_workspace(&member.workspace).await?;
    state.hub.forget(&member.workspace);
    state.took_from(&Group::Workspace(member.workspace));
    Ok(StatusCode::NO_CONTENT)
}
