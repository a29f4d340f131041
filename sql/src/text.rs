//! SQL as text: parsed within bounds that keep everything after it, which goes down into what is nested, from running
//! out of stack.

use crate::error::SqlError;
use datafusion::sql::sqlparser::ast::{Expr, GroupByExpr, Query, Select, Statement, TableFactor, Visit, Visitor};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};
use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;

/// Bytes of a text.
const BYTES: usize = 256 << 10;
/// Words, numbers and signs of a text.
const TOKENS: usize = 50_000;
/// How deep expressions may be nested: `a OR b OR c` is two deep.
const DEPTH: usize = 200;
/// Brackets within brackets.
const BRACKETS: usize = 50;
/// Subqueries, relations and set operations together, as they are written and as the planner copies what WITH names to
/// each place that reads it: planning cannot be interrupted.
const PARTS: usize = 100;
/// Grouping sets of a statement: CUBE of n columns makes 2ⁿ.
const SETS: usize = 1_024;
/// Stack for what goes down into SQL; taken from the system only as far as it is used.
const STACK: usize = 64 << 20;

/// The statements of a text.
pub(crate) fn statements(sql: &str) -> Result<Vec<Statement>, SqlError> {
    bounded(sql, |parser| parser.parse_statements())
}

/// Refuses a text that is no expression.
pub(crate) fn check_expression(sql: &str) -> Result<(), SqlError> {
    let whole = |parser: &mut Parser| {
        let expr = parser.parse_expr()?;
        parser.expect_token(&Token::EOF)?;
        Ok(expr)
    };
    bounded(sql, whole).map(drop)
}

fn bounded<T: Visit>(sql: &str, parse: impl FnOnce(&mut Parser) -> Result<T, ParserError>) -> Result<T, SqlError> {
    if sql.len() > BYTES {
        return Err(SqlError::new(format!("the SQL has {} bytes, more than the {BYTES} it may", sql.len())));
    }
    let dialect = GenericDialect {};
    let tokens = Tokenizer::new(&dialect, sql)
        .tokenize_with_location()
        .map_err(|error| SqlError::from_parser(&error.to_string()))?;
    if tokens.len() > TOKENS {
        return Err(SqlError::new(format!("the SQL has more than the {TOKENS} words and signs it may")));
    }
    let is_set_operation = |token: &Token| match token {
        Token::Word(word) => matches!(word.keyword, Keyword::UNION | Keyword::EXCEPT | Keyword::INTERSECT),
        _ => false,
    };
    let parts = tokens.iter().filter(|token| is_set_operation(&token.token)).count();
    let brackets = tokens.iter().filter(|token| token.token == Token::LBracket).count();
    if parts > PARTS {
        return Err(SqlError::new(format!("the SQL has more than the {PARTS} set operations it may")));
    }
    // what is too deep is not only walked through here but also dropped
    stacker::grow(STACK, || {
        let parser = Parser::new(&dialect).with_recursion_limit(BRACKETS);
        let parsed = parse(&mut parser.with_tokens_with_locations(tokens)).map_err(|error| match error {
            ParserError::ParserError(text) | ParserError::TokenizerError(text) => {
                SqlError::from_parser(&text).placed_at_end(sql)
            }
            ParserError::RecursionLimitExceeded => too_deep(),
        })?;
        let mut measure = Measure { parts, brackets, sets: 1, ..Measure::default() };
        match parsed.visit(&mut measure) {
            ControlFlow::Continue(()) => Ok(parsed),
            ControlFlow::Break(error) => Err(error),
        }
    })
}

fn too_deep() -> SqlError {
    SqlError::new(format!("the SQL is nested deeper than {DEPTH} operators or {BRACKETS} brackets"))
        .help("write `x IN (…)` for many comparisons, or compute in steps: WITH a AS (SELECT …) SELECT … FROM a")
}

#[derive(Default)]
struct Measure {
    depth: usize,
    parts: usize,
    brackets: usize,
    sets: usize,
    /// The queries around this place.
    open: Vec<Open>,
    /// Parts of what WITH has named so far; of two of one name, of the larger.
    named: HashMap<String, usize>,
}

/// A query that is being measured.
struct Open {
    parts: usize,
    /// Names of the queries to come that it is WITH.
    with: VecDeque<String>,
}

impl Measure {
    /// One more part as it is written, which is `copied` as it is planned.
    fn part(&mut self, copied: usize) -> ControlFlow<SqlError> {
        self.parts += 1;
        let planned = self.open.last_mut().map_or(0, |query| {
            query.parts = query.parts.saturating_add(copied);
            query.parts
        });
        if self.parts <= PARTS && planned <= PARTS {
            return ControlFlow::Continue(());
        }
        let text = format!(
            "the SQL has more than the {PARTS} relations, subqueries and set operations it may, what WITH names counted \
             where it is read"
        );
        ControlFlow::Break(SqlError::new(text))
    }
}

