//! The indicators against what others computed: LEAN's reference columns and the results of empyrical's tests.

use engine::indicator::{Indicator, IndicatorError, LENGTH_MAX, Running};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A file of reference results; `None`, and a word about it, where the shared data is missing.
fn truth(name: &str) -> Option<String> {
    let path: PathBuf = Path::new("../../shared/data/truth").join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Some(text.trim_start_matches('\u{feff}').to_owned()),
        Err(error) => {
            println!("skipped: {}: {error}", path.display());
            None
        }
    }
}

/// Named columns of a file with a header; a field that is no number is `None`.
fn columns<const N: usize>(text: &str, names: [&str; N]) -> Vec<[Option<f64>; N]> {
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').map(str::trim).collect();
    let places =
        names.map(|name| header.iter().position(|h| *h == name).unwrap_or_else(|| panic!("{name}: {header:?}")));
    let number = |text: &str| text.trim().parse().ok().filter(|value: &f64| value.is_finite());
    lines
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let fields: Vec<&str> = line.split(',').collect();
            places.map(|at| fields.get(at).and_then(|field| number(field)))
        })
        .collect()
}

/// Runs the indicator over the first columns and compares with the last, where that has a value.
fn check<const N: usize>(file: &str, names: [&str; N], name: &str, parameters: &[f64], scale: f64, tolerance: f64) {
    let Some(text) = truth(file) else { return };
    let rows = columns(&text, names);
    let mut running = Running::new(Indicator::new(name, parameters).unwrap());
    let mut compared = 0;
    for (line, row) in rows.iter().enumerate() {
        let result = running.push(&row[..N - 1]).map(|value| value * scale);
        if let Some(expected) = row[N - 1] {
            let result = result.unwrap_or_else(|| panic!("{name} in {file}, row {line}: NULL, expected {expected}"));
            let near = (result - expected).abs() <= tolerance * expected.abs().max(1.0);
            assert!(near, "{name} in {file}, row {line}: {result}, expected {expected}");
            compared += 1;
        }
    }
    assert!(compared > 90, "{name} in {file}: only {compared} values to compare");
}

#[test]
fn ema_equals_leans_from_its_seed_on() {
    check("indicators_lean/spy_ema.csv", ["close", "EMA14"], "ema", &[14.0], 1.0, 1e-9);
}

#[test]
fn rsi_equals_leans_wilder_column() {
    check("indicators_lean/spy_with_indicators.txt", ["Close", "RSI 14 Wilder"], "rsi", &[14.0], 1.0, 1e-6);
}

#[test]
fn macd_its_signal_and_its_histogram_equal_leans() {
    let (file, parameters) = ("indicators_lean/spy_with_macd.txt", [12.0, 26.0, 9.0]);
    check(file, ["Close", "MACD"], "macd", &parameters, 1.0, 1e-4);
    check(file, ["Close", "Signal"], "macd_signal", &parameters, 1.0, 1e-4);
    check(file, ["Close", "Histogram"], "macd_histogram", &parameters, 1.0, 1e-4);
}

#[test]
fn bollinger_bands_equal_leans() {
    let file = "indicators_lean/spy_bollinger_bands.txt";
    check(file, ["Close", "Moving Average 20"], "bollinger_middle", &[20.0], 1.0, 1e-5);
    check(file, ["Close", "Bollinger Bands® 20 2 Top"], "bollinger_upper", &[20.0, 2.0], 1.0, 1e-5);
    check(file, ["Close", "Bollinger Bands® 20 2 Bottom"], "bollinger_lower", &[20.0, 2.0], 1.0, 1e-5);
}

#[test]
fn a_zscore_is_the_place_within_the_bollinger_bands() {
    let Some(text) = truth("indicators_lean/spy_bollinger_bands.txt") else { return };
    let names = ["Close", "Moving Average 20", "Bollinger Bands® 20 2 Top"];
    let mut running = Running::new(Indicator::new("zscore", &[20.0]).unwrap());
    for [close, middle, upper] in columns(&text, names) {
        let result = running.push(&[close]);
        let (Some(close), Some(middle), Some(upper)) = (close, middle, upper) else { continue };
        // the reference is printed to four decimals
        assert!((result.unwrap() - (close - middle) / ((upper - middle) / 2.0)).abs() < 1e-3);
    }
}

#[test]
fn average_true_range_equals_leans_wilder_column() {
    let names = ["High", "Low", "Close", "Average True Range 14"];
    check("indicators_lean/spy_atr_wilder.txt", names, "atr", &[14.0], 1.0, 1e-5);
}

#[test]
fn pct_change_equals_leans_rate_of_change() {
    let names = ["Close", "Rate of Change % 50"];
    check("indicators_lean/spy_with_rocp50.txt", names, "pct_change", &[50.0], 100.0, 1e-5); // it is printed in single precision
}

