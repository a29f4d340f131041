//! Queries that end in time: a plan whose operators look at the clock between batches, and whose joins look at it
//! between the pieces that they compare.

use datafusion::arrow::array::RecordBatch;
use datafusion::arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{DataFusionError, Result};
use datafusion::execution::{RecordBatchStream, SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::ColumnarValue;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::joins::utils::JoinFilter;
use datafusion::physical_plan::joins::{
    HashJoinExec, HashJoinExecBuilder, NestedLoopJoinExec, NestedLoopJoinExecBuilder,
};
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};
use futures::{Stream, StreamExt};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

/// The time of a query is over.
#[derive(Debug, thiserror::Error)]
#[error("the time of the query is over")]
pub(crate) struct Late;

fn check(deadline: Instant) -> Result<()> {
    if Instant::now() < deadline { Ok(()) } else { Err(DataFusionError::External(Box::new(Late))) }
}

/// The same plan, which fails with [`Late`] once `deadline` has passed.
pub(crate) fn bound(plan: Arc<dyn ExecutionPlan>, deadline: Instant) -> Result<Arc<dyn ExecutionPlan>> {
    let bounded = plan.transform_up(|plan| {
        let plan: Arc<dyn ExecutionPlan> =
            match (plan.downcast_ref::<HashJoinExec>(), plan.downcast_ref::<NestedLoopJoinExec>()) {
                (Some(join), _) if join.filter().is_some() => {
                    let filter = join.filter().map(|filter| timed(filter, deadline));
                    Arc::new(HashJoinExecBuilder::from(join).with_filter(filter).build()?)
                }
                (_, Some(join)) if join.filter().is_some() => {
                    let filter = join.filter().map(|filter| timed(filter, deadline));
                    Arc::new(NestedLoopJoinExecBuilder::from(join).with_filter(filter).build()?)
                }
                _ => plan,
            };
        Ok(Transformed::yes(Arc::new(Timed { plan, deadline }) as Arc<dyn ExecutionPlan>))
    })?;
    Ok(bounded.data)
}

/// An operator between whose batches the clock is looked at.
#[derive(Debug)]
struct Timed {
    plan: Arc<dyn ExecutionPlan>,
    deadline: Instant,
}

impl DisplayAs for Timed {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Timed")
    }
}

impl ExecutionPlan for Timed {
    fn name(&self) -> &str {
        "Timed"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.plan.properties()
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.plan]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let plan = children.pop().ok_or_else(|| DataFusionError::Internal("an operator is missing".to_owned()))?;
        Ok(Arc::new(Timed { plan, deadline: self.deadline }))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let batches = self.plan.execute(partition, context)?;
        Ok(Box::pin(TimedBatches { batches, deadline: self.deadline }))
    }
}

struct TimedBatches {
    batches: SendableRecordBatchStream,
    deadline: Instant,
}

impl Stream for TimedBatches {
    type Item = Result<RecordBatch>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        check(self.deadline)?;
        self.batches.poll_next_unpin(context)
    }
}

impl RecordBatchStream for TimedBatches {
    fn schema(&self) -> SchemaRef {
        self.batches.schema()
    }
}

fn timed(filter: &JoinFilter, deadline: Instant) -> JoinFilter {
    let condition = Arc::new(TimedCondition { condition: filter.expression().clone(), deadline });
    JoinFilter::new(condition, filter.column_indices().to_vec(), filter.schema().clone())
}

/// What a join compares by: between two of its evaluations there may be no batch for very long.
#[derive(Debug, Eq)]
struct TimedCondition {
    condition: Arc<dyn PhysicalExpr>,
    deadline: Instant,
}

impl PartialEq for TimedCondition {
    fn eq(&self, other: &Self) -> bool {
        self.condition.eq(&other.condition)
    }
}

impl Hash for TimedCondition {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.condition.hash(state);
    }
}

impl fmt::Display for TimedCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.condition.fmt(f)
    }
}

impl PhysicalExpr for TimedCondition {
    fn data_type(&self, input: &Schema) -> Result<DataType> {
        self.condition.data_type(input)
    }

    fn nullable(&self, input: &Schema) -> Result<bool> {
        self.condition.nullable(input)
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        check(self.deadline)?;
        self.condition.evaluate(batch)
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.condition]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn PhysicalExpr>>) -> Result<Arc<dyn PhysicalExpr>> {
        let condition = children.pop().ok_or_else(|| DataFusionError::Internal("a condition is missing".to_owned()))?;
        Ok(Arc::new(TimedCondition { condition, deadline: self.deadline }))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.condition.fmt_sql(f)
    }
}

#[cfg(test)]
mod tests {
    use crate::query::{Bounds, QueryError, Question, Table};
    use datafusion::arrow::array::{Int64Array, RecordBatch};
    use datafusion::arrow::datatypes::{DataType, Field, Schema};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[tokio::test]
    async fn joins_that_go_on_for_ever_and_find_nothing_end_at_their_time() {
        const TIME: Duration = Duration::from_millis(200);
        let fields = ["x", "k"].map(|name| Field::new(name, DataType::Int64, false));
        let schema = Arc::new(Schema::new(fields.to_vec()));
        let (x, k) = (Int64Array::from_iter_values(0..20_000), Int64Array::from_value(1, 20_000));
        let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(x), Arc::new(k)]).unwrap();
        for sql in [
            "SELECT count(*) FROM t a, t b, t c WHERE a.x + b.x + c.x = -1",
            "SELECT count(*) FROM t a JOIN t b ON a.k = b.k JOIN t c ON b.k = c.k AND a.x + b.x + c.x = -1",
            "SELECT sum(a.x * b.x) FROM t a, t b, t c",
            "SELECT a.x + b.x FROM t a, t b, t c ORDER BY 1 LIMIT 1",
            "SELECT count(*) FROM t a WHERE NOT EXISTS (SELECT 1 FROM t b, t c WHERE b.x + c.x = a.x - 1000000)",
        ] {
            let table = Table { name: vec!["t".to_owned()], schema: schema.clone(), batches: vec![batch.clone()] };
            let begun = Instant::now();
            let bounds = Bounds { rows: 1_000_000, memory: 256 << 20, until: begun + TIME };
            let result = Question::parse(sql).unwrap().run(&[], vec![table], bounds).await;
            assert!(matches!(result, Err(QueryError::Late)), "{sql}: {result:?}");
            // tests share their machine; alone it takes a few milliseconds more than it may
            assert!(begun.elapsed() < TIME + Duration::from_millis(800), "{sql}: {:?}", begun.elapsed());
        }
    }
}
