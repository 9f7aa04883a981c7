//! Reader threads. They nest sections, sleep in them, end them in any order, and hand them to other
//! threads.

use super::add;
use super::object::{DOMAINS, Found, World};
use crate::random::Random;
use srcu::{Guard, SendGuard};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::thread;
use std::time::Duration;

type Moved = (SendGuard<'static>, Option<Found>);

/// The sections that wait for another thread to end them. This is not a channel, because the
/// standard library's channel has fences, which ThreadSanitizer does not model.
pub(crate) static MAILBOX: [AtomicPtr<Moved>; 16] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; 16];

/// Runs reader threads one after the other, so that thread numbers and slots are reused.
pub(crate) fn generations(world: &'static World, stop: &AtomicBool, seed: u64, stream: u64) {
    let mut generation = 0;
    while !stop.load(Ordering::Relaxed) {
        generation += 1;
        let random = Random::new(seed, 1000 * generation + stream);
        let reader = thread::spawn(move || life(world, random));
        reader.join().expect("readers do not panic");
        add(&world.counts.threads);
    }
}

fn life(world: &'static World, mut random: Random) {
    for _ in 0..random.below(20_000) {
        let domain = random.below(DOMAINS);
        if domain != 0 && random.one_in(50) {
            move_section(world, domain, &mut random);
        } else {
            section(world, domain, &mut random);
        }
    }
}

fn section(world: &'static World, domain: usize, random: &mut Random) {
    let srcu = &world.domains[domain];
    let reader = random.one_in(2).then(|| srcu.reader());
    let enter = || {
        reader
            .as_ref()
            .map_or_else(|| srcu.read_lock(), srcu::Reader::read_lock)
    };
    let mut held: Vec<(Guard<'_>, Option<Found>)> = Vec::new();
    for _ in 0..=random.below(3) {
        let guard = enter();
        let found = world.find(domain, random.below(64));
        held.push((guard, found));
        pass_time(world, random);
    }
    // End the sections in random order. An object is safe until the end of the section in which it
    // was found.
    while !held.is_empty() {
        let (guard, found) = held.swap_remove(random.below(held.len()));
        if let Some(found) = found {
            world.check(found);
        }
        drop(guard);
        add(&world.counts.sections);
    }
}

fn pass_time(world: &World, random: &mut Random) {
    match random.below(2000) {
        0 => {
            thread::sleep(Duration::from_micros(random.below(1500) as u64));
            add(&world.counts.slept);
        }
        1..20 => thread::yield_now(),
        20..60 => (0..random.below(2000)).for_each(|_| std::hint::spin_loop()),
        _ => {}
    }
}

fn move_section(world: &'static World, domain: usize, random: &mut Random) {
    let section = world.domains[domain].down_read();
    let found = world.find(domain, random.below(64));
    pass_time(world, random);
    let new = Box::into_raw(Box::new((section, found)));
    // The section that was in the mailbox ends here, so perhaps not on the thread that began it.
    end_section(
        world,
        MAILBOX[random.below(MAILBOX.len())].swap(new, Ordering::AcqRel),
    );
}

fn end_section(world: &World, moved: *mut Moved) {
    if moved.is_null() {
        return;
    }
    // SAFETY: The call needs a leaked box that no other code has. `move_section` has leaked the
    // box, and the caller's swap has removed it from the mailbox, so only this thread has it.
    let (section, found) = *unsafe { Box::from_raw(moved) };
    if let Some(found) = found {
        world.check(found);
    }
    section.up_read();
    add(&world.counts.moved);
}

fn empty_mailbox(world: &World) {
    for place in &MAILBOX {
        end_section(world, place.swap(std::ptr::null_mut(), Ordering::AcqRel));
    }
}

/// Ends sections that began on other threads, until all readers are done.
pub(crate) fn end_moved_sections(world: &World, readers_done: &AtomicBool) {
    while !readers_done.load(Ordering::Acquire) {
        empty_mailbox(world);
        thread::yield_now();
    }
    empty_mailbox(world);
}
