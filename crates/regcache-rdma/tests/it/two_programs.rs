//! The examples `rdma_server` and `rdma_client`, one process each.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use testkit::{Cap, require};

/// An example that Cargo has built: `cargo build -p regcache-rdma --features verbs --examples`.
fn example(name: &str) -> Command {
    let own = std::env::current_exe().unwrap();
    let path: PathBuf = own.parent().unwrap().join("../examples").join(name);
    assert!(
        path.exists(),
        "{}: build the examples first",
        path.display()
    );
    Command::new(path)
}

/// The only row of the table that an example prints: hits, misses, invalidated.
fn row(output: &str) -> [u64; 3] {
    let cells = output.lines().last().unwrap().trim_matches(['|', ' ']);
    let cells: Vec<u64> = cells
        .split(" | ")
        .map(|cell| cell.parse().unwrap())
        .collect();
    cells.try_into().unwrap()
}

#[test]
fn a_client_reads_the_buffers_of_a_server_and_no_byte_is_stale() {
    if !require(Cap::Rdma) {
        return;
    }
    let mut server = example("rdma_server")
        .arg("127.0.0.1:0")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap());
    let mut first = String::new();
    lines.read_line(&mut first).unwrap();
    let address = first.trim().strip_prefix("server: listens at ").unwrap();
    let client = example("rdma_client").arg(address).output().unwrap();
    let said = String::from_utf8_lossy(&client.stdout);
    // If the client failed, its end of the connection is closed, and the server ends too.
    let status = server.wait().unwrap();
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    println!("{said}{rest}");
    assert!(
        client.status.success() && status.success(),
        "{client:?} {status}"
    );
    assert!(
        said.contains("client: 200 requests, 0 bytes wrong"),
        "{said}"
    );
    // Each side makes a new buffer for every tenth request. The allocator decides whether it unmaps
    // the previous one. If it does not, the registration of the previous one is still right.
    for output in [&*said, &rest] {
        let [hits, misses, _invalidated] = row(output);
        assert_eq!(hits + misses, 200);
        assert!(hits >= 100, "{output}");
    }
}
