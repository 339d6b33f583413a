//! The files that a configuration names, read and checked: certificates, keys, authorities.
//!
//! A file that is missing, unreadable or of the wrong kind is a mistake of the configuration, so it is found here and not by
//! the first handshake. Messages never quote content.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{RootCertStore, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tollgate_core::secret::Secret;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::units::show_size;
use crate::secrets::split_keys;

/// Largest file that is read: hundreds of times what any of them needs, and a stop for `/dev/zero`.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Reads a text file.
///
/// # Errors
/// A sentence that says why it cannot be read; it does not name the file.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    let file = File::open(path).map_err(|e| format!("cannot be opened: {e}"))?;
    // It may hold secrets, and a buffer that grows leaves copies behind.
    let length = file.metadata().map_or(0, |found| found.len().min(MAX_FILE_BYTES));
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or_default() + 1));
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("is larger than {}, so it cannot be the right file", show_size(MAX_FILE_BYTES)));
    }
    if let Err(e) = std::str::from_utf8(&bytes) {
        let line = bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        return Err(format!("is not UTF-8 text: the first bad byte is in line {line}"));
    }
    Ok(String::from_utf8(std::mem::take(&mut *bytes)).unwrap_or_default())
}

/// The chain of a certificate file; the first one is the server's own.
///
/// # Errors
/// A sentence that names the file.
pub(super) fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = read_named(path)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let chain = chain.map_err(|_| format!("{} is damaged: a PEM section in it cannot be decoded", path.display()))?;
    if chain.is_empty() {
        return Err(format!("{} holds no certificate: -----BEGIN CERTIFICATE----- is missing", path.display()));
    }
    Ok(chain)
}

/// The private key of a key file.
///
/// # Errors
/// A sentence that names the file.
pub(super) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let text = Secret::new(read_named(path)?);
    if text.expose().contains("ENCRYPTED") {
        let mend =
            "store it without a passphrase (openssl pkey -in old.pem -out new.pem), readable by the gateway only";
        return Err(format!("{} is protected by a passphrase: {mend}", path.display()));
    }
    PrivateKeyDer::from_pem_slice(text.expose().as_bytes())
        .map_err(|_| format!("{} holds no private key in PEM format", path.display()))
}

/// Puts chain and key together if they fit each other.
///
/// # Errors
/// A sentence.
pub(super) fn certify(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, String> {
    match CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider()) {
        Ok(certified) => Ok(Arc::new(certified)),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err("does not fit the certificate: name the key that the certificate was issued for".to_owned())
        }
        Err(e) => Err(format!("cannot be used together with the certificate: {e}")),
    }
}

/// From when to when a certificate is valid.
///
/// # Errors
/// A sentence.
pub(super) fn validity(cert: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), String> {
    let (_, parsed) = X509Certificate::from_der(cert).map_err(|_| "holds a certificate that cannot be decoded")?;
    let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let validity = parsed.validity();
    Ok((at(validity.not_before.timestamp()), at(validity.not_after.timestamp())))
}

/// The text of a file with certificate authorities, if every one of them can be trusted by rustls.
///
/// # Errors
/// A sentence that names the file.
pub(super) fn read_authorities(path: &Path) -> Result<String, String> {
    let mut roots = RootCertStore::empty();
    for authority in read_chain(path)? {
        roots.add(authority).map_err(|e| format!("{} holds an unusable certificate: {e}", path.display()))?;
    }
    read_named(path)
}

/// Splits and checks Fernet keys: one per line, or separated by commas.
///
/// # Errors
/// A sentence that names the position of the bad key, not the key.
pub(super) fn parse_fernet_keys(text: &str) -> Result<Vec<Secret>, String> {
    let key = |(index, part): (usize, &str)| match fernet::Fernet::new(part) {
        Some(_) => Ok(Secret::new(part.to_owned())),
        None => Err(format!(
            "key {} is not a Fernet key (32 bytes in base64url, 44 characters): make one with `tollgate secret generate`",
            index + 1
        )),
    };
    let keys: Vec<Secret> = split_keys(text).enumerate().map(key).collect::<Result<_, _>>()?;
    if keys.is_empty() { Err("holds no Fernet key".to_owned()) } else { Ok(keys) }
}

/// Can a file be made at `path`, now or after making directories? Only what is in the way is an error.
///
/// # Errors
/// A sentence that names what is in the way.
pub(super) fn check_can_be_made(path: &Path) -> Result<(), String> {
    if path.is_dir() {
        return Err(format!("{} is a directory: name a file", path.display()));
    }
    let existing = path.ancestors().skip(1).find(|ancestor| ancestor.exists());
    match existing {
        Some(parent) if !parent.is_dir() => {
            Err(format!("{} is a file, so nothing can be stored below it", parent.display()))
        }
        _ => Ok(()),
    }
}

/// Can a directory be made at `path`, if it is not one already? Only what is in the way is an error.
///
/// # Errors
/// A sentence that names what is in the way.
pub(super) fn check_directory(path: &Path) -> Result<PathBuf, String> {
    match path.ancestors().find(|ancestor| ancestor.exists()) {
        Some(existing) if !existing.is_dir() => {
            Err(format!("{} is a file, so it cannot be a directory: name another one", existing.display()))
        }
        _ => Ok(path.to_owned()),
    }
}

fn read_named(path: &Path) -> Result<String, String> {
    read_text(path).map_err(|message| format!("{} {message}", path.display()))
}
