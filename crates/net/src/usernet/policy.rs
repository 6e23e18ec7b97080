//! What the guest may reach, and under which address the host is known to it.
//!
//! Nothing of the host is reachable unless granted: with `host_loopback` the router's address
//! stands for the host's loopback, and that is the only way to it. The addresses of the host's
//! own interfaces are refused, and so are those that never pass a router (link-local, multicast,
//! broadcast, unspecified, IPv4-mapped).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config::UsernetConfig;
use super::sys;

/// How long the list of the host's addresses is believed.
const FRESH: Duration = Duration::from_secs(5);

/// Decides on destinations.
pub(super) struct Policy {
    config: Arc<UsernetConfig>,
    own: Vec<IpAddr>,
    read_at: Option<Instant>,
}

impl Policy {
    pub(super) fn new(config: Arc<UsernetConfig>) -> Policy {
        Policy {
            config,
            own: Vec::new(),
            read_at: None,
        }
    }

    /// Where a packet to `to` really goes, if the guest may.
    pub(super) fn outbound(&mut self, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        if self.config.restrict || to.port() == 0 {
            return None;
        }
        let ip = self.outbound_ip(to.ip(), now)?;
        Some(SocketAddr::new(ip, to.port()))
    }

    fn outbound_ip(&mut self, ip: IpAddr, now: Instant) -> Option<IpAddr> {
        let c = &self.config;
        match ip {
            IpAddr::V4(a) if a == c.router_v4 => {
                return c.host_loopback.then_some(IpAddr::V4(Ipv4Addr::LOCALHOST));
            }
            IpAddr::V6(a) if c.ipv6 && a == c.router_v6 => {
                return c.host_loopback.then_some(IpAddr::V6(Ipv6Addr::LOCALHOST));
            }
            _ => {}
        }
        let routed = match ip {
            // 0.0.0.0/8 includes the address that a host takes for itself.
            IpAddr::V4(a) => {
                !(a.octets()[0] == 0
                    || a.is_loopback()
                    || a.is_link_local()
                    || a.is_multicast()
                    || a.octets()[0] >= 240
                    || c.on_link_v4(a))
            }
            // ::/8 has the unspecified, loopback, IPv4-mapped and IPv4-compatible addresses;
            // 64:ff9b::/96 leads to IPv4 through a translator that checks nothing of the above.
            IpAddr::V6(a) => {
                c.ipv6
                    && !(a.octets()[0] == 0
                        || a.is_unicast_link_local()
                        || a.is_multicast()
                        || c.on_link_v6(a))
            }
        };
        (routed && !self.is_own(ip, now)).then_some(ip)
    }

    /// True for an address of the host. If they cannot be listed, every address counts as one.
    fn is_own(&mut self, ip: IpAddr, now: Instant) -> bool {
        if self.read_at.is_none_or(|at| now.duration_since(at) > FRESH) {
            match sys::local_addresses() {
                Ok(list) => {
                    self.own = list;
                    self.read_at = Some(now);
                }
                Err(e) => {
                    tracing::warn!("cannot list the host's addresses: {e}");
                    return true;
                }
            }
        }
        self.own.contains(&ip)
    }

    /// The address under which the guest sees `from`, an address of a host socket's peer.
    pub(super) fn inbound(&self, from: IpAddr) -> IpAddr {
        match from {
            IpAddr::V4(a) if a.is_loopback() || self.config.on_link_v4(a) => {
                IpAddr::V4(self.config.router_v4)
            }
            IpAddr::V6(a)
                if a.is_loopback() || a.is_unicast_link_local() || self.config.on_link_v6(a) =>
            {
                IpAddr::V6(self.config.router_v6)
            }
            other => other,
        }
    }
}
