//! What was read once is remembered: in memory, and in Redis where there is one, until what it was made of changes.
//! Knows neither what it keeps nor who asks.

mod config; // the settings of this crate
mod tag; // what entries are made of, and that it changed
mod layers; // memory first, then Redis, then whoever can load it
mod link; // the connection to Redis, which may be gone at any time
mod bus; // messages from node to node over Redis
mod shared; // the second layer, as Redis keeps it
mod bucket; // token buckets that several nodes share
mod tries; // tries of a password that several nodes count together

#[cfg(test)]
mod tests;

pub use bucket::{Level, Rate};
pub use bus::{Heard, Listener, Publisher};
pub use config::{CacheError, Config, RedisConfig};
pub use layers::{Ask, Cache, Class, Kept, Warmth};
pub use link::Standing;
pub use tag::Tag;
pub use tries::Patience;
