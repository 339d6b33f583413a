//! tollgate: a self-hosted gateway for the OpenAI API.

use std::process::ExitCode;

use clap::Parser;
use tollgate::{args::Args, memory, run};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    memory::use_small_pages();
    run::run(Args::parse(), &|name| std::env::var(name).ok())
}
