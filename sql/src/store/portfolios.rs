//! Portfolios and their positions.

use super::db::{FromRow, Row, Tx, query, query_as, query_scalar};
use super::record::Columns;
use super::{Store, StoreError, bulk, failed};
use engine::event::{Micros, WorkspaceId};
use serde::{Deserialize, Serialize};

/// A named set of positions, valued in one currency.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Portfolio {
    pub workspace: WorkspaceId,
    pub id: String,
    pub name: String,
    pub currency: String,
    pub created_at: Micros,
}

/// What a portfolio holds of one symbol. The numbers are finite: the database has no NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    pub symbol: String,
    /// Units held, negative when short.
    pub qty: f64,
    /// Average price paid for one unit, in the portfolio's currency.
    pub cost: f64,
    pub sector: Option<String>,
}

impl FromRow for Portfolio {
    fn from_row(row: &Row) -> Result<Portfolio, sqlx::Error> {
        Ok(Portfolio {
            workspace: row.name("workspace")?,
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            currency: row.try_get("currency")?,
            created_at: row.time("created_at")?,
        })
    }
}

impl FromRow for Position {
    fn from_row(row: &Row) -> Result<Position, sqlx::Error> {
        Ok(Position {
            symbol: row.try_get("symbol")?,
            qty: row.try_get("qty")?,
            cost: row.try_get("cost")?,
            sector: row.try_get("sector")?,
        })
    }
}

impl Store {
    /// Adds a portfolio, or changes name and currency and leaves the rest.
    pub async fn put_portfolio(&self, portfolio: &Portfolio) -> Result<(), StoreError> {
        query(
            "INSERT INTO portfolios (workspace, id, name, currency, created_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (workspace, id) DO UPDATE SET name = excluded.name, currency = excluded.currency",
        )
        .bind(portfolio.workspace.as_str())
        .bind(&portfolio.id)
        .bind(&portfolio.name)
        .bind(&portfolio.currency)
        .bind(portfolio.created_at)
        .execute(self.write(&portfolio.workspace))
        .await
        .map_err(failed("put portfolio"))?;
        Ok(())
    }

    pub async fn portfolio(&self, workspace: &WorkspaceId, id: &str) -> Result<Option<Portfolio>, StoreError> {
        query_as("SELECT * FROM portfolios WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .fetch_optional(self.read(workspace))
            .await
            .map_err(failed("read portfolio"))
    }

    /// The portfolios of a workspace by id.
    pub async fn portfolios(&self, workspace: &WorkspaceId) -> Result<Vec<Portfolio>, StoreError> {
        query_as("SELECT * FROM portfolios WHERE workspace = $1 ORDER BY id")
            .bind(workspace.as_str())
            .fetch_all(self.read(workspace))
            .await
            .map_err(failed("list portfolios"))
    }

    /// Deletes a portfolio with its positions: whether there was one.
    pub async fn delete_portfolio(&self, workspace: &WorkspaceId, id: &str) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM portfolios WHERE workspace = $1 AND id = $2")
            .bind(workspace.as_str())
            .bind(id)
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete portfolio"))?;
        Ok(deleted > 0)
    }

    /// Adds positions, or replaces those in the same symbols; of two in one symbol the last counts. All or nothing.
    /// [`StoreError::Missing`] when there is no such portfolio.
    pub async fn put_positions(
        &self,
        workspace: &WorkspaceId,
        portfolio: &str,
        positions: &[Position],
    ) -> Result<(), StoreError> {
        async {
            let mut tx = self.db.begin(workspace.into()).await?;
            write(&mut tx, workspace, portfolio, positions).await?;
            tx.commit().await
        }
        .await
        .map_err(failed("put positions"))
    }

    /// Makes `positions` all that the portfolio holds; of two in one symbol the last counts. [`StoreError::Missing`]
    /// when there is no such portfolio, also when there are no positions.
    pub async fn replace_positions(
        &self,
        workspace: &WorkspaceId,
        portfolio: &str,
        positions: &[Position],
    ) -> Result<(), StoreError> {
        let operation = "replace positions";
        let replaced = async {
            let mut tx = self.db.begin(workspace.into()).await?;
            let exists: Option<String> = query_scalar("SELECT id FROM portfolios WHERE workspace = $1 AND id = $2")
                .bind(workspace.as_str())
                .bind(portfolio)
                .fetch_optional(&mut tx)
                .await?;
            query("DELETE FROM positions WHERE workspace = $1 AND portfolio = $2")
                .bind(workspace.as_str())
                .bind(portfolio)
                .execute(&mut tx)
                .await?;
            write(&mut tx, workspace, portfolio, positions).await?;
            tx.commit().await?;
            Ok(exists.is_some())
        };
        if replaced.await.map_err(failed(operation))? { Ok(()) } else { Err(StoreError::Missing { operation }) }
    }

    /// Deletes the position in a symbol: whether there was one.
    pub async fn delete_position(
        &self,
        workspace: &WorkspaceId,
        portfolio: &str,
        symbol: &str,
    ) -> Result<bool, StoreError> {
        let deleted = query("DELETE FROM positions WHERE workspace = $1 AND portfolio = $2 AND symbol = $3")
            .bind(workspace.as_str())
            .bind(portfolio)
            .bind(symbol)
            .execute(self.write(workspace))
            .await
            .map_err(failed("delete position"))?;
        Ok(deleted > 0)
    }

