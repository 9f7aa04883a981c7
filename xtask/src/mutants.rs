//! `cargo xtask mutants [NAME ..]`: breaks the code in ways in which it was broken, and demands
//! that a test fails. The mutants of orderings are in the models (`MMUN_MUTANT`).
//!
//! It works in a copy below `target`, so the tree stays as it is. `cargo xtask tidy` checks that
//! what each mutant replaces is still there.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// One way to break the code.
struct Mutant {
    name: &'static str,
    file: &'static str,
    /// What it replaces, which stands there once.
    from: &'static str,
    to: &'static str,
    /// The arguments of `cargo test` that must fail then, in words.
    test: &'static str,
}

const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "unreadable-proc-means-ended",
        file: "crates/mmu-source/src/process/tracer/family.rs",
        from: "        let pid = family.process.unwrap_or(tid);",
        to: "        let Some(pid) = family.process else { self.parked.remove(&tid); return Ok(()) };",
        test: "-p mmu-source --test it killed_while_it_forks_leaves_no_child_behind_without_proc",
    },
    Mutant {
        name: "exit-stops-while-attaching",
        file: "crates/mmu-source/src/process/tracer/attach.rs",
        from: " & !libc::PTRACE_O_TRACEEXIT,",
        to: ",",
        test: "-p mmu-source --test it again_and_again",
    },
    Mutant {
        name: "no-exit-stops-after-attaching",
        file: "crates/mmu-source/src/process/tracer.rs",
        from: "if !mem::replace(&mut tracee.stops_at_exit, true) {",
        to: "if false {",
        test: "-p mmu-source --test it leaves_its_memory_before_it_ends",
    },
    Mutant {
        name: "letting-go-waits-for-vfork",
        file: "crates/mmu-source/src/process/tracer/detach.rs",
        from: "waited < DISK || rest.any(|(tid, _)| !sleeps_deep(*tid))",
        to: "waited < DISK || rest.any(|(tid, _)| sleeps_deep(*tid) || true)",
        test: "-p mmu-source --test it a_parent_that_waits_in_vfork",
    },
    Mutant {
        name: "letting-go-without-a-deadline",
        file: "crates/mmu-source/src/process/tracer/detach.rs",
        from: "begun.elapsed() < PATIENCE\n            && self",
        to: "self",
        test: "-p mmu-source --lib letting_go_ends",
    },
    Mutant {
        name: "a-second-pass-is-freed-in-its-bracket",
        file: "crates/mmu-notifier/src/interval/finish.rs",
        from: "        unsafe { mm.subscriptions().srcu().call_raw_dropping(head, free) };",
        to: "        unsafe { free(head) };",
        test: "-p mmu-source --test hook a_second_pass_runs_in_the_middle_of_free",
    },
    Mutant {
        name: "a-missing-answer-is-no-skipped-run",
        file: "crates/mmu-source/src/kernel/machine.rs",
        from: "session.ask(Request::Missed, None),",
        to: "session.ask(Request::Missed, None).or(Some(0)),",
        test: "-p mmu-source --lib without_its_broker",
    },
    Mutant {
        name: "a-nested-miss-allocates-a-table",
        file: "crates/regcache/src/miss.rs",
        from: "            if past.is_nested {\n                // Perhaps",
        to: "            if false {\n                // Perhaps",
        test: "-p regcache --test it a_nested_request_that_needs_a_larger_table",
    },
    Mutant {
        name: "a-wait-interrupts-itself",
        file: "crates/mmu-source/src/kernel/wait.rs",
        from: "let mut locked = self.lock().ok_or(Error::InCallback { source: \"kernel\" })?;",
        to: "let mut locked = self.lock().unwrap();",
        test: "-p mmu-source --lib a_wait_that_has_interrupted",
    },
];

pub(crate) fn run(root: &Path, names: &[&str]) -> ExitCode {
    if let Some(unknown) = names
        .iter()
        .find(|name| MUTANTS.iter().all(|mutant| mutant.name != **name))
    {
        eprintln!("there is no mutant {unknown}");
        return ExitCode::from(2);
    }
    let tree = root.join("target/mutants/tree");
    copy(root, &tree);
    let mut survivors = 0;
    for mutant in MUTANTS
        .iter()
        .filter(|mutant| names.is_empty() || names.contains(&mutant.name))
    {
        let path = tree.join(mutant.file);
        let text = fs::read_to_string(&path).expect("tidy has found it");
        let passes_whole = passes(&tree, mutant.test);
        fs::write(&path, text.replacen(mutant.from, mutant.to, 1))
            .expect("the copy can be changed");
        let verdict = match (passes_whole, passes(&tree, mutant.test)) {
            (true, false) => "caught",
            (true, true) => "SURVIVES",
            (false, _) => "ITS TEST FAILS WITHOUT IT",
        };
        fs::write(&path, text).expect("the copy can be changed");
        println!("{}: {verdict}", mutant.name);
        survivors += u32::from(verdict != "caught");
    }
    if survivors == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Tells of each mutant that replaces what does not stand there once.
pub(crate) fn tidy(root: &Path, complaints: &mut Vec<String>) {
    for Mutant {
        name, file, from, ..
    } in MUTANTS
    {
        let text = fs::read_to_string(root.join(file)).unwrap_or_default();
        let count = text.matches(from).count();
        if count != 1 {
            complaints.push(format!(
                "xtask/src/mutants.rs: what {name} replaces stands {count} times in {file}"
            ));
        }
    }
}

/// Copies what git knows. A file that has not changed keeps its time, so Cargo builds little.
fn copy(root: &Path, tree: &Path) {
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .expect("git lists files");
    let listed = String::from_utf8(listed.stdout).expect("names are text");
    for name in listed.split_terminator('\0') {
        let (from, to) = (root.join(name), tree.join(name));
        // A link, or a file that was removed and is still known.
        let Ok(new) = fs::read(&from) else { continue };
        if fs::read(&to).is_ok_and(|old| old == new) {
            continue;
        }
        fs::create_dir_all(to.parent().expect("it is in a folder")).expect("a folder for the copy");
        fs::write(&to, new).expect("a copy");
    }
}

/// Runs a test. One that does not end is killed, as a failure.
fn passes(tree: &Path, test: &str) -> bool {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=10", "900", "cargo", "test", "--quiet"])
        .args(test.split_whitespace());
    command
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", tree.with_file_name("build"));
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.expect("`timeout` of coreutils runs").success()
}
