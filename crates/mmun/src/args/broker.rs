//! `mmun broker`.

use std::path::PathBuf;

use clap::Args;
use mmu_source::kernel::broker::SOCKET;

/// Lends the kernel source to processes that may not load BPF programs.
///
/// Run by root, or with CAP_BPF, CAP_PERFMON and the right to open /dev/kvm. A process of the group
/// then starts the source without any capability: the library looks for the socket where it lacks
/// the rights itself. Each client is told of its own address space only. It gets /dev/kvm, so that
/// members of the group can make virtual machines; serve users who may, and who can bear that each
/// client makes changes of memory a little slower for every process with a virtual machine (see
/// SECURITY.md).
///
/// Clients are still told when the broker has ended; only their waits become slower.
///
/// Exits 2 if it cannot serve; otherwise it runs until a signal ends it.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment, after_long_help = BROKER_EXAMPLES)]
pub(crate) struct BrokerArgs {
    /// Listens at PATH; clients look elsewhere only if MMUN_BROKER says so
    ///
    /// Not needed if a service manager passes a socket on (dist/mmun-broker.socket).
    #[arg(long, value_name = "PATH", default_value = SOCKET, verbatim_doc_comment)]
    pub(crate) socket: PathBuf,

    /// Serves members of this group, besides root and the own user
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<String>,

    /// Serves so many processes at most; one user can have half of what the others leave
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) max_clients: u16,

    /// Says on standard error who comes, goes and is refused
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

const BROKER_EXAMPLES: &str = "Examples:
  sudo mmun broker --group \"$(id -gn)\"            Serves your group at /run/mmun/broker.sock.
  mmun coverage --source kernel                    Finds it there, as an ordinary user.

  sudo mmun broker --socket /run/job7.sock --group hpc --max-clients 128
  MMUN_BROKER=/run/job7.sock ./program             Finds it there.

  sudo systemctl enable --now mmun-broker.socket   Starts it when the first client comes.";
