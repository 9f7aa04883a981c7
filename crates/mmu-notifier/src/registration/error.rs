//! The errors that return a notifier or its registration to the caller.

use super::Registration;
use crate::error::carries_a_value;
use crate::{Notifier, WouldDeadlock};

/// A notifier that could not be registered, and the reason. The notifier is unchanged, and no
/// callback has run in it. `?` turns the error into [`WouldDeadlock`] and drops the notifier.
///
/// # Source
/// The errors of `mmu_notifier_register`, Linux 5.15. Differs: the notifier is never half
/// registered, and there is neither EINTR nor ENOMEM.
///
/// # Examples
/// ```
/// use mmu_notifier::{Event, MmWithUser, Notifier, Registration, VaRange};
///
/// struct Table(u64);
/// impl Notifier for Table {}
///
/// let mm = MmWithUser::new();
/// let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
/// let refused = Registration::new(&mm, Table(7)).err().expect("it would wait for the bracket of this thread");
/// drop(bracket);
/// let table = Registration::new(&mm, refused.notifier)?;
/// assert_eq!(table.0, 7);
/// # Ok::<(), mmu_notifier::WouldDeadlock>(())
/// ```
#[non_exhaustive]
pub struct RegisterError<N> {
    /// The reason.
    pub error: WouldDeadlock,
    /// The notifier, for another try.
    pub notifier: N,
}

/// A registration that could not be unregistered here, and the reason. See
/// [`Registration::unregister`] for an example. `?` turns the error into [`WouldDeadlock`] and
/// drops the registration, which is a put.
///
/// # Source
/// None: the kernel's `mmu_notifier_unregister` hangs in this case.
#[non_exhaustive]
pub struct UnregisterError<N: Notifier> {
    /// The reason.
    pub error: WouldDeadlock,
    /// The registration, which is still in force.
    pub registration: Registration<N>,
}

carries_a_value!(RegisterError<N: Notifier>);
carries_a_value!(UnregisterError<N: Notifier>);
