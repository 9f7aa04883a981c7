//! What programs do that they should not: exceptions that leave callbacks.

use crate::support::{STRICT, compile, root};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

#[test]
fn an_exception_that_leaves_a_callback_ends_the_process() {
    let sources = [root().join("tests/cpp/throws.cpp")];
    let Some(program) = compile(
        "throws",
        "g++",
        &[&["-std=c++11", "-g"], STRICT].concat(),
        &sources,
    ) else {
        return;
    };
    for which in [
        "start",
        "end",
        "register",
        "deregister",
        "notifier",
        "interval",
    ] {
        let output = Command::new(&program)
            .arg(which)
            .output()
            .expect("the program runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGABRT),
            "{which}: {}\n{stderr}",
            output.status
        );
        assert!(
            stderr.contains("libmmun: ") && stderr.contains("exception"),
            "{which}:\n{stderr}"
        );
    }
}
