//! The FROM of a metric: its stream, and what is joined to it.
//!
//! Reference tables are joined as of an event's time. One other stream may be joined, by equal columns and nearness in
//! time: a band that ON gives, which is taken out of the text here, or else the metric's tumbling window. What ON says
//! about the event times of both streams in another way is refused, since it would be a filter over the pairs of a
//! window and no longer say which events are a pair.

use crate::error::SqlError;
use crate::plan::{interval, unsupported, window_of};
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::common::{Column, DFSchema, DataFusionError, JoinType};
use datafusion::logical_expr::expr::BinaryExpr;
use datafusion::logical_expr::utils::{find_valid_equijoin_key_pair, split_conjunction};
use datafusion::logical_expr::{Expr, ExprSchemable, Join as JoinPlan, LogicalPlan, Operator};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::sql::sqlparser::ast::{
    self, BinaryOperator, Expr as SqlExpr, FunctionArg, FunctionArgExpr, FunctionArguments, JoinConstraint,
    JoinOperator, Spanned, TableFactor, TableWithJoins, UnaryOperator, visit_expressions,
};
use datafusion::sql::sqlparser::tokenizer::Location;
use engine::event::{METRICS, StreamName};
use engine::join::{Join, JoinKind, Joins, Near};
use engine::window::Window;
use std::ops::ControlFlow;
use std::sync::Arc;

/// A stream or table that FROM names.
pub(crate) struct Relation {
    pub(crate) name: StreamName,
    /// What its columns are called by.
    alias: String,
    pub(crate) at: Location,
}

/// How close in time two events must be that ON pairs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Nearness {
    /// That of the metric, which ON may write out.
    SameWindow {
        written: Option<Window>,
    },
    Band {
        low: i64,
        high: i64,
    },
}

/// FROM, read: at least one relation, the first a stream.
pub(crate) struct FromClause {
    pub(crate) relations: Vec<Relation>,
    /// Of the other stream, where there is one.
    nearness: Option<(Nearness, Location)>,
}

/// Reads FROM and takes conditions on the nearness of two streams out of it and out of WHERE.
pub(crate) fn read(select: &mut ast::Select) -> Result<FromClause, SqlError> {
    let place = select.span().start;
    let [from] = select.from.as_mut_slice() else {
        return Err(match select.from.get(1) {
            None => SqlError::new("a metric reads a stream").at(place).help("add FROM, for example FROM market.trades"),
            Some(second) => unsupported("a comma in FROM", "write JOIN … ON a.key = b.key").at(second.span().start),
        });
    };
    let TableWithJoins { relation, joins } = from;
    let first = named(relation)?;
    if first.name.is_table() {
        return Err(SqlError::new(format!("`{}` is a reference table and has no events of its own", first.name))
            .at(first.at)
            .help("name the stream first and JOIN the table to it"));
    }
    if let (Some(metric), false) = (first.name.metric(), joins.is_empty()) {
        return Err(
            unsupported("a join to the rows of a metric", format!("join in the metric `{metric}`")).at(first.at)
        );
    }
    let mut relations = vec![first];
    let mut nearness = None;
    for join in joins {
        let right = named(&mut join.relation)?;
        if let Some(metric) = right.name.metric() {
            return Err(
                unsupported("a join with the rows of a metric", format!("join what `{metric}` reads")).at(right.at)
            );
        }
        let (kind, constraint) = match &mut join.join_operator {
            JoinOperator::Join(on) | JoinOperator::Inner(on) => (JoinKind::Inner, on),
            JoinOperator::Left(on) | JoinOperator::LeftOuter(on) => (JoinKind::Left, on),
            JoinOperator::Right(_) | JoinOperator::RightOuter(_) => {
                return Err(unsupported("RIGHT JOIN", "swap the sides and write LEFT JOIN").at(right.at));
            }
            _ => return Err(unsupported("this kind of join", "write JOIN or LEFT JOIN … ON").at(right.at)),
        };
        if relations.iter().any(|known| known.alias == right.alias) {
            return Err(SqlError::new(format!("two relations are called `{}`", right.alias))
                .at(right.at)
                .help("give each a name of its own: market.trades t JOIN ref.companies c"));
        }
        if !right.name.is_table() {
            if relations.len() > 1 {
                return Err(unsupported(
                    "a third stream, or a stream behind a table,",
                    "join one other stream, and tables behind it",
                )
                .at(right.at));
            }
            if relations[0].name == right.name {
                return Err(unsupported(
                    "a join of a stream with itself",
                    "use FILTER, or write the events to two streams",
                )
                .at(right.at));
            }
            let sides = [relations[0].alias.as_str(), right.alias.as_str()];
            let mut conditions = Conditions::default();
            if let JoinConstraint::On(on) = constraint
                && let Some(other) = conditions.take_from(on, sides)?
            {
                return Err(not_a_band(&other, "ON", sides, right.at));
            }
            if kind == JoinKind::Inner
                && let Some(filter) = &mut select.selection
            {
                let other = conditions.take_from(filter, sides)?;
                if let Some(other) = other.filter(|_| conditions.is_empty()) {
                    return Err(not_a_band(&other, "WHERE", sides, right.at));
                }
            }
            nearness = Some((conditions.nearness(right.at)?, right.at));
        }
        match constraint {
            JoinConstraint::On(_) | JoinConstraint::Using(_) => {}
            JoinConstraint::Natural | JoinConstraint::None => {
                return Err(SqlError::new("a join says what it compares").at(right.at).help("add ON a.key = b.key"));
            }
        }
        relations.push(right);
    }
    Ok(FromClause { relations, nearness })
}

