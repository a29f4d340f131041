//! One column of aggregate state for all keys of a pane: our own lean form for the common
//! aggregates, DataFusion's accumulators for every other.

use crate::program::Arguments;
use crate::runs::Runs;
use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, UInt32Array};
use arrow::buffer::NullBuffer;
use arrow::compute;
use arrow::datatypes::{DataType, FieldRef, Float64Type, Int64Type};
use datafusion_common::{Result, ScalarValue, exec_err};
use datafusion_expr::Accumulator;
use datafusion_physical_expr::aggregate::AggregateFunctionExpr;
use std::borrow::Cow;
use std::sync::Arc;

/// Place of a key within a pane.
pub(crate) type Slot = u32;

/// How an aggregate call is computed; chosen once when the program is built.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Count,
    /// Sum and average of doubles, compensated (Neumaier 1974), so that the order of events and
    /// the length of a window do not show in the result.
    SumFloat,
    AvgFloat,
    SumInt,
    MinFloat,
    MaxFloat,
    MinInt,
    MaxInt,
    Any(Arc<AggregateFunctionExpr>),
}

impl Kind {
    /// The leanest way to compute `call`, whose first argument has the type `input`.
    pub(crate) fn of(call: &Arc<AggregateFunctionExpr>, input: Option<&DataType>) -> Kind {
        let plain = !call.is_distinct() && call.order_bys().is_empty() && call.expressions().len() <= 1;
        if !plain {
            return Kind::Any(call.clone());
        }
        match (call.fun().name(), input) {
            ("count", _) => Kind::Count,
            ("sum", Some(DataType::Float64)) => Kind::SumFloat,
            ("avg", Some(DataType::Float64)) => Kind::AvgFloat,
            ("sum", Some(DataType::Int64)) => Kind::SumInt,
            ("min", Some(DataType::Float64)) => Kind::MinFloat,
            ("max", Some(DataType::Float64)) => Kind::MaxFloat,
            ("min", Some(DataType::Int64)) => Kind::MinInt,
            ("max", Some(DataType::Int64)) => Kind::MaxInt,
            _ => Kind::Any(call.clone()),
        }
    }

    /// Types of the columns that [`Column::save`] gives.
    pub(crate) fn state_fields(&self, name: &str) -> Result<Vec<FieldRef>> {
        use arrow::datatypes::Field;
        let field = |suffix: &str, kind| Arc::new(Field::new(format!("{name}.{suffix}"), kind, true));
        Ok(match self {
            Kind::Count => vec![field("count", DataType::Int64)],
            Kind::SumFloat | Kind::AvgFloat => vec![
                field("sum", DataType::Float64),
                field("compensation", DataType::Float64),
                field("count", DataType::Int64),
            ],
            Kind::SumInt => {
                vec![field("high", DataType::Int64), field("low", DataType::Int64), field("count", DataType::Int64)]
            }
            Kind::MinFloat | Kind::MaxFloat => vec![field("value", DataType::Float64)],
            Kind::MinInt | Kind::MaxInt => vec![field("value", DataType::Int64)],
            Kind::Any(call) => {
                let state = call.state_fields()?;
                state.iter().enumerate().map(|(i, f)| field(&i.to_string(), f.data_type().clone())).collect()
            }
        })
    }

    pub(crate) fn column(&self) -> Column {
        match self {
            Kind::Count => Column::Count(Vec::new()),
            Kind::SumFloat => Column::SumFloat(Vec::new()),
            Kind::AvgFloat => Column::AvgFloat(Vec::new()),
            Kind::SumInt => Column::SumInt(Vec::new()),
            Kind::MinFloat => Column::MinFloat(Vec::new()),
            Kind::MaxFloat => Column::MaxFloat(Vec::new()),
            Kind::MinInt => Column::MinInt(Vec::new()),
            Kind::MaxInt => Column::MaxInt(Vec::new()),
            Kind::Any(call) => Column::Any { call: call.clone(), groups: Vec::new() },
        }
    }
}

/// A running sum of doubles with the error of its additions kept beside it.
///
/// Source: A. Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen",
/// ZAMM 54 (1974).
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Sum {
    sum: f64,
    compensation: f64,
    count: i64,
}

