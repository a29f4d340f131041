//! Market and product indicators: one value in, one value out, state of a few numbers.
//!
//! An observation is a finite number. NULL, NaN and infinity are no observation: the result of such a row is NULL and
//! the state stays as it was. Before an indicator has seen the observations it needs (its warm-up), and where its
//! formula has no finite value, the result is NULL.

use std::collections::VecDeque;

/// Which of MACD's three lines.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MacdLine {
    Value,
    Signal,
    Histogram,
}

/// An indicator with its parameters.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Indicator {
    /// `ema(x, n)`: exponential moving average, in the unit of x. The first value, at the n-th observation, is their
    /// mean; then `ema = ema + (x − ema) · 2 / (n + 1)`.
    ///
    /// Source: S. B. Achelis, "Technical Analysis from A to Z", 2nd ed. (2000), "Moving Averages".
    Ema { n: usize },
    /// `rsi(x, n)`: relative strength index, 0 to 100. `100 − 100 / (1 + gain / loss)` over the changes of x, gain and
    /// loss averaged as Wilder does: the mean of the first n, then `average + (new − average) / n`. First value at the
    /// (n + 1)-th observation; 100 where there was no loss.
    ///
    /// Source: J. W. Wilder, "New Concepts in Technical Trading Systems" (1978), section VI.
    Rsi { n: usize },
    /// `macd(x, fast, slow, signal)`, in the unit of x: `ema(x, fast) − ema(x, slow)`, from the slow-th observation on;
    /// `macd_signal`: the EMA over `signal` values of it; `macd_histogram`: the first minus the second.
    ///
    /// Source: G. Appel, "Technical Analysis: Power Tools for Active Investors" (2005), chapter 8.
    Macd { fast: usize, slow: usize, signal: usize, line: MacdLine },
    /// `bollinger_middle(x, n)`, in the unit of x: mean of the last n observations; `bollinger_upper` and `_lower(x, n, k)`:
    /// the mean ± k population standard deviations of the same n. `sigmas` is +k, −k or 0.
    ///
    /// Source: J. Bollinger, "Bollinger on Bollinger Bands" (2001), chapter 7.
    Bollinger { n: usize, sigmas: f64 },
    /// `atr(high, low, close, n)`: average true range, in the unit of the prices. True range is the greatest of
    /// `high − low`, `|high − close before|` and `|low − close before|` (of the first bar `high − low`), averaged as
    /// Wilder does: the mean of the first n, then `average + (new − average) / n`.
    ///
    /// Source: J. W. Wilder, "New Concepts in Technical Trading Systems" (1978), section III.
    Atr { n: usize },
    /// `realized_volatility(x, n)`: `√Σ r²` over the last n logarithmic returns `r = ln(x / x before)`, a fraction for
    /// the time of n rows, not annualised. First value at the (n + 1)-th observation; x must be above zero, others are
    /// no observation.
    ///
    /// Source: T. G. Andersen, T. Bollerslev, "Answering the Skeptics", International Economic Review 39 (1998).
    RealizedVolatility { n: usize },
    /// `zscore(x, n)`: how many population standard deviations x is above the mean of the last n observations, its own
    /// among them. NULL where they are all equal.
    ///
    /// Source: NIST/SEMATECH, "e-Handbook of Statistical Methods" (2012), 1.3.5.17.
    Zscore { n: usize },
    /// `pct_change(x, n)`: `x / x n observations before − 1`, a fraction (0.01 is one percent): the simple return.
    ///
    /// Source: J. Y. Campbell, A. W. Lo, A. C. MacKinlay, "The Econometrics of Financial Markets" (1997), section 1.4.
    PctChange { n: usize },
    /// `drawdown(x)`: `x / greatest x so far − 1`, a fraction from 0 down to −1, of a value above zero such as a price
    /// or an account. Its minimum is the maximum drawdown.
    ///
    /// Source: M. Magdon-Ismail, A. Atiya, "Maximum Drawdown", Risk 17 (2004).
    Drawdown,
    /// `retention(x)`: `x / first x`, a fraction: of a cohort's users in each period, partitioned by cohort, the share
    /// that is still there (the survivor function). NULL where the first was zero.
    ///
    /// Source: P. S. Fader, B. G. S. Hardie, "How to Project Customer Retention", Journal of Interactive Marketing 21
    /// (2007).
    Retention,
    /// `rate(x, ts)`: growth of a counter per second, from the observation before to this one. A counter that fell was
    /// reset to zero in between, so the growth is then x itself. NULL where time did not go on.
    ///
    /// Source: Prometheus, `irate()`, in "Query functions".
    Rate,
}

