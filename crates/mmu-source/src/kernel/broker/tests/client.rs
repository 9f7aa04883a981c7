//! The client: what it does, what it accepts and what it refuses.

use super::*;

#[test]
fn an_ordinary_user_starts_the_source_through_a_broker() {
    if !can_run() {
        return;
    }
    let group = nobodys_group();
    let at = At(new_path());
    let broker = Broker::bind(
        &at.0,
        &Options {
            group,
            max_clients: 8,
        },
    )
    .expect("root with KVM and BPF can");
    std::thread::spawn(move || broker.serve(|_| ()));
    assert!(in_child(|| {
        become_nobody();
        // SAFETY: the child of a fork has one thread.
        unsafe { std::env::set_var(VARIABLE, &at.0) };
        let no_map = kernel_sys::create_map(kernel_sys::Map::Ring { bytes: 4096 });
        assert!(
            kernel_sys::open_kvm().is_err() && no_map.is_err(),
            "it has no right"
        );
        let kernel = Kernel::start().expect("the broker helps");
        let page = Scratch::map().expect("a page");
        let range = VaRange::covering(mmu_notifier::Va::new(page.address()), 1).expect("a range");
        let watch = kernel.watch(range).expect("it can be watched");
        let was_valid = watch.is_valid();
        kernel_sys::ask(&page);
        // Each `arm` waits. The broker's program reads the count, so few waits make a machine.
        (0..100).for_each(|_| assert!(kernel.arm(range).is_ok()));
        let (_, machines) = kernel.waits();
        was_valid && !watch.is_valid() && machines < 10
    }));
}

