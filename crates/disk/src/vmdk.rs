//! VMDK images: sparse, flat, stream-optimised. Source: VMware Virtual Disk Format 5.0.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bytes::{le16, le32, le64, put};
use crate::image::{Details, Extent, Format, Image, ImageError, References};
use crate::io::map_error;
use crate::jobs::Filler;
use crate::mapped::{Block, Layout, MAX_BLOCKS, Mapped, Table};
use crate::payload::{Source, Target};
use crate::raw::RawImage;
use crate::storage::{HostFile, Storage};
use crate::{DiskError, DiskInfo};

const MAGIC: u32 = 0x564d_444b;
const FLAG_NEW_LINE: u32 = 1 << 0;
const FLAG_SECOND_DIRECTORY: u32 = 1 << 1;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// The grain directory is behind the data, and the footer says where.
const AT_END: u64 = u64::MAX;
const GRAIN_SECTORS: u64 = 128;
const TABLE_ENTRIES: u64 = 512;
const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;
const MARKER_FOOTER: u32 = 3;
/// LIMIT: bytes of a descriptor.
const MAX_DESCRIPTOR: u64 = 1 << 20;
/// LIMIT: extents of a descriptor.
const MAX_EXTENTS: usize = 4096;
/// Sectors that the descriptor of a new image takes.
const DESCRIPTOR_SECTORS: u64 = 20;

fn damaged<T>(what: impl std::fmt::Display) -> Result<T, DiskError> {
    Err(DiskError::Corrupt(format!("damaged VMDK image: {what}")))
}

fn unsupported<T>(what: impl std::fmt::Display) -> Result<T, DiskError> {
    Err(DiskError::Unsupported(what.to_string()))
}

struct VmdkTable {
    /// Sector of each grain table, in each of the directories.
    tables: Vec<Vec<u32>>,
    compressed: bool,
    grain_sectors: u64,
}

impl Table for VmdkTable {
    fn store(
        &mut self,
        storage: &dyn Storage,
        map: &[Block],
        changed: &BTreeSet<usize>,
    ) -> Result<(), DiskError> {
        for index in changed {
            let Some(Block::At(at)) = map.get(*index) else {
                continue;
            };
            let entry = u32::try_from(at / 512).map_err(|_| DiskError::NoSpace)?;
            let (table, slot) = (*index as u64 / TABLE_ENTRIES, *index as u64 % TABLE_ENTRIES);
            for tables in &self.tables {
                let Some(sector) = tables.get(table as usize).filter(|s| **s != 0) else {
                    return unsupported(
                        "this VMDK image has no grain table there; convert it to write to it",
                    );
                };
                storage
                    .write_at(u64::from(*sector) * 512 + slot * 4, &entry.to_le_bytes())
                    .map_err(map_error)?;
            }
        }
        Ok(())
    }

    fn align(&self) -> u64 {
        GRAIN_SECTORS * 512
    }

    fn unpack(&self, storage: &dyn Storage, index: u64, at: u64) -> Result<Vec<u8>, DiskError> {
        if !self.compressed {
            return damaged("a compressed grain in an image without");
        }
        let mut marker = [0; 12];
        storage.read_at(at, &mut marker).map_err(map_error)?;
        let bytes = u64::from(le32(&marker, 8));
        if le64(&marker, 0) != index * self.grain_sectors {
            return damaged(format!("grain {index} is not at {at:#x}"));
        }
        // Deflate never needs twice the size.
        if bytes == 0 || bytes > 2 * self.grain_sectors * 512 {
            return damaged(format!("a compressed grain of {bytes} bytes"));
        }
        let mut packed = vec![0; bytes as usize];
        storage.read_at(at + 12, &mut packed).map_err(map_error)?;
        let mut out = Vec::new();
        // LIMIT: a grain.
        let read = flate2::read::ZlibDecoder::new(&packed[..])
            .take(self.grain_sectors * 512)
            .read_to_end(&mut out);
        match read {
            Ok(_) => Ok(out),
            Err(_) => damaged(format!("the compressed grain at {at:#x} is damaged")),
        }
    }
}

