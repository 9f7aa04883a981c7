//! A broker: the source for processes that may not load BPF programs.
//!
//! A process with the rights (root, or CAP_BPF and CAP_PERFMON, and `/dev/kvm`) serves a socket;
//! `mmun broker` is one. [`Kernel::start`](super::Kernel::start) of a process that lacks them finds
//! it there, and needs no capability then.
//!
//! ```text
//!   client                                   broker
//!   connects ─────────────────────────────>  looks who it is (SO_PEERCRED, groups)
//!            <──────────────── /dev/kvm ───
//!   makes machine A ───────── machine A ──>  notes its address space, and holds A open
//!            <── header, filter, ring, link ─  maps and a program for this client alone
//!   maps them, arms by plain stores          closes all of them but two programs
//! ```
//!
//! # What is whose
//! The maps and the link are the client's own: what it writes there changes what *it* is told. The
//! link is in its hands, so that its program goes when it goes, and stays when the broker ends. No
//! program is: with one in hand a client could attach it again, and the words that only programs
//! see are kernel addresses.
//!
//! One set of maps and programs is ready before a client comes (`ready.rs`): the verifier takes
//! longer than all the rest. Each set has one client.
//!
//! The program tells the client of changes of its own address space only (`kernel/owner.rs`).
//!
//! # What is not protected
//! `SECURITY.md` says what a client can learn of others and what it can cost them.

mod check;
mod join;
pub(super) mod message;
mod places;
mod ready;
mod session;
mod socket;
mod sys;
#[cfg(test)]
mod tests;

pub(super) use join::{Session, join, path};
pub use message::Refusal;

use super::program;
use super::programs::offsets;
use super::{kernel_error, owner};
use crate::Error;
use message::Reply;
use places::Places;
use ready::Ready;
use session::Means;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Where a broker listens, and is sought, unless told otherwise.
pub const SOCKET: &str = "/run/mmun/broker.sock";
/// The environment variable that names another socket to a client.
pub const VARIABLE: &str = "MMUN_BROKER";

/// Which clients a broker serves, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The group whose members are served, besides root and the broker's own user.
    pub group: Option<String>,
    /// The most clients at a time. One user may have half of the places that the others leave.
    pub max_clients: usize,
}

/// What a broker says of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A process was given a place.
    Came {
        /// Its user.
        user: u32,
        /// Its process, when it connected.
        pid: i32,
    },
    /// Its connection has ended.
    Went {
        /// Its user.
        user: u32,
        /// Its process, when it connected.
        pid: i32,
    },
    /// A process was not given a place.
    Refused {
        /// Its user.
        user: u32,
        /// Its process, when it connected.
        pid: i32,
        /// Why.
        why: Refusal,
    },
}

/// A broker that listens.
#[derive(Debug)]
pub struct Broker {
    listener: OwnedFd,
    group: Option<u32>,
    places: Arc<Places>,
    kvm: OwnedFd,
    means: Arc<Means>,
    version: u64,
}

