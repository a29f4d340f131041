//! From a metric's SQL to the program the engine runs.
//!
//! The window call in GROUP BY becomes two generated columns, `window_start` and `window_end`; what is
//! left is plain SQL that DataFusion plans and type-checks. Its plan is then taken apart at the
//! aggregate. The same rewriting over a table that has the two columns is the batch oracle of the tests.

use crate::division;
use crate::error::SqlError;
use crate::join::{self, FromClause};
use crate::over::RowSql;
use crate::{sandbox, text};
use datafusion::arrow::compute::kernels::cast_utils::parse_interval_month_day_nano;
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::{MemorySchemaProvider, SchemaProvider};
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{DFSchema, DFSchemaRef, DataFusionError, TableReference};
use datafusion::datasource::empty::EmptyTable;
use datafusion::execution::context::ExecutionProps;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::{
    Aggregate as AggregatePlan, Expr, FetchType, LogicalPlan, Operator, SkipType, SortExpr, Volatility,
};
use datafusion::optimizer::simplify_expressions::ExprSimplifier;
use datafusion::physical_expr::aggregate::LoweredAggregateBuilder;
use datafusion::physical_expr::expressions::{Column, binary};
use datafusion::physical_expr::{LexOrdering, PhysicalExpr, PhysicalSortExpr, create_physical_sort_expr};
use datafusion::prelude::SessionConfig;
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::{
    self, Expr as SqlExpr, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr, Ident, SetExpr, Spanned,
    Statement, TableFactor, visit_expressions_mut,
};
use engine::event::{METRICS, Span, StreamName};
use engine::program::{Aggregate, Parts, Program, Top};
use engine::window::Window;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

/// The functions that cut time, as they are written.
const WINDOWS: &str = "tumble(ts, INTERVAL '1 minute'), hop(ts, INTERVAL '10 seconds', INTERVAL '5 minutes'), \
     session(ts, INTERVAL '30 seconds') or cumulate(ts, INTERVAL '1 minute', INTERVAL '1 day')";

/// Names a metric's own columns cannot have.
const RESERVED: [&str; 4] = ["window_start", "window_end", "final", "revision"];

/// Plans metrics, each distinct text over one schema once for the whole process.
#[derive(Default)]
pub struct Planner {
    /// By text.
    programs: Mutex<HashMap<String, Vec<Planned>>>,
}

/// A program that some workspace still runs.
#[derive(Clone)]
struct Planned {
    program: Weak<Program>,
    /// The names in FROM and what they stood for.
    inputs: Vec<(StreamName, SchemaRef)>,
}

impl Planner {
    /// The program of `sql`; `source` gives what a name in FROM stands for, `None` where there is no such thing.
    pub async fn program<S: Into<Source>>(
        &self,
        sql: &str,
        source: impl Fn(&StreamName) -> Option<S>,
    ) -> Result<Arc<Program>, SqlError> {
        if let Some(known) = self.known(sql, &source) {
            return Ok(known);
        }
        text::deep(self.planned(sql, source)).await.map_err(|error| error.placed(sql))
    }

