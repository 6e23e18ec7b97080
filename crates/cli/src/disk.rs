//! `--disk`: disks on the command line, and what of them `pyrite ctl` changes.

use pyrite_api::v1::{DiskFormat, DiskLimit, DiskSetting, DiskSpec, OnError};
use pyrite_disk::Format;

use crate::args::{parse_bus, parse_size, split_at_commas};

/// The long help of `--disk`.
pub const HELP: &str = "\
Disk image; repeatable

FILE is raw unless format= says otherwise; the format is never guessed. A comma in
the file name is written twice.
  format=FORMAT  raw, qcow2, vmdk, vdi, vhd or vhdx
  ro             the guest cannot write
  backing=allow  the image may name other files that are then read, such as a
                 backing file
  serial=TEXT    serial number that the guest sees
  bus=BUS        how it is connected: virtio (the default), ahci, ide, nvme, scsi
                 (virtio-scsi) or usb
  block=4096     shown with blocks of 4 KiB

Settings that `pyrite ctl SOCKET disk N SETTING=VALUE...` changes while the VM runs:
  iops=N         requests in a second; also iops-read= and iops-write=
  bps=SIZE       bytes in a second, e.g. 10M; also bps-read= and bps-write=
  iops-burst=N   as many may come at once after silence (default: a tenth of the
                 limit); so for each limit, e.g. bps-read-burst=1M
  on-error=WHAT  what happens when the host cannot read or write: report (the guest
                 is told, the default), pause (the VM is paused, and `pyrite ctl
                 SOCKET resume` tries again), enospc (paused only if the host is
                 out of space)
  fail-read=FIRST-LAST, fail-write=FIRST-LAST, fail-flush=on, full-at=SIZE
                 for tests of guests: these sectors (of 512 bytes) cannot be read
                 or written, flushes fail, the host is out of space for what lies
                 beyond SIZE";

/// What stands below the help of `pyrite ctl SOCKET disk`.
pub const SETTINGS: &str = "\
Settings:
  iops=N, iops-read=N, iops-write=N        requests in a second, or none
  bps=SIZE, bps-read=SIZE, bps-write=SIZE  bytes in a second, e.g. 10M, or none
  iops-burst=N, bps-burst=SIZE, ...        as many may come at once
  on-error=report|pause|enospc             what an error of the host does; report also ends
                                           the wait of a VM that was paused by one
  fail-read=FIRST-LAST, fail-write=FIRST-LAST, fail-flush=on, full-at=SIZE
                                           errors on purpose; none (off) ends them";

/// `FILE[,SETTING=VALUE]...`.
pub fn parse(text: &str) -> Result<DiskSpec, String> {
    let mut parts = split_at_commas(text).into_iter();
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("expected FILE[,SETTING=VALUE]...")?;
    let mut disk = DiskSpec {
        path: path.into(),
        ..DiskSpec::default()
    };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => disk.read_only = true,
            None if part == "rw" => disk.read_only = false,
            Some(("serial", s)) => disk.serial = Some(s.to_owned()),
            Some(("format", f)) => disk.format = parse_format(f)?,
            Some(("bus", b)) => disk.bus = parse_bus(b)?,
            Some(("block", b)) => {
                let bytes = b.parse().map_err(|_| "expected block=512 or block=4096")?;
                disk.block_bytes = Some(bytes);
            }
            Some(("backing", "allow")) => disk.allow_backing = true,
            Some(("backing", "refuse")) => disk.allow_backing = false,
            Some((name, value)) => match setting(name, value)? {
                Some(change) => disk.settings.apply(change)?,
                None => return Err(unknown(&part)),
            },
            None => return Err(unknown(&part)),
        }
    }
    Ok(disk)
}

fn unknown(part: &str) -> String {
    format!(
        "unknown setting {part:?}; expected format=FORMAT, ro, backing=allow, serial=TEXT, \
         bus=BUS, block=BYTES, or one of iops=, bps=, on-error= that --help tells of (a comma in \
         the file name is written ,,)"
    )
}

/// `SETTING=VALUE` of those that can change.
pub fn parse_setting(text: &str) -> Result<DiskSetting, String> {
    let known = match text.split_once('=') {
        Some((name, value)) => setting(name, value)?,
        None => None,
    };
    known.ok_or_else(|| {
        format!(
            "{text:?} is no setting that can change; expected e.g. iops=100, bps=10M or \
             on-error=pause (--help lists them)"
        )
    })
}

