//! Questions asked once: read-only SQL over tables that are handed in.

use crate::deadline::{self, Late};
use crate::division::ByZeroIsNull;
use crate::error::SqlError;
use crate::functions;
use crate::{sandbox, text};
use datafusion::arrow::array::RecordBatch;
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::catalog::{MemTable, MemorySchemaProvider, SchemaProvider};
use datafusion::common::{DataFusionError, ParamValues, ScalarValue};
use datafusion::execution::context::{SQLOptions, SessionContext};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::logical_expr::Volatility;
use datafusion::physical_plan::execute_stream;
use datafusion::prelude::SessionConfig;
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::{Expr, Statement, visit_expressions, visit_relations};
use engine::reference::TABLES;
use futures::StreamExt;
use serde_json::Value;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

/// What a question may cost.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Rows of an answer; one more is an error, so that no answer is silently cut.
    pub rows: usize,
    /// Bytes of memory for sorts, joins and aggregates.
    pub memory: usize,
    /// When it must have come to its end.
    pub until: Instant,
}

/// A table the question may read.
pub struct Table {
    /// As in SQL: `["market", "trades"]` or `["vwap_1m"]`.
    pub name: Vec<String>,
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

/// Rows, all of one schema.
#[derive(Debug)]
pub struct Answer {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    #[error(transparent)]
    Sql(#[from] SqlError),
    #[error("the answer has more than {0} rows; add LIMIT or aggregate, or raise limits.query_rows")]
    TooManyRows(usize),
    #[error("the query needs more than its {0} bytes of memory; ask for less at a time, or raise limits.query_memory")]
    Memory(usize),
    #[error("the query took longer than it may")]
    Late,
    #[error("the query failed: {0}")]
    Failed(String),
}

/// A question that may be run: one statement that reads.
pub struct Question {
    sql: String,
    statement: Box<Statement>,
}

impl Question {
    /// Parses `sql` and refuses all but one query.
    pub fn parse(sql: &str) -> Result<Question, SqlError> {
        match <[Statement; 1]>::try_from(text::statements(sql)?) {
            Ok([mut statement @ Statement::Query(_)]) => {
                functions::write_out_times(&mut statement);
                Ok(Question { sql: sql.to_owned(), statement: Box::new(statement) })
            }
            Ok(_) => Err(SqlError::new("only queries are allowed here: write a SELECT")),
            Err(many) => Err(SqlError::new(format!("one statement at a time, this text has {}", many.len()))),
        }
    }

