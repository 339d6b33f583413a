//! The snapshot: the immutable, resolved view that a request works with.
//!
//! Upstreams, models, aliases and prices that must agree are swapped together, as one value. A request takes the current
//! snapshot once and keeps it, so it sees the old world or the new one, never a mix.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    glob,
    health::Health,
    key::KeyEntry,
    pool::{Place, Pool, sticky_hash},
    price::Price,
    upstream::Upstream,
};

/// What the configuration says of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelInfo {
    /// What its tokens cost.
    pub price: Price,
    /// Other names that clients may use for it.
    pub aliases: Vec<String>,
}

/// What changes about an upstream while it runs; outlives the snapshots it appears in.
#[derive(Debug, Default)]
pub struct UpstreamState {
    /// Whether it may get work, and what is under way.
    pub health: Arc<Health>,
    listed_models: Mutex<Arc<[String]>>,
}

impl UpstreamState {
    /// Attempts under way.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.health.in_flight()
    }

    /// The models that the provider itself lists.
    #[must_use]
    pub fn listed_models(&self) -> Arc<[String]> {
        Arc::clone(&self.listed_models.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces that list.
    pub fn set_listed_models(&self, models: Vec<String>) {
        *self.listed_models.lock().unwrap_or_else(PoisonError::into_inner) = models.into();
    }
}

/// A member of the pool with its running state.
#[derive(Clone, Debug)]
pub struct Member {
    /// What is written down about it.
    pub upstream: Arc<Upstream>,
    /// What changes while it runs.
    pub state: Arc<UpstreamState>,
}

/// A model name, resolved.
#[derive(Clone, Debug)]
pub struct Target {
    /// The model's proper name, aliases resolved.
    pub model: Arc<str>,
    /// Who serves it.
    pub pool: Arc<Pool>,
    /// What its tokens cost.
    pub price: Price,
}

/// Distinct sets of upstreams that the patterns of a configuration can select. Operators write a handful; beyond this
/// many, further sets work but start their round robin anew at each request.
const MAX_PATTERN_POOLS: usize = 1024;

/// The immutable view of upstreams and models.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts up with every swap.
    pub generation: u64,
    members: Vec<Member>,
    models: HashMap<Arc<str>, ModelInfo>,
    aliases: HashMap<String, Arc<str>>,
    pools: Mutex<HashMap<Vec<usize>, Arc<Pool>>>,
}

impl Snapshot {
    /// Resolves everything once. Disabled upstreams get no work, whatever serves them.
    #[must_use]
    pub fn new(generation: u64, members: Vec<Member>, models: HashMap<String, ModelInfo>) -> Self {
        let models: HashMap<Arc<str>, ModelInfo> =
            models.into_iter().map(|(name, info)| (Arc::from(name), info)).collect();
        let aliases = models
            .iter()
            .flat_map(|(name, info)| info.aliases.iter().map(move |alias| (alias.clone(), Arc::clone(name))))
            .collect();
        Self { generation, members, models, aliases, pools: Mutex::default() }
    }

    /// The member at an index that a [`Pool`] gave.
    #[must_use]
    pub fn member(&self, index: usize) -> &Member {
        &self.members[index]
    }

    /// All members, disabled ones included.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Resolves the model that a client asked for, if this key may use it and somebody serves it.
    ///
    /// A key's model list may name the model or the alias that the client used.
    #[must_use]
    pub fn resolve(&self, asked: &str, key: &KeyEntry) -> Option<Target> {
        let model = self.canonical(asked);
        if !key.allows_model(asked) && !key.allows_model(&model) {
            return None;
        }
        let pool = self.pool_of(&model)?;
        let price = self.models.get(&model).map(|info| info.price).unwrap_or_default();
        Some(Target { model, pool, price })
    }

    fn canonical(&self, asked: &str) -> Arc<str> {
        match self.aliases.get(asked) {
            Some(model) => Arc::clone(model),
            None => self.models.get_key_value(asked).map_or_else(|| Arc::from(asked), |(name, _)| Arc::clone(name)),
        }
    }

    fn pool_of(&self, model: &str) -> Option<Arc<Pool>> {
        let serving: Vec<usize> = self
            .members
            .iter()
            .enumerate()
            .filter(|(_, member)| !member.upstream.disabled && member.upstream.resolve_model(model).is_some())
            .map(|(index, _)| index)
            .collect();
        if serving.is_empty() {
            return None;
        }
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(&serving) {
            return Some(Arc::clone(pool));
        }
        let pool = Arc::new(Pool::new(serving.iter().map(|&index| {
            let upstream = &self.members[index].upstream;
            let identity = sticky_hash(upstream.name.as_bytes());
            Place { index, priority: upstream.priority, weight: upstream.weight, identity }
        })));
        if pools.len() < MAX_PATTERN_POOLS {
            pools.insert(serving, Arc::clone(&pool));
        }
        Some(pool)
    }

