//! Data in motion: what events look like, how they are decoded to Arrow, the durable log, feeds and replay.
//! Knows no SQL, no actor and no HTTP.

mod durable; // files that are whole or not there
pub mod foreign; // crates that panic on bytes that lie
pub mod span; // durations as people write them
pub mod schema; // columns of a stream, and the streams every workspace has
pub mod decode; // events as clients send them become Arrow columns
pub mod table; // reference tables: columns, primary key, changes
pub mod dedup; // event ids seen of late, in bounded memory
pub mod log; // records of all workspaces in one durable order: the seam, and the log in files
pub mod reader; // files as events: CSV, JSON, Parquet, Excel, compressed or not
pub mod feed; // live trades of exchanges over WebSocket
pub mod simulate; // worlds from a seed, for demonstrations and tests

#[cfg(any(test, fuzzing))]
pub mod fuzz; // inputs of strangers, and what holds for any of them
