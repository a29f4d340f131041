//! End to end: the whole system on a port and in a directory of its own, spoken to as a client does.

mod bad_input; // each kind of bad input: its problem, its code, and the process stays up
mod cached; // what was read before, in memory and in Redis
mod chain; // metrics over metrics, live, in history and after a restart
mod command; // the commands of the binary against a real server
mod crowded; // more connections than the process has descriptors for
#[path = "../support/database.rs"]
mod database; // a PostgreSQL of its own
mod edge; // nodes that serve clients for the one with the engine
mod harness; // a server for one test, and a client of it
mod join; // metrics that join reference tables or a second stream
mod limit; // metrics that hold more state than they may, and how a metric runs
mod journey; // from an event to a live row, an alert, a portfolio, and on after a restart
mod kill; // the real binary killed under load: nothing acknowledged is lost, nothing counts twice
mod pack; // workspaces made from packs
mod push; // WebSocket and SSE at their edges: resuming, presence, limits, bad frames, draining
#[path = "../support/redis.rs"]
mod redis; // a Redis of its own
mod stores; // the binary over PostgreSQL: killed, without its database, backed up and restored
mod webhook; // alerts told to a receiver that is away, slow, gone or well, and by a server that is killed
