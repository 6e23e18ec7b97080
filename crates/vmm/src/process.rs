//! The process of one VM: reads what it is to be, assembles it, drives it, ends.

use std::io::BufReader;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pyrite_api::control::{self, Ending, Event as Notice, Hello, Message, PROTOCOL};
use pyrite_api::v1::{
    ChannelSpec, ConsoleKind, NetSpec, NicSpec, ScreenSpec, ShareKind, ShareSpec, SpecError,
    VmSpec, VncListen,
};

use crate::engines::{self, Engine};
use crate::machine::{AssemblyError, Machine};
use crate::run::console::Console;
use crate::run::{self, Driver, Event, GuestRequests};
use crate::snapshot::Manifest;

/// How long the last output may take to be shown.
const SHOW_WITHIN: Duration = Duration::from_secs(2);

/// Serves one VM: standard input is the control socket, standard output the console socket.
pub fn serve_standard_streams() -> Result<()> {
    let control =
        socket(std::io::stdin().as_fd().try_clone_to_owned()).context("standard input")?;
    let console =
        socket(std::io::stdout().as_fd().try_clone_to_owned()).context("standard output")?;
    serve(control, console)
}

fn socket(fd: std::io::Result<std::os::fd::OwnedFd>) -> Result<UnixStream> {
    let stream = UnixStream::from(fd?);
    stream.peer_addr().context("is not a socket")?;
    Ok(stream)
}

/// Serves one VM.
pub fn serve(mut control: UnixStream, console: UnixStream) -> Result<()> {
    let mut from = BufReader::new(control.try_clone().context("control socket")?);
    let Some(hello) = control::receive::<Hello>(&mut from).context("control socket")? else {
        return Ok(());
    };
    if hello.protocol != PROTOCOL {
        bail!(
            "the front speaks protocol {}, this program {PROTOCOL}",
            hello.protocol
        );
    }
    let ending = match assemble(hello, from, &control, console) {
        Ok((driver, console)) => {
            let vnc = driver
                .spec
                .screen
                .vnc
                .as_ref()
                .and_then(|v| match &v.listen {
                    VncListen::Unix(path) => Some(path.clone()),
                    VncListen::Tcp(_) => None,
                });
            let channels = driver.spec.channels.iter().map(|c| c.path.clone());
            let sockets = [driver.spec.vsock.clone(), vnc].into_iter().flatten();
            let sockets: Vec<_> = sockets.chain(channels).collect();
            let ending = driver.drive();
            console.finish(SHOW_WITHIN);
            for path in sockets {
                // The process ends without dropping its devices.
                let _ = std::fs::remove_file(path);
            }
            ending
        }
        Err(AssemblyError::Input(errors)) => Ending::BadInput { errors },
        Err(AssemblyError::Host(e)) => Ending::Failed {
            reason: format!("{e:#}"),
        },
    };
    // A front that is gone does not want to know.
    let _ = control::send(&mut control, &Message::Event(Notice::Ended(ending)));
    Ok(())
}

/// The network of a snapshot, plugged in as the command says about this run: cards stay what the
/// guest knows, but what reaches the host is granted by who runs the VM, not by a file.
fn merge_net(now: &NetSpec, saved: &NetSpec) -> Result<NetSpec, SpecError> {
    let mut net = saved.clone();
    if !now.forwards.is_empty() {
        net.forwards = now.forwards.clone();
    }
    net.host_loopback = now.host_loopback;
    if !now.cards.is_empty() && now.cards.len() != saved.all_cards().len() {
        let problem = format!(
            "the snapshot has {} network cards; give as many, or none to plug them into user \
             networks",
            saved.all_cards().len()
        );
        return Err(SpecError::new("net.cards", problem));
    }
    for (n, card) in net.cards.iter_mut().enumerate() {
        let now = now.cards.get(n).cloned().unwrap_or_default();
        card.backend = now.backend;
        card.pcap = now.pcap;
        card.cable = now.cable;
    }
    if net.cards.is_empty()
        && let [one] = now.cards.as_slice()
    {
        net.cards = vec![NicSpec {
            backend: one.backend.clone(),
            pcap: one.pcap.clone(),
            cable: one.cable,
            ..NicSpec::default()
        }];
    }
    Ok(net)
}

/// The folders of a snapshot's guest, which the command must grant again: a file that says what is
/// shared grants nothing.
fn merge_shares(now: &[ShareSpec], saved: &[ShareSpec]) -> Result<Vec<ShareSpec>, SpecError> {
    let named = |all: &[ShareSpec], s: &ShareSpec| {
        let same = |o: &&ShareSpec| o.tag == s.tag && o.kind == s.kind;
        all.iter().find(same).cloned()
    };
    let option = |s: &ShareSpec| {
        let kind = match s.kind {
            ShareKind::Virtiofs => "virtiofs",
            ShareKind::P9 => "9p",
        };
        format!("--share DIR,tag={},type={kind}", s.tag)
    };
    if let Some(s) = now.iter().find(|s| named(saved, s).is_none()) {
        let problem = format!(
            "the guest of the snapshot has no {}; leave it out",
            option(s)
        );
        return Err(SpecError::new("shares", problem));
    }
    let granted = |s: &ShareSpec| {
        named(now, s).ok_or_else(|| {
            let problem = format!(
                "the guest of the snapshot was given {}; give it that again with {}",
                s.path.display(),
                option(s)
            );
            SpecError::new("shares", problem)
        })
    };
    saved.iter().map(granted).collect()
}