/// A sparse extent: monolithic, a part of a split disk, or stream-optimised.
pub(crate) fn open_sparse(storage: Box<dyn Storage>, read_only: bool) -> Result<Mapped, DiskError> {
    let file = storage.len().map_err(map_error)?;
    let mut h = vec![0; 512];
    storage.read_at(0, &mut h).map_err(map_error)?;
    if le32(&h, 0) != MAGIC {
        return damaged("it does not begin as one; expected a VMDK image");
    }
    if le64(&h, 56) == AT_END {
        if file < 1024 {
            return damaged("the file is cut off");
        }
        storage.read_at(file - 1024, &mut h).map_err(map_error)?;
        if le32(&h, 0) != MAGIC {
            return damaged("there is no footer; the file is cut off");
        }
    }
    let (version, flags) = (le32(&h, 4), le32(&h, 8));
    let (capacity, grain) = (le64(&h, 12), le64(&h, 20));
    let entries = u64::from(le32(&h, 44));
    let directory = le64(&h, 56);
    let compressed = flags & FLAG_COMPRESSED != 0;
    if !(1..=3).contains(&version) {
        return unsupported(format!("VMDK version {version} is not supported"));
    }
    if compressed && le16(&h, 77) != 1 {
        return unsupported("VMDK compression is not deflate");
    }
    if !grain.is_power_of_two() || !(8..=1 << 15).contains(&grain) || entries != TABLE_ENTRIES {
        return damaged(format!("grains of {grain} sectors, {entries} in a table"));
    }
    let Some(size_bytes) = capacity.checked_mul(512).filter(|s| *s < 1 << 62) else {
        return damaged(format!("a disk of {capacity} sectors"));
    };
    let grains = capacity.div_ceil(grain);
    if grains > MAX_BLOCKS {
        return unsupported("the VMDK image is too large; at most 1 TiB with usual grains");
    }
    let tables = grains.div_ceil(TABLE_ENTRIES);
    let read_tables = |directory: u64| -> Result<Vec<u32>, DiskError> {
        let at = directory.saturating_mul(512);
        if directory == 0 || at.saturating_add(tables * 4) > file {
            return damaged("the grain directory lies beyond the end; the file is cut off?");
        }
        let mut b = vec![0; tables as usize * 4];
        storage.read_at(at, &mut b).map_err(map_error)?;
        Ok(b.chunks_exact(4).map(|c| le32(c, 0)).collect())
    };
    let mut directories = vec![read_tables(directory)?];
    let zero_grains = flags & FLAG_ZERO_GRAINS != 0;
    let mut map = Vec::with_capacity(grains as usize);
    let mut b = vec![0; TABLE_ENTRIES as usize * 4];
    let first = directories.first().cloned().unwrap_or_default();
    for sector in first {
        let at = u64::from(sector) * 512;
        if sector == 0 {
            b.fill(0);
        } else if at + b.len() as u64 > file {
            return damaged("a grain table lies beyond the end; the file is cut off?");
        } else {
            storage.read_at(at, &mut b).map_err(map_error)?;
        }
        for c in b.chunks_exact(4) {
            map.push(match le32(c, 0) {
                0 => Block::Absent,
                1 if zero_grains => Block::Zero,
                n if u64::from(n) * 512 >= file => {
                    return damaged("a grain lies beyond the end; the file is cut off?");
                }
                n if compressed => Block::Packed(u64::from(n) * 512),
                n => Block::At(u64::from(n) * 512),
            });
        }
    }
    map.truncate(grains as usize);
    if flags & FLAG_SECOND_DIRECTORY != 0 && !compressed && !read_only {
        directories.push(read_tables(le64(&h, 48))?);
    }
    let mut details = Details::plain(Format::Vmdk);
    details.cluster_bytes = Some(grain * 512);
    let name = if compressed {
        "stream-optimised"
    } else {
        "sparse"
    };
    details.properties.push(("type", name.into()));
    let layout = Layout {
        size_bytes,
        block_bytes: grain * 512,
        map,
        end: file,
        table: Box::new(VmdkTable {
            tables: directories,
            compressed,
            grain_sectors: grain,
        }),
        details,
    };
    Mapped::new(storage, layout, read_only)
}

/// One line of a descriptor: sectors, kind, file, first sector in it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ExtentLine {
    sectors: u64,
    kind: String,
    file: String,
    offset: u64,
}