impl Sum {
    #[inline]
    fn add(&mut self, value: f64) {
        // the error of the addition as Knuth finds it, without asking which of the two is greater (TAOCP 2, 4.2.2)
        let total = self.sum + value;
        let added = total - self.sum;
        self.compensation += (self.sum - (total - added)) + (value - added);
        self.sum = total;
    }

    fn merge(&mut self, other: &Sum) {
        self.add(other.sum);
        self.compensation += other.compensation;
        self.count += other.count;
    }

    /// The sum; plain where the compensation is not finite (an overflow to infinity stays infinity).
    fn value(&self) -> f64 {
        let exact = self.sum + self.compensation;
        if exact.is_nan() { self.sum } else { exact }
    }
}

#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct IntSum {
    sum: i128, // 2^64 additions of an i64 fit
    count: i64,
}

/// The state of one aggregate call for every slot of a pane.
pub(crate) enum Column {
    Count(Vec<i64>),
    SumFloat(Vec<Sum>),
    AvgFloat(Vec<Sum>),
    SumInt(Vec<IntSum>),
    MinFloat(Vec<Option<f64>>),
    MaxFloat(Vec<Option<f64>>),
    MinInt(Vec<Option<i64>>),
    MaxInt(Vec<Option<i64>>),
    Any { call: Arc<AggregateFunctionExpr>, groups: Vec<Box<dyn Accumulator>> },
}

/// Adds the values of each run of rows to the state in its slot, and their number to its `count`.
#[inline]
fn fold<S: Copy, T: Copy>(
    state: &mut [S],
    slots: &[Slot],
    runs: &Runs,
    values: &[T],
    add: impl Fn(&mut S, T),
    count: impl Fn(&mut S, i64),
) {
    for (&slot, rows) in slots.iter().zip(runs.iter()) {
        let mut held = state[slot as usize];
        rows.iter().for_each(|&row| add(&mut held, values[row as usize]));
        count(&mut held, rows.len() as i64);
        state[slot as usize] = held;
    }
}

fn uncounted<S>(_: &mut S, _: i64) {}

impl Arguments {
    /// Of these runs the rows that the FILTER clause keeps and that are not among `nulls`.
    fn picked<'a>(&self, runs: &'a Runs, nulls: Option<NullBuffer>) -> Cow<'a, Runs> {
        // a filter that is NULL keeps nothing
        let kept = self.keep.as_ref().map(|keep| match keep.nulls() {
            Some(known) => keep.values() & known.inner(),
            None => keep.values().clone(),
        });
        let valid = nulls.filter(|nulls| nulls.null_count() > 0).map(NullBuffer::into_inner);
        match (kept, valid) {
            (None, None) => Cow::Borrowed(runs),
            (Some(mask), None) | (None, Some(mask)) => Cow::Owned(runs.kept(&mask)),
            (Some(kept), Some(valid)) => Cow::Owned(runs.kept(&(&kept & &valid))),
        }
    }
}

// IEEE total order as in Arrow's `min` and `max`, where NaN is the greatest.
fn less(a: f64, b: f64) -> bool {
    a.total_cmp(&b).is_lt()
}

fn pick<T: Copy>(held: &mut Option<T>, value: T, better: impl Fn(T, T) -> bool) {
    if held.is_none_or(|old| better(value, old)) {
        *held = Some(value);
    }
}

impl Column {
    /// Makes room so that every slot below `slots` exists.
    pub(crate) fn grow(&mut self, slots: usize) -> Result<()> {
        match self {
            Column::Count(v) => v.resize(slots, 0),
            Column::SumFloat(v) | Column::AvgFloat(v) => v.resize(slots, Sum::default()),
            Column::SumInt(v) => v.resize(slots, IntSum::default()),
            Column::MinFloat(v) | Column::MaxFloat(v) => v.resize(slots, None),
            Column::MinInt(v) | Column::MaxInt(v) => v.resize(slots, None),
            Column::Any { call, groups } => {
                while groups.len() < slots {
                    groups.push(call.create_accumulator()?);
                }
            }
        }
        Ok(())
    }

