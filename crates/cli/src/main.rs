//! The pyrite executable.
//!
//! `pyrite run` is the front process: it owns the terminal and starts `pyrite vmm`, the process of
//! one VM.

mod args;
mod ctl;
mod doctor;
mod escape;
mod exit;
mod firmware;
mod front;
mod image;
mod log;
mod net;
mod profile;
mod screen;
mod share;
mod signals;
mod stock;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use pyrite_api::v1::{ConsoleKind, VmSpec};

use crate::args::{Cli, Command, RunArgs};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let code = match cli.command {
        Command::Run(args) => run(&args),
        Command::Ctl(args) => ctl::run(args),
        Command::Profile(args) => profile::run(&args),
        Command::Screenshot(args) => screen::screenshot(&args),
        Command::Type(args) => screen::type_text(&args),
        Command::Key(args) => screen::key(&args),
        Command::Switch(args) => net::switch(&args),
        Command::Image(args) => image::run(args),
        Command::Doctor => doctor::run(),
        Command::Vmm => vmm(),
    };
    // A panic hook may have been installed; nothing else is left to put back.
    terminal::restore();
    ExitCode::from(code)
}

fn complain(text: &str) -> u8 {
    eprintln!("pyrite: {text}");
    exit::BAD_INPUT
}

fn run(args: &RunArgs) -> u8 {
    let filter = match log::parse_filter(&args.log) {
        Ok(f) => f,
        Err(e) => return complain(&e),
    };
    log::start(filter, false);
    let mut spec = args.spec();
    let boots_firmware = spec.boot.firmware.is_some();
    if args.kernel.is_none() && args.restore.is_none() && !boots_firmware {
        // What is wrong with the other options is said before anything is fetched.
        let mut without = spec.clone();
        without.boot.kernel = "stock".into();
        if let Some(errors) = errors_of(&without, false) {
            return complain(&errors);
        }
        match stock::guest() {
            Ok(guest) => guest.fill(&mut spec, args.console.is_some()),
            Err(e) => {
                eprintln!("pyrite: {e:#}");
                return exit::BAD_INPUT;
            }
        }
    }
    let boots_kernel = spec.restore.is_none() && !boots_firmware;
    if spec.boot.append.is_empty() && args.append.is_none() && boots_kernel {
        // Without a word from the user the kernel should talk to the console that there is.
        spec.boot.append = match spec.console {
            ConsoleKind::Serial => "console=ttyS0".into(),
            ConsoleKind::Virtio => "console=hvc0".into(),
            ConsoleKind::None => String::new(),
        };
    }
    if let Some(errors) = errors_of(&spec, true) {
        return complain(&errors);
    }
    match front::run(spec, &args.log, args.control.as_deref()) {
        Ok(code) => code,
        Err(e) => {
            terminal::restore();
            eprintln!("pyrite: {e:#}");
            exit::FAILED
        }
    }
}

/// Everything that is wrong with a specification, in the words of the command line.
fn errors_of(spec: &VmSpec, with_boot: bool) -> Option<String> {
    let mut errors = spec.validate().err().unwrap_or_default();
    if errors.is_empty() {
        errors = pyrite_vmm::inputs::check(spec, with_boot);
    }
    (!errors.is_empty()).then(|| {
        errors
            .iter()
            .map(args::describe)
            .collect::<Vec<_>>()
            .join("\n        ")
    })
}

fn vmm() -> u8 {
    let var = |name| std::env::var(name).unwrap_or_default();
    let filter = log::parse_filter(&var(log::FILTER_VAR)).unwrap_or_default();
    log::start(filter, var(log::RAW_VAR) == "1");
    match pyrite_vmm::process::serve_standard_streams() {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("pyrite vmm: {e:#}\nThis command is started by pyrite run.");
            exit::FAILED
        }
    }
}
