//! A metric's SQL as the engine runs it: filter, keys, window, aggregates, and what is made of them.
//!
//! Built by the planner in `sql`; immutable, and shared by every workspace that defines the same metric.

use crate::accumulate::Kind;
use crate::event::{Micros, StreamName};
use crate::join::Joins;
use crate::key::{batch_of, one_zero};
use crate::over::Over;
use crate::shared::Computed;
use crate::window::Window;
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, PrimitiveArray, RecordBatch, new_null_array};
use arrow::compute;
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Field, FieldRef, Float16Type, Float32Type, Float64Type, Schema, SchemaRef, TimeUnit,
    TimestampMicrosecondType,
};
use datafusion_common::tree_node::{Transformed, TreeNode};
use datafusion_common::{Result, exec_err};
use datafusion_expr::Operator;
use datafusion_physical_expr::aggregate::AggregateFunctionExpr;
use datafusion_physical_expr::expressions::BinaryExpr;
use datafusion_physical_expr::{PhysicalExpr, PhysicalSortExpr};
use std::sync::Arc;

/// One aggregate call of a metric.
#[derive(Clone, Debug)]
pub struct Aggregate {
    pub call: Arc<AggregateFunctionExpr>,
    /// The FILTER clause.
    pub filter: Option<Arc<dyn PhysicalExpr>>,
}

/// `ORDER BY … LIMIT` over the rows of one window.
#[derive(Clone, Debug)]
pub struct Top {
    /// Over the columns of [`Parts::output`].
    pub order: Vec<PhysicalSortExpr>,
    pub skip: usize,
    pub limit: usize,
}

/// What the planner found in a metric's SQL.
#[derive(Debug)]
pub struct Parts {
    pub stream: StreamName,
    pub window: Window,
    /// Schema of the events the expressions are written against; must hold `ts`. With joins, [`Joins::schema`].
    pub input: SchemaRef,
    /// What is joined to the stream.
    pub joins: Option<Joins>,
    /// The WHERE clause, over `input`.
    pub filter: Option<Arc<dyn PhysicalExpr>>,
    /// GROUP BY but for the window: name and expression over `input`.
    pub keys: Vec<(String, Arc<dyn PhysicalExpr>)>,
    pub aggregates: Vec<Aggregate>,
    /// HAVING, over `window_start, window_end, keys…, aggregates…`.
    pub having: Option<Arc<dyn PhysicalExpr>>,
    /// The SELECT list but for the window's bounds and the keys: name and expression, over the same columns as `having`.
    pub values: Vec<(String, Arc<dyn PhysicalExpr>)>,
    pub top: Option<Top>,
    /// The OVER calls of a metric that goes through the final rows of another one, row by row, without aggregates:
    /// `window` is that of the rows it reads, and `values` are over `input, calls…`.
    pub over: Option<Over>,
}

/// A metric's SQL, planned once.
#[derive(Debug)]
pub struct Program {
    pub(crate) parts: Parts,
    pub(crate) kinds: Vec<Kind>,
    arguments: Vec<Vec<Arc<dyn PhysicalExpr>>>, // of each aggregate
    pub(crate) key_schema: SchemaRef,
    groups: SchemaRef,
    output: SchemaRef,
    rows: SchemaRef,
}

fn time_field(name: &str) -> FieldRef {
    Arc::new(Field::new(name, DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())), false))
}

impl Parts {
    /// The expressions over `input`.
    fn asked(&self) -> Vec<Arc<dyn PhysicalExpr>> {
        let keys = self.keys.iter().map(|(_, expr)| expr.clone());
        let of_aggregate = |aggregate: &Aggregate| {
            let exprs = aggregate.call.all_expressions();
            exprs.args.into_iter().chain(exprs.order_by_exprs).chain(aggregate.filter.clone())
        };
        self.filter.clone().into_iter().chain(keys).chain(self.aggregates.iter().flat_map(of_aggregate)).collect()
    }
}

