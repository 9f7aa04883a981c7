//! The source `kernel`: many ways to change a translation, losses, forks, and a search for stale
//! reads.

use crate::memory::{Log, Scratch, memory_file, page_size};
use mmu_notifier::{Va, VaRange};
use mmu_source::kernel::Kernel;
use mmu_source::{Error, current};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use testkit::{Cap, in_child, require};

#[path = "../../../../stress/src/kernel/hunt.rs"]
mod hunt;
#[path = "../../../../stress/src/kernel/pages.rs"]
mod pages;

fn start() -> Option<Arc<Kernel>> {
    (require(Cap::Bpf) && require(Cap::Kvm))
        .then(|| Kernel::start().expect("KVM and BPF are there"))
}

fn rehearse(ring: usize) -> Option<Arc<Kernel>> {
    require(Cap::Bpf).then(|| Kernel::rehearse(ring).expect("BPF is there"))
}

/// Arms `memory`, runs `change`, and checks that a subscriber was notified of a part of the memory.
fn told(kernel: &Arc<Kernel>, name: &str, memory: Scratch, change: impl FnOnce(&Scratch)) {
    let log = Log::about(&current(), memory.range());
    let armed = kernel.arm(memory.range()).expect("armed");
    let seq = armed.read_begin().expect("no fork");
    log.take();
    change(&memory);
    assert!(
        armed.read_retry(seq),
        "{name}: the generation has not moved"
    );
    _ = kernel.settle().expect("no fork");
    assert!(!log.take().is_empty(), "{name}: no subscriber was told");
    drop(armed);
    // Another thread may have mapped memory where the change has unmapped it.
    std::mem::forget(memory);
    drop(log.unregister().expect("outside of brackets"));
}

fn advise(memory: &Scratch, advice: i32) {
    // SAFETY: the test's own scratch memory.
    let result = unsafe { libc::madvise(memory.page(0), memory.bytes, advice) };
    assert_eq!(
        result,
        0,
        "madvise {advice}: {}",
        std::io::Error::last_os_error()
    );
}

#[test]
fn every_change_by_this_process_is_reported() {
    let Some(kernel) = start() else { return };
    let private = || Scratch::anonymous(4);
    told(&kernel, "munmap", private(), |memory| {
        // SAFETY: our own scratch memory.
        unsafe { libc::munmap(memory.page(1), page_size()) };
    });
    told(
        &kernel,
        "munmap as a bare instruction",
        private(),
        |memory| {
            let result: i64;
            // SAFETY: munmap of our own scratch memory; the registers that the instruction destroys
            // are named.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                std::arch::asm!("syscall", inlateout("rax") libc::SYS_munmap => result, in("rdi") memory.page(1), in("rsi") page_size(),
                out("rcx") _, out("r11") _);
            }
            // SAFETY: unmaps our own scratch memory. The kernel changes no register except `x0`.
            #[cfg(target_arch = "aarch64")]
            unsafe {
                std::arch::asm!("svc #0", in("x8") libc::SYS_munmap, inlateout("x0") memory.page(1) => result, in("x1") page_size());
            }
            assert_eq!(result, 0);
        },
    );
    told(&kernel, "mmap over it", private(), |memory| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: over our own scratch memory.
        unsafe { libc::mmap(memory.page(2), page_size(), libc::PROT_READ, flags, -1, 0) };
    });
    told(&kernel, "mremap", private(), |memory| {
        // SAFETY: moves our own scratch memory to an address that the kernel chooses.
        unsafe {
            libc::mremap(
                memory.page(0),
                4 * page_size(),
                4096 * page_size(),
                libc::MREMAP_MAYMOVE,
            )
        };
    });
    told(&kernel, "mremap onto it", private(), |memory| {
        let source = private();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: moves scratch memory over scratch memory.
        unsafe {
            libc::mremap(
                source.page(0),
                page_size(),
                page_size(),
                flags,
                memory.page(3),
            )
        };
    });
    told(&kernel, "mprotect", private(), |memory| {
        // SAFETY: our own scratch memory, which no code writes any more.
        unsafe { libc::mprotect(memory.page(0), page_size(), libc::PROT_READ) };
    });
    told(&kernel, "MADV_DONTNEED", private(), |memory| {
        advise(memory, libc::MADV_DONTNEED)
    });
    told(&kernel, "MADV_FREE", private(), |memory| {
        advise(memory, libc::MADV_FREE)
    });
    let file = memory_file(4);
    let shared = || Scratch::map(4, libc::MAP_SHARED, file.as_raw_fd()).expect("mmap");
    told(&kernel, "MADV_REMOVE", shared(), |memory| {
        advise(memory, libc::MADV_REMOVE)
    });
    told(&kernel, "ftruncate", shared(), |_| {
        // SAFETY: takes integers. No code reads the mapping of the removed pages any more.
        unsafe { libc::ftruncate(file.as_raw_fd(), 0) };
    });
}

