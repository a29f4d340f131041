//! Relations joined to a metric's stream: reference tables as of an event's time, and one other stream within the same
//! window or a band of time.
//!
//! Joined rows bear the event time of the left stream's event and then go into the metric as if they were its stream.
//! Two streams: a pair counts when both events are there before the left one's window is beyond its allowed lateness,
//! by the watermark of the joined rows, which follows the slower stream. So whether a pair counts depends on the order
//! of the log alone, as for a metric over one stream.
//!
//! A left join lets a left event go without a match once the watermark says that none will come. Where one comes after
//! all, the pane of the left event is computed anew from the events of both streams, which are kept for the allowed
//! lateness anyway, and corrects final rows like any late event. Tables that are joined too are then seen as they are
//! known by then. Sessions have no panes, and an open one outlives the events that began it. So there a right event is
//! late as a whole when it matches a left one that went without a match: it makes no pair and is a dead letter, and the
//! rows are those of the other events.

use crate::checkpoint::{Content, Draft, Pieces};
use crate::event::{Micros, Span, StreamName};
use crate::key::{KeyId, KeyTable, batch_of};
use crate::limit::StateSize;
use crate::metric::{Metric, PANES, REVISIONS, RestoreError, Rows, Timing, times};
use crate::program::Program;
use crate::reference::{Tables, evaluate};
use crate::shared::Shared;
use crate::window::Window;
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, NullArray, RecordBatch, UInt32Array, new_null_array,
};
use arrow::compute;
use arrow::datatypes::{DataType, Field, FieldRef, Int64Type, Schema, SchemaRef, TimestampMicrosecondType};
use arrow::row::{RowConverter, SortField};
use datafusion_common::{DataFusionError, Result, exec_err};
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::utils::collect_columns;
use hashbrown::{HashMap, HashSet};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

/// What becomes of a row of the left side without a match.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JoinKind {
    /// It is left out.
    Inner,
    /// It stays, with NULL in the columns of the right side.
    Left,
}

/// Which events of two streams may be a pair at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Near {
    /// Those in the same tumbling window of this size.
    Window { size: Span },
    /// Those of which the right one is `low` to `high` microseconds after the left one, both included.
    Band { low: i64, high: i64 },
}

impl Near {
    /// Event times of right events that may match a left one at `at`, both ends included.
    fn right_of(self, at: Micros) -> (Micros, Micros) {
        match self {
            Near::Window { size } => window_of(at, size),
            Near::Band { low, high } => (shifted(at, low), shifted(at, high)),
        }
    }

    /// Event times of left events that may match a right one at `at`, both ends included.
    fn left_of(self, at: Micros) -> (Micros, Micros) {
        match self {
            Near::Window { size } => window_of(at, size),
            Near::Band { low, high } => (shifted(at, high.saturating_neg()), shifted(at, low.saturating_neg())),
        }
    }

    /// The event time that joined rows have reached when the streams have reached `left` and `right`.
    pub(crate) fn frontier(self, left: Micros, right: Micros) -> Micros {
        left.min(self.reached_by_right(right))
    }

    fn reached_by_right(self, right: Micros) -> Micros {
        match self {
            Near::Window { .. } => right,
            Near::Band { high, .. } => shifted(right, high.saturating_neg()),
        }
    }

    /// What the right stream must have reached for joined rows to reach `joined`.
    pub(crate) fn right_for(self, joined: Micros) -> Micros {
        match self {
            Near::Window { .. } => joined,
            Near::Band { high, .. } => shifted(joined, high),
        }
    }

    /// Left events before this have all their matches, but for late ones, once the watermark of joined rows is at
    /// `watermark`.
    fn settled(self, watermark: Micros) -> Micros {
        match self {
            Near::Window { size } => watermark.pane_start(size),
            Near::Band { .. } => watermark,
        }
    }
}

fn shifted(at: Micros, by: i64) -> Micros {
    Micros(at.0.saturating_add(by))
}

fn window_of(at: Micros, size: Span) -> (Micros, Micros) {
    let start = at.pane_start(size);
    (start, shifted(start, size.0 - 1))
}

/// One relation joined to what stands left of it.
#[derive(Debug)]
pub struct Join {
    /// A reference table or a stream.
    pub with: StreamName,
    /// Its columns; a stream's begin with `ts`.
    pub right: SchemaRef,
    pub kind: JoinKind,
    /// The compared expressions, over all columns left of this relation and over its own, type by type the same.
    pub left_keys: Vec<Arc<dyn PhysicalExpr>>,
    pub right_keys: Vec<Arc<dyn PhysicalExpr>>,
    /// What else ON asks for, over the columns of both sides; of a stream only `filters`.
    pub residual: Option<Arc<dyn PhysicalExpr>>,
    /// For a stream, which is the first relation joined: `None` for a table.
    pub near: Option<Near>,
    /// For a stream: what the left and the right events have to fulfil to take part.
    pub filters: [Option<Arc<dyn PhysicalExpr>>; 2],
}

/// All relations joined to a metric's stream.
#[derive(Debug)]
pub struct Joins {
    /// Columns of the metric's stream.
    pub stream: SchemaRef,
    pub steps: Vec<Join>,
    /// The columns of a joined row: the stream's, two for the window's bounds (never filled), those of each relation,
    /// and whether all inner joins matched.
    schema: SchemaRef,
    /// Where each relation's columns begin.
    starts: Vec<usize>,
    /// Which columns anything asks for; the others are of type NULL in `pruned`.
    needed: Vec<bool>,
    pruned: SchemaRef,
    /// For each step the name of its index in the table.
    indexes: Vec<String>,
}

impl Joins {
    /// `stream`: the columns of the metric's own stream.
    pub fn new(stream: SchemaRef, steps: Vec<Join>) -> Joins {
        let loose = |field: &FieldRef| Arc::new(field.as_ref().clone().with_nullable(true));
        let bound = Arc::new(Field::new("bound", DataType::Null, true));
        let mut fields: Vec<FieldRef> = stream.fields().iter().map(loose).collect();
        fields[0] = stream.fields()[0].clone();
        fields.extend([bound.clone(), bound]);
        let mut starts = Vec::new();
        for step in &steps {
            starts.push(fields.len());
            fields.extend(step.right.fields().iter().map(loose));
        }
        fields.push(Arc::new(Field::new("matched", DataType::Boolean, false)));
        let indexes = steps.iter().map(index_name).collect();
        let schema = Arc::new(Schema::new(fields));
        let needed = vec![false; schema.fields().len()];
        Joins { stream, steps, pruned: schema.clone(), schema, starts, needed, indexes }
    }

