//! Answers that the gateway gives itself: denials, health, the model list.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use pingora::http::ResponseHeader;
use pingora_core::{ErrorType, OrErr, Result};
use pingora_proxy::Session;
use tollgate_core::{denial::Denial, limit::standing::Standing};
use uuid::Uuid;

use super::attempt::Failed;

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Status of the answer that the client has been given, or is being given. `100 Continue` is none, although Pingora counts
/// it as a header that was written.
#[must_use]
pub fn answered(session: &Session) -> Option<u16> {
    session.response_written().map(|answer| answer.status).filter(|status| !status.is_informational()).map(u16::from)
}

/// An answer that is whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its header.
    pub header: ResponseHeader,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    fn try_new(status: u16, headers: HeaderMap, body: Bytes) -> Result<Self> {
        let status = StatusCode::from_u16(status).or_err(ErrorType::InternalError, "no status")?;
        Ok(Self { header: header_of(status, headers), body })
    }

    /// Gives it to the client.
    ///
    /// # Errors
    /// If the client is gone.
    pub async fn send(self, session: &mut Session) -> Result<()> {
        let head_only = session.req_header().method == http::Method::HEAD;
        session.write_response_header(Box::new(self.header), head_only).await?;
        if !head_only {
            session.write_response_body(Some(self.body), true).await?;
        }
        Ok(())
    }
}

/// A denial, and what is left of the limits that bind the request.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn denial(request_id: Uuid, standing: &Standing, denial: &Denial) -> Result<Answer> {
    let body = Bytes::from(denial.body());
    let mut headers = headers_of(&body, request_id, standing)?;
    if let Some(ms) = denial.retry_after_ms() {
        show_wait(&mut headers, ms);
    }
    if denial.is_final() {
        headers.insert("x-should-retry", HeaderValue::from_static("false"));
    }
    if let Denial::MethodNotAllowed { allow, .. } = denial {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if denial.status() == 401 {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    Answer::try_new(denial.status(), headers, body)
}

/// An error that an upstream gave. `wait_ms`: when asking again may help.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn upstream_error(request_id: Uuid, standing: &Standing, failed: &Failed, wait_ms: Option<u64>) -> Result<Answer> {
    let mut headers = headers_of(&failed.body, request_id, standing)?;
    if let Some(ms) = wait_ms {
        show_wait(&mut headers, ms);
    }
    Answer::try_new(failed.status, headers, failed.body.clone())
}

fn show_wait(headers: &mut HeaderMap, ms: u64) {
    headers.insert(header::RETRY_AFTER, ms.div_ceil(1000).into());
    headers.insert("retry-after-ms", ms.into());
}

/// Answers 200 with a JSON body.
///
/// # Errors
/// If the client is gone.
pub async fn json(session: &mut Session, request_id: Uuid, body: Bytes) -> Result<()> {
    let headers = headers_of(&body, request_id, &Standing::default())?;
    Answer::try_new(200, headers, body)?.send(session).await
}

/// Adds the gateway's id of the request, and what is left of the limits that bind it.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn sign(headers: &mut HeaderMap, request_id: Uuid, standing: &Standing) -> Result<()> {
    headers.insert(&REQUEST_ID, id_value(request_id)?);
    for (name, value) in standing.headers() {
        headers.insert(name, value);
    }
    Ok(())
}

/// A request id as the value of a header.
///
/// # Errors
/// If it is none: a defect.
pub fn id_value(request_id: Uuid) -> Result<HeaderValue> {
    let mut id = Uuid::encode_buffer();
    let value = HeaderValue::from_str(request_id.hyphenated().encode_lower(&mut id));
    value.or_err(ErrorType::InternalError, "a UUID is no header value")
}

/// A header to be sent, made of the map as it is: Pingora's own setters keep the case of names, which costs a copy and a parse
/// of each.
#[must_use]
pub fn header_of(status: StatusCode, headers: HeaderMap) -> ResponseHeader {
    let (mut parts, ()) = http::Response::new(()).into_parts();
    (parts.status, parts.headers) = (status, headers);
    parts.into()
}

fn headers_of(body: &Bytes, request_id: Uuid, standing: &Standing) -> Result<HeaderMap> {
    let mut headers = HeaderMap::with_capacity(12);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_LENGTH, body.len().into());
    sign(&mut headers, request_id, standing)?;
    Ok(headers)
}
