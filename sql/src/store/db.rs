//! The two databases behind one face: the statements of this folder are written once, with `$1` placeholders, and run
//! on SQLite or PostgreSQL. Where the dialects part, a statement asks for the [`Dialect`].
//!
//! No statement runs without a [`Scope`]. On PostgreSQL the scope is `app.workspace` of the transaction, which the
//! policies of row-level security compare with each row: a statement that forgot its `workspace = $1` sees nothing of
//! others and changes nothing of theirs.

use super::{Cause, READ_ONLY, cause};
use engine::event::{Micros, WorkspaceId};
use parking_lot::Mutex;
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgArguments, PgHasArrayType, PgPool, PgRow, PgTypeInfo, PgValueRef, Postgres};
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool, SqliteRow};
use sqlx::types::chrono::{DateTime, Utc};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, Decode, Encode, Error, Transaction, Type};
use std::borrow::Cow;
use std::io;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the database speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

/// Connections to one database.
#[derive(Clone)]
pub(super) enum Db {
    /// SQLite has one writer at a time: with one connection writers queue here, in order, instead of meeting in
    /// SQLITE_BUSY. Readers see the last committed state and never wait for it.
    Sqlite {
        writer: SqlitePool,
        readers: SqlitePool,
        file: Arc<Path>,
    },
    Postgres(Server),
}

/// A PostgreSQL server, and whether it was there when it was last needed.
#[derive(Clone)]
pub(super) struct Server {
    pool: PgPool,
    breaker: Arc<Mutex<Breaker>>,
    /// Held by the one who looks whether a server that lets callers wait is there.
    looking: Arc<tokio::sync::Mutex<()>>,
    renewed: Renewed,
}

/// When connections had to be made anew: those that are older keep what was set when they were made.
#[derive(Clone, Default)]
pub(super) struct Renewed(Arc<Mutex<Option<Instant>>>);

impl Renewed {
    /// Whether a connection of this age is younger than that.
    pub(super) fn is_fresh(&self, age: Duration) -> bool {
        self.0.lock().is_none_or(|at| age < at.elapsed())
    }
}

/// While the server is away each caller is told so at once, and once a second somebody looks whether it is back, beside
/// the callers. Otherwise every request would wait for a connection as long as `store.acquire_ms` allows, and an outage
/// of the store would become one of all.
#[derive(Default)]
struct Breaker {
    /// Nobody looks before this moment; nothing while the server is there.
    next_look: Option<Instant>,
    why: String,
    /// When somebody last looked while the server was thought to be there.
    looked: Option<Instant>,
    /// When somebody last got a connection.
    given: Option<Instant>,
}

