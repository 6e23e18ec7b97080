//! The two levels of the soft TLB: what a flush must reach.

use std::sync::Arc;

use pyrite_x86::bits::cr4;

use super::bench::*;
use crate::frame::{slot, slot2};
use crate::mmu::Priv;

const PD: u64 = TABLES + 0x3000;
const PT: u64 = TABLES + 0x4000;
const GLOBAL_PT: u64 = TABLES + 0x5000;
/// Two pages that displace each other in the first level, not in the second.
const PAGE: u64 = 0x4000_0000;
const GLOBAL: u64 = 0x4100_0000;
const OLD: u64 = 0x32_3000;
const NEW: u64 = 0x12_3000;

#[test]
fn a_flush_reaches_slots_that_the_second_level_has_filled_in_between() {
    assert_eq!(slot(PAGE), slot(GLOBAL));
    assert_ne!(slot2(PAGE), slot2(GLOBAL));
    let mut b = Bench::long();
    b.cpu.cr4 |= cr4::PGE;
    b.write(TABLES + 0x1008, &(PD | 7).to_le_bytes());
    b.write(PD, &(PT | 7).to_le_bytes());
    b.write(PD + 8 * 8, &(GLOBAL_PT | 7).to_le_bytes());
    b.write(PT, &(OLD | 7).to_le_bytes());
    b.write(GLOBAL_PT, &(OLD | 0x107).to_le_bytes());
    b.write(OLD, &1u64.to_le_bytes());
    b.write(NEW, &2u64.to_le_bytes());
    let (_vm, mut v) = b.into_vcpu();
    let memory = Arc::clone(&v.vm.memory);

    assert_eq!(v.read_uint(GLOBAL, 8, Priv::Current), Ok(1));
    assert_eq!(v.read_uint(PAGE, 8, Priv::Current), Ok(1));
    // As MOV to CR3 does.
    v.flush_tlb(true);
    // The global page comes back from the second level, and the other takes its slot.
    assert_eq!(v.read_uint(GLOBAL, 8, Priv::Current), Ok(1));
    assert_eq!(v.read_uint(PAGE, 8, Priv::Current), Ok(1));
    memory.write(PT, &(NEW | 7).to_le_bytes()).unwrap();
    v.flush_tlb(true);
    assert_eq!(v.read_uint(PAGE, 8, Priv::Current), Ok(2));
    // The global page stays until everything goes.
    memory
        .write(GLOBAL_PT, &(NEW | 0x107).to_le_bytes())
        .unwrap();
    v.flush_tlb(true);
    assert_eq!(v.read_uint(GLOBAL, 8, Priv::Current), Ok(1));
    v.flush_tlb(false);
    assert_eq!(v.read_uint(GLOBAL, 8, Priv::Current), Ok(2));
}

#[test]
fn invlpg_reaches_both_levels() {
    let mut b = Bench::long();
    b.write(TABLES + 0x1008, &(PD | 7).to_le_bytes());
    b.write(PD, &(PT | 7).to_le_bytes());
    b.write(PT, &(OLD | 7).to_le_bytes());
    b.write(OLD, &1u64.to_le_bytes());
    b.write(NEW, &2u64.to_le_bytes());
    let (_vm, mut v) = b.into_vcpu();
    assert_eq!(v.read_uint(PAGE, 8, Priv::Current), Ok(1));
    let memory = Arc::clone(&v.vm.memory);
    memory.write(PT, &(NEW | 7).to_le_bytes()).unwrap();
    assert_eq!(v.read_uint(PAGE, 8, Priv::Current), Ok(1));
    v.flush_page(PAGE + 0x123);
    assert_eq!(v.read_uint(PAGE, 8, Priv::Current), Ok(2));
}