#[test]
fn realized_volatility_of_one_return_is_the_size_of_leans_log_return() {
    let Some(text) = truth("indicators_lean/spy_logr14.txt") else { return };
    // every 14th close, so that one return spans the 14 days of the reference
    let rows = columns(&text, ["Close", "LOGR14"]);
    let mut compared = 0;
    for phase in 0..14 {
        let mut running = Running::new(Indicator::new("realized_volatility", &[1.0]).unwrap());
        for [close, expected] in rows.iter().skip(phase).step_by(14) {
            if let (Some(result), Some(expected)) = (running.push(&[*close]), expected) {
                assert!((result - expected.abs()).abs() < 1e-6, "{result}, expected {expected}");
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "only {compared} values to compare");
}

#[test]
fn the_least_drawdown_is_empyricals_maximum_drawdown() {
    let Some(text) = truth("portfolio_metrics/empyrical_vectors.ndjson") else { return };
    let mut compared = 0;
    for line in text.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        if case["function"] != "max_drawdown" {
            continue;
        }
        let returns: Vec<f64> =
            case["args"][0]["series"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap_or(f64::NAN)).collect();
        let Some(expected) = case["result"].as_f64() else { continue };
        let mut running = Running::new(Indicator::new("drawdown", &[]).unwrap());
        let mut value = 1.0;
        let mut least = running.push(&[Some(value)]).unwrap();
        for growth in returns.into_iter().filter(|growth| !growth.is_nan()) {
            value *= 1.0 + growth;
            least = least.min(running.push(&[Some(value)]).unwrap());
        }
        assert!((least - expected).abs() < 1e-9, "{}: {least}, expected {expected}", case["test"]);
        compared += 1;
    }
    assert!(compared >= 6, "only {compared} cases");
}

#[test]
fn a_null_is_no_observation_and_an_indicator_is_null_until_it_is_warm() {
    let mut ema = Running::new(Indicator::new("ema", &[3.0]).unwrap());
    let results: Vec<_> = [Some(1.0), None, Some(2.0), Some(f64::NAN), Some(6.0), None, Some(7.0)]
        .into_iter()
        .map(|value| ema.push(&[value]))
        .collect();
    assert_eq!(results, [None, None, None, None, Some(3.0), None, Some(5.0)]);
    let mut change = Running::new(Indicator::new("pct_change", &[]).unwrap());
    assert_eq!(change.push(&[Some(0.0)]), None);
    assert_eq!(change.push(&[Some(5.0)]), None, "a growth from zero has no finite value");
    assert_eq!(change.push(&[Some(6.0)]), Some(6.0 / 5.0 - 1.0));
}

#[test]
fn rate_is_per_second_and_a_counter_that_fell_was_reset() {
    let mut rate = Running::new(Indicator::new("rate", &[]).unwrap());
    let second = |s: f64| Some(s * 1e6);
    assert_eq!(rate.push(&[Some(100.0), second(0.0)]), None);
    assert_eq!(rate.push(&[Some(130.0), second(60.0)]), Some(0.5));
    assert_eq!(rate.push(&[Some(30.0), second(120.0)]), Some(0.5));
    assert_eq!(rate.push(&[Some(31.0), second(120.0)]), None);
}

#[test]
fn a_market_without_losses_has_an_rsi_of_100_and_an_even_series_no_zscore() {
    let mut rsi = Running::new(Indicator::new("rsi", &[2.0]).unwrap());
    assert_eq!([1.0, 2.0, 3.0].map(|x| rsi.push(&[Some(x)])), [None, None, Some(100.0)]);
    let mut zscore = Running::new(Indicator::new("zscore", &[2.0]).unwrap());
    assert_eq!([4.0, 4.0, 5.0].map(|x| zscore.push(&[Some(x)])), [None, None, Some(1.0)]);
}

#[test]
fn parameters_that_make_no_sense_are_refused_with_the_usage() {
    let refused = |name, parameters: &[f64]| Indicator::new(name, parameters).unwrap_err().to_string();
    assert!(refused("ema", &[0.0]).contains("from 1 to"));
    assert!(refused("ema", &[LENGTH_MAX as f64 + 1.0]).contains("from 1 to"));
    assert!(refused("ema", &[2.5]).contains("ema(x, n)"));
    assert!(refused("rsi", &[]).contains("write rsi(x, n)"));
    assert!(refused("macd", &[26.0, 12.0]).contains("fast must be smaller"));
    assert!(refused("bollinger_upper", &[20.0, -1.0]).contains("k must be zero or above"));
    assert_eq!(Indicator::new("sma", &[]), Err(IndicatorError::Unknown("sma".to_owned())));
}
