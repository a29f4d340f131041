//! Checksums of the pages of SQLite's file, which has none of its own: a changed byte in a number is another number.
//!
//! A VFS between SQLite and the operating system writes a checksum into the last 8 bytes of each page on its way to the
//! database file, and compares it on the way back. The format is that of SQLite's extension `cksumvfs`
//! (<https://sqlite.org/cksumvfs.html>), which is not part of the library; so any other program can read the file, and
//! one that writes into it without that extension leaves pages that count as damaged here. The write-ahead log has
//! checksums, but what follows the first wrong one is left out and nobody told; [`check_wal`] tells.
#![expect(unsafe_code, reason = "SQLite takes a VFS as C structs of function pointers")]

use libsqlite3_sys::{
    SQLITE_ERROR, SQLITE_FCNTL_RESERVE_BYTES, SQLITE_IOCAP_SUBPAGE_READ, SQLITE_IOERR_DATA, SQLITE_OK,
    SQLITE_OPEN_MAIN_DB, sqlite3_file, sqlite3_file_control, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs,
    sqlite3_vfs_find, sqlite3_vfs_register,
};
use parking_lot::Mutex;
use sqlx::SqliteConnection;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

/// Bytes at the end of a page that SQLite leaves to others.
const RESERVED: usize = 8;
const NAME: &CStr = c"tidewatch";

/// The header of a database file, and what is where in it: <https://sqlite.org/fileformat2.html#the_database_header>.
const HEADER: usize = 100;
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
const PAGE_SIZE_AT: usize = 16;
const RESERVED_AT: usize = 20;
const APPLICATION_AT: usize = 68;
/// `PRAGMA application_id` of a file whose pages have checksums.
pub(super) const APPLICATION: u32 = u32::from_be_bytes(*b"Tide");

/// What was found damaged by a read or by [`scan`], in any file that this process has open.
static FOUND: Mutex<BTreeSet<Damage>> = Mutex::new(BTreeSet::new());

const FOUND_MAX: usize = 1_000;

/// A part of SQLite's files that is not as it was written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, thiserror::Error)]
#[error("`{}` is damaged: the {part} at byte {offset} is not as it was written", path.display())]
pub struct Damage {
    pub path: PathBuf,
    /// Of the file's structure: its header, a page, or a frame of the write-ahead log.
    pub part: &'static str,
    pub offset: u64,
}

/// What was found damaged in the file at `path` until now.
pub(super) fn found(path: &Path) -> Vec<Damage> {
    // SQLite's names are absolute
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    FOUND.lock().iter().filter(|damage| damage.path == path).cloned().collect()
}

fn report(damage: Damage) {
    let mut found = FOUND.lock();
    if found.len() < FOUND_MAX && found.insert(damage.clone()) {
        tracing::error!("{damage}; what stands there cannot be read; restore a backup");
    }
}

/// SQLite's own VFS, and the one made of it here, once.
struct Installed {
    base: *mut sqlite3_vfs,
}

// SAFETY: SQLite never frees a registered VFS, and uses it from all threads itself.
unsafe impl Send for Installed {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Installed {}

static INSTALLED: OnceLock<Option<Installed>> = OnceLock::new();

/// The name of the VFS that keeps checksums.
pub(super) fn vfs() -> io::Result<&'static str> {
    let installed = INSTALLED.get_or_init(install).as_ref().and_then(|_| NAME.to_str().ok());
    installed.ok_or_else(|| io::Error::other("SQLite does not take a VFS that keeps checksums"))
}

fn install() -> Option<Installed> {
    // SAFETY: the default VFS is a valid struct, and so is its copy: none of its functions but `xOpen` asks which of
    // the two it is called for, since the data that is theirs is the same. The copy lives as long as the process.
    unsafe {
        let base = sqlite3_vfs_find(ptr::null());
        if base.is_null() {
            return None;
        }
        let own = Box::leak(Box::new(*base));
        own.pNext = ptr::null_mut();
        own.zName = NAME.as_ptr();
        own.szOsFile = (sealed_at(base) + size_of::<Sealed>()) as c_int;
        own.xOpen = Some(open);
        (sqlite3_vfs_register(own, 0) == SQLITE_OK).then_some(Installed { base })
    }
}

