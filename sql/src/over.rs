//! From SQL that goes through the final rows of another metric, row by row, to the program the engine runs.
//!
//! DataFusion parses, types and plans the text; its plan is projection over windows over filter over scan, and each
//! window expression becomes one call of the engine. What cannot be computed as rows become final is refused by name.

use crate::error::SqlError;
use crate::functions;
use crate::plan::{
    check_deterministic, check_name, config, is_bound, simplified, statement_of, stream_of, unsupported,
};
use crate::sandbox;
use datafusion::arrow::datatypes::{DataType, Field};
use datafusion::catalog::{MemorySchemaProvider, SchemaProvider};
use datafusion::common::tree_node::TreeNode;
use datafusion::common::{DFSchema, DataFusionError, ScalarValue};
use datafusion::datasource::empty::EmptyTable;
use datafusion::execution::context::ExecutionProps;
use datafusion::logical_expr::expr::{NullTreatment, WindowFunction};
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{
    Expr, LogicalPlan, WindowFrame, WindowFrameBound, WindowFrameUnits, WindowFunctionDefinition,
};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::aggregate::AggregateExprBuilder;
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::{
    self, Expr as SqlExpr, GroupByExpr, NamedWindowExpr, SetExpr, Spanned, Statement, WindowSpec, WindowType,
    visit_expressions,
};
use datafusion::sql::sqlparser::tokenizer::Location;
use engine::event::StreamName;
use engine::indicator::Indicator;
use engine::over::{Call, FRAME_MAX, Frame, Over, Work, is_running};
use engine::program::{Aggregate, Parts, Program};
use engine::window::Window;
use std::ops::ControlFlow;
use std::sync::Arc;

/// What an OVER clause looks like.
const EXAMPLE: &str =
    "avg(close) OVER (PARTITION BY symbol ORDER BY window_start ROWS BETWEEN 19 PRECEDING AND CURRENT ROW)";

/// A frame the engine can keep.
const FRAME: &str = "write ROWS BETWEEN n PRECEDING AND CURRENT ROW";

/// SQL without GROUP BY over the rows of a metric.
pub(crate) struct RowSql {
    pub(crate) upstream: StreamName,
    pub(crate) upstream_at: Location,
    statement: Statement,
}

impl RowSql {
    /// `None` where the text groups, or reads a stream: it is a metric with a window.
    pub(crate) fn parse(sql: &str) -> Result<Option<RowSql>, SqlError> {
        let mut statement = statement_of(sql)?;
        let place = statement.span().start;
        let Statement::Query(query) = &mut statement else { return Ok(None) };
        let (with, order, limit) = (query.with.is_some(), query.order_by.is_some(), query.limit_clause.is_some());
        let SetExpr::Select(select) = query.body.as_mut() else { return Ok(None) };
        if !matches!(&select.group_by, GroupByExpr::Expressions(keys, _) if keys.is_empty()) || with {
            return Ok(None);
        }
        let over = first_over(select);
        if select.from.len() != 1 || !select.from[0].joins.is_empty() {
            return Ok(None);
        }
        let (upstream, upstream_at) = stream_of(select)?;
        if upstream.metric().is_none() {
            return match over {
                None => Ok(None),
                Some(place) => Err(SqlError::new(format!(
                    "OVER goes through the final rows of a metric, not the events of stream `{upstream}`"
                ))
                .at(place)
                .help("define a metric with a window first, then read it: FROM metrics.NAME")),
            };
        }
        if order || limit {
            return Err(unsupported(
                "ORDER BY and LIMIT without GROUP BY",
                "leave them out: rows come one by one as they become final",
            )
            .at(place));
        }
        if select.distinct.is_some() || select.having.is_some() || select.qualify.is_some() {
            return Err(unsupported(
                "DISTINCT, HAVING and QUALIFY without GROUP BY",
                "use WHERE, and a second metric over this one for conditions on its results",
            )
            .at(place));
        }
        check_windows(select)?;
        functions::write_out_times(&mut statement);
        Ok(Some(RowSql { upstream, upstream_at, statement }))
    }

