//! Updater threads, which use every way to wait for a grace period, and callbacks that misbehave.
//! Other threads make short-lived domains and fork.

use super::add;
use super::object::{DOMAINS, Found, World};
use crate::random::Random;
use srcu::{Cookie, Srcu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

pub(crate) fn update(
    world: &'static World,
    stop: &AtomicBool,
    mut random: Random,
    ran: &'static AtomicUsize,
) {
    let mut polled: Vec<(Cookie, usize, Found)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let domain = random.below(DOMAINS);
        let srcu = &world.domains[domain];
        free_polled(world, &mut polled);
        let Some(old) = world.replace(domain, random.below(64)) else {
            continue;
        };
        if world.broken && random.one_in(1000) {
            world.free(old);
            continue;
        }
        match random.below(100) {
            0..5 => {
                let waited = if random.one_in(2) {
                    srcu.synchronize()
                } else {
                    srcu.synchronize_expedited()
                };
                waited.expect("outside of sections");
                world.free(old);
                add(&world.counts.synchronized);
            }
            5..25 if polled.len() < 1000 => polled.push((srcu.start_poll(), domain, old)),
            25..50 => {
                srcu.call(move || world.free(old));
                add(&world.counts.called);
            }
            50..52 => odd_callback(world, domain, old, &mut random),
            _ => {
                let section = random.one_in(4).then(|| srcu.read_lock());
                // SAFETY: The object is unlinked, and its head is not in use. `Found::free` may run
                // on any thread, and frees the object once.
                unsafe { srcu.call_raw(old.head(), Found::free) };
                drop(section);
                add(&world.counts.called);
            }
        }
        match random.below(400) {
            0 => check_barrier(world, srcu, ran),
            1 => thread::sleep(Duration::from_micros(random.below(3000) as u64)),
            _ => {}
        }
    }
    while !polled.is_empty() {
        free_polled(world, &mut polled);
        thread::yield_now();
    }
}

fn free_polled(world: &World, polled: &mut Vec<(Cookie, usize, Found)>) {
    polled.retain(|&(cookie, domain, old)| {
        let over = world.domains[domain].poll(cookie);
        if over {
            world.free(old);
            add(&world.counts.polled);
        }
        !over
    });
}

/// Queues a callback that frees `old`. Then the callback queues another callback, waits for another
/// domain, calls functions that must be refused because they would deadlock, panics, or opens a
/// section.
fn odd_callback(world: &'static World, domain: usize, old: Found, random: &mut Random) {
    let kind = random.below(4);
    world.domains[domain].call(move || {
        world.free(old);
        let srcu = &world.domains[domain];
        match kind {
            0 => srcu.call(|| ()),
            1 if domain != 0 => world.domains[0]
                .synchronize()
                .expect("no callback of that domain"),
            2 if srcu.synchronize().is_ok() || srcu.barrier().is_ok() => add(&world.counts.errors),
            3 => panic!("on purpose"),
            _ => drop(srcu.read_lock()),
        }
    });
    add(&world.counts.called);
}

fn check_barrier(world: &World, srcu: &Srcu, ran: &'static AtomicUsize) {
    ran.store(0, Ordering::Relaxed);
    for _ in 0..3 {
        srcu.call(move || {
            ran.fetch_add(1, Ordering::Relaxed);
        });
    }
    srcu.barrier().expect("outside of sections");
    if ran.load(Ordering::Relaxed) != 3 {
        add(&world.counts.errors);
    }
    add(&world.counts.barriers);
}

/// Makes short-lived domains, some of which are dropped in their own callbacks.
pub(crate) fn make_and_drop_domains(world: &'static World, stop: &AtomicBool, mut random: Random) {
    let expected = Arc::new(AtomicUsize::new(0));
    let ran = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        let srcu = Arc::new(Srcu::new());
        let section = srcu.read_lock();
        for _ in 0..random.below(5) {
            let (mine, ran) = (
                random.one_in(2).then(|| Arc::clone(&srcu)),
                Arc::clone(&ran),
            );
            expected.fetch_add(1, Ordering::Relaxed);
            srcu.call(move || {
                drop(mine);
                ran.fetch_add(1, Ordering::Relaxed);
            });
        }
        drop(section);
        drop(srcu);
        add(&world.counts.domains);
        if random.one_in(20) {
            thread::sleep(Duration::from_micros(200));
        }
    }
    while ran.load(Ordering::Relaxed) != expected.load(Ordering::Relaxed) {
        thread::yield_now();
    }
}

/// Forks children that use a domain. They have inherited the domain's readers and callbacks in an
/// arbitrary state.
pub(crate) fn fork_children(world: &'static World, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: After a fork of a program with threads, the child may only do what is safe there.
        // It uses `malloc`, which glibc makes usable in the child, and `srcu`, which promises to
        // work there.
        match unsafe { libc::fork() } {
            0 => child(&world.domains[0]),
            -1 => add(&world.counts.errors),
            pid => {
                let mut status = 0;
                // SAFETY: The call writes to an integer, which is a local variable.
                unsafe { libc::waitpid(pid, &mut status, 0) };
                if status != 0 {
                    eprintln!("stress srcu: a child ended with status {status:#x}");
                    add(&world.counts.errors);
                }
                add(&world.counts.children);
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn child(srcu: &Srcu) -> ! {
    // If the child hangs, SIGALRM kills it.
    // SAFETY: The call has no preconditions.
    unsafe { libc::alarm(120) };
    let ran = Arc::new(AtomicUsize::new(0));
    let mut good = srcu.synchronize().is_ok();
    let in_callback = Arc::clone(&ran);
    srcu.call(move || {
        in_callback.fetch_add(1, Ordering::Relaxed);
    });
    let section = srcu.read_lock();
    good &= srcu.barrier().is_err();
    drop(section);
    good &= srcu.barrier().is_ok() && ran.load(Ordering::Relaxed) == 1;
    // SAFETY: Ends the process at once, which is always allowed.
    unsafe { libc::_exit(i32::from(!good)) }
}