fn named(factor: &mut TableFactor) -> Result<Relation, SqlError> {
    let TableFactor::Table { name, args: None, alias, .. } = factor else {
        return Err(unsupported(
            "a subquery or table function in FROM",
            "read a stream, and join tables or a stream to it",
        )
        .at(factor.span().start));
    };
    let at = name.span().start;
    // a name of one part is that of a metric, written out
    if name.0.len() == 1 {
        name.0.insert(0, ast::ObjectNamePart::Identifier(ast::Ident::new(METRICS)));
    }
    let parts: Vec<&str> = name.0.iter().filter_map(|part| part.as_ident()).map(|ident| ident.value.as_str()).collect();
    let text = parts.join(".").to_ascii_lowercase();
    let name: StreamName = text.parse().map_err(|e: engine::event::NameError| SqlError::new(e.to_string()).at(at))?;
    let alias = alias.as_ref().map_or_else(|| name.parts().1.to_owned(), |alias| alias.name.value.to_ascii_lowercase());
    Ok(Relation { name, alias, at })
}

impl FromClause {
    /// Refuses a window that is not cut by the first stream's event time, or does not tell which events of two streams
    /// belong together; `call` is the window as it is written.
    pub(crate) fn check_window(&self, window: Window, call: &SqlExpr) -> Result<(), SqlError> {
        let first = &self.relations[0].alias;
        if self.relations.len() > 1
            && let SqlExpr::Function(function) = call
            && let FunctionArguments::List(list) = &function.args
            && let Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(ts))) = list.args.first()
        {
            let owner = match ts {
                SqlExpr::CompoundIdentifier(parts) => {
                    parts.iter().rev().nth(1).map(|part| part.value.to_ascii_lowercase())
                }
                _ => None,
            };
            let is_first = owner.as_ref().map_or(self.nearness.is_none(), |owner| owner == first);
            if !is_first {
                return Err(SqlError::new(format!("`{ts}` is not the event time of joined rows"))
                    .at(ts.span().start)
                    .help(format!(
                        "they bear that of the first stream: write {first}.ts, or name the other stream first"
                    )));
            }
        }
        match (self.nearness, window) {
            (Some((Nearness::SameWindow { .. }, at)), window) if !matches!(window, Window::Tumble { .. }) => {
                let other = &self.relations[1].alias;
                Err(SqlError::new("two streams are joined within a tumbling window or a band of time").at(at).help(
                    format!(
                        "use tumble, or add to ON: {other}.ts BETWEEN {first}.ts - INTERVAL '5 seconds' AND {first}.ts \
                         + INTERVAL '5 seconds'"
                    ),
                ))
            }
            (Some((Nearness::SameWindow { written: Some(written) }, at)), window) if written != window => {
                Err(SqlError::new("the two streams are joined within another window than that of the metric")
                    .at(at)
                    .help(format!("compare {call} with that of the other stream, or leave it out")))
            }
            _ => Ok(()),
        }
    }
}

/// Conditions on the difference of two event times, right − left, in microseconds.
#[derive(Default)]
struct Conditions {
    low: Option<i64>,
    high: Option<i64>,
    same_window: Option<Window>,
    /// Where the first of them stands.
    at: Option<Location>,
}

