//! From what is written down to what binds a request.

use std::{net::IpAddr, sync::Arc};

use super::{Caps, Limits, ModelLimits, Subject, state::Demand};
use crate::{glob, key::KeyEntry};

/// The most subjects that one decision can take in; a request has one of each class.
pub const MAX_DEMANDS: usize = 8;

/// The defaults of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Of every key.
    pub key: Limits,
    /// Of every user.
    pub user: Limits,
    /// Of every address.
    pub ip: Limits,
    /// Of models within each key.
    pub models: Vec<ModelLimits>,
}

impl Policy {
    /// Has every address a quota?
    #[must_use]
    pub fn has_quota_of_addresses(&self) -> bool {
        Caps::resolve(&Limits::default(), &self.ip).has_quota()
    }

    /// Everything that binds a request, in the order of [`Subject`]. What has no limit is left out.
    #[must_use]
    pub fn demands(&self, key: &KeyEntry, ip: Option<IpAddr>, model: &Arc<str>) -> Vec<Demand> {
        let mut demands = Vec::with_capacity(4);
        let mut bind = |subject: &dyn Fn() -> Subject, caps: Caps| {
            if !caps.is_none() {
                demands.push(Demand { subject: subject(), caps });
            }
        };
        if let Some(ip) = ip {
            bind(&|| Subject::of_ip(ip), Caps::resolve(&Limits::default(), &self.ip));
        }
        bind(&|| Subject::User(key.user.id), Caps::resolve(&key.user.limits, &self.user));
        bind(&|| Subject::Key(key.user.id, key.id), Caps::resolve(&key.limits, &self.key));
        let (own, default) = (best(&key.model_limits, model), best(&self.models, model));
        if own.is_some() || default.is_some() {
            let caps = Caps::resolve(&own.unwrap_or_default(), &default.unwrap_or_default());
            bind(&|| Subject::KeyModel(key.user.id, key.id, Arc::clone(model)), caps);
        }
        demands
    }
}

/// The limits of the entry that fits best: the name itself, or else the longest pattern.
fn best(entries: &[ModelLimits], model: &str) -> Option<Limits> {
    let fits = entries.iter().filter(|entry| entry.model == model || glob::matches(&entry.model, model));
    fits.max_by_key(|entry| (entry.model == model, entry.model.len())).map(|entry| entry.limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_itself_goes_before_patterns() {
        let entry = |model: &str, rpm| ModelLimits {
            model: model.to_owned(),
            limits: Limits { rpm: Some(rpm), ..Limits::default() },
        };
        let entries = [entry("*", 1), entry("gpt-4*", 2), entry("gpt-4o", 3), entry("gpt-4o-*", 4)];
        let rpm = |model| best(&entries, model).and_then(|limits| limits.rpm);
        assert_eq!(rpm("o3"), Some(1));
        assert_eq!(rpm("gpt-4.1"), Some(2));
        assert_eq!(rpm("gpt-4o"), Some(3));
        assert_eq!(rpm("gpt-4o-mini"), Some(4));
        assert_eq!(best(&entries[1..], "o3"), None);
    }
}
