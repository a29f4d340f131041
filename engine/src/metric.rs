//! One metric of one workspace: when its windows close, and the rows that come of it.

use crate::checkpoint::{Draft, Pieces};
use crate::event::{Micros, Span};
use crate::key::{KeyId, Keys, batch_of};
use crate::panes::{Before, Panes, Tops};
use crate::program::{Finished, Program};
use crate::session::Sessions;
use crate::shared::{Front, Shared};
use crate::window::Window;
use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, TimestampMicrosecondArray};
use arrow::compute;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, TimestampMicrosecondType};
use datafusion_common::{DataFusionError, Result, exec_err};
use std::sync::Arc;

/// How long a metric waits for events that come out of order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// The watermark follows the greatest event time seen at this distance.
    pub max_delay: Span,
    /// How long after its end a final window may still be corrected.
    pub allowed_lateness: Span,
}

/// Rows of [`Program::output`] and what they are.
#[derive(Clone, Debug)]
pub struct Rows {
    pub batch: RecordBatch,
    /// For final rows: 0 for the first, n for the n-th correction, one for each row. `None`: provisional.
    pub revisions: Option<Vec<i64>>,
    /// Keys (the key columns only) whose earlier row of this window no longer satisfies HAVING.
    pub gone: Option<RecordBatch>,
    /// These are all rows of their window: whoever is missing has left it (`ORDER BY … LIMIT`).
    pub complete: bool,
    /// Earlier final rows that no longer hold, by HAVING, by LIMIT or since late events joined their session to another one:
    /// `window_start`, `window_end`, the keys, and the revision that takes the row back.
    pub withdrawn: Option<RecordBatch>,
}

impl Rows {
    /// No final row.
    pub(crate) fn none(program: &Program) -> Rows {
        let batch = RecordBatch::new_empty(program.output().clone());
        Rows { batch, revisions: Some(Vec::new()), gone: None, complete: false, withdrawn: None }
    }
}

/// State of a metric that no version of this engine can read.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("saved state of this metric does not fit its program: {0}; it must be computed again from the log")]
    Mismatch(String),
    #[error(transparent)]
    DataFusion(#[from] DataFusionError),
    #[error(transparent)]
    Arrow(#[from] arrow::error::ArrowError),
}

/// What all kinds of windows share: the program, its timing, the keys, and how far windows are final.
pub(crate) struct Frame {
    pub(crate) program: Arc<Program>,
    pub(crate) timing: Timing,
    pub(crate) keys: Keys,
    /// The watermark; every window that closes here or before is final.
    pub(crate) closed: Micros,
}

/// Groups of a window on their way to be rows, one entry for each.
pub(crate) struct Groups<'a> {
    pub(crate) starts: ArrayRef,
    pub(crate) ends: ArrayRef,
    pub(crate) ids: &'a [KeyId],
    /// A column for each aggregate call.
    pub(crate) results: Vec<ArrayRef>,
    /// Of final rows.
    pub(crate) revisions: Option<Vec<i64>>,
}

enum State {
    Panes(Panes),
    Sessions(Sessions),
}

/// The running state of one metric in one workspace.
pub struct Metric {
    frame: Frame,
    state: State,
}

impl Metric {
    pub fn new(program: Arc<Program>, timing: Timing) -> Result<Self> {
        let keys = Keys::new(&program.key_schema)?;
        Ok(Self::with_keys(program, timing, keys))
    }

    fn with_keys(program: Arc<Program>, timing: Timing, keys: Keys) -> Self {
        let state = match program.window() {
            Window::Session { gap } => State::Sessions(Sessions::new(&program, gap)),
            _ => State::Panes(Panes::default()),
        };
        Self { frame: Frame { program, timing, keys, closed: Micros::MIN }, state }
    }

    /// Another metric, which numbers its keys alike where they are the same.
    pub(crate) fn beside(&self, program: Arc<Program>, timing: Timing) -> Option<Self> {
        program.has_keys_of(&self.frame.program).then(|| Self::with_keys(program, timing, self.frame.keys.beside()))
    }

    /// The same metric without state.
    pub(crate) fn emptied(&self) -> Self {
        Self::with_keys(self.frame.program.clone(), self.frame.timing, self.frame.keys.beside())
    }

    pub fn program(&self) -> &Arc<Program> {
        &self.frame.program
    }

    pub fn timing(&self) -> Timing {
        self.frame.timing
    }