#[test]
fn clients_still_get_events_after_the_broker_is_killed() {
    if !can_run() {
        return;
    }
    let at = At(new_path());
    // SAFETY: the child makes a broker and is killed.
    let child = unsafe { libc::fork() };
    if child == 0 {
        broker::Broker::bind(
            &at.0,
            &Options {
                group: None,
                max_clients: 4,
            },
        )
        .expect("it can be made")
        .serve(|_| ());
    }
    until(|| socket::connect_to(&at.0, SOON).is_ok());
    let client = join(&at).expect("a place");
    assert!(client.is_told());
    end(child);
    assert!(reply(&client.socket).is_none(), "the broker is gone");
    assert!(client.is_told());
    // A second broker replaces the socket, which has no listener.
    let broker = Broker::bind(
        &at.0,
        &Options {
            group: None,
            max_clients: 4,
        },
    )
    .expect("the socket is stale");
    std::thread::spawn(move || broker.serve(|_| ()));
    assert!(join(&at).expect("a place").is_told());
    let second = Broker::bind(
        &at.0,
        &Options {
            group: None,
            max_clients: 4,
        },
    );
    let Err(Error::Kernel { source, .. }) = second else {
        panic!("one listens there already: {second:?}")
    };
    assert_eq!(source.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn without_its_broker_a_client_does_not_claim_that_no_run_was_skipped() {
    if !can_run() {
        return;
    }
    let at = At(new_path());
    let group = nobodys_group();
    let (mut go, mut going) = pipe();
    // SAFETY: the child makes a broker and is killed.
    let broker = unsafe { libc::fork() };
    if broker == 0 {
        let broker = Broker::bind(
            &at.0,
            &Options {
                group,
                max_clients: 4,
            },
        )
        .expect("root with KVM and BPF can");
        std::thread::spawn(move || broker.serve(|_| ()));
        let _ = go.read_exact(&mut [0]);
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(0) };
    }
    until(|| socket::connect_to(&at.0, SOON).is_ok());
    let good = in_child(|| {
        become_nobody();
        // SAFETY: the child of a fork has one thread.
        unsafe { std::env::set_var(VARIABLE, &at.0) };
        let kernel = Kernel::start().expect("the broker helps");
        let page = Scratch::map().expect("a page");
        let range = VaRange::covering(mmu_notifier::Va::new(page.address()), 1).expect("a range");
        let mut watch = kernel.watch(range).expect("it can be watched");
        let look = |kernel: &Kernel| {
            let inner = std::sync::Arc::clone(&kernel.inner);
            kernel
                .vault()
                .run(move |machines| machines.look_for_missed_runs(&inner, true));
        };
        look(&kernel);
        assert_eq!(kernel.lost(), 0, "the broker says that none was skipped");
        // The kernel may have moved the page meanwhile.
        let begun = Instant::now();
        while !watch.is_valid() {
            watch.renew().expect("it can be watched");
            assert!(begun.elapsed() < SOON, "the page is moved all the time");
        }
        going.write_all(&[0]).expect("the broker lives");
        let begun = Instant::now();
        while kernel
            .vault()
            .run(|machines| machines.missed_runs())
            .is_some()
        {
            assert!(
                begun.elapsed() < SOON,
                "a broker that is gone does not answer"
            );
        }
        look(&kernel);
        let lost = kernel.lost();
        look(&kernel);
        !watch.is_valid() && lost == 1 && kernel.lost() == 1
    });
    end(broker);
    assert!(good);
}

#[test]
fn without_its_broker_a_client_makes_one_machine_for_a_flood() {
    if !can_run() {
        return;
    }
    let at = At(new_path());
    let group = nobodys_group();
    // SAFETY: the child makes a broker and is killed.
    let broker = unsafe { libc::fork() };
    if broker == 0 {
        let options = Options {
            group,
            max_clients: 4,
        };
        Broker::bind(&at.0, &options)
            .expect("root with KVM and BPF can")
            .serve(|_| ());
    }
    until(|| socket::connect_to(&at.0, SOON).is_ok());
    let (mut go, mut going) = pipe();
    let (mut come, mut coming) = pipe();
    let ended = std::thread::spawn(move || {
        let has_come = come.read_exact(&mut [0]).is_ok();
        end(broker);
        going.write_all(&[0]).expect("the client lives");
        has_come
    });
    let good = in_child(|| {
        become_nobody();
        // SAFETY: the child of a fork has one thread.
        unsafe { std::env::set_var(VARIABLE, &at.0) };
        let kernel = Kernel::start().expect("the broker helps");
        kernel.wait_for_threads();
        coming.write_all(&[0]).expect("the parent lives");
        go.read_exact(&mut [0]).expect("the parent lives");
        let inner = std::sync::Arc::clone(&kernel.inner);
        // A machine that is not used is closed after this closure.
        kernel.vault().run(move |machines| {
            let open = || {
                let all = fs::read_dir("/proc/thread-self/fd").expect("proc is there");
                all.filter_map(|one| fs::read_link(one.ok()?.path()).ok())
                    .filter(|name| name.as_os_str() == "anon_inode:kvm-vm")
                    .count()
            };
            let before = open();
            (0..10).for_each(|_| machines.make_b(&inner));
            open() - before == 1
        })
    });
    assert!(ended.join().expect("no panic") && good);
}

#[test]
fn a_hostile_socket_is_refused_and_not_believed() {
    if !can_run() {
        return;
    }
    let null = || OwnedFd::from(File::open("/dev/null").expect("it is there"));
    let kvm = || kernel_sys::open_kvm().expect("root may");
    let said = |bytes: &[u8], first: Vec<OwnedFd>, then: Vec<OwnedFd>| {
        let (server, client) = pair();
        let bytes = bytes.to_vec();
        let thread = std::thread::spawn(move || {
            let first: Vec<BorrowedFd<'_>> = first.iter().map(|one| one.as_fd()).collect();
            let then: Vec<BorrowedFd<'_>> = then.iter().map(|one| one.as_fd()).collect();
            let _ = socket::send(&server, &bytes, &first);
            if socket::receive(&server).is_ok_and(|packet| packet.is_some()) {
                let _ = socket::send(&server, &Reply::Done(0).bytes(), &then);
            }
            let _ = socket::receive(&server);
        });
        let error = with(client).err();
        thread.join().expect("it ends");
        error.expect("it is not believed")
    };
    let version = program::fingerprint(null().as_fd());
    let greeting = Reply::Done(version).bytes();
    let kind = "what came is not what a broker sends";
    assert!(said(b"SSH-2.0", vec![], vec![]).contains("does not speak"));
    assert!(
        said(&Reply::Done(version + 1).bytes(), vec![kvm()], vec![]).contains("another version")
    );
    assert!(said(&Reply::Refused(Refusal::Full).bytes(), vec![], vec![]).contains("--max-clients"));
    assert_eq!(said(&greeting, vec![], vec![]), kind);
    assert_eq!(said(&greeting, vec![null()], vec![]), kind, "no KVM");
    assert_eq!(said(&greeting, vec![kvm(), kvm()], vec![]), kind);
    assert_eq!(
        said(&greeting, vec![kvm()], (0..5).map(|_| null()).collect()),
        kind,
        "no maps"
    );
    // Maps without a link: no program would count the changes.
    let at = start(4);
    let real = || join(&at).expect("a place").given;
    let mut unlinked = real();
    unlinked.pop();
    unlinked.push(null());
    assert_eq!(said(&greeting, vec![kvm()], unlinked), kind);
    let mut swapped = real();
    swapped.swap(0, 1);
    assert_eq!(said(&greeting, vec![kvm()], swapped), kind);
}

#[test]
fn another_users_socket_is_not_asked() {
    if !can_run() {
        return;
    }
    let at = At(new_path());
    // SAFETY: the child listens and is killed.
    let child = unsafe { libc::fork() };
    if child == 0 {
        become_nobody();
        let listener = socket::bind_at(&at.0).expect("every user may write to the folder");
        socket::start_listening(&listener).expect("it is bound");
        std::thread::sleep(SOON);
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(1) };
    }
    until(|| socket::connect_to(&at.0, SOON).is_ok());
    let error = with(connect(&at)).expect_err("it belongs to the user `nobody`");
    end(child);
    assert!(
        error.contains("65534") && error.contains("neither root"),
        "{error}"
    );
}
