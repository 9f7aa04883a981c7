//! Callbacks that use the heap, which end the process, and the example on the front page of
//! `mmu-notifier`, which does not.

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

/// Runs the calling test once more, where it must end as
/// [`CheckedAlloc`](mmu_notifier::lockdep::CheckedAlloc) ends it, with `says` in its message.
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
            let _watch = Registration::new(&mmu_source::current(), Allocates)
                .map_err(|_| "refused")
                .expect("registers");
            let _hook = Hook::install().expect("the hook works on this machine");
            unmap(map(1, 0), 1);
        },
    );
}

#[test]
fn who_allocates_under_a_lock_that_a_callback_takes_is_told() {
    let says = "the holder of `the shadow of an InvalidateSeq`";
    must_stop(
        "callback_heap::who_allocates_under_a_lock_that_a_callback_takes_is_told",
        says,
        || {
            let shadow = InvalidateSeq::new([VaRange::ALL], SoftTlb::<u64>::new(1));
            let shadow = Registration::new(&mmu_source::current(), shadow)
                .map_err(|_| "refused")
                .expect("registers");
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
        // SAFETY: changes when the allocator gives memory back.
        assert_eq!(unsafe { libc::mallopt(option, value) }, 1);
    }
}

/// Drops a block that was written to. Whether the allocator gave its end back: it does not where
/// another thread has allocated behind it.
fn gives_back(block: Vec<u8>) -> bool {
    let last = block[block.len() - 1..].as_ptr().addr() & !(page_size() - 1);
    drop(block);
    let mut residence = 0_u8;
    // SAFETY: writes one byte for one page to a local; what is not mapped is refused.
    let answer = unsafe { libc::mincore(at(last).cast(), page_size(), &raw mut residence) };
    answer != 0 || residence & 1 == 0
}

/// Runs `round` with the size of a block, until ten blocks were given back. After one that was not,
/// the next is too large for the hole that it left.
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

/// The heap's top is given back in the middle of `free`, with the allocator's lock held, and what
/// is known of it is let go.
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

/// A device whose second pass was made beforehand.
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
                // What is allocated next lies here and not behind the block, which must be the end
                // of the heap.
                let room = vec![1_u8; 64 << 10];
                let block = vec![1_u8; bytes];
                drop(room);
                let range =
                    VaRange::covering(Va::new(block.as_ptr().addr() as u64), block.len() as u64)
                        .expect("it is not empty");
                let waits = Arc::new(AtomicUsize::new(0));
                let waited = Arc::clone(&waits);
                // What it keeps is on the heap.
                let table = vec![1_usize; 1000];
                let finish = Finish::new(move || {
                    waited.fetch_add(table.iter().sum(), Ordering::Relaxed);
                });
                let device = Device(Some(finish));
                let device = IntervalNotifier::insert(&mmu_source::current(), range, device)
                    .map_err(|_| "refused");
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
