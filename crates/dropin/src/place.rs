//! The destination of this process's report, and its first line.

use crate::counts;
use crate::say::replace;
use crate::settings::settings;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The id of the `Mm` that has used one of the libraries; 0 if none has.
static BEGUN: AtomicU64 = AtomicU64::new(0);
/// How many programs that used a library this process has executed before the present program.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Called at each use of UCX or libfabric. Only the first call in an address space has an
/// effect; the child of a fork has a first use of its own.
pub(crate) fn begin() {
    let own = mmu_source::current_ref().id();
    // Relaxed: no other data is published through `BEGUN`.
    if BEGUN.load(Ordering::Relaxed) == own {
        return;
    }
    let before = BEGUN.swap(own, Ordering::Relaxed);
    if before == own {
        return;
    }
    if before != 0 {
        counts::forget();
    }
    // A placeholder, so that a process that ends without a report differs from a process that never
    // used a library.
    if let Some(folder) = folder() {
        // This process may have run another program before, which has used a library and has a
        // file.
        let is_taken = |number: &u32| Path::new(&path(&folder, *number)).exists();
        let number = (0..).find(|number| !is_taken(number)).unwrap_or_default();
        NUMBER.store(number, Ordering::Relaxed);
        let _ = replace(
            &path_in(&folder),
            &format!(
                "{}  no report: it did not return from main or call exit\n",
                head()
            ),
        );
    }
}

/// Notes in the placeholder that `MMUN_STRICT=1` has refused this process.
pub(crate) fn refused(reason: &str) {
    if let Some(folder) = folder() {
        let text = format!("{}  strict    refused: {reason}\n", head());
        let _ = replace(&path_in(&folder), &text);
    }
}

/// Whether this address space, not only that of a parent, has used one of the libraries.
pub(crate) fn has_begun() -> bool {
    let begun = BEGUN.load(Ordering::Relaxed);
    // `current_ref` makes the `Mm` on first use, so a process that used neither library does not
    // call it.
    begun != 0 && begun == mmu_source::current_ref().id()
}

/// The directory that `MMUN_REPORT` names, if it names one.
pub(crate) fn folder() -> Option<String> {
    settings().report.clone().filter(|name| name.ends_with('/'))
}

/// The file of this process. Processes in different containers can have the same pid, so the inode
/// of the pid namespace is part of the name. The kernel reuses the inode of a namespace that has
/// ended. So the time at which the process started is part of the name, too. None of the three
/// changes if the process executes another program, so the name for such a program ends in a count.
pub(crate) fn path_in(folder: &str) -> String {
    path(folder, NUMBER.load(Ordering::Relaxed))
}

fn path(folder: &str, number: u32) -> String {
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let digits = |byte: &char| byte.is_ascii_digit();
    let namespace: String = namespace.to_string_lossy().chars().filter(digits).collect();
    // Column 22 of proc_pid_stat(5), in clock ticks; the second column is a name in parentheses.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let columns = stat.rsplit_once(") ").map_or("", |(_, columns)| columns);
    let start = columns.split(' ').nth(22 - 3).unwrap_or_default();
    let own = format!("{folder}{}-{namespace}-{start}", std::process::id());
    match number {
        0 => own,
        _ => format!("{own}-{number}"),
    }
}

/// The first line of the report, which identifies the process.
pub(crate) fn head() -> String {
    let program = std::env::args_os().next().unwrap_or_default();
    let rank = [
        "OMPI_COMM_WORLD_RANK",
        "PMIX_RANK",
        "PMI_RANK",
        "SLURM_PROCID",
    ]
    .iter()
    .find_map(std::env::var_os);
    let rank = rank.map_or(String::new(), |rank| {
        format!(" rank {}", rank.to_string_lossy())
    });
    format!(
        "mmun: process {}{rank}: {}\n",
        std::process::id(),
        program.to_string_lossy()
    )
}