impl Broker {
    /// Makes a broker that listens at `path`, where a socket without a listener is replaced.
    ///
    /// The socket can be opened by the group's members, or else by its own user only.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the rights or the machine lack something; [`Error::Kernel`] with
    /// `AddrInUse` if another broker listens there, or if the socket cannot be made.
    pub fn bind(path: &Path, options: &Options) -> Result<Self, Error> {
        let group = group(options)?;
        let failed = |call| move |error| kernel_error(call, error);
        if fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
            match socket::connect_to(path, Duration::from_secs(1)) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(failed("unlink of the old socket"))?;
                }
                _ => return Err(kernel_error("bind", io::ErrorKind::AddrInUse.into())),
            }
        }
        let listener = socket::bind_at(path).map_err(failed("bind"))?;
        std::os::unix::fs::chown(path, None, group).map_err(failed("chown of the socket"))?;
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(failed("chmod of the socket"))?;
        let made = Self::new(listener, group, options.max_clients).and_then(|made| {
            socket::start_listening(&made.listener)
                .map_err(failed("listen"))
                .map(|()| made)
        });
        made.inspect_err(|_| drop(fs::remove_file(path)))
    }

    /// Makes a broker on the socket that a service manager has opened and passed on (`LISTEN_FDS`);
    /// `None` if none has.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn inherited(options: &Options) -> Result<Option<Self>, Error> {
        let failed = |error| kernel_error("use of the passed socket (LISTEN_FDS)", error);
        let Some(listener) = sys::take_passed().map_err(failed)? else {
            return Ok(None);
        };
        socket::check_listener(&listener).map_err(failed)?;
        Self::new(listener, group(options)?, options.max_clients).map(Some)
    }

    fn new(listener: OwnedFd, group: Option<u32>, max_clients: usize) -> Result<Self, Error> {
        sys::raise_descriptor_limit();
        let kvm = super::sys::open_kvm().map_err(|error| super::missing::kvm_missing(&error))?;
        let machine = super::sys::create_vm(kvm.as_fd())
            .map_err(|error| super::missing::kvm_missing(&error))?;
        let lacking = || super::missing::description_missing();
        let offsets = offsets()
            .filter(|_| owner::can_be_told())
            .ok_or_else(lacking)?;
        let means = Arc::new(Means {
            machine,
            offsets,
            ready: Ready::new(),
        });
        session::rehearse(&means)?;
        let version = program::fingerprint(kvm.as_fd());
        Ok(Self {
            listener,
            group,
            places: Places::new(max_clients),
            kvm,
            means,
            version,
        })
    }

    /// Serves clients, each in a thread of its own, and tells `observer` of them.
    ///
    /// # Blocking
    /// For ever. If the process ends, its clients go on being told; their waits become slower.
    /// Where the kernel may skip the program ([`may_skip`](super::Features::may_skip)), the clients
    /// cannot learn of skipped runs any more: each invalidates everything once a second, and counts
    /// that as a loss.
    pub fn serve(&self, observer: impl Fn(Event) + Send + Sync + 'static) -> ! {
        let observer: Arc<dyn Fn(Event) + Send + Sync> = Arc::new(observer);
        let means = Arc::clone(&self.means);
        // If there can be no thread, each client waits for the verifier.
        let _ = start_thread("mmu-ready", move || {
            means.ready.refill(|| session::make(&means).ok())
        });
        loop {
            let accepted =
                rustix::net::accept_with(&self.listener, rustix::net::SocketFlags::CLOEXEC);
            match accepted {
                Ok(client) => self.admit(client, &observer),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                // Out of descriptors or of memory: clients that go give some back.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Greets a client and starts to serve it, or refuses. Waits for nothing that the client does.
    fn admit(&self, client: OwnedFd, observer: &Arc<dyn Fn(Event) + Send + Sync>) {
        let Ok(peer) = socket::peer(&client) else {
            return;
        };
        let place = if self.serves(&client, peer) {
            self.places.take(peer.user)
        } else {
            Err(Refusal::Stranger)
        };
        let socket::Peer { user, pid, .. } = peer;
        let mut ticket = match place {
            Ok(ticket) => ticket,
            Err(why) => {
                // There is room for it: it is the first packet.
                let _ = socket::send(&client, &Reply::Refused(why).bytes(), &[]);
                observer(Event::Refused { user, pid, why });
                return;
            }
        };
        if socket::send(
            &client,
            &Reply::Done(self.version).bytes(),
            &[self.kvm.as_fd()],
        )
        .is_err()
        {
            return;
        }
        let (means, shared) = (Arc::clone(&self.means), Arc::clone(observer));
        let run = move || {
            shared(Event::Came { user, pid });
            session::serve(&client, &means, &mut ticket);
            // The place is free before the client can know that the connection has ended.
            drop(ticket);
            drop(client);
            shared(Event::Went { user, pid });
        };
        // If there can be no thread, the client is dropped with the closure, and its place with it.
        let _ = start_thread("mmu-client", run);
    }

    /// Whether the broker serves this client.
    fn serves(&self, client: &OwnedFd, peer: socket::Peer) -> bool {
        let is_member = |group| {
            peer.group == group
                || sys::peer_groups(client).is_ok_and(|groups| groups.contains(&group))
        };
        peer.user == 0 || peer.user == sys::effective_user() || self.group.is_some_and(is_member)
    }
}

fn start_thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(256 << 10);
    thread.spawn(run).map(drop)
}

fn group(options: &Options) -> Result<Option<u32>, Error> {
    let Some(name) = &options.group else {
        return Ok(None);
    };
    match sys::group_named(name) {
        Ok(Some(group)) => Ok(Some(group)),
        Ok(None) => Err(kernel_error(
            "look-up of the group",
            io::Error::other(format!("there is no group {name}")),
        )),
        Err(error) => Err(kernel_error("look-up of the group", error)),
    }
}
