//! Finds and downloads kernels of Debian and Ubuntu.
//!
//! A kernel is downloaded and unpacked, not installed. It stays in `target/guest/kernels`. To get a
//! newer kernel of the same series, delete its folder there.

use super::arch::Arch;
use super::archive;
use super::packages::{Apt, Distribution, output, unpack_all};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A series of kernels.
pub(crate) struct Series {
    pub(crate) name: &'static str,
    pub(crate) distribution: Distribution,
    pub(crate) suite: &'static str,
    /// The end of the package names: in Debian's names the part after the architecture.
    pub(crate) flavour: &'static str,
    /// The machine's memory. A kernel with larger pages needs more.
    pub(crate) megabytes: u32,
    /// The capabilities that this kernel lacks: names of `testkit::Cap` in lower case. A lack of
    /// any other capability is a failure.
    pub(crate) lacks: &'static str,
}

impl Series {
    /// A series of Debian's usual flavour.
    pub(crate) const fn debian(
        name: &'static str,
        suite: &'static str,
        lacks: &'static str,
    ) -> Self {
        Self {
            name,
            distribution: Distribution::Debian,
            suite,
            flavour: "",
            megabytes: 1280,
            lacks,
        }
    }
}

/// A kernel that is unpacked.
pub(crate) struct Kernel {
    pub(crate) series: &'static Series,
    pub(crate) version: String,
    pub(crate) image: PathBuf,
    /// The folder that is `/lib/modules` in the guest.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// Returns the kernel of a series from the store. If the store has none, downloads the newest
    /// kernel of the series from the mirror.
    pub(crate) fn get(store: &Path, arch: &Arch, name: &str) -> Result<Self, String> {
        let series = arch.series(name).expect("the command line was checked");
        let folder = store
            .join("kernels")
            .join(arch.row(name).replace(", ", "-"));
        let parent = folder.parent().expect("it was just joined");
        let failed = |error| format!("{}: {error}", parent.display());
        fs::create_dir_all(parent).map_err(failed)?;
        // Two runs may download at once.
        let lock = File::create(parent.join("lock")).map_err(failed)?;
        lock.lock().map_err(failed)?;
        if !folder.exists() {
            let unfinished = folder.with_file_name(format!("{name}.part"));
            let _ = fs::remove_dir_all(&unfinished);
            fs::create_dir_all(&unfinished).map_err(failed)?;
            download(store, arch, series, &unfinished)?;
            fs::rename(&unfinished, &folder).map_err(failed)?;
        }
        Self::at(series, &folder).ok_or_else(|| {
            format!(
                "{} holds no kernel: delete it, and try again",
                folder.display()
            )
        })
    }

    fn at(series: &'static Series, folder: &Path) -> Option<Self> {
        let modules = ["lib/modules", "usr/lib/modules"]
            .iter()
            .map(|path| folder.join(path))
            .find(|path| path.exists())?;
        let version = fs::read_dir(&modules)
            .ok()?
            .next()?
            .ok()?
            .file_name()
            .into_string()
            .ok()?;
        let images = [
            folder.join(format!("boot/vmlinuz-{version}")),
            modules.join(&version).join("vmlinuz"),
        ];
        let image = images.into_iter().find(|path| path.exists())?;
        Some(Self {
            series,
            version,
            image,
            modules,
        })
    }
}

fn download(
    store: &Path,
    arch: &Arch,
    series: &'static Series,
    folder: &Path,
) -> Result<(), String> {
    println!(
        "guest: downloading {:?}'s kernel {} ({})",
        series.distribution, series.name, series.suite
    );
    let apt = Apt::new(store, series.distribution, &[series.suite], &[arch.debian])?;
    let pattern = match series.distribution {
        Distribution::Debian => format!(
            "^linux-(image|binary|modules|base)-[0-9].*-{}{}$",
            arch.debian, series.flavour
        ),
        // The signed image also holds the descriptions of many boards, which QEMU does not unpack.
        Distribution::Ubuntu => {
            format!("^linux-(image-unsigned|modules)-[0-9].*{}$", series.flavour)
        }
    };
    let listed = apt.run("apt-cache", &["search", "--names-only", &pattern], store)?;
    let names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let wanted = newest(&names, series.name)
        .ok_or_else(|| format!("{} has no kernel {}", series.suite, series.name))?;
    let packages = packages(&names, wanted);
    apt.run(
        "apt-get",
        &[&["download", "-qq"], &packages[..]].concat(),
        folder,
    )?;
    unpack_all(folder, folder)?;
    let kernel = Kernel::at(series, folder)
        .ok_or_else(|| format!("{} hold no kernel that is known here", packages.join(", ")))?;
    unpack_image(&kernel.image)?;
    // `depmod` looks below `lib`, but newer packages use `usr/lib`.
    if !folder.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", folder.join("lib"))
            .map_err(|error| format!("lib: {error}"))?;
    }
    output(
        Command::new("depmod")
            .env("PATH", super::search_path())
            .arg("-b")
            .arg(folder)
            .arg(&kernel.version),
    )
    .map(drop)
}

