//! What goes on beside the requests. Each job is a struct, a function that does one step, and a loop around it that ends
//! with the server.

pub mod content_writer;
pub mod credential_files;
mod give_way;
pub mod journal_keeper;
pub mod limits;
pub mod models;
pub mod notices;
pub mod probe;
pub mod refresh;
pub mod retention;
pub mod together;
pub mod token_counter;
pub mod usage_writer;
