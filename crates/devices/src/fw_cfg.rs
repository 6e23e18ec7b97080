//! Firmware configuration device ("fw_cfg"): numbered items and named files for firmware.
//! Interface: QEMU documentation, docs/specs/fw_cfg.rst.
//!
//! Reads past the end of an item give zeroes. The data port is read-only; files marked writable
//! can be written by DMA, never beyond their size.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{Lifecycle, PioDevice};

const KIND: &str = "fw-cfg";
const VERSION: u16 = 1;

/// Selector register (16 bit).
pub const SELECTOR: u16 = 0x510;
/// Data register (8 bit).
pub const DATA: u16 = 0x511;
/// DMA address register (64 bit, big-endian).
pub const DMA: u16 = 0x514;

/// Item: "QEMU".
pub const SIGNATURE: u16 = 0x0000;
/// Item: feature bits.
pub const ID: u16 = 0x0001;
/// Item: the machine's UUID, 16 bytes.
pub const UUID: u16 = 0x0002;
/// Item: 1 if there is no screen, 16 bit.
pub const NO_GRAPHIC: u16 = 0x0004;
/// Item: number of processors, 16 bit.
pub const CPUS: u16 = 0x0005;
/// Item: 1 if firmware shows a boot menu, 16 bit.
pub const BOOT_MENU: u16 = 0x000e;
/// Item: number of processors with those that could be added, 16 bit.
pub const MAX_CPUS: u16 = 0x000f;
/// Item: 1 if interrupt 0 arrives at pin 2 of the IO-APIC, 8 bit.
pub const IRQ0_OVERRIDE: u16 = 0x8002;
/// Item: the file directory.
pub const FILE_DIR: u16 = 0x0019;
/// Selector of the first file.
pub const FILE_FIRST: u16 = 0x0020;
/// LIMIT: files, given by the selectors that are left for them.
const MAX_FILES: usize = 0x3fe0;
/// Bytes of a file name, with its NUL.
const NAME_BYTES: usize = 56;

/// ID: traditional interface and DMA.
const FEATURES: u32 = 0b11;
/// What the DMA address register reads: "QEMU CFG".
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// Bytes copied at a time.
const CHUNK: usize = 64 << 10;

/// An item or file could not be added.
#[derive(Debug, thiserror::Error)]
pub enum FwCfgError {
    /// The name is empty, too long or taken.
    #[error("firmware file name {0:?} is empty, longer than 55 bytes or taken")]
    Name(String),
    /// No selector is left, or the content has 4 GiB or more.
    #[error("firmware file {0:?} does not fit")]
    Full(String),
}

struct File {
    name: String,
    selector: u16,
    is_writable: bool,
    is_computed: bool,
}

/// Makes the content of computed files, by name, from what firmware has programmed so far.
pub type Compute = Box<dyn Fn() -> Vec<(&'static str, Vec<u8>)> + Send>;

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    selector: u16,
    #[n(1)]
    offset: u32,
    /// Upper half of the DMA address, written first.
    #[n(2)]
    dma_upper: u32,
    /// Content of writable files, by selector.
    #[n(3)]
    written: BTreeMap<u16, Vec<u8>>,
}

/// The device. Content is given at construction time and again after a restore; only what the
/// guest wrote is saved.
pub struct FwCfg {
    regs: Registers,
    items: BTreeMap<u16, Arc<[u8]>>,
    files: Vec<File>,
    memory: Arc<GuestMemory>,
    compute: Option<Compute>,
    /// Computed files must be made anew before they are read.
    is_stale: bool,
}

