//! Callbacks that use the heap: `CheckedAlloc` must end the process. Also callbacks that run in the
//! middle of `free` and do not use the heap.

use crate::child::alone;
use crate::pages::{at, map, page_size, unmap};
use mmu_notifier::{
    Finish, IntervalNotifier, IntervalOps, InvalidateRange, InvalidateSeq, MmWithUser, Notifier,
    Registration, SoftTlb, Subsystem, Va, VaRange,
};
use mmu_source::hook::Hook;
use std::hint::black_box;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::{env, thread};

const MARK: &str = "MMUN_TEST_BREAKS_THE_RULE";

/// Runs the calling test in another process, where
/// [`CheckedAlloc`](mmu_notifier::lockdep::CheckedAlloc) must end that process with `says` in the
/// message.
fn must_stop(test: &str, says: &str, body: impl FnOnce()) {
    if env::var_os(MARK).is_some() {
        return body();
    }
    let mut command = Command::new(env::current_exe().expect("this program has a name"));
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(MARK, "1");
    let output = command.output().expect("it runs again");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{stderr}");
    assert!(stderr.contains(says), "{stderr}");
}

struct Allocates;

impl Notifier for Allocates {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        drop(black_box(Box::new(1)));
    }
}

#[test]
fn a_callback_that_allocates_is_named() {
    let says = "`invalidate_range_start` of `hook::callback_heap::Allocates` allocates memory";
    must_stop(
        "callback_heap::a_callback_that_allocates_is_named",
        says,
        || {
            let _watch = Registration::new(&mmu_source::current(), Allocates).expect("registers");
            let _hook = Hook::install().expect("the hook works on this machine");
            unmap(map(1, 0), 1);
        },
    );
}

#[test]
fn an_allocation_under_a_lock_that_a_callback_takes_is_reported() {
    let says = "the holder of `the shadow of an InvalidateSeq`";
    must_stop(
        "callback_heap::an_allocation_under_a_lock_that_a_callback_takes_is_reported",
        says,
        || {
            let shadow = InvalidateSeq::new([VaRange::ALL], SoftTlb::<u64>::new(1));
            let shadow = Registration::new(&mmu_source::current(), shadow).expect("registers");
            let _hook = Hook::install().expect("the hook works on this machine");
            unmap(map(1, 0), 1);
            shadow.with_shadow(|_| drop(black_box(Box::new(1))));
        },
    );
}

type Shadow = InvalidateSeq<SoftTlb<u64>>;

static SHADOW: Subsystem<Shadow> =
    Subsystem::new(|_: &MmWithUser| Ok(InvalidateSeq::new([VaRange::ALL], SoftTlb::new(1 << 15))));

fn give_memory_back_often() {
    for (option, value) in [
        (libc::M_MMAP_THRESHOLD, 1 << 30),
        (libc::M_TRIM_THRESHOLD, 64 << 10),
    ] {
        // SAFETY: only changes when the allocator returns memory to the kernel.
        assert_eq!(unsafe { libc::mallopt(option, value) }, 1);
    }
}

/// Drops a block that was written to. Returns whether the allocator returned the block's end to the
/// kernel. The allocator keeps it if another thread has allocated memory behind the block.
fn gives_back(block: Vec<u8>) -> bool {
    let last = block[block.len() - 1..].as_ptr().addr() & !(page_size() - 1);
    drop(block);
    let mut residence = 0_u8;
    // SAFETY: the call writes one byte for one page to a local, and fails if the page is not
    // mapped.
    let answer = unsafe { libc::mincore(at(last).cast(), page_size(), &raw mut residence) };
    answer != 0 || residence & 1 == 0
}

/// Runs `round` with the size of a block until ten blocks were returned to the kernel. If a block
/// was not returned, the next block is too large for the hole that this block left.
fn until_ten_were_given_back(mut round: impl FnMut(usize) -> bool) {
    let (mut bytes, mut given_back) = (4 << 20, 0);
    while given_back < 10 {
        match round(bytes) {
            true => given_back += 1,
            false => bytes += 1 << 20,
        }
        assert!(bytes <= 64 << 20, "blocks at the heap's end are given back");
    }
}

/// The allocator returns the top of the heap in the middle of `free`, with its lock held, and the
/// shadow drops its entries.
#[test]
fn a_shadow_is_emptied_in_the_middle_of_free() {
    alone(
        "callback_heap::a_shadow_is_emptied_in_the_middle_of_free",
        || {
            give_memory_back_often();
            let shadow = SHADOW.get(&mmu_source::current()).expect("subscribes");
            let _hook = Hook::install().expect("the hook works on this machine");
            until_ten_were_given_back(|bytes| {
                let block = vec![1_u8; bytes];
                let range =
                    VaRange::covering(Va::new(block.as_ptr().addr() as u64), block.len() as u64)
                        .expect("it is not empty");
                for number in 0..range.pages() {
                    let page = VaRange::covering(Va::new(range.start().get() + number * 4096), 1)
                        .expect("a page");
                    let installed = shadow.try_install(shadow.snapshot(page), |tlb| {
                        tlb.insert(page.start(), number)
                    });
                    assert_eq!(installed, Ok(()));
                }
                let last = || shadow.with_shadow(|tlb| tlb.get(range.last()));
                assert_eq!(last(), Some(range.pages() - 1));
                let given_back = gives_back(block);
                assert!(!given_back || last().is_none());
                given_back
            });
        },
    );
}

/// A device whose second pass was prepared beforehand.
struct Device(Option<Finish>);

impl IntervalOps for Device {
    fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> {
        self.0.take()
    }
}

#[test]
fn a_second_pass_runs_in_the_middle_of_free() {
    alone(
        "callback_heap::a_second_pass_runs_in_the_middle_of_free",
        || {
            give_memory_back_often();
            let _hook = Hook::install().expect("the hook works on this machine");
            until_ten_were_given_back(|bytes| {
                // The next allocations fill this room. Otherwise they would lie after the block,
                // which must be at the end of the heap.
                let room = vec![1_u8; 64 << 10];
                let block = vec![1_u8; bytes];
                drop(room);
                let range =
                    VaRange::covering(Va::new(block.as_ptr().addr() as u64), block.len() as u64)
                        .expect("it is not empty");
                let waits = Arc::new(AtomicUsize::new(0));
                let waited = Arc::clone(&waits);
                // The second pass owns memory on the heap.
                let table = vec![1_usize; 1000];
                let finish = Finish::new(move || {
                    waited.fetch_add(table.iter().sum(), Ordering::Relaxed);
                });
                let device = Device(Some(finish));
                let device = IntervalNotifier::insert(&mmu_source::current(), range, device);
                let device = device.expect("outside of brackets");
                let given_back = gives_back(block);
                assert!(!given_back || waits.load(Ordering::Relaxed) == 1000);
                assert!(device.remove().is_ok());
                given_back
            });
        },
    );
}

#[test]
fn threads_that_ask_first_make_one_address_space() {
    alone(
        "callback_heap::threads_that_ask_first_make_one_address_space",
        || {
            let together = Barrier::new(8);
            thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        together.wait();
                        assert_eq!(mmu_source::current().id(), 1);
                    });
                }
            });
            assert_eq!(MmWithUser::new().id(), 2, "none was made in vain");
        },
    );
}
