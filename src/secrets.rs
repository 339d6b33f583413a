//! Fernet: how upstream credentials, and the content of requests, lie in the database.
//!
//! Several keys may be in use: the first encrypts, all decrypt, so that keys can be changed without a moment in which
//! something cannot be read. They come from `TOLLGATE_FERNET_KEYS` or the file of `[secrets] fernet_keys_file`, which is
//! made when neither is there. A value that is kept encrypted in the database itself tells at the start, not at the first
//! request, that the keys are not those of this database.
//!
//! Keys and plain texts are wiped from memory when they are no longer needed. (What the cipher itself copies to the stack
//! while it works is out of our hands.)

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE};
use fernet::Fernet;
use tollgate_core::{content::HashKey, secret::Secret};
use zeroize::{Zeroize, Zeroizing};

use crate::store::{Store, StoreError};

/// Where the database keeps the value that tells whether keys fit it.
const CHECK: &str = "fernet_check";
/// What that value decrypts to.
const CHECK_TEXT: &str = "tollgate";
/// Where the database keeps the key of the hashes of prompts.
const HASH_KEY: &str = "prompt_hash_key";

/// Why a secret cannot be had. Never shows a key or a secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// A text is not a key.
    #[error("Fernet key number {0} is not 32 bytes in URL-safe base64: make one with `tollgate secret generate`")]
    BadKey(usize),
    /// There is no key at all.
    #[error("there is no Fernet key: make one with `tollgate secret generate`")]
    NoKey,
    /// The file of the keys cannot be read or made.
    #[error("[secrets] fernet_keys_file: {path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A ciphertext was made with another key, or damaged.
    #[error("no Fernet key decrypts it: it was encrypted with another key, or is damaged")]
    Undecryptable,
    /// The keys are not those of this database.
    #[error(
        "the Fernet keys do not fit this database: credentials in it were encrypted with other ones. Put the right keys \
         into the file of [secrets] fernet_keys_file, or into TOLLGATE_FERNET_KEYS (comma-separated, the first encrypts)"
    )]
    DoNotFit,
    /// The keys of this database are gone; making new ones would not bring them back.
    #[error(
        "the database has secrets, but the Fernet keys to read them are not there: bring back {0} ([secrets] \
         fernet_keys_file), or put them into TOLLGATE_FERNET_KEYS"
    )]
    Missing(String),
    /// A key cannot be drawn.
    #[error("the system gives no random numbers")]
    NoRandomness,
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One key, wiped when it is dropped.
struct Key(Fernet);

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The keys in use: at least one.
#[derive(Clone)]
pub struct FernetKeys(std::sync::Arc<[Key]>);

impl std::fmt::Debug for FernetKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FernetKeys({})", self.0.len())
    }
}

