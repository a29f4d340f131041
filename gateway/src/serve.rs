//! The server: connections within bounds, answers until the last one when it drains.

use crate::config::Config;
use crate::problem::{self, Problem};
use crate::tls::Tls;
use crate::{AppState, edge, routes};
use actors::Part;
use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::header::{EXPECT, HOST};
use axum::http::{HeaderMap, HeaderName, StatusCode, Version};
use axum::middleware::from_fn;
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::{Request, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::ServiceExt;

/// A client has this long to send the head of a request, and an HTTP/2 client to begin one once none is left.
const HEAD_WAIT: Duration = Duration::from_secs(15);
/// Requests in flight and open sockets have this long to end once the server drains.
const DRAIN: Duration = Duration::from_secs(5);
/// After an error of `accept`, such as no file descriptors, some time must pass for it to go away.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// A warning about clients is told this often at most, however many there are.
const WARN_EVERY: Duration = Duration::from_secs(10);
/// Clients of a server that is starting wait this long for it,
const SHORT_START: Duration = Duration::from_secs(4);
/// and then come again after this.
const START_WAIT: Duration = Duration::from_secs(1);
/// Requests at the same time on one HTTP/2 connection.
const STREAMS_MAX: u32 = 128;

/// Serves until `shutdown` completes, then drains: takes no new connection, finishes requests in flight, tells
/// WebSocket clients to come back later. Returns within five seconds of that, which leaves
/// time to commit what the system holds.
///
/// Fails only where `metrics_listen` or `listen_tls` of `config` cannot be bound, or has no certificate.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    config: &Config,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    if let Some(address) = config.metrics_listen {
        let listener = TcpListener::bind(address).await?;
        let router = Router::new().route("/metrics", get(routes::prometheus)).with_state(state.clone());
        let closing = state.closing.clone();
        // its connections carry no promise: whoever reads figures asks again
        tokio::spawn(axum::serve(listener, router).with_graceful_shutdown(closing.cancelled_owned()).into_future());
    }
    let router = crate::router(state.clone());
    serve_router(listener, router, config, &state.closing, shutdown).await
}

/// Connections that wait to be accepted: where the system allows fewer, so many. Of those beyond, which the usual 128 are
/// when some hundred come at once, each comes again after a second.
const BACKLOG: u32 = 4_096;

/// Takes connections at `address`.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves `router` on `listener` and `listen_tls` until `shutdown`, then drains.
pub(crate) async fn serve_router(
    listener: TcpListener,
    router: Router,
    config: &Config,
    closing: &CancellationToken,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let tls = match config.listen_tls {
        None => None,
        Some(address) => {
            let tls = Arc::new(Tls::load(&config.tls).map_err(io::Error::other)?);
            tokio::spawn(tls.clone().watch());
            Some((listen(address)?, tls))
        }
    };
    let open = answer(&listener, tls.as_ref(), router, config, shutdown).await;
    drop((listener, tls));
    closing.cancel();
    open.end(DRAIN).await;
    Ok(())
}

/// Connections that were open when no new ones were taken any more.
struct Open {
    stop: CancellationToken,
    permits: Arc<Semaphore>,
    permits_max: u32,
}

impl Open {
    /// Finishes requests in flight; what is not done within `within` is cut off.
    async fn end(self, within: Duration) {
        self.stop.cancel();
        // each connection holds its permit until its socket is closed, upgraded or not
        if tokio::time::timeout(within, self.permits.acquire_many(self.permits_max)).await.is_err() {
            tracing::warn!(?within, "not all connections ended in time; they are cut off");
        }
    }
}

