//! What only Redis has: several replicas, their sessions, requests that go together.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use proptest::prelude::*;
use tollgate::limiter::{
    redis::{Asked, Reserved},
    redis_wire::{Change, Known, key_of},
};
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{
        Amount, Caps, MAX_LIMIT, Month, Subject,
        standing::Standing,
        state::{Demand, Kind, Need},
    },
};

use super::place::{
    End, Held, LEASE_MS, NOW, Place, Process, Replica, amount, any_caps, at_once, for_each_input, month, quota, roomy,
    rpm, someone,
};
use crate::support::redis::{Cluster, Redis as Server};

/// Two replicas at one Redis, with one clock and one database.
fn two(server: &Server) -> (Replica, Replica) {
    let one = Replica::new(server, b'a');
    let other = Replica::beside(server, b'b', &one.time, &one.books);
    (one, other)
}

#[test]
fn replicas_hold_one_limit_together() {
    let server = Server::start();
    let (one, other) = two(&server);
    let inputs = (any_caps(), prop::collection::vec((any::<bool>(), 0_u64..3000, 0_u64..300), 1..100));
    for_each_input(24, &inputs, |(caps, steps)| {
        let (shared, alone) = (someone(*caps), someone(*caps));
        one.set(NOW);
        for &(at_other, wait, want) in steps {
            one.pass(wait.min(LEASE_MS / 100));
            let replica = if at_other { &other } else { &one };
            let ask = |replica: &Replica, demand| replica.admit(std::slice::from_ref(demand), amount(want).into());
            let (by_two, by_one) = (ask(replica, &shared), ask(&one, &alone));
            prop_assert_eq!((by_two.0.err(), by_two.1), (by_one.0.err(), by_one.1));
        }
        Ok(())
    });
}

#[test]
fn what_a_silent_replica_holds_is_free_after_its_lease() {
    let server = Server::start();
    let (dies, lives) = two(&server);
    let someone = someone(Caps { concurrency: 2, ..quota(100) });
    let _lost = (dies.one(&someone, 40).unwrap(), dies.one(&someone, 40).unwrap());
    assert_eq!(lives.one(&someone, 0).err().unwrap().kind, Kind::Concurrency);
    dies.pass(LEASE_MS - 1000);
    assert!(lives.one(&someone, 0).is_err(), "it may come back");
    dies.pass(1000);
    assert!(lives.one(&someone, 60).is_ok() && lives.one(&someone, 40).is_ok(), "places and quota are free");
}

#[test]
fn what_a_living_replica_holds_is_renewed() {
    let server = Server::start();
    let (streams, other) = two(&server);
    let someone = someone(at_once(1));
    let held = streams.one(&someone, 0).unwrap();
    for _ in 0..20 {
        streams.pass(LEASE_MS / 2);
        streams.sync(&someone.subject);
        assert!(other.one(&someone, 0).is_err());
    }
    streams.settle(held, Amount::default());
    assert!(other.one(&someone, 0).is_ok());
}

#[test]
fn a_new_session_brings_its_sums_along() {
    let server = Server::start();
    let (one, other) = two(&server);
    let someone = someone(Caps { concurrency: 3, ..quota(100) });
    let early = [one.one(&someone, 30).unwrap(), one.one(&someone, 30).unwrap()];
    let () = server.command(&["FLUSHALL"]);
    one.reconnect();
    let late = one.one(&someone, 30).expect("the third");
    assert!(one.one(&someone, 0).is_err() && other.one(&someone, 0).is_err(), "two are known of before");
    for held in early {
        let used = one.settle(held, amount(10));
        one.book(used);
    }
    one.undo(late);
    assert_eq!(other.one(&someone, 81).err().unwrap().kind, Kind::MonthlyTokens, "twice ten are booked");
    let all = [other.one(&someone, 80).unwrap(), other.one(&someone, 0).unwrap(), one.one(&someone, 0).unwrap()];
    assert!(one.one(&someone, 0).is_err(), "three again");
    drop(all);
}

#[test]
fn a_new_session_shows_its_sums_without_a_request() {
    let server = Server::start();
    let (one, other) = two(&server);
    let someone = someone(at_once(2));
    let held = [one.one(&someone, 0).unwrap(), one.one(&someone, 0).unwrap()];
    one.reconnect();
    let [first, _second] = held;
    one.settle(first, Amount::default());
    one.sync(&someone.subject);
    assert!(other.one(&someone, 0).is_ok(), "one has ended");
    assert!(other.one(&someone, 0).is_err(), "the other one has not");
}

