//! Real registration caches of UCX and libfabric, with an io_uring as the device.
//!
//! libfabric does not export its cache, so the program links Debian's `libfabric.a`. The archive
//! has the same code as the shared library, and its functions can be called without a network card.

use crate::support::{build, installed, library, output, preloaded, text};
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::{Cap, require};

/// The cache that a program uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    Ucx,
    Libfabric,
}

pub(crate) const ALL: [Cache; 2] = [Cache::Ucx, Cache::Libfabric];

/// Builds the program. `None` as for [`flags`].
pub(crate) fn program(cache: Cache) -> Option<PathBuf> {
    let flags = flags(cache)?;
    let variant = match cache {
        Cache::Ucx => "ucx",
        Cache::Libfabric => "libfabric",
    };
    build("gcc", "cache.c", variant, &flags)
}

/// The compiler's flags for the program. `None` if gcc, the library or io_uring is missing, or if
/// the program cannot use the cache of the installed version.
pub(crate) fn flags(cache: Cache) -> Option<Vec<&'static str>> {
    let (asks, version) = match cache {
        Cache::Ucx => ("ucx_info", Cap::Ucx),
        Cache::Libfabric => ("fi_info", Cap::Libfabric),
    };
    let needs = [
        Cap::Program("gcc"),
        Cap::Program(asks),
        version,
        Cap::IoUring,
    ];
    if !needs.into_iter().all(require) {
        return None;
    }
    match cache {
        // `-rdynamic` exports the program's functions: libucp calls the program's device.
        Cache::Ucx => Some(vec!["-rdynamic", "-DWITH_UCX", "-lucp", "-lucs", "-lucm"]),
        Cache::Libfabric => {
            assert!(
                installed("libfabric.a").exists(),
                "fi_info without libfabric-dev"
            );
            // `-rdynamic` exports the program's functions, so that the drop-in finds them as in a
            // shared library.
            let mut flags = vec!["-rdynamic", "-l:libfabric.a"];
            // The libraries by their names at run time: their development packages may be missing.
            let needs = [
                ("libpsm_infinipath.so.1", "-l:libpsm_infinipath.so.1"),
                ("libpsm2.so.2", "-l:libpsm2.so.2"),
                ("librdmacm.so.1", "-l:librdmacm.so.1"),
                ("libibverbs.so.1", "-l:libibverbs.so.1"),
                ("libefa.so.1", "-l:libefa.so.1"),
                ("libatomic.so.1", "-l:libatomic.so.1"),
            ];
            let is_installed = |(file, _): &(&str, &str)| installed(file).exists();
            flags.extend(needs.into_iter().filter(is_installed).map(|(_, flag)| flag));
            flags.push("-ldl");
            Some(flags)
        }
    }
}

/// Runs the program as shipped (`None`), or with the library and the sources `source`.
pub(crate) fn run(program: &Path, words: &[&str], source: Option<&str>) -> String {
    let mut command = Command::new(program);
    command.args(words);
    if let Some(source) = source {
        command.env("LD_PRELOAD", library()).env("MMUN", source);
    }
    let output = output(command);
    let out = text(&output.stdout);
    assert!(
        output.status.success(),
        "{words:?} {source:?}: {:?} {out}{}",
        output.status,
        text(&output.stderr)
    );
    out
}

/// The count before "stale of".
pub(crate) fn stale(out: &str) -> usize {
    let line = out
        .lines()
        .find(|line| line.contains(" stale of "))
        .expect("the last line");
    line.split(' ').next().unwrap().parse().unwrap()
}

pub(crate) fn has_kernel() -> bool {
    require(Cap::Kvm) && require(Cap::Bpf)
}

#[test]
fn nothing_is_stale_with_both_and_much_without() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        let shipped = stale(&run(&program, &["stale"], None));
        // The control: shows that the transfer detects stale registrations.
        assert!(shipped >= 6, "{cache:?}: {shipped}");
        let hook = stale(&run(&program, &["stale"], Some("hook")));
        assert!(
            hook < shipped,
            "{cache:?}: {hook} with hook, {shipped} without"
        );
        if has_kernel() {
            let out = run(&program, &["stale"], Some("both"));
            assert_eq!(stale(&out), 0, "{cache:?}: {out}");
        }
    }
}

