//! The counted handle of a subsystem's notifier.

use crate::subscriptions::{NodeRef, NotCounted};
use crate::{Mm, Notifier, Overflow};
use std::fmt;
use std::ops::Deref;

/// One reference to a notifier. Dropping it is `put`.
///
/// The last put delists the notifier at once: a bracket opened afterwards does not call it. It is freed after a grace
/// period, when no callback can be running in it. Put calls no `release`: whoever puts last must have dropped all shadow
/// entries before. Put never sleeps and never allocates, so it may be called from any callback.
///
/// ```
/// # struct Shadow; impl mmu_notifier::Notifier for Shadow {}
/// # static SHADOW: mmu_notifier::Subsystem<Shadow> = mmu_notifier::Subsystem::new(|_| Ok(Shadow));
/// let mm = mmu_notifier::MmWithUser::new();
/// let subscription = SHADOW.get(&mm)?;
/// let another = subscription.try_clone()?;
/// assert_eq!((another.users(), another.mm().id()), (2, mm.id()));
/// subscription.put();
/// drop(another); // The last put: no bracket calls it any more.
/// assert!(!mm.has_notifiers());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// One put for each get is all that can be written:
///
/// ```compile_fail,E0382
/// # struct Shadow; impl mmu_notifier::Notifier for Shadow {}
/// # static SHADOW: mmu_notifier::Subsystem<Shadow> = mmu_notifier::Subsystem::new(|_| Ok(Shadow));
/// let mm = mmu_notifier::MmWithUser::new();
/// let subscription = SHADOW.get(&mm).unwrap();
/// subscription.put();
/// subscription.put();
/// ```
///
/// # Source
/// `struct mmu_notifier`, `mmu_notifier_put`, Linux 5.4.
#[must_use = "dropping a subscription gives it back"]
#[doc(alias = "mmu_notifier")]
pub struct Subscription<N: Notifier> {
    node: NodeRef<N>,
}

impl<N: Notifier> Subscription<N> {
    pub(crate) fn new(node: NodeRef<N>) -> Self {
        Self { node }
    }

    /// Takes one more reference to the same notifier, also when its address space has ended.
    ///
    /// Not `Clone`, because the count of users is 32 bits wide, as the kernel's is, and a clone cannot fail; an `Arc` of one
    /// subscription can be cloned.
    ///
    /// # Blocking
    /// No.
    /// # Errors
    /// [`Overflow`] if it has as many users as can be counted.
    /// # Source
    /// `mmu_notifier_get` of a notifier that exists. Differs: it needs no live address space, as nothing is registered.
    pub fn try_clone(&self) -> Result<Self, Overflow> {
        match self.node.try_clone() {
            Ok(node) => Ok(Self::new(node)),
            // `Gone` cannot be: `self` is counted.
            Err(NotCounted::Overflow | NotCounted::Gone) => Err(Overflow),
        }
    }

    /// Gives the reference back; the same as dropping it.
    ///
    /// # Blocking
    /// Never. It allocates nothing, frees nothing and calls no callback.
    /// # Source
    /// `mmu_notifier_put`, Linux 5.4.
    #[doc(alias = "mmu_notifier_put")]
    pub fn put(self) {
        drop(self);
    }

    /// Returns the address space, which may have ended.
    #[must_use]
    pub fn mm(&self) -> &Mm {
        self.node.mm()
    }

    /// Returns how many references there are. A snapshot, for reports and tests.
    #[must_use]
    pub fn users(&self) -> u32 {
        self.node.users()
    }
}

impl<N: Notifier> Deref for Subscription<N> {
    type Target = N;

    fn deref(&self) -> &N {
        self.node.value()
    }
}

impl<N: Notifier + fmt::Debug> fmt::Debug for Subscription<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("notifier", &**self).field("users", &self.users()).finish()
    }
}
