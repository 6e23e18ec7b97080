//! Commands on the control queue and the receive filter. virtio 1.3 §5.1.6.5.

use minicbor::{Decode, Encode};

use super::Card;
use crate::link::DriverLink;
use crate::queue::Chain;

const VIRTIO_NET_OK: u8 = 0;
const VIRTIO_NET_ERR: u8 = 1;

const VIRTIO_NET_CTRL_RX: u8 = 0;
const VIRTIO_NET_CTRL_MAC: u8 = 1;
const VIRTIO_NET_CTRL_MAC_TABLE_SET: u8 = 0;
const VIRTIO_NET_CTRL_MAC_ADDR_SET: u8 = 1;
const VIRTIO_NET_CTRL_ANNOUNCE: u8 = 3;
const VIRTIO_NET_CTRL_ANNOUNCE_ACK: u8 = 0;
const VIRTIO_NET_CTRL_MQ: u8 = 4;
const VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: u8 = 0;
const VIRTIO_NET_CTRL_GUEST_OFFLOADS: u8 = 5;
const VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET: u8 = 0;

/// LIMIT: addresses kept of one table; more make the filter let all of that kind through.
const MAX_TABLE: usize = 64;
/// LIMIT: bytes of one command that are read.
const MAX_COMMAND_BYTES: usize = 16 << 10;

type Mac = [u8; 6];

/// Which frames are for the guest. Starts promiscuous, as §5.1.6.5.1 recommends nothing else for
/// drivers that send no command.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Filter {
    #[n(0)]
    promisc: bool,
    #[n(1)]
    allmulti: bool,
    #[n(2)]
    alluni: bool,
    #[n(3)]
    nomulti: bool,
    #[n(4)]
    nouni: bool,
    #[n(5)]
    nobcast: bool,
    #[n(6)]
    unicast: Vec<Mac>,
    #[n(7)]
    multicast: Vec<Mac>,
    #[n(8)]
    unicast_overflow: bool,
    #[n(9)]
    multicast_overflow: bool,
}

impl Default for Filter {
    fn default() -> Self {
        Filter {
            promisc: true,
            allmulti: false,
            alluni: false,
            nomulti: false,
            nouni: false,
            nobcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            unicast_overflow: false,
            multicast_overflow: false,
        }
    }
}

impl Filter {
    /// True if every frame is let through.
    pub(super) fn promiscuous(&self) -> bool {
        self.promisc
    }

    /// False for a saved filter that no command could have made.
    pub(super) fn valid(&self) -> bool {
        self.unicast.len() <= MAX_TABLE && self.multicast.len() <= MAX_TABLE
    }

    /// True if `frame` is for the card with address `mac`.
    pub(super) fn accepts(&self, mac: &Mac, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else {
            return false;
        };
        if self.promisc {
            return true;
        }
        if *to == [0xff; 6] {
            return !self.nobcast;
        }
        if to[0] & 1 != 0 {
            return !self.nomulti
                && (self.allmulti || self.multicast_overflow || self.multicast.contains(to));
        }
        !self.nouni
            && (self.alluni || self.unicast_overflow || to == mac || self.unicast.contains(to))
    }

    fn set_mode(&mut self, command: u8, on: bool) -> u8 {
        let mode = match command {
            0 => &mut self.promisc,
            1 => &mut self.allmulti,
            2 => &mut self.alluni,
            3 => &mut self.nomulti,
            4 => &mut self.nouni,
            5 => &mut self.nobcast,
            _ => return VIRTIO_NET_ERR,
        };
        *mode = on;
        VIRTIO_NET_OK
    }

    /// Two tables, each a count and addresses.
    fn set_tables(&mut self, data: &[u8]) -> Option<()> {
        let (unicast, unicast_overflow, rest) = parse_table(data)?;
        let (multicast, multicast_overflow, _) = parse_table(rest)?;
        (self.unicast, self.unicast_overflow) = (unicast, unicast_overflow);
        (self.multicast, self.multicast_overflow) = (multicast, multicast_overflow);
        Some(())
    }
}

fn parse_table(data: &[u8]) -> Option<(Vec<Mac>, bool, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (table, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    if count > MAX_TABLE {
        return Some((Vec::new(), true, rest));
    }
    Some((table.as_chunks::<6>().0.to_vec(), false, rest))
}

/// What commands may ask for.
pub(super) struct Limits {
    /// Queue pairs.
    pub(super) pairs: u16,
    /// Offloads that were negotiated.
    pub(super) offloads: u64,
}

/// Executes the command in `chain` and returns the acknowledgement.
pub(super) fn execute(link: &DriverLink, chain: &Chain, card: &mut Card, limits: &Limits) -> u8 {
    let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
    if len > MAX_COMMAND_BYTES {
        return VIRTIO_NET_ERR;
    }
    let mut bytes = vec![0; len];
    let n = chain.read_at(link.memory(), 0, &mut bytes);
    match bytes.get(..n) {
        Some(&[VIRTIO_NET_CTRL_RX, command, on]) => card.filter.set_mode(command, on != 0),
        Some(
            [
                VIRTIO_NET_CTRL_MAC,
                VIRTIO_NET_CTRL_MAC_TABLE_SET,
                tables @ ..,
            ],
        ) => match card.filter.set_tables(tables) {
            Some(()) => VIRTIO_NET_OK,
            None => VIRTIO_NET_ERR,
        },
        Some(
            &[
                VIRTIO_NET_CTRL_MAC,
                VIRTIO_NET_CTRL_MAC_ADDR_SET,
                a,
                b,
                c,
                d,
                e,
                f,
            ],
        ) => {
            card.mac = [a, b, c, d, e, f];
            VIRTIO_NET_OK
        }
        Some(&[VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK]) => {
            card.announce = false;
            VIRTIO_NET_OK
        }
        Some(
            &[
                VIRTIO_NET_CTRL_MQ,
                VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
                low,
                high,
            ],
        ) => {
            let pairs = u16::from_le_bytes([low, high]);
            if pairs == 0 || pairs > limits.pairs {
                return VIRTIO_NET_ERR;
            }
            card.pairs = pairs;
            VIRTIO_NET_OK
        }
        Some(
            [
                VIRTIO_NET_CTRL_GUEST_OFFLOADS,
                VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
                offloads @ ..,
            ],
        ) => match offloads.first_chunk() {
            Some(o) if u64::from_le_bytes(*o) & !limits.offloads == 0 => {
                card.offloads = u64::from_le_bytes(*o);
                VIRTIO_NET_OK
            }
            _ => VIRTIO_NET_ERR,
        },
        _ => VIRTIO_NET_ERR,
    }
}