    /// The watermark: every window that ends before it is final.
    pub(crate) fn closed(&self) -> Micros {
        self.frame.closed
    }

    /// Takes in a batch whose first event came when the stream's event time stood at `frontier`; `shared` is what
    /// others did with it before.
    ///
    /// Whether an event is late is decided by the events before it, never by how they were cut into
    /// batches. Final rows and corrections go to `out` in the order in which they became final; rows
    /// of `batch` that no window takes any more are listed in `dropped`.
    pub(crate) fn absorb(
        &mut self,
        batch: &RecordBatch,
        frontier: Micros,
        shared: &mut Shared,
        out: &mut Vec<Rows>,
        dropped: &mut Vec<u32>,
    ) -> Result<()> {
        if batch.column_by_name("ts").is_none() {
            return exec_err!("a batch of `{}` has no column `ts`", self.frame.program.stream());
        }
        let batch = self.frame.program.align(batch)?;
        match &mut self.state {
            State::Panes(panes) => panes.absorb(&mut self.frame, &batch, shared, frontier, out, dropped),
            State::Sessions(sessions) => sessions.absorb(&mut self.frame, &batch, shared, frontier, out, dropped),
        }
    }

    /// Takes in rows of another metric, none of which is late: the windows that hold them are open.
    pub(crate) fn take(&mut self, batch: &RecordBatch) -> Result<()> {
        let batch = self.frame.program.align(batch)?;
        let batch = match self.frame.program.selected(&batch)? {
            Some(keep) => compute::filter_record_batch(&batch, &keep)?,
            None => batch,
        };
        match &mut self.state {
            State::Panes(panes) => {
                let mut front = Front::new(&self.frame.program, &self.frame.keys, batch)?;
                panes.fill(&mut self.frame, &mut front).map(drop)
            }
            State::Sessions(_) => exec_err!("{NO_SESSIONS}"),
        }
    }

    /// Computes the pane at `start` anew from `whole`, all its rows, and corrects the final rows whose keys are in
    /// `corrected`.
    pub(crate) fn replace(
        &mut self,
        start: Micros,
        whole: &RecordBatch,
        corrected: &RecordBatch,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let before = self.take_out(start)?;
        self.take(whole)?;
        self.correct(start, before, corrected, out)
    }

    /// Takes the pane at `start` out, so that [`Metric::take`] fills it with all its rows anew; [`Metric::correct`] is
    /// called with what this gives.
    pub(crate) fn take_out(&mut self, start: Micros) -> Result<Before> {
        match &mut self.state {
            State::Panes(panes) => {
                let tops = match self.frame.program.is_top() {
                    true => panes.tops(&self.frame, std::iter::once(start))?,
                    false => Tops::new(),
                };
                Ok((panes.remove(start), tops))
            }
            State::Sessions(_) => exec_err!("{NO_SESSIONS}"),
        }
    }

    /// Corrects the final rows whose keys are in `corrected`, after the pane at `start` was computed anew.
    pub(crate) fn correct(
        &mut self,
        start: Micros,
        before: Before,
        corrected: &RecordBatch,
        out: &mut Vec<Rows>,
    ) -> Result<()> {
        let corrected = self.frame.program.align(corrected)?;
        match &mut self.state {
            State::Panes(panes) => panes.correct(&mut self.frame, start, before, &corrected, out),
            State::Sessions(_) => exec_err!("{NO_SESSIONS}"),
        }
    }

    /// Closes every window that ends before the watermark and forgets what nothing needs any more.
    pub fn advance(&mut self, watermark: Micros, out: &mut Vec<Rows>) -> Result<()> {
        if watermark <= self.frame.closed {
            return Ok(());
        }
        match &mut self.state {
            State::Panes(panes) => panes.advance(&mut self.frame, watermark, out),
            State::Sessions(sessions) => sessions.advance(&mut self.frame, watermark, out),
        }
    }

    /// Where the watermark must be for the next window to close, if any holds an event.
    pub fn next_end(&self) -> Option<Micros> {
        match &self.state {
            State::Panes(panes) => panes.next_end(&self.frame),
            State::Sessions(sessions) => sessions.next_end(),
        }
    }

    /// Provisional rows that changed since the last tick, while event time stands at `frontier`.
    ///
    /// Tumbling and session: the changed keys of each open window. Hopping and cumulating: the window that ends next,
    /// as the newest complete view; when it moves on, all its keys.
    pub fn tick(&mut self, frontier: Micros, out: &mut Vec<Rows>) -> Result<()> {
        match &mut self.state {
            State::Panes(panes) => panes.tick(&mut self.frame, frontier, out),
            State::Sessions(sessions) => sessions.tick(&self.frame, out),
        }
    }

