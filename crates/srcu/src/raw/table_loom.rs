//! The table for models: three slots, handed out to threads in the order in which they arrive. The
//! bookkeeping is not modelled, so it adds no ordering that the real table lacks.

use super::slot::{Counters, Slot};
use loom::thread::{self, ThreadId};
use std::sync::Mutex;

const THREADS: usize = 3;

pub(crate) struct Table {
    slots: [Slot; THREADS],
    owners: Mutex<Vec<ThreadId>>,
}

impl Table {
    pub(crate) fn empty() -> Self {
        let slot = |_| Slot {
            local: Counters::new(),
            moved: Counters::new(),
        };
        Self {
            slots: std::array::from_fn(slot),
            owners: Mutex::default(),
        }
    }

    pub(crate) fn mine(&self) -> Option<&Slot> {
        let me = thread::current().id();
        let owners = self.owners.lock().expect("no panic while held");
        owners
            .iter()
            .position(|owner| *owner == me)
            .map(|at| &self.slots[at])
    }

    pub(crate) fn claim_mine(&self) -> &Slot {
        self.owners
            .lock()
            .expect("no panic while held")
            .push(thread::current().id());
        self.mine().expect("just entered")
    }

    pub(crate) fn each(&self, f: impl FnMut(&Slot)) {
        self.slots.iter().for_each(f);
    }
}