    /// The columns of a joined row, as the metric's expressions see them.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The place of the column that says whether all inner joins matched.
    pub fn matched(&self) -> usize {
        self.schema.fields().len() - 1
    }

    /// Tells which expressions will be asked of joined rows; columns nobody asks for are not carried along.
    pub(crate) fn prune(&mut self, asked: &[Arc<dyn PhysicalExpr>]) {
        let of_steps = self.steps.iter().flat_map(|step| step.left_keys.iter().chain(&step.residual));
        for column in asked.iter().chain(of_steps).flat_map(collect_columns) {
            self.needed[column.index()] = true;
        }
        (self.needed[0], *self.needed.last_mut().expect("there is `matched`")) = (true, true);
        let fields = self.schema.fields().iter().zip(&self.needed).map(|(field, needed)| match needed {
            true => field.clone(),
            false => Arc::new(Field::new(field.name(), DataType::Null, true)),
        });
        self.pruned = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    }

    /// The other stream, where there is one.
    pub(crate) fn other(&self) -> Option<(&StreamName, Near)> {
        let first = self.steps.first()?;
        Some((&first.with, first.near?))
    }

    pub(crate) fn tables(&self) -> impl Iterator<Item = &StreamName> {
        self.steps.iter().filter(|step| step.near.is_none()).map(|step| &step.with)
    }

    /// Makes sure that the tables find rows by what is compared.
    pub(crate) fn prepare(&self, tables: &mut Tables) -> Result<()> {
        for (step, index) in self.steps.iter().zip(&self.indexes).filter(|(step, _)| step.near.is_none()) {
            tables.ensure_index(&step.with, index, step.right_keys.clone(), &step.right)?;
        }
        Ok(())
    }

    /// Adds the names of the indexes in use.
    pub(crate) fn used_indexes(&self, used: &mut BTreeMap<StreamName, BTreeSet<String>>) {
        for (step, index) in self.steps.iter().zip(&self.indexes).filter(|(step, _)| step.near.is_none()) {
            used.entry(step.with.clone()).or_default().insert(index.clone());
        }
    }

    /// The stream's own columns at their places; those nobody asks for are NULL.
    fn own_columns(&self, batch: &RecordBatch) -> Vec<ArrayRef> {
        let rows = batch.num_rows();
        let own = self.stream.fields().iter().enumerate().map(|(at, field)| match self.needed[at] {
            true => column_of(batch, field),
            false => nothing(rows),
        });
        own.chain([nothing(rows), nothing(rows)]).collect()
    }

    /// Joins the tables, from step `from` on, to rows of the columns before. Every row stays, also one without a match,
    /// which is then marked, so that the metric sees the event time of all; `origin` tells which row each one was.
    fn join_tables(&self, mut rows: Wide, from: usize, tables: &Tables) -> Result<Wide> {
        for (at, step) in self.steps.iter().enumerate().skip(from) {
            let left = rows.batch(&self.pruned)?;
            let keys = evaluate(&step.left_keys, &left)?;
            let ts = rows.columns[0].as_primitive::<TimestampMicrosecondType>().values();
            let active = |row: usize| rows.matched.as_ref().is_none_or(|matched| matched[row]);
            let found = tables.probe(&step.with, &self.indexes[at], &keys, ts, active, &step.right)?;
            let (mut left_rows, mut right_rows) = (found.left, found.right);
            let start = self.starts[at];
            let right_columns: Vec<ArrayRef> = found
                .rows
                .columns()
                .iter()
                .enumerate()
                .map(
                    |(at, column)| {
                        if self.needed[start + at] { column.clone() } else { nothing(found.rows.num_rows()) }
                    },
                )
                .collect();
            if let Some(residual) = &step.residual {
                let mut columns = take_all(&rows.columns, &left_rows.clone().into())?;
                columns.extend(take_all(&right_columns, &right_rows.clone().into())?);
                let pairs = Wide::new(columns, left_rows.len()).batch(&self.pruned)?;
                let keep = residual.evaluate(&pairs)?.into_array(pairs.num_rows())?;
                let keep = keep.as_boolean();
                let kept = |row: &usize| keep.is_valid(*row) && keep.value(*row);
                let kept: Vec<usize> = (0..keep.len()).filter(kept).collect();
                left_rows = kept.iter().map(|&row| left_rows[row]).collect();
                right_rows = kept.iter().map(|&row| right_rows[row]).collect();
            }
            rows = rows.with_matches(&left_rows, &right_rows, &right_columns, step.kind)?;
        }
        Ok(rows)
    }
}

/// Names what a table is indexed by: the compared expressions and the columns they are written against.
fn index_name(step: &Join) -> String {
    let mut name = String::new();
    for key in &step.right_keys {
        _ = write!(name, "{key}, "); // writing to a String cannot fail
    }
    for field in step.right.fields() {
        _ = write!(name, "{} {}, ", field.name(), field.data_type());
    }
    name
}

fn nothing(rows: usize) -> ArrayRef {
    Arc::new(NullArray::new(rows))
}

/// A column by name; NULL where the batch, older than its stream's schema, lacks it.
fn column_of(batch: &RecordBatch, field: &FieldRef) -> ArrayRef {
    match batch.column_by_name(field.name()) {
        Some(column) if column.data_type() == field.data_type() => column.clone(),
        _ => new_null_array(field.data_type(), batch.num_rows()),
    }
}

fn take_all(columns: &[ArrayRef], rows: &UInt32Array) -> Result<Vec<ArrayRef>> {
    let take = |column: &ArrayRef| match column.data_type() {
        DataType::Null => Ok(nothing(rows.len())),
        _ => compute::take(column, rows, None),
    };
    Ok(columns.iter().map(take).collect::<Result<_, _>>()?)
}

/// The first columns of joined rows.
struct Wide {
    columns: Vec<ArrayRef>,
    rows: usize,
    /// For each row the row it came from; `None`: the same.
    origin: Option<Vec<u32>>,
    /// Whether all inner joins matched; `None`: yes.
    matched: Option<Vec<bool>>,
}

impl Wide {
    fn new(columns: Vec<ArrayRef>, rows: usize) -> Wide {
        Wide { columns, rows, origin: None, matched: None }
    }

