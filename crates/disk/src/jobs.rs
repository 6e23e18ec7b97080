//! Work on whole images: copying one into another, committing one into its backing file.

use crate::DiskError;
use crate::image::{Image, Stored, read_into, write_from};
use crate::qcow2::{Compression, Qcow2, pack};

/// Bytes that are read at a time.
const CHUNK: u64 = 2 << 20;
/// Zeroes are looked for in pieces of this many bytes.
const ZERO_UNIT: usize = 4096;

/// Told how far a job is: bytes of the disk done, and all. False ends the job.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Takes the content of a new image, which reads as zeroes before.
pub trait Filler {
    /// Pieces begin and end at multiples of this many bytes, except at the end of the disk.
    fn unit_bytes(&self) -> u64;
    /// Stores data. Offsets grow from call to call.
    fn put(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// Everything has been stored.
    fn finish(&mut self) -> Result<(), DiskError>;
}

/// Fills any image by writing to it.
pub struct Plain<'a>(pub &'a dyn Image);

impl Filler for Plain<'_> {
    fn unit_bytes(&self) -> u64 {
        ZERO_UNIT as u64
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        write_from(self.0, offset, data)
    }

    fn finish(&mut self) -> Result<(), DiskError> {
        self.0.close()
    }
}

/// Fills a qcow2 image with compressed clusters.
pub struct Packed<'a> {
    image: &'a Qcow2,
    compression: Compression,
    cluster_bytes: u64,
}

impl<'a> Packed<'a> {
    /// The image must be new.
    pub fn new(image: &'a Qcow2) -> Packed<'a> {
        let details = image.details();
        Packed {
            image,
            compression: image.compression(),
            cluster_bytes: details.cluster_bytes.unwrap_or(CHUNK),
        }
    }
}

impl Filler for Packed<'_> {
    fn unit_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        for (n, cluster) in data.chunks(self.cluster_bytes as usize).enumerate() {
            let at = offset + n as u64 * self.cluster_bytes;
            let mut whole = cluster.to_vec();
            whole.resize(self.cluster_bytes as usize, 0);
            match pack(self.compression, &whole) {
                Some(packed) => self.image.write_compressed(at, &packed)?,
                None => write_from(self.image, at, cluster)?,
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DiskError> {
        self.image.close()
    }
}

fn stopped<T>() -> Result<T, DiskError> {
    Err(DiskError::Io(std::io::ErrorKind::Interrupted.into()))
}

/// Copies the content of `source` into a new image of the same size, or larger. Zeroes are not
/// stored.
pub fn copy(
    source: &dyn Image,
    target: &mut dyn Filler,
    progress: Progress<'_>,
) -> Result<(), DiskError> {
    let size = source.info().size_bytes;
    let unit = target.unit_bytes();
    let chunk = CHUNK.next_multiple_of(unit);
    let mut buf = vec![0; chunk.min(size.next_multiple_of(unit)) as usize];
    let mut at = 0;
    while at < size {
        if !progress(at, size) {
            return stopped();
        }
        let extent = source.extent(at, size - at)?;
        if extent.stored == Stored::Zero {
            // Up to the last whole unit: what follows shares one with data.
            let end = at + extent.len;
            let whole = if end == size { size } else { end / unit * unit };
            if whole > at {
                at = whole;
                continue;
            }
        }
        let n = (size - at).min(chunk) as usize;
        let piece = &mut buf[..n];
        read_into(source, at, piece)?;
        put_nonzero(target, at, piece, unit as usize)?;
        at += n as u64;
    }
    progress(size, size);
    target.finish()
}

/// Stores the runs of units that are not zero.
fn put_nonzero(
    target: &mut dyn Filler,
    offset: u64,
    data: &[u8],
    unit: usize,
) -> Result<(), DiskError> {
    let mut run: Option<usize> = None;
    let mut from = 0;
    while from < data.len() {
        let to = (from + unit).min(data.len());
        let zero = data[from..to].iter().all(|b| *b == 0);
        match (run, zero) {
            (None, false) => run = Some(from),
            (Some(start), true) => {
                target.put(offset + start as u64, &data[start..from])?;
                run = None;
            }
            _ => {}
        }
        from = to;
    }
    if let Some(start) = run {
        target.put(offset + start as u64, &data[start..])?;
    }
    Ok(())
}

/// Writes what `overlay` has of its own into `base`, and empties the overlay. The overlay was
/// opened with [`Qcow2::open_top`], so that its backing file could be opened for writing.
pub fn commit(overlay: &Qcow2, base: &dyn Image, progress: Progress<'_>) -> Result<(), DiskError> {
    let size = overlay.info().size_bytes;
    if base.info().size_bytes < size {
        base.resize(size)?;
    }
    let mut buf = vec![0; CHUNK as usize];
    let mut at = 0;
    while at < size {
        if !progress(at, size) {
            return stopped();
        }
        let extent = overlay.extent(at, size - at)?;
        let end = at + extent.len;
        match extent.stored {
            Stored::Zero if extent.present => base.write_zeroes(at, extent.len, true)?,
            Stored::Zero => {}
            Stored::Data => {
                let mut from = at;
                while from < end {
                    let n = (end - from).min(CHUNK) as usize;
                    read_into(overlay, from, &mut buf[..n])?;
                    write_from(base, from, &buf[..n])?;
                    from += n as u64;
                }
            }
        }
        at = end;
    }
    // Durable below before it is gone above.
    base.close()?;
    overlay.empty()?;
    progress(size, size);
    overlay.close()
}
