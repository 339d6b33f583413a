//! tollgate: a self-hosted gateway for the OpenAI API, on Pingora.

pub mod config;
pub mod telemetry;
pub mod store;
pub mod mock;
