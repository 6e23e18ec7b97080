//! The registers of one local APIC and what they mean, without any knowledge of other APICs.
//!
//! Intel SDM Vol. 3A chapter 10 (APIC), §10.12 (x2APIC).

use pyrite_x86::ApicState;

use super::count::CountDown;

/// Register numbers: offset in the xAPIC page / 16 = MSR - 800H. Intel SDM Vol. 3A table 10-1.
#[allow(missing_docs, reason = "register names of the manual")]
pub mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const APR: usize = 0x09;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const RRD: usize = 0x0c;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR0: usize = 0x10;
    pub const TMR0: usize = 0x18;
    pub const IRR0: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const ICR_LOW: usize = 0x30;
    pub const ICR_HIGH: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_THERMAL: usize = 0x33;
    pub const LVT_PERF: usize = 0x34;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL_COUNT: usize = 0x38;
    pub const CURRENT_COUNT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
}

/// IA32_APIC_BASE bits. Intel SDM Vol. 3A §10.4.4, §10.12.1.
pub mod base {
    /// Bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const EXTD: u64 = 1 << 10;
    /// Enabled.
    pub const EN: u64 = 1 << 11;
}

/// Error status bits. Intel SDM Vol. 3A §10.5.3.
pub mod esr {
    /// An IPI with an illegal vector was to be sent.
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    /// An illegal vector was received, or stands in an LVT entry that fired.
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    /// A reserved register was addressed (xAPIC mode).
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Delivery modes; 2 is SMI, which means nothing here. Intel SDM Vol. 3A §10.6.1.
pub mod mode {
    /// To all listed.
    pub const FIXED: u32 = 0;
    /// To the listed processor of lowest priority.
    pub const LOWEST: u32 = 1;
    /// Non-maskable.
    pub const NMI: u32 = 4;
    /// INIT.
    pub const INIT: u32 = 5;
    /// Start-up.
    pub const SIPI: u32 = 6;
    /// As if from an external 8259.
    pub const EXTINT: u32 = 7;
}

/// LVT mask bit.
pub const LVT_MASKED: u32 = 1 << 16;
/// SVR: software enable.
const SVR_ENABLE: u32 = 1 << 8;
/// SVR: suppress EOI broadcasts.
const SVR_SUPPRESS_EOI: u32 = 1 << 12;
/// Version: SVR bit 12 is implemented.
const VERSION_SUPPRESS_EOI: u32 = 1 << 24;
/// Places of entries in `Regs::lvt`.
const LINT0: usize = reg::LVT_LINT0 - reg::LVT_TIMER;
const ERROR: usize = reg::LVT_ERROR - reg::LVT_TIMER;
const TIMER_MODE: u32 = 3 << 17;
const TIMER_PERIODIC: u32 = 1 << 17;
const TIMER_DEADLINE: u32 = 2 << 17;

/// What the caller of a register write must do once the APIC's lock is released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// An interrupt can now be taken that could not before: wake the vCPU.
    pub interrupt: bool,
    /// Tell the IO-APICs that this level-triggered vector has ended.
    pub eoi: Option<u8>,
    /// Send this interprocessor interrupt (ICR contents).
    pub send: Option<u64>,
    /// The timer was armed or moved.
    pub timer: bool,
}

/// A register access that faults in x2APIC mode and is recorded in ESR in xAPIC mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal;

/// How the timer counts. Intel SDM Vol. 3A figure 10-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    /// Once from the initial count to 0.
    OneShot,
    /// Over and over.
    Periodic,
    /// Until the TSC reaches IA32_TSC_DEADLINE.
    Deadline,
}

/// The register file.
#[derive(Clone, Debug)]
pub struct Regs {
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The initial APIC id.
    pub id: u32,
    version: u32,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    esr: u32,
    /// Errors since the last write to ESR.
    errors: u32,
    icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    initial_count: u32,
    divide: u32,
    /// IA32_TSC_DEADLINE; 0 = disarmed.
    pub tsc_deadline: u64,
    /// The count-down.
    pub count: CountDown,
    /// A message with delivery mode ExtINT has come.
    pub extint: bool,
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    (0..8)
        .rev()
        .find(|&n| bits[n] != 0)
        .map(|n| (n * 32 + 31 - bits[n].leading_zeros() as usize) as u8)
}

