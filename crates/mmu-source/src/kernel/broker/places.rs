//! The places that clients take, and when a place is free again.
//!
//! The number of clients is limited, because the kernel runs every client's program for every MMU
//! notifier event of every process with a virtual machine. A user other than root can have half of
//! the places that the other users leave, rounded up: the first user half of all, a second one a
//! quarter. So no such user can take all places, unless there is only one.
//!
//! A client holds its link and its maps. The client can keep their descriptors, or pass them on,
//! after its connection has ended. So its place is free only when none of these objects exists in
//! the kernel any more.

use super::super::sys::{self, Object};
use super::message::Refusal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The places of a broker.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    list: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    number: u64,
    user: u32,
    /// The objects that a client may still hold after its connection has ended.
    left: Option<Vec<Object>>,
}

/// A place. After the drop of the ticket, the place is free as soon as the client's objects are
/// gone.
#[derive(Debug)]
pub(super) struct Ticket {
    places: Arc<Places>,
    number: u64,
    /// The objects that the client got.
    pub(super) given: Vec<Object>,
}

impl Places {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for `user`.
    pub(super) fn take(self: &Arc<Self>, user: u32) -> Result<Ticket, Refusal> {
        let mut taken = self.taken();
        taken.list.retain(|place| {
            place
                .left
                .as_ref()
                .is_none_or(|left| left.iter().copied().any(sys::exists))
        });
        if taken.list.len() >= self.most {
            return Err(Refusal::Full);
        }
        let own = taken.list.iter().filter(|place| place.user == user).count();
        let others = taken.list.len() - own;
        if user != 0 && own >= (self.most - others).div_ceil(2) {
            return Err(Refusal::Share);
        }
        let number = taken.next;
        taken.next += 1;
        taken.list.push(Place {
            number,
            user,
            left: None,
        });
        Ok(Ticket {
            places: Arc::clone(self),
            number,
            given: Vec::new(),
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(place) = taken
            .list
            .iter_mut()
            .find(|place| place.number == self.number)
        {
            place.left = Some(std::mem::take(&mut self.given));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_gets_half_of_the_places_that_others_leave() {
        let places = Places::new(8);
        let take = |user| places.take(user);
        let first: Vec<_> = (0..4).map(|_| take(1).expect("half")).collect();
        assert_eq!(take(1).err(), Some(Refusal::Share));
        let second: Vec<_> = (0..2).map(|_| take(2).expect("half of the rest")).collect();
        assert_eq!(take(2).err(), Some(Refusal::Share));
        let third = take(3).expect("half of two");
        assert_eq!(take(3).err(), Some(Refusal::Share));
        let root = take(0).expect("the last place");
        assert_eq!(take(0).err(), Some(Refusal::Full));
        assert_eq!(take(4).err(), Some(Refusal::Full));
        drop((first, second, third, root));
        assert!(take(1).is_ok());
        let places = Places::new(1);
        let only = places.take(1).expect("one place has no half");
        assert_eq!(places.take(2).err(), Some(Refusal::Full));
        drop(only);
        assert!(places.take(2).is_ok());
    }
}
