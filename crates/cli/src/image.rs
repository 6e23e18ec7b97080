//! `pyrite image`: making, looking at and changing disk images.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use pyrite_disk::image::{Extent, References, Stored};
use pyrite_disk::open::{OpenOptions, looks_like, open, open_qcow2, resolve};
use pyrite_disk::qcow2::{Compression, CreateOptions, Qcow2, Repair};
use pyrite_disk::storage::HostFile;
use pyrite_disk::{Format, Image, ImageError, jobs, targets};
use serde_json::{Value, json};

use crate::exit;

/// Arguments of `pyrite image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// What to do
    #[command(subcommand)]
    pub command: ImageCommand,
}

fn format(text: &str) -> Result<Format, String> {
    text.parse()
}

/// Bytes from `512`, `10K`, `2G`.
fn bytes(text: &str) -> Result<u64, String> {
    const EXPECTED: &str = "expected a size in bytes, or such as 512M or 2G";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| EXPECTED)?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(EXPECTED.into()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| EXPECTED.into())
}

/// A size, or a difference to the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many more.
    More(u64),
    /// So many less.
    Less(u64),
}

fn new_size(text: &str) -> Result<NewSize, String> {
    if let Some(t) = text.strip_prefix('+') {
        return bytes(t).map(NewSize::More);
    }
    match text.strip_prefix('-') {
        Some(t) => bytes(t).map(NewSize::Less),
        None => bytes(text).map(NewSize::To),
    }
}

/// What `check` puts right.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RepairArg {
    /// Gives lost clusters back
    Leaks,
    /// Everything that can be put right
    All,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CompressionArg {
    /// Every reader knows it
    Zlib,
    /// Faster and smaller; QEMU since 5.1
    Zstd,
}

/// Properties of a new image.
#[derive(Debug, Args)]
pub struct NewImage {
    /// qcow2: bytes of a cluster
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub cluster_size: Option<u64>,
    /// qcow2: version 2 or 3
    #[arg(long, value_name = "N")]
    pub qcow2_version: Option<u32>,
    /// qcow2: bits of a refcount
    #[arg(long, value_name = "N")]
    pub refcount_bits: Option<u32>,
    /// qcow2: clusters have 32 parts that are allocated one by one
    #[arg(long)]
    pub extended_l2: bool,
    /// qcow2: let other programs write refcounts late
    #[arg(long)]
    pub lazy_refcounts: bool,
    /// qcow2: how clusters are compressed
    #[arg(long, value_enum)]
    pub compression: Option<CompressionArg>,
    /// vhd, vmdk: the whole disk in the file, or beside it, without a map
    #[arg(long)]
    pub flat: bool,
    /// Replace a file that exists
    #[arg(long)]
    pub overwrite: bool,
}

impl NewImage {
    fn qcow2(&self, size_bytes: u64) -> CreateOptions {
        let mut o = CreateOptions::new(size_bytes);
        o.cluster_bytes = self.cluster_size.unwrap_or(o.cluster_bytes);
        o.version = self.qcow2_version.unwrap_or(o.version);
        o.refcount_bits = self.refcount_bits.unwrap_or(o.refcount_bits);
        o.extended_l2 = self.extended_l2;
        o.lazy_refcounts = self.lazy_refcounts;
        if let Some(CompressionArg::Zstd) = self.compression {
            o.compression = Compression::Zstd;
        }
        o
    }

    /// Refuses properties that the format does not have.
    fn check(&self, format: Format) -> Result<()> {
        let only_qcow2 = self.cluster_size.is_some()
            || self.qcow2_version.is_some()
            || self.refcount_bits.is_some()
            || self.extended_l2
            || self.lazy_refcounts
            || self.compression.is_some();
        if only_qcow2 && format != Format::Qcow2 {
            bail!("the option is for qcow2 images, and this is to be a {format} image");
        }
        if self.flat && !matches!(format, Format::Vhd | Format::Vmdk) {
            bail!("--flat is for vhd and vmdk images, and this is to be a {format} image");
        }
        Ok(())
    }
}

