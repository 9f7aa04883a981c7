//! The errors of `get`, and the common code of the errors that hand a value back.

use crate::WouldDeadlock;
use std::error::Error;
use std::fmt;

/// A notifier has the maximum number of users, 2^32 - 1. Put one of its references and try again.
///
/// # Source
/// `-EOVERFLOW` from `mmu_notifier_get`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overflow;

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the notifier has as many users as can be counted: put one first")
    }
}

impl Error for Overflow {}

/// Why [`Subsystem::get`](crate::Subsystem::get) returned no subscription. It has registered
/// nothing.
///
/// # Source
/// The `ERR_PTR` of `mmu_notifier_get`, Linux 5.15. Differs: no EINTR and no ENOMEM; a wait for the
/// caller's own thread is an error instead of a hang.
///
/// # Examples
/// ```
/// use mmu_notifier::{GetError, MmWithUser, Notifier, Subsystem};
///
/// struct Table;
/// impl Notifier for Table {}
/// static TABLES: Subsystem<Table, &str> = Subsystem::new(|_mm| Err("the device is full"));
///
/// let mm = MmWithUser::new();
/// assert_eq!(TABLES.get(&mm).err(), Some(GetError::Alloc("the device is full")));
/// assert!(!mm.has_notifiers());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GetError<E> {
    /// The subsystem's `alloc` failed with this error.
    Alloc(E),
    /// The notifier has the maximum number of users.
    Overflow,
    /// A new notifier has to be made, but this thread must not wait for brackets or for the write
    /// lock: it would wait for itself, or the address space is that of a parent process.
    WouldDeadlock,
}

impl<E> fmt::Display for GetError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alloc(_) => f.write_str("the subsystem could not make its notifier"),
            Self::Overflow => Overflow.fmt(f),
            Self::WouldDeadlock => WouldDeadlock.fmt(f),
        }
    }
}

impl<E: Error + 'static> Error for GetError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Alloc(error) => Some(error),
            Self::Overflow | Self::WouldDeadlock => None,
        }
    }
}

/// For errors that hand a value back. In a function that returns [`WouldDeadlock`], `?` keeps the
/// reason and drops the value.
macro_rules! carries_a_value {
    ($name:ident<$value:ident: $bound:path>) => {
        impl<$value: $bound> std::fmt::Debug for $name<$value> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("error", &self.error)
                    .finish_non_exhaustive()
            }
        }

        impl<$value: $bound> std::fmt::Display for $name<$value> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.error.fmt(f)
            }
        }

        impl<$value: $bound> std::error::Error for $name<$value> {}

        impl<$value: $bound> From<$name<$value>> for crate::WouldDeadlock {
            fn from(refused: $name<$value>) -> Self {
                refused.error
            }
        }
    };
}

pub(crate) use carries_a_value;
