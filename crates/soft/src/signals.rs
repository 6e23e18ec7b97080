//! Host signals that guest instructions cause when they run on the host's own units.
//!
//! One handler for SIGSEGV, SIGBUS, SIGFPE and SIGILL serves two clients: single-instruction stubs
//! of the interpreter, and translated code, by a hook. Whatever neither claims goes to the handler
//! that was there before (the default action: crash).

// UNSAFETY: signal handlers and alternate stacks.
#![allow(unsafe_code, reason = "installs and runs signal handlers")]

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Looks at a fault: true if it changed the context so that execution can go on.
///
/// Runs in a signal handler: async-signal-safe operations only.
pub type TranslatorHook = fn(sig: i32, context: &mut libc::ucontext_t) -> bool;

const SIGNALS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
/// LIMIT: an AVX-512 signal frame is 3 KiB; the rest is for the hook.
const ALT_STACK_BYTES: usize = 64 * 1024;

static HOOK: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
static OLD: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

thread_local! {
    /// The host instruction that this thread executes for a guest: its address, and where to
    /// say which exception it raised. 0 = none.
    static STUB: Cell<(usize, *mut u64)> = const { Cell::new((0, std::ptr::null_mut())) };
    /// Alternate stack of this thread.
    static ALT: AltStack = const { AltStack(Cell::new(std::ptr::null_mut())) };
}

struct AltStack(Cell<*mut libc::c_void>);

impl Drop for AltStack {
    fn drop(&mut self) {
        let base = self.0.get();
        if base.is_null() {
            return;
        }
        let off = libc::stack_t {
            ss_sp: std::ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: 0,
        };
        // SAFETY: takes the alternate stack out of use, then gives its memory back.
        unsafe {
            libc::sigaltstack(&off, std::ptr::null_mut());
            libc::munmap(base, ALT_STACK_BYTES);
        }
    }
}

/// Installs the handlers (once per process) and an alternate signal stack for this thread.
pub fn install_signal_handlers() {
    OLD.get_or_init(|| {
        SIGNALS.map(|sig| {
            // SAFETY: both structures are plain data; zero is a valid start.
            let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: as above.
            let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
            new.sa_sigaction = on_signal as *const () as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: the handler has the signature that SA_SIGINFO asks for.
            unsafe {
                libc::sigemptyset(&mut new.sa_mask);
                libc::sigaction(sig, &new, &mut old);
            }
            old
        })
    });
    prepare_thread();
}

/// Gives this thread an alternate signal stack of our size. Translated code runs on a stack of its
/// own that cannot take a signal frame.
pub fn prepare_thread() {
    ALT.with(|alt| {
        if !alt.0.get().is_null() {
            return;
        }
        // SAFETY: a new anonymous mapping.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ALT_STACK_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            // Without it the stack that is there serves; only stack overflow goes unreported.
            return;
        }
        let stack = libc::stack_t {
            ss_sp: base,
            ss_flags: 0,
            ss_size: ALT_STACK_BYTES,
        };
        // SAFETY: the mapping lives until the thread ends.
        if unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) } == 0 {
            alt.0.set(base);
        } else {
            // SAFETY: just mapped and not in use.
            unsafe { libc::munmap(base, ALT_STACK_BYTES) };
        }
    });
}

/// Sets who looks at faults of translated code.
pub fn set_translator_hook(hook: TranslatorHook) {
    HOOK.store(hook as *mut (), Ordering::Release);
}

/// Declares that this thread is about to execute one instruction at `at` that was called, or (0)
/// no longer does. On an exception `*fault` becomes the host's trap number plus 1 and the call
/// returns.
///
/// # Safety
/// `fault` stays valid until the next call, and at the instruction RSP points at the return
/// address.
pub(crate) unsafe fn expect_fault_at(at: usize, fault: *mut u64) {
    STUB.with(|s| s.set((at, fault)));
}

extern "C" fn on_signal(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context, exclusively ours while we run.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let g = &mut context.uc_mcontext.gregs;
    let rip = g[libc::REG_RIP as usize] as usize;
    let (at, fault) = STUB.with(Cell::get);
    if at != 0 && rip == at {
        // SAFETY: the promise of `expect_fault_at`.
        unsafe {
            *fault = g[libc::REG_TRAPNO as usize] as u64 + 1;
            let rsp = g[libc::REG_RSP as usize] as *const i64;
            g[libc::REG_RIP as usize] = *rsp;
        }
        g[libc::REG_RSP as usize] += 8;
        return;
    }
    let hook = HOOK.load(Ordering::Acquire);
    if !hook.is_null() {
        // SAFETY: only `set_translator_hook` stores here.
        let hook: TranslatorHook = unsafe { std::mem::transmute(hook) };
        if hook(sig, context) {
            return;
        }
    }
    let _ = info;
    // Not ours: put the former handler back; the instruction runs again and meets it.
    if let Some(old) = OLD.get()
        && let Some(n) = SIGNALS.iter().position(|&s| s == sig)
    {
        // SAFETY: restores what the kernel gave us.
        unsafe { libc::sigaction(sig, &old[n], std::ptr::null_mut()) };
    }
}
