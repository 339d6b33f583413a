//! The gateway's integration tests: one binary, a file per behaviour.

mod config;
mod layering;
