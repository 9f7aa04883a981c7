//! What the library writes, and how the process ends then.

use crate::cache::has_kernel;
use crate::support::{Once, text};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A name for a file of this test.
fn scratch(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()))
}

#[test]
fn a_write_that_fails_does_not_end_the_program() {
    for library in ["ucx", "libfabric"] {
        let file = scratch(&format!("small-{library}"));
        let Some(once) = Once::built(library) else {
            return;
        };
        // The report is longer than the limit allows.
        let output = once.run(&["small"], |command| {
            command.env("MMUN", "hook").env("MMUN_REPORT", &file);
        });
        let error = text(&output.stderr);
        assert!(output.status.success(), "{:?} {error}", output.status);
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains("File too large"), "{error}");
        std::fs::remove_file(&file).unwrap();
        // A complaint, and the report.
        let output = once.run(&["gone"], |command| {
            command.env("MMUN", "nonsense").env("MMUN_REPORT", "-");
        });
        assert!(output.status.success(), "{:?}", output.status);
        assert_eq!(text(&output.stdout), "done\n");
    }
}

#[test]
fn a_fifo_without_a_reader_or_with_an_idle_one_is_given_up() {
    let Some(once) = Once::built("libfabric") else {
        return;
    };
    let fifo = scratch("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let said = || {
        let output = once.run(&[], |command| {
            command.env("MMUN", "hook").env("MMUN_REPORT", &fifo);
        });
        assert!(output.status.success(), "{:?}", output.status);
        text(&output.stderr)
    };
    let error = said();
    assert!(error.contains("no process reads this FIFO"), "{error}");
    // Opened for both, this process is a reader, which reads nothing; it fills the FIFO.
    let mut both = std::fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&fifo)
        .unwrap();
    while both.write(&[0; 4096]).is_ok() {}
    let error = said();
    assert!(error.contains("its reader reads nothing"), "{error}");
    std::fs::remove_file(&fifo).unwrap();
}

#[test]
fn only_the_folder_of_mmun_run_may_be_gone() {
    let Some(once) = Once::built("libfabric") else {
        return;
    };
    for (name, lines) in [("mmun-run-gone", 0), ("gone", 1)] {
        let output = once.run(&[], |command| {
            let folder = format!("{}/", scratch(name).display());
            command.env("MMUN", "hook").env("MMUN_REPORT", folder);
        });
        let error = text(&output.stderr);
        assert!(output.status.success(), "{:?}", output.status);
        assert_eq!(error.lines().count(), lines, "{name}: {error}");
    }
}

#[test]
fn a_program_that_executes_another_one_is_missed_in_the_reports() {
    let Some(once) = Once::built("libfabric") else {
        return;
    };
    let folder = scratch("executed");
    std::fs::create_dir(&folder).unwrap();
    let output = once.run(&["exec"], |command| {
        let folder = format!("{}/", folder.display());
        command.env("MMUN", "hook").env("MMUN_REPORT", folder);
    });
    assert_eq!(text(&output.stdout), "done\n", "{output:?}");
    let files = std::fs::read_dir(&folder).unwrap();
    let reports = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
    let mut silent: Vec<bool> = reports
        .map(|report| report.contains("\n  no report: "))
        .collect();
    silent.sort_unstable();
    assert_eq!(silent, [false, true]);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// The exit status and standard error of a strict process.
fn strict(once: &Once, how: &[&str], source: &str) -> (Option<i32>, String, String) {
    let output = once.run(how, |command| {
        command.env("MMUN", source).env("MMUN_STRICT", "1");
    });
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    (output.status.code(), out, error)
}

#[test]
fn strict_refuses_every_process_that_is_not_protected() {
    for library in ["ucx", "libfabric"] {
        let Some(once) = Once::built(library) else {
            return;
        };
        let (code, _, error) = strict(&once, &[], "off");
        assert_eq!(code, Some(125), "{error}");
        assert_eq!(
            error,
            "mmun: MMUN_STRICT=1 and MMUN=off protects no process\n"
        );
        if !has_kernel() {
            continue;
        }
        let (code, out, error) = strict(&once, &[], "both");
        assert_eq!((code, out.as_str()), (Some(0), "done\n"), "{error}");
        // The hook source cannot run. libfabric starts the sources with its first cache, which the
        // stand-in has not.
        let (code, out, error) = strict(&once, &["mdwe"], "both");
        if library == "ucx" && out != "no mdwe\n" {
            assert_eq!(code, Some(125), "{error}");
            assert!(
                error.contains("one source does not work: hook: "),
                "{error}"
            );
        }
    }
}

#[test]
fn strict_refuses_a_child_at_its_first_use_and_not_at_the_fork() {
    let Some(once) = Once::built("ucx").filter(|_| has_kernel()) else {
        return;
    };
    for (how, child) in [(&["fork"][..], 7), (&["fork", "serve"], 125)] {
        let (code, out, error) = strict(&once, how, "both");
        let expected = format!("child {child}\ndone\n");
        assert_eq!((code, out), (Some(0), expected), "{error}");
    }
}

#[test]
fn a_library_that_is_used_past_the_drop_in_is_named() {
    for (library, file) in [("ucx", "libucs"), ("libfabric", "libfabric")] {
        let Some(once) = Once::built(library) else {
            return;
        };
        let report = |how: &[&str], source: &str| {
            let output = once.run(how, |command| {
                command.env("MMUN", source).env("MMUN_REPORT", "-");
            });
            text(&output.stderr)
        };
        let line = format!("  unseen    {file} is loaded, and no call of it came through");
        for how in ["past", "unused"] {
            let said = report(&[how], "hook");
            assert!(said.contains(&line), "{library} {how}: {said}");
            assert_eq!(said.lines().count(), 2, "{said}");
            assert_eq!(report(&[how], "off"), "", "{library} {how}");
        }
        let said = report(&[], "hook");
        assert!(said.contains(" protected"), "{said}");
        assert!(!said.contains(&line), "{said}");
    }
    let once = Once::built("ucx").expect("it was built");
    let output = once.run(&[], |command| {
        command.env("MMUN", "hook").env("MMUN_REPORT", "-");
    });
    let said = text(&output.stderr);
    assert!(
        said.contains("no look-up came through the drop-in"),
        "{said}"
    );
}

#[test]
fn a_library_that_is_not_protected_has_no_count_of_reports() {
    let Some(once) = Once::built("ucx").filter(|_| has_kernel()) else {
        return;
    };
    let output = once.run(&["mdwe"], |command| {
        command.env("MMUN", "both").env("MMUN_REPORT", "-");
    });
    let said = text(&output.stderr);
    if text(&output.stdout) != "no mdwe\n" {
        assert!(said.contains("UCX       not protected: "), "{said}");
        assert!(!said.contains("look-ups are"), "{said}");
    }
}

/// Up to UCX 1.16, a report by a thread that does not look up races with UCP's look-ups.
#[test]
fn ucx_that_looks_up_without_a_lock_is_told_by_the_thread_that_looks_up() {
    let Some(once) = Once::built("ucx").filter(|_| has_kernel()) else {
        return;
    };
    let said = |minor: &str| {
        let output = once.run(&["late"], |command| {
            command.env("MMUN", "kernel").env("STAND_IN_UCX", minor);
        });
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    for minor in ["14", "16"] {
        let out = said(minor);
        assert_eq!(out, "0 by 0, null after reports, found\ndone\n", "{minor}");
    }
    let out = said("17");
    assert!(out.contains("after reports, found\n"), "{out}");
    assert!(
        !out.starts_with("0 by 0"),
        "the source's thread reports: {out}"
    );
}
