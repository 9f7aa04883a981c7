//! Requests that the device refuses, and the cache's reaction.
#![expect(unsafe_code, reason = "privilege is dropped in a child")]

use crate::endpoint::open;
use crate::memory::{Lab, PAGE, Source, child, is_child, map, range, unmap};
use mmu_notifier::VaRange;
use regcache::{Error, Options};
use regcache_rdma::{Access, OnDemand, Rdma};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::error::Error as _;
use testkit::{Cap, require};

const ACCESS: Access = Access::LocalWrite.or(Access::RemoteRead);

#[test]
fn memory_that_is_not_mapped_is_named_and_the_cache_goes_on() {
    let Some(lab) = Lab::new(Source::Nothing) else {
        return;
    };
    let gone = map(2);
    unmap(gone, 2);
    let error = lab.cache.get(range(gone, 2)).unwrap_err();
    assert!(matches!(error, Error::NotMapped { .. }), "{error:?}");
    let cause = error.source().unwrap().to_string();
    assert_eq!(
        cause,
        "ibv_reg_mr: not all of the range is mapped, or not for writing"
    );
    assert!(lab.cache.get(VaRange::ALL).is_err());
    let there = map(2);
    assert_ne!(lab.cache.get(range(there, 2)).unwrap().handle().rkey(), 0);
}

/// Runs the test in a child process that may lock 64 pages. Returns the cache in the child, and
/// `None` in the parent once the child has passed.
fn with_little_locked_memory(test: &str) -> Option<Lab> {
    if !require(Cap::Rdma) || !require(Cap::Root) {
        return None;
    }
    if !is_child() {
        assert!(child(test).status().unwrap().success());
        return None;
    }
    let most = 64 * PAGE as u64;
    // Before Linux 5.16 the default maximum may be lower than `most`.
    let maximum = getrlimit(Resource::Memlock)
        .maximum
        .map(|maximum| maximum.max(most));
    let limit = Rlimit {
        current: Some(most),
        maximum,
    };
    setrlimit(Resource::Memlock, limit).unwrap();
    let lab = Lab::with(Source::Nothing, ACCESS, Options::new());
    // The limit does not apply to root, so become another user.
    // SAFETY: the call takes integers, and no other code of this process needs privilege.
    assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0);
    lab
}

#[test]
fn at_the_limit_of_locked_memory_the_cache_evicts_and_goes_on() {
    let test = "limits::at_the_limit_of_locked_memory_the_cache_evicts_and_goes_on";
    let Some(lab) = with_little_locked_memory(test) else {
        return;
    };
    for _ in 0..32 {
        drop(lab.cache.get(range(map(16), 16)).unwrap());
    }
    assert!(lab.cache.stats().evicted > 0, "{}", lab.cache.stats());
}

#[test]
fn at_the_limit_of_locked_memory_what_is_leased_stays_and_the_error_says_how_to_look() {
    let test =
        "limits::at_the_limit_of_locked_memory_what_is_leased_stays_and_the_error_says_how_to_look";
    let Some(lab) = with_little_locked_memory(test) else {
        return;
    };
    let mut leases = Vec::new();
    let error = loop {
        match lab.cache.get_owned(range(map(16), 16)) {
            Ok(lease) => leases.push(lease),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::LimitReached { .. }), "{error:?}");
    assert!(error.source().unwrap().to_string().contains("ulimit -l"));
    assert!(!leases.is_empty() && leases.iter().all(|lease| lease.get().is_current()));
}

#[test]
fn remote_writes_need_local_ones() {
    if !require(Cap::Rdma) {
        return;
    }
    let domain = open().unwrap().alloc_pd().unwrap();
    // SAFETY: no region is registered, so no key is used.
    let error = unsafe { Rdma::new(domain, Access::RemoteWrite) }.unwrap_err();
    assert_eq!(
        error.to_string(),
        "remote writes and atomics need Access::LocalWrite too"
    );
}

#[test]
fn a_device_says_whether_it_pages_on_demand_and_what_it_says_holds() {
    if !require(Cap::Rdma) {
        return;
    }
    let context = open().unwrap();
    let paging = OnDemand::of(&context).unwrap();
    println!("on-demand paging: {paging:?}");
    let domain = context.alloc_pd().unwrap();
    // SAFETY: no region is registered, so no key is used.
    let registrar = unsafe { Rdma::new(domain, ACCESS | Access::OnDemand) };
    match paging {
        None => assert_eq!(
            registrar.unwrap_err().to_string(),
            "the device has no on-demand paging; 'ibv_devinfo -v' shows what it has"
        ),
        Some(paging) => assert!(registrar.is_ok() && paging.read),
    }
}

/// The device gets its translations from the kernel. So the test needs no source, and runs without
/// one.
#[test]
fn on_demand_the_card_reads_new_pages_without_a_source() {
    if !require(Cap::Rdma) {
        return;
    }
    if OnDemand::of(&open().unwrap()).unwrap().is_none() {
        println!(
            "SKIP on_demand: the device has no on-demand paging (rxe has it from Linux 6.18 on)"
        );
        return;
    }
    let Some(mut lab) = Lab::with(Source::Nothing, ACCESS | Access::OnDemand, Options::new())
    else {
        return;
    };
    let address = map(2);
    crate::memory::poke(address, b'o');
    assert_eq!(lab.first_byte(address, 2).unwrap(), b'o');
    crate::memory::map_over(address, 2);
    crate::memory::poke(address, b'n');
    assert_eq!(lab.first_byte(address, 2).unwrap(), b'n');
    assert_eq!(lab.cache.stats().misses, 2, "one for the sink");
}
