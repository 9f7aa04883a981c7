//! Patches code while other threads run it.

use crate::pages::{at, byte, discard, map, page_size, trim, unmap};
use mmu_source::hook::{Hook, State};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

#[test]
fn installed_and_removed_under_load() {
    let stop = AtomicBool::new(false);
    let rounds = [const { AtomicU64::new(0) }; 3];
    let work: [fn(u64); 3] = [map_and_unmap, allocate, spawn];
    thread::scope(|scope| {
        for (work, rounds) in work.into_iter().zip(&rounds) {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    work(rounds.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
        // Every thread is running before the first patch, and still running after the last one is
        // removed.
        let at_work = |at_least: u64| {
            rounds
                .iter()
                .all(|rounds| rounds.load(Ordering::Relaxed) >= at_least)
        };
        while !at_work(1) {
            thread::yield_now();
        }
        let times = testkit::rounds(1000);
        for time in 0..times {
            let hook = Hook::install().expect("it worked the first time");
            if time % 100 == 0 {
                let status = hook.status();
                assert!(
                    status.iter().all(|patch| patch.state == State::Ours),
                    "{status:?}"
                );
            }
            drop(hook);
        }
        let now = rounds
            .iter()
            .map(|rounds| rounds.load(Ordering::Relaxed))
            .max()
            .unwrap_or(0);
        assert!(
            now > times as u64 / 10,
            "the threads ran meanwhile: {rounds:?}"
        );
        stop.store(true, Ordering::Relaxed);
    });
}

fn map_and_unmap(round: u64) {
    let fill = round as u8;
    let pages = map(2, fill);
    discard(pages, 1);
    assert_eq!((byte(pages), byte(pages + page_size())), (0, fill));
    assert_eq!(
        // SAFETY: this function owns the pages.
        unsafe { libc::mprotect(at(pages), page_size(), libc::PROT_READ) },
        0
    );
    assert_eq!(
        // SAFETY: this function owns the pages, and does not use the first one any more.
        unsafe { libc::syscall(libc::SYS_munmap, pages, page_size()) },
        0
    );
    unmap(pages + page_size(), 1);
}

fn allocate(round: u64) {
    let blocks: Vec<Vec<u8>> = (0..8)
        .map(|size| vec![round as u8; 1 << (12 + size)])
        .collect();
    assert!(
        blocks
            .iter()
            .all(|block| block[block.len() - 1] == round as u8)
    );
    drop(blocks);
    trim();
}

/// A thread blocks every signal while it ends and unmaps its stack.
fn spawn(round: u64) {
    let thread = thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(move || round + 1)
        .expect("a thread");
    assert_eq!(thread.join().ok(), Some(round + 1));
}
