//! A blocking queue between threads.
//!
//! `std::sync::mpsc` would do the same, but three message types made it 56 KiB of code: a twentieth
//! of a shared library that contains this crate.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct State<T> {
    messages: VecDeque<T>,
    is_closed: bool,
}

/// A queue of messages. A closed queue accepts no more messages.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Arc<Self> {
        let state = Mutex::new(State {
            messages: VecDeque::new(),
            is_closed: false,
        });
        Arc::new(Self {
            state,
            changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message. If the queue is closed, drops the message.
    pub(crate) fn push(&self, message: T) {
        let mut state = self.state();
        if state.is_closed {
            // Unlock first: the drop of a message may run any code.
            return drop(state);
        }
        state.messages.push_back(message);
        drop(state);
        self.changed.notify_one();
    }

    /// Waits for a message. Returns `None` when the queue is closed and empty.
    pub(crate) fn pop(&self) -> Option<T> {
        let mut state = self.state();
        while state.messages.is_empty() && !state.is_closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.messages.pop_front()
    }

    /// Closes the queue: it accepts no more messages, and `pop` still returns those already in it.
    pub(crate) fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
    }
}

/// Closes the queue when dropped, also while unwinding. Otherwise a thread would wait for a message
/// that can no longer come.
#[derive(Debug)]
pub(crate) struct ClosesQueue<T>(pub(crate) Arc<Queue<T>>);

impl<T> Drop for ClosesQueue<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn all_that_is_put_in_before_the_end_comes_out_in_order() {
        let queue = Queue::new();
        let sum = thread::scope(|scope| {
            let taker = scope.spawn(|| std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>());
            (0..100).for_each(|number| queue.push(number));
            queue.close();
            taker.join().expect("it does not panic")
        });
        assert_eq!(sum, (0..100).collect::<Vec<_>>());
        queue.push(7);
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn a_thread_that_panics_keeps_no_thread_waiting() {
        let queue = Queue::<()>::new();
        let closes = ClosesQueue(Arc::clone(&queue));
        let failed = thread::spawn(move || {
            let _closes = closes;
            panic!("on purpose");
        });
        assert_eq!(queue.pop(), None);
        assert!(failed.join().is_err());
    }
}
