//! Network cards on PCI.
//!
//! ```text
//!   guest ─► PciFunction ─► Card ─► Model: registers and rings ─► NetBackend   (guest's thread)
//!            Lifecycle ──────┘        ▲        │
//!                              FrameSink, clock└─► interrupt            (back end's, timer's)
//! ```
//!
//! A [`Model`] is what differs between cards: registers, descriptor rings, receive filter. All that
//! is the same is [`Card`]: configuration space, locking, save and restore, the cable and its
//! counters, and when a back end that waits for buffers is told of them.

use std::sync::{Arc, Mutex, Weak};

use minicbor::{Decode, Encode};
use pyrite_mem::GuestMemory;
use pyrite_net::{Cable, FrameSink, MAX_FRAME_BYTES, NetBackend, Offload};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, EXPANSION_ROM, PciIds, PciInterrupts};
use pyrite_vdev::{
    BarKind, DeviceTimer, Dma, IrqLine, Lifecycle, PciFunction, TimedDevice, VmClock,
};

pub mod e1000;
mod fcs;
mod microwire;
pub mod ne2k;
pub mod rtl8139;
#[cfg(test)]
mod testing;

/// Shortest frame without FCS that a wire carries. IEEE 802.3 §4A.2.3.2.4.
const MIN_FRAME_BYTES: usize = 60;
/// Destination, source and type.
const HEADER_BYTES: usize = 14;
/// Largest option ROM in bytes.
pub const MAX_ROM_BYTES: usize = 1 << 20;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reception {
    /// In the guest's memory.
    Stored,
    /// Not for this guest.
    Filtered,
    /// The guest has no buffers.
    NoRoom,
}

/// What a model may use of its surroundings.
pub struct Host {
    dma: Dma,
    backend: Arc<dyn NetBackend>,
    interrupts: PciInterrupts,
    timer: DeviceTimer,
    link_up: bool,
    /// Between start and pause.
    running: bool,
    /// The back end was told that there is no room.
    starved: bool,
    /// What the interrupt line was told last.
    level: bool,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    rx_frames: u64,
    rx_dropped: u64,
    tx_frames: u64,
    tx_dropped: u64,
}

impl Host {
    /// Guest memory, while the guest lets the card use it and the machine runs.
    pub fn memory(&self) -> Option<Arc<GuestMemory>> {
        let memory = self.dma.memory().ok().filter(|_| self.running)?;
        Some(Arc::clone(memory))
    }
    /// True while the cable is plugged in.
    pub fn link_up(&self) -> bool {
        self.link_up
    }
    /// Guest time in ns.
    pub fn now_ns(&self) -> u64 {
        self.timer.now_ns()
    }
    /// Calls [`Model::timer`] at a time, in place of one given before.
    pub fn set_timer(&self, deadline_ns: Option<u64>) {
        self.timer.set(deadline_ns);
    }
    /// Sends a frame, padded to the least length.
    pub fn transmit(&mut self, frame: &mut Vec<u8>, offload: &Offload) {
        if !self.link_up || frame.len() < HEADER_BYTES {
            self.counters.tx_dropped += 1;
            return;
        }
        if frame.len() < MIN_FRAME_BYTES {
            frame.resize(MIN_FRAME_BYTES, 0);
        }
        self.counters.tx_frames += 1;
        if frame.len() <= MAX_FRAME_BYTES {
            self.backend.transmit_offloaded(frame, offload);
        } else {
            // More than an IP packet: no back end takes it in one piece.
            let backend = &self.backend;
            pyrite_net::offload::complete(frame, offload, &mut |f| backend.transmit(f));
        }
    }
    /// Notes a frame that cannot be sent.
    pub fn dropped(&mut self) {
        self.counters.tx_dropped += 1;
    }
}

/// A kind of network card.
///
/// Everything is called with the card locked. After each call the interrupt line is brought in
/// line with [`Model::interrupt`], and a back end that waits is told if there is room now.
pub trait Model: Send + Sized + 'static {
    /// Kind of the saved section.
    const KIND: &'static str;
    /// Its version.
    const VERSION: u16;
    /// What the card is on PCI.
    const IDS: PciIds;
    /// Its BARs: index, kind, bytes.
    const BARS: &'static [(u8, BarKind, u64)];
    /// The saved form.
    type Saved: Encode<()> + for<'a> Decode<'a, ()>;

    /// A card in its power-on state.
    fn new(mac: Mac) -> Self;
    /// Brings it into that state; the cable stays.
    fn power_on(&mut self, link_up: bool);
    /// Load from a BAR.
    fn read(&mut self, host: &mut Host, bar: u8, offset: u64, data: &mut [u8]);
    /// Store to a BAR.
    fn write(&mut self, host: &mut Host, bar: u8, offset: u64, data: &[u8]);
    /// Guest memory can be used now, perhaps: goes on with what waits.
    fn resume(&mut self, host: &mut Host);
    /// The deadline of [`Host::set_timer`] has come.
    fn timer(&mut self, host: &mut Host, now_ns: u64);
    /// The cable was plugged in or out.
    fn link_changed(&mut self, host: &mut Host);
    /// True if a frame of an ordinary length would be stored.
    fn can_receive(&self, host: &Host) -> bool;

    /// A frame waits on the cable because the card has no room. A card whose driver may have
    /// overlooked what is in a full ring tells it once more: no frame will come to do that.
    fn frame_waits(&mut self) {}
    /// A frame for the guest, at least 60 bytes long.
    fn receive(&mut self, host: &mut Host, frame: &[u8]) -> Reception;
    /// The level of the interrupt line.
    fn interrupt(&mut self, host: &mut Host) -> bool;
    /// The address that the card answers to now.
    fn mac(&self) -> Mac;
    /// The state.
    fn save(&self) -> Self::Saved;
    /// Takes a state over; says what is wrong with it.
    fn restore(&mut self, saved: Self::Saved) -> Result<(), String>;
    /// What a person may see.
    fn inspect(&self) -> Inspect;
}

