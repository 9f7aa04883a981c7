//! Counts the wrong bytes that two ranks of Open MPI exchange over verbs, without the drop-in and
//! with it.
//!
//! The ranks give their buffers back in four ways. libfabric and UCX do not see two of them: bare
//! system calls that unmap or discard. As shipped, the card then reads and writes pages that the
//! program no longer owns.

use crate::support::{build, library, output, text};
use std::process::Command;
use testkit::{Cap, require};

/// Rounds of an exchange: the sizes repeat after 13 rounds, the ways after 4.
const ROUNDS: &str = "26";

/// Runs the exchange; returns the count of wrong bytes, and the reports of the ranks. `options` are
/// words for `mpirun`.
fn wrong_bytes(options: &str, source: Option<&str>) -> Option<(u64, String)> {
    let program = build("mpicc.openmpi", "exchange.c", "mpi", &[])?;
    let mut command = Command::new("mpirun.openmpi");
    command
        .args(["--oversubscribe", "--allow-run-as-root", "-n", "2"])
        .args(options.split(' '));
    if let Some(source) = source {
        let (preload, source) = (
            format!("LD_PRELOAD={}", library().display()),
            format!("MMUN={source}"),
        );
        command.args(["-x", &preload, "-x", &source, "-x", "MMUN_REPORT=-"]);
    }
    command.arg(program).args(["0", ROUNDS]);
    let output = output(command);
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    println!("{}: {}", source.unwrap_or("as shipped"), out.trim());
    let words: Vec<&str> = out.split_whitespace().collect();
    let wrong = words
        .windows(2)
        .find(|pair| pair[1] == "bytes")
        .and_then(|pair| pair[0].parse().ok());
    Some((
        wrong.unwrap_or_else(|| panic!("{}: {out}{error}", output.status)),
        error,
    ))
}

/// Exchanges as shipped and with both sources; `used` is a line of each rank's report.
fn compare(options: &str, used: &str) {
    let Some((shipped, _)) = wrong_bytes(options, None) else {
        return;
    };
    let (mended, report) = wrong_bytes(options, Some("both")).expect("it was built");
    assert_eq!(mended, 0, "{report}");
    assert_eq!(
        report.matches(used).count(),
        2,
        "one report for each rank: {report}"
    );
    assert!(
        shipped > 0,
        "as shipped, no byte was wrong: so the check above proves nothing"
    );
}

#[test]
fn open_mpi_over_libfabric_and_verbs() {
    if !require(Cap::Rdma) || !require(Cap::Provider("verbs;ofi_rxm")) {
        return;
    }
    let pml = "--mca pml cm --mca mtl ofi --mca mtl_ofi_provider_include verbs;ofi_rxm";
    // libfabric requests room for 256 peers in a queue, which is more than soft-RoCE has.
    let room = "-x FI_UNIVERSE_SIZE=2";
    compare(&[pml, room].join(" "), "libfabric protected");
}

#[test]
fn open_mpi_over_ucx_and_verbs() {
    if !require(Cap::Rdma) {
        return;
    }
    let pml = "--mca pml ucx --mca opal_common_ucx_tls any --mca opal_common_ucx_devices any";
    // Without shared memory, all messages take the card.
    let transports = "-x UCX_TLS=rc_verbs,ud_verbs,self";
    // UCX connects by datagrams, and drops those whose header names another address as destination.
    // soft-RoCE delivers datagrams with such a header.
    let lenient = "-x UCX_UD_VERBS_ETH_DGID_CHECK=n";
    let options = [pml, transports, lenient].join(" ");
    compare(&options, "UCX       protected");
}
