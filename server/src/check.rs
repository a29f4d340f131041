//! `tidewatch check`: is this file fit for use, and if not, where and why.

use crate::config::Config;
use anyhow::{Context, Result, bail};
use sql::plan::Planner;
use std::path::Path;
use streams::schema::built_in;

/// Checks a configuration (`.toml`) or a metric over the built-in streams (`.sql`).
pub async fn run(file: &Path) -> Result<()> {
    let shown = file.display();
    match file.extension().and_then(|e| e.to_str()) {
        Some("toml") => {
            Config::load(Some(file))?;
            println!("{shown}: a valid configuration");
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
        _ => bail!("{shown}: pass a .toml file (configuration) or a .sql file (metric)"),
    }
    Ok(())
}
