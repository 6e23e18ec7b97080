//! What a device holds of its driver: queues, negotiated features, interrupts.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use pyrite_mem::GuestMemory;
use pyrite_vdev::Dma;
use pyrite_vdev::bus::lock;

use crate::queue::{Chain, InFlight, Queue, QueueError};
use crate::spec::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET};

/// How the transport tells the driver something.
pub trait Signal: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The configuration changed.
    fn config(&self);
}

/// The device's end of the connection to its driver, shared with back-end threads.
///
/// Every method may be called from any thread with no lock of this crate held but a device's own.
/// Interrupts are sent after the queue lock is released.
pub struct DriverLink {
    name: String,
    dma: Dma,
    memory: Arc<GuestMemory>,
    // LOCK ORDER: VirtioPciDevice < device state < queue < transport registers < irq sinks.
    queues: Vec<Mutex<Queue>>,
    signal: Arc<dyn Signal>,
    status: AtomicU8,
    features: AtomicU64,
    generation: AtomicU8,
    running: AtomicBool,
    in_flight: Arc<AtomicUsize>,
    errors: AtomicU64,
}

impl DriverLink {
    /// The link of device `name` with queues of these largest sizes.
    pub fn new(
        name: &str,
        memory: Arc<GuestMemory>,
        dma: Dma,
        signal: Arc<dyn Signal>,
        queue_sizes: &[u16],
    ) -> Arc<DriverLink> {
        Arc::new(DriverLink {
            name: name.to_owned(),
            dma,
            memory,
            queues: queue_sizes
                .iter()
                .map(|&n| Mutex::new(Queue::new(n)))
                .collect(),
            signal,
            status: AtomicU8::new(0),
            features: AtomicU64::new(0),
            generation: AtomicU8::new(0),
            running: AtomicBool::new(false),
            in_flight: Arc::new(AtomicUsize::new(0)),
            errors: AtomicU64::new(0),
        })
    }

    /// Name of the device in the machine.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Guest memory. Chains are validated against it.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }
    /// A queue, locked.
    pub(crate) fn queue(&self, index: usize) -> Option<MutexGuard<'_, Queue>> {
        self.queues.get(index).map(lock)
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }
    pub(crate) fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::Release);
    }
    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }
    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }
    /// True if a feature (bit number) was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features() >> bit & 1 != 0
    }
    /// The configuration generation.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }
    pub(crate) fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::Release);
    }

    /// True while chains may be taken: started, driver ready, not broken.
    pub fn active(&self) -> bool {
        self.running.load(Ordering::Acquire) && self.driver_ok()
    }
    /// True if the driver is ready and the device is not broken.
    pub fn driver_ok(&self) -> bool {
        let bad = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        self.status() & (VIRTIO_CONFIG_S_DRIVER_OK | bad) == VIRTIO_CONFIG_S_DRIVER_OK
    }
    pub(crate) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::Release);
        // Whoever saw `running` before and is inside a queue has counted its chain in flight once
        // these locks were passed.
        for q in &self.queues {
            drop(lock(q));
        }
    }
    /// True between start and pause.
    pub fn running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }
    /// Chains taken and not returned.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }
    /// Rule violations of the driver since power-on.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Forgets every queue. Chains in flight come to nothing.
    pub(crate) fn reset(&self) {
        // The status last: an error is noted under its queue's lock, so none of the old life can
        // come after this.
        for q in &self.queues {
            lock(q).reset();
        }
        self.set_features(0);
        self.set_status(0);
    }

    /// The device cannot go on until the driver resets it. virtio 1.3 §2.1.2.
    pub fn fail(&self, why: &dyn std::fmt::Display) {
        let old = self
            .status
            .fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::AcqRel);
        self.errors.fetch_add(1, Ordering::Relaxed);
        if old & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
            tracing::warn!(device = %self.name, "driver error, device needs reset: {why}");
            // "If DRIVER_OK is set, after it sets DEVICE_NEEDS_RESET, the device MUST send a
            // device configuration change notification."
            if old & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
                self.config_changed();
            }
        }
    }

    /// Tells the driver that the device configuration changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.status() & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.signal.config();
        }
    }

    fn with<T: Default>(
        &self,
        index: usize,
        act: impl FnOnce(&mut Queue, &GuestMemory) -> Result<T, QueueError>,
    ) -> T {
        let Some(mut q) = self.queue(index) else {
            return T::default();
        };
        // Without bus mastering a device neither reads nor writes memory.
        let Ok(memory) = self.dma.memory() else {
            return T::default();
        };
        match act(&mut q, memory) {
            Ok(v) => v,
            Err(e) => {
                // Still locked, see `reset`.
                self.fail(&format_args!("queue {index}: {e}"));
                T::default()
            }
        }
    }

    /// Takes the next chain of a queue. `None`: empty, paused, or broken.
    pub fn pop(&self, index: usize) -> Option<Chain> {
        self.with(index, |q, memory| {
            if !self.active() {
                return Ok(None);
            }
            let mut chain = q.pop(memory)?;
            if let Some(c) = &mut chain {
                c.in_flight = Some(InFlight::new(&self.in_flight));
            }
            Ok(chain)
        })
    }

    /// Entries of a queue's ring as the driver has set it up.
    pub fn queue_len(&self, index: usize) -> usize {
        self.queue(index).map_or(0, |q| usize::from(q.state().size))
    }

    /// True if a chain is there to be taken; the driver notifies otherwise.
    pub fn has_avail(&self, index: usize) -> bool {
        self.with(index, |q, memory| {
            if self.active() {
                q.has_avail(memory)
            } else {
                Ok(false)
            }
        })
    }

    /// Gives back the chains taken last (in the order they were taken) as if never taken. Only
    /// right if nobody else takes from this queue.
    pub fn unpop(&self, index: usize, chains: Vec<Chain>) {
        if let Some(mut q) = self.queue(index) {
            for c in chains.into_iter().rev() {
                q.unpop(c);
            }
        }
    }

    /// Asks for a notification at the next chain, although some are available.
    pub fn arm(&self, index: usize) {
        self.with(index, |q, memory| q.arm(memory));
    }

    /// Returns a chain without a signal.
    pub fn push(&self, index: usize, chain: Chain, written: u32) {
        self.with(index, |q, memory| {
            q.push(memory, &chain, written).map(|_| ())
        });
    }

    /// Returns a chain after writing `status` at `gpa`, in one step with regard to reset.
    pub fn push_status(&self, index: usize, chain: Chain, written: u32, gpa: u64, status: u8) {
        self.with(index, |q, memory| {
            if chain.epoch == q.epoch() {
                memory.write(gpa, &[status])?;
            }
            q.push(memory, &chain, written).map(|_| ())
        });
    }

    /// Interrupts the driver if it wants to hear of what was pushed.
    pub fn signal(&self, index: usize) {
        if self.with(index, |q, memory| q.needs_signal(memory))
            && let Ok(index) = u16::try_from(index)
        {
            self.signal.queue(index);
        }
    }

    /// Returns a chain and interrupts the driver if it wants.
    pub fn complete(&self, index: usize, chain: Chain, written: u32) {
        self.push(index, chain, written);
        self.signal(index);
    }
}
