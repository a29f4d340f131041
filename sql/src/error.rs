//! What is wrong with a piece of SQL, where, and what to write instead.

use datafusion::common::DataFusionError;
use datafusion::sql::sqlparser::tokenizer::Location;
use std::fmt;

/// SQL that cannot be run as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlError {
    /// Line, from 1; `None` where the cause has no place in the text.
    pub line: Option<u64>,
    /// Column, from 1.
    pub column: Option<u64>,
    pub message: String,
    /// What to write instead.
    pub help: Option<String>,
}

impl fmt::Display for SqlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, "line {line}, column {column}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(help) = &self.help {
            write!(f, "; {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SqlError {}

impl SqlError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { line: None, column: None, message: message.into(), help: None }
    }

    pub(crate) fn at(mut self, place: Location) -> Self {
        if place.line > 0 {
            (self.line, self.column) = (Some(place.line), Some(place.column));
        }
        self
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The error as DataFusion or its parser tells it, with the place found in `sql`.
    pub(crate) fn from_datafusion(error: &DataFusionError, sql: &str) -> Self {
        if let Some(diagnostic) = error.diagnostic() {
            let mut found = SqlError::new(diagnostic.message.clone());
            if let Some(span) = diagnostic.span {
                (found.line, found.column) = (Some(span.start.line), Some(span.start.column));
            }
            let notes = diagnostic.helps.iter().map(|h| &h.message).chain(diagnostic.notes.iter().map(|n| &n.message));
            let notes: Vec<&str> = notes.map(String::as_str).collect();
            if !notes.is_empty() {
                found.help = Some(notes.join("; "));
            }
            return found.placed(sql);
        }
        let text = error.find_root().strip_backtrace();
        let text = text.lines().next().unwrap_or_default();
        let text = [
            "Error during planning: ",
            "SQL error: ",
            "Schema error: ",
            "Invalid or Unsupported Configuration: ",
            "Internal error: ",
            "Execution error: ",
            "This feature is not implemented: ",
        ]
        .iter()
        .fold(text, |text, prefix| text.strip_prefix(prefix).unwrap_or(text));
        SqlError::from_parser(text).placed(sql)
    }

    /// The parser puts the place at the end of its message: `… at Line: 1, Column: 8`.
    pub(crate) fn from_parser(text: &str) -> Self {
        let text = text.strip_prefix("ParserError(\"").and_then(|t| t.strip_suffix("\")")).unwrap_or(text);
        let text = text.strip_prefix("sql parser error: ").unwrap_or(text);
        if let Some((message, place)) = text.rsplit_once(" at Line: ")
            && let Some((line, column)) = place.split_once(", Column: ")
            && let (Ok(line), Ok(column)) =
                (line.parse(), column.trim_end_matches(|c: char| !c.is_ascii_digit()).parse())
        {
            return Self { line: Some(line), column: Some(column), message: message.to_owned(), help: None };
        }
        SqlError::new(text)
    }

    /// The parser gives the end of a text no place.
    pub(crate) fn placed_at_end(mut self, sql: &str) -> Self {
        if self.line.is_none() && self.message.ends_with("found: EOF") {
            let (line, column) = place_of(sql, sql.trim_end().len());
            (self.line, self.column) = (Some(line), Some(column));
        }
        self
    }

    /// Without a place yet: the first word that message and text share in quotes, or else as a keyword.
    pub(crate) fn placed(mut self, sql: &str) -> Self {
        if self.line.is_some() {
            return self;
        }
        let unknown = self
            .message
            .strip_prefix("No field named ")
            .map(|rest| rest.split(". ").next().unwrap_or(rest).trim_end_matches('.').trim_matches('"'));
        let quoted = self.message.split(['\'', '"', '`']).skip(1).step_by(2);
        let words = unknown.into_iter().chain(quoted).flat_map(|word| [word, word.rsplit('.').next().unwrap_or(word)]);
        let is_keyword = |word: &&str| word.len() > 3 && word.bytes().all(|byte| byte.is_ascii_uppercase());
        let words = words.chain(self.message.split_whitespace().filter(is_keyword));
        let found = words
            .filter(|word| !word.is_empty())
            .find_map(|word| sql.to_ascii_lowercase().find(&word.to_ascii_lowercase()));
        // an unplaced error concerns the statement as a whole
        let (line, column) = place_of(sql, found.unwrap_or_else(|| sql.len() - sql.trim_start().len()));
        (self.line, self.column) = (Some(line), Some(column));
        self
    }
}

fn place_of(sql: &str, at: usize) -> (u64, u64) {
    let before = &sql[..at.min(sql.len())];
    let line = before.matches('\n').count() as u64 + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() as u64 + 1;
    (line, column)
}
