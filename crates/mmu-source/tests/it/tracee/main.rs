//! The program that the tests trace: `tracee CASE [ARGS..]`.
//!
//! Each case makes calls. Most cases print what a test needs to compare the calls with what the
//! source saw.

mod again;
mod calls;
mod life;
#[cfg(target_arch = "aarch64")]
#[path = "machine/aarch64.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "machine/x86_64.rs"]
mod machine;
mod odd;
mod script;
mod sys;

use std::env;

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let number = |index: usize| {
        args.get(index)
            .and_then(|arg| arg.parse::<u64>().ok())
            .expect("the case takes a number")
    };
    match args.first().map(String::as_str) {
        Some("mappings") => calls::mappings(),
        Some("advice") => calls::advice(),
        Some("move") => calls::moves(),
        Some("break") => calls::program_break(),
        Some("segment") => calls::segment(),
        Some("migrate") => calls::migrate(),
        Some("refused") => calls::refused(),
        #[cfg(target_arch = "x86_64")]
        Some("compat") => machine::compat_calls(),
        Some("fork") => life::fork_once(),
        Some("storm") => life::storm(number(1)),
        Some("threads") => life::threads(number(1), number(2)),
        Some("exec") => life::exec(),
        Some("thread-exec") => life::thread_exec(),
        Some("spawn") => life::spawn(),
        Some("other") => life::calls_on_a_child(),
        Some("stop") => life::job_control(),
        Some("signals") => life::real_time_signals(number(1)),
        Some("traceme") => life::traceme(),
        Some("serve") => life::serve(number(1)),
        Some("forks-and-dies") => life::forks_and_dies(number(1)),
        Some("killed-cloning") => life::killed_cloning(number(1)),
        Some("fork-loop") => life::fork_loop(number(1)),
        Some("interrupted") => again::interrupted(number(1)),
        Some("interrupted-twice") => again::interrupted_twice(),
        Some("gives-up") => again::gives_up(),
        Some("dies-in-handler") => again::dies_in_its_handler(),
        Some("hidden-fork") => odd::hidden(life::fork_once),
        Some("hidden-advice") => odd::hidden(odd::advice_on_itself),
        Some("hidden-storm") => odd::hidden(|| life::storm(number(1))),
        Some("own-filter") => odd::own_filter(),
        Some("exec-loop") => odd::exec_loop(number(1)),
        Some("waits-in-vfork") => odd::waits_in_vfork(&args[1]),
        Some("segfault") => life::segfault(),
        Some("exit") => std::process::exit(number(1) as i32),
        other => panic!("no such case: {other:?}"),
    }
}
