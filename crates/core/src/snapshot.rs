//! The snapshot: the immutable, resolved view that a request works with.
//!
//! Upstreams, models, aliases and prices that must agree are swapped together, as one value. A request takes the current
//! snapshot once and keeps it, so it sees the old world or the new one, never a mix.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use chrono::{DateTime, Utc};

use crate::{
    glob,
    health::Health,
    key::KeyEntry,
    pool::{Place, Pool, Strategy, sticky_hash},
    price::{
        Price, Tier,
        book::{PriceBook, Prices},
    },
    upstream::Upstream,
    usage::Usage,
};

/// What the configuration says of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelInfo {
    /// What its tokens cost, if the configuration says so.
    pub price: Option<Arc<Price>>,
    /// Other names that clients may use for it.
    pub aliases: Vec<String>,
    /// How its requests are shared out among the upstreams; `None`: as those of all models.
    pub strategy: Option<Strategy>,
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
    /// Who serves it. May be nobody: then all who could are disabled, or have no weight.
    pub pool: Arc<Pool>,
    /// How its requests are shared out among them.
    pub strategy: Strategy,
    /// What its tokens cost when the request begins; `None`: nobody knows.
    pub price: Option<Arc<Price>>,
}

impl Target {
    /// What `usage` costs, in nano-dollars; nothing, if nobody knows.
    #[must_use]
    pub fn cost_nano_usd(&self, usage: &Usage, tier: Tier) -> u64 {
        self.price.as_ref().map_or(0, |price| price.cost_nano_usd(usage, tier))
    }
}

/// A model whose name stands somewhere.
#[derive(Clone, Debug)]
struct Known {
    target: Target,
    prices: Prices,
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
    strategy: Strategy,
    prices: PriceBook,
    /// Those models whose names stand somewhere: nearly all that are asked for.
    known: HashMap<Arc<str>, Known>,
    pools: Mutex<HashMap<Vec<usize>, Arc<Pool>>>,
}

impl Snapshot {
    /// Resolves everything once. Disabled upstreams get no work, whatever they serve. `prices`: of the database and of the
    /// program; those of `models` are added. `strategy`: how requests are shared out where a model does not say.
    #[must_use]
    pub fn new(
        generation: u64,
        members: Vec<Member>,
        models: HashMap<String, ModelInfo>,
        prices: PriceBook,
        strategy: Strategy,
    ) -> Self {
        let models: HashMap<Arc<str>, ModelInfo> =
            models.into_iter().map(|(name, info)| (Arc::from(name), info)).collect();
        let aliases = models
            .iter()
            .flat_map(|(name, info)| info.aliases.iter().map(move |alias| (alias.clone(), Arc::clone(name))))
            .collect();
        let own = |(name, info): (&Arc<str>, &ModelInfo)| Some((name.to_string(), Arc::clone(info.price.as_ref()?)));
        let prices = prices.with_config(models.iter().filter_map(own));
        let (known, pools) = (HashMap::new(), Mutex::default());
        let mut snapshot = Self { generation, members, models, aliases, strategy, prices, known, pools };
        snapshot.known =
            snapshot.named().into_iter().filter_map(|name| Some((Arc::clone(&name), snapshot.know(name)?))).collect();
        snapshot
    }