/// The expression with sums, differences and products that fail where an integer does not fit, instead of wrapping.
pub(crate) fn checked(expr: &Arc<dyn PhysicalExpr>) -> Result<Arc<dyn PhysicalExpr>> {
    let checked = expr.clone().transform_up(|node| {
        let binary = node.downcast_ref::<BinaryExpr>();
        let binary = binary.filter(|b| matches!(b.op(), Operator::Plus | Operator::Minus | Operator::Multiply));
        Ok(match binary.map(|binary| Arc::new(binary.clone().with_fail_on_overflow(true))) {
            Some(checked) => Transformed::yes(checked as Arc<dyn PhysicalExpr>),
            None => Transformed::no(node),
        })
    })?;
    Ok(checked.data)
}

impl Aggregate {
    /// What it is called with and, where it goes by an order, what that is by.
    fn arguments(&self, kind: &Kind) -> Result<Vec<Arc<dyn PhysicalExpr>>> {
        let exprs = self.call.all_expressions();
        let order = if kind.is_ordered() { exprs.order_by_exprs } else { Vec::new() };
        exprs.args.iter().chain(&order).map(checked).collect()
    }
}

impl Program {
    pub fn new(mut parts: Parts) -> Result<Program> {
        let own = |expr: &mut Arc<dyn PhysicalExpr>| checked(expr).map(|checked| *expr = checked);
        let named = |(_, expr): &mut (String, Arc<dyn PhysicalExpr>)| own(expr);
        parts.keys.iter_mut().chain(&mut parts.values).try_for_each(named)?;
        let filters = parts.aggregates.iter_mut().filter_map(|aggregate| aggregate.filter.as_mut());
        filters.chain(&mut parts.filter).chain(&mut parts.having).try_for_each(own)?;
        let asked = parts.asked();
        if let Some(joins) = &mut parts.joins {
            joins.prune(&asked);
        }
        let input = &parts.input;
        let field = |name: &str, expr: &Arc<dyn PhysicalExpr>, schema: &Schema| -> Result<FieldRef> {
            Ok(Arc::new(Field::new(name, expr.data_type(schema)?, true)))
        };
        let keys = parts.keys.iter().map(|(name, expr)| field(name, expr, input)).collect::<Result<Vec<_>>>()?;
        let bounds = [time_field("window_start"), time_field("window_end")];
        let results = parts
            .aggregates
            .iter()
            .map(|a| Arc::new(Field::new(a.call.name(), a.call.field().data_type().clone(), true)));
        let groups: Vec<FieldRef> = match &parts.over {
            Some(over) => input.fields().iter().cloned().chain(over.calls.iter().map(|c| c.field.clone())).collect(),
            None => bounds.iter().cloned().chain(keys.iter().cloned()).chain(results).collect(),
        };
        let groups = Arc::new(Schema::new(groups));
        let values = parts.values.iter().map(|(name, expr)| field(name, expr, &groups)).collect::<Result<Vec<_>>>()?;
        let output =
            Arc::new(Schema::new(bounds.into_iter().chain(keys.iter().cloned()).chain(values).collect::<Vec<_>>()));
        let kinds = parts
            .aggregates
            .iter()
            .map(|a| {
                let arg = a.call.expressions().first().map(|arg| arg.data_type(input)).transpose()?;
                Ok(Kind::of(&a.call, arg.as_ref()))
            })
            .collect::<Result<Vec<_>>>()?;
        let arguments =
            parts.aggregates.iter().zip(&kinds).map(|(a, kind)| a.arguments(kind)).collect::<Result<Vec<_>>>()?;
        let rows = std::iter::once(time_field("ts")).chain(output.fields().iter().cloned()).collect::<Vec<_>>();
        let rows = Arc::new(Schema::new(rows));
        Ok(Program { kinds, arguments, key_schema: Arc::new(Schema::new(keys)), groups, output, rows, parts })
    }

    pub fn stream(&self) -> &StreamName {
        &self.parts.stream
    }

