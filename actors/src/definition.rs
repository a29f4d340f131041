//! What users define in a workspace, as it is stored.

use engine::event::{ItemName, Span};
use serde::{Deserialize, Serialize};

/// A metric as the user defined it; times are microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricDefinition {
    pub sql: String,
    /// How often provisional rows come; 250 ms unless said.
    pub emit: Option<Span>,
    /// How long final rows are kept; for ever unless said.
    pub retain: Option<Span>,
    /// How far the watermark stays behind the greatest event time; 5 s unless said.
    pub max_delay: Option<Span>,
    /// How long a final row may still be corrected; not at all unless said.
    pub allowed_lateness: Option<Span>,
    /// Computes over that much of the retained log first; nothing unless said.
    pub backfill: Option<Span>,
}

/// An alert rule as the user defined it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleDefinition {
    pub metric: ItemName,
    /// A boolean SQL expression over the metric's columns.
    pub condition: String,
    /// How long it must hold, in event time, before the alert fires.
    #[serde(rename = "for")]
    pub hold: Option<Span>,
    /// `warning` unless said.
    pub severity: Option<String>,
}

pub(crate) const EMIT: Span = Span::millis(250);
pub(crate) const MAX_DELAY: Span = Span::seconds(5);
pub(crate) const SEVERITY: &str = "warning";
