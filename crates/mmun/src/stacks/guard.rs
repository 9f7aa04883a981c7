//! Catches panics of the readers of ELF, DWARF and unwind tables. On a malformed file the readers
//! can panic, for example by an overflow. Such a panic must neither end the trace nor print a
//! message.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `read`; `None` if it panicked. After a panic, data that `read` has changed may be
/// inconsistent.
pub(super) fn guarded<T>(read: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if !IS_QUIET.get() {
                before(info);
            }
        }));
    });
    let was_quiet = IS_QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    IS_QUIET.set(was_quiet);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_inside_is_silent_and_a_later_one_outside_is_printed() {
        assert_eq!(guarded(|| 7), Some(7));
        assert_eq!(guarded(|| -> u32 { panic!("not shown") }), None);
        assert_eq!(
            guarded(|| guarded(|| -> u32 { panic!("nor this") })),
            Some(None)
        );
        assert!(!IS_QUIET.get());
    }
}
