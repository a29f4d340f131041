//! History as it is kept at hand: final rows of the store in blocks of event time. What has ended hardly changes, so of
//! a chart that is asked for again and again all but the newest block is in the cache, whoever asks and for which key.

use crate::fault::Fault;
use crate::history::has_keys;
use cache::{Ask, Cache, Class, Kept, Tag};
use engine::event::{ItemName, Micros, WorkspaceId};
use engine::window::Window;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use sql::store::{FinalRow, Place, RowQuery, Step, Store, cut_rows};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Windows of one key that start in a block.
const WINDOWS: i64 = 64;
/// Rows of a block. Where there are more, those of the keys that are asked for are a block of their own.
const ROWS_MAX: usize = 2_048;
/// Blocks of a page; one that may need more is read as it is asked for.
const BLOCKS_MAX: i64 = 16;
/// Blocks of one page that are read at the same time.
const AT_ONCE: usize = 4;
/// Blocks that are named one by one when old rows are deleted; of more, all of the metric are forgotten.
const PRUNED_MAX: i64 = 256;

/// How long the blocks of a metric are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Width(i64);

impl Width {
    pub(crate) fn of(window: Window) -> Width {
        Width(window.slide().0.saturating_mul(WINDOWS).max(1))
    }

    /// The number of the block that holds this instant.
    fn block(self, at: Micros) -> i64 {
        at.0.div_euclid(self.0)
    }

    fn start(self, block: i64) -> Micros {
        Micros(block.saturating_mul(self.0))
    }
}

fn of_metric(ws: &WorkspaceId, metric: &ItemName) -> Tag {
    Tag::new(&[ws, &"metrics", metric])
}

/// What reaches up to the newest rows.
fn of_tail(ws: &WorkspaceId, metric: &ItemName) -> Tag {
    Tag::new(&[ws, &"metrics", metric, &"tail"])
}

fn of_block(ws: &WorkspaceId, metric: &ItemName, block: i64) -> Tag {
    Tag::new(&[ws, &"metrics", metric, &block])
}

/// Everything of a workspace.
pub(crate) fn of_workspace(ws: &WorkspaceId) -> Tag {
    Tag::new(&[ws])
}

/// A metric was removed or defined anew, or much of it deleted.
pub(crate) fn forget(cache: &Cache, ws: &WorkspaceId, metric: &ItemName) {
    cache.changed(&[of_metric(ws, metric)]);
}

/// What a commit of these rows changes, where `width` is that of a metric; without one, all of the metric.
pub(crate) fn changed_by(ws: &WorkspaceId, rows: &[FinalRow], width: impl Fn(&ItemName) -> Option<Width>) -> Vec<Tag> {
    let mut blocks: BTreeSet<(&ItemName, Option<i64>)> = BTreeSet::new();
    for row in rows {
        blocks.insert((&row.metric, width(&row.metric).map(|width| width.block(row.window_start))));
    }
    let metrics: BTreeSet<&ItemName> = blocks.iter().map(|(metric, _)| *metric).collect();
    let tails = metrics.into_iter().map(|metric| of_tail(ws, metric));
    let blocks = blocks.iter().map(|(metric, block)| match block {
        Some(block) => of_block(ws, metric, *block),
        None => of_metric(ws, metric),
    });
    tails.chain(blocks).collect()
}

/// Rows that ended at `until` or earlier were deleted, after those up to `before` had been.
pub(crate) fn pruned(
    cache: &Cache,
    ws: &WorkspaceId,
    metric: &ItemName,
    window: Window,
    before: Option<Micros>,
    until: Micros,
) {
    let width = Width::of(window);
    let first = match (before, window) {
        (None, _) | (_, Window::Session { .. }) => return forget(cache, ws, metric),
        (Some(before), _) => width.block(before.minus(window.size())),
    };
    let last = width.block(until);
    if last - first >= PRUNED_MAX {
        return forget(cache, ws, metric);
    }
    let blocks = (first..=last).map(|block| of_block(ws, metric, block));
    cache.changed(&blocks.chain([of_tail(ws, metric)]).collect::<Vec<_>>());
}

/// Rows of the store, in the order of their places.
#[derive(Serialize, Deserialize)]
struct Rows {
    rows: Vec<FinalRow>,
    next: Option<String>,
    /// There are more than a block holds, which are not here.
    too_many: bool,
}

impl Kept for Rows {
    fn bytes(&self) -> usize {
        let bytes = |row: &FinalRow| size_of::<FinalRow>() + row.key.len() + row.row.len() + 16;
        self.rows.iter().map(bytes).sum::<usize>() + size_of::<Rows>()
    }

