//! The program to spawn.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A program to run under a tracer.
///
/// A `Command` offers less than [`std::process::Command`]. Everything is prepared before the fork,
/// so the child makes only system calls until its program runs. The child inherits the standard
/// streams that the caller does not set, the signal mask, and the ignored signals. One exception is
/// `SIGPIPE`: Rust programs ignore it, so it is reset to the default, unless
/// [`Command::ignore_sigpipe`] is called.
#[derive(Debug)]
pub struct Command {
    program: OsString,
    args: Vec<OsString>,
    env: Option<Vec<(OsString, OsString)>>,
    dir: Option<PathBuf>,
    pub(super) stdio: [Option<OwnedFd>; 3],
    pub(super) ignores_sigpipe: bool,
}

impl Command {
    /// Names the program. A name without a slash is searched for in `PATH`, as a shell does.
    pub fn new(program: impl AsRef<OsStr>) -> Command {
        Command {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: None,
            dir: None,
            stdio: [None, None, None],
            ignores_sigpipe: false,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Command {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Command {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Replaces the whole environment. Without this call, the child inherits the environment.
    pub fn environment(mut self, env: impl IntoIterator<Item = (OsString, OsString)>) -> Command {
        self.env = Some(env.into_iter().collect());
        self
    }

    /// Sets the working directory. A relative program name with a slash is resolved in that
    /// directory.
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Command {
        self.dir = Some(dir.into());
        self
    }

    /// Sets the child's standard input.
    pub fn stdin(mut self, fd: impl Into<OwnedFd>) -> Command {
        self.stdio[0] = Some(fd.into());
        self
    }

    /// Sets the child's standard output.
    pub fn stdout(mut self, fd: impl Into<OwnedFd>) -> Command {
        self.stdio[1] = Some(fd.into());
        self
    }

    /// Sets the child's standard error.
    pub fn stderr(mut self, fd: impl Into<OwnedFd>) -> Command {
        self.stdio[2] = Some(fd.into());
        self
    }

    /// Starts the program with `SIGPIPE` ignored.
    pub fn ignore_sigpipe(mut self) -> Command {
        self.ignores_sigpipe = true;
        self
    }

    /// The program as it was given.
    pub fn program(&self) -> &OsStr {
        &self.program
    }

    /// Prepares the strings for `execve`. A zero byte in a string is the error `EINVAL`.
    pub(super) fn layout(&self) -> io::Result<Layout> {
        let mut argv = vec![c_string(&self.program)?];
        for arg in &self.args {
            argv.push(c_string(arg)?);
        }
        let vars: Vec<(OsString, OsString)> = match &self.env {
            Some(env) => env.clone(),
            None => env::vars_os().collect(),
        };
        let path = vars
            .iter()
            .rev()
            .find(|(name, _)| name == "PATH")
            .map(|(_, value)| value.as_os_str());
        let mut candidates = Vec::new();
        for candidate in candidates_in(&self.program, path) {
            candidates.push(c_string(&candidate)?);
        }
        let mut envp = Vec::new();
        for (name, value) in &vars {
            let mut var = name.clone();
            var.push("=");
            var.push(value);
            envp.push(c_string(&var)?);
        }
        let dir = self
            .dir
            .as_deref()
            .map(|dir| c_string(dir.as_os_str()))
            .transpose()?;
        Ok(Layout {
            candidates,
            argv,
            envp,
            dir,
        })
    }
}

/// The strings of a [`Command`], in the form that `execve` takes.
#[derive(Debug)]
pub(super) struct Layout {
    /// The paths to try in turn.
    pub(super) candidates: Vec<CString>,
    pub(super) argv: Vec<CString>,
    pub(super) envp: Vec<CString>,
    pub(super) dir: Option<CString>,
}

/// Returns the paths that `execvp` would try for `program`.
fn candidates_in(program: &OsStr, path: Option<&OsStr>) -> Vec<OsString> {
    if program.is_empty() || program.as_bytes().contains(&b'/') {
        return vec![program.to_owned()];
    }
    let path = path.unwrap_or(OsStr::new("/bin:/usr/bin"));
    env::split_paths(path)
        .map(|dir| {
            if dir.as_os_str().is_empty() {
                PathBuf::from(".")
            } else {
                dir
            }
        })
        .map(|dir| dir.join(program).into_os_string())
        .collect()
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_looked_for_in_path_and_an_empty_entry_is_the_working_directory() {
        let found = candidates_in(OsStr::new("ls"), Some(OsStr::new("/bin::/usr/bin")));
        assert_eq!(found, ["/bin/ls", "./ls", "/usr/bin/ls"]);
    }

    #[test]
    fn a_name_with_a_slash_is_taken_as_it_is() {
        assert_eq!(
            candidates_in(OsStr::new("./ls"), Some(OsStr::new("/bin"))),
            ["./ls"]
        );
    }
}
