//! Makes the initial file system: an archive in cpio's format "newc". It has `init`, the script
//! that sets the variables of `init`, busybox, and the first kernel modules ([`MODULES`]).

use super::arch::Folders;
use super::kernel::Kernel;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The modules that the guest loads before it can read modules from the host: those for mounting
/// the host's root folder, and that of a console for the line to the host.
const MODULES: &[&str] = &[
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_console",
];

/// An archive of folders and files.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // The fields are: inode, mode, owner, group, count of links, time, length, device of the
        // file (two fields), device that the file stands for (two fields), length of the name with
        // its zero byte, checksum.
        let length = u32::try_from(content.len()).expect("no file of 4 GiB belongs in here");
        let named = u32::try_from(name.len() + 1).expect("names are short");
        let fields = [self.entries, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, named, 0];
        let mut head = "070701".to_owned();
        fields
            .iter()
            .for_each(|field| write!(head, "{field:08x}").expect("a string takes everything"));
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, b"");
    }

    fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, content);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.bytes
    }
}

/// Makes the initial file system of a kernel; `environment` is a shell script that sets variables.
pub(crate) fn make(
    kernel: &Kernel,
    folders: Option<&Folders>,
    environment: &str,
) -> Result<Vec<u8>, String> {
    let mut archive = Archive::default();
    for folder in ["proc", "sys", "dev", "lower", "upper", "root", "modules"] {
        archive.folder(folder);
    }
    let root = folders.map_or(Path::new("/"), |folders| &folders.root);
    let busybox = ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .find_map(|path| fs::read(root.join(path)).ok());
    archive.program("busybox", &busybox.ok_or("busybox cannot be read")?);
    archive.program("init", include_bytes!("init"));
    archive.program("environment", environment.as_bytes());
    let mut order = String::new();
    for path in modules(kernel)? {
        let name = path
            .file_name()
            .expect("a module has a name")
            .to_string_lossy()
            .trim_end_matches(".xz")
            .trim_end_matches(".zst")
            .to_owned();
        archive.program(&format!("modules/{name}"), &unpacked(&path)?);
        order += &format!("{name}\n");
    }
    archive.program("modules/order", order.as_bytes());
    Ok(archive.end())
}

/// Returns the files of [`MODULES`], each after the files that it depends on. A module without a
/// file is built into this kernel.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>, String> {
    let folder = kernel.modules.join(&kernel.version);
    let path = folder.join("modules.dep");
    let table =
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut files = Vec::new();
    for wanted in MODULES {
        let lines = || table.lines().filter_map(|line| line.split_once(':'));
        let stem = |file: &str| {
            Path::new(file)
                .file_name()
                .and_then(|name| Some(name.to_str()?.split('.').next()?.replace('-', "_")))
        };
        let Some((file, needs)) = lines().find(|(file, _)| stem(file).as_deref() == Some(wanted))
        else {
            continue;
        };
        for file in needs
            .split_whitespace()
            .rev()
            .chain([file])
            .map(|file| folder.join(file))
        {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// Returns the content of a file, unpacked if its name says that it is compressed.
pub(crate) fn unpacked(path: &Path) -> Result<Vec<u8>, String> {
    let (program, package) = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => ("xz", "xz-utils"),
        Some("zst") => ("zstd", "zstd"),
        _ => return fs::read(path).map_err(|error| format!("{}: {error}", path.display())),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .output()
        .map_err(|error| format!("{program}: {error}; it needs the package {package}"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("{program} cannot unpack {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_format_of_cpio() {
        let mut archive = Archive::default();
        archive.folder("folder");
        archive.program("folder/file", b"abc");
        let bytes = archive.end();
        assert_eq!(&bytes[..6], b"070701");
        // Checks the mode of the folder, and that each header and each content begins at a multiple
        // of four.
        assert_eq!(&bytes[14..22], b"000041ed");
        assert_eq!((&bytes[110..117], bytes.len() % 4), (&b"folder\0"[..], 0));
        let second = (110 + 7_usize).next_multiple_of(4);
        assert_eq!(&bytes[second..second + 6], b"070701");
        let content = (second + 110 + 12).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 4], b"abc\0");
    }
}
