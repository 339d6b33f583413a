//! What can go wrong with the database, in two voices: [`StoreError::is_client_error`] tells what the person at the
//! command line (or a client of the admin API) did, with a text that names the mend; the rest is for the operator.

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The setting cannot be meant.
    #[error("[store] url: {0}")]
    Url(String),
    /// The database is not there, does not let us in, or is too busy.
    #[error(
        "the database of [store] url cannot be reached: {0}; check that it runs, and the address, name and password"
    )]
    Unavailable(#[source] sqlx::Error),
    /// The database does not answer.
    #[error("the database of [store] url does not answer in time")]
    TooSlow,
    /// The database is there, its tables are not.
    #[error("the database of [store] url has no tables yet, or old ones: run `tollgate init`")]
    NotInitialised(#[source] sqlx::Error),
    /// The tables cannot be brought up to date.
    #[error("the tables of [store] url cannot be brought up to date: {0}; was the database made by a newer tollgate?")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// Something of that name exists already.
    #[error("{0}")]
    Taken(String),
    /// There is no such thing, or there are several.
    #[error("{0}")]
    NotFound(String),
    /// A value cannot be stored.
    #[error("{0}")]
    Invalid(String),
    /// A row holds what this version cannot read.
    #[error("{0}; the row was not written by this version of tollgate")]
    Corrupt(String),
    /// Anything else that the database says.
    #[error("the database of [store] url: {0}")]
    Database(#[source] sqlx::Error),
}

impl StoreError {
    /// Is the one who asked to blame? Then the text is meant for them, and says how to mend it.
    #[must_use]
    pub fn is_client_error(&self) -> bool {
        matches!(self, Self::Taken(_) | Self::NotFound(_) | Self::Invalid(_))
    }

    /// Turns the violation of a unique name into `message`, and leaves every other error as it is.
    pub(super) fn name_taken(error: sqlx::Error, message: impl FnOnce() -> String) -> Self {
        match &error {
            sqlx::Error::Database(inner) if inner.is_unique_violation() => Self::Taken(message()),
            _ => error.into(),
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut => Self::Unavailable(error),
            sqlx::Error::Database(inner) => match inner.code().as_deref() {
                // PostgreSQL: wrong password, unknown role or database, shutting down or starting, too many clients.
                Some("28P01" | "28000" | "3D000" | "57P01" | "57P03" | "53300") => Self::Unavailable(error),
                // SQLite: busy, cannot open, read-only.
                Some("5" | "14" | "8") => Self::Unavailable(error),
                Some("42P01") => Self::NotInitialised(error),
                _ if inner.message().starts_with("no such table") => Self::NotInitialised(error),
                _ => Self::Database(error),
            },
            _ => Self::Database(error),
        }
    }
}

impl From<sqlx::migrate::MigrateError> for StoreError {
    fn from(error: sqlx::migrate::MigrateError) -> Self {
        match error {
            sqlx::migrate::MigrateError::Execute(error) => error.into(),
            other => Self::Migrate(other),
        }
    }
}