/// Where the source of an operation is.
#[derive(Debug, Args)]
pub struct Existing {
    /// Format of the image; it is never guessed
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = format)]
    pub format: Format,
    /// The image
    pub file: PathBuf,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an empty image
    Create {
        /// Format: raw, qcow2, vmdk, vdi, vhd, vhdx
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = format)]
        format: Format,
        /// qcow2: take what was never written from this image
        #[arg(short = 'b', long, value_name = "FILE", requires = "backing_format")]
        backing: Option<PathBuf>,
        /// Format of the backing file
        #[arg(short = 'F', long, value_name = "FORMAT", value_parser = format)]
        backing_format: Option<Format>,
        #[command(flatten)]
        new: NewImage,
        /// The image
        file: PathBuf,
        /// Its size, e.g. 10G [default: that of the backing file]
        #[arg(value_parser = bytes)]
        size: Option<u64>,
    },
    /// Say what an image is
    Info {
        /// Format of the image [default: what it looks like]
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = format)]
        format: Option<Format>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The image
        file: PathBuf,
    },
    /// Copy the content of an image into a new one
    Convert {
        #[command(flatten)]
        source: Existing,
        /// Format of the new image
        #[arg(short = 'O', long, value_name = "FORMAT", value_parser = format)]
        output: Format,
        /// Compress (qcow2; vmdk: stream-optimised)
        #[arg(short = 'c', long)]
        compress: bool,
        /// Read the files that the image refers to
        #[arg(long)]
        allow_references: bool,
        /// Read this internal snapshot instead of the present content
        #[arg(long, value_name = "NAME")]
        snapshot: Option<String>,
        /// Do not show progress
        #[arg(short = 'q', long)]
        quiet: bool,
        #[command(flatten)]
        new: NewImage,
        /// The new image
        target: PathBuf,
    },
    /// Change the size of the disk
    Resize {
        #[command(flatten)]
        image: Existing,
        /// Bytes, or +more, or -less
        #[arg(value_parser = new_size, allow_hyphen_values = true)]
        size: NewSize,
        /// Allow a smaller size: what is cut off is lost
        #[arg(long)]
        shrink: bool,
        /// Read the files that the image refers to
        #[arg(long)]
        allow_references: bool,
    },
    /// Look for contradictions in an image
    ///
    /// Exit codes: 0 clean, 3 errors, 4 only lost clusters.
    Check {
        #[command(flatten)]
        image: Existing,
        /// What to put right
        #[arg(long, value_enum)]
        repair: Option<RepairArg>,
    },
    /// Write an overlay's content into its backing file, and empty the overlay
    Commit {
        #[command(flatten)]
        image: Existing,
        /// Do not show progress
        #[arg(short = 'q', long)]
        quiet: bool,
    },
    /// Say where what is
    Map {
        #[command(flatten)]
        image: Existing,
        /// Read the files that the image refers to
        #[arg(long)]
        allow_references: bool,
        /// Print JSON, as `qemu-img map --output=json`
        #[arg(long)]
        json: bool,
    },
    /// Internal snapshots of a qcow2 image
    Snapshot {
        /// What to do
        #[command(subcommand)]
        command: SnapshotCommand,
    },
}

/// What can be done with internal snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List them
    List {
        /// The image
        file: PathBuf,
    },
    /// Keep the present content
    Create {
        /// The image
        file: PathBuf,
        /// Name of the snapshot
        name: String,
    },
    /// Go back to a snapshot; the present content is lost
    Apply {
        /// The image
        file: PathBuf,
        /// Name or number of the snapshot
        name: String,
    },
    /// Delete a snapshot
    Delete {
        /// The image
        file: PathBuf,
        /// Name or number of the snapshot
        name: String,
    },
}

/// Runs a command; returns the exit code.
pub fn run(args: ImageArgs) -> u8 {
    match execute(args.command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("pyrite: {e:#}");
            exit::BAD_INPUT
        }
    }
}

fn references(allow: bool) -> References {
    if allow {
        References::Follow
    } else {
        References::Refuse
    }
}

/// Opens an image; says how to allow what it refers to.
fn open_image(image: &Existing, read_only: bool, allow: bool) -> Result<Arc<dyn Image>> {
    let options = OpenOptions {
        format: image.format,
        read_only,
        references: references(allow),
    };
    warn_of_raw(&image.file, image.format);
    open(&image.file, options).map_err(explain)
}

