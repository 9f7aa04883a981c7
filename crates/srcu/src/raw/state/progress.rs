//! How far the grace period of a domain has come. `grace` moves it.

/// Interest of threads asleep on the domain's event.
pub(in crate::raw) const UPDATERS: u32 = 1 << 0;
/// Interest of the reclaimer.
pub(in crate::raw) const RECLAIMER: u32 = 1 << 1;

/// What the thread that moves the grace period keeps in the domain's lock.
pub(in crate::raw) struct Gp {
    /// Banks not yet found quiet since the grace period began.
    pub(in crate::raw) open: [bool; 2],
    /// Who is to be told of progress.
    pub(in crate::raw) interest: u32,
    /// What `State::waiting` is: whom to tell when a section of which bank ends.
    pub(in crate::raw) announced: Announced,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::raw) struct Announced {
    pub(in crate::raw) bank: usize,
    pub(in crate::raw) interest: u32,
}

impl Gp {
    pub(in crate::raw) const IDLE: Gp = Gp {
        open: [false; 2],
        interest: 0,
        announced: Announced {
            bank: 0,
            interest: 0,
        },
    };
}