impl FernetKeys {
    /// The keys in `texts`, the first of which encrypts.
    ///
    /// # Errors
    /// [`SecretsError::NoKey`], or the number of the text that is not a key.
    pub fn try_new<'a>(texts: impl IntoIterator<Item = &'a Secret>) -> Result<Self, SecretsError> {
        let key = |(n, text): (usize, &Secret)| Fernet::new(text.expose()).map(Key).ok_or(SecretsError::BadKey(n + 1));
        let keys = texts.into_iter().enumerate().map(key).collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(SecretsError::NoKey) } else { Ok(Self(keys.into())) }
    }

    /// The keys in a text, in the form of [`split_keys`].
    ///
    /// # Errors
    /// As [`FernetKeys::try_new`].
    pub fn parse(text: &Secret) -> Result<Self, SecretsError> {
        let keys: Vec<Secret> = split_keys(text.expose()).map(|key| Secret::new(key.to_owned())).collect();
        Self::try_new(&keys)
    }

    /// The keys in a file, in the form of [`FernetKeys::parse`].
    ///
    /// # Errors
    /// If the file cannot be read, or as [`FernetKeys::try_new`].
    pub fn from_file(path: &Path) -> Result<Self, SecretsError> {
        Self::parse(&Secret::new(std::fs::read_to_string(path).map_err(|error| in_file(path, error))?))
    }

    /// Makes a file with a new key, readable by its owner alone; its directory too. An existing file is left alone.
    ///
    /// # Errors
    /// If there is a file already, or it cannot be written.
    pub fn generate_file(path: &Path) -> Result<Self, SecretsError> {
        let key = generate_key();
        let write = || {
            if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(key.expose().as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()
        };
        write().map_err(|error| in_file(path, error))?;
        Self::try_new([&key])
    }

    /// Encrypts a secret with the first key.
    #[must_use]
    pub fn encrypt(&self, secret: &Secret) -> String {
        self.0[0].0.encrypt(secret.expose().as_bytes())
    }

    /// Did the first key encrypt it? Then the others are not needed for it.
    #[must_use]
    pub fn is_current(&self, ciphertext: &str) -> bool {
        self.0[0].0.decrypt(ciphertext).map(Zeroizing::new).is_ok()
    }

    /// The same secret, encrypted with the first key; `None`: it is already.
    ///
    /// # Errors
    /// [`SecretsError::Undecryptable`].
    pub fn rotate(&self, ciphertext: &str) -> Result<Option<String>, SecretsError> {
        if self.is_current(ciphertext) {
            return Ok(None);
        }
        self.decrypt(ciphertext).map(|secret| Some(self.encrypt(&secret)))
    }

    /// Decrypts what any of the keys encrypted.
    ///
    /// # Errors
    /// [`SecretsError::Undecryptable`].
    pub fn decrypt(&self, ciphertext: &str) -> Result<Secret, SecretsError> {
        let plain = self.0.iter().find_map(|key| key.0.decrypt(ciphertext).ok()).map(Zeroizing::new);
        let mut plain = plain.ok_or(SecretsError::Undecryptable)?;
        match String::from_utf8(std::mem::take(&mut *plain)) {
            Ok(text) => Ok(Secret::new(text)),
            Err(error) => {
                error.into_bytes().zeroize();
                Err(SecretsError::Undecryptable)
            }
        }
    }

    /// Encrypts content with the first key: a Fernet token, in bytes instead of its base64.
    #[must_use]
    pub fn seal(&self, content: &[u8]) -> Vec<u8> {
        // What has just been encoded can be decoded.
        URL_SAFE.decode(self.0[0].0.encrypt(content)).unwrap_or_default()
    }

    /// Decrypts what [`FernetKeys::seal`] made with any of the keys.
    ///
    /// # Errors
    /// [`SecretsError::Undecryptable`].
    pub fn open(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SecretsError> {
        let token = URL_SAFE.encode(sealed);
        let content = self.0.iter().find_map(|key| key.0.decrypt(&token).ok());
        content.map(Zeroizing::new).ok_or(SecretsError::Undecryptable)
    }

    /// The same content, sealed with the first key; `None`: it is already.
    ///
    /// # Errors
    /// [`SecretsError::Undecryptable`].
    pub fn reseal(&self, sealed: &[u8]) -> Result<Option<Vec<u8>>, SecretsError> {
        if self.is_current(&URL_SAFE.encode(sealed)) {
            return Ok(None);
        }
        self.open(sealed).map(|content| Some(self.seal(&content)))
    }

    /// The key by which the hashes of prompts are made, the same on every replica and for as long as the database lasts. It is kept
    /// in there, encrypted; one that has none yet gets a new one.
    ///
    /// # Errors
    /// If no key decrypts it, or it is damaged; if the system gives no random numbers; or the database's.
    pub async fn hash_key(&self, store: &Store) -> Result<HashKey, SecretsError> {
        let kept = match store.meta(HASH_KEY).await? {
            Some(kept) => kept,
            None => {
                let mut random = Zeroizing::new([0; 32]);
                getrandom::fill(&mut *random).map_err(|_| SecretsError::NoRandomness)?;
                let fresh = Secret::new(URL_SAFE.encode(*random));
                store.meta_or_insert(HASH_KEY, &self.encrypt(&fresh)).await?
            }
        };
        let mut bytes = Zeroizing::new([0; 32]);
        let text = self.decrypt(&kept)?;
        match URL_SAFE.decode_slice_unchecked(text.expose(), &mut *bytes) {
            Ok(32) => Ok(HashKey::from_random(*bytes)),
            _ => Err(SecretsError::Undecryptable),
        }
    }

    /// Are these the keys of this database? One that has had none yet takes these.
    ///
    /// # Errors
    /// [`SecretsError::DoNotFit`], or the database's.
    pub async fn check(&self, store: &Store) -> Result<(), SecretsError> {
        let kept = match store.meta(CHECK).await? {
            Some(kept) => kept,
            None => store.meta_or_insert(CHECK, &self.encrypt(&Secret::new(CHECK_TEXT.to_owned()))).await?,
        };
        match self.decrypt(&kept) {
            Ok(text) if text.expose() == CHECK_TEXT => Ok(()),
            _ => Err(SecretsError::DoNotFit),
        }
    }

    /// Encrypts what the database itself needs with the first key, so that it will do alone: the key of the hashes of prompts, and
    /// last the value that tells whether keys fit.
    ///
    /// # Errors
    /// [`SecretsError::Undecryptable`], or the database's.
    pub async fn rotate_check(&self, store: &Store) -> Result<(), SecretsError> {
        for name in [HASH_KEY, CHECK] {
            let Some(kept) = store.meta(name).await? else { continue };
            if let Some(rotated) = self.rotate(&kept)? {
                // Somebody else who did it at the same time did it as well.
                store.replace_meta(name, &kept, &rotated).await?;
            }
        }
        Ok(())
    }
}

/// The keys that were configured, or those of `file`, which is made if it is not there; checked against the database.
///
/// A file is made only for a database that has had no keys yet.
///
/// # Errors
/// If keys are malformed, missing, or not those of this database; each names the setting and the mend.
pub async fn keys_for(configured: &[Secret], file: &Path, store: &Store) -> Result<FernetKeys, SecretsError> {
    let keys = if !configured.is_empty() {
        FernetKeys::try_new(configured)?
    } else if file.exists() {
        FernetKeys::from_file(file)?
    } else if store.meta(CHECK).await?.is_some() {
        return Err(SecretsError::Missing(file.display().to_string()));
    } else {
        match FernetKeys::generate_file(file) {
            // Another process made it at the same time: its keys are ours.
            Err(SecretsError::File { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {
                FernetKeys::from_file(file)?
            }
            made => made?,
        }
    };
    keys.check(store).await?;
    Ok(keys)
}

/// The keys in a variable or a file: separated by commas, spaces or line breaks; what follows a `#` is a comment.
pub fn split_keys(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(|line| line.split_once('#').map_or(line, |(keys, _)| keys));
    lines.flat_map(|line| line.split(|c: char| c == ',' || c.is_whitespace())).filter(|key| !key.is_empty())
}

/// A new key, in its text form.
#[must_use]
pub fn generate_key() -> Secret {
    Secret::new(Fernet::generate_key())
}

fn in_file(path: &Path, source: std::io::Error) -> SecretsError {
    SecretsError::File { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tollgate_core::{content::prompt_hash, route::Dialect};

    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text.to_owned())
    }

    #[test]
    fn the_first_key_encrypts_and_all_decrypt() {
        let (old, new) = (generate_key(), generate_key());
        let by_old = FernetKeys::try_new([&old]).unwrap().encrypt(&secret("sk-1"));
        let both = FernetKeys::try_new([&new, &old]).unwrap();
        assert_eq!(both.decrypt(&by_old).unwrap().expose(), "sk-1");
        let by_new = both.encrypt(&secret("sk-2"));
        assert!(by_new.starts_with("gAAAA") && !by_new.contains("sk-2"));
        assert_eq!(FernetKeys::try_new([&new]).unwrap().decrypt(&by_new).unwrap().expose(), "sk-2");
        assert!(matches!(FernetKeys::try_new([&old]).unwrap().decrypt(&by_new), Err(SecretsError::Undecryptable)));
    }

    #[test]
    fn a_secret_is_rotated_to_the_first_key_once() {
        let (old, new) = (generate_key(), generate_key());
        let by_old = FernetKeys::try_new([&old]).unwrap().encrypt(&secret("sk-1"));
        let both = FernetKeys::try_new([&new, &old]).unwrap();
        assert!(!both.is_current(&by_old));
        let by_new = both.rotate(&by_old).unwrap().unwrap();
        assert_eq!(FernetKeys::try_new([&new]).unwrap().decrypt(&by_new).unwrap().expose(), "sk-1");
        assert!(both.is_current(&by_new));
        assert_eq!(both.rotate(&by_new).unwrap(), None);
        let foreign = FernetKeys::try_new([&generate_key()]).unwrap().encrypt(&secret("sk-1"));
        assert!(matches!(both.rotate(&foreign), Err(SecretsError::Undecryptable)));
    }

    #[test]
    fn content_is_sealed_in_bytes_and_resealed_once() {
        let (old, new) = (generate_key(), generate_key());
        let by_old = FernetKeys::try_new([&old]).unwrap();
        for content in [&b""[..], b"a", &[0xff; 1000]] {
            let sealed = by_old.seal(content);
            assert_eq!((sealed[0], sealed.len() % 16), (0x80, 9), "version, time, vector, blocks, check");
            assert_eq!(&**by_old.open(&sealed).unwrap(), content);
            let both = FernetKeys::try_new([&new, &old]).unwrap();
            let resealed = both.reseal(&sealed).unwrap().unwrap();
            assert_eq!(both.reseal(&resealed).unwrap(), None);
            assert_eq!(&**FernetKeys::try_new([&new]).unwrap().open(&resealed).unwrap(), content);
            assert!(matches!(by_old.open(&resealed), Err(SecretsError::Undecryptable)));
            assert!(matches!(by_old.open(&sealed[1..]), Err(SecretsError::Undecryptable)));
        }
    }

    #[tokio::test]
    async fn the_key_of_the_hashes_is_made_once_and_rotated() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite://{}/db", directory.path().display())).await.unwrap();
        store.migrate().await.unwrap();
        let (old, new) = (generate_key(), generate_key());
        let hash = async |keys: &FernetKeys| {
            keys.hash_key(&store).await.map(|key| prompt_hash(&key, Dialect::Completions, b"{\"prompt\":\"a\"}"))
        };
        let by_old = FernetKeys::try_new([&old]).unwrap();
        let first = hash(&by_old).await.unwrap();
        assert_eq!(hash(&by_old).await.unwrap(), first);
        FernetKeys::try_new([&new, &old]).unwrap().rotate_check(&store).await.unwrap();
        assert_eq!(hash(&FernetKeys::try_new([&new]).unwrap()).await.unwrap(), first, "the hashes stay comparable");
        assert!(matches!(hash(&by_old).await, Err(SecretsError::Undecryptable)));
    }

    #[test]
    fn what_is_not_a_ciphertext_is_refused() {
        let keys = FernetKeys::try_new([&generate_key()]).unwrap();
        let whole = keys.encrypt(&secret("sk-1"));
        let other = if whole.as_bytes()[20] == b'A' { 'B' } else { 'A' };
        let tampered = format!("{}{other}{}", &whole[..20], &whole[21..]);
        for text in ["", "gAAAA", "sk-1", "é", &whole[..whole.len() - 4], &tampered, &"A".repeat(10_000)] {
            assert!(matches!(keys.decrypt(text), Err(SecretsError::Undecryptable)), "{text}");
        }
    }

    #[test]
    fn keys_are_read_from_lists_and_from_files_with_comments() {
        let (a, b) = (generate_key(), generate_key());
        let by_b = FernetKeys::try_new([&b]).unwrap().encrypt(&secret("sk-1"));
        for text in
            [format!("{},{}", a.expose(), b.expose()), format!("# ours\n\n {} # new\n{}\r\n", a.expose(), b.expose())]
        {
            let keys = FernetKeys::parse(&secret(&text)).unwrap();
            assert_eq!(format!("{keys:?}"), "FernetKeys(2)");
            assert_eq!(keys.decrypt(&by_b).unwrap().expose(), "sk-1");
        }
        assert!(matches!(FernetKeys::parse(&secret("# nothing\n")), Err(SecretsError::NoKey)));
        let second_is_bad = secret(&format!("{},tooshort", a.expose()));
        let error = FernetKeys::parse(&second_is_bad).unwrap_err();
        assert!(matches!(error, SecretsError::BadKey(2)) && !error.to_string().contains("tooshort"), "{error}");
    }

    #[test]
    fn a_generated_file_is_private_and_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/fernet.key");
        let keys = FernetKeys::generate_file(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let read = FernetKeys::from_file(&path).unwrap();
        assert_eq!(read.decrypt(&keys.encrypt(&secret("sk-1"))).unwrap().expose(), "sk-1");
        let before = std::fs::read(&path).unwrap();
        assert!(matches!(FernetKeys::generate_file(&path), Err(SecretsError::File { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), before);
        let error = FernetKeys::from_file(&directory.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("[secrets] fernet_keys_file") && error.contains("none"), "{error}");
    }

    #[tokio::test]
    async fn keys_that_do_not_fit_the_database_are_told_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite://{}/db", directory.path().display())).await.unwrap();
        store.migrate().await.unwrap();
        let file = directory.path().join("fernet.key");
        keys_for(&[], &file, &store).await.expect("a new database takes new keys");
        keys_for(&[], &file, &store).await.expect("and knows them again");

        let other = [generate_key()];
        let error = keys_for(&other, &file, &store).await.unwrap_err().to_string();
        assert!(error.contains("[secrets] fernet_keys_file") && error.contains("TOLLGATE_FERNET_KEYS"), "{error}");
        std::fs::remove_file(&file).unwrap();
        let error = keys_for(&[], &file, &store).await.unwrap_err().to_string();
        assert!(error.contains("bring back") && error.contains("fernet.key"), "{error}");
        assert!(!file.exists(), "no new key hides that the old one is gone");
    }
}