impl Visitor for Measure {
    type Break = SqlError;

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<SqlError> {
        let ctes = query.with.iter().flat_map(|with| &with.cte_tables);
        let with = ctes.map(|cte| cte.alias.name.value.to_lowercase()).collect();
        self.open.push(Open { parts: 0, with });
        self.part(1)
    }

    fn post_visit_query(&mut self, _: &Query) -> ControlFlow<SqlError> {
        let Some(Open { parts, .. }) = self.open.pop() else { return ControlFlow::Continue(()) };
        let Some(around) = self.open.last_mut() else { return ControlFlow::Continue(()) };
        match around.with.pop_front() {
            Some(name) => {
                let known = self.named.entry(name).or_default();
                *known = parts.max(*known);
            }
            None => around.parts = around.parts.saturating_add(parts),
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<SqlError> {
        let (grouped, modifiers) = match &select.group_by {
            GroupByExpr::All(modifiers) => (&[][..], modifiers),
            GroupByExpr::Expressions(grouped, modifiers) => (&grouped[..], modifiers),
        };
        if !modifiers.is_empty() {
            let text = "`GROUP BY … WITH` is not known: write `GROUP BY ROLLUP (a, b)` or `GROUP BY CUBE (a, b)`";
            return ControlFlow::Break(SqlError::new(text));
        }
        for expr in grouped {
            self.sets = self.sets.saturating_mul(match expr {
                Expr::Cube(columns) => u32::try_from(columns.len()).map_or(usize::MAX, |n| 2_usize.saturating_pow(n)),
                Expr::Rollup(columns) => columns.len() + 1,
                Expr::GroupingSets(sets) => sets.len().max(1),
                _ => 1,
            });
        }
        if self.sets <= SETS {
            return ControlFlow::Continue(());
        }
        ControlFlow::Break(SqlError::new(format!("the SQL has more than the {SETS} grouping sets it may")))
    }

    fn pre_visit_table_factor(&mut self, table: &TableFactor) -> ControlFlow<SqlError> {
        let named = match table {
            TableFactor::Table { name, .. } => match name.0.as_slice() {
                [part] => part.as_ident().and_then(|name| self.named.get(&name.value.to_lowercase())),
                _ => None,
            },
            _ => None,
        };
        let copied = named.map_or(1, |parts| parts.saturating_add(1));
        self.part(copied)
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<SqlError> {
        self.depth += 1;
        // types are not visited: `x::int[][]` is as deep as it has brackets
        let types = if matches!(expr, Expr::Cast { .. }) { self.brackets } else { 0 };
        if self.depth + types > DEPTH { ControlFlow::Break(too_deep()) } else { ControlFlow::Continue(()) }
    }

    fn post_visit_expr(&mut self, _: &Expr) -> ControlFlow<SqlError> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }
}

/// Does `work` with a stack that what is nested within bounds does not exhaust.
pub(crate) fn deep<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    let mut work = Box::pin(work); // it is large, and whoever waits for it should not be
    std::future::poll_fn(move |context| stacker::grow(STACK, || work.as_mut().poll(context)))
}

#[cfg(test)]
mod tests {

    use crate::plan::{Planner, condition};
    use crate::query::{Bounds, Question};
    use datafusion::arrow::datatypes::SchemaRef;
    use engine::event::StreamName;
    use std::time::{Duration, Instant};

    /// Texts that nest `n` of something.
    fn nested(n: usize) -> Vec<(&'static str, String)> {
        let chain = |between: &str| vec!["1"; n + 1].join(between);
        let ctes: Vec<String> = (1..n).map(|at| format!("c{at} AS (SELECT * FROM c{})", at - 1)).collect();
        vec![
            ("+", format!("SELECT {}", chain(" + "))),
            ("OR", format!("SELECT {}", vec!["1 = 1"; n + 1].join(" OR "))),
            ("||", format!("SELECT {}", vec!["'a'"; n + 1].join(" || "))),
            ("::", format!("SELECT 1{}", "::int".repeat(n))),
            ("[]", format!("SELECT NULL::int{}", "[]".repeat(n))),
            ("IS NULL", format!("SELECT 1{}", " IS NULL".repeat(n))),
            ("IN", format!("SELECT true{}", " IN (true)".repeat(n))),
            ("(", format!("SELECT {}1{}", "(".repeat(n), ")".repeat(n))),
            ("NOT", format!("SELECT {}true", "NOT ".repeat(n))),
            ("-", format!("SELECT {}1", "- ".repeat(n))),
            ("CASE", format!("SELECT {}1{}", "CASE WHEN true THEN ".repeat(n), " END".repeat(n))),
            ("abs", format!("SELECT {}1{}", "abs(".repeat(n), ")".repeat(n))),
            ("UNION", format!("SELECT 1{}", " UNION ALL SELECT 1".repeat(n))),
            ("EXCEPT", format!("VALUES (1){}", " EXCEPT VALUES (1)".repeat(n))),
            (
                "JOIN",
                format!(
                    "SELECT 1 FROM (SELECT 1) a0{}",
                    (1..n).map(|at| format!(", (SELECT 1) a{at}")).collect::<String>()
                ),
            ),
            ("WITH", format!("WITH c0 AS (SELECT 1), {} SELECT * FROM c{}", ctes.join(", "), n.max(2) - 1)),
            ("FROM", format!("SELECT * FROM {}(SELECT 1){}", "(SELECT * FROM ".repeat(n), ")".repeat(n))),
        ]
    }

