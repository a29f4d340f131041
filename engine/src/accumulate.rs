//! One column of aggregate state for all keys of a pane: our own lean form for the common
//! aggregates, DataFusion's accumulators for every other.

use crate::program::Arguments;
use crate::runs::Runs;
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Decimal128Array, Float64Array, Int64Array, UInt32Array};
use arrow::buffer::NullBuffer;
use arrow::compute::{self, LexicographicalComparator, SortColumn, SortOptions};
use arrow::datatypes::{DataType, Decimal128Type, FieldRef, Float64Type, Int64Type};
use datafusion_common::utils::compare_rows;
use datafusion_common::{Result, ScalarValue, exec_err};
use datafusion_expr::Accumulator;
use datafusion_physical_expr::aggregate::AggregateFunctionExpr;
use std::borrow::Cow;
use std::cmp::Ordering;
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
    /// Of whole numbers and decimals.
    SumInt,
    MinFloat,
    MaxFloat,
    MinInt,
    MaxInt,
    /// The value of the row that comes first or last by an order; of equal ones, in the order in which they came.
    First(Arc<AggregateFunctionExpr>),
    Last(Arc<AggregateFunctionExpr>),
    Any(Arc<AggregateFunctionExpr>),
}

impl Kind {
    /// The leanest way to compute `call`, whose first argument has the type `input`.
    pub(crate) fn of(call: &Arc<AggregateFunctionExpr>, input: Option<&DataType>) -> Kind {
        match call.fun().name() {
            "first_value" if !call.is_distinct() => return Kind::First(call.clone()),
            "last_value" if !call.is_distinct() => return Kind::Last(call.clone()),
            _ => {}
        }
        let plain = !call.is_distinct() && call.order_bys().is_empty() && call.expressions().len() <= 1;
        if !plain {
            return Kind::Any(call.clone());
        }
        match (call.fun().name(), input) {
            ("count", _) => Kind::Count,
            ("sum", Some(DataType::Float64)) => Kind::SumFloat,
            ("avg", Some(DataType::Float64)) => Kind::AvgFloat,
            ("sum", Some(DataType::Int64 | DataType::Decimal128(..))) => Kind::SumInt,
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
            Kind::First(call) | Kind::Last(call) | Kind::Any(call) => {
                let state = call.state_fields()?;
                state.iter().enumerate().map(|(i, f)| field(&i.to_string(), f.data_type().clone())).collect()
            }
        })
    }

    /// Whether it takes the columns of ORDER BY behind its arguments.
    pub(crate) fn is_ordered(&self) -> bool {
        matches!(self, Kind::First(_) | Kind::Last(_) | Kind::Any(_))
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
            Kind::First(call) => Column::First { call: call.clone(), held: Vec::new() },
            Kind::Last(call) => Column::Last { call: call.clone(), held: Vec::new() },
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
    sum: i128, // 2^64 additions of an i64 fit; of decimals, what does not fit stays at the end it reached
    count: i64,
}

impl IntSum {
    #[inline]
    fn add(&mut self, value: i128) {
        if self.sum != i128::MAX && self.sum != i128::MIN {
            self.sum = self.sum.saturating_add(value);
        }
    }

    fn merge(&mut self, other: &IntSum) {
        match other.sum {
            i128::MAX | i128::MIN => self.sum = other.sum,
            sum => self.add(sum),
        }
        self.count += other.count;
    }

    /// The sum as a value of type `kind`, Int64 or a decimal.
    fn value(self, kind: &DataType) -> Result<Option<i128>> {
        let fits = match kind {
            DataType::Decimal128(precision, _) => {
                10i128.checked_pow(u32::from(*precision)).is_none_or(|bound| self.sum.unsigned_abs() < bound as u128)
            }
            _ => i64::try_from(self.sum).is_ok(),
        };
        match (fits, kind) {
            (true, _) => Ok((self.count > 0).then_some(self.sum)),
            (false, DataType::Decimal128(precision, _)) => {
                exec_err!("decimal overflow: a sum has more than {precision} digits; cast the argument to double")
            }
            (false, _) => exec_err!(
                "integer overflow: a sum of int64 came to {}; cast the argument to double or decimal",
                self.sum
            ),
        }
    }
}

