//! Every ending has its exit code, on the software engine.

use std::process::Command;
use std::time::Duration;

use pyrite_tests::{Scratch, Session, guest, pyrite};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a guest's code; exit code, output, standard error.
fn run(name: &str, code: &[u8], options: &[&str]) -> (i32, String, String) {
    let dir = Scratch::new(name);
    let kernel = dir.file("kernel", &guest::pvh(code));
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M", "--kernel",
    ]);
    command.arg(&kernel).args(options);
    Session::start(&mut command).end(LIMIT)
}

#[test]
fn power_off_is_0() {
    let code = [guest::print("bye\n"), guest::power_off()].concat();
    let (code, output, errors) = run("power-off", &code, &[]);
    assert_eq!((code, output.as_str()), (0, "bye\n"), "{errors}");
}

#[test]
fn debug_exit_passes_through() {
    // As other machines with this port do: twice the value and one.
    let code = [&guest::out8(0xf4, 42)[..], &guest::HALT].concat();
    assert_eq!(run("debug-exit", &code, &[]).0, 85);
}

#[test]
fn triple_fault_with_no_reboot_is_3() {
    // ud2 without an IDT.
    let (code, _, errors) = run("triple", &[0x0f, 0x0b], &["--no-reboot"]);
    assert_eq!(code, 3, "{errors}");
    assert!(errors.contains("triple fault"), "{errors}");
}

#[test]
fn kernel_panic_is_3_and_reported() {
    let text = "[    1.000000] Kernel panic - not syncing: out of ideas\n";
    let code = [&guest::print(text)[..], &guest::HALT].concat();
    let (code, _, errors) = run("panic", &code, &[]);
    assert_eq!(code, 3, "{errors}");
    assert!(
        errors.contains("Kernel panic - not syncing: out of ideas"),
        "{errors}"
    );
}

#[test]
fn reset_loop_is_4() {
    let (code, output, errors) = run(
        "loop",
        &[
            guest::print("x"),
            guest::out8(0xcf9, 6),
            guest::HALT.to_vec(),
        ]
        .concat(),
        &[],
    );
    assert_eq!(code, 4, "{errors}");
    assert_eq!(output, "xxxxxx");
}

#[test]
fn triple_fault_loop_is_4() {
    assert_eq!(run("triple-loop", &[0x0f, 0x0b], &[]).0, 4);
}

#[test]
fn reset_with_no_reboot_is_0() {
    let code = [&guest::out8(0xcf9, 6)[..], &guest::HALT].concat();
    assert_eq!(run("no-reboot", &code, &["--no-reboot"]).0, 0);
}

#[test]
fn time_limit_is_5_for_halted_and_spinning_guests() {
    assert_eq!(run("halted", &guest::HALT, &["--timeout", "1s"]).0, 5);
    assert_eq!(
        run(
            "spinning",
            &guest::SPIN,
            &["--timeout", "1s", "--cpus", "2"]
        )
        .0,
        5
    );
}

#[test]
fn guest_with_endless_output_can_be_ended() {
    // mov dx, 3f8; out dx, al; jmp
    let code = [0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
    assert_eq!(run("chatter", &code, &["--timeout", "1s"]).0, 5);
}
