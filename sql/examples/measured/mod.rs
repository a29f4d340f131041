//! An empty store to measure, of either kind.

use engine::event::{Micros, WorkspaceId};
use sql::store::{Store, User, Workspace};
use tempfile::TempDir;

#[path = "../../../tests/support/database.rs"]
mod database;
use database::Database;

/// A store with the workspaces `w0`, `w1` and so on; deleted when it is dropped.
pub struct Measured {
    pub store: Store,
    pub workspaces: Vec<WorkspaceId>,
    _server: Option<Database>,
    _directory: TempDir,
}

impl Measured {
    /// `backend` is `sqlite` or `postgres`, which is started from the machine's packages, as the tests start it, but with
    /// `fsync` on unless `FSYNC=off` is set.
    pub async fn open(backend: &str, workspaces: usize) -> Measured {
        let directory = TempDir::new().unwrap();
        let server = (backend == "postgres").then(|| Database::postgres().expect("PostgreSQL is installed"));
        if let Some(server) = &server
            && std::env::var("FSYNC").as_deref() != Ok("off")
        {
            server.sql("postgres", "postgres", "ALTER SYSTEM SET fsync = on");
            server.sql("postgres", "postgres", "SELECT pg_reload_conf()");
        }
        let url = match &server {
            Some(server) => server.create("measured"),
            None => format!("sqlite:{}/store.db", directory.path().display()),
        };
        let store = Store::open(&url).await.unwrap();
        let ann = User {
            id: "ann".into(),
            email: "ann@example.com".into(),
            password_hash: "none".into(),
            admin: false,
            created_at: Micros(1),
        };
        store.create_user(&ann).await.unwrap();
        let workspaces: Vec<WorkspaceId> = (0..workspaces).map(|at| format!("w{at}").parse().unwrap()).collect();
        for id in &workspaces {
            let (id, name, tier) = (id.clone(), id.to_string(), "enterprise".into());
            let workspace = Workspace { id, name, pack: None, tier, created_at: Micros(1) };
            store.create_workspace(&workspace, &ann.id).await.unwrap();
        }
        Measured { store, workspaces, _server: server, _directory: directory }
    }
}
