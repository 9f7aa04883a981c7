//! Runs one callback and handles its panic.

use super::callback::{Function, Head};
use super::current;
use super::state::State;
use crate::sync::Ordering;
use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicPtr;

/// Calls a callback of the domain. If it panics, counts and reports the panic.
///
/// # Safety
/// The callback was just taken from the batch of `state`.
pub(super) unsafe fn run((head, function): (NonNull<Head>, Function), state: &State) {
    current::with_callback_of(state, || {
        // SAFETY: the code that queued the head promised that this call is sound, once. The batch
        // hands each head out once.
        let call = AssertUnwindSafe(|| unsafe { function(head) });
        if let Err(payload) = panic::catch_unwind(call) {
            state.pending.panics.fetch_add(1, Ordering::Relaxed);
            report(payload);
        }
    });
}

/// The hook of [`set_callback_panic_hook`], a `PanicHook` as a pointer. Null if there is none.
static HOOK: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

type PanicHook = fn(&(dyn Any + Send));

/// Sets the function that the reclaimer calls with the payload of a callback's panic. The
/// function replaces an earlier one.
///
/// By then the panic has been caught and counted
/// ([`Srcu::callback_panics`](crate::Srcu::callback_panics)), and the standard panic hook has
/// printed it. The next callbacks run when the hook returns. A panic of the hook itself is ignored.
pub fn set_callback_panic_hook(hook: fn(payload: &(dyn Any + Send))) {
    let hook: PanicHook = hook;
    // Relaxed: a function pointer publishes no data.
    HOOK.store(hook as *mut (), Ordering::Relaxed);
}

#[cold]
fn report(payload: Box<dyn Any + Send>) {
    let hook = HOOK.load(Ordering::Relaxed);
    let reported = panic::catch_unwind(AssertUnwindSafe(|| {
        if !hook.is_null() {
            // SAFETY: the pointer must be a `PanicHook`. Only `set_callback_panic_hook` stores one,
            // and it stores a `PanicHook`.
            let hook = unsafe { std::mem::transmute::<*mut (), PanicHook>(hook) };
            hook(&*payload);
        }
        drop(payload);
    }));
    let dropped =
        reported.or_else(|payload| panic::catch_unwind(AssertUnwindSafe(|| drop(payload))));
    if let Err(payload) = dropped {
        // Forget this payload, of a panic in the drop above: dropping it could panic again.
        std::mem::forget(payload);
    }
}
