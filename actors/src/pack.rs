//! Packs: streams, metrics, alert rules and dashboard layout of one domain, read from a folder and put into a workspace.
//!
//! ```text
//! pack.toml            title, description, dashboard, [metrics.NAME] with emit, retain, max_delay, …
//! streams/a.b.toml     unknown_fields, columns
//! metrics/NAME.sql     a metric's SQL
//! rules/NAME.toml      metric, condition, for, severity
//! ```

use crate::fault::Fault;
use crate::system::{System, own_name};
use crate::{MetricDefinition, RuleDefinition};
use engine::event::{ItemName, StreamName};
use engine::program::Program;
use rust_embed::RustEmbed;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sql::plan::{Planner, Source, condition};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use streams::schema::{Column, StreamSchema, UnknownFields, built_in};
use streams::span::Text;
use streams::table::built_in_tables;

/// The packs that come with Tidewatch, a folder each.
#[derive(RustEmbed)]
#[folder = "packs/"]
struct BuiltIn;

/// Why a pack cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {detail}")]
pub struct PackError {
    /// The file it is about, within the pack's folder.
    pub file: String,
    pub detail: String,
}

impl PackError {
    fn new(file: impl Into<String>, detail: impl std::fmt::Display) -> PackError {
        PackError { file: file.into(), detail: detail.to_string() }
    }
}

/// A checked pack: all of it can be defined in an empty workspace.
#[derive(Clone, Debug)]
pub struct Pack {
    pub name: ItemName,
    pub title: String,
    pub description: String,
    pub streams: Vec<StreamSchema>,
    /// A metric stands behind those that it reads.
    pub metrics: Vec<(ItemName, MetricDefinition)>,
    pub rules: Vec<(ItemName, RuleDefinition)>,
    /// Metrics in the order in which the console shows them.
    pub dashboard: Vec<ItemName>,
}

/// `pack.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    title: String,
    description: String,
    #[serde(default)]
    dashboard: Vec<ItemName>,
    #[serde(default)]
    metrics: BTreeMap<ItemName, Options>,
}

/// What a metric's definition has beside its SQL.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Options {
    emit: Option<Text>,
    retain: Option<Text>,
    max_delay: Option<Text>,
    allowed_lateness: Option<Text>,
    backfill: Option<Text>,
}

/// `streams/*.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamFile {
    #[serde(default)]
    unknown_fields: UnknownFields,
    columns: Vec<Column>,
}

/// An alert rule in a TOML file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleFile {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<ItemName>,
    pub metric: ItemName,
    pub condition: String,
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub hold: Option<Text>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub severity: Option<String>,
}

impl Pack {
    /// Reads and checks the pack in `folder`, whose name is the pack's.
    pub async fn read(folder: &Path) -> Result<Pack, PackError> {
        let shown = || folder.display().to_string();
        let name = folder.canonicalize().map_err(|error| PackError::new(shown(), error))?;
        let name = name.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let mut files = BTreeMap::new();
        for part in ["", "streams", "metrics", "rules"] {
            let Ok(entries) = std::fs::read_dir(folder.join(part)) else { continue };
            for entry in entries {
                let entry = entry.map_err(|error| PackError::new(shown(), error))?;
                if !entry.path().is_file() {
                    continue;
                }
                let file = Path::new(part).join(entry.file_name()).display().to_string();
                let text = std::fs::read_to_string(entry.path()).map_err(|error| PackError::new(&file, error))?;
                files.insert(file, text);
            }
        }
        Pack::parse(name, &files).await
    }

