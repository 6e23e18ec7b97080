//! What of a disk can be changed while its VM runs: limits, errors.

use serde::{Deserialize, Serialize};

use super::RateSpec;

/// What an error that the host reports does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The guest is told, as its controller would.
    #[default]
    Report,
    /// The VM is paused; what failed is tried again when it goes on.
    Pause,
    /// The VM is paused if the host is out of space; the guest is told of other errors.
    Enospc,
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskLimit {
    /// Requests.
    Iops,
    /// Requests that read.
    IopsRead,
    /// Requests that write, discard or zero.
    IopsWrite,
    /// Bytes.
    Bps,
    /// Bytes that are read.
    BpsRead,
    /// Bytes that are written.
    BpsWrite,
}

impl DiskLimit {
    /// All of them.
    pub const ALL: [DiskLimit; 6] = [
        DiskLimit::Iops,
        DiskLimit::IopsRead,
        DiskLimit::IopsWrite,
        DiskLimit::Bps,
        DiskLimit::BpsRead,
        DiskLimit::BpsWrite,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DiskLimit::Iops => "iops",
            DiskLimit::IopsRead => "iops-read",
            DiskLimit::IopsWrite => "iops-write",
            DiskLimit::Bps => "bps",
            DiskLimit::BpsRead => "bps-read",
            DiskLimit::BpsWrite => "bps-write",
        }
    }

    /// It counts bytes.
    pub fn is_bytes(self) -> bool {
        matches!(
            self,
            DiskLimit::Bps | DiskLimit::BpsRead | DiskLimit::BpsWrite
        )
    }
}

/// Limits of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "named as in `DiskLimit`")]
pub struct DiskLimits {
    pub iops: Option<RateSpec>,
    pub iops_read: Option<RateSpec>,
    pub iops_write: Option<RateSpec>,
    pub bps: Option<RateSpec>,
    pub bps_read: Option<RateSpec>,
    pub bps_write: Option<RateSpec>,
}

impl DiskLimits {
    /// One of them.
    pub fn get(&self, limit: DiskLimit) -> Option<RateSpec> {
        match limit {
            DiskLimit::Iops => self.iops,
            DiskLimit::IopsRead => self.iops_read,
            DiskLimit::IopsWrite => self.iops_write,
            DiskLimit::Bps => self.bps,
            DiskLimit::BpsRead => self.bps_read,
            DiskLimit::BpsWrite => self.bps_write,
        }
    }

    fn place(&mut self, limit: DiskLimit) -> &mut Option<RateSpec> {
        match limit {
            DiskLimit::Iops => &mut self.iops,
            DiskLimit::IopsRead => &mut self.iops_read,
            DiskLimit::IopsWrite => &mut self.iops_write,
            DiskLimit::Bps => &mut self.bps,
            DiskLimit::BpsRead => &mut self.bps_read,
            DiskLimit::BpsWrite => &mut self.bps_write,
        }
    }
}

/// Errors that a disk makes up, to see what a guest does then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskFaults {
    /// First and last of the sectors of 512 bytes that cannot be read.
    pub read: Option<(u64, u64)>,
    /// First and last of those that cannot be written.
    pub write: Option<(u64, u64)>,
    /// Flushes fail.
    pub flush: bool,
    /// The host is out of space for what is written beyond this byte of the disk.
    pub full_at: Option<u64>,
}

/// What can be changed while the VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskSettings {
    /// Limits.
    pub limits: DiskLimits,
    /// What errors do.
    pub on_error: OnError,
    /// Errors on purpose.
    pub faults: DiskFaults,
}

/// One change of [`DiskSettings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DiskSetting {
    /// Sets a limit in a second, with a burst of a tenth of it; none takes it away.
    Limit(DiskLimit, Option<u64>),
    /// Sets how much may come at once under a limit that is set.
    Burst(DiskLimit, u64),
    /// Sets what errors do.
    OnError(OnError),
    /// Sets [`DiskFaults::read`].
    FailRead(Option<(u64, u64)>),
    /// Sets [`DiskFaults::write`].
    FailWrite(Option<(u64, u64)>),
    /// Sets [`DiskFaults::flush`].
    FailFlush(bool),
    /// Sets [`DiskFaults::full_at`].
    FullAt(Option<u64>),
}

impl DiskSettings {
    /// Makes a change. Says what is wrong with it, if something is.
    pub fn apply(&mut self, change: DiskSetting) -> Result<(), String> {
        match change {
            DiskSetting::Limit(limit, rate) => {
                *self.limits.place(limit) = rate.map(|per_second| RateSpec {
                    per_second,
                    burst: (per_second / 10).max(1),
                });
            }
            DiskSetting::Burst(limit, burst) => match self.limits.place(limit) {
                Some(rate) => rate.burst = burst,
                None => {
                    let name = limit.name();
                    return Err(format!("{name}-burst= needs {name}= before it"));
                }
            },
            DiskSetting::OnError(on_error) => self.on_error = on_error,
            DiskSetting::FailRead(range) => self.faults.read = range,
            DiskSetting::FailWrite(range) => self.faults.write = range,
            DiskSetting::FailFlush(on) => self.faults.flush = on,
            DiskSetting::FullAt(bytes) => self.faults.full_at = bytes,
        }
        self.check()
    }

    /// True if nothing is set.
    pub fn is_default(&self) -> bool {
        *self == DiskSettings::default()
    }

    /// Says what is wrong, if something is.
    pub(super) fn check(&self) -> Result<(), String> {
        for limit in DiskLimit::ALL {
            if let Some(r) = self.limits.get(limit)
                && (r.per_second == 0 || r.burst == 0)
            {
                let name = limit.name();
                return Err(format!(
                    "{name} and {name}-burst must be more than 0; {name}=none takes the limit away"
                ));
            }
        }
        for (first, last) in [self.faults.read, self.faults.write].into_iter().flatten() {
            if first > last {
                return Err(format!(
                    "sectors {first}-{last}: the first is behind the last"
                ));
            }
        }
        Ok(())
    }
}
