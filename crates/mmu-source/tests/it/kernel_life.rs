//! The source `kernel` when descriptors are closed, in children, in signal handlers, and when it is
//! dropped at a bad moment.

use crate::memory::{Scratch, page_size};
use mmu_notifier::{InvalidateRange, Notifier, Registration, VaRange};
use mmu_source::kernel::Kernel;
use mmu_source::{Error, Watch, current};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use testkit::{Cap, has_timers, in_child, require, signal_every};

fn can_start() -> bool {
    require(Cap::Bpf) && require(Cap::Kvm)
}

fn discard(memory: &Scratch) {
    assert_eq!(
        // SAFETY: our own scratch memory.
        unsafe { libc::madvise(memory.page(0), page_size(), libc::MADV_DONTNEED) },
        0
    );
}

/// Returns the KVM and BPF files that this process has open, in the table of its first thread.
fn open_here() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("proc");
    let paths = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    paths
        .map(|path| path.display().to_string())
        .filter(|path| path.contains("kvm") || path.contains("bpf"))
        .collect()
}

/// Runs `close`, which closes or replaces all descriptors, and then opens files as the same
/// descriptors. Returns whether the source still works and has not touched these files.
fn goes_on_after(close: impl FnOnce()) -> bool {
    let kernel = Kernel::start().expect("it starts");
    let memory = Scratch::anonymous(1);
    let mut watch = kernel.watch(memory.range()).expect("a watch");
    let armed = kernel.arm(memory.range()).expect("armed");
    close();
    let files: Vec<_> = (0..40)
        .map(|_| std::fs::File::open("/dev/zero").expect("a file"))
        .collect();
    // The parent of this process changes memory at the same addresses, which the filter counts as
    // hits. So retry.
    let goes_on = (0..100).any(|_| {
        watch.renew().expect("it still works");
        let seq = armed.read_begin().expect("it still works");
        let settled = kernel.settle().expect("it still works");
        let was = watch.is_valid() && kernel.is_current(settled) && !armed.read_retry(seq);
        discard(&memory);
        assert!(!watch.is_valid() && !kernel.is_current(settled) && armed.read_retry(seq));
        was
    });
    let watches = (0..100).any(|_| {
        kernel
            .watch(memory.range())
            .is_ok_and(|watch| watch.is_valid())
    });
    drop((watch, armed, kernel));
    // SAFETY: `F_GETFD` takes integers and changes nothing.
    let open = files
        .iter()
        .all(|file| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) } >= 0);
    goes_on && watches && open
}

#[test]
fn closing_every_descriptor_does_not_blind_the_source() {
    if !can_start() {
        return;
    }
    assert!(in_child(|| goes_on_after(|| {
        assert_eq!(
            // SAFETY: takes integers. This child does not need its descriptors any more.
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) },
            0
        );
    })));
    unsafe extern "C" {
        fn closefrom(first: libc::c_int);
    }
    // SAFETY: takes an integer. The child does not need the closed descriptors any more.
    assert!(in_child(|| goes_on_after(|| unsafe { closefrom(3) })));
    assert!(in_child(|| goes_on_after(|| {
        let zero = std::fs::File::open("/dev/zero").expect("a file");
        for number in (3..200).filter(|number| *number != zero.as_raw_fd()) {
            // SAFETY: takes integers. The child does not need the replaced descriptor any more.
            assert!(unsafe { libc::dup2(zero.as_raw_fd(), number) } >= 0);
        }
    })));
}

/// Limits this process to descriptors below `most`.
fn limit_descriptors(most: u64) {
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: reads a local.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
}

#[test]
fn a_limit_of_descriptors_that_is_lowered_after_the_start_does_no_harm() {
    if !can_start() {
        return;
    }
    assert!(in_child(|| {
        let kernel = Kernel::start().expect("it starts");
        let memory = Scratch::anonymous(1);
        limit_descriptors(8);
        let armed = kernel
            .arm(memory.range())
            .expect("there is a place for a machine");
        discard(&memory);
        armed.read_begin().is_ok() && kernel.waits().1 > 0
    }));
}

