//! The process that an address space of the guest has: made, ordered to map, run and stopped.

// UNSAFETY: system calls that take addresses: spawn, mapping, ptrace.
#![allow(unsafe_code, reason = "drives another process")]

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use super::stub;
use crate::vm::lock;

/// Registers as ptrace(2) gives them.
pub type Regs = libc::user_regs_struct;

/// `PTRACE_GETREGSET` of the extended state. elf.h.
const NT_X86_XSTATE: usize = 0x202;
/// SYSCALL event of a filter. ptrace(2).
const EVENT_SECCOMP: i32 = libc::PTRACE_EVENT_SECCOMP;

/// Why the guest's code stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A signal is about to be delivered.
    Signal(i32),
    /// A system call is about to be made.
    SystemCall,
}

/// What is known of a signal.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// `si_code`.
    pub code: i32,
    /// Address that was accessed, if the code says that there is one.
    pub address: u64,
}

/// An order to the manager: a system call.
pub type Order = [u64; 7];

/// See the module documentation. Ends the process when dropped.
pub struct Process {
    manager: i32,
    runner: i32,
    ring: *mut u8,
    batch: u32,
    answers: File,
    /// The thread that traces the runner, by its id: the only one that may.
    tracer: i32,
    /// The processor that both threads are kept on.
    cpu: i32,
    /// Size of the extended state in bytes.
    xstate_bytes: usize,
}

// SAFETY: the mapping is owned; whoever calls `run` from another thread than the tracer gets an
// error from the host.
unsafe impl Send for Process {}

fn os<T>() -> Result<T> {
    Err(Error::last_os_error())
}

/// The id of the calling thread.
pub fn thread_id() -> i32 {
    // SAFETY: plain system call.
    unsafe { libc::gettid() }
}

/// A copy of a descriptor that cannot be one of those that the program wants.
fn high(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: plain system call on a live descriptor.
    let n = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 16) };
    if n < 0 {
        return os();
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(n) })
}

/// Memory that may be executed.
pub fn memfd(name: &std::ffi::CStr) -> Result<OwnedFd> {
    /// Says that it may be executed; kernels before 6.3 do not know it, nor the opposite.
    const MFD_EXEC: u32 = 0x10;
    for flags in [libc::MFD_CLOEXEC | MFD_EXEC, libc::MFD_CLOEXEC] {
        // SAFETY: the name is NUL-terminated.
        let n = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if n >= 0 {
            // SAFETY: a fresh descriptor that nobody else owns.
            return high(std::os::fd::AsFd::as_fd(&unsafe {
                OwnedFd::from_raw_fd(n)
            }));
        }
    }
    os()
}

/// The program, in a file without a name, made once.
fn program() -> Result<RawFd> {
    static PROGRAM: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let made = PROGRAM.get_or_init(|| {
        let mut file = File::from(memfd(c"pyrite-guest").ok()?);
        std::io::Write::write_all(&mut file, &stub::image()).ok()?;
        Some(file.into())
    });
    made.as_ref()
        .map(AsRawFd::as_raw_fd)
        .ok_or_else(|| Error::from(ErrorKind::Unsupported))
}