#[test]
fn a_redis_that_forgot_is_told_from_a_subject_that_is_new() {
    let server = Server::start();
    let replica = Replica::new(&server, b'a');
    let demands = [Demand { subject: Subject::of_ip([192, 0, 2, 1].into()), caps: rpm(9) }, someone(rpm(9))];
    let forgot = |demands: &[Demand]| {
        let known = || demands.iter().map(|demand| replica.known(demand)).collect();
        let all = Arc::from(demands);
        let asked = replica.redis.admit(Asked::alone(&all, Need::default(), month(NOW)), NOW, known);
        let verdict = replica.runtime.block_on(asked).unwrap();
        replica.memory.record(demands, Amount::default(), NOW);
        verdict.has_forgotten
    };
    assert!(!forgot(&demands[..1]), "new");
    assert!(!forgot(&demands), "one is known, the other one is new");
    assert!(!forgot(&demands), "both are known");
    let () = server.command(&["FLUSHALL"]);
    assert!(forgot(&demands));
    assert!(!forgot(&demands));
}

#[test]
fn a_redis_that_forgot_is_told_what_is_booked() {
    let server = Server::start();
    let (one, other) = two(&server);
    let someone = someone(quota(100));
    let used = one.settle(one.one(&someone, 60).unwrap(), amount(60));
    one.book(used);
    let () = server.command(&["FLUSHALL"]);
    assert!(other.one(&someone, 41).is_err(), "the database knows of 60");
    assert!(other.one(&someone, 40).is_ok());
}

#[test]
fn a_replica_whose_clock_is_ahead_gives_no_quota_anew() {
    let server = Server::start();
    let one = Replica::new(&server, b'a');
    let midnight = u64::try_from(month(NOW).next().start().timestamp_millis()).unwrap();
    one.set(midnight - 60_000);
    let someone = someone(quota(100));
    let used = one.settle(one.one(&someone, 100).unwrap(), amount(100));
    one.book(used);
    let alone = Arc::from([someone.clone()]);
    let ask = |month: Month| {
        let known = || vec![Known { booked: one.books.of(month, &someone.subject), ..Known::default() }];
        let asked = one.redis.admit(Asked::alone(&alone, amount(1).into(), month), one.now(), known);
        one.runtime.block_on(asked).unwrap().decision
    };
    assert!(ask(month(midnight)).is_err(), "Redis is still in the old month");
    one.set(midnight + 60_000);
    assert!(ask(month(midnight - 1)).is_err(), "the replica is still in the old month");
    assert!(ask(month(midnight)).is_ok());
}

#[test]
fn a_redis_whose_clock_is_behind_holds_the_quota_of_the_new_month() {
    let server = Server::start();
    let one = Replica::new(&server, b'a');
    let next = month(NOW).next();
    let alone = Arc::from([someone(quota(100))]);
    let ask = |booked: u64| {
        let known = || vec![Known { booked: amount(booked), ..Known::default() }];
        let asked = one.redis.admit(Asked::alone(&alone, amount(10).into(), next), one.now(), known);
        one.runtime.block_on(asked).unwrap().decision
    };
    assert!(ask(0).is_ok());
    assert_eq!(ask(95).unwrap_err().kind, Kind::MonthlyTokens, "95 are booked in the month the replica is in");
}

/// Requests and tokens.
fn remaining(standing: &Standing) -> [Option<u64>; 2] {
    [standing.requests, standing.tokens].map(|left| left.map(|left| left.remaining))
}

