//! Downloads packages of Debian and Ubuntu, and unpacks them without installing. So the host's own
//! packages and lists do not change, and the user need not be root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A distribution whose packages are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distribution {
    Debian,
    /// Only for what Debian does not build.
    Ubuntu,
}

impl Distribution {
    /// Returns the mirror, and the file with the keys that sign the mirror's lists. Ubuntu's keys
    /// come from a package of Debian's.
    fn mirror(self, store: &Path) -> Result<(String, PathBuf), String> {
        if self == Self::Debian {
            let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
            return Ok((mirror(), keys.into()));
        }
        let folder = store.join("ubuntu-keyring");
        let keys = folder.join("usr/share/keyrings/ubuntu-archive-keyring.gpg");
        if !keys.exists() {
            let failed = |error| format!("{}: {error}", folder.display());
            fs::create_dir_all(&folder).map_err(failed)?;
            let apt = Apt::new(store, Self::Debian, &["trixie"], &["arm64"])?;
            apt.run("apt-get", &["download", "-qq", "ubuntu-keyring"], &folder)?;
            unpack_all(&folder, &folder)?;
        }
        Ok(("http://archive.ubuntu.com/ubuntu/".to_owned(), keys))
    }
}

/// A private set of package lists.
pub(crate) struct Apt {
    configuration: PathBuf,
    cache: PathBuf,
}

impl Apt {
    /// Makes and updates the package lists of these suites and architectures. The first
    /// architecture is the one that apt installs by default.
    pub(crate) fn new(
        store: &Path,
        distribution: Distribution,
        suites: &[&str],
        architectures: &[&str],
    ) -> Result<Self, String> {
        let folder = store
            .join("apt")
            .join([suites, architectures].concat().join("-"));
        let failed = |error| format!("{}: {error}", folder.display());
        for path in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(path)).map_err(failed)?;
        }
        let (mirror, keys) = distribution.mirror(store)?;
        let keys = keys.display();
        let sources: String = suites
            .iter()
            .map(|suite| format!("deb [signed-by={keys}] {mirror} {suite} main\n"))
            .collect();
        fs::write(folder.join("sources.list"), sources).map_err(failed)?;
        // The status file is empty, so no package counts as installed.
        fs::write(folder.join("status"), "").map_err(failed)?;
        let place = folder.display();
        let listed: String = architectures
            .iter()
            .map(|name| format!("\"{name}\"; "))
            .collect();
        let settings = format!(
            "Dir::Etc::sourcelist \"{place}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Dir::State::lists \"{place}/lists\";\nDir::State::status \"{place}/status\";\n\
             Dir::Cache \"{place}/cache\";\nAPT::Architecture \"{}\";\nAPT::Architectures {{ {listed}}};\n\
             APT::Sandbox::User \"root\";\nAPT::Install-Recommends \"false\";\nAcquire::Languages \"none\";\n\
             Debug::NoLocking \"true\";\n",
            architectures[0]
        );
        let configuration = folder.join("apt.conf");
        fs::write(&configuration, settings).map_err(failed)?;
        let apt = Self {
            configuration,
            cache: folder.join("cache/archives"),
        };
        apt.run("apt-get", &["update", "-qq"], store)?;
        Ok(apt)
    }

    pub(crate) fn run(
        &self,
        program: &str,
        arguments: &[&str],
        folder: &Path,
    ) -> Result<String, String> {
        output(
            Command::new(program)
                .args(arguments)
                .env("APT_CONFIG", &self.configuration)
                .current_dir(folder),
        )
    }

    /// Unpacks packages and their dependencies into a folder.
    pub(crate) fn unpack(&self, packages: &[&str], folder: &Path) -> Result<(), String> {
        self.run(
            "apt-get",
            &[&["install", "-qq", "-y", "--download-only"], packages].concat(),
            folder,
        )?;
        // The packages expect these names to be links. In older releases they were folders.
        for (name, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
        ] {
            let failed = |error| format!("{}: {error}", folder.join(name).display());
            fs::create_dir_all(folder.join(target)).map_err(failed)?;
            std::os::unix::fs::symlink(target, folder.join(name)).map_err(failed)?;
        }
        unpack_all(&self.cache, folder)
    }
}

/// Unpacks the packages of the folder `from`, and removes the package files to save space.
pub(crate) fn unpack_all(from: &Path, into: &Path) -> Result<(), String> {
    for entry in fs::read_dir(from).map_err(|error| format!("{}: {error}", from.display()))? {
        let path = entry
            .map_err(|error| format!("{}: {error}", from.display()))?
            .path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            // `tar` unpacks, because it has an option that keeps the links of the root folder.
            let script =
                r#"dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2""#;
            output(
                Command::new("sh")
                    .args(["-c", script, "sh"])
                    .arg(&path)
                    .arg(into),
            )?;
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

/// Returns the mirror of the host's own packages if the host is a Debian, or else Debian's default.
fn mirror() -> String {
    let arguments = [
        "indextargets",
        "--format",
        "$(REPO_URI) $(LABEL)",
        "Created-By: Packages",
    ];
    let targets = output(Command::new("apt-get").args(arguments)).unwrap_or_default();
    let own = targets
        .lines()
        .find_map(|line| line.strip_suffix(" Debian"));
    own.unwrap_or("http://deb.debian.org/debian/").to_owned()
}

/// Runs a command and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let shown = format!("{command:?}");
    let output = command
        .output()
        .map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "{shown}: {}",
        errors.lines().next().unwrap_or("it failed without a word")
    ))
}