    pub(crate) async fn program(self, sql: &str, upstream: &Program) -> Result<Program, SqlError> {
        let convert = |error: DataFusionError| SqlError::from_datafusion(&error, sql);
        let context = sandbox::context(config(), Arc::default());
        functions::indicators().for_each(|function| context.register_udwf(function));
        let (schema, table) = self.upstream.parts();
        let tables = Arc::new(MemorySchemaProvider::new());
        tables.register_table(table.to_owned(), Arc::new(EmptyTable::new(upstream.rows().clone()))).map_err(convert)?;
        let catalog = context.catalog("datafusion").expect("the default catalog is there");
        catalog.register_schema(schema, tables).map_err(convert)?;
        let state = context.state();
        let plan = state.statement_to_plan(DfStatement::Statement(Box::new(self.statement))).await.map_err(convert)?;
        let plan = state.analyzer().execute_and_check(plan, state.config_options(), |_, _| {}).map_err(convert)?;
        check_deterministic(&plan).map_err(convert)??;
        let parts = Shape::of(&plan)?.parts(self.upstream, upstream).map_err(|error| match error {
            PartsError::Sql(error) => error.placed(sql),
            PartsError::DataFusion(error) => convert(error),
        })?;
        Program::new(parts).map_err(convert)
    }
}

/// Where the first OVER stands.
fn first_over(select: &ast::Select) -> Option<Location> {
    let found = visit_expressions(select, |expr| match expr {
        SqlExpr::Function(call) if call.over.is_some() => ControlFlow::Break(expr.span().start),
        _ => ControlFlow::Continue(()),
    });
    found.break_value()
}

/// Refuses frames that look ahead, and orders that are not given: with the place, which the plan no longer knows.
fn check_windows(select: &ast::Select) -> Result<(), SqlError> {
    for named in &select.named_window {
        if let NamedWindowExpr::WindowSpec(spec) = &named.1 {
            check_spec(spec, named.0.span.start)?;
        }
    }
    let mut problem = None;
    let _ = visit_expressions(select, |expr| {
        let SqlExpr::Function(call) = expr else { return ControlFlow::Continue(()) };
        let place = expr.span().start;
        let result = match &call.over {
            None => Ok(()),
            Some(_) if call.name.to_string().eq_ignore_ascii_case("lead") => Err(ahead(place)),
            Some(WindowType::WindowSpec(spec)) if spec.window_name.is_none() => check_spec(spec, place),
            Some(_) => Ok(()),
        };
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                problem = Some(error);
                ControlFlow::Break(())
            }
        }
    });
    problem.map_or(Ok(()), Err)
}

fn ahead(place: Location) -> SqlError {
    SqlError::new("a row is computed as it becomes final, when the rows after it are not known")
        .at(place)
        .help("use lag, or end the frame at CURRENT ROW")
}

fn check_spec(spec: &WindowSpec, place: Location) -> Result<(), SqlError> {
    if spec.order_by.is_empty() {
        return Err(SqlError::new(
            "without ORDER BY an OVER clause takes in all rows of its partition, also later ones",
        )
        .at(place)
        .help(format!("write for example {EXAMPLE}")));
    }
    let Some(frame) = &spec.window_frame else { return Ok(()) };
    if frame.units != ast::WindowFrameUnits::Rows {
        return Err(unsupported(&format!("a {} frame", frame.units), FRAME).at(place));
    }
    let is_ahead = |bound: &ast::WindowFrameBound| matches!(bound, ast::WindowFrameBound::Following(_));
    if is_ahead(&frame.start_bound) || frame.end_bound.as_ref().is_some_and(is_ahead) {
        return Err(ahead(place));
    }
    Ok(())
}