    /// The streams whose events it takes in.
    pub fn streams(&self) -> impl Iterator<Item = &StreamName> {
        let other = self.parts.joins.as_ref().and_then(|joins| joins.other());
        std::iter::once(&self.parts.stream).chain(other.map(|(stream, _)| stream))
    }

    /// The event time its events have reached; of joined streams, that of the slower one. `of` gives a stream's.
    pub(crate) fn frontier(&self, of: impl Fn(&StreamName) -> Option<Micros>) -> Option<Micros> {
        let own = of(self.stream())?;
        match self.parts.joins.as_ref().and_then(|joins| joins.other()) {
            None => Some(own),
            Some((other, near)) => Some(near.frontier(own, of(other)?)),
        }
    }

    /// Whether events of `stream` go into it.
    pub fn reads(&self, stream: &StreamName) -> bool {
        self.streams().any(|read| read == stream)
    }

    /// The reference tables it joins.
    pub fn tables(&self) -> impl Iterator<Item = &StreamName> {
        self.parts.joins.iter().flat_map(|joins| joins.tables())
    }

    /// Whether anything is joined to its stream.
    pub fn is_joined(&self) -> bool {
        self.parts.joins.is_some()
    }

    pub(crate) fn joins(&self) -> Option<&Joins> {
        self.parts.joins.as_ref()
    }

    pub fn window(&self) -> Window {
        self.parts.window
    }

    /// Schema of the metric's rows: `window_start`, `window_end`, keys, values.
    pub fn output(&self) -> &SchemaRef {
        &self.output
    }

    /// Schema of the metric's final rows as another metric reads them: `ts`, then [`Program::output`].
    pub fn rows(&self) -> &SchemaRef {
        &self.rows
    }

    /// Final rows in the columns of [`Program::rows`]: `ts` is the last instant of a row's window, so that a longer
    /// window takes in exactly the shorter ones it covers.
    pub(crate) fn as_events(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        let ends = rows.column(1).as_primitive::<TimestampMicrosecondType>();
        let ts = ends.unary::<_, TimestampMicrosecondType>(|end| end - 1).with_timezone("+00:00");
        let columns = std::iter::once(Arc::new(ts) as ArrayRef).chain(rows.columns().iter().cloned()).collect();
        batch_of(self.rows.clone(), columns, rows.num_rows())
    }

    /// [`crate::metric::Rows::withdrawn`] of these bounds, keys and revisions.
    pub(crate) fn withdrawal(&self, bounds_and_keys: Vec<ArrayRef>, revisions: &[i64]) -> Result<RecordBatch> {
        let mut columns = bounds_and_keys;
        columns.push(Arc::new(Int64Array::from_iter_values(revisions.iter().copied())));
        let mut fields: Vec<FieldRef> = self.output.fields()[..2].to_vec();
        fields.extend(self.key_schema.fields().iter().cloned());
        fields.push(Arc::new(Field::new("revision", DataType::Int64, false)));
        batch_of(Arc::new(Schema::new(fields)), columns, revisions.len())
    }

    /// Whether `upstream` gives the rows that this metric was planned to read.
    pub fn fits(&self, upstream: &Program) -> bool {
        let known = |field: &FieldRef| {
            upstream.rows.field_with_name(field.name()).is_ok_and(|other| other.data_type() == field.data_type())
        };
        self.parts.input.fields().iter().all(known)
    }

    /// Whether the metric goes through the rows of another one, row by row.
    pub fn is_row_wise(&self) -> bool {
        self.parts.over.is_some()
    }

    /// How many key columns stand behind the two bounds in [`Program::output`].
    pub fn key_count(&self) -> usize {
        self.parts.keys.len()
    }

    /// Whether a row's place depends on the other rows of its window.
    pub fn is_top(&self) -> bool {
        self.parts.top.is_some()
    }

