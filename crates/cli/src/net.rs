//! `--net`: network cards on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pyrite_api::v1::{LOSS_UNIT, NetKind, NetSpec, NicBackend, NicModel, NicSpec, RateSpec};
use pyrite_net::switch::Switch;

use crate::args::{parse_size, parse_time, split_at_commas};

/// What `--net` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetArg {
    /// No network card.
    None,
    /// A card.
    Card(NicSpec),
}

/// State of a cable.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LinkArg {
    /// Plugged in
    Up,
    /// Not plugged in
    Down,
}

/// Arguments of `pyrite switch`.
#[derive(Debug, Args)]
pub struct SwitchArgs {
    /// Where the switch listens; a file that is left of an earlier one is replaced
    pub socket: PathBuf,
}

/// `pyrite switch`: runs until it is stopped by a signal.
pub fn switch(args: &SwitchArgs) -> u8 {
    let path = &args.socket;
    match crate::ctl::bind_private(path, Switch::is_at, Switch::listen) {
        Ok(switch) => {
            eprintln!("pyrite: a switch listens at {}", path.display());
            switch.run();
            0
        }
        Err(e) => {
            eprintln!("pyrite: {}: {e:#}", path.display());
            crate::exit::BAD_INPUT
        }
    }
}

/// The long help of `--net`.
pub const HELP: &str = "\
Network card; repeatable [default: user]

BACKEND is what the card is plugged into:
  user   NAT that needs no rights on the host
  tap    a TAP interface of the host: tap,ifname=NAME, or tap,fd=N for one that
         is open already
  switch a private network of VMs: switch,path=SOCKET; see `pyrite switch`
  open   nothing; the cable ends in the air
  none   no network card at all

Settings of the card:
  model=MODEL   virtio (the default), e1000 (Intel 82540EM), rtl8139 (Realtek
                RTL8139C+), rtl8139c (the older RTL8139C) or ne2k_pci (NE2000)
  mac=ADDRESS   e.g. 52:54:00:12:34:56
  mtu=N         largest IP packet that a virtio card tells its driver of
  queues=N      queue pairs of a virtio card

Settings of the cable, for each direction:
  pcap=FILE     capture of all frames, in pcapng, for tcpdump and Wireshark
  rate=SIZE     bytes in a second, e.g. 1M; burst=SIZE at once (default: a tenth)
  frames=N      frames in a second; frame-burst=N at once (default: a tenth)
  loss=PERCENT  frames that are lost, e.g. 0.5; the same ones for the same seed=N
  delay=TIME    how long a frame is on its way, e.g. 20ms
  link=off      not plugged in until `pyrite ctl SOCKET link CARD up`";

/// The network that the options describe.
pub fn spec(args: &[NetArg]) -> NetSpec {
    let cards: Vec<NicSpec> = args
        .iter()
        .filter_map(|a| match a {
            NetArg::None => None,
            NetArg::Card(c) => Some(c.clone()),
        })
        .collect();
    let none = args.contains(&NetArg::None);
    NetSpec {
        kind: if none { NetKind::None } else { NetKind::User },
        // The card that every VM has by default.
        cards: match cards.as_slice() {
            [one] if *one == NicSpec::default() && !none => Vec::new(),
            _ => cards,
        },
        ..NetSpec::default()
    }
}

/// `BACKEND[,SETTING=VALUE]...`.
pub fn parse(text: &str) -> Result<NetArg, String> {
    let mut parts = split_at_commas(text).into_iter();
    let backend = parts.next().unwrap_or_default();
    let mut card = NicSpec {
        backend: match backend.as_str() {
            "user" => NicBackend::User,
            "open" => NicBackend::None,
            "tap" => NicBackend::Tap(String::new()),
            "switch" => NicBackend::Switch(PathBuf::new()),
            "none" => {
                return match parts.next() {
                    None => Ok(NetArg::None),
                    Some(_) => Err("none takes no settings".into()),
                };
            }
            _ => {
                return Err(format!(
                    "unknown back end {backend:?}; expected user, open or none"
                ));
            }
        },
        ..NicSpec::default()
    };
    let (mut burst, mut frame_burst) = (None, None);
    for part in parts {
        let (name, value) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} is no setting; expected NAME=VALUE"))?;
        let wrong = |what: &str| format!("{name}={value}: expected {what}");
        let number = || value.parse().map_err(|_| wrong("a number"));
        match name {
            "ifname" if backend == "tap" => card.backend = NicBackend::Tap(value.into()),
            "fd" if backend == "tap" => {
                let fd = value
                    .parse()
                    .map_err(|_| wrong("the number of a descriptor"))?;
                card.backend = NicBackend::TapFd(fd);
            }
            "path" if backend == "switch" => card.backend = NicBackend::Switch(absolute(value)?),
            "model" => card.model = parse_model(value)?,
            "mac" => card.mac = Some(value.parse()?),
            "mtu" => card.mtu = Some(value.parse().map_err(|_| wrong("a number of bytes"))?),
            "queues" => card.queues = Some(value.parse().map_err(|_| wrong("a number"))?),
            "pcap" => card.pcap = Some(absolute(value)?),
            "rate" => card.cable.bytes = Some(rate(parse_bytes(value)?)),
            "burst" => burst = Some(parse_bytes(value)?),
            "frames" => card.cable.frames = Some(rate(number()?)),
            "frame-burst" => frame_burst = Some(number()?),
            "loss" => {
                card.cable.loss_ppm = parse_percent(value).ok_or_else(|| wrong("0 to 100"))?;
            }
            "delay" => card.cable.delay_ms = parse_delay(value)?,
            "seed" => card.cable.seed = number()?,
            "link" => {
                card.cable.unplugged = match value {
                    "on" => false,
                    "off" => true,
                    _ => return Err(wrong("on or off")),
                };
            }
            _ => return Err(format!("unknown setting {name:?}; see `pyrite run --help`")),
        }
    }
    match &card.backend {
        NicBackend::Tap(name) if name.is_empty() => {
            return Err("tap needs ifname=NAME or fd=N".into());
        }
        NicBackend::Switch(path) if path.as_os_str().is_empty() => {
            return Err("switch needs path=SOCKET".into());
        }
        _ => {}
    }
    for (burst, rate, names) in [
        (burst, &mut card.cable.bytes, "burst= needs rate="),
        (
            frame_burst,
            &mut card.cable.frames,
            "frame-burst= needs frames=",
        ),
    ] {
        match (burst, rate) {
            (Some(b), Some(r)) => r.burst = b,
            (Some(_), None) => return Err(names.into()),
            (None, _) => {}
        }
    }
    Ok(NetArg::Card(card))
}