    /// Takes in a run of rows for each of `slots`; those that the FILTER clause refuses do not count.
    pub(crate) fn update(&mut self, arguments: &Arguments, slots: &[Slot], runs: &Runs) -> Result<()> {
        // every aggregate of one argument passes over its NULLs; DataFusion's see to theirs
        let nulls = match self {
            Column::Any { .. } => None,
            _ => arguments.values.first().and_then(|values| values.logical_nulls()),
        };
        let runs = arguments.picked(runs, nulls);
        let floats = || arguments.values[0].as_primitive::<Float64Type>().values();
        let ints = || arguments.values[0].as_primitive::<Int64Type>().values();
        match self {
            Column::Count(v) => slots.iter().zip(runs.iter()).for_each(|(&slot, rows)| {
                v[slot as usize] += rows.len() as i64;
            }),
            Column::SumFloat(v) | Column::AvgFloat(v) => {
                fold(v, slots, &runs, floats(), Sum::add, |held, count| held.count += count);
            }
            Column::SumInt(v) => {
                let add = |held: &mut IntSum, value| held.sum += i128::from(value);
                fold(v, slots, &runs, ints(), add, |held, count| held.count += count);
            }
            Column::MinFloat(v) => fold(v, slots, &runs, floats(), |held, x| pick(held, x, less), uncounted),
            Column::MaxFloat(v) => {
                fold(v, slots, &runs, floats(), |held, x| pick(held, x, |a, b| less(b, a)), uncounted)
            }
            Column::MinInt(v) => fold(v, slots, &runs, ints(), |held, x| pick(held, x, |a, b| a < b), uncounted),
            Column::MaxInt(v) => fold(v, slots, &runs, ints(), |held, x| pick(held, x, |a, b| a > b), uncounted),
            Column::Any { groups, .. } => update_any(groups, arguments, slots, &runs)?,
        }
        Ok(())
    }

    /// Adds what `other` holds for its slots `theirs` to the slots `mine` of this column.
    ///
    /// `other` is unchanged in value; DataFusion's accumulators may rearrange themselves.
    pub(crate) fn merge(&mut self, mine: &[Slot], other: &mut Column, theirs: &[Slot]) -> Result<()> {
        let pairs = mine.iter().zip(theirs).map(|(&m, &t)| (m as usize, t as usize));
        match (self, other) {
            (Column::Count(a), Column::Count(b)) => pairs.for_each(|(m, t)| a[m] += b[t]),
            (Column::SumFloat(a), Column::SumFloat(b)) | (Column::AvgFloat(a), Column::AvgFloat(b)) => {
                pairs.for_each(|(m, t)| a[m].merge(&b[t]));
            }
            (Column::SumInt(a), Column::SumInt(b)) => pairs.for_each(|(m, t)| {
                a[m].sum += b[t].sum;
                a[m].count += b[t].count;
            }),
            (Column::MinFloat(a), Column::MinFloat(b)) => {
                pairs.for_each(|(m, t)| b[t].into_iter().for_each(|x| pick(&mut a[m], x, less)));
            }
            (Column::MaxFloat(a), Column::MaxFloat(b)) => {
                pairs.for_each(|(m, t)| b[t].into_iter().for_each(|x| pick(&mut a[m], x, |a, b| less(b, a))));
            }
            (Column::MinInt(a), Column::MinInt(b)) => {
                pairs.for_each(|(m, t)| b[t].into_iter().for_each(|x| pick(&mut a[m], x, |a, b| a < b)));
            }
            (Column::MaxInt(a), Column::MaxInt(b)) => {
                pairs.for_each(|(m, t)| b[t].into_iter().for_each(|x| pick(&mut a[m], x, |a, b| a > b)));
            }
            (Column::Any { groups: a, .. }, Column::Any { call, groups: b }) => {
                for (m, t) in pairs {
                    let state = take_state(call, &mut b[t])?;
                    a[m].merge_batch(&arrays_of(&state)?)?;
                }
            }
            _ => unreachable!("columns of one program have one kind at one place"),
        }
        Ok(())
    }

