//! `stress kernel`: a hunt for stale reads under the kernel source.

mod hunt;

use crate::Options;
use crate::random::Random;
use hunt::Mutant;
use mmu_source::kernel::Kernel;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Hunts, and tells what was found. `--broken` uses entries without asking the source, `--no-wait` fills without waiting.
pub(crate) fn run(options: &Options) -> ExitCode {
    println!("kernel: seed {}, {:?}", options.seed, options.length);
    let kernel = match Kernel::start() {
        Ok(kernel) => kernel,
        Err(error) => {
            println!("SKIP kernel: {error}");
            let required = std::env::var_os("MMUN_REQUIRE").is_some_and(|value| value == "all");
            return if required { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let mutant = match (options.broken, options.no_wait) {
        (true, _) => Mutant::NoLook,
        (false, true) => Mutant::NoWait,
        (false, false) => Mutant::None,
    };
    let mut stream = 0;
    let tally = hunt::hunt(&kernel, options.length, mutant, || {
        stream += 1;
        let mut random = Random::new(options.seed, stream);
        move |limit| random.below(limit)
    });
    let [changes, hits, fills, retries, stale] =
        [&tally.changes, &tally.hits, &tally.fills, &tally.retries, &tally.stale]
            .map(|count| count.load(Ordering::Relaxed));
    println!(
        "kernel: {changes} changes, {hits} hits, {fills} fills, {retries} fills thrown away, {} lost",
        kernel.lost()
    );
    println!("kernel: {stale} stale");
    ExitCode::from(u8::from(stale != 0))
}
