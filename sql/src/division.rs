//! Division by zero is NULL, not an error: one row must not stop a metric or a question.

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{DFSchema, Result, ScalarValue};
use datafusion::functions::core::expr_fn::nullif;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::merge_schema;
use datafusion::logical_expr::{BinaryExpr, Expr, ExprSchemable, LogicalPlan, Operator};
use datafusion::optimizer::AnalyzerRule;

/// The expression with every `a / b` and `a % b` of whole numbers or decimals as one with `nullif(b, 0)`. Floats divide
/// as IEEE 754 says.
pub(crate) fn by_zero_is_null(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    let exact = |expr: &Expr| expr.get_type(schema).ok().filter(|kind| kind.is_integer() || kind.is_decimal());
    expr.transform_up(|expr| {
        let (left, op, right) = match expr {
            Expr::BinaryExpr(BinaryExpr { left, op: op @ (Operator::Divide | Operator::Modulo), right }) => {
                (left, op, right)
            }
            other => return Ok(Transformed::no(other)),
        };
        let (Some(_), Some(kind)) = (exact(&left), exact(&right)) else {
            return Ok(Transformed::no(Expr::BinaryExpr(BinaryExpr { left, op, right })));
        };
        let zero = ScalarValue::new_zero(&kind)?;
        let right = match right.as_ref() {
            Expr::Literal(divisor, _) if *divisor != zero => right,
            _ => Box::new(nullif(*right, Expr::Literal(zero, None))),
        };
        Ok(Transformed::yes(Expr::BinaryExpr(BinaryExpr { left, op, right })))
    })
}

/// The same for all expressions of a plan: to be added behind the rules that give operands their types.
#[derive(Debug)]
pub(crate) struct ByZeroIsNull;

impl AnalyzerRule for ByZeroIsNull {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        let rewritten = plan.transform_up_with_subqueries(|plan| {
            let schema = match plan.inputs().is_empty() {
                true => plan.schema().as_ref().clone(),
                false => merge_schema(&plan.inputs()),
            };
            let names = NamePreserver::new(&plan);
            plan.map_expressions(|expr| {
                let name = names.save(&expr);
                Ok(by_zero_is_null(expr, &schema)?.update_data(|expr| name.restore(expr)))
            })
        });
        rewritten?.data.recompute_schema()
    }

    fn name(&self) -> &str {
        "by_zero_is_null"
    }
}

#[cfg(test)]
mod tests {
    use crate::query::{Bounds, Question};
    use std::time::{Duration, Instant};

    /// The answer's columns in one row, as text.
    fn answer(sql: &str) -> String {
        let until = Instant::now() + Duration::from_secs(60);
        let bounds = Bounds { rows: 10, memory: 1 << 20, until };
        let answer = futures::executor::block_on(Question::parse(sql).unwrap().run(&[], Vec::new(), bounds)).unwrap();
        let text = |at: usize| arrow::util::display::array_value_to_string(answer.batches[0].column(at), 0).unwrap();
        (0..answer.schema.fields().len()).map(text).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_question_divides_by_zero_and_gets_null_where_the_numbers_are_exact() {
        assert_eq!(
            answer("SELECT coalesce(1 / (a - a), -1), coalesce(7 % (a - a), -1), 7 / a, 7 % a FROM (VALUES (2)) t(a)"),
            "-1 -1 3 1"
        );
        assert_eq!(
            answer("SELECT coalesce(a / (a - a), -1.5) FROM (SELECT CAST(2 AS decimal(10, 2)) AS a)"),
            "-1.500000000000000"
        );
        assert_eq!(answer("SELECT 1.5e0 / CAST(a - a AS double) FROM (VALUES (2)) t(a)"), "inf");
        assert_eq!(answer("SELECT sum(x / y) AS s FROM (VALUES (10, 0), (10, 5)) t(x, y) GROUP BY x / (y - y)"), "2");
    }
}
