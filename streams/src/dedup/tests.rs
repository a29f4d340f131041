use super::*;
use proptest::prelude::*;
use tempfile::TempDir;

fn config() -> Config {
    Config { hours: 1, ids: 10_000, memory_ids: 100 }
}

fn open(directory: &Path) -> Arc<Dedup> {
    Arc::new(Dedup::open(directory, &config()).unwrap())
}

fn key(dedup: &Dedup, id: u64) -> Key {
    dedup.key(&"acme".parse().unwrap(), 0, &"market.trades".parse().unwrap(), &id.to_string())
}

/// Remembers the ids as events of the log's offsets of the same numbers.
fn remember(dedup: &Arc<Dedup>, ids: std::ops::Range<u64>) {
    let ticket = dedup.begin(ids.start);
    let keys: Vec<Key> = ids.map(|id| key(dedup, id)).collect();
    dedup.confirm(ticket, &keys);
}

fn known(dedup: &Dedup, id: u64) -> bool {
    dedup.known(&[key(dedup, id)]).unwrap()[0]
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "ids")).collect();
    paths.sort();
    paths
}

#[test]
fn the_same_id_of_another_stream_or_workspace_or_an_earlier_one_of_its_name_is_another_id() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    let key = |workspace: &str, first, stream: &str, id| {
        dedup.key(&workspace.parse().unwrap(), first, &stream.parse().unwrap(), id)
    };
    let keys = [
        key("acme", 0, "market.trades", "1"),
        key("acme", 7, "market.trades", "1"),
        key("acme", 0, "market.quotes", "1"),
        key("acm", 0, "market.trades", "1"),
        key("acme", 0, "market.trade", "s1"),
    ];
    let distinct: HashSet<Key> = keys.into_iter().collect();
    assert_eq!(distinct.len(), keys.len());
    drop(dedup);
    let again = open(directory.path());
    let same = again.key(&"acme".parse().unwrap(), 0, &"market.trades".parse().unwrap(), "1");
    assert_eq!(same, keys[0], "after a restart too");
}

#[test]
fn ids_in_files_are_known_after_a_restart_and_the_log_is_needed_behind_them_only() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    for part in 0..10 {
        remember(&dedup, part * 300..(part + 1) * 300);
        dedup.flush((part + 1) * 300, Micros(part as i64)).unwrap();
    }
    remember(&dedup, 3_000..3_050);
    assert_eq!(dedup.len(), 3_050);
    assert!((0..3_050).all(|id| known(&dedup, id)) && (3_050..9_000).all(|id| !known(&dedup, id)));
    assert!(files(directory.path()).len() < 10, "files of one size become one");
    drop(dedup);
    let dedup = open(directory.path());
    assert_eq!(dedup.covered(), 3_000);
    assert!((0..3_000).all(|id| known(&dedup, id)) && (3_000..9_000).all(|id| !known(&dedup, id)));
}

#[test]
fn behind_a_file_that_a_copy_lacks_the_log_is_needed_again() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    for part in 0..3 {
        dedup.flush(part * 100, Micros(0)).unwrap(); // events without ids, in the place of the last part
        remember(&dedup, part * 100..part * 100 + 50);
        dedup.flush(part * 100 + 50, Micros(0)).unwrap();
    }
    drop(dedup);
    assert_eq!(open(directory.path()).covered(), 250, "what has no ids leaves no gap");
    fs::remove_file(&files(directory.path())[1]).unwrap();
    let dedup = open(directory.path());
    assert_eq!((dedup.covered(), dedup.len()), (50, 50));
}

#[test]
fn what_an_append_under_way_may_still_put_into_the_log_is_not_covered() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    remember(&dedup, 0..200);
    let slow = dedup.begin(200);
    remember(&dedup, 250..300);
    dedup.flush(300, Micros(0)).unwrap();
    assert_eq!(dedup.covered(), 200);
    let keys: Vec<Key> = (200..250).map(|id| key(&dedup, id)).collect();
    dedup.confirm(slow, &keys);
    drop(dedup.begin(250)); // refused
    dedup.flush(300, Micros(0)).unwrap();
    assert_eq!(dedup.covered(), 300);
    assert!((0..300).all(|id| known(&dedup, id)));
}

