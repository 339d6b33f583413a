//! tollgate: a self-hosted gateway for the OpenAI API, on Pingora.
//!
//! The binary is a thin shell around this library, so that tests run the real server in their own process.

pub mod admin;
pub mod args;
pub mod cli;
pub mod config;
pub mod connector;
pub mod content;
pub mod credential;
pub mod drain;
pub mod estimate;
pub mod jobs;
pub mod journal;
pub mod limiter;
pub mod listen;
pub mod memory;
pub mod metrics;
pub mod mock;
pub mod peers;
pub mod provider;
pub mod proxy;
pub mod run;
pub mod seal;
pub mod secrets;
pub mod server;
pub mod shared;
pub mod store;
pub mod telemetry;
pub mod tls;
