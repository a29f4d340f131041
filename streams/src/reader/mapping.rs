//! How the columns of a file become the columns of a stream.

use crate::decode::TsUnit;

/// What is taken from a file and under which name. The default takes every column under its own name,
/// with event time in `ts` (milliseconds or RFC 3339). Once [`Mapping::column`] names a column, only
/// named columns are taken, and those that already bear the name of a column of the stream, `ts` or `id`.
#[derive(Clone, Debug, Default)]
pub struct Mapping {
    pub(super) columns: Vec<Target>,
    pub(super) ts: Option<String>,
    pub(super) unit: TsUnit,
}

/// One column of the stream and where its values come from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    pub name: String,
    pub from: From,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum From {
    Column { source: String, scale: Option<Scale> },
    Constant(String),
}

/// Multiplies a number. A factor of 0.1, 0.01, … divides by the power of ten instead, which is
/// exact to the last digit: 1679067 * 0.0001 is 167.9067 and not 167.90670000000003.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    Times(f64),
    Over(f64),
}

impl Scale {
    fn new(factor: f64) -> Scale {
        // powers of ten up to 10^22 are exact in a double
        let power = (1..=22).map(|exponent| 10f64.powi(exponent)).find(|power| 1.0 / power == factor);
        power.map_or(Scale::Times(factor), Scale::Over)
    }

    pub(super) fn apply(self, value: f64) -> f64 {
        match self {
            Scale::Times(factor) => value * factor,
            Scale::Over(power) => value / power,
        }
    }
}

/// Why a mapping was refused.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    #[error("mapping `{0}` must be target=source, target=source*factor or target='text'")]
    Shape(String),
    #[error("mapping `{mapping}`: factor `{factor}` is not a finite number")]
    Factor { mapping: String, factor: String },
    #[error("mapping `{mapping}`: `{target}` already has a source; keep one of them")]
    Twice { mapping: String, target: String },
    #[error("{0}; RFC 3339 text needs no unit")]
    Unit(String),
}

impl Mapping {
    /// Adds one column: `target=source`, `target=source*factor` (numbers) or `target='text'` (the same in every
    /// event). `ts=source` takes event time from a column whose unit is set by [`Mapping::time`] or is milliseconds.
    pub fn column(mut self, text: &str) -> Result<Mapping, MappingError> {
        let shape = || MappingError::Shape(text.to_owned());
        let (name, from) = text.split_once('=').ok_or_else(shape)?;
        let (name, from) = (name.trim(), from.trim());
        if name.is_empty() || from.is_empty() {
            return Err(shape());
        }
        if self.columns.iter().any(|column| column.name == name) || (name == "ts" && self.ts.is_some()) {
            return Err(MappingError::Twice { mapping: text.to_owned(), target: name.to_owned() });
        }
        let from = match from.strip_prefix('\'') {
            Some(quoted) => From::Constant(quoted.strip_suffix('\'').ok_or_else(shape)?.to_owned()),
            None => match from.rsplit_once('*') {
                Some((source, factor)) => {
                    let bad = || MappingError::Factor { mapping: text.to_owned(), factor: factor.trim().to_owned() };
                    let factor: f64 = factor.trim().parse().map_err(|_| bad())?;
                    if !factor.is_finite() {
                        return Err(bad());
                    }
                    From::Column { source: source.trim().to_owned(), scale: Some(Scale::new(factor)) }
                }
                None => From::Column { source: from.to_owned(), scale: None },
            },
        };
        match from {
            From::Column { source, scale: None } if name == "ts" => self.ts = Some(source),
            _ if name == "ts" => return Err(shape()), // a time is neither scaled nor the same for all: it has a unit
            from => self.columns.push(Target { name: name.to_owned(), from }),
        }
        Ok(self)
    }

    /// Takes event time from column `source`. A number counts `unit`s (`s`, `ms`, `us`, `ns`) since the epoch;
    /// text is RFC 3339, or a date and time without an offset, which is UTC.
    pub fn time(mut self, source: &str, unit: &str) -> Result<Mapping, MappingError> {
        self.unit = unit.parse().map_err(MappingError::Unit)?;
        self.ts = Some(source.to_owned());
        Ok(self)
    }

    /// The column that event time comes from.
    pub(super) fn ts_source(&self) -> &str {
        self.ts.as_deref().unwrap_or("ts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_renames_scales_and_sets_constants() {
        let mapping = Mapping::default()
            .column("price = price_e4*0.0001")
            .and_then(|m| m.column("qty=size"))
            .and_then(|m| m.column("symbol='SPY'"))
            .and_then(|m| m.column("ts=when"))
            .unwrap();
        let names: Vec<&str> = mapping.columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["price", "qty", "symbol"]);
        let price = From::Column { source: "price_e4".into(), scale: Some(Scale::Over(1e4)) };
        assert_eq!(mapping.columns[0].from, price);
        assert_eq!(mapping.columns[2].from, From::Constant("SPY".into()));
        assert_eq!(mapping.ts_source(), "when");
    }

    #[test]
    fn scaling_by_a_power_of_ten_is_exact() {
        assert_eq!(Scale::new(0.0001).apply(1_679_067.0), 167.9067);
        assert_eq!(Scale::new(0.01).apply(29.0), 0.29);
        assert_eq!(Scale::new(2.5).apply(2.0), 5.0);
    }

    #[test]
    fn a_bad_mapping_says_what_a_good_one_is() {
        let check = |text: &str, message: &str| {
            let error = Mapping::default().column("a=b").unwrap().column(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        };
        check("price", "target=source*factor");
        check("=x", "target=source");
        check("price='open", "target='text'");
        check("price=x*big", "factor `big`");
        check("price=x*inf", "not a finite number");
        check("a=c", "already has a source");
        check("ts=t*2", "target=source");
        assert!(Mapping::default().time("t", "minutes").unwrap_err().to_string().contains("s, ms, us, ns"));
    }
}
