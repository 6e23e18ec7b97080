//! A small driver.

use std::collections::HashMap;

use super::super::ring::Trb;
use super::*;

pub(super) const CONTEXTS: u64 = 0x1000;
const SEGMENTS: u64 = 0x1800;
const COMMANDS: u64 = 0x2000;
pub(super) const EVENT_RING: u64 = 0x3000;
pub(super) const INPUT: u64 = 0x4000;
const DEVICES: u64 = 0x5000;
const RINGS: u64 = 0x2_0000;
/// Places of the event ring.
pub(super) const EVENTS: u64 = 16;
/// Blocks of other rings, the last of which is a link.
const BLOCKS: u64 = 32;
/// Slots that are enabled.
pub(super) const SLOTS: u8 = 5;
/// Device context indexes: endpoints 81H and 02H.
pub(super) const REPORTS: u8 = 3;
pub(super) const IN_PIPE: u8 = 3;
pub(super) const OUT_PIPE: u8 = 4;

/// A ring that the driver fills.
#[derive(Clone, Copy)]
struct Ring {
    base: u64,
    at: u64,
    cycle: u32,
}

pub(super) struct Driver {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) clock: Arc<VmClock>,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) xhci: Arc<Mutex<Xhci>>,
    pub(super) disk: Arc<MemDisk>,
    rings: HashMap<(u8, u8), Ring>,
    event: u64,
    event_cycle: u32,
}

/// A command block wrapper; `data` is negative if they go to the device.
pub(super) fn wrapper(tag: u32, data: i32, cdb: &[u8]) -> Vec<u8> {
    let mut b = b"USBC".to_vec();
    b.extend(tag.to_le_bytes());
    b.extend(data.unsigned_abs().to_le_bytes());
    b.extend([if data > 0 { 0x80 } else { 0 }, 0, cdb.len() as u8]);
    b.extend(cdb);
    b.resize(31, 0);
    b
}

impl Driver {
    pub(super) fn new() -> Driver {
        let mut content = vec![0; 8 << 20];
        for (n, block) in content.chunks_mut(512).enumerate() {
            block[0] = n as u8;
        }
        Driver::with(memory(), Arc::new(MemDisk::with_content(content, false)))
    }

    pub(super) fn with(memory: Arc<GuestMemory>, disk: Arc<MemDisk>) -> Driver {
        let interrupts = Arc::new(Interrupts::default());
        let clock: Arc<VmClock> = Arc::default();
        let identity = Identity {
            vendor: "PYRITE".into(),
            product: "HARDDISK".into(),
            revision: "1.0".into(),
            serial: "0123456789AB".into(),
        };
        let unit = Unit::new(Kind::Disk(disk.clone()), identity, false);
        let devices: Vec<Box<dyn UsbDevice>> = vec![
            Box::new(Keyboard::new()),
            Box::new(Tablet::new()),
            Box::new(Storage::new(unit)),
        ];
        let xhci = Xhci::new(
            "xhci0",
            devices,
            memory.clone(),
            &clock,
            interrupts.clone(),
            interrupts.line(),
        );
        Driver {
            memory,
            clock,
            interrupts,
            xhci,
            disk,
            rings: HashMap::new(),
            event: 0,
            event_cycle: 1,
        }
    }

    /// This driver, on another controller.
    pub(super) fn moved_to(self, other: Driver) -> Driver {
        Driver {
            rings: self.rings,
            event: self.event,
            event_cycle: self.event_cycle,
            ..other
        }
    }

