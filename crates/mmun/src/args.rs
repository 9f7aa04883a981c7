//! The command line: the one source of help, man pages and completions.

mod broker;
mod coverage;
mod details;
mod diff;
mod report;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::error::ErrorKind;
use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand};
use mmu_source::process::Pid;

pub(crate) use self::broker::BrokerArgs;
pub(crate) use self::coverage::{CellArgs, CoverageArgs, LibraryCellArgs, TraceeArgs};
pub(crate) use self::details::{DetailArgs, SummaryArgs, TraceFormat};
pub(crate) use self::diff::DiffArgs;
pub(crate) use self::report::{ReportArgs, ReportFormat};
use crate::events::{Events, EventsParser};
use crate::outcome::{FAILED, Outcome};
use crate::record;

const EXAMPLES: &str = "\
Examples:
  mmun trace ls                   every change of a translation, while ls runs
  mmun trace -p 4711              the same, of a process that already runs
  mmun coverage                   which event source sees which change, on this machine
  mmun doctor                     which event sources can be used here, and what the others lack
  mmun man ~/.local/share/man/man1
                                  installs the manual pages";

const TRACE_EXAMPLES: &str = "\
Examples:
  mmun trace -e unmap,clear ls -R .         two kinds of changes only
  mmun trace -e '!protection_vma' ls -R .   all kinds but one
  mmun trace --report app.html ./app        a page for a browser: the address space over time, stacks
  mmun trace --summary-only make            totals by event, by place in the code, by what lay there
  mmun trace -k -e unmap ./server           who unmaps: the stack of each call
  mmun trace --summary=where --sort resident --top 3 ./server
                                            the three places that give most memory back
  mmun trace --json -o trace.json ./server  one record a line, for other programs
  mmun trace -k --births --format perfetto -o app.pftrace ./app
                                            for https://ui.perfetto.dev
  mmun trace -p 4711 -p 4712                two running processes, until they end or ^C";

/// Shows what a program does to its address space.
#[derive(Debug, Parser)]
#[command(name = "mmun", version, disable_help_subcommand = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Trace(TraceArgs),
    Report(ReportArgs),
    Diff(DiffArgs),
    Run(RunArgs),
    Coverage(CoverageArgs),
    Doctor(DoctorArgs),
    Broker(BrokerArgs),
    /// Runs one operation under one source; `coverage` starts it.
    #[command(hide = true)]
    CoverageCell(CellArgs),
    /// Runs one operation under a library's cache; `coverage --library` starts it.
    #[command(hide = true)]
    CoverageLibraryCell(LibraryCellArgs),
    /// Runs one operation for the tracer that started it.
    #[command(hide = true)]
    CoverageTracee(TraceeArgs),
    /// Makes calls that do nothing, for the tracer that measures their time.
    #[command(hide = true)]
    IdleCalls {
        /// The number of the processor to run on.
        there: Option<usize>,
    },
    /// Prints the manual pages: of mmun, and of each command.
    ///
    /// As roff, one after another:       mmun man | man -l -
    /// To a folder, each in its own file: mmun man ~/.local/share/man/man1
    #[command(verbatim_doc_comment)]
    Man {
        /// Writes mmun.1, mmun-trace.1 and the others to this folder, and makes it if necessary
        #[arg(value_name = "FOLDER")]
        folder: Option<PathBuf>,
    },
    /// Prints the completions for a shell.
    Completions {
        /// The shell that will read them
        shell: clap_complete::Shell,
    },
}