    /// Adds what the slots `theirs` hold to the slots `mine`, all of this column.
    pub(crate) fn join(&mut self, mine: &[Slot], theirs: &[Slot]) -> Result<()> {
        fn each<T: Copy>(v: &mut [T], mine: &[Slot], theirs: &[Slot], add: impl Fn(&mut T, T)) {
            for (&m, &t) in mine.iter().zip(theirs) {
                let other = v[t as usize];
                add(&mut v[m as usize], other);
            }
        }
        match self {
            Column::Count(v) => each(v, mine, theirs, |mine, other| *mine += other),
            Column::SumFloat(v) | Column::AvgFloat(v) => each(v, mine, theirs, |mine, other| mine.merge(&other)),
            Column::SumInt(v) => each(v, mine, theirs, |mine, other| {
                mine.sum += other.sum;
                mine.count += other.count;
            }),
            Column::MinFloat(v) => each(v, mine, theirs, |mine, other| {
                other.into_iter().for_each(|x| pick(mine, x, less));
            }),
            Column::MaxFloat(v) => each(v, mine, theirs, |mine, other| {
                other.into_iter().for_each(|x| pick(mine, x, |a, b| less(b, a)));
            }),
            Column::MinInt(v) => each(v, mine, theirs, |mine, other| {
                other.into_iter().for_each(|x| pick(mine, x, |a, b| a < b));
            }),
            Column::MaxInt(v) => each(v, mine, theirs, |mine, other| {
                other.into_iter().for_each(|x| pick(mine, x, |a, b| a > b));
            }),
            Column::Any { call, groups } => {
                for (&m, &t) in mine.iter().zip(theirs) {
                    let state = take_state(call, &mut groups[t as usize])?;
                    groups[m as usize].merge_batch(&arrays_of(&state)?)?;
                }
            }
        }
        Ok(())
    }

    /// Exchanges what two slots of this column hold.
    pub(crate) fn swap(&mut self, a: Slot, b: Slot) {
        let (a, b) = (a as usize, b as usize);
        match self {
            Column::Count(v) => v.swap(a, b),
            Column::SumFloat(v) | Column::AvgFloat(v) => v.swap(a, b),
            Column::SumInt(v) => v.swap(a, b),
            Column::MinFloat(v) | Column::MaxFloat(v) => v.swap(a, b),
            Column::MinInt(v) | Column::MaxInt(v) => v.swap(a, b),
            Column::Any { groups, .. } => groups.swap(a, b),
        }
    }

    /// Empties a slot, so that it can be used again.
    pub(crate) fn clear(&mut self, slot: Slot) -> Result<()> {
        let at = slot as usize;
        match self {
            Column::Count(v) => v[at] = 0,
            Column::SumFloat(v) | Column::AvgFloat(v) => v[at] = Sum::default(),
            Column::SumInt(v) => v[at] = IntSum::default(),
            Column::MinFloat(v) | Column::MaxFloat(v) => v[at] = None,
            Column::MinInt(v) | Column::MaxInt(v) => v[at] = None,
            Column::Any { call, groups } => groups[at] = call.create_accumulator()?,
        }
        Ok(())
    }

    /// The aggregate's value for each of `slots`; `kind` is the type the program promised.
    pub(crate) fn evaluate(&mut self, slots: &[Slot], kind: &DataType) -> Result<ArrayRef> {
        let at = slots.iter().map(|&slot| slot as usize);
        Ok(match self {
            Column::Count(v) => Arc::new(Int64Array::from_iter_values(at.map(|i| v[i]))),
            Column::SumFloat(v) => {
                Arc::new(Float64Array::from_iter(at.map(|i| (v[i].count > 0).then(|| v[i].value()))))
            }
            Column::AvgFloat(v) => Arc::new(Float64Array::from_iter(
                at.map(|i| (v[i].count > 0).then(|| v[i].value() / v[i].count as f64)),
            )),
            Column::SumInt(v) => {
                let mut sums = Vec::with_capacity(slots.len());
                for i in at {
                    let sum = (v[i].count > 0).then_some(v[i].sum);
                    match sum.map(i64::try_from).transpose() {
                        Ok(sum) => sums.push(sum),
                        Err(_) => {
                            return exec_err!(
                                "integer overflow: a sum of int64 came to {}; cast the argument to double or decimal",
                                v[i].sum
                            );
                        }
                    }
                }
                Arc::new(Int64Array::from(sums))
            }
            Column::MinFloat(v) | Column::MaxFloat(v) => Arc::new(Float64Array::from_iter(at.map(|i| v[i]))),
            Column::MinInt(v) | Column::MaxInt(v) => Arc::new(Int64Array::from_iter(at.map(|i| v[i]))),
            Column::Any { groups, .. } => {
                if slots.is_empty() {
                    return Ok(arrow::array::new_empty_array(kind));
                }
                let values = at.map(|i| groups[i].evaluate()).collect::<Result<Vec<_>>>()?;
                ScalarValue::iter_to_array(values)?
            }
        })
    }

