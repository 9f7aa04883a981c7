//! A registrar that locks memory, so that it is never paged out.
//!
//! # Safety
//! `mlock`, `munlock` and `msync(MS_ASYNC)` do not change the content or the protection of memory,
//! whatever their arguments.

use crate::{Cause, Registrar};
use mmu_notifier::VaRange;
use rustix::io::Errno;
use rustix::mm::{MsyncFlags, mlock, msync, munlock};
use rustix::param::page_size;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Locks memory with `mlock`, so that no access waits for a page to be read.
///
/// The kernel does not count how often a page was locked: one `munlock` undoes all locks. Regions
/// may overlap, so this registrar counts the regions of each page, and unlocks the page when its
/// last region is deregistered. If the program itself has locked such a page, that lock is lost
/// too.
///
/// # Signal handlers
///
/// `Mlock` is not for signal handlers: it takes a lock and allocates, so it would wait for the code
/// that the handler has interrupted. A handler calls
/// [`RegCache::get_cached`](crate::RegCache::get_cached) and
/// [`Lease::end_later`](crate::Lease::end_later), which never call the registrar.
///
/// # Examples
/// ```
/// use regcache::{Device, Mlock, Options};
///
/// let device = Device::new(Mlock::new(), Options::new().max_bytes(1 << 20));
/// let cache = device.open(&mmu_source::current())?;
/// let secret = vec![7_u8; 100];
/// let locked = cache.get_for(&secret)?;
/// let pages = device.registrar().locked_pages();
/// assert!((1..=2).contains(&pages), "100 bytes lie in one page or in two");
/// drop(locked);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Mlock {
    /// The number of regions that contain each page.
    pages: Mutex<BTreeMap<u64, u32>>,
}

impl Mlock {
    /// Makes a registrar that has locked nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of locked kernel pages. A kernel page has 16 or 64 KiB on some machines.
    #[must_use]
    pub fn locked_pages(&self) -> usize {
        self.pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}

/// Unlocks those of `pages` that are in no region, with one system call for each contiguous run.
fn unlock_others(pages: Range<u64>, counts: &BTreeMap<u64, u32>) {
    let mut from = pages.start;
    for page in counts
        .range(pages.clone())
        .map(|(page, _)| *page)
        .chain([pages.end])
    {
        if from < page {
            // SAFETY: the call has no preconditions: see the module docs.
            let _ = unsafe { munlock(place(from), bytes(&(from..page))) };
        }
        from = page + 1;
    }
}

/// Returns the kernel pages of a range. A kernel page may be larger than the range's granules, and
/// `mlock` locks whole kernel pages.
fn pages(range: VaRange) -> Range<u64> {
    let size = page_size() as u64;
    range.start().get() / size..range.last().get() / size + 1
}

/// Returns the length of `pages` in bytes. The length is at most one page less than the whole
/// address space, because the kernel's rounding of a greater length would overflow to zero.
fn bytes(pages: &Range<u64>) -> usize {
    let all = u64::MAX / page_size() as u64;
    ((pages.end - pages.start).min(all) as usize) * page_size()
}

fn place(page: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(page as usize * page_size())
}

impl Registrar for Mlock {
    type Handle = VaRange;
    type Error = io::Error;

    fn register(&self, range: VaRange) -> io::Result<VaRange> {
        let (start, len) = (place(pages(range).start), bytes(&pages(range)));
        let mut counts = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        // `mlock` returns `ENOMEM` both for a limit and for a hole. `msync` returns `ENOMEM` only
        // for a hole, and has no other effect (since Linux 2.6.19).
        // SAFETY: the call has no preconditions: see the module docs.
        if unsafe { msync(start, len, MsyncFlags::ASYNC) } == Err(Errno::NOMEM) {
            return Err(Errno::FAULT.into());
        }
        // SAFETY: the call has no preconditions: see the module docs.
        if let Err(error) = unsafe { mlock(start, len) } {
            // `mlock` may have locked the first pages before it failed.
            unlock_others(pages(range), &counts);
            return Err(error.into());
        }
        pages(range).for_each(|page| *counts.entry(page).or_default() += 1);
        Ok(range)
    }

    fn deregister(&self, range: VaRange) {
        let mut counts = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for page in pages(range) {
            let Some(count) = counts.get_mut(&page) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                counts.remove(&page);
                // If the page is not mapped any more, the call fails, and the page is not locked
                // either.
                // SAFETY: the call has no preconditions: see the module docs.
                let _ = unsafe { munlock(place(page), page_size()) };
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
