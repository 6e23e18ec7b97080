//! What happened so far, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Live counters, shared by the guest's side and the worker.
        #[derive(Debug, Default)]
        pub(super) struct Counters { $(pub(super) $name: AtomicU64,)* }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct CounterValues { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub(super) fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Frames taken from the guest.
    frames_from_guest,
    /// Bytes in them.
    bytes_from_guest,
    /// Frames from the guest dropped because the worker was behind.
    queue_drops,
    /// Frames handed to the guest.
    frames_to_guest,
    /// Bytes in them.
    bytes_to_guest,
    /// Frames for the guest dropped because it had no buffer or its address was not known.
    guest_drops,
    /// Frames that could not be parsed or had a wrong checksum.
    malformed,
    /// Well-formed packets of a kind that is not carried.
    unsupported,
    /// Packets to a destination that is not permitted.
    denied,
    /// Fragments dropped: too many datagrams under way, overlap, or out of time.
    fragment_drops,
    /// New flows refused because a limit was reached.
    limit_drops,
    /// TCP connections opened by the guest.
    tcp_out,
    /// TCP connections opened through port forwards.
    tcp_in,
    /// TCP segments sent again.
    tcp_retransmits,
    /// TCP resets sent to the guest.
    tcp_resets,
    /// UDP datagrams carried for the guest.
    udp_out,
    /// UDP datagrams carried to the guest.
    udp_in,
    /// DNS queries from the guest.
    dns_queries,
    /// DNS queries answered with a failure of our own.
    dns_failures,
    /// DHCP requests answered.
    dhcp_replies,
}

/// Counts one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Counts several.
pub(super) fn count_by(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