    /// The positions of a portfolio by symbol; none when there is no such portfolio.
    pub async fn positions(&self, workspace: &WorkspaceId, portfolio: &str) -> Result<Vec<Position>, StoreError> {
        // NUMERIC to the double next to it, which is the one that was written
        query_as(
            "SELECT symbol, CAST(qty AS DOUBLE PRECISION) AS qty, CAST(cost AS DOUBLE PRECISION) AS cost, sector \
             FROM positions WHERE workspace = $1 AND portfolio = $2 ORDER BY symbol",
        )
        .bind(workspace.as_str())
        .bind(portfolio)
        .fetch_all(self.read(workspace))
        .await
        .map_err(failed("list positions"))
    }
}

async fn write(
    tx: &mut Tx,
    workspace: &WorkspaceId,
    portfolio: &str,
    positions: &[Position],
) -> Result<(), sqlx::Error> {
    bulk::insert(
        tx,
        [
            "INSERT INTO positions (workspace, portfolio, symbol, qty, cost, sector) ",
            " ON CONFLICT (workspace, portfolio, symbol) DO UPDATE \
             SET qty = excluded.qty, cost = excluded.cost, sector = excluded.sector",
        ],
        positions,
        |position| &position.symbol,
        |values, position| {
            values.push_bind(workspace.as_str());
            values.push_bind(portfolio);
            values.push_bind(position.symbol.as_str());
            values.push_bind(position.qty);
            values.push_bind(position.cost);
            values.push_bind(position.sector.as_deref());
        },
    )
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn position(symbol: &str, qty: f64) -> Position {
        Position { symbol: symbol.into(), qty, cost: 10.1, sector: Some("tech".into()) }
    }

    async fn store_with_portfolio() -> (Store, Portfolio, tempfile::TempDir) {
        let (store, dir) = store().await;
        let portfolio = Portfolio {
            workspace: add_workspace(&store, "acme").await,
            id: "main".into(),
            name: "Main".into(),
            currency: "EUR".into(),
            created_at: Micros(1),
        };
        store.put_portfolio(&portfolio).await.unwrap();
        (store, portfolio, dir)
    }

    #[tokio::test]
    async fn a_portfolio_is_changed_and_deleted_with_its_positions() {
        let (store, portfolio, _dir) = store_with_portfolio().await;
        let acme = &portfolio.workspace;
        let renamed = Portfolio { name: "Core".into(), created_at: Micros(9), ..portfolio.clone() };
        store.put_portfolio(&renamed).await.unwrap();
        let expected = Portfolio { created_at: Micros(1), ..renamed };
        assert_eq!(store.portfolio(acme, "main").await.unwrap(), Some(expected.clone()));
        assert_eq!(store.portfolios(acme).await.unwrap(), [expected]);

        store.put_positions(acme, "main", &[position("A", 1.0)]).await.unwrap();
        assert!(store.delete_portfolio(acme, "main").await.unwrap());
        assert!(!store.delete_portfolio(acme, "main").await.unwrap());
        assert_eq!(store.positions(acme, "main").await.unwrap(), []);
    }

    #[tokio::test]
    async fn putting_adds_and_changes_and_replacing_leaves_nothing_else() {
        let (store, portfolio, _dir) = store_with_portfolio().await;
        let acme = &portfolio.workspace;
        store.put_positions(acme, "main", &[position("B", 1.0), position("A", -2.5)]).await.unwrap();
        store.put_positions(acme, "main", &[position("B", 3.0), position("B", 0.1)]).await.unwrap();
        assert_eq!(store.positions(acme, "main").await.unwrap(), [position("A", -2.5), position("B", 0.1)]);
        assert!(store.delete_position(acme, "main", "A").await.unwrap());
        assert!(!store.delete_position(acme, "main", "A").await.unwrap());
        store.replace_positions(acme, "main", &[position("C", 1.0)]).await.unwrap();
        assert_eq!(store.positions(acme, "main").await.unwrap(), [position("C", 1.0)]);
        store.replace_positions(acme, "main", &[]).await.unwrap();
        assert_eq!(store.positions(acme, "main").await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_bad_position_changes_none() {
        let (store, portfolio, _dir) = store_with_portfolio().await;
        let acme = &portfolio.workspace;
        store.put_positions(acme, "main", &[position("A", 1.0)]).await.unwrap();
        let bad = [position("B", 1.0), position("C", f64::NAN)];
        assert!(store.put_positions(acme, "main", &bad).await.is_err());
        assert!(store.replace_positions(acme, "main", &bad).await.is_err());
        assert_eq!(store.positions(acme, "main").await.unwrap(), [position("A", 1.0)]);
    }

    #[tokio::test]
    async fn positions_of_no_portfolio_are_refused() {
        let (store, portfolio, _dir) = store_with_portfolio().await;
        let acme = &portfolio.workspace;
        let put = store.put_positions(acme, "none", &[position("A", 1.0)]).await;
        assert!(matches!(put, Err(StoreError::Missing { .. })));
        let replaced = store.replace_positions(acme, "none", &[]).await;
        assert!(matches!(replaced, Err(StoreError::Missing { .. })));
    }
}
