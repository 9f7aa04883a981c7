//! Probes the sources, one at a time.

use std::fs;
use std::sync::atomic::AtomicBool;

use mmu_notifier::MmWithUser;
use mmu_source::Error;
use mmu_source::process::{Command, Observer, Options, Task, Tracer, proc_is_foreign};

use super::{Lack, remedy};
use crate::source::Source;
use crate::sys;

/// Returns what a source lacks here, if anything, and the features that it found.
pub(super) fn probe(source: Source) -> (Vec<Lack>, Vec<String>) {
    match source {
        Source::Kernel => kernel(),
        Source::Hook => hook(),
        Source::Uffd => uffd(),
        Source::Process => process(),
    }
}

/// Lists the features that exist, even if others are missing.
fn kernel() -> (Vec<Lack>, Vec<String>) {
    let mut features = Vec::new();
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => features.push("kvm".to_owned()),
        Err(error) => features.push(format!("no-kvm ({})", crate::reason(&error))),
    }
    let tracing = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let event = "events/kvm/kvm_unmap_hva_range/id";
    match tracing
        .iter()
        .find(|folder| fs::exists(format!("{folder}/{event}")).unwrap_or(false))
    {
        Some(folder) => features.push(format!("tracefs={folder}")),
        None => features.push("no-tracefs".to_owned()),
    }
    if fs::exists("/sys/kernel/btf/vmlinux").unwrap_or(false) {
        features.push("btf".to_owned());
    }
    if let Ok(level) = fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled") {
        features.push(format!("unprivileged_bpf_disabled={}", level.trim()));
    }
    match mmu_source::kernel::probe_all() {
        Ok(found) => {
            features.push(format!("bpf={}", found.through));
            features.push(format!(
                "skipped-runs={}",
                if found.may_skip {
                    "told-within-a-second"
                } else {
                    "none"
                }
            ));
            (Vec::new(), features)
        }
        Err(errors) => (errors.iter().map(lack).collect(), features),
    }
}

fn hook() -> (Vec<Lack>, Vec<String>) {
    match mmu_source::hook::probe() {
        Ok(places) => {
            let mut names: Vec<&str> = places.iter().map(|place| place.name).collect();
            names.sort_unstable();
            names.dedup();
            let mut features = vec![format!("places={}", places.len())];
            features.extend(names.iter().map(|name| (*name).to_owned()));
            let overwritten = places
                .iter()
                .filter(|place| place.state == mmu_source::hook::State::Overwritten);
            features.extend(
                overwritten.map(|place| format!("overwritten={} in {}", place.name, place.module)),
            );
            (Vec::new(), features)
        }
        Err(error) => (vec![lack(&error)], Vec::new()),
    }
}

fn uffd() -> (Vec<Lack>, Vec<String>) {
    let mut features = Vec::new();
    if let Ok(allowed) = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") {
        features.push(format!("unprivileged_userfaultfd={}", allowed.trim()));
    }
    (
        mmu_source::uffd::probe().err().iter().map(lack).collect(),
        features,
    )
}

/// The lack that an error of a source names.
fn lack(error: &Error) -> Lack {
    match error {
        Error::Unavailable {
            source,
            missing,
            remedy,
            instead,
        } => remedy::lack(
            source,
            crate::without_number(missing),
            (remedy, instead.as_deref()),
        ),
        error => Lack {
            missing: crate::explain(error),
            remedy: None,
            instead: None,
            note: None,
        },
    }
}

/// Traces a program that ends at once.
fn process() -> (Vec<Lack>, Vec<String>) {
    // Discard the version that the program prints. If `/dev/null` cannot be opened, the
    // version is printed.
    let null = fs::File::options().write(true).open("/dev/null");
    let mut program = Command::new(sys::own_program()).arg("--version");
    if let Ok(null) = null {
        program = program.stdout(null);
    }
    let traced = || {
        let mut tracer = Tracer::new(Options::default(), Silent)?;
        tracer.spawn(program)?;
        tracer.run(&AtomicBool::new(false)).map(drop)
    };
    let lacks: Vec<Lack> = traced().err().iter().map(lack).collect();
    let mut features = Vec::new();
    if lacks.is_empty() {
        features.push("ptrace".to_owned());
    }
    if !fs::exists("/proc/self").unwrap_or(false) || proc_is_foreign() {
        features.push("no-proc (no -p; no names, details and stacks)".to_owned());
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
    (lacks, features)
}

struct Silent;

impl Observer for Silent {
    type Held = ();
    fn enter(&mut self, _: Task, _: &MmWithUser) {}
    fn leave(&mut self, _: Task, (): ()) {}
}
