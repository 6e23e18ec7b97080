//! Everything outside the processor of a micro-guest.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use pyrite_mem::{GuestMemory, Route};

use crate::{CpuIo, Vm};

/// LIMIT: words a guest may report.
const MAX_TRACE: usize = 4096;
/// First address of the MMIO test page.
const MMIO: u64 = 0xd000_0000;
/// Vector of the PIC's interrupt.
const PIC_VECTOR: u8 = 0x35;

#[derive(Default)]
struct Inner {
    vm: Option<Weak<dyn Vm>>,
    memory: Option<Arc<GuestMemory>>,
    vcpus: u32,
    trace: Vec<u32>,
    exit: Option<u8>,
    save: bool,
    pic: bool,
    next_pio: u32,
    /// Messages on their way through the device thread; it ends with the sender.
    device: Option<Sender<u32>>,
}

/// The board.
///
/// Ports: F0H out 32 bits = a word of the trace. F4H out = end. E0H: out of any size reports
/// E000_0000H + size and the value; in of any size reads 11H, 22H, 33H, 44H. E1H out = command:
///
/// 1 MSI with vector 31H to APIC 0 · 2 PIC interrupt (vector 35H) · 3 NMI to vCPU 0 · 4 level MSI
/// with vector 32H · 5 save and restore · 6 MSI with vector 31H a little later · 7 PIC interrupt
/// a little later.
///
/// E3H out of 32 bits: MSI with the vector in bits 7:0 to the APIC in bits 15:8, sent by a thread
/// of its own as a device does.
///
/// E4H out of a byte: where F0000H-FFFFFH leads; bit 0 for loads, bit 1 for stores: RAM. Else ROM.
///
/// MMIO at D000_0000H: a store reports D000_0000H + size × 256 + low offset byte and the value in
/// 32-bit words; a load reads bytes offset + n. The end of a level interrupt reports E010_0000H + vector.
pub(super) struct Board {
    inner: Mutex<Inner>,
    start: Instant,
}

impl Board {
    pub(super) fn new() -> Board {
        Board {
            inner: Mutex::default(),
            start: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connect(&self, vm: &Arc<dyn Vm>, vcpus: u32, memory: &Arc<GuestMemory>) {
        let mut i = self.lock();
        i.memory = Some(Arc::clone(memory));
        i.vm = Some(Arc::downgrade(vm));
        i.vcpus = vcpus;
    }

    pub(super) fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn memory(&self) -> Option<Arc<GuestMemory>> {
        self.lock().memory.clone()
    }

    fn vm(&self) -> Option<Arc<dyn Vm>> {
        self.lock().vm.as_ref().and_then(Weak::upgrade)
    }

    pub(super) fn stop_all(&self) {
        let n = self.lock().vcpus;
        if let Some(vm) = self.vm() {
            for v in 0..n {
                vm.control(v).stop();
            }
        }
    }

    pub(super) fn trace(&self) -> Vec<u32> {
        self.lock().trace.clone()
    }

    pub(super) fn trace_text(&self) -> String {
        {
            let i = self.lock();
            let shown = i.trace.get(..64).unwrap_or(&i.trace);
            format!("{shown:x?} of {} words", i.trace.len())
        }
    }

    pub(super) fn exit_code(&self) -> Option<u8> {
        self.lock().exit
    }

    pub(super) fn take_save_request(&self) -> bool {
        std::mem::take(&mut self.lock().save)
    }

    fn device_message(&self, message: u32) {
        let mut i = self.lock();
        let vm = i.vm.clone();
        let device = i.device.get_or_insert_with(|| {
            let (to, from) = channel::<u32>();
            std::thread::spawn(move || {
                for m in from {
                    if let Some(vm) = vm.as_ref().and_then(Weak::upgrade) {
                        vm.send_msi(0xfee0_0000 | u64::from(m >> 8 & 0xff) << 12, m & 0xff);
                    }
                }
            });
            to
        });
        // The thread lives as long as the sender.
        let _ = device.send(message);
    }

    fn report(&self, words: &[u32]) {
        let mut i = self.lock();
        if i.exit.is_none() && i.trace.len() + words.len() <= MAX_TRACE {
            i.trace.extend_from_slice(words);
        }
    }

    fn command(&self, n: u8) {
        let Some(vm) = self.vm() else { return };
        let later = |what: fn(&Board, &dyn Vm)| {
            // A thread of its own: the guest must be able to halt first. No result depends on
            // whether it did.
            let (vm, pic) = (Arc::downgrade(&vm), n == 7);
            if pic {
                self.lock().pic = true;
            }
            let empty = Board::new();
            std::thread::spawn(move || {
                std::thread::park_timeout(Duration::from_millis(20));
                if let Some(vm) = vm.upgrade() {
                    what(&empty, &*vm);
                }
            });
        };
        match n {
            1 => vm.send_msi(0xfee0_0000, 0x31),
            2 => {
                self.lock().pic = true;
                vm.set_pic_intr(true);
            }
            3 => vm.send_nmi(0),
            4 => vm.send_msi(0xfee0_0000, 0xc032),
            5 => {
                self.lock().save = true;
                self.stop_all();
            }
            6 => later(|_, vm| vm.send_msi(0xfee0_0000, 0x31)),
            7 => later(|_, vm| vm.set_pic_intr(true)),
            _ => self.report(&[0xbad0_0000 | u32::from(n)]),
        }
    }
}

fn words(data: &[u8]) -> impl Iterator<Item = u32> + '_ {
    data.chunks(4).map(|c| {
        let mut b = [0; 4];
        b[..c.len()].copy_from_slice(c);
        u32::from_le_bytes(b)
    })
}

impl CpuIo for Board {
    fn mmio_read(&self, _vcpu: u32, gpa: u64, data: &mut [u8]) {
        for (n, b) in data.iter_mut().enumerate() {
            *b = if gpa & !0xfff == MMIO {
                (gpa as u8).wrapping_add(n as u8)
            } else {
                0xff
            };
        }
    }

