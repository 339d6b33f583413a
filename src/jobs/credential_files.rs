//! Notices when the file of a credential changes, so that the next request takes the new one.
//!
//! A part of the refresh job. What cannot be used changes nothing: the old credential stays, and why is told once.

use std::{path::PathBuf, time::SystemTime};

use tollgate_core::secret::Secret;

use crate::credential::Watched;

/// The files of upstreams' credentials.
#[derive(Debug, Default)]
pub struct CredentialFiles(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    upstream: String,
    file: Watched,
    /// What was last told of it.
    trouble: Option<String>,
}

impl CredentialFiles {
    /// By the names of the upstreams.
    #[must_use]
    pub fn new(files: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let entry = |(upstream, path)| Entry { upstream, file: Watched::new(path), trouble: None };
        Self(files.into_iter().map(entry).collect())
    }

    /// Is there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the files hold that may have changed, by the names of the upstreams.
    pub fn look(&mut self, now: SystemTime) -> Vec<(String, Secret)> {
        self.0.iter_mut().filter_map(|entry| Some((entry.upstream.clone(), entry.look(now)?))).collect()
    }
}

impl Entry {
    fn look(&mut self, now: SystemTime) -> Option<Secret> {
        match self.file.look(now)? {
            Ok(secret) => {
                if self.trouble.take().is_some() {
                    tracing::info!(upstream = self.upstream, "credential_file can be used again");
                }
                Some(secret)
            }
            Err(trouble) => {
                if self.trouble.as_ref() != Some(&trouble) {
                    tracing::error!(
                        upstream = self.upstream,
                        "credential_file: {trouble}; the credential that it held before stays in use"
                    );
                }
                self.trouble = Some(trouble);
                None
            }
        }
    }
}