/// Whole numbers or decimals, by 64 or 128 bits, as an array of type `kind`.
fn whole(values: impl Iterator<Item = Result<Option<i128>>>, kind: &DataType) -> Result<ArrayRef> {
    Ok(match kind {
        DataType::Decimal128(precision, scale) => {
            let values = values.collect::<Result<Decimal128Array>>()?;
            Arc::new(values.with_precision_and_scale(*precision, *scale)?)
        }
        _ => Arc::new(values.map(|value| Ok(value?.map(|value| value as i64))).collect::<Result<Int64Array>>()?),
    })
}

/// A row's value, and where it stands in the order.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    value: ScalarValue,
    order: Vec<ScalarValue>,
}

impl Placed {
    /// Takes `other`, which came later, instead of what is held where it comes before it, or behind it for `last`.
    fn choose(held: &mut Option<Placed>, other: Placed, last: bool, call: &AggregateFunctionExpr) -> Result<()> {
        let by: Vec<SortOptions> = call.order_bys().iter().map(|sort| sort.options).collect();
        let is_better = match held {
            None => true,
            Some(held) => match compare_rows(&other.order, &held.order, &by)? {
                Ordering::Less => !last,
                Ordering::Equal | Ordering::Greater if last => true,
                _ => false,
            },
        };
        if is_better {
            *held = Some(other);
        }
        Ok(())
    }