    /// Whether the state of every aggregate takes the same few bytes however many events it holds.
    pub(crate) fn is_lean(&self) -> bool {
        !self.kinds.iter().any(|kind| matches!(kind, Kind::Any(_)))
    }

    /// Whether HAVING may take back a row that was there before.
    pub fn may_retract(&self) -> bool {
        self.parts.having.is_some()
    }

    /// The batch with the columns the expressions expect; a column the stream did not have yet is NULL.
    pub(crate) fn align(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let input = &self.parts.input;
        if self.parts.joins.is_some() {
            return Ok(batch.clone()); // put together in this order
        }
        if Arc::ptr_eq(input, batch.schema_ref()) || input.fields() == batch.schema_ref().fields() {
            return Ok(batch.clone());
        }
        let columns = input
            .fields()
            .iter()
            .map(|field| match batch.column_by_name(field.name()) {
                Some(column) if column.data_type() == field.data_type() => column.clone(),
                _ => new_null_array(field.data_type(), batch.num_rows()),
            })
            .collect();
        let nullable = input.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect::<Vec<_>>();
        batch_of(Arc::new(Schema::new(nullable)), columns, batch.num_rows())
    }

    /// Rows of `batch` that the WHERE clause keeps; `None` keeps all.
    pub(crate) fn selected(&self, batch: &RecordBatch) -> Result<Option<BooleanArray>> {
        let Some(filter) = &self.parts.filter else { return Ok(None) };
        let mask = filter.evaluate(batch)?.into_array(batch.num_rows())?;
        let mask = null_is_false(mask.as_boolean());
        Ok((mask.true_count() < mask.len()).then_some(mask))
    }

    pub(crate) fn keys_of(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
        self.parts.keys.iter().map(|(_, expr)| shown(expr, batch)).collect()
    }

    /// Whether the other program tells events apart by the same keys of the same columns.
    pub(crate) fn has_keys_of(&self, other: &Program) -> bool {
        let (own, others) = (&self.parts, &other.parts);
        let is_plain = own.joins.is_none() && others.joins.is_none() && own.stream == others.stream;
        let keys = |parts: &Parts| parts.keys.iter().map(|(_, expr)| expr.clone()).collect::<Vec<_>>();
        is_plain && own.input == others.input && keys(own) == keys(others)
    }

    /// The argument columns and the FILTER mask of every aggregate call.
    pub(crate) fn arguments(&self, batch: &RecordBatch, computed: &mut Computed) -> Result<Vec<Arguments>> {
        let calls = self.parts.aggregates.iter().zip(&self.arguments);
        let arguments = calls.map(|(aggregate, arguments)| {
            let keep = aggregate.filter.as_ref().map(|filter| computed.get(filter, batch)).transpose()?;
            let keep = keep.map(|mask| mask.as_boolean().clone());
            let value = |argument: &Arc<dyn PhysicalExpr>| match (computed.get(argument, batch), &keep) {
                // it may be a row that FILTER leaves out of which there is no value
                (Err(_), Some(mask)) => {
                    argument.evaluate_selection(batch, &null_is_false(mask))?.into_array(batch.num_rows())
                }
                (computed, _) => computed,
            };
            let mut values = arguments.iter().map(value).collect::<Result<Vec<_>>>()?;
            if aggregate.call.is_distinct() {
                values.iter_mut().for_each(|values| *values = one_zero(values));
            }
            Ok(Arguments { values, keep })
        });
        arguments.collect()
    }

    /// From input rows, whose columns and call results are `columns`, to rows of [`Program::output`].
    pub(crate) fn finish_rows(&self, input: &RecordBatch, columns: Vec<ArrayRef>) -> Result<RecordBatch> {
        let rows = input.num_rows();
        let groups = batch_of(self.groups.clone(), columns, rows)?;
        let mut out = Vec::with_capacity(self.output.fields().len());
        for name in ["window_start", "window_end"] {
            match groups.column_by_name(name) {
                Some(column) => out.push(column.clone()),
                None => return exec_err!("rows of `{}` have no column `{name}`", self.stream()),
            }
        }
        out.extend(self.keys_of(&groups)?);
        for (_, expr) in &self.parts.values {
            out.push(shown(expr, &groups)?);
        }
        batch_of(self.output.clone(), out, rows)
    }

