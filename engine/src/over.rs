//! A metric over the rows of another one, row by row: OVER clauses computed as rows become final.
//!
//! Each partition keeps what its calls look back on: the last rows of a bounded frame, a few numbers of a running
//! aggregate or an indicator. While rows may still be corrected (the allowed lateness of the metric that reads the
//! stream), the partition also keeps those rows and its state before the first of them: a correction computes them
//! again from there, so that every row is the one that the corrected rows give, and only changed rows come again.

use crate::accumulate::{Column, Kind};
use crate::checkpoint::{Content, Draft, Pieces};
use crate::event::{Micros, Span};
use crate::indicator::{self, Indicator};
use crate::key::{KeyTable, batch_of, bytes_of_row};
use crate::metric::{RestoreError, Rows};
use crate::program::{Aggregate, Arguments, Program, checked};
use crate::runs::Runs;
use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Float64Array, Float64Builder, Int64Array, ListArray,
    ListBuilder, RecordBatch, UInt32Array, new_empty_array,
};
use arrow::compute;
use arrow::datatypes::{
    DataType, Field, FieldRef, Float64Type, Int64Type, Schema, SchemaRef, TimestampMicrosecondType,
};
use arrow::row::{RowConverter, SortField};
use datafusion_common::{Result, ScalarValue, exec_err};
use datafusion_physical_expr::PhysicalExpr;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// `ROWS BETWEEN first PRECEDING AND last PRECEDING`; 0 is the current row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    pub first: usize,
    pub last: usize,
}

/// The most rows a frame may reach back: bounds the state of a partition and the work of a row.
pub const FRAME_MAX: usize = 10_000;

/// The most partitions a metric holds state for: they are never forgotten, since each may get its next row any time.
pub const PARTITIONS_MAX: usize = 1_000_000;

/// What one OVER call computes.
#[derive(Clone, Debug)]
pub enum Work {
    /// An aggregate over a bounded frame.
    Frame {
        aggregate: Aggregate,
        frame: Frame,
    },
    /// An aggregate over all rows so far; only such as [`is_running`] allows.
    Running {
        aggregate: Aggregate,
    },
    /// The value `offset` rows before, or `default` where there are not so many.
    Lag {
        value: Arc<dyn PhysicalExpr>,
        offset: usize,
        default: ScalarValue,
    },
    /// The n-th value of a bounded frame, from 0; `from_end` counts from the current row backwards.
    Nth {
        value: Arc<dyn PhysicalExpr>,
        frame: Frame,
        n: usize,
        from_end: bool,
    },
    /// The value of the partition's first row.
    First {
        value: Arc<dyn PhysicalExpr>,
    },
    /// 1, 2, 3, ….
    RowNumber,
    Indicator {
        indicator: Indicator,
        values: Vec<Arc<dyn PhysicalExpr>>,
    },
}

/// One OVER call and the name and type of its result.
#[derive(Clone, Debug)]
pub struct Call {
    pub work: Work,
    pub field: FieldRef,
}

/// Whether an aggregate over all rows so far has state of constant size.
pub fn is_running(aggregate: &Aggregate, input: &Schema) -> Result<bool> {
    Ok(!kind(aggregate, input)?.is_ordered())
}

fn kind(aggregate: &Aggregate, input: &Schema) -> Result<Kind> {
    let argument = aggregate.call.expressions().first().map(|arg| arg.data_type(input)).transpose()?;
    Ok(Kind::of(&aggregate.call, argument.as_ref()))
}

/// The OVER calls of a metric; all of them partition alike and go by the order of windows.
#[derive(Debug)]
pub struct Over {
    pub(crate) calls: Vec<Call>,
    /// Which of the metric's keys make a partition.
    partition: Vec<usize>,
    /// Every distinct argument of the calls.
    arguments: Vec<Arc<dyn PhysicalExpr>>,
    /// Arguments of which past values are needed: which, its type, and how many.
    rings: Vec<(usize, DataType, usize)>,
    plans: Vec<Plan>,
}

/// A call with its arguments as places in [`Over::arguments`] or [`Over::rings`].
#[derive(Debug)]
enum Plan {
    Frame { kind: Kind, rings: Vec<usize>, keep: Option<usize>, frame: Frame },
    Running { kind: Kind, arguments: Vec<usize>, keep: Option<usize> },
    Lag { ring: usize, offset: usize, default: ScalarValue },
    Nth { ring: usize, frame: Frame, n: usize, from_end: bool },
    First { argument: usize, null: ScalarValue },
    RowNumber,
    Indicator { indicator: Indicator, arguments: Vec<usize> },
}

