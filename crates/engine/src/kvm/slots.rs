//! Memory slots: what of guest memory is mapped where, and KVM's dirty log of it.

// UNSAFETY: KVM_SET_USER_MEMORY_REGION makes KVM use host addresses.
#![allow(unsafe_code, reason = "memory slots name host memory by address")]

use std::sync::{Arc, Weak};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use pyrite_mem::{CodeListener, Mapping};

use super::{Shared, lock, os};
use crate::EngineError;

/// What KVM has been told.
#[derive(Default)]
pub(super) struct Slots {
    /// By slot number.
    mapped: Vec<Option<Mapping>>,
    logging: bool,
}

impl Shared {
    /// Sets all memory slots as guest memory is mapped now, with or without KVM's dirty log.
    pub(super) fn map_memory(&self, log_dirty: bool) -> Result<(), EngineError> {
        let mut s = lock(&self.slots);
        s.logging = log_dirty;
        self.update(&mut s, true)
    }

    /// Takes away the slots of what is mapped no longer and adds what is new. `all`: tells KVM of
    /// the others too, for the sake of the dirty log.
    fn update(&self, s: &mut Slots, all: bool) -> Result<(), EngineError> {
        let wanted = self.memory.mappings();
        for n in 0..s.mapped.len() {
            if let Some(m) = s.mapped[n]
                && !wanted.contains(&m)
            {
                if s.logging {
                    self.pull(n, &m)?;
                }
                self.set(n, &Mapping { size_bytes: 0, ..m }, false)?;
                s.mapped[n] = None;
            }
        }
        for m in wanted {
            let slot = match s.mapped.iter().position(|have| *have == Some(m)) {
                Some(_) if !all => continue,
                Some(n) => n,
                None => match s.mapped.iter().position(Option::is_none) {
                    Some(n) => n,
                    None => {
                        s.mapped.push(None);
                        s.mapped.len() - 1
                    }
                },
            };
            self.set(slot, &m, s.logging)?;
            s.mapped[slot] = Some(m);
        }
        Ok(())
    }

    fn set(&self, slot: usize, m: &Mapping, log_dirty: bool) -> Result<(), EngineError> {
        let mut flags = 0;
        if m.read_only {
            flags |= KVM_MEM_READONLY;
        } else if log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: m.gpa,
            memory_size: m.size_bytes,
            userspace_addr: self.memory.host_base() as u64 + m.ram_offset,
        };
        // SAFETY: mappings lie inside GuestMemory's mapping, which `Shared` keeps alive as long as
        // the VM's descriptor.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(os("give RAM to KVM"))
    }

    /// Copies the dirty log of a slot into guest memory's.
    fn pull(&self, slot: usize, m: &Mapping) -> Result<(), EngineError> {
        if m.read_only {
            return Ok(());
        }
        let size = usize::try_from(m.size_bytes)
            .map_err(|_| EngineError::Internal("RAM larger than the host".to_owned()))?;
        let words = self
            .fd
            .get_dirty_log(slot as u32, size)
            .map_err(os("read KVM's dirty log"))?;
        let first = m.ram_offset / pyrite_mem::PAGE_SIZE;
        for (n, w) in words.iter().enumerate() {
            let mut left = *w;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                self.memory
                    .log_dirty(first + n as u64 * 64 + u64::from(bit));
            }
        }
        Ok(())
    }

    fn pull_all(&self, s: &Slots) -> Result<(), EngineError> {
        for (n, m) in s.mapped.iter().enumerate() {
            if let Some(m) = m {
                self.pull(n, m)?;
            }
        }
        Ok(())
    }

    /// Follows what guest memory says of logging: switches KVM's log, or begins its next round.
    pub(super) fn begin_dirty_round(&self) -> Result<(), EngineError> {
        let want = self.memory.dirty_logging();
        let mut s = lock(&self.slots);
        match (s.logging, want) {
            (false, false) => Ok(()),
            (true, true) => self.pull_all(&s),
            _ => {
                s.logging = want;
                self.update(&mut s, true)
            }
        }
    }

    /// Brings what KVM has logged so far into guest memory's log.
    pub(super) fn sync_dirty_log(&self) -> Result<(), EngineError> {
        let s = lock(&self.slots);
        if s.logging { self.pull_all(&s) } else { Ok(()) }
    }
}

struct Routes(Weak<Shared>);

impl CodeListener for Routes {
    fn code_written(&self, _page_gpa: u64) {}
    fn mapping_changed(&self, _first: u64, _last: u64) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut s = lock(&shared.slots);
        if let Err(e) = shared.update(&mut s, false) {
            tracing::error!("memory map: {e}");
        }
    }
}

/// Keeps the slots as guest memory is mapped.
pub(super) fn follow_routes(shared: &Arc<Shared>) {
    let listener = Routes(Arc::downgrade(shared));
    shared.memory.set_code_listener(Box::new(listener));
}