/// Records every change a program makes to its address translations, with its threads and children.
///
/// Each traced task holds a counted reference (get, put) to the notifier of its address space; the
/// notifier is freed once, after the last put. Each system call that removes or changes
/// translations is recorded with a start and an end.
///
/// Exits as the program did; 125 if mmun itself failed, 126 if the program cannot be run, 127 if it
/// does not exist. SIGINT or SIGTERM ends the trace, not the program; mmun then dies of that
/// signal, which a shell shows as 130 or 143. A signal that was ignored when mmun started stays
/// ignored: a script that starts mmun with "&" ignores SIGINT.
///
/// If the records cannot be written (a full disk, a quota), the trace ends and the program runs on
/// untraced. mmun says so, waits for the program's end, and exits with 125. If the reader of a pipe
/// has gone, mmun waits as well, says nothing, and dies of SIGPIPE.
///
/// A fork is recorded with the ranges that it write-protects, which mmun reads from /proc; without
/// /proc, it is recorded as one range of the whole address space.
///
/// A program can have only one tracer: the kernel refuses debuggers and strace meanwhile. Run a
/// program under AddressSanitizer with LSAN_OPTIONS=detect_leaks=0, or it exits with status 1, or
/// waits for ever (GCC 14).
///
/// A set-user-ID program, such as sudo, that an ordinary user traces runs without the rights of its
/// owner. Root can attach to it with -p, and traces it with its rights.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    override_usage = "mmun trace [OPTIONS] PROG [ARGS]...\n       mmun trace [OPTIONS] -p PID [-p PID]...",
    after_help = TRACE_EXAMPLES,
    group(ArgGroup::new("totals").multiple(true)),
    group(ArgGroup::new("places").multiple(true)),
    after_long_help = format!("{TRACE_EXAMPLES}\n\n{}", record::HELP)
)]
pub(crate) struct TraceArgs {
    /// Writes to FILE instead of standard error; - is standard output. A file that PROG uses is
    /// refused: a standard stream, or one that its arguments name
    #[arg(
        short,
        long,
        value_name = "FILE",
        required_if_eq_any = [("format", "perfetto"), ("format", "chrome")]
    )]
    pub(crate) output: Option<PathBuf>,

    /// Records only these events, such as unmap,clear; or all but these, such as '!clear,migrate';
    /// may be repeated
    ///
    /// Several options add up; an event that one option excludes is not recorded. The life of tasks
    /// and address spaces is always recorded. Quote the '!', which shells expand.
    #[arg(short, long, value_name = "[!]EVENTS", value_parser = EventsParser, verbatim_doc_comment)]
    pub(crate) events: Vec<Events>,

    /// Writes one JSON object a line, as --format json does
    #[arg(long)]
    pub(crate) json: bool,

    /// Writes the trace in this form [default: text]
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    pub(crate) format: Option<TraceFormat>,

    #[command(flatten)]
    pub(crate) summary: SummaryArgs,

    /// Writes a page with pictures for a browser at the end, instead of the records
    ///
    /// The page has everything that --details, -k and --births record. With --no-births an mmap
    /// that replaces nothing does not stop the program, which saves some 20 us, but the page does
    /// not show when mappings begin. With -o, --json or -k the records are written as well.
    #[arg(long, value_name = "FILE.html", group = "places", verbatim_doc_comment)]
    pub(crate) report: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) details: DetailArgs,

    /// Writes the totals instead of the records
    #[arg(long, groups = ["totals", "places"])]
    pub(crate) summary_only: bool,

    /// Shows no progress line (the number of events) with --summary-only or --report
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Follows children and threads; the default
    #[arg(short, long, overrides_with = "no_follow")]
    pub(crate) follow: bool,

    /// Traces the program's first task only
    ///
    /// If another thread runs execve, the trace ends there. mmun detaches from a child made with
    /// CLONE_PTRACE at its first stop.
    #[arg(long, overrides_with = "follow")]
    pub(crate) no_follow: bool,

    /// Stops at every system call instead of only those that change memory
    ///
    /// Slower, but the program survives even if the tracer itself is killed. -p and --no-follow
    /// always do this.
    #[arg(long, verbatim_doc_comment)]
    pub(crate) no_seccomp: bool,

    /// Attaches to a running process, all its threads; may be repeated
    #[arg(short = 'p', long = "attach", value_name = "PID", value_parser = clap::value_parser!(Pid).range(1..))]
    pub(crate) pids: Vec<Pid>,

    /// The program to run, and its arguments
    #[arg(
        value_name = "PROG",
        trailing_var_arg = true,
        required_unless_present = "pids",
        conflicts_with = "pids"
    )]
    pub(crate) program: Vec<OsString>,
}

/// Runs a program, unchanged, with registration caches of UCX and libfabric that cannot go stale.
/// The library libmmun_dropin.so is preloaded into the program and everything it starts, mpirun's
/// ranks on this machine included. It does nothing in processes that use neither UCX nor libfabric.
/// When the program has ended, a table on standard error lists the processes that use one of them,
/// their event sources, and the stale registrations that were refused.
///
/// The environment variables MMUN, MMUN_STRICT and MMUN_REPORT keep their values unless an option
/// overrides them. If MMUN_REPORT is set and -o is not given, the processes write their reports
/// there, and mmun executes the program in its own place.
///
/// mmun passes a signal that another process sends to it on to the program. A signal to the process
/// group of both (kill %1, kill -- -PGID) therefore reaches the program twice: directly and through
/// mmun, which cannot know that the program has it already. A key of the terminal such as ^C
/// reaches the program once.
///
/// If the program stops in the foreground of a terminal, mmun stops as well, because a shell waits
/// for that; elsewhere it does not stop. SIGCONT to either of them continues the program. Exits as
/// the program did; 125 if mmun itself failed or cannot write the report of a program that exits
/// with 0, 126 if the program cannot be run, 127 if it does not exist. If TMPDIR is full or cannot
/// be written, the program runs and only the reports of its processes are lost, which is said; with
/// -o, mmun refuses to run without a folder in TMPDIR.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    override_usage = "mmun run [OPTIONS] [--] PROG [ARGS]..."
)]
pub(crate) struct RunArgs {
    /// The event sources: auto uses both, or hook alone if kernel does not work [default: MMUN, or
    /// auto]
    #[arg(long, value_name = "NAME", value_enum)]
    pub(crate) source: Option<Watch>,

