//! Users: who owns keys and a monthly quota.

use crate::{id::UserId, limit::Limits};

/// One user, as requests see it.
#[derive(Clone, Debug)]
pub struct User {
    /// Row of `users`.
    pub id: UserId,
    /// Unique name.
    pub name: String,
    /// A disabled user's keys are refused like revoked ones.
    pub disabled: bool,
    /// Limits and quota over all keys of this user.
    pub limits: Limits,
}