impl Over {
    /// `partition`: places among the metric's keys; `input`: schema the calls' expressions are written against.
    pub fn new(partition: Vec<usize>, calls: Vec<Call>, input: &Schema) -> Result<Over> {
        let mut over =
            Over { calls: Vec::new(), partition, arguments: Vec::new(), rings: Vec::new(), plans: Vec::new() };
        for call in &calls {
            let plan = match &call.work {
                Work::Frame { aggregate, frame } => {
                    let rows = frame.first + 1;
                    let arguments = aggregate.call.expressions();
                    let rings = arguments.iter().map(|arg| over.ring(arg, rows, input)).collect::<Result<_>>()?;
                    let keep = aggregate.filter.as_ref().map(|filter| over.ring(filter, rows, input)).transpose()?;
                    Plan::Frame { kind: kind(aggregate, input)?, rings, keep, frame: *frame }
                }
                Work::Running { aggregate } => Plan::Running {
                    kind: kind(aggregate, input)?,
                    arguments: aggregate
                        .call
                        .expressions()
                        .iter()
                        .map(|arg| over.argument(arg))
                        .collect::<Result<_>>()?,
                    keep: aggregate.filter.as_ref().map(|filter| over.argument(filter)).transpose()?,
                },
                Work::Lag { value, offset, default } => {
                    Plan::Lag { ring: over.ring(value, offset + 1, input)?, offset: *offset, default: default.clone() }
                }
                Work::Nth { value, frame, n, from_end } => {
                    let ring = over.ring(value, frame.first + 1, input)?;
                    Plan::Nth { ring, frame: *frame, n: *n, from_end: *from_end }
                }
                Work::First { value } => Plan::First {
                    null: ScalarValue::try_from(&value.data_type(input)?)?,
                    argument: over.argument(value)?,
                },
                Work::RowNumber => Plan::RowNumber,
                Work::Indicator { indicator, values } => Plan::Indicator {
                    indicator: *indicator,
                    arguments: values.iter().map(|value| over.argument(value)).collect::<Result<_>>()?,
                },
            };
            over.plans.push(plan);
        }
        over.calls = calls;
        Ok(over)
    }

    fn argument(&mut self, expr: &Arc<dyn PhysicalExpr>) -> Result<usize> {
        let expr = checked(expr)?;
        Ok(self.arguments.iter().position(|known| known == &expr).unwrap_or_else(|| {
            self.arguments.push(expr);
            self.arguments.len() - 1
        }))
    }

    fn ring(&mut self, expr: &Arc<dyn PhysicalExpr>, rows: usize, input: &Schema) -> Result<usize> {
        let argument = self.argument(expr)?;
        if let Some(at) = self.rings.iter().position(|(known, ..)| *known == argument) {
            self.rings[at].2 = self.rings[at].2.max(rows);
            return Ok(at);
        }
        self.rings.push((argument, expr.data_type(input)?, rows));
        Ok(self.rings.len() - 1)
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
        self.arguments.iter().map(|expr| expr.evaluate(batch)?.into_array(batch.num_rows())).collect()
    }
}

/// The last values of an argument.
#[derive(Clone)]
enum Ring {
    Floats(VecDeque<Option<f64>>),
    Any(VecDeque<ScalarValue>),
}