    pub(super) fn read(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        lock(&self.xhci).bar_read(0, at, &mut b);
        u32::from_le_bytes(b)
    }
    pub(super) fn write(&self, at: u64, v: u32) {
        lock(&self.xhci).bar_write(0, at, &v.to_le_bytes());
    }
    pub(super) fn write64(&self, at: u64, v: u64) {
        lock(&self.xhci).bar_write(0, at, &v.to_le_bytes());
    }
    pub(super) fn write_words(&self, at: u64, words: &[u32]) {
        for (n, w) in (0..).zip(words) {
            self.memory.write(at + 4 * n, &w.to_le_bytes()).unwrap();
        }
    }
    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }

    /// Resets and starts the controller, and leaves what happened to ports in the event ring.
    pub(super) fn start(&mut self) {
        enable(&self.xhci);
        lock(&self.xhci).start();
        self.write(0x40, 2);
        assert_eq!((self.read(0x40) & 2, self.read(0x44) & 0x800), (0, 0));
        self.rings.clear();
        (self.event, self.event_cycle) = (0, 1);
        self.memory
            .fill_zero(CONTEXTS, 0x4_0000 - CONTEXTS)
            .unwrap();
        let segment = [EVENT_RING as u32, 0, EVENTS as u32, 0];
        self.write_words(SEGMENTS, &segment);
        for n in 1..=u64::from(SLOTS) {
            let context = DEVICES + 0x400 * n;
            self.memory
                .write(CONTEXTS + 8 * n, &context.to_le_bytes())
                .unwrap();
        }
        self.write(0x78, SLOTS.into());
        self.write64(0x70, CONTEXTS);
        let ring = self.ring(0, 0).base;
        self.write64(0x58, ring | 1);
        self.write(0x1028, 1);
        self.write64(0x1038, EVENT_RING);
        self.write64(0x1030, SEGMENTS);
        self.write(0x40, 1);
    }

    pub(super) fn up(mut self) -> Driver {
        self.start();
        self
    }

    pub(super) fn port(&self, n: u64) -> u32 {
        self.read(0x430 + 16 * n)
    }
    pub(super) fn write_port(&self, n: u64, v: u32) {
        self.write(0x430 + 16 * n, v);
    }
    pub(super) fn reset_port(&self, n: u64) {
        self.write_port(n, 0x210);
    }

    fn ring(&mut self, slot: u8, endpoint: u8) -> &mut Ring {
        let base = match slot {
            0 => COMMANDS,
            _ => RINGS + 0x2000 * u64::from(slot) + 0x400 * u64::from(endpoint),
        };
        let memory = &self.memory;
        self.rings.entry((slot, endpoint)).or_insert_with(|| {
            memory.fill_zero(base, 16 * BLOCKS).unwrap();
            Ring {
                base,
                at: 0,
                cycle: 1,
            }
        })
    }

    pub(super) fn ring_at(&mut self, slot: u8, endpoint: u8) -> u64 {
        let ring = self.ring(slot, endpoint);
        ring.base + 16 * ring.at
    }

    /// Puts a block into a ring.
    pub(super) fn put(&mut self, slot: u8, endpoint: u8, (a, b, c): (u64, u32, u32)) {
        let ring = *self.ring(slot, endpoint);
        let at = ring.base + 16 * ring.at;
        self.write_words(at, &[a as u32, (a >> 32) as u32, b, c | ring.cycle]);
        let mut next = Ring {
            at: ring.at + 1,
            ..ring
        };
        if next.at == BLOCKS - 1 {
            let link = ring.base + 16 * next.at;
            // The chain goes on over the link.
            let flags = 6 << 10 | 2 | c & 1 << 4 | ring.cycle;
            self.write_words(link, &[ring.base as u32, 0, 0, flags]);
            next.at = 0;
            next.cycle ^= 1;
        }
        *self.ring(slot, endpoint) = next;
    }

    /// A transfer of these pieces that tells its end.
    pub(super) fn normal(&mut self, slot: u8, endpoint: u8, pieces: &[(u64, u32)]) {
        for (n, (at, len)) in pieces.iter().enumerate() {
            let last = n + 1 == pieces.len();
            let flags = if last { 1 << 5 } else { 1 << 4 };
            self.put(slot, endpoint, (*at, *len, 1 << 10 | flags));
        }
    }

    pub(super) fn doorbell(&self, slot: u8, endpoint: u8) {
        self.write(0x2000 + 4 * u64::from(slot), endpoint.into());
    }

    pub(super) fn event_index(&self) -> u64 {
        self.event
    }

    /// The next event.
    pub(super) fn event(&mut self) -> Option<Trb> {
        let b = self.bytes(EVENT_RING + 16 * self.event, 16);
        let word = |n: usize| u32::from_le_bytes([b[n], b[n + 1], b[n + 2], b[n + 3]]);
        let trb = Trb {
            parameter: u64::from(word(4)) << 32 | u64::from(word(0)),
            status: word(8),
            control: word(12),
        };
        if trb.control & 1 != self.event_cycle {
            return None;
        }
        self.event += 1;
        if self.event == EVENTS {
            (self.event, self.event_cycle) = (0, self.event_cycle ^ 1);
        }
        self.end_of_handler(true);
        Some(trb)
    }

    /// Tells how far events were read; `busy`: the handler is at work still.
    pub(super) fn end_of_handler(&self, busy: bool) {
        let clear = if busy { 0 } else { 8 };
        self.write64(0x1038, (EVENT_RING + 16 * self.event) | clear);
    }

    pub(super) fn drain(&mut self) {
        while self.event().is_some() {}
    }

    pub(super) fn queue_command(&mut self, a: u64, b: u32, c: u32) {
        self.put(0, 0, (a, b, c));
        self.doorbell(0, 0);
    }

    /// Does a command: completion code and slot.
    pub(super) fn command(&mut self, a: u64, b: u32, c: u32) -> (u8, u8) {
        self.queue_command(a, b, c);
        loop {
            let e = self.event().expect("command is completed");
            if e.kind() == 33 {
                return ((e.status >> 24) as u8, e.slot());
            }
        }
    }

    pub(super) fn enable_slot(&mut self) -> u8 {
        let (code, slot) = self.command(0, 0, 9 << 10);
        assert_eq!(code, 1);
        slot
    }

    /// An input context for the device at a port, without endpoints.
    pub(super) fn input_context(&self, port: u32) {
        self.memory.fill_zero(INPUT, 33 * 32).unwrap();
        self.write_words(INPUT, &[0, 3]);
        self.write_words(INPUT + 0x20, &[1 << 27, port << 16]);
    }

    pub(super) fn address(&mut self, slot: u8, only_default: bool) -> (u8, u8) {
        self.rings.remove(&(slot, 1));
        let ring = self.ring(slot, 1).base as u32;
        self.write_words(INPUT + 0x40, &[0, 4 << 3 | 64 << 16, ring | 1, 0]);
        let flag = u32::from(only_default) << 9;
        self.command(INPUT, 0, 11 << 10 | flag | u32::from(slot) << 24)
    }

    /// A word of a slot's device context.
    pub(super) fn slot_word(&self, slot: u8, n: u64) -> u32 {
        let at = DEVICES + 0x400 * u64::from(slot) + 4 * n;
        self.memory.read_u32(at).unwrap()
    }

    /// Addresses the device at a port: its slot.
    pub(super) fn plug(&mut self, port: u32) -> u8 {
        self.reset_port(port.into());
        let slot = self.enable_slot();
        self.input_context(port);
        assert_eq!(self.address(slot, false).0, 1);
        self.drain();
        slot
    }

    /// Adds endpoints: device context index and type.
    pub(super) fn configure(&mut self, slot: u8, endpoints: &[(u8, u32)]) {
        self.memory.fill_zero(INPUT, 33 * 32).unwrap();
        let add = endpoints.iter().fold(1, |set, (n, _)| set | 1 << n);
        self.write_words(INPUT, &[0, add]);
        self.write_words(INPUT + 0x20, &[4 << 27]);
        for (n, kind) in endpoints {
            self.rings.remove(&(slot, *n));
            let ring = self.ring(slot, *n).base as u32;
            let at = INPUT + 0x20 * u64::from(n + 1);
            self.write_words(at, &[0, kind << 3 | 512 << 16, ring | 1, 0]);
        }
        let command = 12 << 10 | u32::from(slot) << 24;
        assert_eq!(self.command(INPUT, 0, command).0, 1);
    }

    /// Adds endpoints and sets the device's configuration.
    pub(super) fn open(&mut self, slot: u8, endpoints: &[(u8, u32)]) {
        self.configure(slot, endpoints);
        assert!(self.control_out(slot, 0, 9, 1, 0, &[]));
    }

    /// Brings an endpoint that was halted back, behind the transfer that did it.
    pub(super) fn recover(&mut self, slot: u8, endpoint: u8) {
        let which = u32::from(slot) << 24 | u32::from(endpoint) << 16;
        assert_eq!(self.command(0, 0, 14 << 10 | which).0, 1);
        let ring = *self.ring(slot, endpoint);
        let at = (ring.base + 16 * ring.at) | u64::from(ring.cycle);
        assert_eq!(self.command(at, 0, 16 << 10 | which).0, 1);
    }

    fn setup(&mut self, slot: u8, packet: [u8; 8], kind: u32) {
        let setup = u64::from_le_bytes(packet);
        self.put(slot, 1, (setup, 8, 2 << 10 | 1 << 6 | kind << 16));
    }

    fn packet(kind: u8, request: u8, value: u16, index: u16, len: u16) -> [u8; 8] {
        let [v0, v1] = value.to_le_bytes();
        let [i0, i1] = index.to_le_bytes();
        let [l0, l1] = len.to_le_bytes();
        [kind, request, v0, v1, i0, i1, l0, l1]
    }

    /// The outcome of a control transfer: bytes not moved in its data stage, or `None`.
    fn control_end(&mut self, slot: u8) -> Option<u32> {
        self.doorbell(slot, 1);
        let mut left = 0;
        loop {
            let e = self.event().expect("control transfer is over");
            match e.status >> 24 {
                // The short data stage comes before the status stage.
                13 => left = e.status & 0xff_ffff,
                1 => return Some(left),
                6 => return None,
                code => panic!("completion code {code}"),
            }
        }
    }

    pub(super) fn control_in(
        &mut self,
        slot: u8,
        kind: u8,
        request: u8,
        value: u16,
        index: u16,
        len: u16,
    ) -> Option<Vec<u8>> {
        const AT: u64 = DATA + 0x8000;
        self.setup(slot, Driver::packet(kind, request, value, index, len), 3);
        self.put(slot, 1, (AT, len.into(), 3 << 10 | 1 << 16 | 1 << 2));
        self.put(slot, 1, (0, 0, 4 << 10 | 1 << 5));
        let left = self.control_end(slot)?;
        Some(self.bytes(AT, usize::from(len) - left as usize))
    }

    pub(super) fn control_out(
        &mut self,
        slot: u8,
        kind: u8,
        request: u8,
        value: u16,
        index: u16,
        data: &[u8],
    ) -> bool {
        const AT: u64 = DATA + 0x8000;
        let len = data.len() as u16;
        let packet = Driver::packet(kind, request, value, index, len);
        self.setup(slot, packet, if len > 0 { 2 } else { 0 });
        if len > 0 {
            self.memory.write(AT, data).unwrap();
            self.put(slot, 1, (AT, len.into(), 3 << 10));
        }
        self.put(slot, 1, (0, 0, 4 << 10 | 1 << 16 | 1 << 5));
        self.control_end(slot).is_some()
    }

    /// A transfer on a bulk pipe that succeeds.
    fn bulk(&mut self, slot: u8, endpoint: u8, at: u64, len: u32) {
        self.normal(slot, endpoint, &[(at, len)]);
        self.doorbell(slot, endpoint);
        let e = self.event().expect("transfer is over");
        assert_eq!(e.status, 1 << 24, "{len} bytes on {endpoint}");
    }

    /// A SCSI command with data at [`DATA`], so many to the host or, negative, to the device, in
    /// transfers of these lengths or in one: status and residue.
    pub(super) fn scsi(&mut self, slot: u8, cdb: &[u8], data: i32, pieces: &[u32]) -> (u8, u32) {
        const AT: u64 = DATA + 0x9000;
        self.memory.write(AT, &wrapper(0x1234, data, cdb)).unwrap();
        self.bulk(slot, OUT_PIPE, AT, 31);
        let pipe = if data > 0 { IN_PIPE } else { OUT_PIPE };
        let whole = [data.unsigned_abs()];
        let pieces = if pieces.is_empty() { &whole } else { pieces };
        let mut at = DATA;
        for len in pieces.iter().filter(|n| **n > 0) {
            self.bulk(slot, pipe, at, *len);
            at += u64::from(*len);
        }
        self.bulk(slot, IN_PIPE, AT, 13);
        let b = self.bytes(AT, 13);
        assert_eq!(&b[..8], b"USBS\x34\x12\0\0");
        (b[12], u32::from_le_bytes([b[8], b[9], b[10], b[11]]))
    }

    pub(super) fn enable_msix(&self) {
        let mut x = lock(&self.xhci);
        x.bar_write(0, 0x3000, &0xfee0_0000_u64.to_le_bytes());
        x.bar_write(0, 0x3008, &0x41_u64.to_le_bytes());
        let mut cap = (x.config_read(0x34) & 0xff) as u16;
        while x.config_read(cap) & 0xff != 0x11 {
            cap = (x.config_read(cap) >> 8 & 0xff) as u16;
        }
        x.config_write(cap + 2, &0x8000_u16.to_le_bytes());
    }
}
