//! The parts put together: log, store, system and gateway; served until asked to stop, then drained.

use crate::config::{Backend, Config};
use crate::private;
use actors::clock::{Clock, SystemClock};
use actors::pack::Packs;
use actors::{Parts, System};
use anyhow::{Context, Result, bail, ensure};
use cache::Cache;
use engine::event::Micros;
use gateway::{AppState, Auth, AuthError, Hub, SECRET_BYTES_MIN, Starting};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use sql::store::{Store, StoreError};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use streams::dedup::Dedup;
use streams::log::{EmbeddedLog, Log};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// A built system that listens and is ready to serve.
pub struct App {
    state: AppState,
    listener: TcpListener,
}

/// How long the actors may take to commit; with the 5 s of the gateway before it the drain stays under the promised 10 s.
const DRAIN: Duration = Duration::from_secs(4);

impl App {
    /// Listens, opens log and store under `config.data_dir`, and replays. Meanwhile `/health` and `/ready` are served, and a
    /// PostgreSQL that is away is waited for.
    pub async fn build(config: Config) -> Result<App> {
        let auth = checked(&config)?;
        config.unused().iter().for_each(|unused| tracing::warn!("{unused}"));
        let wire = Arc::new(config.gateway());
        let listener = gateway::listen(config.listen)
            .with_context(|| format!("cannot listen on {}; is another server running there?", config.listen))?;
        let starting = Starting::serve(listener, &wire);
        std::fs::create_dir_all(&config.data_dir)
            .with_context(|| format!("cannot make data_dir {}", config.data_dir.display()))?;
        private::tighten(&config.data_dir);
        let metrics = recorded()?;
        let log = EmbeddedLog::open(&config.data_dir.join("log"), &config.log.embedded())?;
        let dedup = Arc::new(Dedup::open(&config.data_dir.join("ids"), &config.dedup)?);
        let clock = Arc::new(SystemClock);
        let mut said = false;
        let (store, installation) = loop {
            let error = match open_store(&config, &log, &auth, clock.now()).await {
                Ok(opened) => break opened,
                Err(error) => error,
            };
            if !is_store_away(&error) {
                return Err(error);
            }
            if !std::mem::replace(&mut said, true) {
                tracing::warn!(%error, "the start waits for the store");
            }
            starting.waits_for("store", error.to_string());
            tokio::time::sleep(LOOK_EVERY).await;
        };
        starting.waits_for("actors", "are being restored");
        let log: Arc<dyn Log> = Arc::new(log);
        let cache = Cache::start(&config.cache, &config.redis, &installation, config.data_dir.join("redis-era"))?;
        let hub = Hub::new(&wire.limits, &wire.history);
        if let Some(publisher) = cache.publisher() {
            hub.feed_over(publisher);
        }
        let system = System::start(Parts {
            store,
            log,
            dedup,
            outlet: hub.clone(),
            clock,
            limits: config.limits.system(),
            agents: config.agents.clone(),
            cache,
            webhooks: config.webhooks.clone(),
            sealer: auth.sealer(),
            retention: config.limits.retention(),
        })
        .await?;
        let packs = Arc::new(packs(&config).await?);
        let state = AppState::new(system, Arc::new(auth), hub, wire, packs, metrics)?;
        Ok(App { state, listener: starting.end().await? })
    }

    /// Where it listens; the port is real also where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound listener has an address")
    }

    /// The system behind the gateway.
    pub fn system(&self) -> &System {
        &self.state.system
    }

    /// What workspaces can be made from.
    pub fn packs(&self) -> &Packs {
        &self.state.packs
    }

    /// Serves until `stop`, then drains: no new connections, answers finished, clients told to come back, state committed.
    /// The same, and an error, where an actor fails that no other one starts again.
    pub async fn serve_until(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let (system, config) = (self.state.system.clone(), self.state.config.clone());
        let (observed, (failed, has_failed)) = (system.clone(), oneshot::channel());
        let stop = async move {
            tokio::select! {
                () = stop => {}
                () = observed.failed() => drop(failed.send(())), // it is looked at below
            }
        };
        gateway::serve(self.listener, self.state, &config, stop).await?;
        tracing::info!("draining");
        system.stop(DRAIN).await;
        system.cache().stop().await;
        system.store().close().await;
        tracing::info!("drained");
        ensure!(
            has_failed.await.is_err(),
            "a supervisor of actors failed, which is told above; start the server again"
        );
        Ok(())
    }
}