impl Breaker {
    fn error(&self) -> Error {
        Error::Io(io::Error::new(io::ErrorKind::NotConnected, self.why.clone()))
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// https://www.postgresql.org/docs/current/errcodes-appendix.html
const TOO_MANY_CONNECTIONS: &str = "53300";

/// A caller waits this long for the pool, or for what a look finds, before it is thought that the server may be away.
const PATIENCE: Duration = Duration::from_millis(250);

/// A server that lets a new connection wait for this part of `store.acquire_ms` is away: a second by default, and longer
/// where the operator expects a slow one.
const SILENCE_SHARE: u32 = 10;

impl Server {
    pub(super) fn new(pool: PgPool, renewed: Renewed) -> Self {
        Self { pool, breaker: Arc::default(), looking: Arc::default(), renewed }
    }

    #[cfg(test)]
    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(super) fn connections_max(&self) -> u32 {
        self.pool.options().get_max_connections()
    }

    async fn begin(&self, scope: Scope<'_>) -> Result<Transaction<'static, Postgres>, Error> {
        self.expect_there().await?;
        let tried = Box::pin(self.begin_or_find_away(scope)).await; // it is large, and every statement may need it
        match &tried {
            Ok(_) => self.is_there(),
            Err(error) => self.is_away(error),
        }
        tried
    }

    /// An error where the server was away when it was last needed, and is not back.
    async fn expect_there(&self) -> Result<(), Error> {
        let look = {
            let mut breaker = self.breaker.lock();
            let Some(next_look) = breaker.next_look else { return Ok(()) };
            let is_due = next_look <= Instant::now();
            if is_due {
                breaker.next_look = Some(Instant::now() + LOOK_EVERY); // this caller looks, the others go on failing
            }
            is_due
        };
        if look {
            // a task, since the caller does not wait for a server that is silent
            let server = self.clone();
            let looked = tokio::spawn(async move {
                let found = server.knock().await;
                match &found {
                    Ok(()) => server.is_there(),
                    Err(error) => server.is_away(error),
                }
                found.is_ok()
            });
            if let Ok(Ok(true)) = tokio::time::timeout(PATIENCE, looked).await {
                return Ok(());
            }
        }
        Err(self.breaker.lock().error())
    }

    /// A pool tries for all of `store.acquire_ms` to connect to a server that refuses it, so where it takes long it is
    /// looked whether there is one.
    async fn begin_or_find_away(&self, scope: Scope<'_>) -> Result<Transaction<'static, Postgres>, Error> {
        let begun = self.pool.begin_with(AssertSqlSafe(scope.begin()));
        tokio::pin!(begun);
        if let Ok(begun) = tokio::time::timeout(PATIENCE, &mut begun).await {
            return begun;
        }
        tokio::select! {
            biased;
            begun = &mut begun => begun,
            error = self.found_away() => Err(error),
        }
    }

    /// Ends once the server is found away. Of those who wait one looks, and no more often than once a second: they may
    /// wait for nothing but a connection that others hold.
    async fn found_away(&self) -> Error {
        let _one = self.looking.lock().await;
        loop {
            let looked = {
                let breaker = self.breaker.lock();
                if breaker.next_look.is_some() {
                    return breaker.error(); // by the one before
                }
                breaker.looked
            };
            if let Some(looked) = looked {
                tokio::time::sleep_until((looked + LOOK_EVERY).into()).await;
            }
            self.breaker.lock().looked = Some(Instant::now());
            let Err(error) = self.knock().await else { continue };
            let error = match error {
                Error::Database(full) if full.code().as_deref() == Some(TOO_MANY_CONNECTIONS) && self.is_starved() => {
                    Error::Io(io::Error::new(io::ErrorKind::NotConnected, full.to_string()))
                }
                error => error,
            };
            if matches!(cause(&error), Cause::Unreachable | Cause::Refused) {
                self.is_away(&error);
                return error;
            }
        }
    }

    /// Whether nobody got a connection for a while: a server that has none left is away then, as for who needs one.
    fn is_starved(&self) -> bool {
        self.breaker.lock().given.is_none_or(|given| given.elapsed() > LOOK_EVERY)
    }

    fn is_there(&self) {
        let mut breaker = self.breaker.lock();
        breaker.given = Some(Instant::now());
        if breaker.next_look.take().is_some() {
            tracing::info!("the store can be reached again");
        }
    }

    /// Nothing, where `error` is not that the server cannot be reached.
    fn is_away(&self, error: &Error) {
        if !matches!(cause(error), Cause::Unreachable | Cause::Refused) {
            return;
        }
        let mut breaker = self.breaker.lock();
        breaker.why = error.to_string();
        if breaker.next_look.replace(Instant::now() + LOOK_EVERY).is_none() {
            tracing::warn!(%error, "the store cannot be reached; looking for it once a second");
        }
    }

    /// Whether a new connection can be made.
    async fn knock(&self) -> Result<(), Error> {
        let patience = self.pool.options().get_acquire_timeout() / SILENCE_SHARE;
        let connected = tokio::time::timeout(patience, self.pool.connect_options().connect()).await;
        let silent = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {patience:?}"));
        connected.map_err(silent)??.close().await
    }
}

/// Whose rows a statement may touch.
#[derive(Clone, Copy)]
pub(super) enum Scope<'s> {
    Workspace(&'s WorkspaceId),
    /// Rows of the whole installation: sign-in, start-up, and what compares workspaces.
    Installation,
}

impl<'s> From<&'s WorkspaceId> for Scope<'s> {
    fn from(workspace: &'s WorkspaceId) -> Self {
        Scope::Workspace(workspace)
    }
}

impl Scope<'_> {
    /// Opens a transaction of PostgreSQL within this scope, in one round trip. A workspace id has no character that
    /// would need quoting.
    fn begin(self) -> String {
        let seen = match self {
            Scope::Workspace(id) => id.as_str(),
            Scope::Installation => "*",
        };
        format!("BEGIN; SET LOCAL app.workspace = '{seen}'")
    }
}

impl Db {
    pub(super) fn dialect(&self) -> Dialect {
        match self {
            Db::Sqlite { .. } => Dialect::Sqlite,
            Db::Postgres(_) => Dialect::Postgres,
        }
    }

    /// A transaction that may write. On SQLite it takes the write lock at once: one that reads first and locks later
    /// would fail when another process wrote in between.
    pub(super) async fn begin(&self, scope: Scope<'_>) -> Result<Tx, Error> {
        Ok(match self {
            Db::Sqlite { writer, .. } => Tx::Sqlite(writer.begin_with("BEGIN IMMEDIATE").await?),
            Db::Postgres(server) => Tx::Postgres(server.begin(scope).await?),
        })
    }

    /// Makes connections anew where what `error` says may have been set for the sessions of a time: one that may only
    /// read goes on so when nobody wants it any more.
    pub(super) fn heard(&self, error: &Error) {
        if let (Db::Postgres(server), Error::Database(error)) = (self, error)
            && error.code().as_deref() == Some(READ_ONLY)
        {
            *server.renewed.0.lock() = Some(Instant::now());
        }
    }

    /// Waits for running statements and closes all connections.
    pub(super) async fn close(&self) {
        match self {
            Db::Sqlite { writer, readers, .. } => {
                // The writer last: the last connection to close folds the write-ahead log, and a reader may not write.
                readers.close().await;
                writer.close().await;
            }
            Db::Postgres(server) => server.pool.close().await,
        }
    }
}

/// A transaction: rolled back unless it is committed.
pub(super) enum Tx {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Tx {
    pub(super) fn dialect(&self) -> Dialect {
        match self {
            Tx::Sqlite(_) => Dialect::Sqlite,
            Tx::Postgres(_) => Dialect::Postgres,
        }
    }

    pub(super) async fn commit(self) -> Result<(), Error> {
        match self {
            Tx::Sqlite(tx) => tx.commit().await,
            Tx::Postgres(tx) => tx.commit().await,
        }
    }
}

/// Where a statement runs.
pub(super) enum On<'t> {
    /// By itself, reading; it sees what is committed.
    Read(&'t Db, Scope<'t>),
    /// By itself, writing.
    Write(&'t Db, Scope<'t>),
    Tx(&'t mut Tx),
}

impl<'t> From<&'t mut Tx> for On<'t> {
    fn from(tx: &'t mut Tx) -> Self {
        On::Tx(tx)
    }
}

/// A value for a placeholder.
#[derive(Clone, Debug)]
pub(super) enum Arg<'q> {
    Int(Option<i64>),
    Bool(Option<bool>),
    /// An amount: NUMERIC with every digit of the double in PostgreSQL, REAL in SQLite.
    Amount(f64),
    Text(Option<Cow<'q, str>>),
    Bytes(Option<Cow<'q, [u8]>>),
    Time(Option<Micros>),
}

macro_rules! args {
    ($($from:ty => |$value:ident| $arg:expr),* $(,)?) => {
        $(impl<'q> From<$from> for Arg<'q> { fn from($value: $from) -> Self { $arg } })*
    };
}
args! {
    i64 => |n| Arg::Int(Some(n)),
    bool => |b| Arg::Bool(Some(b)),
    f64 => |x| Arg::Amount(x),
    Micros => |at| Arg::Time(Some(at)),
    Option<Micros> => |at| Arg::Time(at),
    &'q str => |text| Arg::Text(Some(text.into())),
    &'q String => |text| Arg::Text(Some(text.as_str().into())),
    String => |text| Arg::Text(Some(text.into())),
    Option<String> => |text| Arg::Text(text.map(Into::into)),
    Option<&'q str> => |text| Arg::Text(text.map(Into::into)),
    &'q Option<String> => |text| Arg::Text(text.as_deref().map(Into::into)),
    &'q [u8] => |bytes| Arg::Bytes(Some(bytes.into())),
    Option<&'q [u8]> => |bytes| Arg::Bytes(bytes.map(Into::into)),
}

impl Arg<'_> {
    fn add_sqlite(self, to: &mut SqliteArguments) -> Result<(), BoxDynError> {
        match self {
            Arg::Int(n) => Arguments::add(to, n),
            Arg::Bool(b) => Arguments::add(to, b),
            Arg::Amount(x) => Arguments::add(to, x),
            Arg::Text(text) => Arguments::add(to, text.map(Cow::into_owned)),
            Arg::Bytes(bytes) => Arguments::add(to, bytes.map(Cow::into_owned)),
            Arg::Time(at) => Arguments::add(to, at.map(|at| at.0)),
        }
    }

    fn add_postgres(self, to: &mut PgArguments) -> Result<(), BoxDynError> {
        match self {
            Arg::Int(n) => to.add(n),
            Arg::Bool(b) => to.add(b),
            Arg::Amount(x) => to.add(amount(x)),
            Arg::Text(text) => to.add(text.map(without_nul)),
            Arg::Bytes(bytes) => to.add(bytes.as_deref()),
            Arg::Time(at) => to.add(at.map(Timestamp)),
        }
    }
}

/// A double in decimal, as few digits as tell it from its neighbours: what NUMERIC is to hold.
fn amount(x: f64) -> String {
    x.to_string()
}

/// PostgreSQL's text has no NUL, and an event refused for one must not stop the commit that reports it: U+2400 ("␀")
/// stands in its place.
pub(super) fn without_nul(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{2400}").into() } else { text }
}

/// A TIMESTAMPTZ. What PostgreSQL cannot hold, before 4713 BC and after the year 294276, is its -infinity or infinity,
/// and those are [`Micros::MIN`] and [`Micros::MAX`].
#[derive(Clone, Copy)]
pub(super) struct Timestamp(Micros);

/// 2000-01-01T00:00:00Z, from which PostgreSQL counts.
const EPOCH_2000: i64 = 946_684_800_000_000;
/// 4713-01-01 BC in the Julian calendar, PostgreSQL's first instant.
const FIRST: i64 = -210_866_803_200_000_000;

impl Type<Postgres> for Timestamp {
    fn type_info() -> PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl PgHasArrayType for Timestamp {
    fn array_type_info() -> PgTypeInfo {
        <DateTime<Utc> as PgHasArrayType>::array_type_info()
    }
}

impl Encode<'_, Postgres> for Timestamp {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        let at = match self.0.0 {
            at if at < FIRST => i64::MIN,
            i64::MAX => i64::MAX,
            at => at - EPOCH_2000,
        };
        Encode::<Postgres>::encode(at, buffer)
    }
}

