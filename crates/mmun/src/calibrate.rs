//! What a call that does nothing takes under a tracer.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use mmu_source::process::{Command, Options, Tracer};

use crate::observer::TraceObserver;
use crate::output::Output;
use crate::recorder::{Recorder, Settings};
use crate::sys;

/// How many calls are measured.
const CALLS: usize = 101;

/// Traces a process that makes calls which do nothing, and returns their median in nanoseconds;
/// `None` if that does not work.
pub(crate) fn overhead(options: Options) -> Option<u64> {
    let settings = Settings {
        details: true,
        follow: true,
        samples: true,
        ..Settings::default()
    };
    let nowhere = Output::open(Some(Path::new("/dev/null"))).ok()?;
    let recorder = Arc::new(Recorder::new(settings, nowhere, || {}));
    let mut tracer = Tracer::new(options, TraceObserver::new(Arc::clone(&recorder))).ok()?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .ok()?;
    let mut command = Command::new("/proc/self/exe").arg("idle-calls");
    if let (Ok(input), Ok(output)) = (null.try_clone(), null.try_clone()) {
        command = command.stdin(input).stdout(output).stderr(null);
    }
    if tracer.spawn(command).is_err() || tracer.run(&sys::STOP).is_err() {
        return None;
    }
    let (mut observer, _keeper) = tracer.detach();
    observer.finish();
    let _ = recorder.finish();
    // Those of the loader are few.
    let mut times = recorder.take_samples();
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}

/// What the process does that is traced.
pub(crate) fn idle_calls() {
    for _ in 0..CALLS {
        sys::idle_call();
    }
}
