//! What the tests share: the gateway, an upstream that does as it is told, clients that frame requests as they are told.

pub(crate) mod client;
pub(crate) mod gateway;
pub(crate) mod openai;
pub(crate) mod postgres;
pub(crate) mod upstream;