enum PartsError {
    Sql(SqlError),
    DataFusion(DataFusionError),
}

impl From<SqlError> for PartsError {
    fn from(error: SqlError) -> Self {
        PartsError::Sql(error)
    }
}

impl From<DataFusionError> for PartsError {
    fn from(error: DataFusionError) -> Self {
        PartsError::DataFusion(error)
    }
}

/// The plan, taken apart: projection → windows → WHERE → scan.
struct Shape<'a> {
    select: &'a [Expr],
    /// In the order in which their columns stand in `layout`.
    calls: Vec<&'a Expr>,
    filters: Vec<&'a Expr>,
    scan: &'a DFSchema,
    /// The scan's columns, and the calls' results behind.
    layout: &'a DFSchema,
}

impl<'a> Shape<'a> {
    fn of(plan: &'a LogicalPlan) -> Result<Self, SqlError> {
        let odd = |plan: &LogicalPlan| {
            let first = plan.display().to_string();
            let first = first.split(':').next().unwrap_or_default().to_owned();
            unsupported(
                &format!("this shape of query ({first})"),
                format!(
                    "without GROUP BY write SELECT … FROM metrics.NAME [WHERE …], with OVER clauses such as {EXAMPLE}"
                ),
            )
        };
        let LogicalPlan::Projection(projection) = plan else { return Err(odd(plan)) };
        let mut plan = projection.input.as_ref();
        let layout = plan.schema().as_ref();
        let mut windows = Vec::new();
        while let LogicalPlan::Window(window) = plan {
            windows.push(window);
            plan = &window.input;
        }
        let scan = plan.schema().as_ref();
        let calls = windows.iter().rev().flat_map(|window| &window.window_expr).collect();
        let mut filters = Vec::new();
        loop {
            match plan {
                LogicalPlan::Filter(filter) => {
                    filters.push(&filter.predicate);
                    plan = &filter.input;
                }
                LogicalPlan::SubqueryAlias(alias) => plan = &alias.input,
                LogicalPlan::TableScan(_) => break,
                other => return Err(odd(other)),
            }
        }
        Ok(Self { select: &projection.expr, calls, filters, scan, layout })
    }

