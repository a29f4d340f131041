//! The functions that SQL of users may call: those of DataFusion, but none that makes very much of little in one step,
//! which neither the memory pool nor the clock can stop.
//!
//! What cannot be bounded is not there. What grows with its arguments is asked first how much it would make.

use datafusion::arrow::array::{Array, ArrayRef, AsArray};
use datafusion::arrow::compute::kernels::length::length;
use datafusion::arrow::compute::kernels::numeric::{add, mul, sub};
use datafusion::arrow::compute::{cast, concat};
use datafusion::arrow::datatypes::{DataType, FieldRef, Int64Type};
use datafusion::common::utils::take_function_args;
use datafusion::common::{DFSchema, DataFusionError, Result};
use datafusion::execution::SessionStateBuilder;
use datafusion::execution::context::SessionContext;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::logical_expr::planner::{ExprPlanner, PlannerResult, RawBinaryExpr};
use datafusion::logical_expr::{
    BinaryExpr, ColumnarValue, Expr, ExprSchemable, Operator, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF,
    ScalarUDFImpl, Signature, Volatility,
};
use datafusion::physical_expr_common::datum::apply;
use datafusion::prelude::SessionConfig;
use datafusion::sql::sqlparser::ast::BinaryOperator;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// Functions that are not there.
const FORBIDDEN: &[&str] = &[
    "repeat",
    "lpad",
    "rpad",
    "range",
    "generate_series",
    "array_repeat",
    "list_repeat",
    "array_resize",
    "list_resize",
];

/// Functions whose result is as large as their arguments together.
const ADDING: &[&str] = &[
    "concat",
    "concat_ws",
    "overlay",
    "make_array",
    "array_append",
    "array_prepend",
    "array_concat",
    "array_union",
    "array_insert",
];

/// Functions that may put the argument of this number into every place of the first.
const MULTIPLYING: &[(&str, usize)] = &[
    ("replace", 2),
    ("regexp_replace", 2),
    ("array_to_string", 1),
    ("array_replace", 2),
    ("array_replace_n", 2),
    ("array_replace_all", 2),
    ("concat_ws", 0),
];

/// Bytes that one call over a batch may make.
const MOST: usize = 64 << 20;

/// A context with those functions, and no table.
pub(crate) fn context(config: SessionConfig, runtime: Arc<RuntimeEnv>) -> SessionContext {
    let mut state =
        SessionStateBuilder::new_with_default_features().with_config(config).with_runtime_env(runtime).build();
    let planners = state.expr_planners().to_vec();
    let state = {
        use datafusion::execution::FunctionRegistry;
        for name in FORBIDDEN {
            _ = state.deregister_udf(name);
        }
        for name in ADDING.iter().chain(MULTIPLYING.iter().map(|(name, _)| name)) {
            // one that this build lacks needs no bound
            if let Ok(function) = state.udf(name) {
                let by = MULTIPLYING.iter().find(|(other, _)| other == name).map(|(_, by)| *by);
                _ = state.register_udf(Arc::new(ScalarUDF::from(Bounded { function, by })));
            }
        }
        let [make_array, array_concat, overlay] =
            ["make_array", "array_concat", "overlay"].map(|name| state.udf(name).ok());
        let bounds = Arc::new(BoundedOperators { make_array, array_concat, overlay });
        SessionStateBuilder::new_from_existing(state)
            .with_expr_planners([bounds as Arc<dyn ExprPlanner>].into_iter().chain(planners).collect())
            .build()
    };
    let context = SessionContext::new_with_state(state);
    for name in FORBIDDEN {
        context.deregister_udtf(name);
    }
    context
}

fn too_much(name: &str) -> DataFusionError {
    let most = MOST >> 20;
    DataFusionError::ResourcesExhausted(format!("`{name}` would make more than {most} MiB of one batch of rows"))
}

/// Bytes of a value if it were written out for each of `rows`.
fn size(value: &ColumnarValue, rows: usize) -> usize {
    match value {
        ColumnarValue::Array(array) => bytes(array),
        ColumnarValue::Scalar(scalar) => scalar.size().saturating_mul(rows),
    }
}

/// Bytes of the values of an array, without what its buffers hold beside it.
fn bytes(array: &ArrayRef) -> usize {
    array.to_data().get_slice_memory_size().unwrap_or_else(|_| array.get_array_memory_size())
}

/// A function that is asked first how much it would make.
#[derive(Debug)]
struct Bounded {
    function: Arc<ScalarUDF>,
    /// The argument that may come into every place of the first.
    by: Option<usize>,
}

impl PartialEq for Bounded {
    fn eq(&self, other: &Self) -> bool {
        self.function == other.function
    }
}

