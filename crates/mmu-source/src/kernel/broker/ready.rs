//! Prepares the maps and programs of the next client.
//!
//! When a client joins, the verifier takes most of the time. So the broker keeps one set of maps
//! and programs already loaded. When a client has taken the set, a separate thread makes another.
//! If a client joins before the new set is complete, the client's own thread in the broker makes a
//! set.
//!
//! Each set has only one client: the set was never attached for another one, and none of its
//! descriptors has left the broker.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A place for one prepared `T`.
#[derive(Debug)]
pub(super) struct Ready<T> {
    room: Mutex<Room<T>>,
    wanted: Condvar,
}

#[derive(Debug)]
enum Room<T> {
    /// `refill` has to make a `T`.
    Wanted,
    /// The last attempt to make a `T` failed. The next attempt is made when the next client joins.
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

    /// Takes the prepared `T`, if there is one, and requests another. Does not wait until a `T` is
    /// made.
    pub(super) fn take(&self) -> Option<T> {
        let before = std::mem::replace(&mut *self.room(), Room::Wanted);
        self.wanted.notify_all();
        match before {
            Room::Full(made) => Some(made),
            Room::Wanted | Room::Empty => None,
        }
    }

    /// Makes another `T` each time a `T` was taken. Never returns.
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
