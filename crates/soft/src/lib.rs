//! The software engine.
