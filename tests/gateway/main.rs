//! The gateway's integration tests: one binary, a file per behaviour.

#![expect(clippy::unwrap_used, reason = "a test may panic, and the helpers of tests are tests")]

mod access;
mod answers;
mod bodies;
mod chaos;
mod cli;
mod config;
mod content;
mod crash;
mod fleet;
mod journal;
mod law;
mod layering;
mod limits;
mod listeners;
mod mock;
mod pool;
mod privacy;
mod redis_down;
mod secrets;
mod store;
mod support;
mod upstreams;
mod usage;
