//! The table of operations.

mod advice;
mod files;
mod heap;
mod machine;
mod maps;
mod others;
mod tasks;

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::operation::Operation;
use super::page::Page;
use crate::source::Source::{self, Hook, Process, Uffd};

// Here are the claims of the sources besides `kernel`, which claims to see every operation.

/// The sources that see a call through libc.
const LIBC: &[Source] = &[Hook, Process];
/// The sources that see a memory call that bypasses libc.
const CALL: &[Source] = &[Process];
/// The sources that see a call through libc that unmaps or discards memory which userfaultfd can
/// watch.
const LIBC_AND_UFFD: &[Source] = &[Hook, Uffd, Process];
/// The sources that see a call, even one that bypasses libc, which unmaps or discards memory that
/// userfaultfd can watch.
const CALL_AND_UFFD: &[Source] = &[Uffd, Process];
/// The sources that see a change without a memory call, such as a change by the kernel itself, a
/// write, or a change of a mapped file: none but `kernel`.
const NONE: &[Source] = &[];

/// Every operation, in the order of the matrix.
pub(crate) fn all() -> impl Iterator<Item = &'static Operation> {
    let groups: [&'static [Operation]; 7] = [
        maps::OPERATIONS,
        heap::OPERATIONS,
        advice::OPERATIONS,
        files::OPERATIONS,
        tasks::OPERATIONS,
        others::OPERATIONS,
        machine::OPERATIONS,
    ];
    groups.into_iter().flatten()
}

/// Whether this is the machine of `cargo xtask guest`, in which an operation may damage kernel
/// state and memory.
fn is_guest() -> io::Result<bool> {
    let line = fs::read_to_string("/proc/cmdline")?;
    Ok(line.split_whitespace().any(|word| word == "mmun.guest"))
}

/// How long to wait for a change that the kernel makes by itself; shorter than the time limit of an
/// operation. An emulated guest gets little processor time on a busy machine.
fn patience() -> Duration {
    Duration::from_secs(if is_guest().unwrap_or(false) { 50 } else { 10 })
}

/// Repeats `step` until the page's state changes; fails if it does not change within [`patience`].
fn until_changed(page: &Page, mut step: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let (before, begin, patience) = (page.state()?, Instant::now(), patience());
    while page.state()? == before {
        if begin.elapsed() > patience {
            return Err(io::Error::other(format!(
                "the kernel changed nothing within {patience:?}"
            )));
        }
        step()?;
        std::thread::yield_now();
    }
    Ok(())
}

pub(crate) fn named(name: &str) -> Option<&'static Operation> {
    all().find(|operation| operation.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_need_no_escape_in_json() {
        let names: Vec<&str> = all().map(|operation| operation.name).collect();
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name} stands twice");
            assert!(
                name.bytes()
                    .all(|byte| (b' '..=b'~').contains(&byte) && byte != b'"' && byte != b'\\'),
                "{name}"
            );
        }
    }
}
