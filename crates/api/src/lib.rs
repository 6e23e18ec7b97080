//! The contract between the processes of Pyrite, and with whoever drives it: the VM specification
//! and the control messages. No I/O of its own beyond framing, and no async.
#![forbid(unsafe_code)]

pub mod control;
pub mod v1;
