//! Options about debugging, and about where a VM listens.

use std::net::SocketAddr;

use pyrite_api::v1::{GdbSpec, Listen, PanicAction, PvpanicBus, PvpanicSpec};

/// `unix:PATH` or `127.0.0.1:PORT`; `more` is what may follow.
pub fn parse(text: &str, more: &str) -> Result<Listen, String> {
    match text.strip_prefix("unix:") {
        Some("") => Err("unix: needs the path of a socket".into()),
        Some(path) => Ok(Listen::Unix(path.into())),
        None => match text.parse::<SocketAddr>() {
            Ok(address) => Ok(Listen::Tcp(address)),
            Err(_) => Err(format!(
                "expected unix:PATH or 127.0.0.1:PORT, and perhaps {more}"
            )),
        },
    }
}

/// `unix:PATH|127.0.0.1:PORT[,wait]`.
pub fn parse_gdb(text: &str) -> Result<GdbSpec, String> {
    let (listen, wait) = match text.strip_suffix(",wait") {
        Some(listen) => (listen, true),
        None => (text, false),
    };
    let listen = parse(listen, ",wait")?;
    Ok(GdbSpec { listen, wait })
}

/// `isa|pci[,action=ACTION]`.
pub fn parse_pvpanic(text: &str) -> Result<PvpanicSpec, String> {
    let (bus, rest) = text.split_once(',').unwrap_or((text, "action=exit"));
    let bus = match bus {
        "isa" => PvpanicBus::Isa,
        "pci" => PvpanicBus::Pci,
        _ => return Err("expected isa or pci".into()),
    };
    let action = match rest {
        "action=exit" => PanicAction::Exit,
        "action=pause" => PanicAction::Pause,
        "action=continue" => PanicAction::Continue,
        _ => {
            return Err(format!(
                "unknown setting {rest:?}; expected action=exit, action=pause or action=continue"
            ));
        }
    };
    Ok(PvpanicSpec { bus, action })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_actions_are_understood() {
        let p = parse_pvpanic("pci").unwrap();
        assert_eq!((p.bus, p.action), (PvpanicBus::Pci, PanicAction::Exit));
        let p = parse_pvpanic("isa,action=pause").unwrap();
        assert_eq!((p.bus, p.action), (PvpanicBus::Isa, PanicAction::Pause));
        for wrong in ["", "usb", "pci,", "pci,pause", "isa,action=reset"] {
            assert!(parse_pvpanic(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn stub_addresses_are_understood() {
        let at = parse_gdb("127.0.0.1:1234").unwrap();
        assert_eq!(at.listen, Listen::Tcp("127.0.0.1:1234".parse().unwrap()));
        assert!(!at.wait);
        let at = parse_gdb("unix:/run/a,b,wait").unwrap();
        assert_eq!(at.listen, Listen::Unix("/run/a,b".into()));
        assert!(at.wait);
        for wrong in [
            "",
            "1234",
            "unix:",
            "unix:,wait",
            "127.0.0.1:1,halt",
            "localhost:1",
        ] {
            assert!(parse_gdb(wrong).is_err(), "{wrong}");
        }
    }
}