/// Reads the extents of a descriptor.
pub(crate) fn parse_descriptor(text: &str) -> Result<Vec<ExtentLine>, DiskError> {
    let mut out = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some((key, value)) = line.split_once('=')
            && key.trim().eq_ignore_ascii_case("parentCID")
            && !value
                .trim()
                .trim_matches('"')
                .eq_ignore_ascii_case("ffffffff")
        {
            return unsupported("VMDK images with a parent are not supported; merge it first");
        }
        let Some(rest) = ["RW ", "RDONLY ", "NOACCESS "]
            .iter()
            .find_map(|p| line.strip_prefix(p))
        else {
            continue;
        };
        let mut words = rest.splitn(3, ' ');
        let sectors = words.next().and_then(|w| w.parse().ok());
        let kind = words.next().unwrap_or_default().to_owned();
        let rest = words.next().unwrap_or_default();
        let (file, offset) = match rest.strip_prefix('"').and_then(|r| r.rsplit_once('"')) {
            Some((file, offset)) => (file.to_owned(), offset.trim().parse().unwrap_or(0)),
            None => (String::new(), 0),
        };
        let Some(sectors) = sectors.filter(|s| *s < 1 << 53) else {
            return damaged(format!("the extent {line:?}"));
        };
        if out.len() >= MAX_EXTENTS {
            return damaged("too many extents");
        }
        out.push(ExtentLine {
            sectors,
            kind,
            file,
            offset,
        });
    }
    if out.is_empty() {
        return damaged("the descriptor names no extents");
    }
    Ok(out)
}

/// A range of the disk: where it begins, its bytes, the image that has it (zeroes without one), and
/// where in that image.
struct Part {
    start: u64,
    len: u64,
    image: Option<Arc<dyn Image>>,
    offset: u64,
}

/// An image, an offset in it, and the bytes left in the part.
type Place<'a> = (Option<&'a Arc<dyn Image>>, u64, u64);

/// A disk that is several images one after another.
struct Joined {
    parts: Vec<Part>,
    size_bytes: u64,
    read_only: bool,
}

impl Joined {
    /// What has a byte.
    fn part(&self, at: u64) -> Result<Place<'_>, DiskError> {
        let index = self.parts.partition_point(|p| p.start <= at);
        match index.checked_sub(1).and_then(|i| self.parts.get(i)) {
            Some(p) if at < p.start + p.len => Ok((
                p.image.as_ref(),
                p.offset + (at - p.start),
                p.start + p.len - at,
            )),
            _ => damaged("the extents have a gap"),
        }
    }

    fn each(&self) -> impl Iterator<Item = &Arc<dyn Image>> {
        self.parts.iter().filter_map(|p| p.image.as_ref())
    }
}

