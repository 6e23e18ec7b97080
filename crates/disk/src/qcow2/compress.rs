//! Compressed clusters.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, Encoder, Operation};

use super::header::Compression;

/// The window that readers of qcow2 expect, as a power of two.
const ZLIB_WINDOW_BITS: u8 = 12;
/// LIMIT: the window of a zstd frame, as a power of two: clusters have at most 2 MiB.
const ZSTD_WINDOW_BITS: u32 = 23;
/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// Unpacks a cluster of `bytes`. What follows the compressed data in `packed` is not looked at.
/// None if it is damaged or too short.
pub(crate) fn unpack(compression: Compression, packed: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; bytes];
    match compression {
        Compression::Zlib => {
            let mut d = Decompress::new(false);
            let status = d
                .decompress(packed, &mut out, FlushDecompress::Finish)
                .ok()?;
            let whole = matches!(status, Status::StreamEnd | Status::Ok | Status::BufError);
            (whole && d.total_out() == bytes as u64).then_some(out)
        }
        Compression::Zstd => {
            let mut d = Decoder::new().ok()?;
            d.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_BITS))
                .ok()?;
            let (mut from, mut to) = (0, 0);
            while to < bytes {
                let status = d
                    .run_on_buffers(packed.get(from..)?, out.get_mut(to..)?)
                    .ok()?;
                if status.bytes_read == 0 && status.bytes_written == 0 {
                    return None;
                }
                from += status.bytes_read;
                to += status.bytes_written;
            }
            Some(out)
        }
    }
}

/// Packs a cluster. None if that does not make it smaller.
pub fn pack(compression: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; data.len().checked_sub(1)?];
    let len = match compression {
        Compression::Zlib => {
            let mut c = Compress::new_with_window_bits(
                flate2::Compression::default(),
                false,
                ZLIB_WINDOW_BITS,
            );
            let status = c.compress(data, &mut out, FlushCompress::Finish).ok()?;
            (status == Status::StreamEnd).then_some(c.total_out() as usize)?
        }
        Compression::Zstd => {
            let mut e = Encoder::new(ZSTD_LEVEL).ok()?;
            let first = e.run_on_buffers(data, &mut out).ok()?;
            if first.bytes_read != data.len() {
                return None;
            }
            let mut rest =
                zstd::stream::raw::OutBuffer::around(out.get_mut(first.bytes_written..)?);
            if e.finish(&mut rest, true).ok()? != 0 {
                return None;
            }
            first.bytes_written + rest.pos()
        }
    };
    out.truncate(len);
    Some(out)
}
