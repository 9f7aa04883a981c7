//! The accesses of each user come before the free, and before the `release` of exit.

use crate::model;
use loom::sync::Arc;
use loom::thread;
use mmu_notifier::{Mm, MmWithUser, Notifier, Subsystem};

/// A value that every user reads and the drop writes. `loom` reports a free that is not ordered
/// after each use.
struct Touched(loom::cell::UnsafeCell<bool>);

// SAFETY: Threads share the cell on purpose, and `loom` checks that no two accesses race.
unsafe impl Sync for Touched {}

impl Touched {
    fn touch(&self) {
        // SAFETY: No thread may write while a user is left. The model checks exactly this.
        assert!(
            self.0.with(|alive| unsafe { *alive }),
            "used after it was freed"
        );
    }
}

impl Notifier for Touched {
    fn release(&self, _mm: &Mm) {
        self.touch();
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        // SAFETY: No user may be left. The model checks exactly this.
        self.0.with_mut(|alive| unsafe { *alive = false });
    }
}

#[test]
fn s_28_the_free_comes_after_every_putters_last_use() {
    model(|| {
        let mm = MmWithUser::new();
        let subsystem =
            Subsystem::<Touched>::new(|_| Ok(Touched(loom::cell::UnsafeCell::new(true))));
        let held = subsystem.get(&mm).unwrap();
        let other = held.try_clone().unwrap();
        let putter = thread::spawn(move || {
            other.touch();
            other.put();
        });
        held.touch();
        held.put();
        mm.run_deferred();
        putter.join().unwrap();
        mm.run_deferred();
        assert_eq!(mm.callback_panics(), 0);
    });
}

#[test]
fn s_40_release_sees_the_writes_of_every_user() {
    model(|| {
        let mm = MmWithUser::new();
        let handle = (*mm).clone();
        let subsystem =
            Subsystem::<Touched>::new(|_| Ok(Touched(loom::cell::UnsafeCell::new(true))));
        let held = Arc::new(subsystem.get(&mm).unwrap());
        let user = thread::spawn({
            let (mm, held) = (mm.clone(), Arc::clone(&held));
            move || {
                // SAFETY: No other thread uses the cell before exit, and this user delays exit.
                held.0.with_mut(|alive| unsafe { *alive = true });
                drop(mm);
            }
        });
        drop(mm);
        user.join().unwrap();
        drop(held);
        handle.run_deferred();
        assert_eq!(handle.callback_panics(), 0);
    });
}