#[test]
fn a_change_by_a_ring_is_reported() {
    let Some(kernel) = start() else { return };
    if !require(Cap::IoUring) {
        return;
    }
    let mut ring = io_uring::IoUring::new(2).expect("a ring");
    told(
        &kernel,
        "MADV_DONTNEED by io_uring",
        Scratch::anonymous(4),
        |memory| {
            let advice = io_uring::opcode::Madvise::new(
                memory.page(0),
                memory.bytes as libc::off_t,
                libc::MADV_DONTNEED,
            );
            // SAFETY: the test owns the memory, and needs none of its content.
            unsafe { ring.submission().push(&advice.build()) }.expect("there is room");
            ring.submit_and_wait(1).expect("it is submitted");
            assert_eq!(
                ring.completion().next().expect("it has completed").result(),
                0
            );
        },
    );
}

/// Another process may only page out memory that is not shared. So the memory is mapped after the
/// fork.
#[test]
fn advice_by_another_process_is_reported() {
    let Some(kernel) = start() else { return };
    // SAFETY: takes integers, returns a descriptor.
    let own = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) } as i32;
    assert!(own >= 0, "{}", std::io::Error::last_os_error());
    let (mut orders, mut order) = std::io::pipe().expect("a pipe");
    // SAFETY: the child makes three system calls and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        drop(order);
        let mut words = [0; 16];
        let told = orders.read_exact(&mut words).is_ok();
        let word =
            |at: usize| usize::from_ne_bytes(words[at..at + 8].try_into().expect("eight bytes"));
        let part = libc::iovec {
            iov_base: ptr::without_provenance_mut(word(0)),
            iov_len: word(8),
        };
        // SAFETY: one live vector. The parent owns the pages and waits for the child's end.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                own,
                &part,
                1,
                libc::MADV_PAGEOUT,
                0,
            )
        };
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!told || done != part.iov_len as i64)) }
    }
    drop(orders);
    // Pages of a file can be paged out without swap space.
    let path = std::env::temp_dir().join(format!("mmu-source-pageout-{child}"));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .expect("a file");
    std::fs::remove_file(&path).expect("it was made above");
    (&file)
        .write_all(&vec![1; 4 * page_size()])
        .expect("it is written");
    file.sync_all().expect("it is written");
    let memory = Scratch::read_only(4, file.as_raw_fd()).expect("mmap");
    told(
        &kernel,
        "MADV_PAGEOUT by another process",
        memory,
        |memory| {
            let words = [memory.page(0).addr(), memory.bytes].map(usize::to_ne_bytes);
            order
                .write_all(words.as_flattened())
                .expect("the child reads");
            let mut status = 0;
            // SAFETY: writes one int to a local.
            let reaped = unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!((reaped, status), (child, 0));
        },
    );
}

