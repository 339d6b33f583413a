//! What tests share.

pub(crate) mod postgres;
//! What the tests share: an upstream that does as it is told, and clients that frame requests as they are told.

pub(crate) mod client;
pub(crate) mod upstream;
