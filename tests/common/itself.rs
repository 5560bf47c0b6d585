//! How a test starts its own program again.
#![allow(dead_code, reason = "every test program uses its part")]

use std::ffi::OsString;
use std::process::Command;

/// Program and first arguments. Under `scripts/software-vulkan` the program that runs is the dynamic linker, and only the script can start
/// one as it was started.
pub fn words() -> Vec<OsString> {
    let program = std::env::args_os().next().unwrap();
    match std::env::var_os("SOFTWARE_VULKAN") {
        Some(script) => vec![script, "run".into(), program],
        None => vec![std::env::current_exe().unwrap().into()],
    }
}

pub fn command() -> Command {
    let words = words();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}
