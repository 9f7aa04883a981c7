//! The command line. Help, man page and completions come from this table alone.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use mmu_source::process::Pid;

use crate::events::EventSet;
use crate::record;

/// Shows what a program does to its address space.
#[derive(Debug, Parser)]
#[command(name = "mmun", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Trace(TraceArgs),
    /// Prints the manual page.
    #[command(hide = true)]
    Man,
    /// Prints the completions for a shell.
    #[command(hide = true)]
    Completions {
        shell: clap_complete::Shell,
    },
}

/// Records every change a program makes to its address translations, with its threads and children.
///
/// Each traced task holds a counted reference (get, put) to the notifier of its address space; the
/// notifier is freed once, after the last put. Around every system call that removes or changes
/// translations stand a start and an end.
///
/// Exits as the program did; 125 if mmun itself failed, 126 if the program cannot be run, 127 if
/// there is none. SIGINT or SIGTERM ends the trace, not the program.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    override_usage = "mmun trace [OPTIONS] PROG [ARGS]...\n       mmun trace [OPTIONS] -p PID...",
    after_long_help = record::HELP
)]
pub(crate) struct TraceArgs {
    /// Writes to FILE instead of standard error
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Records only these events, or all but these: unmap,clear or '!migrate'
    ///
    /// The events are unmap, clear, protection_vma, protection_page, soft_dirty, release, migrate
    /// and exclusive. The life of tasks and address spaces is always recorded.
    #[arg(short, long, value_name = "EVENTS", verbatim_doc_comment)]
    pub(crate) events: Option<EventSet>,

    /// Writes one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,

    /// Adds totals at the end: per event and per process
    #[arg(long)]
    pub(crate) summary: bool,

    /// Writes the totals and no records
    #[arg(long)]
    pub(crate) summary_only: bool,

    /// Follows children and threads; the default
    #[arg(short, long, overrides_with = "no_follow")]
    pub(crate) follow: bool,

    /// Traces the program's first task only
    #[arg(long, overrides_with = "follow")]
    pub(crate) no_follow: bool,

    /// Stops at every system call instead of only those that change memory
    ///
    /// Slower, but then the program runs on even if the tracer itself is killed. Always so with -p
    /// and with --no-follow.
    #[arg(long, verbatim_doc_comment)]
    pub(crate) no_seccomp: bool,

    /// Attaches to a running process, all its threads; may be repeated
    #[arg(short = 'p', long = "attach", value_name = "PID", value_parser = clap::value_parser!(Pid).range(1..))]
    pub(crate) pids: Vec<Pid>,

    /// The program to run, and its arguments
    #[arg(value_name = "PROG", trailing_var_arg = true, required_unless_present = "pids", conflicts_with = "pids")]
    pub(crate) program: Vec<OsString>,
}

/// What to do instead of running: print this and exit so.
#[derive(Debug)]
pub(crate) enum Instead {
    Help(Box<clap::Error>),
    /// One line, with a hint.
    Refuse(String),
}

/// # Errors
/// Help was asked for, or the arguments are wrong.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Instead> {
    Cli::try_parse_from(args).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Instead::Help(Box::new(error)),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Instead::Refuse("no command given; try 'mmun --help'".into())
        }
        _ => Instead::Refuse(one_line(&error.render().to_string())),
    })
}

/// The first paragraph of clap's message, without its label.
fn one_line(message: &str) -> String {
    let paragraph = message.strip_prefix("error: ").unwrap_or(message).split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    format!("{}; try 'mmun trace --help'", words.join(" "))
}

/// The manual pages of the program and of `trace`, as roff.
///
/// # Errors
/// Those of `out`.
pub(crate) fn man(out: &mut dyn std::io::Write) -> std::io::Result<()> {
    let mut cli = Cli::command();
    cli.build();
    let trace = cli.find_subcommand("trace").expect("trace is in the table").clone();
    clap_mangen::Man::new(trace.name("mmun-trace")).render(out)
}

pub(crate) fn completions(shell: clap_complete::Shell, out: &mut dyn std::io::Write) {
    clap_complete::generate(shell, &mut Cli::command(), "mmun", out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(args: &[&str]) -> Result<TraceArgs, String> {
        let all = ["mmun", "trace"].iter().chain(args).map(OsString::from);
        match parse(all) {
            Ok(Cli { command: Command::Trace(args) }) => Ok(args),
            Ok(_) => Err("another command".into()),
            Err(Instead::Help(text)) => Err(text.to_string()),
            Err(Instead::Refuse(text)) => Err(text),
        }
    }

    #[test]
    fn the_table_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_end_where_the_program_begins() {
        let args = trace(&["--json", "ls", "--json", "-p", "1"]).unwrap();
        assert_eq!(args.program, ["ls", "--json", "-p", "1"]);
        assert!(args.json && args.pids.is_empty());
        assert_eq!(trace(&["--", "-weird", "x"]).unwrap().program, ["-weird", "x"]);
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
            assert!(!text.contains('\n') && text.ends_with("try 'mmun trace --help'"), "{args:?}: {text:?}");
        }
    }
}