impl FwCfg {
    /// A device with signature, id and an empty directory; DMA goes to `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> FwCfg {
        let items = BTreeMap::from([
            (SIGNATURE, Arc::from(*b"QEMU")),
            (ID, Arc::from(FEATURES.to_le_bytes())),
        ]);
        let mut f = FwCfg {
            regs: Registers::default(),
            items,
            files: Vec::new(),
            memory,
            compute: None,
            is_stale: false,
        };
        f.build_directory();
        f
    }

    /// Sets a numbered item (not a file).
    pub fn set_item(&mut self, selector: u16, bytes: impl Into<Arc<[u8]>>) {
        self.items.insert(selector, bytes.into());
    }

    /// Adds a file that the guest can only read.
    pub fn add_file(&mut self, name: &str, bytes: impl Into<Arc<[u8]>>) -> Result<(), FwCfgError> {
        self.add(name, bytes.into(), false)
    }

    /// Adds a file that the guest can overwrite, within its size.
    pub fn add_writable_file(
        &mut self,
        name: &str,
        bytes: impl Into<Arc<[u8]>>,
    ) -> Result<(), FwCfgError> {
        self.add(name, bytes.into(), true)
    }

    /// Sets the content of a file that the guest can only read, and adds it if it is not there.
    /// Only while the machine stands still before its first instruction.
    pub fn set_file(&mut self, name: &str, bytes: impl Into<Arc<[u8]>>) -> Result<(), FwCfgError> {
        let bytes = bytes.into();
        let Some(selector) = self
            .files
            .iter()
            .find(|f| f.name == name)
            .map(|f| f.selector)
        else {
            return self.add(name, bytes, false);
        };
        if u32::try_from(bytes.len()).is_err() {
            return Err(FwCfgError::Full(name.to_owned()));
        }
        self.items.insert(selector, bytes);
        self.build_directory();
        Ok(())
    }

    /// Adds files whose content `compute` makes whenever the guest begins to read one of them. Their
    /// sizes are those of now, at any time.
    pub fn add_computed(&mut self, compute: Compute) -> Result<(), FwCfgError> {
        for (name, bytes) in compute() {
            self.add(name, bytes.into(), false)?;
            if let Some(f) = self.files.last_mut() {
                f.is_computed = true;
            }
        }
        self.compute = Some(compute);
        Ok(())
    }

    fn refresh(&mut self) {
        if !std::mem::take(&mut self.is_stale) {
            return;
        }
        for (name, bytes) in self.compute.iter().flat_map(|c| c()) {
            let Some(f) = self.files.iter().find(|f| f.name == name) else {
                continue;
            };
            let size = self.items.get(&f.selector).map_or(0, |c| c.len());
            if bytes.len() == size {
                self.items.insert(f.selector, bytes.into());
            } else {
                tracing::error!(
                    name,
                    size,
                    now = bytes.len(),
                    "a firmware file changes its size"
                );
            }
        }
    }

    /// The present content of a file, with what the guest wrote.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let f = self.files.iter().find(|f| f.name == name)?;
        self.content(f.selector)
    }

    fn add(&mut self, name: &str, bytes: Arc<[u8]>, is_writable: bool) -> Result<(), FwCfgError> {
        if name.is_empty() || name.len() >= NAME_BYTES || self.files.iter().any(|f| f.name == name)
        {
            return Err(FwCfgError::Name(name.to_owned()));
        }
        if self.files.len() >= MAX_FILES || u32::try_from(bytes.len()).is_err() {
            return Err(FwCfgError::Full(name.to_owned()));
        }
        let selector = FILE_FIRST + self.files.len() as u16;
        if is_writable {
            self.regs.written.insert(selector, bytes.to_vec());
        }
        self.items.insert(selector, bytes);
        self.files.push(File {
            name: name.to_owned(),
            selector,
            is_writable,
            is_computed: false,
        });
        self.build_directory();
        Ok(())
    }

    fn build_directory(&mut self) {
        let mut dir = (self.files.len() as u32).to_be_bytes().to_vec();
        for f in &self.files {
            let size = self.items.get(&f.selector).map_or(0, |c| c.len()) as u32;
            dir.extend(size.to_be_bytes());
            dir.extend(f.selector.to_be_bytes());
            dir.extend([0; 2]);
            let mut name = [0; NAME_BYTES];
            name[..f.name.len()].copy_from_slice(f.name.as_bytes());
            dir.extend(name);
        }
        self.items.insert(FILE_DIR, dir.into());
    }

    fn content(&self, selector: u16) -> Option<&[u8]> {
        match self.regs.written.get(&selector) {
            Some(w) => Some(w),
            None => self.items.get(&selector).map(|c| &**c),
        }
    }

    fn select(&mut self, selector: u16) {
        let is_it = |f: &File| f.is_computed && f.selector == selector;
        self.is_stale |= self.files.iter().any(is_it);
        self.regs.selector = selector;
        self.regs.offset = 0;
    }

    /// The selected item from the current offset on.
    fn rest(&self) -> &[u8] {
        let content = self.content(self.regs.selector).unwrap_or_default();
        content.get(self.regs.offset as usize..).unwrap_or_default()
    }

    fn next_byte(&mut self) -> u8 {
        self.refresh();
        let b = self.rest().first().copied().unwrap_or(0);
        self.regs.offset = self.regs.offset.saturating_add(1);
        b
    }

    /// Runs the DMA command at `at` and writes its outcome back.
    fn run_dma(&mut self, at: u64) {
        let mut access = [0; 16];
        if self.memory.read(at, &mut access).is_err() {
            // There is nowhere to report the error.
            tracing::debug!(at, "fw_cfg DMA command is not in RAM");
            return;
        }
        let value = u128::from_be_bytes(access);
        let (control, length) = ((value >> 96) as u32, (value >> 64) as u32);
        let outcome = match self.transfer(control, length, value as u64) {
            Ok(()) => 0,
            Err(()) => DMA_ERROR,
        };
        let _ = self.memory.write(at, &outcome.to_be_bytes());
    }

    fn transfer(&mut self, control: u32, length: u32, address: u64) -> Result<(), ()> {
        if control & DMA_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        self.refresh();
        if control & DMA_READ != 0 {
            self.dma_read(length, address)?;
        } else if control & DMA_WRITE != 0 {
            self.dma_write(length, address)?;
        } else if control & DMA_SKIP == 0 {
            return Ok(());
        }
        self.regs.offset = self.regs.offset.saturating_add(length);
        Ok(())
    }

    fn dma_read(&mut self, length: u32, address: u64) -> Result<(), ()> {
        let length = u64::from(length);
        // LIMIT: the whole target must be RAM, so the work is bounded by it.
        if length != 0 && self.memory.ram_offset(address, length).is_none() {
            return Err(());
        }
        let rest = self.rest();
        let n = rest.len().min(length as usize);
        let mut to = address;
        for part in rest[..n].chunks(CHUNK) {
            self.memory.write(to, part).map_err(|_| ())?;
            to += part.len() as u64;
        }
        let zeroes = length - n as u64;
        if zeroes != 0 {
            self.memory.fill_zero(to, zeroes).map_err(|_| ())?;
        }
        Ok(())
    }

    fn dma_write(&mut self, length: u32, address: u64) -> Result<(), ()> {
        let selector = self.regs.selector;
        if !self
            .files
            .iter()
            .any(|f| f.selector == selector && f.is_writable)
        {
            return Err(());
        }
        let start = self.regs.offset as usize;
        let content = self.regs.written.get_mut(&selector).ok_or(())?;
        let end = start.checked_add(length as usize).ok_or(())?;
        let target = content.get_mut(start..end).ok_or(())?;
        self.memory.read(address, target).map_err(|_| ())
    }

    fn power_on(&self) -> Registers {
        let writable = self.files.iter().filter(|f| f.is_writable);
        let written = writable
            .filter_map(|f| Some((f.selector, self.items.get(&f.selector)?.to_vec())))
            .collect();
        Registers {
            written,
            ..Registers::default()
        }
    }
}

