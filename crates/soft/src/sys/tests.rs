//! Tests of the system half: guests of a few bytes, run by the interpreter.
//!
//! Every vector of the IDT leads to a stub that pushes the vector's number and stops, so a test
//! sees the whole frame that a delivery has built.

mod bench;
mod debugging;
mod hostile;
mod long;
mod outside;
mod protected;
mod soft_tlb;
mod tasks;
mod v86;
