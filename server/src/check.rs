//! `tidewatch check`: is this file fit for use, and if not, where and why.

use crate::client::rule_of;
use crate::config::Config;
use actors::pack::{Pack, PackError};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use sql::plan::{Planner, check_condition};
use std::path::Path;
use streams::schema::built_in;

/// Checks a configuration or an alert rule (`.toml`), a metric over the built-in streams (`.sql`), or a pack (a folder).
pub async fn run(file: &Path) -> Result<()> {
    let shown = file.display();
    ensure!(file.exists(), "there is no file and no folder `{shown}`");
    if file.is_dir() {
        let pack = Pack::read(file).await.map_err(|error| placed(file, error));
        let pack = pack.with_context(|| format!("{shown} is no pack that can be used"))?;
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
            if let Err(error) = check_condition(&rule.condition) {
                bail!("{shown}: {}", in_condition(&std::fs::read_to_string(file)?, &error.to_string()));
            }
            println!("{shown}: a valid rule over metric {}; its condition is checked where the metric is", rule.metric);
        }
        Some("toml") => {
            let config = Config::load(Some(file))?;
            let needs_secret = crate::app::check(&config).with_context(|| shown.to_string())?;
            crate::app::packs(&config).await.with_context(|| shown.to_string())?;
            config.unused().iter().for_each(|unused| eprintln!("{shown}: {unused}"));
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

/// An error of a pack, with its place in the file where it only knows that in a condition.
fn placed(folder: &Path, error: PackError) -> anyhow::Error {
    let wrong = error.detail.strip_prefix("condition: ");
    match (wrong, std::fs::read_to_string(folder.join(&error.file))) {
        (Some(wrong), Ok(text)) => anyhow!("{}: {}", error.file, in_condition(&text, wrong)),
        _ => error.into(),
    }
}

/// What is wrong with the condition of a rule in TOML: `line 1, column 4: …` in it becomes the place in the file.
fn in_condition(toml: &str, wrong: &str) -> String {
    #[derive(Deserialize)]
    struct Rule {
        condition: toml::Spanned<String>,
    }
    let place = wrong.strip_prefix("line ").and_then(|rest| rest.split_once(", column ")).and_then(|(line, rest)| {
        let (column, wrong) = rest.split_once(": ")?;
        Some((line.parse::<usize>().ok()?, column.parse::<usize>().ok()?, wrong))
    });
    let (in_line, in_column, wrong) = place.unwrap_or((1, 1, wrong));
    let wrong = match wrong.starts_with("Expected: ") {
        true => format!("{wrong}; write a comparison of the metric's columns, for example `vwap > 100`"),
        false => wrong.to_owned(),
    };
    let Ok(Rule { condition }) = toml::from_str(toml) else { return format!("condition: {wrong}") };
    // where escapes make the text another one, it begins where its quotes do
    let value = &toml[condition.span()];
    let at = condition.span().start + value.find(condition.get_ref()).unwrap_or_default();
    let before = &toml[..at];
    let line = before.matches('\n').count() + in_line;
    let start = if in_line == 1 { before.rsplit('\n').next().unwrap_or_default().chars().count() } else { 0 };
    format!("line {line}, column {}: condition: {wrong}", start + in_column)
}

fn is_rule(file: &Path) -> bool {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.parse::<toml::Table>().is_ok_and(|keys| keys.contains_key("metric") || keys.contains_key("condition"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_in_a_condition_is_told_as_one_in_its_file() {
        let check = |toml: &str| {
            let rule: actors::pack::RuleFile = toml::from_str(toml).unwrap();
            check_condition(&rule.condition).map_err(|error| in_condition(toml, &error.to_string()))
        };
        assert_eq!(check("metric = \"m\"\ncondition = \"x > 1 AND y < 2\""), Ok(()));
        for (condition, place) in [
            ("\"x >\"", "line 2, column 17: condition: "),
            ("\"\"", "line 2, column 13: condition: "),
            ("'x > > 1'", "line 2, column 18: condition: "),
            ("\"SELECT 1; DROP\"", "line 2, column "),
            ("\"\"\"\nx > 1\n  AND y >\"\"\"", "line 4, column 10: condition: "),
        ] {
            let error = check(&format!("metric = \"m\"\ncondition = {condition}\n")).unwrap_err();
            assert!(error.starts_with(place) && error.ends_with("for example `vwap > 100`"), "{condition}: {error}");
        }
    }
}
