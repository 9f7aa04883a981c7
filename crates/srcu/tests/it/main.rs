//! Tests of the public API.
#![cfg(not(mmun_loom))]

mod callbacks;
mod deadlock;
mod grace_periods;
mod life;
mod sections;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// A counter shared with callbacks.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

impl Count {
    fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Blocks its waiters until it is opened or dropped.
struct Gate {
    open: Sender<()>,
    wait: Arc<Mutex<Receiver<()>>>,
}

impl Gate {
    fn new() -> Self {
        let (open, wait) = channel();
        Self {
            open,
            wait: Arc::new(Mutex::new(wait)),
        }
    }

    fn waiter(&self) -> impl FnOnce() + Send + 'static {
        let wait = Arc::clone(&self.wait);
        move || {
            let _ = wait.lock().expect("waiters do not panic").recv();
        }
    }

    fn open(self) {
        let _ = self.open.send(());
    }
}