fn set_bit(bits: &mut [u32; 8], vector: u8, on: bool) {
    let (word, bit) = (usize::from(vector) / 32, 1u32 << (vector % 32));
    if on {
        bits[word] |= bit;
    } else {
        bits[word] &= !bit;
    }
}

fn bit(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector) / 32] >> (vector % 32) & 1 != 0
}

impl Regs {
    /// After RESET. Intel SDM Vol. 3A §10.4.7.1.
    pub fn new(id: u32) -> Regs {
        Regs {
            apic_base: 0xfee0_0000 | base::EN | if id == 0 { base::BSP } else { 0 },
            id,
            version: 0x0005_0014,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            initial_count: 0,
            divide: 0,
            tsc_deadline: 0,
            count: CountDown::default(),
            extint: false,
        }
    }

    /// Everything but the mode, the id and the version to its reset state.
    pub fn reset(&mut self) {
        let fresh = Regs::new(self.id);
        *self = Regs {
            apic_base: self.apic_base,
            version: self.version,
            ..fresh
        };
        if self.x2apic() {
            self.ldr = self.x2apic_ldr();
        }
    }

    /// From xAPIC to x2APIC mode: ids widen, the rest stays. Intel SDM Vol. 3A §10.12.5.
    pub fn enter_x2apic(&mut self) {
        self.ldr = self.x2apic_ldr();
        self.icr &= 0xffff_ffff;
    }

    /// IA32_APIC_BASE enables the APIC.
    pub fn enabled(&self) -> bool {
        self.apic_base & base::EN != 0
    }

    /// In x2APIC mode.
    pub fn x2apic(&self) -> bool {
        self.apic_base & (base::EN | base::EXTD) == base::EN | base::EXTD
    }

    /// Accepts fixed and lowest-priority interrupts.
    pub fn accepts_fixed(&self) -> bool {
        self.enabled() && self.svr & SVR_ENABLE != 0
    }

