//! Where a test makes this crate fail. Not in any other build.

use arrow::array::{AsArray, RecordBatch};
use engine::checkpoint::State;
use engine::event::WorkspaceId;
use parking_lot::Mutex;

type Point = Box<dyn FnMut(&RecordBatch) + Send>;

/// By workspace, since tests run beside each other.
static STEPS: Mutex<Vec<(WorkspaceId, Point)>> = Mutex::new(Vec::new());

/// From now on `point` is called before a batch of `workspace` is computed.
pub(crate) fn on_step(workspace: &WorkspaceId, point: impl FnMut(&RecordBatch) + Send + 'static) {
    STEPS.lock().push((workspace.clone(), Box::new(point)));
}

/// A batch of `workspace` is about to be computed.
pub(crate) fn step(workspace: &WorkspaceId, batch: &RecordBatch) {
    // a panic in a point must not leave the lock to the next
    let found = {
        let mut steps = STEPS.lock();
        steps.iter().position(|(id, _)| id == workspace).map(|at| steps.remove(at))
    };
    if let Some((id, mut point)) = found {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| point(batch)));
        STEPS.lock().push((id, point));
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Actors, by kind and name, that panic at the next message they handle.
static TO_FAIL: Mutex<Vec<(&'static str, String)>> = Mutex::new(Vec::new());

/// The actor of this kind and name panics at the next message it handles.
pub(crate) fn fail(kind: &'static str, name: impl Into<String>) {
    TO_FAIL.lock().push((kind, name.into()));
}

/// Whether it has not yet.
pub(crate) fn is_to_fail(kind: &str, name: &str) -> bool {
    TO_FAIL.lock().iter().any(|(k, n)| *k == kind && n == name)
}

/// An actor is about to handle a message.
pub(crate) fn handling(kind: &str, name: &str) {
    let mut to_fail = TO_FAIL.lock();
    let found = to_fail.iter().position(|(k, n)| *k == kind && n == name).map(|at| to_fail.remove(at));
    drop(to_fail);
    assert!(found.is_none(), "a test said so");
}

/// What actors of one system that have no name are called by.
pub(crate) fn name_of<T>(shared: &std::sync::Arc<T>) -> String {
    format!("{:p}", std::sync::Arc::as_ptr(shared))
}

/// Workspaces whose saved state is not what it was when they are started next.
static TO_SPOIL: Mutex<Vec<WorkspaceId>> = Mutex::new(Vec::new());
/// Those that were given such a state.
static SPOILED: Mutex<Vec<WorkspaceId>> = Mutex::new(Vec::new());

/// The next saved state of `workspace` that is read is not what it was.
pub(crate) fn spoil_state(workspace: &WorkspaceId) {
    TO_SPOIL.lock().push(workspace.clone());
}

/// The state as it is read.
pub(crate) fn spoiled(workspace: &WorkspaceId, state: Option<State>) -> Option<State> {
    let mut state = state?;
    let mut to_spoil = TO_SPOIL.lock();
    if let Some(at) = to_spoil.iter().position(|id| id == workspace) {
        SPOILED.lock().push(to_spoil.remove(at));
        match state.parts.values_mut().next().and_then(|part| part.last_mut()) {
            Some(byte) => *byte ^= 1,
            None => state.head.truncate(1),
        }
    }
    Some(state)
}

/// Workspaces whose saved state was refused: it would be computed again, and nobody would notice.
static REFUSED: Mutex<Vec<WorkspaceId>> = Mutex::new(Vec::new());

/// The saved state of `workspace` cannot be used, which is as it should be when it was spoiled.
pub(crate) fn refuse_state(workspace: &WorkspaceId) {
    let mut spoiled = SPOILED.lock();
    match spoiled.iter().position(|id| id == workspace) {
        Some(at) => _ = spoiled.remove(at),
        None => REFUSED.lock().push(workspace.clone()),
    }
}

/// Whether that happened, or a spoiled state was taken for a good one.
pub(crate) fn refused_state(workspace: &WorkspaceId) -> bool {
    REFUSED.lock().contains(workspace) || SPOILED.lock().contains(workspace)
}

/// Panics at an event whose `column` is `value`.
pub(crate) fn panic_at(workspace: &WorkspaceId, column: &'static str, value: &'static str) {
    on_step(workspace, move |batch| {
        let found = batch.column_by_name(column).is_some_and(|c| c.as_string::<i32>().iter().any(|v| v == Some(value)));
        assert!(!found, "no computation for {column} = {value}");
    });
}
