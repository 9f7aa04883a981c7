//! Which protection a page of code has besides reading and running.

use std::fs::File;
use std::io::{BufRead, BufReader};

/// A branch by a register may land on landing pads only.
const PROT_BTI: i32 = 0x10;

/// Returns the protection of the mapping that holds `address`, which is one of code.
pub(in crate::hook::glibc) fn protection(address: u64) -> i32 {
    let plain = libc::PROT_READ | libc::PROT_EXEC;
    // Without `/proc`, the pages that are replaced lose the check of landing pads, and work.
    match has_landing_pads(address) {
        Some(true) => plain | PROT_BTI,
        Some(false) | None => plain,
    }
}

/// Reads the flags of the mapping that holds `address`.
fn has_landing_pads(address: u64) -> Option<bool> {
    let maps = BufReader::new(File::open("/proc/self/smaps").ok()?);
    let mut is_here = false;
    for line in maps.lines() {
        let line = line.ok()?;
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if is_here {
                return Some(flags.split_ascii_whitespace().any(|flag| flag == "bt"));
            }
        } else if let Some(mapping) = crate::maps::parse(line.as_bytes()) {
            is_here = (mapping.start..mapping.end).contains(&address);
        }
    }
    None
}