fn explain(e: ImageError) -> anyhow::Error {
    let text = e.to_string();
    if text.contains("backing=allow") {
        anyhow::anyhow!(text.replace("backing=allow", "--allow-references"))
    } else {
        anyhow::Error::new(e)
    }
}

fn warn_of_raw(path: &Path, format: Format) {
    if format != Format::Raw {
        return;
    }
    let seen = HostFile::open(path, true).ok().map(|f| looks_like(&f));
    if let Some(Ok(Some(other))) = seen {
        eprintln!(
            "pyrite: {} looks like a {other} image and is taken as raw, as asked; use -f {other} \
             if that is what it is",
            path.display()
        );
    }
}

fn progress_bar(quiet: bool, total: u64) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    bar
}

fn execute(command: ImageCommand) -> Result<u8> {
    match command {
        ImageCommand::Create {
            format,
            backing,
            backing_format,
            new,
            file,
            size,
        } => create(format, backing.zip(backing_format), &new, &file, size),
        ImageCommand::Info { format, json, file } => info(format, json, &file),
        ImageCommand::Convert {
            source,
            output,
            compress,
            allow_references,
            snapshot,
            quiet,
            new,
            target,
        } => {
            let image = match &snapshot {
                None => open_image(&source, true, allow_references)?,
                Some(name) => {
                    if source.format != Format::Qcow2 {
                        bail!("only qcow2 images have internal snapshots");
                    }
                    let q = open_qcow2(&source.file, true, references(allow_references))
                        .map_err(explain)?;
                    Arc::new(q.at_snapshot(name)?)
                }
            };
            convert(&*image, output, compress, quiet, &new, &target)
        }
        ImageCommand::Resize {
            image,
            size,
            shrink,
            allow_references,
        } => resize(&image, size, shrink, allow_references),
        ImageCommand::Check { image, repair } => check(&image, repair),
        ImageCommand::Commit { image, quiet } => commit(&image, quiet),
        ImageCommand::Map {
            image,
            allow_references,
            json,
        } => map(&image, allow_references, json),
        ImageCommand::Snapshot { command } => snapshot(command),
    }
}

fn create(
    format: Format,
    backing: Option<(PathBuf, Format)>,
    new: &NewImage,
    file: &Path,
    size: Option<u64>,
) -> Result<u8> {
    new.check(format)?;
    let mut named = None;
    let mut size = size;
    if let Some((name, backing_format)) = backing {
        if format != Format::Qcow2 {
            bail!("only qcow2 images have backing files");
        }
        let name = name
            .to_str()
            .context("the backing file's name is not text")?;
        let (path, _) = resolve(file, name, Some(backing_format.name()), References::Follow)?;
        // Who names a backing file here allows what it needs.
        let options = OpenOptions::new(backing_format).read_only().follow();
        let below = open(&path, options)?;
        size = size.or(Some(below.info().size_bytes));
        named = Some((name.to_owned(), backing_format.name().to_owned()));
    }
    let size = size.context("give the size of the disk, e.g. 10G")?;
    let size = size
        .checked_next_multiple_of(512)
        .context("the size is too large")?;
    let qcow2 = CreateOptions {
        backing: named,
        ..new.qcow2(size)
    };
    targets::create(file, &target_options(format, size, new, qcow2))?;
    Ok(0)
}

fn target_options(
    format: Format,
    size_bytes: u64,
    new: &NewImage,
    qcow2: CreateOptions,
) -> targets::TargetOptions {
    targets::TargetOptions {
        format,
        size_bytes,
        qcow2,
        flat: new.flat,
        overwrite: new.overwrite,
    }
}

fn convert(
    source: &dyn Image,
    output: Format,
    compress: bool,
    quiet: bool,
    new: &NewImage,
    target: &Path,
) -> Result<u8> {
    new.check(output)?;
    let size = source.info().size_bytes;
    let options = target_options(output, size, new, new.qcow2(size));
    let bar = progress_bar(quiet, size);
    let mut progress = |done: u64, _| {
        bar.set_position(done);
        true
    };
    targets::convert(source, target, &options, compress, &mut progress)?;
    bar.finish_and_clear();
    Ok(0)
}