    /// Checks the files of a pack, named by their paths in its folder. Other files than a pack's are not looked at.
    async fn parse(name: &str, files: &BTreeMap<String, String>) -> Result<Pack, PackError> {
        let name: ItemName = name.parse().map_err(|error| PackError::new(name, error))?;
        let manifest = files.get("pack.toml").ok_or_else(|| PackError::new("pack.toml", "the file is missing"))?;
        let Manifest { title, description, dashboard, metrics: mut options } = toml_of("pack.toml", manifest)?;
        let mut streams = Vec::new();
        for (file, stream, text) in within::<StreamName>(files, "streams", "toml") {
            let stream = stream?;
            own_name(&stream).map_err(|fault| PackError::new(file, fault))?;
            let StreamFile { unknown_fields, columns } = toml_of(file, text)?;
            let schema = StreamSchema::new(stream, columns, unknown_fields);
            streams.push(schema.map_err(|error| PackError::new(file, error))?);
        }
        let mut sources = Vec::new();
        for (file, metric, text) in within::<ItemName>(files, "metrics", "sql") {
            sources.push((file, metric?, text));
        }
        let planned = plan(&streams, sources).await?;
        let mut metrics = Vec::new();
        for (metric, sql, _) in &planned {
            let Options { emit, retain, max_delay, allowed_lateness, backfill } =
                options.remove(metric).unwrap_or_default();
            let span = |text: Option<Text>| text.map(|text| text.0);
            let definition = MetricDefinition {
                sql: (*sql).to_owned(),
                emit: span(emit),
                retain: span(retain),
                max_delay: span(max_delay),
                allowed_lateness: span(allowed_lateness),
                backfill: span(backfill),
            };
            metrics.push((metric.clone(), definition));
        }
        let program = |metric: &ItemName| planned.iter().find(|(name, ..)| name == metric).map(|(.., program)| program);
        if let Some(metric) = options.keys().chain(&dashboard).find(|metric| program(metric).is_none()) {
            return Err(PackError::new("pack.toml", format!("there is no metrics/{metric}.sql")));
        }
        let mut rules = Vec::new();
        for (file, rule, text) in within::<ItemName>(files, "rules", "toml") {
            let RuleFile { name, metric, condition: text, hold, severity } = toml_of(file, text)?;
            let rule = rule?;
            if name.is_some_and(|name| name != rule) {
                return Err(PackError::new(file, "`name` is not the one of the file; leave it out"));
            }
            let program = program(&metric).ok_or_else(|| {
                PackError::new(file, format!("the rule watches metric `{metric}`, which the pack lacks"))
            })?;
            condition(&text, program).map_err(|error| PackError::new(file, format!("condition: {error}")))?;
            let hold = hold.map(|text| text.0);
            rules.push((rule, RuleDefinition { metric, condition: text, hold, severity }));
        }
        Ok(Pack { name, title, description, streams, metrics, rules, dashboard })
    }

    /// Defines all of the pack in a workspace that has nothing of its own yet.
    pub async fn apply(&self, system: &System, workspace: &engine::event::WorkspaceId) -> Result<(), Fault> {
        for stream in &self.streams {
            system.define_stream(workspace, stream.clone()).await?;
        }
        for (name, definition) in &self.metrics {
            system.define_metric(workspace, name.clone(), definition.clone()).await?;
        }
        for (name, definition) in &self.rules {
            system.define_alert_rule(workspace, name.clone(), definition.clone()).await?;
        }
        Ok(())
    }
}

/// The files of one part of a pack: path, the name in it, text.
fn within<'a, N: std::str::FromStr<Err: std::fmt::Display>>(
    files: &'a BTreeMap<String, String>,
    part: &'a str,
    ending: &'a str,
) -> impl Iterator<Item = (&'a str, Result<N, PackError>, &'a str)> {
    files.iter().filter_map(move |(file, text)| {
        let name = file.strip_prefix(part)?.strip_prefix('/')?.strip_suffix(ending)?.strip_suffix('.')?;
        Some((file.as_str(), name.parse().map_err(|error| PackError::new(file, error)), text.as_str()))
    })
}

fn toml_of<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, PackError> {
    toml::from_str(text).map_err(|error| PackError::new(file, error))
}

/// A metric's name, its SQL and its program.
type PlannedMetric<'a> = (ItemName, &'a str, Arc<Program>);

/// Plans the metrics, in an order in which each stands behind those that it reads.
async fn plan<'a>(
    streams: &[StreamSchema],
    mut waiting: Vec<(&'a str, ItemName, &'a str)>,
) -> Result<Vec<PlannedMetric<'a>>, PackError> {
    let planner = Planner::default();
    let relations: HashMap<&StreamName, _> = streams
        .iter()
        .chain(built_in())
        .map(|schema| (&schema.stream, schema.arrow().clone()))
        .chain(built_in_tables().iter().map(|table| (table.name(), table.schema().relation().clone())))
        .collect();
    let mut planned: Vec<PlannedMetric<'a>> = Vec::new();
    while !waiting.is_empty() {
        let before = waiting.len();
        let mut later = Vec::new();
        for (file, name, text) in std::mem::take(&mut waiting) {
            let waits = Cell::new(false);
            let source = |stream: &StreamName| match stream.metric() {
                Some(metric) => {
                    let found = planned.iter().find(|(name, ..)| *name == metric);
                    waits.set(found.is_none());
                    found.map(|(.., program)| Source::Metric(program.clone()))
                }
                None => relations.get(stream).cloned().map(Source::Stream),
            };
            let sql = text.trim_end().trim_end_matches(';');
            match planner.program(sql, source).await {
                Ok(program) => planned.push((name, sql, program)),
                Err(error) if waits.get() => later.push((file, name, text, error)),
                Err(error) => return Err(PackError::new(file, error)),
            }
        }
        // of metrics that only wait for others, the first says what it lacks
        if later.len() == before
            && let Some((file, _, _, error)) = later.first()
        {
            return Err(PackError::new(*file, error));
        }
        waiting = later.into_iter().map(|(file, name, text, _)| (file, name, text)).collect();
    }
    Ok(planned)
}