impl Process {
    /// Starts a process that can map `ram` and copies of its pages, `patched`. Ends with the calling thread, which traces it.
    ///
    /// # Errors
    /// What the host says; it may forbid tracing, or lack what is needed.
    /// `tsc`: its program may read the host's time-stamp counter.
    pub fn start(ram: BorrowedFd<'_>, patched: BorrowedFd<'_>, tsc: bool) -> Result<Process> {
        reap();
        let program = program()?;
        let ring_fd = memfd(c"pyrite-orders")?;
        // SAFETY: plain system call.
        if unsafe { libc::ftruncate(ring_fd.as_raw_fd(), stub::RING_BYTES as i64) } != 0 {
            return os();
        }
        // SAFETY: a new mapping.
        let ring = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                stub::RING_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                ring_fd.as_raw_fd(),
                0,
            )
        };
        if ring == libc::MAP_FAILED {
            return os();
        }
        let mode = if tsc {
            libc::PR_TSC_ENABLE
        } else {
            libc::PR_TSC_SIGSEGV
        };
        // SAFETY: the word is in the mapping, which is aligned, and nobody else has it yet.
        unsafe { ring.byte_add(stub::TSC_AT).cast::<u32>().write(mode as u32) };
        let mut p = Process {
            manager: 0,
            runner: 0,
            ring: ring.cast(),
            batch: 0,
            answers: File::from(high(ram)?),
            tracer: thread_id(),
            cpu: -1,
            xstate_bytes: 0,
        };
        let mut pipe = [0; 2];
        // SAFETY: the array has room for two descriptors.
        if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return os();
        }
        // SAFETY: fresh descriptors that nobody else owns.
        let [answers, answer] = pipe.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        p.answers = File::from(answers);
        let answer = high(std::os::fd::AsFd::as_fd(&answer))?;
        let ram = high(ram)?;
        let patched = high(patched)?;
        let files = [
            (ram.as_raw_fd(), stub::RAM_FD),
            (ring_fd.as_raw_fd(), stub::RING_FD),
            (answer.as_raw_fd(), stub::ANSWER_FD),
            (patched.as_raw_fd(), stub::PATCHED_FD),
        ];
        p.manager = spawn(program, &files)?;
        drop(answer);
        let mut pid = [0; 4];
        p.answers.read_exact(&mut pid)?;
        p.runner = i32::from_ne_bytes(pid);
        p.seize()?;
        // The manager has cleared its memory when it takes orders.
        p.order(&[])?;
        Ok(p)
    }

    /// Begins to trace the runner and waits until it is ready for guest code.
    fn seize(&mut self) -> Result<()> {
        self.wait_for(libc::WUNTRACED)?;
        let options = libc::PTRACE_O_TRACESECCOMP | libc::PTRACE_O_EXITKILL;
        self.ptrace(libc::PTRACE_SEIZE, 0, options as usize)?;
        // SAFETY: plain system call on a child of ours.
        unsafe { libc::kill(self.runner, libc::SIGCONT) };
        loop {
            let status = self.wait_for(libc::__WALL)?;
            if libc::WSTOPSIG(status) == libc::SIGILL {
                break;
            }
            self.ptrace(libc::PTRACE_CONT, 0, 0)?;
        }
        let mut room = vec![0; 16 << 10];
        self.xstate_bytes = self.xstate(libc::PTRACE_GETREGSET, &mut room)?;
        Ok(())
    }

    /// The thread that may run this process, by its id.
    pub fn tracer(&self) -> i32 {
        self.tracer
    }

    /// The process to signal when its guest code is to stop.
    pub fn runner(&self) -> i32 {
        self.runner
    }

    /// Size of the extended state in bytes.
    pub fn xstate_bytes(&self) -> usize {
        self.xstate_bytes
    }

    fn wait_for(&self, flags: i32) -> Result<i32> {
        let mut status = 0;
        loop {
            // SAFETY: the status is a local.
            let r = unsafe { libc::waitpid(self.runner, &raw mut status, flags) };
            if r == self.runner && libc::WIFSTOPPED(status) {
                return Ok(status);
            }
            if r >= 0 {
                return Err(Error::from(ErrorKind::BrokenPipe));
            }
            if Error::last_os_error().kind() != ErrorKind::Interrupted {
                return os();
            }
        }
    }

    fn ptrace(&self, request: libc::c_uint, address: usize, data: usize) -> Result<()> {
        // SAFETY: the requests used here take numbers, or addresses of locals of the right size.
        if unsafe { libc::ptrace(request, self.runner, address, data) } < 0 {
            return os();
        }
        Ok(())
    }

    fn xstate(&self, request: libc::c_uint, buffer: &mut [u8]) -> Result<usize> {
        let mut io = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        self.ptrace(request, NT_X86_XSTATE, &raw mut io as usize)?;
        Ok(io.iov_len)
    }

    /// Reads the registers of the stopped runner.
    pub fn regs(&self) -> Result<Regs> {
        // SAFETY: plain data, for which zero is valid.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETREGS, 0, &raw mut regs as usize)?;
        Ok(regs)
    }

    /// Sets the registers of the stopped runner.
    pub fn set_regs(&self, regs: &Regs) -> Result<()> {
        self.ptrace(libc::PTRACE_SETREGS, 0, std::ptr::from_ref(regs) as usize)
    }

    /// RIP of the stopped runner.
    pub fn rip(&self) -> Result<u64> {
        // SAFETY: PEEKUSER takes an offset and returns the word.
        let r = unsafe {
            libc::ptrace(
                libc::PTRACE_PEEKUSER,
                self.runner,
                std::mem::offset_of!(Regs, rip),
                0,
            )
        };
        Ok(r as u64)
    }

    /// Reads the extended state of the stopped runner, as XSAVE writes it.
    pub fn get_xstate(&self, buffer: &mut [u8]) -> Result<usize> {
        self.xstate(libc::PTRACE_GETREGSET, buffer)
    }

    /// Sets the extended state of the stopped runner.
    pub fn set_xstate(&self, buffer: &mut [u8]) -> Result<()> {
        self.xstate(libc::PTRACE_SETREGSET, buffer).map(|_| ())
    }

    /// Says what the signal is about that stopped the runner.
    pub fn fault(&self) -> Result<Fault> {
        // SAFETY: plain data, for which zero is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETSIGINFO, 0, &raw mut info as usize)?;
        Ok(Fault {
            code: info.si_code,
            // SAFETY: the field is a number for every signal; it means something for faults.
            address: unsafe { info.si_addr() } as u64,
        })
    }

    /// Lets the runner run until it stops.
    pub fn run(&self) -> Result<Stop> {
        self.ptrace(libc::PTRACE_CONT, 0, 0)?;
        let status = self.wait_for(libc::__WALL)?;
        if status >> 16 == EVENT_SECCOMP {
            return Ok(Stop::SystemCall);
        }
        Ok(Stop::Signal(libc::WSTOPSIG(status)))
    }

    /// Carries out system calls in the process, in this order; at the first that fails it ends.
    pub fn order(&mut self, orders: &[Order]) -> Result<()> {
        let mut rest = orders;
        loop {
            let (now, later) = rest.split_at(rest.len().min(stub::ORDERS_MAX));
            for (n, order) in now.iter().enumerate() {
                let at = stub::ORDERS_AT + n * stub::ORDER_BYTES;
                // SAFETY: ORDERS_MAX orders fit into the mapping, which is aligned.
                unsafe { self.ring.add(at).cast::<Order>().write_volatile(*order) };
            }
            self.batch = self.batch.wrapping_add(1);
            // SAFETY: both words are in the mapping, aligned, and used as atomics by all.
            let (batch, count) = unsafe {
                (
                    AtomicU32::from_ptr(self.ring.cast()),
                    AtomicU32::from_ptr(self.ring.add(4).cast()),
                )
            };
            count.store(now.len() as u32, Ordering::SeqCst);
            batch.store(self.batch, Ordering::SeqCst);
            // SAFETY: wakes a waiter on a word that lives.
            unsafe { libc::syscall(libc::SYS_futex, self.ring, libc::FUTEX_WAKE, 1) };
            let mut answer = [0];
            self.answers.read_exact(&mut answer)?;
            if answer[0] != stub::DONE {
                return Err(Error::from(ErrorKind::OutOfMemory));
            }
            if later.is_empty() {
                return Ok(());
            }
            rest = later;
        }
    }

    /// Keeps both threads of the process on one processor: that of the thread that traces it.
    pub fn keep_on(&mut self, cpu: i32) {
        if self.cpu == cpu {
            return;
        }
        self.cpu = cpu;
        for pid in [self.manager, self.runner] {
            keep_on(pid, cpu);
        }
    }
}

