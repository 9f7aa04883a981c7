//! The plan: which sites to patch, and the trampolines that the patches jump to. A process keeps
//! its plan for its whole life, and the library with this code stays loaded (`srcu::raw::pin`).

#![allow(unsafe_code, reason = "reads code")]

use super::arena::Arena;
use super::code_pages::{self, Edit};
use super::handler::CALLS;
use super::machine::{self, Code64, Foreign, Found, PATCH, Protections};
use super::module::{self, Function, Hidden, Segment};
use crate::Error;
use crate::hook::{Patch, State};
use std::ffi::CString;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{io, ptr};

/// An instruction to patch.
#[derive(Debug)]
pub(super) struct Site {
    name: &'static str,
    function: Option<Function>,
    module: String,
    address: u64,
    original: [u8; PATCH],
    jump: [u8; PATCH],
    /// Whether the patch replaces another program's jump at the entry of the function.
    is_chain: bool,
}

/// What to patch.
#[derive(Debug)]
pub(super) struct Plan {
    /// In order of address.
    pub(super) sites: Vec<Site>,
    /// The code that breakpoints hide in the pages to be replaced.
    pub(super) hidden: Vec<Hidden>,
}

/// The plan, or the reason why there is none.
type Made = Result<Plan, Lack>;

/// What the hook lacks in this process, and what helps.
#[derive(Debug)]
struct Lack {
    missing: String,
    remedy: &'static str,
}

static MADE: AtomicPtr<Made> = AtomicPtr::new(ptr::null_mut());

/// Returns the plan of this process. If the parent has made its plan, the child of a fork inherits
/// the plan, as it inherits the patches.
///
/// Calls `prepare` when it has made a plan. At that time nothing is patched, so no callback runs.
pub(super) fn plan(prepare: fn()) -> Result<&'static Plan, Error> {
    // This code uses neither a lock nor a `OnceLock`, for two reasons. In the child of a fork, a
    // thread that only the parent has could hold the lock for ever. And the loader holds its own
    // lock while a constructor of a library runs: if the constructor waited for a thread that makes
    // the plan, and that thread for the loader's lock, both would wait for ever. So two threads may
    // each make a plan.
    let made = look().unwrap_or_else(|| {
        let made = Box::into_raw(Box::new(make().inspect(|_| prepare())));
        // ORDER(hook-plan): Release, for the content. Partner: the load in `look`. If two threads
        // make a plan, the second one leaks its plan, with the trampolines.
        let _ = MADE.compare_exchange(ptr::null_mut(), made, Ordering::Release, Ordering::Relaxed);
        look().expect("it was stored by this thread or another")
    });
    made.as_ref().map_err(|lack| Error::Unavailable {
        source: "hook",
        missing: lack.missing.clone(),
        remedy: lack.remedy.to_owned(),
        instead: None,
    })
}

/// Returns the plan if it has been made successfully.
pub(super) fn made() -> Option<&'static Plan> {
    look()?.as_ref().ok()
}

fn look() -> Option<&'static Made> {
    // ORDER(hook-plan): Acquire, for the plan. Partner: the store in `plan`.
    let made = MADE.load(Ordering::Acquire);
    // SAFETY: the pointer is null or comes from `Box::into_raw` in `plan`, and its target is never
    // freed.
    unsafe { made.as_ref() }
}

