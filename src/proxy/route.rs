//! Which line of the route table a request belongs to.

use pingora_proxy::Session;
use tollgate_core::{
    denial::Denial,
    route::{Lookup, Route, lookup},
};

/// Finds the route, or says why there is none.
///
/// # Errors
/// [`Denial::UnknownUrl`] or [`Denial::MethodNotAllowed`].
pub fn find(session: &Session) -> Result<&'static Route, Denial> {
    let request = session.req_header();
    let (method, path) = (&request.method, request.uri.path());
    match lookup(method, path) {
        Lookup::Found(route) => Ok(route),
        Lookup::WrongMethod(route) => {
            Err(Denial::MethodNotAllowed { method: method.to_string(), allow: route.method.as_str() })
        }
        Lookup::NotFound => {
            Err(Denial::UnknownUrl { method: method.to_string(), path: path.chars().take(256).collect() })
        }
    }
}
