//! The credentials in `upstreams`, alone: for `tollgate secret rotate`, which encrypts each of them anew.
//!
//! A credential that is encrypted with another key is still the same credential. So its row is not announced to the gateways
//! (`changed_seq` stays): they have it decrypted in memory, and neither the health of the upstream nor a gateway that does not
//! have the new key yet is disturbed. Whoever loads the row later reads what is there then.

use serde_json::json;
use tollgate_core::id::UpstreamId;

use super::{Store, StoreError, admin::Entry, change, on_pool};

/// Whose credential, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredCredential {
    /// The upstream's id.
    pub id: UpstreamId,
    /// Its name.
    pub name: String,
    /// The credential, as Fernet ciphertext.
    pub ciphertext: String,
}

impl Store {
    /// The credentials of all upstreams, in the order of their ids. A row that cannot be read otherwise has one too.
    ///
    /// # Errors
    /// The database's.
    pub async fn credentials(&self) -> Result<Vec<StoredCredential>, StoreError> {
        let rows: Vec<(i64, String, String)> = on_pool!(self, pool => sqlx::query_as(
            "SELECT id, name, credential FROM upstreams WHERE removed_at IS NULL AND credential IS NOT NULL ORDER BY id")
            .fetch_all(pool).await?);
        Ok(rows
            .into_iter()
            .map(|(id, name, ciphertext)| StoredCredential { id: UpstreamId(id), name, ciphertext })
            .collect())
    }

    /// Puts `ciphertext`, which is the same secret, in the place of `old`. Says whether it did: not if the credential was
    /// changed meanwhile, or the upstream removed.
    ///
    /// # Errors
    /// The database's.
    pub async fn replace_ciphertext(
        &self,
        old: &StoredCredential,
        ciphertext: &str,
        by: &str,
    ) -> Result<bool, StoreError> {
        change!(self, by, |tx, _seq| {
            let done = sqlx::query("UPDATE upstreams SET credential = $1 WHERE id = $2 AND credential = $3")
                .bind(ciphertext)
                .bind(old.id.0)
                .bind(&old.ciphertext)
                .execute(&mut *tx)
                .await?;
            if done.rows_affected() == 0 {
                return Ok(false);
            }
            ((), Entry::new("upstream.rotate_credential", old.id.0, json!({ "name": old.name })))
        });
        Ok(true)
    }
}
