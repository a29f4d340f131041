//! What `tidewatch bench` measured, as a table on the screen, as JSON and as a page with plots.

use anyhow::{Context, Result};
use plotters::prelude::*;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;

/// A figure: its name, its value and the value's unit.
struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
}

/// Points of one line of a plot.
type Line = (String, Vec<(f64, f64)>);

/// Figures as they come in, and what the plots show.
#[derive(Default)]
pub(crate) struct Report {
    figures: Vec<Figure>,
    /// Milliseconds by percentile.
    latencies: Vec<Line>,
    /// Events a second by second of the load.
    rates: Vec<Line>,
}

impl Report {
    /// Prints the figure and keeps it.
    pub(crate) fn figure(&mut self, name: &str, value: f64, unit: &'static str) {
        println!("{name:<58} {value:>14.2} {unit}");
        self.figures.push(Figure { name: name.to_owned(), value, unit });
    }

    /// p50 and p99 of `waits` (sorted milliseconds) as figures, and all of it as a line of the plot.
    pub(crate) fn latency(&mut self, name: &str, waits: &[f64]) {
        let at = |percent: f64| waits[((waits.len() - 1) as f64 * percent / 100.0).round() as usize];
        self.figure(&format!("{name}, p50"), at(50.0), "ms");
        self.figure(&format!("{name}, p99"), at(99.0), "ms");
        let points = (0..=1_000).map(|step| f64::from(step) / 10.0).map(|percent| (percent, at(percent)));
        self.latencies.push((name.to_owned(), points.collect()));
    }

    /// Events a second over the whole load as a figure, and second by second as a line of the plot.
    pub(crate) fn rate(&mut self, name: &str, total: f64, by_second: Vec<(f64, f64)>) {
        self.figure(name, total, "events/s");
        self.rates.push((name.to_owned(), by_second));
    }

    /// Writes the JSON to `out`, and the page beside it with the ending `html`.
    pub(crate) fn write(&self, out: &Path, seconds: u64) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let version = env!("CARGO_PKG_VERSION");
        let figures: Vec<Value> =
            self.figures.iter().map(|f| json!({"name": f.name, "value": f.value, "unit": f.unit})).collect();
        let json = json!({"version": version, "cores": cores, "seconds": seconds, "figures": figures});
        std::fs::write(out, serde_json::to_vec_pretty(&json)?).with_context(|| out.display().to_string())?;
        let page = out.with_extension("html");
        std::fs::write(&page, self.page(version, cores)?).with_context(|| page.display().to_string())?;
        eprintln!("written to {} and {}", out.display(), page.display());
        Ok(())
    }

    fn page(&self, version: &str, cores: usize) -> Result<String> {
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>Tidewatch {version}: benchmark</title>\n\
             <style>\nbody {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em }}\n\
             table {{ border-collapse: collapse; width: 100% }}\ntd {{ border-top: 1px solid #ddd; padding: .25em .5em }}\n\
             td:nth-child(2) {{ text-align: right; font-variant-numeric: tabular-nums }}\nsvg {{ max-width: 100%; height: auto }}\n\
             </style>\n<h1>Tidewatch {version}, {cores} cores</h1>\n<table>\n"
        );
        for Figure { name, value, unit } in &self.figures {
            writeln!(page, "<tr><td>{name}<td>{value:.2}<td>{unit}")?;
        }
        page.push_str("</table>\n");
        if !self.rates.is_empty() {
            page.push_str(&plot("Durable ingest", "second of the load", "events/s", &self.rates, false)?);
        }
        if !self.latencies.is_empty() {
            page.push_str(&plot("From post to WebSocket", "percentile", "ms", &self.latencies, true)?);
        }
        page.push_str("</html>\n");
        Ok(page)
    }
}

/// Lines over a common x axis as SVG; `log` makes the y axis logarithmic.
fn plot(title: &str, x: &str, y: &str, lines: &[Line], log: bool) -> Result<String> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let xs = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max) * 1.1;
    let bottom = points().map(|point| point.1).fold(top, f64::min).max(top / 1e6);
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (900, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area);
    chart.caption(title, ("sans-serif", 20)).margin(12).x_label_area_size(40).y_label_area_size(80);
    if log {
        draw(chart.build_cartesian_2d(0.0..xs, (bottom..top).log_scale())?, x, y, lines)?;
    } else {
        draw(chart.build_cartesian_2d(0.0..xs, 0.0..top)?, x, y, lines)?;
    }
    area.present()?;
    drop(area);
    Ok(svg)
}

fn draw<'a, Y>(
    mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<plotters::coord::types::RangedCoordf64, Y>>,
    x: &str,
    y: &str,
    lines: &[Line],
) -> Result<()>
where
    Y: plotters::coord::ranged1d::ValueFormatter<f64> + Ranged<ValueType = f64>,
{
    chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(TRANSPARENT).draw()?;
    for (at, (name, points)) in lines.iter().enumerate() {
        let style = Palette99::pick(at).stroke_width(2);
        let line = chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
        line.label(name.as_str()).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.8)).draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_figure_and_a_line_for_each_load() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("bench.json");
        let mut report = Report::default();
        report.rate("ingest, 1 connection", 1_000.0, vec![(0.0, 900.0), (1.0, 1_100.0)]);
        let waits: Vec<f64> = (1..=100).map(f64::from).collect();
        report.latency("post to WebSocket", &waits);
        report.write(&out, 2).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
        let value = |at: usize| json["figures"][at]["value"].as_f64().unwrap();
        assert_eq!((value(0), value(1), value(2)), (1_000.0, 51.0, 99.0));
        let page = std::fs::read_to_string(out.with_extension("html")).unwrap();
        assert_eq!(page.matches("<svg").count(), 2);
        assert_eq!(page.matches("stroke-width=\"2\"").count(), 4, "two lines, each with its mark in the legend");
        assert!(page.contains("post to WebSocket, p99"), "{page}");
    }
}