impl Image for Joined {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size_bytes: self.size_bytes,
            block_bytes: 512,
            read_only: self.read_only,
            discard: false,
        }
    }

    fn read(&self, offset: u64, target: &mut Target<'_>) -> Result<(), DiskError> {
        let mut at = offset;
        while target.remaining() > 0 {
            let (image, inside, left) = self.part(at)?;
            let n = left.min(target.remaining());
            match image {
                Some(i) => target.with_part(n, |part| i.read(inside, part))?,
                None => target.zero(n)?,
            }
            at += n;
        }
        Ok(())
    }

    fn write(&self, offset: u64, source: &mut Source<'_>) -> Result<(), DiskError> {
        let mut at = offset;
        while source.remaining() > 0 {
            let (image, inside, left) = self.part(at)?;
            let n = left.min(source.remaining());
            let Some(image) = image else {
                return unsupported("this part of the VMDK image is zeroes for ever");
            };
            let mut bytes = vec![0; n as usize];
            source.copy(&mut bytes)?;
            image.write(inside, &mut Source::host(&bytes))?;
            at += n;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        let mut at = offset;
        while at < offset + len {
            let (image, inside, left) = self.part(at)?;
            let n = left.min(offset + len - at);
            if let Some(i) = image {
                i.write_zeroes(inside, n, may_unmap)?;
            }
            at += n;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let mut at = offset;
        while at < offset + len {
            let (image, inside, left) = self.part(at)?;
            let n = left.min(offset + len - at);
            if let Some(i) = image {
                i.discard(inside, n)?;
            }
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.each().try_for_each(|i| i.flush())
    }

    fn extent(&self, offset: u64, max: u64) -> Result<Extent, DiskError> {
        let (image, inside, left) = self.part(offset)?;
        match image {
            Some(i) => i.extent(inside, max.min(left)),
            None => Ok(Extent::zero(max.min(left))),
        }
    }

    fn resize(&self, _size_bytes: u64) -> Result<(), DiskError> {
        unsupported("vmdk images cannot be resized; convert it to qcow2 or raw first")
    }

    fn details(&self) -> Details {
        let mut d = Details::plain(Format::Vmdk);
        d.properties.push(("type", "described".into()));
        d.properties.push(("extents", self.parts.len().to_string()));
        d
    }
}

/// Opens an image that is one file, or a descriptor with its extents if those may be opened.
pub(crate) fn open(
    path: &Path,
    read_only: bool,
    references: References,
) -> Result<Arc<dyn Image>, ImageError> {
    let failed = ImageError::disk(path);
    let file = HostFile::open(path, read_only)?;
    let mut head = [0; 4];
    file.read_at(0, &mut head)
        .map_err(|e| failed(map_error(e)))?;
    if le32(&head, 0) == MAGIC {
        let image = open_sparse(Box::new(file), read_only).map_err(&failed)?;
        return Ok(Arc::new(image));
    }
    let bytes = file.len().map_err(|e| failed(map_error(e)))?;
    if bytes > MAX_DESCRIPTOR {
        return Err(ImageError::content(
            path,
            "this is neither a VMDK image nor a descriptor of one",
        ));
    }
    let mut text = vec![0; bytes as usize];
    file.read_at(0, &mut text)
        .map_err(|e| failed(map_error(e)))?;
    let text = String::from_utf8_lossy(&text);
    if !text.starts_with("# Disk DescriptorFile") {
        return Err(ImageError::content(
            path,
            "this is neither a VMDK image nor a descriptor of one",
        ));
    }
    let lines = parse_descriptor(&text).map_err(&failed)?;
    let mut parts = Vec::new();
    let mut start = 0u64;
    for line in lines {
        let len = line.sectors * 512;
        let image = if line.kind == "ZERO" {
            None
        } else {
            Some(open_extent(path, &line, read_only, references)?)
        };
        let offset = line.offset.saturating_mul(512);
        let fits = image.as_ref().is_none_or(|i| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= i.info().size_bytes)
        });
        if !fits {
            return Err(ImageError::content(
                path,
                format!(
                    "the extent {:?} is shorter than the descriptor says",
                    line.file
                ),
            ));
        }
        parts.push(Part {
            start,
            len,
            image,
            offset,
        });
        start += len;
    }
    if start == 0 || start >= 1 << 62 {
        return Err(ImageError::content(path, "the disk has no size"));
    }
    Ok(Arc::new(Joined {
        parts,
        size_bytes: start,
        read_only,
    }))
}

fn open_extent(
    path: &Path,
    line: &ExtentLine,
    read_only: bool,
    references: References,
) -> Result<Arc<dyn Image>, ImageError> {
    if references == References::Refuse {
        return Err(ImageError::content(
            path,
            format!(
                "the image needs the file {:?}; allow it (backing=allow) if the image comes from \
                 somebody you trust with your files",
                line.file
            ),
        ));
    }
    // Extents are beside their descriptor.
    if line.file.is_empty() || line.file.contains('/') {
        return Err(ImageError::content(
            path,
            format!("the extent {:?} is not beside its descriptor", line.file),
        ));
    }
    let at = beside(path, &line.file);
    let file = HostFile::open(&at, read_only)?;
    match line.kind.as_str() {
        "FLAT" | "VMFS" => Ok(if read_only {
            Arc::new(RawImage::padded(file)?)
        } else {
            Arc::new(RawImage::new(file, false)?)
        }),
        "SPARSE" => {
            let image = open_sparse(Box::new(file), read_only).map_err(ImageError::disk(&at))?;
            Ok(Arc::new(image))
        }
        kind => Err(ImageError::content(
            path,
            format!("extents of kind {kind:?} are not supported"),
        )),
    }
}

fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(name)
}

/// The descriptor of a new image.
fn descriptor(kind: &str, size_bytes: u64, extent: &str, cid: u32) -> String {
    let sectors = size_bytes / 512;
    let cylinders = (sectors / (63 * 16)).min(16383);
    // A content ID of all ones means "none".
    let cid = cid & 0x7fff_ffff;
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n\
         # Extent description\n{extent}\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\n"
    )
}

