//! The gateway's integration tests: one binary, a file per behaviour.

#![expect(clippy::unwrap_used, reason = "a test may panic, and the helpers of tests are tests")]

mod access;
mod ahead;
mod answers;
mod bodies;
mod books;
mod chaos;
mod cli;
mod config;
mod content;
mod crash;
mod export;
mod fleet;
mod journal;
mod law;
mod layering;
mod limits;
mod listeners;
mod listing;
mod mock;
mod pool;
mod prices;
mod privacy;
mod ready;
mod redis_down;
mod retention;
mod secrets;
mod store;
mod support;
mod upstreams;
mod usage;
