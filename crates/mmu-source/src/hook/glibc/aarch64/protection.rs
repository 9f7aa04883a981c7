//! The protection of pages of code: read and execute, and the landing-pad check for the pages that
//! have it.
//!
//! The pages of one module can differ. If a library such as UCX has patched a page, it has removed
//! the check from that page, and its patch has no landing pad.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;

/// The flag of a page in which every target of an indirect branch must be a landing pad.
const PROT_BTI: i32 = 0x10;

/// The mappings that have the landing-pad check. If `/proc` cannot be read, the list is empty. Then
/// the replaced pages lose their check, and their code still works.
#[derive(Debug)]
pub(in crate::hook::glibc) struct Protections(Vec<Range<u64>>);

impl Protections {
    /// Reads the present state, which allocates, if `is_needed`. Otherwise the list is empty.
    pub(in crate::hook::glibc) fn read_if(is_needed: bool) -> Self {
        let mut checked = Vec::new();
        if !is_needed {
            return Self(checked);
        }
        let Ok(maps) = File::open("/proc/self/smaps") else {
            return Self(checked);
        };
        let mut here = 0..0;
        for line in BufReader::new(maps).lines().map_while(Result::ok) {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                if flags.split_ascii_whitespace().any(|flag| flag == "bt") {
                    checked.push(here.clone());
                }
            } else if let Some(mapping) = crate::maps::parse(line.as_bytes()) {
                here = mapping.start..mapping.end;
            }
        }
        Self(checked)
    }

    /// Returns the protection of the page of code that contains `address`.
    pub(in crate::hook::glibc) fn at(&self, address: u64) -> i32 {
        let plain = libc::PROT_READ | libc::PROT_EXEC;
        match self.0.iter().any(|mapping| mapping.contains(&address)) {
            true => plain | PROT_BTI,
            false => plain,
        }
    }
}
