//! Asking a provider which models it lists: a real request with the upstream's own address and credential, made with
//! Pingora's connector, so that it meets the same resolver, certificates and proxies as the data plane.
//!
//! What the answer says besides, of the account and its limits, is what `upstream test` shows. A provider that lists models may
//! still refuse to work (OpenAI lists them to accounts without quota), so "ok" means that the credential is accepted.

use std::{
    io,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use pingora::http::RequestHeader;
use pingora_core::{
    Error, ErrorType, connectors::http::Connector, protocols::http::client::HttpSession, upstreams::peer::HttpPeer,
};
use serde::Deserialize;
use tollgate_core::{
    allowance::Report,
    azure,
    breaker::Outcome,
    openai,
    upstream::{Handling, Timeouts, Upstream, UpstreamKind},
    verdict::{ErrorBody, trouble},
};
use zeroize::Zeroizing;

use crate::peers::Peer;

/// How long the whole exchange may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of an answer is read. A list of a thousand models has some 150 KB.
const MAX_ANSWER: usize = 4 * 1024 * 1024;
/// How much of an answer that is no list is shown.
const SHOWN: usize = 300;

/// Why the models could not be had. The text names the likely mend.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// Its settings cannot be used.
    #[error("{0:#}")]
    Settings(anyhow::Error),
    /// The name could not be resolved.
    #[error("the name {host} cannot be resolved: {source}; check base_url and the name server")]
    Resolve {
        /// The host of the base URL.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// No connection came about.
    #[error("no connection to {authority}: {reason}")]
    Connect {
        /// Host and port of the base URL.
        authority: String,
        /// Why, and what to look at.
        reason: String,
    },
    /// The exchange broke off.
    #[error("the connection to {authority} broke: {source}")]
    Exchange {
        /// Host and port of the base URL.
        authority: String,
        /// Why.
        source: Box<Error>,
    },
    /// It took too long.
    #[error("no answer within {} seconds: check base_url (http or https?) and the firewall", PATIENCE.as_secs())]
    Slow,
    /// It answered something else than a list.
    #[error("{path} answered {status}: {mend}{text}")]
    Refused {
        /// What was asked for.
        path: String,
        /// What it answered.
        status: StatusCode,
        /// The likely mend.
        mend: &'static str,
        /// The beginning of its answer.
        text: String,
    },
}

#[derive(Deserialize)]
struct List {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

/// How an account stands, as far as an answer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The credential is accepted.
    Ok,
    /// The credential is not accepted: 401 or 403.
    Refused,
    /// The quota is used up.
    Exhausted,
    /// It is at its rate limit: 429.
    RateLimited,
}

impl Standing {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Exhausted => "exhausted",
            Self::RateLimited => "rate_limited",
        }
    }

    /// What a status and the body of an answer say; nothing, if they are about something else.
    fn of(status: StatusCode, body: &[u8]) -> Option<Self> {
        match trouble(status.as_u16(), &ErrorBody::parse(body), None).outcome {
            _ if status == StatusCode::OK => models(status, body).map(|_| Self::Ok),
            Outcome::Refused => Some(Self::Refused),
            Outcome::Exhausted => Some(Self::Exhausted),
            Outcome::Limited { .. } => Some(Self::RateLimited),
            _ => None,
        }
    }
}

/// All that one question brings to light.
#[derive(Debug)]
pub struct Examined {
    /// The models that it lists, or why it does not.
    pub models: Result<Vec<String>, ProviderError>,
    /// From the look-up of its name to the last byte of its answer.
    pub latency: Duration,
    /// How the account stands; `None`: nobody said.
    pub account: Option<Standing>,
    /// What it says of the account's limits.
    pub limits: Report,
}

struct Answer {
    path: String,
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
    took: Duration,
}

/// The models that `upstream` lists, in their order.
///
/// # Errors
/// Says what is wrong with the address, the connection, or the credential.
pub async fn list_models(upstream: &Upstream) -> Result<Vec<String>, ProviderError> {
    let answer = ask(upstream).await?;
    models(answer.status, &answer.body).ok_or_else(|| refused(upstream, &answer))
}

/// Asks `upstream` for its models and looks at everything that its answer says.
pub async fn examine(upstream: &Upstream) -> Examined {
    let began = Instant::now();
    match ask(upstream).await {
        Err(error) => {
            let latency = began.elapsed();
            Examined { models: Err(error), latency, account: None, limits: Report::default() }
        }
        Ok(answer) => Examined {
            models: models(answer.status, &answer.body).ok_or_else(|| refused(upstream, &answer)),
            latency: answer.took,
            account: Standing::of(answer.status, &answer.body),
            limits: Report::parse(&answer.headers),
        },
    }
}

async fn ask(upstream: &Upstream) -> Result<Answer, ProviderError> {
    tokio::time::timeout(PATIENCE, exchange(upstream)).await.map_err(|_| ProviderError::Slow)?
}

