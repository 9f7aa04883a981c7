//! A broker runs the source for processes that may not load BPF programs.
//!
//! A process with the necessary privileges (root, or CAP_BPF and CAP_PERFMON, and access to
//! `/dev/kvm`) serves a socket. `mmun broker` is such a process. If a process lacks the privileges,
//! its [`Kernel::start`](super::Kernel::start) connects to that socket and then needs no
//! capability.
//!
//! ```text
//!   client                                   broker
//!   connects ─────────────────────────────>  checks the peer (SO_PEERCRED, groups)
//!            <──────────────── /dev/kvm ───
//!   makes machine A ───────── machine A ──>  reads its address space, and holds A open
//!            <── header, filter, ring, link ─  maps and a program for this client alone
//!   maps them, arms by plain stores          closes them, keeps two programs
//! ```
//!
//! # What the client owns
//! The client owns its maps and its link. Its writes to the maps affect only the events that *it*
//! gets. Because the client holds the link, its program is detached when the client ends, and stays
//! attached when the broker ends. The client gets no descriptor of the program, because it could
//! attach the program a second time. It gets no descriptor of the words that only programs see,
//! because they contain kernel addresses.
//!
//! The broker prepares one set of maps and programs before a client connects (`ready.rs`), because
//! the verifier takes longer than everything else. Each set is for one client.
//!
//! The program reports only changes of its client's own address space (`kernel/owner.rs`).
//!
//! # What is not protected
//! `SECURITY.md` says what a client can learn of other processes, and what it can cost them.

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

pub(super) use join::{NONE, Session, join, path};
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

/// The default path of the broker's socket, for brokers and clients.
pub const SOCKET: &str = "/run/mmun/broker.sock";
/// The environment variable that gives a client another path.
pub const VARIABLE: &str = "MMUN_BROKER";

/// Which clients a broker serves, and how many of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The broker serves members of this group, besides root and the broker's own user.
    pub group: Option<String>,
    /// The largest number of clients at a time. A user other than root gets at most half of the
    /// places that the other users leave, rounded up.
    pub max_clients: usize,
}

/// What a broker reports about its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A process got a place.
    Came {
        /// The user of the process.
        user: u32,
        /// The process that connected.
        pid: i32,
    },
    /// The connection of a client has ended.
    Went {
        /// The user of the process.
        user: u32,
        /// The process that connected.
        pid: i32,
    },
    /// A process got no place.
    Refused {
        /// The user of the process.
        user: u32,
        /// The process that connected.
        pid: i32,
        /// Why.
        why: Refusal,
    },
}

/// A listening broker.
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
    /// Makes a broker that listens at `path`. If a socket without a listener exists there, it is
    /// replaced.
    ///
    /// The group's members can open the socket. Without a group, only the broker's own user can.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the machine or the privileges lack something. [`Error::Kernel`] if
    /// the socket cannot be made, with `AddrInUse` if another broker listens there.
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
        let listener = socket::bind_at(path).map_err(|error| {
            let call = match error.kind() {
                io::ErrorKind::NotFound => {
                    "bind in a folder that does not exist (root makes that of the default; others choose --socket PATH)"
                }
                io::ErrorKind::PermissionDenied => {
                    "bind in a folder where this user may not write (choose --socket PATH)"
                }
                _ => "bind",
            };
            kernel_error(call, error)
        })?;
        let listen = || {
            std::os::unix::fs::chown(path, None, group).map_err(failed("chown of the socket"))?;
            let mode = if group.is_some() { 0o660 } else { 0o600 };
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .map_err(failed("chmod of the socket"))?;
            let made = Self::new(listener, group, options.max_clients)?;
            socket::start_listening(&made.listener).map_err(failed("listen"))?;
            Ok(made)
        };
        listen().inspect_err(|_| drop(fs::remove_file(path)))
    }

    /// Makes a broker on the socket that a service manager has opened and passed on (`LISTEN_FDS`).
    /// Returns `None` if there is no such socket.
    ///
    /// # Errors
    /// The errors of [`bind`](Self::bind).
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

    /// Serves each client on a thread of its own, and reports to `observer`.
    ///
    /// # Blocking
    /// Never returns. If this process ends, its clients still learn of every change, but their
    /// waits become slower. If the kernel may skip the program
    /// ([`may_skip`](super::Features::may_skip)), the clients can no longer learn of skipped runs.
    /// So each client then invalidates its whole address space once a second, and counts that as a
    /// loss.
    pub fn serve(&self, observer: impl Fn(Event) + Send + Sync + 'static) -> ! {
        let observer: Arc<dyn Fn(Event) + Send + Sync> = Arc::new(observer);
        let means = Arc::clone(&self.means);
        // If no thread can be started, each client waits for the verifier instead.
        let _ = start_thread("mmu-ready", move || {
            means.ready.refill(|| session::make(&means).ok())
        });
        loop {
            let accepted =
                rustix::net::accept_with(&self.listener, rustix::net::SocketFlags::CLOEXEC);
            match accepted {
                Ok(client) => self.admit(client, &observer),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                // Descriptors or memory ran out. Clients that disconnect release some.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Greets a client and starts to serve it, or refuses it. Does not wait for the client.
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
                // The send cannot block: its packet is the first of the connection, so the socket's
                // buffer has room.
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
            // Free the place before the client can see that the connection has ended.
            drop(ticket);
            drop(client);
            shared(Event::Went { user, pid });
        };
        // If no thread can be started, the closure is dropped, and with it the client and its
        // place.
        let _ = start_thread("mmu-client", run);
    }

    /// Tells whether the broker serves this client.
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
