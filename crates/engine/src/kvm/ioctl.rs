//! The KVM ioctls that `kvm-ioctls` lacks or offers in an unsuitable form, and the kick signal.
//!
//! Linux, Documentation/virt/kvm/api.rst.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use kvm_bindings::kvm_sregs2;
use kvm_ioctls::VcpuFd;

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`, 4 bytes.
const KVM_INTERRUPT: u64 = 0x4004_ae86;
/// `_IOR(KVMIO, 0xcc, struct kvm_sregs2)`, 320 bytes.
const KVM_GET_SREGS2: u64 = 0x8140_aecc;
/// `_IOW(KVMIO, 0xcd, struct kvm_sregs2)`.
const KVM_SET_SREGS2: u64 = 0x4140_aecd;
/// `_IOR(KVMIO, 0xa4, struct kvm_xsave)`, 4096 bytes.
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
/// `_IOW(KVMIO, 0xa5, struct kvm_xsave)`.
const KVM_SET_XSAVE: u64 = 0x5000_aea5;
/// `_IOR(KVMIO, 0xcf, struct kvm_xsave)`; the kernel writes as many bytes as KVM_CAP_XSAVE2 says.
const KVM_GET_XSAVE2: u64 = 0x9000_aecf;

const _: () = assert!(size_of::<kvm_sregs2>() == 320);

fn checked(r: i32) -> io::Result<()> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Queues an external interrupt (the PIC's) for injection at the next entry.
pub(super) fn interrupt(fd: &VcpuFd, vector: u8) -> io::Result<()> {
    let arg = u32::from(vector);
    // SAFETY: KVM_INTERRUPT reads 4 bytes from a live local.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_INTERRUPT, &raw const arg) })
}

/// KVM_GET_SREGS2.
pub(super) fn sregs2(fd: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut s = kvm_sregs2::default();
    // SAFETY: the kernel writes size_of::<kvm_sregs2>() bytes into a live local.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_SREGS2, &raw mut s) })?;
    Ok(s)
}

/// KVM_SET_SREGS2.
pub(super) fn set_sregs2(fd: &VcpuFd, s: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads size_of::<kvm_sregs2>() bytes from a live reference.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_SREGS2, &raw const *s) })
}

/// The XSAVE area in the standard format. `bytes`: what KVM_CAP_XSAVE2 answered (0 = not there).
pub(super) fn xsave(fd: &VcpuFd, bytes: usize) -> io::Result<Vec<u8>> {
    // u64 elements keep the buffer aligned for the kernel's structure.
    let mut buf = vec![0u64; bytes.max(4096).div_ceil(8)];
    let request = if bytes > 4096 {
        KVM_GET_XSAVE2
    } else {
        KVM_GET_XSAVE
    };
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes, KVM_GET_XSAVE2 the size that KVM_CAP_XSAVE2 says;
    // the buffer is at least as long in either case.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, buf.as_mut_ptr()) })?;
    Ok(buf.iter().flat_map(|w| w.to_le_bytes()).collect())
}

/// KVM_SET_XSAVE. The area is padded to what the kernel may read.
pub(super) fn set_xsave(fd: &VcpuFd, bytes: usize, area: &[u8]) -> io::Result<()> {
    let mut buf = vec![0u64; bytes.max(area.len()).max(4096).div_ceil(8)];
    for (w, c) in buf.iter_mut().zip(area.chunks(8)) {
        let mut b = [0u8; 8];
        b[..c.len()].copy_from_slice(c);
        *w = u64::from_le_bytes(b);
    }
    // SAFETY: the kernel reads at most max(4096, KVM_CAP_XSAVE2) bytes; the buffer is that long.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_XSAVE, buf.as_ptr()) })
}

extern "C" fn kicked(_: libc::c_int) {}

/// The signal that makes KVM_RUN return, with its empty handler installed.
///
/// A handler is needed: an ignored signal does not interrupt KVM_RUN. SA_RESTART is not set for
/// the same reason.
pub(super) fn kick_signal() -> io::Result<libc::c_int> {
    static INSTALLED: OnceLock<Result<libc::c_int, i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let signal = libc::SIGRTMIN() + 1;
            // SAFETY: zero is a valid sigaction (no flags, empty mask).
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = kicked as *const () as usize;
            // SAFETY: a handler that does nothing is async-signal-safe; the struct is live.
            let r = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
            if r == 0 {
                Ok(signal)
            } else {
                Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
            }
        })
        .map_err(io::Error::from_raw_os_error)
}