/// What is known of an open database file. It stands behind what the base knows of it, whose functions are called with
/// the same pointer.
#[repr(C)]
struct Sealed {
    /// The base's, but for reading and writing.
    methods: sqlite3_io_methods,
    base: *const sqlite3_io_methods,
    /// SQLite keeps it until the file is closed.
    name: *const c_char,
    /// Whether the pages of this file have checksums.
    is_sealed: bool,
}

/// Where [`Sealed`] stands in what SQLite gives room for an open file.
unsafe fn sealed_at(base: *const sqlite3_vfs) -> usize {
    // SAFETY: the caller's pointer is that of a registered VFS
    let size = unsafe { (*base).szOsFile };
    usize::try_from(size).unwrap_or(0).next_multiple_of(align_of::<Sealed>())
}

unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    opened: *mut c_int,
) -> c_int {
    let Some(Some(Installed { base })) = INSTALLED.get() else { return SQLITE_ERROR };
    // SAFETY: SQLite gives `szOsFile` bytes at `file`, aligned for any of its structs. The base writes the first part of
    // them and `Sealed` is in the rest; nothing of it has to be dropped.
    unsafe {
        let Some(open) = (**base).xOpen else { return SQLITE_ERROR };
        let result = open(*base, name, file, flags, opened);
        let methods = (*file).pMethods;
        if result == SQLITE_OK && flags & SQLITE_OPEN_MAIN_DB != 0 && !methods.is_null() {
            let own = sqlite3_io_methods {
                iVersion: (*methods).iVersion.min(2), // 3 would read pages by mapping the file into memory
                xRead: Some(read),
                xWrite: Some(write),
                xDeviceCharacteristics: Some(characteristics),
                ..*methods
            };
            // The first page may be the last that is written to a new file, and all of them have room: see `reserve`.
            let mut size = 0;
            let is_new =
                (*methods).xFileSize.is_some_and(|size_of| size_of(file, &raw mut size) == SQLITE_OK && size == 0);
            let sealed = file.byte_add(sealed_at(*base)).cast::<Sealed>();
            sealed.write(Sealed { methods: own, base: methods, name, is_sealed: is_new });
            (*file).pMethods = &raw const (*sealed).methods;
        }
        result
    }
}

/// Without the right to read a part of a page, which could not be compared: SQLite takes it for long values.
unsafe extern "C" fn characteristics(file: *mut sqlite3_file) -> c_int {
    // SAFETY: the base's function gets the pointer that it was made for.
    unsafe {
        let Some(base) = sealed(file).and_then(|sealed| (*sealed.base).xDeviceCharacteristics) else { return 0 };
        base(file) & !SQLITE_IOCAP_SUBPAGE_READ
    }
}

/// What is known of an open database file; nothing for a file that [`open`] did not open.
unsafe fn sealed<'f>(file: *mut sqlite3_file) -> Option<&'f mut Sealed> {
    let Some(Some(Installed { base })) = INSTALLED.get() else { return None };
    // SAFETY: only files with our methods come here, and `open` has written it for each of them. A file is used by one
    // thread at a time.
    unsafe { file.byte_add(sealed_at(*base)).cast::<Sealed>().as_mut() }
}

/// Whether these are the bytes of a page: SQLite reads and writes whole ones, and else only some of the header.
fn is_page(length: usize, offset: u64) -> bool {
    length.is_power_of_two() && (512..=65_536).contains(&length) && offset.is_multiple_of(length as u64)
}

fn has_checksums(header: &[u8]) -> bool {
    header.starts_with(MAGIC) && usize::from(header[RESERVED_AT]) == RESERVED
}