/// Processors that a thread may use.
pub type CpuSet = libc::cpu_set_t;

/// The processors that the calling thread may use.
pub fn cpus() -> CpuSet {
    // SAFETY: plain data, for which zero is valid; the size is its own.
    unsafe {
        let mut set: CpuSet = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<CpuSet>(), &raw mut set);
        set
    }
}

/// Lets the calling thread use these processors.
pub fn set_cpus(set: &CpuSet) {
    // SAFETY: the size is that of the set. A failure leaves things as they are.
    unsafe { libc::sched_setaffinity(0, size_of::<CpuSet>(), set) };
}

/// Keeps a thread on one processor; 0 = the calling thread.
pub fn keep_on(thread: i32, cpu: i32) {
    // SAFETY: plain data, for which zero is valid; CPU_SET checks the number.
    unsafe {
        let mut set: CpuSet = std::mem::zeroed();
        libc::CPU_SET(cpu as usize, &mut set);
        libc::sched_setaffinity(thread, size_of::<CpuSet>(), &raw const set);
    }
}

/// The processor that the calling thread is on.
pub fn this_cpu() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::sched_getcpu() }
}

/// Makes the runner `pid` stop, whatever it does.
pub fn interrupt(pid: i32) {
    // SAFETY: the process is a child that is not reaped while its pid is published.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGURG) };
}

