//! What a callback may do: put, get a subscription that exists, map and unmap. It may also change
//! `errno`.

use crate::pages::{at, discard, errno, map, page_size, unmap};
use mmu_notifier::{InvalidateRange, Notifier, Registration, Subscription, Subsystem, VaRange};
use mmu_source::hook::Hook;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Debug, Default)]
struct Quiet;

impl Notifier for Quiet {}

static QUIET: Subsystem<Quiet> = Subsystem::new(|_| Ok(Quiet));

/// The callbacks for the watched range do everything that a callback may do.
#[derive(Debug, Default)]
struct Busy {
    watched: AtomicU64,
    inner: AtomicU64,
    /// The callback puts this subscription.
    held: Mutex<Option<Subscription<Quiet>>>,
    starts: AtomicUsize,
    ends: AtomicUsize,
    inner_starts: AtomicUsize,
}

impl Notifier for Busy {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if contains(range.range(), &self.inner) {
            self.inner_starts.fetch_add(1, Ordering::Relaxed);
        }
        if !contains(range.range(), &self.watched) {
            return;
        }
        self.starts.fetch_add(1, Ordering::Relaxed);
        // Get the subscription that exists, because inside a bracket a new one cannot be made.
        let mm = range.mm().mmget_not_zero().expect("it is alive");
        let again = QUIET.get(&mm).expect("the subscription exists");
        again.put();
        drop(self.held.lock().expect("no panic").take());
        let inner = map(1, 1);
        self.inner.store(inner as u64, Ordering::Relaxed);
        discard(inner, 1);
        unmap(inner, 1);
        // Leave an error in `errno`.
        // SAFETY: the kernel refuses a misaligned address.
        assert_eq!(unsafe { libc::munmap(at(1), page_size()) }, -1);
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        if contains(range.range(), &self.watched) {
            self.ends.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the descriptor is invalid, so nothing is closed.
            assert_eq!(unsafe { libc::close(-1) }, -1);
        }
    }
}

fn contains(range: VaRange, address: &AtomicU64) -> bool {
    range.contains(mmu_notifier::Va::new(address.load(Ordering::Relaxed)))
}

#[test]
fn a_callback_puts_subscribes_maps_and_unmaps() {
    let mm = mmu_source::current();
    let first = QUIET.get(&mm).expect("subscribes");
    let second = first.try_clone().expect("far from full");
    let busy = Registration::new(&mm, Busy::default()).expect("registers");
    *busy.held.lock().expect("no panic") = Some(second);
    let hook = Hook::install().expect("the hook works on this machine");
    let pages = map(1, 0);
    busy.watched.store(pages as u64, Ordering::Relaxed);
    // SAFETY: the descriptor is invalid, so nothing is closed. It leaves EBADF in `errno`, and a
    // later call that succeeds must not change that.
    assert_eq!(unsafe { libc::close(-1) }, -1);
    unmap(pages, 1);
    assert_eq!(
        errno(),
        libc::EBADF,
        "the callback's own errors are not seen"
    );
    busy.watched.store(0, Ordering::Relaxed);
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    assert_eq!((count(&busy.starts), count(&busy.ends)), (1, 1));
    assert!(
        count(&busy.inner_starts) >= 2,
        "the calls of the callback have brackets of their own"
    );
    assert_eq!(first.users(), 1, "what was put in the callback is put");
    drop(hook);
}

#[test]
fn a_callback_may_unsubscribe_itself() {
    /// Holds its own subscription, and puts it at the first call.
    #[derive(Debug, Default)]
    struct Once {
        own: Mutex<Option<Subscription<Once>>>,
        dropped: Option<Arc<AtomicUsize>>,
    }
    impl Notifier for Once {
        fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
            drop(self.own.lock().expect("no panic").take());
        }
    }
    impl Drop for Once {
        fn drop(&mut self) {
            if let Some(dropped) = &self.dropped {
                dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let tell = dropped.clone();
    let kind = Subsystem::<Once, std::convert::Infallible, _>::new(move |_: &_| {
        Ok(Once {
            own: Mutex::default(),
            dropped: Some(tell.clone()),
        })
    });
    let hook = Hook::install().expect("the hook works on this machine");
    let subscription = kind.get(&mmu_source::current()).expect("subscribes");
    let own = subscription.try_clone().expect("far from full");
    *subscription.own.lock().expect("no panic") = Some(own);
    drop(subscription);
    unmap(map(1, 0), 1);
    kind.synchronize().expect("outside of callbacks");
    assert_eq!(dropped.load(Ordering::Relaxed), 1);
    drop(hook);
}