/// None if nothing has that name.
fn setting(name: &str, value: &str) -> Result<Option<DiskSetting>, String> {
    let wrong = |what: &str| format!("{name}={value}: expected {what}");
    let none = matches!(value, "none" | "off");
    let limit = |name: &str| DiskLimit::ALL.into_iter().find(|l| l.name() == name);
    let amount = |limit: DiskLimit| {
        if limit.is_bytes() {
            parse_size(value).map_err(|e| wrong(e.trim_start_matches("expected ")))
        } else {
            value.parse().map_err(|_| wrong("a number"))
        }
    };
    if let Some(l) = limit(name) {
        let rate = if none { None } else { Some(amount(l)?) };
        return Ok(Some(DiskSetting::Limit(l, rate)));
    }
    if let Some(l) = name.strip_suffix("-burst").and_then(limit) {
        return Ok(Some(DiskSetting::Burst(l, amount(l)?)));
    }
    let sectors = || -> Result<Option<(u64, u64)>, String> {
        if none {
            return Ok(None);
        }
        let (first, last) = value.split_once('-').unwrap_or((value, value));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => Ok(Some((first, last))),
            _ => Err(wrong("FIRST-LAST, numbers of sectors, or none")),
        }
    };
    Ok(Some(match (name, value) {
        ("on-error", "report") => DiskSetting::OnError(OnError::Report),
        ("on-error", "pause") => DiskSetting::OnError(OnError::Pause),
        ("on-error", "enospc") => DiskSetting::OnError(OnError::Enospc),
        ("on-error", _) => return Err(wrong("report, pause or enospc")),
        ("fail-read", _) => DiskSetting::FailRead(sectors()?),
        ("fail-write", _) => DiskSetting::FailWrite(sectors()?),
        ("fail-flush", "on" | "off" | "none") => DiskSetting::FailFlush(!none),
        ("fail-flush", _) => return Err(wrong("on or off")),
        ("full-at", _) if none => DiskSetting::FullAt(None),
        ("full-at", _) => {
            let bytes = parse_size(value).map_err(|e| wrong(e.trim_start_matches("expected ")))?;
            DiskSetting::FullAt(Some(bytes))
        }
        _ => return Ok(None),
    }))
}

fn parse_format(text: &str) -> Result<DiskFormat, String> {
    Ok(match text.parse()? {
        Format::Raw => DiskFormat::Raw,
        Format::Qcow2 => DiskFormat::Qcow2,
        Format::Vmdk => DiskFormat::Vmdk,
        Format::Vdi => DiskFormat::Vdi,
        Format::Vhd => DiskFormat::Vhd,
        Format::Vhdx => DiskFormat::Vhdx,
    })
}

#[cfg(test)]
mod tests {
    use pyrite_api::v1::RateSpec;

    use super::*;

    #[test]
    fn settings_are_understood() {
        let text = "f,iops=1000,bps-read=10M,bps-read-burst=64K,on-error=enospc,\
                    fail-read=8-15,fail-write=3,fail-flush=on,full-at=1M";
        let s = parse(text).unwrap().settings;
        let rate = |per_second, burst| Some(RateSpec { per_second, burst });
        assert_eq!(s.limits.iops, rate(1000, 100));
        assert_eq!(s.limits.bps_read, rate(10 << 20, 64 << 10));
        assert_eq!((s.limits.bps, s.limits.iops_write), (None, None));
        assert_eq!(s.on_error, OnError::Enospc);
        assert_eq!(
            (s.faults.read, s.faults.write),
            (Some((8, 15)), Some((3, 3)))
        );
        assert_eq!((s.faults.flush, s.faults.full_at), (true, Some(1 << 20)));
        let mut s = s;
        for off in [
            "iops=none",
            "fail-read=none",
            "fail-flush=off",
            "full-at=off",
        ] {
            s.apply(parse_setting(off).unwrap()).unwrap();
        }
        assert_eq!((s.limits.iops, s.faults.read), (None, None));
        assert_eq!((s.faults.flush, s.faults.full_at), (false, None));
    }

    #[test]
    fn wrong_settings_say_what_is_expected() {
        for (text, says) in [
            ("f,iops=0", "more than 0"),
            ("f,iops=many", "a number"),
            ("f,iops-burst=5", "needs iops="),
            ("f,iops=5,iops-burst=0", "more than 0"),
            ("f,bps=fast", "a size"),
            ("f,on-error=panic", "report, pause or enospc"),
            ("f,fail-read=9-3", "behind the last"),
            ("f,fail-read=x", "FIRST-LAST"),
            ("f,fail-flush=maybe", "on or off"),
            ("f,colour=red", "unknown setting"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(parse_setting("bus=ahci").unwrap_err().contains("--help"));
    }
}