/// An indicator's name as SQL writes it, and how it is called.
pub struct Signature {
    pub name: &'static str,
    /// Columns it reads, before its parameters.
    pub values: usize,
    /// Least and most number of constant parameters.
    pub parameters: (usize, usize),
    pub usage: &'static str,
}

/// Every indicator there is.
pub const SIGNATURES: [Signature; 15] = [
    Signature { name: "ema", values: 1, parameters: (1, 1), usage: "ema(x, n)" },
    Signature { name: "rsi", values: 1, parameters: (1, 1), usage: "rsi(x, n)" },
    Signature { name: "macd", values: 1, parameters: (2, 3), usage: "macd(x, fast, slow)" },
    Signature { name: "macd_signal", values: 1, parameters: (3, 3), usage: "macd_signal(x, fast, slow, signal)" },
    Signature { name: "macd_histogram", values: 1, parameters: (3, 3), usage: "macd_histogram(x, fast, slow, signal)" },
    Signature { name: "bollinger_upper", values: 1, parameters: (2, 2), usage: "bollinger_upper(x, n, k)" },
    Signature { name: "bollinger_middle", values: 1, parameters: (1, 2), usage: "bollinger_middle(x, n)" },
    Signature { name: "bollinger_lower", values: 1, parameters: (2, 2), usage: "bollinger_lower(x, n, k)" },
    Signature { name: "atr", values: 3, parameters: (1, 1), usage: "atr(high, low, close, n)" },
    Signature { name: "realized_volatility", values: 1, parameters: (1, 1), usage: "realized_volatility(x, n)" },
    Signature { name: "zscore", values: 1, parameters: (1, 1), usage: "zscore(x, n)" },
    Signature { name: "pct_change", values: 1, parameters: (0, 1), usage: "pct_change(x[, n])" },
    Signature { name: "drawdown", values: 1, parameters: (0, 0), usage: "drawdown(x)" },
    Signature { name: "retention", values: 1, parameters: (0, 0), usage: "retention(x)" },
    Signature { name: "rate", values: 2, parameters: (0, 0), usage: "rate(x)" },
];

/// The most observations an indicator may look back over: bounds its state and its warm-up.
pub const LENGTH_MAX: usize = 10_000;