/// Whoever asks together is decided upon as if one had asked after the other.
#[test]
fn requests_that_go_together_are_decided_one_by_one() {
    let server = Server::start();
    for_each_input(24, &(any_caps(), any_caps(), prop::collection::vec((0_u64..40, any::<bool>()), 2..150)), |input| {
        let (first, second, wants) = input;
        let () = server.command(&["FLUSHALL"]);
        let (replica, process) = (Replica::new(&server, b'a'), Process::new());
        let demands = [
            Demand { subject: Subject::User(UserId(1)), caps: *first },
            Demand { subject: Subject::Key(UserId(1), KeyId(1)), caps: *second },
        ];
        let of = |both: bool| if both { &demands[..] } else { &demands[..1] };
        let alone: Vec<_> = wants.iter().map(|(want, both)| process.admit(of(*both), amount(*want).into())).collect();
        let together = futures::future::join_all(wants.iter().map(|(want, both)| {
            let known = || of(*both).iter().map(|demand| replica.known(demand)).collect();
            let all = Arc::from(of(*both));
            let redis = &replica.redis;
            async move {
                redis
                    .admit(Asked::alone(&all, amount(*want).into(), month(NOW)), NOW, known)
                    .await
                    .expect("Redis answers")
            }
        }));
        let together = replica.runtime.block_on(together);
        for ((decision, standing), verdict) in alone.iter().zip(together) {
            prop_assert_eq!(decision.as_ref().err(), verdict.decision.as_ref().err());
            prop_assert_eq!(remaining(standing), remaining(&verdict.standing));
        }
        Ok(())
    });
}

/// On a cluster each caller has a call of its own, and what others give back at the same time is about nobody else.
#[test]
fn on_a_cluster_callers_that_go_together_are_decided_one_by_one() {
    static USERS: AtomicI64 = AtomicI64::new(1);
    let cluster = Cluster::start();
    let replica = Replica::at(cluster.urls(), b'a', &Arc::new(AtomicU64::new(NOW)), &Arc::default());
    // Which of two users, which of two keys, how many tokens, and does an earlier request end before?
    let request = (0_usize..2, 0_usize..2, 0_u64..300, any::<bool>());
    let rounds = prop::collection::vec(prop::collection::vec(request, 1..8), 5..40);
    for_each_input(24, &(prop::array::uniform3(roomy()), rounds), |(caps, rounds)| {
        let first = USERS.fetch_add(2, Ordering::Relaxed);
        let process = Process::new();
        let mut open = VecDeque::new();
        for round in rounds {
            replica.pass(5);
            process.set(replica.now());
            let demands = |user: usize, key: usize| {
                let (caps_of_key, user, key) = (caps[1 + key], UserId(first + user as i64), KeyId(key as i64));
                [
                    Demand { subject: Subject::User(user), caps: caps[0] },
                    Demand { subject: Subject::Key(user, key), caps: caps_of_key },
                ]
            };
            let (mut alone, mut together) = (Vec::new(), Vec::new());
            for &(user, key, tokens, ends) in round {
                let demands = demands(user, key);
                let (of_process, of_replica) = if ends { open.pop_front() } else { None }.unzip();
                of_process.map(|held| process.settle(held, Amount { tokens: tokens / 2, nano_usd: 2 * (tokens / 2) }));
                alone.push(process.admit(&demands, amount(tokens).into()));
                let replica = &replica;
                together.push(async move {
                    if let Some(held) = of_replica {
                        replica.finish(held, End::Settle, tokens / 2);
                    }
                    let known = || demands.iter().map(|demand| replica.known(demand)).collect();
                    let all = Arc::from(demands.clone());
                    let asked = Asked::alone(&all, amount(tokens).into(), month(NOW));
                    replica.redis.admit(asked, replica.now(), known).await.expect("Redis answers")
                });
            }
            let together = replica.runtime.block_on(futures::future::join_all(together));
            for ((decision, standing), verdict) in alone.into_iter().zip(together) {
                prop_assert_eq!(decision.as_ref().err(), verdict.decision.as_ref().err());
                prop_assert_eq!(remaining(&standing), remaining(&verdict.standing));
                if let (Ok(held), Ok(counted)) = (decision, verdict.decision) {
                    let demands = held.demands.clone();
                    let taken = replica.memory.record(&demands, held.taken.need, replica.now());
                    let reserved = Reserved { session: Some(counted.session), cells: Some(counted.cells) };
                    open.push_back((held, Held { demands, taken, reserved }));
                }
            }
        }
        Ok(())
    });
}

