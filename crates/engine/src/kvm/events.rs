//! Event descriptors: stores of the guest that signal one, and messages that one sends.
//!
//! An irqfd is a GSI with a route of its own. KVM injects what is written to it in the writer's
//! context where it can, and otherwise on a kernel thread; removing an irqfd waits for that thread,
//! which is how [`Shared::settle_irqfds`] waits for messages that are on their way.

// UNSAFETY: a duplicate of a descriptor becomes an owned one.
#![allow(unsafe_code, reason = "descriptors arrive as numbers")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Shared, lock, os};
use crate::{EngineError, Irqfd};

/// GSIs whose level-triggered routes make EOI exits: as many as the IO-APIC has pins.
pub(super) const RESERVED_ROUTES: u32 = 24;
/// LIMIT: GSIs for irqfds, one each (KVM's own bound is 4096 routes).
const MAX_IRQFDS: u32 = 1024;

/// The MSI messages behind the GSIs.
#[derive(Default)]
pub(super) struct Routes {
    /// Ring of level-triggered messages on the reserved GSIs, and the slot to overwrite next.
    pub(super) level: Vec<(u64, u32)>,
    next: usize,
    /// Irqfds by GSI, each with its message.
    pub(super) irqfds: BTreeMap<u32, (Arc<EventFd>, u64, u32)>,
}

impl Routes {
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let level = self.level.iter().enumerate().map(|(n, m)| (n as u32, *m));
        level
            .chain(self.irqfds.iter().map(|(g, (_, a, d))| (*g, (*a, *d))))
            .map(|(gsi, (addr, data))| {
                let mut e = kvm_irq_routing_entry {
                    gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..kvm_irq_routing_entry::default()
                };
                e.u.msi = kvm_irq_routing_msi {
                    address_lo: addr as u32,
                    address_hi: (addr >> 32) as u32,
                    data,
                    ..kvm_irq_routing_msi::default()
                };
                e
            })
            .collect()
    }
}

/// The eventfd `fd`, kept open by a descriptor of our own. KVM knows it by what is behind it.
fn eventfd(fd: RawFd) -> Result<EventFd, EngineError> {
    // SAFETY: no pointers; a number that is no descriptor fails.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if own < 0 {
        return Err(os("duplicate an event descriptor")(
            io::Error::last_os_error(),
        ));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { EventFd::from_raw_fd(own) })
}

impl Shared {
    fn load_routes(&self, routes: &Routes) -> Result<(), EngineError> {
        let table = KvmIrqRouting::from_entries(&routes.entries())
            .map_err(|e| EngineError::Internal(format!("interrupt routes: {e:?}")))?;
        self.fd
            .set_gsi_routing(&table)
            .map_err(os("set KVM's interrupt routes"))
    }

    /// Makes sure that KVM reports the end of a level-triggered message.
    pub(super) fn keep_level_route(&self, addr: u64, data: u32) {
        let mut routes = lock(&self.routes);
        if routes.level.contains(&(addr, data)) {
            return;
        }
        let slot = routes.next;
        match routes.level.get_mut(slot) {
            Some(m) => *m = (addr, data),
            None => routes.level.push((addr, data)),
        }
        routes.next = (slot + 1) % RESERVED_ROUTES as usize;
        if let Err(e) = self.load_routes(&routes) {
            tracing::error!("{e}; level interrupts may stop");
        }
    }

    pub(super) fn add_ioeventfd(&self, gpa: u64, event: RawFd) -> Result<(), EngineError> {
        self.fd
            .register_ioevent(&eventfd(event)?, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(os("register an ioeventfd"))
    }

    pub(super) fn remove_ioeventfd(&self, gpa: u64, event: RawFd) -> Result<(), EngineError> {
        self.fd
            .unregister_ioevent(&eventfd(event)?, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(os("remove an ioeventfd"))
    }

    /// See [`crate::Vm::settle_irqfds`].
    pub(super) fn settle_irqfds(&self) -> Result<(), EngineError> {
        let routes = lock(&self.routes);
        for (gsi, (event, ..)) in &routes.irqfds {
            self.fd
                .unregister_irqfd(event, *gsi)
                .map_err(os("remove an irqfd"))?;
            // Some kernels leave the count in place, and registering would send it again.
            let _ = event.read();
            self.fd
                .register_irqfd(event, *gsi)
                .map_err(os("register an irqfd"))?;
        }
        Ok(())
    }
}

/// One irqfd.
pub(super) struct KvmIrqfd {
    vm: Arc<Shared>,
    event: Arc<EventFd>,
    pub(super) gsi: u32,
}

impl KvmIrqfd {
    pub(super) fn open(vm: &Arc<Shared>, addr: u64, data: u32) -> Result<KvmIrqfd, EngineError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map(Arc::new)
            .map_err(os("make an event descriptor"))?;
        let mut routes = lock(&vm.routes);
        let gsi = (RESERVED_ROUTES..RESERVED_ROUTES + MAX_IRQFDS)
            .find(|g| !routes.irqfds.contains_key(g))
            .ok_or_else(|| EngineError::Unsupported(format!("more than {MAX_IRQFDS} irqfds")))?;
        let entry = (Arc::clone(&event), addr, data);
        routes.irqfds.insert(gsi, entry);
        let done = vm.load_routes(&routes).and_then(|()| {
            vm.fd
                .register_irqfd(&event, gsi)
                .map_err(os("register an irqfd"))
        });
        if let Err(e) = done {
            routes.irqfds.remove(&gsi);
            return Err(e);
        }
        Ok(KvmIrqfd {
            vm: Arc::clone(vm),
            event,
            gsi,
        })
    }
}

impl Irqfd for KvmIrqfd {
    fn trigger(&self) {
        // It fails when 2^64 - 2 triggers were never consumed, which no machine lives to see.
        if let Err(e) = self.event.write(1) {
            tracing::error!("an irqfd takes no trigger: {e}");
        }
    }

    fn route(&self, addr: u64, data: u32) -> Result<(), EngineError> {
        let mut routes = lock(&self.vm.routes);
        let exchange = |routes: &mut Routes, new: (u64, u32)| {
            routes.irqfds.get_mut(&self.gsi).map(|(_, a, d)| {
                let old = (*a, *d);
                (*a, *d) = new;
                old
            })
        };
        let old = exchange(&mut routes, (addr, data));
        let done = self.vm.load_routes(&routes);
        // A message that KVM refuses must not be in the way of the other routes.
        if let (Err(_), Some(old)) = (&done, old) {
            exchange(&mut routes, old);
        }
        done
    }
}

impl Drop for KvmIrqfd {
    fn drop(&mut self) {
        let mut routes = lock(&self.vm.routes);
        if let Err(e) = self.vm.fd.unregister_irqfd(&self.event, self.gsi) {
            tracing::error!("cannot remove an irqfd: {e}");
        }
        routes.irqfds.remove(&self.gsi);
        if let Err(e) = self.vm.load_routes(&routes) {
            tracing::error!("{e}");
        }
    }
}
