//! The report that the process writes at exit.

#![allow(
    unsafe_code,
    reason = "an entry of `.fini_array`; see the crate's Safety section"
)]

use crate::place::{folder, has_begun, head, path_in};
use crate::say::{complain, print};
use crate::settings::settings;
use crate::{counts, libfabric, reaper, space, ucx};
use mmu_source::hook::State;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::Ordering;

/// Runs when the process exits, after the program's own handlers.
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = at_exit;

extern "C" fn at_exit() {
    reaper::stop_all();
    if !has_begun() {
        return;
    }
    let Some(to) = &settings().report else {
        return;
    };
    let text = text();
    let written = match (to.as_str(), folder()) {
        ("-", _) => print(&text),
        (_, Some(folder)) => std::fs::write(path_in(&folder), text),
        // One `write`, so that reports of several processes do not mix.
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
                if libfabric::is_started() {
                    "protected"
                } else {
                    "protected; no provider used a cache"
                },
            ),
        );
    }
    if let Some(result) = ucx::served() {
        line("UCX", words(result, "protected"));
        if result.is_ok() && ucx::looks_up_by_itself() {
            line(
                "",
                "from 1.14 on, UCX receives a change that only the kernel source sees up to milliseconds late".to_owned(),
            );
        }
    }
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
    if ucx::served().is_some() {
        let look_ups = if counts::LOOKED_UP.load(Ordering::Relaxed) && space.kernel().is_ok() {
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