fn info(format: Option<Format>, as_json: bool, file: &Path) -> Result<u8> {
    let host = HostFile::open(file, true)?;
    let guessed = format.is_none();
    let format = match format {
        Some(f) => f,
        None => looks_like(&host)?.unwrap_or(Format::Raw),
    };
    drop(host);
    let (details, size) = targets::details(file, format)?;
    let used = std::fs::metadata(file)
        .map(|m| std::os::unix::fs::MetadataExt::blocks(&m) * 512)
        .unwrap_or(0);
    if as_json {
        let snapshots: Vec<Value> = details
            .snapshots
            .iter()
            .map(|s| {
                json!({"id": s.id, "name": s.name, "disk_bytes": s.disk_bytes,
                       "vm_state_bytes": s.vm_state_bytes, "unix_seconds": s.unix_seconds})
            })
            .collect();
        let mut properties = serde_json::Map::new();
        for (name, value) in &details.properties {
            properties.insert((*name).to_owned(), json!(value));
        }
        let (backing, backing_format) = match &details.backing {
            Some((b, f)) => (json!(b), json!(f)),
            None => (Value::Null, Value::Null),
        };
        let all = json!({
            "file": file.display().to_string(), "format": details.format.name(),
            "format_guessed": guessed, "size_bytes": size, "host_bytes": used,
            "cluster_bytes": details.cluster_bytes, "backing": backing,
            "backing_format": backing_format, "snapshots": snapshots, "properties": properties,
        });
        println!("{all:#}");
        return Ok(0);
    }
    println!("file:          {}", file.display());
    let guess = if guessed { " (as it looks)" } else { "" };
    println!("format:        {}{guess}", details.format);
    println!("disk size:     {size} bytes");
    println!("on the host:   {used} bytes");
    if let Some(c) = details.cluster_bytes {
        println!("cluster size:  {c} bytes");
    }
    if let Some((b, f)) = &details.backing {
        let f = f.as_deref().unwrap_or("format not recorded");
        println!("backing file:  {b} ({f})");
    }
    for (name, value) in &details.properties {
        println!("{:<14} {value}", format!("{name}:"));
    }
    for s in &details.snapshots {
        println!(
            "snapshot {}:    {} ({} bytes, at {} s)",
            s.id, s.name, s.disk_bytes, s.unix_seconds
        );
    }
    Ok(0)
}

fn resize(image: &Existing, size: NewSize, shrink: bool, allow: bool) -> Result<u8> {
    let disk = open_image(image, false, allow)?;
    let old = disk.info().size_bytes;
    let wanted = match size {
        NewSize::To(n) => Some(n),
        NewSize::More(n) => old.checked_add(n),
        NewSize::Less(n) => old.checked_sub(n),
    };
    let wanted = wanted
        .filter(|n| *n > 0)
        .and_then(|n| n.checked_next_multiple_of(512))
        .with_context(|| format!("the disk has {old} bytes: that is no size it can get"))?;
    if wanted < old && !shrink {
        bail!(
            "the disk has {old} bytes and would lose what is behind byte {wanted}; give --shrink \
             if that is meant"
        );
    }
    disk.resize(wanted)?;
    disk.close()?;
    println!("{old} -> {wanted} bytes");
    Ok(0)
}

fn check(image: &Existing, repair: Option<RepairArg>) -> Result<u8> {
    if image.format != Format::Qcow2 {
        if repair.is_some() {
            bail!("{} images cannot be repaired", image.format);
        }
        // Opening one checks all of its tables.
        targets::details(&image.file, image.format)?;
        println!("no errors were found");
        return Ok(0);
    }
    let file = HostFile::open(&image.file, repair.is_none())?;
    let repair = repair.map(|r| match r {
        RepairArg::Leaks => Repair::Leaks,
        RepairArg::All => Repair::All,
    });
    let report = Qcow2::check(Box::new(file), repair)?;
    for line in report.repaired.iter().chain(&report.messages) {
        println!("{line}");
    }
    println!(
        "{} errors, {} lost clusters; {} of {} clusters have data, {} of them compressed; the \
         image ends at byte {}",
        report.errors,
        report.leaks,
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.image_end
    );
    Ok(match (report.errors, report.leaks) {
        (0, 0) => 0,
        (0, _) => {
            println!("run again with --repair leaks to give the lost clusters back");
            4
        }
        _ => {
            println!("make a copy of the file, then run again with --repair all");
            3
        }
    })
}