/// Why an indicator cannot be made.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum IndicatorError {
    #[error("there is no indicator `{0}`")]
    Unknown(String),
    #[error("write {usage}: {found} constant parameters were given")]
    Parameters { usage: &'static str, found: usize },
    #[error("in {usage}, {found} is no number of rows: give a whole number from 1 to {LENGTH_MAX}")]
    Length { usage: &'static str, found: f64 },
    #[error("in {usage}, fast must be smaller than slow")]
    FastAndSlow { usage: &'static str },
    #[error("in {usage}, k must be zero or above and finite, not {found}")]
    Sigmas { usage: &'static str, found: f64 },
}

/// How the function of that name is called; `None` where it is no indicator.
pub fn signature(name: &str) -> Option<&'static Signature> {
    SIGNATURES.iter().find(|signature| signature.name == name)
}

impl Indicator {
    /// The indicator `name` with its constant parameters, in the order of its usage.
    pub fn new(name: &str, parameters: &[f64]) -> Result<Indicator, IndicatorError> {
        let Some(&Signature { usage, parameters: (least, most), .. }) = signature(name) else {
            return Err(IndicatorError::Unknown(name.to_owned()));
        };
        if parameters.len() < least || parameters.len() > most {
            return Err(IndicatorError::Parameters { usage, found: parameters.len() });
        }
        let length = |at: usize, default: usize| match parameters.get(at) {
            None => Ok(default),
            Some(&n) if n >= 1.0 && n <= LENGTH_MAX as f64 && n.fract() == 0.0 => Ok(n as usize),
            Some(&found) => Err(IndicatorError::Length { usage, found }),
        };
        let macd = |line| {
            let (fast, slow, signal) = (length(0, 12)?, length(1, 26)?, length(2, 9)?);
            if fast >= slow {
                return Err(IndicatorError::FastAndSlow { usage });
            }
            Ok(Indicator::Macd { fast, slow, signal, line })
        };
        let bollinger = |sign: f64| {
            let k = parameters.get(1).copied().unwrap_or(0.0);
            if !(k >= 0.0 && k.is_finite()) {
                return Err(IndicatorError::Sigmas { usage, found: k });
            }
            Ok(Indicator::Bollinger { n: length(0, 20)?, sigmas: sign * k })
        };
        Ok(match name {
            "ema" => Indicator::Ema { n: length(0, 1)? },
            "rsi" => Indicator::Rsi { n: length(0, 1)? },
            "macd" => macd(MacdLine::Value)?,
            "macd_signal" => macd(MacdLine::Signal)?,
            "macd_histogram" => macd(MacdLine::Histogram)?,
            "bollinger_upper" => bollinger(1.0)?,
            "bollinger_middle" => bollinger(0.0)?,
            "bollinger_lower" => bollinger(-1.0)?,
            "atr" => Indicator::Atr { n: length(0, 1)? },
            "realized_volatility" => Indicator::RealizedVolatility { n: length(0, 1)? },
            "zscore" => Indicator::Zscore { n: length(0, 1)? },
            "pct_change" => Indicator::PctChange { n: length(0, 1)? },
            "drawdown" => Indicator::Drawdown,
            "retention" => Indicator::Retention,
            "rate" => Indicator::Rate,
            other => return Err(IndicatorError::Unknown(other.to_owned())),
        })
    }
}

/// A running average: the plain mean of its first `n` values, then moved towards each new one by `weight`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Smoothed {
    seen: usize,
    value: f64, // the sum until n were seen
}

impl Smoothed {
    fn push(&mut self, x: f64, n: usize, weight: f64) -> Option<f64> {
        if self.seen < n {
            self.seen += 1;
            self.value += x;
            if self.seen == n {
                self.value /= n as f64;
            }
        } else {
            self.value += weight * (x - self.value);
        }
        (self.seen == n).then_some(self.value)
    }

    fn exponential(&mut self, x: f64, n: usize) -> Option<f64> {
        self.push(x, n, 2.0 / (n as f64 + 1.0))
    }

    fn wilder(&mut self, x: f64, n: usize) -> Option<f64> {
        self.push(x, n, 1.0 / n as f64)
    }
}

/// An indicator and what it has seen of one series.
#[derive(Clone, Debug, PartialEq)]
pub struct Running {
    indicator: Indicator,
    smoothed: [Smoothed; 3],
    /// The observation before, the greatest so far (drawdown), the first (retention), or the close before (atr).
    before: Option<f64>,
    /// When the observation before was.
    before_at: f64,
    recent: VecDeque<f64>,
}

impl Running {
    /// Before the first observation.
    pub fn new(indicator: Indicator) -> Running {
        Running { indicator, smoothed: Default::default(), before: None, before_at: 0.0, recent: VecDeque::new() }
    }

    /// The result after the next row's values, as many as [`Signature::values`]. Times are microseconds.
    pub fn push(&mut self, values: &[Option<f64>]) -> Option<f64> {
        let mut row = [0.0; 3];
        for (at, value) in values.iter().enumerate() {
            row[at] = value.filter(|value| value.is_finite())?;
        }
        self.observe(row).filter(|result| result.is_finite())
    }

    fn observe(&mut self, [x, second, third]: [f64; 3]) -> Option<f64> {
        match self.indicator {
            Indicator::Ema { n } => self.smoothed[0].exponential(x, n),
            Indicator::Rsi { n } => {
                let change = x - self.before.replace(x)?;
                let gain = self.smoothed[0].wilder(change.max(0.0), n);
                let loss = self.smoothed[1].wilder((-change).max(0.0), n);
                let (gain, loss) = (gain?, loss?);
                Some(if loss == 0.0 { 100.0 } else { 100.0 - 100.0 / (1.0 + gain / loss) })
            }
            Indicator::Macd { fast, slow, signal, line } => {
                let fast = self.smoothed[0].exponential(x, fast);
                let slow = self.smoothed[1].exponential(x, slow)?;
                let value = fast? - slow;
                let signal = self.smoothed[2].exponential(value, signal);
                match line {
                    MacdLine::Value => Some(value),
                    MacdLine::Signal => signal,
                    MacdLine::Histogram => Some(value - signal?),
                }
            }
            Indicator::Bollinger { n, sigmas } => {
                let (mean, deviation) = self.mean_and_deviation(x, n)?;
                Some(mean + sigmas * deviation)
            }
            Indicator::Zscore { n } => {
                let (mean, deviation) = self.mean_and_deviation(x, n)?;
                (deviation > 0.0).then(|| (x - mean) / deviation)
            }
            Indicator::Atr { n } => {
                let (high, low, close) = (x, second, third);
                let mut range = high - low;
                if let Some(before) = self.before.replace(close) {
                    range = range.max((high - before).abs()).max((low - before).abs());
                }
                self.smoothed[0].wilder(range, n)
            }
            Indicator::RealizedVolatility { n } => {
                if x <= 0.0 {
                    return None;
                }
                let change = (x / self.before.replace(x)?).ln();
                self.keep(change, n);
                // each time from its parts: a running sum would drift
                (self.recent.len() == n).then(|| self.recent.iter().map(|r| r * r).sum::<f64>().sqrt())
            }
            Indicator::PctChange { n } => {
                self.keep(x, n + 1);
                (self.recent.len() == n + 1).then(|| x / self.recent[0] - 1.0)
            }
            Indicator::Drawdown => {
                let peak = self.before.map_or(x, |before| before.max(x));
                self.before = Some(peak);
                Some(x / peak - 1.0)
            }
            Indicator::Retention => Some(x / *self.before.get_or_insert(x)),
            Indicator::Rate => {
                let elapsed = (second - std::mem::replace(&mut self.before_at, second)) / 1e6;
                let before = self.before.replace(x)?;
                let growth = if x < before { x } else { x - before };
                (elapsed > 0.0).then(|| growth / elapsed)
            }
        }
    }

    fn keep(&mut self, x: f64, most: usize) {
        if self.recent.len() == most {
            self.recent.pop_front();
        }
        self.recent.push_back(x);
    }

    /// Mean and population standard deviation of the last n, computed from them each time: a running sum would drift.
    fn mean_and_deviation(&mut self, x: f64, n: usize) -> Option<(f64, f64)> {
        self.keep(x, n);
        if self.recent.len() < n {
            return None;
        }
        let mean = self.recent.iter().sum::<f64>() / n as f64;
        let variance = self.recent.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n as f64;
        Some((mean, variance.sqrt()))
    }

    /// The state as numbers, for [`Running::load`].
    pub(crate) fn save(&self) -> Vec<f64> {
        let head = [self.before.unwrap_or(f64::NAN), self.before_at];
        let smoothed = self.smoothed.iter().flat_map(|s| [s.seen as f64, s.value]);
        head.into_iter().chain(smoothed).chain(self.recent.iter().copied()).collect()
    }

    /// The state that [`Running::save`] gave; `None` where the numbers are no such state.
    pub(crate) fn load(indicator: Indicator, numbers: &[f64]) -> Option<Running> {
        let (head, rest) = numbers.split_first_chunk::<2>()?;
        let (smoothed, recent) = rest.split_first_chunk::<6>()?;
        let smoothed =
            std::array::from_fn(|at| Smoothed { seen: smoothed[2 * at] as usize, value: smoothed[2 * at + 1] });
        let before = (!head[0].is_nan()).then_some(head[0]);
        Some(Running { indicator, smoothed, before, before_at: head[1], recent: recent.iter().copied().collect() })
    }

    /// Bytes on the heap.
    pub(crate) fn bytes(&self) -> usize {
        self.recent.capacity() * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_is_the_share_of_the_first() {
        let mut running = Running::new(Indicator::new("retention", &[]).unwrap());
        let shares: Vec<_> = [Some(40.0), Some(10.0), None, Some(20.0)].map(|x| running.push(&[x])).into();
        assert_eq!(shares, [Some(1.0), Some(0.25), None, Some(0.5)]);
        let mut of_none = Running::new(Indicator::Retention);
        assert_eq!([Some(0.0), Some(3.0)].map(|x| of_none.push(&[x])), [None, None]);
    }
}