#[test]
fn changes_by_others_and_by_the_kernel_are_reported() {
    let Some(kernel) = start() else { return };
    let file = memory_file(4);
    let shared = || Scratch::map(4, libc::MAP_SHARED, file.as_raw_fd()).expect("mmap");
    told(
        &kernel,
        "a hole punched by another process",
        shared(),
        |_| {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: takes integers. No code reads the mapping of the removed page any more.
            assert!(in_child(|| unsafe {
                libc::fallocate(file.as_raw_fd(), mode, 0, page_size() as libc::off_t)
            } == 0));
        },
    );
    told(&kernel, "a truncation by another process", shared(), |_| {
        assert!(in_child(
            // SAFETY: takes integers. No code reads the mapping of the removed pages any more.
            || unsafe { libc::ftruncate(file.as_raw_fd(), 0) } == 0
        ));
    });
    told(&kernel, "fork", Scratch::anonymous(4), |_| {
        assert!(in_child(|| true))
    });
    // Copy on write: the child keeps the old page, and the parent gets a copy.
    let memory = Scratch::anonymous(1);
    let child = keeps_its_pages();
    told(&kernel, "copy on write", memory, |memory| {
        memory.write(0, 2)
    });
    // SAFETY: the test's own child, which has not been reaped.
    unsafe { libc::kill(child, libc::SIGKILL) };
    // SAFETY: the status pointer may be null.
    unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
}

/// Forks a child that shares all pages until it is killed.
fn keeps_its_pages() -> libc::pid_t {
    // SAFETY: the child makes one system call, again and again.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        loop {
            // SAFETY: sleeps until a signal comes.
            unsafe { libc::pause() };
        }
    }
    child
}

#[test]
fn ten_thousand_ranges_can_be_armed_and_each_is_reported() {
    let Some(kernel) = rehearse(1 << 18) else {
        return;
    };
    let page = |number: u64| {
        VaRange::covering(Va::new(0x5000_0000_0000 + number * 0x13_000), 1).expect("a page")
    };
    let armed: Vec<_> = (0..10_000)
        .map(|number| kernel.arm(page(number)).expect("armed"))
        .collect();
    for number in 0..10_000 {
        let before = kernel.generation();
        kernel
            .inject(
                page(number).start().get(),
                page(number).end().expect("low").get(),
            )
            .expect("it runs");
        assert_ne!(kernel.generation(), before, "page {number}");
    }
    let misses = (0..10_000_u64).filter(|number| {
        let before = kernel.generation();
        kernel
            .inject(
                0x6000_0000_0000 + number * 0x1000,
                0x6000_0000_1000 + number * 0x1000,
            )
            .expect("it runs");
        kernel.generation() == before
    });
    let misses = misses.count();
    assert!(
        misses > 9_800,
        "only {misses} of 10,000 foreign pages passed the filter"
    );
    drop(armed);
    let before = kernel.generation();
    (0..10_000).for_each(|number| {
        kernel
            .inject(
                page(number).start().get(),
                page(number).start().get() + 4096,
            )
            .expect("it runs")
    });
    assert_eq!(kernel.generation(), before, "all are disarmed");
    assert_eq!(kernel.lost(), 0);
}

#[test]
fn ranges_are_handed_on_in_order_by_each_thread_that_looks() {
    let Some(kernel) = rehearse(1 << 18) else {
        return;
    };
    const AT: u64 = 0x5100_0000_0000;
    let whole = VaRange::covering(Va::new(AT), 1 << 20).expect("a range");
    let log = Log::about(&current(), whole);
    let _armed = kernel.arm(whole).expect("armed");
    let pages: Vec<u64> = (0..256)
        .map(|number| AT + (number * 7 % 256) * 4096)
        .collect();
    for page in &pages {
        kernel.inject(*page, page + 4096).expect("it runs");
    }
    let first = kernel.generation();
    assert!(kernel.settle().is_ok() && kernel.is_settled());
    assert_eq!(first, 257, "it begins at 1");
    let told: Vec<u64> = log
        .take()
        .iter()
        .filter(|range| range.pages() == 1)
        .map(|range| range.start().get())
        .collect();
    assert_eq!(told, pages);
}

/// Blocks the thread that reports a change at `at` while the test holds the lock.
struct Slow {
    at: u64,
    turn: std::sync::Mutex<()>,
}

