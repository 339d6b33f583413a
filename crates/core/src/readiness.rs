//! What a gateway says of itself when it is asked whether it is ready: part by part, with a reason in plain words.
//!
//! **Ready is who answers callers.** Whoever asks, a load balancer, takes a gateway that is not ready out of use. So a part that is
//! gone makes it unready only if callers notice, here and not everywhere alike: it drains, its journal refuses requests, it has
//! no upstream that could be asked. A database that is away does not: requests are served all the same, and if it did, all
//! gateways would go out of use at the same moment. That is *degraded*, which is told, and ready.

use serde::Serialize;

/// How a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Not as it should be; callers are answered all the same.
    Degraded,
    /// Callers are not answered as they should be.
    Unavailable,
}

/// One part, and why it is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// How it is.
    pub status: Status,
    /// Why, and what mends it, in plain words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Part {
    /// A part that is as it should be.
    #[must_use]
    pub fn ok() -> Self {
        Self { status: Status::Ok, reason: None }
    }

    /// A part without which callers are answered.
    pub fn degraded(reason: impl Into<String>) -> Self {
        Self { status: Status::Degraded, reason: Some(reason.into()) }
    }

    /// A part without which callers are not.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        Self { status: Status::Unavailable, reason: Some(reason.into()) }
    }
}

/// All parts, by their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness(pub Vec<(&'static str, Part)>);

impl Readiness {
    /// How the whole is: as its worst part.
    #[must_use]
    pub fn status(&self) -> Status {
        self.0.iter().map(|(_, part)| part.status).max().unwrap_or(Status::Ok)
    }

    /// Is it to get requests?
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status() != Status::Unavailable
    }

    /// For machines.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let parts: serde_json::Map<_, _> =
            self.0.iter().map(|(name, part)| ((*name).to_owned(), serde_json::json!(part))).collect();
        serde_json::json!({ "ready": self.is_ready(), "status": self.status(), "parts": parts })
    }

    /// For people: a line for the whole, and one for each part.
    #[must_use]
    pub fn to_text(&self) -> String {
        let whole = match self.status() {
            Status::Ok => "ready",
            Status::Degraded => "ready, but degraded",
            Status::Unavailable => "not ready",
        };
        let line = |(name, part): &(&str, Part)| match &part.reason {
            None => format!("{name}: ok\n"),
            Some(reason) if part.status == Status::Degraded => format!("{name}: degraded: {reason}\n"),
            Some(reason) => format!("{name}: unavailable: {reason}\n"),
        };
        format!("{whole}\n{}", self.0.iter().map(line).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_worst_part_decides() {
        let of = |parts: &[Part]| Readiness(parts.iter().map(|part| ("part", part.clone())).collect());
        let (ok, slow, gone) = (Part::ok(), Part::degraded("slow"), Part::unavailable("gone"));
        for (parts, status, is_ready) in [
            (vec![], Status::Ok, true),
            (vec![ok.clone()], Status::Ok, true),
            (vec![slow.clone(), ok.clone()], Status::Degraded, true),
            (vec![gone.clone(), slow, ok], Status::Unavailable, false),
        ] {
            let readiness = of(&parts);
            assert_eq!((readiness.status(), readiness.is_ready()), (status, is_ready), "{parts:?}");
        }
    }

    #[test]
    fn it_is_told_to_machines_and_to_people() {
        let parts =
            vec![("keys", Part::ok()), ("store", Part::degraded("away")), ("journal", Part::unavailable("full"))];
        let readiness = Readiness(parts);
        assert_eq!(
            readiness.to_json(),
            json!({
                "ready": false,
                "status": "unavailable",
                "parts": {
                    "keys": { "status": "ok" },
                    "store": { "status": "degraded", "reason": "away" },
                    "journal": { "status": "unavailable", "reason": "full" },
                },
            })
        );
        let text = "not ready\nkeys: ok\nstore: degraded: away\njournal: unavailable: full\n";
        assert_eq!(readiness.to_text(), text);
        assert_eq!(Readiness(vec![("keys", Part::ok())]).to_text(), "ready\nkeys: ok\n");
    }
}