    /// The state of all slots as Arrow columns, of the types `kind` names.
    pub(crate) fn save(&mut self) -> Result<Vec<ArrayRef>> {
        Ok(match self {
            Column::Count(v) => vec![Arc::new(Int64Array::from_iter_values(v.iter().copied()))],
            Column::SumFloat(v) | Column::AvgFloat(v) => vec![
                Arc::new(Float64Array::from_iter_values(v.iter().map(|s| s.sum))),
                Arc::new(Float64Array::from_iter_values(v.iter().map(|s| s.compensation))),
                Arc::new(Int64Array::from_iter_values(v.iter().map(|s| s.count))),
            ],
            Column::SumInt(v) => vec![
                Arc::new(Int64Array::from_iter_values(v.iter().map(|s| (s.sum >> 64) as i64))),
                Arc::new(Int64Array::from_iter_values(v.iter().map(|s| s.sum as i64))),
                Arc::new(Int64Array::from_iter_values(v.iter().map(|s| s.count))),
            ],
            Column::MinFloat(v) | Column::MaxFloat(v) => vec![Arc::new(Float64Array::from_iter(v.iter().copied()))],
            Column::MinInt(v) | Column::MaxInt(v) => vec![Arc::new(Int64Array::from_iter(v.iter().copied()))],
            Column::Any { call, groups } if groups.is_empty() => {
                let fields = call.state_fields()?;
                fields.iter().map(|field| arrow::array::new_empty_array(field.data_type())).collect()
            }
            Column::Any { call, groups } => {
                let mut columns: Vec<Vec<ScalarValue>> = Vec::new();
                for group in groups.iter_mut() {
                    let state = take_state(call, group)?;
                    columns.resize_with(state.len(), Vec::new);
                    columns.iter_mut().zip(state).for_each(|(column, value)| column.push(value));
                }
                columns.into_iter().map(ScalarValue::iter_to_array).collect::<Result<Vec<_>>>()?
            }
        })
    }

    /// Puts back what [`Column::save`] gave: one row of `state` for each slot, in slot order.
    pub(crate) fn load(&mut self, state: &[ArrayRef]) -> Result<()> {
        let rows = state.first().map_or(0, |column| column.len());
        self.grow(rows)?;
        let ints = |at: usize| state[at].as_primitive::<Int64Type>();
        let floats = |at: usize| state[at].as_primitive::<Float64Type>();
        match self {
            Column::Count(v) => v.copy_from_slice(ints(0).values()),
            Column::SumFloat(v) | Column::AvgFloat(v) => {
                for (row, held) in v.iter_mut().enumerate() {
                    *held = Sum {
                        sum: floats(0).value(row),
                        compensation: floats(1).value(row),
                        count: ints(2).value(row),
                    };
                }
            }
            Column::SumInt(v) => {
                for (row, held) in v.iter_mut().enumerate() {
                    let sum = (i128::from(ints(0).value(row)) << 64) | i128::from(ints(1).value(row) as u64);
                    *held = IntSum { sum, count: ints(2).value(row) };
                }
            }
            Column::MinFloat(v) | Column::MaxFloat(v) => {
                v.iter_mut().zip(floats(0)).for_each(|(held, value)| *held = value);
            }
            Column::MinInt(v) | Column::MaxInt(v) => v.iter_mut().zip(ints(0)).for_each(|(held, value)| *held = value),
            Column::Any { groups, .. } => {
                for (row, group) in groups.iter_mut().enumerate() {
                    let row: Vec<ArrayRef> = state.iter().map(|column| column.slice(row, 1)).collect();
                    group.merge_batch(&row)?;
                }
            }
        }
        Ok(())
    }

