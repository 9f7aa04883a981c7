//! `cargo xtask ci`: the gate. It runs all checks that a change must pass, step by step.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

/// A step of the gate: its name, its command line, and the variables that are added to the
/// environment. If a step needs something that machines may lack, it has a probe: a command that
/// fails if the step cannot run on this machine.
struct Step {
    name: &'static str,
    needs: Option<&'static str>,
    env: &'static [(&'static str, &'static str)],
    /// Whether the command must exit with 1, which means that it found a fault.
    must_fail: bool,
    command: &'static str,
}

const fn step(name: &'static str, command: &'static str) -> Step {
    Step {
        name,
        needs: None,
        env: &[],
        must_fail: false,
        command,
    }
}

impl Step {
    const fn env(mut self, env: &'static [(&'static str, &'static str)]) -> Self {
        self.env = env;
        self
    }

    /// Marks a step that checks a checker: the command must find a fault, and exit with 1.
    const fn must_fail(mut self) -> Self {
        self.must_fail = true;
        self
    }

    /// Skips the step with a message if the command `probe` fails.
    const fn needs(mut self, probe: &'static str) -> Self {
        self.needs = Some(probe);
        self
    }
}

const MODELS: &[(&str, &str)] = &[("RUSTFLAGS", "--cfg mmun_loom")];
const ADDRESS_SANITIZER: &[(&str, &str)] = &[
    ("RUSTC_BOOTSTRAP", "1"),
    ("RUSTFLAGS", "-Zsanitizer=address"),
];
const THREAD_SANITIZER: &[(&str, &str)] = &[
    ("RUSTC_BOOTSTRAP", "1"),
    (
        "RUSTFLAGS",
        "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer --cfg mmun_tsan",
    ),
    (
        "TSAN_OPTIONS",
        "halt_on_error=1 suppressions=stress/tsan.supp",
    ),
];

/// A probe that opens `/dev/kvm` for reading and writing, as the tests do.
const KVM: &str = "dd if=/dev/kvm of=/dev/kvm conv=nocreat,notrunc count=0 status=none";

/// A probe that checks the host's packages, and downloads the kernels if `target/guest` does not
/// have them.
const GUESTS: &str = "timeout 240 cargo xtask guest --kernel 6.1 --kernel 6.12 --check";

