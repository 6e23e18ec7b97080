//! The oracle: runs a sequence on the host's processor, in this process.
//!
//! Code, data and the way out are mapped at the addresses of [`super::machine`]. IRETQ enters the
//! sequence (it sets RSP and the flags at once and serialises, so that fresh code is fetched); a
//! jump to `END` or a signal leaves it. While a sequence runs, FS and GS base are the guest's, so
//! signal handlers restore them before they do anything else.

// UNSAFETY: executes raw machine code and handles its signals.
#![allow(unsafe_code, reason = "the host is the oracle")]

use std::arch::global_asm;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use pyrite_x86::XsaveArea;

use super::machine::{
    CODE, CODE_BYTES, Components, DATA, DATA_BYTES, END, END16, END32, End, LDT, Mode, Outcome,
    RO_BYTES, Start,
};

/// The context page; its offsets are in the assembly below.
pub const CONTEXT: u64 = 0x7003_1000;
pub const CONTEXT_BYTES: usize = 0x4000;

#[repr(C)]
struct Context {
    gpr_in: [u64; 16],
    flags_in: u64,
    /// Offset 136: ES DS FS GS.
    selectors_in: [u16; 4],
    fs_in: u64,
    gs_in: u64,
    /// Offset 160.
    host_rsp: u64,
    host_fs: u64,
    exit: u64,
    active: u64,
    /// Offset 192: RIP CS RFLAGS RSP SS.
    iret: [u64; 5],
    /// Offset 232: ES DS FS GS SS CS.
    selectors_out: [u16; 6],
    pad: [u16; 6],
    /// Offset 256.
    gpr_out: [u64; 16],
    flags_out: u64,
    rip_out: u64,
    fs_out: u64,
    gs_out: u64,
    /// Offset 416: 0 = came to the end, else the vector plus 1.
    kind: u64,
    code: u64,
    cr2: u64,
    mxcsr: u32,
    fcw: u32,
    /// Offset 448.
    host_gs: u64,
    /// Offset 456: counts runs, for the watchdog.
    runs: u64,
    watched: u64,
    ticks: u64,
    stack: [u8; 544],
    /// Offset 1024.
    xsave_in: [u8; 4096],
    xsave_out: [u8; 4096],
}

