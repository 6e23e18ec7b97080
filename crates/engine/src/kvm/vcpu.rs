//! The run loop of one vCPU.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering, fence};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Shared, cpuid, debug, ioctl, lock, os};
use crate::{CpuIo, CpuidTable, DebugPlan, EngineError, StopReason, Vcpu};
use pyrite_x86::CpuState;

/// Where a running vCPU thread can be reached.
pub(super) struct KickTarget {
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
    signal: libc::c_int,
}

// SAFETY: the pointer is only used through an atomic, and only while the vCPU is inside `run`
// (the target is withdrawn, under the same lock that kick holds, before `run` returns).
unsafe impl Send for KickTarget {}

impl KickTarget {
    pub(super) fn kick(&self) {
        // SAFETY: kvm_run is mapped while the target is published.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
        // SAFETY: the thread is inside `run`, hence alive; the signal has a handler.
        unsafe { libc::pthread_kill(self.thread, self.signal) };
    }
}

/// One vCPU on KVM.
pub struct KvmVcpu {
    pub(super) fd: VcpuFd,
    pub(super) index: u32,
    pub(super) shared: Arc<Shared>,
    /// A triple fault ended the last run and no state was loaded since.
    pub(super) shut_down: bool,
    /// The last exit is completed by the next KVM_RUN: registers are not final before it.
    incomplete: bool,
    /// What the debugger wants.
    plan: DebugPlan,
}

enum Next {
    Enter,
    Stop(StopReason),
}

impl KvmVcpu {
    pub(super) fn new(shared: &Arc<Shared>, index: u32) -> Result<KvmVcpu, EngineError> {
        let fd = shared
            .fd
            .create_vcpu(u64::from(index))
            .map_err(os("create a vCPU in KVM"))?;
        Ok(KvmVcpu {
            fd,
            index,
            shared: Arc::clone(shared),
            shut_down: false,
            incomplete: false,
            plan: DebugPlan::default(),
        })
    }

    pub(super) fn tsc_khz(&self) -> Result<u64, EngineError> {
        Ok(u64::from(
            self.fd
                .get_tsc_khz()
                .map_err(os("read the TSC frequency from KVM"))?,
        ))
    }

    pub(super) fn set_cpuid(&self, table: &CpuidTable) -> Result<(), EngineError> {
        self.fd
            .set_cpuid2(&cpuid::to_kvm(table)?)
            .map_err(os("set CPUID in KVM"))
    }

    fn immediate_exit(&mut self) -> *const AtomicU8 {
        (&raw mut self.fd.get_kvm_run().immediate_exit).cast()
    }

    fn set_immediate_exit(&mut self, v: u8) {
        let p = self.immediate_exit();
        // SAFETY: the byte lies in the kvm_run page that `fd` maps.
        unsafe { &*p }.store(v, Ordering::SeqCst);
    }

    fn stop_requested(&self) -> bool {
        self.shared
            .remotes
            .get(self.index as usize)
            .is_some_and(|r| r.stop.load(Ordering::SeqCst))
    }

    /// Hands the PIC's interrupt to KVM if the vCPU can take it now, else asks to be told when.
    fn offer_pic_interrupt(&mut self) -> Result<(), EngineError> {
        if self.index != 0 {
            return Ok(());
        }
        let raised = self.shared.pic_intr.load(Ordering::SeqCst);
        let run = self.fd.get_kvm_run();
        if !raised {
            run.request_interrupt_window = 0;
            return Ok(());
        }
        if run.ready_for_interrupt_injection == 0 || run.if_flag == 0 {
            run.request_interrupt_window = 1;
            return Ok(());
        }
        run.request_interrupt_window = 0;
        // The acknowledge cycle changes the PIC's output; whoever answers updates set_pic_intr.
        if let Some(vector) = self.shared.io.ack_pic() {
            match ioctl::interrupt(&self.fd, vector) {
                Ok(()) => {
                    // One at a time: a further one waits for the window.
                    let run = self.fd.get_kvm_run();
                    run.ready_for_interrupt_injection = 0;
                    run.request_interrupt_window =
                        u8::from(self.shared.pic_intr.load(Ordering::SeqCst));
                }
                Err(e) => return Err(os("inject the PIC's interrupt")(e)),
            }
        }
        Ok(())
    }