/// Starts the program with these descriptors at these numbers.
fn spawn(program: RawFd, files: &[(RawFd, RawFd)]) -> Result<i32> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{program}"))
        .map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let name = c"pyrite-guest";
    let argv = [name.as_ptr().cast_mut(), std::ptr::null_mut()];
    let env = [std::ptr::null_mut()];
    let mut pid = 0;
    // SAFETY: the structures are initialised before use and destroyed after; strings and arrays
    // outlive the call.
    let r = unsafe {
        // A group of its own: the terminal's signals are not for it.
        let mut attributes: libc::posix_spawnattr_t = std::mem::zeroed();
        libc::posix_spawnattr_init(&raw mut attributes);
        libc::posix_spawnattr_setflags(
            &raw mut attributes,
            libc::POSIX_SPAWN_SETPGROUP as libc::c_short,
        );
        libc::posix_spawnattr_setpgroup(&raw mut attributes, 0);
        let mut actions: libc::posix_spawn_file_actions_t = std::mem::zeroed();
        libc::posix_spawn_file_actions_init(&raw mut actions);
        for (from, to) in files {
            libc::posix_spawn_file_actions_adddup2(&raw mut actions, *from, *to);
        }
        let r = libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            &raw const actions,
            &raw const attributes,
            argv.as_ptr(),
            env.as_ptr(),
        );
        libc::posix_spawn_file_actions_destroy(&raw mut actions);
        libc::posix_spawnattr_destroy(&raw mut attributes);
        r
    };
    if r != 0 {
        return Err(Error::from_raw_os_error(r));
    }
    Ok(pid)
}

/// Processes that were killed. Their memory goes in their own time, which a vCPU has not got.
static KILLED: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Takes leave of processes that have ended.
fn reap() {
    lock(&KILLED).retain(|&pid| {
        let mut status = 0;
        // SAFETY: a child of ours that was not reaped yet; the status is a local.
        unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL | libc::WNOHANG) == 0 }
    });
}

