//! Memory that stays in memory.
//!
//! # Safety
//! `mlock` and `munlock` change nothing that a program can see but time, whatever their arguments.

use crate::{Cause, Registrar};
use mmu_notifier::{PAGE_SIZE, VaRange};
use rustix::io::Errno;
use rustix::mm::{MsyncFlags, mlock, msync, munlock};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Locks memory with `mlock`, so that using it never waits for a page to be read.
///
/// The kernel does not count locks. Regions may overlap, so this does: a page is unlocked with its last region. Pages that the
/// program locks itself would be unlocked, too.
///
/// # Examples
/// ```
/// use regcache::{Device, Mlock, Options};
///
/// let device = Device::new(Mlock::new(), Options::new().max_bytes(1 << 20));
/// let cache = device.open(&mmu_source::current())?;
/// let secret = vec![7_u8; 100];
/// let locked = cache.get_for(&secret)?;
/// assert_eq!(device.registrar().locked_pages(), locked.range().pages() as usize);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Mlock {
    /// How many regions each page is in.
    pages: Mutex<BTreeMap<u64, u32>>,
}

impl Mlock {
    /// A registrar that has locked nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns how many pages are locked.
    #[must_use]
    pub fn locked_pages(&self) -> usize {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

fn pages(range: VaRange) -> impl Iterator<Item = u64> {
    let first = range.start().get() / PAGE_SIZE;
    first..first + range.pages()
}

fn place(page: u64) -> *mut c_void {
    std::ptr::without_provenance_mut((page * PAGE_SIZE) as usize)
}

impl Registrar for Mlock {
    type Handle = VaRange;
    type Error = io::Error;

    fn register(&self, range: VaRange) -> io::Result<VaRange> {
        let len = usize::try_from(range.pages().saturating_mul(PAGE_SIZE)).map_err(|_| Errno::NOMEM)?;
        let mut counts = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: No preconditions: module docs.
        if let Err(error) = unsafe { mlock(place(range.start().get() / PAGE_SIZE), len) } {
            // It may have locked the beginning.
            for page in pages(range).filter(|page| !counts.contains_key(page)) {
                // SAFETY: As above.
                let _ = unsafe { munlock(place(page), PAGE_SIZE as usize) };
            }
            // The same errno for a limit and for a hole. `msync` has it for a hole only, and does nothing else (since Linux 2.6.19).
            // SAFETY: As above.
            let probed = unsafe { msync(place(range.start().get() / PAGE_SIZE), len, MsyncFlags::ASYNC) };
            return Err(if probed == Err(Errno::NOMEM) { Errno::FAULT } else { error }.into());
        }
        pages(range).for_each(|page| *counts.entry(page).or_default() += 1);
        Ok(range)
    }

    fn deregister(&self, range: VaRange) {
        let mut counts = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for page in pages(range) {
            let Some(count) = counts.get_mut(&page) else { continue };
            *count -= 1;
            if *count == 0 {
                counts.remove(&page);
                // It fails if the page is not mapped any more, and then is not locked either.
                // SAFETY: As above.
                let _ = unsafe { munlock(place(page), PAGE_SIZE as usize) };
            }
        }
    }

    fn cause(&self, error: &io::Error) -> Cause {
        match Errno::from_io_error(error) {
            Some(Errno::NOMEM | Errno::AGAIN | Errno::PERM) => Cause::Limit,
            Some(Errno::FAULT) => Cause::NotMapped,
            _ => Cause::Other,
        }
    }
}