    /// The same, but since the last look, of which a tick knows nothing: what alert rules see after each batch.
    pub(crate) fn look(&mut self, frontier: Micros, out: &mut Vec<Rows>) -> Result<()> {
        match &mut self.state {
            State::Panes(panes) => panes.look(&mut self.frame, frontier, out),
            State::Sessions(sessions) => sessions.look(&self.frame, out),
        }
    }

    /// End of the window that the last look showed, of overlapping ones.
    pub(crate) fn looked_at(&self) -> Option<Micros> {
        match &self.state {
            State::Panes(panes) => panes.looked_at,
            State::Sessions(_) => None,
        }
    }

    /// Goes on looking where a metric stood whose [`Metric::looked_at`] was this.
    pub(crate) fn look_from(&mut self, looked_at: Option<Micros>) {
        if let State::Panes(panes) = &mut self.state {
            panes.looked_at = looked_at;
        }
    }

    /// All rows of windows that are not final yet, up to the one that holds `frontier`.
    pub fn live(&mut self, frontier: Micros) -> Result<Vec<Rows>> {
        match &mut self.state {
            State::Panes(panes) => panes.live(&self.frame, frontier),
            State::Sessions(sessions) => sessions.live(&self.frame),
        }
    }

    /// Events before this are in windows past their lateness.
    pub(crate) fn horizon(&self) -> Micros {
        let Frame { program, timing, closed, .. } = &self.frame;
        let settled = closed.minus(timing.allowed_lateness).minus(program.window().size());
        match &self.state {
            State::Panes(_) => settled,
            // an event of an open session is not late, however long ago the session began
            State::Sessions(sessions) => {
                let gap = program.window().size();
                settled.minus(gap).min(sessions.oldest().map_or(Micros::MAX, |first| first.minus(gap)))
            }
        }
    }

    /// Keys that hold state now.
    pub fn keys(&self) -> usize {
        self.frame.keys.len()
    }

    /// Panes that hold state now; of sessions, how many there are.
    pub fn panes(&self) -> usize {
        match &self.state {
            State::Panes(panes) => panes.len(),
            State::Sessions(sessions) => sessions.len(),
        }
    }

    /// Bytes of state on the heap, within a few percent.
    pub fn bytes(&self) -> usize {
        self.frame.keys.bytes()
            + match &self.state {
                State::Panes(panes) => panes.bytes(),
                State::Sessions(sessions) => sessions.bytes(),
            }
    }

    /// The parts of the state: [`PANES`] and [`REVISIONS`].
    pub(crate) fn save(&mut self, draft: &mut Draft) -> Result<()> {
        match &mut self.state {
            State::Panes(panes) => panes.save(&self.frame, draft),
            State::Sessions(sessions) => sessions.save(&self.frame, draft),
        }
    }

    /// This metric, which has none, with the state that [`Metric::save`] gave.
    pub(crate) fn restored(mut self, closed: Micros, state: &Pieces) -> Result<Self, RestoreError> {
        self.frame.closed = closed;
        match &mut self.state {
            State::Panes(panes) => panes.restore(&mut self.frame, state)?,
            State::Sessions(sessions) => sessions.restore(&mut self.frame, state)?,
        }
        Ok(self)
    }
}

/// Parts of saved state: of panes, or of the sessions in their place.
pub(crate) const PANES: &str = "panes";
/// And which rows of final windows were corrected how often.
pub(crate) const REVISIONS: &str = "revisions";

/// The planner refuses it, so this is told only to a program made by hand.
const NO_SESSIONS: &str = "session windows are cut from events, not from the rows of another metric";

