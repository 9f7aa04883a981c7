//! Checks the races of the contract in every interleaving with few preemptions (see `model_with`).
//! Run it with `RUSTFLAGS="--cfg mmun_loom" cargo test --release --test loom`.
#![cfg(mmun_loom)]

mod interval;
mod invalidate_seq;
mod last_use;
mod subscribers;

fn model(f: impl Fn() + Sync + Send + 'static) {
    model_with(2, f);
}

/// Checks every run in which threads are preempted at most `preemptions` times, or as often as
/// `LOOM_MAX_PREEMPTIONS` says. A switch away from a thread that waits does not count as a
/// preemption.
fn model_with(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(preemptions));
    builder.max_branches = 20_000;
    builder.check(f);
}

/// A mutant of the core, a model that must fail for it, and a part of the failure's message.
const MUTANTS: &[(&str, &str, &str)] = &[
    (
        "free_at_once",
        "subscribers::s_22_a_put_racing_a_walker",
        "used after it was freed",
    ),
    (
        "free_at_once",
        "subscribers::s_47_a_put_racing_exit",
        "used after it was freed",
    ),
    (
        "one_bank",
        "subscribers::s_80_a_put_racing_a_synchronize_of_another_subsystem",
        "returned before the free",
    ),
    (
        "freed_relaxed",
        "subscribers::s_80_a_put_racing_a_synchronize_of_another_subsystem",
        "returned before the free",
    ),
    (
        "get_revives",
        "subscribers::s_27_a_get_racing_the_last_put",
        "retired twice",
    ),
    (
        "exit_peeks_relaxed",
        "subscribers::s_48_s_50_unregister_racing_exit",
        "delisted, and not released",
    ),
    (
        "delist_before_release",
        "subscribers::s_48_s_50_unregister_racing_exit",
        "delisted, and not released",
    ),
    (
        "register_waits_not",
        "subscribers::s_66_s_69_a_registrar_racing_a_bracket",
        "a stale entry that no bracket will invalidate",
    ),
    (
        "first_relaxed",
        "subscribers::s_66_s_69_a_registrar_racing_a_bracket",
        "Causality violation",
    ),
    (
        "ends_whom_it_finds",
        "subscribers::s_66_s_69_a_registrar_racing_a_bracket",
        "ends without starts",
    ),
    (
        "get_trusts_the_unready",
        "subscribers::s_66_a_second_getter_racing_a_bracket",
        "got while a bracket is open that does not know it",
    ),
    (
        "callback_without_seq",
        "interval::b_25_an_interval_fault_racing_an_invalidation",
        "an old frame is still mapped",
    ),
    (
        "remove_waits_not",
        "interval::b_21_a_remove_racing_the_last_end",
        "the window closed and the interval is still in the tree",
    ),
    (
        "thaw_in_two_steps",
        "interval::b_21_a_remove_racing_the_last_end",
        "the window closed and the interval is still in the tree",
    ),
    (
        "put_relaxed",
        "last_use::s_28_the_free_comes_after_every_putters_last_use",
        "Causality violation",
    ),
    (
        "exit_relaxed",
        "last_use::s_40_release_sees_the_writes_of_every_user",
        "Causality violation",
    ),
    (
        "count_before_seq",
        "invalidate_seq::b_40_a_fault_racing_an_invalidation",
        "an old frame is still mapped",
    ),
    (
        "zap_uncounted",
        "invalidate_seq::b_40_a_fault_racing_an_invalidation",
        "an old frame is still mapped",
    ),
    (
        "snapshot_relaxed",
        "invalidate_seq::b_40_a_fault_racing_an_invalidation",
        "an old frame is still mapped",
    ),
    (
        "end_relaxed",
        "invalidate_seq::b_40_a_fault_racing_an_invalidation",
        "an old frame is still mapped",
    ),
    (
        "range_relaxed",
        "invalidate_seq::b_41_a_fault_racing_an_invalidation_and_one_elsewhere",
        "an old frame is still mapped",
    ),
];

#[test]
fn every_mutant_is_caught() {
    let this = std::env::current_exe().unwrap();
    for (mutant, model, complaint) in MUTANTS {
        let run = std::process::Command::new(&this)
            .env("MMUN_MUTANT", mutant)
            .args(["--exact", model])
            .output()
            .unwrap();
        // A second panic during a panic ends the process, and then the message is on stderr instead
        // of stdout.
        let says = [run.stdout, run.stderr]
            .map(|stream| String::from_utf8_lossy(&stream).into_owned())
            .concat();
        assert!(says.contains("running 1 test"), "{model} is no model");
        assert!(
            !run.status.success(),
            "{model} passes although {mutant} breaks it"
        );
        assert!(
            says.contains(complaint),
            "{model} fails for {mutant}, but not because \"{complaint}\": {says}"
        );
    }
}