const LEFT: usize = 0;
const RIGHT: usize = 1;

impl Conditions {
    fn is_empty(&self) -> bool {
        (self.low, self.high, self.same_window) == (None, None, None)
    }

    /// Takes conditions on nearness out of a conjunction; the first that asks for the event times of both sides in a
    /// way that is none stays there and is returned.
    fn take_from(&mut self, expr: &mut SqlExpr, sides: [&str; 2]) -> Result<Option<SqlExpr>, SqlError> {
        let mut rest: Option<SqlExpr> = None;
        let mut other = None;
        let mut parts = Vec::new();
        split(expr, &mut parts);
        for part in parts {
            if self.take(&part, sides)? {
                continue;
            }
            if other.is_none() && asks_for_both_times(&part, sides) {
                other = Some(part.clone());
            }
            rest = Some(match rest {
                None => part,
                Some(before) => {
                    SqlExpr::BinaryOp { left: Box::new(before), op: BinaryOperator::And, right: Box::new(part) }
                }
            });
        }
        *expr = rest.unwrap_or_else(|| SqlExpr::value(ast::Value::Boolean(true)));
        Ok(other)
    }

    fn take(&mut self, expr: &SqlExpr, sides: [&str; 2]) -> Result<bool, SqlError> {
        let bounds = match bare(expr) {
            SqlExpr::Between { expr, negated: false, low, high } => between(expr, low, high, sides)?,
            SqlExpr::BinaryOp { left, op: BinaryOperator::Eq, right } if window_of(left)?.is_some() => {
                let window = window_of(left)?.filter(|_| asks_for_both_times(expr, sides));
                if window.is_none() || window_of(right)? != window {
                    return Ok(false);
                }
                self.same_window = window;
                return Ok(true);
            }
            SqlExpr::BinaryOp { left, op, right } => compared(left, op, right, sides)?,
            _ => None,
        };
        if let Some((low, high)) = bounds {
            self.at.get_or_insert(expr.span().start);
            self.bound(low, high);
        }
        Ok(bounds.is_some())
    }

    fn bound(&mut self, low: Option<i64>, high: Option<i64>) {
        self.low = low.into_iter().chain(self.low).max();
        self.high = high.into_iter().chain(self.high).min();
    }

    fn nearness(&self, at: Location) -> Result<Nearness, SqlError> {
        match (self.low, self.high) {
            (Some(low), Some(high)) if low > high => {
                Err(SqlError::new("no two events are as far apart as this join asks for")
                    .at(at)
                    .help("make the lower bound of the band smaller than the upper one"))
            }
            (Some(_), Some(_)) if self.same_window.is_some() => {
                Err(unsupported("a band of time beside the same window", "write one of the two").at(at))
            }
            (Some(low), Some(high)) => Ok(Nearness::Band { low, high }),
            (None, None) => Ok(Nearness::SameWindow { written: self.same_window }),
            _ => Err(SqlError::new("the band of time has one end only, so that events would wait for ever")
                .at(self.at.unwrap_or(at))
                .help("write b.ts BETWEEN a.ts - INTERVAL '5 seconds' AND a.ts + INTERVAL '5 seconds'")),
        }
    }
}

/// The least and the greatest of right − left, in microseconds and both included; `None`: without an end.
type Ends = (Option<i64>, Option<i64>);

/// What `expr BETWEEN low AND high` says about right − left.
fn between(expr: &SqlExpr, low: &SqlExpr, high: &SqlExpr, sides: [&str; 2]) -> Result<Option<Ends>, SqlError> {
    if let (Some(difference), Some(from), Some(to)) = (difference(expr, sides)?, span(low)?, span(high)?) {
        return Ok(match difference {
            Difference::Absolute if from > 0 => None, // two bands
            Difference::Absolute => Some((Some(to.saturating_neg()), Some(to))),
            Difference::RightLeft => Some((Some(from), Some(to))),
            Difference::LeftRight => Some((Some(to.saturating_neg()), Some(from.saturating_neg()))),
        });
    }
    let (Some(at), Some(from), Some(to)) = (time(expr, sides)?, time(low, sides)?, time(high, sides)?) else {
        return Ok(None);
    };
    if from.0 != to.0 || at.0 == from.0 {
        return Ok(None);
    }
    // at + a between other + f and other + t
    let (from, to) = (from.1.saturating_sub(at.1), to.1.saturating_sub(at.1));
    let (low, high) = if at.0 == RIGHT { (from, to) } else { (to.saturating_neg(), from.saturating_neg()) };
    Ok(Some((Some(low), Some(high))))
}

