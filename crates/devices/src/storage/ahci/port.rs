//! One port: its registers, its command list and its drive.

use minicbor::{Decode, Encode};
use pyrite_disk::IoBuf;
use pyrite_disk::scsi::{Outcome, Plan, with_parameters};
use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;

use super::fis::{self, FromHost};
use crate::storage::ata::{
    Device, DeviceSaved, PACKET_BYTES, Pending, Protocol, Registers, status,
};

/// PxCMD, §3.3.7.
const CMD_ST: u32 = 1 << 0;
const CMD_SUD: u32 = 1 << 1;
const CMD_POD: u32 = 1 << 2;
const CMD_CLO: u32 = 1 << 3;
const CMD_FRE: u32 = 1 << 4;
const CMD_FR: u32 = 1 << 14;
const CMD_CR: u32 = 1 << 15;
/// Bits that the guest writes: ATAPI, DLAE, ALPE and ASP, which have no effect.
const CMD_WRITABLE: u32 = CMD_ST | CMD_SUD | CMD_POD | CMD_FRE | 0xf << 24;

/// PxIS, §3.3.5.
const IS_DHRS: u32 = 1 << 0;
const IS_PSS: u32 = 1 << 1;
const IS_SDBS: u32 = 1 << 3;
const IS_PCS: u32 = 1 << 6;
const IS_IFS: u32 = 1 << 27;
const IS_HBFS: u32 = 1 << 29;
const IS_TFES: u32 = 1 << 30;
/// Those that follow PxSERR and are not cleared here.
const IS_READ_ONLY: u32 = IS_PCS | 1 << 22;
const IE_WRITABLE: u32 = 0xfdc0_00ff;
/// PxSERR.DIAG.X: a drive has appeared.
const SERR_X: u32 = 1 << 26;
/// PxTFD of a port without a drive.
const TFD_NO_DEVICE: u32 = 0x7f;
/// PxSSTS: drive present, 3 Gb/s, active.
const SSTS_UP: u32 = 0x123;
/// PxSSTS: port disabled.
const SSTS_OFFLINE: u32 = 0x4;

/// A command for a back end.
pub(super) struct Job {
    pub plan: Plan,
    pub bufs: Vec<IoBuf>,
    pub started: Started,
}

/// A command that was started.
#[derive(Clone, Copy)]
pub(super) struct Started {
    pub port: usize,
    slot: u8,
    life: u64,
    protocol: Protocol,
    pending: Pending,
    /// Guest-physical address of the command header.
    header: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers32 {
    #[n(0)]
    clb: u64,
    #[n(1)]
    fb: u64,
    #[n(2)]
    is: u32,
    #[n(3)]
    ie: u32,
    #[n(4)]
    cmd: u32,
    #[n(5)]
    tfd: u32,
    #[n(6)]
    sig: u32,
    #[n(7)]
    sctl: u32,
    #[n(8)]
    serr: u32,
    #[n(9)]
    sact: u32,
    #[n(10)]
    ci: u32,
    /// A command failed: nothing starts until PxCMD.ST is cleared. §6.2.2.
    #[n(11)]
    failed: bool,
    /// The slot that was started last.
    #[n(12)]
    last_slot: u8,
    /// A software reset frame with SRST set was the last that came.
    #[n(13)]
    in_soft_reset: bool,
}

/// State of a port.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct PortSaved {
    #[n(0)]
    registers: Registers32,
    #[n(1)]
    device: Option<DeviceSaved>,
}

pub(super) struct Port {
    r: Registers32,
    device: Option<Device>,
    /// The command in flight that is not queued.
    alone: Option<u8>,
    /// Tags of the queued commands in flight.
    queued: u32,
    /// Commands in flight of earlier lives: their outcome goes nowhere.
    stale: u32,
    /// Counts stops and resets.
    life: u64,
    /// A reset of the controller waits for stale commands.
    resetting: bool,
}

