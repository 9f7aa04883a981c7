//! `stress kernel`: a hunt for stale reads under the kernel source. `stress rush`: a hunt for
//! threads that the source delays.

mod hunt;
mod pages;
mod rush;
mod slow;

use crate::Options;
use crate::random::Random;
use hunt::Mutant;
use mmu_source::kernel::Kernel;
use slow::Slow;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use testkit::{Cap, require};

/// Threads use the source in every way at once, while memory changes. Prints the longest time that
/// each operation took, and ends the process if an operation takes more than a minute.
pub(crate) fn rush(options: &Options) -> ExitCode {
    println!("rush: {:?}", options.length);
    let Some(kernel) = start() else {
        return skipped();
    };
    let paces = rush::rush(&kernel, options.length, Duration::from_secs(60));
    for (deed, pace) in rush::DEEDS.iter().zip(&paces) {
        let [times, most] = [&pace.times, &pace.most].map(|count| count.load(Ordering::Relaxed));
        println!("rush: {deed:<10} {times:>9} times, {most} us at most");
    }
    println!("rush: {kernel:?}");
    ExitCode::from(u8::from(
        paces
            .iter()
            .any(|pace| pace.times.load(Ordering::Relaxed) == 0),
    ))
}

fn start() -> Option<Arc<Kernel>> {
    Kernel::start()
        .inspect_err(|error| println!("SKIP kernel: {error}"))
        .ok()
}

/// Returns the exit status for a source that does not start. If the machine has every capability
/// that the source needs, this is a fault.
fn skipped() -> ExitCode {
    ExitCode::from(if require(Cap::Bpf) && require(Cap::Kvm) {
        2
    } else {
        0
    })
}

/// Hunts for stale reads, and prints the result. With `--broken`, readers use entries without
/// checking with the source that they are current. With `--no-wait`, readers fill their caches
/// without waiting for changes under way. With `--crowd N`, N threads change other memory
/// meanwhile. `--slow` delays every change at the tracepoint, and `--slow-one` only the changes of
/// one thread.
pub(crate) fn run(options: &Options) -> ExitCode {
    println!("kernel: seed {}, {:?}", options.seed, options.length);
    let Some(kernel) = start() else {
        return skipped();
    };
    let mutant = match (options.broken, options.no_wait) {
        (true, _) => Mutant::NoLook,
        (false, true) => Mutant::NoWait,
        (false, false) => Mutant::None,
    };
    let _slow = match options.slow.then(Slow::every_client).transpose() {
        Ok(slow) => slow,
        Err(error) => {
            eprintln!("stress: --slow: {error}");
            return ExitCode::from(2);
        }
    };
    let mut stream = 0;
    let random = || {
        stream += 1;
        let mut random = Random::new(options.seed, stream);
        move |limit| random.below(limit)
    };
    let enter = |half| {
        let slow = (options.slow_one && half == 0).then(Slow::this_thread);
        slow.map(|slow| slow.expect("the right to load BPF programs"))
    };
    let stop = AtomicBool::new(false);
    let tally = thread::scope(|scope| {
        (0..options.crowd).for_each(|_| _ = scope.spawn(|| crowd(&stop)));
        let tally = hunt::hunt(&kernel, options.length, mutant, random, enter);
        stop.store(true, Ordering::Relaxed);
        tally
    });
    let [changes, hits, fills, retries, stale] = [
        &tally.changes,
        &tally.hits,
        &tally.fills,
        &tally.retries,
        &tally.stale,
    ]
    .map(|count| count.load(Ordering::Relaxed));
    println!(
        "kernel: {changes} changes, {hits} hits, {fills} fills, {retries} fills thrown away, {} lost",
        kernel.lost()
    );
    let (waits, machines) = kernel.waits();
    println!("kernel: {waits} waits, {machines} machines made for them");
    println!("kernel: {stale} stale");
    ExitCode::from(u8::from(stale != 0))
}

/// Changes unarmed memory without a pause, so that a change is under way at almost every moment.
fn crowd(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let memory = pages::map(rush::PAGES);
        rush::change(memory);
        pages::unmap(memory, rush::PAGES);
    }
}
