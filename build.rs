//! Migrations are compiled in: a new file must be noticed, also when no source changed.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