    fn parts(self, stream: StreamName, upstream: &Program) -> Result<Parts, PartsError> {
        let planner =
            Lowering { scan: self.scan, upstream, props: ExecutionProps::new(), planning: Default::default() };
        let mut filter = None;
        for part in &self.filters {
            let part = planner.physical(part)?;
            filter = Some(match filter {
                None => part,
                Some(other) => datafusion::physical_expr::expressions::binary(
                    other,
                    datafusion::logical_expr::Operator::And,
                    part,
                    self.scan.as_arrow(),
                )?,
            });
        }
        let mut calls = Vec::new();
        let mut partition: Option<Vec<usize>> = None;
        for (at, expr) in self.calls.iter().enumerate() {
            let expr = match expr {
                Expr::Alias(alias) => alias.expr.as_ref(),
                other => other,
            };
            let Expr::WindowFunction(call) = expr else {
                return Err(unsupported("an expression around OVER in this place", "select it plainly").into());
            };
            let mine = planner.partition(call)?;
            if *partition.get_or_insert_with(|| mine.clone()) != mine {
                return Err(SqlError::new("all OVER clauses of a metric partition alike")
                    .help("define a second metric for the other partition")
                    .into());
            }
            let field = self.layout.field(self.scan.fields().len() + at);
            let field = Arc::new(Field::new(field.name(), field.data_type().clone(), true));
            calls.push(Call { work: planner.work(call, &mine, field.data_type())?, field });
        }
        let keys_at = 2..2 + upstream.key_count();
        let upstream_keys: Vec<&str> =
            upstream.output().fields()[keys_at].iter().map(|field| field.name().as_str()).collect();
        let partition = partition.unwrap_or_else(|| (0..upstream_keys.len()).collect());
        let over = Over::new(partition, calls, self.scan.as_arrow())?;
        let (mut values, mut named) = (Vec::new(), vec![None; upstream_keys.len()]);
        for expr in self.select {
            let (inner, name): (&Expr, String) = match expr {
                Expr::Alias(alias) => (alias.expr.as_ref(), alias.name.clone()),
                other => (other, other.qualified_name().1),
            };
            if let Expr::Column(column) = inner {
                if name == column.name && (is_bound(&name) || name == "ts") {
                    continue;
                }
                let at = upstream_keys.iter().position(|key| *key == column.name && self.scan.has_column(column));
                if let Some(at) = at.filter(|&at| named[at].is_none()) {
                    named[at] = Some(name);
                    continue;
                }
            }
            values.push((name, planner.over_layout(inner, self.layout)?));
        }
        let mut keys = Vec::new();
        for (key, name) in upstream_keys.iter().zip(named) {
            let expr = datafusion::physical_expr::expressions::col(key, self.scan.as_arrow())?;
            keys.push((name.unwrap_or_else(|| (*key).to_owned()), expr));
        }
        let mut seen: Vec<&str> = vec!["ts"];
        for (name, _) in keys.iter().chain(&values) {
            check_name(name)?;
            if seen.contains(&name.as_str()) {
                let message = match name.as_str() {
                    "ts" => "a metric's rows have `ts` already".to_owned(),
                    name => format!("two columns are called `{name}`"),
                };
                return Err(SqlError::new(message).help("rename one with AS").into());
            }
            seen.push(name);
        }
        Ok(Parts {
            stream,
            window: upstream.window(),
            input: upstream.rows().clone(),
            joins: None,
            filter,
            keys,
            aggregates: Vec::new(),
            having: None,
            values,
            top: None,
            over: Some(over),
        })
    }
}

/// From logical expressions over the scan to what the engine runs.
struct Lowering<'a> {
    scan: &'a DFSchema,
    upstream: &'a Program,
    props: ExecutionProps,
    planning: PhysicalPlanningContext,
}