#[test]
fn a_start_without_descriptors_says_so() {
    if !can_start() {
        return;
    }
    for most in 3..24 {
        assert!(
            in_child(move || {
                limit_descriptors(most);
                let Err(error) = Kernel::start() else {
                    return most > 8;
                };
                let is_told = match &error {
                    Error::Unavailable { remedy, .. } => remedy.starts_with("ulimit -n"),
                    error => error.hint().is_some_and(|hint| hint.contains("ulimit -n")),
                };
                assert!(is_told, "{error:?}");
                true
            }),
            "{most}"
        );
    }
}

#[test]
fn a_child_inherits_nothing_and_says_so() {
    if !can_start() {
        return;
    }
    let kernel = Kernel::start().expect("it starts");
    let memory = Scratch::anonymous(1);
    let mut watch = kernel.watch(memory.range()).expect("a watch");
    assert!(open_here().is_empty(), "{:?}", open_here());
    assert!(in_child(|| {
        let blind = kernel.is_inherited() && !watch.is_valid();
        let refused = matches!(watch.renew(), Err(Error::AfterFork { .. }));
        let own = Kernel::start().expect("one call is enough");
        let mut fresh = own.watch(memory.range()).expect("a watch");
        // The forks of other tests write-protect the parent's page at the same address, which the
        // filter counts as a hit. So retry.
        let watches = (0..100).any(|_| fresh.renew().is_ok() && fresh.is_valid());
        blind && refused && !own.is_inherited() && watches && open_here().is_empty()
    }));
    assert!(
        watch.is_valid() || watch.renew().is_ok(),
        "the fork was a change"
    );
}

#[test]
fn a_watch_is_touched_by_changes_of_its_range_alone() {
    if !can_start() {
        return;
    }
    let kernel = Kernel::start().expect("it starts");
    let (one, other) = (Scratch::anonymous(1), Scratch::anonymous(1));
    let mut watches = [&one, &other].map(|memory| kernel.watch(memory.range()).expect("a watch"));
    // Other tests fork at the same time, and a fork changes everything. So retry.
    let is_so = (0..100).any(|_| {
        watches
            .iter_mut()
            .for_each(|watch| watch.renew().expect("no fork of this thread"));
        // More events than a watch examines in the ring.
        let is_valid = (0..7).all(|_| {
            discard(&other);
            watches[0].is_valid()
        });
        assert!(!watches[1].is_valid());
        discard(&one);
        assert!((0..3).all(|_| !watches[0].is_valid()), "once and for all");
        is_valid
    });
    assert!(is_so);
    let mut bracketed = Watch::new(one.range()).expect("outside of brackets");
    bracketed.renew().expect("no fork of this thread");
    drop(current().invalidate(one.range(), mmu_notifier::Event::Unmap));
    assert!(!bracketed.is_valid());
}

/// Takes a lock in each callback for one range.
struct Locks {
    about: VaRange,
    lock: Arc<Mutex<()>>,
    entered: Mutex<mpsc::Sender<()>>,
}

