//! The field's benchmark queries through this engine, from files, checked against other engines.
//! Knows no server: decoding, planning and windows only.

pub mod pipeline; // a file of events as decoded batches, in its order, on several cores
pub mod workload; // the windowed queries over trades that other engines are measured with
pub mod nexmark; // an auction house as three streams