    fn batch(&self, schema: &SchemaRef) -> Result<RecordBatch> {
        let width = self.columns.len();
        let schema = if width == schema.fields().len() {
            schema.clone()
        } else {
            Arc::new(Schema::new(schema.fields()[..width].to_vec()))
        };
        batch_of(schema, self.columns.clone(), self.rows)
    }

    /// The whole joined rows.
    fn finish(mut self, joins: &Joins) -> Result<(RecordBatch, Option<Vec<u32>>)> {
        let matched = self.matched.take().unwrap_or_else(|| vec![true; self.rows]);
        self.columns.push(Arc::new(BooleanArray::from(matched)));
        Ok((self.batch(&joins.pruned)?, self.origin))
    }

    /// Each row once for each of its matches; a row without one once, with NULL.
    fn with_matches(self, left: &[u32], right: &[u32], columns: &[ArrayRef], kind: JoinKind) -> Result<Wide> {
        let each_once = left.len() == self.rows && left.iter().enumerate().all(|(at, row)| at == *row as usize);
        if each_once {
            let mut joined = self;
            joined.columns.extend(take_all(columns, &right.to_vec().into())?);
            return Ok(joined);
        }
        let (mut rows, mut matches) = (Vec::new(), Vec::new());
        let mut matched = Vec::new();
        let mut next = 0;
        for row in 0..self.rows as u32 {
            let was = self.matched.as_ref().is_none_or(|matched| matched[row as usize]);
            let first = next;
            while left.get(next) == Some(&row) {
                rows.push(row);
                matches.push(Some(right[next]));
                matched.push(was);
                next += 1;
            }
            if next == first {
                rows.push(row);
                matches.push(None);
                matched.push(was && kind == JoinKind::Left);
            }
        }
        let count = rows.len();
        let origin = match &self.origin {
            Some(origin) => rows.iter().map(|&row| origin[row as usize]).collect(),
            None => rows.clone(),
        };
        let mut all = take_all(&self.columns, &rows.into())?;
        all.extend(take_all(columns, &UInt32Array::from(matches))?);
        Ok(Wide { columns: all, rows: count, origin: Some(origin), matched: Some(matched) })
    }
}

/// Events that tables are joined to at once, which bounds the memory that a step takes.
pub(crate) const ROWS_AT_ONCE: usize = 2_048;

/// The most matches that the events of a batch may have on average: a join with more is one by too few columns, and
/// would take the whole machine for itself.
pub(crate) const MATCHES_MOST: usize = 1_000;

/// Pairs of two streams that go into the metric at once.
const PAIRS_AT_ONCE: usize = 65_536;

/// A metric over events that reference tables or another stream are joined to.
pub struct Joined {
    metric: Metric,
    streams: Option<StreamJoin>,
    /// Rows that went into the metric since somebody asked.
    rows: usize,
    /// The most state it may hold in the middle of a batch.
    most: StateSize,
}

impl Joined {
    pub(crate) fn new(program: Arc<Program>, timing: Timing, most: StateSize) -> Result<Joined> {
        Ok(Joined { streams: StreamJoin::new(&program, most)?, metric: Metric::new(program, timing)?, rows: 0, most })
    }

    /// The same metric without state.
    pub(crate) fn emptied(&self) -> Result<Joined> {
        Joined::new(self.metric.program().clone(), self.metric.timing(), self.most)
    }

    /// Joined rows that went into the metric since the last call.
    pub(crate) fn take_rows(&mut self) -> usize {
        let of_streams = self.streams.as_mut().map_or(0, |join| std::mem::take(&mut join.emitted));
        of_streams + std::mem::take(&mut self.rows)
    }

    pub(crate) fn metric(&self) -> &Metric {
        &self.metric
    }

    pub(crate) fn metric_mut(&mut self) -> &mut Metric {
        &mut self.metric
    }

    /// Takes in a batch of one of its streams and closes what is due; `at` gives where each stream stood before.
    pub(crate) fn absorb(
        &mut self,
        stream: &StreamName,
        batch: &RecordBatch,
        at: impl Fn(&StreamName) -> Micros,
        tables: &Tables,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let program = self.metric.program().clone();
        let other = program.joins().and_then(|joins| joins.other());
        match (&mut self.streams, other) {
            (Some(join), Some((other, _))) => {
                let around = Around { frontiers: [at(program.stream()), at(other)], tables };
                let side = usize::from(stream != program.stream());
                join.absorb(&mut self.metric, side, batch, &around, out, dropped)
            }
            _ => {
                let mut frontier = at(stream);
                for from in (0..batch.num_rows()).step_by(ROWS_AT_ONCE) {
                    let part = batch.slice(from, ROWS_AT_ONCE.min(batch.num_rows() - from));
                    let late = dropped.len();
                    self.rows += absorb_with_tables(&mut self.metric, &part, frontier, tables, out, dropped)?;
                    dropped[late..].iter_mut().for_each(|row| *row += from as u32);
                    frontier = times(&part).iter().fold(frontier, |frontier, &at| frontier.max(Micros(at)));
                }
                self.metric.advance(frontier.minus(self.metric.timing().max_delay), out)
            }
        }
    }

    /// Closes what is due; `of` gives where each stream stands.
    pub(crate) fn advance(
        &mut self,
        of: impl Fn(&StreamName) -> Option<Micros>,
        tables: &Tables,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let Some(frontier) = self.metric.program().frontier(of) else { return Ok(()) };
        let watermark = frontier.minus(self.metric.timing().max_delay);
        match &mut self.streams {
            Some(join) => join.advance(&mut self.metric, watermark, tables, out),
            None => self.metric.advance(watermark, out),
        }
    }

    /// End of the next window that will close.
    pub(crate) fn next_end(&self) -> Option<Micros> {
        let waiting = self.streams.as_ref().and_then(StreamJoin::next_end);
        [self.metric.next_end(), waiting].into_iter().flatten().min()
    }

    /// Events that wait to be joined.
    pub(crate) fn waiting(&self) -> usize {
        self.streams.as_ref().map_or(0, StreamJoin::events)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.metric.bytes() + self.streams.as_ref().map_or(0, StreamJoin::bytes)
    }

    /// As [`Metric::save`], and the waiting events of both streams.
    pub(crate) fn save(&mut self, draft: &mut Draft) -> Result<()> {
        self.metric.save(draft)?;
        self.streams.as_mut().map_or(Ok(()), |join| join.save(draft))
    }