global_asm!(
    ".p2align 4",
    ".globl pyrite_isa_host_enter",
    "pyrite_isa_host_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov qword ptr ds:[0x70031000 + 160], rsp",
    "stmxcsr dword ptr ds:[0x70031000 + 440]",
    "fnstcw word ptr ds:[0x70031000 + 444]",
    "rdfsbase rax",
    "mov qword ptr ds:[0x70031000 + 168], rax",
    "rdgsbase rax",
    "mov qword ptr ds:[0x70031000 + 448], rax",
    "mov es, word ptr ds:[0x70031000 + 136]",
    "mov ds, word ptr ds:[0x70031000 + 138]",
    "mov fs, word ptr ds:[0x70031000 + 140]",
    "mov gs, word ptr ds:[0x70031000 + 142]",
    "mov eax, -1",
    "mov edx, -1",
    "mov ecx, 0x70031000 + 1024",
    "xrstor64 [rcx]",
    "mov qword ptr ds:[0x70031000 + 184], 1",
    "mov rax, qword ptr ds:[0x70031000 + 144]",
    "wrfsbase rax",
    "mov rax, qword ptr ds:[0x70031000 + 152]",
    "wrgsbase rax",
    "mov rcx, qword ptr ds:[0x70031000 + 8]",
    "mov rdx, qword ptr ds:[0x70031000 + 16]",
    "mov rbx, qword ptr ds:[0x70031000 + 24]",
    "mov rbp, qword ptr ds:[0x70031000 + 40]",
    "mov rsi, qword ptr ds:[0x70031000 + 48]",
    "mov rdi, qword ptr ds:[0x70031000 + 56]",
    "mov r8, qword ptr ds:[0x70031000 + 64]",
    "mov r9, qword ptr ds:[0x70031000 + 72]",
    "mov r10, qword ptr ds:[0x70031000 + 80]",
    "mov r11, qword ptr ds:[0x70031000 + 88]",
    "mov r12, qword ptr ds:[0x70031000 + 96]",
    "mov r13, qword ptr ds:[0x70031000 + 104]",
    "mov r14, qword ptr ds:[0x70031000 + 112]",
    "mov r15, qword ptr ds:[0x70031000 + 120]",
    "mov rax, qword ptr ds:[0x70031000]",
    "mov esp, 0x70031000 + 192",
    "iretq",
    ".p2align 4",
    ".globl pyrite_isa_host_exit",
    "pyrite_isa_host_exit:",
    "mov qword ptr ds:[0x70031000 + 256 + 32], rsp",
    "mov esp, 0x70031000 + 1000",
    "pushfq",
    "pop qword ptr ds:[0x70031000 + 384]",
    "push 0x202",
    "popfq",
    "mov qword ptr ds:[0x70031000 + 256], rax",
    "mov qword ptr ds:[0x70031000 + 256 + 8], rcx",
    "mov qword ptr ds:[0x70031000 + 256 + 16], rdx",
    "mov qword ptr ds:[0x70031000 + 256 + 24], rbx",
    "mov qword ptr ds:[0x70031000 + 256 + 40], rbp",
    "mov qword ptr ds:[0x70031000 + 256 + 48], rsi",
    "mov qword ptr ds:[0x70031000 + 256 + 56], rdi",
    "mov qword ptr ds:[0x70031000 + 256 + 64], r8",
    "mov qword ptr ds:[0x70031000 + 256 + 72], r9",
    "mov qword ptr ds:[0x70031000 + 256 + 80], r10",
    "mov qword ptr ds:[0x70031000 + 256 + 88], r11",
    "mov qword ptr ds:[0x70031000 + 256 + 96], r12",
    "mov qword ptr ds:[0x70031000 + 256 + 104], r13",
    "mov qword ptr ds:[0x70031000 + 256 + 112], r14",
    "mov qword ptr ds:[0x70031000 + 256 + 120], r15",
    "mov word ptr ds:[0x70031000 + 232], es",
    "mov word ptr ds:[0x70031000 + 234], ds",
    "mov word ptr ds:[0x70031000 + 236], fs",
    "mov word ptr ds:[0x70031000 + 238], gs",
    "mov word ptr ds:[0x70031000 + 240], ss",
    "mov eax, 0x2b",
    "mov ss, eax",
    "rdfsbase rax",
    "mov qword ptr ds:[0x70031000 + 400], rax",
    "rdgsbase rax",
    "mov qword ptr ds:[0x70031000 + 408], rax",
    "mov rax, qword ptr ds:[0x70031000 + 168]",
    "wrfsbase rax",
    "mov rax, qword ptr ds:[0x70031000 + 448]",
    "wrgsbase rax",
    "mov eax, -1",
    "mov edx, -1",
    "mov ecx, 0x70031000 + 5120",
    "xsave64 [rcx]",
    "mov qword ptr ds:[0x70031000 + 184], 0",
    ".globl pyrite_isa_host_resume",
    "pyrite_isa_host_resume:",
    "mov rsp, qword ptr ds:[0x70031000 + 160]",
    "push 0x202",
    "popfq",
    "fninit",
    "fldcw word ptr ds:[0x70031000 + 444]",
    "vzeroupper",
    "ldmxcsr dword ptr ds:[0x70031000 + 440]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "sysv64" {
    fn pyrite_isa_host_enter();
    fn pyrite_isa_host_exit();
    fn pyrite_isa_host_resume();
}

/// One user of the fixed addresses at a time.
static OWNER: Mutex<()> = Mutex::new(());
static READY: AtomicBool = AtomicBool::new(false);
static OLD: [AtomicUsize; 5] = [const { AtomicUsize::new(0) }; 5];
const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// The right to run sequences on the host.
pub struct Host {
    _owner: MutexGuard<'static, ()>,
    code: *mut u8,
    ro: *mut u8,
    components: Components,
}

fn map(addr: u64, len: usize, prot: i32, flags: i32, fd: i32) -> *mut u8 {
    let flags = if addr != 0 {
        flags | libc::MAP_FIXED
    } else {
        flags
    };
    // SAFETY: a fixed address is one of the layout, which nothing else uses: low memory is not
    // handed out by the kernel.
    let p = unsafe { libc::mmap(addr as *mut _, len, prot, flags, fd, 0) };
    assert_ne!(
        p,
        libc::MAP_FAILED,
        "{addr:#x}: {}",
        std::io::Error::last_os_error()
    );
    p.cast()
}

