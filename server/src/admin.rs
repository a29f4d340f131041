//! Administration of a data directory whose server does not run: users and workspaces.

use crate::config::Config;
use actors::clock::{Clock, SystemClock};
use anyhow::{Context, Result, bail};
use engine::event::WorkspaceId;
use sql::store::{Store, User, Workspace};
use std::io::Read;
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub enum WorkspaceCommand {
    /// All workspaces.
    List {
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// A new workspace, owned by a user that exists.
    Create {
        id: WorkspaceId,
        #[arg(long)]
        name: Option<String>,
        /// E-mail address of the owner.
        #[arg(long)]
        owner: String,
        #[arg(long)]
        config: Option<PathBuf>,
    },
}

#[derive(clap::Subcommand)]
pub enum UserCommand {
    /// All users.
    List {
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// A new user; the password is read from standard input.
    Create {
        email: String,
        /// May administer the whole server.
        #[arg(long)]
        admin: bool,
        #[arg(long)]
        config: Option<PathBuf>,
    },
}

async fn store(config: Option<PathBuf>) -> Result<Store> {
    let config = Config::load(config.as_deref())?;
    Ok(Store::open_with(&config.store_url()?, &config.store.options()).await?)
}

pub async fn workspace(command: WorkspaceCommand) -> Result<()> {
    match command {
        WorkspaceCommand::List { config } => {
            for workspace in store(config).await?.all_workspaces().await? {
                println!("{}\t{}\t{}", workspace.id, workspace.tier, workspace.name);
            }
        }
        WorkspaceCommand::Create { id, name, owner, config } => {
            let store = store(config).await?;
            let user = store.user_by_email(&owner.to_lowercase()).await?;
            let user =
                user.with_context(|| format!("there is no user `{owner}`; create it with `tidewatch user create`"))?;
            let name = name.unwrap_or_else(|| id.to_string());
            let created_at = SystemClock.now();
            let workspace = Workspace { id: id.clone(), name, pack: None, tier: "free".to_owned(), created_at };
            store.create_workspace(&workspace, &user.id).await?;
            println!("created workspace {id}, owned by {owner}");
        }
    }
    Ok(())
}

pub async fn user(command: UserCommand) -> Result<()> {
    match command {
        UserCommand::List { config } => {
            for user in store(config).await?.list_users().await? {
                println!("{}\t{}\t{}", user.id, user.email, if user.admin { "admin" } else { "user" });
            }
        }
        UserCommand::Create { email, admin, config } => {
            let mut password = String::new();
            std::io::stdin().take(4096).read_to_string(&mut password)?;
            let password = password.trim_end_matches(['\r', '\n']);
            if password.chars().count() < gateway::PASSWORD_CHARS_MIN {
                bail!("the password on standard input needs at least {} characters", gateway::PASSWORD_CHARS_MIN);
            }
            let user = User {
                id: uuid::Uuid::now_v7().to_string(),
                email: email.to_lowercase(),
                password_hash: gateway::hash_password(password)?,
                admin,
                created_at: SystemClock.now(),
            };
            store(config).await?.create_user(&user).await?;
            println!("created user {email}");
        }
    }
    Ok(())
}
