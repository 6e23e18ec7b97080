//! Network cards and what they are plugged into.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// LIMIT: network cards of a VM.
pub const MAX_NICS: usize = 8;
/// LIMIT: queue pairs of a virtio card.
pub const MAX_NIC_QUEUES: u16 = 16;
/// LIMIT: milliseconds that a frame may be delayed.
pub const MAX_DELAY_MS: u32 = 60_000;
/// Losses are counted per million.
pub const LOSS_UNIT: u32 = 1_000_000;
/// MTUs that a card may have. 68: RFC 791; 65521: an IP packet with its Ethernet header.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65_521;

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl FromStr for MacAddr {
    type Err = String;
    fn from_str(text: &str) -> Result<MacAddr, String> {
        let expected = || format!("{text:?}; expected an address such as 52:54:00:12:34:56");
        let mut out = [0; 6];
        let mut parts = text.split([':', '-']);
        for b in &mut out {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(expected)?;
            *b = u8::from_str_radix(part, 16).map_err(|_| expected())?;
        }
        if parts.next().is_some() {
            return Err(expected());
        }
        Ok(MacAddr(out))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;
    fn try_from(text: String) -> Result<MacAddr, String> {
        text.parse()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

/// Kinds of network cards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicModel {
    /// virtio-net.
    #[default]
    Virtio,
    /// Intel 82540EM.
    E1000,
    /// Realtek RTL8139C+.
    Rtl8139,
    /// Realtek RTL8139C, without the descriptor rings of the C+.
    Rtl8139c,
    /// NE2000 on PCI: Realtek RTL8029AS.
    Ne2kPci,
}

/// What a card is plugged into.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicBackend {
    /// User-mode NAT.
    #[default]
    User,
    /// Nothing: the cable ends in the air.
    None,
    /// A TAP interface of the host, by its name.
    Tap(String),
    /// A descriptor of an open TAP interface that the process was given.
    TapFd(i32),
    /// The switch that listens at this socket.
    Switch(PathBuf),
}

/// LIMIT: bytes of the name of an interface: IFNAMSIZ with its terminator.
const MAX_IFNAME_BYTES: usize = 15;

impl NicBackend {
    fn problem(&self) -> Option<String> {
        match self {
            NicBackend::User | NicBackend::None => None,
            NicBackend::Tap(name) => {
                let fits = (1..=MAX_IFNAME_BYTES).contains(&name.len());
                let allowed = |c: char| c.is_ascii_graphic() && c != '/' && c != '%';
                (!fits || !name.chars().all(allowed))
                    .then(|| format!("{name:?} is no name of an interface; e.g. tap0"))
            }
            NicBackend::TapFd(fd) => {
                // Standard streams are the VM's own.
                (*fd < 3).then(|| format!("{fd} is no descriptor of a TAP interface"))
            }
            NicBackend::Switch(path) => {
                let fits = (1..=100).contains(&path.as_os_str().len());
                (!fits).then(|| "expected a socket path of at most 100 bytes".into())
            }
        }
    }
}

/// So much a second, with bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateSpec {
    /// Bytes or frames in a second.
    pub per_second: u64,
    /// As many may come at once after silence.
    pub burst: u64,
}

/// What the cable does to frames, in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CableSpec {
    /// Limit in bytes.
    #[serde(default)]
    pub bytes: Option<RateSpec>,
    /// Limit in frames.
    #[serde(default)]
    pub frames: Option<RateSpec>,
    /// Frames lost of [`LOSS_UNIT`].
    #[serde(default)]
    pub loss_ppm: u32,
    /// How long a frame is on its way.
    #[serde(default)]
    pub delay_ms: u32,
    /// Chooses which frames are lost.
    #[serde(default)]
    pub seed: u64,
    /// The cable is not plugged in at first.
    #[serde(default)]
    pub unplugged: bool,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// What it is.
    #[serde(default)]
    pub model: NicModel,
    /// What it is plugged into.
    #[serde(default)]
    pub backend: NicBackend,
    /// Its address; one of its own without.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// Largest IP packet that the card tells its driver of; only virtio.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Queue pairs; 1 without. Only virtio.
    #[serde(default)]
    pub queues: Option<u16>,
    /// File for a capture of all frames (pcapng).
    #[serde(default)]
    pub pcap: Option<PathBuf>,
    /// The cable.
    #[serde(default)]
    pub cable: CableSpec,
}

impl Default for NicSpec {
    fn default() -> NicSpec {
        NicSpec {
            model: NicModel::Virtio,
            backend: NicBackend::User,
            mac: None,
            mtu: None,
            queues: None,
            pcap: None,
            cable: CableSpec::default(),
        }
    }
}

impl NicSpec {
    /// The address of card `n`: the one given, or one of its own, locally administered.
    pub fn mac_of(&self, n: usize) -> [u8; 6] {
        let own = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56_u8.wrapping_add(n as u8)];
        self.mac.map_or(own, |m| m.0)
    }

    pub(super) fn validate(&self, at: &str, bad: &mut dyn FnMut(String, String)) {
        let mut bad = |field: &str, problem: String| bad(format!("{at}.{field}"), problem);
        if let Some(problem) = self.backend.problem() {
            bad("backend", problem);
        }
        if let Some(m) = self.mac
            && (m.0[0] & 1 != 0 || m.0 == [0; 6])
        {
            bad("mac", format!("{m} is not the address of one card"));
        }
        if let Some(mtu) = self.mtu {
            if !MTU_RANGE.contains(&mtu) {
                let (from, to) = MTU_RANGE.into_inner();
                bad("mtu", format!("is {mtu}; expected {from} to {to}"));
            }
            if self.model != NicModel::Virtio {
                let text = "only a virtio card tells its driver; set it in the guest";
                bad("mtu", text.into());
            }
        }
        if let Some(queues) = self.queues {
            if !(1..=MAX_NIC_QUEUES).contains(&queues) {
                bad(
                    "queues",
                    format!("is {queues}; expected 1 to {MAX_NIC_QUEUES}"),
                );
            }
            if self.model != NicModel::Virtio {
                bad("queues", "only a virtio card has several".into());
            }
        }
        if self.pcap.as_ref().is_some_and(|p| p.as_os_str().is_empty()) {
            bad("pcap", "expected the path of a file".into());
        }
        let c = &self.cable;
        if c.loss_ppm > LOSS_UNIT {
            bad("cable.loss_ppm", "expected 0 to 100 percent".into());
        }
        if c.delay_ms > MAX_DELAY_MS {
            bad(
                "cable.delay_ms",
                format!("expected at most {MAX_DELAY_MS} ms"),
            );
        }
        for (field, rate) in [("cable.bytes", c.bytes), ("cable.frames", c.frames)] {
            if rate.is_some_and(|r| r.per_second == 0) {
                let text = "expected more than 0 in a second; link=off stops all";
                bad(field, text.into());
            }
        }
    }
}