impl Notifier for Locks {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if range.range().overlaps(self.about) {
            let _ = self
                .entered
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .send(());
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[test]
fn the_last_handle_can_be_dropped_under_a_lock_that_callbacks_take() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(page_size()).expect("BPF is there");
    let memory = Scratch::anonymous(1);
    let (sender, entered) = mpsc::channel();
    let lock = Arc::new(Mutex::new(()));
    let locks = Locks {
        about: memory.range(),
        lock: Arc::clone(&lock),
        entered: Mutex::new(sender),
    };
    let locks = Registration::new(&current(), locks)
        .map_err(|error| error.error)
        .expect("outside of brackets");
    let armed = kernel.arm(memory.range()).expect("armed");
    let held = lock.lock().expect("no panic");
    let at = memory.range().start().get();
    kernel.inject(at, at + page_size() as u64).expect("it runs");
    entered
        .recv()
        .expect("the source's own thread is in the callback");
    drop(kernel);
    drop(armed);
    drop(held);
    assert!(locks.unregister().is_ok());
}

static ASKED: AtomicU64 = AtomicU64::new(0);
static SOURCE: std::sync::OnceLock<Arc<Kernel>> = std::sync::OnceLock::new();
static WATCH: std::sync::OnceLock<Watch> = std::sync::OnceLock::new();

#[test]
fn a_signal_handler_may_check_watches_and_generations() {
    if !can_start() || !has_timers() {
        return;
    }
    extern "C" fn handler(_: i32) {
        if let Some(kernel) = SOURCE.get() {
            // The handler may interrupt this thread while it takes records in or runs callbacks,
            // and must not disturb that.
            let _ = WATCH.get().map(Watch::is_valid);
            let _ = kernel.is_settled();
            ASKED.fetch_add(1, Ordering::Relaxed);
        }
    }
    assert!(in_child(|| {
        let kernel = Kernel::start().expect("it starts");
        let _ = SOURCE.set(Arc::clone(&kernel));
        let memory = Scratch::anonymous(1);
        let watch = WATCH.get_or_init(|| kernel.watch(memory.range()).expect("armed"));
        // SAFETY: the handler makes only calls that are allowed in a signal handler.
        unsafe { libc::signal(libc::SIGUSR1, handler as *const () as usize) };
        signal_every(Duration::from_micros(100), libc::SIGUSR1).expect("a timer");
        while ASKED.load(Ordering::Relaxed) < 5_000 {
            memory.write(0, 1);
            discard(&memory);
            let _ = (watch.is_valid(), kernel.settle());
        }
        true
    }));
}

#[test]
fn threads_come_to_rest_after_the_start_and_a_child_does_not_wait_for_them() {
    if !can_start() {
        return;
    }
    let kernel = Kernel::start().expect("it starts");
    // These threads do not exist in the child, and in the parent they may not have finished before
    // the fork.
    assert!(in_child(|| {
        kernel.wait_for_threads();
        true
    }));
    kernel.wait_for_threads();
}

/// Runs `f` until a run begins no wait. Returns false if that does not happen.
fn passes_without_a_wait(kernel: &Kernel, f: impl Fn()) -> bool {
    (0..20_000).any(|_| {
        let before = kernel.waits().0;
        f();
        kernel.waits().0 == before
    })
}

/// Since Linux 7.0 the kernel can skip the source's program. The source then reports a loss within
/// a second.
fn has_skipped(kernel: &Kernel, lost: u64) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    mmu_source::kernel::probe().expect("it runs").may_skip
        && std::iter::repeat_with(|| std::thread::sleep(Duration::from_millis(10)))
            .take_while(|()| Instant::now() < deadline)
            .any(|()| kernel.lost() != lost)
}

#[test]
fn a_thread_waits_for_the_changes_of_others_and_not_for_its_own() {
    if !can_start() {
        return;
    }
    assert!(in_child(|| {
        let kernel = Kernel::start().expect("it starts");
        let arm = |memory: &Scratch| drop(kernel.arm(memory.range()).expect("armed"));
        let own = || {
            let memory = Scratch::anonymous(1);
            discard(&memory);
            arm(&memory);
        };
        if !passes_without_a_wait(&kernel, own) {
            let (waits, machines) = kernel.waits();
            println!("SKIP: {waits} waits made {machines} machines: the count cannot be read");
            return waits == machines;
        }
        let memory = Scratch::anonymous(1);
        // Each round makes a change in another thread, which is over when the thread ends. In most
        // rounds this thread makes none.
        (0..100).all(|_| {
            let (before, lost) = (kernel.waits().0, kernel.lost());
            let other = std::thread::spawn(|| discard(&Scratch::anonymous(1)));
            other.join().expect("no panic");
            arm(&memory);
            kernel.waits().0 != before || has_skipped(&kernel, lost)
        })
    }));
}
