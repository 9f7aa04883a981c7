//! A group of processes that a test can freeze.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

use crate::cap::lacks;

/// A new cgroup (v2, or v1 with the freezer). The drop removes the cgroup, so its processes must
/// have ended before.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
    /// The file that freezes the group, the word that freezes it, and the word that thaws it.
    freeze: (&'static str, &'static str, &'static str),
    /// The file that shows whether the group is frozen, and its line if it is.
    frozen: (&'static str, &'static str),
}

impl Cgroup {
    /// Makes a group below the root of the hierarchy. If that fails, prints `SKIP test: reason`,
    /// with the name of the test that runs in this thread.
    ///
    /// # Panics
    /// If no group can be made and the environment has `MMUN_REQUIRE=all`, unless `MMUN_WITHOUT`
    /// lists `cgroup`.
    #[must_use]
    pub fn new_or_skip() -> Option<Cgroup> {
        Self::or_skip(Cgroup::new(
            |kind, _| kind == "cgroup2",
            ("cgroup.freeze", "1", "0"),
            ("cgroup.events", "frozen 1"),
        ))
    }

    /// Like [`new_or_skip`](Self::new_or_skip), in the cgroup v1 hierarchy. A process that the v1
    /// freezer has frozen does not even stop for ptrace.
    ///
    /// # Panics
    /// As [`Cgroup::new_or_skip`].
    #[must_use]
    pub fn new_v1_or_skip() -> Option<Cgroup> {
        Self::or_skip(Cgroup::new(
            |kind, options| kind == "cgroup" && options.split(',').any(|one| one == "freezer"),
            ("freezer.state", "FROZEN", "THAWED"),
            ("freezer.state", "FROZEN"),
        ))
    }

    fn or_skip(new: io::Result<Cgroup>) -> Option<Cgroup> {
        new.inspect_err(|error| lacks("Cgroup", &format!("no cgroup can be made: {error}")))
            .ok()
    }

    fn new(
        is_right: impl Fn(&str, &str) -> bool,
        freeze: (&'static str, &'static str, &'static str),
        frozen: (&'static str, &'static str),
    ) -> io::Result<Cgroup> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let root = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (place, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            is_right(kind, options).then(|| PathBuf::from(place))
        });
        let root = root.ok_or_else(|| io::Error::other("no such hierarchy is mounted"))?;
        let folder = root.join(format!(
            "mmun-test-{}-{}",
            process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&folder)?;
        let group = Cgroup {
            folder,
            freeze,
            frozen,
        };
        // The root of a v2 hierarchy does not have this file, so check the new group. v2 has the
        // file since Linux 5.2.
        fs::metadata(group.folder.join(freeze.0))?;
        Ok(group)
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    /// The error of the file operation.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string())
    }

    /// Begins to freeze the group's processes. [`is_frozen`](Self::is_frozen) tells whether they
    /// are frozen.
    ///
    /// # Errors
    /// The error of the file operation.
    pub fn freeze(&self) -> io::Result<()> {
        fs::write(self.folder.join(self.freeze.0), self.freeze.1)
    }

    /// Lets the group's processes run again.
    ///
    /// # Errors
    /// The error of the file operation.
    pub fn thaw(&self) -> io::Result<()> {
        fs::write(self.folder.join(self.freeze.0), self.freeze.2)
    }

    /// Returns whether all of the group's processes are frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(self.folder.join(self.frozen.0))
            .is_ok_and(|text| text.contains(self.frozen.1))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.thaw();
        let _ = fs::remove_dir(&self.folder);
    }
}
