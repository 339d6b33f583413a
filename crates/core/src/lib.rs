//! The pure core of tollgate: every decision that is a function of its arguments.
//!
//! Nothing in here does I/O, reads a clock, draws a random number or looks at the environment. Time is an
//! argument, randomness is an argument; the compiler keeps the rest out because the crates that could do
//! it are not among the dependencies. That is what makes the laws of the gateway (what a re-chunked stream
//! may change, who gets picked, what a request costs) testable as properties, in milliseconds.

pub mod allowance;
pub mod azure;
pub mod breaker;
pub mod content;
pub mod denial;
pub mod exposition;
pub mod glob;
pub mod health;
pub mod id;
pub mod journal;
pub mod key;
pub mod limit;
pub mod openai;
pub mod pool;
pub mod price;
pub mod readiness;
pub mod redact;
pub mod retention;
pub mod retry;
pub mod route;
pub mod secret;
pub mod snapshot;
pub mod units;
pub mod upstream;
pub mod usage;
pub mod user;
pub mod verdict;