fn make() -> Made {
    let segments = module::segments();
    let (mut sites, mut hidden) = (Vec::new(), Vec::new());
    let mut missing: Vec<&str> = Vec::new();
    let generic = module::libc_function(c"syscall");
    // Compare addresses first, because asking the loader for a function's name takes long.
    let is_generic = |at: u64| {
        const LONGEST: u64 = 128;
        generic.is_some_and(|entry| (entry..entry + LONGEST).contains(&at))
            && module::function_at(at).is_some_and(|function| function.name == "syscall")
    };
    let functions = functions();
    for segment in &segments {
        let (bytes, breakpoints) = segment
            .without_breakpoints()
            .map_err(|error| no_memory("mmap", error))?;
        let code = Code64 {
            bytes: &bytes,
            start: segment.start,
        };
        hidden.extend(breakpoints);
        let found: Vec<(Found, Option<Function>)> = code
            .sites(segment.starts(), is_generic)
            .into_iter()
            .map(|site| (site.clone(), module::function_at(site.address)))
            .collect();
        let is_patched = |entry| {
            found
                .iter()
                .any(|(_, function)| function.as_ref().is_some_and(|f| f.entry == entry))
        };
        // A function without a site has another program's jump at its entry, or code of an unknown
        // form.
        let rest: Vec<&Function> = functions
            .iter()
            .filter(|f| segment.holds(f.entry) && !is_patched(f.entry))
            .collect();
        let (built, unknown) = build(segment, code, &found, &rest)?;
        sites.extend(built);
        missing.extend(
            unknown
                .iter()
                .filter_map(|name| NEEDED.iter().find(|needed| *needed == name)),
        );
    }
    let is_there = |name: &&str| sites.iter().any(|site: &Site| site.name == *name);
    missing.extend(NEEDED.iter().copied().filter(|name| !is_there(name)));
    if !missing.is_empty() {
        return Err(lack(&segments, &missing, &sites));
    }
    sites.sort_by_key(|site| site.address);
    Ok(Plan { sites, hidden })
}

/// Returns libc's functions for the hooked calls, except `syscall`: its arguments differ from those
/// of a call.
fn functions() -> Vec<Function> {
    let entry = |name: &str| module::libc_function(&CString::new(name).expect("no zero byte"));
    let names = CALLS.iter().map(|call| call.1);
    names
        .filter_map(|name| {
            Some(Function {
                name: name.to_owned(),
                entry: entry(name)?,
            })
        })
        .collect()
}

/// The calls that users rely on the hook to see. If one of them cannot be patched, installing
/// fails.
const NEEDED: &[&str] = &[
    "munmap", "mmap", "mremap", "madvise", "brk", "mprotect", "syscall",
];

/// Makes the trampolines of a segment. Also returns the names of the functions of `rest` whose
/// entry has no known jump of another program.
fn build(
    segment: &Segment,
    code: Code64<'_>,
    found: &[(Found, Option<Function>)],
    rest: &[&Function],
) -> Result<(Vec<Site>, Vec<String>), Lack> {
    let (mut sites, mut unknown) = (Vec::new(), Vec::new());
    if found.is_empty() && rest.is_empty() {
        return Ok((sites, unknown));
    }
    let end = segment.start + segment.length;
    let reach = machine::REACH >> 20;
    let room = || Lack {
        missing: format!(
            "room for trampolines within {reach} MiB of {}",
            segment.module
        ),
        remedy: "wc -l /proc/PID/maps; sysctl vm.max_map_count; the kernel source needs no libc",
    };
    let mut arena = Arena::near(segment.start, end, found.len() + rest.len()).ok_or_else(room)?;
    let bytes = |from: u64, length: usize| &code.bytes[(from - code.start) as usize..][..length];
    let mut add = |name, function: Option<Function>, address: u64, trampoline: u64, is_chain| {
        sites.push(Site {
            name,
            function,
            module: segment.module.clone(),
            address,
            original: bytes(address, PATCH).try_into().expect("as long as a jump"),
            jump: machine::branch(address, trampoline).ok_or_else(room)?,
            is_chain,
        });
        Ok::<(), Lack>(())
    };
    for (found, function) in found {
        let trampoline = arena.next();
        let Some(made) = machine::trampoline(trampoline, found, code) else {
            continue;
        };
        arena.place(&made);
        add(
            name(found.number),
            function.clone(),
            found.address,
            trampoline,
            false,
        )?;
    }
    for function in rest {
        let entry = bytes(function.entry, Foreign::LENGTH)
            .try_into()
            .expect("as long as asked for");
        let call = CALLS
            .iter()
            .find(|call| call.1 == function.name)
            .expect("made from that list");
        match Foreign::read(function.entry, entry) {
            Some(foreign) => {
                let trampoline = arena.next();
                arena.place(&machine::chain(call.0 as u32, foreign));
                add(
                    call.1,
                    module::function_at(function.entry),
                    foreign.place(function.entry),
                    trampoline,
                    true,
                )?;
            }
            None => unknown.push(function.name.clone()),
        }
    }
    arena.seal().map_err(|error| no_memory("mprotect", error))?;
    Ok((sites, unknown))
}

