//! Everything that speaks SQL: metrics become window programs, questions are answered over memory and history,
//! and what must last is stored. Knows no actor and no HTTP.

mod deadline; // queries that end in time
mod division; // division by zero is NULL
mod error; // what is wrong with a piece of SQL, where, and what to write instead
mod join; // a metric's FROM: its stream, and what is joined to it
mod functions; // the engine's indicators as window functions
mod over; // from SQL over a metric's rows to the program the engine runs
pub mod plan; // from a metric's SQL to the program the engine runs
pub mod query; // questions asked once
mod sandbox; // the functions that SQL of users may call
mod text; // SQL as text, parsed within bounds
pub mod store; // what outlives the process: users, definitions, results, checkpoints

#[cfg(any(test, fuzzing))]
pub mod fuzz; // texts of strangers, and what holds for any of them

pub use error::SqlError;