fn commit(image: &Existing, quiet: bool) -> Result<u8> {
    if image.format != Format::Qcow2 {
        bail!("only qcow2 images have backing files");
    }
    let failed = ImageError::disk(&image.file);
    let file = HostFile::open(&image.file, false)?;
    let named = pyrite_disk::qcow2::backing_name(&file).map_err(&failed)?;
    let Some(named) = named else {
        bail!("{} has no backing file", image.file.display());
    };
    // Who asks for a commit allows the backing file.
    let (path, format) = resolve(
        &image.file,
        &named.name,
        named.format.as_deref(),
        References::Follow,
    )?;
    let base = open(&path, OpenOptions::new(format).follow())?;
    let overlay = Qcow2::open_top(Box::new(file)).map_err(&failed)?;
    let bar = progress_bar(quiet, overlay.info().size_bytes);
    let mut progress = |done: u64, _| {
        bar.set_position(done);
        true
    };
    jobs::commit(&overlay, &*base, &mut progress)?;
    bar.finish_and_clear();
    Ok(0)
}

fn map(image: &Existing, allow: bool, as_json: bool) -> Result<u8> {
    let disk = open_image(image, true, allow)?;
    let size = disk.info().size_bytes;
    let mut at = 0;
    let mut run: Option<(u64, Extent)> = None;
    let mut lines = Vec::new();
    let mut show = |at: u64, e: Extent| {
        let data = e.stored == Stored::Data;
        if as_json {
            let mut line = json!({"start": at, "length": e.len, "depth": e.depth,
                "present": e.present, "zero": !data, "data": data, "compressed": e.compressed});
            if let (Some(o), Some(map)) = (e.host_offset, line.as_object_mut()) {
                map.insert("offset".into(), json!(o));
            }
            lines.push(line.to_string());
        } else if data || e.present {
            let kind = match (data, e.compressed) {
                (true, true) => "compressed",
                (true, false) => "data",
                _ => "zero",
            };
            let place = e
                .host_offset
                .map_or_else(|| "-".to_owned(), |o| format!("{o:#x}"));
            println!("{at:#x} {:#x} {kind} {} {place}", e.len, e.depth);
        }
    };
    if !as_json {
        println!("offset length kind depth place");
    }
    while at < size {
        let mut e = disk.extent(at, size - at)?;
        e.len = e.len.min(size - at);
        run = Some(match run {
            None => (at, e),
            Some((start, before)) => {
                let follows = match (before.host_offset, e.host_offset) {
                    (Some(a), Some(b)) => a + before.len == b,
                    (a, b) => a == b,
                };
                let alike = before.stored == e.stored
                    && before.depth == e.depth
                    && before.present == e.present
                    && before.compressed == e.compressed;
                if follows && alike {
                    let len = before.len + e.len;
                    (start, Extent { len, ..before })
                } else {
                    show(start, before);
                    (at, e)
                }
            }
        });
        at += e.len;
    }
    if let Some((start, e)) = run {
        show(start, e);
    }
    if as_json {
        println!("[{}]", lines.join(",\n"));
    }
    Ok(0)
}

fn snapshot(command: SnapshotCommand) -> Result<u8> {
    let open = |file: &Path, read_only| {
        // The backing file is not touched, but it must be there.
        open_qcow2(file, read_only, References::Follow)
    };
    match command {
        SnapshotCommand::List { file } => {
            for s in targets::details(&file, Format::Qcow2)?.0.snapshots {
                println!("{} {} {} {}", s.id, s.name, s.disk_bytes, s.unix_seconds);
            }
        }
        SnapshotCommand::Create { file, name } => {
            let image = open(&file, false)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let seconds = now.map_or(0, |d| d.as_secs());
            image.snapshot_create(&name, u32::try_from(seconds).unwrap_or(u32::MAX))?;
            image.close()?;
        }
        SnapshotCommand::Apply { file, name } => {
            let image = open(&file, false)?;
            image.snapshot_apply(&name)?;
            image.close()?;
        }
        SnapshotCommand::Delete { file, name } => {
            let image = open(&file, false)?;
            image.snapshot_delete(&name)?;
            image.close()?;
        }
    }
    Ok(0)
}
