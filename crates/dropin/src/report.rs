//! The report that the process writes at exit.

#![allow(
    unsafe_code,
    reason = "an entry of `.fini_array`; see the crate's Safety section"
)]

use crate::found::{self, FABRIC, UCS};
use crate::place::{folder, has_begun, head, path_in};
use crate::say::{append, complain, print, replace};
use crate::settings::{Choice, settings};
use crate::{counts, libfabric, reaper, space, ucx};
use mmu_source::hook::State;
use std::fmt::Write as _;
use std::io;

/// Runs when the process exits, after the program's own handlers.
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = at_exit;

extern "C" fn at_exit() {
    reaper::stop_all();
    // A process that has used neither library only reads a variable of the environment, and if a
    // report is wanted, its mappings.
    if !has_begun() && (std::env::var_os("MMUN_REPORT").is_none() || unseen().is_empty()) {
        return;
    }
    let Some(to) = &settings().report else {
        return;
    };
    let text = match has_begun() {
        true => text(),
        false if settings().choice == Choice::Off => return,
        false => head() + &unseen(),
    };
    let written = match (to.as_str(), folder()) {
        ("-", _) => print(&text),
        (_, Some(folder)) => replace(&path_in(&folder), &text),
        (file, None) => append(file, &text),
    };
    if let Err(error) = written {
        // `mmun run` has removed its folder, because its program has ended before this process; or
        // the folder is on another machine.
        if error.kind() == io::ErrorKind::NotFound && is_folder_of_mmun(to) {
            return;
        }
        complain(&format!("MMUN_REPORT={to}: {error}"));
    }
}

/// Whether `mmun run` makes folders of this name.
fn is_folder_of_mmun(name: &str) -> bool {
    let last = name
        .strip_suffix('/')
        .and_then(|name| name.rsplit('/').next());
    last.is_some_and(|last| last.starts_with("mmun-run-"))
}

/// A line for each library that is loaded although this library has seen no call of it.
fn unseen() -> String {
    let [ucx, libfabric] = found::are_loaded([UCS, FABRIC]);
    let mut text = String::new();
    for (name, is_unseen) in [
        ("libucs", ucx && ucx::served().is_none()),
        ("libfabric", libfabric && libfabric::imported().is_none()),
    ] {
        if is_unseen {
            let _ = writeln!(
                text,
                "  unseen    {name} is loaded, and no call of it came through the drop-in: unused, or bound past it (RTLD_DEEPBIND, static)"
            );
        }
    }
    text
}

fn text() -> String {
    let mut text = head();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:10}{value}");
    };
    let words = |result: Result<(), &str>, served: &str| match result {
        Ok(()) => served.to_owned(),
        Err(reason) => format!("not protected: {reason}"),
    };
    if let Some(result) = libfabric::imported() {
        line(
            "libfabric",
            words(
                result,
                if libfabric::is_disabled() {
                    "caches nothing, because of FI_MR_CACHE_MONITOR=disabled"
                } else if libfabric::is_started() {
                    "protected"
                } else {
                    "protected; no provider used a cache"
                },
            ),
        );
    }
    if let Some(late) = libfabric::late_changes() {
        line("", late.to_owned());
    }
    if let Some(result) = ucx::served() {
        line("UCX", words(result, "protected"));
        if let (Ok(()), Some(late)) = (result, ucx::late_changes()) {
            line("", late.to_owned());
        }
    }
    text += &unseen();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:10}{value}");
    };
    let Some(space) = space::current() else {
        line("sources", "not needed".to_owned());
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
                format!("in use, {} places of libc patched{lost}", places.len()),
            );
        }
        Err(reason) => line("hook", format!("not in use: {reason}")),
    }
    match space.kernel() {
        Ok(kernel) => line(
            "kernel",
            format!(
                "in use, {} changes seen, {} lost",
                kernel.generation() - 1,
                kernel.lost()
            ),
        ),
        Err(reason) => line("kernel", format!("not in use: {reason}")),
    }
    if !space.is_complete() {
        line(
            "",
            "without it, changes that do not go through libc are missed".to_owned(),
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
                "{} registrations, {now} still registered",
                counts::WATCHED.get()
            ),
        );
        line(
            "hits",
            format!(
                "{} checked, {} refused as stale; {} removed before a hit",
                counts::HITS.get(),
                counts::REFUSED.get(),
                counts::REAPED.get()
            ),
        );
    }
    if matches!(ucx::served(), Some(Ok(()))) {
        let look_ups = if ucx::late_changes().is_none() && space.kernel().is_ok() {
            "checked"
        } else {
            "not checked"
        };
        line(
            "reported",
            format!(
                "{} changes to UCX; look-ups are {look_ups}",
                counts::TOLD.get()
            ),
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
