//! `cargo xtask packages`: tests each published crate as its user gets it. The command packs all
//! published crates, unpacks each outside the workspace, and runs the tests of the package there,
//! with the unpacked packages of the other crates.

use cargo_metadata::MetadataCommand;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

pub(crate) fn run(root: &Path) -> ExitCode {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata answers for this workspace");
    let published: Vec<(String, String)> = metadata
        .packages
        .iter()
        .filter(|package| package.publish.is_none())
        .map(|package| (package.name.to_string(), package.version.to_string()))
        .collect();
    // `--no-verify`: the tests below compile every package.
    let mut package = Command::new("cargo");
    package
        .args(["package", "--quiet", "--no-verify", "--allow-dirty"])
        .current_dir(root);
    for (name, _) in &published {
        package.args(["--package", name]);
    }
    if !succeeds(&mut package) {
        return ExitCode::FAILURE;
    }
    let packed = metadata.target_directory.join("package");
    let room = std::env::temp_dir().join(format!("packages-{}", std::process::id()));
    fs::create_dir_all(&room).expect("a folder for the unpacked crates");
    let target = metadata.target_directory.as_std_path();
    let outcome = published.iter().try_for_each(|(name, version)| {
        let archive = packed.join(format!("{name}-{version}.crate"));
        let unpacked = succeeds(
            Command::new("tar")
                .arg("-xzf")
                .arg(&archive)
                .arg("-C")
                .arg(&room),
        );
        unpacked
            .then_some(())
            .ok_or_else(|| format!("{archive}: cannot be unpacked"))
    });
    let outcome = outcome.and_then(|()| {
        published
            .iter()
            .try_for_each(|(name, version)| test(&room, target, &published, name, version))
    });
    fs::remove_dir_all(&room).expect("the folder was made above");
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(complaint) => {
            eprintln!("packages: {complaint}");
            ExitCode::FAILURE
        }
    }
}

/// Checks that an unpacked crate has its licences and its README. Compiles its examples, and runs
/// its doc tests and unit tests. Builds into the workspace's target directory, which has most of
/// the dependencies already.
fn test(
    room: &Path,
    target: &Path,
    published: &[(String, String)],
    name: &str,
    version: &str,
) -> Result<(), String> {
    let folder = room.join(format!("{name}-{version}"));
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "README.md"] {
        if !folder.join(file).is_file() {
            return Err(format!("the package of {name} lacks {file}"));
        }
    }
    println!("== {name}, unpacked");
    let mut cargo = Command::new("cargo");
    cargo
        .args(["test", "--quiet", "--target-dir"])
        .arg(target)
        .current_dir(&folder);
    for (other, version) in published.iter().filter(|(other, _)| other != name) {
        // Use the unpacked crate, because the registry may have an older version, or none.
        let path = room.join(format!("{other}-{version}"));
        cargo
            .arg("--config")
            .arg(format!("patch.crates-io.{other}.path={path:?}"));
    }
    succeeds(&mut cargo)
        .then_some(())
        .ok_or_else(|| format!("the unpacked {name} fails its own tests"))
}

fn succeeds(command: &mut Command) -> bool {
    command.status().is_ok_and(|status| status.success())
}
