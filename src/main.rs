//! tollgate: a self-hosted gateway for the OpenAI API.

use std::process::ExitCode;

use clap::Parser;
use tollgate::{args::Args, run};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    run::run(Args::parse(), &|name| std::env::var(name).ok())
}