    fn mmio_write(&self, _vcpu: u32, gpa: u64, data: &[u8]) {
        // Stores to RAM whose loads reach ROM come here.
        if self.memory().is_some_and(|m| m.write(gpa, data).is_ok()) {
            return;
        }
        let head = gpa as u32 & 0xffff_f0ff | (data.len() as u32) << 8;
        let mut all = vec![head];
        all.extend(words(data));
        self.report(&all);
    }

    fn pio_read(&self, _vcpu: u32, port: u16, data: &mut [u8]) {
        match port {
            0xe0 => {
                for (b, v) in data.iter_mut().zip([0x11, 0x22, 0x33, 0x44]) {
                    *b = v;
                }
            }
            // Counts, so that repeated input is visible.
            0xe2 => {
                let mut i = self.lock();
                i.next_pio += 1;
                let v = i.next_pio.to_le_bytes();
                data.iter_mut().zip(v).for_each(|(b, v)| *b = v);
            }
            _ => data.fill(0xff),
        }
    }

    fn pio_write(&self, _vcpu: u32, port: u16, data: &[u8]) {
        let value = words(data).next().unwrap_or(0);
        match port {
            0xf0 => self.report(&[value]),
            0xe0 => self.report(&[0xe000_0000 | data.len() as u32, value]),
            0xe1 => self.command(value as u8),
            0xe3 => self.device_message(value),
            0xe4 => {
                if let Some(m) = self.memory() {
                    let route = Route {
                        read_ram: value & 1 != 0,
                        write_ram: value & 2 != 0,
                    };
                    m.set_route(0xf_0000, 0x10_0000, route);
                }
            }
            0xf4 => {
                {
                    let mut i = self.lock();
                    i.exit = i.exit.or(Some(value as u8));
                }
                self.stop_all();
            }
            _ => {}
        }
    }

    fn ack_pic(&self) -> Option<u8> {
        let had = std::mem::take(&mut self.lock().pic);
        if let Some(vm) = self.vm() {
            vm.set_pic_intr(false);
        }
        had.then_some(PIC_VECTOR)
    }

    fn eoi(&self, vector: u8) {
        self.report(&[0xe010_0000 | u32::from(vector)]);
    }
}
