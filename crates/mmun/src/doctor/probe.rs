//! One source at a time.

use std::fs;
use std::sync::atomic::AtomicBool;

use mmu_notifier::MmWithUser;
use mmu_source::process::{Command, Observer, Options, Task, Tracer};

use super::Lack;
use crate::source::Source;

/// What a source lacks here, if anything, and what it found.
pub(super) fn probe(source: Source) -> (Option<Lack>, Vec<String>) {
    match source {
        Source::Process => process(),
        _ => (Some(Lack { missing: format!("{} is not part of this build", source.name()), remedy: None }), Vec::new()),
    }
}

/// Traces a program that ends at once.
fn process() -> (Option<Lack>, Vec<String>) {
    // It says its version to nobody; to us, if even that cannot be opened.
    let null = fs::File::options().write(true).open("/dev/null");
    let mut program = Command::new("/proc/self/exe").arg("--version");
    if let Ok(null) = null {
        program = program.stdout(null);
    }
    let traced = || {
        let mut tracer = Tracer::new(Options::default(), Nobody)?;
        tracer.spawn(program)?;
        tracer.run(&AtomicBool::new(false)).map(drop)
    };
    let lack = traced().err().map(|error| Lack { missing: crate::explain(&error), remedy: None });
    let mut features = Vec::new();
    if lack.is_none() {
        features.push("ptrace".to_owned());
    }
    match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) => features.push(format!("ptrace_scope={}", scope.trim())),
        Err(_) => features.push("no-ptrace_scope".to_owned()),
    }
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    for action in ["trace", "user_notif"] {
        if actions.split_whitespace().any(|word| word == action) {
            features.push(format!("seccomp={action}"));
        }
    }
    (lack, features)
}

struct Nobody;

impl Observer for Nobody {
    type Held = ();
    fn enter(&mut self, _: Task, _: &MmWithUser) {}
    fn leave(&mut self, _: Task, (): ()) {}
}
