//! Pure stream computation: events and the time go in, metric rows and alerts come out.
//! Knows no network, disk, clock or async runtime.

mod accumulate; // aggregate state, one column for all keys of a pane
pub mod alert; // rules over metrics, and which of them are firing
pub mod checkpoint; // all of it as it is stored: parts, and which of them changed
pub mod cost; // what metrics cost, by a stopwatch that is handed in
pub mod event; // when something happened, in which workspace, on which stream
pub mod indicator; // market and product indicators: formulas and their state
pub mod join; // reference tables and another stream joined to a metric's stream
mod key; // interned keys
pub mod limit; // how much state metrics may hold
mod merged; // panes merged into windows that overlap
pub mod metric; // one metric of one workspace: events in, rows out
pub mod over; // a metric over the rows of another one: OVER clauses
mod panes; // tumbling, hopping and cumulating windows
pub mod portfolio; // positions at last prices
pub mod program; // a metric's SQL as the engine runs it
pub mod reference; // reference tables, and which version of a row an event sees
mod rollup; // a metric with a window over the rows of another one
mod runs; // rows of a batch by key or session
mod session; // session windows
mod shared; // what several metrics do alike with one batch
pub mod window; // how event time is cut, and when windows close
pub mod workspace; // all of it together, and how it is saved