    /// The same metric with the state that [`Joined::save`] gave.
    pub(crate) fn restored(&self, closed: Micros, state: Pieces) -> Result<Joined, RestoreError> {
        let mut streams = StreamJoin::new(self.metric.program(), self.most)?;
        let state = state.named(match streams {
            None => &[PANES, REVISIONS],
            Some(_) => &[PANES, REVISIONS, SIDES[LEFT], SIDES[RIGHT]],
        })?;
        if let Some(join) = &mut streams {
            join.load(&state)?;
        }
        let metric = self.metric.emptied().restored(closed, &state)?;
        Ok(Joined { metric, streams, rows: 0, most: self.most })
    }
}

/// Where the streams of a join stood before a step, and the tables.
struct Around<'a> {
    frontiers: [Micros; 2],
    tables: &'a Tables,
}

/// Takes in a batch of the only stream of a metric that joins tables to it: how many joined rows that makes.
fn absorb_with_tables(
    metric: &mut Metric,
    batch: &RecordBatch,
    frontier: Micros,
    tables: &Tables,
    out: &mut Vec<Rows>,
    dropped: &mut Vec<u32>,
) -> Result<usize> {
    let program = metric.program().clone();
    let joins = program.joins().expect("called for a metric with joins");
    let rows = Wide::new(joins.own_columns(batch), batch.num_rows());
    let (rows, origin) = joins.join_tables(rows, 0, tables)?.finish(joins)?;
    let mut late = Vec::new();
    metric.absorb(&rows, frontier, &mut Shared::default(), out, &mut late)?;
    if let Some(origin) = origin {
        late.iter_mut().for_each(|row| *row = origin[*row as usize]);
        late.dedup();
    }
    dropped.extend(late);
    Ok(rows.num_rows())
}

const LEFT: usize = 0;
const RIGHT: usize = 1;

/// Parts of saved state: the events of either stream.
const SIDES: [&str; 2] = ["left", "right"];

/// An event that is kept for its matches.
struct Stored {
    ts: Micros,
    fate: Fate,
    row: Box<[u8]>,
}

/// What became of an event so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is in no joined row.
    Waiting,
    /// Of a left join: it went into the metric without a match.
    Alone,
    Matched,
}

/// The events of one stream that may still be part of a pair.
struct Side {
    /// Which columns are kept, and where they stand in a joined row.
    places: Vec<usize>,
    converter: RowConverter,
    rows: HashMap<KeyId, VecDeque<Stored>>, // each by event time, then arrival
    /// Which keys have events that are forgotten together: by the pane of the last left event they may match.
    panes: BTreeMap<Micros, HashSet<KeyId>>,
    count: usize,
    bytes: usize,
    /// Its events, or what became of them, are others than at the last checkpoint.
    changed: bool,
}

/// Bytes of a kept event beside its columns.
const STORED_BYTES: usize = size_of::<Stored>() + 32;

impl Side {
    fn new(fields: &[FieldRef], asked: impl Fn(usize) -> bool) -> Result<Side> {
        let places: Vec<usize> = (0..fields.len()).filter(|&at| asked(at)).collect();
        let sorts = places.iter().map(|&at| SortField::new(fields[at].data_type().clone())).collect();
        let converter = RowConverter::new(sorts)?;
        Ok(Side { places, converter, rows: HashMap::new(), panes: BTreeMap::new(), count: 0, bytes: 0, changed: false })
    }

    fn add(&mut self, id: KeyId, stored: Stored, pane: Micros, keys: &mut KeyTable) {
        self.changed = true;
        self.count += 1;
        self.bytes += stored.row.len() + STORED_BYTES;
        self.panes.entry(pane).or_default().insert(id);
        let rows = self.rows.entry(id).or_insert_with(|| {
            keys.hold(id);
            VecDeque::new()
        });
        let at = rows.partition_point(|other| other.ts <= stored.ts);
        rows.insert(at, stored);
    }

    /// The events of a key from `first` to `last`, each with its place among those of the key.
    fn between(&self, id: KeyId, range: (Micros, Micros)) -> impl Iterator<Item = (usize, &Stored)> {
        self.rows.get(&id).into_iter().flat_map(move |rows| {
            let places = places(rows, range);
            places.clone().zip(rows.range(places))
        })
    }

    fn between_mut(&mut self, id: KeyId, range: (Micros, Micros)) -> impl Iterator<Item = (usize, &mut Stored)> {
        self.rows.get_mut(&id).into_iter().flat_map(move |rows| {
            let places = places(rows, range);
            places.clone().zip(rows.range_mut(places))
        })
    }

    /// The columns of `rows` among those of the side; what is not kept is NULL.
    fn decode<'a>(&self, rows: impl Iterator<Item = &'a [u8]>, count: usize, width: usize) -> Result<Vec<ArrayRef>> {
        let parser = self.converter.parser();
        let mut kept = self.converter.convert_rows(rows.map(|row| parser.parse(row)))?.into_iter();
        let mut columns = vec![nothing(count); width];
        for &place in &self.places {
            columns[place] = kept.next().expect("as many columns as places");
        }
        Ok(columns)
    }
}

/// Where the events from `first` to `last` stand.
fn places(rows: &VecDeque<Stored>, (first, last): (Micros, Micros)) -> Range<usize> {
    let from = rows.partition_point(|stored| stored.ts < first);
    from..rows.partition_point(|stored| stored.ts <= last).max(from)
}

/// The state of a join of two streams.
struct StreamJoin {
    program: Arc<Program>,
    keys: KeyTable,
    sides: [Side; 2],
    /// Left events of a left join without a match so far.
    waiting: BTreeSet<(Micros, KeyId)>,
    /// Pairs, and left events without a match, that went into the metric.
    emitted: usize,
    /// The most state of join and metric in the middle of a batch.
    most: StateSize,
}

/// Pairs on their way to be joined rows, each of a row that came and an event that waited.
#[derive(Default)]
struct Pairs {
    came: Vec<u32>,
    /// Places in `found`; `None` for a row without a match.
    waited: Vec<Option<u32>>,
    /// The events that waited, each once.
    found: Vec<Box<[u8]>>,
    places: HashMap<(KeyId, usize), u32>,
}