/// An address and a user are on different nodes, mostly: what only one of them admits leaves no trace there.
#[test]
fn on_a_cluster_what_one_node_refuses_is_undone_at_the_other() {
    let cluster = Cluster::start();
    let replica = Replica::at(cluster.urls(), b'a', &Arc::new(AtomicU64::new(NOW)), &Arc::default());
    let tight = rpm(1);
    for ample in [rpm(5), at_once(5), quota(500), Caps { tpm: 500, ..Caps::default() }] {
        for number in 0..8_u8 {
            for (ip, user) in [(ample, tight), (tight, ample)] {
                replica.pass(120_000);
                let ip = Demand { subject: Subject::of_ip([10, 0, 0, number].into()), caps: ip };
                let user = Demand { subject: Subject::User(UserId(number.into())), caps: user };
                let roomy = if ip.caps == ample { ip.clone() } else { user.clone() };
                let one = |demands: &[Demand]| replica.admit(demands, amount(100).into()).0.ok();
                let mut held: Vec<_> = one(&[ip.clone(), user.clone()]).into_iter().collect();
                assert!((0..10).all(|_| one(&[ip.clone(), user.clone()]).is_none()));
                held.extend((0..10).filter_map(|_| one(std::slice::from_ref(&roomy))));
                assert_eq!(held.len(), 5, "{roomy:?}");
                held.into_iter().for_each(|held| replica.undo(held));
            }
        }
    }
}

/// Those that are bound by the same limits may be decided on together, but they get neither more nor less for it.
#[test]
fn requests_that_may_join_are_decided_on_as_if_they_came_one_after_the_other() {
    let server = Server::start();
    let wants = prop::collection::vec((0_u64..40, 0_u64..40), 2..250);
    for_each_input(24, &(any_caps(), any_caps(), wants, any::<bool>()), |(first, second, wants, is_ample)| {
        let () = server.command(&["FLUSHALL"]);
        let (replica, process) = (Replica::new(&server, b'a'), Process::new());
        let ample = |caps: &Caps| Caps {
            rpm: 1_000,
            tpm: 100_000,
            concurrency: 1_000,
            monthly_tokens: caps.monthly_tokens.min(1) * MAX_LIMIT,
            monthly_nano_usd: caps.monthly_nano_usd.min(1) * MAX_LIMIT,
        };
        let caps = |caps: &Caps| if *is_ample { ample(caps) } else { *caps };
        let demands: Arc<[Demand]> = Arc::from([
            Demand { subject: Subject::User(UserId(1)), caps: caps(first) },
            Demand { subject: Subject::Key(UserId(1), KeyId(1)), caps: caps(second) },
        ]);
        let needs = wants.iter().map(|(want, least)| Need {
            amount: amount(*want),
            least: amount(*want.min(least)),
            prompt_tokens: 0,
        });
        let alone = needs.clone().filter(|need| process.admit(&demands, *need).0.is_ok()).count();
        let () = server.command(&["CONFIG", "RESETSTAT"]);
        let together = futures::future::join_all(needs.map(|need| {
            let known = || demands.iter().map(|demand| replica.known(demand)).collect();
            let (redis, asked) = (&replica.redis, Asked::alone(&demands, need, month(NOW)));
            async move { redis.admit(Asked { may_join: true, ..asked }, NOW, known).await.expect("Redis answers") }
        }));
        let together = replica.runtime.block_on(together);
        let admitted = together.iter().filter(|verdict| verdict.decision.is_ok()).count();
        prop_assert_eq!(alone, admitted);
        if admitted == together.len() {
            let stats: String = server.command(&["INFO", "commandstats"]);
            prop_assert!(stats.contains("cmdstat_evalsha:calls=1,"), "one call for all of them: {}", stats);
        }
        // What either of them counted is the same too.
        let probe = [demands[0].clone()];
        let left = |place: &dyn Place| {
            let (_, Standing { requests, tokens }) = place.admit(&probe, amount(0).into());
            [requests, tokens].map(|left| left.map(|left| left.remaining))
        };
        prop_assert_eq!(left(&process), left(&replica));
        Ok(())
    });
}

#[test]
fn what_is_given_back_between_two_requests_is_free_for_the_second() {
    let server = Server::start();
    let replica = Replica::new(&server, b'a');
    let one = someone(at_once(1));
    let demands: Arc<[Demand]> = Arc::from([one.clone()]);
    let mut held = replica.one(&one, 0).unwrap();
    for _ in 0..50 {
        // Not flushed: it rides along with the next request.
        replica.redis.change(held.reserved, || {
            replica.memory.settle(&held.demands, held.taken, Amount::default(), NOW);
            vec![Change { ended: 1, ..Change::of(one.subject.clone()) }]
        });
        let asked =
            replica.redis.admit(Asked::alone(&demands, Need::default(), month(NOW)), NOW, || vec![replica.known(&one)]);
        let counted = replica.runtime.block_on(asked).unwrap().decision.expect("the place is free again");
        held = Held {
            demands: demands.to_vec(),
            taken: replica.memory.record(&demands, Amount::default(), NOW),
            reserved: Reserved { session: Some(counted.session), cells: Some(counted.cells) },
        };
        assert!(replica.one(&one, 0).is_err(), "and taken");
    }
}