impl PioDevice for FwCfg {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        match port {
            DATA => data.iter_mut().for_each(|b| *b = self.next_byte()),
            DMA..0x51c => {
                for (b, s) in data
                    .iter_mut()
                    .zip(&DMA_SIGNATURE[usize::from(port - DMA)..])
                {
                    *b = *s;
                }
            }
            _ => {}
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (SELECTOR, [v]) => self.select((*v).into()),
            (SELECTOR, [a, b, ..]) => self.select(u16::from_le_bytes([*a, *b])),
            (DMA, [a, b, c, d]) => self.regs.dma_upper = u32::from_be_bytes([*a, *b, *c, *d]),
            (0x518, [a, b, c, d]) => {
                let upper = std::mem::take(&mut self.regs.dma_upper);
                let lower = u32::from_be_bytes([*a, *b, *c, *d]);
                self.run_dma(u64::from(upper) << 32 | u64::from(lower));
            }
            _ => {}
        }
    }
}

impl Lifecycle for FwCfg {
    fn unit(&self) -> &str {
        "fw-cfg"
    }
    passive!();
    fn reset(&mut self) {
        self.is_stale = true;
        self.regs = self.power_on();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let FwCfg {
            regs,
            items: _,
            files: _,
            memory: _,
            compute: _,
            is_stale: _,
        } = self;
        Ok(Section::new("fw-cfg", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let saved: Registers = section.decode(KIND, VERSION)?;
        let sizes = |r: &Registers| -> Vec<(u16, usize)> {
            r.written.iter().map(|(s, c)| (*s, c.len())).collect()
        };
        if sizes(&saved) != sizes(&self.regs) {
            let detail = "writable files differ from the configured ones".into();
            return Err(StateError::Invalid {
                unit: "fw-cfg".into(),
                detail,
            });
        }
        self.regs = saved;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let files = self.files.iter().map(|f| {
            let size = self.content(f.selector).map_or(0, <[u8]>::len);
            (f.name.clone(), Inspect::Uint(size as u64))
        });
        Inspect::node([
            ("selector", Inspect::Hex(self.regs.selector.into())),
            ("offset", Inspect::Uint(self.regs.offset.into())),
            ("files", Inspect::Node(files.collect())),
        ])
    }
}
