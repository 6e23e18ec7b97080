//! Network cards, their cables and what they are plugged into.

use std::sync::Arc;
use std::time::Duration;

use pyrite_api::v1::{
    CableSpec, NetSpec, NicBackend, NicModel, NicSpec, Protocol, RateSpec, VmSpec,
};
use pyrite_devices::net::e1000::E1000;
use pyrite_devices::net::ne2k::Ne2k;
use pyrite_devices::net::rtl8139::Rtl8139;
use pyrite_devices::net::{Card, CardConfig, Model};
use pyrite_net::capture::Capture;
use pyrite_net::open::Open;
use pyrite_net::shaper::{Rate, Shape, Shaper};
use pyrite_net::switch::SwitchCable;
use pyrite_net::tap::Tap;
use pyrite_net::usernet::{Forward, ForwardProtocol, Usernet, UsernetConfig};
use pyrite_net::{Cable, NetBackend};
use pyrite_vdev::bus::lock;
use pyrite_virtio::{Net, NetConfig};

use super::{AssemblyError, Machine, Slots, host, input};

/// Plugs the network cards of a specification into slots; their cables.
pub(super) fn plug(
    spec: &VmSpec,
    slots: &mut Slots<'_>,
) -> Result<Vec<Arc<dyn Cable>>, AssemblyError> {
    let mut cables = Vec::new();
    let cards = spec.net.all_cards();
    // Ports of the host lead into the first card that has a user network.
    let first_user = cards.iter().position(|c| c.backend == NicBackend::User);
    for (n, card) in cards.iter().enumerate() {
        let backend: Arc<dyn NetBackend> = match &card.backend {
            NicBackend::User => user_network(&spec.net, first_user == Some(n))?,
            NicBackend::None => Arc::new(Open),
            NicBackend::Tap(name) => Arc::new(Tap::open(name).map_err(|e| {
                let what = match e.raw_os_error() {
                    Some(libc::EPERM) => format!(
                        "{e}; make it for this user: ip tuntap add {name} mode tap user NAME"
                    ),
                    Some(libc::EBUSY) => format!("{e}; another program has it open"),
                    _ => e.to_string(),
                };
                input(backend_field(n), format!("TAP interface {name}: {what}"))
            })?),
            NicBackend::TapFd(fd) => Arc::new(Tap::inherited(*fd).map_err(|e| {
                input(
                    backend_field(n),
                    format!("TAP interface at descriptor {fd}: {e}"),
                )
            })?),
            NicBackend::Switch(path) => Arc::new(SwitchCable::connect(path).map_err(|e| {
                let path = path.display();
                let what =
                    format!("no switch listens at {path}: {e}; start one: pyrite switch {path}");
                input(backend_field(n), what)
            })?),
        };
        let backend = cable(n, card, backend)?;
        let mac = card.mac_of(n);
        let link: Arc<dyn Cable> = match card.model {
            NicModel::Virtio => {
                let mut config = NetConfig::new(mac);
                config.mtu = card.mtu.unwrap_or(config.mtu);
                config.pairs = card.queues.unwrap_or(config.pairs);
                let net = Net::new(backend, config);
                let control = net.control();
                slots.plug(&format!("virtio-net{n}"), Box::new(net))?;
                Arc::new(control)
            }
            NicModel::E1000 => plug_card::<E1000>(n, mac, backend, slots)?,
            NicModel::Rtl8139 => plug_card::<Rtl8139<true>>(n, mac, backend, slots)?,
            NicModel::Ne2kPci => plug_card::<Ne2k>(n, mac, backend, slots)?,
            NicModel::Rtl8139c => plug_card::<Rtl8139<false>>(n, mac, backend, slots)?,
        };
        slots.name_boot_device(format!("net{n}"), "ethernet", "/ethernet-phy@0");
        if card.cable.unplugged {
            link.set_link(false);
        }
        cables.push(link);
    }
    Ok(cables)
}

fn backend_field(n: usize) -> String {
    format!("net.cards[{n}].backend")
}

fn plug_card<M: Model>(
    n: usize,
    mac: [u8; 6],
    backend: Arc<dyn NetBackend>,
    slots: &mut Slots<'_>,
) -> Result<Arc<dyn Cable>, AssemblyError> {
    let config = CardConfig {
        unit: format!("{}-{n}", M::KIND),
        mac,
        rom: Vec::new(),
    };
    let (memory, clock) = (Arc::clone(slots.memory), Arc::clone(slots.clock));
    let mut cable = None;
    slots.plug_function(|line| {
        let card = Card::<M>::new(config, backend, memory, &clock, line);
        cable = Some(lock(&card).cable());
        card
    })?;
    cable.ok_or_else(|| AssemblyError::Host(anyhow::anyhow!("a network card has no cable")))
}

/// What is between card `n` and its back end: the capture is at the card.
fn cable(
    n: usize,
    card: &NicSpec,
    mut backend: Arc<dyn NetBackend>,
) -> Result<Arc<dyn NetBackend>, AssemblyError> {
    let shape = shape(&card.cable);
    if !shape.is_none() {
        let shaper = Shaper::new(backend, &shape);
        backend = Arc::new(shaper.map_err(|e| host("cable of a network card")(e.into()))?);
    }
    if let Some(path) = &card.pcap {
        let capture = Capture::new(backend, path, &format!("net{n}")).map_err(|e| {
            let field = format!("net.cards[{n}].pcap");
            input(field, format!("{}: {e}", path.display()))
        })?;
        backend = Arc::new(capture);
    }
    Ok(backend)
}

fn shape(cable: &CableSpec) -> Shape {
    let rate = |r: Option<RateSpec>| {
        r.map(|r| Rate {
            per_second: r.per_second,
            burst: r.burst,
        })
    };
    Shape {
        bytes: rate(cable.bytes),
        frames: rate(cable.frames),
        loss_ppm: cable.loss_ppm,
        delay: Duration::from_millis(cable.delay_ms.into()),
        seed: cable.seed,
    }
}

fn user_network(spec: &NetSpec, forwards: bool) -> Result<Arc<dyn NetBackend>, AssemblyError> {
    let forward = |f: &pyrite_api::v1::ForwardSpec| Forward {
        protocol: match f.protocol {
            Protocol::Tcp => ForwardProtocol::Tcp,
            Protocol::Udp => ForwardProtocol::Udp,
        },
        listen: (f.host_addr, f.host_port).into(),
        guest: None,
        guest_port: f.guest_port,
    };
    let forwards = spec.forwards.iter().filter(|_| forwards);
    let config = UsernetConfig {
        forwards: forwards.map(forward).collect(),
        host_loopback: spec.host_loopback,
        ..UsernetConfig::default()
    };
    let net = Usernet::new(config).map_err(|e| input("net.forwards", e.to_string()))?;
    Ok(Arc::new(net))
}

impl Machine {
    /// Plugs the cable of a network card in or out.
    pub fn set_link(&self, card: usize, up: bool) -> anyhow::Result<()> {
        let Some(cable) = self.cables.get(card) else {
            anyhow::bail!(
                "this VM has no network card {card}; it has {} (see --net)",
                self.cables.len()
            );
        };
        cable.set_link(up);
        Ok(())
    }
}
