//! `cargo xtask mutants [NAME ..]`: puts known faults into the code, one at a time, and checks that
//! a test or a run of `stress` finds each. The mutants of memory orderings are not here, but in the
//! models, which read `MMUN_MUTANT`.
//!
//! The command works in a copy of the sources below `target`, so the sources do not change.
//! `cargo xtask tidy` checks that the text which each mutant replaces still exists.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// One way to break the code.
struct Mutant {
    name: &'static str,
    file: &'static str,
    /// The text that the mutant replaces. It must occur exactly once in the file.
    from: &'static str,
    to: &'static str,
    /// The arguments of the `cargo test` that must fail with the mutant. If the text begins with
    /// [`HUNT`], the rest are the arguments of `stress`, which must find a fault.
    test: &'static str,
}

const HUNT: &str = "stress ";

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
        name: "letting-go-waits-for-the-frozen",
        file: "crates/mmu-source/src/process/tracer/detach.rs",
        from: "let sleeps_deep = |tid| proc::state(tid) == Some(b'D');",
        to: "let sleeps_deep = |tid| proc::state(tid) == Some(b'X');",
        test: "-p mmu-source --test it a_process_that_is_frozen",
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
        file: "crates/mmu-notifier/src/mm/intervals/finish.rs",
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
        name: "a-machine-in-vain-is-made-again",
        file: "crates/mmu-source/src/kernel/machine.rs",
        from: "if !self.has_b() && !self.is_vain {",
        to: "if !self.has_b() {",
        test: "-p mmu-source --lib one_machine_for_a_flood",
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
    Mutant {
        name: "the-window-closes-after-the-ends",
        file: "crates/mmu-notifier/src/mm/bracket.rs",
        from: "        close(range.mm, window);\n    }\n    subscribers.end(range);",
        to: "        subscribers.end(range);\n        return close(range.mm, window);\n    }\n    subscribers.end(range);",
        test: "-p mmu-notifier --test it",
    },
    Mutant {
        name: "a-removed-insert-stays-counted",
        file: "crates/mmu-notifier/src/mm/intervals.rs",
        from: "            state.deferred_inserts -= 1;\n        }\n        let surplus",
        to: "        }\n        let surplus",
        test: "-p mmu-notifier --lib interval",
    },
    Mutant {
        name: "a-drain-looks-once",
        file: "crates/mmu-notifier/src/subsystem.rs",
        from: "while !self.pending().is_idle() {",
        to: "if !self.pending().is_idle() {",
        test: "-p mmu-notifier --test it s_88",
    },
    Mutant {
        name: "one-wake-up-is-enough",
        file: "crates/mmu-notifier/src/mm/intervals.rs",
        from: "while state.invalidate_seq == seq {",
        to: "if state.invalidate_seq == seq {",
        test: "-p mmu-notifier --lib interval",
    },
    Mutant {
        name: "a-watch-overlooks-what-lies-in-the-ring",
        file: "crates/mmu-source/src/kernel/ring.rs",
        from: "is_elsewhere &= number <= base || !event.overlaps(range);",
        to: "let _ = (event, base, range, &mut is_elsewhere);",
        test: "stress kernel --seconds 50",
    },
    Mutant {
        name: "what-was-lost-stays-in-the-ring",
        file: "crates/mmu-source/src/kernel/intake.rs",
        from: "while let Some(record) = self.ring.pop(words.position) {",
        to: "while let Some(record) = None::<Record> {",
        test: "-p mmu-source --test it a_full_ring_is_a_loss",
    },
    Mutant {
        name: "libfabric-is-expected-to-unsubscribe",
        file: "crates/dropin/src/ranges.rs",
        from: "if verdict == Verdict::Valid || entry.count > 1 {",
        to: "if verdict == Verdict::Valid || entry.count > 0 {",
        test: "-p mmun-dropin --test it memory_that_is_registered_anew",
    },
    Mutant {
        name: "a-miss-of-ucx-does-not-wait",
        file: "crates/dropin/src/space.rs",
        from: ".map_or(true, |kernel| kernel.wait_for_changes().is_ok())",
        to: ".map_or(true, |_| true)",
        test: "-p mmun-dropin --test it a_registration_during_a_change_that_only",
    },
    Mutant {
        name: "late-changes-are-forgotten",
        file: "crates/dropin/src/late.rs",
        from: "        let list = list();\n        if list.is_empty() {",
        to: "        if list().is_empty() {",
        test: "-p mmun-dropin --lib a_change_that_comes_while",
    },
    Mutant {
        name: "a-fork-takes-no-lock-of-ucx",
        file: "crates/dropin/src/ucx/fork.rs",
        from: "caches::take_locks(end);",
        to: "let _ = caches::take_locks;",
        test: "-p mmun-dropin --test it children_that_look_up_end",
    },
    // Each of the following mutants removes one premise of the kernel source's wait
    // (`kernel/wait.rs`).
    Mutant {
        name: "the-count-of-the-older-machine",
        file: "crates/mmu-source/src/kernel/machine.rs",
        from: "let is_shown = self.keeper.show_b(made.as_fd());",
        to: "let is_shown = self.keeper.show_b(live.a.as_fd());",
        test: "stress kernel --seconds 50 --slow",
    },
    Mutant {
        name: "one-machine",
        file: "crates/mmu-source/src/kernel/machine.rs",
        from: "let made = create_vm(&live.kvm)?;",
        to: "let made = live.a.try_clone().map_err(|error| kernel_error(\"dup\", error))?;",
        test: "stress kernel --seconds 50 --slow",
    },
    Mutant {
        name: "the-count-before-the-generation",
        file: "crates/mmu-source/src/kernel/armed.rs",
        from: "        self.wait_for(settled)?;\n        Ok(ReadSeq(settled))",
        to: "        self.wait_for(settled)?;\n        Ok(ReadSeq(self.settle()?))",
        test: "stress kernel --seconds 50 --slow",
    },
    Mutant {
        name: "every-mark-is-the-callers",
        file: "crates/mmu-source/src/kernel/wait.rs",
        from: " && MARK.get() == dirty",
        to: "",
        test: "-p mmu-source --test it a_thread_waits_for_the_changes_of_others",
    },
    Mutant {
        name: "looks-without-the-machine-that-follows",
        file: "crates/mmu-source/src/kernel/wait.rs",
        from: "if !self.is_over(state, header) {",
        to: "if !self.is_over(state, header) && !self.has_b() {",
        test: "stress kernel --seconds 50 --slow-one",
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
        let whole = run_test(&tree, mutant.test);
        fs::write(&path, text.replacen(mutant.from, mutant.to, 1))
            .expect("the copy can be changed");
        let broken = run_test(&tree, mutant.test);
        fs::write(&path, text).expect("the copy can be changed");
        let (is_caught, verdict) = match (whole, broken) {
            (Outcome::Passes, Outcome::Fails) => (true, "caught"),
            (Outcome::Passes, Outcome::DoesNotEnd) => (true, "caught, by a test that does not end"),
            (Outcome::Passes, Outcome::Passes) => (false, "SURVIVES"),
            (Outcome::Passes, Outcome::DoesNotCompile) => (false, "DOES NOT COMPILE"),
            _ => (false, "ITS TEST FAILS WITHOUT IT"),
        };
        println!("{}: {verdict}", mutant.name);
        survivors += u32::from(!is_caught);
    }
    if survivors == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Complains about each mutant whose text does not occur exactly once in its file.
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