impl Eq for Bounded {}

impl Hash for Bounded {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.function.hash(state);
    }
}

impl ScalarUDFImpl for Bounded {
    fn name(&self) -> &str {
        self.function.name()
    }

    fn aliases(&self) -> &[String] {
        self.function.aliases()
    }

    fn signature(&self) -> &Signature {
        self.function.signature()
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        self.function.inner().return_type(arguments)
    }

    fn return_field_from_args(&self, arguments: ReturnFieldArgs) -> Result<FieldRef> {
        self.function.return_field_from_args(arguments)
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        self.function.coerce_types(given)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let rows = arguments.number_rows;
        let sum = arguments.args.iter().map(|value| size(value, rows)).fold(0usize, usize::saturating_add);
        match self.by {
            _ if sum > MOST => Err(too_much(self.name())),
            None => self.function.invoke_with_args(arguments),
            Some(by) => self.multiply(arguments, by),
        }
    }
}

impl Bounded {
    /// Calls the function for so many rows at a time as stay within the bound, whatever comes of them.
    fn multiply(&self, arguments: ScalarFunctionArgs, by: usize) -> Result<ColumnarValue> {
        let all = [0, by].iter().all(|at| matches!(arguments.args.get(*at), Some(ColumnarValue::Scalar(_)) | None));
        let most_of = |at: usize, rows: usize| -> Result<Vec<usize>> {
            let Some(value) = arguments.args.get(at) else { return Ok(vec![0; rows]) };
            places(&value.to_array(rows)?)
        };
        let rows = if all { 1 } else { arguments.number_rows };
        let (text, with) = (most_of(0, rows)?, most_of(by, rows)?);
        let made = |row: usize| (text[row] + 1).saturating_mul(with[row] + 1);
        let total = (0..rows).map(made).fold(0usize, usize::saturating_add);
        if total <= MOST {
            return self.function.invoke_with_args(arguments);
        }
        if all {
            return Err(too_much(self.name()));
        }
        let columns = ColumnarValue::values_to_arrays(&arguments.args)?;
        let (mut from, mut parts, mut held) = (0, Vec::new(), 0);
        while from < rows {
            let mut to = from;
            let mut made_of_part = 0usize;
            while to < rows && made_of_part.saturating_add(made(to)) <= MOST {
                made_of_part += made(to);
                to += 1;
            }
            if to == from {
                return Err(too_much(self.name()));
            }
            let part = ScalarFunctionArgs {
                args: columns.iter().map(|column| ColumnarValue::Array(column.slice(from, to - from))).collect(),
                number_rows: to - from,
                ..arguments.clone()
            };
            let part = self.function.invoke_with_args(part)?.into_array(to - from)?;
            held += bytes(&part);
            if held > MOST {
                return Err(too_much(self.name()));
            }
            parts.push(part);
            from = to;
        }
        let parts: Vec<&dyn Array> = parts.iter().map(AsRef::as_ref).collect();
        Ok(ColumnarValue::Array(concat(&parts)?))
    }
}

/// Of each value its places: bytes of text, elements of a list.
fn places(values: &ArrayRef) -> Result<Vec<usize>> {
    match values.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::List(_) | DataType::LargeList(_) => {
            let lengths = cast(&length(values)?, &DataType::Int64)?;
            Ok(lengths.as_primitive::<Int64Type>().iter().map(|length| length.unwrap_or(0) as usize).collect())
        }
        _ => Ok(vec![bytes(values) / values.len().max(1) + 1; values.len()]),
    }
}

/// Operators and literals that stand for functions which grow.
#[derive(Debug)]
struct BoundedOperators {
    make_array: Option<Arc<ScalarUDF>>,
    array_concat: Option<Arc<ScalarUDF>>,
    overlay: Option<Arc<ScalarUDF>>,
}

fn call(function: &Option<Arc<ScalarUDF>>, arguments: Vec<Expr>) -> PlannerResult<Vec<Expr>> {
    match function {
        Some(function) => PlannerResult::Planned(function.call(arguments)),
        None => PlannerResult::Original(arguments),
    }
}