    async fn ask(sql: &str) -> Result<(), String> {
        let bounds = Bounds { rows: 10_000, memory: 64 << 20, until: Instant::now() + Duration::from_secs(60) };
        let question = Question::parse(sql).map_err(|error| error.to_string())?;
        question.tables().map_err(|error| error.to_string())?;
        question.run(&[], Vec::new(), bounds).await.map(drop).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn nothing_is_nested_so_deeply_that_the_stack_ends() {
        for n in [15, 40, 90, 190, 1_000, 20_000] {
            for (what, sql) in nested(n) {
                let result = ask(&sql).await;
                match n {
                    15 => assert_eq!(result, Ok(()), "{what}"),
                    1_000.. => assert!(result.is_err(), "{what} × {n}"),
                    _ => {} // an answer or a refusal
                }
            }
        }
    }

    /// What is small as it is written and large as it is planned, which nothing stops.
    #[tokio::test]
    async fn nothing_is_planned_that_grows_beyond_what_is_written() {
        let doubled = |n: usize, from: &str| {
            let step = |at: usize| format!(", c{at} AS (SELECT x.v FROM c{0} x, C{0} y)", at - 1);
            format!("WITH c0 AS (SELECT 1 AS v){} {from}{n}", (1..=n).map(step).collect::<String>())
        };
        let cube = |n: usize| {
            let columns: Vec<String> = (0..n).map(|at| format!("v + {at}")).collect();
            format!("SELECT count(*) FROM (SELECT 1 AS v) GROUP BY CUBE ({})", columns.join(", "))
        };
        for sql in [doubled(3, "SELECT v FROM c"), cube(10)] {
            assert_eq!(ask(&sql).await, Ok(()), "{sql}");
        }
        let rolled: Vec<String> = (0..11).map(|at| format!("ROLLUP (v + {at})")).collect();
        for (sql, says) in [
            (doubled(12, "SELECT v FROM c"), "relations, subqueries"),
            (doubled(90, "SELECT v FROM c"), "relations, subqueries"),
            // a smaller one of the name, further inside, hides nothing
            (
                "WITH a AS (SELECT 1 AS v), ".to_owned()
                    + &doubled(4, "SELECT 1 FROM (WITH c4 AS (SELECT 1) SELECT 1 FROM c4) z, c4 x, c4 y, c")[5..],
                "relations, subqueries",
            ),
            (cube(11), "grouping sets"),
            (cube(80), "grouping sets"),
            (format!("SELECT 1 FROM (SELECT 1 AS v) GROUP BY {}", rolled.join(", ")), "grouping sets"),
            ("SELECT 1 FROM (SELECT 1 AS v) GROUP BY v WITH CUBE".to_owned(), "GROUP BY CUBE"),
        ] {
            let began = Instant::now();
            let refused = ask(&sql).await.unwrap_err();
            assert!(refused.contains(says) && began.elapsed() < Duration::from_secs(1), "{refused}");
        }
    }

    #[tokio::test]
    async fn metrics_and_conditions_are_bounded_as_questions_are() {
        let schema: SchemaRef = streams::schema::built_in()[0].arrow().clone();
        let source = |_: &StreamName| Some(schema.clone());
        let metric = |n: usize| {
            format!(
                "SELECT sum(price{}) AS x FROM market.trades GROUP BY tumble(ts, INTERVAL '1 minute')",
                " + 1".repeat(n)
            )
        };
        let program = Planner::default().program(&metric(150), source).await.unwrap();
        let refused = Planner::default().program(&metric(5_000), source).await.unwrap_err();
        assert!(refused.to_string().contains("nested deeper"), "{refused}");
        let any = |n: usize| format!("x > 1{}", " OR x > 1".repeat(n));
        assert!(condition(&any(150), &program).is_ok());
        assert!(condition(&any(5_000), &program).is_err());
    }
}