/// Memory that is writable at the address returned and `prot` at `addr`.
fn map_twice(addr: u64, len: usize, prot: i32) -> *mut u8 {
    // SAFETY: plain system calls.
    let fd = unsafe { libc::memfd_create(c"isa-test".as_ptr(), 0) };
    // SAFETY: as above.
    assert!(fd >= 0 && unsafe { libc::ftruncate(fd, len as i64) } == 0);
    let rw = map(
        0,
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED,
        fd,
    );
    // SAFETY: the mapping is this long.
    unsafe { std::ptr::write_bytes(rw, 0xcc, len) };
    map(addr, len, prot, libc::MAP_SHARED | libc::MAP_POPULATE, fd);
    // SAFETY: the mappings hold the memory.
    unsafe { libc::close(fd) };
    rw
}

impl Host {
    /// Maps the layout (once) and installs the handlers. After engines exist: theirs are chained.
    pub fn new() -> Host {
        let owner = OWNER.lock().unwrap_or_else(PoisonError::into_inner);
        use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};
        let code = map_twice(CODE, CODE_BYTES, PROT_READ | PROT_EXEC);
        let ro = map_twice(DATA + DATA_BYTES as u64, RO_BYTES, PROT_READ);
        let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        map(DATA, DATA_BYTES, PROT_READ | PROT_WRITE, anon, -1);
        let end = map_twice(END, 4096, PROT_READ | PROT_EXEC);
        map(CONTEXT, CONTEXT_BYTES, PROT_READ | PROT_WRITE, anon, -1);
        // jmp [CONTEXT + 176]
        let mut jump = vec![0xff, 0x24, 0x25];
        jump.extend((CONTEXT as u32 + 176).to_le_bytes());
        // jmp 33H:END
        let mut far = vec![0xea];
        far.extend((END as u32).to_le_bytes());
        far.extend([0x33, 0]);
        let out = Mode::Seg16.way_out(0);
        // SAFETY: the pages are writable here, and what is written lies in them.
        unsafe {
            let put =
                |b: &[u8], to: *mut u8| std::ptr::copy_nonoverlapping(b.as_ptr(), to, b.len());
            put(&jump, end);
            put(&far, end.add((END32 - END) as usize));
            put(&out, code.add(END16));
        }
        has_descriptors();
        context().exit = pyrite_isa_host_exit as *const () as u64;
        if !READY.swap(true, Ordering::SeqCst) {
            install();
        }
        pyrite_soft::signals::prepare_thread();
        watch();
        Host {
            _owner: owner,
            code,
            ro,
            components: Components::of_host(),
        }
    }

    /// Puts code at `CODE + at` (for the next run).
    pub fn set_code(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= END16);
        // SAFETY: in the mapping, checked above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code.add(at), bytes.len()) };
    }

    /// Runs the code at `CODE + at`.
    pub fn run(&mut self, at: usize, start: &Start) -> Outcome {
        let c = context();
        c.gpr_in = start.gpr;
        c.fs_in = start.fs_base;
        c.gs_in = start.gs_base;
        let [es, cs, ss, ds, fs, gs] = start.mode.selectors();
        c.selectors_in = [es, ds, fs, gs];
        let rip = start.mode.code() + at as u64;
        c.iret = [rip, cs.into(), start.rflags, start.gpr[4], ss.into()];
        c.xsave_in = start.xsave.0;
        c.kind = 0;
        c.runs += 1;
        // SAFETY: the mappings are this long; the sequence was built by the test.
        unsafe {
            let (data, ro) = start.data.split_at(DATA_BYTES);
            std::ptr::copy_nonoverlapping(data.as_ptr(), DATA as *mut u8, DATA_BYTES);
            std::ptr::copy_nonoverlapping(ro.as_ptr(), self.ro, RO_BYTES);
            pyrite_isa_host_enter();
        }
        let c = context();
        let mut data = vec![0; DATA_BYTES + RO_BYTES];
        // SAFETY: readable and this long.
        unsafe {
            std::ptr::copy_nonoverlapping(DATA as *const u8, data.as_mut_ptr(), data.len());
        }
        let mut xsave = XsaveArea(c.xsave_out);
        self.components.normalise(&mut xsave);
        // The kernel drops the RPL of null selectors when it switches tasks.
        let [es, ds, fs, gs, ss, cs] = c.selectors_out.map(|s| if s < 4 { 0 } else { s });
        let mut gpr = c.gpr_out;
        if start.mode != Mode::Long {
            // An interrupt leaves something of the kernel's in RSP above a 16-bit stack.
            gpr[4] &= 0xffff_ffff;
        }
        let end = match c.kind {
            0 => End::Through,
            1000 => End::Lost,
            n => {
                let vector = n as u8 - 1;
                End::Exception {
                    vector,
                    code: if matches!(vector, 8 | 10..=14 | 17) {
                        c.code as u32
                    } else {
                        0
                    },
                    cr2: if vector == 14 { c.cr2 } else { 0 },
                }
            }
        };
        Outcome {
            end,
            gpr,
            rip: if c.kind == 0 { END } else { c.rip_out },
            rflags: c.flags_out,
            fs_base: c.fs_out,
            gs_base: c.gs_out,
            selectors: [es, if c.kind == 0 { 0 } else { cs }, ss, ds, fs, gs],
            xsave,
            data,
        }
    }
}

