//! The engine's indicators as window functions of SQL: `ema(close, 20) OVER (PARTITION BY symbol ORDER BY window_start)`.
//!
//! In a metric the engine computes them as rows become final; here the same code goes over a whole partition, for
//! questions asked once.

use arrow::array::{ArrayRef, Float64Array};
use arrow::datatypes::{DataType, Field, FieldRef, TimeUnit};
use datafusion::common::{Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::function::{PartitionEvaluatorArgs, WindowUDFFieldArgs};
use datafusion::logical_expr::{LimitEffect, PartitionEvaluator, Signature, Volatility, WindowUDF, WindowUDFImpl};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Literal;
use datafusion::sql::sqlparser::ast::{
    Expr, FunctionArg, FunctionArgExpr, FunctionArguments, NamedWindowDefinition, NamedWindowExpr, SetExpr, Statement,
    WindowType, visit_expressions_mut,
};
use engine::indicator::{Indicator, Running, SIGNATURES};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Every indicator as a window function.
pub(crate) fn indicators() -> impl Iterator<Item = WindowUDF> {
    SIGNATURES.iter().map(|known| {
        let signature = Signature::user_defined(Volatility::Immutable);
        WindowUDF::from(IndicatorFunction { signature, name: known.name })
    })
}

/// Writes out what `rate(x)` measures time by: the first expression of its ORDER BY, which a WINDOW clause may name.
pub(crate) fn write_out_times(statement: &mut Statement) {
    let named = match statement {
        Statement::Query(query) => named_windows(&query.body),
        _ => Vec::new(),
    };
    let _: ControlFlow<()> = visit_expressions_mut(statement, |expr| {
        if let Expr::Function(call) = expr
            && call.name.to_string().eq_ignore_ascii_case("rate")
            && let Some(order) = call.over.as_ref().and_then(|over| first_order(over, &named))
            && let FunctionArguments::List(list) = &mut call.args
            && list.args.len() == 1
        {
            list.args.push(FunctionArg::Unnamed(FunctionArgExpr::Expr(order.clone())));
        }
        ControlFlow::Continue(())
    });
}

fn named_windows(body: &SetExpr) -> Vec<NamedWindowDefinition> {
    match body {
        SetExpr::Select(select) => select.named_window.clone(),
        SetExpr::Query(query) => named_windows(&query.body),
        _ => Vec::new(),
    }
}

fn first_order<'a>(over: &'a WindowType, named: &'a [NamedWindowDefinition]) -> Option<&'a Expr> {
    let spec = match over {
        WindowType::WindowSpec(spec) => spec,
        WindowType::NamedWindow(name) => {
            let is_named = |known: &&NamedWindowDefinition| known.0.value.eq_ignore_ascii_case(&name.value);
            match &named.iter().find(is_named)?.1 {
                NamedWindowExpr::WindowSpec(spec) => spec,
                NamedWindowExpr::NamedWindow(_) => return None,
            }
        }
    };
    spec.order_by.first().map(|order| &order.expr)
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct IndicatorFunction {
    signature: Signature,
    name: &'static str,
}

impl IndicatorFunction {
    fn called(&self) -> &'static engine::indicator::Signature {
        engine::indicator::signature(self.name).expect("made from this table")
    }
}

impl WindowUDFImpl for IndicatorFunction {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        let engine::indicator::Signature { values, parameters: (least, most), usage, .. } = *self.called();
        if given.len() < values + least || given.len() > values + most {
            return plan_err!("write {usage} OVER (…): {} arguments were given", given.len());
        }
        let coerced = given.iter().enumerate().map(|(at, kind)| match kind {
            kind if at >= values => Ok(kind.clone()),
            DataType::Timestamp(..) if self.name == "rate" && at == 1 => {
                Ok(DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())))
            }
            kind if kind.is_numeric() || kind.is_null() => Ok(DataType::Float64),
            other => plan_err!("in {usage}, argument {} is {other}, not a number", at + 1),
        });
        coerced.collect()
    }

    fn field(&self, args: WindowUDFFieldArgs) -> Result<FieldRef> {
        Ok(Arc::new(Field::new(args.name(), DataType::Float64, true)))
    }

    fn partition_evaluator(&self, args: PartitionEvaluatorArgs) -> Result<Box<dyn PartitionEvaluator>> {
        if args.ignore_nulls() {
            return plan_err!("{} leaves NULL out anyway: write it without IGNORE NULLS", self.name);
        }
        let values = self.called().values;
        let parameter = |expr: &Arc<dyn PhysicalExpr>| match expr.downcast_ref::<Literal>() {
            Some(literal) => constant(literal.value()),
            None => plan_err!("in {}, {expr} is no constant", self.called().usage),
        };
        let parameters = args.input_exprs().iter().skip(values).map(parameter).collect::<Result<Vec<_>>>()?;
        match Indicator::new(self.name, &parameters) {
            Ok(indicator) => Ok(Box::new(Evaluator { indicator, values })),
            Err(error) => plan_err!("{error}"),
        }
    }

    fn limit_effect(&self, _: &[Arc<dyn PhysicalExpr>]) -> LimitEffect {
        LimitEffect::None // a row depends on the rows before it only
    }
}

/// A constant parameter as a number.
pub(crate) fn constant(value: &ScalarValue) -> Result<f64> {
    match value.cast_to(&DataType::Float64)? {
        ScalarValue::Float64(Some(number)) => Ok(number),
        _ => plan_err!("a parameter must not be NULL"),
    }
}

#[derive(Debug)]
struct Evaluator {
    indicator: Indicator,
    values: usize,
}

impl PartitionEvaluator for Evaluator {
    fn evaluate_all(&mut self, columns: &[ArrayRef], rows: usize) -> Result<ArrayRef> {
        let mut running = Running::new(self.indicator);
        let Some(columns) = columns.get(..self.values) else {
            return exec_err!("{:?} got {} columns", self.indicator, columns.len());
        };
        let mut row_values = vec![None; self.values];
        let mut results = Vec::with_capacity(rows);
        for row in 0..rows {
            for (value, column) in row_values.iter_mut().zip(columns) {
                *value = engine::over::number(column, row)?;
            }
            results.push(running.push(&row_values));
        }
        Ok(Arc::new(Float64Array::from(results)))
    }
}