impl Ring {
    fn new(kind: &DataType) -> Ring {
        match kind {
            DataType::Float64 => Ring::Floats(VecDeque::new()),
            _ => Ring::Any(VecDeque::new()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Ring::Floats(values) => values.len(),
            Ring::Any(values) => values.len(),
        }
    }

    fn push(&mut self, column: &ArrayRef, row: usize, most: usize) -> Result<()> {
        let is_full = self.len() == most;
        match self {
            Ring::Floats(values) => {
                if is_full {
                    values.pop_front();
                }
                let column = column.as_primitive::<Float64Type>();
                values.push_back(column.is_valid(row).then(|| column.value(row)));
            }
            Ring::Any(values) => {
                if is_full {
                    values.pop_front();
                }
                values.push_back(ScalarValue::try_from_array(column, row)?);
            }
        }
        Ok(())
    }

    /// Places of a frame's rows, which may be none.
    fn range(&self, frame: Frame) -> std::ops::Range<usize> {
        let end = self.len().saturating_sub(frame.last);
        self.len().saturating_sub(frame.first + 1).min(end)..end
    }

    fn values(&self, rows: std::ops::Range<usize>, kind: &DataType) -> Result<ArrayRef> {
        Ok(match self {
            Ring::Floats(values) => Arc::new(Float64Array::from_iter(values.range(rows).copied())),
            Ring::Any(_) if rows.is_empty() => new_empty_array(kind),
            Ring::Any(values) => ScalarValue::iter_to_array(values.range(rows).cloned())?,
        })
    }

    fn value(&self, at: usize) -> ScalarValue {
        match self {
            Ring::Floats(values) => ScalarValue::Float64(values[at]),
            Ring::Any(values) => values[at].clone(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Ring::Floats(values) => values.capacity() * size_of::<Option<f64>>(),
            Ring::Any(values) => values.iter().map(ScalarValue::size).sum(),
        }
    }
}

/// State of one call in one partition, where it has some beside the rings.
enum Standing {
    None,
    Aggregate(Column),
    First(Option<ScalarValue>),
    Indicator(indicator::Running),
}

impl Standing {
    fn new(plan: &Plan) -> Result<Standing> {
        Ok(match plan {
            Plan::Running { kind, .. } => {
                let mut column = kind.column();
                column.grow(1)?;
                Standing::Aggregate(column)
            }
            Plan::First { .. } => Standing::First(None),
            Plan::Indicator { indicator, .. } => Standing::Indicator(indicator::Running::new(*indicator)),
            Plan::Frame { .. } | Plan::Lag { .. } | Plan::Nth { .. } | Plan::RowNumber => Standing::None,
        })
    }

    fn copy(&mut self, plan: &Plan) -> Result<Standing> {
        Ok(match self {
            Standing::None => Standing::None,
            Standing::Aggregate(column) => {
                let state = column.save()?;
                let Standing::Aggregate(mut copy) = Standing::new(plan)? else { return Ok(Standing::None) };
                copy.load(&state)?;
                Standing::Aggregate(copy)
            }
            Standing::First(value) => Standing::First(value.clone()),
            Standing::Indicator(running) => Standing::Indicator(running.clone()),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Standing::None => 0,
            Standing::Aggregate(column) => column.bytes(),
            Standing::First(value) => value.as_ref().map_or(0, ScalarValue::size),
            Standing::Indicator(running) => running.bytes(),
        }
    }
}

/// State of a partition between two rows.
struct Cursor {
    rows: i64,
    rings: Vec<Ring>,
    standings: Vec<Standing>,
}

impl Cursor {
    fn new(over: &Over) -> Result<Cursor> {
        let standings = over.plans.iter().map(Standing::new).collect::<Result<_>>()?;
        Ok(Cursor { rows: 0, rings: over.rings.iter().map(|(_, kind, _)| Ring::new(kind)).collect(), standings })
    }

    fn copy(&mut self, over: &Over) -> Result<Cursor> {
        let standings =
            self.standings.iter_mut().zip(&over.plans).map(|(s, plan)| s.copy(plan)).collect::<Result<_>>()?;
        Ok(Cursor { rows: self.rows, rings: self.rings.clone(), standings })
    }

    /// Goes on by one row, whose arguments are in `row` of `arguments`: the results of all calls.
    fn push(&mut self, over: &Over, arguments: &[ArrayRef], row: usize) -> Result<Vec<ScalarValue>> {
        self.rows += 1;
        for (ring, (argument, _, most)) in self.rings.iter_mut().zip(&over.rings) {
            ring.push(&arguments[*argument], row, *most)?;
        }
        let mut results = Vec::with_capacity(over.plans.len());
        for ((plan, call), standing) in over.plans.iter().zip(&over.calls).zip(&mut self.standings) {
            let kind = call.field.data_type();
            results.push(match (plan, standing) {
                (Plan::Frame { kind: how, rings, keep, frame }, _) => {
                    let values = |ring: usize| {
                        let (ring, kind) = (&self.rings[ring], &over.rings[ring].1);
                        ring.values(ring.range(*frame), kind)
                    };
                    let arguments = rings.iter().map(|&ring| values(ring)).collect::<Result<Vec<_>>>()?;
                    let keep = keep.map(values).transpose()?;
                    let count = arguments.first().or(keep.as_ref()).map_or(0, |column| column.len());
                    let arguments = Arguments { values: arguments, keep: keep.map(|mask| mask.as_boolean().clone()) };
                    let mut column = how.column();
                    column.grow(1)?;
                    column.update(&arguments, &[0], &Runs::one(count))?;
                    ScalarValue::try_from_array(&column.evaluate(&[0], kind)?, 0)?
                }
                (Plan::Running { arguments: places, keep, .. }, Standing::Aggregate(column)) => {
                    let one = |at: usize| arguments[at].slice(row, 1);
                    let keep = keep.map(one);
                    let values: Vec<ArrayRef> = places.iter().map(|&at| one(at)).collect();
                    let arguments = Arguments { values, keep: keep.map(|mask| mask.as_boolean().clone()) };
                    column.update(&arguments, &[0], &Runs::one(1))?;
                    ScalarValue::try_from_array(&column.evaluate(&[0], kind)?, 0)?
                }
                (Plan::Lag { ring, offset, default }, _) => {
                    let ring = &self.rings[*ring];
                    ring.len().checked_sub(offset + 1).map_or_else(|| default.clone(), |at| ring.value(at))
                }
                (Plan::Nth { ring, frame, n, from_end }, _) => {
                    let ring = &self.rings[*ring];
                    let rows = ring.range(*frame);
                    let at = if *from_end { rows.end.checked_sub(n + 1) } else { Some(rows.start + n) };
                    match at.filter(|at| rows.contains(at)) {
                        Some(at) => ring.value(at),
                        None => ScalarValue::try_from(kind)?,
                    }
                }
                (Plan::First { argument, .. }, Standing::First(first)) => match first {
                    Some(value) => value.clone(),
                    None => first.insert(ScalarValue::try_from_array(&arguments[*argument], row)?).clone(),
                },
                (Plan::RowNumber, _) => ScalarValue::UInt64(Some(self.rows as u64)),
                (Plan::Indicator { arguments: places, .. }, Standing::Indicator(running)) => {
                    let mut values = [None; 3];
                    for (value, &at) in values.iter_mut().zip(places) {
                        *value = number(&arguments[at], row)?;
                    }
                    ScalarValue::Float64(running.push(&values[..places.len()]))
                }
                _ => unreachable!("a call's state is made from its plan"),
            });
        }
        Ok(results)
    }

    fn bytes(&self) -> usize {
        self.rings.iter().map(Ring::bytes).sum::<usize>() + self.standings.iter().map(Standing::bytes).sum::<usize>()
    }
}

/// A value as the number an indicator sees; of a time, its microseconds.
pub fn number(column: &ArrayRef, row: usize) -> Result<Option<f64>> {
    if column.is_null(row) {
        return Ok(None);
    }
    match column.data_type() {
        DataType::Float64 => Ok(Some(column.as_primitive::<Float64Type>().value(row))),
        DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, _) => {
            Ok(Some(column.as_primitive::<TimestampMicrosecondType>().value(row) as f64))
        }
        other => exec_err!("an indicator reads doubles and times in microseconds, not {other}"),
    }
}

/// Where a row stands in its partition: end and start of its window, and its key where several keys share a partition.
type Place = (Micros, Micros, Box<[u8]>);

/// The partition of each row of a batch, and each row's place.
type Placed = (Vec<u32>, Vec<(Place, u32)>);

/// A row that may still be corrected.
struct Kept {
    place: Place,
    /// One row of the program's input.
    row: RecordBatch,
    results: Vec<ScalarValue>,
    revision: i64,
    /// It was not taken back.
    is_in: bool,
}

/// A row that is taken back, and the revision that says so.
struct Left {
    row: RecordBatch,
    revision: i64,
    was_newest: bool,
}

struct Partition {
    /// Behind the newest row.
    tip: Cursor,
    /// Before the first of `kept`, where there are any.
    base: Option<Cursor>,
    kept: VecDeque<Kept>,
    newest: Option<Place>,
}

impl Partition {
    /// Takes a kept row back; it keeps its place and its revision, should it come again.
    fn leave(&mut self, place: &Place) -> Option<Left> {
        let at = self.kept.binary_search_by(|kept| kept.place.cmp(place)).ok()?;
        let was_newest = self.kept.iter().rposition(|kept| kept.is_in) == Some(at);
        let kept = &mut self.kept[at];
        std::mem::take(&mut kept.is_in).then(|| {
            kept.revision += 1;
            Left { row: kept.row.clone(), revision: kept.revision, was_newest }
        })
    }
}

/// Rows that came of a step, and whether they are the newest of their partitions.
pub(crate) struct Produced {
    pub(crate) rows: Rows,
    pub(crate) is_newest: bool,
}

/// A row on its way out: its input, its results and its revision.
type Out = (RecordBatch, Vec<ScalarValue>, i64);

/// The running state of a metric with OVER calls, or of one that only filters and computes.
pub struct RowMetric {
    program: Arc<Program>,
    /// How long after its window's end a row of the metric it reads may be corrected.
    lateness: Span,
    /// Every row whose window ends here or before has come once.
    closed: Micros,
    keys: KeyTable,
    places: Option<RowConverter>,
    partitions: Vec<Partition>,
    /// Those stand elsewhere than at the last checkpoint.
    changed: bool,
}

/// Parts of saved state: partitions, and their rows that may still be corrected. Rows name partitions by their number,
/// so both are written when one changes.
const PARTITIONS: &str = "partitions";
const KEPT: &str = "kept";

impl RowMetric {
    pub(crate) fn new(program: Arc<Program>, lateness: Span) -> Result<Self> {
        let over = over_of(&program)?;
        let fields: Vec<FieldRef> = over.partition.iter().map(|&at| program.key_schema.fields()[at].clone()).collect();
        let keys = KeyTable::new(&Arc::new(Schema::new(fields)))?;
        let places = match over.partition.len() == program.key_count() {
            true => None,
            false => {
                let fields = program.key_schema.fields().iter().map(|f| SortField::new(f.data_type().clone()));
                Some(RowConverter::new(fields.collect())?)
            }
        };
        Ok(Self { program, lateness, closed: Micros::MIN, keys, places, partitions: Vec::new(), changed: false })
    }

    pub(crate) fn program(&self) -> &Arc<Program> {
        &self.program
    }

    pub(crate) fn lateness(&self) -> Span {
        self.lateness
    }

    pub(crate) fn closed(&self) -> Micros {
        self.closed
    }

    /// Partitions that hold state.
    pub(crate) fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Bytes of state on the heap, within a few percent.
    pub(crate) fn bytes(&self) -> usize {
        let kept = |kept: &Kept| bytes_of_row(&kept.row) + kept.results.iter().map(ScalarValue::size).sum::<usize>();
        let partition = |p: &Partition| {
            size_of::<Partition>()
                + p.tip.bytes()
                + p.base.as_ref().map_or(0, Cursor::bytes)
                + p.kept.iter().map(kept).sum::<usize>()
        };
        self.keys.bytes() + self.partitions.iter().map(partition).sum::<usize>()
    }

    /// Takes in final rows of the metric it reads, in the columns of the program's input, and corrections of earlier
    /// ones (`revisions` above 0), after it took those back that were `withdrawn`.
    pub(crate) fn absorb(
        &mut self,
        batch: &RecordBatch,
        revisions: &[i64],
        withdrawn: Option<&RecordBatch>,
        out: &mut Vec<Produced>,
    ) -> Result<()> {
        let program = self.program.clone();
        let over = over_of(&program)?;
        let mut dirty: BTreeMap<u32, Vec<Place>> = BTreeMap::new(); // kept rows that were put in or changed
        let mut left: Vec<Left> = Vec::new();
        self.changed = true;
        if let Some(withdrawn) = withdrawn {
            let (ids, places) = self.places(&program.align(withdrawn)?)?;
            for (place, row) in places {
                let id = ids[row as usize];
                if let Some(gone) = self.partition(id)?.leave(&place) {
                    left.push(gone);
                    dirty.entry(id).or_default();
                }
            }
        }
        let batch = program.align(batch)?;
        let selected = program.selected(&batch)?;
        let (ids, mut order) = self.places(&batch)?;
        let arguments = over.evaluate(&batch)?;
        let mut appended: Vec<(u32, Vec<ScalarValue>)> = Vec::new();
        order.sort_unstable();
        let lateness = self.lateness;
        for (place, row) in order {
            let id = ids[row as usize];
            let is_in = selected.as_ref().is_none_or(|mask| mask.value(row as usize));
            let partition = self.partition(id)?;
            let is_new = partition.newest.as_ref().is_none_or(|newest| *newest < place) && !dirty.contains_key(&id);
            if is_new || (partition.kept.is_empty() && revisions[row as usize] == 0) {
                if !is_in {
                    continue;
                }
                if lateness > Span::ZERO && partition.base.is_none() {
                    partition.base = Some(partition.tip.copy(over)?);
                }
                let results = partition.tip.push(over, &arguments, row as usize)?;
                if lateness > Span::ZERO {
                    let row = batch.slice(row as usize, 1);
                    let (place, results) = (place.clone(), results.clone());
                    partition.kept.push_back(Kept { place, row, results, revision: 0, is_in: true });
                }
                partition.newest = partition.newest.take().max(Some(place));
                appended.push((row, results));
                continue;
            }
            let one = batch.slice(row as usize, 1);
            match (partition.kept.binary_search_by(|kept| kept.place.cmp(&place)), is_in) {
                // by their values: what was restored may say otherwise what can be null
                (Ok(at), true) if partition.kept[at].is_in && partition.kept[at].row.columns() == one.columns() => {
                    continue;
                }
                (Ok(at), true) => {
                    partition.kept[at].row = one;
                    partition.kept[at].is_in = true;
                }
                (Ok(_), false) => {
                    if let Some(gone) = partition.leave(&place) {
                        left.push(gone);
                        dirty.entry(id).or_default();
                    }
                    continue;
                }
                // what lies before the kept rows was let go as settled
                (Err(_), true) if partition.base.is_none() => continue,
                (Err(at), true) => {
                    let place = place.clone();
                    partition.newest = partition.newest.take().max(Some(place.clone()));
                    let kept = Kept { place, row: one, results: Vec::new(), revision: -1, is_in: true };
                    partition.kept.insert(at, kept);
                }
                (Err(_), false) => continue,
            }
            dirty.entry(id).or_default().push(place);
        }
        if !appended.is_empty() {
            let (rows, results): (Vec<u32>, Vec<_>) = appended.into_iter().unzip();
            let taken = compute::take_record_batch(&batch, &UInt32Array::from(rows))?;
            let revisions = vec![0; taken.num_rows()];
            out.push(Produced { rows: finished(&program, &taken, &results, revisions)?, is_newest: true });
        }
        self.correct(&program, over, dirty, out)?;
        if !left.is_empty() {
            out.push(Produced { rows: taken_back(&program, &left)?, is_newest: false });
        }
        Ok(())
    }

    fn partition(&mut self, id: u32) -> Result<&mut Partition> {
        match self.partitions.get_mut(id as usize) {
            Some(partition) => Ok(partition),
            None => exec_err!("partition {id} was not made"),
        }
    }

    /// Every row of windows that end at `closed` or before has come; what can no longer be corrected is let go.
    pub(crate) fn advance(&mut self, closed: Micros) -> Result<()> {
        if closed <= self.closed {
            return Ok(());
        }
        self.closed = closed;
        let program = self.program.clone();
        let over = over_of(&program)?;
        for partition in &mut self.partitions {
            let settled = partition.kept.iter().take_while(|kept| kept.place.0.plus(self.lateness) <= closed).count();
            if settled == 0 {
                continue;
            }
            self.changed = true;
            let rows: Vec<Kept> = partition.kept.drain(..settled).filter(|kept| kept.is_in).collect();
            if partition.kept.is_empty() {
                partition.base = None;
                continue;
            }
            if rows.is_empty() {
                continue;
            }
            let batch = compute::concat_batches(rows[0].row.schema_ref(), rows.iter().map(|kept| &kept.row))?;
            let arguments = over.evaluate(&batch)?;
            if let Some(base) = &mut partition.base {
                for row in 0..rows.len() {
                    base.push(over, &arguments, row)?;
                }
            }
        }
        Ok(())
    }

    /// The partition of each row, and each row's place.
    fn places(&mut self, batch: &RecordBatch) -> Result<Placed> {
        let keys = self.program.keys_of(batch)?;
        let over = over_of(&self.program)?;
        let partition: Vec<ArrayRef> = over.partition.iter().map(|&at| keys[at].clone()).collect();
        let ids = self.keys.intern(&partition, batch.num_rows())?;
        for &id in &ids {
            if id as usize == self.partitions.len() {
                if self.partitions.len() == PARTITIONS_MAX {
                    return exec_err!(
                        "the metric has state for {PARTITIONS_MAX} partitions (engine bound PARTITIONS_MAX); partition by keys with fewer values, or leave some out with WHERE"
                    );
                }
                self.keys.hold(id);
                let tip = Cursor::new(over)?;
                self.partitions.push(Partition { tip, base: None, kept: VecDeque::new(), newest: None });
            }
        }
        let time = |name: &str| match batch
            .column_by_name(name)
            .and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>())
        {
            Some(column) => Ok(column.values().clone()),
            None => exec_err!("rows of `{}` have no column `{name}`", self.program.stream()),
        };
        let (starts, ends) = (time("window_start")?, time("window_end")?);
        let encoded = self.places.as_ref().map(|converter| converter.convert_columns(&keys)).transpose()?;
        let places = (0..batch.num_rows()).map(|row| {
            let key = encoded.as_ref().map_or_else(Box::default, |rows| rows.row(row).as_ref().into());
            ((Micros(ends[row]), Micros(starts[row]), key), row as u32)
        });
        Ok((ids, places.collect()))
    }

    /// Computes the kept rows of changed partitions again; those that differ come out with their next revision.
    fn correct(
        &mut self,
        program: &Program,
        over: &Over,
        dirty: BTreeMap<u32, Vec<Place>>,
        out: &mut Vec<Produced>,
    ) -> Result<()> {
        let (mut older, mut newest): (Vec<Out>, Vec<Out>) = (Vec::new(), Vec::new());
        for (id, changed) in dirty {
            let partition = &mut self.partitions[id as usize];
            let mut cursor = match &mut partition.base {
                Some(base) => base.copy(over)?,
                None => Cursor::new(over)?,
            };
            let is_in = || partition.kept.iter().filter(|kept| kept.is_in);
            if let Some(first) = is_in().next() {
                let schema = first.row.schema();
                let batch = compute::concat_batches(&schema, is_in().map(|kept| &kept.row))?;
                let arguments = over.evaluate(&batch)?;
                let last = batch.num_rows() - 1;
                for (at, kept) in partition.kept.iter_mut().filter(|kept| kept.is_in).enumerate() {
                    let results = cursor.push(over, &arguments, at)?;
                    if results != kept.results || changed.contains(&kept.place) {
                        kept.revision += 1;
                        kept.results = results.clone();
                        let rows = if at == last { &mut newest } else { &mut older };
                        rows.push((kept.row.clone(), results, kept.revision));
                    }
                }
            }
            partition.tip = cursor;
        }
        for (rows, is_newest) in [(older, false), (newest, true)] {
            if let Some((first, ..)) = rows.first() {
                let batch = compute::concat_batches(&first.schema(), rows.iter().map(|(row, ..)| row))?;
                let revisions = rows.iter().map(|(.., revision)| *revision).collect();
                let results: Vec<_> = rows.into_iter().map(|(_, results, _)| results).collect();
                out.push(Produced { rows: finished(program, &batch, &results, revisions)?, is_newest });
            }
        }
        Ok(())
    }

    /// The parts of the state: [`PARTITIONS`] and [`KEPT`].
    pub(crate) fn save(&mut self, draft: &mut Draft) -> Result<()> {
        let changed = std::mem::take(&mut self.changed);
        if self.partitions.is_empty() {
            return Ok(());
        }
        draft.put(PARTITIONS, changed, || self.saved_partitions().map(Content::Rows))?;
        if self.partitions.iter().all(|partition| partition.kept.is_empty()) {
            return Ok(());
        }
        draft.put(KEPT, changed, || self.saved_kept().map(Content::Rows))
    }

    fn saved_partitions(&mut self) -> Result<RecordBatch> {
        let program = self.program.clone();
        let over = over_of(&program)?;
        let (schema, _) = self.saved_schemas(over)?;
        let count = self.partitions.len();
        let mut columns = self.keys.columns(&(0..count as u32).collect::<Vec<_>>())?;
        let newest = |f: fn(&Place) -> i64| self.partitions.iter().map(move |p| p.newest.as_ref().map(f));
        columns.push(Arc::new(Int64Array::from_iter(newest(|place| place.0.0))));
        columns.push(Arc::new(Int64Array::from_iter(newest(|place| place.1.0))));
        columns.push(Arc::new(BinaryArray::from_iter(self.partitions.iter().map(|p| p.newest.as_ref().map(|p| &p.2)))));
        let cursors = || self.partitions.iter().map(|p| p.base.as_ref().unwrap_or(&p.tip));
        columns.push(Arc::new(Int64Array::from_iter_values(cursors().map(|cursor| cursor.rows))));
        for (at, (_, kind, _)) in over.rings.iter().enumerate() {
            let rings = cursors().map(|cursor| &cursor.rings[at]);
            columns.push(list_of(kind, rings.map(|ring| ring.values(0..ring.len(), kind)))?);
        }
        for (at, plan) in over.plans.iter().enumerate() {
            let cursors = self.partitions.iter_mut().map(|p| p.base.as_mut().unwrap_or(&mut p.tip));
            columns.extend(save_standings(plan, cursors.map(|cursor| &mut cursor.standings[at]))?);
        }
        batch_of(schema, columns, count)
    }

    fn saved_kept(&self) -> Result<RecordBatch> {
        let (_, schema) = self.saved_schemas(over_of(&self.program)?)?;
        let kept = || self.partitions.iter().enumerate().flat_map(|(id, p)| p.kept.iter().map(move |kept| (id, kept)));
        let ids = Int64Array::from_iter_values(kept().map(|(id, _)| id as i64));
        let revisions = Int64Array::from_iter_values(kept().map(|(_, kept)| kept.revision));
        let is_in = Int64Array::from_iter_values(kept().map(|(_, kept)| i64::from(kept.is_in)));
        let rows = compute::concat_batches(&loose(&self.program.parts.input), kept().map(|(_, kept)| &kept.row))?;
        let count = rows.num_rows();
        let columns = [Arc::new(ids) as ArrayRef, Arc::new(revisions), Arc::new(is_in)];
        let columns = columns.into_iter().chain(rows.columns().to_vec());
        batch_of(schema, columns.collect(), count)
    }

    /// The metric with the state that [`RowMetric::save`] gave.
    pub(crate) fn restore(
        program: Arc<Program>,
        lateness: Span,
        closed: Micros,
        state: Pieces,
    ) -> Result<Self, RestoreError> {
        let mut metric = RowMetric::new(program.clone(), lateness)?;
        metric.closed = closed;
        let state = state.named(&[PARTITIONS, KEPT])?;
        let (partitions, kept) = (state.all(PARTITIONS).next(), state.all(KEPT).next());
        let over = over_of(&program)?;
        let (partition_schema, kept_schema) = metric.saved_schemas(over)?;
        for (found, wanted) in partitions.iter().zip([&partition_schema]).chain(kept.iter().zip([&kept_schema])) {
            let types = |s: &SchemaRef| s.fields().iter().map(|f| f.data_type().clone()).collect::<Vec<_>>();
            if types(found.schema_ref()) != types(wanted) {
                return Err(RestoreError::Mismatch(format!("found {:?}, want {wanted:?}", found.schema_ref())));
            }
        }
        let Some(partitions) = partitions else { return Ok(metric) };
        let keys = over.partition.len();
        metric.keys.intern(&partitions.columns()[..keys], partitions.num_rows())?;
        let column = |at: usize| partitions.column(keys + at);
        let ints = |at: usize| column(at).as_primitive::<Int64Type>();
        let newest_keys = column(2).as_binary::<i32>();
        for row in 0..partitions.num_rows() {
            metric.keys.hold(row as u32);
            let newest = ints(0)
                .is_valid(row)
                .then(|| (Micros(ints(0).value(row)), Micros(ints(1).value(row)), Box::from(newest_keys.value(row))));
            let mut cursor = Cursor::new(over)?;
            cursor.rows = ints(3).value(row);
            let mut at = 4;
            for (ring, (_, _, most)) in cursor.rings.iter_mut().zip(&over.rings) {
                let values = column(at).as_list::<i32>().value(row);
                (0..values.len()).try_for_each(|value| ring.push(&values, value, *most))?;
                at += 1;
            }
            for (standing, plan) in cursor.standings.iter_mut().zip(&over.plans) {
                let width = standing_fields(plan, "")?.len();
                let state: Vec<ArrayRef> = (at..at + width).map(|at| column(at).slice(row, 1)).collect();
                *standing = load_standing(plan, &state, cursor.rows > 0)?;
                at += width;
            }
            metric.partitions.push(Partition { tip: cursor, base: None, kept: VecDeque::new(), newest });
        }
        kept.map_or(Ok(()), |kept| metric.restore_kept(kept))?;
        Ok(metric)
    }

    /// Puts the kept rows back and goes on over them: their results and the newest state are what they give.
    fn restore_kept(&mut self, kept: &RecordBatch) -> Result<(), RestoreError> {
        let program = self.program.clone();
        let over = over_of(&program)?;
        let all: Vec<usize> = (3..kept.num_columns()).collect();
        let rows = kept.project(&all)?;
        let rows = batch_of(loose(&program.parts.input), rows.columns().to_vec(), rows.num_rows())?;
        let partitions = kept.column(0).as_primitive::<Int64Type>();
        let revisions = kept.column(1).as_primitive::<Int64Type>();
        let is_in = kept.column(2).as_primitive::<Int64Type>();
        let arguments = over.evaluate(&rows)?;
        let (_, places) = self.places(&rows)?;
        for (place, row) in places {
            let row = row as usize;
            let Some(partition) = self.partitions.get_mut(partitions.value(row) as usize) else {
                return Err(RestoreError::Mismatch("a kept row of an unknown partition".to_owned()));
            };
            if partition.base.is_none() {
                partition.base = Some(partition.tip.copy(over)?);
            }
            let (revision, is_in) = (revisions.value(row), is_in.value(row) == 1);
            let results = if is_in { partition.tip.push(over, &arguments, row)? } else { Vec::new() };
            partition.kept.push_back(Kept { place, row: rows.slice(row, 1), results, revision, is_in });
        }
        Ok(())
    }

    fn saved_schemas(&self, over: &Over) -> Result<(SchemaRef, SchemaRef)> {
        let field = |name: String, kind: DataType| Arc::new(Field::new(name, kind, true));
        let int = |name: &str| field(name.to_owned(), DataType::Int64);
        let keys = over.partition.iter().map(|&at| self.program.key_schema.fields()[at].clone());
        let mut partitions: Vec<FieldRef> = keys.collect();
        partitions.extend([
            int("newest_end"),
            int("newest_start"),
            field("newest_key".to_owned(), DataType::Binary),
            int("rows"),
        ]);
        for (at, (_, kind, _)) in over.rings.iter().enumerate() {
            partitions.push(field(format!("ring{at}"), list_type(kind)));
        }
        for (at, plan) in over.plans.iter().enumerate() {
            partitions.extend(standing_fields(plan, &format!("call{at}"))?);
        }
        let mut kept: Vec<FieldRef> = vec![int("partition"), int("revision"), int("is_in")];
        kept.extend(self.program.parts.input.fields().iter().map(|f| Arc::new(f.as_ref().clone().with_nullable(true))));
        Ok((Arc::new(Schema::new(partitions)), Arc::new(Schema::new(kept))))
    }
}

fn over_of(program: &Program) -> Result<&Over> {
    match &program.parts.over {
        Some(over) => Ok(over),
        None => exec_err!("a metric with a window is computed by panes"),
    }
}

fn loose(schema: &SchemaRef) -> SchemaRef {
    Arc::new(Schema::new(schema.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect::<Vec<_>>()))
}

/// From input rows and the results of the calls to rows of [`Program::output`].
fn finished(program: &Program, input: &RecordBatch, results: &[Vec<ScalarValue>], revisions: Vec<i64>) -> Result<Rows> {
    let over = over_of(program)?;
    let mut columns = input.columns().to_vec();
    for (at, call) in over.calls.iter().enumerate() {
        columns.push(match results {
            [] => new_empty_array(call.field.data_type()),
            _ => ScalarValue::iter_to_array(results.iter().map(|row| row[at].clone()))?,
        });
    }
    let batch = program.finish_rows(input, columns)?;
    Ok(Rows { batch, revisions: Some(revisions), gone: None, complete: false, withdrawn: None })
}

/// What says that rows no longer hold.
fn taken_back(program: &Program, left: &[Left]) -> Result<Rows> {
    let rows = compute::concat_batches(&left[0].row.schema(), left.iter().map(|left| &left.row))?;
    let keys = program.keys_of(&rows)?;
    let mut columns: Vec<ArrayRef> =
        ["window_start", "window_end"].iter().filter_map(|name| rows.column_by_name(name).cloned()).collect();
    columns.extend(keys.iter().cloned());
    let revisions: Vec<i64> = left.iter().map(|left| left.revision).collect();
    let newest: BooleanArray = left.iter().map(|left| Some(left.was_newest)).collect();
    let keys = batch_of(program.key_schema.clone(), keys, rows.num_rows())?;
    let gone = compute::filter_record_batch(&keys, &newest)?;
    Ok(Rows {
        gone: Some(gone).filter(|gone| gone.num_rows() > 0),
        withdrawn: Some(program.withdrawal(columns, &revisions)?),
        ..Rows::none(program)
    })
}

fn list_type(kind: &DataType) -> DataType {
    DataType::List(Arc::new(Field::new_list_field(kind.clone(), true)))
}

fn list_of(kind: &DataType, rows: impl Iterator<Item = Result<ArrayRef>>) -> Result<ArrayRef> {
    let rows = rows.collect::<Result<Vec<_>>>()?;
    let offsets = arrow::buffer::OffsetBuffer::from_lengths(rows.iter().map(|row| row.len()));
    let parts: Vec<&dyn Array> = rows.iter().map(AsRef::as_ref).collect();
    let values = if parts.is_empty() { new_empty_array(kind) } else { compute::concat(&parts)? };
    Ok(Arc::new(ListArray::try_new(Arc::new(Field::new_list_field(kind.clone(), true)), offsets, values, None)?))
}

fn standing_fields(plan: &Plan, name: &str) -> Result<Vec<FieldRef>> {
    let field = |kind: DataType| Arc::new(Field::new(name, kind, true));
    Ok(match plan {
        Plan::Running { kind, .. } => kind.state_fields(name)?,
        Plan::First { null, .. } => vec![field(null.data_type())],
        Plan::Indicator { .. } => vec![field(list_type(&DataType::Float64))],
        Plan::Frame { .. } | Plan::Lag { .. } | Plan::Nth { .. } | Plan::RowNumber => Vec::new(),
    })
}

/// One call's state in all partitions, in columns of [`standing_fields`].
fn save_standings<'a>(plan: &Plan, standings: impl Iterator<Item = &'a mut Standing>) -> Result<Vec<ArrayRef>> {
    let fields = standing_fields(plan, "")?;
    if fields.is_empty() {
        return Ok(Vec::new());
    }
    let mut parts: Vec<Vec<ArrayRef>> = vec![Vec::new(); fields.len()];
    for standing in standings {
        let columns = match standing {
            Standing::Aggregate(column) => column.save()?,
            Standing::First(value) => match (value, plan) {
                (Some(value), _) => vec![value.to_array()?],
                (None, Plan::First { null, .. }) => vec![null.to_array()?],
                (None, _) => Vec::new(),
            },
            Standing::Indicator(running) => {
                let mut list = ListBuilder::new(Float64Builder::new());
                list.append_value(running.save().into_iter().map(Some));
                vec![Arc::new(list.finish()) as ArrayRef]
            }
            Standing::None => Vec::new(),
        };
        parts.iter_mut().zip(columns).for_each(|(part, column)| part.push(column));
    }
    let whole = parts.iter().zip(&fields).map(|(part, field)| {
        let part: Vec<&dyn Array> = part.iter().map(AsRef::as_ref).collect();
        Ok(if part.is_empty() { new_empty_array(field.data_type()) } else { compute::concat(&part)? })
    });
    whole.collect()
}