impl Slow {
    fn registered(at: u64) -> mmu_notifier::Registration<Slow> {
        let turn = std::sync::Mutex::new(());
        mmu_notifier::Registration::new(&current(), Slow { at, turn }).expect("outside of brackets")
    }
}

impl mmu_notifier::Notifier for Slow {
    fn invalidate_range_start(&self, range: &mmu_notifier::InvalidateRange<'_>) {
        if range.range().start().get() == self.at {
            drop(self.turn.lock());
        }
    }
}

#[test]
fn a_full_ring_is_a_loss_and_a_loss_is_everything() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5200_0000_0000;
    let kernel = Kernel::rehearse(page_size()).expect("BPF is there");
    let whole = VaRange::covering(Va::new(AT), 1 << 20).expect("a range");
    let _armed = kernel.arm(whole).expect("armed");
    let log = Log::about(&current(), whole);
    // A subscriber blocks the thread that drains, even the source's own.
    let slow = Slow::registered(AT);
    let held = slow.turn.lock().expect("no panic");
    let mut made = 0;
    while made < 1_000 || kernel.lost() == 0 {
        let at = AT + made % 256 * 4096;
        kernel.inject(at, at + 4096).expect("it runs");
        made += 1;
    }
    drop(held);
    assert!(kernel.settle().is_ok() && kernel.is_settled());
    assert_eq!(kernel.generation(), made + 1);
    assert!(log.take().contains(&VaRange::ALL));
    assert!(slow.unregister().is_ok());
    let lost = kernel.lost();
    kernel.inject(AT, AT + 4096).expect("it runs");
    assert!(kernel.settle().is_ok());
    assert_eq!(kernel.lost(), lost, "there is room in the ring again");
}

#[test]
fn a_watch_that_is_renewed_after_a_loss_is_touched_by_the_next_change() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5500_0000_0000;
    const ELSEWHERE: u64 = AT + (1 << 19);
    let kernel = Kernel::rehearse(page_size()).expect("BPF is there");
    let whole = VaRange::covering(Va::new(AT), 1 << 20).expect("a range");
    let _armed = kernel.arm(whole).expect("armed");
    let page = VaRange::covering(Va::new(AT), 4096).expect("a page");
    let mut watch = kernel.watch(page).expect("watched");
    let change = |at| kernel.inject(at, at + 4096).expect("it runs");
    // A subscriber blocks the source's own thread, so that only this thread takes events in.
    let slow = Slow::registered(ELSEWHERE);
    let held = slow.turn.lock().expect("no panic");
    for _ in 0..8 {
        change(ELSEWHERE);
        change(ELSEWHERE);
        // If the source's thread is taking events in at this moment, `is_valid` may return false.
        let is_valid = (0..1_000).any(|_| {
            std::thread::yield_now();
            watch.is_valid()
        });
        assert!(is_valid, "both were elsewhere");
        let lost = kernel.lost();
        while kernel.lost() == lost {
            change(ELSEWHERE);
        }
        assert!(!watch.is_valid(), "what was lost could have been here");
        watch.renew().expect("no fork");
        change(AT);
        assert!(!watch.is_valid());
        watch.renew().expect("no fork");
    }
    drop(held);
    assert!(slow.unregister().is_ok());
}

#[test]
fn a_forked_child_does_not_trust_its_parents_source() {
    let Some(kernel) = rehearse(1 << 18) else {
        return;
    };
    const AT: u64 = 0x5300_0000_0000;
    let range = VaRange::covering(Va::new(AT), 4096).expect("a page");
    let armed = kernel.arm(range).expect("armed");
    let generation = kernel.settle().expect("no fork");
    assert!(kernel.is_current(generation));
    let passed = in_child(|| {
        let blind = !kernel.is_current(generation)
            && matches!(kernel.settle(), Err(Error::AfterFork { .. }))
            && kernel.is_inherited()
            && matches!(armed.read_begin(), Err(Error::AfterFork { .. }))
            && matches!(kernel.arm(range), Err(Error::AfterFork { .. }))
            && kernel.drain().refused;
        drop(armed);
        drop(kernel);
        // The child can start a source of its own.
        let own = Kernel::rehearse(page_size()).expect("BPF is there");
        let _armed = own.arm(range).expect("armed");
        own.inject(AT, AT + 4096).expect("it runs");
        blind
            && own
                .settle()
                .is_ok_and(|settled| own.is_current(settled) && own.generation() == 2)
    });
    assert!(passed);
}

