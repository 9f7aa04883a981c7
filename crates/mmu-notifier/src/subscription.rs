//! The counted handle of a subsystem's notifier.

use crate::mm::subscriptions::{NodeRef, NotCounted};
use crate::{Mm, Notifier, Overflow};
use std::fmt;
use std::ops::Deref;

/// One reference to a notifier. Dropping it is `put`.
///
/// The last put delists the notifier at once: brackets that open afterwards do not call it. The
/// notifier is freed after a grace period, when no callback can be running in it. Put calls no
/// `release`, so the caller of the last put must drop all shadow entries before it. Put never
/// sleeps and never allocates, so any callback may call it.
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
/// A second put of the same reference does not compile:
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

    /// Takes one more reference to the same notifier, even if its address space has ended.
    ///
    /// A subscription is not `Clone`, because a clone cannot fail. The count of users is 32 bits
    /// wide, as in the kernel, and may overflow. For clones, use an `Arc` of one subscription.
    ///
    /// # Blocking
    /// Never.
    /// # Errors
    /// [`Overflow`] if the notifier has the maximum number of users.
    /// # Source
    /// `mmu_notifier_get` of a notifier that exists. Differs: the address space need not be alive,
    /// because `try_clone` registers no notifier.
    pub fn try_clone(&self) -> Result<Self, Overflow> {
        match self.node.try_clone() {
            Ok(node) => Ok(Self::new(node)),
            // `Gone` is impossible: `self` is counted.
            Err(NotCounted::Overflow | NotCounted::Gone) => Err(Overflow),
        }
    }

    /// Drops the reference.
    ///
    /// # Blocking
    /// Never. Allocates nothing, frees nothing and calls no callback.
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

    /// Returns how many references there are now. For reports and tests.
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
        f.debug_struct("Subscription")
            .field("notifier", &**self)
            .field("users", &self.users())
            .finish()
    }
}
