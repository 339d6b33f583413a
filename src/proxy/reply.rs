//! Answers that the gateway gives itself: denials, health, the model list.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
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

/// Answers with a denial, and says what is left of the limits that bind the request.
///
/// # Errors
/// If the client is gone.
pub async fn deny(session: &mut Session, request_id: Uuid, standing: &Standing, denial: &Denial) -> Result<()> {
    let body = Bytes::from(denial.body());
    let mut header = header_of(denial.status(), body.len(), request_id, standing)?;
    if let Some(ms) = denial.retry_after_ms() {
        show_wait(&mut header, ms)?;
    }
    if denial.is_final() {
        header.insert_header("x-should-retry", "false")?;
    }
    if let Denial::MethodNotAllowed { allow, .. } = denial {
        header.insert_header(header::ALLOW, *allow)?;
    }
    if denial.status() == 401 {
        header.insert_header(header::WWW_AUTHENTICATE, "Bearer")?;
    }
    send(session, header, body).await
}

/// Answers with an error that an upstream gave. `wait_ms`: when asking again may help.
///
/// # Errors
/// If the client is gone.
pub async fn upstream_error(
    session: &mut Session,
    request_id: Uuid,
    standing: &Standing,
    failed: &Failed,
    wait_ms: Option<u64>,
) -> Result<()> {
    let mut header = header_of(failed.status, failed.body.len(), request_id, standing)?;
    if let Some(ms) = wait_ms {
        show_wait(&mut header, ms)?;
    }
    send(session, header, failed.body.clone()).await
}

fn show_wait(header: &mut ResponseHeader, ms: u64) -> Result<()> {
    header.insert_header(header::RETRY_AFTER, ms.div_ceil(1000))?;
    header.insert_header("retry-after-ms", ms)
}

/// Answers 200 with a JSON body.
///
/// # Errors
/// If the client is gone.
pub async fn json(session: &mut Session, request_id: Uuid, body: Bytes) -> Result<()> {
    let header = header_of(200, body.len(), request_id, &Standing::default())?;
    send(session, header, body).await
}

/// Adds the gateway's id of the request, and what is left of the limits that bind it.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn sign(header: &mut ResponseHeader, request_id: Uuid, standing: &Standing) -> Result<()> {
    let mut id = Uuid::encode_buffer();
    let id = HeaderValue::from_str(request_id.hyphenated().encode_lower(&mut id));
    header.insert_header(&REQUEST_ID, id.or_err(ErrorType::InternalError, "a UUID is no header value")?)?;
    standing.headers().try_for_each(|(name, value)| header.insert_header(name, value))
}

fn header_of(status: u16, length: usize, request_id: Uuid, standing: &Standing) -> Result<ResponseHeader> {
    let mut header = ResponseHeader::build_no_case(status, Some(6))?;
    header.insert_header(header::CONTENT_TYPE, "application/json")?;
    header.insert_header(header::CONTENT_LENGTH, length)?;
    sign(&mut header, request_id, standing)?;
    Ok(header)
}

async fn send(session: &mut Session, header: ResponseHeader, body: Bytes) -> Result<()> {
    let head_only = session.req_header().method == http::Method::HEAD;
    session.write_response_header(Box::new(header), head_only).await?;
    if !head_only {
        session.write_response_body(Some(body), true).await?;
    }
    Ok(())
}