    /// Whether it has the same answer as long as the same events and rows are there: it asks neither for the time nor for
    /// chance, and reads no reference table, whose rows become valid with time.
    pub fn is_repeatable(&self) -> bool {
        let dated = visit_relations(&*self.statement, |name| match name.0.first().and_then(|part| part.as_ident()) {
            Some(schema) if schema.value.eq_ignore_ascii_case(TABLES) => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        let changing = visit_expressions(&*self.statement, |expr| match expr {
            Expr::Function(call)
                if call.name.0.last().and_then(|part| part.as_ident()).is_none_or(|name| is_changing(&name.value)) =>
            {
                ControlFlow::Break(())
            }
            _ => ControlFlow::Continue(()),
        });
        dated.is_continue() && changing.is_continue()
    }

    /// The tables it names, each as its parts.
    pub fn tables(&self) -> Result<Vec<Vec<String>>, SqlError> {
        let context = SessionContext::new();
        let statement = DfStatement::Statement(self.statement.clone());
        let tables = context.state().resolve_table_references(&statement);
        let tables = tables.map_err(|error| SqlError::from_datafusion(&error, &self.sql))?;
        Ok(tables.iter().map(datafusion::common::TableReference::to_vec).collect())
    }

    /// Runs it over `tables` and nothing else. `params` stand for `$1`, `$2`, ….
    pub async fn run(self, params: &[Value], tables: Vec<Table>, bounds: Bounds) -> Result<Answer, QueryError> {
        text::deep(self.answer(params, tables, bounds)).await
    }

    async fn answer(self, params: &[Value], tables: Vec<Table>, bounds: Bounds) -> Result<Answer, QueryError> {
        let convert = |error: DataFusionError| match error.find_root() {
            DataFusionError::External(error) if error.is::<Late>() => QueryError::Late,
            DataFusionError::ResourcesExhausted(_) => QueryError::Memory(bounds.memory),
            DataFusionError::Plan(_)
            | DataFusionError::SQL(..)
            | DataFusionError::SchemaError(..)
            | DataFusionError::Diagnostic(..)
            | DataFusionError::NotImplemented(_) => SqlError::from_datafusion(&error, &self.sql).into(),
            other => QueryError::Failed(other.strip_backtrace()),
        };
        let mut config = SessionConfig::new().with_target_partitions(1).with_information_schema(false);
        config.options_mut().sql_parser.collect_spans = true;
        config.options_mut().execution.enable_recursive_ctes = false;
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(FairSpillPool::new(bounds.memory)))
            .with_disk_manager_builder(
                datafusion::execution::disk_manager::DiskManagerBuilder::default()
                    .with_mode(datafusion::execution::disk_manager::DiskManagerMode::Disabled),
            )
            .build_arc()
            .map_err(convert)?;
        let context = sandbox::context(config, runtime);
        context.add_analyzer_rule(Arc::new(ByZeroIsNull));
        functions::indicators().for_each(|function| context.register_udwf(function));
        let catalog = context.catalog("datafusion").expect("the default catalog is there");
        for table in tables {
            let provider = Arc::new(MemTable::try_new(table.schema, vec![table.batches]).map_err(convert)?);
            let (schema, name) = match table.name.as_slice() {
                [name] => ("public", name),
                [.., schema, name] => (schema.as_str(), name),
                [] => continue,
            };
            let tables = match catalog.schema(schema) {
                Some(tables) => tables,
                None => {
                    let tables: Arc<dyn SchemaProvider> = Arc::new(MemorySchemaProvider::new());
                    catalog.register_schema(schema, tables.clone()).map_err(convert)?;
                    tables
                }
            };
            tables.register_table(name.clone(), provider).map_err(convert)?;
        }
        let statement = DfStatement::Statement(self.statement.clone());
        let plan = context.state().statement_to_plan(statement).await.map_err(convert)?;
        let read_only = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        read_only.verify_plan(&plan).map_err(convert)?;
        let plan = if params.is_empty() {
            plan
        } else {
            let values =
                params.iter().map(|value| scalar(value).map(Into::into)).collect::<Result<Vec<_>, SqlError>>()?;
            plan.with_param_values(ParamValues::List(values)).map_err(convert)?
        };
        let frame = context.execute_logical_plan(plan).await.map_err(convert)?;
        let schema: SchemaRef = Arc::new(frame.schema().as_arrow().clone());
        let context = Arc::new(frame.task_ctx());
        let plan = frame.create_physical_plan().await.map_err(convert)?;
        let plan = deadline::bound(plan, bounds.until).map_err(convert)?;
        let mut stream = execute_stream(plan, context).map_err(convert)?;
        let (mut batches, mut rows) = (Vec::new(), 0);
        while let Some(batch) = stream.next().await {
            let batch = batch.map_err(convert)?;
            rows += batch.num_rows();
            if rows > bounds.rows {
                return Err(QueryError::TooManyRows(bounds.rows));
            }
            batches.push(batch);
        }
        Ok(Answer { schema, batches })
    }
}

/// Whether a function of this name may answer differently when it is asked again.
fn is_changing(name: &str) -> bool {
    static CHANGING: LazyLock<HashSet<String>> = LazyLock::new(|| {
        let state = sandbox::context(SessionConfig::new(), Arc::default()).state();
        let all = state.scalar_functions().iter();
        let changing = all.filter(|(_, function)| function.signature().volatility != Volatility::Immutable);
        changing.map(|(name, _)| name.to_lowercase()).collect()
    });
    CHANGING.contains(&name.to_lowercase())
}

fn scalar(value: &Value) -> Result<ScalarValue, SqlError> {
    Ok(match value {
        Value::Null => ScalarValue::Null,
        Value::Bool(value) => ScalarValue::from(*value),
        Value::String(text) => ScalarValue::from(text.as_str()),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(int), _) => ScalarValue::from(int),
            (None, Some(float)) => ScalarValue::from(float),
            (None, None) => return Err(SqlError::new(format!("parameter {number} is no 64-bit number"))),
        },
        other => return Err(SqlError::new(format!("parameter {other} is neither text, number, boolean nor null"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_about_time_chance_or_dated_rows_has_no_answer_to_keep() {
        let is_repeatable = |sql: &str| Question::parse(sql).unwrap().is_repeatable();
        for sql in [
            "SELECT symbol, round(avg(price), 2) FROM market.trades WHERE ts > '2026-01-01' GROUP BY symbol",
            "SELECT date_trunc('hour', ts), count(DISTINCT symbol) FROM market.trades GROUP BY 1",
            "WITH bars AS (SELECT * FROM vwap_1m) SELECT ema(vwap, 20) OVER (ORDER BY window_start) FROM bars",
        ] {
            assert!(is_repeatable(sql), "{sql}");
        }
        for sql in [
            "SELECT now()",
            "SELECT count(*) FROM market.trades WHERE ts > NOW() - INTERVAL '1 minute'",
            "SELECT * FROM market.trades WHERE ts > (SELECT current_timestamp)",
            "SELECT CURRENT_DATE",
            "SELECT \"now\"()",
            "SELECT uuid(), random()",
            "SELECT * FROM ref.companies",
            "SELECT * FROM market.trades WHERE symbol IN (SELECT symbol FROM REF.companies)",
        ] {
            assert!(!is_repeatable(sql), "{sql}");
        }
    }
}