struct State<M> {
    model: M,
    host: Host,
}

impl<M: Model> State<M> {
    /// Runs `act` and does what follows from it.
    fn act<T>(&mut self, act: impl FnOnce(&mut M, &mut Host) -> T) -> T {
        let State { model, host } = self;
        let result = act(model, host);
        let waits = host.starved && host.running;
        if waits && !model.can_receive(host) {
            model.frame_waits();
        }
        let level = model.interrupt(host);
        if level != host.level {
            host.level = level;
            host.interrupts.set_intx(level);
        }
        if host.starved && host.running && model.can_receive(host) {
            host.starved = false;
            host.backend.receive_ready();
        }
        result
    }

    fn receive(&mut self, frame: &[u8]) -> bool {
        let fits = (HEADER_BYTES..=MAX_FRAME_BYTES).contains(&frame.len());
        if !fits || !self.host.link_up || !self.host.running {
            self.host.counters.rx_dropped += 1;
            return false;
        }
        let mut padded = [0; MIN_FRAME_BYTES];
        let frame = match padded.get_mut(..frame.len()) {
            Some(start) => {
                start.copy_from_slice(frame);
                &padded
            }
            None => frame,
        };
        // Set first, so that `act` does not tell the back end of room that it still has.
        self.host.starved = false;
        let reception = self.act(|model, host| model.receive(host, frame));
        match reception {
            Reception::Stored => self.host.counters.rx_frames += 1,
            Reception::Filtered => {}
            Reception::NoRoom => {
                self.host.counters.rx_dropped += 1;
                self.host.starved = true;
            }
        }
        reception != Reception::NoRoom
    }
}

impl<M: Model> TimedDevice for State<M> {
    fn timer_fired(&mut self, now_ns: u64) {
        self.act(|model, host| model.timer(host, now_ns));
    }
}

/// The end of the cable at the card.
struct Plug<M>(Weak<Mutex<State<M>>>);

impl<M: Model> FrameSink for Plug<M> {
    fn receive(&self, frame: &[u8]) -> bool {
        self.0.upgrade().is_some_and(|s| lock(&s).receive(frame))
    }
    fn ready(&self) -> bool {
        let Some(state) = self.0.upgrade() else {
            return false;
        };
        let mut s = lock(&state);
        let ready = s.host.running && s.model.can_receive(&s.host);
        if !ready && !std::mem::replace(&mut s.host.starved, true) {
            s.act(|_, _| ());
        }
        ready
    }
}

struct CardCable<M>(Weak<Mutex<State<M>>>);