/// Copies the files that git knows or would add, and removes all others from the copy. An unchanged
/// file keeps its modification time, so Cargo rebuilds little.
fn copy(root: &Path, tree: &Path) {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others"])
        .arg("--exclude-standard")
        .current_dir(root)
        .output()
        .expect("git lists files");
    assert!(listed.status.success(), "git lists no files");
    let listed = String::from_utf8(listed.stdout).expect("names are text");
    let mut copied = HashSet::new();
    for name in listed.split_terminator('\0') {
        let (from, to) = (root.join(name), tree.join(name));
        // Skips a link to a folder, and a file that was removed but that git still lists.
        let Ok(new) = fs::read(&from) else { continue };
        copied.insert(to.clone());
        if fs::read(&to).is_ok_and(|old| old == new) {
            continue;
        }
        fs::create_dir_all(to.parent().expect("it is in a folder")).expect("a folder for the copy");
        fs::write(&to, new).expect("a copy");
    }
    remove_others(tree, &copied);
}

/// Removes all files below `folder` except those in `kept`, and then the empty folders.
fn remove_others(folder: &Path, kept: &HashSet<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the copy can be read") {
        let entry = entry.expect("the copy can be read");
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_others(&path, kept);
            // Fails if the folder is not empty. Then the folder stays.
            let _ = fs::remove_dir(&path);
        } else if !kept.contains(&path) {
            fs::remove_file(&path).expect("the copy can be changed");
        }
    }
}

/// The outcome of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passes,
    Fails,
    DoesNotCompile,
    /// The test was killed after 15 minutes.
    DoesNotEnd,
}

fn run_test(tree: &Path, test: &str) -> Outcome {
    let run = |words: String| {
        let mut words = words.split_whitespace();
        let mut command = Command::new(words.next().expect("a program"));
        // With `MMUN_REQUIRE`, a test that would be skipped fails, because a skipped test catches
        // no mutant.
        command
            .args(words)
            .current_dir(tree)
            .env("MMUN_REQUIRE", "all")
            .env("CARGO_TARGET_DIR", tree.with_file_name("build"));
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.expect("cargo, and `timeout` of coreutils, run")
    };
    let (build, test) = if test.starts_with(HUNT) {
        let build = "cargo build --quiet --release -p stress".to_owned();
        let program = tree.with_file_name("build/release");
        (build, format!("{}/{test}", program.display()))
    } else {
        let build = format!("cargo test --quiet --no-run {test}");
        (build, format!("cargo test --quiet {test}"))
    };
    if !run(build).success() {
        return Outcome::DoesNotCompile;
    }
    match run(format!("timeout --kill-after=10 900 {test}")).code() {
        Some(0) => Outcome::Passes,
        // `timeout` exits with 124. If it has to send SIGKILL, this signal kills `timeout` as well.
        Some(124 | 137) | None => Outcome::DoesNotEnd,
        Some(_) => Outcome::Fails,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_has_new_files_and_none_that_are_gone() {
        if Command::new("git").arg("--version").output().is_err() {
            println!("SKIP the_copy_has_new_files_and_none_that_are_gone: git is not installed");
            return;
        }
        let room = std::env::temp_dir().join(format!("mutants-{}", std::process::id()));
        let (root, tree) = (room.join("root"), room.join("tree"));
        fs::create_dir_all(root.join("a")).unwrap();
        let init = Command::new("git")
            .args(["init", "--quiet"])
            .arg(&root)
            .status();
        assert!(init.unwrap().success());
        for (name, text) in [(".gitignore", "built\n"), ("a/new", "1"), ("built", "2")] {
            fs::write(root.join(name), text).unwrap();
        }
        copy(&root, &tree);
        assert_eq!(fs::read_to_string(tree.join("a/new")).unwrap(), "1");
        assert!(!tree.join("built").exists());
        fs::remove_dir_all(root.join("a")).unwrap();
        copy(&root, &tree);
        assert!(!tree.join("a").exists() && tree.join(".gitignore").exists());
        fs::remove_dir_all(room).unwrap();
    }
}