async fn exchange(upstream: &Upstream) -> Result<Answer, ProviderError> {
    let authority = &upstream.base_url.authority;
    let timeouts = Timeouts { connect: PATIENCE, first_byte: PATIENCE, chunk: PATIENCE, total: None };
    let hasty = Upstream { handling: Handling { timeouts, ..upstream.handling }, ..upstream.clone() };
    let peer = Peer::try_new(&hasty).map_err(ProviderError::Settings)?;
    // It reads the system's certificates, which is no time of the provider's.
    let connector = Connector::new(None);
    let began = Instant::now();
    let address = peer.connect_to(None).await;
    let address = address.map_err(|source| ProviderError::Resolve { host: upstream.base_url.host.clone(), source })?;
    let path = path(upstream);
    let mut session = connect(&connector, &address, authority).await?;
    let broke = |source| ProviderError::Exchange { authority: authority.clone(), source };
    session.write_request_header(Box::new(request(upstream, &path).map_err(broke)?)).await.map_err(broke)?;
    session.finish_request_body().await.map_err(broke)?;
    session.read_response_header().await.map_err(broke)?;
    let head = session.response_header().map(|head| (head.status, head.headers.clone()));
    let (status, headers) = head.unwrap_or_default();
    let body = read_body(&mut session).await.map_err(broke)?;
    session.shutdown().await;
    Ok(Answer { path, status, headers, body, took: began.elapsed() })
}

async fn connect(connector: &Connector<()>, peer: &HttpPeer, authority: &str) -> Result<HttpSession, ProviderError> {
    let session = connector.get_http_session(peer).await;
    session.map(|(session, _)| session).map_err(|error| {
        let mend = match error.etype() {
            ErrorType::InvalidCert => {
                "its certificate is not trusted: check base_url, or give its authority as ca_file"
            }
            ErrorType::TLSHandshakeFailure | ErrorType::TLSHandshakeTimedout => {
                "TLS failed: does base_url begin with http:// rightly?"
            }
            ErrorType::ConnectRefused => "nothing listens there: check host and port of base_url",
            _ => "check base_url and the firewall",
        };
        ProviderError::Connect { authority: authority.to_owned(), reason: format!("{error}; {mend}") }
    })
}

fn path(upstream: &Upstream) -> String {
    let base = &upstream.base_url.path;
    match upstream.kind {
        UpstreamKind::OpenAi => openai::path(base, "/v1/models"),
        UpstreamKind::Azure => azure::path(base, "/v1/models", "", upstream.api_version.as_deref()),
    }
}

fn request(upstream: &Upstream, path: &str) -> Result<RequestHeader, Box<Error>> {
    let mut request = RequestHeader::build(Method::GET, path.as_bytes(), Some(5))?;
    request.insert_header(header::HOST, upstream.base_url.authority.as_str())?;
    request.insert_header(header::ACCEPT, "application/json")?;
    request.insert_header(header::ACCEPT_ENCODING, "identity")?;
    let (name, before) = azure::auth_header(upstream.kind);
    let text = Zeroizing::new(format!("{before}{}", upstream.credential.expose()));
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| Error::explain(ErrorType::InternalError, "the credential cannot be sent in a header"))?;
    value.set_sensitive(true);
    request.insert_header(name, value)?;
    Ok(request)
}

async fn read_body(session: &mut HttpSession) -> Result<Vec<u8>, Box<Error>> {
    let mut body = Vec::new();
    while let Some(piece) = session.read_response_body().await? {
        body.extend_from_slice(&piece);
        if body.len() > MAX_ANSWER {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "the answer is too long to be a list of models");
        }
    }
    Ok(body)
}

fn models(status: StatusCode, body: &[u8]) -> Option<Vec<String>> {
    let list: List = serde_json::from_slice(body).ok().filter(|_| status == StatusCode::OK)?;
    Some(list.data.into_iter().map(|model| model.id).collect())
}

fn refused(upstream: &Upstream, answer: &Answer) -> ProviderError {
    let (status, body) = (answer.status, &answer.body);
    let mend = match (Standing::of(status, body), status.as_u16()) {
        (Some(Standing::Exhausted), _) => "the quota of the account is used up; top it up or raise its budget\n",
        (Some(Standing::RateLimited), _) => "the account is at its rate limit\n",
        (_, 401) => "the credential is not accepted; renew it with `tollgate upstream update --new-credential`\n",
        (_, 403) => {
            "the credential may not do this: check its permissions, and from where it may be used, or renew it with \
             `tollgate upstream update --new-credential`\n"
        }
        (_, 200) => "this is no list of models; check the path of base_url\n",
        (_, 404) => "nothing is there; check the path of base_url (and api_version)\n",
        _ => "the provider cannot answer now\n",
    };
    let text = String::from_utf8_lossy(body).replace(upstream.credential.expose(), "[secret]");
    let text = text.chars().take(SHOWN).filter(|c| !c.is_control() || *c == '\n').collect();
    ProviderError::Refused { path: answer.path.clone(), status, mend, text }
}
