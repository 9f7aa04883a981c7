//! Ranks exchange buffers that are freed and mapped anew. Open MPI runs over ob1, UCX and
//! libfabric, MPICH over its default transport; a test is skipped if its `mpicc` is missing.

use crate::support::{build, output, preloaded, text};
use std::path::Path;
use std::process::Command;
use testkit::{Cap, PYTHON, require};

/// Seconds of each run; `MMUN_SECONDS` sets another value.
fn seconds() -> String {
    std::env::var("MMUN_SECONDS").unwrap_or_else(|_| "2".to_owned())
}

fn exchange(mut command: Command, program: &Path, uses: &[&str]) {
    command.args(["-n", "2"]).arg(program).arg(seconds());
    let output = output(command);
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}{error}");
    assert!(out.contains(" 0 bytes wrong"), "{out}{error}");
    for word in uses {
        assert_eq!(
            error.matches(word).count(),
            2,
            "one report for each rank: {word}: {error}"
        );
    }
}

fn open_mpi(options: &[&str], source: &str, uses: &[&str]) {
    let Some(program) = build("mpicc.openmpi", "exchange.c", "mpi", &[]) else {
        return;
    };
    let mut command = preloaded("mpirun.openmpi", source);
    command
        .args(["--oversubscribe", "--allow-run-as-root"])
        .args(options);
    exchange(command, &program, uses);
}

#[test]
fn open_mpi_over_its_own_transport() {
    open_mpi(&["--mca", "pml", "ob1"], "hook", &[]);
}

#[test]
fn open_mpi_over_ucx() {
    let options = [
        "--mca",
        "pml",
        "ucx",
        "--mca",
        "pml_ucx_tls",
        "any",
        "--mca",
        "pml_ucx_devices",
        "any",
    ];
    open_mpi(&options, "hook", &[]);
}

#[test]
fn open_mpi_over_libfabric() {
    open_mpi(
        &[
            "--mca",
            "pml",
            "cm",
            "--mca",
            "mtl",
            "ofi",
            // Open MPI 5 excludes providers such as tcp otherwise.
            "--mca",
            "mtl_ofi_provider_exclude",
            "shm",
        ],
        "hook",
        &["libfabric"],
    );
}

#[test]
fn mpich() {
    for source in ["hook", "auto"] {
        let Some(program) = build("mpicc.mpich", "exchange.c", "mpi", &[]) else {
            return;
        };
        let mut command = preloaded("mpirun.mpich", source);
        // Where there is a card that does RDMA in software, UCX uses datagrams, as in `rdma.rs`.
        command.env("UCX_UD_VERBS_ETH_DGID_CHECK", "n");
        exchange(command, &program, &["UCX       protected"]);
    }
}

#[test]
fn a_program_in_python_that_loads_it_locally() {
    let needs = [
        Cap::Program("mpirun.openmpi"),
        Cap::PythonModule("mpi4py"),
        Cap::PythonModule("numpy"),
    ];
    if !needs.into_iter().all(require) {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/programs/exchange.py");
    let mut command = preloaded("mpirun.openmpi", "auto");
    command
        .args(["--oversubscribe", "--allow-run-as-root", "-n", "2", PYTHON])
        .arg(script)
        .arg(seconds());
    let output = output(command);
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success() && out.contains(" 0 bytes wrong"),
        "{out}{error}"
    );
}
