//! A device that is removed while it is used.

use crate::endpoint::{open, open_named};
use crate::memory::{Lab, Source, map, poke};
use std::process::Command;
use testkit::{Cap, require};

fn run(program: &str, words: &str) {
    let status = Command::new(program)
        .args(words.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "{program} {words}: {status}");
}

#[test]
fn a_device_that_is_removed_under_load_serves_no_stale_byte_and_goes_with_its_last_user() {
    if !require(Cap::Rdma) || !require(Cap::Root) || !require(Cap::Program("rdma")) {
        return;
    }
    // Other tests use the first device in alphabetical order. The name of this device is the last.
    run("ip", "link add dummy9 type dummy");
    run("ip", "address add 198.51.100.1/24 dev dummy9");
    run("ip", "link set dummy9 up");
    run("rdma", "link add rxe9 type rxe netdev dummy9");
    let mut lab = Lab::over(open_named("rxe9").unwrap(), Source::Hook);
    let address = map(1);
    let mut removal = Command::new("rdma")
        .args(["link", "delete", "rxe9"])
        .spawn()
        .unwrap();
    // There are two kinds of drivers. If the driver closes the contexts of its users, the loop ends
    // with an error. Soft-RoCE waits for its users, so the loop ends after 100 more transfers.
    let (mut value, mut after) = (0_u8, 0);
    while after < 100 {
        value = value.wrapping_add(1);
        poke(address, value);
        match lab.first_byte(address, 1) {
            Ok(found) => assert_eq!(found, value),
            Err(_) => break,
        }
        after += u32::from(after > 0 || open_named("rxe9").is_err());
    }
    assert!(after > 0 || lab.first_byte(address, 1).is_err());
    drop(lab);
    assert!(removal.wait().unwrap().success());
    assert!(open_named("rxe9").is_err() && open().is_ok());
    run("ip", "link delete dummy9");
}
