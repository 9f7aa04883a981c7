//! Measures how long a call that does nothing takes under the tracer.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use mmu_source::process::{Command, Options, Tracer};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

use crate::capture::runtime::Overhead;
use crate::observer::TraceObserver;
use crate::outcome::{FAILED, Outcome};
use crate::output::Output;
use crate::recorder::{Recorder, Settings};
use crate::sys;

/// The count of measured calls.
const CALLS: usize = 201;
/// In nanoseconds: a smaller difference between one processor and two is an error of measurement.
const ERROR: u64 = 500;

/// Measures the time of calls that do nothing; `None` if the measurement fails.
pub(crate) fn overhead(options: Options) -> Option<Overhead> {
    // In a separate thread, because the measurement sets its thread's CPU affinity. The kernel
    // remembers an affinity that was set, and children inherit the affinity: they would not get
    // processors that their cpuset gains later.
    let measure = || measure(options);
    let result = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, measure);
        thread.map(|thread| thread.join())
    });
    result.ok()?.ok()?
}

fn measure(options: Options) -> Option<Overhead> {
    let unpinned = || {
        let together = quartile(options, None)?;
        Some(Overhead {
            together,
            apart: None,
        })
    };
    let Ok(all) = sched_getaffinity(None) else {
        return unpinned();
    };
    let here = sched_getcpu();
    let mut only_here = CpuSet::new();
    if here < CpuSet::MAX_CPU {
        only_here.set(here);
    }
    if sched_setaffinity(None, &only_here).is_err() {
        return unpinned();
    }
    let together = quartile(options, None);
    let apart = (0..CpuSet::MAX_CPU)
        .find(|cpu| *cpu != here && all.is_set(*cpu))
        .and_then(|there| quartile(options, Some(there)));
    let together = together?;
    Some(Overhead {
        together,
        apart: apart.filter(|apart| apart.abs_diff(together) >= ERROR),
    })
}

/// Traces a process that makes calls which do nothing. The process runs on the processor `there`;
/// if `there` is `None`, it inherits this thread's affinity. Returns the lower quartile of the
/// calls' times, because other work on the machine only makes times longer; `None` if the process
/// could not make all calls.
fn quartile(options: Options, there: Option<usize>) -> Option<u64> {
    let settings = Settings {
        details: true,
        follow: true,
        samples: true,
        ..Settings::default()
    };
    let nowhere = Output::open(Some(Path::new("/dev/null"))).ok()?;
    let recorder = Arc::new(Recorder::new(settings, nowhere, || {}));
    let mut tracer = Tracer::new(options, TraceObserver::new(Arc::clone(&recorder))).ok()?;
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = OwnedFd::from(null.ok()?);
    let mut command = Command::new(sys::own_program()).arg("idle-calls");
    if let Some(there) = there {
        command = command.arg(there.to_string());
    }
    if let (Ok(input), Ok(output)) = (null.try_clone(), null.try_clone()) {
        command = command.stdin(input).stdout(output).stderr(null);
    }
    tracer.spawn(command).ok()?;
    tracer.run(&sys::STOP).ok()?;
    let (mut observer, _keeper) = tracer.detach();
    observer.finish();
    let _ = recorder.finish();
    // The few calls of the loader are among the samples.
    let mut times = recorder.take_samples();
    // A process that could not move to its processor has made only the loader's calls.
    if times.len() < CALLS {
        return None;
    }
    times.sort_unstable();
    times.get(times.len() / 4).copied()
}

/// Runs in the traced process: makes the calls, on the processor `there` if one is given.
pub(crate) fn idle_calls(there: Option<usize>) -> Outcome {
    if let Some(there) = there {
        let mut only_there = CpuSet::new();
        if there >= CpuSet::MAX_CPU {
            return FAILED;
        }
        only_there.set(there);
        if sched_setaffinity(None, &only_there).is_err() {
            return FAILED;
        }
    }
    for _ in 0..CALLS {
        sys::idle_call();
    }
    Outcome::Exit(0)
}