fn context() -> &'static mut Context {
    // SAFETY: mapped in `Host::new`; only the owner of `OWNER` and its signal handlers come here,
    // and never keep the reference over a run.
    unsafe { &mut *(CONTEXT as *mut Context) }
}

/// Why sequences of a mode cannot run on this host; `None` = they can.
pub fn lacks(mode: Mode) -> Option<&'static str> {
    let needs = mode.selectors().iter().any(|s| s & 4 != 0);
    (needs && !has_descriptors()).then_some("this host's kernel gives no local descriptors")
}

/// Gives this process the local descriptors of the layout, once; false, with a note why, where the
/// kernel was built without local descriptors or a sandbox forbids them.
pub fn has_descriptors() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| match local_descriptors() {
        Ok(()) => true,
        Err(e) => {
            println!("skipped: 32- and 16-bit code: modify_ldt: {e}");
            false
        }
    })
}

fn local_descriptors() -> std::io::Result<()> {
    for (n, (base, limit, access, flags)) in LDT.into_iter().enumerate() {
        let is_code = access & 8 != 0;
        // struct user_desc: D/B in bit 0, then the type (1 bit direction, 1 bit code), read or
        // execute only in bit 3.
        let bits =
            u32::from(flags & 4 != 0) | u32::from(is_code) << 2 | u32::from(access & 2 == 0) << 3;
        let entry = [n as u32, base as u32, limit, bits];
        // SAFETY: the kernel copies 16 bytes.
        let r = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, entry.as_ptr(), 16) };
        if r != 0 {
            // The kernel returns the system call's own errors in 32 bits, which the C library
            // does not take for errors.
            let e = match r {
                -1 => std::io::Error::last_os_error(),
                r => std::io::Error::from_raw_os_error((r as i32).wrapping_neg()),
            };
            let lacking = match e.raw_os_error() {
                Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => true,
                // A kernel without 16-bit segments.
                Some(libc::EINVAL) => flags & 4 == 0,
                _ => false,
            };
            assert!(lacking, "descriptor {n}: modify_ldt: {e}");
            return Err(e);
        }
    }
    Ok(())
}

fn install() {
    let handler = |sig: i32, f: usize| {
        // SAFETY: plain data; zero is a valid start.
        let (mut new, mut old): (libc::sigaction, libc::sigaction) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        new.sa_sigaction = f;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for.
        unsafe { libc::sigaction(sig, &new, &mut old) };
        old.sa_sigaction
    };
    for (n, sig) in SIGNALS.into_iter().enumerate() {
        OLD[n].store(
            handler(sig, on_signal as *const () as usize),
            Ordering::SeqCst,
        );
    }
    handler(libc::SIGALRM, on_alarm as *const () as usize);
}