/// The channels of a snapshot's guest, with the sockets that the command names.
fn merge_channels(
    now: &[ChannelSpec],
    saved: &[ChannelSpec],
) -> Result<Vec<ChannelSpec>, SpecError> {
    let named =
        |all: &[ChannelSpec], c: &ChannelSpec| all.iter().find(|o| o.name == c.name).cloned();
    if let Some(c) = now.iter().find(|c| named(saved, c).is_none()) {
        let problem = format!("the guest of the snapshot has no channel {}", c.name);
        return Err(SpecError::new("channels", problem));
    }
    let merged = |c: &ChannelSpec| named(now, c).unwrap_or_else(|| c.clone());
    Ok(saved.iter().map(merged).collect())
}

/// The specification of a snapshot with what the command says about this run.
fn merge(now: &VmSpec, saved: VmSpec) -> Result<VmSpec, SpecError> {
    let net = merge_net(&now.net, &saved.net)?;
    let screen = ScreenSpec {
        vnc: now.screen.vnc.clone(),
        ..saved.screen.clone()
    };
    Ok(VmSpec {
        shares: merge_shares(&now.shares, &saved.shares)?,
        channels: merge_channels(&now.channels, &saved.channels)?,
        engine: now.engine,
        code_cache_bytes: now.code_cache_bytes,
        direct: now.direct,
        reset: now.reset,
        time_limit_ms: now.time_limit_ms,
        restore: now.restore.clone(),
        paused: now.paused,
        // Files of the host are named by who runs the VM, not by a file.
        serial2: now.serial2.clone(),
        debugcon: now.debugcon.clone(),
        net,
        screen,
        ..saved
    })
}

fn assemble(
    hello: Hello,
    from: BufReader<UnixStream>,
    control: &UnixStream,
    stream: UnixStream,
) -> Result<(Driver, Console), AssemblyError> {
    let mut spec = hello.spec;
    let mut manifest = None;
    if let Some(dir) = spec.restore.clone() {
        let m = Manifest::read(&dir).map_err(|e| {
            let problem = format!("{}: {e}", dir.display());
            AssemblyError::Input(vec![SpecError::new("restore", problem)])
        })?;
        spec = merge(&spec, m.0.spec.clone()).map_err(|e| AssemblyError::Input(vec![e]))?;
        manifest = Some(m);
    }
    spec.validate().map_err(AssemblyError::Input)?;

    let image = match crate::inputs::open_boot(&spec) {
        _ if spec.boot.firmware.is_some() => None,
        Ok(image) => Some(image),
        // A restored VM needs its kernel only when it is reset.
        Err(_) if manifest.is_some() => None,
        Err(errors) => {
            let errors = errors.iter().map(crate::inputs::spec_error).collect();
            return Err(AssemblyError::Input(errors));
        }
    };
    let (engine, why) = engines::choose(spec.engine);
    let cpuid = match &manifest {
        Some(m) => {
            let cpuid = m.cpuid();
            engines::can_continue(engine, &cpuid)
                .map_err(|e| AssemblyError::Input(vec![SpecError::new("restore", e)]))?;
            cpuid
        }
        None => {
            let mut cpuid = engines::guest_cpuid(engine, &spec.cpu_model, spec.cpus)
                .map_err(|e| AssemblyError::Input(vec![SpecError::new("cpu_model", e)]))?;
            if spec.boot.firmware.is_some() {
                crate::firmware::limit_cpuid(&mut cpuid, spec.memory_bytes);
            }
            cpuid
        }
    };
    let (sender, events) = run::queue();
    let guest = GuestRequests::new(sender.clone());
    let from_console = sender.clone();
    let console = Console::new(
        spec.console != ConsoleKind::None,
        Box::new(move |what| {
            // A driver that is gone needs no events.
            let _ = from_console.send(Event::Panic(what));
        }),
    );
    let machine = Machine::build(&spec, engine, cpuid, console.clone(), guest.clone())?;
    if let Some((columns, rows)) = hello.terminal_size {
        console.resize(columns, rows);
    }
    console.serve(stream).context("console")?;
    run::hear_front(from, sender.clone())?;
    let control = control.try_clone().context("control socket")?;
    let engine: (&'static str, String) = (Engine::name(engine), why);
    tracing::info!(engine = engine.0, why = engine.1, "assembled");
    let guest: Arc<GuestRequests> = guest;
    Ok((
        Driver {
            spec,
            machine,
            image,
            guest,
            control,
            events,
            sender,
            engine,
        },
        console,
    ))
}