/// Returns the error for functions of [`NEEDED`] that cannot be patched.
fn lack(segments: &[Segment], missing: &[&str], sites: &[Site]) -> Lack {
    let mut missing = missing.to_vec();
    missing.sort_unstable();
    missing.dedup();
    let missing = missing.join(", ");
    let modules: Vec<&str> = segments
        .iter()
        .map(|segment| segment.module.as_str())
        .collect();
    let modules = modules.join(" and ");
    if segments.is_empty() {
        return Lack {
            missing: "a glibc that is loaded as a library: this program is statically linked, or has another libc"
                .to_owned(),
            remedy: "the kernel source, which needs no libc",
        };
    }
    if segments.iter().any(Segment::is_changed) {
        return Lack {
            missing: format!(
                "the code of {missing} as it is in the file of {modules}: another copy of this library, or another tool, has patched it"
            ),
            remedy: "one copy of the library in a process, or the kernel source",
        };
    }
    let mut found: Vec<&str> = sites.iter().map(|site| site.name).collect();
    found.sort_unstable();
    found.dedup();
    let found = if found.is_empty() {
        "nothing".to_owned()
    } else {
        found.join(", ")
    };
    Lack {
        missing: format!("a known form of {missing} in libc (looked at {modules}; found {found})"),
        remedy: "ldd --version; the hook knows glibc on x86-64 and aarch64, the kernel source needs no libc",
    }
}

fn no_memory(call: &str, error: i32) -> Lack {
    Lack {
        missing: format!(
            "memory for code ({call}: {})",
            io::Error::from_raw_os_error(error)
        ),
        remedy: "the kernel source, where this process may not make memory executable",
    }
}

fn name(number: Option<u32>) -> &'static str {
    let Some(number) = number else {
        return "syscall";
    };
    CALLS
        .iter()
        .find(|call| call.0 == libc::c_long::from(number))
        .map_or("unknown", |call| call.1)
}

impl Site {
    /// Returns the edit that installs the patch.
    pub(super) fn patch(&self, now: &Protections) -> Edit {
        Edit {
            address: self.address,
            from: self.original,
            to: self.jump,
            protection: now.at(self.address),
        }
    }

    /// Returns the edit that removes the patch.
    pub(super) fn restore(&self, now: &Protections) -> Edit {
        Edit {
            address: self.address,
            from: self.jump,
            to: self.original,
            protection: now.at(self.address),
        }
    }

    /// Tells whether nothing is left to do: the site is in the wanted state, or has another
    /// program's patch.
    pub(super) fn is_settled(&self, is_installed: bool) -> bool {
        // SAFETY: the site is in the code of libc or of the loader, which stay loaded.
        let now: [u8; PATCH] = unsafe { code_pages::read(self.address) };
        now != if is_installed {
            self.original
        } else {
            self.jump
        }
    }

    /// Describes the site's present state. `is_installed` says whether the patch should be there.
    pub(super) fn describe(&self, is_installed: bool) -> Patch {
        // SAFETY: the site is in the code of libc or of the loader, which stay loaded.
        let now: [u8; PATCH] = unsafe { code_pages::read(self.address) };
        let state = if now == self.jump {
            if self.is_chain || self.has_foreign_entry() {
                State::Chained
            } else {
                State::Ours
            }
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

    /// Tells whether another program has written a jump at the entry of the function.
    fn has_foreign_entry(&self) -> bool {
        let Some(function) = self
            .function
            .as_ref()
            .filter(|function| function.entry != self.address)
        else {
            return false;
        };
        // SAFETY: the entry is in the code of libc or of the loader, which stay loaded.
        let now = unsafe { code_pages::read(function.entry) };
        Foreign::read(function.entry, now).is_some()
    }
}