/// Replaces an image that unpacks itself (Linux's `zboot`, for aarch64) by its content, because
/// QEMU 7.2 unpacks such an image only if it is compressed with gzip.
fn unpack_image(path: &Path) -> Result<(), String> {
    let failed = |error| format!("{}: {error}", path.display());
    let image = fs::read(path).map_err(failed)?;
    let Some(payload) = payload(&image) else {
        return Ok(());
    };
    let packed = path.with_file_name("payload.zst");
    fs::write(&packed, payload).map_err(failed)?;
    let content = archive::unpacked(&packed)?;
    fs::remove_file(&packed).map_err(failed)?;
    fs::remove_file(path).map_err(failed)?;
    fs::write(path, content).map_err(failed)
}

/// Returns the part of a `zboot` image that is compressed with Zstandard. The image's header has
/// the payload's offset and length, and the name of the compression.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let is_zstd = image.get(4..8) == Some(b"zimg") && image.get(24..28) == Some(b"zstd");
    let (offset, length) = (number(8)?, number(12)?);
    image
        .get(offset..offset.checked_add(length)?)
        .filter(|_| is_zstd)
}

/// Returns the numbers in the version of a kernel package, for comparing versions.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// Returns the newest version of a series among the names of packages, leaving out the flavours
/// `rt` and `cloud`. The series `newest` has every version.
fn newest<'a>(names: &[&'a str], series: &str) -> Option<&'a str> {
    let plain = |version: &&&str| !version.contains("rt-") && !version.contains("cloud-");
    let versions = names
        .iter()
        .filter_map(|name| name.strip_prefix("linux-image-"))
        .map(|name| name.trim_start_matches("unsigned-"));
    let versions: Vec<&str> = versions.collect();
    let of_series = |version: &&&str| {
        // In `6.12-16k`, the flavour selects the package names; only `6.12` is the version.
        let wanted = numbers(series.split('-').next().unwrap_or_default());
        wanted.is_empty() || numbers(version).starts_with(&wanted)
    };
    versions
        .iter()
        .filter(plain)
        .filter(of_series)
        .max_by_key(|version| numbers(version))
        .copied()
}

/// Returns the packages of a version. From 7.1 on, Debian's package of the image is empty, and the
/// kernel's parts are separate packages.
fn packages<'a>(names: &[&'a str], version: &str) -> Vec<&'a str> {
    let of_version = |name: &&&'a str| {
        name.strip_suffix(version)
            .is_some_and(|kind| kind.matches('-').count() == 2 || kind.contains("-unsigned-"))
    };
    let parts: Vec<&str> = names.iter().filter(of_version).copied().collect();
    let has_modules = parts.iter().any(|name| name.starts_with("linux-modules-"));
    parts
        .into_iter()
        .filter(|name| {
            has_modules != name.starts_with("linux-image-") || name.contains("-unsigned-")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[&str] = &[
        "linux-image-6.18.9+deb13-amd64",
        "linux-image-6.18.15+deb13-amd64",
        "linux-image-6.18.15+deb13-cloud-amd64",
        "linux-image-6.18.15+deb13-rt-amd64",
        "linux-image-7.3.4+deb13-amd64",
        "linux-binary-7.3.4+deb13-amd64",
        "linux-modules-7.3.4+deb13-amd64",
        "linux-base-7.3.4+deb13-amd64",
        "linux-binary-7.3.4+deb13-cloud-amd64",
    ];

    #[test]
    fn versions_are_compared_by_number_and_flavours_are_ignored() {
        assert_eq!(newest(NAMES, "6.18"), Some("6.18.15+deb13-amd64"));
        assert_eq!(newest(NAMES, "newest"), Some("7.3.4+deb13-amd64"));
        assert_eq!(newest(NAMES, "6.1"), None);
    }

    #[test]
    fn a_kernel_in_parts_is_downloaded_in_parts() {
        assert_eq!(
            packages(NAMES, "6.18.15+deb13-amd64"),
            ["linux-image-6.18.15+deb13-amd64"]
        );
        let parts = ["linux-binary-", "linux-modules-", "linux-base-"]
            .map(|kind| format!("{kind}7.3.4+deb13-amd64"));
        assert_eq!(packages(NAMES, "7.3.4+deb13-amd64"), parts);
        let ubuntu = ["linux-image-unsigned-", "linux-modules-"]
            .map(|kind| format!("{kind}7.0.0-14-generic-64k"));
        let names = ubuntu.each_ref().map(String::as_str);
        assert_eq!(newest(&names, "7.0-64k"), Some("7.0.0-14-generic-64k"));
        assert_eq!(packages(&names, "7.0.0-14-generic-64k"), ubuntu);
    }

    #[test]
    fn only_an_image_with_the_header_of_zboot_has_a_payload() {
        let mut image = b"MZ\0\0zimg\x1e\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0zstd\0\0ab".to_vec();
        assert_eq!(payload(&image), Some(&b"ab"[..]));
        image[12] = 3;
        assert_eq!(payload(&image), None, "the payload ends after the image");
        image[12] = 2;
        image[24] = b'g';
        assert_eq!(payload(&image), None);
        assert_eq!(payload(b"MZ"), None);
    }
}
