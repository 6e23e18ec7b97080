//! The back ends of disks: images, and the layers between them and their controllers.
//!
//! From the controller down: larger blocks (if asked for), errors that are kept, limits, errors on
//! purpose, the image. A layer that has nothing to do passes requests on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pyrite_api::v1::{DiskFormat, DiskLimits, DiskSettings, DiskSpec, OnError, RateSpec, VmSpec};
use pyrite_disk::blocks::LargeBlocks;
use pyrite_disk::faults::{Faults, Faulty};
use pyrite_disk::guarded::{self, Guarded};
use pyrite_disk::image::References;
use pyrite_disk::limits::{Limited, Limits, Rate, Rates};
use pyrite_disk::open::{OpenOptions, open};
use pyrite_disk::raw::RawDisk;
use pyrite_disk::{BlockBackend, BlockRequest, Format, ImageDisk};
use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;

use super::{AssemblyError, input};

/// How long a flush of the disks may take.
const FLUSH_WITHIN: Duration = Duration::from_secs(60);

/// One disk.
struct Disk {
    /// For people.
    path: String,
    /// The image keeps tables in memory: its format is not raw.
    keeps_tables: bool,
    image: Arc<dyn BlockBackend>,
    faulty: Arc<Faulty>,
    limited: Arc<Limited>,
    guarded: Arc<Guarded>,
}

/// The disks of a VM by their number.
#[derive(Default)]
pub struct Disks(BTreeMap<usize, Disk>);

fn limits(spec: &DiskLimits) -> Limits {
    let rate = |r: Option<RateSpec>| {
        r.map(|r| Rate {
            per_second: r.per_second,
            burst: r.burst,
        })
    };
    Limits {
        requests: Rates {
            total: rate(spec.iops),
            read: rate(spec.iops_read),
            write: rate(spec.iops_write),
        },
        bytes: Rates {
            total: rate(spec.bps),
            read: rate(spec.bps_read),
            write: rate(spec.bps_write),
        },
    }
}

impl Disk {
    fn set(&self, settings: &DiskSettings) -> std::io::Result<()> {
        self.limited.set(&limits(&settings.limits))?;
        self.guarded.set(match settings.on_error {
            OnError::Report => guarded::OnError::Report,
            OnError::Enospc => guarded::OnError::KeepIfFull,
            OnError::Pause => guarded::OnError::Keep,
        });
        let faults = &settings.faults;
        self.faulty.set(Faults {
            reads: faults.read.map(|(first, last)| first..=last),
            writes: faults.write.map(|(first, last)| first..=last),
            flushes: faults.flush,
            full_at: faults.full_at,
        });
        Ok(())
    }
}

impl Disks {
    /// Opens disk `n` for its controller.
    pub(super) fn open(
        &mut self,
        spec: &VmSpec,
        n: usize,
    ) -> Result<Arc<dyn BlockBackend>, AssemblyError> {
        let spec = &spec.disks[n];
        let image = open_disk(spec).map_err(|e| input(format!("disks[{n}].path"), e))?;
        let faulty = Arc::new(Faulty::new(Arc::clone(&image)));
        let limited = Arc::new(Limited::new(faulty.clone()));
        let guarded = Arc::new(Guarded::new(limited.clone()));
        let backend: Arc<dyn BlockBackend> = guarded.clone();
        let disk = Disk {
            path: spec.path.display().to_string(),
            keeps_tables: spec.format != DiskFormat::Raw,
            image,
            faulty,
            limited,
            guarded,
        };
        disk.set(&spec.settings)
            .map_err(|e| AssemblyError::Host(anyhow::Error::new(e).context("limits of a disk")))?;
        self.0.insert(n, disk);
        let Some(block_bytes) = spec.block_bytes else {
            return Ok(backend);
        };
        let large = LargeBlocks::new(backend, block_bytes)
            .map_err(|e| input(format!("disks[{n}].block_bytes"), format!("the disk {e}")))?;
        Ok(Arc::new(large))
    }

    /// The image of a disk, below all layers.
    #[cfg(test)]
    pub(super) fn image(&self, n: usize) -> &Arc<dyn BlockBackend> {
        &self.0[&n].image
    }

    /// Changes what can be changed of a disk.
    pub fn set(&self, n: usize, settings: &DiskSettings) -> anyhow::Result<()> {
        match self.0.get(&n) {
            Some(disk) => Ok(disk.set(settings)?),
            None => anyhow::bail!(
                "this VM has no disk {n}; it has {} (see --disk)",
                self.0.len()
            ),
        }
    }

