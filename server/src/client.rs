//! The commands that talk to a running server: `replay`, `query`.

use actors::pack::RuleFile;
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use streams::reader::{Chunk, LINE_BYTES_MAX, Mapping, Reader};
use streams::schema::{StreamSchema, UnknownFields};

/// Where the server is and who asks.
#[derive(clap::Args, Clone, Debug)]
pub struct Remote {
    /// Address of the server.
    #[arg(long, default_value = "http://127.0.0.1:8080", env = "TIDEWATCH_URL")]
    url: String,
    /// Access token or API key.
    #[arg(long, env = "TIDEWATCH_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Sign in with this address instead of a token.
    #[arg(long, env = "TIDEWATCH_EMAIL")]
    email: Option<String>,
    /// Its password.
    #[arg(long, env = "TIDEWATCH_PASSWORD", hide_env_values = true)]
    password: Option<String>,
}

struct Session {
    client: Client,
    url: String,
    token: String,
}

impl Session {
    async fn open(remote: &Remote) -> Result<Session> {
        let client = Client::builder().timeout(Duration::from_secs(120)).build()?;
        let url = remote.url.trim_end_matches('/').to_owned();
        let token = match (&remote.token, &remote.email, &remote.password) {
            (Some(token), ..) => token.clone(),
            (None, Some(email), Some(password)) => {
                let login = client.post(format!("{url}/api/v1/auth/login"));
                let answer = login.json(&json!({"email": email, "password": password})).send().await;
                let answer = answer.with_context(|| format!("no server answers at {url}; start one or pass --url"))?;
                let status = answer.status();
                let body: Value = answer.json().await?;
                match body["access_token"].as_str() {
                    Some(token) => token.to_owned(),
                    None => bail!("sign-in refused ({status}): {}", problem(&body)),
                }
            }
            _ => bail!("who asks? pass --token (or TIDEWATCH_TOKEN), or --email and --password"),
        };
        Ok(Session { client, url, token })
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token)
    }
}

fn problem(body: &Value) -> String {
    let part = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    format!("{}: {}", part("code"), part("detail"))
}

/// How fast recorded events are sent.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Pace {
    Max,
    /// So many times as fast as they happened.
    Times(f64),
}

impl std::str::FromStr for Pace {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Pace::Max);
        }
        match text.strip_suffix('x').unwrap_or(text).parse::<f64>() {
            Ok(times) if times.is_finite() && times > 0.0 => Ok(Pace::Times(times)),
            _ => Err(format!("speed `{text}` is neither max nor a factor such as 1x or 60x")),
        }
    }
}

/// Files into a stream.
#[derive(clap::Args, Debug)]
pub struct Replay {
    /// CSV, NDJSON, JSON, Parquet or XLSX; text also as .gz or .zst.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Where the events go.
    #[arg(long, short)]
    workspace: String,
    /// Of this workspace: `market.trades`, or one of its own.
    #[arg(long, short)]
    stream: String,
    /// max, or a factor of the pace at which the events happened: 1x, 60x.
    #[arg(long, default_value = "max")]
    speed: Pace,
    /// Column of the stream from a column of the file: target=source, target=source*0.0001 or target='text'.
    #[arg(long = "map", value_name = "TARGET=SOURCE")]
    map: Vec<String>,
    /// Column with the event time.
    #[arg(long, value_name = "COLUMN")]
    ts: Option<String>,
    /// What an integer event time counts: s, ms, us or ns.
    #[arg(long, default_value = "ms")]
    ts_unit: String,
    #[command(flatten)]
    remote: Remote,
}

/// What became of the events of all files.
#[derive(Default)]
struct Tally {
    accepted: u64,
    duplicates: u64,
    rejected: u64,
    unreadable: u64,
}

/// Sends the files' events, with a progress bar on stderr and the tally on stdout.
pub async fn replay(args: Replay) -> Result<()> {
    let session = Session::open(&args.remote).await?;
    let schema = schema(&session, &args.workspace, &args.stream).await?;
    let mut mapping = Mapping::default();
    for column in &args.map {
        mapping = mapping.column(column)?;
    }
    if let Some(ts) = &args.ts {
        mapping = mapping.time(ts, &args.ts_unit)?;
    } else if args.ts_unit != "ms" {
        mapping = mapping.time("ts", &args.ts_unit)?;
    }
    let mut tally = Tally::default();
    let began = Instant::now();
    for file in &args.files {
        let reader = Reader::open(file, &schema, mapping.clone(), LINE_BYTES_MAX)?;
        let bar = ProgressBar::new(reader.bytes_total());
        let style = "{msg} [{bar:32}] {percent:>3} %  {bytes}/{total_bytes}  {elapsed} ({eta} left)";
        bar.set_style(ProgressStyle::with_template(style)?.progress_chars("=> "));
        bar.set_message(file.file_name().unwrap_or_default().to_string_lossy().into_owned());
        send(&session, &args, reader, &bar, &mut tally).await?;
        bar.finish();
    }
    let seconds = began.elapsed().as_secs_f64();
    let Tally { accepted, duplicates, rejected, unreadable } = tally;
    let sent = accepted + duplicates + rejected;
    println!(
        "accepted {accepted}, duplicates {duplicates}, rejected {rejected}, unreadable rows {unreadable} in {seconds:.1} s ({:.0} events/s)",
        sent as f64 / seconds
    );
    if accepted + duplicates == 0 {
        bail!("no event was accepted");
    }
    Ok(())
}

