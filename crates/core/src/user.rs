//! Users: who owns keys and a monthly quota.

use crate::{content::ContentMode, id::UserId, limit::Limits};

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
    /// What is kept of the content of their requests, where it differs from the default.
    pub audit_content: Option<ContentMode>,
}