    /// `notice` is called with the number of a disk, on any thread, when a request of it is kept
    /// because of an error.
    pub fn notify(&self, notice: impl Fn(usize) + Clone + Send + Sync + 'static) {
        for (n, disk) in &self.0 {
            let (n, notice) = (*n, notice.clone());
            disk.guarded.notify(Box::new(move || notice(n)));
        }
    }

    /// Which disk has requests that are kept because of an error, in a line.
    pub fn kept(&self) -> Option<String> {
        (self.0.keys()).find_map(|n| self.kept_of(*n))
    }

    /// The same of one disk.
    pub fn kept_of(&self, n: usize) -> Option<String> {
        let disk = self.0.get(&n)?;
        let (count, why) = disk.guarded.kept()?;
        let waiting = match count {
            1 => "a request waits".to_owned(),
            _ => format!("{count} requests wait"),
        };
        Some(format!("disk {n} ({}): {why}; {waiting}", disk.path))
    }

    /// Nothing is in flight but what is kept.
    pub fn quiet(&self) -> bool {
        self.0.values().all(|d| d.guarded.active() == 0)
    }

    /// What waits because of limits is done at once, until told otherwise.
    pub fn hurry(&self, hurry: bool) {
        for disk in self.0.values() {
            disk.limited.hurry(hurry);
        }
    }

    /// What is kept is tried again, or failed if its disk now reports errors.
    pub fn release(&self) {
        for disk in self.0.values() {
            disk.guarded.release();
        }
    }

    /// What is kept fails.
    pub fn give_up(&self) {
        for disk in self.0.values() {
            disk.guarded.give_up();
        }
    }

    /// Brings everything that the guest has written into the files. Image formats keep tables in
    /// memory: without this, what the guest has not flushed is not in the file, and a snapshot
    /// would not fit its disks. Fails with the first disk that fails.
    pub fn flush(&self, memory: &Arc<GuestMemory>) -> anyhow::Result<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let disks = || self.0.iter().filter(|(_, d)| d.keeps_tables);
        for (n, disk) in disks() {
            let (sender, n) = (sender.clone(), *n);
            let done = move |outcome| {
                // Nobody waits any more if another disk was too slow.
                let _ = sender.send((n, outcome));
            };
            disk.image
                .submit(memory, BlockRequest::Flush, Box::new(done));
        }
        for _ in disks() {
            let (n, outcome) = receiver
                .recv_timeout(FLUSH_WITHIN)
                .map_err(|_| anyhow::anyhow!("a disk does not finish its flush"))?;
            outcome.map_err(|e| anyhow::Error::new(e).context(format!("disk {n}")))?;
        }
        Ok(())
    }

    /// What a person may see of the disks.
    pub fn inspect(&self) -> Inspect {
        let disks = self.0.iter().map(|(n, d)| {
            let (waiting, delayed) = d.limited.waits();
            let error = d.guarded.kept().map_or_else(String::new, |(_, why)| why);
            let count = |n: u64| Inspect::Uint(n);
            let node = Inspect::node([
                ("path", Inspect::Text(d.path.clone())),
                ("limited", Inspect::Bool(!d.limited.limits().is_none())),
                ("waiting", count(waiting as u64)),
                ("delayed", count(delayed)),
                ("kept", count(d.guarded.kept().map_or(0, |k| k.0 as u64))),
                ("error", Inspect::Text(error)),
                ("kept-so-far", count(d.guarded.errors())),
                ("failed-on-purpose", count(d.faulty.hits())),
            ]);
            (n.to_string(), node)
        });
        Inspect::Node(disks.collect())
    }
}

fn open_disk(disk: &DiskSpec) -> Result<Arc<dyn BlockBackend>, String> {
    let path = &disk.path;
    if disk.format == DiskFormat::Raw {
        let raw =
            RawDisk::open(path, disk.read_only).map_err(|e| format!("{}: {e}", path.display()))?;
        return Ok(Arc::new(raw));
    }
    let image = open(path, open_options(disk)).map_err(|e| e.to_string())?;
    let served = ImageDisk::new(image)
        .map_err(|e| format!("cannot start the threads of disk {}: {e}", path.display()))?;
    Ok(Arc::new(served))
}

/// How the image of a disk is opened.
pub(crate) fn open_options(disk: &DiskSpec) -> OpenOptions {
    OpenOptions {
        format: match disk.format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
            DiskFormat::Vmdk => Format::Vmdk,
            DiskFormat::Vdi => Format::Vdi,
            DiskFormat::Vhd => Format::Vhd,
            DiskFormat::Vhdx => Format::Vhdx,
        },
        read_only: disk.read_only,
        references: if disk.allow_backing {
            References::Follow
        } else {
            References::Refuse
        },
    }
}