async fn send(
    session: &Session,
    args: &Replay,
    mut reader: Reader,
    bar: &ProgressBar,
    tally: &mut Tally,
) -> Result<()> {
    let path = format!("/api/v1/workspaces/{}/streams/{}/events?ts_unit=us", args.workspace, args.stream);
    let mut pace = Pacer::new(args.speed);
    loop {
        // reading and unpacking is work for a thread of its own
        let (back, chunk) = tokio::task::spawn_blocking(move || {
            let chunk = reader.next();
            (reader, chunk)
        })
        .await?;
        reader = back;
        let chunk = match chunk {
            None => return Ok(()),
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) if error.is_row() => {
                tally.unreadable += 1;
                if tally.unreadable <= 10 {
                    bar.suspend(|| eprintln!("{error}"));
                }
                continue;
            }
            Some(Err(error)) => return Err(error.into()),
        };
        for lines in pace.pieces(&chunk) {
            pace.wait(lines.1).await;
            post(session, &path, chunk.lines[lines.0].to_vec(), bar, tally).await?;
        }
        bar.set_position(reader.bytes_read());
    }
}

/// Holds events back until their time has come.
struct Pacer {
    pace: Pace,
    first: Option<(i64, Instant)>,
}

impl Pacer {
    fn new(pace: Pace) -> Pacer {
        Pacer { pace, first: None }
    }

    /// Byte ranges to send together, each with the event time to wait for.
    fn pieces(&self, chunk: &Chunk) -> Vec<(std::ops::Range<usize>, Option<i64>)> {
        let Pace::Times(times) = self.pace else { return vec![(0..chunk.lines.len(), None)] };
        let step = (50_000.0 * times) as i64; // 50 ms of sending
        let mut pieces: Vec<(std::ops::Range<usize>, Option<i64>)> = Vec::new();
        let mut begin = 0;
        for mark in &chunk.events {
            let at = mark.ts.map(|ts| ts.0);
            match pieces.last_mut() {
                Some((range, Some(start))) if at.is_none_or(|at| at - *start < step) => range.end = mark.end,
                Some((range, start @ None)) => {
                    range.end = mark.end;
                    *start = at;
                }
                _ => pieces.push((begin..mark.end, at)),
            }
            begin = mark.end;
        }
        pieces
    }

    async fn wait(&mut self, at: Option<i64>) {
        let (Pace::Times(times), Some(at)) = (self.pace, at) else { return };
        let (first, began) = *self.first.get_or_insert((at, Instant::now()));
        let due = Duration::from_secs_f64(((at - first).max(0) as f64 / 1e6) / times);
        tokio::time::sleep_until((began + due).into()).await;
    }
}

/// Posts until the server takes it: backpressure slows the replay and loses nothing.
async fn post(session: &Session, path: &str, body: Vec<u8>, bar: &ProgressBar, tally: &mut Tally) -> Result<()> {
    loop {
        let request = session.request(reqwest::Method::POST, path).header("content-type", "application/x-ndjson");
        let answer = request.body(body.clone()).send().await?;
        let status = answer.status();
        let retry = answer.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok()).unwrap_or(1);
        let body: Value = answer.json().await?;
        match status {
            StatusCode::OK => {
                let count = |name: &str| body[name].as_u64().unwrap_or(0);
                tally.accepted += count("accepted");
                tally.duplicates += count("duplicates");
                tally.rejected += count("rejected");
                for error in body["errors"].as_array().into_iter().flatten().take(3) {
                    bar.suspend(|| eprintln!("event {}: {}", error["index"], problem(error)));
                }
                return Ok(());
            }
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                tokio::time::sleep(Duration::from_secs(retry)).await;
            }
            _ => bail!("the server refused the events ({status}): {}", problem(&body)),
        }
    }
}