/// The packs that workspaces can be made from, by name.
#[derive(Clone, Debug, Default)]
pub struct Packs(BTreeMap<ItemName, Pack>);

impl Packs {
    /// Those that come with Tidewatch, and each folder within `folder` that holds a `pack.toml`; of two with one name
    /// the folder's counts.
    pub async fn load(folder: Option<&Path>) -> Result<Packs, PackError> {
        let mut files: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for path in BuiltIn::iter() {
            let Some((pack, file)) = path.split_once('/') else { continue };
            let text = BuiltIn::get(&path).map(|file| String::from_utf8_lossy(&file.data).into_owned());
            files.entry(pack.to_owned()).or_default().insert(file.to_owned(), text.unwrap_or_default());
        }
        let mut packs = BTreeMap::new();
        for (name, files) in &files {
            let pack = Pack::parse(name, files).await?;
            packs.insert(pack.name.clone(), pack);
        }
        let Some(folder) = folder else { return Ok(Packs(packs)) };
        let shown = || folder.display().to_string();
        for entry in std::fs::read_dir(folder).map_err(|error| PackError::new(shown(), error))? {
            let path = entry.map_err(|error| PackError::new(shown(), error))?.path();
            if path.join("pack.toml").is_file() {
                let pack = Pack::read(&path).await;
                let pack = pack.map_err(|PackError { file, detail }| {
                    PackError::new(path.join(file).display().to_string(), detail)
                })?;
                packs.insert(pack.name.clone(), pack);
            }
        }
        Ok(Packs(packs))
    }

    pub fn get(&self, name: &str) -> Option<&Pack> {
        self.0.get(&name.parse().ok()?)
    }

    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = &Pack> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        let manifest = ("pack.toml", "title = \"T\"\ndescription = \"D\"");
        [manifest].iter().chain(files).map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect()
    }

    #[tokio::test]
    async fn the_packs_that_come_with_it_are_fit_for_use() {
        let packs = Packs::load(None).await.unwrap();
        let names: Vec<&str> = packs.iter().map(|pack| pack.name.as_str()).collect();
        assert_eq!(names, ["analytics", "creator", "documents", "founder", "venture"]);
        let venture = packs.get("venture").unwrap();
        let place = |name: &str| venture.metrics.iter().position(|(metric, _)| metric.as_str() == name).unwrap();
        assert!(place("price_1m") < place("trend_1m"), "a metric stands behind those it reads");
        assert_eq!(packs.get("documents").unwrap().streams.len(), 2);
        assert_eq!(
            packs.get("analytics").unwrap().metrics[3].1.allowed_lateness,
            Some(engine::event::Span::seconds(60))
        );
    }

    #[tokio::test]
    async fn a_pack_that_cannot_be_used_names_file_place_and_mend() {
        let count = "SELECT count(*) AS n FROM shop.orders GROUP BY tumble(ts, INTERVAL '1 minute')";
        let stream = ("streams/shop.orders.toml", "columns = [{ name = \"sku\", type = \"utf8\" }]");
        let cases: [(&[(&str, &str)], &str); 9] = [
            (&[("pack.toml", "title = 1")], "pack.toml: TOML parse error at line 1, column 9"),
            (&[("pack.toml", "title = \"T\"\ndescription = \"D\"\ndashboard = [\"n\"]")], "there is no metrics/n.sql"),
            (&[("metrics/n.sql", count)], "metrics/n.sql: line 1, column 27: there is no stream `shop.orders`"),
            (&[stream, ("metrics/n.sql", "SELECT 1")], "metrics/n.sql: "),
            (&[("metrics/Big.sql", count)], "metrics/Big.sql: name `Big` must match"),
            (
                &[("streams/market.trades.toml", stream.1)],
                "streams/market.trades.toml: stream `market.trades` is built in",
            ),
            (
                &[("streams/shop.orders.toml", "columns = [{ name = \"sku\", type = \"text\" }]")],
                "type `text` is none of",
            ),
            (
                &[stream, ("metrics/n.sql", count), ("rules/r.toml", "metric = \"m\"\ncondition = \"n > 1\"")],
                "metric `m`",
            ),
            (
                &[stream, ("metrics/n.sql", count), ("rules/r.toml", "metric = \"n\"\ncondition = \"x > 1\"")],
                "rules/r.toml: condition: ",
            ),
        ];
        for (given, told) in cases {
            let error = Pack::parse("shop", &files(given)).await.unwrap_err().to_string();
            assert!(error.contains(told), "{error}\n  lacks {told}");
        }
        let round = "SELECT x FROM metrics.a";
        let error = Pack::parse("shop", &files(&[("metrics/a.sql", round)])).await.unwrap_err().to_string();
        assert!(error.starts_with("metrics/a.sql: "), "{error}");
    }
}