    fn bytes(held: &[Option<Placed>]) -> usize {
        let of = |placed: &Placed| placed.value.size() + placed.order.iter().map(ScalarValue::size).sum::<usize>();
        size_of_val(held) + held.iter().flatten().map(of).sum::<usize>()
    }
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
    First { call: Arc<AggregateFunctionExpr>, held: Vec<Option<Placed>> },
    Last { call: Arc<AggregateFunctionExpr>, held: Vec<Option<Placed>> },
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
            Column::First { held, .. } | Column::Last { held, .. } => held.resize(slots, None),
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
            Column::First { call, .. } | Column::Last { call, .. } if !call.ignore_nulls() => None,
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
                let count = |held: &mut IntSum, count| held.count += count;
                match arguments.values[0].as_primitive_opt::<Decimal128Type>() {
                    Some(decimals) => fold(v, slots, &runs, decimals.values(), IntSum::add, count),
                    None => {
                        let add = |held: &mut IntSum, value| held.sum += i128::from(value);
                        fold(v, slots, &runs, ints(), add, count);
                    }
                }
            }
            Column::MinFloat(v) => fold(v, slots, &runs, floats(), |held, x| pick(held, x, less), uncounted),
            Column::MaxFloat(v) => {
                fold(v, slots, &runs, floats(), |held, x| pick(held, x, |a, b| less(b, a)), uncounted)
            }
            Column::MinInt(v) => fold(v, slots, &runs, ints(), |held, x| pick(held, x, |a, b| a < b), uncounted),
            Column::MaxInt(v) => fold(v, slots, &runs, ints(), |held, x| pick(held, x, |a, b| a > b), uncounted),
            Column::First { call, held } => choose(held, false, call, arguments, slots, &runs)?,
            Column::Last { call, held } => choose(held, true, call, arguments, slots, &runs)?,
            Column::Any { call, groups } => update_any(call, groups, arguments, slots, &runs)?,
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
            (Column::SumInt(a), Column::SumInt(b)) => pairs.for_each(|(m, t)| a[m].merge(&b[t])),
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
            (Column::First { held: a, .. }, Column::First { call, held: b }) => {
                for (m, t) in pairs {
                    b[t].clone().map_or(Ok(()), |other| Placed::choose(&mut a[m], other, false, call))?;
                }
            }
            (Column::Last { held: a, .. }, Column::Last { call, held: b }) => {
                for (m, t) in pairs {
                    b[t].clone().map_or(Ok(()), |other| Placed::choose(&mut a[m], other, true, call))?;
                }
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
            Column::SumInt(v) => each(v, mine, theirs, |mine, other| mine.merge(&other)),
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
            Column::First { call, held } => {
                for (&m, &t) in mine.iter().zip(theirs) {
                    let other = held[t as usize].clone();
                    other.map_or(Ok(()), |other| Placed::choose(&mut held[m as usize], other, false, call))?;
                }
            }
            Column::Last { call, held } => {
                for (&m, &t) in mine.iter().zip(theirs) {
                    let other = held[t as usize].clone();
                    other.map_or(Ok(()), |other| Placed::choose(&mut held[m as usize], other, true, call))?;
                }
            }
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
            Column::First { held, .. } | Column::Last { held, .. } => held.swap(a, b),
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
            Column::First { held, .. } | Column::Last { held, .. } => held[at] = None,
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
            Column::SumInt(v) => whole(at.map(|i| v[i].value(kind)), kind)?,
            Column::MinFloat(v) | Column::MaxFloat(v) => Arc::new(Float64Array::from_iter(at.map(|i| v[i]))),
            Column::MinInt(v) | Column::MaxInt(v) => Arc::new(Int64Array::from_iter(at.map(|i| v[i]))),
            _ if slots.is_empty() => arrow::array::new_empty_array(kind),
            Column::First { held, .. } | Column::Last { held, .. } => {
                let null = ScalarValue::try_from(kind)?;
                let value = |i: usize| held[i].as_ref().map_or_else(|| null.clone(), |placed| placed.value.clone());
                ScalarValue::iter_to_array(at.map(value))?
            }
            Column::Any { call, groups } if is_distinct_sum(call, kind) => {
                let sums = at.map(|i| distinct_sum(&take_state(call, &mut groups[i])?)?.value(kind));
                whole(sums, kind)?
            }
            Column::Any { groups, .. } => {
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
            Column::First { call, held } | Column::Last { call, held } => {
                let fields = call.state_fields()?;
                let mut columns: Vec<ArrayRef> = Vec::with_capacity(fields.len());
                for (at, field) in fields[..fields.len() - 1].iter().enumerate() {
                    let null = ScalarValue::try_from(field.data_type())?;
                    let one = |placed: &Option<Placed>| match (placed, at) {
                        (None, _) => null.clone(),
                        (Some(placed), 0) => placed.value.clone(),
                        (Some(placed), _) => placed.order[at - 1].clone(),
                    };
                    columns.push(match held.is_empty() {
                        true => arrow::array::new_empty_array(field.data_type()),
                        false => ScalarValue::iter_to_array(held.iter().map(one))?,
                    });
                }
                let is_set: BooleanArray = held.iter().map(|placed| Some(placed.is_some())).collect();
                columns.push(Arc::new(is_set));
                columns
            }
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
            Column::First { held, .. } | Column::Last { held, .. } => {
                let (is_set, columns) = state.split_last().expect("the state of a chosen row has columns");
                for (row, held) in held.iter_mut().enumerate().filter(|(row, _)| is_set.as_boolean().value(*row)) {
                    let at = |column: &ArrayRef| ScalarValue::try_from_array(column, row);
                    let order = columns[1..].iter().map(at).collect::<Result<_>>()?;
                    *held = Some(Placed { value: at(&columns[0])?, order });
                }
            }
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
            Column::First { held, .. } | Column::Last { held, .. } => Placed::bytes(held),
            Column::Any { groups, .. } => groups.iter().map(|group| group.size()).sum(),
        }
    }
}

/// Takes the first or last row of each run.
fn choose(
    held: &mut [Option<Placed>],
    last: bool,
    call: &AggregateFunctionExpr,
    arguments: &Arguments,
    slots: &[Slot],
    runs: &Runs,
) -> Result<()> {
    let (value, order) = arguments.values.split_first().expect("a value is chosen");
    let by = order.iter().zip(call.order_bys());
    let by = by.map(|(column, sort)| SortColumn { values: column.clone(), options: Some(sort.options) });
    let by: Vec<SortColumn> = by.collect();
    let comparator = if by.is_empty() { None } else { Some(LexicographicalComparator::try_new(&by)?) };
    let compare =
        |a: &u32, b: &u32| comparator.as_ref().map_or(Ordering::Equal, |by| by.compare(*a as usize, *b as usize));
    for (&slot, rows) in slots.iter().zip(runs.iter()) {
        // of equal rows `min_by` gives the first and `max_by` the last
        let chosen =
            if last { rows.iter().max_by(|a, b| compare(a, b)) } else { rows.iter().min_by(|a, b| compare(a, b)) };
        let Some(&row) = chosen else { continue };
        let at = |column: &ArrayRef| ScalarValue::try_from_array(column, row as usize);
        let placed = Placed { value: at(value)?, order: order.iter().map(at).collect::<Result<_>>()? };
        Placed::choose(&mut held[slot as usize], placed, last, call)?;
    }
    Ok(())
}

