//! `struct mmun_subscription`: callbacks of a cache on this process's address space.

use crate::args::{self, Growing};
use crate::border::{Uncancelled, export, guarded};
use crate::error::{IN_CALLBACK, INVALID, fail, of_source};
use crate::range::{bounds, code as event};
use crate::sources::{Mmun, code, share};
use libc::{c_int, c_void};
use mmu_notifier::{InvalidateRange, Notifier, Registration, UnregisterError, VaRange};
use mmu_source::kernel::{Armed, Kernel};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `struct mmun_change`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Change {
    size: usize,
    start: usize,
    end: usize,
    event: u32,
    cause: u32,
}

type Callback = Option<unsafe extern "C-unwind" fn(*mut c_void, *const Change)>;

/// `struct mmun_ops`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Ops {
    size: usize,
    start: Callback,
    end: Callback,
}

// SAFETY: The type is `repr(C)` and begins with a `usize`. Each callback is null, which is `None`,
// or follows its prototype (crate docs, Callbacks).
unsafe impl Growing for Ops {
    const FIRST: usize = 24;
}

/// `enum mmun_cause`.
const BRACKET: u32 = 0;
const TOLD: u32 = 1;

struct Callbacks {
    context: *mut c_void,
    start: Callback,
    end: Callback,
    /// Whether the kernel source is open. Its callbacks run after the change has begun.
    by_kernel: bool,
}

// SAFETY: The callbacks may run on any thread, in parallel, with the context (crate docs,
// Callbacks).
unsafe impl Send for Callbacks {}
// SAFETY: As for `Send`.
unsafe impl Sync for Callbacks {}

impl Callbacks {
    #[inline(always)]
    fn change(&self, range: &InvalidateRange<'_>) -> Change {
        let (start, end) = bounds(range.range());
        Change {
            size: size_of::<Change>(),
            start: start as usize,
            end: end as usize,
            event: event(range.event()),
            cause: if self.by_kernel && Kernel::is_telling() {
                TOLD
            } else {
                BRACKET
            },
        }
    }
}

impl Notifier for Callbacks {
    #[inline(always)]
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if let Some(start) = self.start {
            // SAFETY: The function follows its prototype (crate docs, Callbacks), and gets the
            // context that the program has given with it.
            guarded!("mmun_ops.start", unsafe {
                start(self.context, &self.change(range))
            });
        }
    }

    #[inline(always)]
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        if let Some(end) = self.end {
            // SAFETY: The function follows its prototype (crate docs, Callbacks), and gets the
            // context that the program has given with it.
            guarded!("mmun_ops.end", unsafe {
                end(self.context, &self.change(range))
            });
        }
    }
}

/// `struct mmun_subscription`.
pub struct Subscription {
    registration: Registration<Callbacks>,
    armed: Option<Armed>,
    mmun: Arc<Mmun>,
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription")
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

fn subscribe(mmun: Arc<Mmun>, ops: &Ops, context: *mut c_void) -> Result<Subscription, c_int> {
    mmun.may_wait()?;
    let callbacks = Callbacks {
        context,
        start: ops.start,
        end: ops.end,
        by_kernel: mmun.kernel.is_some(),
    };
    let refused = |_| fail(-libc::EDEADLK, IN_CALLBACK);
    let registration = Registration::new(mmun.mm, callbacks).map_err(refused)?;
    let armed = mmun
        .kernel
        .as_ref()
        .map(|kernel| kernel.arm(VaRange::ALL))
        .transpose();
    match armed {
        Ok(armed) => {
            mmun.subscriptions.fetch_add(1, Ordering::Relaxed);
            Ok(Subscription {
                registration,
                armed,
                mmun,
            })
        }
        Err(error) => {
            // `unregister` cannot fail, because this thread has opened no bracket since it
            // registered.
            let _ = registration.unregister();
            Err(of_source(&error))
        }
    }
}

/// Ends a subscription. If this thread must not wait, returns the unchanged subscription.
fn unsubscribe(subscription: Subscription) -> Result<(), Subscription> {
    let Subscription {
        registration,
        armed,
        mmun,
    } = subscription;
    if mmun.mm.is_inherited() {
        // The registration belongs to the parent. No thread of the child runs its callbacks, so
        // there is nothing to wait for.
        drop(registration);
    } else if let Err(UnregisterError { registration, .. }) = registration.unregister() {
        return Err(Subscription {
            registration,
            armed,
            mmun,
        });
    }
    mmun.subscriptions.fetch_sub(1, Ordering::Relaxed);
    drop(armed);
    Ok(())
}

export! {
    /// Subscribes.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_subscribe(
        mmun: *const Mmun,
        ops: *const Ops,
        context: *mut c_void,
        subscription: *mut *mut Subscription,
    ) -> c_int {
        let _whole = Uncancelled::enter();
        code((|| {
            // SAFETY: `ops` is null or begins with its size (crate docs, Pointers).
            let ops = unsafe { args::read(ops) };
            // SAFETY: `subscription` is null or a variable of the caller (crate docs, Pointers).
            let place = unsafe { args::result(subscription) }?;
            let ops = ops?;
            // SAFETY: `mmun` is null or open (crate docs, Handles).
            let mmun = unsafe { share(mmun) }?;
            *place = Box::into_raw(Box::new(subscribe(mmun, &ops, context)?));
            Ok(())
        })())
    }

    /// Unsubscribes.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_unsubscribe(subscription: *mut Subscription) -> c_int {
        let _whole = Uncancelled::enter();
        if subscription.is_null() {
            return fail(-libc::EINVAL, INVALID);
        }
        // SAFETY: The pointer came from `Box::into_raw` in `mmun_subscribe`, and no other thread
        // uses a subscription that is being ended (crate docs, Handles).
        let taken = unsafe { subscription.read() };
        match unsubscribe(taken) {
            Ok(()) => {
                // SAFETY: The content of the box was moved out above, and `MaybeUninit` drops no
                // content. So this frees only the memory.
                drop(unsafe { Box::from_raw(subscription.cast::<std::mem::MaybeUninit<Subscription>>()) });
                0
            }
            Err(kept) => {
                // SAFETY: The box is still allocated, and its content was moved out above.
                unsafe { subscription.write(kept) };
                fail(-libc::EDEADLK, IN_CALLBACK)
            }
        }
    }
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Change>() == 32 && size_of::<Ops>() == Ops::FIRST);

crate::layout::layout! {
    "mmun_change" = Change { size, start, end, event, cause }
    "mmun_ops" = Ops { size, start, end }
}