impl ExprPlanner for BoundedOperators {
    fn plan_binary_op(&self, expr: RawBinaryExpr, schema: &DFSchema) -> Result<PlannerResult<RawBinaryExpr>> {
        let sign = match expr.op {
            BinaryOperator::StringConcat => None,
            BinaryOperator::Plus => Some("+"),
            BinaryOperator::Minus => Some("-"),
            BinaryOperator::Multiply => Some("*"),
            _ => return Ok(PlannerResult::Original(expr)),
        };
        if let Some(sign) = sign {
            let is_integer = |side: &Expr| Ok::<_, DataFusionError>(side.get_type(schema)?.is_signed_integer());
            return Ok(match is_integer(&expr.left)? && is_integer(&expr.right)? {
                true => PlannerResult::Planned(ScalarUDF::from(Checked::new(sign)).call(vec![expr.left, expr.right])),
                false => PlannerResult::Original(expr),
            });
        }
        let is_list = |side: &Expr| Ok::<_, DataFusionError>(side.get_type(schema)?.is_list());
        match (is_list(&expr.left)?, is_list(&expr.right)?, &self.array_concat) {
            (true, true, Some(concat)) => return Ok(PlannerResult::Planned(concat.call(vec![expr.left, expr.right]))),
            (false, false, _) => {}
            _ => return Ok(PlannerResult::Original(expr)),
        }
        let (left, right) = (Box::new(expr.left), Box::new(expr.right));
        let joined = Expr::BinaryExpr(BinaryExpr { left, op: Operator::StringConcat, right });
        Ok(PlannerResult::Planned(ScalarUDF::from(Within::default()).call(vec![joined])))
    }

    fn plan_array_literal(&self, exprs: Vec<Expr>, _: &DFSchema) -> Result<PlannerResult<Vec<Expr>>> {
        Ok(call(&self.make_array, exprs))
    }

    fn plan_overlay(&self, arguments: Vec<Expr>) -> Result<PlannerResult<Vec<Expr>>> {
        Ok(call(&self.overlay, arguments))
    }
}

/// Integer arithmetic that fails where the result is no 64-bit integer: the operators of DataFusion begin anew at the
/// other end.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Checked {
    sign: &'static str,
    signature: Signature,
}

