//! The gateway's integration tests: one binary, a file per behaviour.

mod config;
mod layering;
#![expect(clippy::unwrap_used, reason = "a test may panic, and the helpers of tests are tests")]

mod store;
mod mock;
mod support;