    /// Bytes this column holds on the heap.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Column::Count(v) => v.capacity() * 8,
            Column::SumFloat(v) | Column::AvgFloat(v) => v.capacity() * size_of::<Sum>(),
            Column::SumInt(v) => v.capacity() * size_of::<IntSum>(),
            Column::MinFloat(v) | Column::MaxFloat(v) => v.capacity() * 16,
            Column::MinInt(v) | Column::MaxInt(v) => v.capacity() * 16,
            Column::Any { groups, .. } => groups.iter().map(|group| group.size()).sum(),
        }
    }
}

/// Feeds each accumulator its rows in their order, one call for each run.
fn update_any(groups: &mut [Box<dyn Accumulator>], arguments: &Arguments, slots: &[Slot], runs: &Runs) -> Result<()> {
    let rows = UInt32Array::from(runs.rows.clone());
    let values = arguments.values.iter().map(|v| compute::take(v, &rows, None)).collect::<Result<Vec<_>, _>>()?;
    let mut start = 0;
    for (&slot, rows) in slots.iter().zip(runs.iter()).filter(|(_, rows)| !rows.is_empty()) {
        let run: Vec<ArrayRef> = values.iter().map(|values| values.slice(start, rows.len())).collect();
        groups[slot as usize].update_batch(&run)?;
        start += rows.len();
    }
    Ok(())
}

/// An accumulator's state, leaving it as it was: `state` may consume it, so it is made anew.
fn take_state(call: &AggregateFunctionExpr, group: &mut Box<dyn Accumulator>) -> Result<Vec<ScalarValue>> {
    let state = group.state()?;
    let mut again = call.create_accumulator()?;
    again.merge_batch(&arrays_of(&state)?)?;
    *group = again;
    Ok(state)
}

fn arrays_of(state: &[ScalarValue]) -> Result<Vec<ArrayRef>> {
    state.iter().map(ScalarValue::to_array).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_of_many_magnitudes_is_exact_whatever_the_order() {
        let values = [1.0, 1e100, 1.0, -1e100];
        for order in [[0, 1, 2, 3], [1, 3, 0, 2], [1, 0, 2, 3]] {
            let mut sum = Sum::default();
            order.iter().for_each(|&i: &usize| sum.add(values[i]));
            assert_eq!(sum.value(), 2.0);
        }
    }

    #[test]
    fn merged_parts_equal_the_whole() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i) * 0.1 - 17.3).collect();
        let (mut whole, mut left, mut right) = (Sum::default(), Sum::default(), Sum::default());
        values.iter().for_each(|&v| whole.add(v));
        values[..333].iter().for_each(|&v| left.add(v));
        values[333..].iter().for_each(|&v| right.add(v));
        left.merge(&right);
        assert_eq!(left.value(), whole.value());
    }

    fn arguments(values: ArrayRef) -> Arguments {
        Arguments { values: vec![values], keep: None }
    }

    #[test]
    fn nan_is_the_greatest_number_in_any_order() {
        for values in [[f64::NAN, 1.0, -2.0], [1.0, f64::NAN, -2.0], [-2.0, 1.0, f64::NAN]] {
            let of = |kind: Kind| {
                let mut column = kind.column();
                column.grow(1).unwrap();
                column.update(&arguments(Arc::new(Float64Array::from(values.to_vec()))), &[0], &Runs::one(3)).unwrap();
                column.evaluate(&[0], &DataType::Float64).unwrap().as_primitive::<Float64Type>().value(0)
            };
            assert_eq!(of(Kind::MinFloat), -2.0);
            assert!(of(Kind::MaxFloat).is_nan());
        }
    }

    #[test]
    fn an_integer_sum_that_does_not_fit_is_an_error_and_never_wraps() {
        let mut column = Kind::SumInt.column();
        column.grow(1).unwrap();
        let values: ArrayRef = Arc::new(Int64Array::from(vec![i64::MAX, 1]));
        column.update(&arguments(values), &[0], &Runs::one(2)).unwrap();
        let error = column.evaluate(&[0], &DataType::Int64).unwrap_err().to_string();
        assert!(error.contains("integer overflow") && error.contains("9223372036854775808"), "{error}");
        let less: ArrayRef = Arc::new(Int64Array::from(vec![-1]));
        column.update(&arguments(less), &[0], &Runs::one(1)).unwrap();
        assert_eq!(column.evaluate(&[0], &DataType::Int64).unwrap().as_primitive::<Int64Type>().value(0), i64::MAX);
    }
}
