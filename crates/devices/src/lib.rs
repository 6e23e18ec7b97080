//! pyrite-devices
