//! Portfolios and positions as the store has them, kept at hand.

use cache::{Kept, Tag};
use engine::event::{ItemName, WorkspaceId};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Which portfolios there are.
pub(crate) fn of_portfolios(ws: &WorkspaceId) -> Tag {
    Tag::new(&[ws, &"portfolios"])
}

/// What one of them holds.
pub(crate) fn of_portfolio(ws: &WorkspaceId, portfolio: &ItemName) -> Tag {
    Tag::new(&[ws, &"portfolios", portfolio])
}

/// A list of the store.
pub(crate) struct Listed<T>(pub(crate) Vec<T>);

/// Bytes of the texts of a portfolio or a position, about.
const TEXTS: usize = 64;

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> Kept for Listed<T> {
    fn bytes(&self) -> usize {
        (self.0.len() + 1) * (size_of::<T>() + TEXTS)
    }

    fn encode(&self) -> Option<Vec<u8>> {
        serde_json::to_vec(&self.0).ok()
    }

    fn decode(bytes: &[u8]) -> Option<Listed<T>> {
        serde_json::from_slice(bytes).ok().map(Listed)
    }
}