#[test]
fn the_oldest_ids_go_by_number_and_by_age_and_never_more_than_that() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    for part in 0..100 {
        remember(&dedup, part * 500..(part + 1) * 500);
        dedup.flush((part + 1) * 500, Micros(0)).unwrap();
        assert!(dedup.len() <= 10_000 + 2_500, "{}", dedup.len());
        let least = ((part + 1) * 500).saturating_sub(10_000);
        assert!((least..(part + 1) * 500).step_by(97).all(|id| known(&dedup, id)));
    }
    assert!(!known(&dedup, 0));
    remember(&dedup, 50_000..50_500);
    dedup.flush(50_500, Micros(3_600_000_001)).unwrap();
    assert_eq!(dedup.len(), 500, "the others are older than an hour");
    assert_eq!(files(directory.path()).len(), 1);
}

#[test]
fn a_changed_byte_is_told_with_its_file_or_changes_no_answer() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    remember(&dedup, 0..300);
    dedup.flush(300, Micros(0)).unwrap();
    let file = files(directory.path()).remove(0);
    let bytes = fs::read(&file).unwrap();
    drop(dedup);
    for at in (0..bytes.len()).step_by(11) {
        let mut changed = bytes.clone();
        changed[at] ^= 4;
        fs::write(&file, changed).unwrap();
        let dedup = match Dedup::open(directory.path(), &config()) {
            Ok(dedup) => dedup,
            Err(DedupError::Corrupt { file: told, position }) => {
                assert!(told == file && position <= at as u64 + 64, "{at}");
                continue;
            }
            Err(other) => panic!("{at}: {other}"),
        };
        for id in 0..300 {
            match dedup.known(&[key(&dedup, id)]) {
                Ok(known) => assert!(known[0], "{at}: id {id}"),
                Err(DedupError::Corrupt { file: told, position }) => assert!(told == file && position <= at as u64),
                Err(other) => panic!("{at}: {other}"),
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Remember(Vec<u16>),
    Flush,
    /// All that no file covers is read from the log again.
    Restart,
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]
    #[test]
    fn after_any_steps_exactly_the_remembered_ids_are_known(
        steps in proptest::collection::vec(
            prop_oneof![
                4 => proptest::collection::vec(0..2_000_u16, 1..80).prop_map(Step::Remember),
                2 => Just(Step::Flush),
                1 => Just(Step::Restart),
            ],
            1..40,
        ),
    ) {
        let directory = TempDir::new().unwrap();
        let mut dedup = open(directory.path());
        let mut log: Vec<u64> = Vec::new();
        for step in steps {
            match step {
                Step::Remember(ids) => {
                    let ticket = dedup.begin(log.len() as u64);
                    let keys: Vec<Key> = ids.iter().map(|id| key(&dedup, u64::from(*id))).collect();
                    log.extend(ids.iter().map(|id| u64::from(*id)));
                    dedup.confirm(ticket, &keys);
                }
                Step::Flush => dedup.flush(log.len() as u64, Micros(0)).unwrap(),
                Step::Restart => {
                    drop(dedup);
                    dedup = open(directory.path());
                    let again: Vec<Key> = log[dedup.covered() as usize..].iter().map(|id| key(&dedup, *id)).collect();
                    dedup.confirm(dedup.begin(log.len() as u64), &again);
                }
            }
            let remembered: HashSet<u64> = log.iter().copied().collect();
            for id in 0..2_000 {
                prop_assert_eq!(known(&dedup, id), remembered.contains(&id), "id {}", id);
            }
        }
    }
}

#[test]
fn without_the_key_that_its_files_were_made_with_the_index_is_refused() {
    let directory = TempDir::new().unwrap();
    let dedup = open(directory.path());
    remember(&dedup, 0..50);
    dedup.flush(50, Micros(1)).unwrap();
    drop(dedup);
    let secret = directory.path().join(SECRET_FILE);
    let whole = fs::read(&secret).unwrap();
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 4;
        fs::write(&secret, changed).unwrap();
        assert!(Dedup::open(directory.path(), &config()).is_err(), "byte {at}");
    }
    fs::remove_file(&secret).unwrap();
    assert!(Dedup::open(directory.path(), &config()).is_err(), "another key would take each id for a new one");
    fs::write(&secret, &whole).unwrap();
    assert!(known(&open(directory.path()), 7));
    fs::write(&secret, &whole[..16]).unwrap();
    assert!(known(&open(directory.path()), 7), "as the first version wrote it");
}