impl<'r> Decode<'r, Postgres> for Timestamp {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        Ok(Timestamp(Micros(match <i64 as Decode<Postgres>>::decode(value)? {
            infinite @ (i64::MIN | i64::MAX) => infinite,
            at => at + EPOCH_2000,
        })))
    }
}

/// A row of an answer.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

/// A Rust type that columns of both databases turn into.
pub(super) trait Field:
    for<'r> Decode<'r, Sqlite> + Type<Sqlite> + for<'r> Decode<'r, Postgres> + Type<Postgres>
{
}
impl<T> Field for T where T: for<'r> Decode<'r, Sqlite> + Type<Sqlite> + for<'r> Decode<'r, Postgres> + Type<Postgres> {}

impl Row {
    /// The value in a column by name.
    pub(super) fn try_get<T: Field>(&self, column: &str) -> Result<T, Error> {
        match self {
            Row::Sqlite(row) => sqlx::Row::try_get(row, column),
            Row::Postgres(row) => sqlx::Row::try_get(row, column),
        }
    }

    fn first<T: Field>(&self) -> Result<T, Error> {
        match self {
            Row::Sqlite(row) => sqlx::Row::try_get(row, 0),
            Row::Postgres(row) => sqlx::Row::try_get(row, 0),
        }
    }