/// Takes connections, as many at a time as `limits.connections`, and answers them by `router` until `shutdown`.
async fn answer(
    listener: &TcpListener,
    tls: Option<&(TcpListener, Arc<Tls>)>,
    router: Router,
    config: &Config,
    shutdown: impl Future<Output = ()>,
) -> Open {
    let permits_max = u32::try_from(config.limits.connections).unwrap_or(u32::MAX);
    let permits = Arc::new(Semaphore::new(permits_max as usize));
    let (stop, builder) = (CancellationToken::new(), Arc::new(http(HEAD_WAIT)));
    let addresses = Addresses::default();
    let most = config.limits.http_connections_per_address;
    let (mut not_accepted, mut too_many) = (Seldom::default(), Seldom::default());
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted_tls = async {
            match tls {
                Some((listener, tls)) => listener.accept().await.map(|accepted| (accepted, Some(tls.clone()))),
                None => std::future::pending().await,
            }
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.map(|accepted| (accepted, None)),
            accepted = accepted_tls => accepted,
            () = &mut shutdown => return Open { stop, permits, permits_max },
        };
        let ((stream, peer), tls) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if not_accepted.is_due() {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        // closed at once: a client sees that it was refused instead of waiting for an answer
        let refused = || metrics::counter!("tidewatch_connections_refused_total").increment(1);
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            refused();
            continue;
        };
        let is_trusted = config.trusted_proxies.iter().any(|net| net.contains(&peer.ip()));
        let place = if is_trusted { None } else { addresses.enter(peer.ip(), most) };
        if !is_trusted && place.is_none() {
            if too_many.is_due() {
                let address = peer.ip();
                tracing::warn!(
                    %address,
                    "an address has as many connections as limits.http_connections_per_address = {most}; further ones are \
                     closed. Name a proxy in `trusted_proxies`"
                );
            }
            refused();
            continue;
        }
        _ = stream.set_nodelay(true); // slower without, not wrong
        let in_use = Arc::new(Use::default());
        let service = service(router.clone(), peer, is_trusted, in_use.clone());
        let (builder, stop) = (builder.clone(), stop.clone());
        tokio::spawn(async move {
            let stream = match tls {
                None => Stream::Plain(stream),
                Some(tls) => match tls.accept(stream).await {
                    Some(stream) => Stream::Tls(Box::new(stream)),
                    None => return,
                },
            };
            let io = TokioIo::new(Counted { stream, permit, place });
            if let Err(error) = converse(io, &builder, service, &in_use, HEAD_WAIT, &stop).await {
                tracing::debug!(%error, %peer, "a connection ended");
            }
        });
    }
}

/// How HTTP is spoken to clients that have `wait` for the head of a request.
fn http(wait: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(wait);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
    builder
}