impl Port {
    pub(super) fn new(device: Option<Device>) -> Port {
        let mut p = Port {
            r: Registers32::default(),
            device,
            alone: None,
            queued: 0,
            stale: 0,
            life: 0,
            resetting: false,
        };
        p.power_on();
        p
    }

    pub(super) fn has_device(&self) -> bool {
        self.device.is_some()
    }

    pub(super) fn in_flight(&self) -> u32 {
        u32::from(self.alone.is_some()) + self.queued.count_ones() + self.stale
    }

    pub(super) fn resetting(&self) -> bool {
        self.resetting && self.stale > 0
    }

    pub(super) fn interrupt(&self) -> bool {
        self.is() & self.r.ie != 0
    }

    fn is(&self) -> u32 {
        self.r.is | if self.r.serr & SERR_X != 0 { IS_PCS } else { 0 }
    }

    /// Commands in flight belong to an earlier life from now on.
    fn forget(&mut self) {
        self.stale += u32::from(self.alone.take().is_some()) + self.queued.count_ones();
        self.queued = 0;
        self.life += 1;
        self.r.ci = 0;
        self.r.sact = 0;
        self.r.failed = false;
    }

    pub(super) fn power_on(&mut self) {
        self.forget();
        self.resetting = false;
        if let Some(d) = &mut self.device {
            d.reset();
        }
        self.r = Registers32 {
            cmd: CMD_SUD | CMD_POD,
            ..Registers32::default()
        };
        self.link_up();
    }

    /// GHC.HR: registers but the memory addresses go back, drives see a COMRESET. §10.4.3.
    pub(super) fn hba_reset(&mut self) {
        self.forget();
        self.resetting = true;
        self.r = Registers32 {
            clb: self.r.clb,
            fb: self.r.fb,
            cmd: CMD_SUD | CMD_POD,
            ..Registers32::default()
        };
        if let Some(d) = &mut self.device {
            d.bus_reset();
        }
        self.link_up();
    }

    /// The drive has appeared and sent its signature.
    fn link_up(&mut self) {
        let Some(d) = &self.device else {
            self.r.tfd = TFD_NO_DEVICE;
            self.r.sig = u32::MAX;
            return;
        };
        let s = d.signature();
        self.r.serr |= SERR_X;
        self.take_signature(&s);
    }

    fn take_signature(&mut self, s: &Registers) {
        self.r.tfd = u32::from(s.error) << 8 | u32::from(s.status);
        self.r.sig = (s.lba as u32) << 8 | u32::from(s.count & 0xff);
    }

