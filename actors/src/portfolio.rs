//! A portfolio's actor: holds the positions, values them at every change of a price, and tells who watches.

use crate::outlet::{Outlet, PortfolioSummary, Update, What};
use engine::event::{ItemName, WorkspaceId};
use engine::portfolio::{Position, Price, Prices, summarise};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, async_trait};
use std::sync::Arc;

/// All that can be asked of a portfolio.
pub(crate) enum PortfolioMsg {
    /// New last prices of symbols it holds.
    Mark(Vec<(String, Price)>),
    /// It holds something else now.
    Hold {
        positions: Vec<Position>,
        prices: Vec<(String, Price)>,
    },
    Summary(RpcReplyPort<Arc<PortfolioSummary>>),
}

/// What a portfolio starts from.
pub(crate) struct Start {
    pub(crate) workspace: WorkspaceId,
    pub(crate) id: ItemName,
    pub(crate) name: String,
    pub(crate) currency: String,
    pub(crate) positions: Vec<Position>,
    pub(crate) prices: Vec<(String, Price)>,
    pub(crate) outlet: Arc<dyn Outlet>,
}

pub(crate) struct PortfolioActor;

pub(crate) struct State {
    start: Start,
    prices: Prices,
    current: Arc<PortfolioSummary>,
}

impl State {
    fn new(mut start: Start) -> Self {
        let mut prices = Prices::default();
        start.prices.drain(..).for_each(|(symbol, price)| prices.set(symbol, price));
        let current = Arc::new(value(&start, &prices));
        Self { start, prices, current }
    }

    fn mark(&mut self, prices: Vec<(String, Price)>) {
        prices.into_iter().for_each(|(symbol, price)| self.prices.set(symbol, price));
        let next = value(&self.start, &self.prices);
        if next.summary != self.current.summary {
            self.current = Arc::new(next);
            self.publish();
        }
    }

    fn publish(&self) {
        let what = What::Portfolio { id: self.start.id.clone(), summary: self.current.clone() };
        self.start.outlet.publish(Update { workspace: self.start.workspace.clone(), what });
    }
}

fn value(start: &Start, prices: &Prices) -> PortfolioSummary {
    PortfolioSummary {
        id: start.id.clone(),
        name: start.name.clone(),
        currency: start.currency.clone(),
        summary: summarise(&start.positions, prices),
    }
}

#[async_trait]
impl Actor for PortfolioActor {
    type Msg = PortfolioMsg;
    type State = State;
    type Arguments = Start;

    async fn pre_start(&self, _: ActorRef<PortfolioMsg>, start: Start) -> Result<State, ActorProcessingErr> {
        let state = State::new(start);
        state.publish(); // another one of its name may have been shown before
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<PortfolioMsg>,
        message: PortfolioMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        #[cfg(test)]
        crate::fault_point::handling("portfolio", &format!("{}/{}", state.start.workspace, state.start.id));
        match message {
            PortfolioMsg::Mark(prices) => state.mark(prices),
            PortfolioMsg::Hold { positions, prices } => {
                state.start.positions = positions;
                state.mark(prices);
            }
            PortfolioMsg::Summary(reply) => _ = reply.send(state.current.clone()), // the caller may have left
        }
        Ok(())
    }
}
