//! A disk shown with larger blocks than it has.

use std::sync::Arc;

use pyrite_mem::GuestMemory;

use crate::{BlockBackend, BlockRequest, Completion, DiskInfo, check_request};

/// Block sizes that a disk can be shown with, in bytes.
pub const BLOCK_SIZES: [u32; 2] = [512, 4096];

/// A disk whose logical blocks are `block_bytes` long, on one with smaller or equal blocks.
pub struct LargeBlocks {
    inner: Arc<dyn BlockBackend>,
    block_bytes: u32,
}

impl LargeBlocks {
    /// Shows `inner` with other blocks. Says what is wrong if its size is no multiple of them.
    pub fn new(inner: Arc<dyn BlockBackend>, block_bytes: u32) -> Result<LargeBlocks, String> {
        let info = inner.info();
        if !BLOCK_SIZES.contains(&block_bytes) || block_bytes < info.block_bytes {
            return Err(format!("cannot have blocks of {block_bytes} bytes"));
        }
        if !info.size_bytes.is_multiple_of(block_bytes.into()) {
            return Err(format!(
                "has {} bytes, which is no multiple of its {block_bytes}-byte blocks; \
                 resize it, or leave block= out",
                info.size_bytes
            ));
        }
        Ok(LargeBlocks { inner, block_bytes })
    }
}

impl BlockBackend for LargeBlocks {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            block_bytes: self.block_bytes,
            ..self.inner.info()
        }
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        match check_request(&self.info(), memory, &request) {
            Ok(()) => self.inner.submit(memory, request, done),
            Err(e) => done(Err(e)),
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IoBuf, MemDisk};

    #[test]
    fn requests_are_multiples_of_the_larger_blocks() {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        assert!(LargeBlocks::new(Arc::new(MemDisk::new(4096 + 512)), 4096).is_err());
        assert!(LargeBlocks::new(Arc::new(MemDisk::new(4096)), 1024).is_err());
        let disk = LargeBlocks::new(Arc::new(MemDisk::new(8192)), 4096).unwrap();
        assert_eq!(disk.info().block_bytes, 4096);
        for (offset, len, fine) in [(4096, 4096, true), (512, 4096, false), (0, 512, false)] {
            let (sender, receiver) = std::sync::mpsc::channel();
            let bufs = vec![IoBuf { gpa: 0, len }];
            let done = Box::new(move |r: Result<(), crate::DiskError>| {
                sender.send(r.is_ok()).unwrap();
            });
            disk.submit(&memory, BlockRequest::Read { offset, bufs }, done);
            assert_eq!(receiver.try_recv(), Ok(fine), "{offset}+{len}");
        }
    }
}