    /// A time by the name of its column.
    pub(super) fn instant(&self, column: &str) -> Result<Option<Micros>, Error> {
        Ok(match self {
            Row::Sqlite(row) => sqlx::Row::try_get::<Option<i64>, _>(row, column)?.map(Micros),
            Row::Postgres(row) => sqlx::Row::try_get::<Option<Timestamp>, _>(row, column)?.map(|at| at.0),
        })
    }
}

/// A record made of a row.
pub(super) trait FromRow: Sized {
    fn from_row(row: &Row) -> Result<Self, Error>;
}

/// A statement with its values.
pub(super) struct Query<'q> {
    sql: Cow<'static, str>,
    args: Vec<Arg<'q>>,
    persistent: bool,
}

/// A statement that answers with rows or with nothing.
pub(super) fn query<'q>(sql: impl Into<Cow<'static, str>>) -> Query<'q> {
    Query { sql: sql.into(), args: Vec::new(), persistent: true }
}

/// A statement whose rows are records.
pub(super) fn query_as<'q, R: FromRow>(sql: impl Into<Cow<'static, str>>) -> QueryAs<'q, R> {
    QueryAs(query(sql), PhantomData)
}

/// A statement whose rows are one value each.
pub(super) fn query_scalar<'q, T: Field>(sql: impl Into<Cow<'static, str>>) -> QueryScalar<'q, T> {
    QueryScalar(query(sql), PhantomData)
}