    /// Ends a process at its first use of UCX or libfabric if that use is not protected or a change
    /// could be missed (it exits with 125)
    ///
    /// A program that is statically linked, set-user-ID, or has file capabilities never loads the
    /// library, so it starts all the same. Neither is a use noticed that does not go through the
    /// library (RTLD_DEEPBIND, a static UCX or libfabric); the report names such a process if it
    /// can. Not with --source off.
    #[arg(long)]
    pub(crate) strict: bool,

    /// Prints before the run, for every kind of change, which source sees it on this machine;
    /// 'mmun coverage' prints that without a program
    #[arg(long)]
    pub(crate) check: bool,

    /// Writes the report to FILE instead of standard error; - is standard output. FILE must be
    /// writable before the program starts, and no file that the program uses; a FIFO must have a
    /// reader when the program has ended
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Writes no report, whatever MMUN_REPORT says; mmun executes the program in its own place
    #[arg(long, conflicts_with = "output")]
    pub(crate) no_report: bool,

    /// The program to run, and its arguments
    #[arg(
        value_name = "PROG",
        trailing_var_arg = true,
        required_unless_present = "check"
    )]
    pub(crate) program: Vec<OsString>,
}

/// The values of `MMUN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Watch {
    Auto,
    Hook,
    Kernel,
    Both,
    Off,
}

/// Says which event sources work here, and what the others lack.
///
/// For each source: everything that is missing, each with a command that grants it, and the kernel
/// features that were found. The answer is for the current user: a source that only root may use is
/// not usable for others.
///
/// Exits 0 if all sources are usable, 1 if one is not, 2 if mmun could not find out.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct DoctorArgs {
    /// Writes one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

/// A text to print instead of running a command.
#[derive(Debug)]
pub(crate) enum Instead {
    /// The requested help or version, on standard output.
    Help(Box<clap::Error>),
    /// Help for a command line without arguments, on standard error, and the status to exit with.
    Usage(Box<clap::Error>, Outcome),
    /// Why the command line is wrong, in one line with a hint, and the status to exit with.
    Refuse(String, Outcome),
}

/// # Errors
/// The user asked for help or the version, or the arguments are wrong or missing.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Instead> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    // `mmun help trace` is `mmun trace --help`.
    if args.get(1).is_some_and(|word| word == "help") {
        args.remove(1);
        args.truncate(2);
        args.push("--help".into());
    }
    let command = args
        .get(1)
        .and_then(|word| word.to_str())
        .filter(|word| COMMANDS.iter().any(|(name, _)| name == word));
    let outcome = if matches!(
        command,
        Some("report" | "diff" | "coverage" | "doctor" | "broker")
    ) {
        Outcome::Exit(2)
    } else {
        FAILED
    };
    Cli::try_parse_from(&args).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Instead::Help(Box::new(error)),
        // Prints the help but fails, because a script that has lost its arguments must stop.
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Instead::Usage(Box::new(error), outcome)
        }
        _ => Instead::Refuse(one_line(&error.render().to_string(), command), outcome),
    })
}

/// The first paragraph of clap's message, as one line without its label, and a hint at `--help`.
fn one_line(message: &str, command: Option<&str>) -> String {
    let paragraph = message
        .strip_prefix("error: ")
        .unwrap_or(message)
        .split("\n\n")
        .next()
        .unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    let command = command.map_or(String::new(), |name| format!(" {name}"));
    format!("{}; try 'mmun{command} --help'", words.join(" "))
}

/// The visible commands, and the names of their manual pages.
const COMMANDS: [(&str, &str); 9] = [
    ("trace", "mmun-trace"),
    ("report", "mmun-report"),
    ("diff", "mmun-diff"),
    ("run", "mmun-run"),
    ("coverage", "mmun-coverage"),
    ("doctor", "mmun-doctor"),
    ("broker", "mmun-broker"),
    ("man", "mmun-man"),
    ("completions", "mmun-completions"),
];

/// The manual pages, as roff, each with the name of its file: that of `mmun`, then those of the
/// commands.
fn pages() -> impl Iterator<Item = (String, clap_mangen::Man)> {
    let mut cli = Cli::command();
    cli.build();
    let of_command = |(name, page): (&str, &'static str)| {
        cli.find_subcommand(name)
            .expect("the test compares the names with the table")
            .clone()
            .name(page)
    };
    let commands: Vec<clap::Command> = COMMANDS.map(of_command).into();
    std::iter::once(cli).chain(commands).map(|command| {
        let file = format!("{}.1", command.get_name());
        (file, clap_mangen::Man::new(command))
    })
}