impl<M: Model> Cable for CardCable<M> {
    fn set_link(&self, up: bool) {
        let Some(state) = self.0.upgrade() else {
            return;
        };
        let mut s = lock(&state);
        if std::mem::replace(&mut s.host.link_up, up) != up {
            s.act(Model::link_changed);
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved<T> {
    #[n(0)]
    config: ConfigSaved,
    #[n(1)]
    link_up: bool,
    #[n(2)]
    model: T,
}

/// How a card is built.
pub struct CardConfig {
    /// Name of the unit.
    pub unit: String,
    /// Its own address; not multicast.
    pub mac: Mac,
    /// Option ROM, at most [`MAX_ROM_BYTES`]; none if empty.
    pub rom: Vec<u8>,
}

/// A card: a PCI function and a unit of the machine.
pub struct Card<M> {
    unit: String,
    config: ConfigSpace,
    rom: Vec<u8>,
    // LOCK ORDER: Card < this < back end's queues, interrupt controllers.
    state: Arc<Mutex<State<M>>>,
}

impl<M: Model> Card<M> {
    /// A card plugged into `backend`.
    pub fn new(
        card: CardConfig,
        backend: Arc<dyn NetBackend>,
        memory: Arc<GuestMemory>,
        clock: &Arc<VmClock>,
        intx: IrqLine,
    ) -> Arc<Mutex<Card<M>>> {
        let CardConfig { unit, mac, mut rom } = card;
        let mut config = ConfigSpace::new(M::IDS);
        for (index, kind, bytes) in M::BARS {
            config.add_bar(*index, *kind, *bytes);
        }
        rom.truncate(MAX_ROM_BYTES);
        if !rom.is_empty() {
            config.add_rom(rom.len().next_power_of_two().max(2048) as u64);
        }
        config.set_intx(0, intx);
        let state = Arc::new_cyclic(|me| {
            Mutex::new(State {
                model: M::new(mac),
                host: Host {
                    dma: Dma::new(memory, config.bus_master()),
                    backend: Arc::clone(&backend),
                    interrupts: config.interrupts(),
                    timer: DeviceTimer::new(clock, me),
                    link_up: true,
                    running: false,
                    starved: false,
                    level: false,
                    counters: Counters::default(),
                },
            })
        });
        lock(&state).model.power_on(true);
        backend.attach(Arc::new(Plug(Arc::downgrade(&state))));
        Arc::new(Mutex::new(Card {
            unit,
            config,
            rom,
            state,
        }))
    }

    /// The cable.
    pub fn cable(&self) -> Arc<dyn Cable> {
        Arc::new(CardCable(Arc::downgrade(&self.state)))
    }
}

impl<M: Model> PciFunction for Card<M> {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        // Bus mastering may be on now.
        lock(&self.state).act(Model::resume);
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        if index == EXPANSION_ROM {
            for (at, b) in (offset..).zip(data) {
                let byte = usize::try_from(at).ok().and_then(|at| self.rom.get(at));
                *b = byte.copied().unwrap_or(0xff);
            }
            return;
        }
        lock(&self.state).act(|model, host| model.read(host, index, offset, data));
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        if index != EXPANSION_ROM {
            lock(&self.state).act(|model, host| model.write(host, index, offset, data));
        }
    }
}

impl<M: Model> Lifecycle for Card<M> {
    fn unit(&self) -> &str {
        &self.unit
    }
    fn start(&mut self) {
        let backend = {
            let mut s = lock(&self.state);
            s.host.running = true;
            s.act(Model::resume);
            // It may have asked while the machine stood still.
            s.host.starved = true;
            Arc::clone(&s.host.backend)
        };
        backend.pause(false);
        lock(&self.state).act(|_, _| {});
    }
    fn pause(&mut self) {
        let backend = {
            let mut s = lock(&self.state);
            s.host.running = false;
            Arc::clone(&s.host.backend)
        };
        backend.pause(true);
    }
    fn drained(&mut self) -> bool {
        true
    }
    fn reset(&mut self) {
        self.config.reset();
        let mut s = lock(&self.state);
        let State { model, host } = &mut *s;
        host.level = false;
        host.set_timer(None);
        model.power_on(host.link_up);
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let s = lock(&self.state);
        let saved = Saved {
            config: self.config.save(),
            link_up: s.host.link_up,
            model: s.model.save(),
        };
        Ok(Section::new(&self.unit, M::KIND, M::VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let Saved {
            config,
            link_up,
            model,
        } = section
            .decode::<Saved<M::Saved>>(M::KIND, M::VERSION)
            .inspect_err(|_| self.reset())?;
        self.reset();
        let was_up = lock(&self.state).host.link_up;
        let restored = self.config.restore(&config).and_then(|()| {
            let mut s = lock(&self.state);
            s.host.link_up = link_up;
            s.model.restore(model)?;
            // The configuration space has driven the line; the model agrees with it.
            s.host.level = config.intx_level;
            s.act(|_, _| {});
            Ok(())
        });
        restored.map_err(|detail| {
            lock(&self.state).host.link_up = was_up;
            self.reset();
            StateError::Invalid {
                unit: self.unit.clone(),
                detail,
            }
        })
    }
    fn inspect(&self) -> Inspect {
        let s = lock(&self.state);
        let [m0, m1, m2, m3, m4, m5] = s.model.mac();
        let mac = format!("{m0:02x}:{m1:02x}:{m2:02x}:{m3:02x}:{m4:02x}:{m5:02x}");
        let Counters {
            rx_frames,
            rx_dropped,
            tx_frames,
            tx_dropped,
        } = &s.host.counters;
        Inspect::node([
            ("pci", self.config.inspect()),
            ("mac", Inspect::Text(mac)),
            ("link_up", Inspect::Bool(s.host.link_up)),
            ("rx_frames", Inspect::Uint(*rx_frames)),
            ("rx_dropped", Inspect::Uint(*rx_dropped)),
            ("tx_frames", Inspect::Uint(*tx_frames)),
            ("tx_dropped", Inspect::Uint(*tx_dropped)),
            ("registers", s.model.inspect()),
        ])
    }
}