/// Each sanitizer and the models build into a folder of their own. The steps that run `stress` with
/// a sanitizer build it without the programs that need event sources, because the libraries of
/// these programs would double the time of the build.
const STEPS: &[Step] = &[
    step("format", "cargo fmt --all --check"),
    step("tidy", "cargo xtask tidy"),
    step("clippy", "cargo clippy --workspace --all-targets -- -D warnings"),
    // `cargo fuzz` sets the condition `fuzzing`.
    step("fuzz targets compile", "cargo check --manifest-path fuzz/Cargo.toml --target-dir target/fuzz")
        .env(&[("RUSTFLAGS", "--cfg fuzzing")])
        .needs("c++ --version"),
    step("packages", "cargo xtask packages"),
    step(
        "the oldest compiler",
        "cargo +1.85 check --workspace --lib --bins --examples --exclude bench --exclude stress --exclude testkit \
         --exclude xtask --target-dir target/oldest",
    )
    .needs("cargo +1.85 --version"),
    // This step takes a minute. The first run downloads the standard library for that processor.
    step(
        "another processor",
        "cargo check --target aarch64-unknown-linux-gnu --workspace --all-targets --exclude bench",
    )
    .env(&[("RUSTFLAGS", "-Dwarnings")])
    .needs("timeout 100 rustup target add aarch64-unknown-linux-gnu"),
    step("the distribution's package", "cargo xtask dist").needs("pkg-config --version"),
    step("no feature, and each alone", "cargo xtask features"),
    step("docs", "cargo doc --workspace --no-deps").env(&[("RUSTDOCFLAGS", "-Dwarnings")]),
    // With this variable rustdoc checks the error codes of `compile_fail` examples.
    step("examples that must not compile", "cargo test --workspace --doc").env(&[("RUSTC_BOOTSTRAP", "1")]),
    step(
        "models and mutants",
        "cargo test --release --target-dir target-loom -p srcu -p mmu-notifier -p regcache --test loom",
    )
    .env(MODELS),
    step(
        "address sanitizer",
        "cargo test --target-dir target-asan --target x86_64-unknown-linux-gnu -p srcu -p mmu-notifier \
         --test it --test fork --test alloc",
    )
    .env(ADDRESS_SANITIZER),
    step(
        "address sanitizer, mmu",
        "cargo run --target-dir target-asan --target x86_64-unknown-linux-gnu -p stress --no-default-features -- \
         mmu --seconds 10",
    )
    .env(ADDRESS_SANITIZER),
    step(
        "thread sanitizer",
        "cargo run --release --target-dir target-tsan --target x86_64-unknown-linux-gnu -p stress --no-default-features -- \
         srcu --seconds 10 --no-fork",
    )
    .env(THREAD_SANITIZER),
    step(
        "thread sanitizer, mmu",
        "cargo run --release --target-dir target-tsan --target x86_64-unknown-linux-gnu -p stress --no-default-features -- \
         mmu --seconds 10",
    )
    .env(THREAD_SANITIZER),
    step("thread sanitizer, 32 threads in C", "sh crates/capi/tests/c/threads/tsan.sh 5000")
        .needs("sh crates/capi/tests/c/threads/tsan.sh --probe"),
    step("stress srcu", "cargo run --release -p stress -- srcu --seconds 30"),
    step("stress srcu without membarrier", "cargo run --release -p stress -- srcu --seconds 10 --no-membarrier"),
    step("the torture's checker", "cargo run --release -p stress -- srcu --seconds 3 --broken").must_fail(),
    step("stress mmu", "cargo run --release -p stress -- mmu --seconds 10"),
    step("the soak's checker", "cargo run --release -p stress -- mmu --seconds 3 --broken").must_fail(),
    step("stress regcache under hooks", "cargo run --release -p stress -- regcache --seconds 5 --source hook"),
    step(
        "stress regcache without membarrier",
        "cargo run --release -p stress -- regcache --seconds 5 --no-membarrier",
    ),
    step("srcu without membarrier", "cargo test -p srcu").env(&[("SRCU_NO_MEMBARRIER", "1")]),
    step("the kernel source", "cargo test -p mmu-source --test it kernel").needs(KVM),
    step("other surroundings", "cargo xtask surroundings").needs("cargo xtask surroundings --probe"),
    step("a rush at the kernel source", "cargo run --release -p stress -- rush --seconds 10").needs(KVM),
    step(
        "clippy, with a device's features",
        "cargo clippy -p regcache -p regcache-rdma --features regcache/vfio,regcache-rdma/verbs --all-targets \
         -- -D warnings",
    )
    .needs(GUESTS),
    // After 480 s, the tests that have not ended are skipped.
    step("guests", "cargo xtask guest --kernel 6.1 --kernel 6.12 --limit 480 --within 480").needs(GUESTS),
    // Needs the packages in `target/guest`. Skips whatever is left after three minutes.
    step("a guest of another kind", "cargo xtask guest --arch aarch64 --within 180 --only broker --only coverage")
        .needs("cargo xtask guest --arch aarch64 --check --kept"),
    // The first run takes ten minutes more: it downloads packages, which stay in `target/guest`,
    // and builds everything for that processor.
    step("all of a guest of another kind", "cargo xtask guest --arch aarch64")
        .needs("cargo xtask guest --arch aarch64 --check --if MMUN_GUESTS_AARCH64"),
    step("miri", "cargo +nightly miri test -p srcu")
        .env(&[("MIRIFLAGS", "-Zmiri-many-seeds=0..8")])
        .needs("cargo +nightly miri --version"),
    step("licences", "cargo deny check licenses bans sources").needs("cargo deny --version"),
];

pub(crate) fn run(root: &Path) -> ExitCode {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for step in STEPS {
        if let Some(reason) = step.needs.and_then(lack) {
            println!("SKIP {}: {reason}", step.name);
            skipped += 1;
            continue;
        }
        println!("== {}: {}", step.name, step.command);
        let begin = Instant::now();
        let status = command(step.command)
            .envs(step.env.iter().copied())
            .current_dir(root)
            .status();
        let seconds = begin.elapsed().as_secs_f64();
        let wanted = if step.must_fail { 1 } else { 0 };
        if status
            .as_ref()
            .is_ok_and(|status| status.code() == Some(wanted))
        {
            println!("ok {} ({seconds:.1} s)", step.name);
            passed += 1;
        } else {
            println!("FAILED {} ({seconds:.1} s): {status:?}", step.name);
            failed += 1;
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The exit status of `timeout` after it has killed the command.
const TOO_LONG: i32 = 124;

/// Returns why a probe fails, or `None` if it succeeds. The reason is the last line of its standard
/// error, with a note if `timeout` killed the probe. If the probe cannot be started, the reason is
/// the error of the start.
fn lack(probe: &str) -> Option<String> {
    let said = match command(probe).output() {
        Ok(output) if output.status.success() => return None,
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            let last = errors.lines().next_back().unwrap_or("no message");
            match output.status.code() {
                Some(TOO_LONG) => format!("it did not end in time, after: {last}"),
                _ => last.to_owned(),
            }
        }
        Err(error) => error.to_string(),
    };
    Some(format!("`{probe}` says no: {said}"))
}

fn command(words: &str) -> Command {
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().expect("a step has a program"));
    command.args(words);
    command
}