#[test]
fn memory_that_is_registered_anew_is_found_again() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for source in [None, Some("hook"), Some("auto")] {
            let mut out = String::new();
            // A thread of the drop-in drops stale registrations, and can meet new ones. On a busy
            // machine it meets many of a run; without the mend none is found in any run.
            let is_found = (0..5).any(|_| {
                out = run(&program, &["again", "200"], source);
                let found: u32 = out.split(' ').next().unwrap().parse().unwrap();
                found > 50
            });
            assert!(is_found, "{cache:?} {source:?}: {out}");
        }
    }
}

/// The registration pins the old pages. As shipped, it is found for ever.
#[test]
fn a_registration_during_a_change_is_dropped() {
    if !require(Cap::Userfaultfd) {
        return;
    }
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        assert_eq!(run(&program, &["during"], None), "stale\n", "{cache:?}");
        for source in ["hook", "auto"] {
            let out = run(&program, &["during"], Some(source));
            assert_eq!(out, "right\n", "{cache:?} {source}");
        }
    }
}

/// The kernel is removing pages, which only the `kernel` source sees, when UCX registers one.
#[test]
fn a_registration_during_a_change_that_only_the_kernel_sees_is_of_the_new_pages() {
    let Some(program) = program(Cache::Ucx) else {
        return;
    };
    for source in [None, Some("hook")] {
        // The control: registrations are made while the pages are being removed.
        let out = run(&program, &["under", "90"], source);
        assert_eq!(out, "stale\n", "{source:?}");
    }
    if has_kernel() {
        assert_eq!(run(&program, &["under", "3"], Some("both")), "right\n");
    }
}

#[test]
fn a_program_that_closes_all_descriptors_is_served_on() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        if has_kernel() {
            assert_eq!(
                stale(&run(&program, &["close"], Some("both"))),
                0,
                "{cache:?}"
            );
        }
    }
}

#[test]
fn a_fork_and_close_range_in_the_middle_of_five_threads() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for source in ["hook", "auto"] {
            for _ in 0..runs(3) {
                let out = run(&program, &["middle"], Some(source));
                assert_eq!(out, "child right\nparent right\n", "{cache:?} {source}");
            }
        }
    }
}

/// UCX's cache has a spin lock, which another thread may hold at the fork. So the drop-in must not
/// call UCX in the child's fork: a child that executes another program would hang before that.
#[test]
fn children_that_use_no_cache_end_whatever_other_threads_did_at_the_fork() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for (source, count) in [("hook", "150"), ("auto", "20")] {
            let out = run(&program, &["forks", count], Some(source));
            assert_eq!(out, "all ended\n", "{cache:?} {source}");
        }
    }
}

/// A thread that holds a lock of the cache, or of UCP's context, at the fork does not exist in the
/// child.
#[test]
fn children_that_look_up_end_whatever_other_threads_did_at_the_fork() {
    let Some(program) = program(Cache::Ucx) else {
        return;
    };
    for (source, count) in [("hook", "200"), ("auto", "40")] {
        let out = run(&program, &["children", count], Some(source));
        assert_eq!(out, "0 hung\n", "{source}");
    }
}

#[test]
fn a_child_registers_anew_and_its_parent_goes_on() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for source in ["hook", "auto"] {
            let out = run(&program, &["fork"], Some(source));
            assert_eq!(
                out.matches(" right").count(),
                2,
                "{cache:?} {source}: {out}"
            );
        }
    }
}

/// The child's first registration makes its sources. The parent's other registrations are unknown
/// to them.
#[test]
fn a_child_finds_no_registration_of_its_parent() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for source in ["hook", "auto"] {
            let out = run(&program, &["inherited"], Some(source));
            assert_eq!(
                out.matches("child right").count(),
                3,
                "{cache:?} {source}: {out}"
            );
        }
    }
}

#[test]
fn a_child_with_two_caches_finds_no_registration_of_its_parent_in_either() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for source in ["hook", "auto"] {
            let out = run(&program, &["domains"], Some(source));
            assert_eq!(
                out, "child right\nchild right\nchild found\n",
                "{cache:?} {source}"
            );
        }
    }
}

#[test]
fn caches_start_and_stop_while_others_map_and_unmap() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        for source in ["hook", "auto"] {
            for _ in 0..runs(3) {
                run(&program, &["cycles", "20"], Some(source));
            }
        }
    }
}