/// What a comparison says about right − left.
fn compared(left: &SqlExpr, op: &BinaryOperator, right: &SqlExpr, sides: [&str; 2]) -> Result<Option<Ends>, SqlError> {
    if let (Some(by), Some(difference)) = (span(left)?, difference(right, sides)?) {
        return Ok(turned(op).and_then(|op| difference.compared(&op, by)));
    }
    if let (Some(difference), Some(by)) = (difference(left, sides)?, span(right)?) {
        return Ok(difference.compared(op, by));
    }
    let (Some(a), Some(b)) = (time(left, sides)?, time(right, sides)?) else { return Ok(None) };
    Ok(match (a.0, b.0) {
        // right + r op left + l, as right − left op l − r
        (RIGHT, LEFT) => Difference::RightLeft.compared(op, b.1.saturating_sub(a.1)),
        (LEFT, RIGHT) => Difference::LeftRight.compared(op, b.1.saturating_sub(a.1)),
        _ => None,
    })
}

/// The comparison with its sides exchanged.
fn turned(op: &BinaryOperator) -> Option<BinaryOperator> {
    Some(match op {
        BinaryOperator::Eq => BinaryOperator::Eq,
        BinaryOperator::Lt => BinaryOperator::Gt,
        BinaryOperator::LtEq => BinaryOperator::GtEq,
        BinaryOperator::Gt => BinaryOperator::Lt,
        BinaryOperator::GtEq => BinaryOperator::LtEq,
        _ => return None,
    })
}

/// Whether the event times of both sides stand in an expression.
fn asks_for_both_times(expr: &SqlExpr, sides: [&str; 2]) -> bool {
    let mut found = [false; 2];
    let _: ControlFlow<()> = visit_expressions(expr, |inner| {
        if let Some(side) = owner(inner, sides) {
            found[side] = true;
        }
        ControlFlow::Continue(())
    });
    found == [true; 2]
}

/// Refuses a condition on the time of two events; `at` is where the other stream stands.
fn not_a_band(condition: &SqlExpr, clause: &str, [left, right]: [&str; 2], at: Location) -> SqlError {
    let place = Some(condition.span().start).filter(|place| place.line > 0).unwrap_or(at);
    let rest = match clause {
        "ON" => "put the rest in WHERE",
        _ => "keep this beside it",
    };
    let what =
        format!("`{condition}` in {clause}, which compares the times of two streams in another way than a band,");
    unsupported(
        &what,
        format!(
            "say how far apart the events may be: {right}.ts BETWEEN {left}.ts - INTERVAL '5 seconds' AND {left}.ts + \
             INTERVAL '5 seconds', {left}.ts - {right}.ts BETWEEN INTERVAL '-5 seconds' AND INTERVAL '5 seconds' or \
             ABS({left}.ts - {right}.ts) <= INTERVAL '5 seconds'; and {rest}"
        ),
    )
    .at(place)
}

fn split(expr: &SqlExpr, into: &mut Vec<SqlExpr>) {
    match expr {
        SqlExpr::BinaryOp { left, op: BinaryOperator::And, right } => {
            split(left, into);
            split(right, into);
        }
        SqlExpr::Nested(inner) if matches!(inner.as_ref(), SqlExpr::BinaryOp { op: BinaryOperator::And, .. }) => {
            split(inner, into);
        }
        other => into.push(other.clone()),
    }
}

fn bare(mut expr: &SqlExpr) -> &SqlExpr {
    while let SqlExpr::Nested(inner) = expr {
        expr = inner;
    }
    expr
}

/// The side whose event time this is.
fn owner(expr: &SqlExpr, sides: [&str; 2]) -> Option<usize> {
    let SqlExpr::CompoundIdentifier(parts) = expr else { return None };
    let [.., table, column] = parts.as_slice() else { return None };
    let side = sides.iter().position(|side| table.value.eq_ignore_ascii_case(side));
    side.filter(|_| column.value.eq_ignore_ascii_case("ts"))
}