impl Drop for Process {
    fn drop(&mut self) {
        for pid in [self.runner, self.manager] {
            if pid > 0 {
                // SAFETY: a child of ours that was not reaped yet.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                lock(&KILLED).push(pid);
            }
        }
        reap();
        // SAFETY: mapped in `start`.
        unsafe { libc::munmap(self.ring.cast(), stub::RING_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// A process with one page of memory at 10000H, or why there is none.
    fn with_code(code: &[u8]) -> Option<Process> {
        let ram = memfd(c"ram").expect("memfd");
        let mut file = File::from(ram.try_clone().expect("clone"));
        let mut page = vec![0x90; 4096];
        page[..code.len()].copy_from_slice(code);
        std::io::Write::write_all(&mut file, &page).expect("write");
        let mut p = match Process::start(ram.as_fd(), ram.as_fd(), false) {
            Ok(p) => p,
            Err(e) => {
                // Containers may forbid ptrace; the translator serves there.
                assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
                return None;
            }
        };
        let map = [
            libc::SYS_mmap as u64,
            0x10000,
            4096,
            5,
            (libc::MAP_SHARED | libc::MAP_FIXED) as u64,
            stub::RAM_FD as u64,
            0,
        ];
        p.order(&[map]).expect("map");
        Some(p)
    }

    fn at(p: &Process, rip: u64) -> Regs {
        let mut r = p.regs().expect("regs");
        r.rip = rip;
        r.orig_rax = u64::MAX;
        p.set_regs(&r).expect("set");
        r
    }

    #[test]
    fn code_runs_and_system_calls_reach_nobody() {
        // mov eax, 39; syscall; inc rbx; ud2
        let Some(p) = with_code(b"\xb8\x27\0\0\0\x0f\x05\x48\xff\xc3\x0f\x0b") else {
            return;
        };
        at(&p, 0x10000);
        assert_eq!(p.run().expect("run"), Stop::SystemCall);
        let mut r = p.regs().expect("regs");
        assert_eq!((r.orig_rax, r.rip), (39, 0x10007));
        r.rbx = 6;
        r.orig_rax = u64::MAX;
        r.rax = 0x1234;
        p.set_regs(&r).expect("set");
        assert_eq!(p.run().expect("run"), Stop::Signal(libc::SIGILL));
        let r = p.regs().expect("regs");
        assert_eq!((r.rbx, r.rip, r.rax), (7, 0x1000a, 0x1234));
    }

    #[test]
    fn nothing_of_ours_is_mapped_and_the_counter_traps() {
        // mov rax, [rbx]; rdtsc
        let Some(p) = with_code(b"\x48\x8b\x03\x0f\x31") else {
            return;
        };
        let mut r = at(&p, 0x10000);
        for address in [r.rsp, 0, 0x7fff_ffff_e000, stub::CODE - 8, stub::END] {
            r.rbx = address;
            p.set_regs(&r).expect("set");
            assert_eq!(p.run().expect("run"), Stop::Signal(libc::SIGSEGV));
            assert_eq!(p.fault().expect("fault").address, address);
        }
        r.rip = 0x10003;
        p.set_regs(&r).expect("set");
        assert_eq!(p.run().expect("run"), Stop::Signal(libc::SIGSEGV));
        assert_eq!(p.rip().expect("rip"), 0x10003);
    }

    #[test]
    fn orders_cannot_be_written_by_the_guest() {
        // mov byte ptr [rbx], 1
        let Some(p) = with_code(b"\xc6\x03\x01") else {
            return;
        };
        let mut r = at(&p, 0x10000);
        for address in [stub::CODE, stub::RING] {
            r.rbx = address;
            p.set_regs(&r).expect("set");
            assert_eq!(p.run().expect("run"), Stop::Signal(libc::SIGSEGV));
        }
    }

    #[test]
    fn loop_is_interrupted() {
        let Some(p) = with_code(b"\xeb\xfe") else {
            return;
        };
        at(&p, 0x10000);
        let pid = p.runner();
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            interrupt(pid);
        });
        assert_eq!(p.run().expect("run"), Stop::Signal(libc::SIGURG));
        other.join().expect("thread");
    }
}