    async fn planned<S: Into<Source>>(
        &self,
        sql: &str,
        source: impl Fn(&StreamName) -> Option<S>,
    ) -> Result<Arc<Program>, SqlError> {
        let metric = match RowSql::parse(sql)? {
            Some(rows) => Parsed::Rows(rows),
            None => Parsed::Windows(MetricSql::parse(sql)?),
        };
        let named = match &metric {
            Parsed::Rows(rows) => vec![(&rows.upstream, rows.upstream_at)],
            Parsed::Windows(metric) => {
                metric.from.relations.iter().map(|relation| (&relation.name, relation.at)).collect()
            }
        };
        let sources = named
            .iter()
            .map(|(name, place)| source(name).map(Into::into).ok_or_else(|| unknown(name).at(*place)))
            .collect::<Result<Vec<Source>, _>>()?;
        let (stream, place) = named[0];
        if let Source::Metric(upstream) = &sources[0]
            && upstream.output().column_with_name("ts").is_some()
        {
            return Err(SqlError::new(format!("the rows of `{stream}` have a column `ts` of their own"))
                .at(place)
                .help("the time of a row is called so: define that metric with another name for its column"));
        }
        let inputs: Vec<SchemaRef> = sources.iter().map(Source::columns).collect();
        let named: Vec<StreamName> = named.iter().map(|(name, _)| (*name).clone()).collect();
        let program = Arc::new(match (metric, &sources[0]) {
            (Parsed::Windows(metric), Source::Stream(_)) => metric.program(sql, inputs.clone()).await?,
            (Parsed::Windows(metric), Source::Metric(_)) if matches!(metric.window, Window::Session { .. }) => {
                return Err(SqlError::new("a session is cut from events, not from the rows of another metric")
                    .at(place)
                    .help("read the stream itself, or use tumble, hop or cumulate"));
            }
            (Parsed::Windows(metric), Source::Metric(_)) => {
                metric.program(sql, vec![without_bounds(&inputs[0])]).await?
            }
            (Parsed::Rows(rows), Source::Metric(upstream)) => rows.program(sql, upstream).await?,
            (Parsed::Rows(rows), Source::Stream(_)) => return Err(unknown(&rows.upstream).at(rows.upstream_at)),
        });
        let is_span = |kind: &DataType| matches!(kind, DataType::Duration(_) | DataType::Interval(_));
        if let Some(span) = program.output().fields().iter().find(|field| is_span(field.data_type())) {
            let name = span.name();
            return Err(SqlError::new(format!("`{name}` is a length of time, which a row's columns cannot hold"))
                .help("give it in seconds: extract(epoch FROM window_end) - extract(epoch FROM window_start)"));
        }
        let mut programs = self.programs.lock();
        programs.retain(|_, known| {
            known.retain(|planned| planned.program.strong_count() > 0);
            !known.is_empty()
        });
        let planned = Planned { program: Arc::downgrade(&program), inputs: named.into_iter().zip(inputs).collect() };
        programs.entry(sql.to_owned()).or_default().push(planned);
        Ok(program)
    }

    /// The program of a text that was planned when the names in it stood for the same: nothing is parsed again.
    fn known<S: Into<Source>>(&self, sql: &str, source: &impl Fn(&StreamName) -> Option<S>) -> Option<Arc<Program>> {
        let known = self.programs.lock().get(sql)?.clone();
        known.into_iter().find_map(|planned| {
            let is_same = |(name, input): &(StreamName, SchemaRef)| {
                source(name).is_some_and(|source| Arc::ptr_eq(&source.into().columns(), input))
            };
            planned.program.upgrade().filter(|_| planned.inputs.iter().all(is_same))
        })
    }
}

/// What a metric reads.
pub enum Source {
    /// A stream's events, by their Arrow schema.
    Stream(SchemaRef),
    /// The final rows of another metric.
    Metric(Arc<Program>),
}

impl Source {
    /// The columns of its events or rows.
    fn columns(&self) -> SchemaRef {
        match self {
            Source::Stream(schema) => schema.clone(),
            Source::Metric(upstream) => upstream.rows().clone(),
        }
    }
}

impl From<SchemaRef> for Source {
    fn from(schema: SchemaRef) -> Self {
        Source::Stream(schema)
    }
}

enum Parsed {
    Windows(MetricSql),
    Rows(RowSql),
}

fn unknown(stream: &StreamName) -> SqlError {
    match stream.parts() {
        (METRICS, metric) => SqlError::new(format!("there is no metric `{metric}`"))
            .help("define it first, or name one that exists; a stream has two parts, for example market.trades"),
        (_, table) if stream.is_table() => SqlError::new(format!("there is no reference table `{stream}`"))
            .help(format!("define it with PUT …/tables/{table} or name one that exists")),
        _ => SqlError::new(format!("there is no stream `{stream}`"))
            .help(format!("define it with PUT …/streams/{stream} or name one that exists")),
    }
}

/// A metric's rows as a longer window takes them in: the bounds are those of the new window.
fn without_bounds(rows: &SchemaRef) -> SchemaRef {
    Arc::new(Schema::new(rows.fields().iter().filter(|field| !is_bound(field.name())).cloned().collect::<Vec<_>>()))
}

/// Whether the text is an expression, over whatever metric.
pub fn check_condition(sql: &str) -> Result<(), SqlError> {
    text::check_expression(sql)
}