/// A timer that interrupts this thread, for sequences that do not end.
fn watch() {
    // SAFETY: plain data; zero is a valid start.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGALRM;
    let every = libc::timespec {
        tv_sec: 0,
        tv_nsec: 20_000_000,
    };
    let times = libc::itimerspec {
        it_interval: every,
        it_value: every,
    };
    let mut timer: libc::timer_t = std::ptr::null_mut();
    // SAFETY: plain system calls; the timer is never deleted and fires into a handler that ignores
    // what is not its.
    unsafe {
        event.sigev_notify_thread_id = libc::gettid();
        assert_eq!(
            libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &mut event, &mut timer),
            0
        );
        assert_eq!(
            libc::timer_settime(timer, 0, &times, std::ptr::null_mut()),
            0
        );
    }
}

/// Leaves the sequence: what the signal frame holds is the outcome.
fn leave(u: &mut libc::ucontext_t, kind: u64) {
    let c = context();
    let (fs, gs): (u64, u64);
    // SAFETY: FSGSBASE is enabled, else the run would not have got here.
    unsafe {
        std::arch::asm!(
            "rdfsbase {0}", "rdgsbase {1}", "wrfsbase {2}", "wrgsbase {3}",
            out(reg) fs, out(reg) gs, in(reg) c.host_fs, in(reg) c.host_gs,
        );
    }
    (c.fs_out, c.gs_out) = (fs, gs);
    let g = &mut u.uc_mcontext.gregs;
    let (es, ds, fs, gs): (u16, u16, u16, u16);
    // SAFETY: reads the selectors, which a signal leaves as they were.
    unsafe {
        std::arch::asm!(
            "mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, fs", "mov {3:x}, gs",
            out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs,
        );
    }
    let cs_ss = &mut g[libc::REG_CSGSFS as usize];
    c.selectors_out = [es, ds, fs, gs, (*cs_ss >> 48) as u16, *cs_ss as u16];
    *cs_ss = 0x33 | 0x2b << 48;
    let order = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    for (n, r) in order.into_iter().enumerate() {
        c.gpr_out[n] = g[r as usize] as u64;
    }
    c.flags_out = g[libc::REG_EFL as usize] as u64;
    c.rip_out = g[libc::REG_RIP as usize] as u64;
    c.kind = kind;
    c.code = g[libc::REG_ERR as usize] as u64;
    c.cr2 = g[libc::REG_CR2 as usize] as u64;
    let area = u.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: the kernel's frame: legacy area, then the extended size that it tells.
    unsafe {
        let size = area.add(464 + 16).cast::<u32>().read_unaligned() as usize;
        std::ptr::copy_nonoverlapping(area, c.xsave_out.as_mut_ptr(), size.min(4096));
    }
    c.active = 0;
    g[libc::REG_RIP as usize] = pyrite_isa_host_resume as *const () as i64;
    g[libc::REG_EFL as usize] = 0x202;
}

extern "C" fn on_signal(sig: i32, info: *mut libc::siginfo_t, u: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context.
    let context_ = unsafe { &mut *u.cast::<libc::ucontext_t>() };
    if mine() {
        let trap = context_.uc_mcontext.gregs[libc::REG_TRAPNO as usize] as u64;
        leave(context_, trap + 1);
        return;
    }
    let n = SIGNALS.iter().position(|&s| s == sig).unwrap_or(0);
    let old = OLD[n].load(Ordering::SeqCst);
    if old > 1 {
        // SAFETY: the engine's handler, installed with SA_SIGINFO.
        let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(old) };
        f(sig, info, u);
    } else {
        // SAFETY: the default action: a crash.
        unsafe { libc::signal(sig, libc::SIG_DFL) };
    }
}

/// True if a sequence runs on the host (only one thread at a time does that, and no other thread
/// raises signals of its own meanwhile).
fn mine() -> bool {
    context().active != 0
}

extern "C" fn on_alarm(_sig: i32, _info: *mut libc::siginfo_t, u: *mut libc::c_void) {
    // Before anything else runs on the sequence's FS base.
    if !mine() {
        return;
    }
    let c = context();
    if c.watched != c.runs {
        (c.watched, c.ticks) = (c.runs, 0);
        return;
    }
    // A busy machine may take a while for one sequence.
    c.ticks += 1;
    if c.ticks < 2 {
        return;
    }
    // SAFETY: the kernel passes the interrupted context.
    leave(unsafe { &mut *u.cast::<libc::ucontext_t>() }, 1000);
}
