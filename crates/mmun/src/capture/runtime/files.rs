//! One file of each task in `/proc`, kept open from one call to the next.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use mmu_source::process::{Pid, Task};

use crate::who::shown;

/// How many files are kept open; a file that was closed is opened again at the task's next call.
const MOST_OPEN: usize = 256;

#[derive(Debug)]
pub(super) struct Files {
    name: &'static str,
    open: HashMap<Pid, File>,
}

impl Files {
    pub(super) fn new(name: &'static str) -> Files {
        Files {
            name,
            open: HashMap::new(),
        }
    }

    /// Reads the task's file and returns the result of `parse`; `None` if the file cannot be read.
    pub(super) fn read<T>(
        &mut self,
        task: Task,
        parse: impl FnOnce(&[u8]) -> Option<T>,
    ) -> Option<T> {
        let Task { pid, tid } = task;
        if !self.open.contains_key(&tid) {
            if self.open.len() >= MOST_OPEN {
                self.open.clear();
            }
            let file = File::open(shown(pid, &format!("task/{tid}/{}", self.name))?).ok()?;
            self.open.insert(tid, file);
        }
        let mut text = [0; 1024];
        let length = self.open[&tid].read_at(&mut text, 0).ok()?;
        parse(&text[..length])
    }

    pub(super) fn forget(&mut self, tid: Pid) {
        self.open.remove(&tid);
    }
}