#[test]
fn a_state_stays_below_two_kilobytes() {
    let server = Server::start();
    let first = Replica::new(&server, 0);
    let someone = someone(Caps { rpm: 1000, tpm: MAX_LIMIT, concurrency: 1000, ..quota(MAX_LIMIT) });
    let ask = |replica: &Replica| assert!(replica.one(&someone, 1_000_000).is_ok());
    for name in 0..60 {
        ask(&Replica::beside(&server, name, &first.time, &first.books));
        first.pass(400);
    }
    for _ in 0..70 {
        ask(&first);
        first.pass(1000);
    }
    let size: usize = server.command(&["STRLEN", &key_of(&someone.subject)]);
    assert!(size <= 2048, "{size}");
}

/// A connection of a thread that serves requests breaks while a request is on its way: nobody knows whether Redis counted it.
#[test]
fn a_request_whose_connection_breaks_asks_again_and_leaves_nothing_behind() {
    let server = Server::start();
    let replica = Replica::new(&server, b'a');
    let one = someone(at_once(4));
    let clients = || -> Vec<String> {
        let list: String = server.command(&["CLIENT", "LIST"]);
        list.lines().filter(|line| !line.contains("cmd=client")).map(str::to_owned).collect()
    };
    let mut first = replica.one(&one, 0).unwrap();
    // The connection of this thread is made while the first go over another.
    while clients().iter().filter(|line| line.contains("cmd=evalsha")).count() < 2 {
        replica.settle(first, Amount::default());
        replica.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
        first = replica.one(&one, 0).unwrap();
    }
    let () = server.command(&["CLIENT", "PAUSE", "20000", "WRITE"]);
    let second = std::thread::scope(|scope| {
        scope.spawn(|| {
            let waits = |line: &String| line.contains("cmd=evalsha") && line.contains("flags=b");
            let waiting = loop {
                if let Some(waiting) = clients().into_iter().find(waits) {
                    break waiting;
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            let id = waiting.split_whitespace().find_map(|word| word.strip_prefix("id=")).unwrap();
            let () = server.command(&["CLIENT", "KILL", "ID", id]);
            let () = server.command(&["CLIENT", "UNPAUSE"]);
        });
        replica.one(&one, 0).expect("it asks again over another connection")
    });
    let more: Vec<_> = (0..3).filter_map(|_| replica.one(&one, 0).ok()).collect();
    assert_eq!(more.len(), 2, "four at once");
    more.into_iter().chain([first, second]).for_each(|held| drop(replica.settle(held, Amount::default())));
    let again: Vec<_> = (0..5).filter_map(|_| replica.one(&one, 0).ok()).collect();
    assert_eq!(again.len(), 4, "all of them are free again");
}

/// A limit of requests at once that comes while requests are under way counts those that come after it.
#[test]
fn a_limit_that_comes_later_is_neither_exceeded_nor_blocked_by_what_was_there() {
    let server = Server::start();
    let (one, other) = two(&server);
    let free = someone(rpm(100_000));
    let bound = Demand { caps: Caps { concurrency: 10, ..free.caps }, ..free.clone() };
    let before: Vec<_> = (0..20).map(|_| one.one(&free, 0).unwrap()).collect();
    one.sync(&free.subject);
    let held: Vec<_> = (0..6).map(|_| one.one(&bound, 0).unwrap()).collect();
    before.into_iter().for_each(|held| drop(one.settle(held, Amount::default())));
    one.sync(&bound.subject);
    let more: Vec<_> = (0..10).filter_map(|_| other.one(&bound, 0).ok()).collect();
    assert_eq!(more.len(), 4, "six of ten are taken");
    held.into_iter().for_each(|held| drop(one.settle(held, Amount::default())));
    let more: Vec<_> = (0..10).filter_map(|_| other.one(&bound, 0).ok()).collect();
    assert_eq!(more.len(), 6, "and free again");
}