    /// From keys and aggregate results to rows of [`Program::output`], and which groups they are:
    /// HAVING, the SELECT list and, where asked for, the top rows of the one window they are of.
    pub(crate) fn finish(&self, columns: Vec<ArrayRef>, rows: usize) -> Result<(RecordBatch, Finished)> {
        let groups = batch_of(self.groups.clone(), columns, rows)?;
        let mut kept = Finished::All;
        let mut chosen = groups;
        if let Some(having) = &self.parts.having {
            let mask = having.evaluate(&chosen)?.into_array(chosen.num_rows())?;
            let mask = null_is_false(mask.as_boolean());
            chosen = compute::filter_record_batch(&chosen, &mask)?;
            kept = Finished::Some(mask.values().set_indices().map(|row| row as u32).collect());
        }
        let fixed = 2 + self.key_count();
        let mut out = chosen.columns()[..fixed].to_vec();
        for (_, expr) in &self.parts.values {
            out.push(shown(expr, &chosen)?);
        }
        let mut batch = batch_of(self.output.clone(), out, chosen.num_rows())?;
        if let Some(top) = &self.parts.top {
            let order =
                top.order.iter().map(|sort| sort.evaluate_to_sort_column(&batch)).collect::<Result<Vec<_>>>()?;
            let rank = compute::lexsort_to_indices(&order, Some(top.skip.saturating_add(top.limit)))?;
            let rank = rank.slice(top.skip.min(rank.len()), rank.len().saturating_sub(top.skip));
            batch = compute::take_record_batch(&batch, &rank)?;
            kept = Finished::Some(rank.values().iter().map(|&row| kept.group(row)).collect());
        }
        Ok((batch, kept))
    }
}

/// A column of a metric's rows. What is no number, or infinite, is NULL: JSON has neither, and a row is to be the same to
/// those who see it live, to rules and metrics over it, and to whoever reads it from the store.
fn shown(expr: &Arc<dyn PhysicalExpr>, batch: &RecordBatch) -> Result<ArrayRef> {
    let values = expr.evaluate(batch)?.into_array(batch.num_rows())?;
    Ok(match values.data_type() {
        DataType::Float64 => finite::<Float64Type>(values, |value| value.is_finite()),
        DataType::Float32 => finite::<Float32Type>(values, |value| value.is_finite()),
        DataType::Float16 => finite::<Float16Type>(values, |value| value.is_finite()),
        _ => values,
    })
}

fn finite<T: ArrowPrimitiveType>(values: ArrayRef, is_finite: impl Fn(T::Native) -> bool) -> ArrayRef {
    let numbers = values.as_primitive::<T>();
    match numbers.values().iter().all(|&value| is_finite(value)) {
        true => values,
        false => Arc::new(numbers.iter().map(|value| value.filter(|&v| is_finite(v))).collect::<PrimitiveArray<T>>()),
    }
}

/// In WHERE and HAVING, NULL keeps no row.
fn null_is_false(mask: &BooleanArray) -> BooleanArray {
    if mask.null_count() > 0 { compute::prep_null_mask_filter(mask) } else { mask.clone() }
}

/// Arguments of one aggregate call for a batch.
pub(crate) struct Arguments {
    pub(crate) values: Vec<ArrayRef>,
    pub(crate) keep: Option<BooleanArray>,
}

/// Which of the groups given to [`Program::finish`] became rows.
pub(crate) enum Finished {
    All,
    Some(Vec<u32>),
}

impl Finished {
    pub(crate) fn group(&self, row: u32) -> u32 {
        match self {
            Finished::All => row,
            Finished::Some(groups) => groups[row as usize],
        }
    }
}