unsafe extern "C" fn read(file: *mut sqlite3_file, to: *mut c_void, length: c_int, offset: sqlite3_int64) -> c_int {
    // SAFETY: SQLite gives `length` bytes at `to`, which the base has filled where it says so.
    unsafe {
        let Some(sealed) = sealed(file) else { return SQLITE_ERROR };
        let Some(base) = (*sealed.base).xRead else { return SQLITE_ERROR };
        let result = base(file, to, length, offset);
        let (Ok(length), Ok(offset)) = (usize::try_from(length), u64::try_from(offset)) else { return result };
        if result != SQLITE_OK {
            return result;
        }
        let content = std::slice::from_raw_parts(to.cast::<u8>(), length);
        if offset == 0 && length >= HEADER {
            sealed.is_sealed = has_checksums(content);
        }
        if sealed.is_sealed && is_page(length, offset) && !is_whole(content) {
            let path = PathBuf::from(OsStr::from_bytes(CStr::from_ptr(sealed.name).to_bytes()));
            report(Damage { path, part: "page", offset });
            return SQLITE_IOERR_DATA;
        }
        result
    }
}

thread_local! {
    static PAGE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    from: *const c_void,
    length: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite gives `length` bytes at `from`.
    unsafe {
        let Some(sealed) = sealed(file) else { return SQLITE_ERROR };
        let Some(base) = (*sealed.base).xWrite else { return SQLITE_ERROR };
        let (Ok(size), Ok(at)) = (usize::try_from(length), u64::try_from(offset)) else { return SQLITE_ERROR };
        let content = std::slice::from_raw_parts(from.cast::<u8>(), size);
        if at == 0 && size >= HEADER {
            sealed.is_sealed = has_checksums(content);
        }
        if !(sealed.is_sealed && is_page(size, at)) {
            return base(file, from, length, offset);
        }
        PAGE.with_borrow_mut(|page| {
            page.clear();
            page.extend_from_slice(content);
            seal(page);
            base(file, page.as_ptr().cast(), length, offset)
        })
    }
}

/// <https://sqlite.org/fileformat2.html#checksum_algorithm>, which finds any one changed byte: two weights that follow
/// each other are never both even.
fn checksum(content: &[u8]) -> [u8; RESERVED] {
    let (mut first, mut second) = (0_u32, 0_u32);
    let (pairs, _) = content.as_chunks::<8>();
    for &[a, b, c, d, e, f, g, h] in pairs {
        first = first.wrapping_add(u32::from_le_bytes([a, b, c, d])).wrapping_add(second);
        second = second.wrapping_add(u32::from_le_bytes([e, f, g, h])).wrapping_add(first);
    }
    let mut sum = [0; RESERVED];
    sum[..4].copy_from_slice(&first.to_le_bytes());
    sum[4..].copy_from_slice(&second.to_le_bytes());
    sum
}

fn seal(page: &mut [u8]) {
    let (content, sum) = page.split_at_mut(page.len() - RESERVED);
    sum.copy_from_slice(&checksum(content));
}

/// Whether a page is as it was written; one that never was is zeros, which are their own checksum.
fn is_whole(page: &[u8]) -> bool {
    let (content, sum) = page.split_at(page.len() - RESERVED);
    checksum(content) == *sum
}

/// Lets pages of a file that is new, or is written anew by VACUUM, or into which VACUUM copies, have room for a checksum:
/// to be called before anything is written to one.
pub(super) async fn reserve(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut bytes = RESERVED as c_int;
    let mut handle = connection.lock_handle().await?;
    // SAFETY: the handle is open and locked, and this control reads and writes one `c_int`.
    let result = unsafe {
        let bytes = (&raw mut bytes).cast();
        sqlite3_file_control(handle.as_raw_handle().as_ptr(), c"main".as_ptr(), SQLITE_FCNTL_RESERVE_BYTES, bytes)
    };
    match result {
        SQLITE_OK => Ok(()),
        _ => Err(io::Error::other("SQLite keeps no room for checksums in its pages").into()),
    }
}

/// What the header of a database file says.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// There is no file, or nothing in it.
    New,
    /// Pages have no checksums: an earlier version made it.
    Plain,
    Sealed,
    /// Not a database, which SQLite says better.
    Foreign,
}