/// An event time of one side, moved by a constant: side and microseconds.
fn time(expr: &SqlExpr, sides: [&str; 2]) -> Result<Option<(usize, i64)>, SqlError> {
    Ok(match bare(expr) {
        found @ SqlExpr::CompoundIdentifier(_) => owner(found, sides).map(|side| (side, 0)),
        SqlExpr::BinaryOp { left, op: op @ (BinaryOperator::Plus | BinaryOperator::Minus), right } => {
            match (time(left, sides)?, span(right)?) {
                (Some((side, by)), Some(span)) if *op == BinaryOperator::Plus => Some((side, by.saturating_add(span))),
                (Some((side, by)), Some(span)) => Some((side, by.saturating_sub(span))),
                _ => None,
            }
        }
        _ => None,
    })
}

/// A constant interval in microseconds; `None` for every other expression.
fn span(expr: &SqlExpr) -> Result<Option<i64>, SqlError> {
    match bare(expr) {
        found @ SqlExpr::Interval(_) => Ok(Some(interval(found)?.0)),
        SqlExpr::UnaryOp { op: UnaryOperator::Minus, expr } => Ok(span(expr)?.map(i64::saturating_neg)),
        _ => Ok(None),
    }
}

/// A difference of the two event times.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Difference {
    RightLeft,
    LeftRight,
    /// Without its sign.
    Absolute,
}

impl Difference {
    /// What comparing it with `by` microseconds says about right − left; `None` where that is no band.
    fn compared(self, op: &BinaryOperator, by: i64) -> Option<Ends> {
        let (low, high) = match op {
            BinaryOperator::Eq if self != Difference::Absolute => (Some(by), Some(by)),
            BinaryOperator::Lt => (None, Some(by.saturating_sub(1))),
            BinaryOperator::LtEq => (None, Some(by)),
            BinaryOperator::Gt => (Some(by.saturating_add(1)), None),
            BinaryOperator::GtEq => (Some(by), None),
            _ => return None,
        };
        let negated = |end: Option<i64>| end.map(i64::saturating_neg);
        match self {
            Difference::RightLeft => Some((low, high)),
            Difference::LeftRight => Some((negated(high), negated(low))),
            Difference::Absolute => high.map(|high| (Some(high.saturating_neg()), Some(high))),
        }
    }
}

fn difference(expr: &SqlExpr, sides: [&str; 2]) -> Result<Option<Difference>, SqlError> {
    Ok(match bare(expr) {
        SqlExpr::Function(call) if call.name.to_string().eq_ignore_ascii_case("abs") => match &call.args {
            FunctionArguments::List(list) => match list.args.as_slice() {
                [FunctionArg::Unnamed(FunctionArgExpr::Expr(inner))] => {
                    difference(inner, sides)?.map(|_| Difference::Absolute)
                }
                _ => None,
            },
            _ => None,
        },
        SqlExpr::BinaryOp { left, op: BinaryOperator::Minus, right } => {
            match (time(left, sides)?, time(right, sides)?) {
                (Some((RIGHT, 0)), Some((LEFT, 0))) => Some(Difference::RightLeft),
                (Some((LEFT, 0)), Some((RIGHT, 0))) => Some(Difference::LeftRight),
                _ => None,
            }
        }
        _ => None,
    })
}

/// Makes an expression over columns one that runs.
pub(crate) type Physical<'a> = &'a dyn Fn(&Expr, &DFSchema) -> Result<Arc<dyn PhysicalExpr>, SqlError>;

/// The joins of a planned metric, and what is left of its WHERE clause.
///
/// `schemas`: the columns of each relation; `wheres`: the conditions of WHERE.
pub(crate) fn joins(
    tree: &LogicalPlan,
    from: &FromClause,
    schemas: &[SchemaRef],
    window: Window,
    wheres: &[&Expr],
    physical: Physical<'_>,
) -> Result<(Joins, Vec<Expr>), SqlError> {
    let mut wheres: Vec<Expr> = wheres.iter().flat_map(|expr| split_conjunction(expr)).cloned().collect();
    let mut plans: Vec<&JoinPlan> = Vec::new();
    let mut plan = tree;
    loop {
        match plan {
            LogicalPlan::SubqueryAlias(alias) => plan = &alias.input,
            LogicalPlan::Join(join) => {
                plans.push(join);
                plan = &join.left;
            }
            _ => break,
        }
    }
    let mut steps = Vec::new();
    for (at, plan) in plans.into_iter().rev().enumerate() {
        let relation = &from.relations[at + 1];
        let near = from.nearness.filter(|_| at == 0).map(|(nearness, _)| match nearness {
            Nearness::Band { low, high } => Near::Band { low, high },
            Nearness::SameWindow { .. } => Near::Window { size: window.size() },
        });
        let kind = match plan.join_type {
            JoinType::Inner => JoinKind::Inner,
            JoinType::Left => JoinKind::Left,
            other => return Err(unsupported(&format!("{other} JOIN"), "write JOIN or LEFT JOIN").at(relation.at)),
        };
        steps.push(step(plan, relation, &schemas[at + 1], kind, near, &mut wheres, physical)?);
    }
    Ok((Joins::new(schemas[0].clone(), steps), wheres))
}

