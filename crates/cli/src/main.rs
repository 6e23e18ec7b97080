//! The pyrite executable.
fn main() {}
