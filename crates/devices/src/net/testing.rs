//! What tests of network cards share: memory, a back end, an interrupt line, a clock.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use pyrite_mem::GuestMemory;
use pyrite_net::{FrameSink, NetBackend, Offload};
use pyrite_vdev::bus::lock;
use pyrite_vdev::conformance::{self, Target, fuzz_device, pseudo_random};
use pyrite_vdev::{IrqLine, IrqSink, Lifecycle, PciFunction, VmClock};

use super::{Card, CardConfig, Mac, Model};

pub(crate) const MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const RAM_BYTES: u64 = 4 << 20;

/// The other end of the cable.
#[derive(Default)]
pub(crate) struct Wire {
    pub(crate) sent: Mutex<Vec<(Vec<u8>, Offload)>>,
    sink: OnceLock<Arc<dyn FrameSink>>,
    /// How often it was told that there is room.
    pub(crate) told: AtomicUsize,
    pub(crate) paused: AtomicBool,
}

impl NetBackend for Wire {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        let _ = self.sink.set(sink);
    }
    fn transmit(&self, frame: &[u8]) {
        self.transmit_offloaded(frame, &Offload::NONE);
    }
    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        lock(&self.sent).push((frame.to_vec(), *offload));
    }
    fn receive_ready(&self) {
        self.told.fetch_add(1, Ordering::SeqCst);
    }
    fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Line(AtomicBool);

impl IrqSink for Line {
    fn set_level(&self, _: u32, level: bool) {
        self.0.store(level, Ordering::SeqCst);
    }
}

/// A card with everything around it.
pub(crate) struct Rig<M: Model> {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) wire: Arc<Wire>,
    pub(crate) clock: Arc<VmClock>,
    line: Arc<Line>,
    pub(crate) card: Arc<Mutex<Card<M>>>,
}

impl<M: Model> Rig<M> {
    pub(crate) fn new() -> Rig<M> {
        Rig::with(
            Arc::new(GuestMemory::new(RAM_BYTES).expect("memory")),
            Arc::default(),
        )
    }

    pub(crate) fn with(memory: Arc<GuestMemory>, clock: Arc<VmClock>) -> Rig<M> {
        let wire: Arc<Wire> = Arc::default();
        let line: Arc<Line> = Arc::default();
        let config = CardConfig {
            unit: "net0".into(),
            mac: MAC,
            rom: Vec::new(),
        };
        let intx = IrqLine::new(line.clone(), 16);
        let card = Card::new(config, wire.clone(), memory.clone(), &clock, intx);
        Rig {
            memory,
            wire,
            clock,
            line,
            card,
        }
    }

    /// Decoding and bus mastering on, running.
    pub(crate) fn up(self) -> Rig<M> {
        lock(&self.card).config_write(4, &7_u16.to_le_bytes());
        lock(&self.card).start();
        self
    }

    pub(crate) fn read(&self, bar: u8, at: u64) -> u32 {
        let mut b = [0; 4];
        lock(&self.card).bar_read(bar, at, &mut b);
        u32::from_le_bytes(b)
    }
    pub(crate) fn write(&self, bar: u8, at: u64, v: u32) {
        lock(&self.card).bar_write(bar, at, &v.to_le_bytes());
    }
    pub(crate) fn deliver(&self, frame: &[u8]) -> bool {
        self.wire.sink.get().expect("attached").receive(frame)
    }
    pub(crate) fn ready(&self) -> bool {
        self.wire.sink.get().expect("attached").ready()
    }
    pub(crate) fn line(&self) -> bool {
        self.line.0.load(Ordering::SeqCst)
    }
    pub(crate) fn told(&self) -> usize {
        self.wire.told.swap(0, Ordering::SeqCst)
    }
    pub(crate) fn sent(&self) -> Vec<(Vec<u8>, Offload)> {
        std::mem::take(&mut *lock(&self.wire.sent))
    }
    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).expect("RAM");
        b
    }

    /// The state moves to a new card over the same memory, which goes on.
    pub(crate) fn move_state(&self) -> Rig<M> {
        let clock: Arc<VmClock> = Arc::default();
        clock.set_ns(self.clock.now_ns());
        let next = Rig::with(self.memory.clone(), clock);
        conformance::state_moves(&mut *lock(&self.card), &mut *lock(&next.card));
        assert_eq!(next.line(), self.line(), "interrupt line");
        lock(&next.card).start();
        next
    }
}

/// A frame to `to` of `len` bytes.
pub(crate) fn frame(to: Mac, len: usize) -> Vec<u8> {
    let mut f = to.to_vec();
    f.extend_from_slice(&[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    f.extend((14..len).map(|n| (n * 3) as u8));
    f
}

/// The rules for every device, and a hostile driver while frames come, states are moved and the
/// cable is pulled. `hot`: BAR, offset and size of the registers where most happens.
pub(crate) fn conforms<M: Model>(hot: &[(u8, u64, usize)]) {
    let rig: Rig<M> = Rig::new();
    conformance::reset_is_idempotent(&mut *lock(&rig.card));
    conformance::damaged_state_is_survived(&mut *lock(&rig.card), &pseudo_random(5, 20_000));
    for seed in 0..24 {
        let rig: Rig<M> = Rig::<M>::new().up();
        // Rings are read from there, wherever the driver says they are.
        let noise = pseudo_random(seed + 1000, 64 << 10);
        for at in (0..RAM_BYTES).step_by(64 << 10) {
            rig.memory.write(at, &noise).expect("RAM");
        }
        let (sink, wire) = (rig.wire.sink.get().expect("attached").clone(), &rig.wire);
        let clock = rig.clock.clone();
        let cable = lock(&rig.card).cable();
        let mut events = Vec::new();
        let input = pseudo_random(seed, 30_000);
        // The device is locked by the rig: what comes from outside is played in between.
        for part in input.chunks(60) {
            fuzz_device(Target::Pci(&mut *lock(&rig.card)), part, |b| events.push(b));
            for b in events.drain(..) {
                let (bar, at, size) = hot[usize::from(b) % hot.len()];
                // Small numbers, addresses in RAM, anything.
                let raw = u32::from_le_bytes([part[0], part[1], part[2], b]);
                let value = [
                    raw & 0xff,
                    raw & 0x3f_fff0,
                    raw,
                    u32::MAX,
                    raw & 0xfff,
                    0x7fff_fffe,
                ];
                let value = value[usize::from(part[3]) % value.len()].to_le_bytes();
                lock(&rig.card).bar_write(bar, at, &value[..size]);
                match b % 8 {
                    0 => clock.advance(u64::from(b) * 1000),
                    1 => {
                        sink.receive(&frame([0xff; 6], usize::from(b) * 8));
                    }
                    2 => {
                        sink.receive(&noise[..usize::from(b)]);
                    }
                    3 if b > 200 => cable.set_link(b & 16 == 0),
                    4 => {
                        sink.ready();
                    }
                    _ => {}
                }
            }
            lock(&wire.sent).clear();
        }
        let next = rig.move_state();
        next.clock.advance(1_000_000_000);
        lock(&next.card).pause();
        lock(&next.card).reset();
        assert!(!next.line(), "a reset releases the line");
    }
}