/// The VM process has a working directory of its own.
fn absolute(path: &str) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("{path}: {e}"))
}

fn rate(per_second: u64) -> RateSpec {
    RateSpec {
        per_second,
        burst: per_second / 10,
    }
}

fn parse_model(text: &str) -> Result<NicModel, String> {
    Ok(match text {
        "virtio" | "virtio-net" | "virtio-net-pci" => NicModel::Virtio,
        "e1000" | "82540em" => NicModel::E1000,
        "rtl8139" => NicModel::Rtl8139,
        "rtl8139c" => NicModel::Rtl8139c,
        "ne2k_pci" | "ne2k-pci" => NicModel::Ne2kPci,
        _ => {
            return Err(format!(
                "unknown model {text:?}; expected virtio, e1000, rtl8139, rtl8139c or ne2k_pci"
            ));
        }
    })
}

/// Bytes; a plain number is bytes, unlike sizes of memory.
fn parse_bytes(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(n) => Ok(n),
        Err(_) => parse_size(text),
    }
}

/// Millionths of `0.5` or `0.5%` percent.
fn parse_percent(text: &str) -> Option<u32> {
    let percent: f64 = text.trim_end_matches('%').parse().ok()?;
    let unit = f64::from(LOSS_UNIT);
    (0.0..=100.0)
        .contains(&percent)
        .then(|| (percent / 100.0 * unit).round() as u32)
}

/// Milliseconds; 0 is none.
fn parse_delay(text: &str) -> Result<u32, String> {
    if text == "0" {
        return Ok(0);
    }
    let time: Duration = parse_time(text)?;
    u32::try_from(time.as_millis()).map_err(|_| "the delay is too long".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(text: &str) -> NicSpec {
        match parse(text).unwrap() {
            NetArg::Card(c) => c,
            NetArg::None => unreachable!("{text} is a card"),
        }
    }

    #[test]
    fn settings_become_a_card() {
        let c = card(
            "user,model=e1000,mac=52:54:00:00:00:01,pcap=a,,b,rate=1M,burst=1500,frames=1000,\
             loss=0.5%,delay=20ms,seed=7,link=off",
        );
        assert_eq!(c.model, NicModel::E1000);
        assert_eq!(c.mac_of(3), [0x52, 0x54, 0, 0, 0, 1]);
        assert!(
            c.pcap
                .is_some_and(|p| p.is_absolute() && p.ends_with("a,b"))
        );
        let bytes = c.cable.bytes.unwrap();
        assert_eq!((bytes.per_second, bytes.burst), (1 << 20, 1500));
        let frames = c.cable.frames.unwrap();
        assert_eq!((frames.per_second, frames.burst), (1000, 100));
        assert_eq!(
            (c.cable.loss_ppm, c.cable.delay_ms, c.cable.seed),
            (5000, 20, 7)
        );
        assert!(c.cable.unplugged);
        assert_eq!(card("tap,ifname=t0").backend, NicBackend::Tap("t0".into()));
        assert_eq!(card("tap,fd=5").backend, NicBackend::TapFd(5));
        let c = card("switch,path=/run/s");
        assert_eq!(c.backend, NicBackend::Switch("/run/s".into()));
        let c = card("user,mtu=9000,queues=4");
        assert_eq!((c.mtu, c.queues), (Some(9000), Some(4)));
    }

    #[test]
    fn default_card_is_that_of_every_vm() {
        assert_eq!(spec(&[]), NetSpec::default());
        assert_eq!(spec(&[parse("user").unwrap()]), NetSpec::default());
        let none = spec(&[NetArg::None]);
        assert_eq!((none.kind, none.all_cards().len()), (NetKind::None, 0));
        let two = spec(&[parse("user").unwrap(), parse("open").unwrap()]);
        assert_eq!(two.all_cards().len(), 2);
        let macs: Vec<_> = two
            .all_cards()
            .iter()
            .enumerate()
            .map(|(n, c)| c.mac_of(n))
            .collect();
        assert_ne!(macs[0], macs[1]);
    }

    #[test]
    fn wrong_settings_are_refused() {
        for text in [
            "",
            "bridge",
            "none,mtu=3",
            "user,model=ne3000",
            "user,mac=1:2:3",
            "user,mac=52:54:00:00:00:0g",
            "tap",
            "tap,fd=x",
            "switch",
            "user,ifname=tap0",
            "user,burst=5",
            "user,loss=101",
            "user,loss=-1",
            "user,delay=x",
            "user,link=maybe",
            "user,colour=red",
            "user,pcap",
            "user,frames=many",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
