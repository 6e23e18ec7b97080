//! The code TLB: what proves, when translated code goes to another page, that the page is still
//! mapped to what the target was translated from.
//!
//! Each page of linear addresses that code is translated from gets a slot of its own in the
//! frame. A slot holds the guest-physical page that the linear page is mapped to, plus one, and
//! above it a number for the mode's units; 0 means that it has to be looked up. A block compares
//! its page's slot with a constant at its entry from other pages. So links between blocks outlive
//! changes of address spaces: a change empties slots, not links.

use super::cache::AddrMap;
use super::layout::{CODE_PAGE_BITS, CODE_SLOTS};
use crate::mmu::Fetched;

/// What a block checks at its entry: slot and expected value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCheck {
    /// Slot of the page.
    pub slot: u32,
    /// What it holds when the mapping is that of the translation. Below 2^31.
    pub value: u32,
}

/// Most modes that are told apart.
const UNITS_MAX: usize = 1 << (31 - CODE_PAGE_BITS);

/// The side of the code TLB that emitted code does not see.
#[derive(Default)]
pub struct CodeTlb {
    /// Slots by linear page number, shifted left by one, and 1 for CPL 3.
    slots: AddrMap<u64, u32>,
    /// Modes, whose index is part of the values.
    units: Vec<u32>,
    /// Slots that may hold something: of non-global and of global pages.
    filled: [Vec<u32>; 2],
    /// Large pages that slots were filled from: number of the page and log2 of its size.
    large: Vec<(u64, u8)>,
}

/// LIMIT: large pages with code that are remembered; more empty all slots.
const LARGE_MAX: usize = 64;

impl CodeTlb {
    /// The slot of a page, made if need be. `None`: there are no more.
    pub fn slot(&mut self, rip: u64, user: bool) -> Option<u32> {
        let next = self.slots.len();
        match self.slots.entry(rip >> 12 << 1 | u64::from(user)) {
            std::collections::hash_map::Entry::Occupied(e) => Some(*e.get()),
            std::collections::hash_map::Entry::Vacant(e) => {
                (next < CODE_SLOTS).then(|| *e.insert(next as u32))
            }
        }
    }

    /// True if a mode has no number and there are no more: everything must be dropped first.
    pub fn needs_clearing(&self, units: u32) -> bool {
        self.units.len() >= UNITS_MAX && !self.units.contains(&units)
    }

    /// The slot value for a guest-physical address in a mode. `None`: not expressible.
    pub fn value(&mut self, gpa: u64, units: u32) -> Option<u32> {
        let page = (gpa >> 12) + 1;
        if page >> CODE_PAGE_BITS != 0 {
            return None;
        }
        let at = self.units.iter().position(|u| *u == units);
        let at = match at {
            Some(at) => at,
            None if self.units.len() < UNITS_MAX => {
                self.units.push(units);
                self.units.len() - 1
            }
            None => return None,
        };
        Some((at as u32) << CODE_PAGE_BITS | page as u32)
    }

    /// Fills a slot, for code at `rip` that is fetched from there.
    pub fn fill(
        &mut self,
        table: &mut [u32; CODE_SLOTS],
        check: PageCheck,
        rip: u64,
        from: Fetched,
    ) {
        let global = from.global;
        let entry = &mut table[check.slot as usize];
        if *entry == check.value {
            return;
        }
        *entry = check.value;
        let large = (rip >> from.shift, from.shift);
        if from.shift > 12 && !self.large.contains(&large) {
            if self.large.len() >= LARGE_MAX {
                self.flush(table, false);
                table[check.slot as usize] = check.value;
            }
            self.large.push(large);
        }
        // LIMIT: a slot that is filled again and again without a flush is in the list as often.
        if self.filled[usize::from(global)].len() >= 2 * CODE_SLOTS {
            self.flush(table, false);
            table[check.slot as usize] = check.value;
        }
        self.filled[usize::from(global)].push(check.slot);
    }

    /// Empties the slots, those of global pages only if asked to.
    pub fn flush(&mut self, table: &mut [u32; CODE_SLOTS], keep_global: bool) {
        if !keep_global {
            self.large.clear();
        }
        let lists = if keep_global { 1 } else { 2 };
        for list in &mut self.filled[..lists] {
            for n in list.drain(..) {
                table[n as usize] = 0;
            }
        }
    }

    /// Empties the slots of the page around `lin`; if it is in a large page, all slots.
    pub fn flush_page(&mut self, table: &mut [u32; CODE_SLOTS], lin: u64) {
        if self.large.iter().any(|&(n, shift)| lin >> shift == n) {
            self.flush(table, false);
            return;
        }
        for user in [0, 1] {
            if let Some(n) = self.slots.get(&(lin >> 12 << 1 | user)) {
                table[*n as usize] = 0;
            }
        }
    }

    /// Forgets everything, slots included; nothing translated may be left.
    pub fn clear(&mut self, table: &mut [u32; CODE_SLOTS]) {
        self.flush(table, false);
        self.slots.clear();
        self.units.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Box<[u32; CODE_SLOTS]> {
        vec![0; CODE_SLOTS].try_into().expect("length")
    }

    #[test]
    fn pages_and_privilege_have_slots_of_their_own() {
        let mut t = CodeTlb::default();
        let a = t.slot(0x1234, false);
        assert_eq!(a, t.slot(0x1fff, false));
        assert_ne!(a, t.slot(0x1234, true));
        assert_ne!(a, t.slot(0x2000, false));
    }

    #[test]
    fn values_tell_pages_and_modes_apart() {
        let mut t = CodeTlb::default();
        let a = t.value(0, 1).expect("value");
        assert_ne!(a, 0);
        assert_ne!(Some(a), t.value(0x1000, 1));
        assert_ne!(Some(a), t.value(0, 2));
        assert!(a < 1 << 31);
        assert_eq!(t.value(1 << 40, 1), None);
    }

    #[test]
    fn modes_that_find_no_number_ask_for_clearing() {
        let (mut t, mut table) = (CodeTlb::default(), table());
        for units in 0..UNITS_MAX as u32 {
            assert!(!t.needs_clearing(units));
            assert!(t.value(0, units).is_some());
        }
        assert!(!t.needs_clearing(0));
        assert!(t.needs_clearing(99));
        assert_eq!(t.value(0, 99), None);
        t.clear(&mut table);
        assert!(t.value(0, 99).is_some());
    }

    #[test]
    fn flushes_empty_what_they_should() {
        let (mut t, mut table) = (CodeTlb::default(), table());
        let check = |t: &mut CodeTlb, rip| PageCheck {
            slot: t.slot(rip, true).expect("slot"),
            value: t.value(rip, 0).expect("value"),
        };
        let (a, b) = (check(&mut t, 0x1000), check(&mut t, 0x2000));
        let from = |global, shift| Fetched {
            gpa: 0,
            global,
            shift,
        };
        t.fill(&mut table, a, 0x1000, from(false, 12));
        t.fill(&mut table, b, 0x2000, from(true, 12));
        t.flush(&mut table, true);
        assert_eq!(
            (table[a.slot as usize], table[b.slot as usize]),
            (0, b.value)
        );
        t.flush_page(&mut table, 0x2abc);
        assert_eq!(table[b.slot as usize], 0);
        t.fill(&mut table, b, 0x2000, from(true, 21));
        t.flush_page(&mut table, 0x20_0000);
        assert_ne!(table[b.slot as usize], 0);
        t.flush_page(&mut table, 0x1f_ffff);
        assert_eq!(table[b.slot as usize], 0);
    }
}
