//! A group of processes that a test can freeze.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process, thread};

/// A new cgroup (v2). It is removed with the value; its processes must have ended by then.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one below the root of the hierarchy. If that cannot be, it prints `SKIP test: reason`,
    /// the test being the one that runs in this thread.
    #[must_use]
    pub fn new_or_skip() -> Option<Cgroup> {
        let new = Cgroup::new();
        if let Err(error) = &new {
            println!(
                "SKIP {}: no cgroup can be made: {error}",
                thread::current().name().unwrap_or("a test")
            );
        }
        new.ok()
    }

    fn new() -> io::Result<Cgroup> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut fields = mounts.lines().map(|line| line.split(' '));
        let root = fields.find_map(|mut line| {
            let place = line.nth(1)?;
            (line.next()? == "cgroup2").then(|| PathBuf::from(place))
        });
        let root = root.ok_or_else(|| io::Error::other("no cgroup2 is mounted"))?;
        let group = root.join(format!(
            "mmun-test-{}-{}",
            process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&group)?;
        let group = Cgroup(group);
        // Not of the hierarchy's root, and since Linux 5.2.
        fs::metadata(group.0.join("cgroup.freeze"))?;
        Ok(group)
    }

    /// Moves a process into it.
    ///
    /// # Errors
    /// Of the system.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string())
    }

    /// Asks for its processes to be frozen; [`is_frozen`](Self::is_frozen) tells when they are.
    ///
    /// # Errors
    /// Of the system.
    pub fn freeze(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), "1")
    }

    /// Lets its processes run again.
    ///
    /// # Errors
    /// Of the system.
    pub fn thaw(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), "0")
    }

    /// Tells whether all of its processes are frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events"))
            .is_ok_and(|events| events.contains("frozen 1"))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.thaw();
        let _ = fs::remove_dir(&self.0);
    }
}