    fn ssts(&self) -> u32 {
        match self.r.sctl & 0xf {
            0 if self.device.is_some() && self.stale == 0 => SSTS_UP,
            4 => SSTS_OFFLINE,
            _ => 0,
        }
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let r = &self.r;
        match register {
            0x00 => r.clb as u32,
            0x04 => (r.clb >> 32) as u32,
            0x08 => r.fb as u32,
            0x0c => (r.fb >> 32) as u32,
            0x10 => self.is(),
            0x14 => r.ie,
            0x18 => {
                let mut v = r.cmd;
                if v & CMD_FRE != 0 {
                    v |= CMD_FR;
                }
                if v & CMD_ST != 0 {
                    v |= u32::from(r.last_slot) << 8;
                }
                if v & CMD_ST != 0 || self.in_flight() > 0 {
                    v |= CMD_CR;
                }
                v
            }
            0x20 => r.tfd,
            0x24 => r.sig,
            0x28 => self.ssts(),
            0x2c => r.sctl,
            0x30 => r.serr,
            0x34 => r.sact,
            0x38 => r.ci,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, memory: &GuestMemory, register: u64, value: u32, mask: u32) {
        let merge = |old: u32| old & !mask | value & mask;
        let set = value & mask;
        let low = |old: u64, v: u32| old & !0xffff_ffff | u64::from(v);
        let high = |old: u64, v: u32| old & 0xffff_ffff | u64::from(v) << 32;
        let r = &mut self.r;
        match register {
            0x00 => r.clb = low(r.clb, merge(r.clb as u32) & !0x3ff),
            0x04 => r.clb = high(r.clb, merge((r.clb >> 32) as u32)),
            0x08 => r.fb = low(r.fb, merge(r.fb as u32) & !0xff),
            0x0c => r.fb = high(r.fb, merge((r.fb >> 32) as u32)),
            0x10 => r.is &= !(set & !IS_READ_ONLY),
            0x14 => r.ie = merge(r.ie) & IE_WRITABLE,
            0x18 => {
                let new = merge(r.cmd & CMD_WRITABLE);
                self.write_cmd(memory, new);
            }
            0x2c => {
                let (old, new) = (r.sctl & 0xf, merge(r.sctl) & 0xfff);
                r.sctl = new;
                self.link_control(memory, old, new & 0xf);
            }
            0x30 => r.serr &= !set,
            // §3.3.13 and §3.3.14: set only while ST is.
            0x34 if r.cmd & CMD_ST != 0 => r.sact |= set,
            0x38 if r.cmd & CMD_ST != 0 => r.ci |= set,
            _ => {}
        }
    }

    fn write_cmd(&mut self, memory: &GuestMemory, new: u32) {
        let was = self.r.cmd;
        self.r.cmd = new & CMD_WRITABLE;
        if was & CMD_ST != 0 && new & CMD_ST == 0 {
            self.forget();
            self.r.last_slot = 0;
        }
        if new & CMD_CLO != 0 && new & CMD_ST == 0 {
            self.r.tfd &= !u32::from(status::BSY | status::DRQ);
        }
        // §7.3.2: the signature frame that waited for a place is received now.
        if was & CMD_FRE == 0 && new & CMD_FRE != 0 && self.ssts() == SSTS_UP {
            self.send_signature(memory);
        }
    }

    fn send_signature(&mut self, memory: &GuestMemory) {
        if let Some(d) = &self.device {
            let s = d.signature();
            self.receive(memory, fis::D2H_AT, &fis::d2h(&s));
        }
    }

    /// PxSCTL.DET changed. §3.3.11.
    fn link_control(&mut self, memory: &GuestMemory, old: u32, new: u32) {
        match (old, new) {
            (o, n) if o == n => {}
            (_, 1 | 4) => {
                self.forget();
                self.r.tfd = TFD_NO_DEVICE;
                self.r.sig = u32::MAX;
            }
            (1 | 4, 0) => {
                if let Some(d) = &mut self.device {
                    d.bus_reset();
                }
                self.r.in_soft_reset = false;
                self.link_up();
                if self.r.cmd & CMD_FRE != 0 {
                    self.send_signature(memory);
                }
            }
            _ => {}
        }
    }

    /// Puts a frame where frames are received.
    fn receive(&self, memory: &GuestMemory, at: u64, frame: &[u8]) {
        if self.r.cmd & CMD_FRE != 0 && memory.write(self.r.fb + at, frame).is_err() {
            tracing::debug!("AHCI: the received FIS area is not RAM");
        }
    }

    fn fail(&mut self, why: u32, events: &mut bool) {
        self.r.failed = true;
        self.r.is |= why;
        *events = true;
    }

    /// The next command that may start. Commands without work are done on the way.
    pub(super) fn next(
        &mut self,
        port: usize,
        memory: &GuestMemory,
        events: &mut bool,
    ) -> Option<Job> {
        // LIMIT: one round of the slots.
        for _ in 0..32 {
            let waiting = self.r.ci & !self.alone.map_or(0, |s| 1 << s);
            let ready = self.r.cmd & CMD_ST != 0
                && !self.r.failed
                && self.ssts() == SSTS_UP
                && self.alone.is_none();
            if !ready || waiting == 0 {
                return None;
            }
            // Round robin from the slot after the last. §5.3.2.1.
            let from = (self.r.last_slot + 1) % 32;
            let slot = ((waiting.rotate_right(from.into()).trailing_zeros() as u8) + from) % 32;
            let header = self.r.clb + 32 * u64::from(slot);
            let mut h = [0; 32];
            let mut table = [0; 128];
            let read = memory.read(header, &mut h).and_then(|()| {
                let at = u64::from_le_bytes([h[8], h[9], h[10], h[11], h[12], h[13], h[14], h[15]]);
                memory.read(at & !0x7f, &mut table).map(|()| at & !0x7f)
            });
            let Ok(table_at) = read else {
                self.fail(IS_HBFS, events);
                return None;
            };
            let mut frame = [0; 64];
            frame.copy_from_slice(&table[..64]);
            let task = match fis::parse(&frame) {
                Some(FromHost::Command(t)) => t,
                Some(FromHost::Control(_)) if self.in_flight() > 0 => return None,
                Some(FromHost::Control(c)) => {
                    self.soft_reset(memory, c, slot);
                    *events = true;
                    continue;
                }
                None => {
                    self.fail(IS_IFS, events);
                    return None;
                }
            };
            let is_queued = matches!(task.command, 0x60 | 0x61);
            if !is_queued && self.queued != 0 {
                return None; // it has to be alone
            }
            let device = self.device.as_mut()?;
            let mut c = device.command(&task);
            if let Protocol::Queued(tag) = c.protocol {
                // A tag that is in the drive already is a mistake of the host.
                if self.queued >> tag & 1 != 0 {
                    self.fail(IS_IFS, events);
                    return None;
                }
                self.queued |= 1 << tag;
                self.r.ci &= !(1 << slot);
            } else {
                self.alone = Some(slot);
                self.r.tfd = u32::from(status::BSY | status::READY);
            }
            self.r.last_slot = slot;
            if let Protocol::Packet { .. } = c.protocol {
                c.plan = device.packet(&table[0x40..0x40 + PACKET_BYTES]);
            }
            let len = c.plan.data().map_or(0, |(_, len)| len);
            let entries = u16::from_le_bytes([h[2], h[3]]);
            let bufs = prd_table(memory, table_at + 0x80, entries, len);
            let device = self.device.as_mut()?;
            let plan = with_parameters(c.plan, memory, &bufs, |what, data| {
                device.parameters(what, data)
            });
            let started = Started {
                port,
                slot,
                life: self.life,
                protocol: c.protocol,
                pending: c.pending,
                header,
            };
            return Some(Job {
                plan,
                bufs,
                started,
            });
        }
        None
    }

    /// A control frame: SRST set resets the drive, cleared it sends its signature. §10.4.1.
    fn soft_reset(&mut self, memory: &GuestMemory, control: u8, slot: u8) {
        self.r.ci &= !(1 << slot);
        self.r.last_slot = slot;
        let Some(d) = &mut self.device else { return };
        if control & fis::SRST != 0 {
            d.bus_reset();
            self.r.in_soft_reset = true;
        } else if std::mem::take(&mut self.r.in_soft_reset) {
            let s = d.signature();
            self.take_signature(&s);
            self.receive(memory, fis::D2H_AT, &fis::d2h(&s));
            self.r.is |= IS_DHRS;
        }
    }

    pub(super) fn complete(&mut self, memory: &GuestMemory, started: &Started, outcome: &Outcome) {
        if started.life != self.life {
            self.stale = self.stale.saturating_sub(1);
            self.resetting &= self.stale > 0;
            return;
        }
        let Some(device) = &mut self.device else {
            return;
        };
        let registers = device.finish(&started.pending, outcome);
        let failed = registers.status & status::ERR != 0;
        let tfd = u32::from(registers.error) << 8 | u32::from(registers.status);
        if let Protocol::Queued(tag) = started.protocol {
            self.queued &= !(1 << tag);
            // After an error the drive gives no more answers. Serial ATA 3.0 §13.6.5.
            if self.r.failed {
                return;
            }
            let done = if failed { 0 } else { 1 << tag };
            self.r.sact &= !done;
            self.r.tfd = tfd;
            self.receive(memory, fis::SDB_AT, &fis::set_device_bits(&registers, done));
            self.r.is |= IS_SDBS;
        } else {
            self.alone = None;
            self.r.tfd = tfd;
            // PRDBC. A header that is RAM no longer is the guest's loss.
            let _ = memory.write(started.header + 4, &(outcome.bytes as u32).to_le_bytes());
            if let (Protocol::PioIn(_), false) = (started.protocol, failed) {
                let bytes = outcome.bytes.min(512) as u16;
                self.receive(
                    memory,
                    fis::PIO_SETUP_AT,
                    &fis::pio_setup(&registers, bytes),
                );
                self.r.is |= IS_PSS;
            } else {
                self.receive(memory, fis::D2H_AT, &fis::d2h(&registers));
                self.r.is |= IS_DHRS;
            }
            if !failed {
                self.r.ci &= !(1 << started.slot);
            }
        }
        if failed {
            self.r.is |= IS_TFES;
            self.r.failed = true;
        }
    }

    pub(super) fn save(&self) -> PortSaved {
        let Port {
            r,
            device,
            alone: _,
            queued: _,
            stale: _,
            life: _,
            resetting: _,
        } = self;
        PortSaved {
            registers: r.clone(),
            device: device.as_ref().map(Device::save),
        }
    }

    pub(super) fn restore(&mut self, saved: &PortSaved) -> Result<(), String> {
        let PortSaved { registers, device } = saved;
        match (&mut self.device, device) {
            (Some(d), Some(s)) => d.restore(s)?,
            (None, None) => {}
            _ => return Err("a drive is missing or new".into()),
        }
        self.forget();
        self.r = registers.clone();
        self.r.clb &= !0x3ff;
        self.r.fb &= !0xff;
        self.r.cmd &= CMD_WRITABLE;
        self.r.last_slot &= 31;
        Ok(())
    }

    pub(super) fn inspect(&self) -> Inspect {
        let r = &self.r;
        Inspect::node([
            ("packet", {
                Inspect::Bool(self.device.as_ref().is_some_and(Device::is_packet))
            }),
            ("command", Inspect::Hex(self.read(0x18).into())),
            ("status", Inspect::Hex(self.ssts().into())),
            ("task_file", Inspect::Hex(r.tfd.into())),
            ("interrupts", Inspect::Hex(self.is().into())),
            ("issued", Inspect::Hex(r.ci.into())),
            ("active", Inspect::Hex(r.sact.into())),
            ("failed", Inspect::Bool(r.failed)),
            ("in_flight", Inspect::Uint(self.in_flight().into())),
        ])
    }
}

/// The buffers of a PRD table, until they hold `len` bytes. What is past the last entry, or in an
/// entry that cannot be read, is missing; the transfer then fails. §4.2.3.3.
fn prd_table(memory: &GuestMemory, at: u64, entries: u16, len: u64) -> Vec<IoBuf> {
    let mut bufs: Vec<IoBuf> = Vec::new();
    let mut total = 0;
    // LIMIT: 65535 entries, by their count's width.
    for n in 0..u64::from(entries) {
        let mut e = [0; 16];
        if total >= len || memory.read(at + 16 * n, &mut e).is_err() {
            break;
        }
        let v = u128::from_le_bytes(e);
        let gpa = v as u64 & !1;
        let bytes = ((v >> 96) as u32 & 0x3f_ffff) + 1;
        total += u64::from(bytes);
        match bufs.last_mut() {
            // Neighbours become one buffer; the sum stays far below 4 GiB.
            Some(b) if b.gpa + u64::from(b.len) == gpa && b.len < 1 << 30 => b.len += bytes,
            _ => bufs.push(IoBuf { gpa, len: bytes }),
        }
    }
    bufs
}