#[test]
fn the_parent_stays_armed_when_a_child_lets_go() {
    let Some(kernel) = rehearse(1 << 18) else {
        return;
    };
    const AT: u64 = 0x5400_0000_0000;
    let mut armed = Some(
        kernel
            .arm(VaRange::covering(Va::new(AT), 4096).expect("a page"))
            .expect("armed"),
    );
    assert!(in_child(|| armed.take().is_some()));
    let generation = kernel.generation();
    kernel.inject(AT, AT + 4096).expect("it runs");
    assert_ne!(kernel.generation(), generation);
    assert!(armed.is_some());
}

#[test]
fn a_callback_may_not_wait_for_itself() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5500_0000_0000;
    struct Asks(std::sync::Weak<Kernel>, std::sync::Mutex<Vec<bool>>);
    impl mmu_notifier::Notifier for Asks {
        fn invalidate_range_start(&self, range: &mmu_notifier::InvalidateRange<'_>) {
            if range.range().start().get() == AT
                && let Some(kernel) = self.0.upgrade()
            {
                let refused = kernel.drain().refused
                    && matches!(kernel.settle(), Err(Error::InCallback { .. }));
                self.1.lock().expect("no panic").push(refused);
            }
        }
    }
    let kernel = Kernel::rehearse(page_size()).expect("BPF is there");
    let asks = Asks(Arc::downgrade(&kernel), std::sync::Mutex::default());
    let asks = mmu_notifier::Registration::new(&current(), asks).expect("outside of brackets");
    let _armed = kernel
        .arm(VaRange::covering(Va::new(AT), 4096).expect("a page"))
        .expect("armed");
    kernel.inject(AT, AT + 4096).expect("it runs");
    _ = kernel.settle().expect("outside of callbacks");
    assert_eq!(*asks.1.lock().expect("no panic"), [true]);
    drop(kernel);
    assert!(asks.unregister().is_ok());
}

#[test]
fn what_is_missing_is_named_with_a_remedy() {
    match mmu_source::kernel::probe() {
        Ok(features) => assert!(!features.release.is_empty()),
        Err(Error::Unavailable {
            source,
            missing,
            remedy,
            ..
        }) => {
            assert_eq!(source, "kernel");
            assert!(
                !missing.is_empty() && !remedy.is_empty(),
                "{missing}: {remedy}"
            );
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn all_starts_give_the_same_source() {
    let Some(kernel) = start() else { return };
    assert!(Arc::ptr_eq(&kernel, &Kernel::start().expect("it runs")));
}

#[test]
fn a_hunt_for_stale_reads_finds_none() {
    let Some(kernel) = start() else { return };
    let mut seed = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(1, |now| now.as_nanos() as u64);
    println!("seed {seed}");
    let mut random = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut state = seed | 1;
        move |limit: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize % limit
        }
    };
    let tally = hunt::hunt(
        &kernel,
        std::time::Duration::from_secs(5),
        hunt::Mutant::None,
        &mut random,
        drop,
    );
    assert_eq!(tally.stale.into_inner(), 0);
    assert!(tally.hits.into_inner() > 0 && tally.changes.into_inner() > 0);
    // The hunt must find stale reads if readers do not wait for changes under way. The hunt finds
    // some soon, though not in every second, and on a busy machine not in every half minute.
    let finds = |_| {
        let tally = hunt::hunt(
            &kernel,
            std::time::Duration::from_secs(1),
            hunt::Mutant::NoWait,
            &mut random,
            drop,
        );
        tally.stale.into_inner() > 0
    };
    assert!((0..240).any(finds), "the hunt finds what is stale");
}
