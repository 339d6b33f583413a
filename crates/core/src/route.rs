//! The route table: every endpoint that the data plane answers, in one place.
//!
//! One declarative list decides what is forwarded (allow-list: what is not here is a 404 and never leaves the house),
//! under which label it is counted, and which wire dialect its body and answer are read in. A new endpoint of the API is
//! a new line here.

use http::Method;

/// Wire dialect of an endpoint: where its usage and its text stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// `/v1/chat/completions`: `choices[].delta.content`, `usage.prompt_tokens`, usage in streams only when asked for.
    Chat,
    /// `/v1/completions`: `choices[].text`, otherwise like chat.
    Completions,
    /// `/v1/embeddings`: never streams.
    Embeddings,
    /// `/v1/responses`: typed events, `usage.input_tokens`, usage always in the last event.
    Responses,
}

impl Dialect {
    /// Must usage be asked for in a stream (`stream_options.include_usage`)?
    #[must_use]
    pub fn asks_for_usage(self) -> bool {
        matches!(self, Self::Chat | Self::Completions)
    }

    /// Does the model write anything?
    #[must_use]
    pub fn has_output(self) -> bool {
        self != Self::Embeddings
    }
}

/// What the gateway does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Forward it to an upstream that serves the model named in its body.
    Forward(Dialect),
    /// Answer the list of models that this key may use.
    ListModels,
    /// Answer one model of that list; its name is the rest of the path.
    ShowModel,
    /// Answer that the process is alive; no key needed.
    Health,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Label in metrics and in `request_log.route`.
    pub name: &'static str,
    /// The method it is reached by.
    pub method: Verb,
    /// Its path; one that ends in `/` stands for every non-empty rest.
    pub path: &'static str,
    /// What is done.
    pub action: Action,
}

/// The methods that the table knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// GET
    Get,
    /// POST
    Post,
}

impl Verb {
    fn is(self, method: &Method) -> bool {
        match self {
            Self::Get => method == Method::GET,
            Self::Post => method == Method::POST,
        }
    }

    /// The name as it stands in an `allow` header.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
        }
    }
}

const fn forward(name: &'static str, path: &'static str, dialect: Dialect) -> Route {
    Route { name, method: Verb::Post, path, action: Action::Forward(dialect) }
}

const fn get(name: &'static str, path: &'static str, action: Action) -> Route {
    Route { name, method: Verb::Get, path, action }
}

/// Every route.
pub const ROUTES: &[Route] = &[
    forward("chat_completions", "/v1/chat/completions", Dialect::Chat),
    forward("completions", "/v1/completions", Dialect::Completions),
    forward("embeddings", "/v1/embeddings", Dialect::Embeddings),
    forward("responses", "/v1/responses", Dialect::Responses),
    get("models", "/v1/models", Action::ListModels),
    get("model", "/v1/models/", Action::ShowModel),
    get("health", "/health", Action::Health),
];

/// Result of looking a request up in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// This route.
    Found(&'static Route),
    /// The path exists, but not with this method; `allow` names the one that does.
    WrongMethod(&'static Route),
    /// No such path.
    NotFound,
}

/// Finds the route of `method` and `path` (without query).
#[must_use]
pub fn lookup(method: &Method, path: &str) -> Lookup {
    let mut wrong_method = None;
    for route in ROUTES.iter().filter(|route| fits(route.path, path)) {
        if route.method.is(method) {
            return Lookup::Found(route);
        }
        wrong_method = Some(route);
    }
    wrong_method.map_or(Lookup::NotFound, Lookup::WrongMethod)
}

fn fits(pattern: &str, path: &str) -> bool {
    if pattern.ends_with('/') { path.len() > pattern.len() && path.starts_with(pattern) } else { pattern == path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_found_by_method_and_path() {
        let found = |m: &Method, p: &str| match lookup(m, p) {
            Lookup::Found(route) => Some(route.name),
            _ => None,
        };
        assert_eq!(found(&Method::POST, "/v1/chat/completions"), Some("chat_completions"));
        assert_eq!(found(&Method::GET, "/v1/models"), Some("models"));
        assert_eq!(found(&Method::GET, "/v1/models/gpt-4o"), Some("model"));
        assert_eq!(found(&Method::GET, "/v1/models/org/name"), Some("model"));
        assert_eq!(found(&Method::GET, "/health"), Some("health"));
    }

    #[test]
    fn what_is_not_in_the_table_is_not_found() {
        for path in ["/", "/v1", "/v1/models/", "/v1/chat/completions/", "/v1/organization/users", "/V1/models", ""] {
            assert_eq!(lookup(&Method::GET, path), Lookup::NotFound, "{path}");
        }
        assert!(
            matches!(lookup(&Method::GET, "/v1/embeddings"), Lookup::WrongMethod(r) if r.method.as_str() == "POST")
        );
        assert!(matches!(lookup(&Method::DELETE, "/v1/models/x"), Lookup::WrongMethod(_)));
    }
}
