//! Instants in files and frames: numbers in a unit, or dates as people and exchanges write them.

use crate::decode::TsUnit;
use chrono::{DateTime, NaiveDate, NaiveDateTime};
use engine::event::Micros;

/// Digits after the point when a count of `unit`s is written in seconds.
fn digits(unit: TsUnit) -> i32 {
    match unit {
        TsUnit::Seconds => 0,
        TsUnit::Millis => 3,
        TsUnit::Micros => 6,
        TsUnit::Nanos => 9,
    }
}

/// The instant `count` units after the epoch, rounded down to a microsecond. `None` when it is out of range.
pub(crate) fn instant_of_count(count: i64, unit: TsUnit) -> Option<Micros> {
    match unit {
        TsUnit::Seconds => count.checked_mul(1_000_000).map(Micros),
        TsUnit::Millis => count.checked_mul(1_000).map(Micros),
        TsUnit::Micros => Some(Micros(count)),
        TsUnit::Nanos => Some(Micros(count.div_euclid(1_000))),
    }
}

/// An instant written as a decimal number of units (`1618678142.557535`), exact to the microsecond.
/// `None` when the text is no number or the instant is out of range.
pub(crate) fn instant_of_number(text: &str, unit: TsUnit) -> Option<Micros> {
    if let Ok(count) = text.parse() {
        return instant_of_count(count, unit);
    }
    let decimal = text.split_once('.').filter(|(_, fraction)| fraction.bytes().all(|b| b.is_ascii_digit()));
    let Some((whole, fraction)) = decimal else {
        return instant_of_float(text.parse().ok()?, unit);
    };
    let whole_units = i128::from(whole.parse::<i64>().ok()?);
    let micro_digits = 6 - digits(unit);
    if micro_digits < 0 {
        let unit_micros = 10i128.pow(micro_digits.unsigned_abs());
        return i64::try_from(whole_units.div_euclid(unit_micros)).ok().map(Micros);
    }
    // `.5` with six digits for microseconds is 500000; further digits are less than a microsecond
    let kept = fraction.bytes().chain(std::iter::repeat(b'0')).take(micro_digits as usize);
    let part = kept.fold(0i128, |part, digit| part * 10 + i128::from(digit - b'0'));
    let signed = if whole.starts_with('-') { -part } else { part };
    i64::try_from(whole_units * 10i128.pow(micro_digits as u32) + signed).ok().map(Micros)
}

/// An instant as a float of units: what spreadsheets and `double` columns hold.
pub(crate) fn instant_of_float(count: f64, unit: TsUnit) -> Option<Micros> {
    let micros = count * 10f64.powi(6 - digits(unit));
    (micros.abs() < i64::MAX as f64).then_some(Micros(micros.floor() as i64))
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
            let unit: TsUnit = unit.parse().unwrap();
            assert_eq!(instant_of_number(text, unit), Some(Micros(micros)), "{text} {unit:?}");
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
        assert_eq!(instant_of_number("9223372036854775807", TsUnit::Seconds), None);
        assert_eq!(instant_of_number("9223372036854775807.5", TsUnit::Seconds), None);
        assert_eq!(instant_of_float(f64::NAN, TsUnit::Seconds), None);
        assert_eq!(instant_of_float(f64::INFINITY, TsUnit::Millis), None);
    }
}