/// An alert rule's condition over the rows of `program`: a boolean expression.
pub fn condition(sql: &str, program: &Program) -> Result<Arc<dyn PhysicalExpr>, SqlError> {
    text::check_expression(sql)?;
    let context = sandbox::context(config(), Arc::default());
    let schema =
        DFSchema::try_from(program.output().as_ref().clone()).map_err(|e| SqlError::from_datafusion(&e, sql))?;
    let convert = |error: DataFusionError| SqlError::from_datafusion(&error, sql);
    let expr = context.parse_sql_expr(sql, &schema).map_err(convert)?;
    if expr.exists(|e| Ok(matches!(e, Expr::AggregateFunction(_) | Expr::WindowFunction(_)))).map_err(convert)? {
        return Err(SqlError::new("a condition sees one row of its metric and cannot aggregate")
            .help("compute the aggregate in the metric and compare its column here"));
    }
    let expr = division::by_zero_is_null(expr, &schema).map_err(convert)?.data;
    let expr = context.create_physical_expr(expr, &schema).map_err(convert)?;
    match expr.data_type(program.output()).map_err(convert)? {
        DataType::Boolean => Ok(expr),
        other => Err(SqlError::new(format!("the condition is {other}, not true or false"))
            .help("compare it with something, for example `vwap > 100`")),
    }
}

pub(crate) fn config() -> SessionConfig {
    let mut config = SessionConfig::new().with_target_partitions(1).with_information_schema(false);
    config.options_mut().sql_parser.collect_spans = true;
    config
}

/// A metric's SQL after parsing: the statement without its window call, and the window.
pub struct MetricSql {
    pub stream: StreamName,
    pub window: Window,
    /// Plain SQL over a table that has `window_start` and `window_end` beside the stream's columns.
    pub statement: Statement,
    from: FromClause,
}

