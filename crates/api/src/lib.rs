//! pyrite-api