/// Which form the file at `path` has; an error where its header says that it has lost its checksums.
pub(super) fn form(path: &Path) -> io::Result<Form> {
    let mut header = [0; HEADER];
    match File::open(path).and_then(|mut file| file.read_exact(&mut header)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Form::New),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(if std::fs::metadata(path)?.len() == 0 { Form::New } else { Form::Foreign });
        }
        Err(error) => return Err(error),
    }
    if !header.starts_with(MAGIC) {
        return Ok(Form::Foreign);
    }
    let is_ours = header[APPLICATION_AT..APPLICATION_AT + 4] == APPLICATION.to_be_bytes();
    match has_checksums(&header) {
        true => Ok(Form::Sealed),
        false if is_ours => {
            let damage = Damage { path: path.to_owned(), part: "header", offset: RESERVED_AT as u64 };
            Err(io::Error::new(io::ErrorKind::InvalidData, damage))
        }
        false => Ok(Form::Plain),
    }
}

/// An error where the file at `path`, which nobody writes to, has a page that is not as it was written.
pub(super) fn check(path: &Path) -> io::Result<()> {
    scan(path)?;
    match found(path).into_iter().next() {
        Some(damage) => Err(io::Error::new(io::ErrorKind::InvalidData, damage)),
        None => Ok(()),
    }
}

