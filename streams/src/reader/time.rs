//! Instants in files and frames: numbers in a unit, or dates as people and exchanges write them.

use chrono::{DateTime, NaiveDate, NaiveDateTime};
use engine::event::Micros;

/// What one step of a numeric time column is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TimeUnit {
    Seconds,
    #[default]
    Millis,
    Micros,
    Nanos,
}

impl std::str::FromStr for TimeUnit {
    type Err = TimeUnitError;
    fn from_str(text: &str) -> Result<Self, TimeUnitError> {
        Ok(match text {
            "s" => TimeUnit::Seconds,
            "ms" => TimeUnit::Millis,
            "us" => TimeUnit::Micros,
            "ns" => TimeUnit::Nanos,
            _ => return Err(TimeUnitError(text.to_owned())),
        })
    }
}

/// A time unit nobody knows.
#[derive(Debug, thiserror::Error)]
#[error("time unit `{0}` is none of s, ms, us, ns; RFC 3339 text needs no unit")]
pub struct TimeUnitError(String);

impl TimeUnit {
    /// Digits after the point when the unit is written in seconds.
    fn digits(self) -> u32 {
        match self {
            TimeUnit::Seconds => 0,
            TimeUnit::Millis => 3,
            TimeUnit::Micros => 6,
            TimeUnit::Nanos => 9,
        }
    }

    /// The instant `count` units after the epoch, rounded down to a microsecond. `None` when it is out of range.
    pub(crate) fn instant(self, count: i64) -> Option<Micros> {
        match self {
            TimeUnit::Seconds => count.checked_mul(1_000_000).map(Micros),
            TimeUnit::Millis => count.checked_mul(1_000).map(Micros),
            TimeUnit::Micros => Some(Micros(count)),
            TimeUnit::Nanos => Some(Micros(count.div_euclid(1_000))),
        }
    }

    /// An instant written as a decimal number of units (`1618678142.557535`), exact to the microsecond.
    /// `None` when the text is no plain number or the instant is out of range.
    pub(crate) fn instant_of_number(self, text: &str) -> Option<Micros> {
        if let Ok(count) = text.parse() {
            return self.instant(count);
        }
        let Some((whole, fraction)) = text.split_once('.') else {
            return self.instant_of_float(text.parse().ok()?);
        };
        if fraction.is_empty() || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return self.instant_of_float(text.parse().ok()?);
        }
        let negative = whole.starts_with('-');
        let seconds_scale = 6 - self.digits() as i32;
        let mut micros = i128::from(whole.parse::<i64>().ok()?) * 10i128.pow(seconds_scale.max(0) as u32);
        for (place, digit) in fraction.bytes().take(seconds_scale.max(0) as usize).enumerate() {
            let part = i128::from(digit - b'0') * 10i128.pow(seconds_scale as u32 - 1 - place as u32);
            micros += if negative { -part } else { part };
        }
        if seconds_scale < 0 {
            micros = micros.div_euclid(10i128.pow(seconds_scale.unsigned_abs()));
        }
        i64::try_from(micros).ok().map(Micros)
    }

    /// An instant as a float of units: what spreadsheets and `double` columns hold.
    pub(crate) fn instant_of_float(self, count: f64) -> Option<Micros> {
        let micros = count * 10f64.powi(6 - self.digits() as i32);
        (micros.abs() < i64::MAX as f64).then_some(Micros(micros.floor() as i64))
    }
}

/// An instant written as RFC 3339, or as `2022-01-31 23:59:59.123` or `2022-01-31`, which are then UTC.
pub(crate) fn instant_of_text(text: &str) -> Option<Micros> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(Micros(time.timestamp_micros()));
    }
    for format in ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M"] {
        if let Ok(time) = NaiveDateTime::parse_from_str(text, format) {
            return Some(Micros(time.and_utc().timestamp_micros()));
        }
    }
    let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
    Some(Micros(date.and_hms_opt(0, 0, 0)?.and_utc().timestamp_micros()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_any_unit_is_exact_to_the_microsecond() {
        let check = |unit: &str, text: &str, micros: i64| {
            let unit: TimeUnit = unit.parse().unwrap();
            assert_eq!(unit.instant_of_number(text), Some(Micros(micros)), "{text} {unit:?}");
        };
        check("s", "1618678142", 1_618_678_142_000_000);
        check("s", "1618678142.557535", 1_618_678_142_557_535);
        check("s", "-1.5", -1_500_000);
        check("s", "-0.5", -500_000);
        check("ms", "1723161255342", 1_723_161_255_342_000);
        check("ms", "1.25", 1_250);
        check("us", "7", 7);
        check("us", "7.9", 7);
        check("ns", "1723161253937085768", 1_723_161_253_937_085);
        check("ns", "-1", -1);
        check("s", "1.6e9", 1_600_000_000_000_000);
    }

    #[test]
    fn a_date_without_an_offset_is_utc() {
        let expected = Some(Micros(1_618_677_817_089_723));
        for text in [
            "2021-04-17T16:43:37.089723Z",
            "2021-04-17T18:43:37.089723+02:00",
            "2021-04-17 16:43:37.089723",
            "2021-04-17T16:43:37.089723",
        ] {
            assert_eq!(instant_of_text(text), expected, "{text}");
        }
        assert_eq!(instant_of_text("1970-01-02"), Some(Micros(86_400_000_000)));
        assert_eq!(instant_of_text("1970-01-01 00:01"), Some(Micros(60_000_000)));
        assert_eq!(instant_of_text("yesterday"), None);
    }

    #[test]
    fn an_instant_beyond_the_range_is_none_and_no_overflow() {
        assert_eq!(TimeUnit::Seconds.instant_of_number("9223372036854775807"), None);
        assert_eq!(TimeUnit::Seconds.instant_of_number("9223372036854775807.5"), None);
        assert_eq!(TimeUnit::Seconds.instant_of_float(f64::NAN), None);
        assert_eq!(TimeUnit::Millis.instant_of_float(f64::INFINITY), None);
    }
}