/// How often to run a test that can crash by chance: `usual`, or `MMUN_RUNS` if that is set.
pub(crate) fn runs(usual: u32) -> u32 {
    std::env::var("MMUN_RUNS")
        .ok()
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(usual)
}

#[test]
fn allocators_that_are_not_libcs_are_watched_too() {
    for name in [
        "libjemalloc.so.2",
        "libtcmalloc_minimal.so.4",
        "libmimalloc.so.2.0",
    ] {
        let file = installed(name);
        if !require(Cap::Library(name)) {
            continue;
        }
        for cache in ALL {
            let Some(program) = program(cache) else {
                continue;
            };
            let mut command = Command::new(&program);
            command.arg("stale").env("MMUN", "auto");
            command.env(
                "LD_PRELOAD",
                format!("{}:{}", library().display(), file.display()),
            );
            let output = output(command);
            let out = text(&output.stdout);
            assert!(
                output.status.success(),
                "{cache:?} {name}: {:?} {out}{}",
                output.status,
                text(&output.stderr)
            );
            if has_kernel() {
                assert_eq!(stale(&out), 0, "{cache:?} {name}: {out}");
            }
        }
    }
}

#[test]
fn a_process_that_would_miss_changes_is_refused_when_that_is_asked_for() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        let mut command = Command::new(&program);
        command
            .arg("fork")
            .env("LD_PRELOAD", library())
            .env("MMUN", "hook")
            .env("MMUN_STRICT", "1");
        let output = output(command);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{cache:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(
            error.starts_with("mmun: MMUN_STRICT=1 and the sources miss changes: kernel: "),
            "{error}"
        );
    }
}

#[test]
fn the_report_names_the_registration_that_was_refused() {
    let Some(program) = program(Cache::Libfabric) else {
        return;
    };
    if !has_kernel() {
        return;
    }
    // On a busy machine a thread can make libfabric drop the registration before the hit that would
    // refuse it.
    let report = (0..50)
        .map(|_| {
            let mut command = preloaded(&program, "both");
            command.arg("fork");
            text(&output(command).stderr)
        })
        .find(|report| report.contains("\n  refused   0x"))
        .expect("a run in which the hit comes first");
    for line in [
        "libfabric protected",
        "hook      in use",
        "kernel    in use",
        "watched   3 registrations",
        "refused   0x",
    ] {
        assert!(
            report
                .lines()
                .any(|known| known.trim_start().starts_with(line)),
            "{line}: {report}"
        );
    }
    assert_eq!(
        report.matches("mmun: process ").count(),
        1,
        "the child ended without exit: {report}"
    );
}

/// Runs the commands with a folder for their reports, and returns the reports.
fn reports(commands: impl IntoIterator<Item = Command>, name: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("reports-{name}-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    for mut command in commands {
        command
            .env("LD_PRELOAD", library())
            .env("MMUN", "hook")
            .env("MMUN_REPORT", format!("{}/", folder.display()));
        let output = output(command);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
    }
    let files = std::fs::read_dir(&folder).unwrap();
    let reports = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
    let reports = reports.collect();
    std::fs::remove_dir_all(&folder).unwrap();
    reports
}

#[test]
fn a_child_that_ends_by_exit_or_by_a_signal_is_missed_in_the_report() {
    for cache in ALL {
        let Some(program) = program(cache) else {
            continue;
        };
        let mut command = Command::new(&program);
        command.arg("fork");
        let reports = reports([command], &format!("{cache:?}"));
        // The child, which looked up, ends by `_exit`.
        let silent = |report: &&String| report.contains("\n  no report: ");
        let count = reports.iter().filter(silent).count();
        assert_eq!((reports.len(), count), (2, 1), "{cache:?}: {reports:?}");
    }
}

#[test]
fn processes_with_the_same_number_in_two_containers_report_apart() {
    let Some(program) = program(Cache::Ucx).filter(|_| require(Cap::MountNamespace)) else {
        return;
    };
    // In each namespace the program is process 1, and its child process 2.
    let contained = || {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc"]);
        command.arg(&program).arg("fork");
        command
    };
    let reports = reports([contained(), contained()], "containers");
    assert_eq!(reports.len(), 4, "{reports:?}");
}
