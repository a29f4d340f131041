//! `tidewatch check`: is this file fit for use, and if not, where and why.

use crate::client::rule_of;
use crate::config::Config;
use actors::pack::Pack;
use anyhow::{Context, Result, bail};
use sql::plan::Planner;
use std::path::Path;
use streams::schema::built_in;

/// Checks a configuration or an alert rule (`.toml`), a metric over the built-in streams (`.sql`), or a pack (a folder).
pub async fn run(file: &Path) -> Result<()> {
    let shown = file.display();
    if file.is_dir() {
        let pack = Pack::read(file).await.with_context(|| format!("{shown} is no pack that can be used"))?;
        let (streams, metrics, rules) = (pack.streams.len(), pack.metrics.len(), pack.rules.len());
        println!(
            "{shown}: a valid pack `{}` with {streams} streams, {metrics} metrics, {rules} alert rules",
            pack.name
        );
        return Ok(());
    }
    match file.extension().and_then(|e| e.to_str()) {
        // a rule is told from a configuration by the keys that every rule has
        Some("toml") if is_rule(file) => {
            let rule = rule_of(file)?;
            println!("{shown}: a valid rule over metric {}; its condition is checked where the metric is", rule.metric);
        }
        Some("toml") => {
            let needs_secret = crate::app::check(&Config::load(Some(file))?).with_context(|| shown.to_string())?;
            let rest = if needs_secret { "; set TIDEWATCH__AUTH__SECRET for `tidewatch serve`" } else { "" };
            println!("{shown}: a valid configuration{rest}");
        }
        Some("sql") => {
            let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
            let schema = |stream: &_| built_in().iter().find(|s| s.stream == *stream).map(|s| s.arrow().clone());
            match Planner::default().program(text.trim_end().trim_end_matches(';'), schema).await {
                Ok(program) => {
                    let columns: Vec<&str> = program.output().fields().iter().map(|f| f.name().as_str()).collect();
                    println!("{shown}: a valid metric over {} with rows ({})", program.stream(), columns.join(", "));
                }
                Err(error) => bail!("{shown}: {error}"),
            }
        }
        _ => bail!("{shown}: pass a .toml file (configuration or alert rule), a .sql file (metric) or a folder (pack)"),
    }
    Ok(())
}

fn is_rule(file: &Path) -> bool {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.parse::<toml::Table>().is_ok_and(|keys| keys.contains_key("metric") || keys.contains_key("condition"))
}
