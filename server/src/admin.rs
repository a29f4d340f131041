//! Administration of a data directory beside its server: users, workspaces, API keys, tokens and the audit log. What the
//! server has looked up it knows for a second longer.

use crate::config::{Config, ConfigFile};
use actors::clock::{Clock, SystemClock};
use anyhow::{Context, Result, bail, ensure};
use engine::event::WorkspaceId;
use sql::store::{AuditCheck, AuditEntry, Store, User, Workspace};
use std::io::Read;

#[derive(clap::Subcommand)]
pub enum WorkspaceCommand {
    /// All workspaces.
    #[command(after_help = "Example: tidewatch workspace list --config tidewatch.toml")]
    List {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// A new workspace, owned by a user that exists.
    #[command(after_help = "Example: tidewatch workspace create acme --owner ada@example.com --name 'Acme Capital'")]
    Create {
        id: WorkspaceId,
        /// What it is called; its id unless said.
        #[arg(long)]
        name: Option<String>,
        /// E-mail address of the owner.
        #[arg(long)]
        owner: String,
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(clap::Subcommand)]
pub enum UserCommand {
    /// All users.
    #[command(after_help = "Example: tidewatch user list --config tidewatch.toml")]
    List {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// A new user; the password is read from standard input.
    #[command(after_help = "Example: tidewatch user create ada@example.com --admin < password.txt")]
    Create {
        email: String,
        /// May administer the whole server.
        #[arg(long)]
        admin: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Another password, read from standard input; ends every sign-in.
    #[command(after_help = "Example: tidewatch user password ada@example.com < password.txt")]
    Password {
        email: String,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Takes the second factor away from a user who has lost it.
    #[command(after_help = "Example: tidewatch user reset-totp ada@example.com")]
    ResetTotp {
        email: String,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Forgets as whom the issuers know a user, and ends every sign-in: who comes next with the address is the user.
    #[command(after_help = "Example: tidewatch user reset-oidc ada@example.com")]
    ResetOidc {
        email: String,
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(clap::Subcommand)]
pub enum KeyCommand {
    /// The keys of a workspace, without the keys themselves.
    #[command(after_help = "Example: tidewatch key list -w acme")]
    List {
        /// Whose keys.
        #[arg(long, short)]
        workspace: WorkspaceId,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// A new key, printed this once.
    #[command(after_help = "Example: tidewatch key create collector -w acme --role member --scope stream:ingest")]
    Create {
        name: String,
        /// What the key is for.
        #[arg(long, short)]
        workspace: WorkspaceId,
        /// owner, admin, general_partner, associate, analyst, limited_partner, member, viewer or guest.
        #[arg(long)]
        role: String,
        /// What of the role the key may do, such as stream:ingest; all of it unless said. May be repeated.
        #[arg(long = "scope")]
        scopes: Vec<String>,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Makes a key useless.
    #[command(after_help = "Example: tidewatch key revoke 019a2b3c-0000-7000-8000-000000000000 -w acme")]
    Revoke {
        /// Its id, as `list` shows it.
        id: String,
        /// Whose key it is.
        #[arg(long, short)]
        workspace: WorkspaceId,
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(clap::Subcommand)]
pub enum TokenCommand {
    /// An access token of a user, without a password; good as long as one of a sign-in.
    #[command(after_help = "Example: TOKEN=$(tidewatch token create ada@example.com)")]
    Create {
        email: String,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Ends every sign-in of a user.
    #[command(after_help = "Example: tidewatch token revoke ada@example.com")]
    Revoke {
        email: String,
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(clap::Subcommand)]
pub enum AuditCommand {
    /// Computes the hash chain of the audit log again, and names the first entry that is not as it was written.
    #[command(after_help = "Example: tidewatch audit verify --config tidewatch.toml")]
    Verify {
        /// The hash that an earlier run printed: all before it must be what it was then.
        #[arg(long)]
        head: Option<String>,
        #[command(flatten)]
        config: ConfigFile,
    },
}

/// Notes in the audit log what was done here: by whom the operating system says, from this machine.
async fn note(store: &Store, workspace: Option<&WorkspaceId>, action: &str, target: &str) -> Result<()> {
    let user = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| "unknown".to_owned());
    let entry = AuditEntry {
        at: SystemClock.now(),
        workspace: workspace.cloned(),
        actor: format!("cli:{user}"),
        action: format!("tidewatch {action}"),
        target: target.to_owned(),
        outcome: "ok".to_owned(),
        from: "command line".to_owned(),
        request_id: String::new(),
    };
    Ok(store.audit(&entry).await?)
}

async fn store(config: ConfigFile) -> Result<Store> {
    open(&config.load()?).await
}

/// The store that is there.
async fn open(config: &Config) -> Result<Store> {
    Ok(Store::open_with(&config.existing_store_url()?, &config.store.options()).await?)
}

pub async fn workspace(command: WorkspaceCommand) -> Result<()> {
    match command {
        WorkspaceCommand::List { config } => {
            for workspace in store(config).await?.all_workspaces().await? {
                println!("{}\t{}\t{}", workspace.id, workspace.tier, workspace.name);
            }
        }
        WorkspaceCommand::Create { id, name, owner, config } => {
            let config = config.load()?;
            let (store, tier) = (open(&config).await?, config.limits.default_tier);
            let user = store.user_by_email(&owner.to_lowercase()).await?;
            let user =
                user.with_context(|| format!("there is no user `{owner}`; create it with `tidewatch user create`"))?;
            let name = name.unwrap_or_else(|| id.to_string());
            let created_at = SystemClock.now();
            let workspace = Workspace { id: id.clone(), name, pack: None, tier, created_at };
            store.create_workspace(&workspace, &user.id).await?;
            note(&store, Some(&id), "workspace create", id.as_str()).await?;
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
            let password = read_password()?;
            let user = User {
                id: uuid::Uuid::now_v7().to_string(),
                email: email.to_lowercase(),
                password_hash: gateway::hash_password(&password)?,
                admin,
                created_at: SystemClock.now(),
            };
            // the first user may come before the first start
            let config = config.load()?;
            let store = Store::open_with(&config.store_url()?, &config.store.options()).await?;
            store.create_user(&user).await?;
            note(&store, None, "user create", &email).await?;
            println!("created user {email}");
        }
        UserCommand::Password { email, config } => {
            let store = store(config).await?;
            let user = user_of(&store, &email).await?;
            store.set_password(&user.id, None, &gateway::hash_password(&read_password()?)?).await?;
            note(&store, None, "user password", &email).await?;
            println!("changed the password of {email}; every sign-in has ended");
        }
        UserCommand::ResetTotp { email, config } => {
            let store = store(config).await?;
            if !store.delete_totp(&user_of(&store, &email).await?.id).await? {
                bail!("`{email}` has no second factor");
            }
            note(&store, None, "user reset-totp", &email).await?;
            println!("{email} signs in without a second factor now");
        }
        UserCommand::ResetOidc { email, config } => {
            let store = store(config).await?;
            if !store.delete_identities(&user_of(&store, &email).await?.id).await? {
                bail!("no issuer knows `{email}`");
            }
            note(&store, None, "user reset-oidc", &email).await?;
            println!("no issuer knows {email} now; every sign-in has ended");
        }
    }
    Ok(())
}

fn read_password() -> Result<String> {
    let mut password = String::new();
    std::io::stdin().take(4096).read_to_string(&mut password)?;
    let password = password.trim_end_matches(['\r', '\n']);
    if password.chars().count() < gateway::PASSWORD_CHARS_MIN {
        bail!("the password on standard input needs at least {} characters", gateway::PASSWORD_CHARS_MIN);
    }
    Ok(password.to_owned())
}

async fn user_of(store: &Store, email: &str) -> Result<User> {
    let user = store.user_by_email(&email.to_lowercase()).await?;
    user.with_context(|| format!("there is no user `{email}`; `tidewatch user list` shows those there are"))
}

async fn has_workspace(store: &Store, id: &WorkspaceId) -> Result<()> {
    let found = store.workspace(id).await?;
    ensure!(found.is_some(), "there is no workspace `{id}`; `tidewatch workspace list` shows those there are");
    Ok(())
}

pub async fn key(command: KeyCommand) -> Result<()> {
    match command {
        KeyCommand::List { workspace, config } => {
            let store = store(config).await?;
            has_workspace(&store, &workspace).await?;
            for key in store.list_api_keys(&workspace).await? {
                let scopes = key.scopes.map_or("*".to_owned(), |scopes| scopes.join(","));
                let state = if key.revoked_at.is_some() { "revoked" } else { "good" };
                println!("{}\t{}…\t{}\t{}\t{scopes}\t{state}", key.id, key.prefix, key.name, key.role);
            }
        }
        KeyCommand::Create { name, workspace, role, scopes, config } => {
            let store = store(config).await?;
            has_workspace(&store, &workspace).await?;
            let scopes = (!scopes.is_empty()).then_some(scopes.as_slice());
            let (key, stored) = gateway::key_of(&workspace, &name, &role, scopes, SystemClock.now())?;
            store.create_api_key(&stored).await?;
            note(&store, Some(&workspace), "key create", &stored.id).await?;
            println!("{key}");
        }
        KeyCommand::Revoke { id, workspace, config } => {
            let store = store(config).await?;
            has_workspace(&store, &workspace).await?;
            if !store.revoke_api_key(&workspace, &id, SystemClock.now()).await? {
                bail!("workspace `{workspace}` has no key `{id}`, or it is revoked already");
            }
            note(&store, Some(&workspace), "key revoke", &id).await?;
            println!("revoked {id}");
        }
    }
    Ok(())
}

pub async fn token(command: TokenCommand) -> Result<()> {
    match command {
        TokenCommand::Create { email, config } => {
            let config = config.load()?;
            let auth = gateway::Auth::new(&config.auth)?;
            let store = open(&config).await?;
            let user = user_of(&store, &email).await?;
            let tokens = auth.tokens_of(&store, &user, SystemClock.now()).await?;
            note(&store, None, "token create", &email).await?;
            println!("{}", tokens.access_token);
        }
        TokenCommand::Revoke { email, config } => {
            let store = store(config).await?;
            let ended = store.revoke_families_of(&user_of(&store, &email).await?.id).await?;
            note(&store, None, "token revoke", &email).await?;
            println!("ended {ended} sign-ins of {email}");
        }
    }
    Ok(())
}

pub async fn audit(command: AuditCommand) -> Result<()> {
    let AuditCommand::Verify { head, config } = command;
    match store(config).await?.check_audit(head.as_deref()).await? {
        AuditCheck::Intact { entries, emptied, head } => {
            println!("intact: {entries} entries, {emptied} of them emptied with their workspaces, head {head}");
        }
        AuditCheck::Broken { seq } => bail!("entry {seq} is not what was written, or one before it is missing"),
        AuditCheck::Rewritten => {
            bail!("no entry has the hash that `--head` names: the log was made anew, or it is of another store")
        }
        AuditCheck::Truncated { last } => bail!("entries after {last} are missing: the last one is not the newest"),
    }
    Ok(())
}