    /// LDR in x2APIC mode derives from the id. Intel SDM Vol. 3A §10.12.10.2.
    pub fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 0xf)
    }

    /// Processor priority. Intel SDM Vol. 3A §10.8.3.1.
    pub fn ppr(&self) -> u32 {
        let isrv = highest(&self.isr).map_or(0, u32::from);
        if self.tpr >> 4 >= isrv >> 4 {
            self.tpr
        } else {
            isrv & 0xf0
        }
    }

    /// Arbitration priority for lowest-priority delivery. Intel SDM Vol. 3A §10.7.
    pub fn apr(&self) -> u32 {
        let isrv = highest(&self.isr).map_or(0, u32::from);
        let irrv = highest(&self.irr).map_or(0, u32::from);
        if self.tpr >> 4 >= irrv >> 4 && self.tpr >> 4 > isrv >> 4 {
            self.tpr
        } else {
            (self.tpr & 0xf0).max(isrv & 0xf0).max(irrv & 0xf0)
        }
    }

    /// The pending vector that could be taken now.
    pub fn deliverable(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        highest(&self.irr).filter(|v| u32::from(*v) >> 4 > self.ppr() >> 4)
    }

    /// Moves the highest deliverable vector from IRR to ISR.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let v = self.deliverable()?;
        set_bit(&mut self.irr, v, false);
        set_bit(&mut self.isr, v, true);
        Some(v)
    }

    /// LINT0 is an open ExtINT input, or the APIC is out of the way.
    pub fn accepts_extint(&mut self) -> bool {
        let lint0 = self.lvt[LINT0];
        !self.enabled()
            || lint0 & LVT_MASKED == 0 && lint0 >> 8 & 7 == mode::EXTINT
            || std::mem::take(&mut self.extint)
    }

    /// Accepts a fixed interrupt. True if the vCPU must look.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.accepts_fixed() {
            return false;
        }
        if vector < 16 {
            return self.error(esr::RECEIVE_ILLEGAL_VECTOR);
        }
        set_bit(&mut self.irr, vector, true);
        set_bit(&mut self.tmr, vector, level);
        self.deliverable() == Some(vector)
    }

    /// Records an error and raises the error interrupt. True if the vCPU must look.
    pub fn error(&mut self, what: u32) -> bool {
        let news = self.errors & what != what;
        self.errors |= what;
        let lvt = self.lvt[ERROR];
        if !news || lvt & LVT_MASKED != 0 {
            return false;
        }
        let vector = lvt as u8;
        if vector < 16 {
            // An illegal vector in the error entry itself cannot be reported by an interrupt.
            self.errors |= esr::RECEIVE_ILLEGAL_VECTOR;
            return false;
        }
        self.accept(vector, false)
    }

    /// The timer has expired: its interrupt, if not masked. True if the vCPU must look.
    pub fn timer_expired(&mut self) -> bool {
        let lvt = self.lvt[0];
        lvt & LVT_MASKED == 0 && self.accept(lvt as u8, false)
    }

    /// Interrupt request register.
    pub fn irr(&self) -> &[u32; 8] {
        &self.irr
    }

    /// In-service register.
    pub fn isr(&self) -> &[u32; 8] {
        &self.isr
    }

    /// Trigger mode register.
    pub fn tmr(&self) -> &[u32; 8] {
        &self.tmr
    }

    /// The local vector table, by name.
    pub fn lvt_entries(&self) -> impl Iterator<Item = (&'static str, u32)> {
        ["timer", "thermal", "perf", "lint0", "lint1", "error"]
            .into_iter()
            .zip(self.lvt)
    }

    /// The timer's mode.
    pub fn timer_mode(&self) -> TimerMode {
        if self.deadline_mode() {
            TimerMode::Deadline
        } else if self.periodic() {
            TimerMode::Periodic
        } else {
            TimerMode::OneShot
        }
    }

    /// The timer is in TSC-deadline mode.
    pub fn deadline_mode(&self) -> bool {
        self.lvt[0] & TIMER_MODE == TIMER_DEADLINE
    }

    fn periodic(&self) -> bool {
        self.lvt[0] & TIMER_MODE == TIMER_PERIODIC
    }

    /// Guest time at which the count-down reaches zero next.
    pub fn count_deadline_ns(&self) -> Option<u64> {
        if self.deadline_mode() {
            return None;
        }
        self.count
            .deadline_ns(self.initial_count, self.divide, self.periodic())
    }

    /// Takes an expired count-down, periodic ones start over. True if it had expired.
    pub fn take_count(&mut self, now_ns: u64) -> bool {
        if self.count_deadline_ns().is_none_or(|d| d > now_ns) {
            return false;
        }
        let periodic = self.periodic();
        self.count
            .expire(now_ns, self.initial_count, self.divide, periodic);
        true
    }

    /// Does a message to `dest` mean this APIC? Intel SDM Vol. 3A §10.6.2, §10.12.9.
    ///
    /// `wide`: the destination is 32 bits wide (sent in x2APIC mode), else 8.
    pub fn matches(&self, dest: u32, logical: bool, wide: bool) -> bool {
        if dest == if wide { u32::MAX } else { 0xff } {
            return true;
        }
        if !logical {
            return dest == self.id;
        }
        if self.x2apic() {
            return dest >> 16 == self.ldr >> 16 && dest & self.ldr & 0xffff != 0;
        }
        let mine = self.ldr >> 24;
        match self.dfr >> 28 {
            0xf => dest & mine & 0xff != 0,
            0x0 => dest >> 4 & 0xf == mine >> 4 && dest & mine & 0xf != 0,
            // The two models are the only ones defined.
            _ => false,
        }
    }

    /// Register load. `now_ns` is asked only for the current count.
    pub fn read(&mut self, n: usize, now_ns: impl FnOnce() -> u64) -> Result<u32, Illegal> {
        Ok(match n {
            reg::ID if self.x2apic() => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => self.version,
            reg::TPR => self.tpr,
            reg::APR if !self.x2apic() => self.apr(),
            reg::PPR => self.ppr(),
            // Write-only in x2APIC mode; a load from the xAPIC page gives no error.
            reg::EOI | reg::RRD if !self.x2apic() => 0,
            reg::LDR => self.ldr,
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            reg::ISR0..=0x17 => self.isr[n - reg::ISR0],
            reg::TMR0..=0x1f => self.tmr[n - reg::TMR0],
            reg::IRR0..=0x27 => self.irr[n - reg::IRR0],
            reg::ESR => self.esr,
            reg::ICR_LOW => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[n - reg::LVT_TIMER],
            reg::INITIAL_COUNT => self.initial_count,
            reg::CURRENT_COUNT if self.deadline_mode() || !self.count.running() => 0,
            reg::CURRENT_COUNT => self.current_count(now_ns()),
            reg::DIVIDE => self.divide,
            _ => return Err(Illegal),
        })
    }

    /// The whole ICR, as x2APIC mode reads it.
    pub fn icr(&self) -> u64 {
        self.icr
    }

    fn current_count(&self, now_ns: u64) -> u32 {
        self.count
            .current(now_ns, self.initial_count, self.divide, self.periodic())
    }

    /// CR8 = TPR bits 7:4. Intel SDM Vol. 3A §10.8.6.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// TPR write. True if the vCPU must look.
    pub fn set_tpr(&mut self, tpr: u8) -> bool {
        let before = self.tpr;
        self.tpr = u32::from(tpr);
        self.tpr < before && self.deliverable().is_some()
    }

    /// End of interrupt. Intel SDM Vol. 3A §10.8.5.
    pub fn eoi(&mut self) -> Effect {
        let Some(v) = highest(&self.isr) else {
            return Effect::default();
        };
        set_bit(&mut self.isr, v, false);
        let level = bit(&self.tmr, v);
        let suppressed = self.svr & SVR_SUPPRESS_EOI != 0;
        Effect {
            interrupt: self.deliverable().is_some(),
            eoi: (level && !suppressed).then_some(v),
            ..Effect::default()
        }
    }

    /// Register store. In x2APIC mode reserved bits fault; in xAPIC mode they are ignored.
    pub fn write(
        &mut self,
        n: usize,
        value: u32,
        now_ns: impl FnOnce() -> u64,
    ) -> Result<Effect, Illegal> {
        let x2 = self.x2apic();
        let mut effect = Effect::default();
        match n {
            reg::TPR => {
                Self::allow(x2, value, 0xff)?;
                effect.interrupt = self.set_tpr(value as u8);
            }
            reg::EOI => {
                Self::allow(x2, value, 0)?;
                return Ok(self.eoi());
            }
            // The id is read-only, as on recent processors; a store to the page is ignored.
            reg::ID | reg::RRD | reg::ICR_HIGH if x2 => return Err(Illegal),
            reg::ID | reg::RRD => {}
            reg::LDR if !x2 => self.ldr = value & 0xff00_0000,
            reg::DFR if !x2 => self.dfr = value | 0x0fff_ffff,
            reg::SVR => self.write_svr(x2, value)?,
            reg::ESR => {
                Self::allow(x2, value, 0)?;
                self.esr = std::mem::take(&mut self.errors);
            }
            reg::ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value) << 32,
            reg::ICR_LOW if !x2 => {
                return Ok(self.write_icr(self.icr >> 32 << 32 | u64::from(value)));
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                effect.timer = self.write_lvt(n, x2, value, now_ns)?;
            }
            reg::INITIAL_COUNT => {
                // In TSC-deadline mode stores are ignored. Intel SDM Vol. 3A §10.5.4.1.
                if !self.deadline_mode() {
                    self.initial_count = value;
                    self.count.start(now_ns(), value);
                    effect.timer = value != 0;
                }
            }
            reg::DIVIDE => {
                Self::allow(x2, value, 0xb)?;
                let divide = value & 0xb;
                if divide != self.divide && self.count.running() {
                    let now = now_ns();
                    let left = self.current_count(now);
                    self.count.rebase(now, self.initial_count, left, divide);
                    effect.timer = true;
                }
                self.divide = divide;
            }
            reg::SELF_IPI if x2 => {
                Self::allow(x2, value, 0xff)?;
                // Shorthand "self", fixed, edge. Intel SDM Vol. 3A §10.12.11.
                effect.send = Some(u64::from(value) | 1 << 18);
            }
            _ => return Err(Illegal),
        }
        Ok(effect)
    }

    fn allow(x2: bool, value: u32, mask: u32) -> Result<(), Illegal> {
        if x2 && value & !mask != 0 {
            return Err(Illegal);
        }
        Ok(())
    }

    fn write_svr(&mut self, x2: bool, value: u32) -> Result<(), Illegal> {
        let mut mask = 0x1ff;
        if self.version & VERSION_SUPPRESS_EOI != 0 {
            mask |= SVR_SUPPRESS_EOI;
        }
        // Bit 9 (focus checking) is a relic that guests still write.
        Self::allow(x2, value, mask | 1 << 9)?;
        self.svr = value & mask;
        if self.svr & SVR_ENABLE == 0 {
            // All LVT entries are masked while software-disabled. Intel SDM Vol. 3A §10.4.7.2.
            for lvt in &mut self.lvt {
                *lvt |= LVT_MASKED;
            }
        }
        Ok(())
    }

    /// ICR write: stores it and asks for the message to be sent.
    pub fn write_icr(&mut self, value: u64) -> Effect {
        // Delivery status (bit 12) always reads idle: messages arrive at once.
        self.icr = value & !(1 << 12);
        Effect {
            send: Some(self.icr),
            ..Effect::default()
        }
    }

    fn write_lvt(
        &mut self,
        n: usize,
        x2: bool,
        value: u32,
        now_ns: impl FnOnce() -> u64,
    ) -> Result<bool, Illegal> {
        let mask = match n {
            reg::LVT_TIMER => 0xff | LVT_MASKED | TIMER_MODE,
            reg::LVT_THERMAL | reg::LVT_PERF => 0x7ff | LVT_MASKED,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0xa7ff | LVT_MASKED,
            _ => 0xff | LVT_MASKED,
        };
        // Delivery status and remote IRR are read-only, not reserved.
        Self::allow(x2, value, mask | 1 << 12 | 1 << 14)?;
        let mut value = value & mask;
        if self.svr & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        if n != reg::LVT_TIMER {
            self.lvt[n - reg::LVT_TIMER] = value;
            return Ok(false);
        }
        let was = self.lvt[0] & TIMER_MODE;
        let mode = value & TIMER_MODE;
        if was != mode {
            if (was == TIMER_DEADLINE) != (mode == TIMER_DEADLINE) {
                // Changing to or from deadline mode disarms. Intel SDM Vol. 3A §10.5.4.1.
                self.tsc_deadline = 0;
                self.count.stop();
            } else if self.count.running() {
                let now = now_ns();
                let left = self.current_count(now);
                self.count
                    .rebase(now, self.initial_count, left, self.divide);
            }
        }
        self.lvt[0] = value;
        Ok(self.count.running())
    }

    /// IA32_TSC_DEADLINE write; ignored in other timer modes. True if the timer was armed.
    pub fn set_tsc_deadline(&mut self, value: u64) -> bool {
        if self.deadline_mode() {
            self.tsc_deadline = value;
            return value != 0;
        }
        false
    }

    /// Saved form. `now_ns` dates the current count.
    pub fn save(&self, now_ns: u64) -> ApicState {
        let mut s = ApicState::default();
        let r = &mut s.regs;
        r[reg::ID] = if self.x2apic() {
            self.id
        } else {
            self.id << 24
        };
        r[reg::VERSION] = self.version;
        r[reg::TPR] = self.tpr;
        r[reg::APR] = self.apr();
        r[reg::PPR] = self.ppr();
        r[reg::LDR] = self.ldr;
        r[reg::DFR] = self.dfr;
        r[reg::SVR] = self.svr;
        r[reg::ISR0..reg::ISR0 + 8].copy_from_slice(&self.isr);
        r[reg::TMR0..reg::TMR0 + 8].copy_from_slice(&self.tmr);
        r[reg::IRR0..reg::IRR0 + 8].copy_from_slice(&self.irr);
        // What a write to ESR would latch is not architecturally visible: it is kept in the high
        // half, which reads as zero on hardware.
        // An ExtINT message that waits likewise.
        r[reg::ESR] = self.esr | self.errors << 16 | u32::from(self.extint) << 31;
        r[reg::ICR_LOW] = self.icr as u32;
        r[reg::ICR_HIGH] = (self.icr >> 32) as u32;
        r[reg::LVT_TIMER..=reg::LVT_ERROR].copy_from_slice(&self.lvt);
        r[reg::INITIAL_COUNT] = self.initial_count;
        r[reg::DIVIDE] = self.divide;
        s.tsc_deadline = self.tsc_deadline;
        if self.count.running() && !self.deadline_mode() {
            // 0 would say that it has fired, see `restore`.
            r[reg::CURRENT_COUNT] = self.current_count(now_ns).max(1);
            s.timer_start_ns = self.count.started_ns().max(1);
        }
        s
    }

    /// Takes a saved form over.
    pub fn restore(&mut self, s: &ApicState, apic_base: u64) {
        let r = &s.regs;
        self.apic_base = apic_base;
        self.version = r[reg::VERSION];
        self.tpr = r[reg::TPR] & 0xff;
        self.ldr = if self.x2apic() {
            self.x2apic_ldr()
        } else {
            r[reg::LDR] & 0xff00_0000
        };
        self.dfr = r[reg::DFR] | 0x0fff_ffff;
        self.svr = r[reg::SVR] & (0x1ff | SVR_SUPPRESS_EOI);
        for n in 0..8 {
            // Vectors 0-15 do not exist.
            let mask = if n == 0 { 0xffff_0000 } else { u32::MAX };
            self.isr[n] = r[reg::ISR0 + n] & mask;
            self.tmr[n] = r[reg::TMR0 + n] & mask;
            self.irr[n] = r[reg::IRR0 + n] & mask;
        }
        self.esr = r[reg::ESR] & 0xff;
        self.errors = r[reg::ESR] >> 16 & 0xff;
        self.icr = u64::from(r[reg::ICR_HIGH]) << 32 | u64::from(r[reg::ICR_LOW] & !(1 << 12));
        self.lvt
            .copy_from_slice(&r[reg::LVT_TIMER..=reg::LVT_ERROR]);
        for lvt in &mut self.lvt {
            // Vector, delivery mode, polarity, trigger, mask, timer mode.
            *lvt &= 0x7_a7ff;
        }
        self.initial_count = r[reg::INITIAL_COUNT];
        self.divide = r[reg::DIVIDE] & 0xb;
        self.tsc_deadline = if self.deadline_mode() {
            s.tsc_deadline
        } else {
            0
        };
        self.extint = r[reg::ESR] >> 31 != 0;
        // A one-shot count that has come to 0 has also fired.
        let counting = self.periodic() || r[reg::CURRENT_COUNT] != 0;
        if s.timer_start_ns != 0 && counting && !self.deadline_mode() {
            self.count.start(s.timer_start_ns, self.initial_count);
        } else {
            self.count.stop();
        }
    }
}
