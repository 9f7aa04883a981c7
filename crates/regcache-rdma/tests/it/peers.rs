//! A peer holds a key whose memory changes, or ends while it holds a key.

use crate::endpoint::{Address, Endpoint, Place, Refused};
use crate::memory::{Lab, Source, child, map, map_over, peek, poke, range};
use regcache::Error;
use sideway::ibverbs::completion::WorkCompletionStatus;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use testkit::in_child;

fn refusal(result: Result<u8, crate::endpoint::Failure>) -> WorkCompletionStatus {
    let error = result.unwrap_err();
    error
        .downcast_ref::<Refused>()
        .unwrap_or_else(|| panic!("{error}"))
        .0
}

/// Checks that the device refuses a key that was deregistered. On Linux 5, soft-RoCE does not
/// answer such a request. Then the request fails after its last retry, and also returns no byte.
fn assert_refused(result: Result<u8, crate::endpoint::Failure>) {
    let status = refusal(result);
    let is_silent = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap()
        .starts_with("5.");
    let is_dropped = is_silent && status == WorkCompletionStatus::RetryCounterExceededError;
    assert!(
        is_dropped || status == WorkCompletionStatus::RemoteAccessError,
        "{status:?}"
    );
}

#[test]
fn a_key_of_memory_that_changed_is_refused_once_the_region_is_reaped() {
    let Some(mut lab) = Lab::new(Source::Hook) else {
        return;
    };
    let address = map(2);
    poke(address, b'o');
    let key = lab.cache.get(range(address, 2)).unwrap().handle().rkey();
    assert_eq!(lab.byte_by_key(address, key).unwrap(), b'o');
    map_over(address, 2);
    poke(address, b'n');
    lab.cache.reap();
    assert_refused(lab.byte_by_key(address, key));
}

#[test]
fn a_lease_that_is_held_keeps_the_old_page_and_says_so() {
    let Some(mut lab) = Lab::new(Source::Hook) else {
        return;
    };
    let address = map(2);
    poke(address, b'o');
    let lease = lab.cache.get_owned(range(address, 2)).unwrap();
    let key = lease.get().handle().rkey();
    map_over(address, 2);
    poke(address, b'n');
    assert!(!lease.get().is_current());
    assert_eq!(lab.byte_by_key(address, key).unwrap(), b'o');
    drop(lease);
    lab.cache.reap();
    assert_refused(lab.byte_by_key(address, key));
}

#[test]
fn a_child_cannot_use_the_cache_and_its_parent_continues() {
    let Some(mut lab) = Lab::new(Source::Hook) else {
        return;
    };
    let address = map(2);
    poke(address, b'o');
    assert_eq!(lab.first_byte(address, 2).unwrap(), b'o');
    let misses = lab.cache.stats().misses;
    assert!(in_child(|| matches!(
        lab.cache.get(range(address, 2)),
        Err(Error::Forked)
    )));
    // The card reads the bytes that the parent writes after the fork.
    poke(address, b'p');
    assert_eq!(lab.first_byte(address, 2).unwrap(), b'p');
    assert_eq!(lab.cache.stats().misses, misses);
}

/// Sends an endpoint's address and a place, which [`receive`] receives.
fn send(stream: &mut TcpStream, address: Address, place: Place) {
    let parts = [
        &address.number.to_ne_bytes()[..],
        &address.gid,
        &place.address.to_ne_bytes(),
        &place.key.to_ne_bytes(),
    ];
    stream.write_all(&parts.concat()).unwrap();
}

fn receive(stream: &mut TcpStream) -> (Address, Place) {
    let mut bytes = [0; 32];
    stream.read_exact(&mut bytes).unwrap();
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let gid = bytes[4..20].try_into().unwrap();
    let address = u64::from_ne_bytes(bytes[20..28].try_into().unwrap());
    (
        Address {
            number: word(0),
            gid,
        },
        Place {
            address,
            key: word(28),
        },
    )
}

/// Runs the peer, which lets the test read its memory until it is killed.
fn peer(address: &str) -> ! {
    let lab = Lab::new(Source::Hook).unwrap();
    let memory = map(2);
    poke(memory, b'c');
    let lease = lab.cache.get(range(memory, 2)).unwrap();
    let mut end = Endpoint::new(&lab.context, lab.device.registrar().domain()).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    send(
        &mut stream,
        end.address(),
        Place {
            address: memory as u64,
            key: lease.handle().rkey(),
        },
    );
    end.connect(receive(&mut stream).0).unwrap();
    stream.write_all(b"!").unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
#[expect(unsafe_code, reason = "has the device write to memory of the test")]
fn a_peer_that_is_killed_leaves_an_error_and_no_stale_bytes() {
    if let Ok(address) = std::env::var("REGCACHE_RDMA_PEER") {
        peer(&address);
    }
    let Some(lab) = Lab::new(Source::Hook) else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut other = child("peers::a_peer_that_is_killed_leaves_an_error_and_no_stale_bytes");
    other.env(
        "REGCACHE_RDMA_PEER",
        listener.local_addr().unwrap().to_string(),
    );
    let mut other = other.spawn().unwrap();
    let mut end = Endpoint::new(&lab.context, lab.device.registrar().domain()).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let (address, theirs) = receive(&mut stream);
    end.connect(address).unwrap();
    send(&mut stream, end.address(), theirs);
    stream.read_exact(&mut [0]).unwrap();
    let sink = map(1);
    let lease = lab.cache.get(range(sink, 1)).unwrap();
    let to = Place {
        address: sink as u64,
        key: lease.handle().lkey(),
    };
    // SAFETY: the sink belongs to this test, which waits in `read` for the transfer.
    unsafe { end.read(to, theirs, 1) }.unwrap();
    assert_eq!(peek(sink), b'c');
    other.kill().unwrap();
    other.wait().unwrap();
    poke(sink, b'-');
    // SAFETY: the sink belongs to this test, which waits in `read` for the transfer.
    let error = unsafe { end.read(to, theirs, 1) }.unwrap_err();
    let status = error
        .downcast_ref::<Refused>()
        .unwrap_or_else(|| panic!("{error}"))
        .0;
    let expected = [
        WorkCompletionStatus::RetryCounterExceededError,
        WorkCompletionStatus::RemoteAccessError,
    ];
    assert!(expected.contains(&status), "{status:?}");
    assert_eq!(peek(sink), b'-');
    assert!(lease.is_current());
}