impl Lowering<'_> {
    fn physical(&self, expr: &Expr) -> Result<Arc<dyn PhysicalExpr>, PartsError> {
        self.over_layout(expr, self.scan)
    }

    fn over_layout(&self, expr: &Expr, layout: &DFSchema) -> Result<Arc<dyn PhysicalExpr>, PartsError> {
        if has_subquery(expr) {
            return Err(unsupported("a subquery", "define a second metric").into());
        }
        let expr = simplified(expr, layout)?;
        Ok(datafusion::physical_expr::create_physical_expr(&expr, layout, &self.props, &self.planning)?)
    }

    fn constant(&self, expr: &Expr, what: &str) -> Result<ScalarValue, PartsError> {
        match simplified(expr, self.scan)? {
            Expr::Literal(value, _) => Ok(value),
            other => Err(SqlError::new(format!("{what} must be constant, not `{other}`")).into()),
        }
    }

    /// Places of the PARTITION BY columns among the keys of the metric that is read; checks ORDER BY too.
    fn partition(&self, call: &WindowFunction) -> Result<Vec<usize>, PartsError> {
        let fields = self.upstream.output().fields();
        let keys: Vec<&str> = fields[2..2 + self.upstream.key_count()].iter().map(|f| f.name().as_str()).collect();
        let mut places = Vec::new();
        for expr in &call.params.partition_by {
            let at = match expr {
                Expr::Column(column) => keys.iter().position(|key| *key == column.name),
                _ => None,
            };
            places.push(at.ok_or_else(|| {
                SqlError::new(format!("PARTITION BY takes keys of the metric that is read, not `{expr}`"))
                    .help(format!("its keys are: {}", keys.join(", ")))
            })?);
        }
        places.sort_unstable();
        places.dedup();
        let by_start = matches!(self.upstream.window(), Window::Tumble { .. } | Window::Hop { .. });
        let order: Vec<(&str, bool)> = (call.params.order_by.iter())
            .filter_map(|sort| match &sort.expr {
                Expr::Column(column) => Some((column.name.as_str(), sort.asc)),
                _ => None,
            })
            .collect();
        match (order.as_slice(), call.params.order_by.len()) {
            ([("window_end" | "ts", true)], 1) => {}
            ([("window_start", true)], 1) if by_start => {}
            ([("window_start", true)], 1) => {
                return Err(SqlError::new("windows of this kind do not end in the order in which they start")
                    .help("write ORDER BY window_end")
                    .into());
            }
            _ => {
                return Err(SqlError::new("an OVER clause goes by the order of windows and by nothing else")
                    .help("write ORDER BY window_start, ascending")
                    .into());
            }
        }
        Ok(places)
    }

    fn work(&self, call: &WindowFunction, partition: &[usize], kind: &DataType) -> Result<Work, PartsError> {
        let params = &call.params;
        if params.null_treatment == Some(NullTreatment::IgnoreNulls) {
            return Err(unsupported("IGNORE NULLS", "leave NULLs out with WHERE, or use coalesce").into());
        }
        match &call.fun {
            WindowFunctionDefinition::AggregateUDF(function) => {
                let args = params.args.iter().map(|arg| self.physical(arg)).collect::<Result<Vec<_>, _>>()?;
                let name = function.name();
                let built = AggregateExprBuilder::new(function.clone(), args)
                    .schema(Arc::new(self.scan.as_arrow().clone()))
                    .alias(name)
                    .with_distinct(params.distinct)
                    .build()?;
                let filter = params.filter.as_ref().map(|filter| self.physical(filter)).transpose()?;
                let aggregate = Aggregate { call: Arc::new(built), filter };
                match self.frame(&params.window_frame, partition)? {
                    Some(frame) => Ok(Work::Frame { aggregate, frame }),
                    None if is_running(&aggregate, self.scan.as_arrow())? => Ok(Work::Running { aggregate }),
                    None => Err(SqlError::new(format!("`{name}` over all rows so far would keep all of them"))
                        .help(format!("{FRAME}; without bound there are count, sum, avg, min and max of numbers"))
                        .into()),
                }
            }
            WindowFunctionDefinition::WindowUDF(function) => {
                self.window_function(function.name(), call, partition, kind)
            }
        }
    }

    fn window_function(
        &self,
        name: &str,
        call: &WindowFunction,
        partition: &[usize],
        kind: &DataType,
    ) -> Result<Work, PartsError> {
        let args = &call.params.args;
        let whole = |at: usize, what: &str| -> Result<i64, PartsError> {
            let value = self.constant(&args[at], what)?.cast_to(&DataType::Int64)?;
            match value {
                ScalarValue::Int64(Some(n)) => Ok(n),
                _ => Err(SqlError::new(format!("{what} must be a whole number")).into()),
            }
        };
        if let Some(signature) = engine::indicator::signature(name) {
            let values =
                args.iter().take(signature.values).map(|arg| self.physical(arg)).collect::<Result<Vec<_>, _>>()?;
            let mut parameters = Vec::new();
            for arg in args.iter().skip(signature.values) {
                let value = self.constant(arg, &format!("in {}, a parameter", signature.usage))?;
                parameters.push(functions::constant(&value)?);
            }
            let indicator = Indicator::new(name, &parameters).map_err(|error| SqlError::new(error.to_string()))?;
            return Ok(Work::Indicator { indicator, values });
        }
        match name {
            "row_number" => Ok(Work::RowNumber),
            "lag" => {
                let offset = if args.len() > 1 { whole(1, "the offset of lag")? } else { 1 };
                let offset = usize::try_from(offset).ok().filter(|offset| *offset <= FRAME_MAX);
                let offset = offset.ok_or_else(|| {
                    SqlError::new(format!("lag looks 0 to {FRAME_MAX} rows back (engine bound FRAME_MAX)"))
                })?;
                let default = match args.get(2) {
                    Some(default) => self.constant(default, "the default of lag")?.cast_to(kind)?,
                    None => ScalarValue::try_from(kind)?,
                };
                Ok(Work::Lag { value: self.physical(&args[0])?, offset, default })
            }
            "first_value" | "last_value" | "nth_value" => {
                let value = self.physical(&args[0])?;
                let frame = self.frame(&call.params.window_frame, partition)?;
                match (name, frame) {
                    ("first_value", None) => Ok(Work::First { value }),
                    ("first_value", Some(frame)) => Ok(Work::Nth { value, frame, n: 0, from_end: false }),
                    ("last_value", frame) => {
                        let frame = frame.unwrap_or(Frame { first: 0, last: 0 });
                        Ok(Work::Nth { value, frame, n: 0, from_end: true })
                    }
                    (_, None) => Err(SqlError::new("nth_value takes a bounded frame").help(FRAME).into()),
                    (_, Some(frame)) => match whole(1, "n of nth_value")? {
                        0 => Err(SqlError::new("n of nth_value starts at 1").into()),
                        n => Ok(Work::Nth { value, frame, n: n.unsigned_abs() as usize - 1, from_end: n < 0 }),
                    },
                }
            }
            other => Err(unsupported(
                &format!("the window function `{other}`"),
                "there are row_number, lag, first_value, last_value, nth_value, every aggregate, and the indicators",
            )
            .into()),
        }
    }

    /// The frame's bounds; `None` for all rows so far.
    fn frame(&self, frame: &WindowFrame, partition: &[usize]) -> Result<Option<Frame>, PartsError> {
        if frame.units != WindowFrameUnits::Rows {
            // what stands for no frame at all: the same as ROWS where no two rows of a partition are of one window
            let is_default = matches!(&frame.start_bound, WindowFrameBound::Preceding(start) if start.is_null())
                && frame.end_bound == WindowFrameBound::CurrentRow;
            if is_default && partition.len() == self.upstream.key_count() {
                return Ok(None);
            }
            return Err(SqlError::new(
                "several rows of a partition share a window, so the frame must say which come first",
            )
            .help("write ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW, or a bounded ROWS frame")
            .into());
        }
        let rows = |bound: &WindowFrameBound| -> Result<Option<usize>, PartsError> {
            match bound {
                WindowFrameBound::CurrentRow => Ok(Some(0)),
                WindowFrameBound::Preceding(rows) if rows.is_null() => Ok(None),
                WindowFrameBound::Preceding(rows) => match rows.cast_to(&DataType::UInt64)? {
                    ScalarValue::UInt64(Some(rows)) if rows <= FRAME_MAX as u64 => Ok(Some(rows as usize)),
                    other => Err(SqlError::new(format!("a frame of {other} rows is longer than {FRAME_MAX}"))
                        .help("aggregate over a metric of longer windows instead (engine bound FRAME_MAX)")
                        .into()),
                },
                WindowFrameBound::Following(_) => Err(ahead(Location::empty()).into()),
            }
        };
        match (rows(&frame.start_bound)?, rows(&frame.end_bound)?) {
            (None, Some(0)) => Ok(None),
            (Some(first), Some(last)) if first >= last => Ok(Some(Frame { first, last })),
            (Some(_), Some(_)) => Err(SqlError::new("the frame ends before it starts").help(FRAME).into()),
            _ => Err(SqlError::new("a frame without a bound ends at CURRENT ROW").help(FRAME).into()),
        }
    }
}

fn has_subquery(expr: &Expr) -> bool {
    let found = expr.exists(|e| Ok(matches!(e, Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_))));
    found.unwrap_or(true)
}