impl Checked {
    fn new(sign: &'static str) -> Checked {
        Checked { sign, signature: Signature::exact(vec![DataType::Int64; 2], Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &str {
        match self.sign {
            "+" => "checked_add",
            "-" => "checked_subtract",
            _ => "checked_multiply",
        }
    }

    fn schema_name(&self, arguments: &[Expr]) -> Result<String> {
        Ok(format!("{} {} {}", arguments[0].schema_name(), self.sign, arguments[1].schema_name()))
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Int64)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let compute = match self.sign {
            "+" => add,
            "-" => sub,
            _ => mul,
        };
        let [left, right] = take_function_args(self.name(), &arguments.args)?;
        apply(left, right, compute)
    }
}

/// Its argument, where that is within the bound: `a || b` twice over is four times as large.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Within {
    signature: Signature,
}

impl Default for Within {
    fn default() -> Self {
        Within { signature: Signature::any(1, Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for Within {
    fn name(&self) -> &str {
        "within"
    }

    fn schema_name(&self, arguments: &[Expr]) -> Result<String> {
        Ok(arguments[0].schema_name().to_string())
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        Ok(arguments[0].clone())
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let ScalarFunctionArgs { mut args, number_rows, .. } = arguments;
        let value = args.pop().ok_or_else(|| DataFusionError::Internal("an argument is missing".to_owned()))?;
        if size(&value, number_rows) > MOST { Err(too_much("||")) } else { Ok(value) }
    }
}

#[cfg(test)]
mod tests {
    use crate::plan::Planner;
    use crate::query::{Answer, Bounds, QueryError, Question, Table};
    use datafusion::arrow::array::{AsArray, RecordBatch, StringArray};
    use datafusion::arrow::datatypes::{DataType, Field, Int32Type, Int64Type, Schema, SchemaRef};
    use engine::event::StreamName;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    async fn ask(sql: &str) -> Result<Answer, QueryError> {
        let schema = Arc::new(Schema::new(vec![Field::new("s", DataType::Utf8, true)]));
        let texts = (0..2_000).map(|n| (n != 7).then(|| "ab".repeat(500)));
        let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(texts.collect::<StringArray>())]).unwrap();
        let table = Table { name: vec!["t".to_owned()], schema, batches: vec![batch] };
        let bounds = Bounds { rows: 10_000, memory: 256 << 20, until: Instant::now() + Duration::from_secs(60) };
        Question::parse(sql).unwrap().run(&[], vec![table], bounds).await
    }

    #[tokio::test]
    async fn what_would_make_too_much_is_refused() {
        let replaces = format!("{}'aaaaaaaaaa'{}", "replace(".repeat(12), ",'a','aaaaaaaaaa')".repeat(12));
        let doubling = |expression: &str| {
            let steps: Vec<String> =
                (1..40).map(|n| format!("a{n} AS (SELECT {expression} AS s FROM a{})", n - 1)).collect();
            format!("WITH a0 AS (SELECT 'xxxxxxxx' AS s), {} SELECT length(s) FROM a39", steps.join(", "))
        };
        for sql in [
            format!("SELECT length({replaces})"),
            doubling("s || s"),
            doubling("concat(s, s)"),
            doubling("concat_ws(s, s, s)"),
            doubling("overlay(s placing s || s from 1 for 0)"),
            doubling("regexp_replace(s, '(.*)', '\\1\\1')"),
            "SELECT length(regexp_replace(s, '', concat(s, s, s, s, s, s, s, s, s, s, s), 'g')) FROM t".to_owned(),
        ] {
            let result = ask(&sql).await;
            assert!(result.is_err(), "{sql}");
        }
        // as the values of a metric, too
        let schema: SchemaRef = streams::schema::built_in()[0].arrow().clone();
        let source = |_: &StreamName| Some(schema.clone());
        let metric =
            "SELECT max(repeat(symbol, 100000000)) AS m FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')";
        let error = Planner::default().program(metric, source).await.unwrap_err().to_string();
        assert!(error.contains("repeat"), "{error}");
    }

    #[tokio::test]
    async fn what_is_within_bounds_is_as_without_them() {
        let answer = ask(
            "SELECT 'a' || s AS a, s || 'b', replace(substr(s, 1, 4), 'b', 'xx') AS r, concat('c', NULL, 'd') AS c, \
             array_to_string([1, 2] || [3], '-') AS l, NULL || 'x' AS n FROM t LIMIT 1",
        )
        .await
        .unwrap();
        assert_eq!(answer.schema.field(1).name(), "t.s || Utf8(\"b\")");
        let text = |at: usize| {
            let column = datafusion::arrow::compute::cast(answer.batches[0].column(at), &DataType::Utf8).unwrap();
            column.is_valid(0).then(|| column.as_string::<i32>().value(0).to_owned())
        };
        assert_eq!(text(0).unwrap().len(), 1_001);
        assert_eq!([2, 3, 4].map(text), ["axxaxx", "cd", "1-2-3"].map(|text| Some(text.to_owned())));
        assert_eq!(text(5), None);
    }

    #[tokio::test]
    async fn integers_fail_where_they_would_begin_anew() {
        let max = i64::MAX;
        for sql in [
            format!("SELECT {max} + 1"),
            format!("SELECT -{max} - 2"),
            format!("SELECT {max} * 2"),
            format!("SELECT sum(length(s)) * {max} FROM t"),
        ] {
            let error = ask(&sql).await.unwrap_err().to_string();
            assert!(error.to_lowercase().contains("overflow"), "{sql}: {error}");
        }
        let answer = ask("SELECT length(s) * 2 + 1, 3 - length('abcd') AS d FROM t LIMIT 1").await.unwrap();
        assert_eq!(answer.schema.field(0).name(), "length(t.s) * Int64(2) + Int64(1)");
        let value = |at: usize| answer.batches[0].column(at).as_primitive::<Int64Type>().value(0);
        assert_eq!((value(0), value(1)), (2_001, -1));
    }

    #[tokio::test]
    async fn what_a_metric_cannot_compute_the_same_each_time_or_at_all_is_refused_when_it_is_defined() {
        let schema: SchemaRef = streams::schema::built_in()[0].arrow().clone();
        for (select, told) in [
            ("random() AS x, count(*) AS n", "`random()`"),
            ("sum(price) FILTER (WHERE ts > now()) AS x", "`now()`"),
            ("approx_distinct(price) AS x", "Float64"),
        ] {
            let sql = format!("SELECT {select} FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')");
            let source = |_: &StreamName| Some(schema.clone());
            let error = Planner::default().program(&sql, source).await.unwrap_err().to_string();
            assert!(error.contains(told), "{sql}: {error}");
        }
        for grouping in ["ROLLUP(symbol)", "CUBE(symbol)", "GROUPING SETS ((symbol), ())"] {
            let sql =
                format!("SELECT count(*) AS n FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute'), {grouping}");
            let source = |_: &StreamName| Some(schema.clone());
            assert!(Planner::default().program(&sql, source).await.is_err(), "{grouping}");
        }
    }

    #[tokio::test]
    async fn a_batch_that_might_make_too_much_is_computed_in_parts() {
        let answer = ask(
            "SELECT length(replace(s, 'b', 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy')) AS n FROM t",
        )
        .await
        .unwrap();
        let lengths: Vec<Option<i32>> =
            answer.batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int32Type>().iter()).collect();
        assert_eq!(lengths.len(), 2_000);
        assert_eq!((lengths[0], lengths[7], lengths[1_999]), (Some(500 + 500 * 58), None, Some(500 + 500 * 58)));
    }
}
