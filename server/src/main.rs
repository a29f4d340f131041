//! `tidewatch`: one binary for the engine, the demonstration and the tools around them.

use anyhow::Result;
use clap::{Parser, Subcommand};
use server::client::{self, Backtest, Query, Replay};
use server::demo::Speed;
use server::{App, ConfigFile, admin, backup, check, measure, private};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use streams::feed::Feed;
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Actor-based real-time streaming engine: events in, live metrics, alerts and answers out.
#[derive(Parser)]
#[command(name = "tidewatch", version, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything embedded: three sample workspaces, live data and the web console.
    #[command(after_help = "Example: tidewatch demo --live coinbase")]
    Demo {
        /// Take the fund's market from this exchange: coinbase, kraken or binance.
        #[arg(long)]
        live: Option<Feed>,
        /// How fast the simulated past of a new demo goes by until it reaches the present: 60x, or max.
        #[arg(long, default_value = "max")]
        speed: Speed,
        /// Where the demo keeps its data; the same directory continues where it was.
        #[arg(long, default_value = "tidewatch-demo")]
        data_dir: PathBuf,
        /// Where console and API are served.
        #[arg(long, default_value = "127.0.0.1:8080")]
        listen: std::net::SocketAddr,
        /// Seed of the simulators: the same seed tells the same story.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// The engine.
    #[command(
        after_help = "Example: TIDEWATCH__AUTH__SECRET=$(openssl rand -base64 48) tidewatch serve --config tidewatch.toml"
    )]
    Serve {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Serves clients for a server on another machine: signs nobody in and keeps nothing, but writes to each what its
    /// channels bring.
    #[command(
        after_help = "Example: TIDEWATCH__EDGE__CORE=http://10.0.0.5:8080 TIDEWATCH__REDIS__URL=redis://10.0.0.6 tidewatch edge"
    )]
    Edge {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Sends recorded events from files to a running server.
    #[command(
        after_help = "Example: tidewatch replay trades.parquet -w acme -s market.trades --ts ts_ns --ts-unit ns --map 'price=price_e4*0.0001' --map qty=size"
    )]
    Replay(Replay),
    /// Asks a running server in SQL.
    #[command(
        after_help = "Example: tidewatch query 'SELECT symbol, count(*) FROM market.trades GROUP BY symbol' -w acme"
    )]
    Query(Query),
    /// Which alerts a rule would have raised over the events the server still has.
    #[command(
        after_help = "Example: tidewatch backtest wide-range.toml -w acme --from 2026-01-31T00:00:00Z --to 2026-02-01T00:00:00Z\n\n\
                      The file: metric = \"vwap_1m\"\n          condition = \"vwap > 100\"\n          for = \"30s\"\n          severity = \"critical\""
    )]
    Backtest(Backtest),
    /// Validates a configuration file, an alert rule, a metric's SQL or a pack; says line, column and mend.
    #[command(
        after_help = "Example: tidewatch check tidewatch.toml\n         tidewatch check vwap_1m.sql\n         tidewatch check packs/venture"
    )]
    Check { file: PathBuf },
    /// Workspaces of a data directory.
    #[command(subcommand, after_help = "Example: tidewatch workspace create acme --owner ada@example.com")]
    Workspace(admin::WorkspaceCommand),
    /// Users of a data directory.
    #[command(subcommand, after_help = "Example: tidewatch user create ada@example.com --admin < password.txt")]
    User(admin::UserCommand),
    /// API keys of a workspace.
    #[command(
        subcommand,
        after_help = "Example: tidewatch key create collector -w acme --role member --scope stream:ingest"
    )]
    Key(admin::KeyCommand),
    /// Access tokens without a password.
    #[command(subcommand, after_help = "Example: TOKEN=$(tidewatch token create ada@example.com)")]
    Token(admin::TokenCommand),
    /// The audit log.
    #[command(subcommand, after_help = "Example: tidewatch audit verify --config tidewatch.toml")]
    Audit(admin::AuditCommand),
    /// Applies migrations to the store.
    #[command(after_help = "Example: tidewatch migrate --config tidewatch.toml")]
    Migrate {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Copies log and store into a new directory, while the server runs or not.
    #[command(after_help = "Example: tidewatch backup /backup/2026-01-31 --config tidewatch.toml")]
    Backup {
        dir: PathBuf,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Checks a backup and puts it into an empty data directory and store.
    #[command(after_help = "Example: tidewatch restore /backup/2026-01-31 --config tidewatch.toml")]
    Restore {
        dir: PathBuf,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Measures this machine: ingest, latency, memory, start-up. Prints a table, writes JSON and a page with plots.
    #[command(after_help = "Example: tidewatch bench ingest --seconds 10")]
    Bench(measure::Bench),
}

/// Of each thread of the runtime: code without optimization takes more than the default. Memory only where it is used.
const STACK_BYTES: usize = 16 << 20;

impl Command {
    /// Whether it writes what only the server's own user is to read.
    fn writes_data(&self) -> bool {
        match self {
            Self::Demo { .. } | Self::Serve { .. } | Self::Migrate { .. } | Self::Backup { .. } => true,
            Self::Restore { .. } | Self::Workspace(_) | Self::User(_) | Self::Key(_) => true,
            Self::Token(_) | Self::Audit(_) => true,
            Self::Edge { .. } | Self::Replay(_) | Self::Query(_) | Self::Backtest(_) => false,
            Self::Check { .. } | Self::Bench(_) => false,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.command.writes_data() {
        private::by_default();
    }
    server::choose_tls();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = match runtime.thread_stack_size(STACK_BYTES).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(args.command));
    // a blocking read must not hold the exit
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", told_once(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, but for those that it tells itself.
fn told_once(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told {
        told if told.is_empty() => cause,
        told if told.contains(&cause) => told,
        told => format!("{told}: {cause}"),
    })
}

async fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo { live, speed, data_dir, listen, seed } => {
            server::demo::run(server::demo::Demo { live, speed, data_dir, listen, seed }).await
        }
        Command::Serve { config } => {
            let config = config.load()?;
            let app = tokio::select! {
                app = App::build(config) => app?,
                () = server::shutdown_signal() => return Ok(()), // nothing was taken in yet
            };
            tracing::info!(address = %app.address(), "serving");
            app.serve_until(server::shutdown_signal()).await
        }
        Command::Edge { config } => server::serve_edge(config.load()?, server::shutdown_signal()).await,
        Command::Replay(args) => client::replay(args).await,
        Command::Query(args) => client::query(args).await,
        Command::Backtest(args) => client::backtest(args).await,
        Command::Check { file } => check::run(&file).await,
        Command::Workspace(command) => admin::workspace(command).await,
        Command::User(command) => admin::user(command).await,
        Command::Key(command) => admin::key(command).await,
        Command::Token(command) => admin::token(command).await,
        Command::Audit(command) => admin::audit(command).await,
        Command::Migrate { config } => {
            let config = config.load()?;
            let version = sql::store::migrate(&config.existing_store_url()?, &config.store.options()).await?;
            println!("the store is at migration {version}");
            Ok(())
        }
        Command::Backup { dir, config } => backup::backup(&config.load()?, &dir).await,
        Command::Restore { dir, config } => backup::restore(&config.load()?, &dir).await,
        Command::Bench(args) => measure::run(args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Looks at the commands below `command`; how many there are.
    fn check(command: &clap::Command, path: &str) -> usize {
        let mut seen = 0;
        for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
            let path = format!("{path} {}", below.get_name());
            let help = below.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example: ") && help.contains(&path), "`{path} --help` has no example: {help}");
            let untold = below.get_opts().find(|option| option.get_help().is_none());
            assert!(untold.is_none(), "`{path} --help` does not tell {untold:?}");
            seen += 1 + check(below, &path);
        }
        seen
    }

    #[test]
    fn an_error_says_each_cause_once() {
        let cause = std::io::Error::other("refused");
        let error = anyhow::Error::new(cause).context("cannot connect: refused").context("cannot start");
        assert_eq!(told_once(&error), "cannot start: cannot connect: refused");
    }

    #[test]
    fn every_command_has_an_example_of_itself_and_tells_its_options_and_the_version_says_whose_it_is() {
        let mut command = Args::command();
        command.build();
        assert!(check(&command, "tidewatch") > 25);
        assert!(command.render_version().starts_with("tidewatch "));
    }
}
