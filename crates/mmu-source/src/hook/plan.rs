//! What is to be patched, found out once: the sites, and the trampolines that the patches lead to.

#![allow(unsafe_code, reason = "reads code")]

use super::handler::CALLS;
use super::module::{self, Function, Segment};
use super::scan::{Found, PATCH};
use super::text::{self, Edit};
use super::trampoline::Arena;
use super::{Patch, State, stub};
use crate::Error;
use std::sync::OnceLock;

/// A place that is patched.
#[derive(Debug)]
pub(super) struct Site {
    name: &'static str,
    function: Option<Function>,
    module: String,
    address: u64,
    original: [u8; PATCH],
    jump: [u8; PATCH],
}

/// Returns the sites of this process, in order of address.
///
/// The first time nothing is patched yet, so no callback runs while they are made.
pub(super) fn sites() -> Result<&'static [Site], Error> {
    static SITES: OnceLock<Result<Vec<Site>, String>> = OnceLock::new();
    match SITES.get_or_init(make) {
        Ok(sites) => Ok(sites),
        Err(missing) => Err(Error::Unavailable {
            source: "hook",
            missing: missing.clone(),
            remedy: "ldd --version; the hook knows glibc on x86-64, the kernel source needs no libc".to_owned(),
        }),
    }
}

fn make() -> Result<Vec<Site>, String> {
    let segments = module::segments();
    let mut sites = Vec::new();
    let is_generic = |at| module::function_at(at).is_some_and(|function| function.name == "syscall");
    for segment in &segments {
        let found = segment.code().sites(is_generic);
        if !found.is_empty() {
            sites.extend(build(segment, &found)?);
        }
    }
    let is_there = |name: &&str| sites.iter().any(|site: &Site| site.name == *name);
    let missing: Vec<&str> = NEEDED.iter().copied().filter(|name| !is_there(name)).collect();
    if !missing.is_empty() {
        let modules: Vec<&str> = segments.iter().map(|segment| segment.module.as_str()).collect();
        let found: Vec<&str> = sites.iter().map(|site| site.name).collect();
        return Err(format!(
            "a known form of {} in libc (looked at {}; found {})",
            missing.join(", "),
            if modules.is_empty() { "nothing".to_owned() } else { modules.join(", ") },
            if found.is_empty() { "nothing".to_owned() } else { found.join(", ") },
        ));
    }
    module::pin();
    sites.sort_by_key(|site| site.address);
    Ok(sites)
}

/// Without these a hook would be a trap: whoever installs it relies on them.
const NEEDED: &[&str] = &["munmap", "mmap", "mremap", "madvise", "brk", "mprotect", "syscall"];

/// Makes the trampolines of a segment.
fn build(segment: &Segment, found: &[Found]) -> Result<Vec<Site>, String> {
    let end = segment.start + segment.length;
    let room = || format!("room for trampolines within 2 GiB of {}", segment.module);
    let mut arena = Arena::near(segment.start, end, found.len()).ok_or_else(room)?;
    let bytes = segment.code().bytes;
    let mut sites = Vec::new();
    for found in found {
        let Some(stub) = stub::stub(found.keep) else { continue };
        let from = (found.address - segment.start) as usize;
        let moved = &bytes[from..(found.syscall - segment.start) as usize];
        const SYSCALL: u64 = 2;
        let trampoline = arena.add(moved, found.number.is_none(), stub, found.syscall + SYSCALL);
        let distance = trampoline.wrapping_sub(found.address + PATCH as u64) as i64;
        let mut jump = [0xe9; PATCH];
        jump[1..].copy_from_slice(&i32::try_from(distance).map_err(|_| room())?.to_le_bytes());
        sites.push(Site {
            name: name(found.number),
            function: module::function_at(found.address),
            module: segment.module.clone(),
            address: found.address,
            original: moved[..PATCH].try_into().expect("a site is as long as a jump"),
            jump,
        });
    }
    arena
        .seal()
        .map_err(|error| format!("executable memory (mprotect: {})", std::io::Error::from_raw_os_error(error)))?;
    Ok(sites)
}

fn name(number: Option<u32>) -> &'static str {
    let Some(number) = number else { return "syscall" };
    CALLS.iter().find(|call| call.0 == libc::c_long::from(number)).map_or("unknown", |call| call.1)
}

impl Site {
    /// The edit that patches it.
    pub(super) fn patch(&self) -> Edit {
        Edit { address: self.address, from: self.original, to: self.jump }
    }

    /// The edit that takes the patch out.
    pub(super) fn restore(&self) -> Edit {
        Edit { address: self.address, from: self.jump, to: self.original }
    }

    /// Says what it looks like now; `is_installed` is what it should be.
    pub(super) fn describe(&self, is_installed: bool) -> Patch {
        // SAFETY: the site is in the code of libc or of the loader, which stay.
        let now = unsafe { text::read(self.address) };
        let state = if now == self.jump {
            if self.has_foreign_entry() { State::Chained } else { State::Ours }
        } else if now == self.original && !is_installed {
            State::Free
        } else {
            State::Overwritten
        };
        Patch {
            name: self.name,
            function: self.function.as_ref().map(|function| function.name.clone()),
            module: self.module.clone(),
            address: self.address,
            state,
        }
    }

    /// Tells whether somebody else's jump stands at the beginning of the function.
    fn has_foreign_entry(&self) -> bool {
        let Some(function) = self.function.as_ref().filter(|function| function.entry != self.address) else {
            return false;
        };
        // SAFETY: a function of libc or of the loader, which stay.
        match unsafe { text::read(function.entry) } {
            // jmp rel32; jmp *disp(%rip).
            [0xe9, ..] | [0xff, 0x25, ..] => true,
            // movabs to a scratch register, r10, r11 or rax, as a far jump begins.
            [0x49, 0xba | 0xbb, ..] | [0x48, 0xb8, ..] => true,
            _ => false,
        }
    }
}
