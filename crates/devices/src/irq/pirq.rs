//! PCI interrupts as an ICH routes them: pins 16-23 of the IO-APIC, and for software that uses the
//! 8259s one of their inputs each. Intel ICH9 data sheet §13.1.12 and §13.1.16 (PIRQx_ROUT).

use std::sync::{Arc, Mutex};

use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

use super::{InterruptRouter, Pic};

/// First GSI of the eight.
const FIRST_GSI: u32 = 16;
/// PIRQA to PIRQH.
pub const PIRQS: usize = 8;
/// PIRQx_ROUT: not routed to the 8259s.
pub const ROUTE_OFF: u8 = 0x80;
/// Inputs that a PIRQ can be routed to: 3-7, 9-12, 14, 15.
const ALLOWED: u16 = 0b1101_1110_1111_1000;

struct Inner {
    routes: [u8; PIRQS],
    /// One bit per PIRQ.
    level: u8,
}

impl Inner {
    /// The 8259 inputs that are high.
    fn inputs(&self) -> u16 {
        let mut high = 0;
        for (n, route) in self.routes.iter().enumerate() {
            if self.level & 1 << n != 0 && route & ROUTE_OFF == 0 {
                high |= 1u16 << (route & 0xf);
            }
        }
        high & ALLOWED
    }
}

/// Routes GSI 16-23 to both kinds of controller; passes the others on.
pub struct PirqRouter {
    router: Arc<InterruptRouter>,
    pic: Arc<Pic>,
    // LOCK ORDER: shared lines < this < interrupt controllers. Held while they are called, so that
    // changes of one input arrive in order.
    inner: Mutex<Inner>,
}

impl PirqRouter {
    /// A router that is off.
    pub fn new(router: Arc<InterruptRouter>, pic: Arc<Pic>) -> Arc<PirqRouter> {
        let inner = Inner {
            routes: [ROUTE_OFF; PIRQS],
            level: 0,
        };
        Arc::new(PirqRouter {
            router,
            pic,
            inner: Mutex::new(inner),
        })
    }

    /// Takes over the values of PIRQA_ROUT to PIRQH_ROUT.
    pub fn set_routes(&self, routes: [u8; PIRQS]) {
        self.change(|i| i.routes = routes);
    }

    fn change(&self, f: impl FnOnce(&mut Inner)) {
        let mut inner = lock(&self.inner);
        let before = inner.inputs();
        f(&mut inner);
        let now = inner.inputs();
        for n in 0..16u8 {
            if (before ^ now) & 1 << n != 0 {
                self.pic.set_line(n, now & 1 << n != 0);
            }
        }
    }
}

impl IrqSink for PirqRouter {
    fn set_level(&self, gsi: u32, level: bool) {
        let pirq = gsi.wrapping_sub(FIRST_GSI);
        if (pirq as usize) < PIRQS {
            self.change(|i| {
                let bit = 1u8 << pirq;
                i.level = if level { i.level | bit } else { i.level & !bit };
            });
        }
        self.router.set_level(gsi, level);
    }
}
