//! What holds for any text of a stranger: a target of `fuzz/`, run for a while by the test below.

use crate::plan::Planner;
use crate::query::Question;
use engine::event::StreamName;
use streams::schema::built_in;

/// The SQL of a metric, and of a question asked once.
pub fn sql(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let source = |name: &StreamName| {
        built_in().iter().find(|schema| schema.stream == *name).map(|schema| schema.arrow().clone())
    };
    let planner = Planner::default();
    match futures::executor::block_on(planner.program(text, source)) {
        Ok(program) => {
            let output = program.output();
            assert_eq!(
                (output.field(0).name().as_str(), output.field(1).name().as_str()),
                ("window_start", "window_end")
            );
            let again = futures::executor::block_on(planner.program(text, source)).unwrap();
            assert!(std::sync::Arc::ptr_eq(&program, &again), "planned once");
        }
        Err(error) => {
            let shown = error.to_string();
            assert!(!shown.is_empty() && shown.len() < 4096 + 2 * text.len(), "{} bytes of error", shown.len());
        }
    }
    if let Ok(question) = Question::parse(text) {
        _ = question.tables();
        _ = question.is_repeatable();
    }
}

#[cfg(test)]
mod tests;