    fn encode(&self) -> Option<Vec<u8>> {
        serde_json::to_vec(self).ok()
    }

    fn decode(bytes: &[u8]) -> Option<Rows> {
        serde_json::from_slice(bytes).ok()
    }
}

/// Where the rows of one metric are read.
pub(crate) struct Past<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) store: &'a Store,
    pub(crate) workspace: &'a WorkspaceId,
    pub(crate) metric: &'a ItemName,
    /// Nothing where it cannot be planned, and has only rows of before.
    pub(crate) window: Option<Window>,
    /// How far the metric has come: no final row starts later, but for those of an earlier life of it.
    pub(crate) frontier: Option<Micros>,
}

impl Past<'_> {
    /// The page that the store has, as [`Store::rows`] or [`Store::samples`] give it.
    pub(crate) async fn page(
        &self,
        wanted: &RowQuery,
        step: Option<Step>,
    ) -> Result<(Vec<FinalRow>, Option<String>), Fault> {
        if step.is_none()
            && let Some(page) = self.page_of_blocks(wanted).await?
        {
            return Ok(page);
        }
        if let Some(step) = step.filter(|_| self.store.has_rollups()) {
            // they change by themselves, and are quick
            return Ok(self.store.samples(self.workspace, self.metric, wanted, step).await?);
        }
        let question = format!("page {step:?} {wanted:?}");
        let tags = vec![of_workspace(self.workspace), self.tag(), of_tail(self.workspace, self.metric)];
        let load = async || {
            let (rows, next) = match step {
                None => self.store.rows(self.workspace, self.metric, wanted).await?,
                Some(step) => self.store.samples(self.workspace, self.metric, wanted, step).await?,
            };
            Ok::<_, Fault>(Rows { rows, next, too_many: false })
        };
        let page = self.get(tags, question, load).await?;
        Ok((page.rows.clone(), page.next.clone()))
    }

    fn tag(&self) -> Tag {
        of_metric(self.workspace, self.metric)
    }

    async fn get(
        &self,
        tags: Vec<Tag>,
        question: String,
        load: impl AsyncFnOnce() -> Result<Rows, Fault>,
    ) -> Result<Arc<Rows>, Fault> {
        let ask = Ask { class: Class::History, tags, question: format!("{} {question}", self.metric) };
        self.cache.get(&ask, load).await.map_err(Arc::unwrap_or_clone)
    }

    /// Nothing where it begins nowhere, or would take too many blocks or too large ones.
    async fn page_of_blocks(&self, wanted: &RowQuery) -> Result<Option<(Vec<FinalRow>, Option<String>)>, Fault> {
        let after = wanted.position(None)?;
        let from = wanted.from.max(after.as_ref().map(Place::start));
        let (Some(from), Some(frontier), Some(window)) = (from, self.frontier, self.window) else { return Ok(None) };
        let (limit, width) = (wanted.limit.max(1), Width::of(window));
        let first = width.block(from);
        // the last one has no end
        let last = width.block(frontier).max(first);
        let end = wanted.to.map_or(last, |to| width.block(to).clamp(first, last));
        if end - first >= BLOCKS_MAX {
            return Ok(None);
        }
        let read = |block| self.block(width, block, block == last, &wanted.keys);
        let mut blocks = futures::stream::iter(first..=end).map(read).buffered(AT_ONCE);
        let mut rows = Vec::new();
        while let Some(block) = blocks.next().await {
            let Some(block) = block? else { return Ok(None) };
            let mut fits: HashMap<&str, bool> = HashMap::new();
            let on_page = block.rows.iter().filter(|row| {
                row.window_start >= from
                    && wanted.to.is_none_or(|to| row.window_start < to)
                    && after.as_ref().is_none_or(|after| Place::of(row, None) > *after)
                    && *fits.entry(&row.key).or_insert_with(|| has_keys(&row.key, &wanted.keys))
            });
            rows.extend(on_page.cloned());
            if rows.len() > limit {
                break;
            }
        }
        Ok(Some(cut_rows(rows, limit)))
    }

    /// A block with all its rows, or with all of these keys; nothing where even those are too many.
    async fn block(
        &self,
        width: Width,
        block: i64,
        is_open: bool,
        keys: &[(String, Option<String>)],
    ) -> Result<Option<Arc<Rows>>, Fault> {
        let all = self.rows_of(width, block, is_open, &[]).await?;
        if !all.too_many {
            return Ok(Some(all));
        }
        if keys.is_empty() {
            return Ok(None);
        }
        let own = self.rows_of(width, block, is_open, keys).await?;
        Ok((!own.too_many).then_some(own))
    }

    async fn rows_of(
        &self,
        width: Width,
        block: i64,
        is_open: bool,
        keys: &[(String, Option<String>)],
    ) -> Result<Arc<Rows>, Fault> {
        let newest =
            if is_open { of_tail(self.workspace, self.metric) } else { of_block(self.workspace, self.metric, block) };
        let tags = vec![of_workspace(self.workspace), self.tag(), newest];
        let question = format!("block {} {block} {is_open} {keys:?}", width.0);
        let load = async || {
            let wanted = RowQuery {
                from: Some(width.start(block)),
                to: (!is_open).then(|| width.start(block + 1)),
                limit: ROWS_MAX,
                after: None,
                keys: keys.to_vec(),
            };
            let (rows, next) = self.store.rows(self.workspace, self.metric, &wanted).await?;
            let too_many = next.is_some();
            Ok::<_, Fault>(Rows { rows: if too_many { Vec::new() } else { rows }, next: None, too_many })
        };
        self.get(tags, question, load).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::event::Span;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use sql::store::{Commit, User, Workspace};
    use tempfile::TempDir;

    const MINUTE: i64 = 60_000_000;
    const START: i64 = 1_767_225_600_000_000;

    struct World {
        cache: Arc<Cache>,
        store: Store,
        ws: WorkspaceId,
        metric: ItemName,
        _dir: TempDir,
    }

    impl World {
        async fn new() -> World {
            let dir = TempDir::new().unwrap();
            let store = Store::open(&format!("sqlite:{}/store.db", dir.path().display())).await.unwrap();
            let ann = User {
                id: "ann".into(),
                email: "ann@example.com".into(),
                password_hash: "hash".into(),
                admin: false,
                created_at: Micros(1),
            };
            store.create_user(&ann).await.unwrap();
            let ws: WorkspaceId = "acme".parse().unwrap();
            let (name, tier) = ("Acme".to_owned(), "standard".to_owned());
            let workspace = Workspace { id: ws.clone(), name, pack: None, tier, created_at: Micros(1) };
            store.create_workspace(&workspace, "ann").await.unwrap();
            let metric: ItemName = "volume".parse().unwrap();
            store.put_metric(&ws, &metric, &serde_json::json!({}), 0, Micros(1)).await.unwrap();
            World { cache: Cache::new(&cache::Config::default()), store, ws, metric, _dir: dir }
        }

        fn past(&self, window: Window, frontier: Option<Micros>) -> Past<'_> {
            let World { cache, store, ws, metric, .. } = self;
            Past { cache, store, workspace: ws, metric, window: Some(window), frontier }
        }

        async fn commit(&self, rows: Vec<FinalRow>, width: Width) {
            let changed = changed_by(&self.ws, &rows, |_| Some(width));
            let workspace = self.ws.clone();
            let commit = Commit {
                workspace,
                offset: 0,
                state: None,
                rows,
                alerts: Vec::new(),
                notices: Vec::new(),
                repeats: false,
                dead_letters: Vec::new(),
                rules: Vec::new(),
            };
            self.store.commit(&[commit]).await.unwrap();
            self.cache.changed(&changed);
        }

        fn row(&self, minute: i64, key: usize, revision: i64) -> FinalRow {
            FinalRow {
                metric: self.metric.clone(),
                window_start: Micros(START + minute * MINUTE),
                window_end: Micros(START + (minute + 1) * MINUTE),
                key: format!(r#"{{"symbol":"S{key}"}}"#),
                revision,
                row: format!(r#"{{"revision":{revision}}}"#),
            }
        }
    }

    fn asked(random: &mut StdRng, minutes: i64) -> RowQuery {
        let mut at = || Micros(START + random.random_range(-30..minutes + 30) * MINUTE + random.random_range(-1..2));
        let (from, to) = (at(), at());
        RowQuery {
            from: random.random_bool(0.8).then_some(from),
            to: random.random_bool(0.4).then_some(to),
            limit: [1, 7, 100, 5_000][random.random_range(0..4_usize)],
            after: None,
            keys: match random.random_bool(0.5) {
                true => vec![("symbol".to_owned(), Some(format!("S{}", random.random_range(0..5))))],
                false => Vec::new(),
            },
        }
    }

    /// Many pages, read through, while rows come and old ones are corrected: what the store says is what is told.
    async fn check(window: Window, keys: usize, seed: u64) {
        let (world, mut random) = (World::new().await, StdRng::seed_from_u64(seed));
        let (width, mut minutes) = (Width::of(window), 0);
        for _ in 0..12 {
            let next = minutes + random.random_range(1..120);
            let mut rows: Vec<FinalRow> = Vec::new();
            for minute in minutes..next {
                rows.extend((0..keys).filter(|_| random.random_bool(0.9)).map(|key| world.row(minute, key, 0)));
            }
            if minutes > 0 {
                let late = random.random_range(0..minutes);
                rows.push(world.row(late, 0, 1));
            }
            minutes = next;
            world.commit(rows, width).await;
            let past = world.past(window, Some(Micros(START + minutes * MINUTE)));
            for _ in 0..20 {
                let mut wanted = asked(&mut random, minutes);
                for _ in 0..3 {
                    let told = past.page(&wanted, None).await.unwrap();
                    let stored = world.store.rows(&world.ws, &world.metric, &wanted).await.unwrap();
                    assert_eq!(told, stored, "{wanted:?}");
                    match stored.1 {
                        Some(next) => wanted.after = Some(next),
                        None => break,
                    }
                }
            }
        }
        let warmth = world.cache.warmth(Class::History);
        assert!(warmth.memory > 0 && warmth.loaded > 0, "{warmth:?}");
    }

    #[tokio::test]
    async fn a_page_put_together_page_of_blocks_is_that_of_the_store_while_rows_come_and_are_corrected() {
        for seed in 0..3 {
            check(Window::tumble(Span(MINUTE)).unwrap(), 5, seed).await;
            check(Window::hop(Span(MINUTE / 6), Span(MINUTE)).unwrap(), 5, seed).await;
        }
        // more than a block holds: those of the key that is asked for, or as the store pages them
        check(Window::tumble(Span(MINUTE)).unwrap(), 40, 7).await;
    }

    #[tokio::test]
    async fn a_commit_of_new_rows_leaves_the_blocks_before_them_in_the_cache() {
        let (world, window) = (World::new().await, Window::tumble(Span(MINUTE)).unwrap());
        let width = Width::of(window);
        let rows = (0..240).flat_map(|minute| (0..4).map(move |key| (minute, key)));
        world.commit(rows.map(|(minute, key)| world.row(minute, key, 0)).collect(), width).await;
        let read = async |minute: i64| {
            let past = world.past(window, Some(Micros(START + minute * MINUTE)));
            for key in 0..4 {
                let keys = vec![("symbol".to_owned(), Some(format!("S{key}")))];
                let from = Some(Micros(START + (minute - 240) * MINUTE));
                let wanted = RowQuery { from, limit: 500, keys, ..RowQuery::default() };
                assert_eq!(past.page(&wanted, None).await.unwrap().0.len(), 240);
            }
            world.cache.warmth(Class::History)
        };
        let cold = read(240).await;
        for minute in 240..250 {
            world.commit((0..4).map(|key| world.row(minute, key, 0)).collect(), width).await;
            let before = world.cache.warmth(Class::History);
            let after = read(minute + 1).await;
            assert!(after.loaded - before.loaded <= 2, "minute {minute}: {before:?} {after:?}");
        }
        println!("blocks read for a chart of 240 windows and 4 keys: {cold:?}");
        assert!(cold.loaded <= 5 && cold.memory >= 12, "{cold:?}");
    }

    #[tokio::test]
    async fn rows_that_were_deleted_are_gone_from_their_blocks() {
        let (world, window) = (World::new().await, Window::tumble(Span(MINUTE)).unwrap());
        let rows = (0..300).map(|minute| world.row(minute, 0, 0)).collect();
        world.commit(rows, Width::of(window)).await;
        let wanted = RowQuery { from: Some(Micros(START)), limit: 1_000, ..RowQuery::default() };
        let mut before = None;
        for minute in [0, 10, 70, 71, 200, 299] {
            let until = Micros(START + minute * MINUTE);
            if world.store.prune_rows(&world.ws, &world.metric, until).await.unwrap() > 0 {
                pruned(&world.cache, &world.ws, &world.metric, window, before, until);
            }
            before = Some(until);
            let past = world.past(window, Some(Micros(START + 300 * MINUTE)));
            assert_eq!(past.page(&wanted, None).await.unwrap().0.len() as i64, 300 - minute);
        }
    }
}
