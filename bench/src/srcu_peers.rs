//! Shared by the benches of `srcu`: interleaved rounds, medians, the table, and liburcu.

/// One line of a table: a name, and the time of each round in ns.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) rounds: Vec<f64>,
}

impl Row {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            rounds: Vec::new(),
        }
    }

    pub(crate) fn median(&self) -> f64 {
        median(self.rounds.clone())
    }

    /// Returns the median of the rounds' ratios, because other programs disturb both sides of a
    /// round equally.
    pub(crate) fn ratio(&self, to: &Row) -> f64 {
        median(
            self.rounds
                .iter()
                .zip(&to.rounds)
                .map(|(mine, theirs)| mine / theirs)
                .collect(),
        )
    }

    /// Returns half the distance between the quartiles, in percent of the median.
    pub(crate) fn spread(&self) -> f64 {
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |quarter: usize| {
            sorted
                .get(sorted.len() * quarter / 4)
                .copied()
                .unwrap_or(f64::NAN)
        };
        (at(3) - at(1)) / 2.0 / self.median() * 100.0
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Returns the first row whose name begins with `name`.
pub(crate) fn row<'a>(rows: &'a [Row], name: &str) -> &'a Row {
    rows.iter()
        .find(|row| row.name.starts_with(name))
        .expect("every name looked for is in the table")
}

/// Prints whether a ratio is within its bar.
pub(crate) fn verdict(what: &str, ratio: f64, bar: f64) {
    println!(
        "{} {what}: {ratio:.2} (bar {bar:.2})",
        if ratio <= bar { "ok  " } else { "OVER" }
    );
}

/// Returns the number of rounds: the first argument of the program, or `default`.
pub(crate) fn rounds(default: usize) -> usize {
    std::env::args()
        .nth(1)
        .and_then(|argument| argument.parse().ok())
        .unwrap_or(default)
}

#[cfg(has_urcu)]
pub(crate) mod urcu {
    //! liburcu, with its readers inlined into C loops.
    //!
    //! # Safety
    //! The functions of `c/memb.c` and `c/bp.c` require only that a thread is registered before it
    //! reads, waits or queues a callback with "memb".

    mod c {
        unsafe extern "C" {
            pub(super) fn peer_memb_register();
            pub(super) fn peer_memb_unregister();
            pub(super) fn peer_memb_read(rounds: i64) -> f64;
            pub(super) fn peer_memb_synchronize(rounds: i64) -> f64;
            pub(super) fn peer_memb_call(rounds: i64) -> f64;
            pub(super) fn peer_memb_latency() -> f64;
            pub(super) fn peer_bp_read(rounds: i64) -> f64;
        }
    }

    /// Runs `f` on a registered thread.
    fn registered(f: impl FnOnce() -> f64) -> f64 {
        // SAFETY: The call requires a thread that is not registered. Only this function registers
        // threads, and it unregisters the thread below.
        unsafe { c::peer_memb_register() };
        let result = f();
        // SAFETY: The call requires a registered thread outside of sections. The thread was
        // registered above, and the functions that `f` calls end their sections.
        unsafe { c::peer_memb_unregister() };
        result
    }

    pub(crate) fn memb_read(rounds: u64) -> f64 {
        // SAFETY: The call requires a registered thread, and `registered` registers it.
        registered(|| unsafe { c::peer_memb_read(rounds as i64) })
    }

    pub(crate) fn memb_synchronize(rounds: u64) -> f64 {
        // SAFETY: The call requires a registered thread, and `registered` registers it.
        registered(|| unsafe { c::peer_memb_synchronize(rounds as i64) })
    }

    pub(crate) fn memb_call(rounds: u64) -> f64 {
        // SAFETY: The call requires a registered thread, and `registered` registers it.
        registered(|| unsafe { c::peer_memb_call(rounds as i64) })
    }

    pub(crate) fn memb_latency() -> f64 {
        // SAFETY: The call requires a registered thread, and `registered` registers it.
        registered(|| unsafe { c::peer_memb_latency() })
    }

    pub(crate) fn bp_read(rounds: u64) -> f64 {
        // SAFETY: The call has no preconditions, because this flavour registers threads itself.
        unsafe { c::peer_bp_read(rounds as i64) }
    }
}