    /// Every model name that can be named and that `key` may use, sorted: exact names that upstreams serve, what
    /// upstreams with patterns list themselves, and aliases of either.
    #[must_use]
    pub fn models_for(&self, key: &KeyEntry) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for member in self.members.iter().filter(|member| !member.upstream.disabled) {
            let entries = &member.upstream.models;
            names.extend(entries.iter().filter(|e| !glob::is_pattern(&e.name)).map(|e| e.name.clone()));
            if entries.is_empty() || entries.iter().any(|e| glob::is_pattern(&e.name)) {
                let listed = member.state.listed_models();
                names.extend(listed.iter().filter(|name| member.upstream.resolve_model(name).is_some()).cloned());
            }
        }
        let aliases: Vec<String> = self
            .aliases
            .iter()
            .filter(|(_, model)| names.contains(&***model))
            .map(|(alias, _)| alias.clone())
            .collect();
        names.extend(aliases);
        names.retain(|name| key.allows_model(name) || key.allows_model(&self.canonical(name)));
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::{KeyId, UserId},
        pool::{Fitness, Strategy},
        secret::Secret,
        upstream::{BaseUrl, ModelEntry, Timeouts, UpstreamKind},
        user::User,
    };

    fn member(name: &str, models: &[&str]) -> Member {
        let upstream = Upstream {
            id: None,
            name: name.into(),
            kind: UpstreamKind::OpenAi,
            base_url: BaseUrl::parse("http://127.0.0.1:1/v1").unwrap(),
            credential: Secret::default(),
            models: models.iter().map(|m| ModelEntry::parse(m).unwrap()).collect(),
            weight: 1,
            priority: 0,
            api_version: None,
            timeouts: Timeouts::default(),
            ca_pem: None,
            disabled: name.starts_with("off"),
        };
        Member { upstream: Arc::new(upstream), state: Arc::default() }
    }

    fn key(models: &[&str]) -> KeyEntry {
        KeyEntry {
            id: KeyId(1),
            name: "k".into(),
            prefix: "tg-".into(),
            user: Arc::new(User {
                id: UserId(1),
                name: "u".into(),
                disabled: false,
                limits: crate::limit::Limits::default(),
            }),
            models: models.iter().map(|&m| m.to_owned()).collect(),
            allow_ip: vec![],
            limits: crate::limit::Limits::default(),
            model_limits: vec![],
            expires_at: None,
            revoked_at: None,
        }
    }

    fn snapshot() -> Snapshot {
        let info = ModelInfo { aliases: vec!["fast".into()], price: Price { input: 1, ..Price::default() } };
        let members =
            vec![member("a", &["gpt-4o=prod", "gpt-4o-mini"]), member("b", &["gpt-*"]), member("off", &["o3"])];
        members[1].state.set_listed_models(vec!["gpt-5".into(), "whisper".into()]);
        Snapshot::new(1, members, HashMap::from([("gpt-4o-mini".to_owned(), info)]))
    }

    #[test]
    fn models_resolve_to_those_who_serve_them() {
        let snapshot = snapshot();
        let members = |asked: &str, key: &KeyEntry| {
            snapshot.resolve(asked, key).map(|t| (t.model.to_string(), t.pool.members().collect::<Vec<_>>()))
        };
        let any = key(&[]);
        assert_eq!(members("gpt-4o", &any), Some(("gpt-4o".into(), vec![0, 1])));
        assert_eq!(members("fast", &any), Some(("gpt-4o-mini".into(), vec![0, 1])));
        assert_eq!(members("gpt-x", &any), Some(("gpt-x".into(), vec![1])));
        assert_eq!(members("o3", &any), None, "its upstream is disabled");
        assert_eq!(members("gpt-4o", &key(&["fast"])), None);
        assert!(members("fast", &key(&["fast"])).is_some());
        assert!(members("fast", &key(&["gpt-4o-mini"])).is_some());
        assert_eq!(snapshot.resolve("fast", &any).unwrap().price.input, 1);
    }

    #[test]
    fn a_pool_keeps_its_round_robin_between_requests() {
        let snapshot = snapshot();
        let pick = |pool: &Pool| pool.pick(Strategy::Weighted, None, |_| Fitness::Preferred, |_| 0);
        let picks: Vec<_> = (0..4).filter_map(|_| pick(&snapshot.resolve("gpt-4o", &key(&[])).unwrap().pool)).collect();
        assert_eq!(picks, [0, 1, 0, 1]);
    }

    #[test]
    fn a_key_sees_the_models_that_it_may_use() {
        let names = |models: &[&str]| snapshot().models_for(&key(models)).into_iter().collect::<Vec<_>>();
        assert_eq!(names(&[]), ["fast", "gpt-4o", "gpt-4o-mini", "gpt-5"]);
        assert_eq!(names(&["fast"]), ["fast"]);
        assert_eq!(names(&["gpt-4o*"]), ["fast", "gpt-4o", "gpt-4o-mini"]);
    }
}