impl Frame {
    /// From groups to rows: HAVING, the SELECT list, and what became of earlier rows.
    pub(crate) fn rows(&self, groups: Groups) -> Result<Option<Rows>> {
        let Groups { starts, ends, ids, results, revisions } = groups;
        let count = ids.len();
        let mut columns = vec![starts, ends];
        columns.extend(self.keys.columns(ids)?);
        columns.extend(results);
        let fixed = columns[..2 + self.program.key_count()].to_vec();
        let (batch, kept) = self.program.finish(columns, count)?;
        let complete = self.program.is_top();
        let left = match &kept {
            Finished::Some(rows) if self.program.may_retract() && !complete => {
                let mut left = vec![true; count];
                rows.iter().for_each(|&row| left[row as usize] = false);
                Some(BooleanArray::from(left)).filter(|left| left.true_count() > 0)
            }
            _ => None,
        };
        let (mut gone, mut withdrawn) = (None, None);
        if let Some(left) = left {
            let keys = batch_of(self.program.key_schema.clone(), fixed[2..].to_vec(), count)?;
            gone = Some(compute::filter_record_batch(&keys, &left)?);
            if let Some(revisions) = revisions.as_ref().filter(|revisions| revisions.iter().any(|&n| n > 0)) {
                let corrected = BooleanArray::from_iter(revisions.iter().map(|&n| Some(n > 0)));
                let taken = self.program.withdrawal(fixed, revisions)?;
                let taken = compute::filter_record_batch(&taken, &compute::and(&left, &corrected)?)?;
                withdrawn = Some(taken).filter(|taken| taken.num_rows() > 0);
            }
        }
        if batch.num_rows() == 0 && gone.is_none() && !complete {
            return Ok(None);
        }
        let revisions =
            revisions.map(|all| (0..batch.num_rows() as u32).map(|row| all[kept.group(row) as usize]).collect());
        Ok(Some(Rows { batch, revisions, gone, complete, withdrawn }))
    }

    /// The keys of those groups that become rows.
    pub(crate) fn chosen(&self, groups: Groups) -> Result<Vec<KeyId>> {
        let Groups { starts, ends, ids, results, .. } = groups;
        let mut columns = vec![starts, ends];
        columns.extend(self.keys.columns(ids)?);
        columns.extend(results);
        let (batch, kept) = self.program.finish(columns, ids.len())?;
        Ok((0..batch.num_rows() as u32).map(|row| ids[kept.group(row) as usize]).collect())
    }

    /// Adds to `rows` that earlier final rows no longer hold: their bounds, their keys, and the revisions that say so.
    pub(crate) fn withdraw(
        &self,
        rows: &mut Option<Rows>,
        (starts, ends): (ArrayRef, ArrayRef),
        ids: &[KeyId],
        revisions: &[i64],
    ) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut columns = vec![starts, ends];
        columns.extend(self.keys.columns(ids)?);
        let mut taken = self.program.withdrawal(columns, revisions)?;
        let rows = rows.get_or_insert_with(|| Rows::none(&self.program));
        if let Some(more) = &rows.withdrawn {
            taken = compute::concat_batches(&taken.schema(), [&taken, more])?;
        }
        rows.withdrawn = Some(taken);
        Ok(())
    }

    /// Fields of saved state: `first` columns of integers, the keys, the state of every aggregate.
    pub(crate) fn saved_schema(&self, first: &[&str], aggregates: bool) -> Result<SchemaRef> {
        let mut fields: Vec<FieldRef> =
            first.iter().map(|name| Arc::new(Field::new(*name, DataType::Int64, false))).collect();
        fields.extend(self.program.key_schema.fields().iter().cloned());
        if aggregates {
            for (at, kind) in self.program.kinds.iter().enumerate() {
                fields.extend(kind.state_fields(&format!("aggregate{at}"))?);
            }
        }
        Ok(Arc::new(Schema::new(fields)))
    }
}

/// The saved batch has the columns of this version.
pub(crate) fn check_saved(found: &RecordBatch, wanted: &SchemaRef) -> Result<(), RestoreError> {
    let types = |s: &SchemaRef| s.fields().iter().map(|f| f.data_type().clone()).collect::<Vec<_>>();
    if types(found.schema_ref()) != types(wanted) {
        return Err(RestoreError::Mismatch(format!("found {:?}, want {wanted:?}", found.schema_ref())));
    }
    Ok(())
}

/// The same instant for each of `count` rows.
pub(crate) fn instant(at: Micros, count: usize) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_value(at.0, count).with_timezone("+00:00"))
}

/// Event times of a batch.
pub(crate) fn times(batch: &RecordBatch) -> &[i64] {
    let ts = batch.column_by_name("ts").expect("checked where the batch came in");
    ts.as_primitive::<TimestampMicrosecondType>().values()
}

pub(crate) fn bounds(ts: &[i64]) -> (Micros, Micros) {
    let (low, high) = ts.iter().fold((i64::MAX, i64::MIN), |(low, high), &at| (low.min(at), high.max(at)));
    (Micros(low), Micros(high))
}
