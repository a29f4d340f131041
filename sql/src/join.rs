//! The FROM of a metric: its stream, and what is joined to it.
//!
//! Reference tables are joined as of an event's time. One other stream may be joined, by equal columns and nearness in
//! time: a band that ON gives, which is taken out of the text here, or else the metric's tumbling window.

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
    JoinOperator, Spanned, TableFactor, TableWithJoins,
};
use datafusion::sql::sqlparser::tokenizer::Location;
use engine::event::{METRICS, StreamName};
use engine::join::{Join, JoinKind, Joins, Near};
use engine::window::Window;
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
    SameWindow,
    Band { low: i64, high: i64 },
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
            if let JoinConstraint::On(on) = constraint {
                conditions.take_from(on, sides)?;
            }
            if kind == JoinKind::Inner
                && let Some(filter) = &mut select.selection
            {
                conditions.take_from(filter, sides)?;
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
            (Some((Nearness::SameWindow, at)), window) if !matches!(window, Window::Tumble { .. }) => {
                let other = &self.relations[1].alias;
                Err(SqlError::new("two streams are joined within a tumbling window or a band of time").at(at).help(
                    format!(
                        "use tumble, or add to ON: {other}.ts BETWEEN {first}.ts - INTERVAL '5 seconds' AND {first}.ts \
                         + INTERVAL '5 seconds'"
                    ),
                ))
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
    same_window: bool,
    /// Where the first of them stands.
    at: Option<Location>,
}

const LEFT: usize = 0;
const RIGHT: usize = 1;

impl Conditions {
    /// Takes conditions on nearness out of a conjunction.
    fn take_from(&mut self, expr: &mut SqlExpr, sides: [&str; 2]) -> Result<(), SqlError> {
        let mut rest: Option<SqlExpr> = None;
        let mut parts = Vec::new();
        split(expr, &mut parts);
        for part in parts {
            if self.take(&part, sides)? {
                continue;
            }
            rest = Some(match rest {
                None => part,
                Some(before) => {
                    SqlExpr::BinaryOp { left: Box::new(before), op: BinaryOperator::And, right: Box::new(part) }
                }
            });
        }
        *expr = rest.unwrap_or_else(|| SqlExpr::value(ast::Value::Boolean(true)));
        Ok(())
    }

    fn take(&mut self, expr: &SqlExpr, sides: [&str; 2]) -> Result<bool, SqlError> {
        match expr {
            SqlExpr::Between { expr, negated: false, low, high } => {
                let (Some(at), Some(from), Some(to)) = (time(expr, sides)?, time(low, sides)?, time(high, sides)?)
                else {
                    return Ok(false);
                };
                if from.0 != to.0 || at.0 == from.0 {
                    return Ok(false);
                }
                // at + a between other + f and other + t
                let (from, to) = (from.1.saturating_sub(at.1), to.1.saturating_sub(at.1));
                let (low, high) = if at.0 == RIGHT { (from, to) } else { (to.saturating_neg(), from.saturating_neg()) };
                self.bound(Some(low), Some(high));
                Ok(true)
            }
            SqlExpr::BinaryOp { left, op: BinaryOperator::Eq, right } if window_of(left)?.is_some() => {
                self.same_window |= window_of(left)? == window_of(right)?;
                Ok(window_of(left)? == window_of(right)?)
            }
            SqlExpr::BinaryOp { left, op, right } => {
                let (low, high) = match (difference(left, sides)?, span(right)?) {
                    (Some((is_absolute, sign)), Some(span)) => {
                        let exclusive = i64::from(matches!(op, BinaryOperator::Lt | BinaryOperator::Gt));
                        match op {
                            BinaryOperator::Lt | BinaryOperator::LtEq if is_absolute => {
                                (Some(exclusive - span), Some(span - exclusive))
                            }
                            BinaryOperator::Lt | BinaryOperator::LtEq if sign > 0 => (None, Some(span - exclusive)),
                            BinaryOperator::Lt | BinaryOperator::LtEq => (Some(exclusive - span), None),
                            BinaryOperator::Gt | BinaryOperator::GtEq if is_absolute => return Ok(false),
                            BinaryOperator::Gt | BinaryOperator::GtEq if sign > 0 => (Some(span + exclusive), None),
                            BinaryOperator::Gt | BinaryOperator::GtEq => (None, Some(-span - exclusive)),
                            _ => return Ok(false),
                        }
                    }
                    _ => {
                        let (Some(a), Some(b)) = (time(left, sides)?, time(right, sides)?) else { return Ok(false) };
                        if a.0 == b.0 {
                            return Ok(false);
                        }
                        // right + r op left + l, as right − left op l − r
                        let flipped = a.0 == LEFT;
                        let by = if flipped { a.1.saturating_sub(b.1) } else { b.1.saturating_sub(a.1) };
                        match (op, flipped) {
                            (BinaryOperator::Eq, _) => (Some(by), Some(by)),
                            (BinaryOperator::LtEq, false) | (BinaryOperator::GtEq, true) => (None, Some(by)),
                            (BinaryOperator::Lt, false) | (BinaryOperator::Gt, true) => (None, Some(by - 1)),
                            (BinaryOperator::GtEq, false) | (BinaryOperator::LtEq, true) => (Some(by), None),
                            (BinaryOperator::Gt, false) | (BinaryOperator::Lt, true) => (Some(by + 1), None),
                            _ => return Ok(false),
                        }
                    }
                };
                self.at.get_or_insert(expr.span().start);
                self.bound(low, high);
                Ok(true)
            }
            _ => Ok(false),
        }
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
            (Some(_), Some(_)) if self.same_window => {
                Err(unsupported("a band of time beside the same window", "write one of the two").at(at))
            }
            (Some(low), Some(high)) => Ok(Nearness::Band { low, high }),
            (None, None) => Ok(Nearness::SameWindow),
            _ => Err(SqlError::new("the band of time has one end only, so that events would wait for ever")
                .at(self.at.unwrap_or(at))
                .help("write b.ts BETWEEN a.ts - INTERVAL '5 seconds' AND a.ts + INTERVAL '5 seconds'")),
        }
    }
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

/// An event time of one side, moved by a constant: side and microseconds.
fn time(expr: &SqlExpr, sides: [&str; 2]) -> Result<Option<(usize, i64)>, SqlError> {
    Ok(match bare(expr) {
        SqlExpr::CompoundIdentifier(parts) => match parts.as_slice() {
            [.., table, column] if column.value.eq_ignore_ascii_case("ts") => {
                let side = sides.iter().position(|side| table.value.eq_ignore_ascii_case(side));
                side.map(|side| (side, 0))
            }
            _ => None,
        },
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
        _ => Ok(None),
    }
}

/// The difference of the two event times: whether without its sign, and 1 for right − left, −1 for left − right.
fn difference(expr: &SqlExpr, sides: [&str; 2]) -> Result<Option<(bool, i64)>, SqlError> {
    Ok(match bare(expr) {
        SqlExpr::Function(call) if call.name.to_string().eq_ignore_ascii_case("abs") => match &call.args {
            FunctionArguments::List(list) => match list.args.as_slice() {
                [FunctionArg::Unnamed(FunctionArgExpr::Expr(inner))] => {
                    difference(inner, sides)?.map(|(_, sign)| (true, sign))
                }
                _ => None,
            },
            _ => None,
        },
        SqlExpr::BinaryOp { left, op: BinaryOperator::Minus, right } => {
            match (time(left, sides)?, time(right, sides)?) {
                (Some((RIGHT, 0)), Some((LEFT, 0))) => Some((false, 1)),
                (Some((LEFT, 0)), Some((RIGHT, 0))) => Some((false, -1)),
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
            Nearness::SameWindow => Near::Window { size: window.size() },
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