    /// Every model that is named by an upstream, in the configuration, or in a list of prices.
    fn named(&self) -> BTreeSet<Arc<str>> {
        let entries = self.members.iter().flat_map(|member| &member.upstream.models);
        let exact = entries.filter(|entry| !glob::is_pattern(&entry.name)).map(|entry| Arc::from(entry.name.as_str()));
        let priced = self.prices.models().into_iter().map(Arc::from);
        self.models.keys().cloned().chain(exact).chain(priced).collect()
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

    /// Resolves the model that a client asked for `now`, if this key may use it and somebody serves it.
    ///
    /// A key's model list may name the model or the alias that the client used.
    #[must_use]
    pub fn resolve(&self, asked: &str, key: &KeyEntry, now: DateTime<Utc>) -> Option<Target> {
        let model = self.proper(asked);
        if !key.allows_model(asked) && !key.allows_model(model) {
            return None;
        }
        if let Some(known) = self.known.get(model) {
            return Some(Target { price: known.prices.at(now), ..known.target.clone() });
        }
        let Known { target, prices } = self.know(Arc::from(model))?;
        Some(Target { price: prices.at(now), ..target })
    }

    fn know(&self, model: Arc<str>) -> Option<Known> {
        let pool = self.pool_of(&model)?;
        let info = self.models.get(&model);
        let strategy = info.and_then(|info| info.strategy).unwrap_or(self.strategy);
        let prices = self.prices_of(&model);
        Some(Known { target: Target { model, pool, strategy, price: None }, prices })
    }

    /// What a model costs; where nobody knows, what its upstreams call it may be known.
    fn prices_of(&self, model: &str) -> Prices {
        let upstream_names = self.members.iter().filter_map(|member| member.upstream.resolve_model(model));
        self.prices.find(std::iter::once(model).chain(upstream_names))
    }

    /// The proper name of a model, which may be asked for by an alias.
    fn proper<'a>(&'a self, asked: &'a str) -> &'a str {
        self.aliases.get(asked).map_or(asked, |model| model)
    }

    /// `None`: no upstream has ever heard of the model. Those that are disabled have, and will serve it again.
    fn pool_of(&self, model: &str) -> Option<Arc<Pool>> {
        let members = self.members.iter().enumerate();
        let mut serving: Vec<usize> = members
            .filter(|(_, member)| member.upstream.resolve_model(model).is_some())
            .map(|(index, _)| index)
            .collect();
        if serving.is_empty() {
            return None;
        }
        serving.retain(|&index| !self.members[index].upstream.disabled);
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
        names.retain(|name| key.allows_model(name) || key.allows_model(self.proper(name)));
        names
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        id::{KeyId, UserId},
        pool::{Fitness, Strategy},
        price::Rates,
        secret::Secret,
        upstream::{BaseUrl, Handling, ModelEntry, UpstreamKind},
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
            handling: Handling::default(),
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
                audit_content: None,
            }),
            models: models.iter().map(|&m| m.to_owned()).collect(),
            allow_ip: vec![],
            limits: crate::limit::Limits::default(),
            model_limits: vec![],
            audit_content: None,
            expires_at: None,
            revoked_at: None,
        }
    }

    fn price(input: u64) -> Arc<Price> {
        Arc::new(Price::of(Rates::flat(input, 0)))
    }

    fn at(day: &str) -> DateTime<Utc> {
        format!("{day}T00:00:00Z").parse().unwrap()
    }

    /// What was imported for `gpt-4o`, `prod` and `o3`.
    fn prices() -> PriceBook {
        let history = |input| BTreeMap::from([(at("2026-01-01"), price(input)), (at("2026-06-01"), price(input + 1))]);
        let stored = [("gpt-4o", 10), ("real", 20), ("o9", 30)].map(|(name, input)| (name.to_owned(), history(input)));
        PriceBook::new(HashMap::new(), stored.into(), Arc::default())
    }

    fn snapshot() -> Snapshot {
        let info = ModelInfo { aliases: vec!["fast".into()], price: Some(price(1)), strategy: Some(Strategy::Sticky) };
        let members = vec![
            member("a", &["gpt-4o=prod", "gpt-4o-mini", "own=real"]),
            member("b", &["gpt-*"]),
            member("off", &["o3"]),
        ];
        members[1].state.set_listed_models(vec!["gpt-5".into(), "whisper".into()]);
        Snapshot::new(1, members, HashMap::from([("gpt-4o-mini".to_owned(), info)]), prices(), Strategy::Weighted)
    }

    #[test]
    fn models_resolve_to_those_who_serve_them() {
        let snapshot = snapshot();
        let members = |asked: &str, key: &KeyEntry| {
            snapshot
                .resolve(asked, key, at("2026-02-01"))
                .map(|t| (t.model.to_string(), t.pool.members().collect::<Vec<_>>()))
        };
        let any = key(&[]);
        assert_eq!(members("gpt-4o", &any), Some(("gpt-4o".into(), vec![0, 1])));
        assert_eq!(members("fast", &any), Some(("gpt-4o-mini".into(), vec![0, 1])));
        assert_eq!(members("gpt-x", &any), Some(("gpt-x".into(), vec![1])));
        assert_eq!(members("o3", &any), Some(("o3".into(), vec![])), "its upstream is disabled");
        assert_eq!(members("o4", &any), None);
        assert_eq!(members("gpt-4o", &key(&["fast"])), None);
        assert!(members("fast", &key(&["fast"])).is_some());
        assert!(members("fast", &key(&["gpt-4o-mini"])).is_some());
        let strategy = |asked: &str| snapshot.resolve(asked, &any, at("2026-02-01")).unwrap().strategy;
        assert_eq!((strategy("fast"), strategy("gpt-4o")), (Strategy::Sticky, Strategy::Weighted));
    }

    #[test]
    fn a_request_costs_what_holds_when_it_begins() {
        let snapshot = snapshot();
        let input = |asked: &str, day: &str| {
            let target = snapshot.resolve(asked, &key(&[]), at(day)).unwrap();
            target.price.map(|price| price.standard.input)
        };
        assert_eq!(
            ["2025-12-31", "2026-02-01", "2026-06-01"].map(|day| input("gpt-4o", day)),
            [None, Some(10), Some(11)]
        );
        assert_eq!(
            input("fast", "2025-12-31"),
            Some(1),
            "the configuration goes before everything, by the proper name"
        );
        assert_eq!(input("gpt-4o-2024-08-06", "2026-02-01"), Some(10), "a snapshot costs what its family costs");
        assert_eq!(input("own", "2026-02-01"), Some(20), "the provider's name for it has a price");
        assert_eq!(input("gpt-x", "2026-02-01"), None);
        let target = snapshot.resolve("gpt-x", &key(&[]), at("2026-02-01")).unwrap();
        assert_eq!(target.cost_nano_usd(&Usage { prompt_tokens: 9, ..Usage::default() }, Tier::Standard), 0);
        assert!(snapshot.resolve("o9", &key(&[]), at("2026-02-01")).is_none(), "a price alone serves nobody");
    }

    #[test]
    fn a_pool_keeps_its_round_robin_between_requests() {
        let snapshot = snapshot();
        let resolve = || snapshot.resolve("gpt-4o", &key(&[]), at("2026-02-01")).unwrap();
        let pick = |pool: &Pool| pool.pick(Strategy::Weighted, None, |_| Fitness::Preferred, |_| 0);
        let picks: Vec<_> = (0..4).filter_map(|_| pick(&resolve().pool)).collect();
        assert_eq!(picks, [0, 1, 0, 1]);
    }

    #[test]
    fn a_key_sees_the_models_that_it_may_use() {
        let names = |models: &[&str]| snapshot().models_for(&key(models)).into_iter().collect::<Vec<_>>();
        assert_eq!(names(&[]), ["fast", "gpt-4o", "gpt-4o-mini", "gpt-5", "own"]);
        assert_eq!(names(&["fast"]), ["fast"]);
        assert_eq!(names(&["gpt-4o*"]), ["fast", "gpt-4o", "gpt-4o-mini"]);
    }
}