impl MetricSql {
    /// Reads the text, takes the window out of GROUP BY and refuses what no window program can do.
    pub fn parse(sql: &str) -> Result<MetricSql, SqlError> {
        let mut statement = statement_of(sql)?;
        let place = statement.span().start;
        let Statement::Query(query) = &mut statement else {
            return Err(SqlError::new("a metric is a SELECT").at(place));
        };
        if let Some(with) = &query.with {
            return Err(unsupported("WITH", "write one SELECT over one stream").at(with.span().start));
        }
        if !query.locks.is_empty() {
            return Err(unsupported("FOR UPDATE", "leave it out: a metric only reads").at(place));
        }
        let select = match query.body.as_mut() {
            SetExpr::Select(select) => select,
            other => {
                return Err(unsupported("UNION, EXCEPT, INTERSECT and VALUES", "define one metric for each part")
                    .at(other.span().start));
            }
        };
        if select.distinct.is_some() {
            return Err(unsupported("SELECT DISTINCT", "GROUP BY the columns instead").at(place));
        }
        if !select.named_window.is_empty() || select.qualify.is_some() {
            return Err(unsupported("WINDOW and QUALIFY", "use GROUP BY with a window").at(place));
        }
        for part in select
            .from
            .iter()
            .flat_map(|from| std::iter::once(&from.relation).chain(from.joins.iter().map(|join| &join.relation)))
        {
            if let TableFactor::Table { sample: Some(_), .. } = part {
                let instead = "take some of the events with WHERE, or use approx_distinct and approx_percentile_cont";
                return Err(unsupported("TABLESAMPLE", instead).at(part.span().start));
            }
        }
        let from = join::read(select)?;
        let GroupByExpr::Expressions(group_by, modifiers) = &mut select.group_by else {
            return Err(unsupported("GROUP BY ALL", format!("list the keys and the window: {WINDOWS}")).at(place));
        };
        if !modifiers.is_empty() {
            return Err(unsupported("ROLLUP, CUBE and GROUPING SETS", "define one metric for each grouping").at(place));
        }
        let mut found: Option<(Window, SqlExpr)> = None;
        let mut rest = Vec::new();
        for expr in std::mem::take(group_by) {
            match window_of(&expr)? {
                Some(window) if found.is_none() => found = Some((window, expr)),
                Some(_) => return Err(SqlError::new("a metric has one window").at(expr.span().start)),
                None => rest.push(expr),
            }
        }
        let Some((window, call)) = found else {
            return Err(SqlError::new("without a window this metric's state would grow without bound")
                .at(place)
                .help(format!("add a window to GROUP BY: {WINDOWS}")));
        };
        if matches!(window, Window::Session { .. }) && (query.order_by.is_some() || query.limit_clause.is_some()) {
            let ranked = "ORDER BY … LIMIT ranks the rows of one window, and every session is one of its own";
            return Err(SqlError::new(ranked).at(place).help("leave it out, or rank over tumble, hop or cumulate"));
        }
        from.check_window(window, &call)?;
        let column = |name: &str| SqlExpr::Identifier(Ident::new(name));
        *group_by = [column("window_start"), column("window_end")].into_iter().chain(rest).collect();
        // the call itself may be selected too: it means the start
        let mut nested: Option<SqlError> = None;
        let _ = visit_expressions_mut(&mut statement, |expr| {
            if same(expr, &call) {
                *expr = column("window_start");
            } else if let Err(error) | Ok(Some(error)) = window_of(expr)
                .map(|w| w.map(|_| SqlError::new("a window call stands only in GROUP BY").at(expr.span().start)))
            {
                nested = Some(error);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        if let Some(error) = nested {
            return Err(error);
        }
        Ok(MetricSql { stream: from.relations[0].name.clone(), window, statement, from })
    }

    async fn program(self, sql: &str, inputs: Vec<SchemaRef>) -> Result<Program, SqlError> {
        let convert = |error: DataFusionError| SqlError::from_datafusion(&error, sql);
        let context = sandbox::context(config(), Arc::default());
        let catalog = context.catalog("datafusion").expect("the default catalog is there");
        for (at, (relation, input)) in self.from.relations.iter().zip(&inputs).enumerate() {
            let (schema, table) = relation.name.parts();
            let tables = match catalog.schema(schema) {
                Some(tables) => tables,
                None => {
                    let tables: Arc<dyn SchemaProvider> = Arc::new(MemorySchemaProvider::new());
                    catalog.register_schema(schema, tables.clone()).map_err(convert)?;
                    tables
                }
            };
            // a table may be joined twice
            if !tables.table_exist(table) {
                let input = if at == 0 { with_bounds(input) } else { input.clone() };
                tables.register_table(table.to_owned(), Arc::new(EmptyTable::new(input))).map_err(convert)?;
            }
        }
        let state = context.state();
        let statement = DfStatement::Statement(Box::new(self.statement));
        let plan = state.statement_to_plan(statement).await.map_err(convert)?;
        let plan = state.analyzer().execute_and_check(plan, state.config_options(), |_, _| {}).map_err(convert)?;
        check_deterministic(&plan).map_err(convert)??;
        let parts = Shape::of(&plan)?.parts(sql, &self.from, self.window, &inputs).map_err(|error| match error {
            PartsError::Sql(error) => error,
            PartsError::DataFusion(error) => convert(error),
        })?;
        Program::new(parts).map_err(convert)
    }
}

/// The one statement of a metric's text.
pub(crate) fn statement_of(sql: &str) -> Result<Statement, SqlError> {
    <[Statement; 1]>::try_from(text::statements(sql)?)
        .map(|[statement]| statement)
        .map_err(|many| SqlError::new(format!("a metric is one SELECT, this text has {} statements", many.len())))
}

/// The stream's schema with the two generated columns behind.
pub fn with_bounds(input: &SchemaRef) -> SchemaRef {
    let kind = streams::schema::timestamp_type();
    let mut fields: Vec<_> = input.fields().iter().cloned().collect();
    fields.extend(["window_start", "window_end"].map(|name| Arc::new(Field::new(name, kind.clone(), false))));
    Arc::new(Schema::new(fields))
}

pub(crate) fn unsupported(what: &str, instead: impl Into<String>) -> SqlError {
    SqlError::new(format!("{what} is not supported in a metric")).help(instead)
}

/// The stream a metric reads; the metric that a name of one part stands for is written out as `metrics.NAME`.
pub(crate) fn stream_of(
    select: &mut ast::Select,
) -> Result<(StreamName, datafusion::sql::sqlparser::tokenizer::Location), SqlError> {
    let place = select.span().start;
    let [from] = select.from.as_mut_slice() else {
        return Err(match select.from.len() {
            0 => SqlError::new("a metric reads a stream").at(place).help("add FROM, for example FROM market.trades"),
            _ => unsupported("a join", "read one stream").at(select.from[1].span().start),
        });
    };
    if let Some(join) = from.joins.first() {
        return Err(unsupported("a join", "read one stream").at(join.relation.span().start));
    }
    let TableFactor::Table { name, args: None, .. } = &mut from.relation else {
        return Err(
            unsupported("a subquery or table function in FROM", "read one stream").at(from.relation.span().start)
        );
    };
    let place = name.span().start;
    if name.0.len() == 1 {
        name.0.insert(0, ast::ObjectNamePart::Identifier(Ident::new(METRICS)));
    }
    let parts: Vec<&str> = name.0.iter().filter_map(|part| part.as_ident()).map(|ident| ident.value.as_str()).collect();
    let stream = parts.join(".").to_ascii_lowercase();
    let stream = stream.parse().map_err(|e: engine::event::NameError| SqlError::new(e.to_string()).at(place))?;
    Ok((stream, place))
}

/// The window an expression stands for; `None` for every other expression.
pub(crate) fn window_of(expr: &SqlExpr) -> Result<Option<Window>, SqlError> {
    let SqlExpr::Function(call) = expr else { return Ok(None) };
    let name = call.name.to_string().to_ascii_lowercase();
    let place = expr.span().start;
    let wanted = match name.as_str() {
        "tumble" | "session" => 1,
        "hop" | "cumulate" => 2,
        _ => return Ok(None),
    };
    let usage = || {
        SqlError::new(format!("`{name}` takes ts and {wanted} constant interval(s)"))
            .at(place)
            .help(format!("write {WINDOWS}"))
    };
    let FunctionArguments::List(list) = &call.args else { return Err(usage()) };
    let args: Vec<&SqlExpr> = list
        .args
        .iter()
        .filter_map(|arg| match arg {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr),
            _ => None,
        })
        .collect();
    if args.len() != wanted + 1 || list.args.len() != args.len() {
        return Err(usage());
    }
    let is_ts = match args[0] {
        SqlExpr::Identifier(ident) => ident.value.eq_ignore_ascii_case("ts"),
        SqlExpr::CompoundIdentifier(parts) => parts.last().is_some_and(|ident| ident.value.eq_ignore_ascii_case("ts")),
        _ => false,
    };
    if !is_ts {
        return Err(SqlError::new(format!("`{name}` cuts event time: its first argument is ts, not `{}`", args[0]))
            .at(args[0].span().start));
    }
    let spans = args[1..].iter().map(|arg| interval(arg)).collect::<Result<Vec<_>, _>>()?;
    let window = match name.as_str() {
        "tumble" => Window::tumble(spans[0]),
        "session" => Window::session(spans[0]),
        "hop" => Window::hop(spans[0], spans[1]),
        _ => Window::cumulate(spans[0], spans[1]),
    };
    window.map(Some).map_err(|error| SqlError::new(error.to_string()).at(place))
}

/// A constant interval of days or less.
pub(crate) fn interval(expr: &SqlExpr) -> Result<Span, SqlError> {
    let place = expr.span().start;
    let constant = || {
        SqlError::new(format!("`{expr}` is not a constant interval"))
            .at(place)
            .help("write for example INTERVAL '1 minute'")
    };
    let SqlExpr::Interval(interval) = expr else { return Err(constant()) };
    let text = match interval.value.as_ref() {
        SqlExpr::Value(value) => match &value.value {
            ast::Value::SingleQuotedString(text) => text.clone(),
            ast::Value::Number(text, _) => text.to_string(),
            _ => return Err(constant()),
        },
        _ => return Err(constant()),
    };
    let text = match &interval.leading_field {
        Some(unit) => format!("{text} {unit}"),
        None => text,
    };
    let parsed = parse_interval_month_day_nano(&text)
        .map_err(|error| SqlError::new(format!("`{text}` is no interval: {error}")).at(place))?;
    if parsed.months != 0 {
        return Err(SqlError::new("months and years have no fixed length")
            .at(place)
            .help("use days, for example INTERVAL '30 days'"));
    }
    if parsed.nanoseconds % 1_000 != 0 {
        return Err(SqlError::new(format!("`{text}` is finer than a microsecond")).at(place));
    }
    let days = i64::from(parsed.days).checked_mul(86_400_000_000);
    let micros = days.and_then(|days| days.checked_add(parsed.nanoseconds / 1_000));
    micros.map(Span).ok_or_else(|| SqlError::new(format!("`{text}` is too long")).at(place))
}

/// Equal but for where they stand and how they are spelled.
fn same(a: &SqlExpr, b: &SqlExpr) -> bool {
    matches!(a, SqlExpr::Function(_)) && a.to_string().eq_ignore_ascii_case(&b.to_string())
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

/// The plan of a metric, taken apart: Limit → Sort → Projection → HAVING → Aggregate → WHERE → scan.
struct Shape<'a> {
    sort: &'a [SortExpr],
    skip: usize,
    fetch: Option<usize>,
    select: &'a [Expr],
    having: Option<&'a Expr>,
    aggregate: &'a AggregatePlan,
    filters: Vec<&'a Expr>,
    /// What FROM became.
    source: &'a LogicalPlan,
    scan_schema: &'a DFSchemaRef,
}

impl<'a> Shape<'a> {
    fn of(mut plan: &'a LogicalPlan) -> Result<Self, SqlError> {
        let (mut sort, mut skip, mut fetch, mut having): (&[SortExpr], _, _, _) = (&[], 0, None, None);
        if let LogicalPlan::Limit(limit) = plan {
            let constant = || SqlError::new("LIMIT and OFFSET of a metric are constant numbers");
            let (SkipType::Literal(s), FetchType::Literal(f)) =
                (limit.get_skip_type().map_err(|_| constant())?, limit.get_fetch_type().map_err(|_| constant())?)
            else {
                return Err(constant());
            };
            (skip, fetch) = (s, f);
            plan = &limit.input;
        }
        if let LogicalPlan::Sort(order) = plan {
            sort = &order.expr;
            fetch = fetch.or(order.fetch);
            plan = &order.input;
        }
        let LogicalPlan::Projection(projection) = plan else { return Err(odd(plan)) };
        if matches!(projection.input.as_ref(), LogicalPlan::Sort(_)) {
            return Err(SqlError::new("ORDER BY uses an expression that is not selected")
                .help("select it too, and order by its name"));
        }
        let select = projection.expr.as_slice();
        plan = &projection.input;
        if let LogicalPlan::Filter(filter) = plan {
            having = Some(&filter.predicate);
            plan = &filter.input;
        }
        let LogicalPlan::Aggregate(aggregate) = plan else { return Err(odd(plan)) };
        let mut filters = Vec::new();
        plan = &aggregate.input;
        loop {
            match plan {
                LogicalPlan::Filter(filter) => {
                    filters.push(&filter.predicate);
                    plan = &filter.input;
                }
                LogicalPlan::SubqueryAlias(alias) => plan = &alias.input,
                LogicalPlan::TableScan(_) | LogicalPlan::Join(_) => break,
                other => return Err(odd(other)),
            }
        }
        let scan_schema = aggregate.input.schema();
        Ok(Self { sort, skip, fetch, select, having, aggregate, filters, source: plan, scan_schema })
    }

    fn parts(self, sql: &str, from: &FromClause, window: Window, inputs: &[SchemaRef]) -> Result<Parts, PartsError> {
        let (props, planning) = (ExecutionProps::new(), PhysicalPlanningContext::default());
        let event = self.scan_schema.as_ref();
        let physical = |expr: &Expr, schema: &DFSchema| {
            datafusion::physical_expr::create_physical_expr(&simplified(expr, schema)?, schema, &props, &planning)
        };
        let over = |expr: &Expr, schema: &DFSchema| -> Result<Arc<dyn PhysicalExpr>, SqlError> {
            no_subquery(expr)?;
            if let Some(bound) = expr.column_refs().iter().find(|column| is_bound(column.name())) {
                return Err(SqlError::new(format!("`{}` is known only when the window is", bound.name()))
                    .help("use it in SELECT, HAVING or ORDER BY"));
            }
            physical(expr, schema).map_err(|error| SqlError::from_datafusion(&error, sql))
        };
        let over_events = |expr: &Expr| -> Result<_, PartsError> { Ok(over(expr, event)?) };
        let (joins, wheres) = match inputs {
            [_] => (None, self.filters.iter().map(|expr| (*expr).clone()).collect()),
            _ => {
                let (joins, wheres) = join::joins(self.source, from, inputs, window, &self.filters, &over)?;
                (Some(joins), wheres)
            }
        };
        let input = joins.as_ref().map_or_else(|| inputs[0].clone(), |joins| joins.schema().clone());
        // of joined rows only those that matched
        let mut filter =
            joins.as_ref().map(|joins| Arc::new(Column::new("matched", joins.matched())) as Arc<dyn PhysicalExpr>);
        for part in &wheres {
            let part = over_events(part)?;
            filter = Some(match filter {
                None => part,
                Some(other) => binary(other, Operator::And, part, &input)?,
            });
        }
        // the engine's layout: bounds, keys, aggregates; DataFusion keeps GROUP BY's own order
        let groups = self.aggregate.schema.as_ref();
        let group_count = self.aggregate.group_expr.len();
        let field = |at: usize| {
            let (qualifier, field) = groups.qualified_field(at);
            (qualifier.cloned(), Arc::clone(field))
        };
        let key_at: Vec<usize> =
            (0..group_count).filter(|&at| !is_bound(groups.qualified_field(at).1.name())).collect();
        let bounds = ["window_start", "window_end"]
            .map(|name| (0..group_count).find(|&at| groups.qualified_field(at).1.name() == name));
        let [Some(start), Some(end)] = bounds else {
            let error = unsupported("ROLLUP, CUBE or GROUPING SETS", "define a metric for each grouping");
            return Err(error.into());
        };
        let order = [start, end].into_iter().chain(key_at.iter().copied()).chain(group_count..groups.fields().len());
        let layout = DFSchema::new_with_metadata(order.map(field).collect(), HashMap::new())?;
        let mut keys = Vec::new();
        let mut values = Vec::new();
        let mut named = vec![None; key_at.len()];
        for expr in self.select {
            no_subquery(expr)?;
            let (inner, name): (&Expr, String) = match expr {
                Expr::Alias(alias) => (alias.expr.as_ref(), alias.name.clone()),
                other => (other, other.qualified_name().1),
            };
            if let Expr::Column(column) = inner {
                if is_bound(&column.name) && (name == column.name) {
                    continue;
                }
                let at = key_at.iter().position(|&at| {
                    let (qualifier, field) = groups.qualified_field(at);
                    field.name() == &column.name && qualifier == column.relation.as_ref()
                });
                if let Some(at) = at.filter(|&at| named[at].is_none()) {
                    check_name(&name)?;
                    named[at] = Some(name);
                    continue;
                }
            }
            check_name(&name)?;
            values.push((name, physical(inner, &layout)?));
        }
        for (at, name) in key_at.iter().zip(named) {
            let expr = &self.aggregate.group_expr[*at];
            let name = name.unwrap_or_else(|| groups.qualified_field(*at).1.name().clone());
            check_name(&name)?;
            keys.push((name, over_events(expr)?));
        }
        let mut seen: Vec<&str> = Vec::new();
        for (name, _) in keys.iter().map(|(n, e)| (n, e)).chain(values.iter().map(|(n, e)| (n, e))) {
            if seen.contains(&name.as_str()) {
                return Err(SqlError::new(format!("two columns are called `{name}`"))
                    .help("rename one with AS")
                    .into());
            }
            seen.push(name);
        }
        let aggregates = self
            .aggregate
            .aggr_expr
            .iter()
            .map(|expr| {
                no_subquery(expr)?;
                if let Some(bound) = expr.column_refs().iter().find(|column| is_bound(column.name())) {
                    return Err(SqlError::new(format!("`{}` is known only when the window is", bound.name()))
                        .help("use it outside of the aggregate")
                        .into());
                }
                let lowered =
                    LoweredAggregateBuilder::new(&simplified(expr, event)?, event, event.as_arrow(), &props, &planning)
                        .build()?;
                // some find out only here that they cannot take what they are given
                let call = &lowered.aggregate;
                match call.groups_accumulator_supported() {
                    true => drop(call.create_groups_accumulator()?),
                    false => drop(call.create_accumulator()?),
                }
                Ok(Aggregate { call: lowered.aggregate, filter: lowered.filter })
            })
            .collect::<Result<Vec<_>, PartsError>>()?;
        let having = self
            .having
            .map(|expr| no_subquery(expr).map_err(PartsError::from).and_then(|()| Ok(physical(expr, &layout)?)))
            .transpose()?;
        let top = match (self.fetch, self.sort) {
            (None, []) if self.skip == 0 => None,
            (None, _) => {
                return Err(SqlError::new("ORDER BY without LIMIT changes nothing in a metric")
                    .help("add LIMIT n for the top n of each window, or leave ORDER BY out")
                    .into());
            }
            (Some(_), []) => {
                return Err(SqlError::new("LIMIT without ORDER BY would keep arbitrary rows")
                    .help("add ORDER BY")
                    .into());
            }
            (Some(limit), sort) => {
                let projected: Vec<Field> = [("window_start", None), ("window_end", None)]
                    .into_iter()
                    .chain(keys.iter().map(|(name, expr)| (name.as_str(), Some((expr, event.as_arrow())))))
                    .chain(values.iter().map(|(name, expr)| (name.as_str(), Some((expr, layout.as_arrow())))))
                    .map(|(name, typed)| {
                        let kind = match typed {
                            None => streams::schema::timestamp_type(),
                            Some((expr, schema)) => expr.data_type(schema)?,
                        };
                        Ok(Field::new(name, kind, true))
                    })
                    .collect::<Result<_, DataFusionError>>()?;
                let schema = DFSchema::try_from(Schema::new(projected))?;
                let mut order = sort
                    .iter()
                    .map(|item| {
                        let item = SortExpr { expr: unqualified(item.expr.clone())?, ..item.clone() };
                        create_physical_sort_expr(&item, &schema, &props, &planning)
                    })
                    .collect::<Result<Vec<PhysicalSortExpr>, DataFusionError>>()?;
                // of equals, the smaller key first: the same rows whatever the order of events
                for (name, _) in &keys {
                    let expr = datafusion::physical_expr::expressions::col(name, schema.as_arrow())?;
                    order.push(PhysicalSortExpr { expr, options: Default::default() });
                }
                let order = LexOrdering::new(order).map(|order| order.to_vec()).unwrap_or_default();
                Some(Top { order, skip: self.skip, limit })
            }
        };
        let stream = from.relations[0].name.clone();
        Ok(Parts { stream, window, input, joins, filter, keys, aggregates, having, values, top, over: None })
    }
}

/// Refuses functions that say something else each time, such as `now()`: a metric's rows follow from its events alone.
pub(crate) fn check_deterministic(plan: &LogicalPlan) -> Result<Result<(), SqlError>, DataFusionError> {
    let mut found = None;
    plan.apply_with_subqueries(|plan| {
        plan.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Expr::ScalarFunction(call) = expr
                    && call.func.signature().volatility != Volatility::Immutable
                {
                    found = Some(format!("`{}()`", call.func.name()));
                    return Ok(TreeNodeRecursion::Stop);
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    Ok(match found {
        Some(what) => Err(unsupported(&what, "its rows follow from the events alone: use `ts` for the time")),
        None => Ok(()),
    })
}

/// The expression with functions such as `coalesce` rewritten to what can be evaluated, division by zero as NULL, and
/// constants folded.
pub(crate) fn simplified(expr: &Expr, schema: &DFSchema) -> Result<Expr, DataFusionError> {
    let context = SimplifyContext::builder().with_schema(Arc::new(schema.clone())).build();
    ExprSimplifier::new(context).simplify(division::by_zero_is_null(expr.clone(), schema)?.data)
}

pub(crate) fn is_bound(name: &str) -> bool {
    name == "window_start" || name == "window_end"
}

pub(crate) fn check_name(name: &str) -> Result<(), SqlError> {
    if RESERVED.contains(&name) {
        return Err(SqlError::new(format!("a metric's rows have `{name}` already")).help("rename the column with AS"));
    }
    Ok(())
}

fn no_subquery(expr: &Expr) -> Result<(), SqlError> {
    let found = expr.exists(|e| {
        Ok(matches!(e, Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_) | Expr::WindowFunction(_)))
    });
    if found.unwrap_or(true) {
        return Err(unsupported("a subquery or an OVER clause", "define a second metric"));
    }
    Ok(())
}

/// The expression with bare column names, as the output has them.
fn unqualified(expr: Expr) -> Result<Expr, DataFusionError> {
    let bare = expr.transform(|e| {
        Ok(match e {
            Expr::Column(mut column) if column.relation.is_some() => {
                column.relation = None::<TableReference>;
                Transformed::yes(Expr::Column(column))
            }
            other => Transformed::no(other),
        })
    })?;
    Ok(bare.data)
}

fn odd(plan: &LogicalPlan) -> SqlError {
    let first = plan.display().to_string();
    unsupported(
        &format!("this shape of query ({})", first.split(':').next().unwrap_or_default()),
        format!(
            "write SELECT … FROM stream [WHERE …] GROUP BY window, keys [HAVING …] [ORDER BY … LIMIT n], with {WINDOWS}"
        ),
    )
}