/// The header of a sparse extent.
struct Header {
    flags: u32,
    version: u32,
    size_bytes: u64,
    second_directory: u64,
    directory: u64,
    overhead: u64,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut h = vec![0; 512];
        put(&mut h, 0, &MAGIC.to_le_bytes());
        put(&mut h, 4, &self.version.to_le_bytes());
        put(&mut h, 8, &self.flags.to_le_bytes());
        put(&mut h, 12, &(self.size_bytes / 512).to_le_bytes());
        put(&mut h, 20, &GRAIN_SECTORS.to_le_bytes());
        put(&mut h, 28, &1u64.to_le_bytes());
        put(&mut h, 36, &DESCRIPTOR_SECTORS.to_le_bytes());
        put(&mut h, 44, &(TABLE_ENTRIES as u32).to_le_bytes());
        put(&mut h, 48, &self.second_directory.to_le_bytes());
        put(&mut h, 56, &self.directory.to_le_bytes());
        put(&mut h, 64, &self.overhead.to_le_bytes());
        put(&mut h, 73, b"\n \r\n");
        let deflate = u16::from(self.flags & FLAG_COMPRESSED != 0);
        put(&mut h, 77, &deflate.to_le_bytes());
        h
    }
}

fn check_size(size_bytes: u64) -> Result<u64, DiskError> {
    let grains = size_bytes.div_ceil(GRAIN_SECTORS * 512);
    if size_bytes == 0 || grains > MAX_BLOCKS {
        return unsupported(format!(
            "a VMDK image of {size_bytes} bytes is not possible; at most 1 TiB"
        ));
    }
    Ok(grains)
}

/// Makes an empty monolithic sparse image. `name`: of its file.
pub(crate) fn create_sparse(
    storage: &dyn Storage,
    size_bytes: u64,
    name: &str,
    cid: u32,
) -> Result<(), DiskError> {
    let grains = check_size(size_bytes)?;
    let tables = grains.div_ceil(TABLE_ENTRIES);
    let directory_sectors = (tables * 4).div_ceil(512);
    let table_sectors = TABLE_ENTRIES * 4 / 512;
    let second = 1 + DESCRIPTOR_SECTORS;
    let directory = second + directory_sectors + tables * table_sectors;
    let end = directory + directory_sectors + tables * table_sectors;
    let overhead = end.next_multiple_of(GRAIN_SECTORS);
    storage.set_len(overhead * 512).map_err(map_error)?;
    for start in [second, directory] {
        let mut b = vec![0; (directory_sectors * 512) as usize];
        for n in 0..tables {
            let at = (start + directory_sectors + n * table_sectors) as u32;
            put(&mut b, n as usize * 4, &at.to_le_bytes());
        }
        storage.write_at(start * 512, &b).map_err(map_error)?;
    }
    let sectors = size_bytes / 512;
    let text = descriptor(
        "monolithicSparse",
        size_bytes,
        &format!("RW {sectors} SPARSE \"{name}\""),
        cid,
    );
    storage.write_at(512, text.as_bytes()).map_err(map_error)?;
    let header = Header {
        flags: FLAG_NEW_LINE | FLAG_SECOND_DIRECTORY,
        version: 1,
        size_bytes,
        second_directory: second,
        directory,
        overhead,
    };
    storage.write_at(0, &header.encode()).map_err(map_error)?;
    storage.sync().map_err(map_error)
}

/// Makes a flat image: the descriptor at `path`, the data beside it.
pub(crate) fn create_flat(
    path: &Path,
    size_bytes: u64,
    overwrite: bool,
    cid: u32,
) -> Result<(), ImageError> {
    let failed = |e| ImageError::disk(path)(map_error(e));
    let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or("disk");
    let name = format!("{stem}-flat.vmdk");
    let descriptor_file = HostFile::create(path, overwrite)?;
    let data = HostFile::create(&beside(path, &name), overwrite)?;
    data.set_len(size_bytes).map_err(failed)?;
    data.sync().map_err(failed)?;
    let sectors = size_bytes / 512;
    let text = descriptor(
        "monolithicFlat",
        size_bytes,
        &format!("RW {sectors} FLAT \"{name}\" 0"),
        cid,
    );
    descriptor_file
        .write_at(0, text.as_bytes())
        .map_err(failed)?;
    descriptor_file.sync().map_err(failed)
}