impl Pairs {
    fn push(&mut self, row: usize, id: KeyId, place: usize, other: &Stored) {
        let Pairs { found, places, .. } = self;
        let place = *places.entry((id, place)).or_insert_with(|| {
            found.push(other.row.clone());
            (found.len() - 1) as u32
        });
        self.came.push(row as u32);
        self.waited.push(Some(place));
    }

    fn push_alone(&mut self, row: usize) {
        self.came.push(row as u32);
        self.waited.push(None);
    }
}

/// Panes that are wrong since matches came for left events that had gone without one.
#[derive(Default)]
struct Wrong {
    panes: BTreeSet<Micros>,
    /// Joined rows that belong into these panes and were not given to the metric.
    missing: Vec<RecordBatch>,
    /// Left events that are in these panes without a match.
    alone: Vec<Box<[u8]>>,
}

impl Wrong {
    fn missing_rows(&self) -> usize {
        self.missing.iter().map(RecordBatch::num_rows).sum()
    }

    /// Keeps those of `rows` that are in a wrong pane, and gives the others back.
    fn take_from(&mut self, rows: RecordBatch, width: Span) -> Result<RecordBatch> {
        if self.panes.is_empty() {
            return Ok(rows);
        }
        let is_missing = |&at: &i64| Some(self.panes.contains(&Micros(at).pane_start(width)));
        let is_missing: BooleanArray = times(&rows).iter().map(is_missing).collect();
        self.missing.push(compute::filter_record_batch(&rows, &is_missing)?);
        Ok(compute::filter_record_batch(&rows, &compute::not(&is_missing)?)?)
    }
}

impl StreamJoin {
    /// `None` for a metric without another stream.
    fn new(program: &Arc<Program>, most: StateSize) -> Result<Option<StreamJoin>> {
        let Some(joins) = program.joins().filter(|joins| joins.other().is_some()) else { return Ok(None) };
        let step = &joins.steps[0];
        let own = joins.stream.fields().len();
        let start = joins.starts[0];
        let mut asked = [joins.needed[..own].to_vec(), joins.needed[start..start + step.right.fields().len()].to_vec()];
        for (asked, keys) in asked.iter_mut().zip([&step.left_keys, &step.right_keys]) {
            keys.iter().flat_map(collect_columns).for_each(|column| asked[column.index()] = true);
        }
        let [left, right] = asked;
        let sides = [Side::new(joins.stream.fields(), |at| left[at])?, Side::new(step.right.fields(), |at| right[at])?];
        let key_fields = step
            .right_keys
            .iter()
            .enumerate()
            .map(|(at, key)| Ok(Field::new(format!("key{at}"), key.data_type(&step.right)?, true)));
        let keys = KeyTable::new(&Arc::new(Schema::new(key_fields.collect::<Result<Vec<_>>>()?)))?;
        Ok(Some(StreamJoin { program: program.clone(), keys, sides, waiting: BTreeSet::new(), emitted: 0, most }))
    }

    fn step(&self) -> (&Join, Near) {
        let step = &self.program.joins().expect("a join has its program").steps[0];
        (step, step.near.expect("the first step joins a stream"))
    }

    /// How many events wait for a match.
    fn events(&self) -> usize {
        self.sides.iter().map(|side| side.count).sum()
    }

    fn bytes(&self) -> usize {
        self.keys.bytes() + self.sides.iter().map(|side| side.bytes).sum::<usize>() + self.waiting.len() * 24
    }

    /// End of the window of the first left event that waits to become a row without a match.
    fn next_end(&self) -> Option<Micros> {
        self.waiting.first().map(|(ts, _)| self.program.window().first_end(*ts))
    }

    /// Takes in a batch of one of the two streams. Rows of it that no window takes any more are listed in `dropped`.
    fn absorb(
        &mut self,
        metric: &mut Metric,
        side: usize,
        batch: &RecordBatch,
        around: &Around<'_>,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let program = self.program.clone();
        let joins = program.joins().expect("a join has its program");
        let (step, near) = (&joins.steps[0], joins.steps[0].near.expect("the first step joins a stream"));
        let (window, timing) = (program.window(), metric.timing());
        let schema = if side == LEFT { &joins.stream } else { &step.right };
        let columns: Vec<ArrayRef> = schema.fields().iter().map(|field| column_of(batch, field)).collect();
        let loose = schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect::<Vec<_>>();
        let events = batch_of(Arc::new(Schema::new(loose)), columns, batch.num_rows())?;
        let ts = events.column(0).as_primitive::<TimestampMicrosecondType>().values().clone();
        let mut keep = vec![true; events.num_rows()];
        if let Some(filter) = &step.filters[side] {
            let mask = filter.evaluate(&events)?.into_array(events.num_rows())?;
            let mask = mask.as_boolean();
            keep.iter_mut().enumerate().for_each(|(row, keep)| *keep = mask.is_valid(row) && mask.value(row));
        }
        // whether an event is late is decided by those before it: the batch is cut where an answer depends on it
        let mut cuts: Vec<(usize, Micros)> = Vec::new();
        let mut seen = around.frontiers;
        let mut cut_at = metric.closed();
        for (row, &at) in ts.iter().enumerate() {
            let at = Micros(at);
            let watermark = near.frontier(seen[LEFT], seen[RIGHT]).minus(timing.max_delay).max(cut_at);
            let (first, last) = if side == LEFT { (at, at) } else { near.left_of(at) };
            let matters = match (window, step.kind) {
                // to a session that is final by then it does not belong, to one that is not it does
                (Window::Session { .. }, _) => first <= watermark,
                (_, JoinKind::Inner) => window.first_end(first) <= watermark,
                (_, JoinKind::Left) => first < near.settled(watermark),
            };
            if matters {
                if window.last_end(last).plus(timing.allowed_lateness) <= watermark {
                    dropped.push(row as u32);
                    keep[row] = false;
                } else if watermark > cut_at {
                    cuts.push((row, watermark));
                    cut_at = watermark;
                }
            }
            seen[side] = seen[side].max(at);
        }
        let mut from = 0;
        for (row, watermark) in cuts {
            self.absorb_part(metric, (side, &events), &keep, from..row, around.tables, out, dropped)?;
            self.advance(metric, watermark, around.tables, out)?;
            from = row;
        }
        let rest = from..events.num_rows();
        self.absorb_part(metric, (side, &events), &keep, rest, around.tables, out, dropped)?;
        let watermark = near.frontier(seen[LEFT], seen[RIGHT]).minus(timing.max_delay);
        self.advance(metric, watermark, around.tables, out)
    }