async fn schema(session: &Session, workspace: &str, stream: &str) -> Result<StreamSchema> {
    let path = format!("/api/v1/workspaces/{workspace}/streams");
    let answer = session.request(reqwest::Method::GET, &path).send().await;
    let answer = answer.with_context(|| format!("no server answers at {}; start one or pass --url", session.url))?;
    let status = answer.status();
    let body: Value = answer.json().await?;
    if !status.is_success() {
        bail!("cannot read the streams of `{workspace}` ({status}): {}", problem(&body));
    }
    let streams = body["streams"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(found) = streams.iter().find(|s| s["name"] == stream) else {
        let names: Vec<&str> = streams.iter().filter_map(|s| s["name"].as_str()).collect();
        bail!("workspace `{workspace}` has no stream `{stream}`; it has {}", names.join(", "));
    };
    let columns = serde_json::from_value(found["columns"].clone())?;
    Ok(StreamSchema::new(stream.parse()?, columns, UnknownFields::Keep)?)
}

/// A question in SQL.
#[derive(clap::Args, Debug)]
pub struct Query {
    sql: String,
    /// Whose streams and metrics.
    #[arg(long, short)]
    workspace: String,
    /// How the answer is printed.
    #[arg(long, default_value = "table")]
    format: Output,
    #[command(flatten)]
    remote: Remote,
}

/// A rule over the past.
#[derive(clap::Args, Debug)]
pub struct Backtest {
    /// The rule: `metric`, `condition`, and where wanted `for` and `severity`.
    rule: PathBuf,
    /// Whose metric and events.
    #[arg(long, short)]
    workspace: String,
    /// First event time: 2026-01-31T12:00:00Z.
    #[arg(long)]
    from: String,
    /// Event time before which it ends.
    #[arg(long)]
    to: String,
    /// How the alerts are printed.
    #[arg(long, default_value = "table")]
    format: Output,
    #[command(flatten)]
    remote: Remote,
}

/// Reads a rule from a TOML file; an error names line, column and key.
pub(crate) fn rule_of(file: &Path) -> Result<RuleFile> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    toml::from_str(&text).with_context(|| format!("{shown} is no rule"))
}

/// Asks the server which alerts the rule would have raised, and prints them.
pub async fn backtest(args: Backtest) -> Result<()> {
    let rule = rule_of(&args.rule)?;
    let session = Session::open(&args.remote).await?;
    let path = format!("/api/v1/workspaces/{}/backtest", args.workspace);
    let body = json!({"rule": rule, "from": args.from, "to": args.to});
    let answer = session.request(reqwest::Method::POST, &path).json(&body).send().await;
    let answer = answer.with_context(|| format!("no server answers at {}; start one or pass --url", session.url))?;
    let status = answer.status();
    let body: Value = answer.json().await?;
    if !status.is_success() {
        bail!("{}", problem(&body));
    }
    let columns = ["started_at", "fired_at", "resolved_at", "severity", "labels", "row"];
    let rows: Vec<&Value> = body["alerts"].as_array().into_iter().flatten().collect();
    match args.format {
        Output::Json => println!("{body}"),
        Output::Csv => {
            let mut writer = csv::Writer::from_writer(std::io::stdout());
            writer.write_record(columns)?;
            for row in rows {
                writer.write_record(columns.map(|name| plain(&row[name])))?;
            }
            writer.flush()?;
        }
        Output::Table => print!("{}", table(&json!({"columns": columns, "rows": rows}))),
    }
    let seen = |name: &str| body[name].as_str().unwrap_or("-").to_owned();
    eprintln!("{} events from {} to {}", body["events"], seen("first_event"), seen("last_event"));
    Ok(())
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
enum Output {
    Table,
    Json,
    Csv,
}

/// Asks the server and prints the answer.
pub async fn query(args: Query) -> Result<()> {
    let session = Session::open(&args.remote).await?;
    let path = format!("/api/v1/workspaces/{}/query", args.workspace);
    let accept = if args.format == Output::Csv { "text/csv" } else { "application/json" };
    let request = session.request(reqwest::Method::POST, &path).header("accept", accept);
    let answer = request.json(&json!({"sql": args.sql})).send().await;
    let answer = answer.with_context(|| format!("no server answers at {}; start one or pass --url", session.url))?;
    let status = answer.status();
    let text = answer.text().await?;
    if !status.is_success() {
        let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        bail!("{}", problem(&body));
    }
    match args.format {
        Output::Csv | Output::Json => println!("{}", text.trim_end()),
        Output::Table => print!("{}", table(&serde_json::from_str(&text)?)),
    }
    Ok(())
}

/// `{columns, rows}` as text in columns.
fn table(answer: &Value) -> String {
    let text = plain;
    let name = |column: &Value| text(column.get("name").unwrap_or(column));
    let header: Vec<String> = answer["columns"].as_array().into_iter().flatten().map(name).collect();
    let rows: Vec<Vec<String>> = answer["rows"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| match row {
            Value::Array(cells) => cells.iter().map(text).collect(),
            Value::Object(cells) => header.iter().map(|name| cells.get(name).map_or_else(String::new, text)).collect(),
            other => vec![text(other)],
        })
        .collect();
    let width = |at: usize| rows.iter().chain([&header]).filter_map(|row| row.get(at)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..header.len()).map(|at| width(at).unwrap_or(0)).collect();
    let line = |row: &[String]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut out = line(&header) + &line(&rule);
    rows.iter().for_each(|row| out.push_str(&line(row)));
    out.push_str(&format!("({} rows)\n", rows.len()));
    out
}
