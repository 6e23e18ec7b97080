//! Where the pages from A0000H to FFFFFH lead: RAM, ROM or devices, apart for loads and stores.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{GuestMemory, HIGH_RAM_START, Mapping, PAGE_SIZE};

/// First address whose route can be set.
pub const LEGACY_START: u64 = 0xa_0000;
/// End of the addresses whose route can be set.
pub const LEGACY_END: u64 = 0x10_0000;

/// Pages with a route.
const PAGES: usize = ((LEGACY_END - LEGACY_START) / PAGE_SIZE) as usize;
/// First address at which a chipset shows the end of the ROM.
const ROM_ALIAS_START: u64 = 0xe_0000;

/// Where a page leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Loads reach RAM; else the ROM (E0000H-FFFFFH) or devices.
    pub read_ram: bool,
    /// Stores reach RAM; else devices.
    pub write_ram: bool,
}

impl Route {
    fn bits(self) -> u8 {
        u8::from(self.read_ram) | u8::from(self.write_ram) << 1
    }
    fn of(bits: u8) -> Route {
        Route {
            read_ram: bits & 1 != 0,
            write_ram: bits & 2 != 0,
        }
    }
}

/// The route of each page, ascending.
pub(crate) struct Routes([AtomicU8; PAGES]);

impl Default for Routes {
    fn default() -> Routes {
        Routes(std::array::from_fn(|_| AtomicU8::new(0)))
    }
}

impl Routes {
    fn page(&self, gpa: u64) -> Option<&AtomicU8> {
        let n = gpa.checked_sub(LEGACY_START)? / PAGE_SIZE;
        self.0.get(usize::try_from(n).ok()?)
    }

    fn get(&self, gpa: u64) -> Route {
        Route::of(self.page(gpa).map_or(0, |p| p.load(Ordering::Acquire)))
    }
}

impl GuestMemory {
    /// Sets where the pages of `start..end` lead (4 KiB aligned, within A0000H-FFFFFH), and tells
    /// the engine if that changes anything. Without effect on a machine without ROM.
    pub fn set_route(&self, start: u64, end: u64, route: Route) {
        let Some(routes) = &self.routes else { return };
        let mut changed: Option<(u64, u64)> = None;
        let mut at = start;
        while at < end {
            if let Some(p) = routes.page(at)
                && p.swap(route.bits(), Ordering::AcqRel) != route.bits()
            {
                changed = Some((changed.map_or(at, |c| c.0), at));
            }
            at += PAGE_SIZE;
        }
        if let (Some((first, last)), Some(l)) = (changed, self.listener.get()) {
            l.mapping_changed(first, last);
        }
    }

    /// Everything that is mapped, ascending and without overlap: RAM, ROM and device memories for loads, with what
    /// stores reach as well not `read_only`. Pages whose stores go to RAM but whose loads do not
    /// are read-only here: an engine gives such stores to the bus, which has them stored.
    pub fn mappings(&self) -> Vec<Mapping> {
        let ram = self.regions.iter().map(|r| Mapping {
            gpa: r.gpa,
            size_bytes: r.size_bytes,
            ram_offset: r.ram_offset,
            read_only: false,
        });
        let mut all: Vec<Mapping> = Vec::new();
        if self.routes.is_none() {
            all.extend(ram);
            return self.with_devices(all);
        }
        for m in ram {
            if m.gpa != 0 {
                all.push(m);
                continue;
            }
            let low = LEGACY_START.min(m.size_bytes);
            all.push(Mapping {
                size_bytes: low,
                ..m
            });
            self.legacy_mappings(&mut all);
            if m.size_bytes > LEGACY_END {
                all.push(Mapping {
                    gpa: LEGACY_END,
                    size_bytes: m.size_bytes - LEGACY_END,
                    ram_offset: m.ram_offset + LEGACY_END,
                    read_only: false,
                });
            }
        }
        let rom = Mapping {
            gpa: HIGH_RAM_START - self.rom_bytes,
            size_bytes: self.rom_bytes,
            ram_offset: self.size_bytes,
            read_only: true,
        };
        let at = all.partition_point(|m| m.gpa < rom.gpa);
        all.insert(at, rom);
        self.with_devices(all)
    }

    /// The mappings with those of device memories.
    fn with_devices(&self, mut all: Vec<Mapping>) -> Vec<Mapping> {
        for m in self.windows.iter().filter_map(|w| w.mapping()) {
            let at = all.partition_point(|other| other.gpa < m.gpa);
            all.insert(at, m);
        }
        all
    }

    fn legacy_mappings(&self, all: &mut Vec<Mapping>) {
        let first = all.len();
        for gpa in (LEGACY_START..LEGACY_END).step_by(PAGE_SIZE as usize) {
            let Some(ram_offset) = self.read_offset(gpa, PAGE_SIZE) else {
                continue;
            };
            let read_only = self.write_offset(gpa, PAGE_SIZE) != Some(ram_offset);
            let goes_on = |m: &Mapping| {
                m.gpa + m.size_bytes == gpa
                    && m.ram_offset + m.size_bytes == ram_offset
                    && m.read_only == read_only
            };
            match all[first..].last_mut().filter(|m| goes_on(m)) {
                Some(m) => m.size_bytes += PAGE_SIZE,
                None => all.push(Mapping {
                    gpa,
                    size_bytes: PAGE_SIZE,
                    ram_offset,
                    read_only,
                }),
            }
        }
    }

    /// Offset of one page's byte for a load or a store; the page is within A0000H-FFFFFH.
    fn routed_byte(&self, routes: &Routes, gpa: u64, write: bool) -> Option<u64> {
        let route = routes.get(gpa);
        if if write {
            route.write_ram
        } else {
            route.read_ram
        } {
            return self.in_regions(gpa, 1);
        }
        let from_end = LEGACY_END - gpa;
        (!write && gpa >= ROM_ALIAS_START && from_end <= self.rom_bytes)
            .then(|| self.size_bytes + self.rom_bytes - from_end)
    }

    /// [`GuestMemory::read_offset`] and [`GuestMemory::write_offset`] with routes.
    pub(crate) fn routed(&self, routes: &Routes, gpa: u64, len: u64, write: bool) -> Option<u64> {
        let end = gpa.checked_add(len)?;
        if end <= LEGACY_START || gpa >= LEGACY_END {
            if let Some(off) = self.in_regions(gpa, len) {
                return Some(off);
            }
            let rom = gpa.checked_sub(HIGH_RAM_START - self.rom_bytes)?;
            return (!write && rom < self.rom_bytes && rom.checked_add(len)? <= self.rom_bytes)
                .then(|| self.size_bytes + rom);
        }
        let at = |a: u64| {
            if (LEGACY_START..LEGACY_END).contains(&a) {
                self.routed_byte(routes, a, write)
            } else {
                self.in_regions(a, 1)
            }
        };
        let first = at(gpa)?;
        // LIMIT: 96 pages have routes; what is beyond them is RAM in one piece or nothing.
        let mut page = (gpa & !(PAGE_SIZE - 1)).max(LEGACY_START - PAGE_SIZE);
        while page + PAGE_SIZE < end.min(LEGACY_END + 1) {
            page += PAGE_SIZE;
            if at(page)? != first + (page - gpa) {
                return None;
            }
        }
        (end <= LEGACY_END || self.in_regions(gpa, len).is_some()).then_some(first)
    }
}
