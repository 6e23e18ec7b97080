//! Exit codes of `pyrite run`.

use pyrite_api::control::Ending;

/// The guest powered off.
pub const POWER_OFF: u8 = 0;
/// Wrong usage or a wrong file.
pub const BAD_INPUT: u8 = 2;
/// The guest crashed.
pub const CRASHED: u8 = 3;
/// The guest resets again and again.
pub const RESET_LOOP: u8 = 4;
/// The time limit has passed.
pub const TIME_LIMIT: u8 = 5;
/// The engine or the VM process failed.
pub const FAILED: u8 = 6;
/// The person at the terminal quit, or a signal asked to.
pub const QUIT: u8 = 130;

/// What `--help` says about them.
pub const HELP: &str = "\
Exit codes:
  0    the guest powered off (or reset, with --no-reboot)
  2    wrong usage, or a file that is missing, cut off or of another kind
  3    the guest crashed: kernel panic, or triple fault with --no-reboot
  4    reset loop: more than 5 resets in a row without 10 seconds between them
  5    the time of --timeout has passed
  6    the engine or the VM process failed
  130  ended from outside: Ctrl-A x, or a signal
  A guest that writes N to the debug-exit port ends the VM with code 2N+1.

Keys:
  Ctrl-A h help   Ctrl-A x quit   Ctrl-A b break   Ctrl-A r reset
  Ctrl-A p power button           Ctrl-A i inspect   Ctrl-A Ctrl-A sends Ctrl-A";

/// The exit code of an ending.
pub fn code(ending: &Ending) -> u8 {
    match ending {
        Ending::PowerOff | Ending::ResetStopped => POWER_OFF,
        Ending::Stopped => QUIT,
        Ending::DebugExit { code } => *code,
        Ending::Crashed { .. } => CRASHED,
        Ending::ResetLoop { .. } => RESET_LOOP,
        Ending::TimeLimit => TIME_LIMIT,
        Ending::BadInput { .. } => BAD_INPUT,
        Ending::Failed { .. } => FAILED,
    }
}

/// What to tell the person, if there is anything to tell.
pub fn message(ending: &Ending) -> Option<String> {
    match ending {
        Ending::PowerOff | Ending::Stopped | Ending::DebugExit { .. } => None,
        Ending::ResetStopped => Some("the guest reset the machine".into()),
        Ending::Crashed { reason } => Some(format!("the guest crashed: {reason}")),
        Ending::ResetLoop { count } => Some(format!(
            "reset loop: the guest was reset {count} times in a row; giving up"
        )),
        Ending::TimeLimit => Some("the time limit has passed".into()),
        Ending::BadInput { errors } => Some(
            errors
                .iter()
                .map(crate::args::describe)
                .collect::<Vec<_>>()
                .join("\n        "),
        ),
        Ending::Failed { reason } => Some(reason.clone()),
    }
}