impl<'q> Query<'q> {
    pub(super) fn bind(mut self, value: impl Into<Arg<'q>>) -> Self {
        self.args.push(value.into());
        self
    }

    /// Whether the database keeps the statement prepared.
    pub(super) fn persistent(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    fn for_sqlite(self) -> Result<sqlx::query::Query<'static, Sqlite, SqliteArguments>, Error> {
        let mut values = SqliteArguments::default();
        self.args.into_iter().try_for_each(|arg| arg.add_sqlite(&mut values)).map_err(Error::Encode)?;
        Ok(sqlx::query_with(AssertSqlSafe(self.sql), values).persistent(self.persistent))
    }

    fn for_postgres(self) -> Result<sqlx::query::Query<'static, Postgres, PgArguments>, Error> {
        let mut values = PgArguments::default();
        self.args.into_iter().try_for_each(|arg| arg.add_postgres(&mut values)).map_err(Error::Encode)?;
        Ok(sqlx::query_with(AssertSqlSafe(self.sql), values).persistent(self.persistent))
    }

    /// Runs it: how many rows it wrote.
    pub(super) async fn execute<'t>(self, on: impl Into<On<'t>>) -> Result<u64, Error> {
        match on.into() {
            On::Read(Db::Sqlite { readers, .. }, _) => Ok(self.for_sqlite()?.execute(readers).await?.rows_affected()),
            On::Write(Db::Sqlite { writer, .. }, _) => Ok(self.for_sqlite()?.execute(writer).await?.rows_affected()),
            On::Tx(Tx::Sqlite(tx)) => Ok(self.for_sqlite()?.execute(&mut **tx).await?.rows_affected()),
            On::Tx(Tx::Postgres(tx)) => Ok(self.for_postgres()?.execute(&mut **tx).await?.rows_affected()),
            On::Read(Db::Postgres(server), scope) | On::Write(Db::Postgres(server), scope) => {
                let mut tx = server.begin(scope).await?;
                let written = self.for_postgres()?.execute(&mut *tx).await?.rows_affected();
                tx.commit().await?;
                Ok(written)
            }
        }
    }

    /// Runs it to its last row, so that a write with RETURNING hears whether its commit succeeded.
    pub(super) async fn fetch_all<'t>(self, on: impl Into<On<'t>>) -> Result<Vec<Row>, Error> {
        let of_sqlite = |rows: Vec<SqliteRow>| rows.into_iter().map(Row::Sqlite).collect();
        let of_postgres = |rows: Vec<PgRow>| rows.into_iter().map(Row::Postgres).collect();
        match on.into() {
            On::Read(Db::Sqlite { readers, .. }, _) => self.for_sqlite()?.fetch_all(readers).await.map(of_sqlite),
            On::Write(Db::Sqlite { writer, .. }, _) => self.for_sqlite()?.fetch_all(writer).await.map(of_sqlite),
            On::Tx(Tx::Sqlite(tx)) => self.for_sqlite()?.fetch_all(&mut **tx).await.map(of_sqlite),
            On::Tx(Tx::Postgres(tx)) => self.for_postgres()?.fetch_all(&mut **tx).await.map(of_postgres),
            On::Read(Db::Postgres(server), scope) | On::Write(Db::Postgres(server), scope) => {
                let mut tx = server.begin(scope).await?;
                let rows = self.for_postgres()?.fetch_all(&mut *tx).await?;
                tx.commit().await?;
                Ok(of_postgres(rows))
            }
        }
    }

    pub(super) async fn fetch_optional<'t>(self, on: impl Into<On<'t>>) -> Result<Option<Row>, Error> {
        Ok(self.fetch_all(on).await?.into_iter().next())
    }
}

