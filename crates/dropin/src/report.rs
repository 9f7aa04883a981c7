//! What is written at exit, and the few lines that cannot wait.

#![allow(
    unsafe_code,
    reason = "atfork, exit and the exit's function table; see the crate's Safety section"
)]

use crate::space::{self, Space};
use crate::{counts, libfabric, settings, ucx};
use mmu_source::hook::State;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::Once;
use std::sync::atomic::Ordering;

/// One line on standard error, in one call.
pub(crate) fn complain(line: &str) {
    let _ = std::io::stderr().write_all(format!("mmun: {line}\n").as_bytes());
}

/// An error of a source in one line: what, why, and what helps.
pub(crate) fn explain(error: &mmu_source::Error) -> String {
    let mut line = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        let _ = write!(line, ": {source}");
    }
    if let Some(hint) = error.hint() {
        let _ = write!(line, "; {hint}");
    }
    line
}

/// `MMUN_STRICT=1` and no source is complete.
pub(crate) fn refuse(space: &Space) -> ! {
    let reason = space.kernel().map_or_else(str::to_owned, |_| String::new());
    complain(&format!(
        "MMUN_STRICT=1 and the sources miss changes: kernel: {reason}"
    ));
    // SAFETY: it takes an integer. Handlers of the program do not run: it has not begun to
    // communicate.
    unsafe { libc::_exit(125) }
}

/// The first use of either library in this process.
pub(crate) fn begin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a function, and this object stays: the sources pin it.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        // A process that ends without a word is to be told from one that never was.
        if let Some(folder) = folder() {
            let _ = std::fs::write(
                path_in(&folder),
                format!(
                    "{}  no report: it did not return from main or call exit\n",
                    head()
                ),
            );
        }
    });
}

extern "C" fn in_child() {
    ucx::serve_child();
}

/// Runs when the process exits, after the program's own handlers.
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = at_exit;

extern "C" fn at_exit() {
    libfabric::stop_all();
    if !ucx::is_used() {
        return;
    }
    let Some(to) = &settings::settings().report else {
        return;
    };
    let text = text();
    let written = match (to.as_str(), folder()) {
        ("-", _) => std::io::stderr().write_all(text.as_bytes()),
        (_, Some(folder)) => std::fs::write(path_in(&folder), text),
        // One call: reports of several processes do not mix.
        (file, None) => File::options()
            .append(true)
            .create(true)
            .open(file)
            .and_then(|mut file| file.write_all(text.as_bytes())),
    };
    if let Err(error) = written {
        complain(&format!("MMUN_REPORT={to}: {error}"));
    }
}

/// Where `MMUN_REPORT` names a directory.
fn folder() -> Option<String> {
    settings::settings()
        .report
        .clone()
        .filter(|name| name.ends_with('/'))
}

fn path_in(folder: &str) -> String {
    format!("{folder}{}", std::process::id())
}

/// The first line: which process.
fn head() -> String {
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

fn text() -> String {
    let mut text = head();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:10}{value}");
    };
    let words = |result: Result<(), &str>, served: &str| match result {
        Ok(()) => served.to_owned(),
        Err(reason) => format!("not served: {reason}"),
    };
    if let Some(result) = libfabric::imported() {
        line(
            "libfabric",
            words(
                result,
                if libfabric::is_started() {
                    "watched"
                } else {
                    "watched; no provider used a cache"
                },
            ),
        );
    }
    if let Some(result) = ucx::served() {
        line("UCX", words(result, "told of changes"));
        if result.is_ok() && ucx::looks_up_by_itself() {
            line(
                "",
                "from 1.14 on a change that only the kernel source sees is told some milliseconds later".to_owned(),
            );
        }
    }
    let Some(space) = space::current() else {
        line("sources", "none was needed".to_owned());
        return text;
    };
    match space.hook() {
        Ok(hook) => {
            let places = hook.status();
            let lost: Vec<&str> = places
                .iter()
                .filter(|place| place.state == State::Overwritten)
                .map(|place| place.name)
                .collect();
            let lost = if lost.is_empty() {
                String::new()
            } else {
                format!("; overwritten by another library: {}", lost.join(", "))
            };
            line(
                "hook",
                format!("in use, {} places in libc{lost}", places.len()),
            );
        }
        Err(reason) => line("hook", format!("not in use: {reason}")),
    }
    match space.kernel() {
        Ok(kernel) => line(
            "kernel",
            format!(
                "in use, {} changes seen, {} losses",
                kernel.generation(),
                kernel.lost()
            ),
        ),
        Err(reason) => line("kernel", format!("not in use: {reason}")),
    }
    if !space.is_complete() {
        line(
            "",
            "without it, changes that do not pass through libc are missed".to_owned(),
        );
    }
    if libfabric::is_started() {
        let now = space
            .ranges
            .count()
            .map_or("?".to_owned(), |count| count.to_string());
        line(
            "watched",
            format!(
                "{} registrations, {now} of them still",
                counts::WATCHED.get()
            ),
        );
        line(
            "hits",
            format!(
                "{}, {} refused as stale; {} dropped before",
                counts::HITS.get(),
                counts::REFUSED.get(),
                counts::REAPED.get()
            ),
        );
    }
    if ucx::served().is_some() {
        let asked = if counts::ASKED.load(Ordering::Relaxed) {
            "asked"
        } else {
            "not asked"
        };
        line(
            "told",
            format!("{} changes; {asked} at look-ups", counts::TOLD.get()),
        );
    }
    line(
        "start",
        format!("{:.1} ms", counts::START_NS.get() as f64 / 1e6),
    );
    for refusal in counts::refusals() {
        let (start, end) = (refusal.start, refusal.start.saturating_add(refusal.len));
        line(
            "refused",
            format!(
                "{start:#x}-{end:#x}: {} of {}, {} hits",
                refusal.change.event, refusal.change.range, refusal.times
            ),
        );
    }
    text
}