/// Prints the manual pages one after the other.
///
/// # Errors
/// The errors of `out`.
pub(crate) fn man(out: &mut dyn io::Write) -> io::Result<()> {
    pages().try_for_each(|(_, page)| page.render(out))
}

/// Writes each manual page to a file in `folder`.
///
/// # Errors
/// The folder or file, and its error.
pub(crate) fn man_into(folder: &Path) -> Result<(), (PathBuf, io::Error)> {
    fs::create_dir_all(folder).map_err(|error| (folder.to_owned(), error))?;
    for (name, page) in pages() {
        let path = folder.join(name);
        let mut text = Vec::new();
        page.render(&mut text)
            .and_then(|()| fs::write(&path, &text))
            .map_err(|error| (path, error))?;
    }
    Ok(())
}

pub(crate) fn completions(shell: clap_complete::Shell, out: &mut dyn std::io::Write) {
    // Remove hidden commands, which would otherwise be completed.
    let cli = Cli::command();
    let shown = cli
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut shown = clap::Command::new("mmun")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .args(cli.get_arguments())
        .subcommands(shown);
    clap_complete::generate(shell, &mut shown, "mmun", out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(args: &[&str]) -> Result<TraceArgs, String> {
        let all = ["mmun", "trace"].iter().chain(args).map(OsString::from);
        match parse(all) {
            Ok(Cli {
                command: Command::Trace(args),
            }) => Ok(args),
            Ok(_) => Err("another command".into()),
            Err(Instead::Help(text) | Instead::Usage(text, _)) => Err(text.to_string()),
            Err(Instead::Refuse(text, _)) => Err(text),
        }
    }

    #[test]
    fn the_table_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_that_is_shown_has_a_manual_page() {
        let cli = Cli::command();
        let shown = cli
            .get_subcommands()
            .filter(|command| !command.is_hide_set());
        assert_eq!(
            shown.map(|command| command.get_name()).collect::<Vec<_>>(),
            COMMANDS.map(|(name, _)| name)
        );
    }

    #[test]
    fn completions_and_manual_have_the_visible_commands_only() {
        let shells = [
            clap_complete::Shell::Bash,
            clap_complete::Shell::Zsh,
            clap_complete::Shell::Fish,
        ];
        let mut texts = shells.map(|shell| {
            let mut text = Vec::new();
            completions(shell, &mut text);
            text
        });
        let mut pages = Vec::new();
        man(&mut pages).unwrap();
        assert!(String::from_utf8_lossy(&pages).contains(".TH mmun 1 "));
        for text in texts.iter_mut().chain([&mut pages]) {
            let text = String::from_utf8_lossy(text);
            for (name, _) in COMMANDS {
                assert!(text.contains(name), "{name}");
            }
            let events = crate::events::NAMES
                .iter()
                .all(|event| text.contains(event));
            assert!(events, "the values of --events");
            for hidden in [
                "coverage-cell",
                "coverage-tracee",
                "coverage__cell",
                "coverage\\-cell",
            ] {
                assert!(!text.contains(hidden), "{hidden}");
            }
        }
    }

    #[test]
    fn a_wrong_shell_is_refused_with_the_help_of_its_command() {
        let Err(Instead::Refuse(text, _)) =
            parse(["mmun", "completions", "tcsh"].map(OsString::from))
        else {
            panic!("it is no shell that is known");
        };
        assert!(
            text.contains("tcsh")
                && text.contains("bash")
                && text.ends_with("try 'mmun completions --help'"),
            "{text}"
        );
    }

    #[test]
    fn options_end_where_the_program_begins() {
        let args = trace(&["--json", "ls", "--json", "-p", "1"]).unwrap();
        assert_eq!(args.program, ["ls", "--json", "-p", "1"]);
        assert!(args.json && args.pids.is_empty());
        assert_eq!(
            trace(&["--", "-weird", "x"]).unwrap().program,
            ["-weird", "x"]
        );
    }

    #[test]
    fn the_last_of_follow_and_no_follow_wins() {
        assert!(!trace(&["--no-follow", "-f", "ls"]).unwrap().no_follow);
        assert!(trace(&["-f", "--no-follow", "ls"]).unwrap().no_follow);
    }

    #[test]
    fn a_refusal_is_one_line_with_a_hint() {
        for args in [
            &["--foo", "ls"][..],
            &[],
            &["-p", "x"],
            &["-p", "-1"],
            &["-p", "1", "ls"],
            &["-e", "bogus", "ls"],
            &["-o"],
        ] {
            let text = trace(args).unwrap_err();
            assert!(
                !text.contains('\n') && text.ends_with("try 'mmun trace --help'"),
                "{args:?}: {text:?}"
            );
        }
    }
}
