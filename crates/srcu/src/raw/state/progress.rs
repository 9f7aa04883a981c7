//! The progress of a domain's grace period. `grace` advances it.

/// Threads that sleep on the domain's event are interested.
pub(in crate::raw) const UPDATERS: u32 = 1 << 0;
/// The reclaimer is interested.
pub(in crate::raw) const RECLAIMER: u32 = 1 << 1;

/// The state of the grace period, under the domain's lock.
pub(in crate::raw) struct Gp {
    /// The banks that were not yet found quiet since the grace period began.
    pub(in crate::raw) open: [bool; 2],
    /// Who must be notified of progress.
    pub(in crate::raw) interest: u32,
    /// The content of `State::waiting`: a bank, and the threads to notify when one of its sections
    /// ends.
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
