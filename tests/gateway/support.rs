//! What the tests share: the gateway, an upstream that does as it is told, clients that frame requests as they are told.

pub(crate) mod cli;
pub(crate) mod client;
pub(crate) mod cutter;
pub(crate) mod fleet;
pub(crate) mod gateway;
pub(crate) mod many;
pub(crate) mod mortal;
pub(crate) mod openai;
pub(crate) mod postgres;
pub(crate) mod process;
pub(crate) mod program;
pub(crate) mod redis;
pub(crate) mod upstream;
