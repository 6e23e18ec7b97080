//! What a user-mode network looks like to its guest.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::forward::Forward;

/// Settings of a user-mode network. The defaults are those users know from other emulators.
#[derive(Clone, Debug)]
pub struct UsernetConfig {
    /// The Ethernet address of the router.
    pub router_mac: [u8; 6],
    /// The IPv4 network, for instance 10.0.2.0.
    pub network_v4: Ipv4Addr,
    /// Its prefix length, 8 to 29.
    pub prefix_v4: u8,
    /// The router; with [`UsernetConfig::host_loopback`] also the host's 127.0.0.1.
    pub router_v4: Ipv4Addr,
    /// The DNS forwarder.
    pub dns_v4: Ipv4Addr,
    /// The first address leased by DHCP, and the target of port forwards.
    pub guest_v4: Ipv4Addr,
    /// False: no IPv6 at all.
    pub ipv6: bool,
    /// The IPv6 /64 that is advertised.
    pub network_v6: Ipv6Addr,
    /// The router; with [`UsernetConfig::host_loopback`] also the host's ::1.
    pub router_v6: Ipv6Addr,
    /// The DNS forwarder.
    pub dns_v6: Ipv6Addr,
    /// Largest IP packet on the link, 1280 to 65 521.
    pub mtu: u16,
    /// DHCP lease time in seconds.
    pub lease_s: u32,
    /// The domain name given by DHCP.
    pub domain: Option<String>,
    /// Where DNS queries go. `None`: the name servers of the host's `/etc/resolv.conf`; if there
    /// are none, the host's own resolver answers A and AAAA queries.
    pub dns_servers: Option<Vec<SocketAddr>>,
    /// No connections out; port forwards, DHCP and the router's echo still work.
    pub restrict: bool,
    /// The guest may reach the host's loopback as the router's address. Nothing else of the host
    /// is ever reachable.
    pub host_loopback: bool,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// Most TCP connections at a time.
    pub tcp_connections: usize,
    /// Most UDP flows at a time; the oldest makes room.
    pub udp_flows: usize,
    /// Most bytes in the buffers of all TCP connections together.
    pub buffer_bytes: usize,
    /// Most bytes in one direction of one TCP connection, 64 KiB to 1 GiB.
    pub connection_buffer_bytes: usize,
}

impl Default for UsernetConfig {
    fn default() -> UsernetConfig {
        let v6 = |last| Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, last);
        UsernetConfig {
            router_mac: [0x52, 0x55, 10, 0, 2, 2],
            network_v4: Ipv4Addr::new(10, 0, 2, 0),
            prefix_v4: 24,
            router_v4: Ipv4Addr::new(10, 0, 2, 2),
            dns_v4: Ipv4Addr::new(10, 0, 2, 3),
            guest_v4: Ipv4Addr::new(10, 0, 2, 15),
            ipv6: true,
            network_v6: v6(0),
            router_v6: v6(2),
            dns_v6: v6(3),
            mtu: 1500,
            lease_s: 86_400,
            domain: None,
            dns_servers: None,
            restrict: false,
            host_loopback: false,
            forwards: Vec::new(),
            tcp_connections: 4096,
            udp_flows: 1024,
            buffer_bytes: 256 << 20,
            connection_buffer_bytes: 1 << 20,
        }
    }
}

impl UsernetConfig {
    /// The link-local address of the router, which advertisements and NDP come from.
    pub(super) fn router_link_local(&self) -> Ipv6Addr {
        let m = self.router_mac;
        let word = |a, b| u16::from_be_bytes([a, b]);
        let (a, d) = (word(m[0] ^ 2, m[1]), word(m[4], m[5]));
        Ipv6Addr::new(0xfe80, 0, 0, 0, a, word(m[2], 0xff), word(0xfe, m[3]), d)
    }

    pub(super) fn netmask_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::MAX << (32 - u32::from(self.prefix_v4.clamp(8, 29))))
    }

    pub(super) fn broadcast_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network_v4) | !u32::from(self.netmask_v4()))
    }

    pub(super) fn on_link_v4(&self, a: Ipv4Addr) -> bool {
        u32::from(a) & u32::from(self.netmask_v4()) == u32::from(self.network_v4)
    }

    pub(super) fn on_link_v6(&self, a: Ipv6Addr) -> bool {
        a.segments()[..4] == self.network_v6.segments()[..4]
    }

    /// Says what is wrong with the settings, if anything.
    pub(super) fn check(&self) -> Result<(), String> {
        if !(8..=29).contains(&self.prefix_v4) {
            return Err(format!(
                "IPv4 prefix length {} is not 8 to 29",
                self.prefix_v4
            ));
        }
        if u32::from(self.network_v4) & !u32::from(self.netmask_v4()) != 0 {
            let (n, p) = (self.network_v4, self.prefix_v4);
            return Err(format!("{n} is not the first address of a /{p} network"));
        }
        for (what, a) in [
            ("router", self.router_v4),
            ("DNS", self.dns_v4),
            ("guest", self.guest_v4),
        ] {
            if !self.on_link_v4(a) || a == self.network_v4 || a == self.broadcast_v4() {
                let (n, p) = (self.network_v4, self.prefix_v4);
                return Err(format!("{what} address {a} is not a host of {n}/{p}"));
            }
        }
        if self.router_v4 == self.dns_v4
            || self.router_v4 == self.guest_v4
            || self.dns_v4 == self.guest_v4
        {
            return Err("router, DNS and guest need different IPv4 addresses".into());
        }
        if self.ipv6
            && (!self.on_link_v6(self.router_v6)
                || !self.on_link_v6(self.dns_v6)
                || self.router_v6 == self.dns_v6)
        {
            let n = self.network_v6;
            return Err(format!(
                "IPv6 router and DNS must be two addresses in {n}/64"
            ));
        }
        if self.router_mac[0] & 1 != 0 {
            return Err("the router's Ethernet address must not be a group address".into());
        }
        if !(1280..=65_521).contains(&self.mtu) {
            return Err(format!("MTU {} is not 1280 to 65521", self.mtu));
        }
        if !((64 << 10)..=(1 << 30)).contains(&self.connection_buffer_bytes) {
            return Err("buffer of a connection is not 64 KiB to 1 GiB".into());
        }
        if self
            .domain
            .as_ref()
            .is_some_and(|d| d.len() > 255 || !d.is_ascii())
        {
            return Err("domain name is longer than 255 bytes or not ASCII".into());
        }
        Ok(())
    }
}