/// See [`query_as`].
pub(super) struct QueryAs<'q, R>(Query<'q>, PhantomData<R>);

impl<'q, R: FromRow> QueryAs<'q, R> {
    pub(super) fn bind(self, value: impl Into<Arg<'q>>) -> Self {
        Self(self.0.bind(value), PhantomData)
    }

    pub(super) async fn fetch_all<'t>(self, on: impl Into<On<'t>>) -> Result<Vec<R>, Error> {
        self.0.fetch_all(on).await?.iter().map(R::from_row).collect()
    }

    pub(super) async fn fetch_optional<'t>(self, on: impl Into<On<'t>>) -> Result<Option<R>, Error> {
        self.0.fetch_optional(on).await?.as_ref().map(R::from_row).transpose()
    }
}

/// See [`query_scalar`].
pub(super) struct QueryScalar<'q, T>(Query<'q>, PhantomData<T>);

impl<'q, T: Field> QueryScalar<'q, T> {
    pub(super) fn bind(self, value: impl Into<Arg<'q>>) -> Self {
        Self(self.0.bind(value), PhantomData)
    }

    pub(super) async fn fetch_one<'t>(self, on: impl Into<On<'t>>) -> Result<T, Error> {
        self.fetch_optional(on).await?.ok_or(Error::RowNotFound)
    }

    pub(super) async fn fetch_optional<'t>(self, on: impl Into<On<'t>>) -> Result<Option<T>, Error> {
        self.0.fetch_optional(on).await?.as_ref().map(Row::first).transpose()
    }

    pub(super) async fn fetch_all<'t>(self, on: impl Into<On<'t>>) -> Result<Vec<T>, Error> {
        self.0.fetch_all(on).await?.iter().map(Row::first).collect()
    }
}

/// A statement put together piece by piece; values become its placeholders.
pub(super) struct Builder<'q> {
    sql: String,
    args: Vec<Arg<'q>>,
}

impl<'q> Builder<'q> {
    pub(super) fn new(sql: &str) -> Self {
        Self { sql: sql.to_owned(), args: Vec::new() }
    }

    pub(super) fn push(&mut self, sql: &str) -> &mut Self {
        self.sql.push_str(sql);
        self
    }

    pub(super) fn push_bind(&mut self, value: impl Into<Arg<'q>>) -> &mut Self {
        self.args.push(value.into());
        self.sql.push('$');
        self.sql.push_str(&self.args.len().to_string());
        self
    }

    pub(super) fn build(self) -> Query<'q> {
        Query { sql: self.sql.into(), args: self.args, persistent: true }
    }

    pub(super) fn build_as<R: FromRow>(self) -> QueryAs<'q, R> {
        QueryAs(self.build(), PhantomData)
    }
}

