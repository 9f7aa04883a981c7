//! Torture programs. Each runs for a given time, prints its seed, and has a checker that must find
//! no error.
//!
//! `cargo run --release -p stress -- {srcu | mmu | regcache} --seconds 30 [--seed N]
//! [--no-membarrier] [--broken] [--no-fork] [--source {bracket | kernel | rehearsal | hook}]`
//!
//! `cargo run --release -p stress -- kernel --seconds 60 [--seed N] [--broken] [--no-wait] [--crowd
//! N] [--slow] [--slow-one]`
//!
//! `cargo run --release -p stress -- rush --seconds 60`
//!
//! `kernel`, `rush` and `regcache --source kernel` use a broker if the process has no right to use
//! the source itself. To try that, run `mmun broker --socket S --group nogroup`, and then
//! `MMUN_BROKER=S setpriv --reuid=65534 --regid=65534 --clear-groups stress kernel`.
//!
//! The exit status is 0 if the checker found no error, 1 if it found one, and 2 if the command line
//! is wrong or the program cannot run on this machine.

#[cfg(feature = "sources")]
mod kernel;
mod mmu;
mod random;
#[cfg(feature = "sources")]
mod regcache;
mod srcu;

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The options of the command line.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) length: Duration,
    pub(crate) seed: u64,
    /// Use the fallback for kernels without membarrier.
    pub(crate) no_membarrier: bool,
    /// Introduce a fault on purpose, which the checker must find.
    pub(crate) broken: bool,
    /// For `kernel`: fill caches without waiting for changes under way, so that the checker must
    /// find stale reads.
    pub(crate) no_wait: bool,
    /// For `kernel`: the number of threads that change memory that no client uses.
    pub(crate) crowd: u64,
    /// For `kernel`: a second program at the tracepoint delays each change.
    pub(crate) slow: bool,
    /// For `kernel`: a second program delays the changes of one thread, for a longer time.
    pub(crate) slow_one: bool,
    /// Fork no children, because ThreadSanitizer cannot follow them. `mmu` never forks.
    pub(crate) no_fork: bool,
    /// The source that reports changes to the registration cache.
    pub(crate) source: Source,
}

/// Where invalidations come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The program itself opens a bracket around each change.
    Bracket,
    Kernel,
    /// The kernel source without a virtual machine. The program itself injects the events that the
    /// kernel would report.
    Rehearsal,
    Hook,
}

impl Options {
    fn new(seed: u64) -> Self {
        let length = Duration::from_secs(30);
        Self {
            length,
            seed,
            no_membarrier: false,
            broken: false,
            no_wait: false,
            crowd: 0,
            slow: false,
            slow_one: false,
            no_fork: false,
            source: Source::Bracket,
        }
    }
}

const USAGE: &str = "usage: stress {srcu | mmu | regcache | kernel | rush} [--seconds N] [--seed N] [--no-membarrier] [--broken] \
    [--no-wait] [--crowd N] [--slow] [--slow-one] [--no-fork] [--source {bracket | kernel | rehearsal | hook}]";

/// A torture program.
type Program = fn(&Options) -> ExitCode;

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<(Program, Options), String> {
    let program: Program = match arguments.next().as_deref() {
        Some("srcu") => srcu::run,
        Some("mmu") => mmu::run,
        #[cfg(feature = "sources")]
        Some("regcache") => regcache::run,
        #[cfg(feature = "sources")]
        Some("kernel") => kernel::run,
        #[cfg(feature = "sources")]
        Some("rush") => kernel::rush,
        _ => {
            return Err(
                "the first argument names the program: srcu, mmu, regcache, kernel or rush".into(),
            );
        }
    };
    let seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(1, |now| now.as_nanos() as u64);
    let mut options = Options::new(seed);
    while let Some(argument) = arguments.next() {
        if argument == "--source" {
            options.source = match arguments.next().as_deref() {
                Some("bracket") => Source::Bracket,
                Some("kernel") => Source::Kernel,
                Some("rehearsal") => Source::Rehearsal,
                Some("hook") => Source::Hook,
                _ => return Err("--source wants bracket, kernel, rehearsal or hook".into()),
            };
            continue;
        }
        let mut number = || {
            let value = arguments
                .next()
                .ok_or(format!("{argument} wants a number"))?;
            value
                .parse()
                .map_err(|_| format!("{argument} wants a number, not {value}"))
        };
        match argument.as_str() {
            "--seconds" => options.length = Duration::from_secs(number()?),
            "--crowd" => options.crowd = number()?,
            "--seed" => options.seed = number()?,
            "--no-membarrier" => options.no_membarrier = true,
            "--no-fork" => options.no_fork = true,
            "--no-wait" => options.no_wait = true,
            "--slow" => options.slow = true,
            "--slow-one" => options.slow_one = true,
            "--broken" => options.broken = true,
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    Ok((program, options))
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)) {
        Ok((program, options)) => program(&options),
        Err(why) => {
            eprintln!("stress: {why}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