    #[expect(clippy::too_many_arguments, reason = "one call from the loop above, which has all of them in hand")]
    fn absorb_part(
        &mut self,
        metric: &mut Metric,
        (side, events): (usize, &RecordBatch),
        keep: &[bool],
        rows: Range<usize>,
        tables: &Tables,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        let chosen: Vec<u32> = rows.filter(|&row| keep[row]).map(|row| row as u32).collect();
        if chosen.is_empty() {
            return Ok(());
        }
        let events = compute::take_record_batch(events, &UInt32Array::from(chosen.clone()))?;
        let program = self.program.clone();
        let joins = program.joins().expect("a join has its program");
        let (step, near) = (&joins.steps[0], joins.steps[0].near.expect("the first step joins a stream"));
        let ts = events.column(0).as_primitive::<TimestampMicrosecondType>().values();
        let key_columns = evaluate(if side == LEFT { &step.left_keys } else { &step.right_keys }, &events)?;
        let whole = |row: usize| key_columns.iter().all(|column| column.is_valid(row));
        let mut ids = self.keys.intern(&key_columns, events.num_rows())?.into_iter();
        let kept: Vec<ArrayRef> = self.sides[side].places.iter().map(|&at| events.column(at).clone()).collect();
        let encoded = self.sides[side].converter.convert_columns(&kept)?;
        let settled = near.settled(metric.closed());
        let pane = program.window().pane();
        let is_session = matches!(program.window(), Window::Session { .. });
        let keeps_whole_panes = self.corrects_panes(metric.timing());
        let (mut pairs, mut wrong) = (Pairs::default(), Wrong::default());
        let mut unheld: Vec<KeyId> = Vec::new();
        let mut matches = 0;
        for row in 0..events.num_rows() {
            let id = ids.next().expect("a key for each row");
            let at = Micros(ts[row]);
            if !whole(row) {
                // NULL equals nothing
                if side == LEFT && step.kind == JoinKind::Left {
                    pairs.push_alone(row);
                    if keeps_whole_panes {
                        let stored = Stored { ts: at, fate: Fate::Alone, row: encoded.row(row).as_ref().into() };
                        self.sides[LEFT].add(id, stored, at.pane_start(pane), &mut self.keys);
                    }
                }
                unheld.push(id);
                continue;
            }
            let range = if side == LEFT { near.right_of(at) } else { near.left_of(at) };
            let others = &mut self.sides[1 - side];
            if is_session && others.between(id, range).any(|(_, other)| other.fate == Fate::Alone) {
                dropped.push(chosen[row]);
                unheld.push(id);
                continue;
            }
            // whether what is behind the watermark is late hangs on the sessions that are open when its turn comes
            let is_behind = is_session && {
                let matched = others.between(id, range).map(|(_, other)| if side == LEFT { at } else { other.ts });
                matched.min().is_some_and(|first| first <= metric.closed())
            };
            if is_behind && !pairs.came.is_empty() {
                let rows = self.joined_pairs(side, events.columns(), std::mem::take(&mut pairs), tables)?;
                matches += rows.num_rows();
                self.give(metric, &rows, out)?;
            }
            let others = &mut self.sides[1 - side];
            let mut fate = Fate::Waiting;
            let before = pairs.came.len();
            for (place, other) in others.between_mut(id, range) {
                pairs.push(row, id, place, other);
                if other.fate == Fate::Alone {
                    wrong.panes.insert(other.ts.pane_start(pane));
                    wrong.alone.push(other.row.clone());
                }
                (fate, other.fate) = (Fate::Matched, Fate::Matched);
            }
            others.changed |= pairs.came.len() > before;
            if side == LEFT && step.kind == JoinKind::Left && fate == Fate::Waiting {
                if at < settled {
                    pairs.push_alone(row);
                    fate = Fate::Alone;
                } else {
                    self.waiting.insert((at, id));
                }
            }
            let last = if side == LEFT { at } else { near.left_of(at).1 };
            let stored = Stored { ts: at, fate, row: encoded.row(row).as_ref().into() };
            self.sides[side].add(id, stored, last.pane_start(pane), &mut self.keys);
            if pairs.came.len() >= PAIRS_AT_ONCE || is_behind {
                let rows = self.joined_pairs(side, events.columns(), std::mem::take(&mut pairs), tables)?;
                matches += rows.num_rows();
                self.give(metric, &wrong.take_from(rows, pane)?, out)?;
                if wrong.missing_rows() >= PAIRS_AT_ONCE {
                    self.correct(metric, std::mem::take(&mut wrong), tables, out)?;
                }
                self.check(metric)?;
                if matches > MATCHES_MOST * events.num_rows().max(ROWS_AT_ONCE) {
                    return exec_err!(
                        "the events of a batch have more than {MATCHES_MOST} matches each in the other stream; compare \
                         more columns in ON or narrow the band of time"
                    );
                }
            }
        }
        self.keys.forget_unheld(&unheld);
        if !pairs.came.is_empty() {
            let rows = self.joined_pairs(side, events.columns(), pairs, tables)?;
            self.give(metric, &wrong.take_from(rows, pane)?, out)?;
        }
        self.correct(metric, wrong, tables, out)
    }

    /// Whether panes are computed anew where a match comes for a left event that went without one.
    fn corrects_panes(&self, timing: Timing) -> bool {
        let (step, near) = self.step();
        // a left event in the same window waits for the window's end, and without lateness nothing comes after that
        let comes_after = matches!(near, Near::Band { .. }) || timing.allowed_lateness > Span::ZERO;
        step.kind == JoinKind::Left && comes_after && !matches!(self.program.window(), Window::Session { .. })
    }

    /// Computes wrong panes anew, and corrects the final rows of the keys whose joined rows came or went.
    fn correct(&mut self, metric: &mut Metric, wrong: Wrong, tables: &Tables, out: &mut Vec<Rows>) -> Result<()> {
        if wrong.panes.is_empty() {
            return Ok(());
        }
        let program = self.program.clone();
        let joins = program.joins().expect("a join has its program");
        let width = program.window().pane();
        let gone = self.joined_alone(&wrong.alone, tables)?;
        let changed = compute::concat_batches(&joins.pruned, wrong.missing.iter().chain([&gone]))?;
        let changed = match program.selected(&changed)? {
            Some(keep) => compute::filter_record_batch(&changed, &keep)?,
            None => changed,
        };
        let mut by_pane: BTreeMap<Micros, Vec<u32>> = BTreeMap::new();
        for (row, &at) in times(&changed).iter().enumerate() {
            by_pane.entry(Micros(at).pane_start(width)).or_default().push(row as u32);
        }
        for (pane, rows) in by_pane {
            let before = metric.take_out(pane)?;
            self.refill(metric, pane, tables)?;
            let rows = compute::take_record_batch(&changed, &UInt32Array::from(rows))?;
            metric.correct(pane, before, &rows, out)?;
            self.check(metric)?;
        }
        Ok(())
    }