/// Reads all pages of the file at `path` and remembers those that are damaged. Other threads may write meanwhile.
pub(super) fn scan(path: &Path) -> io::Result<()> {
    /// A page that somebody writes at this moment is whole at the next.
    const LOOKS: u32 = 3;
    const LOOK_AGAIN: Duration = Duration::from_millis(10);
    const READ: usize = 1 << 20;
    let path = path.canonicalize()?;
    let mut file = File::open(&path)?;
    let mut header = [0; HEADER];
    file.read_exact(&mut header)?;
    if !has_checksums(&header) {
        return Ok(());
    }
    let size = match u16::from_be_bytes([header[PAGE_SIZE_AT], header[PAGE_SIZE_AT + 1]]) {
        1 => 65_536,
        size => usize::from(size),
    };
    if !is_page(size, 0) {
        report(Damage { path, part: "header", offset: PAGE_SIZE_AT as u64 });
        return Ok(());
    }
    let mut pages = vec![0; size * READ.div_ceil(size)];
    let mut suspects = Vec::new();
    let mut offset = 0;
    file.seek(SeekFrom::Start(0))?;
    loop {
        let mut filled = 0;
        while filled < pages.len() {
            match file.read(&mut pages[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        let whole = pages[..filled].chunks_exact(size);
        let damaged = whole.zip(0_u64..).filter(|(page, _)| !is_whole(page)).map(|(_, n)| offset + n * size as u64);
        suspects.extend(damaged);
        if filled < pages.len() {
            break;
        }
        offset += filled as u64;
    }
    for _ in 1..LOOKS {
        if suspects.is_empty() {
            break;
        }
        std::thread::sleep(LOOK_AGAIN);
        let mut still = Vec::new();
        for offset in suspects {
            file.seek(SeekFrom::Start(offset))?;
            // a file that was cut has no such page any more
            if file.read_exact(&mut pages[..size]).is_ok() && !is_whole(&pages[..size]) {
                still.push(offset);
            }
        }
        suspects = still;
    }
    for offset in suspects {
        report(Damage { path: path.clone(), part: "page", offset });
    }
    Ok(())
}

/// The write-ahead log: <https://sqlite.org/fileformat2.html#the_write_ahead_log>.
const WAL_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// Finds damage in the write-ahead log that a killed process left beside the file at `path`: SQLite takes what it says up
/// to the first frame that is not as it was written, as if the rest had never been committed.
///
/// A loss of power may leave the last commit in part, since none before it is acknowledged unless it is on the disk. So
/// a frame that is not whole is damage only where another commit has followed it.
pub(super) fn check_wal(path: &Path) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    let path = PathBuf::from(name);
    let log = match std::fs::read(&path) {
        Ok(log) if log.len() > WAL_HEADER => log,
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    match wal_damage(&log) {
        Ok(None) => Ok(()),
        Ok(Some(offset)) => {
            let file = path.display();
            tracing::warn!(
                "`{file}` is not whole from byte {offset} on, as after a loss of power: what was written last is left out"
            );
            Ok(())
        }
        Err(offset) => {
            let part = if offset == 0 { "header" } else { "frame" };
            Err(io::Error::new(io::ErrorKind::InvalidData, Damage { path, part, offset }))
        }
    }
}

/// Where it is damaged; or else, where it ends before its end, which is that of a commit that was never acknowledged.
fn wal_damage(log: &[u8]) -> Result<Option<u64>, u64> {
    let word = |at: usize| u32::from_be_bytes([log[at], log[at + 1], log[at + 2], log[at + 3]]);
    // the lowest bit of the magic number says in which order the bytes of a word are summed
    let is_big_endian = word(0) & 1 == 1;
    let sum = |(mut first, mut second): (u32, u32), content: &[u8]| {
        for &[a, b, c, d, e, f, g, h] in content.as_chunks::<8>().0 {
            let (one, two) = ([a, b, c, d], [e, f, g, h]);
            let of = |word| if is_big_endian { u32::from_be_bytes(word) } else { u32::from_le_bytes(word) };
            first = first.wrapping_add(of(one)).wrapping_add(second);
            second = second.wrapping_add(of(two)).wrapping_add(first);
        }
        (first, second)
    };
    let mut sums = sum((0, 0), &log[..24]);
    let size = word(8) as usize;
    if word(0) & !1 != 0x377f_0682 || sums != (word(24), word(28)) || !is_page(size, 0) {
        // its frames were committed, unless it is as it was made: zeros
        return if log.iter().any(|byte| *byte != 0) { Err(0) } else { Ok(None) };
    }
    let salt = &log[16..24];
    let mut broken: Option<usize> = None;
    let (mut at, mut ended, mut goes_on) = (WAL_HEADER, false, false);
    while at + FRAME_HEADER + size <= log.len() {
        let head = &log[at..at + FRAME_HEADER];
        let is_commit = word(at + 4) != 0;
        let is_of_this = head[8..16] == *salt;
        match broken {
            None => {
                let next = sum(sum(sums, &head[..8]), &log[at + FRAME_HEADER..at + FRAME_HEADER + size]);
                match is_of_this && next == (word(at + 16), word(at + 20)) {
                    true => sums = next,
                    // frames of the log before this one may follow
                    false => (broken, ended, goes_on) = (Some(at), is_commit && is_of_this, is_of_this),
                }
            }
            Some(broken) if is_of_this && ended => return Err(broken as u64),
            Some(_) => (ended, goes_on) = (ended | (is_of_this && is_commit), goes_on | is_of_this),
        }
        at += FRAME_HEADER + size;
    }
    Ok(broken.filter(|_| goes_on).map(|at| at as u64))
}

#[cfg(test)]
mod tests {
    use super::super::{Options, Store, StoreError};
    use super::*;
    use rand::prelude::*;
    use sqlx::{ConnectOptions, Connection};
    use std::fs;
    use tempfile::TempDir;

    /// A closed store with some hundred values, and its file.
    async fn filled() -> (TempDir, String, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("store.db");
        let url = format!("sqlite:{}", path.display());
        let store = Store::open(&url).await.unwrap();
        let values: Vec<_> = (0..2_000).map(|n| (format!("key {n}"), format!("value {n}"))).collect();
        store.put_metas(&values).await.unwrap();
        store.close().await;
        (dir, url, path)
    }

    fn flip(path: &Path, at: usize) -> u8 {
        let mut content = fs::read(path).unwrap();
        let before = content[at];
        content[at] ^= 1 << (at % 8);
        fs::write(path, content).unwrap();
        before
    }

    #[tokio::test]
    async fn any_changed_byte_is_found_and_said_with_its_place() {
        let (_dir, url, path) = filled().await;
        let whole = fs::read(&path).unwrap();
        let size = 4096;
        assert!(whole.len() > 20 * size, "{} bytes", whole.len());
        scan(&path).unwrap();
        assert_eq!(found(&path), []);
        let mut random = StdRng::seed_from_u64(1);
        let places: Vec<usize> = (0..HEADER).chain((0..200).map(|_| random.random_range(0..whole.len()))).collect();
        for at in places {
            let copy = path.with_file_name(format!("at{at}.db"));
            fs::write(&copy, &whole).unwrap();
            flip(&copy, at);
            match form(&copy) {
                Ok(Form::Sealed) => {
                    scan(&copy).unwrap();
                    let found = found(&copy);
                    assert_eq!(found.len(), 1, "byte {at}: {found:?}");
                    let (from, to) = (found[0].offset, found[0].offset + size as u64);
                    assert!((from..to).contains(&(at as u64)) || at < HEADER, "byte {at}: {found:?}");
                }
                Ok(form) => assert_eq!((form, at < MAGIC.len()), (Form::Foreign, true), "byte {at}"),
                Err(error) => assert_eq!(at, RESERVED_AT, "{error}"),
            }
        }
        assert_eq!(Store::open(&url).await.unwrap().damage(), None);
    }

    #[tokio::test]
    async fn a_damaged_page_is_not_read_and_what_stands_elsewhere_is() {
        let (_dir, url, path) = filled().await;
        let store = Store::open(&url).await.unwrap();
        let long: Vec<_> = (0..20).map(|n| (format!("long {n}"), format!("{n} {}", "y".repeat(30_000)))).collect();
        store.put_metas(&long).await.unwrap();
        store.close().await;
        // within a long value, of which SQLite would read a part of a page
        let content = fs::read(&path).unwrap();
        flip(&path, content.windows(4_000).position(|bytes| bytes.iter().all(|byte| *byte == b'y')).unwrap() + 2_000);
        let store = Store::open(&url).await.unwrap();
        let mut damaged = 0;
        for (key, value) in &long {
            match store.meta(key).await {
                Ok(kept) => assert_eq!(kept.as_ref(), Some(value)),
                Err(StoreError::Damaged { .. }) => damaged += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(damaged, 1);
        store.close().await;

        let (_dir, url, path) = filled().await;
        let content = fs::read(&path).unwrap();
        let at = content.windows(10).position(|bytes| bytes == b"value 1234").unwrap();
        flip(&path, at);
        let store = Store::open(&url).await.unwrap();
        let error = store.meta("key 1234").await.unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert_eq!(store.meta("key 3").await.unwrap().as_deref(), Some("value 3"));
        let told = store.damage().unwrap();
        assert!(told.contains(&format!("the page at byte {} ", at / 4096 * 4096)), "{told}");
        // what is written to other pages stays
        store.put_meta("zzz", "1").await.unwrap();
        assert_eq!(store.meta("zzz").await.unwrap().as_deref(), Some("1"));
    }

    #[tokio::test]
    async fn a_file_without_checksums_gets_them_and_keeps_what_it_held() {
        use sqlx::sqlite::SqliteJournalMode::{Delete, Wal};
        for mode in [Wal, Delete] {
            rewritten(mode).await;
        }
    }

    async fn rewritten(mode: sqlx::sqlite::SqliteJournalMode) {
        let (_dir, url, path) = filled().await;
        let store = Store::open(&url).await.unwrap();
        let large: Vec<_> = (0..2_000).map(|n| (format!("large {n}"), "x".repeat(3_000))).collect();
        store.put_metas(&large).await.unwrap();
        store.close().await;
        // what an earlier version made: SQLite's own VFS, no room in the pages
        let plain = path.with_file_name("plain.db");
        let mut connection = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(&plain)
            .create_if_missing(true)
            .journal_mode(mode)
            .connect()
            .await
            .unwrap();
        let copy = format!("ATTACH '{}' AS sealed", path.display());
        sqlx::query(sqlx::AssertSqlSafe(copy)).execute(&mut connection).await.unwrap();
        let tables: Vec<String> = sqlx::query_scalar(
            "SELECT sql FROM sealed.sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        )
        .fetch_all(&mut connection)
        .await
        .unwrap();
        for table in tables {
            sqlx::query(sqlx::AssertSqlSafe(table)).execute(&mut connection).await.unwrap();
        }
        for table in ["meta", "_sqlx_migrations"] {
            let fill = format!("INSERT INTO main.{table} SELECT * FROM sealed.{table}");
            sqlx::query(sqlx::AssertSqlSafe(fill)).execute(&mut connection).await.unwrap();
        }
        connection.close().await.unwrap();
        assert_eq!(form(&plain).unwrap(), Form::Plain);

        let url = url.replace("store.db", "plain.db");
        let store = Store::open(&url).await.unwrap();
        assert_eq!(store.meta("key 1999").await.unwrap().as_deref(), Some("value 1999"));
        store.close().await;
        assert_eq!(form(&plain).unwrap(), Form::Plain, "who may not have it alone leaves it as it is");
        for _ in 0..2 {
            let store = Store::open_with(&url, &Options { rewrite: true, ..Options::default() }).await.unwrap();
            assert_eq!(store.meta("key 1999").await.unwrap().as_deref(), Some("value 1999"));
            store.close().await;
            assert_eq!(form(&plain).unwrap(), Form::Sealed);
            scan(&plain).unwrap();
            assert_eq!(found(&plain), []);
        }
    }

    #[tokio::test]
    async fn a_copy_has_checksums_too() {
        let (dir, url, _) = filled().await;
        let store = Store::open(&url).await.unwrap();
        // more than SQLite holds in memory before it writes some of it
        let large: Vec<_> = (0..2_000).map(|n| (format!("large {n}"), "x".repeat(3_000))).collect();
        store.put_metas(&large).await.unwrap();
        store.close().await;
        let to = dir.path().join("copy.db");
        super::super::copy(&url, &to).await.unwrap();
        assert_eq!(form(&to).unwrap(), Form::Sealed);
        scan(&to).unwrap();
        assert_eq!(found(&to), []);
    }

    /// The files of a store whose process was killed after `commits` more commits: the database and its write-ahead log.
    async fn killed(commits: usize) -> (TempDir, String, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = |name| dir.path().join(name);
        let store = Store::open(&format!("sqlite:{}", path("live.db").display())).await.unwrap();
        for n in 0..commits {
            store.put_meta(&format!("key {n}"), "value").await.unwrap();
        }
        fs::copy(path("live.db"), path("store.db")).unwrap();
        fs::copy(path("live.db-wal"), path("store.db-wal")).unwrap();
        store.close().await;
        let path = path("store.db");
        (dir, format!("sqlite:{}", path.display()), path)
    }

    #[tokio::test]
    async fn a_changed_byte_of_the_write_ahead_log_loses_no_commit_in_silence() {
        let (_dir, url, path) = killed(20).await;
        let wal = path.with_file_name("store.db-wal");
        let (database, whole) = (fs::read(&path).unwrap(), fs::read(&wal).unwrap());
        let frame = FRAME_HEADER + 4096;
        let last = whole.len() - frame; // which may be one that power did not last for
        let mut random = StdRng::seed_from_u64(2);
        let places = (0..WAL_HEADER + FRAME_HEADER).chain((0..200).map(|_| random.random_range(0..last - 2 * frame)));
        for at in places {
            fs::write(&path, &database).unwrap();
            fs::write(&wal, &whole).unwrap();
            flip(&wal, at);
            let error = match Store::open(&url).await {
                Err(error) => error.to_string(),
                Ok(_) => panic!("byte {at} was not found"),
            };
            let expected = if at < WAL_HEADER { 0 } else { WAL_HEADER + (at - WAL_HEADER) / frame * frame };
            assert!(error.contains("store.db-wal` is damaged"), "byte {at}: {error}");
            assert!(error.contains(&format!(" at byte {expected} ")), "byte {at}: {error}");
        }
        fs::write(&wal, &whole).unwrap();
        let store = Store::open(&url).await.unwrap();
        assert_eq!(store.meta("key 19").await.unwrap().as_deref(), Some("value"));
    }

    #[tokio::test]
    async fn a_commit_that_power_did_not_last_for_is_left_out() {
        let (_dir, url, path) = killed(20).await;
        let wal = path.with_file_name("store.db-wal");
        let whole = fs::read(&wal).unwrap();
        fs::write(&wal, &whole[..whole.len() - 100]).unwrap();
        let store = Store::open(&url).await.unwrap();
        assert_eq!(store.meta("key 18").await.unwrap().as_deref(), Some("value"));
        assert_eq!(store.meta("key 19").await.unwrap(), None);
    }
}
