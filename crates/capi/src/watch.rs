//! `struct mmun_watch`.

use crate::args;
use crate::border::{Uncancelled, export};
use crate::error::{fail, of_source};
use crate::sources::{Mmun, code, share};
use libc::{c_int, c_void};
use mmu_notifier::{Va, VaRange};
use mmu_source::Watch;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `struct mmun_watch`.
#[derive(Debug)]
pub struct Watched {
    watch: Watch,
    mmun: Arc<Mmun>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.mmun.watches.fetch_sub(1, Ordering::Relaxed);
    }
}

export! {
    /// Starts a watch of `length` bytes at `address`.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_watch(mmun: *const Mmun, address: *const c_void, length: usize, watch: *mut *mut Watched) -> c_int {
        let _whole = Uncancelled::enter();
        code((|| {
            // SAFETY: `watch` is null or a variable of the caller (crate docs, Pointers).
            let place = unsafe { args::result(watch) }?;
            // SAFETY: `mmun` is null or open (crate docs, Handles).
            let mmun = unsafe { share(mmun) }?;
            let range = VaRange::covering(Va::from_ptr(address), length as u64);
            let range = range.map_err(|_| {
                fail(
                    -libc::EINVAL,
                    if length == 0 {
                        c"mmun_watch(): length is 0"
                    } else {
                        c"mmun_watch(): address + length is beyond the end of the address space"
                    },
                )
            })?;
            mmun.may_wait()?;
            let watch = match &mmun.kernel {
                Some(kernel) => kernel.watch(range),
                None => Watch::new(range),
            };
            let watch = watch.map_err(|error| of_source(&error))?;
            mmun.watches.fetch_add(1, Ordering::Relaxed);
            *place = Box::into_raw(Box::new(Watched { watch, mmun }));
            Ok(())
        })())
    }

    /// Tells whether the range is unchanged since the watch was made or renewed.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_watch_valid(watch: *const Watched) -> bool {
        // SAFETY: `watch` is null or a watch that has not ended (crate docs, Handles).
        unsafe { watch.as_ref() }.is_some_and(|watched| watched.watch.is_valid())
    }

    /// Makes the watch valid again.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_watch_renew(watch: *mut Watched) -> c_int {
        let _whole = Uncancelled::enter();
        // SAFETY: `watch` is null or a watch that has not ended. The header demands that no other
        // thread uses the watch meanwhile.
        let Some(watched) = (unsafe { watch.as_mut() }) else {
            return fail(-libc::EINVAL, c"mmun_watch_renew(): watch is null");
        };
        code(watched.mmun.may_wait().and_then(|()| {
            watched.watch.renew().map_err(|error| of_source(&error))
        }))
    }

    /// Ends the watch and frees it.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_unwatch(watch: *mut Watched) {
        let _whole = Uncancelled::enter();
        if !watch.is_null() {
            // SAFETY: The pointer came from `Box::into_raw` in `mmun_watch`, and the caller does
            // not use the watch any more (crate docs, Handles).
            drop(unsafe { Box::from_raw(watch) });
        }
    }
}