    /// Gives the metric all joined rows of one pane.
    fn refill(&mut self, metric: &mut Metric, pane: Micros, tables: &Tables) -> Result<()> {
        let near = self.step().1;
        let last = pane.plus(self.program.window().pane()).minus(Span(1));
        let left = &self.sides[LEFT];
        let keys = left.panes.get(&pane).into_iter().flatten();
        let events = keys.flat_map(|&id| left.between(id, (pane, last)).map(move |(_, event)| (id, event)));
        let mut events: Vec<(KeyId, &Stored)> = events.filter(|(_, event)| event.fate != Fate::Waiting).collect();
        // an order that a restart, which numbers the keys anew, does not change
        events.sort_by(|(_, a), (_, b)| (a.ts, &a.row).cmp(&(b.ts, &b.row)));
        let (mut pairs, mut came) = (Pairs::default(), Vec::new());
        let mut count = 0;
        for (at, (id, event)) in events.iter().enumerate() {
            let row = came.len();
            came.push(event.row.clone());
            match event.fate {
                Fate::Matched => {
                    let matches = self.sides[RIGHT].between(*id, near.right_of(event.ts));
                    matches.for_each(|(place, other)| pairs.push(row, *id, place, other));
                }
                _ => pairs.push_alone(row),
            }
            if pairs.came.len() >= PAIRS_AT_ONCE || at + 1 == events.len() {
                let columns = self.decode(LEFT, &std::mem::take(&mut came))?;
                let rows = self.joined_pairs(LEFT, &columns, std::mem::take(&mut pairs), tables)?;
                count += rows.num_rows();
                metric.take(&rows)?;
            }
        }
        self.emitted += count;
        Ok(())
    }

    /// Stops in the middle of a batch whose pairs fill the metric beyond its bound.
    fn check(&self, metric: &Metric) -> Result<()> {
        let size = StateSize { bytes: self.bytes() + metric.bytes(), groups: metric.keys() };
        match size.excess(self.most) {
            Some(excess) => Err(DataFusionError::ResourcesExhausted(excess.of_metric())),
            None => Ok(()),
        }
    }

    /// Pairs as joined rows; `events` are the columns of those that came.
    fn joined_pairs(&self, side: usize, events: &[ArrayRef], pairs: Pairs, tables: &Tables) -> Result<RecordBatch> {
        let Pairs { came, waited, found, .. } = pairs;
        let count = came.len();
        let mine = take_all(events, &came.into())?;
        let other = take_all(&self.decode(1 - side, &found)?, &UInt32Array::from(waited))?;
        let (left, right) = if side == LEFT { (mine, other) } else { (other, mine) };
        self.joined(left, right, count, tables)
    }

    /// Left events as joined rows without a match.
    fn joined_alone(&self, rows: &[Box<[u8]>], tables: &Tables) -> Result<RecordBatch> {
        let right = take_all(&self.decode(RIGHT, &[])?, &UInt32Array::new_null(rows.len()))?;
        self.joined(self.decode(LEFT, rows)?, right, rows.len(), tables)
    }

    /// The columns of kept events of one of the two streams.
    fn decode(&self, side: usize, rows: &[Box<[u8]>]) -> Result<Vec<ArrayRef>> {
        let width = self.schema_of(side).fields().len();
        self.sides[side].decode(rows.iter().map(|row| &row[..]), rows.len(), width)
    }

    /// The columns of one of the two streams.
    fn schema_of(&self, side: usize) -> &SchemaRef {
        let joins = self.program.joins().expect("a join has its program");
        if side == LEFT { &joins.stream } else { &joins.steps[0].right }
    }

    /// Joined rows, with the tables, in order of event time.
    fn joined(&self, left: Vec<ArrayRef>, right: Vec<ArrayRef>, count: usize, tables: &Tables) -> Result<RecordBatch> {
        let joins = self.program.joins().expect("a join has its program");
        let columns = left.into_iter().chain([nothing(count), nothing(count)]).chain(right);
        let columns = columns.enumerate().map(|(at, column)| if joins.needed[at] { column } else { nothing(count) });
        let mut columns: Vec<ArrayRef> = columns.collect();
        let ts = columns[0].as_primitive::<TimestampMicrosecondType>().values();
        if !ts.is_sorted() {
            let mut order: Vec<u32> = (0..count as u32).collect();
            order.sort_by_key(|&row| ts[row as usize]);
            columns = take_all(&columns, &order.into())?;
        }
        let (rows, _) = joins.join_tables(Wide::new(columns, count), 1, tables)?.finish(joins)?;
        Ok(rows)
    }

