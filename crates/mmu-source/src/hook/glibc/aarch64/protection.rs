//! The protection of a page of code: read and execute, and the landing-pad check if the page has
//! it.

use std::fs::File;
use std::io::{BufRead, BufReader};

/// The flag of a page in which every target of an indirect branch must be a landing pad.
const PROT_BTI: i32 = 0x10;

/// Returns the protection of the executable mapping that contains `address`.
pub(in crate::hook::glibc) fn protection(address: u64) -> i32 {
    let plain = libc::PROT_READ | libc::PROT_EXEC;
    // If `/proc` cannot be read, the replaced pages lose their landing-pad check, and still work.
    match has_landing_pads(address) {
        Some(true) => plain | PROT_BTI,
        Some(false) | None => plain,
    }
}

/// Tells whether the mapping that contains `address` has the landing-pad check. Returns `None` if
/// `/proc` cannot be read.
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