    fn run_loop(&mut self) -> StopReason {
        loop {
            // Order: first forget old kicks, then look at what they were about.
            self.set_immediate_exit(0);
            fence(Ordering::SeqCst);
            if self.stop_requested() {
                if !self.incomplete {
                    return StopReason::Requested;
                }
                // Let KVM finish the instruction whose exit was just served, and nothing more.
                self.set_immediate_exit(1);
            } else if let Err(e) = self.offer_pic_interrupt() {
                return StopReason::Failed(e);
            }
            match self.enter() {
                Next::Enter => {}
                Next::Stop(r) => return r,
            }
        }
    }

    /// One KVM_RUN and its exit.
    fn enter(&mut self) -> Next {
        let io = Arc::clone(&self.shared.io);
        let io: &dyn CpuIo = &*io;
        let vcpu = self.index;
        let exit = self.fd.run();
        let reason = match exit {
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                data.fill(0xff);
                io.mmio_read(vcpu, gpa, data);
                self.incomplete = true;
                return Next::Enter;
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                io.mmio_write(vcpu, gpa, data);
                self.incomplete = true;
                return Next::Enter;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let (ptr, len) = (data.as_mut_ptr(), data.len());
                let size = self.pio_size();
                // SAFETY: the slice that `run` returned; nothing else refers to it now.
                let data = unsafe { std::slice::from_raw_parts_mut(ptr, len) };
                data.fill(0xff);
                for item in data.chunks_exact_mut(size) {
                    io.pio_read(vcpu, port, item);
                }
                self.incomplete = true;
                return Next::Enter;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let (ptr, len) = (data.as_ptr(), data.len());
                let size = self.pio_size();
                // SAFETY: as above.
                let data = unsafe { std::slice::from_raw_parts(ptr, len) };
                for item in data.chunks_exact(size) {
                    io.pio_write(vcpu, port, item);
                }
                self.incomplete = true;
                return Next::Enter;
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                io.eoi(vector);
                self.incomplete = true;
                return Next::Enter;
            }
            // The window is open: the loop offers the PIC's interrupt. HLT only exits where KVM
            // leaves it to user space; entering again waits in the kernel.
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::Hlt) => {
                self.incomplete = false;
                return Next::Enter;
            }
            Ok(VcpuExit::Debug(why)) => {
                self.incomplete = false;
                let stop = debug::why(&self.plan, why.dr6);
                return Next::Stop(StopReason::Debug(stop));
            }
            Ok(VcpuExit::Shutdown) => {
                self.shut_down = true;
                return Next::Stop(StopReason::TripleFault);
            }
            Ok(VcpuExit::SystemEvent(kind, data)) => {
                let data: Vec<u64> = data.to_vec();
                return Next::Stop(self.system_event(kind, &data));
            }
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(VcpuExit::FailEntry(code, cpu)) => {
                format!("KVM could not enter the guest: hardware reason {code:#x} on CPU {cpu}")
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                format!("KVM cannot map guest memory {gpa:#x}+{size:#x} (flags {flags:#x})")
            }
            Ok(VcpuExit::Unsupported(n)) => format!("KVM left with the unknown reason {n}"),
            Ok(other) => format!("KVM left with the unexpected reason {other:?}"),
            Err(e) => match e.errno() {
                libc::EINTR => {
                    self.incomplete = false;
                    return Next::Enter;
                }
                // An AP before its start-up IPI; entering again waits in the kernel.
                libc::EAGAIN => {
                    self.incomplete = false;
                    std::thread::yield_now();
                    return Next::Enter;
                }
                _ => format!("KVM_RUN failed: {}", io::Error::from(e)),
            },
        };
        let message = format!("{reason}\n{}", self.dump());
        Next::Stop(StopReason::Failed(EngineError::Internal(message)))
    }

    /// Size in bytes of one item of the port I/O that caused the exit.
    fn pio_size(&mut self) -> usize {
        // SAFETY: exit_reason is KVM_EXIT_IO, so `io` is the live member of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size).max(1)
    }

    fn system_event(&mut self, kind: u32, data: &[u64]) -> StopReason {
        match kind {
            // The machine resets for a triple fault, and so it shall for these.
            KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_SHUTDOWN => {
                self.shut_down = true;
                StopReason::TripleFault
            }
            KVM_SYSTEM_EVENT_CRASH => StopReason::Failed(EngineError::Internal(format!(
                "KVM reports a guest crash, data {data:x?}\n{}",
                self.dump()
            ))),
            _ => StopReason::Failed(EngineError::Internal(format!(
                "KVM system event {kind}, data {data:x?}\n{}",
                self.dump()
            ))),
        }
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: exit_reason is KVM_EXIT_INTERNAL_ERROR, so `internal` is the live member.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let n = (internal.ndata as usize).min(internal.data.len());
        let data = internal.data.get(..n).unwrap_or_default();
        if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
            let what = match internal.suberror {
                2 => "two exceptions at once",
                3 => "an exit during the delivery of an event",
                4 => "an unexpected hardware exit",
                _ => "unknown",
            };
            return format!(
                "KVM internal error {} ({what}), data {data:x?}",
                internal.suberror
            );
        }
        // data[0] holds flags, then one size byte and 15 instruction bytes follow.
        let bytes: Vec<u8> = match data {
            [flags, a, b, ..] if flags & 1 != 0 => {
                let raw: Vec<u8> = a.to_le_bytes().into_iter().chain(b.to_le_bytes()).collect();
                let size = usize::from(raw.first().copied().unwrap_or(0)).min(15);
                raw.get(1..1 + size).unwrap_or_default().to_vec()
            }
            _ => Vec::new(),
        };
        if bytes.is_empty() {
            return "KVM's emulator cannot read or does not know the instruction".to_owned();
        }
        format!("KVM's emulator does not know the instruction {bytes:02x?}")
    }

    /// Registers and code bytes, for a person.
    pub(super) fn dump(&self) -> String {
        let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return "registers cannot be read".to_owned();
        };
        let mode = if s.cr0 & 1 == 0 {
            "real"
        } else if r.rflags & 1 << 17 != 0 {
            "virtual-8086"
        } else if s.efer & 1 << 10 != 0 {
            if s.cs.l != 0 {
                "64-bit"
            } else {
                "compatibility"
            }
        } else if s.cs.db != 0 {
            "32-bit"
        } else {
            "16-bit"
        };
        let lin = s.cs.base.wrapping_add(r.rip);
        let mut code = Vec::new();
        for n in 0..15 {
            let Ok(t) = self.fd.translate_gva(lin.wrapping_add(n)) else {
                break;
            };
            let mut b = [0];
            if t.valid == 0 || self.shared.memory.read(t.physical_address, &mut b).is_err() {
                break;
            }
            code.push(format!("{:02x}", b[0]));
        }
        let code = if code.is_empty() {
            "unreadable".to_owned()
        } else {
            code.join(" ")
        };
        format!(
            "  {mode} mode, CPL {}, CS:RIP {:04x}:{:016x} RFLAGS {:08x} SS:RSP {:04x}:{:016x}\n  \
             RAX {:016x} RBX {:016x} RCX {:016x} RDX {:016x}\n  \
             RSI {:016x} RDI {:016x} RBP {:016x} R8  {:016x}\n  \
             R9  {:016x} R10 {:016x} R11 {:016x} R12 {:016x}\n  \
             R13 {:016x} R14 {:016x} R15 {:016x} CR2 {:016x}\n  \
             CR0 {:08x} CR3 {:016x} CR4 {:08x} EFER {:x}\n  code at RIP: {code}",
            s.ss.dpl,
            s.cs.selector,
            r.rip,
            r.rflags,
            s.ss.selector,
            r.rsp,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.rbp,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
            s.cr2,
            s.cr0,
            s.cr3,
            s.cr4,
            s.efer
        )
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> StopReason {
        if self.shut_down {
            return StopReason::TripleFault;
        }
        let shared = Arc::clone(&self.shared);
        let Some(remote) = shared.remotes.get(self.index as usize) else {
            return StopReason::Failed(EngineError::Internal("a vCPU without control".to_owned()));
        };
        let signal = match ioctl::kick_signal() {
            Ok(s) => s,
            Err(e) => return StopReason::Failed(os("install the kick signal's handler")(e)),
        };
        // SAFETY: always succeeds.
        let thread = unsafe { libc::pthread_self() };
        let immediate_exit = self.immediate_exit();
        *lock(&remote.running) = Some(KickTarget {
            immediate_exit,
            thread,
            signal,
        });
        shared.entered();
        let reason = self.run_loop();
        shared.left();
        *lock(&remote.running) = None;
        if matches!(reason, StopReason::Requested) {
            remote.stop.store(false, Ordering::SeqCst);
        }
        reason
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.read_state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.write_state(state)?;
        self.incomplete = false;
        // A step is counted from where the processor stood.
        if !self.plan.is_empty() {
            debug::apply(&self.fd, &self.shared, &self.plan)?;
        }
        Ok(())
    }

    fn set_debug(&mut self, plan: &DebugPlan) -> Result<(), EngineError> {
        if plan.is_empty() && self.plan.is_empty() {
            return Ok(());
        }
        debug::apply(&self.fd, &self.shared, plan)?;
        self.plan = plan.clone();
        Ok(())
    }
}