/// Feeds each accumulator its rows in their order, one call for each run.
fn update_any(
    call: &AggregateFunctionExpr,
    groups: &mut [Box<dyn Accumulator>],
    arguments: &Arguments,
    slots: &[Slot],
    runs: &Runs,
) -> Result<()> {
    let rows = UInt32Array::from(runs.rows.clone());
    let values = arguments.values.iter().map(|v| compute::take(v, &rows, None)).collect::<Result<Vec<_>, _>>()?;
    let is_sorted = !call.order_bys().is_empty() && call.order_sensitivity().hard_requires();
    let mut start = 0;
    for (&slot, rows) in slots.iter().zip(runs.iter()).filter(|(_, rows)| !rows.is_empty()) {
        let run: Vec<ArrayRef> = values.iter().map(|values| values.slice(start, rows.len())).collect();
        let group = &mut groups[slot as usize];
        match is_sorted {
            // it takes sorted rows only, and puts what is sorted in itself together only when merging; which of equals
            // comes first is left open, as in batch SQL
            true => {
                let mut part = call.create_accumulator()?;
                part.update_batch(&sorted(call, &run)?)?;
                group.merge_batch(&arrays_of(&part.state()?)?)?;
            }
            false => group.update_batch(&run)?,
        }
        start += rows.len();
    }
    Ok(())
}

/// The columns of a run, arguments and those of ORDER BY behind them, in that order; equal rows as they came.
fn sorted(call: &AggregateFunctionExpr, run: &[ArrayRef]) -> Result<Vec<ArrayRef>> {
    let order = &run[run.len() - call.order_bys().len()..];
    let by = order.iter().zip(call.order_bys());
    let by = by.map(|(column, sort)| SortColumn { values: column.clone(), options: Some(sort.options) });
    let arrival: ArrayRef = Arc::new(UInt32Array::from_iter_values(0..run[0].len() as u32));
    let by: Vec<SortColumn> = by.chain([SortColumn { values: arrival, options: None }]).collect();
    let rank = compute::lexsort_to_indices(&by, None)?;
    Ok(run.iter().map(|column| compute::take(column, &rank, None)).collect::<Result<_, _>>()?)
}

/// DataFusion's sum of distinct values begins anew at the other end of the numbers where it does not fit.
fn is_distinct_sum(call: &AggregateFunctionExpr, kind: &DataType) -> bool {
    call.is_distinct() && call.fun().name() == "sum" && matches!(kind, DataType::Int64 | DataType::Decimal128(..))
}

/// The sum of the values in the state of a DISTINCT sum, which is their list.
fn distinct_sum(state: &[ScalarValue]) -> Result<IntSum> {
    let mut sum = IntSum::default();
    let Some(ScalarValue::List(list)) = state.first() else { return Ok(sum) };
    let values = list.value(0);
    match values.as_primitive_opt::<Decimal128Type>() {
        Some(decimals) => decimals.iter().flatten().for_each(|value| sum.add(value)),
        None => values.as_primitive::<Int64Type>().iter().flatten().for_each(|value| sum.add(value.into())),
    }
    sum.count = (values.len() - values.null_count()) as i64;
    Ok(sum)
}

/// Aggregates whose `state` consumes nothing. What is made anew of their state differs from it in the last digit, and a
/// look is not to change what is seen.
const READABLE: [&str; 5] = ["var", "stddev", "covar", "corr", "regr"];

/// An accumulator's state, leaving it as it was: `state` may consume it, so it is made anew.
fn take_state(call: &AggregateFunctionExpr, group: &mut Box<dyn Accumulator>) -> Result<Vec<ScalarValue>> {
    let state = group.state()?;
    if !call.is_distinct() && READABLE.iter().any(|family| call.fun().name().starts_with(family)) {
        return Ok(state);
    }
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