fn step(
    plan: &JoinPlan,
    relation: &Relation,
    schema: &SchemaRef,
    kind: JoinKind,
    near: Option<Near>,
    wheres: &mut Vec<Expr>,
    physical: Physical<'_>,
) -> Result<Join, SqlError> {
    let (left, right) = (plan.left.schema().as_ref(), plan.right.schema().as_ref());
    let within = |expr: &Expr, schema: &DFSchema| {
        let columns = expr.column_refs();
        !columns.is_empty() && columns.iter().all(|column: &&Column| schema.has_column(column))
    };
    let broken = |error: DataFusionError| SqlError::new(error.strip_backtrace()).at(relation.at);
    let (mut left_keys, mut right_keys) = (Vec::new(), Vec::new());
    let mut pair = |a: &Expr, b: &Expr| -> Result<(), SqlError> {
        let (kind_a, kind_b) = (a.get_type(left).map_err(broken)?, b.get_type(right).map_err(broken)?);
        if kind_a != kind_b {
            return Err(SqlError::new(format!("`{a}` is {kind_a} and `{b}` is {kind_b}"))
                .at(relation.at)
                .help("CAST one of them"));
        }
        left_keys.push(physical(a, left)?);
        right_keys.push(physical(b, right)?);
        Ok(())
    };
    let (mut residual, mut filters): (Vec<Expr>, [Vec<Expr>; 2]) = Default::default();
    for (a, b) in &plan.on {
        pair(a, b)?;
    }
    for condition in plan.filter.iter().flat_map(split_conjunction) {
        if let Expr::BinaryExpr(BinaryExpr { left: a, op: Operator::Eq, right: b }) = condition
            && let Some((a, b)) = find_valid_equijoin_key_pair(a, b, left, right).map_err(broken)?
        {
            pair(&a, &b)?;
            continue;
        }
        if condition == &Expr::Literal(datafusion::common::ScalarValue::Boolean(Some(true)), None) {
            continue;
        }
        match (near, kind) {
            (None, _) => residual.push(condition.clone()),
            (Some(_), _) if within(condition, right) => filters[RIGHT].push(condition.clone()),
            (Some(_), JoinKind::Inner) => wheres.push(condition.clone()),
            (Some(_), JoinKind::Left) => {
                return Err(unsupported(
                    "this condition in ON of a LEFT JOIN of two streams",
                    "ON compares columns for equality, bounds the time and filters the right stream; put the rest in WHERE",
                )
                .at(relation.at));
            }
        }
    }
    if left_keys.is_empty() {
        return Err(SqlError::new(format!("the join with `{}` compares no columns for equality", relation.name))
            .at(relation.at)
            .help("add ON a.key = b.key"));
    }
    if near.is_some() {
        // what a side alone decides keeps its events from waiting
        wheres.retain(|condition| {
            let side = match kind {
                _ if within(condition, left) => LEFT,
                JoinKind::Inner if within(condition, right) => RIGHT,
                _ => return true,
            };
            filters[side].push(condition.clone());
            false
        });
    }
    let all = |conditions: Vec<Expr>, schema: &DFSchema| {
        conditions.into_iter().reduce(Expr::and).map(|condition| physical(&condition, schema)).transpose()
    };
    let [of_left, of_right] = filters;
    Ok(Join {
        with: relation.name.clone(),
        right: schema.clone(),
        kind,
        left_keys,
        right_keys,
        residual: all(residual, plan.schema.as_ref())?,
        near,
        filters: [all(of_left, left)?, all(of_right, right)?],
    })
}