    /// Joined rows go into the metric; in order of event time, so that no pair makes another one late.
    fn give(&mut self, metric: &mut Metric, rows: &RecordBatch, out: &mut Vec<Rows>) -> Result<()> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        self.emitted += rows.num_rows();
        let frontier = metric.closed().plus(metric.timing().max_delay);
        // pairs with an event whose window is past its lateness count no more
        metric.absorb(rows, frontier, &mut Shared::default(), out, &mut Vec::new())
    }

    /// The watermark of joined rows moves on: left events that no match is expected for become rows, windows close, and
    /// events that can be part of no pair any more are forgotten.
    fn advance(&mut self, metric: &mut Metric, watermark: Micros, tables: &Tables, out: &mut Vec<Rows>) -> Result<()> {
        if watermark <= metric.closed() {
            return Ok(());
        }
        let settled = self.step().1.settled(watermark);
        let mut alone: Vec<Box<[u8]>> = Vec::new();
        while let Some(&(ts, id)) = self.waiting.first().filter(|(ts, _)| *ts < settled) {
            self.waiting.remove(&(ts, id));
            for (_, stored) in self.sides[LEFT].between_mut(id, (ts, ts)) {
                if stored.fate == Fate::Waiting {
                    stored.fate = Fate::Alone;
                    alone.push(stored.row.clone());
                }
            }
        }
        if !alone.is_empty() {
            self.sides[LEFT].changed = true;
            let rows = self.joined_alone(&alone, tables)?;
            self.give(metric, &rows, out)?;
        }
        metric.advance(watermark, out)?;
        self.expire(metric, watermark);
        Ok(())
    }

    fn expire(&mut self, metric: &Metric, watermark: Micros) {
        let (_, near) = self.step();
        let (window, lateness) = (self.program.window(), metric.timing().allowed_lateness);
        for (at, side) in self.sides.iter_mut().enumerate() {
            while let Some(first) = side.panes.first_entry() {
                let pane = *first.key();
                // of the last instant: sessions, unlike all other windows, do not end with their panes
                if window.last_end(pane.plus(window.pane()).minus(Span(1))).plus(lateness) > watermark {
                    break;
                }
                for id in first.remove() {
                    let Some(rows) = side.rows.get_mut(&id) else { continue };
                    let last = |ts: Micros| if at == LEFT { ts } else { near.left_of(ts).1 };
                    let gone = rows.partition_point(|stored| last(stored.ts).pane_start(window.pane()) <= pane);
                    side.changed |= gone > 0;
                    for stored in rows.drain(..gone) {
                        side.count -= 1;
                        side.bytes -= stored.row.len() + STORED_BYTES;
                    }
                    if rows.is_empty() {
                        side.rows.remove(&id);
                        self.keys.release(id);
                    }
                }
            }
        }
    }

    /// The events of either side: `ts`, `matched`, of the left side of a left join `alone`, and the columns kept.
    ///
    /// State without `alone` is older and lacks the events that went without a match: it is not read but made again.
    fn save(&mut self, draft: &mut Draft) -> Result<()> {
        for (at, name) in SIDES.iter().enumerate() {
            let changed = std::mem::take(&mut self.sides[at].changed);
            if self.sides[at].count == 0 {
                continue;
            }
            let (side, schema) = (&self.sides[at], self.schema_of(at));
            draft.put(name, changed, || {
                let mut ids: Vec<&KeyId> = side.rows.keys().collect();
                ids.sort_unstable();
                let rows: Vec<&Stored> = ids.iter().flat_map(|id| &side.rows[*id]).collect();
                let parser = side.converter.parser();
                let kept = side.converter.convert_rows(rows.iter().map(|stored| parser.parse(&stored.row)))?;
                let own = side.places.iter().map(|&at| Arc::new(schema.field(at).clone().with_nullable(true)));
                let fields: Vec<FieldRef> = self.beside(at).into_iter().map(Arc::new).chain(own).collect();
                let of_fate = |fate: Fate| -> ArrayRef {
                    Arc::new(rows.iter().map(|stored| Some(stored.fate == fate)).collect::<BooleanArray>())
                };
                let ts = Arc::new(Int64Array::from_iter_values(rows.iter().map(|stored| stored.ts.0)));
                let beside: [ArrayRef; 3] = [ts, of_fate(Fate::Matched), of_fate(Fate::Alone)];
                let columns = beside.into_iter().take(self.beside(at).len()).chain(kept).collect();
                Ok(Content::Rows(batch_of(Arc::new(Schema::new(fields)), columns, rows.len())?))
            })?;
        }
        Ok(())
    }

    /// The columns in front of those kept in the saved events of a side.
    fn beside(&self, side: usize) -> Vec<Field> {
        let flag = |name: &str| Field::new(name, DataType::Boolean, false);
        let mut fields = vec![Field::new("ts", DataType::Int64, false), flag("matched")];
        if side == LEFT && self.step().0.kind == JoinKind::Left {
            fields.push(flag("alone"));
        }
        fields
    }

    /// Takes in what [`StreamJoin::save`] gave.
    fn load(&mut self, saved: &Pieces) -> Result<(), RestoreError> {
        let program = self.program.clone();
        let joins = program.joins().expect("a join has its program");
        let (step, near) = (&joins.steps[0], joins.steps[0].near.expect("the first step joins a stream"));
        let pane = program.window().pane();
        for (at, name) in SIDES.iter().enumerate() {
            let Some(batch) = saved.all(name).next() else { continue };
            let (schema, keys) =
                if at == LEFT { (&joins.stream, &step.left_keys) } else { (&step.right, &step.right_keys) };
            let beside = self.beside(at);
            let side = &mut self.sides[at];
            let own = side.places.iter().map(|&place| schema.field(place));
            let wanted = beside.iter().chain(own).map(Field::data_type);
            if !batch.schema_ref().fields().iter().map(|field| field.data_type()).eq(wanted) {
                return Err(RestoreError::Mismatch(format!("events of a join are {:?}", batch.schema_ref())));
            }
            let kept = &batch.columns()[beside.len()..];
            let mut columns = vec![nothing(batch.num_rows()); schema.fields().len()];
            side.places.iter().zip(kept).for_each(|(&place, column)| columns[place] = column.clone());
            let fields = columns.iter().zip(schema.fields());
            let fields: Vec<Field> =
                fields.map(|(column, field)| Field::new(field.name(), column.data_type().clone(), true)).collect();
            let events = batch_of(Arc::new(Schema::new(fields)), columns, batch.num_rows())?;
            let ids = self.keys.intern(&evaluate(keys, &events)?, batch.num_rows())?;
            let rows = side.converter.convert_columns(kept)?;
            let (ts, matched) = (batch.column(0).as_primitive::<Int64Type>(), batch.column(1).as_boolean());
            let alone = (beside.len() > 2).then(|| batch.column(2).as_boolean());
            for (row, id) in ids.into_iter().enumerate() {
                let fate = match alone {
                    _ if matched.value(row) => Fate::Matched,
                    Some(alone) if alone.value(row) => Fate::Alone,
                    _ => Fate::Waiting,
                };
                let stored = Stored { ts: Micros(ts.value(row)), fate, row: rows.row(row).as_ref().into() };
                if at == LEFT && step.kind == JoinKind::Left && fate == Fate::Waiting {
                    self.waiting.insert((stored.ts, id));
                }
                let last = if at == LEFT { stored.ts } else { near.left_of(stored.ts).1 };
                side.add(id, stored, last.pane_start(pane), &mut self.keys);
            }
            side.changed = false;
        }
        Ok(())
    }
}
