//! `mmun broker`.

use std::path::PathBuf;

use clap::Args;
use mmu_source::kernel::broker::SOCKET;

/// Lends the kernel source to processes that may not load BPF programs.
///
/// Run it as root, or with CAP_BPF, CAP_PERFMON and the right to open /dev/kvm. Processes of the
/// group (--group) then start the source without any capability: if the library lacks the rights,
/// it connects to the socket. Each client sees changes of its own address space only. It gets a
/// descriptor of /dev/kvm, so members of the group can make virtual machines: serve only users who
/// may do that.
/// Each client makes changes of memory a little slower for every process with a virtual machine
/// (see SECURITY.md).
///
/// After the broker has ended, its clients still see changes; only their waits become slower. A
/// signal that ends it removes the socket, unless a service manager has passed the socket on.
///
/// Exits 2 if it cannot serve; otherwise it runs until a signal ends it.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment, after_long_help = BROKER_EXAMPLES)]
pub(crate) struct BrokerArgs {
    /// Listens at PATH; clients look there unless MMUN_BROKER names another path
    ///
    /// Not needed if a service manager passes a socket on (dist/mmun-broker.socket).
    #[arg(long, value_name = "PATH", default_value = SOCKET, verbatim_doc_comment)]
    pub(crate) socket: PathBuf,

    /// Serves members of this group, besides root and the broker's own user
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<String>,

    /// Serves at most N processes; one user gets at most half of the places that the others leave
    /// free
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) max_clients: u16,

    /// Logs on standard error which clients connect, leave and are refused
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

const BROKER_EXAMPLES: &str = "Examples:
  sudo mmun broker --group \"$(id -gn)\"            Serves your group at /run/mmun/broker.sock.
  mmun coverage --source kernel                    Finds it there, as an ordinary user.

  sudo mmun broker --socket /run/job7.sock --group hpc --max-clients 128
  MMUN_BROKER=/run/job7.sock ./program             Finds it there.

  sudo systemctl enable --now mmun-broker.socket   Starts it when the first client comes.";
