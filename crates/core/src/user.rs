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
    /// Limits over all keys of this user.
    pub limits: Limits,
    /// Tokens per calendar month (UTC); `None` or 0: no quota.
    pub monthly_tokens: Option<u64>,
    /// Nano-dollars per calendar month (UTC); `None` or 0: no quota.
    pub monthly_nano_usd: Option<u64>,
}