/// Writes a stream-optimised image, from front to back.
pub(crate) struct Stream<'a> {
    storage: &'a dyn Storage,
    size_bytes: u64,
    /// Sector of each grain's marker.
    grains: Vec<u32>,
    sector: u64,
}

impl<'a> Stream<'a> {
    /// Begins an image in an empty store. `name`: of its file.
    pub(crate) fn new(
        storage: &'a dyn Storage,
        size_bytes: u64,
        name: &str,
        cid: u32,
    ) -> Result<Stream<'a>, DiskError> {
        let grains = check_size(size_bytes)?;
        let sectors = size_bytes / 512;
        let text = descriptor(
            "streamOptimized",
            size_bytes,
            &format!("RW {sectors} SPARSE \"{name}\""),
            cid,
        );
        let stream = Stream {
            storage,
            size_bytes,
            grains: vec![0; grains as usize],
            sector: GRAIN_SECTORS,
        };
        storage
            .write_at(0, &stream.header(AT_END).encode())
            .map_err(map_error)?;
        storage.write_at(512, text.as_bytes()).map_err(map_error)?;
        Ok(stream)
    }

    fn header(&self, directory: u64) -> Header {
        Header {
            flags: FLAG_NEW_LINE | FLAG_COMPRESSED | FLAG_MARKERS,
            version: 3,
            size_bytes: self.size_bytes,
            second_directory: 0,
            directory,
            overhead: GRAIN_SECTORS,
        }
    }

    /// Writes bytes at the end, filled up to a sector; returns their sector.
    fn append(&mut self, bytes: &[u8]) -> Result<u32, DiskError> {
        let at = self.sector;
        let mut b = bytes.to_vec();
        b.resize(b.len().next_multiple_of(512), 0);
        self.storage.write_at(at * 512, &b).map_err(map_error)?;
        self.sector += b.len() as u64 / 512;
        u32::try_from(at).map_err(|_| DiskError::NoSpace)
    }

    /// A marker says how many sectors of what follow.
    fn marked(&mut self, kind: u32, bytes: &[u8]) -> Result<u32, DiskError> {
        let mut m = vec![0; 512];
        let sectors = (bytes.len() as u64).div_ceil(512);
        put(&mut m, 0, &sectors.to_le_bytes());
        put(&mut m, 12, &kind.to_le_bytes());
        self.append(&m)?;
        self.append(bytes)
    }
}

impl Filler for Stream<'_> {
    fn unit_bytes(&self) -> u64 {
        GRAIN_SECTORS * 512
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let unit = self.unit_bytes();
        for (n, grain) in data.chunks(unit as usize).enumerate() {
            let index = offset / unit + n as u64;
            let mut whole = grain.to_vec();
            whole.resize(unit as usize, 0);
            let mut e = flate2::read::ZlibEncoder::new(&whole[..], flate2::Compression::default());
            let mut b = vec![0; 12];
            e.read_to_end(&mut b).map_err(map_error)?;
            let packed = (b.len() - 12) as u32;
            put(&mut b, 0, &(index * GRAIN_SECTORS).to_le_bytes());
            put(&mut b, 8, &packed.to_le_bytes());
            let sector = self.append(&b)?;
            if let Some(g) = self.grains.get_mut(index as usize) {
                *g = sector;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DiskError> {
        let grains = std::mem::take(&mut self.grains);
        let mut directory = Vec::new();
        for table in grains.chunks(TABLE_ENTRIES as usize) {
            let sector = if table.iter().all(|g| *g == 0) {
                0
            } else {
                let mut b: Vec<u8> = table.iter().flat_map(|g| g.to_le_bytes()).collect();
                b.resize(TABLE_ENTRIES as usize * 4, 0);
                self.marked(MARKER_TABLE, &b)?
            };
            directory.extend_from_slice(&sector.to_le_bytes());
        }
        let at = self.marked(MARKER_DIRECTORY, &directory)?;
        let footer = self.header(u64::from(at)).encode();
        self.marked(MARKER_FOOTER, &footer)?;
        // End of stream.
        self.append(&[0; 512])?;
        self.storage.sync().map_err(map_error)
    }
}