/// Serves one connection until its client leaves or begins no request for about as long as `wait`, or until `stop`:
/// what was begun then is finished.
async fn converse<S>(
    io: TokioIo<Counted>,
    builder: &Builder<TokioExecutor>,
    service: S,
    in_use: &Use,
    wait: Duration,
    stop: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    S: hyper::service::Service<Request<Incoming>, Response = hyper::Response<Answer>, Error = Infallible>,
    S::Future: Send + 'static,
{
    let mut connection = pin!(builder.serve_connection_with_upgrades(io, service));
    tokio::select! {
        ended = connection.as_mut() => return ended,
        // hyper waits for ever for the bytes that tell the version, and for the first request of HTTP/2
        () = in_use.ends(wait) => {}
        () = stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        ended = connection => ended,
        // whoever does not let go is cut off
        () = in_use.ends(wait) => Ok(()),
    }
}

/// How much a connection is used.
#[derive(Default)]
struct Use {
    /// Requests that are being answered.
    open: AtomicUsize,
    /// How often one began or ended.
    changes: AtomicUsize,
}

impl Use {
    fn begin(self: &Arc<Self>) -> InUse {
        self.open.fetch_add(1, Relaxed);
        self.changes.fetch_add(1, Relaxed);
        InUse(self.clone())
    }

    /// Returns once no request was there for `wait`, or some time later: less than `wait`.
    async fn ends(&self, wait: Duration) {
        loop {
            let before = self.changes.load(Relaxed);
            tokio::time::sleep(wait).await;
            if self.open.load(Relaxed) == 0 && self.changes.load(Relaxed) == before {
                return;
            }
        }
    }
}

/// A request that is being answered, until the last byte of the answer is taken.
struct InUse(Arc<Use>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.changes.fetch_add(1, Relaxed);
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// An answer's body, while which the connection is in use.
struct Answer {
    body: axum::body::Body,
    _in_use: InUse,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How many connections there are from which address.
#[derive(Clone, Default)]
struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Addresses {
    /// Counts a connection for as long as what it gets lives; nothing where there are `most` already.
    fn enter(&self, address: IpAddr, most: usize) -> Option<Place> {
        let mut all = self.0.lock();
        let count = all.get(&address).copied().unwrap_or_default();
        if count >= most {
            return None;
        }
        all.insert(address, count + 1);
        Some(Place { all: self.clone(), address })
    }
}

/// What a connection counts as, of those from its address.
struct Place {
    all: Addresses,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Entry::Occupied(mut count) = all.entry(self.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// What is not to be told each time.
#[derive(Default)]
struct Seldom(Option<Instant>);

impl Seldom {
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let is_due = self.0.is_none_or(|told| now.duration_since(told) >= WARN_EVERY);
        if is_due {
            self.0 = Some(now);
        }
        is_due
    }
}

/// A server that is not ready yet: it says that it lives, what it waits for, and that clients may come again.
///
/// Ends when it is dropped.
pub struct Starting {
    waits: Waits,
    stop: DropGuard,
    listener: JoinHandle<TcpListener>,
}

/// What a start waits for.
type Waits = Arc<Mutex<Part>>;

impl Starting {
    /// Answers on `listener` until the server is ready. The first seconds clients just wait there, so that a usual start
    /// refuses nobody.
    pub fn serve(listener: TcpListener, config: &Config) -> Starting {
        let waits: Waits = Arc::new(Mutex::new(waiting("log", "is being read")));
        let stop = CancellationToken::new();
        let (router, config, stopped) = (starting_router(waits.clone(), config), config.clone(), stop.clone());
        let listener = tokio::spawn(async move {
            if tokio::time::timeout(SHORT_START, stopped.cancelled()).await.is_ok() {
                return listener;
            }
            let open = answer(&listener, None, router, &config, stopped.cancelled()).await;
            tokio::spawn(open.end(DRAIN)); // none of its answers takes long
            listener
        });
        Starting { waits, stop: stop.drop_guard(), listener }
    }

    /// From now on the start waits for `part`, one that `/ready` lists, because of `why`.
    pub fn waits_for(&self, part: &'static str, why: impl Into<String>) {
        *self.waits.lock() = waiting(part, why);
    }

    /// The listener, on which clients wait meanwhile for the server.
    pub async fn end(self) -> io::Result<TcpListener> {
        drop(self.stop);
        self.listener.await.map_err(io::Error::other)
    }
}

fn waiting(name: &'static str, why: impl Into<String>) -> Part {
    Part { name, ok: false, detail: why.into(), can_wait: false }
}

/// Nothing but `/health` and `/ready` is served: anything else is told to come again.
fn starting_router(waits: Waits, config: &Config) -> Router {
    let all = waits.clone();
    let ready = move || {
        let part = waits.lock().clone();
        std::future::ready(routes::not_ready(std::slice::from_ref(&part), &[part.to_string()]))
    };
    let fallback = move || {
        let detail = format!("the server is starting; {}; try again", *all.lock());
        let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", detail);
        std::future::ready(problem.retry_after(START_WAIT))
    };
    Router::new()
        .route("/health", get(routes::health))
        .route("/ready", get(ready))
        .fallback(fallback)
        .layer(from_fn(problem::document_errors))
        .layer(crate::cors(&config.cors_origins))
        .layer(from_fn(edge::identify))
}

/// How a node says that it serves clients for this one.
pub(crate) const NODE: HeaderName = HeaderName::from_static("x-tidewatch-node");
/// For whom a request is passed on.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// In requests of a node that serves clients for this one.
#[derive(Clone, Copy)]
pub(crate) struct FromNode;

/// In requests that nodes passed on, as they say: how many.
#[derive(Clone, Copy)]
pub(crate) struct Nodes(pub(crate) u8);

/// Whose request a proxy passes on: the last address that it names, which is the one it saw itself.
fn forwarded_for(headers: &HeaderMap) -> Option<IpAddr> {
    headers.get_all(FORWARDED_FOR).iter().next_back()?.to_str().ok()?.rsplit(',').next()?.trim().parse().ok()
}

/// The router as hyper calls it, with the client's address in each request. A proxy that `is_trusted` says whose it is.
fn service(
    router: Router,
    peer: SocketAddr,
    is_trusted: bool,
    in_use: Arc<Use>,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = hyper::Response<Answer>,
    Error = Infallible,
    Future: Send + 'static,
> {
    service_fn(move |request: Request<Incoming>| {
        let in_use = in_use.begin();
        // whoever asks first gets its answer and sends nothing; HTTP/2 tells the client to stop
        let lingers = request.version() < Version::HTTP_2 && !request.headers().contains_key(EXPECT);
        let mut request = request.map(|body| axum::body::Body::new(Whole { body: Some(body), lingers }));
        let client = forwarded_for(request.headers()).filter(|_| is_trusted);
        request.extensions_mut().insert(ConnectInfo(client.map_or(peer, |address| SocketAddr::new(address, 0))));
        if let Some(nodes) = request.headers().get(NODE) {
            let nodes = nodes.to_str().ok().and_then(|nodes| nodes.parse().ok()).unwrap_or(1);
            request.extensions_mut().insert(Nodes(nodes));
            if is_trusted {
                request.extensions_mut().insert(FromNode);
            }
        }
        let refused = has_its_host(&request).err();
        let answer = router.clone().oneshot(request);
        async move {
            let answer = match refused {
                None => answer.await?,
                Some(problem) => problem.into_response(),
            };
            Ok(answer.map(|body| Answer { body, _in_use: in_use }))
        }
    })
}

/// Who reads another host than the one that the client meant answers another question: RFC 9112, section 3.2.
fn has_its_host<B>(request: &Request<B>) -> Result<(), Problem> {
    let hosts = request.headers().get_all(HOST).iter().count();
    match request.version() {
        Version::HTTP_11 if hosts == 0 => Err("HTTP/1.1 asks for a `host` header"),
        _ if hosts > 1 => Err("send one `host` header"),
        _ => Ok(()),
    }
    .map_err(|detail| Problem::invalid("bad_host", detail))
}

/// What a client still sends once it is answered is read for so long and so far. Otherwise the connection would end
/// with bytes that nobody took, whereupon the client's system forgets the answer and says that the connection was reset.
const LINGER: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 64 << 20;

/// A request's body, which is read to its end even where nobody wants it.
struct Whole {
    body: Option<Incoming>,
    lingers: bool,
}

impl Body for Whole {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| self.lingers && !body.is_end_stream()) else { return };
        tokio::spawn(tokio::time::timeout(LINGER, async move {
            let mut left = LINGER_BYTES;
            while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { return };
                left = rest;
            }
        }));
    }
}

/// A connection's bytes, encrypted or not.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that counts as one for as long as its socket is open, upgraded or not.
pub(crate) struct Counted {
    stream: Stream,
    permit: OwnedSemaphorePermit,
    /// Among the connections of its address.
    place: Option<Place>,
}

impl Counted {
    /// A connection that is no HTTP any more does not count as one of its address: what it has become counts by itself.
    pub(crate) fn upgraded(mut self) -> Counted {
        self.place = None;
        self
    }

    /// The socket and what it counts as, where it is not encrypted.
    pub(crate) fn into_plain(self) -> Result<(TcpStream, OwnedSemaphorePermit), Box<Counted>> {
        match self.stream {
            Stream::Plain(stream) => Ok((stream, self.permit)),
            Stream::Tls(_) => Err(Box::new(self)),
        }
    }

    /// Bounds what the kernel holds for the client.
    pub(crate) fn bound_send_buffer(&self, bytes: usize) {
        let socket = match &self.stream {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        };
        let bounded = socket2::SockRef::from(socket).set_send_buffer_size(bytes);
        if let Err(error) = bounded {
            tracing::debug!(%error, "the send buffer stays as it is");
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const SOON: Duration = Duration::from_millis(200);

    /// What a client gets that sends `first` and then nothing, with `SOON` to begin a request.
    async fn told(first: &[u8]) -> Vec<u8> {
        let slow = get(|| async {
            tokio::time::sleep(3 * SOON).await;
            "done"
        });
        let router = Router::new().route("/slow", slow);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let io = TokioIo::new(Counted { stream: Stream::Plain(stream), permit, place: None });
        let served = tokio::spawn(async move {
            let in_use = Arc::new(Use::default());
            let service = service(router, peer, false, in_use.clone());
            _ = converse(io, &http(SOON), service, &in_use, SOON, &CancellationToken::new()).await;
        });
        client.write_all(first).await.unwrap();
        let mut all = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), client.read_to_end(&mut all)).await;
        read.expect("the connection ends").unwrap();
        served.await.unwrap();
        all
    }

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    #[tokio::test]
    async fn a_connection_on_which_no_request_begins_ends_whatever_version_it_may_become() {
        let settings = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
        for first in [b"".as_slice(), b"PRI * HT", PREFACE, &settings, b"GET /slow HT"] {
            told(first).await;
        }
    }

    #[tokio::test]
    async fn a_request_that_takes_longer_than_a_head_may_is_answered() {
        let answered = told(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(answered.ends_with(b"\r\n\r\ndone"), "{}", String::from_utf8_lossy(&answered));
        // of HTTP/2: GET, http, an indexed name with the path, an authority; RFC 7541, appendix A
        let head = [&[0x82, 0x86, 0x04, 0x05][..], b"/slow", &[0x41, 0x01], b"x"].concat();
        let frame = [&[0, 0, head.len() as u8, 1, 5, 0, 0, 0, 1], head.as_slice()].concat();
        let answered = told(&[PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0], &frame].concat()).await;
        assert!(answered.windows(4).any(|part| part == b"done"), "{answered:?}");
    }

    #[tokio::test]
    async fn a_request_names_one_host() {
        for hosts in ["", "host: x\r\nhost: y\r\n"] {
            let head = format!("GET /slow HTTP/1.1\r\n{hosts}connection: close\r\n\r\n");
            let answered = String::from_utf8(told(head.as_bytes()).await).unwrap();
            assert!(answered.starts_with("HTTP/1.1 400 ") && answered.contains("bad_host"), "{answered}");
        }
        let older = told(b"GET /slow HTTP/1.0\r\n\r\n").await;
        assert!(older.ends_with(b"done"), "{}", String::from_utf8_lossy(&older));
    }

    #[test]
    fn an_address_has_so_many_places_and_one_that_is_left_is_free_again() {
        let addresses = Addresses::default();
        let [one, other] = [1, 2].map(|last| IpAddr::from([10, 0, 0, last]));
        let first = addresses.enter(one, 2);
        let second = addresses.enter(one, 2);
        assert!(first.is_some() && second.is_some() && addresses.enter(one, 2).is_none());
        assert!(addresses.enter(other, 2).is_some());
        drop(first);
        assert!(addresses.enter(one, 2).is_some());
        drop(second);
        assert!(addresses.0.lock().is_empty(), "nothing is kept of who left");
    }

    #[test]
    fn of_all_that_is_said_of_whose_request_it_is_the_last_counts() {
        let said = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            values.iter().for_each(|value| _ = headers.append(FORWARDED_FOR, value.parse().unwrap()));
            forwarded_for(&headers).map(|address| address.to_string())
        };
        assert_eq!(said(&[]), None);
        assert_eq!(said(&["10.0.0.1, 203.0.113.7"]).as_deref(), Some("203.0.113.7"));
        assert_eq!(said(&["10.0.0.1", "2001:db8::1"]).as_deref(), Some("2001:db8::1"));
        assert_eq!(said(&["203.0.113.7, nobody"]), None);
    }
}
