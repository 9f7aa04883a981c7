//! Installs and removes the patches, and counts the installed hooks.

#![allow(unsafe_code, reason = "replaces code")]

use super::machine::Protections;
use super::plan::{self, Plan};
use super::{code_pages, raw};
use crate::fork::{Lock, marks};
use crate::hook::Patch;
use crate::{Error, current_ref};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of installed hooks. Only the holder of the lock changes it.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Returns the lock. Its holder keeps it for microseconds, allocates nothing and calls no code of
/// the program.
fn lock() -> &'static Lock {
    &marks().hook_patch
}

pub(in crate::hook) fn install() -> Result<(), Error> {
    // Make the address space before the first bracket, because a bracket must not allocate.
    current_ref();
    let plan = plan::plan(prepare)?;
    // Reading takes long, and must not happen with the lock held.
    let now = Protections::read_if(COUNT.load(Ordering::Relaxed) == 0);
    let result = lock().with(|| {
        if COUNT.load(Ordering::Relaxed) == 0 {
            if let Err(error) =
                // SAFETY: each trampoline does what the replaced instruction did, and libc stays
                // loaded.
                unsafe {
                    code_pages::apply(plan.sites.iter().map(|site| site.patch(&now)), &plan.hidden)
                }
            {
                take_out(plan, &now);
                return Err(error);
            }
        }
        COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    result.map_err(|(call, error)| Error::Kernel {
        call,
        tid: None,
        source: io::Error::from_raw_os_error(error),
    })
}

pub(in crate::hook) fn remove() {
    let Some(plan) = plan::made() else { return };
    let now = Protections::read_if(COUNT.load(Ordering::Relaxed) == 1);
    lock().with(|| {
        if COUNT.fetch_sub(1, Ordering::Relaxed) == 1 {
            take_out(plan, &now);
        }
    });
}

pub(in crate::hook) fn status() -> Vec<Patch> {
    probe().unwrap_or_default()
}

pub(in crate::hook) fn probe() -> Result<Vec<Patch>, Error> {
    let is_installed = COUNT.load(Ordering::Relaxed) != 0;
    Ok(plan::plan(prepare)?
        .sites
        .iter()
        .map(|site| site.describe(is_installed))
        .collect())
}

fn take_out(plan: &Plan, now: &Protections) {
    // If the kernel refuses to replace a page, the page keeps its patch, which still works.
    // SAFETY: the instruction does what its trampoline does, except for the bracket, and libc stays
    // loaded.
    let _ = unsafe {
        code_pages::apply(
            plan.sites.iter().map(|site| site.restore(now)),
            &plan.hidden,
        )
    };
}

/// Prepares for the first patch. A second call does no harm.
fn prepare() {
    let _ = raw::membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE);
    // SAFETY: the handler is a function of this module, which is never unloaded.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

/// Runs in the child of a fork. If a thread of the parent was patching during the fork, it does not
/// exist in the child, so the patches may be incomplete.
extern "C" fn in_child() {
    // A client may subscribe while a call is under way, so the address space must exist before the
    // call.
    current_ref();
    let Some(plan) = plan::made() else { return };
    let is_installed = COUNT.load(Ordering::Relaxed) != 0;
    if plan.sites.iter().all(|site| site.is_settled(is_installed)) {
        return;
    }
    // A handler of a fork must not allocate: the pages lose their checks.
    let now = Protections::read_if(false);
    if is_installed {
        // SAFETY: each trampoline does what the replaced instruction did, and libc stays loaded.
        let _ = unsafe {
            code_pages::apply(plan.sites.iter().map(|site| site.patch(&now)), &plan.hidden)
        };
    } else {
        take_out(plan, &now);
    }
}
