use pyrite_vdev::{IntrSink, IrqSink, MsiMessage, MsiSink};

use super::*;
use crate::irq::{InterruptRouter, IoApic, Pic};

struct Nobody;

impl MsiSink for Nobody {
    fn send(&self, _msi: MsiMessage) {}
}

impl IntrSink for Nobody {
    fn set_intr(&self, _level: bool) {}
}

struct Rig {
    lpc: Lpc,
    pirqs: Arc<PirqRouter>,
    ports: crate::irq::PicDevice,
}

/// A bridge, whose interrupts reach an 8259 that passes IRQ 10 and 11.
fn rig() -> Rig {
    let pic = Pic::new(Arc::new(Nobody));
    let mut ports = crate::irq::PicDevice::new(Arc::clone(&pic));
    for (port, values) in [(0x20u16, [0x11u8, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
        ports.pio_write(port, &values[..1]);
        for v in &values[1..] {
            ports.pio_write(port + 1, &[*v]);
        }
    }
    ports.pio_write(0x21, &[!(1 << 2)]);
    ports.pio_write(0xa1, &[!(1 << 2 | 1 << 3)]);
    ports.pio_write(0x4d1, &[1 << 2 | 1 << 3]);
    let ioapic = IoApic::new(0, Arc::new(Nobody));
    let router = Arc::new(InterruptRouter::new(Arc::clone(&pic), ioapic));
    let pirqs = PirqRouter::new(router, pic);
    Rig {
        lpc: Lpc::new(Arc::clone(&pirqs)),
        pirqs,
        ports,
    }
}

/// IRQ 10 or 11 is requested.
fn raised(r: &mut Rig) -> bool {
    let mut irr = [0];
    r.ports.pio_read(0xa0, &mut irr);
    irr[0] & (1 << 2 | 1 << 3) != 0
}

#[test]
fn firmware_finds_its_chipset() {
    let mut r = rig();
    assert_eq!(r.lpc.config_read(0), 0x2918_8086);
    r.lpc.config_write(PMBASE, &[1, 0xb0, 0, 0]);
    assert_eq!(r.lpc.config_read(PMBASE), 0x601);
    assert_eq!(r.lpc.config_read(ACPI_CNTL) & 0x80, 0x80);
    let mut b = [0xff; 4];
    r.lpc.pio_read(SMI_PORT, &mut b);
    assert_eq!(u32::from_le_bytes(b), APMC_EN);
    r.lpc.pio_read(SMI_PORT + 4, &mut b);
    assert_eq!(b, [0; 4]);
}

#[test]
fn pci_interrupts_reach_the_routed_input() {
    let mut r = rig();
    r.pirqs.set_level(16, true);
    assert!(!raised(&mut r), "not routed");
    r.lpc.config_write(PIRQA_ROUT, &[10, 10]);
    assert!(raised(&mut r), "the level counts from when it is routed");
    r.pirqs.set_level(17, true);
    r.pirqs.set_level(16, false);
    assert!(raised(&mut r), "the other one still asserts");
    r.pirqs.set_level(17, false);
    assert!(!raised(&mut r));
    r.lpc.config_write(PIRQE_ROUT + 3, &[11]);
    r.pirqs.set_level(23, true);
    assert!(raised(&mut r));
    let saved = r.lpc.save().unwrap();
    r.lpc.reset();
    assert!(!raised(&mut r));
    r.lpc.restore(&saved).unwrap();
    assert!(raised(&mut r));
    // IRQ 0 is no input for PCI.
    r.lpc.config_write(PIRQE_ROUT + 3, &[0]);
    assert!(!raised(&mut r));
}
