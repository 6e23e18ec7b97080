//! A second, independent TCP/IP stack plays the guest; the host's side is real sockets.

mod guest;
mod packets;
mod streams;
