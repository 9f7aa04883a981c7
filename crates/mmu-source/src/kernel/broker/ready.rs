//! What is made before a client asks for it.
//!
//! The verifier takes most of the time in which a client joins. So the broker keeps one set of maps
//! and programs that is loaded already, and a thread of its own replaces it once a client has taken
//! it. A client that comes before that waits for a set of its own.
//!
//! One set has one client: it was attached for no other, and none of its descriptors has left the
//! broker.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Room for one `T`.
#[derive(Debug)]
pub(super) struct Ready<T> {
    room: Mutex<Room<T>>,
    wanted: Condvar,
}

#[derive(Debug)]
enum Room<T> {
    /// To be filled.
    Wanted,
    /// Filling failed; not tried again before the next client connects.
    Empty,
    Full(T),
}

impl<T> Ready<T> {
    pub(super) fn new() -> Self {
        Self {
            room: Mutex::new(Room::Wanted),
            wanted: Condvar::new(),
        }
    }

    fn room(&self) -> MutexGuard<'_, Room<T>> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, made: T) {
        *self.room() = Room::Full(made);
    }

    /// Takes what is there, and has it replaced. Waits for no making.
    pub(super) fn take(&self) -> Option<T> {
        let before = std::mem::replace(&mut *self.room(), Room::Wanted);
        self.wanted.notify_all();
        match before {
            Room::Full(made) => Some(made),
            Room::Wanted | Room::Empty => None,
        }
    }

    /// Fills the room by `make` each time that something was taken. For ever.
    pub(super) fn refill(&self, mut make: impl FnMut() -> Option<T>) {
        loop {
            let is_wanted = |room: &mut Room<T>| matches!(room, Room::Wanted);
            let room = self.wanted.wait_while(self.room(), |room| !is_wanted(room));
            drop(room.unwrap_or_else(PoisonError::into_inner));
            let made = make();
            *self.room() = made.map_or(Room::Empty, Room::Full);
        }
    }

    #[cfg(test)]
    pub(super) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        match &*self.room() {
            Room::Full(made) => Some(look(made)),
            Room::Wanted | Room::Empty => None,
        }
    }
}