/// What is measured, recorded once for the whole process, whatever the number of systems in it.
fn recorded() -> Result<PrometheusHandle> {
    static METRICS: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    let mut recorded = METRICS.lock();
    Ok(match recorded.as_ref() {
        Some(handle) => handle.clone(),
        None => recorded.insert(PrometheusBuilder::new().install_recorder()?).clone(),
    })
}

/// Serves clients for the node with the engine that `edge.core` names, until `stop`; then drains.
pub async fn serve_edge(config: Config, stop: impl Future<Output = ()> + Send + 'static) -> Result<()> {
    crate::choose_tls();
    config.check_bounds()?;
    if config.listen_tls.is_some() {
        config.tls.check()?;
    }
    config.unused().iter().for_each(|unused| tracing::warn!("{unused}"));
    let listener = gateway::listen(config.listen)
        .with_context(|| format!("cannot listen on {}; is another server running there?", config.listen))?;
    gateway::serve_edge(listener, config.gateway(), &config.redis, recorded()?, stop).await?;
    Ok(())
}

/// A store that is away is tried this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The store with all that a start writes into it, and what its installation is called.
async fn open_store(config: &Config, log: &EmbeddedLog, auth: &Auth, now: Micros) -> Result<(Store, String)> {
    let url = config.store_url()?;
    // who waits for it here says so to those who ask
    let options = sql::store::Options { start_ms: 0, rewrite: true, ..config.store_options() };
    let store = Store::open_with(&url, &options).await?;
    belong_together(&store, log, &config.data_dir).await?;
    let installation = installation(&store, &url).await?;
    auth.bootstrap(&store, now).await?;
    let resealed = auth.reseal(&store).await?;
    if resealed > 0 {
        tracing::info!(resealed, "secrets in the store are encrypted with the new auth.encryption_key");
    }
    Ok((store, installation))
}

fn is_store_away(error: &anyhow::Error) -> bool {
    let of_store = match error.downcast_ref() {
        Some(AuthError::Store(error)) => Some(error),
        _ => error.downcast_ref(),
    };
    of_store.is_some_and(StoreError::is_away)
}

/// Where the store keeps which log its results come from.
const LOG: &str = "log";

/// Refuses a log and a store of which the one is not the other's: results of one log would be taken for those of another.
async fn belong_together(store: &Store, log: &EmbeddedLog, data_dir: &Path) -> Result<()> {
    let records = log.tail().0;
    // one that an earlier version wrote does not say
    if records > 0 && store.meta(LOG).await?.is_none() && store.all_workspaces().await?.is_empty() {
        bail!(
            "the log in `{}` holds {records} records and the store knows nothing of them: it was lost, or store.url names \
             another one; restore both from one backup, or name an empty data_dir to begin anew",
            data_dir.display()
        );
    }
    // of two servers that start at once on a new store the first has it
    ensure!(
        store.claim_meta(LOG, log.id()).await? == log.id(),
        "the store belongs to another log than the one in `{}`: another server uses it, its data_dir was another one, or \
         log and store were not restored together; give each server a store of its own, name the data_dir that this store \
         was used with, or restore both from one backup; to begin anew, name an empty store and an empty data_dir",
        data_dir.display()
    );
    Ok(())
}

/// Where the store keeps what its installation is called.
const INSTALLATION: &str = "installation";

