//! Prints the directory of a guest (`vmlinuz`, `initrd.img`) with the drivers of every storage
//! controller, made if need be: Debian's standard kernel with a busybox.

fn main() -> std::process::ExitCode {
    match pyrite_tests::fixtures::storage_guest() {
        Ok(guest) => {
            let dir = guest.kernel.parent().unwrap_or(&guest.kernel);
            println!("{}", dir.display());
            std::process::ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("no guest: {why}");
            std::process::ExitCode::FAILURE
        }
    }
}
