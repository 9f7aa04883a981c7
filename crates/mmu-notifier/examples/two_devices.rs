//! A driver module for two devices, and how to unload it safely. Processes open and close its
//! files, and exit meanwhile. After the unload, no code of the module runs and all its memory is
//! freed.
//!
//! Each device is a [`Subsystem`]. A process that has opened both devices therefore has two
//! notifiers. The unload has three steps:
//!
//! 1. The driver stops opening files.
//! 2. It closes every file, which puts every reference.
//! 3. [`Subsystem::synchronize`] returns for each device, so every notifier has been freed.

use mmu_notifier::lockdep::CheckedAlloc;
use mmu_notifier::{
    Event, InvalidateRange, Mm, MmWithUser, Notifier, SoftTlb, Subscription, Subsystem, Va, VaRange,
};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Ends the program if a callback uses the heap, which no callback may do: see `Notifier`.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

/// Stands for the module's code and data. An object that holds a reference may run that code.
#[derive(Debug, Default)]
struct Module {
    invalidations: AtomicU64,
    released: AtomicU64,
    freed: AtomicU64,
    /// Held while a file is closed, so that one of several closes sees the last reference.
    closing: Mutex<()>,
}

/// The state that one device keeps for one process.
#[derive(Debug)]
struct Context {
    module: Arc<Module>,
    /// The pages that the device uses. Callbacks take this lock, so its holders must not allocate
    /// or free: the table has a fixed size.
    pages: Mutex<SoftTlb<()>>,
}

impl Context {
    fn forget(&self, range: VaRange) {
        self.pages.lock().expect("no holder panics").zap(range);
    }
}

impl Notifier for Context {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        self.module.invalidations.fetch_add(1, Ordering::Relaxed);
        self.forget(range.range());
    }

    fn release(&self, _mm: &Mm) {
        self.module.released.fetch_add(1, Ordering::Relaxed);
        self.forget(VaRange::ALL);
    }
}

/// The kernel's `free_notifier`. Runs on the reclaimer, after the last callback.
impl Drop for Context {
    fn drop(&mut self) {
        assert!(
            self.pages.get_mut().expect("no holder panics").is_empty(),
            "put before the pages were dropped"
        );
        self.module.freed.fetch_add(1, Ordering::Relaxed);
    }
}

type Device = Subsystem<
    Context,
    Infallible,
    Box<dyn Fn(&MmWithUser) -> Result<Context, Infallible> + Send + Sync>,
>;

/// An open file: one reference to the context of its process.
struct File(Subscription<Context>);

impl File {
    fn open(device: &Device, process: &MmWithUser) -> Self {
        Self(
            device
                .get(process)
                .expect("files are opened outside of brackets"),
        )
    }

    fn use_page(&self, page: u64) {
        self.0
            .pages
            .lock()
            .expect("no holder panics")
            .insert(Va::new(page), ());
    }

    /// Closes the file. If it is the last file of its context, first drops every page of the
    /// context, because put calls no `release`.
    fn close(self) {
        let module = Arc::clone(&self.0.module);
        let _closing = module.closing.lock().expect("no holder panics");
        if self.0.users() == 1 {
            self.0.forget(VaRange::ALL);
        }
        self.0.put();
    }
}

fn load(module: &Arc<Module>) -> [Device; 2] {
    [(); 2].map(|()| {
        let module = Arc::clone(module);
        let alloc = move |_: &MmWithUser| {
            Ok(Context {
                module: Arc::clone(&module),
                pages: Mutex::new(SoftTlb::new(64)),
            })
        };
        Subsystem::new(Box::new(alloc) as Box<_>)
    })
}

fn main() {
    let module = Arc::new(Module::default());
    let devices = load(&module);
    let processes = [MmWithUser::new(), MmWithUser::new()];
    let range = VaRange::covering(Va::new(0x1000), 0x4000).expect("it is not empty");

    let mut files: Vec<File> = Vec::new();
    for device in &devices {
        for process in &processes {
            let file = File::open(device, process);
            file.use_page(0x2000);
            files.push(file);
            files.push(File::open(device, process));
        }
    }
    assert_eq!(
        files[0].0.users(),
        2,
        "two files of one process share a context"
    );

    let stop = AtomicBool::new(false);
    let [first, second] = processes;
    let handle = (*first).clone();
    thread::scope(|scope| {
        // Memory changes all the time, independently of the driver.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(second.invalidate(range, Event::Unmap));
            }
        });
        // The first process exits with open files. The driver closes them later, which is allowed.
        drop(first);
        assert_eq!(
            module.released.load(Ordering::Relaxed),
            2,
            "both devices have let go of it"
        );

        // Unload.
        files.drain(..).for_each(File::close);
        for device in &devices {
            device
                .synchronize()
                .expect("no bracket is open in this thread");
        }
        assert_eq!(
            module.freed.load(Ordering::Relaxed),
            4,
            "every context of every process"
        );
        let before = module.invalidations.load(Ordering::Relaxed);
        drop(devices);
        // The module's memory can be freed now: no context holds it any more, although the second
        // process still changes its memory.
        assert_eq!(Arc::strong_count(&module), 1);
        drop(second.invalidate(range, Event::Unmap));
        assert_eq!(
            module.invalidations.load(Ordering::Relaxed),
            before,
            "no device is called"
        );
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(
        handle.mm_count(),
        1,
        "and nothing of the first process is left either"
    );
    println!(
        "unloaded after {} invalidations",
        module.invalidations.load(Ordering::Relaxed)
    );
}

#[cfg(test)]
#[test]
fn it_runs() {
    main();
}