/// What the nodes of one store have in common, and no others: neither another store, nor a copy of this one elsewhere.
async fn installation(store: &Store, url: &str) -> Result<String> {
    let name = store.claim_meta(INSTALLATION, &uuid::Uuid::new_v4().simple().to_string()).await?;
    let digest = Sha256::digest(format!("{name} {url}"));
    Ok(digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

/// What workspaces can be made from.
pub(crate) async fn packs(config: &Config) -> Result<Packs> {
    let folder = config.packs_dir.as_deref();
    let shown = || folder.map_or_else(String::new, |folder| folder.display().to_string());
    Packs::load(folder).await.with_context(|| format!("the packs in packs_dir `{}` cannot be used", shown()))
}

/// What [`App::build`] refuses before it touches anything.
fn checked(config: &Config) -> Result<Auth> {
    crate::choose_tls();
    config.check_bounds()?;
    let auth = Auth::new(&config.auth)?;
    if config.log.backend != Backend::Embedded {
        bail!("log.backend = {:?} is not in this build; use \"embedded\"", config.log.backend);
    }
    sql::store::kind(&config.store_url()?)?;
    config.redis.check()?;
    if config.listen_tls.is_some() {
        config.tls.check()?;
    }
    Ok(auth)
}

/// Refuses a configuration that a server would not start with. One without a secret passes, since that may come from the
/// environment of the server: true where it must.
pub(crate) fn check(config: &Config) -> Result<bool> {
    let mut config = config.clone();
    let needs_secret = config.auth.secret.is_none() && config.auth.secret_file.is_none();
    if needs_secret {
        config.auth.secret = Some("x".repeat(SECRET_BYTES_MIN));
    }
    checked(&config)?;
    Ok(needs_secret)
}

/// Completes on SIGTERM or SIGINT.
pub async fn shutdown_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => _ = signal.recv().await,
            Err(error) => {
                tracing::error!(%error, "cannot listen for signals; stop the process by its id");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::event::Micros;
    use futures::executor::block_on;
    use sql::store::{User, Workspace};
    use streams::log::{Body, Config as LogConfig, Record};

    #[tokio::test]
    async fn a_log_and_a_store_that_do_not_belong_together_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let open = |name: &str| EmbeddedLog::open(&directory.path().join(name), &LogConfig::default()).unwrap();
        let store =
            async |name: &str| Store::open(&format!("sqlite:{}/{name}.db", directory.path().display())).await.unwrap();
        let check = async |store: &Store, log: &EmbeddedLog| {
            belong_together(store, log, directory.path()).await.map_err(|error| error.to_string())
        };
        let (log, first) = (open("a"), store("first").await);
        check(&first, &log).await.unwrap();
        let ann = User {
            id: "ann".into(),
            email: "ann@example.com".into(),
            password_hash: "none".into(),
            admin: false,
            created_at: Micros(1),
        };
        first.create_user(&ann).await.unwrap();
        let (id, name, tier) = ("acme".parse().unwrap(), "Acme".into(), "free".into());
        let acme = Workspace { id, name, pack: None, tier, created_at: Micros(1) };
        first.create_workspace(&acme, &ann.id).await.unwrap();
        let body = Body::Advance { stream: "market.trades".parse().unwrap(), frontier: Micros(1) };
        block_on(log.append(Record { workspace: acme.id.clone(), body })).unwrap();
        check(&first, &log).await.unwrap();

        let lost = check(&store("second").await, &log).await.unwrap_err();
        assert!(lost.contains("the store knows nothing of them"), "{lost}");
        let other = open("b");
        let foreign = check(&first, &other).await.unwrap_err();
        assert!(foreign.contains("belongs to another log"), "{foreign}");
        check(&first, &log).await.unwrap();
        // also where nothing is in it yet
        let fresh = store("fresh").await;
        check(&fresh, &other).await.unwrap();
        let foreign = check(&fresh, &open("c")).await.unwrap_err();
        assert!(foreign.contains("belongs to another log"), "{foreign}");
    }
}