/// The values of one column for many rows, sent to PostgreSQL as one array.
pub(super) enum Column<'q> {
    Int(Vec<Option<i64>>),
    Bool(Vec<Option<bool>>),
    Amount(Vec<String>),
    Text(Vec<Option<Cow<'q, str>>>),
    Bytes(Vec<Option<Cow<'q, [u8]>>>),
    Time(Vec<Option<Timestamp>>),
}

impl<'q> Column<'q> {
    pub(super) fn of(first: &Arg<'q>, rows: usize) -> Self {
        match first {
            Arg::Int(_) => Column::Int(Vec::with_capacity(rows)),
            Arg::Bool(_) => Column::Bool(Vec::with_capacity(rows)),
            Arg::Amount(_) => Column::Amount(Vec::with_capacity(rows)),
            Arg::Text(_) => Column::Text(Vec::with_capacity(rows)),
            Arg::Bytes(_) => Column::Bytes(Vec::with_capacity(rows)),
            Arg::Time(_) => Column::Time(Vec::with_capacity(rows)),
        }
    }

    pub(super) fn push(&mut self, value: Arg<'q>) {
        match (self, value) {
            (Column::Int(all), Arg::Int(n)) => all.push(n),
            (Column::Bool(all), Arg::Bool(b)) => all.push(b),
            (Column::Amount(all), Arg::Amount(x)) => all.push(amount(x)),
            (Column::Text(all), Arg::Text(text)) => all.push(text.map(without_nul)),
            (Column::Bytes(all), Arg::Bytes(bytes)) => all.push(bytes),
            (Column::Time(all), Arg::Time(at)) => all.push(at.map(Timestamp)),
            (_, value) => panic!("a column got a value of another type: {value:?}"),
        }
    }

    /// The type of the array, and what turns one of its elements into the column's type.
    pub(super) fn types(&self) -> (&'static str, &'static str) {
        match self {
            Column::Int(_) => ("int8[]", ""),
            Column::Bool(_) => ("bool[]", ""),
            Column::Amount(_) => ("text[]", "::numeric"),
            Column::Text(_) => ("text[]", ""),
            Column::Bytes(_) => ("bytea[]", ""),
            Column::Time(_) => ("timestamptz[]", ""),
        }
    }

    fn add(self, to: &mut PgArguments) -> Result<(), BoxDynError> {
        match self {
            Column::Int(all) => to.add(all),
            Column::Bool(all) => to.add(all),
            Column::Amount(all) => to.add(all),
            Column::Text(all) => to.add(all.iter().map(Option::as_deref).collect::<Vec<_>>()),
            Column::Bytes(all) => to.add(all.iter().map(Option::as_deref).collect::<Vec<_>>()),
            Column::Time(all) => to.add(all),
        }
    }
}

/// Runs a statement of PostgreSQL over whole columns: how many rows it wrote.
pub(super) async fn execute_columns(
    tx: &mut Transaction<'static, Postgres>,
    sql: String,
    columns: Vec<Column<'_>>,
) -> Result<u64, Error> {
    let mut values = PgArguments::default();
    columns.into_iter().try_for_each(|column| column.add(&mut values)).map_err(Error::Encode)?;
    Ok(sqlx::query_with(AssertSqlSafe(sql), values).execute(&mut **tx).await?.rows_affected())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sqlx::postgres::PgPoolOptions;
    use std::net::TcpListener;

    const ACQUIRE: Duration = Duration::from_secs(10);

    fn server(port: u16) -> Server {
        let url = format!("postgres://nobody@127.0.0.1:{port}/none?sslmode=disable");
        Server::new(PgPoolOptions::new().acquire_timeout(ACQUIRE).connect_lazy(&url).unwrap(), Renewed::default())
    }

    /// How long a caller waits to be told that the server is away.
    async fn told(server: &Server) -> Duration {
        let began = Instant::now();
        let error = server.begin(Scope::Installation).await.err().unwrap();
        assert!(matches!(cause(&error), Cause::Unreachable), "{error}");
        began.elapsed()
    }

    /// Real time, since what waits is a socket. Callers come for some seconds, so that some of them are those who look.
    async fn nobody_waits_long(server: Server) {
        let first = told(&server).await;
        assert!(first < ACQUIRE / 2, "found away after {first:?}");
        let began = Instant::now();
        while began.elapsed() < 3 * LOOK_EVERY {
            let waited = told(&server).await;
            assert!(waited < LOOK_EVERY, "told after {waited:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_server_that_refuses_connections_keeps_nobody_waiting() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        nobody_waits_long(server(port)).await;
    }

    #[tokio::test]
    async fn a_server_that_is_silent_keeps_nobody_waiting() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        nobody_waits_long(server(silent.local_addr().unwrap().port())).await;
    }
}