fn load_standing(plan: &Plan, state: &[ArrayRef], has_rows: bool) -> Result<Standing, RestoreError> {
    let mut standing = Standing::new(plan)?;
    match (&mut standing, plan) {
        (Standing::Aggregate(column), _) => column.load(state)?,
        (Standing::First(value), _) if has_rows => *value = Some(ScalarValue::try_from_array(&state[0], 0)?),
        (Standing::Indicator(running), Plan::Indicator { indicator, .. }) => {
            let numbers = state[0].as_list::<i32>().value(0);
            let numbers = numbers.as_primitive::<Float64Type>().values().to_vec();
            *running = indicator::Running::load(*indicator, &numbers)
                .ok_or_else(|| RestoreError::Mismatch("the numbers of an indicator".to_owned()))?;
        }
        _ => {}
    }
    Ok(standing)
}

/// The final rows whose windows end after `since` with their revisions, and those of them that are withdrawn.
pub(crate) fn rows_after(rows: &Rows, since: Micros) -> Result<(RecordBatch, Vec<i64>, Option<RecordBatch>)> {
    let after = |batch: &RecordBatch| -> BooleanArray {
        let ends = batch.column(1).as_primitive::<TimestampMicrosecondType>();
        ends.values().iter().map(|&end| Some(end > since.0)).collect()
    };
    let withdrawn = match &rows.withdrawn {
        Some(gone) => Some(compute::filter_record_batch(gone, &after(gone))?).filter(|gone| gone.num_rows() > 0),
        None => None,
    };
    let revisions = rows.revisions.clone().unwrap_or_else(|| vec![0; rows.batch.num_rows()]);
    let keep = after(&rows.batch);
    if keep.true_count() == keep.len() {
        return Ok((rows.batch.clone(), revisions, withdrawn));
    }
    let revisions = revisions.into_iter().zip(keep.values().iter()).filter(|(_, keep)| *keep).map(|(n, _)| n).collect();
    Ok((compute::filter_record_batch(&rows.batch, &keep)?, revisions, withdrawn))
}
